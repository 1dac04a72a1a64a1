//! Training: loops, losses and what they share.

pub mod augment;
pub mod checkpoint;
pub mod depth;
pub mod grounding;
pub mod grounding_loss;
pub mod grpo;
pub mod lm;
pub mod pretrain;
pub mod reasoner;
pub mod rollout;
pub mod run;
