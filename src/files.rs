//! Files written whole or not at all: temporary file in the same folder, fsync, rename.

use std::io::{self, BufWriter, Write};
use std::path::Path;

/// Replaces `path` by what `fill` writes; on any error the old file stays as it was.
pub fn write_atomic(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<&std::fs::File>) -> io::Result<()>,
) -> io::Result<()> {
    let dir = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    std::fs::create_dir_all(dir).map_err(named)?;
    let tmp = tempfile::Builder::new().prefix(".").suffix(".tmp").tempfile_in(dir).map_err(named)?;
    let mut w = BufWriter::new(tmp.as_file());
    fill(&mut w).and_then(|()| w.flush()).map_err(named)?;
    drop(w);
    #[cfg(unix)]
    {
        // tempfile makes private files; a result is readable as any other file of the user's.
        use std::os::unix::fs::PermissionsExt;
        tmp.as_file().set_permissions(std::fs::Permissions::from_mode(0o644)).map_err(named)?;
    }
    tmp.as_file().sync_all().map_err(named)?;
    tmp.persist(path).map_err(|e| named(e.error))?;
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
}
