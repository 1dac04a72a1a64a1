//! The detector's fine-tuning on mined boxes (method.md 6), and what keeps it from forgetting: replay of
//! other boxes, a moving average of the weights, and a mean of old and new weights in the end.

use crate::config::{Config, DetectorTraining};
use crate::data::odvg::{Boxes, Fault, FaultKind, Record};
use crate::files::{lazily, sha256_hex, write_atomic, write_tensors};
use crate::models::grounding_dino::caption::Blanks;
use crate::nn::Params;
use crate::nn::optim::{AdamWConfig, Decay, Schedule};
use crate::rooms::questions::Split;
use crate::rooms::{self, Look};
use crate::sight::Picture;
use crate::text::shown_lines;
use crate::tools::real::DetectorParts;
use crate::train::augment::{Augment, Crop};
use crate::train::grounding::{GroundingTrainer, Region, Sample, Samples, TrainConfig, Validation};
use crate::train::pretrain::detector::{RoomPictures, validation};
use crate::train::run::{self, Metrics, RunOptions, Trainee};
use crate::weights::is_unused;
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// The files that make a detector's folder, beside its weights.
const FILES: [&str; 4] = ["config.json", "tokenizer.json", "vocab.txt", "preprocessor_config.json"];

/// Boxes from files, as training wants them.
pub struct FromFiles {
    boxes: Boxes,
    /// Every label that a picture has no box of is absent there: all labels, where everything is labelled.
    complete: bool,
}

impl FromFiles {
    pub fn new(boxes: Boxes, complete: bool) -> Self {
        Self { boxes, complete }
    }
}

impl Samples for FromFiles {
    fn len(&self) -> Option<u64> {
        Some(self.boxes.records.len() as u64)
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        let record = &self.boxes.records[index as usize];
        let picture = Picture::open(&self.boxes.picture(index as usize))?;
        let size = (picture.width(), picture.height());
        ensure!(
            size == (record.width, record.height),
            "{} is {}×{}, its boxes are of {}×{}",
            record.filename,
            size.0,
            size.1,
            record.width,
            record.height
        );
        let d = &record.detection;
        let mut absent = d.absent.clone();
        if self.complete {
            let is_there = |n: &String| d.instances.iter().chain(&d.crowds).any(|i| i.category == *n);
            absent.extend(self.boxes.labels.names().iter().filter(|n| !is_there(n)).cloned());
        }
        Ok(Sample {
            picture,
            boxes: d.instances.iter().map(|i| i.bbox).collect(),
            nouns: d.instances.iter().map(|i| i.category.clone()).collect(),
            absent,
            hard_negatives: d.hard_negatives.clone(),
            ignore: d
                .ignore
                .iter()
                .map(|&bbox| Region { bbox, noun: None })
                .chain(d.crowds.iter().map(|c| Region { bbox: c.bbox, noun: Some(c.category.clone()) }))
                .collect(),
        })
    }
}

/// Mined pictures, and among them others to go on learning from.
struct Mixed {
    mined: FromFiles,
    replay: Option<Box<dyn Samples>>,
    replayed: u64,
}

impl Samples for Mixed {
    fn len(&self) -> Option<u64> {
        Some(self.mined.len()? + self.replayed)
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        let own = self.mined.boxes.records.len() as u64;
        match &self.replay {
            Some(replay) if index >= own => {
                let at = index - own;
                // From all over a file, by steps of its golden section.
                let spread = |n: u64| ((at as f64 * 0.618_033_988_75).fract() * n as f64) as u64;
                replay.sample(replay.len().map_or(at, spread))
            }
            _ => self.mined.sample(index),
        }
    }
}

/// Steps of a run over so many pictures, and its schedule.
pub fn schedule(t: &DetectorTraining, pictures: u64) -> (u64, Schedule) {
    let steps = |epochs: f64| (pictures as f64 * epochs / t.batch as f64).ceil() as u64;
    let total = steps(t.epochs).max(1);
    let schedule = Schedule {
        base: t.lr,
        warmup: steps(t.warmup).min(total),
        warmup_from: t.lr_floor,
        decay: Decay::Cosine { total, to: t.lr_floor },
    };
    (total, schedule)
}

/// Pictures of an epoch: what was mined, and its share of replay.
pub fn per_epoch(t: &DetectorTraining, mined: usize) -> u64 {
    mined as u64 + replayed(t, mined)
}

fn replayed(t: &DetectorTraining, mined: usize) -> u64 {
    match t.replay.is_empty() {
        true => 0,
        false => (mined as f64 * t.replay_share / (1. - t.replay_share)).round() as u64,
    }
}

fn train_config(t: &DetectorTraining, seed: u64, pictures: u64) -> TrainConfig {
    let crop = Crop { probability: t.crop, least: t.crop_least, keep_aspect: t.keep_aspect };
    TrainConfig {
        seed,
        batch: t.batch,
        schedule: schedule(t, pictures).1,
        optimiser: AdamWConfig {
            weight_decay: t.weight_decay,
            max_grad_norm: (t.max_grad_norm > 0.).then_some(t.max_grad_norm),
            ..Default::default()
        },
        augment: Augment { flip: t.flip, crop: (t.crop > 0.).then_some(crop), sizes: t.sizes.clone() },
        max_nouns: t.max_nouns,
        blanks: if t.hyphens { Blanks::Hyphen } else { Blanks::Keep },
        freeze: t.freeze.clone(),
        recompute: t.recompute,
        ..Default::default()
    }
}

/// A detector in tuning.
pub struct Tuning {
    trainer: GroundingTrainer,
    /// Moving averages of what is trained, and their decay.
    average: HashMap<String, Tensor>,
    decay: f64,
    frozen: Vec<String>,
}

impl Tuning {
    fn is_averaged(&self) -> bool {
        self.decay > 0.
    }
}

impl Trainee for Tuning {
    fn params(&self) -> &Params {
        self.trainer.params()
    }

    fn optimiser_state(&self) -> candle_core::Result<HashMap<String, Tensor>> {
        let mut state = self.trainer.optimiser_state()?;
        state.extend(self.average.iter().map(|(n, t)| (format!("{AVERAGE}{n}"), t.clone())));
        Ok(state)
    }

    fn restore(&mut self, state: HashMap<String, Tensor>, step: u64) -> candle_core::Result<()> {
        let (average, of_optimiser): (HashMap<_, _>, HashMap<_, _>) =
            state.into_iter().partition(|(n, _)| n.starts_with(AVERAGE));
        let device = self.trainer.params.device();
        let placed = |(n, t): (String, Tensor)| Ok((n[AVERAGE.len()..].to_owned(), t.to_device(device)?));
        self.average = average.into_iter().map(placed).collect::<candle_core::Result<_>>()?;
        self.trainer.restore(of_optimiser, step)
    }

    fn step(&mut self, step: u64) -> Result<Metrics> {
        let m = self.trainer.step(step)?;
        if self.is_averaged() {
            for (name, var) in self.trainer.params().named() {
                if self.frozen.iter().any(|p| name.starts_with(p.as_str())) {
                    continue;
                }
                let now = var.as_detached_tensor();
                let next = match self.average.get(&name) {
                    // At the beginning a shorter memory, so that the first weights do not linger.
                    Some(old) => {
                        let decay = self.decay.min((1. + step as f64) / (10. + step as f64));
                        ((old * decay)? + (now * (1. - decay))?)?
                    }
                    None => now.copy()?,
                };
                self.average.insert(name, next);
            }
        }
        Ok(m)
    }

    fn evaluate(&mut self) -> Result<Metrics> {
        self.trainer.evaluate()
    }
}

const AVERAGE: &str = "average/";

/// What a training takes.
pub struct Fit<'a> {
    pub config: &'a Config,
    pub device: Device,
    /// Mined, checked boxes.
    pub boxes: Boxes,
    /// Where the configuration names a file of them.
    pub replay: Option<Boxes>,
    pub dir: PathBuf,
    pub resume: bool,
    pub stop: Arc<AtomicBool>,
}

/// A file of boxes, looked through: what is wrong is said in one table and left out, or refused if `strict`.
///
/// # Errors
/// If nothing is left.
pub fn checked(path: &Path, strict: bool) -> Result<Boxes> {
    let boxes = Boxes::open(path)?;
    let faults = boxes.check();
    if faults.is_empty() {
        ensure!(!boxes.records.is_empty(), "{} holds no record", path.display());
        return Ok(boxes);
    }
    let missing = faults.iter().filter(|f| f.kind == FaultKind::MissingPicture).count();
    ensure!(
        missing < boxes.records.len(),
        "{}: none of its {missing} pictures is there, such as {:?}: looked in {}; put the file where they are, or a \
         link named images to their folder beside it",
        path.display(),
        boxes.records[0].filename,
        boxes.places()
    );
    let table = faults_table(&boxes, &faults);
    notice!("valor: wrong in {}:\n{}", path.display(), shown_lines(table.trim_end()));
    ensure!(!strict, "--strict: {} faults in {}", faults.len(), path.display());
    let left = boxes.without(&faults);
    ensure!(!left.records.is_empty(), "{} holds no record that can be trained on", path.display());
    notice!("valor: that is left out; {} records stay", left.records.len());
    Ok(left)
}

fn faults_table(boxes: &Boxes, faults: &[Fault]) -> String {
    let mut kinds: BTreeMap<FaultKind, (usize, &Fault)> = BTreeMap::new();
    for f in faults {
        kinds.entry(f.kind).or_insert((0, f)).0 += 1;
    }
    let mut out = String::new();
    for (kind, (n, first)) in kinds {
        let record: &Record = &boxes.records[first.record];
        let place = match (first.instance, kind) {
            (Some(k), _) => format!(", box {:?}", record.detection.instances[k].bbox),
            (None, FaultKind::MissingPicture) => format!("; looked in {}", boxes.places()),
            (None, _) => String::new(),
        };
        out += &format!("{n:>7}  {}; the first: {}{place}\n", kind.text(), record.filename);
    }
    out
}

/// That `grounding.training.freeze` names parameters of the detector, told before anything is trained.
pub fn check_freeze(config: &Config) -> Result<()> {
    let freeze = &config.grounding.training.freeze;
    if freeze.is_empty() {
        return Ok(());
    }
    let parts = DetectorParts::open(&config.detector)?;
    let unused = parts.unused();
    let names: Vec<String> = parts.weights.names().into_iter().filter(|n| !is_unused(n, &unused)).collect();
    begins_names(freeze, &names)
}

fn begins_names(freeze: &[String], names: &[String]) -> Result<()> {
    for prefix in freeze {
        ensure!(
            names.iter().any(|n| n.starts_with(prefix.as_str())),
            "grounding.training.freeze: no parameter's name begins with {prefix:?}"
        );
    }
    Ok(())
}

impl Fit<'_> {
    fn cfg(&self) -> &DetectorTraining {
        &self.config.grounding.training
    }

    /// Trains to the end and writes the tuned detector to `model` in the folder.
    pub fn run(self) -> Result<(Metrics, PathBuf)> {
        let t = self.cfg().clone();
        let seed = self.config.grounding.seed;
        let parts = DetectorParts::open(&self.config.detector)?;
        let original = parts.weights.tensors().with_context(|| parts.name.clone())?;
        let unused = parts.unused();
        let of_network = |n: &String| !is_unused(n, &unused);
        let known: HashMap<String, Tensor> =
            original.iter().filter(|(n, _)| of_network(n)).map(|(n, t)| (n.clone(), t.clone())).collect();
        let had: Vec<String> = known.keys().cloned().collect();
        begins_names(&t.freeze, &had)?;
        let params = Params::placed(seed, known, DType::F32, &self.device)?;
        let pictures = per_epoch(&t, self.boxes.records.len());
        let (steps, _) = schedule(&t, pictures);
        let settings = self.settings(&parts)?;
        let replay: Option<Box<dyn Samples>> = match (t.replay.as_str(), self.replay) {
            (_, Some(boxes)) => {
                // Who labels in COCO's format labels everything; others may have labelled some.
                let complete = Path::new(&t.replay).extension().is_some_and(|e| e == "json");
                Some(Box::new(FromFiles::new(boxes, complete)))
            }
            ("rooms", None) => Some(Box::new(RoomPictures {
                seed: seed ^ REPLAY,
                from: 0,
                look: Look::Studio,
                split: Split::Train,
                vary: true,
            })),
            _ => None,
        };
        let replayed = replayed(&t, self.boxes.records.len());
        let data = Mixed { mined: FromFiles::new(self.boxes, false), replay, replayed };
        let held_out: Option<Validation> = match self.config.grounding.queries.as_str() {
            "rooms" => Some(validation(seed, Look::LivedIn, HELD_OUT)),
            _ => None,
        };
        let trainer = GroundingTrainer::new(
            params.clone(),
            &parts.config.for_training(),
            train_config(&t, seed, pictures),
            parts.tokenizer.clone(),
            parts.processor.clone(),
            Box::new(data),
            held_out,
        )?;
        let fresh: Vec<String> =
            params.named().into_iter().map(|p| p.0).filter(|n| !had.contains(n)).collect();
        ensure!(
            fresh.is_empty(),
            "{} lacks {} of the network's tensors, first {}",
            parts.name,
            fresh.len(),
            fresh[0]
        );
        let mut tuning = Tuning { trainer, average: HashMap::new(), decay: t.ema, frozen: t.freeze.clone() };
        let mut metrics = run::train(
            &mut tuning,
            &RunOptions {
                dir: self.dir.clone(),
                steps,
                resume: self.resume,
                keep: t.keep,
                stop: Some(self.stop.clone()),
                save_every: t.save_every,
                eval_every: t.eval_every,
                log_every: 10,
                settings,
                label: "detector".into(),
            },
        )?;
        let out = self.dir.join("model");
        let mut trained = params.tensors();
        trained.extend(std::mem::take(&mut tuning.average));
        let weights = export(&parts, &original, &trained, t.alpha, &out)?;
        if t.ema > 0. || t.alpha < 1. {
            // The figures of what is handed on, not of the last step.
            for (name, var) in params.named() {
                var.set(&weights[&name].to_dtype(DType::F32)?.to_device(var.device())?)?;
            }
            metrics = tuning.evaluate()?;
        }
        Ok((metrics, out))
    }

    /// What a resumed run may not change.
    fn settings(&self, parts: &DetectorParts) -> Result<serde_json::Value> {
        let mut of_run = json!(self.cfg());
        for free in ["save_every", "keep", "alpha", "eval_every"] {
            of_run.as_object_mut().expect("a table").remove(free);
        }
        // What is trained on decides the run as much as how.
        let hash = |boxes: &Boxes| -> Result<String> {
            let lines: Vec<String> =
                boxes.records.iter().map(serde_json::to_string).collect::<serde_json::Result<_>>()?;
            Ok(sha256_hex(lines.join("\n").as_bytes(), 8))
        };
        Ok(json!({
            "training": of_run, "seed": self.config.grounding.seed, "detector": parts.name,
            "fingerprint": parts.files.fingerprint(), "boxes": hash(&self.boxes)?, "rooms": rooms::VERSION,
            "replayed": self.replay.as_ref().map(hash).transpose()?,
            "sides": [parts.processor.shortest, parts.processor.longest],
        }))
    }
}

/// Held-out pictures of Rooms at each evaluation.
const HELD_OUT: u64 = 64;
/// Sets the scenes that are replayed apart from those that are mined.
const REPLAY: u64 = 0x7265_706c_6179;

/// Writes the mean of old and new weights, `alpha` of it new, as a model's folder in HF's names, in the
/// precision that the old ones have.
fn export(
    parts: &DetectorParts,
    original: &HashMap<String, Tensor>,
    trained: &HashMap<String, Tensor>,
    alpha: f64,
    out: &Path,
) -> Result<HashMap<String, Tensor>> {
    let mut weights = HashMap::with_capacity(original.len());
    for (name, old) in original {
        let new = trained.get(name).map(|new| new.to_device(&Device::Cpu)).transpose()?;
        let new = match new {
            Some(new) if alpha < 1. => {
                let old = old.to_dtype(DType::F32)?;
                ((old * (1. - alpha))? + (new * alpha)?)?
            }
            Some(new) => new,
            None => old.clone(),
        };
        weights.insert(name.clone(), new.to_dtype(old.dtype())?);
    }
    for file in FILES {
        if let Some(text) = parts.files.text(file)? {
            write_atomic(&out.join(file), |w| w.write_all(text.as_bytes()))?;
        }
    }
    if parts.files.text("config.json")?.is_none() {
        let config = parts.config.to_json()?;
        write_atomic(&out.join("config.json"), |w| writeln!(w, "{config:#}"))?;
    }
    // transformers asks for the note.
    let note = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    write_tensors(&out.join("model.safetensors"), lazily(&weights), Some(note))?;
    Ok(weights)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::real::Detector;
    use candle_core::Device;

    #[test]
    fn the_result_is_the_mean_of_old_and_new_and_loads() {
        let config = Config::resolve(None, &[]).unwrap();
        let parts = DetectorParts::open(&config.detector).unwrap();
        let original = parts.weights.tensors().unwrap();
        let name = original.keys().find(|n| n.ends_with("level_embed")).unwrap().clone();
        let old = original[&name].to_dtype(DType::F32).unwrap();
        let trained = HashMap::from([(name.clone(), (&old + 1.).unwrap())]);
        let dir = tempfile::tempdir().unwrap();
        export(&parts, &original, &trained, 0.25, dir.path()).unwrap();
        let mut cfg = config.detector.clone();
        cfg.model = dir.path().display().to_string();
        Detector::load(&cfg, &Device::Cpu).unwrap();
        let written = DetectorParts::open(&cfg).unwrap().weights.tensors().unwrap();
        assert_eq!(written.len(), original.len());
        for (n, t) in &written {
            let moved =
                (t.to_dtype(DType::F32).unwrap() - original[n].to_dtype(DType::F32).unwrap()).unwrap();
            let most = moved.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            let want = if *n == name { 0.25 } else { 0. };
            assert!((most - want).abs() < 2e-3, "{n} moved by {most}");
        }
    }

    #[test]
    fn what_is_to_be_frozen_is_known_before_the_training() {
        let set = |freeze: &str| {
            let sets = [format!("grounding.training.freeze={freeze}")];
            check_freeze(&Config::resolve(None, &sets).unwrap()).map_err(|e| e.to_string())
        };
        set("[]").unwrap();
        set("[\"model.text_backbone.\", \"model.backbone.\"]").unwrap();
        let e = set("[\"model.text_backbone.\", \"backbone\"]").unwrap_err();
        assert_eq!(e, "grounding.training.freeze: no parameter's name begins with \"backbone\"");
    }

    #[test]
    fn replay_is_its_share_of_an_epoch() {
        let mut t = Config::resolve(None, &[]).unwrap().grounding.training;
        t.replay_share = 0.25;
        assert_eq!(per_epoch(&t, 300), 400);
        t.replay = String::new();
        assert_eq!(per_epoch(&t, 300), 300);
        (t.batch, t.epochs, t.warmup, t.lr_floor) = (2, 10., 1., 1e-6);
        let (steps, s) = schedule(&t, 300);
        assert_eq!((steps, s.warmup), (1500, 150));
        assert!((s.lr(1499) - 1e-6).abs() < 1e-8 && s.lr(0) < t.lr / 50., "{} {}", s.lr(0), s.lr(1499));
    }
}
