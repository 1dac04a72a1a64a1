//! BERT's encoder (Devlin et al. 2019): post-norm, learned positions, no pooler.
//!
//! Weight names as in `BertModel` without prefix (`embeddings.word_embeddings.weight`, …).

use crate::nn::stochastic::{TrainCtx, additive, attention_dropout, dropout};
use crate::nn::{self, Embedding, LayerNorm, Linear};
use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

/// Mirrors the checkpoint's `config.json`; defaults are bert-base's.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub max_position_embeddings: usize,
    pub type_vocab_size: usize,
    pub layer_norm_eps: f64,
    pub hidden_act: String,
    pub hidden_dropout_prob: f64,
    pub attention_probs_dropout_prob: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 30522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            layer_norm_eps: 1e-12,
            hidden_act: "gelu".into(),
            hidden_dropout_prob: 0.1,
            attention_probs_dropout_prob: 0.1,
        }
    }
}

fn dense(inp: usize, out: usize, vb: VarBuilder) -> Result<Linear> {
    let weight = vb.get_with_hints((out, inp), "weight", Init::Randn { mean: 0., stdev: 0.02 })?;
    Ok(Linear::new(weight, Some(vb.get_with_hints(out, "bias", Init::Const(0.))?)))
}

#[derive(Clone, Debug)]
struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attention_output: Linear,
    attention_norm: LayerNorm,
    intermediate: Linear,
    output: Linear,
    output_norm: LayerNorm,
    heads: usize,
    hidden_dropout: f64,
    attention_dropout: f64,
}

impl Layer {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let (d, i) = (cfg.hidden_size, cfg.intermediate_size);
        let (a, o) = (vb.pp("attention"), vb.pp("output"));
        Ok(Self {
            query: dense(d, d, a.pp("self.query"))?,
            key: dense(d, d, a.pp("self.key"))?,
            value: dense(d, d, a.pp("self.value"))?,
            attention_output: dense(d, d, a.pp("output.dense"))?,
            attention_norm: nn::layer_norm(d, cfg.layer_norm_eps, a.pp("output.LayerNorm"))?,
            intermediate: dense(d, i, vb.pp("intermediate.dense"))?,
            output: dense(i, d, o.pp("dense"))?,
            output_norm: nn::layer_norm(d, cfg.layer_norm_eps, o.pp("LayerNorm"))?,
            heads: cfg.num_attention_heads,
            hidden_dropout: cfg.hidden_dropout_prob,
            attention_dropout: cfg.attention_probs_dropout_prob,
        })
    }

    fn forward(&self, x: &Tensor, mask: &Tensor, train: &mut Option<&mut TrainCtx>) -> Result<Tensor> {
        let (b, t, d) = x.dims3()?;
        let split = |y: Tensor| y.reshape((b, t, self.heads, d / self.heads))?.transpose(1, 2);
        let (q, k) = (split(self.query.forward(x)?)?, split(self.key.forward(x)?)?);
        let v = split(self.value.forward(x)?)?;
        let scale = 1. / ((d / self.heads) as f64).sqrt();
        let y = attention_dropout(&q, &k, &v, scale, Some(mask), self.attention_dropout, train)?;
        let y = self.attention_output.forward(&y.transpose(1, 2)?.reshape((b, t, d))?)?;
        let x = self.attention_norm.forward(&(x + dropout(&y, self.hidden_dropout, train)?)?)?;
        let y = self.output.forward(&self.intermediate.forward_act(&x, nn::Act::Gelu)?)?;
        self.output_norm.forward(&(x + dropout(&y, self.hidden_dropout, train)?)?)
    }
}

#[derive(Clone, Debug)]
pub struct Bert {
    words: Embedding,
    positions: Embedding,
    types: Embedding,
    norm: LayerNorm,
    layers: Vec<Layer>,
    dropout: f64,
}

impl Bert {
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        if cfg.hidden_act != "gelu" {
            candle_core::bail!("bert: hidden_act {:?} is not supported (only \"gelu\")", cfg.hidden_act)
        }
        if cfg.num_attention_heads == 0 || !cfg.hidden_size.is_multiple_of(cfg.num_attention_heads) {
            let (d, h) = (cfg.hidden_size, cfg.num_attention_heads);
            candle_core::bail!("bert: hidden_size {d} is no multiple of num_attention_heads {h}")
        }
        super::check_layers("bert", cfg.num_hidden_layers)?;
        let (d, e) = (cfg.hidden_size, vb.pp("embeddings"));
        let layers = vb.pp("encoder.layer");
        Ok(Self {
            words: nn::embedding(cfg.vocab_size, d, e.pp("word_embeddings"))?,
            positions: nn::embedding(cfg.max_position_embeddings, d, e.pp("position_embeddings"))?,
            types: nn::embedding(cfg.type_vocab_size, d, e.pp("token_type_embeddings"))?,
            norm: nn::layer_norm(d, cfg.layer_norm_eps, e.pp("LayerNorm"))?,
            layers: (0..cfg.num_hidden_layers)
                .map(|i| Layer::new(cfg, layers.pp(i)))
                .collect::<Result<_>>()?,
            dropout: cfg.hidden_dropout_prob,
        })
    }

    /// The embeddings' output and each layer's, `[batch, seq, hidden]`.
    ///
    /// `ids`, `types` (default 0) and `positions` (default 0, 1, …) are u32 `[batch, seq]`. `mask` is
    /// not zero where attention is allowed: `[batch, seq]` for padding, or `[batch, seq, seq]`
    /// (query, key), in which each query must see something.
    pub fn hidden_states(
        &self,
        ids: &Tensor,
        types: Option<&Tensor>,
        positions: Option<&Tensor>,
        mask: &Tensor,
        mut train: Option<&mut TrainCtx>,
    ) -> Result<Vec<Tensor>> {
        let (b, t) = ids.dims2()?;
        let mask = match *mask.dims() {
            [mb, mt] if (mb, mt) == (b, t) => mask.reshape((b, 1, 1, t))?,
            [mb, mq, mk] if (mb, mq, mk) == (b, t, t) => mask.reshape((b, 1, t, t))?,
            _ => candle_core::bail!("bert: ids are {:?}, the mask {:?}", ids.dims(), mask.dims()),
        };
        let mask = additive(&mask)?;
        let positions = match positions {
            Some(p) => self.positions.forward(p)?,
            None => self.positions.forward(&Tensor::arange(0, t as u32, ids.device())?)?,
        };
        let types = match types {
            Some(y) => self.types.forward(y)?,
            None => self.types.forward(&Tensor::zeros(1, candle_core::DType::U32, ids.device())?)?,
        };
        let x = self.words.forward(ids)?.broadcast_add(&types)?.broadcast_add(&positions)?;
        let x = dropout(&self.norm.forward(&x)?, self.dropout, &mut train)?;
        let mut states = vec![x];
        for layer in &self.layers {
            let x = &states[states.len() - 1];
            let y = match &mut train {
                None => layer.forward(x, &mask, &mut None)?,
                Some(ctx) => {
                    let (layer, mask) = (layer.clone(), mask.clone());
                    ctx.part(&[x], move |x, train| layer.forward(&x[0], &mask, train))?
                }
            };
            states.push(y);
        }
        Ok(states)
    }

    /// The last of [`Self::hidden_states`].
    pub fn forward(
        &self,
        ids: &Tensor,
        types: Option<&Tensor>,
        positions: Option<&Tensor>,
        mask: &Tensor,
        train: Option<&mut TrainCtx>,
    ) -> Result<Tensor> {
        let mut states = self.hidden_states(ids, types, positions, mask, train)?;
        Ok(states.pop().expect("at least the embeddings"))
    }
}
