//! Training: loops, losses and what they share.

pub mod depth;
pub mod grounding_loss;
pub mod pretrain;
pub mod run;
