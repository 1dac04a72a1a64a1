//! (in the making)

pub mod grounding_loss;
//! Training: loops, losses and what they share.

pub mod run;
