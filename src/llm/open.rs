//! The chat models that a configuration names.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use candle_core::Device;

use super::ChatModel;
use super::endpoint::{Endpoint, Usage};
use super::engine::EngineOptions;
use super::local::{LoadError, LocalChat};
use crate::config::{Config, ENDPOINT};
use crate::weights::ModelFiles;

/// Parts that name the same endpoint share it, with its budget and its limits.
pub struct ChatModels<'a> {
    config: &'a Config,
    device: &'a Device,
    options: EngineOptions,
    endpoints: Mutex<BTreeMap<String, Arc<Endpoint>>>,
}

impl<'a> ChatModels<'a> {
    pub fn new(config: &'a Config, device: &'a Device) -> Self {
        Self { config, device, options: EngineOptions::default(), endpoints: Mutex::default() }
    }

    /// With engines that are not as they are by default.
    pub fn with_engines(self, options: EngineOptions) -> Self {
        Self { options, ..self }
    }

    pub fn planner(&self) -> Result<Arc<dyn ChatModel>, LoadError> {
        self.open(&self.config.planner.model, "planner")
    }

    pub fn vlm(&self) -> Result<Arc<dyn ChatModel>, LoadError> {
        self.open(&self.config.vlm.model, "vlm")
    }

    /// Who judges boxes; the VLM where no other is named.
    pub fn box_verifier(&self) -> Result<Arc<dyn ChatModel>, LoadError> {
        match self.config.grounding.mining.model.as_str() {
            "" => self.vlm(),
            model => self.open(model, "box-verifier"),
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

    fn open(&self, model: &str, part: &'static str) -> Result<Arc<dyn ChatModel>, LoadError> {
        let Some(name) = model.strip_prefix(ENDPOINT) else {
            let files = ModelFiles::open(model, part)?;
            return Ok(Arc::new(LocalChat::from_files(&files, self.device, self.options.clone())?));
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
