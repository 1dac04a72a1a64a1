//! Where a trainer's replies come from: this process, or servers that follow its weights.

mod servers;

pub use servers::Servers;

use crate::llm::{ChatError, ChatModel, ChatReply, ChatRequest, SamplingOptions};

/// Continues prompts and tells the log-probability of each token that it sampled.
pub trait RolloutEngine {
    /// Replies sampled at temperature 1 without truncation, traces with them, in the requests' order.
    fn sample(&self, requests: &[ChatRequest]) -> Vec<Result<ChatReply, ChatError>>;
}

/// A model in this process, which sees its weights change.
impl RolloutEngine for crate::llm::local::LocalChat {
    fn sample(&self, requests: &[ChatRequest]) -> Vec<Result<ChatReply, ChatError>> {
        let opts = SamplingOptions { trace: true, ..SamplingOptions::temperature(1.) };
        self.chat(requests, &opts, None)
    }
}
