//! The feature enhancer (Liu et al. 2023, "Grounding DINO", figure 3, left): in each layer image
//! and text attend to each other, then text to itself within phrases, then the image to itself
//! by deformable attention.

use super::config::Config;
use super::layers::{DeformableAttention, MultiheadAttention, merge_heads, split_heads, xavier};
use super::position::Levels;
use super::{Trace, record};
use crate::nn::stochastic::{TrainCtx, attention_dropout, drop_path, dropout};
use crate::nn::{self, LayerNorm, Linear};
use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};
use std::sync::Arc;

/// The text side of a batch, constant over the layers.
pub struct TextMasks {
    /// Additive, `[batch, 1, 1, t]`; none if no token is padding.
    pub padding: Option<Tensor>,
    /// Additive, `[batch, 1, t, t]`: within phrases.
    pub phrases: Tensor,
    /// Sine embedding of the position within the phrase, `[batch, t, d]`.
    pub position: Tensor,
}

/// Bi-directional attention between image and text (GLIP's, Li et al. 2022) and its residuals.
///
/// The reference shifts all scores by their maximum and clamps them at −50,000, which changes
/// nothing that f32 can show; it is left out. Residuals are added to the *normed* features.
#[derive(Clone, Debug)]
struct Fusion {
    norm_vision: LayerNorm,
    norm_text: LayerNorm,
    vision: Linear,
    text: Linear,
    values_vision: Linear,
    values_text: Linear,
    out_vision: Linear,
    out_text: Linear,
    vision_param: Tensor,
    text_param: Tensor,
    heads: usize,
    dropout: f64,
    drop_path: f64,
}

impl Fusion {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let (d, e) = (cfg.d_model, cfg.encoder_ffn_dim / 2);
        let a = vb.pp("attn");
        let scale = |name| vb.get_with_hints(d, name, Init::Const(1e-4));
        Ok(Self {
            norm_vision: nn::layer_norm(d, cfg.layer_norm_eps, vb.pp("layer_norm_vision"))?,
            norm_text: nn::layer_norm(d, cfg.layer_norm_eps, vb.pp("layer_norm_text"))?,
            vision: xavier(d, e, a.pp("vision_proj"))?,
            text: xavier(d, e, a.pp("text_proj"))?,
            values_vision: xavier(d, e, a.pp("values_vision_proj"))?,
            values_text: xavier(d, e, a.pp("values_text_proj"))?,
            out_vision: xavier(e, d, a.pp("out_vision_proj"))?,
            out_text: xavier(e, d, a.pp("out_text_proj"))?,
            vision_param: scale("vision_param")?,
            text_param: scale("text_param")?,
            heads: cfg.encoder_attention_heads / 2,
            dropout: cfg.fusion_dropout,
            drop_path: cfg.fusion_droppath,
        })
    }

    fn forward(
        &self,
        vision: &Tensor,
        text: &Tensor,
        levels: &Levels,
        masks: &TextMasks,
        train: &mut Option<&mut TrainCtx>,
    ) -> Result<(Tensor, Tensor)> {
        let (vision, text) = (self.norm_vision.forward(vision)?, self.norm_text.forward(text)?);
        let q = split_heads(&self.vision.forward(&vision)?, self.heads)?;
        let k = split_heads(&self.text.forward(&text)?, self.heads)?;
        let vv = split_heads(&self.values_vision.forward(&vision)?, self.heads)?;
        let vt = split_heads(&self.values_text.forward(&text)?, self.heads)?;
        let scale = 1. / (q.dim(3)? as f64).sqrt();
        let p = self.dropout;
        let to_vision = attention_dropout(&q, &k, &vt, scale, masks.padding.as_ref(), p, train)?;
        let to_text = attention_dropout(&k, &q, &vv, scale, levels.key_mask.as_ref(), p, train)?;
        let dv = self.out_vision.forward(&merge_heads(&to_vision)?)?.broadcast_mul(&self.vision_param)?;
        let dt = self.out_text.forward(&merge_heads(&to_text)?)?.broadcast_mul(&self.text_param)?;
        let vision = (vision + drop_path(&dv, self.drop_path, train)?)?;
        Ok((vision, (text + drop_path(&dt, self.drop_path, train)?)?))
    }
}

/// A post-norm transformer layer over text, positions added to queries and keys.
#[derive(Clone, Debug)]
struct TextEnhancer {
    attention: MultiheadAttention,
    fc1: Linear,
    fc2: Linear,
    norm_before: LayerNorm,
    norm_after: LayerNorm,
    dropout: f64,
}

impl TextEnhancer {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let (d, f) = (cfg.d_model, cfg.encoder_ffn_dim / 2);
        let heads = cfg.encoder_attention_heads / 2;
        Ok(Self {
            attention: MultiheadAttention::new(d, heads, cfg.attention_dropout, vb.pp("self_attn"))?,
            fc1: xavier(d, f, vb.pp("fc1"))?,
            fc2: xavier(f, d, vb.pp("fc2"))?,
            norm_before: nn::layer_norm(d, cfg.layer_norm_eps, vb.pp("layer_norm_before"))?,
            norm_after: nn::layer_norm(d, cfg.layer_norm_eps, vb.pp("layer_norm_after"))?,
            dropout: cfg.text_enhancer_dropout,
        })
    }

    fn forward(&self, x: &Tensor, masks: &TextMasks, train: &mut Option<&mut TrainCtx>) -> Result<Tensor> {
        let q = x.broadcast_add(&masks.position)?;
        let y = self.attention.forward(&q, &q, x, Some(&masks.phrases), train)?;
        let x = self.norm_before.forward(&(x + dropout(&y, self.dropout, train)?)?)?;
        let y = dropout(&self.fc1.forward_act(&x, nn::Act::Relu)?, self.dropout, train)?;
        let y = dropout(&self.fc2.forward(&y)?, self.dropout, train)?;
        self.norm_after.forward(&(x + y)?)
    }
}

/// A post-norm layer of deformable self-attention over all levels.
#[derive(Clone, Debug)]
struct DeformableLayer {
    attention: DeformableAttention,
    attention_norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    final_norm: LayerNorm,
    dropout: f64,
    activation_dropout: f64,
}

impl DeformableLayer {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let (d, f, eps) = (cfg.d_model, cfg.encoder_ffn_dim, cfg.layer_norm_eps);
        Ok(Self {
            attention: DeformableAttention::new(
                d,
                cfg.encoder_attention_heads,
                cfg.num_feature_levels,
                cfg.encoder_n_points,
                vb.pp("self_attn"),
            )?,
            attention_norm: nn::layer_norm(d, eps, vb.pp("self_attn_layer_norm"))?,
            fc1: xavier(d, f, vb.pp("fc1"))?,
            fc2: xavier(f, d, vb.pp("fc2"))?,
            final_norm: nn::layer_norm(d, eps, vb.pp("final_layer_norm"))?,
            dropout: cfg.dropout,
            activation_dropout: cfg.activation_dropout,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        position: &Tensor,
        levels: &Levels,
        train: &mut Option<&mut TrainCtx>,
    ) -> Result<Tensor> {
        let query = x.broadcast_add(position)?;
        let y = self.attention.forward(&query, x, &levels.reference, levels)?;
        let x = self.attention_norm.forward(&(x + dropout(&y, self.dropout, train)?)?)?;
        let y = dropout(&self.fc1.forward_act(&x, nn::Act::Relu)?, self.activation_dropout, train)?;
        let y = dropout(&self.fc2.forward(&y)?, self.dropout, train)?;
        self.final_norm.forward(&(x + y)?)
    }
}

#[derive(Clone, Debug)]
struct Layer {
    fusion: Fusion,
    text: TextEnhancer,
    deformable: DeformableLayer,
}

/// What all layers read.
#[derive(Clone)]
pub struct Context {
    /// Added to the image's queries: `[batch or 1, tokens, d]`.
    pub position: Tensor,
    pub levels: Arc<Levels>,
    pub masks: Arc<TextMasks>,
}

impl Layer {
    /// Image and text after the layer; `fused` sees them between its parts.
    fn forward(
        &self,
        vision: &Tensor,
        text: &Tensor,
        with: &Context,
        train: &mut Option<&mut TrainCtx>,
        fused: impl FnOnce(&Tensor, &Tensor),
    ) -> Result<(Tensor, Tensor)> {
        let (vision, text) = self.fusion.forward(vision, text, &with.levels, &with.masks, train)?;
        fused(&vision, &text);
        let text = self.text.forward(&text, &with.masks, train)?;
        Ok((self.deformable.forward(&vision, &with.position, &with.levels, train)?, text))
    }
}

#[derive(Clone, Debug)]
pub struct Encoder {
    layers: Vec<Layer>,
}

impl Encoder {
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let layers = (0..cfg.encoder_layers)
            .map(|i| {
                let vb = vb.pp("layers").pp(i);
                Ok(Layer {
                    fusion: Fusion::new(cfg, vb.pp("fusion_layer"))?,
                    text: TextEnhancer::new(cfg, vb.pp("text_enhancer_layer"))?,
                    deformable: DeformableLayer::new(cfg, vb.pp("deformable_layer"))?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { layers })
    }

    /// `vision` `[batch, tokens, d]` and `text` `[batch, t, d]`, enhanced.
    pub fn forward(
        &self,
        vision: &Tensor,
        text: &Tensor,
        with: &Context,
        train: &mut Option<&mut TrainCtx>,
        trace: &mut Option<&mut Trace>,
    ) -> Result<(Tensor, Tensor)> {
        let (mut vision, mut text) = (vision.clone(), text.clone());
        for (i, layer) in self.layers.iter().enumerate() {
            (vision, text) = match train.as_deref_mut() {
                Some(ctx) if ctx.recomputes() => {
                    let (n, t) = (vision.dim(1)?, text.dim(1)?);
                    let (layer, with) = (layer.clone(), with.clone());
                    // One tensor out, as candle's ops have it: copies that a plain pass does without.
                    let both = ctx.part(&[&vision, &text], move |x, train| {
                        let (vision, text) = layer.forward(&x[0], &x[1], &with, train, |_, _| ())?;
                        Tensor::cat(&[vision, text], 1)
                    })?;
                    (both.narrow(1, 0, n)?, both.narrow(1, n, t)?)
                }
                _ => layer.forward(&vision, &text, with, train, |vision, text| {
                    record(trace, || format!("encoder.{i}.fused_vision"), vision);
                    record(trace, || format!("encoder.{i}.fused_text"), text);
                })?,
            };
            record(trace, || format!("encoder.{i}.vision"), &vision);
            record(trace, || format!("encoder.{i}.text"), &text);
        }
        Ok((vision, text))
    }
}
