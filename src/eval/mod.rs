//! Measuring.

pub mod rooms;
pub mod stats;
