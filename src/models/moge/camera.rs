//! From an affine point map to a camera: focal length and depth shift.
//!
//! MoGe predicts points up to a shift along z. The camera is a pinhole with square pixels whose
//! axis passes through the picture's centre, so shift and focal length follow from
//! `min Σ ‖f · xy / (z + s) − uv‖²` (MoGe, eq. 3). The focal length here is relative to half the
//! picture's diagonal, as are the `uv` coordinates.

/// The released code solves on this many samples per side, taken by nearest neighbour.
const SAMPLES: usize = 64;

/// When the solver stops; see [`solve`].
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// On the relative decrease of the sum of squares, wanted and got.
    pub cost: f64,
    /// On the relative size of the trust region.
    pub step: f64,
}

impl Tolerance {
    /// What the released code uses.
    pub const RELEASED: Self = Self { cost: 1e-3, step: 1e-8 };
    pub const CONVERGED: Self = Self { cost: 1e-15, step: 1e-12 };
}

/// Half the picture's width and height in units of half its diagonal.
pub fn spans(aspect: f64) -> [f64; 2] {
    let d = (1. + aspect * aspect).sqrt();
    [aspect / d, 1. / d]
}

/// The coordinate of sample `i` of `n` along an axis of half-length `span`: sample centres, from
/// −span to span.
pub fn view_plane(i: usize, n: usize, span: f64) -> f64 {
    span * ((2 * i + 1) as f64 / n as f64 - 1.)
}

/// One point of the map and where it is seen.
struct Sample {
    uv: [f64; 2],
    xy: [f64; 2],
    z: f64,
}

/// Residual and Jacobian with respect to the shift, as their inner products.
#[derive(Clone, Copy)]
struct Normal {
    cost: f64,
    jj: f64,
    jr: f64,
}

/// The best focal length for a shift, by linear least squares.
fn focal_at(samples: &[Sample], shift: f64) -> f64 {
    let (mut pu, mut pp) = (0., 0.);
    for s in samples {
        let z = s.z + shift;
        for (x, u) in s.xy.iter().zip(s.uv) {
            pu += x / z * u;
            pp += (x / z) * (x / z);
        }
    }
    pu / pp
}

/// With a free focal length it is eliminated: a function of the shift (variable projection).
fn evaluate(samples: &[Sample], shift: f64, focal: Option<f64>) -> Normal {
    let (mut pu, mut pp, mut du, mut dp) = (0., 0., 0., 0.);
    if focal.is_none() {
        for s in samples {
            let z = s.z + shift;
            for (x, u) in s.xy.iter().zip(s.uv) {
                let p = x / z;
                let d = -p / z;
                pu += p * u;
                pp += p * p;
                du += d * u;
                dp += p * d;
            }
        }
    }
    let (f, df) = match focal {
        Some(f) => (f, 0.),
        None => (pu / pp, (du * pp - 2. * pu * dp) / (pp * pp)),
    };
    let mut n = Normal { cost: 0., jj: 0., jr: 0. };
    for s in samples {
        let z = s.z + shift;
        for (x, u) in s.xy.iter().zip(s.uv) {
            let p = x / z;
            let (r, j) = (f * p - u, df * p - f * p / z);
            n.cost += r * r;
            n.jj += j * j;
            n.jr += j * r;
        }
    }
    n
}

/// Levenberg–Marquardt from shift 0 for one unknown, with Moré's trust region (the algorithm of
/// MINPACK's `lmdif`, which the released code calls through SciPy; its early stop at a cost
/// tolerance of 1e-3 is part of the released results).
fn solve(samples: &[Sample], focal: Option<f64>, tol: Tolerance) -> f64 {
    let (mut shift, mut radius) = (0f64, 100f64);
    let mut at = evaluate(samples, shift, focal);
    let mut first = true;
    for _ in 0..200 {
        if !(at.jj > 0. && at.cost > 0. && at.cost.is_finite()) {
            break;
        }
        let gradient = at.jr.abs() / (at.jj * at.cost).sqrt();
        if gradient <= 1e-8_f64.min(tol.step) {
            break;
        }
        // The step of the damped model that stays within the radius (to a tenth of it).
        let newton = -at.jr / at.jj;
        let (step, damping) = if newton.abs() <= 1.1 * radius {
            (newton, 0.)
        } else {
            (newton.signum() * radius, at.jj * (newton.abs() / radius - 1.))
        };
        let length = step.abs();
        if first {
            radius = radius.min(length);
            first = false;
        }
        let next = evaluate(samples, shift + step, focal);
        let sane = 0.01 * next.cost < at.cost;
        let got = if sane { 1. - next.cost / at.cost } else { -1. };
        let model = at.jj * step * step / at.cost;
        let damped = damping * length * length / at.cost;
        let wanted = model + 2. * damped;
        let slope = -(model + damped);
        let ratio = if wanted > 0. { got / wanted } else { 0. };
        // A step to where the cost is not a number shrinks the region.
        if ratio.is_nan() || ratio <= 0.25 {
            let shrink: f64 = if got >= 0. { 0.5 } else { 0.5 * slope / (slope + 0.5 * got) };
            // `max` also takes 0.1 where the shrinking is not a number.
            let shrink = if sane { shrink.max(0.1) } else { 0.1 };
            radius = shrink * radius.min(10. * length);
        } else if damping == 0. || ratio >= 0.75 {
            radius = 2. * length;
        }
        if ratio >= 1e-4 {
            shift += step;
            at = next;
        }
        let flat = got.abs() <= tol.cost && wanted <= tol.cost && 0.5 * ratio <= 1.;
        if flat || radius <= tol.step * shift.abs() {
            break;
        }
    }
    shift
}

/// Recovers `(focal, shift)` from a point map.
///
/// `points` are `height · width` triples, row-major; `mask` says which of them count (all, if
/// there is none); points that are not finite never count. With `focal` given only the shift is
/// sought. Fewer than two points leave the map as it is: focal 1 (or the given one), shift 0.
pub fn recover_focal_shift(
    points: &[[f32; 3]],
    mask: Option<&[bool]>,
    width: usize,
    height: usize,
    focal: Option<f64>,
    tol: Tolerance,
) -> (f64, f64) {
    assert_eq!(points.len(), width * height, "point map and its size");
    let span = spans(width as f64 / height as f64);
    let source = |i: usize, n: usize| ((i as f32 * (n as f32 / SAMPLES as f32)) as usize).min(n - 1);
    let mut samples = Vec::with_capacity(SAMPLES * SAMPLES);
    for i in 0..SAMPLES {
        let y = source(i, height);
        for j in 0..SAMPLES {
            let x = source(j, width);
            let k = y * width + x;
            let p = points[k].map(f64::from);
            if mask.is_none_or(|m| m[k]) && p.iter().all(|v| v.is_finite()) {
                let uv = [view_plane(x, width, span[0]), view_plane(y, height, span[1])];
                samples.push(Sample { uv, xy: [p[0], p[1]], z: p[2] });
            }
        }
    }
    if samples.len() < 2 {
        return (focal.unwrap_or(1.), 0.);
    }
    let shift = solve(&samples, focal, tol);
    let focal = focal.unwrap_or_else(|| focal_at(&samples, shift));
    if focal.is_finite() { (focal, shift) } else { (1., 0.) }
}

/// Focal length relative to half the diagonal, from a horizontal field of view in degrees.
pub fn focal_from_fov(fov_x: f64, aspect: f64) -> f64 {
    spans(aspect)[0] / (fov_x.to_radians() / 2.).tan()
}

/// `[fx, fy]` in units of the picture's width and height.
pub fn normalised_focal(focal: f64, aspect: f64) -> [f64; 2] {
    spans(aspect).map(|s| focal / 2. / s)
}
