//! Linear and embedding layers, weights in the checkpoint's layout (`[out, in]`).

use super::Act;
use super::cpu::{self, Held, Mat};
use super::few_rows::{FEW, few_rows};
#[cfg(feature = "cuda")]
use super::gpu_ops;
use super::graft::graft;
use super::lora::Lora;
use super::packed::{Packed, packed_name};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, DType, Device, Layout, Result, Shape, Tensor};
use candle_nn::VarBuilder;
use rayon::prelude::*;

/// A matrix `[out, in]`, as numbers or as a checkpoint packs them.
#[derive(Clone, Debug)]
enum Weight {
    Plain(Tensor),
    Packed(Packed),
}

impl Weight {
    fn of_layer(shape: (usize, usize), init: candle_nn::Init, vb: &VarBuilder) -> Result<Self> {
        let Some((name, dtype)) = packed_name("weight", |name| vb.contains_tensor(name)) else {
            return vb.get_with_hints(shape, "weight", init).map(Self::Plain);
        };
        let bytes = vb.get_with_hints(shape, &name, init)?;
        if bytes.dtype() != DType::U8 {
            // What a builder gives for a matrix that does not fit; its error is told later, with others.
            return Ok(Self::Plain(bytes));
        }
        let packed = Packed::from_tensor(dtype, shape, &bytes.to_device(&Device::Cpu)?)?;
        match vb.device() {
            Device::Cpu => Ok(Self::Packed(packed)),
            // Products with packed weights are the processor's.
            device => packed.unpacked()?.to_dtype(vb.dtype())?.to_device(device).map(Self::Plain),
        }
    }

    fn plain(&self) -> Result<&Tensor> {
        match self {
            Self::Plain(w) => Ok(w),
            Self::Packed(p) => candle_core::bail!("{p:?}: packed weights are for inference"),
        }
    }
}

/// `y = x Wᵀ + b`, for `x` of any rank with last dimension `in`.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
    lora: Option<Lora>,
}

impl Linear {
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight: Weight::Plain(weight), bias, lora: None }
    }

    /// What a training may train of it.
    pub fn parameters(&self) -> Vec<Tensor> {
        let weight = self.weight.plain().ok().cloned();
        let adapter = self.lora.iter().flat_map(Lora::parameters);
        weight.into_iter().chain(self.bias.clone()).chain(adapter).collect()
    }

    /// An error if it is packed.
    pub fn weight(&self) -> Result<&Tensor> {
        self.weight.plain()
    }

    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Is it a matrix of numbers and nothing more? Else ops that take the weight alone must not be used.
    pub fn is_plain(&self) -> bool {
        self.lora.is_none() && matches!(self.weight, Weight::Plain(_))
    }

    /// `[.., in]` → `[.., out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let Some(lora) = &self.lora else { return self.base(x) };
        if let (Weight::Plain(w), None) = (&self.weight, &self.bias)
            && let Some(y) = lora.fused(x, w)?
        {
            return Ok(y);
        }
        self.base(x)? + lora.forward(x)?
    }

    fn base(&self, x: &Tensor) -> Result<Tensor> {
        let w = match &self.weight {
            Weight::Plain(w) => w,
            Weight::Packed(p) => {
                let y = p.forward(x)?;
                return match &self.bias {
                    Some(b) => y.broadcast_add(b),
                    None => Ok(y),
                };
            }
        };
        let k = x.dim(D::Minus1)?;
        if k != w.dim(1)? {
            candle_core::bail!("linear: x {:?}, weight {:?}", x.shape(), w.shape())
        }
        if cpu::fused(&[x, w]) && w.is_contiguous() && x.elem_count() > 0 {
            let x = x.contiguous()?;
            return match &self.bias {
                Some(b) => x.apply_op3(w, b, LinearOp),
                None => x.apply_op2(w, LinearOp),
            };
        }
        let mut shape = x.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = w.dim(0)?;
        }
        #[cfg(feature = "cuda")]
        if self.bias.is_none()
            && let Some(y) = gpu_ops::few_rows(x, &[w], None)?
        {
            return y.reshape(shape);
        }
        // One 2-D GEMM whatever the rank: candle's batched matmul would broadcast the weight.
        let x = x.reshape((x.elem_count() / k, k))?;
        let y = if w.track_op() {
            x.matmul(&w.t()?)?
        } else {
            // candle's product would make the weight's gradient as well, and keep it.
            let (w, back) = (w.clone(), w.clone());
            graft(&x, move |x| by_weight(x, &w, true), move |g| by_weight(&g.contiguous()?, &back, false))?
        };
        let y = match &self.bias {
            Some(b) => plus_bias(&y, b)?,
            None => y,
        };
        y.reshape(shape)
    }

    /// `act(self(x))`; one pass over the product on a GPU without gradients.
    pub fn forward_act(&self, x: &Tensor, act: Act) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(y) = self.finished(x, act, None, None)? {
            return Ok(y);
        }
        act.apply(&self.forward(x)?)
    }

    /// `plus + scale · self(x)` where that is one pass over the product, which it is without gradients: `scale` is `[out]`,
    /// `plus` of the result's shape. Else `None`.
    pub fn forward_scaled(&self, x: &Tensor, scale: &Tensor, plus: &Tensor) -> Result<Option<Tensor>> {
        let tracked = [x, scale, plus].into_iter().chain(self.bias.as_ref()).any(Tensor::track_op)
            || self.weight.plain().is_ok_and(Tensor::track_op);
        if self.lora.is_none() && !tracked && cpu::fused(&[x, scale, plus]) {
            let y = self.forward(x)?;
            return y.apply_op3_no_bwd(&scale.contiguous()?, &plus.contiguous()?, &ScaledOp).map(Some);
        }
        #[cfg(feature = "cuda")]
        return self.finished(x, Act::None, Some(scale), Some(plus));
        #[cfg(not(feature = "cuda"))]
        Ok(None)
    }

    #[cfg(feature = "cuda")]
    fn finished(
        &self,
        x: &Tensor,
        act: Act,
        scale: Option<&Tensor>,
        plus: Option<&Tensor>,
    ) -> Result<Option<Tensor>> {
        let (Weight::Plain(w), None) = (&self.weight, &self.lora) else { return Ok(None) };
        let tracked = [Some(x), Some(w), self.bias.as_ref(), scale, plus];
        if !super::on_gpu(&[x, w]) || tracked.into_iter().flatten().any(Tensor::track_op) {
            return Ok(None);
        }
        let y = Self { weight: self.weight.clone(), bias: None, lora: None }.forward(x)?;
        let f = super::kernels::Finish { bias: self.bias.as_ref(), act, scale, plus };
        gpu_ops::finish(&y, f, (w.dim(0)?, 1))
    }

    /// Each layer's output for the same `x` `[.., in]`; on a GPU one launch for a few rows and up to three layers.
    pub fn forward_all<const N: usize>(layers: [&Self; N], x: &Tensor) -> Result<[Tensor; N]> {
        #[cfg(feature = "cuda")]
        if N <= 3 && layers.iter().all(|l| l.is_plain() && l.bias.is_none()) {
            let weights = layers.map(|l| l.weight.plain());
            let weights: Vec<&Tensor> = weights.into_iter().collect::<Result<_>>()?;
            if let Some(y) = gpu_ops::few_rows(x, &weights, None)? {
                let mut from = 0;
                let mut part = |i: usize| -> Result<Tensor> {
                    let n = weights[i].dim(0)?;
                    from += n;
                    let mut shape = x.dims().to_vec();
                    shape.pop();
                    shape.push(n);
                    y.narrow(1, from - n, n)?.contiguous()?.reshape(shape)
                };
                let parts: Vec<Tensor> = (0..N).map(&mut part).collect::<Result<_>>()?;
                if let Ok(parts) = <[Tensor; N]>::try_from(parts) {
                    return Ok(parts);
                }
            }
        }
        let parts: Vec<Tensor> = layers.iter().map(|l| l.forward(x)).collect::<Result<_>>()?;
        match parts.try_into() {
            Ok(parts) => Ok(parts),
            Err(_) => candle_core::bail!("linear: as many outputs as layers"),
        }
    }
}

/// `x wᵀ`, or `x w` unless `transposed`.
fn by_weight(x: &Tensor, w: &Tensor, transposed: bool) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(y) = gpu_ops::matmul(x, w, transposed)? {
        return Ok(y);
    }
    if transposed { x.matmul(&w.t()?) } else { x.matmul(w) }
}

/// `y + b` over the last dimension.
fn plus_bias(y: &Tensor, b: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(y) = gpu_ops::add_bias(y, b)? {
        return Ok(y);
    }
    y.broadcast_add(b)
}

impl Linear {
    /// `residual + self(x)` in one op where there is no bias; shapes `[.., out]` and `[.., in]`.
    pub fn forward_residual(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let Weight::Plain(w) = &self.weight else { return residual + self.forward(x)? };
        let fits = x.dim(D::Minus1)? == w.dim(1)? && x.elem_count() > 0;
        #[cfg(feature = "cuda")]
        if fits
            && self.bias.is_none()
            && self.lora.is_none()
            && let Some(y) = gpu_ops::few_rows(x, &[w], Some(residual))?
        {
            return y.reshape(residual.shape());
        }
        #[cfg(feature = "cuda")]
        if self.bias.is_some()
            && let Some(y) = self.finished(x, Act::None, None, Some(residual))?
        {
            return Ok(y);
        }
        if self.bias.is_some()
            || self.lora.is_some()
            || !fits
            || !cpu::fused(&[x, w, residual])
            || !w.is_contiguous()
        {
            return residual + self.forward(x)?;
        }
        x.contiguous()?.apply_op3(w, &residual.contiguous()?, ResidualOp)
    }
}

/// The linear map with its own backward: one GEMM per gradient that is wanted, none for frozen
/// weights or constant inputs, and no transposed copies.
pub(super) struct LinearOp;

impl LinearOp {
    fn forward(
        x: &[f32],
        w: &[f32],
        b: Option<&[f32]>,
        lx: &Layout,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (out, k) = lw.shape().dims2()?;
        let rows = x.len() / k;
        let y = if rows > FEW {
            cpu::affine((rows, out, k), Mat::rows(x, k), Mat::rows(w, k).t(), b)
        } else {
            let mut y = b.map_or_else(|| vec![0.; rows * out], |b| b.repeat(rows));
            few_rows(x, w, k, &mut y);
            y
        };
        let mut shape = lx.dims().to_vec();
        shape[lx.dims().len() - 1] = out;
        Ok((CpuStorage::F32(y), shape.into()))
    }

    /// `y = x wᵀ (+ y)`; `y` is zeros unless it is to be added to.
    pub(super) fn product(x: &[f32], w: &[f32], k: usize, y: &mut [f32], accumulate: bool) {
        let (rows, out) = (x.len() / k, w.len() / k);
        if rows <= FEW {
            few_rows(x, w, k, y);
        } else {
            cpu::gemm((rows, out, k), y, accumulate, Mat::rows(x, k), Mat::rows(w, k).t());
        }
    }

    fn backward(x: &Tensor, w: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (out, k) = w.dims2()?;
        let (hx, hw, hg) = (Held::new(x)?, Held::new(w)?, Held::new(g)?);
        let (xs, ws, gs) = (hx.get()?, hw.get()?, hg.get()?);
        let rows = xs.len() / k;
        let product = |like: &Tensor, mnk, a, b| -> Result<Option<Tensor>> {
            if !like.track_op() {
                return Ok(None);
            }
            Tensor::from_vec(cpu::product(mnk, a, b), like.shape(), like.device()).map(Some)
        };
        let dx = product(x, (rows, k, out), Mat::rows(gs, out), Mat::rows(ws, k))?;
        let dw = product(w, (out, k, rows), Mat::rows(gs, out).t(), Mat::rows(xs, k))?;
        Ok((dx, dw))
    }
}

impl CustomOp2 for LinearOp {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Self::forward(cpu::values(x, lx)?, cpu::values(w, lw)?, None, lx, lw)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Self::backward(x, w, &g.contiguous()?)
    }
}

impl CustomOp3 for LinearOp {
    fn name(&self) -> &'static str {
        "linear-bias"
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
        Self::forward(cpu::values(x, lx)?, cpu::values(w, lw)?, Some(cpu::values(b, lb)?), lx, lw)
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, b: &Tensor, _: &Tensor, g: &Tensor) -> Result<super::Grads3> {
        let g = g.contiguous()?;
        let (dx, dw) = Self::backward(x, w, &g)?;
        let db = if b.track_op() { Some(column_sums(&g, b)?) } else { None };
        Ok((dx, dw, db))
    }
}

/// [`LinearOp`] added to a residual stream.
struct ResidualOp;

impl CustomOp3 for ResidualOp {
    fn name(&self) -> &'static str {
        "linear-residual"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        residual: &CpuStorage,
        lr: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w, mut y) = (cpu::values(x, lx)?, cpu::values(w, lw)?, cpu::values(residual, lr)?.to_vec());
        let (out, k) = lw.shape().dims2()?;
        if y.len() != x.len() / k * out {
            candle_core::bail!("linear: x {:?}, residual {:?}, out {out}", lx.shape(), lr.shape())
        }
        LinearOp::product(x, w, k, &mut y, true);
        Ok((CpuStorage::F32(y), lr.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, _: &Tensor, g: &Tensor) -> Result<super::Grads3> {
        let g = g.contiguous()?;
        let (dx, dw) = LinearOp::backward(x, w, &g)?;
        Ok((dx, dw, Some(g)))
    }
}

/// `plus + scale · y`, with one number of the scale a column.
struct ScaledOp;

impl CustomOp3 for ScaledOp {
    fn name(&self) -> &'static str {
        "scaled-residual"
    }

    fn cpu_fwd(
        &self,
        y: &CpuStorage,
        ly: &Layout,
        scale: &CpuStorage,
        ls: &Layout,
        plus: &CpuStorage,
        lp: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (y, scale, plus) = (cpu::values(y, ly)?, cpu::values(scale, ls)?, cpu::values(plus, lp)?);
        let n = scale.len();
        if ly.dims() != lp.dims() || ly.dims().last() != Some(&n) {
            candle_core::bail!("scaled: {:?}, scale {n}, residual {:?}", ly.shape(), lp.shape())
        }
        let sum = cpu::written(y.len(), |out| {
            let rows = y.par_chunks(n.max(1)).zip(plus.par_chunks(n.max(1))).enumerate();
            rows.for_each_init(Vec::new, |row, (i, (y, plus))| {
                row.clear();
                row.extend(y.iter().zip(scale).zip(plus).map(|((y, s), p)| p + s * y));
                // SAFETY: each row is written by one task.
                unsafe { out.put(i * n, row) }
            });
        });
        Ok((CpuStorage::F32(sum), ly.shape().clone()))
    }
}

/// Sums `[.., out]` over all but the last dimension.
fn column_sums(g: &Tensor, like: &Tensor) -> Result<Tensor> {
    let (hg, n) = (Held::new(g)?, like.elem_count());
    let parts = hg.get()?.par_chunks(cpu::rows_per_task(n) * n).map(|g| {
        let mut sum = vec![0f32; n];
        for row in g.chunks_exact(n) {
            sum.iter_mut().zip(row).for_each(|(s, g)| *s += g);
        }
        sum
    });
    Tensor::from_vec(cpu::sum_partials(parts.collect(), n), like.shape(), like.device())
}

pub fn linear(inp: usize, out: usize, vb: VarBuilder) -> Result<Linear> {
    linear_b(inp, out, true, vb)
}

pub fn linear_no_bias(inp: usize, out: usize, vb: VarBuilder) -> Result<Linear> {
    linear_b(inp, out, false, vb)
}

/// A linear layer whose initial values, where `vb` creates them, are PyTorch's defaults.
pub fn linear_b(inp: usize, out: usize, bias: bool, vb: VarBuilder) -> Result<Linear> {
    let bound = 1. / (inp as f64).sqrt();
    let uniform = candle_nn::Init::Uniform { lo: -bound, up: bound };
    let weight = Weight::of_layer((out, inp), uniform, &vb)?;
    let bias = if bias { Some(vb.get_with_hints(out, "bias", uniform)?) } else { None };
    Ok(Linear { weight, bias, lora: Lora::of_layer(inp, out, &vb)? })
}

/// A table of `[vocab, dim]` rows looked up by id.
#[derive(Clone, Debug)]
pub struct Embedding {
    weight: Weight,
}

impl Embedding {
    pub fn new(weight: Tensor) -> Self {
        Self { weight: Weight::Plain(weight) }
    }

    /// A tied head: the same table, `[.., dim]` → `[.., vocab]`.
    pub fn head(&self) -> Linear {
        Linear { weight: self.weight.clone(), bias: None, lora: None }
    }

    /// Ids of any shape (u32) → `[.., dim]`.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let w = match &self.weight {
            Weight::Plain(w) => w,
            Weight::Packed(p) => return p.rows(ids),
        };
        let mut shape = ids.dims().to_vec();
        shape.push(w.dim(1)?);
        w.index_select(&ids.flatten_all()?, 0)?.reshape(shape)
    }
}

/// Of a fresh embedding table, as most checkpoints' configurations have it.
pub const EMBEDDING_STDEV: f64 = 0.02;

pub fn embedding(vocab: usize, dim: usize, vb: VarBuilder) -> Result<Embedding> {
    let init = candle_nn::Init::Randn { mean: 0., stdev: EMBEDDING_STDEV };
    Ok(Embedding { weight: Weight::of_layer((vocab, dim), init, &vb)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::{assert_same, max_gradient_error, random};

    #[test]
    fn scaled_and_added_is_what_it_says() -> Result<()> {
        let (x, w, b) = (random((2, 3, 5), 1)?, random((4, 5), 2)?, random(4, 3)?);
        let (scale, plus) = (random(4, 4)?, random((2, 3, 4), 5)?);
        let constant = |t: &candle_core::Var| t.as_detached_tensor();
        for bias in [None, Some(constant(&b))] {
            let layer = Linear::new(constant(&w), bias);
            let want = (constant(&plus) + layer.forward(&constant(&x))?.broadcast_mul(&constant(&scale))?)?;
            let got = layer.forward_scaled(&constant(&x), &constant(&scale), &constant(&plus))?;
            let got = got.expect("one pass without gradients");
            assert!((got - want)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-6);
            // With gradients it is left to ops that have them.
            assert!(layer.forward_scaled(&x, &constant(&scale), &constant(&plus))?.is_none());
        }
        Ok(())
    }

    #[test]
    fn equals_composed_and_differentiates() -> Result<()> {
        let (x, w, b) = (random((3, 4, 10), 1)?, random((7, 10), 2)?, random(7, 3)?);
        let product = || x.reshape((12, 10))?.matmul(&w.t()?)?.reshape((3, 4, 7));
        let plain = Linear::new(w.as_tensor().clone(), None);
        assert_same(&[&x, &w], || plain.forward(&x), product)?;
        let r = random((3, 4, 7), 4)?;
        assert_same(&[&x, &w, &r], || plain.forward_residual(&x, &r), || product()? + r.as_tensor())?;
        let all = [x.clone(), w.clone(), r.clone()];
        let e = max_gradient_error(&all, 1e-2, 60, || plain.forward_residual(&x, &r))?;
        assert!(e < 1e-3, "{e}");
        let biased = Linear::new(w.as_tensor().clone(), Some(b.as_tensor().clone()));
        assert_same(&[&x, &w, &b], || biased.forward(&x), || product()?.broadcast_add(&b))?;
        let e = max_gradient_error(&[x.clone(), w.clone(), b.clone()], 1e-2, 60, || biased.forward(&x))?;
        assert!(e < 1e-3, "{e}");
        Ok(())
    }

    #[test]
    fn a_row_does_not_depend_on_the_other_rows() -> Result<()> {
        for (out, k) in [(70, 96), (33, 1100), (260, 37)] {
            let (x, w) = (random((300, k), 1)?, random((out, k), 2)?);
            let f = Linear::new(w.as_tensor().clone(), Some(random(out, 3)?.as_tensor().clone()));
            let y = |from: usize, n: usize| -> Result<Vec<Vec<f32>>> {
                f.forward(&x.narrow(0, from, n)?)?.to_vec2()
            };
            // Small batches, as in generation.
            let all = y(0, FEW)?;
            for (from, n) in [(0, 1), (7, 1), (3, 2), (5, 9), (1, FEW - 1)] {
                assert_eq!(y(from, n)?, all[from..from + n]);
            }
            // Large ones, as in prefill.
            let all = y(0, 300)?;
            for (from, n) in [(0, 100), (117, 183), (40, 66)] {
                assert_eq!(y(from, n)?, all[from..from + n]);
            }
        }
        Ok(())
    }

    #[test]
    fn few_and_many_rows_agree() -> Result<()> {
        let (x, w) = (random((FEW + 1, 45), 1)?, random((21, 45), 2)?);
        let f = Linear::new(w.as_tensor().clone(), None);
        let many = f.forward(&x)?.narrow(0, 0, FEW)?;
        assert_same(&[&w], || f.forward(&x.narrow(0, 0, FEW)?), || many.contiguous())
    }

    #[test]
    fn frozen_weights_get_no_gradient() -> Result<()> {
        let (x, w) = (random((3, 10), 1)?, random((7, 10), 2)?.as_tensor().detach());
        let grads = Linear::new(w.clone(), None).forward(&x)?.sum_all()?.backward()?;
        assert!(grads.get(&x).is_some() && grads.get(&w).is_none());
        Ok(())
    }
}
