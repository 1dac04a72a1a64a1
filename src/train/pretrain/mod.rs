//! Making the embedded models from nothing on Rooms: one module per model; the three language models,
//! and the vision tower that one of them starts from, share a folder.

pub mod depth;
pub mod detector;
pub mod familiar;
pub mod language;

use crate::files::{lazily, write_tensors};
use crate::nn::optim::Group;
use crate::nn::{Params, Precision};
use crate::train::run;
use crate::weights::Checkpoint;
use anyhow::Context;
use candle_core::{DType, Tensor, Var};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

/// What a run begins with: fresh parameters, or those of a model's or a run's folder for a further
/// round on new samples (so with another seed).
fn start(seed: u64, from: Option<&Path>) -> anyhow::Result<Params> {
    match from {
        None => Ok(Params::new(seed)),
        Some(dir) => Ok(Params::from_tensors(seed, held(dir)?)?),
    }
}

/// The parameters in a model's folder, or in a run's, which has those too that only training has.
fn held(dir: &Path) -> anyhow::Result<HashMap<String, Tensor>> {
    match run::parameters(dir)? {
        Some(of_run) => Ok(of_run),
        None => Ok(Checkpoint::open(dir)?.tensors()?),
    }
}

/// That `from` held every parameter of the network that was built on `params` since, but for those whose
/// names begin with `own`, which only training has. A fresh layer among trained ones would undo them.
fn check_complete(params: &Params, from: Option<&Path>, own: Option<&str>) -> anyhow::Result<()> {
    let Some(dir) = from else { return Ok(()) };
    let held = held(dir)?;
    let meant = |name: &str| held.contains_key(name) || own.is_some_and(|own| name.starts_with(own));
    let fresh: Vec<String> = params.named().into_iter().map(|p| p.0).filter(|n| !meant(n)).collect();
    anyhow::ensure!(
        fresh.is_empty(),
        "--from {}: it lacks {} of the recipe's parameters, first {}; another recipe made it, so start from \
         nothing, without --from",
        dir.display(),
        fresh.len(),
        fresh[0]
    );
    Ok(())
}

/// Parameters that meet tokens, places or answers rather than other layers, by parts of their names.
const OUTER: [&str; 5] = ["embed", "lm_head", "scale_head", depth::ENCODER_HEADS, language::vision::HEADS];

/// How the parameters of a network made from nothing are trained: matrices between layers by Muon,
/// `muon` times as fast as AdamW trains the rest. (The vision tower, after 14,000 crops: kinds 29 to
/// 36 % right by AdamW alone, 36 to 38 % at 1, 50 to 62 % at 3 and at 6, with the lower loss at 6.)
fn group(muon: f64) -> impl Fn(&str, &Var) -> Option<Group> {
    move |name, var| Some(Group::from_nothing(name, var, &OUTER, muon))
}

/// Size of fresh position tables: that of embedded patches. Tables of 0.02, right for pre-training at
/// the paper's scale, drown under them, and short runs learn little that hangs on where things are.
const POSITION_SIZE: f32 = 0.5;

/// Overwrites a fresh table of positions, one row per place of a square grid after `before` rows of
/// its own, with 2-D sines and cosines: half of the channels tell the row, half the column (Beyer et
/// al. 2022, "Better plain ViT baselines"; wavelengths up to 100 places, not 10,000: grids are small).
fn set_positions(params: &Params, table: &str, before: usize) -> anyhow::Result<()> {
    let var = params.get(table).with_context(|| format!("no parameter {table}"))?;
    let (rows, dim) = (var.elem_count() / var.dim(candle_core::D::Minus1)?, var.dim(candle_core::D::Minus1)?);
    let side = (rows - before).isqrt();
    anyhow::ensure!(
        before + side * side == rows && dim.is_multiple_of(4),
        "{table}: {:?} is no grid",
        var.shape()
    );
    let quarter = dim / 4;
    let mut values = vec![0f32; before * dim];
    for place in 0..side * side {
        for at in [place / side, place % side] {
            let angle = |i: usize| at as f32 / 100f32.powf(i as f32 / quarter as f32);
            values.extend((0..quarter).map(|i| POSITION_SIZE * angle(i).sin()));
            values.extend((0..quarter).map(|i| POSITION_SIZE * angle(i).cos()));
        }
    }
    var.set(&Tensor::from_vec(values, var.shape(), var.device())?)?;
    Ok(())
}

/// The settings of a run, with where it began if not from nothing, and how products are computed if not
/// in f32.
fn settings(mut of_run: Value, from: Option<&Path>) -> Value {
    let precision = Precision::chosen();
    if precision != Precision::F32 {
        of_run["precision"] = json!(precision);
    }
    if let Some(dir) = from {
        of_run["from"] = dir.display().to_string().into();
    }
    of_run
}

/// Writes those parameters of a run's checkpoint that are the model's as `model.safetensors`, f16.
fn export_weights(run: &Path, out: &Path, is_model: impl Fn(&str) -> bool) -> anyhow::Result<()> {
    let mut weights = HashMap::new();
    let all = run::parameters(run)?.with_context(|| format!("{} holds no checkpoint", run.display()))?;
    for (name, t) in all.into_iter().filter(|(name, _)| is_model(name)) {
        weights.insert(name, t.to_dtype(DType::F16)?);
    }
    Ok(write_tensors(&out.join("model.safetensors"), lazily(&weights), None)?)
}
