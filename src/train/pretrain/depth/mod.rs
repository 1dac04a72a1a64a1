//! The embedded depth model: a small MoGe-2 trained from nothing on Rooms.
//!
//! Pictures of both looks are rendered as they are needed; no scene is seen twice, none of the
//! test split ever. A run has stages. In the first only the encoder learns, on many small pictures,
//! by linear heads that the finished model does not have: its class token and each patch tell the
//! camera; each patch also tells of its quarters which way lines run through them, how far away they
//! are, which way they face and what stands there. (Through the maps alone it had not found the camera
//! after 12,000 pictures, and metric depth hangs on that: half the field of view is twice the distance
//! of a thing of known size. What things are, the released encoder brings from DINOv2.) Then the same
//! on pictures of full size, of which it is shown half the patches: a picture has one camera to tell,
//! however many of its patches are looked at, and pictures go by 2.8 times as fast (21 a second where it was
//! 7.6, on two cores; over 60 steps the camera's loss was no higher). Then whole ones; then the maps, with
//! the encoder's own losses still beside them, and at last the maps above all: what the encoder knows of the
//! camera, the maps and the scale have to make use of.
//! Everything follows from the seed and the step, so a resumed run is the same run.

mod encoder;

use super::super::depth::{
    DepthBatch, DepthLoss, DepthLossWeights, DepthSample, check_trainable, depth_loss,
};
use super::super::run::{Metrics, RunOptions, Trainee, train};
use crate::eval::depth::{abs_rel, abs_rel_aligned};
use crate::files::write_atomic;
use crate::models::dinov2::OfficialConfig;
use crate::models::moge::{
    Activation, Config, EncoderConfig, Layers, MoGe, ModelConfig, Norm, PerLevel, Remap, Resampler,
    ScaleConfig, StackConfig, Tokens,
};
use crate::nn::Params;
use crate::nn::lanes::Lanes;
use crate::nn::optim::{AdamW, AdamWConfig, Decay, Schedule};
use crate::rooms::questions::{Split, scene_seed};
use crate::rooms::{self, Look, View};
use candle_core::Tensor;
pub use encoder::EncoderWeights;
use encoder::{EncoderLosses, Heads, Shown};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A part of a run. Its learning rate starts anew.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    pub steps: u64,
    pub batch: usize,
    /// Size of the pictures.
    pub width: u32,
    pub height: u32,
    pub tokens: usize,
    pub lr: f64,
    /// How much the losses of maps and scale count beside the encoder's own; 0: the encoder is trained alone.
    pub maps: f64,
    /// Patches of a picture that the encoder is not shown, drawn anew for each lane of a step. Maps need all.
    pub hidden: usize,
}

impl Stage {
    /// The patches of `all` that the encoder is shown, drawn from `seed`; none: all of them.
    fn kept(&self, all: usize, seed: u64) -> Option<Vec<u32>> {
        if self.hidden == 0 {
            return None;
        }
        assert!(self.maps == 0. && self.hidden < all, "{} patches of {all} hidden", self.hidden);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut kept = rand::seq::index::sample(&mut rng, all, all - self.hidden).into_vec();
        kept.sort_unstable();
        Some(kept.into_iter().map(|i| i as u32).collect())
    }
}

/// Settings of a run; with the step number they determine it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DepthTraining {
    pub seed: u64,
    /// A model folder to go on from, in place of fresh parameters.
    #[serde(skip)]
    pub from: Option<PathBuf>,
    pub stages: Vec<Stage>,
    /// Steps of warm-up at the beginning of each stage.
    pub warmup: u64,
    pub weight_decay: f64,
    /// How much faster the matrices between layers learn (by Muon).
    pub muon: f64,
    pub loss: DepthLossWeights,
    pub encoder: EncoderWeights,
    /// Parts of a batch that are worked on side by side.
    pub lanes: usize,
    /// Held-out pictures per look, of the last stage's size.
    pub eval_pictures: u64,
}

impl Default for DepthTraining {
    fn default() -> Self {
        let (width, height, tokens) = (256, 192, GRID[0] * GRID[1]);
        let small = Stage {
            steps: 6_000,
            batch: 32,
            width: width / 2,
            height: height / 2,
            tokens: tokens / 4,
            lr: 5e-4,
            maps: 0.,
            hidden: 0,
        };
        let half =
            Stage { steps: 8_000, batch: 24, width, height, tokens, lr: 6e-4, hidden: tokens / 2, ..small };
        let encoder = Stage { steps: 2_000, batch: 16, lr: 4e-4, hidden: 0, ..half };
        let whole = Stage { steps: 7_000, batch: 12, lr: 3e-4, maps: 1., ..encoder };
        let maps = Stage { steps: 1_000, lr: 2e-4, maps: 4., ..whole };
        let stages = vec![small, half, encoder, whole, maps];
        Self {
            seed: 1,
            from: None,
            stages,
            warmup: 100,
            weight_decay: 0.02,
            muon: 6.,
            loss: DepthLossWeights::default(),
            encoder: EncoderWeights::default(),
            lanes: 2,
            eval_pictures: 24,
        }
    }
}

impl DepthTraining {
    /// Only these stages, counted from 1.
    pub fn of_stages(mut self, numbers: &[usize]) -> anyhow::Result<Self> {
        let of = |n: &usize| n.checked_sub(1).and_then(|i| self.stages.get(i).copied());
        let chosen: Option<Vec<Stage>> = numbers.iter().map(of).collect();
        let Some(chosen) = chosen.filter(|s| !s.is_empty()) else {
            anyhow::bail!(
                "--stages {numbers:?}: the depth model's recipe has stages 1 to {}",
                self.stages.len()
            )
        };
        self.stages = chosen;
        Ok(self)
    }

    /// Without the first stage: a model that is gone on from has no more to learn from small pictures.
    pub fn after_small_pictures(mut self) -> Self {
        self.stages.remove(0);
        self
    }

    /// The same in `steps` steps, stages in their proportion.
    pub fn in_steps(mut self, steps: u64) -> Self {
        let (all, mut left) = (self.steps(), steps);
        let last = self.stages.len() - 1;
        for (i, stage) in self.stages.iter_mut().enumerate() {
            stage.steps = if i == last { left } else { (stage.steps * steps / all).min(left) };
            left -= stage.steps;
        }
        self
    }

    fn steps(&self) -> u64 {
        self.stages.iter().map(|s| s.steps).sum()
    }

    /// The stage of a step, the step's number in it, and that of its first picture.
    fn stage(&self, step: u64) -> (Stage, u64, u64) {
        let (mut before, mut pictures) = (0, 0);
        for stage in &self.stages {
            let own = step - before;
            if own < stage.steps {
                return (*stage, own, pictures + own * stage.batch as u64);
            }
            before += stage.steps;
            pictures += stage.steps * stage.batch as u64;
        }
        panic!("step {step} of a run of {before}")
    }

    fn last(&self) -> Stage {
        *self.stages.last().expect("a run has a stage")
    }
}

/// Rows and columns of patches of 14 pixels, on pictures of 256 × 192 made 336 × 252.
const GRID: [usize; 2] = [18, 24];

/// Layers of the encoder.
const LAYERS: usize = 9;

/// The embedded model's config: MoGe-2's layout, points and scale only.
pub fn config() -> Config {
    let stack =
        |dim_in: [Option<usize>; 5], dims: [usize; 5], blocks: [usize; 5], out: Option<usize>| StackConfig {
            dim_in: PerLevel::Each(dim_in.to_vec()),
            dim_res_blocks: dims.to_vec(),
            dim_out: PerLevel::Each(vec![None, None, None, None, out]),
            resamplers: PerLevel::Each(vec![
                Resampler::ConvTranspose,
                Resampler::ConvTranspose,
                Resampler::ConvTranspose,
                Resampler::Bilinear,
            ]),
            dim_times_res_block_hidden: 1,
            num_res_blocks: PerLevel::Each(blocks.to_vec()),
            res_block_in_norm: Norm::None,
            res_block_hidden_norm: Norm::None,
            activation: Activation::Relu,
        };
    let (dim, features) = (192, 96);
    let neck = [features, 48, 24, 12, 8];
    let tokens = GRID[0] * GRID[1];
    Config {
        model_config: ModelConfig {
            encoder: EncoderConfig {
                backbone: "dinov2_rooms14".into(),
                intermediate_layers: Layers::Listed(vec![1, LAYERS / 3, LAYERS - 1]),
                dim_out: features,
            },
            neck: stack(
                [Some(features + 2), Some(2), Some(2), Some(2), Some(2)],
                neck,
                [1, 1, 1, 1, 1],
                None,
            ),
            points_head: Some(stack(neck.map(Some), [48, 24, 16, 8, 8], [0, 0, 0, 1, 1], Some(3))),
            normal_head: None,
            mask_head: None,
            scale_head: Some(ScaleConfig { dims: vec![dim, dim, 1] }),
            remap_output: Remap::Exp,
            num_tokens_range: [tokens / 4, tokens],
        },
        backbone: Some(OfficialConfig {
            img_size: 224,
            patch_size: 14,
            embed_dim: dim,
            depth: LAYERS,
            num_heads: 6,
            mlp_ratio: 4.,
            init_values: 1.,
            num_register_tokens: 0,
            interpolate_offset: 0.,
            interpolate_antialias: false,
            ffn_layer: "mlp".into(),
        }),
    }
}

/// Pixels `[3, h, w]` in 0..1 of a rendered picture.
pub fn pixels(view: &View) -> candle_core::Result<Tensor> {
    let shape = (view.height as usize, view.width as usize, 3);
    let t = Tensor::from_slice(&view.rgb, shape, &candle_core::Device::Cpu)?;
    t.permute((2, 0, 1))?.to_dtype(candle_core::DType::F32)? / 255.
}

/// Of the parameters that only training has.
pub(super) const ENCODER_HEADS: &str = "pretrain";

fn sample(view: &View) -> DepthSample<'_> {
    DepthSample { rgb: &view.rgb, metres: &view.depth, fov_x: view.camera.fov_x }
}

/// Figures of a depth model on the test split, through [`MoGe::infer`].
pub fn evaluate(net: &MoGe, cfg: &DepthTraining) -> anyhow::Result<Metrics> {
    let mut metrics = Metrics::new();
    let (mut overall, size) = (0., cfg.last());
    for (name, look) in [("studio", Look::Studio), ("lived_in", Look::LivedIn)] {
        let views: Vec<View> = (0..cfg.eval_pictures)
            .into_par_iter()
            .map(|i| rooms::generate(scene_seed(Split::Test, cfg.seed, i), look, size.width, size.height))
            .collect();
        let (mut rel, mut aligned, mut fov) = (0., 0., 0.);
        for view in &views {
            let got = net.infer(&pixels(view)?, Tokens::Level(9.), None)?;
            rel += abs_rel(&got.depth, &view.depth);
            aligned += abs_rel_aligned(&got.depth, &view.depth);
            fov += (got.fov_x - view.camera.fov_x).abs();
        }
        let n = views.len().max(1) as f64;
        metrics.insert(format!("abs_rel_{name}"), json!(rel / n));
        metrics.insert(format!("abs_rel_aligned_{name}"), json!(aligned / n));
        metrics.insert(format!("fov_error_{name}"), json!(fov / n));
        overall += rel / n / 2.;
    }
    metrics.insert("abs_rel".into(), json!(overall));
    Ok(metrics)
}

/// Trains into `dir` (`checkpoint.safetensors`, `metrics.jsonl`) and returns the
/// final figures on the test split. With `resume` it continues from the folder's checkpoint,
/// exactly, if that was made with the same settings, model and Rooms.
pub fn run(cfg: DepthTraining, dir: &Path, resume: bool) -> anyhow::Result<Metrics> {
    let model = config();
    let options = RunOptions {
        keep: 1,
        stop: None,
        dir: dir.into(),
        steps: cfg.steps(),
        resume,
        save_every: 100,
        eval_every: 500,
        log_every: 10,
        settings: super::settings(
            json!({ "training": &cfg, "model": &model, "rooms": rooms::VERSION }),
            cfg.from.as_deref(),
        ),
        label: "depth".into(),
    };
    let mut trainer = DepthTrainer::new(cfg, &model)?;
    train(&mut trainer, &options)
}

/// A depth model being trained.
pub struct DepthTrainer {
    cfg: DepthTraining,
    params: Params,
    net: MoGe,
    heads: Heads,
    optimiser: AdamW,
    lanes: Lanes,
}

impl DepthTrainer {
    pub fn new(cfg: DepthTraining, model: &Config) -> anyhow::Result<Self> {
        let params = super::start(cfg.seed, cfg.from.as_deref())?;
        let net = MoGe::new(model, params.builder())?;
        check_trainable(&net)?;
        super::check_complete(&params, cfg.from.as_deref(), None)?;
        let heads = Heads::new(&net, params.builder().pp(ENCODER_HEADS))?;
        if cfg.from.is_none() {
            super::set_positions(&params, "encoder.backbone.pos_embed", 1)?;
        }
        let adamw = AdamWConfig { weight_decay: cfg.weight_decay, ..AdamWConfig::default() };
        let optimiser = AdamW::new(params.named(), adamw, super::group(cfg.muon))?;
        let lanes = Lanes::new(cfg.lanes)?;
        Ok(Self { cfg, params, net, heads, optimiser, lanes })
    }

    pub fn net(&self) -> &MoGe {
        &self.net
    }

    /// The encoder's losses, and those of the maps if they are wanted.
    fn losses(&self, shown: &[Shown], stage: Stage) -> anyhow::Result<(EncoderLosses, Option<DepthLoss>)> {
        let samples: Vec<_> = shown.iter().map(|s| sample(&s.view)).collect();
        let (w, h) = (stage.width as usize, stage.height as usize);
        let batch = DepthBatch::new(&samples, w, h)?;
        let (rows, cols) = MoGe::grid(w, h, stage.tokens);
        let kept = stage.kept(rows * cols, shown[0].view.seed);
        let (patches, cls) = self.net.encode_patches(&batch.image, rows, cols, kept.as_deref())?;
        let encoder = self.heads.losses(shown, (rows, cols), kept.as_deref(), &patches, &cls)?;
        if stage.maps == 0. {
            return Ok((encoder, None));
        }
        let features = patches.transpose(1, 2)?.reshape((shown.len(), (), rows, cols))?;
        let maps = depth_loss(&self.net.heads(&features, &cls, w, h)?, &batch, &self.cfg.loss)?;
        Ok((encoder, Some(maps)))
    }

    /// The pictures of a step; even ones are studio, odd ones lived-in.
    fn views(&self, step: u64) -> Vec<Shown> {
        let (stage, _, first) = self.cfg.stage(step);
        self.shown(Split::Train, first..first + stage.batch as u64, stage)
    }

    fn shown(&self, split: Split, numbers: Range<u64>, stage: Stage) -> Vec<Shown> {
        let shown = |i| {
            let look = if i % 2 == 0 { Look::Studio } else { Look::LivedIn };
            Shown::new(scene_seed(split, self.cfg.seed, i), look, stage.width, stage.height)
        };
        numbers.into_par_iter().map(shown).collect()
    }
}

impl Trainee for DepthTrainer {
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
        let (stage, own, _) = self.cfg.stage(step);
        let views = self.views(step);
        let parts = self.lanes.map(&views, |_, views| {
            let (encoder, maps) = self.losses(views, stage)?;
            let mut total = encoder.total(&self.cfg.encoder)?;
            let mut m = vec![];
            for (name, loss) in encoder.named() {
                m.push((name, loss.to_scalar::<f32>()?));
            }
            if let Some(maps) = maps {
                total = (total + (maps.total * stage.maps)?)?;
                m.extend([
                    ("depth", maps.depth),
                    ("gradient", maps.gradient),
                    ("rays", maps.rays),
                    ("scale", maps.scale),
                    ("metric", maps.metric),
                ]);
            }
            m.push(("loss", total.to_scalar()?));
            Ok((total.backward()?, m, views.len() as f64 / stage.batch as f64))
        })?;
        let mut figures: Vec<(&str, f64)> = parts[0].1.iter().map(|(name, _)| (*name, 0.)).collect();
        for (grads, of_part, share) in parts {
            self.optimiser.accumulate(&grads, share)?;
            for ((_, sum), (_, x)) in figures.iter_mut().zip(of_part) {
                *sum += share * f64::from(x);
            }
        }
        let schedule = Schedule {
            base: stage.lr,
            warmup: self.cfg.warmup.min(stage.steps / 2),
            warmup_from: stage.lr / 100.,
            decay: Decay::Cosine { total: stage.steps, to: stage.lr / 50. },
        };
        let lr = schedule.lr(own);
        let report = self.optimiser.step(lr)?;
        let mut m: Metrics = figures.into_iter().map(|(name, x)| (name.to_string(), json!(x))).collect();
        m.insert("lr".into(), json!(lr));
        m.insert("grad_norm".into(), json!(report.grad_norm));
        Ok(m)
    }

    /// Errors of depth where the run trains the maps, else the encoder's losses; on the test split.
    fn evaluate(&mut self) -> anyhow::Result<Metrics> {
        let stage = Stage { hidden: 0, ..self.cfg.last() };
        if stage.maps > 0. {
            return evaluate(&self.net, &self.cfg);
        }
        let views = self.shown(Split::Test, 0..2 * self.cfg.eval_pictures, stage);
        let mut means: BTreeMap<String, f64> = BTreeMap::new();
        for part in views.chunks(stage.batch) {
            for (name, loss) in self.losses(part, stage)?.0.named() {
                let share = part.len() as f64 / views.len() as f64;
                *means.entry(format!("held_out_{name}")).or_default() +=
                    share * f64::from(loss.to_scalar::<f32>()?);
            }
        }
        Ok(means.into_iter().map(|(name, mean)| (name, json!(mean))).collect())
    }
}

/// Writes a run's network as a model folder: config and f16 weights.
pub fn export(run: &Path, out: &Path) -> anyhow::Result<()> {
    let mut cfg = serde_json::to_value(config())?;
    cfg["rooms_version"] = rooms::VERSION.into();
    write_atomic(&out.join("config.json"), |w| writeln!(w, "{cfg:#}"))?;
    super::export_weights(run, out, |name| !name.starts_with(ENCODER_HEADS))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small pictures and few tokens: the network is the embedded one.
    fn small() -> (DepthTraining, Config) {
        let maps =
            Stage { steps: 2, batch: 2, width: 56, height: 42, tokens: 12, lr: 1e-3, maps: 4., hidden: 0 };
        let cfg = DepthTraining {
            stages: vec![Stage { steps: 1, batch: 3, maps: 0., hidden: 6, ..maps }, maps],
            warmup: 0,
            eval_pictures: 1,
            ..DepthTraining::default()
        };
        let mut model = config();
        model.model_config.num_tokens_range = [12, 12];
        (cfg, model)
    }

    #[test]
    fn every_parameter_receives_a_gradient() -> anyhow::Result<()> {
        let (cfg, model) = small();
        let t = DepthTrainer::new(cfg, &model)?;
        // Three pictures: of an even number of signs, as an L1 loss has, all may cancel.
        let (encoder, maps) = t.losses(&t.views(0), t.cfg.last())?;
        let grads = (encoder.total(&t.cfg.encoder)? + maps.expect("the stage has maps").total)?.backward()?;
        for (name, var) in t.params.named() {
            let Some(g) = grads.get(&var) else { panic!("no gradient: {name}") };
            assert!(g.abs()?.sum_all()?.to_scalar::<f32>()? > 0., "zero gradient: {name}");
        }
        Ok(())
    }

    #[test]
    fn a_restored_trainer_takes_the_same_step() -> anyhow::Result<()> {
        let (cfg, model) = small();
        let mut a = DepthTrainer::new(cfg.clone(), &model)?;
        a.step(0)?;
        let mut b = DepthTrainer::new(cfg, &model)?;
        for (name, var) in b.params.named() {
            var.set(&a.params.get(&name).expect("same network").as_tensor().copy()?)?;
        }
        b.restore(a.optimiser_state()?, 1)?;
        assert_eq!(a.step(1)?, b.step(1)?);
        for (name, var) in a.params.named() {
            let other = b.params.get(&name).expect("same network");
            let same = (var.as_tensor() - other.as_tensor())?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert_eq!(same, 0., "{name}");
        }
        Ok(())
    }

    #[test]
    fn a_model_of_another_recipe_is_not_gone_on_from() -> anyhow::Result<()> {
        let (cfg, model) = small();
        let all = DepthTrainer::new(cfg.clone(), &model)?.params.tensors();
        let dir = tempfile::tempdir()?;
        let cfg = DepthTraining { from: Some(dir.path().into()), ..cfg };
        let begin = |tensors: HashMap<String, Tensor>| {
            candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
            DepthTrainer::new(cfg.clone(), &model)
        };
        // As exported: without the heads that only training has.
        let mut held = all;
        held.retain(|name, _| !name.starts_with(ENCODER_HEADS));
        begin(held.clone())?;
        held.remove("encoder.backbone.blocks.1.attn.qkv.weight").expect("a layer of the encoder");
        let e = begin(held).err().expect("a layer is missing").to_string();
        assert!(e.contains("it lacks 1 of") && e.contains("blocks.1.attn.qkv"), "{e}");
        Ok(())
    }

    #[test]
    fn steps_draw_both_looks_from_the_training_split() -> anyhow::Result<()> {
        let (cfg, model) = small();
        let t = DepthTrainer::new(cfg, &model)?;
        let (first, second) = (t.views(0), t.views(1));
        assert_eq!((first.len(), second.len()), (3, 2));
        assert!(
            first.iter().any(|v| v.view.look == Look::Studio)
                && first.iter().any(|v| v.view.look == Look::LivedIn)
        );
        let test: Vec<u64> = (0..100).map(|i| scene_seed(Split::Test, t.cfg.seed, i)).collect();
        let third = t.views(2);
        let mut seeds: Vec<u64> = first.iter().chain(&second).chain(&third).map(|v| v.view.seed).collect();
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 7, "no scene is seen twice");
        for v in first.iter().chain(&second) {
            assert!(!test.contains(&v.view.seed));
        }
        Ok(())
    }

    #[test]
    fn patches_are_hidden_by_lot_and_only_from_the_encoder_alone() {
        let of = DepthTraining::default().stages;
        let hidden: Vec<usize> = of.iter().map(|s| s.hidden).collect();
        assert_eq!(hidden, [0, 216, 0, 0, 0]);
        assert!(of.iter().all(|s| s.hidden == 0 || s.maps == 0.));
        let (a, b) = (of[1].kept(432, 1).unwrap(), of[1].kept(432, 2).unwrap());
        assert!(a.len() == 216 && a.windows(2).all(|w| w[0] < w[1]) && a.iter().all(|i| *i < 432));
        let both = a.iter().filter(|i| b.contains(i)).count();
        assert!((60..160).contains(&both), "{both} of 216 are the same");
        assert_eq!((of[1].kept(432, 1), of[0].kept(108, 1)), (Some(a), None));
    }

    #[test]
    fn stages_follow_one_another_and_shrink_in_proportion() {
        let all = DepthTraining::default();
        let at = |step| {
            let (stage, own, first) = all.stage(step);
            (stage.maps > 0., own, first)
        };
        assert_eq!(at(5_999), (false, 5_999, 5_999 * 32));
        assert_eq!(at(6_000), (false, 0, 6_000 * 32));
        assert_eq!(at(16_001), (true, 1, 6_000 * 32 + 8_000 * 24 + 2_000 * 16 + 12));
        let steps = |cfg: &DepthTraining| cfg.stages.iter().map(|s| s.steps).collect::<Vec<_>>();
        assert_eq!(steps(&all.clone().in_steps(90)), [22, 30, 7, 26, 5]);
        let further = all.clone().of_stages(&[2, 5]).unwrap().in_steps(90);
        assert_eq!(steps(&further), [80, 10]);
        assert_eq!(further.stages.iter().map(|s| s.tokens).collect::<Vec<_>>(), [GRID[0] * GRID[1]; 2]);
        let after = all.clone().after_small_pictures();
        assert_eq!(after.stages, all.stages[1..]);
        assert_eq!(after.last().maps, all.last().maps);
        for none in [&[][..], &[0], &[6]] {
            assert!(all.clone().of_stages(none).is_err());
        }
    }
}
