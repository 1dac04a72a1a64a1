//! The pinhole that everything is seen through: the picture's, and the lights'.

use crate::rooms::solid::{Solid, V3, add, cross, dot, scale, sub, unit};
use crate::rooms::view::Camera;

/// A pinhole: rays through pixel (x, y) have the direction `corner + x·right + y·down`, whose
/// forward part is 1.
#[derive(Clone, Debug)]
pub struct Eye {
    pub origin: V3,
    pub right: V3,
    pub down: V3,
    pub forward: V3,
    /// Pixels per unit of tangent.
    pub(super) focal: f64,
    pub(super) width: usize,
    pub(super) height: usize,
}

/// Things nearer than this are treated as filling the screen.
const NEAR: f64 = 0.05;

impl Eye {
    /// A camera at `origin` with its heading (sin, cos), 0 along +z.
    pub fn camera(camera: &Camera, origin: V3, heading: (f64, f64), width: usize, height: usize) -> Self {
        let (st, ct) = camera.tilt.to_radians().sin_cos();
        let (sh, ch) = heading;
        let forward = [sh * ct, -st, ch * ct];
        let right = [ch, 0., -sh];
        let focal = width as f64 / 2. / (camera.fov_x.to_radians() / 2.).tan();
        let down = [-sh * st, -ct, -ch * st];
        Self { origin, right, down, forward, focal, width, height }
    }

    pub(super) fn looking(origin: V3, at: V3, half_tangent: f64, size: usize) -> Self {
        let forward = unit(sub(at, origin));
        let right = unit(cross(if forward[1].abs() > 0.99 { [0., 0., 1.] } else { [0., 1., 0.] }, forward));
        let down = cross(right, forward);
        Self {
            origin,
            right,
            down,
            forward,
            focal: size as f64 / 2. / half_tangent,
            width: size,
            height: size,
        }
    }

    /// Pixel coordinates and depth of a point.
    pub fn project(&self, p: V3) -> [f64; 3] {
        let v = sub(p, self.origin);
        let z = dot(v, self.forward);
        let k = self.focal / z;
        [self.width as f64 / 2. + k * dot(v, self.right), self.height as f64 / 2. + k * dot(v, self.down), z]
    }

    /// The point in camera coordinates: right, down, forward.
    pub fn local(&self, p: V3) -> V3 {
        let v = sub(p, self.origin);
        [dot(v, self.right), dot(v, self.down), dot(v, self.forward)]
    }

    /// Direction of the ray through a point of the picture, its forward part 1.
    pub fn ray(&self, x: f64, y: f64) -> V3 {
        let (x, y) = ((x - self.width as f64 / 2.) / self.focal, (y - self.height as f64 / 2.) / self.focal);
        add(self.forward, add(scale(self.right, x), scale(self.down, y)))
    }

    /// Half-open pixel ranges that the solid can touch.
    pub(super) fn bounds(&self, solid: &Solid) -> Option<[usize; 4]> {
        let (mut low, mut high) = ([f64::INFINITY; 2], [f64::NEG_INFINITY; 2]);
        let mut behind = 0;
        for corner in solid.corners() {
            let p = self.project(corner);
            if p[2] < NEAR {
                behind += 1;
                continue;
            }
            for k in 0..2 {
                low[k] = low[k].min(p[k]);
                high[k] = high[k].max(p[k]);
            }
        }
        let (w, h) = (self.width as f64, self.height as f64);
        match behind {
            0 => {}
            8 => return None,
            _ => (low, high) = ([0., 0.], [w, h]),
        }
        let cut = |v: f64, max: f64| v.clamp(0., max) as usize;
        let [x0, y0] = [cut(low[0] - 0.5, w), cut(low[1] - 0.5, h)];
        let [x1, y1] = [cut(high[0] + 1.5, w), cut(high[1] + 1.5, h)];
        (x0 < x1 && y0 < y1).then_some([x0, y0, x1, y1])
    }
}
