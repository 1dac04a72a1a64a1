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
        part.clear();
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
        return unsafe { avx512::blocks(x, w, k, part) };
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

/// `part = x wᵀ`, where it is zeros before.
pub(super) fn product(x: &[f32], w: &[f32], k: usize, part: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has it.
        return unsafe { avx512::blocks(x, w, k, part) };
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
    use crate::nn::simd::transpose;
    use gemm::f16;
    use std::arch::x86_64::*;

    /// Numbers of a weight.
    pub trait Element: Copy {
        /// The first `n` of at most 16, as f32; zeros beyond.
        ///
        /// # Safety
        /// The processor must have AVX-512; `n` of them are read.
        unsafe fn load(from: *const Self, n: usize) -> __m512;
    }

    impl Element for f32 {
        #[inline(always)]
        unsafe fn load(from: *const Self, n: usize) -> __m512 {
            // SAFETY: by the caller's word.
            unsafe { _mm512_maskz_loadu_ps(mask(n), from) }
        }
    }

    impl Element for f16 {
        #[inline(always)]
        unsafe fn load(from: *const Self, n: usize) -> __m512 {
            // SAFETY: by the caller's word.
            unsafe {
                if n == SIDE {
                    return _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()));
                }
                let mut halves = [f16::ZERO; SIDE];
                std::ptr::copy_nonoverlapping(from, halves.as_mut_ptr(), n);
                _mm512_cvtph_ps(_mm256_loadu_si256(halves.as_ptr().cast()))
            }
        }
    }

    /// Side of a block of the weight: what 16 registers hold.
    const SIDE: usize = 16;

    /// Takes the weight in blocks of 16 × 16, transposed in registers, so that 16 outputs of a row grow
    /// together and none has to be summed over lanes. An element is summed over `k` from its beginning.
    #[target_feature(enable = "avx512f")]
    pub fn blocks<T: Element>(x: &[f32], w: &[T], k: usize, part: &mut [f32]) {
        let (rows, out) = (x.len() / k, w.len() / k);
        assert!(x.len() == rows * k && w.len() == out * k && part.len() == rows * out);
        for col in (0..out).step_by(SIDE) {
            let cols = SIDE.min(out - col);
            for at in (0..k).step_by(SIDE) {
                let depth = SIDE.min(k - at);
                let block = load(&w[col * k + at..], k, cols, depth);
                let mut row = 0;
                while row < rows {
                    let step = match rows - row {
                        8.. => 8,
                        4.. => 4,
                        _ => 1,
                    };
                    let (x, to) = (&x[row * k + at..], &mut part[row * out + col..]);
                    match (step, depth) {
                        (8, SIDE) => grow::<8, SIDE>(&block, x, k, to, out, cols, SIDE),
                        (8, _) => grow::<8, 0>(&block, x, k, to, out, cols, depth),
                        (4, SIDE) => grow::<4, SIDE>(&block, x, k, to, out, cols, SIDE),
                        (4, _) => grow::<4, 0>(&block, x, k, to, out, cols, depth),
                        (_, SIDE) => grow::<1, SIDE>(&block, x, k, to, out, cols, SIDE),
                        _ => grow::<1, 0>(&block, x, k, to, out, cols, depth),
                    }
                    row += step;
                }
            }
        }
    }

    fn mask(n: usize) -> __mmask16 {
        (0xffff_u32 >> (SIDE - n)) as __mmask16
    }

    /// `cols` rows of the weight, `depth` of `k`, as `depth` registers of `cols` numbers; zeros beyond.
    #[target_feature(enable = "avx512f")]
    fn load<T: Element>(w: &[T], k: usize, cols: usize, depth: usize) -> [__m512; SIDE] {
        let mut rows = [_mm512_setzero_si512(); SIDE];
        for (i, row) in rows.iter_mut().enumerate().take(cols) {
            let from = &w[i * k..i * k + depth];
            // SAFETY: only the first `depth` are read.
            *row = unsafe { _mm512_castps_si512(T::load(from.as_ptr(), depth)) };
        }
        // Not by `map`, whose closure is called, sixteen times.
        let mut block = [_mm512_setzero_ps(); SIDE];
        for (to, row) in block.iter_mut().zip(transpose(rows)) {
            *to = _mm512_castsi512_ps(row);
        }
        block
    }

    /// Adds a block's part to `R` rows of 16 outputs. `D` is `depth` where that is 16, which unrolls the
    /// loop, else 0.
    #[target_feature(enable = "avx512f")]
    fn grow<const R: usize, const D: usize>(
        block: &[__m512; SIDE],
        x: &[f32],
        k: usize,
        to: &mut [f32],
        out: usize,
        cols: usize,
        depth: usize,
    ) {
        let depth = if D > 0 { D } else { depth };
        assert!((R - 1) * k + depth <= x.len() && (R - 1) * out + cols <= to.len());
        let mut sums = [_mm512_setzero_ps(); R];
        for (r, sum) in sums.iter_mut().enumerate() {
            // SAFETY: in bounds as asserted; only `cols` are read.
            *sum = unsafe { _mm512_maskz_loadu_ps(mask(cols), to.as_ptr().add(r * out)) };
        }
        for (i, block) in block.iter().enumerate().take(depth) {
            for (r, sum) in sums.iter_mut().enumerate() {
                // SAFETY: in bounds as asserted.
                let x = _mm512_set1_ps(unsafe { *x.get_unchecked(r * k + i) });
                *sum = _mm512_fmadd_ps(x, *block, *sum);
            }
        }
        for (r, sum) in sums.iter().enumerate() {
            // SAFETY: in bounds as asserted; only `cols` are written.
            unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr().add(r * out), mask(cols), *sum) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::random;

    #[test]
    fn all_kernels_give_the_product() -> candle_core::Result<()> {
        for (rows, out, k) in [(1, 1, 1), (3, 5, 7), (5, 16, 16), (6, 33, 45), (64, 70, 96), (9, 260, 37)] {
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
            let mut alone = vec![0f32; out];
            dots(&x[(rows - 1) * k..], &w, k, &mut alone);
            assert!(alone == of(&|y| dots(&x, &w, k, y))[(rows - 1) * out..], "{rows} {out} {k}");
            let got = of(&|y| dots_f16(&x, &halves, k, y, &mut Vec::new()));
            assert!(got == of(&|y| dots(&x, &w, k, y)), "{rows} {out} {k}");
        }
        Ok(())
    }
}
