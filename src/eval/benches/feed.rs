//! The questions of a run in their order: benches one after another, each row by row.
//!
//! A bench that cannot be opened or read further is noted with the reason, and the next one goes on.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::data::{Bench, Items, Kind, PictureRef};
use crate::eval::rooms::questions;
use crate::rooms::questions::AnswerType;
use crate::rooms::{Look, Question, View};

pub use crate::data::{OMNI3D_MINED, OMNI3D_PUBLISHED};

/// Is a row of Omni3D-Bench none of those that mining takes?
pub fn is_untrained(index: usize, rows: usize) -> bool {
    index + OMNI3D_MINED < rows
}

/// What a task's tools look at.
#[derive(Clone, Debug)]
pub enum Seen {
    Picture(PictureRef),
    Room(Arc<View>, Box<Question>),
    /// Nothing: the row is no question, for this reason.
    Nothing(String),
    /// The picture could not be had, for this reason, which may pass.
    Unreached(String),
}

/// One question to be measured.
#[derive(Clone, Debug)]
pub struct Task {
    pub bench: &'static str,
    /// `None` for rooms.
    pub published: Option<Bench>,
    pub part: String,
    pub index: usize,
    pub question: String,
    pub kind: Kind,
    pub truth: Value,
    pub picture: String,
    pub duplicate_of: Option<usize>,
    pub seen: Seen,
}

/// What is known of a bench beside its samples.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Note {
    /// Rows of its files.
    pub rows: usize,
    /// Where they came from.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub origin: String,
    /// Why it could not be read, or not to its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// A bench that is to be measured.
pub enum Opened {
    Items(Box<Items>),
    Rooms { look: Look, seed: u64 },
    Refused(Bench, String),
}

impl Opened {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Items(items) => items.source().bench.name(),
            Self::Rooms { .. } => ROOMS,
            Self::Refused(bench, _) => bench.name(),
        }
    }

    /// Also of one that is refused: what was refused may be there when a run goes on.
    pub fn is_judged(&self) -> bool {
        match self {
            Self::Items(items) => items.source().bench.is_judged(),
            Self::Refused(bench, _) => bench.is_judged(),
            Self::Rooms { .. } => false,
        }
    }

    /// Questions that a feed has of it, with at most `n`.
    pub fn questions(&self, n: Option<usize>) -> usize {
        let most = n.unwrap_or(usize::MAX);
        match self {
            Self::Items(items) if items.source().bench == Bench::Omni3d => {
                let rows = items.total();
                most.min(rows.min(OMNI3D_PUBLISHED.max(rows.saturating_sub(OMNI3D_MINED))))
            }
            Self::Items(items) => most.min(items.total()),
            Self::Rooms { .. } => n.unwrap_or(ROOMS_N),
            Self::Refused(..) => 0,
        }
    }
}

pub const ROOMS: &str = "rooms";
/// Rooms have no end: so many questions unless another number is asked for.
pub const ROOMS_N: usize = 1000;

/// Of a job array the part `number` (from 1) of `of`; pictures stay together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    pub number: u64,
    pub of: u64,
}

impl Shard {
    fn holds(self, picture: &str) -> bool {
        let digest = Sha256::digest(picture);
        let hash = u64::from_le_bytes(digest[..8].try_into().expect("eight bytes"));
        hash % self.of == self.number - 1
    }
}

type Source = Box<dyn Iterator<Item = Result<Task, String>> + Send>;

/// Questions that are still to be measured.
pub struct Feed {
    sources: std::vec::IntoIter<(&'static str, Source)>,
    current: Option<(&'static str, Source)>,
    shard: Option<Shard>,
    done: HashSet<(String, usize)>,
    asked: HashMap<[u8; 16], usize>,
    notes: BTreeMap<&'static str, Note>,
}

impl Feed {
    /// `n` limits the rows of each bench; what is `done` is not asked again.
    pub fn new(
        benches: Vec<Opened>,
        n: Option<usize>,
        shard: Option<Shard>,
        done: HashSet<(String, usize)>,
    ) -> Self {
        let mut notes = BTreeMap::new();
        let mut sources: Vec<(&'static str, Source)> = Vec::new();
        for bench in benches {
            let name = bench.name();
            let mut note = Note::default();
            match bench {
                Opened::Items(items) => {
                    note.rows = items.total();
                    note.origin.clone_from(&items.source().origin);
                    sources.push((name, Box::new(tasks(*items).take(n.unwrap_or(usize::MAX)))));
                }
                Opened::Rooms { look, seed } => {
                    let n = n.unwrap_or(ROOMS_N);
                    note.rows = n;
                    note.origin = format!("rooms {}, seed {seed}", crate::rooms::VERSION);
                    let rooms =
                        questions(look, seed).take(n).enumerate().map(|(i, (v, q))| Ok(room(i, v, q)));
                    sources.push((name, Box::new(rooms)));
                }
                Opened::Refused(_, why) => note.refused = Some(why),
            }
            notes.insert(name, note);
        }
        let sources = sources.into_iter();
        Self { sources, current: None, shard, done, asked: HashMap::new(), notes }
    }

    /// After the last question: what is known of each bench.
    pub fn into_notes(self) -> BTreeMap<&'static str, Note> {
        self.notes
    }
}

fn tasks(items: Items) -> impl Iterator<Item = Result<Task, String>> + Send {
    let (bench, rows) = (items.source().bench, items.total());
    let task = move |item: Result<crate::data::Item, crate::data::BadRow>| match item {
        Ok(i) => Task {
            bench: bench.name(),
            published: Some(bench),
            part: i.part,
            index: i.index,
            question: i.question,
            kind: i.kind,
            truth: i.truth,
            picture: i.picture_id,
            duplicate_of: None,
            seen: Seen::Picture(i.picture),
        },
        Err(bad) => Task {
            bench: bench.name(),
            published: Some(bench),
            part: bad.part,
            index: bad.index,
            question: String::new(),
            kind: Kind::Word,
            truth: Value::Null,
            picture: format!("row {}", bad.index),
            duplicate_of: None,
            seen: Seen::Nothing(bad.why),
        },
    };
    // Rows that training may have seen are no test.
    let tested =
        move |t: &Task| bench != Bench::Omni3d || t.index < OMNI3D_PUBLISHED || is_untrained(t.index, rows);
    items
        .map(move |item| item.map(task).map_err(|e| e.to_string()))
        .filter(move |t| t.as_ref().map_or(true, tested))
}

fn room(index: usize, view: Arc<View>, q: Question) -> Task {
    Task {
        bench: ROOMS,
        published: None,
        part: q.family.text().to_string(),
        index,
        question: q.text.clone(),
        kind: match q.answer_type {
            AnswerType::Int => Kind::Int,
            AnswerType::Float => Kind::Float,
            AnswerType::YesNo => Kind::YesNo,
            AnswerType::Str if q.options.is_some() => Kind::Choice,
            AnswerType::Str => Kind::Word,
        },
        truth: q.answer.clone(),
        picture: format!("scene {}", view.seed),
        duplicate_of: None,
        seen: Seen::Room(view, Box::new(q)),
    }
}

impl Iterator for Feed {
    type Item = Task;

    fn next(&mut self) -> Option<Task> {
        loop {
            let Some((name, source)) = &mut self.current else {
                self.current = Some(self.sources.next()?);
                self.asked.clear();
                continue;
            };
            let mut task = match source.next() {
                None => {
                    self.current = None;
                    continue;
                }
                Some(Err(why)) => {
                    self.notes.get_mut(name).expect("noted at the start").refused = Some(why);
                    self.current = None;
                    continue;
                }
                Some(Ok(task)) => task,
            };
            if !matches!(task.seen, Seen::Nothing(_)) {
                let digest = Sha256::digest(format!("{}\0{}", task.picture, task.question));
                let key = digest[..16].try_into().expect("sixteen bytes");
                match self.asked.get(&key) {
                    Some(first) => task.duplicate_of = Some(*first),
                    None => {
                        self.asked.insert(key, task.index);
                    }
                }
            }
            let mine = self.shard.is_none_or(|s| s.holds(&task.picture));
            if mine && !self.done.contains(&(task.bench.to_owned(), task.index)) {
                return Some(task);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defect_8_rows_that_mining_takes_are_no_test_rows() {
        // Of 501 rows the last 400 are mined: 101 are left, one more than the released test has.
        assert_eq!((0..501).filter(|i| is_untrained(*i, 501)).count(), 101);
        assert!(is_untrained(100, 501) && !is_untrained(101, 501));
        // Of 480 rows mining takes some of the released test's.
        assert!(!is_untrained(80, 480) && is_untrained(79, 480));
    }

    #[test]
    fn shards_are_disjoint_and_whole_and_pictures_stay_together() {
        let of = |number, n: usize| -> Vec<(usize, String)> {
            let rooms = Opened::Rooms { look: Look::Studio, seed: 3 };
            let shard = (number > 0).then_some(Shard { number, of: 3 });
            Feed::new(vec![rooms], Some(n), shard, HashSet::new()).map(|t| (t.index, t.picture)).collect()
        };
        let all = of(0, 60);
        let shards: Vec<_> = (1..=3).map(|i| of(i, 60)).collect();
        let mut joined: Vec<_> = shards.concat();
        joined.sort_unstable();
        assert_eq!(joined, all);
        assert!(shards.iter().all(|s| s.len() > 5), "{:?}", shards.iter().map(Vec::len).collect::<Vec<_>>());
        for picture in all.iter().map(|t| &t.1) {
            assert_eq!(shards.iter().filter(|s| s.iter().any(|t| t.1 == *picture)).count(), 1);
        }
    }
}
