//! f32 matrix products on AVX2 and FMA, in the way of Goto & van de Geijn 2008 ("Anatomy of High-Performance
//! Matrix Multiplication").
//!
//! Both matrices are packed: `b` into panels of 16 columns, of which a part of `k` stays in the innermost
//! cache, `a` into panels of 6 rows, of which a block stays in a core's own. A kernel keeps 6 × 16 sums in
//! registers. The `gemm` crate multiplies on other processors; on those with AVX2 alone it was slower
//! (`scripts/peers.py --only vitl_1800` shows it).
//!
//! An element is summed over `k` in one order, whatever else is in the matrices and however many threads there
//! are; but products of a few rows or columns are not made here (see `cpu`).

use super::cpu::{Out, Place, Product};
use rayon::prelude::*;
use std::arch::x86_64::*;
use std::cell::Cell;

/// Rows and columns of a kernel: 12 registers of sums, 2 of `b`, 1 of `a`.
const ROWS: usize = 6;
const COLS: usize = 16;
/// Of `k` at once: a panel of `b` is 16 KiB of the innermost cache.
const DEPTH: usize = 256;
/// Rows of `a` at once: 120 KiB of a core's cache.
const BLOCK: usize = 20 * ROWS;
/// Columns of `b` at once: 3 MiB of the cache that cores share.
const WIDTH: usize = 192 * COLS;
/// Panels of `b` from which on packing `a` is worth it, where its rows lie along `k`.
const MANY: usize = 8;
/// Rows this many numbers apart meet in few places of the innermost cache.
const CROWDED: usize = 256;
/// Panels that are packed, or met by a block of rows, in one task, at most and at least.
const MOST_PANELS: usize = 8;
const LEAST_PANELS: usize = 4;
/// Products below this many multiplications are not worth a second thread.
const WORTH_A_THREAD: usize = 1 << 20;
/// Tasks a thread, for threads are not equally fast.
const TASKS: usize = 4;

/// Whether this processor has the instructions, and none that the `gemm` crate has better kernels for.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && !is_x86_feature_detected!("avx512f")
}

thread_local! {
    /// Room for the blocks of `a` and panels of `b` of a thread's next product. Taken while in use, since a
    /// thread that waits may be given another product.
    static ROOM: [Cell<Vec<Line>>; 2] = const { [Cell::new(vec![]), Cell::new(vec![])] };
}

/// A cache line, by which packed matrices are aligned.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([f32; 16]);

/// `f` with room for `len` numbers, of unknown values.
fn with_room<T>(which: usize, len: usize, f: impl FnOnce(Out) -> T) -> T {
    let mut room = ROOM.with(|r| r[which].take());
    let lines = len.div_ceil(16);
    if room.len() < lines {
        room.resize(lines, Line([0.; 16]));
    }
    let result = f(Out { ptr: room.as_mut_ptr().cast(), len: room.len() * 16 });
    ROOM.with(|r| r[which].set(room));
    result
}

/// Makes the product.
///
/// # Safety
/// The processor must have AVX2 and FMA; the slices must hold matrices of these sizes, and `to` the result; its
/// buffer must be alive and no other thread may touch these elements meanwhile.
pub(super) unsafe fn product(Product { sizes: (m, n, k), a, b, parallel }: Product, to: Place) {
    assert!(m > 0 && n > 0 && k > 0);
    let threads = match parallel && m * n * k >= WORTH_A_THREAD {
        true => rayon::current_num_threads(),
        false => 1,
    };
    let a = Lines { data: a.data, apart: a.rows_apart, k_apart: a.cols_apart, first: 0, count: m };
    let b = Lines { data: b.data, apart: b.cols_apart, k_apart: b.rows_apart, first: 0, count: n };
    // Parts of one size, nearly.
    let width = n.div_ceil(n.div_ceil(WIDTH)).next_multiple_of(COLS);
    let depth = k.div_ceil(k.div_ceil(DEPTH));
    with_room(1, width * depth, |panels| {
        for first in (0..n).step_by(width) {
            let b = Lines { first, count: width.min(n - first), ..b };
            for from in (0..k).step_by(depth) {
                let to = Place { at: to.at + first, add: to.add || from > 0, ..to };
                // SAFETY: by the caller's word; the room is this call's alone.
                unsafe { part(a, b, (from, depth.min(k - from)), panels, to, threads) }
            }
        }
    });
}

/// `a b` of `depth` numbers of `k` from `from` on.
///
/// # Safety
/// As of [`product`]; `panels` has room for `b`, and is this call's alone.
unsafe fn part(a: Lines, b: Lines, (from, depth): (usize, usize), panels: Out, to: Place, threads: usize) {
    let count = b.count.div_ceil(COLS);
    let least = if threads > 1 { threads * TASKS } else { 1 };
    let together = count.div_ceil(least).min(MOST_PANELS);
    let pack = |i: usize| {
        for panel in i * together..((i + 1) * together).min(count) {
            // SAFETY: as above; each panel is one call's.
            unsafe { b.pack::<COLS>(panel * COLS, from, depth, panels.place(panel * COLS * depth)) }
        }
    };
    // Blocks of fewer rows where there would be too few, then parts of them by columns.
    let block = BLOCK.min(a.count.div_ceil(least).next_multiple_of(ROWS).max(4 * ROWS));
    let blocks = a.count.div_ceil(block);
    let wide = count.div_ceil(least.div_ceil(blocks)).max(LEAST_PANELS);
    let parts = count.div_ceil(wide);
    let packed = count >= MANY || a.k_apart != 1 || a.apart.is_multiple_of(CROWDED);
    let multiply = |task: usize| {
        let (row, panel) = (task / parts * block, task % parts * wide);
        let a = Lines { first: row, count: block.min(a.count - row), ..a };
        let panels = |rows: Rows| {
            for panel in panel..(panel + wide).min(count) {
                let cols = COLS.min(b.count - panel * COLS);
                let to = Place { at: to.at + row * to.apart + panel * COLS, ..to };
                // SAFETY: as above; these elements are this task's.
                unsafe { rows.multiply(a.count, depth, panels.place(panel * COLS * depth), to, cols) }
            }
        };
        if !packed {
            return panels(a.in_place(from, depth));
        }
        // The last panel's last numbers are written eight at a time.
        with_room(0, a.count.next_multiple_of(ROWS) * depth + 8, |room| {
            for r in (0..a.count).step_by(ROWS) {
                // SAFETY: as above; the room is this task's alone.
                unsafe { a.pack::<ROWS>(r, from, depth, room.place(r * depth)) }
            }
            panels(Rows::Packed(room.place(0)));
        });
    };
    if threads > 1 {
        (0..count.div_ceil(together)).into_par_iter().for_each(pack);
        (0..blocks * parts).into_par_iter().with_max_len(1).for_each(multiply);
    } else {
        (0..count.div_ceil(together)).for_each(pack);
        (0..blocks * parts).for_each(multiply);
    }
}

/// The rows of `a` that meet a panel of `b`.
#[derive(Clone, Copy)]
enum Rows {
    Packed(*const f32),
    /// Where they lie, so far apart, each along `k`.
    InPlace(*const f32, usize),
}

impl Rows {
    /// `count` of them by `cols` columns of the panel `b`.
    ///
    /// # Safety
    /// As of [`kernel`], for all of them.
    unsafe fn multiply(self, count: usize, depth: usize, b: *const f32, to: Place, cols: usize) {
        for r in (0..count).step_by(ROWS) {
            let to = Place { at: to.at + r * to.apart, ..to };
            // SAFETY: by the caller's word.
            unsafe {
                match self {
                    Self::Packed(a) => six::<true>(count - r, depth, (a.add(r * depth), 0), b, to, cols),
                    Self::InPlace(a, apart) => {
                        six::<false>(count - r, depth, (a.add(r * apart), apart), b, to, cols)
                    }
                }
            }
        }
    }
}

/// [`kernel`] for the first six rows of `count`.
///
/// # Safety
/// As of [`kernel`].
unsafe fn six<const P: bool>(
    count: usize,
    depth: usize,
    a: (*const f32, usize),
    b: *const f32,
    to: Place,
    cols: usize,
) {
    // SAFETY: by the caller's word.
    unsafe {
        match count {
            1 => kernel::<1, P>(depth, a, b, to, cols),
            2 => kernel::<2, P>(depth, a, b, to, cols),
            3 => kernel::<3, P>(depth, a, b, to, cols),
            4 => kernel::<4, P>(depth, a, b, to, cols),
            5 => kernel::<5, P>(depth, a, b, to, cols),
            _ => kernel::<ROWS, P>(depth, a, b, to, cols),
        }
    }
}

/// Rows of `a` or columns of `b`, which lie along `k`.
#[derive(Clone, Copy)]
struct Lines<'a> {
    data: &'a [f32],
    apart: usize,
    k_apart: usize,
    /// Those that are meant.
    first: usize,
    count: usize,
}

impl Lines<'_> {
    /// `depth` numbers of each from `from` on, which follow each other.
    fn in_place(self, from: usize, depth: usize) -> Rows {
        let first = self.first * self.apart + from;
        assert!(self.k_apart == 1 && first + (self.count - 1) * self.apart + depth <= self.data.len());
        Rows::InPlace(self.data[first..].as_ptr(), self.apart)
    }

    /// Packs `W` lines from `line` on, `depth` numbers of each from `from` on: the first of all lines, then the
    /// second. Zeros stand for lines that are none.
    ///
    /// # Safety
    /// The processor must have AVX2 and FMA; the slice must hold the lines, and `to` have room for `W · depth`
    /// numbers, and for two more unless `W` is a multiple of eight.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn pack<const W: usize>(self, line: usize, from: usize, depth: usize, to: *mut f32) {
        let lines = W.min(self.count - line);
        let (apart, k_apart) = (self.apart, self.k_apart);
        let first = (self.first + line) * apart + from * k_apart;
        assert!(first + (lines - 1) * apart + (depth - 1) * k_apart < self.data.len());
        // SAFETY: the assertion keeps what is read inside the slice, the caller's word what is written.
        unsafe {
            let data = self.data.as_ptr().add(first);
            let one_by_one = |from: usize| {
                for k in from..depth {
                    for l in 0..W {
                        let x = if l < lines { *data.add(l * apart + k * k_apart) } else { 0. };
                        *to.add(k * W + l) = x;
                    }
                }
            };
            if lines == W && apart == 1 {
                for k in 0..depth {
                    data.add(k * k_apart).copy_to_nonoverlapping(to.add(k * W), W);
                }
            } else if lines == W && k_apart == 1 {
                let whole = depth / 8 * 8;
                for k in (0..whole).step_by(8) {
                    for half in (0..W).step_by(8) {
                        let mut eight = [_mm256_setzero_ps(); 8];
                        for (l, line) in eight.iter_mut().enumerate().take(W - half) {
                            *line = _mm256_loadu_ps(data.add((half + l) * apart + k));
                        }
                        // Of 6 lines each store is overwritten, from its seventh number on, by the next.
                        for (i, numbers) in transpose(eight).into_iter().enumerate() {
                            _mm256_storeu_ps(to.add((k + i) * W + half), numbers);
                        }
                    }
                }
                one_by_one(whole);
            } else {
                one_by_one(0);
            }
        }
    }
}

/// A square of 8 × 8 numbers, its rows in registers, transposed.
#[target_feature(enable = "avx2")]
fn transpose(r: [__m256; 8]) -> [__m256; 8] {
    let mut pairs = r;
    for i in (0..8).step_by(2) {
        pairs[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    // Now half q of fours[4 g + c] holds column 4 q + c of the rows of group g.
    let mut fours = pairs;
    for g in [0, 4] {
        fours[g] = _mm256_shuffle_ps::<0x44>(pairs[g], pairs[g + 2]);
        fours[g + 1] = _mm256_shuffle_ps::<0xee>(pairs[g], pairs[g + 2]);
        fours[g + 2] = _mm256_shuffle_ps::<0x44>(pairs[g + 1], pairs[g + 3]);
        fours[g + 3] = _mm256_shuffle_ps::<0xee>(pairs[g + 1], pairs[g + 3]);
    }
    let mut out = fours;
    for c in 0..4 {
        out[c] = _mm256_permute2f128_ps::<0x20>(fours[c], fours[4 + c]);
        out[4 + c] = _mm256_permute2f128_ps::<0x31>(fours[c], fours[4 + c]);
    }
    out
}

/// `R` rows of `a` by 16 columns of `b`, of which `cols` are wanted.
///
/// # Safety
/// The processor must have AVX2 and FMA; `b` must be a packed panel, `depth` deep and aligned by 32 bytes; `a` one if
/// `PACKED`, else `R` rows of `depth` numbers, as far apart as is said; and `R` rows of `cols` numbers of the
/// result be there and this call's alone.
#[target_feature(enable = "avx2,fma")]
unsafe fn kernel<const R: usize, const PACKED: bool>(
    depth: usize,
    (a, a_apart): (*const f32, usize),
    b: *const f32,
    to: Place,
    cols: usize,
) {
    assert!(to.at + (R - 1) * to.apart + cols <= to.out.len && cols <= COLS);
    // SAFETY: in bounds by the caller's word and as asserted.
    unsafe {
        let out = to.out.place(to.at);
        for r in 0..R {
            _mm_prefetch::<_MM_HINT_T0>(out.add(r * to.apart).cast());
            _mm_prefetch::<_MM_HINT_T0>(out.add(r * to.apart + cols - 1).cast());
        }
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        let mut step = |k: usize| {
            let b = [_mm256_load_ps(b.add(k * COLS)), _mm256_load_ps(b.add(k * COLS + 8))];
            for (r, sums) in sums.iter_mut().enumerate() {
                let at = if PACKED { k * ROWS + r } else { r * a_apart + k };
                let a = _mm256_broadcast_ss(&*a.add(at));
                sums[0] = _mm256_fmadd_ps(a, b[0], sums[0]);
                sums[1] = _mm256_fmadd_ps(a, b[1], sums[1]);
            }
        };
        let fours = depth / 4 * 4;
        for k in (0..fours).step_by(4) {
            step(k);
            step(k + 1);
            step(k + 2);
            step(k + 3);
        }
        for k in fours..depth {
            step(k);
        }
        let scale = _mm256_set1_ps(to.scale);
        if cols == COLS {
            for (r, sums) in sums.iter().enumerate() {
                for (half, sum) in sums.iter().enumerate() {
                    let out = out.add(r * to.apart + 8 * half);
                    let sum = match to.add {
                        true => _mm256_fmadd_ps(*sum, scale, _mm256_loadu_ps(out)),
                        false => _mm256_mul_ps(*sum, scale),
                    };
                    _mm256_storeu_ps(out, sum);
                }
            }
            return;
        }
        for (r, sums) in sums.iter().enumerate() {
            let mut row = [0f32; COLS];
            _mm256_storeu_ps(row.as_mut_ptr(), sums[0]);
            _mm256_storeu_ps(row.as_mut_ptr().add(8), sums[1]);
            for (c, sum) in row.iter().enumerate().take(cols) {
                let out = out.add(r * to.apart + c);
                *out = if to.add { sum.mul_add(to.scale, *out) } else { sum * to.scale };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::cpu::Mat;
    use crate::nn::gradcheck::random;

    type Strides = (usize, usize);

    /// `0.5 a b + c`, or without `c`, and the same in f64.
    fn check((m, n, k): (usize, usize, usize), a_t: bool, b_t: bool, add: bool) -> candle_core::Result<()> {
        let numbers = |n: usize, seed: u64| random(n, seed)?.flatten_all()?.to_vec1::<f32>();
        let (a, b) = (numbers(m * k, 1)?, numbers(k * n, 2)?);
        let (a_at, b_at): (Strides, Strides) =
            (if a_t { (1, m) } else { (k, 1) }, if b_t { (1, k) } else { (n, 1) });
        let mat = |data, at: Strides| Mat { data, rows_apart: at.0, cols_apart: at.1 };
        // Rows further apart than they are long, from the third number on.
        let apart = n + 3;
        let before = numbers(m * apart + 2, 3)?;
        let run = |parallel: bool| {
            let mut c = before.clone();
            let of = Product { parallel, ..Product::new((m, n, k), mat(&a, a_at), mat(&b, b_at)) };
            let to = Place::new(Out::new(&mut c), 2, apart).adding(add).scaled(0.5);
            // SAFETY: the buffer is this function's, and the caller asked for the instructions.
            unsafe { product(of, to) };
            c
        };
        let got = run(true);
        assert!(got == run(false), "threads change {m} {n} {k}");
        for (at, (got, before)) in got.iter().zip(&before).enumerate() {
            let Some((r, c)) = at.checked_sub(2).map(|at| (at / apart, at % apart)).filter(|at| at.1 < n)
            else {
                assert_eq!(got, before, "beside the result");
                continue;
            };
            let term =
                |i: usize| f64::from(a[r * a_at.0 + i * a_at.1]) * f64::from(b[i * b_at.0 + c * b_at.1]);
            let want = 0.5 * (0..k).map(term).sum::<f64>() + if add { f64::from(*before) } else { 0. };
            assert!((f64::from(*got) - want).abs() < 1e-6 * (k as f64 + 4.), "{m} {n} {k}: {got} {want}");
        }
        Ok(())
    }

    #[test]
    fn products_are_right_of_every_size_and_layout() -> candle_core::Result<()> {
        if !is_x86_feature_detected!("avx2") || !is_x86_feature_detected!("fma") {
            return Ok(());
        }
        for size in [
            (1, 1, 1),
            (6, 16, 8),
            (7, 19, 13),
            (2, 33, 300),
            (130, 35, 600),
            (3, WIDTH + 20, 9),
            (250, 70, DEPTH),
            (64, 200, 2 * DEPTH + 1),
            (20, 40, CROWDED),
        ] {
            for (a_t, b_t) in [(false, false), (false, true), (true, false), (true, true)] {
                for add in [false, true] {
                    check(size, a_t, b_t, add)?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() -> candle_core::Result<()> {
        if !is_x86_feature_detected!("avx2") || !is_x86_feature_detected!("fma") {
            return Ok(());
        }
        let (n, k) = (70, 700);
        let (a, b) = (random((300, k), 1)?, random((n, k), 2)?);
        let (a, b) = (a.flatten_all()?.to_vec1::<f32>()?, b.flatten_all()?.to_vec1::<f32>()?);
        let of = |from: usize, rows: usize, cols: usize| {
            let mut c = vec![0.; rows * cols];
            let of = Product::new((rows, cols, k), Mat::rows(&a[from * k..], k), Mat::rows(&b, k).t());
            // SAFETY: as above.
            unsafe { product(of.parallel(), Place::new(Out::new(&mut c), 0, cols)) };
            c
        };
        let all = of(0, 300, n);
        for (from, rows) in [(0, 1), (299, 1), (5, 7), (100, 64)] {
            assert!(of(from, rows, n) == all[from * n..(from + rows) * n], "{from} {rows}");
        }
        // Nor does an element on how many columns there are.
        assert!(of(0, 9, 33).chunks(33).zip(all.chunks(n)).all(|(a, b)| a == &b[..33]));
        Ok(())
    }
}
