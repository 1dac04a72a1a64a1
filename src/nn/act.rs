//! Activations and softmax.

use super::cpu::{self, Held, par_rows};
#[cfg(feature = "cuda")]
use super::kernels::{self, Memory};
use super::simd::{self, wide};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

pub fn relu(x: &Tensor) -> Result<Tensor> {
    x.relu()
}

pub fn silu(x: &Tensor) -> Result<Tensor> {
    if cpu::fused(&[x]) { x.contiguous()?.apply_op1(Pointwise::Silu) } else { x.silu() }
}

/// GELU by the error function (`gelu` in HF configs).
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if cpu::fused(&[x]) { x.contiguous()?.apply_op1(Pointwise::Gelu) } else { x.gelu_erf() }
}

/// GELU by the tanh approximation (`gelu_pytorch_tanh` in HF configs).
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    if cpu::fused(&[x]) {
        return x.contiguous()?.apply_op1(Pointwise::GeluTanh);
    }
    match x.dtype() {
        // Candle rounds each of its steps to them, and 1 + tanh cancels below −2: PyTorch rounds once.
        half @ (DType::BF16 | DType::F16) => x.to_dtype(DType::F32)?.gelu()?.to_dtype(half),
        _ => x.gelu(),
    }
}

/// An activation that a layer may apply to its output itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Act {
    #[default]
    None,
    Gelu,
    Relu,
}

impl Act {
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::None => Ok(x.clone()),
            Self::Gelu => gelu(x),
            Self::Relu => relu(x),
        }
    }
}

/// Softmax over the last dimension, differentiable. On the fused path a row of −∞ alone gives
/// zeros instead of NaN.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    if cpu::fused(&[x]) && x.elem_count() > 0 {
        return x.contiguous()?.apply_op1(SoftmaxOp);
    }
    #[cfg(feature = "cuda")]
    if let Some(y) = super::gpu_ops::softmax(x, &super::Mask::None, 1.)? {
        return Ok(y);
    }
    candle_nn::ops::softmax(x, D::Minus1)
}

/// `silu(gate) · up`, the gated unit of Llama-style MLPs (Shazeer 2020).
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.shape() != up.shape() {
        candle_core::bail!("swiglu: gate {:?}, up {:?}", gate.shape(), up.shape())
    }
    if super::fused(&[gate, up]) && gate.elem_count() > 0 {
        gate.contiguous()?.apply_op2(&up.contiguous()?, SwigluOp)
    } else {
        gate.silu()? * up
    }
}

/// Elements per task of a pointwise kernel.
const TASK: usize = 32_768;

#[derive(Clone, Copy)]
enum Pointwise {
    Silu,
    Gelu,
    GeluTanh,
}

const SQRT_2_OVER_PI: f32 = 0.797_884_6;
const GELU_CUBIC: f32 = 0.044_715;

wide! {
    fn point_forward(op: Pointwise, x: &[f32], y: &mut [f32]) {
        let pairs = x.iter().zip(y);
        match op {
            Pointwise::Silu => pairs.for_each(|(&x, y)| *y = x * simd::sigmoid::<FMA>(x)),
            Pointwise::Gelu => pairs.for_each(|(&x, y)| {
                *y = 0.5 * x * (1. + simd::erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2))
            }),
            Pointwise::GeluTanh => pairs.for_each(|(&x, y)| {
                let t = simd::tanh::<FMA>(SQRT_2_OVER_PI * (x + GELU_CUBIC * x * x * x));
                *y = 0.5 * x * (1. + t)
            }),
        }
    }
}

wide! {
    /// `dx = g · f'(x)`.
    fn point_backward(op: Pointwise, x: &[f32], g: &[f32], dx: &mut [f32]) {
        let triples = x.iter().zip(g).zip(dx);
        match op {
            Pointwise::Silu => triples.for_each(|((&x, &g), dx)| {
                let s = simd::sigmoid::<FMA>(x);
                *dx = g * s * (1. + x * (1. - s))
            }),
            Pointwise::Gelu => triples.for_each(|((&x, &g), dx)| {
                // Φ(x) + x φ(x), with φ(0) = 1/√(2π).
                let cdf = 0.5 * (1. + simd::erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2));
                *dx = g * (cdf + x * 0.398_942_3 * simd::exp::<FMA>(-0.5 * x * x))
            }),
            Pointwise::GeluTanh => triples.for_each(|((&x, &g), dx)| {
                let t = simd::tanh::<FMA>(SQRT_2_OVER_PI * (x + GELU_CUBIC * x * x * x));
                let inner = SQRT_2_OVER_PI * (1. + 3. * GELU_CUBIC * x * x);
                *dx = g * (0.5 * (1. + t) + 0.5 * x * (1. - t * t) * inner)
            }),
        }
    }
}

impl CustomOp1 for Pointwise {
    fn name(&self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu-tanh",
        }
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = cpu::values(x, l)?;
        let mut y = vec![0f32; x.len()];
        par_rows(&mut y, 1, |at, y| point_forward(*self, &x[at..at + y.len()], y));
        Ok((CpuStorage::F32(y), l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let g = g.contiguous()?;
        let (hx, hg) = (Held::new(x)?, Held::new(&g)?);
        let (xs, gs) = (hx.get()?, hg.get()?);
        let mut dx = vec![0f32; xs.len()];
        par_rows(&mut dx, 1, |at, dx| {
            let to = at + dx.len();
            point_backward(*self, &xs[at..to], &gs[at..to], dx)
        });
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

struct SwigluOp;

wide! {
    pub(super) fn swiglu_forward(gate: &[f32], up: &[f32], y: &mut [f32]) {
        for ((&a, &u), y) in gate.iter().zip(up).zip(y) {
            *y = a * simd::sigmoid::<FMA>(a) * u;
        }
    }
}

wide! {
    /// Replaces the gradient of the product by that of the gate; writes that of `up`.
    pub(super) fn swiglu_backward(gate: &[f32], up: &[f32], d: &mut [f32], dup: &mut [f32]) {
        for (((&a, &u), d), du) in gate.iter().zip(up).zip(d).zip(dup) {
            let (s, g) = (simd::sigmoid::<FMA>(a), *d);
            *d = g * u * s * (1. + a * (1. - s));
            *du = g * a * s;
        }
    }
}

impl CustomOp2 for SwigluOp {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        u: &CpuStorage,
        lu: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (a, u) = (cpu::values(a, la)?, cpu::values(u, lu)?);
        let mut y = vec![0f32; a.len()];
        par_rows(&mut y, 1, |at, y| {
            let to = at + y.len();
            swiglu_forward(&a[at..to], &u[at..to], y)
        });
        Ok((CpuStorage::F32(y), la.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        la: &Layout,
        u: &CudaStorage,
        lu: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (a, u) = (Memory::cuda(a, la)?, Memory::cuda(u, lu)?);
        kernels::swiglu(a, u, la.shape().elem_count())?.cuda(la.shape())
    }

    fn bwd(
        &self,
        a: &Tensor,
        u: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if a.device().is_cuda() {
            let (da, du) = kernels::swiglu_back(a, u, g)?;
            return Ok((Some(da), Some(du)));
        }
        let g = g.contiguous()?;
        let (ha, hu, hg) = (Held::new(a)?, Held::new(u)?, Held::new(&g)?);
        let (xa, xu, xg) = (ha.get()?, hu.get()?, hg.get()?);
        let (mut da, mut du) = (xg.to_vec(), vec![0f32; xa.len()]);
        da.par_chunks_mut(TASK).zip(du.par_chunks_mut(TASK)).enumerate().for_each(|(i, (da, du))| {
            let (at, to) = (i * TASK, i * TASK + da.len());
            swiglu_backward(&xa[at..to], &xu[at..to], da, du)
        });
        Ok((
            Some(Tensor::from_vec(da, a.shape(), a.device())?),
            Some(Tensor::from_vec(du, a.shape(), a.device())?),
        ))
    }
}

struct SoftmaxOp;

wide! {
    fn softmax_rows(x: &[f32], d: usize, y: &mut [f32]) {
        y.copy_from_slice(x);
        for y in y.chunks_exact_mut(d) {
            simd::softmax_row::<FMA>(y);
        }
    }
}

wide! {
    /// `dx = y (g − Σ g y)`.
    fn softmax_backward(y: &[f32], g: &[f32], d: usize, dx: &mut [f32]) {
        for ((y, g), dx) in y.chunks_exact(d).zip(g.chunks_exact(d)).zip(dx.chunks_exact_mut(d)) {
            let c = simd::dot::<FMA>(y, g);
            for i in 0..d {
                dx[i] = y[i] * (g[i] - c);
            }
        }
    }
}

impl CustomOp1 for SoftmaxOp {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, d) = (cpu::values(x, l)?, l.dims()[l.dims().len() - 1]);
        let mut y = vec![0f32; x.len()];
        par_rows(&mut y, d, |row, y| softmax_rows(&x[row * d..row * d + y.len()], d, y));
        Ok((CpuStorage::F32(y), l.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, y: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let (g, d) = (g.contiguous()?, y.dim(D::Minus1)?);
        let (hy, hg) = (Held::new(y)?, Held::new(&g)?);
        let (ys, gs) = (hy.get()?, hg.get()?);
        let mut dx = vec![0f32; ys.len()];
        par_rows(&mut dx, d, |row, dx| {
            let (at, to) = (row * d, row * d + dx.len());
            softmax_backward(&ys[at..to], &gs[at..to], d, dx)
        });
        Tensor::from_vec(dx, y.shape(), y.device()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::{assert_same, max_gradient_error, random};

    #[test]
    fn activations_equal_composed_and_differentiate() -> Result<()> {
        let x = random((3, 41), 1)?;
        let wide = (x.as_tensor() * 3.)?;
        let half = |x: &Tensor| -> Result<Tensor> {
            // candle's own derivative of the tanh form carries six digits only: compose it.
            let t = ((x + (x.powf(3.)? * 0.044_715)?)? * (2. / std::f64::consts::PI).sqrt())?.tanh()?;
            (x * 0.5)? * (t + 1.)?
        };
        assert_same(&[&x], || silu(&wide), || wide.silu())?;
        assert_same(&[&x], || gelu(&wide), || wide.gelu_erf())?;
        assert_same(&[&x], || gelu_tanh(&wide), || half(&wide))?;
        for f in [silu, gelu, gelu_tanh, softmax] {
            let e = max_gradient_error(std::slice::from_ref(&x), 1e-2, 60, || f(&x))?;
            assert!(e < 1e-3, "{e}");
        }
        Ok(())
    }

    /// As candle rounds it, it is nothing at all from −3.25 on.
    #[test]
    fn gelu_tanh_of_half_precision_is_rounded_once() -> Result<()> {
        let x = Tensor::arange_step(-4f32, 4., 0.0625, &candle_core::Device::Cpu)?;
        let want = gelu_tanh(&x)?.to_vec1::<f32>()?;
        for (half, unit) in [(DType::BF16, 2f32.powi(-9)), (DType::F16, 2f32.powi(-12))] {
            let got = gelu_tanh(&x.to_dtype(half)?)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            for (got, want) in got.iter().zip(&want) {
                assert!((got - want).abs() <= 1.1 * unit * 2. * want.abs() + 1e-7, "{got} {want}");
            }
        }
        Ok(())
    }

    #[test]
    fn swiglu_equals_composed_and_differentiates() -> Result<()> {
        let (a, u) = (random((3, 41), 1)?, random((3, 41), 2)?);
        assert_same(&[&a, &u], || swiglu(&a, &u), || a.silu()? * u.as_tensor())?;
        let e = max_gradient_error(&[a.clone(), u.clone()], 1e-2, 60, || swiglu(&a, &u))?;
        assert!(e < 1e-3, "{e}");
        Ok(())
    }

    #[test]
    fn softmax_equals_composed_and_knows_empty_rows() -> Result<()> {
        let x = random((5, 2, 37), 1)?;
        assert_same(&[&x], || softmax(&x), || candle_nn::ops::softmax(&x, D::Minus1))?;
        let empty = Tensor::full(f32::NEG_INFINITY, (1, 4), x.device())?;
        assert_eq!(softmax(&empty)?.to_vec2::<f32>()?, [[0.; 4]]);
        let broken =
            Tensor::new(&[[f32::NAN; 3], [f32::NEG_INFINITY, f32::NAN, f32::NEG_INFINITY]], x.device())?;
        assert!(softmax(&broken)?.flatten_all()?.to_vec1::<f32>()?.iter().all(|p| p.is_nan()));
        Ok(())
    }
}
