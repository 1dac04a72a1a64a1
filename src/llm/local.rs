//! A chat model in this process: a Qwen3 or Qwen3-VL checkpoint with its tokenizer, template and
//! picture processor.

use std::path::Path;

use candle_core::Device;
use serde::Deserialize;
use serde_json::Value;

use super::engine::{Engine, EngineOptions, Generated, Job, Network, OnToken};
use super::format::ChatFormat;
use super::sampler::SamplingOptions;
use super::template::ChatTemplate;
use super::tokenizer::Tokenizer;
use super::{ChatError, ChatModel, ChatReply, ChatRequest};
use crate::models::qwen3::{self, Qwen3};
use crate::models::qwen3_vl::{self, Processor, Qwen3Vl};
use crate::nn::Precision;
use crate::weights::{Checkpoint, ModelFiles, WeightsError};

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{file}: {message}")]
    File { file: String, message: String },
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Chat(#[from] ChatError),
}

#[derive(Deserialize)]
struct Kind {
    model_type: String,
}

/// A local model behind [`ChatModel`].
pub struct LocalChat {
    name: String,
    engine: Engine,
    pub format: ChatFormat,
    /// Where it came from, if from files.
    files: Option<ModelFiles>,
}

impl LocalChat {
    /// From a checkpoint's folder as `huggingface-cli download` leaves it.
    pub fn open(dir: &Path, device: &Device, options: EngineOptions) -> Result<Self, LoadError> {
        Self::from_files(&ModelFiles::Folder(dir.into()), device, options)
    }

    /// From a folder or from the model inside the binary.
    pub fn from_files(
        files: &ModelFiles,
        device: &Device,
        options: EngineOptions,
    ) -> Result<Self, LoadError> {
        let network = network_of(files, &files.checkpoint()?, device)?;
        Self::with_network(files, network, device, options)
    }

    /// With the tokenizer, template and settings of files, but a network that is there already.
    pub fn with_network(
        files: &ModelFiles,
        network: Network,
        device: &Device,
        options: EngineOptions,
    ) -> Result<Self, LoadError> {
        let template = ChatTemplate::from_files(files)?;
        let tokenizer = Tokenizer::from_bytes(files.required("tokenizer.json")?.as_bytes());
        let tokenizer = tokenizer.map_err(|e| match e {
            ChatError::Tokenizer(why) => file_error(files, "tokenizer.json", why),
            other => other.into(),
        })?;
        let eos = end_ids(files, &tokenizer)?;
        let end = eos.first().copied().unwrap_or_default();
        let end = tokenizer.id("<|im_end|>").unwrap_or(end);
        let mut format = ChatFormat::new(tokenizer, template, end);
        if let Network::Vision(m) = &network {
            format.pictures = Some((picture_processor(files, m.config())?, m.config().image_token_id));
        }
        let engine = Engine::new(network, device.clone(), eos, options);
        Ok(Self { files: Some(files.clone()), ..Self::from_engine(&files.name(), engine, format) })
    }

    /// Around an engine that is there already, as in training.
    pub fn from_engine(name: &str, engine: Engine, format: ChatFormat) -> Self {
        Self { name: name.into(), engine, format, files: None }
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    fn job(&self, request: &ChatRequest) -> Result<Job, ChatError> {
        let prompt = self.format.prompt(&request.messages, self.engine.device())?;
        let mut job = Job {
            ids: prompt.ids,
            features: None,
            grids: Vec::new(),
            seed: request.seed,
            max_new_tokens: request.max_new_tokens,
            stop: request.stop.clone(),
        };
        if let (Some(pictures), Network::Vision(model)) = (prompt.pictures, self.engine.network()) {
            job.features = Some(model.vision(&pictures)?);
            job.grids = pictures.grids;
        }
        Ok(job)
    }
}

impl ChatModel for LocalChat {
    fn name(&self) -> &str {
        &self.name
    }

    fn identity(&self) -> String {
        let weights = self.files.as_ref().map(ModelFiles::fingerprint);
        format!("{} {}", self.name, weights.unwrap_or_default())
    }

    fn chat(
        &self,
        requests: &[ChatRequest],
        opts: &SamplingOptions,
        on_token: OnToken,
    ) -> Vec<Result<ChatReply, ChatError>> {
        // What cannot be served is answered with its error; the others go together.
        let planned: Vec<Result<Job, ChatError>> = (requests.iter())
            .map(|r| self.job(r).and_then(|job| self.engine.check(&job).map(|()| job)))
            .collect();
        let of: Vec<usize> = (0..planned.len()).filter(|&i| planned[i].is_ok()).collect();
        let mut jobs = Vec::with_capacity(of.len());
        let mut refused = Vec::with_capacity(planned.len());
        for job in planned {
            refused.push(job.map(|job| jobs.push(job)).err());
        }
        let mut renumbered;
        let on_token: OnToken = match on_token {
            Some(hear) => {
                renumbered = |job: usize, piece: &str| hear(of[job], piece);
                Some(&mut renumbered)
            }
            None => None,
        };
        let reply = |g: Generated| ChatReply {
            text: g.text,
            finish: g.finish,
            prompt_tokens: g.trace.prompt_ids.len(),
            new_tokens: g.trace.ids.len(),
            trace: opts.trace.then_some(g.trace),
        };
        let mut generated: Box<dyn Iterator<Item = Result<ChatReply, ChatError>>> =
            match self.engine.generate(&jobs, opts, &self.format.tokenizer, on_token) {
                Ok(all) => Box::new(all.into_iter().map(|g| Ok(reply(g)))),
                Err(e) => Box::new(std::iter::repeat(Err(e))),
            };
        let served = |(request, refused): (&ChatRequest, Option<ChatError>)| {
            let reply = match refused {
                Some(e) => return Err(e),
                None => generated.next().expect("one for each job")?,
            };
            match &request.schema {
                None => Ok(reply),
                Some(schema) => {
                    let text = schema.fitted(&reply.text).map_err(ChatError::Misfit)?.to_owned();
                    Ok(ChatReply { text, ..reply })
                }
            }
        };
        requests.iter().zip(refused).map(served).collect()
    }
}

/// The network that files' `config.json` describes, on weights (theirs, or an outline of them).
pub fn network_of(files: &ModelFiles, weights: &Checkpoint, device: &Device) -> Result<Network, LoadError> {
    let kind: Kind = files.json("config.json")?;
    // A tied head may be stored all the same.
    let dtype = Precision::of_inference(device);
    let head = |tied: bool| -> &[&str] { if tied { &["lm_head."] } else { &[] } };
    Ok(match kind.model_type.as_str() {
        "qwen3" => {
            let cfg: qwen3::Config = files.json("config.json")?;
            let unused = head(cfg.tie_word_embeddings);
            let model = weights.build(dtype, device, unused, |vb| Qwen3::new(&cfg, vb))?;
            Network::Text { model, cfg }
        }
        "qwen3_vl" => {
            let cfg: qwen3_vl::Config = files.json("config.json")?;
            let unused = head(cfg.tie_word_embeddings);
            Network::Vision(weights.build(dtype, device, unused, |vb| Qwen3Vl::new(&cfg, vb))?)
        }
        other => {
            let message = format!("model_type {other:?} is not supported; qwen3 and qwen3_vl are");
            return Err(file_error(files, "config.json", message));
        }
    })
}

fn picture_processor(files: &ModelFiles, cfg: &qwen3_vl::Config) -> Result<Processor, LoadError> {
    let p: Processor = files.json("preprocessor_config.json")?;
    let v = &cfg.vision_config;
    let theirs = (v.patch_size, v.temporal_patch_size, v.spatial_merge_size);
    if (p.patch_size, p.temporal_patch_size, p.merge_size) != theirs {
        let message = format!("patch, frame and merge sizes differ from the network's {theirs:?}");
        return Err(file_error(files, "preprocessor_config.json", message));
    }
    Ok(p)
}

/// `eos_token_id` of the generation config, else of the config (or its text part), and the end of a
/// ChatML turn.
fn end_ids(files: &ModelFiles, tokenizer: &Tokenizer) -> Result<Vec<u32>, LoadError> {
    let ids = |v: &Value| -> Vec<u32> {
        let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        match v.as_array() {
            Some(list) => list.iter().filter_map(one).collect(),
            None => one(v).into_iter().collect(),
        }
    };
    let mut found = Vec::new();
    if files.text("generation_config.json")?.is_some() {
        let g: Value = files.json("generation_config.json")?;
        found = ids(&g["eos_token_id"]);
    }
    if found.is_empty() {
        let c: Value = files.json("config.json")?;
        found = ids(&c["eos_token_id"]);
        found.extend(ids(&c["text_config"]["eos_token_id"]));
    }
    found.extend(tokenizer.id("<|im_end|>"));
    found.sort_unstable();
    found.dedup();
    if found.is_empty() {
        let message = "no eos_token_id, and the tokenizer has no <|im_end|>: replies would never end";
        return Err(file_error(files, "config.json", message));
    }
    Ok(found)
}

fn file_error(files: &ModelFiles, file: &str, message: impl std::fmt::Display) -> LoadError {
    LoadError::File { file: format!("{}/{file}", files.name()), message: message.to_string() }
}
