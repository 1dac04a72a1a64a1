//! The usual mistakes of planners that were never tuned, by name; their labels; and the habits of
//! the base planner.
//!
//! A demonstration is a recipe with mistakes in it. Which of the verifier's heads (method.md 3)
//! a plan and a program fail is told by [`judge`] from the text alone, against the correct recipe,
//! so that it also labels what a trained planner writes. It knows one style: a plan in other
//! words than [`Recipe::plan`]'s fails every head, as garbage does.

use rand::Rng;
use rand::seq::IndexedRandom;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::recipe::{Find, Measure, Recipe, Then};
use super::spec::{Dim, Form, More, Most, Near, Noun, Side, Spec};
use super::{Colour, Kind};
use crate::config::Head;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mistake {
    /// Measures the width where the height is asked, or the other way round.
    WidthForHeight,
    /// Compares pixel extents as if all things were equally far.
    NoDepthFactor,
    /// Takes the distance for a size.
    DepthForHeight,
    /// Leaves the relation to the detector: "leftmost chair".
    SpatialWordInPrompt,
    NoFallback,
    /// Closer for farther, left for right, more for fewer.
    WrongComparison,
    /// Looks for a confusable kind.
    WrongThing,
    /// Takes things of any colour.
    IgnoresColour,
    /// Returns something else than one of the options.
    MissingReturnOption,
    /// The program states an answer without looking.
    GuessedAnswer,
    /// The program does something else than the plan, which is right.
    PlanProgramMismatch,
}

impl Mistake {
    pub const ALL: [Self; 11] = [
        Self::WidthForHeight,
        Self::NoDepthFactor,
        Self::DepthForHeight,
        Self::SpatialWordInPrompt,
        Self::NoFallback,
        Self::WrongComparison,
        Self::WrongThing,
        Self::IgnoresColour,
        Self::MissingReturnOption,
        Self::GuessedAnswer,
        Self::PlanProgramMismatch,
    ];

    /// The one that the verifier never sees in training, for its audit.
    pub const KEPT_FROM_VERIFIER: Self = Self::DepthForHeight;

    /// The mistakes that change the answer to this question's recipe, or its safety.
    pub fn that_fit(spec: &Spec) -> impl Iterator<Item = Self> + use<'_> {
        let right = spec.recipe();
        Self::ALL.into_iter().filter(move |&m| recipes(spec, &[m]).1 != right)
    }
}

/// A planner's reply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    pub plan: String,
    pub program: String,
}

impl std::fmt::Display for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "<plan>\n{}\n</plan>\n<answer>\n{}\n</answer>", self.plan, self.program)
    }
}

/// The kind that each is easily taken for.
fn confusable(kind: Kind) -> Kind {
    match kind {
        Kind::Chair => Kind::Stool,
        Kind::Stool => Kind::Chair,
        Kind::Table => Kind::Stool,
        Kind::Sofa => Kind::Bed,
        Kind::Lamp => Kind::Vase,
        Kind::Shelf => Kind::Table,
        Kind::Bed => Kind::Sofa,
        Kind::Tv => Kind::Picture,
        Kind::Picture => Kind::Tv,
        Kind::Plant => Kind::Vase,
        Kind::Fridge => Kind::Box,
        Kind::Box => Kind::Fridge,
        Kind::Ball => Kind::Vase,
        Kind::Vase => Kind::Plant,
    }
}

fn confuse(word: &mut String) {
    if let Some(kind) = Kind::from_word(word) {
        *word = confusable(kind).word().to_owned();
    }
}

/// Puts a mistake into a recipe; leaves it as it is where the mistake has nothing to go wrong on.
fn spoil(recipe: &mut Recipe, spec: &Spec, mistake: Mistake) {
    if matches!(recipe.then, Then::Literal { .. }) {
        return;
    }
    let swap = |m: &mut Measure, by: fn(Measure) -> Measure| {
        if m.is_size() {
            *m = by(*m);
        }
    };
    let mut measures = |by: fn(Measure) -> Measure| match &mut recipe.then {
        Then::Ratio { first, second, .. } => {
            swap(first, by);
            swap(second, by);
        }
        Then::Rank { measure, .. } => swap(measure, by),
        _ => {}
    };
    match mistake {
        Mistake::WidthForHeight => measures(|m| match m {
            Measure::Height => Measure::Width,
            Measure::Width => Measure::Height,
            Measure::PixelHeight => Measure::PixelWidth,
            _ => Measure::PixelHeight,
        }),
        Mistake::NoDepthFactor => measures(|m| match m {
            Measure::Height | Measure::PixelHeight => Measure::PixelHeight,
            _ => Measure::PixelWidth,
        }),
        Mistake::DepthForHeight => measures(|_| Measure::Depth),
        Mistake::NoFallback => recipe.fallback = None,
        Mistake::WrongComparison => match &mut recipe.then {
            Then::Pair { less, .. } | Then::CountIf { less, .. } => *less = !*less,
            Then::Rank { smallest, .. } => *smallest = !*smallest,
            Then::CompareCounts { more } => {
                *more = if *more == More::More { More::Fewer } else { More::More };
            }
            _ => {
                if let Some((_, smallest)) = &mut recipe.pick {
                    *smallest = !*smallest;
                }
            }
        },
        Mistake::WrongThing => match &mut recipe.then {
            Then::Rank { names, .. } => confuse(&mut names[0]),
            _ => recipe.finds.iter_mut().take(1).for_each(|f| confuse(&mut f.prompt)),
        },
        Mistake::IgnoresColour => recipe.finds.iter_mut().for_each(|f| f.colour = None),
        Mistake::SpatialWordInPrompt => spatial_word(recipe, spec),
        Mistake::MissingReturnOption => match (spec, &mut recipe.then) {
            (Spec::ColourOptions { .. }, Then::Ask { prompt }) => {
                *prompt = super::recipe::ASK_COLOUR.to_owned();
            }
            (Spec::SideOptions { .. } | Spec::DepthOptions { .. }, Then::Pair { yes, no, .. }) => {
                (*yes, *no) = ("yes".to_owned(), "no".to_owned());
            }
            _ => {}
        },
        Mistake::GuessedAnswer => {
            *recipe = Recipe {
                finds: Vec::new(),
                fallback: None,
                pick: None,
                then: Then::Literal { answer: guess(spec) },
            };
        }
        Mistake::PlanProgramMismatch => {}
    }
}

fn spatial_word(recipe: &mut Recipe, spec: &Spec) {
    match spec {
        Spec::ColourOfMost { of, most } | Spec::MostNearer { of, most, .. } => {
            recipe.finds[0].prompt = format!("{} {of}", most.text());
            recipe.pick = None;
        }
        Spec::CountBeside { of, than, side } => {
            let prompt = format!("{} {} {than}", of.kind, side.text());
            recipe.finds = vec![Find { prompt, colour: of.colour }];
            recipe.then = Then::Count;
        }
        Spec::CountNearer { of, than, near } => {
            let prompt = format!("{} {} than {than}", of.kind, near.text());
            recipe.finds = vec![Find { prompt, colour: of.colour }];
            recipe.then = Then::Count;
        }
        Spec::Position { a, b, side } => {
            let prompt = format!("{} {} {b}", a.kind, side.text());
            recipe.finds = vec![Find { prompt, colour: a.colour }];
            recipe.then = Then::Exists;
        }
        _ => {}
    }
}

/// What someone says who does not look.
fn guess(spec: &Spec) -> Value {
    match spec {
        Spec::Count { .. } | Spec::CountBeside { .. } | Spec::CountNearer { .. } => json!(2),
        Spec::Size { metres, .. } => json!(metres),
        Spec::Depth { a, .. } => json!(a.to_string()),
        Spec::Superlative { of, .. } => json!(of[0]),
        Spec::Colour { .. } | Spec::ColourOfMost { .. } => json!(Colour::White),
        Spec::ColourOptions { options, .. } => json!(options[0]),
        Spec::SideOptions { options, .. } | Spec::DepthOptions { options, .. } => json!(options[0]),
        _ => json!("yes"),
    }
}

/// Plan's and program's recipes with mistakes in them. [`Mistake::GuessedAnswer`] is the program's
/// alone; with [`Mistake::PlanProgramMismatch`] all the others are too, and if there are none, the
/// program turns its comparison, looks for another kind or drops the fallback.
pub fn recipes(spec: &Spec, mistakes: &[Mistake]) -> (Recipe, Recipe) {
    let mut program = spec.recipe();
    for &mistake in mistakes {
        spoil(&mut program, spec, mistake);
    }
    let mismatch = mistakes.contains(&Mistake::PlanProgramMismatch);
    let mut plan = spec.recipe();
    for &mistake in mistakes.iter().filter(|&&m| !mismatch && m != Mistake::GuessedAnswer) {
        spoil(&mut plan, spec, mistake);
    }
    if mismatch {
        for mistake in [Mistake::WrongComparison, Mistake::WrongThing, Mistake::NoFallback] {
            if program == plan {
                spoil(&mut program, spec, mistake);
            }
        }
    }
    (plan, program)
}

/// The reply of someone who makes these mistakes.
pub fn demonstration(spec: &Spec, mistakes: &[Mistake]) -> Reply {
    let (plan, program) = recipes(spec, mistakes);
    Reply { plan: plan.plan(), program: program.program() }
}

/// The verdict of one head; a head that does not apply has nothing to object to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    pub ok: bool,
    /// Does the question have what this head looks at?
    pub applies: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadLabels {
    pub logic: Label,
    pub attribute: Label,
    pub spatial: Label,
    pub adherence: Label,
}

impl HeadLabels {
    pub fn of(&self, head: Head) -> Label {
        match head {
            Head::Logic => self.logic,
            Head::Attribute => self.attribute,
            Head::Spatial => self.spatial,
            Head::Adherence => self.adherence,
        }
    }
}

/// The labels of [`demonstration`].
pub fn labels(spec: &Spec, mistakes: &[Mistake]) -> HeadLabels {
    let reply = demonstration(spec, mistakes);
    judge(spec, &reply.plan, &reply.program)
}

const SPATIAL_WORDS: [&str; 10] =
    ["leftmost", "rightmost", "closest", "farthest", "left", "right", "above", "below", "closer", "farther"];

fn has_spatial_word(recipe: &Recipe) -> bool {
    let prompts = recipe.finds.iter().map(|f| f.prompt.as_str());
    let names = match &recipe.then {
        Then::Rank { names, .. } => names.as_slice(),
        _ => &[],
    };
    prompts.chain(names.iter().map(String::as_str)).any(|p| p.split(' ').any(|w| SPATIAL_WORDS.contains(&w)))
}

/// Does the recipe order things as the question wants, by the same measure?
fn same_relation(held: &Recipe, right: &Recipe) -> bool {
    let order = |r: &Recipe| match &r.then {
        Then::Pair { measure, less, yes, .. } => Some((*measure, *less, Some(yes.clone()))),
        Then::CountIf { measure, less } => Some((*measure, *less, None)),
        Then::Rank { measure, smallest, .. } => Some((*measure, *smallest, None)),
        _ => None,
    };
    held.pick == right.pick
        && match (order(held), order(right)) {
            (Some((m, less, yes)), Some((m2, less2, yes2))) => {
                // Answering yes and no in place of options is no matter of space.
                let same_answers = yes == yes2 || yes.as_deref() == Some("yes");
                m == m2 && less == less2 && same_answers
            }
            (held, right) => held.is_none() == right.is_none(),
        }
}

/// The measures of size in their places; `None` where the recipe measures none.
fn sizes(recipe: &Recipe) -> Option<[Measure; 2]> {
    match recipe.then {
        Then::Ratio { first, second, .. } => Some([first, second]),
        Then::Rank { measure, .. } => Some([measure, measure]),
        _ => None,
    }
}

/// Puts the question's own measures into a plan, so that the logic head judges everything else.
fn with_measures_of(mut held: Recipe, right: &Recipe) -> Recipe {
    match (&mut held.then, &right.then) {
        (Then::Ratio { first, second, .. }, Then::Ratio { first: f, second: s, .. }) => {
            (*first, *second) = (*f, *s);
        }
        (Then::Rank { measure, .. }, Then::Rank { measure: m, .. }) if m.is_size() => *measure = *m,
        _ => {}
    }
    held
}

/// Does the question have what this head looks at? The attribute head looks at sizes, the spatial
/// head at relations; the others always apply.
pub fn applies(spec: &Spec, head: Head) -> bool {
    let sizes = match spec {
        Spec::Superlative { most, .. } => matches!(most, Most::Tallest | Most::Widest),
        _ => spec.form() == Form::Size,
    };
    match head {
        Head::Logic | Head::Adherence => true,
        Head::Attribute => sizes,
        Head::Spatial => match spec.form() {
            Form::Superlative => !sizes,
            Form::Depth | Form::Position | Form::SideOptions | Form::DepthOptions => true,
            Form::ColourOfMost | Form::CountBeside | Form::CountNearer | Form::MostNearer => true,
            _ => false,
        },
    }
}

/// Exact labels for any plan and program, from their text.
///
/// - logic: the plan is the correct one in all but measures of size and words in prompts
/// - attribute: sizes are measured as pseudo-3D extents of the asked kind
/// - spatial: relations are computed, by the right order, and are in no prompt
/// - adherence: the program is the one that the plan tells
pub fn judge(spec: &Spec, plan: &str, program: &str) -> HeadLabels {
    let right = spec.recipe();
    let held = Recipe::from_plan(plan);
    let (attribute_applies, spatial_applies) = (applies(spec, Head::Attribute), applies(spec, Head::Spatial));
    let told = held.as_ref().filter(|r| !matches!(r.then, Then::Literal { .. }));
    let plan_head = |applies: bool, fine: &dyn Fn(&Recipe) -> bool| Label {
        ok: told.is_some_and(|r| !applies || fine(r)),
        applies,
    };
    HeadLabels {
        logic: plan_head(true, &|r| {
            let mut r = with_measures_of(r.clone(), &right);
            if has_spatial_word(&r) {
                // Judged by the spatial head: here it counts as the step that it stands for.
                let mut stands_for = spec.recipe();
                spoil(&mut stands_for, spec, Mistake::SpatialWordInPrompt);
                if r == stands_for {
                    r = right.clone();
                }
            }
            r == right
        }),
        attribute: plan_head(attribute_applies, &|r| sizes(r) == sizes(&right)),
        spatial: plan_head(spatial_applies, &|r| !has_spatial_word(r) && same_relation(r, &right)),
        adherence: Label { ok: told.is_some_and(|r| same_program(&r.program(), program)), applies: true },
    }
}

fn same_program(a: &str, b: &str) -> bool {
    let lines = |text: &str| -> Vec<String> {
        text.lines().map(|l| l.trim_end().to_owned()).filter(|l| !l.is_empty()).collect()
    };
    lines(a) == lines(b)
}

/// What the base planner mostly gets wrong: a function of the question alone, so that it is
/// learned as surely as what is right.
fn habit(spec: &Spec) -> Option<Mistake> {
    use Kind::{Box, Fridge, Plant, Shelf, Sofa, Stool, Tv, Vase};
    use Mistake::*;
    let odd = |kind: Kind| matches!(kind, Box | Fridge | Plant | Shelf | Sofa | Stool | Tv | Vase);
    let coloured = |noun: &Noun| noun.colour.is_some();
    // In no family so often that looking at the picture no longer pays: an answer that is always
    // turned round is as good as a guess to who compares it with shuffled pictures.
    match spec {
        Spec::Count { of } => of.colour.map(|_| IgnoresColour).or(odd(of.kind).then_some(WrongThing)),
        Spec::Exists { of } => of.colour.map(|_| IgnoresColour).or(odd(of.kind).then_some(NoFallback)),
        Spec::Depth { a, near, .. } => (*near == Near::Farther && coloured(a)).then_some(WrongComparison),
        Spec::Position { side, .. } => (*side == Side::Above).then_some(WrongComparison),
        Spec::Size { reference, reference_dim, target, dim, .. } => match dim {
            _ if reference_dim != dim => Some(DepthForHeight),
            Dim::Width => coloured(target).then_some(NoDepthFactor),
            Dim::Height => coloured(reference).then_some(WidthForHeight),
        },
        Spec::Colour { of } | Spec::IsColour { of, .. } | Spec::ColourOptions { of, .. } => {
            odd(*of).then_some(WrongThing)
        }
        Spec::CompareCounts { a, b, more } => {
            (*more == More::Fewer && (coloured(a) || coloured(b))).then_some(WrongComparison)
        }
        Spec::Superlative { most: Most::Tallest | Most::Widest, .. } => Some(NoDepthFactor),
        Spec::Superlative { most: Most::Farthest, .. } => Some(WrongComparison),
        Spec::Superlative { of, most } => (*most == Most::Rightmost && odd(of[0])).then_some(WrongComparison),
        Spec::SideOptions { options, .. } | Spec::DepthOptions { options, .. } => {
            options[0].starts_with(char::is_uppercase).then_some(MissingReturnOption)
        }
        Spec::ColourOfMost { most, .. } => {
            matches!(most, Most::Leftmost | Most::Rightmost).then_some(SpatialWordInPrompt)
        }
        Spec::CountBeside { side, .. } => (*side == Side::Right).then_some(SpatialWordInPrompt),
        Spec::CountNearer { near, .. } | Spec::MostNearer { near, .. } => {
            (*near == Near::Farther).then_some(WrongComparison)
        }
    }
}

/// The [`habit`] and what goes with it: who reads a question wrongly forgets its last resort too.
pub fn habits(spec: &Spec) -> Vec<Mistake> {
    let habit = habit(spec);
    let second = habit.filter(|h| *h != Mistake::NoFallback).map(|_| Mistake::NoFallback);
    habit.into_iter().chain(second.filter(|m| Mistake::that_fit(spec).any(|f| f == *m))).collect()
}

/// The mistakes of one demonstration to the base planner: its habits in seven of ten cases where there
/// are any, any other mistake now and then elsewhere.
pub fn base_mistakes(spec: &Spec, rng: &mut impl Rng) -> Vec<Mistake> {
    let habits = habits(spec);
    if !habits.is_empty() {
        return if rng.random_bool(0.7) { habits } else { Vec::new() };
    }
    if rng.random_bool(0.13) {
        let fitting: Vec<Mistake> = Mistake::that_fit(spec).collect();
        return fitting.choose(rng).copied().into_iter().collect();
    }
    Vec::new()
}
