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
    args.push(unsigned(len)?);
    args.extend(d.args()?);
    let by = if d.dim.is_multiple_of(4) && value.start().is_multiple_of(4) { 4 } else { 1 };
    args.push(unsigned(by)?);
    value.launch("msda", value.dtype(), (len.div_ceil(BLOCK * by), 1), BLOCK, &args)?;
    Ok(y)
}

/// f32 `[1]`: the largest absolute value of `n` numbers; not a number if one of them is none.
pub(in crate::nn) fn largest(x: Memory, n: usize) -> Result<Owned> {
    let mut most = x.beside_zeroed(DType::F32, 1, true)?;
    largest_to(x, n, &mut most)?;
    Ok(most)
}

fn largest_to(x: Memory, n: usize, most: &mut Owned) -> Result<()> {
    let args = [x.arg()?, most.arg()?, Arg::Size(n as u64)];
    // Threads do several each, so that few blocks meet at the one result.
    x.launch("largest", x.dtype(), (n.div_ceil(BLOCK * 16).min(1024), 1), BLOCK, &args)
}

/// f32 `[2]`: the largest mass, and the largest sum of masses that read one token.
fn most_read(place: Memory, mass: Memory, levels: Memory, d: Deformable) -> Result<Owned> {
    let samples = d.readers() * d.levels * d.points;
    let weights = d.batch * d.tokens * d.heads;
    let mut most = mass.beside_zeroed(DType::F32, 2, true)?;
    largest_to(mass, samples, &mut most)?;
    let mut sums = mass.beside_zeroed(DType::I64, weights, true)?;
    let args = [
        place.arg()?,
        mass.arg()?,
        levels.arg()?,
        most.arg()?,
        sums.arg()?,
        unsigned(samples)?,
        unsigned(d.tokens)?,
        unsigned(d.queries)?,
        unsigned(d.heads)?,
        unsigned(d.levels)?,
        unsigned(d.points)?,
    ];
    mass.launch("msda_weights", mass.dtype(), (samples.div_ceil(BLOCK), 1), BLOCK, &args)?;
    // As the kernel before counts them.
    let terms = d.queries as f32 * d.levels as f32 * d.points as f32;
    let args = [sums.read().arg()?, most.arg()?, Arg::Size(weights as u64), Arg::Float(terms)];
    mass.launch("largest_weight", mass.dtype(), (weights.div_ceil(BLOCK * 16).min(256), 1), BLOCK, &args)?;
    Ok(most)
}

/// Gradients of [`msda`] at value, place and mass; `exact` ones are equal whatever the order in which blocks run; at the
/// value they are whole numbers of 31 bits, of which the sums at the busiest token take all: data/results/gpu.md has how
/// near they come, and the time.
pub(in crate::nn) fn msda_back(
    [value, place, mass]: [&Tensor; 3],
    levels: &Tensor,
    g: &Tensor,
    d: Deformable,
    exact: bool,
) -> Result<(Tensor, Tensor, Tensor)> {
    /// Readers of a block, eight threads for each.
    const READERS: usize = BLOCK / 8;
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
    let readers = unsigned(d.readers())?;
    let pairs = n / d.dim.max(1) * d.dim.div_ceil(2);
    let mut sum = match exact {
        true => v.beside_zeroed(DType::I64, pairs, true)?,
        false => v.beside_zeroed(DType::F32, n, true)?,
    };
    let bounds = match exact {
        true => Some((largest(read[4], g.elem_count())?, most_read(read[1], read[2], read[3], d)?)),
        false => None,
    };
    if let Some((most, weight)) = &bounds {
        args.extend([most.read().arg()?, weight.read().arg()?]);
    }
    let fours = d.dim.is_multiple_of(4)
        && [read[0], read[4]].iter().all(|m| m.arg().is_ok_and(|a| a.is_even(4 * dtype.size_in_bytes())));
    args.extend([sum.arg()?, dplace.arg()?, dmass.arg()?, readers]);
    args.extend(d.args()?);
    if !exact {
        args.push(Arg::Unsigned(fours.into()));
    }
    let kernel = if exact { "msda_back" } else { "msda_back_loose" };
    v.launch(kernel, dtype, (d.readers().div_ceil(READERS), 1), BLOCK, &args)?;
    let (dplace, dmass) = (dplace.tensor(place.shape()), dmass.tensor(mass.shape()));
    let Some((most, weight)) = bounds else {
        return Ok((sum.tensor(value.shape()).to_dtype(dtype)?, dplace, dmass));
    };
    let mut dvalue = v.beside(dtype, n)?;
    let args = [
        sum.read().arg()?,
        most.read().arg()?,
        weight.read().arg()?,
        dvalue.arg()?,
        unsigned(pairs)?,
        unsigned(d.dim)?,
    ];
    v.launch("from_pairs", dtype, (pairs.div_ceil(BLOCK), 1), BLOCK, &args)?;
    Ok((dvalue.tensor(value.shape()), dplace, dmass))
}
