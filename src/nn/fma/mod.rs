//! f32 matrix products on AVX2 with FMA and on AVX-512, in the way of Goto & van de Geijn 2008 ("Anatomy of
//! High-Performance Matrix Multiplication").
//!
//! Both matrices are packed: `b` into panels of 16 columns (32 on AVX-512), of which a group stays in a core's own
//! cache, a part of `k` deep; `a` 6 rows (12) at a time, which stay in the innermost cache while they meet the group.
//! A kernel keeps 6 × 16 sums (12 × 32) in registers. The `gemm` crate multiplies on other processors. Its kernel for
//! AVX-512 is as fast; but there each thread has one share, and the slowest is waited for, and a factor of several
//! products is packed for each of them (see [`Panels`]).
//!
//! An element is summed over `k` in one order, whatever else is in the matrices and however many threads there
//! are; but products of a few rows or columns are not made here (see `cpu`).

mod kernels;
mod lines;

use super::cpu::{Mat, Out, Place, Product};
use kernels::{narrow, wide};
use lines::Lines;
use rayon::prelude::*;
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

/// A kernel by its functions; `$few` are its numbers of rows but for the most.
macro_rules! kernel {
    ($name:ident: $rows:literal by $cols:literal, $depth:literal deep, $pack:ident, $multiply:ident, $($few:literal)*) => {
        struct $name;

        impl Kernel for $name {
            const ROWS: usize = $rows;
            const COLS: usize = $cols;
            const DEPTH: usize = $depth;

            unsafe fn pack_rows(a: Lines, line: usize, part: (usize, usize), to: *mut f32) {
                // SAFETY: by the caller's word.
                unsafe { a.$pack::<$rows>(line, part, to) }
            }

            unsafe fn pack_cols(b: Lines, line: usize, part: (usize, usize), to: *mut f32) {
                // SAFETY: by the caller's word.
                unsafe { b.$pack::<$cols>(line, part, to) }
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
                unsafe {
                    match count {
                        $($few => $multiply::<$few, P>(depth, a, b, to, cols),)*
                        _ => $multiply::<$rows, P>(depth, a, b, to, cols),
                    }
                }
            }
        }
    };
}

kernel!(Avx2: 6 by 16, 256 deep, pack, narrow, 1 2 3 4 5);
kernel!(Avx512: 12 by 32, 384 deep, pack_wide, wide, 1 2 3 4 5 6 7 8 9 10 11);

thread_local! {
    /// Room for the rows of `a` and panels of `b` of a thread's next product. Taken while in use, since a
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
