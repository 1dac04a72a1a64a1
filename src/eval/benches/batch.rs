//! What is under way of a run: batches between planning and record, and which pictures are kept for pages.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use anyhow::{Result, anyhow};

use super::feed::Task;
use super::record::Record;
use super::run::Stopped;
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
        let mut groups: Vec<Vec<Job>> = Vec::new();
        let mut of: HashMap<(&'static str, String), usize> = HashMap::new();
        for (number, planned) in planned.into_iter().enumerate() {
            let key = (planned.task.bench, planned.task.picture.clone());
            let group = *of.entry(key).or_insert_with(|| {
                groups.push(Vec::new());
                groups.len() - 1
            });
            let shown = !gallery.is_full(planned.task.bench);
            groups[group].push(Job { batch, number, planned, shown });
        }
        let batch = Self { done, recorded: 0 };
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

    /// What is done and may be recorded, all before it being done: in the questions' order.
    pub(super) fn ready(&mut self, all_at_once: bool) -> Vec<Done> {
        if all_at_once && !self.done.iter().all(Option::is_some) {
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

/// Which samples' pictures are kept: of each bench the first ones, right and not right.
#[derive(Debug, Default)]
pub struct Gallery {
    seen: BTreeMap<String, [usize; 2]>,
}

impl Gallery {
    pub(super) fn is_full(&self, bench: &str) -> bool {
        self.seen.get(bench).is_some_and(|[right, wrong]| *right >= SHOWN_RIGHT && *wrong >= SHOWN_WRONG)
    }

    /// Counts a record; is it one of those that are shown?
    pub fn takes(&mut self, record: &Record) -> bool {
        let right = record.is_right();
        let [rights, wrongs] = self.seen.entry(record.bench.clone()).or_default();
        let (count, most) = if right { (rights, SHOWN_RIGHT) } else { (wrongs, SHOWN_WRONG) };
        *count += 1;
        *count <= most
    }
}
