//! Making the embedded models from nothing on Rooms: one file per model;
//! the three language models share a folder.

pub mod depth;
pub mod detector;
pub mod familiar;
pub mod language;

use crate::files::write_atomic;
use crate::train::run;
use candle_core::DType;
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

/// Writes the parameters of a run's checkpoint as `model.safetensors`, f16.
fn export_weights(run: &Path, out: &Path) -> anyhow::Result<()> {
    let mut weights = HashMap::new();
    for (name, t) in run::parameters(&run.join("checkpoint.safetensors"))? {
        weights.insert(name, t.to_dtype(DType::F16)?);
    }
    let bytes = safetensors::serialize(&weights, None)?;
    write_atomic(&out.join("model.safetensors"), |w| w.write_all(&bytes))?;
    Ok(())
}
