//! Scaled dot-product attention.
//!
//! On the CPU one fused op (see `attention_cpu`) reads queries, keys and values where they lie,
//! whatever their strides, repeats no keys for grouped queries, stores no scores and computes them
//! again in backward. Elsewhere, and where the mask itself is trained, it is composed of candle's ops.

use super::attention_cpu::{AttentionOp, Visible};
use super::cpu;
use candle_core::{DType, Result, Tensor};

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
    /// Sequences of these lengths one after the other in every batch row ("variable length"): each
    /// attends to itself only. Queries and keys are the same tokens.
    Segments(Vec<usize>),
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
            Mask::Segments(_) => candle_core::bail!("attention: segments are attended to one by one"),
        }
    }

    /// The mask as it is best given to many layers that run where `like` is: made once, where it would else be
    /// made anew by each.
    pub fn spread(&self, (b, n, m): (usize, usize, usize), like: &Tensor) -> Result<Self> {
        let made = like.device().is_cpu() || super::on_gpu(&[like]);
        if made || n == 1 || !matches!(self, Mask::Causal { .. }) {
            return Ok(self.clone());
        }
        self.check(b, n, m)?;
        let like = Tensor::zeros((), DType::F32, like.device())?;
        Ok(self.additive(b, n, m, &like)?.map_or(Mask::None, Mask::Additive))
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
        if let Mask::Segments(lengths) = self
            && (n != m || lengths.iter().sum::<usize>() != n)
        {
            candle_core::bail!("attention: {n} queries and {m} keys in segments of {lengths:?}")
        }
        Ok(())
    }
}

/// `softmax(q kᵀ · scale + mask) v`.
///
/// `q` is `[batch, heads, q, dim]`; `k`, `v` are `[batch, kv_heads, k, dim]` with `heads` a
/// multiple of `kv_heads` (grouped-query attention). Returns `[batch, heads, q, dim]`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: &Mask) -> Result<Tensor> {
    let ((b, h, n, d), (bk, hk, m, dk)) = (q.dims4()?, k.dims4()?);
    if bk != b || dk != d || hk == 0 || !h.is_multiple_of(hk) || v.dims() != k.dims() {
        candle_core::bail!("attention: q {:?}, k {:?}, v {:?}", q.shape(), k.shape(), v.shape())
    }
    mask.check(b, n, m)?;
    let Some(visible) = fused_mask(q, k, v, mask, (b, h, n, m))? else {
        return composed(q, k, v, scale, mask);
    };
    let op = AttentionOp { heads: h, kv_heads: hk, scale: scale as f32, visible };
    // The op writes `[batch, q, heads, dim]`, which is what the caller transposes to next.
    unit_stride(q)?.apply_op3(&unit_stride(k)?, &unit_stride(v)?, op)?.transpose(1, 2)
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
    let ((b, n, w), (bk, m, wk)) = (q.dims3()?, k.dims3()?);
    let fits = heads > 0 && kv_heads > 0 && heads.is_multiple_of(kv_heads) && w.is_multiple_of(heads);
    if !fits || bk != b || wk != w / heads * kv_heads || v.dims() != k.dims() {
        let (q, k, v) = (q.shape(), k.shape(), v.shape());
        candle_core::bail!("attention: q {q:?}, k {k:?}, v {v:?} with {heads} and {kv_heads} heads")
    }
    mask.check(b, n, m)?;
    if let Some(visible) = fused_mask(q, k, v, mask, (b, heads, n, m))? {
        let op = AttentionOp { heads, kv_heads, scale: scale as f32, visible };
        return unit_stride(q)?.apply_op3(&unit_stride(k)?, &unit_stride(v)?, op);
    }
    #[cfg(feature = "cuda")]
    if let Some(o) = decode(q, k, v, (heads, kv_heads), scale, mask)? {
        return Ok(o);
    }
    #[cfg(feature = "cuda")]
    if let Some(o) = super::gpu_ops::attention((q, k, v), (heads, kv_heads), scale, mask, SCORES)? {
        return Ok(o);
    }
    let split = |t: &Tensor, heads: usize| -> Result<Tensor> {
        let (b, s, w) = t.dims3()?;
        t.reshape((b, s, heads, w / heads))?.transpose(1, 2)
    };
    let o = composed(&split(q, heads)?, &split(k, kv_heads)?, &split(v, kv_heads)?, scale, mask)?;
    o.transpose(1, 2)?.reshape(q.dims())
}

/// The mask as the fused op takes it, or `None` where the op does not apply.
fn fused_mask(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &Mask,
    shape: (usize, usize, usize, usize),
) -> Result<Option<Visible>> {
    if !cpu::fused(&[q, k, v]) || q.elem_count() == 0 || k.elem_count() == 0 {
        return Ok(None);
    }
    Ok(match mask {
        Mask::None => Some(Visible::All),
        Mask::Causal { prefix, start } => Some(Visible::Causal { prefix: *prefix, start: start.clone() }),
        Mask::Segments(lengths) => Some(Visible::segments(lengths)),
        // A trained bias (Swin's relative positions) needs its own gradient.
        Mask::Additive(a) if a.track_op() || !cpu::fused(&[a]) => None,
        Mask::Additive(a) => Some(Visible::Bias(unit_stride(&a.broadcast_as(shape)?)?)),
    })
}

/// The tensor itself where its last dimension is dense, else a contiguous copy.
fn unit_stride(t: &Tensor) -> Result<Tensor> {
    if t.stride().last() == Some(&1) { Ok(t.clone()) } else { t.contiguous() }
}

fn composed(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: &Mask) -> Result<Tensor> {
    if let Mask::Segments(lengths) = mask {
        let mut from = 0;
        let mut parts = Vec::with_capacity(lengths.len());
        for &len in lengths.iter().filter(|len| **len > 0) {
            let own = |t: &Tensor| t.narrow(2, from, len);
            parts.push(composed(&own(q)?, &own(k)?, &own(v)?, scale, &Mask::None)?);
            from += len;
        }
        return Tensor::cat(&parts, 2);
    }
    let (b, h, n, _) = q.dims4()?;
    let (_, hk, m, d) = k.dims4()?;
    let repeat = |t: &Tensor| -> Result<Tensor> {
        if h == hk {
            return t.contiguous();
        }
        t.unsqueeze(2)?.expand((b, hk, h / hk, m, d))?.reshape((b, h, m, d))
    };
    let (k, v) = (repeat(k)?, repeat(v)?);
    // On a GPU scores are scaled where the softmax reads them, and products take transposed keys as they lie.
    // (Not of f16, which has no room for them.)
    let there = !q.device().is_cpu() && q.dtype() != DType::F16;
    let (q, scale) = if there { (q.contiguous()?, scale) } else { ((q.contiguous()? * scale)?, 1.) };
    let k = if q.device().is_cpu() { k.t()?.contiguous()? } else { k.t()? };
    let queries = (SCORES / (b * h * m).max(1)).clamp(1, n.max(1));
    #[cfg(feature = "cuda")]
    if super::gpu_ops::takes_mask(mask)
        && super::on_gpu(&[&q, &k])
        && (queries >= n || matches!(mask, Mask::Causal { .. }))
    {
        // A part of the queries sees the keys up to its last one's own: for it, too, the mask ends with the keys.
        let part = |from: usize| -> Result<Option<Tensor>> {
            let len = queries.min(n - from);
            let seen = if queries >= n { m } else { m - n + from + len };
            let s = q.narrow(2, from, len)?.matmul(&k.narrow(3, 0, seen)?)?;
            let p = super::gpu_ops::softmax(&s, mask, scale)?;
            p.map(|p| p.matmul(&v.narrow(2, 0, seen)?)).transpose()
        };
        let parts: Option<Vec<Tensor>> = (0..n).step_by(queries).map(part).collect::<Result<_>>()?;
        if let Some(parts) = parts {
            return if parts.len() == 1 { Ok(parts[0].clone()) } else { Tensor::cat(&parts, 2) };
        }
    }
    let bias = mask.additive(b, n, m, &q)?;
    let some = |from: usize, len: usize| -> Result<Tensor> {
        let s = q.narrow(2, from, len)?.matmul(&k)?;
        let s = if there { (s * scale)? } else { s };
        // Sums of exponentials are beyond half precision.
        let s = match s.dtype() {
            DType::F16 | DType::BF16 => s.to_dtype(DType::F32)?,
            _ => s,
        };
        let s = match &bias {
            Some(a) if a.dim(2)? == n => s.broadcast_add(&a.narrow(2, from, len)?.to_dtype(s.dtype())?)?,
            Some(a) => s.broadcast_add(&a.to_dtype(s.dtype())?)?,
            None => s,
        };
        super::softmax(&s)?.to_dtype(v.dtype())?.matmul(&v)
    };
    if queries >= n {
        return some(0, n);
    }
    let parts: Vec<Tensor> =
        (0..n).step_by(queries).map(|from| some(from, queries.min(n - from))).collect::<Result<_>>()?;
    Tensor::cat(&parts, 2)
}

/// Scores that exist at one time where attention is composed: 1 GiB of f32.
const SCORES: usize = 1 << 28;

/// One new token a row on a GPU, if the kernel takes it.
#[cfg(feature = "cuda")]
fn decode(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    (heads, kv_heads): (usize, usize),
    scale: f64,
    mask: &Mask,
) -> Result<Option<Tensor>> {
    use super::kernels;
    let (b, n, w) = q.dims3()?;
    let (prefix, start) = match mask {
        Mask::None => (0, None),
        Mask::Causal { prefix, start } => (*prefix, start.clone()),
        _ => return Ok(None),
    };
    let group = heads / kv_heads;
    let takes = n == 1
        && super::on_gpu(&[q, k, v])
        && !(q.track_op() || k.track_op() || v.track_op())
        && group <= kernels::MOST_GROUP
        && w / heads <= kernels::MOST_DIM
        && k.stride()[1..] == [w / group, 1]
        && k.stride() == v.stride()
        && [k, v].iter().all(|t| t.layout().start_offset().is_multiple_of(8));
    if !takes {
        return Ok(None);
    }
    let own = super::gpu_ops::constant(&start.unwrap_or_else(|| vec![0; b]), q.device())?;
    kernels::decode(&q.contiguous()?, k, v, (kv_heads, group), prefix, &own, scale as f32).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::{assert_same, max_gradient_error, random};

    fn masks(b: usize, n: usize, m: usize) -> Result<Vec<Mask>> {
        let additive = (random((b, 1, n, m), 9)?.as_tensor().detach() * 2.)?;
        Ok(vec![
            Mask::None,
            Mask::Additive(additive.clone()),
            Mask::Additive(additive.narrow(0, 0, 1)?.narrow(2, 0, 1)?),
            Mask::causal(),
            Mask::left_padded((0..b as u32).map(|i| i * 3 % m as u32).collect()),
            Mask::Causal { prefix: 2, start: Some((0..b as u32).map(|i| 2 + i * 2).collect()) },
        ]
        .into_iter()
        .chain((n == m).then(|| Mask::Segments(vec![2, 0, n - 5, 3])))
        .collect())
    }

    #[test]
    fn equals_composed_and_differentiates() -> Result<()> {
        let sizes = [(2, 4, 2, 9, 9, 8), (1, 2, 2, 70, 133, 5), (3, 6, 2, 1, 11, 16), (1, 2, 1, 90, 90, 8)];
        for (b, h, hk, n, m, d) in sizes {
            let (q, k) = (random((b, n, h * d), 1)?, random((b, m, hk * d), 2)?);
            let v = random((b, m, hk * d), 3)?;
            let heads = |t: &Tensor, h: usize| -> Result<Tensor> {
                let (b, s, _) = t.dims3()?;
                t.reshape((b, s, h, d))?.transpose(1, 2)
            };
            let split = || -> Result<_> { Ok((heads(&q, h)?, heads(&k, hk)?, heads(&v, hk)?)) };
            for mask in masks(b, n, m)? {
                let plain = || {
                    let (q, k, v) = split()?;
                    composed(&q, &k, &v, 0.4, &mask)?.transpose(1, 2)?.reshape((b, n, h * d))
                };
                let packed = || attention_packed(&q, &k, &v, h, hk, 0.4, &mask);
                assert_same(&[&q, &k, &v], packed, plain)?;
                let strided = || {
                    let (q, k, v) = split()?;
                    attention(&q, &k, &v, 0.4, &mask)?.transpose(1, 2)?.reshape((b, n, h * d))
                };
                assert_same(&[&q, &k, &v], strided, plain)?;
                if n < 20 {
                    let e = max_gradient_error(&[q.clone(), k.clone(), v.clone()], 1e-2, 20, packed)?;
                    assert!(e < 2e-3, "{e}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_query_that_sees_nothing_gives_zeros() -> Result<()> {
        let (q, k) = (random((1, 1, 2, 4), 1)?, random((1, 1, 3, 4), 2)?);
        let blind = Tensor::full(f32::NEG_INFINITY, (1, 1, 1, 3), q.device())?;
        let y = attention(&q, &k, &k, 1., &Mask::Additive(blind))?;
        assert!(y.flatten_all()?.to_vec1::<f32>()?.iter().all(|&v| v == 0.));
        Ok(())
    }

    #[test]
    fn a_trained_bias_gets_its_gradient() -> Result<()> {
        let (q, bias) = (random((1, 2, 3, 4), 1)?, random((1, 2, 3, 3), 2)?);
        let grads =
            attention(&q, &q, &q, 1., &Mask::Additive(bias.as_tensor().clone()))?.sqr()?.backward()?;
        assert!(grads.get(&bias).is_some());
        Ok(())
    }
}
