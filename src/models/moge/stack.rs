//! MoGe-2's convolutional pyramid, used for the neck and for every head.
//!
//! Level by level, each twice the size of the one before: project this level's input to the
//! level's width and add it, run residual blocks, hand a resampled copy to the next level.

use crate::nn::{self, Filter, GroupNorm, conv_same, pixel_shuffle, resize, silu};
use candle_core::{D, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

/// A setting for all levels, or one for each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PerLevel<T> {
    Each(Vec<T>),
    All(T),
}

impl<T: Clone> PerLevel<T> {
    fn at(&self, level: usize) -> Result<T> {
        match self {
            Self::All(v) => Ok(v.clone()),
            Self::Each(v) => match v.get(level) {
                Some(v) => Ok(v.clone()),
                None => candle_core::bail!("moge: a list of {} settings has none for level {level}", v.len()),
            },
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// One group: over all channels and positions.
    LayerNorm,
    /// Groups of 32 channels.
    GroupNorm,
    /// Each channel alone, without weights.
    InstanceNorm,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    Relu,
    LeakyRelu,
    Silu,
    Elu,
}

/// How a level is doubled. (The class of the released code also knows shrinking kinds; no
/// released model can use them in a pyramid that grows.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resampler {
    PixelShuffle,
    Nearest,
    Bilinear,
    ConvTranspose,
}

/// One stack in the checkpoint's `model_config`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StackConfig {
    pub dim_in: PerLevel<Option<usize>>,
    pub dim_res_blocks: Vec<usize>,
    pub dim_out: PerLevel<Option<usize>>,
    pub resamplers: PerLevel<Resampler>,
    #[serde(default = "one")]
    pub dim_times_res_block_hidden: usize,
    #[serde(default = "one_each")]
    pub num_res_blocks: PerLevel<usize>,
    #[serde(default = "layer_norm")]
    pub res_block_in_norm: Norm,
    #[serde(default = "group_norm")]
    pub res_block_hidden_norm: Norm,
    #[serde(default = "relu")]
    pub activation: Activation,
}

fn one() -> usize {
    1
}
fn one_each() -> PerLevel<usize> {
    PerLevel::All(1)
}
fn layer_norm() -> Norm {
    Norm::LayerNorm
}
fn group_norm() -> Norm {
    Norm::GroupNorm
}
fn relu() -> Activation {
    Activation::Relu
}

/// A convolution that keeps the size, borders repeated.
#[derive(Clone, Debug)]
struct Conv {
    weight: Tensor,
    bias: Tensor,
}

impl Conv {
    fn new(inp: usize, out: usize, kernel: usize, vb: VarBuilder) -> Result<Self> {
        let bound = 1. / ((inp * kernel * kernel) as f64).sqrt();
        let init = Init::Uniform { lo: -bound, up: bound };
        let weight = vb.get_with_hints((out, inp, kernel, kernel), "weight", init)?;
        Ok(Self { weight, bias: vb.get_with_hints(out, "bias", init)? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        conv_same(x, &self.weight, &self.bias, false, None)
    }

    /// Of `relu(x)`, plus `plus`.
    fn forward_relu_in(&self, x: &Tensor, plus: Option<&Tensor>) -> Result<Tensor> {
        conv_same(x, &self.weight, &self.bias, true, plus)
    }
}

#[derive(Clone, Debug)]
enum Normalise {
    Group(GroupNorm),
    Instance,
}

impl Normalise {
    fn new(norm: Norm, channels: usize, vb: VarBuilder) -> Result<Option<Self>> {
        let groups = match norm {
            Norm::None => return Ok(None),
            Norm::InstanceNorm => return Ok(Some(Self::Instance)),
            Norm::LayerNorm => 1,
            Norm::GroupNorm if channels >= 32 => channels / 32,
            Norm::GroupNorm => {
                candle_core::bail!("moge: group_norm needs at least 32 channels, not {channels}")
            }
        };
        Ok(Some(Self::Group(nn::group_norm(groups, channels, 1e-5, vb)?)))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Group(n) => n.forward(x),
            Self::Instance => {
                let flat = x.flatten_from(2)?;
                let flat = flat.broadcast_sub(&flat.mean_keepdim(D::Minus1)?)?;
                let var = flat.sqr()?.mean_keepdim(D::Minus1)?;
                flat.broadcast_div(&(var + 1e-5)?.sqrt()?)?.reshape(x.shape())
            }
        }
    }
}

/// `x + conv(act(norm(conv(act(norm(x))))))`.
#[derive(Clone, Debug)]
struct ResBlock {
    norms: [Option<Normalise>; 2],
    convs: [Conv; 2],
    activation: Activation,
}

impl ResBlock {
    fn new(cfg: &StackConfig, dim: usize, vb: VarBuilder) -> Result<Self> {
        let hidden = cfg.dim_times_res_block_hidden * dim;
        let vb = vb.pp("layers");
        Ok(Self {
            norms: [
                Normalise::new(cfg.res_block_in_norm, dim, vb.pp(0))?,
                Normalise::new(cfg.res_block_hidden_norm, hidden, vb.pp(3))?,
            ],
            convs: [Conv::new(dim, hidden, 3, vb.pp(2))?, Conv::new(hidden, dim, 3, vb.pp(5))?],
            activation: cfg.activation,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut y = x.clone();
        for (i, (norm, conv)) in self.norms.iter().zip(&self.convs).enumerate() {
            if let Some(norm) = norm {
                y = norm.forward(&y)?;
            }
            y = match self.activation {
                Activation::Relu if i == 1 => return conv.forward_relu_in(&y, Some(x)),
                Activation::Relu => conv.forward_relu_in(&y, None)?,
                Activation::LeakyRelu => conv.forward(&(y.relu()? - (y.neg()?.relu()? * 0.2)?)?)?,
                Activation::Silu => conv.forward(&silu(&y)?)?,
                Activation::Elu => conv.forward(&y.elu(1.)?)?,
            };
        }
        x + y
    }
}

#[derive(Clone, Debug)]
struct Resample {
    kind: Resampler,
    expand: Option<Conv>,
    conv: Conv,
}

impl Resample {
    fn new(kind: Resampler, inp: usize, out: usize, vb: VarBuilder) -> Result<Self> {
        Ok(match kind {
            Resampler::PixelShuffle => Self {
                kind,
                expand: Some(Conv::new(inp, 4 * out, 3, vb.pp(0))?),
                conv: Conv::new(out, out, 3, vb.pp(2))?,
            },
            Resampler::Nearest | Resampler::Bilinear => {
                Self { kind, expand: None, conv: Conv::new(inp, out, 3, vb.pp(1))? }
            }
            Resampler::ConvTranspose => {
                let bound = 1. / (4. * out as f64).sqrt();
                let init = Init::Uniform { lo: -bound, up: bound };
                let v = vb.pp(0);
                let expand = Conv {
                    weight: v.get_with_hints((inp, out, 2, 2), "weight", init)?,
                    bias: v.get_with_hints(out, "bias", init)?,
                };
                Self { kind, expand: Some(expand), conv: Conv::new(out, out, 3, vb.pp(1))? }
            }
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (_, c, h, w) = x.dims4()?;
        let x = match (self.kind, &self.expand) {
            (Resampler::PixelShuffle, Some(conv)) => pixel_shuffle(&conv.forward(x)?)?,
            // A transposed convolution whose stride is its kernel is a pointwise one to four
            // sub-pixels; the kernel is stored [in, out, 2, 2].
            (_, Some(conv)) => {
                let out = conv.bias.dim(0)?;
                let weight = conv.weight.permute((1, 2, 3, 0))?.reshape((4 * out, c, 1, 1))?;
                let bias = conv.bias.unsqueeze(1)?.expand((out, 4))?.reshape(4 * out)?;
                pixel_shuffle(&conv_same(x, &weight, &bias, false, None)?)?
            }
            (Resampler::Nearest, None) => resize(x, 2 * h, 2 * w, Filter::Nearest)?,
            (_, None) => resize(x, 2 * h, 2 * w, Filter::Bilinear { antialias: false })?,
        };
        self.conv.forward(&x)
    }
}

#[derive(Clone, Debug)]
struct Level {
    input: Option<Conv>,
    blocks: Vec<ResBlock>,
    output: Option<Conv>,
    resample: Option<Resample>,
}

#[derive(Clone, Debug)]
pub struct ConvStack {
    levels: Vec<Level>,
}

impl ConvStack {
    pub fn new(cfg: &StackConfig, vb: VarBuilder) -> Result<Self> {
        let dims = &cfg.dim_res_blocks;
        let mut levels = Vec::with_capacity(dims.len());
        for (i, &dim) in dims.iter().enumerate() {
            crate::models::check_layers("moge", cfg.num_res_blocks.at(i)?)?;
            let blocks = vb.pp("res_blocks").pp(i);
            levels.push(Level {
                input: match cfg.dim_in.at(i)? {
                    Some(inp) => Some(Conv::new(inp, dim, 1, vb.pp("input_blocks").pp(i))?),
                    None => None,
                },
                blocks: (0..cfg.num_res_blocks.at(i)?)
                    .map(|j| ResBlock::new(cfg, dim, blocks.pp(j)))
                    .collect::<Result<_>>()?,
                output: match cfg.dim_out.at(i)? {
                    Some(out) => Some(Conv::new(dim, out, 1, vb.pp("output_blocks").pp(i))?),
                    None => None,
                },
                resample: match dims.get(i + 1) {
                    Some(&next) => {
                        Some(Resample::new(cfg.resamplers.at(i)?, dim, next, vb.pp("resamplers").pp(i))?)
                    }
                    None => None,
                },
            });
        }
        Ok(Self { levels })
    }

    /// One input per level, `[batch or 1, dim_in, h · 2^level, w · 2^level]`; one output per
    /// level. Inputs with batch 1 are shared by the whole batch.
    pub fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        if inputs.len() != self.levels.len() {
            candle_core::bail!("moge: {} inputs for {} levels", inputs.len(), self.levels.len())
        }
        let mut out = Vec::with_capacity(inputs.len());
        let mut carried: Option<Tensor> = None;
        for (level, input) in self.levels.iter().zip(inputs) {
            let input = match &level.input {
                Some(conv) => conv.forward(input)?,
                None => input.clone(),
            };
            let mut x = match carried {
                Some(x) if x.dim(0)? == input.dim(0)? => (x + input)?,
                Some(x) => x.broadcast_add(&input)?,
                None => input,
            };
            for block in &level.blocks {
                x = block.forward(&x)?;
            }
            out.push(match &level.output {
                Some(conv) => conv.forward(&x)?,
                None => x.clone(),
            });
            carried = match &level.resample {
                Some(r) => Some(r.forward(&x)?),
                None => None,
            };
        }
        Ok(out)
    }
}
