//! Metric depth of one picture, and the `depth` tool's reading of it.

/// The picture has no usable depth where it was asked for.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum DepthError {
    #[error("no valid depth inside the box [{0}, {1}, {2}, {3}]")]
    NothingValid(f64, f64, f64, f64),
    #[error("the box [{0}, {1}, {2}, {3}] is not four finite numbers")]
    NotFinite(f64, f64, f64, f64),
    #[error("the camera of this depth is not known")]
    NoCamera,
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
    /// Focal lengths in units of the map's width and height, where the camera is known.
    pub focal: Option<[f64; 2]>,
}

/// Pixels whose depth is off the box's own by more than this share of it show something else.
const SAME_THING: f64 = 0.2;

/// Share of the points at each end of an extent that are taken for strays.
const STRAYS: f64 = 0.02;

impl Depth {
    /// `mask`, where there is one, says which pixels the network vouches for.
    pub fn new(width: usize, height: usize, metres: Vec<f32>, mask: Option<&[bool]>) -> Self {
        let ok = |(i, z): (usize, &f32)| z.is_finite() && *z > 0. && mask.is_none_or(|m| m[i]);
        let valid = metres.iter().enumerate().map(ok).collect();
        Self { width, height, metres, valid, focal: None }
    }

    /// Of the picture's mirror image.
    pub fn mirrored(mut self) -> Self {
        self.metres.chunks_mut(self.width).for_each(<[f32]>::reverse);
        self.valid.chunks_mut(self.width).for_each(<[bool]>::reverse);
        self
    }

    /// The geometric mean with another depth of the same picture, for distances are known up to a factor; where one
    /// of them knows nothing, the other.
    pub fn mean_with(mut self, other: &Self) -> Self {
        for (i, z) in self.metres.iter_mut().enumerate() {
            match (self.valid[i], other.valid[i]) {
                (true, true) => *z = (*z * other.metres[i]).sqrt(),
                (false, true) => *z = other.metres[i],
                _ => {}
            }
            self.valid[i] |= other.valid[i];
        }
        if let (Some(a), Some(b)) = (&mut self.focal, other.focal) {
            a.iter_mut().zip(b).for_each(|(a, b)| *a = (*a * b).sqrt());
        }
        self
    }

    /// As seen through a camera with these focal lengths, in units of the map's width and height.
    pub fn through(self, focal: [f64; 2]) -> Self {
        Self { focal: Some(focal), ..self }
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

    /// The middle of a box in space: metres to the right of the camera, below it, and before it.
    pub fn point_at(&self, bbox: [f64; 4]) -> Result<[f64; 3], DepthError> {
        let z = self.at(bbox)?;
        let middle = |a: f64, b: f64, n: usize| ((a + b) / 2.).clamp(0., n as f64);
        self.point(middle(bbox[0], bbox[2], self.width), middle(bbox[1], bbox[3], self.height), z)
    }

    /// How wide, high and deep what a box shows is, in metres along the camera's axes: the extent of the
    /// points whose depth is about the median's, without strays. Of its depth only the side that is seen.
    pub fn size_in(&self, bbox: [f64; 4]) -> Result<[f64; 3], DepthError> {
        let z = self.median_in(bbox)?;
        let mut along: [Vec<f64>; 3] = Default::default();
        for i in self.inside(bbox)?.filter(|&i| (f64::from(self.metres[i]) / z - 1.).abs() < SAME_THING) {
            let (x, y) = ((i % self.width) as f64 + 0.5, (i / self.width) as f64 + 0.5);
            let point = self.point(x, y, self.metres[i].into())?;
            along.iter_mut().zip(point).for_each(|(all, p)| all.push(p));
        }
        Ok(along.map(|mut all| {
            all.sort_unstable_by(f64::total_cmp);
            let strays = (STRAYS * all.len() as f64) as usize;
            all[all.len() - 1 - strays] - all[strays]
        }))
    }

    fn point(&self, x: f64, y: f64, z: f64) -> Result<[f64; 3], DepthError> {
        let [fx, fy] = self.focal.ok_or(DepthError::NoCamera)?;
        Ok([z * (x / self.width as f64 - 0.5) / fx, z * (y / self.height as f64 - 0.5) / fy, z])
    }

    /// The valid pixels in a box.
    fn inside(&self, bbox: [f64; 4]) -> Result<impl Iterator<Item = usize>, DepthError> {
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
        let (rows, cols) = (range(y1, y2, self.height), range(x1, x2, self.width));
        Ok(rows.flat_map(move |y| cols.clone().map(move |x| y * self.width + x)).filter(|&i| self.valid[i]))
    }

    /// The median over a box's valid pixels.
    pub fn median_in(&self, bbox: [f64; 4]) -> Result<f64, DepthError> {
        let mut inside: Vec<f32> = self.inside(bbox)?.map(|i| self.metres[i]).collect();
        if inside.is_empty() {
            let [x1, y1, x2, y2] = bbox;
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
    fn a_mirrored_picture_has_its_say() {
        let mirrored = ramp(None).mirrored();
        assert_eq!((mirrored.metres[0], mirrored.metres[3], mirrored.metres[11]), (4., 1., 9.));
        let both = ramp(None).through([1., 4.]).mean_with(&mirrored.clone().through([4., 1.]));
        assert_eq!((both.metres[0], both.metres[3], both.focal), (2., 2., Some([2., 2.])));
        assert_eq!(ramp(None).mean_with(&ramp(None).mirrored().mirrored()).metres, ramp(None).metres);
        let mut mask = [true; 12];
        (mask[0], mask[1]) = (false, false);
        let mut known = [true; 12];
        known[1] = false;
        let one = ramp(Some(&mask)).mean_with(&Depth::new(4, 3, vec![8.; 12], Some(&known)));
        assert_eq!((one.metres[0], &one.valid[..3]), (8., &[true, false, true][..]));
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

    /// A board of 1 m × 0.5 m at 2 m, before a wall at 5 m, through a lens of 90°.
    #[test]
    fn sizes_are_of_the_thing_and_not_of_the_wall_behind_it() {
        let (w, h) = (80, 60);
        let f = w as f64 / 2.;
        let is_board = |i: usize| {
            let (x, y) = ((i % w) as f64 + 0.5 - 40., (i / w) as f64 + 0.5 - 30.);
            (x * 2. / f).abs() <= 0.5 && (y * 2. / f).abs() <= 0.25
        };
        let metres = (0..w * h).map(|i| if is_board(i) { 2. } else { 5. }).collect();
        let depth = Depth::new(w, h, metres, None);
        let bbox = [28., 23., 52., 37.];
        assert_eq!(depth.size_in(bbox), Err(DepthError::NoCamera));
        let depth = depth.through([f / w as f64, f / h as f64]);
        let [wide, high, deep] = depth.size_in(bbox).unwrap();
        assert!((wide - 1.).abs() < 0.06 && (high - 0.5).abs() < 0.06 && deep == 0., "{wide} {high} {deep}");
        assert_eq!(depth.point_at([38., 28., 42., 32.]), Ok([0., 0., 2.]));
        let [x, y, z] = depth.point_at([60., 50., 80., 60.]).unwrap();
        assert!((x - 5. * 30. / f).abs() < 1e-9 && (y - 5. * 25. / f).abs() < 1e-9 && z == 5.);
    }

    #[test]
    fn what_is_not_finite_or_not_in_front_is_not_valid() {
        let d = Depth::new(2, 2, vec![f32::INFINITY, f32::NAN, -1., 3.], None);
        assert_eq!(d.valid, [false, false, false, true]);
        assert_eq!(d.at([0., 0., 2., 2.]), Ok(3.));
        assert!(d.at([0., 0., 1., 1.]).is_err());
    }
}
