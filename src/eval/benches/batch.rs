//! What is under way of a run: batches between planning and record, and which pictures are kept for pages.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use anyhow::{Result, anyhow};

use super::feed::Task;
use super::record::Record;
use super::run::Stopped;
use crate::data::Kind;
use crate::llm::{ChatError, ChatReply};

/// Questions' programs, or why there are none.
pub(super) struct Planned {
    pub task: Task,
    pub replies: Vec<Result<ChatReply, ChatError>>,
}

/// What a worker gets.
pub(super) struct Job {
    pub batch: usize,
    /// In its batch.
    pub number: usize,
    pub planned: Planned,
    /// May it be shown in a gallery?
    pub shown: bool,
}

/// What a worker gives back.
pub(super) struct Done {
    pub record: Record,
    /// For the galleries.
    pub thumbnail: Option<Vec<u8>>,
}

/// Batches in memory: one that is being planned and two that are being worked on, so that nobody waits for
/// the last programs of one.
pub(super) const BATCHES: usize = 3;

/// What those who plan and those who work tell the thread that records.
pub(super) enum Event {
    Planned(Vec<Planned>),
    AllPlanned,
    /// Of a batch, what was asked about one picture.
    Done(Result<(usize, Vec<(usize, Done)>), Stopped>),
}

/// Says that nothing more comes, however the planning ends.
pub(super) struct LastWord(pub mpsc::Sender<Event>);

impl Drop for LastWord {
    fn drop(&mut self) {
        let _ = self.0.send(Event::AllPlanned);
    }
}

/// Tells the workers to end.
pub(super) struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A batch that is being worked on.
pub(super) struct Batch {
    /// From the first question that is not recorded yet.
    done: VecDeque<Option<Done>>,
    recorded: usize,
    /// Some of its answers go to a judge.
    judged: bool,
}

impl Batch {
    /// Hands a batch out, the questions about one picture together.
    pub(super) fn begin(
        planned: Vec<Planned>,
        batch: usize,
        gallery: &Gallery,
        give: &mpsc::Sender<Vec<Job>>,
    ) -> Result<Self> {
        let done = planned.iter().map(|_| None).collect();
        let judged = planned.iter().any(|p| p.task.kind == Kind::Synonym);
        let mut groups: Vec<Vec<Job>> = Vec::new();
        let mut of: HashMap<(&'static str, String), usize> = HashMap::new();
        for (number, planned) in planned.into_iter().enumerate() {
            let key = (planned.task.bench, planned.task.picture.clone());
            let group = *of.entry(key).or_insert_with(|| {
                groups.push(Vec::new());
                groups.len() - 1
            });
            let shown = gallery.may_show(planned.task.bench, planned.task.index);
            groups[group].push(Job { batch, number, planned, shown });
        }
        let batch = Self { done, recorded: 0, judged };
        for group in groups {
            give.send(group).map_err(|_| anyhow!("all workers have ended"))?;
        }
        Ok(batch)
    }

    pub(super) fn take(&mut self, group: Vec<(usize, Done)>) {
        for (number, done) in group {
            self.done[number - self.recorded] = Some(done);
        }
    }

    /// Whether all of it is recorded.
    pub(super) fn is_over(&self) -> bool {
        self.done.is_empty()
    }

    /// What is done and may be recorded, all before it being done: in the questions' order. A judge is asked about
    /// many pairs of words at once.
    pub(super) fn ready(&mut self, judge: bool) -> Vec<Done> {
        if judge && self.judged && !self.done.iter().all(Option::is_some) {
            return Vec::new();
        }
        let n = self.done.iter().take_while(|d| d.is_some()).count();
        self.recorded += n;
        self.done.drain(..n).flatten().collect()
    }
}

/// How many samples of each bench a page shows.
pub const SHOWN_RIGHT: usize = 6;
pub const SHOWN_WRONG: usize = 24;

/// Which samples' pictures are kept: of each bench the first ones by their rows, right and not right. A row that
/// is asked again comes after later ones and stands before them in the end.
#[derive(Debug, Default)]
pub struct Gallery {
    first: BTreeMap<String, [BTreeSet<usize>; 2]>,
}

impl Gallery {
    /// Could a row be one of those that are shown?
    pub(super) fn may_show(&self, bench: &str, row: usize) -> bool {
        self.first.get(bench).is_none_or(|[right, wrong]| {
            is_among(right, SHOWN_RIGHT, row) || is_among(wrong, SHOWN_WRONG, row)
        })
    }

    /// Counts a record; is it one of those that are shown?
    pub fn takes(&mut self, record: &Record) -> bool {
        let [right, wrong] = self.first.entry(record.bench.clone()).or_default();
        let (rows, most) = if record.is_right() { (right, SHOWN_RIGHT) } else { (wrong, SHOWN_WRONG) };
        let taken = is_among(rows, most, record.index);
        if taken {
            rows.insert(record.index);
            if rows.len() > most {
                rows.pop_last();
            }
        }
        taken
    }
}

/// Would a row be one of the first so many?
fn is_among(first: &BTreeSet<usize>, most: usize, row: usize) -> bool {
    first.len() < most || first.last().is_some_and(|last| row < *last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_row_that_is_asked_again_takes_its_place_among_those_shown() {
        let record = |index: usize, strict: f64| -> Record {
            serde_json::from_value(json!({
                "bench": "vsr", "index": index, "picture": "p", "question": "q", "kind": "word", "truth": "yes",
                "answer": "yes", "reference": strict, "strict": strict,
            }))
            .unwrap()
        };
        let mut gallery = Gallery::default();
        assert!(gallery.may_show("vsr", 9));
        // A server was silent at row 2.
        let rights: Vec<usize> = (0..20).filter(|i| *i != 2 && gallery.takes(&record(*i, 1.))).collect();
        assert_eq!(rights, [0, 1, 3, 4, 5, 6]);
        assert!(gallery.may_show("vsr", 2) && gallery.takes(&record(2, 1.)));
        assert!(!gallery.takes(&record(6, 1.)) && !gallery.takes(&record(7, 1.)));
        // The places of what is not right are apart.
        let wrongs = (100..200).filter(|i| gallery.takes(&record(*i, 0.))).count();
        assert_eq!(wrongs, SHOWN_WRONG);
        assert!(!gallery.may_show("vsr", 200) && gallery.may_show("vsr", 50));
    }
}
