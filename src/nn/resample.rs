//! Separable antialiased resizing, as Pillow and PyTorch (`antialias=True`) do it.
//!
//! Both widen the filter by the reduction factor, take the weights at pixel centres and
//! normalise them per output pixel; they go over rows first, then columns. [`resize_u8`] follows
//! Pillow's fixed-point arithmetic bit by bit (the half-way picture is 8-bit as well);
//! [`resize_f32`] is the float form. Data, not networks: nothing here has a gradient.

use rayon::prelude::*;

/// Interpolation kernels; `Bicubic` has a = −0.5, as Pillow and PyTorch's antialiased form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    Bilinear,
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Self::Bilinear => 1.,
            Self::Bicubic => 2.,
        }
    }

    fn at(self, x: f64) -> f64 {
        let x = x.abs();
        match self {
            Self::Bilinear => (1. - x).max(0.),
            Self::Bicubic => {
                const A: f64 = -0.5;
                if x < 1. {
                    ((A + 2.) * x - (A + 3.)) * x * x + 1.
                } else if x < 2. {
                    (((x - 5.) * x + 8.) * x - 4.) * A
                } else {
                    0.
                }
            }
        }
    }
}

/// Where each output pixel looks: its first input pixel and the weights from there on.
struct Taps {
    /// `(first, start, len)`: weights are `weights[start..start + len]`.
    spans: Vec<(usize, usize, usize)>,
    weights: Vec<f64>,
}

impl Taps {
    fn new(input: usize, output: usize, filter: Filter) -> Self {
        let scale = input as f64 / output as f64;
        let widen = scale.max(1.);
        let support = filter.support() * widen;
        let mut taps = Taps { spans: Vec::with_capacity(output), weights: Vec::new() };
        for i in 0..output {
            let centre = (i as f64 + 0.5) * scale;
            let first = (centre - support + 0.5).max(0.) as usize;
            let end = ((centre + support + 0.5) as usize).min(input);
            let start = taps.weights.len();
            taps.weights.extend((first..end).map(|x| filter.at((x as f64 - centre + 0.5) / widen)));
            let sum: f64 = taps.weights[start..].iter().sum();
            if sum != 0. {
                taps.weights[start..].iter_mut().for_each(|w| *w /= sum);
            }
            taps.spans.push((first, start, end - first));
        }
        taps
    }
}

/// Pillow's fixed point: 8 bits of picture, 2 of headroom for negative lobes, the rest for weights.
const PRECISION: u32 = 32 - 8 - 2;

fn fixed(taps: &Taps) -> Vec<i32> {
    taps.weights.iter().map(|w| (w * (1i64 << PRECISION) as f64).round() as i32).collect()
}

fn clip8(x: i32) -> u8 {
    (x >> PRECISION).clamp(0, 255) as u8
}

/// Interleaved 8-bit `[height, width, channels]` → `[out_height, out_width, channels]`, equal to
/// Pillow's `Image.resize`. `size` and `to` are `(height, width)`, all at least 1.
pub fn resize_u8(
    src: &[u8],
    size: (usize, usize),
    channels: usize,
    to: (usize, usize),
    filter: Filter,
) -> Vec<u8> {
    let ((h, w), (oh, ow), c) = (size, to, channels);
    assert_eq!(src.len(), h * w * c, "picture data does not fit its size");
    assert!(h > 0 && w > 0 && oh > 0 && ow > 0, "empty picture");
    const HALF: i32 = 1 << (PRECISION - 1);
    let wide = if ow == w {
        src.to_vec()
    } else {
        let taps = Taps::new(w, ow, filter);
        let weights = fixed(&taps);
        let mut out = vec![0u8; h * ow * c];
        out.par_chunks_mut(ow * c).zip(src.par_chunks(w * c)).for_each(|(out, row)| {
            for (px, &(first, start, len)) in out.chunks_mut(c).zip(&taps.spans) {
                for (ch, v) in px.iter_mut().enumerate() {
                    let mut sum = HALF;
                    for (k, wt) in weights[start..start + len].iter().enumerate() {
                        sum += row[(first + k) * c + ch] as i32 * wt;
                    }
                    *v = clip8(sum);
                }
            }
        });
        out
    };
    if oh == h {
        return wide;
    }
    let taps = Taps::new(h, oh, filter);
    let weights = fixed(&taps);
    let mut out = vec![0u8; oh * ow * c];
    out.par_chunks_mut(ow * c).zip(&taps.spans).for_each(|(out, &(first, start, len))| {
        let mut sums = vec![HALF; ow * c];
        for (k, wt) in weights[start..start + len].iter().enumerate() {
            let row = &wide[(first + k) * ow * c..][..ow * c];
            sums.iter_mut().zip(row).for_each(|(s, &v)| *s += v as i32 * wt);
        }
        out.iter_mut().zip(sums).for_each(|(o, s)| *o = clip8(s));
    });
    out
}

/// Planar floats `[channels, height, width]` → `[channels, out_height, out_width]`, as
/// `torch.nn.functional.interpolate(…, antialias=True, align_corners=False)`.
pub fn resize_f32(
    src: &[f32],
    size: (usize, usize),
    channels: usize,
    to: (usize, usize),
    filter: Filter,
) -> Vec<f32> {
    let ((h, w), (oh, ow), c) = (size, to, channels);
    assert_eq!(src.len(), c * h * w, "picture data does not fit its size");
    assert!(h > 0 && w > 0 && oh > 0 && ow > 0, "empty picture");
    let (across, down) = (Taps::new(w, ow, filter), Taps::new(h, oh, filter));
    let across_w: Vec<f32> = across.weights.iter().map(|&w| w as f32).collect();
    let mut wide = vec![0f32; c * h * ow];
    wide.par_chunks_mut(ow).zip(src.par_chunks(w)).for_each(|(out, row)| {
        for (v, &(first, start, len)) in out.iter_mut().zip(&across.spans) {
            *v = row[first..first + len].iter().zip(&across_w[start..start + len]).map(|(a, b)| a * b).sum();
        }
    });
    let mut out = vec![0f32; c * oh * ow];
    out.par_chunks_mut(ow).enumerate().for_each(|(i, out)| {
        let (plane, y) = (i / oh, i % oh);
        let (first, start, len) = down.spans[y];
        for (k, &wt) in down.weights[start..start + len].iter().enumerate() {
            let row = &wide[(plane * h + first + k) * ow..][..ow];
            out.iter_mut().zip(row).for_each(|(o, v)| *o += v * wt as f32);
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constant_pictures_stay_constant() {
        for filter in [Filter::Bilinear, Filter::Bicubic] {
            for to in [(1, 1), (3, 29), (40, 2)] {
                assert!(resize_u8(&[77; 7 * 11 * 3], (7, 11), 3, to, filter).iter().all(|&v| v == 77));
                let f = resize_f32(&[0.3; 2 * 7 * 11], (7, 11), 2, to, filter);
                assert!(f.iter().all(|v| (v - 0.3).abs() < 1e-6));
            }
        }
    }

    #[test]
    fn halving_averages_neighbours_with_the_triangle() {
        // Output 0 sees inputs 0..3 at distances 0.25, 0.25 and 0.75 half-widths from its centre.
        let out = resize_f32(&[1., 0., 0., 0.], (1, 4), 1, (1, 2), Filter::Bilinear);
        assert!((out[0] - 0.75 / 1.75).abs() < 1e-6 && (out[1] - 0.).abs() < 1e-6, "{out:?}");
    }
}
