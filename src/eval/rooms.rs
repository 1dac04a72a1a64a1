//! The Rooms bench: questions about freshly rendered rooms, scored exactly.
//!
//! Test scenes are never training scenes; a fifth of the questions stand in sentence frames that
//! no training data holds, and are reported apart.

use super::benches::record::NO_REPLY;
use super::stats::Share;
use crate::config::Inference;
use crate::llm::ChatError;
use crate::pipeline::{Answered, Asked, Referee, Run, answer_all, elect, question_seed};
use crate::planner::Planner;
use crate::program::{IMAGE, Sandbox};
use crate::rooms::questions::{Question, Questions, Split, mean_relative_accuracy, score};
use crate::rooms::{self, Look, OracleTools, View};
use crate::sight::{Picture, Tools};
use crate::tools::real::{Perception, RealTools};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

/// Width and height of the bench's pictures, pixels.
pub const SIZE: (u32, u32) = (256, 192);

/// The bench's questions, the same for the same seed whatever is measured on them.
pub fn questions(look: Look, seed: u64) -> impl Iterator<Item = (Arc<View>, Question)> {
    Questions::new(Split::Test, seed, move |s| rooms::generate(s, look, SIZE.0, SIZE.1))
}

/// One question, scored unless a server gave no reply.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// The questions' generator: those of another version are others.
    pub rooms_version: u32,
    pub index: usize,
    pub scene: u64,
    pub family: String,
    pub held_out: bool,
    pub question: String,
    pub truth: Value,
    /// What the program answered; `None` where it failed.
    pub answer: Option<Value>,
    /// `None` where a server gave no reply.
    pub correct: Option<bool>,
    /// Mean relative accuracy, for floats (method.md 8).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mra: Option<f64>,
    /// Why there is no answer; [`NO_REPLY`] where a server may give one another time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// With a planner: what `valor infer --seed` needs to repeat this row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// With a planner: what it wrote.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply: Option<String>,
    /// How often its program failed and was written anew.
    #[serde(skip_serializing_if = "is_zero")]
    pub repairs: usize,
    /// Of several replies: whether any of them was right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub any_correct: Option<bool>,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl Sample {
    /// Scores one run. A failed program is wrong, never an answer; a server's silence is neither.
    pub fn new(index: usize, view: &View, q: &Question, run: &Run) -> Self {
        let (answer, silent) = (run.value().cloned(), run.outage.is_some());
        Self {
            rooms_version: rooms::VERSION,
            index,
            scene: view.seed,
            family: q.family.text().to_string(),
            held_out: q.held_out,
            question: q.text.clone(),
            truth: q.answer.clone(),
            correct: (!silent).then(|| answer.as_ref().is_some_and(|a| score(q, a))),
            mra: (!silent && q.answer.is_f64())
                .then(|| answer.as_ref().and_then(|a| mean_relative_accuracy(q, a)).unwrap_or(0.)),
            answer,
            failure: if silent { Some(NO_REPLY) } else { run.answered.failure() }.map(str::to_owned),
            seed: None,
            reply: None,
            repairs: 0,
            any_correct: None,
        }
    }
}

/// Where programs come from.
#[derive(Clone, Copy)]
pub enum Programs<'a> {
    /// The correct program of each question: measures sandbox and tools.
    Stored,
    /// Of several replies a question the most frequent answer counts ([`elect`]). Question `i`'s seeds are
    /// [`question_seed`]`(seed, i, 0..samples)`.
    Planner { planner: &'a Planner, seed: u64, how: Inference, referee: Option<&'a Referee> },
}

/// What answers the programs' tool calls.
#[derive(Clone, Copy)]
pub enum ToolSet<'a> {
    /// The exact truth of the scene.
    Oracle,
    Real(&'a Perception),
}

/// Questions planned in one call of the model.
const BATCH: usize = 32;

/// Runs and scores the questions in order. With `shuffle` the tools see the picture of another
/// question, half of the run away: what is still right then did not need the picture.
///
/// # Errors
/// If a model fails: the planner's, the VLM's or the referee's. A failed program is a result; a question to which
/// an endpoint gave no reply is none, and does not end the run.
///
/// # Panics
/// If the pictures are to be shuffled and there is only one.
pub fn evaluate(
    asked: &[(Arc<View>, Question)],
    programs: Programs,
    tools: ToolSet,
    shuffle: bool,
    sandbox: &mut Sandbox,
    mut progress: impl FnMut(),
) -> Result<Vec<Sample>, ChatError> {
    let n = asked.len();
    let seen = |i: usize| -> &View {
        if !shuffle {
            return &asked[i].0;
        }
        let mut others = (0..n).map(|k| &*asked[(i + n / 2 + k) % n].0);
        others.find(|v| v.seed != asked[i].0.seed).expect("pictures of more than one room")
    };
    // Programs take it for a call that failed; it is no failure of theirs.
    let vlm_works = || match tools {
        ToolSet::Oracle => Ok(()),
        ToolSet::Real(models) => models.vlm.failed().cloned().map_or(Ok(()), Err),
    };
    let mut samples = Vec::with_capacity(n);
    for start in (0..n).step_by(BATCH) {
        let batch = start..(start + BATCH).min(n);
        // Questions about one picture share its context.
        let mut views: Vec<&View> = Vec::new();
        let mut of = Vec::new();
        for i in batch.clone() {
            if views.last().is_none_or(|last| !std::ptr::eq(*last, seen(i))) {
                views.push(seen(i));
            }
            of.push(views.len() - 1);
        }
        let pictures: Vec<Picture> =
            views.iter().map(|v| Picture::new(v.width, v.height, v.rgb.clone())).collect();
        let mut contexts: Vec<Box<dyn Tools + '_>> = views
            .iter()
            .zip(&pictures)
            .map(|(view, picture)| -> Box<dyn Tools + '_> {
                match tools {
                    ToolSet::Oracle => Box::new(OracleTools::new(view)),
                    ToolSet::Real(models) => Box::new(RealTools::new(models, picture)),
                }
            })
            .collect();
        match programs {
            Programs::Stored => {
                for (i, of) in batch.zip(of) {
                    let (view, q) = &asked[i];
                    let outcome = Ok(sandbox.run(&q.program, IMAGE, &mut *contexts[of]));
                    let answered = Answered { reply: None, outcome };
                    let outage = contexts[of].outage().or_else(|| answered.unrun());
                    let run = Run { reply: None, answered, outage, earlier: Vec::new() };
                    vlm_works()?;
                    samples.push(Sample::new(i, view, q, &run));
                    progress();
                }
            }
            Programs::Planner { planner, seed, how, referee } => {
                let votes = how.samples;
                let ask = |(i, tools): (usize, usize)| {
                    let question = &*asked[i].1.text;
                    (0..votes).map(move |k| Asked { question, seed: question_seed(seed, i, k), tools })
                };
                let all: Vec<Asked> = batch.clone().zip(of).flat_map(ask).collect();
                let mut through = 0;
                let runs = answer_all(planner, sandbox, &all, &mut contexts, how.repairs, || {
                    through += 1;
                    if through % votes == 0 {
                        progress();
                    }
                });
                let mut runs = runs.into_iter().collect::<Result<Vec<Run>, ChatError>>()?;
                vlm_works()?;
                for (i, runs) in batch.zip(runs.chunks_mut(votes)) {
                    let (view, q) = &asked[i];
                    let chosen = elect(referee, &q.text, runs, sandbox)?;
                    let run = &runs[chosen];
                    samples.push(Sample {
                        seed: Some(question_seed(seed, i, chosen)),
                        reply: run.reply.as_ref().map(|r| r.text.clone()),
                        repairs: run.earlier.len(),
                        any_correct: (votes > 1 && run.outage.is_none())
                            .then(|| runs.iter().any(|r| r.value().is_some_and(|a| score(q, a)))),
                        ..Sample::new(i, view, q, run)
                    });
                }
            }
        }
    }
    Ok(samples)
}

#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub family: String,
    pub seen: Share,
    pub unseen: Share,
    pub all: Share,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mra: Option<f64>,
    /// Of several replies a question: the share of questions with a right one among them (pass@k).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pass: Option<Share>,
}

/// Accuracy per family and in all of what was scored, with the failures counted.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub bench: &'static str,
    pub rooms_version: u32,
    pub rows: Vec<Row>,
    pub failures: BTreeMap<String, usize>,
    /// Questions not scored, as a server gave no reply.
    #[serde(skip_serializing_if = "is_zero")]
    pub unanswered: usize,
}

impl Report {
    pub fn new(samples: &[Sample]) -> Self {
        let mut families: Vec<&str> = Vec::new();
        for s in samples {
            if !families.contains(&s.family.as_str()) {
                families.push(&s.family);
            }
        }
        families.sort_unstable();
        let mut rows: Vec<Row> = families.iter().map(|f| row(f, samples, |s| s.family == *f)).collect();
        rows.push(row("all", samples, |_| true));
        let mut failures: BTreeMap<String, usize> = BTreeMap::new();
        for f in samples.iter().filter_map(|s| s.failure.as_ref()) {
            *failures.entry(f.clone()).or_default() += 1;
        }
        let unanswered = failures.remove(NO_REPLY).unwrap_or(0);
        Self { bench: "rooms", rooms_version: rooms::VERSION, rows, failures, unanswered }
    }

    /// For a terminal.
    pub fn table(&self) -> String {
        let cell = |s: &Share| format!("{:<25}{:>5}", s.to_string(), s.n);
        let head = |s: &str| format!("{:<25}{:>5}", s, "n");
        let mut out = format!(
            "{:<14} {}  {}  {}  MRA\n",
            "family",
            head("all"),
            head("seen frames"),
            head("unseen frames")
        );
        for r in &self.rows {
            let mra = r.mra.map_or(String::new(), |m| format!("{:.1} %", 100. * m));
            let _ = writeln!(
                out,
                "{:<14} {}  {}  {}  {mra}",
                r.family,
                cell(&r.all),
                cell(&r.seen),
                cell(&r.unseen)
            );
        }
        if let Some(pass) = self.rows.last().and_then(|r| r.pass.as_ref()) {
            let _ = writeln!(out, "a right one among the replies (pass@k): {pass}");
        }
        if !self.failures.is_empty() {
            let list: Vec<_> = self.failures.iter().map(|(k, n)| format!("{k} {n}")).collect();
            let _ = writeln!(out, "no answer: {}", list.join(", "));
        }
        let _ = writeln!(out, "rooms version {}", self.rooms_version);
        out
    }
}

fn row(family: &str, samples: &[Sample], keep: impl Fn(&Sample) -> bool) -> Row {
    let share = |held_out: Option<bool>| {
        let these = samples.iter().filter(|s| keep(s) && held_out.is_none_or(|h| s.held_out == h));
        Share::clustered(these.filter_map(|s| Some((s.scene, s.correct?))))
    };
    let mra: Vec<f64> = samples.iter().filter(|s| keep(s)).filter_map(|s| s.mra).collect();
    let pass = samples.iter().filter(|s| keep(s)).filter_map(|s| Some((s.scene, s.any_correct?)));
    Row {
        family: family.to_string(),
        seen: share(Some(false)),
        unseen: share(Some(true)),
        all: share(None),
        mra: (!mra.is_empty()).then(|| mra.iter().sum::<f64>() / mra.len() as f64),
        pass: Some(Share::clustered(pass)).filter(|p| p.n > 0),
    }
}
