//! Normalisation layers.

use super::cpu::{self, Held, par_rows, rows_per_task, sum_partials};
#[cfg(feature = "cuda")]
use super::kernels::{self, Memory};
use super::simd::{madd, sum_by, wide};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, Layout, Result, Shape, Tensor};
use candle_nn::VarBuilder;
use rayon::prelude::*;

/// LayerNorm over the last dimension (Ba et al. 2016).
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (w, b) = (&self.weight, &self.bias);
        if x.dim(D::Minus1)? != w.elem_count() {
            candle_core::bail!("layer norm of {} values on {:?}", w.elem_count(), x.shape())
        }
        if super::fused(&[x, w, b]) {
            x.contiguous()?.apply_op3(w, b, LayerNormOp { eps: self.eps as f32 })
        } else {
            candle_nn::ops::layer_norm_slow(x, w, b, self.eps as f32)
        }
    }
}

pub fn layer_norm(dim: usize, eps: f64, vb: VarBuilder) -> Result<LayerNorm> {
    Ok(LayerNorm {
        weight: vb.get_with_hints(dim, "weight", candle_nn::Init::Const(1.))?,
        bias: vb.get_with_hints(dim, "bias", candle_nn::Init::Const(0.))?,
        eps,
    })
}

/// RMSNorm over the last dimension (Zhang & Sennrich 2019).
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if x.dim(D::Minus1)? != self.weight.elem_count() {
            candle_core::bail!("rms norm of {} values on {:?}", self.weight.elem_count(), x.shape())
        }
        self.forward_heads(x)
    }

    /// Normalises each head by itself: `[.., heads · dim]` with a weight of `dim` values.
    pub fn forward_heads(&self, x: &Tensor) -> Result<Tensor> {
        let (w, d) = (&self.weight, self.weight.elem_count());
        if x.dim(D::Minus1)? % d != 0 {
            candle_core::bail!("rms norm of {d} values on {:?}", x.shape())
        }
        if super::fused(&[x, w]) {
            return x.contiguous()?.apply_op2(w, RmsNormOp { eps: self.eps as f32 });
        }
        let rows = x.reshape((x.elem_count() / d, d))?;
        candle_nn::ops::rms_norm_slow(&rows, w, self.eps as f32)?.reshape(x.dims())
    }

    /// [`RmsNorm::forward_heads`], then [`rope`](super::rope()), for `x` `[batch, seq, heads · dim]`.
    pub fn forward_heads_rope(&self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(y) = super::gpu_ops::norm_rope(x, &self.weight, self.eps, cos, sin)? {
            return Ok(y);
        }
        super::rope(&self.forward_heads(x)?, cos, sin)
    }
}

pub fn rms_norm(dim: usize, eps: f64, vb: VarBuilder) -> Result<RmsNorm> {
    Ok(RmsNorm { weight: vb.get_with_hints(dim, "weight", candle_nn::Init::Const(1.))?, eps })
}

struct RmsNormOp {
    eps: f32,
}

wide! {
    fn rms_forward(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
        let d = w.len();
        for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
            let inv = 1. / (sum_by(d, |i| x[i] * x[i]) / d as f32 + eps).sqrt();
            for i in 0..d {
                y[i] = x[i] * inv * w[i];
            }
        }
    }
}

wide! {
    // With x̂ = x/rms: dx = (g w − x̂ · mean(g w x̂)) / rms, dw += g x̂.
    fn rms_backward(x: &[f32], w: &[f32], g: &[f32], eps: f32, dx: &mut [f32], dw: &mut [f32]) {
        let d = w.len();
        let dw = &mut dw[..d];
        for ((x, g), dx) in x.chunks_exact(d).zip(g.chunks_exact(d)).zip(dx.chunks_exact_mut(d)) {
            let inv = 1. / (sum_by(d, |i| x[i] * x[i]) / d as f32 + eps).sqrt();
            let c = sum_by(d, |i| g[i] * w[i] * x[i]) * inv * inv / d as f32;
            for i in 0..d {
                dw[i] = madd::<FMA>(g[i], x[i] * inv, dw[i]);
                dx[i] = (g[i] * w[i] - x[i] * c) * inv;
            }
        }
    }
}

impl CustomOp2 for RmsNormOp {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (cpu::values(x, lx)?, cpu::values(w, lw)?);
        let mut y = vec![0f32; x.len()];
        par_rows(&mut y, w.len(), |row, y| {
            let at = row * w.len();
            rms_forward(&x[at..at + y.len()], w, self.eps, y)
        });
        Ok((CpuStorage::F32(y), lx.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        w: &CudaStorage,
        lw: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (len, d) = (lx.shape().elem_count(), lw.shape().elem_count());
        kernels::rms_norm(Memory::cuda(x, lx)?, Memory::cuda(w, lw)?, len, d, self.eps)?.cuda(lx.shape())
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            let (dx, dw) = kernels::rms_norm_back(x, w, g, self.eps)?;
            return Ok((Some(dx), dw));
        }
        let g = g.contiguous()?;
        let (hx, hw, hg) = (Held::new(x)?, Held::new(w)?, Held::new(&g)?);
        let (xs, ws, gs) = (hx.get()?, hw.get()?, hg.get()?);
        let (d, mut dx) = (ws.len(), vec![0f32; xs.len()]);
        let chunk = rows_per_task(d) * d;
        let parts = dx.par_chunks_mut(chunk).zip(xs.par_chunks(chunk)).zip(gs.par_chunks(chunk)).map(
            |((dx, x), g)| {
                let mut dw = vec![0f32; d];
                rms_backward(x, ws, g, self.eps, dx, &mut dw);
                dw
            },
        );
        let dw = sum_partials(parts.collect(), d);
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), x.device())?),
            Some(Tensor::from_vec(dw, w.shape(), w.device())?),
        ))
    }
}

struct LayerNormOp {
    eps: f32,
}

#[inline(always)]
fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = sum_by(x.len(), |i| x[i]) / n;
    let var = sum_by(x.len(), |i| (x[i] - mean) * (x[i] - mean)) / n;
    (mean, 1. / (var + eps).sqrt())
}

wide! {
    fn layer_forward(x: &[f32], w: &[f32], b: &[f32], eps: f32, y: &mut [f32]) {
        let d = w.len();
        let b = &b[..d];
        for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
            let (mean, inv) = moments(x, eps);
            for i in 0..d {
                y[i] = madd::<FMA>((x[i] - mean) * inv, w[i], b[i]);
            }
        }
    }
}

wide! {
    // dx = (g w − mean(g w) − x̂ · mean(g w x̂)) / σ, dw += g x̂, db += g; `dwb` holds dw then db.
    fn layer_backward(x: &[f32], w: &[f32], g: &[f32], eps: f32, dx: &mut [f32], dwb: &mut [f32]) {
        let d = w.len();
        let (dw, db) = dwb.split_at_mut(d);
        let db = &mut db[..d];
        for ((x, g), dx) in x.chunks_exact(d).zip(g.chunks_exact(d)).zip(dx.chunks_exact_mut(d)) {
            let (mean, inv) = moments(x, eps);
            let c0 = sum_by(d, |i| g[i] * w[i]) / d as f32;
            let c1 = sum_by(d, |i| g[i] * w[i] * (x[i] - mean)) * inv / d as f32;
            for i in 0..d {
                let xh = (x[i] - mean) * inv;
                dw[i] = madd::<FMA>(g[i], xh, dw[i]);
                db[i] += g[i];
                dx[i] = (g[i] * w[i] - c0 - xh * c1) * inv;
            }
        }
    }
}

impl CustomOp3 for LayerNormOp {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w, b) = (cpu::values(x, lx)?, cpu::values(w, lw)?, cpu::values(b, lb)?);
        let mut y = vec![0f32; x.len()];
        par_rows(&mut y, w.len(), |row, y| {
            let at = row * w.len();
            layer_forward(&x[at..at + y.len()], w, b, self.eps, y)
        });
        Ok((CpuStorage::F32(y), lx.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        w: &CudaStorage,
        lw: &Layout,
        b: &CudaStorage,
        lb: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (len, d) = (lx.shape().elem_count(), lw.shape().elem_count());
        let (x, w, b) = (Memory::cuda(x, lx)?, Memory::cuda(w, lw)?, Memory::cuda(b, lb)?);
        kernels::layer_norm(x, w, b, len, d, self.eps)?.cuda(lx.shape())
    }

    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    fn bwd(&self, x: &Tensor, w: &Tensor, b: &Tensor, _: &Tensor, g: &Tensor) -> Result<super::Grads3> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            let (dx, dw, db) = kernels::layer_norm_back(x, w, b, g, self.eps)?;
            return Ok((Some(dx), dw, db));
        }
        let g = g.contiguous()?;
        let (hx, hw, hg) = (Held::new(x)?, Held::new(w)?, Held::new(&g)?);
        let (xs, ws, gs) = (hx.get()?, hw.get()?, hg.get()?);
        let (d, mut dx) = (ws.len(), vec![0f32; xs.len()]);
        let chunk = rows_per_task(d) * d;
        let parts = dx.par_chunks_mut(chunk).zip(xs.par_chunks(chunk)).zip(gs.par_chunks(chunk)).map(
            |((dx, x), g)| {
                let mut dwb = vec![0f32; 2 * d];
                layer_backward(x, ws, g, self.eps, dx, &mut dwb);
                dwb
            },
        );
        let dwb = sum_partials(parts.collect(), 2 * d);
        let part = |v: &[f32]| Tensor::from_slice(v, w.shape(), w.device()).map(Some);
        Ok((Some(Tensor::from_vec(dx, x.shape(), x.device())?), part(&dwb[..d])?, part(&dwb[d..])?))
    }
}

/// GroupNorm over channel groups of `[batch, channels, ..]`.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let dims = x.dims().to_vec();
        let (b, c) = (dims[0], dims[1]);
        let rest: usize = dims[2..].iter().product();
        let x = x.reshape((b, self.groups, c / self.groups * rest))?;
        let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let var = x.sqr()?.mean_keepdim(D::Minus1)?;
        let x = x.broadcast_div(&(var + self.eps)?.sqrt()?)?.reshape((b, c, rest))?;
        x.broadcast_mul(&self.weight.reshape((1, c, 1))?)?
            .broadcast_add(&self.bias.reshape((1, c, 1))?)?
            .reshape(dims)
    }
}

pub fn group_norm(groups: usize, channels: usize, eps: f64, vb: VarBuilder) -> Result<GroupNorm> {
    Ok(GroupNorm {
        weight: vb.get_with_hints(channels, "weight", candle_nn::Init::Const(1.))?,
        bias: vb.get_with_hints(channels, "bias", candle_nn::Init::Const(0.))?,
        groups,
        eps,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::{assert_same, max_gradient_error, random};

    #[test]
    fn rms_norm_equals_composed_and_differentiates() -> Result<()> {
        let (x, w) = (random((3, 5, 24), 1)?, random(12, 2)?);
        let norm = RmsNorm { weight: w.as_tensor().clone(), eps: 1e-5 };
        let composed =
            |x: &Tensor| candle_nn::ops::rms_norm_slow(&x.reshape((30, 12))?, &w, 1e-5)?.reshape((3, 5, 24));
        assert_same(&[&x, &w], || norm.forward_heads(&x), || composed(&x))?;
        let e = max_gradient_error(&[x.clone(), w.clone()], 1e-2, 40, || norm.forward_heads(&x))?;
        assert!(e < 2e-3, "{e}");
        Ok(())
    }

    #[test]
    fn layer_norm_equals_composed_and_differentiates() -> Result<()> {
        let (x, w, b) = (random((4, 7, 19), 1)?, random(19, 2)?, random(19, 3)?);
        let norm = LayerNorm { weight: w.as_tensor().clone(), bias: b.as_tensor().clone(), eps: 1e-5 };
        let composed = || candle_nn::ops::layer_norm_slow(&x, &w, &b, 1e-5);
        assert_same(&[&x, &w, &b], || norm.forward(&x), composed)?;
        let e = max_gradient_error(&[x.clone(), w.clone(), b.clone()], 1e-2, 40, || norm.forward(&x))?;
        assert!(e < 2e-3, "{e}");
        // A transposed argument is a strided one.
        let t = || x.transpose(1, 2)?.contiguous()?.transpose(1, 2);
        assert_same(&[&x, &w, &b], || norm.forward(&t()?), composed)
    }
}
