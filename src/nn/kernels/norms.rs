//! Norms, rotary positions and gated units.

use super::*;

/// `x / rms(x) · w` for rows of `d` values.
pub(in crate::nn) fn rms_norm(x: Memory, w: Memory, len: usize, d: usize, eps: f32) -> Result<Owned> {
    let mut y = x.beside(x.dtype(), len)?;
    let args = [x.arg()?, w.arg()?, y.arg()?, unsigned(d)?, Arg::Float(eps)];
    x.launch("rms_norm", x.dtype(), (len / d, 1), threads(d), &args)?;
    Ok(y)
}

/// Gradients of [`rms_norm`] at `x` and, if it is trained, `w`.
pub(in crate::nn) fn rms_norm_back(
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
pub(in crate::nn) fn layer_norm(
    x: Memory,
    w: Memory,
    b: Memory,
    len: usize,
    d: usize,
    eps: f32,
) -> Result<Owned> {
    let mut y = x.beside(x.dtype(), len)?;
    let args = [x.arg()?, w.arg()?, b.arg()?, y.arg()?, unsigned(d)?, Arg::Float(eps)];
    x.launch("layer_norm", x.dtype(), (len / d, 1), threads(d), &args)?;
    Ok(y)
}

/// Gradients of [`layer_norm`] at `x`, `w` and `b`; the last two if they are trained.
pub(in crate::nn) fn layer_norm_back(
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
pub(in crate::nn) fn rope(
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
pub(in crate::nn) fn norm_rope(
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
pub(in crate::nn) fn swiglu(a: Memory, u: Memory, len: usize) -> Result<Owned> {
    let mut y = a.beside(a.dtype(), len)?;
    let args = [a.arg()?, u.arg()?, y.arg()?, Arg::Size(len as u64)];
    a.launch("swiglu", a.dtype(), (len.div_ceil(BLOCK), 1), BLOCK, &args)?;
    Ok(y)
}

/// Gradients of [`swiglu`] at `a` and `u`.
pub(in crate::nn) fn swiglu_back(a: &Tensor, u: &Tensor, g: &Tensor) -> Result<(Tensor, Tensor)> {
    let (g, len) = (g.contiguous()?, a.elem_count());
    let (ha, hu, hg) = (Held::new(a)?, Held::new(u)?, Held::new(&g)?);
    let (ma, mu, mg) = (ha.get()?, hu.get()?, hg.get()?);
    let (mut da, mut du) = (ma.beside(a.dtype(), len)?, ma.beside(a.dtype(), len)?);
    let args = [ma.arg()?, mu.arg()?, mg.arg()?, da.arg()?, du.arg()?, Arg::Size(len as u64)];
    ma.launch("swiglu_back", a.dtype(), (len.div_ceil(BLOCK), 1), BLOCK, &args)?;
    Ok((da.tensor(a.shape()), du.tensor(a.shape())))
}
