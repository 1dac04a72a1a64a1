//! What training adds: dropout, and the optimiser's passes over parameters.

use super::*;
use crate::nn::optim::Rule;

/// Dropout of `n` numbers with probability `p`, the same for the same seed: forward, and its gradient.
pub(in crate::nn) fn dropout(x: Memory, n: usize, p: f64, seed: u64) -> Result<Owned> {
    let mut y = x.beside(x.dtype(), n)?;
    let least = (p * (1u64 << 32) as f64).round().clamp(0., u32::MAX as f64) as u32;
    let args = [
        x.arg()?,
        y.arg()?,
        Arg::Size(n as u64),
        Arg::Size(seed),
        Arg::Unsigned(least),
        Arg::Float((1. / (1. - p)) as f32),
    ];
    x.launch("dropout", x.dtype(), (n.div_ceil(BLOCK), 1), BLOCK, &args)?;
    Ok(y)
}

/// `sum = weight · g`, plus what `sum` was unless `first`; `sum` is f32.
pub(in crate::nn) fn add_gradient(
    g: Memory,
    n: usize,
    sum: &mut Owned,
    weight: f32,
    first: bool,
) -> Result<()> {
    let args = [g.arg()?, sum.arg()?, Arg::Size(n as u64), Arg::Float(weight), Arg::Unsigned(first.into())];
    g.launch("add_gradient", g.dtype(), (n.div_ceil(BLOCK), 1), BLOCK, &args)
}

/// Parts of a sum of squares.
pub(in crate::nn) const PARTS: usize = 64;

/// The sum of squares of `n` numbers in [`PARTS`] parts, which become the f64 of `parts` from `at` on.
pub(in crate::nn) fn sum_squares(x: Memory, n: usize, parts: &mut Owned, at: usize) -> Result<()> {
    let args = [x.arg()?, parts.arg_at(at)?, Arg::Size(n as u64)];
    x.launch("sum_squares", x.dtype(), (PARTS, 1), BLOCK, &args)
}

/// One step of AdamW on `n` weights at `w`, which are written, from their summed gradient.
pub(in crate::nn) fn adamw(
    w: Memory,
    n: usize,
    master: Option<&mut Owned>,
    (m, v, g): (&mut Owned, &mut Owned, &Owned),
    rule: Rule,
) -> Result<()> {
    let args = [
        w.arg()?,
        master.map_or(Ok(Arg::Pointer(0)), Owned::arg)?,
        m.arg()?,
        v.arg()?,
        g.read().arg()?,
        Arg::Size(n as u64),
        Arg::Float(rule.clip),
        Arg::Float(rule.beta1),
        Arg::Float(rule.beta2),
        Arg::Float(rule.keep),
        Arg::Float(rule.step),
        Arg::Float(rule.root),
        Arg::Float(rule.eps),
    ];
    w.launch("adamw", w.dtype(), (n.div_ceil(BLOCK), 1), BLOCK, &args)
}

/// Rows of `x` `[batch, sources, dim]` by `from` (u32, a source or `u32::MAX` for zeros): `[batch, rows, dim]`.
pub(in crate::nn) fn move_rows(
    x: Memory,
    from: &Tensor,
    (batch, sources, dim): (usize, usize, usize),
) -> Result<Owned> {
    let (held, rows) = (Held::new(from)?, from.elem_count());
    let mut y = x.beside(x.dtype(), batch * rows * dim)?;
    let args = [x.arg()?, held.get()?.arg()?, y.arg()?, unsigned(sources)?, unsigned(rows)?, unsigned(dim)?];
    x.launch("move_rows", x.dtype(), (batch * rows, 1), threads(dim), &args)?;
    Ok(y)
}
