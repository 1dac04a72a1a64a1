//! The gated MLP of Llama-style decoders as one op.
//!
//! Composed of separate linear ops it is right but slow to train: each intermediate of the MLP's
//! full width costs candle's autograd a zeroed buffer and an addition on one thread.

use super::act::{swiglu, swiglu_backward, swiglu_forward};
use super::cpu::{self, Held, Mat, rows_per_task};
use super::{Grads3, Linear, linear_no_bias};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use candle_nn::VarBuilder;
use rayon::prelude::*;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// `down(silu(gate(x)) · up(x))`, no biases.
#[derive(Clone, Debug)]
pub struct GatedMlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl GatedMlp {
    pub fn new(hidden: usize, intermediate: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            gate_proj: linear_no_bias(hidden, intermediate, vb.pp("gate_proj"))?,
            up_proj: linear_no_bias(hidden, intermediate, vb.pp("up_proj"))?,
            down_proj: linear_no_bias(intermediate, hidden, vb.pp("down_proj"))?,
        })
    }

    /// What a training may train of it.
    pub fn parameters(&self) -> Vec<Tensor> {
        [&self.gate_proj, &self.up_proj, &self.down_proj].into_iter().flat_map(Linear::parameters).collect()
    }

    /// `residual + mlp(x)`; both `[.., hidden]`.
    pub fn forward_residual(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let layers = [&self.gate_proj, &self.up_proj, &self.down_proj];
        if !layers.iter().all(|l| l.is_plain()) {
            return self.composed(x, residual);
        }
        let [gate, up, down] = [layers[0].weight()?, layers[1].weight()?, layers[2].weight()?];
        #[cfg(feature = "cuda")]
        if let Some(h) = super::gpu_ops::few_rows_gated(x, gate, up)? {
            let mut shape = x.dims().to_vec();
            shape.pop();
            shape.push(gate.dim(0)?);
            return self.down_proj.forward_residual(&h.reshape(shape)?, residual);
        }
        let trained = gate.track_op() && up.track_op() && down.track_op();
        if !(trained && cpu::fused(&[x, residual, gate, up, down])) {
            return self.composed(x, residual);
        }
        // An op takes three tensors: a number stands for the weights, which are read where they are.
        let gradients = Arc::new(Mutex::new(None));
        let weights = gate.apply_op3(up, down, Weights { gradients: gradients.clone() })?;
        let op = MlpOp {
            gate: gate.detach(),
            up: up.detach(),
            down: down.detach(),
            projections: OnceLock::new(),
            gradients,
        };
        x.contiguous()?.apply_op3(&weights, &residual.contiguous()?, op)
    }

    fn composed(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let h = swiglu(&self.gate_proj.forward(x)?, &self.up_proj.forward(x)?)?;
        residual + self.down_proj.forward(&h)?
    }
}

/// What the MLP's backward pass found for gate, up and down, until that of [`Weights`] fetches it.
type Gradients = Arc<Mutex<Option<[Tensor; 3]>>>;

/// A zero in the graph between the three weights and the op that uses them. Its own gradient says nothing: the
/// weights' are handed over beside the graph, whole and without a copy.
struct Weights {
    gradients: Gradients,
}

impl CustomOp3 for Weights {
    fn name(&self) -> &'static str {
        "gated-mlp-weights"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.]), 1.into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Grads3> {
        let found = self.gradients.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some([gate, up, down]) = found else {
            candle_core::bail!("gated mlp: its weights' backward before its own")
        };
        Ok((Some(gate), Some(up), Some(down)))
    }
}

struct MlpOp {
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    /// `gate(x)` and `up(x)`, kept for backward.
    projections: OnceLock<(Vec<f32>, Vec<f32>)>,
    gradients: Gradients,
}

impl MlpOp {
    /// `silu(a) · u` into `y`.
    fn activate(a: &[f32], u: &[f32], y: &mut [f32]) {
        cpu::par_rows(y, 1, |at, y| swiglu_forward(&a[at..at + y.len()], &u[at..at + y.len()], y));
    }
}

impl CustomOp3 for MlpOp {
    fn name(&self) -> &'static str {
        "gated-mlp"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        _: &CpuStorage,
        _: &Layout,
        residual: &CpuStorage,
        lr: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, mut y) = (cpu::values(x, lx)?, cpu::values(residual, lr)?.to_vec());
        let (m, h) = self.gate.dims2()?;
        if y.len() != x.len() || lx.dims().last() != Some(&h) {
            candle_core::bail!("gated mlp of width {h}: x {:?}, residual {:?}", lx.shape(), lr.shape())
        }
        let n = x.len() / h;
        let project = |w: &Tensor| -> Result<Vec<f32>> {
            Ok(cpu::product((n, m, h), Mat::rows(x, h), Mat::rows(Held::new(w)?.get()?, h).t()))
        };
        let (a, u) = (project(&self.gate)?, project(&self.up)?);
        let mut act = vec![0f32; n * m];
        Self::activate(&a, &u, &mut act);
        let down = Held::new(&self.down)?;
        cpu::gemm((n, h, m), &mut y, true, Mat::rows(&act, m), Mat::rows(down.get()?, m).t());
        // Set once: an op runs forward once.
        let _ = self.projections.set((a, u));
        Ok((CpuStorage::F32(y), lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, weights: &Tensor, _: &Tensor, _: &Tensor, g: &Tensor) -> Result<Grads3> {
        let Some((a, u)) = self.projections.get() else {
            candle_core::bail!("gated mlp: backward before forward")
        };
        let g = g.contiguous()?;
        let (m, h) = self.gate.dims2()?;
        let (hx, hg) = (Held::new(x)?, Held::new(&g)?);
        let (hgate, hup, hdown) = (Held::new(&self.gate)?, Held::new(&self.up)?, Held::new(&self.down)?);
        let (xs, gs) = (Mat::rows(hx.get()?, h), Mat::rows(hg.get()?, h));
        let n = xs.data.len() / h;

        // First silu(a)·u, later the gradient of u.
        let mut act = vec![0f32; n * m];
        Self::activate(a, u, &mut act);
        let ddown = cpu::product((h, m, n), gs.t(), Mat::rows(&act, m));
        // First the gradient of silu(a)·u, later that of a.
        let mut dact = cpu::product((n, m, h), gs, Mat::rows(hdown.get()?, m));
        let chunk = rows_per_task(1);
        dact.par_chunks_mut(chunk)
            .zip(act.par_chunks_mut(chunk))
            .zip(a.par_chunks(chunk).zip(u.par_chunks(chunk)))
            .for_each(|((d, du), (a, u))| swiglu_backward(a, u, d, du));
        let (da, du) = (Mat::rows(&dact, m), Mat::rows(&act, m));
        let (dgate, dup) = (cpu::product((m, h, n), da.t(), xs), cpu::product((m, h, n), du.t(), xs));
        let mut dx = cpu::product((n, h, m), da, Mat::rows(hgate.get()?, h));
        cpu::gemm((n, h, m), &mut dx, true, du, Mat::rows(hup.get()?, h));
        let of = |d: Vec<f32>, w: &Tensor| Tensor::from_vec(d, w.shape(), w.device());
        let found = [of(dgate, &self.gate)?, of(dup, &self.up)?, of(ddown, &self.down)?];
        *self.gradients.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
        Ok((Some(Tensor::from_vec(dx, x.shape(), x.device())?), Some(weights.zeros_like()?), Some(g.clone())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::{assert_same, max_gradient_error, random};

    /// An MLP of 12 by 20, and its weights.
    fn small() -> Result<(GatedMlp, [candle_core::Var; 3])> {
        let weights = [random((20, 12), 3)?, random((20, 12), 4)?, random((12, 20), 5)?];
        let [gate_proj, up_proj, down_proj] =
            weights.each_ref().map(|v| Linear::new(v.as_tensor().clone(), None));
        Ok((GatedMlp { gate_proj, up_proj, down_proj }, weights))
    }

    #[test]
    fn gradients_are_right_where_it_stands_twice_in_a_graph_and_that_is_differentiated_twice() -> Result<()> {
        let (x, r) = (random((2, 5, 12), 1)?, random((2, 5, 12), 2)?);
        let (mlp, [g, u, d]) = small()?;
        let vars = [&x, &r, &g, &u, &d];
        let twice = || mlp.forward_residual(&mlp.forward_residual(&x, &r)?, &r);
        assert_same(&vars, twice, || mlp.composed(&mlp.composed(&x, &r)?, &r))?;
        let loss = twice()?.sqr()?.sum_all()?;
        let (first, second) = (loss.backward()?, loss.backward()?);
        for v in vars {
            let of = |grads: &candle_core::backprop::GradStore| -> Result<Vec<f32>> {
                grads.get(v).expect("a gradient").flatten_all()?.to_vec1()
            };
            assert_eq!(of(&first)?, of(&second)?);
        }
        Ok(())
    }

    #[test]
    fn equals_composed_and_differentiates() -> Result<()> {
        let (x, r) = (random((2, 5, 12), 1)?, random((2, 5, 12), 2)?);
        let (mlp, [g, u, d]) = small()?;
        let vars = [&x, &r, &g, &u, &d];
        assert_same(&vars, || mlp.forward_residual(&x, &r), || mlp.composed(&x, &r))?;
        // The step is small beside the curvature of products of twelve terms.
        let e = max_gradient_error(&vars.map(Clone::clone), 3e-3, 30, || mlp.forward_residual(&x, &r))?;
        assert!(e < 2e-3, "{e}");
        Ok(())
    }
}
