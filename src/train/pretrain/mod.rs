//! How the embedded models are made from nothing, on Rooms.

pub mod detector;
