//! A byte-level BPE trainer for the embedded models' tokenizers, written as a HF `tokenizer.json`.
//!
//! Guarantees: any UTF-8 comes back as it went in; no token crosses a blank (one blank may lead a
//! word, and runs of blanks, as in indentation, may be a token of their own) or touches a line
//! break (each is its own token); digits stand alone; no token is longer than
//! [`MAX_TOKEN_BYTES`], special tokens excepted. So no sentence can hide in the vocabulary.
//!
//! The `tokenizers` crate has a trainer, but it orders equal pairs by a hash map's iteration where two
//! merges make the same token. This one gives the same file for the same texts, always. It recounts
//! a merge's words whole: right for the small vocabularies here, slow for a web corpus.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde_json::{Map, Value, json};
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::ChatError;

pub const MAX_TOKEN_BYTES: usize = 12;

/// A pair must occur this often to become a token.
const MIN_FREQUENCY: u64 = 2;

/// Pieces that merges never cross, in this order: a line break; a word (letters, marks, `_`) with the
/// blank before it; a digit; a run of signs with the blank before it; a run of blanks, less
/// the one that leads what follows; any other blank.
const PIECES: &str = r"[\n\r\x0B\x0C\x{85}\x{2028}\x{2029}]| ?[\p{L}\p{M}_]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}_]+|[^\S\n\r\x0B\x0C\x{85}\x{2028}\x{2029}]+(?!\S)|\s";

#[derive(Clone, Debug)]
pub struct BpeOptions {
    /// Tokens in all: 256 bytes, merges, special tokens. Fewer come out where the texts hold
    /// too few frequent pairs.
    pub vocab_size: usize,
    /// Added after the merges, in this order.
    pub special_tokens: Vec<String>,
}

/// Learns merges from `texts` and returns the contents of a `tokenizer.json`.
///
/// Ids: the bytes 0–255, merges from the most frequent on, special tokens. Where a text holds a
/// special token's string, it is split there.
pub fn train<S: AsRef<str>>(
    texts: impl IntoIterator<Item = S>,
    opts: &BpeOptions,
) -> Result<String, ChatError> {
    let fixed = 256 + opts.special_tokens.len();
    if opts.vocab_size < fixed {
        let n = opts.vocab_size;
        return Err(ChatError::Tokenizer(format!(
            "a vocabulary of {n} cannot hold 256 bytes and special tokens: at least {fixed} are needed"
        )));
    }
    let words = count_words(texts, opts)?;
    let (tokens, merges) = learn(words, opts.vocab_size - opts.special_tokens.len());
    serde_json::to_string(&tokenizer_json(&tokens, &merges, &opts.special_tokens))
        .map_err(|e| ChatError::Tokenizer(e.to_string()))
}

/// How often each piece occurs, as bytes. Sorted, so that nothing depends on a hash.
fn count_words<S: AsRef<str>>(
    texts: impl IntoIterator<Item = S>,
    opts: &BpeOptions,
) -> Result<BTreeMap<Vec<u8>, u64>, ChatError> {
    let err = |e: &dyn std::fmt::Display| ChatError::Tokenizer(e.to_string());
    // Cut by the very pre-tokenizer that will be written, short of its mapping of bytes.
    let split: tokenizers::PreTokenizerWrapper = serde_json::from_value(split_json()).map_err(|e| err(&e))?;
    let mut words = BTreeMap::new();
    for text in texts {
        let mut parts = vec![text.as_ref()];
        for token in opts.special_tokens.iter().filter(|t| !t.is_empty()) {
            parts = parts.iter().flat_map(|p| p.split(token.as_str())).collect();
        }
        for part in parts {
            let mut pieces = PreTokenizedString::from(part);
            split.pre_tokenize(&mut pieces).map_err(|e| err(&e))?;
            for (piece, _, _) in pieces.get_splits(OffsetReferential::Original, OffsetType::Byte) {
                *words.entry(piece.as_bytes().to_vec()).or_insert(0) += 1;
            }
        }
    }
    Ok(words)
}

type Pair = (u32, u32);

/// Each token's bytes, and the merges in order of rank.
fn learn(words: BTreeMap<Vec<u8>, u64>, size: usize) -> (Vec<Vec<u8>>, Vec<Pair>) {
    let mut tokens: Vec<Vec<u8>> = (0..=255u8).map(|b| vec![b]).collect();
    let mut ids: HashMap<Vec<u8>, u32> = HashMap::new();
    let mut merges = Vec::new();
    let mut words: Vec<(Vec<u32>, u64)> =
        words.into_iter().map(|(w, n)| (w.into_iter().map(u32::from).collect(), n)).collect();
    let mut counts: HashMap<Pair, u64> = HashMap::new();
    let mut places: HashMap<Pair, BTreeSet<usize>> = HashMap::new();
    for (i, (word, n)) in words.iter().enumerate() {
        for p in word.windows(2) {
            *counts.entry((p[0], p[1])).or_default() += n;
            places.entry((p[0], p[1])).or_default().insert(i);
        }
    }
    while tokens.len() < size {
        let fits = |p: &Pair| tokens[p.0 as usize].len() + tokens[p.1 as usize].len() <= MAX_TOKEN_BYTES;
        let best = counts
            .iter()
            .filter(|(p, n)| **n >= MIN_FREQUENCY && fits(p))
            .max_by(|(p, n), (q, m)| n.cmp(m).then(q.cmp(p)));
        let Some((&pair, _)) = best else { break };
        let bytes = [tokens[pair.0 as usize].as_slice(), &tokens[pair.1 as usize]].concat();
        let new = *ids.entry(bytes.clone()).or_insert_with(|| {
            tokens.push(bytes);
            tokens.len() as u32 - 1
        });
        merges.push(pair);
        for i in places.remove(&pair).unwrap_or_default() {
            let (word, n) = &mut words[i];
            for p in word.windows(2) {
                if let Some(c) = counts.get_mut(&(p[0], p[1])) {
                    *c -= *n;
                }
            }
            *word = merge(word, pair, new);
            for p in word.windows(2) {
                *counts.entry((p[0], p[1])).or_default() += *n;
                places.entry((p[0], p[1])).or_default().insert(i);
            }
        }
        counts.retain(|_, n| *n > 0);
    }
    (tokens, merges)
}

/// Replaces the pair from left to right.
fn merge(word: &[u32], pair: Pair, new: u32) -> Vec<u32> {
    let mut out = Vec::with_capacity(word.len());
    let mut i = 0;
    while i < word.len() {
        if i + 1 < word.len() && (word[i], word[i + 1]) == pair {
            out.push(new);
            i += 2;
        } else {
            out.push(word[i]);
            i += 1;
        }
    }
    out
}

/// GPT-2's printable stand-ins for the 256 bytes, which HF's byte-level files are written in.
fn byte_chars() -> [char; 256] {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut others = 256u32..;
    std::array::from_fn(|b| {
        let b = b as u8;
        let code = if printable(b) { u32::from(b) } else { others.next().unwrap_or_default() };
        char::from_u32(code).unwrap_or_default()
    })
}

fn split_json() -> Value {
    json!({ "type": "Split", "pattern": { "Regex": PIECES }, "behavior": "Isolated", "invert": false })
}

fn tokenizer_json(tokens: &[Vec<u8>], merges: &[Pair], special: &[String]) -> Value {
    let chars = byte_chars();
    let text = |id: u32| -> String { tokens[id as usize].iter().map(|b| chars[*b as usize]).collect() };
    let vocab: Map<String, Value> = (0..tokens.len() as u32).map(|id| (text(id), json!(id))).collect();
    let merges: Vec<Value> = merges.iter().map(|&(a, b)| json!([text(a), text(b)])).collect();
    let added: Vec<Value> = special
        .iter()
        .enumerate()
        .map(|(i, t)| {
            json!({ "id": tokens.len() + i, "content": t, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true })
        })
        .collect();
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [split_json(), byte_level] },
        "post_processor": null, "decoder": byte_level,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                   "ignore_merges": false, "vocab": vocab, "merges": merges },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llm::tokenizer::Tokenizer;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    const TEXTS: [&str; 3] = [
        "<plan>\nFind the red chairs, count them.\n</plan>\n<answer>\nchairs = gd_detect(img_pth, \"red chair\")\n",
        "if len(chairs) == 0:\n    final_answer = vqa(img_pth, None, \"How many red chairs are there?\")\n    n = 12\n",
        "incomprehensibilities incomprehensibilities  incomprehensibilities\u{2028}déjà-vu déjà-vu 日本語日本語",
    ];

    fn trained(vocab_size: usize) -> Tokenizer {
        let texts: Vec<&str> = TEXTS.into_iter().cycle().take(12).collect();
        let special_tokens = vec!["<|im_start|>".to_string(), "<|im_end|>".to_string()];
        let json = train(texts, &BpeOptions { vocab_size, special_tokens }).unwrap();
        Tokenizer::from_bytes(json.as_bytes()).unwrap()
    }

    fn bytes_of(t: &Tokenizer, id: u32) -> Vec<u8> {
        let chars = byte_chars();
        let token = t.inner().id_to_token(id).unwrap();
        token.chars().map(|c| chars.iter().position(|x| *x == c).unwrap() as u8).collect()
    }

    #[test]
    fn any_utf8_comes_back() {
        let t = trained(500);
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        for text in TEXTS {
            assert_eq!(t.decode(&t.encode(text).unwrap()).unwrap(), text);
        }
        for _ in 0..500 {
            let n = rng.random_range(0..40);
            let text: String = (0..n)
                .map(|_| match rng.random_range(0..4) {
                    0 => char::from(rng.random_range(0..128u8)),
                    1 => *[' ', '\n', '\t', '\r', '\u{A0}', '\u{2028}', '\u{301}']
                        .get(rng.random_range(0..7))
                        .unwrap(),
                    2 => rng.random_range('\u{80}'..='\u{3000}'),
                    _ => rng.random::<char>(),
                })
                .collect();
            assert_eq!(t.decode(&t.encode(&text).unwrap()).unwrap(), text, "{text:?}");
        }
    }

    #[test]
    fn no_token_crosses_blanks_or_lines_or_is_too_long() {
        let t = trained(600);
        let mut longest = 0;
        for id in 0..t.vocab_size() as u32 - 2 {
            let bytes = bytes_of(&t, id);
            longest = longest.max(bytes.len());
            let s = String::from_utf8_lossy(&bytes);
            let blank = s.chars().all(|c| c.is_whitespace());
            assert!(blank || !s.chars().skip(1).any(char::is_whitespace), "{s:?}");
            assert!(s.chars().count() == 1 || !s.contains(['\n', '\r', '\u{2028}']), "{s:?}");
            assert!(s.chars().count() == 1 || !s.contains(|c: char| c.is_numeric()), "{s:?}");
        }
        // The longest word in the texts would be one token if nothing held it back.
        assert!((8..=MAX_TOKEN_BYTES).contains(&longest), "{longest}");
    }

    #[test]
    fn frequent_words_are_one_token_and_training_is_repeatable() {
        let t = trained(600);
        for word in [" chair", "chairs", " gd_detect", "    "] {
            assert!(t.encode(word).unwrap().len() <= 2, "{word:?}: {:?}", t.encode(word).unwrap());
        }
        let opts = BpeOptions { vocab_size: 400, special_tokens: vec![] };
        assert_eq!(train(TEXTS, &opts).unwrap(), train(TEXTS, &opts).unwrap());
    }

    #[test]
    fn special_tokens_come_last_and_are_one_id() {
        let t = trained(500);
        let n = t.vocab_size() as u32;
        assert_eq!(t.encode("a<|im_end|>").unwrap()[1..], [n - 1]);
        assert_eq!(t.id("<|im_start|>"), Some(n - 2));
        let small = BpeOptions { vocab_size: 257, special_tokens: vec!["a".into(), "b".into()] };
        assert!(train(["x"], &small).unwrap_err().to_string().contains("258"));
    }
}
