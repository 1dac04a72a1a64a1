//! How quantised blocks hold their numbers: whole numbers of at most 8 bits, in groups with scales.

/// A way of packing in blocks: number `i` of group `g` is `scales[g] · (q[i] − OFFSET) − mins[g]`.
pub(super) trait Format: Sync {
    /// Numbers of a block, and its bytes.
    const BLOCK: usize;
    const BYTES: usize;
    /// Numbers that share a scale: 16 or 32.
    const GROUP: usize;
    const OFFSET: i32;
    /// Are there `mins`? Else they are not written.
    const MINS: bool;
    /// Is a block one group, its scale the half at its beginning? Then `decode` leaves that to the caller,
    /// who has many of them.
    const HALF_FIRST: bool = false;

    /// Takes a block apart; `q` is [`BLOCK`](Self::BLOCK) long, the others have one number a group.
    fn decode(block: &[u8], q: &mut [u8], scales: &mut [f32], mins: &mut [f32]);
}

/// The number of a half, by arithmetic that the compiler vectorises; exact, as is every such number in f32.
#[inline(always)]
pub(super) fn widen(half: u16) -> f32 {
    let half = u32::from(half);
    let bits = (half & 0x7fff) << 13;
    // The exponent's bias grows by 112; by a product, so that subnormal halves come out right too.
    let size = f32::from_bits(bits) * f32::from_bits((127 + 112) << 23);
    let size = if half & 0x7c00 == 0x7c00 { bits | 0x7f80_0000 } else { size.to_bits() };
    f32::from_bits(size | (half & 0x8000) << 16)
}

#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f32 {
    widen(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// 32 bytes copied out of a block and, below, into numbers: of slices that might overlap the compiler made
/// loops of single bytes.
#[inline(always)]
fn bytes(block: &[u8], at: usize) -> [u8; 32] {
    block[at..at + 32].try_into().expect("a slice of that length")
}

#[inline(always)]
fn put(q: &mut [u8], at: usize, bytes: [u8; 32]) {
    q[at..at + 32].copy_from_slice(&bytes);
}

/// Not by `array::map`, which was called, compiled for any processor.
#[inline(always)]
fn each(f: impl Fn(usize) -> u8) -> [u8; 32] {
    let mut all = [0; 32];
    for (i, b) in all.iter_mut().enumerate() {
        *b = f(i);
    }
    all
}

/// A scale, then 32 numbers of 8 bits.
pub(super) struct Q8_0;

impl Format for Q8_0 {
    const BLOCK: usize = 32;
    const BYTES: usize = 34;
    const GROUP: usize = 32;
    const OFFSET: i32 = 128;
    const MINS: bool = false;
    const HALF_FIRST: bool = true;

    #[inline(always)]
    fn decode(block: &[u8], q: &mut [u8], _: &mut [f32], _: &mut [f32]) {
        // Signed numbers plus 128 are unsigned ones.
        let b = bytes(block, 2);
        put(q, 0, each(|i| b[i] ^ 0x80));
    }
}

/// The block's scale and that of its least numbers, then 6 bits of each for 8 groups in 12 bytes: of groups
/// 0–3 in the low bits of bytes 0–3 and 4–7, of the others 4 bits in bytes 8–11 and 2 above those of the
/// first.
#[inline(always)]
fn scales_of_8(block: &[u8], scales: &mut [f32], mins: &mut [f32]) {
    let (d, least, packed) = (half_at(block, 0), half_at(block, 2), &block[4..16]);
    for g in 0..4 {
        let (s, m, rest) = (packed[g], packed[g + 4], packed[g + 8]);
        scales[g] = d * f32::from(s & 63);
        mins[g] = least * f32::from(m & 63);
        scales[g + 4] = d * f32::from(rest & 15 | s >> 6 << 4);
        mins[g + 4] = least * f32::from(rest >> 4 | m >> 6 << 4);
    }
}

/// 8 groups of 32 numbers of 4 bits, two groups to 32 bytes: one in the low halves, one in the high ones.
pub(super) struct Q4K;

impl Format for Q4K {
    const BLOCK: usize = 256;
    const BYTES: usize = 144;
    const GROUP: usize = 32;
    const OFFSET: i32 = 0;
    const MINS: bool = true;

    #[inline(always)]
    fn decode(block: &[u8], q: &mut [u8], scales: &mut [f32], mins: &mut [f32]) {
        scales_of_8(block, scales, mins);
        for p in 0..4 {
            let b = bytes(block, 16 + 32 * p);
            put(q, 64 * p, each(|i| b[i] & 15));
            put(q, 64 * p + 32, each(|i| b[i] >> 4));
        }
    }
}

/// [`Q4K`] with a fifth bit: bit `g` of byte `i` of 32 is that of number `i` of group `g`.
pub(super) struct Q5K;

impl Format for Q5K {
    const BLOCK: usize = 256;
    const BYTES: usize = 176;
    const GROUP: usize = 32;
    const OFFSET: i32 = 0;
    const MINS: bool = true;

    #[inline(always)]
    fn decode(block: &[u8], q: &mut [u8], scales: &mut [f32], mins: &mut [f32]) {
        scales_of_8(block, scales, mins);
        let fifth = bytes(block, 16);
        for p in 0..4 {
            let b = bytes(block, 48 + 32 * p);
            let of = |i: usize| fifth[i] >> (2 * p);
            put(q, 64 * p, each(|i| b[i] & 15 | (of(i) & 1) << 4));
            put(q, 64 * p + 32, each(|i| b[i] >> 4 | (of(i) >> 1 & 1) << 4));
        }
    }
}

/// 16 groups of 16 numbers of 6 bits. Half of them, 128, have 64 bytes of low bits (numbers 0–63 in the low
/// halves, the others in the high ones) and 32 of high bits (number `32 j + i` in bits `2 j` of byte `i`).
pub(super) struct Q6K;

impl Format for Q6K {
    const BLOCK: usize = 256;
    const BYTES: usize = 210;
    const GROUP: usize = 16;
    const OFFSET: i32 = 32;
    const MINS: bool = false;

    #[inline(always)]
    fn decode(block: &[u8], q: &mut [u8], scales: &mut [f32], _: &mut [f32]) {
        let d = half_at(block, 208);
        for (s, b) in scales[..16].iter_mut().zip(&block[192..208]) {
            *s = d * f32::from(*b as i8);
        }
        for half in 0..2 {
            let (a, b) = (bytes(block, 64 * half), bytes(block, 64 * half + 32));
            let h = bytes(block, 128 + 32 * half);
            let at = 128 * half;
            put(q, at, each(|i| a[i] & 15 | (h[i] & 3) << 4));
            put(q, at + 32, each(|i| b[i] & 15 | (h[i] >> 2 & 3) << 4));
            put(q, at + 64, each(|i| a[i] >> 4 | (h[i] >> 4 & 3) << 4));
            put(q, at + 96, each(|i| b[i] >> 4 | (h[i] >> 6) << 4));
        }
    }
}

/// The numbers of whole blocks.
pub(super) fn unpack<F: Format>(bytes: &[u8], numbers: &mut [f32]) {
    let (mut q, mut scales, mut mins) = ([0; 256], [0.; 16], [0.; 16]);
    for (block, numbers) in bytes.chunks_exact(F::BYTES).zip(numbers.chunks_exact_mut(F::BLOCK)) {
        F::decode(block, &mut q, &mut scales, &mut mins);
        if F::HALF_FIRST {
            scales[0] = half_at(block, 0);
        }
        let groups = numbers.chunks_exact_mut(F::GROUP).zip(q.chunks_exact(F::GROUP));
        for ((numbers, q), (scale, min)) in groups.zip(scales.iter().zip(&mins)) {
            for (n, q) in numbers.iter_mut().zip(q) {
                let whole = scale * (i32::from(*q) - F::OFFSET) as f32;
                *n = if F::MINS { whole - min } else { whole };
            }
        }
    }
}
