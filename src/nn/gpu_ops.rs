//! Ops that only a GPU has of its own, each with what runs elsewhere beside it in its caller.

use super::kernels::{self, Finish, Held, Memory, Seen, Window};
use super::{Mask, Taps, on_gpu};
use candle_core::cuda_backend::DeviceId;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, DType, Device, Layout, Result, Shape, Tensor,
};
use std::collections::HashMap;
use std::sync::Mutex;

/// `x wᵀ` of up to three weights `[out, k]`, side by side, plus `plus`: `[rows, Σ out]`; `None` unless it is a product
/// with few rows, without gradients, on a GPU.
pub(super) fn few_rows(x: &Tensor, weights: &[&Tensor], plus: Option<&Tensor>) -> Result<Option<Tensor>> {
    let fits = |p: &Tensor| {
        let out: usize = weights.iter().map(|w| w.dims()[0]).sum();
        p.elem_count() * x.dims().last().unwrap_or(&0) == x.elem_count() * out
    };
    let takes = takes_few_rows(x, weights)
        && plus.is_none_or(fits)
        && plus.is_none_or(|p| !p.track_op() && p.is_contiguous() && on_gpu(&[x, p]));
    if takes { kernels::few_rows(x, weights, plus).map(Some) } else { Ok(None) }
}

/// `silu(x gateᵀ) · x upᵀ`, likewise.
pub(super) fn few_rows_gated(x: &Tensor, gate: &Tensor, up: &Tensor) -> Result<Option<Tensor>> {
    let takes = gate.shape() == up.shape() && takes_few_rows(x, &[gate, up]);
    if takes { kernels::few_rows_gated(x, gate, up).map(Some) } else { Ok(None) }
}

fn takes_few_rows(x: &Tensor, weights: &[&Tensor]) -> bool {
    let untracked = |t: &&Tensor| !t.track_op();
    let all: Vec<&Tensor> = std::iter::once(x).chain(weights.iter().copied()).collect();
    on_gpu(&all) && all.iter().all(untracked) && kernels::takes_few_rows(x, weights)
}

/// `x wᵀ`, or `x w` unless `transposed`, of matrices without gradients; `None` where candle's product is as good.
pub(super) fn matmul(x: &Tensor, w: &Tensor, transposed: bool) -> Result<Option<Tensor>> {
    if on_gpu(&[x, w]) { kernels::product_of_parts(x, w, transposed) } else { Ok(None) }
}

/// [`kernels::sample`]; `None` if the logits are not on a GPU.
pub(super) fn sample(logits: &Tensor, drawn: &[f64], temperature: f64) -> Result<Option<Vec<(u32, f32)>>> {
    if !on_gpu(&[logits]) || logits.elem_count() == 0 {
        return Ok(None);
    }
    kernels::sample(logits, drawn, temperature).map(Some)
}

/// Each head of `x` `[batch, seq, heads · dim]` normalised by `w` `[dim]` and rotated by its token's angles (`cos`, `sin`
/// f32 `[batch or 1, seq, dim / 2]`); `None` where gradients are wanted or it is not on a GPU.
pub(super) fn norm_rope(
    x: &Tensor,
    w: &Tensor,
    eps: f64,
    cos: &Tensor,
    sin: &Tensor,
) -> Result<Option<Tensor>> {
    let ((b, s, width), (rows, angles, half), dim) = (x.dims3()?, cos.dims3()?, w.elem_count());
    let angled =
        [cos, sin].iter().all(|t| t.dtype() == DType::F32 && t.is_contiguous() && t.device().is_cuda());
    let fits = dim == 2 * half
        && width % dim == 0
        && s == angles
        && (rows == b || rows == 1)
        && sin.dims() == cos.dims();
    if !fits || !angled || x.track_op() || w.track_op() || !on_gpu(&[x, w]) || x.elem_count() == 0 {
        return Ok(None);
    }
    let (x, w) = (x.contiguous()?, w.contiguous()?);
    let (hx, hw) = (Held::new(&x)?, Held::new(&w)?);
    let sizes = (width / dim, width, dim, rows * s);
    let y = kernels::norm_rope(hx.get()?, hw.get()?, cos, sin, x.elem_count(), sizes, eps as f32)?;
    Ok(Some(y.tensor(x.shape())))
}

/// `act(x + bias) · scale + plus` along the second of `[outer, channels, inner]` (any shape of so many numbers); `None`
/// where gradients are wanted or it is not on a GPU.
pub(super) fn finish(x: &Tensor, f: Finish, (channels, inner): (usize, usize)) -> Result<Option<Tensor>> {
    let of = |t: Option<&Tensor>| -> Result<Option<Tensor>> { t.map(|t| t.contiguous()).transpose() };
    let (bias, scale, plus) = (of(f.bias)?, of(f.scale)?, of(f.plus)?);
    let fits = [(&bias, channels), (&scale, channels), (&plus, x.elem_count())];
    let fits = fits.into_iter().all(|(t, n)| t.as_ref().is_none_or(|t| t.elem_count() == n));
    let all: Vec<&Tensor> =
        [Some(x), bias.as_ref(), scale.as_ref(), plus.as_ref()].into_iter().flatten().collect();
    if !fits || !on_gpu(&all) || all.iter().any(|t| t.track_op()) || x.elem_count() == 0 {
        return Ok(None);
    }
    let x = x.contiguous()?;
    let held = Held::new(&x)?;
    let f = Finish { bias: bias.as_ref(), act: f.act, scale: scale.as_ref(), plus: plus.as_ref() };
    Ok(Some(kernels::finish(held.get()?, x.elem_count(), f, (channels, inner))?.tensor(x.shape())))
}

/// `x + b` over the last dimension, differentiable; `None` if not on a GPU.
pub(super) fn add_bias(x: &Tensor, b: &Tensor) -> Result<Option<Tensor>> {
    if !on_gpu(&[x, b]) || x.elem_count() == 0 || x.dims().last() != Some(&b.elem_count()) {
        return Ok(None);
    }
    x.contiguous()?.apply_op2(&b.contiguous()?, BiasOp).map(Some)
}

struct BiasOp;

impl CustomOp2 for BiasOp {
    fn name(&self) -> &'static str {
        "add-bias"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        candle_core::bail!("{}: for tensors on a GPU", self.name())
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        b: &CudaStorage,
        lb: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (len, channels) = (lx.shape().elem_count(), lb.shape().elem_count());
        kernels::add_bias(Memory::cuda(x, lx)?, Memory::cuda(b, lb)?, len, channels)?.cuda(lx.shape())
    }

    fn bwd(
        &self,
        _: &Tensor,
        b: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let db = match b.track_op() {
            true => Some(g.contiguous()?.reshape(((), b.elem_count()))?.sum(0)?),
            false => None,
        };
        Ok((Some(g.clone()), db))
    }
}

/// `softmax(scale · x + bias)` over the last dimension of `[batch, heads, queries, keys]`, in f32 whatever the type. `None`
/// if it is not on a GPU, or if a bias is trained.
pub(super) fn softmax(x: &Tensor, mask: &Mask, scale: f64) -> Result<Option<Tensor>> {
    if !on_gpu(&[x]) || x.elem_count() == 0 {
        return Ok(None);
    }
    let seen = match (mask, x.dims()) {
        (Mask::None, _) => Shown::All,
        (_, &[b, h, n, m]) => match Shown::of(mask, (b, h, n, m), x)? {
            Some(seen) => seen,
            None => return Ok(None),
        },
        _ => return Ok(None),
    };
    x.contiguous()?.apply_op1(SoftmaxOp { seen, scale: scale as f32 }).map(Some)
}

/// Whether [`softmax`] takes the mask.
pub(super) fn takes_mask(mask: &Mask) -> bool {
    match mask {
        Mask::None | Mask::Causal { .. } => true,
        Mask::Additive(a) => !a.track_op(),
        Mask::Segments(_) => false,
    }
}

/// A mask as it is on the GPU.
enum Shown {
    All,
    /// f32, broadcast to all scores, dense over the keys.
    Bias(Tensor),
    Causal {
        prefix: usize,
        own: Option<Tensor>,
    },
}

impl Shown {
    /// `None` for segments, and for a bias that is trained.
    fn of(mask: &Mask, (b, h, n, m): (usize, usize, usize, usize), like: &Tensor) -> Result<Option<Self>> {
        Ok(match mask {
            Mask::None => Some(Self::All),
            Mask::Causal { prefix, start } => {
                let own = start.as_ref().map(|s| constant(s, like.device())).transpose()?;
                Some(Self::Causal { prefix: *prefix, own })
            }
            Mask::Additive(a) if !a.track_op() => {
                let a = a.to_dtype(DType::F32)?.broadcast_as((b, h, n, m))?;
                Some(Self::Bias(if a.stride()[3] == 1 { a } else { a.contiguous()? }))
            }
            _ => None,
        })
    }

    /// As the kernel takes it for the last `n − from` of `n` queries over `m` keys.
    fn seen(&self, (n, m): (usize, usize), from: usize) -> Seen<'_> {
        match self {
            Self::All => Seen::All,
            Self::Bias(b) => Seen::Bias(b, [b.stride()[0], b.stride()[1], b.stride()[2]]),
            Self::Causal { prefix, own } => {
                Seen::Causal { first: m - n + from, prefix: *prefix, own: own.as_ref() }
            }
        }
    }
}

struct SoftmaxOp {
    seen: Shown,
    scale: f32,
}

impl CustomOp1 for SoftmaxOp {
    fn name(&self) -> &'static str {
        "masked-softmax"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        candle_core::bail!("{}: for tensors on a GPU", self.name())
    }

    fn cuda_fwd(&self, x: &CudaStorage, l: &Layout) -> Result<(CudaStorage, Shape)> {
        let keys = l.dims().last().copied().unwrap_or(1);
        let sizes = match l.dims() {
            &[b, h, n, m] => (b, h, n, m),
            _ => (1, 1, l.shape().elem_count() / keys.max(1), keys),
        };
        let seen = self.seen.seen((sizes.2, keys), 0);
        kernels::softmax(Memory::cuda(x, l)?, seen, sizes, self.scale)?.cuda(l.shape())
    }

    fn bwd(&self, _: &Tensor, y: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        kernels::softmax_back(y, g, self.scale).map(Some)
    }
}

/// Attention on projections as linear layers give them ([`attention_packed`](super::attention_packed)), without a copy;
/// at most `most` scores exist at one time. `None` where gradients are wanted, or for what the kernels do not take.
pub(super) fn attention(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    (heads, kv_heads): (usize, usize),
    scale: f64,
    mask: &Mask,
    most: usize,
) -> Result<Option<Tensor>> {
    let ((b, n, _), m) = (q.dims3()?, k.dim(1)?);
    let dense = |t: &Tensor| t.stride()[2] == 1 && t.stride()[1] >= t.dims()[2];
    let takes = on_gpu(&[q, k, v])
        && [q, k, v].iter().all(|t| !t.track_op() && dense(t) && t.elem_count() > 0)
        && k.stride() == v.stride();
    if !takes {
        return Ok(None);
    }
    let Some(shown) = Shown::of(mask, (b, heads, n, m), q)? else { return Ok(None) };
    // A part of the queries has its rows of a bias.
    let parts = |from: usize| match &shown {
        Shown::Bias(a) => Ok(Shown::Bias(a.narrow(2, from, n - from)?)),
        Shown::All => Ok(Shown::All),
        Shown::Causal { prefix, own } => Ok(Shown::Causal { prefix: *prefix, own: own.clone() }),
    };
    kernels::attention((q, k, v), (heads, kv_heads), scale as f32, most, |from, softmax| {
        let part: Result<Shown> = parts(from);
        softmax(part?.seen((n, m), from))
    })
    .map(Some)
}

/// A convolution of `x` `[batch, in, h, w]` (or of `relu(x)`) with `weight` `[out, in, k, k]` as one product with its
/// unfolded input, plus `bias`, plus `plus` (of the result's shape). `None` where gradients are wanted or it is not on a GPU.
pub(super) fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    window: Window,
    relu: bool,
    plus: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let (b, c, h, w) = x.dims4()?;
    let (out, inp, k, k2) = weight.dims4()?;
    let tracked = [Some(x), Some(weight), bias, plus].into_iter().flatten().any(Tensor::track_op);
    if tracked || !on_gpu(&[x, weight]) || inp != c || k != k2 || k != window.kernel || x.elem_count() == 0 {
        return Ok(None);
    }
    let (Some(oh), Some(ow)) = (window.places(h), window.places(w)) else { return Ok(None) };
    let x = x.contiguous()?;
    let weight = weight.contiguous()?.reshape((out, c * k * k))?;
    let y = kernels::convolve(&x, &weight, window, (oh, ow), relu, super::gpu::tf32())?;
    let finished = match (bias, plus) {
        (None, None) => Some(y.clone()),
        _ => finish(&y, Finish { bias, plus, ..Finish::default() }, (out, oh * ow))?,
    };
    let shape = (b, out, oh, ow);
    if let Some(y) = finished {
        return y.reshape(shape).map(Some);
    }
    let y = match bias {
        Some(b) => y.broadcast_add(&b.reshape((1, (), 1))?)?,
        None => y,
    };
    let y = y.reshape(shape)?;
    plus.map_or(Ok(y.clone()), |plus| plus + y).map(Some)
}

/// `x` `[.., h, w]` of so many planes resampled to `[planes, h', w']`; `None` where gradients are wanted or it is not on a GPU.
pub(super) fn resize(x: &Tensor, planes: usize, rows: &Taps, columns: &Taps) -> Result<Option<Tensor>> {
    if x.track_op() || !on_gpu(&[x]) || x.elem_count() == 0 {
        return Ok(None);
    }
    let x = x.contiguous()?;
    let (held, r, c) = (Held::new(&x)?, rows.on(x.device())?, columns.on(x.device())?);
    let (rows, columns) = ((rows.inp, rows.out()), (columns.inp, columns.out()));
    let y = kernels::resize(held.get()?, planes, r.side(rows), c.side(columns))?;
    Ok(Some(y.tensor((planes, rows.1, columns.1))))
}

/// Numbers on the device, uploaded once: what many calls ask for again, such as the sizes of feature levels.
pub(super) fn constant(values: &[u32], device: &Device) -> Result<Tensor> {
    type Kept = HashMap<(DeviceId, Vec<u32>), Tensor>;
    /// Beyond which all are forgotten.
    const MOST: usize = 256;
    static KEPT: Mutex<Option<Kept>> = Mutex::new(None);
    let mut kept = KEPT.lock().unwrap_or_else(|e| e.into_inner());
    let kept = kept.get_or_insert_default();
    let Device::Cuda(cuda) = device else { return Tensor::new(values, device) };
    let key = (cuda.id(), values.to_vec());
    if let Some(t) = kept.get(&key) {
        return Ok(t.clone());
    }
    let t = Tensor::new(values, device)?;
    if kept.len() >= MOST {
        kept.clear();
    }
    kept.insert(key, t.clone());
    Ok(t)
}

/// Each element of `x` is zeroed with probability `p`, the same ones for the same seed.
pub(super) fn dropout(x: &Tensor, p: f64, seed: u64) -> Result<Tensor> {
    if x.elem_count() == 0 {
        return Ok(x.clone());
    }
    x.contiguous()?.apply_op1(DropoutOp { p, seed })
}

struct DropoutOp {
    p: f64,
    seed: u64,
}

impl CustomOp1 for DropoutOp {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        candle_core::bail!("{}: for tensors on a GPU", self.name())
    }

    fn cuda_fwd(&self, x: &CudaStorage, l: &Layout) -> Result<(CudaStorage, Shape)> {
        kernels::dropout(Memory::cuda(x, l)?, l.shape().elem_count(), self.p, self.seed)?.cuda(l.shape())
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        dropout(g, self.p, self.seed).map(Some)
    }
}
