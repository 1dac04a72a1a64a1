//! Matrix products on AMX, the matrix unit of Intel's server CPUs (Sapphire Rapids, 2023, and later).
//!
//! A tile instruction multiplies 16 × 32 by 32 × 16 numbers of bf16 and adds them up in f32, at
//! sixteen times the rate of AVX-512's f32 units. An f32 number becomes one of bf16 (an error of some 2⁻⁸
//! of a product), or is cut into two, the nearest and the nearest to what that leaves over, and a product
//! into three, the smallest left out (some 2⁻¹⁷; Henry, Tang & Heinecke 2019, "Leveraging the bfloat16
//! Artificial Intelligence Datatype For Higher-Precision Computations"). A third part would give f32's own
//! error, and was no faster than AVX-512. Numbers below 2⁻¹²⁶ count as 0, as the unit takes them, and of an
//! infinity cut into parts comes NaN (∞ · 0).
//!
//! Both matrices are packed into tiles, then each task multiplies blocks of 2 × 2 tiles. An element is
//! summed over `k` in one order, whatever else is in the matrices and however many threads there are.

use super::cpu::{Place, Product};
use super::simd::transpose;
use rayon::prelude::*;
use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::Cell;
use std::sync::OnceLock;

/// Lines (rows of `a`, columns of `b`) of a tile, and its elements of `k`.
const LINES: usize = 16;
const DEPTH: usize = 32;

/// Of `a` 16 rows of 32 numbers; of `b` 16 pairs of rows, the numbers of a pair side by side. As words
/// of two numbers each, one layout is the other's transpose.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Tile([[u32; LINES]; LINES]);

/// The sums of 2 × 2 tiles, each row by row.
#[repr(C, align(64))]
struct Sums([[[f32; LINES]; LINES]; 4]);

/// Tiles of a packed matrix at once (32 MiB); larger ones are cut into blocks.
const MOST_TILES: usize = 32 << 10;

/// Products below this many multiplications are not worth a second thread.
const WORTH_A_THREAD: usize = 1 << 20;

/// Whether this CPU has the tiles, and the system lets the process use them.
pub(super) fn available() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        let vectors = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16");
        // CPUID leaf 7, EDX: AMX-BF16 and AMX-TILE.
        let tiles = (1 << 22) | (1 << 24);
        vectors && __cpuid_count(7, 0).edx & tiles == tiles && permitted()
    })
}

/// Asks the kernel for the tiles' state, which a process has only on request.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and touches no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

thread_local! {
    /// Room for the packed matrices of a thread's next product: fresh memory would cost as much as
    /// packing. Taken while in use, since a thread that waits may be given another product.
    static BUFFERS: Cell<[Vec<Tile>; 2]> = const { Cell::new([vec![], vec![]]) };
}

/// Makes the product of numbers cut into `parts` (1 or 2) parts.
///
/// # Safety
/// [`available`] must have said yes; the slices must hold matrices of these sizes, and `to` the
/// result; its buffer must be alive and no other thread may touch these elements meanwhile.
pub(super) unsafe fn product(Product { sizes: (m, n, k), a, b, parallel }: Product, parts: usize, to: Place) {
    assert!((1..=2).contains(&parts) && m > 0 && n > 0 && k > 0);
    let a = Side { data: a.data, lines: m, k, line_apart: a.rows_apart, k_apart: a.cols_apart };
    let b = Side { data: b.data, lines: n, k, line_apart: b.cols_apart, k_apart: b.rows_apart };
    let parallel = parallel && rayon::current_num_threads() > 1 && m * n * k >= WORTH_A_THREAD;
    // Tiles of a line, and lines of tiles in a block: an even number, for 2 × 2 tiles.
    let line = k.div_ceil(DEPTH) * parts;
    let block = (MOST_TILES / line / 2 * 2).max(2) * LINES;
    let [mut left, mut right] = BUFFERS.take();
    for row in (0..m).step_by(block) {
        let rows = block.min(m - row);
        a.pack(row, rows, parts, Layout::Rows, &mut left, parallel);
        for col in (0..n).step_by(block) {
            let cols = block.min(n - col);
            b.pack(col, cols, parts, Layout::Pairs, &mut right, parallel);
            let to = Place { at: to.at + row * to.apart + col, ..to };
            multiply(&left, &right, line, parts, Block { rows, cols, to }, parallel);
        }
    }
    BUFFERS.set([left, right]);
}

/// Which way round a tile is.
#[derive(Clone, Copy, PartialEq)]
enum Layout {
    Rows,
    Pairs,
}

/// One of the two matrices, its lines along `k`.
#[derive(Clone, Copy)]
struct Side<'a> {
    data: &'a [f32],
    lines: usize,
    k: usize,
    line_apart: usize,
    k_apart: usize,
}

impl Side<'_> {
    /// Packs `lines` lines from `first` on: lines of tiles, in each along `k`, in that part by part.
    fn pack(
        self,
        first: usize,
        lines: usize,
        parts: usize,
        layout: Layout,
        to: &mut Vec<Tile>,
        parallel: bool,
    ) {
        let (line, count) = (self.k.div_ceil(DEPTH) * parts, lines.div_ceil(LINES));
        if to.len() < count * line {
            to.resize(count * line, Tile([[0; LINES]; LINES]));
        }
        let one = |(i, tiles): (usize, &mut [Tile])| {
            for (block, tiles) in tiles.chunks_exact_mut(parts).enumerate() {
                // SAFETY: `available` says that the CPU has what the function is compiled for.
                unsafe { self.pack_tile(first + i * LINES, block * DEPTH, layout, tiles) }
            }
        };
        match parallel {
            true => to[..count * line].par_chunks_mut(line).enumerate().for_each(one),
            false => to[..count * line].chunks_mut(line).enumerate().for_each(one),
        }
    }

    /// The parts of the 16 lines from `line` on, of `k` the 32 from `from` on; zeros beyond the matrix.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn pack_tile(self, line: usize, from: usize, layout: Layout, tiles: &mut [Tile]) {
        let (lines, depth) = ((self.lines - line).min(LINES), (self.k - from).min(DEPTH));
        let mut gathered;
        let (data, line_apart, k_apart) = if self.k_apart == 1 || self.line_apart == 1 {
            (&self.data[line * self.line_apart + from * self.k_apart..], self.line_apart, self.k_apart)
        } else {
            gathered = [0f32; LINES * DEPTH];
            for (i, row) in gathered.chunks_exact_mut(DEPTH).take(lines).enumerate() {
                for (j, v) in row[..depth].iter_mut().enumerate() {
                    *v = self.data[(line + i) * self.line_apart + (from + j) * self.k_apart];
                }
            }
            (&gathered[..], DEPTH, 1)
        };
        // Of a row of numbers 16 from `at` on, of which `count` are there.
        let load = |at: usize, count: usize| match count {
            0 => _mm512_setzero_ps(),
            // SAFETY: the first `count` are inside the matrix, and no others are read.
            _ => unsafe {
                debug_assert!(at + count <= data.len());
                _mm512_maskz_loadu_ps((0xffff_u32 >> (16 - count)) as u16, data.as_ptr().add(at))
            },
        };
        let mut words = [[_mm512_setzero_si512(); LINES]; 2];
        let held = if k_apart == 1 { Layout::Rows } else { Layout::Pairs };
        for i in 0..LINES {
            let (mut x, mut y) = match held {
                Layout::Rows if i < lines => {
                    (load(i * line_apart, depth.min(16)), load(i * line_apart + 16, depth.saturating_sub(16)))
                }
                Layout::Pairs if 2 * i < depth => (
                    load(2 * i * k_apart, lines),
                    load((2 * i + 1) * k_apart, if 2 * i + 1 < depth { lines } else { 0 }),
                ),
                _ => break,
            };
            for words in &mut words[..tiles.len()] {
                let (p, q) = (first_part(&mut x), first_part(&mut y));
                words[i] = match held {
                    Layout::Rows => {
                        let (p, q) = (_mm512_cvtepi32_epi16(p), _mm512_cvtepi32_epi16(q));
                        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(p), q)
                    }
                    Layout::Pairs => _mm512_or_si512(p, _mm512_slli_epi32::<16>(q)),
                };
            }
        }
        for (tile, words) in tiles.iter_mut().zip(&words) {
            let words = if held == layout { *words } else { transpose(*words) };
            for (row, word) in tile.0.iter_mut().zip(words) {
                // SAFETY: a row is 16 words, aligned.
                unsafe { _mm512_store_si512(row.as_mut_ptr().cast(), word) }
            }
        }
    }
}

/// The nearest bf16 of each number, in the lower half of a word, and in `x` what it leaves over
/// (nothing of what is not finite).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn first_part(x: &mut __m512) -> __m512i {
    // SAFETY: both are 256 bits wide.
    let near: __m256i = unsafe { std::mem::transmute(_mm512_cvtneps_pbh(*x)) };
    let word = _mm512_cvtepu16_epi32(near);
    let value = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(word));
    let infinity = _mm512_set1_ps(f32::INFINITY);
    let finite = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_abs_ps(value), infinity);
    *x = _mm512_maskz_sub_ps(finite, *x, value);
    word
}

/// A block of the result, and where it goes.
#[derive(Clone, Copy)]
struct Block<'a> {
    rows: usize,
    cols: usize,
    to: Place<'a>,
}

/// Multiplies packed matrices whose lines have `line` tiles each.
fn multiply(a: &[Tile], b: &[Tile], line: usize, parts: usize, block: Block, parallel: bool) {
    let (high, wide) = (block.rows.div_ceil(2 * LINES), block.cols.div_ceil(2 * LINES));
    let threads = if parallel { rayon::current_num_threads() } else { 1 };
    // Squares of 2 × 2 tiles in a task: few rows, so that they stay in the second-level cache, and a
    // few tasks per thread.
    let (mut rows, mut cols) = (high.min(8), wide);
    while parallel && high.div_ceil(rows) * wide.div_ceil(cols) < 3 * threads && rows * cols > 1 {
        match rows > cols {
            true => rows = rows.div_ceil(2),
            false => cols = cols.div_ceil(2),
        }
    }
    let across = wide.div_ceil(cols);
    let task = |t: usize| {
        let (top, left) = (t / across * rows, t % across * cols);
        let _tiles = Configured::new();
        for x in left..(left + cols).min(wide) {
            for y in top..(top + rows).min(high) {
                // SAFETY: the tiles are configured, and no two squares share an element.
                unsafe { square(a, b, line, parts, block, y, x) }
            }
        }
    };
    let tasks = high.div_ceil(rows) * across;
    match parallel {
        true => (0..tasks).into_par_iter().for_each(task),
        false => (0..tasks).for_each(task),
    }
}

/// This thread's tiles, set up as eight of 16 rows of 64 bytes while this is alive.
struct Configured;

impl Configured {
    fn new() -> Self {
        #[repr(C, align(64))]
        struct Config {
            palette: u8,
            start: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        let mut config =
            Config { palette: 1, start: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].fill(64);
        config.rows[..8].fill(16);
        // SAFETY: `multiply` runs only where `available` said yes; the configuration is 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
        Self
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: as in `new`. Without this the kernel would save tiles at each switch.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// A loop over the tiles of two lines of `a` and two of `b`: sums in tmm0 to tmm3, tiles of `a` in tmm4
/// and tmm5, of `b` in tmm6 and tmm7.
macro_rules! sum_tiles {
    ($a:ident, $b:ident, $count:ident, $bytes:literal, $sums:ident, [$($step:expr),*]) => {
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "2:",
            $($step,)*
            concat!("add {a0}, ", $bytes), concat!("add {a1}, ", $bytes),
            concat!("add {b0}, ", $bytes), concat!("add {b1}, ", $bytes),
            "dec {count}",
            "jnz 2b",
            "tilestored [{sums} + {apart}], tmm0",
            "tilestored [{sums} + {apart} + 1024], tmm1",
            "tilestored [{sums} + {apart} + 2048], tmm2",
            "tilestored [{sums} + {apart} + 3072], tmm3",
            a0 = inout(reg) $a[0] => _, a1 = inout(reg) $a[1] => _,
            b0 = inout(reg) $b[0] => _, b1 = inout(reg) $b[1] => _,
            count = inout(reg) $count => _,
            sums = in(reg) &mut $sums, apart = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        )
    };
}

macro_rules! load_a {
    ($part:literal) => {
        concat!(
            "tileloadd tmm4, [{a0} + {apart} + 1024*",
            $part,
            "]\n",
            "tileloadd tmm5, [{a1} + {apart} + 1024*",
            $part,
            "]"
        )
    };
}

macro_rules! with_b {
    ($part:literal) => {
        concat!(
            "tileloadd tmm6, [{b0} + {apart} + 1024*",
            $part,
            "]\n",
            "tileloadd tmm7, [{b1} + {apart} + 1024*",
            $part,
            "]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            "tdpbf16ps tmm3, tmm5, tmm7"
        )
    };
}

/// Square `(y, x)` of 2 × 2 tiles of the result; of an odd line of tiles, the line itself twice.
///
/// # Safety
/// This thread's tiles must be [`Configured`], and no other thread may touch the square.
unsafe fn square(a: &[Tile], b: &[Tile], line: usize, parts: usize, block: Block, y: usize, x: usize) {
    let Block { rows: all_rows, cols: all_cols, to } = block;
    let lines = |of: &[Tile], first: usize, count: usize| {
        [first, (first + 1).min(count - 1)].map(|i| of[i * line..(i + 1) * line].as_ptr())
    };
    let a = lines(a, 2 * y, all_rows.div_ceil(LINES));
    let b = lines(b, 2 * x, all_cols.div_ceil(LINES));
    let count = line / parts;
    let mut sums = Sums([[[0.; LINES]; LINES]; 4]);
    // SAFETY: each pointer is followed by `count` times `parts` tiles, and `sums` is four.
    unsafe {
        match parts {
            1 => sum_tiles!(a, b, count, "1024", sums, [load_a!("0"), with_b!("0")]),
            _ => sum_tiles!(
                a,
                b,
                count,
                "2048",
                sums,
                [load_a!("0"), with_b!("0"), with_b!("1"), load_a!("1"), with_b!("0")]
            ),
        }
    }
    for (i, sums) in sums.0.iter().enumerate() {
        let (row, col) = ((2 * y + i / 2) * LINES, (2 * x + i % 2) * LINES);
        let cols = all_cols.saturating_sub(col).min(LINES);
        if cols == 0 {
            continue;
        }
        for (r, sums) in sums.iter().enumerate().take(all_rows.saturating_sub(row)) {
            let at = to.at + (row + r) * to.apart + col;
            let scaled = sums.map(|s| to.scale * s);
            // SAFETY: this square's elements are this thread's alone.
            unsafe {
                match to.add {
                    true => to.out.add_at(at, &scaled[..cols]),
                    // There need not be anything yet.
                    false => to.out.put(at, &scaled[..cols]),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::cpu::{Mat, Out};
    use crate::nn::gradcheck::random;

    #[test]
    fn products_are_right_to_what_their_parts_hold() -> candle_core::Result<()> {
        if !available() {
            eprintln!("not run: this CPU has no AMX");
            return Ok(());
        }
        for (m, n, k) in [(1, 1, 1), (5, 7, 3), (16, 16, 32), (17, 33, 31), (100, 65, 192), (300, 130, 97)] {
            let of = |rows: usize, cols: usize, seed| -> candle_core::Result<Vec<f32>> {
                random(3 * rows * cols, seed)?.to_vec1()
            };
            let (a, b) = (of(m, k, 1)?, of(k, n, 2)?);
            // Row by row, column by column, and neither.
            let a_mats = [
                Mat::rows(&a, k),
                Mat::rows(&a, m).t(),
                Mat { data: &a, rows_apart: 3 * k - 1, cols_apart: 3 },
            ];
            let b_mats = [
                Mat::rows(&b, n),
                Mat::rows(&b, k).t(),
                Mat { data: &b, rows_apart: 3 * n - 1, cols_apart: 3 },
            ];
            for (a, b) in a_mats.iter().flat_map(|a| b_mats.iter().map(move |b| (*a, *b))) {
                let value = |m: Mat, i: usize, j: usize| m.data[i * m.rows_apart + j * m.cols_apart] as f64;
                // Each sum, and that of its terms' sizes.
                let exact: Vec<(f64, f64)> = (0..m * n)
                    .map(|at| {
                        let terms = (0..k).map(|x| value(a, at / n, x) * value(b, x, at % n));
                        terms.fold((0., 0.), |(sum, sizes), t| (sum + t, sizes + t.abs()))
                    })
                    .collect();
                for (parts, error) in [(1, 2f64.powi(-7)), (2, 2f64.powi(-15))] {
                    for parallel in [false, true] {
                        // Rows 3 apart from their neighbours; what lies between is not touched.
                        let mut c = vec![1f32; m * (n + 3)];
                        let of = Product { parallel, ..Product::new((m, n, k), a, b) };
                        let to = Place::new(Out::new(&mut c), 0, n + 3).adding(true).scaled(2.);
                        // SAFETY: the matrices hold these sizes, and `c` the result.
                        unsafe { product(of, parts, to) };
                        for (row, exact) in c.chunks(n + 3).zip(exact.chunks(n)) {
                            for (c, (sum, sizes)) in row.iter().zip(exact) {
                                let off = (*c as f64 - 1. - 2. * sum).abs();
                                assert!(off <= error * 2. * sizes + 1e-6, "{m} {n} {k} {parts}: {c} {sum}");
                            }
                            assert_eq!(row[n..], [1.; 3]);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn what_is_not_finite_gives_nothing_finite_and_stays_in_its_row() {
        if !available() {
            eprintln!("not run: this CPU has no AMX");
            return;
        }
        for value in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            let mut a = vec![1f32; 32 * 32];
            a[5 * 32 + 7] = value;
            let b = vec![1f32; 32 * 32];
            for parts in 1..=2 {
                let mut c = vec![0f32; 32 * 32];
                let of = Product::new((32, 32, 32), Mat::rows(&a, 32), Mat::rows(&b, 32));
                // SAFETY: the matrices hold these sizes, and `c` the result.
                unsafe { product(of, parts, Place::new(Out::new(&mut c), 0, 32)) };
                assert!(!c[5 * 32].is_finite(), "{value} {}", c[5 * 32]);
                assert!(c[..5 * 32].iter().chain(&c[6 * 32..]).all(|c| *c == 32.));
            }
        }
    }
}
