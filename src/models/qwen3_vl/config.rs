//! `config.json` of a Qwen3-VL checkpoint, in the hub's or in transformers 5's spelling.

use crate::models::qwen3;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RawConfig")]
pub struct Config {
    pub text_config: TextConfig,
    pub vision_config: VisionConfig,
    pub image_token_id: u32,
    pub vision_start_token_id: u32,
    pub vision_end_token_id: u32,
    /// Always the same as the text config's.
    pub tie_word_embeddings: bool,
}

/// The decoder's config and how it mixes three positions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TextConfig {
    #[serde(flatten)]
    pub decoder: qwen3::Config,
    pub rope_scaling: Mrope,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mrope {
    /// How many of the rotary frequencies follow time, height and width.
    pub mrope_section: [usize; 3],
    /// Frequencies of the three take turns (Qwen3-VL); the blocked order is not supported.
    #[serde(default = "yes")]
    pub mrope_interleaved: bool,
    #[serde(default = "default_rope", alias = "type")]
    pub rope_type: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VisionConfig {
    pub depth: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_heads: usize,
    pub in_channels: usize,
    pub patch_size: usize,
    pub temporal_patch_size: usize,
    pub spatial_merge_size: usize,
    /// Width of the text decoder.
    pub out_hidden_size: usize,
    /// A square number: the learned grid of position embeddings.
    pub num_position_embeddings: usize,
    /// Blocks after which a feature is taken for the first decoder layers.
    pub deepstack_visual_indexes: Vec<usize>,
    #[serde(default = "default_act")]
    pub hidden_act: String,
}

impl VisionConfig {
    /// Values of one patch in the processor's output.
    pub fn patch_len(&self) -> usize {
        self.in_channels * self.temporal_patch_size * self.patch_size * self.patch_size
    }

    /// Side of the grid of position embeddings.
    pub fn grid_side(&self) -> usize {
        self.num_position_embeddings.isqrt()
    }

    fn check(&self) -> Result<(), String> {
        if self.grid_side().pow(2) != self.num_position_embeddings {
            return Err(format!(
                "num_position_embeddings {} is not a square number",
                self.num_position_embeddings
            ));
        }
        if self.num_heads == 0 || !self.hidden_size.is_multiple_of(4 * self.num_heads) {
            let (h, n) = (self.hidden_size, self.num_heads);
            return Err(format!(
                "hidden_size {h} does not give {n} heads a width that is a multiple of 4 (2-D rotary)"
            ));
        }
        if self.patch_len() == 0 || self.spatial_merge_size == 0 {
            return Err("patch, channel and merge sizes must be positive".into());
        }
        if let Some(i) = self.deepstack_visual_indexes.iter().find(|i| **i >= self.depth) {
            return Err(format!("deepstack_visual_indexes holds {i}, but depth is {}", self.depth));
        }
        if self.hidden_act != "gelu_pytorch_tanh" {
            return Err(format!(
                "hidden_act {:?} is not supported, only \"gelu_pytorch_tanh\"",
                self.hidden_act
            ));
        }
        Ok(())
    }
}

fn yes() -> bool {
    true
}

fn default_rope() -> String {
    "default".into()
}

fn default_act() -> String {
    "gelu_pytorch_tanh".into()
}

#[derive(Deserialize)]
struct RawConfig {
    text_config: serde_json::Value,
    vision_config: VisionConfig,
    image_token_id: u32,
    vision_start_token_id: u32,
    vision_end_token_id: u32,
    tie_word_embeddings: Option<bool>,
}

impl TryFrom<RawConfig> for Config {
    type Error = String;

    fn try_from(r: RawConfig) -> Result<Self, String> {
        let text = |e: serde_json::Error| format!("text_config: {e}");
        let mut decoder: qwen3::Config = serde_json::from_value(r.text_config.clone()).map_err(text)?;
        if let Some(tied) = r.tie_word_embeddings {
            decoder.tie_word_embeddings = tied;
        }
        let rope = ["rope_parameters", "rope_scaling"]
            .into_iter()
            .map(|k| &r.text_config[k])
            .find(|v| !v["mrope_section"].is_null())
            .ok_or("text_config: neither rope_parameters nor rope_scaling has an mrope_section")?;
        let rope_scaling: Mrope = serde_json::from_value(rope.clone()).map_err(text)?;
        if !rope_scaling.mrope_interleaved {
            return Err("text_config: only interleaved M-RoPE is supported".into());
        }
        let section = rope_scaling.mrope_section;
        if section.iter().sum::<usize>() != decoder.head_dim / 2 {
            return Err(format!(
                "text_config: mrope_section {section:?} does not add up to head_dim / 2 = {}",
                decoder.head_dim / 2
            ));
        }
        r.vision_config.check().map_err(|e| format!("vision_config: {e}"))?;
        if r.vision_config.out_hidden_size != decoder.hidden_size {
            return Err(format!(
                "vision_config.out_hidden_size {} differs from text_config.hidden_size {}",
                r.vision_config.out_hidden_size, decoder.hidden_size
            ));
        }
        if r.vision_config.deepstack_visual_indexes.len() > decoder.num_hidden_layers {
            return Err("more deepstack features than decoder layers".into());
        }
        Ok(Self {
            tie_word_embeddings: decoder.tie_word_embeddings,
            text_config: TextConfig { decoder, rope_scaling },
            vision_config: r.vision_config,
            image_token_id: r.image_token_id,
            vision_start_token_id: r.vision_start_token_id,
            vision_end_token_id: r.vision_end_token_id,
        })
    }
}
