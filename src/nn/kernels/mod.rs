//! The project's own CUDA kernels and what launches them.
//!
//! A function here takes the memory of its arguments, allocates its results beside them and starts one
//! or two kernels; shapes are the callers' (the ops of [`super`]), who have checked them. On a GPU the
//! memory is candle's and so is the stream. In tests it is the processor's, and the same source, compiled
//! as C++, runs there: every kernel is held against the op that the processor has for it.
//!
//! f32, f16 and bf16; the arithmetic is f32's. All arguments of one call have one type where nothing else
//! is said, and are contiguous.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod host;
#[cfg(feature = "cuda")]
mod product;

#[cfg(test)]
use candle_core::CpuStorage;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{DType, Layout, Result, Shape, Storage, StorageRef, Tensor};
use std::ffi::c_void;

use super::Act;

/// One argument of a kernel, as its declaration has it.
enum Arg {
    Pointer(u64),
    Size(u64),
    Unsigned(u32),
    Signed(i32),
    Float(f32),
    Double(f64),
}

impl Arg {
    #[cfg_attr(not(test), allow(dead_code))]
    fn address(&self) -> *const c_void {
        match self {
            Self::Pointer(v) | Self::Size(v) => std::ptr::from_ref(v).cast(),
            Self::Unsigned(v) => std::ptr::from_ref(v).cast(),
            Self::Signed(v) => std::ptr::from_ref(v).cast(),
            Self::Float(v) => std::ptr::from_ref(v).cast(),
            Self::Double(v) => std::ptr::from_ref(v).cast(),
        }
    }
}

/// Memory that kernels read.
#[derive(Clone, Copy)]
pub(super) enum Memory<'a> {
    #[cfg(feature = "cuda")]
    Cuda(&'a CudaStorage, usize),
    #[cfg(test)]
    Host(&'a CpuStorage, usize),
}

impl<'a> Memory<'a> {
    #[cfg(feature = "cuda")]
    pub fn cuda(s: &'a CudaStorage, l: &Layout) -> Result<Self> {
        Ok(Self::Cuda(s, start(l)?))
    }

    /// Of any strides, from the first element on.
    fn of(s: &'a Storage, from: usize) -> Result<Self> {
        match s {
            #[cfg(feature = "cuda")]
            Storage::Cuda(s) => Ok(Self::Cuda(s, from)),
            #[cfg(test)]
            Storage::Cpu(s) => Ok(Self::Host(s, from)),
            _ => candle_core::bail!("kernels: a tensor that is not on a GPU"),
        }
    }

    /// Its first element.
    fn start(self) -> usize {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(_, from) => from,
            #[cfg(test)]
            Self::Host(_, from) => from,
        }
    }

    fn dtype(self) -> DType {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(s, _) => s.dtype(),
            #[cfg(test)]
            Self::Host(s, _) => s.dtype(),
        }
    }

    fn arg(self) -> Result<Arg> {
        let (first, from) = match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(s, from) => (cuda::address(s)?, from),
            #[cfg(test)]
            Self::Host(s, from) => {
                let first = match s {
                    CpuStorage::F32(v) => v.as_ptr() as u64,
                    CpuStorage::F64(v) => v.as_ptr() as u64,
                    CpuStorage::U32(v) => v.as_ptr() as u64,
                    CpuStorage::I64(v) => v.as_ptr() as u64,
                    _ => candle_core::bail!("kernels: no {:?} on the host", s.dtype()),
                };
                (first, from)
            }
        };
        Ok(Arg::Pointer(first + (from * self.dtype().size_in_bytes()) as u64))
    }

    /// Memory for a result, where these arguments are.
    fn beside(self, dtype: DType, len: usize) -> Result<Owned> {
        self.beside_zeroed(dtype, len, false)
    }

    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    fn beside_zeroed(self, dtype: DType, len: usize, zeroed: bool) -> Result<Owned> {
        Ok(match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(s, _) => Owned::Cuda(cuda::alloc(&s.device, dtype, len, zeroed)?),
            #[cfg(test)]
            Self::Host(..) => Owned::Host(match dtype {
                DType::F32 => CpuStorage::F32(vec![0.; len]),
                DType::F64 => CpuStorage::F64(vec![0.; len]),
                DType::I64 => CpuStorage::I64(vec![0; len]),
                _ => candle_core::bail!("kernels: no {dtype:?} on the host"),
            }),
        })
    }

    /// Starts `kernel` on a grid of blocks.
    fn launch(
        self,
        kernel: &'static str,
        dtype: DType,
        grid: (usize, usize),
        threads: usize,
        args: &[Arg],
    ) -> Result<()> {
        if grid.0 == 0 || grid.1 == 0 {
            return Ok(());
        }
        let threads = threads as u32;
        let Ok(columns) = i32::try_from(grid.0) else { candle_core::bail!("{kernel}: {} blocks", grid.0) };
        let grid = (columns as u32, grid.1 as u32);
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(s, _) => cuda::launch(&s.device, kernel, dtype, grid, threads, args),
            #[cfg(test)]
            Self::Host(..) if dtype == DType::F32 => host::launch(kernel, grid, threads, args),
            #[cfg(test)]
            Self::Host(..) => candle_core::bail!("{kernel}: no kernel for {dtype:?} on the host"),
        }
    }
}

fn start(l: &Layout) -> Result<usize> {
    match l.contiguous_offsets() {
        Some((from, _)) => Ok(from),
        None => candle_core::bail!("kernels: expected a contiguous argument, got {l:?}"),
    }
}

/// Memory that a kernel has written.
pub(super) enum Owned {
    #[cfg(feature = "cuda")]
    Cuda(CudaStorage),
    #[cfg(test)]
    Host(CpuStorage),
}

impl Owned {
    /// For `CustomOp::cuda_fwd`.
    #[cfg(feature = "cuda")]
    pub fn cuda(self, shape: impl Into<Shape>) -> Result<(CudaStorage, Shape)> {
        match self {
            Self::Cuda(s) => Ok((s, shape.into())),
            #[cfg(test)]
            Self::Host(_) => candle_core::bail!("kernels: a result that is not on a GPU"),
        }
    }

    /// A constant: backward passes end here.
    pub fn tensor(self, shape: impl Into<Shape>) -> Tensor {
        let storage = match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(s) => Storage::Cuda(s),
            #[cfg(test)]
            Self::Host(s) => Storage::Cpu(s),
        };
        Tensor::from_storage(storage, shape, BackpropOp::none(), false)
    }

    fn read(&self) -> Memory<'_> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(s) => Memory::Cuda(s, 0),
            #[cfg(test)]
            Self::Host(s) => Memory::Host(s, 0),
        }
    }

    /// To be written. Exclusive, as the borrow says, so the address may be written through.
    fn arg(&mut self) -> Result<Arg> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(s) => Ok(Arg::Pointer(cuda::address(s)?)),
            #[cfg(test)]
            Self::Host(CpuStorage::F32(v)) => Ok(Arg::Pointer(v.as_mut_ptr() as u64)),
            #[cfg(test)]
            Self::Host(CpuStorage::F64(v)) => Ok(Arg::Pointer(v.as_mut_ptr() as u64)),
            #[cfg(test)]
            Self::Host(CpuStorage::I64(v)) => Ok(Arg::Pointer(v.as_mut_ptr() as u64)),
            #[cfg(test)]
            Self::Host(s) => candle_core::bail!("kernels: no {:?} on the host", s.dtype()),
        }
    }
}

/// A tensor held for reading.
pub(super) struct Held<'a>(StorageRef<'a>, usize);

impl<'a> Held<'a> {
    pub fn new(t: &'a Tensor) -> Result<Self> {
        let (s, l) = t.storage_and_layout();
        let from = start(l)?;
        Ok(Self(s, from))
    }

    /// Of any strides.
    fn strided(t: &'a Tensor) -> Self {
        let (s, l) = t.storage_and_layout();
        Self(s, l.start_offset())
    }

    pub fn get(&self) -> Result<Memory<'_>> {
        Memory::of(&self.0, self.1)
    }
}

/// Threads for a row of `n` values, of which each has four: a power of two, at least a warp, as all blocks have.
fn threads(n: usize) -> usize {
    n.div_ceil(4).next_power_of_two().clamp(32, 1024)
}

/// Threads of a block, and elements of a pointwise kernel that it does.
const BLOCK: usize = 256;

fn unsigned(n: usize) -> Result<Arg> {
    u32::try_from(n).map(Arg::Unsigned).map_err(candle_core::Error::wrap)
}

/// `x / rms(x) · w` for rows of `d` values.
pub(super) fn rms_norm(x: Memory, w: Memory, len: usize, d: usize, eps: f32) -> Result<Owned> {
    let mut y = x.beside(x.dtype(), len)?;
    let args = [x.arg()?, w.arg()?, y.arg()?, unsigned(d)?, Arg::Float(eps)];
    x.launch("rms_norm", x.dtype(), (len / d, 1), threads(d), &args)?;
    Ok(y)
}

/// Gradients of [`rms_norm`] at `x` and, if it is trained, `w`.
pub(super) fn rms_norm_back(
    x: &Tensor,
    w: &Tensor,
    g: &Tensor,
    eps: f32,
) -> Result<(Tensor, Option<Tensor>)> {
    let (d, g) = (w.elem_count(), g.contiguous()?);
    let (hx, hw, hg) = (Held::new(x)?, Held::new(w)?, Held::new(&g)?);
    let (mx, mw, mg) = (hx.get()?, hw.get()?, hg.get()?);
    let rows = x.elem_count() / d;
    let (mut dx, mut inverse) = (mx.beside(x.dtype(), x.elem_count())?, mx.beside(DType::F32, rows)?);
    let args = [mx.arg()?, mw.arg()?, mg.arg()?, dx.arg()?, inverse.arg()?, unsigned(d)?, Arg::Float(eps)];
    mx.launch("rms_norm_back", x.dtype(), (rows, 1), threads(d), &args)?;
    let dw = match w.track_op() {
        true => Some(norm_weight_back(mx, mg, &inverse, (rows, d), 1)?.get(0)?.to_dtype(w.dtype())?),
        false => None,
    };
    Ok((dx.tensor(x.shape()), dw))
}

/// f32 `[2, d]`: gradients of a norm's weight and bias.
fn norm_weight_back(
    x: Memory,
    g: Memory,
    moments: &Owned,
    (rows, d): (usize, usize),
    per_row: usize,
) -> Result<Tensor> {
    /// Rows that one block sums; few enough that many blocks share them.
    const ROWS: usize = 64;
    let parts = rows.div_ceil(ROWS).clamp(1, 1024);
    let mut partial = x.beside(DType::F32, parts * 2 * d)?;
    let args = [
        x.arg()?,
        g.arg()?,
        moments.read().arg()?,
        partial.arg()?,
        unsigned(rows)?,
        unsigned(d)?,
        unsigned(per_row)?,
    ];
    x.launch("norm_weight_back", x.dtype(), (d.div_ceil(BLOCK), parts), BLOCK, &args)?;
    partial.tensor((parts, 2, d)).sum(0)
}

/// `(x − mean) / σ · w + b` for rows of `d` values.
pub(super) fn layer_norm(x: Memory, w: Memory, b: Memory, len: usize, d: usize, eps: f32) -> Result<Owned> {
    let mut y = x.beside(x.dtype(), len)?;
    let args = [x.arg()?, w.arg()?, b.arg()?, y.arg()?, unsigned(d)?, Arg::Float(eps)];
    x.launch("layer_norm", x.dtype(), (len / d, 1), threads(d), &args)?;
    Ok(y)
}

/// Gradients of [`layer_norm`] at `x`, `w` and `b`; the last two if they are trained.
pub(super) fn layer_norm_back(
    x: &Tensor,
    w: &Tensor,
    b: &Tensor,
    g: &Tensor,
    eps: f32,
) -> Result<(Tensor, Option<Tensor>, Option<Tensor>)> {
    let (d, g) = (w.elem_count(), g.contiguous()?);
    let (hx, hw, hg) = (Held::new(x)?, Held::new(w)?, Held::new(&g)?);
    let (mx, mw, mg) = (hx.get()?, hw.get()?, hg.get()?);
    let rows = x.elem_count() / d;
    let (mut dx, mut moments) = (mx.beside(x.dtype(), x.elem_count())?, mx.beside(DType::F32, 2 * rows)?);
    let args = [mx.arg()?, mw.arg()?, mg.arg()?, dx.arg()?, moments.arg()?, unsigned(d)?, Arg::Float(eps)];
    mx.launch("layer_norm_back", x.dtype(), (rows, 1), threads(d), &args)?;
    let (mut dw, mut db) = (None, None);
    if w.track_op() || b.track_op() {
        let both = norm_weight_back(mx, mg, &moments, (rows, d), 2)?;
        (dw, db) = (Some(both.get(0)?.to_dtype(w.dtype())?), Some(both.get(1)?.to_dtype(b.dtype())?));
    }
    Ok((dx.tensor(x.shape()), dw, db))
}

/// Rotates tokens of `width` values; `cos` and `sin` are f32, `period` tokens of `half` values each.
pub(super) fn rope(
    x: Memory,
    cos: &Tensor,
    sin: &Tensor,
    len: usize,
    (width, half, period): (usize, usize, usize),
    sign: f32,
) -> Result<Owned> {
    let (cos, sin) = (Held::new(cos)?, Held::new(sin)?);
    let mut y = x.beside(x.dtype(), len)?;
    let args = [
        x.arg()?,
        cos.get()?.arg()?,
        sin.get()?.arg()?,
        y.arg()?,
        unsigned(width)?,
        unsigned(half)?,
        unsigned(period)?,
        Arg::Float(sign),
    ];
    x.launch("rope", x.dtype(), (len / width, 1), threads(width / 2), &args)?;
    Ok(y)
}

/// [`rms_norm`] of each head, then [`rope`]: `x` is `len / (heads · dim)` tokens, `stride` values apart, of heads of
/// `dim` values, of which `w` has as many; `period` tokens have angles. The result is contiguous.
pub(super) fn norm_rope(
    x: Memory,
    w: Memory,
    cos: &Tensor,
    sin: &Tensor,
    len: usize,
    (heads, stride, dim, period): (usize, usize, usize, usize),
    eps: f32,
) -> Result<Owned> {
    let (cos, sin) = (Held::new(cos)?, Held::new(sin)?);
    let mut y = x.beside(x.dtype(), len)?;
    let args = [
        x.arg()?,
        w.arg()?,
        cos.get()?.arg()?,
        sin.get()?.arg()?,
        y.arg()?,
        unsigned(heads)?,
        Arg::Size(stride as u64),
        unsigned(dim / 2)?,
        unsigned(period)?,
        Arg::Float(eps),
    ];
    x.launch("norm_rope", x.dtype(), (len / dim, 1), threads(dim / 2), &args)?;
    Ok(y)
}

/// `silu(a) · u`.
pub(super) fn swiglu(a: Memory, u: Memory, len: usize) -> Result<Owned> {
    let mut y = a.beside(a.dtype(), len)?;
    let args = [a.arg()?, u.arg()?, y.arg()?, Arg::Size(len as u64)];
    a.launch("swiglu", a.dtype(), (len.div_ceil(BLOCK), 1), BLOCK, &args)?;
    Ok(y)
}

/// Gradients of [`swiglu`] at `a` and `u`.
pub(super) fn swiglu_back(a: &Tensor, u: &Tensor, g: &Tensor) -> Result<(Tensor, Tensor)> {
    let (g, len) = (g.contiguous()?, a.elem_count());
    let (ha, hu, hg) = (Held::new(a)?, Held::new(u)?, Held::new(&g)?);
    let (ma, mu, mg) = (ha.get()?, hu.get()?, hg.get()?);
    let (mut da, mut du) = (ma.beside(a.dtype(), len)?, ma.beside(a.dtype(), len)?);
    let args = [ma.arg()?, mu.arg()?, mg.arg()?, da.arg()?, du.arg()?, Arg::Size(len as u64)];
    ma.launch("swiglu_back", a.dtype(), (len.div_ceil(BLOCK), 1), BLOCK, &args)?;
    Ok((da.tensor(a.shape()), du.tensor(a.shape())))
}

/// Rows that [`few_rows`] takes: for more, a product reads its weights no oftener than this does.
pub(super) const MOST_ROWS: usize = 4;

/// Threads of a block of [`few_rows`]: few, so that the last blocks end together.
const FEW_BLOCK: usize = 128;

/// Whether [`few_rows`] takes weights `[out, k]` of these.
pub(super) fn takes_few_rows(x: &Tensor, weights: &[&Tensor]) -> bool {
    let by_eights = |t: &Tensor| t.is_contiguous() && t.layout().start_offset().is_multiple_of(8);
    let k = x.dims().last().copied().unwrap_or(0);
    k > 0
        && k.is_multiple_of(8)
        && x.elem_count() <= MOST_ROWS * k
        && by_eights(x)
        && weights.iter().all(|w| w.rank() == 2 && w.dims()[1] == k && by_eights(w))
}

/// `x wᵀ` of up to three weights, side by side: `[rows, Σ out]`; plus `plus`, of that shape, where it is given. No
/// gradient. Only what [`takes_few_rows`].
pub(super) fn few_rows(x: &Tensor, weights: &[&Tensor], plus: Option<&Tensor>) -> Result<Tensor> {
    let k = x.dim(candle_core::D::Minus1)?;
    let rows = x.elem_count() / k;
    let out = |i: usize| weights.get(i).map_or(0, |w| w.dims()[0]);
    let (hx, hw) = (Held::new(x)?, weights.iter().map(|w| Held::new(w)).collect::<Result<Vec<_>>>()?);
    let plus = plus.map(Held::new).transpose()?;
    let pointer = |h: Option<&Held>| h.map_or(Ok(Arg::Pointer(0)), |h| h.get()?.arg());
    let (mx, n) = (hx.get()?, out(0) + out(1) + out(2));
    let mut y = mx.beside(x.dtype(), rows * n)?;
    let args = [
        mx.arg()?,
        pointer(hw.first())?,
        pointer(hw.get(1))?,
        pointer(hw.get(2))?,
        pointer(plus.as_ref())?,
        y.arg()?,
        unsigned(rows)?,
        unsigned(out(0))?,
        unsigned(out(1))?,
        unsigned(out(2))?,
        unsigned(k)?,
    ];
    // A warp for two outputs.
    mx.launch("few_rows", x.dtype(), (n.div_ceil(FEW_BLOCK / 16), 1), FEW_BLOCK, &args)?;
    Ok(y.tensor((rows, n)))
}

/// `silu(x gateᵀ) · x upᵀ`, `[rows, out]`. As [`few_rows`].
pub(super) fn few_rows_gated(x: &Tensor, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (n, k) = gate.dims2()?;
    let rows = x.elem_count() / k;
    let (hx, hg, hu) = (Held::new(x)?, Held::new(gate)?, Held::new(up)?);
    let mx = hx.get()?;
    let mut y = mx.beside(x.dtype(), rows * n)?;
    let args = [
        mx.arg()?,
        hg.get()?.arg()?,
        hu.get()?.arg()?,
        y.arg()?,
        unsigned(rows)?,
        unsigned(n)?,
        unsigned(k)?,
    ];
    mx.launch("few_rows_gated", x.dtype(), (n.div_ceil(FEW_BLOCK / 32), 1), FEW_BLOCK, &args)?;
    Ok(y.tensor((rows, n)))
}

/// What follows a product, one pass over it: `act(x + bias) · scale + plus`.
#[derive(Clone, Copy, Default)]
pub(super) struct Finish<'a> {
    /// `[channels]`.
    pub bias: Option<&'a Tensor>,
    pub act: Act,
    /// `[channels]`.
    pub scale: Option<&'a Tensor>,
    /// Of the product's shape.
    pub plus: Option<&'a Tensor>,
}

/// [`Finish`] of `x`, `[.., channels, inner]`; what it holds is contiguous and of x's type.
pub(super) fn finish(x: Memory, len: usize, f: Finish, sizes: (usize, usize)) -> Result<Owned> {
    let [bias, scale, plus] = [f.bias, f.scale, f.plus].map(|t| t.map(Held::new).transpose());
    // As the kernel numbers them.
    let act = match f.act {
        Act::None => 0,
        Act::Gelu => 1,
        Act::Relu => 2,
    };
    let pointer = |h: &Option<Held>| h.as_ref().map_or(Ok(Arg::Pointer(0)), |h| h.get()?.arg());
    finish_with(x, len, [pointer(&bias?)?, pointer(&scale?)?, pointer(&plus?)?], act, sizes)
}

fn finish_with(
    x: Memory,
    len: usize,
    [bias, scale, plus]: [Arg; 3],
    act: u32,
    (channels, inner): (usize, usize),
) -> Result<Owned> {
    let mut y = x.beside(x.dtype(), len)?;
    let (n, channels, inner) = (Arg::Size(len as u64), unsigned(channels)?, unsigned(inner)?);
    let args = [x.arg()?, bias, scale, plus, y.arg()?, n, channels, inner, Arg::Unsigned(act)];
    x.launch("finish", x.dtype(), (len.div_ceil(BLOCK), 1), BLOCK, &args)?;
    Ok(y)
}

/// `x + b` for rows of `channels` values.
pub(super) fn add_bias(x: Memory, b: Memory, len: usize, channels: usize) -> Result<Owned> {
    finish_with(x, len, [b.arg()?, Arg::Pointer(0), Arg::Pointer(0)], 0, (channels, 1))
}

/// What each query sees of the keys, for [`softmax`].
#[derive(Clone, Copy, Default)]
pub(super) enum Seen<'a> {
    #[default]
    All,
    /// Everything, with an f32 bias of these strides over batch, heads and queries (dense over the keys).
    Bias(&'a Tensor, [usize; 3]),
    /// Query i sees the keys up to `first + i`, but of those from `prefix` on only its row's own (u32 `[batch]`).
    Causal { first: usize, prefix: usize, own: Option<&'a Tensor> },
}

/// `softmax(scale · x + bias)` over the last of `[batch, heads, queries, keys]`.
pub(super) fn softmax(
    x: Memory,
    seen: Seen,
    sizes @ (batch, heads, queries, keys): (usize, usize, usize, usize),
    scale: f32,
) -> Result<Owned> {
    let mut y = x.beside(x.dtype(), batch * heads * queries * keys)?;
    let to = y.arg()?;
    softmax_to(x, to, seen, sizes, scale)?;
    Ok(y)
}

fn softmax_to(
    x: Memory,
    y: Arg,
    seen: Seen,
    (batch, heads, queries, keys): (usize, usize, usize, usize),
    scale: f32,
) -> Result<()> {
    let (mut bias, mut own) = (None, None);
    let (mut strides, mut first, mut before) = ([0; 3], -1, 0);
    match seen {
        Seen::All => {}
        Seen::Bias(b, s) => (bias, strides) = (Some(Held::strided(b)), s),
        Seen::Causal { first: f, prefix, own: o } => {
            (first, before) = (i32::try_from(f).map_err(candle_core::Error::wrap)?, prefix);
            own = o.map(Held::new).transpose()?;
        }
    }
    let pointer = |h: &Option<Held>| h.as_ref().map_or(Ok(Arg::Pointer(0)), |h| h.get()?.arg());
    let [of_batch, of_head, of_query] = strides.map(|s| Arg::Size(s as u64));
    let args = [
        x.arg()?,
        pointer(&bias)?,
        pointer(&own)?,
        y,
        unsigned(keys)?,
        unsigned(heads)?,
        unsigned(queries)?,
        of_batch,
        of_head,
        of_query,
        Arg::Signed(first),
        unsigned(before)?,
        Arg::Float(scale),
    ];
    x.launch("softmax", x.dtype(), (batch * heads * queries, 1), threads(keys).min(512), &args)
}

/// `softmax(scale · q kᵀ) v` of `q` `[batch, n, heads · dim]` over `k`, `v` `[batch, m, kv_heads · dim]` (views with dense
/// rows, of the same strides), heads being groups that share keys. Queries go in parts whose scores are at most `most`;
/// `seen(from, f)` calls `f` with what the queries from `from` on see.
#[cfg(feature = "cuda")]
pub(super) fn attention(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    (heads, kv_heads): (usize, usize),
    scale: f32,
    most: usize,
    seen: impl Fn(usize, &mut dyn FnMut(Seen) -> Result<()>) -> Result<()>,
) -> Result<Tensor> {
    use product::{Into, Rows, Sizes, product};
    let ((b, n, width), m) = (q.dims3()?, k.dim(1)?);
    let (dim, group) = (width / heads, heads / kv_heads);
    let (hq, hk, hv) = (Held::strided(q), Held::strided(k), Held::strided(v));
    let (mq, mk, mv) = (hq.get()?, hk.get()?, hv.get()?);
    let mut out = mq.beside(q.dtype(), b * n * width)?;
    let part = (most / (b * heads * m).max(1)).clamp(1, n.max(1));
    for from in (0..n).step_by(part) {
        let some = part.min(n - from);
        let mut scores = mq.beside(q.dtype(), b * heads * some * m)?;
        // One product takes the heads of all groups' same member, whose keys are evenly apart.
        let each = (0..b).flat_map(|row| (0..group).map(move |member| (row, member)));
        let sizes = |n, k| Sizes { batch: kv_heads, m: some, n, k };
        for (row, member) in each.clone() {
            let a = q.stride()[0] * row + q.stride()[1] * from + member * dim;
            let a = Rows { memory: mq, from: a, row: q.stride()[1], matrix: group * dim };
            let b = Rows { memory: mk, from: k.stride()[0] * row, row: k.stride()[1], matrix: dim };
            let to = (row * heads + member) * some * m;
            let c = Into { memory: &mut scores, from: to, row: m, matrix: group * some * m };
            product(c, a, b, true, sizes(m, dim), false)?;
        }
        seen(from, &mut |seen| {
            let to = scores.arg()?;
            softmax_to(scores.read(), to, seen, (b, heads, some, m), scale)
        })?;
        for (row, member) in each {
            let a = (row * heads + member) * some * m;
            let a = Rows { memory: scores.read(), from: a, row: m, matrix: group * some * m };
            let b = Rows { memory: mv, from: v.stride()[0] * row, row: v.stride()[1], matrix: dim };
            let to = (row * n + from) * width + member * dim;
            let c = Into { memory: &mut out, from: to, row: width, matrix: group * dim };
            product(c, a, b, false, sizes(dim, m), false)?;
        }
    }
    Ok(out.tensor(q.shape()))
}

/// A convolution as products of `weight` `[out, channels · kernel²]` with parts of the unfolded input `x`
/// `[batch, channels, h, w]` (or `relu(x)`): `[batch, out, oh · ow]`. A part is so small that the card's cache holds it.
#[cfg(feature = "cuda")]
pub(super) fn convolve(
    x: &Tensor,
    weight: &Tensor,
    window: Window,
    (oh, ow): (usize, usize),
    relu: bool,
    tf32: bool,
) -> Result<Tensor> {
    use product::{Into, Rows, Sizes, product};
    /// Bytes of a part.
    const PART: usize = 16 << 20;
    let (dims @ (batch, ..), (out, k), places) = (x.dims4()?, weight.dims2()?, oh * ow);
    let (hx, hw) = (Held::new(x)?, Held::new(weight)?);
    let (mx, mw) = (hx.get()?, hw.get()?);
    let mut y = mx.beside(x.dtype(), batch * out * places)?;
    let mut multiply = |columns: Memory, first: usize, n: usize| {
        let a = Rows { memory: mw, from: 0, row: k, matrix: 0 };
        let b = Rows { memory: columns, from: 0, row: n, matrix: k * n };
        let c = Into { memory: &mut y, from: first, row: places, matrix: out * places };
        product(c, a, b, false, Sizes { batch, m: out, n, k }, tf32)
    };
    if (window.kernel, window.stride, window.padding, relu) == (1, 1, 0, false) {
        multiply(mx, 0, places)?;
        return Ok(y.tensor((batch, out, places)));
    }
    // A multiple of what products go by.
    let part = (PART / (batch * k * x.dtype().size_in_bytes()).max(1)).next_multiple_of(256);
    for first in (0..places).step_by(part) {
        let n = part.min(places - first);
        multiply(columns(mx, dims, window, ow, relu, (first, n))?.read(), first, n)?;
    }
    Ok(y.tensor((batch, out, places)))
}

/// The gradient of [`softmax`] at `x`, from its result `y`.
pub(super) fn softmax_back(y: &Tensor, g: &Tensor, scale: f32) -> Result<Tensor> {
    let (g, m) = (g.contiguous()?, y.dim(candle_core::D::Minus1)?);
    let (hy, hg) = (Held::new(y)?, Held::new(&g)?);
    let my = hy.get()?;
    let mut dx = my.beside(y.dtype(), y.elem_count())?;
    let args = [my.arg()?, hg.get()?.arg()?, dx.arg()?, unsigned(m)?, Arg::Float(scale)];
    my.launch("softmax_back", y.dtype(), (y.elem_count() / m.max(1), 1), threads(m), &args)?;
    Ok(dx.tensor(y.shape()))
}

/// A square window that goes over a picture.
#[derive(Clone, Copy)]
pub(super) struct Window {
    pub kernel: usize,
    pub stride: usize,
    pub padding: usize,
    pub replicate: bool,
}

impl Window {
    /// Its positions along a side.
    pub fn places(&self, side: usize) -> Option<usize> {
        Some((side + 2 * self.padding).checked_sub(self.kernel)? / self.stride + 1)
    }
}

/// What `n` places of a window, row after row from the `first` on, see of `x` (or of `relu(x)`) `[batch, channels, h, w]`:
/// `[batch, channels · kernel², n]`. The window has `ow` places in a row.
pub(super) fn columns(
    x: Memory,
    (batch, channels, h, w): (usize, usize, usize, usize),
    window: Window,
    ow: usize,
    relu: bool,
    (first, n): (usize, usize),
) -> Result<Owned> {
    let taps = batch * channels * window.kernel * window.kernel;
    let mut y = x.beside(x.dtype(), taps * n)?;
    let args = [
        x.arg()?,
        y.arg()?,
        unsigned(taps)?,
        unsigned(h)?,
        unsigned(w)?,
        unsigned(window.kernel)?,
        unsigned(window.stride)?,
        unsigned(window.padding)?,
        Arg::Unsigned(window.replicate.into()),
        unsigned(ow)?,
        Arg::Unsigned(relu.into()),
        unsigned(first)?,
        unsigned(n)?,
    ];
    x.launch("columns", x.dtype(), (n.div_ceil(BLOCK), taps.min(MOST_GRID_ROWS)), BLOCK, &args)?;
    Ok(y)
}

/// The largest grid has so many rows; the kernels take more in turns.
const MOST_GRID_ROWS: usize = 65_535;

/// One side's weights of a [`resize`]: where each sum's parts begin (u32), of what they are (u32), and how much, f32 as
/// its bits.
pub(super) struct Side<'a> {
    pub starts: &'a Tensor,
    pub index: &'a Tensor,
    pub weight: &'a Tensor,
    pub from: usize,
    pub to: usize,
}

/// `x` `[planes, h, w]` resampled.
pub(super) fn resize(x: Memory, planes: usize, rows: Side, columns: Side) -> Result<Owned> {
    let held = [&rows, &columns].map(|s| [s.starts, s.index, s.weight].map(Held::new));
    let mut y = x.beside(x.dtype(), planes * rows.to * columns.to)?;
    let mut args = vec![x.arg()?, y.arg()?, unsigned(planes)?];
    for n in [rows.from, columns.from, rows.to, columns.to] {
        args.push(unsigned(n)?);
    }
    let held = held.into_iter().flatten().collect::<Result<Vec<_>>>()?;
    for h in &held {
        args.push(h.get()?.arg()?);
    }
    let grid = ((rows.to * columns.to).div_ceil(BLOCK), planes.min(MOST_GRID_ROWS));
    x.launch("resize", x.dtype(), grid, BLOCK, &args)?;
    Ok(y)
}

/// The sizes of a deformable attention.
#[derive(Clone, Copy)]
pub(super) struct Deformable {
    pub batch: usize,
    pub tokens: usize,
    pub queries: usize,
    pub heads: usize,
    pub dim: usize,
    pub levels: usize,
    pub points: usize,
}

impl Deformable {
    fn readers(self) -> usize {
        self.batch * self.queries * self.heads
    }

    fn args(self) -> Result<[Arg; 6]> {
        Ok([
            unsigned(self.tokens)?,
            unsigned(self.queries)?,
            unsigned(self.heads)?,
            unsigned(self.dim)?,
            unsigned(self.levels)?,
            unsigned(self.points)?,
        ])
    }
}

/// Deformable attention at given places with given masses; `levels` is u32, height, width and first token of
/// each level.
pub(super) fn msda(
    value: Memory,
    place: Memory,
    mass: Memory,
    levels: &Tensor,
    d: Deformable,
) -> Result<Owned> {
    let (levels, len) = (Held::new(levels)?, d.readers() * d.dim);
    let mut y = value.beside(value.dtype(), len)?;
    let mut args = vec![value.arg()?, place.arg()?, mass.arg()?, levels.get()?.arg()?, y.arg()?];
    args.push(Arg::Size(len as u64));
    args.extend(d.args()?);
    let by = if d.dim.is_multiple_of(4) && value.start().is_multiple_of(4) { 4 } else { 1 };
    args.push(unsigned(by)?);
    value.launch("msda", value.dtype(), (len.div_ceil(BLOCK * by), 1), BLOCK, &args)?;
    Ok(y)
}

/// f32 `[1]`: the largest absolute value; not a number if one of them is none.
pub(super) fn largest(x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    let (hx, n) = (Held::new(&x)?, x.elem_count());
    let mx = hx.get()?;
    let mut most = mx.beside_zeroed(DType::F32, 1, true)?;
    let args = [mx.arg()?, most.arg()?, Arg::Size(n as u64)];
    // Threads do several each, so that few blocks meet at the one result.
    mx.launch("largest", x.dtype(), (n.div_ceil(BLOCK * 16).min(1024), 1), BLOCK, &args)?;
    Ok(most.tensor(1))
}

/// Gradients of [`msda`] at value, place and mass; `exact` ones are equal whatever the order in which blocks run, and
/// take twice the time.
pub(super) fn msda_back(
    [value, place, mass]: [&Tensor; 3],
    levels: &Tensor,
    g: &Tensor,
    d: Deformable,
    exact: bool,
) -> Result<(Tensor, Tensor, Tensor)> {
    /// Readers of a block, a warp for each.
    const READERS: usize = BLOCK / 32;
    let (g, dtype, n) = (g.contiguous()?, value.dtype(), value.elem_count());
    let held = [value, place, mass, levels, &g].map(Held::new);
    let mut read = Vec::new();
    for h in &held {
        match h {
            Ok(h) => read.push(h.get()?),
            Err(e) => candle_core::bail!("{e}"),
        }
    }
    let v = read[0];
    let mut args = read.iter().map(|m| m.arg()).collect::<Result<Vec<_>>>()?;
    let (mut dplace, mut dmass) = (v.beside(dtype, place.elem_count())?, v.beside(dtype, mass.elem_count())?);
    let mut sum = v.beside_zeroed(if exact { DType::I64 } else { DType::F32 }, n, true)?;
    let most = if exact { Some(Tensor::cat(&[largest(&g)?, largest(mass)?], 0)?) } else { None };
    let most = most.as_ref().map(Held::new).transpose()?;
    if let Some(most) = &most {
        args.push(most.get()?.arg()?);
    }
    args.extend([sum.arg()?, dplace.arg()?, dmass.arg()?, Arg::Size(d.readers() as u64)]);
    args.extend(d.args()?);
    let kernel = if exact { "msda_back" } else { "msda_back_loose" };
    v.launch(kernel, dtype, (d.readers().div_ceil(READERS), 1), BLOCK, &args)?;
    let (dplace, dmass) = (dplace.tensor(place.shape()), dmass.tensor(mass.shape()));
    let Some(most) = most else {
        return Ok((sum.tensor(value.shape()).to_dtype(dtype)?, dplace, dmass));
    };
    let mut dvalue = v.beside(dtype, n)?;
    // As the kernel counts them.
    let terms = d.queries as f32 * d.levels as f32 * d.points as f32;
    let args = [sum.read().arg()?, most.get()?.arg()?, dvalue.arg()?, Arg::Size(n as u64), Arg::Float(terms)];
    v.launch("from_whole", dtype, (n.div_ceil(BLOCK), 1), BLOCK, &args)?;
    Ok((dvalue.tensor(value.shape()), dplace, dmass))
}

/// What [`decode`] can take: query heads that share keys, and values of a head.
pub(super) const MOST_GROUP: usize = 8;
pub(super) const MOST_DIM: usize = 256;

/// Attention of one new token a row: `q` `[batch, 1, heads · dim]` over `k`, `v` `[batch, len, kv_heads · dim]`,
/// views of a longer cache. Keys from `prefix` up to `own[b]` (u32 `[batch]`) are padding. No gradient.
pub(super) fn decode(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    (kv_heads, group): (usize, usize),
    prefix: usize,
    own: &Tensor,
    scale: f32,
) -> Result<Tensor> {
    /// Keys that are worth a block of their own, and blocks that fill a large GPU.
    const KEYS: usize = 32;
    const BLOCKS: usize = 1536;
    let ((batch, _, width), len) = (q.dims3()?, k.dim(1)?);
    let dim = width / (kv_heads * group);
    let fits = (1..=MOST_GROUP).contains(&group) && dim <= MOST_DIM && k.stride()[1..] == [kv_heads * dim, 1];
    // The kernel reads eight values at once.
    let starts = [k, v].map(|t| t.layout().start_offset());
    if !fits || k.stride() != v.stride() || !starts.iter().all(|s| s.is_multiple_of(8)) {
        candle_core::bail!("decode: q {:?}, k {:?}, v {:?}", q.shape(), k.layout(), v.layout())
    }
    let splits = len.div_ceil(KEYS).min(BLOCKS.div_ceil(batch * kv_heads)).max(1);
    let (hq, ho) = (Held::new(q)?, Held::new(own)?);
    let (hk, hv) = (Held::strided(k), Held::strided(v));
    let mq = hq.get()?;
    let heads = batch * kv_heads * group;
    let mut stats = mq.beside(DType::F32, heads * splits * 2)?;
    let mut sums = mq.beside(DType::F32, heads * splits * dim)?;
    let args = [
        mq.arg()?,
        hk.get()?.arg()?,
        hv.get()?.arg()?,
        ho.get()?.arg()?,
        stats.arg()?,
        sums.arg()?,
        unsigned(len)?,
        Arg::Size(k.stride()[0] as u64),
        unsigned(kv_heads)?,
        unsigned(group)?,
        unsigned(dim)?,
        unsigned(prefix)?,
        Arg::Float(scale),
    ];
    mq.launch("decode", q.dtype(), (batch * kv_heads, splits), 128, &args)?;
    let mut y = mq.beside(q.dtype(), q.elem_count())?;
    let args = [stats.read().arg()?, sums.read().arg()?, y.arg()?, unsigned(splits)?, unsigned(dim)?];
    mq.launch("decode_join", q.dtype(), (heads, 1), threads(dim), &args)?;
    Ok(y.tensor(q.shape()))
}

/// A token and its log-probability for each row of logits `[rows, vocab]`, chosen by `drawn` (a number in 0..1 a row) under
/// `temperature`, or the most likely one where that is 0; [`u32::MAX`] where no logit is a number. Waits for the GPU.
pub(super) fn sample(logits: &Tensor, drawn: &[f64], temperature: f64) -> Result<Vec<(u32, f32)>> {
    let (logits, (rows, vocab)) = (logits.contiguous()?, logits.dims2()?);
    if drawn.len() != rows {
        candle_core::bail!("sample: {rows} rows, {} numbers", drawn.len())
    }
    let drawn = Tensor::new(drawn, logits.device())?;
    let (hl, hd) = (Held::new(&logits)?, Held::new(&drawn)?);
    let ml = hl.get()?;
    let mut out = ml.beside(DType::F64, 2 * rows)?;
    let args = [ml.arg()?, hd.get()?.arg()?, out.arg()?, unsigned(vocab)?, Arg::Double(temperature)];
    ml.launch("sample", logits.dtype(), (rows, 1), 1024, &args)?;
    let out = out.tensor((rows, 2)).to_vec2::<f64>()?;
    Ok(out.into_iter().map(|r| (if r[0] < 0. { u32::MAX } else { r[0] as u32 }, r[1] as f32)).collect())
}

/// f32 `[rows]` twice: `log softmax(x)[target]` of each row and the log of its sum of exponentials; `target`
/// is u32 `[rows]`, below `vocab`.
pub(super) fn log_prob(x: Memory, target: &Tensor, rows: usize, vocab: usize) -> Result<(Owned, Owned)> {
    let target = Held::new(target)?;
    let (mut y, mut normaliser) = (x.beside(DType::F32, rows)?, x.beside(DType::F32, rows)?);
    let args = [x.arg()?, target.get()?.arg()?, y.arg()?, normaliser.arg()?, unsigned(vocab)?];
    x.launch("log_prob", x.dtype(), (rows, 1), threads(vocab), &args)?;
    Ok((y, normaliser))
}

/// The gradient of [`log_prob`] at `x` `[rows, vocab]`; `g` is f32 `[rows]`.
pub(super) fn log_prob_back(x: &Tensor, target: &Tensor, g: &Tensor) -> Result<Tensor> {
    let ((rows, vocab), g) = (x.dims2()?, g.contiguous()?);
    let (hx, ht, hg) = (Held::new(x)?, Held::new(target)?, Held::new(&g)?);
    let mx = hx.get()?;
    let (_, normaliser) = log_prob(mx, target, rows, vocab)?;
    let mut dx = mx.beside(x.dtype(), rows * vocab)?;
    let args = [
        mx.arg()?,
        ht.get()?.arg()?,
        normaliser.read().arg()?,
        hg.get()?.arg()?,
        dx.arg()?,
        unsigned(vocab)?,
    ];
    mx.launch("log_prob_back", x.dtype(), (rows, 1), threads(vocab), &args)?;
    Ok(dx.tensor(x.shape()))
}

#[cfg(test)]
mod tests;
