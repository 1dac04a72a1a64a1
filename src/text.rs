//! Text of strangers (models, programs, files): for a terminal, which it must not command, and as
//! editors save it.

use serde_json::Value;
use std::borrow::Cow;
use std::fmt::Write as _;

/// Would it command a terminal, end a line, or set what follows in another order?
pub fn is_unruly(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Text on one line of a terminal: what is unruly in it is spelt out, as `\n`, `\x1b` or `\u{202e}`.
pub fn shown(text: &str) -> Cow<'_, str> {
    spelt(text, "")
}

/// The same of text that is meant as several lines: their ends and tabs stay.
pub fn shown_lines(text: &str) -> Cow<'_, str> {
    spelt(text, "\n\t")
}

fn spelt<'a>(text: &'a str, kept: &str) -> Cow<'a, str> {
    let odd = |c: char| is_unruly(c) && !kept.contains(c);
    if !text.contains(odd) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            c if !odd(c) => out.push(c),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c < '\u{100}' => write!(out, "\\x{:02x}", u32::from(c)).expect("a string takes all"),
            c => out.extend(c.escape_unicode()),
        }
    }
    Cow::Owned(out)
}

/// A value as people write it.
pub fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.to_owned(),
        other => other.to_string(),
    }
}

/// A file's text without the byte-order mark that some editors put before it.
pub fn without_bom(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_commands_the_terminal_and_ordinary_text_stays() {
        for plain in ["", "zwei Stühle – 椅子", "a\\n b", "{\"a\": 'x'}"] {
            assert!(matches!(shown(plain), Cow::Borrowed(same) if same == plain), "{plain}");
        }
        let evil = "\x1b[31mred\x1b[0m\rX\n\ta\u{7f}\u{9b}\u{0}\u{202e}b\u{2069}";
        assert_eq!(shown(evil), "\\x1b[31mred\\x1b[0m\\rX\\n\\ta\\x7f\\x9b\\x00\\u{202e}b\\u{2069}");
        let lines = shown_lines(evil);
        assert!(lines.contains("\\rX\n\ta\\x7f") && !lines.contains('\x1b'), "{lines}");
        assert!(matches!(shown_lines("x = 1\n\ty = 2\n"), Cow::Borrowed(_)));
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_the_text() {
        assert_eq!(without_bom("\u{feff}{}"), "{}");
        assert_eq!(without_bom("{}\u{feff}"), "{}\u{feff}");
    }
}
