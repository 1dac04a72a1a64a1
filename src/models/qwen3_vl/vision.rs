//! Qwen3-VL's vision tower: patches of pictures of any size to decoder embeddings.
//!
//! Patches arrive in the processor's order: 2×2 (merge × merge) neighbours are consecutive, so that
//! merging is a reshape. Each frame attends to itself only.

use super::config::VisionConfig;
use crate::nn::{self, LayerNorm, Linear, Mask};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// Patches of a picture in time, height and width (time is 1 for pictures).
pub type Grid = [usize; 3];

const EPS: f64 = 1e-6;

/// Theta of the 2-D rotary angles; not in the hub's configs.
const ROPE_THETA: f32 = 10_000.;

#[derive(Clone, Debug)]
struct Block {
    norm1: LayerNorm,
    norm2: LayerNorm,
    qkv: Linear,
    proj: Linear,
    fc1: Linear,
    fc2: Linear,
    heads: usize,
}

impl Block {
    fn new(cfg: &VisionConfig, vb: VarBuilder) -> Result<Self> {
        let h = cfg.hidden_size;
        Ok(Self {
            norm1: nn::layer_norm(h, EPS, vb.pp("norm1"))?,
            norm2: nn::layer_norm(h, EPS, vb.pp("norm2"))?,
            qkv: nn::linear(h, 3 * h, vb.pp("attn.qkv"))?,
            proj: nn::linear(h, h, vb.pp("attn.proj"))?,
            fc1: nn::linear(h, cfg.intermediate_size, vb.pp("mlp.linear_fc1"))?,
            fc2: nn::linear(cfg.intermediate_size, h, vb.pp("mlp.linear_fc2"))?,
            heads: cfg.num_heads,
        })
    }

    /// `x` `[patches, hidden]`; `frames` keeps each frame's patches to themselves.
    fn forward(&self, x: &Tensor, cos: &Tensor, sin: &Tensor, frames: &Mask) -> Result<Tensor> {
        let (n, h) = x.dims2()?;
        let qkv = self.qkv.forward(&self.norm1.forward(x)?)?.reshape((1, n, 3 * h))?;
        let part = |i: usize| qkv.narrow(2, i * h, h)?.contiguous();
        let (q, k, v) = (nn::rope(&part(0)?, cos, sin)?, nn::rope(&part(1)?, cos, sin)?, part(2)?);
        let scale = 1. / ((h / self.heads) as f64).sqrt();
        let o = nn::attention_packed(&q, &k, &v, self.heads, self.heads, scale, frames)?.reshape((n, h))?;
        let x = (x + self.proj.forward(&o)?)?;
        let y = self.fc2.forward(&nn::gelu_tanh(&self.fc1.forward(&self.norm2.forward(&x)?)?)?)?;
        x + y
    }
}

/// Joins merge × merge patches into one decoder embedding.
#[derive(Clone, Debug)]
struct Merger {
    norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    /// Width of the joined patches.
    joined: usize,
    /// The norm is over the joined patches (deepstack) or over each patch (the last merger).
    norm_joined: bool,
}

impl Merger {
    fn new(cfg: &VisionConfig, norm_joined: bool, vb: VarBuilder) -> Result<Self> {
        let joined = cfg.hidden_size * cfg.spatial_merge_size.pow(2);
        let norm = if norm_joined { joined } else { cfg.hidden_size };
        Ok(Self {
            norm: nn::layer_norm(norm, EPS, vb.pp("norm"))?,
            fc1: nn::linear(joined, joined, vb.pp("linear_fc1"))?,
            fc2: nn::linear(joined, cfg.out_hidden_size, vb.pp("linear_fc2"))?,
            joined,
            norm_joined,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let join = |x: &Tensor| x.reshape(((), self.joined));
        let x = if self.norm_joined { self.norm.forward(&join(x)?)? } else { join(&self.norm.forward(x)?)? };
        self.fc2.forward(&nn::gelu(&self.fc1.forward(&x)?)?)
    }
}

/// What the tower says of pictures, one row per decoder token, picture after picture.
#[derive(Clone, Debug)]
pub struct Features {
    /// `[tokens, out_hidden]`, in place of the picture tokens' embeddings.
    pub embeds: Tensor,
    /// `[tokens, out_hidden]` each: the i-th is added after decoder layer i.
    pub deepstack: Vec<Tensor>,
    /// The last block's output, before merging: `[patches, hidden]`.
    pub last_hidden: Tensor,
}

impl Features {
    /// The features of several sets of pictures, one after the other.
    pub fn cat(parts: &[&Features]) -> Result<Self> {
        let join =
            |f: &dyn Fn(&Features) -> Tensor| Tensor::cat(&parts.iter().map(|p| f(p)).collect::<Vec<_>>(), 0);
        let depth = parts.first().map_or(0, |p| p.deepstack.len());
        Ok(Self {
            embeds: join(&|p| p.embeds.clone())?,
            deepstack: (0..depth).map(|i| join(&|p| p.deepstack[i].clone())).collect::<Result<_>>()?,
            last_hidden: join(&|p| p.last_hidden.clone())?,
        })
    }
}

/// The tower; weights under `visual`.
#[derive(Clone, Debug)]
pub struct VisionTower {
    cfg: VisionConfig,
    patch_embed: Linear,
    pos_embed: Tensor,
    blocks: Vec<Block>,
    merger: Merger,
    deepstack: Vec<Merger>,
}

impl VisionTower {
    pub fn new(cfg: &VisionConfig, vb: VarBuilder) -> Result<Self> {
        crate::models::check_layers("qwen3-vl", cfg.depth)?;
        let h = cfg.hidden_size;
        let proj = vb.pp("patch_embed.proj");
        let kernel = (h, cfg.in_channels, cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size);
        let bound = 1. / (cfg.patch_len() as f64).sqrt();
        let uniform = Init::Uniform { lo: -bound, up: bound };
        // The kernel is as large as its stride: the 3-D convolution is a linear layer on patches.
        let weight = proj.get_with_hints(kernel, "weight", uniform)?.reshape((h, cfg.patch_len()))?;
        let patch_embed = Linear::new(weight, Some(proj.get_with_hints(h, "bias", uniform)?));
        let normal = Init::Randn { mean: 0., stdev: 0.02 };
        Ok(Self {
            patch_embed,
            pos_embed: vb.get_with_hints((cfg.num_position_embeddings, h), "pos_embed.weight", normal)?,
            blocks: (0..cfg.depth).map(|i| Block::new(cfg, vb.pp("blocks").pp(i))).collect::<Result<_>>()?,
            merger: Merger::new(cfg, false, vb.pp("merger"))?,
            deepstack: (0..cfg.deepstack_visual_indexes.len())
                .map(|i| Merger::new(cfg, true, vb.pp("deepstack_merger_list").pp(i)))
                .collect::<Result<_>>()?,
            cfg: cfg.clone(),
        })
    }

    /// Patches `[patches, channels · frames · side · side]` of pictures with these grids.
    pub fn forward(&self, patches: &Tensor, grids: &[Grid]) -> Result<Features> {
        let m = self.cfg.spatial_merge_size;
        let total: usize = grids.iter().map(|g| g.iter().product::<usize>()).sum();
        if patches.dim(0)? != total || total == 0 {
            candle_core::bail!("vision: {:?} patches for grids {grids:?}", patches.shape())
        }
        if let Some(g) = grids.iter().find(|g| g[1] % m != 0 || g[2] % m != 0) {
            candle_core::bail!("vision: grid {g:?} is not a multiple of the merge size {m}")
        }
        let device = patches.device();
        let mut x = (self.embed_patches(patches)? + self.positions(grids, device)?)?;
        let angles = self.angles(grids, device)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let frames = Mask::Segments(grids.iter().flat_map(|g| vec![g[1] * g[2]; g[0]]).collect());
        let mut deepstack = vec![None; self.deepstack.len()];
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, &cos, &sin, &frames)?;
            if let Some(at) = self.cfg.deepstack_visual_indexes.iter().position(|d| *d == i) {
                deepstack[at] = Some(self.deepstack[at].forward(&x)?);
            }
        }
        Ok(Features {
            embeds: self.merger.forward(&x)?,
            deepstack: deepstack.into_iter().flatten().collect(),
            last_hidden: x,
        })
    }

    /// Patches to `[patches, hidden]`, before positions.
    pub fn embed_patches(&self, patches: &Tensor) -> Result<Tensor> {
        self.patch_embed.forward(&patches.to_dtype(self.pos_embed.dtype())?)
    }

    /// The learned grid, interpolated bilinearly with aligned corners: `[patches, hidden]`.
    fn positions(&self, grids: &[Grid], device: &Device) -> Result<Tensor> {
        let side = self.cfg.grid_side();
        // Where point i of n lies on the learned grid: lower neighbour, upper neighbour, fraction.
        let place = |i: usize, n: usize| {
            let at = if n > 1 { i as f32 * ((side - 1) as f32 / (n - 1) as f32) } else { 0. };
            let lo = (at as usize).min(side - 1);
            (lo, (lo + 1).min(side - 1), at - lo as f32)
        };
        let mut ids: [Vec<u32>; 4] = Default::default();
        let mut weights: [Vec<f32>; 4] = Default::default();
        self.each_patch(grids, |row, col, [_, h, w]| {
            let (y0, y1, dy) = place(row, h);
            let (x0, x1, dx) = place(col, w);
            let corners = [
                (y0, x0, (1. - dy) * (1. - dx)),
                (y0, x1, (1. - dy) * dx),
                (y1, x0, dy * (1. - dx)),
                (y1, x1, dy * dx),
            ];
            for (i, (y, x, weight)) in corners.into_iter().enumerate() {
                ids[i].push((y * side + x) as u32);
                weights[i].push(weight);
            }
        });
        let mut sum: Option<Tensor> = None;
        for (ids, weights) in ids.into_iter().zip(weights) {
            let n = ids.len();
            let rows = self.pos_embed.index_select(&Tensor::from_vec(ids, n, device)?, 0)?;
            let weighted =
                rows.broadcast_mul(&Tensor::from_vec(weights, (n, 1), device)?.to_dtype(rows.dtype())?)?;
            sum = Some(match sum {
                Some(s) => (s + weighted)?,
                None => weighted,
            });
        }
        sum.ok_or_else(|| candle_core::Error::Msg("vision: no patches".into()))
    }

    /// 2-D rotary angles `[1, patches, head_dim / 2]`: first by row, then by column.
    fn angles(&self, grids: &[Grid], device: &Device) -> Result<Tensor> {
        let quarter = self.cfg.hidden_size / self.cfg.num_heads / 4;
        let freq: Vec<f32> = (0..quarter).map(|i| 1. / ROPE_THETA.powf(i as f32 / quarter as f32)).collect();
        let mut angles = Vec::new();
        self.each_patch(grids, |row, col, _| {
            angles.extend(freq.iter().map(|f| row as f32 * f));
            angles.extend(freq.iter().map(|f| col as f32 * f));
        });
        Tensor::from_vec(angles, (1, (), 2 * quarter), device)?.to_dtype(DType::F32)
    }

    /// Calls `f(row, column, grid)` for each patch in the processor's order.
    fn each_patch(&self, grids: &[Grid], mut f: impl FnMut(usize, usize, Grid)) {
        let m = self.cfg.spatial_merge_size;
        for &grid in grids {
            let [t, h, w] = grid;
            for _ in 0..t {
                for (by, bx) in (0..h / m).flat_map(|y| (0..w / m).map(move |x| (y, x))) {
                    for (y, x) in (0..m).flat_map(|y| (0..m).map(move |x| (y, x))) {
                        f(by * m + y, bx * m + x, grid);
                    }
                }
            }
        }
    }
}
