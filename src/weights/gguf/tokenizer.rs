//! The tokenizer in a GGUF file as the files that the hub has beside weights: `tokenizer.json` with
//! Qwen's normaliser and split, `tokenizer_config.json` with the chat template, `generation_config.json`.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use super::Gguf;
use super::header::short;
use crate::weights::WeightsError;
use crate::weights::byte_level::{Added, tokenizer_json};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const TEMPLATE: &str = "tokenizer.chat_template";
const EOS: &str = "tokenizer.ggml.eos_token_id";

/// What GGUF calls the split of Qwen2, which Qwen3 has too.
const SPLITS: [&str; 2] = ["qwen2", "qwen3"];

/// Types of tokens that are kept apart from merges: special ones, and others that count as a whole.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
/// Fills the vocabulary up to the embedding's rows.
const UNUSED: i64 = 5;

/// Ends of a turn or a text, which a file names one of.
const ENDS: [&str; 2] = ["<|im_end|>", "<|endoftext|>"];

struct Tokens<'a> {
    texts: Vec<&'a str>,
    types: Vec<i64>,
}

impl<'a> Tokens<'a> {
    fn of(g: &'a Gguf) -> Result<Self, WeightsError> {
        let (texts, types) = (g.strings(TOKENS)?, g.whole_numbers(TYPES)?);
        if types.len() != texts.len() {
            return Err(g.fail(format!("{TYPES} has {} entries, {TOKENS} {}", types.len(), texts.len())));
        }
        let rows = g.tensors().get("token_embd.weight").map_or(0, |t| t.shape[0]);
        if texts.len() > rows {
            let message = format!("{TOKENS} has {} entries, token_embd.weight {rows} rows", texts.len());
            return Err(g.fail(message));
        }
        Ok(Self { texts, types })
    }

    /// The token that a key tells the id of.
    fn named(&self, g: &Gguf, key: &str) -> Result<Option<&'a str>, WeightsError> {
        let Some(id) = self.id(g, key)? else { return Ok(None) };
        Ok(Some(self.texts[id]))
    }

    fn id(&self, g: &Gguf, key: &str) -> Result<Option<usize>, WeightsError> {
        if !g.has(key) {
            return Ok(None);
        }
        let id = g.metadata.get(key).and_then(|v| v.whole()).filter(|id| *id < self.texts.len() as u64);
        match id {
            Some(id) => Ok(Some(id as usize)),
            None => Err(g.expected(key, &format!("an id below {}", self.texts.len()))),
        }
    }
}

/// `tokenizer.json`.
pub(super) fn tokenizer(g: &Gguf) -> Result<Json, WeightsError> {
    let model = g.text_of(MODEL)?;
    if model != "gpt2" {
        return Err(g.fail(format!("{MODEL} is {}; only gpt2 (byte-level BPE) is read", short(model))));
    }
    let pre = g.text_of(PRE)?;
    if !SPLITS.contains(&pre) {
        return Err(g.fail(format!("{PRE} is {}; only qwen2 is read", short(pre))));
    }
    if g.flag(ADD_BOS)? == Some(true) {
        return Err(g.fail(format!("{ADD_BOS} is true, which no Qwen3 has: not supported")));
    }
    let tokens = Tokens::of(g)?;
    let (mut ids, mut vocab, mut added) = (HashMap::new(), Map::new(), Vec::new());
    for (id, (&text, &kind)) in tokens.texts.iter().zip(&tokens.types).enumerate() {
        if kind == UNUSED {
            continue;
        }
        if text.is_empty() {
            return Err(g.fail(format!("{TOKENS}, entry {id}: an empty token")));
        }
        if let Some(first) = ids.insert(text, id) {
            return Err(g.fail(format!("{TOKENS}: entries {first} and {id} are both {}", short(text))));
        }
        // Special tokens too, so that they keep their ids whatever their place; no merge makes them.
        vocab.insert(text.into(), json!(id));
        if matches!(kind, CONTROL | USER_DEFINED) {
            let (id, content) = (id as u64, text.into());
            added.push(Added { id, content, special: kind == CONTROL, ..Added::default() });
        }
    }
    let mut merges = Vec::new();
    for (i, merge) in g.strings(MERGES)?.into_iter().enumerate() {
        let pair = merge.split_once(' ').filter(|(a, b)| {
            ids.contains_key(a) && ids.contains_key(b) && ids.contains_key(format!("{a}{b}").as_str())
        });
        let Some((a, b)) = pair else {
            let merge = short(merge);
            return Err(
                g.fail(format!("{MERGES}, entry {i}: {merge} is no pair of tokens that make a third"))
            );
        };
        merges.push((a, b));
    }
    Ok(tokenizer_json(vocab, &merges, &added))
}

/// `tokenizer_config.json`: the chat template, and the tokens that it may name.
pub(super) fn tokenizer_config(g: &Gguf) -> Result<Json, WeightsError> {
    if !g.has(TEMPLATE) {
        let message = format!("has no {TEMPLATE}: is this a base model? take one that was made for chats");
        return Err(g.fail(message));
    }
    let tokens = Tokens::of(g)?;
    let mut config = json!({ "chat_template": g.text_of(TEMPLATE)? });
    for (name, key) in [
        ("bos_token", "tokenizer.ggml.bos_token_id"),
        ("eos_token", EOS),
        ("pad_token", "tokenizer.ggml.padding_token_id"),
    ] {
        if let Some(token) = tokens.named(g, key)? {
            config[name] = json!(token);
        }
    }
    Ok(config)
}

/// `generation_config.json`: what ends a reply.
pub(super) fn generation_config(g: &Gguf) -> Result<Json, WeightsError> {
    let tokens = Tokens::of(g)?;
    let mut ends = Vec::new();
    for key in [EOS, "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        ends.extend(tokens.id(g, key)?);
    }
    let is_end = |id: &usize| tokens.types[*id] == CONTROL && ENDS.contains(&tokens.texts[*id]);
    ends.extend((0..tokens.texts.len()).filter(is_end));
    ends.sort_unstable();
    ends.dedup();
    Ok(json!({ "eos_token_id": ends }))
}
