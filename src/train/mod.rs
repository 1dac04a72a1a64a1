//! (in the making)

pub mod grounding_loss;
