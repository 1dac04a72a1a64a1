//! The cross-modality decoder (Liu et al. 2023, figure 3, right): queries attend to each other, to
//! the text and to the image, and refine their boxes after each layer.

use super::config::{Config, Semantics};
use super::layers::{DeformableAttention, Mlp, MultiheadAttention, xavier};
use super::position::{Levels, sine_embedding};
use super::{Trace, record};
use crate::nn::stochastic::{TrainCtx, dropout};
use crate::nn::{self, LayerNorm, Linear};
use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use candle_nn::ops::sigmoid;
use std::sync::Arc;

#[derive(Clone, Debug)]
struct Layer {
    self_attention: MultiheadAttention,
    self_norm: LayerNorm,
    text_attention: MultiheadAttention,
    text_norm: LayerNorm,
    image_attention: DeformableAttention,
    image_norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    final_norm: LayerNorm,
    dropout: f64,
    activation_dropout: f64,
}

/// What all layers read.
#[derive(Clone)]
pub struct Memory {
    pub vision: Tensor,
    pub text: Tensor,
    /// Additive, `[batch, 1, 1, t]`.
    pub text_padding: Option<Tensor>,
    pub levels: Arc<Levels>,
}

impl Layer {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let (d, f, h) = (cfg.d_model, cfg.decoder_ffn_dim, cfg.decoder_attention_heads);
        let norm = |name: &str| nn::layer_norm(d, cfg.layer_norm_eps, vb.pp(name));
        let attention = |name: &str| MultiheadAttention::new(d, h, cfg.attention_dropout, vb.pp(name));
        let image = vb.pp("encoder_attn");
        Ok(Self {
            self_attention: attention("self_attn")?,
            self_norm: norm("self_attn_layer_norm")?,
            text_attention: attention("encoder_attn_text")?,
            text_norm: norm("encoder_attn_text_layer_norm")?,
            image_attention: DeformableAttention::new(
                d,
                h,
                cfg.num_feature_levels,
                cfg.decoder_n_points,
                image,
            )?,
            image_norm: norm("encoder_attn_layer_norm")?,
            fc1: xavier(d, f, vb.pp("fc1"))?,
            fc2: xavier(f, d, vb.pp("fc2"))?,
            final_norm: norm("final_layer_norm")?,
            dropout: cfg.dropout,
            activation_dropout: cfg.activation_dropout,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        position: &Tensor,
        reference: &Tensor,
        memory: &Memory,
        train: &mut Option<&mut TrainCtx>,
    ) -> Result<Tensor> {
        let p = self.dropout;
        let q = (x + position)?;
        let y = self.self_attention.forward(&q, &q, x, None, train)?;
        let x = self.self_norm.forward(&(x + dropout(&y, p, train)?)?)?;
        let q = (&x + position)?;
        let text = &memory.text;
        let y = self.text_attention.forward(&q, text, text, memory.text_padding.as_ref(), train)?;
        let x = self.text_norm.forward(&(x + dropout(&y, p, train)?)?)?;
        let q = (&x + position)?;
        let y = self.image_attention.forward(&q, &memory.vision, reference, &memory.levels)?;
        let x = self.image_norm.forward(&(x + dropout(&y, p, train)?)?)?;
        let y = dropout(&self.fc1.forward_act(&x, nn::Act::Relu)?, self.activation_dropout, train)?;
        let y = dropout(&self.fc2.forward(&y)?, p, train)?;
        self.final_norm.forward(&(x + y)?)
    }
}

/// log(x / (1 − x)), clamped as the implementation at hand clamps.
fn inverse_sigmoid(x: &Tensor, semantics: Semantics) -> Result<Tensor> {
    match semantics {
        Semantics::Hf => {
            let x = x.clamp(1e-5, 1. - 1e-5)?;
            (&x / (1. - &x)?)?.log()
        }
        Semantics::Original => {
            let x = x.clamp(0., 1.)?;
            (x.maximum(1e-3)? / (1. - &x)?.maximum(1e-3)?)?.log()
        }
    }
}

#[derive(Clone, Debug)]
pub struct Decoder {
    layers: Vec<Layer>,
    norm: LayerNorm,
    reference_head: Mlp,
    semantics: Semantics,
    d_model: usize,
}

/// One entry per layer.
pub struct Decoded {
    /// Normed hidden states, `[batch, q, d]`.
    pub hidden: Vec<Tensor>,
    /// Boxes, cx, cy, w, h in 0..1, `[batch, q, 4]`.
    pub boxes: Vec<Tensor>,
}

impl Decoder {
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let d = cfg.d_model;
        Ok(Self {
            layers: (0..cfg.decoder_layers)
                .map(|i| Layer::new(cfg, vb.pp("layers").pp(i)))
                .collect::<Result<_>>()?,
            norm: nn::layer_norm(d, cfg.layer_norm_eps, vb.pp("layer_norm"))?,
            reference_head: Mlp::new(&[2 * d, d, d], false, vb.pp("reference_points_head"))?,
            semantics: cfg.semantics,
            d_model: d,
        })
    }

    /// `target` `[batch, q, d]`; `reference`: initial boxes `[batch, q, 4]`, taken as constants.
    pub fn forward(
        &self,
        target: &Tensor,
        reference: &Tensor,
        memory: &Memory,
        box_head: &Mlp,
        train: &mut Option<&mut TrainCtx>,
        trace: &mut Option<&mut Trace>,
    ) -> Result<Decoded> {
        let mut x = target.clone();
        let mut reference = reference.detach();
        let (mut hidden, mut boxes) = (Vec::new(), Vec::new());
        record(trace, || "decoder.reference.0".into(), &reference);
        for (i, layer) in self.layers.iter().enumerate() {
            // A layer looks around its reference without moving it; what moves it is the layer before,
            // through the boxes below.
            let fixed = reference.detach();
            let projected = memory.levels.project(&fixed)?;
            let sine = sine_embedding(&projected.narrow(2, 0, 1)?.squeeze(2)?, self.d_model / 2)?;
            let position = self.reference_head.forward(&sine)?;
            record(trace, || format!("decoder.{i}.query_pos"), &position);
            x = match train {
                None => layer.forward(&x, &position, &projected, memory, &mut None)?,
                Some(ctx) => {
                    let (layer, memory) = (layer.clone(), memory.clone());
                    let inputs = [&x, &memory.vision.clone(), &memory.text.clone()];
                    ctx.part(&inputs, move |x, train| {
                        let (vision, text) = (x[1].clone(), x[2].clone());
                        let memory = Memory { vision, text, ..memory.clone() };
                        layer.forward(&x[0], &position, &projected, &memory, train)
                    })?
                }
            };
            record(trace, || format!("decoder.{i}.hidden"), &x);
            let normed = self.norm.forward(&x)?;
            let from = match self.semantics {
                Semantics::Hf => &fixed,
                Semantics::Original => &reference,
            };
            let delta = box_head.forward(&normed)?;
            boxes.push(sigmoid(&(delta + inverse_sigmoid(from, self.semantics)?)?)?);
            reference = sigmoid(&(box_head.forward(&x)? + inverse_sigmoid(&fixed, self.semantics)?)?)?;
            record(trace, || format!("decoder.reference.{}", i + 1), &reference);
            hidden.push(normed);
        }
        Ok(Decoded { hidden, boxes })
    }
}
