//! Training: loops, losses and what they share.

pub mod augment;
pub mod grounding;
pub mod depth;
pub mod grounding_loss;
pub mod lm;
pub mod pretrain;
pub mod run;
