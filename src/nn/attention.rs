//! Scaled dot-product attention.

use candle_core::{Result, Tensor};

/// What a query may see.
#[derive(Clone, Debug)]
pub enum Mask {
    /// Everything.
    None,
    /// Added to the scores before the softmax; broadcastable to `[batch, heads, q, k]`.
    Additive(Tensor),
    /// Causal, aligned at the end: query i of n sees keys `0 ..= k_len - n + i`. Where `start`
    /// (one value per batch row) is given, keys `prefix .. start[b]` are padding: the row's own
    /// tokens begin at `start[b]`, after `prefix` keys that all rows share.
    Causal { prefix: usize, start: Option<Vec<u32>> },
}

impl Mask {
    /// Causal, without padding.
    pub fn causal() -> Self {
        Mask::Causal { prefix: 0, start: None }
    }

    /// Causal with rows padded on the left; `start[b]` is the index of row b's first token.
    pub fn left_padded(start: Vec<u32>) -> Self {
        Mask::Causal { prefix: 0, start: Some(start) }
    }

    /// As a tensor of 0 and −∞, broadcastable to `[batch, heads, q, k]`.
    fn additive(&self, b: usize, n: usize, m: usize, like: &Tensor) -> Result<Option<Tensor>> {
        match self {
            Mask::None => Ok(None),
            Mask::Additive(a) => Ok(Some(a.clone())),
            Mask::Causal { prefix, start } => {
                let rows = if start.is_some() { b } else { 1 };
                let mut a = Vec::with_capacity(rows * n * m);
                for bi in 0..rows {
                    let lo = start.as_ref().map_or(0, |s| s[bi] as usize);
                    for i in 0..n {
                        let hi = m - n + i;
                        // A padding query sees at least itself, so that no row is all −∞.
                        let sees = |j: usize| j <= hi && (j < *prefix || j >= lo || j == hi);
                        a.extend((0..m).map(|j| if sees(j) { 0f32 } else { f32::NEG_INFINITY }));
                    }
                }
                Ok(Some(Tensor::from_vec(a, (rows, 1, n, m), like.device())?.to_dtype(like.dtype())?))
            }
        }
    }

    fn check(&self, b: usize, n: usize, m: usize) -> Result<()> {
        if let Mask::Causal { start, .. } = self {
            if m < n {
                candle_core::bail!("causal attention: {n} queries but only {m} keys")
            }
            if let Some(s) = start
                && s.len() != b
            {
                candle_core::bail!("causal attention: {} starts for a batch of {b}", s.len())
            }
        }
        Ok(())
    }
}

/// `softmax(q kᵀ · scale + mask) v`.
///
/// `q` is `[batch, heads, q, dim]`; `k`, `v` are `[batch, kv_heads, k, dim]` with `heads` a
/// multiple of `kv_heads` (grouped-query attention). Returns `[batch, heads, q, dim]`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: &Mask) -> Result<Tensor> {
    let (b, h, n, _) = q.dims4()?;
    let (_, hk, m, d) = k.dims4()?;
    mask.check(b, n, m)?;
    let repeat = |t: &Tensor| -> Result<Tensor> {
        if h == hk {
            return t.contiguous();
        }
        t.unsqueeze(2)?.expand((b, hk, h / hk, m, d))?.reshape((b, h, m, d))
    };
    let (k, v) = (repeat(k)?, repeat(v)?);
    let s = (q.contiguous()? * scale)?.matmul(&k.t()?.contiguous()?)?;
    let s = match mask.additive(b, n, m, &s)? {
        Some(a) => s.broadcast_add(&a)?,
        None => s,
    };
    super::softmax(&s)?.matmul(&v)
}

/// [`attention`] on projections as linear layers give them, without transposing:
/// `q` `[batch, q, heads · dim]`, `k`, `v` `[batch, k, kv_heads · dim]` → `[batch, q, heads · dim]`.
pub fn attention_packed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    kv_heads: usize,
    scale: f64,
    mask: &Mask,
) -> Result<Tensor> {
    let split = |t: &Tensor, heads: usize| -> Result<Tensor> {
        let (b, s, w) = t.dims3()?;
        t.reshape((b, s, heads, w / heads))?.transpose(1, 2)
    };
    let o = attention(&split(q, heads)?, &split(k, kv_heads)?, &split(v, kv_heads)?, scale, mask)?;
    o.transpose(1, 2)?.reshape(q.dims())
}
