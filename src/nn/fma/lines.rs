//! Packing rows of one factor and columns of the other, which is the same: lines along `k`, some beside each other.

use crate::nn::cpu::Mat;
use crate::nn::simd::{mask16, transpose as sixteen_by_sixteen};
use std::arch::x86_64::*;

/// Rows of `a` or columns of `b`, which lie along `k`.
#[derive(Clone, Copy)]
pub(super) struct Lines<'a> {
    pub data: &'a [f32],
    pub apart: usize,
    pub k_apart: usize,
    /// Those that are meant.
    pub first: usize,
    pub count: usize,
}

impl<'a> Lines<'a> {
    /// The rows of a matrix.
    pub fn rows(of: Mat<'a>, count: usize) -> Self {
        Self { data: of.data, apart: of.rows_apart, k_apart: of.cols_apart, first: 0, count }
    }

    /// Up to `most` from `line` on, where their numbers lie, and how far apart.
    pub fn in_place(self, line: usize, most: usize, part: (usize, usize)) -> (*const f32, usize) {
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

    /// [`pack`](Self::pack) of `W` lines beside each other.
    ///
    /// # Safety
    /// As of `pack`; `data` must be the first number.
    #[inline(always)]
    unsafe fn row_by_row<const W: usize>(self, data: *const f32, depth: usize, to: *mut f32) {
        for k in 0..depth {
            // SAFETY: by the caller's word.
            unsafe { data.add(k * self.k_apart).copy_to_nonoverlapping(to.add(k * W), W) };
        }
    }

    /// Packs `W` lines from `line` on, `depth` numbers of each from `from` on: the first of all lines, then the
    /// second. Zeros stand for lines that are none.
    ///
    /// # Safety
    /// The processor must have AVX2 and FMA; the slice must hold the lines, and `to` have room for `W · depth`
    /// numbers, and for two more unless `W` is a multiple of eight.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn pack<const W: usize>(self, line: usize, part: (usize, usize), to: *mut f32) {
        let (lines, depth) = (W.min(self.count - line), part.1);
        let data = self.start(line, lines, part);
        // SAFETY: what is read is inside the slice, as `start` found; what is written by the caller's word.
        unsafe {
            if lines == W && self.apart == 1 {
                self.row_by_row::<W>(data, depth, to);
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
    pub unsafe fn pack_wide<const W: usize>(self, line: usize, part: (usize, usize), to: *mut f32) {
        /// Numbers of a line that are asked for before they are read: the lines are too many for the processor to
        /// see it coming.
        const SOON: usize = 64;
        let (lines, depth) = (W.min(self.count - line), part.1);
        let data = self.start(line, lines, part);
        // SAFETY: what is read is inside the slice, as `start` found; what is written by the caller's word.
        unsafe {
            if lines == W && self.apart == 1 {
                self.row_by_row::<W>(data, depth, to);
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
