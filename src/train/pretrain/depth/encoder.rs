//! What the encoder learns beside the maps: to tell of a picture its camera, and of its patches what is
//! seen there, by linear heads that the finished model does not have.

use crate::models::moge::MoGe;
use crate::nn::{self, Linear};
use crate::rooms::scene::Scene;
use crate::rooms::{Kind, Look, View, render};
use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// Weights of the losses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EncoderWeights {
    pub camera: f64,
    /// Of the lines through patches, of their depth, of the way they face, of what they show.
    pub lines: f64,
    pub patches: f64,
    pub normals: f64,
    pub kinds: f64,
}

impl Default for EncoderWeights {
    fn default() -> Self {
        Self { camera: 1., lines: 4., patches: 1., normals: 0.3, kinds: 0.2 }
    }
}

/// Scalars, each a mean over what is told.
pub struct EncoderLosses {
    camera: Tensor,
    lines: Tensor,
    patches: Tensor,
    normals: Tensor,
    kinds: Tensor,
}

impl EncoderLosses {
    pub fn named(&self) -> [(&'static str, &Tensor); 5] {
        [
            ("camera", &self.camera),
            ("lines", &self.lines),
            ("patches", &self.patches),
            ("normals", &self.normals),
            ("kinds", &self.kinds),
        ]
    }

    pub fn total(&self, w: &EncoderWeights) -> Result<Tensor> {
        let weighed = [w.camera, w.lines, w.patches, w.normals, w.kinds];
        let mut total = self.camera.zeros_like()?;
        for ((_, loss), weight) in self.named().into_iter().zip(weighed) {
            total = (total + (loss * weight)?)?;
        }
        Ok(total)
    }
}

/// The heads: of the class token for the camera, of the encoder's features for the rest.
pub struct Heads {
    camera: Linear,
    camera_of_patch: Linear,
    lines: Linear,
    patches: Linear,
    normals: Linear,
    kinds: Linear,
}

impl Heads {
    pub fn new(net: &MoGe, vb: VarBuilder) -> Result<Self> {
        let features = net.config().encoder.dim_out;
        let of_parts = |each: usize, name: &str| nn::linear(features, PARTS * PARTS * each, vb.pp(name));
        Ok(Self {
            camera: nn::linear(net.backbone().config().dim, CAMERA, vb.pp("camera"))?,
            camera_of_patch: nn::linear(features, CAMERA, vb.pp("camera_of_patch"))?,
            lines: of_parts(LINES, "lines")?,
            patches: of_parts(1, "patches")?,
            normals: of_parts(3, "normals")?,
            kinds: of_parts(KINDS, "kinds")?,
        })
    }

    /// Of pictures with class tokens `cls` `[batch, dim]` and, for patches of a grid of `rows` · `cols`,
    /// `features` `[batch, patches, dim]`: of all, row by row, or of those with the indices `kept`.
    pub fn losses(
        &self,
        shown: &[Shown],
        (rows, cols): (usize, usize),
        kept: Option<&[u32]>,
        features: &Tensor,
        cls: &Tensor,
    ) -> Result<EncoderLosses> {
        let views = || shown.iter().map(|s| &s.view);
        // So that the middle of each part has pixels on all sides.
        let most = |v: &View| [(v.width, cols), (v.height, rows)].map(|(n, of)| n as usize > 2 * PARTS * of);
        assert!(views().all(|v| most(v) == [true; 2]), "pictures too small for {cols}×{rows} patches");
        let off = |got: Tensor, truth: Vec<f32>| -> Result<Tensor> {
            let truth = Tensor::from_vec(truth, got.shape(), got.device())?;
            (got - truth)?.abs()?.mean_all()
        };
        let told = |of: usize| shown.iter().flat_map(|s| camera(s).repeat(of)).collect::<Vec<f32>>();
        let depths = views().flat_map(|v| of_kept(patch_depths(v, rows, cols), rows * cols, kept)).collect();
        let kinds: Vec<u32> =
            views().flat_map(|v| of_kept(patch_kinds(v, rows, cols), rows * cols, kept)).collect();
        let kinds = Tensor::new(kinds, features.device())?;
        let normals =
            views().flat_map(|v| of_kept(patch_normals(v, rows, cols), rows * cols, kept)).collect();
        let lines =
            shown.iter().flat_map(|s| of_kept(patch_lines(s, rows, cols), rows * cols, kept)).collect();
        let seen = self.kinds.forward(features)?.reshape(((), KINDS))?;
        let of_cls = off(self.camera.forward(cls)?, told(1))?;
        Ok(EncoderLosses {
            camera: (of_cls + off(self.camera_of_patch.forward(features)?, told(features.dim(1)?))?)?,
            lines: off(self.lines.forward(features)?, lines)?,
            patches: off(self.patches.forward(features)?, depths)?,
            normals: off(self.normals.forward(features)?, normals)?,
            kinds: nn::log_probs(&seen, &kinds)?.mean_all()?.neg()?,
        })
    }
}

/// What is told of the patches `kept`, of what is told of each of `patches`, patch after patch.
fn of_kept<T: Copy>(told: Vec<T>, patches: usize, kept: Option<&[u32]>) -> Vec<T> {
    let Some(kept) = kept else { return told };
    let each = told.len() / patches;
    kept.iter().flat_map(|i| told[*i as usize * each..][..each].iter().copied()).collect()
}

/// A picture and which way its camera looks.
pub struct Shown {
    pub view: View,
    /// (sin, cos) of the angle to the room's side walls.
    heading: (f64, f64),
}

impl Shown {
    pub fn new(seed: u64, look: Look, width: u32, height: u32) -> Self {
        let scene = Scene::new(seed, look);
        Self { view: render::render(&scene, width, height), heading: scene.heading }
    }
}

const CAMERA: usize = 7;

/// Field of view, tilt and height of a picture's camera, each of about unit spread over Rooms; and what a
/// picture shows of the first two: how far above its middle the horizon lies, in half widths, and how fast
/// upright lines lean with the distance from it; and of the field of view and the heading: how far from its
/// middle the lines along the room meet, and how fast those across it turn with the distance from the middle,
/// both but for the cosine of the tilt, of at least 0.9.
fn camera(shown: &Shown) -> [f32; CAMERA] {
    let c = &shown.view.camera;
    let (half, slope) = ((c.fov_x.to_radians() / 2.).tan(), c.tilt.to_radians().tan());
    let aside = shown.heading.0 / shown.heading.1;
    [
        (half.ln() + 0.52) / 0.2,
        (c.tilt - 12.5) / 7.,
        (c.height - 1.5) / 0.3,
        (slope / half - 0.37) / 0.2,
        (slope * half - 0.14) / 0.08,
        aside / half / 0.4,
        aside * half / 0.15,
    ]
    .map(|x| x as f32)
}

/// Numbers of a part of a patch that tell which way lines run through it.
const LINES: usize = 6;

/// The directions in the picture, as unit vectors (x right, y down), of what runs up, across and along the
/// room through the middle of each part, in the order of [`patch_depths`]. Edges show them, whatever the
/// camera; where the lines of one direction meet tells the camera (as in perspective fields, Jin et al. 2023).
fn patch_lines(shown: &Shown, rows: usize, cols: usize) -> Vec<f32> {
    let view = &shown.view;
    let (st, ct) = view.camera.tilt.to_radians().sin_cos();
    let (sh, ch) = shown.heading;
    // Of the room's axes in the camera's: right, down, forward.
    let axes = [[0., -ct, -st], [ch, -sh * st, sh * ct], [-sh, -ch * st, ch * ct]];
    let half = (view.camera.fov_x.to_radians() / 2.).tan();
    let (w, h) = (f64::from(view.width), f64::from(view.height));
    middles(view, rows, cols)
        .flat_map(|(x, y)| {
            let across = (2. * x as f64 + 1. - w) / w * half;
            let down = (2. * y as f64 + 1. - h) / w * half;
            axes.map(|a| {
                let d = [a[0] - across * a[2], a[1] - down * a[2]];
                let len = d[0].hypot(d[1]).max(1e-6);
                d.map(|x| (x / len) as f32)
            })
        })
        .flatten()
        .collect()
}

/// Parts of a patch in a row and in a column, each of which has its depth told.
const PARTS: usize = 2;

/// Mean log depth of the parts of each of `rows` · `cols` patches, patch after patch: of the pixels that
/// begin in a part, of which there have to be some.
fn patch_depths(view: &View, rows: usize, cols: usize) -> Vec<f32> {
    let (w, h) = (view.width as usize, view.height as usize);
    let span = |part: usize, parts: usize, pixels: usize| {
        (part * pixels).div_ceil(parts)..((part + 1) * pixels).div_ceil(parts)
    };
    let part = |px: usize, py: usize| {
        let (xs, ys) = (span(px, cols * PARTS, w), span(py, rows * PARTS, h));
        let pixels = ys.clone().flat_map(|y| xs.clone().map(move |x| y * w + x));
        pixels.map(|i| view.depth[i].ln()).sum::<f32>() / (xs.len() * ys.len()) as f32
    };
    (0..rows * cols)
        .flat_map(|i| (0..PARTS * PARTS).map(move |k| (i, k)))
        .map(|(i, k)| part(i % cols * PARTS + k % PARTS, i / cols * PARTS + k / PARTS))
        .collect()
}

/// The pixel in the middle of each part, in the order of [`patch_depths`].
fn middles(view: &View, rows: usize, cols: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
    let (w, h) = (view.width as usize, view.height as usize);
    let middle = |part: usize, parts: usize, pixels: usize| (2 * part + 1) * pixels / (2 * parts);
    (0..rows * cols).flat_map(|i| (0..PARTS * PARTS).map(move |k| (i, k))).map(move |(i, k)| {
        let x = middle(i % cols * PARTS + k % PARTS, cols * PARTS, w);
        (x, middle(i / cols * PARTS + k / PARTS, rows * PARTS, h))
    })
}

/// What a part of a patch can show: a kind of thing, or none.
const KINDS: usize = Kind::ALL.len() + 1;

/// The number of what is seen in the middle of each part, in the order of [`patch_depths`].
fn patch_kinds(view: &View, rows: usize, cols: usize) -> Vec<u32> {
    let none = Kind::ALL.len() as u32;
    let number = |kind: Kind| Kind::ALL.iter().position(|k| *k == kind).map_or(none, |i| i as u32);
    let kinds: HashMap<u16, u32> = view.things.iter().map(|t| (t.id, number(t.kind))).collect();
    let w = view.width as usize;
    middles(view, rows, cols).map(|(x, y)| kinds.get(&view.ids[y * w + x]).copied().unwrap_or(none)).collect()
}

/// The unit vector away from the surface in the middle of each part, towards the camera, in its axes
/// (x right, y down, z forward), three numbers a part in the order of [`patch_depths`].
fn patch_normals(view: &View, rows: usize, cols: usize) -> Vec<f32> {
    let (w, h) = (view.width as usize, view.height as usize);
    let focal = (w as f64 / 2. / (view.camera.fov_x.to_radians() / 2.).tan()) as f32;
    let point = |x: usize, y: usize| {
        let z = view.depth[y * w + x];
        [(x as f32 + 0.5 - w as f32 / 2.) * z / focal, (y as f32 + 0.5 - h as f32 / 2.) * z / focal, z]
    };
    let minus = |a: [f32; 3], b: [f32; 3]| [a[0] - b[0], a[1] - b[1], a[2] - b[2]];
    // Along the side on which the surface goes on.
    let along = |before: [f32; 3], at: [f32; 3], after: [f32; 3]| {
        let (a, b) = (minus(at, before), minus(after, at));
        if a[2].abs() < b[2].abs() { a } else { b }
    };
    middles(view, rows, cols)
        .flat_map(|(x, y)| {
            let at = point(x, y);
            let right = along(point(x - 1, y), at, point(x + 1, y));
            let down = along(point(x, y - 1), at, point(x, y + 1));
            // Down × right looks back at the camera from a wall that faces it.
            let n = [
                down[1] * right[2] - down[2] * right[1],
                down[2] * right[0] - down[0] * right[2],
                down[0] * right[1] - down[1] * right[0],
            ];
            let len = n.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
            n.map(|x| x / len)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rooms::generate;

    /// Against the renderer's own projection of a step along each axis of the room.
    #[test]
    fn lines_run_as_the_camera_shows_them() {
        for seed in 0..4 {
            let scene = Scene::new(seed, Look::Studio);
            let shown = Shown::new(seed, Look::Studio, 56, 42);
            let eye = render::Eye::camera(&scene.camera, scene.eye, scene.heading, 56, 42);
            let lines = patch_lines(&shown, 3, 4);
            assert_eq!(lines.len(), 3 * 4 * PARTS * PARTS * LINES);
            for ((x, y), lines) in middles(&shown.view, 3, 4).zip(lines.chunks(LINES)) {
                let ray = eye.ray(x as f64 + 0.5, y as f64 + 0.5);
                let at: [f64; 3] = std::array::from_fn(|i| eye.origin[i] + 3. * ray[i]);
                let axes = [[0., 1., 0.], [1., 0., 0.], [0., 0., 1.]];
                for (axis, told) in axes.into_iter().zip(lines.chunks(2)) {
                    let along = eye.project(std::array::from_fn(|i| at[i] + 1e-3 * axis[i]));
                    let (from, step) = (eye.project(at), [0, 1].map(|i| along[i]));
                    let step = [step[0] - from[0], step[1] - from[1]];
                    let len = step[0].hypot(step[1]);
                    for (told, step) in told.iter().zip(step) {
                        assert!((f64::from(*told) - step / len).abs() < 1e-2, "{told} of {}", step / len);
                    }
                }
            }
        }
    }

    /// Against what the renderer's camera shows of far points and of steps along the room's axes.
    #[test]
    fn the_camera_that_is_told_is_the_one_that_shows() {
        let (w, h) = (256., 192.);
        for seed in 0..8 {
            let scene = Scene::new(seed, Look::Studio);
            let eye = render::Eye::camera(&scene.camera, scene.eye, scene.heading, w as usize, h as usize);
            let shown = Shown { view: generate(seed, Look::Studio, 16, 12), heading: scene.heading };
            let told = camera(&shown).map(f64::from);
            let tilt = scene.camera.tilt.to_radians();
            let (sh, ch) = scene.heading;
            // Half widths from the middle, of a point far off in a direction.
            let far = |d: [f64; 3]| {
                let p = eye.project(std::array::from_fn(|i| eye.origin[i] + 1e6 * d[i]));
                [(p[0] - w / 2.) / (w / 2.), (h / 2. - p[1]) / (w / 2.)]
            };
            // The horizon straight ahead, and where the lines along the room meet on it.
            let [_, above] = far([sh, 0., ch]);
            let [aside, _] = far([0., 0., 1.]);
            assert!((0.2 * told[3] + 0.37 - above).abs() < 1e-4, "{} {above}", told[3]);
            assert!((-0.4 * told[5] - aside * tilt.cos()).abs() < 1e-4, "{} {aside}", told[5]);
            // How many pixels aside a line runs for each pixel down, at the right edge of the middle row and at the
            // middle of the row below by half a width.
            let slope = |x: f64, y: f64, axis: [f64; 3]| {
                let ray = eye.ray(x, y);
                let at: [f64; 3] = std::array::from_fn(|i| eye.origin[i] + 3. * ray[i]);
                let (a, b) = (eye.project(at), eye.project(std::array::from_fn(|i| at[i] + 1e-6 * axis[i])));
                [b[0] - a[0], b[1] - a[1]]
            };
            let upright = slope(w, h / 2., [0., 1., 0.]);
            let lean = upright[0] / -upright[1];
            assert!((0.08 * told[4] + 0.14 - lean).abs() < 1e-4, "{} {lean}", told[4]);
            let turn = |y: f64| {
                let d = slope(w / 2., y, [1., 0., 0.]);
                d[1] / d[0]
            };
            let turned = turn(h / 2. + w / 2.) - turn(h / 2.);
            assert!((0.15 * told[6] * tilt.cos() + turned).abs() < 1e-4, "{} {turned}", told[6]);
        }
    }

    #[test]
    fn what_is_told_of_some_patches_is_what_is_told_of_them_among_all() {
        let told: Vec<u32> = (0..6 * 4).collect();
        assert_eq!(of_kept(told.clone(), 6, Some(&[1, 4])), [4, 5, 6, 7, 16, 17, 18, 19]);
        assert_eq!(of_kept(told.clone(), 6, None), told);
    }

    #[test]
    fn parts_of_unequal_sizes_tell_of_every_pixel_once() {
        // 128 columns in 24 parts, 96 rows in 18.
        let mut view = generate(3, Look::Studio, 128, 96);
        for i in (0..view.depth.len()).step_by(97) {
            let (before, was) = (patch_depths(&view, 9, 12), view.depth[i]);
            view.depth[i] *= 2.;
            let after = patch_depths(&view, 9, 12);
            let changed: Vec<usize> = (0..after.len()).filter(|k| after[*k] != before[*k]).collect();
            let (x, y) = (i % 128, i / 128);
            let (px, py) = (x * 24 / 128, y * 18 / 96);
            assert_eq!(changed, [(py / 2 * 12 + px / 2) * 4 + py % 2 * 2 + px % 2], "pixel {x}, {y}");
            view.depth[i] = was;
        }
    }

    #[test]
    fn patches_are_told_the_depth_of_their_own_parts() {
        let mut view = generate(3, Look::Studio, 56, 42);
        // Depth that tells its place: e to the column, plus a hundredth of the row.
        for (i, d) in view.depth.iter_mut().enumerate() {
            *d = ((i % 56) as f32 / 10. + (i / 56) as f32 / 100.).exp();
        }
        let got = patch_depths(&view, 3, 4);
        assert_eq!(got.len(), 3 * 4 * 4);
        // Patch 5 is the second of the second row; its last part is its lower right one.
        let want = (14. + 7. + 3.) / 10. + (14. + 7. + 3.) / 100.;
        assert!((got[5 * 4 + 3] - want).abs() < 1e-3, "{} {want}", got[23]);
    }

    #[test]
    fn patches_are_told_which_way_the_floor_faces() {
        let view = generate(3, Look::Studio, 224, 168);
        let normals = patch_normals(&view, 12, 16);
        let (rows, cols) = (12, 16);
        assert_eq!(normals.len(), rows * cols * PARTS * PARTS * 3);
        // The floor's normal is up: (0, −cos, −sin) of the tilt in a camera that looks down by it.
        let (sin, cos) = view.camera.tilt.to_radians().sin_cos();
        let up = [0., -cos as f32, -sin as f32];
        let near = |n: &[f32]| n.iter().zip(up).map(|(a, b)| a * b).sum::<f32>() > 0.99;
        let all: Vec<&[f32]> = normals.chunks(3).collect();
        let floor = all.iter().copied().filter(|n| near(n)).count();
        assert!(floor > all.len() / 10, "{floor} of {} face up", all.len());
        for n in all {
            let len = n.iter().map(|x| x * x).sum::<f32>();
            assert!((len - 1.).abs() < 1e-3, "{n:?}");
        }
    }
}
