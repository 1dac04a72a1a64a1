//! Metric depth of one picture, and the `depth` tool's reading of it.

/// The picture has no usable depth where it was asked for.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum DepthError {
    #[error("no valid depth inside the box [{0}, {1}, {2}, {3}]")]
    NothingValid(f64, f64, f64, f64),
    #[error("the box [{0}, {1}, {2}, {3}] is not four finite numbers")]
    NotFinite(f64, f64, f64, f64),
}

/// Depth along the optical axis, one value a pixel, row-major.
#[derive(Clone, Debug)]
pub struct Depth {
    pub width: usize,
    pub height: usize,
    /// Metres; meaningless where `valid` is false.
    pub metres: Vec<f32>,
    /// Inside the predicted mask, finite and in front of the camera.
    pub valid: Vec<bool>,
}

impl Depth {
    /// `mask`, where there is one, says which pixels the network vouches for.
    pub fn new(width: usize, height: usize, metres: Vec<f32>, mask: Option<&[bool]>) -> Self {
        let ok = |(i, z): (usize, &f32)| z.is_finite() && *z > 0. && mask.is_none_or(|m| m[i]);
        let valid = metres.iter().enumerate().map(ok).collect();
        Self { width, height, metres, valid }
    }

    /// Metres at the centre of a box in pixels, as the paper samples it; where that pixel is not
    /// valid, the median over the box's valid pixels. Boxes are clipped to the picture.
    pub fn at(&self, bbox: [f64; 4]) -> Result<f64, DepthError> {
        let [x1, y1, x2, y2] = bbox;
        if bbox.iter().any(|v| !v.is_finite()) {
            return Err(DepthError::NotFinite(x1, y1, x2, y2));
        }
        let pixel = |v: f64, n: usize| (v.floor().max(0.) as usize).min(n - 1);
        let middle = |a: f64, b: f64, n: usize| pixel((a + b) / 2., n);
        let centre = middle(y1, y2, self.height) * self.width + middle(x1, x2, self.width);
        if self.valid[centre] {
            return Ok(self.metres[centre] as f64);
        }
        self.median_in(bbox)
    }

    /// The median over a box's valid pixels.
    pub fn median_in(&self, bbox: [f64; 4]) -> Result<f64, DepthError> {
        let [x1, y1, x2, y2] = bbox;
        if bbox.iter().any(|v| !v.is_finite()) {
            return Err(DepthError::NotFinite(x1, y1, x2, y2));
        }
        let pixel = |v: f64, n: usize| (v.floor().max(0.) as usize).min(n - 1);
        // x2 and y2 are exclusive.
        let range = |a: f64, b: f64, n: usize| {
            let (a, b) = (a.min(b), a.max(b));
            pixel(a, n)..(b.ceil().clamp(0., n as f64) as usize)
        };
        let mut inside = Vec::new();
        for y in range(y1, y2, self.height) {
            for x in range(x1, x2, self.width) {
                let i = y * self.width + x;
                if self.valid[i] {
                    inside.push(self.metres[i]);
                }
            }
        }
        if inside.is_empty() {
            return Err(DepthError::NothingValid(x1, y1, x2, y2));
        }
        let middle = inside.len() / 2;
        Ok(*inside.select_nth_unstable_by(middle, f32::total_cmp).1 as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(mask: Option<&[bool]>) -> Depth {
        Depth::new(4, 3, (0..12).map(|i| 1. + i as f32).collect(), mask)
    }

    #[test]
    fn the_centre_counts_and_boxes_are_clipped() {
        let d = ramp(None);
        assert_eq!(d.at([0., 0., 2., 2.]), Ok(6.));
        assert_eq!(d.at([-9., -9., -5., -5.]), Ok(1.));
        assert_eq!(d.at([1e9, 1e9, 2e9, 2e9]), Ok(12.));
        assert_eq!(d.at([2., 1., 2., 1.]), Ok(7.), "an empty box still has a centre");
        assert!(matches!(d.at([0., f64::NAN, 1., 1.]), Err(DepthError::NotFinite(..))));
    }

    #[test]
    fn an_invalid_centre_gives_the_median_of_what_is_valid() {
        let mut mask = [true; 12];
        mask[5] = false;
        // Pixels 0, 1, 4 of the 2×2 box remain: 1, 2 and 5 metres.
        assert_eq!(ramp(Some(&mask)).at([0., 0., 2., 2.]), Ok(2.));
        assert_eq!(ramp(Some(&mask)).median_in([0., 0., 2., 2.]), Ok(2.));
        assert_eq!(ramp(None).median_in([0., 0., 3., 2.]), Ok(5.), "of 1, 2, 3, 5, 6 and 7");
        let none = ramp(Some(&[false; 12]));
        assert!(matches!(none.at([0., 0., 2., 2.]), Err(DepthError::NothingValid(..))));
    }

    #[test]
    fn what_is_not_finite_or_not_in_front_is_not_valid() {
        let d = Depth::new(2, 2, vec![f32::INFINITY, f32::NAN, -1., 3.], None);
        assert_eq!(d.valid, [false, false, false, true]);
        assert_eq!(d.at([0., 0., 2., 2.]), Ok(3.));
        assert!(d.at([0., 0., 1., 1.]).is_err());
    }
}
