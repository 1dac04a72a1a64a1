//! Arithmetic that the CPU kernels share, compiled twice: for any processor, and for x86 with
//! AVX2 and FMA, chosen at run time.
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

/// A square of 16 × 16 words, its rows in registers, transposed.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
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

/// `e^x` to about 1 ulp; 0 below −87.3, finite above 88.3, NaN for NaN.
#[inline(always)]
pub(super) fn exp<const FMA: bool>(x: f32) -> f32 {
    // Adding 1.5·2²³ rounds to an integer that then stands in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let y = if x > 88.3 { 88.3 } else { x };
    let y = if y < -87.3 { -87.3 } else { y };
    let t = madd::<FMA>(y, std::f32::consts::LOG2_E, ROUND);
    let n = t - ROUND;
    let r = madd::<FMA>(n, -LN2_LO, madd::<FMA>(n, -LN2_HI, y));
    let mut p = 1. / 5040.;
    for c in [1. / 720., 1. / 120., 1. / 24., 1. / 6., 0.5, 1., 1.] {
        p = madd::<FMA>(p, r, c);
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
    let mut acc = [[0f32; LANES]; 4];
    let whole = n / (4 * LANES) * (4 * LANES);
    for (x, y) in a[..whole].chunks_exact(4 * LANES).zip(b[..whole].chunks_exact(4 * LANES)) {
        for u in 0..4 {
            for l in 0..LANES {
                acc[u][l] = madd::<FMA>(x[u * LANES + l], y[u * LANES + l], acc[u][l]);
            }
        }
    }
    // A head's 48 or 80 leave half of that: in lanes too.
    let (a, b) = (a[whole..].chunks_exact(LANES), b[whole..].chunks_exact(LANES));
    let (last_a, last_b) = (a.remainder(), b.remainder());
    for (u, (x, y)) in a.zip(b).enumerate() {
        for l in 0..LANES {
            acc[u][l] = madd::<FMA>(x[l], y[l], acc[u][l]);
        }
    }
    for (l, (x, y)) in last_a.iter().zip(last_b).enumerate() {
        acc[3][l] = madd::<FMA>(*x, *y, acc[3][l]);
    }
    let mut v = [0f32; LANES];
    for l in 0..LANES {
        v[l] = (acc[0][l] + acc[1][l]) + (acc[2][l] + acc[3][l]);
    }
    lanes_sum(v)
}

/// Softmax of a row in place. A row of −∞ alone becomes zeros.
#[inline(always)]
pub(super) fn softmax_row<const FMA: bool>(x: &mut [f32]) {
    let m = max(x);
    if m == f32::NEG_INFINITY {
        x.fill(0.);
        return;
    }
    for v in x.iter_mut() {
        *v = exp::<FMA>(*v - m);
    }
    let inv = 1. / sum_by(x.len(), |i| x[i]);
    for v in x.iter_mut() {
        *v *= inv;
    }
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
            assert_eq!(super::sum_by(n, |i| x[i] * x[i]), want);
            assert_eq!(super::max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
