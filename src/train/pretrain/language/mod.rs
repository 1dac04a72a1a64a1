//! The embedded language models: [`planner`], [`verifier`] and [`vlm`], from nothing on Rooms.
//!
//! The three share one tokenizer ([`tokenizer`]), one chat template and the loop of
//! [`crate::train::lm`]. Samples are made as they are needed and follow from the run's seed and the
//! step alone. All are of the train split, so that no held-out sentence frame and no test scene is
//! ever seen. A run's folder holds its tokenizer beside checkpoint and metrics: a changed wording
//! somewhere in Rooms cannot change the ids of a run that is under way.

pub mod planner;
#[cfg(test)]
mod tests;
pub mod tokenizer;
pub mod verifier;
pub mod vision;
pub mod vlm;

use crate::files::write_atomic;
use crate::llm::format::ChatFormat;
use crate::llm::template::{CHATML, ChatTemplate};
use crate::llm::tokenizer::Tokenizer;
use crate::nn::optim::{AdamWConfig, Decay, Schedule};
use crate::nn::{self, Params};
use crate::rooms;
use crate::train::lm::LmOptions;
use crate::train::run::{self, Metrics, RunOptions, Trainee};
use anyhow::Context;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The stream of randomness that held-out samples come from; a step's is its own number.
const HELD_OUT: u64 = u64::MAX;

/// Settings of a run; with the step number they determine it.
#[derive(Clone, Debug)]
pub struct Options {
    /// Checkpoint, metrics and tokenizer.
    pub dir: PathBuf,
    pub seed: u64,
    /// A model folder to go on from, in place of fresh parameters.
    pub from: Option<PathBuf>,
    pub steps: u64,
    /// Samples of a step; for the VLM and its tower, things of a picture that are looked at.
    pub batch: usize,
    /// Of a VLM: questions of each kind about boxes, a picture.
    pub boxes: usize,
    pub lr: f64,
    /// How much faster the matrices between layers learn (by Muon).
    pub muon: f64,
    pub resume: bool,
    pub eval_every: u64,
    /// Held-out samples per figure.
    pub held_out: usize,
}

impl Options {
    fn lm(&self) -> LmOptions {
        LmOptions {
            schedule: Schedule {
                base: self.lr,
                warmup: 60.min(self.steps / 10),
                warmup_from: self.lr / 60.,
                decay: Decay::Cosine { total: self.steps, to: self.lr / 50. },
            },
            // Short runs: averages over a thousand steps would still hold the first ones' gradients.
            adamw: AdamWConfig { beta2: 0.98, weight_decay: 0.02, ..AdamWConfig::default() },
            micro_tokens: 3_072,
        }
    }

    fn train(&self, trainee: &mut dyn Trainee, label: &str, model: Value) -> anyhow::Result<Metrics> {
        let settings = json!({
            "rooms": rooms::VERSION, "model": model, "train": self.lm(), "batch": self.batch,
            "seed": self.seed, "steps": self.steps, "muon": self.muon,
        });
        let settings = super::settings(settings, self.from.as_deref());
        let options = RunOptions {
            keep: 1,
            stop: None,
            dir: self.dir.clone(),
            steps: self.steps,
            resume: self.resume,
            save_every: 50,
            eval_every: self.eval_every,
            log_every: 10,
            settings,
            label: label.into(),
        };
        run::train(trainee, &options)
    }
}

/// Gives fresh token embeddings unit size.
///
/// A small table under a residual stream of PyTorch's default layers drowns which token it was: the
/// first layers' outputs are far larger. Measured: the planner then learned the form of its programs
/// in 200 steps and not one of the question's nouns in 450. For the same reason the head has weights
/// of its own: through tied ones its gradients move every row alike, seen or not.
fn spread_embeddings(params: &Params) -> candle_core::Result<()> {
    for (_, table) in params.named().into_iter().filter(|(n, _)| n.ends_with("embed_tokens.weight")) {
        table.set(&(table.as_tensor() / nn::EMBEDDING_STDEV)?)?;
    }
    Ok(())
}

fn stream(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    rng
}

/// The tokenizer of a run, made (or taken from the model that the run goes on from) and kept in its
/// folder where it is not there yet.
fn tokenizer_of(run: &Path, from: Option<&Path>) -> anyhow::Result<String> {
    let path = run.join("tokenizer.json");
    if !path.exists() {
        let json = match from.map(|dir| dir.join("tokenizer.json")) {
            None => tokenizer::train(tokenizer::SEED)?,
            Some(file) => std::fs::read_to_string(&file).with_context(|| file.display().to_string())?,
        };
        write_atomic(&path, |w| w.write_all(json.as_bytes()))?;
    }
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

fn text_format(tokenizer: &str) -> anyhow::Result<ChatFormat> {
    let tokenizer = Tokenizer::from_bytes(tokenizer.as_bytes())?;
    let end = id(&tokenizer, tokenizer::END)?;
    Ok(ChatFormat::new(tokenizer, ChatTemplate::new(CHATML)?, end))
}

fn id(tokenizer: &Tokenizer, token: &str) -> anyhow::Result<u32> {
    tokenizer.id(token).with_context(|| format!("the tokenizer has no {token}"))
}

/// Writes a run's network as a model folder: config, tokenizer, template, f16 weights.
fn export(run: &Path, out: &Path, mut config: Value, model_type: &str) -> anyhow::Result<()> {
    let json = tokenizer_of(run, None)?;
    let tokenizer = Tokenizer::from_bytes(json.as_bytes())?;
    let (end, filler) = (id(&tokenizer, tokenizer::END)?, id(&tokenizer, tokenizer::FILLER)?);
    config["model_type"] = model_type.into();
    config["rooms_version"] = rooms::VERSION.into();
    let files = [
        ("config.json", config),
        ("tokenizer.json", serde_json::from_str(&json)?),
        (
            "tokenizer_config.json",
            json!({
                "chat_template": CHATML, "eos_token": tokenizer::END, "pad_token": tokenizer::FILLER,
                "tokenizer_class": "PreTrainedTokenizerFast",
            }),
        ),
        ("generation_config.json", json!({"eos_token_id": [end, filler], "pad_token_id": filler})),
    ];
    // First what may be missing.
    super::export_weights(run, out, |_| true)?;
    for (name, value) in files {
        write_atomic(&out.join(name), |w| writeln!(w, "{value}"))?;
    }
    Ok(())
}
