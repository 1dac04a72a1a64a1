//! Multi-scale deformable attention (Zhu et al. 2021, "Deformable DETR", eq. 3): each query and
//! head reads a few bilinearly interpolated points of every feature level and adds them up.
//!
//! On the CPU one fused op, forward and backward, over all levels, heads and points: nothing is
//! gathered into memory. The forward runs in parallel over queries, the backward over
//! (batch, head), each of which owns its part of the value's gradient, so neither needs atomics
//! and results do not depend on the number of threads. On a GPU the places and their masses are composed
//! of candle ops and one kernel each way does the rest; other types use a version composed throughout.
//!
//! Positions are relative to a level's full extent (0 and 1 are its outer edges, pixel centres
//! lie at (i + 0.5) / size); what lies outside reads as zero. f32 only on the fused path.

use super::cpu::{self, Out};
#[cfg(feature = "cuda")]
use super::kernels::{self, Memory};
use super::simd::{self, madd, wide};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// `(height, width)` of each feature level, finest first.
pub type LevelShapes = [(usize, usize)];

/// Attention at given places with given weights.
///
/// `value` is `[batch, Σ h·w, heads, dim]`, `locations` `[batch, q, heads, levels, points, 2]` as
/// (x, y), `weights` `[batch, q, heads, levels, points]`. Returns `[batch, q, heads · dim]`.
pub fn msda(value: &Tensor, shapes: &LevelShapes, locations: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let (b, _, heads, _) = value.dims4()?;
    let [lb, q, lh, levels, points, 2] = *locations.dims() else {
        candle_core::bail!("msda: locations have shape {:?}", locations.dims())
    };
    if (lb, lh, levels) != (b, heads, shapes.len()) || weights.dims() != [b, q, heads, levels, points] {
        candle_core::bail!(
            "msda: value {:?}, locations {:?}, weights {:?}, {} levels",
            value.dims(),
            locations.dims(),
            weights.dims(),
            shapes.len()
        )
    }
    check_tokens(value, shapes)?;
    if !super::fused(&[value, locations, weights]) || value.elem_count() == 0 {
        return composed(value, shapes, locations, weights);
    }
    let op = Msda { shapes: shapes.to_vec(), points, reference: None };
    value.contiguous()?.apply_op3(&locations.contiguous()?, &weights.contiguous()?, op)
}

/// Attention at reference points displaced by predicted offsets, with a softmax over all levels
/// and points of a head: the whole of Deformable DETR's attention between its linear layers.
///
/// `reference` is `[batch or 1, q, levels, 2 or 4]`: (x, y), whose offsets are in pixels of the
/// level, or (cx, cy, w, h), whose offsets are in units of half the box divided by `points`. It is
/// a constant: no gradient flows to it. `offsets` is `[batch, q, heads · levels · points · 2]`,
/// `logits` `[batch, q, heads · levels · points]`. Returns `[batch, q, heads · dim]`.
pub fn msda_at(
    value: &Tensor,
    shapes: &LevelShapes,
    reference: &Tensor,
    offsets: &Tensor,
    logits: &Tensor,
) -> Result<Tensor> {
    let (b, _, heads, _) = value.dims4()?;
    let (rb, q, levels, coords) = reference.dims4()?;
    let lb = logits.dim(0)?;
    let per_query = logits.dim(2)?;
    let points = per_query / (heads * levels).max(1);
    let consistent = lb == b
        && (rb == b || rb == 1)
        && levels == shapes.len()
        && (coords == 2 || coords == 4)
        && logits.dims() == [b, q, heads * levels * points]
        && offsets.dims() == [b, q, heads * levels * points * 2];
    if !consistent {
        candle_core::bail!(
            "msda: value {:?}, reference {:?}, offsets {:?}, logits {:?}, {} levels",
            value.dims(),
            reference.dims(),
            offsets.dims(),
            logits.dims(),
            shapes.len()
        )
    }
    check_tokens(value, shapes)?;
    let reference = reference.detach();
    if !cpu::fused(&[value, offsets, logits]) {
        let offsets = offsets.reshape((b, q, heads, levels, points, 2))?;
        let weights = super::softmax(&logits.reshape((b, q, heads, levels * points))?)?;
        let locations = locate(&reference, shapes, &offsets, points)?;
        return msda(value, shapes, &locations, &weights.reshape((b, q, heads, levels, points))?);
    }
    let reference =
        Reference { data: reference.flatten_all()?.to_vec1()?, batch: rb, coords, queries: q, levels };
    let op = Msda { shapes: shapes.to_vec(), points, reference: Some(reference) };
    value.contiguous()?.apply_op3(&offsets.contiguous()?, &logits.contiguous()?, op)
}

fn check_tokens(value: &Tensor, shapes: &LevelShapes) -> Result<()> {
    let tokens: usize = shapes.iter().map(|(h, w)| h * w).sum();
    if tokens != value.dim(1)? {
        candle_core::bail!("msda: levels {shapes:?} hold {tokens} tokens, the value {}", value.dim(1)?)
    }
    Ok(())
}

/// Reference points and offsets → sampling locations `[batch, q, heads, levels, points, 2]`.
fn locate(reference: &Tensor, shapes: &LevelShapes, offsets: &Tensor, points: usize) -> Result<Tensor> {
    let (b, q, levels, coords) = reference.dims4()?;
    let xy = reference.narrow(3, 0, 2)?.reshape((b, q, 1, levels, 1, 2))?;
    let scale = if coords == 4 {
        let wh = reference.narrow(3, 2, 2)?.reshape((b, q, 1, levels, 1, 2))?;
        (wh * (0.5 / points as f64))?
    } else {
        let s: Vec<f32> = shapes.iter().flat_map(|&(h, w)| [1. / w as f32, 1. / h as f32]).collect();
        Tensor::from_vec(s, (1, 1, 1, levels, 1, 2), reference.device())?.to_dtype(reference.dtype())?
    };
    offsets.broadcast_mul(&scale)?.broadcast_add(&xy)
}

/// The same by candle ops, for any device and float type.
fn composed(value: &Tensor, shapes: &LevelShapes, locations: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let (b, s, heads, dim) = value.dims4()?;
    let (q, points) = (locations.dim(1)?, locations.dim(4)?);
    let rows = b * heads;
    let dtype = value.dtype();
    let value = value.transpose(1, 2)?.reshape((rows, s, dim))?;
    let mut out: Option<Tensor> = None;
    let mut start = 0;
    for (level, &(h, w)) in shapes.iter().enumerate() {
        let at = |axis: usize, size: usize| -> Result<Tensor> {
            let p = locations.narrow(3, level, 1)?.narrow(5, axis, 1)?;
            let p = p.reshape((b, q, heads, points))?.transpose(1, 2)?.reshape((rows, q * points))?;
            (p * size as f64)? - 0.5
        };
        let (x, y) = (at(0, w)?, at(1, h)?);
        let (x0, y0) = (x.detach().floor()?, y.detach().floor()?);
        let (fx, fy) = ((&x - &x0)?, (&y - &y0)?);
        let a = weights.narrow(3, level, 1)?.reshape((b, q, heads, points))?;
        let a = a.transpose(1, 2)?.reshape((rows, q * points))?;
        for (dy, dx) in [(0., 0.), (0., 1.), (1., 0.), (1., 1.)] {
            let (xi, yi) = ((&x0 + dx)?, (&y0 + dy)?);
            let inside = [xi.ge(0.)?, xi.lt(w as f64)?, yi.ge(0.)?, yi.lt(h as f64)?]
                .iter()
                .map(|m| m.to_dtype(dtype))
                .reduce(|m, n| m? * n?)
                .expect("four conditions")?;
            let index = ((yi.clamp(0., (h - 1) as f64)? * w as f64)? + xi.clamp(0., (w - 1) as f64)?)?;
            let index = (index + start as f64)?.to_dtype(DType::U32)?;
            let wx = if dx == 1. { fx.clone() } else { (1. - &fx)? };
            let wy = if dy == 1. { fy.clone() } else { (1. - &fy)? };
            let weight = (((wx * wy)? * inside)? * &a)?;
            let index = index.unsqueeze(2)?.expand((rows, q * points, dim))?.contiguous()?;
            let part = value.gather(&index, 1)?.broadcast_mul(&weight.unsqueeze(2)?)?;
            let part = part.reshape((rows, q, points, dim))?.sum(2)?;
            out = Some(match out {
                Some(o) => (o + part)?,
                None => part,
            });
        }
        start += h * w;
    }
    match out {
        Some(o) => o.reshape((b, heads, q, dim))?.transpose(1, 2)?.reshape((b, q, heads * dim)),
        None => candle_core::bail!("msda: no feature levels"),
    }
}

struct Reference {
    data: Vec<f32>,
    batch: usize,
    coords: usize,
    queries: usize,
    levels: usize,
}

/// With a reference the second and third arguments are offsets and logits, without one they are
/// locations and weights.
struct Msda {
    shapes: Vec<(usize, usize)>,
    points: usize,
    reference: Option<Reference>,
}

/// One head of one query: where it reads and how much.
struct Samples {
    at: Vec<[f32; 2]>,
    weight: Vec<f32>,
    /// d location / d offset.
    scale: Vec<[f32; 2]>,
    /// `None` of what lies outside.
    corners: Vec<Option<Corners>>,
    /// Rows to be read: what each counts for, and where it begins.
    taps: Vec<(f32, usize)>,
}

/// A bilinear sample: token index of each corner (or `NONE`), and the fractions.
#[derive(Clone)]
struct Corners {
    token: [usize; 4],
    fx: f32,
    fy: f32,
}

const NONE: usize = usize::MAX;

/// Reads of a token from which on it pays to lay a head's tokens side by side.
const OFTEN: usize = 8;

impl Corners {
    /// Corners in the order (y0,x0), (y0,x1), (y1,x0), (y1,x1), the level's tokens beginning at `start`. `None`
    /// if all lie outside.
    #[inline(always)]
    fn new([x, y]: [f32; 2], (h, w): (usize, usize), start: usize) -> Option<Self> {
        let (x, y) = (x * w as f32 - 0.5, y * h as f32 - 0.5);
        // Written so that a NaN counts as outside.
        if !(x > -1. && y > -1. && x < w as f32 && y < h as f32) {
            return None;
        }
        let (x0, y0) = (x.floor(), y.floor());
        let (xi, yi) = (x0 as isize, y0 as isize);
        let token = |yi: isize, xi: isize| {
            let inside = yi >= 0 && xi >= 0 && yi < h as isize && xi < w as isize;
            if inside { start + yi as usize * w + xi as usize } else { NONE }
        };
        let token = [token(yi, xi), token(yi, xi + 1), token(yi + 1, xi), token(yi + 1, xi + 1)];
        Some(Self { token, fx: x - x0, fy: y - y0 })
    }

    #[inline(always)]
    fn weights(&self) -> [f32; 4] {
        let (x, y) = (self.fx, self.fy);
        [(1. - x) * (1. - y), x * (1. - y), (1. - x) * y, x * y]
    }
}

struct Dims {
    batch: usize,
    tokens: usize,
    heads: usize,
    dim: usize,
    queries: usize,
    /// Samples per head: levels · points.
    samples: usize,
}

impl Msda {
    fn dims(&self, value: &Shape, second: &Shape) -> Result<Dims> {
        let (batch, tokens, heads, dim) = value.dims4()?;
        Ok(Dims {
            batch,
            tokens,
            heads,
            dim,
            queries: second.dims()[1],
            samples: self.shapes.len() * self.points,
        })
    }

    #[cfg(feature = "cuda")]
    fn deformable(&self, value: &Shape, place: &Shape) -> Result<kernels::Deformable> {
        let d = self.dims(value, place)?;
        let (levels, points) = (self.shapes.len(), self.points);
        let (batch, tokens, queries) = (d.batch, d.tokens, d.queries);
        Ok(kernels::Deformable { batch, tokens, queries, heads: d.heads, dim: d.dim, levels, points })
    }

    /// Height, width and first token of each level, as the kernels want them.
    #[cfg(feature = "cuda")]
    fn levels(&self, device: &Device) -> Result<Tensor> {
        let mut first = 0;
        let mut rows = Vec::with_capacity(3 * self.shapes.len());
        for &(h, w) in &self.shapes {
            rows.extend([h as u32, w as u32, first]);
            first += (h * w) as u32;
        }
        super::gpu_ops::constant(&rows, device)
    }

    fn buffers(&self) -> Samples {
        let n = self.shapes.len() * self.points;
        Samples {
            at: vec![[0.; 2]; n],
            weight: vec![0.; n],
            scale: vec![[1.; 2]; n],
            corners: vec![None; n],
            taps: Vec::with_capacity(4 * n),
        }
    }

    /// Finds the corners of what [`Self::prepare`] has placed. Queries look all over the picture, so waiting for
    /// memory is most of the work: `soon` hears of each token before any is needed.
    #[inline(always)]
    fn find(&self, s: &mut Samples, soon: impl Fn(usize)) {
        let mut start = 0;
        for (level, &(h, w)) in self.shapes.iter().enumerate() {
            for j in level * self.points..(level + 1) * self.points {
                let corners = Corners::new(s.at[j], (h, w), start);
                if let Some(c) = &corners {
                    c.token.into_iter().filter(|t| *t != NONE).for_each(&soon);
                }
                s.corners[j] = corners;
            }
            start += h * w;
        }
    }

    /// `place` and `mass` are this head's part of the second and third argument.
    #[inline(always)]
    fn prepare(&self, b: usize, q: usize, place: &[f32], mass: &[f32], out: &mut Samples) {
        let Some(r) = &self.reference else {
            for (o, p) in out.at.iter_mut().zip(place.chunks_exact(2)) {
                *o = [p[0], p[1]];
            }
            out.weight.copy_from_slice(mass);
            return;
        };
        let b = if r.batch == 1 { 0 } else { b };
        for (level, &(h, w)) in self.shapes.iter().enumerate() {
            let p = &r.data[((b * r.queries + q) * r.levels + level) * r.coords..][..r.coords];
            let scale = match p {
                [_, _, bw, bh] => {
                    let k = 0.5 / self.points as f32;
                    [bw * k, bh * k]
                }
                _ => [1. / w as f32, 1. / h as f32],
            };
            for i in level * self.points..(level + 1) * self.points {
                out.scale[i] = scale;
                out.at[i] = [p[0] + place[2 * i] * scale[0], p[1] + place[2 * i + 1] * scale[1]];
            }
        }
        let max = mass.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
        let mut sum = 0.;
        for (o, x) in out.weight.iter_mut().zip(mass) {
            *o = (x - max).exp();
            sum += *o;
        }
        out.weight.iter_mut().for_each(|o| *o /= sum);
    }

    fn forward(&self, value: &[f32], place: &[f32], mass: &[f32], d: &Dims) -> Vec<f32> {
        let row = d.heads * d.dim;
        let mut out = vec![0f32; d.batch * d.queries * row];
        out.par_chunks_mut(row).with_min_len(8).enumerate().for_each_init(
            || self.buffers(),
            |s, (i, out)| {
                let value = &value[i / d.queries * d.tokens * row..][..d.tokens * row];
                let k = i * d.heads * d.samples;
                let n = d.heads * d.samples;
                query_forward(self, d, i, value, &place[2 * k..][..2 * n], &mass[k..][..n], s, out);
            },
        );
        out
    }

    /// Gradients of value, second and third argument, laid out as these are.
    fn backward(
        &self,
        value: &[f32],
        place: &[f32],
        mass: &[f32],
        grad: &[f32],
        d: &Dims,
    ) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let row = d.heads * d.dim;
        let mut gp = vec![0f32; d.batch * d.queries * d.heads * d.samples * 2];
        let mut gm = vec![0f32; d.batch * d.queries * d.heads * d.samples];
        let (of_place, of_mass) = (Out::new(&mut gp), Out::new(&mut gm));
        // One head's tokens side by side fit caches better than every eighth part of a row, by more than the copy
        // costs if they are read often.
        let together = 4 * d.queries * d.samples >= OFTEN * d.tokens;
        let plane = |wanted: bool| vec![0f32; if wanted { d.tokens * d.dim } else { 0 }];
        let of_head = d.queries * d.samples;
        let buffers =
            || (plane(together), plane(true), self.buffers(), vec![0f32; 2 * of_head], vec![0f32; of_head]);
        // Every head of every picture writes all of its tokens.
        let gv = cpu::written(d.batch * d.tokens * row, |of_value| {
            (0..d.batch * d.heads).into_par_iter().for_each_init(buffers, |(v, gv, s, gp, gm), i| {
                let (b, h) = (i / d.heads, i % d.heads);
                let picture = &value[b * d.tokens * row..][..d.tokens * row];
                for (v, row) in v.chunks_exact_mut(d.dim).zip(picture.chunks_exact(row)) {
                    v.copy_from_slice(&row[h * d.dim..][..d.dim]);
                }
                let (v, apart) = if together { (&v[..], d.dim) } else { (&picture[h * d.dim..], row) };
                gv.fill(0.);
                gp.fill(0.);
                gm.fill(0.);
                head_backward(self, d, (b, h), (v, apart), place, mass, grad, s, gv, gp, gm);
                let of_query = (2 * d.samples).max(2);
                for (q, (gp, gm)) in gp.chunks_exact(of_query).zip(gm.chunks_exact(of_query / 2)).enumerate()
                {
                    let k = ((b * d.queries + q) * d.heads + h) * d.samples;
                    // SAFETY: this head of this picture is worked on here alone.
                    unsafe {
                        of_place.put(2 * k, gp);
                        of_mass.put(k, gm);
                    }
                }
                for (t, gv) in gv.chunks_exact(d.dim).enumerate() {
                    // SAFETY: as above.
                    unsafe { of_value.put((b * d.tokens + t) * row + h * d.dim, gv) };
                }
            })
        });
        (gv, gp, gm)
    }
}

wide! {
    /// One query, the `i`-th of all pictures': `place` and `mass` are its part of the second and third argument, `value`
    /// is its picture's.
    fn query_forward(
        op: &Msda,
        d: &Dims,
        i: usize,
        value: &[f32],
        place: &[f32],
        mass: &[f32],
        s: &mut Samples,
        out: &mut [f32],
    ) {
        let row = d.heads * d.dim;
        for (h, out) in out.chunks_exact_mut(d.dim).enumerate() {
            let k = h * d.samples;
            op.prepare(i / d.queries, i % d.queries, &place[2 * k..][..2 * d.samples], &mass[k..][..d.samples], s);
            op.find(s, |t| cpu::prefetch(value, t * row + h * d.dim, d.dim));
            s.taps.clear();
            for (c, mass) in s.corners.iter().zip(&s.weight) {
                let Some(c) = c else { continue };
                for (t, w) in c.token.into_iter().zip(c.weights()) {
                    if t != NONE {
                        s.taps.push((w * mass, t * row + h * d.dim));
                    }
                }
            }
            simd::add_rows::<FMA>(s.taps.iter().copied(), value, out);
        }
    }
}

wide! {
    /// The gradients of one head of one picture: added to those of its values `gv`, token by token; of its part of the
    /// second and third argument `gp` and `gm`, query by query, where zeros are. Its tokens begin so far apart in `v`.
    fn head_backward(
        op: &Msda,
        d: &Dims,
        at: (usize, usize),
        v: (&[f32], usize),
        place: &[f32],
        mass: &[f32],
        grad: &[f32],
        s: &mut Samples,
        gv: &mut [f32],
        gp: &mut [f32],
        gm: &mut [f32],
    ) {
        let ((b, h), (v, apart), row) = (at, v, d.heads * d.dim);
        let of_query = (2 * d.samples).max(2);
        let parts = gp.chunks_exact_mut(of_query).zip(gm.chunks_exact_mut(of_query / 2));
        for (q, (gp, gm)) in (b * d.queries..).zip(parts) {
            let g = &grad[q * row + h * d.dim..][..d.dim];
            let k = (q * d.heads + h) * d.samples;
            op.prepare(b, q % d.queries, &place[2 * k..][..2 * d.samples], &mass[k..][..d.samples], s);
            op.find(s, |t| cpu::prefetch(v, t * apart, d.dim));
            for (level, &(lh, lw)) in op.shapes.iter().enumerate() {
                for j in level * op.points..(level + 1) * op.points {
                    let Some(c) = &s.corners[j] else { continue };
                    let (cw, a) = (c.weights(), s.weight[j]);
                    let mut dots = [0f32; 4];
                    for (k, t) in c.token.into_iter().enumerate() {
                        if t != NONE {
                            let to = &mut gv[t * d.dim..(t + 1) * d.dim];
                            to.iter_mut().zip(g).for_each(|(to, g)| *to = madd::<FMA>(a * cw[k], *g, *to));
                            dots[k] = simd::dot::<FMA>(&v[t * apart..t * apart + d.dim], g);
                        }
                    }
                    let [v00, v01, v10, v11] = dots;
                    gm[j] = dots.iter().zip(cw).map(|(v, w)| v * w).sum();
                    let gx = (v01 - v00) * (1. - c.fy) + (v11 - v10) * c.fy;
                    let gy = (v10 - v00) * (1. - c.fx) + (v11 - v01) * c.fx;
                    gp[2 * j] = a * gx * lw as f32 * s.scale[j][0];
                    gp[2 * j + 1] = a * gy * lh as f32 * s.scale[j][1];
                }
            }
            if op.reference.is_some() {
                let mean: f32 = gm.iter().zip(&s.weight).map(|(g, w)| g * w).sum();
                gm.iter_mut().zip(&s.weight).for_each(|(g, w)| *g = w * (*g - mean));
            }
        }
    }
}

fn slice<'a>(s: &'a CpuStorage, l: &Layout) -> Result<&'a [f32]> {
    match l.contiguous_offsets() {
        Some((from, to)) => Ok(&s.as_slice::<f32>()?[from..to]),
        None => candle_core::bail!("msda: an argument is not contiguous"),
    }
}

impl CustomOp3 for Msda {
    fn name(&self) -> &'static str {
        "msda"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let d = self.dims(l1.shape(), l2.shape())?;
        let out = self.forward(slice(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?, &d);
        Ok((CpuStorage::F32(out), (d.batch, d.queries, d.heads * d.dim).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let d = self.deformable(l1.shape(), l2.shape())?;
        let levels = self.levels(&Device::Cuda(s1.device.clone()))?;
        let (value, place, mass) = (Memory::cuda(s1, l1)?, Memory::cuda(s2, l2)?, Memory::cuda(s3, l3)?);
        kernels::msda(value, place, mass, &levels, d)?.cuda((d.batch, d.queries, d.heads * d.dim))
    }

    fn bwd(
        &self,
        value: &Tensor,
        place: &Tensor,
        mass: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<super::Grads3> {
        #[cfg(feature = "cuda")]
        if value.device().is_cuda() {
            let d = self.deformable(value.shape(), place.shape())?;
            let levels = self.levels(value.device())?;
            let (dv, dp, dm) =
                kernels::msda_back([value, place, mass], &levels, grad, d, super::gpu::exact_sums())?;
            return Ok((Some(dv), Some(dp), Some(dm)));
        }
        let d = self.dims(value.shape(), place.shape())?;
        let grad = grad.contiguous()?;
        let (gv, gp, gm) = {
            let tensors = [value, place, mass, &grad];
            let guards = tensors.map(|t| t.storage_and_layout());
            let slices = guards.each_ref().map(|(s, l)| match &**s {
                candle_core::Storage::Cpu(s) => slice(s, l),
                _ => candle_core::bail!("msda: not on the CPU"),
            });
            let [v, p, m, g] = slices;
            self.backward(v?, p?, m?, g?, &d)
        };
        let tensor = |x: Vec<f32>, like: &Tensor| Tensor::from_vec(x, like.shape(), &Device::Cpu).map(Some);
        Ok((tensor(gv, value)?, tensor(gp, place)?, tensor(gm, mass)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::max_gradient_error;
    use candle_core::Var;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn uniform(shape: &[usize], lo: f32, hi: f32, rng: &mut ChaCha8Rng) -> Var {
        let n = shape.iter().product();
        let v: Vec<f32> = (0..n).map(|_| rng.random_range(lo..hi)).collect();
        Var::from_vec(v, shape, &Device::Cpu).unwrap()
    }

    const SHAPES: [(usize, usize); 2] = [(5, 4), (2, 3)];

    fn difference(a: &Tensor, b: &Tensor) -> Result<f32> {
        (a - b)?.abs()?.max_all()?.to_scalar()
    }

    #[test]
    fn gradients_match_finite_differences() -> Result<()> {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let value = uniform(&[2, 26, 2, 9], -1., 1., &mut rng);
        let weights = uniform(&[2, 3, 2, 2, 2], 0., 1., &mut rng);
        // Bilinear interpolation has kinks at pixel centres: keep well inside a cell.
        let cell: Vec<f32> = (0..2 * 3 * 2 * 2 * 2)
            .flat_map(|i| {
                let (h, w) = SHAPES[i / 2 % 2];
                let mut at = |n: usize| {
                    (rng.random_range(-1..n as i32) as f32 + 0.5 + rng.random_range(0.2..0.8)) / n as f32
                };
                [at(w), at(h)]
            })
            .collect();
        let locations = Var::from_vec(cell, (2, 3, 2, 2, 2, 2), &Device::Cpu)?;
        let vars = [value.clone(), locations.clone(), weights.clone()];
        let e = max_gradient_error(&vars, 1e-2, 200, || msda(&value, &SHAPES, &locations, &weights))?;
        assert!(e < 1e-3, "{e}");
        Ok(())
    }

    #[test]
    fn fused_offsets_equal_the_composed_version_in_values_and_gradients() -> Result<()> {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let (b, q, heads, points) = (2, 7, 2, 3);
        let n = heads * SHAPES.len() * points;
        let value = uniform(&[b, 26, heads, 8], -1., 1., &mut rng);
        let offsets = uniform(&[b, q, n * 2], -2., 2., &mut rng);
        let logits = uniform(&[b, q, n], -2., 2., &mut rng);
        for shape in [[b, q, 2, 4], [1, q, 2, 2]] {
            let reference = uniform(&shape, 0., 1., &mut rng);
            let y = msda_at(&value, &SHAPES, &reference, &offsets, &logits)?;
            let o = offsets.reshape((b, q, heads, 2, points, 2))?;
            let at = locate(&reference.detach(), &SHAPES, &o, points)?;
            let w = crate::nn::softmax(&logits.reshape((b, q, heads, 2 * points))?)?;
            let z = composed(&value, &SHAPES, &at, &w.reshape((b, q, heads, 2, points))?)?;
            assert!(difference(&y, &z)? < 1e-5);
            let (gy, gz) = (y.sqr()?.sum_all()?.backward()?, z.sqr()?.sum_all()?.backward()?);
            for v in [&value, &offsets, &logits] {
                assert!(difference(gy.get(v).unwrap(), gz.get(v).unwrap())? < 1e-4);
            }
            assert!(gy.get(&reference).is_none());
        }
        Ok(())
    }

    #[test]
    fn places_outside_and_nan_read_as_zero() -> Result<()> {
        let value = Tensor::ones((1, 26, 1, 8), DType::F32, &Device::Cpu)?;
        let at =
            Tensor::from_vec(vec![-9f32, 0.5, f32::NAN, 0.5, 0.5, 7., f32::INFINITY, 0.5], 8, &Device::Cpu)?;
        let w = Tensor::ones((1, 1, 1, 2, 2), DType::F32, &Device::Cpu)?;
        let y = msda(&value, &SHAPES, &at.reshape((1, 1, 1, 2, 2, 2))?, &w)?;
        assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [0.; 8]);
        Ok(())
    }
}
