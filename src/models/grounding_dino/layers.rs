//! Pieces that encoder and decoder share.

use crate::nn::msda::msda_at;
use crate::nn::stochastic::{TrainCtx, attention_dropout};
use crate::nn::{self, Linear};
use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::position::Levels;

/// Xavier-uniform weights, zero bias.
pub fn xavier(inp: usize, out: usize, vb: VarBuilder) -> Result<Linear> {
    let bound = (6. / (inp + out) as f64).sqrt();
    dense(inp, out, Init::Uniform { lo: -bound, up: bound }, vb)
}

pub fn dense(inp: usize, out: usize, init: Init, vb: VarBuilder) -> Result<Linear> {
    let weight = vb.get_with_hints((out, inp), "weight", init)?;
    Ok(Linear::new(weight, Some(vb.get_with_hints(out, "bias", Init::Const(0.))?)))
}

/// `[batch, seq, heads · dim]` → `[batch, heads, seq, dim]`.
pub fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, n, d) = x.dims3()?;
    x.reshape((b, n, heads, d / heads))?.transpose(1, 2)
}

/// `[batch, heads, seq, dim]` → `[batch, seq, heads · dim]`.
pub fn merge_heads(x: &Tensor) -> Result<Tensor> {
    let (b, h, n, d) = x.dims4()?;
    x.transpose(1, 2)?.reshape((b, n, h * d))
}

/// `torch.nn.MultiheadAttention`, with its projections apart as HF stores them.
#[derive(Clone, Debug)]
pub struct MultiheadAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    out_proj: Linear,
    heads: usize,
    dropout: f64,
}

impl MultiheadAttention {
    pub fn new(d: usize, heads: usize, dropout: f64, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            query: xavier(d, d, vb.pp("query"))?,
            key: xavier(d, d, vb.pp("key"))?,
            value: xavier(d, d, vb.pp("value"))?,
            out_proj: xavier(d, d, vb.pp("out_proj"))?,
            heads,
            dropout,
        })
    }

    /// `q` is `[batch, n, d]`, `k` and `v` `[batch, m, d]`; `mask` is additive.
    pub fn forward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        mask: Option<&Tensor>,
        train: &mut Option<&mut TrainCtx>,
    ) -> Result<Tensor> {
        let scale = 1. / ((q.dim(2)? / self.heads) as f64).sqrt();
        let q = split_heads(&self.query.forward(q)?, self.heads)?;
        let k = split_heads(&self.key.forward(k)?, self.heads)?;
        let v = split_heads(&self.value.forward(v)?, self.heads)?;
        let y = attention_dropout(&q, &k, &v, scale, mask, self.dropout, train)?;
        self.out_proj.forward(&merge_heads(&y)?)
    }
}

/// Multi-scale deformable attention with its linear layers.
#[derive(Clone, Debug)]
pub struct DeformableAttention {
    sampling_offsets: Linear,
    attention_weights: Linear,
    value_proj: Linear,
    output_proj: Linear,
    heads: usize,
}

impl DeformableAttention {
    /// Fresh weights look at their reference point in equal shares; the offsets' fan of directions
    /// (Deformable DETR, appendix A.2) is set by [`super::init_offsets`].
    pub fn new(d: usize, heads: usize, levels: usize, points: usize, vb: VarBuilder) -> Result<Self> {
        let n = heads * levels * points;
        Ok(Self {
            sampling_offsets: dense(d, n * 2, Init::Const(0.), vb.pp("sampling_offsets"))?,
            attention_weights: dense(d, n, Init::Const(0.), vb.pp("attention_weights"))?,
            value_proj: xavier(d, d, vb.pp("value_proj"))?,
            output_proj: xavier(d, d, vb.pp("output_proj"))?,
            heads,
        })
    }

    /// `query` `[batch, q, d]` reads `memory` `[batch, tokens, d]` around `reference`
    /// `[batch or 1, q, levels, 2 or 4]`.
    pub fn forward(
        &self,
        query: &Tensor,
        memory: &Tensor,
        reference: &Tensor,
        levels: &Levels,
    ) -> Result<Tensor> {
        let (b, s, d) = memory.dims3()?;
        let value = self.value_proj.forward(memory)?;
        let value = match &levels.real {
            Some(real) => value.broadcast_mul(real)?,
            None => value,
        };
        let value = value.reshape((b, s, self.heads, d / self.heads))?;
        let offsets = self.sampling_offsets.forward(query)?;
        let logits = self.attention_weights.forward(query)?;
        self.output_proj.forward(&msda_at(&value, &levels.shapes, reference, &offsets, &logits)?)
    }
}

/// Linear layers with ReLU between them.
#[derive(Clone, Debug)]
pub struct Mlp {
    layers: Vec<Linear>,
}

impl Mlp {
    /// `zero_last`: a fresh box head starts by proposing its reference unchanged.
    pub fn new(dims: &[usize], zero_last: bool, vb: VarBuilder) -> Result<Self> {
        let n = dims.len() - 1;
        let layers = (0..n)
            .map(|i| {
                let vb = vb.pp("layers").pp(i);
                if zero_last && i + 1 == n {
                    dense(dims[i], dims[i + 1], Init::Const(0.), vb)
                } else {
                    xavier(dims[i], dims[i + 1], vb)
                }
            })
            .collect::<Result<_>>()?;
        Ok(Self { layers })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (last, hidden) = self.layers.split_last().expect("an MLP has layers");
        let mut x = x.clone();
        for layer in hidden {
            x = layer.forward_act(&x, nn::Act::Relu)?;
        }
        last.forward(&x)
    }
}
