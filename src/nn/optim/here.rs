//! Moments and summed gradients of one parameter in the host's memory, where its steps are taken.

use super::muon::{MOMENTUM, SIZE, orthogonal};
use super::{Kept, Part, Rule};
use crate::nn::cpu::{Held, rows_per_task};
use crate::nn::simd::{sum_by, wide};
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Tensor, Var};
use rayon::prelude::*;
use std::sync::Mutex;

pub(super) struct Here {
    kept: Kept,
    /// Sum of the gradients since the last step; empty before the first.
    grad: Vec<f32>,
}

impl Here {
    pub fn new(var: &Var, muon: bool) -> Result<Self> {
        let n = var.elem_count();
        let master = match var.dtype() {
            DType::F32 => vec![],
            _ => var.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?,
        };
        let v = if muon { vec![] } else { vec![0.; n] };
        Ok(Self { kept: Kept { m: vec![0.; n], v, master }, grad: vec![] })
    }

    /// Empty where there is none.
    pub fn part(&self, part: Part) -> &[f32] {
        match part {
            Part::Mean => &self.kept.m,
            Part::Square => &self.kept.v,
            Part::Master => &self.kept.master,
        }
    }

    pub fn keep(&mut self, kept: Kept) {
        self.kept = kept;
        self.forget();
    }

    pub fn add(&mut self, g: &Tensor, weight: f32) -> Result<()> {
        let g = g.detach().to_dtype(DType::F32)?.to_device(&Device::Cpu)?.contiguous()?;
        let held = Held::new(&g)?;
        let g = held.get()?;
        if self.grad.is_empty() {
            self.grad.resize(g.len(), 0.);
        }
        let chunk = rows_per_task(1);
        self.grad.par_chunks_mut(chunk).zip(g.par_chunks(chunk)).for_each(|(a, g)| add_scaled(a, g, weight));
        Ok(())
    }

    pub fn has_gradient(&self) -> bool {
        !self.grad.is_empty()
    }

    pub fn squares(&self) -> f64 {
        let parts = self.grad.par_chunks(rows_per_task(1)).map(|g| sum_squares(g) as f64);
        parts.collect::<Vec<_>>().iter().sum()
    }

    pub fn forget(&mut self) {
        self.grad.clear();
    }

    pub fn adamw(&mut self, var: &Var, rule: Rule) -> Result<()> {
        let weights = self.weights(var)?;
        let state = Mutex::new((&mut self.kept.m, &mut self.kept.v, &self.grad));
        weights.inplace_op1(&Update { rule, state })?;
        self.forget();
        if is_here(var) { Ok(()) } else { self.send(var, weights) }
    }

    /// The scale of the gradient plays no part, so neither does clipping.
    pub fn muon(&mut self, var: &Var, lr: f64, keep: f32) -> Result<()> {
        let (rows, cols) = var.dims2()?;
        for (m, g) in self.kept.m.iter_mut().zip(&mut self.grad) {
            *m = MOMENTUM * *m + (1. - MOMENTUM) * *g;
            // Nesterov's: a look ahead along the momentum.
            *g = MOMENTUM * *m + (1. - MOMENTUM) * *g;
        }
        let update = orthogonal(std::mem::take(&mut self.grad), rows, cols);
        let step = lr as f32 * SIZE * (rows.max(cols) as f32).sqrt();
        let update = Tensor::from_vec(update, (rows, cols), &Device::Cpu)?;
        let weights = ((self.weights(var)? * keep as f64)? - (update * step as f64)?)?;
        self.send(var, weights)
    }

    /// The parameter in f32 on the host: itself if it is that, else a copy.
    fn weights(&mut self, var: &Var) -> Result<Tensor> {
        if is_here(var) {
            return Ok(var.as_tensor().clone());
        }
        if self.kept.master.is_empty() {
            return var.to_device(&Device::Cpu)?.copy();
        }
        Tensor::from_vec(std::mem::take(&mut self.kept.master), var.shape(), &Device::Cpu)
    }

    /// Gives the parameter, wherever it is, the values of a copy.
    fn send(&mut self, var: &Var, weights: Tensor) -> Result<()> {
        var.set(&weights.to_dtype(var.dtype())?.to_device(var.device())?)?;
        if var.dtype() != DType::F32 {
            self.kept.master = weights.flatten_all()?.to_vec1()?;
        }
        Ok(())
    }
}

/// Whether the parameter itself is f32 in the host's memory.
fn is_here(var: &Var) -> bool {
    var.device().is_cpu() && var.dtype() == DType::F32
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
    pub(super) fn sum_squares(x: &[f32]) -> f32 {
        sum_by(x.len(), |i| x[i] * x[i])
    }
}
