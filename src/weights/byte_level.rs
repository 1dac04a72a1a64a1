//! Qwen's byte-level BPE as a `tokenizer.json`, for files that have only its parts: GGUF, and folders with
//! `vocab.json` and `merges.txt`, as transformers' slow tokenizers were saved.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json, json};

/// How Qwen2's and Qwen3's `tokenizer.json` cut a text, before merges: contractions; letters with one
/// sign or blank before them; single digits; signs; line breaks; blanks.
const PIECES: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const CONFIG: &str = "tokenizer_config.json";
const ADDED: &str = "added_tokens.json";

/// A token that no merge makes and no split cuts.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Added {
    pub id: u64,
    pub content: String,
    pub single_word: bool,
    pub lstrip: bool,
    pub rstrip: bool,
    pub normalized: bool,
    pub special: bool,
}

/// `vocab` has the id of every token, of added ones too: so they keep theirs, whatever their place.
pub(super) fn tokenizer_json(vocab: Map<String, Json>, merges: &[(&str, &str)], added: &[Added]) -> Json {
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false,
    });
    let split =
        json!({ "type": "Split", "pattern": { "Regex": PIECES }, "behavior": "Isolated", "invert": false });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": { "type": "NFC" },
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [split, byte_level] },
        "post_processor": byte_level, "decoder": byte_level,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
                   "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false,
                   "ignore_merges": false, "vocab": vocab, "merges": merges },
    })
}

/// What `read` finds in a folder, put together; `None` where `vocab.json` or `merges.txt` is not there.
///
/// Errors: a tokenizer of another kind than Qwen's, whose split these files do not tell; parts that do not fit
/// together.
pub(super) fn of_folder(
    read: impl Fn(&str) -> Result<Option<Cow<'static, str>>, String>,
) -> Result<Option<Json>, String> {
    let (Some(vocab), Some(merges)) = (read("vocab.json")?, read("merges.txt")?) else { return Ok(None) };
    let json = |file: &str| -> Result<Json, String> {
        let Some(text) = read(file)? else { return Ok(Json::Null) };
        serde_json::from_str(&text).map_err(|e| format!("is missing, and {file} cannot be read: {e}"))
    };
    let config = json(CONFIG)?;
    if let Some(class) = config["tokenizer_class"].as_str()
        && !class.starts_with("Qwen2Tokenizer")
    {
        return Err(format!(
            "is missing, and only Qwen's is made of vocab.json and merges.txt, not {class}'s: have transformers \
             write it, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        ));
    }
    let fail = |what: String| format!("is missing, and cannot be made of vocab.json and merges.txt: {what}");
    let mut vocab: Map<String, Json> =
        serde_json::from_str(&vocab).map_err(|e| fail(format!("vocab.json: {e}")))?;
    let mut ids = HashSet::with_capacity(vocab.len());
    for (token, id) in &vocab {
        if !id.as_u64().is_some_and(|id| ids.insert(id)) {
            return Err(fail(format!("{token:?} has the id {id}, which is none, or another token's")));
        }
    }
    let added = added_tokens(&config, &json(ADDED)?, &json("special_tokens_map.json")?).map_err(fail)?;
    for token in &added {
        match vocab.get(&token.content).map(Json::as_u64) {
            Some(id) if id == Some(token.id) => {}
            None if ids.insert(token.id) => drop(vocab.insert(token.content.clone(), token.id.into())),
            _ => {
                return Err(fail(format!(
                    "{:?} has the id {}, which is not its own",
                    token.content, token.id
                )));
            }
        }
    }
    let mut pairs = Vec::new();
    for (i, line) in merges.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || i == 0 && line.starts_with("#version") {
            continue;
        }
        let pair = line.split_once(' ').filter(|(a, b)| {
            vocab.contains_key(*a) && vocab.contains_key(*b) && vocab.contains_key(&format!("{a}{b}"))
        });
        pairs.push(pair.ok_or_else(|| {
            fail(format!("merges.txt, line {}: no pair of tokens that make a third", i + 1))
        })?);
    }
    Ok(Some(tokenizer_json(vocab, &pairs, &added)))
}

/// Sorted by their ids. `tokenizer_config.json` tells all of them, where it is not an old one; the others
/// know of `added_tokens.json` which of them are special.
fn added_tokens(config: &Json, more: &Json, special: &Json) -> Result<Vec<Added>, String> {
    let mut all = BTreeMap::new();
    for (id, token) in config["added_tokens_decoder"].as_object().into_iter().flatten() {
        let read = |e: &dyn std::fmt::Display| format!("{CONFIG}, added token {id}: {e}");
        let token: Added = serde_json::from_value(token.clone()).map_err(|e| read(&e))?;
        let id: u64 = id.parse().map_err(|e| read(&e))?;
        all.insert(id, Added { id, ..token });
    }
    let text = |v: &Json| v.as_str().or_else(|| v["content"].as_str()).map(str::to_owned);
    let mut specials = HashSet::new();
    for map in [config, special] {
        for key in ["bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens"] {
            specials.extend(text(&map[key]));
            specials.extend(map[key].as_array().into_iter().flatten().filter_map(text));
        }
    }
    for (content, id) in more.as_object().into_iter().flatten() {
        let id = id.as_u64().ok_or_else(|| format!("{ADDED}: {content:?} has no id"))?;
        let (content, special) = (content.clone(), specials.contains(content));
        all.entry(id).or_insert(Added { id, content, special, ..Added::default() });
    }
    if let Some(empty) = all.values().find(|t| t.content.is_empty()) {
        return Err(format!("added token {} is empty", empty.id));
    }
    Ok(all.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::ModelFiles;
    use std::path::Path;
    use tokenizers::Tokenizer;

    fn read(dir: &Path) -> Result<Option<String>, String> {
        let text = ModelFiles::Folder(dir.into()).text("tokenizer.json");
        text.map(|t| t.map(Cow::into_owned)).map_err(|e| e.to_string())
    }

    fn folder(config: Json) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| std::fs::write(dir.path().join(name), text).unwrap();
        write("vocab.json", json!({ "a": 0, "b": 1, "ab": 2, "Ġ": 3, "Ġab": 4 }).to_string());
        write("merges.txt", "#version: 0.2\na b\nĠ ab\n".into());
        write(CONFIG, config.to_string());
        dir
    }

    fn ids(json: &str, text: &str) -> Vec<u32> {
        let t = Tokenizer::from_bytes(json.as_bytes()).unwrap();
        t.encode(text, false).unwrap().get_ids().to_vec()
    }

    #[test]
    fn a_tokenizer_is_made_of_vocabulary_and_merges() {
        let end = json!({ "content": "<|im_end|>", "special": true, "normalized": false });
        let dir =
            folder(json!({ "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": { "7": end } }));
        let json = read(dir.path()).unwrap().unwrap();
        assert_eq!(ids(&json, "ab ab<|im_end|>"), [2, 4, 7]);
        // As it was written before there was a decoder.
        std::fs::write(dir.path().join(CONFIG), json!({ "eos_token": "<|im_end|>" }).to_string()).unwrap();
        std::fs::write(dir.path().join(ADDED), r#"{"<|im_end|>": 7, "<think>": 6}"#).unwrap();
        let json = read(dir.path()).unwrap().unwrap();
        assert_eq!(ids(&json, "<think>b<|im_end|>"), [6, 1, 7]);
        let t = Tokenizer::from_bytes(json.as_bytes()).unwrap();
        assert_eq!(t.decode(&[6, 2, 7], true).unwrap(), "<think>ab", "only the end is special");
        // Its own goes first.
        std::fs::write(dir.path().join("tokenizer.json"), "own").unwrap();
        assert_eq!(read(dir.path()).unwrap().unwrap(), "own");
    }

    #[test]
    fn parts_that_make_no_tokenizer_of_qwens_are_one_error() {
        let e = read(folder(json!({ "tokenizer_class": "GPT2Tokenizer" })).path()).unwrap_err();
        assert!(e.contains("GPT2Tokenizer") && e.contains("save_pretrained"), "{e}");
        let dir = folder(json!({ "added_tokens_decoder": { "2": { "content": "<|im_end|>" } } }));
        let e = read(dir.path()).unwrap_err();
        assert!(e.contains("<|im_end|>") && e.contains("not its own"), "{e}");
        let dir = folder(json!({}));
        std::fs::write(dir.path().join("merges.txt"), "a b\nb a\n").unwrap();
        assert!(read(dir.path()).unwrap_err().contains("merges.txt, line 2"));
        std::fs::remove_file(dir.path().join("merges.txt")).unwrap();
        assert_eq!(read(dir.path()), Ok(None));
    }
}
