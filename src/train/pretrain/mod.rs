//! How the embedded models are made from nothing, on Rooms.

pub mod detector;
//! Making the embedded models from nothing on Rooms: one file per model.

pub mod depth;
