//! f32 matrix products on AVX2 with FMA and on AVX-512, in the way of Goto & van de Geijn 2008 ("Anatomy of
//! High-Performance Matrix Multiplication").
//!
//! Both matrices are packed: `b` into panels of 16 columns (32 on AVX-512), of which a group stays in a core's own
//! cache, a part of `k` deep; `a` 6 rows (12) at a time, which stay in the innermost cache while they meet the group.
//! A kernel keeps 6 × 16 sums (12 × 32) in registers. The `gemm` crate multiplies on other processors; on these it was
//! slower (`scripts/peers.py --only vitl_1800` shows it): each thread has one share there, and the slowest is waited
//! for, and a factor of several products is packed for each of them (see [`Panels`]).
//!
//! An element is summed over `k` in one order, whatever else is in the matrices and however many threads there
//! are; but products of a few rows or columns are not made here (see `cpu`).

use super::cpu::{Mat, Out, Place, Product};
use super::simd::{mask16, transpose as sixteen_by_sixteen};
use rayon::prelude::*;
use std::arch::x86_64::*;
use std::cell::Cell;
use std::ops::Range;

/// Rows of `a` that meet a group of panels, which then comes from the cache that cores share once for them all.
const BLOCK: usize = 480;
/// Panels that meet a few rows of `a`: 256 KiB of a core's own cache, or 768.
const GROUP: usize = 16;
/// Numbers of `b` that are packed at once: 16 MiB, of the cache that cores share or beyond it, as they are read in
/// order.
const PACKED: usize = 1 << 22;
/// Panels of `b` from which on packing `a` is worth it, where its rows lie along `k`.
const MANY: usize = 8;
/// Rows this many numbers apart meet in few places of the innermost cache.
const CROWDED: usize = 256;
/// Panels that are packed in one task at most, and how far they go along `k` one after another: of rows that lie across
/// `k` each is a page of memory, which all panels visit before the next ones are.
const MOST_PANELS: usize = 8;
const PAGES: usize = 128;
/// Panels of `b` that are packed at once at least.
const LEAST_PANELS: usize = 4;
/// Products below this many multiplications are not worth a second thread.
const WORTH_A_THREAD: usize = 1 << 20;
/// Tasks a thread, for threads are not equally fast.
const TASKS: usize = 4;

/// Whether this processor has the instructions.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

fn wide_available() -> bool {
    is_x86_feature_detected!("avx512f")
}

/// A kernel's instructions and its rows and columns: 12 registers of sums, 2 of `b`, 1 of `a`; or twice as many
/// of sums.
trait Kernel {
    const ROWS: usize;
    const COLS: usize;
    /// Of `k` at once: few rows of `a` are 6 KiB of the innermost cache, or 18.
    const DEPTH: usize;

    /// [`Lines::pack`] of as many lines as the kernel has rows.
    ///
    /// # Safety
    /// As of `pack`.
    unsafe fn pack_rows(a: Lines, line: usize, part: (usize, usize), to: *mut f32);

    /// The same of columns.
    ///
    /// # Safety
    /// As of `pack`.
    unsafe fn pack_cols(b: Lines, line: usize, part: (usize, usize), to: *mut f32);

    /// The first rows of `count`, as many as the kernel has, by `cols` columns of the panel `b`, `depth` deep: `a`
    /// is packed, or its rows are so far apart.
    ///
    /// # Safety
    /// The processor must have the kernel's instructions; `b` must be a packed panel, aligned by 64 bytes; `a` one
    /// if `PACKED`, else rows of `depth` numbers; and as many rows of `cols` numbers of the result be there and
    /// this call's alone.
    unsafe fn multiply<const PACKED: bool>(
        count: usize,
        depth: usize,
        a: (*const f32, usize),
        b: *const f32,
        to: Place,
        cols: usize,
    );
}

struct Avx2;
struct Avx512;

macro_rules! for_rows {
    ($kernel:ident, $count:expr, $args:tt, $($r:literal)*, $most:literal) => {
        match $count {
            $($r => $kernel::<$r, P> $args,)*
            _ => $kernel::<$most, P> $args,
        }
    };
}

impl Kernel for Avx2 {
    const ROWS: usize = 6;
    const COLS: usize = 16;
    const DEPTH: usize = 256;

    unsafe fn pack_rows(a: Lines, line: usize, part: (usize, usize), to: *mut f32) {
        // SAFETY: by the caller's word.
        unsafe { a.pack::<6>(line, part, to) }
    }

    unsafe fn pack_cols(b: Lines, line: usize, part: (usize, usize), to: *mut f32) {
        // SAFETY: by the caller's word.
        unsafe { b.pack::<16>(line, part, to) }
    }

    unsafe fn multiply<const P: bool>(
        count: usize,
        depth: usize,
        a: (*const f32, usize),
        b: *const f32,
        to: Place,
        cols: usize,
    ) {
        // SAFETY: by the caller's word.
        unsafe { for_rows!(narrow, count, (depth, a, b, to, cols), 1 2 3 4 5, 6) }
    }
}

impl Kernel for Avx512 {
    const ROWS: usize = 12;
    const COLS: usize = 32;
    const DEPTH: usize = 384;

    unsafe fn pack_rows(a: Lines, line: usize, part: (usize, usize), to: *mut f32) {
        // SAFETY: by the caller's word.
        unsafe { a.pack_wide::<12>(line, part, to) }
    }

    unsafe fn pack_cols(b: Lines, line: usize, part: (usize, usize), to: *mut f32) {
        // SAFETY: by the caller's word.
        unsafe { b.pack_wide::<32>(line, part, to) }
    }

    unsafe fn multiply<const P: bool>(
        count: usize,
        depth: usize,
        a: (*const f32, usize),
        b: *const f32,
        to: Place,
        cols: usize,
    ) {
        // SAFETY: by the caller's word.
        unsafe { for_rows!(wide, count, (depth, a, b, to, cols), 1 2 3 4 5 6 7 8 9 10 11, 12) }
    }
}

thread_local! {
    /// Room for the blocks of `a` and panels of `b` of a thread's next product. Taken while in use, since a
    /// thread that waits may be given another product.
    static ROOM: [Cell<Vec<Line>>; 2] = const { [Cell::new(vec![]), Cell::new(vec![])] };
}

/// A cache line, by which packed matrices are aligned.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([f32; Self::LEN]);

impl Line {
    const LEN: usize = 16;
}

/// `f` with room for `len` numbers, of unknown values.
fn with_room<T>(which: usize, len: usize, f: impl FnOnce(Out) -> T) -> T {
    let mut room = ROOM.with(|r| r[which].take());
    let lines = len.div_ceil(Line::LEN);
    if room.len() < lines {
        room.resize(lines, Line([0.; Line::LEN]));
    }
    let result = f(Out { ptr: room.as_mut_ptr().cast(), len: room.len() * Line::LEN });
    ROOM.with(|r| r[which].set(room));
    result
}

/// Makes the product.
///
/// # Safety
/// The processor must have AVX2 and FMA; the slices must hold matrices of these sizes, and `to` the result; its
/// buffer must be alive and no other thread may touch these elements meanwhile.
pub(super) unsafe fn product(of: Product, to: Place) {
    // SAFETY: by the caller's word.
    unsafe {
        match wide_available() {
            true => product_by::<Avx512>(of, to),
            false => product_by::<Avx2>(of, to),
        }
    }
}

/// # Safety
/// As of [`product`], and the processor must have the kernel's instructions.
unsafe fn product_by<K: Kernel>(Product { sizes: (m, n, k), a, b, parallel }: Product, to: Place) {
    assert!(m > 0 && n > 0 && k > 0);
    let threads = match parallel && m * n * k >= WORTH_A_THREAD {
        true => rayon::current_num_threads(),
        false => 1,
    };
    let (a, b) = (Lines::rows(a, m), Lines::rows(b.t(), n));
    // Parts of one size, nearly.
    let most = (PACKED / k).max(LEAST_PANELS * K::COLS);
    let width = n.div_ceil(n.div_ceil(most)).next_multiple_of(K::COLS);
    with_room(1, width * k, |panels| {
        for first in (0..n).step_by(width) {
            let b = Lines { first, count: width.min(n - first), ..b };
            // SAFETY: by the caller's word; the room is this call's alone.
            unsafe {
                pack::<K>(b, k, panels, threads);
                let panels = Packed { first: panels.ptr, depth: k, cols: b.count };
                multiply::<K>(a, (0, k), panels, to.right(first), threads);
            }
        }
    });
}

/// `b` in panels, each all of `k` deep.
///
/// # Safety
/// As of [`product_by`]; `panels` has room for them, and is this call's alone.
unsafe fn pack<K: Kernel>(b: Lines, k: usize, panels: Out, threads: usize) {
    let count = b.count.div_ceil(K::COLS);
    let together = count.div_ceil(threads * TASKS).min(MOST_PANELS);
    let pack = |i: usize| {
        for from in (0..k).step_by(PAGES) {
            for panel in i * together..((i + 1) * together).min(count) {
                let part = (from, PAGES.min(k - from));
                // SAFETY: as above; each panel is one call's.
                unsafe { K::pack_cols(b, panel * K::COLS, part, panels.place((panel * k + from) * K::COLS)) }
            }
        }
    };
    match threads {
        1 => (0..count.div_ceil(together)).for_each(pack),
        _ => (0..count.div_ceil(together)).into_par_iter().for_each(pack),
    }
}

/// `b` as [`pack`] left it.
#[derive(Clone, Copy)]
struct Packed {
    first: *const f32,
    /// Numbers of a column.
    depth: usize,
    cols: usize,
}

impl Packed {
    /// Panel `panel` from number `from` of its columns on.
    fn panel<K: Kernel>(self, panel: usize, from: usize) -> *const f32 {
        self.first.wrapping_add((panel * self.depth + from) * K::COLS)
    }
}

// SAFETY: nobody writes the panels while they are shared.
unsafe impl Send for Packed {}
// SAFETY: as above.
unsafe impl Sync for Packed {}

/// `a b` over `k` numbers, from `skip` on in `b`.
///
/// # Safety
/// As of [`product_by`]; the panels must be there and have so many numbers.
unsafe fn multiply<K: Kernel>(a: Lines, (skip, k): (usize, usize), b: Packed, to: Place, threads: usize) {
    let count = b.cols.div_ceil(K::COLS);
    let least = if threads > 1 { threads * TASKS } else { 1 };
    // Columns in groups; then fewer rows to a block where there would be too few.
    let group = count.div_ceil(count.div_ceil(GROUP));
    let groups = count.div_ceil(group);
    let block = a.count.div_ceil(least.div_ceil(groups).max(a.count.div_ceil(BLOCK)));
    let block = block.next_multiple_of(K::ROWS);
    let blocks = a.count.div_ceil(block);
    let packed = count >= MANY || a.k_apart != 1 || a.apart.is_multiple_of(CROWDED);
    // Parts of one size, nearly.
    let part = k.div_ceil(k.div_ceil(K::DEPTH));
    let task = |task: usize| {
        let (row, first) = (task / groups * block, task % groups * group);
        let a = Lines { first: a.first + row, count: block.min(a.count - row), ..a };
        // The last panel's last numbers are written a register at a time.
        with_room(0, K::ROWS * part + 8, |room| {
            for from in (0..k).step_by(part) {
                let depth = part.min(k - from);
                for r in (0..a.count).step_by(K::ROWS) {
                    let to = to.below(row + r).after(from);
                    let rows = match packed {
                        true => {
                            // SAFETY: as above; the room is this task's alone.
                            unsafe { K::pack_rows(a, r, (from, depth), room.place(0)) };
                            (room.ptr.cast_const(), 0)
                        }
                        false => a.in_place(r, K::ROWS, (from, depth)),
                    };
                    for panel in first..(first + group).min(count) {
                        let col = panel * K::COLS;
                        let (to, cols) = (to.right(col), K::COLS.min(b.cols - col));
                        let b = b.panel::<K>(panel, skip + from);
                        // SAFETY: as above; these elements are this task's.
                        unsafe {
                            match packed {
                                true => K::multiply::<true>(a.count - r, depth, rows, b, to, cols),
                                false => K::multiply::<false>(a.count - r, depth, rows, b, to, cols),
                            }
                        }
                    }
                }
            }
        });
    };
    match threads {
        1 => (0..blocks * groups).for_each(task),
        _ => (0..blocks * groups).into_par_iter().with_max_len(1).for_each(task),
    }
}

/// Right factors of one size, packed for as many products as are wanted.
pub(super) struct Panels {
    lines: Vec<Line>,
    /// `(k, n)`.
    size: (usize, usize),
}

impl Panels {
    /// `count` matrices `[k, n]`.
    ///
    /// # Safety
    /// The processor must have AVX2 and FMA, and the slices hold the matrices.
    pub unsafe fn new<'a>(count: usize, size: (usize, usize), of: impl Fn(usize) -> Mat<'a> + Sync) -> Self {
        // SAFETY: by the caller's word.
        unsafe {
            match wide_available() {
                true => Self::by::<Avx512>(count, size, of),
                false => Self::by::<Avx2>(count, size, of),
            }
        }
    }

    /// # Safety
    /// As of [`new`](Self::new), for the kernel's instructions.
    unsafe fn by<'a, K: Kernel>(
        count: usize,
        (k, n): (usize, usize),
        of: impl Fn(usize) -> Mat<'a> + Sync,
    ) -> Self {
        let each = Self::numbers::<K>((k, n));
        let mut lines = Vec::<Line>::with_capacity(count * each / Line::LEN);
        let room = Out { ptr: lines.as_mut_ptr().cast(), len: count * each };
        (0..count).into_par_iter().for_each(|i| {
            let room = Out { ptr: room.place(i * each), len: each };
            // SAFETY: by the caller's word; this part of the room is this task's alone.
            unsafe { pack::<K>(Lines::rows(of(i).t(), n), k, room, 1) }
        });
        // SAFETY: every number of them is written, those of columns that are none, too.
        unsafe { lines.set_len(count * each / Line::LEN) };
        Self { lines, size: (k, n) }
    }

    /// Of a matrix: a multiple of a line's, as a panel has at least one line of columns.
    fn numbers<K: Kernel>((k, n): (usize, usize)) -> usize {
        n.next_multiple_of(K::COLS) * k
    }

    /// The product of `a`, `[m, ks]`, with rows `ks` and columns `cols` of a matrix, from a whole panel on; on this
    /// thread.
    ///
    /// # Safety
    /// As of [`product`].
    pub unsafe fn product(
        &self,
        which: usize,
        part: (Range<usize>, Range<usize>),
        a: (Mat, usize),
        to: Place,
    ) {
        // SAFETY: by the caller's word.
        unsafe {
            match wide_available() {
                true => self.product_by::<Avx512>(which, part, a, to),
                false => self.product_by::<Avx2>(which, part, a, to),
            }
        }
    }

    /// # Safety
    /// As of [`product_by`].
    unsafe fn product_by<K: Kernel>(
        &self,
        which: usize,
        (ks, cols): (Range<usize>, Range<usize>),
        (a, m): (Mat, usize),
        to: Place,
    ) {
        let each = Self::numbers::<K>(self.size);
        assert!(ks.end <= self.size.0 && cols.end <= self.size.1 && cols.start.is_multiple_of(K::COLS));
        assert!(!ks.is_empty() && m > 0 && (which + 1) * each <= self.lines.len() * Line::LEN);
        let first = self.lines.as_ptr().cast::<f32>().wrapping_add(which * each + cols.start * self.size.0);
        let panels = Packed { first, depth: self.size.0, cols: cols.len() };
        // SAFETY: the panels are there as asserted; the rest by the caller's word.
        unsafe { multiply::<K>(Lines::rows(a, m), (ks.start, ks.len()), panels, to, 1) }
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

impl<'a> Lines<'a> {
    /// The rows of a matrix.
    fn rows(of: Mat<'a>, count: usize) -> Self {
        Self { data: of.data, apart: of.rows_apart, k_apart: of.cols_apart, first: 0, count }
    }

    /// Up to `most` from `line` on, where their numbers lie, and how far apart.
    fn in_place(self, line: usize, most: usize, part: (usize, usize)) -> (*const f32, usize) {
        assert!(self.k_apart == 1);
        (self.start(line, most.min(self.count - line), part), self.apart)
    }

    /// The first of `lines` from `line` on, of which `depth` numbers from `from` on are inside the slice.
    fn start(self, line: usize, lines: usize, (from, depth): (usize, usize)) -> *const f32 {
        let first = (self.first + line) * self.apart + from * self.k_apart;
        assert!(first + (lines - 1) * self.apart + (depth - 1) * self.k_apart < self.data.len());
        self.data[first..].as_ptr()
    }

    /// [`pack`](Self::pack) of `lines` of `W` lines and of `k` from `skip` on, one number after another.
    ///
    /// # Safety
    /// As of `pack`; `data` must be the first number.
    #[inline(always)]
    unsafe fn one_by_one<const W: usize>(
        self,
        data: *const f32,
        lines: usize,
        skip: usize,
        depth: usize,
        to: *mut f32,
    ) {
        for k in skip..depth {
            for l in 0..W {
                // SAFETY: by the caller's word.
                unsafe {
                    let x = if l < lines { *data.add(l * self.apart + k * self.k_apart) } else { 0. };
                    *to.add(k * W + l) = x;
                }
            }
        }
    }

    /// Packs `W` lines from `line` on, `depth` numbers of each from `from` on: the first of all lines, then the
    /// second. Zeros stand for lines that are none.
    ///
    /// # Safety
    /// The processor must have AVX2 and FMA; the slice must hold the lines, and `to` have room for `W · depth`
    /// numbers, and for two more unless `W` is a multiple of eight.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn pack<const W: usize>(self, line: usize, part: (usize, usize), to: *mut f32) {
        let (lines, depth) = (W.min(self.count - line), part.1);
        let data = self.start(line, lines, part);
        // SAFETY: what is read is inside the slice, as `start` found; what is written by the caller's word.
        unsafe {
            if lines == W && self.apart == 1 {
                for k in 0..depth {
                    data.add(k * self.k_apart).copy_to_nonoverlapping(to.add(k * W), W);
                }
            } else if lines == W && self.k_apart == 1 {
                let whole = depth / 8 * 8;
                for k in (0..whole).step_by(8) {
                    for half in (0..W).step_by(8) {
                        let mut eight = [_mm256_setzero_ps(); 8];
                        for (l, line) in eight.iter_mut().enumerate().take(W - half) {
                            *line = _mm256_loadu_ps(data.add((half + l) * self.apart + k));
                        }
                        // Of 6 lines each store is overwritten, from its seventh number on, by the next.
                        for (i, numbers) in transpose(eight).into_iter().enumerate() {
                            _mm256_storeu_ps(to.add((k + i) * W + half), numbers);
                        }
                    }
                }
                self.one_by_one::<W>(data, lines, whole, depth, to);
            } else {
                self.one_by_one::<W>(data, lines, 0, depth, to);
            }
        }
    }

    /// [`pack`](Self::pack) with registers of sixteen numbers.
    ///
    /// # Safety
    /// The processor must have AVX-512; the slice must hold the lines, and `to` have room for `W · depth` numbers,
    /// and for four more unless `W` is a multiple of sixteen.
    #[target_feature(enable = "avx512f")]
    unsafe fn pack_wide<const W: usize>(self, line: usize, part: (usize, usize), to: *mut f32) {
        /// Numbers of a line that are asked for before they are read: the lines are too many for the processor to
        /// see it coming.
        const SOON: usize = 64;
        let (lines, depth) = (W.min(self.count - line), part.1);
        let data = self.start(line, lines, part);
        // SAFETY: what is read is inside the slice, as `start` found; what is written by the caller's word.
        unsafe {
            if lines == W && self.apart == 1 {
                for k in 0..depth {
                    data.add(k * self.k_apart).copy_to_nonoverlapping(to.add(k * W), W);
                }
            } else if self.k_apart == 1 {
                for k in (0..depth).step_by(16) {
                    let deep = 16.min(depth - k);
                    for group in (0..W).step_by(16) {
                        let mut rows = [_mm512_setzero_si512(); 16];
                        for (l, row) in rows.iter_mut().enumerate().take(lines.saturating_sub(group).min(16))
                        {
                            let at = data.add((group + l) * self.apart + k);
                            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(SOON).cast());
                            *row = _mm512_castps_si512(_mm512_maskz_loadu_ps(mask16(deep), at));
                        }
                        // Of 12 lines each store is overwritten, from its thirteenth number on, by the next.
                        for (i, numbers) in sixteen_by_sixteen(rows).into_iter().enumerate().take(deep) {
                            _mm512_storeu_ps(to.add((k + i) * W + group), _mm512_castsi512_ps(numbers));
                        }
                    }
                }
            } else {
                self.one_by_one::<W>(data, lines, 0, depth, to);
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

/// Asks for `rows` of the result before they are written.
#[inline(always)]
fn ask_for_rows(out: *const f32, rows: usize, apart: usize, cols: usize) {
    for r in 0..rows {
        let row = out.wrapping_add(r * apart);
        // SAFETY: hints, which read nothing, wherever they point.
        unsafe {
            for c in (0..cols).step_by(16) {
                _mm_prefetch::<_MM_HINT_T1>(row.wrapping_add(c).cast());
            }
            _mm_prefetch::<_MM_HINT_T1>(row.wrapping_add(cols - 1).cast());
        }
    }
}

/// `R` rows of `a` by 16 columns of `b`, of which `cols` are wanted.
///
/// # Safety
/// As of [`Kernel::multiply`], with `R` rows.
#[target_feature(enable = "avx2,fma")]
unsafe fn narrow<const R: usize, const PACKED: bool>(
    depth: usize,
    (a, a_apart): (*const f32, usize),
    b: *const f32,
    to: Place,
    cols: usize,
) {
    const ROWS: usize = 6;
    const COLS: usize = 16;
    assert!(to.at + (R - 1) * to.apart + cols <= to.out.len && cols <= COLS);
    assert!(to.bias.is_none_or(|b| b.len() >= cols));
    // SAFETY: in bounds by the caller's word and as asserted.
    unsafe {
        let out = to.out.place(to.at);
        ask_for_rows(out, R, to.apart, cols);
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
                    let sum = match (to.add, to.bias) {
                        (true, _) => _mm256_fmadd_ps(*sum, scale, _mm256_loadu_ps(out)),
                        (_, Some(b)) => {
                            _mm256_fmadd_ps(*sum, scale, _mm256_loadu_ps(b.as_ptr().add(8 * half)))
                        }
                        _ => _mm256_mul_ps(*sum, scale),
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
                *out = match (to.add, to.bias) {
                    (true, _) => sum.mul_add(to.scale, *out),
                    (_, Some(b)) => sum.mul_add(to.scale, b[c]),
                    _ => sum * to.scale,
                };
            }
        }
    }
}

/// `R` rows of `a` by 32 columns of `b`, of which `cols` are wanted.
///
/// # Safety
/// As of [`Kernel::multiply`], with `R` rows.
#[target_feature(enable = "avx512f")]
unsafe fn wide<const R: usize, const PACKED: bool>(
    depth: usize,
    (a, a_apart): (*const f32, usize),
    b: *const f32,
    to: Place,
    cols: usize,
) {
    const ROWS: usize = 12;
    const COLS: usize = 32;
    /// Of `k`: a panel comes from a core's own cache, and is asked for so much before it is needed; the first time
    /// from that which cores share, which takes longer.
    const SOON: usize = 6;
    const LATER: usize = 64;
    assert!(to.at + (R - 1) * to.apart + cols <= to.out.len && cols <= COLS);
    assert!(to.bias.is_none_or(|b| b.len() >= cols));
    // SAFETY: in bounds by the caller's word and as asserted.
    unsafe {
        let out = to.out.place(to.at);
        ask_for_rows(out, R, to.apart, cols);
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        for k in 0..depth {
            let (soon, later) = (b.wrapping_add((k + SOON) * COLS), b.wrapping_add((k + LATER) * COLS));
            _mm_prefetch::<_MM_HINT_T0>(soon.cast());
            _mm_prefetch::<_MM_HINT_T0>(soon.wrapping_add(16).cast());
            _mm_prefetch::<_MM_HINT_T1>(later.cast());
            _mm_prefetch::<_MM_HINT_T1>(later.wrapping_add(16).cast());
            let b = [_mm512_load_ps(b.add(k * COLS)), _mm512_load_ps(b.add(k * COLS + 16))];
            for (r, sums) in sums.iter_mut().enumerate() {
                let at = if PACKED { k * ROWS + r } else { r * a_apart + k };
                let a = _mm512_set1_ps(*a.add(at));
                sums[0] = _mm512_fmadd_ps(a, b[0], sums[0]);
                sums[1] = _mm512_fmadd_ps(a, b[1], sums[1]);
            }
        }
        let scale = _mm512_set1_ps(to.scale);
        let masks = [mask16(cols), mask16(cols.saturating_sub(16))];
        for (r, sums) in sums.iter().enumerate() {
            for (half, (sum, mask)) in sums.iter().zip(masks).enumerate() {
                let out = out.add(r * to.apart).wrapping_add(16 * half);
                let before = |at: *const f32| _mm512_maskz_loadu_ps(mask, at);
                let sum = match (to.add, to.bias) {
                    (true, _) => _mm512_fmadd_ps(*sum, scale, before(out)),
                    (_, Some(b)) => _mm512_fmadd_ps(*sum, scale, before(b.as_ptr().wrapping_add(16 * half))),
                    _ => _mm512_mul_ps(*sum, scale),
                };
                _mm512_mask_storeu_ps(out, mask, sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::random;

    type Strides = (usize, usize);

    /// `0.5 a b + c`, or with a bias in place of `c`, and the same in f64.
    fn check<K: Kernel>(
        (m, n, k): (usize, usize, usize),
        a_t: bool,
        b_t: bool,
        add: bool,
    ) -> candle_core::Result<()> {
        let numbers = |n: usize, seed: u64| random(n, seed)?.flatten_all()?.to_vec1::<f32>();
        let (a, b) = (numbers(m * k, 1)?, numbers(k * n, 2)?);
        let (a_at, b_at): (Strides, Strides) =
            (if a_t { (1, m) } else { (k, 1) }, if b_t { (1, k) } else { (n, 1) });
        let mat = |data, at: Strides| Mat { data, rows_apart: at.0, cols_apart: at.1 };
        // Rows further apart than they are long, from the third number on.
        let apart = n + 3;
        let before = numbers(m * apart + 2, 3)?;
        let bias = numbers(n, 4)?;
        let run = |parallel: bool| {
            let mut c = before.clone();
            let of = Product { parallel, ..Product::new((m, n, k), mat(&a, a_at), mat(&b, b_at)) };
            let to = Place::new(Out::new(&mut c), 2, apart).adding(add).scaled(0.5);
            let to = Place { bias: (!add).then_some(&bias[..]), ..to };
            // SAFETY: the buffer is this function's, and the caller asked for the instructions.
            unsafe { product_by::<K>(of, to) };
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
            let want = 0.5 * (0..k).map(term).sum::<f64>() + f64::from(if add { *before } else { bias[c] });
            assert!((f64::from(*got) - want).abs() < 1e-6 * (k as f64 + 4.), "{m} {n} {k}: {got} {want}");
        }
        Ok(())
    }

    #[test]
    fn products_are_right_of_every_size_and_layout() -> candle_core::Result<()> {
        if available() {
            of_every_size_and_layout::<Avx2>()?;
        }
        if is_x86_feature_detected!("avx512f") {
            of_every_size_and_layout::<Avx512>()?;
        }
        Ok(())
    }

    fn of_every_size_and_layout<K: Kernel>() -> candle_core::Result<()> {
        for size in [
            (1, 1, 1),
            (6, 16, 8),
            (12, 32, 8),
            (11, 31, 17),
            (7, 19, 13),
            (2, 33, 300),
            (130, 35, 600),
            (3, 3092, 9),
            (250, 70, K::DEPTH),
            (64, 200, 2 * K::DEPTH + 1),
            (BLOCK + 20, 40, 31),
            (13, (GROUP + 2) * K::COLS, 20),
            (20, 40, CROWDED),
        ] {
            for (a_t, b_t) in [(false, false), (false, true), (true, false), (true, true)] {
                for add in [false, true] {
                    check::<K>(size, a_t, b_t, add)?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() -> candle_core::Result<()> {
        if available() {
            alone_as_among_others::<Avx2>()?;
        }
        if is_x86_feature_detected!("avx512f") {
            alone_as_among_others::<Avx512>()?;
        }
        Ok(())
    }

    fn alone_as_among_others<K: Kernel>() -> candle_core::Result<()> {
        let (n, k) = (70, 700);
        let (a, b) = (random((300, k), 1)?, random((n, k), 2)?);
        let (a, b) = (a.flatten_all()?.to_vec1::<f32>()?, b.flatten_all()?.to_vec1::<f32>()?);
        let of = |from: usize, rows: usize, cols: usize| {
            let mut c = vec![0.; rows * cols];
            let of = Product::new((rows, cols, k), Mat::rows(&a[from * k..], k), Mat::rows(&b, k).t());
            // SAFETY: as above.
            unsafe { product_by::<K>(of.parallel(), Place::new(Out::new(&mut c), 0, cols)) };
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

    #[test]
    fn columns_in_rounds_are_as_in_one() -> candle_core::Result<()> {
        if !available() {
            return Ok(());
        }
        // More than are packed at once.
        let (n, k) = (1100, PACKED / 1000);
        let (a, b) = (random((2, k), 1)?, random((k, 70), 2)?);
        let (a, b) = (a.flatten_all()?.to_vec1::<f32>()?, b.flatten_all()?.to_vec1::<f32>()?);
        // The same seventy columns again and again.
        let wide: Vec<f32> = b.chunks(70).flat_map(|row| row.iter().copied().cycle().take(n)).collect();
        let of = |b: &[f32], n: usize| {
            let mut c = vec![0.; 2 * n];
            let of = Product::new((2, n, k), Mat::rows(&a, k), Mat::rows(b, n));
            // SAFETY: as above.
            unsafe { product(of, Place::new(Out::new(&mut c), 0, n)) };
            c
        };
        let (narrow, wide) = (of(&b, 70), of(&wide, n));
        for (at, x) in wide.iter().enumerate() {
            assert!(*x == narrow[at / n * 70 + at % n % 70], "{at}");
        }
        Ok(())
    }

    #[test]
    fn parts_of_factors_laid_out_once_are_as_by_themselves() -> candle_core::Result<()> {
        if !available() {
            return Ok(());
        }
        let (m, k, n) = (29, 75, 100);
        let (a, b) = (random((m, k), 1)?, random((3, k, n), 2)?);
        let (a, b) = (a.flatten_all()?.to_vec1::<f32>()?, b.flatten_all()?.to_vec1::<f32>()?);
        let mat = |i: usize| Mat::rows(&b[i * k * n..][..k * n], n);
        // SAFETY: the processor has the instructions, and the slice three matrices.
        let panels = unsafe { Panels::new(3, (k, n), mat) };
        for which in 0..3 {
            for (ks, cols) in
                [(0..k, 0..n), (7..50, 0..33), (0..1, 32..64), (74..75, 96..100), (3..75, 64..99)]
            {
                let (depth, width) = (ks.len(), cols.len());
                let part = Mat { data: &mat(which).data[ks.start * n + cols.start..], ..mat(which) };
                let a = Mat::rows(&a, k);
                let (mut got, mut want) = (vec![0.; m * width], vec![0.; m * width]);
                // SAFETY: as above.
                unsafe {
                    panels.product(which, (ks, cols), (a, m), Place::new(Out::new(&mut got), 0, width));
                    let of = Product::new((m, width, depth), a, part);
                    product(of, Place::new(Out::new(&mut want), 0, width));
                }
                assert!(got == want, "{which} {depth} {width}");
            }
        }
        Ok(())
    }
}
