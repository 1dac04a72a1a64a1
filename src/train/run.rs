//! What every training run shares: steps, a checkpoint that resumes exactly, a metrics log and its
//! curves, progress.
//!
//! Checkpoints are [`super::checkpoint`]'s folders, each with one safetensors file (parameters, optimiser
//! state, step, settings). Randomness must follow from the run's seed and the step number
//! alone: then a resumed run repeats what an undisturbed one would have done, and no generator
//! state is stored. The metrics log is JSON lines; on resume, lines after the checkpoint's step
//! are dropped. The page of curves is made from that log alone, and so goes on as it does.

use super::Broken;
use super::checkpoint::Checkpoints;
use crate::files::{lazily, sweep, write_atomic, write_tensors};
use crate::nn::Params;
use crate::report::pulse::Pulse;
use crate::report::{tensorboard, training};
use anyhow::ensure;
use candle_core::{Device, Tensor};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

pub type Metrics = Map<String, Value>;

/// Something that learns by steps.
pub trait Trainee {
    /// What is saved and loaded as the network.
    fn params(&self) -> &Params;
    /// The optimiser's state by name, to be handed back to [`Trainee::restore`].
    fn optimiser_state(&self) -> candle_core::Result<HashMap<String, Tensor>>;
    fn restore(&mut self, state: HashMap<String, Tensor>, step: u64) -> candle_core::Result<()>;
    /// One optimiser step, counted from 0; returns what to log (a number under `"loss"` at least).
    fn step(&mut self, step: u64) -> anyhow::Result<Metrics>;
    /// Held-out figures.
    fn evaluate(&mut self) -> anyhow::Result<Metrics>;
}

/// That a run may write into a folder: a new or empty one, or one in which such a run has `begun`. Its files
/// go by names that others use too.
pub fn check_folder(dir: &Path, begun: impl FnOnce() -> bool) -> anyhow::Result<()> {
    // What a kill left half written has a hidden name.
    let shown = |e: std::fs::DirEntry| !e.file_name().to_string_lossy().starts_with('.');
    let full = std::fs::read_dir(dir).is_ok_and(|all| all.flatten().any(shown));
    ensure!(!full || begun(), "--out {} is not empty and holds no run; name a new folder", dir.display());
    Ok(())
}

/// A line for people beside a progress bar; where there is no terminal for the bar, on its own.
pub fn say(bar: &ProgressBar, line: &str) {
    match bar.is_hidden() {
        true => notice!("{line}"),
        false => bar.println(line),
    }
}

#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Holds `checkpoints`, `metrics.jsonl`, and its curves in `report.html` and for TensorBoard.
    pub dir: PathBuf,
    pub steps: u64,
    /// Continue from the folder's newest whole checkpoint; without it, a folder that holds one is refused.
    pub resume: bool,
    /// Checkpoints kept.
    pub keep: usize,
    /// Set from outside, it ends the run after the step that is under way, saved.
    pub stop: Option<Arc<AtomicBool>>,
    pub save_every: u64,
    pub eval_every: u64,
    pub log_every: u64,
    /// What must be the same for a resumed run to be the same run.
    pub settings: Value,
    pub label: String,
}

/// Runs `trainee` up to `options.steps`, evaluates at the end, and leaves the final checkpoint.
///
/// # Errors
/// [`Broken`] if it was stopped, or its loss is no number; what was saved stays.
pub fn train(trainee: &mut dyn Trainee, options: &RunOptions) -> anyhow::Result<Metrics> {
    std::fs::create_dir_all(&options.dir)?;
    sweep(&options.dir);
    let checkpoints = Checkpoints::open(&options.dir.join(CHECKPOINTS), options.keep)?;
    let log = options.dir.join(METRICS);
    let mut start = 0;
    let said = |why: &str| notice!("valor: passed over a checkpoint: {why}");
    if let Some(newest) = checkpoints.newest(said)? {
        if !options.resume {
            anyhow::bail!(
                "{} holds a run: give --resume to continue it or another folder",
                options.dir.display()
            );
        }
        start = load(&newest.path.join(CHECKPOINT), trainee, &options.settings)?;
    }
    // Made of what the log has: that it can't be written is told, and ends no training.
    let draw = |bar: &ProgressBar| {
        let title = format!("{} {}", options.label, options.dir.display());
        if let Err(e) = report(&options.dir, |metrics| training::curves(&title, metrics)) {
            say(bar, &format!("valor: no page of curves: {e:#}"));
        }
    };
    if start == options.steps
        && let Some(done) = last_figures(&log, start)
    {
        // A kill may have come between the figures and their page.
        draw(&ProgressBar::hidden());
        return Ok(done);
    }
    let mut log = MetricsLog::open(&log, start)?;
    let bar = ProgressBar::new(options.steps).with_position(start);
    bar.set_style(ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len} {elapsed} eta {eta} {msg}")?);
    bar.set_prefix(options.label.clone());
    let begun = Instant::now();
    let mut pulse = Pulse::default();
    for step in start..options.steps {
        let mut m = trainee.step(step)?;
        let done = step + 1;
        if !m.get("loss").and_then(Value::as_f64).is_some_and(f64::is_finite) {
            let why = format!("step {done}: the loss is not finite ({m:?}); the last checkpoint is kept");
            return Err(Broken(why).into());
        }
        if done % options.log_every.max(1) == 0 || done == options.steps {
            m.insert("seconds".into(), json!(begun.elapsed().as_secs_f64()));
            m.insert("unix".into(), json!(unix()));
            bar.set_message(format!("loss {:.4}", m["loss"].as_f64().unwrap_or(f64::NAN)));
            log.write(done, m)?;
        }
        bar.set_position(done);
        pulse.beat(&bar);
        let evaluates = options.eval_every > 0 && done % options.eval_every == 0 && done < options.steps;
        if evaluates {
            let mut m = trainee.evaluate()?;
            say(&bar, &format!("{} step {done}: {}", options.label, Value::Object(m.clone())));
            m.insert("unix".into(), json!(unix()));
            log.write(done, m)?;
        }
        let stopped = options.stop.as_ref().is_some_and(|s| s.load(Ordering::Relaxed));
        let saves = done % options.save_every.max(1) == 0 || done == options.steps || stopped;
        if saves {
            checkpoints
                .save(done, None, |dir| save(&dir.join(CHECKPOINT), trainee, done, &options.settings))?;
        }
        if saves || evaluates {
            draw(&bar);
        }
        if stopped && done < options.steps {
            bar.finish_and_clear();
            let why = format!("stopped after step {done} of {}, saved; go on with --resume", options.steps);
            return Err(Broken(why).into());
        }
    }
    bar.finish_and_clear();
    let m = trainee.evaluate()?;
    let mut logged = m.clone();
    logged.insert("unix".into(), json!(unix()));
    log.write(options.steps, logged)?;
    draw(&bar);
    Ok(m)
}

/// `report.html`, made by `page`, and TensorBoard's file, anew from the log in a run's folder.
pub(super) fn report(dir: &Path, page: impl FnOnce(&[Value]) -> String) -> anyhow::Result<()> {
    let metrics = lines(&dir.join(METRICS));
    let page = page(&metrics);
    write_atomic(&dir.join("report.html"), |w| w.write_all(page.as_bytes()))?;
    let events = tensorboard::events(&metrics);
    write_atomic(&dir.join("events.out.tfevents.valor"), |w| w.write_all(&events))?;
    Ok(())
}

/// Seconds since 1970, for people who look when something happened.
pub(super) fn unix() -> f64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0., |d| d.as_secs_f64().round())
}

/// The lines of a record; none where it is not there, and not a half-written one.
pub(super) fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect()
}

/// The held-out figures that a run logged at its end.
fn last_figures(log: &Path, step: u64) -> Option<Metrics> {
    let text = std::fs::read_to_string(log).ok()?;
    let mut last: Metrics = serde_json::from_str(text.strip_suffix('\n')?.lines().last()?).ok()?;
    let is_theirs = last.get("step") == Some(&json!(step)) && !last.contains_key("loss");
    last.remove("step");
    last.remove("unix");
    is_theirs.then_some(last)
}

fn save(path: &Path, trainee: &dyn Trainee, step: u64, settings: &Value) -> anyhow::Result<()> {
    let mut all = HashMap::new();
    all.extend(trainee.params().tensors().into_iter().map(|(n, t)| (format!("p/{n}"), t)));
    all.extend(trainee.optimiser_state()?.into_iter().map(|(n, t)| (format!("o/{n}"), t)));
    let meta =
        HashMap::from([("step".to_string(), step.to_string()), ("settings".into(), settings.to_string())]);
    Ok(write_tensors(path, lazily(&all), Some(meta))?)
}

fn load(path: &Path, trainee: &mut dyn Trainee, settings: &Value) -> anyhow::Result<u64> {
    let named = |m: String| anyhow::anyhow!("{}: {m}", path.display());
    let bytes = std::fs::read(path)?;
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).map_err(|e| named(e.to_string()))?;
    let meta = header.metadata().clone().unwrap_or_default();
    let step = meta.get("step").and_then(|s| s.parse().ok()).ok_or_else(|| named("no step in it".into()))?;
    let was: Value = serde_json::from_str(meta.get("settings").map_or("null", String::as_str))?;
    if &was != settings {
        return Err(named(format!("made with other settings ({was}); this run has {settings}")));
    }
    let mut tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
    for (name, var) in trainee.params().named() {
        let Some(t) = tensors.remove(&format!("p/{name}")) else {
            return Err(named(format!("parameter {name} is missing")));
        };
        var.set(&t.to_device(var.device())?)?;
    }
    let state = tensors.into_iter().filter_map(|(n, t)| Some((n.strip_prefix("o/")?.to_string(), t)));
    trainee.restore(state.collect(), step)?;
    Ok(step)
}

/// A run's state, in each of its checkpoints.
const CHECKPOINT: &str = "checkpoint.safetensors";
/// Where those are, in a run's folder.
const CHECKPOINTS: &str = "checkpoints";
/// The log, there too.
const METRICS: &str = "metrics.jsonl";

/// Has a run saved anything yet?
pub fn has_checkpoint(run: &Path) -> bool {
    Checkpoints::of(&run.join(CHECKPOINTS)).any()
}

/// Parameters of a finished or running run, for evaluation or export; `None` if the folder is no run's.
pub fn parameters(run: &Path) -> anyhow::Result<Option<HashMap<String, Tensor>>> {
    let dir = run.join(CHECKPOINTS);
    if !dir.is_dir() {
        return Ok(None);
    }
    let Some(newest) = Checkpoints::of(&dir).newest(|_| ())? else { return Ok(None) };
    let all = candle_core::safetensors::load(newest.path.join(CHECKPOINT), &Device::Cpu)?;
    let all = all.into_iter().filter_map(|(n, t)| Some((n.strip_prefix("p/")?.to_string(), t))).collect();
    Ok(Some(all))
}

pub(super) struct MetricsLog(std::fs::File);

impl MetricsLog {
    /// Opens for appending, without the lines of steps after `start` (lost with the crash that
    /// made the resume necessary) and without a half-written last line.
    pub(super) fn open(path: &Path, start: u64) -> anyhow::Result<Self> {
        let old = std::fs::read_to_string(path).unwrap_or_default();
        let step = |l: &str| serde_json::from_str::<Value>(l).ok()?.get("step")?.as_u64();
        let kept: Vec<&str> = old.lines().filter(|l| step(l).is_some_and(|s| s <= start)).collect();
        write_atomic(path, |w| kept.iter().try_for_each(|l| writeln!(w, "{l}")))?;
        Ok(Self(std::fs::OpenOptions::new().append(true).open(path)?))
    }

    pub(super) fn write(&mut self, step: u64, metrics: Metrics) -> anyhow::Result<()> {
        let mut line = Map::from_iter([("step".to_string(), json!(step))]);
        line.extend(metrics);
        writeln!(self.0, "{}", Value::Object(line))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    /// Plain gradient descent on Σ (w − target)², the target drawn from the step.
    struct Toy {
        params: Params,
        momentum: Tensor,
    }

    impl Toy {
        fn new() -> Self {
            let params = Params::new(5);
            params.builder().get_with_hints(3, "w", candle_nn::Init::Const(1.)).unwrap();
            Self { params, momentum: Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap() }
        }
    }

    impl Trainee for Toy {
        fn params(&self) -> &Params {
            &self.params
        }
        fn optimiser_state(&self) -> candle_core::Result<HashMap<String, Tensor>> {
            Ok(HashMap::from([("m".to_string(), self.momentum.clone())]))
        }
        fn restore(&mut self, mut state: HashMap<String, Tensor>, _: u64) -> candle_core::Result<()> {
            self.momentum = state.remove("m").expect("saved above");
            Ok(())
        }
        fn step(&mut self, step: u64) -> anyhow::Result<Metrics> {
            let w = self.params.get("w").unwrap();
            let target = (step as f64 * 0.7).sin();
            let loss = (w.as_tensor() - target)?.sqr()?.sum_all()?;
            let g = loss.backward()?.remove(&w).unwrap();
            self.momentum = ((&self.momentum * 0.9)? + g)?;
            w.set(&(w.as_tensor() - (&self.momentum * 0.01)?)?)?;
            Ok(Map::from_iter([("loss".to_string(), json!(loss.to_scalar::<f32>()?))]))
        }
        fn evaluate(&mut self) -> anyhow::Result<Metrics> {
            Ok(Map::new())
        }
    }

    fn options(dir: &Path, steps: u64) -> RunOptions {
        RunOptions {
            dir: dir.into(),
            steps,
            resume: true,
            keep: 2,
            stop: None,
            save_every: 4,
            eval_every: 0,
            log_every: 1,
            settings: json!({"seed": 5}),
            label: "toy".into(),
        }
    }

    fn run(dir: &Path, steps: u64) -> Vec<f32> {
        let mut toy = Toy::new();
        train(&mut toy, &options(dir, steps)).unwrap();
        toy.params.get("w").unwrap().to_vec1().unwrap()
    }

    #[test]
    fn a_resumed_run_equals_an_undisturbed_one() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let whole = run(a.path(), 20);
        run(b.path(), 8);
        assert_eq!(run(b.path(), 20), whole);
        let lines = |d: &Path| -> Vec<Value> {
            let text = std::fs::read_to_string(d.join("metrics.jsonl")).unwrap();
            let parse = |l: &str| serde_json::from_str::<Value>(l).unwrap();
            text.lines().map(parse).filter(|l| l.get("loss").is_some()).collect()
        };
        let losses = |d| lines(d).iter().map(|l| (l["step"].clone(), l["loss"].clone())).collect::<Vec<_>>();
        assert_eq!(losses(a.path()), losses(b.path()));
    }

    #[test]
    fn a_run_has_a_page_of_its_curves_from_first_to_last_session() {
        let dir = tempfile::tempdir().unwrap();
        let page = || std::fs::read_to_string(dir.path().join("report.html")).unwrap();
        let points = |page: &str| {
            let (_, curve) = page.split_once("<polyline points=\"").unwrap();
            curve.split_once('"').unwrap().0.split(' ').count()
        };
        run(dir.path(), 8);
        assert!(page().contains("After step 8") && page().contains("<b>loss</b>"), "{}", page());
        run(dir.path(), 20);
        assert_eq!((points(&page()), page().contains("After step 20")), (20, true), "{}", page());
        // A finished run's is made anew where it is gone.
        std::fs::remove_file(dir.path().join("report.html")).unwrap();
        run(dir.path(), 20);
        assert_eq!(points(&page()), 20);
        assert!(dir.path().join("events.out.tfevents.valor").is_file());
        // Nor is one that can't be made the end of anything.
        let other = tempfile::tempdir().unwrap();
        std::fs::create_dir(other.path().join("report.html")).unwrap();
        assert_eq!(run(other.path(), 20), run(dir.path(), 20));
        assert_eq!(run(other.path(), 20), run(dir.path(), 20));
    }

    #[test]
    fn a_folder_of_something_else_is_no_runs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        check_folder(&path.join("new"), || false).unwrap();
        std::fs::write(path.join(".half.tmp"), "").unwrap();
        check_folder(path, || false).unwrap();
        std::fs::write(path.join("metrics.jsonl"), "{}\n").unwrap();
        let e = check_folder(path, || false).unwrap_err().to_string();
        assert!(e.contains("is not empty and holds no run; name a new folder"), "{e}");
        check_folder(path, || true).unwrap();
    }

    #[test]
    fn other_settings_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        run(dir.path(), 4);
        let other = RunOptions { settings: json!({"seed": 6}), ..options(dir.path(), 8) };
        let e = train(&mut Toy::new(), &other).unwrap_err().to_string();
        assert!(e.contains("other settings"), "{e}");
    }
}
