//! (in the making)

pub mod postprocess;
pub mod preprocess;
pub mod text;
