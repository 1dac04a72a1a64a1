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

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use super::batch::{BATCHES, Batch, Done, Event, Gallery, Job, LastWord, Planned, StopOnDrop};
use super::feed::{Feed, Note, Seen, Task};
use super::folder::Folder;
use super::metric::{Form, Judged, Wanted, score};
use super::record::{REFUSED, Record, each};
use crate::config::Inference;
use crate::data::{Links, PictureRef};
use crate::llm::{ChatError, ChatReply, Finish};
use crate::pipeline::{Answered, Asked, Referee, Run, answer, elect, question_seed, run_all};
use crate::planner::Planner;
use crate::program::{Executor, IMAGE, Limits, Sandbox};
use crate::rooms::OracleTools;
use crate::rooms::questions::score as score_room;
use crate::tools::picture::DecodeOptions;
use crate::tools::real::{Perception, RealTools, Vlm};
use crate::tools::{Picture, Tools};
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

/// A reply of a planner, kept for later runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Written {
    pub bench: String,
    pub index: usize,
    /// Of several replies to the question, from 0.
    #[serde(default)]
    pub sample: usize,
    pub question: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// `None` where the planner gave none.
    pub reply: Option<String>,
}

/// The file of replies in the folder of a run that only planned.
pub const PROGRAMS: &str = "programs.jsonl";

/// Replies by question.
#[derive(Debug, Default)]
pub struct Programs {
    file: String,
    written: HashMap<(String, usize), Vec<Written>>,
}

impl Programs {
    /// From a file, or a run's folder with one.
    pub fn open(path: &Path) -> Result<Self> {
        let path = if path.is_dir() { path.join(PROGRAMS) } else { path.to_owned() };
        let mut all = Self { file: path.display().to_string(), written: HashMap::new() };
        each(&path, |w: Written| {
            let of_question: &mut Vec<Written> = all.written.entry((w.bench.clone(), w.index)).or_default();
            // A run that was broken off among a question's replies wrote the first ones again.
            if of_question.iter().all(|known| known.sample != w.sample) {
                of_question.push(w);
            }
            Ok(())
        })?;
        if all.written.is_empty() {
            bail!("{} holds no reply", all.file)
        }
        all.written.values_mut().for_each(|w| w.sort_by_key(|w| w.sample));
        Ok(all)
    }

    fn of(&self, task: &Task) -> Result<Vec<Result<ChatReply, ChatError>>> {
        let at = || format!("{}, {} row {}", self.file, task.bench, task.index);
        let Some(written) = self.written.get(&(task.bench.to_owned(), task.index)) else {
            bail!("{} has no reply; plan it with --planner-only, or limit the run with --n", at())
        };
        if written.iter().any(|w| w.question != task.question) {
            bail!("{} is of another question than {:?}: plan this bench anew", at(), task.question)
        }
        let reply = |w: &Written| match &w.reply {
            Some(text) => Ok(ChatReply {
                text: text.clone(),
                finish: Finish::Stop,
                prompt_tokens: 0,
                new_tokens: 0,
                trace: None,
            }),
            None => Err(ChatError::Request("the planner gave none".into())),
        };
        Ok(written.iter().map(reply).collect())
    }
}

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
        let stop = AtomicBool::new(false);
        std::thread::scope(|s| {
            let (give, jobs) = mpsc::channel::<Vec<Job>>();
            let (tell, events) = mpsc::channel();
            // A batch is planned where there is room for it, and gives its room back when it is recorded.
            let (leave, room) = mpsc::channel();
            for _ in 0..if self.overlap { BATCHES } else { 1 } {
                leave.send(()).expect("the other end is here");
            }
            let (times, stop, jobs) = (&times, &stop, Arc::new(Mutex::new(jobs)));
            for _ in 0..self.workers {
                let (jobs, tell) = (jobs.clone(), tell.clone());
                s.spawn(move || self.serve(&jobs, &tell, stop, times));
            }
            let planning = s.spawn(move || -> Result<_, Stopped> {
                let tell = LastWord(tell);
                while room.recv().is_ok() {
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
            let (mut begun, mut all_planned) = (0, false);
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
                    // A judge is asked about many pairs of words at once.
                    let ready = first.ready(self.judge.is_some());
                    if ready.is_empty() {
                        break;
                    }
                    let over = first.is_over();
                    for Done { mut record, thumbnail } in self.judge(ready, times)? {
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
        let asked: Vec<usize> =
            (0..tasks.len()).filter(|&i| !matches!(tasks[i].seen, Seen::Nothing(_))).collect();
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
                            Err(e) => Seen::Nothing(e.to_string()),
                        };
                    }
                });
            }
        });
    }

    fn about_one_picture(
        &self,
        group: Vec<Job>,
        sandbox: &mut Sandbox,
        times: &Mutex<Times>,
    ) -> Result<Vec<(usize, Done)>, Stopped> {
        let picture = group.first().map(|j| decoded(&j.planned.task.seen)).expect("no group is empty");
        let room = match &group[0].planned.task.seen {
            Seen::Room(view, _) => Some(view.clone()),
            _ => None,
        };
        let refused = |task: &Task, why: &str| {
            let mut record = blank(task);
            record.failure = Some(REFUSED.into());
            record.why = Some(why.to_owned());
            Done { record, thumbnail: None }
        };
        let picture = match picture {
            Ok(picture) => picture,
            Err(why) => {
                return Ok(group.iter().map(|j| (j.number, refused(&j.planned.task, &why))).collect());
            }
        };
        let mut tools: Option<Box<dyn Tools + '_>> = match (self.perception, &room) {
            (Some(models), _) => Some(Box::new(RealTools::new(models, &picture))),
            (None, Some(view)) => Some(Box::new(OracleTools::new(view))),
            (None, None) => None,
        };
        let mut all = Vec::with_capacity(group.len());
        for Job { batch: _, number, planned: Planned { task, replies }, shown } in group {
            let mut record = blank(&task);
            record.size = Some((picture.width(), picture.height()));
            let mut program_is_right = None;
            if let Method::Direct(vlm) = &self.method {
                let started = Instant::now();
                let prompt = format!("{}\nAnswer with one word, number or phrase.", task.question);
                match vlm.prompted(&picture, None, &prompt) {
                    Ok(text) => record.answer = Some(text.into()),
                    Err(ChatError::NoReply(why)) => record.set_outage(why),
                    Err(e) => {
                        record.failure = Some("vlm".into());
                        record.why = Some(e.to_string());
                    }
                }
                spend(times, "vqa", started);
                if let (Seen::Room(_, q), true) = (&task.seen, record.is_measured()) {
                    record.set_score(record.answer.as_ref().is_some_and(|a| score_room(q, a)));
                }
            } else {
                let tools = tools.as_mut().ok_or_else(|| anyhow!("only rooms have exact tools"))?;
                let answered = self.answered(&task, replies, sandbox, tools, &mut record)?;
                note_times(times, &answered);
                if let (Seen::Room(view, q), true) = (&task.seen, record.is_measured()) {
                    let right = answered.value().is_some_and(|a| score_room(q, a));
                    record.set_score(right);
                    // On exact tools the same program shows whose fault it was.
                    program_is_right = (!right).then(|| {
                        let outcome = match (&record.reply, self.perception) {
                            (_, None) => return false,
                            (Some(reply), _) => answer(reply, sandbox, &mut OracleTools::new(view)),
                            (None, _) => stored(&q.program, sandbox, &mut OracleTools::new(view)),
                        };
                        outcome.value().is_some_and(|a| score_room(q, a))
                    });
                }
            }
            let thumbnail = shown.then(|| thumbnail(&picture)).transpose()?;
            record.fault = program_is_right.and_then(|right| record.blame(Some(right)));
            all.push((number, Done { record, thumbnail }));
        }
        Ok(all)
    }

    /// The run that counts of a question's programs.
    fn answered(
        &self,
        task: &Task,
        replies: Vec<Result<ChatReply, ChatError>>,
        sandbox: &mut Sandbox,
        tools: &mut Box<dyn Tools + '_>,
        record: &mut Record,
    ) -> Result<Answered, Stopped> {
        if let (Method::Stored, Seen::Room(_, q)) = (&self.method, &task.seen) {
            let answered = stored(&q.program, sandbox, tools);
            match tools.outage() {
                Some(why) => record.set_outage(why),
                None => record.set_outcome(&answered),
            }
            return Ok(answered);
        }
        let planner = match &self.method {
            Method::Planner(planner) => Some(*planner),
            Method::Programs(_) => None,
            Method::Stored | Method::Direct(_) => return Err(anyhow!("there is no program").into()),
        };
        let outage = replies.iter().find_map(|r| r.as_ref().err().filter(|e| e.is_outage()));
        if let Some(e) = outage.cloned() {
            record.set_outage(e.to_string());
            return Ok(Answered::without_reply(&e));
        }
        let seeds: Vec<u64> = (0..replies.len()).map(|k| question_seed(self.seed, task.index, k)).collect();
        let asked: Vec<Asked> =
            seeds.iter().map(|&seed| Asked { question: &task.question, seed, tools: 0 }).collect();
        let tools = std::slice::from_mut(tools);
        let mut runs = run_all(planner, sandbox, &asked, replies, tools, self.how.repairs, || ())?;
        let chosen = elect(self.referee, &task.question, &runs, sandbox)?;
        let Run { reply, answered, outage, earlier } = runs.swap_remove(chosen);
        if let Some(why) = outage {
            record.set_outage(why);
            return Ok(answered);
        }
        record.set_outcome(&answered);
        record.seed = planner.map(|_| seeds[chosen]);
        record.cut = reply.as_ref().is_some_and(|r| r.finish == Finish::Length);
        record.reply = reply.map(|r| r.text);
        record.repairs = earlier.len();
        Ok(answered)
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

fn blank(task: &Task) -> Record {
    Record {
        bench: task.bench.to_owned(),
        index: task.index,
        part: task.part.clone(),
        picture: task.picture.clone(),
        question: task.question.clone(),
        kind: task.kind,
        truth: task.truth.clone(),
        duplicate_of: task.duplicate_of,
        answer: None,
        failure: None,
        why: None,
        reference: None,
        strict: None,
        judged: None,
        fault: None,
        nothing_detected: false,
        size: None,
        seed: None,
        reply: None,
        cut: false,
        flags: Vec::new(),
        repairs: 0,
        calls: Vec::new(),
        line: None,
    }
}

fn stored(program: &str, sandbox: &mut Sandbox, tools: &mut dyn Tools) -> Answered {
    Answered { reply: None, outcome: Ok(sandbox.run(program, IMAGE, tools)) }
}

fn decoded(seen: &Seen) -> Result<Picture, String> {
    match seen {
        Seen::Nothing(why) => Err(why.clone()),
        Seen::Room(view, _) => Ok(Picture::new(view.width, view.height, view.rgb.clone())),
        Seen::Picture(PictureRef::Bytes(bytes)) => {
            Picture::decode(bytes, "the row's picture", DecodeOptions::default()).map_err(|e| e.to_string())
        }
        Seen::Picture(PictureRef::File(path)) => Picture::open(path).map_err(|e| e.to_string()),
        Seen::Picture(PictureRef::Link(link)) => Err(format!("{link} was not fetched")),
    }
}

/// Longest side of a gallery's pictures, pixels.
const THUMBNAIL: u32 = 400;

fn thumbnail(picture: &Picture) -> Result<Vec<u8>> {
    let (w, h) = (picture.width(), picture.height());
    let scale = f64::from(THUMBNAIL) / f64::from(w.max(h).max(THUMBNAIL));
    let side = |n: u32| ((f64::from(n) * scale).round() as u32).max(1);
    let small = image::imageops::thumbnail(&picture.to_image(), side(w), side(h));
    let mut jpeg = Vec::new();
    small.write_with_encoder(image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, 85))?;
    Ok(jpeg)
}

pub(super) fn spend(times: &Mutex<Times>, on: &str, since: Instant) {
    add(times, on, since.elapsed().as_secs_f64());
}

fn add(times: &Mutex<Times>, on: &str, seconds: f64) {
    *times.lock().expect("no holder panics").entry(on.to_owned()).or_default() += seconds;
}

fn note_times(times: &Mutex<Times>, answered: &Answered) {
    let Ok(outcome) = &answered.outcome else { return };
    add(times, "programs", outcome.seconds);
    for call in &outcome.calls {
        add(times, &call.tool, call.seconds);
    }
}
