//! Question → the planner's reply (method.md 2). The planner never sees the picture.
//!
//! The instructions stand in the user turn, followed by `\nQuestion: …`; they are the same for
//! every question, so the chat model computes their key-value cache once. What the reply holds
//! is read by [`crate::program`]; nothing here trusts it.

use crate::llm::{ChatError, ChatModel, ChatReply, ChatRequest, SamplingOptions};

/// The instructions that the embedded planner was trained with.
pub const ROOMS_PROMPT: &str = include_str!("../../data/prompts/planner-rooms.txt");

pub struct Planner {
    pub model: Box<dyn ChatModel>,
    /// Used byte for byte.
    pub prompt: String,
    pub sampling: SamplingOptions,
    pub max_new_tokens: usize,
}

/// The user turn for one question.
pub fn user_turn(prompt: &str, question: &str) -> String {
    format!("{prompt}\nQuestion: {question}")
}

impl Planner {
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
