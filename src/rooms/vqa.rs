//! What the VLM of this world can be asked, in which words, and the true answers.
//!
//! Two kinds of prompts. About a crop: its colour, its kind, yes or no to either. About the whole
//! picture: every question of [`super::frames`] (programs use their first frames as fallback),
//! and the size of a thing. Prompts outside of this grammar are answered "unknown".

use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::frames::{self, parse_size_prompt, sentence};
use super::oracle::OracleTools;
use super::spec::{Form, Noun, Spec, colour_of};
use super::template::{fill, read};
use super::truth::NounsOf;
use super::{Colour, Kind, Thing, View};
use crate::sight::BBox;

/// The answer to what cannot be answered.
pub const UNKNOWN: &str = "unknown";

/// What a crop can be asked.
#[derive(Clone, Debug, PartialEq)]
pub enum CropAsk {
    Colour,
    /// The colour, told in the words of the options.
    ColourFrom(Vec<String>),
    Kind,
    IsColour(Colour),
    IsKind(Noun),
}

impl CropAsk {
    /// As figures name it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Colour => "colour",
            Self::ColourFrom(_) => "colour-from",
            Self::Kind => "kind",
            Self::IsColour(_) => "is-colour",
            Self::IsKind(_) => "is-kind",
        }
    }
}

/// Wordings; the first of each is the one that programs use.
const COLOUR: &[&str] = &[
    "What color is it?",
    "What is its color?",
    "What color is this?",
    "Which color does it have?",
    "Tell me its color.",
    "What color is the object?",
    "What is the color of the object?",
    "What color is the {n}?",
    "What is the color of the {n}?",
    "Which color does the {n} have?",
];
const KIND: &[&str] = &[
    "What is it?",
    "What is this?",
    "What is shown here?",
    "What kind of thing is it?",
    "Which object is this?",
    "Name the object.",
];
const IS_COLOUR: &[&str] = &[
    "Is it {colour}?",
    "Is this {colour}?",
    "Is the object {colour}?",
    "Does it look {colour}?",
    "Is its color {colour}?",
    "Is the {n} {colour}?",
];
const IS_KIND: &[&str] =
    &["Is it {an}?", "Is this {an}?", "Is the object {an}?", "Does this show {an}?", "Is there {an}?"];
const COLOUR_FROM: &[&str] = &[
    "What color is it? Choose from {options}.",
    "What color is the {n}? Choose from {options}.",
    "What is its color? Options: {options}.",
];

fn accept(slot: &str, held: &str) -> bool {
    match slot {
        "n" => Noun::parse(held).is_some(),
        "colour" => colour_of(held).is_some(),
        "an" => with_article(held).is_some(),
        _ => !held.contains(['?', '.', ':']),
    }
}

fn with_article(held: &str) -> Option<Noun> {
    Noun::parse(held.strip_prefix("a ").or_else(|| held.strip_prefix("an "))?)
}

/// Small differences of writing that change no meaning.
fn normal(prompt: &str) -> String {
    let words: Vec<&str> = prompt.split_whitespace().collect();
    let mut text = words.join(" ").replace("colour", "color").replace("grey", "gray");
    // Frames start with a capital and end with a mark; programs may do neither.
    if let Some(first) = text.get(..1) {
        text = first.to_uppercase() + &text[1..];
    }
    if !text.ends_with(['?', '.']) {
        text.push('?');
    }
    text
}

/// Reads a prompt about a crop.
pub fn parse_crop(prompt: &str) -> Option<CropAsk> {
    let prompt = normal(prompt);
    let find = |templates: &'static [&'static str]| {
        templates.iter().find_map(|t| {
            let slots = read(t, &prompt, &accept)?;
            // The slot that carries the meaning stands last in every wording.
            Some(slots.last().map(|&(_, held)| held.to_owned()).unwrap_or_default())
        })
    };
    if find(COLOUR).is_some() {
        Some(CropAsk::Colour)
    } else if let Some(options) = find(COLOUR_FROM) {
        Some(CropAsk::ColourFrom(options.split(", ").map(str::to_owned).collect()))
    } else if find(KIND).is_some() {
        Some(CropAsk::Kind)
    } else if let Some(colour) = find(IS_COLOUR) {
        Some(CropAsk::IsColour(colour_of(&colour)?))
    } else {
        Some(CropAsk::IsKind(with_article(&find(IS_KIND)?)?))
    }
}

/// The true answer for a thing that fills the crop.
pub fn answer_crop(thing: &Thing, ask: &CropAsk) -> String {
    let yes_no = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    match ask {
        CropAsk::Colour => thing.colour.to_string(),
        CropAsk::ColourFrom(options) => {
            let fits = |o: &&String| o.eq_ignore_ascii_case(thing.colour.word());
            options.iter().find(fits).map_or_else(|| thing.colour.to_string(), |o| o.to_lowercase())
        }
        CropAsk::Kind => thing.kind.to_string(),
        CropAsk::IsColour(colour) => yes_no(thing.colour == *colour),
        CropAsk::IsKind(noun) => {
            yes_no(thing.kind == noun.kind && noun.colour.is_none_or(|c| c == thing.colour))
        }
    }
}

/// The answer to a prompt about the whole picture, as far as it can be seen: without the margins
/// of [`Spec::truth`], since a program may ask anything.
pub fn answer_whole(view: &View, prompt: &str) -> String {
    let prompt = normal(prompt);
    if let Some((noun, dim)) = parse_size_prompt(&prompt) {
        let tools = OracleTools::new(view);
        return match tools.things(&noun.to_string()).first() {
            Some(thing) => format!("{:.2}", thing.size[usize::from(dim == super::spec::Dim::Height)]),
            None => UNKNOWN.to_owned(),
        };
    }
    let Some((spec, _)) = frames::parse(&prompt) else { return UNKNOWN.to_owned() };
    let mut recipe = spec.recipe();
    // Without its fallback the program answers by itself or fails, and cannot come back here.
    recipe.fallback = None;
    match recipe.run(&mut OracleTools::new(view)) {
        Ok(serde_json::Value::String(text)) => text.to_lowercase(),
        Ok(value) => value.to_string(),
        Err(_) => UNKNOWN.to_owned(),
    }
}

/// A question to the VLM with its true answer: `(box or whole picture, prompt, answer)`.
pub type VqaSample = (Option<BBox>, String, String);

/// Training data for the VLM from one picture: crops of clear things in every wording, and
/// questions about the whole picture in the frames that training may use.
pub fn vqa_samples(view: &View, rng: &mut impl Rng) -> Vec<VqaSample> {
    let mut samples = Vec::new();
    let clear: Vec<&Thing> = view.things.iter().filter(|t| t.is_clear()).collect();
    for thing in &clear {
        let (colour, kind) = (pick(Colour::ALL, rng), pick(Kind::ALL, rng));
        let asks = [
            CropAsk::Colour,
            CropAsk::Kind,
            CropAsk::IsColour(if rng.random_bool(0.5) { thing.colour } else { colour }),
            CropAsk::IsKind(Noun::new(
                if rng.random_bool(0.5) { thing.kind } else { kind },
                rng.random_bool(0.2).then_some(thing.colour),
            )),
            CropAsk::ColourFrom({
                let mut options: Vec<String> =
                    Colour::ALL.choose_multiple(rng, 3).map(|c| c.to_string()).collect();
                if !options.contains(&thing.colour.to_string()) {
                    let at = rng.random_range(0..3);
                    options[at] = thing.colour.to_string();
                }
                options
            }),
        ];
        for ask in asks {
            samples.push((Some(thing.bbox), word_crop(thing, &ask, rng), answer_crop(thing, &ask)));
        }
    }
    const WHOLE: [Form; 7] = [
        Form::Count,
        Form::Exists,
        Form::Colour,
        Form::IsColour,
        Form::Position,
        Form::CompareCounts,
        Form::ColourOptions,
    ];
    for form in WHOLE {
        for _ in 0..4 {
            let mut supply = rand_chacha::ChaCha8Rng::from_rng(rng);
            let Some(spec) = Spec::draw(form, &mut NounsOf::new(view, &mut supply), rng) else { continue };
            let Some(answer) = spec.truth(view) else { continue };
            // Programs use the first wording.
            let frame = if rng.random_bool(0.4) { 0 } else { rng.random_range(0..frames::seen_frames(form)) };
            let answer = match answer {
                serde_json::Value::String(text) => text,
                value => value.to_string(),
            };
            samples.push((None, sentence(&spec, frame), answer));
        }
    }
    samples
}

fn pick<T: Copy>(all: &[T], rng: &mut impl Rng) -> T {
    *all.choose(rng).expect("not empty")
}

fn word_crop(thing: &Thing, ask: &CropAsk, rng: &mut impl Rng) -> String {
    let templates = match ask {
        CropAsk::Colour => COLOUR,
        CropAsk::ColourFrom(_) => COLOUR_FROM,
        CropAsk::Kind => KIND,
        CropAsk::IsColour(_) => IS_COLOUR,
        CropAsk::IsKind(_) => IS_KIND,
    };
    let template = if rng.random_bool(0.4) { templates[0] } else { pick(templates, rng) };
    fill(template, |slot| match (slot, ask) {
        ("colour", CropAsk::IsColour(colour)) => colour.to_string(),
        ("an", CropAsk::IsKind(noun)) => noun.with_article(),
        ("options", CropAsk::ColourFrom(options)) => options.join(", "),
        _ => thing.kind.to_string(),
    })
}
