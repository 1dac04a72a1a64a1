//! Differentiable separable resizing of `[.., h, w]` tensors, with PyTorch's conventions.
//!
//! Every filter here is linear, so one axis is a sparse matrix: an output sample is a weighted
//! sum of a few input samples ([`Taps`]). Forward applies the matrices, backward their
//! transposes. f32 on the CPU; 8-bit resizing as PIL does it is another matter and lives with
//! the preprocessing.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// The sample at `floor(i · in / out)`.
    Nearest,
    /// Bilinear, `align_corners = false`; `antialias` widens the triangle when shrinking.
    Bilinear { antialias: bool },
    /// Bilinear with the outermost samples on each other (`align_corners = true`).
    BilinearCorners,
    /// Bicubic, `align_corners = false`: Keys' kernel with a = −0.75, or −0.5 with antialias.
    Bicubic { antialias: bool },
}

/// One axis of a resize: a sparse `[out, in]` matrix in row-compressed form.
#[derive(Clone, Debug)]
pub struct Taps {
    pub(super) inp: usize,
    starts: Vec<usize>,
    index: Vec<usize>,
    weight: Vec<f32>,
}

impl Taps {
    /// `inp` samples to `out` samples.
    pub fn new(filter: Filter, inp: usize, out: usize) -> Result<Self> {
        Self::with_step(filter, inp, out, inp as f64 / out as f64)
    }

    /// As [`Taps::new`], but neighbouring output samples are `step` input samples apart, whatever
    /// the sizes: PyTorch's `interpolate(scale_factor = 1 / step)`.
    pub fn with_step(filter: Filter, inp: usize, out: usize, step: f64) -> Result<Self> {
        if inp == 0 || out == 0 || !(step > 0. && step.is_finite()) {
            candle_core::bail!("resize: cannot map {inp} samples to {out} with step {step}")
        }
        let rows = (0..out).map(|i| match filter {
            Filter::Nearest => vec![((i as f32 * step as f32) as usize, 1.)],
            Filter::Bilinear { antialias: false } => linear_at((step * (i as f64 + 0.5) - 0.5).max(0.), inp),
            Filter::BilinearCorners => {
                let at = if out > 1 { i as f64 * (inp - 1) as f64 / (out - 1) as f64 } else { 0. };
                linear_at(at, inp)
            }
            Filter::Bicubic { antialias: false } => {
                let at = step * (i as f64 + 0.5) - 0.5;
                let first = at.floor();
                (-1..3)
                    .map(|d| (first as i64 + d, cubic(at - first - d as f64, -0.75)))
                    .map(|(j, w)| (j.max(0) as usize, w))
                    .collect()
            }
            Filter::Bilinear { antialias: true } => wide(i, inp, step, 1., |x| (1. - x.abs()).max(0.)),
            Filter::Bicubic { antialias: true } => wide(i, inp, step, 2., |x| cubic(x, -0.5)),
        });
        let mut taps = Self { inp, starts: vec![0], index: Vec::new(), weight: Vec::new() };
        for row in rows {
            for (j, w) in row {
                taps.index.push(j.min(inp - 1));
                taps.weight.push(w as f32);
            }
            taps.starts.push(taps.index.len());
        }
        Ok(taps)
    }

    pub(super) fn out(&self) -> usize {
        self.starts.len() - 1
    }

    fn row(&self, i: usize) -> impl Iterator<Item = (usize, f32)> {
        let r = self.starts[i]..self.starts[i + 1];
        self.index[r.clone()].iter().copied().zip(self.weight[r].iter().copied())
    }

    /// As a dense matrix `[out, in]`, of the type and where `like` is.
    fn matrix(&self, like: &Tensor) -> Result<Tensor> {
        let (out, mut m) = (self.out(), vec![0f32; self.out() * self.inp]);
        for (i, row) in m.chunks_mut(self.inp).enumerate() {
            self.row(i).for_each(|(j, w)| row[j] += w);
        }
        Tensor::from_vec(m, (out, self.inp), like.device())?.to_dtype(like.dtype())
    }

    /// As the GPU's kernel reads it.
    #[cfg(any(feature = "cuda", test))]
    pub(super) fn on(&self, device: &candle_core::Device) -> Result<TapsThere> {
        let numbers = |v: &[usize]| v.iter().map(|n| *n as u32).collect::<Vec<u32>>();
        let bits: Vec<u32> = self.weight.iter().map(|w| w.to_bits()).collect();
        let there = |v: &[u32]| {
            #[cfg(feature = "cuda")]
            if device.is_cuda() {
                return super::gpu_ops::constant(v, device);
            }
            Tensor::new(v, device)
        };
        Ok(TapsThere {
            starts: there(&numbers(&self.starts))?,
            index: there(&numbers(&self.index))?,
            weight: there(&bits)?,
        })
    }

    fn transposed(&self) -> Self {
        let mut rows = vec![Vec::new(); self.inp];
        for i in 0..self.out() {
            for (j, w) in self.row(i) {
                rows[j].push((i, w));
            }
        }
        let mut t = Self { inp: self.out(), starts: vec![0], index: Vec::new(), weight: Vec::new() };
        for row in rows {
            for (i, w) in row {
                t.index.push(i);
                t.weight.push(w);
            }
            t.starts.push(t.index.len());
        }
        t
    }
}

fn linear_at(at: f64, inp: usize) -> Vec<(usize, f64)> {
    let first = at.floor();
    let frac = at - first;
    let j = (first as usize).min(inp - 1);
    vec![(j, 1. - frac), ((j + 1).min(inp - 1), frac)]
}

fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    if x <= 1. {
        ((a + 2.) * x - (a + 3.)) * x * x + 1.
    } else if x < 2. {
        ((a * x - 5. * a) * x + 8. * a) * x - 4. * a
    } else {
        0.
    }
}

/// The antialiased filters: the kernel is stretched by `step` when shrinking, cut at the borders
/// and normalised.
fn wide(i: usize, inp: usize, step: f64, radius: f64, kernel: impl Fn(f64) -> f64) -> Vec<(usize, f64)> {
    let stretch = step.max(1.);
    let (centre, support) = (step * (i as f64 + 0.5), radius * stretch);
    let lo = (centre - support + 0.5).max(0.) as usize;
    let hi = ((centre + support + 0.5) as usize).min(inp);
    let raw: Vec<f64> = (lo..hi).map(|j| kernel((j as f64 - centre + 0.5) / stretch)).collect();
    let total: f64 = raw.iter().sum();
    raw.iter().enumerate().map(|(k, w)| (lo + k, w / total)).collect()
}

/// [`Taps`] where a kernel reads them.
#[cfg(any(feature = "cuda", test))]
pub(super) struct TapsThere {
    starts: Tensor,
    index: Tensor,
    weight: Tensor,
}

#[cfg(any(feature = "cuda", test))]
impl TapsThere {
    pub fn side(&self, (from, to): (usize, usize)) -> super::kernels::Side<'_> {
        super::kernels::Side { starts: &self.starts, index: &self.index, weight: &self.weight, from, to }
    }
}

struct Resize {
    rows: Arc<Taps>,
    cols: Arc<Taps>,
}

impl CustomOp1 for Resize {
    fn name(&self) -> &'static str {
        "resize"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((from, to)) = layout.contiguous_offsets() else {
            candle_core::bail!("resize: the input must be contiguous")
        };
        let x = &storage.as_slice::<f32>()?[from..to];
        let (h, w) = (self.rows.inp, self.cols.inp);
        let (oh, ow) = (self.rows.out(), self.cols.out());
        let mut dims = layout.dims().to_vec();
        let r = dims.len();
        if r < 2 || dims[r - 2] != h || dims[r - 1] != w {
            candle_core::bail!("resize: expected [.., {h}, {w}], got {dims:?}")
        }
        (dims[r - 2], dims[r - 1]) = (oh, ow);
        let planes = x.len() / (h * w);
        let mut y = vec![0f32; planes * oh * ow];
        y.par_chunks_mut(oh * ow).zip(x.par_chunks(h * w)).for_each_init(
            || vec![0f32; w],
            |line, (y, x)| {
                for (i, out) in y.chunks_mut(ow).enumerate() {
                    line.fill(0.);
                    for (j, a) in self.rows.row(i) {
                        for (l, v) in line.iter_mut().zip(&x[j * w..(j + 1) * w]) {
                            *l += a * v;
                        }
                    }
                    for (k, o) in out.iter_mut().enumerate() {
                        *o = self.cols.row(k).map(|(j, a)| a * line[j]).sum();
                    }
                }
            },
        );
        Ok((CpuStorage::F32(y), dims.into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let back = Resize { rows: self.rows.transposed().into(), cols: self.cols.transposed().into() };
        Ok(Some(grad.contiguous()?.apply_op1(back)?))
    }
}

/// Applies one matrix per axis to `[.., h, w]`.
pub fn resize_taps(x: &Tensor, rows: Taps, cols: Taps) -> Result<Tensor> {
    if !super::cpu::fused(&[x]) {
        // Two products with mostly empty matrices, which have gradients.
        let (lead, hw) = x.dims().split_at(x.rank().saturating_sub(2));
        if hw != [rows.inp, cols.inp] {
            candle_core::bail!("resize: expected [.., {}, {}], got {:?}", rows.inp, cols.inp, x.shape())
        }
        let planes = lead.iter().product::<usize>();
        #[cfg(feature = "cuda")]
        if let Some(y) = super::gpu_ops::resize(x, planes, &rows, &cols)? {
            return y.reshape([lead, &[rows.out(), cols.out()]].concat());
        }
        let x = x.reshape((planes, hw[0], hw[1]))?;
        let right = x.reshape((planes * hw[0], hw[1]))?.matmul(&cols.matrix(&x)?.t()?)?;
        let y = rows.matrix(&x)?.broadcast_matmul(&right.reshape((planes, hw[0], cols.out()))?)?;
        return y.reshape([lead, &[rows.out(), cols.out()]].concat());
    }
    x.contiguous()?.apply_op1(Resize { rows: rows.into(), cols: cols.into() })
}

/// `[.., h, w]` → `[.., height, width]`.
pub fn resize(x: &Tensor, height: usize, width: usize, filter: Filter) -> Result<Tensor> {
    let d = x.dims();
    if d.len() < 2 {
        candle_core::bail!("resize: expected [.., h, w], got {d:?}")
    }
    let (h, w) = (d[d.len() - 2], d[d.len() - 1]);
    resize_taps(x, Taps::new(filter, h, height)?, Taps::new(filter, w, width)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::max_gradient_error;
    use candle_core::{Device, Var};

    const ALL: [Filter; 6] = [
        Filter::Nearest,
        Filter::Bilinear { antialias: false },
        Filter::Bilinear { antialias: true },
        Filter::BilinearCorners,
        Filter::Bicubic { antialias: false },
        Filter::Bicubic { antialias: true },
    ];

    #[test]
    fn gradients_are_those_of_finite_differences() -> Result<()> {
        let x: Vec<f32> = (0..2 * 5 * 7).map(|i| (i as f32 * 0.37).sin()).collect();
        let x = Var::from_vec(x, (2, 5, 7), &Device::Cpu)?;
        for filter in ALL {
            for (h, w) in [(11, 9), (3, 4), (5, 14)] {
                let e = max_gradient_error(std::slice::from_ref(&x), 1e-2, 70, || resize(&x, h, w, filter))?;
                assert!(e < 2e-4, "{filter:?} {h}×{w}: {e}");
            }
        }
        Ok(())
    }

    #[test]
    fn constants_stay_and_the_same_size_is_the_identity() -> Result<()> {
        let x = Tensor::arange(0f32, 35., &Device::Cpu)?.reshape((5, 7))?;
        for filter in ALL {
            let ones = resize(&x.ones_like()?, 13, 3, filter)?.flatten_all()?.to_vec1::<f32>()?;
            assert!(ones.iter().all(|v| (v - 1.).abs() < 1e-5), "{filter:?}");
            let same = (resize(&x, 5, 7, filter)? - &x)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(same < 1e-4, "{filter:?}: {same}");
        }
        Ok(())
    }

    /// Values of `torch.nn.functional.interpolate` on `0..6`.
    #[test]
    fn known_values() -> Result<()> {
        let x = Tensor::arange(0f32, 6., &Device::Cpu)?.reshape((1, 6))?;
        let check = |filter, want: &[f32]| -> Result<()> {
            let y = resize(&x, 1, want.len(), filter)?.flatten_all()?.to_vec1::<f32>()?;
            assert!(y.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-4), "{filter:?}: {y:?}");
            Ok(())
        };
        check(Filter::Nearest, &[0., 1., 3., 4.])?;
        check(Filter::Bilinear { antialias: false }, &[0.25, 1.75, 3.25, 4.75])?;
        check(Filter::BilinearCorners, &[0., 5. / 3., 10. / 3., 5.])
    }
}
