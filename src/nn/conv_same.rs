//! Stride-1 convolution that keeps the size by repeating the border, fused for the CPU.
//!
//! candle's `conv2d` has a backward that is quadratic in the picture's size; dense-prediction
//! heads are nothing but such layers. Here each image is cut into strips of rows; a strip is
//! unfolded into a small buffer and multiplied, so that the unfolded input is never stored. An
//! optional ReLU on the input is folded in, which saves its own passes over memory.
//! f32, square odd kernels.

use super::cpu::{self, Mat, Out, Place, Product};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;

/// Pixels that one strip aims for: its unfolded input then stays in the second-level cache.
const STRIP: usize = 512;

#[derive(Clone, Copy)]
struct Geometry {
    cin: usize,
    cout: usize,
    h: usize,
    w: usize,
    k: usize,
}

impl Geometry {
    fn of(x: &[usize], weight: &[usize], bias: &[usize]) -> Result<Self> {
        match (x, weight, bias) {
            (&[_, cin, h, w], &[cout, wc, k, k2], &[bc])
                if wc == cin && k == k2 && k % 2 == 1 && bc == cout =>
            {
                Ok(Self { cin, cout, h, w, k })
            }
            _ => candle_core::bail!("conv_same: input {x:?}, weight {weight:?} and bias {bias:?} do not fit"),
        }
    }

    /// Rows of the unfolded input: one per input channel and kernel position.
    fn taps(&self) -> usize {
        self.cin * self.k * self.k
    }

    fn rows(&self) -> usize {
        (STRIP / self.w).clamp(1, self.h)
    }

    /// Calls `f(tap, row of the strip, source row of the plane, column offset)` for each line.
    fn lines(&self, y0: usize, rows: usize, mut f: impl FnMut(usize, usize, usize, isize)) {
        let r = (self.k / 2) as isize;
        for c in 0..self.cin {
            for ky in 0..self.k {
                for kx in 0..self.k {
                    let tap = (c * self.k + ky) * self.k + kx;
                    for y in 0..rows {
                        let sy = ((y0 + y) as isize + ky as isize - r).clamp(0, self.h as isize - 1);
                        f(tap, y, c * self.h + sy as usize, kx as isize - r);
                    }
                }
            }
        }
    }

    /// Fills `col`, `[taps, rows · w]`, for rows `y0 ..` of the image `x`.
    fn unfold(&self, x: &[f32], y0: usize, rows: usize, relu: bool, col: &mut [f32]) {
        let (w, n) = (self.w, rows * self.w);
        self.lines(y0, rows, |tap, y, line, dx| {
            let src = &x[line * w..(line + 1) * w];
            let dst = &mut col[tap * n + y * w..tap * n + (y + 1) * w];
            let (lo, hi) = span(dx, w);
            dst[..lo].fill(src[0]);
            dst[hi..].fill(src[w - 1]);
            if lo < hi {
                let from = (lo as isize + dx) as usize;
                dst[lo..hi].copy_from_slice(&src[from..from + hi - lo]);
            }
            if relu {
                dst.iter_mut().for_each(|v| *v = v.max(0.));
            }
        });
    }

    /// The transpose of [`Self::unfold`]: adds `col` back onto the image's gradient.
    fn fold(&self, col: &[f32], y0: usize, rows: usize, dx_image: &mut [f32]) {
        let (w, n) = (self.w, rows * self.w);
        self.lines(y0, rows, |tap, y, line, dx| {
            let dst = &mut dx_image[line * w..(line + 1) * w];
            let src = &col[tap * n + y * w..tap * n + (y + 1) * w];
            let (lo, hi) = span(dx, w);
            dst[0] += src[..lo].iter().sum::<f32>();
            dst[w - 1] += src[hi..].iter().sum::<f32>();
            if lo < hi {
                let from = (lo as isize + dx) as usize;
                for (d, s) in dst[from..from + hi - lo].iter_mut().zip(&src[lo..hi]) {
                    *d += s;
                }
            }
        });
    }
}

/// Columns whose source, `dx` to the right, lies inside a row of `w`.
fn span(dx: isize, w: usize) -> (usize, usize) {
    let lo = (-dx).max(0) as usize;
    let hi = (w as isize - dx.max(0)).max(0) as usize;
    (lo.min(w), hi.clamp(lo.min(w), w))
}

/// `c[m, n] (+)= a · b`; each operand is a slice with its row and column strides.
fn gemm(
    sizes: (usize, usize, usize),
    c: (&mut [f32], usize),
    add: bool,
    a: (&[f32], usize, usize),
    b: (&[f32], usize, usize),
) {
    let (m, n, k) = sizes;
    let last = |rows: usize, cols: usize, rs: usize, cs: usize| (rows - 1) * rs + (cols - 1) * cs;
    assert!(m > 0 && n > 0 && k > 0);
    assert!(c.1 >= n && last(m, n, c.1, 1) < c.0.len());
    assert!(last(m, k, a.1, a.2) < a.0.len() && last(k, n, b.1, b.2) < b.0.len());
    let [a, b] = [a, b].map(|(data, rows_apart, cols_apart)| Mat { data, rows_apart, cols_apart });
    let to = Place::new(Out::new(c.0), 0, c.1).adding(add);
    // SAFETY: the assertions keep every element that the kernel touches inside its slice, and
    // `c` is borrowed mutably, so it overlaps neither operand; its rows do not overlap either.
    unsafe { cpu::f32_gemm(Product::new(sizes, a, b), to) }
}

struct ConvSame {
    relu: bool,
}

fn slice<'a>(s: &'a CpuStorage, l: &Layout) -> Result<&'a [f32]> {
    match l.contiguous_offsets() {
        Some((a, b)) => Ok(&s.as_slice::<f32>()?[a..b]),
        None => candle_core::bail!("conv_same: inputs must be contiguous"),
    }
}

fn host<'a>(s: &'a Storage, l: &Layout) -> Result<&'a [f32]> {
    match s {
        Storage::Cpu(s) => slice(s, l),
        _ => candle_core::bail!("conv_same: only on the CPU"),
    }
}

impl ConvSame {
    fn forward(&self, g: Geometry, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
        let (plane, rows, t) = (g.h * g.w, g.rows(), g.taps());
        let (images, strips) = (x.len() / (g.cin * plane), g.h.div_ceil(rows));
        let mut y = vec![0f32; images * g.cout * plane];
        let out = Out::new(&mut y);
        (0..images * strips).into_par_iter().for_each_init(
            || vec![0f32; t * rows * g.w],
            |col, task| {
                let (image, y0) = (task / strips, task % strips * rows);
                let n = rows.min(g.h - y0) * g.w;
                g.unfold(&x[image * g.cin * plane..][..g.cin * plane], y0, n / g.w, self.relu, col);
                let at = image * g.cout * plane + y0 * g.w;
                let (weight, col) = (Mat::rows(weight, t), Mat::rows(&col[..t * n], n));
                let product = Product::new((g.cout, n, t), weight, col);
                // SAFETY: these lines of the picture's planes are this task's alone; the matrices are as long as is
                // said, the weight by `Geometry::of`.
                unsafe {
                    for (c, b) in bias.iter().enumerate() {
                        out.part(at + c * plane, n).fill(*b);
                    }
                    cpu::f32_gemm(product, Place::new(out, at, plane).adding(true));
                }
            },
        );
        y
    }

    /// Gradients of input, weight and bias.
    fn backward(
        &self,
        g: Geometry,
        x: &[f32],
        weight: &[f32],
        dy: &[f32],
        want_dx: bool,
    ) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let (plane, rows, t) = (g.h * g.w, g.rows(), g.taps());
        let mut dx = vec![0f32; if want_dx { x.len() } else { 0 }];
        let images = x.len() / (g.cin * plane);
        // One weight gradient per image: the sum below does not depend on how the threads ran.
        let one = |i: usize, dx: &mut [f32]| {
            let x = &x[i * g.cin * plane..(i + 1) * g.cin * plane];
            let dy = &dy[i * g.cout * plane..(i + 1) * g.cout * plane];
            let mut dw = vec![0f32; g.cout * t];
            let db: Vec<f32> = dy.chunks(plane).map(|c| c.iter().sum()).collect();
            let mut col = vec![0f32; t * rows * g.w];
            for y0 in (0..g.h).step_by(rows) {
                let n = rows.min(g.h - y0) * g.w;
                g.unfold(x, y0, n / g.w, self.relu, &mut col);
                let dy = &dy[y0 * g.w..];
                gemm((g.cout, t, n), (&mut dw, t), true, (dy, plane, 1), (&col, 1, n));
                if want_dx {
                    gemm((t, n, g.cout), (&mut col, n), false, (weight, 1, t), (dy, plane, 1));
                    g.fold(&col, y0, n / g.w, dx);
                }
            }
            if self.relu && want_dx {
                for (d, x) in dx.iter_mut().zip(x) {
                    if *x <= 0. {
                        *d = 0.;
                    }
                }
            }
            (dw, db)
        };
        let parts: Vec<_> = if want_dx {
            dx.par_chunks_mut(g.cin * plane).enumerate().map(|(i, dx)| one(i, dx)).collect()
        } else {
            (0..images).into_par_iter().map(|i| one(i, &mut [])).collect()
        };
        let (mut dw, mut db) = (vec![0f32; g.cout * t], vec![0f32; g.cout]);
        for (w, b) in parts {
            dw.iter_mut().zip(w).for_each(|(s, v)| *s += v);
            db.iter_mut().zip(b).for_each(|(s, v)| *s += v);
        }
        (dx, dw, db)
    }
}

impl CustomOp3 for ConvSame {
    fn name(&self) -> &'static str {
        "conv-same"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let g = Geometry::of(xl.dims(), wl.dims(), bl.dims())?;
        let y = self.forward(g, slice(x, xl)?, slice(w, wl)?, slice(b, bl)?);
        Ok((CpuStorage::F32(y), (xl.dims()[0], g.cout, g.h, g.w).into()))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, b: &Tensor, _: &Tensor, grad: &Tensor) -> Result<super::Grads3> {
        let g = Geometry::of(x.dims(), w.dims(), b.dims())?;
        let grad = grad.contiguous()?;
        let want_dx = x.track_op();
        let (dx, dw, db) = {
            let (xs, ws, gs) = (x.storage_and_layout(), w.storage_and_layout(), grad.storage_and_layout());
            self.backward(g, host(&xs.0, xs.1)?, host(&ws.0, ws.1)?, host(&gs.0, gs.1)?, want_dx)
        };
        let dx = if want_dx { Some(Tensor::from_vec(dx, x.shape(), x.device())?) } else { None };
        let dw = Tensor::from_vec(dw, w.shape(), w.device())?;
        Ok((dx, Some(dw), Some(Tensor::from_vec(db, b.shape(), b.device())?)))
    }
}

/// `x [batch, in, h, w]`, `weight [out, in, k, k]`, `bias [out]` → `[batch, out, h, w]`: the
/// convolution of `x`, or of `relu(x)`, with the border repeated; plus `plus`, if any, of the result's shape.
pub fn conv_same(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    relu: bool,
    plus: Option<&Tensor>,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    {
        let p = weight.dim(2)? / 2;
        let window = super::kernels::Window { kernel: 2 * p + 1, stride: 1, padding: p, replicate: true };
        if let Some(y) = super::gpu_ops::conv2d(x, weight, Some(bias), window, relu, plus)? {
            return Ok(y);
        }
    }
    let y = convolved(x, weight, bias, relu)?;
    match plus {
        Some(plus) => plus + y,
        None => Ok(y),
    }
}

fn convolved(x: &Tensor, weight: &Tensor, bias: &Tensor, relu: bool) -> Result<Tensor> {
    if !cpu::fused(&[x, weight, bias]) {
        let p = weight.dim(2)? / 2;
        let x = if relu { x.relu()? } else { x.clone() };
        let x = x.pad_with_same(2, p, p)?.pad_with_same(3, p, p)?;
        return x.conv2d(weight, 0, 1, 1, 1)?.broadcast_add(&bias.reshape((1, (), 1, 1))?);
    }
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, ConvSame { relu })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::max_gradient_error;
    use candle_core::{Device, Var};

    fn wave(shape: impl Into<Shape>, step: f32) -> Result<Var> {
        let shape = shape.into();
        // Bounded away from 0, where ReLU has no derivative.
        let v = |i: usize| {
            let v = (i as f32 * step).sin();
            v + 0.05 * v.signum()
        };
        Var::from_vec((0..shape.elem_count()).map(v).collect::<Vec<f32>>(), shape, &Device::Cpu)
    }

    #[test]
    fn equals_candles_convolution_of_the_padded_input() -> Result<()> {
        // Wide enough that a strip is one row, and high enough for several strips.
        for (h, w, k) in [(40, 31, 3), (3, 700, 3), (1, 1, 3), (2, 1, 5), (9, 8, 1)] {
            let (x, weight, bias) = (wave((2, 3, h, w), 0.7)?, wave((4, 3, k, k), 1.3)?, wave(4, 2.1)?);
            for relu in [false, true] {
                let got = conv_same(&x, &weight, &bias, relu, None)?;
                let p = k / 2;
                let padded = if relu { x.relu()? } else { x.as_tensor().clone() };
                let padded = padded.pad_with_same(2, p, p)?.pad_with_same(3, p, p)?;
                let want = padded.conv2d(&weight, 0, 1, 1, 1)?.broadcast_add(&bias.reshape((1, 4, 1, 1))?)?;
                let e = (got - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(e < 1e-5, "{h}×{w}, kernel {k}, relu {relu}: {e}");
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_are_those_of_finite_differences() -> Result<()> {
        for (h, w, k) in [(6, 5, 3), (2, 300, 3), (3, 4, 1), (1, 1, 3)] {
            let vars = [wave((2, 3, h, w), 0.7)?, wave((4, 3, k, k), 1.3)?, wave(4, 2.1)?];
            for relu in [false, true] {
                let e = max_gradient_error(&vars, 1e-2, 60, || {
                    let x = vars[0].affine(1., 0.)?;
                    conv_same(&x, &vars[1], &vars[2], relu, None)
                })?;
                assert!(e < 1e-3, "{h}×{w}, kernel {k}, relu {relu}: {e}");
            }
        }
        Ok(())
    }
}
