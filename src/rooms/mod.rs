//! Rooms: the synthetic world. Rendered rooms with exact depth, boxes, questions and answers.
//!
//! It gives inputs and knows nothing of training. Everything follows from a seed and
//! [`VERSION`]; a change that alters any output raises the version, and voids every figure
//! measured on the old one.
//!
//! How hard it is, each averaged over pictures, with everything visible counted (one pixel is
//! enough): things a picture; the share of them that is *occluded*, less than 0.8 of their pixels
//! within the picture being seen; the share that is *small*, the visible box narrower than a tenth
//! of the picture's width or lower than a tenth of its height.

pub mod boxes;
pub mod demos;
pub mod export;
pub mod frames;
mod furnish;
mod kinds;
pub mod mistakes;
pub mod oracle;
mod paint;
pub mod plan;
pub mod questions;
pub mod recast;
pub mod recipe;
pub mod render;
pub mod scene;
mod solid;
pub mod spec;
pub mod template;
#[cfg(test)]
mod tests;
pub mod truth;
pub mod view;
pub mod vqa;
mod wording;

pub use oracle::OracleTools;
pub use questions::{Question, Split, sample_questions, scene_seed, score};
pub use render::generate;
pub use view::{Camera, Colour, Kind, Look, Thing, View};

/// Stands in every file and table made from Rooms.
pub const VERSION: u32 = 1;
