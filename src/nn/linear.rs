//! Linear and embedding layers, weights in the checkpoint's layout (`[out, in]`).

use candle_core::{D, Result, Tensor};
use candle_nn::VarBuilder;

/// `y = x Wᵀ + b`, for `x` of any rank with last dimension `in`.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// `[.., in]` → `[.., out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // One 2-D GEMM whatever the rank: candle's batched matmul would broadcast the weight.
        let dims = x.dims();
        let (lead, k) = (&dims[..dims.len() - 1], x.dim(D::Minus1)?);
        let rows: usize = lead.iter().product();
        let out = self.weight.dim(0)?;
        let y = x.reshape((rows, k))?.matmul(&self.weight.t()?)?;
        let y = match &self.bias {
            Some(b) => y.broadcast_add(b)?,
            None => y,
        };
        let mut shape = lead.to_vec();
        shape.push(out);
        y.reshape(shape)
    }
}

pub fn linear(inp: usize, out: usize, vb: VarBuilder) -> Result<Linear> {
    linear_b(inp, out, true, vb)
}

pub fn linear_no_bias(inp: usize, out: usize, vb: VarBuilder) -> Result<Linear> {
    linear_b(inp, out, false, vb)
}

/// A linear layer whose initial values, where `vb` creates them, are PyTorch's defaults.
pub fn linear_b(inp: usize, out: usize, bias: bool, vb: VarBuilder) -> Result<Linear> {
    let bound = 1. / (inp as f64).sqrt();
    let uniform = candle_nn::Init::Uniform { lo: -bound, up: bound };
    let weight = vb.get_with_hints((out, inp), "weight", uniform)?;
    let bias = if bias { Some(vb.get_with_hints(out, "bias", uniform)?) } else { None };
    Ok(Linear { weight, bias })
}

/// A table of `[vocab, dim]` rows looked up by id.
#[derive(Clone, Debug)]
pub struct Embedding {
    weight: Tensor,
}

impl Embedding {
    pub fn new(weight: Tensor) -> Self {
        Self { weight }
    }

    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// Ids of any shape (u32) → `[.., dim]`.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let mut shape = ids.dims().to_vec();
        shape.push(self.weight.dim(1)?);
        self.weight.index_select(&ids.flatten_all()?, 0)?.reshape(shape)
    }
}

pub fn embedding(vocab: usize, dim: usize, vb: VarBuilder) -> Result<Embedding> {
    let init = candle_nn::Init::Randn { mean: 0., stdev: 0.02 };
    Ok(Embedding { weight: vb.get_with_hints((vocab, dim), "weight", init)? })
}
