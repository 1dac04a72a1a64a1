//! Training: loops, losses and what they share.

pub mod grounding_loss;
pub mod depth;
pub mod pretrain;
pub mod run;
