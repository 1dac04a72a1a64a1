//! Question → plan and program → answer: the one path that `infer` and `eval` share.
//!
//! A question's answer depends on the models, the picture, the question and a seed, on nothing
//! else: not on what is asked in the same batch, nor on what was asked before. Benches derive
//! each question's seed by [`question_seed`] and report it, so that any of their rows can be
//! repeated alone.

mod vote;

pub use vote::{Referee, elect};

use crate::config::{self, Config, ENDPOINT, Fallback, ProgramExecutor};
use crate::llm::endpoint::asked_model;
use crate::llm::{ChatError, ChatModels, ChatReply};
use crate::planner::{Failed, Planner};
use crate::program::reply::ReplyError;
use crate::program::{
    ErrorKind, Executor, IMAGE, Limits, Outcome, Python, PythonError, Reply, Sandbox, SandboxError,
};
use crate::sight::Tools;
use crate::tools::real::{LoadError, Perception};
use crate::weights::{ModelFiles, WeightsError};
use candle_core::Device;
use serde_json::Value;
use std::sync::Once;

/// Every model that answering takes.
pub struct Models {
    pub planner: Planner,
    pub perception: Perception,
}

impl Models {
    /// Loads what a configuration names, all at once.
    pub fn load(config: &Config, device: &Device, chats: &ChatModels) -> Result<Self, LoadError> {
        chats.check_vlm()?;
        std::thread::scope(|s| {
            let planner = s.spawn(|| chats.planner());
            let perception = Perception::load(config, device, chats);
            let model = planner.join().expect("loading a model does not panic")?;
            Ok(Self { planner: Planner::new(model, config)?, perception: perception? })
        })
    }

    /// Part and model, for notices and reports.
    pub fn names(&self) -> [(&'static str, &str); 4] {
        let [detector, depth, vlm] = self.perception.names();
        [("planner", self.planner.model.name()), detector, depth, vlm]
    }
}

/// What tells a part's model from others, its load not paid for: a name says little of a folder that
/// training overwrites.
pub fn identity(config: &Config, model: &str, part: &'static str) -> Result<String, WeightsError> {
    match model.strip_prefix(ENDPOINT).map(|name| &config.endpoints[name]) {
        Some(e) => Ok(format!("{} {}", e.base_url, asked_model(e))),
        None => Ok(format!("{model} {}", ModelFiles::open(model, part)?.fingerprint())),
    }
}

/// What a configuration lets a program use.
pub fn limits(cfg: &config::Sandbox) -> Limits {
    let default = Limits::default();
    let memory_bytes = cfg.memory_mb << 20;
    Limits {
        seconds: cfg.seconds,
        memory_bytes,
        // As much beside the program's memory as by default.
        address_space: default.address_space - default.memory_bytes as u64 + memory_bytes as u64,
        host_calls: cfg.tool_calls,
        extended_tools: cfg.extended_tools,
        ..default
    }
}

/// Why there is no sandbox such as a configuration asks for.
#[derive(Debug, thiserror::Error)]
pub enum NoSandbox {
    #[error(transparent)]
    Python(#[from] PythonError),
    #[error("cannot start the sandbox: {0}")]
    Start(#[from] SandboxError),
}

/// Who runs programs by a configuration. Looks for a Python only where one is wanted.
///
/// # Errors
/// If there is none that will do.
pub fn executor(cfg: &config::Sandbox) -> Result<Executor, PythonError> {
    if !cfg.wants_python() {
        return Ok(Executor::Embedded);
    }
    let python = Python::find(&cfg.python, cfg.numpy)?;
    Ok(match (cfg.executor, cfg.fallback) {
        (ProgramExecutor::Cpython, _) => Executor::Cpython(python),
        (ProgramExecutor::Embedded, Fallback::Cpython) => Executor::Fallback(python),
        (ProgramExecutor::Embedded, Fallback::None) => Executor::Embedded,
    })
}

/// Starts the sandbox that a configuration asks for, and tells what of its jail is not to be had.
///
/// # Errors
/// If it cannot be had here; nothing weaker is started in its place.
pub fn sandbox(cfg: &config::Sandbox) -> Result<Sandbox, NoSandbox> {
    let sandbox = Sandbox::open(limits(cfg), executor(cfg)?, None)?;
    tell_missing(&sandbox);
    Ok(sandbox)
}

/// Tells, once in a process, which layers of the jail this machine lacks: who runs strangers' programs should
/// not have to ask `valor doctor`. The worker has said so as it started; nothing is started to ask.
pub fn tell_missing(sandbox: &Sandbox) {
    static TOLD: Once = Once::new();
    let layers = sandbox.layers();
    if !layers.complete() {
        TOLD.call_once(|| {
            notice!(
                "valor: this machine lacks layers of the programs' jail ({}); the interpreter's own limits and \
                 the worker's deadline hold",
                layers.missing()
            );
        });
    }
}

/// Why there is no program to run.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NoProgram {
    #[error("the planner gave no reply: {0}")]
    NoReply(ChatError),
    #[error("the planner's reply is malformed: {0}")]
    Malformed(#[from] ReplyError),
}

/// One answered question, or a failure; a failure is never an answer.
#[derive(Clone, Debug)]
pub struct Answered {
    /// The reply as it was read, irregularities flagged; `None` if it holds no program.
    pub reply: Option<Reply>,
    pub outcome: Result<Outcome, NoProgram>,
}

/// Runs the program of a planner's reply, read leniently (method.md 2), on a picture's tools.
pub fn answer(reply: &str, sandbox: &mut Sandbox, tools: &mut dyn Tools) -> Answered {
    match Reply::parse(reply) {
        Ok(reply) => {
            let outcome = sandbox.run(&reply.program, IMAGE, tools);
            Answered { reply: Some(reply), outcome: Ok(outcome) }
        }
        Err(e) => Answered { reply: None, outcome: Err(e.into()) },
    }
}

impl Answered {
    /// Where the planner gave no reply to read.
    pub fn without_reply(why: &ChatError) -> Self {
        Self { reply: None, outcome: Err(NoProgram::NoReply(why.clone())) }
    }

    /// The answer, if there is one.
    pub fn value(&self) -> Option<&Value> {
        self.outcome.as_ref().ok()?.result.as_ref().ok()
    }

    /// Why the program was not run at all, if it was not for want of a sandbox.
    pub fn unrun(&self) -> Option<String> {
        let error = self.outcome.as_ref().ok()?.result.as_ref().err()?;
        (error.kind == ErrorKind::NoSandbox).then(|| error.to_string())
    }

    /// Why there is no answer, for people and planners.
    pub fn why(&self) -> Option<String> {
        match &self.outcome {
            Err(e) => Some(e.to_string()),
            Ok(outcome) => outcome.result.as_ref().err().map(|e| format!("the program failed: {e}")),
        }
    }

    /// What kept the program from answering: an error kind of the sandbox, "malformed", or "planner"
    /// where there was no reply.
    pub fn failure(&self) -> Option<&'static str> {
        match &self.outcome {
            Err(NoProgram::NoReply(_)) => Some("planner"),
            Err(NoProgram::Malformed(_)) => Some("malformed"),
            Ok(Outcome { result: Err(e), .. }) => Some(e.kind.as_str()),
            Ok(_) => None,
        }
    }
}

/// One question to be answered, with the number of the tools that see its picture.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    pub question: &'a str,
    pub seed: u64,
    pub tools: usize,
}

/// How one reply of a planner went, after what repairs there were.
#[derive(Clone, Debug)]
pub struct Run {
    /// The reply whose program ran last; `None` if the planner gave none.
    pub reply: Option<ChatReply>,
    pub answered: Answered,
    /// Why a server, the planner's or a tool's, gave no reply, a tool's network failed, or nobody could run the
    /// program: what came of that is no result, and another time may have one.
    pub outage: Option<String>,
    /// What failed before, and was given back to the planner, with why.
    pub earlier: Vec<(String, String)>,
}

/// Answers questions together, one reply each; a program that fails goes back to the planner with its
/// error, at most `repairs` times. `progress` hears of each question that is through its first run.
///
/// # Errors
/// Of each question, if the planner's model failed on it: others may have been answered before, which is paid for.
/// A failed program is a result, and so is a question to which an endpoint gave no reply.
pub fn answer_all(
    planner: &Planner,
    sandbox: &mut Sandbox,
    asked: &[Asked],
    tools: &mut [impl Tools],
    repairs: usize,
    progress: impl FnMut(),
) -> Vec<Result<Run, ChatError>> {
    let questions: Vec<(&str, u64)> = asked.iter().map(|a| (a.question, a.seed)).collect();
    let replies = planner.ask(&questions, None);
    run_all(Some(planner), sandbox, asked, replies, tools, repairs, progress)
}

/// The same with the first replies given; without a planner nothing is repaired.
///
/// # Errors
/// As [`answer_all`].
pub fn run_all(
    planner: Option<&Planner>,
    sandbox: &mut Sandbox,
    asked: &[Asked],
    replies: Vec<Result<ChatReply, ChatError>>,
    tools: &mut [impl Tools],
    repairs: usize,
    mut progress: impl FnMut(),
) -> Vec<Result<Run, ChatError>> {
    let mut run = |reply: Result<ChatReply, ChatError>, tools: &mut dyn Tools| match reply {
        Ok(reply) => {
            let answered = answer(&reply.text, sandbox, tools);
            let outage = tools.outage().or_else(|| answered.unrun());
            Ok(Run { reply: Some(reply), answered, outage, earlier: Vec::new() })
        }
        Err(e) if e.is_of_model() => Err(e),
        Err(e) => {
            let outage = e.is_outage().then(|| e.to_string());
            Ok(Run { reply: None, answered: Answered::without_reply(&e), outage, earlier: Vec::new() })
        }
    };
    let mut runs = Vec::with_capacity(asked.len());
    for (a, reply) in asked.iter().zip(replies) {
        runs.push(run(reply, &mut tools[a.tools]));
        progress();
    }
    let Some(planner) = planner else { return runs };
    for _ in 0..repairs {
        let (failed, again): (Vec<usize>, Vec<Failed>) = runs
            .iter()
            .enumerate()
            .filter_map(|(i, run)| Some((i, run.as_ref().ok().filter(|run| run.is_to_repair())?)))
            .map(|(i, run)| {
                let failed = Failed {
                    question: asked[i].question,
                    seed: asked[i].seed,
                    reply: run.reply.as_ref().map_or("", |r| &r.text),
                    error: run.answered.why().unwrap_or_default(),
                };
                (i, failed)
            })
            .unzip();
        if failed.is_empty() {
            break;
        }
        for (i, reply) in failed.into_iter().zip(planner.ask_again(&again)) {
            let new = run(reply, &mut tools[asked[i].tools]);
            let Ok(old) = &mut runs[i] else { continue };
            match new {
                Ok(new) if new.reply.is_some() => {
                    let why = old.answered.why().unwrap_or_default();
                    let text = old.reply.take().map_or_else(String::new, |r| r.text);
                    let mut earlier = std::mem::take(&mut old.earlier);
                    earlier.push((text, why));
                    *old = Run { earlier, ..new };
                }
                // Where no reply came the first one is kept; if for a server's silence it is no result, and another
                // time may have one.
                Ok(new) => old.outage = new.outage,
                Err(e) => runs[i] = Err(e),
            }
        }
    }
    runs
}

impl Run {
    /// The answer, if there is one.
    pub fn value(&self) -> Option<&Value> {
        self.answered.value().filter(|_| self.outage.is_none())
    }

    /// Why there is no answer, for people.
    pub fn why(&self) -> Option<String> {
        match &self.outage {
            Some(why) => Some(format!("no result: {why}")),
            None => self.answered.why(),
        }
    }

    /// A program that a server's silence ended has nothing to mend.
    fn is_to_repair(&self) -> bool {
        self.reply.is_some() && self.outage.is_none() && self.answered.value().is_none()
    }
}

/// The planner's seed for one sample of a bench's question: mixed by SplitMix64's finaliser
/// (Steele et al. 2014), 53 bits, so that it survives any reader of JSON.
pub fn question_seed(seed: u64, question: usize, sample: usize) -> u64 {
    let mix = |z: u64| {
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
    let step = |state: u64, n: u64| mix(state.wrapping_add(GAMMA).wrapping_add(n.wrapping_mul(GAMMA)));
    step(step(mix(seed), question as u64), sample as u64) >> 11
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_differ_by_run_question_and_sample() {
        let mut all = Vec::new();
        for seed in 0..5 {
            for question in 0..40 {
                all.extend((0..5).map(|sample| question_seed(seed, question, sample)));
            }
        }
        let n = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), n);
        assert!(all.iter().all(|s| *s < 1 << 53));
    }
}
