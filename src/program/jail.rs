//! What a worker gives up before it reads any program: files, network, new processes, most system
//! calls, memory and processor time without bound, and outliving its parent.
//!
//! Not protected against: time and cache side channels, and bugs of the kernel in the few system
//! calls that stay allowed. Where the platform lacks a layer, [`Layers`] says so; the interpreter's
//! own limits and the parent's deadline hold everywhere.

use std::fmt;
#[cfg(target_os = "linux")]
use std::path::Path;

use super::wire::Plain;

/// One layer of the jail, and whether it holds here.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Layer {
    pub name: String,
    pub active: bool,
    /// What it does, or why it is missing.
    pub detail: String,
}

/// The layers that a worker reported, in the order in which it took them on.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Layers(pub Vec<Layer>);

impl Layers {
    /// Nothing is missing.
    pub fn complete(&self) -> bool {
        self.0.iter().all(|layer| layer.active)
    }

    /// What is missing, and why, on one line.
    pub fn missing(&self) -> String {
        let missing = self.0.iter().filter(|layer| !layer.active);
        missing.map(|layer| format!("{}: {}", layer.name, layer.detail)).collect::<Vec<_>>().join("; ")
    }

    pub(super) fn add(&mut self, name: &str, result: Result<&str, String>) {
        let active = result.is_ok();
        let detail = result.map_or_else(|why| why, str::to_owned);
        self.0.push(Layer { name: name.to_owned(), active, detail });
    }

    pub(super) fn to_plain(&self) -> Plain {
        let layer =
            |l: &Layer| Plain::List(vec![Plain::str(&l.name), Plain::Bool(l.active), Plain::str(&l.detail)]);
        Plain::List(self.0.iter().map(layer).collect())
    }

    pub(super) fn from_plain(plain: &Plain) -> Option<Self> {
        let Plain::List(items) = plain else { return None };
        let layer = |item: &Plain| match item {
            Plain::List(parts) => match parts.as_slice() {
                [Plain::Str(name), Plain::Bool(active), Plain::Str(detail)] => {
                    Some(Layer { name: name.clone(), active: *active, detail: detail.clone() })
                }
                _ => None,
            },
            _ => None,
        };
        items.iter().map(layer).collect::<Option<_>>().map(Self)
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for layer in &self.0 {
            let mark = if layer.active { "yes" } else { "NO" };
            writeln!(f, "{:<14} {mark:<3} {}", layer.name, layer.detail)?;
        }
        Ok(())
    }
}

/// Everything but the system-call filter, which must wait until the worker's thread exists.
///
/// `address_space` in bytes, `cpu` in seconds of this process's life; `parent` is the process that
/// must not be outlived.
pub(super) fn enter(address_space: u64, cpu: u64, parent: u32) -> Layers {
    let mut layers = Layers::default();
    // The parent starts workers without an environment; this says whether it did.
    let empty = std::env::vars_os().next().is_none();
    layers.add("environment", empty.then_some("empty").ok_or("not empty".to_owned()));
    #[cfg(unix)]
    unix::enter(&mut layers, address_space, cpu, parent);
    #[cfg(not(unix))]
    let _ = (address_space, cpu, parent);
    layers
}

/// What a worker that becomes a Python may still read.
#[cfg(target_os = "linux")]
#[derive(Default)]
pub(super) struct Readable<'a> {
    /// Files that are read and run.
    pub run: Vec<&'a Path>,
    /// Files, and folders with all that is in them, that are read.
    pub read: Vec<&'a Path>,
    /// Folders that are listed.
    pub list: Vec<&'a Path>,
}

/// As [`enter`], for a worker that goes on to become a Python: it may read so much, and Landlock has to
/// be there. The filter of system calls is that worker's own.
#[cfg(target_os = "linux")]
pub(super) fn enter_python(address_space: u64, cpu: u64, parent: u32, readable: &Readable) -> Layers {
    let mut layers = Layers::default();
    let empty = std::env::vars_os().next().is_none();
    let detail = "Python's fixed settings alone";
    layers.add("environment", empty.then_some(detail).ok_or("not empty".to_owned()));
    layers.add("descriptors", unix::close_descriptors().map(|()| unix::CLOSED));
    layers.add("parent death", linux::die_with(parent).map(|()| linux::DIES));
    layers.add("landlock", linux::landlock_python(readable));
    // A few descriptors at once, for imports.
    let files = 32;
    let limited = unix::limits(address_space, cpu, files).and_then(|()| linux::no_processes());
    layers
        .add("rlimits", limited.map(|()| "address space, processor time, file sizes, no processes, no core"));
    layers
}

/// The last layer: from here on only memory, time and the two ends of the pipe are left.
pub(super) fn seal(layers: &mut Layers) {
    #[cfg(target_os = "linux")]
    layers.add("seccomp", linux::seccomp().map(|()| "an allow-list of system calls; the rest fail"));
    #[cfg(not(target_os = "linux"))]
    layers.add("seccomp", Err("only on Linux".to_owned()));
}

#[cfg(unix)]
mod unix {
    use super::Layers;

    pub(super) const CLOSED: &str = "all but the pipe to the parent are closed";

    fn last_error(what: &str) -> String {
        format!("{what}: {}", std::io::Error::last_os_error())
    }

    pub(super) fn enter(layers: &mut Layers, address_space: u64, cpu: u64, parent: u32) {
        layers.add("descriptors", close_descriptors().map(|()| CLOSED));
        #[cfg(target_os = "linux")]
        {
            layers.add("parent death", super::linux::die_with(parent).map(|()| super::linux::DIES));
            layers.add("landlock", super::linux::landlock());
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = parent;
            layers.add("parent death", Err("only on Linux; ends at the pipe's end all the same".to_owned()));
            layers.add("landlock", Err("only on Linux".to_owned()));
        }
        layers.add(
            "rlimits",
            limits(address_space, cpu, 3)
                .map(|()| "address space, processor time, no files, no processes, no core"),
        );
    }

    pub(super) fn close_descriptors() -> Result<(), String> {
        #[cfg(target_os = "linux")]
        {
            // SAFETY: takes three integers. The worker has opened nothing of its own beyond 0–2.
            let rc = unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32) };
            if rc == 0 {
                return Ok(());
            }
        }
        for fd in 3..4096 {
            // SAFETY: takes an integer; nothing in this process owns these descriptors.
            unsafe { libc::close(fd) };
        }
        Ok(())
    }

    pub(super) fn limits(address_space: u64, cpu: u64, files: u64) -> Result<(), String> {
        let mut wanted = vec![
            (libc::RLIMIT_CORE, 0),
            (libc::RLIMIT_FSIZE, 0),
            (libc::RLIMIT_NOFILE, files),
            (libc::RLIMIT_CPU, cpu),
            (libc::RLIMIT_AS, address_space),
        ];
        // On Linux the worker still has to start its one thread; see `seal_processes`.
        if cfg!(not(target_os = "linux")) {
            wanted.push((libc::RLIMIT_NPROC, 0));
        }
        for (resource, value) in wanted {
            set_limit(resource, value)?;
        }
        Ok(())
    }

    pub(super) fn set_limit(resource: Resource, value: u64) -> Result<(), String> {
        let limit = libc::rlimit { rlim_cur: value as libc::rlim_t, rlim_max: value as libc::rlim_t };
        // SAFETY: `limit` is a valid `rlimit` that outlives the call.
        let rc = unsafe { libc::setrlimit(resource, &limit) };
        if rc == 0 { Ok(()) } else { Err(last_error("setrlimit")) }
    }

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    pub(super) type Resource = libc::__rlimit_resource_t;
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    pub(super) type Resource = libc::c_int;
}

/// What any program's interpreter keeps. No call here opens, connects, starts or signals anything but this
/// process itself.
#[cfg(target_os = "linux")]
pub(super) const OWN_CALLS: &[i64] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_futex,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sigaltstack,
    libc::SYS_clock_gettime,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
];

#[cfg(target_os = "linux")]
mod linux {
    use std::collections::BTreeMap;

    use landlock::{
        ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
        RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
    };
    use seccompiler::{
        BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
        SeccompRule,
    };

    use super::Readable;

    pub(super) const DIES: &str = "killed with its parent";

    pub(super) fn die_with(parent: u32) -> Result<(), String> {
        // SAFETY: these `prctl` operations take integers only.
        let rc = unsafe {
            libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0)
        };
        if rc != 0 {
            return Err(format!("prctl: {}", std::io::Error::last_os_error()));
        }
        // The parent may have died before the call: then no signal will ever come.
        if std::os::unix::process::parent_id() != parent {
            std::process::exit(0);
        }
        Ok(())
    }

    pub(super) fn landlock() -> Result<&'static str, String> {
        // The newest rules this crate knows; the kernel takes what it understands.
        let abi = ABI::V6;
        let status = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(abi))
            .and_then(|rules| rules.handle_access(AccessNet::from_all(abi)))
            .and_then(|rules| rules.scope(Scope::from_all(abi)))
            .and_then(|rules| rules.create())
            .and_then(|rules| rules.restrict_self())
            .map_err(|e| e.to_string())?;
        match status.ruleset {
            RulesetStatus::FullyEnforced => Ok("no file, no TCP, no signal or socket beyond itself"),
            RulesetStatus::PartiallyEnforced => Ok("no file; this kernel does not know the newer rules"),
            RulesetStatus::NotEnforced => Err(why_no_landlock(landlock_error())),
        }
    }

    /// What the kernel answers when it is asked which Landlock it has; 0 if it has one.
    fn landlock_error() -> i32 {
        const VERSION: u32 = 1;
        // SAFETY: with this flag the call takes no attributes and makes nothing.
        let rc = unsafe {
            libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, VERSION)
        };
        if rc >= 0 { 0 } else { std::io::Error::last_os_error().raw_os_error().unwrap_or(0) }
    }

    /// From that answer, why it confines nothing, and what would help.
    pub(super) fn why_no_landlock(error: i32) -> String {
        match error {
            libc::ENOSYS => "this kernel has none (Linux 5.13 has), or the container hides it".into(),
            libc::EOPNOTSUPP => "this kernel has it switched off; boot with landlock in lsm=".into(),
            libc::EPERM | libc::EACCES => {
                "the container forbids it; allow landlock's system calls in its seccomp profile".into()
            }
            0 => "the kernel has it and enforces nothing".into(),
            other => format!("the kernel refuses it: {}", std::io::Error::from_raw_os_error(other)),
        }
    }

    /// For a Python, whose own calls the rules have to allow at start: all rules about files that this
    /// version of Landlock has are wanted, of the newer ones what the kernel knows. (What those refuse,
    /// sockets, signals and ioctl, the filter of system calls refuses too.)
    pub(super) fn landlock_python(readable: &Readable) -> Result<&'static str, String> {
        let files = ABI::V3;
        let newest = ABI::V6;
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::from_all(files))
            .map_err(|_| match landlock_error() {
                0 => "this kernel's is too old (Linux 6.2 has what is needed)".to_owned(),
                error => why_no_landlock(error),
            })?
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(newest))
            .and_then(|rules| rules.handle_access(AccessNet::from_all(newest)))
            .and_then(|rules| rules.scope(Scope::from_all(newest)))
            .and_then(|rules| rules.create())
            .map_err(|e| e.to_string())?;
        let read: BitFlags<AccessFs> = AccessFs::ReadFile.into();
        let all = [
            (&readable.run, read | AccessFs::Execute, read | AccessFs::Execute),
            (&readable.read, read, read | AccessFs::ReadDir),
            (&readable.list, BitFlags::empty(), AccessFs::ReadDir.into()),
        ];
        for (paths, of_file, of_folder) in all {
            for path in paths.iter().filter(|path| path.exists()) {
                let access = if path.is_dir() { of_folder } else { of_file };
                let opened = PathFd::new(path).map_err(|e| e.to_string())?;
                rules = rules.add_rule(PathBeneath::new(opened, access)).map_err(|e| e.to_string())?;
            }
        }
        match rules.restrict_self().map_err(|e| e.to_string())?.ruleset {
            RulesetStatus::NotEnforced => Err("this kernel has none".to_owned()),
            _ => Ok("at start Python's own files, read only; no TCP, no signal or socket beyond itself"),
        }
    }

    /// No more processes or threads from here on.
    pub(super) fn no_processes() -> Result<(), String> {
        super::unix::set_limit(libc::RLIMIT_NPROC, 0)
    }

    pub(super) fn seccomp() -> Result<(), String> {
        no_processes()?;
        let program = filter().map_err(|e| e.to_string())?;
        seccompiler::apply_filter_all_threads(&program).map_err(|e| e.to_string())
    }

    fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
        let allowed = super::OWN_CALLS.iter().chain(&[libc::SYS_getrandom]);
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = allowed.map(|&call| (call, vec![])).collect();
        // Memory may be had, but none that can be executed.
        for call in [libc::SYS_mmap, libc::SYS_mprotect] {
            let exec = libc::PROT_EXEC as u64;
            let no_exec = SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(exec), 0)?;
            rules.insert(call, vec![SeccompRule::new(vec![no_exec])?]);
        }
        SeccompFilter::new(
            rules,
            SeccompAction::Errno(libc::EPERM as u32),
            SeccompAction::Allow,
            std::env::consts::ARCH.try_into()?,
        )?
        .try_into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn a_missing_landlock_says_whose_doing_it_is() {
        let cases = [
            (libc::ENOSYS, "this kernel has none"),
            (libc::EOPNOTSUPP, "lsm="),
            (libc::EPERM, "the container forbids it"),
            (libc::EINVAL, "the kernel refuses it"),
        ];
        for (error, want) in cases {
            let said = linux::why_no_landlock(error);
            assert!(said.contains(want) && !said.contains('\n'), "{said}");
        }
    }

    #[test]
    fn layers_cross_the_wire() {
        let mut layers = Layers::default();
        layers.add("a", Ok("holds"));
        assert!(layers.complete());
        layers.add("b", Err("lacks".into()));
        assert!(!layers.complete());
        assert_eq!(Layers::from_plain(&layers.to_plain()), Some(layers));
        assert_eq!(Layers::from_plain(&Plain::Int(1)), None);
    }
}
