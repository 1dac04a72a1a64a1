//! How a question is solved with the tools: one structure that is told as a plan, printed as a
//! Python program, and run natively.
//!
//! Plan and program are bijective images of the recipe in one fixed style, which a very small
//! language model can learn, and from which mistakes can be read (see [`super::mistakes`]). A
//! native run does what the program does; an integration test holds it against the sandbox.

use serde_json::{Value, json};

use super::frames;
use super::spec::{Dim, More, Most, Near, Noun, Side, Spec};
use super::{Colour, Kind};
use crate::sight::{BBox, ToolError, Tools};

/// What is read off a box.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    X,
    Y,
    Depth,
    /// Pixel extent × depth: pseudo-3D (method.md 2).
    Height,
    Width,
    PixelHeight,
    PixelWidth,
}

impl Measure {
    pub const ALL: [Self; 7] =
        [Self::X, Self::Y, Self::Depth, Self::Height, Self::Width, Self::PixelHeight, Self::PixelWidth];

    pub fn name(self) -> &'static str {
        match self {
            Self::X => "x center",
            Self::Y => "y center",
            Self::Depth => "depth",
            Self::Height => "pixel height times depth",
            Self::Width => "pixel width times depth",
            Self::PixelHeight => "pixel height",
            Self::PixelWidth => "pixel width",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|m| m.name() == name)
    }

    pub fn of_dim(dim: Dim) -> Self {
        match dim {
            Dim::Height => Self::Height,
            Dim::Width => Self::Width,
        }
    }

    /// Is it one of the measures of size, right or wrong?
    pub fn is_size(self) -> bool {
        matches!(self, Self::Height | Self::Width | Self::PixelHeight | Self::PixelWidth)
    }

    fn python(self, b: &str) -> String {
        match self {
            Self::X => format!("{b}[0] + {b}[2]"),
            Self::Y => format!("{b}[1] + {b}[3]"),
            Self::Depth => format!("depth(img_pth, {b})"),
            Self::Height => format!("({b}[3] - {b}[1]) * depth(img_pth, {b})"),
            Self::Width => format!("({b}[2] - {b}[0]) * depth(img_pth, {b})"),
            Self::PixelHeight => format!("{b}[3] - {b}[1]"),
            Self::PixelWidth => format!("{b}[2] - {b}[0]"),
        }
    }

    pub fn of(self, b: BBox, tools: &mut dyn Tools) -> Result<f64, ToolError> {
        Ok(match self {
            Self::X => b[0] + b[2],
            Self::Y => b[1] + b[3],
            Self::Depth => tools.depth(b)?,
            Self::Height => (b[3] - b[1]) * tools.depth(b)?,
            Self::Width => (b[2] - b[0]) * tools.depth(b)?,
            Self::PixelHeight => b[3] - b[1],
            Self::PixelWidth => b[2] - b[0],
        })
    }
}

/// A call of the detector, its boxes named `first` or `second`.
#[derive(Clone, Debug, PartialEq)]
pub struct Find {
    pub prompt: String,
    /// Keep only boxes of which the VLM says this colour.
    pub colour: Option<Colour>,
}

/// How the answer comes from what was found.
#[derive(Clone, Debug, PartialEq)]
pub enum Then {
    /// How many are in `first`.
    Count,
    /// Whether there is one in `first`.
    Exists,
    /// What the VLM says of the chosen box.
    Ask { prompt: String },
    /// `yes` if the measure of the chosen box is less (or more) than that of `second`, else `no`.
    Pair { measure: Measure, less: bool, yes: String, no: String },
    /// Metres times the measure of `second` over that of `first`.
    Ratio { first: Measure, second: Measure, metres: f64 },
    /// Whether `first` has more (or fewer) than `second`.
    CompareCounts { more: More },
    /// The name of the best of several kinds.
    Rank { names: Vec<String>, measure: Measure, smallest: bool },
    /// How many of `first` have a measure less (or more) than that of `second`.
    CountIf { measure: Measure, less: bool },
    /// No tool is used at all.
    Literal { answer: Value },
}

/// What is done where something was not found.
#[derive(Clone, Debug, PartialEq)]
pub enum Fallback {
    /// Ask the VLM about the whole picture.
    Whole { prompt: String },
    /// Answer with the other of two: `a` if `first` is there, else `b`.
    Other { a: String, b: String },
}

#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    pub finds: Vec<Find>,
    pub fallback: Option<Fallback>,
    /// Which one of `first` to go on with; without it, its first box.
    pub pick: Option<(Measure, bool)>,
    pub then: Then,
}

/// A program that failed: its Python exception.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum RunError {
    #[error("IndexError: list index out of range")]
    Index,
    #[error("ValueError: {0}")]
    Value(String),
    #[error("ZeroDivisionError: division by zero")]
    ZeroDivision,
    #[error(transparent)]
    Tool(#[from] ToolError),
}

pub(super) const ASK_COLOUR: &str = "What color is it?";
pub(super) const VARS: [&str; 2] = ["first", "second"];

pub(super) fn side_measure(side: Side) -> (Measure, bool) {
    match side {
        Side::Left => (Measure::X, true),
        Side::Right => (Measure::X, false),
        Side::Above => (Measure::Y, true),
        Side::Below => (Measure::Y, false),
    }
}

pub(super) fn most_measure(most: Most) -> (Measure, bool) {
    match most {
        Most::Leftmost => (Measure::X, true),
        Most::Rightmost => (Measure::X, false),
        Most::Closest => (Measure::Depth, true),
        Most::Farthest => (Measure::Depth, false),
        Most::Tallest => (Measure::Height, false),
        Most::Widest => (Measure::Width, false),
    }
}

fn quoted_options(options: &[String]) -> String {
    options.join(", ")
}

impl Spec {
    /// The correct way to solve it.
    pub fn recipe(&self) -> Recipe {
        let find = |noun: &Noun| Find { prompt: noun.kind.word().to_owned(), colour: noun.colour };
        let kind = |kind: &Kind| Find { prompt: kind.word().to_owned(), colour: None };
        let yes_no = |(measure, less): (Measure, bool)| Then::Pair {
            measure,
            less,
            yes: "yes".to_owned(),
            no: "no".to_owned(),
        };
        let mut recipe = Recipe {
            finds: Vec::new(),
            fallback: Some(Fallback::Whole { prompt: frames::prompt(self) }),
            pick: None,
            then: Then::Count,
        };
        (recipe.finds, recipe.then) = match self {
            Self::Count { of } => (vec![find(of)], Then::Count),
            Self::Exists { of } => (vec![find(of)], Then::Exists),
            Self::Depth { a, b, near } => {
                let (yes, no) = (a.to_string(), b.to_string());
                recipe.fallback = Some(Fallback::Other { a: yes.clone(), b: no.clone() });
                let then = Then::Pair { measure: Measure::Depth, less: *near == Near::Closer, yes, no };
                (vec![find(a), find(b)], then)
            }
            Self::Position { a, b, side } => (vec![find(a), find(b)], yes_no(side_measure(*side))),
            Self::Size { reference, reference_dim, metres, target, dim } => {
                let then = Then::Ratio {
                    first: Measure::of_dim(*reference_dim),
                    second: Measure::of_dim(*dim),
                    metres: *metres,
                };
                (vec![find(reference), find(target)], then)
            }
            Self::Colour { of } => (vec![kind(of)], Then::Ask { prompt: ASK_COLOUR.to_owned() }),
            Self::IsColour { of, colour } => {
                (vec![kind(of)], Then::Ask { prompt: format!("Is it {colour}?") })
            }
            Self::CompareCounts { a, b, more } => {
                (vec![find(a), find(b)], Then::CompareCounts { more: *more })
            }
            Self::Superlative { of, most } => {
                let (measure, smallest) = most_measure(*most);
                let names = of.iter().map(|k| k.word().to_owned()).collect();
                (Vec::new(), Then::Rank { names, measure, smallest })
            }
            Self::ColourOptions { of, .. } => {
                let options = quoted_options(&self.options().unwrap_or_default());
                (vec![kind(of)], Then::Ask { prompt: format!("{ASK_COLOUR} Choose from {options}.") })
            }
            Self::SideOptions { a, b, options } => {
                let [yes, no] = options.clone();
                let less = yes.to_lowercase().contains("left");
                (vec![find(a), find(b)], Then::Pair { measure: Measure::X, less, yes, no })
            }
            Self::DepthOptions { a, b, options } => {
                let [yes, no] = options.clone();
                let less = yes.to_lowercase().contains("front");
                (vec![find(a), find(b)], Then::Pair { measure: Measure::Depth, less, yes, no })
            }
            Self::ColourOfMost { of, most } => {
                recipe.pick = Some(most_measure(*most));
                (vec![kind(of)], Then::Ask { prompt: ASK_COLOUR.to_owned() })
            }
            Self::CountBeside { of, than, side } => {
                let (measure, less) = side_measure(*side);
                (vec![find(of), find(than)], Then::CountIf { measure, less })
            }
            Self::CountNearer { of, than, near } => {
                let then = Then::CountIf { measure: Measure::Depth, less: *near == Near::Closer };
                (vec![find(of), find(than)], then)
            }
            Self::MostNearer { of, most, than, near } => {
                recipe.pick = Some(most_measure(*most));
                (vec![kind(of), find(than)], yes_no((Measure::Depth, *near == Near::Closer)))
            }
        };
        recipe
    }
}

impl Recipe {
    /// The Python function around a fallback's reply.
    fn cast(&self) -> Option<&'static str> {
        match self.then {
            Then::Count | Then::CountIf { .. } => Some("int"),
            Then::Ratio { .. } => Some("float"),
            _ => None,
        }
    }

    /// The Python program, without a final line break.
    pub fn program(&self) -> String {
        let mut lines: Vec<String> = Vec::new();
        for (find, var) in self.finds.iter().zip(VARS) {
            lines.push(format!("{var} = [d[\"bbox\"] for d in gd_detect(img_pth, \"{}\")]", find.prompt));
            if let Some(colour) = find.colour {
                lines.push(format!(
                    "{var} = [b for b in {var} if vqa(img_pth, b, \"{ASK_COLOUR}\") == \"{colour}\"]"
                ));
            }
        }
        if let Then::Rank { names, measure, .. } = &self.then {
            let names: Vec<String> = names.iter().map(|n| format!("\"{n}\"")).collect();
            lines.extend([
                "found = []".to_owned(),
                format!("for name in [{}]:", names.join(", ")),
                "    for d in gd_detect(img_pth, name):".to_owned(),
                "        b = d[\"bbox\"]".to_owned(),
                format!("        found.append(({}, name))", measure.python("b")),
            ]);
        }
        let body = self.body();
        let Some(fallback) = &self.fallback else {
            lines.extend(body);
            return lines.join("\n");
        };
        lines.push(format!("if {}:", self.condition()));
        lines.extend(body.into_iter().map(|line| format!("    {line}")));
        match fallback {
            Fallback::Whole { prompt } => {
                let ask = format!("vqa(img_pth, None, \"{prompt}\")");
                lines.push("else:".to_owned());
                lines.push(match self.cast() {
                    Some(cast) => format!("    final_answer = {cast}({ask})"),
                    None => format!("    final_answer = {ask}"),
                });
            }
            Fallback::Other { a, b } => lines.extend([
                "elif first:".to_owned(),
                format!("    final_answer = \"{a}\""),
                "else:".to_owned(),
                format!("    final_answer = \"{b}\""),
            ]),
        }
        lines.join("\n")
    }

    fn condition(&self) -> &'static str {
        match (&self.then, self.finds.len()) {
            (Then::Rank { .. }, _) => "found",
            (Then::CompareCounts { .. }, _) => "first or second",
            (_, 2) => "first and second",
            _ => "first",
        }
    }

    fn body(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let order = |less: bool| if less { "<" } else { ">" };
        let best = |smallest: bool| if smallest { "min" } else { "max" };
        let chosen = match self.pick {
            Some((measure, smallest)) => {
                let key = measure.python("b");
                lines.push(format!("a = {}([({key}, b) for b in first])[1]", best(smallest)));
                "a"
            }
            None => "first[0]",
        };
        if matches!(self.then, Then::Pair { .. } | Then::Ratio { .. } | Then::CountIf { .. }) {
            if self.pick.is_none() && !matches!(self.then, Then::CountIf { .. }) {
                lines.push("a = first[0]".to_owned());
            }
            lines.push("b = second[0]".to_owned());
        }
        match &self.then {
            Then::Count => lines.push("final_answer = len(first)".to_owned()),
            Then::Exists if self.fallback.is_some() => lines.push("final_answer = \"yes\"".to_owned()),
            Then::Exists => lines.push("final_answer = \"yes\" if first else \"no\"".to_owned()),
            Then::Ask { prompt } => {
                lines.push(format!("final_answer = vqa(img_pth, {chosen}, \"{prompt}\")"));
            }
            Then::Pair { measure, less, yes, no } => {
                let (a, b) = (measure.python("a"), measure.python("b"));
                lines.push(format!("final_answer = \"{yes}\" if {a} {} {b} else \"{no}\"", order(*less)));
            }
            Then::Ratio { first, second, metres } => lines.extend([
                format!("size_a = {}", first.python("a")),
                format!("size_b = {}", second.python("b")),
                format!("final_answer = {metres} * size_b / size_a"),
            ]),
            Then::CompareCounts { more } => {
                let order = order(*more == More::Fewer);
                let test = format!("len(first) {order} len(second)");
                lines.push(format!("final_answer = \"yes\" if {test} else \"no\""));
            }
            Then::Rank { smallest, .. } => {
                lines.push(format!("final_answer = {}(found)[1]", best(*smallest)))
            }
            Then::CountIf { measure, less } => {
                let (a, b) = (measure.python("a"), measure.python("b"));
                lines.push(format!("final_answer = len([a for a in first if {a} {} {b}])", order(*less)));
            }
            Then::Literal { answer } => lines.push(format!("final_answer = {answer}")),
        }
        lines
    }

    /// Does what the program does.
    pub fn run(&self, tools: &mut dyn Tools) -> Result<Value, RunError> {
        let mut found: [Vec<BBox>; 2] = Default::default();
        for (find, boxes) in self.finds.iter().zip(&mut found) {
            for detection in tools.gd_detect(&find.prompt)? {
                let keep = match find.colour {
                    Some(colour) => tools.vqa(Some(detection.bbox), ASK_COLOUR)? == colour.word(),
                    None => true,
                };
                if keep {
                    boxes.push(detection.bbox);
                }
            }
        }
        let [first, second] = found;
        let mut ranked: Vec<(f64, &str)> = Vec::new();
        if let Then::Rank { names, measure, .. } = &self.then {
            for name in names {
                for detection in tools.gd_detect(name)? {
                    ranked.push((measure.of(detection.bbox, tools)?, name));
                }
            }
        }
        let ready = match self.condition() {
            "found" => !ranked.is_empty(),
            "first or second" => !first.is_empty() || !second.is_empty(),
            "first and second" => !first.is_empty() && !second.is_empty(),
            _ => !first.is_empty(),
        };
        match &self.fallback {
            Some(Fallback::Whole { prompt }) if !ready => {
                let reply = tools.vqa(None, prompt)?;
                return match self.cast() {
                    Some("int") => reply.trim().parse::<i64>().map(Value::from).map_err(|_| reply),
                    Some(_) => reply.trim().parse::<f64>().map(Value::from).map_err(|_| reply),
                    None => Ok(Value::String(reply)),
                }
                .map_err(RunError::Value);
            }
            Some(Fallback::Other { a, .. }) if !ready && !first.is_empty() => return Ok(json!(a)),
            Some(Fallback::Other { b, .. }) if !ready => return Ok(json!(b)),
            _ => {}
        }
        let compare = |less: bool, a: f64, b: f64| if less { a < b } else { a > b };
        let at = |boxes: &[BBox]| boxes.first().copied().ok_or(RunError::Index);
        let chosen = |tools: &mut dyn Tools| -> Result<BBox, RunError> {
            let Some((measure, smallest)) = self.pick else { return at(&first) };
            let mut best: Option<(f64, BBox)> = None;
            for &b in &first {
                let value = measure.of(b, tools)?;
                if best.is_none_or(|(held, _)| compare(smallest, value, held)) {
                    best = Some((value, b));
                }
            }
            best.map(|(_, b)| b).ok_or_else(|| RunError::Value("min() of an empty list".to_owned()))
        };
        let yes_no = |yes: bool| json!(if yes { "yes" } else { "no" });
        Ok(match &self.then {
            Then::Count => json!(first.len()),
            Then::Exists => yes_no(!first.is_empty()),
            Then::Ask { prompt } => {
                let a = chosen(tools)?;
                json!(tools.vqa(Some(a), prompt)?)
            }
            Then::Pair { measure, less, yes, no } => {
                let (a, b) = (chosen(tools)?, at(&second)?);
                let yes_holds = compare(*less, measure.of(a, tools)?, measure.of(b, tools)?);
                json!(if yes_holds { yes } else { no })
            }
            Then::Ratio { first: of_a, second: of_b, metres } => {
                let (a, b) = (of_a.of(at(&first)?, tools)?, of_b.of(at(&second)?, tools)?);
                if a == 0. {
                    return Err(RunError::ZeroDivision);
                }
                json!(metres * b / a)
            }
            Then::CompareCounts { more: More::More } => yes_no(first.len() > second.len()),
            Then::CompareCounts { more: More::Fewer } => yes_no(first.len() < second.len()),
            Then::Rank { smallest, .. } => {
                let by = |a: &&(f64, &str), b: &&(f64, &str)| a.0.total_cmp(&b.0).then(a.1.cmp(b.1));
                let best = if *smallest { ranked.iter().min_by(by) } else { ranked.iter().max_by(by) };
                json!(best.ok_or_else(|| RunError::Value("min() of an empty list".to_owned()))?.1)
            }
            Then::CountIf { measure, less } => {
                let mut count = 0;
                // The program reads the second box only while it goes through the first ones, but
                // it names it before.
                let b = at(&second)?;
                for &a in &first {
                    count += usize::from(compare(*less, measure.of(a, tools)?, measure.of(b, tools)?));
                }
                json!(count)
            }
            Then::Literal { answer } => answer.clone(),
        })
    }
}
