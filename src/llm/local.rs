//! A chat model in this process: a Qwen3 or Qwen3-VL checkpoint with its tokenizer, template and
//! picture processor.

use std::path::Path;

use candle_core::{DType, Device};
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
use crate::weights::{self, Checkpoint, WeightsError};

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{file}: {message}")]
    File { file: String, message: String },
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Chat(#[from] ChatError),
}

/// The small files beside the weights, as a HF folder names them.
#[derive(Clone, Debug)]
pub struct ModelFiles<'a> {
    pub config: &'a str,
    pub tokenizer: &'a [u8],
    /// `generation_config.json`, where the end-of-turn ids are looked up first.
    pub generation_config: Option<&'a str>,
    /// `preprocessor_config.json`, for models that take pictures.
    pub preprocessor_config: Option<&'a str>,
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
}

impl LocalChat {
    /// From a checkpoint's folder as `huggingface-cli download` leaves it.
    pub fn open(dir: &Path, device: &Device, options: EngineOptions) -> Result<Self, LoadError> {
        let read = |name: &str| -> Result<Option<Vec<u8>>, LoadError> {
            let path = dir.join(name);
            match std::fs::read(&path) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(file_error(&path.display().to_string(), e)),
            }
        };
        let text = |name: &str| -> Result<Option<String>, LoadError> {
            let at = |e| file_error(&dir.join(name).display().to_string(), e);
            read(name)?.map(|b| String::from_utf8(b).map_err(at)).transpose()
        };
        let need =
            |name: &str| file_error(&dir.join(name).display().to_string(), "is missing; download it again");
        let config = text("config.json")?.ok_or_else(|| need("config.json"))?;
        let tokenizer = read("tokenizer.json")?.ok_or_else(|| need("tokenizer.json"))?;
        let (generation, preprocessor) = (text("generation_config.json")?, text("preprocessor_config.json")?);
        let files = ModelFiles {
            config: &config,
            tokenizer: &tokenizer,
            generation_config: generation.as_deref(),
            preprocessor_config: preprocessor.as_deref(),
        };
        let name =
            dir.file_name().map_or_else(|| dir.display().to_string(), |n| n.to_string_lossy().into_owned());
        Self::build(&name, &files, ChatTemplate::from_dir(dir)?, &Checkpoint::open(dir)?, device, options)
    }

    /// From the folder or the embedded model that a configuration names.
    pub fn from_files(
        source: &weights::ModelFiles,
        device: &Device,
        options: EngineOptions,
    ) -> Result<Self, LoadError> {
        if let weights::ModelFiles::Folder(dir) = source {
            return Self::open(dir, device, options);
        }
        let config = source.required("config.json")?;
        let tokenizer = source.required("tokenizer.json")?;
        let generation = source.text("generation_config.json")?;
        let preprocessor = source.text("preprocessor_config.json")?;
        let files = ModelFiles {
            config: &config,
            tokenizer: tokenizer.as_bytes(),
            generation_config: generation.as_deref(),
            preprocessor_config: preprocessor.as_deref(),
        };
        let jinja = source.text("chat_template.jinja")?.map(String::from);
        let template = match (source.text("tokenizer_config.json")?, jinja) {
            (Some(config), jinja) => ChatTemplate::from_tokenizer_config(&config, jinja)?,
            (None, Some(jinja)) => ChatTemplate::new(jinja)?,
            (None, None) => return Err(file_error(&source.name(), "has no chat template")),
        };
        Self::build(&source.name(), &files, template, &source.checkpoint()?, device, options)
    }

    /// From files and weights wherever they are, as for the embedded models.
    pub fn build(
        name: &str,
        files: &ModelFiles,
        template: ChatTemplate,
        weights: &Checkpoint,
        device: &Device,
        options: EngineOptions,
    ) -> Result<Self, LoadError> {
        let kind: Kind = json(name, "config.json", files.config)?;
        // A tied head may be stored all the same.
        let head = |tied: bool| -> &[&str] { if tied { &["lm_head."] } else { &[] } };
        let network = match kind.model_type.as_str() {
            "qwen3" => {
                let cfg: qwen3::Config = json(name, "config.json", files.config)?;
                let unused = head(cfg.tie_word_embeddings);
                let model = weights.build(DType::F32, device, unused, |vb| Qwen3::new(&cfg, vb))?;
                Network::Text { model, cfg }
            }
            "qwen3_vl" => {
                let cfg: qwen3_vl::Config = json(name, "config.json", files.config)?;
                let unused = head(cfg.tie_word_embeddings);
                Network::Vision(weights.build(DType::F32, device, unused, |vb| Qwen3Vl::new(&cfg, vb))?)
            }
            other => {
                let message = format!("model_type {other:?} is not supported; qwen3 and qwen3_vl are");
                return Err(file_error(&format!("{name}: config.json"), message));
            }
        };
        let tokenizer = Tokenizer::from_bytes(files.tokenizer)?;
        let eos = end_ids(name, files, &tokenizer)?;
        let end = eos.first().copied().unwrap_or_default();
        let end = tokenizer.id("<|im_end|>").unwrap_or(end);
        let mut format = ChatFormat::new(tokenizer, template, end);
        if let Network::Vision(m) = &network {
            format.pictures = Some((picture_processor(name, files, m.config())?, m.config().image_token_id));
        }
        Ok(Self::from_engine(name, Engine::new(network, device.clone(), eos, options), format))
    }

    /// Around an engine that is there already, as in training.
    pub fn from_engine(name: &str, engine: Engine, format: ChatFormat) -> Self {
        Self { name: name.into(), engine, format }
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

    fn chat(
        &self,
        requests: &[ChatRequest],
        opts: &SamplingOptions,
        on_token: OnToken,
    ) -> Result<Vec<ChatReply>, ChatError> {
        let jobs: Vec<Job> = requests.iter().map(|r| self.job(r)).collect::<Result<_, _>>()?;
        let generated = self.engine.generate(&jobs, opts, &self.format.tokenizer, on_token)?;
        let reply = |g: Generated| ChatReply {
            text: g.text,
            finish: g.finish,
            prompt_tokens: g.trace.prompt_ids.len(),
            new_tokens: g.trace.ids.len(),
            trace: opts.trace.then_some(g.trace),
        };
        Ok(generated.into_iter().map(reply).collect())
    }
}

fn picture_processor(name: &str, files: &ModelFiles, cfg: &qwen3_vl::Config) -> Result<Processor, LoadError> {
    let file = "preprocessor_config.json";
    let fail = |m: String| file_error(&format!("{name}: {file}"), m);
    let text = files.preprocessor_config.ok_or_else(|| fail("is missing; download it again".into()))?;
    let p: Processor = json(name, file, text)?;
    let v = &cfg.vision_config;
    let theirs = (v.patch_size, v.temporal_patch_size, v.spatial_merge_size);
    if (p.patch_size, p.temporal_patch_size, p.merge_size) != theirs {
        return Err(fail(format!("patch, frame and merge sizes differ from the network's {theirs:?}")));
    }
    Ok(p)
}

/// `eos_token_id` of the generation config, else of the config (or its text part), and the end of a
/// ChatML turn.
fn end_ids(name: &str, files: &ModelFiles, tokenizer: &Tokenizer) -> Result<Vec<u32>, LoadError> {
    let ids = |v: &Value| -> Vec<u32> {
        let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        match v.as_array() {
            Some(list) => list.iter().filter_map(one).collect(),
            None => one(v).into_iter().collect(),
        }
    };
    let mut found = Vec::new();
    if let Some(g) = files.generation_config {
        let g: Value = json(name, "generation_config.json", g)?;
        found = ids(&g["eos_token_id"]);
    }
    if found.is_empty() {
        let c: Value = json(name, "config.json", files.config)?;
        found = ids(&c["eos_token_id"]);
        found.extend(ids(&c["text_config"]["eos_token_id"]));
    }
    found.extend(tokenizer.id("<|im_end|>"));
    found.sort_unstable();
    found.dedup();
    if found.is_empty() {
        let message = "no eos_token_id, and the tokenizer has no <|im_end|>: replies would never end";
        return Err(file_error(&format!("{name}: config.json"), message));
    }
    Ok(found)
}

fn json<T: serde::de::DeserializeOwned>(name: &str, file: &str, text: &str) -> Result<T, LoadError> {
    serde_json::from_str(text).map_err(|e| file_error(&format!("{name}: {file}"), e))
}

fn file_error(file: &str, message: impl std::fmt::Display) -> LoadError {
    LoadError::File { file: file.into(), message: message.to_string() }
}
