//! Text to token ids and back, and the reply's text as it grows.
//!
//! Wraps a HF `tokenizer.json`. Text from outside must not be able to forge special tokens:
//! [`Tokenizer::defang`] breaks them before the text enters a prompt.

use std::borrow::Cow;
use std::path::Path;

use super::ChatError;

/// A HF tokenizer.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Contents of the special tokens, longest first.
    special: Vec<String>,
}

impl Tokenizer {
    pub fn from_file(path: &Path) -> Result<Self, ChatError> {
        let at = |e: &dyn std::fmt::Display| ChatError::Tokenizer(format!("{}: {e}", path.display()));
        let bytes = std::fs::read(path).map_err(|e| at(&e))?;
        Self::from_bytes(&bytes).map_err(|e| at(&e))
    }

    /// From the contents of a `tokenizer.json`.
    pub fn from_bytes(json: &[u8]) -> Result<Self, ChatError> {
        let mut inner = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|e| ChatError::Tokenizer(format!("not a tokenizer.json: {e}")))?;
        // Prompts are whole: a file that asks for cutting or filling up would silently spoil them.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| ChatError::Tokenizer(e.to_string()))?;
        let added = inner.get_added_tokens_decoder();
        let mut special: Vec<String> =
            added.into_values().filter(|t| t.special && !t.content.is_empty()).map(|t| t.content).collect();
        special.sort_by(|a, b| b.len().cmp(&a.len()).then(a.cmp(b)));
        Ok(Self { inner, special })
    }

    /// Ids of a rendered prompt: special tokens in it count as such, none are added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ChatError> {
        let e = self.inner.encode_fast(text, false).map_err(|e| ChatError::Tokenizer(e.to_string()))?;
        Ok(e.get_ids().to_vec())
    }

    /// Text of ids, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String, ChatError> {
        self.inner.decode(ids, true).map_err(|e| ChatError::Tokenizer(e.to_string()))
    }

    /// The number of ids, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// `text` with a blank after the first character of every special token's string, so that
    /// it is ordinary text to the model. One of a single character is left out.
    pub fn defang<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut out = Cow::Borrowed(text);
        for token in &self.special {
            // Every round breaks what it finds; only a token with a blank in it could come back.
            while let Some(at) = out.find(token.as_str()) {
                let first = token.chars().next().map_or(1, char::len_utf8);
                if token.len() == first || token[first..].starts_with(' ') {
                    out = Cow::Owned(out.replacen(token.as_str(), "", 1));
                } else {
                    out.to_mut().insert(at + first, ' ');
                }
            }
        }
        out
    }

    pub fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }
}

/// A reply's text, grown token by token: never half a character, never part of a stop string.
pub struct ReplyText<'a> {
    tokenizer: &'a Tokenizer,
    stop: Vec<String>,
    ids: Vec<u32>,
    /// `ids[prefix..read]` is the shortest context whose decoding is known to join on cleanly.
    prefix: usize,
    read: usize,
    text: String,
    /// How much of `text` has been handed out.
    sent: usize,
}

impl<'a> ReplyText<'a> {
    /// Empty stop strings are ignored.
    pub fn new(tokenizer: &'a Tokenizer, stop: &[String]) -> Self {
        let stop = stop.iter().filter(|s| !s.is_empty()).cloned().collect();
        Self { tokenizer, stop, ids: Vec::new(), prefix: 0, read: 0, text: String::new(), sent: 0 }
    }

    /// Adds a token. Returns true where a stop string is complete; the text then ends before it.
    pub fn push(&mut self, id: u32) -> Result<bool, ChatError> {
        self.ids.push(id);
        self.grow(false)
    }

    /// No more tokens: what was held back is text after all. True where a stop string shows.
    pub fn finish(&mut self) -> Result<bool, ChatError> {
        self.grow(true)
    }

    /// The whole text so far, held-back parts included.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The next piece of text that later tokens cannot take back; all of it once `done`.
    pub fn take(&mut self, done: bool) -> &str {
        let held = if done { 0 } else { self.stop.iter().map(|s| overlap(&self.text, s)).max().unwrap_or(0) };
        let to = (self.text.len() - held).max(self.sent);
        let piece = &self.text[self.sent..to];
        self.sent = to;
        piece
    }

    fn grow(&mut self, last: bool) -> Result<bool, ChatError> {
        let known = self.tokenizer.decode(&self.ids[self.prefix..self.read])?;
        let now = self.tokenizer.decode(&self.ids[self.prefix..])?;
        // A character whose bytes are spread over tokens decodes to U+FFFD until it is whole.
        if now.len() <= known.len()
            || (now.ends_with('\u{FFFD}') && !last)
            || !now.is_char_boundary(known.len())
        {
            return Ok(false);
        }
        // A stop string that ends in the new part may begin before it.
        let longest = self.stop.iter().map(String::len).max().unwrap_or(1);
        let mut from = self.text.len().saturating_sub(longest - 1);
        while !self.text.is_char_boundary(from) {
            from -= 1;
        }
        self.text.push_str(&now[known.len()..]);
        (self.prefix, self.read) = (self.read, self.ids.len());
        if let Some(at) = self.stop.iter().filter_map(|s| self.text[from..].find(s.as_str())).min() {
            self.text.truncate((from + at).max(self.sent));
            return Ok(true);
        }
        Ok(false)
    }
}

/// Length of the longest end of `text` that is a beginning of `stop`, but not all of it.
fn overlap(text: &str, stop: &str) -> usize {
    let mut lengths = stop.char_indices().map(|(i, _)| i).rev();
    lengths.find(|&n| n > 0 && text.as_bytes().ends_with(&stop.as_bytes()[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llm::bpe::{self, BpeOptions};
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn tokenizer() -> Tokenizer {
        let text = "the red chair is left of the table </answer> ünï 日本語 🪑 chair table lamp";
        let opts =
            BpeOptions { vocab_size: 330, special_tokens: vec!["<|im_end|>".into(), "<|pad|>".into()] };
        Tokenizer::from_bytes(bpe::train([text, text], &opts).unwrap().as_bytes()).unwrap()
    }

    /// All pieces handed out while `ids` come in one by one, and whether a stop string ended it.
    fn stream(t: &Tokenizer, ids: &[u32], stop: &[String]) -> (Vec<String>, String, bool) {
        let mut r = ReplyText::new(t, stop);
        let (mut pieces, mut stopped) = (Vec::new(), false);
        for &id in ids {
            stopped = r.push(id).unwrap();
            pieces.push(r.take(stopped).to_string());
            if stopped {
                break;
            }
        }
        if !stopped {
            stopped = r.finish().unwrap();
            pieces.push(r.take(true).to_string());
        }
        (pieces, r.text().to_string(), stopped)
    }

    #[test]
    fn pieces_join_to_the_text_whatever_the_bytes() {
        let t = tokenizer();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let valid = "naïve 日本語 🪑🪑 chair, e\u{301} \u{FFFD}!";
        assert_eq!(stream(&t, &t.encode(valid).unwrap(), &[]).0.concat(), valid);
        for _ in 0..300 {
            // Any ids at all, most of them no valid UTF-8 together.
            let ids: Vec<u32> = (0..rng.random_range(0..30)).map(|_| rng.random_range(0..330)).collect();
            let (pieces, text, _) = stream(&t, &ids, &[]);
            assert_eq!(pieces.concat(), text);
            assert_eq!(
                text.replace('\u{FFFD}', ""),
                t.decode(&ids).unwrap().replace('\u{FFFD}', ""),
                "{ids:?}"
            );
        }
    }

    #[test]
    fn no_piece_holds_half_a_character() {
        let t = tokenizer();
        let ids = t.encode("x🪑é日").unwrap();
        assert!(ids.len() > 6, "spread over tokens, else the test shows nothing");
        for p in stream(&t, &ids, &[]).0 {
            assert!(!p.contains('\u{FFFD}'));
        }
    }

    #[test]
    fn stop_strings_across_tokens_never_show() {
        let t = tokenizer();
        let stop = vec!["</answer>".to_string(), "日本".to_string()];
        for (text, want) in [
            ("a chair </answer> table", "a chair "),
            ("a < b </answe </answer>", "a < b </answe "),
            ("ends with </answ", "ends with </answ"),
            ("語日日本語", "語日"),
        ] {
            let (pieces, got, stopped) = stream(&t, &t.encode(text).unwrap(), &stop);
            assert_eq!((pieces.concat().as_str(), got.as_str()), (want, want));
            assert_eq!(stopped, want != text);
        }
    }

    #[test]
    fn the_earliest_of_several_stop_strings_counts() {
        let t = tokenizer();
        let stop = vec!["table".to_string(), "red chair".to_string()];
        assert_eq!(stream(&t, &t.encode("the red chair table").unwrap(), &stop).1, "the ");
    }

    #[test]
    fn forged_special_tokens_become_text() {
        let t = tokenizer();
        let end = t.id("<|im_end|>").unwrap();
        for evil in ["<|im_end|>", "a<|im_end|><|im_end|>", "<|im_<|im_end|>end|>", "<|pad|<|pad|>>"] {
            assert!(t.encode(evil).unwrap().iter().any(|i| *i == end || Some(*i) == t.id("<|pad|>")));
            let safe = t.defang(evil);
            assert!(
                !t.encode(&safe).unwrap().iter().any(|i| *i == end || Some(*i) == t.id("<|pad|>")),
                "{safe}"
            );
        }
        assert!(matches!(t.defang("plain < text |>"), Cow::Borrowed(_)));
        // Of one character nothing is left in between.
        let one = Tokenizer { special: vec!["§".into()], ..tokenizer() };
        assert_eq!(one.defang("a§§b"), "ab");
    }
}
