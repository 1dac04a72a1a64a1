//! Convolutions and resampling.

use super::*;

/// A square window that goes over a picture.
#[derive(Clone, Copy)]
pub(in crate::nn) struct Window {
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
pub(in crate::nn) fn columns(
    x: Memory,
    (batch, channels, h, w): (usize, usize, usize, usize),
    window: Window,
    ow: usize,
    relu: bool,
    (first, n): (usize, usize),
) -> Result<Owned> {
    let planes = batch * channels;
    // As the kernel counts within a plane.
    if i32::try_from(h * w).is_err() {
        candle_core::bail!("convolution: a picture of {h} × {w}")
    }
    let mut y = x.beside(x.dtype(), planes * window.kernel * window.kernel * n)?;
    let args = [
        x.arg()?,
        y.arg()?,
        unsigned(planes)?,
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
    x.launch("columns", x.dtype(), (n.div_ceil(BLOCK), planes.min(MOST_GRID_ROWS)), BLOCK, &args)?;
    Ok(y)
}

/// A convolution as products of `weight` `[out, channels · kernel²]` with parts of the unfolded input `x`
/// `[batch, channels, h, w]` (or `relu(x)`): `[batch, out, oh · ow]`. A part takes little memory beside the whole.
#[cfg(feature = "cuda")]
pub(in crate::nn) fn convolve(
    x: &Tensor,
    weight: &Tensor,
    window: Window,
    (oh, ow): (usize, usize),
    relu: bool,
    tf32: bool,
) -> Result<Tensor> {
    use super::gemm::{Into, Rows, Sizes, product};
    /// Bytes of a part.
    const PART: usize = 64 << 20;
    let (dims @ (batch, ..), (out, k), places) = (x.dims4()?, weight.dims2()?, oh * ow);
    let (hx, hw) = (Held::new(x)?, Held::new(weight)?);
    let (mx, mw) = (hx.get()?, hw.get()?);
    let mut y = mx.beside(x.dtype(), batch * out * places)?;
    let mut multiply = |columns: Memory, first: usize, n: usize| {
        let a = Rows { memory: mw, from: 0, row: k, matrix: 0 };
        let b = Rows { memory: columns, from: 0, row: n, matrix: k * n };
        let c = Into { memory: &mut y, from: first, row: places, matrix: out * places };
        product(c, 1., a, b, false, Sizes { batch, m: out, n, k }, tf32)
    };
    if (window.kernel, window.stride, window.padding, relu) == (1, 1, 0, false) {
        multiply(mx, 0, places)?;
        return Ok(y.tensor((batch, out, places)));
    }
    // A multiple of what products go by.
    let part = (PART / (batch * k * x.dtype().size_in_bytes()).max(1)).max(1).next_multiple_of(256);
    for first in (0..places).step_by(part) {
        let n = part.min(places - first);
        multiply(columns(mx, dims, window, ow, relu, (first, n))?.read(), first, n)?;
    }
    Ok(y.tensor((batch, out, places)))
}

/// The largest grid has so many rows; the kernels take more in turns.
const MOST_GRID_ROWS: usize = 65_535;

/// One side's weights of a [`resize`]: where each sum's parts begin (u32), of what they are (u32), and how much, f32 as
/// its bits.
pub(in crate::nn) struct Side<'a> {
    pub starts: &'a Tensor,
    pub index: &'a Tensor,
    pub weight: &'a Tensor,
    pub from: usize,
    pub to: usize,
}

/// `x` `[planes, h, w]` resampled.
pub(in crate::nn) fn resize(x: Memory, planes: usize, rows: Side, columns: Side) -> Result<Owned> {
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
