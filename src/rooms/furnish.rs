//! Which things a room gets, and where they stand, hang and lie.
//!
//! Things never overlap and never leave the room: each is held by an upright box (footprint ×
//! height range), tested against all others. Whatever does not fit after some tries is left out.

mod fixtures;
mod space;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::kinds::{self, Model, Mount};
use super::render::Eye;
use super::scene::{Item, Placed, Scene};
use super::solid::{V3, add};
use super::view::{Colour, Kind, Look};
use space::{Ledge, Outline, Room3, fill};

/// The bare room with things in it; every choice comes from `rng`, in one order.
pub(super) fn furnished(scene: Scene, rng: ChaCha8Rng) -> Scene {
    let mut furnisher = Furnisher::new(scene, rng);
    furnisher.furnish();
    furnisher.scene
}

struct Furnisher {
    scene: Scene,
    rng: ChaCha8Rng,
    /// The camera with a picture of width 1 and height 0.75.
    eye: Eye,
    taken: Vec<Room3>,
    outlines: Vec<Outline>,
    ledges: Vec<Ledge>,
    /// Take only places where something hides a part of another thing.
    crowd: bool,
}

const TRIES: usize = 40;
/// Share of the tries in line with another thing.
const IN_LINE: f64 = 0.7;
/// Share of the things that first look for a place where something is half hidden.
const CROWD: f64 = 0.85;
/// A thing may hide about this much of another's box.
const HIDDEN: f64 = 0.75;
const BACK: usize = 2;

impl Furnisher {
    fn new(scene: Scene, rng: ChaCha8Rng) -> Self {
        let eye = Eye::camera(&scene.camera, scene.eye, scene.heading, 4, 3);
        Self { scene, rng, eye, taken: Vec::new(), outlines: Vec::new(), ledges: Vec::new(), crowd: false }
    }

    fn chance(&mut self, p: f64) -> bool {
        self.rng.random::<f64>() < p
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.rng.random_range(0..from.len())]
    }

    fn furnish(&mut self) {
        let lived = self.scene.look == Look::LivedIn;
        if self.chance(0.55) {
            self.window();
        }
        if self.chance(if lived { 0.4 } else { 0.25 }) {
            self.door();
        }
        // Large things along the walls.
        let mut large = vec![Kind::Sofa, Kind::Bed, Kind::Shelf, Kind::Fridge, Kind::Shelf];
        for _ in 0..self.rng.random_range(2..4) {
            let i = self.rng.random_range(0..large.len());
            self.against_wall(large.swap_remove(i));
        }
        let mut table = None;
        if self.chance(0.85) {
            let at = self.things();
            self.on_floor(Kind::Table, None);
            table = (self.things() > at).then_some(at);
        }
        let seat = self.pick(&[Kind::Chair, Kind::Chair, Kind::Stool]);
        for k in 0..self.rng.random_range(1..4) {
            let near = if k < 3 && self.chance(0.7) { table } else { None };
            let kind = if self.chance(0.2) { self.pick(&[Kind::Chair, Kind::Stool]) } else { seat };
            self.on_floor(kind, near);
        }
        for _ in 0..self.rng.random_range(1..3) {
            let kind = self.pick(&[Kind::Picture, Kind::Picture, Kind::Tv]);
            self.on_wall(kind);
        }
        let loose = [Kind::Box, Kind::Box, Kind::Ball, Kind::Plant, Kind::Lamp, Kind::Vase];
        let often = self.pick(&loose);
        for _ in 0..self.rng.random_range(2..5) {
            let kind = if self.chance(0.4) { often } else { self.pick(&loose) };
            let near = if self.chance(0.5) && self.things() > 0 {
                Some(self.rng.random_range(0..self.things()))
            } else {
                None
            };
            self.on_floor(kind, near);
        }
        // No bare rooms.
        for _ in 0..12 {
            if self.things() >= 7 {
                break;
            }
            let kind = self.pick(&[Kind::Chair, Kind::Stool, Kind::Box, Kind::Ball, Kind::Plant, Kind::Lamp]);
            self.on_floor(kind, None);
        }
        let ledges = self.ledges.clone();
        for ledge in ledges {
            let room = if ledge.half[0] > 0.45 { 4 } else { 2 };
            for _ in 0..self.rng.random_range(0..room) {
                let kind = self.pick(&[
                    Kind::Lamp,
                    Kind::Vase,
                    Kind::Plant,
                    Kind::Box,
                    Kind::Ball,
                    Kind::Tv,
                    Kind::Vase,
                ]);
                self.on_top(kind, ledge);
            }
        }
        if self.chance(0.5) {
            self.rug();
        }
        if lived {
            for _ in 0..self.rng.random_range(4..10) {
                self.litter();
            }
        }
    }

    fn things(&self) -> usize {
        self.scene.things.len()
    }

    /// A colour, mostly one that no thing of this kind has yet.
    fn colour(&mut self, kind: Kind) -> Colour {
        let all = kinds::colours(kind);
        let free: Vec<_> = (all.iter().copied())
            .filter(|&c| !self.scene.things.iter().any(|t| t.kind == kind && t.colour == c))
            .collect();
        if kind == Kind::Plant && self.chance(0.4) {
            Colour::Green
        } else if !free.is_empty() && self.chance(0.75) {
            self.pick(&free)
        } else {
            self.pick(all)
        }
    }

    fn model(&mut self, kind: Kind, mount: Mount) -> (Colour, Model) {
        let colour = self.colour(kind);
        (colour, kinds::build(kind, colour, mount, self.scene.look, &mut self.rng))
    }

    /// Where in the picture a box appears; nothing if it is behind or mostly outside.
    fn outline(&self, space: &Room3, kind: Kind) -> Option<Outline> {
        let mut o =
            Outline { low: [9.; 2], high: [-9.; 2], near: f64::INFINITY, solid: fill(kind), covered: 0. };
        for corner in space.corners() {
            let p = self.eye.project(corner);
            if p[2] < 0.5 {
                return None;
            }
            for k in 0..2 {
                o.low[k] = o.low[k].min(p[k] / 4.);
                o.high[k] = o.high[k].max(p[k] / 4.);
            }
            o.near = o.near.min(p[2]);
        }
        let whole = o.area();
        let centre = [(o.low[0] + o.high[0]) / 2., (o.low[1] + o.high[1]) / 2.];
        o.low = o.low.map(|v| v.max(0.));
        o.high = [o.high[0].min(1.), o.high[1].min(0.75)];
        let inside = (0.02..0.98).contains(&centre[0]) && (0.02..0.74).contains(&centre[1]);
        (inside && o.area() > 0.55 * whole && o.area() > 0.0012).then_some(o)
    }

    /// Puts the model there if there is room and it neither hides nor is hidden too much.
    fn place(
        &mut self,
        kind: Kind,
        colour: Colour,
        model: &Model,
        at: V3,
        yaw: (f64, f64),
        margin: f64,
    ) -> bool {
        let space = Room3::new(at, yaw, model.size);
        if !space.inside(self.scene.room) || self.taken.iter().any(|t| t.meets(&space, margin)) {
            return false;
        }
        let Some(mut outline) = self.outline(&space, kind) else { return false };
        let mut covers = Vec::new();
        for other in &self.outlines {
            let common = outline.common(other);
            if other.near < outline.near {
                outline.covered += common / outline.area() * other.solid;
                covers.push(0.);
            } else {
                covers.push(common / other.area() * outline.solid);
            }
        }
        if outline.covered > HIDDEN
            || self.outlines.iter().zip(&covers).any(|(o, c)| *c > 0. && o.covered + c > HIDDEN)
        {
            return false;
        }
        let overlap = covers.iter().fold(outline.covered, |a, b| a.max(*b));
        if self.crowd && overlap < 0.35 {
            return false;
        }
        for (other, more) in self.outlines.iter_mut().zip(&covers) {
            other.covered += more;
        }
        self.outlines.push(outline);
        self.taken.push(space);
        let centre = add(at, [0., model.size[1] / 2., 0.]);
        self.scene.things.push(Placed { kind, colour, size: model.size, centre, yaw });
        let thing = self.scene.things.len() as u16;
        for solid in &model.solids {
            let mut solid = solid.clone();
            solid.place(yaw, at);
            self.scene.items.push(Item { solid, thing, casts: true });
        }
        if let Some(top) = model.top {
            self.ledges.push(Ledge { at: add(at, [0., top.height, 0.]), yaw, half: top.half });
        }
        true
    }

    /// A spot on the floor that the camera sees.
    fn spot(&mut self) -> V3 {
        let [w, _, l] = self.scene.room;
        let (s, c) = self.scene.heading;
        let reach = (self.scene.camera.fov_x / 2.).to_radians().tan();
        let eye = self.scene.eye;
        if !self.scene.things.is_empty() && self.chance(IN_LINE) {
            // Before or behind something: rooms are full of things half seen.
            let other = self.rng.random_range(0..self.scene.things.len());
            let other = self.scene.things[other].centre;
            let k = if self.chance(0.5) {
                self.rng.random_range(0.5..0.9)
            } else {
                self.rng.random_range(1.1..1.5)
            };
            let aside = self.rng.random_range(-0.4..0.4);
            let at = |i: usize, n: f64| eye[i] + (other[i] - eye[i]) * k + aside * n;
            return [at(0, c).clamp(0., w), 0., at(2, -s).clamp(0., l)];
        }
        let away = self.rng.random_range(1.4..l);
        let aside = self.rng.random_range(-1.0..1.0) * reach * away;
        [(eye[0] + s * away + c * aside).clamp(0., w), 0., (eye[2] + c * away - s * aside).clamp(0., l)]
    }

    fn turned(&mut self, base: f64, by: f64) -> (f64, f64) {
        let jitter = if by > 0. { self.rng.random_range(-by..by) } else { 0. };
        (base + jitter).sin_cos()
    }

    fn on_floor(&mut self, kind: Kind, near: Option<usize>) {
        let (colour, model) = self.model(kind, Mount::Floor);
        let crowd = self.chance(CROWD);
        for k in 0..TRIES {
            self.crowd = crowd && k < TRIES * 3 / 4;
            let mut at = self.spot();
            let mut facing = self.rng.random_range(0.0..std::f64::consts::TAU);
            if let Some(other) = near.map(|i| &self.scene.things[i]) {
                let far = 0.5 * other.size[0].max(other.size[2]) + 0.5 * model.size[2] + 0.05;
                let (s, c) = facing.sin_cos();
                let reach = far * self.rng.random_range(0.8..1.3);
                at = [other.centre[0] + s * reach, 0., other.centre[2] + c * reach];
                // Seats face their table.
                facing += std::f64::consts::PI;
            }
            let yaw = match kind {
                Kind::Table => {
                    let quarter = std::f64::consts::FRAC_PI_2 * self.rng.random_range(0..4) as f64;
                    self.turned(quarter, 0.15)
                }
                _ => self.turned(facing, 0.3),
            };
            if self.clear_of_camera(at, &model) && self.place(kind, colour, &model, at, yaw, 0.03) {
                return;
            }
        }
    }

    fn clear_of_camera(&self, at: V3, model: &Model) -> bool {
        let (dx, dz) = (at[0] - self.scene.eye[0], at[2] - self.scene.eye[2]);
        (dx * dx + dz * dz).sqrt() > 1. + 0.5 * model.size[0].max(model.size[2])
    }

    /// A wall (0 left, 1 right, 2 back) and the heading of things that stand before it.
    fn wall(&mut self) -> (usize, f64) {
        let quarter = std::f64::consts::FRAC_PI_2;
        self.pick(&[(0, quarter), (1, -quarter), (BACK, 2. * quarter), (BACK, 2. * quarter)])
    }

    /// A spot `gap` metres before a wall for something of this length.
    fn before(&mut self, wall: usize, length: f64, gap: f64) -> V3 {
        let [w, _, l] = self.scene.room;
        let off = length / 2. + gap;
        let t = self.rng.random_range(0.0..1.0);
        match wall {
            0 => [off, 0., l * t],
            1 => [w - off, 0., l * t],
            _ => [w * t, 0., l - off],
        }
    }

    fn against_wall(&mut self, kind: Kind) {
        let (colour, model) = self.model(kind, Mount::Floor);
        let crowd = self.chance(CROWD);
        for k in 0..TRIES {
            self.crowd = crowd && k < TRIES * 3 / 4;
            let (wall, facing) = self.wall();
            let gap = self.rng.random_range(0.02..0.08);
            let at = self.before(wall, model.size[2], gap);
            let yaw = facing.sin_cos();
            if self.clear_of_camera(at, &model) && self.place(kind, colour, &model, at, yaw, 0.03) {
                return;
            }
        }
    }

    fn on_wall(&mut self, kind: Kind) {
        let (colour, model) = self.model(kind, Mount::Wall);
        let crowd = self.chance(CROWD);
        for k in 0..TRIES {
            self.crowd = crowd && k < TRIES * 3 / 4;
            let (wall, facing) = self.wall();
            let mut at = self.before(wall, model.size[2], 0.005);
            at[1] = self.rng.random_range(1.0..1.6f64).min(self.scene.room[1] - model.size[1] - 0.1);
            if self.place(kind, colour, &model, at, facing.sin_cos(), 0.08) {
                return;
            }
        }
    }

    fn on_top(&mut self, kind: Kind, ledge: Ledge) {
        let (colour, model) = self.model(kind, Mount::Top);
        let (s, c) = ledge.yaw;
        let crowd = self.chance(CROWD);
        for k in 0..TRIES / 2 {
            self.crowd = crowd && k < TRIES / 4;
            let (yaw, half) = if kind == Kind::Tv {
                (ledge.yaw, [model.size[0] / 2., model.size[2] / 2.])
            } else {
                let facing = self.rng.random_range(0.0..std::f64::consts::TAU);
                // Round things need their radius, others their diagonal.
                let r = 0.5 * (model.size[0] * model.size[0] + model.size[2] * model.size[2]).sqrt();
                let r = if kind == Kind::Box { r } else { 0.5 * model.size[0].max(model.size[2]) };
                (facing.sin_cos(), [r, r])
            };
            let free = [ledge.half[0] - half[0], ledge.half[1] - half[1]];
            if free.iter().any(|f| *f < 0.) {
                return;
            }
            let (u, v) =
                (free[0] * self.rng.random_range(-1.0..=1.0), free[1] * self.rng.random_range(-1.0..=1.0));
            let at = add(ledge.at, [c * u + s * v, 0., c * v - s * u]);
            if self.place(kind, colour, &model, at, yaw, 0.03) {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rooms::solid::{dot, sub};

    fn scenes() -> impl Iterator<Item = Scene> {
        (0..120).flat_map(|seed| [Look::Studio, Look::LivedIn].map(|look| Scene::new(seed, look)))
    }

    fn space(thing: &Placed) -> Room3 {
        let base = sub(thing.centre, [0., thing.size[1] / 2., 0.]);
        Room3::new(base, thing.yaw, thing.size)
    }

    #[test]
    fn every_solid_is_within_its_things_box_and_the_box_within_the_room() {
        for scene in scenes() {
            for item in scene.items.iter().filter(|item| item.thing > 0) {
                let thing = &scene.things[item.thing as usize - 1];
                let (s, c) = thing.yaw;
                for (k, axis) in [[c, 0., -s], [0., 1., 0.], [s, 0., c]].into_iter().enumerate() {
                    let (low, high) = item.solid.reach(axis);
                    let at = dot(sub(item.solid.centre, thing.centre), axis);
                    let half = thing.size[k] / 2. + 1e-9;
                    assert!(at + low >= -half && at + high <= half, "{:?} seed {}", thing.kind, scene.seed);
                }
            }
            for thing in &scene.things {
                for corner in space(thing).corners() {
                    for k in 0..3 {
                        let inside = -1e-9..=scene.room[k] + 1e-9;
                        assert!(inside.contains(&corner[k]), "{:?} seed {}", thing.kind, scene.seed);
                    }
                }
            }
        }
    }

    #[test]
    fn things_do_not_interpenetrate_and_stand_on_something() {
        for scene in scenes() {
            let spaces: Vec<_> = scene.things.iter().map(space).collect();
            for (i, a) in spaces.iter().enumerate() {
                for b in &spaces[..i] {
                    assert!(!a.meets(b, 0.), "seed {}", scene.seed);
                }
                let hangs = matches!(scene.things[i].kind, Kind::Tv | Kind::Picture);
                let supported = a.low.abs() < 1e-9
                    || spaces.iter().any(|b| {
                        (b.high - a.low).abs() < 0.02 && {
                            let lowered = Room3 { low: a.low - 0.05, high: a.low, ..*a };
                            lowered.meets(b, 0.)
                        }
                    });
                assert!(hangs || supported, "{:?} floats, seed {}", scene.things[i].kind, scene.seed);
            }
        }
    }
}
