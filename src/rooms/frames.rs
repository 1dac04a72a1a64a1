//! Sentence frames: how a [`Spec`] is worded, and how a sentence is read back.
//!
//! Each form has at least eight frames; its last two are held out of all training data of planner
//! and verifier. Slots: `{a}` `{b}` `{c}` nouns, `{as}` `{bs}` plurals, `{an}` with an article,
//! `{near}` closer, `{near_to}` closer to; the others hold what they are called.
//! The first frame of a form is also what programs ask the VLM about the whole image.

use super::Kind;
use super::spec::{Dim, Form, More, Most, Near, Noun, Side, Spec, colour_of, plural};
use super::template::{fill, read};
use super::wording::{loosely, more_frames};
use rand::seq::IndexedRandom;

/// How many frames of each form, at the end of its list, are held out.
pub const HELD_OUT_FRAMES: usize = 2;

/// The wordings of a form.
pub fn frames(form: Form) -> &'static [&'static str] {
    match form {
        Form::Count => &[
            "How many {as} are there?",
            "How many {as} can you see?",
            "Count the {as}.",
            "What is the number of {as} in the picture?",
            "How many {as} are in this room?",
            "Tell me how many {as} there are.",
            "In the image, how many {as} do you see?",
            "Give the number of {as}.",
            "How many {as} does the room contain?",
            "What is the total count of {as} shown here?",
        ],
        Form::Exists => &[
            "Is there {an}?",
            "Is there {an} in the picture?",
            "Can you see {an}?",
            "Does the room have {an}?",
            "Is {an} in the image?",
            "Do you see {an} here?",
            "Does this picture show {an}?",
            "Is any {a} visible?",
            "Does the scene include {an}?",
            "Can {an} be found in this room?",
        ],
        Form::Depth => &[
            "Which is {near_to} the camera, the {a} or the {b}?",
            "Which one is {near}: the {a} or the {b}?",
            "What is {near_to} the camera, the {a} or the {b}?",
            "Of the {a} and the {b}, which is {near}?",
            "Is the {a} or the {b} {near_to} the camera?",
            "Between the {a} and the {b}, which one is {near}?",
            "The {a} or the {b}: which is {near_to} us?",
            "Tell me which is {near_to} the viewer, the {a} or the {b}.",
            "From where we stand, which of the {a} and the {b} is {near}?",
            "Name the thing that is {near_to} the camera: the {a} or the {b}.",
        ],
        Form::Position => &[
            "Is the {a} {side} the {b}?",
            "In the picture, is the {a} {side} the {b}?",
            "Is it true that the {a} is {side} the {b}?",
            "Would you say the {a} is {side} the {b}?",
            "Can the {a} be seen {side} the {b}?",
            "Does the {a} appear {side} the {b}?",
            "Looking at the image, is the {a} {side} the {b}?",
            "The {a} is {side} the {b}, yes or no?",
            "Do we find the {a} {side} the {b} in this image?",
            "Tell me whether the {a} stands {side} the {b}.",
        ],
        Form::Size => &[
            "If the {a} is {m} meters {dim_a}, how {dim_b} is the {b} in meters?",
            "If the {a} is {m} m {dim_a}, how {dim_b} is the {b}?",
            "The {a} is {m} meters {dim_a}. How {dim_b} is the {b}?",
            "Given that the {a} is {m} m {dim_a}, how many meters {dim_b} is the {b}?",
            "How {dim_b} is the {b} if the {a} is {m} meters {dim_a}?",
            "Suppose the {a} is {m} m {dim_a}. How {dim_b} is the {b} in meters?",
            "Knowing that the {a} is {m} meters {dim_a}, how {dim_b} is the {b}?",
            "With the {a} being {m} m {dim_a}, how {dim_b} is the {b}?",
            "Assume the {a} is {m} meters {dim_a}; how {dim_b} would the {b} be?",
            "Taking the {a} to be {m} m {dim_a}, tell me how {dim_b} the {b} is.",
        ],
        Form::Colour => &[
            "What color is the {a}?",
            "What is the color of the {a}?",
            "Which color does the {a} have?",
            "Tell me the color of the {a}.",
            "What color does the {a} have?",
            "In which color is the {a}?",
            "The {a} is of what color?",
            "Which color is the {a} in the picture?",
            "Name the color of the {a}.",
            "How would you describe the color of the {a}?",
        ],
        Form::IsColour => &[
            "Is the {a} {colour}?",
            "Is the {a} in the picture {colour}?",
            "Does the {a} look {colour}?",
            "Is the color of the {a} {colour}?",
            "Would you call the {a} {colour}?",
            "Is it true that the {a} is {colour}?",
            "The {a} is {colour}, yes or no?",
            "Is {colour} the color of the {a}?",
            "Tell me whether the {a} is {colour}.",
            "Can we say that the {a} shown here is {colour}?",
        ],
        Form::CompareCounts => &[
            "Are there {more} {as} than {bs}?",
            "Are there {more} {as} than {bs} in the picture?",
            "Do you see {more} {as} than {bs}?",
            "Does the room have {more} {as} than {bs}?",
            "Is it true that there are {more} {as} than {bs}?",
            "Can you count {more} {as} than {bs}?",
            "In this image, are there {more} {as} than {bs}?",
            "There are {more} {as} than {bs}, yes or no?",
            "Tell me whether {more} {as} than {bs} are shown.",
            "Does the scene contain {more} {as} than {bs}?",
        ],
        Form::Superlative => &[
            "Which is the {most}: the {a}, the {b} or the {c}?",
            "Of the {a}, the {b} and the {c}, which is the {most}?",
            "Which one is the {most}, the {a}, the {b} or the {c}?",
            "Among the {a}, the {b} and the {c}, which is {most}?",
            "What is the {most} thing: the {a}, the {b} or the {c}?",
            "The {a}, the {b} and the {c}: which of them is the {most}?",
            "Tell me which is the {most}: the {a}, the {b} or the {c}.",
            "Out of the {a}, the {b} and the {c}, which one is {most}?",
            "Compare the {a}, the {b} and the {c} and name the {most} one.",
            "Looking at the {a}, the {b} and the {c}, what would be the {most}?",
        ],
        Form::ColourOptions => &[
            "What color is the {a}? Choose from {options}.",
            "What is the color of the {a}? Options: {options}.",
            "Which color does the {a} have? Answer with one of {options}.",
            "What color is the {a}: {options}?",
            "Pick the color of the {a} from {options}.",
            "Tell me the color of the {a}. Choices: {options}.",
            "Which of these is the color of the {a}: {options}?",
            "The {a} is of what color? Options: {options}.",
            "Select the color that the {a} has. Possible answers: {options}.",
            "Out of {options}, which color fits the {a}?",
        ],
        Form::SideOptions => &[
            "Where is the {a} relative to the {b}? Choose from {options}.",
            "On which side of the {b} is the {a}? Choose from {options}.",
            "Is the {a} on the left or on the right of the {b}? Options: {options}.",
            "Which side of the {b} is the {a} on? Answer with one of {options}.",
            "Seen from the {b}, on which side is the {a}? Options: {options}.",
            "Pick the side of the {b} on which the {a} is: {options}.",
            "Tell me on which side of the {b} the {a} is. Choices: {options}.",
            "The {a} is on what side of the {b}? Options: {options}.",
            "Select the side of the {b} where the {a} stands. Possible answers: {options}.",
            "Compared with the {b}, where do you find the {a}? It is one of {options}.",
        ],
        Form::DepthOptions => &[
            "Is the {a} in front of or behind the {b}? Choose from {options}.",
            "Is the {a} in front of the {b} or behind it? Options: {options}.",
            "Is the {a} nearer to us than the {b}, or behind it? Choose from {options}.",
            "Going by depth, where is the {a} relative to the {b}? Answer with one of {options}.",
            "In depth, is the {a} in front of or behind the {b}? Options: {options}.",
            "Pick how the {a} lies in depth with respect to the {b}: {options}.",
            "Tell me whether the {a} is in front of or behind the {b}. Choices: {options}.",
            "The {a} is where in depth, seen against the {b}? Options: {options}.",
            "Select where the {a} stands in depth beside the {b}. Possible answers: {options}.",
            "Does the {a} come in front of the {b}, or behind? It is one of {options}.",
        ],
        Form::ColourOfMost => &[
            "What color is the {most} {a}?",
            "What is the color of the {most} {a}?",
            "Which color does the {most} {a} have?",
            "Tell me the color of the {most} {a}.",
            "Find the {most} {a}. What color is it?",
            "In which color is the {most} {a}?",
            "Of all the {as}, what color is the {most} one?",
            "The {most} {a} is of what color?",
            "Name the color of the {most} {a}.",
            "Looking at the {most} {a}, which color do you see?",
        ],
        Form::CountBeside => &[
            "How many {as} are {side} the {b}?",
            "How many {as} can you see {side} the {b}?",
            "Count the {as} {side} the {b}.",
            "What is the number of {as} {side} the {b}?",
            "In the picture, how many {as} are {side} the {b}?",
            "Tell me how many {as} there are {side} the {b}.",
            "Looking {side} the {b}, how many {as} do you see?",
            "Give the number of {as} {side} the {b}.",
            "How many of the {as} stand {side} the {b}?",
            "What is the total count of {as} found {side} the {b}?",
        ],
        Form::CountNearer => &[
            "How many {as} are {near} than the {b}?",
            "How many {as} are {near_to} the camera than the {b}?",
            "Count the {as} that are {near} than the {b}.",
            "What is the number of {as} {near} than the {b}?",
            "In the picture, how many {as} are {near} than the {b}?",
            "Tell me how many {as} are {near} than the {b}.",
            "Give the number of {as} that are {near} than the {b}.",
            "How many of the {as} are {near_to} us than the {b}?",
        ],
        Form::MostNearer => &[
            "Is the {most} {a} {near} than the {b}?",
            "Is the {most} {a} {near_to} the camera than the {b}?",
            "Is it true that the {most} {a} is {near} than the {b}?",
            "Would you say the {most} {a} is {near} than the {b}?",
            "Find the {most} {a}. Is it {near} than the {b}?",
            "In the picture, is the {most} {a} {near} than the {b}?",
            "The {most} {a} is {near} than the {b}, yes or no?",
            "Does the {most} {a} appear {near} than the {b}?",
            "Tell me whether the {most} {a} is {near} than the {b}.",
            "Can we say that the {most} {a} stands {near_to} us than the {b}?",
        ],
    }
}

/// Is this frame kept out of all training data of planner and verifier? The frames of
/// [`Form::HELD_OUT`] all are.
pub fn frame_held_out(form: Form, frame: usize) -> bool {
    form == Form::HELD_OUT || frame + HELD_OUT_FRAMES >= frames(form).len()
}

/// The frames that training data may use, as a number: they come first.
pub fn seen_frames(form: Form) -> usize {
    if form == Form::HELD_OUT { 0 } else { frames(form).len() - HELD_OUT_FRAMES }
}

/// The sentence that a program asks the VLM about the whole image.
pub fn prompt(spec: &Spec) -> String {
    match spec {
        Spec::Size { target, dim, .. } => fill(SIZE_PROMPT, |slot| match slot {
            "dim" => dim.text().to_owned(),
            _ => target.to_string(),
        }),
        _ => sentence(spec, 0),
    }
}

/// What is asked about the whole image where a size is wanted and the reference is missing.
pub(super) const SIZE_PROMPT: &str = "How {dim} is the {a} in meters?";

/// The question in the words of frame number `frame` of its form.
pub fn sentence(spec: &Spec, frame: usize) -> String {
    fill(frames(spec.form())[frame], |slot| value(spec, slot))
}

/// The question in words that are no frame's, or in a frame's where there are no others, loosely or not.
pub fn other_sentence(spec: &Spec, frame: usize, rng: &mut impl rand::Rng) -> String {
    let frame = more_frames(spec.form()).choose(rng).unwrap_or(&frames(spec.form())[frame]);
    match rng.random_bool(0.5) {
        true => loosely_said(spec, frame, rng),
        false => fill(frame, |slot| value(spec, slot)),
    }
}

/// The question loosely in the words of a frame, and never in those of a held-out one.
pub fn loose_sentence(spec: &Spec, frame: usize, rng: &mut impl rand::Rng) -> String {
    loosely_said(spec, frames(spec.form())[frame], rng)
}

fn loosely_said(spec: &Spec, frame: &str, rng: &mut impl rand::Rng) -> String {
    loop {
        let text = fill(&loosely(frame, rng), |slot| value(spec, slot));
        if parse(&text).is_none_or(|(spec, frame)| !frame_held_out(spec.form(), frame)) {
            return text;
        }
    }
}

fn value(spec: &Spec, slot: &str) -> String {
    if slot == "options" {
        return spec.options().unwrap_or_default().join(", ");
    }
    let nouns = spec.nouns();
    let noun = |i: usize| nouns[i];
    match (slot, spec) {
        ("a", _) => noun(0).to_string(),
        ("b", _) => noun(1).to_string(),
        ("c", _) => noun(2).to_string(),
        ("as", _) => noun(0).plural(),
        ("bs", _) => noun(1).plural(),
        ("an", _) => noun(0).with_article(),
        (
            "near" | "near_to",
            Spec::Depth { near, .. } | Spec::CountNearer { near, .. } | Spec::MostNearer { near, .. },
        ) => if slot == "near" { near.text() } else { with_preposition(*near) }.to_owned(),
        ("side", Spec::Position { side, .. } | Spec::CountBeside { side, .. }) => side.text().to_owned(),
        (
            "most",
            Spec::Superlative { most, .. } | Spec::ColourOfMost { most, .. } | Spec::MostNearer { most, .. },
        ) => most.text().to_owned(),
        ("more", Spec::CompareCounts { more, .. }) => more.text().to_owned(),
        ("colour", Spec::IsColour { colour, .. }) => colour.to_string(),
        ("m", Spec::Size { metres, .. }) => metres.to_string(),
        ("dim_a", Spec::Size { reference_dim, .. }) => reference_dim.text().to_owned(),
        ("dim_b", Spec::Size { dim, .. }) => dim.text().to_owned(),
        _ => unreachable!("slot {slot} in a frame of {:?}", spec.form()),
    }
}

fn accept(slot: &str, held: &str) -> bool {
    match slot {
        "a" | "b" | "c" => Noun::parse(held).is_some_and(|n| n.to_string() == held),
        "as" | "bs" => Noun::parse(held).is_some_and(|n| n.plural() == held),
        "an" => article(held).is_some(),
        "near" => Near::parse(held).is_some(),
        "near_to" => near_to(held).is_some(),
        "side" => Side::parse(held).is_some(),
        "most" => Most::parse(held).is_some(),
        "more" => More::parse(held).is_some(),
        "colour" => colour_of(held).is_some(),
        "m" => held.parse::<f64>().is_ok_and(f64::is_finite),
        "dim" | "dim_a" | "dim_b" => Dim::parse(held).is_some(),
        _ => !held.contains(['?', '.', ':']),
    }
}

/// "closer to", "farther from".
fn near_to(held: &str) -> Option<Near> {
    Near::ALL.iter().copied().find(|&near| with_preposition(near) == held)
}

fn with_preposition(near: Near) -> &'static str {
    match near {
        Near::Closer => "closer to",
        Near::Farther => "farther from",
    }
}

fn article(held: &str) -> Option<Noun> {
    let noun = held.strip_prefix("a ").or_else(|| held.strip_prefix("an "))?;
    Noun::parse(noun).filter(|n| n.to_string() == noun)
}

/// Reads a sentence in any of the frames, held-out ones too; also says in which.
pub fn parse(text: &str) -> Option<(Spec, usize)> {
    Form::ALL.iter().find_map(|&form| {
        frames(form).iter().enumerate().find_map(|(frame, template)| {
            let slots = read(template, text, &accept)?;
            Some((build(form, &slots)?, frame))
        })
    })
}

/// Reads [`SIZE_PROMPT`].
pub fn parse_size_prompt(text: &str) -> Option<(Noun, Dim)> {
    let slots = read(SIZE_PROMPT, text, &accept)?;
    Some((Noun::parse(slots[1].1)?, Dim::parse(slots[0].1)?))
}

fn build(form: Form, slots: &[(&str, &str)]) -> Option<Spec> {
    let get = |names: &[&str]| slots.iter().find(|(slot, _)| names.contains(slot)).map(|&(_, held)| held);
    let a = || {
        let held = get(&["a", "as", "an"])?;
        article(held).or_else(|| Noun::parse(held))
    };
    let b = || Noun::parse(get(&["b", "bs"])?);
    let kind = || a().filter(|n| n.colour.is_none()).map(|n| n.kind);
    let near = || get(&["near"]).and_then(Near::parse).or_else(|| near_to(get(&["near_to"])?));
    let side = || Side::parse(get(&["side"])?);
    let most = || Most::parse(get(&["most"])?);
    let options =
        || -> Option<Vec<String>> { Some(get(&["options"])?.split(", ").map(str::to_owned).collect()) };
    Some(match form {
        Form::Count => Spec::Count { of: a()? },
        Form::Exists => Spec::Exists { of: a()? },
        Form::Depth => Spec::Depth { a: a()?, b: b()?, near: near()? },
        Form::Position => Spec::Position { a: a()?, b: b()?, side: side()? },
        Form::Size => Spec::Size {
            reference: a()?,
            reference_dim: Dim::parse(get(&["dim_a"])?)?,
            metres: get(&["m"])?.parse().ok()?,
            target: b()?,
            dim: Dim::parse(get(&["dim_b"])?)?,
        },
        Form::Colour => Spec::Colour { of: kind()? },
        Form::IsColour => Spec::IsColour { of: kind()?, colour: colour_of(get(&["colour"])?)? },
        Form::CompareCounts => Spec::CompareCounts { a: a()?, b: b()?, more: More::parse(get(&["more"])?)? },
        Form::Superlative => {
            let c = Noun::parse(get(&["c"])?)?;
            let of: [Noun; 3] = [a()?, b()?, c];
            if of.iter().any(|n| n.colour.is_some()) {
                return None;
            }
            Spec::Superlative { of: of.map(|n| n.kind), most: most()? }
        }
        Form::ColourOptions => {
            let options = options()?.iter().map(|o| colour_of(o)).collect::<Option<Vec<_>>>()?;
            Spec::ColourOptions { of: kind()?, options: options.try_into().ok()? }
        }
        Form::SideOptions => Spec::SideOptions { a: a()?, b: b()?, options: options()?.try_into().ok()? },
        Form::DepthOptions => Spec::DepthOptions { a: a()?, b: b()?, options: options()?.try_into().ok()? },
        Form::ColourOfMost => Spec::ColourOfMost { of: kind()?, most: most()? },
        Form::CountBeside => Spec::CountBeside { of: a()?, than: b()?, side: side()? },
        Form::CountNearer => Spec::CountNearer { of: a()?, than: b()?, near: near()? },
        Form::MostNearer => Spec::MostNearer { of: kind()?, most: most()?, than: b()?, near: near()? },
    })
}

/// The sentence with every name, colour and number replaced: two questions of the same skeleton
/// differ in names only.
pub fn skeleton(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let is_part = |c: char| c.is_alphanumeric() || c == '.';
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if !is_part(first) {
            out.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        }
        let end = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
        let token = &rest[..end];
        let word = token.trim_end_matches('.').to_lowercase();
        let noun = Kind::ALL.iter().any(|&k| k.word() == word || plural(k) == word);
        let placeholder = if word.is_empty() {
            None
        } else if noun {
            Some("<n>")
        } else if colour_of(&word).is_some() {
            Some("<c>")
        } else if word.parse::<f64>().is_ok() {
            Some("<m>")
        } else {
            None
        };
        match placeholder {
            Some(p) => {
                out.push_str(p);
                out.push_str(&token[word.len()..]);
            }
            None => out.push_str(&token.to_lowercase()),
        }
        rest = &rest[end..];
    }
    // Whether a thing's colour was named is part of its name.
    out.replace("<c> <n>", "<n>").replace("an <n>", "a <n>")
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::rooms::spec::AnyNoun;

    #[test]
    fn sentences_read_back() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        for &form in Form::ALL {
            assert!(frames(form).len() >= 8);
            for frame in 0..frames(form).len() {
                let mut tried = 0;
                while tried < 5 {
                    let mut supply = ChaCha8Rng::seed_from_u64(rand::Rng::random(&mut rng));
                    let Some(spec) = Spec::draw(form, &mut AnyNoun(&mut supply), &mut rng) else { continue };
                    let text = sentence(&spec, frame);
                    let (read, _) = parse(&text).unwrap_or_else(|| panic!("unread: {text}"));
                    assert_eq!(read, spec, "{text}");
                    tried += 1;
                }
            }
        }
    }

    #[test]
    fn skeletons_hide_names() {
        let a = skeleton("If the red chair is 0.9 m tall, how tall is the lamp?");
        assert_eq!(a, skeleton("If the shelf is 1.25 m tall, how tall is the grey tv?"));
        assert_ne!(a, skeleton("If the red chair is 0.9 m tall, how wide is the lamp?"));
    }
}
