//! Replies that a planner wrote, kept: a run that only planned writes them, later ones execute them.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::feed::Task;
use super::record::each;
use crate::llm::{ChatError, ChatReply, Finish};

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

    pub(super) fn of(&self, task: &Task) -> Result<Vec<Result<ChatReply, ChatError>>> {
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
