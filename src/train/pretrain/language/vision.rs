//! The embedded VLM's vision tower, before it is joined to the decoder: it learns to tell the kind and
//! the colour of the thing in a crop, by two linear heads on what its mergers give, averaged over a
//! picture.
//!
//! Through the decoder a tower of this size learns the same at a third of the crops per second, and
//! only once the decoder has found where to look: after 60,000 crops it could not name kinds.
//! [`super::vlm`] starts from the run's tower; the heads are dropped.

use super::super::set_positions;
use super::vlm::{CROPS, config, processor, shown_thing};
use super::{Options, stream, text_format, tokenizer_of};
use crate::models::qwen3_vl::{Features, Pictures, Processor, VisionConfig, VisionTower};
use crate::nn::optim::{AdamW, Group};
use crate::nn::{self, Linear, Params};
use crate::rooms::questions::{Split, scene_seed};
use crate::rooms::{self, Colour, Kind, Look};
use crate::tools::Picture;
use crate::train::run::{Metrics, Trainee};
use anyhow::Context;
use candle_core::{D, Device, Tensor};
use image::RgbImage;
use rand::seq::SliceRandom;
use rayon::prelude::*;
use serde_json::json;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Pictures of a step, half of them of each look.
const PICTURES: u64 = 12;

/// Fresh mergers give pictures a size of about 0.2; token embeddings have 1.
const MERGER_GAIN: f64 = 5.;

/// Held-out scenes come from far up in the training split, so that test scenes stay untouched.
const HELD_OUT_SCENES: u64 = 1 << 41;

impl Options {
    /// The run that made the embedded VLM's tower.
    pub fn vision(dir: PathBuf) -> Self {
        Self { steps: 1_200, batch: CROPS, held_out: 96, ..Self::vlm(dir) }
    }
}

/// A crop with the kind and the colour of its thing, by their number.
type Crop = (RgbImage, u32, u32);

/// Crops of clear things of the training scene `index`, at most `n`.
fn crops(seed: u64, index: u64, n: usize) -> Vec<Crop> {
    let look = if index.is_multiple_of(2) { Look::Studio } else { Look::LivedIn };
    let view =
        rooms::generate(scene_seed(Split::Train, seed, index), look, super::vlm::WIDTH, super::vlm::HEIGHT);
    let mut rng = stream(seed, index);
    let mut clear: Vec<_> = view.things.iter().filter(|t| t.is_clear()).collect();
    clear.shuffle(&mut rng);
    let picture = Picture::new(view.width, view.height, view.rgb.clone());
    let number = |t: &rooms::Thing| {
        let kind = Kind::ALL.iter().position(|k| *k == t.kind).expect("all kinds");
        (kind as u32, Colour::ALL.iter().position(|c| *c == t.colour).expect("all colours") as u32)
    };
    let crop = |t: &rooms::Thing| (shown_thing(&picture, t.bbox, &mut rng), number(t).0, number(t).1);
    clear.into_iter().take(n).map(crop).collect()
}

struct VisionTrainee {
    cfg: VisionConfig,
    tower: VisionTower,
    kind: Linear,
    colour: Linear,
    params: Params,
    optimiser: AdamW,
    processor: Processor,
    o: Options,
    /// By look, as figures name it.
    held_out: Vec<(&'static str, Vec<Crop>)>,
}

impl VisionTrainee {
    fn new(o: &Options) -> anyhow::Result<Self> {
        let params = super::super::start(o.seed, o.from.as_deref())?;
        let cfg = config(&text_format(&tokenizer_of(&o.dir, o.from.as_deref())?)?.tokenizer)?.vision_config;
        let vb = params.builder();
        let tower = VisionTower::new(&cfg, vb.pp("model.visual"))?;
        let head = |n: usize, name: &str| nn::linear(cfg.out_hidden_size, n, vb.pp("recognise").pp(name));
        let (kind, colour) = (head(Kind::ALL.len(), "kind")?, head(Colour::ALL.len(), "colour")?);
        if o.from.is_none() {
            set_positions(&params, "model.visual.pos_embed.weight", 0)?;
            spread_pictures(&params)?;
        }
        let optimiser = AdamW::new(params.named(), o.lm().adamw, |_, v| Some(Group::usual(v)))?;
        let mut held_out = Vec::new();
        for (parity, look) in [(0, "studio"), (1, "lived_in")] {
            let scenes = (0..).map(|i| HELD_OUT_SCENES + 2 * i + parity);
            held_out.push((look, scenes.flat_map(|i| crops(o.seed, i, o.batch)).take(o.held_out).collect()));
        }
        Ok(Self {
            cfg,
            tower,
            kind,
            colour,
            params,
            optimiser,
            processor: processor(),
            o: o.clone(),
            held_out,
        })
    }

    /// Logits of kind and colour, a row per crop.
    fn logits(&self, crops: &[Crop]) -> anyhow::Result<(Tensor, Tensor)> {
        let images: Vec<RgbImage> = crops.iter().map(|c| c.0.clone()).collect();
        let pictures = self.processor.process(&images, &Device::Cpu)?;
        let seen = pooled(
            &self.tower.forward(&pictures.patches, &pictures.grids)?,
            &pictures,
            self.processor.merge_size,
        )?;
        Ok((self.kind.forward(&seen)?, self.colour.forward(&seen)?))
    }
}

/// What the tower hands to the decoder, averaged over each picture's tokens: `[pictures, hidden]`.
fn pooled(features: &Features, pictures: &Pictures, merge: usize) -> candle_core::Result<Tensor> {
    let tokens: Vec<usize> =
        pictures.grids.iter().map(|g| g.iter().product::<usize>() / (merge * merge)).collect();
    let all: usize = tokens.iter().sum();
    let mut mean = vec![0f32; tokens.len() * all];
    let mut from = 0;
    for (i, n) in tokens.iter().enumerate() {
        mean[i * all + from..i * all + from + n].fill(1. / *n as f32);
        from += n;
    }
    let mut sum = features.embeds.clone();
    for layer in &features.deepstack {
        sum = (sum + layer)?;
    }
    Tensor::from_vec(mean, (tokens.len(), all), &Device::Cpu)?.matmul(&sum)
}

impl Trainee for VisionTrainee {
    fn params(&self) -> &Params {
        &self.params
    }

    fn optimiser_state(&self) -> candle_core::Result<HashMap<String, Tensor>> {
        self.optimiser.state()
    }

    fn restore(&mut self, state: HashMap<String, Tensor>, _: u64) -> candle_core::Result<()> {
        self.optimiser.restore(&state)
    }

    fn step(&mut self, step: u64) -> anyhow::Result<Metrics> {
        let first = step * PICTURES;
        let made: Vec<Vec<Crop>> =
            (first..first + PICTURES).into_par_iter().map(|i| crops(self.o.seed, i, self.o.batch)).collect();
        let crops = made.concat();
        anyhow::ensure!(!crops.is_empty(), "step {step}: nothing clear to be seen");
        let (kind, colour) = self.logits(&crops)?;
        let targets = |of: fn(&Crop) -> u32| Tensor::from_iter(crops.iter().map(of), &Device::Cpu);
        let kind = nn::log_probs(&kind, &targets(|c| c.1)?)?.mean_all()?.neg()?;
        let colour = nn::log_probs(&colour, &targets(|c| c.2)?)?.mean_all()?.neg()?;
        let loss = (&kind + &colour)?;
        self.optimiser.accumulate(&loss.backward()?, 1.)?;
        let lr = self.o.lm().schedule.lr(step);
        let report = self.optimiser.step(lr)?;
        Ok(Metrics::from_iter([
            ("loss".to_string(), json!(loss.to_scalar::<f32>()?)),
            ("kind".into(), json!(kind.to_scalar::<f32>()?)),
            ("colour".into(), json!(colour.to_scalar::<f32>()?)),
            ("crops".into(), json!(crops.len())),
            ("lr".into(), json!(lr)),
            ("grad_norm".into(), json!(report.grad_norm)),
        ]))
    }

    /// The shares of held-out crops whose kind and whose colour comes first.
    fn evaluate(&mut self) -> anyhow::Result<Metrics> {
        let mut m = Metrics::new();
        for (look, crops) in &self.held_out {
            let (mut kinds, mut colours) = (0, 0);
            for some in crops.chunks(32) {
                let (kind, colour) = self.logits(some)?;
                let best = |t: Tensor| t.argmax(D::Minus1)?.to_vec1::<u32>();
                kinds += some.iter().zip(best(kind)?).filter(|(c, b)| c.1 == *b).count();
                colours += some.iter().zip(best(colour)?).filter(|(c, b)| c.2 == *b).count();
            }
            let n = crops.len() as f64;
            m.insert(format!("kind_right_{}", look), json!(kinds as f64 / n));
            m.insert(format!("colour_right_{}", look), json!(colours as f64 / n));
        }
        Ok(m)
    }
}

/// Gives the fresh mergers' outputs the size of the token embeddings, so that pictures are not drowned
/// in the decoder's first layers (see [`super::spread_embeddings`]).
fn spread_pictures(params: &Params) -> anyhow::Result<()> {
    let name = "model.visual.merger.linear_fc2.weight";
    let weight = params.get(name).with_context(|| format!("no parameter {name}"))?;
    weight.set(&(weight.as_tensor() * MERGER_GAIN)?)?;
    Ok(())
}

/// Trains (or continues).
pub fn train(o: &Options) -> anyhow::Result<Metrics> {
    let mut trainee = VisionTrainee::new(o)?;
    let cfg = trainee.cfg.clone();
    o.train(&mut trainee, "vision", json!({ "tower": cfg, "processor": processor(), "pictures": PICTURES }))
}

/// The tower of a run, by the VLM's names.
pub fn tower(run: &Path) -> anyhow::Result<HashMap<String, Tensor>> {
    let all = crate::train::run::parameters(&run.join("checkpoint.safetensors")).with_context(|| {
        format!("the VLM starts from the vision tower's run, and {} has none: make it first", run.display())
    })?;
    Ok(all.into_iter().filter(|(name, _)| name.starts_with("model.visual.")).collect())
}
