//! Detector training: pictures with boxes and nouns → captions with sampled negatives → the
//! grounding loss → AdamW (method.md 6), and average precision on held-out pictures.
//!
//! Serves both training from nothing and fine-tuning. Everything random follows from the seed and the step, so a resumed run repeats
//! an undisturbed one ([`super::run`]). Batches are made on all cores before each step, not ahead
//! of it. Not here: several machines, mixed precision, weight averaging.

mod sample;

use super::augment::Augment;
use super::grounding_loss::{LayerLoss, LossConfig, Target, layer_loss, total};
use super::run::{Metrics, Trainee};
use crate::eval::detection::{self, AveragePrecision, Scored, Truth};
use crate::models::grounding_dino::caption::{Blanks, Caption, TextTokenizer};
use crate::models::grounding_dino::postprocess::noun_scores;
use crate::models::grounding_dino::preprocess::ImageProcessor;
use crate::models::grounding_dino::{Config, Freeze, GroundingDino, Inputs, Outputs};
use crate::nn::lanes::Lanes;
use crate::nn::optim::{AdamW, AdamWConfig, Group, Schedule};
use crate::nn::{self, Params, TrainCtx};
use candle_core::{Result, Tensor};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::HashMap;

use sample::{Prepared, inputs, prepare};
pub use sample::{Region, Sample, Samples};

/// Held-out pictures, all asked for the same nouns.
pub struct Validation {
    pub samples: Box<dyn Samples>,
    pub pictures: u64,
    /// The classes of the average precision and the caption.
    pub nouns: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    pub seed: u64,
    pub batch: usize,
    pub schedule: Schedule,
    pub optimiser: AdamWConfig,
    /// Train matrices between layers by Muon, so many times as fast as AdamW trains the rest. For
    /// networks made from nothing.
    pub muon: Option<f64>,
    pub loss: LossConfig,
    pub augment: Augment,
    /// Nouns in a caption, at most.
    pub max_nouns: usize,
    /// How captions are written; as prompts will be.
    pub blanks: Blanks,
    /// Parameters whose names begin with one of these are not trained.
    pub freeze: Vec<String>,
    /// Gradient checkpointing: layers run again in the backward pass, and activations of one at a time are held.
    pub recompute: bool,
    /// Parts of a batch that are worked on side by side.
    pub lanes: usize,
}

impl Default for TrainConfig {
    /// The paper's fine-tuning (method.md 6), but for the schedule's length.
    fn default() -> Self {
        Self {
            seed: 0,
            batch: 2,
            schedule: Schedule::constant(1e-5),
            optimiser: AdamWConfig { weight_decay: 1e-4, max_grad_norm: Some(0.1), ..Default::default() },
            muon: None,
            loss: LossConfig::original(),
            augment: Augment::default(),
            max_nouns: 50,
            blanks: Blanks::Keep,
            freeze: Vec::new(),
            recompute: false,
            lanes: 2,
        }
    }
}

pub struct GroundingTrainer {
    pub params: Params,
    pub model: GroundingDino,
    cfg: TrainConfig,
    tokenizer: TextTokenizer,
    processor: ImageProcessor,
    optimiser: AdamW,
    data: Box<dyn Samples>,
    validation: Option<Validation>,
    lanes: Lanes,
    /// The order of the epoch it belongs to, for data of known length.
    order: Option<(u64, Vec<u64>)>,
}

/// What the names of the image backbone's and of BERT's parameters begin with.
pub const BACKBONE: &str = "model.backbone.conv_encoder.model.";
pub const TEXT_BACKBONE: &str = "model.text_backbone.";

/// Parameters that Muon leaves to AdamW although they are matrices: they meet words, places or boxes, or
/// begin at zero so that every query looks around its reference point.
const OUTER: [&str; 4] = ["embed", "bias_table", "sampling_offsets", "attention_weights"];

/// A batch as the network and the loss want it.
pub struct Batch {
    pub inputs: Inputs,
    pub text_lens: Vec<usize>,
    pub targets: Vec<Target>,
}

impl GroundingTrainer {
    /// `params` hold the checkpoint to start from, or nothing (then call
    /// [`crate::models::grounding_dino::init_offsets`] afterwards).
    pub fn new(
        params: Params,
        model: &Config,
        cfg: TrainConfig,
        tokenizer: TextTokenizer,
        processor: ImageProcessor,
        data: Box<dyn Samples>,
        validation: Option<Validation>,
    ) -> Result<Self> {
        if cfg.batch == 0 || data.is_empty() {
            candle_core::bail!("detector training needs a batch size of at least 1 and some pictures")
        }
        // What is frozen as a whole is left out of the graph, too.
        let frozen = |name: &str| cfg.freeze.iter().any(|p| name.starts_with(p.as_str()));
        let freeze = Freeze { backbone: frozen(BACKBONE), text: frozen(TEXT_BACKBONE) };
        let model = GroundingDino::new(&Config { freeze, ..model.clone() }, params.builder())?;
        let optimiser = AdamW::new(params.named(), cfg.optimiser.clone(), |name, var| {
            (!frozen(name)).then(|| match cfg.muon {
                Some(lr) => Group::from_nothing(name, var, &OUTER, lr),
                None => Group::usual(var),
            })
        })?;
        let lanes = if params.device().is_cpu() { cfg.lanes } else { 1 };
        let lanes = Lanes::new(lanes).map_err(candle_core::Error::msg)?;
        Ok(Self { params, model, cfg, tokenizer, processor, optimiser, data, validation, lanes, order: None })
    }

    /// Which sample stands at a position of the whole run.
    fn index(&mut self, position: u64) -> u64 {
        let Some(len) = self.data.len() else { return position };
        let epoch = position / len;
        if self.order.as_ref().is_none_or(|(e, _)| *e != epoch) {
            let mut order: Vec<u64> = (0..len).collect();
            order.shuffle(&mut rng(self.cfg.seed, epoch, ORDER));
            self.order = Some((epoch, order));
        }
        self.order.as_ref().map_or(position, |(_, order)| order[(position % len) as usize])
    }

    /// The samples of a step: augmented and captioned.
    fn prepared(&mut self, step: u64) -> anyhow::Result<Vec<Prepared>> {
        let n = self.cfg.batch as u64;
        let indices: Vec<u64> = (step * n..(step + 1) * n).map(|p| self.index(p)).collect();
        indices
            .par_iter()
            .enumerate()
            .map(|(i, &index)| {
                let sample = self.data.sample(index)?;
                let mut rng = rng(self.cfg.seed, step * n + i as u64, SAMPLE);
                let model = self.model.config();
                Ok(prepare(&sample, &self.cfg, model, &self.tokenizer, &self.processor, &mut rng)?)
            })
            .collect()
    }

    /// Samples padded to one size.
    fn batch(&self, samples: &[Prepared]) -> Result<Batch> {
        let (mut pixels, mut captions, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        for (p, c, t) in samples {
            pixels.push(p.clone());
            captions.push(c.clone());
            targets.push(t.clone());
        }
        let inputs = inputs(&pixels, &captions, &self.tokenizer, self.model.config(), self.params.device())?;
        Ok(Batch { inputs, text_lens: captions.iter().map(|c| c.ids.len()).collect(), targets })
    }

    /// Every layer's loss, the decoder's last one first, the encoder's proposals last.
    pub fn losses(&self, out: &Outputs, batch: &Batch) -> Result<Vec<LayerLoss>> {
        losses(&self.cfg.loss, out, &batch.text_lens, &batch.targets)
    }

    /// Average precision over the held-out pictures.
    pub fn average_precision(&self, validation: &Validation) -> anyhow::Result<AveragePrecision> {
        let caption = self.tokenizer.caption_of(&validation.nouns, self.cfg.blanks)?;
        let mut scored = Vec::new();
        let all: Vec<u64> = (0..validation.pictures).collect();
        for chunk in all.chunks(8) {
            let samples: Vec<Sample> =
                chunk.par_iter().map(|&i| validation.samples.sample(i)).collect::<anyhow::Result<_>>()?;
            let pixels: Vec<Tensor> =
                samples.iter().map(|s| self.processor.apply(&s.picture)).collect::<Result<_>>()?;
            let captions = vec![caption.clone(); samples.len()];
            let inputs =
                inputs(&pixels, &captions, &self.tokenizer, self.model.config(), self.params.device())?;
            let out = self.model.forward(&inputs, None)?;
            let (Some(logits), Some(boxes)) = (out.logits.last(), out.boxes.last()) else {
                anyhow::bail!("the detector has no decoder layers")
            };
            for (i, s) in samples.iter().enumerate() {
                scored.push(score(s, &caption, &validation.nouns, &logits.get(i)?, &boxes.get(i)?)?);
            }
        }
        Ok(detection::average_precision(&scored, validation.nouns.len()))
    }
}

/// Every layer's loss of a forward pass, the decoder's last one first, the encoder's last.
pub fn losses(
    cfg: &LossConfig,
    out: &Outputs,
    text_lens: &[usize],
    targets: &[Target],
) -> Result<Vec<LayerLoss>> {
    let layers = out.logits.iter().zip(&out.boxes).rev();
    let all = layers.chain(std::iter::once((&out.encoder_logits, &out.encoder_boxes)));
    all.map(|(logits, boxes)| layer_loss(cfg, logits, boxes, text_lens, targets)).collect()
}

impl Trainee for GroundingTrainer {
    fn params(&self) -> &Params {
        &self.params
    }

    fn optimiser_state(&self) -> Result<HashMap<String, Tensor>> {
        self.optimiser.state()
    }

    fn restore(&mut self, state: HashMap<String, Tensor>, _step: u64) -> Result<()> {
        self.optimiser.restore(&state)
    }

    fn step(&mut self, step: u64) -> anyhow::Result<Metrics> {
        let samples = self.prepared(step)?;
        let boxes =
            |samples: &[Prepared]| samples.iter().map(|s| s.2.boxes.len()).sum::<usize>().max(1) as f64;
        let all = boxes(&samples);
        let this = &*self;
        let parts = self.lanes.map(&samples, |lane, part| {
            let batch = this.batch(part)?;
            // A seed of its own for each step and part stands in for a stored generator state.
            let mut seeds = rng(this.cfg.seed, step, NETWORK).random_iter();
            let mut ctx = TrainCtx::new(seeds.nth(lane).expect("it never ends"));
            if this.cfg.recompute {
                ctx = ctx.recomputing(this.params.tensors().into_values().collect());
            }
            let out = this.model.forward(&batch.inputs, Some(&mut ctx))?;
            let layers = this.losses(&out, &batch)?;
            // Losses are means over boxes; a part's counts as much as it has of them.
            let share = boxes(part) / all;
            let loss = (total(&this.cfg.loss, &layers)? * share)?;
            let value = loss.to_scalar::<f32>()?;
            let mut figures = vec![("loss".to_owned(), f64::from(value))];
            for (name, layer) in [("", layers.first()), ("_enc", layers.last())] {
                let Some(l) = layer else { continue };
                for (key, t) in [("class", &l.class), ("bbox", &l.bbox), ("giou", &l.giou)] {
                    figures.push((format!("{key}{name}"), share * f64::from(t.to_scalar::<f32>()?)));
                }
            }
            Ok((figures, if value.is_finite() { Some(nn::backward(&loss)?) } else { None }))
        })?;
        let mut figures: Vec<(String, f64)> = parts[0].0.iter().map(|f| (f.0.clone(), 0.)).collect();
        for (of_part, _) in &parts {
            figures.iter_mut().zip(of_part).for_each(|((_, sum), (_, x))| *sum += x);
        }
        if figures[0].1.is_finite() {
            for grads in parts.into_iter().filter_map(|p| p.1) {
                self.optimiser.accumulate(&grads, 1.)?;
            }
        }
        let lr = self.cfg.schedule.lr(step);
        let report = self.optimiser.step(lr)?;
        let mut m: Metrics = figures.into_iter().map(|(name, x)| (name, json!(x))).collect();
        m.insert("lr".into(), json!(lr));
        m.insert("grad_norm".into(), json!(report.grad_norm));
        m.insert("applied".into(), json!(report.applied));
        Ok(m)
    }

    fn evaluate(&mut self) -> anyhow::Result<Metrics> {
        let mut m = Metrics::new();
        if let Some(v) = &self.validation {
            let ap = self.average_precision(v)?;
            m.insert("ap50".into(), json!(ap.ap50));
            m.insert("ap".into(), json!(ap.ap));
            let by_class = v.nouns.iter().cloned().zip(ap.ap50_by_class.iter().map(|x| json!(x)));
            m.insert("ap50_by_class".into(), by_class.collect::<Metrics>().into());
        }
        Ok(m)
    }
}

/// Streams of randomness, so that no two uses of one seed and number coincide.
const ORDER: u64 = 0;
const SAMPLE: u64 = 1;
const NETWORK: u64 = 2;

fn rng(seed: u64, number: u64, stream: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(number.wrapping_mul(4).wrapping_add(stream));
    rng
}

/// One picture's truths and detections, classes by their place in `nouns`.
fn score(
    sample: &Sample,
    caption: &Caption,
    nouns: &[String],
    logits: &Tensor,
    boxes: &Tensor,
) -> Result<Scored> {
    let mut out = Scored::default();
    for (&bbox, noun) in sample.boxes.iter().zip(&sample.nouns) {
        if let Some(class) = nouns.iter().position(|n| n == noun) {
            out.truths.push(Truth::new(class, bbox, false));
        }
    }
    for region in &sample.ignore {
        let classes = (0..nouns.len()).filter(|&c| region.noun.as_ref().is_none_or(|n| *n == nouns[c]));
        out.truths.extend(classes.map(|class| Truth::new(class, region.bbox, true)));
    }
    let size = (sample.picture.height(), sample.picture.width());
    for (bbox, scores) in noun_scores(caption, logits, boxes, size)? {
        let each = scores.into_iter().enumerate();
        out.found.extend(each.map(|(class, s)| detection::Found { class, bbox, score: s as f64 }));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::sample::tests::sample;
    use super::*;
    use crate::models::grounding_dino::init_offsets;
    use crate::models::swin;
    use crate::train::pretrain::detector;
    use crate::train::run::{RunOptions, train};
    use std::path::Path;

    struct Three;

    impl Samples for Three {
        fn len(&self) -> Option<u64> {
            Some(3)
        }
        fn sample(&self, index: u64) -> anyhow::Result<Sample> {
            let mut s = sample();
            s.boxes.truncate(index as usize + 1);
            s.nouns.truncate(index as usize + 1);
            Ok(s)
        }
    }

    fn small() -> Config {
        let base = detector::config();
        Config {
            backbone_config: swin::Config {
                embed_dim: 8,
                depths: vec![1, 1, 1, 1],
                num_heads: vec![1, 1, 2, 2],
                ..base.backbone_config.clone()
            },
            d_model: 32,
            num_queries: 6,
            encoder_layers: 2,
            decoder_layers: 2,
            encoder_ffn_dim: 64,
            decoder_ffn_dim: 64,
            dropout: 0.1,
            fusion_droppath: 0.1,
            ..base
        }
    }

    fn trainer() -> GroundingTrainer {
        trainer_of(false)
    }

    fn trainer_of(recompute: bool) -> GroundingTrainer {
        let p = ImageProcessor { shortest: 48, longest: 64, ..detector::processor() };
        let augment = Augment { sizes: vec![40, 48], ..Augment::default() };
        let schedule = Schedule::constant(1e-3);
        let cfg = TrainConfig { augment, schedule, recompute, ..Default::default() };
        let (params, model, t) = (Params::new(2), small(), detector::tokenizer().unwrap());
        let held_out = Validation { samples: Box::new(Three), pictures: 2, nouns: vec!["chair".into()] };
        let data = Box::new(Three);
        let trainer = GroundingTrainer::new(params.clone(), &model, cfg, t, p, data, Some(held_out)).unwrap();
        init_offsets(&params, &model).unwrap();
        trainer
    }

    /// Of one batch, by another way from the samples to the gradients.
    #[test]
    fn lanes_change_nothing_but_rounding() -> anyhow::Result<()> {
        let base = small();
        let swin = swin::Config { drop_path_rate: 0., ..base.backbone_config.clone() };
        let still = |rate: &mut f64| *rate = 0.;
        let mut model = Config { backbone_config: swin, dropout: 0., fusion_droppath: 0., ..base };
        [&mut model.attention_dropout, &mut model.activation_dropout].into_iter().for_each(still);
        [&mut model.text_enhancer_dropout, &mut model.fusion_dropout].into_iter().for_each(still);
        let learnt = |lanes: usize| -> anyhow::Result<Metrics> {
            let p = ImageProcessor { shortest: 48, longest: 64, ..detector::processor() };
            let cfg = TrainConfig { augment: Augment::none(&p), lanes, batch: 3, ..Default::default() };
            let (params, t) = (Params::new(2), detector::tokenizer()?);
            let mut of = GroundingTrainer::new(params, &model, cfg, t, p, Box::new(Three), None)?;
            init_offsets(&of.params, &model)?;
            of.step(0)
        };
        let (whole, parts) = (learnt(1)?, learnt(2)?);
        for key in ["loss", "class", "bbox", "giou", "class_enc", "grad_norm"] {
            let (a, b) = (whole[key].as_f64().expect(key), parts[key].as_f64().expect(key));
            assert!((a - b).abs() <= 1e-4 * a.abs(), "{key}: {a} {b}");
        }
        Ok(())
    }

    /// Dropout and stochastic depth draw the same again in the backward pass.
    #[test]
    fn checkpointing_changes_nothing_but_rounding() -> anyhow::Result<()> {
        let (mut plain, mut again) = (trainer_of(false), trainer_of(true));
        let (a, b) = (plain.step(0)?, again.step(0)?);
        for key in ["loss", "class", "bbox", "giou", "class_enc", "grad_norm"] {
            let (a, b) = (a[key].as_f64().expect(key), b[key].as_f64().expect(key));
            assert!((a - b).abs() <= 1e-5 * a.abs(), "{key}: {a} {b}");
        }
        // Each parameter's gradient, as the moments hold it.
        let (a, b) = (plain.optimiser_state()?, again.optimiser_state()?);
        assert_eq!(a.len(), b.len());
        for (name, want) in a.iter().filter(|(name, _)| *name != "step") {
            let scale = want.abs()?.max_all()?.to_scalar::<f32>()?;
            let e = (want - &b[name])?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(e <= 1e-3 * scale + 1e-9, "{name}: {e} of {scale}");
        }
        Ok(())
    }

    fn run(dir: &Path, steps: u64) -> (HashMap<String, Tensor>, Metrics) {
        let mut t = trainer();
        let options = RunOptions {
            keep: 1,
            stop: None,
            dir: dir.into(),
            steps,
            resume: true,
            save_every: 2,
            eval_every: 0,
            log_every: 1,
            settings: json!("test"),
            label: "test".into(),
        };
        let m = train(&mut t, &options).unwrap();
        (t.params.tensors(), m)
    }

    #[test]
    fn a_resumed_run_equals_an_undisturbed_one() -> Result<()> {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (whole, metrics) = run(a.path(), 4);
        assert!(metrics["ap50"].as_f64().is_some_and(|ap| (0. ..=1.).contains(&ap)), "{metrics:?}");
        run(b.path(), 2);
        let (resumed, _) = run(b.path(), 4);
        let start = trainer().params.tensors();
        let mut moved = 0;
        for (name, want) in &whole {
            let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
            assert_eq!(flat(&resumed[name])?, flat(want)?, "{name}");
            moved += usize::from(flat(&start[name])? != flat(want)?);
        }
        assert!(moved * 10 > whole.len() * 9, "{moved} of {} parameters moved", whole.len());
        Ok(())
    }

    /// As an optimiser moves them, or a checkpoint is restored, under a network that is built.
    #[test]
    fn the_network_follows_its_parameters() -> anyhow::Result<()> {
        let mut t = trainer();
        for (_, var) in t.params.named() {
            var.set(&var.as_tensor().affine(0.9, 0.01)?)?;
        }
        let rebuilt = GroundingDino::new(t.model.config(), t.params.builder())?;
        let samples = t.prepared(0)?;
        let inputs = t.batch(&samples)?.inputs;
        let (live, want) = (t.model.forward(&inputs, None)?, rebuilt.forward(&inputs, None)?);
        let last = |all: &[Tensor]| all.last().expect("a layer").flatten_all()?.to_vec1::<f32>();
        assert_eq!(last(&live.boxes)?, last(&want.boxes)?);
        assert_eq!(last(&live.logits)?, last(&want.logits)?);
        Ok(())
    }

    #[test]
    fn every_parameter_receives_a_gradient() -> anyhow::Result<()> {
        let mut t = trainer();
        let samples = t.prepared(0)?;
        let batch = t.batch(&samples)?;
        let out = t.model.forward(&batch.inputs, None)?;
        let grads = total(&t.cfg.loss, &t.losses(&out, &batch)?)?.backward()?;
        let without: Vec<String> =
            t.params.named().into_iter().filter(|(_, v)| grads.get(v).is_none()).map(|(n, _)| n).collect();
        assert!(without.is_empty(), "{without:?}");
        Ok(())
    }
}
