//! Products with quantised weights: the input is quantised as well, each 32 numbers of a row by themselves
//! to 8 bits; whole numbers are multiplied and summed, exactly, within a group of the weight, and the
//! groups' sums are added up in f32, in order.
//!
//! Every kernel does this same arithmetic, so that a result is the same to the last bit on every processor
//! and for any number of rows.

use super::formats::{Format, widen};
use super::kernels::*;
use crate::nn::cpu;
use rayon::prelude::*;

/// Numbers of the input that share a scale.
pub(super) const SHARE: usize = 32;
/// Weight rows of a slab, and how far it goes along them.
pub(super) const SIDE: usize = 16;
pub(super) const DEPTH: usize = 256;
/// Weight rows of [`Kernel::dots`].
pub(super) const LINES: usize = 8;
/// Rows of the input that meet a slab: more of them share the work of taking it apart, fewer stay in a
/// core's cache.
const TILE: usize = 256;

/// Rows of the input, quantised.
pub(super) struct Input {
    pub k: usize,
    /// `[rows, k]`, of size 127 at most.
    pub q: Vec<i8>,
    /// `[rows, k / SHARE]`.
    pub scales: Vec<f32>,
    /// `[rows, k / group]`: what makes up for the offset of the weight's numbers.
    pub starts: Vec<i32>,
    /// `[rows, k / SHARE]`: sums of the numbers that share a scale; empty without mins.
    pub sums: Vec<f32>,
}

impl Input {
    pub fn new<F: Format>(x: &[f32], k: usize) -> Self {
        let n = x.len();
        let mut all = Self {
            k,
            q: vec![0; n],
            scales: vec![0.; n / SHARE],
            starts: vec![0; n / F::GROUP],
            sums: vec![0.; if F::MINS { n / SHARE } else { 0 }],
        };
        // `sums` may be empty, which ends a zip too early; then it is cut into as many nothings.
        let mut none = vec![0.; if F::MINS { 0 } else { n / k }];
        let (sums, per_row) = if F::MINS { (&mut all.sums, k / SHARE) } else { (&mut none, 1) };
        all.q
            .par_chunks_mut(k)
            .zip(x.par_chunks_exact(k))
            .zip(all.scales.par_chunks_mut(k / SHARE))
            .zip(all.starts.par_chunks_mut(k / F::GROUP))
            .zip(sums.par_chunks_mut(per_row))
            .for_each(|((((q, x), scales), starts), sums)| quantize_row::<F>(x, q, scales, starts, sums));
        all
    }

    /// Can kernels read `rows` from `row` on, `depth` from `at` on?
    #[cfg(target_arch = "x86_64")]
    pub fn holds<F: Format>(&self, row: usize, rows: usize, at: usize, depth: usize) -> bool {
        let end = (row + rows) * self.k;
        rows > 0
            && at + depth <= self.k
            && end <= self.q.len()
            && end / SHARE <= self.scales.len()
            && end / F::GROUP <= self.starts.len()
            && (!F::MINS || end / SHARE <= self.sums.len())
    }
}

fn quantize_row<F: Format>(
    x: &[f32],
    q: &mut [i8],
    scales: &mut [f32],
    starts: &mut [i32],
    sums: &mut [f32],
) {
    let per = SHARE / F::GROUP;
    for (i, (q, x)) in q.chunks_exact_mut(SHARE).zip(x.chunks_exact(SHARE)).enumerate() {
        scales[i] = quantize(x, q);
        let mut sum = 0;
        for (start, q) in starts[i * per..].iter_mut().zip(q.chunks_exact(F::GROUP)) {
            let part: i32 = q.iter().map(|q| i32::from(*q)).sum();
            *start = -F::OFFSET * part;
            sum += part;
        }
        if F::MINS {
            sums[i] = scales[i] * sum as f32;
        }
    }
}

/// Numbers that share a scale, which is returned. It is NaN or infinite where one of them is.
#[inline(always)]
fn quantize(x: &[f32], q: &mut [i8]) -> f32 {
    // Adding 1.5·2²³ rounds to a whole number that then stands in the low bits.
    const ROUND: f32 = 12_582_912.;
    let most = x.iter().fold(0, |m, x| (x.to_bits() & 0x7fff_ffff).max(m));
    let most = f32::from_bits(most);
    // Its inverse would overflow below.
    let inverse = if most < 1e-36 { 0. } else { 127. / most };
    for (q, x) in q.iter_mut().zip(x) {
        *q = (x * inverse + ROUND).to_bits() as i8;
    }
    most / 127.
}

/// A part of a weight, taken apart: 16 rows, 256 deep.
#[repr(align(64))]
pub(super) struct Slab {
    /// Of each row, four numbers a word.
    pub rows: [[u32; DEPTH / 4]; SIDE],
    /// The same, all rows' first words first.
    pub words: [[u32; SIDE]; DEPTH / 4],
    /// Of the groups; those of the rows together.
    pub scales: [[f32; SIDE]; DEPTH / 16],
    pub mins: [[f32; SIDE]; DEPTH / 32],
}

impl Slab {
    fn new() -> Box<Self> {
        Box::new(Self {
            rows: [[0; DEPTH / 4]; SIDE],
            words: [[0; SIDE]; DEPTH / 4],
            scales: [[0.; SIDE]; DEPTH / 16],
            mins: [[0.; SIDE]; DEPTH / 32],
        })
    }

    /// Takes apart blocks of `w` from byte `at` of each row on. Rows that `w` lacks keep what was there.
    #[inline(always)]
    fn fill<F: Format>(&mut self, w: &[u8], per_row: usize, at: usize, depth: usize) {
        let (mut scales, mut mins) = ([0.; DEPTH / 16], [0.; DEPTH / 16]);
        let mut halves = [[0u16; SIDE]; DEPTH / 32];
        let (blocks, groups) = (depth / F::BLOCK, F::BLOCK / F::GROUP);
        for (lane, (w, row)) in w.chunks_exact(per_row).zip(&mut self.rows).enumerate() {
            // SAFETY: words may be seen as the bytes that they are.
            let row = unsafe { std::slice::from_raw_parts_mut(row.as_mut_ptr().cast::<u8>(), DEPTH) };
            let w = w[at..at + blocks * F::BYTES].chunks_exact(F::BYTES);
            for (b, (block, q)) in w.zip(row.chunks_exact_mut(F::BLOCK)).enumerate() {
                F::decode(block, q, &mut scales[b * groups..], &mut mins[b * groups..]);
                if F::HALF_FIRST {
                    halves[b][lane] = u16::from_le_bytes([block[0], block[1]]);
                }
            }
            let written = if F::HALF_FIRST { 0 } else { blocks * groups };
            for g in 0..written {
                self.scales[g][lane] = scales[g];
                if F::MINS {
                    self.mins[g][lane] = mins[g];
                }
            }
        }
        let firsts = if F::HALF_FIRST { blocks } else { 0 };
        for (scales, halves) in self.scales.iter_mut().zip(&halves).take(firsts) {
            // Not by `map`, which may be called.
            for (scale, half) in scales.iter_mut().zip(halves) {
                *scale = widen(*half);
            }
        }
    }
}

/// The instructions of a processor.
pub(super) trait Kernel {
    /// Rows of the input for which taking slabs apart is not worth it.
    const FEW: usize = 0;

    /// Products of `rows` of the input from `first` on with at most [`LINES`] weight rows, for as many rows as
    /// [`FEW`](Self::FEW) at most.
    ///
    /// # Safety
    /// The processor must have the instructions.
    unsafe fn dots<F: Format>(_: &[u8], _: &Input, (_, rows): (usize, usize), _: &mut [f32], _: usize) {
        unreachable!("{rows} rows are not few")
    }

    /// Begins to read `len` bytes of each of 16 rows, which need not be there.
    ///
    /// # Safety
    /// The processor must have the instructions.
    unsafe fn fetch(first: *const u8, per_row: usize, len: usize);

    /// `rows` to `words`, the first `depth` numbers or more.
    ///
    /// # Safety
    /// The processor must have the instructions.
    unsafe fn transpose(slab: &mut Slab, depth: usize);

    /// Adds a slab's part to `cols` sums of each of `R` rows, which are `out` apart in `to`.
    ///
    /// # Safety
    /// The processor must have the instructions.
    unsafe fn grow<F: Format, const R: usize>(
        slab: &Slab,
        x: &Input,
        row: usize,
        at: usize,
        depth: usize,
        to: &mut [f32],
        out: usize,
        cols: usize,
    );
}

/// `part = x wᵀ` for `rows` of the input from `row` on, where it is zeros before.
///
/// # Safety
/// The processor must have `K`'s instructions.
#[inline(always)]
unsafe fn panels<F: Format, K: Kernel>(
    w: &[u8],
    x: &Input,
    (first, rows): (usize, usize),
    part: &mut [f32],
    slab: &mut Slab,
) {
    let per_row = x.k / F::BLOCK * F::BYTES;
    let out = w.len() / per_row;
    if rows <= K::FEW {
        for (c, w) in w.chunks(LINES * per_row).enumerate() {
            // SAFETY: by the caller's word.
            unsafe { K::dots::<F>(w, x, (first, rows), &mut part[c * LINES..], out) }
        }
        return;
    }
    for (c, w) in w.chunks(SIDE * per_row).enumerate() {
        let cols = w.len() / per_row;
        for at in (0..x.k).step_by(DEPTH) {
            let depth = DEPTH.min(x.k - at);
            slab.fill::<F>(w, per_row, at / F::BLOCK * F::BYTES, depth);
            // What comes next is on its way while this is worked on.
            let next = if at + depth < x.k { (at + depth) / F::BLOCK * F::BYTES } else { SIDE * per_row };
            // SAFETY: by the caller's word.
            unsafe {
                K::fetch(w.as_ptr().wrapping_add(next), per_row, DEPTH / F::BLOCK * F::BYTES);
                K::transpose(slab, depth);
            }
            let mut row = 0;
            while row < rows {
                let to = &mut part[row * out + c * SIDE..];
                // SAFETY: as above.
                unsafe {
                    row += match rows - row {
                        8.. => {
                            K::grow::<F, 8>(slab, x, first + row, at, depth, to, out, cols);
                            8
                        }
                        4.. => {
                            K::grow::<F, 4>(slab, x, first + row, at, depth, to, out, cols);
                            4
                        }
                        _ => {
                            K::grow::<F, 1>(slab, x, first + row, at, depth, to, out, cols);
                            1
                        }
                    }
                }
            }
        }
    }
}

pub(super) type Panels = unsafe fn(&[u8], &Input, (usize, usize), &mut [f32], &mut Slab);

/// What this processor can run, the best first.
pub(super) fn kernels<F: Format>() -> Vec<Panels> {
    let mut all: Vec<Panels> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        /// `panels`, compiled for these instructions.
        macro_rules! compiled {
            ($kernel:ty, $features:literal) => {{
                #[target_feature(enable = $features)]
                unsafe fn f<F: Format>(
                    w: &[u8],
                    x: &Input,
                    rows: (usize, usize),
                    part: &mut [f32],
                    slab: &mut Slab,
                ) {
                    // SAFETY: by the caller's word.
                    unsafe { panels::<F, $kernel>(w, x, rows, part, slab) }
                }
                f::<F>
            }};
        }
        if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vnni") {
            all.push(compiled!(Avx512, "avx512f,avx512bw,avx512vnni"));
        }
        if is_x86_feature_detected!("avx2") {
            if is_x86_feature_detected!("avxvnni") {
                all.push(compiled!(Avx2<true>, "avx2,avxvnni"));
            }
            all.push(compiled!(Avx2<false>, "avx2"));
        }
    }
    all.push(panels::<F, Portable>);
    all
}

/// `y = x wᵀ`, where it is zeros before; `w` are the rows' bytes, one after the other.
pub(super) fn product<F: Format>(w: &[u8], x: &[f32], k: usize, y: &mut [f32]) {
    product_by(kernels::<F>()[0], w, &Input::new::<F>(x, k), F::BYTES * (k / F::BLOCK), y);
}

pub(super) fn product_by(panels: Panels, w: &[u8], x: &Input, per_row: usize, y: &mut [f32]) {
    let (rows, out) = (x.q.len() / x.k, w.len() / per_row);
    let task = cpu::rows_per_task(x.k).next_multiple_of(SIDE);
    let place = cpu::Out::new(y);
    w.par_chunks(task * per_row).enumerate().for_each_init(
        || (Slab::new(), Vec::new()),
        |(slab, part), (i, w)| {
            let n = w.len() / per_row;
            for first in (0..rows).step_by(TILE) {
                let tile = TILE.min(rows - first);
                part.clear();
                part.resize(tile * n, 0.);
                // SAFETY: the kernel is one of those that this processor can run.
                unsafe { panels(w, x, (first, tile), part, slab) };
                for (r, part) in part.chunks_exact(n).enumerate() {
                    // SAFETY: the columns of this task's weight rows are written by it alone.
                    unsafe { place.add_at((first + r) * out + i * task, part) }
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::super::formats::{Q4K, Q5K, Q6K, Q8_0, unpack};
    use super::*;

    /// Bytes whose scales are of moderate size.
    fn weight<F: Format>(out: usize, k: usize, mut next: impl FnMut() -> u32) -> Vec<u8> {
        let mut w: Vec<u8> = (0..out * k / F::BLOCK * F::BYTES).map(|_| next() as u8).collect();
        let halves: &[usize] = if F::GROUP == 16 { &[208] } else { &[0, 2] };
        for block in w.chunks_exact_mut(F::BYTES) {
            for at in &halves[..1 + usize::from(F::MINS)] {
                block[at + 1] = 0x20 | block[at + 1] & 0x83;
            }
        }
        w
    }

    fn check<F: Format>() {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 16
        };
        let blocks = 1024 / F::BLOCK;
        for (rows, out, blocks) in
            [(1, 1, 1), (3, 5, 2), (5, 16, 1), (13, 35, blocks + 1), (TILE + 30, 18, 1), (2, 600, blocks)]
        {
            let k = blocks * F::BLOCK;
            let w = weight::<F>(out, k, &mut next);
            let mut x: Vec<f32> = (0..rows * k).map(|_| next() as f32 / 3e4 - 1.).collect();
            x[..SHARE.min(k)].fill(0.);
            let input = Input::new::<F>(&x, k);
            let mut unpacked = vec![0.; out * k];
            unpack::<F>(&w, &mut unpacked);
            let of = |panels: Panels, input: &Input| {
                let mut y = vec![0f32; input.q.len() / k * out];
                product_by(panels, &w, input, w.len() / out, &mut y);
                y
            };
            let kernels = kernels::<F>();
            let all = of(kernels[0], &input);
            // What the input's own rounding leaves, exactly.
            for (at, y) in all.iter().enumerate() {
                let (r, c) = (at / out, at % out);
                let (mut exact, mut size) = (0f64, 0f64);
                for i in 0..k {
                    let x = f64::from(input.q[r * k + i]) * f64::from(input.scales[(r * k + i) / SHARE]);
                    let part = x * f64::from(unpacked[c * k + i]);
                    (exact, size) = (exact + part, size + part.abs());
                }
                assert!((f64::from(*y) - exact).abs() <= 1e-6 * size, "{rows} {out} {k}: {y} {exact}");
            }
            for kernel in &kernels {
                assert!(of(*kernel, &input) == all, "{rows} {out} {k}: kernels differ");
                for (from, n) in [(0, 1), (rows - 1, 1), (rows / 2, rows - rows / 2)] {
                    let part = Input::new::<F>(&x[from * k..(from + n) * k], k);
                    assert!(of(*kernel, &part) == all[from * out..(from + n) * out], "rows differ");
                }
            }
        }
    }

    #[test]
    fn kernels_agree_to_the_last_bit_and_rows_do_not_depend_on_others() {
        check::<Q8_0>();
        check::<Q4K>();
        check::<Q5K>();
        check::<Q6K>();
    }

    #[test]
    fn numbers_that_are_none_stay_so() {
        let (k, out) = (32, 3);
        let w = weight::<Q8_0>(out, k, || 77);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = vec![1.; 2 * k];
            x[5] = bad;
            let mut y = vec![0.; 2 * out];
            product::<Q8_0>(&w, &x, k, &mut y);
            assert!(
                y[..out].iter().all(|y| !y.is_finite()) && y[out..].iter().all(|y| y.is_finite()),
                "{y:?}"
            );
        }
    }
}
