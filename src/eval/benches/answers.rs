//! The questions about one picture, answered by a worker: their programs run on the picture's tools, or the VLM
//! asked alone.

use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Result, anyhow};

use super::batch::{Done, Job, Planned};
use super::feed::{Seen, Task};
use super::record::{REFUSED, Record};
use super::run::{Method, Runner, Stopped, Times, add, spend};
use crate::data::PictureRef;
use crate::llm::{ChatError, ChatReply, Finish};
use crate::pipeline::{Answered, Asked, Run, answer, elect, question_seed, run_all};
use crate::program::{IMAGE, Sandbox};
use crate::rooms::OracleTools;
use crate::rooms::questions::score as score_room;
use crate::sight::picture::DecodeOptions;
use crate::sight::{Picture, Tools};
use crate::tools::real::RealTools;

impl Runner<'_> {
    pub(super) fn about_one_picture(
        &self,
        group: Vec<Job>,
        sandbox: &mut Sandbox,
        times: &Mutex<Times>,
    ) -> Result<Vec<(usize, Done)>, Stopped> {
        // Each question fetched the picture for itself, and what the network did not bring may come another time.
        let (lost, group): (Vec<Job>, Vec<Job>) =
            group.into_iter().partition(|j| matches!(j.planned.task.seen, Seen::Unreached(_)));
        let mut all = Vec::with_capacity(lost.len() + group.len());
        for Job { number, planned: Planned { task, .. }, .. } in lost {
            let mut record = blank(&task);
            if let Seen::Unreached(why) = task.seen {
                record.set_outage(why);
            }
            all.push((number, Done { record, thumbnail: None }));
        }
        let Some(picture) = group.first().map(|j| decoded(&j.planned.task.seen)) else { return Ok(all) };
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
                all.extend(group.iter().map(|j| (j.number, refused(&j.planned.task, &why))));
                return Ok(all);
            }
        };
        let mut tools: Option<Box<dyn Tools + '_>> = match (self.perception, &room) {
            (Some(models), _) => Some(Box::new(RealTools::new(models, &picture))),
            (None, Some(view)) => Some(Box::new(OracleTools::new(view))),
            (None, None) => None,
        };
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
            match tools.outage().or_else(|| answered.unrun()) {
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
        let runs = run_all(planner, sandbox, &asked, replies, tools, self.how.repairs, || ());
        let mut runs = runs.into_iter().collect::<Result<Vec<Run>, ChatError>>()?;
        let chosen = elect(self.referee, &task.question, &mut runs, sandbox)?;
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
        Seen::Nothing(why) | Seen::Unreached(why) => Err(why.clone()),
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

fn note_times(times: &Mutex<Times>, answered: &Answered) {
    let Ok(outcome) = &answered.outcome else { return };
    add(times, "programs", outcome.seconds);
    for call in &outcome.calls {
        add(times, &call.tool, call.seconds);
    }
}
