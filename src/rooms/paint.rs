//! Colours and procedural patterns.
//!
//! Colours are linear light, 0 to 1. A pattern never changes the colour that a person would
//! name: its second tone is a neighbour of the first, or covers much less than half.

use rand::Rng;

use super::solid::{V3, mix, scale};
use super::view::Colour;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pattern {
    Plain,
    /// Grain along v.
    Wood,
    /// Stripes across u.
    Stripes,
    Checks,
    Dots,
    /// Woven or sprayed: fine noise.
    Speckle,
    /// Floorboards along v, `scale` boards a metre.
    Planks,
    Tiles,
    Bricks,
    /// Abstract landscape of a framed picture, by its number.
    Art(u32),
    /// A dark screen with the sheen of the room.
    Screen,
    /// Seams of a ball.
    Seams,
    /// A window with the sky behind it.
    Sky,
}

#[derive(Clone, Copy, Debug)]
pub struct Paint {
    pub a: V3,
    pub b: V3,
    pub pattern: Pattern,
    /// Repeats a metre (for [`Pattern::Art`] and [`Pattern::Sky`]: none, they fill the face).
    pub scale: f64,
    /// Strength of the highlight.
    pub gloss: f64,
    /// Light of its own.
    pub glow: f64,
}

impl Paint {
    pub fn plain(a: V3) -> Self {
        Self { a, b: a, pattern: Pattern::Plain, scale: 1., gloss: 0.05, glow: 0. }
    }

    pub fn gloss(self, gloss: f64) -> Self {
        Self { gloss, ..self }
    }

    pub fn glow(self, glow: f64) -> Self {
        Self { glow, ..self }
    }

    pub fn pattern(self, pattern: Pattern, b: V3, scale: f64) -> Self {
        Self { pattern, b, scale, ..self }
    }

    /// The same paint, lighter or darker.
    pub fn shade(self, k: f64) -> Self {
        Self { a: scale(self.a, k), b: scale(self.b, k), ..self }
    }

    /// Albedo at (`u`, `v`) metres on a face; `q` runs over `[-1, 1]²` on it.
    pub fn at(&self, u: f64, v: f64, q: [f64; 2]) -> V3 {
        let (x, y) = (u * self.scale, v * self.scale);
        let k = match self.pattern {
            Pattern::Plain => return self.a,
            Pattern::Wood => {
                let warp = noise(x * 1.3, y * 0.35, 3) * 1.6;
                let rings = triangle(x * 1.7 + warp);
                0.65 * rings * rings + 0.35 * noise(x * 9., y * 0.8, 4)
            }
            Pattern::Stripes => step(triangle(x), 0.62),
            Pattern::Checks => 0.5 * step(triangle(x), 0.6) + 0.5 * step(triangle(y), 0.6),
            Pattern::Dots => {
                let (i, j) = (x - floor(x) - 0.5, y - floor(y) - 0.5);
                step(1. - 2. * (i * i + j * j).sqrt(), 0.5)
            }
            Pattern::Speckle => noise(x, y, 7) * 0.6 + noise(x * 2.7, y * 2.7, 8) * 0.4,
            Pattern::Planks => {
                let board = floor(x);
                let end = y * 0.11 + hash(board as i64, 0, 11);
                let tone = hash(board as i64, floor(end) as i64, 12);
                let gap = step((x - board - 0.5).abs() * 2., 0.94)
                    .max(step((end - floor(end) - 0.5).abs() * 2., 0.985));
                let grain = noise(x * 5., y * 0.5, 13);
                (0.45 * tone + 0.3 * grain) * (1. - gap) + gap
            }
            Pattern::Tiles => {
                let (i, j) = (floor(x), floor(y));
                let joint = (x - i - 0.5).abs().max((y - j - 0.5).abs()) * 2.;
                step(joint, 0.95).max(0.18 * hash(i as i64, j as i64, 21))
            }
            Pattern::Bricks => {
                let row = floor(y * 2.4);
                let x = x + 0.5 * (row - 2. * floor(row / 2.));
                let (i, f) = (floor(x), y * 2.4 - row);
                let joint = step((x - i - 0.5).abs() * 2., 0.92).max(step((f - 0.5).abs() * 2., 0.84));
                joint.max(0.3 * hash(i as i64, row as i64, 22) + 0.2 * noise(x * 6., y * 14., 23))
            }
            Pattern::Art(number) => return art(number, q),
            Pattern::Screen => {
                let sheen = (0.5 + 0.35 * q[0] + 0.4 * q[1]).clamp(0., 1.);
                sheen * sheen * step(1. - (q[0] - q[1] * 0.5 - 0.4).abs(), 0.55).max(0.25)
            }
            Pattern::Seams => {
                let thin = |s: f64| step(1. - s.abs() * 6., 0.2);
                thin(q[0]).max(thin(q[1]))
            }
            Pattern::Sky => return mix(self.a, self.b, 0.5 + 0.5 * q[1]),
        };
        mix(self.a, self.b, k)
    }
}

/// 0 below the edge, 1 above, with a soft flank.
fn step(x: f64, edge: f64) -> f64 {
    ((x - edge) * 12. + 0.5).clamp(0., 1.)
}

/// `f64::floor` is a library call on plain x86-64; this is for the metres of a room.
fn floor(x: f64) -> f64 {
    let i = x as i32 as f64;
    if i > x { i - 1. } else { i }
}

fn triangle(x: f64) -> f64 {
    ((x - floor(x)) * 2. - 1.).abs()
}

/// Well-mixed bits from integers; the same on every machine.
pub fn hash_bits(x: u64, y: u64, salt: u64) -> u64 {
    let mut h = x.wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ y.wrapping_mul(0xc2b2_ae3d_27d4_eb4f)
        ^ salt.wrapping_mul(0x1656_67b1_9e37_79f9);
    h = (h ^ (h >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    h = (h ^ (h >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb);
    h ^ (h >> 32)
}

/// A number in [0, 1).
fn hash(x: i64, y: i64, salt: u64) -> f64 {
    (hash_bits(x as u64, y as u64, salt) >> 11) as f64 / (1u64 << 53) as f64
}

fn noise(x: f64, y: f64, salt: u64) -> f64 {
    let (i, j) = (floor(x), floor(y));
    let (f, g) = (x - i, y - j);
    let (f, g) = (f * f * (3. - 2. * f), g * g * (3. - 2. * g));
    let (i, j) = (i as i64, j as i64);
    let row = |j| hash(i, j, salt) * (1. - f) + hash(i + 1, j, salt) * f;
    row(j) * (1. - g) + row(j + 1) * g
}

/// Sky, hills and a sun, on a white mat.
fn art(number: u32, q: [f64; 2]) -> V3 {
    let pick = |k: i64| hash(number as i64, k, 31);
    if q[0].abs() > 0.86 || q[1].abs() > 0.84 {
        return [0.85, 0.83, 0.78];
    }
    let tone = |k: i64, low: f64, high: f64| -> V3 {
        std::array::from_fn(|c| low + (high - low) * pick(k * 3 + c as i64))
    };
    let hill =
        |k: i64, base: f64| base + 0.35 * (noise(q[0] * 1.6 + 7. * pick(k), pick(k + 1) * 9., 32) - 0.5);
    let sun = [1.2 * pick(40) - 0.6, 0.25 + 0.4 * pick(41)];
    if q[1] < hill(50, -0.35) {
        tone(1, 0.02, 0.25)
    } else if q[1] < hill(60, 0.1) {
        tone(2, 0.08, 0.4)
    } else if (q[0] - sun[0]).abs() < 0.18 && (q[1] - sun[1]).abs() < 0.2 {
        [0.95, 0.75, 0.35]
    } else {
        tone(3, 0.4, 0.85)
    }
}

/// Linear light of an sRGB byte triple.
pub fn srgb(rgb: [u8; 3]) -> V3 {
    rgb.map(|c| {
        let c = c as f64 / 255.;
        if c <= 0.04045 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) }
    })
}

/// A tone that a person names `colour` under white light; small variations by `rng`.
pub fn tone(colour: Colour, rng: &mut impl Rng) -> V3 {
    let base = srgb(match colour {
        Colour::Red => [200, 28, 30],
        Colour::Orange => [245, 124, 16],
        Colour::Yellow => [244, 214, 40],
        Colour::Green => [36, 142, 56],
        Colour::Blue => [34, 84, 204],
        Colour::Purple => [126, 46, 168],
        Colour::White => [240, 240, 238],
        Colour::Gray => [126, 127, 130],
        Colour::Black => [27, 27, 30],
        Colour::Brown => [104, 60, 30],
    });
    let bright = rng.random_range(0.88..1.1);
    base.map(|c| (c * bright * rng.random_range(0.94..1.06)).min(0.92))
}
