//! Verdicts on disk, shared by runs: nobody is asked twice for the same.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::files::can_append;

/// Readable verdicts only, one JSON line each, by the hash of everything that they hang on.
pub(super) struct VerdictCache {
    known: Mutex<HashMap<String, bool>>,
    file: Option<Mutex<File>>,
}

#[derive(Serialize, Deserialize)]
struct Line {
    key: String,
    ok: bool,
}

impl VerdictCache {
    /// In memory alone where there is no path; `key` is the setting that names it.
    ///
    /// # Errors
    /// If it cannot be read or written, or is a file of something else.
    pub fn open(path: &str, key: &str) -> io::Result<Self> {
        if path.is_empty() {
            return Ok(Self { known: Mutex::default(), file: None });
        }
        let path = Path::new(path);
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{key}: {}: {e}", path.display()));
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(named)?;
        }
        let file = OpenOptions::new().create(true).read(true).append(true).open(path).map_err(named)?;
        let text = std::fs::read_to_string(path).map_err(named)?;
        // A killed run may have left it half written.
        let first = text.lines().next().unwrap_or_default();
        let torn = first.starts_with(r#"{"key":"#) && serde_json::from_str::<Value>(first).is_err();
        if !text.is_empty() && !torn && serde_json::from_str::<Line>(first).is_err() {
            let why = "its first line is no verdict, so it is no cache of them; name a new file";
            return Err(named(io::Error::new(io::ErrorKind::InvalidData, why)));
        }
        // A line that a killed run left half written is none; the next one starts anew behind it.
        let known = text.lines().filter_map(|l| serde_json::from_str::<Line>(l).ok()).map(|l| (l.key, l.ok));
        let known = Mutex::new(known.collect());
        if !text.is_empty() && !text.ends_with('\n') {
            (&file).write_all(b"\n").map_err(named)?;
        }
        Ok(Self { known, file: Some(Mutex::new(file)) })
    }

    /// That [`VerdictCache::open`] would do; what is not there is not made.
    pub fn check(path: &str, key: &str) -> io::Result<()> {
        let at = Path::new(path);
        if path.is_empty() || at.exists() {
            return Self::open(path, key).map(|_| ());
        }
        can_append(at).map_err(|e| io::Error::new(e.kind(), format!("{key}: {path}: {e}")))
    }

    pub fn key(parts: &[&str]) -> String {
        let mut hash = Sha256::new();
        for part in parts {
            // The length before, so that no two lists of parts run together.
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }

    pub fn get(&self, key: &str) -> Option<bool> {
        self.known.lock().expect("no holder panics").get(key).copied()
    }

    pub fn put(&self, key: &str, ok: bool) -> io::Result<()> {
        self.known.lock().expect("no holder panics").insert(key.to_owned(), ok);
        let Some(file) = &self.file else { return Ok(()) };
        let mut line = serde_json::to_string(&Line { key: key.to_owned(), ok })?;
        line.push('\n');
        // One write a line, so that runs that share the file do not mix within one.
        file.lock().expect("no holder panics").write_all(line.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_survive_and_a_half_written_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/verdicts.jsonl");
        let open = || VerdictCache::open(path.to_str().unwrap(), "verifier.cache").unwrap();
        let cache = open();
        cache.put("x", true).unwrap();
        cache.put("y", false).unwrap();
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 4]).unwrap();
        let again = open();
        assert_eq!((again.get("x"), again.get("y")), (Some(true), None));
        again.put("z", false).unwrap();
        assert_eq!((open().get("x"), open().get("z")), (Some(true), Some(false)));
        assert_ne!(VerdictCache::key(&["ab", "c"]), VerdictCache::key(&["a", "bc"]));
        // Killed in its first line.
        std::fs::write(&path, &whole[..12]).unwrap();
        assert_eq!(open().get("x"), None);
        open().put("w", true).unwrap();
        assert_eq!(open().get("w"), Some(true));
    }

    #[test]
    fn a_file_of_something_else_is_no_cache() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes.txt");
        for text in ["dear diary", "dear diary\n", "\n", "{\"key\": \"x\"}\n", "{\"key\":\"x\"}\n"] {
            std::fs::write(&path, text).unwrap();
            let e = VerdictCache::open(path.to_str().unwrap(), "verifier.cache").err().unwrap().to_string();
            assert!(e.starts_with("verifier.cache: ") && e.contains("notes.txt: its first line"), "{e}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        // What could be made is not made by being looked at.
        let check =
            |name: &str| VerdictCache::check(dir.path().join(name).to_str().unwrap(), "verifier.cache");
        check("a/new.jsonl").unwrap();
        assert!(!dir.path().join("a").exists());
        for bad in ["notes.txt", "notes.txt/below"] {
            let e = check(bad).unwrap_err().to_string();
            assert!(e.starts_with("verifier.cache: ") && e.contains(bad), "{e}");
        }
    }
}
