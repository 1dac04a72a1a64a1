//! 2-D convolution with the padding modes that the networks here use.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

#[derive(Clone, Copy, Debug)]
pub struct Conv2dConfig {
    pub stride: usize,
    pub padding: usize,
    /// Pad by repeating the border instead of by zeros.
    pub replicate: bool,
}

impl Default for Conv2dConfig {
    fn default() -> Self {
        Self { stride: 1, padding: 0, replicate: false }
    }
}

#[cfg(feature = "cuda")]
impl Conv2dConfig {
    fn window(&self, weight: &Tensor) -> Result<super::kernels::Window> {
        let Self { stride, padding, replicate } = *self;
        Ok(super::kernels::Window { kernel: weight.dim(2)?, stride, padding, replicate })
    }
}

#[derive(Clone, Debug)]
pub struct Conv2d {
    weight: Tensor,
    bias: Option<Tensor>,
    cfg: Conv2dConfig,
}

impl Conv2d {
    /// `[batch, in, h, w]` → `[batch, out, h', w']`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let p = self.cfg.padding;
        #[cfg(feature = "cuda")]
        {
            let (window, bias) = (self.cfg.window(&self.weight)?, self.bias.as_ref());
            if let Some(y) = super::gpu_ops::conv2d(x, &self.weight, bias, window, false, None)? {
                return Ok(y);
            }
        }
        let (x, p) = if self.cfg.replicate && p > 0 {
            (x.pad_with_same(2, p, p)?.pad_with_same(3, p, p)?, 0)
        } else {
            (x.clone(), p)
        };
        let y = x.conv2d(&self.weight, p, self.cfg.stride, 1, 1)?;
        match &self.bias {
            Some(b) => y.broadcast_add(&b.reshape((1, (), 1, 1))?),
            None => Ok(y),
        }
    }
}

pub fn conv2d(
    inp: usize,
    out: usize,
    kernel: usize,
    cfg: Conv2dConfig,
    bias: bool,
    vb: VarBuilder,
) -> Result<Conv2d> {
    let bound = 1. / ((inp * kernel * kernel) as f64).sqrt();
    let uniform = candle_nn::Init::Uniform { lo: -bound, up: bound };
    let weight = vb.get_with_hints((out, inp, kernel, kernel), "weight", uniform)?;
    let bias = if bias { Some(vb.get_with_hints(out, "bias", uniform)?) } else { None };
    Ok(Conv2d { weight, bias, cfg })
}
