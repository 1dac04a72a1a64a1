//! What a question asks, apart from its wording.
//!
//! A [`Spec`] is drawn from a supply of nouns (the things of a picture, or thin air), worded by
//! [`super::frames`], answered from the truth by [`super::truth`], and solved with tools by
//! [`super::recipe`].

use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use serde::{Deserialize, Serialize};

use super::{Colour, Kind};

/// A kind of thing, with or without its colour: "chair", "red chair".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Noun {
    pub kind: Kind,
    pub colour: Option<Colour>,
}

impl Noun {
    pub fn new(kind: Kind, colour: Option<Colour>) -> Self {
        Self { kind, colour }
    }

    /// "red chairs".
    pub fn plural(self) -> String {
        match self.colour {
            Some(c) => format!("{c} {}", plural(self.kind)),
            None => plural(self.kind).to_owned(),
        }
    }

    /// "a red chair", "an orange chair".
    pub fn with_article(self) -> String {
        let text = self.to_string();
        let article = if text.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
        format!("{article} {text}")
    }

    /// Reads "red chair", "chairs", "grey boxes"; nothing else may stand in the text.
    pub fn parse(text: &str) -> Option<Self> {
        let (colour, noun) = match text.split_once(' ') {
            Some((colour, noun)) => (Some(colour_of(colour)?), noun),
            None => (None, text),
        };
        Some(Self::new(kind_of(noun)?, colour))
    }
}

impl std::fmt::Display for Noun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.colour {
            Some(c) => write!(f, "{c} {}", self.kind),
            None => write!(f, "{}", self.kind),
        }
    }
}

pub fn plural(kind: Kind) -> &'static str {
    match kind {
        Kind::Chair => "chairs",
        Kind::Stool => "stools",
        Kind::Table => "tables",
        Kind::Sofa => "sofas",
        Kind::Lamp => "lamps",
        Kind::Shelf => "shelves",
        Kind::Bed => "beds",
        Kind::Tv => "tvs",
        Kind::Picture => "pictures",
        Kind::Plant => "plants",
        Kind::Fridge => "fridges",
        Kind::Box => "boxes",
        Kind::Ball => "balls",
        Kind::Vase => "vases",
    }
}

/// The kind that a word names, in the singular or the plural.
pub fn kind_of(word: &str) -> Option<Kind> {
    Kind::ALL.iter().copied().find(|&k| k.word() == word || plural(k) == word)
}

pub fn colour_of(word: &str) -> Option<Colour> {
    Colour::from_word(if word == "grey" { "gray" } else { word })
}

macro_rules! phrases {
    ($(#[$m:meta])* $name:ident { $($variant:ident => $text:literal),* $(,)? }) => {
        $(#[$m])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name { $($variant),* }
        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];
            pub fn text(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
            }
            pub fn parse(text: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|v| v.text() == text)
            }
        }
    };
}

phrases! { Side { Left => "to the left of", Right => "to the right of", Above => "above", Below => "below" } }
phrases! { Near { Closer => "closer", Farther => "farther" } }
phrases! { Dim { Height => "tall", Width => "wide" } }
phrases! { More { More => "more", Fewer => "fewer" } }
phrases! {
    Most {
        Leftmost => "leftmost", Rightmost => "rightmost", Closest => "closest", Farthest => "farthest",
        Tallest => "tallest", Widest => "widest",
    }
}
phrases! {
    /// The families that accuracy is told by.
    Family {
        Count => "count", Exists => "exists", Depth => "depth", Position => "position", Size => "size",
        Attribute => "attribute", CompareCounts => "compare-counts", Superlative => "superlative",
        Options => "options", TwoStep => "two-step",
    }
}
phrases! {
    /// The kinds of question, finer than [`Family`]: each has its own sentence frames.
    Form {
        Count => "count", Exists => "exists", Depth => "depth", Position => "position", Size => "size",
        Colour => "colour", IsColour => "is-colour", CompareCounts => "compare-counts",
        Superlative => "superlative", ColourOptions => "colour-options", SideOptions => "side-options",
        DepthOptions => "depth-options", ColourOfMost => "colour-of-most", CountBeside => "count-beside",
        CountNearer => "count-nearer", MostNearer => "most-nearer",
    }
}

impl Form {
    pub fn family(self) -> Family {
        match self {
            Self::Count => Family::Count,
            Self::Exists => Family::Exists,
            Self::Depth => Family::Depth,
            Self::Position => Family::Position,
            Self::Size => Family::Size,
            Self::Colour | Self::IsColour => Family::Attribute,
            Self::CompareCounts => Family::CompareCounts,
            Self::Superlative => Family::Superlative,
            Self::ColourOptions | Self::SideOptions | Self::DepthOptions => Family::Options,
            Self::ColourOfMost | Self::CountBeside | Self::CountNearer | Self::MostNearer => Family::TwoStep,
        }
    }

    /// The kind of two-step combination that no training data holds: each of its steps is known
    /// from elsewhere, their combination is not.
    pub const HELD_OUT: Form = Form::CountNearer;

    pub fn of_family(family: Family) -> impl Iterator<Item = Form> {
        Self::ALL.iter().copied().filter(move |f| f.family() == family)
    }
}

/// What is asked. Nouns called `a`, `b`, `than`, `reference`, `target` stand for exactly one thing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "form", rename_all = "kebab-case")]
pub enum Spec {
    Count {
        of: Noun,
    },
    Exists {
        of: Noun,
    },
    /// Which of two is closer or farther.
    Depth {
        a: Noun,
        b: Noun,
        near: Near,
    },
    /// Is `a` on that side of `b`.
    Position {
        a: Noun,
        b: Noun,
        side: Side,
    },
    /// If the reference is `metres` in `reference_dim`, what is the target in `dim`.
    Size {
        reference: Noun,
        reference_dim: Dim,
        metres: f64,
        target: Noun,
        dim: Dim,
    },
    Colour {
        of: Kind,
    },
    IsColour {
        of: Kind,
        colour: Colour,
    },
    CompareCounts {
        a: Noun,
        b: Noun,
        more: More,
    },
    Superlative {
        of: [Kind; 3],
        most: Most,
    },
    ColourOptions {
        of: Kind,
        options: [Colour; 3],
    },
    /// Is `a` left or right of `b`; the options in this order.
    SideOptions {
        a: Noun,
        b: Noun,
        options: [String; 2],
    },
    /// Is `a` in front of or behind `b`; the options in this order.
    DepthOptions {
        a: Noun,
        b: Noun,
        options: [String; 2],
    },
    ColourOfMost {
        of: Kind,
        most: Most,
    },
    CountBeside {
        of: Noun,
        than: Noun,
        side: Side,
    },
    CountNearer {
        of: Noun,
        than: Noun,
        near: Near,
    },
    MostNearer {
        of: Kind,
        most: Most,
        than: Noun,
        near: Near,
    },
}

/// Where nouns come from. Both return `None` where nothing fits.
pub trait Nouns {
    /// A noun that stands for exactly one thing.
    fn one(&mut self) -> Option<Noun>;
    /// A noun that may stand for any number of things.
    fn many(&mut self) -> Option<Noun>;
}

/// Any noun: for questions without a picture.
pub struct AnyNoun<'a, R: Rng>(pub &'a mut R);

impl<R: Rng> Nouns for AnyNoun<'_, R> {
    fn one(&mut self) -> Option<Noun> {
        let colour = self.0.random_bool(0.4).then(|| *Colour::ALL.choose(self.0).expect("not empty"));
        Some(Noun::new(*Kind::ALL.choose(self.0).expect("not empty"), colour))
    }

    fn many(&mut self) -> Option<Noun> {
        self.one()
    }
}

const SIDES: [[&str; 2]; 3] = [["left", "right"], ["to the left", "to the right"], ["Left", "Right"]];
const DEPTHS: [[&str; 2]; 3] = [["front", "behind"], ["in front", "behind"], ["In front", "Behind"]];

impl Spec {
    pub fn form(&self) -> Form {
        match self {
            Self::Count { .. } => Form::Count,
            Self::Exists { .. } => Form::Exists,
            Self::Depth { .. } => Form::Depth,
            Self::Position { .. } => Form::Position,
            Self::Size { .. } => Form::Size,
            Self::Colour { .. } => Form::Colour,
            Self::IsColour { .. } => Form::IsColour,
            Self::CompareCounts { .. } => Form::CompareCounts,
            Self::Superlative { .. } => Form::Superlative,
            Self::ColourOptions { .. } => Form::ColourOptions,
            Self::SideOptions { .. } => Form::SideOptions,
            Self::DepthOptions { .. } => Form::DepthOptions,
            Self::ColourOfMost { .. } => Form::ColourOfMost,
            Self::CountBeside { .. } => Form::CountBeside,
            Self::CountNearer { .. } => Form::CountNearer,
            Self::MostNearer { .. } => Form::MostNearer,
        }
    }

    pub fn family(&self) -> Family {
        self.form().family()
    }

    /// The nouns in the order in which programs look for them.
    pub fn nouns(&self) -> Vec<Noun> {
        match *self {
            Self::Count { of } | Self::Exists { of } => vec![of],
            Self::Depth { a, b, .. }
            | Self::Position { a, b, .. }
            | Self::CompareCounts { a, b, .. }
            | Self::SideOptions { a, b, .. }
            | Self::DepthOptions { a, b, .. } => vec![a, b],
            Self::Size { reference, target, .. } => vec![reference, target],
            Self::Colour { of }
            | Self::IsColour { of, .. }
            | Self::ColourOptions { of, .. }
            | Self::ColourOfMost { of, .. } => vec![Noun::new(of, None)],
            Self::Superlative { of, .. } => of.map(|k| Noun::new(k, None)).to_vec(),
            Self::CountBeside { of, than, .. } | Self::CountNearer { of, than, .. } => vec![of, than],
            Self::MostNearer { of, than, .. } => vec![Noun::new(of, None), than],
        }
    }

    /// The options in the order in which the question names them.
    pub fn options(&self) -> Option<Vec<String>> {
        match self {
            Self::ColourOptions { options, .. } => Some(options.iter().map(Colour::to_string).collect()),
            Self::SideOptions { options, .. } | Self::DepthOptions { options, .. } => Some(options.to_vec()),
            _ => None,
        }
    }

    /// Draws a question of a form. `None` where the supply ran out or the nouns do not fit
    /// together (the same thing twice). A reference's metres are drawn too; with a picture
    /// the caller puts the true ones in their place.
    pub fn draw(form: Form, nouns: &mut dyn Nouns, rng: &mut impl Rng) -> Option<Self> {
        fn pick<T: Copy>(all: &[T], rng: &mut impl Rng) -> T {
            *all.choose(rng).expect("not empty")
        }
        fn options(texts: &[[&str; 2]; 3], rng: &mut impl Rng) -> [String; 2] {
            let mut texts = pick(texts, rng).map(str::to_owned);
            if rng.random_bool(0.5) {
                texts.reverse();
            }
            texts
        }
        let pair = |nouns: &mut dyn Nouns| {
            let (a, b) = (nouns.one()?, nouns.one()?);
            // "the chair" beside "the red chair" is one thing or an ambiguous one.
            let clash = a == b || (a.kind == b.kind && (a.colour.is_none() || b.colour.is_none()));
            (!clash).then_some((a, b))
        };
        Some(match form {
            Form::Count => Self::Count { of: nouns.many()? },
            Form::Exists => Self::Exists { of: nouns.many()? },
            Form::Depth => {
                let (a, b) = pair(nouns)?;
                Self::Depth { a, b, near: pick(Near::ALL, rng) }
            }
            Form::Position => {
                let (a, b) = pair(nouns)?;
                Self::Position { a, b, side: pick(Side::ALL, rng) }
            }
            Form::Size => {
                let (reference, target) = pair(nouns)?;
                let dim = pick(Dim::ALL, rng);
                let reference_dim = if rng.random_bool(0.75) { dim } else { pick(Dim::ALL, rng) };
                let metres = rng.random_range(15..230) as f64 / 100.;
                Self::Size { reference, reference_dim, metres, target, dim }
            }
            Form::Colour => Self::Colour { of: nouns.one()?.kind },
            Form::IsColour => Self::IsColour { of: nouns.one()?.kind, colour: pick(Colour::ALL, rng) },
            Form::CompareCounts => {
                let (a, b) = (nouns.many()?, nouns.many()?);
                if a.kind == b.kind && (a.colour.is_none() || b.colour.is_none() || a == b) {
                    return None;
                }
                Self::CompareCounts { a, b, more: pick(More::ALL, rng) }
            }
            Form::Superlative => {
                let of = [nouns.one()?.kind, nouns.one()?.kind, nouns.one()?.kind];
                if of[0] == of[1] || of[1] == of[2] || of[0] == of[2] {
                    return None;
                }
                // Sizes have an answer more rarely than places.
                let most = if rng.random_bool(0.5) { &Most::ALL[4..] } else { &Most::ALL[..4] };
                Self::Superlative { of, most: pick(most, rng) }
            }
            Form::ColourOptions => {
                let mut colours = Colour::ALL.to_vec();
                colours.shuffle(rng);
                Self::ColourOptions { of: nouns.one()?.kind, options: [colours[0], colours[1], colours[2]] }
            }
            Form::SideOptions => {
                let (a, b) = pair(nouns)?;
                Self::SideOptions { a, b, options: options(&SIDES, rng) }
            }
            Form::DepthOptions => {
                let (a, b) = pair(nouns)?;
                Self::DepthOptions { a, b, options: options(&DEPTHS, rng) }
            }
            Form::ColourOfMost => {
                Self::ColourOfMost { of: nouns.many()?.kind, most: pick(&Most::ALL[..4], rng) }
            }
            Form::CountBeside | Form::CountNearer => {
                let (of, than) = (nouns.many()?, nouns.one()?);
                if of.kind == than.kind {
                    return None;
                }
                match form {
                    Form::CountBeside => Self::CountBeside { of, than, side: pick(&Side::ALL[..2], rng) },
                    _ => Self::CountNearer { of, than, near: pick(Near::ALL, rng) },
                }
            }
            Form::MostNearer => {
                let (of, than) = (nouns.many()?.kind, nouns.one()?);
                if of == than.kind {
                    return None;
                }
                Self::MostNearer { of, most: pick(&Most::ALL[..2], rng), than, near: pick(Near::ALL, rng) }
            }
        })
    }
}
