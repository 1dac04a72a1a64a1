//! Measuring.

pub mod audit;
pub mod benches;
pub mod depth;
pub mod detection;
pub mod honesty;
pub mod parts;
pub mod rooms;
pub mod stats;
