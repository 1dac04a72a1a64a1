//! The fused attention op for f32 on the CPU.
//!
//! A task takes a block of queries and all keys that they see: scores by one small GEMM into
//! scratch memory of the task, softmax in place, values by a second GEMM. Backward computes the
//! probabilities again. Memory is a block of scores per thread, and keys and values once more where
//! several blocks of queries meet them (see `laid_out`); it grows with the number of keys
//! but not with that of queries, so this is exact softmax, not an online one.
//!
//! Limits: one query-key dimension for keys and values; the mask takes no gradient.

use super::cpu::{self, COLUMNS, Held, Mat, Out, Place, Product, RightFactors, gemm_into};
use super::simd::{self, wide};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::cell::Cell;
use std::ops::Range;

/// Queries of a block: at least enough rows for the GEMM, which lays out the keys and values anew for each block;
/// at most these, and few enough that there are eight blocks to share out.
const LEAST_BLOCK: usize = 64;
const MOST_BLOCK: usize = 256;
const BLOCKS: usize = 8;
/// Scores of a block that stay in the cache that cores share.
const SCORES: usize = 1 << 18;

/// Which keys a query sees; `super::Mask` made ready for the op.
pub(super) enum Visible {
    All,
    Causal {
        prefix: usize,
        start: Option<Vec<u32>>,
    },
    /// Added to the scores, `[batch, heads, q, k]` with any strides but a dense last dimension.
    Bias(Tensor),
    /// Where each segment begins, in order, and where the last one ends.
    Segments(Vec<usize>),
}

impl Visible {
    pub fn segments(lengths: &[usize]) -> Self {
        let mut bounds = vec![0];
        // An empty segment has no block.
        bounds.extend(lengths.iter().filter(|len| **len > 0).scan(0, |at, len| {
            *at += len;
            Some(*at)
        }));
        Self::Segments(bounds)
    }
}

pub(super) struct AttentionOp {
    pub heads: usize,
    pub kv_heads: usize,
    pub scale: f32,
    pub visible: Visible,
}

/// Where the rows of one argument lie: `[batch, seq, heads · dim]` or `[batch, heads, seq, dim]`.
struct Rows<'a> {
    data: &'a [f32],
    batch: usize,
    head: usize,
    token: usize,
}

impl<'a> Rows<'a> {
    fn new(data: &'a [f32], l: &Layout, dim: usize) -> Result<Self> {
        if l.stride().last() != Some(&1) && l.dims().last() != Some(&1) {
            candle_core::bail!("attention: layout {l:?}")
        }
        match *l.stride() {
            [batch, token, _] => Ok(Self { data, batch, head: dim, token }),
            [batch, head, token, _] => Ok(Self { data, batch, head, token }),
            _ => candle_core::bail!("attention: layout {l:?}"),
        }
    }

    /// The tokens from `first` on of one head, as a matrix.
    fn mat(&self, b: usize, h: usize, first: usize) -> Mat<'a> {
        let at = b * self.batch + h * self.head + first * self.token;
        Mat { data: &self.data[at..], rows_apart: self.token, cols_apart: 1 }
    }

    fn row(&self, b: usize, h: usize, token: usize, dim: usize) -> &'a [f32] {
        let at = b * self.batch + h * self.head + token * self.token;
        &self.data[at..at + dim]
    }
}

/// Sizes of one call.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    queries: usize,
    keys: usize,
    dim: usize,
}

impl AttentionOp {
    fn sizes(&self, q: &[usize], k: &[usize]) -> Sizes {
        match *q {
            [batch, queries, w] => Sizes { batch, queries, keys: k[1], dim: w / self.heads },
            _ => Sizes { batch: q[0], queries: q[2], keys: k[2], dim: q[3] },
        }
    }

    /// The queries in blocks, by segments: no block reaches over a segment's end.
    fn blocks(&self, s: Sizes) -> Vec<Vec<Range<usize>>> {
        let whole = [0, s.queries];
        let bounds = match &self.visible {
            Visible::Segments(bounds) => &bounds[..],
            _ => &whole[..],
        };
        // Where later queries see more keys, a larger block has more scores that none of its queries may see.
        let block = match &self.visible {
            Visible::Causal { .. } => LEAST_BLOCK,
            _ => (SCORES / s.keys.max(1)).min(s.queries / BLOCKS).clamp(LEAST_BLOCK, MOST_BLOCK) / 8 * 8,
        };
        let cut = |w: &[usize]| {
            let end = w[1];
            (w[0]..end).step_by(block).map(|from| from..(from + block).min(end)).collect()
        };
        bounds.windows(2).map(cut).collect()
    }

    /// The keys that the queries `rows` of batch row `b` may see, taken together.
    fn columns(&self, s: Sizes, b: usize, rows: &Range<usize>) -> Range<usize> {
        match &self.visible {
            Visible::Causal { prefix, start } => {
                let offset = s.keys - s.queries;
                let own = start.as_ref().map_or(0, |v| v[b] as usize);
                let from = if *prefix > 0 { 0 } else { own.min(rows.start + offset) };
                // Keys before the first are masked.
                from / COLUMNS * COLUMNS..rows.end + offset
            }
            Visible::Segments(bounds) => {
                let next = bounds.partition_point(|at| *at <= rows.start);
                bounds[next - 1]..bounds[next]
            }
            _ => 0..s.keys,
        }
    }

    /// Masks the scores of one query over the keys `cols` and returns how many of them, from the
    /// first, may be non-zero.
    fn mask(
        &self,
        s: Sizes,
        (b, h, query): (usize, usize, usize),
        cols: &Range<usize>,
        bias: Option<&Rows>,
        scores: &mut [f32],
    ) -> usize {
        match &self.visible {
            Visible::All | Visible::Segments(_) => cols.len(),
            Visible::Causal { prefix, start } => {
                let last = query + s.keys - s.queries;
                if let Some(v) = start {
                    // A padding query sees at least itself.
                    let own = (v[b] as usize).min(last);
                    let (from, to) = ((*prefix).max(cols.start), own.max(cols.start));
                    if from < to {
                        scores[from - cols.start..to - cols.start].fill(f32::NEG_INFINITY);
                    }
                }
                last + 1 - cols.start
            }
            Visible::Bias(_) => {
                if let Some(r) = bias {
                    add(scores, r.row(b, h, query, s.keys));
                }
                cols.len()
            }
        }
    }

    /// Shares of the queries `rows` over the keys `cols`, row-major into `p`, and what each row is to be divided by to be
    /// probabilities.
    fn shares(
        &self,
        s: Sizes,
        (b, h): (usize, usize),
        rows: &Range<usize>,
        cols: &Range<usize>,
        q: &Rows,
        k: &Rows,
        laid: Option<&RightFactors>,
        bias: Option<&Rows>,
        p: &mut [f32],
        sums: &mut [f32],
    ) {
        let (n, m) = (rows.len(), cols.len());
        let kv = h / (self.heads / self.kv_heads);
        let (q, to) = (q.mat(b, h, rows.start), Place::new(Out::new(p), 0, m).scaled(self.scale));
        // SAFETY: `p` is borrowed exclusively.
        unsafe {
            match laid {
                Some(k) => k.gemm_into(b * self.kv_heads + kv, (0..s.dim, cols.clone()), (q, n), to),
                None => gemm_into(Product::new((n, m, s.dim), q, k.mat(b, kv, cols.start).t()), to),
            }
        }
        for (i, (p, sum)) in p.chunks_exact_mut(m).zip(sums).enumerate() {
            let seen = self.mask(s, (b, h, rows.start + i), cols, bias, p);
            *sum = exp_row(&mut p[..seen]);
            p[seen..].fill(0.);
        }
    }

    fn forward(&self, s: Sizes, q: &Rows, k: &Rows, v: &Rows, bias: Option<&Rows>) -> Vec<f32> {
        let width = self.heads * s.dim;
        if s.queries == 1 {
            let mut o = vec![0f32; s.batch * width];
            self.decode(s, q, k, v, bias, &mut o);
            return o;
        }
        let blocks = self.blocks(s).concat();
        let (keys, values) = self.laid_out(s, blocks.len(), k, v).unzip();
        let group = self.heads / self.kv_heads;
        let attend = |[p, sums, _]: &mut Room, out: Out, task: usize| {
            let (bh, rows) = (task / blocks.len(), blocks[task % blocks.len()].clone());
            let (b, h) = (bh / self.heads, bh % self.heads);
            let cols = self.columns(s, b, &rows);
            let (p, sums) = (sized(p, rows.len() * cols.len()), sized(sums, rows.len()));
            self.shares(s, (b, h), &rows, &cols, q, k, keys.as_ref(), bias, p, sums);
            let to = Place::new(out, (b * s.queries + rows.start) * width + h * s.dim, width);
            let (n, m, pm) = (rows.len(), cols.len(), Mat::rows(p, cols.len()));
            // SAFETY: the columns of head `h` in the rows of this block are this task's alone; once written they are
            // there to be read.
            unsafe {
                match &values {
                    Some(v) => v.gemm_into(b * self.kv_heads + h / group, (cols, 0..s.dim), (pm, n), to),
                    None => gemm_into(Product::new((n, s.dim, m), pm, v.mat(b, h / group, cols.start)), to),
                }
                for (i, sum) in sums.iter().enumerate() {
                    scale(1. / sum, out.part(to.at + i * width, s.dim));
                }
            }
        };
        // Every block of every head is written, and the queries are in blocks, all of them.
        cpu::written(s.batch * s.queries * width, |out| {
            let tasks = 0..s.batch * self.heads * blocks.len();
            tasks.into_par_iter().for_each(|task| with_room(|room| attend(room, out, task)));
        })
    }

    /// Keys (transposed) and values of every head of every batch row, laid out for the products with several blocks
    /// of queries, where that pays.
    fn laid_out(&self, s: Sizes, blocks: usize, k: &Rows, v: &Rows) -> Option<(RightFactors, RightFactors)> {
        let segments = matches!(&self.visible, Visible::Segments(bounds) if bounds.len() > 2);
        if segments || blocks * self.heads / self.kv_heads < 2 {
            return None;
        }
        let at = |i: usize| (i / self.kv_heads, i % self.kv_heads);
        let count = s.batch * self.kv_heads;
        let keys = RightFactors::new(count, (s.dim, s.keys), |i| k.mat(at(i).0, at(i).1, 0).t())?;
        Some((keys, RightFactors::new(count, (s.keys, s.dim), |i| v.mat(at(i).0, at(i).1, 0))?))
    }

    /// One query per row, as in generation: plain loops over each row's own keys, so that a row's
    /// result depends neither on its neighbours nor on how far it is padded.
    fn decode(&self, s: Sizes, q: &Rows, k: &Rows, v: &Rows, bias: Option<&Rows>, o: &mut [f32]) {
        let group = self.heads / self.kv_heads;
        o.par_chunks_mut(s.dim).enumerate().for_each_init(Vec::new, |p, (task, o)| {
            let (b, h) = (task / self.heads, task % self.heads);
            let (prefix, from) = match &self.visible {
                Visible::Causal { prefix, start: Some(v) } => (*prefix, (v[b] as usize).min(s.keys - 1)),
                _ => (0, 0),
            };
            let ranges = [0..prefix.min(from), from..s.keys];
            let query = q.row(b, h, 0, s.dim);
            p.clear();
            for r in ranges.clone() {
                let at = p.len();
                p.resize(at + r.len(), 0.);
                if !r.is_empty() {
                    let km = k.mat(b, h / group, r.start);
                    decode_scores(query, km.data, km.rows_apart, self.scale, &mut p[at..]);
                }
            }
            if let Some(r) = bias {
                add(p, r.row(b, h, 0, s.keys));
            }
            softmax(p);
            let mut at = 0;
            for r in ranges {
                if !r.is_empty() {
                    let vm = v.mat(b, h / group, r.start);
                    decode_values(&p[at..at + r.len()], vm.data, vm.rows_apart, o);
                }
                at += r.len();
            }
        });
    }

    /// Gradients of q, k and v, each `[batch, seq, heads, dim]`.
    fn backward(
        &self,
        s: Sizes,
        q: &Rows,
        k: &Rows,
        v: &Rows,
        g: &Rows,
        bias: Option<&Rows>,
    ) -> [Vec<f32>; 3] {
        let group = self.heads / self.kv_heads;
        let (wq, wk) = (self.heads * s.dim, self.kv_heads * s.dim);
        let mut dq = vec![0f32; s.batch * s.queries * wq];
        let mut dk = vec![0f32; s.batch * s.keys * wk];
        let mut dv = vec![0f32; s.batch * s.keys * wk];
        let (oq, ok, ov) = (Out::new(&mut dq), Out::new(&mut dk), Out::new(&mut dv));
        let segments = self.blocks(s);
        let tasks = s.batch * self.kv_heads * segments.len();
        let differentiate = |[p, sums, dp]: &mut Room, task: usize| {
            let (bkv, blocks) = (task / segments.len(), &segments[task % segments.len()]);
            let (b, kv) = (bkv / self.kv_heads, bkv % self.kv_heads);
            for h in kv * group..(kv + 1) * group {
                for rows in blocks {
                    let (from, cols) = (rows.start, self.columns(s, b, rows));
                    let (n, m) = (rows.len(), cols.len());
                    let (p, dp, sums) = (sized(p, n * m), sized(dp, n * m), sized(sums, n));
                    self.shares(s, (b, h), rows, &cols, q, k, None, bias, p, sums);
                    for (p, sum) in p.chunks_exact_mut(m).zip(&*sums) {
                        scale(1. / sum, p);
                    }
                    let (gm, qm) = (g.mat(b, h, from), q.mat(b, h, from));
                    let (km, vm) = (k.mat(b, kv, cols.start), v.mat(b, kv, cols.start));
                    let at_kv = (b * s.keys + cols.start) * wk + kv * s.dim;
                    let to_kv = |out| Place::new(out, at_kv, wk).adding(true);
                    let to_q = Place::new(oq, (b * s.queries + from) * wq + h * s.dim, wq);
                    let pm = Mat::rows(p, m);
                    // SAFETY: `dp` is this task's; so are, in dq, dk and dv, the columns of its
                    // key-value head's group in the rows of its segment of its batch row.
                    unsafe {
                        gemm_into(Product::new((m, s.dim, n), pm.t(), gm), to_kv(ov));
                        gemm_into(Product::new((n, m, s.dim), gm, vm.t()), Place::new(Out::new(dp), 0, m));
                    }
                    for (p, dp) in p.chunks_exact(m).zip(dp.chunks_exact_mut(m)) {
                        score_gradient(p, self.scale, dp);
                    }
                    let ds = Mat::rows(dp, m);
                    // SAFETY: as above.
                    unsafe {
                        gemm_into(Product::new((n, s.dim, m), ds, km), to_q);
                        gemm_into(Product::new((m, s.dim, n), ds.t(), qm), to_kv(ok));
                    }
                }
            }
        };
        (0..tasks).into_par_iter().for_each(|task| with_room(|room| differentiate(room, task)));
        [dq, dk, dv]
    }
}

/// Of a block the scores, its rows' sums, and the scores' gradients.
type Room = [Vec<f32>; 3];

thread_local! {
    /// Of a thread's next task. Taken while in use, since a thread that waits may be given another one.
    static ROOM: Cell<Room> = const { Cell::new([const { Vec::new() }; 3]) };
}

fn with_room(f: impl FnOnce(&mut Room)) {
    let mut room = ROOM.take();
    f(&mut room);
    ROOM.set(room);
}

/// The first `len` numbers, of unknown values.
fn sized(room: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if room.len() < len {
        room.resize(len, 0.);
    }
    &mut room[..len]
}

wide! {
    fn softmax(p: &mut [f32]) {
        if !p.is_empty() {
            simd::softmax_row::<FMA>(p)
        }
    }
}

wide! {
    fn exp_row(p: &mut [f32]) -> f32 {
        simd::exp_row::<FMA>(p)
    }
}

wide! {
    fn scale(by: f32, x: &mut [f32]) {
        x.iter_mut().for_each(|x| *x *= by)
    }
}

wide! {
    fn add(a: &mut [f32], b: &[f32]) {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b)
    }
}

wide! {
    /// `ds = scale · p (dp − Σ p dp)` in place of `dp`.
    fn score_gradient(p: &[f32], scale: f32, dp: &mut [f32]) {
        let c = simd::dot::<FMA>(p, dp);
        for (p, dp) in p.iter().zip(dp) {
            *dp = scale * p * (*dp - c);
        }
    }
}

wide! {
    fn decode_scores(q: &[f32], k: &[f32], apart: usize, scale: f32, p: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if FMA {
            // SAFETY: this body is compiled for AVX2 and FMA.
            return unsafe { simd::avx2::dots(q, k, apart, scale, p) };
        }
        for (j, p) in p.iter_mut().enumerate() {
            *p = scale * simd::dot::<FMA>(q, &k[j * apart..j * apart + q.len()]);
        }
    }
}

wide! {
    fn decode_values(p: &[f32], v: &[f32], apart: usize, o: &mut [f32]) {
        simd::add_rows::<FMA>(simd::rows_apart(p, apart), v, o)
    }
}

fn from_start<'a>(s: &'a CpuStorage, l: &Layout) -> Result<&'a [f32]> {
    match s {
        CpuStorage::F32(v) => Ok(&v[l.start_offset()..]),
        _ => candle_core::bail!("attention: expected f32"),
    }
}

impl CustomOp3 for AttentionOp {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let s = self.sizes(lq.dims(), lk.dims());
        let q = Rows::new(from_start(q, lq)?, lq, s.dim)?;
        let k = Rows::new(from_start(k, lk)?, lk, s.dim)?;
        let v = Rows::new(from_start(v, lv)?, lv, s.dim)?;
        let held = self.bias();
        let bias = rows_of(held.as_ref(), self.bias_layout(), s.dim)?;
        let o = self.forward(s, &q, &k, &v, bias.as_ref());
        let shape: Shape = match lq.dims().len() {
            3 => lq.shape().clone(),
            _ => (s.batch, s.queries, self.heads, s.dim).into(),
        };
        Ok((CpuStorage::F32(o), shape))
    }

    fn bwd(&self, q: &Tensor, k: &Tensor, v: &Tensor, _: &Tensor, g: &Tensor) -> Result<super::Grads3> {
        let s = self.sizes(q.dims(), k.dims());
        // `[batch, q, heads, dim]` or `[batch, q, heads · dim]`: the same elements in the same order.
        let g = g.reshape((s.batch, s.queries, self.heads * s.dim))?.contiguous()?;
        let (hq, hk, hv, hg) = (Held::strided(q), Held::strided(k), Held::strided(v), Held::new(&g)?);
        let held = self.bias();
        let [dq, dk, dv] = self.backward(
            s,
            &Rows::new(hq.get()?, q.layout(), s.dim)?,
            &Rows::new(hk.get()?, k.layout(), s.dim)?,
            &Rows::new(hv.get()?, v.layout(), s.dim)?,
            &Rows::new(hg.get()?, g.layout(), s.dim)?,
            rows_of(held.as_ref(), self.bias_layout(), s.dim)?.as_ref(),
        );
        let back = |d: Vec<f32>, like: &Tensor, seq: usize, heads: usize| -> Result<Option<Tensor>> {
            let t = match like.rank() {
                3 => Tensor::from_vec(d, like.shape(), like.device())?,
                _ => Tensor::from_vec(d, (s.batch, seq, heads, s.dim), like.device())?.transpose(1, 2)?,
            };
            Ok(Some(t))
        };
        Ok((
            back(dq, q, s.queries, self.heads)?,
            back(dk, k, s.keys, self.kv_heads)?,
            back(dv, v, s.keys, self.kv_heads)?,
        ))
    }
}

impl AttentionOp {
    fn bias(&self) -> Option<Held<'_>> {
        match &self.visible {
            Visible::Bias(t) => Some(Held::strided(t)),
            _ => None,
        }
    }

    fn bias_layout(&self) -> Option<&Layout> {
        match &self.visible {
            Visible::Bias(t) => Some(t.layout()),
            _ => None,
        }
    }
}

fn rows_of<'a>(held: Option<&'a Held>, layout: Option<&Layout>, dim: usize) -> Result<Option<Rows<'a>>> {
    match (held, layout) {
        (Some(h), Some(l)) => Ok(Some(Rows::new(h.get()?, l, dim)?)),
        _ => Ok(None),
    }
}
