//! What the detector is asked: nouns → caption → WordPiece ids, and which tokens are whose.
//!
//! A caption is phrases ended by full stops, "chair . coffee table .". Phrases are told apart by
//! their *token spans* between delimiters, never by searching the text: the released code takes
//! the first substring, so that "table" in "coffee table . table ." becomes part of the coffee
//! table (method.md 10.16).

use candle_core::{Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use tokenizers::Tokenizer;

/// Longest text in tokens (`max_text_len` of every released checkpoint).
pub const MAX_TEXT_LEN: usize = 256;

/// BERT's uncased WordPiece with the four delimiters that cut captions into phrases.
#[derive(Clone, Debug)]
pub struct TextTokenizer {
    inner: Tokenizer,
    /// `[CLS]`, `[SEP]`, `.`, `?` and `[PAD]`.
    delimiters: [u32; 5],
}

/// A tokenised caption.
#[derive(Clone, Debug, PartialEq)]
pub struct Caption {
    pub text: String,
    /// With `[CLS]` and `[SEP]`.
    pub ids: Vec<u32>,
    /// Token columns of each phrase, in order, without delimiters.
    pub phrases: Vec<Range<usize>>,
}

/// How a noun's inner blanks are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Blanks {
    /// "coffee table": training captions (method.md 6).
    Keep,
    /// "coffee-table": the paper's detector prompts (method.md 5.2).
    Hyphen,
}

/// Splits a comma-separated prompt into nouns: cleaned, without repetitions, in order.
pub fn nouns_of(prompt: &str) -> Vec<String> {
    let mut nouns: Vec<String> = Vec::new();
    for noun in prompt.split(',').map(clean_noun) {
        if !noun.is_empty() && !nouns.contains(&noun) {
            nouns.push(noun);
        }
    }
    nouns
}

/// Lower case, single blanks, and nothing that would end the phrase or name a special token.
pub fn clean_noun(noun: &str) -> String {
    let plain: String = noun
        .chars()
        .flat_map(char::to_lowercase)
        .map(|c| if matches!(c, '.' | '?' | '[' | ']' | ',') || c.is_control() { ' ' } else { c })
        .collect();
    plain.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl TextTokenizer {
    /// A `vocab.txt` (one token a line; of repeated ones the later id holds) or a
    /// `tokenizer.json`, told apart by the extension.
    pub fn from_file(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let read = std::fs::read_to_string(path);
        let text = read.map_err(|e| candle_core::Error::Msg(format!("cannot read tokenizer {name}: {e}")))?;
        if path.extension().is_some_and(|e| e == "json") {
            Self::from_json(&text, &name)
        } else {
            Self::from_json(&tokenizer_json(text.lines()).to_string(), &name)
        }
    }

    /// The text of a `tokenizer.json`; `name` is for error messages.
    pub fn from_json(json: &str, name: &str) -> Result<Self> {
        let fail = |e: tokenizers::Error| candle_core::Error::Msg(format!("tokenizer {name}: {e}"));
        let mut inner: Tokenizer = json.parse().map_err(fail)?;
        // A file that asks for filling up or cutting would move phrases, or lose them.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(fail)?;
        let id = |token: &str| match inner.token_to_id(token) {
            Some(id) => Ok(id),
            None => Err(candle_core::Error::Msg(format!("tokenizer {name} has no token {token:?}"))),
        };
        let delimiters = [id("[CLS]")?, id("[SEP]")?, id(".")?, id("?")?, id("[PAD]")?];
        Ok(Self { inner, delimiters })
    }

    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    pub fn pad_id(&self) -> u32 {
        self.delimiters[4]
    }

    /// Ends a phrase: `[CLS]`, `[SEP]`, `.`, `?`, `[PAD]`.
    pub fn is_delimiter(&self, id: u32) -> bool {
        self.delimiters.contains(&id)
    }

    /// Ids with `[CLS]` and `[SEP]`.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.encoding(text, true)?.get_ids().to_vec())
    }

    /// The text of some ids, pieces joined, special tokens written out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, false).map_err(|e| candle_core::Error::Msg(format!("tokenizer: {e}")))
    }

    /// Tokenises a caption as it stands and finds its phrases.
    pub fn caption(&self, text: &str) -> Result<Caption> {
        let ids = self.encode(text)?;
        if ids.len() > MAX_TEXT_LEN {
            bail!(
                "the detector's caption has {} tokens, at most {MAX_TEXT_LEN} fit: ask for fewer nouns",
                ids.len()
            )
        }
        let mut phrases: Vec<Range<usize>> = Vec::new();
        let mut start = 0;
        for (i, &id) in ids.iter().enumerate() {
            if self.is_delimiter(id) {
                if start < i {
                    phrases.push(start..i);
                }
                start = i + 1;
            }
        }
        if start < ids.len() {
            phrases.push(start..ids.len());
        }
        Ok(Caption { text: text.to_string(), ids, phrases })
    }

    /// "a . b ." for these nouns; the caption's phrases stand in the nouns' order, one each.
    pub fn caption_of(&self, nouns: &[impl AsRef<str>], blanks: Blanks) -> Result<Caption> {
        let mut text = String::new();
        for noun in nouns {
            let mut noun = clean_noun(noun.as_ref());
            if noun.is_empty() {
                bail!("a detector prompt needs nouns, got an empty one")
            }
            if blanks == Blanks::Hyphen {
                noun = noun.replace(' ', "-");
            }
            text.push_str(&noun);
            text.push_str(" . ");
        }
        let caption = self.caption(text.trim_end())?;
        if caption.phrases.len() != nouns.len() {
            bail!(
                "the detector's tokenizer sees {} phrases in {:?}, expected {}",
                caption.phrases.len(),
                caption.text,
                nouns.len()
            )
        }
        Ok(caption)
    }

    /// Tokens that a noun takes in a caption, with its full stop.
    pub fn tokens_of(&self, noun: &str, blanks: Blanks) -> Result<usize> {
        // Beside [CLS] and [SEP].
        Ok(self.caption_of(&[noun], blanks)?.ids.len() - 2)
    }

    /// The token columns of `noun` in a caption: those of the phrase with the same tokens, so
    /// capitals, accents and blanks do not matter, and parts of longer phrases do not count.
    pub fn find(&self, caption: &Caption, noun: &str) -> Result<Option<Range<usize>>> {
        let noun = self.encoding(noun, false)?;
        Ok(caption.phrases.iter().find(|p| caption.ids[(*p).clone()] == *noun.get_ids()).cloned())
    }

    fn encoding(&self, text: &str, special: bool) -> Result<tokenizers::Encoding> {
        self.inner.encode(text, special).map_err(|e| candle_core::Error::Msg(format!("tokenizer: {e}")))
    }
}

/// A `tokenizer.json` in HF's format: BERT uncased WordPiece over these tokens, ids in order.
pub fn tokenizer_json<'a>(vocab: impl IntoIterator<Item = &'a str>) -> serde_json::Value {
    let mut ids: BTreeMap<&str, usize> = BTreeMap::new();
    for (id, token) in vocab.into_iter().enumerate() {
        ids.insert(token.trim_end_matches('\r'), id);
    }
    let special: Vec<_> = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        .into_iter()
        .filter_map(|t| ids.get(t).map(|id| (t, id)))
        .map(|(content, id)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": special,
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", ids.get("[SEP]")],
                           "cls": ["[CLS]", ids.get("[CLS]")]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": ids},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_files_padding_and_truncation_do_not_count() {
        let vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "?", "chair", "table"];
        let mut json = tokenizer_json(vocab);
        json["truncation"] =
            json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
        json["padding"] = json!({"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": null,
                                 "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"});
        let t = TextTokenizer::from_json(&json.to_string(), "test").unwrap();
        let caption = t.caption_of(&["chair", "table"], Blanks::Keep).unwrap();
        assert_eq!(caption.ids, [2, 6, 4, 7, 4, 3]);
        assert_eq!(caption.phrases, [1..2, 3..4]);
    }

    #[test]
    fn nouns_are_cleaned_and_named_once() {
        assert_eq!(
            nouns_of("Red  Chair, table,, TABLE ,st. bernard[SEP]"),
            ["red chair", "table", "st bernard sep"]
        );
        assert!(nouns_of(" , . ?").is_empty());
    }
}
