//! Measuring.

pub mod stats;
