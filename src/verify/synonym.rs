//! Do two answers mean the same? Asked of a language model, as GQA is scored (method.md 8).
//!
//! Answers are a stranger's text and stand between tags that they cannot forge; verdicts are kept like
//! those of the heads. What cannot be had or read is missing, never a no.

use std::sync::Arc;

use super::cache::VerdictCache;
use super::head::{enclosed, parse_verdict};
use super::judge::{JudgeError, in_two_rounds};
use crate::config;
use crate::llm::{ChatError, ChatModel, ChatRequest};

/// What the judge is told.
const PROMPT: &str = include_str!("../../data/prompts/judge-synonym.txt");

/// A language model that compares answers.
pub struct SynonymJudge {
    model: Arc<dyn ChatModel>,
    max_new_tokens: usize,
    cache: VerdictCache,
}

/// What came of asking the judge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// Whether the two answers mean the same.
    Same(bool),
    /// Nothing that can be read; asked the same again it would be the same.
    Unreadable,
    /// Nothing.
    Silent,
}

/// A question with its right answer and the one that was given.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'a> {
    pub question: &'a str,
    pub truth: &'a str,
    pub given: &'a str,
}

impl SynonymJudge {
    pub fn new(model: Arc<dyn ChatModel>, cfg: &config::AnswerJudge) -> Result<Self, JudgeError> {
        let cache = VerdictCache::open(&cfg.cache, "eval.judge.cache")?;
        Ok(Self { model, max_new_tokens: cfg.max_new_tokens, cache })
    }

    pub fn identity(&self) -> String {
        self.model.identity()
    }

    /// A verdict on each. Where the judge will answer nothing any more, also why; what it decided before is paid for,
    /// and among them.
    ///
    /// # Errors
    /// If the cache cannot be written.
    pub fn verdicts(&self, pairs: &[Pair]) -> Result<(Vec<Said>, Option<ChatError>), JudgeError> {
        let identity = self.model.identity();
        let key = |p: &Pair| VerdictCache::key(&["synonym", &identity, PROMPT, p.question, p.truth, p.given]);
        let keys: Vec<String> = pairs.iter().map(key).collect();
        let mut verdicts: Vec<Said> =
            keys.iter().map(|k| self.cache.get(k).map_or(Said::Silent, Said::Same)).collect();
        let open: Vec<usize> = (0..pairs.len()).filter(|&i| verdicts[i] == Said::Silent).collect();
        let request = |i: usize, seed: u64| {
            let Pair { question, truth, given } = pairs[i];
            let parts =
                [("question", question), ("truth", truth), ("given", given)].map(|(t, x)| enclosed(t, x));
            ChatRequest::user(format!("{PROMPT}\n{}", parts.join("\n")), seed, self.max_new_tokens)
        };
        let (_, gone) = in_two_rounds(&*self.model, open, request, |i, reply| {
            let silent = reply.as_ref().is_err_and(ChatError::is_outage);
            let same = reply.ok().and_then(|reply| parse_verdict(&reply.text));
            if let Some(same) = same {
                self.cache.put(&keys[i], same)?;
            }
            verdicts[i] = same.map_or(if silent { Said::Silent } else { Said::Unreadable }, Said::Same);
            Ok(same.is_some())
        })?;
        Ok((verdicts, gone))
    }
}
