//! Configuration, in HF's keys. The original project has no config file of its own: its plain
//! description (`name_set: "original"`) is translated.

use crate::models::{bert, swin};
use candle_core::Result;
use serde::{Deserialize, Serialize};

/// Which of the two implementations is reproduced, where they differ.
///
/// | | `Hf` | `Original` |
/// |---|---|---|
/// | clamp before a logit in box refinement | 1e-5 | 1e-3, x and 1 − x apart |
/// | references in the boxes' outputs | detached | not detached ("look forward twice") |
/// | encoder boxes | detached | trained |
/// | encoder logits | query embeddings · text before the encoder | proposals · text after the encoder |
///
/// With `Hf` the proposal head receives no gradient; it serves HF's numbers. Train with `Original`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Semantics {
    #[default]
    Hf,
    Original,
}

/// Parts whose parameters are constants.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Freeze {
    pub backbone: bool,
    pub text: bool,
}

/// Mirrors HF's `config.json`; defaults are those of GroundingDINO Swin-T.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    pub backbone_config: swin::Config,
    pub text_config: bert::Config,
    pub d_model: usize,
    pub num_queries: usize,
    pub encoder_layers: usize,
    pub encoder_ffn_dim: usize,
    pub encoder_attention_heads: usize,
    pub encoder_n_points: usize,
    pub decoder_layers: usize,
    pub decoder_ffn_dim: usize,
    pub decoder_attention_heads: usize,
    pub decoder_n_points: usize,
    pub num_feature_levels: usize,
    pub max_text_len: usize,
    pub activation_function: String,
    pub layer_norm_eps: f64,
    pub positional_embedding_temperature: f64,
    pub position_embedding_type: String,
    pub two_stage: bool,
    pub embedding_init_target: bool,
    pub two_stage_bbox_embed_share: bool,
    pub decoder_bbox_embed_share: bool,
    pub query_dim: usize,
    pub dropout: f64,
    pub attention_dropout: f64,
    pub activation_dropout: f64,
    pub text_enhancer_dropout: f64,
    pub fusion_dropout: f64,
    pub fusion_droppath: f64,

    /// Not in HF's file.
    pub semantics: Semantics,
    pub freeze: Freeze,
    /// Tokens that end a phrase: \[CLS\], \[SEP\], "." and "?".
    pub special_tokens: Vec<u32>,
    /// Class logits times 1/√d_model. Off for released checkpoints; needed to train from nothing.
    pub class_logit_scale: bool,
    /// A learnable class-logit bias for each decoder layer and the encoder, starting at this value
    /// (MM-GroundingDINO, Zhao et al. 2024; near −4 keeps the focal loss small at the start).
    pub class_logit_bias: Option<f64>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            backbone_config: swin::Config::default(),
            text_config: bert::Config::default(),
            d_model: 256,
            num_queries: 900,
            encoder_layers: 6,
            encoder_ffn_dim: 2048,
            encoder_attention_heads: 8,
            encoder_n_points: 4,
            decoder_layers: 6,
            decoder_ffn_dim: 2048,
            decoder_attention_heads: 8,
            decoder_n_points: 4,
            num_feature_levels: 4,
            max_text_len: 256,
            activation_function: "relu".into(),
            layer_norm_eps: 1e-5,
            positional_embedding_temperature: 20.,
            position_embedding_type: "sine".into(),
            two_stage: true,
            embedding_init_target: true,
            two_stage_bbox_embed_share: false,
            decoder_bbox_embed_share: true,
            query_dim: 4,
            dropout: 0.1,
            attention_dropout: 0.,
            activation_dropout: 0.,
            text_enhancer_dropout: 0.,
            fusion_dropout: 0.,
            fusion_droppath: 0.1,
            semantics: Semantics::Hf,
            freeze: Freeze::default(),
            special_tokens: super::SPECIAL_TOKENS.to_vec(),
            class_logit_scale: false,
            class_logit_bias: None,
        }
    }
}

/// GroupNorm groups after the projections of the feature maps, as the reference hard-codes.
pub(super) const GROUPS: usize = 32;

impl Config {
    /// Reads HF's JSON, or the original's plain description if it says `name_set: "original"`.
    pub fn from_json(text: &str) -> Result<Self> {
        let err = |e: serde_json::Error| candle_core::Error::Msg(format!("grounding-dino config: {e}"));
        let value: serde_json::Value = serde_json::from_str(text).map_err(err)?;
        let cfg = if value.get("name_set").and_then(|v| v.as_str()) == Some("original") {
            serde_json::from_value::<Original>(value).map_err(err)?.translate()?
        } else {
            serde_json::from_value(value).map_err(err)?
        };
        cfg.check()?;
        Ok(cfg)
    }

    /// As transformers reads it, which wants the parts' kinds and a whole number where this has a float. With
    /// scaled and biased class logits it is what transformers calls MM-GroundingDINO.
    pub fn to_json(&self) -> serde_json::Result<serde_json::Value> {
        let mut json = serde_json::to_value(self)?;
        let biased = self.class_logit_scale && self.class_logit_bias.is_some();
        json["model_type"] = if biased { "mm-grounding-dino" } else { "grounding-dino" }.into();
        json["backbone_config"]["model_type"] = "swin".into();
        json["text_config"]["model_type"] = "bert".into();
        if self.positional_embedding_temperature.fract() == 0. {
            json["positional_embedding_temperature"] = (self.positional_embedding_temperature as u64).into();
        }
        Ok(json)
    }

    /// `groundingdino_swint_ogc` and its descendants (VALOR's detector), which carry no config.
    pub fn original_swin_t() -> Self {
        let mut cfg = Self { semantics: Semantics::Original, dropout: 0., ..Self::default() };
        cfg.backbone_config.drop_path_rate = 0.2;
        cfg
    }

    /// `groundingdino_swinb_cogcoor`: the same on the larger backbone, which was pretrained on 384 × 384.
    pub fn original_swin_b() -> Self {
        let mut cfg = Self::original_swin_t();
        let swin = &mut cfg.backbone_config;
        (swin.embed_dim, swin.window_size) = (128, 12);
        (swin.depths, swin.num_heads) = (vec![2, 2, 18, 2], vec![4, 8, 16, 32]);
        cfg
    }

    /// The same for a training, which is the original's: its semantics ([`Semantics`]) and, as in
    /// [`Self::original_swin_t`], no dropout, where HF's files of the same checkpoints say 0.1.
    pub fn for_training(&self) -> Self {
        match self.semantics {
            Semantics::Hf => Self { semantics: Semantics::Original, dropout: 0., ..self.clone() },
            Semantics::Original => self.clone(),
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        let Self { d_model: d, encoder_attention_heads: eh, decoder_attention_heads: dh, .. } = *self;
        // The fusion and text layers have half the encoder's heads and width.
        let half = eh / 2;
        if half == 0 || dh == 0 || d % eh != 0 || d % half != 0 || d % dh != 0 {
            candle_core::bail!("grounding-dino: d_model {d} does not divide into {eh} and {dh} heads")
        }
        if !(self.encoder_ffn_dim / 2).is_multiple_of(half) {
            let f = self.encoder_ffn_dim;
            candle_core::bail!("grounding-dino: half of encoder_ffn_dim {f} is no multiple of {half} heads")
        }
        if d % GROUPS != 0 || d % 4 != 0 {
            candle_core::bail!("grounding-dino: d_model {d} is no multiple of {GROUPS}")
        }
        let counts = [self.encoder_layers, self.decoder_layers, self.num_feature_levels];
        counts.into_iter().try_for_each(|n| crate::models::check_layers("grounding-dino", n))?;
        if self.backbone_config.out_indices.is_empty() {
            candle_core::bail!("grounding-dino: backbone_config.out_indices is empty")
        }
        if self.num_feature_levels < self.backbone_config.out_indices.len() || self.num_feature_levels < 2 {
            candle_core::bail!(
                "grounding-dino: num_feature_levels {} under the backbone's {} maps",
                self.num_feature_levels,
                self.backbone_config.out_indices.len()
            )
        }
        let fixed = [
            ("two_stage", self.two_stage),
            ("embedding_init_target", self.embedding_init_target),
            ("decoder_bbox_embed_share", self.decoder_bbox_embed_share),
            ("two_stage_bbox_embed_share false", !self.two_stage_bbox_embed_share),
            ("activation_function \"relu\"", self.activation_function == "relu"),
            ("position_embedding_type \"sine\"", self.position_embedding_type == "sine"),
            ("query_dim 4", self.query_dim == 4),
        ];
        if let Some((name, _)) = fixed.iter().find(|(_, ok)| !ok) {
            candle_core::bail!("grounding-dino: only {name} is supported")
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct Fusion {
    embed_dim: usize,
    num_heads: usize,
    drop_path: f64,
    dropout: f64,
}

#[derive(Deserialize)]
struct TextEnhancer {
    ffn_dim: usize,
    num_heads: usize,
    dropout: f64,
}

/// The original's settings in plain keys.
#[derive(Deserialize)]
struct Original {
    d_model: usize,
    nheads: usize,
    ffn_dim: usize,
    enc_layers: usize,
    dec_layers: usize,
    num_queries: usize,
    num_feature_levels: usize,
    enc_n_points: usize,
    dec_n_points: usize,
    fusion: Fusion,
    text_enhancer: TextEnhancer,
    dropout: f64,
    activation: String,
    max_text_len: usize,
    layer_norm_eps: f64,
    #[serde(rename = "pe_temperatureH")]
    temperature: f64,
    delimiter_token_ids: Vec<u32>,
    two_stage_bbox_embed_share: bool,
    dec_pred_bbox_embed_share: bool,
    embed_init_tgt: bool,
    backbone: swin::Config,
    bert: bert::Config,
}

impl Original {
    fn translate(self) -> Result<Config> {
        let (f, t) = (&self.fusion, &self.text_enhancer);
        let half = (self.ffn_dim / 2, self.nheads / 2);
        if (f.embed_dim, f.num_heads) != half || (t.ffn_dim, t.num_heads) != half {
            candle_core::bail!(
                "grounding-dino: fusion and text_enhancer must have half of ffn_dim and nheads"
            )
        }
        let mut backbone_config = self.backbone;
        // The original counts stages from 0.
        backbone_config.out_indices.iter_mut().for_each(|i| *i += 1);
        Ok(Config {
            backbone_config,
            text_config: self.bert,
            d_model: self.d_model,
            num_queries: self.num_queries,
            encoder_layers: self.enc_layers,
            encoder_ffn_dim: self.ffn_dim,
            encoder_attention_heads: self.nheads,
            encoder_n_points: self.enc_n_points,
            decoder_layers: self.dec_layers,
            decoder_ffn_dim: self.ffn_dim,
            decoder_attention_heads: self.nheads,
            decoder_n_points: self.dec_n_points,
            num_feature_levels: self.num_feature_levels,
            max_text_len: self.max_text_len,
            activation_function: self.activation,
            layer_norm_eps: self.layer_norm_eps,
            positional_embedding_temperature: self.temperature,
            embedding_init_target: self.embed_init_tgt,
            two_stage_bbox_embed_share: self.two_stage_bbox_embed_share,
            decoder_bbox_embed_share: self.dec_pred_bbox_embed_share,
            dropout: self.dropout,
            text_enhancer_dropout: t.dropout,
            fusion_dropout: f.dropout,
            fusion_droppath: f.drop_path,
            semantics: Semantics::Original,
            special_tokens: self.delimiter_token_ids,
            ..Config::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_training_is_the_originals_whatever_file_the_checkpoint_has() {
        let hf = Config::default();
        assert_eq!((hf.semantics, hf.dropout), (Semantics::Hf, 0.1));
        let trained = hf.for_training();
        assert_eq!((trained.semantics, trained.dropout), (Semantics::Original, 0.));
        assert_eq!(trained.fusion_droppath, hf.fusion_droppath);
        let own = Config { dropout: 0.2, ..Config::original_swin_t() };
        assert_eq!(own.for_training().dropout, 0.2);
    }
}
