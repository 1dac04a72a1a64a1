//! Pictures to patches, as Qwen2-VL's and Qwen3-VL's image processor (the Pillow one) does it:
//! resized to multiples of the merged patch within a budget of pixels, normalised, cut in merge order.

use super::vision::Grid;
use crate::nn::resample::{self, Filter};
use crate::sight::picture::MAX_ASPECT;
use candle_core::{Device, Result, Tensor};
use image::RgbImage;
use serde::{Deserialize, Serialize};

/// `preprocessor_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RawProcessor", into = "RawProcessor")]
pub struct Processor {
    pub patch_size: usize,
    pub temporal_patch_size: usize,
    pub merge_size: usize,
    pub image_mean: [f32; 3],
    pub image_std: [f32; 3],
    pub min_pixels: usize,
    pub max_pixels: usize,
}

#[derive(Serialize, Deserialize)]
struct RawProcessor {
    patch_size: usize,
    temporal_patch_size: usize,
    merge_size: usize,
    image_mean: [f32; 3],
    image_std: [f32; 3],
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<RawSize>,
    #[serde(skip_serializing)]
    min_pixels: Option<usize>,
    #[serde(skip_serializing)]
    max_pixels: Option<usize>,
}

/// Names notwithstanding, these are areas.
#[derive(Serialize, Deserialize)]
struct RawSize {
    shortest_edge: usize,
    longest_edge: usize,
}

impl TryFrom<RawProcessor> for Processor {
    type Error = String;

    fn try_from(r: RawProcessor) -> std::result::Result<Self, String> {
        let (min, max) = (r.min_pixels, r.max_pixels);
        let min_pixels = r.size.as_ref().map(|s| s.shortest_edge).or(min);
        let max_pixels = r.size.as_ref().map(|s| s.longest_edge).or(max);
        let (Some(min_pixels), Some(max_pixels)) = (min_pixels, max_pixels) else {
            return Err("neither size.shortest_edge and .longest_edge nor min_pixels and max_pixels".into());
        };
        let factor = r.patch_size * r.merge_size;
        if factor == 0 || r.temporal_patch_size == 0 || r.image_std.contains(&0.) {
            return Err("patch_size, merge_size, temporal_patch_size and image_std must not be 0".into());
        }
        if max_pixels < factor * factor || min_pixels > max_pixels {
            return Err(format!(
                "no picture has between {min_pixels} and {max_pixels} pixels in steps of {factor}"
            ));
        }
        Ok(Self {
            patch_size: r.patch_size,
            temporal_patch_size: r.temporal_patch_size,
            merge_size: r.merge_size,
            image_mean: r.image_mean,
            image_std: r.image_std,
            min_pixels,
            max_pixels,
        })
    }
}

impl From<Processor> for RawProcessor {
    fn from(p: Processor) -> Self {
        Self {
            patch_size: p.patch_size,
            temporal_patch_size: p.temporal_patch_size,
            merge_size: p.merge_size,
            image_mean: p.image_mean,
            image_std: p.image_std,
            size: Some(RawSize { shortest_edge: p.min_pixels, longest_edge: p.max_pixels }),
            min_pixels: None,
            max_pixels: None,
        }
    }
}

/// Processed pictures, one after the other.
#[derive(Clone, Debug)]
pub struct Pictures {
    /// `[patches, channels · frames · side · side]`, f32.
    pub patches: Tensor,
    pub grids: Vec<Grid>,
}

impl Pictures {
    /// Several sets of pictures as one.
    pub fn cat(parts: &[&Pictures]) -> Result<Self> {
        Ok(Self {
            patches: Tensor::cat(&parts.iter().map(|p| &p.patches).collect::<Vec<_>>(), 0)?,
            grids: parts.iter().flat_map(|p| p.grids.iter().copied()).collect(),
        })
    }
}

impl Processor {
    /// The size, `(height, width)`, that a picture of this size is resized to.
    pub fn target_size(&self, height: usize, width: usize) -> Result<(usize, usize)> {
        let (h, w) = (height as f64, width as f64);
        if height == 0 || width == 0 {
            candle_core::bail!("a picture of {width}×{height} pixels is empty")
        }
        // A crop of a picture may be longer than any picture that opens.
        if h.max(w) / h.min(w) > f64::from(MAX_ASPECT) {
            candle_core::bail!("a picture of {width}×{height} pixels is too long: {MAX_ASPECT} to 1 at most")
        }
        let factor = (self.patch_size * self.merge_size) as f64;
        let area = h * w;
        let snap = |scaled: &dyn Fn(f64) -> f64, round: fn(f64) -> f64| {
            let side = |x: f64| round(scaled(x) / factor) * factor;
            (side(h), side(w))
        };
        // A side of less than half a patch is none at first, as in HF's code, and the picture one that is too small.
        let (mut oh, mut ow) = snap(&|x| x, f64::round_ties_even);
        // In HF's order of operations: a side may come out a hair below a whole number of patches.
        if oh * ow > self.max_pixels as f64 {
            let beta = (area / self.max_pixels as f64).sqrt();
            (oh, ow) = snap(&|x| x / beta, f64::floor);
        } else if oh * ow < self.min_pixels as f64 {
            let beta = (self.min_pixels as f64 / area).sqrt();
            (oh, ow) = snap(&|x| x * beta, f64::ceil);
        }
        Ok((oh.max(factor) as usize, ow.max(factor) as usize))
    }

    /// Resizes (bicubic, antialiased, 8 bits), normalises and cuts into patches.
    pub fn process(&self, images: &[RgbImage], device: &Device) -> Result<Pictures> {
        let (p, m) = (self.patch_size, self.merge_size);
        let len = 3 * self.temporal_patch_size * p * p;
        let mut patches: Vec<f32> = Vec::new();
        let mut grids = Vec::with_capacity(images.len());
        for image in images {
            let (w, h) = (image.width() as usize, image.height() as usize);
            let (oh, ow) = self.target_size(h, w)?;
            let pixels = resample::resize_u8(image.as_raw(), (h, w), 3, (oh, ow), Filter::Bicubic);
            let (gh, gw) = (oh / p, ow / p);
            patches.reserve(gh * gw * len);
            for (by, bx) in (0..gh / m).flat_map(|y| (0..gw / m).map(move |x| (y, x))) {
                for (y, x) in (0..m).flat_map(|y| (0..m).map(move |x| (y, x))) {
                    let corner = ((by * m + y) * p * ow + (bx * m + x) * p) * 3;
                    self.cut(&pixels[corner..], ow, &mut patches);
                }
            }
            grids.push([1, gh, gw]);
        }
        let patches = Tensor::from_vec(patches, ((), len), device)?;
        Ok(Pictures { patches, grids })
    }

    /// One patch from its upper left pixel on, channels first; the still picture fills all frames.
    fn cut(&self, pixels: &[u8], width: usize, out: &mut Vec<f32>) {
        let p = self.patch_size;
        for c in 0..3 {
            let (mean, std) = (self.image_mean[c], self.image_std[c]);
            for _ in 0..self.temporal_patch_size {
                for y in 0..p {
                    let row = pixels[y * width * 3..].iter().skip(c).step_by(3).take(p);
                    out.extend(row.map(|v| (*v as f32 / 255. - mean) / std));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processor() -> Processor {
        serde_json::from_str(
            r#"{"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5], "size": {"shortest_edge": 65536, "longest_edge": 16777216}}"#,
        )
        .unwrap()
    }

    #[test]
    fn sizes_snap_to_the_grid_within_the_budget() {
        let p = processor();
        // 1000 / 32 = 31.25 and 720 / 32 = 22.5, which rounds to even.
        assert_eq!(p.target_size(720, 1000).unwrap(), (704, 992));
        for (h, w) in [(1, 1), (1, 200), (33, 4000), (20_000, 20_000), (97, 640), (1080, 1920)] {
            let (oh, ow) = p.target_size(h, w).unwrap();
            assert!(oh % 32 == 0 && ow % 32 == 0 && oh > 0 && ow > 0);
            assert!(oh * ow >= p.min_pixels && oh * ow <= p.max_pixels, "{h}×{w} → {oh}×{ow}");
        }
        // A hair below a whole number, had the side been multiplied by the inverse.
        assert_eq!(p.target_size(4237, 4237).unwrap(), (4096, 4096));
        // As HF's smart_resize: less than half a patch of height is none, so the picture is enlarged.
        assert_eq!(p.target_size(15, 3000).unwrap(), (32, 3648));
        assert!(p.target_size(1, 201).is_err());
        assert!(p.target_size(0, 5).is_err());
    }

    #[test]
    fn patches_come_in_merge_order_channels_first() {
        let p = Processor { min_pixels: 32 * 32, ..processor() };
        // Each 16×16 patch has its own red; no resize happens.
        let image = RgbImage::from_fn(64, 64, |x, y| image::Rgb([(y / 16 * 4 + x / 16) as u8 * 10, 0, 255]));
        let pics = p.process(&[image], &Device::Cpu).unwrap();
        assert_eq!(pics.grids, [[1, 4, 4]]);
        let rows = pics.patches.to_vec2::<f32>().unwrap();
        let red = |v: f32| ((v * 0.5 + 0.5) * 25.5).round() as u32;
        let order: Vec<u32> = rows.iter().map(|r| red(r[0])).collect();
        assert_eq!(order, [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]);
        assert!(rows[0][512..1024].iter().all(|v| *v == -1.) && rows[0][1024..].iter().all(|v| *v == 1.));
    }

    #[test]
    fn a_processor_without_sizes_is_refused() {
        let e = serde_json::from_str::<Processor>(
            r#"{"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}"#,
        );
        assert!(e.unwrap_err().to_string().contains("longest_edge"));
    }
}
