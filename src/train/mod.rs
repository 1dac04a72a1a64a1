//! Training: loops, losses and what they share.

pub mod grounding_loss;
pub mod run;
