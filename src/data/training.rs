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

use super::inline;
use super::items::checked_lines;
use super::lines::{self, Lines};
use super::queries::Query;
use super::table::{Cell, Column, Row, Table};
use super::transform::caption;
use super::{DataError, LinkCause, Links, OMNI3D_MINED, OMNI3D_PUBLISHED};
use crate::files::{sha256_hex, write_atomic};
use crate::weights::hub::{Hub, HubError, Listing, RemoteFile};
use crate::weights::source::HubSource;

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

    /// Its files, in words.
    fn wanted(self) -> &'static str {
        match self {
            Self::Vsr => "train.jsonl",
            Self::Gqa => "train_balanced_instructions/*.parquet and train_balanced_images/*.parquet",
            Self::Omni3d => "data/train-*.parquet",
            Self::Tallyqa => "data/train-*.parquet (or train*.jsonl, pictures and all)",
        }
    }

    /// Whether a file, by its path in the data set, belongs to the training split.
    fn holds(self, path: &str) -> bool {
        match self {
            Self::Vsr => path == "train.jsonl",
            Self::Gqa => {
                path.ends_with(".parquet") && (path.starts_with(QUESTIONS) || path.starts_with(PICTURES))
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
        let message = || format!("there is no folder {}; put there {}", folder.display(), self.wanted());
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
        let found = super::source::files_below(folder)
            .map_err(|e| self.fail(format!("{}: {e}", folder.display())))?;
        let mut all: Vec<String> = found.iter().filter(|path| self.holds(path)).cloned().collect();
        if all.is_empty() && self == Self::Tallyqa {
            // The same rows, as one exports them. Beside the parquet files they would count twice.
            all = found.into_iter().filter(|path| is_train_lines(path)).collect();
        }
        all.sort();
        let of =
            |part: &str| all.iter().map(String::as_str).filter(|f| f.starts_with(part)).collect::<Vec<_>>();
        let parts = if self == Self::Gqa { &[QUESTIONS, PICTURES][..] } else { &[""] };
        for part in parts.iter().map(|part| of(part)) {
            if part.is_empty() {
                let message = format!(
                    "{} lacks {}; give --pull to fetch them, or put them there",
                    folder.display(),
                    self.wanted()
                );
                return Err(self.fail(message));
            }
            super::source::complete(&part).map_err(|message| self.fail(message))?;
        }
        Ok(all.into_iter().map(|path| folder.join(path)).collect())
    }
}

fn is_train_lines(path: &str) -> bool {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.starts_with("train") && file.ends_with(".jsonl")
}

const QUESTIONS: &str = "train_balanced_instructions/";
const PICTURES: &str = "train_balanced_images/";

/// What a drawing gave.
#[derive(Debug, Default)]
pub struct Drawn {
    pub queries: Vec<Query>,
    /// Rows that could not be used, and why.
    pub passed_over: Vec<String>,
}

const PICTURE: (&str, Column) = ("image", Column::Picture);
const QUESTION: (&str, Column) = ("question", Column::Text);

/// The files of a training split, whose columns have been checked.
pub struct Split {
    set: TrainingSet,
    readers: Vec<Reader>,
    /// Files of pictures, where those are apart.
    pictures: Vec<Table>,
    /// Rows, of which the first ones are no part of the split.
    total: usize,
    first: usize,
}

impl Split {
    /// # Errors
    /// The first file that is missing, cannot be read, or lacks a column.
    pub fn open(set: TrainingSet, folder: &Path) -> Result<Self, DataError> {
        let columns: &[(&str, Column)] = match set {
            TrainingSet::Gqa => &[("imageId", Column::Text), QUESTION],
            _ => &[PICTURE, QUESTION],
        };
        let (mut readers, mut pictures, mut total) = (Vec::new(), Vec::new(), 0);
        for file in set.files(folder)? {
            if set == TrainingSet::Gqa && file.starts_with(folder.join(PICTURES)) {
                pictures.push(Table::open(&file, &[("id", Column::Text), PICTURE])?);
                continue;
            }
            let mut reader = match set {
                TrainingSet::Vsr => {
                    Reader::Lines(checked_lines(&file, lines::TEXT, &[&["caption"], &["image_link"]])?)
                }
                _ if file.extension().is_some_and(|e| e == "jsonl") => {
                    Reader::Lines(checked_lines(&file, lines::WITH_PICTURE, &[&["question"], &["image"]])?)
                }
                _ => Reader::Table(Box::new(Table::open(&file, columns)?)),
            };
            total += reader.rows()?;
            readers.push(reader);
        }
        // Of the one split of Omni3D-Bench neither the released test's rows nor any but the last.
        let first = match set {
            TrainingSet::Omni3d => total.saturating_sub(OMNI3D_MINED).max(OMNI3D_PUBLISHED),
            _ => 0,
        };
        if first >= total {
            let message = format!("{} has {total} rows, of which none is for training", folder.display());
            return Err(set.fail(message));
        }
        Ok(Self { set, readers, pictures, total, first })
    }

    pub fn set(&self) -> TrainingSet {
        self.set
    }

    /// Questions that can be drawn.
    pub fn questions(&self) -> usize {
        self.total - self.first
    }

    /// Draws `n` questions, the same ones for the same seed, and writes their pictures to `images` below `out`.
    /// `check` says what is wrong with the bytes of a picture; `progress` hears how many rows are behind, of how many.
    pub fn draw(
        self,
        (n, seed): (usize, u64),
        links: &Links,
        out: &Path,
        check: &dyn Fn(&[u8]) -> Result<(), String>,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Drawn, DataError> {
        /// Links in a row that the network does not reach, after which it is taken to be gone.
        const UNREACHED: usize = 16;
        let Self { set, readers, pictures, total, first } = self;
        let n = n.min(total - first);
        // Some more, for those that cannot be used.
        let spare = (n + n / 10 + 16).min(total - first);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let order = rand::seq::index::sample(&mut rng, total - first, spare);
        let chosen: BTreeMap<usize, usize> =
            order.into_iter().enumerate().map(|(rank, i)| (first + i, rank)).collect();
        let last = chosen.keys().next_back().copied().unwrap_or(0);
        let all = total + pictures.iter().map(Table::rows).sum::<usize>();

        let album = Album { folder: out.to_owned(), check };
        let mut queries: BTreeMap<usize, Query> = BTreeMap::new();
        let mut passed_over = Vec::new();
        // A picture that rows of a test have, too, is none to learn from.
        let mut forbidden = BTreeSet::new();
        let mut waiting: BTreeMap<String, Vec<(usize, String)>> = BTreeMap::new();
        let mut unreached = 0;
        for (index, row) in readers.into_iter().flatten().enumerate() {
            let row = row?;
            progress(index, all);
            if index < first {
                if let Raw::Row(row) = &row
                    && let Ok(bytes) = inline::of_row(row, PICTURE.0)
                {
                    forbidden.insert(sha256_hex(&bytes, 16));
                }
                continue;
            }
            if index > last {
                break;
            }
            let Some(rank) = chosen.get(&index).copied() else { continue };
            let found = match found(set, &row) {
                Ok(found) => found,
                Err(why) => {
                    passed_over.push(format!("{}, row {index}: {why}", set.name()));
                    continue;
                }
            };
            let bytes = match found.picture {
                Place::Bytes(bytes) => bytes,
                Place::Id(id) => {
                    waiting.entry(id).or_default().push((rank, found.question));
                    continue;
                }
                Place::Link(link) => match links.get(&link) {
                    Ok(bytes) => {
                        unreached = 0;
                        bytes
                    }
                    Err(e) if e.cause == LinkCause::Here => return Err(set.fail(e.to_string())),
                    Err(e) => {
                        unreached = if e.cause == LinkCause::Network { unreached + 1 } else { 0 };
                        if unreached == UNREACHED {
                            let message = format!(
                                "{e}, nor can {} more; leave {} out, or try later",
                                UNREACHED - 1,
                                set.name()
                            );
                            return Err(set.fail(message));
                        }
                        passed_over.push(format!("{}, row {index}: {e}", set.name()));
                        continue;
                    }
                },
            };
            if forbidden.contains(&sha256_hex(&bytes, 16)) {
                let why = "its picture is one of the rows' that are not for training";
                passed_over.push(format!("{}, row {index}: {why}", set.name()));
                continue;
            }
            match album.keep(&bytes)? {
                Ok(image) => {
                    queries.insert(rank, Query { image, question: found.question });
                }
                Err(why) => passed_over.push(format!("{}, row {index}: {why}", set.name())),
            }
        }
        let mut behind = total;
        'files: for file in pictures {
            for row in file {
                let row = row?;
                behind += 1;
                progress(behind, all);
                let Some(asked) = text(&row, "id").ok().and_then(|id| waiting.remove(&id)) else { continue };
                let kept = match inline::of_row(&row, PICTURE.0) {
                    Ok(bytes) => album.keep(&bytes)?,
                    Err(why) => Err(why),
                };
                match kept {
                    Ok(image) => queries.extend(
                        asked
                            .into_iter()
                            .map(|(rank, question)| (rank, Query { image: image.clone(), question })),
                    ),
                    Err(why) => passed_over.push(format!("{}, {}: {why}", set.name(), asked[0].1)),
                }
                if waiting.is_empty() {
                    break 'files;
                }
            }
        }
        passed_over
            .extend(waiting.into_keys().map(|id| format!("{}: the picture {id} is missing", set.name())));
        Ok(Drawn { queries: queries.into_values().take(n).collect(), passed_over })
    }
}

enum Reader {
    Lines(Lines),
    Table(Box<Table>),
}

impl Reader {
    fn rows(&mut self) -> Result<usize, DataError> {
        match self {
            Self::Lines(l) => l.rows(),
            Self::Table(t) => Ok(t.rows()),
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
            if set == TrainingSet::Vsr {
                let question = caption(&text("caption")?);
                return Ok(Found { question, picture: Place::Link(text("image_link")?) });
            }
            let inside = line.get(PICTURE.0).and_then(inline::of_value);
            let bytes = inside.unwrap_or_else(|| Err("holds no picture".into()));
            let bytes = bytes.map_err(|why| format!("{} {why}", PICTURE.0))?;
            Ok(Found { question: text("question")?, picture: Place::Bytes(bytes) })
        }
        Raw::Row(row) => {
            let picture = match set {
                TrainingSet::Gqa => Place::Id(text(row, "imageId")?),
                _ => Place::Bytes(inline::of_row(row, PICTURE.0)?),
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

/// Pictures by the hashes of their files.
struct Album<'a> {
    folder: PathBuf,
    check: &'a dyn Fn(&[u8]) -> Result<(), String>,
}

impl Album<'_> {
    /// The picture's path below the folder, where it is now; or what is wrong with it.
    fn keep(&self, bytes: &[u8]) -> Result<Result<String, String>, DataError> {
        let Some(ending) = image::guess_format(bytes).ok().and_then(|f| f.extensions_str().first()) else {
            return Ok(Err("its picture is of no known format".into()));
        };
        let name = format!("images/{}.{ending}", sha256_hex(bytes, 16));
        let path = self.folder.join(&name);
        if !path.is_file() {
            if let Err(why) = (self.check)(bytes) {
                return Ok(Err(why));
            }
            write_atomic(&path, |w| w.write_all(bytes))
                .map_err(|e| DataError::File { file: path.display().to_string(), message: e.to_string() })?;
        }
        Ok(Ok(name))
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
        std::fs::write(at.join("train.jsonl"), (0..90).map(line).collect::<String>() + "{}\n").unwrap();
        let links = Links::new(dir.path().join("links"));
        let draw = |n, seed| {
            let split = Split::open(TrainingSet::Vsr, &at).unwrap();
            assert_eq!(split.questions(), 91);
            split.draw((n, seed), &links, dir.path(), &|_| Ok(()), |_, _| {}).unwrap()
        };
        let drawn = draw(4, 1);
        assert!(drawn.queries.is_empty() && drawn.passed_over.len() == 20, "{:?}", drawn.passed_over);
        assert!(drawn.passed_over[0].contains("no-link"), "{:?}", drawn.passed_over);
        assert_eq!(draw(4, 1).passed_over, drawn.passed_over);
        assert_ne!(draw(4, 2).passed_over, drawn.passed_over);
        let all = draw(500, 1).passed_over;
        assert!(all.len() == 91 && all[90].contains("caption is empty"), "{all:?}");
    }

    #[test]
    fn pictures_of_lines_are_read_from_the_lines() {
        use base64::Engine as _;
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("tallyqa");
        std::fs::create_dir(&at).unwrap();
        let mut png = std::io::Cursor::new(Vec::new());
        image::RgbImage::new(9, 7).write_to(&mut png, image::ImageFormat::Png).unwrap();
        let base64 = base64::engine::general_purpose::STANDARD.encode(png.into_inner());
        let lines = [
            serde_json::json!({ "question": "How many?", "image": { "bytes": base64, "path": null } }),
            serde_json::json!({ "question": "How many more?", "image": format!("data:image/png;base64,{base64}") }),
            serde_json::json!({ "question": "How many not?", "image": { "bytes": "no base64" } }),
            serde_json::json!({ "question": "Of what?", "image": { "bytes": null, "path": "1.jpg" } }),
            serde_json::json!({ "question": "How long?", "image": { "bytes": "AAAA" } }),
        ];
        let lines: String = lines.iter().map(|l| format!("{l}\n")).collect();
        std::fs::write(at.join("train.jsonl"), lines).unwrap();
        let links = Links::new(dir.path().join("links"));
        let split = Split::open(TrainingSet::Tallyqa, &at).unwrap();
        let drawn = split.draw((9, 1), &links, dir.path(), &|_| Ok(()), |_, _| {}).unwrap();
        let mut asked: Vec<_> = drawn.queries.iter().map(|q| q.question.as_str()).collect();
        asked.sort_unstable();
        assert_eq!(asked, ["How many more?", "How many?"]);
        assert_eq!(drawn.queries[0].image, drawn.queries[1].image, "one picture");
        assert!(dir.path().join(&drawn.queries[0].image).is_file());
        let why = drawn.passed_over.join("; ");
        for part in [
            "row 2: image is neither a picture's bytes nor base64",
            "row 3: image holds no picture",
            "row 4: its picture is of no known format",
        ] {
            assert!(why.contains(part), "no {part:?} in {why}");
        }
    }

    #[test]
    fn what_is_not_there_or_another_file_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let e = TrainingSet::Gqa.local(dir.path()).unwrap_err().to_string();
        assert!(e.contains("gqa: there is no folder"), "{e}");
        let error = |set| Split::open(set, dir.path()).map(|_| ()).unwrap_err().to_string();
        let e = error(TrainingSet::Gqa);
        assert!(e.contains("lacks train_balanced_instructions") && e.contains("--pull"), "{e}");
        std::fs::write(dir.path().join("train.jsonl"), "{\"caption\": \"x\", \"image_url\": \"y\"}\n")
            .unwrap();
        let e = error(TrainingSet::Vsr);
        assert!(e.contains("train.jsonl") && e.contains("image_link"), "{e}");
    }
}
