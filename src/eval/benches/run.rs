//! Questions answered and recorded.
//!
//! Two stages overlap: one thread reads rows, fetches links and has the planner write the programs of the
//! next batch, while workers, each with a sandbox of its own, run those of this one; questions about one
//! picture share its tools and one worker. A worker that finds nothing left of one batch goes on with the
//! next. Encoded pictures of three batches are in memory, decoded ones of as many pictures as there are
//! workers. Records are written in the order of the questions.
//!
//! An answer does not depend on the batch that it falls into (see [`crate::pipeline`]), so a run that was
//! killed ends with the same records as one that was not. What a server failed to answer is not measured, and
//! the next run of the same command asks it again; a server that will answer nothing more ends the run.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Instant;

use anyhow::{Context, Result, anyhow};

use super::batch::{BATCHES, Batch, Done, Event, Gallery, Job, LastWord, Planned, StopOnDrop};
use super::feed::{Feed, Note, Seen, Task};
use super::folder::Folder;
use super::metric::{Form, Judged, Wanted, score};
pub use super::programs::{PROGRAMS, Programs, Written};
use super::record::Record;
use crate::config::Inference;
use crate::data::{LinkCause, Links, PictureRef};
use crate::llm::{ChatError, ChatReply};
use crate::pipeline::{Referee, question_seed};
use crate::planner::Planner;
use crate::program::{Executor, Limits, Sandbox};
use crate::tools::real::{Perception, Vlm};
use crate::verify::SynonymJudge;

/// Where answers come from.
pub enum Method<'a> {
    /// Each question's correct program; rooms only.
    Stored,
    Planner(&'a Planner),
    /// Replies that a planner wrote before.
    Programs(Programs),
    /// This VLM alone.
    Direct(&'a Vlm),
}

/// A run's parts and settings.
pub struct Runner<'a> {
    pub method: Method<'a>,
    /// `None`: the exact truth, for rooms only; or nothing, where the VLM answers alone.
    pub perception: Option<&'a Perception>,
    pub judge: Option<&'a SynonymJudge>,
    /// Of answers that equally many replies gave.
    pub referee: Option<&'a Referee>,
    pub links: &'a Links,
    pub seed: u64,
    pub how: Inference,
    pub limits: Limits,
    pub executor: Executor,
    /// Pictures worked on at once.
    pub workers: usize,
    /// Questions planned in one call.
    pub together: usize,
    /// May the next questions be planned while these are worked on?
    pub overlap: bool,
}

/// What ends a run.
#[derive(Debug, thiserror::Error)]
pub enum Stopped {
    /// A model failed; what was recorded stays.
    #[error("{0}")]
    Model(#[from] ChatError),
    #[error("{0:#}")]
    Other(#[from] anyhow::Error),
}

/// Wall seconds by what they went to; those of workers add up.
pub type Times = BTreeMap<String, f64>;

impl Runner<'_> {
    /// Has all of the feed answered, and each record appended to the folder.
    ///
    /// # Errors
    /// See [`Stopped`]; what was recorded until then stays.
    pub fn run(
        &self,
        mut feed: Feed,
        folder: &mut Folder,
        gallery: &mut Gallery,
        mut progress: impl FnMut(),
    ) -> Result<(BTreeMap<&'static str, Note>, Times), Stopped> {
        let times = Mutex::new(Times::new());
        let (stop, enough) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|s| {
            let (give, jobs) = mpsc::channel::<Vec<Job>>();
            let (tell, events) = mpsc::channel();
            // A batch is planned where there is room for it, and gives its room back when it is recorded.
            let (leave, room) = mpsc::channel();
            for _ in 0..if self.overlap { BATCHES } else { 1 } {
                leave.send(()).expect("the other end is here");
            }
            let (times, stop, enough, jobs) = (&times, &stop, &enough, Arc::new(Mutex::new(jobs)));
            for _ in 0..self.workers {
                let (jobs, tell) = (jobs.clone(), tell.clone());
                s.spawn(move || self.serve(&jobs, &tell, stop, times));
            }
            let planning = s.spawn(move || -> Result<_, Stopped> {
                let tell = LastWord(tell);
                while room.recv().is_ok() && !enough.load(Ordering::Relaxed) {
                    let mut tasks: Vec<Task> = feed.by_ref().take(self.together).collect();
                    if tasks.is_empty() {
                        break;
                    }
                    let started = Instant::now();
                    self.fetch(&mut tasks);
                    spend(times, "links", started);
                    let started = Instant::now();
                    let (batch, closed) = whole(self.plan(tasks)?);
                    spend(times, "planning", started);
                    if !batch.is_empty() && tell.0.send(Event::Planned(batch)).is_err() {
                        // The other side has stopped and says why.
                        break;
                    }
                    if let Some(e) = closed {
                        return Err(e.into());
                    }
                }
                Ok(feed.into_notes())
            });
            // However this ends, nobody begins anything more.
            let _stopped = StopOnDrop(stop);
            let mut under_way: VecDeque<Batch> = VecDeque::new();
            let (mut begun, mut all_planned, mut gone) = (0, false, None);
            while !(all_planned && under_way.is_empty()) {
                match events.recv().context("all workers have ended")? {
                    Event::Planned(batch) => {
                        under_way.push_back(Batch::begin(batch, begun, gallery, &give)?);
                        begun += 1;
                    }
                    Event::AllPlanned => all_planned = true,
                    Event::Done(result) => {
                        let (number, group) = result?;
                        let first = begun - under_way.len();
                        under_way[number - first].take(group);
                    }
                }
                if let Some(e) = self.vlm().and_then(Vlm::failed) {
                    return Err(e.clone().into());
                }
                while let Some(first) = under_way.front_mut() {
                    let mut ready = first.ready(self.judge.is_some());
                    if ready.is_empty() {
                        break;
                    }
                    let over = first.is_over();
                    // Where the judge is gone nothing more is planned, but answers are recorded: they are paid for.
                    if let Some(e) = self.judge(&mut ready, times)? {
                        enough.store(true, Ordering::Relaxed);
                        gone.get_or_insert(e);
                    }
                    for Done { mut record, thumbnail } in ready {
                        finish(&mut record);
                        if gallery.takes(&record)
                            && let Some(jpeg) = thumbnail
                        {
                            folder.keep_picture(&record.bench, record.index, &jpeg)?;
                        }
                        folder.add(&record)?;
                        progress();
                    }
                    if over {
                        under_way.pop_front();
                        // Who plans may have ended.
                        let _ = leave.send(());
                    }
                }
            }
            let notes = planning.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            if let Some(e) = gone {
                return Err(e.into());
            }
            Ok((notes, std::mem::take(&mut *times.lock().expect("no holder panics"))))
        })
    }

    /// Who is asked about pictures, if anybody is.
    fn vlm(&self) -> Option<&Vlm> {
        match &self.method {
            Method::Direct(vlm) => Some(*vlm),
            _ => self.perception.map(|p| &p.vlm),
        }
    }

    /// A worker's life. It starts its sandbox itself: the jailed process dies with the thread that
    /// started it, and is replaced where a program has ended it.
    fn serve(
        &self,
        jobs: &Mutex<mpsc::Receiver<Vec<Job>>>,
        tell: &mpsc::Sender<Event>,
        stop: &AtomicBool,
        times: &Mutex<Times>,
    ) {
        // Threads of its own: those of others would share each of thousands of short operations, and wait
        // for one another as long as they work.
        let threads = (rayon::current_num_threads() / self.workers).max(1);
        match rayon::ThreadPoolBuilder::new().num_threads(threads).build() {
            Ok(pool) if self.workers > 1 => pool.install(|| self.work_off(jobs, tell, stop, times)),
            _ => self.work_off(jobs, tell, stop, times),
        }
    }

    fn work_off(
        &self,
        jobs: &Mutex<mpsc::Receiver<Vec<Job>>>,
        tell: &mpsc::Sender<Event>,
        stop: &AtomicBool,
        times: &Mutex<Times>,
    ) {
        let mut sandbox = None;
        while let Ok(group) = { jobs.lock().expect("no holder panics").recv() } {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            let batch = group.first().map_or(0, |job| job.batch);
            // A panic must reach the thread that waits for this group.
            let work = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let sandbox = match &mut sandbox {
                    Some(sandbox) => sandbox,
                    none => {
                        let opened = Sandbox::open(self.limits.clone(), self.executor.clone(), None);
                        none.insert(opened.context("cannot start the sandbox")?)
                    }
                };
                self.about_one_picture(group, sandbox, times)
            }));
            let result: Result<_, Stopped> =
                work.unwrap_or_else(|_| Err(anyhow!("a worker panicked; this is a bug").into()));
            let result = result.map(|done| (batch, done));
            if tell.send(Event::Done(result)).is_err() {
                return;
            }
        }
    }

    /// Only plans: each reply appended to the folder. Questions to which a server gave none are left out, and
    /// counted.
    pub fn plan_only(
        &self,
        mut feed: Feed,
        folder: &mut Folder,
        mut progress: impl FnMut(),
    ) -> Result<(BTreeMap<&'static str, Note>, usize), Stopped> {
        let mut unanswered = 0;
        loop {
            let tasks: Vec<Task> = feed.by_ref().take(self.together).collect();
            if tasks.is_empty() {
                return Ok((feed.into_notes(), unanswered));
            }
            // A question's replies are written together, or it is asked again as a whole.
            let (batch, closed) = whole(self.plan(tasks)?);
            for Planned { task, replies } in batch {
                if replies.iter().any(|r| r.as_ref().is_err_and(ChatError::is_outage)) {
                    unanswered += 1;
                    continue;
                }
                for (sample, reply) in replies.into_iter().enumerate() {
                    let reply = reply.ok().map(|r| r.text);
                    folder.add(&Written {
                        bench: task.bench.to_owned(),
                        index: task.index,
                        sample,
                        question: task.question.clone(),
                        seed: Some(question_seed(self.seed, task.index, sample)),
                        reply,
                    })?;
                }
                progress();
            }
            if let Some(e) = closed {
                return Err(e.into());
            }
        }
    }

    /// Has the programs written.
    fn plan(&self, tasks: Vec<Task>) -> Result<Vec<Planned>> {
        let asked: Vec<usize> = (0..tasks.len())
            .filter(|&i| !matches!(tasks[i].seen, Seen::Nothing(_) | Seen::Unreached(_)))
            .collect();
        let votes = self.how.samples;
        let mut replies: Vec<Vec<Result<ChatReply, ChatError>>> = tasks.iter().map(|_| Vec::new()).collect();
        match &self.method {
            Method::Stored | Method::Direct(_) => {}
            Method::Programs(programs) => {
                for i in asked {
                    replies[i] = programs.of(&tasks[i])?;
                }
            }
            Method::Planner(planner) => {
                let seeded = |&i: &usize| {
                    let task: &Task = &tasks[i];
                    (0..votes).map(move |k| (&*task.question, question_seed(self.seed, task.index, k)))
                };
                let questions: Vec<(&str, u64)> = asked.iter().flat_map(seeded).collect();
                let mut got = planner.ask(&questions, None).into_iter();
                for i in asked {
                    replies[i] = got.by_ref().take(votes).collect();
                }
            }
        }
        Ok(tasks.into_iter().zip(replies).map(|(task, replies)| Planned { task, replies }).collect())
    }

    /// Pictures behind links, several at once.
    fn fetch(&self, tasks: &mut [Task]) {
        let links: Vec<&mut Task> =
            tasks.iter_mut().filter(|t| matches!(t.seen, Seen::Picture(PictureRef::Link(_)))).collect();
        let queue = Mutex::new(links.into_iter());
        std::thread::scope(|s| {
            for _ in 0..8 {
                s.spawn(|| {
                    while let Some(task) = { queue.lock().expect("no holder panics").next() } {
                        let Seen::Picture(PictureRef::Link(link)) = &task.seen else { continue };
                        task.seen = match self.links.get(link) {
                            Ok(bytes) => Seen::Picture(PictureRef::Bytes(bytes)),
                            Err(e) if e.cause == LinkCause::Link => Seen::Nothing(e.to_string()),
                            Err(e) => Seen::Unreached(e.to_string()),
                        };
                    }
                });
            }
        });
    }
}

/// Of a batch in which the planner's model failed the questions that were answered before, which are paid for, and
/// the failure.
fn whole(batch: Vec<Planned>) -> (Vec<Planned>, Option<ChatError>) {
    let failure = |p: &Planned| {
        let mut errors = p.replies.iter().filter_map(|r| r.as_ref().err());
        errors.find(|e| e.is_of_model()).cloned()
    };
    let closed = batch.iter().find_map(failure);
    (batch.into_iter().filter(|p| failure(p).is_none()).collect(), closed)
}

/// Scores and blame, once everything else is known.
pub(super) fn finish(record: &mut Record) {
    let bench = crate::data::Bench::by_name(&record.bench);
    if let Some(bench) = bench.filter(|_| record.is_measured()) {
        let of = Wanted { bench, kind: record.kind, truth: &record.truth };
        let judged = record.judged.unwrap_or(Judged::Nobody);
        let by = |form| score(form, of, record.answer.as_ref(), judged);
        (record.reference, record.strict) = (by(Form::Reference), by(Form::Strict));
    }
    if record.fault.is_none() {
        record.fault = record.blame(None);
    }
}

pub(super) fn spend(times: &Mutex<Times>, on: &str, since: Instant) {
    add(times, on, since.elapsed().as_secs_f64());
}

pub(super) fn add(times: &Mutex<Times>, on: &str, seconds: f64) {
    *times.lock().expect("no holder panics").entry(on.to_owned()).or_default() += seconds;
}
