//! The fourteen kinds of things, each built from primitives in its usual size.
//!
//! A model stands on y = 0, centred on the vertical axis, its front towards +z. The named colour
//! covers most of what is seen of it; legs, screens, soil and the like keep colours of their own.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::paint::{Paint, Pattern, srgb, tone};
use super::solid::{Shape, Solid, V3, add, cross, dot, scale, sub, unit};
use super::view::{Colour, Kind, Look};

/// Where a thing is put: it decides its build and its range of sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mount {
    Floor,
    Top,
    Wall,
}

/// A place for small things: a level rectangle in the model's frame.
#[derive(Clone, Copy, Debug)]
pub struct Top {
    pub height: f64,
    pub half: [f64; 2],
}

#[derive(Clone, Debug)]
pub struct Model {
    pub solids: Vec<Solid>,
    /// Width, height, length in metres.
    pub size: V3,
    pub top: Option<Top>,
}

/// The colours that a kind comes in: foliage is never blue.
pub fn colours(kind: Kind) -> &'static [Colour] {
    match kind {
        Kind::Plant => &[Colour::Green, Colour::Red, Colour::Purple, Colour::Yellow, Colour::Orange],
        _ => Colour::ALL,
    }
}

pub fn build(kind: Kind, colour: Colour, mount: Mount, look: Look, rng: &mut ChaCha8Rng) -> Model {
    let main = tone(colour, rng);
    let mut b = Builder { rng, look, colour, main, solids: Vec::new() };
    let top = match kind {
        Kind::Chair => b.chair(),
        Kind::Stool => b.stool(),
        Kind::Table => b.table(),
        Kind::Sofa => b.sofa(),
        Kind::Lamp => b.lamp(mount),
        Kind::Shelf => b.shelf(),
        Kind::Bed => b.bed(),
        Kind::Tv => b.tv(mount),
        Kind::Picture => b.picture(),
        Kind::Plant => b.plant(mount),
        Kind::Fridge => b.fridge(),
        Kind::Box => b.carton(mount),
        Kind::Ball => b.ball(mount),
        Kind::Vase => b.vase(mount),
    };
    b.finish(top)
}

pub struct Builder<'a> {
    pub rng: &'a mut ChaCha8Rng,
    look: Look,
    colour: Colour,
    main: V3,
    pub solids: Vec<Solid>,
}

const UPRIGHT: [V3; 3] = [[1., 0., 0.], [0., 1., 0.], [0., 0., 1.]];

pub fn cuboid(centre: V3, size: V3, paint: Paint) -> Solid {
    Solid { shape: Shape::Box, centre, axes: UPRIGHT, half: scale(size, 0.5), paint }
}

pub fn ellipsoid(centre: V3, half: V3, paint: Paint) -> Solid {
    Solid { shape: Shape::Ellipsoid, centre, axes: UPRIGHT, half, paint }
}

/// A cylinder or cone from `a` to `b` with radii there.
pub fn rod(a: V3, b: V3, radii: [f64; 2], paint: Paint) -> Solid {
    let axis = sub(b, a);
    let long = dot(axis, axis).sqrt();
    let y = scale(axis, 1. / long);
    let x = if y[1].abs() > 0.999 { [1., 0., 0.] } else { unit(cross(y, [0., 1., 0.])) };
    let r = radii[0].max(radii[1]);
    Solid {
        shape: Shape::Frustum { bottom: radii[0] / r, top: radii[1] / r },
        centre: scale(add(a, b), 0.5),
        axes: [x, y, cross(x, y)],
        half: [r, long / 2., r],
        paint,
    }
}

impl Builder<'_> {
    fn range(&mut self, low: f64, high: f64) -> f64 {
        self.rng.random_range(low..high)
    }

    fn chance(&mut self, p: f64) -> bool {
        self.rng.random::<f64>() < p
    }

    fn cuboid(&mut self, centre: V3, size: V3, paint: Paint) {
        self.solids.push(cuboid(centre, size, paint));
    }

    fn rod(&mut self, a: V3, b: V3, radii: [f64; 2], paint: Paint) {
        self.solids.push(rod(a, b, radii, paint));
    }

    /// The second tone of a pattern: near the named colour, so that its name stays plain.
    fn second(&self) -> V3 {
        match self.colour {
            Colour::White => [0.62, 0.62, 0.6],
            Colour::Black => [0.045, 0.045, 0.05],
            _ => scale(self.main, 0.55),
        }
    }

    fn hard(&mut self) -> Paint {
        let paint = Paint::plain(self.main).gloss(0.12);
        let wooden = if self.look == Look::Studio { 0.15 } else { 0.6 };
        if self.chance(wooden) { paint.pattern(Pattern::Wood, self.second(), 6.).gloss(0.05) } else { paint }
    }

    fn fabric(&mut self) -> Paint {
        let paint = Paint::plain(self.main).gloss(0.);
        if self.look == Look::Studio {
            return paint;
        }
        let second = self.second();
        match self.rng.random_range(0..4) {
            0 => paint.pattern(Pattern::Stripes, second, 7.),
            1 => paint.pattern(Pattern::Checks, second, 7.),
            2 => paint.pattern(Pattern::Dots, second, 9.),
            _ => paint.pattern(Pattern::Speckle, second, 45.),
        }
    }

    /// Legs and poles: pale or dark wood, steel.
    fn frame(&mut self) -> Paint {
        let tones: &[[u8; 3]] = match self.look {
            Look::Studio => &[[196, 158, 112], [190, 192, 196], [52, 50, 50]],
            Look::LivedIn => &[[124, 82, 48], [92, 62, 40], [150, 146, 138], [44, 40, 38]],
        };
        let i = self.rng.random_range(0..tones.len());
        Paint::plain(srgb(tones[i])).gloss(0.15)
    }

    fn four_legs(&mut self, half: [f64; 2], height: f64, thick: f64, splay: f64, paint: Paint) {
        let round = self.chance(0.5);
        for (sx, sz) in [(-1., -1.), (1., -1.), (-1., 1.), (1., 1.)] {
            let (x, z) = (sx * (half[0] - thick), sz * (half[1] - thick));
            if round {
                let foot = [x, 0., z];
                let head = [x * (1. - splay), height, z * (1. - splay)];
                self.rod(foot, head, [thick * 0.45, thick * 0.6], paint);
            } else {
                self.cuboid([x, height / 2., z], [thick, height, thick], paint);
            }
        }
    }

    fn chair(&mut self) -> Option<Top> {
        let (w, l) = (self.range(0.4, 0.54), self.range(0.42, 0.54));
        let (seat, height) = (self.range(0.42, 0.5), self.range(0.82, 1.05));
        let paint = if self.chance(0.4) { self.fabric() } else { self.hard() };
        let frame = if self.chance(0.5) { self.frame() } else { paint.shade(0.8) };
        let thick = self.range(0.035, 0.05);
        self.four_legs([w / 2., l / 2.], seat - 0.05, thick, 0.12, frame);
        self.cuboid([0., seat - 0.025, 0.], [w, 0.06, l], paint);
        let z = -l / 2. + 0.02;
        let slatted = self.chance(if self.look == Look::Studio { 0.3 } else { 0.6 });
        if slatted {
            for x in [-w / 2. + thick / 2., w / 2. - thick / 2.] {
                self.cuboid([x, (seat + height) / 2., z], [thick, height - seat, 0.04], paint);
            }
            let top = 0.1;
            self.cuboid([0., height - top / 2., z], [w, top, 0.04], paint);
            let middle = (seat + height - top) / 2.;
            self.cuboid([0., middle, z], [w, 0.07, 0.03], paint);
        } else {
            let gap = self.range(0.0, 0.14);
            self.cuboid([0., (seat + gap + height) / 2., z], [w, height - seat - gap, 0.05], paint);
            if gap > 0.02 {
                for x in [-w / 2. + thick, w / 2. - thick] {
                    self.cuboid([x, seat + gap / 2., z], [thick, gap + 0.02, 0.03], frame);
                }
            }
        }
        if self.chance(0.2) {
            for x in [-w / 2. - 0.02, w / 2. + 0.02] {
                self.cuboid([x, seat + 0.2, 0.], [0.05, 0.04, l * 0.9], paint);
                self.cuboid([x, seat + 0.08, l * 0.38], [0.04, 0.24, 0.04], frame);
            }
        }
        None
    }

    fn stool(&mut self) -> Option<Top> {
        let (w, height) = (self.range(0.32, 0.42), self.range(0.44, 0.74));
        let paint = if self.chance(0.3) { self.fabric() } else { self.hard() };
        let frame = if self.chance(0.5) { self.frame() } else { paint.shade(0.8) };
        let thick = self.range(0.035, 0.05);
        if self.chance(0.65) {
            let legs = if self.chance(0.5) { 3 } else { 4 };
            for k in 0..legs {
                let (s, c) = (std::f64::consts::TAU * (k as f64 + 0.3) / legs as f64).sin_cos();
                let (foot, head) = (w * 0.5, w * 0.34);
                self.rod(
                    [foot * s, 0., foot * c],
                    [head * s, height - 0.05, head * c],
                    [thick * 0.45, thick * 0.55],
                    frame,
                );
            }
            let r = w * 0.5;
            self.rod([0., height - 0.065, 0.], [0., height, 0.], [r * 0.96, r], paint);
        } else {
            self.four_legs([w / 2., w / 2.], height - 0.05, thick, 0., frame);
            self.cuboid([0., height - 0.03, 0.], [w, 0.06, w], paint);
            self.cuboid([0., height * 0.3, 0.], [w - 2. * thick, 0.025, 0.025], frame);
        }
        None
    }

    fn table(&mut self) -> Option<Top> {
        let low = self.chance(0.3);
        let height = if low { self.range(0.38, 0.48) } else { self.range(0.68, 0.78) };
        let (w, l) = if low {
            (self.range(0.8, 1.15), self.range(0.5, 0.65))
        } else {
            (self.range(0.95, 1.7), self.range(0.65, 0.9))
        };
        let paint = self.hard();
        let frame = if self.chance(0.4) { self.frame() } else { paint.shade(0.85) };
        if self.chance(0.25) {
            let r = if low { w * 0.42 } else { w.min(1.2) * 0.45 };
            self.rod([0., height - 0.04, 0.], [0., height, 0.], [r, r], paint);
            self.rod([0., 0.03, 0.], [0., height - 0.04, 0.], [0.04, 0.04], frame);
            self.rod([0., 0., 0.], [0., 0.03, 0.], [r * 0.6, r * 0.55], frame);
            return Some(Top { height, half: [r * 0.65, r * 0.65] });
        }
        let thick = self.range(0.05, 0.075);
        self.four_legs([w / 2. - 0.02, l / 2. - 0.02], height - 0.035, thick, 0.03, frame);
        self.cuboid([0., height - 0.02, 0.], [w, 0.04, l], paint);
        if self.chance(0.6) {
            let apron = paint.shade(0.8);
            self.cuboid([0., height - 0.075, 0.], [w - 0.14, 0.07, l - 0.14], apron);
        }
        Some(Top { height, half: [w / 2. - 0.04, l / 2. - 0.04] })
    }

    fn sofa(&mut self) -> Option<Top> {
        let (w, l) = (self.range(1.35, 2.1), self.range(0.8, 0.95));
        let (height, seat) = (self.range(0.74, 0.92), self.range(0.4, 0.46));
        let paint = self.fabric();
        let frame = self.frame();
        let arm = self.range(0.14, 0.22);
        let arm_height = seat + self.range(0.12, 0.2);
        self.four_legs([w / 2. - 0.04, l / 2. - 0.04], 0.1, 0.05, 0., frame);
        self.cuboid([0., (0.1 + seat - 0.12) / 2., 0.], [w, seat - 0.22, l], paint.shade(0.88));
        self.cuboid([0., (0.1 + height) / 2., -l / 2. + 0.1], [w, height - 0.1, 0.2], paint);
        let rounded = self.chance(0.5);
        for s in [-1., 1.] {
            let x = s * (w - arm) / 2.;
            self.cuboid(
                [x, (0.1 + arm_height) / 2., 0.02],
                [arm, arm_height - 0.1, l - 0.04],
                paint.shade(0.94),
            );
            if rounded {
                let (a, b) = ([x, arm_height, -l / 2. + 0.1], [x, arm_height, l / 2.]);
                self.rod(a, b, [arm / 2., arm / 2.], paint);
            }
        }
        let count = if w > 1.8 { 3 } else { 2 };
        let inner = (w - 2. * arm) / count as f64;
        for k in 0..count {
            let x = -w / 2. + arm + inner * (k as f64 + 0.5);
            self.cuboid([x, seat - 0.06, 0.1], [inner - 0.02, 0.14, l - 0.22], paint);
            let back = seat + (height - seat) * 0.5;
            self.cuboid(
                [x, back, -l / 2. + 0.26],
                [inner - 0.03, (height - seat) * 0.85, 0.14],
                paint.shade(1.06),
            );
        }
        None
    }

    fn lamp(&mut self, mount: Mount) -> Option<Top> {
        let metal = self.frame();
        let shade = Paint::plain(self.main).gloss(0.02).glow(0.38);
        if mount == Mount::Floor {
            let height = self.range(1.35, 1.75);
            let (r, tall) = (self.range(0.17, 0.24), self.range(0.26, 0.36));
            self.rod([0., 0., 0.], [0., 0.03, 0.], [0.15, 0.14], metal);
            self.rod([0., 0.03, 0.], [0., height - tall * 0.5, 0.], [0.016, 0.016], metal);
            let taper = self.range(0.55, 0.9);
            self.rod([0., height - tall, 0.], [0., height, 0.], [r, r * taper], shade);
        } else {
            let height = self.range(0.4, 0.62);
            let (r, tall) = (self.range(0.12, 0.17), self.range(0.17, 0.24));
            let foot = height - tall;
            let body = Paint::plain(self.main).gloss(0.2).shade(0.9);
            self.rod([0., 0., 0.], [0., 0.025, 0.], [0.085, 0.08], body);
            if self.chance(0.5) {
                self.solids.push(ellipsoid([0., 0.02 + foot * 0.42, 0.], [0.075, foot * 0.42, 0.075], body));
            }
            self.rod([0., 0.02, 0.], [0., height - tall * 0.5, 0.], [0.014, 0.014], metal);
            let taper = self.range(0.5, 0.85);
            self.rod([0., height - tall, 0.], [0., height, 0.], [r, r * taper], shade);
        }
        None
    }

    fn shelf(&mut self) -> Option<Top> {
        let (w, l) = (self.range(0.6, 1.15), self.range(0.28, 0.38));
        let low = self.chance(0.45);
        let height = if low { self.range(0.75, 1.15) } else { self.range(1.3, 1.95) };
        let boards = if low { 2 } else { self.rng.random_range(3..6) };
        let paint = self.hard();
        for x in [-w / 2. + 0.0175, w / 2. - 0.0175] {
            self.cuboid([x, height / 2., 0.], [0.035, height, l], paint);
        }
        self.cuboid([0., height / 2., -l / 2. + 0.01], [w - 0.04, height, 0.02], paint.shade(0.55));
        let step = (height - 0.0775) / boards as f64;
        for k in 0..=boards {
            let y = 0.06 + step * k as f64;
            self.cuboid([0., y, 0.005], [w - 0.04, 0.035, l - 0.01], paint);
        }
        let full = if self.look == Look::Studio { 0.3 } else { 0.75 };
        for k in 0..boards {
            if self.chance(full) {
                self.books([-w / 2. + 0.06, 0.08 + step * k as f64], w - 0.12, step - 0.07, l);
            }
        }
        Some(Top { height, half: [w / 2. - 0.03, l / 2. - 0.02] })
    }

    /// A row of muted books on a board, part of the shelf.
    fn books(&mut self, from: [f64; 2], width: f64, room: f64, depth: f64) {
        const SPINES: [[u8; 3]; 6] =
            [[150, 96, 84], [92, 110, 130], [176, 164, 140], [104, 122, 100], [84, 76, 90], [190, 186, 178]];
        let mut x = from[0] + self.range(0., width * 0.3);
        let end = from[0] + width * self.range(0.6, 1.);
        while x + 0.12 < end {
            let thick = self.range(0.06, 0.12);
            let tall = (room * self.range(0.6, 0.95)).min(0.32);
            let spine = SPINES[self.rng.random_range(0..SPINES.len())];
            let size = [thick - 0.008, tall, depth * 0.7];
            self.cuboid([x + thick / 2., from[1] + tall / 2., 0.], size, Paint::plain(srgb(spine)));
            x += thick;
        }
    }

    fn bed(&mut self) -> Option<Top> {
        let (w, l) = (self.range(0.95, 1.7), self.range(1.9, 2.1));
        let (head, level) = (self.range(0.8, 1.1), self.range(0.42, 0.52));
        let frame = self.frame();
        let duvet = self.fabric();
        let board = if self.chance(0.6) { Paint::plain(self.main).gloss(0.05) } else { frame };
        let linen = Paint::plain([0.8, 0.79, 0.76]).gloss(0.);
        self.four_legs([w / 2., l / 2.], 0.15, 0.07, 0., frame);
        self.cuboid([0., 0.2, 0.], [w, 0.14, l], board.shade(0.8));
        self.cuboid([0., head / 2. + 0.05, -l / 2. + 0.03], [w, head - 0.1, 0.06], board);
        self.cuboid([0., (0.26 + level) / 2., 0.02], [w - 0.05, level - 0.26, l - 0.08], linen);
        let cover = l * self.range(0.66, 0.74);
        self.cuboid(
            [0., (0.2 + level + 0.03) / 2., l / 2. - cover / 2.],
            [w + 0.02, level - 0.17, cover],
            duvet,
        );
        let pillows = if w > 1.3 { 2 } else { 1 };
        for k in 0..pillows {
            let x = if pillows == 1 { 0. } else { (k as f64 - 0.5) * w * 0.48 };
            let half = [w * 0.42 / pillows as f64, 0.085, 0.2];
            self.solids.push(ellipsoid([x, level + 0.06, -l / 2. + 0.31], half, linen));
        }
        None
    }

    fn tv(&mut self, mount: Mount) -> Option<Top> {
        let w = if mount == Mount::Top { self.range(0.6, 0.85) } else { self.range(0.8, 1.35) };
        let h = w * self.range(0.56, 0.62);
        let frame = Paint::plain(self.main).gloss(0.2);
        let screen = Paint::plain([0.012, 0.014, 0.018]).gloss(0.3);
        let screen = screen.pattern(Pattern::Screen, [0.16, 0.18, 0.22], 1.);
        let (base, deep, rim) = if mount == Mount::Wall { (0., 0.06, 0.05) } else { (0.09, 0.07, 0.045) };
        self.cuboid([0., base + h / 2., 0.], [w, h, deep], frame);
        self.cuboid([0., base + h / 2., deep / 2.], [w - 2. * rim, h - 2. * rim, 0.008], screen);
        if mount != Mount::Wall {
            self.cuboid([0., 0.01, 0.], [w * 0.4, 0.02, 0.2], frame);
            self.cuboid([0., base / 2., -0.01], [0.1, base, 0.04], frame);
        }
        None
    }

    fn picture(&mut self) -> Option<Top> {
        let (w, h) = (self.range(0.4, 0.95), self.range(0.4, 0.8));
        let rim = self.range(0.045, 0.07);
        let paint = self.hard();
        let art = Paint::plain([0.; 3]).pattern(Pattern::Art(self.rng.random()), [0.; 3], 1.).gloss(0.);
        self.cuboid([0., h / 2., 0.], [w, h, 0.035], paint);
        self.cuboid([0., h / 2., 0.0175], [w - 2. * rim, h - 2. * rim, 0.008], art);
        None
    }

    fn plant(&mut self, mount: Mount) -> Option<Top> {
        let height = if mount == Mount::Floor { self.range(0.7, 1.4) } else { self.range(0.3, 0.48) };
        let pots: &[[u8; 3]] = match self.look {
            Look::Studio => &[[222, 220, 214], [170, 172, 174]],
            Look::LivedIn => &[[168, 100, 72], [120, 112, 104], [206, 196, 178]],
        };
        let pot = Paint::plain(srgb(pots[self.rng.random_range(0..pots.len())])).gloss(0.08);
        let tall = height * self.range(0.26, 0.34);
        let r = tall * self.range(0.48, 0.62);
        self.rod([0., 0., 0.], [0., tall, 0.], [r * 0.72, r], pot);
        let soil = Paint::plain([0.03, 0.02, 0.012]);
        self.rod([0., tall, 0.], [0., tall + 0.006, 0.], [r * 0.86, r * 0.86], soil);
        let leaf = Paint::plain(self.main).gloss(0.06);
        let stem = Paint::plain([0.05, 0.1, 0.02]);
        let leaves = self.rng.random_range(9..14);
        let crown = height - tall;
        self.rod([0., tall, 0.], [0., tall + crown * 0.55, 0.], [0.014, 0.01], stem);
        for k in 0..leaves {
            let around = k as f64 * 2.399 + self.range(-0.3, 0.3);
            let rise = (k as f64 + 0.5) / leaves as f64;
            let (s, c) = around.sin_cos();
            let out = (1. - rise * 0.75) * 0.85 + 0.1;
            let direction = unit([s * out, 0.25 + rise * 0.9, c * out]);
            let long = crown * self.range(0.42, 0.58) * (1. - 0.25 * rise);
            let base = [0., tall + crown * (0.08 + 0.5 * rise), 0.];
            let tip = add(base, scale(direction, long));
            let mut blade = rod(base, tip, [1., 1.], leaf.shade(0.8 + 0.35 * self.rng.random::<f64>()));
            blade.shape = Shape::Ellipsoid;
            // Broad across, thin through.
            blade.half = [long * 0.2, long / 2., long * 0.05];
            self.solids.push(blade);
        }
        None
    }

    fn fridge(&mut self) -> Option<Top> {
        let (w, l) = (self.range(0.56, 0.78), self.range(0.58, 0.68));
        let height = self.range(1.45, 1.9);
        let paint = Paint::plain(self.main).gloss(0.25);
        let dark = Paint::plain([0.02, 0.02, 0.02]);
        let metal = if self.colour == Colour::Black || self.chance(0.4) {
            [0.6, 0.6, 0.62]
        } else {
            [0.06, 0.06, 0.065]
        };
        let metal = Paint::plain(metal).gloss(0.3);
        let split = height * if self.chance(0.5) { self.range(0.3, 0.4) } else { self.range(0.6, 0.7) };
        self.cuboid([0., 0.03, 0.], [w - 0.04, 0.06, l - 0.08], dark);
        self.cuboid([0., (0.06 + height) / 2., -0.03], [w, height - 0.06, l - 0.06], paint.shade(0.9));
        let gap = 0.012;
        for (low, high) in [(0.07, split - gap), (split + gap, height)] {
            self.cuboid([0., (low + high) / 2., l / 2. - 0.03], [w, high - low, 0.06], paint);
        }
        self.cuboid([0., split, l / 2. - 0.04], [w - 0.01, 2. * gap, 0.05], dark);
        let side = if self.chance(0.5) { 1. } else { -1. };
        for (at, long) in [(split + 0.2, 0.26), (split - 0.2, 0.26)] {
            let x = side * (w / 2. - 0.07);
            self.cuboid([x, at, l / 2. + 0.02], [0.03, long, 0.035], metal);
        }
        Some(Top { height, half: [w / 2. - 0.03, l / 2. - 0.05] })
    }

    fn carton(&mut self, mount: Mount) -> Option<Top> {
        let (w, height, l) = match mount {
            Mount::Top => (self.range(0.2, 0.36), self.range(0.14, 0.28), self.range(0.18, 0.3)),
            // Now and then a tall one, as high as a small fridge.
            _ if self.chance(0.2) => (self.range(0.45, 0.6), self.range(0.75, 1.1), self.range(0.4, 0.55)),
            _ => (self.range(0.34, 0.65), self.range(0.26, 0.52), self.range(0.3, 0.5)),
        };
        let mut paint = Paint::plain(self.main).gloss(0.02);
        if self.look == Look::LivedIn {
            paint = paint.pattern(Pattern::Speckle, scale(self.main, 0.75), 12.);
        }
        let pale = super::solid::mix(self.main, [0.85, 0.78, 0.6], 0.55);
        let tape = Paint::plain(if self.colour == Colour::White { [0.55, 0.42, 0.25] } else { pale });
        self.cuboid([0., height / 2., 0.], [w, height, l], paint);
        if self.chance(0.35) {
            // Open: a dark mouth and four flaps.
            let inside = Paint::plain(scale(self.main, 0.15));
            self.cuboid([0., height, 0.], [w - 0.03, 0.006, l - 0.03], inside);
            let flap = height.min(l) * 0.42;
            for s in [-1., 1.] {
                let mut side = cuboid(
                    [s * (w / 2. + flap * 0.35), height + flap * 0.33, 0.],
                    [flap, 0.01, l],
                    paint.shade(1.05),
                );
                let (sin, cos) = (s * 0.72f64, 0.694);
                side.axes = [[cos, sin, 0.], [-sin, cos, 0.], [0., 0., 1.]];
                self.solids.push(side);
            }
        } else {
            let strip = w.min(l) * 0.16;
            self.cuboid([0., height, 0.], [w + 0.004, 0.004, strip], tape);
            for s in [-1., 1.] {
                self.cuboid([s * w / 2., height - 0.05, 0.], [0.004, 0.1, strip], tape);
            }
        }
        None
    }

    fn ball(&mut self, mount: Mount) -> Option<Top> {
        let r = if mount == Mount::Top { self.range(0.09, 0.13) } else { self.range(0.1, 0.26) };
        let dark = self.colour == Colour::Black || self.colour == Colour::Brown;
        let seam = if dark { [0.35, 0.35, 0.34] } else { scale(self.main, 0.3) };
        let paint = Paint::plain(self.main).gloss(0.3).pattern(Pattern::Seams, seam, 1.);
        let mut ball = ellipsoid([0., r, 0.], [r; 3], paint);
        let (s, c) = self.range(0.2, 1.3).sin_cos();
        ball.axes = [[c, s, 0.], [-s, c, 0.], [0., 0., 1.]];
        self.solids.push(ball);
        None
    }

    fn vase(&mut self, mount: Mount) -> Option<Top> {
        let height = if mount == Mount::Top { self.range(0.26, 0.42) } else { self.range(0.4, 0.75) };
        let belly = height * self.range(0.24, 0.34);
        let neck = belly * self.range(0.35, 0.55);
        let mut paint = Paint::plain(self.main).gloss(0.3);
        if self.look == Look::LivedIn && self.chance(0.5) {
            paint = paint.pattern(Pattern::Stripes, self.second(), 14.);
        }
        let at = |k: f64| [0., height * k, 0.];
        self.rod(at(0.), at(0.16), [belly * 0.6, belly * 0.86], paint);
        self.rod(at(0.16), at(0.38), [belly * 0.86, belly], paint);
        self.rod(at(0.38), at(0.6), [belly, belly * 0.78], paint);
        self.rod(at(0.6), at(0.78), [belly * 0.78, neck], paint);
        self.rod(at(0.78), at(1.), [neck, neck * 1.45], paint);
        let mouth = Paint::plain([0.01, 0.01, 0.01]);
        self.rod(at(0.999), [0., height + 0.003, 0.], [neck * 1.15, neck * 1.15], mouth);
        None
    }

    /// Rests the solids on the floor, centres them, and measures them.
    fn finish(mut self, top: Option<Top>) -> Model {
        let (mut low, mut high) = ([f64::INFINITY; 3], [f64::NEG_INFINITY; 3]);
        for solid in &self.solids {
            for (k, axis) in UPRIGHT.iter().enumerate() {
                let (a, b) = solid.reach(*axis);
                low[k] = low[k].min(solid.centre[k] + a);
                high[k] = high[k].max(solid.centre[k] + b);
            }
        }
        let shift = [-(low[0] + high[0]) / 2., -low[1], -(low[2] + high[2]) / 2.];
        for solid in &mut self.solids {
            solid.centre = add(solid.centre, shift);
        }
        let top = top.map(|t| Top { height: t.height + shift[1], ..t });
        Model { solids: self.solids, size: sub(high, low), top }
    }
}
