//! The embedded depth model: a small MoGe-2 trained from nothing on Rooms.
//!
//! Pictures of both looks are rendered as they are needed; no scene is seen twice, none of the
//! test split ever. Most of the run sees them coarsely, on a quarter of the final model's tokens:
//! what a picture's camera and walls are shows there too, and three times as many pictures fit into
//! the same time. Everything follows from the seed and the step, so a resumed run is the same
//! run.

use super::super::depth::{DepthBatch, DepthLossWeights, DepthSample, check_trainable, depth_loss};
use super::super::run::{Metrics, RunOptions, Trainee, train};
use crate::eval::depth::{abs_rel, abs_rel_aligned};
use crate::files::write_atomic;
use crate::models::dinov2::OfficialConfig;
use crate::models::moge::{
    Activation, Config, EncoderConfig, Layers, MoGe, ModelConfig, Norm, PerLevel, Remap, Resampler,
    ScaleConfig, StackConfig, Tokens,
};
use crate::nn::Params;
use crate::nn::optim::{AdamW, AdamWConfig, Decay, Group, Schedule};
use crate::rooms::questions::{Split, scene_seed};
use crate::rooms::{self, Look, View};
use candle_core::Tensor;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Settings of a run; with the step number they determine it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DepthTraining {
    pub seed: u64,
    /// A model folder to go on from, in place of fresh parameters.
    #[serde(skip)]
    pub from: Option<PathBuf>,
    pub steps: u64,
    pub batch: usize,
    /// Size of the pictures.
    pub width: u32,
    pub height: u32,
    pub lr: f64,
    pub warmup: u64,
    pub weight_decay: f64,
    pub loss: DepthLossWeights,
    /// Share of the steps up to which pictures have this many tokens, in order; the last share is 1.
    pub tokens: Vec<(f64, usize)>,
    /// Held-out pictures per look.
    pub eval_pictures: u64,
}

impl Default for DepthTraining {
    fn default() -> Self {
        Self {
            seed: 1,
            from: None,
            steps: 4000,
            batch: 12,
            width: 224,
            height: 168,
            lr: 1.5e-3,
            warmup: 100,
            weight_decay: 0.02,
            loss: DepthLossWeights::default(),
            tokens: vec![
                (0.6, GRID[0] * GRID[1] / 4),
                (0.85, GRID[0] * GRID[1] * 9 / 16),
                (1., GRID[0] * GRID[1]),
            ],
            eval_pictures: 24,
        }
    }
}

/// Patches of 14 pixels on a picture of 224 × 168.
const GRID: [usize; 2] = [12, 16];

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
    let (dim, features) = (128, 96);
    let neck = [features, 48, 24, 12, 8];
    let tokens = GRID[0] * GRID[1];
    Config {
        model_config: ModelConfig {
            encoder: EncoderConfig {
                backbone: "dinov2_rooms14".into(),
                intermediate_layers: Layers::Listed(vec![2, 4]),
                dim_out: features,
            },
            neck: stack(
                [Some(features + 2), Some(2), Some(2), Some(2), Some(2)],
                neck,
                [1, 1, 1, 0, 0],
                None,
            ),
            points_head: Some(stack(neck.map(Some), [48, 24, 16, 8, 8], [0, 0, 0, 0, 0], Some(3))),
            normal_head: None,
            mask_head: None,
            scale_head: Some(ScaleConfig { dims: vec![dim, dim, 1] }),
            remap_output: Remap::Exp,
            num_tokens_range: [tokens / 4, tokens],
        },
        backbone: Some(OfficialConfig {
            img_size: GRID[1] * 14,
            patch_size: 14,
            embed_dim: dim,
            depth: 5,
            num_heads: 4,
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

fn sample(view: &View) -> DepthSample<'_> {
    DepthSample { rgb: &view.rgb, metres: &view.depth, fov_x: view.camera.fov_x }
}

/// Figures of a depth model on the test split, through [`MoGe::infer`].
pub fn evaluate(net: &MoGe, cfg: &DepthTraining) -> anyhow::Result<Metrics> {
    let mut metrics = Metrics::new();
    let mut overall = 0.;
    for (name, look) in [("studio", Look::Studio), ("lived_in", Look::LivedIn)] {
        let views: Vec<View> = (0..cfg.eval_pictures)
            .into_par_iter()
            .map(|i| rooms::generate(scene_seed(Split::Test, cfg.seed, i), look, cfg.width, cfg.height))
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
        dir: dir.into(),
        steps: cfg.steps,
        resume,
        save_every: 100,
        eval_every: 250,
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
    optimiser: AdamW,
    schedule: Schedule,
}

impl DepthTrainer {
    pub fn new(mut cfg: DepthTraining, model: &Config) -> anyhow::Result<Self> {
        let params = super::start(cfg.seed, cfg.from.as_deref())?;
        let net = MoGe::new(model, params.builder())?;
        check_trainable(&net)?;
        match cfg.from {
            None => super::set_positions(&params, "encoder.backbone.pos_embed", 1)?,
            // A model that is done need not see coarsely again.
            Some(_) => cfg.tokens = vec![(1., model.model_config.num_tokens_range[1])],
        }
        let adamw = AdamWConfig { weight_decay: cfg.weight_decay, ..AdamWConfig::default() };
        let optimiser = AdamW::new(params.named(), adamw, |_, v| Some(Group::usual(v)))?;
        let schedule = Schedule {
            base: cfg.lr,
            warmup: cfg.warmup,
            warmup_from: cfg.lr / 100.,
            decay: Decay::Cosine { total: cfg.steps, to: cfg.lr / 100. },
        };
        Ok(Self { cfg, params, net, optimiser, schedule })
    }

    pub fn net(&self) -> &MoGe {
        &self.net
    }

    fn tokens(&self, step: u64) -> usize {
        let done = step as f64 / self.cfg.steps.max(1) as f64;
        let stage = self.cfg.tokens.iter().find(|(until, _)| done < *until);
        stage.or(self.cfg.tokens.last()).map_or(self.net.config().num_tokens_range[1], |s| s.1)
    }

    /// The pictures of a step; even ones are studio, odd ones lived-in.
    fn views(&self, step: u64) -> Vec<View> {
        let first = step * self.cfg.batch as u64;
        (first..first + self.cfg.batch as u64)
            .into_par_iter()
            .map(|i| {
                let look = if i % 2 == 0 { Look::Studio } else { Look::LivedIn };
                rooms::generate(
                    scene_seed(Split::Train, self.cfg.seed, i),
                    look,
                    self.cfg.width,
                    self.cfg.height,
                )
            })
            .collect()
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
        let views = self.views(step);
        let samples: Vec<_> = views.iter().map(sample).collect();
        let batch = DepthBatch::new(&samples, self.cfg.width as usize, self.cfg.height as usize)?;
        let loss = depth_loss(&self.net.raw(&batch.image, self.tokens(step))?, &batch, &self.cfg.loss)?;
        self.optimiser.accumulate(&loss.total.backward()?, 1.)?;
        let lr = self.schedule.lr(step);
        let report = self.optimiser.step(lr)?;
        Ok(Metrics::from_iter([
            ("loss".to_string(), json!(loss.total.to_scalar::<f32>()?)),
            ("depth".into(), json!(loss.depth)),
            ("gradient".into(), json!(loss.gradient)),
            ("rays".into(), json!(loss.rays)),
            ("scale".into(), json!(loss.scale)),
            ("lr".into(), json!(lr)),
            ("grad_norm".into(), json!(report.grad_norm)),
        ]))
    }

    fn evaluate(&mut self) -> anyhow::Result<Metrics> {
        evaluate(&self.net, &self.cfg)
    }
}

/// Writes a run's network as a model folder: config and f16 weights.
pub fn export(run: &Path, out: &Path) -> anyhow::Result<()> {
    let mut cfg = serde_json::to_value(config())?;
    cfg["rooms_version"] = rooms::VERSION.into();
    write_atomic(&out.join("config.json"), |w| writeln!(w, "{cfg:#}"))?;
    super::export_weights(run, out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small pictures and few tokens: the network is the embedded one.
    fn small() -> (DepthTraining, Config) {
        let cfg = DepthTraining {
            batch: 2,
            width: 56,
            height: 42,
            warmup: 0,
            steps: 3,
            eval_pictures: 1,
            tokens: vec![(1., 12)],
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
        let views = t.views(0);
        let samples: Vec<_> = views.iter().map(sample).collect();
        let batch = DepthBatch::new(&samples, 56, 42)?;
        let grads = depth_loss(&t.net.raw(&batch.image, 12)?, &batch, &t.cfg.loss)?.total.backward()?;
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
    fn steps_draw_both_looks_from_the_training_split() -> anyhow::Result<()> {
        let (cfg, model) = small();
        let t = DepthTrainer::new(cfg, &model)?;
        let (first, second) = (t.views(0), t.views(1));
        assert!(
            first.iter().any(|v| v.look == Look::Studio) && first.iter().any(|v| v.look == Look::LivedIn)
        );
        let test: Vec<u64> = (0..100).map(|i| scene_seed(Split::Test, t.cfg.seed, i)).collect();
        for v in first.iter().chain(&second) {
            assert!(!test.contains(&v.seed));
        }
        assert_ne!(first[0].seed, second[0].seed);
        Ok(())
    }
}
