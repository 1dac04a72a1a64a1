//! Qwen3, the decoder of the planner (and of Qwen3-VL's text side).
//!
//! Grouped-query attention with RMSNorm on queries and keys, rotary positions given explicitly
//! (so left-padded batches and M-RoPE are the caller's positions, nothing else), SwiGLU MLP, tied or
//! untied head. Weights may be packed, as in GGUF files. Not here: sliding windows, YaRN and other
//! rescaled positions; a config that asks for them is an error.

use crate::nn::{self, Embedding, GatedMlp, Linear, Mask, RmsNorm};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

/// `config.json` of a Qwen3 checkpoint, in the hub's or in transformers 5's spelling.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RawConfig")]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub tie_word_embeddings: bool,
    pub attention_bias: bool,
}

impl Config {
    /// Weights of the matrices, which is all but a few.
    pub fn parameters(&self) -> usize {
        let (q, kv) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        let layer = self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size);
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        self.num_hidden_layers * layer + tables * self.vocab_size * self.hidden_size
    }
}

#[derive(Deserialize)]
struct RawConfig {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(default = "default_positions")]
    max_position_embeddings: usize,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_parameters: Option<RopeParameters>,
    rope_scaling: Option<RopeParameters>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
    hidden_act: Option<String>,
}

#[derive(Deserialize)]
struct RopeParameters {
    rope_theta: Option<f64>,
    #[serde(alias = "type")]
    rope_type: Option<String>,
}

fn default_positions() -> usize {
    32_768
}

fn default_eps() -> f64 {
    1e-6
}

impl TryFrom<RawConfig> for Config {
    type Error = String;

    fn try_from(r: RawConfig) -> std::result::Result<Self, String> {
        for p in [&r.rope_parameters, &r.rope_scaling].into_iter().flatten() {
            // "mrope" is how some Qwen-VL configs spell the default angles under 3-D positions.
            match p.rope_type.as_deref() {
                None | Some("default" | "mrope") => {}
                Some(t) => return Err(format!("rope_type {t:?} is not supported, only \"default\"")),
            }
        }
        if r.use_sliding_window {
            return Err("use_sliding_window is not supported".into());
        }
        if let Some(a) = r.hidden_act.as_deref()
            && a != "silu"
        {
            return Err(format!("hidden_act {a:?} is not supported, only \"silu\""));
        }
        let heads = r.num_attention_heads;
        let kv_heads = r.num_key_value_heads.unwrap_or(heads);
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(format!(
                "num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            ));
        }
        let head_dim = r.head_dim.unwrap_or(r.hidden_size / heads);
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(format!("head_dim {head_dim} must be even and positive"));
        }
        let theta = r.rope_theta.or(r.rope_parameters.and_then(|p| p.rope_theta));
        Ok(Self {
            vocab_size: r.vocab_size,
            hidden_size: r.hidden_size,
            intermediate_size: r.intermediate_size,
            num_hidden_layers: r.num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            max_position_embeddings: r.max_position_embeddings,
            rms_norm_eps: r.rms_norm_eps,
            rope_theta: theta.ok_or("neither rope_theta nor rope_parameters.rope_theta is given")?,
            tie_word_embeddings: r.tie_word_embeddings,
            attention_bias: r.attention_bias,
        })
    }
}

/// Cosines and sines of the rotary angles of one forward pass, `[batch or 1, seq, head_dim / 2]`.
#[derive(Clone, Debug)]
pub struct Rope {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// `θ^(−2i/dim)` for `i` in `0..dim/2`.
    pub fn inverse_frequencies(cfg: &Config) -> Vec<f32> {
        let d = cfg.head_dim;
        (0..d / 2).map(|i| 1. / (cfg.rope_theta as f32).powf(2. * i as f32 / d as f32)).collect()
    }

    /// One row of positions per batch row, all of one length. One row serves the whole batch.
    pub fn from_positions(cfg: &Config, positions: &[Vec<u32>], device: &Device) -> Result<Self> {
        let (b, s) = (positions.len(), positions.first().map_or(0, Vec::len));
        if let Some(p) = positions.iter().find(|p| p.len() != s) {
            candle_core::bail!("rope: rows of {s} and of {} positions in one batch", p.len())
        }
        let freq = Self::inverse_frequencies(cfg);
        let mut angles = Vec::with_capacity(b * s * freq.len());
        for &p in positions.iter().flatten() {
            angles.extend(freq.iter().map(|f| p as f32 * f));
        }
        Self::from_angles(&Tensor::from_vec(angles, (b, s, freq.len()), device)?)
    }

    /// Angles already made, f32 `[batch or 1, seq, head_dim / 2]` (M-RoPE mixes three positions).
    pub fn from_angles(angles: &Tensor) -> Result<Self> {
        Ok(Self { cos: angles.cos()?, sin: angles.sin()? })
    }
}

/// Keys and values of the tokens seen so far, in buffers that move only when they grow.
///
/// For inference only: gradients do not pass through. All rows have one length; shorter rows are
/// padded on the left and say so by [`Mask::Causal`].
#[derive(Debug)]
pub struct KvCache {
    /// Per layer, keys and values `[batch, capacity, kv_heads · head_dim]`.
    layers: Vec<(Tensor, Tensor)>,
    len: usize,
    capacity: usize,
}

impl KvCache {
    /// Of the type that the network computes in ([`Qwen3::dtype`]).
    pub fn new(cfg: &Config, batch: usize, capacity: usize, dtype: DType, device: &Device) -> Result<Self> {
        let shape = (batch, capacity, cfg.num_key_value_heads * cfg.head_dim);
        let layers = (0..cfg.num_hidden_layers)
            .map(|_| Ok((Tensor::zeros(shape, dtype, device)?, Tensor::zeros(shape, dtype, device)?)))
            .collect::<Result<_>>()?;
        Ok(Self { layers, len: 0, capacity })
    }

    /// A cache for `batch` rows that all begin with `prefix`'s tokens (a cache of batch 1).
    pub fn from_prefix(prefix: &Self, batch: usize, capacity: usize) -> Result<Self> {
        if capacity < prefix.len {
            candle_core::bail!("cache: capacity {capacity} is below the prefix's {} tokens", prefix.len)
        }
        let grow = |t: &Tensor| -> Result<Tensor> {
            let (b, _, w) = t.dims3()?;
            if b != 1 {
                candle_core::bail!("cache: a shared prefix has batch 1, got {b}")
            }
            let to = Tensor::zeros((batch, capacity, w), t.dtype(), t.device())?;
            if prefix.len > 0 {
                let seen = t.narrow(1, 0, prefix.len)?.expand((batch, prefix.len, w))?.contiguous()?;
                to.slice_set(&seen, 1, 0)?;
            }
            Ok(to)
        };
        let layers = prefix.layers.iter().map(|(k, v)| Ok((grow(k)?, grow(v)?))).collect::<Result<_>>()?;
        Ok(Self { layers, len: prefix.len, capacity })
    }

    /// A copy of the first `n` tokens of a cache of batch 1, without room for more.
    pub fn head(&self, n: usize) -> Result<Self> {
        let mut first = Self { layers: self.layers.clone(), len: self.len, capacity: self.capacity };
        first.truncate(n);
        Self::from_prefix(&first, 1, first.len)
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Memory of the buffers.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|(k, v)| (k.elem_count() + v.elem_count()) * k.dtype().size_in_bytes()).sum()
    }

    /// Forgets all but the first `n` tokens.
    pub fn truncate(&mut self, n: usize) {
        self.len = self.len.min(n);
    }

    /// Makes room for `capacity` tokens in all, layer by layer: what is held is in memory twice only of one layer.
    pub fn grow(&mut self, capacity: usize) -> Result<()> {
        for t in self.layers.iter_mut().flat_map(|(k, v)| [k, v]) {
            let (b, _, w) = t.dims3()?;
            let to = Tensor::zeros((b, capacity, w), t.dtype(), t.device())?;
            if self.len > 0 {
                to.slice_set(&t.narrow(1, 0, self.len)?.contiguous()?, 1, 0)?;
            }
            *t = to;
        }
        self.capacity = capacity;
        Ok(())
    }

    /// Keeps only these batch rows, in this order.
    pub fn select(&mut self, rows: &[u32]) -> Result<()> {
        for (k, v) in &mut self.layers {
            let ids = Tensor::new(rows, k.device())?;
            *k = k.index_select(&ids, 0)?;
            *v = v.index_select(&ids, 0)?;
        }
        Ok(())
    }

    /// Writes the new tokens of one layer behind those held and returns views of all.
    fn append(&self, layer: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (buf_k, buf_v) = &self.layers[layer];
        let (b, s, _) = k.dims3()?;
        if buf_k.dim(0)? != b {
            candle_core::bail!("cache: a batch of {b} for a cache of {} rows", buf_k.dim(0)?)
        }
        if self.len + s > self.capacity {
            candle_core::bail!("cache: {} + {s} tokens exceed its capacity of {}", self.len, self.capacity)
        }
        buf_k.slice_set(&k.contiguous()?, 1, self.len)?;
        buf_v.slice_set(&v.contiguous()?, 1, self.len)?;
        Ok((buf_k.narrow(1, 0, self.len + s)?, buf_v.narrow(1, 0, self.len + s)?))
    }
}

#[derive(Clone, Debug)]
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    q_norm: RmsNorm,
    k_norm: RmsNorm,
    heads: usize,
    kv_heads: usize,
    scale: f64,
}

impl Attention {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let (h, d) = (cfg.hidden_size, cfg.head_dim);
        let (q, kv) = (cfg.num_attention_heads * d, cfg.num_key_value_heads * d);
        let bias = cfg.attention_bias;
        Ok(Self {
            q_proj: nn::linear_b(h, q, bias, vb.pp("q_proj"))?,
            k_proj: nn::linear_b(h, kv, bias, vb.pp("k_proj"))?,
            v_proj: nn::linear_b(h, kv, bias, vb.pp("v_proj"))?,
            o_proj: nn::linear_b(q, h, bias, vb.pp("o_proj"))?,
            q_norm: nn::rms_norm(d, cfg.rms_norm_eps, vb.pp("q_norm"))?,
            k_norm: nn::rms_norm(d, cfg.rms_norm_eps, vb.pp("k_norm"))?,
            heads: cfg.num_attention_heads,
            kv_heads: cfg.num_key_value_heads,
            scale: 1. / (d as f64).sqrt(),
        })
    }

    /// `residual` plus the attention of `x`.
    fn forward_residual(
        &self,
        x: &Tensor,
        residual: &Tensor,
        rope: &Rope,
        mask: &Mask,
        cache: Option<(&KvCache, usize)>,
    ) -> Result<Tensor> {
        let rotate = |t: &Tensor, norm: &RmsNorm| norm.forward_heads_rope(t, &rope.cos, &rope.sin);
        let [q, k, v] = Linear::forward_all([&self.q_proj, &self.k_proj, &self.v_proj], x)?;
        let (q, k) = (rotate(&q, &self.q_norm)?, rotate(&k, &self.k_norm)?);
        let (k, v) = match cache {
            Some((cache, layer)) => cache.append(layer, &k, &v)?,
            None => (k, v),
        };
        let o = nn::attention_packed(&q, &k, &v, self.heads, self.kv_heads, self.scale, mask)?;
        self.o_proj.forward_residual(&o, residual)
    }
}

#[derive(Clone, Debug)]
struct Layer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: GatedMlp,
}

impl Layer {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let h = cfg.hidden_size;
        Ok(Self {
            input_layernorm: nn::rms_norm(h, cfg.rms_norm_eps, vb.pp("input_layernorm"))?,
            self_attn: Attention::new(cfg, vb.pp("self_attn"))?,
            post_attention_layernorm: nn::rms_norm(h, cfg.rms_norm_eps, vb.pp("post_attention_layernorm"))?,
            mlp: GatedMlp::new(h, cfg.intermediate_size, vb.pp("mlp"))?,
        })
    }

    fn parameters(&self) -> Vec<Tensor> {
        let a = &self.self_attn;
        let linear = [&a.q_proj, &a.k_proj, &a.v_proj, &a.o_proj].into_iter().flat_map(Linear::parameters);
        let norms = [&self.input_layernorm, &self.post_attention_layernorm, &a.q_norm, &a.k_norm];
        linear.chain(norms.map(|n| n.weight().clone())).chain(self.mlp.parameters()).collect()
    }

    fn forward(
        &self,
        x: &Tensor,
        rope: &Rope,
        mask: &Mask,
        cache: Option<(&KvCache, usize)>,
    ) -> Result<Tensor> {
        let x = self.self_attn.forward_residual(&self.input_layernorm.forward(x)?, x, rope, mask, cache)?;
        self.mlp.forward_residual(&self.post_attention_layernorm.forward(&x)?, &x)
    }
}

/// Called after each layer with its index and output; a returned tensor replaces the output.
pub type AfterLayer<'a> = dyn Fn(usize, &Tensor) -> Result<Option<Tensor>> + 'a;

/// The decoder with its head.
#[derive(Clone, Debug)]
pub struct Qwen3 {
    embed_tokens: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    lm_head: Linear,
    dtype: DType,
    device: Device,
    recomputed: bool,
}

impl Qwen3 {
    /// Keeps of each layer only its input where gradients are wanted, and runs it again for them
    /// ([`nn::recompute`], [`nn::backward`]): memory for time.
    pub fn recomputed(mut self, on: bool) -> Self {
        self.recomputed = on;
        self
    }

    /// What it computes in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Names as in a text-only checkpoint: `model.…` and, unless tied, `lm_head.weight`.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let head = (!cfg.tie_word_embeddings).then(|| vb.pp("lm_head"));
        Self::with_prefix(cfg, vb.pp("model"), head)
    }

    /// `body` holds `embed_tokens`, `layers`, `norm`; `head` holds `weight`, or the embedding is
    /// the head (tied).
    pub fn with_prefix(cfg: &Config, body: VarBuilder, head: Option<VarBuilder>) -> Result<Self> {
        super::check_layers("qwen3", cfg.num_hidden_layers)?;
        let embed_tokens = nn::embedding(cfg.vocab_size, cfg.hidden_size, body.pp("embed_tokens"))?;
        let layers = (0..cfg.num_hidden_layers)
            .map(|i| Layer::new(cfg, body.pp("layers").pp(i)))
            .collect::<Result<_>>()?;
        let norm = nn::rms_norm(cfg.hidden_size, cfg.rms_norm_eps, body.pp("norm"))?;
        let lm_head = match head {
            Some(vb) => nn::linear_no_bias(cfg.hidden_size, cfg.vocab_size, vb)?,
            None => embed_tokens.head(),
        };
        let (dtype, device) = (body.dtype(), body.device().clone());
        Ok(Self { embed_tokens, layers, norm, lm_head, dtype, device, recomputed: false })
    }

    /// Ids u32 `[batch, seq]` → `[batch, seq, hidden]`.
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        self.embed_tokens.forward(ids)
    }

    /// Ids u32 `[batch, seq]` → final normed hidden states `[batch, seq, hidden]`. With a cache,
    /// `ids` are the tokens after those held, and `mask` is over both.
    pub fn forward(
        &self,
        ids: &Tensor,
        rope: &Rope,
        mask: &Mask,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        self.forward_embeds(&self.embed(ids)?, rope, mask, cache, None)
    }

    /// [`Qwen3::forward`] from embeddings `[batch, seq, hidden]`.
    pub fn forward_embeds(
        &self,
        x: &Tensor,
        rope: &Rope,
        mask: &Mask,
        cache: Option<&mut KvCache>,
        after_layer: Option<&AfterLayer>,
    ) -> Result<Tensor> {
        let (b, n, _) = x.dims3()?;
        let mask = &mask.spread((b, n, cache.as_ref().map_or(0, |c| c.len()) + n), x)?;
        let mut x = x.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            x = match &cache {
                None if self.recomputed => {
                    let (layer, rope, mask) = (layer.clone(), rope.clone(), mask.clone());
                    let parameters = layer.parameters().into();
                    nn::recompute(&[&x], parameters, move |x| layer.forward(&x[0], &rope, &mask, None))?
                }
                cache => layer.forward(&x, rope, mask, cache.as_deref().map(|c| (c, i)))?,
            };
            if let Some(f) = after_layer
                && let Some(y) = f(i, &x)?
            {
                x = y;
            }
        }
        if let Some(c) = cache {
            c.len += x.dim(1)?;
        }
        self.norm.forward(&x)
    }

    /// `[.., hidden]` → `[.., vocab]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.lm_head.forward(hidden)
    }

    /// Log-probability of each target: hidden `[n, hidden]`, targets u32 `[n]` → `[n]`.
    pub fn token_log_probs(&self, hidden: &Tensor, targets: &Tensor) -> Result<Tensor> {
        if !self.lm_head.is_plain() {
            return nn::log_probs(&self.logits(hidden)?, targets);
        }
        nn::linear_log_probs(hidden, self.lm_head.weight()?, targets)
    }
}
