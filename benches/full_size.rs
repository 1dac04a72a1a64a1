//! The networks at the size of the released checkpoints, on weights and references that
//! `benches/peers/bench_peers.py make --gdino DIR --qwen DIR` writes.
//!
//! `cargo bench --bench full_size -- gdino DIR` and `… -- qwen DIR` load one, compare its outputs with
//! PyTorch's, and print errors, seconds and peak memory as one JSON line; `bench_peers.py case`
//! prints the peer's. One network a process, so that peak memory is its own. GroundingDINO's fails where
//! it differs from PyTorch by more than rounding.

#![allow(clippy::print_stderr)]

use anyhow::{Context, ensure};
use candle_core::{D, DType, Device, IndexOp, Tensor};
use serde_json::json;
use std::path::Path;
use std::time::Instant;
use valor::models::grounding_dino::{Config as DinoConfig, GroundingDino, Inputs, SPECIAL_TOKENS, UNUSED};
use valor::models::qwen3::{Config, KvCache, Qwen3, Rope};
use valor::nn::Mask;
use valor::weights::Checkpoint;

fn main() -> anyhow::Result<()> {
    // As the program itself does.
    valor::nn::keep_freed_memory();
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["gdino", dir] => gdino(Path::new(dir)),
        ["qwen", dir] => qwen(Path::new(dir)),
        _ => {
            eprintln!("skipped: needs `gdino DIR` or `qwen DIR`, made by benches/peers/bench_peers.py");
            Ok(())
        }
    }
}

fn gdino(dir: &Path) -> anyhow::Result<()> {
    let device = Device::Cpu;
    let cfg = DinoConfig::from_json(&std::fs::read_to_string(dir.join("config.json"))?)?;
    let reference = candle_core::safetensors::load(dir.join("ref_io.safetensors"), &device)?;
    let started = Instant::now();
    let net = Checkpoint::open(&dir.join("model.safetensors"))?
        .build(DType::F32, &device, UNUSED, |vb| GroundingDino::new(&cfg, vb))?;
    let load = started.elapsed().as_secs_f64();
    let ids = reference["input_ids"].to_dtype(DType::U32)?;
    let inputs = |pixels: Tensor| Inputs::new(pixels, None, ids.clone(), ids.ones_like()?, &SPECIAL_TOKENS);
    let x = inputs(reference["pixel_values"].clone())?;
    let expected = |name: &str| {
        reference.get(name).with_context(|| format!("{}: no {name}, make the reference again", dir.display()))
    };

    // Scores closer than rounding may sort either way, and each order has its own answer (see
    // `GroundingDino::forward_on`). So three comparisons: every score; the choice, up to what the scores'
    // error e excuses (the i-th best of all scores is off by at most e, hence the token ranked i here
    // scores within 2e of the one ranked i there); the answer, on the reference's choice.
    let (own, trace) = net.trace(&x)?;
    let scores = difference(&trace.0["proposals.class"].max(D::Minus1)?, expected("scores")?)?;
    drop(trace);
    let queries = expected("queries")?.to_dtype(DType::U32)?;
    let at = |queries: &Tensor| expected("scores")?.gather(queries, 1).map_err(anyhow::Error::from);
    let choice = difference(&at(&own.topk)?, &at(&queries)?)?;
    let moved = own.topk.ne(&queries)?.to_dtype(DType::U32)?.sum_all()?.to_scalar::<u32>()?;
    let out = net.forward_on(&x, &queries)?;
    let last = |v: &[Tensor]| v.last().expect("a decoder has layers").clone();
    let tokens = reference["logits"].dim(2)?;
    let logits = last(&out.logits).narrow(2, 0, tokens)?;
    let boxes = difference(&last(&out.boxes), &reference["pred_boxes"])?;
    let logits = difference(&logits, &reference["logits"])?;
    let large = inputs(Tensor::ones((1, 3, 800, 1066), DType::F32, &device)?)?;
    let forward = median(3, || net.forward(&large, None).map(|_| ()))?;
    let mut line = json!({
        "who": "valor", "case": "gdino", "boxes_error": boxes, "logits_error": logits, "scores_error": scores,
        "choice_error": choice, "ranks_moved": moved,
    });
    line["load_s"] = load.into();
    line["forward_800x1066_s"] = forward.into();
    line["peak_rss_mb"] = peak_mb()?.into();
    println!("{line}");
    let scale = |name: &str| Ok::<_, anyhow::Error>(largest(expected(name)?)?);
    ensure!(boxes <= 1e-5, "boxes differ from PyTorch's");
    ensure!(logits <= 1e-4 * scale("logits")?, "logits differ from PyTorch's");
    ensure!(scores <= 1e-4 * scale("scores")?, "scores differ from PyTorch's");
    ensure!(choice <= 2. * scores, "other queries are chosen, and rounding does not excuse it");
    Ok(())
}

fn qwen(dir: &Path) -> anyhow::Result<()> {
    let device = Device::Cpu;
    let cfg: Config = serde_json::from_str(&std::fs::read_to_string(dir.join("config.json"))?)?;
    let reference = candle_core::safetensors::load(dir.join("ref_io.safetensors"), &device)?;
    let started = Instant::now();
    let net = Checkpoint::open(&dir.join("model.safetensors"))?.build(
        DType::F32,
        &device,
        &["lm_head."],
        |vb| Qwen3::new(&cfg, vb),
    )?;
    let load = started.elapsed().as_secs_f64();

    let ids = reference["input_ids"].to_dtype(DType::U32)?;
    let n = ids.dim(1)?;
    let hidden = net.forward(
        &ids,
        &Rope::from_positions(&cfg, &[(0..n as u32).collect()], &device)?,
        &Mask::causal(),
        None,
    )?;
    let logits = net.logits(&hidden)?;
    let part = logits.i((.., n - 8.., ..4096))?;
    let error = difference(&part, &reference["logits_last8_first4096"])?;
    let argmax = logits.argmax(2)?.to_dtype(DType::I64)?.flatten_all()?.to_vec1::<i64>()?;
    let same = argmax == reference["argmax"].flatten_all()?.to_vec1::<i64>()?;
    let total = difference(&logits.log_sum_exp(2)?, &reference["logsumexp"])?;
    drop(logits);

    let want = reference["generated"].to_dtype(DType::U32)?.flatten_all()?.to_vec1::<u32>()?;
    let generated = greedy(&net, &cfg, &ids, want.len() - n)? == want[n..];

    let prompt = Tensor::from_vec((0..1024u32).map(|i| i * 131 % 150_000).collect(), (1, 1024), &device)?;
    let rope = Rope::from_positions(&cfg, &[(0..1024).collect()], &device)?;
    let prefill = median(3, || {
        let mut cache = KvCache::new(&cfg, 1, 1024, DType::F32, &device)?;
        let h = net.forward(&prompt, &rope, &Mask::causal(), Some(&mut cache))?;
        net.logits(&h.narrow(1, 1023, 1)?).map(|_| ())
    })?;
    let short = prompt.narrow(1, 0, 128)?.contiguous()?;
    let decode = median(1, || greedy(&net, &cfg, &short, 64).map(|_| ()))?;
    let mut line = json!({
        "who": "valor", "case": "qwen3-0.6b", "logits_error": error, "logsumexp_error": total,
        "argmax_same": same, "generated_same": generated,
    });
    line["load_s"] = load.into();
    line["prefill_1024_s"] = prefill.into();
    line["prefill_128_and_decode_64_s"] = decode.into();
    line["peak_rss_mb"] = peak_mb()?.into();
    println!("{line}");
    Ok(())
}

/// `count` tokens after the prompt `[1, n]`, through the key-value cache.
fn greedy(net: &Qwen3, cfg: &Config, prompt: &Tensor, count: usize) -> candle_core::Result<Vec<u32>> {
    let device = prompt.device();
    let mut cache = KvCache::new(cfg, 1, prompt.dim(1)? + count, DType::F32, device)?;
    let mut ids = prompt.clone();
    let (mut at, mut out) = (0, Vec::new());
    while out.len() < count {
        let n = ids.dim(1)?;
        let rope = Rope::from_positions(cfg, &[(at as u32..(at + n) as u32).collect()], device)?;
        let hidden = net.forward(&ids, &rope, &Mask::causal(), Some(&mut cache))?;
        at += n;
        let next = net.logits(&hidden.narrow(1, n - 1, 1)?)?.argmax(2)?.flatten_all()?.to_vec1::<u32>()?;
        out.extend_from_slice(&next);
        ids = Tensor::from_vec(next, (1, 1), device)?;
    }
    Ok(out)
}

/// Largest absolute difference.
fn difference(a: &Tensor, b: &Tensor) -> candle_core::Result<f64> {
    if a.dims() != b.dims() {
        candle_core::bail!("shapes differ: {:?} and {:?}", a.dims(), b.dims())
    }
    largest(&(a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?)
}

/// Largest magnitude; NaN, which no limit admits, if one is in it.
fn largest(x: &Tensor) -> candle_core::Result<f64> {
    let x = x.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    Ok(x.into_iter().fold(0., |m, v| if m.is_nan() || v.abs() <= m { m } else { v.abs() }))
}

fn median(times: usize, mut work: impl FnMut() -> candle_core::Result<()>) -> candle_core::Result<f64> {
    let mut seconds = Vec::new();
    for _ in 0..times {
        let started = Instant::now();
        work()?;
        seconds.push(started.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

/// Peak resident memory of this process.
fn peak_mb() -> anyhow::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap_or_default();
    let kb: f64 = line.split_whitespace().nth(1).unwrap_or("0").parse()?;
    Ok(kb / 1024.)
}
