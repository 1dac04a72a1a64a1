//! Four channels become the four pixels of a square twice as fine (Shi et al. 2016, sub-pixel convolution).
//!
//! Composed of candle's reshapes it is a copy by strides on one thread, twice with its gradient.

use super::cpu;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

/// `[batch, 4 · c, h, w]` → `[batch, c, 2h, 2w]`.
pub fn pixel_shuffle(x: &Tensor) -> Result<Tensor> {
    let (b, c4, h, w) = x.dims4()?;
    if !c4.is_multiple_of(4) {
        candle_core::bail!("pixel_shuffle: {c4} channels are no multiple of four")
    }
    if cpu::fused(&[x]) && x.elem_count() > 0 {
        return x.contiguous()?.apply_op1(Shuffle { finer: true });
    }
    x.reshape((b, c4 / 4, 2, 2, h, w))?.permute((0, 1, 4, 2, 5, 3))?.reshape((b, c4 / 4, 2 * h, 2 * w))
}

/// There or back: one is the other's inverse and, as each element goes to one place, its gradient.
struct Shuffle {
    finer: bool,
}

impl CustomOp1 for Shuffle {
    fn name(&self) -> &'static str {
        "pixel-shuffle"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, c, h, w) = layout.shape().dims4()?;
        let x = cpu::values(x, layout)?;
        let mut y = vec![0f32; x.len()];
        let shape = if self.finer {
            cpu::par_rows(&mut y, 2 * w, |first, lines| {
                for (i, to) in lines.chunks_exact_mut(2 * w).enumerate() {
                    // A line of the finer picture has pixels of two channels by turns.
                    let (plane, line) = ((first + i) / (2 * h), (first + i) % (2 * h));
                    let of = |j: usize| &x[((4 * plane + 2 * (line % 2) + j) * h + line / 2) * w..][..w];
                    for ((to, left), right) in to.as_chunks_mut::<2>().0.iter_mut().zip(of(0)).zip(of(1)) {
                        *to = [*left, *right];
                    }
                }
            });
            (b, c / 4, 2 * h, 2 * w)
        } else {
            let (h, w) = (h / 2, w / 2);
            cpu::par_rows(&mut y, w, |first, lines| {
                for (i, to) in lines.chunks_exact_mut(w).enumerate() {
                    let (plane, line) = ((first + i) / h, (first + i) % h);
                    let fine = &x[((plane / 4 * h + line) * 2 + plane / 2 % 2) * 2 * w..][..2 * w];
                    for (to, two) in to.iter_mut().zip(fine.as_chunks::<2>().0) {
                        *to = two[plane % 2];
                    }
                }
            });
            (b, 4 * c, h, w)
        };
        Ok((CpuStorage::F32(y), shape.into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        grad.contiguous()?.apply_op1(Self { finer: !self.finer }).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::{max_gradient_error, random};

    #[test]
    fn equals_composed_and_differentiates() -> Result<()> {
        let x = random((2, 8, 3, 5), 1)?;
        let composed = cpu::composed(|| pixel_shuffle(&x))?;
        let got = pixel_shuffle(&x)?;
        assert_eq!(got.dims(), [2, 2, 6, 10]);
        let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
        assert_eq!(flat(&got)?, flat(&composed)?);
        // Of what is not contiguous too.
        let turned = x.transpose(0, 1)?.reshape((2, 8, 5, 3))?.transpose(2, 3)?;
        assert_eq!(flat(&pixel_shuffle(&turned)?)?, flat(&cpu::composed(|| pixel_shuffle(&turned))?)?);
        assert!(pixel_shuffle(&x.narrow(1, 0, 6)?).is_err());
        let error = max_gradient_error(std::slice::from_ref(&x), 1e-2, 60, || pixel_shuffle(&x)?.sqr())?;
        assert!(error < 1e-3, "{error}");
        Ok(())
    }
}
