//! DINOv2 vision transformer (Oquab et al. 2023), with or without register tokens.
//!
//! One network, two name sets: HF's (`encoder.layer.0.attention.attention.query`) and the
//! official one (`blocks.0.attn.qkv`), which MoGe's checkpoints use. They also differ in how the
//! position table is interpolated, so that comes with the config. No masked-image modelling,
//! no stochastic depth; pictures of any size that the patch divides.

use crate::nn::{
    self, Act, Filter, LayerNorm, Linear, Mask, Taps, attention_packed, layer_norm, linear, resize_taps,
    swiglu,
};
use candle_core::{D, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

/// Which checkpoint's weight names to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    Hf,
    Official,
}

/// Tensors that checkpoints carry and that inference and fine-tuning never read.
pub const UNUSED: &[&str] = &["mask_token", "embeddings.mask_token"];

/// The network's sizes, whatever file they came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub names: Names,
    pub dim: usize,
    pub layers: usize,
    pub heads: usize,
    pub mlp_ratio: f64,
    pub patch: usize,
    /// Side of the square picture whose patches the position table holds.
    pub image_size: usize,
    pub channels: usize,
    pub eps: f64,
    pub qkv_bias: bool,
    pub layerscale_init: f64,
    pub swiglu: bool,
    pub registers: usize,
    /// Added to the target grid in the interpolation's scale factor (0.1 in the first official
    /// models); 0 interpolates by size.
    pub position_offset: f64,
    pub position_antialias: bool,
}

/// HF's `config.json` of `Dinov2Model` and `Dinov2WithRegistersModel`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HfConfig {
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    #[serde(default = "default_mlp_ratio")]
    pub mlp_ratio: f64,
    pub patch_size: usize,
    pub image_size: usize,
    #[serde(default = "default_channels")]
    pub num_channels: usize,
    #[serde(default = "default_eps")]
    pub layer_norm_eps: f64,
    #[serde(default = "yes")]
    pub qkv_bias: bool,
    #[serde(default = "one")]
    pub layerscale_value: f64,
    #[serde(default)]
    pub use_swiglu_ffn: bool,
    #[serde(default)]
    pub num_register_tokens: usize,
}

fn default_mlp_ratio() -> f64 {
    4.
}
fn default_channels() -> usize {
    3
}
fn default_eps() -> f64 {
    1e-6
}
fn yes() -> bool {
    true
}
fn one() -> f64 {
    1.
}

impl From<HfConfig> for Config {
    fn from(c: HfConfig) -> Self {
        Self {
            names: Names::Hf,
            dim: c.hidden_size,
            layers: c.num_hidden_layers,
            heads: c.num_attention_heads,
            mlp_ratio: c.mlp_ratio,
            patch: c.patch_size,
            image_size: c.image_size,
            channels: c.num_channels,
            eps: c.layer_norm_eps,
            qkv_bias: c.qkv_bias,
            layerscale_init: c.layerscale_value,
            swiglu: c.use_swiglu_ffn,
            registers: c.num_register_tokens,
            position_offset: 0.,
            position_antialias: c.num_register_tokens > 0,
        }
    }
}

/// Constructor arguments of the official `DinoVisionTransformer`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OfficialConfig {
    pub img_size: usize,
    pub patch_size: usize,
    pub embed_dim: usize,
    pub depth: usize,
    pub num_heads: usize,
    #[serde(default = "default_mlp_ratio")]
    pub mlp_ratio: f64,
    #[serde(default = "one")]
    pub init_values: f64,
    #[serde(default)]
    pub num_register_tokens: usize,
    #[serde(default = "default_offset")]
    pub interpolate_offset: f64,
    #[serde(default)]
    pub interpolate_antialias: bool,
    /// `mlp`, `swiglu` or `swiglufused`.
    #[serde(default = "default_ffn")]
    pub ffn_layer: String,
}

fn default_offset() -> f64 {
    0.1
}
fn default_ffn() -> String {
    "mlp".into()
}

impl OfficialConfig {
    /// The released architectures by hub name: `dinov2_vits14`, `dinov2_vitl14_reg`, …
    pub fn released(name: &str) -> Option<Self> {
        let (base, registers) = match name.strip_suffix("_reg") {
            Some(base) => (base, 4),
            None => (name, 0),
        };
        let (embed_dim, depth, num_heads, ffn_layer) = match base {
            "dinov2_vits14" => (384, 12, 6, "mlp"),
            "dinov2_vitb14" => (768, 12, 12, "mlp"),
            "dinov2_vitl14" => (1024, 24, 16, "mlp"),
            "dinov2_vitg14" => (1536, 40, 24, "swiglufused"),
            _ => return None,
        };
        Some(Self {
            img_size: 518,
            patch_size: 14,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio: 4.,
            init_values: 1.,
            num_register_tokens: registers,
            interpolate_offset: if registers > 0 { 0. } else { 0.1 },
            interpolate_antialias: registers > 0,
            ffn_layer: ffn_layer.into(),
        })
    }
}

impl From<OfficialConfig> for Config {
    fn from(c: OfficialConfig) -> Self {
        Self {
            names: Names::Official,
            dim: c.embed_dim,
            layers: c.depth,
            heads: c.num_heads,
            mlp_ratio: c.mlp_ratio,
            patch: c.patch_size,
            image_size: c.img_size,
            channels: 3,
            eps: 1e-6,
            qkv_bias: true,
            layerscale_init: c.init_values,
            swiglu: c.ffn_layer.starts_with("swiglu"),
            registers: c.num_register_tokens,
            position_offset: c.interpolate_offset,
            position_antialias: c.interpolate_antialias,
        }
    }
}

#[derive(Clone, Debug)]
enum Qkv {
    Fused(Linear),
    Split([Linear; 3]),
}

#[derive(Clone, Debug)]
enum Ffn {
    Mlp(Linear, Linear),
    /// `w3(silu(a) · b)` with `[a, b] = w12(x)`.
    SwiGlu(Linear, Linear),
}

#[derive(Clone, Debug)]
struct Block {
    norm1: LayerNorm,
    qkv: Qkv,
    proj: Linear,
    scale1: Tensor,
    norm2: LayerNorm,
    ffn: Ffn,
    scale2: Tensor,
    heads: usize,
}

impl Block {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let d = cfg.dim;
        let hf = cfg.names == Names::Hf;
        let bias = cfg.qkv_bias;
        let (qkv, proj) = if hf {
            let a = vb.pp("attention");
            let part = |n| nn::linear_b(d, d, bias, a.pp("attention").pp(n));
            (Qkv::Split([part("query")?, part("key")?, part("value")?]), linear(d, d, a.pp("output.dense"))?)
        } else {
            let a = vb.pp("attn");
            (Qkv::Fused(nn::linear_b(d, 3 * d, bias, a.pp("qkv"))?), linear(d, d, a.pp("proj"))?)
        };
        let scale = |i: usize| {
            let name = if hf { format!("layer_scale{i}.lambda1") } else { format!("ls{i}.gamma") };
            vb.get_with_hints(d, &name, Init::Const(cfg.layerscale_init))
        };
        let hidden = (d as f64 * cfg.mlp_ratio) as usize;
        let m = vb.pp("mlp");
        let ffn = if cfg.swiglu {
            let hidden = (hidden * 2 / 3).div_ceil(8) * 8;
            let (w12, w3) = if hf { ("weights_in", "weights_out") } else { ("w12", "w3") };
            Ffn::SwiGlu(linear(d, 2 * hidden, m.pp(w12))?, linear(hidden, d, m.pp(w3))?)
        } else {
            Ffn::Mlp(linear(d, hidden, m.pp("fc1"))?, linear(hidden, d, m.pp("fc2"))?)
        };
        Ok(Self {
            norm1: layer_norm(d, cfg.eps, vb.pp("norm1"))?,
            qkv,
            proj,
            scale1: scale(1)?,
            norm2: layer_norm(d, cfg.eps, vb.pp("norm2"))?,
            ffn,
            scale2: scale(2)?,
            heads: cfg.heads,
        })
    }

    fn attend(&self, x: &Tensor) -> Result<Tensor> {
        let d = x.dim(D::Minus1)?;
        let scale = ((d / self.heads) as f64).powf(-0.5);
        let [q, k, v] = match &self.qkv {
            Qkv::Split([q, k, v]) => [q.forward(x)?, k.forward(x)?, v.forward(x)?],
            Qkv::Fused(w) => {
                // Cut the weight, not its product, which is larger.
                let part = |i: usize| -> Result<Tensor> {
                    let bias = w.bias().map(|b| b.narrow(0, i * d, d)).transpose()?;
                    Linear::new(w.weight()?.narrow(0, i * d, d)?, bias).forward(x)
                };
                [part(0)?, part(1)?, part(2)?]
            }
        };
        attention_packed(&q, &k, &v, self.heads, self.heads, scale, &Mask::None)
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.attend(&self.norm1.forward(x)?)?;
        let x = scaled(&self.proj, &self.scale1, &y, x)?;
        let y = self.norm2.forward(&x)?;
        let (last, y) = match &self.ffn {
            Ffn::Mlp(fc1, fc2) => (fc2, fc1.forward_act(&y, Act::Gelu)?),
            Ffn::SwiGlu(w12, w3) => {
                let ab = w12.forward(&y)?.chunk(2, D::Minus1)?;
                (w3, swiglu(&ab[0].contiguous()?, &ab[1].contiguous()?)?)
            }
        };
        scaled(last, &self.scale2, &y, &x)
    }
}

/// `residual + scale · layer(x)`. A linear layer followed by LayerScale is a linear layer: scaling the weight's rows costs
/// less than scaling every token, unless that comes with adding it.
fn scaled(layer: &Linear, scale: &Tensor, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
    if let Some(y) = layer.forward_scaled(x, scale, residual)? {
        return Ok(y);
    }
    let bias = layer.bias().map(|b| b * scale).transpose()?;
    residual + Linear::new(layer.weight()?.broadcast_mul(&scale.unsqueeze(1)?)?, bias).forward(x)?
}

/// A DINOv2 backbone.
#[derive(Clone, Debug)]
pub struct Dinov2 {
    cfg: Config,
    patch_weight: Tensor,
    patch_bias: Tensor,
    cls: Tensor,
    registers: Option<Tensor>,
    positions: Tensor,
    blocks: Vec<Block>,
    norm: LayerNorm,
}

impl Dinov2 {
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        if cfg.heads == 0 || !cfg.dim.is_multiple_of(cfg.heads) {
            candle_core::bail!("dinov2: {} dimensions do not split into {} heads", cfg.dim, cfg.heads)
        }
        if cfg.patch == 0 || cfg.channels == 0 || cfg.image_size < cfg.patch {
            candle_core::bail!(
                "dinov2: pictures of {} pixels and {} channels do not split into patches of {}",
                cfg.image_size,
                cfg.channels,
                cfg.patch
            )
        }
        super::check_layers("dinov2", cfg.layers)?;
        let hf = cfg.names == Names::Hf;
        let (d, side) = (cfg.dim, cfg.image_size / cfg.patch);
        let small = Init::Randn { mean: 0., stdev: 0.02 };
        let e = if hf { vb.pp("embeddings") } else { vb.clone() };
        let p = e.pp(if hf { "patch_embeddings.projection" } else { "patch_embed.proj" });
        let fan_in = cfg.channels * cfg.patch * cfg.patch;
        let bound = 1. / (fan_in as f64).sqrt();
        let uniform = Init::Uniform { lo: -bound, up: bound };
        let registers = match cfg.registers {
            0 => None,
            n => Some(e.get_with_hints((1, n, d), "register_tokens", small)?),
        };
        let blocks = (0..cfg.layers)
            .map(|i| Block::new(cfg, vb.pp(if hf { "encoder.layer" } else { "blocks" }).pp(i)))
            .collect::<Result<_>>()?;
        Ok(Self {
            patch_weight: p.get_with_hints((d, cfg.channels, cfg.patch, cfg.patch), "weight", uniform)?,
            patch_bias: p.get_with_hints(d, "bias", uniform)?,
            cls: e.get_with_hints((1, 1, d), "cls_token", small)?,
            registers,
            positions: e.get_with_hints(
                (1, 1 + side * side, d),
                if hf { "position_embeddings" } else { "pos_embed" },
                small,
            )?,
            blocks,
            norm: layer_norm(d, cfg.eps, vb.pp(if hf { "layernorm" } else { "norm" }))?,
            cfg: cfg.clone(),
        })
    }

    pub fn config(&self) -> &Config {
        &self.cfg
    }

    /// The position table for a grid of patches: `[1, 1 + rows · cols, dim]`, the class token's
    /// first. Differentiable with respect to the table.
    pub fn positions(&self, rows: usize, cols: usize) -> Result<Tensor> {
        let side = self.cfg.image_size / self.cfg.patch;
        if rows == side && cols == side {
            return Ok(self.positions.clone());
        }
        let d = self.cfg.dim;
        let table = self.positions.narrow(1, 1, side * side)?.reshape((side, side, d))?.permute((2, 0, 1))?;
        let filter = Filter::Bicubic { antialias: self.cfg.position_antialias };
        let taps =
            |n: usize| Taps::with_step(filter, side, n, side as f64 / (n as f64 + self.cfg.position_offset));
        let table = resize_taps(&table, taps(rows)?, taps(cols)?)?;
        let table = table.permute((1, 2, 0))?.reshape((1, rows * cols, d))?;
        Tensor::cat(&[&self.positions.narrow(1, 0, 1)?, &table], 1)
    }

    /// Pixels `[batch, channels, h, w]` (normalised) to the first block's input
    /// `[batch, 1 + registers + rows · cols, dim]`.
    pub fn embed(&self, pixels: &Tensor) -> Result<Tensor> {
        self.embed_of(pixels, None)
    }

    /// [`Self::embed`] without the patches whose indices (row by row) are not among `kept`, if that is given.
    fn embed_of(&self, pixels: &Tensor, kept: Option<&[u32]>) -> Result<Tensor> {
        let (b, c, h, w) = pixels.dims4()?;
        let (p, d) = (self.cfg.patch, self.cfg.dim);
        if c != self.cfg.channels || h == 0 || w == 0 || h % p != 0 || w % p != 0 {
            candle_core::bail!(
                "dinov2: expected {} channels and sides that {p} divides, got {c}×{h}×{w}",
                self.cfg.channels
            )
        }
        let (rows, cols) = (h / p, w / p);
        // A convolution whose stride is its kernel is one matrix product over patches.
        let patches = pixels.reshape((b, c, rows, p, cols, p))?.permute((0, 2, 4, 1, 3, 5))?.reshape((
            b,
            rows * cols,
            c * p * p,
        ))?;
        let (mut patches, mut positions) = (patches, self.positions(rows, cols)?);
        if let Some(kept) = kept {
            let device = pixels.device();
            patches = patches.index_select(&Tensor::new(kept, device)?, 1)?;
            let with_cls: Vec<u32> = std::iter::once(0).chain(kept.iter().map(|i| i + 1)).collect();
            positions = positions.index_select(&Tensor::new(with_cls, device)?, 1)?;
        }
        let weight = self.patch_weight.reshape((d, c * p * p))?;
        let x = Linear::new(weight, Some(self.patch_bias.clone())).forward(&patches)?;
        let n = x.dim(1)?;
        let x = Tensor::cat(&[&self.cls.expand((b, 1, d))?.contiguous()?, &x], 1)?;
        let x = x.broadcast_add(&positions)?;
        match &self.registers {
            None => Ok(x),
            Some(r) => {
                let r = r.expand((b, self.cfg.registers, d))?.contiguous()?;
                Tensor::cat(&[&x.narrow(1, 0, 1)?, &r, &x.narrow(1, 1, n)?], 1)
            }
        }
    }

    /// The embedded input and the output of every block, before the last norm.
    pub fn hidden_states(&self, pixels: &Tensor) -> Result<Vec<Tensor>> {
        let mut all = vec![self.embed(pixels)?];
        for block in &self.blocks {
            all.push(block.forward(&all[all.len() - 1])?);
        }
        Ok(all)
    }

    /// `[batch, 1 + registers + rows · cols, dim]`, normed; the class token is the first.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let mut x = self.embed(pixels)?;
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        self.norm.forward(&x)
    }

    /// Normed outputs of the blocks with these indices (from 0, ascending): patch tokens
    /// `[batch, rows · cols, dim]` and class token `[batch, dim]`. With `kept`, only the patches of these
    /// indices (row by row) are looked at: `[batch, kept, dim]`.
    pub fn intermediate(
        &self,
        pixels: &Tensor,
        layers: &[usize],
        kept: Option<&[u32]>,
    ) -> Result<Vec<(Tensor, Tensor)>> {
        let Some(&last) = layers.iter().max() else { return Ok(Vec::new()) };
        if last >= self.blocks.len() || !layers.is_sorted() {
            candle_core::bail!("dinov2: layers {layers:?} of {}", self.blocks.len())
        }
        let mut x = self.embed_of(pixels, kept)?;
        let mut out = Vec::with_capacity(layers.len());
        let skip = 1 + self.cfg.registers;
        for (i, block) in self.blocks[..=last].iter().enumerate() {
            x = block.forward(&x)?;
            if layers.contains(&i) {
                let y = self.norm.forward(&x)?;
                let patches = y.narrow(1, skip, y.dim(1)? - skip)?.contiguous()?;
                out.push((patches, y.narrow(1, 0, 1)?.squeeze(1)?));
            }
        }
        Ok(out)
    }
}
