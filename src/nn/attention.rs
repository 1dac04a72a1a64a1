//! Scaled dot-product attention.

use candle_core::{Result, Tensor};

/// What a query may see.
#[derive(Clone, Debug)]
pub enum Mask {
    /// Everything.
    None,
    /// Added to the scores before the softmax; broadcastable to `[batch, heads, q, k]`.
    Additive(Tensor),
    /// Causal, aligned at the end (query i of n sees keys `0 ..= k_len - n + i`), and, where
    /// given, only keys at or after `start[b]` (left padding), as u32 `[batch]`.
    Causal { start: Option<Vec<u32>> },
}

/// `softmax(q kᵀ · scale + mask) v`.
///
/// `q` is `[batch, heads, q, dim]`; `k`, `v` are `[batch, kv_heads, k, dim]` with `heads` a
/// multiple of `kv_heads` (grouped-query attention). Returns `[batch, heads, q, dim]`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: &Mask) -> Result<Tensor> {
    let (b, h, n, _) = q.dims4()?;
    let (_, hk, m, d) = k.dims4()?;
    let repeat = |t: &Tensor| -> Result<Tensor> {
        if h == hk {
            return t.contiguous();
        }
        t.unsqueeze(2)?.expand((b, hk, h / hk, m, d))?.reshape((b, h, m, d))
    };
    let (k, v) = (repeat(k)?, repeat(v)?);
    let s = (q.contiguous()? * scale)?.matmul(&k.t()?.contiguous()?)?;
    let s = match mask {
        Mask::None => s,
        Mask::Additive(a) => s.broadcast_add(a)?,
        Mask::Causal { start } => {
            let mut a = Vec::with_capacity(b * n * m);
            for bi in 0..b {
                let lo = start.as_ref().map_or(0, |s| s[bi] as usize);
                for i in 0..n {
                    let hi = m - n + i;
                    // A padding query sees at least itself, so that no row is all −inf.
                    a.extend(
                        (0..m)
                            .map(|j| if (j >= lo || j == hi) && j <= hi { 0f32 } else { f32::NEG_INFINITY }),
                    );
                }
            }
            s.broadcast_add(&Tensor::from_vec(a, (b, 1, n, m), q.device())?.to_dtype(s.dtype())?)?
        }
    };
    super::softmax(&s)?.matmul(&v)
}
