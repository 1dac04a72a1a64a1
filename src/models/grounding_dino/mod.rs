//! (in the making)

pub mod caption;
pub mod postprocess;
pub mod preprocess;
