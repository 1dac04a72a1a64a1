//! Questions of benches in the planner's form: options as values, statements as questions (method.md 8).
//!
//! A planner never sees the picture, and returns one of the values that a question names: letters mean
//! nothing to a program. So "A. left" becomes `Options: {left, …}`, and the right letter its value.

/// How options stand at a question's end.
pub fn with_options(question: &str, options: &[String]) -> String {
    format!("{} Options: {{{}}}.", question.trim(), options.join(","))
}

/// "Is {caption}?", word for word as the published rows were asked: the caption's capital, its own verb and its
/// full stop stay where they are.
pub fn caption(text: &str) -> String {
    format!("Is {text}?")
}

/// The number of an option from its letter: "B", "(b)", "B.", "(B) two".
pub fn letter(answer: &str) -> Option<usize> {
    let text = answer.trim();
    let number = |c: char| c.is_ascii_alphabetic().then(|| (c.to_ascii_uppercase() as u8 - b'A') as usize);
    if let Some(rest) = text.strip_prefix('(') {
        let mut chars = rest.chars();
        let c = chars.next()?;
        return (chars.next() == Some(')')).then(|| number(c)).flatten();
    }
    let mut chars = text.chars();
    let c = chars.next()?;
    let rest = chars.as_str();
    (rest.is_empty() || [".", ")", ":"].contains(&rest)).then(|| number(c)).flatten()
}

/// A question whose options stand in its text behind letters: the question without them and without the
/// instruction how to answer, and the options' values. Without options it is asked as it stands.
pub fn lettered(text: &str) -> (String, Vec<String>) {
    let bare = without_instruction(text);
    let found = STYLES.into_iter().find_map(|style| split(&bare, style));
    found.unwrap_or_else(|| (text.to_owned(), Vec::new()))
}

/// How letters are written: before, after.
const STYLES: [(&str, &str); 4] = [("(", ")"), ("", "."), ("", ")"), ("", ":")];

fn split(text: &str, (before, after): (&str, &str)) -> Option<(String, Vec<String>)> {
    let marker = |i: usize| format!("{before}{}{after}", (b'A' + i as u8) as char);
    // Where a letter's marker stands by itself, from a place on.
    let find = |i: usize, from: usize| -> Vec<(usize, usize)> {
        let marker = marker(i);
        let free = |at: usize| {
            let left = text[..at].chars().next_back().is_none_or(char::is_whitespace);
            let right = text[at + marker.len()..].chars().next();
            // At the beginning of a line, "C.Red" is an option too.
            let begins =
                text[..at].trim_end_matches([' ', '\t']).chars().next_back().is_none_or(|c| c == '\n');
            left && (begins || after != "." && before == "(" || right.is_none_or(char::is_whitespace))
        };
        let found = text[from..].match_indices(&marker).map(|(at, m)| (from + at, from + at + m.len()));
        found.filter(|(at, _)| free(*at)).collect()
    };
    // The last A that a B follows: "vitamin A." may stand in the question itself.
    let (start, mut end) = find(0, 0).into_iter().rev().find(|(_, end)| !find(1, *end).is_empty())?;
    let mut options = Vec::new();
    let mut next = 1;
    while next < 26 {
        let Some((at, behind)) = find(next, end).into_iter().next() else { break };
        options.push(text[end..at].to_owned());
        (end, next) = (behind, next + 1);
    }
    options.push(text[end..].to_owned());
    let tidy = |o: String| -> String {
        let o = o.split_whitespace().collect::<Vec<_>>().join(" ");
        o.trim_end_matches([',', ';']).trim_end_matches('.').trim().to_owned()
    };
    let options: Vec<String> = options.into_iter().map(tidy).collect();
    if options.iter().any(String::is_empty) {
        return None;
    }
    let stem = text[..start].split_whitespace().collect::<Vec<_>>().join(" ");
    let lower = stem.to_ascii_lowercase();
    let label = ["options:", "choices:", "select from the following choices.", "answer choices:"];
    let stem = match label.iter().find(|l| lower.ends_with(**l)) {
        Some(l) => stem[..stem.len() - l.len()].trim_end().to_owned(),
        None => stem,
    };
    Some((stem, options))
}

/// Without the sentences that say in which form a model is to answer.
fn without_instruction(text: &str) -> String {
    const OPENINGS: [&str; 4] = ["please answer", "please respond", "please select", "answer with the"];
    let mut out = text.to_owned();
    for opening in OPENINGS {
        let lower = out.to_ascii_lowercase();
        let Some(at) = lower.find(opening) else { continue };
        let end = lower[at..].find(". ").or_else(|| lower[at..].find(".\n"));
        let end = end.map_or(out.len(), |e| at + e + 1);
        let before = lower[..at].trim_end_matches([' ', '\t', '\r']);
        let begins = before.is_empty() || before.ends_with(['.', '?', '!', ':', '\n']);
        // Behind options no full stop need stand.
        if begins || lower[at..end].contains("letter") {
            out.replace_range(at..end, "");
        }
    }
    out.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn option_blocks_of_many_phrasings_become_values() {
        let cases: [(&str, &str, &[&str]); 13] = [
            (
                "In which direction is the car facing?\n\nA. Left\nB. Straight\nC. Right\nPlease answer directly \
                 with only the letter of the correct option and nothing else.",
                "In which direction is the car facing?",
                &["Left", "Straight", "Right"],
            ),
            ("Which is closer? (A) the cup (B) the plate", "Which is closer?", &["the cup", "the plate"]),
            ("Which is closer? (A)the cup (B)the plate", "Which is closer?", &["the cup", "the plate"]),
            ("Where to?\nA) Left\nB) Right", "Where to?", &["Left", "Right"]),
            ("Where to? A: Left B: Right", "Where to?", &["Left", "Right"]),
            ("Where to? A. Left. B. Right.", "Where to?", &["Left", "Right"]),
            ("Where to? Options: A. Left, B. Right", "Where to?", &["Left", "Right"]),
            ("Is vitamin A. in it?\nA. Yes\nB. No", "Is vitamin A. in it?", &["Yes", "No"]),
            ("How far?\nA. 1.5 m\nB. 2.5 m\nC. 3 m\nD. 4 m", "How far?", &["1.5 m", "2.5 m", "3 m", "4 m"]),
            (
                "How many cars are there? Please answer directly with a single word or number.",
                "How many cars are there? Please answer directly with a single word or number.",
                &[],
            ),
            ("What  is\nit?", "What  is\nit?", &[]),
            ("Which light?\nA. Green\nB. Yellow\nC.Red", "Which light?", &["Green", "Yellow", "Red"]),
            ("Is the A. B. C. shop open?", "Is the A. B. C. shop open?", &[]),
        ];
        for (text, stem, options) in cases {
            let got = lettered(text);
            assert_eq!(
                (got.0.as_str(), got.1.iter().map(String::as_str).collect::<Vec<_>>()),
                (stem, options.to_vec()),
                "{text}"
            );
        }
    }

    #[test]
    fn letters_are_read_in_every_form_and_words_are_none() {
        for (text, want) in [
            ("A", Some(0)),
            ("(B)", Some(1)),
            ("c.", Some(2)),
            (" D) ", Some(3)),
            ("(A) left", Some(0)),
            ("Apple", None),
            ("3", None),
            ("", None),
            ("(3)", None),
            ("(AB)", None),
        ] {
            assert_eq!(letter(text), want, "{text:?}");
        }
    }

    #[test]
    fn captions_become_questions() {
        for (text, want) in [
            ("The cat is under the table.", "Is The cat is under the table.?"),
            ("TV is left of the bed", "Is TV is left of the bed?"),
        ] {
            assert_eq!(caption(text), want);
        }
        assert_eq!(with_options("Which? ", &["a".into(), "b c".into()]), "Which? Options: {a,b c}.");
    }
}
