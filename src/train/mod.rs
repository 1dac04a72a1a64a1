//! Training: loops, losses and what they share.

pub mod run;
