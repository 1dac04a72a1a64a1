//! Errors of metric depth against exact depth.

use crate::sight::Depth;

/// Mean of `|predicted − true| / true` over the pixels where the truth is known; a pixel
/// without a valid prediction counts as wholly wrong (1).
pub fn abs_rel(predicted: &Depth, truth: &[f32]) -> f64 {
    let (mut sum, mut n) = (0., 0usize);
    for ((p, ok), t) in predicted.metres.iter().zip(&predicted.valid).zip(truth) {
        if t.is_finite() && *t > 0. {
            sum += if *ok { ((p - t).abs() / t) as f64 } else { 1. };
            n += 1;
        }
    }
    sum / n.max(1) as f64
}

/// The predicted map after scaling it by the median of true over predicted: about what remains of
/// [`abs_rel`] when the metric scale is right.
pub fn abs_rel_aligned(predicted: &Depth, truth: &[f32]) -> f64 {
    let known = |t: f32| t.is_finite() && t > 0.;
    let mut ratios: Vec<f32> = (predicted.metres.iter().zip(&predicted.valid).zip(truth))
        .filter(|((_, ok), t)| **ok && known(**t))
        .map(|((p, _), t)| t / p)
        .collect();
    if ratios.is_empty() {
        return 1.;
    }
    let middle = ratios.len() / 2;
    let s = *ratios.select_nth_unstable_by(middle, f32::total_cmp).1;
    let mut scaled = predicted.clone();
    scaled.metres.iter_mut().for_each(|z| *z *= s);
    abs_rel(&scaled, truth)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn abs_rel_counts_missing_pixels_as_wrong() {
        let d = Depth::new(2, 1, vec![1.1, f32::NAN], None);
        assert!((abs_rel(&d, &[1., 2.]) - 0.55).abs() < 1e-6);
        let d = Depth::new(2, 1, vec![2., 4.], None);
        assert!(abs_rel_aligned(&d, &[1., 2.]) < 1e-6 && abs_rel(&d, &[1., 2.]) == 1.);
        assert!((abs_rel(&d, &[2., f32::INFINITY])) < 1e-6);
    }
}
