//! Pictures with boxes, turned and cut at random for detector training (method.md 6).
//!
//! Horizontal flip; with some probability a crop; then a resize to a size drawn from a list. Boxes
//! follow; what a crop leaves too little of becomes an ignore region, so that a stump is neither
//! asked for nor punished. Nouns with "left" or "right" in them are not understood: leave the
//! flip off where there are any.

use crate::models::grounding_dino::preprocess::ImageProcessor;
use crate::nn::resample::{Filter, resize_u8};
use crate::sight::{BBox, Picture};
use candle_core::{Result, Tensor};
use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Augment {
    /// Probability of a horizontal flip.
    pub flip: f64,
    pub crop: Option<Crop>,
    /// Shortest sides in pixels, one drawn per picture; the longest is the image processor's.
    pub sizes: Vec<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Crop {
    pub probability: f64,
    /// Smallest share of each side that is kept.
    pub least: f64,
    /// Cut both sides by the same share, so that batches need no padding.
    pub keep_aspect: bool,
}

impl Default for Augment {
    /// The paper's: shortest side 480…800 step 32; crops from 384/600 of a side.
    fn default() -> Self {
        Self {
            flip: 0.5,
            crop: Some(Crop { probability: 0.5, least: 0.64, keep_aspect: false }),
            sizes: (480..=800).step_by(32).collect(),
        }
    }
}

/// A thing that keeps less of its box than this after a crop is ignored.
const LEAST_VISIBLE: f64 = 0.4;

/// A picture ready for the network.
#[derive(Clone, Debug)]
pub struct Framed {
    /// `[3, height, width]`, normalised.
    pub pixels: Tensor,
    /// Index into the boxes that went in, and `(cx, cy, w, h)` in 0…1.
    pub boxes: Vec<(usize, [f32; 4])>,
    pub ignore: Vec<[f32; 4]>,
}

impl Augment {
    /// No randomness: the picture at the processor's own size.
    pub fn none(processor: &ImageProcessor) -> Self {
        Self { flip: 0., crop: None, sizes: vec![processor.shortest] }
    }

    pub fn apply(
        &self,
        picture: &Picture,
        boxes: &[BBox],
        ignore: &[BBox],
        processor: &ImageProcessor,
        rng: &mut ChaCha8Rng,
    ) -> Result<Framed> {
        // Everything is drawn whether it is used or not: switching one part off keeps the others.
        let flip = rng.random::<f64>() < self.flip;
        let Some(&shortest) = self.sizes.choose(rng) else {
            candle_core::bail!("augmentation without sizes")
        };
        let window = self.window(picture, rng);
        let cut;
        let source = match window {
            Some(w) => {
                cut = picture.crop(w);
                &cut
            }
            None => picture,
        };
        let [x0, y0] = window.map_or([0., 0.], |w| [w[0], w[1]]);
        let (width, height) = (source.width() as f64, source.height() as f64);
        let place = |b: &BBox| -> Option<([f32; 4], f64)> {
            let clip = [
                (b[0] - x0).clamp(0., width),
                (b[1] - y0).clamp(0., height),
                (b[2] - x0).clamp(0., width),
                (b[3] - y0).clamp(0., height),
            ];
            let (w, h) = (clip[2] - clip[0], clip[3] - clip[1]);
            let whole = (b[2] - b[0]) * (b[3] - b[1]);
            if w < 1. || h < 1. || whole <= 0. {
                return None;
            }
            let cx = (clip[0] + clip[2]) / 2. / width;
            let cx = if flip { 1. - cx } else { cx };
            let cy = (clip[1] + clip[3]) / 2. / height;
            Some(([cx as f32, cy as f32, (w / width) as f32, (h / height) as f32], w * h / whole))
        };
        let mut out_boxes = Vec::new();
        let mut out_ignore: Vec<[f32; 4]> = ignore.iter().filter_map(place).map(|(b, _)| b).collect();
        for (i, b) in boxes.iter().enumerate() {
            match place(b) {
                Some((b, visible)) if visible >= LEAST_VISIBLE => out_boxes.push((i, b)),
                Some((b, _)) => out_ignore.push(b),
                None => {}
            }
        }
        let size = (source.height() as usize, source.width() as usize);
        // Cut to whole pixels, a window of the picture's shape is not exactly of its shape.
        let shape = match self.crop {
            Some(Crop { keep_aspect: true, .. }) => picture,
            _ => source,
        };
        let to = ImageProcessor { shortest, ..processor.clone() }
            .size(shape.height() as usize, shape.width() as usize);
        let mut rgb = resize_u8(source.rgb(), size, 3, to, Filter::Bilinear);
        if flip {
            rgb.chunks_mut(to.1 * 3).for_each(mirror);
        }
        Ok(Framed { pixels: processor.normalise(&rgb, to)?, boxes: out_boxes, ignore: out_ignore })
    }

    /// The crop's window in whole pixels.
    fn window(&self, picture: &Picture, rng: &mut ChaCha8Rng) -> Option<BBox> {
        let crop = self.crop?;
        let used = rng.random::<f64>() < crop.probability;
        let share = |rng: &mut ChaCha8Rng| crop.least + (1. - crop.least) * rng.random::<f64>();
        let (a, b) = (share(rng), share(rng));
        let b = if crop.keep_aspect { a } else { b };
        let span = |n: u32, share: f64, at: f64| {
            let len = (n as f64 * share).round().clamp(1., n as f64);
            let from = ((n as f64 - len) * at).round();
            (from, from + len)
        };
        let (x1, x2) = span(picture.width(), a, rng.random());
        let (y1, y2) = span(picture.height(), b, rng.random());
        used.then_some([x1, y1, x2, y2])
    }
}

fn mirror(row: &mut [u8]) {
    let n = row.len() / 3;
    for i in 0..n / 2 {
        for c in 0..3 {
            row.swap(i * 3 + c, (n - 1 - i) * 3 + c);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    /// A black picture with a white rectangle.
    fn picture(b: [usize; 4]) -> Picture {
        let mut rgb = vec![0u8; 40 * 30 * 3];
        for y in b[1]..b[3] {
            rgb[(y * 40 + b[0]) * 3..(y * 40 + b[2]) * 3].fill(255);
        }
        Picture::new(40, 30, rgb)
    }

    fn processor() -> ImageProcessor {
        ImageProcessor { shortest: 30, longest: 40, mean: [0.; 3], std: [1.; 3], ..Default::default() }
    }

    #[test]
    fn boxes_follow_the_picture() -> Result<()> {
        let b = [8usize, 6, 20, 18];
        let crop = Some(Crop { probability: 0.7, least: 0.6, keep_aspect: false });
        let a = Augment { flip: 0.5, crop, sizes: vec![60, 90] };
        let mut seen = 0;
        for seed in 0..40 {
            let bbox = b.map(|v| v as f64);
            let p = ImageProcessor { longest: 400, ..processor() };
            let f = a.apply(&picture(b), &[bbox], &[], &p, &mut ChaCha8Rng::seed_from_u64(seed))?;
            let Some((0, [cx, cy, w, h])) = f.boxes.first().copied() else { continue };
            seen += 1;
            // The white pixels' centre and extent are the box's.
            let (_, rows, cols) = f.pixels.dims3()?;
            let px = f.pixels.get(0)?.to_vec2::<f32>()?;
            let (mut sum, mut sx, mut sy) = (0f64, 0f64, 0f64);
            for (y, row) in px.iter().enumerate() {
                for (x, &v) in row.iter().enumerate() {
                    sum += v as f64;
                    sx += v as f64 * (x as f64 + 0.5);
                    sy += v as f64 * (y as f64 + 0.5);
                }
            }
            let area = sum / (rows * cols) as f64;
            assert!((area - (w * h) as f64).abs() < 0.03 * area.max(0.05), "seed {seed}: area");
            assert!((sx / sum / cols as f64 - cx as f64).abs() < 0.01, "seed {seed}: cx");
            assert!((sy / sum / rows as f64 - cy as f64).abs() < 0.01, "seed {seed}: cy");
        }
        assert!(seen > 25);
        Ok(())
    }

    #[test]
    fn what_a_crop_cuts_off_is_ignored_not_missed() -> Result<()> {
        let a = Augment {
            flip: 0.,
            crop: Some(Crop { probability: 1., least: 0.5, keep_aspect: true }),
            sizes: vec![30],
        };
        let (mut stumps, mut kept) = (0, 0);
        for seed in 0..60 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let bbox = [0., 0., 10., 30.];
            let f = a.apply(&picture([0, 0, 10, 30]), &[bbox], &[], &processor(), &mut rng)?;
            assert_eq!(f.pixels.dims(), [3, 30, 40], "keep_aspect needs no padding");
            stumps += f.ignore.len();
            kept += f.boxes.len();
            assert!(f.ignore.len() + f.boxes.len() <= 1);
        }
        assert!(stumps > 5 && kept > 5, "{stumps} stumps, {kept} kept");
        Ok(())
    }
}
