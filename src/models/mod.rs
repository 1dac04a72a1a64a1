//! One network per file or folder; weight names are the checkpoints' names.

pub mod bert;
pub mod dinov2;
pub mod grounding_dino;
pub mod moge;
pub mod qwen3;
pub mod qwen3_vl;
pub mod swin;
