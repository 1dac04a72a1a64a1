//! Pictures with questions from the training splits that the paper mines boxes from (method.md 5.4): no row of the
//! released tests is among them. Omni3D-Bench has one split: of it the last rows are taken, but for pictures that earlier
//! rows have too.
//!
//! The questions are drawn at random, their pictures written beside them. Answers are not read.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::lines::Lines;
use super::queries::Query;
use super::table::{Cell, Column, Row, Table};
use super::transform::caption;
use super::{DataError, Links};
use crate::files::{sha256_hex, write_atomic};
use crate::weights::hub::{Hub, HubError, Listing, RemoteFile};
use crate::weights::source::HubSource;

/// Rows of Omni3D-Bench, the last ones, that are mined from (the first 100 are its released test).
const OMNI3D_MINED: usize = 400;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, clap::ValueEnum)]
pub enum TrainingSet {
    Vsr,
    #[value(name = "omni3d-bench")]
    Omni3d,
    Gqa,
    Tallyqa,
}

impl TrainingSet {
    pub fn name(self) -> &'static str {
        match self {
            Self::Vsr => "vsr",
            Self::Omni3d => "omni3d-bench",
            Self::Gqa => "gqa",
            Self::Tallyqa => "tallyqa",
        }
    }

    /// `owner/name` of the data set on the hub.
    pub fn repo(self) -> &'static str {
        match self {
            Self::Vsr => "cambridgeltl/vsr_zeroshot",
            Self::Omni3d => "dmarsili/Omni3D-Bench",
            Self::Gqa => "lmms-lab/GQA",
            Self::Tallyqa => "snowclipsed/TallyQA",
        }
    }

    /// Whether a file, by its path in the data set, belongs to the training split.
    fn holds(self, path: &str) -> bool {
        match self {
            Self::Vsr => path == "train.jsonl",
            Self::Gqa => {
                path.ends_with(".parquet")
                    && (path.starts_with("train_balanced_instructions/")
                        || path.starts_with("train_balanced_images/"))
            }
            Self::Omni3d | Self::Tallyqa => {
                let file = path.rsplit('/').next().unwrap_or(path);
                file.starts_with("train") && file.ends_with(".parquet")
            }
        }
    }

    fn source(self) -> Result<HubSource, DataError> {
        HubSource::parse_dataset(self.repo(), "main").map_err(|message| self.fail(message))
    }

    fn fail(self, message: impl Into<String>) -> DataError {
        DataError::Training { set: self.name(), message: message.into() }
    }

    /// The folder of the set's name in `data`.
    pub fn local(self, data: &Path) -> Result<PathBuf, DataError> {
        let folder = data.join(self.name());
        let message = || format!("there is no folder {}; put its files there", folder.display());
        if folder.is_dir() { Ok(folder) } else { Err(self.fail(message())) }
    }

    /// What a pull has left in the hub's cache.
    pub fn cached(self, hub: &Hub) -> Result<PathBuf, DataError> {
        let at = self.source()?;
        hub.cached(&at)
            .ok_or_else(|| self.fail(format!("{at} is not here; give --pull to fetch it, or --data DIR")))
    }

    /// Brings the split's files from the hub into its cache; gives the snapshot's folder. `say` hears beforehand how many
    /// bytes are to come.
    pub fn pull(
        self,
        hub: &Hub,
        say: impl FnOnce(u64),
        mut progress: impl FnMut(&str, u64, u64),
    ) -> Result<PathBuf, HubError> {
        let at =
            self.source().map_err(|e| HubError::Repo { repo: self.repo().into(), message: e.to_string() })?;
        let listing: Listing = hub.listing(&at)?;
        let files: Vec<&RemoteFile> = listing.files().iter().filter(|f| self.holds(&f.name)).collect();
        if files.is_empty() {
            let message = "holds no files of a training split".to_owned();
            return Err(HubError::Repo { repo: at.to_string(), message });
        }
        say(hub.missing(&at, &files));
        hub.pull(&at, &listing, &files, &mut progress)
    }

    /// The split's files in a folder, in order.
    fn files(self, folder: &Path) -> Result<Vec<PathBuf>, DataError> {
        let mut all = super::source::files_below(folder)
            .map_err(|e| self.fail(format!("{}: {e}", folder.display())))?;
        all.retain(|path| self.holds(path));
        all.sort();
        super::source::complete(&all.iter().map(String::as_str).collect::<Vec<_>>())
            .map_err(|message| self.fail(message))?;
        if all.is_empty() {
            return Err(self.fail(format!("{} holds no file of its training split", folder.display())));
        }
        Ok(all.into_iter().map(|path| folder.join(path)).collect())
    }
}

/// What a drawing gave.
#[derive(Debug, Default)]
pub struct Drawn {
    pub queries: Vec<Query>,
    /// Rows that could not be used, and why.
    pub passed_over: Vec<String>,
}

const PICTURE: (&str, Column) = ("image", Column::Picture);
const QUESTION: (&str, Column) = ("question", Column::Text);

/// Draws `n` questions of a set whose files are in `folder`, the same ones for the same seed, and writes their
/// pictures to `images` below `out`. `progress` hears how many rows it has behind it, of how many.
pub fn draw(
    set: TrainingSet,
    folder: &Path,
    (n, seed): (usize, u64),
    links: &Links,
    out: &Path,
    mut progress: impl FnMut(usize, usize),
) -> Result<Drawn, DataError> {
    let files = set.files(folder)?;
    let (questions, pictures): (Vec<&PathBuf>, Vec<&PathBuf>) = match set {
        TrainingSet::Gqa => {
            files.iter().partition(|f| !f.components().any(|c| c.as_os_str() == "train_balanced_images"))
        }
        _ => (files.iter().collect(), vec![]),
    };
    if set == TrainingSet::Gqa && (questions.is_empty() || pictures.is_empty()) {
        return Err(set.fail("needs the files of train_balanced_instructions and of train_balanced_images"));
    }
    let columns: &[(&str, Column)] = match set {
        TrainingSet::Gqa => &[("imageId", Column::Text), QUESTION],
        _ => &[PICTURE, QUESTION],
    };
    let mut readers = Vec::new();
    let mut total = 0;
    for file in questions {
        let reader = match set {
            TrainingSet::Vsr => Reader::Lines(Lines::open(file)?),
            _ => Reader::Table(Box::new(Table::open(file, columns)?)),
        };
        total += reader.rows();
        readers.push(reader);
    }
    let first = if set == TrainingSet::Omni3d { total.saturating_sub(OMNI3D_MINED) } else { 0 };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let chosen = rand::seq::index::sample(&mut rng, total - first, n.min(total - first));
    let chosen: BTreeSet<usize> = chosen.into_iter().map(|i| first + i).collect();

    let album = Album { folder: out.to_owned() };
    let mut drawn = Drawn::default();
    // Omni3D-Bench has several questions to a picture: one of its other rows' is none to learn from.
    let mut forbidden = BTreeSet::new();
    let mut waiting: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (index, row) in readers.into_iter().flatten().enumerate() {
        let row = row?;
        progress(index, total);
        if index < first {
            if let Ok(Found { picture: Place::Bytes(bytes), .. }) = found(set, &row) {
                forbidden.insert(sha256_hex(&bytes, 16));
            }
            continue;
        }
        if !chosen.contains(&index) {
            continue;
        }
        let kept = found(set, &row).and_then(|f| {
            let bytes = match f.picture {
                Place::Bytes(bytes) => bytes,
                Place::Link(link) => links.get(&link).map_err(|e| e.to_string())?,
                Place::Id(id) => {
                    waiting.entry(id).or_default().push(f.question);
                    return Ok(None);
                }
            };
            if forbidden.contains(&sha256_hex(&bytes, 16)) {
                return Err("its picture is one of the rows' that are not mined".into());
            }
            Ok(Some(Query { image: album.keep(&bytes)?, question: f.question }))
        });
        match kept {
            Ok(query) => drawn.queries.extend(query),
            Err(why) => drawn.passed_over.push(format!("{}, row {index}: {why}", set.name())),
        }
    }
    for file in pictures {
        if waiting.is_empty() {
            break;
        }
        for row in Table::open(file, &[("id", Column::Text), PICTURE])? {
            let row = row?;
            let Some(questions) = text(&row, "id").ok().and_then(|id| waiting.remove(&id)) else { continue };
            match bytes(&row).and_then(|bytes| album.keep(&bytes)) {
                Ok(image) => drawn
                    .queries
                    .extend(questions.into_iter().map(|question| Query { image: image.clone(), question })),
                Err(why) => drawn.passed_over.push(format!("gqa, {}: {why}", questions.join(" "))),
            }
        }
    }
    drawn.passed_over.extend(waiting.into_keys().map(|id| format!("gqa: the picture {id} is missing")));
    Ok(drawn)
}

enum Reader {
    Lines(Lines),
    Table(Box<Table>),
}

impl Reader {
    fn rows(&self) -> usize {
        match self {
            Self::Lines(l) => l.rows(),
            Self::Table(t) => t.rows(),
        }
    }
}

/// A row as it lies in the file.
enum Raw {
    Line(Result<serde_json::Map<String, serde_json::Value>, String>),
    Row(Row),
}

impl Iterator for Reader {
    type Item = Result<Raw, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::Lines(l) => l.next().map(|line| line.map(Raw::Line)),
            Self::Table(t) => t.next().map(|row| row.map(Raw::Row)),
        }
    }
}

struct Found {
    question: String,
    picture: Place,
}

enum Place {
    Bytes(Vec<u8>),
    Link(String),
    /// Of a row of another file.
    Id(String),
}

fn found(set: TrainingSet, row: &Raw) -> Result<Found, String> {
    match row {
        Raw::Line(line) => {
            let line = line.as_ref().map_err(Clone::clone)?;
            let text = |name: &str| match line.get(name).and_then(|v| v.as_str()).map(str::trim) {
                Some(text) if !text.is_empty() => Ok(text.to_owned()),
                _ => Err(format!("{name} is empty")),
            };
            Ok(Found { question: caption(&text("caption")?), picture: Place::Link(text("image_link")?) })
        }
        Raw::Row(row) => {
            let picture = match set {
                TrainingSet::Gqa => Place::Id(text(row, "imageId")?),
                _ => Place::Bytes(bytes(row)?),
            };
            Ok(Found { question: text(row, "question")?, picture })
        }
    }
}

fn text(row: &Row, name: &str) -> Result<String, String> {
    match row.get(name) {
        Some(Cell::Scalar(v)) => {
            let text = v.as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
            if text.is_empty() { Err(format!("{name} is empty")) } else { Ok(text) }
        }
        _ => Err(format!("{name} is empty")),
    }
}

fn bytes(row: &Row) -> Result<Vec<u8>, String> {
    match row.get("image") {
        Some(Cell::Picture(bytes)) if !bytes.is_empty() => Ok(bytes.clone()),
        _ => Err("image holds no picture".into()),
    }
}

/// Pictures by the hashes of their files.
struct Album {
    folder: PathBuf,
}

impl Album {
    /// The picture's path below the folder, where it is now.
    fn keep(&self, bytes: &[u8]) -> Result<String, String> {
        let format =
            image::guess_format(bytes).map_err(|_| "its picture is of no known format".to_owned())?;
        let ending = format.extensions_str().first().ok_or("its picture is of no known format")?;
        let name = format!("images/{}.{ending}", sha256_hex(bytes, 16));
        let path = self.folder.join(&name);
        if !path.is_file() {
            write_atomic(&path, |w| w.write_all(bytes)).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        Ok(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_training_files_are_taken() {
        for (set, path, want) in [
            (TrainingSet::Vsr, "train.jsonl", true),
            (TrainingSet::Vsr, "dev.jsonl", false),
            (TrainingSet::Gqa, "train_balanced_images/train-00000-of-00028.parquet", true),
            (TrainingSet::Gqa, "train_balanced_instructions/train-00000-of-00001.parquet", true),
            (TrainingSet::Gqa, "train_all_instructions/train-00000-of-00010.parquet", false),
            (TrainingSet::Gqa, "testdev_balanced_images/testdev-00000-of-00001.parquet", false),
            (TrainingSet::Tallyqa, "data/train-00003-of-00100.parquet", true),
            (TrainingSet::Tallyqa, "data/test-00000-of-00010.parquet", false),
            (TrainingSet::Omni3d, "data/train-00000-of-00001.parquet", true),
        ] {
            assert_eq!(set.holds(path), want, "{path}");
        }
    }

    #[test]
    fn lines_become_questions_and_dead_links_are_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("vsr");
        std::fs::create_dir(&at).unwrap();
        let line = |i: usize| {
            format!("{{\"caption\": \"The cat is on mat {i}.\", \"image_link\": \"no-link-{i}\"}}\n")
        };
        std::fs::write(at.join("train.jsonl"), (0..9).map(line).collect::<String>() + "{}\n").unwrap();
        let links = Links::new(dir.path().join("links"));
        let draw = |n, seed| draw(TrainingSet::Vsr, &at, (n, seed), &links, dir.path(), |_, _| {}).unwrap();
        let drawn = draw(4, 1);
        assert!(drawn.queries.is_empty() && drawn.passed_over.len() == 4, "{:?}", drawn.passed_over);
        assert!(drawn.passed_over[0].contains("no-link"), "{:?}", drawn.passed_over);
        assert_eq!(draw(4, 1).passed_over, drawn.passed_over);
        assert_ne!(draw(4, 2).passed_over, drawn.passed_over);
        let all = draw(50, 1).passed_over;
        assert!(all.len() == 10 && all[9].contains("caption is empty"), "{all:?}");
    }

    #[test]
    fn a_set_that_is_not_there_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let e = TrainingSet::Gqa.local(dir.path()).unwrap_err().to_string();
        assert!(e.contains("gqa: there is no folder"), "{e}");
        std::fs::create_dir(dir.path().join("gqa")).unwrap();
        let links = Links::new(dir.path().join("links"));
        let at = TrainingSet::Gqa.local(dir.path()).unwrap();
        let e = draw(TrainingSet::Gqa, &at, (1, 1), &links, dir.path(), |_, _| {}).unwrap_err().to_string();
        assert!(e.contains("no file of its training split"), "{e}");
    }
}
