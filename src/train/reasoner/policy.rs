//! The planner as it is trained: what learns, what samples, and what it must not stray from.

use crate::config;
use crate::llm::engine::{EngineOptions, Network};
use crate::llm::local::LocalChat;
use crate::models::qwen3::{Config, Qwen3};
use crate::nn::lora::{LoraConfig, adapted, merged, peft_config, peft_tensors};
use crate::nn::{Params, frozen};
use crate::weights::ModelFiles;
use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::path::Path;

use crate::files::{Lazy, lazily, write_atomic, write_tensors};

/// A planner in training. With an adapter all three networks share the base's weights; without, the
/// base is a copy of what the training began with.
pub struct Policy {
    /// As the configuration names it.
    source: String,
    files: ModelFiles,
    base: Params,
    /// The adapter's matrices, or all weights.
    trained: Params,
    adapter: Option<LoraConfig>,
    /// Differentiable.
    pub network: Network,
    pub reference: Network,
    /// Samples from the policy as it is.
    pub sampler: LocalChat,
    /// Samples from the reference.
    pub base_sampler: LocalChat,
}

impl Policy {
    /// On a GPU the weights are of `cfg.precision`.
    pub fn load(model: &str, cfg: &config::Reasoner, device: &Device) -> Result<Self> {
        Self::of_type(model, cfg, cfg.precision.of_weights(device), device)
    }

    pub(super) fn of_type(
        model: &str,
        cfg: &config::Reasoner,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let files = ModelFiles::open(model, "planner")?;
        check_trainable(&files)?;
        let net: Config = files.json("config.json")?;
        let mut tensors = files.checkpoint()?.tensors()?;
        if net.tie_word_embeddings {
            // A tied head may be stored all the same.
            tensors.retain(|name, _| !name.starts_with("lm_head."));
        }
        let held: HashSet<String> = tensors.keys().cloned().collect();
        let adapter = (cfg.adapter.rank > 0).then(|| cfg.adapter.clone());
        // Of an adapter's base there is one copy, the placed one.
        let (for_base, whole) = match &adapter {
            Some(_) => (tensors, None),
            None => (tensors.clone(), Some(tensors)),
        };
        let base = Params::placed(cfg.seed, for_base, dtype, device)?;
        let text = |vb: VarBuilder| -> Result<Network> {
            Ok(Network::Text { model: Qwen3::new(&net, vb)?, cfg: net.clone() })
        };
        let reference = text(frozen(base.builder()))?;
        let fresh: Vec<String> =
            base.named().into_iter().map(|p| p.0).filter(|n| !held.contains(n)).collect();
        ensure!(
            fresh.is_empty(),
            "{} lacks {} of the network's {} tensors, first {}",
            files.name(),
            fresh.len(),
            fresh.len() + held.len(),
            fresh[0]
        );
        let trained = match whole {
            None => Params::new(cfg.seed),
            Some(tensors) => Params::placed(cfg.seed, tensors, dtype, device)?,
        };
        let built = |fixed: bool| {
            let vb = match &adapter {
                Some(lora) => adapted(frozen(base.builder()), &trained, lora),
                None => trained.builder(),
            };
            let network = text(if fixed { frozen(vb) } else { vb })?;
            Ok::<_, anyhow::Error>(match network {
                Network::Text { model, cfg: net } if !fixed => {
                    Network::Text { model: model.recomputed(cfg.recompute), cfg: net }
                }
                other => other,
            })
        };
        let options = EngineOptions::with_kv_cache_mb(cfg.kv_cache_mb);
        let chat = |network| LocalChat::with_network(&files, network, device, options.clone());
        let network = built(false)?;
        ensure!(trained.count() > 0, "reasoner.adapter.targets: the network has none of these layers");
        let (sampler, base_sampler) = (chat(built(true)?)?, chat(text(frozen(base.builder()))?)?);
        let source = model.to_owned();
        Ok(Self { source, base, trained, adapter, network, reference, sampler, base_sampler, files })
    }

    pub fn name(&self) -> String {
        self.files.name()
    }

    /// What learns.
    pub fn trained(&self) -> &Params {
        &self.trained
    }

    #[cfg(test)]
    pub(super) fn base(&self) -> &Params {
        &self.base
    }

    pub fn parameters(&self) -> usize {
        self.base.count()
    }

    /// To be called after each optimiser step: what the sampler kept of the old weights is wrong now.
    pub fn changed(&self) {
        self.sampler.engine().forget_prefixes();
    }

    /// Writes a model's folder with the weights as they are, for `planner.model`, transformers and vLLM;
    /// and, of an adapter, `adapter/` in PEFT's format.
    pub fn export(&self, dir: &Path) -> Result<()> {
        for name in [
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "chat_template.jinja",
        ] {
            if let Some(text) = self.files.text(name)? {
                write_atomic(&dir.join(name), |w| w.write_all(text.as_bytes()))?;
            }
        }
        // What is small and holds all that was learnt comes first.
        self.export_adapter(&dir.join("adapter"))?;
        let path = dir.join("model.safetensors");
        let Some(lora) = &self.adapter else { return write(&path, &self.trained.tensors()) };
        // One weight after another: with all of them merged the base would be in memory twice.
        let base = self.base.tensors();
        let merged = base.iter().map(|(name, w)| {
            (name.clone(), Lazy::new(w.dtype(), w.shape(), || merged(name, w, &self.trained, lora)))
        });
        Ok(write_tensors(&path, merged, Some(note()))?)
    }

    /// Writes the adapter, if there is one, in PEFT's format.
    pub fn export_adapter(&self, dir: &Path) -> Result<()> {
        let Some(lora) = &self.adapter else { return Ok(()) };
        write(&dir.join("adapter_model.safetensors"), &peft_tensors(&self.trained))?;
        let config = peft_config(&self.source, lora);
        Ok(write_atomic(&dir.join("adapter_config.json"), |w| writeln!(w, "{config:#}"))?)
    }
}

/// That a planner is of a kind that can be trained, told before it is loaded.
pub fn check_trainable(files: &ModelFiles) -> Result<()> {
    ensure!(
        !matches!(files, ModelFiles::Gguf(_)),
        "{}: a GGUF file is for inference; train the checkpoint that it was made from (or write one from \
         it: valor models convert)",
        files.name()
    );
    let kind: Value = files.json("config.json")?;
    ensure!(
        kind["model_type"] == "qwen3",
        "{}/config.json: model_type {} cannot be trained as a planner yet; qwen3 can",
        files.name(),
        kind["model_type"]
    );
    Ok(())
}

/// As one safetensors file, in the layout that transformers reads.
pub(super) fn write(path: &Path, tensors: &HashMap<String, Tensor>) -> Result<()> {
    Ok(write_tensors(path, lazily(tensors), Some(note()))?)
}

/// transformers asks for it.
fn note() -> HashMap<String, String> {
    HashMap::from([("format".to_owned(), "pt".to_owned())])
}
