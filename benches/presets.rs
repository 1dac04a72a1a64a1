//! Presets at full size, loaded as commands load them, against what PyTorch makes of the same files.
//!
//! `scripts/check_presets.py NAME` makes a folder and runs `cargo bench --bench presets -- DIR`, which prints
//! errors (as a share of the largest value), seconds and peak memory as one JSON line, and fails where an error is
//! more than rounding.

#![allow(clippy::print_stderr)]

use anyhow::{Context, ensure};
use candle_core::{D, DType, Device, Tensor};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;
use valor::llm::engine::Network;
use valor::llm::local::network_of;
use valor::models::grounding_dino::{Config as DinoConfig, GroundingDino, Inputs, SPECIAL_TOKENS, UNUSED};
use valor::models::moge::{self, MoGe};
use valor::models::qwen3::Rope;
use valor::models::qwen3_vl::Pictures;
use valor::nn::Mask;
use valor::weights::ModelFiles;

/// Of the largest value. Twenty-eight layers of f32 sums in other orders come to a few millionths.
const TOLERANCE: f64 = 1e-4;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [dir] = &args[..] else {
        eprintln!("skipped: needs a folder that scripts/check_presets.py makes");
        return Ok(());
    };
    let dir = Path::new(dir);
    let device = Device::Cpu;
    let reference = Reference(candle_core::safetensors::load(dir.join("reference.safetensors"), &device)?);
    let started = Instant::now();
    let pytorch = dir.join("model.pt");
    let source = if pytorch.is_file() { &pytorch } else { dir };
    let files = ModelFiles::open(source.to_str().context("the folder's name is no UTF-8")?, "planner")?;
    let config: Value = files.json("config.json")?;
    let mut errors = Map::new();
    let mut compare = |name: &str, got: &Tensor| -> anyhow::Result<()> {
        errors.insert(name.to_owned(), relative(got, reference.get(name)?)?.into());
        Ok(())
    };
    let load;
    match config["model_type"].as_str() {
        Some("grounding-dino") => {
            let cfg = DinoConfig::from_json(&files.required("config.json")?)?;
            let net =
                files.checkpoint()?.build(DType::F32, &device, UNUSED, |vb| GroundingDino::new(&cfg, vb))?;
            load = started.elapsed();
            let ids = reference.get("input_ids")?.to_dtype(DType::U32)?;
            let pixels = reference.get("pixel_values")?.clone();
            let x = Inputs::new(pixels, None, ids.clone(), ids.ones_like()?, &SPECIAL_TOKENS)?;
            compare("scores", &net.trace(&x)?.1.0["proposals.class"].max(D::Minus1)?)?;
            let out = net.forward_on(&x, &reference.get("queries")?.to_dtype(DType::U32)?)?;
            let last = |v: &[Tensor]| v.last().context("a decoder has layers").cloned();
            compare("logits", &last(&out.logits)?.narrow(2, 0, ids.dim(1)?)?)?;
            compare("boxes", &last(&out.boxes)?)?;
        }
        Some(_) => {
            let network = network_of(&files, &files.checkpoint()?, &device)?;
            load = started.elapsed();
            let ids = reference.get("input_ids")?.to_dtype(DType::U32)?;
            let n = ids.dim(1)?;
            let logits = match &network {
                Network::Text { model, cfg } => {
                    let rope = Rope::from_positions(cfg, &[(0..n as u32).collect()], &device)?;
                    model.logits(&model.forward(&ids, &rope, &Mask::causal(), None)?)?
                }
                Network::Vision(model) => {
                    let grids = reference.get("image_grid_thw")?.to_dtype(DType::U32)?.to_vec2::<u32>()?;
                    let grids = grids.iter().map(|g| [g[0] as usize, g[1] as usize, g[2] as usize]).collect();
                    let pictures = Pictures { patches: reference.get("pixel_values")?.clone(), grids };
                    model.logits(&model.forward(&ids.to_vec2()?, Some(&pictures))?)?
                }
            };
            compare("logsumexp", &logits.log_sum_exp(2)?)?;
            compare("logits", &logits.narrow(1, n - 4, 4)?)?;
        }
        None => {
            let cfg: moge::Config = files.json("config.json")?;
            let net =
                files.checkpoint()?.build(DType::F32, &device, moge::UNUSED, |vb| MoGe::new(&cfg, vb))?;
            load = started.elapsed();
            let out = net.forward(reference.get("image")?, 1200)?;
            compare("points", &out.points.context("no points")?)?;
            compare("normal", &out.normal.context("no normals")?)?;
            compare("mask", &out.mask.context("no mask")?)?;
            compare("metric_scale", &out.metric_scale.context("no scale")?)?;
        }
    }
    let line = json!({
        "preset": dir.file_name().and_then(|n| n.to_str()), "errors": errors, "load_s": load.as_secs_f64(),
        "all_s": started.elapsed().as_secs_f64(), "peak_mb": peak_mb()?,
    });
    println!("{line}");
    for (name, error) in &errors {
        ensure!(error.as_f64().is_some_and(|e| e <= TOLERANCE), "{name} differs from PyTorch's by {error}");
    }
    Ok(())
}

struct Reference(HashMap<String, Tensor>);

impl Reference {
    fn get(&self, name: &str) -> anyhow::Result<&Tensor> {
        self.0.get(name).with_context(|| format!("reference.safetensors: no {name}, make it again"))
    }
}

/// Largest difference as a share of the largest value; NaN, which no limit admits, if one is in it.
fn relative(got: &Tensor, want: &Tensor) -> anyhow::Result<f64> {
    ensure!(got.elem_count() == want.elem_count(), "shapes differ: {:?} and {:?}", got.dims(), want.dims());
    let numbers =
        |t: &Tensor| -> candle_core::Result<Vec<f64>> { t.to_dtype(DType::F64)?.flatten_all()?.to_vec1() };
    let (got, want) = (numbers(got)?, numbers(want)?);
    let most = |v: &mut dyn Iterator<Item = f64>| {
        v.fold(0f64, |m, x| if m.is_nan() || x.abs() <= m { m } else { x.abs() })
    };
    let apart = most(&mut got.iter().zip(&want).map(|(g, w)| if g == w { 0. } else { g - w }));
    Ok(apart / most(&mut want.iter().copied().filter(|x| x.is_finite())))
}

/// Peak resident memory of this process.
fn peak_mb() -> anyhow::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap_or_default();
    let kb: f64 = line.split_whitespace().nth(1).unwrap_or("0").parse()?;
    Ok(kb / 1024.)
}
