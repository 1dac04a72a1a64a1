//! Where a bench's files are: in a folder of one's own, or in the hub's cache.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{Bench, DataError, Files};
use crate::weights::hub::{Hub, HubError, Listing, RemoteFile};
use crate::weights::source::{HubSource, RepoKind};

/// A bench's files, found.
#[derive(Clone, Debug)]
pub struct Source {
    pub bench: Bench,
    pub folder: PathBuf,
    /// With the number of the part that each belongs to, in the order of the rows.
    pub files: Vec<(usize, PathBuf)>,
    /// Where they came from, for reports.
    pub origin: String,
    /// Changes where names or sizes of the files do, or the commit.
    pub fingerprint: String,
}

/// The part of a bench that a file belongs to, by its path below the bench's folder.
fn part(bench: Bench, path: &str) -> Option<usize> {
    match bench.files() {
        Files::Lines(name) => (path == name).then_some(0),
        Files::Parquet(parts) => {
            let fits = |words: &&[&str]| words.iter().all(|w| path.contains(w));
            path.ends_with(".parquet").then(|| parts.iter().position(|(_, words)| fits(words))).flatten()
        }
    }
}

/// What must lie in a bench's folder, in words.
fn wanted_files(bench: Bench) -> String {
    match (bench, bench.files()) {
        (Bench::Tallyqa, Files::Lines(name)) => format!(
            "{name}, and Visual Genome's pictures in images/ or visual_genome/, or as VG_100K/ and VG_100K_2/"
        ),
        (Bench::Gqa, Files::Lines(name)) => format!("{name}, and its pictures in images/"),
        (_, Files::Lines(name)) => name.into(),
        (_, Files::Parquet(parts)) => {
            let names: Vec<String> = parts.iter().map(|(_, words)| words.join("… ")).collect();
            format!("its parquet files, named {}", names.join(" and "))
        }
    }
}

/// A bench's repository at a revision; GRIT's have none.
pub fn on_hub(bench: Bench, revision: Option<&str>) -> Result<HubSource, DataError> {
    let fail = |message: String| DataError::Source { bench, message };
    let Some(repo) = bench.repo() else {
        return Err(fail(format!(
            "is not on the hub with its pictures: put GRIT's into DIR/{bench} ({}), and give --data DIR",
            wanted_files(bench)
        )));
    };
    HubSource::parse_dataset(repo, revision.unwrap_or("main")).map_err(fail)
}

/// Of a repository's files those that the bench is read from.
pub fn wanted(bench: Bench, listing: &Listing) -> Vec<&RemoteFile> {
    listing.files().iter().filter(|f| part(bench, &f.name).is_some()).collect()
}

impl Source {
    /// The folder of the bench's name in `data`.
    pub fn local(data: &Path, bench: Bench) -> Result<Self, DataError> {
        let folder = data.join(bench.name());
        if !folder.is_dir() {
            let message =
                format!("there is no folder {}; put there {}", folder.display(), wanted_files(bench));
            return Err(DataError::Source { bench, message });
        }
        let remedy = format!("put there {}", wanted_files(bench));
        Self::in_folder(bench, folder.clone(), folder.display().to_string(), &remedy)
    }

    /// What a pull has left in the hub's cache.
    pub fn cached(hub: &Hub, bench: Bench, revision: Option<&str>) -> Result<Self, DataError> {
        let at = on_hub(bench, revision)?;
        let name = revision.map_or(bench.to_string(), |r| format!("{bench}@{r}"));
        let remedy = format!("valor eval pull {name}, or give --data DIR");
        let Some(folder) = hub.cached(&at) else {
            let message = format!("{at} is not here; {remedy}");
            return Err(DataError::Source { bench, message });
        };
        let commit = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let origin = format!("{}{}@{commit}", RepoKind::Dataset.prefix(), at.repo);
        Self::in_folder(bench, folder, origin, &remedy)
    }

    fn in_folder(bench: Bench, folder: PathBuf, origin: String, remedy: &str) -> Result<Self, DataError> {
        let fail = |message: String| DataError::Source { bench, message };
        let found = files_below(&folder).map_err(|e| fail(format!("{}: {e}", folder.display())))?;
        let mut files: Vec<(usize, String)> =
            found.into_iter().filter_map(|path| Some((part(bench, &path)?, path))).collect();
        files.sort();
        let missing = |what: String| fail(format!("{} holds no {what}; {remedy}", folder.display()));
        match bench.files() {
            Files::Lines(name) if files.is_empty() => return Err(missing(name.into())),
            Files::Lines(_) => {}
            Files::Parquet(parts) => {
                for (i, (_, words)) in parts.iter().enumerate() {
                    let of: Vec<&str> = files.iter().filter(|f| f.0 == i).map(|f| f.1.as_str()).collect();
                    if of.is_empty() {
                        return Err(missing(format!("parquet file named {}", words.join("… "))));
                    }
                    complete(&of).map_err(&fail)?;
                }
            }
        }
        let mut hash = Sha256::new();
        hash.update(&origin);
        for (_, path) in &files {
            let bytes = folder.join(path).metadata().map_or(0, |m| m.len());
            hash.update(format!("{path} {bytes};"));
        }
        let fingerprint = hash.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect();
        let files = files.into_iter().map(|(part, path)| (part, folder.join(path))).collect();
        Ok(Self { bench, folder, files, origin, fingerprint })
    }
}

/// Of files that count themselves ("-00000-of-00003") all must be there.
pub(super) fn complete(files: &[&str]) -> Result<(), String> {
    let counted = |path: &str| -> Option<(usize, usize)> {
        let (head, of) = path.strip_suffix(".parquet")?.rsplit_once("-of-")?;
        // Duplicated conversions end in a hash: "-00000-of-00001-0123456789abcdef".
        let of = of.split('-').next()?.parse().ok()?;
        Some((head.rsplit('-').next()?.parse().ok()?, of))
    };
    for path in files {
        let Some((_, of)) = counted(path) else { continue };
        let have = |i: usize| files.iter().any(|p| counted(p) == Some((i, of)));
        // Most count from 0, some from 1.
        let first = usize::from(!have(0) && have(of));
        if let Some(missing) = (first..first + of).find(|i| !have(*i)) {
            return Err(format!(
                "{path} is one of {of} files, and number {missing} is missing; fetch it too"
            ));
        }
    }
    Ok(())
}

/// Relative paths of the files below a folder.
pub(super) fn files_below(folder: &Path) -> std::io::Result<Vec<String>> {
    let mut found = Vec::new();
    walk(folder, folder, 0, &mut found)?;
    Ok(found)
}

/// Relative paths of the files below a folder; a loop of links is not followed for ever.
fn walk(root: &Path, dir: &Path, depth: usize, found: &mut Vec<String>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            // Pictures are many and are not looked for.
            let pictures = ["images", "visual_genome", "VG_100K", "VG_100K_2"];
            if depth < 4 && path.file_name().is_none_or(|n| !pictures.iter().any(|p| n == *p)) {
                walk(root, &path, depth + 1, found)?;
            }
        } else if let Some(path) = path.strip_prefix(root).ok().and_then(Path::to_str) {
            found.push(path.replace('\\', "/"));
        }
    }
    Ok(())
}

/// Brings a bench's files from the hub into its cache; gives the snapshot's folder.
pub fn pull(
    hub: &Hub,
    bench: Bench,
    revision: Option<&str>,
    mut progress: impl FnMut(&str, u64, u64),
) -> Result<PathBuf, PullError> {
    let at = on_hub(bench, revision)?;
    let listing = hub.listing(&at)?;
    let files = wanted(bench, &listing);
    if files.is_empty() {
        let message =
            format!("{at} holds none of its files; name the revision that does, as {bench}@REVISION");
        return Err(DataError::Source { bench, message }.into());
    }
    Ok(hub.pull(&at, &listing, &files, &mut progress)?)
}

#[derive(Debug, thiserror::Error)]
pub enum PullError {
    #[error(transparent)]
    Data(#[from] DataError),
    // Not transparent: whether it was an outage is asked of the cause.
    #[error("{0}")]
    Hub(#[from] HubError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_belong_to_parts_by_their_paths() {
        for (bench, path, want) in [
            (Bench::Omni3d, "data/train-00000-of-00001.parquet", Some(0)),
            (Bench::Robospatial, "data/configuration-00000-of-00001.parquet", Some(1)),
            (Bench::Robospatial, "data/context-00000-of-00001.parquet", None),
            (Bench::Blink, "Counting/val-00000-of-00001.parquet", Some(1)),
            (Bench::Blink, "Counting/test-00000-of-00001.parquet", None),
            (Bench::Blink, "Jigsaw/val-00000-of-00001.parquet", None),
            (Bench::Vsr, "dev.jsonl", Some(0)),
            (Bench::Vsr, "train.jsonl", None),
            (Bench::Countbench, "data/test-00000-of-00001.parquet.txt", None),
        ] {
            assert_eq!(part(bench, path), want, "{path}");
        }
    }

    #[test]
    fn what_a_folder_lacks_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = |bench| Source::local(dir.path(), bench).unwrap_err().to_string();
        let e = error(Bench::Tallyqa);
        assert!(e.contains("there is no folder") && e.contains("tallyqa_val.jsonl"), "{e}");
        assert!(e.contains("visual_genome/") && e.contains("VG_100K_2/"), "{e}");
        std::fs::create_dir_all(dir.path().join("tallyqa/VG_100K")).unwrap();
        let e = error(Bench::Tallyqa);
        assert!(e.contains("holds no tallyqa_val.jsonl; put there") && e.contains("VG_100K_2/"), "{e}");
        let e = error(Bench::Blink);
        assert!(e.contains("its parquet files, named Spatial_Relation… val- and Counting… val-"), "{e}");
        assert!(on_hub(Bench::Gqa, None).unwrap_err().to_string().contains("gqa_val.jsonl"));
    }

    #[test]
    fn a_missing_file_of_several_is_named() {
        let whole = ["a/test-00000-of-00002.parquet", "a/test-00001-of-00002.parquet"];
        assert_eq!(complete(&whole), Ok(()));
        assert_eq!(complete(&["test-00000-of-00001-0123abcd.parquet"]), Ok(()));
        assert!(complete(&whole[..1]).unwrap_err().contains("number 1 is missing"));
        assert_eq!(complete(&["plain.parquet"]), Ok(()));
        // As RealWorldQA's are on the hub.
        let from_one = ["data/test-00001-of-00002.parquet", "data/test-00002-of-00002.parquet"];
        assert_eq!(complete(&from_one), Ok(()));
        assert!(complete(&from_one[1..]).unwrap_err().contains("number 1 is missing"));
    }
}
