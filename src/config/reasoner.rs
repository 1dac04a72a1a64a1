//! Settings of the reasoner's training (method.md 4).

use crate::nn::Precision;
use crate::nn::lora::LoraConfig;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reasoner {
    pub algorithm: Algorithm,
    /// `rooms`, or a file of questions: JSON lines, a JSON list, or one a line.
    pub queries: String,
    /// Of the queries at most so many are trained on; 0: all.
    pub questions: usize,
    /// Questions kept out of training, to be asked at each evaluation.
    pub held_out: usize,
    pub seed: u64,
    /// Times that each question is drawn.
    pub epochs: f64,
    /// Questions a step.
    pub batch: usize,
    /// Rollouts a question.
    pub group: usize,
    /// Optimiser steps a batch of rollouts.
    pub updates: usize,
    /// Times that questions whose rollouts all earn the same are replaced by others.
    pub resample: usize,
    pub max_new_tokens: usize,
    pub lr: f64,
    /// Steps over which the rate rises.
    pub warmup: u64,
    pub decay: RateDecay,
    pub weight_decay: f64,
    pub max_grad_norm: f64,
    /// Megabytes of keys and values of the planner that samples; 0: as for `inference.kv_cache_mb`.
    pub kv_cache_mb: usize,
    /// Tokens of a micro-batch at most, padding included.
    pub micro_tokens: usize,
    /// Gradient checkpointing: layers run again in the backward pass, and activations of one at a time are held.
    pub recompute: bool,
    /// Moments, summed gradients and master weights of what is trained on a GPU in the host's memory, 12 to 16 bytes a
    /// weight, in place of the GPU's.
    pub offload: bool,
    /// Of matrix products on the processor; on a GPU `bf16` is what weights and activations are.
    pub precision: Precision,
    /// A run stops where a larger share of a step's rewards is missing.
    pub missing_limit: f64,
    /// Of `sft`: rollouts that earn less are not learnt from.
    pub threshold: f64,
    /// Steps from one evaluation to the next; 0: at the end only.
    pub eval_every: u64,
    pub save_every: u64,
    /// Checkpoints kept, the best one beside them.
    pub keep: usize,
    pub objective: Objective,
    /// Rank 0: all weights are trained.
    pub adapter: LoraConfig,
    pub servers: Servers,
}

/// vLLM servers that sample the rollouts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Servers {
    /// Up to and with the version, such as `http://gpu1:8000/v1`; none: this process samples.
    pub urls: Vec<String>,
    /// The base model as the servers call it.
    pub model: String,
    /// The run's folder as the servers see it.
    pub folder: String,
    /// Calls at once, per server.
    pub concurrency: usize,
    /// That one call may take.
    pub seconds: f64,
    pub max_reply_mb: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    Grpo,
    /// Next-token training on the base policy's rollouts that earn enough.
    Sft,
}

/// What the learning rate does after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RateDecay {
    Constant,
    /// Half a cosine down to a tenth.
    Cosine,
}

/// GRPO's objective. What the paper does not use is off by default.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Objective {
    /// The ratio of new to old probability counts from `1 − clip_low` …
    pub clip_low: f64,
    /// … to `1 + clip_high` (more than `clip_low`: DAPO, Yu et al. 2025, eq. 10).
    pub clip_high: f64,
    /// Bound on the ratio where the advantage is negative (Ye et al. 2020); 0: none.
    pub dual_clip: f64,
    /// Weight of the divergence from the reference.
    pub kl: f64,
    /// Divide advantages by their group's standard deviation? (No: Dr. GRPO, Liu et al. 2025.)
    pub normalise: bool,
    /// One ratio a reply, the geometric mean of its tokens' (GSPO, Zheng et al. 2025, eq. 7)?
    pub sequence_ratio: bool,
}

impl Default for Objective {
    fn default() -> Self {
        Self {
            clip_low: 0.2,
            clip_high: 0.2,
            dual_clip: 3.,
            kl: 0.01,
            normalise: true,
            sequence_ratio: false,
        }
    }
}

impl Reasoner {
    /// The key of a value that cannot be, and what is wrong with it.
    pub(super) fn fault(&self) -> Option<(&'static str, &'static str)> {
        /// Of anything that is counted, so that no product of counts overflows.
        const MANY: usize = 1_000_000;
        let o = &self.objective;
        let positive = |v: f64| v > 0. && v.is_finite();
        let share = |v: f64| (0. ..=1.).contains(&v);
        [
            ("batch", self.batch > 0, "must be at least 1"),
            (
                "group",
                self.group > 1 || self.algorithm == Algorithm::Sft,
                "must be at least 2: rewards are compared within a group",
            ),
            ("group", self.group <= MANY, "must be at most a million"),
            ("batch", self.batch <= MANY, "must be at most a million"),
            (
                "epochs",
                positive(self.epochs) && self.epochs <= MANY as f64,
                "must be positive, at most a million",
            ),
            ("updates", self.updates > 0, "must be at least 1"),
            ("max_new_tokens", self.max_new_tokens > 0, "must be at least 1"),
            ("lr", positive(self.lr), "must be positive"),
            (
                "weight_decay",
                self.weight_decay >= 0. && self.weight_decay.is_finite(),
                "must not be negative",
            ),
            ("max_grad_norm", positive(self.max_grad_norm), "must be positive"),
            ("micro_tokens", self.micro_tokens > 0, "must be at least 1"),
            ("missing_limit", share(self.missing_limit), "must be in 0…1"),
            ("threshold", share(self.threshold), "must be in 0…1"),
            ("save_every", self.save_every > 0, "must be at least 1"),
            ("objective.clip_low", share(o.clip_low), "must be in 0…1"),
            ("objective.clip_high", o.clip_high >= 0., "must not be negative"),
            ("objective.dual_clip", o.dual_clip == 0. || o.dual_clip > 1., "must be 0 (none) or more than 1"),
            ("objective.kl", o.kl >= 0., "must not be negative"),
            (
                "adapter.rank",
                self.servers.urls.is_empty() || self.adapter.rank > 0 || self.algorithm == Algorithm::Sft,
                "must be more than 0 with servers: they are sent an adapter",
            ),
            (
                "servers.model",
                self.servers.urls.is_empty() || !self.servers.model.is_empty(),
                "must name the base model",
            ),
            (
                "servers.folder",
                self.servers.urls.is_empty() || !self.servers.folder.is_empty(),
                "must say where servers find the run's folder",
            ),
            ("servers.concurrency", self.servers.concurrency > 0, "must be at least 1"),
            (
                "servers.seconds",
                positive(self.servers.seconds) && self.servers.seconds <= 30. * super::check::DAY,
                "must be positive, at most a month",
            ),
            ("adapter.alpha", self.adapter.rank == 0 || positive(self.adapter.alpha), "must be positive"),
            (
                "adapter.targets",
                self.adapter.rank == 0 || !self.adapter.targets.is_empty(),
                "must name layers, such as q_proj",
            ),
        ]
        .into_iter()
        .find(|(_, right, _)| !right)
        .map(|(key, _, why)| (key, why))
    }
}
