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

#[cfg(test)]
use candle_core::CpuStorage;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{DType, Layout, Result, Shape, Storage, StorageRef, Tensor};
use std::ffi::c_void;

/// One argument of a kernel, as its declaration has it.
enum Arg {
    Pointer(u64),
    Size(u64),
    Unsigned(u32),
    Float(f32),
}

impl Arg {
    #[cfg_attr(not(test), allow(dead_code))]
    fn address(&self) -> *const c_void {
        match self {
            Self::Pointer(v) | Self::Size(v) => std::ptr::from_ref(v).cast(),
            Self::Unsigned(v) => std::ptr::from_ref(v).cast(),
            Self::Float(v) => std::ptr::from_ref(v).cast(),
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
                DType::I64 => CpuStorage::I64(vec![0; len]),
                _ => candle_core::bail!("kernels: no {dtype:?} on the host"),
            }),
        })
    }

    /// Starts `kernel` on a grid of blocks.
    fn launch(
        self,
        kernel: &str,
        dtype: DType,
        grid: (usize, usize),
        threads: usize,
        args: &[Arg],
    ) -> Result<()> {
        let kind = match dtype {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            _ => candle_core::bail!("{kernel}: no kernel for {dtype:?}"),
        };
        if grid.0 == 0 || grid.1 == 0 {
            return Ok(());
        }
        let (name, threads) = (format!("{kernel}_{kind}"), threads as u32);
        let Ok(columns) = i32::try_from(grid.0) else { candle_core::bail!("{kernel}: {} blocks", grid.0) };
        let grid = (columns as u32, grid.1 as u32);
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(s, _) => cuda::launch(&s.device, &name, grid, threads, args),
            #[cfg(test)]
            Self::Host(..) => host::launch(&name, grid, threads, args),
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

/// Threads for a row of `n` values: a power of two, at least a warp.
fn threads(n: usize) -> usize {
    n.next_power_of_two().clamp(32, 256)
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
    value.launch("msda", value.dtype(), (len.div_ceil(BLOCK), 1), BLOCK, &args)?;
    Ok(y)
}

/// Gradients of [`msda`] at value, place and mass. Equal whatever the order in which blocks run.
pub(super) fn msda_back(
    value: &Tensor,
    place: &Tensor,
    mass: &Tensor,
    levels: &Tensor,
    g: &Tensor,
    d: Deformable,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (g, dtype) = (g.contiguous()?, value.dtype());
    // Not a number if any is not.
    let largest = |t: &Tensor| -> Result<Tensor> {
        let (t, last) = (t.detach(), t.rank() - 1);
        let poison = (t.sum(last)?.sum_all()?.to_dtype(DType::F32)? * 0.)?;
        t.abs()?.max(last)?.max_all()?.to_dtype(DType::F32)? + poison
    };
    let most = Tensor::stack(&[largest(&g)?, largest(mass)?], 0)?;
    let held = [value, place, mass, levels, &g, &most].map(Held::new);
    let [v, p, m, l, hg, hmost] = held.each_ref().map(|h| match h {
        Ok(h) => h.get(),
        Err(e) => candle_core::bail!("{e}"),
    });
    let (v, most) = (v?, hmost?);
    let mut whole = v.beside_zeroed(DType::I64, value.elem_count(), true)?;
    let (mut dplace, mut dmass) = (v.beside(dtype, place.elem_count())?, v.beside(dtype, mass.elem_count())?);
    let mut args = vec![v.arg()?, p?.arg()?, m?.arg()?, l?.arg()?, hg?.arg()?, most.arg()?];
    args.extend([whole.arg()?, dplace.arg()?, dmass.arg()?]);
    args.extend(d.args()?);
    v.launch("msda_back", dtype, (d.readers(), 1), d.dim.next_power_of_two().clamp(1, 256), &args)?;
    let mut dvalue = v.beside(dtype, value.elem_count())?;
    // As the kernel counts them.
    let terms = d.queries as f32 * d.levels as f32 * d.points as f32;
    let (n, args) = (value.elem_count(), [whole.read().arg()?, most.arg()?, dvalue.arg()?]);
    let args: Vec<Arg> = args.into_iter().chain([Arg::Size(n as u64), Arg::Float(terms)]).collect();
    v.launch("from_whole", dtype, (n.div_ceil(BLOCK), 1), BLOCK, &args)?;
    Ok((dvalue.tensor(value.shape()), dplace.tensor(place.shape()), dmass.tensor(mass.shape())))
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
    const KEYS: usize = 256;
    const BLOCKS: usize = 512;
    let ((batch, _, width), len) = (q.dims3()?, k.dim(1)?);
    let dim = width / (kv_heads * group);
    let fits = (1..=MOST_GROUP).contains(&group) && dim <= MOST_DIM && k.stride()[1..] == [kv_heads * dim, 1];
    if !fits || k.stride() != v.stride() {
        candle_core::bail!("decode: q {:?}, k {:?}, v {:?}", q.shape(), k.layout(), v.layout())
    }
    let splits = len.div_ceil(KEYS).min(BLOCKS.div_ceil(batch * kv_heads)).max(1);
    let (hq, ho) = (Held::new(q)?, Held::new(own)?);
    let (hk, hv) = (Held::strided(k), Held::strided(v));
    let mq = hq.get()?;
    let heads = batch * kv_heads * group;
    let mut partial = mq.beside(DType::F32, heads * splits * (dim + 2))?;
    let args = [
        mq.arg()?,
        hk.get()?.arg()?,
        hv.get()?.arg()?,
        ho.get()?.arg()?,
        partial.arg()?,
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
    let args = [partial.read().arg()?, y.arg()?, unsigned(splits)?, unsigned(dim)?];
    mq.launch("decode_join", q.dtype(), (heads, 1), threads(dim), &args)?;
    Ok(y.tensor(q.shape()))
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
