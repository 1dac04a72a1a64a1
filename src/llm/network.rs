//! What the engine generates with: a Qwen3 decoder, alone or behind Qwen3-VL's pictures.

use candle_core::{Device, Result, Tensor};

use super::ChatError;
use super::engine::Job;
use crate::models::qwen3::{self, KvCache, Qwen3, Rope};
use crate::models::qwen3_vl::{Embedded, Features, Pictures, Position, Qwen3Vl};
use crate::nn::Mask;

/// The network to generate with, or to train. Where its parameters are being trained, build it from
/// [`nn::frozen`](crate::nn::frozen()): it shares the values and records no gradients.
#[allow(clippy::large_enum_variant)] // one per engine
pub enum Network {
    Text { model: Qwen3, cfg: qwen3::Config },
    Vision(Qwen3Vl),
}

impl Network {
    /// Rows of ids (of one length, filled up on the right) → final hidden states
    /// `[batch, seq, hidden]`, without a cache and differentiable. `pictures` are the rows', in order.
    pub fn hidden(&self, ids: &[Vec<u32>], pictures: Option<&Pictures>) -> Result<Tensor> {
        match self {
            Self::Vision(m) => m.forward(ids, pictures),
            Self::Text { .. } if pictures.is_some() => candle_core::bail!("this model takes no pictures"),
            Self::Text { model, cfg } => {
                let (b, s, device) = (ids.len(), ids.first().map_or(0, Vec::len), model.device());
                let flat: Vec<u32> = ids.iter().flatten().copied().collect();
                let rope = Rope::from_positions(cfg, &[(0..s as u32).collect()], device)?;
                model.forward(&Tensor::from_vec(flat, (b, s), device)?, &rope, &Mask::causal(), None)
            }
        }
    }

    pub fn decoder(&self) -> &Qwen3 {
        match self {
            Self::Text { model, .. } => model,
            Self::Vision(m) => m.decoder(),
        }
    }

    pub fn config(&self) -> &qwen3::Config {
        match self {
            Self::Text { cfg, .. } => cfg,
            Self::Vision(m) => &m.config().text_config.decoder,
        }
    }

    pub(super) fn positions(&self, job: &Job) -> std::result::Result<(Vec<Position>, u32), ChatError> {
        match self {
            Self::Vision(m) => Ok(m.positions(&job.ids, &mut job.grids.iter().copied())?),
            Self::Text { .. } if job.features.is_some() => {
                Err(ChatError::Request("this model takes no pictures".into()))
            }
            Self::Text { .. } => {
                let n = job.ids.len() as u32;
                Ok(((0..n).map(|p| [p; 3]).collect(), n))
            }
        }
    }

    pub(super) fn rope(&self, rows: &[&[Position]], device: &Device) -> Result<Rope> {
        match self {
            Self::Text { cfg, .. } => {
                let rows: Vec<Vec<u32>> = rows.iter().map(|r| r.iter().map(|p| p[0]).collect()).collect();
                Rope::from_positions(cfg, &rows, device)
            }
            Self::Vision(m) => m.rope(&rows.iter().map(|r| r.to_vec()).collect::<Vec<_>>(), device),
        }
    }

    pub(super) fn embed(
        &self,
        ids: &[Vec<u32>],
        features: Option<&Features>,
        device: &Device,
    ) -> Result<Embedded> {
        match self {
            Self::Vision(m) => m.embed(ids, features),
            Self::Text { model, .. } => {
                let shape = (ids.len(), ids.first().map_or(0, Vec::len));
                let flat: Vec<u32> = ids.iter().flatten().copied().collect();
                Ok(Embedded {
                    x: model.embed(&Tensor::from_vec(flat, shape, device)?)?,
                    deepstack: Vec::new(),
                })
            }
        }
    }

    /// One forward pass over embedded rows; returns the hidden states.
    pub(super) fn forward(
        &self,
        rows: &Embedded,
        rope: &Rope,
        mask: &Mask,
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        let add = |layer: usize, x: &Tensor| rows.deepstack.get(layer).map(|d| x + d).transpose();
        self.decoder().forward_embeds(&rows.x, rope, mask, Some(cache), Some(&add))
    }

    /// Where the first picture begins, else the length.
    pub(super) fn text_len(&self, ids: &[u32]) -> usize {
        match self {
            Self::Text { .. } => ids.len(),
            Self::Vision(m) => {
                let picture = m.config().image_token_id;
                ids.iter().position(|id| *id == picture).unwrap_or(ids.len())
            }
        }
    }
}
