//! The embedded VLM's vision tower, before it is joined to the decoder: it learns to tell the kind and
//! the colour of the thing in a crop, by linear heads on what its mergers give, averaged over the crop;
//! and of whole pictures, what is to be seen at each of their tokens.
//!
//! Through the decoder a tower of this size learns the same at half of the crops per second, and only
//! once the decoder has found where to look: after 60,000 crops it named a third of the kinds, where
//! these heads name 63 % after 37,000.
//! [`super::vlm`] starts from the run's tower; the heads are dropped.

use super::super::set_positions;
use super::vlm::{CROPS, config, processor, shown_thing};
use super::{Options, stream, text_format, tokenizer_of};
use crate::models::qwen3_vl::{Grid, Processor, VisionConfig, VisionTower};
use crate::nn::optim::AdamW;
use crate::nn::{self, Linear, Params};
use crate::rooms::questions::{Split, scene_seed};
use crate::rooms::{self, Colour, Kind, Look, View};
use crate::sight::Picture;
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

/// One in so many of them is looked at as a whole too.
const WHOLE: u64 = 2;

/// Fresh mergers give pictures a size of about 0.2; token embeddings have 1.
const MERGER_GAIN: f64 = 5.;

/// Held-out scenes come from far up in the training split, so that test scenes stay untouched.
const HELD_OUT_SCENES: u64 = 1 << 41;

impl Options {
    /// The run that made the embedded VLM's tower.
    pub fn vision(dir: PathBuf) -> Self {
        Self { steps: 3_200, batch: CROPS, held_out: 96, ..Self::vlm(dir) }
    }
}

/// Of the heads' parameters.
pub(in super::super) const HEADS: &str = "recognise";

/// A crop with the kind and the colour of its thing, by their number.
type Crop = (RgbImage, u32, u32);

/// A whole picture with what is to be seen at each of its tokens: the shares of the token's pixels that
/// each kind has, and each colour; the last of either is what no thing has.
struct Whole {
    image: RgbImage,
    kinds: Vec<[f32; KINDS]>,
    colours: Vec<[f32; COLOURS]>,
}

const KINDS: usize = Kind::ALL.len() + 1;
const COLOURS: usize = Colour::ALL.len() + 1;

fn number(t: &rooms::Thing) -> (usize, usize) {
    let kind = Kind::ALL.iter().position(|k| *k == t.kind).expect("all kinds");
    (kind, Colour::ALL.iter().position(|c| *c == t.colour).expect("all colours"))
}

fn whole(view: &View, processor: &Processor) -> candle_core::Result<Whole> {
    let (w, h) = (view.width as usize, view.height as usize);
    let token = processor.patch_size * processor.merge_size;
    let (rows, cols) = processor.target_size(h, w).map(|(h, w)| (h / token, w / token))?;
    let mut pixels = vec![0f32; rows * cols];
    let (mut kinds, mut colours) = (vec![[0f32; KINDS]; rows * cols], vec![[0f32; COLOURS]; rows * cols]);
    let things: HashMap<u16, (usize, usize)> = view.things.iter().map(|t| (t.id, number(t))).collect();
    for (i, id) in view.ids.iter().enumerate() {
        let at = i / w * rows / h * cols + i % w * cols / w;
        let (kind, colour) = things.get(id).copied().unwrap_or((KINDS - 1, COLOURS - 1));
        kinds[at][kind] += 1.;
        colours[at][colour] += 1.;
        pixels[at] += 1.;
    }
    for (at, n) in pixels.iter().enumerate() {
        kinds[at].iter_mut().chain(&mut colours[at]).for_each(|share| *share /= n);
    }
    let image = RgbImage::from_raw(view.width, view.height, view.rgb.clone()).expect("three bytes a pixel");
    Ok(Whole { image, kinds, colours })
}

/// Some of a training scene's clear things, and now and then the whole of it.
fn look(o: &Options, index: u64, processor: &Processor) -> candle_core::Result<(Vec<Crop>, Option<Whole>)> {
    let look = if index.is_multiple_of(2) { Look::Studio } else { Look::LivedIn };
    let (w, h) = (super::vlm::WIDTH, super::vlm::HEIGHT);
    let view = rooms::generate(scene_seed(Split::Train, o.seed, index), look, w, h);
    let mut rng = stream(o.seed, index);
    let mut clear: Vec<_> = view.things.iter().filter(|t| t.is_clear()).collect();
    clear.shuffle(&mut rng);
    let picture = Picture::new(view.width, view.height, view.rgb.clone());
    let crop = |t: &rooms::Thing| {
        let (kind, colour) = number(t);
        (shown_thing(&picture, t.bbox, &mut rng), kind as u32, colour as u32)
    };
    let crops = clear.into_iter().take(o.batch).map(crop).collect();
    // Looks alternate; of each, one in `WHOLE`.
    let whole = (index / 2).is_multiple_of(WHOLE).then(|| whole(&view, processor)).transpose()?;
    Ok((crops, whole))
}

/// What was looked at in several scenes.
#[derive(Default)]
struct Looked {
    crops: Vec<Crop>,
    wholes: Vec<Whole>,
}

impl Looked {
    fn at(scenes: Vec<(Vec<Crop>, Option<Whole>)>) -> Self {
        let (crops, wholes): (Vec<_>, Vec<_>) = scenes.into_iter().unzip();
        Self { crops: crops.concat(), wholes: wholes.into_iter().flatten().collect() }
    }
}

/// Linear heads that the VLM does not have.
struct Heads {
    kind: Linear,
    colour: Linear,
    kind_here: Linear,
    colour_here: Linear,
}

/// Logits: a row per crop, and a row per token of a whole picture.
struct Logits {
    kind: Tensor,
    colour: Tensor,
    here: Option<(Tensor, Tensor)>,
}

struct VisionTrainee {
    cfg: VisionConfig,
    tower: VisionTower,
    heads: Heads,
    params: Params,
    optimiser: AdamW,
    processor: Processor,
    o: Options,
    /// By look, as figures name it.
    held_out: Vec<(&'static str, Looked)>,
}

impl VisionTrainee {
    fn new(o: &Options) -> anyhow::Result<Self> {
        let params = super::super::start(o.seed, o.from.as_deref())?;
        let cfg = config(&text_format(&tokenizer_of(&o.dir, o.from.as_deref())?)?.tokenizer)?.vision_config;
        let vb = params.builder();
        let tower = VisionTower::new(&cfg, vb.pp("model.visual"))?;
        let head = |n: usize, name: &str| nn::linear(cfg.out_hidden_size, n, vb.pp(HEADS).pp(name));
        let heads = Heads {
            kind: head(Kind::ALL.len(), "kind")?,
            colour: head(Colour::ALL.len(), "colour")?,
            kind_here: head(KINDS, "kind_here")?,
            colour_here: head(COLOURS, "colour_here")?,
        };
        super::super::check_complete(&params, o.from.as_deref(), Some(HEADS))?;
        if o.from.is_none() {
            set_positions(&params, "model.visual.pos_embed.weight", 0)?;
            spread_pictures(&params)?;
        }
        let optimiser = AdamW::new(params.named(), o.lm().adamw, super::super::group(o.muon))?;
        let processor = processor();
        let mut held_out = Vec::new();
        for (parity, name) in [(0, "studio"), (1, "lived_in")] {
            let mut looked = Looked::default();
            for scene in (HELD_OUT_SCENES..).filter(|i| i % 2 == parity) {
                let (crops, whole) = look(o, scene, &processor)?;
                looked.crops.extend(crops);
                looked.wholes.extend(whole);
                if looked.crops.len() >= o.held_out {
                    break;
                }
            }
            looked.crops.truncate(o.held_out);
            held_out.push((name, looked));
        }
        Ok(Self { cfg, tower, heads, params, optimiser, processor, o: o.clone(), held_out })
    }

    fn logits(&self, crops: &[Crop], wholes: &[Whole]) -> anyhow::Result<Logits> {
        let images: Vec<RgbImage> =
            crops.iter().map(|c| &c.0).chain(wholes.iter().map(|w| &w.image)).cloned().collect();
        let pictures = self.processor.process(&images, &Device::Cpu)?;
        let features = self.tower.forward(&pictures.patches, &pictures.grids)?;
        // What the tower hands to the decoder, there at different layers.
        let mut seen = features.embeds.clone();
        for layer in &features.deepstack {
            seen = (seen + layer)?;
        }
        let merged = self.processor.merge_size.pow(2);
        let tokens = |pictures: &[Grid]| -> Vec<usize> {
            pictures.iter().map(|g| g.iter().product::<usize>() / merged).collect()
        };
        let (of_crops, of_wholes) = pictures.grids.split_at(crops.len());
        let of_crops = tokens(of_crops);
        let (n, rest) = (of_crops.iter().sum::<usize>(), tokens(of_wholes).iter().sum::<usize>());
        let crop = averages(&of_crops)?.matmul(&seen.narrow(0, 0, n)?.contiguous()?)?;
        let here = (rest > 0).then(|| seen.narrow(0, n, rest)).transpose()?;
        let h = &self.heads;
        Ok(Logits {
            kind: h.kind.forward(&crop)?,
            colour: h.colour.forward(&crop)?,
            here: here
                .map(|t| Ok::<_, candle_core::Error>((h.kind_here.forward(&t)?, h.colour_here.forward(&t)?)))
                .transpose()?,
        })
    }
}

/// Averages pictures of so many tokens: `[pictures, all tokens]`.
fn averages(tokens: &[usize]) -> candle_core::Result<Tensor> {
    let all: usize = tokens.iter().sum();
    let mut mean = vec![0f32; tokens.len() * all];
    let mut from = 0;
    for (i, n) in tokens.iter().enumerate() {
        mean[i * all + from..i * all + from + n].fill(1. / *n as f32);
        from += n;
    }
    Tensor::from_vec(mean, (tokens.len(), all), &Device::Cpu)
}

/// Mean cross-entropy with shares instead of one right class.
fn off_shares<const N: usize>(
    logits: &Tensor,
    shares: impl Iterator<Item = [f32; N]>,
) -> candle_core::Result<Tensor> {
    let shares = Tensor::from_iter(shares.flatten(), logits.device())?.reshape(logits.shape())?;
    (candle_nn::ops::log_softmax(logits, D::Minus1)? * shares)?.sum(D::Minus1)?.mean_all()?.neg()
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
        let made = (first..first + PICTURES)
            .into_par_iter()
            .map(|i| look(&self.o, i, &self.processor))
            .collect::<candle_core::Result<Vec<_>>>()?;
        let Looked { crops, wholes } = Looked::at(made);
        anyhow::ensure!(!crops.is_empty(), "step {step}: nothing clear to be seen");
        let logits = self.logits(&crops, &wholes)?;
        let targets = |of: fn(&Crop) -> u32| Tensor::from_iter(crops.iter().map(of), &Device::Cpu);
        let kind = nn::log_probs(&logits.kind, &targets(|c| c.1)?)?.mean_all()?.neg()?;
        let colour = nn::log_probs(&logits.colour, &targets(|c| c.2)?)?.mean_all()?.neg()?;
        let mut loss = (&kind + &colour)?;
        let mut here = None;
        if let Some((kinds, colours)) = &logits.here {
            let of_kinds = off_shares(kinds, wholes.iter().flat_map(|w| w.kinds.iter().copied()))?;
            let of_colours = off_shares(colours, wholes.iter().flat_map(|w| w.colours.iter().copied()))?;
            let both = (of_kinds + of_colours)?;
            here = Some(both.to_scalar::<f32>()?);
            loss = (loss + both)?;
        }
        self.optimiser.accumulate(&loss.backward()?, 1.)?;
        let lr = self.o.lm().schedule.lr(step);
        let report = self.optimiser.step(lr)?;
        Ok(Metrics::from_iter([
            ("loss".to_string(), json!(loss.to_scalar::<f32>()?)),
            ("kind".into(), json!(kind.to_scalar::<f32>()?)),
            ("colour".into(), json!(colour.to_scalar::<f32>()?)),
            ("here".into(), json!(here)),
            ("crops".into(), json!(crops.len())),
            ("lr".into(), json!(lr)),
            ("grad_norm".into(), json!(report.grad_norm)),
        ]))
    }

    /// The shares of held-out crops whose kind and whose colour comes first, and of the tokens that lie
    /// mostly on a thing, of those whose kind does.
    fn evaluate(&mut self) -> anyhow::Result<Metrics> {
        let best = |t: &Tensor| t.argmax(D::Minus1)?.to_vec1::<u32>();
        let mut m = Metrics::new();
        for (name, looked) in &self.held_out {
            let (mut kinds, mut colours) = (0, 0);
            for some in looked.crops.chunks(32) {
                let l = self.logits(some, &[])?;
                kinds += some.iter().zip(best(&l.kind)?).filter(|(c, b)| c.1 == *b).count();
                colours += some.iter().zip(best(&l.colour)?).filter(|(c, b)| c.2 == *b).count();
            }
            let n = looked.crops.len() as f64;
            m.insert(format!("kind_right_{name}"), json!(kinds as f64 / n));
            m.insert(format!("colour_right_{name}"), json!(colours as f64 / n));
            let (mut tokens, mut right) = (0usize, 0usize);
            for whole in looked.wholes.chunks(4) {
                let Some((kinds, _)) = self.logits(&looked.crops[..1], whole)?.here else { continue };
                for (shares, best) in whole.iter().flat_map(|w| &w.kinds).zip(best(&kinds)?) {
                    let thing = shares[..KINDS - 1].iter().position(|share| *share > 0.5);
                    tokens += usize::from(thing.is_some());
                    right += usize::from(thing == Some(best as usize));
                }
            }
            m.insert(format!("tokens_right_{name}"), json!(right as f64 / tokens.max(1) as f64));
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
    o.train(
        &mut trainee,
        "vision",
        json!({ "tower": cfg, "processor": processor(), "pictures": PICTURES, "one_in_whole": WHOLE }),
    )
}

/// What a run hands on, by the VLM's names: the tower, and the decoder too if the run went on from a
/// whole VLM.
pub fn tower(run: &Path) -> anyhow::Result<HashMap<String, Tensor>> {
    let mut all = crate::train::run::parameters(run)?.with_context(|| {
        format!("the VLM starts from the vision tower's run, and {} has none: make it first", run.display())
    })?;
    all.retain(|name, _| !name.starts_with(HEADS));
    Ok(all)
}
