//! The four heads that a language model decides.

use std::collections::HashMap;
use std::sync::Arc;

use serde::Serialize;

use super::cache::VerdictCache;
use super::head::{parse_verdict, prompt, user_turn};
use crate::config::{self, ConfigError, Head};
use crate::llm::endpoint::Usage;
use crate::llm::{ChatError, ChatModel, ChatReply, ChatRequest, SamplingOptions};

/// One question to a verifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ask<'a> {
    pub head: Head,
    pub question: &'a str,
    pub plan: &'a str,
    pub program: &'a str,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// `None`: missing.
    pub ok: Option<bool>,
    /// The verifier's reply, or why there is none; nothing where the verdict is an old one.
    pub said: String,
    /// Was it a server's silence, so that there may be one another time?
    #[serde(skip)]
    pub silent: bool,
}

/// A language model as a judge.
pub struct Judge {
    model: Arc<dyn ChatModel>,
    prompts: HashMap<Head, String>,
    max_new_tokens: usize,
    cache: VerdictCache,
}

#[derive(Debug, thiserror::Error)]
pub enum JudgeError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("the cache of verdicts: {0}")]
    Cache(#[from] std::io::Error),
    #[error("the verifier failed: {0}")]
    Model(#[from] ChatError),
}

/// What an unreadable reply is asked for again with: the most likely reply would be the same.
const SECOND: f64 = 0.7;

/// The setting that names a verifier's cache.
const CACHE: &str = "verifier.cache";

fn prompts(cfg: &config::Verifier) -> Result<HashMap<Head, String>, ConfigError> {
    Head::ALL.into_iter().map(|h| Ok((h, prompt(&cfg.prompts, h)?))).collect()
}

/// That a verifier's prompts and cache will do, before its model is loaded.
pub fn check_files(cfg: &config::Verifier) -> Result<(), JudgeError> {
    prompts(cfg)?;
    VerdictCache::check(&cfg.cache, CACHE)?;
    Ok(())
}

/// A hash of a verifier's instructions, for records.
///
/// # Errors
/// If they are files that cannot be read.
pub fn prompts_sha256(cfg: &config::Verifier) -> Result<String, ConfigError> {
    let prompts = prompts(cfg)?;
    let texts: Vec<&str> = Head::ALL.iter().map(|head| prompts[head].as_str()).collect();
    Ok(VerdictCache::key(&texts))
}

impl Judge {
    pub fn new(model: Arc<dyn ChatModel>, cfg: &config::Verifier) -> Result<Self, JudgeError> {
        let prompts = prompts(cfg)?;
        let cache = VerdictCache::open(&cfg.cache, CACHE)?;
        Ok(Self { model, prompts, max_new_tokens: cfg.max_new_tokens, cache })
    }

    pub fn name(&self) -> &str {
        self.model.name()
    }

    /// What its calls have cost so far, where calls cost anything.
    pub fn usage(&self) -> Option<Usage> {
        self.model.usage()
    }

    /// A verdict on each, in their order; what is the same is asked once. `progress` hears how many more
    /// are decided.
    ///
    /// # Errors
    /// If the verifier will answer nothing any more, or the cache cannot be written; a reply that cannot
    /// be had or read is a missing verdict.
    pub fn verdicts(
        &self,
        asks: &[Ask],
        mut progress: impl FnMut(usize),
    ) -> Result<Vec<Verdict>, JudgeError> {
        let identity = self.model.identity();
        let key = |a: &Ask| {
            // What a head does not see does not count.
            let (question, program) = match a.head {
                Head::Adherence => ("", a.program),
                _ => (a.question, ""),
            };
            VerdictCache::key(&[a.head.word(), &identity, &self.prompts[&a.head], question, a.plan, program])
        };
        let keys: Vec<String> = asks.iter().map(key).collect();
        let mut decided: HashMap<&str, Verdict> = HashMap::new();
        let mut open: Vec<usize> = Vec::new();
        for (i, key) in keys.iter().enumerate() {
            if decided.contains_key(key.as_str()) {
                continue;
            }
            let old = self.cache.get(key);
            if old.is_none() {
                open.push(i);
            }
            decided.insert(key, Verdict { ok: old, said: String::new(), silent: false });
        }
        progress(asks.len() - open.len());
        let request = |i: usize, seed: u64| {
            let a = &asks[i];
            let turn = user_turn(a.head, &self.prompts[&a.head], a.question, a.plan, a.program);
            ChatRequest::user(turn, seed, self.max_new_tokens)
        };
        let (open, gone) = in_two_rounds(&*self.model, open, request, |i, reply| {
            let silent = reply.as_ref().is_err_and(ChatError::is_outage);
            let (ok, said) = match reply {
                Ok(reply) => (parse_verdict(&reply.text), reply.text),
                Err(e) => (None, e.to_string()),
            };
            if let Some(ok) = ok {
                self.cache.put(&keys[i], ok)?;
                progress(1);
            }
            decided.insert(&keys[i], Verdict { ok, said, silent });
            Ok(ok.is_some())
        })?;
        if let Some(e) = gone {
            return Err(e.into());
        }
        progress(open.len());
        Ok(keys.iter().map(|key| decided[key.as_str()].clone()).collect())
    }
}

/// Asks about what is open, twice at most; `hear` tells whether a reply decides. The most likely reply counts, also where
/// a server kept silent at first; of one that cannot be read another is drawn, for it would be the same again. What is
/// open still, and where the model answers nothing any more, why: what it said before has been heard.
pub(super) fn in_two_rounds(
    model: &dyn ChatModel,
    open: Vec<usize>,
    request: impl Fn(usize, u64) -> ChatRequest,
    mut hear: impl FnMut(usize, Result<ChatReply, ChatError>) -> Result<bool, JudgeError>,
) -> Result<(Vec<usize>, Option<ChatError>), JudgeError> {
    let mut rounds = vec![(open, SamplingOptions::greedy(), 0)];
    for _ in 0..2 {
        let (mut silenced, mut unread) = (Vec::new(), Vec::new());
        for (open, options, seed) in rounds.drain(..).filter(|(open, ..)| !open.is_empty()) {
            let requests: Vec<ChatRequest> = open.iter().map(|&i| request(i, seed)).collect();
            let mut gone = None;
            for (&i, reply) in open.iter().zip(model.chat(&requests, &options, None)) {
                let silent = reply.as_ref().is_err_and(ChatError::is_outage);
                match reply {
                    Err(e) if e.is_of_model() => {
                        gone.get_or_insert(e);
                    }
                    reply => match hear(i, reply)? {
                        true => {}
                        false if silent => silenced.push(i),
                        false => unread.push(i),
                    },
                }
            }
            if gone.is_some() {
                return Ok((unread, gone));
            }
        }
        rounds =
            vec![(silenced, SamplingOptions::greedy(), 0), (unread, SamplingOptions::temperature(SECOND), 1)];
    }
    Ok((rounds.into_iter().flat_map(|(open, ..)| open).collect(), None))
}
