//! Question → the planner's reply (method.md 2). The planner never sees the picture.
//!
//! The instructions stand in the user turn, followed by `\nQuestion: …`; they are the same for
//! every question, so the chat model computes their key-value cache once. What the reply holds
//! is read by [`crate::program`]; nothing here trusts it.

use crate::config::{self, Config, ConfigError};
use crate::llm::{ChatError, ChatModel, ChatReply, ChatRequest, Message, SamplingOptions};
use std::sync::Arc;

/// The instructions that the embedded planner was trained with.
pub const ROOMS_PROMPT: &str = include_str!("../../data/prompts/planner-rooms.txt");

/// Instructions for planners that were not trained on any of ours, with the tools, the conventions of
/// method.md 2 and examples.
pub const GENERAL_PROMPT: &str = include_str!("../../data/prompts/planner-general.txt");

/// What tells of the extended tools, where programs may call them.
pub const EXTENDED_TOOLS: &str = include_str!("../../data/prompts/planner-extended-tools.txt");

/// The instructions that a configuration names.
pub fn prompt(cfg: &Config) -> Result<String, ConfigError> {
    let extended = cfg.sandbox.extended_tools;
    match cfg.planner.prompt.as_str() {
        // Told of more tools, that planner got none of 1,000 questions right.
        "rooms" if extended => Err(ConfigError::Invalid {
            origin: "sandbox.extended_tools".into(),
            message:
                "the instructions \"rooms\" are those that the embedded planner was trained with, and it \
                      understands no others; choose another planner.model, with planner.prompt = \"general\""
                    .into(),
        }),
        "rooms" => Ok(ROOMS_PROMPT.to_owned()),
        "general" if extended => {
            let (before, after) = GENERAL_PROMPT.split_once(AFTER_TOOLS).unwrap_or((GENERAL_PROMPT, ""));
            Ok(format!("{before}{EXTENDED_TOOLS}{AFTER_TOOLS}{after}"))
        }
        "general" => Ok(GENERAL_PROMPT.to_owned()),
        file => std::fs::read_to_string(file).map_err(|e| ConfigError::Invalid {
            origin: "planner.prompt".into(),
            message: format!("{file}: {e}; give a file, or one of rooms and general"),
        }),
    }
}

/// Where the general instructions have named all tools.
const AFTER_TOOLS: &str = "- `math`";

pub struct Planner {
    pub model: Arc<dyn ChatModel>,
    /// Used byte for byte.
    pub prompt: String,
    pub sampling: SamplingOptions,
    pub max_new_tokens: usize,
}

/// How a configuration samples: no limit where it says 0 or 1.
pub fn sampling(cfg: &config::Planner) -> SamplingOptions {
    SamplingOptions {
        temperature: cfg.temperature,
        top_k: (cfg.top_k > 0).then_some(cfg.top_k),
        top_p: (cfg.top_p > 0. && cfg.top_p < 1.).then_some(cfg.top_p),
        trace: false,
    }
}

/// The user turn for one question.
pub fn user_turn(prompt: &str, question: &str) -> String {
    format!("{prompt}\nQuestion: {question}")
}

/// A question whose program failed.
#[derive(Clone, Debug)]
pub struct Failed<'a> {
    pub question: &'a str,
    pub seed: u64,
    pub reply: &'a str,
    /// With the line of the program, where there is one.
    pub error: String,
}

impl Planner {
    /// Any chat model as the planner.
    pub fn new(model: Arc<dyn ChatModel>, cfg: &Config) -> Result<Self, ConfigError> {
        let (prompt, cfg) = (prompt(cfg)?, &cfg.planner);
        Ok(Self { model, prompt, sampling: sampling(cfg), max_new_tokens: cfg.max_new_tokens })
    }

    /// One reply a question; each has a seed of its own, so a reply does not depend on what else is
    /// asked in the same call.
    pub fn ask(
        &self,
        questions: &[(&str, u64)],
        on_token: Option<&mut dyn FnMut(usize, &str)>,
    ) -> Vec<Result<ChatReply, ChatError>> {
        let request = |&(q, seed): &(&str, u64)| {
            ChatRequest::user(user_turn(&self.prompt, q), seed, self.max_new_tokens)
        };
        let requests: Vec<_> = questions.iter().map(request).collect();
        self.model.chat(&requests, &self.sampling, on_token)
    }

    /// One more reply to each question whose program failed, its own reply and the error before it.
    pub fn ask_again(&self, failed: &[Failed]) -> Vec<Result<ChatReply, ChatError>> {
        let request = |f: &Failed| ChatRequest {
            messages: vec![
                Message::user(user_turn(&self.prompt, f.question)),
                Message::assistant(f.reply),
                Message::user(format!(
                    "The program failed: {}\nWrite the whole reply again, plan and program, without this error.",
                    f.error
                )),
            ],
            ..ChatRequest::user("", f.seed, self.max_new_tokens)
        };
        self.model.chat(&failed.iter().map(request).collect::<Vec<_>>(), &self.sampling, None)
    }
}
