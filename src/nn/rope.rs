//! Rotary position embedding (Su et al. 2021) in the half-split form of Llama and Qwen.

use candle_core::{Result, Tensor};

/// Rotates each head of `x` by its position's angles: with `(a, b)` the two halves of a head,
/// `(a cos − b sin, b cos + a sin)`.
///
/// `x` is `[batch, seq, heads · dim]`; `cos` and `sin` are `[batch or 1, seq, dim / 2]`.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (b, s, w) = x.dims3()?;
    let (_, _, half) = cos.dims3()?;
    let x = x.reshape((b, s, w / (2 * half), 2, half))?;
    let (lo, hi) = (x.narrow(3, 0, 1)?, x.narrow(3, 1, 1)?);
    let cos = cos.unsqueeze(2)?.unsqueeze(2)?;
    let sin = sin.unsqueeze(2)?.unsqueeze(2)?;
    let a = (lo.broadcast_mul(&cos)? - hi.broadcast_mul(&sin)?)?;
    let c = (hi.broadcast_mul(&cos)? + lo.broadcast_mul(&sin)?)?;
    Tensor::cat(&[&a, &c], 3)?.reshape((b, s, w))
}
