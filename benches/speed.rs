//! valor's side of `scripts/peers.py`, on the weights and inputs of a work folder that
//! `benches/peers/speed.py make WORK` writes, which is also the same work in PyTorch.
//!
//! `speed CASE[,CASE…] WORK [REPS] [SECONDS]` runs a case once to warm up, then REPS times or until SECONDS have
//! gone, and prints one JSON line: medians of wall and processor time, peak memory, and numbers of the
//! result ("probe") that must be PyTorch's. A case that fails is a line with its error, and the next one goes
//! on; the exit code tells. `speed pack WORK f16|q8_0` writes the language model as GGUF; cases of that model
//! take `_f16` and `_q8_0` at their ends (on the CPU), and `_bf16`, which is computed in that; all else is f32.
//!
//! `VALOR_DEVICE=cuda` runs the cases on the first GPU. There three runs warm up, clocks are read when the GPU
//! is done, short work is timed many calls together, and the line has the most memory that the case took of
//! the GPU, its weights included ("gpu_mb"). Cases of one language model that follow each other load it once.

#![allow(clippy::print_stderr)]

use anyhow::{Context, anyhow, bail, ensure};
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::safetensors::MmapedSafetensors;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, D, DType, Device, Layout, Shape, Tensor, Var};
use candle_nn::VarBuilder;
use serde_json::{Map, Value as Json, json};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Instant;
use valor::llm::SamplingOptions;
use valor::llm::engine::{Engine, EngineOptions, Job, Network};
use valor::llm::tokenizer::Tokenizer;
use valor::models::dinov2::{self, Dinov2};
use valor::models::grounding_dino::{self, Freeze, GroundingDino, Inputs, SPECIAL_TOKENS};
use valor::models::moge::{self, MoGe};
use valor::models::qwen3::{Config, KvCache, Qwen3, Rope};
use valor::nn::lora::{LoraConfig, adapted};
use valor::nn::msda::msda;
use valor::nn::optim::Group;
use valor::nn::{self, AdamW, AdamWConfig, Mask, Params, TrainCtx};
use valor::train::grounding::{BACKBONE, TEXT_BACKBONE, losses};
use valor::train::grounding_loss::{LossConfig, Target, layer_loss, total};
use valor::weights::{Checkpoint, ModelFiles, is_unused};

const USAGE: &str = "skipped: needs a case and a work folder; run scripts/peers.py, which makes one";
/// `(height, width)` of the detector's feature levels for a picture of 800×1066.
const LEVELS: [(usize, usize); 4] = [(100, 134), (50, 67), (25, 34), (13, 17)];
/// Tokens of the prompt, and those fed after it.
const PROMPT: usize = 128;
const NEW: usize = 64;
/// Not to be moved far, as what is trained is compared only before the first step.
const RATE: f64 = 1e-5;
/// Runs that warm a GPU up: kernels are loaded and memory is taken as they are first wanted.
const GPU_WARM_UPS: usize = 3;
/// Calls between two readings of the clock, of work that takes a GPU less time than it takes to ask for it.
const GPU_CALLS: usize = 20;

fn without_dropout(cfg: grounding_dino::Config) -> grounding_dino::Config {
    let mut text = cfg.text_config.clone();
    (text.hidden_dropout_prob, text.attention_probs_dropout_prob) = (0., 0.);
    let mut backbone = cfg.backbone_config.clone();
    (backbone.hidden_dropout_prob, backbone.drop_path_rate) = (0., 0.);
    grounding_dino::Config {
        text_config: text,
        backbone_config: backbone,
        dropout: 0.,
        attention_dropout: 0.,
        activation_dropout: 0.,
        text_enhancer_dropout: 0.,
        fusion_dropout: 0.,
        fusion_droppath: 0.,
        ..cfg
    }
}

/// HEIGHTxWIDTH.
fn sides(size: &str) -> anyhow::Result<(usize, usize)> {
    let of = size.split_once('x').and_then(|(h, w)| Some((h.parse().ok()?, w.parse().ok()?)));
    of.with_context(|| format!("{size:?}: expected HEIGHTxWIDTH"))
}

fn main() -> anyhow::Result<()> {
    // As the program itself does.
    nn::keep_freed_memory();
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [cases, work, rest @ ..] = args.as_slice() else {
        eprintln!("{USAGE}");
        return Ok(());
    };
    if cases == "pack" {
        let packing = Packing::named(rest.first().context("pack WORK f16|q8_0")?)?;
        return pack(Path::new(work), packing);
    }
    let number = |i: usize, or: f64| rest.get(i).map_or(Ok(or), |s| s.parse::<f64>());
    let device = match std::env::var("VALOR_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => Device::Cpu,
        Ok("cuda") => nn::gpu(0).context("VALOR_DEVICE=cuda")?,
        Ok(other) => bail!("VALOR_DEVICE={other}: expected cpu or cuda"),
    };
    let mut bench = Bench {
        work: work.into(),
        reps: number(0, 1.)? as usize,
        seconds: number(1, 20.)?,
        device,
        language: Language { folder: LANGUAGE, dtype: DType::F32, packing: None },
        kept: None,
        started: Instant::now(),
        loaded_mb: 0.,
        peak_at_load: 0.,
        line: Map::new(),
    };
    let mut failed = Vec::new();
    for case in cases.split(',') {
        // A panic is one case's failure, too.
        let measured = catch_unwind(AssertUnwindSafe(|| bench.measured(case)));
        match measured.unwrap_or_else(|_| Err(anyhow!("it panicked"))) {
            Ok(line) => println!("{line}"),
            Err(e) => {
                println!("{}", json!({ "who": "valor", "case": case, "error": format!("{e:#}") }));
                eprintln!("{case}: {e:?}");
                failed.push(case);
            }
        }
    }
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

struct Bench {
    work: PathBuf,
    reps: usize,
    seconds: f64,
    device: Device,
    /// What the case is of, if it is of a language model.
    language: Language,
    /// The language model loaded last, for the next case.
    kept: Option<(Language, Config, Qwen3)>,
    started: Instant,
    /// Memory in use as the work began, and the most until then.
    loaded_mb: f64,
    peak_at_load: f64,
    line: Map<String, Json>,
}

/// A language model as a case wants it.
#[derive(Clone, Copy, PartialEq)]
struct Language {
    folder: &'static str,
    dtype: DType,
    packing: Option<Packing>,
}

const LANGUAGE: &str = "qwen3-0.6b";
const LARGE_LANGUAGE: &str = "qwen3-8b";

impl Bench {
    /// A case's line.
    fn measured(&mut self, case: &str) -> anyhow::Result<Json> {
        self.line = Map::new();
        let probe = self.case(case).with_context(|| format!("{case} on {}", self.work.display()))?;
        let mut line = json!({ "who": "valor", "case": case, "threads": rayon::current_num_threads() });
        let peak = status_mb("VmHWM")?;
        line["peak_mb"] = peak.max(self.peak_at_load).into();
        // What the work itself took, beside weights and inputs.
        line["work_mb"] = (peak - self.loaded_mb).max(0.).into();
        if let Some(mb) = gpu_peak_mb(&self.device)? {
            line["gpu_mb"] = mb.into();
        }
        let line = line.as_object_mut().expect("it was made as one");
        line.append(&mut self.line);
        line.insert("probe".into(), probe);
        Ok(Json::from(line.clone()))
    }

    fn case(&mut self, case: &str) -> anyhow::Result<Json> {
        let (name, packing) = match Packing::ALL.iter().find(|p| case.ends_with(p.ending())) {
            Some(p) => (&case[..case.len() - p.ending().len()], Some(*p)),
            None => (case, None),
        };
        let (name, dtype) = match name.strip_suffix("_bf16") {
            Some(name) => (name, DType::BF16),
            None => (name, DType::F32),
        };
        let (kind, rest) = name.split_once('_').unwrap_or((name, ""));
        let (kind, folder) = match kind.strip_suffix('8') {
            Some(kind) => (kind, LARGE_LANGUAGE),
            None => (kind, LANGUAGE),
        };
        let n = || rest.trim_start_matches('b').parse::<usize>().with_context(|| format!("{case:?}"));
        ensure!(
            packing.is_none() || ["prefill", "decode", "question"].contains(&kind) && folder == LANGUAGE,
            "{case}: not a case of packed weights"
        );
        ensure!(
            dtype == DType::F32 || ["prefill", "decode", "lora", "msda"].contains(&kind),
            "{case}: not a case of bf16"
        );
        ensure!(packing.is_none() && kind != "question" || self.device.is_cpu(), "{case}: for the CPU");
        self.language = Language { folder, dtype, packing };
        if self.kept.as_ref().is_some_and(|(of, ..)| *of != self.language)
            || !["prefill", "decode"].contains(&kind)
        {
            self.kept = None;
        }
        // What was freed is free, and counts no more.
        self.device.synchronize()?;
        gpu_peak_mb(&self.device)?;
        self.started = Instant::now();
        // Of nearly equal scores the detector takes others when they are rounded.
        valor::nn::set_tf32(kind != "gdino");
        valor::nn::set_exact_sums(!rest.ends_with("_loose"));
        match (kind, rest) {
            ("gdino", what) => {
                let parts: Vec<&str> = what.split('_').collect();
                match parts[..] {
                    ["fwd"] => self.gdino_forward(None),
                    ["fwd", size] => self.gdino_forward(Some(sides(size)?)),
                    ["train"] => self.gdino_train(false, None),
                    ["train", "recompute"] => self.gdino_train(true, None),
                    ["train", size] => self.gdino_train(false, Some(sides(size)?)),
                    ["train", "recompute", size] => self.gdino_train(true, Some(sides(size)?)),
                    _ => bail!("no case is called {case:?}"),
                }
            }
            ("boxes", _) => self.boxes(n()?),
            ("vitl", _) => self.vitl(n()?),
            ("moge", _) => self.moge(n()?),
            ("prefill", _) => self.prefill(n()?),
            ("decode", _) => self.decode(n()?),
            ("question", _) => self.question(n()?),
            ("qwen", "train") => self.qwen_train(),
            ("lora", "train") => self.lora_train(),
            ("msda", _) => match rest.split_once('_') {
                Some((queries, "fwd")) => self.msda(queries, false),
                Some((queries, "fwdbwd" | "fwdbwd_loose")) => self.msda(queries, true),
                _ => bail!("no case is called {case:?}"),
            },
            _ => bail!("no case is called {case:?}"),
        }
    }

    fn input(&self, name: &str) -> anyhow::Result<Tensor> {
        // SAFETY: nothing changes the file while it is read.
        let file = unsafe { MmapedSafetensors::new(self.work.join("inputs.safetensors"))? };
        Ok(file.load(name, &self.device)?)
    }

    fn ids(&self, name: &str) -> anyhow::Result<Tensor> {
        Ok(self.input(name)?.to_dtype(DType::U32)?)
    }

    fn checkpoint(&self, folder: &str) -> anyhow::Result<Checkpoint> {
        Ok(Checkpoint::open(&self.work.join(folder).join("model.safetensors"))?)
    }

    fn config(&self, folder: &str) -> anyhow::Result<String> {
        let path = self.work.join(folder).join("config.json");
        std::fs::read_to_string(&path).with_context(|| path.display().to_string())
    }

    fn loaded(&mut self) -> anyhow::Result<()> {
        self.device.synchronize()?;
        // What loading has freed is no weight.
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        // SAFETY: gives free memory back, nothing else.
        unsafe {
            libc::malloc_trim(0);
        }
        self.line.insert("load_s".into(), self.started.elapsed().as_secs_f64().into());
        (self.loaded_mb, self.peak_at_load) = (status_mb("VmRSS")?, status_mb("VmHWM")?);
        // From here on the kernel counts the peak anew, where it lets us.
        let _ = std::fs::write("/proc/self/clear_refs", "5");
        Ok(())
    }

    fn warm_ups(&self) -> usize {
        if self.device.is_cpu() { 1 } else { GPU_WARM_UPS }
    }

    /// Times `work`; returns what it gave first, to warm up.
    fn run<T>(&mut self, mut work: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
        let first = work()?;
        for _ in 1..self.warm_ups() {
            work()?;
        }
        self.run_prepared(|| Ok(()), |()| work().map(drop))?;
        Ok(first)
    }

    /// [`Self::run`] of work too short for a GPU's clock.
    fn run_short<T>(&mut self, mut work: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
        if self.device.is_cpu() {
            return self.run(work);
        }
        let first = self.run(|| {
            for _ in 1..GPU_CALLS {
                work()?;
            }
            work()
        })?;
        self.line.insert("calls".into(), GPU_CALLS.into());
        for of in ["seconds", "cpu"] {
            let all = self.line.get(of).and_then(Json::as_f64).context("nothing was timed")?;
            self.line.insert(of.into(), (all / GPU_CALLS as f64).into());
        }
        Ok(first)
    }

    /// Times `work` on what `prepare` gives, which does not count; returns what the last time gave.
    fn run_prepared<S, T>(
        &mut self,
        mut prepare: impl FnMut() -> anyhow::Result<S>,
        mut work: impl FnMut(S) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let (mut wall, mut cpu, begun) = (Vec::new(), Vec::new(), Instant::now());
        loop {
            let given = prepare()?;
            self.device.synchronize()?;
            let (t, c) = (Instant::now(), cpu_seconds());
            let last = work(given)?;
            self.device.synchronize()?;
            wall.push(t.elapsed().as_secs_f64());
            cpu.push(cpu_seconds() - c);
            if wall.len() >= self.reps || begun.elapsed().as_secs_f64() >= self.seconds {
                self.line.insert("reps".into(), wall.len().into());
                self.line.insert("seconds".into(), median(wall).into());
                self.line.insert("cpu".into(), median(cpu).into());
                return Ok(last);
            }
        }
    }

    fn gdino_config(&self) -> anyhow::Result<grounding_dino::Config> {
        Ok(grounding_dino::Config::from_json(&self.config("gdino-swint")?)?)
    }

    fn gdino_inputs(&self, name: &str) -> anyhow::Result<Inputs> {
        let ids = self.ids("gdino_ids")?;
        let mask = ids.ones_like()?;
        Ok(Inputs::new(self.input(name)?, None, ids, mask, &SPECIAL_TOKENS)?)
    }

    /// [`Self::gdino_inputs`] of one case, or the corner of that size of the forward pass's picture.
    fn gdino_sized(&self, name: &str, size: Option<(usize, usize)>) -> anyhow::Result<Inputs> {
        let Some((h, w)) = size else { return self.gdino_inputs(name) };
        let mut x = self.gdino_inputs("gdino_fwd")?;
        x.pixel_values = x.pixel_values.narrow(2, 0, h)?.narrow(3, 0, w)?.contiguous()?;
        Ok(x)
    }

    fn gdino_forward(&mut self, size: Option<(usize, usize)>) -> anyhow::Result<Json> {
        let cfg = self.gdino_config()?;
        let net = self.checkpoint("gdino-swint")?.build(
            DType::F32,
            &self.device,
            grounding_dino::UNUSED,
            |vb| GroundingDino::new(&cfg, vb),
        )?;
        let x = self.gdino_sized("gdino_fwd", size)?;
        self.loaded()?;
        let out = self.run(|| {
            let mut out = net.forward(&x, None)?;
            Ok((out.boxes.pop(), out.logits.pop()))
        })?;
        let (Some(boxes), Some(logits)) = out else { bail!("the detector has no decoder layers") };
        // Sorted: scores closer than rounding may change places, and then two queries do (see full_size.rs).
        let ordered = |t: &Tensor| -> anyhow::Result<Vec<f64>> {
            let t = t.to_device(&Device::Cpu)?;
            sample(&t.transpose(1, 2)?.contiguous()?.sort_last_dim(true)?.0.transpose(1, 2)?)
        };
        let logits = logits.narrow(2, 0, x.input_ids.dim(1)?)?;
        Ok(json!({ "boxes": ordered(&boxes)?, "logits": ordered(&logits)? }))
    }

    /// Matching and losses of one decoder layer's 900 queries with so many true boxes.
    fn boxes(&mut self, n: usize) -> anyhow::Result<Json> {
        const QUERIES: usize = 900;
        const TOKENS: usize = 256;
        let wave = |i: usize, step: f32| (i as f32 * step).sin() * 0.5 + 0.5;
        let logits: Vec<f32> = (0..QUERIES * TOKENS).map(|i| wave(i, 0.37) * 8. - 6.).collect();
        let logits = Var::from_vec(logits, (1, QUERIES, TOKENS), &self.device)?;
        let boxes: Vec<f32> = (0..QUERIES * 4).map(|i| 0.1 + 0.5 * wave(i, 0.71)).collect();
        let boxes = Var::from_vec(boxes, (1, QUERIES, 4), &self.device)?;
        let of = |i: usize| [0.3, 1.1, 1.7, 2.3].map(|step| 0.15 + 0.5 * wave(i + 1, step));
        let target = Target {
            boxes: (0..n).map(of).collect(),
            columns: (0..n).map(|i| vec![i % TOKENS]).collect(),
            ignore: Vec::new(),
        };
        let cfg = LossConfig::hf();
        self.loaded()?;
        let loss = self.run(|| {
            let loss = layer_loss(&cfg, &logits, &boxes, &[TOKENS], std::slice::from_ref(&target))?;
            let loss = total(&cfg, &[loss])?;
            loss.backward()?;
            Ok(loss.to_scalar::<f32>()?)
        })?;
        Ok(json!({ "loss": [loss] }))
    }

    fn gdino_train(&mut self, recompute: bool, size: Option<(usize, usize)>) -> anyhow::Result<Json> {
        let freeze = Freeze { backbone: true, text: true };
        let cfg = grounding_dino::Config { freeze, ..self.gdino_config()? };
        let mut tensors = self.checkpoint("gdino-swint")?.tensors()?;
        tensors.retain(|name, _| !is_unused(name, grounding_dino::UNUSED));
        let params = Params::placed(0, tensors, DType::F32, &self.device)?;
        let net = GroundingDino::new(&cfg, params.builder())?;
        let frozen = |name: &str| name.starts_with(BACKBONE) || name.starts_with(TEXT_BACKBONE);
        let adamw = AdamWConfig { max_grad_norm: None, ..AdamWConfig::default() };
        let mut optimiser =
            AdamW::new(params.named(), adamw, |name, var| (!frozen(name)).then(|| Group::usual(var)))?;
        let x = self.gdino_sized("gdino_train", size)?;
        let target = Target {
            boxes: vec![[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.3, 0.2], [0.7, 0.2, 0.1, 0.1]],
            columns: vec![vec![1], vec![3, 4], vec![6, 7]],
            ignore: Vec::new(),
        };
        let (loss_of, lens) = (LossConfig::hf(), [x.input_ids.dim(1)?]);
        self.loaded()?;
        let mut ctx = TrainCtx::new(0);
        if recompute {
            ctx = ctx.recomputing(params.tensors().into_values().collect());
        }
        // The first step has no dropout, so that its loss can be compared.
        let still = GroundingDino::new(&without_dropout(cfg), params.builder())?;
        let mut first = true;
        let (loss, norm) = self.run(|| {
            let out = if first { &still } else { &net }.forward(&x, Some(&mut ctx))?;
            first = false;
            let loss = total(&loss_of, &losses(&loss_of, &out, &lens, std::slice::from_ref(&target))?)?;
            let value = loss.to_scalar::<f32>()?;
            optimiser.accumulate(&nn::backward(&loss)?, 1.)?;
            Ok((value, optimiser.step(RATE)?.grad_norm))
        })?;
        Ok(json!({ "loss": [loss], "gradient": [norm] }))
    }

    fn vitl(&mut self, tokens: usize) -> anyhow::Result<Json> {
        let cfg: dinov2::HfConfig = serde_json::from_str(&self.config("dinov2-large")?)?;
        let net = self
            .checkpoint("dinov2-large")?
            .build(DType::F32, &self.device, dinov2::UNUSED, |vb| Dinov2::new(&cfg.into(), vb))?;
        let x = self.input(&format!("vitl_{tokens}"))?;
        self.loaded()?;
        let hidden = self.run(|| Ok(net.forward(&x)?))?;
        Ok(json!({ "hidden": sample(&hidden)? }))
    }

    fn moge(&mut self, tokens: usize) -> anyhow::Result<Json> {
        let cfg: moge::Config = serde_json::from_str(&self.config("moge-2-vitl")?)?;
        let net = self
            .checkpoint("moge-2-vitl")?
            .build(DType::F32, &self.device, moge::UNUSED, |vb| MoGe::new(&cfg, vb))?;
        let x = self.input("moge")?;
        self.loaded()?;
        let out = self.run(|| Ok(net.forward(&x, tokens)?))?;
        let parts = [
            ("points", out.points),
            ("normal", out.normal),
            ("mask", out.mask),
            ("metric_scale", out.metric_scale),
        ];
        let of =
            |(name, t): (&str, Option<Tensor>)| Ok((name.to_owned(), sample(&t.context("no head")?)?.into()));
        Ok(Json::Object(parts.into_iter().map(of).collect::<anyhow::Result<_>>()?))
    }

    fn qwen(&mut self) -> anyhow::Result<(Config, Qwen3)> {
        if let Some((_, cfg, net)) = &self.kept {
            return Ok((cfg.clone(), net.clone()));
        }
        let (cfg, net) = self.qwen_on(|vb| vb)?;
        if !self.device.is_cpu() {
            self.kept = Some((self.language, cfg.clone(), net.clone()));
        }
        Ok((cfg, net))
    }

    fn qwen_on(
        &self,
        vb: impl FnOnce(VarBuilder<'static>) -> VarBuilder<'static>,
    ) -> anyhow::Result<(Config, Qwen3)> {
        let Language { folder, dtype, packing } = self.language;
        let cfg: Config = serde_json::from_str(&self.config(folder)?)?;
        let weights = match packing {
            Some(p) => Checkpoint::open(&p.file(&self.work))?,
            None => self.checkpoint(folder)?,
        };
        let unused: &[&str] = if cfg.tie_word_embeddings { &["lm_head."] } else { &[] };
        let net = weights.build(dtype, &self.device, unused, |b| Qwen3::new(&cfg, vb(b)))?;
        Ok((cfg, net))
    }

    fn prefill(&mut self, tokens: usize) -> anyhow::Result<Json> {
        let (cfg, net) = self.qwen()?;
        let ids = self.ids("qwen_ids")?.narrow(0, 0, 1)?.narrow(1, 0, tokens)?.contiguous()?;
        self.loaded()?;
        let logits = self.run(|| {
            let mut cache = KvCache::new(&cfg, 1, tokens, net.dtype(), net.device())?;
            Ok(net.logits(&forward(&net, &cfg, &ids, &mut cache)?)?)
        })?;
        Ok(json!({ "logits": sample(&logits)? }))
    }

    fn decode(&mut self, batch: usize) -> anyhow::Result<Json> {
        let (cfg, net) = self.qwen()?;
        let ids = self.ids("qwen_ids")?;
        let prompt = ids.narrow(0, 0, 1)?.narrow(1, 0, PROMPT)?.contiguous()?;
        let fed = ids.narrow(0, 0, batch)?;
        let fed: Vec<Tensor> = (PROMPT..PROMPT + NEW)
            .map(|i| fed.narrow(1, i, 1)?.contiguous())
            .collect::<candle_core::Result<_>>()?;
        self.loaded()?;
        let steps = |mut cache: KvCache, n: usize| -> anyhow::Result<Tensor> {
            let mut last = None;
            for ids in &fed[..n] {
                let logits = net.logits(&forward(&net, &cfg, ids, &mut cache)?)?.squeeze(1)?;
                // Chosen, but not followed: a choice between close logits must not decide what is compared.
                logits.argmax(1)?.to_vec1::<u32>()?;
                last = Some(logits);
            }
            last.context("no steps")
        };
        let mut first = KvCache::new(&cfg, 1, PROMPT, net.dtype(), net.device())?;
        forward(&net, &cfg, &prompt, &mut first)?;
        let rows = || Ok(KvCache::from_prefix(&first, batch, PROMPT + NEW)?);
        for _ in 0..self.warm_ups() {
            steps(rows()?, 2)?;
        }
        let logits = self.run_prepared(rows, |cache| steps(cache, NEW))?;
        Ok(json!({ "logits": sample(&logits)? }))
    }

    /// Times to the first token of three questions in turn, each after the same instructions of so many
    /// tokens and with as many of its own as a question has.
    fn question(&mut self, prefix: usize) -> anyhow::Result<Json> {
        const OWN: usize = 24;
        let (cfg, model) = self.qwen()?;
        let files = ModelFiles::open("embedded-base", "planner")?;
        // Of another model: nothing is said that it would have to spell.
        let tokenizer = Tokenizer::from_bytes(files.required("tokenizer.json")?.as_bytes())?;
        let rows: Vec<Vec<u32>> = self.ids("qwen_ids")?.narrow(0, 0, 3)?.to_vec2()?;
        self.loaded()?;
        let engine =
            Engine::new(Network::Text { model, cfg }, Device::Cpu, Vec::new(), EngineOptions::default());
        let (mut seconds, mut cpu) = (Vec::new(), Vec::new());
        for own in &rows {
            let job = Job {
                ids: [&rows[0][..prefix], &own[prefix..prefix + OWN]].concat(),
                features: None,
                grids: Vec::new(),
                seed: 0,
                max_new_tokens: 1,
                stop: Vec::new(),
            };
            let (t, c) = (Instant::now(), cpu_seconds());
            engine.generate(&[job], &SamplingOptions::greedy(), &tokenizer, None)?;
            seconds.push(t.elapsed().as_secs_f64());
            cpu.push(cpu_seconds() - c);
        }
        self.line.insert("prefilled".into(), engine.stats().prefilled.into());
        self.line.insert("seconds".into(), seconds[1].into());
        self.line.insert("cpu".into(), cpu[1].into());
        self.line.insert("questions_s".into(), seconds.into());
        self.line.insert("reps".into(), 1.into());
        Ok(json!({}))
    }

    fn qwen_train(&mut self) -> anyhow::Result<Json> {
        let cfg: Config = serde_json::from_str(&self.config("qwen3-0.6b")?)?;
        let mut tensors = self.checkpoint("qwen3-0.6b")?.tensors()?;
        tensors.retain(|name, _| !name.starts_with("lm_head."));
        let params = Params::placed(0, tensors, DType::F32, &self.device)?;
        let net = Qwen3::new(&cfg, params.builder())?;
        let ids = self.ids("qwen_ids")?.narrow(0, 0, 1)?.narrow(1, 0, 512)?.contiguous()?;
        let seen = ids.flatten_all()?.narrow(0, 0, 8)?;
        self.loaded()?;
        let mut probe = None;
        self.run(|| {
            let loss = token_log_probs(&net, &cfg, &ids)?.mean_all()?.neg()?;
            let value = loss.to_scalar::<f32>()?;
            let grads = loss.backward()?;
            if probe.is_none() {
                let of = |name: &str| -> anyhow::Result<Tensor> {
                    let var = params.get(name).with_context(|| format!("no {name}"))?;
                    Ok(grads.get(&var).with_context(|| format!("{name} has no gradient"))?.clone())
                };
                let rows = of("model.embed_tokens.weight")?.index_select(&seen, 0)?;
                let mut p = json!({ "loss": [value], "embedding": sample(&rows)? });
                for name in ["layers.0.self_attn.q_proj", "layers.13.mlp.down_proj", "norm"] {
                    p[name] = sample(&of(&format!("model.{name}.weight"))?)?.into();
                }
                probe = Some(p);
            }
            Ok(())
        })?;
        probe.context("no step was made")
    }

    fn lora_train(&mut self) -> anyhow::Result<Json> {
        let names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
        let lora = LoraConfig { rank: 32, alpha: 64., targets: names.map(String::from).to_vec() };
        let path = self.work.join("lora.safetensors");
        let tensors = candle_core::safetensors::load(path, &Device::Cpu)?;
        // In f32 whatever the frozen weights are, as a training has it.
        let adapter = Params::placed(0, tensors, DType::F32, &self.device)?;
        let (cfg, net) = self.qwen_on(|vb| adapted(vb, &adapter, &lora))?;
        let adamw = AdamWConfig { max_grad_norm: None, ..AdamWConfig::default() };
        let mut optimiser = AdamW::new(adapter.named(), adamw, |_, var| Some(Group::usual(var)))?;
        let ids = self.ids("qwen_ids")?.narrow(0, 0, 2)?.narrow(1, 0, 512)?.contiguous()?;
        let advantages = Tensor::new(&[[1f32], [-0.5]], &self.device)?;
        self.loaded()?;
        let mut probe = None;
        self.run(|| {
            let log_p = token_log_probs(&net, &cfg, &ids)?.reshape((2, 511))?;
            let loss = log_p.broadcast_mul(&advantages)?.mean_all()?.neg()?;
            let value = loss.to_scalar::<f32>()?;
            let grads = loss.backward()?;
            if probe.is_none() {
                let mut p = json!({ "loss": [value] });
                for name in
                    ["0.self_attn.q_proj.lora_A", "0.self_attn.q_proj.lora_B", "27.mlp.down_proj.lora_A"]
                {
                    let full = format!("model.layers.{name}.weight");
                    let var = adapter.get(&full).with_context(|| format!("no {full}"))?;
                    let grad = grads.get(&var).with_context(|| format!("{full} has no gradient"))?;
                    p[name] = sample(grad)?.into();
                }
                probe = Some(p);
            }
            optimiser.accumulate(&grads, 1.)?;
            optimiser.step(RATE)?;
            Ok(())
        })?;
        probe.context("no step was made")
    }

    fn msda(&mut self, queries: &str, backward: bool) -> anyhow::Result<Json> {
        let of = |name: &str| Ok::<_, anyhow::Error>(self.input(name)?.to_dtype(self.language.dtype)?);
        let own = |name: &str| of(&format!("msda_{queries}_{name}"));
        let (value, at, weights, gradient) =
            (of("msda_value")?, own("at")?, own("weights")?, own("gradient")?);
        if !backward {
            self.loaded()?;
            let out = self.run_short(|| Ok(msda(&value, &LEVELS, &at, &weights)?))?;
            return Ok(json!({ "out": sample(&out)? }));
        }
        let var = |t: &Tensor| Var::from_tensor(t);
        let (value, at, weights) = (var(&value)?, var(&at)?, var(&weights)?);
        self.loaded()?;
        let on_cpu = self.device.is_cpu();
        let (out, grads) = self.run_short(|| {
            let out = msda(&value, &LEVELS, &at, &weights)?;
            let grads = match on_cpu {
                true => (&out * &gradient)?.sum_all()?.backward()?,
                // Sums over all of a tensor are slow there, and nothing that is to be measured.
                false => out.apply_op1(GradientIs(gradient.clone()))?.backward()?,
            };
            Ok((out, grads))
        })?;
        let of = |v: &Var| sample(grads.get(v).context("no gradient")?);
        Ok(json!({ "out": sample(&out)?, "value": of(&value)?, "at": of(&at)?, "weights": of(&weights)? }))
    }
}

/// The next tokens `[batch, n]` through the cache; the last one's hidden state `[batch, 1, hidden]`.
fn forward(net: &Qwen3, cfg: &Config, ids: &Tensor, cache: &mut KvCache) -> candle_core::Result<Tensor> {
    let (n, at) = (ids.dim(1)?, cache.len());
    let rope = Rope::from_positions(cfg, &[(at as u32..(at + n) as u32).collect()], ids.device())?;
    net.forward(ids, &rope, &Mask::causal(), Some(cache))?.narrow(1, n - 1, 1)?.contiguous()
}

/// Log-probability of each token but the first, rows `[batch, n]` one after the other: `[batch · (n − 1)]`.
fn token_log_probs(net: &Qwen3, cfg: &Config, ids: &Tensor) -> candle_core::Result<Tensor> {
    let (b, n) = ids.dims2()?;
    let rope = Rope::from_positions(cfg, &[(0..n as u32).collect()], ids.device())?;
    let hidden = net.forward(ids, &rope, &Mask::causal(), None)?;
    let hidden = hidden.narrow(1, 0, n - 1)?.reshape((b * (n - 1), hidden.dim(D::Minus1)?))?;
    net.token_log_probs(&hidden, &ids.narrow(1, 1, n - 1)?.flatten_all()?)
}

/// A number whose gradient by its argument is this.
struct GradientIs(Tensor);

impl CustomOp1 for GradientIs {
    fn name(&self) -> &'static str {
        "gradient-is"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.]), ().into()))
    }

    fn cuda_fwd(&self, x: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        Ok((x.device().zeros_impl(&().into(), x.dtype())?, ().into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

/// How the language model's matrices are packed.
#[derive(Clone, Copy, PartialEq)]
struct Packing(&'static str, GgmlDType);

impl Packing {
    const ALL: [Self; 2] = [Self("_f16", GgmlDType::F16), Self("_q8_0", GgmlDType::Q8_0)];

    fn named(name: &str) -> anyhow::Result<Self> {
        let found = Self::ALL.into_iter().find(|p| p.ending().trim_start_matches('_') == name);
        found.with_context(|| format!("packing {name:?}: f16 or q8_0"))
    }

    fn ending(&self) -> &'static str {
        self.0
    }

    fn file(&self, work: &Path) -> PathBuf {
        work.join(format!("qwen3-0.6b{}.gguf", self.0))
    }
}

/// The language model in GGUF, without what only its text needs (tokenizer, template).
fn pack(work: &Path, packing: Packing) -> anyhow::Result<()> {
    /// Parts of names on the hub and in a file; longer ones first.
    const NAMES: [(&str, &str); 14] = [
        ("model.layers.", "blk."),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
    ];
    // SAFETY: nothing changes the file while it is read.
    let file = unsafe { MmapedSafetensors::new(work.join("qwen3-0.6b/model.safetensors"))? };
    let mut tensors = Vec::new();
    for (name, _) in file.tensors().into_iter().filter(|(name, _)| !name.starts_with("lm_head.")) {
        let t = file.load(&name, &Device::Cpu)?;
        let dtype = if t.rank() == 2 { packing.1 } else { GgmlDType::F32 };
        let own = NAMES.iter().fold(name, |name, (hub, own)| name.replace(hub, own));
        tensors.push((own, QTensor::quantize(&t, dtype)?));
    }
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    // Under another name until it is whole.
    let (path, partial) = (packing.file(work), work.join("pack.tmp"));
    let mut out = std::io::BufWriter::new(std::fs::File::create(&partial)?);
    gguf_file::write(&mut out, &[("general.architecture", &Value::String("qwen3".into()))], &tensors)?;
    out.into_inner()?.sync_all()?;
    std::fs::rename(&partial, &path).with_context(|| path.display().to_string())
}

/// About 64 values evenly taken of a tensor, as `benches/peers/speed.py` takes them.
fn sample(t: &Tensor) -> anyhow::Result<Vec<f64>> {
    const MOST: usize = 64;
    let all = t.flatten_all()?;
    let (n, step) = (all.elem_count(), (all.elem_count() / MOST).max(1));
    let ids: Vec<u32> = (0..n as u32).step_by(step).take(MOST).collect();
    let some = all.index_select(&Tensor::new(ids, all.device())?, 0)?.to_device(&Device::Cpu)?;
    Ok(some.to_dtype(DType::F64)?.to_vec1()?)
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    let half = of.len() / 2;
    if of.len() % 2 == 1 { of[half] } else { (of[half - 1] + of[half]) / 2. }
}

/// Processor time of all threads so far.
fn cpu_seconds() -> f64 {
    // SAFETY: an all-zero `rusage` is valid and the call fills it.
    let mut u: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live `rusage`.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut u) };
    let s = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 * 1e-6;
    s(u.ru_utime) + s(u.ru_stime)
}

/// Peak resident memory of this process.
fn status_mb(key: &str) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|l| l.starts_with(key));
    let line = line.with_context(|| format!("/proc/self/status has no {key}"))?;
    let kb: f64 = line.split_whitespace().nth(1).context("an empty line of it")?.parse()?;
    Ok(kb / 1024.)
}

/// The most memory in use on the GPU since this was last called; none on the CPU.
#[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
fn gpu_peak_mb(device: &Device) -> anyhow::Result<Option<f64>> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = device {
        use candle_core::cuda_backend::cudarc::driver::{result, sys};
        let high = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        let (mut peak, mut anew) = (0u64, 0u64);
        // SAFETY: the device is open and so has its default pool, and the attribute is a u64.
        unsafe {
            let pool = result::device::get_default_mem_pool(cuda.cuda_stream().context().cu_device())?;
            result::mem_pool::get_attribute(pool, high, (&raw mut peak).cast())?;
            result::mem_pool::set_attribute(pool, high, (&raw mut anew).cast())?;
        }
        return Ok(Some(peak as f64 / f64::from(1 << 20)));
    }
    Ok(None)
}
