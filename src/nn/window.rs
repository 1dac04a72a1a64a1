//! Windowed self-attention with a learned position bias (Liu et al. 2021, "Swin Transformer",
//! eq. 4), fused: from packed queries, keys and values to the weighted sum, per window, without
//! storing scores. The backward computes them again.
//!
//! Windows are small (n = window², at most a few dozen), so a window and head stay in the first
//! cache level. The bias gradient is summed over fixed groups of windows: results do not depend
//! on the number of threads. f32 on the CPU; elsewhere composed of candle ops.

use super::simd::{self, LANES, add_rows, madd, rows_apart, wide};
use super::{Mask, attention};
use candle_core::{CpuStorage, CustomOp2, Device, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// Added between tokens of different regions, as in the reference (not −∞).
const APART: f32 = -100.;

/// For shifted windows: `windows × n` region numbers; tokens of one window in different regions do
/// not see each other. Windows beyond the first picture's repeat the pattern.
pub type Regions = Arc<[u8]>;

/// `qkv` is `[windows, n, 3 · dim]` (queries, keys, values, each `heads` wide slices of
/// `dim / heads`), `bias` `[heads, n, n]`. Scores are scaled by 1/√(dim / heads). Returns
/// `[windows, n, dim]`.
pub fn window_attention(qkv: &Tensor, bias: &Tensor, regions: Option<&Regions>) -> Result<Tensor> {
    let (windows, n, width) = qkv.dims3()?;
    let (heads, bn, bm) = bias.dims3()?;
    let pattern = regions.map_or(1, |r| r.len() / n.max(1));
    if (bn, bm) != (n, n) || width % (3 * heads) != 0 || windows % pattern.max(1) != 0 {
        candle_core::bail!(
            "window attention: qkv {:?}, bias {:?}, regions for {pattern} windows",
            qkv.dims(),
            bias.dims()
        )
    }
    if super::cpu::fused(&[qkv, bias]) {
        let op = WindowAttention { regions: regions.cloned() };
        return qkv.contiguous()?.apply_op2(&bias.contiguous()?, op);
    }
    let dim = width / (3 * heads);
    let part =
        |i: usize| qkv.reshape((windows, n, 3, heads, dim))?.narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2);
    let mut mask = bias.unsqueeze(0)?;
    if let Some(regions) = regions {
        let regions = Tensor::from_slice(regions, (pattern, n), qkv.device())?;
        let apart = regions.unsqueeze(2)?.broadcast_ne(&regions.unsqueeze(1)?)?.to_dtype(qkv.dtype())?;
        let apart = (apart * APART as f64)?.reshape((1, pattern, 1, n, n))?;
        let apart = apart.expand((windows / pattern, pattern, 1, n, n))?.reshape((windows, 1, n, n))?;
        mask = mask.broadcast_add(&apart)?;
    }
    let scale = 1. / (dim as f64).sqrt();
    let y = attention(&part(0)?, &part(1)?, &part(2)?, scale, &Mask::Additive(mask))?;
    y.transpose(1, 2)?.reshape((windows, n, heads * dim))
}

struct WindowAttention {
    regions: Option<Regions>,
}

#[derive(Clone, Copy)]
struct Dims {
    windows: usize,
    n: usize,
    heads: usize,
    dim: usize,
}

impl Dims {
    fn new(qkv: &Shape, bias: &Shape) -> Result<Self> {
        let ((windows, n, width), heads) = (qkv.dims3()?, bias.dims()[0]);
        Ok(Self { windows, n, heads, dim: width / 3 / heads })
    }
    fn scale(&self) -> f32 {
        1. / (self.dim as f32).sqrt()
    }
    /// Numbers of a row over a window's tokens, whole registers of them.
    fn lanes(&self) -> usize {
        self.n.next_multiple_of(LANES)
    }
    /// Part 0, 1, 2 (query, key, value) of a token and head inside its window's packed rows.
    fn at(&self, part: usize, token: usize, head: usize) -> std::ops::Range<usize> {
        let from = (token * 3 + part) * self.heads * self.dim + head * self.dim;
        from..from + self.dim
    }
}

impl WindowAttention {
    fn region(&self, window: usize, n: usize) -> Option<&[u8]> {
        self.regions.as_ref().map(|r| &r[window % (r.len() / n) * n..][..n])
    }
}

/// One part of all tokens, scaled, dimension first (`[dim, lanes]`): scores of one query against all keys are then
/// sums of long rows.
fn transposed(d: &Dims, qkv: &[f32], part: usize, head: usize, scale: f32, out: &mut [f32]) {
    for j in 0..d.n {
        for (k, x) in qkv[d.at(part, j, head)].iter().enumerate() {
            out[k * d.lanes() + j] = scale * x;
        }
    }
}

#[inline(always)]
fn axpy<const FMA: bool>(a: f32, x: &[f32], y: &mut [f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y = madd::<FMA>(a, *x, *y));
}

/// Probabilities of query i over the window's tokens; zeros beyond. `keys` are [`transposed`].
#[inline(always)]
fn probabilities<const FMA: bool>(
    d: &Dims,
    q: &[f32],
    keys: &[f32],
    bias: &[f32],
    region: Option<&[u8]>,
    i: usize,
    p: &mut [f32],
) {
    let (own, beyond) = p.split_at_mut(d.n);
    own.copy_from_slice(bias);
    beyond.fill(0.);
    add_rows::<FMA>(rows_apart(q, d.lanes()), keys, p);
    let own = &mut p[..d.n];
    if let Some(r) = region {
        own.iter_mut().zip(r).for_each(|(p, x)| *p += if *x == r[i] { 0. } else { APART });
    }
    simd::softmax_row::<FMA>(own);
}

/// Room for a window and head.
struct Room {
    keys: Vec<f32>,
    values: Vec<f32>,
    p: Vec<f32>,
    dp: Vec<f32>,
}

impl Room {
    fn new(d: &Dims) -> Self {
        let (matrix, row) = (vec![0.; d.dim * d.lanes()], vec![0.; d.lanes()]);
        Self { keys: matrix.clone(), values: matrix, p: row.clone(), dp: row }
    }
}

wide! {
    fn window_forward(d: &Dims, qkv: &[f32], bias: &[f32], region: Option<&[u8]>, room: &mut Room, out: &mut [f32]) {
        let (n, row) = (d.n, d.heads * d.dim);
        for h in 0..d.heads {
            transposed(d, qkv, 1, h, d.scale(), &mut room.keys);
            for i in 0..n {
                let bias = &bias[(h * n + i) * n..][..n];
                probabilities::<FMA>(d, &qkv[d.at(0, i, h)], &room.keys, bias, region, i, &mut room.p);
                let values = &qkv[d.at(2, 0, h).start..];
                let out = &mut out[i * row + h * d.dim..][..d.dim];
                add_rows::<FMA>(rows_apart(&room.p[..n], 3 * row), values, out);
            }
        }
    }
}

wide! {
    /// Adds to the gradients of the bias and of the window's queries, keys and values.
    fn window_backward(
        d: &Dims,
        qkv: &[f32],
        bias: &[f32],
        region: Option<&[u8]>,
        grad: &[f32],
        room: &mut Room,
        gbias: &mut [f32],
        out: &mut [f32],
    ) {
        let (n, row) = (d.n, d.heads * d.dim);
        let Room { keys, values, p, dp } = room;
        for h in 0..d.heads {
            transposed(d, qkv, 1, h, d.scale(), keys);
            transposed(d, qkv, 2, h, 1., values);
            for i in 0..n {
                let at = (h * n + i) * n;
                let q = &qkv[d.at(0, i, h)];
                probabilities::<FMA>(d, q, keys, &bias[at..at + n], region, i, p);
                let go = &grad[i * row + h * d.dim..][..d.dim];
                dp.fill(0.);
                add_rows::<FMA>(rows_apart(go, d.lanes()), values, dp);
                let mean = simd::dot::<FMA>(p, dp);
                dp.iter_mut().zip(&*p).for_each(|(g, p)| *g = p * (*g - mean));
                axpy::<FMA>(1., &dp[..n], &mut gbias[at..at + n]);
                dp.iter_mut().for_each(|g| *g *= d.scale());
                let of_keys = &qkv[d.at(1, 0, h).start..];
                add_rows::<FMA>(rows_apart(&dp[..n], 3 * row), of_keys, &mut out[d.at(0, i, h)]);
                for j in 0..n {
                    axpy::<FMA>(dp[j], q, &mut out[d.at(1, j, h)]);
                    axpy::<FMA>(p[j], go, &mut out[d.at(2, j, h)]);
                }
            }
        }
    }
}

impl WindowAttention {
    fn forward(&self, qkv: &[f32], bias: &[f32], d: &Dims) -> Vec<f32> {
        let (n, row) = (d.n, d.heads * d.dim);
        let mut out = vec![0f32; d.windows * n * row];
        out.par_chunks_mut((n * row).max(1)).enumerate().for_each_init(
            || Room::new(d),
            |room, (w, out)| {
                let qkv = &qkv[w * n * 3 * row..][..n * 3 * row];
                window_forward(d, qkv, bias, self.region(w, n), room, out);
            },
        );
        out
    }

    fn backward(&self, qkv: &[f32], bias: &[f32], grad: &[f32], d: &Dims) -> (Vec<f32>, Vec<f32>) {
        let (n, row) = (d.n, d.heads * d.dim);
        // A fixed number of partial sums of the bias gradient, whatever the number of threads.
        let group = d.windows.div_ceil(16).max(1);
        let packed = (n * 3 * row).max(1);
        let mut gqkv = vec![0f32; qkv.len()];
        let groups = d.windows.div_ceil(group);
        let mut gbias = vec![0f32; groups.max(1) * bias.len()];
        gqkv.par_chunks_mut(group * packed)
            .zip(gbias.par_chunks_mut(bias.len().max(1)))
            .enumerate()
            .for_each(|(g, (gqkv, gbias))| {
                let mut room = Room::new(d);
                for (k, out) in gqkv.chunks_exact_mut(packed).enumerate() {
                    let w = g * group + k;
                    let (qkv, grad) = (&qkv[w * packed..][..packed], &grad[w * n * row..][..n * row]);
                    window_backward(d, qkv, bias, self.region(w, n), grad, &mut room, gbias, out);
                }
            });
        let (first, rest) = gbias.split_at_mut(bias.len());
        for part in rest.chunks_exact(bias.len().max(1)) {
            first.iter_mut().zip(part).for_each(|(a, b)| *a += b);
        }
        gbias.truncate(bias.len());
        (gqkv, gbias)
    }
}

fn slice<'a>(s: &'a CpuStorage, l: &Layout) -> Result<&'a [f32]> {
    match l.contiguous_offsets() {
        Some((from, to)) => Ok(&s.as_slice::<f32>()?[from..to]),
        None => candle_core::bail!("window attention: an argument is not contiguous"),
    }
}

impl CustomOp2 for WindowAttention {
    fn name(&self) -> &'static str {
        "window-attention"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let d = Dims::new(l1.shape(), l2.shape())?;
        let out = self.forward(slice(s1, l1)?, slice(s2, l2)?, &d);
        Ok((CpuStorage::F32(out), (d.windows, d.n, d.heads * d.dim).into()))
    }

    fn bwd(
        &self,
        qkv: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let d = Dims::new(qkv.shape(), bias.shape())?;
        let grad = grad.contiguous()?;
        let guards = [qkv, bias, &grad].map(|t| t.storage_and_layout());
        let [q, b, g] = guards.each_ref().map(|(s, l)| match &**s {
            Storage::Cpu(s) => slice(s, l),
            _ => candle_core::bail!("window attention: not on the CPU"),
        });
        let (gqkv, gbias) = self.backward(q?, b?, g?, &d);
        Ok((
            Some(Tensor::from_vec(gqkv, qkv.shape(), &Device::Cpu)?),
            Some(Tensor::from_vec(gbias, bias.shape(), &Device::Cpu)?),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::max_gradient_error;
    use candle_core::{DType, Var};

    fn wave(shape: (usize, usize, usize), f: f64) -> Var {
        let n = shape.0 * shape.1 * shape.2;
        let v: Vec<f32> = (0..n).map(|i| (i as f64 * f).sin() as f32).collect();
        Var::from_vec(v, shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn equals_plain_attention_and_finite_differences() -> Result<()> {
        let (n, heads, dim) = (4, 2, 3);
        let (qkv, bias) = (wave((4, n, 3 * heads * dim), 0.7), wave((heads, n, n), 1.3));
        let regions: Regions = vec![0, 0, 0, 0, 0, 1, 0, 1].into();
        for regions in [None, Some(&regions)] {
            let y = window_attention(&qkv, &bias, regions)?;
            let wide = |t: &Var| t.to_dtype(DType::F64);
            let want = window_attention(&wide(&qkv)?, &wide(&bias)?, regions)?;
            let e = (y.to_dtype(DType::F64)? - want)?.abs()?.max_all()?.to_scalar::<f64>()?;
            assert!(e < 1e-6, "{e}");
            let vars = [qkv.clone(), bias.clone()];
            let e = max_gradient_error(&vars, 1e-2, 60, || window_attention(&qkv, &bias, regions))?;
            assert!(e < 1e-3, "{e}");
        }
        Ok(())
    }
}
