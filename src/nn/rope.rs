//! Rotary position embedding (Su et al. 2021) in the half-split form of Llama and Qwen.

use super::cpu::{self, Held, par_rows};
#[cfg(feature = "cuda")]
use super::kernels::{self, Memory};
use super::simd::{madd, wide};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};

/// Rotates each head of `x` by its position's angles: with `(a, b)` the two halves of a head,
/// `(a cos − b sin, b cos + a sin)`.
///
/// `x` is `[batch, seq, heads · dim]`; `cos` and `sin` are `[batch or 1, seq, dim / 2]` and
/// constants: no gradient reaches them.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (b, s, w) = x.dims3()?;
    let (rb, rs, half) = cos.dims3()?;
    if sin.dims() != cos.dims() || (rb != b && rb != 1) || rs != s || half == 0 || w % (2 * half) != 0 {
        candle_core::bail!("rope: x {:?}, cos {:?}, sin {:?}", x.shape(), cos.shape(), sin.shape())
    }
    if cpu::fused(&[x, cos, sin])
        || (super::on_gpu(&[x]) && super::on_gpu(&[cos, sin]) && cos.dtype() == DType::F32)
    {
        let (cos, sin) = (cos.detach().contiguous()?, sin.detach().contiguous()?);
        return x.contiguous()?.apply_op1(RopeOp { cos, sin, sign: 1. });
    }
    composed(x, cos, sin)
}

fn composed(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (b, s, w) = x.dims3()?;
    let half = cos.dim(2)?;
    // Angles are f32: a product in half precision would lose what far positions differ by.
    let dtype = x.dtype();
    let x = x.to_dtype(cos.dtype())?.reshape((b, s, w / (2 * half), 2, half))?;
    let (lo, hi) = (x.narrow(3, 0, 1)?, x.narrow(3, 1, 1)?);
    let cos = cos.unsqueeze(2)?.unsqueeze(2)?;
    let sin = sin.unsqueeze(2)?.unsqueeze(2)?;
    let a = (lo.broadcast_mul(&cos)? - hi.broadcast_mul(&sin)?)?;
    let c = (hi.broadcast_mul(&cos)? + lo.broadcast_mul(&sin)?)?;
    Tensor::cat(&[&a, &c], 3)?.reshape((b, s, w))?.to_dtype(dtype)
}

struct RopeOp {
    cos: Tensor,
    sin: Tensor,
    /// −1 rotates backwards, which is the gradient.
    sign: f32,
}

wide! {
    /// Rotates the heads of one token.
    fn rotate(x: &[f32], cos: &[f32], sin: &[f32], sign: f32, y: &mut [f32]) {
        let h = cos.len();
        let sin = &sin[..h];
        for (x, y) in x.chunks_exact(2 * h).zip(y.chunks_exact_mut(2 * h)) {
            let ((a, b), (ya, yb)) = (x.split_at(h), y.split_at_mut(h));
            let (b, yb) = (&b[..h], &mut yb[..h]);
            for i in 0..h {
                let s = sin[i] * sign;
                ya[i] = madd::<FMA>(a[i], cos[i], -(b[i] * s));
                yb[i] = madd::<FMA>(b[i], cos[i], a[i] * s);
            }
        }
    }
}

impl CustomOp1 for RopeOp {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = cpu::values(x, l)?;
        let (_, s, w) = l.shape().dims3()?;
        let (rows, _, half) = self.cos.dims3()?;
        let (cos, sin) = (Held::new(&self.cos)?, Held::new(&self.sin)?);
        let (cos, sin) = (cos.get()?, sin.get()?);
        let mut y = vec![0f32; x.len()];
        par_rows(&mut y, w, |row, y| {
            for (i, y) in y.chunks_exact_mut(w).enumerate() {
                let token = row + i;
                let at = (if rows == 1 { token % s } else { token }) * half;
                rotate(
                    &x[token * w..(token + 1) * w],
                    &cos[at..at + half],
                    &sin[at..at + half],
                    self.sign,
                    y,
                );
            }
        });
        Ok((CpuStorage::F32(y), l.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, l: &Layout) -> Result<(CudaStorage, Shape)> {
        let ((rows, s, half), width) = (self.cos.dims3()?, l.dims()[2]);
        let x = Memory::cuda(x, l)?;
        let (len, sizes) = (l.shape().elem_count(), (width, half, rows * s));
        kernels::rope(x, &self.cos, &self.sin, len, sizes, self.sign)?.cuda(l.shape())
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let back = RopeOp { cos: self.cos.clone(), sin: self.sin.clone(), sign: -self.sign };
        g.contiguous()?.apply_op1_no_bwd(&back).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::{assert_same, max_gradient_error, random};

    #[test]
    fn equals_composed_and_differentiates() -> Result<()> {
        let x = random((2, 5, 24), 1)?;
        for rows in [1, 2] {
            let angles = random((rows, 5, 4), 2)?.as_tensor().detach();
            let (cos, sin) = (angles.cos()?, angles.sin()?);
            assert_same(&[&x], || rope(&x, &cos, &sin), || composed(&x, &cos, &sin))?;
            let e = max_gradient_error(std::slice::from_ref(&x), 1e-2, 40, || rope(&x, &cos, &sin))?;
            assert!(e < 1e-3, "{e}");
        }
        Ok(())
    }
}
