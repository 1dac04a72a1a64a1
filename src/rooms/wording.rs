//! Frames said in other ways: what planner and verifier read besides the frames themselves, so that they
//! learn to look for what a question names and not for how its sentence goes.
//!
//! A frame's slots and their order stay; the words around them are dropped, exchanged, added, invented.
//! Held-out frames are no source of these words.

use rand::Rng;
use rand::seq::IndexedRandom;

const OPENERS: [&str; 16] = [
    "Please:",
    "Hello!",
    "Quick question:",
    "I wonder:",
    "One more thing.",
    "About this view:",
    "Let us see.",
    "Help me with this:",
    "Now,",
    "Next:",
    "Look here.",
    "In this photo,",
    "Well,",
    "My question:",
    "I would like to know:",
    "Here is a room.",
];

const CLOSERS: [&str; 10] = [
    "Thanks.",
    "Please.",
    "Be brief.",
    "I am curious.",
    "Only the answer.",
    "Take your time.",
    "Look closely.",
    "I can not tell.",
    "Be exact.",
    "What do you think?",
];

const FILLERS: [&str; 47] = [
    "please", "now", "just", "really", "exactly", "actually", "then", "so", "well", "maybe", "today",
    "again", "also", "first", "here", "photo", "view", "shot", "frame", "inside", "within", "all", "every",
    "each", "would", "could", "should", "might", "will", "you", "they", "I", "someone", "know", "think",
    "guess", "say", "find", "notice", "spot", "got", "with", "for", "on", "at", "by", "as",
];

/// Words that a sentence does without.
const SPARE: [&str; 19] = [
    "the", "a", "of", "in", "is", "are", "this", "that", "it", "one", "to", "there", "you", "me", "tell",
    "do", "does", "can", "picture",
];

/// Words for words.
const OTHERS: [(&str, &[&str]); 12] = [
    ("picture", &["photo", "view", "shot"]),
    ("image", &["photo", "view", "shot"]),
    ("see", &["notice", "spot", "observe", "make out"]),
    ("color", &["colour", "hue", "tint"]),
    ("tell", &["show", "inform", "let"]),
    ("number", &["amount", "quantity"]),
    ("which", &["what"]),
    ("what", &["which"]),
    ("room", &["place", "space", "interior"]),
    ("options", &["alternatives", "replies"]),
    ("choices", &["alternatives", "replies"]),
    ("choose", &["take", "decide"]),
];

/// A frame in other words.
pub(super) fn loosely(frame: &str, rng: &mut impl Rng) -> String {
    let frame = if rng.random_bool(0.3) { swapped(frame, rng) } else { frame.to_owned() };
    let added = *[0., 0.05, 0.15, 0.3].choose(rng).expect("not empty");
    let mut out: Vec<String> = Vec::new();
    if rng.random_bool(0.3) {
        out.push((*OPENERS.choose(rng).expect("not empty")).to_owned());
    }
    for word in frame.split(' ') {
        let bare = word.trim_end_matches([',', '.', ':', '?', ';']);
        let known = bare.to_lowercase();
        let others = OTHERS.iter().find(|(w, _)| *w == known).map(|(_, others)| *others);
        if word == bare && SPARE.contains(&known.as_str()) && rng.random_bool(0.15) {
            continue;
        }
        match others.filter(|_| rng.random_bool(0.3)).and_then(|o| o.choose(rng)) {
            Some(other) => out.push(format!("{other}{}", &word[bare.len()..])),
            None => out.push(word.to_owned()),
        }
        if rng.random_bool(added) {
            out.push(if rng.random_bool(0.3) { invented(rng) } else { filler(rng) });
        }
    }
    if rng.random_bool(0.2) {
        out.push((*CLOSERS.choose(rng).expect("not empty")).to_owned());
    }
    let mut text = out.join(" ");
    if rng.random_bool(0.2) {
        text.truncate(text.trim_end_matches(['.', '?']).len());
    }
    if rng.random_bool(0.2) && text.starts_with(|c: char| c.is_ascii_uppercase()) {
        text[..1].make_ascii_lowercase();
    }
    text
}

fn filler(rng: &mut impl Rng) -> String {
    (*FILLERS.choose(rng).expect("not empty")).to_owned()
}

/// A word that nobody knows.
pub(super) fn invented(rng: &mut impl Rng) -> String {
    let letters = [b"bcdfghklmnprstvwz".as_slice(), b"aeiou"];
    let pick = |i: usize, rng: &mut _| char::from(*letters[i % 2].choose(rng).expect("not empty"));
    let begin = rng.random_range(0..2);
    (begin..begin + rng.random_range(3..9)).map(|i| pick(i, rng)).collect()
}

/// Two clauses the other way round, unless both name things: their order is the program's.
fn swapped(frame: &str, rng: &mut impl Rng) -> String {
    let names =
        |part: &str| ["{a}", "{an}", "{as}", "{b}", "{bs}", "{c}"].iter().any(|slot| part.contains(slot));
    let cuts: Vec<(&str, &str)> = frame
        .match_indices([',', ':', '.', '?'])
        .filter(|(at, sign)| frame[at + sign.len()..].starts_with(' '))
        .map(|(at, sign)| (&frame[..at], frame[at + sign.len() + 1..].trim_end_matches(['.', '?'])))
        .filter(|(first, second)| !(names(first) && names(second)))
        .collect();
    match cuts.choose(rng) {
        Some((first, second)) => {
            let sign = [", ", ": ", ". ", "? "].choose(rng).expect("not empty");
            format!("{second}{sign}{first}?")
        }
        None => frame.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::frames::{HELD_OUT_FRAMES, frames};
    use super::super::spec::Form;
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    fn slots(text: &str) -> Vec<&str> {
        text.split('{').skip(1).map(|s| &s[..s.find('}').unwrap()]).collect()
    }

    #[test]
    fn what_is_named_stays_in_its_order() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let (mut changed, mut all) = (0, 0);
        for &form in Form::ALL {
            for frame in frames(form) {
                for _ in 0..50 {
                    let text = loosely(frame, &mut rng);
                    let (mut before, mut after) = (slots(frame), slots(&text));
                    let named = |s: &&str| s.len() <= 2;
                    let of = |v: &[&str]| {
                        v.iter().copied().filter(|s| named(s)).map(str::to_owned).collect::<Vec<_>>()
                    };
                    assert_eq!(of(&before), of(&after), "{frame} → {text}");
                    before.sort();
                    after.sort();
                    assert_eq!(before, after, "{frame} → {text}");
                    changed += usize::from(text != *frame);
                    all += 1;
                }
            }
        }
        assert!(changed > all * 3 / 4, "{changed} of {all}");
    }

    #[test]
    fn no_word_comes_from_held_out_frames_alone() {
        let words = |text: &str| -> Vec<String> {
            let word = |w: &str| w.trim_matches([',', '.', ':', '?', ';', '!']).to_lowercase();
            text.split(' ').map(word).filter(|w| !w.is_empty() && !w.contains('{')).collect()
        };
        let (mut seen, mut held) = (Vec::new(), Vec::new());
        for &form in Form::ALL {
            let all = frames(form);
            let kept = if form == Form::HELD_OUT { 0 } else { all.len() - HELD_OUT_FRAMES };
            seen.extend(all[..kept].iter().flat_map(|f| words(f)));
            held.extend(all[kept..].iter().flat_map(|f| words(f)));
        }
        held.retain(|w| !seen.contains(w));
        assert!(held.len() > 10, "{held:?}");
        let own = OPENERS.iter().chain(&CLOSERS).chain(&FILLERS).flat_map(|t| words(t));
        for word in own.chain(OTHERS.iter().flat_map(|(_, o)| o.iter().flat_map(|t| words(t)))) {
            assert!(!held.contains(&word), "{word}");
        }
    }
}
