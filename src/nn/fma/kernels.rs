//! The innermost loops: a few rows by a panel, sums in registers.

use crate::nn::cpu::Place;
use crate::nn::simd::mask16;
use std::arch::x86_64::*;

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
/// As of [`Kernel::multiply`](super::Kernel::multiply), with `R` rows.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn narrow<const R: usize, const PACKED: bool>(
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
/// As of [`Kernel::multiply`](super::Kernel::multiply), with `R` rows.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn wide<const R: usize, const PACKED: bool>(
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
