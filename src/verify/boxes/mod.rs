//! Verification of a detector's boxes without labels, in three stages (method.md 5.3): is it one of
//! these at all (*coarse*), does the box frame it (*crop*), is it marked twice (*dedupe*).
//!
//! By pass, as in the paper: the verifier sees the picture clean and with numbered boxes and parts the
//! numbers into keep and drop; by box, for small models: one question a box, and one for each pair
//! that may be one thing. What it says is a stranger's text: replies are checked, those of no use are
//! asked for again, and a box about which nothing of use was said is dropped, since precision wins. A
//! verifier that cannot be reached decides nothing: the picture stays unverified ([`Unverified`]).

mod ask;
mod pass;
pub mod show;
mod single;

pub use ask::{Question, parse, worded};

use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

use crate::config::{self, ConfigError, Granularity};
use crate::llm::endpoint::Usage;
use crate::llm::{ChatError, ChatModel, ChatReply, ChatRequest, Message, SamplingOptions};
use crate::sight::{Detection, Picture};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    Coarse,
    Crop,
    Dedupe,
}

impl Stage {
    pub const ALL: [Self; 3] = [Self::Coarse, Self::Crop, Self::Dedupe];

    pub fn word(self) -> &'static str {
        match self {
            Self::Coarse => "coarse",
            Self::Crop => "crop",
            Self::Dedupe => "dedupe",
        }
    }
}

/// What became of a box.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// The stage that dropped it; `None`: kept.
    pub dropped: Option<Stage>,
    /// Dropped since nothing certain was said: nothing readable, or a hesitant yes.
    pub unsure: bool,
    /// What was said, last of all, for people.
    pub reason: String,
}

/// Why a picture's boxes could not be judged.
pub type Unverified = String;

/// A picture and what was detected in it.
#[derive(Clone, Copy)]
pub struct Case<'a> {
    pub picture: &'a Picture,
    pub boxes: &'a [Detection],
}

/// A model that sees, as a judge of boxes.
pub struct BoxJudge {
    model: Arc<dyn ChatModel>,
    granularity: Granularity,
    prompts: Prompts,
    side: u32,
    max_new_tokens: usize,
    confidence: f64,
}

/// The texts of a granularity's three stages, and of denials.
struct Prompts {
    stages: [String; 3],
    absent: String,
}

/// Times that a reply is asked for.
const TRIES: usize = 3;
/// What a reply of no use is asked for again with: the most likely one would be the same.
const SECOND: f64 = 0.7;

/// That a verifier's prompts are there, before its model is loaded.
pub fn check_prompts(cfg: &config::Mining) -> Result<(), ConfigError> {
    Prompts::open(cfg).map(|_| ())
}

impl Prompts {
    fn open(cfg: &config::Mining) -> Result<Self, ConfigError> {
        let prompt = |file: &str, shipped: &str| match cfg.prompts.as_str() {
            "" => Ok(shipped.to_owned()),
            folder => {
                let path = Path::new(folder).join(file);
                std::fs::read_to_string(&path).map_err(|e| ConfigError::Invalid {
                    origin: "grounding.mining.prompts".into(),
                    message: format!("{}: {e}; give a folder that holds it, or \"\"", path.display()),
                })
            }
        };
        let question = |q: Question| prompt(q.file(), q.default_prompt());
        let stages = match cfg.granularity {
            Granularity::Box => {
                [question(Question::Shows)?, question(Question::Frames)?, question(Question::Same)?]
            }
            Granularity::Pass => [
                prompt("boxes-coarse.txt", include_str!("../../../data/prompts/boxes-coarse.txt"))?,
                prompt("boxes-crop.txt", include_str!("../../../data/prompts/boxes-crop.txt"))?,
                prompt("boxes-dedupe.txt", include_str!("../../../data/prompts/boxes-dedupe.txt"))?,
            ],
            Granularity::None => Default::default(),
        };
        let absent = prompt("boxes-absent.txt", include_str!("../../../data/prompts/boxes-absent.txt"))?;
        Ok(Self { stages, absent })
    }
}

impl BoxJudge {
    pub fn new(model: Arc<dyn ChatModel>, cfg: &config::Mining) -> Result<Self, ConfigError> {
        let prompts = Prompts::open(cfg)?;
        Ok(Self {
            model,
            granularity: cfg.granularity,
            prompts,
            side: cfg.side,
            max_new_tokens: cfg.max_new_tokens,
            confidence: cfg.confidence,
        })
    }

    pub fn name(&self) -> &str {
        self.model.name()
    }

    /// What its calls have cost so far, where calls cost anything.
    pub fn usage(&self) -> Option<Usage> {
        self.model.usage()
    }

    /// What decides its verdicts, for records: model, granularity, texts.
    pub fn identity(&self) -> serde_json::Value {
        serde_json::json!({
            "model": self.model.identity(), "granularity": self.granularity, "side": self.side,
            "max_new_tokens": self.max_new_tokens, "confidence": self.confidence,
            "prompts": self.prompts.stages, "absent": self.prompts.absent,
        })
    }

    /// Is each noun missing from its whole picture? `None` where that could not be said; a yes is a guess more
    /// often than a no, so only a no counts.
    ///
    /// # Errors
    /// If the verifier will answer nothing any more.
    pub fn deny(
        &self,
        asked: &[(&Picture, &str)],
    ) -> Result<Vec<Result<Option<bool>, Unverified>>, ChatError> {
        let request = |(picture, noun): &(&Picture, &str)| {
            let message =
                Message::user(worded(&self.prompts.absent, noun)).with_images(vec![picture.to_image()]);
            ChatRequest { messages: vec![message], ..ChatRequest::user("", 0, self.max_new_tokens) }
        };
        self.ask(asked.iter().map(request).collect(), |_, said| parse(&said.text).map(|there| !there))
    }

    /// A decision on each box of each picture, in their order.
    ///
    /// # Errors
    /// If the verifier will answer nothing any more.
    pub fn judge(&self, cases: &[Case]) -> Result<Vec<Result<Vec<Decision>, Unverified>>, ChatError> {
        let mut open: Vec<Open> = cases.iter().map(|c| Open::new(*c)).collect();
        match self.granularity {
            Granularity::Box => single::judge(self, &mut open)?,
            Granularity::Pass => pass::judge(self, &mut open)?,
            Granularity::None => {}
        }
        Ok(open.into_iter().map(Open::finish).collect())
    }

    /// Asks, and asks again what `read` makes nothing of: `None` in the end where no reply was of use,
    /// an error where none could be had.
    fn ask<T>(
        &self,
        requests: Vec<ChatRequest>,
        read: impl Fn(usize, &Said) -> Option<T>,
    ) -> Result<Vec<Result<Option<T>, Unverified>>, ChatError> {
        let mut out: Vec<Result<Option<T>, Unverified>> = requests.iter().map(|_| Ok(None)).collect();
        let mut open: Vec<usize> = (0..requests.len()).collect();
        for round in 0..TRIES {
            if open.is_empty() {
                break;
            }
            let mut opts = match round {
                0 => SamplingOptions::greedy(),
                _ => SamplingOptions::temperature(SECOND),
            };
            opts.trace = true;
            let again: Vec<ChatRequest> = open
                .iter()
                .map(|&i| ChatRequest { seed: requests[i].seed + round as u64, ..requests[i].clone() })
                .collect();
            let mut unread = Vec::new();
            for (&i, reply) in open.iter().zip(self.model.chat(&again, &opts, None)) {
                match reply {
                    Ok(reply) => match read(i, &Said::new(reply)) {
                        Some(value) => out[i] = Ok(Some(value)),
                        None => {
                            out[i] = Ok(None);
                            unread.push(i);
                        }
                    },
                    // Nor will it ever answer what it cannot be asked.
                    Err(ChatError::Request(_)) => out[i] = Ok(None),
                    Err(ChatError::Misfit(_)) => {
                        out[i] = Ok(None);
                        unread.push(i);
                    }
                    Err(e) if e.is_of_model() => return Err(e),
                    Err(e) => out[i] = Err(e.to_string()),
                }
            }
            open = unread;
        }
        Ok(out)
    }
}

/// A reply, and how sure of its first token the model was, where it can tell.
struct Said {
    text: String,
    confidence: Option<f64>,
}

impl Said {
    fn new(reply: ChatReply) -> Self {
        let first = reply.trace.and_then(|t| t.log_probs.first().copied());
        Self { text: reply.text, confidence: first.map(|lp| f64::from(lp).exp()) }
    }
}

/// A picture under judgement.
struct Open<'a> {
    case: Case<'a>,
    decisions: Vec<Decision>,
    unverified: Option<Unverified>,
}

impl<'a> Open<'a> {
    fn new(case: Case<'a>) -> Self {
        let kept = Decision { dropped: None, unsure: false, reason: String::new() };
        Self { case, decisions: vec![kept; case.boxes.len()], unverified: None }
    }

    /// Boxes that nothing has dropped, unless the picture cannot be judged.
    fn kept(&self) -> Vec<usize> {
        match self.unverified {
            Some(_) => Vec::new(),
            None => (0..self.decisions.len()).filter(|&i| self.decisions[i].dropped.is_none()).collect(),
        }
    }

    fn decide(&mut self, i: usize, stage: Stage, keep: bool, reason: impl Into<String>) {
        self.decisions[i] =
            Decision { dropped: (!keep).then_some(stage), unsure: false, reason: reason.into() };
    }

    /// Drops a box of which nothing certain was said.
    fn doubt(&mut self, i: usize, stage: Stage, reason: impl Into<String>) {
        self.decisions[i] = Decision { dropped: Some(stage), unsure: true, reason: reason.into() };
    }

    fn finish(self) -> Result<Vec<Decision>, Unverified> {
        match self.unverified {
            Some(why) => Err(why),
            None => Ok(self.decisions),
        }
    }
}

/// What is said of a box about which nothing of use was said.
const UNREADABLE: &str = "no readable verdict";

#[cfg(test)]
mod tests;
