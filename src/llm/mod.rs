//! Text generation behind one trait, [`ChatModel`].
//!
//! [`local::LocalChat`] runs a Qwen3 or Qwen3-VL checkpoint in this process: [`template`] renders the
//! checkpoint's own chat template, [`tokenizer`] turns text into ids and back, [`engine`] generates
//! in batches with [`sampler`], [`bpe`] makes the tokenizers of the embedded models.
//! [`endpoint::Endpoint`] asks a server. The trait speaks text and pictures only, no tensors.

pub mod bpe;
pub mod endpoint;
pub mod engine;
pub mod format;
#[cfg(test)]
mod gguf_tests;
pub mod local;
mod network;
mod open;
pub mod sampler;
pub mod schema;
pub mod template;
pub mod tokenizer;

use image::RgbImage;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

use crate::weights::message_of;
pub use open::ChatModels;
pub use sampler::SamplingOptions;
pub use schema::Schema;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    System,
    User,
    Assistant,
}

/// One turn of a conversation. Pictures come before the text of their turn.
#[derive(Clone, Debug)]
pub struct Message {
    pub role: Role,
    pub text: String,
    pub images: Vec<RgbImage>,
}

impl Message {
    pub fn new(role: Role, text: impl Into<String>) -> Self {
        Self { role, text: text.into(), images: Vec::new() }
    }

    pub fn user(text: impl Into<String>) -> Self {
        Self::new(Role::User, text)
    }

    pub fn assistant(text: impl Into<String>) -> Self {
        Self::new(Role::Assistant, text)
    }

    pub fn with_images(mut self, images: Vec<RgbImage>) -> Self {
        self.images = images;
        self
    }
}

/// One conversation to be continued by the assistant.
#[derive(Clone, Debug)]
pub struct ChatRequest {
    pub messages: Vec<Message>,
    /// Seeds this reply alone: the reply does not depend on what else is asked in the same call.
    pub seed: u64,
    pub max_new_tokens: usize,
    /// The reply ends before the first of these; they are not part of it.
    pub stop: Vec<String>,
    /// The reply must be JSON that fits; one that does not is an error. Endpoints are told of it,
    /// local models are not: say in words what is wanted.
    pub schema: Option<Arc<Schema>>,
}

impl ChatRequest {
    /// One user turn, no stop strings.
    pub fn user(text: impl Into<String>, seed: u64, max_new_tokens: usize) -> Self {
        Self { messages: vec![Message::user(text)], seed, max_new_tokens, stop: Vec::new(), schema: None }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// The model ended its turn, or a stop string came.
    Stop,
    /// `max_new_tokens` or the model's context was used up.
    Length,
}

/// What was sampled, for training on it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenTrace {
    pub prompt_ids: Vec<u32>,
    /// The sampled ids, the end-of-turn token included where one was sampled.
    pub ids: Vec<u32>,
    /// Log-probability of each sampled id under the untempered, untruncated distribution.
    pub log_probs: Vec<f32>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ChatReply {
    pub text: String,
    pub finish: Finish,
    pub prompt_tokens: usize,
    pub new_tokens: usize,
    /// Present where [`SamplingOptions::trace`] asked for it and the model can tell.
    pub trace: Option<TokenTrace>,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum ChatError {
    #[error("chat template: {0}")]
    Template(String),
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The request cannot be served as it is; trying again will not help.
    #[error("{0}")]
    Request(String),
    #[error("{}", message_of(.0))]
    Model(Arc<candle_core::Error>),
    /// An endpoint gave no usable reply to this request; others may fare better.
    #[error("{0}")]
    NoReply(String),
    /// A reply came, but is of no use: empty, refused, or not of the form that the request's schema asks for.
    #[error("{0}")]
    Misfit(String),
    /// An endpoint will answer nothing more, such as when the budget is spent.
    #[error("{0}")]
    Closed(String),
}

impl From<candle_core::Error> for ChatError {
    fn from(e: candle_core::Error) -> Self {
        Self::Model(Arc::new(e))
    }
}

impl ChatError {
    /// Would any other request fail too?
    pub fn is_of_model(&self) -> bool {
        !matches!(self, Self::Request(_) | Self::NoReply(_) | Self::Misfit(_))
    }

    /// Is it a server's fault of the moment, so that the same request may fare better another time?
    pub fn is_outage(&self) -> bool {
        matches!(self, Self::NoReply(_))
    }

    /// Did a server fail, be it for the moment or for good, and not what it was to be asked?
    pub fn is_of_server(&self) -> bool {
        matches!(self, Self::NoReply(_) | Self::Misfit(_) | Self::Closed(_))
    }
}

/// Anything that continues conversations.
pub trait ChatModel: Send + Sync {
    /// The model's name, for traces and reports.
    fn name(&self) -> &str;

    /// A reply to each request, in their order. `on_token` receives the index of a request and
    /// the next piece of its reply; a request's pieces, joined, are its reply.
    fn chat(
        &self,
        requests: &[ChatRequest],
        opts: &SamplingOptions,
        on_token: Option<&mut dyn FnMut(usize, &str)>,
    ) -> Vec<Result<ChatReply, ChatError>>;

    /// What tells this model from others in caches that outlive the process.
    fn identity(&self) -> String {
        self.name().to_owned()
    }

    /// What its calls have cost so far, where calls cost anything.
    fn usage(&self) -> Option<endpoint::Usage> {
        None
    }
}
