//! Arithmetic that the CPU kernels share, compiled twice: for any processor, and for x86 with
//! AVX2 and FMA, chosen at run time. Softmax is written for AVX-512 besides.
//!
//! Kernels are plain loops that the compiler vectorises; sums run in fixed lanes so that a result
//! depends neither on the number of threads nor on where a row lies in its batch.

/// Lanes of the sums: one AVX2 register.
pub(super) const LANES: usize = 8;

/// Defines a function whose body is also compiled for AVX2 and FMA. In the body the constant
/// `FMA` says whether fused multiply-add is an instruction (see [`madd`]).
macro_rules! wide {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(unused_mut)]
            fn body<const FMA: bool>($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    body::<true>($($arg),*)
                }
                // SAFETY: the processor has both features.
                return unsafe { avx2($($arg),*) };
            }
            body::<{ cfg!(target_arch = "aarch64") }>($($arg),*)
        }
    };
}
pub(super) use wide;

/// The first `n` of sixteen lanes.
#[cfg(target_arch = "x86_64")]
pub(super) fn mask16(n: usize) -> std::arch::x86_64::__mmask16 {
    if n < 16 { (1 << n) - 1 } else { u16::MAX }
}

/// A square of 16 × 16 words, its rows in registers, transposed.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn transpose(w: [std::arch::x86_64::__m512i; 16]) -> [std::arch::x86_64::__m512i; 16] {
    use std::arch::x86_64::*;
    let mut a = w;
    for i in (0..16).step_by(2) {
        a[i] = _mm512_unpacklo_epi32(w[i], w[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(w[i], w[i + 1]);
    }
    let mut b = a;
    for i in (0..16).step_by(4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    // Now quarter q of b[4 g + c] holds column 4 q + c of the rows of group g.
    let mut out = b;
    for c in 0..4 {
        let even = |x, y| _mm512_shuffle_i32x4::<0x88>(x, y);
        let odd = |x, y| _mm512_shuffle_i32x4::<0xdd>(x, y);
        let (e0, e1) = (even(b[c], b[4 + c]), even(b[8 + c], b[12 + c]));
        let (o0, o1) = (odd(b[c], b[4 + c]), odd(b[8 + c], b[12 + c]));
        out[c] = even(e0, e1);
        out[8 + c] = odd(e0, e1);
        out[4 + c] = even(o0, o1);
        out[12 + c] = odd(o0, o1);
    }
    out
}

/// `a · b + c`, fused where that is one instruction; a library call would be far slower.
#[inline(always)]
pub(super) fn madd<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// ln 2 in two parts, so that a whole number times the first is exact.
const LN2_HI: f32 = 0.693_359_4;
const LN2_LO: f32 = -2.121_944_4e-4;
/// Coefficients of `e^x` near 0, from the seventh power down.
const TAYLOR: [f32; 8] = [1. / 5040., 1. / 720., 1. / 120., 1. / 24., 1. / 6., 0.5, 1., 1.];

/// `e^x` to about 1 ulp; 0 below −87.3, finite above 88.3, NaN for NaN.
#[inline(always)]
pub(super) fn exp<const FMA: bool>(x: f32) -> f32 {
    // Adding 1.5·2²³ rounds to an integer that then stands in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.;
    let y = if x > 88.3 { 88.3 } else { x };
    let y = if y < -87.3 { -87.3 } else { y };
    let t = madd::<FMA>(y, std::f32::consts::LOG2_E, ROUND);
    let n = t - ROUND;
    let r = madd::<FMA>(n, -LN2_LO, madd::<FMA>(n, -LN2_HI, y));
    let mut p = TAYLOR[0];
    for c in &TAYLOR[1..] {
        p = madd::<FMA>(p, r, *c);
    }
    let scale = f32::from_bits(t.to_bits().wrapping_add(127) << 23);
    if x < -87.3 { 0. } else { p * scale }
}

#[inline(always)]
pub(super) fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1. / (1. + exp::<FMA>(-x))
}

#[inline(always)]
pub(super) fn tanh<const FMA: bool>(x: f32) -> f32 {
    2. * sigmoid::<FMA>(2. * x) - 1.
}

/// Error function to 4e-7: its power series below ½, where the other form cancels, and
/// Abramowitz & Stegun 7.1.26 above.
#[inline(always)]
pub(super) fn erf<const FMA: bool>(x: f32) -> f32 {
    let a = x.abs();
    let t = 1. / madd::<FMA>(0.327_591_1, a, 1.);
    let mut p = 1.061_405_4;
    for c in [-1.453_152, 1.421_413_7, -0.284_496_72, 0.254_829_6] {
        p = madd::<FMA>(p, t, c);
    }
    let far = 1. - p * t * exp::<FMA>(-a * a);
    let x2 = x * x;
    let mut near = -1. / 1320.;
    for c in [1. / 216., -1. / 42., 0.1, -1. / 3., 1.] {
        near = madd::<FMA>(near, x2, c);
    }
    let near = near * a * std::f32::consts::FRAC_2_SQRT_PI;
    (if a < 0.5 { near } else { far }).copysign(x)
}

/// Sums lanes in a fixed order.
#[inline(always)]
pub(super) fn lanes_sum(v: [f32; LANES]) -> f32 {
    ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
}

/// Sum of `f(i)` over `0..n` in lanes.
#[inline(always)]
pub(super) fn sum_by(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut acc = [[0f32; LANES]; 2];
    let whole = n / (2 * LANES) * (2 * LANES);
    for i in (0..whole).step_by(2 * LANES) {
        for u in 0..2 {
            for l in 0..LANES {
                acc[u][l] += f(i + u * LANES + l);
            }
        }
    }
    for i in whole..n {
        acc[0][i % LANES] += f(i);
    }
    let mut v = acc[0];
    for l in 0..LANES {
        v[l] += acc[1][l];
    }
    lanes_sum(v)
}

/// Largest value of a non-empty row.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let mut acc = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for c in chunks {
        for l in 0..LANES {
            acc[l] = if c[l] > acc[l] { c[l] } else { acc[l] };
        }
    }
    rest.iter().chain(&acc).fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

/// Inner product of two rows of one length.
#[inline(always)]
pub(super) fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    let (a, b) = (&a[..n], &b[..n]);
    #[cfg(target_arch = "x86_64")]
    if FMA {
        // SAFETY: on x86 only code for AVX2 and FMA has them.
        return unsafe { avx2::dot(a, b) };
    }
    let mut acc = [[0f32; LANES]; 4];
    let (x, y) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (last_x, last_y) = (x.remainder(), y.remainder());
    for (i, (x, y)) in x.zip(y).enumerate() {
        for l in 0..LANES {
            acc[i % 4][l] = madd::<FMA>(x[l], y[l], acc[i % 4][l]);
        }
    }
    for (l, (x, y)) in last_x.iter().zip(last_y).enumerate() {
        acc[n / LANES % 4][l] = madd::<FMA>(*x, *y, acc[n / LANES % 4][l]);
    }
    lanes_sum(std::array::from_fn(|l| (acc[0][l] + acc[1][l]) + (acc[2][l] + acc[3][l])))
}

/// `o += Σ p · v` over rows of `v`, each given by `p` and where it begins.
#[inline(always)]
pub(super) fn add_rows<const FMA: bool>(
    rows: impl Iterator<Item = (f32, usize)> + Clone,
    v: &[f32],
    o: &mut [f32],
) {
    let mut at = 0;
    while at < o.len() {
        let (v, o, rows) = (&v[at..], &mut o[at..], rows.clone());
        at += match o.len() {
            64.. => add_columns::<FMA, 8>(rows, v, o),
            48.. => add_columns::<FMA, 6>(rows, v, o),
            32.. => add_columns::<FMA, 4>(rows, v, o),
            16.. => add_columns::<FMA, 2>(rows, v, o),
            LANES.. => add_columns::<FMA, 1>(rows, v, o),
            rest => {
                for (p, from) in rows {
                    for (o, &v) in o.iter_mut().zip(&v[from..]) {
                        *o = madd::<FMA>(p, v, *o);
                    }
                }
                rest
            }
        };
    }
}

/// Rows that begin `apart` numbers from one another, as [`add_rows`] takes them.
#[inline(always)]
pub(super) fn rows_apart(p: &[f32], apart: usize) -> impl Iterator<Item = (f32, usize)> + Clone {
    p.iter().enumerate().map(move |(j, p)| (*p, j * apart))
}

/// The first `N` · 8 columns of [`add_rows`], kept in registers; how many they are.
#[inline(always)]
fn add_columns<const FMA: bool, const N: usize>(
    rows: impl Iterator<Item = (f32, usize)>,
    v: &[f32],
    o: &mut [f32],
) -> usize {
    let lanes = |row: &[f32], i: usize| -> [f32; LANES] {
        row[i * LANES..(i + 1) * LANES].try_into().expect("a slice of that length")
    };
    let mut sums: [[f32; LANES]; N] = std::array::from_fn(|i| lanes(o, i));
    for (p, from) in rows {
        let v = &v[from..from + N * LANES];
        for (i, sum) in sums.iter_mut().enumerate() {
            let v = lanes(v, i);
            for l in 0..LANES {
                sum[l] = madd::<FMA>(p, v[l], sum[l]);
            }
        }
    }
    for (o, sum) in o.chunks_exact_mut(LANES).zip(sums) {
        o.copy_from_slice(&sum);
    }
    N * LANES
}

/// What the compiler does not make of loops: it kept sums of several rows in pairs of lanes.
#[cfg(target_arch = "x86_64")]
pub(super) mod avx2 {
    use super::LANES;
    use std::arch::x86_64::*;

    /// The first `n` lanes.
    #[target_feature(enable = "avx2")]
    fn first(n: usize) -> __m256i {
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_cmpgt_epi32(_mm256_set1_epi32(n.min(LANES) as i32), lanes)
    }

    /// The numbers from `at` on, at most eight, with zeros beyond the row.
    #[target_feature(enable = "avx2")]
    pub fn load(row: &[f32], at: usize) -> __m256 {
        let row = &row[at..];
        // SAFETY: only what the row has is read.
        unsafe { _mm256_maskload_ps(row.as_ptr(), first(row.len())) }
    }

    /// Inner product of two rows of one length.
    #[target_feature(enable = "avx2,fma")]
    pub fn dot(a: &[f32], b: &[f32]) -> f32 {
        let mut acc = [_mm256_setzero_ps(); 4];
        let (x, y) = (a.chunks_exact(4 * LANES), b.chunks_exact(4 * LANES));
        let (last_x, last_y) = (x.remainder(), y.remainder());
        for (x, y) in x.zip(y) {
            for (u, acc) in acc.iter_mut().enumerate() {
                // SAFETY: each part has four times eight numbers.
                let of = |row: &[f32]| unsafe { _mm256_loadu_ps(row.as_ptr().add(u * LANES)) };
                *acc = _mm256_fmadd_ps(of(x), of(y), *acc);
            }
        }
        for (u, at) in (0..last_x.len()).step_by(LANES).enumerate() {
            acc[u] = _mm256_fmadd_ps(load(last_x, at), load(last_y, at), acc[u]);
        }
        let sum = _mm256_add_ps(_mm256_add_ps(acc[0], acc[1]), _mm256_add_ps(acc[2], acc[3]));
        let mut lanes = [0f32; LANES];
        // SAFETY: there is room for eight.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
        super::lanes_sum(lanes)
    }

    /// `p[j] = scale · (q · k[j])` for rows of `k` that begin `apart` numbers from one another, eight rows
    /// at a time; each is summed in the same order wherever it stands.
    #[target_feature(enable = "avx2,fma")]
    pub fn dots(q: &[f32], k: &[f32], apart: usize, scale: f32, p: &mut [f32]) {
        let (n, rows) = (q.len(), p.len());
        assert!(rows == 0 || (rows - 1) * apart + n <= k.len());
        let whole = n / LANES * LANES;
        let last = load(q, whole);
        for (i, p) in p.chunks_mut(LANES).enumerate() {
            // Beyond the end the last row again.
            let row = |r: usize| &k[(i * LANES + r).min(rows - 1) * apart..][..n];
            let of: [&[f32]; LANES] = [row(0), row(1), row(2), row(3), row(4), row(5), row(6), row(7)];
            let mut acc = [_mm256_setzero_ps(); LANES];
            for at in (0..whole).step_by(LANES) {
                // SAFETY: all rows have `n` numbers, and `at + LANES <= n`.
                let eight = |row: &[f32]| unsafe { _mm256_loadu_ps(row.as_ptr().add(at)) };
                let q = eight(q);
                for (acc, row) in acc.iter_mut().zip(of) {
                    *acc = _mm256_fmadd_ps(q, eight(row), *acc);
                }
            }
            if whole < n {
                for (acc, row) in acc.iter_mut().zip(of) {
                    *acc = _mm256_fmadd_ps(last, load(row, whole), *acc);
                }
            }
            let pairs = |i: usize| _mm256_hadd_ps(acc[i], acc[i + 1]);
            let (a, b) = (_mm256_hadd_ps(pairs(0), pairs(2)), _mm256_hadd_ps(pairs(4), pairs(6)));
            let low = _mm256_permute2f128_ps::<0x20>(a, b);
            let sums = _mm256_add_ps(low, _mm256_permute2f128_ps::<0x31>(a, b));
            let sums = _mm256_mul_ps(sums, _mm256_set1_ps(scale));
            // SAFETY: only as many as there are rows are written.
            unsafe { _mm256_maskstore_ps(p.as_mut_ptr(), first(p.len()), sums) }
        }
    }
}

/// Kernels that need registers of sixteen lanes to be as fast as the processor is.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{FAINT, LN2_HI, LN2_LO, TAYLOR, mask16};
    use std::arch::x86_64::*;

    const LANES: usize = 16;
    /// Registers of greatest numbers, so that none waits for the one before.
    const CHAINS: usize = 4;

    /// [`exp`](super::exp) of numbers from [`FAINT`] to 0.
    #[target_feature(enable = "avx512f")]
    fn exp(x: __m512) -> __m512 {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        let n = _mm512_roundscale_ps::<NEAREST>(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
        let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_HI), x);
        let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_LO), r);
        let mut p = _mm512_set1_ps(TAYLOR[0]);
        for c in &TAYLOR[1..] {
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
        }
        _mm512_scalef_ps(p, n)
    }

    /// [`exp_row`](super::exp_row) of a row whose greatest number is `max`, which is a number.
    #[target_feature(enable = "avx512f")]
    pub fn exp_row(x: &mut [f32], max: f32) -> f32 {
        let max = _mm512_set1_ps(max);
        let mut sum = _mm512_setzero_ps();
        for x in x.chunks_mut(LANES) {
            let there = mask16(x.len());
            // SAFETY: what is not there is neither read nor written.
            unsafe {
                let below = _mm512_sub_ps(_mm512_maskz_loadu_ps(there, x.as_ptr()), max);
                let faint = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(below, _mm512_set1_ps(FAINT));
                let share = _mm512_maskz_mov_ps(there & !faint, exp(below));
                sum = _mm512_add_ps(sum, share);
                _mm512_mask_storeu_ps(x.as_mut_ptr(), there, share);
            }
        }
        _mm512_reduce_add_ps(sum)
    }

    /// [`max`](super::max).
    #[target_feature(enable = "avx512f")]
    pub fn max(x: &[f32]) -> f32 {
        let mut all = [_mm512_set1_ps(f32::NEG_INFINITY); CHAINS];
        let chunks = x.chunks_exact(CHAINS * LANES);
        let rest = chunks.remainder();
        // Of NaN and a number `_mm512_max_ps` gives the second.
        for x in chunks {
            for (c, all) in all.iter_mut().enumerate() {
                // SAFETY: there are as many.
                *all = _mm512_max_ps(unsafe { _mm512_loadu_ps(x.as_ptr().add(c * LANES)) }, *all);
            }
        }
        for x in rest.chunks(LANES) {
            // SAFETY: what is not there is not read.
            let x = unsafe { _mm512_mask_loadu_ps(all[0], mask16(x.len()), x.as_ptr()) };
            all[0] = _mm512_max_ps(x, all[0]);
        }
        _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(all[0], all[1]), _mm512_max_ps(all[2], all[3])))
    }
}

/// How far below a row's greatest number one counts for nothing in its softmax: e^−46 is 1e-20, far below the
/// rounding of any sum that the greatest is part of. Smaller shares, and the gradients through them, would come to
/// be subnormal, which products take ten times as long over on some processors.
const FAINT: f32 = -46.;

/// Softmax of a row in place, shares below e^−46 of the greatest being 0. A row of −∞ alone becomes zeros; with NaN
/// among them it stays NaN.
#[inline(always)]
pub(super) fn softmax_row<const FMA: bool>(x: &mut [f32]) {
    let inv = 1. / exp_row::<FMA>(x);
    x.iter_mut().for_each(|v| *v *= inv);
}

/// Shares of a row in place, and the sum that they are yet to be divided by (see [`softmax_row`]).
#[inline(always)]
pub(super) fn exp_row<const FMA: bool>(x: &mut [f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    let wide = FMA && is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    let wide = false;
    let m = match wide {
        // SAFETY: the processor has it.
        #[cfg(target_arch = "x86_64")]
        true => unsafe { avx512::max(x) },
        _ => max(x),
    };
    if m == f32::NEG_INFINITY {
        // The maximum passes over NaN.
        let broken = x.iter().any(|v| v.is_nan());
        x.fill(if broken { f32::NAN } else { 0. });
        return 1.;
    }
    #[cfg(target_arch = "x86_64")]
    if wide {
        // SAFETY: the processor has it.
        return unsafe { avx512::exp_row(x, m) };
    }
    for v in x.iter_mut() {
        let below = *v - m;
        *v = if below < FAINT { 0. } else { exp::<FMA>(below) };
    }
    sum_by(x.len(), |i| x[i])
}

#[cfg(test)]
mod tests {
    wide! {
        fn apply(op: u8, x: &mut [f32]) {
            for v in x.iter_mut() {
                *v = match op {
                    0 => super::exp::<FMA>(*v),
                    1 => super::erf::<FMA>(*v),
                    _ => super::tanh::<FMA>(*v),
                };
            }
        }
    }

    fn check(op: u8, x: &[f32], want: impl Fn(f64) -> f64, tol: f64) {
        let mut y = x.to_vec();
        apply(op, &mut y);
        for (x, y) in x.iter().zip(y) {
            let w = want(*x as f64);
            assert!(
                (y as f64 - w).abs() <= tol * w.abs().max(1e-30) + tol * 0.3,
                "op {op} at {x}: {y}, want {w}"
            );
        }
    }

    #[test]
    fn shares_that_count_for_nothing_are_zero_and_none_is_subnormal() {
        let x = [0f32, -1., -45.9, -46.1, -86., -87.2, f32::NEG_INFINITY];
        let mut y = x;
        super::softmax_row::<false>(&mut y);
        let sum: f64 = x.iter().map(|x| f64::from(*x).exp()).sum();
        for (x, y) in x.iter().zip(y) {
            let w = if *x > -46. { f64::from(*x).exp() / sum } else { 0. };
            assert!((f64::from(y) - w).abs() <= 1e-6 * w && !y.is_subnormal(), "{y} at {x}, want {w}");
        }
    }

    wide! {
        fn softmax(x: &mut [f32]) {
            super::softmax_row::<FMA>(x)
        }
    }

    #[test]
    fn shares_are_the_same_however_many_lanes_make_them() {
        for n in [1usize, 15, 16, 17, 64, 65, 100, 1801] {
            let x: Vec<f32> = (0..n).map(|i| ((i * 7919) % 997) as f32 * 0.06 - 50.).collect();
            let (mut wide, mut plain) = (x.clone(), x.clone());
            softmax(&mut wide);
            super::softmax_row::<false>(&mut plain);
            for (i, (w, p)) in wide.iter().zip(&plain).enumerate() {
                assert!((w - p).abs() <= 1e-6 * p && !w.is_subnormal(), "{n}: {w} {p} at {}", x[i]);
            }
            for bad in [f32::NAN, f32::INFINITY] {
                let mut x = x.clone();
                x[n / 2] = bad;
                softmax(&mut x);
                assert!(x[n / 2].is_nan(), "{n} {bad}");
            }
            let mut none = vec![f32::NEG_INFINITY; n];
            softmax(&mut none);
            assert!(none.iter().all(|p| *p == 0.));
        }
    }

    #[test]
    fn elementary_functions_are_accurate() {
        let x: Vec<f32> = (-8000..8000).map(|i| i as f32 * 0.00731).collect();
        let mut e = x.clone();
        apply(0, &mut e);
        for (x, y) in x.iter().zip(e) {
            let w = (*x as f64).exp();
            assert!((y as f64 - w).abs() <= 3e-7 * w, "exp({x}) = {y}, want {w}");
        }
        check(2, &x, f64::tanh, 5e-7);
        let small: Vec<f32> = (-4000..4000).map(|i| i as f32 * 0.001).collect();
        let reference = |x: f64| {
            // Series of the error function; converges for the range here.
            let (mut term, mut sum) = (x, x);
            for n in 1..200 {
                term *= -x * x / n as f64;
                sum += term / (2 * n + 1) as f64;
            }
            sum * 2. / std::f64::consts::PI.sqrt()
        };
        check(1, &small, reference, 4e-7);
        let mut edge = [f32::NEG_INFINITY, f32::NAN, 1000.];
        apply(0, &mut edge);
        assert_eq!(edge[0], 0.);
        assert!(edge[1].is_nan() && edge[2].is_finite());
    }

    #[test]
    fn sums_and_maxima_cover_every_element() {
        for n in 0..70usize {
            let x: Vec<f32> = (0..n).map(|i| ((i * 37) % 19) as f32 - 9.).collect();
            let want: f32 = x.iter().map(|v| v * v).sum();
            assert_eq!(super::dot::<false>(&x, &x), want);
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                assert_eq!(super::dot::<true>(&x, &x), want);
            }
            assert_eq!(super::sum_by(n, |i| x[i] * x[i]), want);
            assert_eq!(super::max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_row_has_its_inner_product_wherever_it_stands() {
        if !is_x86_feature_detected!("avx2") || !is_x86_feature_detected!("fma") {
            return;
        }
        for (n, apart) in [(1, 1), (7, 9), (8, 8), (48, 96), (61, 64), (128, 128)] {
            for rows in [0usize, 1, 7, 8, 9, 23] {
                let q: Vec<f32> = (0..n).map(|i| ((i * 37) % 19) as f32 - 9.).collect();
                // Integers, so that sums are exact; and no number after the last row.
                let k: Vec<f32> =
                    (0..(rows.max(1) - 1) * apart + n).map(|i| ((i * 53) % 23) as f32 - 11.).collect();
                let mut p = vec![0f32; rows];
                // SAFETY: looked for above.
                unsafe { super::avx2::dots(&q, &k, apart, 0.5, &mut p) };
                for (j, p) in p.iter().enumerate() {
                    let row = &k[j * apart..j * apart + n];
                    let want: f32 = q.iter().zip(row).map(|(a, b)| a * b).sum();
                    assert_eq!(*p, 0.5 * want, "{n} {apart} {rows} {j}");
                }
            }
        }
    }
}
