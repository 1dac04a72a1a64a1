//! Is a picture of the world that the embedded models know?
//!
//! A few statistics of a small copy of the picture, compared with those of rendered rooms: the
//! Mahalanobis distance to their mean (Mahalanobis 1936). It tells photographs, diagrams and noise
//! from renderings of Rooms; it does not tell a good picture from a bad one, and other flat-shaded
//! interiors pass. Only a notice hangs on it, never an answer.

use crate::nn::resample::{Filter, resize_u8};
use crate::sight::Picture;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Height and width of the copies whose neighbours are compared, whatever the picture's own size.
const SCALES: [(usize, usize); 3] = [(144, 192), (72, 96), (36, 48)];
/// Of the copy whose colours are looked at.
const COLOURS: (usize, usize) = (48, 64);

/// Statistics of a picture.
pub const FEATURES: usize = 26;

/// Spreads and differences are of many magnitudes.
fn log(v: f64) -> f64 {
    (v + 1e-3).ln()
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0., 0.), |(s, n), v| (s + v, n + 1.));
    sum / n
}

/// Of the differences between neighbours across and down, at three scales: mean, share of hardly
/// any, how much edges outweigh texture, median. Then mean and spread of brightness, entropy of
/// colours, mean saturation, share of the saturated.
pub fn features(picture: &Picture) -> [f64; FEATURES] {
    let from = (picture.height() as usize, picture.width() as usize);
    let copy = |size| -> Vec<[f64; 3]> {
        let bytes = resize_u8(picture.rgb(), from, 3, size, Filter::Bilinear);
        bytes.chunks_exact(3).map(|p| [0, 1, 2].map(|c| p[c] as f64 / 255.)).collect()
    };
    let light = |[r, g, b]: &[f64; 3]| 0.299 * r + 0.587 * g + 0.114 * b;
    let mut all = Vec::with_capacity(FEATURES);
    for (h, w) in SCALES {
        let lights: Vec<f64> = copy((h, w)).iter().map(light).collect();
        let steps = |by: usize, wide: usize, high: usize| -> Vec<f64> {
            let mut d: Vec<f64> = (0..high)
                .flat_map(|y| (0..wide).map(move |x| y * w + x))
                .map(|i| (lights[i + by] - lights[i]).abs())
                .collect();
            d.sort_unstable_by(f64::total_cmp);
            d
        };
        let (across, down) = (steps(1, w - 1, h), steps(w, w, h - 1));
        let average = |d: &[f64]| mean(d.iter().copied());
        let flat = |d: &[f64]| mean(d.iter().map(|v| f64::from(*v < 0.012)));
        all.extend([log(average(&across)), log(average(&down)), flat(&across), flat(&down)]);
        all.push(log(mean(across.iter().map(|v| v * v)).sqrt()) - log(average(&across)));
        all.extend([log(across[across.len() / 2]), log(down[down.len() / 2])]);
    }
    let pixels = copy(COLOURS);
    let brightness = mean(pixels.iter().map(light));
    let spread = mean(pixels.iter().map(|p| (light(p) - brightness).powi(2))).sqrt();
    let mut counts: BTreeMap<[u8; 3], f64> = BTreeMap::new();
    for p in &pixels {
        *counts.entry(p.map(|v| (v * 255.) as u8 >> 4)).or_default() += 1. / pixels.len() as f64;
    }
    let entropy: f64 = counts.values().map(|p| -p * p.ln()).sum();
    let saturation = |p: &[f64; 3]| {
        let (low, high) = (p.iter().copied().fold(1., f64::min), p.iter().copied().fold(0., f64::max));
        if high > 0. { (high - low) / high } else { 0. }
    };
    let saturated = mean(pixels.iter().map(|p| f64::from(saturation(p) > 0.4)));
    all.extend([brightness, log(spread), entropy, mean(pixels.iter().map(saturation)), saturated]);
    all.try_into().expect("seven of each scale, five of the colours")
}

/// What pictures of a world look like.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Familiar {
    mean: Vec<f64>,
    /// Lower triangle L of the Cholesky factor of the covariance, row by row.
    factor: Vec<f64>,
    /// Pictures farther from the mean than this are plainly of another world.
    limit: f64,
}

impl Familiar {
    /// From the features of many pictures of the world: one in a thousand of them is beyond the limit.
    pub fn of(samples: &[[f64; FEATURES]]) -> Self {
        let n = samples.len() as f64;
        let mut mean = vec![0.; FEATURES];
        for s in samples {
            mean.iter_mut().zip(s).for_each(|(m, v)| *m += v / n);
        }
        let mut factor = vec![0.; FEATURES * (FEATURES + 1) / 2];
        for i in 0..FEATURES {
            for j in 0..=i {
                let covariance: f64 =
                    samples.iter().map(|s| (s[i] - mean[i]) * (s[j] - mean[j])).sum::<f64>() / n;
                // Keeps a feature that never varies from dividing by zero.
                let covariance = covariance + if i == j { 1e-6 } else { 0. };
                let before: f64 = (0..j).map(|k| factor[place(i, k)] * factor[place(j, k)]).sum();
                factor[place(i, j)] = match i == j {
                    true => (covariance - before).max(1e-9).sqrt(),
                    false => (covariance - before) / factor[place(j, j)],
                };
            }
        }
        let mut known = Self { mean, factor, limit: 0. };
        let mut distances: Vec<f64> = samples.iter().map(|s| known.distance_of(s)).collect();
        distances.sort_unstable_by(f64::total_cmp);
        known.limit = distances[(distances.len() - 1) * 999 / 1000];
        known
    }

    /// From the JSON form.
    ///
    /// # Errors
    /// If the text is none, or has other features than these.
    pub fn from_json(text: &str) -> Result<Self, String> {
        let read: Self = serde_json::from_str(text).map_err(|e| e.to_string())?;
        if read.mean.len() != FEATURES || read.factor.len() != FEATURES * (FEATURES + 1) / 2 {
            return Err(format!("{} features, expected {FEATURES}", read.mean.len()));
        }
        Ok(read)
    }

    fn distance_of(&self, features: &[f64; FEATURES]) -> f64 {
        // |L⁻¹ (x − mean)|, by forward substitution.
        let mut solved = [0.; FEATURES];
        for i in 0..FEATURES {
            let before: f64 = (0..i).map(|k| self.factor[place(i, k)] * solved[k]).sum();
            solved[i] = (features[i] - self.mean[i] - before) / self.factor[place(i, i)];
        }
        solved.iter().map(|v| v * v).sum::<f64>().sqrt()
    }

    /// Standard deviations from the mean picture.
    pub fn distance(&self, picture: &Picture) -> f64 {
        self.distance_of(&features(picture))
    }

    /// Is the picture plainly of another world?
    pub fn is_strange(&self, picture: &Picture) -> bool {
        let distance = self.distance(picture);
        distance.is_nan() || distance > self.limit
    }
}

/// Where row `i`, column `j ≤ i` of a lower triangle lies.
fn place(i: usize, j: usize) -> usize {
    i * (i + 1) / 2 + j
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rooms::{self, Look};

    fn room(seed: u64) -> Picture {
        let look = if seed.is_multiple_of(2) { Look::Studio } else { Look::LivedIn };
        let view = rooms::generate(seed, look, 128, 96);
        Picture::new(view.width, view.height, view.rgb)
    }

    #[test]
    fn rooms_are_familiar_and_other_pictures_are_not() {
        let samples: Vec<_> = (0..400).map(|s| features(&room(s))).collect();
        let known = Familiar::of(&samples);
        let text = serde_json::to_string(&known).unwrap();
        let read = Familiar::from_json(&text).unwrap();
        assert!((read.distance(&room(7)) - known.distance(&room(7))).abs() < 1e-9);
        let strange = (1_000..1_100).filter(|&s| known.is_strange(&room(s))).count();
        assert!(strange <= 2, "{strange} of 100 rooms");
        let drawn = |pixel: &dyn Fn(u32, u32) -> [u8; 3]| {
            let rgb = (0..96 * 128).flat_map(|i| pixel(i % 128, i / 128)).collect();
            Picture::new(128, 96, rgb)
        };
        let hash = |n: u32| (n.wrapping_mul(2_654_435_761) >> 13) as u8;
        for (name, picture) in [
            ("one colour", drawn(&|_, _| [200, 30, 30])),
            ("white", drawn(&|_, _| [255; 3])),
            ("a chessboard", drawn(&|x, y| [255 * ((x / 16 + y / 16) % 2) as u8; 3])),
            ("noise", drawn(&|x, y| [0, 1, 2].map(|c| hash(x * 3 + y * 1_009 + c)))),
        ] {
            assert!(known.is_strange(&picture), "{name}: {} of {}", known.distance(&picture), known.limit);
        }
    }
}
