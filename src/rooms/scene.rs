//! A furnished room from a seed: what stands where, the camera, the light. What stands there is chosen by
//! `furnish`.
//!
//! The room spans `[0, w] × [0, h] × [0, l]`; the camera stands near z = 0 and looks towards +z.

use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::furnish::furnished;
use super::paint::{Paint, Pattern, srgb};
use super::solid::{Solid, V3, scale};
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
        furnished(scene, rng)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cameras_keep_their_ranges_and_use_them() {
        let scenes =
            (0..120).flat_map(|seed| [Look::Studio, Look::LivedIn].map(|look| Scene::new(seed, look)));
        let cameras: Vec<_> = scenes.map(|s| s.camera).collect();
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
