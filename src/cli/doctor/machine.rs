//! What the machine has left: memory, of the machine and of the control groups that this process is in, and
//! room on disks.

use std::path::Path;

use super::super::gb;

/// Memory that this process may still take.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Memory {
    pub free: u64,
    /// The control group that bounds it, where that is less than the machine has.
    pub group: Option<String>,
}

impl Memory {
    pub fn detail(&self) -> String {
        match &self.group {
            Some(group) => format!("{} free, by the limit of control group {group}", gb(self.free)),
            None => format!("{} free", gb(self.free)),
        }
    }
}

/// `None` where there is no /proc.
pub(super) fn memory() -> Option<Memory> {
    memory_below(Path::new("/"))
}

/// With another root of the file system, for tests.
fn memory_below(root: &Path) -> Option<Memory> {
    let read = |path: &Path| std::fs::read_to_string(path).ok();
    let info = read(&root.join("proc/meminfo"))?;
    let line = info.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let machine = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10;
    let mut memory = Memory { free: machine, group: None };
    for line in read(&root.join("proc/self/cgroup")).unwrap_or_default().lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        // Version 2 has one tree for all controllers, which it does not name; version 1 one for memory.
        let (tree, [limit, used], file_pages) = match controllers {
            "" => ("sys/fs/cgroup", ["memory.max", "memory.current"], "inactive_file "),
            c if c.split(',').any(|c| c == "memory") => (
                "sys/fs/cgroup/memory",
                ["memory.limit_in_bytes", "memory.usage_in_bytes"],
                "total_inactive_file ",
            ),
            _ => continue,
        };
        // A group is bounded by all those above it as well. In a container the path may be the host's, of
        // which only the top is there to be seen: that is then the container's own.
        let path = Path::new(path.trim_start_matches('/'));
        let outside = path.components().any(|c| c == std::path::Component::ParentDir);
        for group in path.ancestors().filter(|g| !outside || g.as_os_str().is_empty()) {
            let dir = root.join(tree).join(group);
            let number = |file: &str| read(&dir.join(file))?.trim().parse::<u64>().ok();
            let Some(limit) = number(limit) else { continue };
            // Pages of files that nobody uses are given back when memory is wanted.
            let stat = read(&dir.join("memory.stat")).unwrap_or_default();
            let spare = stat.lines().find_map(|l| l.strip_prefix(file_pages)?.parse::<u64>().ok());
            let used = number(used).unwrap_or(0).saturating_sub(spare.unwrap_or(0));
            let left = limit.saturating_sub(used);
            if left < memory.free {
                memory = Memory { free: left, group: Some(format!("/{}", group.display())) };
            }
        }
    }
    Some(memory)
}

/// Under this a disk is full: no model and no run fits.
const FULL: u64 = 1 << 30;

/// What can be written below a folder.
pub(super) struct Room {
    /// `None` where that cannot be known.
    pub free: Option<u64>,
    pub writable: bool,
}

impl Room {
    /// Of a folder, or of what will hold it if it is not there yet.
    pub fn at(folder: &Path) -> Self {
        let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.into());
        let there = absolute.ancestors().find(|p| p.is_dir()).unwrap_or(Path::new("/"));
        Self { free: crate::weights::hub::free_space(there), writable: writable(there) }
    }

    /// Whether there is any, and how much; `remedy` is what else to do than make room.
    pub fn verdict(&self, remedy: &str) -> (bool, String) {
        match self.free {
            _ if !self.writable => (false, format!("cannot be written to; {remedy}")),
            Some(free) if free < FULL => {
                (false, format!("{} free: the disk is full; make room, or {remedy}", gb(free)))
            }
            Some(free) => (true, format!("{} free", gb(free))),
            None => (true, "free space unknown".into()),
        }
    }
}

/// May this process make files in a folder? Not on a read-only disk, whoever it is.
fn writable(folder: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let Ok(path) = std::ffi::CString::new(folder.as_os_str().as_bytes()) else { return false };
        // SAFETY: the path ends in NUL and outlives the call.
        unsafe { libc::access(path.as_ptr(), libc::W_OK) == 0 }
    }
    #[cfg(not(unix))]
    {
        folder.metadata().is_ok_and(|m| !m.permissions().readonly())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1 << 20;

    /// A machine with 1000 MB, and these files.
    fn machine(files: &[(&str, &str)]) -> Memory {
        let root = tempfile::tempdir().unwrap();
        let meminfo = format!("MemTotal: 9 kB\nMemAvailable:  {} kB\n", 1000 << 10);
        for (path, text) in [("proc/meminfo", meminfo.as_str())].iter().chain(files) {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        memory_below(root.path()).unwrap()
    }

    fn bounded(by: &str, mb: u64) -> Memory {
        Memory { free: mb * MB, group: Some(by.into()) }
    }

    #[test]
    fn without_groups_or_limits_memory_is_the_machines() {
        let whole = Memory { free: 1000 * MB, group: None };
        assert_eq!(machine(&[]), whole);
        let own = ("proc/self/cgroup", "0::/a\n");
        assert_eq!(machine(&[own, ("sys/fs/cgroup/a/memory.max", "max\n")]), whole);
        // What version 1 says where there is no limit.
        let none = ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(machine(&[("proc/self/cgroup", "4:memory:/a\n0::/\n"), none]), whole);
    }

    #[test]
    fn the_tightest_group_from_ones_own_up_to_the_root_bounds_memory() {
        let own = ("proc/self/cgroup", "0::/user.slice/job\n");
        let max = |path: &'static str, mb: u64| (path, (mb * MB).to_string());
        let (job, user) = (
            max("sys/fs/cgroup/user.slice/job/memory.max", 300),
            max("sys/fs/cgroup/user.slice/memory.max", 200),
        );
        let used = (100 * MB).to_string();
        let pages = format!("anon 1\ninactive_file {}\nactive_file 7\n", 40 * MB);
        let (job, user) = ((job.0, job.1.as_str()), (user.0, user.1.as_str()));
        assert_eq!(machine(&[own, job]), bounded("/user.slice/job", 300));
        assert_eq!(machine(&[own, job, user]), bounded("/user.slice", 200));
        let used = ("sys/fs/cgroup/user.slice/memory.current", used.as_str());
        assert_eq!(machine(&[own, job, user, used]), bounded("/user.slice", 100));
        let pages = ("sys/fs/cgroup/user.slice/memory.stat", pages.as_str());
        assert_eq!(machine(&[own, job, user, used, pages]), bounded("/user.slice", 140));
    }

    #[test]
    fn version_1_and_containers_that_see_only_their_own_top_are_read() {
        let limit = (64 * MB).to_string();
        let used = (24 * MB).to_string();
        let groups = ("proc/self/cgroup", "5:devices:/x\n4:cpu,memory:/docker/4f2a\n0::/\n");
        let own = [
            groups,
            ("sys/fs/cgroup/memory/docker/4f2a/memory.limit_in_bytes", limit.as_str()),
            ("sys/fs/cgroup/memory/docker/4f2a/memory.usage_in_bytes", used.as_str()),
        ];
        assert_eq!(machine(&own), bounded("/docker/4f2a", 40));
        // Mounted as the top; the path is the host's.
        let top = [groups, ("sys/fs/cgroup/memory/memory.limit_in_bytes", limit.as_str())];
        assert_eq!(machine(&top), bounded("/", 64));
        let above = [("proc/self/cgroup", "0::/../../other\n"), ("sys/fs/cgroup/memory.max", limit.as_str())];
        assert_eq!(machine(&above), bounded("/", 64));
    }

    #[test]
    fn a_full_and_a_read_only_disk_are_said() {
        let say = |free, writable| Room { free, writable }.verdict("set HF_HOME to another disk");
        let (ok, text) = say(Some(3_000_000), true);
        assert!(
            !ok && text.contains("3 MB free: the disk is full") && text.ends_with("HF_HOME to another disk")
        );
        assert!(!say(Some(0), true).0 && !say(Some(1 << 40), false).0 && !say(None, false).0);
        assert!(say(Some(1 << 40), false).1.starts_with("cannot be written to"));
        assert_eq!(say(Some(5_000_000_000), true), (true, "5.0 GB free".into()));
        assert!(say(None, true).0);
    }

    #[test]
    fn room_is_that_of_what_holds_a_folder_to_come() {
        let dir = tempfile::tempdir().unwrap();
        let room = Room::at(&dir.path().join("not/there/yet"));
        assert!(room.writable && room.free.is_none_or(|f| f > 0));
    }
}
