//! MoGe-2 as the `depth` tool.

use super::{LoadError, value};
use crate::config::{self, DepthSample};
use crate::models::moge::{self, MoGe, Tokens};
use crate::nn::resample::{Filter, resize_u8};
use crate::sight::{BBox, Depth, Picture, ToolError};
use crate::weights::ModelFiles;
use candle_core::{DType, Device, Result, Tensor};

/// Larger pictures are scaled down to this longest side first: the network sees far fewer pixels,
/// and its maps at a photograph's full size would take gigabytes.
const LONGEST: usize = 1536;

/// A loaded depth network.
pub struct DepthEstimator {
    name: String,
    net: MoGe,
    tokens: Tokens,
    mirror: bool,
    sample: DepthSample,
    device: Device,
}

impl DepthEstimator {
    /// From a folder or the embedded model: `config.json` and weights.
    pub fn load(cfg: &config::Depth, device: &Device) -> std::result::Result<Self, LoadError> {
        let files = ModelFiles::open(&cfg.model, "depth")?;
        let net_cfg: moge::Config = files.json("config.json")?;
        let net =
            files.checkpoint()?.build(DType::F32, device, moge::UNUSED, |vb| MoGe::new(&net_cfg, vb))?;
        Ok(Self {
            name: files.name(),
            net,
            tokens: match cfg.num_tokens {
                0 => Tokens::Level(9.),
                n => Tokens::Count(n),
            },
            mirror: cfg.mirror,
            sample: cfg.sample,
            device: device.clone(),
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Metric depth of the whole picture.
    pub fn estimate(&self, picture: &Picture) -> Result<Depth> {
        let (h, w) = (picture.height() as usize, picture.width() as usize);
        let scale = (LONGEST as f64 / h.max(w) as f64).min(1.);
        let to = |n: usize| ((n as f64 * scale).round() as usize).max(1);
        let size = (to(h), to(w));
        let small;
        let rgb = if size == (h, w) {
            picture.rgb()
        } else {
            small = resize_u8(picture.rgb(), (h, w), 3, size, Filter::Bilinear);
            &small
        };
        let image = Tensor::from_slice(rgb, (size.0, size.1, 3), &Device::Cpu)?;
        let image = (image.permute((2, 0, 1))?.to_dtype(DType::F32)? / 255.)?;
        let look = |image: &Tensor| {
            Ok::<_, candle_core::Error>(
                self.net.infer(&image.to_device(&self.device)?, self.tokens, None)?.depth,
            )
        };
        let depth = look(&image)?;
        Ok(match self.mirror {
            true => depth.mean_with(&look(&image.flip(&[2])?)?.mirrored()),
            false => depth,
        })
    }
}

impl DepthEstimator {
    /// Metres at a box in pixels of `picture`, whose depth this is.
    pub(super) fn read(
        &self,
        depth: &Depth,
        picture: &Picture,
        bbox: BBox,
    ) -> std::result::Result<f64, ToolError> {
        let scaled = scaled(depth, picture, bbox);
        let read = match self.sample {
            DepthSample::Center => depth.at(scaled),
            DepthSample::Median => depth.median_in(scaled),
        };
        read.map_err(|e| value(e.to_string()))
    }
}

/// A box in pixels of a picture, in those of its depth.
pub(super) fn scaled(depth: &Depth, picture: &Picture, bbox: BBox) -> BBox {
    let (x, y) = (depth.width as f64 / picture.width() as f64, depth.height as f64 / picture.height() as f64);
    [bbox[0] * x, bbox[1] * y, bbox[2] * x, bbox[3] * y]
}
