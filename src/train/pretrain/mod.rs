//! Making the embedded models from nothing on Rooms: one file per model;
//! the three language models share a folder.

pub mod depth;
pub mod detector;
pub mod familiar;
pub mod language;

use crate::files::write_atomic;
use crate::nn::Params;
use crate::train::run;
use crate::weights::Checkpoint;
use candle_core::DType;
use serde_json::Value;
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

/// What a run begins with: fresh parameters, or those of a model folder for a further round on new
/// samples (so with another seed).
fn start(seed: u64, from: Option<&Path>) -> anyhow::Result<Params> {
    match from {
        None => Ok(Params::new(seed)),
        Some(dir) => Ok(Params::from_tensors(seed, Checkpoint::open(dir)?.tensors()?)?),
    }
}

/// The settings of a run, with where it began if not from nothing.
fn settings(mut of_run: Value, from: Option<&Path>) -> Value {
    if let Some(dir) = from {
        of_run["from"] = dir.display().to_string().into();
    }
    of_run
}

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
