//! Files written whole or not at all: temporary file in the same folder, fsync, rename. And whether they
//! could be written, told before the work whose result they hold.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::Metadata;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Shape, Tensor};
use safetensors::View;

/// Do both name one file that is there?
pub fn is_same(a: &Path, b: &Path) -> bool {
    a.canonicalize().ok().is_some_and(|a| b.canonicalize().ok() == Some(a))
}

/// What a path stands for: behind links, and whether it is something that is written to and not replaced, as a
/// pipe or a device is.
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
        Ok(is) => Ok((std::fs::canonicalize(path)?, Some(is))),
    }
}

/// Replaces `path` by what `fill` writes; on any error the old file stays as it was.
pub fn write_atomic(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<&std::fs::File>) -> io::Result<()>,
) -> io::Result<()> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    let (path, old) = target(path).map_err(named)?;
    if old.as_ref().is_some_and(|is| !is.is_file()) {
        let file = std::fs::OpenOptions::new().write(true).open(&path).map_err(named)?;
        let mut w = BufWriter::new(&file);
        return fill(&mut w).and_then(|()| w.flush()).map_err(named);
    }
    let dir = folder_of(&path);
    std::fs::create_dir_all(dir).map_err(named)?;
    let tmp = temporary(dir).map_err(named)?;
    let mut w = BufWriter::new(tmp.as_file());
    fill(&mut w).and_then(|()| w.flush()).map_err(named)?;
    drop(w);
    #[cfg(unix)]
    {
        // tempfile makes private files; a new result is readable as any other file of the user's.
        use std::os::unix::fs::PermissionsExt;
        let mode = old.map_or_else(|| std::fs::Permissions::from_mode(0o644), |is| is.permissions());
        tmp.as_file().set_permissions(mode).map_err(named)?;
    }
    tmp.as_file().sync_all().map_err(named)?;
    tmp.persist(&path).map_err(|e| named(e.error))?;
    Ok(())
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
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    let dir = folder_of(path);
    std::fs::create_dir_all(dir).map_err(named)?;
    let tmp = temporary(dir).map_err(named)?.into_temp_path();
    let failed = RefCell::new(None);
    let parts = tensors.into_iter().map(|(name, lazy)| (name, Written { lazy, failed: &failed }));
    let written = safetensors::serialize_to_file(parts, note, &tmp);
    if let Some(e) = failed.take() {
        return Err(e);
    }
    let persist = || {
        written.map_err(io::Error::other)?;
        let file = std::fs::File::open(&tmp)?;
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
        }
        file.sync_all()
    };
    persist().map_err(named)?;
    tmp.persist(path).map_err(|e| named(e.error))?;
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
        return std::fs::OpenOptions::new().append(true).open(path).map(|_| ());
    }
    can_write(path)
}

/// Whether files could be written into a folder, which need not be there yet.
pub fn can_fill(dir: &Path) -> io::Result<()> {
    let is_there = |p: &&Path| p.symlink_metadata().is_ok();
    let at = dir.ancestors().find(is_there).unwrap_or(Path::new("."));
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", at.display()));
    if !at.is_dir() {
        return Err(named(io::Error::new(ErrorKind::NotADirectory, "is no folder")));
    }
    temporary(at).map_err(named)?;
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
