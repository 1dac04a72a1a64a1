//! Frames said in other ways: what planner and verifier read besides the frames themselves, so that they
//! learn to look for what a question names and not for how its sentence goes.
//!
//! A frame's slots and their order stay; the words around them are dropped, exchanged, added, invented.
//! Held-out frames are no source of these words.

use super::spec::Form;
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
    ("number", &["amount", "quantity", "count"]),
    ("which", &["what"]),
    ("what", &["which"]),
    ("room", &["place", "space", "interior"]),
    ("options", &["alternatives", "replies"]),
    ("choices", &["alternatives", "replies"]),
    ("choose", &["take", "decide"]),
];

/// What people say besides the frames of the questions: a critic has read more than is asked of it.
/// They have no word that only held-out frames have.
pub(super) fn more_frames(form: Form) -> &'static [&'static str] {
    match form {
        Form::Count => &[
            "Number of {as}?",
            "I need the count of {as}.",
            "{as}: how many?",
            "What number of {as} is visible?",
            "Please say how many {as} you can see.",
            "What count of {as} do you get?",
            "How many things here are {as}?",
            "The count of {as} in this picture?",
            "Tell me the count of {as} you see.",
            "What would be the number of all {as}?",
        ],
        Form::Exists => &[
            "Any {a} here?",
            "Can I find {an} in this picture?",
            "Could there be {an} in this room?",
            "Does {an} appear anywhere?",
            "Yes or no: is there {an}?",
            "Say whether there is {an}.",
        ],
        Form::Depth => &[
            "Say which of the two is {near}: the {a} or the {b}.",
            "Is it the {a} or the {b} that is {near_to} the camera?",
            "Measured from the camera, is the {a} or the {b} {near}?",
            "Which thing is {near_to} me: the {a} or the {b}?",
            "Judging by distance, which is {near}, the {a} or the {b}?",
            "The {a}, or the {b}? One is {near_to} the camera.",
        ],
        Form::Position => &[
            "Could you say if the {a} is {side} the {b}?",
            "Yes or no: the {a} is {side} the {b}.",
            "Is the {a} somewhere {side} the {b}?",
            "Does the {a} lie {side} the {b}?",
            "Check if the {a} is {side} the {b}.",
            "Is it {side} the {b}, the {a}?",
        ],
        Form::Size => &[
            "Let the {a} be {m} m {dim_a}: how {dim_b} is the {b}?",
            "I measured the {a}: it is {m} meters {dim_a}. How {dim_b} is the {b} then?",
            "As the {a} is {m} meters {dim_a}, say how {dim_b} the {b} is.",
            "How many meters {dim_b} is the {b}, when the {a} is {m} m {dim_a}?",
            "Use the {a}, {m} m {dim_a}, to work out how {dim_b} the {b} is in meters.",
            "Imagine that the {a} is {m} meters {dim_a}. Then how {dim_b} is the {b}?",
            "Someone says the {a} is {m} m {dim_a}. So how {dim_b} is the {b} in meters?",
            "{m} meters is how {dim_a} the {a} is. And how {dim_b} is the {b}?",
        ],
        Form::Colour => &[
            "The color of the {a}?",
            "Say what color the {a} is.",
            "Of what color is the {a}?",
            "I want the color of the {a}.",
            "What would be the color of the {a}?",
        ],
        Form::IsColour => &[
            "Is it {colour}, the {a}?",
            "Say whether the {a} is {colour}.",
            "Does the {a} have the color {colour}?",
            "Yes or no: the {a} is {colour}.",
            "Check if the {a} is {colour}.",
        ],
        Form::CompareCounts => &[
            "{more} {as} than {bs}: is that so?",
            "Would you say there are {more} {as} than {bs}?",
            "Yes or no: you can see {more} {as} than {bs}.",
            "Say whether there are {more} {as} than {bs}.",
            "If you count both, are there {more} {as} than {bs}?",
        ],
        Form::Superlative => &[
            "Which of the three is the {most}: the {a}, the {b} or the {c}?",
            "Say which is {most}, the {a}, the {b} or the {c}.",
            "Three things: the {a}, the {b}, the {c}. Which one is the {most}?",
            "From the {a}, the {b} and the {c}, pick the {most}.",
            "Given the {a}, the {b} and the {c}, what is the {most} one?",
        ],
        Form::ColourOptions => &[
            "The color of the {a} is one of {options}. Which?",
            "From {options}, what is the color of the {a}?",
            "Say which color the {a} is: {options}?",
            "What color would you give the {a}? Options: {options}.",
            "Of what color is the {a}? One of {options}.",
        ],
        Form::SideOptions => &[
            "Relative to the {b}, where is the {a}? Choose from {options}.",
            "With respect to the {b}, on which side is the {a}? It can be {options}.",
            "Take the {b} as the center. Where is the {a}: {options}?",
            "If you look at the {b}, on which side of it do you see the {a}? One of {options}.",
            "Where is the {a}, seen from the {b}? Choices: {options}.",
            "For the {a}, say on which side of the {b} it is: {options}.",
            "The {b} and the {a}: on which side is the {a}? Options: {options}.",
            "Beginning at the {b}, where would you look for the {a}? Options: {options}.",
            "Against the {b}, on which side do you see the {a}: {options}?",
            "The {b} is here. And the {a}, on which side of it? It is {options}.",
            "You know the {b}: now tell me on which side of it to look for the {a}. {options}.",
        ],
        Form::DepthOptions => &[
            "Relative to the {b}, is the {a} in front of it or behind it? Options: {options}.",
            "Say whether the {a} is in front of the {b} or behind it: {options}.",
            "By distance to the camera, where is the {a} with respect to the {b}? Choose from {options}.",
            "Is the {a} behind the {b}, or in front of it? One of {options}.",
            "Measured from the camera, is the {a} behind or in front of the {b}? Options: {options}.",
        ],
        Form::ColourOfMost => &[
            "Say what color the {most} {a} is.",
            "Look for the {most} {a}: what is its color?",
            "Of what color is the {most} {a}?",
            "Among the {as}, which color does the {most} have?",
            "The color of the {most} {a}?",
        ],
        Form::CountBeside => &[
            "Number of {as} {side} the {b}?",
            "I need the count of {as} {side} the {b}.",
            "What number of {as} can you see {side} the {b}?",
            "Say how many {as} are {side} the {b}.",
            "How many things {side} the {b} are {as}?",
            "The count of {as} that you see {side} the {b}?",
            "Tell me the count of {as} {side} the {b}.",
            "What would be the number of all {as} {side} the {b}?",
            "For the {as} that are {side} the {b}, say how many there are.",
        ],
        Form::MostNearer => &[
            "Say whether the {most} {a} is {near} than the {b}.",
            "Yes or no: the {most} {a} is {near_to} the camera than the {b}.",
            "Is the {most} one of the {as} {near} than the {b}?",
            "Check if the {most} {a} is {near_to} us than the {b}.",
            "Measured from the camera, is the {most} {a} {near} than the {b}?",
        ],
        Form::CountNearer => &[],
    }
}

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
            for frame in frames(form).iter().chain(more_frames(form)) {
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
        let more = Form::ALL.iter().flat_map(|&f| more_frames(f)).flat_map(|f| words(f));
        for word in own.chain(more).chain(OTHERS.iter().flat_map(|(_, o)| o.iter().flat_map(|t| words(t)))) {
            assert!(!held.contains(&word), "{word}");
        }
    }
}
