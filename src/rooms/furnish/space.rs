//! What a thing takes up: an upright box in the room, and that box's outline in the picture.

use crate::rooms::Kind;
use crate::rooms::solid::V3;

/// An upright box that something occupies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room3 {
    pub centre: [f64; 2],
    pub yaw: (f64, f64),
    pub half: [f64; 2],
    pub low: f64,
    pub high: f64,
}

impl Room3 {
    pub fn new(at: V3, yaw: (f64, f64), size: V3) -> Self {
        Self {
            centre: [at[0], at[2]],
            yaw,
            half: [size[0] / 2., size[2] / 2.],
            low: at[1],
            high: at[1] + size[1],
        }
    }

    fn axes(&self) -> [[f64; 2]; 2] {
        let (s, c) = self.yaw;
        [[c, -s], [s, c]]
    }

    fn spread(&self, axis: [f64; 2]) -> f64 {
        let [a, b] = self.axes();
        self.half[0] * (a[0] * axis[0] + a[1] * axis[1]).abs()
            + self.half[1] * (b[0] * axis[0] + b[1] * axis[1]).abs()
    }

    /// Separating-axis test, with `margin` metres of air on the sides.
    pub fn meets(&self, other: &Self, margin: f64) -> bool {
        if self.low + 1e-6 >= other.high || other.low + 1e-6 >= self.high {
            return false;
        }
        let d = [other.centre[0] - self.centre[0], other.centre[1] - self.centre[1]];
        self.axes().into_iter().chain(other.axes()).all(|axis| {
            let apart = (d[0] * axis[0] + d[1] * axis[1]).abs();
            apart < self.spread(axis) + other.spread(axis) + margin
        })
    }

    pub fn inside(&self, room: V3) -> bool {
        let (x, z) = (self.spread([1., 0.]), self.spread([0., 1.]));
        let fits = |c: f64, r: f64, max: f64| c - r > 0.004 && c + r < max - 0.004;
        fits(self.centre[0], x, room[0]) && fits(self.centre[1], z, room[2]) && self.high < room[1]
    }

    pub fn corners(&self) -> [V3; 8] {
        let [a, b] = self.axes();
        std::array::from_fn(|i| {
            let (s, t) = (if i & 1 == 0 { -1. } else { 1. }, if i & 2 == 0 { -1. } else { 1. });
            let at = |k: usize| self.centre[k] + s * self.half[0] * a[k] + t * self.half[1] * b[k];
            [at(0), if i & 4 == 0 { self.low } else { self.high }, at(1)]
        })
    }
}

/// A thing as it will look: its box in the picture (width 1) and its distance.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outline {
    pub low: [f64; 2],
    pub high: [f64; 2],
    pub near: f64,
    /// Share of its box that it fills.
    pub solid: f64,
    pub covered: f64,
}

impl Outline {
    pub fn area(&self) -> f64 {
        (self.high[0] - self.low[0]).max(0.) * (self.high[1] - self.low[1]).max(0.)
    }

    pub fn common(&self, other: &Self) -> f64 {
        let side = |k: usize| (self.high[k].min(other.high[k]) - self.low[k].max(other.low[k])).max(0.);
        side(0) * side(1)
    }
}

/// How much of its box in the picture a kind fills: legs and leaves leave gaps.
pub(super) fn fill(kind: Kind) -> f64 {
    match kind {
        Kind::Table | Kind::Stool | Kind::Plant => 0.5,
        Kind::Lamp => 0.4,
        Kind::Chair => 0.65,
        Kind::Ball | Kind::Vase => 0.75,
        _ => 0.9,
    }
}

/// A level place on top of a thing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ledge {
    pub at: V3,
    pub yaw: (f64, f64),
    pub half: [f64; 2],
}
