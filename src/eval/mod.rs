//! Measuring.

pub mod detection;
pub mod rooms;
pub mod stats;
