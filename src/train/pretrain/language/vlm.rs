//! The embedded VLM: a small Qwen3-VL that answers what programs ask about crops and whole pictures.
//!
//! It saw both looks and every wording of [`crate::rooms::vqa`]. Boxes are jittered as a detector's
//! are, and crops grown as the `vqa` tool does.

use super::super::start;
use super::tokenizer::{FILLER, PICTURE, VISION_END, VISION_START};
use super::{HELD_OUT, Options, id, spread_embeddings, stream, text_format, tokenizer_of};
use crate::files::write_atomic;
use crate::llm::Message;
use crate::llm::engine::Network;
use crate::llm::format::ChatFormat;
use crate::llm::tokenizer::Tokenizer;
use crate::models::qwen3;
use crate::models::qwen3_vl::{Config, Mrope, Processor, Qwen3Vl, TextConfig, VisionConfig};
use crate::nn::optim::Group;
use crate::rooms::questions::{Split, scene_seed};
use crate::rooms::vqa::{CropAsk, VqaSample, parse_crop, vqa_samples};
use crate::rooms::{self, Look};
use crate::tools::real::crop;
use crate::tools::{BBox, Picture};
use crate::train::lm::{LmTrainee, Sample};
use crate::train::run::Metrics;
use image::RgbImage;
use rand::Rng;
use rand::seq::SliceRandom;
use rayon::prelude::*;
use serde_json::json;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Rendered size.
const WIDTH: u32 = 256;
const HEIGHT: u32 = 192;

/// Pictures of a step, half of them of each look.
const PICTURES: u64 = 8;
/// Of a picture's samples, one in so many is about the whole of it.
const WHOLE: usize = 4;

/// Share of its size by which each side of a box is moved at most.
const JITTER: f64 = 0.08;
/// The `vqa` tool's own (method.md 7).
const GROWTH: f64 = 0.25;

/// Held-out scenes come from far up in the training split, so that test scenes stay untouched.
const HELD_OUT_SCENES: u64 = 1 << 40;

impl Options {
    /// The run that made the embedded VLM.
    pub fn vlm(dir: PathBuf) -> Self {
        Self {
            dir,
            seed: 1,
            from: None,
            steps: 900,
            batch: 8,
            lr: 1.5e-3,
            resume: false,
            eval_every: 200,
            held_out: 48,
        }
    }
}

/// About 2 million parameters.
pub fn config(tokenizer: &Tokenizer) -> anyhow::Result<Config> {
    let hidden = 128;
    Ok(Config {
        text_config: TextConfig {
            decoder: qwen3::Config {
                vocab_size: tokenizer.vocab_size(),
                hidden_size: hidden,
                intermediate_size: 352,
                num_hidden_layers: 4,
                num_attention_heads: 4,
                num_key_value_heads: 2,
                head_dim: 32,
                max_position_embeddings: 1_024,
                rms_norm_eps: 1e-6,
                rope_theta: 1e4,
                tie_word_embeddings: false,
                attention_bias: false,
            },
            rope_scaling: Mrope {
                mrope_section: [6, 5, 5],
                mrope_interleaved: true,
                rope_type: "default".into(),
            },
        },
        vision_config: VisionConfig {
            depth: 4,
            hidden_size: 96,
            intermediate_size: 256,
            num_heads: 4,
            in_channels: 3,
            patch_size: 8,
            temporal_patch_size: 2,
            spatial_merge_size: 2,
            out_hidden_size: hidden,
            num_position_embeddings: 144,
            deepstack_visual_indexes: vec![1, 2],
            hidden_act: "gelu_pytorch_tanh".into(),
        },
        image_token_id: id(tokenizer, PICTURE)?,
        vision_start_token_id: id(tokenizer, VISION_START)?,
        vision_end_token_id: id(tokenizer, VISION_END)?,
        tie_word_embeddings: false,
    })
}

/// Crops become 16 tokens or more, the whole picture 88.
pub fn processor() -> Processor {
    Processor {
        patch_size: 8,
        temporal_patch_size: 2,
        merge_size: 2,
        image_mean: [0.5; 3],
        image_std: [0.5; 3],
        min_pixels: 64 * 64,
        max_pixels: 192 * 128,
    }
}

fn format(tokenizer: &str) -> anyhow::Result<ChatFormat> {
    let format = text_format(tokenizer)?;
    let token = id(&format.tokenizer, PICTURE)?;
    Ok(format.with_pictures(processor(), token))
}

/// What the VLM is shown of a box.
fn shown(picture: &Picture, bbox: Option<BBox>) -> RgbImage {
    let seen = crop(picture, bbox, GROWTH);
    RgbImage::from_raw(seen.width(), seen.height(), seen.rgb().to_vec()).expect("three bytes a pixel")
}

fn jittered([x1, y1, x2, y2]: BBox, rng: &mut impl Rng) -> BBox {
    let (w, h) = (x2 - x1, y2 - y1);
    let mut by = |side: f64| rng.random_range(-JITTER..=JITTER) * side;
    [x1 + by(w), y1 + by(h), x2 + by(w), y2 + by(h)]
}

/// Picture and questions of the training scene `index`; every other scene is lived-in.
pub fn questions(seed: u64, index: u64, rng: &mut impl Rng) -> (Picture, Vec<VqaSample>) {
    let look = if index.is_multiple_of(2) { Look::Studio } else { Look::LivedIn };
    let view = rooms::generate(scene_seed(Split::Train, seed, index), look, WIDTH, HEIGHT);
    let mut samples = vqa_samples(&view, rng);
    samples.shuffle(rng);
    (Picture::new(view.width, view.height, view.rgb), samples)
}

fn sample(
    format: &ChatFormat,
    picture: &Picture,
    (bbox, question, answer): &VqaSample,
    rng: &mut impl Rng,
) -> anyhow::Result<Sample> {
    let image = shown(picture, bbox.map(|b| jittered(b, rng)));
    Ok(Sample::new(format, &[Message::user(question.clone()).with_images(vec![image])], answer)?)
}

/// `n` samples of a training scene, one in [`WHOLE`] about the whole picture.
fn samples(format: &ChatFormat, o: &Options, index: u64, n: usize) -> anyhow::Result<Vec<Sample>> {
    let mut rng = stream(o.seed, index);
    let (picture, questions) = questions(o.seed, index, &mut rng);
    let (whole, crops): (Vec<_>, Vec<_>) = questions.iter().partition(|q| q.0.is_none());
    let chosen = whole.into_iter().take(n / WHOLE).chain(crops.into_iter().take(n - n / WHOLE));
    chosen.map(|q| sample(format, &picture, q, &mut rng)).collect()
}

/// What a question is about, as figures name it.
fn name_of((bbox, question, _): &VqaSample) -> &'static str {
    if bbox.is_none() {
        return "whole";
    }
    match parse_crop(question) {
        Some(CropAsk::Colour) => "crop_colour",
        Some(CropAsk::ColourFrom(_)) => "crop_colour_from",
        Some(CropAsk::Kind) => "crop_kind",
        Some(CropAsk::IsColour(_)) => "crop_is_colour",
        Some(CropAsk::IsKind(_)) => "crop_is_kind",
        None => "crop_other",
    }
}

/// Held-out samples by what they ask, `o.held_out` of each where the scenes give as many.
fn held_out(format: &ChatFormat, o: &Options) -> anyhow::Result<BTreeMap<&'static str, Vec<Sample>>> {
    let mut rng = stream(o.seed, HELD_OUT);
    let mut by_name: BTreeMap<&'static str, Vec<Sample>> = BTreeMap::new();
    // A scene gives several samples of each name; a few of each, so that scenes are many.
    let each = 4;
    for i in 0..o.held_out.div_ceil(each) as u64 {
        let (picture, questions) = questions(o.seed, HELD_OUT_SCENES + i, &mut rng);
        let mut taken: BTreeMap<&str, usize> = BTreeMap::new();
        for q in &questions {
            let taken = taken.entry(name_of(q)).or_default();
            if *taken < each {
                *taken += 1;
                by_name.entry(name_of(q)).or_default().push(sample(format, &picture, q, &mut rng)?);
            }
        }
    }
    Ok(by_name)
}

/// Trains (or continues). `NAME_replies_right` is the share of held-out questions that are answered
/// rightly, by what they ask.
pub fn train(o: &Options) -> anyhow::Result<Metrics> {
    let format = format(&tokenizer_of(&o.dir, o.from.as_deref())?)?;
    let cfg = config(&format.tokenizer)?;
    let params = start(o.seed, o.from.as_deref())?;
    let network = Network::Vision(Qwen3Vl::new(&cfg, params.builder())?);
    if o.from.is_none() {
        spread_embeddings(&params)?;
    }
    let held_out = held_out(&format, o)?;
    let source = Box::new(|step| {
        let first = step * PICTURES;
        let made: Vec<Vec<Sample>> = (first..first + PICTURES)
            .into_par_iter()
            .map(|i| samples(&format, o, i, o.batch))
            .collect::<anyhow::Result<_>>()?;
        Ok(made.into_iter().flatten().collect())
    });
    let group = |_: &str, v: &candle_core::Var| Some(Group::usual(v));
    let mut trainee = LmTrainee::new(network, params, o.lm(), group, source, Vec::new())?;
    for (name, samples) in held_out {
        trainee = trainee.also_held_out(name, samples);
    }
    o.train(&mut trainee, "vlm", serde_json::to_value(cfg)?)
}

/// Writes a run's network as a model folder.
pub fn export(run: &Path, out: &Path) -> anyhow::Result<()> {
    let tokenizer = Tokenizer::from_bytes(tokenizer_of(run, None)?.as_bytes())?;
    let filler = id(&tokenizer, FILLER)?;
    let mut cfg = serde_json::to_value(config(&tokenizer)?)?;
    cfg["text_config"]["model_type"] = json!("qwen3_vl_text");
    cfg["text_config"]["pad_token_id"] = json!(filler);
    cfg["vision_config"]["model_type"] = json!("qwen3_vl");
    let mut preprocessor = serde_json::to_value(processor())?;
    preprocessor["image_processor_type"] = json!("Qwen2VLImageProcessorFast");
    write_atomic(&out.join("preprocessor_config.json"), |w| writeln!(w, "{preprocessor:#}"))?;
    super::export(run, out, cfg, "qwen3_vl")
}
