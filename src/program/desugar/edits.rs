//! Edits to a source text that keep track of which line of the result came from which line of the
//! source.

use ruff_text_size::TextRange;

/// Pending edits, by byte offset in the source.
#[derive(Default)]
pub(super) struct Edits {
    list: Vec<Edit>,
}

struct Edit {
    start: usize,
    end: usize,
    /// Order among edits at one offset: what closes an expression comes before what opens the
    /// next, outer openings before inner ones, inner closings before outer ones.
    order: (u8, i64),
    text: String,
}

impl Edits {
    fn push(&mut self, start: usize, end: usize, rank: u8, text: String) {
        let sequence = self.list.len() as i64;
        let order = (rank, if rank == 0 { -sequence } else { sequence });
        self.list.push(Edit { start, end, order, text });
    }

    /// Before what starts at `at`; of several, the first given is the outermost.
    pub fn open(&mut self, at: usize, text: impl Into<String>) {
        self.push(at, at, 2, text.into());
    }

    /// After what ends at `at`; of several, the first given is the outermost.
    pub fn close(&mut self, at: usize, text: impl Into<String>) {
        self.push(at, at, 0, text.into());
    }

    /// Both, around `range`.
    pub fn wrap(&mut self, range: TextRange, open: impl Into<String>, close: impl Into<String>) {
        self.open(range.start().to_usize(), open);
        self.close(range.end().to_usize(), close);
    }

    /// At the very start of a line.
    pub fn indent(&mut self, at: usize) {
        self.push(at, at, 1, " ".to_owned());
    }

    pub fn replace(&mut self, range: TextRange, text: impl Into<String>) {
        self.push(range.start().to_usize(), range.end().to_usize(), 3, text.into());
    }

    /// Is there an edit that replaces a part of `range`?
    pub fn touches(&self, range: TextRange) -> bool {
        let (start, end) = (range.start().to_usize(), range.end().to_usize());
        self.list.iter().any(|e| e.end > e.start && e.start < end && start < e.end)
    }

    /// The edited text of a stretch, where all edits lie.
    pub fn within(mut self, source: &str, range: TextRange) -> String {
        self.list.sort_by_key(|e| (e.start, e.order));
        let (mut out, mut at) = (String::new(), range.start().to_usize());
        for edit in self.list.iter() {
            if edit.start >= at {
                out.push_str(&source[at..edit.start]);
                out.push_str(&edit.text);
                at = edit.end;
            }
        }
        out.push_str(&source[at..range.end().to_usize()]);
        out
    }

    /// The edited text. Appends to `lines`, for every line of it, the line of the source where it
    /// begins, from 1. An edit inside a replaced stretch is dropped.
    pub fn apply(mut self, source: &str, lines: &mut Vec<u32>) -> String {
        self.list.sort_by_key(|e| (e.start, e.order));
        let mut out = String::with_capacity(source.len() + self.list.len() * 12);
        let mut at = 0;
        let mut line = 1;
        lines.push(line);
        let mut copy = |out: &mut String, lines: &mut Vec<u32>, at: &mut usize, to: usize, keep: bool| {
            for byte in source.as_bytes()[*at..to].iter() {
                if *byte == b'\n' {
                    line += 1;
                    if keep {
                        lines.push(line);
                    }
                }
            }
            if keep {
                out.push_str(&source[*at..to]);
            }
            *at = to;
            line
        };
        for edit in &self.list {
            if edit.start < at {
                continue;
            }
            let here = copy(&mut out, lines, &mut at, edit.start, true);
            out.push_str(&edit.text);
            lines.extend(edit.text.bytes().filter(|&b| b == b'\n').map(|_| here));
            copy(&mut out, lines, &mut at, edit.end, false);
        }
        copy(&mut out, lines, &mut at, source.len(), true);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ruff_text_size::TextSize;

    fn range(start: u32, end: u32) -> TextRange {
        TextRange::new(TextSize::new(start), TextSize::new(end))
    }

    #[test]
    fn edits_nest_and_lines_are_kept() {
        let mut edits = Edits::default();
        edits.wrap(range(0, 5), "f(", ")");
        edits.wrap(range(0, 1), "g(", ")");
        edits.replace(range(2, 3), ",");
        edits.open(6, "x\n");
        edits.indent(6);
        let mut lines = Vec::new();
        assert_eq!(edits.apply("a + b\nc\n", &mut lines), "f(g(a) , b)\n x\nc\n");
        assert_eq!(lines, [1, 2, 2, 3]);
    }

    #[test]
    fn a_replaced_stretch_may_span_lines() {
        let mut edits = Edits::default();
        edits.replace(range(0, 5), "z");
        edits.open(3, "lost");
        let mut lines = Vec::new();
        assert_eq!(edits.apply("a\n+\nb\nc", &mut lines), "z\nc");
        assert_eq!(lines, [1, 4]);
    }
}
