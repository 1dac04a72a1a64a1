//! GroundingDINO (Liu et al. 2023): a picture and a prompt of phrases in; for each query a box
//! and a logit for each token of the prompt out.
//!
//! One network with HF's weight names; where HF's and the original implementation differ, the
//! configuration says whose results are meant ([`Semantics`]). The original's weights are renamed
//! by [`names::to_hf`]. Preprocessing, phrases of boxes and losses are elsewhere.
//!
//! Not supported: one-stage models, box heads that differ between decoder layers, learned image
//! positions, backbones other than Swin.

pub mod caption;
mod config;
mod decoder;
mod encoder;
mod layers;
pub mod names;
mod position;
pub mod postprocess;
pub mod preprocess;
mod text;

pub use config::{Config, Freeze, Semantics};
pub use text::{SPECIAL_TOKENS, text_masks};

use crate::models::bert::Bert;
use crate::models::swin::{FeatureMap, Swin};
use crate::nn::rows::RowMap;
use crate::nn::stochastic::{TrainCtx, additive};
use crate::nn::{self, GroupNorm, LayerNorm, Linear, Params};
use candle_core::{D, DType, Result, Tensor};
use candle_nn::ops::sigmoid;
use candle_nn::{Init, VarBuilder};
use config::GROUPS;
use decoder::{Decoder, Memory};
use encoder::{Context, Encoder, TextMasks};
use layers::{Mlp, xavier};
use position::{Levels, sine_embedding};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Names that checkpoints may hold and no result depends on ([`crate::weights::is_unused`]): the plain
/// Swin's last norm, BERT's pooler and stored positions, the decoder's second copy of the box heads, and
/// the table of places in a window, which transformers 4 stored for each block.
pub const UNUSED: &[&str] = &[
    "model.backbone.conv_encoder.model.layernorm.",
    "model.backbone.conv_encoder.model.swin.layernorm.",
    "model.text_backbone.pooler.",
    "model.text_backbone.embeddings.position_ids",
    "model.decoder.bbox_embed.",
    "*.relative_position_index",
];

/// One batch.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// `[batch, 3, height, width]`, normalised, 0 in padding (right and bottom).
    pub pixel_values: Tensor,
    /// `[batch, height, width]`, not zero where real; none if nothing is padded.
    pub pixel_mask: Option<Tensor>,
    /// u32 `[batch, t]`.
    pub input_ids: Tensor,
    /// `[batch, t]`, not zero where real.
    pub attention_mask: Tensor,
    /// `[batch, t, t]`, not zero where a token may attend to another.
    pub text_self_mask: Tensor,
    /// u32 `[batch, t]`.
    pub position_ids: Tensor,
    /// u32 `[batch, t]`; 0 if none.
    pub token_type_ids: Option<Tensor>,
}

impl Inputs {
    /// With the masks that the prompt's special tokens imply ([`text_masks`]).
    pub fn new(
        pixel_values: Tensor,
        pixel_mask: Option<Tensor>,
        input_ids: Tensor,
        attention_mask: Tensor,
        special_tokens: &[u32],
    ) -> Result<Self> {
        let (text_self_mask, position_ids) = text_masks(&input_ids, special_tokens)?;
        Ok(Self {
            pixel_values,
            pixel_mask,
            input_ids,
            attention_mask,
            text_self_mask,
            position_ids,
            token_type_ids: None,
        })
    }

    /// Prompts longer than the model reads are cut.
    fn cut(&self, max: usize) -> Result<Self> {
        let t = self.input_ids.dim(1)?.min(max);
        Ok(Self {
            pixel_values: self.pixel_values.clone(),
            pixel_mask: self.pixel_mask.clone(),
            input_ids: self.input_ids.narrow(1, 0, t)?,
            attention_mask: self.attention_mask.narrow(1, 0, t)?,
            text_self_mask: self.text_self_mask.narrow(1, 0, t)?.narrow(2, 0, t)?,
            position_ids: self.position_ids.narrow(1, 0, t)?,
            token_type_ids: self.token_type_ids.as_ref().map(|y| y.narrow(1, 0, t)).transpose()?,
        })
    }
}

/// The last entries of `logits` and `boxes` are the model's answer, the others are for auxiliary
/// losses. There are `num_queries` queries, or as many as the picture has tokens, if fewer.
#[derive(Clone, Debug)]
pub struct Outputs {
    /// For each decoder layer `[batch, q, max_text_len]`; −∞ in padding and beyond the prompt.
    pub logits: Vec<Tensor>,
    /// For each decoder layer `[batch, q, 4]`: cx, cy, w, h in 0..1 of the canvas's real part.
    pub boxes: Vec<Tensor>,
    /// The encoder's proposals, `[batch, q, max_text_len]` and `[batch, q, 4]`.
    pub encoder_logits: Tensor,
    pub encoder_boxes: Tensor,
    /// Which image tokens became queries, best first: u32 `[batch, q]`.
    pub topk: Tensor,
}

/// Intermediate tensors by name, for tests and for looking inside.
#[derive(Clone, Debug, Default)]
pub struct Trace(pub BTreeMap<String, Tensor>);

fn record(trace: &mut Option<&mut Trace>, name: impl FnOnce() -> String, tensor: &Tensor) {
    if let Some(trace) = trace {
        trace.0.insert(name(), tensor.clone());
    }
}

/// Scores of queries for tokens: dot products, and what training from nothing needs.
#[derive(Clone, Debug)]
struct ClassHead {
    scale: Option<f64>,
    bias: Option<Tensor>,
}

impl ClassHead {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let bias = cfg.class_logit_bias.map(|b| vb.get_with_hints((), "bias", Init::Const(b))).transpose()?;
        Ok(Self { scale: cfg.class_logit_scale.then(|| 1. / (cfg.d_model as f64).sqrt()), bias })
    }

    /// `[batch, q, d]` and `[batch, t, d]` → `[batch, q, t]`, −∞ where `padding` says so.
    fn forward(&self, x: &Tensor, text: &Tensor, padding: Option<&Tensor>) -> Result<Tensor> {
        let mut y = x.matmul(&text.t()?.contiguous()?)?;
        if let Some(scale) = self.scale {
            y = (y * scale)?;
        }
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        let Some(padding) = padding else { return Ok(y) };
        // Selected, not added, so that no gradient at −∞ can turn into NaN.
        let real = padding.squeeze(1)?.ge(0f32)?.broadcast_as(y.shape())?;
        let never = Tensor::full(f32::NEG_INFINITY, y.shape(), y.device())?.to_dtype(y.dtype())?;
        real.where_cond(&y, &never)
    }
}

/// A convolution (1×1, or 3×3 with stride 2 and padding 1) and a GroupNorm. Both convolutions are
/// linear layers on tokens: the larger one on the nine tokens around each output.
#[derive(Clone, Debug)]
struct InputProjection {
    /// `[d, inp, k, k]`. What a linear layer wants is made of it anew each time: a copy made once would not
    /// follow a training.
    weight: Tensor,
    bias: Tensor,
    halve: bool,
    norm: GroupNorm,
}

impl InputProjection {
    fn new(inp: usize, d: usize, halve: bool, vb: VarBuilder) -> Result<Self> {
        let (v, k) = (vb.pp(0), if halve { 3 } else { 1 });
        let bound = (6. / ((inp + d) * k * k) as f64).sqrt();
        let init = Init::Uniform { lo: -bound, up: bound };
        let weight = v.get_with_hints((d, inp, k, k), "weight", init)?;
        let bias = v.get_with_hints(d, "bias", Init::Const(0.))?;
        let norm = nn::group_norm(GROUPS, d, 1e-5, vb.pp(1))?;
        Ok(Self { weight, bias, halve, norm })
    }

    fn forward(&self, x: &FeatureMap) -> Result<FeatureMap> {
        let (mut height, mut width) = (x.height, x.width);
        let tokens = if self.halve {
            (height, width) = (x.height.div_ceil(2), x.width.div_ceil(2));
            let taps = (0..9).map(|tap| {
                let from = (0..height * width).map(|i| {
                    let y = (2 * (i / width) + tap / 3).checked_sub(1).filter(|y| *y < x.height)?;
                    let x_ = (2 * (i % width) + tap % 3).checked_sub(1).filter(|c| *c < x.width)?;
                    Some(y * x.width + x_)
                });
                RowMap::new(from, x.height * x.width)?.apply(&x.tokens)
            });
            Tensor::cat(&taps.collect::<Result<Vec<_>>>()?, 2)?
        } else {
            x.tokens.clone()
        };
        let weight = self.weight.permute((0, 2, 3, 1))?.flatten_from(1)?;
        let y =
            Linear::new(weight, Some(self.bias.clone())).forward(&tokens)?.transpose(1, 2)?.contiguous()?;
        let tokens = self.norm.forward(&y)?.transpose(1, 2)?.contiguous()?;
        Ok(FeatureMap { tokens, height, width })
    }
}

fn freeze_if(yes: bool, vb: VarBuilder<'_>) -> VarBuilder<'_> {
    if yes { nn::frozen(vb) } else { vb }
}

#[derive(Clone, Debug)]
pub struct GroundingDino {
    cfg: Config,
    backbone: Swin,
    input_proj: Vec<InputProjection>,
    text_backbone: Bert,
    text_projection: Linear,
    level_embed: Tensor,
    query_embeddings: Tensor,
    encoder: Encoder,
    enc_output: Linear,
    enc_output_norm: LayerNorm,
    encoder_box_head: Mlp,
    encoder_class_head: ClassHead,
    decoder: Decoder,
    box_head: Mlp,
    class_heads: Vec<ClassHead>,
}

impl GroundingDino {
    /// Builds on HF's names. `vb` may be [`Params`]: then call [`init_offsets`] on fresh ones.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        cfg.check()?;
        let (d, m) = (cfg.d_model, vb.pp("model"));
        let backbone = freeze_if(cfg.freeze.backbone, m.pp("backbone.conv_encoder.model"));
        let text = freeze_if(cfg.freeze.text, m.pp("text_backbone"));
        let channels = cfg.backbone_config.out_channels();
        let input_proj = (0..cfg.num_feature_levels)
            .map(|i| {
                let vb = m.pp("input_proj_vision").pp(i);
                match channels.get(i) {
                    Some(&c) => InputProjection::new(c, d, false, vb),
                    None if i == channels.len() => InputProjection::new(channels[i - 1], d, true, vb),
                    None => InputProjection::new(d, d, true, vb),
                }
            })
            .collect::<Result<_>>()?;
        let normal = Init::Randn { mean: 0., stdev: 1. };
        let heads = [d, d, d, 4];
        Ok(Self {
            backbone: Swin::new(&cfg.backbone_config, backbone)?,
            input_proj,
            text_backbone: Bert::new(&cfg.text_config, text)?,
            text_projection: xavier(cfg.text_config.hidden_size, d, m.pp("text_projection"))?,
            level_embed: m.get_with_hints((cfg.num_feature_levels, d), "level_embed", normal)?,
            query_embeddings: m.get_with_hints(
                (cfg.num_queries, d),
                "query_position_embeddings.weight",
                normal,
            )?,
            encoder: Encoder::new(cfg, m.pp("encoder"))?,
            enc_output: xavier(d, d, m.pp("enc_output"))?,
            enc_output_norm: nn::layer_norm(d, cfg.layer_norm_eps, m.pp("enc_output_norm"))?,
            encoder_box_head: Mlp::new(&heads, true, m.pp("encoder_output_bbox_embed"))?,
            encoder_class_head: ClassHead::new(cfg, m.pp("encoder_output_class_embed"))?,
            decoder: Decoder::new(cfg, m.pp("decoder"))?,
            box_head: Mlp::new(&heads, true, vb.pp("bbox_embed.0"))?,
            class_heads: (0..cfg.decoder_layers)
                .map(|i| ClassHead::new(cfg, vb.pp("class_embed").pp(i)))
                .collect::<Result<_>>()?,
            cfg: cfg.clone(),
        })
    }

    pub fn config(&self) -> &Config {
        &self.cfg
    }

    /// `train` switches dropout and stochastic depth on, as the configuration sets them.
    pub fn forward(&self, inputs: &Inputs, train: Option<&mut TrainCtx>) -> Result<Outputs> {
        self.run(inputs, train, None, None)
    }

    /// Evaluation on given queries, u32 `[batch, q]`, in place of the best image tokens.
    ///
    /// Query i is the i-th learned embedding at the i-th best token, so where two scores differ by less
    /// than rounding, two correct implementations may pair them differently and answer differently.
    /// This compares what follows the choice.
    pub fn forward_on(&self, inputs: &Inputs, topk: &Tensor) -> Result<Outputs> {
        self.run(inputs, None, Some(topk), None)
    }

    /// Evaluation, with what happens on the way.
    pub fn trace(&self, inputs: &Inputs) -> Result<(Outputs, Trace)> {
        let mut trace = Trace::default();
        let out = self.run(inputs, None, None, Some(&mut trace))?;
        Ok((out, trace))
    }

    fn run(
        &self,
        inputs: &Inputs,
        mut train: Option<&mut TrainCtx>,
        topk: Option<&Tensor>,
        mut trace: Option<&mut Trace>,
    ) -> Result<Outputs> {
        let trace = &mut trace;
        let inputs = inputs.cut(self.cfg.max_text_len)?;
        let (text, masks) = self.text(&inputs, train.as_deref_mut(), trace)?;
        let (vision, levels) = self.vision(&inputs, train.as_deref_mut(), trace)?;
        let train = &mut train;

        let sizes = levels.shapes.iter().enumerate();
        let level_of: Vec<u32> = sizes.flat_map(|(i, (h, w))| vec![i as u32; h * w]).collect();
        let level_of = Tensor::from_vec(level_of, levels.sine.dim(1)?, vision.device())?;
        let position = levels.sine.broadcast_add(&self.level_embed.index_select(&level_of, 0)?)?;
        record(trace, || "position".into(), &position);
        let context = Context { position, levels: Arc::new(levels), masks: Arc::new(masks) };
        let (levels, masks) = (&context.levels, &context.masks);
        let (memory, enhanced) = self.encoder.forward(&vision, &text, &context, train, trace)?;
        record(trace, || "encoder.memory".into(), &memory);
        record(trace, || "encoder.text".into(), &enhanced);

        let padding = masks.padding.as_ref();
        let chosen = self.select(&memory, &enhanced, padding, levels, topk, trace)?;
        let (b, q) = chosen.topk.dims2()?;
        let target = self.query_embeddings.narrow(0, 0, q)?.unsqueeze(0)?;
        let target = target.broadcast_as((b, q, self.cfg.d_model))?.contiguous()?;
        let (encoder_logits, encoder_boxes) = match self.cfg.semantics {
            Semantics::Hf => {
                (self.encoder_class_head.forward(&target, &text, padding)?, chosen.boxes.detach())
            }
            Semantics::Original => {
                let logits = self.encoder_class_head.forward(&chosen.features, &enhanced, padding)?;
                (logits, chosen.boxes.clone())
            }
        };

        let memory = Memory {
            vision: memory,
            text: enhanced.clone(),
            text_padding: padding.cloned(),
            levels: levels.clone(),
        };
        let decoded = self.decoder.forward(&target, &chosen.boxes, &memory, &self.box_head, train, trace)?;
        let logits = decoded.hidden.iter().zip(&self.class_heads).enumerate().map(|(i, (h, head))| {
            record(trace, || format!("decoder.{i}.normed"), h);
            self.to_full_length(&head.forward(h, &enhanced, padding)?)
        });
        Ok(Outputs {
            logits: logits.collect::<Result<_>>()?,
            boxes: decoded.boxes,
            encoder_logits: self.to_full_length(&encoder_logits)?,
            encoder_boxes,
            topk: chosen.topk,
        })
    }

    /// Text features `[batch, t, d]` and their masks.
    fn text(
        &self,
        inputs: &Inputs,
        train: Option<&mut TrainCtx>,
        trace: &mut Option<&mut Trace>,
    ) -> Result<(Tensor, TextMasks)> {
        let (b, t) = inputs.input_ids.dims2()?;
        let types = inputs.token_type_ids.as_ref();
        let positions = Some(&inputs.position_ids);
        let mask = &inputs.text_self_mask;
        let text = self.text_backbone.forward(&inputs.input_ids, types, positions, mask, train)?;
        record(trace, || "text.bert".into(), &text);
        let text = self.text_projection.forward(&text)?;
        record(trace, || "text.projected".into(), &text);
        let real = inputs.attention_mask.ne(0u8)?;
        let padded = real.flatten_all()?.to_vec1::<u8>()?.contains(&0);
        let position = inputs.position_ids.to_dtype(DType::F32)?.unsqueeze(2)?;
        let masks = TextMasks {
            padding: if padded { Some(additive(&real)?.reshape((b, 1, 1, t))?) } else { None },
            phrases: additive(&inputs.text_self_mask)?.unsqueeze(1)?,
            position: sine_embedding(&position, self.cfg.d_model)?,
        };
        Ok((text, masks))
    }

    /// All levels' tokens, finest first, `[batch, tokens, d]`.
    fn vision(
        &self,
        inputs: &Inputs,
        train: Option<&mut TrainCtx>,
        trace: &mut Option<&mut Trace>,
    ) -> Result<(Tensor, Levels)> {
        let maps = self.backbone.forward(&inputs.pixel_values, train)?;
        let mut projected: Vec<FeatureMap> = Vec::with_capacity(self.input_proj.len());
        for (i, proj) in self.input_proj.iter().enumerate() {
            // The first extra level reads the backbone's last map, the next ones the level before.
            let source = match maps.get(i) {
                Some(map) => map,
                None if i == maps.len() => &maps[i - 1],
                None => &projected[i - 1],
            };
            projected.push(proj.forward(source)?);
        }
        if trace.is_some() {
            for (i, map) in maps.iter().enumerate() {
                record(trace, || format!("backbone.{i}"), &map.nchw()?);
            }
            for (i, map) in projected.iter().enumerate() {
                record(trace, || format!("input_proj.{i}"), &map.nchw()?);
            }
        }
        let levels = Levels::new(
            projected.iter().map(|m| (m.height, m.width)).collect(),
            inputs.pixel_mask.as_ref(),
            self.cfg.d_model,
            self.cfg.positional_embedding_temperature,
            inputs.pixel_values.device(),
        )?;
        record(trace, || "valid_ratios".into(), &levels.valid_ratios);
        record(trace, || "sine".into(), &levels.sine);
        if let Some(real) = &levels.real {
            record(trace, || "real".into(), real);
        }
        let tokens: Vec<Tensor> = projected.into_iter().map(|m| m.tokens).collect();
        let vision = Tensor::cat(&tokens, 1)?;
        record(trace, || "vision".into(), &vision);
        Ok((vision, levels))
    }

    /// Language-guided query selection: the tokens whose features match some token of the text best,
    /// or those in `topk`.
    ///
    /// All tokens are scored without a graph; only the chosen ones are computed again with one.
    fn select(
        &self,
        memory: &Tensor,
        text: &Tensor,
        padding: Option<&Tensor>,
        levels: &Levels,
        topk: Option<&Tensor>,
        trace: &mut Option<&mut Trace>,
    ) -> Result<Chosen> {
        let (b, s, d) = memory.dims3()?;
        let features = |x: &Tensor| self.enc_output_norm.forward(&self.enc_output.forward(x)?);
        let masked = memory.detach().broadcast_mul(&levels.proposable)?;
        let all = features(&masked)?;
        let class = self.encoder_class_head.forward(&all, &text.detach(), padding)?;
        let proposals = levels.proposals.broadcast_as((b, s, 4))?;
        if trace.is_some() {
            record(trace, || "proposals.features".into(), &all);
            record(trace, || "proposals.class".into(), &self.to_full_length(&class)?);
            let boxes = (self.encoder_box_head.forward(&all)? + &proposals)?;
            record(trace, || "proposals.box_logits".into(), &boxes);
        }
        let topk = match topk {
            Some(given) => given.to_vec2::<u32>()?,
            None => {
                let scores = class.max(D::Minus1)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
                scores.iter().map(|scores| best(scores, self.cfg.num_queries)).collect()
            }
        };
        let k = topk.first().map_or(0, Vec::len);
        if topk.len() != b || topk.iter().flatten().any(|t| *t as usize >= s) {
            candle_core::bail!("grounding-dino: the queries must be tokens of {b} pictures, under {s}")
        }
        let rows = topk.iter().enumerate().flat_map(|(i, t)| t.iter().map(move |t| (i * s) as u32 + t));
        let rows = Tensor::from_vec(rows.collect(), b * k, memory.device())?;
        let pick = |x: &Tensor, c: usize| x.reshape((b * s, c))?.index_select(&rows, 0)?.reshape((b, k, c));
        let proposable = pick(&levels.proposable.broadcast_as((b, s, 1))?, 1)?;
        let features = features(&pick(memory, d)?.broadcast_mul(&proposable)?)?;
        let proposed = pick(&proposals, 4)?;
        record(trace, || "proposals.initial".into(), &sigmoid(&proposed)?);
        let boxes = (self.encoder_box_head.forward(&features)? + proposed)?;
        Ok(Chosen {
            features,
            boxes: sigmoid(&boxes)?,
            topk: Tensor::from_vec(topk.concat(), (b, k), memory.device())?,
        })
    }

    /// `[.., t]` → `[.., max_text_len]`.
    fn to_full_length(&self, logits: &Tensor) -> Result<Tensor> {
        let (b, q, t) = logits.dims3()?;
        let rest = self.cfg.max_text_len - t;
        if rest == 0 {
            return Ok(logits.clone());
        }
        let never = Tensor::full(f32::NEG_INFINITY, (b, q, rest), logits.device())?;
        Tensor::cat(&[logits, &never.to_dtype(logits.dtype())?], 2)
    }
}

/// Indices of the largest scores, largest first.
fn best(scores: &[f32], count: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_by(|&x, &y| scores[y as usize].total_cmp(&scores[x as usize]));
    order.truncate(count);
    order
}

struct Chosen {
    features: Tensor,
    boxes: Tensor,
    topk: Tensor,
}

/// Sets the biases of all `sampling_offsets` of a fresh network to a fan: head h looks in direction
/// 2πh / heads, its point i at i + 1 pixels (Deformable DETR, appendix A.2). No initialiser of a
/// single tensor can express this.
pub fn init_offsets(params: &Params, cfg: &Config) -> Result<()> {
    for (name, var) in params.named() {
        if !name.ends_with("sampling_offsets.bias") {
            continue;
        }
        let (heads, points) = if name.contains(".decoder.") {
            (cfg.decoder_attention_heads, cfg.decoder_n_points)
        } else {
            (cfg.encoder_attention_heads, cfg.encoder_n_points)
        };
        let mut bias = Vec::with_capacity(var.elem_count());
        for h in 0..heads {
            let (y, x) = (std::f32::consts::TAU * h as f32 / heads as f32).sin_cos();
            let longest = x.abs().max(y.abs());
            for _ in 0..cfg.num_feature_levels {
                for i in 0..points {
                    let r = (i + 1) as f32 / longest;
                    bias.extend([x * r, y * r]);
                }
            }
        }
        var.set(&Tensor::from_vec(bias, var.shape(), var.device())?)?;
    }
    Ok(())
}
