//! Attention: softmax under a mask, attention by products, and of one new token.

use super::*;

/// What each query sees of the keys, for [`softmax`].
#[derive(Clone, Copy, Default)]
pub(in crate::nn) enum Seen<'a> {
    #[default]
    All,
    /// Everything, with an f32 bias of these strides over batch, heads and queries (dense over the keys).
    Bias(&'a Tensor, [usize; 3]),
    /// Query i sees the keys up to `first + i`, but of those from `prefix` on only its row's own (u32 `[batch]`).
    Causal { first: usize, prefix: usize, own: Option<&'a Tensor> },
}

/// `softmax(scale · x + bias)` over the last of `[batch, heads, queries, keys]`.
pub(in crate::nn) fn softmax(
    x: Memory,
    seen: Seen,
    sizes @ (batch, heads, queries, keys): (usize, usize, usize, usize),
    scale: f32,
) -> Result<Owned> {
    let mut y = x.beside(x.dtype(), batch * heads * queries * keys)?;
    let to = y.arg()?;
    softmax_to(x, to, seen, sizes, scale)?;
    Ok(y)
}

fn softmax_to(
    x: Memory,
    y: Arg,
    seen: Seen,
    (batch, heads, queries, keys): (usize, usize, usize, usize),
    scale: f32,
) -> Result<()> {
    let (mut bias, mut own) = (None, None);
    let (mut strides, mut first, mut before) = ([0; 3], -1, 0);
    match seen {
        Seen::All => {}
        Seen::Bias(b, s) => (bias, strides) = (Some(Held::strided(b)), s),
        Seen::Causal { first: f, prefix, own: o } => {
            (first, before) = (i32::try_from(f).map_err(candle_core::Error::wrap)?, prefix);
            own = o.map(Held::new).transpose()?;
        }
    }
    let pointer = |h: &Option<Held>| h.as_ref().map_or(Ok(Arg::Pointer(0)), |h| h.get()?.arg());
    let [of_batch, of_head, of_query] = strides.map(|s| Arg::Size(s as u64));
    let args = [
        x.arg()?,
        pointer(&bias)?,
        pointer(&own)?,
        y,
        unsigned(keys)?,
        unsigned(heads)?,
        unsigned(queries)?,
        of_batch,
        of_head,
        of_query,
        Arg::Signed(first),
        unsigned(before)?,
        Arg::Float(scale),
    ];
    // Numbers that a thread keeps, and threads of a row.
    let (kernel, threads) = match keys {
        0..=512 => ("softmax_4", threads(keys)),
        513..=32_768 => ("softmax_32", keys.div_ceil(32).next_power_of_two().max(32)),
        _ => ("softmax", 1024),
    };
    x.launch(kernel, x.dtype(), (batch * heads * queries, 1), threads, &args)
}

/// `softmax(scale · q kᵀ) v` of `q` `[batch, n, heads · dim]` over `k`, `v` `[batch, m, kv_heads · dim]` (views with dense
/// rows, of the same strides), heads being groups that share keys. Queries go in parts whose scores are at most `most`;
/// `seen(from, f)` calls `f` with what the queries from `from` on see.
#[cfg(feature = "cuda")]
pub(in crate::nn) fn attention(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    (heads, kv_heads): (usize, usize),
    scale: f32,
    most: usize,
    seen: impl Fn(usize, &mut dyn FnMut(Seen) -> Result<()>) -> Result<()>,
) -> Result<Tensor> {
    use super::gemm::{Into, Rows, Sizes, product};
    let ((b, n, width), m) = (q.dims3()?, k.dim(1)?);
    let (dim, group) = (width / heads, heads / kv_heads);
    let (hq, hk, hv) = (Held::strided(q), Held::strided(k), Held::strided(v));
    let (mq, mk, mv) = (hq.get()?, hk.get()?, hv.get()?);
    let mut out = mq.beside(q.dtype(), b * n * width)?;
    let part = (most / (b * heads * m).max(1)).clamp(1, n.max(1));
    for from in (0..n).step_by(part) {
        let some = part.min(n - from);
        let mut scores = mq.beside(q.dtype(), b * heads * some * m)?;
        // One product takes the heads of all groups' same member, whose keys are evenly apart.
        let each = (0..b).flat_map(|row| (0..group).map(move |member| (row, member)));
        let sizes = |n, k| Sizes { batch: kv_heads, m: some, n, k };
        for (row, member) in each.clone() {
            let to = (row * heads + member) * some * m;
            let c = Into { memory: &mut scores, from: to, row: m, matrix: group * some * m };
            let a = q.stride()[0] * row + q.stride()[1] * from + member * dim;
            let a = Rows { memory: mq, from: a, row: q.stride()[1], matrix: group * dim };
            let b = Rows { memory: mk, from: k.stride()[0] * row, row: k.stride()[1], matrix: dim };
            // Scaled here, where half precision has room for it.
            product(c, scale, a, b, true, sizes(m, dim), false)?;
        }
        seen(from, &mut |seen| {
            let to = scores.arg()?;
            softmax_to(scores.read(), to, seen, (b, heads, some, m), 1.)
        })?;
        for (row, member) in each {
            let a = (row * heads + member) * some * m;
            let a = Rows { memory: scores.read(), from: a, row: m, matrix: group * some * m };
            let b = Rows { memory: mv, from: v.stride()[0] * row, row: v.stride()[1], matrix: dim };
            let to = (row * n + from) * width + member * dim;
            let c = Into { memory: &mut out, from: to, row: width, matrix: group * dim };
            product(c, 1., a, b, false, sizes(dim, m), false)?;
        }
    }
    Ok(out.tensor(q.shape()))
}

/// The gradient of [`softmax`] at `x`, from its result `y`.
pub(in crate::nn) fn softmax_back(y: &Tensor, g: &Tensor, scale: f32) -> Result<Tensor> {
    let (g, m) = (g.contiguous()?, y.dim(candle_core::D::Minus1)?);
    let (hy, hg) = (Held::new(y)?, Held::new(&g)?);
    let my = hy.get()?;
    let mut dx = my.beside(y.dtype(), y.elem_count())?;
    let args = [my.arg()?, hg.get()?.arg()?, dx.arg()?, unsigned(m)?, Arg::Float(scale)];
    my.launch("softmax_back", y.dtype(), (y.elem_count() / m.max(1), 1), threads(m), &args)?;
    Ok(dx.tensor(y.shape()))
}

/// What [`decode`] can take: query heads that share keys, and values of a head.
pub(in crate::nn) const MOST_GROUP: usize = 8;
pub(in crate::nn) const MOST_DIM: usize = 256;

/// Attention of one new token a row: `q` `[batch, 1, heads · dim]` over `k`, `v` `[batch, len, kv_heads · dim]`,
/// views of a longer cache. Keys from `prefix` up to `own[b]` (u32 `[batch]`) are padding. No gradient.
pub(in crate::nn) fn decode(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    (kv_heads, group): (usize, usize),
    prefix: usize,
    own: &Tensor,
    scale: f32,
) -> Result<Tensor> {
    /// Keys that are worth a block of their own, and blocks that fill a large GPU.
    const KEYS: usize = 32;
    const BLOCKS: usize = 1536;
    let ((batch, _, width), len) = (q.dims3()?, k.dim(1)?);
    let dim = width / (kv_heads * group);
    let fits = (1..=MOST_GROUP).contains(&group) && dim <= MOST_DIM && k.stride()[1..] == [kv_heads * dim, 1];
    // The kernel reads eight values at once.
    let starts = [k, v].map(|t| t.layout().start_offset());
    if !fits || k.stride() != v.stride() || !starts.iter().all(|s| s.is_multiple_of(8)) {
        candle_core::bail!("decode: q {:?}, k {:?}, v {:?}", q.shape(), k.layout(), v.layout())
    }
    let splits = len.div_ceil(KEYS).min(BLOCKS.div_ceil(batch * kv_heads)).max(1);
    let (hq, ho) = (Held::new(q)?, Held::new(own)?);
    let (hk, hv) = (Held::strided(k), Held::strided(v));
    let mq = hq.get()?;
    let heads = batch * kv_heads * group;
    let mut stats = mq.beside(DType::F32, heads * splits * 2)?;
    let mut sums = mq.beside(DType::F32, heads * splits * dim)?;
    let args = [
        mq.arg()?,
        hk.get()?.arg()?,
        hv.get()?.arg()?,
        ho.get()?.arg()?,
        stats.arg()?,
        sums.arg()?,
        unsigned(len)?,
        Arg::Size(k.stride()[0] as u64),
        unsigned(kv_heads)?,
        unsigned(group)?,
        unsigned(dim)?,
        unsigned(prefix)?,
        Arg::Float(scale),
    ];
    mq.launch("decode", q.dtype(), (batch * kv_heads, splits), 128, &args)?;
    let mut y = mq.beside(q.dtype(), q.elem_count())?;
    let args = [stats.read().arg()?, sums.read().arg()?, y.arg()?, unsigned(splits)?, unsigned(dim)?];
    mq.launch("decode_join", q.dtype(), (heads, 1), threads(dim), &args)?;
    Ok(y.tensor(q.shape()))
}
