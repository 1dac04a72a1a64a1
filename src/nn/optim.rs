//! AdamW and Muon with f32 moments, parameter groups, clipping and a state that can be saved, and the
//! learning-rate schedules of the trainers.
//!
//! Why not candle's: its AdamW keeps moments in the parameter's dtype, has no groups, no clipping
//! and no way to save its state. Gradients of several micro-batches are added up here before a
//! step.
//!
//! Moments and summed gradients live in the host's memory and steps are taken there, wherever the parameters
//! are: a parameter on a GPU is sent its new values, and one in half precision follows an f32 master copy
//! here. So a full fine-tuning costs a GPU the weights and one micro-batch's gradients, and the host 16 bytes
//! a weight (12 where the parameter is f32 here). Over the bus go the gradients of each micro-batch and the new
//! values of each step.

use super::cpu::{Held, Mat, gemm, rows_per_task};
use super::simd::{sum_by, wide};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Tensor, Var};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Mutex;

/// Hyper-parameters of AdamW (Loshchilov & Hutter 2019).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Scales gradients down to this global L2 norm.
    pub max_grad_norm: Option<f64>,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, max_grad_norm: Some(1.) }
    }
}

/// How one parameter is treated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    /// Multiplies the learning rate.
    pub lr: f64,
    /// Whether weight decay applies.
    pub decay: bool,
    /// Whether the step is Muon's: the momentum made orthogonal (see [`orthogonal`]), in place of
    /// AdamW's. For matrices between hidden layers.
    pub muon: bool,
}

impl Group {
    /// The usual rule: matrices decay; norms, biases and other vectors do not.
    pub fn usual(var: &Var) -> Self {
        Self { lr: 1., decay: var.rank() >= 2, muon: false }
    }

    /// For networks made from nothing: Muon for the matrices between hidden layers, `lr` times as
    /// fast as AdamW is for embeddings, heads and vectors (which `outer` names by a part of theirs).
    pub fn from_nothing(name: &str, var: &Var, outer: &[&str], lr: f64) -> Self {
        let usual = Self::usual(var);
        match var.rank() == 2 && !outer.iter().any(|part| name.contains(part)) {
            true => Self { lr, muon: true, ..usual },
            false => usual,
        }
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Global L2 norm of the gradients before clipping.
    pub grad_norm: f64,
    /// False where the norm was not finite: parameters and moments are then unchanged.
    pub applied: bool,
}

struct Slot {
    name: String,
    var: Var,
    group: Group,
    /// Exponential averages of the gradient and of its square; Muon has the first only.
    m: Vec<f32>,
    v: Vec<f32>,
    /// Sum of the gradients since the last step; empty before the first.
    grad: Vec<f32>,
    /// The weights in full, of a parameter in half precision; else empty.
    master: Vec<f32>,
}

/// The optimiser of a set of named variables.
pub struct AdamW {
    cfg: AdamWConfig,
    slots: Vec<Slot>,
    steps: u64,
}

impl AdamW {
    /// `group` says how each parameter is treated; `None` leaves it frozen.
    pub fn new(
        params: Vec<(String, Var)>,
        cfg: AdamWConfig,
        group: impl Fn(&str, &Var) -> Option<Group>,
    ) -> Result<Self> {
        let mut slots = vec![];
        for (name, var) in params {
            let Some(group) = group(&name, &var) else { continue };
            let float = matches!(var.dtype(), DType::F32 | DType::F16 | DType::BF16);
            if !float || !var.is_contiguous() {
                candle_core::bail!("AdamW: parameter {name} is {:?}, or not contiguous", var.dtype())
            }
            if group.muon && var.rank() != 2 {
                candle_core::bail!("Muon: parameter {name} of shape {:?} is no matrix", var.shape())
            }
            let n = var.elem_count();
            let v = if group.muon { vec![] } else { vec![0.; n] };
            let master = match var.dtype() {
                DType::F32 => vec![],
                _ => var.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?,
            };
            slots.push(Slot { name, var, group, m: vec![0.; n], v, grad: vec![], master });
        }
        Ok(Self { cfg, slots, steps: 0 })
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Elements being trained.
    pub fn count(&self) -> usize {
        self.slots.iter().map(|s| s.m.len()).sum()
    }

    /// Adds `weight` times the gradients of one micro-batch to those waiting for the next step. A
    /// parameter without a gradient here contributes nothing.
    pub fn accumulate(&mut self, grads: &GradStore, weight: f64) -> Result<()> {
        let weight = weight as f32;
        self.slots.par_iter_mut().try_for_each(|s| {
            let Some(g) = grads.get(&s.var) else { return Ok(()) };
            // Sums are the host's, so that a GPU holds the gradients of one micro-batch.
            let g = g.detach().to_dtype(DType::F32)?.to_device(&Device::Cpu)?.contiguous()?;
            let held = Held::new(&g)?;
            let g = held.get()?;
            if s.grad.is_empty() {
                s.grad.resize(g.len(), 0.);
            }
            let chunk = rows_per_task(1);
            s.grad.par_chunks_mut(chunk).zip(g.par_chunks(chunk)).for_each(|(a, g)| add_scaled(a, g, weight));
            Ok(())
        })
    }

    /// Clips what was accumulated to the configured norm, takes one step and forgets it.
    /// A parameter that has received no gradient since the last step is left as it is.
    pub fn step(&mut self, lr: f64) -> Result<StepReport> {
        let chunk = rows_per_task(1);
        let square: f64 = self
            .slots
            .iter()
            .map(|s| s.grad.par_chunks(chunk).map(|g| sum_squares(g) as f64).collect::<Vec<_>>())
            .map(|parts| parts.iter().sum::<f64>())
            .sum();
        let grad_norm = square.sqrt();
        if !grad_norm.is_finite() {
            self.slots.iter_mut().for_each(|s| s.grad.clear());
            return Ok(StepReport { grad_norm, applied: false });
        }
        self.steps += 1;
        let clip = self.cfg.max_grad_norm.map_or(1., |max| (max / (grad_norm + 1e-6)).min(1.));
        let t = self.steps.min(i32::MAX as u64) as i32;
        let (c1, c2) = (1. - self.cfg.beta1.powi(t), 1. - self.cfg.beta2.powi(t));
        self.slots.par_iter_mut().try_for_each(|s| {
            if s.grad.is_empty() {
                return Ok(());
            }
            let lr = lr * s.group.lr;
            let decay = if s.group.decay { self.cfg.weight_decay } else { 0. };
            if s.group.muon {
                return s.muon(lr, (1. - lr * decay) as f32);
            }
            let rule = Rule {
                clip: clip as f32,
                beta1: self.cfg.beta1 as f32,
                beta2: self.cfg.beta2 as f32,
                keep: (1. - lr * decay) as f32,
                step: (lr / c1) as f32,
                root: (1. / c2) as f32,
                eps: self.cfg.eps as f32,
            };
            let weights = s.weights()?;
            weights.inplace_op1(&Update { rule, state: Mutex::new((&mut s.m, &mut s.v, &s.grad)) })?;
            s.grad.clear();
            if s.is_here() { Ok(()) } else { s.send(weights) }
        })?;
        Ok(StepReport { grad_norm, applied: true })
    }

    /// Moments as `NAME.exp_avg` and, of AdamW, `NAME.exp_avg_sq`, the weights in full of parameters in half
    /// precision as `NAME.master`, and `step`, for exact resumption between steps.
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        let mut out = HashMap::new();
        for s in &self.slots {
            for (kind, values) in [("exp_avg", &s.m), ("exp_avg_sq", &s.v), ("master", &s.master)] {
                if values.is_empty() {
                    continue;
                }
                let t = Tensor::from_slice(values, s.var.shape(), &Device::Cpu)?;
                out.insert(format!("{}.{kind}", s.name), t);
            }
        }
        out.insert("step".into(), Tensor::new(&[self.steps as i64], &Device::Cpu)?);
        Ok(out)
    }

    /// Takes over a [`AdamW::state`]; every trained parameter must be in it with its shape.
    pub fn restore(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        let get = |name: &str| match state.get(name) {
            Some(t) => Ok(t),
            None => candle_core::bail!("optimiser state: tensor {name} is missing"),
        };
        let steps = get("step")?.to_vec1::<i64>()?;
        let [steps] = steps[..] else { candle_core::bail!("optimiser state: step must be one number") };
        let mut moments = vec![];
        for s in &self.slots {
            let read = |kind: &str| -> Result<Vec<f32>> {
                let name = format!("{}.{kind}", s.name);
                let t = get(&name)?;
                if t.shape() != s.var.shape() {
                    let (got, want) = (t.shape(), s.var.shape());
                    candle_core::bail!("optimiser state: {name} has shape {got:?}, expected {want:?}")
                }
                t.flatten_all()?.to_vec1()
            };
            let v = if s.group.muon { vec![] } else { read("exp_avg_sq")? };
            // A run may go on where parameters are of another type than they were.
            let master = match state.contains_key(&format!("{}.master", s.name)) {
                true => Some(read("master")?),
                false => None,
            };
            moments.push((read("exp_avg")?, v, master));
        }
        for (s, (m, v, master)) in self.slots.iter_mut().zip(moments) {
            (s.m, s.v) = (m, v);
            s.grad.clear();
            match master {
                Some(master) if s.master.is_empty() => {
                    let t = Tensor::from_vec(master, s.var.shape(), &Device::Cpu)?;
                    s.var.set(&t.to_device(s.var.device())?)?;
                }
                Some(master) => s.master = master,
                None if s.master.is_empty() => {}
                None => s.master = s.var.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?,
            }
        }
        self.steps = steps.max(0) as u64;
        Ok(())
    }

    /// Writes [`AdamW::state`] as safetensors.
    pub fn save(&self, path: &Path) -> Result<()> {
        candle_core::safetensors::save(&self.state()?, path)
    }

    /// Reads what [`AdamW::save`] wrote.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        let state = candle_core::safetensors::load(path, &Device::Cpu)?;
        self.restore(&state).map_err(|e| candle_core::Error::Msg(format!("{}: {e}", path.display())))
    }
}

/// Muon's momentum (Jordan et al. 2024).
const MOMENTUM: f32 = 0.95;

/// Size of a Muon step's elements, about that of AdamW's, so that one learning rate serves both (Liu
/// et al. 2025, "Muon is scalable for LLM training").
const MUON_SIZE: f32 = 0.2;

impl Slot {
    /// Whether the parameter itself is f32 in the host's memory.
    fn is_here(&self) -> bool {
        self.var.device().is_cpu() && self.var.dtype() == DType::F32
    }

    /// The parameter in f32 on the host: itself if it is that, else a copy.
    fn weights(&mut self) -> Result<Tensor> {
        if self.is_here() {
            return Ok(self.var.as_tensor().clone());
        }
        if self.master.is_empty() {
            return self.var.to_device(&Device::Cpu)?.copy();
        }
        Tensor::from_vec(std::mem::take(&mut self.master), self.var.shape(), &Device::Cpu)
    }

    /// Gives the parameter, wherever it is, the values of a copy.
    fn send(&mut self, weights: Tensor) -> Result<()> {
        self.var.set(&weights.to_dtype(self.var.dtype())?.to_device(self.var.device())?)?;
        if self.var.dtype() != DType::F32 {
            self.master = weights.flatten_all()?.to_vec1()?;
        }
        Ok(())
    }

    /// One step of Muon; weight decay leaves `keep` of the weights. The scale of the gradient plays no
    /// part, so neither does clipping.
    fn muon(&mut self, lr: f64, keep: f32) -> Result<()> {
        let (rows, cols) = self.var.dims2()?;
        for (m, g) in self.m.iter_mut().zip(&mut self.grad) {
            *m = MOMENTUM * *m + (1. - MOMENTUM) * *g;
            // Nesterov's: a look ahead along the momentum.
            *g = MOMENTUM * *m + (1. - MOMENTUM) * *g;
        }
        let update = orthogonal(std::mem::take(&mut self.grad), rows, cols);
        let step = lr as f32 * MUON_SIZE * (rows.max(cols) as f32).sqrt();
        let update = Tensor::from_vec(update, (rows, cols), &Device::Cpu)?;
        let weights = ((self.weights()? * keep as f64)? - (update * step as f64)?)?;
        self.send(weights)
    }
}

/// About the nearest matrix with orthonormal rows or columns: Muon's five Newton–Schulz steps, which
/// bring the singular values to 1 ± 0.3. `x` is row-major `[rows, cols]`.
fn orthogonal(mut x: Vec<f32>, rows: usize, cols: usize) -> Vec<f32> {
    const A: f32 = 3.4445;
    const B: f32 = -4.775;
    const C: f32 = 2.0315;
    let norm = x.par_chunks(rows_per_task(1)).map(sum_squares).collect::<Vec<_>>().iter().sum::<f32>();
    let scale = 1. / (norm.sqrt() + 1e-7);
    x.iter_mut().for_each(|x| *x *= scale);
    // The Gram matrix of the shorter side.
    let n = rows.min(cols);
    let (mut gram, mut poly, mut next) = (vec![0f32; n * n], vec![0f32; n * n], vec![0f32; x.len()]);
    for _ in 0..5 {
        let m = Mat::rows(&x, cols);
        let (a, b) = if rows <= cols { (m, m.t()) } else { (m.t(), m) };
        gemm((n, n, rows.max(cols)), &mut gram, false, a, b);
        gemm((n, n, n), &mut poly, false, Mat::rows(&gram, n), Mat::rows(&gram, n));
        poly.iter_mut().zip(&gram).for_each(|(p, g)| *p = B * g + C * *p);
        let p = Mat::rows(&poly, n);
        let (a, b) = if rows <= cols { (p, m) } else { (m, p) };
        gemm((rows, cols, n), &mut next, false, a, b);
        x.iter_mut().zip(&next).for_each(|(x, y)| *x = A * *x + y);
    }
    x
}

#[derive(Clone, Copy)]
struct Rule {
    clip: f32,
    beta1: f32,
    beta2: f32,
    /// What decay leaves of a weight.
    keep: f32,
    /// Learning rate over the first moment's bias correction.
    step: f32,
    /// Reciprocal of the second moment's bias correction.
    root: f32,
    eps: f32,
}

struct Update<'a> {
    rule: Rule,
    /// First moment, second moment, gradient.
    state: Mutex<(&'a mut Vec<f32>, &'a mut Vec<f32>, &'a Vec<f32>)>,
}

impl InplaceOp1 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(w), Some((from, to))) = (storage, layout.contiguous_offsets()) else {
            candle_core::bail!("AdamW: expected a contiguous f32 parameter")
        };
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let (m, v, g) = &mut *state;
        let chunk = rows_per_task(1);
        w[from..to]
            .par_chunks_mut(chunk)
            .zip(m.par_chunks_mut(chunk))
            .zip(v.par_chunks_mut(chunk))
            .zip(g.par_chunks(chunk))
            .for_each(|(((w, m), v), g)| update(self.rule, w, m, v, g));
        Ok(())
    }
}

wide! {
    fn update(r: Rule, w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) {
        for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(g) {
            let g = g * r.clip;
            *m = r.beta1 * *m + (1. - r.beta1) * g;
            *v = r.beta2 * *v + (1. - r.beta2) * g * g;
            *w = *w * r.keep - r.step * *m / ((*v * r.root).sqrt() + r.eps);
        }
    }
}

wide! {
    fn add_scaled(a: &mut [f32], b: &[f32], scale: f32) {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b * scale)
    }
}

wide! {
    fn sum_squares(x: &[f32]) -> f32 {
        sum_by(x.len(), |i| x[i] * x[i])
    }
}

/// Learning rate over the steps of a run: linear warm-up, then constant or cosine.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    pub base: f64,
    /// Steps of warm-up.
    #[serde(default)]
    pub warmup: u64,
    /// Rate at the first step of the warm-up.
    #[serde(default)]
    pub warmup_from: f64,
    #[serde(default)]
    pub decay: Decay,
}

/// What follows the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Decay {
    #[default]
    Constant,
    /// Half a cosine from the base rate down to `to` at step `total`.
    Cosine { total: u64, to: f64 },
}

impl Schedule {
    pub fn constant(base: f64) -> Self {
        Self { base, warmup: 0, warmup_from: 0., decay: Decay::Constant }
    }

    /// Rate of step `step`, counted from 0.
    pub fn lr(&self, step: u64) -> f64 {
        if step < self.warmup {
            let done = step as f64 / self.warmup as f64;
            return self.warmup_from + (self.base - self.warmup_from) * done;
        }
        match self.decay {
            Decay::Constant => self.base,
            Decay::Cosine { total, to } => {
                let span = total.saturating_sub(self.warmup).max(1) as f64;
                let done = ((step - self.warmup) as f64 / span).min(1.);
                to + (self.base - to) * 0.5 * (1. + (std::f64::consts::PI * done).cos())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::random;

    fn grads(w: &Var, b: &Var) -> Result<GradStore> {
        let y = w.as_tensor().sqr()?.sum(1)?.mul(b)?.exp()?.sum_all()?;
        y.backward()
    }

    fn values(v: &Var) -> Result<Vec<f32>> {
        v.flatten_all()?.to_dtype(DType::F32)?.to_vec1()
    }

    /// A parameter in bf16 goes the way of one on a GPU: steps far below its own precision add up, and a
    /// state that was saved goes on where it was.
    #[test]
    fn half_precision_follows_a_master_copy() -> Result<()> {
        let full = random((4, 3), 5)?;
        let full = Var::from_tensor(&full.to_dtype(DType::BF16)?.to_dtype(DType::F32)?)?;
        let half = Var::from_tensor(&full.to_dtype(DType::BF16)?)?;
        for muon in [false, true] {
            let group = |_: &str, v: &Var| Some(Group { muon, ..Group::usual(v) });
            let new = |v: &Var| AdamW::new(vec![("w".into(), v.clone())], AdamWConfig::default(), group);
            let (mut a, mut b) = (new(&full)?, new(&half)?);
            let before = values(&half)?;
            for i in 0..40 {
                // The same gradient for both.
                let c = random((4, 3), 9)?;
                a.accumulate(&(full.as_tensor() * c.as_tensor())?.sum_all()?.backward()?, 1.)?;
                let c = c.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
                b.accumulate(&(half.to_dtype(DType::F32)? * c)?.sum_all()?.backward()?, 0.5)?;
                b.accumulate(
                    &(half.to_dtype(DType::F32)? * random((4, 3), 9)?.as_tensor())?.sum_all()?.backward()?,
                    0.5,
                )?;
                assert!(a.step(2e-4)?.applied && b.step(2e-4)?.applied);
                if i == 20 {
                    let state = b.state()?;
                    b = new(&half)?;
                    b.restore(&state)?;
                }
            }
            let (a, b) = (values(&full)?, values(&half)?);
            let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 0.006 * a.abs() + 1e-4;
            assert!(a.iter().zip(&b).all(near), "{a:?} {b:?}");
            assert!(b != before);
        }
        Ok(())
    }

    fn setup(cfg: AdamWConfig) -> Result<(Var, Var, AdamW)> {
        let (w, b) = (random((3, 4), 1)?, random(3, 2)?);
        let named = vec![("w".to_string(), w.clone()), ("b".to_string(), b.clone())];
        let opt = AdamW::new(named, cfg, |_, v| Some(Group::usual(v)))?;
        Ok((w, b, opt))
    }

    #[test]
    fn a_step_follows_the_published_rule() -> Result<()> {
        let cfg =
            AdamWConfig { weight_decay: 0.1, max_grad_norm: Some(0.5), beta2: 0.95, ..Default::default() };
        let (w, b, mut opt) = setup(cfg.clone())?;
        let mut want: Vec<(Vec<f64>, Vec<f64>, Vec<f64>)> = vec![];
        for v in [&w, &b] {
            let x: Vec<f64> = values(v)?.iter().map(|&x| x as f64).collect();
            want.push((x.clone(), vec![0.; x.len()], vec![0.; x.len()]));
        }
        for t in 1..=5 {
            let g = grads(&w, &b)?;
            let gs = [&w, &b].map(|v| g.get(v).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap());
            let norm = gs.iter().flatten().map(|&g| (g as f64).powi(2)).sum::<f64>().sqrt();
            let clip = (0.5 / (norm + 1e-6)).min(1.);
            for (i, (x, m, v)) in want.iter_mut().enumerate() {
                for j in 0..x.len() {
                    let g = gs[i][j] as f64 * clip;
                    m[j] = 0.9 * m[j] + 0.1 * g;
                    v[j] = 0.95 * v[j] + 0.05 * g * g;
                    let (mh, vh) = (m[j] / (1. - 0.9f64.powi(t)), v[j] / (1. - 0.95f64.powi(t)));
                    let decay = if i == 0 { 0.1 } else { 0. };
                    x[j] -= 0.01 * (mh / (vh.sqrt() + cfg.eps) + decay * x[j]);
                }
            }
            opt.accumulate(&g, 1.)?;
            let report = opt.step(0.01)?;
            assert!(report.applied && (report.grad_norm - norm).abs() < 1e-4 * norm);
        }
        for (v, (x, ..)) in [&w, &b].iter().zip(&want) {
            for (got, want) in values(v)?.iter().zip(x) {
                assert!((*got as f64 - want).abs() < 1e-5, "{got} {want}");
            }
        }
        Ok(())
    }

    #[test]
    fn muon_steps_are_orthogonal_whatever_the_shape() {
        for (rows, cols) in [(6, 20), (20, 6)] {
            let x: Vec<f32> = random((rows, cols), 4).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let y = orthogonal(x.clone(), rows, cols);
            let (n, long) = (rows.min(cols), rows.max(cols));
            let at = |i: usize, k: usize| if rows <= cols { y[i * cols + k] } else { y[k * cols + i] };
            for (i, j) in (0..n).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let dot: f32 = (0..long).map(|k| at(i, k) * at(j, k)).sum();
                let want = if i == j { 1. } else { 0. };
                assert!((dot - want).abs() < 0.55, "{rows}×{cols}: {i} {j} {dot}");
            }
            // It keeps to the side of the gradient.
            assert!(x.iter().zip(&y).map(|(x, y)| x * y).sum::<f32>() > 0.);
        }
    }

    #[test]
    fn muon_resumes_exactly_and_takes_steps_of_adamws_size() -> Result<()> {
        let make = |w: &Var, b: &Var| {
            let named = vec![("w".to_string(), w.clone()), ("b".to_string(), b.clone())];
            AdamW::new(named, AdamWConfig::default(), |n, v| Some(Group::from_nothing(n, v, &[], 1.)))
        };
        let (w, b) = (random((30, 40), 1)?, random(30, 2)?);
        let loss = |w: &Var, b: &Var| w.as_tensor().sum(1)?.mul(b)?.sqr()?.sum_all()?.backward();
        let turn = |opt: &mut AdamW, w: &Var, b: &Var| -> Result<()> {
            opt.accumulate(&loss(w, b)?, 1.)?;
            opt.step(0.01).map(|_| ())
        };
        let mut opt = make(&w, &b)?;
        let before = values(&w)?;
        turn(&mut opt, &w, &b)?;
        let moved = values(&w)?.iter().zip(&before).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
        let size = (moved / before.len() as f32).sqrt() / 0.01;
        // A gradient of rank one: one singular value of 40 steps fully.
        assert!(0.01 < size && size < 0.4, "{size}");
        assert_eq!(opt.state()?.len(), 1 + 2 + 1, "a matrix has one moment, a vector two, and the step");
        let (w2, b2) = (random((30, 40), 3)?, random(30, 4)?);
        let mut again = make(&w2, &b2)?;
        again.restore(&opt.state()?)?;
        w2.set(&w.as_tensor().copy()?)?;
        b2.set(&b.as_tensor().copy()?)?;
        turn(&mut opt, &w, &b)?;
        turn(&mut again, &w2, &b2)?;
        assert_eq!((values(&w)?, values(&b)?), (values(&w2)?, values(&b2)?));
        Ok(())
    }

    #[test]
    fn resumption_is_exact() -> Result<()> {
        let (w, b, mut opt) = setup(AdamWConfig::default())?;
        let turn = |opt: &mut AdamW, w: &Var, b: &Var| -> Result<()> {
            opt.accumulate(&grads(w, b)?, 1.)?;
            opt.step(0.05).map(|_| ())
        };
        turn(&mut opt, &w, &b)?;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("optim.safetensors");
        opt.save(&path)?;
        let (w2, b2, mut again) = setup(AdamWConfig::default())?;
        w2.set(&w.as_tensor().copy()?)?;
        b2.set(&b.as_tensor().copy()?)?;
        again.load(&path)?;
        for _ in 0..3 {
            turn(&mut opt, &w, &b)?;
            turn(&mut again, &w2, &b2)?;
        }
        assert_eq!(values(&w)?, values(&w2)?);
        assert_eq!((values(&b)?, opt.steps()), (values(&b2)?, again.steps()));
        Ok(())
    }

    #[test]
    fn micro_batches_add_up_and_bad_gradients_change_nothing() -> Result<()> {
        let (w, b, mut opt) = setup(AdamWConfig { max_grad_norm: None, ..Default::default() })?;
        let g = grads(&w, &b)?;
        opt.accumulate(&g, 0.5)?;
        opt.accumulate(&g, 0.5)?;
        let (w2, b2, mut once) = setup(AdamWConfig { max_grad_norm: None, ..Default::default() })?;
        once.accumulate(&grads(&w2, &b2)?, 1.)?;
        assert_eq!(opt.step(0.1)?, once.step(0.1)?);
        assert_eq!(values(&w)?, values(&w2)?);

        let before = values(&w)?;
        opt.accumulate(&g, f64::NAN)?;
        let report = opt.step(0.1)?;
        assert!(!report.applied && opt.steps() == 1);
        assert_eq!(values(&w)?, before);
        Ok(())
    }

    #[test]
    fn schedules() {
        let s =
            Schedule { base: 1., warmup: 10, warmup_from: 0.1, decay: Decay::Cosine { total: 110, to: 0.2 } };
        assert_eq!(s.lr(0), 0.1);
        assert!((s.lr(5) - 0.55).abs() < 1e-12);
        assert_eq!(s.lr(10), 1.);
        assert!((s.lr(60) - 0.6).abs() < 1e-12);
        assert!((s.lr(110) - 0.2).abs() < 1e-12 && s.lr(1000) == s.lr(110));
        assert_eq!(Schedule::constant(3e-4).lr(999), 3e-4);
    }
}
