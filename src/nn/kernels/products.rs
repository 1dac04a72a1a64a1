//! Products with few rows, and what follows a product.

use super::*;

/// Rows that [`few_rows`] takes: for more, a product reads its weights no oftener than this does.
pub(in crate::nn) const MOST_ROWS: usize = 4;

/// Threads of a block of [`few_rows`]: few, so that the last blocks end together.
const FEW_BLOCK: usize = 128;

/// Whether [`few_rows`] takes weights `[out, k]` of these.
pub(in crate::nn) fn takes_few_rows(x: &Tensor, weights: &[&Tensor]) -> bool {
    let by_eights = |t: &Tensor| t.is_contiguous() && t.layout().start_offset().is_multiple_of(8);
    let k = x.dims().last().copied().unwrap_or(0);
    k > 0
        && k.is_multiple_of(8)
        && (1..=MOST_ROWS * k).contains(&x.elem_count())
        && by_eights(x)
        && weights.iter().all(|w| w.rank() == 2 && w.dims()[1] == k && by_eights(w))
}

/// `x wᵀ` of up to three weights, side by side: `[rows, Σ out]`; plus `plus`, of that shape, where it is given. No
/// gradient. Only what [`takes_few_rows`].
pub(in crate::nn) fn few_rows(x: &Tensor, weights: &[&Tensor], plus: Option<&Tensor>) -> Result<Tensor> {
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
pub(in crate::nn) fn few_rows_gated(x: &Tensor, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
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
pub(in crate::nn) struct Finish<'a> {
    /// `[channels]`.
    pub bias: Option<&'a Tensor>,
    pub act: Act,
    /// `[channels]`.
    pub scale: Option<&'a Tensor>,
    /// Of the product's shape.
    pub plus: Option<&'a Tensor>,
}

/// [`Finish`] of `x`, `[.., channels, inner]`; what it holds is contiguous and of x's type.
pub(in crate::nn) fn finish(x: Memory, len: usize, f: Finish, sizes: (usize, usize)) -> Result<Owned> {
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
    let from = [&x.arg()?, &bias, &scale, &plus, &y.arg()?].map(|a| a.is_even(4 * x.dtype().size_in_bytes()));
    let run = if inner == 1 { channels } else { inner };
    let fours = run.is_multiple_of(4) && len.is_multiple_of(4) && from == [true; 5];
    let (n, channels, inner) = (Arg::Size(len as u64), unsigned(channels)?, unsigned(inner)?);
    let fours_arg = Arg::Unsigned(fours.into());
    let args = [x.arg()?, bias, scale, plus, y.arg()?, n, channels, inner, Arg::Unsigned(act), fours_arg];
    let by = if fours { 4 } else { 1 };
    x.launch("finish", x.dtype(), (len.div_ceil(BLOCK * by), 1), BLOCK, &args)?;
    Ok(y)
}

/// `x + b` for rows of `channels` values.
pub(in crate::nn) fn add_bias(x: Memory, b: Memory, len: usize, channels: usize) -> Result<Owned> {
    finish_with(x, len, [b.arg()?, Arg::Pointer(0), Arg::Pointer(0)], 0, (channels, 1))
}

/// How a factor of a product of sums of k, of f32, becomes one of sums of 3 k whose numbers are TF32's (see the kernel).
#[derive(Clone, Copy, PartialEq)]
pub(in crate::nn) enum Thrice {
    /// Each row three times in a row: the factor's sums go along its rows.
    Along,
    /// The whole three times: they go over its rows.
    Over,
}

/// `rows` of `width` numbers thrice; `other` is for the product's second factor.
pub(in crate::nn) fn split(
    x: Memory,
    (rows, width): (usize, usize),
    how: Thrice,
    other: bool,
) -> Result<Owned> {
    let n = rows * width;
    let mut y = x.beside(DType::F32, 3 * n)?;
    let even = [&x.arg()?, &y.arg()?].iter().all(|a| a.is_even(16));
    let fours = even && width.is_multiple_of(4);
    let args = [
        x.arg()?,
        y.arg()?,
        unsigned(n)?,
        unsigned(width)?,
        Arg::Size(if how == Thrice::Over { n as u64 } else { 0 }),
        Arg::Unsigned(other.into()),
        Arg::Unsigned(fours.into()),
    ];
    let by = if fours { 4 } else { 1 };
    x.launch("split", DType::F32, (n.div_ceil(BLOCK * by), 1), BLOCK, &args)?;
    Ok(y)
}

/// Whether a product `[m, k] · [k, n]` of f32 takes less time in three parts than as it is.
#[cfg(feature = "cuda")]
fn is_worth_splitting(m: usize, n: usize, k: usize) -> bool {
    // Where what the parts cost is less than what they save, by both rates of an H100; and nowhere near where all is small.
    let fits = [m * k, n * k].iter().all(|n| u32::try_from(*n).is_ok());
    fits && k >= 32 && m * n >= 300 * (m + n)
}

/// Whether a card's rate of TF32 is several times its rate of f32: compute capability 8.0 (A100), 9.0 and 10.0, not
/// those of desktops.
#[cfg(feature = "cuda")]
fn has_fast_tf32(device: &candle_core::CudaDevice) -> bool {
    use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute_enum as Attribute;
    let context = device.cuda_stream().context().clone();
    let version = [
        Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    ]
    .map(|a| context.attribute(a).unwrap_or(0));
    matches!(version, [8..=10, 0])
}

/// `x wᵀ` of `[m, k]` and `[n, k]`, or `x w` of `[m, k]` and `[k, n]`, of f32: nearly as precise as f32's though the products
/// are of TF32. `None` where it would gain nothing.
#[cfg(feature = "cuda")]
pub(in crate::nn) fn product_of_parts(x: &Tensor, w: &Tensor, transposed: bool) -> Result<Option<Tensor>> {
    use super::gemm::{Into, Rows, Sizes, product};
    let ((m, k), (rows, width)) = (x.dims2()?, w.dims2()?);
    let n = if transposed { rows } else { width };
    let takes = x.dtype() == DType::F32 && x.is_contiguous() && w.is_contiguous();
    let fast = |d: &candle_core::Device| d.as_cuda_device().is_ok_and(has_fast_tf32);
    if !takes || !is_worth_splitting(m, n, k) || !fast(x.device()) {
        return Ok(None);
    }
    let (hx, hw) = (Held::new(x)?, Held::new(w)?);
    let a = split(hx.get()?, (m, k), Thrice::Along, false)?;
    let how = if transposed { Thrice::Along } else { Thrice::Over };
    let b = split(hw.get()?, (rows, width), how, true)?;
    let mut y = hx.get()?.beside(DType::F32, m * n)?;
    let row = if transposed { 3 * k } else { n };
    product(
        Into { memory: &mut y, from: 0, row: n, matrix: 0 },
        1.,
        Rows { memory: a.read(), from: 0, row: 3 * k, matrix: 0 },
        Rows { memory: b.read(), from: 0, row, matrix: 0 },
        transposed,
        Sizes { batch: 1, m, n, k: 3 * k },
        true,
    )?;
    Ok(Some(y.tensor((m, n))))
}
