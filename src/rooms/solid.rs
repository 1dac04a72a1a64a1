//! The primitives that rooms are built of, and where a ray meets them.
//!
//! Three convex shapes (box, ellipsoid, frustum) in a rotated frame; no meshes, no transparency.
//! World coordinates: metres, y up, the floor at y = 0. Rays are `origin + t · direction` with
//! directions of any length, so a direction whose forward part is 1 makes `t` the z-depth.

use super::paint::Paint;

pub type V3 = [f64; 3];

pub fn add(a: V3, b: V3) -> V3 {
    [a[0] + b[0], a[1] + b[1], a[2] + b[2]]
}

pub fn sub(a: V3, b: V3) -> V3 {
    [a[0] - b[0], a[1] - b[1], a[2] - b[2]]
}

pub fn scale(a: V3, k: f64) -> V3 {
    [a[0] * k, a[1] * k, a[2] * k]
}

pub fn mul(a: V3, b: V3) -> V3 {
    [a[0] * b[0], a[1] * b[1], a[2] * b[2]]
}

pub fn mix(a: V3, b: V3, k: f64) -> V3 {
    [a[0] + (b[0] - a[0]) * k, a[1] + (b[1] - a[1]) * k, a[2] + (b[2] - a[2]) * k]
}

pub fn dot(a: V3, b: V3) -> f64 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

pub fn cross(a: V3, b: V3) -> V3 {
    [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
}

pub fn unit(a: V3) -> V3 {
    scale(a, 1. / dot(a, a).sqrt().max(1e-12))
}

/// Shapes fill `[-1, 1]³` of their frame, before [`Solid::half`] scales them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    Box,
    Ellipsoid,
    /// Upright cylinder or cone: relative radius at the bottom (y = −1) and at the top (y = 1),
    /// the larger of them 1.
    Frustum {
        bottom: f64,
        top: f64,
    },
}

#[derive(Clone, Debug)]
pub struct Solid {
    pub shape: Shape,
    pub centre: V3,
    /// Orthonormal axes of the frame, in world coordinates.
    pub axes: [V3; 3],
    /// Half extents along the axes, metres.
    pub half: V3,
    pub paint: Paint,
}

/// A linear map into a solid's unit frame.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    rows: [V3; 3],
}

impl Frame {
    pub fn apply(&self, v: V3) -> V3 {
        [dot(self.rows[0], v), dot(self.rows[1], v), dot(self.rows[2], v)]
    }
}

impl Solid {
    pub fn frame(&self) -> Frame {
        Frame { rows: std::array::from_fn(|i| scale(self.axes[i], 1. / self.half[i])) }
    }

    /// The corners of its oriented bounding box.
    pub fn corners(&self) -> [V3; 8] {
        std::array::from_fn(|i| {
            let mut p = self.centre;
            for k in 0..3 {
                let s = if i >> k & 1 == 1 { self.half[k] } else { -self.half[k] };
                p = add(p, scale(self.axes[k], s));
            }
            p
        })
    }

    /// How far it reaches from its centre along the unit vector `n`.
    pub fn reach(&self, n: V3) -> (f64, f64) {
        let c: V3 = std::array::from_fn(|i| dot(self.axes[i], n) * self.half[i]);
        match self.shape {
            Shape::Box => {
                let r = c[0].abs() + c[1].abs() + c[2].abs();
                (-r, r)
            }
            Shape::Ellipsoid => {
                let r = dot(c, c).sqrt();
                (-r, r)
            }
            Shape::Frustum { bottom, top } => {
                let r = (c[0] * c[0] + c[2] * c[2]).sqrt();
                let (b, t) = (r * bottom, r * top);
                ((-c[1] - b).min(c[1] - t), (-c[1] + b).max(c[1] + t))
            }
        }
    }

    /// Turns by `yaw` about the vertical through the origin, then moves.
    pub fn place(&mut self, yaw: (f64, f64), to: V3) {
        let (s, c) = yaw;
        let turn = |v: V3| [c * v[0] + s * v[2], v[1], c * v[2] - s * v[0]];
        self.centre = add(turn(self.centre), to);
        self.axes = self.axes.map(turn);
    }

    /// Outward unit normal in the world at a point of the surface (unit frame).
    pub fn normal(&self, q: V3, face: u8) -> V3 {
        let n = match self.shape {
            Shape::Box => {
                let mut n = [0.; 3];
                n[(face / 2) as usize] = if face % 2 == 1 { 1. } else { -1. };
                n
            }
            Shape::Ellipsoid => q,
            Shape::Frustum { bottom, top } => match face {
                1 => [0., -1., 0.],
                2 => [0., 1., 0.],
                _ => {
                    let slope = (top - bottom) / 2.;
                    [q[0], -slope * ((bottom + top) / 2. + slope * q[1]), q[2]]
                }
            },
        };
        let n: V3 = std::array::from_fn(|i| n[i] / self.half[i]);
        unit(add(add(scale(self.axes[0], n[0]), scale(self.axes[1], n[1])), scale(self.axes[2], n[2])))
    }
}

/// Nearest `t > 0` at which a ray (in the unit frame) enters the shape, and the face it meets.
/// Rays that start inside do not meet it.
#[inline(always)]
pub fn meet(shape: Shape, o: V3, d: V3) -> Option<(f64, u8)> {
    match shape {
        Shape::Box => {
            let (mut near, mut far, mut face) = (0., f64::INFINITY, 6u8);
            for i in 0..3 {
                let inv = 1. / d[i];
                let (a, b) = ((-1. - o[i]) * inv, (1. - o[i]) * inv);
                let (a, b, f) = if a < b { (a, b, 0) } else { (b, a, 1) };
                if a > near {
                    near = a;
                    face = 2 * i as u8 + f;
                }
                far = if b < far { b } else { far };
            }
            (near < far && face < 6).then_some((near, face))
        }
        Shape::Ellipsoid => {
            let (a, b, c) = (dot(d, d), dot(o, d), dot(o, o) - 1.);
            let disc = b * b - a * c;
            if disc <= 0. {
                return None;
            }
            let t = (-b - disc.sqrt()) / a;
            (t > 0.).then_some((t, 0))
        }
        Shape::Frustum { bottom, top } => {
            let (m, k) = ((bottom + top) / 2., (top - bottom) / 2.);
            let (ro, rd) = (m + k * o[1], k * d[1]);
            let a = d[0] * d[0] + d[2] * d[2] - rd * rd;
            let b = o[0] * d[0] + o[2] * d[2] - ro * rd;
            let c = o[0] * o[0] + o[2] * o[2] - ro * ro;
            let disc = b * b - a * c;
            let mut best = (f64::INFINITY, 0u8);
            if disc > 0. && a.abs() > 1e-12 {
                let root = disc.sqrt();
                for t in [(-b - root) / a, (-b + root) / a] {
                    if t > 0. && t < best.0 && (o[1] + t * d[1]).abs() <= 1. {
                        best = (t, 0);
                    }
                }
            }
            if d[1] != 0. {
                for (y, r, face) in [(-1., bottom, 1), (1., top, 2)] {
                    let t = (y - o[1]) / d[1];
                    let (x, z) = (o[0] + t * d[0], o[2] + t * d[2]);
                    if t > 0. && t < best.0 && x * x + z * z <= r * r {
                        best = (t, face);
                    }
                }
            }
            best.0.is_finite().then_some(best)
        }
    }
}
