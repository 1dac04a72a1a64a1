//! Qwen3's names and sizes in GGUF files, and what they are in checkpoints on the hub.

use serde_json::{Value as Json, json};

use super::header::short;
use super::{Gguf, QWEN3};
use crate::weights::WeightsError;

/// Parts of a layer, in a GGUF file and on the hub.
const LAYER: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// What stands outside the layers.
const OUTER: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    (HEAD, "lm_head.weight"),
];

const HEAD: &str = "output.weight";
const EMBEDDING: &str = "token_embd.weight";
const OWN_LAYERS: &str = "blk.";
const HUB_LAYERS: &str = "model.layers.";

type Pair = (&'static str, &'static str);

/// Translates a name; one that is not Qwen3's stays as it is.
fn translated(
    name: &str,
    from: impl Fn(&Pair) -> &'static str,
    to: impl Fn(&Pair) -> &'static str,
    layers: Pair,
) -> String {
    if let Some(pair) = OUTER.iter().find(|p| from(p) == name) {
        return to(pair).into();
    }
    let layer = || {
        let (number, rest) = name.strip_prefix(layers.0)?.split_once('.')?;
        let part = rest.strip_suffix(".weight")?;
        let pair = LAYER.iter().find(|p| from(p) == part)?;
        Some(format!("{}{number}.{}.weight", layers.1, to(pair)))
    };
    layer().unwrap_or_else(|| name.into())
}

pub(super) fn hub_name(own: &str) -> String {
    translated(own, |p| p.0, |p| p.1, (OWN_LAYERS, HUB_LAYERS))
}

pub(super) fn own_name(hub: &str) -> String {
    translated(hub, |p| p.1, |p| p.0, (HUB_LAYERS, OWN_LAYERS))
}

/// No size of a network is larger; products of two of them fit into 64 bits.
const MOST: u64 = 1 << 24;

/// `config.json` as the hub has it.
pub(super) fn config(g: &Gguf) -> Result<Json, WeightsError> {
    let key = |name: &str| format!("{QWEN3}.{name}");
    let count = |name: &str| g.count(&key(name), MOST);
    let or = |name: &str, other: u64| if g.has(&key(name)) { count(name) } else { Ok(other) };
    let (hidden, heads) = (count("embedding_length")?, count("attention.head_count")?);
    let layers = count("block_count")?;
    // A network is built layer by layer, so a file may not tell of more than it has.
    if layers > g.tensors().len() as u64 {
        return Err(g.fail(format!(
            "{} is {layers}, with {} tensors",
            key("block_count"),
            g.tensors().len()
        )));
    }
    let Some(vocab) = g.tensors().get(EMBEDDING).map(|t| t.shape[0]) else {
        return Err(g.fail(format!("{EMBEDDING} is missing")));
    };
    let head_dim = or("attention.key_length", hidden / heads)?;
    for same in ["attention.value_length", "rope.dimension_count"] {
        let n = or(same, head_dim)?;
        if n != head_dim {
            return Err(g.fail(format!("{} is {n}, and heads have {head_dim}: not supported", key(same))));
        }
    }
    let scaling = key("rope.scaling.type");
    if g.has(&scaling) && g.text_of(&scaling)? != "none" {
        let asked = short(g.text_of(&scaling)?);
        return Err(g.fail(format!("{scaling} is {asked}: not supported; take the file without it")));
    }
    Ok(json!({
        "model_type": QWEN3, "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": count("feed_forward_length")?, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": or("attention.head_count_kv", heads)?,
        "head_dim": head_dim, "max_position_embeddings": g.count(&key("context_length"), 1 << 31)?,
        "rms_norm_eps": g.number(&key("attention.layer_norm_rms_epsilon"))?,
        "rope_theta": g.number(&key("rope.freq_base"))?,
        "tie_word_embeddings": !g.tensors().contains_key(HEAD), "attention_bias": false,
        "hidden_act": "silu",
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_translated_there_and_back() {
        for (own, hub) in [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output.weight", "lm_head.weight"),
            ("blk.35.attn_q_norm.weight", "model.layers.35.self_attn.q_norm.weight"),
            ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
            ("blk.0.attn_q.bias", "blk.0.attn_q.bias"),
            ("rope_freqs.weight", "rope_freqs.weight"),
        ] {
            assert_eq!((hub_name(own).as_str(), own_name(hub).as_str()), (hub, own));
        }
    }
}
