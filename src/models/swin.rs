//! Swin Transformer (Liu et al. 2021) as a detection backbone: any picture size (padding right
//! and bottom), windows and shifts kept even where a map is smaller than a window, several
//! stages returned through a LayerNorm each.
//!
//! Weight names as in HF's `SwinBackbone` (`embeddings.…`, `encoder.layers.…`,
//! `hidden_states_norms.stageN.…`). `swin.layernorm.*`, which HF stores, is used by nobody.

use crate::nn::rows::RowMap;
use crate::nn::stochastic::{TrainCtx, drop_path, dropout};
use crate::nn::window::{Regions, window_attention};
use crate::nn::{self, LayerNorm, Linear};
use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Mirrors the checkpoint's JSON; defaults are Swin-T's, with the stages a detector uses.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    pub patch_size: usize,
    pub num_channels: usize,
    pub embed_dim: usize,
    pub depths: Vec<usize>,
    pub num_heads: Vec<usize>,
    pub window_size: usize,
    pub mlp_ratio: f64,
    pub qkv_bias: bool,
    pub layer_norm_eps: f64,
    pub hidden_act: String,
    pub use_absolute_embeddings: bool,
    pub hidden_dropout_prob: f64,
    pub attention_probs_dropout_prob: f64,
    /// Stochastic depth of the last block; earlier ones rise to it linearly from 0.
    pub drop_path_rate: f64,
    /// Stages returned, counted from 1.
    pub out_indices: Vec<usize>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            patch_size: 4,
            num_channels: 3,
            embed_dim: 96,
            depths: vec![2, 2, 6, 2],
            num_heads: vec![3, 6, 12, 24],
            window_size: 7,
            mlp_ratio: 4.,
            qkv_bias: true,
            layer_norm_eps: 1e-5,
            hidden_act: "gelu".into(),
            use_absolute_embeddings: false,
            hidden_dropout_prob: 0.,
            attention_probs_dropout_prob: 0.,
            drop_path_rate: 0.1,
            out_indices: vec![2, 3, 4],
        }
    }
}

impl Config {
    /// Channels of the maps that the backbone returns.
    pub fn out_channels(&self) -> Vec<usize> {
        self.out_indices.iter().map(|s| self.embed_dim << (s - 1)).collect()
    }

    fn check(&self) -> Result<()> {
        let stages = self.depths.len();
        if stages == 0 || self.num_heads.len() != stages {
            candle_core::bail!("swin: {stages} depths, {} num_heads", self.num_heads.len())
        }
        if self.out_indices.iter().any(|&i| i == 0 || i > stages) {
            candle_core::bail!("swin: out_indices {:?} name no stage in 1..={stages}", self.out_indices)
        }
        for (i, &h) in self.num_heads.iter().enumerate() {
            if h == 0 || !(self.embed_dim << i).is_multiple_of(h) {
                candle_core::bail!("swin: stage {} has {} channels for {h} heads", i + 1, self.embed_dim << i)
            }
        }
        if self.hidden_act != "gelu" || self.use_absolute_embeddings || self.attention_probs_dropout_prob > 0.
        {
            candle_core::bail!(
                "swin: only hidden_act \"gelu\", use_absolute_embeddings false and \
                 attention_probs_dropout_prob 0 are supported"
            )
        }
        Ok(())
    }
}

/// Tokens of a feature map, `[batch, height · width, channels]`.
#[derive(Clone, Debug)]
pub struct FeatureMap {
    pub tokens: Tensor,
    pub height: usize,
    pub width: usize,
}

impl FeatureMap {
    /// `[batch, channels, height, width]`.
    pub fn nchw(&self) -> Result<Tensor> {
        let (b, _, c) = self.tokens.dims3()?;
        self.tokens.transpose(1, 2)?.reshape((b, c, self.height, self.width))
    }
}

fn dense(inp: usize, out: usize, bias: bool, vb: VarBuilder) -> Result<Linear> {
    let weight = vb.get_with_hints((out, inp), "weight", Init::Randn { mean: 0., stdev: 0.02 })?;
    let bias = if bias { Some(vb.get_with_hints(out, "bias", Init::Const(0.))?) } else { None };
    Ok(Linear::new(weight, bias))
}

/// Which token goes where when a map of a given size is cut into windows.
struct Windows {
    map: RowMap,
    regions: Option<Regions>,
    tokens: usize,
}

impl Windows {
    fn new(height: usize, width: usize, size: usize, shift: usize) -> Result<Self> {
        let (hp, wp) = (height.next_multiple_of(size), width.next_multiple_of(size));
        let (mut from, mut regions) = (Vec::with_capacity(hp * wp), Vec::with_capacity(hp * wp));
        // Position along a padded axis → which of the three parts that the cyclic shift makes.
        let part = |p: usize, len: usize| (p >= len - size) as u8 + (p >= len - shift) as u8;
        for window in 0..hp / size * (wp / size) {
            let (wy, wx) = (window / (wp / size), window % (wp / size));
            for token in 0..size * size {
                let (y, x) = (wy * size + token / size, wx * size + token % size);
                let (sy, sx) = ((y + shift) % hp, (x + shift) % wp);
                from.push((sy < height && sx < width).then_some(sy * width + sx));
                regions.push(part(y, hp) * 3 + part(x, wp));
            }
        }
        let regions = (shift > 0).then(|| regions.into());
        Ok(Self { map: RowMap::new(from, height * width)?, regions, tokens: size * size })
    }
}

#[derive(Clone, Debug)]
struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    bias_table: Tensor,
    bias_index: Tensor,
}

impl Attention {
    fn new(dim: usize, heads: usize, cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let (w, s) = (cfg.window_size, vb.pp("self"));
        let n = w * w;
        let index: Vec<u32> = (0..n * n)
            .map(|i| {
                let (a, b) = (i / n, i % n);
                let (dy, dx) = (a / w + w - 1 - b / w, a % w + w - 1 - b % w);
                (dy * (2 * w - 1) + dx) as u32
            })
            .collect();
        let table = (2 * w - 1) * (2 * w - 1);
        Ok(Self {
            query: dense(dim, dim, cfg.qkv_bias, s.pp("query"))?,
            key: dense(dim, dim, cfg.qkv_bias, s.pp("key"))?,
            value: dense(dim, dim, cfg.qkv_bias, s.pp("value"))?,
            output: dense(dim, dim, true, vb.pp("output.dense"))?,
            bias_table: s.get_with_hints(
                (table, heads),
                "relative_position_bias_table",
                Init::Randn { mean: 0., stdev: 0.02 },
            )?,
            bias_index: Tensor::from_vec(index, n * n, s.device())?,
        })
    }

    fn forward(&self, x: &Tensor, windows: &Windows) -> Result<Tensor> {
        let (b, _, c) = x.dims3()?;
        let n = windows.tokens;
        let parts = [&self.query, &self.key, &self.value];
        let weight = Tensor::cat(&[parts[0].weight()?, parts[1].weight()?, parts[2].weight()?], 0)?;
        let bias = match parts.map(Linear::bias) {
            [Some(q), Some(k), Some(v)] => Some(Tensor::cat(&[q, k, v], 0)?),
            _ => None,
        };
        let qkv = Linear::new(weight, bias).forward(&windows.map.apply(x)?)?.reshape(((), n, 3 * c))?;
        let heads = self.bias_table.dim(1)?;
        let bias = self.bias_table.index_select(&self.bias_index, 0)?.t()?.reshape((heads, n, n))?;
        let y = window_attention(&qkv, &bias, windows.regions.as_ref())?;
        self.output.forward(&windows.map.transpose().apply(&y.reshape((b, (), c))?)?)
    }
}

#[derive(Clone, Debug)]
struct Block {
    attention: Attention,
    norm_before: LayerNorm,
    norm_after: LayerNorm,
    intermediate: Linear,
    output: Linear,
    shift: usize,
    dropout: f64,
    drop_path: f64,
}

impl Block {
    fn new(
        dim: usize,
        heads: usize,
        shift: usize,
        drop_path: f64,
        cfg: &Config,
        vb: VarBuilder,
    ) -> Result<Self> {
        let hidden = (dim as f64 * cfg.mlp_ratio) as usize;
        Ok(Self {
            attention: Attention::new(dim, heads, cfg, vb.pp("attention"))?,
            norm_before: nn::layer_norm(dim, cfg.layer_norm_eps, vb.pp("layernorm_before"))?,
            norm_after: nn::layer_norm(dim, cfg.layer_norm_eps, vb.pp("layernorm_after"))?,
            intermediate: dense(dim, hidden, true, vb.pp("intermediate.dense"))?,
            output: dense(hidden, dim, true, vb.pp("output.dense"))?,
            shift,
            dropout: cfg.hidden_dropout_prob,
            drop_path,
        })
    }

    fn forward(&self, x: &Tensor, windows: &Windows, train: &mut Option<&mut TrainCtx>) -> Result<Tensor> {
        let y = self.attention.forward(&self.norm_before.forward(x)?, windows)?;
        let x = (x + drop_path(&dropout(&y, self.dropout, train)?, self.drop_path, train)?)?;
        let y = self.intermediate.forward_act(&self.norm_after.forward(&x)?, nn::Act::Gelu)?;
        let y = dropout(&self.output.forward(&y)?, self.dropout, train)?;
        x + drop_path(&y, self.drop_path, train)?
    }
}

/// 2 × 2 neighbours become one token of twice the channels.
#[derive(Clone, Debug)]
struct Merging {
    norm: LayerNorm,
    reduction: Linear,
}

impl Merging {
    fn forward(&self, x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
        let (b, _, c) = x.dims3()?;
        let (h, w) = (height.div_ceil(2), width.div_ceil(2));
        let from = (0..h * w * 4).map(|i| {
            // Order of the four: (0,0), (1,0), (0,1), (1,1) as (row, column).
            let (y, x) = (i / 4 / w * 2 + i % 2, i / 4 % w * 2 + i % 4 / 2);
            (y < height && x < width).then_some(y * width + x)
        });
        let x = RowMap::new(from, height * width)?.apply(x)?.reshape((b, h * w, 4 * c))?;
        self.reduction.forward(&self.norm.forward(&x)?)
    }
}

#[derive(Clone, Debug)]
struct Stage {
    blocks: Vec<Block>,
    merging: Option<Merging>,
    norm: Option<LayerNorm>,
}

#[derive(Clone, Debug)]
pub struct Swin {
    projection: Linear,
    norm: LayerNorm,
    stages: Vec<Stage>,
    cfg: Config,
}

/// LayerNorms outside the blocks have PyTorch's default, whatever the config says.
const EPS: f64 = 1e-5;

impl Swin {
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        cfg.check()?;
        super::check_layers("swin", cfg.depths.iter().fold(0, |all, &depth| all.saturating_add(depth)))?;
        let (p, d) = (cfg.patch_size, cfg.embed_dim);
        let e = vb.pp("embeddings");
        let proj = e.pp("patch_embeddings.projection");
        let init = Init::Randn { mean: 0., stdev: 0.02 };
        let weight = proj.get_with_hints((d, cfg.num_channels, p, p), "weight", init)?;
        let bias = proj.get_with_hints(d, "bias", Init::Const(0.))?;
        // Non-overlapping patches: the convolution is a linear layer on (y, x, channel) … of a patch.
        let projection = Linear::new(weight.reshape((d, ()))?, Some(bias));
        let blocks: usize = cfg.depths.iter().sum();
        let mut done = 0;
        let mut stages = Vec::new();
        for (i, (&depth, &heads)) in cfg.depths.iter().zip(&cfg.num_heads).enumerate() {
            let (dim, vl) = (d << i, vb.pp("encoder.layers").pp(i));
            let layers = (0..depth)
                .map(|j| {
                    let rate = cfg.drop_path_rate * (done + j) as f64 / (blocks - 1).max(1) as f64;
                    let shift = if j % 2 == 0 { 0 } else { cfg.window_size / 2 };
                    Block::new(dim, heads, shift, rate, cfg, vl.pp("blocks").pp(j))
                })
                .collect::<Result<_>>()?;
            done += depth;
            let merging = if i + 1 < cfg.depths.len() {
                let vd = vl.pp("downsample");
                Some(Merging {
                    norm: nn::layer_norm(4 * dim, EPS, vd.pp("norm"))?,
                    reduction: dense(4 * dim, 2 * dim, false, vd.pp("reduction"))?,
                })
            } else {
                None
            };
            let norm = if cfg.out_indices.contains(&(i + 1)) {
                let vn = vb.pp("hidden_states_norms").pp(format!("stage{}", i + 1));
                Some(nn::layer_norm(dim, EPS, vn)?)
            } else {
                None
            };
            stages.push(Stage { blocks: layers, merging, norm });
        }
        Ok(Self { projection, norm: nn::layer_norm(d, EPS, e.pp("norm"))?, stages, cfg: cfg.clone() })
    }

    /// `[batch, channels, height, width]`, normalised → tokens of patches.
    pub fn embed(&self, pixels: &Tensor) -> Result<FeatureMap> {
        let (b, c, height, width) = pixels.dims4()?;
        let p = self.cfg.patch_size;
        let (h, w) = (height.div_ceil(p), width.div_ceil(p));
        let pixels = pixels.pad_with_zeros(3, 0, w * p - width)?.pad_with_zeros(2, 0, h * p - height)?;
        let patches = pixels.reshape(&[b, c, h, p, w, p])?.permute([0, 2, 4, 1, 3, 5])?;
        let tokens = self.projection.forward(&patches.reshape((b, h * w, c * p * p))?)?;
        Ok(FeatureMap { tokens: self.norm.forward(&tokens)?, height: h, width: w })
    }

    /// The maps of `out_indices`, finest first. Stage i has stride `patch_size · 2^(i−1)`, rounded up.
    pub fn forward(&self, pixels: &Tensor, mut train: Option<&mut TrainCtx>) -> Result<Vec<FeatureMap>> {
        let FeatureMap { tokens: mut x, mut height, mut width } = self.embed(pixels)?;
        x = dropout(&x, self.cfg.hidden_dropout_prob, &mut train)?;
        let mut out = Vec::new();
        for stage in &self.stages {
            let size = self.cfg.window_size;
            let plain = Arc::new(Windows::new(height, width, size, 0)?);
            let shifted = Arc::new(Windows::new(height, width, size, size / 2)?);
            for block in &stage.blocks {
                let windows = if block.shift > 0 { &shifted } else { &plain };
                x = match &mut train {
                    None => block.forward(&x, windows, &mut None)?,
                    Some(ctx) => {
                        let (block, windows) = (block.clone(), windows.clone());
                        ctx.part(&[&x], move |x, train| block.forward(&x[0], &windows, train))?
                    }
                };
            }
            if let Some(norm) = &stage.norm {
                out.push(FeatureMap { tokens: norm.forward(&x)?, height, width });
            }
            if let Some(merging) = &stage.merging {
                x = merging.forward(&x, height, width)?;
                (height, width) = (height.div_ceil(2), width.div_ceil(2));
            }
        }
        Ok(out)
    }
}
