//! Making the embedded models from nothing on Rooms: one file per model.

pub mod depth;
pub mod detector;
