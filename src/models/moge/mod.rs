//! MoGe-2 (Wang et al. 2025): metric point map, depth, normals and camera from one picture.
//!
//! A DINOv2 encoder gives one grid of features and a class token. A convolutional neck and
//! heads decode the grid, to which view-plane coordinates are joined at every level, into an
//! affine point map, a mask and normals; an MLP on the class token gives the metric scale. The
//! version 2 layout only; which heads there are comes with the checkpoint's own config.
//!
//! [`MoGe::raw`] and [`MoGe::forward`] are differentiable; [`MoGe::infer`] solves for the
//! camera and is not.

pub mod camera;
mod stack;

pub use camera::{Tolerance, recover_focal_shift};
pub use stack::{Activation, ConvStack, Norm, PerLevel, Resampler, StackConfig};

use super::dinov2::{self, Dinov2, OfficialConfig};
use crate::nn::{Filter, Linear, linear, resize};
use crate::sight::Depth;
use candle_core::{D, Device, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

/// Checkpoint tensors that are never read.
pub const UNUSED: &[&str] = &["encoder.backbone.mask_token"];

const LEVELS: usize = 5;
const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// What a checkpoint says about itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    pub model_config: ModelConfig,
    /// Needed where `encoder.backbone` is not the name of a released DINOv2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backbone: Option<OfficialConfig>,
}

/// `model_config` of the released `model.pt`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    #[serde(deserialize_with = "of_version_2")]
    pub encoder: EncoderConfig,
    pub neck: StackConfig,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub points_head: Option<StackConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub normal_head: Option<StackConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask_head: Option<StackConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_head: Option<ScaleConfig>,
    #[serde(default)]
    pub remap_output: Remap,
    #[serde(default = "default_tokens")]
    pub num_tokens_range: [usize; 2],
}

/// In checkpoints of version 1 the encoder is a DINOv2's name by itself.
fn of_version_2<'de, D: serde::Deserializer<'de>>(
    encoder: D,
) -> std::result::Result<EncoderConfig, D::Error> {
    use serde::de::Error;
    match serde_json::Value::deserialize(encoder)? {
        serde_json::Value::String(name) => Err(D::Error::custom(format!(
            "this is MoGe's version 1 (encoder {name:?}), and version 2 is read: take moge-2-vits, moge-2-vitb \
             or moge-2-vitl"
        ))),
        other => EncoderConfig::deserialize(other).map_err(D::Error::custom),
    }
}

fn default_tokens() -> [usize; 2] {
    [1200, 3600]
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EncoderConfig {
    pub backbone: String,
    pub intermediate_layers: Layers,
    pub dim_out: usize,
}

/// The last so many blocks, or those with these indices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Layers {
    Last(usize),
    Listed(Vec<usize>),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScaleConfig {
    pub dims: Vec<usize>,
}

/// From the points head's three channels to a point.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Remap {
    #[default]
    Linear,
    Sinh,
    /// `(xy · e^z, e^z)`: the first two channels are the ray's slope, the third is log depth.
    Exp,
    SinhExp,
}

/// The heads' outputs at the picture's size, before any remapping.
#[derive(Clone, Debug)]
pub struct Raw {
    /// `[batch, 3, h, w]`.
    pub points: Option<Tensor>,
    /// `[batch, 3, h, w]`, not normalised.
    pub normal: Option<Tensor>,
    /// Logits `[batch, h, w]`.
    pub mask: Option<Tensor>,
    /// Natural logarithm `[batch]`.
    pub log_scale: Option<Tensor>,
}

/// What the network predicts.
#[derive(Clone, Debug)]
pub struct Output {
    /// `[batch, h, w, 3]`, up to scale and a shift along z.
    pub points: Option<Tensor>,
    /// Unit vectors `[batch, h, w, 3]`.
    pub normal: Option<Tensor>,
    /// Probabilities `[batch, h, w]`.
    pub mask: Option<Tensor>,
    /// `[batch]`.
    pub metric_scale: Option<Tensor>,
}

/// Points and camera of one picture; x right, y down, z forward.
#[derive(Clone, Debug)]
pub struct Inferred {
    pub depth: Depth,
    /// Metres, one a pixel; meaningless where the depth is not valid.
    pub points: Vec<[f32; 3]>,
    /// Unit vectors, zero where the mask excludes the pixel.
    pub normal: Option<Vec<[f32; 3]>>,
    /// Row-major, in units of the picture's width and height.
    pub intrinsics: [[f64; 3]; 3],
    /// Degrees.
    pub fov_x: f64,
}

/// How many tokens the encoder sees.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Tokens {
    Count(usize),
    /// 0 to 9: from the fewest to the most that the model was trained with.
    Level(f64),
}

#[derive(Clone, Debug)]
pub struct MoGe {
    cfg: ModelConfig,
    layers: Vec<usize>,
    backbone: Dinov2,
    projections: Vec<Linear>,
    mean: Tensor,
    std: Tensor,
    neck: ConvStack,
    points_head: Option<ConvStack>,
    normal_head: Option<ConvStack>,
    mask_head: Option<ConvStack>,
    scale_head: Option<Vec<Linear>>,
}

impl MoGe {
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let m = &cfg.model_config;
        let Some(backbone) = cfg.backbone.clone().or_else(|| OfficialConfig::released(&m.encoder.backbone))
        else {
            candle_core::bail!("moge: unknown encoder.backbone {:?}", m.encoder.backbone)
        };
        let backbone: dinov2::Config = backbone.into();
        let layers = match &m.encoder.intermediate_layers {
            Layers::Listed(l) => l.clone(),
            Layers::Last(n) => (backbone.layers.saturating_sub(*n)..backbone.layers).collect(),
        };
        if layers.is_empty() {
            candle_core::bail!("moge: encoder.intermediate_layers is empty")
        }
        let e = vb.pp("encoder");
        let (d, out) = (backbone.dim, m.encoder.dim_out);
        let bound = 1. / (d as f64).sqrt();
        let uniform = candle_nn::Init::Uniform { lo: -bound, up: bound };
        let projections = (0..layers.len())
            .map(|i| {
                let v = e.pp("output_projections").pp(i);
                let weight = v.get_with_hints((out, d, 1, 1), "weight", uniform)?.reshape((out, d))?;
                Ok(Linear::new(weight, Some(v.get_with_hints(out, "bias", uniform)?)))
            })
            .collect::<Result<_>>()?;
        // Buffers in released checkpoints, and never trained.
        let buffer = |name: &str, value: [f32; 3]| -> Result<Tensor> {
            if e.contains_tensor(name) {
                return Ok(e.get((1, 3, 1, 1), name)?.detach());
            }
            Tensor::from_slice(&value, (1, 3, 1, 1), e.device())
        };
        for stack in [Some(&m.neck), m.points_head.as_ref(), m.normal_head.as_ref(), m.mask_head.as_ref()] {
            if let Some(s) = stack
                && s.dim_res_blocks.len() != LEVELS
            {
                candle_core::bail!("moge: a stack has {} levels, expected {LEVELS}", s.dim_res_blocks.len())
            }
        }
        let head = |cfg: &Option<StackConfig>, name: &str| match cfg {
            Some(c) => Ok(Some(ConvStack::new(c, vb.pp(name))?)),
            None => Ok::<_, candle_core::Error>(None),
        };
        let scale_head = match &m.scale_head {
            None => None,
            Some(s) => Some(
                s.dims
                    .windows(2)
                    .enumerate()
                    .map(|(i, w)| linear(w[0], w[1], vb.pp("scale_head").pp(2 * i)))
                    .collect::<Result<Vec<_>>>()?,
            ),
        };
        Ok(Self {
            backbone: Dinov2::new(&backbone, e.pp("backbone"))?,
            layers,
            projections,
            mean: buffer("image_mean", IMAGENET_MEAN)?,
            std: buffer("image_std", IMAGENET_STD)?,
            neck: ConvStack::new(&m.neck, vb.pp("neck"))?,
            points_head: head(&m.points_head, "points_head")?,
            normal_head: head(&m.normal_head, "normal_head")?,
            mask_head: head(&m.mask_head, "mask_head")?,
            scale_head,
            cfg: m.clone(),
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.cfg
    }

    pub fn backbone(&self) -> &Dinov2 {
        &self.backbone
    }

    /// Rows and columns of tokens for a picture.
    pub fn grid(width: usize, height: usize, tokens: usize) -> (usize, usize) {
        let (aspect, n) = (width as f64 / height as f64, tokens as f64);
        let side = |x: f64| (x.sqrt().round_ties_even() as usize).max(1);
        (side(n / aspect), side(n * aspect))
    }

    fn token_count(&self, tokens: Tokens) -> usize {
        match tokens {
            Tokens::Count(n) => n,
            Tokens::Level(l) => {
                let [lo, hi] = self.cfg.num_tokens_range.map(|n| n as f64);
                (lo + l / 9. * (hi - lo)).max(1.) as usize
            }
        }
    }

    /// Pictures `[batch, 3, h, w]` in 0..1 → features `[batch, dim_out, rows, cols]` and the last
    /// listed layer's class token `[batch, dim]`.
    pub fn encode(&self, image: &Tensor, rows: usize, cols: usize) -> Result<(Tensor, Tensor)> {
        let (patches, cls) = self.encode_patches(image, rows, cols, None)?;
        let (b, _, d) = patches.dims3()?;
        Ok((patches.transpose(1, 2)?.reshape((b, d, rows, cols))?, cls))
    }

    /// [`Self::encode`] with features as `[batch, patches, dim_out]`: of all, row by row, or of those with the
    /// indices `kept`, the others not being looked at.
    pub fn encode_patches(
        &self,
        image: &Tensor,
        rows: usize,
        cols: usize,
        kept: Option<&[u32]>,
    ) -> Result<(Tensor, Tensor)> {
        let p = self.backbone.config().patch;
        let x = resize(image, rows * p, cols * p, Filter::Bilinear { antialias: true })?;
        let x = x.broadcast_sub(&self.mean)?.broadcast_div(&self.std)?;
        let mut sum: Option<Tensor> = None;
        let mut cls = None;
        for ((patches, c), proj) in
            self.backbone.intermediate(&x, &self.layers, kept)?.iter().zip(&self.projections)
        {
            let y = proj.forward(patches)?;
            sum = Some(match sum {
                Some(s) => (s + y)?,
                None => y,
            });
            cls = Some(c.clone());
        }
        let (Some(sum), Some(cls)) = (sum, cls) else { candle_core::bail!("moge: no encoder layer") };
        Ok((sum, cls))
    }

    /// The neck's five levels from the encoder's features.
    pub fn decode(&self, features: &Tensor, aspect: f64) -> Result<Vec<Tensor>> {
        let (b, _, rows, cols) = features.dims4()?;
        let mut inputs = Vec::with_capacity(LEVELS);
        for level in 0..LEVELS {
            let uv = view_plane_uv(rows << level, cols << level, aspect, features.device())?;
            inputs.push(match level {
                0 => Tensor::cat(&[features, &uv.expand((b, 2, rows, cols))?.contiguous()?], 1)?,
                _ => uv,
            });
        }
        self.neck.forward(&inputs)
    }

    /// Pictures `[batch, 3, h, w]` in 0..1 → the heads' outputs at the picture's size.
    pub fn raw(&self, image: &Tensor, tokens: usize) -> Result<Raw> {
        let (_, _, h, w) = image.dims4()?;
        let (rows, cols) = Self::grid(w, h, tokens);
        let (features, cls) = self.encode(image, rows, cols)?;
        self.heads(&features, &cls, w, h)
    }

    /// What the heads make of [`Self::encode`]'s features and class token, at the picture's size.
    pub fn heads(&self, features: &Tensor, cls: &Tensor, w: usize, h: usize) -> Result<Raw> {
        let levels = self.decode(features, w as f64 / h as f64)?;
        let run = |head: &Option<ConvStack>| -> Result<Option<Tensor>> {
            let Some(head) = head else { return Ok(None) };
            let top = head.forward(&levels)?.swap_remove(LEVELS - 1);
            Ok(Some(resize(&top, h, w, Filter::Bilinear { antialias: false })?))
        };
        let log_scale = match &self.scale_head {
            None => None,
            Some(mlp) => {
                let mut x = mlp[0].forward(cls)?;
                for layer in &mlp[1..] {
                    x = layer.forward(&x.relu()?)?;
                }
                Some(x.squeeze(1)?)
            }
        };
        let mask = match run(&self.mask_head)? {
            Some(m) => Some(m.squeeze(1)?),
            None => None,
        };
        Ok(Raw { points: run(&self.points_head)?, normal: run(&self.normal_head)?, mask, log_scale })
    }

    /// Pictures `[batch, 3, h, w]` in 0..1 → points, normals, mask and scale.
    pub fn forward(&self, image: &Tensor, tokens: usize) -> Result<Output> {
        let raw = self.raw(image, tokens)?;
        Ok(Output {
            points: match raw.points {
                Some(p) => Some(self.remap(&p)?.permute((0, 2, 3, 1))?.contiguous()?),
                None => None,
            },
            normal: match raw.normal {
                Some(n) => {
                    let length = (n.sqr()?.sum_keepdim(1)? + 1e-24)?.sqrt()?;
                    Some(n.broadcast_div(&length)?.permute((0, 2, 3, 1))?.contiguous()?)
                }
                None => None,
            },
            mask: match raw.mask {
                Some(m) => Some(candle_nn::ops::sigmoid(&m)?),
                None => None,
            },
            metric_scale: match raw.log_scale {
                Some(s) => Some(s.exp()?),
                None => None,
            },
        })
    }

    /// `[batch, 3, h, w]` → points `[batch, 3, h, w]`.
    pub fn remap(&self, raw: &Tensor) -> Result<Tensor> {
        let sinh = |x: &Tensor| (x.exp()? - x.neg()?.exp()?)? * 0.5;
        let (xy, z) = (raw.narrow(1, 0, 2)?, raw.narrow(1, 2, 1)?);
        match self.cfg.remap_output {
            Remap::Linear => Ok(raw.clone()),
            Remap::Sinh => sinh(raw),
            Remap::Exp => {
                let z = z.exp()?;
                Tensor::cat(&[&xy.broadcast_mul(&z)?, &z], 1)
            }
            Remap::SinhExp => Tensor::cat(&[&sinh(&xy)?, &z.exp()?], 1),
        }
    }

    /// One picture `[3, h, w]` or `[1, 3, h, w]` in 0..1. `fov_x` in degrees, if it is known.
    ///
    /// Depth and points are metric where the checkpoint has a scale head. An error if the network
    /// has no points head.
    pub fn infer(&self, image: &Tensor, tokens: Tokens, fov_x: Option<f64>) -> Result<Inferred> {
        let image = if image.rank() == 3 { image.unsqueeze(0)? } else { image.clone() };
        let (b, _, height, width) = image.dims4()?;
        if b != 1 {
            candle_core::bail!("moge: infer takes one picture, got a batch of {b}")
        }
        if fov_x.is_some_and(|f| !(f > 0. && f < 180.)) {
            candle_core::bail!("moge: a field of view of {fov_x:?} degrees is not between 0 and 180")
        }
        let out = self.forward(&image, self.token_count(tokens))?;
        let Some(points) = &out.points else { candle_core::bail!("moge: this model has no points head") };
        let affine = triples(points)?;
        let mut mask: Option<Vec<bool>> = match &out.mask {
            Some(m) => Some(m.flatten_all()?.to_vec1::<f32>()?.iter().map(|p| *p > 0.5).collect()),
            None => None,
        };
        let aspect = width as f64 / height as f64;
        let given = fov_x.map(|f| camera::focal_from_fov(f, aspect));
        let (focal, shift) =
            recover_focal_shift(&affine, mask.as_deref(), width, height, given, Tolerance::RELEASED);
        let [fx, fy] = camera::normalised_focal(focal, aspect);
        let scale = match &out.metric_scale {
            Some(s) => s.flatten_all()?.to_vec1::<f32>()?[0],
            None => 1.,
        };
        let shift = shift as f32;
        if let Some(mask) = &mut mask {
            mask.iter_mut().zip(&affine).for_each(|(m, p)| *m &= p[2] + shift > 0.);
        }
        let metres: Vec<f32> = affine.iter().map(|p| (p[2] + shift) * scale).collect();
        // Points are made anew from depth and camera, so that they lie on their pixels' rays.
        let ray = |i: usize, n: usize, f: f64| (((i as f64 + 0.5) / n as f64 - 0.5) / f) as f32;
        let points = metres
            .iter()
            .enumerate()
            .map(|(i, &z)| [z * ray(i % width, width, fx), z * ray(i / width, height, fy), z])
            .collect();
        let mut normal = match &out.normal {
            Some(n) => Some(triples(n)?),
            None => None,
        };
        if let (Some(normal), Some(mask)) = (&mut normal, &mask) {
            normal.iter_mut().zip(mask).filter(|(_, m)| !**m).for_each(|(n, _)| *n = [0.; 3]);
        }
        Ok(Inferred {
            depth: Depth::new(width, height, metres, mask.as_deref()).through([fx, fy]),
            points,
            normal,
            intrinsics: [[fx, 0., 0.5], [0., fy, 0.5], [0., 0., 1.]],
            fov_x: 2. * (0.5 / fx).atan().to_degrees(),
        })
    }
}

/// `[1, h, w, 3]` → one triple a pixel.
fn triples(t: &Tensor) -> Result<Vec<[f32; 3]>> {
    if t.dim(D::Minus1)? != 3 {
        candle_core::bail!("moge: expected triples, got {:?}", t.shape())
    }
    Ok(t.flatten_all()?.to_vec1::<f32>()?.as_chunks::<3>().0.to_vec())
}

/// View-plane coordinates of a grid of pixels `[1, 2, rows, cols]`, in units of half the diagonal
/// of a picture with this aspect ratio.
pub fn view_plane_uv(rows: usize, cols: usize, aspect: f64, device: &Device) -> Result<Tensor> {
    let [sx, sy] = camera::spans(aspect);
    let mut uv = Vec::with_capacity(2 * rows * cols);
    for _ in 0..rows {
        uv.extend((0..cols).map(|x| camera::view_plane(x, cols, sx) as f32));
    }
    for y in 0..rows {
        uv.extend(std::iter::repeat_n(camera::view_plane(y, rows, sy) as f32, cols));
    }
    Tensor::from_vec(uv, (1, 2, rows, cols), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_is_said_to_be_that() {
        // As `Ruicheng/moge-vitl` describes itself.
        let first = r#"{"model_config": {"encoder": "dinov2_vitl14", "remap_output": "exp", "split_head": true,
            "intermediate_layers": 4, "dim_upsample": [256, 128, 64], "num_res_blocks": 2}}"#;
        let e = serde_json::from_str::<Config>(first).unwrap_err().to_string();
        assert!(e.contains("version 1 (encoder \"dinov2_vitl14\")") && e.contains("moge-2-vitl"), "{e}");
        let odd = r#"{"model_config": {"encoder": {"backbone": "dinov2_vits14"}}}"#;
        let e = serde_json::from_str::<Config>(odd).unwrap_err().to_string();
        assert!(e.contains("intermediate_layers"), "{e}");
    }
}
