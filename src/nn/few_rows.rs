//! Products of few rows with a weight, as in generation: they read the weight once and in order, and a
//! row's result is the same to the last bit whoever shares its batch.

use super::cpu;
use super::simd::{LANES, lanes_sum, madd};
use gemm::f16;
use rayon::prelude::*;

/// Up to this many rows; more are left to the GEMM.
pub(super) const FEW: usize = 64;

/// `y += x wᵀ` for a few rows of `x`; `w` is `[out, k]`.
pub(super) fn few_rows(x: &[f32], w: &[f32], k: usize, y: &mut [f32]) {
    let (rows, out) = (x.len() / k, w.len() / k);
    // Enough work to be worth a task, in whole blocks of the kernels.
    let task = cpu::rows_per_task(k).next_multiple_of(16);
    let place = cpu::Out::new(y);
    w.par_chunks(task * k).enumerate().for_each_init(Vec::new, |part, (i, w)| {
        let n = w.len() / k;
        part.resize(rows * n, 0.);
        product(x, w, k, part);
        for (r, part) in part.chunks_exact(n).enumerate() {
            // SAFETY: the columns of this task's weight rows are written by it alone.
            unsafe { place.add_at(r * out + i * task, part) }
        }
    });
}

/// The numbers of halves.
pub(super) fn widen(halves: &[f16], numbers: &mut [f32]) {
    use candle_core::quantized::GgmlType;
    f16::to_float(halves, numbers);
}

/// Halves of a weight that are widened at once.
const WIDENED: usize = 16_384;

/// [`product`] of a weight in halves, which are exact in f32. A row's result is the same to the last bit
/// whoever shares its batch.
pub(super) fn product_f16(x: &[f32], w: &[f16], k: usize, part: &mut [f32], wide: &mut Vec<f32>) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has it.
        return unsafe { avx512::dots(x, w, k, part) };
    }
    #[cfg(target_arch = "x86_64")]
    if x.len() / k <= avx2::FEWEST
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
    {
        // SAFETY: the processor has them.
        return unsafe { avx2::dots_f16(x, w, k, part) };
    }
    dots_f16(x, w, k, part, wide)
}

/// [`dots`] with a few of the weight's rows widened at a time, which stay in the cache.
fn dots_f16(x: &[f32], w: &[f16], k: usize, part: &mut [f32], wide: &mut Vec<f32>) {
    let (rows, out) = (x.len() / k, w.len() / k);
    let some = (WIDENED / k).max(1).next_multiple_of(4);
    let mut of_some = vec![0f32; rows * some.min(out)];
    for (c, w) in w.chunks(some * k).enumerate() {
        let n = w.len() / k;
        wide.resize(w.len(), 0.);
        widen(w, wide);
        dots(x, wide, k, &mut of_some[..rows * n]);
        for (to, from) in part.chunks_exact_mut(out).zip(of_some.chunks_exact(n)) {
            to[c * some..c * some + n].copy_from_slice(from);
        }
    }
}

/// `part = x wᵀ`.
pub(super) fn product(x: &[f32], w: &[f32], k: usize, part: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has it.
        return unsafe { avx512::dots(x, w, k, part) };
    }
    dots(x, w, k, part)
}

/// Every element summed over `k` in the same order, in lanes.
fn dots(x: &[f32], w: &[f32], k: usize, part: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the processor has both.
        return unsafe { avx2::dots_f32(x, w, k, part) };
    }
    plain_dots(x, w, k, part)
}

fn plain_dots(x: &[f32], w: &[f32], k: usize, part: &mut [f32]) {
    const FMA: bool = cfg!(target_arch = "aarch64");
    let (rows, out) = (x.len() / k, w.len() / k);
    for (c, w) in w.chunks(4 * k).enumerate() {
        for (r, x) in x.chunks(2 * k).enumerate() {
            let mut put = |i: usize, v: &[f32]| {
                let at = (2 * r + i) * out + 4 * c;
                part[at..at + v.len()].copy_from_slice(v);
            };
            match (x.len() == 2 * k, w.len() == 4 * k) {
                (true, true) => {
                    let d = tile::<FMA, 2, 4>(x, w, k);
                    (0..2).for_each(|i| put(i, &d[i]));
                }
                (false, true) => put(0, &tile::<FMA, 1, 4>(x, w, k)[0]),
                _ => {
                    for (i, x) in x.chunks_exact(k).enumerate() {
                        for (j, w) in w.chunks_exact(k).enumerate() {
                            part[(2 * r + i) * out + 4 * c + j] = tile::<FMA, 1, 1>(x, w, k)[0][0];
                        }
                    }
                }
            }
        }
    }
    debug_assert_eq!(part.len(), rows * out);
}

/// Inner products of `R` rows of `x` with `C` rows of `w`, each in one set of lanes.
#[inline(always)]
fn tile<const FMA: bool, const R: usize, const C: usize>(x: &[f32], w: &[f32], k: usize) -> [[f32; C]; R] {
    let xs: [&[f32]; R] = std::array::from_fn(|i| &x[i * k..(i + 1) * k]);
    let ws: [&[f32]; C] = std::array::from_fn(|j| &w[j * k..(j + 1) * k]);
    let mut acc = [[[0f32; LANES]; C]; R];
    let whole = k / LANES * LANES;
    // Lanes are read whole, as arrays: indexed one by one the compiler checked each, and the loop
    // became scalar.
    let lanes = |row: &[f32], at: usize| -> [f32; LANES] {
        row[at..at + LANES].try_into().expect("a slice of that length")
    };
    for at in (0..whole).step_by(LANES) {
        let wv: [[f32; LANES]; C] = std::array::from_fn(|j| lanes(ws[j], at));
        for i in 0..R {
            let xv = lanes(xs[i], at);
            for j in 0..C {
                for l in 0..LANES {
                    acc[i][j][l] = madd::<FMA>(xv[l], wv[j][l], acc[i][j][l]);
                }
            }
        }
    }
    for at in whole..k {
        for i in 0..R {
            for j in 0..C {
                acc[i][j][at - whole] = madd::<FMA>(xs[i][at], ws[j][at], acc[i][j][at - whole]);
            }
        }
    }
    std::array::from_fn(|i| std::array::from_fn(|j| lanes_sum(acc[i][j])))
}

/// [`dots`](super::dots) in registers. Of its loops the compiler put a row's four outputs into the lanes, and
/// shuffled each number of the weight into its place: four times as slow.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use crate::nn::simd::avx2::load;
    use crate::nn::simd::{LANES, lanes_sum};
    use gemm::f16;
    use std::arch::x86_64::*;

    const ROWS: usize = 3;
    const COLS: usize = 4;

    /// Rows of `x` up to which halves are widened in registers, for each three rows anew; for more it pays to
    /// write down what they are.
    pub const FEWEST: usize = 2 * ROWS;

    /// Numbers of a weight.
    pub trait Element: Copy {
        /// The first eight, as f32.
        ///
        /// # Safety
        /// The processor must have AVX2, and F16C for halves; eight of them are read.
        unsafe fn eight(from: *const Self) -> __m256;

        /// Those from `at` on, fewer than eight, with zeros beyond.
        ///
        /// # Safety
        /// As of [`eight`](Self::eight), but none beyond the row is read.
        unsafe fn rest(row: &[Self], at: usize) -> __m256;
    }

    impl Element for f32 {
        #[inline(always)]
        unsafe fn eight(from: *const Self) -> __m256 {
            // SAFETY: by the caller's word.
            unsafe { _mm256_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn rest(row: &[Self], at: usize) -> __m256 {
            // SAFETY: as above.
            unsafe { load(row, at) }
        }
    }

    impl Element for f16 {
        #[inline(always)]
        unsafe fn eight(from: *const Self) -> __m256 {
            // SAFETY: by the caller's word.
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
        }

        #[inline(always)]
        unsafe fn rest(row: &[Self], at: usize) -> __m256 {
            let mut halves = [f16::ZERO; LANES];
            halves[..row.len() - at].copy_from_slice(&row[at..]);
            // SAFETY: there are eight.
            unsafe { Self::eight(halves.as_ptr()) }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn dots_f32(x: &[f32], w: &[f32], k: usize, part: &mut [f32]) {
        // SAFETY: the processor has what f32 needs.
        unsafe { dots(x, w, k, part) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn dots_f16(x: &[f32], w: &[f16], k: usize, part: &mut [f32]) {
        // SAFETY: the processor has what halves need.
        unsafe { dots(x, w, k, part) }
    }

    /// # Safety
    /// The processor must have AVX2, FMA and what the element needs.
    #[inline(always)]
    unsafe fn dots<T: Element>(x: &[f32], w: &[T], k: usize, part: &mut [f32]) {
        let (rows, out) = (x.len() / k, w.len() / k);
        assert!(x.len() == rows * k && w.len() == out * k && part.len() == rows * out);
        for (c, w) in w.chunks(COLS * k).enumerate() {
            for (r, x) in x.chunks(ROWS * k).enumerate() {
                let to = &mut part[r * ROWS * out + c * COLS..];
                // SAFETY: by the caller's word.
                unsafe {
                    match (x.len() / k, w.len() / k) {
                        (ROWS, COLS) => tile::<T, ROWS, COLS>(x, w, k, to, out),
                        (2, COLS) => tile::<T, 2, COLS>(x, w, k, to, out),
                        (1, COLS) => tile::<T, 1, COLS>(x, w, k, to, out),
                        _ => {
                            for (i, x) in x.chunks_exact(k).enumerate() {
                                for (j, w) in w.chunks_exact(k).enumerate() {
                                    tile::<T, 1, 1>(x, w, k, &mut to[i * out + j..], out);
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    /// `R` rows of `x` by `C` of `w`, each product in one set of lanes: summed in the same order whatever `R`
    /// and `C`.
    ///
    /// # Safety
    /// As of [`dots`].
    #[inline(always)]
    unsafe fn tile<T: Element, const R: usize, const C: usize>(
        x: &[f32],
        w: &[T],
        k: usize,
        to: &mut [f32],
        out: usize,
    ) {
        assert!(x.len() == R * k && w.len() == C * k);
        // SAFETY: the processor has the instructions by the caller's word; reads are as said beside them.
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); C]; R];
            let whole = k / LANES * LANES;
            for at in (0..whole).step_by(LANES) {
                // `at + LANES <= k`, and there are `R` rows of `k` in `x` and `C` in `w`.
                let mut xs = [_mm256_setzero_ps(); R];
                for (i, x_i) in xs.iter_mut().enumerate() {
                    *x_i = _mm256_loadu_ps(x.as_ptr().add(i * k + at));
                }
                for j in 0..C {
                    let w_j = T::eight(w.as_ptr().add(j * k + at));
                    for i in 0..R {
                        acc[i][j] = _mm256_fmadd_ps(xs[i], w_j, acc[i][j]);
                    }
                }
            }
            for (i, acc) in acc.iter_mut().enumerate() {
                for (j, acc) in acc.iter_mut().enumerate() {
                    if whole < k {
                        let (x, w) = (&x[i * k..(i + 1) * k], &w[j * k..(j + 1) * k]);
                        *acc = _mm256_fmadd_ps(load(x, whole), T::rest(w, whole), *acc);
                    }
                    let mut lanes = [0f32; LANES];
                    // There is room for eight.
                    _mm256_storeu_ps(lanes.as_mut_ptr(), *acc);
                    to[i * out + j] = lanes_sum(lanes);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use crate::nn::simd::mask16;
    use gemm::f16;
    use std::arch::x86_64::*;

    const LANES: usize = 16;
    /// Rows of `x` and of the weight whose products grow together, in 24 registers.
    const ROWS: usize = 6;
    const COLS: usize = 4;
    /// Of `k` at once: so much of six rows of `x` stays in the innermost cache.
    const DEPTH: usize = 1024;
    /// Bytes.
    const CACHE_LINE: usize = 64;

    /// Numbers of a weight.
    pub trait Element: Copy {
        /// The first sixteen, as f32.
        ///
        /// # Safety
        /// The processor must have AVX-512; sixteen of them are read.
        unsafe fn sixteen(from: *const Self) -> __m512;

        /// The first `n`, fewer than sixteen, with zeros beyond.
        ///
        /// # Safety
        /// As of [`sixteen`](Self::sixteen), but no more than `n` are read.
        unsafe fn rest(from: *const Self, n: usize) -> __m512;
    }

    impl Element for f32 {
        #[inline(always)]
        unsafe fn sixteen(from: *const Self) -> __m512 {
            // SAFETY: by the caller's word.
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn rest(from: *const Self, n: usize) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_maskz_loadu_ps(mask16(n), from) }
        }
    }

    impl Element for f16 {
        #[inline(always)]
        unsafe fn sixteen(from: *const Self) -> __m512 {
            // SAFETY: by the caller's word.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
        }

        #[inline(always)]
        unsafe fn rest(from: *const Self, n: usize) -> __m512 {
            let mut halves = [f16::ZERO; LANES];
            // SAFETY: by the caller's word; there are sixteen then.
            unsafe {
                std::ptr::copy_nonoverlapping(from, halves.as_mut_ptr(), n);
                Self::sixteen(halves.as_ptr())
            }
        }
    }

    /// `part = x wᵀ`. Each product is summed in sixteen lanes, [`DEPTH`] of `k` after another: in one order
    /// whatever else is in the matrices.
    ///
    /// What follows the weight in memory, which is likely the next task's, is asked for meanwhile: else
    /// the first six rows wait for their weight, and the memory for the other rows.
    #[target_feature(enable = "avx512f")]
    pub fn dots<T: Element>(x: &[f32], w: &[T], k: usize, part: &mut [f32]) {
        let (rows, out) = (x.len() / k, w.len() / k);
        assert!(x.len() == rows * k && w.len() == out * k && part.len() == rows * out);
        let groups = rows.div_ceil(ROWS);
        let mut next = Ahead::new(w, groups * k.div_ceil(LANES) * out.div_ceil(COLS));
        for from in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - from);
            let mut first = 0;
            // Groups of one size, nearly.
            for group in 0..groups {
                let count = (rows - first).div_ceil(groups - group);
                let x = Rows { data: &x[first * k..(first + count) * k], k, from, depth };
                for (c, w) in w.chunks(COLS * k).enumerate() {
                    let w = Rows { data: w, k, from, depth };
                    let to = &mut part[first * out + c * COLS..];
                    match count {
                        1 => tile::<T, 1>(x, w, to, out, &mut next),
                        2 => tile::<T, 2>(x, w, to, out, &mut next),
                        3 => tile::<T, 3>(x, w, to, out, &mut next),
                        4 => tile::<T, 4>(x, w, to, out, &mut next),
                        5 => tile::<T, 5>(x, w, to, out, &mut next),
                        _ => tile::<T, ROWS>(x, w, to, out, &mut next),
                    }
                }
                first += count;
            }
        }
    }

    /// Rows of `k` numbers, of which `depth` from `from` on are meant.
    #[derive(Clone, Copy)]
    struct Rows<'a, T> {
        data: &'a [T],
        k: usize,
        from: usize,
        depth: usize,
    }

    /// Memory to be asked for, so much at each step.
    struct Ahead {
        at: *const i8,
        step: usize,
    }

    impl Ahead {
        /// As much as the weight has, after it.
        fn new<T>(w: &[T], steps: usize) -> Self {
            Self { at: w.as_ptr_range().end.cast(), step: size_of_val(w) / steps.max(1) }
        }

        #[inline(always)]
        fn ask(&mut self) {
            for line in (0..self.step.max(1)).step_by(CACHE_LINE) {
                // SAFETY: a hint, which reads nothing, wherever it points.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(self.at.wrapping_add(line)) };
            }
            self.at = self.at.wrapping_add(self.step);
        }
    }

    /// `R` rows of `x` by up to four of the weight: written, or added to what was written of less of `k`.
    #[target_feature(enable = "avx512f")]
    fn tile<T: Element, const R: usize>(
        x: Rows<f32>,
        w: Rows<T>,
        to: &mut [f32],
        out: usize,
        next: &mut Ahead,
    ) {
        let Rows { k, from, depth, .. } = x;
        let cols = w.data.len() / k;
        assert!(x.data.len() == R * k && (1..=COLS).contains(&cols) && w.data.len() == cols * k);
        assert!(from + depth <= k && (R - 1) * out + cols <= to.len());
        // Where there are fewer rows of the weight, the last one again.
        let w_at: [usize; COLS] = [0, 1, 2, 3].map(|c: usize| c.min(cols - 1) * k + from);
        let mut sums = [[_mm512_setzero_ps(); COLS]; R];
        let whole = depth / LANES * LANES;
        // SAFETY: what is read is inside the rows as asserted.
        unsafe {
            for at in (0..whole).step_by(LANES) {
                let mut xs = [_mm512_setzero_ps(); R];
                for (r, x_r) in xs.iter_mut().enumerate() {
                    *x_r = _mm512_loadu_ps(x.data.as_ptr().add(r * k + from + at));
                }
                for c in 0..COLS {
                    let w_c = T::sixteen(w.data.as_ptr().add(w_at[c] + at));
                    for r in 0..R {
                        sums[r][c] = _mm512_fmadd_ps(xs[r], w_c, sums[r][c]);
                    }
                }
                next.ask();
            }
            let rest = depth - whole;
            if rest > 0 {
                for c in 0..COLS {
                    let w_c = T::rest(w.data.as_ptr().add(w_at[c] + whole), rest);
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let x_r = f32::rest(x.data.as_ptr().add(r * k + from + whole), rest);
                        sums[c] = _mm512_fmadd_ps(x_r, w_c, sums[c]);
                    }
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            let to = &mut to[r * out..r * out + cols];
            let mut of_row = [0.; COLS];
            // SAFETY: there is room for four.
            unsafe { _mm_storeu_ps(of_row.as_mut_ptr(), totals(sums)) };
            for (to, of_row) in to.iter_mut().zip(of_row) {
                *to = if from > 0 { *to + of_row } else { of_row };
            }
        }
    }

    /// The sums of four registers' lanes.
    #[target_feature(enable = "avx512f")]
    fn totals([a, b, c, d]: [__m512; COLS]) -> __m128 {
        let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        // Now each quarter has four sums of four lanes.
        let all = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xee>(ab, cd));
        let halves = _mm512_add_ps(all, _mm512_shuffle_f32x4::<0x4e>(all, all));
        _mm512_castps512_ps128(_mm512_add_ps(halves, _mm512_shuffle_f32x4::<0xb1>(halves, halves)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::random;

    #[test]
    fn all_kernels_give_the_product() -> candle_core::Result<()> {
        for (rows, out, k) in
            [(1, 1, 1), (3, 5, 7), (5, 16, 16), (6, 33, 45), (64, 70, 96), (9, 260, 37), (7, 6, 2500)]
        {
            let (x, w) = (random((rows, k), 1)?, random((out, k), 2)?);
            let (x, w): (Vec<f32>, Vec<f32>) = (x.flatten_all()?.to_vec1()?, w.flatten_all()?.to_vec1()?);
            let of = |kernel: fn(&[f32], &[f32], usize, &mut [f32])| {
                let mut y = vec![0f32; rows * out];
                kernel(&x, &w, k, &mut y);
                y
            };
            for y in [of(product), of(dots), of(plain_dots)] {
                for (at, y) in y.iter().enumerate() {
                    let (x, w) = (&x[at / out * k..][..k], &w[at % out * k..][..k]);
                    let exact: f64 = x.iter().zip(w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    assert!((f64::from(*y) - exact).abs() < 1e-6 * k as f64, "{rows} {out} {k}: {y} {exact}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn halves_are_what_they_widen_to() -> candle_core::Result<()> {
        for (rows, out, k) in [(1, 1, 1), (3, 5, 7), (5, 16, 32), (9, 260, 45), (40, 35, 4000)] {
            let (x, w) = (random((rows, k), 1)?, random((out, k), 2)?);
            let (x, w): (Vec<f32>, Vec<f32>) = (x.flatten_all()?.to_vec1()?, w.flatten_all()?.to_vec1()?);
            let halves: Vec<f16> = w.iter().map(|w| f16::from_f32(*w)).collect();
            let mut w = vec![0.; w.len()];
            widen(&halves, &mut w);
            let of = |kernel: &dyn Fn(&mut [f32])| {
                let mut y = vec![0f32; rows * out];
                kernel(&mut y);
                y
            };
            let got = of(&|y| product_f16(&x, &halves, k, y, &mut Vec::new()));
            assert!(got == of(&|y| product(&x, &w, k, y)), "{rows} {out} {k}");
            // A row alone, and among others.
            for kernel in [product, dots] {
                let mut alone = vec![0f32; out];
                kernel(&x[(rows - 1) * k..], &w, k, &mut alone);
                assert!(alone == of(&|y| kernel(&x, &w, k, y))[(rows - 1) * out..], "{rows} {out} {k}");
            }
            let got = of(&|y| dots_f16(&x, &halves, k, y, &mut Vec::new()));
            assert!(got == of(&|y| dots(&x, &w, k, y)), "{rows} {out} {k}");
        }
        Ok(())
    }
}
