//! From six heads to a reward (method.md 3):
//! R = format · (w_syntax·syntax + w_logic·logic + w_attribute·attribute + w_spatial·spatial + w_adherence·adherence).

use std::collections::BTreeMap;

use serde::Serialize;

use super::judge::{Ask, Judge, JudgeError, Verdict};
use crate::config::{self, Head};
use crate::program::{ErrorKind, IMAGE, Reply, Sandbox, check};
use crate::tools::stub::StubTools;

/// All heads on one reply.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scored {
    pub format: bool,
    /// Why the format is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format_error: Option<String>,
    pub syntax: bool,
    /// Why the syntax is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub syntax_error: Option<String>,
    /// Why the program could not be run here, whatever it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unrun: Option<String>,
    /// Those that were asked.
    pub heads: BTreeMap<Head, Verdict>,
    /// `None` where a verdict that counts is missing, or the program could not be run.
    pub reward: Option<f64>,
}

impl Scored {
    /// Why the reward is missing, which it may not be another time: a server kept silent, or there was no sandbox.
    pub fn silence(&self) -> Option<&str> {
        let silent = self.heads.values().find(|v| v.silent).map(|v| v.said.as_str());
        silent.or(self.unrun.as_deref())
    }
}

/// The heads with their weights.
pub struct Verification<'a> {
    pub judge: &'a Judge,
    pub weights: &'a config::Reward,
}

impl Verification<'_> {
    /// Scores replies `(question, reply)`. Programs run on stubs in `sandbox`, whose limits bound an endless
    /// loop or a memory bomb to that reply's syntax head.
    pub fn score(
        &self,
        cases: &[(&str, &str)],
        sandbox: &mut Sandbox,
        progress: impl FnMut(usize),
    ) -> Result<Vec<Scored>, JudgeError> {
        let w = self.weights;
        let read: Vec<_> = cases
            .iter()
            .map(|(_, text)| {
                let strict = Reply::parse_strict(text);
                let format_error = strict.as_ref().err().map(ToString::to_string);
                // Without the format head's word a reply of another form can still earn.
                let reply = if w.format { strict.ok() } else { Reply::parse(text).ok() };
                (format_error, reply)
            })
            .collect();
        let asked = |head: &Head| weight(self.weights, *head) > 0.;
        let mut asks = Vec::new();
        for ((question, _), (_, reply)) in cases.iter().zip(&read) {
            let Some(reply) = reply else { continue };
            let (plan, program) = (reply.plan.as_deref().unwrap_or(""), reply.program.as_str());
            asks.extend(Head::ALL.into_iter().filter(asked).map(|head| Ask {
                head,
                question,
                plan,
                program,
            }));
        }
        let mut verdicts = self.judge.verdicts(&asks, progress)?.into_iter();
        let score = |(format_error, reply): (Option<String>, Option<Reply>)| {
            let format = format_error.is_none();
            let Some(reply) = reply else {
                let heads = BTreeMap::new();
                return Scored {
                    format,
                    format_error,
                    syntax: false,
                    syntax_error: None,
                    unrun: None,
                    heads,
                    reward: Some(0.),
                };
            };
            let (syntax_error, unrun) = match syntax_error(&reply.program, sandbox) {
                Ok(error) => (error, None),
                Err(why) => (None, Some(why)),
            };
            let syntax = syntax_error.is_none() && unrun.is_none();
            let heads: BTreeMap<Head, Verdict> =
                Head::ALL.into_iter().filter(asked).zip(verdicts.by_ref()).collect();
            let mut reward = unrun.is_none().then_some(if syntax { w.syntax } else { 0. });
            for (head, verdict) in &heads {
                let earned = verdict.ok.map(|ok| if ok { weight(w, *head) } else { 0. });
                reward = reward.zip(earned).map(|(r, e)| r + e);
            }
            Scored { format, format_error, syntax, syntax_error, unrun, heads, reward }
        };
        Ok(read.into_iter().map(score).collect())
    }
}

/// What a head counts in the reward.
pub fn weight(weights: &config::Reward, head: Head) -> f64 {
    match head {
        Head::Logic => weights.logic,
        Head::Attribute => weights.attribute,
        Head::Spatial => weights.spatial,
        Head::Adherence => weights.adherence,
    }
}

/// The syntax head: runs to the end on stubs, sets `final_answer`, leaves `img_pth` alone. Why not, if not.
///
/// # Errors
/// If it could not be run here.
fn syntax_error(program: &str, sandbox: &mut Sandbox) -> Result<Option<String>, String> {
    if let Ok(checked) = check::check(program)
        && let Some(line) = checked.img_pth_changed.first()
    {
        return Ok(Some(format!("img_pth is changed on line {line}")));
    }
    match sandbox.run(program, IMAGE, &mut StubTools).result {
        Ok(_) => Ok(None),
        Err(e) if e.kind == ErrorKind::NoSandbox => Err(e.to_string()),
        Err(e) => Ok(Some(e.to_string())),
    }
}
