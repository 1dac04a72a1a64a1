//! The embedded *base* planner: a small Qwen3 that learned from demonstrations with mistakes.
//!
//! It is what someone has who has not run the reasoner's training yet: its demonstrations carry the
//! usual mistakes as habits (see [`crate::rooms::mistakes`]), so its most likely program is wrong in
//! several families. That is meant; nothing here corrects it.

use super::super::{check_complete, start};
use super::{HELD_OUT, Options, spread_embeddings, stream, text_format, tokenizer_of};
use crate::llm::Message;
use crate::llm::engine::Network;
use crate::llm::format::ChatFormat;
use crate::models::qwen3::{Config, Qwen3};
use crate::nn::Params;
use crate::planner::{ROOMS_PROMPT, user_turn};
use crate::rooms::demos::{planner_sample, training_question};
use crate::rooms::mistakes::{demonstration, habits};
use crate::train::lm::{LmTrainee, Sample};
use crate::train::run::Metrics;
use rand::Rng;
use std::path::{Path, PathBuf};

impl Options {
    /// The base planner's run. (The one in the tree came of two: `data/embedded/README.md`.)
    pub fn planner(dir: PathBuf) -> Self {
        Self {
            dir,
            seed: 1,
            from: None,
            steps: 1_600,
            batch: 24,
            boxes: 0,
            lr: 2e-3,
            muon: 4.5,
            resume: false,
            eval_every: 100,
            held_out: 160,
        }
    }
}

/// About 2.4 million parameters.
pub fn config(vocab_size: usize) -> Config {
    Config {
        vocab_size,
        hidden_size: 192,
        intermediate_size: 512,
        num_hidden_layers: 5,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 48,
        max_position_embeddings: 2_048,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        tie_word_embeddings: false,
        attention_bias: false,
    }
}

/// User turn and reply of a demonstration.
pub fn text(rng: &mut impl Rng) -> (String, String) {
    let (question, reply) = planner_sample(rng);
    (user_turn(ROOMS_PROMPT, &question), reply)
}

/// The reply that demonstrations give most often: with the habits, where the question has any.
fn likeliest(rng: &mut impl Rng) -> (String, String) {
    let (spec, question) = training_question(rng);
    (user_turn(ROOMS_PROMPT, &question), demonstration(&spec, &habits(&spec)).to_string())
}

/// `text` as a training sample.
pub(super) fn sample(format: &ChatFormat, (user, reply): (String, String)) -> anyhow::Result<Sample> {
    Ok(Sample::new(format, &[Message::user(user)], &reply)?)
}

pub(super) fn network(params: &Params, vocab_size: usize) -> candle_core::Result<Network> {
    let cfg = config(vocab_size);
    Ok(Network::Text { model: Qwen3::new(&cfg, params.builder())?, cfg })
}

/// Trains (or continues). `held_out_replies_right` is the share of unseen questions whose greedy reply
/// is, word for word, the likeliest demonstration.
pub fn train(o: &Options) -> anyhow::Result<Metrics> {
    let format = text_format(&tokenizer_of(&o.dir, o.from.as_deref())?)?;
    let vocab = format.tokenizer.vocab_size();
    let params = start(o.seed, o.from.as_deref())?;
    let network = network(&params, vocab)?;
    check_complete(&params, o.from.as_deref(), None)?;
    if o.from.is_none() {
        spread_embeddings(&params)?;
    }
    let mut rng = stream(o.seed, HELD_OUT);
    let held_out = (0..o.held_out).map(|_| sample(&format, likeliest(&mut rng))).collect::<Result<_, _>>()?;
    let source = Box::new(|step| {
        let mut rng = stream(o.seed, step);
        (0..o.batch).map(|_| sample(&format, text(&mut rng))).collect()
    });
    let mut trainee = LmTrainee::new(network, params, o.lm(), super::super::group(o.muon), source, held_out)?;
    o.train(&mut trainee, "planner", serde_json::to_value(config(vocab))?)
}

/// Writes a run's network as a model folder.
pub fn export(run: &Path, out: &Path) -> anyhow::Result<()> {
    let vocab = text_format(&tokenizer_of(run, None)?)?.tokenizer.vocab_size();
    super::export(run, out, serde_json::to_value(config(vocab))?, "qwen3")
}
