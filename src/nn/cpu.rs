//! What the fused CPU ops share: access to tensors' values, strided matrix products, and how work
//! is cut into tasks.

use candle_core::{CpuStorage, DType, Layout, Result, Storage, StorageRef, Tensor};
use rayon::prelude::*;
use std::cell::Cell;
use std::ops::Range;

thread_local! {
    static COMPOSED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f` with this thread's ops composed of candle's, as they are on a device without fused kernels: for
/// tests of those compositions.
pub fn composed<T>(f: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            COMPOSED.set(self.0);
        }
    }
    let _restore = Restore(COMPOSED.replace(true));
    f()
}

/// Whether the fused kernels can take these tensors; else the op is composed of candle's.
pub(super) fn fused(ts: &[&Tensor]) -> bool {
    !COMPOSED.get() && ts.iter().all(|t| t.device().is_cpu() && t.dtype() == DType::F32)
}

/// The values of an op's argument, which must be contiguous.
pub(super) fn values<'a>(s: &'a CpuStorage, l: &Layout) -> Result<&'a [f32]> {
    match (s, l.contiguous_offsets()) {
        (CpuStorage::F32(v), Some((from, to))) => Ok(&v[from..to]),
        _ => candle_core::bail!("fused op: expected contiguous f32, got {l:?}"),
    }
}

/// A tensor held for reading, from its first element to the end of its storage.
pub(super) struct Held<'a> {
    storage: StorageRef<'a>,
    from: usize,
    len: Option<usize>,
}

impl<'a> Held<'a> {
    /// Contiguous f32 on the CPU.
    pub fn new(t: &'a Tensor) -> Result<Self> {
        let (storage, layout) = t.storage_and_layout();
        let Some((from, to)) = layout.contiguous_offsets() else {
            candle_core::bail!("fused op: expected a contiguous tensor, got {layout:?}")
        };
        Ok(Self { storage, from, len: Some(to - from) })
    }

    /// With any strides.
    pub fn strided(t: &'a Tensor) -> Self {
        let (storage, layout) = t.storage_and_layout();
        Self { storage, from: layout.start_offset(), len: None }
    }

    pub fn get(&self) -> Result<&[f32]> {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(v)) => Ok(match self.len {
                Some(n) => &v[self.from..self.from + n],
                None => &v[self.from..],
            }),
            _ => candle_core::bail!("fused op: expected f32 on the CPU"),
        }
    }
}

/// Rows per task, so that a task outweighs its scheduling.
pub(super) fn rows_per_task(row_len: usize) -> usize {
    (32_768 / row_len.max(1)).max(1)
}

/// Calls `f(first row, rows of out)` on tasks of whole rows, in parallel.
pub(super) fn par_rows(out: &mut [f32], row_len: usize, f: impl Fn(usize, &mut [f32]) + Sync + Send) {
    let rows = rows_per_task(row_len);
    out.par_chunks_mut((rows * row_len).max(1)).enumerate().for_each(|(i, o)| f(i * rows, o));
}

/// Sums per-task partial results in task order.
pub(super) fn sum_partials(parts: Vec<Vec<f32>>, n: usize) -> Vec<f32> {
    let mut total = vec![0f32; n];
    for p in parts {
        total.iter_mut().zip(p).for_each(|(t, p)| *t += p);
    }
    total
}

/// A matrix inside a slice: element `(i, j)` is at `i · rows_apart + j · cols_apart`.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a> {
    pub data: &'a [f32],
    pub rows_apart: usize,
    pub cols_apart: usize,
}

impl<'a> Mat<'a> {
    /// Row-major, `cols` wide.
    pub fn rows(data: &'a [f32], cols: usize) -> Self {
        Self { data, rows_apart: cols, cols_apart: 1 }
    }

    pub fn t(self) -> Self {
        Self { data: self.data, rows_apart: self.cols_apart, cols_apart: self.rows_apart }
    }

    fn holds(&self, rows: usize, cols: usize) -> bool {
        rows == 0
            || cols == 0
            || (rows - 1) * self.rows_apart + (cols - 1) * self.cols_apart < self.data.len()
    }
}

/// Below these a product of packed tiles gains nothing: half of a tile would be padding, or packing
/// costs what it saves.
#[cfg(target_arch = "x86_64")]
const LEAST_SIDE: usize = 24;
#[cfg(target_arch = "x86_64")]
const LEAST_PRODUCT: usize = 64 * 64 * 64;

/// Below these most of a panel would be padding.
#[cfg(target_arch = "x86_64")]
const LEAST_ROWS: usize = 6;
#[cfg(target_arch = "x86_64")]
const LEAST_COLS: usize = 16;
#[cfg(target_arch = "x86_64")]
const LEAST_DEPTH: usize = 8;

/// Asks for elements that will be needed soon.
pub(super) fn prefetch(data: &[f32], at: usize, len: usize) {
    ask_for(data.as_ptr().wrapping_add(at), len);
}

#[cfg(target_arch = "x86_64")]
fn ask_for(first: *const f32, len: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    /// In elements.
    const CACHE_LINE: usize = 16;
    for i in (0..len).step_by(CACHE_LINE).chain(len.checked_sub(1)) {
        // SAFETY: a hint, which reads nothing, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(first.wrapping_add(i).cast()) };
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn ask_for(_: *const f32, _: usize) {}

/// A place that parallel tasks write, each its own part.
#[derive(Clone, Copy)]
pub(super) struct Out {
    pub ptr: *mut f32,
    pub len: usize,
}

// SAFETY: an address and a length; who writes through it answers for disjointness (see `gemm_into`).
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    pub fn new(data: &mut [f32]) -> Self {
        Self { ptr: data.as_mut_ptr(), len: data.len() }
    }

    /// Where element `at` is.
    #[cfg(target_arch = "x86_64")]
    pub fn place(self, at: usize) -> *mut f32 {
        assert!(at <= self.len, "place out of bounds");
        // SAFETY: within the buffer as asserted, or at its end.
        unsafe { self.ptr.add(at) }
    }

    /// The `len` elements from `at` on.
    ///
    /// # Safety
    /// The buffer must be alive and nobody else may hold or touch these elements as long as they are held.
    pub unsafe fn part<'a>(self, at: usize, len: usize) -> &'a mut [f32] {
        assert!(at + len <= self.len, "write out of bounds");
        // SAFETY: in bounds as asserted; exclusive by the caller's word.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(at), len) }
    }

    /// Writes `values` from `at` on, where nothing need have been before.
    ///
    /// # Safety
    /// The buffer must be alive and no other thread may touch these elements meanwhile.
    pub unsafe fn put(self, at: usize, values: &[f32]) {
        assert!(at + values.len() <= self.len, "write out of bounds");
        // SAFETY: in bounds as asserted; alive and exclusive by the caller's word.
        unsafe { self.ptr.add(at).copy_from_nonoverlapping(values.as_ptr(), values.len()) };
    }

    /// Adds `values` to the elements from `at` on.
    ///
    /// # Safety
    /// The buffer must be alive and no other thread may touch these elements meanwhile.
    pub unsafe fn add_at(self, at: usize, values: &[f32]) {
        // SAFETY: by the caller's word.
        let part = unsafe { self.part(at, values.len()) };
        part.iter_mut().zip(values).for_each(|(a, v)| *a += v);
    }
}

/// `a b` with `a` `[m, k]`, `b` `[k, n]`.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    /// `(m, n, k)`.
    pub sizes: (usize, usize, usize),
    pub a: Mat<'a>,
    pub b: Mat<'a>,
    /// Do all threads share it?
    pub parallel: bool,
}

impl<'a> Product<'a> {
    /// On this thread alone.
    pub fn new(sizes: (usize, usize, usize), a: Mat<'a>, b: Mat<'a>) -> Self {
        Self { sizes, a, b, parallel: false }
    }

    pub fn parallel(self) -> Self {
        Self { parallel: true, ..self }
    }
}

/// Where a product goes: `out = scale · product (+ out, or + bias)`.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub out: Out,
    /// Its first element, and how far its rows are apart.
    pub at: usize,
    pub apart: usize,
    /// Is it added to what is there?
    pub add: bool,
    /// One number a column, which is added to every row; only where nothing else is.
    pub bias: Option<&'a [f32]>,
    pub scale: f32,
}

impl<'a> Place<'a> {
    /// In place of what is there, unscaled.
    pub fn new(out: Out, at: usize, apart: usize) -> Self {
        Self { out, at, apart, add: false, bias: None, scale: 1. }
    }

    pub fn adding(self, add: bool) -> Self {
        Self { add, ..self }
    }

    pub fn scaled(self, scale: f32) -> Self {
        Self { scale, ..self }
    }

    /// `rows` further down.
    #[cfg(target_arch = "x86_64")]
    pub fn below(self, rows: usize) -> Self {
        Self { at: self.at + rows * self.apart, ..self }
    }

    /// `cols` further to the right.
    #[cfg(target_arch = "x86_64")]
    pub fn right(self, cols: usize) -> Self {
        Self { at: self.at + cols, bias: self.bias.map(|b| &b[cols..]), ..self }
    }

    /// Where a later part of a sum goes, `before` terms of which are there.
    #[cfg(target_arch = "x86_64")]
    pub fn after(self, before: usize) -> Self {
        if before > 0 { Self { add: true, bias: None, ..self } } else { self }
    }
}

/// Makes the product, in the precision chosen.
///
/// # Safety
/// The buffer behind `to` must be alive and no other thread may touch these elements meanwhile.
pub(super) unsafe fn gemm_into(product: Product, to: Place) {
    let Product { sizes: (m, n, k), a, b, .. } = product;
    if m == 0 || n == 0 {
        return;
    }
    let end = to.at + (m - 1) * to.apart + n;
    assert!(a.holds(m, k) && b.holds(k, n) && end <= to.out.len, "gemm out of bounds");
    assert!(to.bias.is_none_or(|b| b.len() == n && !to.add), "gemm: bias");
    #[cfg(target_arch = "x86_64")]
    if let Some(parts) = super::Precision::chosen().parts()
        && m.min(n).min(k) >= LEAST_SIDE
        && m * n * k >= LEAST_PRODUCT
    {
        // SAFETY: as below; `parts` is given only where the CPU has what it takes.
        unsafe { super::amx::product(product, parts, bias_first(m, to)) }
        return;
    }
    // SAFETY: the assertion keeps all three matrices inside their slices; `to` is the caller's word.
    unsafe { f32_gemm(product, to) }
}

/// Writes the bias, if there is one, to `m` rows, for the product to be added to.
///
/// # Safety
/// As of `gemm_into`.
unsafe fn bias_first(m: usize, to: Place) -> Place {
    let Some(bias) = to.bias else { return to };
    for row in 0..m {
        // SAFETY: by the caller's word.
        unsafe { to.out.put(to.at + row * to.apart, bias) }
    }
    Place { add: true, bias: None, ..to }
}

/// [`gemm_into`] in f32, whatever the precision chosen.
///
/// # Safety
/// As of `gemm_into`; the slices must hold the matrices, and `to` the result.
pub(super) unsafe fn f32_gemm(product: Product, to: Place) {
    let Product { sizes: (m, n, k), a, b, parallel } = product;
    #[cfg(target_arch = "x86_64")]
    if m >= LEAST_ROWS && n >= LEAST_COLS && k >= LEAST_DEPTH && super::fma::available() {
        // SAFETY: by the caller's word, and the processor has what it takes.
        unsafe { super::fma::product(product, to) }
        return;
    }
    // SAFETY: by the caller's word.
    let to = unsafe { bias_first(m, to) };
    let threads = rayon::current_num_threads();
    let parallelism =
        if parallel && threads > 1 { gemm::Parallelism::Rayon(threads) } else { gemm::Parallelism::None };
    // SAFETY: by the caller's word.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            to.out.ptr.add(to.at),
            1,
            to.apart as isize,
            to.add,
            a.data.as_ptr(),
            a.cols_apart as isize,
            a.rows_apart as isize,
            b.data.as_ptr(),
            b.cols_apart as isize,
            b.rows_apart as isize,
            1f32,
            to.scale,
            false,
            false,
            false,
            parallelism,
        )
    }
}

/// [`gemm_into`] for a whole row-major `out` `[m, n]`, on all threads.
pub(super) fn gemm(sizes: (usize, usize, usize), out: &mut [f32], accumulate: bool, a: Mat, b: Mat) {
    assert_eq!(out.len(), sizes.0 * sizes.1);
    let to = Place::new(Out::new(out), 0, sizes.1).adding(accumulate);
    // SAFETY: `out` is borrowed exclusively here.
    unsafe { gemm_into(Product::new(sizes, a, b).parallel(), to) }
}

/// `a b` `[m, n]` in memory that nobody wrote to before.
pub(super) fn product(sizes: (usize, usize, usize), a: Mat, b: Mat) -> Vec<f32> {
    affine(sizes, a, b, None)
}

/// `a b + bias` `[m, n]`, with one number of the bias a column.
pub(super) fn affine((m, n, k): (usize, usize, usize), a: Mat, b: Mat, bias: Option<&[f32]>) -> Vec<f32> {
    if m.min(n) < 2 || k == 0 {
        // The library takes products with a vector for sums into what is there.
        let mut y = match bias {
            Some(bias) => bias.repeat(m),
            None => vec![0.; m * n],
        };
        gemm((m, n, k), &mut y, true, a, b);
        return y;
    }
    let of = Product::new((m, n, k), a, b).parallel();
    written(m * n, |out| {
        let to = Place { bias, ..Place::new(out, 0, n) };
        // SAFETY: the memory is this function's alone.
        unsafe { gemm_into(of, to) }
    })
}

/// `len` numbers that `f` writes, every one, to memory that nobody wrote to before.
pub(super) fn written(len: usize, f: impl FnOnce(Out)) -> Vec<f32> {
    let mut y = Vec::with_capacity(len);
    f(Out { ptr: y.as_mut_ptr(), len });
    // SAFETY: they are written.
    unsafe { y.set_len(len) };
    y
}

/// Matrices of one size, each the right factor of many products, which are laid out for those once.
pub(super) struct RightFactors {
    #[cfg(target_arch = "x86_64")]
    panels: super::fma::Panels,
    #[cfg(not(target_arch = "x86_64"))]
    none: std::convert::Infallible,
}

impl RightFactors {
    /// `count` of `[k, n]`. `None` where products must lay them out by themselves: on processors without kernels of
    /// our own, and in other precisions than f32.
    #[cfg(target_arch = "x86_64")]
    pub fn new<'a>(
        count: usize,
        (k, n): (usize, usize),
        of: impl Fn(usize) -> Mat<'a> + Sync,
    ) -> Option<Self> {
        let fit = n >= LEAST_COLS && k >= LEAST_DEPTH && super::Precision::chosen().parts().is_none();
        if !fit || !super::fma::available() {
            return None;
        }
        assert!((0..count).all(|i| of(i).holds(k, n)), "gemm out of bounds");
        // SAFETY: the processor has the instructions, and the matrices are there.
        Some(Self { panels: unsafe { super::fma::Panels::new(count, (k, n), of) } })
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub fn new<'a>(_: usize, _: (usize, usize), _: impl Fn(usize) -> Mat<'a> + Sync) -> Option<Self> {
        None
    }

    /// The product of `a`, `[m, ks]`, with a part of the matrix `which`: of its rows `ks`, and of its columns `cols`,
    /// from a multiple of [`COLUMNS`] on.
    ///
    /// # Safety
    /// As of `gemm_into`.
    pub unsafe fn gemm_into(
        &self,
        which: usize,
        (ks, cols): (Range<usize>, Range<usize>),
        (a, m): (Mat, usize),
        to: Place,
    ) {
        #[cfg(target_arch = "x86_64")]
        if m > 0 && !cols.is_empty() {
            let end = to.at + (m - 1) * to.apart + cols.len();
            assert!(a.holds(m, ks.len()) && end <= to.out.len, "gemm out of bounds");
            // SAFETY: by the caller's word; the factors are there only where the processor has the instructions.
            unsafe { self.panels.product(which, (ks, cols), (a, m), to) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = (which, ks, cols, a, m, to);
            match self.none {}
        }
    }
}

/// Columns of [`RightFactors`] that lie together.
pub(super) const COLUMNS: usize = 32;

/// Networks allocate and free the same large buffers at every step. Giving each back to the kernel
/// and faulting it in again cost a quarter of a training step's time (detector, two cores). To be called
/// first of all in a process.
///
/// One arena for all threads: with eight for each processor, what one thread freed is no use to the others.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn keep_freed_memory() {
    // SAFETY: mallopt only sets the allocator's thresholds.
    unsafe {
        // Before 2.35 glibc refused more than 32 MiB, and kept to 128 KiB.
        if libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30) == 0 {
            libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        }
        // Never: the most that fits the argument is 2 GiB, and a training step frees more at once.
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        libc::mallopt(libc::M_TOP_PAD, 256 << 20);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep_freed_memory() {}
