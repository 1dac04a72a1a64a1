//! Rows of a bench's files as questions.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use crate::files::sha256_hex;
use serde_json::{Map, Value};

use super::inline;
use super::lines::{self, Lines};
use super::table::{Cell, Column, Row, Table};
use super::transform::{caption, letter, lettered, with_options};
use super::{Bench, DataError, Files, Item, Kind, PictureRef, Source};

/// A row that is no question: what is wrong with it, in words that name the column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadRow {
    pub part: String,
    pub index: usize,
    pub why: String,
}

enum Reader {
    Table(Table),
    Lines(Lines),
}

/// The questions of a bench in their published order.
pub struct Items {
    source: Source,
    waiting: VecDeque<(usize, PathBuf)>,
    current: Option<(usize, Reader)>,
    next: usize,
    total: usize,
}

/// What the columns of a bench's parquet files are called and hold.
fn columns(bench: Bench) -> &'static [(&'static str, Column)] {
    use Column::{Integer, Picture, Scalar, Text, Texts};
    match bench {
        Bench::Omni3d => &[("image", Picture), ("question", Text), ("answer", Scalar), ("answer_type", Text)],
        Bench::Robospatial => &[("img", Picture), ("question", Text), ("answer", Text)],
        Bench::Blink => &[("image_1", Picture), ("question", Text), ("choices", Texts), ("answer", Text)],
        Bench::Realworldqa => &[("image", Picture), ("question", Text), ("answer", Text)],
        Bench::Countbench => &[("image", Picture), ("question", Text), ("number", Integer)],
        Bench::Vsr | Bench::Gqa | Bench::Tallyqa => &[],
    }
}

/// What the objects of a bench's lines are called: of each set one. GRIT's releases differ in the names.
fn keys(bench: Bench) -> &'static [&'static [&'static str]] {
    match bench {
        Bench::Vsr => &[&["image_link"], &["caption"], &["label"]],
        Bench::Gqa | Bench::Tallyqa => {
            &[&["image", "image_path", "image_id", "filename"], &["question", "query"], &["answer", "label"]]
        }
        _ => &[],
    }
}

/// The longest line of a bench's files. VSR has links to its pictures, and those alone.
fn longest(bench: Bench) -> u64 {
    if bench == Bench::Vsr { lines::TEXT } else { lines::WITH_PICTURE }
}

impl Items {
    /// # Errors
    /// The first file that cannot be read, or lacks a column.
    pub fn open(source: Source) -> Result<Self, DataError> {
        let mut total = 0;
        for (_, file) in &source.files {
            total += match source.bench.files() {
                Files::Parquet(_) => Table::open(file, columns(source.bench))?.rows(),
                Files::Lines(_) => checked_lines(file, longest(source.bench), keys(source.bench))?.rows()?,
            };
        }
        let waiting = source.files.iter().cloned().collect();
        Ok(Self { source, waiting, current: None, next: 0, total })
    }

    /// Rows of the bench.
    pub fn total(&self) -> usize {
        self.total
    }

    pub fn source(&self) -> &Source {
        &self.source
    }

    fn part(&self, number: usize) -> &'static str {
        match self.source.bench.files() {
            Files::Parquet(parts) if parts.len() > 1 => parts[number].0,
            _ => "",
        }
    }

    fn of_row(&self, part: usize, row: Row) -> Result<Item, String> {
        let bench = self.source.bench;
        let text = |name: &str| match row.get(name) {
            Some(Cell::Scalar(Value::String(s))) if !s.trim().is_empty() => Ok(s.trim().to_owned()),
            _ => Err(format!("{name} is empty")),
        };
        let bytes = inline::of_row(&row, columns(bench)[0].0)?;
        let mut item = Item {
            part: self.part(part).to_owned(),
            index: self.next,
            question: text("question")?,
            kind: Kind::Word,
            truth: Value::Null,
            options: Vec::new(),
            picture_id: sha256_hex(&bytes, 8),
            picture: PictureRef::Bytes(bytes),
        };
        match bench {
            Bench::Omni3d => {
                let kind = text("answer_type")?;
                let answer = match row.get("answer") {
                    Some(Cell::Scalar(v)) => v.clone(),
                    _ => return Err("answer is empty".into()),
                };
                (item.kind, item.truth) = match kind.as_str() {
                    "int" => (Kind::Int, number(&answer).ok_or("answer is no number")?),
                    "float" => (Kind::Float, number(&answer).ok_or("answer is no number")?),
                    "str" => {
                        let word =
                            answer.as_str().map_or_else(|| answer.to_string(), |s| s.trim().to_owned());
                        let yes_no = ["yes", "no"].contains(&word.to_lowercase().as_str());
                        (if yes_no { Kind::YesNo } else { Kind::Word }, word.into())
                    }
                    other => return Err(format!("answer_type is {other:?}; int, float and str are known")),
                };
                item.part = if item.kind == Kind::YesNo { "yes/no".into() } else { kind };
            }
            Bench::Robospatial => {
                item.kind = Kind::YesNo;
                item.truth = yes_no(&text("answer")?)?.into();
            }
            Bench::Blink => {
                let Some(Cell::Texts(choices)) = row.get("choices") else {
                    return Err("choices is empty".into());
                };
                item.options = choices.iter().map(|c| c.trim().to_owned()).collect();
                let answer = text("answer")?;
                let right = letter(&answer).and_then(|i| item.options.get(i));
                item.truth = right.ok_or(format!("answer {answer:?} is none of the choices"))?.clone().into();
                item.kind = Kind::Choice;
                item.question = with_options(&lettered(&item.question).0, &item.options);
            }
            Bench::Realworldqa => {
                let (question, options) = lettered(&item.question);
                let answer = text("answer")?;
                item.kind = if options.is_empty() { Kind::Word } else { Kind::Choice };
                item.truth = match letter(&answer).filter(|_| !options.is_empty()) {
                    Some(i) => match options.get(i) {
                        Some(option) => option.clone().into(),
                        None => return Err(format!("answer {answer:?} is none of the options")),
                    },
                    None => answer.into(),
                };
                item.question = if options.is_empty() { question } else { with_options(&question, &options) };
                item.options = options;
            }
            Bench::Countbench => {
                let Some(Cell::Scalar(n)) = row.get("number") else { return Err("number is empty".into()) };
                (item.kind, item.truth) = (Kind::Int, n.clone());
            }
            Bench::Vsr | Bench::Gqa | Bench::Tallyqa => unreachable!("these are lines"),
        }
        Ok(item)
    }

    fn of_line(&self, line: &Map<String, Value>) -> Result<Item, String> {
        let bench = self.source.bench;
        let [picture, question, answer] = keys(bench) else { unreachable!("three keys each") };
        let value = |names: &[&str]| {
            let found = names.iter().find_map(|n| line.get(*n)).filter(|v| !v.is_null());
            found.ok_or(format!("there is no {}", names.join(" or ")))
        };
        // The hub's pictures are objects of bytes and path.
        let text = |names: &[&str]| match value(names).map(|v| v.get("path").unwrap_or(v))? {
            Value::String(s) if !s.trim().is_empty() => Ok(s.trim().to_owned()),
            Value::Number(n) => Ok(n.to_string()),
            _ => Err(format!("{} is empty", names.join(" or "))),
        };
        let question = text(question)?;
        let answer = match value(answer)? {
            // Several people's, of which the first counts.
            Value::Array(several) => several.first().ok_or("answer is an empty list")?.clone(),
            one => one.clone(),
        };
        let (picture_id, picture) = match inline::of_value(value(picture)?).filter(|_| bench != Bench::Vsr) {
            Some(bytes) => {
                let bytes = bytes.map_err(|why| format!("{} {why}", picture.join(" or ")))?;
                (sha256_hex(&bytes, 8), PictureRef::Bytes(bytes))
            }
            None => {
                let named = text(picture)?;
                let place = match bench {
                    Bench::Vsr => PictureRef::Link(named.clone()),
                    _ => PictureRef::File(self.file(&named)?),
                };
                (named, place)
            }
        };
        let (kind, question, truth): (_, _, Value) = match bench {
            Bench::Vsr => {
                let yes = match answer.as_i64() {
                    Some(1) => "yes",
                    Some(0) => "no",
                    _ => return Err(format!("label is {answer}, not 0 or 1")),
                };
                (Kind::YesNo, caption(&question), yes.into())
            }
            Bench::Tallyqa => (Kind::Int, question, number(&answer).ok_or("answer is no number")?),
            _ => {
                let word = answer.as_str().map(str::trim).filter(|s| !s.is_empty());
                let number = answer.is_number().then(|| answer.to_string());
                let word = word.map(str::to_owned).or(number).ok_or("answer is empty")?;
                (Kind::Synonym, question, word.into())
            }
        };
        let part = self.part(0).to_owned();
        Ok(Item { part, index: self.next, question, kind, truth, options: Vec::new(), picture, picture_id })
    }

    /// A picture's file from its path in a line, which must stay below the bench's folder.
    fn file(&self, path: &str) -> Result<PathBuf, String> {
        if !crate::weights::source::is_safe(path) {
            return Err(format!("the picture's path {path:?} leads out of the folder"));
        }
        let folder = &self.source.folder;
        // Visual Genome's pictures come in two folders, which lie where one has them, and lines name more or less of
        // the way there.
        let short = path.strip_prefix("visual_genome/").unwrap_or(path);
        let mut places = Vec::new();
        for base in ["images", "", "visual_genome", "images/visual_genome"] {
            for part in ["", "VG_100K", "VG_100K_2"] {
                places.extend([path, short].map(|path| folder.join(base).join(part).join(path)));
            }
        }
        let with_ending =
            |p: &PathBuf| [p.clone(), p.with_added_extension("jpg"), p.with_added_extension("png")];
        let found = places.iter().flat_map(with_ending).find(|p| p.is_file());
        found.ok_or_else(|| {
            format!(
                "the picture {} is missing; of {} are looked through the folder itself, images/ and visual_genome/, \
                 and of each VG_100K/ and VG_100K_2/",
                places[0].display(),
                folder.display()
            )
        })
    }
}

/// A file of lines of which the first has what is needed: of each set of names one.
pub(super) fn checked_lines(file: &Path, longest: u64, keys: &[&[&str]]) -> Result<Lines, DataError> {
    let fail = |message: String| DataError::File { file: file.display().to_string(), message };
    let mut lines = Lines::open(file, longest)?;
    let first = lines.next().ok_or_else(|| fail("is empty; fetch it again".into()))??;
    let first = first.map_err(|e| fail(format!("line 1 {e}; fetch it again")))?;
    for names in keys {
        if !names.iter().any(|n| first.contains_key(*n)) {
            let have: Vec<&str> = first.keys().map(String::as_str).collect();
            return Err(fail(format!(
                "line 1 has no {:?}, only {}; fetch the revision of the data set that has it",
                names.join(" or "),
                have.join(", ")
            )));
        }
    }
    lines.rewind()?;
    Ok(lines)
}

fn number(v: &Value) -> Option<Value> {
    let n = match v {
        Value::Number(_) => return Some(v.clone()),
        Value::String(s) => s.trim().parse::<f64>().ok().filter(|n| n.is_finite())?,
        _ => return None,
    };
    Some(if n.fract() == 0. && n.abs() < 1e15 { Value::from(n as i64) } else { Value::from(n) })
}

fn yes_no(answer: &str) -> Result<&'static str, String> {
    match answer.trim().trim_end_matches('.').to_lowercase().as_str() {
        "yes" => Ok("yes"),
        "no" => Ok("no"),
        other => Err(format!("answer is {other:?}, not yes or no")),
    }
}

impl Iterator for Items {
    /// The inner error is of one row, the outer one ends the bench.
    type Item = Result<Result<Item, BadRow>, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let Some((part, reader)) = &mut self.current else {
                let (part, file) = self.waiting.pop_front()?;
                let reader = match self.source.bench.files() {
                    Files::Parquet(_) => Table::open(&file, columns(self.source.bench)).map(Reader::Table),
                    Files::Lines(_) => Lines::open(&file, longest(self.source.bench)).map(Reader::Lines),
                };
                match reader {
                    Ok(reader) => self.current = Some((part, reader)),
                    Err(e) => return Some(Err(e)),
                }
                continue;
            };
            let part = *part;
            let item = match reader {
                Reader::Table(table) => match table.next() {
                    None => None,
                    Some(Ok(row)) => Some(self.of_row(part, row)),
                    Some(Err(e)) => {
                        self.waiting.clear();
                        self.current = None;
                        return Some(Err(e));
                    }
                },
                Reader::Lines(lines) => match lines.next() {
                    None => None,
                    Some(Ok(line)) => Some(line.and_then(|l| self.of_line(&l))),
                    Some(Err(e)) => {
                        self.waiting.clear();
                        self.current = None;
                        return Some(Err(e));
                    }
                },
            };
            let Some(item) = item else {
                self.current = None;
                continue;
            };
            let index = self.next;
            self.next += 1;
            return Some(Ok(item.map_err(|why| BadRow { part: self.part(part).to_owned(), index, why })));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// TallyQA's rows with these pictures, and files of these names below the bench's folder.
    fn pictures(rows: &[Value], files: &[&str]) -> Vec<Result<PictureRef, String>> {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("tallyqa");
        for file in files {
            std::fs::create_dir_all(folder.join(file).parent().unwrap()).unwrap();
            std::fs::write(folder.join(file), "").unwrap();
        }
        let line = |image| json!({ "image": image, "question": "How many?", "answer": 2 }).to_string() + "\n";
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("tallyqa_val.jsonl"), rows.iter().map(line).collect::<String>()).unwrap();
        let items = Items::open(Source::local(dir.path(), Bench::Tallyqa).unwrap()).unwrap();
        let picture = |item: Result<Item, BadRow>| -> Result<PictureRef, String> {
            Ok(match item.map_err(|bad| bad.why)?.picture {
                PictureRef::File(file) => PictureRef::File(file.strip_prefix(&folder).unwrap().to_owned()),
                other => other,
            })
        };
        items.map(|item| picture(item.unwrap())).collect()
    }

    #[test]
    fn visual_genomes_pictures_are_found_where_its_users_have_them() {
        for (named, file) in [
            ("1.jpg", "images/1.jpg"),
            ("1.jpg", "VG_100K_2/1.jpg"),
            ("1", "images/VG_100K/1.jpg"),
            ("VG_100K/1.jpg", "VG_100K/1.jpg"),
            ("VG_100K_2/1.jpg", "visual_genome/VG_100K_2/1.jpg"),
            ("visual_genome/VG_100K/1.jpg", "images/VG_100K/1.jpg"),
            ("visual_genome/1.jpg", "visual_genome/1.jpg"),
        ] {
            assert_eq!(pictures(&[json!(named)], &[file]), [Ok(PictureRef::File(file.into()))], "{named}");
        }
        let why = pictures(&[json!("1.jpg")], &["elsewhere/1.jpg"]).remove(0).unwrap_err();
        assert!(why.contains("images/1.jpg is missing") && why.contains("VG_100K_2/"), "{why}");
    }

    #[test]
    fn a_rows_own_picture_needs_no_file() {
        let long = "AAAA".repeat(1 << 19);
        let rows = [
            json!({ "bytes": "AQID", "path": "gone.jpg" }),
            json!({ "bytes": null, "path": "1.jpg" }),
            json!({ "bytes": "no base64" }),
            // A line longer than a megabyte.
            json!(long),
        ];
        let got = pictures(&rows, &["images/1.jpg"]);
        assert_eq!(got[0], Ok(PictureRef::Bytes(vec![1, 2, 3])));
        assert_eq!(got[1], Ok(PictureRef::File("images/1.jpg".into())));
        assert!(
            got[2].as_ref().unwrap_err().contains("is neither a picture's bytes nor base64"),
            "{:?}",
            got[2]
        );
        assert_eq!(got[3], Ok(PictureRef::Bytes(vec![0; 3 << 19])));
    }
}
