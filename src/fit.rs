//! Does a checkpoint fit the network that its configuration describes? Told from the headers of its files,
//! both ways: every tensor that the network needs is there with its shape, and every tensor that is there
//! is needed or known to be of no use; and is there a tokenizer for a detector, whose checkpoints may come
//! without? Takes neither the memory nor the time of loading; what the numbers are worth is not looked at.

use crate::llm::local;
use crate::models::moge::{self, MoGe};
use crate::tools::real::{LoadError, detector};
use crate::weights::presets::Part;
use crate::weights::{Checkpoint, ModelFiles, WeightsError, is_unused};
use candle_core::{DType, Device};

/// A checkpoint that fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// What it can be in a configuration.
    pub part: Part,
    /// Of the files.
    pub tensors: usize,
    /// Of the network.
    pub parameters: u64,
    /// What the network takes as it is loaded: everything computes in f32, but a GGUF file's matrices stay
    /// packed.
    pub loaded_bytes: u64,
}

/// Looks at a model's files.
///
/// # Errors
/// What cannot be read, what is missing, of another shape or unknown, in one line.
pub fn check(files: &ModelFiles) -> Result<Fit, LoadError> {
    of_weights(files, &files.checkpoint()?)
}

/// The same on weights that may be an outline already; configuration and names are those of `files`.
pub fn of_weights(files: &ModelFiles, weights: &Checkpoint) -> Result<Fit, LoadError> {
    let outline = weights.outline()?;
    let config = match files.text("config.json")? {
        Some(text) => serde_json::from_str(&text).map_err(|e| WeightsError::Unreadable {
            path: format!("{}/config.json", files.name()),
            message: e.to_string(),
        })?,
        None => serde_json::Value::Null,
    };
    let is = |key: &str| !config[key].is_null();
    let cpu = Device::Cpu;
    let (part, unused) = if is("model_config") {
        let config: moge::Config = files.json("config.json")?;
        outline.build(DType::F32, &cpu, moge::UNUSED, |vb| MoGe::new(&config, vb))?;
        (Part::Depth, moge::UNUSED.iter().map(|u| u.to_string()).collect())
    } else if is("backbone_config") || is("backbone") || !is("model_type") {
        let (config, named) = detector::network_of(files, outline)?;
        let unused = detector::unused(&config);
        let prefixes: Vec<&str> = unused.iter().map(String::as_str).collect();
        named.build(DType::F32, &cpu, &prefixes, |vb| {
            crate::models::grounding_dino::GroundingDino::new(&config, vb)
        })?;
        detector::tokenizer_of(files, config.text_config.vocab_size)?;
        let parameters = count(&named, &unused);
        let (part, tensors) = (Part::Detector, weights.names().len());
        return Ok(Fit { part, tensors, parameters, loaded_bytes: 4 * parameters });
    } else {
        let network = local::network_of(files, &outline, &cpu)?;
        let part = match network {
            crate::llm::engine::Network::Text { .. } => Part::Language,
            crate::llm::engine::Network::Vision(_) => Part::Vlm,
        };
        let tied = network.config().tie_word_embeddings;
        (part, if tied { vec!["lm_head.".to_string()] } else { Vec::new() })
    };
    let (tensors, parameters) = (weights.names().len(), count(weights, &unused));
    let loaded_bytes = weights.packed_bytes().unwrap_or(4 * parameters);
    Ok(Fit { part, tensors, parameters, loaded_bytes })
}

/// Numbers that the network has, once each.
fn count(weights: &Checkpoint, unused: &[String]) -> u64 {
    let shapes = weights.shapes();
    let asked = shapes.iter().filter(|(name, _)| !is_unused(name, unused));
    asked.map(|(_, shape)| shape.iter().map(|&n| n as u64).product::<u64>()).sum()
}

#[cfg(test)]
#[path = "fit_tests.rs"]
mod tests;
