//! The embedded *base* detector: a small GroundingDINO trained from nothing on studio pictures.
//!
//! The original's training semantics, with logits scaled by 1/√d and a class-logit bias of −4
//! (without them nothing is learned from scratch in reasonable time). Pictures are rendered on the
//! fly and never repeated. It never sees the lived-in look: that is what tuning is for.

use crate::files::write_atomic;
use crate::models::grounding_dino::caption::{Blanks, TextTokenizer, tokenizer_json};
use crate::models::grounding_dino::preprocess::{ImageProcessor, SizeRule};
use crate::models::grounding_dino::{Config, SPECIAL_TOKENS, Semantics, init_offsets};
use crate::models::{bert, swin};
use crate::nn::optim::{AdamWConfig, Decay, Schedule};
use crate::rooms::questions::{Split, scene_seed};
use crate::rooms::{self, Colour, Kind, Look};
use crate::sight::Picture;
use crate::train::augment::{Augment, Crop};
use crate::train::grounding::{GroundingTrainer, Region, Sample, Samples, TrainConfig, Validation};
use crate::train::run::{self, Metrics, RunOptions};
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Rendered size; the network sees it scaled to a shortest side of [`SHORTEST`].
const WIDTH: u32 = 256;
const HEIGHT: u32 = 192;
const SHORTEST: usize = 144;
const LONGEST: usize = 256;

/// Held-out scenes come from far up in the training split, so that test scenes stay untouched.
const HELD_OUT: u64 = 1 << 40;

#[derive(Clone, Debug)]
pub struct Options {
    /// Checkpoint and metrics.
    pub dir: PathBuf,
    pub seed: u64,
    /// A model folder to go on from, in place of fresh parameters.
    pub from: Option<PathBuf>,
    pub steps: u64,
    pub batch: usize,
    pub resume: bool,
    pub eval_every: u64,
    /// Held-out pictures per evaluation.
    pub eval_pictures: u64,
}

impl Options {
    /// The run that made the embedded detector.
    pub fn embedded(dir: PathBuf) -> Self {
        Self {
            dir,
            seed: 1,
            from: None,
            steps: 6_000,
            batch: 8,
            resume: false,
            eval_every: 500,
            eval_pictures: 128,
        }
    }
}

/// About 2 million parameters.
pub fn config() -> Config {
    let d = 96;
    Config {
        backbone_config: swin::Config {
            embed_dim: 24,
            depths: vec![2, 2, 2, 2],
            num_heads: vec![2, 4, 8, 8],
            window_size: 6,
            drop_path_rate: 0.,
            ..Default::default()
        },
        text_config: bert::Config {
            vocab_size: vocabulary().len(),
            hidden_size: 64,
            num_hidden_layers: 1,
            num_attention_heads: 4,
            intermediate_size: 128,
            max_position_embeddings: 64,
            hidden_dropout_prob: 0.,
            attention_probs_dropout_prob: 0.,
            ..Default::default()
        },
        d_model: d,
        num_queries: 50,
        encoder_layers: 2,
        encoder_ffn_dim: 256,
        encoder_attention_heads: 4,
        decoder_layers: 3,
        decoder_ffn_dim: 256,
        decoder_attention_heads: 4,
        dropout: 0.,
        fusion_droppath: 0.,
        semantics: Semantics::Original,
        class_logit_scale: true,
        class_logit_bias: Some(-4.),
        ..Default::default()
    }
}

pub fn processor() -> ImageProcessor {
    ImageProcessor { shortest: SHORTEST, longest: LONGEST, rule: SizeRule::Hf, ..Default::default() }
}

/// Rooms' words whole, everything else by letters; the ids that HF's code relies on are in place.
pub fn vocabulary() -> Vec<String> {
    let mut vocab: Vec<String> = (0..=SPECIAL_TOKENS[3]).map(|i| format!("[unused{i}]")).collect();
    let fixed = [(0, "[PAD]"), (100, "[UNK]"), (101, "[CLS]"), (102, "[SEP]"), (103, "[MASK]")];
    for (id, token) in
        fixed.into_iter().chain([(999, "!"), (1010, ","), (1011, "-"), (1012, "."), (1029, "?")])
    {
        vocab[id] = token.into();
    }
    let words = Kind::ALL.iter().map(|k| k.word()).chain(Colour::ALL.iter().map(|c| c.word()));
    for (i, word) in words.enumerate() {
        vocab[200 + i] = word.into();
    }
    for (i, c) in ('a'..='z').chain('0'..='9').enumerate() {
        vocab[300 + i] = c.into();
        vocab[350 + i] = format!("##{c}");
    }
    vocab
}

fn tokenizer_file() -> Value {
    tokenizer_json(vocabulary().iter().map(String::as_str))
}

pub fn tokenizer() -> candle_core::Result<TextTokenizer> {
    TextTokenizer::from_json(&tokenizer_file().to_string(), "of Rooms")
}

/// Rendered rooms as detector samples. Index `i` is scene `from + i`.
pub struct RoomPictures {
    pub seed: u64,
    pub from: u64,
    pub look: Look,
    pub split: Split,
    /// Ask for part of the nouns and for colours now and then, as programs do; else for all kinds.
    pub vary: bool,
}

impl Samples for RoomPictures {
    fn len(&self) -> Option<u64> {
        None
    }

    fn sample(&self, index: u64) -> anyhow::Result<Sample> {
        let scene = scene_seed(self.split, self.seed, self.from + index);
        let view = rooms::generate(scene, self.look, WIDTH, HEIGHT);
        let mut rng = ChaCha8Rng::seed_from_u64(scene);
        let kinds = |clear: bool| -> Vec<Kind> {
            let of = view.things.iter().filter(|t| t.is_clear() || !clear).map(|t| t.kind);
            let mut kinds: Vec<Kind> = of.collect();
            kinds.sort();
            kinds.dedup();
            kinds
        };
        let (seen, here) = (kinds(true), kinds(false));
        let mut asked = seen.clone();
        // One kind told apart by its colours.
        let coloured =
            if self.vary && rng.random::<f64>() < 0.25 { seen.choose(&mut rng).copied() } else { None };
        // As programs do: for one noun or a few. Else for every kind.
        let few = self.vary && rng.random::<f64>() < 0.6;
        if few {
            asked.shuffle(&mut rng);
            asked.truncate(rng.random_range(0..=2));
        }
        let noun = |t: &rooms::Thing| match coloured == Some(t.kind) {
            true => format!("{} {}", t.colour, t.kind),
            false => t.kind.to_string(),
        };
        let mut absent: Vec<String> =
            Kind::ALL.iter().filter(|k| !here.contains(k)).map(|k| k.to_string()).collect();
        if let Some(kind) = coloured {
            let is_there = |c: &Colour| view.things.iter().any(|t| t.kind == kind && t.colour == *c);
            let others = Colour::ALL.iter().filter(|c| !is_there(c));
            absent.extend(others.map(|c| format!("{c} {kind}")));
        }
        if few {
            absent.shuffle(&mut rng);
            absent.truncate(rng.random_range(usize::from(asked.is_empty())..=2));
        }
        let (mut boxes, mut nouns, mut ignore) = (Vec::new(), Vec::new(), Vec::new());
        for t in &view.things {
            if !t.is_clear() {
                ignore.push(Region { bbox: t.bbox, noun: Some(t.kind.to_string()) });
            } else if asked.contains(&t.kind) {
                boxes.push(t.bbox);
                nouns.push(noun(t));
            }
        }
        let picture = Picture::new(view.width, view.height, view.rgb);
        Ok(Sample { picture, boxes, nouns, absent, hard_negatives: Vec::new(), ignore })
    }
}

/// Kinds that all of a look's held-out pictures are asked for.
pub fn validation(seed: u64, look: Look, pictures: u64) -> Validation {
    let samples = RoomPictures { seed, from: HELD_OUT, look, split: Split::Train, vary: false };
    let nouns = Kind::ALL.iter().map(|k| k.to_string()).collect();
    Validation { samples: Box::new(samples), pictures, nouns }
}

fn train_config(o: &Options) -> TrainConfig {
    TrainConfig {
        seed: o.seed,
        batch: o.batch,
        schedule: Schedule {
            base: 4e-4,
            warmup: 200.min(o.steps / 10),
            warmup_from: 1e-5,
            decay: Decay::Cosine { total: o.steps, to: 1e-5 },
        },
        optimiser: AdamWConfig { weight_decay: 1e-4, max_grad_norm: Some(1.), ..Default::default() },
        muon: Some(5.),
        augment: Augment {
            flip: 0.5,
            crop: Some(Crop { probability: 0.5, least: 0.6, keep_aspect: true }),
            sizes: vec![SHORTEST],
        },
        max_nouns: Kind::ALL.len(),
        blanks: Blanks::Hyphen,
        ..Default::default()
    }
}

/// A trainer on fresh weights, or on those of the model that the options name.
pub fn trainer(o: &Options) -> anyhow::Result<GroundingTrainer> {
    let params = super::start(o.seed, o.from.as_deref())?;
    let cfg = config();
    let data = RoomPictures { seed: o.seed, from: 0, look: Look::Studio, split: Split::Train, vary: true };
    let held_out = validation(o.seed, Look::Studio, o.eval_pictures);
    let trainer = GroundingTrainer::new(
        params.clone(),
        &cfg,
        train_config(o),
        tokenizer()?,
        processor(),
        Box::new(data),
        Some(held_out),
    )?;
    super::check_complete(&params, o.from.as_deref(), None)?;
    if o.from.is_none() {
        init_offsets(&params, &cfg)?;
    }
    Ok(trainer)
}

/// Trains (or continues) and leaves `checkpoint.safetensors` and `metrics.jsonl` in the folder.
/// The final figures hold AP on both looks.
pub fn train(o: &Options) -> anyhow::Result<Metrics> {
    let mut trainer = trainer(o)?;
    let settings = json!({
        "rooms": rooms::VERSION, "model": config(), "train": train_config(o), "seed": o.seed, "steps": o.steps,
    });
    let settings = super::settings(settings, o.from.as_deref());
    let mut m = run::train(
        &mut trainer,
        &RunOptions {
            keep: 1,
            stop: None,
            dir: o.dir.clone(),
            steps: o.steps,
            resume: o.resume,
            save_every: 250,
            eval_every: o.eval_every,
            log_every: 20,
            settings,
            label: "detector".into(),
        },
    )?;
    let other = trainer.average_precision(&validation(o.seed, Look::LivedIn, o.eval_pictures))?;
    m.insert("ap50_lived_in".into(), json!(other.ap50));
    m.insert("ap_lived_in".into(), json!(other.ap));
    Ok(m)
}

/// Writes a run's network as a model folder: config, tokenizer, image processor, f16 weights.
pub fn export(run: &Path, out: &Path) -> anyhow::Result<()> {
    let p = processor();
    let mut cfg = config().to_json()?;
    cfg["rooms_version"] = rooms::VERSION.into();
    let preprocessor = json!({
        "image_processor_type": "GroundingDinoImageProcessor",
        "do_resize": true, "do_rescale": true, "do_normalize": true, "do_pad": true, "resample": 2,
        "size": {"shortest_edge": p.shortest, "longest_edge": p.longest},
        "image_mean": p.mean, "image_std": p.std,
    });
    let files = [
        ("config.json", cfg),
        ("tokenizer.json", tokenizer_file()),
        ("preprocessor_config.json", preprocessor),
    ];
    for (name, value) in files {
        write_atomic(&out.join(name), |w| writeln!(w, "{value:#}"))?;
    }
    super::export_weights(run, out, |_| true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_of_rooms_is_one_token() {
        let t = tokenizer().unwrap();
        let words = Kind::ALL.iter().map(|k| k.word()).chain(Colour::ALL.iter().map(|c| c.word()));
        for word in words {
            assert_eq!(t.encode(word).unwrap().len(), 3, "{word}");
        }
        let unknown = t.encode("chairs zebra").unwrap();
        assert!(!unknown.contains(&100), "letters stand in for unknown words: {unknown:?}");
        assert_eq!(config().text_config.vocab_size, t.vocab_size());
    }

    #[test]
    fn samples_repeat_and_never_deny_what_is_there() {
        let rooms = RoomPictures { seed: 3, from: 0, look: Look::Studio, split: Split::Train, vary: true };
        let mut coloured = 0;
        for i in 0..12 {
            let s = rooms.sample(i).unwrap();
            let again = rooms.sample(i).unwrap();
            assert_eq!((&s.picture, &s.boxes, &s.nouns), (&again.picture, &again.boxes, &again.nouns));
            assert!(!s.nouns.iter().any(|n| s.absent.contains(n)), "{:?} {:?}", s.nouns, s.absent);
            assert!(s.ignore.iter().all(|r| !s.absent.contains(r.noun.as_ref().unwrap())));
            let inside =
                |b: &[f64; 4]| b[0] >= 0. && b[2] <= WIDTH as f64 && b[1] >= 0. && b[3] <= HEIGHT as f64;
            assert!(s.boxes.iter().all(inside));
            coloured += s.nouns.iter().any(|n| n.contains(' ')) as u32;
        }
        assert!(coloured < 12);
    }
}
