//! Checkpoints of long trainings, as folders that are whole or not there.
//!
//! A checkpoint is filled in a temporary folder beside the others; every file is synced, then a
//! manifest with their SHA-256 is written last, and the folder is renamed into place. So a kill at any
//! moment leaves the earlier ones as they were and, at worst, a temporary folder, which the next run
//! sweeps. Resuming takes the newest whose manifest holds. Two runs in one folder are kept apart by who
//! starts them ([`crate::files::Held`]). Not protected against: someone who forges files and manifest.

use crate::files::write_atomic;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

const MANIFEST: &str = "manifest.json";
const PREFIX: &str = "step-";
const UNFINISHED: &str = ".unfinished-";

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Manifest {
    step: u64,
    /// Size and SHA-256 of each file.
    files: BTreeMap<String, (u64, String)>,
}

/// The checkpoints of one run.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    /// The newest so many are kept; at least one.
    keep: usize,
}

/// One that is whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Saved {
    pub step: u64,
    pub path: PathBuf,
}

impl Checkpoints {
    /// In a folder, which is made; what an interrupted save left there is removed.
    pub fn open(dir: &Path, keep: usize) -> Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        for entry in std::fs::read_dir(dir)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                std::fs::remove_dir_all(entry.path()).with_context(|| entry.path().display().to_string())?;
            }
        }
        Ok(Self { dir: dir.into(), keep: keep.max(1) })
    }

    /// Those in a folder as it is, to read: another process may be saving there.
    pub fn of(dir: &Path) -> Self {
        Self { dir: dir.into(), keep: 1 }
    }

    /// Saves what `fill` writes into the folder that it is given, as the checkpoint of a step, and
    /// removes those beyond the newest `keep`, but for the one of step `also`, and those of later steps: a run
    /// comes to an earlier step again only where they are broken.
    pub fn save(
        &self,
        step: u64,
        also: Option<u64>,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Saved> {
        let path = self.path(step);
        let tmp = self.dir.join(format!("{UNFINISHED}{step}"));
        if tmp.exists() {
            std::fs::remove_dir_all(&tmp)?;
        }
        std::fs::create_dir(&tmp).with_context(|| tmp.display().to_string())?;
        fill(&tmp)?;
        let mut files = BTreeMap::new();
        for entry in std::fs::read_dir(&tmp)? {
            let entry = entry?;
            File::open(entry.path())?.sync_all()?;
            let name = entry.file_name().to_string_lossy().into_owned();
            files.insert(name, (entry.metadata()?.len(), sha256(&entry.path())?));
        }
        write_atomic(&tmp.join(MANIFEST), |w| {
            writeln!(w, "{}", serde_json::to_string_pretty(&Manifest { step, files })?)
        })?;
        sync_dir(&tmp)?;
        // One of this step may stand there broken, which is why the step was done again.
        if path.exists() {
            std::fs::remove_dir_all(&path)?;
        }
        std::fs::rename(&tmp, &path).with_context(|| path.display().to_string())?;
        sync_dir(&self.dir)?;
        let (all, later): (Vec<u64>, Vec<u64>) = self.steps()?.into_iter().partition(|s| *s <= step);
        let old = all.iter().rev().skip(self.keep).filter(|s| Some(**s) != also);
        for &unwanted in later.iter().chain(old) {
            std::fs::remove_dir_all(self.path(unwanted))?;
        }
        Ok(Saved { step, path })
    }

    /// The newest that is whole; `passed_over` hears of each newer one that is not, and why.
    ///
    /// # Errors
    /// If there are some and none is whole: to begin anew would destroy what may yet be rescued.
    pub fn newest(&self, mut passed_over: impl FnMut(&str)) -> Result<Option<Saved>> {
        let mut why = None;
        for &step in self.steps()?.iter().rev() {
            let path = self.path(step);
            match verify(&path, step) {
                Ok(()) => return Ok(Some(Saved { step, path })),
                Err(e) => {
                    let fault = format!("{}: {e:#}", path.display());
                    passed_over(&fault);
                    why.get_or_insert(fault);
                }
            }
        }
        match why {
            None => Ok(None),
            Some(why) => bail!(
                "no checkpoint in {} is whole ({why}); put a copy back, or move the folder away to begin anew",
                self.dir.display()
            ),
        }
    }

    /// Is there any, be it whole or not?
    pub fn any(&self) -> bool {
        self.steps().is_ok_and(|steps| !steps.is_empty())
    }

    pub fn path(&self, step: u64) -> PathBuf {
        self.dir.join(format!("{PREFIX}{step:06}"))
    }

    /// Steps that have a folder, whole or not, in order.
    fn steps(&self) -> Result<Vec<u64>> {
        let step = |name: &str| name.strip_prefix(PREFIX)?.parse().ok();
        let entries = std::fs::read_dir(&self.dir).with_context(|| self.dir.display().to_string())?;
        let mut all: Vec<u64> =
            entries.flatten().filter_map(|e| step(&e.file_name().to_string_lossy())).collect();
        all.sort_unstable();
        Ok(all)
    }
}

/// That a folder's manifest is there and holds.
fn verify(path: &Path, step: u64) -> Result<()> {
    let text = std::fs::read_to_string(path.join(MANIFEST)).context("has no manifest")?;
    let manifest: Manifest = serde_json::from_str(&text).context("its manifest cannot be read")?;
    ensure!(manifest.step == step, "its manifest is of step {}", manifest.step);
    for (name, (bytes, hash)) in &manifest.files {
        // A manifest's name must not lead out of the folder.
        ensure!(!name.contains(['/', '\\']) && name != "..", "its manifest names {name:?}");
        let file = path.join(name);
        let found = file.metadata().with_context(|| format!("{name} is missing"))?.len();
        ensure!(found == *bytes, "{name} has {found} bytes, not {bytes}");
        ensure!(&sha256(&file)? == hash, "{name} is not what was saved");
    }
    Ok(())
}

fn sha256(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    std::io::copy(&mut File::open(path)?, &mut hash)?;
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// Makes what was named in a folder last.
fn sync_dir(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(dir)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(text: &str) -> impl FnOnce(&Path) -> Result<()> {
        move |dir| Ok(std::fs::write(dir.join("weights"), text)?)
    }

    fn newest(all: &Checkpoints) -> (Option<u64>, Vec<String>) {
        let mut said = Vec::new();
        let found = all.newest(|why| said.push(why.to_owned())).unwrap();
        (found.map(|s| s.step), said)
    }

    #[test]
    fn the_newest_whole_one_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let all = Checkpoints::open(dir.path(), 3).unwrap();
        assert_eq!(newest(&all), (None, vec![]));
        for step in [1, 2, 3] {
            all.save(step, None, filled("abc")).unwrap();
        }
        assert_eq!(newest(&all), (Some(3), vec![]));
        std::fs::write(all.path(3).join("weights"), "abd").unwrap();
        std::fs::remove_file(all.path(2).join(MANIFEST)).unwrap();
        let (step, said) = newest(&all);
        assert_eq!(step, Some(1));
        assert!(said[0].contains("weights is not what was saved"), "{said:?}");
        assert!(said[1].contains("has no manifest"), "{said:?}");
        // The step is done again; the broken one after it must not outlive it.
        all.save(2, None, filled("xyz")).unwrap();
        assert_eq!(newest(&all), (Some(2), vec![]));
        assert_eq!(all.steps().unwrap(), [1, 2]);
    }

    #[test]
    fn a_broken_later_one_does_not_push_out_what_is_saved() {
        let dir = tempfile::tempdir().unwrap();
        let all = Checkpoints::open(dir.path(), 1).unwrap();
        all.save(9, None, filled("abc")).unwrap();
        std::fs::remove_file(all.path(9).join(MANIFEST)).unwrap();
        all.save(1, None, filled("abc")).unwrap();
        assert_eq!(newest(&all), (Some(1), vec![]));
    }

    #[test]
    fn old_ones_go_but_the_best_stays() {
        let dir = tempfile::tempdir().unwrap();
        let all = Checkpoints::open(dir.path(), 2).unwrap();
        for step in 1..=5 {
            all.save(step, Some(1), filled("abc")).unwrap();
        }
        assert_eq!(all.steps().unwrap(), [1, 4, 5]);
    }

    #[test]
    fn an_interrupted_save_is_swept_and_harms_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let all = Checkpoints::open(dir.path(), 2).unwrap();
        all.save(1, None, filled("abc")).unwrap();
        let failed = all.save(2, None, |dir| {
            std::fs::write(dir.join("weights"), "half")?;
            anyhow::bail!("the disk is full")
        });
        assert!(failed.is_err());
        assert_eq!(newest(&all), (Some(1), vec![]));
        let again = Checkpoints::open(dir.path(), 2).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        again.save(2, None, filled("abc")).unwrap();
        assert_eq!(newest(&again).0, Some(2));
    }

    #[test]
    fn a_manifest_cannot_name_files_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let all = Checkpoints::open(dir.path(), 2).unwrap();
        all.save(1, None, filled("abc")).unwrap();
        let forged = r#"{"step": 1, "files": {"../x": [0, ""]}}"#;
        std::fs::write(all.path(1).join(MANIFEST), forged).unwrap();
        let e = all.newest(|_| ()).unwrap_err().to_string();
        assert!(e.contains("its manifest names") && e.contains("no checkpoint in"), "{e}");
    }
}
