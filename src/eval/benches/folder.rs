//! A run's folder: what it was asked for, what it has measured, and the pictures of its galleries.
//!
//! `settings.json` is written first; `samples.jsonl` grows by whole lines, one a
//! question in the run's order, and a line that a kill left torn is dropped. A run goes on only under
//! the settings that it began with, and in one process at a time.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::record::each;
use crate::files::{Held, sweep, write_atomic};

pub const SETTINGS: &str = "settings.json";
pub const PICTURES: &str = "pictures";

pub struct Folder {
    file: File,
    place: Place,
}

/// Where a run's files are.
struct Place {
    dir: PathBuf,
    lines: PathBuf,
    /// Whether all in it is this call's.
    fresh: bool,
    /// Given back last, when nothing more is done to the files.
    _held: Held,
}

impl Folder {
    /// A new folder, or one of the same settings behind what it holds; `lines` is the name of the file that
    /// grows, and `done` hears what stands in it.
    ///
    /// # Errors
    /// A folder of other settings, with something else in it, or in which another process is at work.
    pub fn open<T: DeserializeOwned>(
        dir: &Path,
        settings: &Value,
        lines: &str,
        done: impl FnMut(T) -> Result<()>,
    ) -> Result<Self> {
        let named = || format!("--out {}", dir.display());
        if dir.exists() && !dir.is_dir() {
            bail!("{} is a file; name a folder", named())
        }
        // Before anything is looked at, which another process may be writing.
        let held = Held::folder("--out", dir)?;
        let path = dir.join(SETTINGS);
        let fresh = !path.exists();
        if !fresh {
            let old = read_json(&path)?;
            if let Some(key) = difference(&old, settings, "") {
                bail!(
                    "{} holds a run with other settings ({key}); name a new folder, or repeat them",
                    named()
                )
            }
            [dir.to_owned(), dir.join(PICTURES)].iter().for_each(|of_run| sweep(of_run));
        } else {
            // What a kill left half written has a hidden name.
            let is_shown = |e: &std::fs::DirEntry| !e.file_name().to_string_lossy().starts_with('.');
            let full =
                dir.is_dir() && std::fs::read_dir(dir).with_context(named)?.flatten().any(|e| is_shown(&e));
            ensure!(!full, "{} is not empty and holds no run; name a new folder", named());
        }
        let place = Place { dir: dir.into(), lines: dir.join(lines), fresh, _held: held };
        // Also where they are there: what was refused then may be known now.
        write_atomic(&path, |w| writeln!(w, "{settings:#}"))?;
        let file =
            OpenOptions::new().create(true).read(true).append(true).open(&place.lines).with_context(named)?;
        drop_torn_line(&file, &place.lines)?;
        each(&place.lines, done)?;
        Ok(Self { file, place })
    }

    /// Leaves the folder there, though it may hold no record.
    pub fn keep(&mut self) {
        self.place.fresh = false;
    }

    pub fn path(&self) -> &Path {
        &self.place.dir
    }

    /// One write a line.
    pub fn add(&mut self, record: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        self.file.write_all(&line).with_context(|| self.place.lines.display().to_string())?;
        self.keep();
        Ok(())
    }

    /// Has all lines made anew, in one step.
    ///
    /// # Errors
    /// A line of another form, or a failure of `change`; the file is as it was then.
    pub fn revise<T: DeserializeOwned + Serialize>(
        &mut self,
        change: impl FnOnce(Vec<T>) -> Result<Vec<T>>,
    ) -> Result<()> {
        let mut all = Vec::new();
        each(&self.place.lines, |line| {
            all.push(line);
            Ok(())
        })?;
        let all = change(all)?;
        write_atomic(&self.place.lines, |w| {
            all.iter().try_for_each(|line| {
                serde_json::to_writer(&mut *w, line)?;
                w.write_all(b"\n")
            })
        })?;
        // The file's name stands for another one now.
        let lines = &self.place.lines;
        let named = || lines.display().to_string();
        self.file = OpenOptions::new().read(true).append(true).open(lines).with_context(named)?;
        Ok(())
    }

    /// Puts the lines in the order of their places, if they are not: what was asked again stands behind what
    /// came after it.
    pub fn in_order<T: DeserializeOwned + Serialize, P: Ord>(
        &mut self,
        place: impl Fn(&T) -> P,
    ) -> Result<()> {
        let (mut last, mut sorted) = (None, true);
        each(&self.place.lines, |line: T| {
            let at = Some(place(&line));
            sorted &= last <= at;
            last = at;
            Ok(())
        })?;
        if sorted {
            return Ok(());
        }
        self.revise(|mut all: Vec<T>| {
            all.sort_by_key(&place);
            Ok(all)
        })
    }

    /// Keeps a picture for the galleries.
    pub fn keep_picture(&self, bench: &str, index: usize, jpeg: &[u8]) -> Result<()> {
        Ok(write_atomic(&picture_path(&self.place.dir, bench, index), |w| w.write_all(jpeg))?)
    }
}

/// Of a run that ended before its first record nothing is left: mended, it may have other settings. (A folder
/// that was made for it is empty then, and goes with what holds it.)
impl Drop for Place {
    fn drop(&mut self) {
        if !self.fresh {
            return;
        }
        let _ = std::fs::remove_file(self.dir.join(SETTINGS));
        let _ = std::fs::remove_file(&self.lines);
        // A picture comes before its record, for which a full disk has no room.
        let _ = std::fs::remove_dir_all(self.dir.join(PICTURES));
    }
}

pub fn picture_path(dir: &Path, bench: &str, index: usize) -> PathBuf {
    dir.join(PICTURES).join(format!("{bench}-{index:06}.jpg"))
}

pub fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| format!("{} is no JSON", path.display()))
}

/// Cuts a file of lines behind its last whole one.
fn drop_torn_line(file: &File, path: &Path) -> Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    let named = || path.display().to_string();
    let mut end = file.metadata().with_context(named)?.len();
    let whole = end;
    let mut reader = file;
    let mut block = vec![0; 1 << 16];
    while end > 0 {
        let start = end.saturating_sub(block.len() as u64);
        let n = (end - start) as usize;
        reader.seek(SeekFrom::Start(start)).with_context(named)?;
        reader.read_exact(&mut block[..n]).with_context(named)?;
        if let Some(at) = block[..n].iter().rposition(|b| *b == b'\n') {
            end = start + at as u64 + 1;
            break;
        }
        end = start;
    }
    if end < whole {
        file.set_len(end).with_context(named)?;
    }
    Ok(())
}

/// The first key whose value is another one now, with both. A bench that could not be opened then has no
/// source (null), and may have one now.
fn difference(old: &Value, new: &Value, path: &str) -> Option<String> {
    let short = |v: &Value| {
        let text = v.to_string();
        if text.chars().count() > 60 {
            format!("{}…", text.chars().take(60).collect::<String>())
        } else {
            text
        }
    };
    match (old, new) {
        (Value::Object(a), Value::Object(b)) => {
            let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
            keys.dedup();
            keys.into_iter().find_map(|k| {
                let path = if path.is_empty() { k.clone() } else { format!("{path}.{k}") };
                let of = |m: &serde_json::Map<String, Value>| m.get(k).cloned().unwrap_or(Value::Null);
                difference(&of(a), &of(b), &path)
            })
        }
        (Value::Null, _) | (_, Value::Null) if path.starts_with("sources.") => None,
        _ if old == new => None,
        _ => Some(format!("{path}: {} there, {} here", short(old), short(new))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_first_difference_is_named_with_both_values() {
        let old = json!({ "seed": 1, "config": { "vlm": { "model": "a" } }, "sources": { "vsr": null } });
        assert_eq!(difference(&old, &old, ""), None);
        let mut new = old.clone();
        new["sources"]["vsr"] = json!("found");
        assert_eq!(difference(&old, &new, ""), None, "it was refused then");
        new["config"]["vlm"]["model"] = json!("b");
        assert_eq!(difference(&old, &new, "").unwrap(), "config.vlm.model: \"a\" there, \"b\" here");
    }

    #[test]
    fn a_run_without_a_record_leaves_no_folder() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("run");
        let settings = json!({ "seed": 1 });
        let open = |settings: &Value| Folder::open(&out, settings, "rows.jsonl", |_: Value| Ok(())).unwrap();
        let folder = open(&settings);
        folder.keep_picture("rooms", 0, b"jpeg").unwrap();
        drop(folder);
        assert!(!out.exists());
        // One that was there stays, and so does what is in it.
        std::fs::create_dir(&out).unwrap();
        drop(open(&settings));
        assert_eq!(std::fs::read_dir(&out).unwrap().count(), 0);
        let mut folder = open(&json!({ "seed": 2 }));
        folder.add(&1).unwrap();
        drop(folder);
        // What a kill left half written is not kept.
        let half = [out.join(".Ab3dE9.tmp"), out.join(PICTURES).join(".x0y1z2.tmp")];
        std::fs::create_dir(out.join(PICTURES)).unwrap();
        half.iter().for_each(|file| std::fs::write(file, "half").unwrap());
        drop(open(&json!({ "seed": 2 })));
        assert!(half.iter().all(|file| !file.exists()));
        assert_eq!(std::fs::read_to_string(out.join("rows.jsonl")).unwrap(), "1\n");
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_is_one_processs_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("run");
        let open = || Folder::open(&out, &json!({ "seed": 1 }), "rows.jsonl", |_: Value| Ok(()));
        let mut folder = open().unwrap();
        folder.add(&1).unwrap();
        let e = open().err().unwrap().to_string();
        assert!(e.contains("--out ") && e.ends_with("run is in use by another valor process"), "{e}");
        drop(folder);
        assert!(open().is_ok());
    }

    #[test]
    fn lines_are_put_in_order_and_go_on_growing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        let mut folder = Folder::open(&path, &json!({}), "rows.jsonl", |_: u32| Ok(())).unwrap();
        for n in [1, 4, 2] {
            folder.add(&n).unwrap();
        }
        folder.in_order(|n: &u32| *n).unwrap();
        folder.revise(|all: Vec<u32>| Ok(all.into_iter().filter(|n| *n != 2).collect())).unwrap();
        folder.add(&5).unwrap();
        let read = || std::fs::read_to_string(path.join("rows.jsonl")).unwrap();
        assert_eq!(read(), "1\n4\n5\n");
        assert!(folder.revise(|_: Vec<u32>| bail!("no")).is_err());
        assert_eq!(read(), "1\n4\n5\n");
    }

    #[test]
    fn a_torn_line_is_dropped_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        let long = "x".repeat(200_000);
        for (text, want) in [
            ("", ""),
            ("torn", ""),
            ("a\nb\n", "a\nb\n"),
            ("a\nto", "a\n"),
            (&*format!("a\n{long}"), "a\n"),
            (&*format!("{long}\nb"), &*format!("{long}\n")),
        ] {
            std::fs::write(&path, text).unwrap();
            let file = OpenOptions::new().read(true).append(true).open(&path).unwrap();
            drop_torn_line(&file, &path).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), want);
        }
    }
}
