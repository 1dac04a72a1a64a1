//! Files written whole or not at all: temporary file in the same folder, fsync, rename. Whether they could be
//! written, told before the work whose result they hold; and that one process at a time works on them.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Shape, Tensor};
use safetensors::{SafeTensorError, View};

/// An error with the name of what it befell before it.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {source}")]
struct Named {
    name: String,
    source: io::Error,
}

/// The same error, told with a name; what the system said stays known as its cause.
pub fn named(name: impl std::fmt::Display, source: io::Error) -> io::Error {
    io::Error::new(source.kind(), Named { name: name.to_string(), source })
}

/// Did the disk give out, being full or broken? Then nothing is wrong with what it was asked for.
pub fn is_of_disk(e: &io::Error) -> bool {
    let full =
        [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::FileTooLarge, ErrorKind::WriteZero];
    let cause = std::error::Error::source(e).and_then(|cause| cause.downcast_ref::<io::Error>());
    // There is no kind for what a broken disk says, and elsewhere the number means something else.
    full.contains(&e.kind())
        || (cfg!(unix) && e.raw_os_error() == Some(libc::EIO))
        || cause.is_some_and(is_of_disk)
}

/// Do both name one file that is there?
pub fn is_same(a: &Path, b: &Path) -> bool {
    a.canonicalize().ok().is_some_and(|a| b.canonicalize().ok() == Some(a))
}

/// Would a file written at one be at the other too? Neither need be there.
pub fn is_one_place(a: &Path, b: &Path) -> bool {
    is_same(a, b) || std::path::absolute(a).ok().is_some_and(|a| std::path::absolute(b).ok() == Some(a))
}

/// What a path stands for: behind links, and whether it is something that is written to and not replaced, as a
/// pipe or a device is. (Of those, what is behind `/dev/stdout` has no path.)
fn target(path: &Path) -> io::Result<(PathBuf, Option<Metadata>)> {
    match std::fs::metadata(path) {
        Err(e) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&e.kind()) => {
            Ok((path.to_owned(), None))
        }
        Err(e) => Err(e),
        Ok(is) if is.is_dir() => Err(io::Error::new(ErrorKind::IsADirectory, "is a folder")),
        Ok(is) if is.permissions().readonly() => {
            Err(io::Error::new(ErrorKind::PermissionDenied, "is read-only"))
        }
        Ok(is) if is.is_file() => Ok((std::fs::canonicalize(path)?, Some(is))),
        Ok(is) => Ok((path.to_owned(), Some(is))),
    }
}

/// Replaces `path` by what `fill` writes; on any error the old file stays as it was.
pub fn write_atomic(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>,
) -> io::Result<()> {
    replace(path, fill, |_| ()).map(|_| ())
}

/// Gives the new file, if one took the old one's place; `ready` sees it just before.
fn replace(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>,
    ready: impl FnOnce(&File),
) -> io::Result<Option<File>> {
    let of_path = |e: io::Error| named(path.display(), e);
    let (path, old) = target(path).map_err(of_path)?;
    if old.as_ref().is_some_and(|is| !is.is_file()) {
        let file = OpenOptions::new().write(true).open(&path).map_err(of_path)?;
        let mut w = BufWriter::new(&file);
        return fill(&mut w).and_then(|()| w.flush()).map(|()| None).map_err(of_path);
    }
    let dir = folder_of(&path);
    std::fs::create_dir_all(dir).map_err(of_path)?;
    let tmp = temporary(dir).map_err(of_path)?;
    let mut w = BufWriter::new(tmp.as_file());
    fill(&mut w).and_then(|()| w.flush()).map_err(of_path)?;
    drop(w);
    #[cfg(unix)]
    {
        // tempfile makes private files; a new result is readable as any other file of the user's.
        use std::os::unix::fs::PermissionsExt;
        let mode = old.map_or_else(|| std::fs::Permissions::from_mode(0o644), |is| is.permissions());
        tmp.as_file().set_permissions(mode).map_err(of_path)?;
    }
    tmp.as_file().sync_all().map_err(of_path)?;
    ready(tmp.as_file());
    tmp.persist(&path).map(Some).map_err(|e| of_path(e.error))
}

/// A file or folder that this process alone works on, for as long as this is there: an advisory lock, which
/// ends with the process at the latest. Where a file system has no locks, it is worked on without. What had
/// to be made for it and is empty in the end goes again.
#[derive(Debug)]
pub struct Held {
    /// Elsewhere than on Unix a folder is no file that could be locked.
    file: Option<File>,
    /// What was made, the innermost first.
    made: Vec<PathBuf>,
}

impl Held {
    /// Holds a folder, which is made where it is not there; `option` is the one that names it.
    ///
    /// # Errors
    /// If another process holds it, or it cannot be made.
    pub fn folder(option: &str, dir: &Path) -> io::Result<Self> {
        let made = missing(dir);
        std::fs::create_dir_all(dir).map_err(|e| named(format_args!("{option} {}", dir.display()), e))?;
        let file = if cfg!(unix) { File::open(dir).ok() } else { None };
        Self::locked(option, dir, file, made)
    }

    /// Holds a file of lines, to be read and added to, which is made where it is not there.
    ///
    /// # Errors
    /// If another process holds it, or it cannot be opened.
    pub fn file(option: &str, path: &Path) -> io::Result<Self> {
        let of_path = |e: io::Error| named(format_args!("{option} {}", path.display()), e);
        let made = missing(path);
        std::fs::create_dir_all(folder_of(path)).map_err(of_path)?;
        let file = OpenOptions::new().create(true).read(true).append(true).open(path).map_err(of_path)?;
        Self::locked(option, path, Some(file), made)
    }

    fn locked(option: &str, path: &Path, file: Option<File>, made: Vec<PathBuf>) -> io::Result<Self> {
        if file.as_ref().is_some_and(|file| !lock(file, path)) {
            // What was made meanwhile is the other's.
            let why = format!("{option} {} is in use by another valor process", path.display());
            return Err(io::Error::new(ErrorKind::ResourceBusy, why));
        }
        Ok(Self { file, made })
    }

    /// The file that [`Held::file`] opened.
    pub fn as_file(&self) -> &File {
        self.file.as_ref().expect("a file's is always open")
    }

    /// As [`write_atomic`], of a file that is held: so is the new one, which is added to behind its end.
    pub fn rewrite(
        &mut self,
        path: &Path,
        fill: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>,
    ) -> io::Result<()> {
        // Locked before it is in its place, so that nobody comes in between.
        let lock = |new: &File| {
            let _ = new.try_lock();
        };
        if let Some(new) = replace(path, fill, lock)? {
            self.file = Some(new);
        }
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // From within outwards, up to the first that is not empty.
        let goes = |path: &PathBuf| match std::fs::symlink_metadata(path) {
            Ok(is) if is.is_dir() => std::fs::remove_dir(path).is_ok(),
            Ok(is) if is.is_file() && is.len() == 0 => std::fs::remove_file(path).is_ok(),
            _ => false,
        };
        let _ = self.made.iter().all(goes);
        // Not by closing alone: a process that is just being started has what was open until it has begun.
        if let Some(file) = &self.file {
            let _ = file.unlock();
        }
    }
}

/// Of a path and the folders above it those that are not there, the innermost first.
fn missing(path: &Path) -> Vec<PathBuf> {
    let is_missing = |p: &&Path| !p.as_os_str().is_empty() && p.symlink_metadata().is_err();
    path.ancestors().take_while(is_missing).map(Path::to_owned).collect()
}

/// Locks what is open of a path, unless another process has, or has removed or replaced it meanwhile.
fn lock(file: &File, path: &Path) -> bool {
    match file.try_lock() {
        Ok(()) => is_at(file, path),
        Err(TryLockError::WouldBlock) => false,
        // There are no locks here.
        Err(TryLockError::Error(_)) => true,
    }
}

#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let place = |is: Metadata| (is.dev(), is.ino());
    let (ours, there) = (file.metadata().map(place), path.metadata().map(place));
    ours.ok().is_some_and(|ours| there.ok() == Some(ours))
}

#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true
}

/// A tensor of a file, made when its turn to be written comes: a checkpoint is never in memory a second time.
pub struct Lazy<'a> {
    dtype: DType,
    shape: Shape,
    make: Box<dyn Fn() -> candle_core::Result<Tensor> + 'a>,
}

impl<'a> Lazy<'a> {
    pub fn new(
        dtype: DType,
        shape: impl Into<Shape>,
        make: impl Fn() -> candle_core::Result<Tensor> + 'a,
    ) -> Self {
        Self { dtype, shape: shape.into(), make: Box::new(make) }
    }

    /// One that is there.
    pub fn of(tensor: &'a Tensor) -> Self {
        Self::new(tensor.dtype(), tensor.shape(), || Ok(tensor.clone()))
    }
}

/// Tensors that are there, for [`write_tensors`].
pub fn lazily(tensors: &HashMap<String, Tensor>) -> impl Iterator<Item = (String, Lazy<'_>)> {
    tensors.iter().map(|(name, t)| (name.clone(), Lazy::of(t)))
}

/// A tensor as safetensors writes it. That it could not be made is noted, for the writer cannot be told.
struct Written<'a> {
    lazy: Lazy<'a>,
    failed: &'a RefCell<Option<candle_core::Error>>,
}

impl View for Written<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        self.lazy.dtype.into()
    }

    fn shape(&self) -> &[usize] {
        self.lazy.shape.dims()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        if self.failed.borrow().is_some() {
            return Cow::Borrowed(&[]);
        }
        let made = (self.lazy.make)().and_then(|t| t.to_device(&Device::Cpu));
        match made {
            Ok(t) => Cow::Owned(View::data(&t).into_owned()),
            Err(e) => {
                self.failed.replace(Some(e));
                Cow::Borrowed(&[])
            }
        }
    }

    fn data_len(&self) -> usize {
        self.lazy.shape.elem_count() * self.lazy.dtype.size_in_bytes()
    }
}

/// Replaces `path` by a safetensors file; on any error the old file stays as it was.
pub fn write_tensors<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, Lazy<'a>)>,
    note: Option<HashMap<String, String>>,
) -> candle_core::Result<()> {
    let of_path = |e: io::Error| named(path.display(), e);
    let (to, _) = target(path).map_err(of_path)?;
    let dir = folder_of(&to);
    std::fs::create_dir_all(dir).map_err(of_path)?;
    let tmp = temporary(dir).map_err(of_path)?.into_temp_path();
    let failed = RefCell::new(None);
    let parts = tensors.into_iter().map(|(name, lazy)| (name, Written { lazy, failed: &failed }));
    let written = safetensors::serialize_to_file(parts, note, &tmp);
    if let Some(e) = failed.take() {
        return Err(e);
    }
    let persist = || {
        written.map_err(|e| match e {
            SafeTensorError::IoError(e) => e,
            e => io::Error::other(e),
        })?;
        let file = File::open(&tmp)?;
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
        }
        file.sync_all()
    };
    persist().map_err(of_path)?;
    tmp.persist(&to).map_err(|e| of_path(e.error))?;
    Ok(())
}

/// Random characters in a temporary file's name.
const RANDOM: usize = 6;

fn temporary(dir: &Path) -> io::Result<tempfile::NamedTempFile> {
    tempfile::Builder::new().prefix(".").rand_bytes(RANDOM).suffix(".tmp").tempfile_in(dir)
}

/// Removes the temporary files that killed processes left in a folder, as far as that can be done. For folders of
/// one run alone: another process that writes there would lose its file.
pub fn sweep(dir: &Path) {
    let is_ours = |name: &str| {
        // Of [`temporary`], and of what safetensors writes on its way.
        let random = name.strip_prefix('.').and_then(|n| n.strip_suffix(".tmp").or(n.strip_prefix("tmp")));
        random.is_some_and(|r| r.len() == RANDOM && r.bytes().all(|b| b.is_ascii_alphanumeric()))
    };
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(is_ours) && entry.file_type().is_ok_and(|t| t.is_file()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// Whether [`write_atomic`] could write `path`. A file that is there stays as it is, and nothing is left
/// behind.
pub fn can_write(path: &Path) -> io::Result<()> {
    match target(path)? {
        (_, Some(is)) if !is.is_file() => Ok(()),
        (path, _) => can_fill(folder_of(&path)),
    }
}

/// Whether lines could be added to `path`, or it could be made.
pub fn can_append(path: &Path) -> io::Result<()> {
    if path.is_file() {
        return OpenOptions::new().append(true).open(path).map(|_| ());
    }
    can_write(path)
}

/// Whether files could be written into a folder, which need not be there yet.
pub fn can_fill(dir: &Path) -> io::Result<()> {
    let is_there = |p: &&Path| p.symlink_metadata().is_ok();
    let at = dir.ancestors().find(is_there).unwrap_or(Path::new("."));
    if !at.is_dir() {
        return Err(named(at.display(), io::Error::new(ErrorKind::NotADirectory, "is no folder")));
    }
    temporary(at).map_err(|e| named(at.display(), e))?;
    Ok(())
}

/// The first `keep` bytes of the SHA-256 of these, in hexadecimal: 32 are all.
pub fn sha256_hex(bytes: &[u8], keep: usize) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes).iter().take(keep).map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_atomic(&path, |w| w.write_all(b"old")).unwrap();
        let err = write_atomic(&path, |w| {
            w.write_all(b"half")?;
            Err(io::Error::other("full"))
        });
        assert!(err.unwrap_err().to_string().contains("a.json"));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_a_mode_and_what_is_no_file_stay() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        write_atomic(&file, |w| w.write_all(b"old")).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        symlink(&file, &link).unwrap();
        write_atomic(&link, |w| w.write_all(b"new")).unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"new");
        assert!(link.is_symlink());
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o444)).unwrap();
        for e in [write_atomic(&file, |w| w.write_all(b"x")), can_write(&file)] {
            assert!(e.unwrap_err().to_string().contains("is read-only"));
        }
        assert_eq!(std::fs::read(&file).unwrap(), b"new");
        can_write(Path::new("/dev/null")).unwrap();
        write_atomic(Path::new("/dev/null"), |w| w.write_all(b"x")).unwrap();
        assert!(!Path::new("/dev/null").is_file());
        assert!(is_same(&file, &link) && !is_same(&file, dir.path()));
    }

    #[cfg(unix)]
    #[test]
    fn what_the_system_said_stays_known_behind_a_name() {
        let of = |code| named("a.json", io::Error::from_raw_os_error(code));
        let full = anyhow::Error::from(of(libc::ENOSPC));
        assert!(full.to_string().starts_with("a.json: No space left"), "{full}");
        let told = |e: &anyhow::Error| e.chain().any(|c| c.downcast_ref().is_some_and(is_of_disk));
        assert!(told(&full) && is_of_disk(&of(libc::EIO)) && is_of_disk(&of(libc::EDQUOT)));
        assert!(!is_of_disk(&of(libc::EACCES)) && !is_of_disk(&of(libc::ENOENT)));
    }

    #[cfg(unix)]
    #[test]
    fn what_is_held_is_nobody_elses_and_goes_if_it_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        let (run, rows) = (dir.path().join("a/run"), dir.path().join("b/rows.jsonl"));
        let busy = |held: io::Result<Held>| {
            let e = held.unwrap_err().to_string();
            assert!(e.starts_with("--out ") && e.ends_with(" is in use by another valor process"), "{e}");
        };
        let held = Held::folder("--out", &run).unwrap();
        busy(Held::folder("--out", &run));
        assert!(run.is_dir(), "it is the other's");
        drop(held);
        assert!(!dir.path().join("a").exists());
        // What is full stays, and so does what was there.
        let held = Held::folder("--out", &run).unwrap();
        std::fs::write(run.join("x"), "x").unwrap();
        drop(held);
        std::fs::remove_file(run.join("x")).unwrap();
        drop(Held::folder("--out", &run).unwrap());
        assert!(run.is_dir());

        drop(Held::file("--out", &rows).unwrap());
        assert!(!dir.path().join("b").exists());
        let mut held = Held::file("--out", &rows).unwrap();
        let add = |held: &Held, text: &str| {
            let mut file = held.as_file();
            file.write_all(text.as_bytes()).unwrap();
        };
        add(&held, "1\n2\n");
        busy(Held::file("--out", &rows));
        held.rewrite(&rows, |w| w.write_all(b"3\n")).unwrap();
        busy(Held::file("--out", &rows));
        add(&held, "4\n");
        drop(held);
        drop(Held::file("--out", &rows).unwrap());
        assert_eq!(std::fs::read_to_string(&rows).unwrap(), "3\n4\n");
    }

    #[cfg(unix)]
    #[test]
    fn what_was_removed_while_it_was_opened_is_not_held() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, "").unwrap();
        let old = File::open(&path).unwrap();
        write_atomic(&path, |w| w.write_all(b"new")).unwrap();
        assert!(!lock(&old, &path) && lock(&File::open(&path).unwrap(), &path));
    }

    #[test]
    fn one_place_has_many_names() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("./a"));
        assert!(is_one_place(&a, &b) && !is_one_place(&a, &dir.path().join("b")));
        assert!(is_one_place(Path::new("a.html"), Path::new("./a.html")));
    }

    #[test]
    fn tensors_are_made_in_their_turn_and_written_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/model.safetensors");
        let there = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu).unwrap();
        let made = Tensor::new(&[5i64], &Device::Cpu).unwrap();
        let write = |failing: bool| {
            let lazy = Lazy::new(DType::I64, 1, || match failing {
                true => Err(candle_core::Error::Msg("no room".into())),
                false => Ok(made.clone()),
            });
            let parts = [("there".to_owned(), Lazy::of(&there)), ("made".to_owned(), lazy)];
            write_tensors(&path, parts, Some(HashMap::from([("format".into(), "pt".into())])))
        };
        write(false).unwrap();
        let read = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        assert_eq!(read["there"].to_vec2::<f32>().unwrap(), there.to_vec2::<f32>().unwrap());
        assert_eq!(read["made"].to_vec1::<i64>().unwrap(), [5]);
        let before = std::fs::read(&path).unwrap();
        assert!(write(true).unwrap_err().to_string().contains("no room"));
        assert_eq!(std::fs::read(&path).unwrap(), before);
        assert_eq!(std::fs::read_dir(dir.path().join("a")).unwrap().count(), 1, "nothing is left behind");
        std::fs::create_dir(dir.path().join("folder")).unwrap();
        let parts = [("there".to_owned(), Lazy::of(&there))];
        let e = write_tensors(&dir.path().join("folder"), parts, None).unwrap_err().to_string();
        assert!(e.contains("folder: "), "{e}");
    }

    #[test]
    fn what_kills_left_is_swept_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        // As a kill leaves it.
        let left = temporary(dir.path()).unwrap().keep().unwrap().1;
        assert!(left.is_file());
        std::fs::write(dir.path().join(".tmpabc123"), "").unwrap();
        let others = [".cache.tmp", ".abc12.tmp", ".abc-12.tmp", "abc123.tmp", ".abc123.tmpx"];
        others.iter().for_each(|name| std::fs::write(dir.path().join(name), "").unwrap());
        std::fs::create_dir(dir.path().join(".abc123.tmp")).unwrap();
        sweep(dir.path());
        assert!(!left.exists());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), others.len() + 1);
        sweep(&dir.path().join("none"));
    }

    #[test]
    fn what_can_be_written_is_told_without_a_trace() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, b"old").unwrap();
        for path in [file.clone(), dir.path().join("new"), dir.path().join("a/b/new")] {
            can_write(&path).unwrap();
            can_append(&path).unwrap();
        }
        can_fill(&dir.path().join("a/b")).unwrap();
        for path in [dir.path().to_owned(), file.join("below"), file.join("far/below")] {
            assert!(can_write(&path).is_err() && can_append(&path).is_err(), "{}", path.display());
        }
        let e = can_fill(&file).unwrap_err().to_string();
        assert!(e.contains("file: is no folder"), "{e}");
        assert_eq!(std::fs::read(&file).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
