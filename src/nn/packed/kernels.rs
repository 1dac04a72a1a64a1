//! The inner loops of [`super::product`], by instructions.

use super::formats::Format;
use super::product::{Input, Kernel, SHARE, SIDE, Slab};
#[cfg(target_arch = "x86_64")]
use super::{
    formats::widen,
    product::{DEPTH, LINES},
};

/// For any processor.
pub(super) struct Portable;

impl Kernel for Portable {
    #[inline(always)]
    unsafe fn fetch(_: *const u8, _: usize, _: usize) {}

    #[inline(always)]
    unsafe fn transpose(slab: &mut Slab, depth: usize) {
        for (i, words) in slab.words.iter_mut().enumerate().take(depth / 4) {
            for (word, row) in words.iter_mut().zip(&slab.rows) {
                *word = row[i];
            }
        }
    }

    #[inline(always)]
    unsafe fn grow<F: Format, const R: usize>(
        slab: &Slab,
        x: &Input,
        row: usize,
        at: usize,
        depth: usize,
        to: &mut [f32],
        out: usize,
        cols: usize,
    ) {
        for r in 0..R {
            let from = (row + r) * x.k + at;
            let to = &mut to[r * out..r * out + cols];
            let mut sums = [0f32; SIDE];
            sums[..cols].copy_from_slice(to);
            for g in 0..depth / F::GROUP {
                let here = from + g * F::GROUP;
                let mut whole = [x.starts[here / F::GROUP]; SIDE];
                for (i, q) in x.q[here..here + F::GROUP].chunks_exact(4).enumerate() {
                    for (whole, word) in whole.iter_mut().zip(&slab.words[g * F::GROUP / 4 + i]) {
                        for (w, q) in word.to_ne_bytes().iter().zip(q) {
                            *whole += i32::from(*w) * i32::from(*q);
                        }
                    }
                }
                let share = x.scales[here / SHARE];
                for l in 0..SIDE {
                    sums[l] += whole[l] as f32 * (slab.scales[g][l] * share);
                    if F::MINS {
                        sums[l] -= slab.mins[g][l] * x.sums[here / SHARE];
                    }
                }
            }
            to.copy_from_slice(&sums[..cols]);
        }
    }
}

/// What [`Kernel::grow`] reads and writes is there.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn check<F: Format, const R: usize>(
    x: &Input,
    (row, at, depth): (usize, usize, usize),
    to: &[f32],
    (out, cols): (usize, usize),
) {
    assert!(depth <= DEPTH && at % SHARE == 0 && depth % SHARE == 0 && x.holds::<F>(row, R, at, depth));
    assert!((1..=SIDE).contains(&cols) && (R - 1) * out + cols <= to.len());
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn fetch(first: *const u8, len: usize) {
    use std::arch::x86_64::*;
    for at in (0..len).step_by(64) {
        // SAFETY: a hint, for any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(first.wrapping_add(at).cast()) }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn fetch_rows(first: *const u8, per_row: usize, len: usize) {
    (0..SIDE).for_each(|row| fetch(first.wrapping_add(row * per_row), len));
}

/// 16 sums in a register, and products of bytes summed by fours.
#[cfg(target_arch = "x86_64")]
pub(super) struct Avx512;

#[cfg(target_arch = "x86_64")]
impl Kernel for Avx512 {
    #[inline(always)]
    unsafe fn fetch(first: *const u8, per_row: usize, len: usize) {
        fetch_rows(first, per_row, len);
    }

    #[inline(always)]
    unsafe fn transpose(slab: &mut Slab, depth: usize) {
        use std::arch::x86_64::*;
        for at in (0..depth / 4).step_by(SIDE) {
            // SAFETY: the processor has the instructions by the caller's word; rows are 64 words long
            // and `at` is a multiple of 16 below that.
            unsafe {
                let mut block = [_mm512_setzero_si512(); SIDE];
                for (block, row) in block.iter_mut().zip(&slab.rows) {
                    *block = _mm512_load_si512(row.as_ptr().add(at).cast());
                }
                for (word, block) in slab.words[at..].iter_mut().zip(crate::nn::simd::transpose(block)) {
                    _mm512_store_si512(word.as_mut_ptr().cast(), block);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn grow<F: Format, const R: usize>(
        slab: &Slab,
        x: &Input,
        row: usize,
        at: usize,
        depth: usize,
        to: &mut [f32],
        out: usize,
        cols: usize,
    ) {
        use std::arch::x86_64::*;
        check::<F, R>(x, (row, at, depth), to, (out, cols));
        let from = row * x.k + at;
        let mask = (0xffff_u32 >> (SIDE - cols)) as __mmask16;
        // SAFETY: the processor has the instructions by the caller's word. What is read of the input and
        // written is in bounds as checked; a slab is `DEPTH` deep and aligned.
        unsafe {
            let mut sums = [_mm512_setzero_ps(); R];
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_maskz_loadu_ps(mask, to.as_ptr().add(r * out));
            }
            for g in 0..depth / F::GROUP {
                let here = from + g * F::GROUP;
                let mut whole = [_mm512_setzero_si512(); R];
                if F::OFFSET != 0 {
                    for (r, whole) in whole.iter_mut().enumerate() {
                        *whole = _mm512_set1_epi32(*x.starts.get_unchecked((here + r * x.k) / F::GROUP));
                    }
                }
                for i in 0..F::GROUP / 4 {
                    let words = slab.words.get_unchecked(g * F::GROUP / 4 + i);
                    let w = _mm512_load_si512(words.as_ptr().cast());
                    for (r, whole) in whole.iter_mut().enumerate() {
                        let q = x.q.as_ptr().add(here + r * x.k + 4 * i).cast::<i32>().read_unaligned();
                        *whole = _mm512_dpbusd_epi32(*whole, w, _mm512_set1_epi32(q));
                    }
                }
                let scales = _mm512_load_ps(slab.scales.get_unchecked(g).as_ptr());
                for (r, (sum, whole)) in sums.iter_mut().zip(whole).enumerate() {
                    let share = _mm512_set1_ps(*x.scales.get_unchecked((here + r * x.k) / SHARE));
                    let part = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_mul_ps(scales, share));
                    *sum = _mm512_add_ps(*sum, part);
                    if F::MINS {
                        let mins = _mm512_load_ps(slab.mins.get_unchecked(g).as_ptr());
                        let of = _mm512_set1_ps(*x.sums.get_unchecked((here + r * x.k) / SHARE));
                        *sum = _mm512_sub_ps(*sum, _mm512_mul_ps(mins, of));
                    }
                }
            }
            for (r, sum) in sums.iter().enumerate() {
                _mm512_mask_storeu_ps(to.as_mut_ptr().add(r * out), mask, *sum);
            }
        }
    }
}

/// 8 sums in a register; `VNNI` says whether products of bytes are summed by fours in one instruction.
#[cfg(target_arch = "x86_64")]
pub(super) struct Avx2<const VNNI: bool>;

#[cfg(target_arch = "x86_64")]
impl<const VNNI: bool> Kernel for Avx2<VNNI> {
    const FEW: usize = 8;

    #[inline(always)]
    unsafe fn dots<F: Format>(
        w: &[u8],
        x: &Input,
        (first, rows): (usize, usize),
        to: &mut [f32],
        out: usize,
    ) {
        // SAFETY: by the caller's word.
        unsafe { avx2_dots::<F, VNNI>(w, x, (first, rows), to, out) }
    }

    #[inline(always)]
    unsafe fn fetch(first: *const u8, per_row: usize, len: usize) {
        fetch_rows(first, per_row, len);
    }

    #[inline(always)]
    unsafe fn transpose(slab: &mut Slab, depth: usize) {
        use std::arch::x86_64::*;
        for at in (0..depth / 4).step_by(8) {
            for half in [0, 8] {
                // SAFETY: the processor has the instructions by the caller's word; rows are 64 words long
                // and `at` is a multiple of 8 below that.
                unsafe {
                    let mut a = [_mm256_setzero_si256(); 8];
                    for (a, row) in a.iter_mut().zip(&slab.rows[half..]) {
                        *a = _mm256_load_si256(row.as_ptr().add(at).cast());
                    }
                    let mut b = a;
                    for i in (0..8).step_by(2) {
                        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
                        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
                    }
                    // Now half q of c[4 g + i] holds column 4 q + i of the rows of group g.
                    let mut c = b;
                    for g in [0, 4] {
                        c[g] = _mm256_unpacklo_epi64(b[g], b[g + 2]);
                        c[g + 1] = _mm256_unpackhi_epi64(b[g], b[g + 2]);
                        c[g + 2] = _mm256_unpacklo_epi64(b[g + 1], b[g + 3]);
                        c[g + 3] = _mm256_unpackhi_epi64(b[g + 1], b[g + 3]);
                    }
                    for i in 0..4 {
                        let low = _mm256_permute2x128_si256::<0x20>(c[i], c[4 + i]);
                        let high = _mm256_permute2x128_si256::<0x31>(c[i], c[4 + i]);
                        for (i, word) in [(i, low), (4 + i, high)] {
                            let to = slab.words[at + i][half..].as_mut_ptr();
                            _mm256_store_si256(to.cast(), word);
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn grow<F: Format, const R: usize>(
        slab: &Slab,
        x: &Input,
        row: usize,
        at: usize,
        depth: usize,
        to: &mut [f32],
        out: usize,
        cols: usize,
    ) {
        check::<F, R>(x, (row, at, depth), to, (out, cols));
        let mut kept = [[0f32; SIDE]; R];
        for (r, kept) in kept.iter_mut().enumerate() {
            kept[..cols].copy_from_slice(&to[r * out..r * out + cols]);
        }
        for half in [0, 8] {
            // Four rows' sums are what the registers hold.
            let mut r = 0;
            while r < R {
                let from = (row + r) * x.k + at;
                // SAFETY: as checked, and by the caller's word.
                unsafe {
                    if R >= 4 {
                        avx2_half::<F, 4, VNNI>(slab, x, from, depth, half, &mut kept[r..]);
                        r += 4;
                    } else {
                        avx2_half::<F, 1, VNNI>(slab, x, from, depth, half, &mut kept[r..]);
                        r += 1;
                    }
                }
            }
        }
        for (r, kept) in kept.iter().enumerate() {
            to[r * out..r * out + cols].copy_from_slice(&kept[..cols]);
        }
    }
}

/// [`Kernel::grow`] for 8 sums of `R` rows, from `half` on.
///
/// # Safety
/// The processor must have AVX2, and AVX-VNNI where that is said; from `from` on, `R` rows of the input must
/// be `depth` long.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn avx2_half<F: Format, const R: usize, const VNNI: bool>(
    slab: &Slab,
    x: &Input,
    from: usize,
    depth: usize,
    half: usize,
    kept: &mut [[f32; SIDE]],
) {
    use std::arch::x86_64::*;
    assert!(kept.len() >= R && half + 8 <= SIDE && depth <= DEPTH);
    // Without VNNI two products are summed in 16 bits, where 255 · 127 · 2 has no room: sizes up to 128
    // have, and the sign goes to the input.
    let signed = !VNNI && F::OFFSET == 128;
    // SAFETY: the processor has the instructions and the input is long enough by the caller's word; what is
    // read and written besides is in bounds as asserted.
    unsafe {
        let mut sums = [_mm256_setzero_ps(); R];
        for (sum, kept) in sums.iter_mut().zip(&*kept) {
            *sum = _mm256_loadu_ps(kept.as_ptr().add(half));
        }
        for g in 0..depth / F::GROUP {
            let here = from + g * F::GROUP;
            let mut whole = [_mm256_setzero_si256(); R];
            if F::OFFSET != 0 && !signed {
                for (r, whole) in whole.iter_mut().enumerate() {
                    *whole = _mm256_set1_epi32(*x.starts.get_unchecked((here + r * x.k) / F::GROUP));
                }
            }
            for i in 0..F::GROUP / 4 {
                let words = slab.words.get_unchecked(g * F::GROUP / 4 + i);
                let mut w = _mm256_load_si256(words.as_ptr().add(half).cast());
                if signed {
                    w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
                }
                let size = if signed { _mm256_abs_epi8(w) } else { w };
                for (r, whole) in whole.iter_mut().enumerate() {
                    let q = x.q.as_ptr().add(here + r * x.k + 4 * i).cast::<i32>().read_unaligned();
                    let q = _mm256_set1_epi32(q);
                    *whole = if VNNI {
                        _mm256_dpbusd_avx_epi32(*whole, w, q)
                    } else {
                        let q = if signed { _mm256_sign_epi8(q, w) } else { q };
                        let pairs = _mm256_maddubs_epi16(size, q);
                        _mm256_add_epi32(*whole, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
                    };
                }
            }
            let scales = _mm256_load_ps(slab.scales.get_unchecked(g).as_ptr().add(half));
            for (r, (sum, whole)) in sums.iter_mut().zip(whole).enumerate() {
                let share = _mm256_set1_ps(*x.scales.get_unchecked((here + r * x.k) / SHARE));
                let part = _mm256_mul_ps(_mm256_cvtepi32_ps(whole), _mm256_mul_ps(scales, share));
                *sum = _mm256_add_ps(*sum, part);
                if F::MINS {
                    let mins = _mm256_load_ps(slab.mins.get_unchecked(g).as_ptr().add(half));
                    let of = _mm256_set1_ps(*x.sums.get_unchecked((here + r * x.k) / SHARE));
                    *sum = _mm256_sub_ps(*sum, _mm256_mul_ps(mins, of));
                }
            }
        }
        for (sum, kept) in sums.iter().zip(kept) {
            _mm256_storeu_ps(kept.as_mut_ptr().add(half), *sum);
        }
    }
}

/// [`Kernel::dots`]: products of bytes where they lie, each weight row's in a register that is summed over its
/// lanes, eight of them together.
///
/// # Safety
/// The processor must have AVX2, and AVX-VNNI where that is said.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn avx2_dots<F: Format, const VNNI: bool>(
    w: &[u8],
    x: &Input,
    (first, rows): (usize, usize),
    to: &mut [f32],
    out: usize,
) {
    use std::arch::x86_64::*;
    let (k, per_row) = (x.k, x.k / F::BLOCK * F::BYTES);
    let cols = w.len() / per_row;
    assert!((1..=LINES).contains(&cols) && w.len() == cols * per_row && x.holds::<F>(first, rows, 0, k));
    assert!(rows <= Avx2::<VNNI>::FEW && (rows - 1) * out + cols <= to.len());
    // As in `avx2_half`.
    let signed = !VNNI && F::OFFSET == 128;
    let groups = F::BLOCK / F::GROUP;
    // A block of each weight row; of rows that are none what was there.
    let mut q = [[0u8; DEPTH]; LINES];
    let (mut scales, mut mins) = ([[0f32; LINES]; 16], [[0f32; LINES]; 16]);
    // SAFETY: the processor has the instructions by the caller's word; what is read is in bounds as asserted, or
    // in the arrays above.
    unsafe {
        let mut sums = [_mm256_setzero_ps(); 8];
        for b in 0..k / F::BLOCK {
            let (mut of_row, mut least, mut halves) = ([0.; 16], [0.; 16], [0u16; LINES]);
            for (j, q) in q.iter_mut().enumerate().take(cols) {
                let at = j * per_row + b * F::BYTES;
                fetch(w.as_ptr().wrapping_add(w.len() + at), F::BYTES);
                let block = w.get_unchecked(at..at + F::BYTES);
                F::decode(block, &mut q[..F::BLOCK], &mut of_row, &mut least);
                if F::HALF_FIRST {
                    halves[j] = u16::from_le_bytes([block[0], block[1]]);
                    continue;
                }
                for g in 0..groups {
                    scales[g][j] = of_row[g];
                    mins[g][j] = least[g];
                }
            }
            if F::HALF_FIRST {
                for (scale, half) in scales[0].iter_mut().zip(&halves) {
                    *scale = widen(*half);
                }
            }
            for u in 0..F::BLOCK / SHARE {
                for (r, sum) in sums.iter_mut().enumerate().take(rows) {
                    let here = (first + r) * k + b * F::BLOCK + u * SHARE;
                    let input = _mm256_loadu_si256(x.q.as_ptr().add(here).cast());
                    let mut dots = [_mm256_setzero_si256(); LINES];
                    for (dot, q) in dots.iter_mut().zip(&q) {
                        let w = _mm256_loadu_si256(q.as_ptr().add(u * SHARE).cast());
                        *dot = if VNNI {
                            _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), w, input)
                        } else {
                            let w = if signed { _mm256_xor_si256(w, _mm256_set1_epi8(-128)) } else { w };
                            let pairs = match signed {
                                true => _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(input, w)),
                                false => _mm256_maddubs_epi16(w, input),
                            };
                            _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
                        };
                    }
                    let two = |i: usize| _mm256_hadd_epi32(dots[i], dots[i + 1]);
                    let (a, b) = (_mm256_hadd_epi32(two(0), two(2)), _mm256_hadd_epi32(two(4), two(6)));
                    // Sums of the first 16 numbers, and of the others.
                    let low = _mm256_permute2x128_si256::<0x20>(a, b);
                    let high = _mm256_permute2x128_si256::<0x31>(a, b);
                    let share = _mm256_set1_ps(*x.scales.get_unchecked(here / SHARE));
                    let mut add = |g: usize, whole: __m256i| {
                        let mut whole = whole;
                        if F::OFFSET != 0 && !signed {
                            let start = *x.starts.get_unchecked(here / F::GROUP + g);
                            whole = _mm256_add_epi32(whole, _mm256_set1_epi32(start));
                        }
                        let g = u * SHARE / F::GROUP + g;
                        let scales = _mm256_loadu_ps(scales[g].as_ptr());
                        let part = _mm256_mul_ps(_mm256_cvtepi32_ps(whole), _mm256_mul_ps(scales, share));
                        *sum = _mm256_add_ps(*sum, part);
                        if F::MINS {
                            let mins = _mm256_loadu_ps(mins[g].as_ptr());
                            let of = _mm256_set1_ps(*x.sums.get_unchecked(here / SHARE));
                            *sum = _mm256_sub_ps(*sum, _mm256_mul_ps(mins, of));
                        }
                    };
                    if F::GROUP == SHARE {
                        add(0, _mm256_add_epi32(low, high));
                    } else {
                        add(0, low);
                        add(1, high);
                    }
                }
            }
        }
        for (r, sum) in sums.iter().enumerate().take(rows) {
            let mut row = [0f32; LINES];
            _mm256_storeu_ps(row.as_mut_ptr(), *sum);
            to[r * out..r * out + cols].copy_from_slice(&row[..cols]);
        }
    }
}
