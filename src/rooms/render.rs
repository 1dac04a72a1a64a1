//! From a scene to a picture with its exact truth.
//!
//! Each solid is ray-cast only inside its projected bounds, into a depth buffer; shading is
//! deferred: once for a pixel inside a surface, at edges once for each surface that 2×2 samples see. Shadows come from depth
//! maps seen from the light and from straight above (ambient occlusion). Depth and ids are those
//! of the ray through the pixel's centre. One thread per picture: the result cannot depend on
//! their number. No reflections, no transparency, no light bounces.

mod develop;
mod eye;
mod shade;

use super::scene::Scene;
use super::solid::{Solid, V3, add, meet, scale, sub};
use super::view::{Look, Thing, View};
use develop::develop;
pub use eye::Eye;
use shade::Shader;

/// What each ray met: depth, and the solid's number · 8 + face; the room's shell is number 0.
struct Hits {
    depth: Vec<f64>,
    surface: Vec<u32>,
}

/// Casts a ray through the centre of each pixel against one solid.
#[inline(always)]
fn cast(eye: &Eye, solid: &Solid, mut hit: impl FnMut(usize, f64, u8)) {
    let Some([x0, y0, x1, y1]) = eye.bounds(solid) else { return };
    let frame = solid.frame();
    let o = frame.apply(sub(eye.origin, solid.centre));
    let dx = frame.apply(scale(eye.right, 1. / eye.focal));
    for y in y0..y1 {
        let start = frame.apply(eye.ray(x0 as f64 + 0.5, y as f64 + 0.5));
        for x in x0..x1 {
            let d = add(start, scale(dx, (x - x0) as f64));
            if let Some((t, face)) = meet(solid.shape, o, d) {
                hit(y * eye.width + x, t, face);
            }
        }
    }
}

/// All first hits, and what each thing would cover alone.
fn cast_all(eye: &Eye, scene: &Scene) -> (Hits, Vec<Extent>) {
    let n = eye.width * eye.height;
    let mut hits = Hits { depth: Vec::with_capacity(n), surface: Vec::with_capacity(n) };
    for y in 0..eye.height {
        for x in 0..eye.width {
            let (t, face) = leave(scene.room, eye.origin, eye.ray(x as f64 + 0.5, y as f64 + 0.5));
            hits.depth.push(t);
            hits.surface.push(face as u32);
        }
    }
    let mut alone = vec![Extent::EMPTY; scene.things.len() + 1];
    // The solids of one thing follow one another, so the last thing at each pixel is enough to
    // count the pixel once.
    let mut last = vec![0u16; n];
    for (i, item) in scene.items.iter().enumerate() {
        let base = (i as u32 + 1) << 3;
        let extent = &mut alone[item.thing as usize];
        cast(eye, &item.solid, |at, t, face| {
            if last[at] != item.thing {
                last[at] = item.thing;
                extent.grow(at % eye.width, at / eye.width);
            }
            if t < hits.depth[at] {
                hits.depth[at] = t;
                hits.surface[at] = base | face as u32;
            }
        });
    }
    (hits, alone)
}

/// Where a ray from inside leaves the room, and through which of its six sides.
fn leave(room: V3, o: V3, d: V3) -> (f64, u8) {
    let mut best = (f64::INFINITY, 0);
    for i in 0..3 {
        let (t, side) = if d[i] > 0. { ((room[i] - o[i]) / d[i], 1) } else { (-o[i] / d[i], 0) };
        if t < best.0 {
            best = (t, 2 * i as u8 + side);
        }
    }
    best
}

/// Where in a pixel the four colour samples lie.
const SAMPLES: [[f64; 2]; 4] = [[-0.25, -0.25], [0.25, -0.25], [-0.25, 0.25], [0.25, 0.25]];

/// Four samples for each pixel that lies at an edge of a surface.
struct Edges {
    /// Index into the other two (× 4), or [`Edges::NONE`].
    number: Vec<u32>,
    depth: Vec<[f64; 4]>,
    surface: Vec<[u32; 4]>,
}

impl Edges {
    const NONE: u32 = u32::MAX;

    fn new(eye: &Eye, scene: &Scene, hits: &Hits) -> Self {
        let (w, h) = (eye.width, eye.height);
        let mut edges = Self { number: vec![Self::NONE; w * h], depth: Vec::new(), surface: Vec::new() };
        for y in 0..h {
            for x in 0..w {
                let own = hits.surface[y * w + x];
                let rows = y.saturating_sub(1)..(y + 2).min(h);
                let (x0, x1) = (x.saturating_sub(1), (x + 2).min(w));
                if rows.into_iter().all(|y| hits.surface[y * w + x0..y * w + x1].iter().all(|&s| s == own)) {
                    continue;
                }
                edges.number[y * w + x] = edges.depth.len() as u32;
                let far = SAMPLES.map(|[dx, dy]| {
                    leave(scene.room, eye.origin, eye.ray(x as f64 + 0.5 + dx, y as f64 + 0.5 + dy))
                });
                edges.depth.push(far.map(|f| f.0));
                edges.surface.push(far.map(|f| f.1 as u32));
            }
        }
        for (i, item) in scene.items.iter().enumerate() {
            edges.cast(eye, &item.solid, (i as u32 + 1) << 3);
        }
        edges
    }

    fn cast(&mut self, eye: &Eye, solid: &Solid, base: u32) {
        let Some([x0, y0, x1, y1]) = eye.bounds(solid) else { return };
        let frame = solid.frame();
        let o = frame.apply(sub(eye.origin, solid.centre));
        let dx = frame.apply(scale(eye.right, 1. / eye.focal));
        let dy = frame.apply(scale(eye.down, 1. / eye.focal));
        let offsets = SAMPLES.map(|[x, y]| add(scale(dx, x), scale(dy, y)));
        for y in y0..y1 {
            let start = frame.apply(eye.ray(x0 as f64 + 0.5, y as f64 + 0.5));
            for x in x0..x1 {
                let number = self.number[y * eye.width + x];
                if number == Self::NONE {
                    continue;
                }
                let middle = add(start, scale(dx, (x - x0) as f64));
                for (k, offset) in offsets.iter().enumerate() {
                    if let Some((t, face)) = meet(solid.shape, o, add(middle, *offset))
                        && t < self.depth[number as usize][k]
                    {
                        self.depth[number as usize][k] = t;
                        self.surface[number as usize][k] = base | face as u32;
                    }
                }
            }
        }
    }
}

/// Colours of all pixels, linear: four samples at edges, the centre elsewhere.
fn colours(eye: &Eye, scene: &Scene, hits: &Hits) -> Vec<V3> {
    let shader = Shader::new(scene);
    let edges = Edges::new(eye, scene, hits);
    let colour = |p: V3, surface: u32| shader.light(add(eye.origin, p), surface);
    let mut out = Vec::with_capacity(eye.width * eye.height);
    for y in 0..eye.height {
        for x in 0..eye.width {
            let at = y * eye.width + x;
            let (cx, cy) = (x as f64 + 0.5, y as f64 + 0.5);
            if edges.number[at] == Edges::NONE {
                out.push(colour(scale(eye.ray(cx, cy), hits.depth[at]), hits.surface[at]));
                continue;
            }
            let number = edges.number[at] as usize;
            let (depth, surface) = (&edges.depth[number], &edges.surface[number]);
            let mut sum = [0.; 3];
            let mut done = [false; 4];
            // Each surface in the pixel is shaded once, in the middle of its samples.
            for k in 0..4 {
                if done[k] {
                    continue;
                }
                let (mut p, mut n) = ([0.; 3], 0.);
                for j in k..4 {
                    if surface[j] == surface[k] {
                        p = add(p, scale(eye.ray(cx + SAMPLES[j][0], cy + SAMPLES[j][1]), depth[j]));
                        n += 1.;
                        done[j] = true;
                    }
                }
                // A glint may not outshine the edge.
                let c = colour(scale(p, 1. / n), surface[k]).map(|c| c.min(1.5));
                sum = add(sum, scale(c, n / 4.));
            }
            out.push(sum);
        }
    }
    out
}

/// A growing tight box over pixels.
#[derive(Clone, Copy)]
struct Extent {
    low: [usize; 2],
    high: [usize; 2],
    count: u32,
}

impl Extent {
    const EMPTY: Self = Self { low: [usize::MAX; 2], high: [0; 2], count: 0 };

    fn grow(&mut self, x: usize, y: usize) {
        self.low = [self.low[0].min(x), self.low[1].min(y)];
        self.high = [self.high[0].max(x + 1), self.high[1].max(y + 1)];
        self.count += 1;
    }

    fn bbox(&self) -> [f64; 4] {
        [self.low[0] as f64, self.low[1] as f64, self.high[0] as f64, self.high[1] as f64]
    }
}

/// Renders a scene at `width` × `height` pixels.
pub fn render(scene: &Scene, width: u32, height: u32) -> View {
    let (w, h) = (width as usize, height as usize);
    let eye = Eye::camera(&scene.camera, scene.eye, scene.heading, w, h);
    let (hits, alone) = cast_all(&eye, scene);
    let mut seen = vec![Extent::EMPTY; scene.things.len() + 1];
    let mut ids = vec![0u16; w * h];
    for (at, id) in ids.iter_mut().enumerate() {
        let surface = hits.surface[at];
        if surface >= 8 {
            *id = scene.items[(surface >> 3) as usize - 1].thing;
            seen[*id as usize].grow(at % w, at / w);
        }
    }

    // Things that are not seen at all do not exist for the viewer; the others are numbered from 1.
    let mut number = vec![0u16; scene.things.len() + 1];
    let mut things = Vec::new();
    for (i, thing) in scene.things.iter().enumerate() {
        let (whole, part) = (&alone[i + 1], &seen[i + 1]);
        if part.count == 0 {
            continue;
        }
        number[i + 1] = things.len() as u16 + 1;
        let full_bbox = whole.bbox();
        things.push(Thing {
            id: number[i + 1],
            kind: thing.kind,
            colour: thing.colour,
            size: thing.size,
            centre: eye.local(thing.centre),
            bbox: part.bbox(),
            full_bbox,
            visible_pixels: part.count,
            visible_fraction: part.count as f64 / whole.count as f64,
            truncated: full_bbox[0] == 0.
                || full_bbox[1] == 0.
                || full_bbox[2] == w as f64
                || full_bbox[3] == h as f64,
        });
    }
    for id in &mut ids {
        *id = number[*id as usize];
    }

    let rgb = develop(scene, colours(&eye, scene, &hits), w, h);
    View {
        seed: scene.seed,
        look: scene.look,
        width,
        height,
        camera: scene.camera,
        rgb,
        depth: hits.depth.iter().map(|&t| t as f32).collect(),
        ids,
        things,
    }
}

/// The room of a seed, seen. The content does not depend on the size of the picture.
pub fn generate(seed: u64, look: Look, width: u32, height: u32) -> View {
    render(&Scene::new(seed, look), width, height)
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;
    use crate::rooms::kinds::{cuboid, ellipsoid};
    use crate::rooms::paint::Paint;
    use crate::rooms::scene::{Item, Placed};
    use crate::rooms::solid::dot;
    use crate::rooms::{Camera, Colour, Kind};

    const LOOKS: [Look; 2] = [Look::Studio, Look::LivedIn];

    fn views(look: Look, n: u64) -> Vec<View> {
        (0..n).into_par_iter().map(|seed| generate(seed, look, 256, 192)).collect()
    }

    fn equal(a: &View, b: &View) -> bool {
        a.rgb == b.rgb && a.depth == b.depth && a.ids == b.ids && a.things == b.things && a.camera == b.camera
    }

    #[test]
    fn a_seed_gives_one_picture_whatever_the_threads() {
        for look in LOOKS {
            let alone: Vec<_> = (0..6).map(|seed| generate(seed, look, 256, 192)).collect();
            for threads in [1, 2] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let again = pool.install(|| views(look, 6));
                assert!(alone.iter().zip(&again).all(|(a, b)| equal(a, b)));
            }
            assert!(!equal(&alone[0], &alone[1]));
        }
    }

    /// The measures of module [`crate::rooms`], over 200 pictures of each look.
    #[test]
    fn the_world_is_not_easy() {
        for look in LOOKS {
            let views = views(look, 200);
            let mean = |f: &dyn Fn(&View) -> f64| views.iter().map(f).sum::<f64>() / views.len() as f64;
            let share = |f: fn(&Thing) -> bool| {
                mean(&|v| v.things.iter().filter(|t| f(t)).count() as f64 / v.things.len() as f64)
            };
            let things = mean(&|v| v.things.len() as f64);
            let occluded = share(|t| t.visible_fraction < 0.8);
            let small = share(|t| t.bbox[2] - t.bbox[0] < 25.6 || t.bbox[3] - t.bbox[1] < 19.2);
            let clear = share(Thing::is_clear);
            println!(
                "{look:?}: {things:.2} things, occluded {occluded:.3}, small {small:.3}, clear {clear:.3}"
            );
            assert!((6.0..12.0).contains(&things), "{things} things a picture");
            assert!(occluded >= 0.3, "{occluded} occluded");
            assert!(small >= 0.2, "{small} small");
            assert!(clear >= 0.9, "{clear} clear");
            for kind in Kind::ALL {
                let of_kind = mean(&|v| v.things.iter().filter(|t| t.kind == *kind).count() as f64);
                assert!(of_kind > 0.25, "{of_kind} {kind} a picture");
            }
        }
    }

    #[test]
    fn boxes_are_tight_around_ids_and_depth_lies_on_the_thing() {
        for look in LOOKS {
            for view in views(look, 20) {
                let mut seen = vec![Extent::EMPTY; view.things.len() + 1];
                let w = view.width as usize;
                let focal = view.width as f64 / 2. / (view.camera.fov_x.to_radians() / 2.).tan();
                for (at, &id) in view.ids.iter().enumerate() {
                    seen[id as usize].grow(at % w, at / w);
                    let z = view.depth[at] as f64;
                    assert!(z > 0.3 && z < 12.);
                    if id > 0 {
                        let thing = &view.things[id as usize - 1];
                        let ray = |p: usize, n: u32| (p as f64 + 0.5 - n as f64 / 2.) / focal * z;
                        let p = [ray(at % w, view.width), ray(at / w, view.height), z];
                        let off = sub(p, thing.centre);
                        let [a, b, c] = thing.size;
                        let radius = 0.5 * (a * a + b * b + c * c).sqrt();
                        assert!(dot(off, off).sqrt() <= radius + 1e-4, "{:?}", thing.kind);
                    }
                }
                for (i, thing) in view.things.iter().enumerate() {
                    assert_eq!(usize::from(thing.id), i + 1);
                    assert_eq!(thing.bbox, seen[i + 1].bbox());
                    assert_eq!(thing.visible_pixels, seen[i + 1].count);
                    assert!(thing.visible_fraction > 0. && thing.visible_fraction <= 1.);
                    let (b, f) = (thing.bbox, thing.full_bbox);
                    assert!(f[0] <= b[0] && f[1] <= b[1] && f[2] >= b[2] && f[3] >= b[3]);
                }
            }
        }
    }

    /// A board of 1.2 × 0.8 m, 3 m ahead, and a ball behind its right edge.
    #[test]
    fn size_and_depth_of_a_frontal_thing_follow_from_the_pinhole() {
        let mut scene = Scene::new(0, Look::Studio);
        scene.room = [6., 3., 6.];
        scene.camera = Camera { fov_x: 60., height: 1.4, tilt: 0. };
        (scene.eye, scene.heading) = ([3., 1.4, 0.5], (0., 1.));
        let paint = Paint::plain([0.5; 3]);
        let (board, ball) = ([3., 1.4, 3.55], [3.65, 1.4, 4.5]);
        let placed = |kind, size, centre| Placed { kind, colour: Colour::Gray, size, centre, yaw: (0., 1.) };
        scene.things = vec![placed(Kind::Box, [1.2, 0.8, 0.1], board), placed(Kind::Ball, [0.6; 3], ball)];
        scene.items = vec![
            Item { solid: cuboid(board, [1.2, 0.8, 0.1], paint), thing: 1, casts: true },
            Item { solid: ellipsoid(ball, [0.3; 3], paint), thing: 2, casts: true },
        ];
        let view = render(&scene, 400, 300);
        let focal = 200. / 30f64.to_radians().tan();
        let [board, ball] = &view.things[..] else { panic!("{:?}", view.things) };
        let extent = |b: [f64; 4]| [b[2] - b[0], b[3] - b[1]];
        let [w, h] = extent(board.bbox);
        let depth = view.depth_at(board.bbox);
        assert!((depth - 3.).abs() < 1e-6);
        assert!(
            (w * depth / focal - 1.2).abs() < depth / focal
                && (h * depth / focal - 0.8).abs() < depth / focal
        );
        assert_eq!(board.visible_fraction, 1.);
        assert!((board.centre[2] - 3.05).abs() < 1e-9 && board.centre[0].abs() < 1e-9);
        assert!(!board.truncated && !ball.truncated);
        // Its disc is 0.35 to 0.95 m aside at 4 m; the board hides all up to 0.6 · 4 / 3 = 0.8 m.
        let [w, _] = extent(ball.full_bbox);
        assert!((w * 4. / focal - 0.6).abs() < 0.02, "{w}");
        assert!((0.15..0.25).contains(&ball.visible_fraction), "{}", ball.visible_fraction);
        // The wall above the board, and the floor.
        assert!((view.depth[60 * 400 + 200] as f64 - 5.5).abs() < 1e-5);
        let below = view.depth[(299 * 400 + 30) as usize] as f64;
        assert!((below - 1.4 * focal / 149.5).abs() < 1e-5, "{below}");
    }

    #[test]
    fn content_does_not_depend_on_the_pictures_size() {
        for look in LOOKS {
            for seed in 0..5 {
                let [small, large] = [256, 512].map(|w| generate(seed, look, w, w * 3 / 4));
                for thing in small.things.iter().filter(|t| t.is_clear()) {
                    let same = |t: &&Thing| {
                        (t.kind, t.colour) == (thing.kind, thing.colour) && t.centre == thing.centre
                    };
                    let twin = large.things.iter().find(same).expect("seen at both sizes");
                    assert_eq!(twin.size, thing.size);
                    for k in 0..4 {
                        // Thin parts may be missed at one size.
                        assert!(
                            (twin.full_bbox[k] / 2. - thing.full_bbox[k]).abs() <= 3.,
                            "{thing:?} {twin:?}"
                        );
                    }
                }
            }
        }
    }
}
