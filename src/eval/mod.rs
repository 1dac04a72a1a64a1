//! Measuring.

pub mod detection;
pub mod stats;
