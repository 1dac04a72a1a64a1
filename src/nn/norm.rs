//! Normalisation layers.

use candle_core::{D, Result, Tensor};
use candle_nn::VarBuilder;

/// LayerNorm over the last dimension (Ba et al. 2016).
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        candle_nn::ops::layer_norm_slow(x, &self.weight, &self.bias, self.eps as f32)
    }
}

pub fn layer_norm(dim: usize, eps: f64, vb: VarBuilder) -> Result<LayerNorm> {
    Ok(LayerNorm {
        weight: vb.get_with_hints(dim, "weight", candle_nn::Init::Const(1.))?,
        bias: vb.get_with_hints(dim, "bias", candle_nn::Init::Const(0.))?,
        eps,
    })
}

/// RMSNorm over the last dimension (Zhang & Sennrich 2019).
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        candle_nn::ops::rms_norm_slow(x, &self.weight, self.eps as f32)
    }

    /// Normalises each head by itself: `[.., heads · dim]` with a weight of `dim` values.
    pub fn forward_heads(&self, x: &Tensor) -> Result<Tensor> {
        let (dims, d) = (x.dims(), self.weight.elem_count());
        self.forward(&x.reshape((x.elem_count() / d, d))?)?.reshape(dims)
    }
}

pub fn rms_norm(dim: usize, eps: f64, vb: VarBuilder) -> Result<RmsNorm> {
    Ok(RmsNorm { weight: vb.get_with_hints(dim, "weight", candle_nn::Init::Const(1.))?, eps })
}

/// GroupNorm over channel groups of `[batch, channels, ..]`.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let dims = x.dims().to_vec();
        let (b, c) = (dims[0], dims[1]);
        let rest: usize = dims[2..].iter().product();
        let x = x.reshape((b, self.groups, c / self.groups * rest))?;
        let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let var = x.sqr()?.mean_keepdim(D::Minus1)?;
        let x = x.broadcast_div(&(var + self.eps)?.sqrt()?)?.reshape((b, c, rest))?;
        x.broadcast_mul(&self.weight.reshape((1, c, 1))?)?
            .broadcast_add(&self.bias.reshape((1, c, 1))?)?
            .reshape(dims)
    }
}

pub fn group_norm(groups: usize, channels: usize, eps: f64, vb: VarBuilder) -> Result<GroupNorm> {
    Ok(GroupNorm {
        weight: vb.get_with_hints(channels, "weight", candle_nn::Init::Const(1.))?,
        bias: vb.get_with_hints(channels, "bias", candle_nn::Init::Const(0.))?,
        groups,
        eps,
    })
}
