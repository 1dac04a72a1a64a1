//! Weight names of the original project (`groundingdino_swint_ogc` and its descendants) ↔ HF's,
//! which this crate uses.
//!
//! One table serves both directions. The original fuses queries, keys and values of most
//! attentions into one tensor, stores the shared box head once per decoder layer and place, and
//! keeps buffers and a pooler that nothing reads.

use candle_core::{Result, Tensor};
use std::collections::HashMap;

/// Prefixes; `{}` stands for an index. What follows the prefix is kept.
const COPIES: [(&str, &str); 38] = [
    (
        "backbone.0.patch_embed.proj.",
        "model.backbone.conv_encoder.model.embeddings.patch_embeddings.projection.",
    ),
    ("backbone.0.patch_embed.norm.", "model.backbone.conv_encoder.model.embeddings.norm."),
    ("backbone.0.layers.{}.downsample.", "model.backbone.conv_encoder.model.encoder.layers.{}.downsample."),
    (
        "backbone.0.layers.{}.blocks.{}.attn.proj.",
        "model.backbone.conv_encoder.model.encoder.layers.{}.blocks.{}.attention.output.dense.",
    ),
    (
        "backbone.0.layers.{}.blocks.{}.attn.relative_position_bias_table",
        "model.backbone.conv_encoder.model.encoder.layers.{}.blocks.{}.attention.self.relative_position_bias_table",
    ),
    (
        "backbone.0.layers.{}.blocks.{}.mlp.fc1.",
        "model.backbone.conv_encoder.model.encoder.layers.{}.blocks.{}.intermediate.dense.",
    ),
    (
        "backbone.0.layers.{}.blocks.{}.mlp.fc2.",
        "model.backbone.conv_encoder.model.encoder.layers.{}.blocks.{}.output.dense.",
    ),
    (
        "backbone.0.layers.{}.blocks.{}.norm1.",
        "model.backbone.conv_encoder.model.encoder.layers.{}.blocks.{}.layernorm_before.",
    ),
    (
        "backbone.0.layers.{}.blocks.{}.norm2.",
        "model.backbone.conv_encoder.model.encoder.layers.{}.blocks.{}.layernorm_after.",
    ),
    ("bert.", "model.text_backbone."),
    ("feat_map.", "model.text_projection."),
    ("input_proj.", "model.input_proj_vision."),
    ("bbox_embed.0.", "bbox_embed.0."),
    ("transformer.level_embed", "model.level_embed"),
    ("transformer.tgt_embed.", "model.query_position_embeddings."),
    ("transformer.enc_output.", "model.enc_output."),
    ("transformer.enc_output_norm.", "model.enc_output_norm."),
    ("transformer.enc_out_bbox_embed.", "model.encoder_output_bbox_embed."),
    ("transformer.encoder.layers.{}.self_attn.", "model.encoder.layers.{}.deformable_layer.self_attn."),
    (
        "transformer.encoder.layers.{}.norm1.",
        "model.encoder.layers.{}.deformable_layer.self_attn_layer_norm.",
    ),
    ("transformer.encoder.layers.{}.norm2.", "model.encoder.layers.{}.deformable_layer.final_layer_norm."),
    ("transformer.encoder.layers.{}.linear{}.", "model.encoder.layers.{}.deformable_layer.fc{}."),
    (
        "transformer.encoder.text_layers.{}.self_attn.out_proj.",
        "model.encoder.layers.{}.text_enhancer_layer.self_attn.out_proj.",
    ),
    (
        "transformer.encoder.text_layers.{}.norm1.",
        "model.encoder.layers.{}.text_enhancer_layer.layer_norm_before.",
    ),
    (
        "transformer.encoder.text_layers.{}.norm2.",
        "model.encoder.layers.{}.text_enhancer_layer.layer_norm_after.",
    ),
    ("transformer.encoder.text_layers.{}.linear{}.", "model.encoder.layers.{}.text_enhancer_layer.fc{}."),
    ("transformer.encoder.fusion_layers.{}.gamma_v", "model.encoder.layers.{}.fusion_layer.vision_param"),
    ("transformer.encoder.fusion_layers.{}.gamma_l", "model.encoder.layers.{}.fusion_layer.text_param"),
    ("transformer.decoder.norm.", "model.decoder.layer_norm."),
    ("transformer.decoder.ref_point_head.", "model.decoder.reference_points_head."),
    ("transformer.decoder.layers.{}.cross_attn.", "model.decoder.layers.{}.encoder_attn."),
    ("transformer.decoder.layers.{}.self_attn.out_proj.", "model.decoder.layers.{}.self_attn.out_proj."),
    (
        "transformer.decoder.layers.{}.ca_text.out_proj.",
        "model.decoder.layers.{}.encoder_attn_text.out_proj.",
    ),
    ("transformer.decoder.layers.{}.catext_norm.", "model.decoder.layers.{}.encoder_attn_text_layer_norm."),
    ("transformer.decoder.layers.{}.norm1.", "model.decoder.layers.{}.encoder_attn_layer_norm."),
    ("transformer.decoder.layers.{}.norm2.", "model.decoder.layers.{}.self_attn_layer_norm."),
    ("transformer.decoder.layers.{}.norm3.", "model.decoder.layers.{}.final_layer_norm."),
    ("transformer.decoder.layers.{}.linear{}.", "model.decoder.layers.{}.fc{}."),
];

/// Inside `transformer.encoder.fusion_layers.{}.` and `model.encoder.layers.{}.fusion_layer.`.
const FUSION: [(&str, &str); 8] = [
    ("layer_norm_v.", "layer_norm_vision."),
    ("layer_norm_l.", "layer_norm_text."),
    ("attn.v_proj.", "attn.vision_proj."),
    ("attn.l_proj.", "attn.text_proj."),
    ("attn.values_v_proj.", "attn.values_vision_proj."),
    ("attn.values_l_proj.", "attn.values_text_proj."),
    ("attn.out_v_proj.", "attn.out_vision_proj."),
    ("attn.out_l_proj.", "attn.out_text_proj."),
];

/// Fused there, three tensors here: `*` stands for query, key, value.
const SPLITS: [(&str, &str); 4] = [
    (
        "backbone.0.layers.{}.blocks.{}.attn.qkv.",
        "model.backbone.conv_encoder.model.encoder.layers.{}.blocks.{}.attention.self.*.",
    ),
    (
        "transformer.encoder.text_layers.{}.self_attn.in_proj_",
        "model.encoder.layers.{}.text_enhancer_layer.self_attn.*.",
    ),
    ("transformer.decoder.layers.{}.self_attn.in_proj_", "model.decoder.layers.{}.self_attn.*."),
    ("transformer.decoder.layers.{}.ca_text.in_proj_", "model.decoder.layers.{}.encoder_attn_text.*."),
];

const PARTS: [&str; 3] = ["query", "key", "value"];

/// How many strange names an error tells.
const SHOWN: usize = 12;

/// If `name` starts with `pattern`, the same indices and rest after `template`.
fn rewrite(name: &str, pattern: &str, template: &str) -> Option<String> {
    let (mut rest, mut indices) = (name, Vec::new());
    for (i, literal) in pattern.split("{}").enumerate() {
        if i > 0 {
            let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            if digits == 0 {
                return None;
            }
            indices.push(&rest[..digits]);
            rest = &rest[digits..];
        }
        rest = rest.strip_prefix(literal)?;
    }
    let mut indices = indices.into_iter();
    let mut out = String::new();
    for (i, literal) in template.split("{}").enumerate() {
        if i > 0 {
            out += indices.next()?;
        }
        out += literal;
    }
    Some(out + rest)
}

const FUSION_LAYER: (&str, &str) =
    ("transformer.encoder.fusion_layers.{}.", "model.encoder.layers.{}.fusion_layer.");
const STAGE_NORM: (&str, &str) =
    ("backbone.0.norm{}.", "model.backbone.conv_encoder.model.hidden_states_norms.stage{}.");

/// The first name that one of the rules gives; `from` and `to` pick a side of each pair.
fn translate(
    name: &str,
    pair: impl Fn((&'static str, &'static str)) -> (&'static str, &'static str),
    shift: i64,
) -> Option<String> {
    for rule in COPIES {
        let (from, to) = pair(rule);
        if let Some(n) = rewrite(name, from, to) {
            return Some(n);
        }
    }
    for rule in FUSION {
        let ((fp, tp), (f, t)) = (pair(FUSION_LAYER), pair(rule));
        if let Some(n) = rewrite(name, &format!("{fp}{f}"), &format!("{tp}{t}")) {
            return Some(n);
        }
    }
    // The original counts the backbone's outputs from 0, HF its stages from 1.
    let (from, to) = pair(STAGE_NORM);
    let (head, tail) = from.split_once("{}").expect("an index");
    let (i, rest) = name.strip_prefix(head)?.split_once(tail)?;
    Some(to.replace("{}", &(i.parse::<i64>().ok()? + shift).to_string()) + rest)
}

/// Stored by the original, read by nobody.
fn unused(name: &str) -> bool {
    name.starts_with("bert.pooler.")
        || name.ends_with(".relative_position_index")
        || ["label_enc.weight", "bert.embeddings.position_ids"].contains(&name)
}

/// Whether these are the original's names.
pub fn is_original<'a>(mut names: impl Iterator<Item = &'a str>) -> bool {
    names.any(|n| n.strip_prefix("module.").unwrap_or(n).starts_with("transformer."))
}

/// The original's tensors (also with the prefix `module.`) under HF's names.
///
/// Errors: names no rule knows, a fused tensor that does not divide by 3, or box heads that
/// differ between decoder layers (the architecture shares one).
pub fn to_hf(tensors: HashMap<String, Tensor>) -> Result<HashMap<String, Tensor>> {
    let mut out = HashMap::with_capacity(tensors.len() * 2);
    let (mut heads, mut strange) = (Vec::new(), Vec::new());
    for (full, tensor) in tensors {
        let name = full.strip_prefix("module.").unwrap_or(&full);
        if unused(name) {
            continue;
        }
        let head = ["bbox_embed.{}.", "transformer.decoder.bbox_embed.{}."]
            .into_iter()
            .find_map(|p| rewrite(name, p, "{}.").map(|r| r.split_once('.').map(|(_, r)| r.to_string())));
        if let Some(Some(rest)) = head {
            heads.push((format!("bbox_embed.0.{rest}"), tensor));
            continue;
        }
        if let Some(fused) = SPLITS.iter().find_map(|(from, to)| rewrite(name, from, to)) {
            let rows = tensor.dim(0)?;
            if rows % 3 != 0 {
                candle_core::bail!("{full}: {rows} rows are no three equal parts")
            }
            for (i, part) in PARTS.iter().enumerate() {
                let t = tensor.narrow(0, i * rows / 3, rows / 3)?.contiguous()?;
                out.insert(fused.replace('*', part), t);
            }
            continue;
        }
        match translate(name, |pair| pair, 1) {
            Some(n) => drop(out.insert(n, tensor)),
            None => strange.push(full),
        }
    }
    if !strange.is_empty() {
        strange.sort();
        let (count, shown) = (strange.len(), strange[..strange.len().min(SHOWN)].join(", "));
        candle_core::bail!(
            "{count} of its tensors are none of the original GroundingDINO's ({shown}{}): if they do not matter, \
             save the checkpoint without them",
            if count > SHOWN { ", …" } else { "" }
        )
    }
    for (name, tensor) in heads {
        let Some(first) = out.get(&name) else {
            out.insert(name, tensor);
            continue;
        };
        let same = first.dims() == tensor.dims()
            && (first - &tensor)?
                .abs()?
                .flatten_all()?
                .max(0)?
                .to_dtype(candle_core::DType::F32)?
                .to_scalar::<f32>()?
                == 0.;
        if !same {
            candle_core::bail!("{name}: the decoder layers' box heads differ; they must be shared")
        }
    }
    Ok(out)
}

/// The inverse of [`to_hf`], for tools that read the original's names. The shared box head is
/// written once per decoder layer and place, as the original stores it.
pub fn to_original(
    tensors: HashMap<String, Tensor>,
    decoder_layers: usize,
) -> Result<HashMap<String, Tensor>> {
    let mut out = HashMap::with_capacity(tensors.len());
    let mut fused: HashMap<String, [Option<Tensor>; 3]> = HashMap::new();
    'tensors: for (name, tensor) in tensors {
        if name.contains(".swin.layernorm.") {
            continue;
        }
        if let Some(rest) = name.strip_prefix("bbox_embed.0.") {
            for i in 0..decoder_layers {
                out.insert(format!("bbox_embed.{i}.{rest}"), tensor.clone());
                out.insert(format!("transformer.decoder.bbox_embed.{i}.{rest}"), tensor.clone());
            }
            continue;
        }
        for (to, from) in SPLITS {
            for (i, part) in PARTS.iter().enumerate() {
                if let Some(n) = rewrite(&name, &from.replace('*', part), to) {
                    fused.entry(n).or_default()[i] = Some(tensor);
                    continue 'tensors;
                }
            }
        }
        match translate(&name, |(a, b)| (b, a), -1) {
            Some(n) => out.insert(n, tensor),
            None => candle_core::bail!("{name}: has no place in the original GroundingDINO"),
        };
    }
    for (name, parts) in fused {
        let [Some(q), Some(k), Some(v)] = parts else {
            candle_core::bail!("{name}: query, key or value is missing")
        };
        out.insert(name, Tensor::cat(&[q, k, v], 0)?);
    }
    Ok(out)
}
