//! What is no thing: a window, a door, a rug, litter. It has no id, no label and no question.

use rand::Rng;

use super::Furnisher;
use super::space::Room3;
use crate::rooms::kinds::{cuboid, ellipsoid};
use crate::rooms::paint::{Paint, Pattern, srgb};
use crate::rooms::scene::Item;
use crate::rooms::solid::{Solid, V3, add, scale};
use crate::rooms::view::Look;

impl Furnisher {
    /// Adds something that is no thing: it has no id and no label.
    fn fixture(&mut self, solids: Vec<Solid>, at: V3, yaw: (f64, f64), casts: bool) {
        for mut solid in solids {
            solid.place(yaw, at);
            self.scene.items.push(Item { solid, thing: 0, casts });
        }
    }

    pub(super) fn window(&mut self) {
        let (wall, facing) = self.wall();
        let (w, h) = (self.rng.random_range(0.9..1.5), self.rng.random_range(0.9..1.2));
        let mut at = self.before(wall, 0.1, 0.005);
        at[1] = 0.95;
        let curtained = self.scene.look == Look::LivedIn && self.chance(0.6);
        let size = [if curtained { w + 0.7 } else { w + 0.1 }, h + 0.1, 0.1];
        let space = Room3::new(at, facing.sin_cos(), size);
        if !space.inside(self.scene.room) {
            return;
        }
        let white = Paint::plain([0.85, 0.85, 0.84]);
        let sky = Paint::plain([0.75, 0.85, 0.92])
            .pattern(Pattern::Sky, [0.45, 0.66, 0.92], 1.)
            .gloss(0.)
            .glow(0.35);
        let mut solids = vec![
            cuboid([0., h / 2., 0.], [w, h, 0.02], sky),
            cuboid([0., 0., 0.02], [w + 0.1, 0.05, 0.06], white),
            cuboid([0., h, 0.], [w + 0.1, 0.07, 0.045], white),
            cuboid([0., h / 2., 0.], [0.05, h, 0.04], white),
            cuboid([0., h * 0.55, 0.], [w, 0.04, 0.038], white),
        ];
        for s in [-1., 1.] {
            solids.push(cuboid([s * w / 2., h / 2., 0.], [0.07, h, 0.045], white));
            if curtained {
                let tone = [0.5, 0.42, 0.34];
                let cloth = Paint::plain(tone).pattern(Pattern::Stripes, scale(tone, 0.7), 9.).gloss(0.);
                solids.push(cuboid([s * (w / 2. + 0.12), h / 2. - 0.08, 0.03], [0.34, h + 0.3, 0.04], cloth));
            }
        }
        self.taken.push(space);
        self.fixture(solids, at, facing.sin_cos(), false);
    }

    pub(super) fn door(&mut self) {
        let (wall, facing) = self.wall();
        let at = self.before(wall, 0.12, 0.005);
        let space = Room3::new(at, facing.sin_cos(), [1., 2.1, 0.12]);
        if !space.inside(self.scene.room) || self.taken.iter().any(|t| t.meets(&space, 0.05)) {
            return;
        }
        let tone = match self.scene.look {
            Look::Studio => srgb([208, 204, 196]),
            Look::LivedIn => srgb([146, 112, 78]),
        };
        let (leaf, rim) = (Paint::plain(tone), Paint::plain(scale(tone, 0.75)));
        let steel = Paint::plain([0.5, 0.5, 0.52]).gloss(0.3);
        let mut solids = vec![
            cuboid([0., 1.05, -0.01], [1., 2.1, 0.03], rim),
            cuboid([0., 1., 0.], [0.84, 2., 0.035], leaf),
            cuboid([0.33, 1., 0.04], [0.12, 0.025, 0.03], steel),
        ];
        for y in [0.5, 1.45] {
            solids.push(cuboid([0., y, 0.003], [0.56, 0.66, 0.036], rim));
            solids.push(cuboid([0., y, 0.006], [0.5, 0.6, 0.036], leaf));
        }
        self.taken.push(space);
        self.fixture(solids, at, facing.sin_cos(), false);
    }

    pub(super) fn rug(&mut self) {
        let mut at = self.spot();
        let (w, l): (f64, f64) = (self.rng.random_range(1.2..2.2), self.rng.random_range(0.9..1.6));
        let [x, _, z] = self.scene.room;
        at[0] = at[0].clamp(w / 2. + 0.05, x - w / 2. - 0.05);
        at[2] = at[2].clamp(l / 2. + 0.05, z - l / 2. - 0.05);
        let paint = match self.scene.look {
            Look::Studio => Paint::plain(srgb([176, 182, 188])).gloss(0.),
            Look::LivedIn => {
                let tone = srgb(self.pick(&[[142, 72, 66], [84, 98, 122], [150, 126, 84]]));
                let pattern = self.pick(&[Pattern::Stripes, Pattern::Checks, Pattern::Dots]);
                Paint::plain(tone).pattern(pattern, scale(tone, 1.7), 4.).gloss(0.)
            }
        };
        self.fixture(vec![cuboid([0., 0.004, 0.], [w, 0.008, l], paint)], at, (0., 1.), false);
    }

    /// Small things that nobody asks about: papers, books, shoes, a pile of clothes.
    pub(super) fn litter(&mut self) {
        let ledges = self.ledges.clone();
        let (mut at, mut half) = (self.spot(), None);
        if !ledges.is_empty() && self.chance(0.4) {
            let ledge = self.pick(&ledges);
            let (s, c) = ledge.yaw;
            let (u, v) = (
                self.rng.random_range(-1.0..1.0) * (ledge.half[0] - 0.15),
                self.rng.random_range(-1.0..1.0) * (ledge.half[1] - 0.12),
            );
            at = add(ledge.at, [c * u + s * v, 0., c * v - s * u]);
            half = Some(ledge.yaw);
        }
        let facing = self.rng.random_range(0.0..std::f64::consts::TAU);
        let yaw = half.unwrap_or_else(|| facing.sin_cos());
        let tone =
            srgb(self.pick(&[[150, 90, 80], [86, 104, 128], [168, 152, 120], [96, 110, 92], [70, 66, 74]]));
        let cloth = Paint::plain(tone).pattern(Pattern::Stripes, scale(tone, 1.5), 12.).gloss(0.);
        let (solids, size): (Vec<Solid>, V3) =
            match self.rng.random_range(0..if half.is_some() { 2 } else { 4 }) {
                0 => (
                    vec![cuboid([0., 0.002, 0.], [0.21, 0.004, 0.28], Paint::plain([0.8, 0.8, 0.77]))],
                    [0.22, 0.01, 0.3],
                ),
                1 => {
                    let mut pile = Vec::new();
                    for k in 0..self.rng.random_range(1..4) {
                        let y = 0.0125 + 0.025 * k as f64;
                        let paint = Paint::plain(scale(tone, 0.7 + 0.4 * k as f64));
                        pile.push(cuboid([0.01 * k as f64, y, 0.], [0.18, 0.023, 0.24], paint));
                    }
                    (pile, [0.24, 0.08, 0.26])
                }
                2 => {
                    let shoe = Paint::plain(scale(tone, 0.6));
                    let pair = [-0.07, 0.07].map(|x| ellipsoid([x, 0.045, 0.], [0.048, 0.045, 0.14], shoe));
                    (pair.to_vec(), [0.26, 0.1, 0.3])
                }
                _ => {
                    let heap = vec![
                        ellipsoid([0., 0.04, 0.], [0.24, 0.05, 0.17], cloth),
                        ellipsoid([0.1, 0.07, 0.04], [0.14, 0.05, 0.12], cloth.shade(0.85)),
                    ];
                    (heap, [0.5, 0.13, 0.36])
                }
            };
        let space = Room3::new(at, yaw, size);
        if space.inside(self.scene.room) && !self.taken.iter().any(|t| t.meets(&space, 0.01)) {
            self.taken.push(space);
            self.fixture(solids, at, yaw, true);
        }
    }
}
