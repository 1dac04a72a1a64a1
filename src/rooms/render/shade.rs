//! How much light a point of a surface sends to the camera: paint, lamp, shadows.

use super::{Eye, cast};
use crate::rooms::scene::{Item, Scene};
use crate::rooms::solid::{Frame, Shape, V3, add, dot, mix, mul, scale, sub, unit};

/// Depth of the nearest solid as a light sees it; coarse texels make soft shadows.
struct ShadowMap {
    eye: Eye,
    depth: Vec<f32>,
    /// Metres a surface is lifted along its normal before the comparison, against self-shadow.
    lift: f64,
}

impl ShadowMap {
    fn new(eye: Eye, scene: &Scene) -> Self {
        let mut depth = vec![f32::INFINITY; eye.width * eye.height];
        for item in scene.items.iter().filter(|item| item.casts) {
            cast(&eye, &item.solid, |at, t, _| depth[at] = depth[at].min(t as f32));
        }
        let far = dot(sub([scene.room[0] / 2., 0., scene.room[2] / 2.], eye.origin), eye.forward);
        Self { lift: 2.2 * far / eye.focal, eye, depth }
    }

    /// Share of the light that arrives, by 4×4 texels with bilinear weights at the rim.
    fn arrives(&self, p: V3, n: V3) -> f64 {
        let [x, y, z] = self.eye.project(add(p, scale(n, self.lift)));
        // Outside the map, its rim.
        let limit = |v: f64, size: usize| (v - 0.5).clamp(1., size as f64 - 3.001);
        let (x, y) = (limit(x, self.eye.width), limit(y, self.eye.height));
        let (i, j) = (x as usize, y as usize);
        let (fx, fy) = ((x - i as f64) as f32, (y - j as f64) as f32);
        let z = (z - self.lift * 0.5) as f32;
        let mut lit = 0.;
        for (b, wy) in [1. - fy, 1., 1., fy].into_iter().enumerate() {
            let at = (j + b - 1) * self.eye.width + i - 1;
            let lets = |k: usize| if self.depth[at + k] >= z { 1f32 } else { 0. };
            lit += wy * (lets(0) * (1. - fx) + lets(1) + lets(2) + lets(3) * fx);
        }
        lit as f64 / 9.
    }
}

pub(super) struct Shader<'a> {
    scene: &'a Scene,
    frames: Vec<Frame>,
    key: ShadowMap,
    above: ShadowMap,
}

impl<'a> Shader<'a> {
    pub fn new(scene: &'a Scene) -> Self {
        let [w, _, l] = scene.room;
        let middle = [w / 2., 0., l / 2.];
        let reach = 0.5 * (w * w + l * l).sqrt() + 0.2;
        let light = scene.light.position;
        let key = Eye::looking(light, middle, reach / light[1].max(2.) * 0.95, scene.light.texels);
        let zenith = Eye::looking([w / 2., 14., l / 2.], middle, 0.55 * w.max(l) / 12., 48);
        Self {
            frames: scene.items.iter().map(|item| item.solid.frame()).collect(),
            key: ShadowMap::new(key, scene),
            above: ShadowMap::new(zenith, scene),
            scene,
        }
    }

    /// Linear light that a surface sends to the camera from `p`.
    pub fn light(&self, p: V3, surface: u32) -> V3 {
        let face = (surface & 7) as u8;
        let (paint, n, albedo) = if surface < 8 {
            let (paint, n) = (&self.scene.shell[face as usize], shell_normal(face));
            let (u, v) = face_uv(p, face);
            let room = self.scene.room;
            let q: V3 = std::array::from_fn(|i| p[i] / room[i] * 2. - 1.);
            let (a, b) = face_uv(q, face);
            let skirting = face / 2 != 1 && p[1] < self.scene.skirting.0;
            let albedo = if skirting { self.scene.skirting.1 } else { paint.at(u, v, [a, b]) };
            (paint, n, albedo)
        } else {
            let i = (surface >> 3) as usize - 1;
            let Item { solid, .. } = &self.scene.items[i];
            let q = self.frames[i].apply(sub(p, solid.centre));
            let n = solid.normal(q, face);
            let axis = if solid.shape == Shape::Box { face } else { 4 };
            let (a, b) = face_uv(q, axis);
            let (u, v) = face_uv(mul(q, solid.half), axis);
            (&solid.paint, n, solid.paint.at(u, v, [a, b]))
        };
        let light = &self.scene.light;
        let to_light = sub(light.position, p);
        let distance = dot(to_light, to_light);
        let l = scale(to_light, 1. / distance.sqrt());
        let facing = dot(n, l).max(0.);
        let lit = if facing > 0. { self.key.arrives(p, n) } else { 0. };
        let open = self.above.arrives(p, n) * self.corner(p, surface);
        let ambient = scale(mix(light.bounce, light.ambient, 0.5 + 0.5 * n[1]), 0.4 + 0.6 * open);
        let fall = light.reference * light.reference / distance;
        let mut sum = mul(albedo, add(ambient, scale(light.colour, facing * lit * fall)));
        if paint.gloss > 0. && facing * lit > 0. {
            let h = unit(add(l, unit(sub(self.scene.eye, p))));
            let s = dot(n, h).max(0.);
            let s = s * s * s * s;
            let s = s * s * s * s;
            sum = add(sum, scale(light.colour, paint.gloss * s * s * lit * fall));
        }
        add(sum, scale(albedo, paint.glow))
    }

    /// Darkening where the room's sides meet.
    fn corner(&self, p: V3, surface: u32) -> f64 {
        if surface >= 8 {
            return 1.;
        }
        let mut open = 1.;
        for i in 0..3 {
            if i as u32 != (surface & 7) / 2 {
                let d = p[i].min(self.scene.room[i] - p[i]).max(0.) / 0.22;
                open *= 1. - 0.4 / (1. + d * d);
            }
        }
        open
    }
}

fn shell_normal(face: u8) -> V3 {
    let mut n = [0.; 3];
    n[(face / 2) as usize] = if face.is_multiple_of(2) { 1. } else { -1. };
    n
}

/// The two coordinates that run over a face of a box: v is height on its upright faces.
fn face_uv(p: V3, face: u8) -> (f64, f64) {
    match face / 2 {
        0 => (p[2], p[1]),
        1 => (p[0], p[2]),
        _ => (p[0], p[1]),
    }
}
