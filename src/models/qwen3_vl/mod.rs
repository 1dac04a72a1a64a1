//! Qwen3-VL: pictures through a [vision tower](vision), in place of picture tokens, into the Qwen3
//! decoder, whose rotary positions have three parts (time, height, width).
//!
//! Pictures only, no videos. Everything is differentiable. Weight names: `model.visual.…`,
//! `model.language_model.…`, `lm_head.weight`.

mod config;
mod positions;
mod preprocess;
mod vision;

pub use config::{Config, Mrope, TextConfig, VisionConfig};
pub use positions::{Position, token_positions};
pub use preprocess::{Pictures, Processor};
pub use vision::{Features, Grid, VisionTower};

use crate::models::qwen3::{KvCache, Qwen3, Rope};
use crate::nn::Mask;
use candle_core::{Device, Result, Tensor};
use candle_nn::VarBuilder;

/// Vision tower and decoder.
#[derive(Clone, Debug)]
pub struct Qwen3Vl {
    cfg: Config,
    visual: VisionTower,
    decoder: Qwen3,
    device: Device,
}

/// Rows of token ids with their pictures worked in, ready for the decoder.
#[derive(Clone, Debug)]
pub struct Embedded {
    /// `[batch, seq, hidden]`.
    pub x: Tensor,
    /// `[batch, seq, hidden]` each, zero at text tokens; the i-th is added after layer i.
    pub deepstack: Vec<Tensor>,
}

impl Qwen3Vl {
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let head = (!cfg.tie_word_embeddings).then(|| vb.pp("lm_head"));
        Ok(Self {
            visual: VisionTower::new(&cfg.vision_config, vb.pp("model.visual"))?,
            decoder: Qwen3::with_prefix(&cfg.text_config.decoder, vb.pp("model.language_model"), head)?,
            device: vb.device().clone(),
            cfg: cfg.clone(),
        })
    }

    pub fn config(&self) -> &Config {
        &self.cfg
    }

    pub fn decoder(&self) -> &Qwen3 {
        &self.decoder
    }

    pub fn visual(&self) -> &VisionTower {
        &self.visual
    }

    /// The tower's features of processed pictures.
    pub fn vision(&self, pictures: &Pictures) -> Result<Features> {
        self.visual.forward(&pictures.patches, &pictures.grids)
    }

    /// Rows of ids (all of one length) → final normed hidden states `[batch, seq, hidden]`, for training
    /// and scoring. `pictures` are those of the rows' picture tokens, row after row. Rows may be filled up on
    /// the right freely: what follows cannot change a causal model's past.
    pub fn forward(&self, ids: &[Vec<u32>], pictures: Option<&Pictures>) -> Result<Tensor> {
        let features = pictures.map(|p| self.vision(p)).transpose()?;
        let embedded = self.embed(ids, features.as_ref())?;
        let mut grids = pictures.map_or(&[][..], |p| &p.grids).iter().copied();
        let positions: Vec<Vec<Position>> =
            ids.iter().map(|row| Ok(self.positions(row, &mut grids)?.0)).collect::<Result<_>>()?;
        let rope = self.rope(&positions, embedded.x.device())?;
        self.forward_embedded(&embedded, &rope, &Mask::causal(), None)
    }

    /// The decoder on embedded rows, deepstack features added on the way.
    pub fn forward_embedded(
        &self,
        rows: &Embedded,
        rope: &Rope,
        mask: &Mask,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let add = |layer: usize, x: &Tensor| rows.deepstack.get(layer).map(|d| x + d).transpose();
        self.decoder.forward_embeds(&rows.x, rope, mask, cache, Some(&add))
    }

    /// `[.., hidden]` → `[.., vocab]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.decoder.logits(hidden)
    }

    /// Embeds rows of ids, picture tokens by `features` in row-major order. There must be as many
    /// of the one as of the other.
    pub fn embed(&self, ids: &[Vec<u32>], features: Option<&Features>) -> Result<Embedded> {
        let (b, s) = (ids.len(), ids.first().map_or(0, Vec::len));
        if let Some(row) = ids.iter().find(|r| r.len() != s) {
            candle_core::bail!("qwen3-vl: rows of {s} and of {} ids in one batch", row.len())
        }
        let flat: Vec<u32> = ids.iter().flatten().copied().collect();
        let slots = flat.iter().filter(|id| **id == self.cfg.image_token_id).count();
        let rows = features.map_or(Ok(0), |f| f.embeds.dim(0))?;
        if slots != rows {
            candle_core::bail!("qwen3-vl: {slots} picture tokens in the prompt, {rows} from the pictures")
        }
        let device = self.device.clone();
        let is_picture: Vec<bool> = flat.iter().map(|id| *id == self.cfg.image_token_id).collect();
        let text = self.decoder.embed(&Tensor::from_vec(flat, (b, s), &device)?)?;
        let (Some(features), true) = (features, slots > 0) else {
            return Ok(Embedded { x: text, deepstack: Vec::new() });
        };
        let h = text.dim(2)?;
        // Row i of the result: the text's row i, or the next row of the features, which stand
        // behind `before` other rows in the table that is selected from.
        let select = |before: &Tensor, text_row: &dyn Fn(usize) -> u32, rows: &Tensor| -> Result<Tensor> {
            let mut next = before.dim(0)? as u32;
            let picks: Vec<u32> = is_picture
                .iter()
                .enumerate()
                .map(|(i, picture)| {
                    if *picture {
                        next += 1;
                        next - 1
                    } else {
                        text_row(i)
                    }
                })
                .collect();
            let picks = Tensor::from_vec(picks, b * s, &device)?;
            Tensor::cat(&[before, rows], 0)?.index_select(&picks, 0)?.reshape((b, s, h))
        };
        let x = select(&text.reshape((b * s, h))?, &|i| i as u32, &features.embeds)?;
        let zero = Tensor::zeros((1, h), text.dtype(), &device)?;
        let deepstack = features.deepstack.iter().map(|d| select(&zero, &|_| 0, d)).collect::<Result<_>>()?;
        Ok(Embedded { x, deepstack })
    }

    /// Positions of one row's tokens and the position after its last one. Takes one grid per
    /// picture from `grids`.
    pub fn positions(
        &self,
        ids: &[u32],
        grids: &mut dyn Iterator<Item = Grid>,
    ) -> Result<(Vec<Position>, u32)> {
        token_positions(ids, self.cfg.image_token_id, self.cfg.vision_config.spatial_merge_size, grids)
    }

    /// Interleaved M-RoPE of rows of positions.
    pub fn rope(&self, positions: &[Vec<Position>], device: &Device) -> Result<Rope> {
        positions::mrope(&self.cfg.text_config, positions, device)
    }
}
