//! Question → the planner's reply (method.md 2). The planner never sees the picture.
//!
//! The instructions stand in the user turn, followed by `\nQuestion: …`; they are the same for
//! every question, so the chat model computes their key-value cache once. What the reply holds
//! is read by [`crate::program`]; nothing here trusts it.

use crate::config;
use crate::llm::engine::EngineOptions;
use crate::llm::local::{LoadError, LocalChat};
use crate::llm::{ChatError, ChatModel, ChatReply, ChatRequest, SamplingOptions};
use crate::weights::ModelFiles;
use candle_core::Device;

/// The instructions that the embedded planner was trained with.
pub const ROOMS_PROMPT: &str = include_str!("../../data/prompts/planner-rooms.txt");

pub struct Planner {
    pub model: Box<dyn ChatModel>,
    /// Used byte for byte.
    pub prompt: String,
    pub sampling: SamplingOptions,
    pub max_new_tokens: usize,
}

/// Loads the model that a configuration names.
pub fn open(cfg: &config::Planner, device: &Device) -> Result<LocalChat, LoadError> {
    LocalChat::from_files(&ModelFiles::open(&cfg.model, "planner")?, device, EngineOptions::default())
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

impl Planner {
    /// Any chat model as the planner, with the instructions of Rooms.
    pub fn new(model: Box<dyn ChatModel>, cfg: &config::Planner) -> Self {
        Self {
            model,
            prompt: ROOMS_PROMPT.to_owned(),
            sampling: sampling(cfg),
            max_new_tokens: cfg.max_new_tokens,
        }
    }

    /// One reply a question; each has a seed of its own, so a reply does not depend on what else is
    /// asked in the same call.
    pub fn ask(
        &self,
        questions: &[(&str, u64)],
        on_token: Option<&mut dyn FnMut(usize, &str)>,
    ) -> Result<Vec<ChatReply>, ChatError> {
        let request = |&(q, seed): &(&str, u64)| {
            ChatRequest::user(user_turn(&self.prompt, q), seed, self.max_new_tokens)
        };
        let requests: Vec<_> = questions.iter().map(request).collect();
        self.model.chat(&requests, &self.sampling, on_token)
    }
}
