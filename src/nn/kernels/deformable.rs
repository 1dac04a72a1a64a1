//! Deformable attention.

use super::*;

/// The sizes of a deformable attention.
#[derive(Clone, Copy)]
pub(in crate::nn) struct Deformable {
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
pub(in crate::nn) fn msda(
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
pub(in crate::nn) fn largest(x: &Tensor) -> Result<Tensor> {
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
/// take more time and memory (data/results/gpu.md).
pub(in crate::nn) fn msda_back(
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
