//! One measured question, as it stands in a run's `samples.jsonl`.
//!
//! A record holds nothing that differs between two runs of the same settings: no times, no places. So
//! a run that was killed and went on ends with the same bytes as one that was not.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::metric::Judged;
use crate::data::Kind;
use crate::pipeline::Answered;
use crate::program::Flag;

/// Whose fault a wrong answer is, as far as that can be told without a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// The planner gave no reply.
    Planner,
    /// The program failed, used no tool, or is wrong on exact tools.
    Program,
    /// A tool found nothing or failed; or the program is right on exact tools; or there is no program.
    Perception,
    /// No verdict, or the two forms of the metric disagree.
    Judge,
    /// Everything ran and the answer is wrong: the trace has to be looked at.
    Open,
}

impl Fault {
    pub fn word(self) -> &'static str {
        match self {
            Self::Planner => "planner",
            Self::Program => "program",
            Self::Perception => "perception",
            Self::Judge => "judge",
            Self::Open => "program or perception",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub bench: String,
    pub index: usize,
    /// The part of the bench that is reported by itself.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub part: String,
    /// The same for questions about one picture: intervals are clustered by it.
    pub picture: String,
    pub question: String,
    pub kind: Kind,
    pub truth: Value,
    /// An earlier row that asks the same about the same picture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duplicate_of: Option<usize>,
    /// `None` where there is none.
    pub answer: Option<Value>,
    /// What kept the method from answering: [`REFUSED`] or [`NO_REPLY`] for a row that was not measured, else
    /// a kind of the sandbox's errors, "malformed", "planner", or "vlm".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Scores from 0 to 1; `None` where missing.
    pub reference: Option<f64>,
    pub strict: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judged: Option<Judged>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<Fault>,
    /// A detector's call gave no box.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub nothing_detected: bool,
    /// Width and height, pixels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<(u32, u32)>,
    /// The planner's seed of the reply that counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply: Option<String>,
    /// The reply ended at its limit on tokens.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cut: bool,
    /// Where the reply was read although it is not of the form asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flags: Vec<Flag>,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub repairs: usize,
    /// The tools' calls with what they gave, without their times.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub calls: Vec<Value>,
    /// Line of the program at which it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// The file of records in a run's folder.
pub const SAMPLES: &str = "samples.jsonl";

/// The failure of rows that are no question, or whose picture cannot be had.
pub const REFUSED: &str = "refused";

/// The failure of rows for which a server gave no reply; the same command asks again.
pub const NO_REPLY: &str = "no-reply";

impl Record {
    /// What a run of a program has to tell.
    pub fn set_outcome(&mut self, run: &Answered) {
        self.answer = run.value().cloned();
        self.failure = run.failure().map(str::to_owned);
        self.why = run.why();
        self.flags = run.reply.as_ref().map_or_else(Vec::new, |r| r.flags.clone());
        let Ok(outcome) = &run.outcome else { return };
        self.line = outcome.result.as_ref().err().and_then(|e| e.line);
        for call in &outcome.calls {
            let mut call = serde_json::to_value(call).expect("a call is plain data");
            let map = call.as_object_mut().expect("a struct");
            map.remove("seconds");
            self.nothing_detected |= map["tool"] == "gd_detect"
                && map.get("value").and_then(Value::as_array).is_some_and(Vec::is_empty);
            self.calls.push(call);
        }
    }

    /// Where both forms are one.
    pub fn set_score(&mut self, right: bool) {
        let score = Some(f64::from(u8::from(right)));
        (self.reference, self.strict) = (score, score);
    }

    /// Was the method measured on it? A row without a picture that can be read was not.
    pub fn is_measured(&self) -> bool {
        !matches!(self.failure.as_deref(), Some(REFUSED | NO_REPLY))
    }

    /// That a server gave no reply.
    pub fn set_outage(&mut self, why: String) {
        self.failure = Some(NO_REPLY.into());
        self.why = Some(why);
        self.answer = None;
    }

    /// Is something missing that the same run may have another time: a server's reply, or a verdict?
    pub fn is_open(&self) -> bool {
        self.failure.as_deref() == Some(NO_REPLY) || self.judged == Some(Judged::Missing)
    }

    pub fn is_right(&self) -> bool {
        self.strict.is_some_and(|s| s >= 0.5)
    }

    /// Whose fault it is that an answer is not right; after the scores.
    pub fn blame(&self, program_is_right: Option<bool>) -> Option<Fault> {
        if !self.is_measured() || self.is_right() {
            return None;
        }
        let tool_failed = |c: &Value| c.get("error").is_some();
        let ended_by_tool = self.calls.last().is_some_and(tool_failed);
        Some(match self.failure.as_deref() {
            Some("planner") => Fault::Planner,
            Some("vlm") => Fault::Perception,
            Some("error") if ended_by_tool => Fault::Perception,
            Some(_) => Fault::Program,
            None if self.strict.is_none() || self.reference.is_some_and(|r| r >= 0.5) => Fault::Judge,
            None => match program_is_right {
                Some(true) => Fault::Perception,
                Some(false) => Fault::Program,
                None if self.nothing_detected || self.calls.iter().any(tool_failed) => Fault::Perception,
                // A VLM that was asked alone has no program.
                None if self.reply.is_none() => Fault::Perception,
                None if self.calls.is_empty() => Fault::Program,
                None => Fault::Open,
            },
        })
    }
}

/// Hears each line of a file in turn, such as a [`Record`]; memory holds one.
///
/// # Errors
/// A file that cannot be read, or a line that is of another form.
pub fn each<T: DeserializeOwned>(path: &Path, mut hear: impl FnMut(T) -> Result<()>) -> Result<()> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    for (line, number) in BufReader::new(file).lines().zip(1..) {
        let line = line.with_context(|| path.display().to_string())?;
        let record = serde_json::from_str(&line)
            .with_context(|| format!("{}, line {number}: is no line of a run", path.display()))?;
        hear(record)?;
    }
    Ok(())
}
