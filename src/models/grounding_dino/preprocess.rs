//! Pictures → the detector's input: resized, normalised, padded to one size.
//!
//! Shortest side to `shortest`, unless the longest would pass `longest`. HF and the original
//! compute that size differently (97×640 becomes 202×1333 or 202×1332); the rule comes with the
//! checkpoint's semantics. Resizing is Pillow's 8-bit bilinear, which both use (HF's torchvision
//! path differs by one 8-bit step).

use crate::nn::resample::{Filter, resize_u8};
use crate::sight::Picture;
use candle_core::{DType, Device, Result, Tensor};
use serde::Deserialize;

/// How the second side follows from the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeRule {
    Hf,
    Original,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ImageProcessor {
    /// Pixels.
    pub shortest: usize,
    pub longest: usize,
    pub rule: SizeRule,
    pub mean: [f32; 3],
    pub std: [f32; 3],
}

impl Default for ImageProcessor {
    /// The released checkpoints' values (method.md 7).
    fn default() -> Self {
        Self {
            shortest: 800,
            longest: 1333,
            rule: SizeRule::Hf,
            mean: [0.485, 0.456, 0.406],
            std: [0.229, 0.224, 0.225],
        }
    }
}

/// Pictures of one batch.
#[derive(Clone, Debug)]
pub struct PixelBatch {
    /// `[batch, 3, height, width]`, zero where padded.
    pub pixels: Tensor,
    /// `[batch, height, width]` u8: 1 where the picture is, 0 in the padding (right and bottom).
    pub mask: Tensor,
}

impl ImageProcessor {
    /// From the text of a `preprocessor_config.json`.
    pub fn from_json(json: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Size {
            shortest_edge: usize,
            longest_edge: usize,
        }
        #[derive(Deserialize)]
        struct File {
            size: Size,
            image_mean: Option<[f32; 3]>,
            image_std: Option<[f32; 3]>,
        }
        let file: File = serde_json::from_str(json)
            .map_err(|e| candle_core::Error::Msg(format!("preprocessor_config.json: {e}")))?;
        let d = Self::default();
        if file.size.shortest_edge == 0 || file.size.longest_edge < file.size.shortest_edge {
            candle_core::bail!("preprocessor_config.json: size must be 1 ≤ shortest_edge ≤ longest_edge")
        }
        Ok(Self {
            shortest: file.size.shortest_edge,
            longest: file.size.longest_edge,
            mean: file.image_mean.unwrap_or(d.mean),
            std: file.image_std.unwrap_or(d.std),
            ..d
        })
    }

    /// `(height, width)` → the size that it is resized to, each side at least 1.
    pub fn size(&self, height: usize, width: usize) -> (usize, usize) {
        let (short, long) = (height.min(width) as f64, height.max(width) as f64);
        let (mut size, mut exact) = (self.shortest as f64, self.shortest as f64);
        if long / short * size > self.longest as f64 {
            exact = self.longest as f64 * short / long;
            size = exact.round_ties_even();
        }
        if short == size {
            return (height, width);
        }
        let exact = match self.rule {
            SizeRule::Hf => exact,
            SizeRule::Original => size,
        };
        let (h, w) = (height as f64, width as f64);
        let (h, w) = if w < h { (exact * h / w, size) } else { (size, exact * w / h) };
        // Very long pictures would vanish; the original's rule even loses both sides.
        ((h as usize).max(1), (w as usize).max(1))
    }

    /// `[3, height, width]`, resized and normalised.
    pub fn apply(&self, picture: &Picture) -> Result<Tensor> {
        let (h, w) = (picture.height() as usize, picture.width() as usize);
        let to = self.size(h, w);
        self.normalise(&resize_u8(picture.rgb(), (h, w), 3, to, Filter::Bilinear), to)
    }

    /// Interleaved 8-bit RGB of `(height, width)` → `[3, height, width]`.
    pub fn normalise(&self, rgb: &[u8], (h, w): (usize, usize)) -> Result<Tensor> {
        let mut out = vec![0f32; 3 * h * w];
        for (c, plane) in out.chunks_mut(h * w).enumerate() {
            let table: [f32; 256] = std::array::from_fn(|v| (v as f32 / 255. - self.mean[c]) / self.std[c]);
            plane.iter_mut().zip(rgb[c..].iter().step_by(3)).for_each(|(o, &v)| *o = table[v as usize]);
        }
        Tensor::from_vec(out, (3, h, w), &Device::Cpu)
    }

    /// Pads `[3, h, w]` pictures right and bottom to their largest height and width.
    pub fn batch(pictures: &[Tensor]) -> Result<PixelBatch> {
        let mut size = (0, 0);
        for p in pictures {
            let (_, h, w) = p.dims3()?;
            size = (size.0.max(h), size.1.max(w));
        }
        if size.0 == 0 {
            candle_core::bail!("a batch needs at least one picture")
        }
        let pad = |t: Tensor, h: usize, w: usize| {
            t.pad_with_zeros(1, 0, size.0 - h)?.pad_with_zeros(2, 0, size.1 - w)
        };
        let (mut pixels, mut masks) = (Vec::new(), Vec::new());
        for p in pictures {
            let (_, h, w) = p.dims3()?;
            pixels.push(pad(p.clone(), h, w)?);
            masks.push(pad(Tensor::ones((1, h, w), DType::U8, p.device())?, h, w)?);
        }
        Ok(PixelBatch { pixels: Tensor::stack(&pixels, 0)?, mask: Tensor::cat(&masks, 0)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extreme_shapes_keep_both_sides() {
        for rule in [SizeRule::Hf, SizeRule::Original] {
            let p = ImageProcessor { rule, ..Default::default() };
            for (h, w) in [(1, 1), (1, 20_000), (20_000, 1), (3, 20_000), (20_000, 20_000)] {
                let (oh, ow) = p.size(h, w);
                assert!(oh >= 1 && ow >= 1 && oh <= 1333 && ow <= 1333, "{rule:?} {h}×{w}: {oh}×{ow}");
            }
        }
    }

    #[test]
    fn one_pixel_is_a_picture() -> Result<()> {
        let x = ImageProcessor::default().apply(&Picture::new(1, 1, vec![255, 0, 0]))?;
        assert_eq!(x.dims(), [3, 800, 800]);
        Ok(())
    }
}
