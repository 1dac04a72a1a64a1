//! The chat models that a configuration names.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};

use candle_core::Device;

use super::ChatModel;
use super::endpoint::{Endpoint, Usage};
use super::engine::EngineOptions;
use super::local::{LoadError, LocalChat, network_of};
use crate::config::{Config, ENDPOINT};
use crate::weights::ModelFiles;

/// That a model has a vision tower; `key` is the setting that names it.
fn sees(model: &str, part: &'static str, key: &str) -> Result<(), LoadError> {
    if model.starts_with(ENDPOINT) {
        return Ok(());
    }
    let files = ModelFiles::open(model, part)?;
    let config: serde_json::Value = files.json("config.json")?;
    // Of what no chat model is, the load says more.
    if config["model_type"] != "qwen3" {
        return Ok(());
    }
    let message =
        format!("is of a qwen3, which sees no pictures; {key} must name a qwen3_vl, or a server's model");
    Err(LoadError::File { file: format!("{}/config.json", files.name()), message })
}

/// Parts that name the same endpoint share it, with its budget and its limits; those that name the same files
/// share the network.
pub struct ChatModels<'a> {
    config: &'a Config,
    device: &'a Device,
    min_prefix: Option<usize>,
    endpoints: Mutex<BTreeMap<String, Arc<Endpoint>>>,
    /// By the name of what it was loaded from.
    here: Mutex<BTreeMap<String, Weak<LocalChat>>>,
}

impl<'a> ChatModels<'a> {
    pub fn new(config: &'a Config, device: &'a Device) -> Self {
        Self { config, device, min_prefix: None, endpoints: Mutex::default(), here: Mutex::default() }
    }

    /// With engines that keep no prompt's beginning for the next.
    pub fn without_prefixes(self) -> Self {
        Self { min_prefix: Some(usize::MAX / 2), ..self }
    }

    pub fn planner(&self) -> Result<Arc<dyn ChatModel>, LoadError> {
        self.open(&self.config.planner.model, "planner")
    }

    pub fn vlm(&self) -> Result<Arc<dyn ChatModel>, LoadError> {
        self.check_vlm()?;
        self.open(&self.config.vlm.model, "vlm")
    }

    /// That the VLM sees pictures, told before anything is loaded. Of a server it cannot be known.
    pub fn check_vlm(&self) -> Result<(), LoadError> {
        sees(&self.config.vlm.model, "vlm", "vlm.model")
    }

    /// Who judges boxes; the VLM where no other is named.
    pub fn box_verifier(&self) -> Result<Arc<dyn ChatModel>, LoadError> {
        match self.config.grounding.mining.model.as_str() {
            "" => self.vlm(),
            model => {
                sees(model, "box-verifier", "grounding.mining.model")?;
                self.open(model, "box-verifier")
            }
        }
    }

    pub fn verifier(&self) -> Result<Arc<dyn ChatModel>, LoadError> {
        self.open(&self.config.verifier.model, "verifier")
    }

    /// Who compares answers, if anyone does.
    pub fn judge(&self) -> Result<Option<Arc<dyn ChatModel>>, LoadError> {
        match self.config.eval.judge.model.as_str() {
            "" => Ok(None),
            model => Ok(Some(self.open(model, "judge")?)),
        }
    }

    fn load(&self, files: &ModelFiles) -> Result<Arc<LocalChat>, LoadError> {
        let known = self.here.lock().expect("no holder panics").get(&files.name()).and_then(Weak::upgrade);
        if let Some(known) = known {
            return Ok(known);
        }
        let network = network_of(files, &files.checkpoint()?, self.device)?;
        let options = EngineOptions::with_kv_cache_mb(self.config.inference.kv_cache_mb);
        let options = EngineOptions { min_prefix: self.min_prefix.unwrap_or(options.min_prefix), ..options };
        let chat = Arc::new(LocalChat::with_network(files, network, self.device, options)?);
        self.here.lock().expect("no holder panics").insert(files.name(), Arc::downgrade(&chat));
        Ok(chat)
    }

    fn open(&self, model: &str, part: &'static str) -> Result<Arc<dyn ChatModel>, LoadError> {
        let Some(name) = model.strip_prefix(ENDPOINT) else {
            return Ok(self.load(&ModelFiles::open(model, part)?)?);
        };
        let mut endpoints = self.endpoints.lock().expect("no holder panics");
        if let Some(known) = endpoints.get(name) {
            return Ok(known.clone());
        }
        let cfg = self.config.endpoints.get(name).expect("the configuration was checked");
        let endpoint = Arc::new(Endpoint::new(name, cfg)?);
        endpoints.insert(name.to_owned(), endpoint.clone());
        Ok(endpoint)
    }

    /// What each endpoint has cost so far, by its name.
    pub fn usage(&self) -> BTreeMap<String, Usage> {
        let endpoints = self.endpoints.lock().expect("no holder panics");
        endpoints.iter().filter_map(|(name, e)| Some((name.clone(), e.usage()?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_without_a_vision_tower_is_no_vlm() {
        let of = |key: &str| {
            let config = Config::resolve(None, &[format!("{key}=tests/fixtures/qwen3-tiny")]).unwrap();
            let device = Device::Cpu;
            let chats = ChatModels::new(&config, &device);
            (
                chats.check_vlm().err().map(|e| e.to_string()),
                chats.box_verifier().err().map(|e| e.to_string()),
            )
        };
        let (vlm, boxes) = of("vlm.model");
        let e = vlm.unwrap();
        assert!(e.starts_with("tests/fixtures/qwen3-tiny/config.json: is of a qwen3, which sees no"), "{e}");
        assert!(e.contains("vlm.model must name a qwen3_vl") && boxes.is_none(), "{e}");
        let (vlm, boxes) = of("grounding.mining.model");
        let e = boxes.unwrap();
        assert!(vlm.is_none() && e.contains("grounding.mining.model must name a qwen3_vl"), "{e}");
    }
}
