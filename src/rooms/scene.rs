//! A furnished room from a seed: what stands where, the camera, the light.
//!
//! The room spans `[0, w] × [0, h] × [0, l]`; the camera stands near z = 0 and looks towards +z.
//! Things never overlap and never leave the room: each is held by an upright box (footprint ×
//! height range), tested against all others. Whatever does not fit after some tries is left out.

use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::kinds::{self, Model, Mount, cuboid, ellipsoid};
use super::paint::{Paint, Pattern, srgb};
use super::render::Eye;
use super::solid::{Solid, V3, add, scale};
use super::view::{Camera, Colour, Kind, Look};

/// One primitive of the scene.
#[derive(Clone, Debug)]
pub struct Item {
    pub solid: Solid,
    /// Index in [`Scene::things`] + 1; 0 for fixtures and clutter.
    pub thing: u16,
    pub casts: bool,
}

#[derive(Clone, Debug)]
pub struct Placed {
    pub kind: Kind,
    pub colour: Colour,
    /// Width, height, length in metres.
    pub size: V3,
    /// Centre of its box, world coordinates.
    pub centre: V3,
    /// (sin, cos) of its turn about the vertical; its front faces (sin, 0, cos).
    pub yaw: (f64, f64),
}

#[derive(Clone, Copy, Debug)]
pub struct Light {
    pub position: V3,
    /// Strength at the distance `reference`.
    pub colour: V3,
    pub reference: f64,
    /// From above, and reflected from below.
    pub ambient: V3,
    pub bounce: V3,
    /// Texels of the shadow map's side: fewer make softer shadows.
    pub texels: usize,
}

#[derive(Clone, Copy, Debug)]
pub struct Sensor {
    pub exposure: f64,
    /// Standard deviation in sRGB levels.
    pub noise: f64,
    /// Share of light lost to each neighbour in a 256-pixel-wide picture.
    pub blur: f64,
}

#[derive(Clone, Debug)]
pub struct Scene {
    pub seed: u64,
    pub look: Look,
    /// Width, height, length in metres.
    pub room: V3,
    pub camera: Camera,
    pub eye: V3,
    /// (sin, cos) of the camera's heading, 0 along +z.
    pub heading: (f64, f64),
    /// Paints of the sides −x, +x, floor, ceiling, −z, +z.
    pub shell: [Paint; 6],
    /// Height and colour of the skirting board.
    pub skirting: (f64, V3),
    pub light: Light,
    pub sensor: Sensor,
    pub items: Vec<Item>,
    pub things: Vec<Placed>,
}

impl Scene {
    pub fn new(seed: u64, look: Look) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(1 + look as u64);
        let scene = bare(seed, look, &mut rng);
        let mut builder = Furnisher::new(scene, rng);
        builder.furnish();
        builder.scene
    }
}

/// The empty room with its camera and light.
fn bare(seed: u64, look: Look, rng: &mut ChaCha8Rng) -> Scene {
    let room = [rng.random_range(3.8..6.0), rng.random_range(2.5..3.0), rng.random_range(4.4..6.6)];
    let fov_x = rng.random_range(45.0..80.0);
    let height = rng.random_range(1.0..2.0);
    // It looks at something in the room's middle; a free tilt would often show only wall.
    let away = rng.random_range(2.4..4.2);
    let aim = rng.random_range(0.3..0.9);
    let tilt = f64::atan2(height - aim, away).to_degrees() + rng.random_range(-3.0..3.0);
    let camera = Camera { fov_x, height, tilt: tilt.clamp(0., 25.) };
    let eye = [room[0] * rng.random_range(0.3..0.7), height, rng.random_range(0.15..0.4)];
    let target = [room[0] * rng.random_range(0.32..0.68), room[2] * 0.75];
    let (dx, dz) = (target[0] - eye[0], target[1] - eye[2]);
    let long = (dx * dx + dz * dz).sqrt();

    let (walls, floor, light, sensor);
    let side = if rng.random::<bool>() { 1. } else { -1. };
    let position = [
        room[0] * 0.5 + side * rng.random_range(0.6..2.2),
        room[1] + rng.random_range(1.6..3.0),
        room[2] * rng.random_range(0.15..0.5),
    ];
    let reference = position[1];
    match look {
        Look::Studio => {
            let tone: [u8; 3] =
                *[[236, 234, 230], [222, 228, 234], [232, 226, 214], [214, 216, 218], [226, 232, 224]]
                    .choose(rng)
                    .expect("not empty");
            walls = [Paint::plain(srgb(tone)).gloss(0.), Paint::plain(srgb(tone)).gloss(0.)];
            floor = match rng.random_range(0..3) {
                0 => Paint::plain(srgb([206, 180, 146])).pattern(Pattern::Planks, srgb([186, 156, 120]), 6.),
                1 => Paint::plain(srgb([196, 194, 190])).pattern(Pattern::Tiles, srgb([168, 166, 162]), 1.7),
                _ => Paint::plain(srgb([190, 186, 178])).gloss(0.),
            };
            light = Light {
                position,
                colour: scale([1., 0.985, 0.96], rng.random_range(0.5..0.62)),
                reference,
                ambient: scale([0.97, 0.99, 1.], rng.random_range(0.52..0.62)),
                bounce: [0.4, 0.39, 0.37],
                texels: 200,
            };
            sensor = Sensor { exposure: 1., noise: 0.7, blur: 0. };
        }
        Look::LivedIn => {
            let tones: [[u8; 3]; 8] = [
                [150, 164, 140],
                [196, 150, 122],
                [126, 146, 166],
                [206, 184, 132],
                [168, 140, 150],
                [184, 172, 152],
                [120, 132, 124],
                [204, 190, 176],
            ];
            let tone = srgb(*tones.choose(rng).expect("not empty"));
            let paper = Paint::plain(tone).gloss(0.);
            let second = scale(tone, rng.random_range(0.6..0.8));
            let paper = match rng.random_range(0..5) {
                0 => paper.pattern(Pattern::Stripes, second, rng.random_range(2.5..6.)),
                1 => paper.pattern(Pattern::Dots, second, rng.random_range(3.0..6.)),
                2 => paper.pattern(Pattern::Speckle, second, rng.random_range(5.0..20.)),
                3 => paper.pattern(Pattern::Checks, scale(tone, 0.8), rng.random_range(1.5..4.)),
                _ => paper,
            };
            let accent = match rng.random_range(0..3) {
                0 => Paint::plain(srgb([150, 92, 72]))
                    .pattern(Pattern::Bricks, srgb([178, 164, 150]), 4.)
                    .gloss(0.),
                1 => Paint::plain(srgb([136, 100, 66]))
                    .pattern(Pattern::Planks, srgb([96, 68, 44]), 5.)
                    .gloss(0.),
                _ => paper,
            };
            walls = [paper, accent];
            floor = match rng.random_range(0..4) {
                0 => Paint::plain(srgb([134, 92, 58])).pattern(Pattern::Planks, srgb([82, 54, 34]), 8.),
                1 => Paint::plain(srgb([150, 138, 122])).pattern(Pattern::Checks, srgb([98, 92, 88]), 1.3),
                2 => Paint::plain(srgb([128, 112, 112]))
                    .pattern(Pattern::Speckle, srgb([90, 78, 84]), 14.)
                    .gloss(0.),
                _ => Paint::plain(srgb([158, 126, 84])).pattern(Pattern::Planks, srgb([108, 82, 54]), 10.),
            };
            let warm = rng.random_range(0.0..1.0);
            let cast = [1., 0.93 - 0.06 * warm, 0.84 - 0.16 * warm];
            light = Light {
                position,
                colour: scale(cast, rng.random_range(0.62..0.9)),
                reference,
                ambient: scale([0.92, 0.95, 1.], rng.random_range(0.24..0.36)),
                bounce: [0.24, 0.21, 0.18],
                texels: 320,
            };
            sensor = Sensor {
                exposure: rng.random_range(0.9..1.2),
                noise: rng.random_range(3.0..7.0),
                blur: rng.random_range(0.08..0.2),
            };
        }
    }
    let ceiling =
        Paint::plain([0.8, 0.79, 0.77]).gloss(0.).glow(if look == Look::Studio { 0.2 } else { 0.08 });
    Scene {
        seed,
        look,
        room,
        camera,
        eye,
        heading: (dx / long, dz / long),
        shell: [walls[0], walls[0], floor, ceiling, walls[0], walls[1]],
        skirting: (
            if look == Look::Studio { 0.07 } else { 0.1 },
            if look == Look::Studio { [0.78, 0.78, 0.77] } else { [0.3, 0.24, 0.19] },
        ),
        light,
        sensor,
        items: Vec::new(),
        things: Vec::new(),
    }
}

/// An upright box that something occupies.
#[derive(Clone, Copy, Debug)]
struct Room3 {
    centre: [f64; 2],
    yaw: (f64, f64),
    half: [f64; 2],
    low: f64,
    high: f64,
}

impl Room3 {
    fn new(at: V3, yaw: (f64, f64), size: V3) -> Self {
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
    fn meets(&self, other: &Self, margin: f64) -> bool {
        if self.low + 1e-6 >= other.high || other.low + 1e-6 >= self.high {
            return false;
        }
        let d = [other.centre[0] - self.centre[0], other.centre[1] - self.centre[1]];
        self.axes().into_iter().chain(other.axes()).all(|axis| {
            let apart = (d[0] * axis[0] + d[1] * axis[1]).abs();
            apart < self.spread(axis) + other.spread(axis) + margin
        })
    }

    fn inside(&self, room: V3) -> bool {
        let (x, z) = (self.spread([1., 0.]), self.spread([0., 1.]));
        let fits = |c: f64, r: f64, max: f64| c - r > 0.004 && c + r < max - 0.004;
        fits(self.centre[0], x, room[0]) && fits(self.centre[1], z, room[2]) && self.high < room[1]
    }

    fn corners(&self) -> [V3; 8] {
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
struct Outline {
    low: [f64; 2],
    high: [f64; 2],
    near: f64,
    /// Share of its box that it fills.
    solid: f64,
    covered: f64,
}

impl Outline {
    fn area(&self) -> f64 {
        (self.high[0] - self.low[0]).max(0.) * (self.high[1] - self.low[1]).max(0.)
    }

    fn common(&self, other: &Self) -> f64 {
        let side = |k: usize| (self.high[k].min(other.high[k]) - self.low[k].max(other.low[k])).max(0.);
        side(0) * side(1)
    }
}

/// How much of its box in the picture a kind fills: legs and leaves leave gaps.
fn fill(kind: Kind) -> f64 {
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
struct Ledge {
    at: V3,
    yaw: (f64, f64),
    half: [f64; 2],
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

    /// Adds something that is no thing: it has no id and no label.
    fn fixture(&mut self, solids: Vec<Solid>, at: V3, yaw: (f64, f64), casts: bool) {
        for mut solid in solids {
            solid.place(yaw, at);
            self.scene.items.push(Item { solid, thing: 0, casts });
        }
    }

    fn window(&mut self) {
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

    fn door(&mut self) {
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

    fn rug(&mut self) {
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
    fn litter(&mut self) {
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

    #[test]
    fn cameras_keep_their_ranges_and_use_them() {
        let cameras: Vec<_> = scenes().map(|s| s.camera).collect();
        for c in &cameras {
            assert!((45.0..=80.0).contains(&c.fov_x) && (1.0..=2.0).contains(&c.height));
            assert!((0.0..=25.0).contains(&c.tilt));
        }
        for value in
            [|c: &Camera| (c.fov_x - 45.) / 35., |c: &Camera| c.height - 1., |c: &Camera| c.tilt / 25.]
        {
            let low = cameras.iter().map(value).fold(1., f64::min);
            let high = cameras.iter().map(value).fold(0., f64::max);
            assert!(low < 0.15 && high > 0.85, "{low} to {high}");
        }
    }
}
