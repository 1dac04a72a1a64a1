//! Training: loops, losses and what they share.

pub mod augment;
pub mod depth;
pub mod grounding;
pub mod grounding_loss;
pub mod lm;
pub mod pretrain;
pub mod run;
