//! Questions about rendered rooms: drawn, worded, answered, and checked before they are asked.
//!
//! A question is asked only if the truth has a margin ([`super::truth`]) and the correct program
//! on perfect tools finds it. Training and test never share a scene: their seeds differ in the
//! highest bit. Training never sees held-out frames nor the held-out two-step combination.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::frames::{frame_held_out, frames, seen_frames, sentence};
use super::oracle::OracleTools;
use super::spec::{Family, Form, Spec};
use super::truth::NounsOf;
use super::{Look, View};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    Train,
    Test,
}

/// The seed of a split's scene number `index` in the run of a seed. Whatever is trained on Rooms
/// takes its scenes from here, so that no test scene is ever trained on.
pub fn scene_seed(split: Split, seed: u64, index: u64) -> u64 {
    // Two rounds of SplitMix64's finaliser.
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mixed = mix(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_add(index));
    match split {
        Split::Train => mixed >> 1,
        Split::Test => mixed >> 1 | 1 << 63,
    }
}

/// As in Omni3D-Bench, with yes and no told apart from other words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AnswerType {
    Int,
    Float,
    Str,
    YesNo,
}

/// A question with everything that is known of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Question {
    pub text: String,
    pub answer: Value,
    pub answer_type: AnswerType,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub options: Option<Vec<String>>,
    pub family: Family,
    pub form: Form,
    pub frame: usize,
    /// No training data of planner or verifier holds this frame, or this form.
    pub held_out: bool,
    pub spec: Spec,
    /// The correct plan and program.
    pub plan: String,
    pub program: String,
}

impl Question {
    /// The question in a frame, if it is well posed for the picture and its correct program
    /// finds the answer on perfect tools.
    pub fn ask(view: &View, spec: Spec, frame: usize) -> Option<Self> {
        let answer = spec.truth(view)?;
        let answer_type = match (&answer, spec.form()) {
            (Value::Number(_), Form::Size) => AnswerType::Float,
            (Value::Number(_), _) => AnswerType::Int,
            (Value::String(text), _) if text == "yes" || text == "no" => AnswerType::YesNo,
            _ => AnswerType::Str,
        };
        let recipe = spec.recipe();
        let question = Self {
            text: sentence(&spec, frame),
            answer,
            answer_type,
            options: spec.options(),
            family: spec.family(),
            form: spec.form(),
            frame,
            held_out: frame_held_out(spec.form(), frame),
            plan: recipe.plan(),
            program: recipe.program(),
            spec,
        };
        let found = recipe.run(&mut OracleTools::new(view)).ok()?;
        score(&question, &found).then_some(question)
    }

    fn answer_holds(&self, word: &str) -> bool {
        self.answer.as_str().is_some_and(|a| a.to_lowercase().contains(word))
    }

    /// What the answer has in common with others, so that none prevails; and its largest share.
    fn class(&self) -> (String, f64) {
        let cap = match (self.form, &self.spec) {
            (Form::Size, _) => return (String::new(), 1.),
            (Form::Count | Form::CountBeside | Form::CountNearer, _) => 0.3,
            (Form::Colour | Form::ColourOfMost | Form::ColourOptions, _) => 0.3,
            (Form::Superlative, _) => 0.4,
            _ => 0.5,
        };
        let class = match &self.spec {
            // Not which thing, but whether the first or the last one named.
            Spec::Depth { a, .. } => (self.answer == a.to_string()).to_string(),
            Spec::Superlative { of, .. } => {
                of.iter().position(|k| self.answer == k.word()).unwrap_or_default().to_string()
            }
            // "Left", "to the left" and "left" are one.
            Spec::SideOptions { .. } => self.answer_holds("left").to_string(),
            Spec::DepthOptions { .. } => self.answer_holds("front").to_string(),
            _ => self.answer.to_string(),
        };
        (class, cap)
    }
}

/// Is the answer right? Numbers by type (integers exactly, floats within 10 %), words apart from
/// capitals and surrounding blanks, options verbatim; nothing empty ever is.
pub fn score(question: &Question, answer: &Value) -> bool {
    match question.answer_type {
        AnswerType::Int => number(answer).is_some_and(|n| Some(n) == question.answer.as_f64()),
        AnswerType::Float => relative_error(question, answer).is_some_and(|e| e <= 0.1),
        AnswerType::YesNo => word(answer).is_some_and(|w| question.answer == w),
        AnswerType::Str if question.options.is_some() => *answer == question.answer,
        AnswerType::Str => {
            word(answer).is_some_and(|w| question.answer.as_str().is_some_and(|a| a.to_lowercase() == w))
        }
    }
}

/// Mean relative accuracy of a float (method.md 8); `None` for questions of another type.
pub fn mean_relative_accuracy(question: &Question, answer: &Value) -> Option<f64> {
    if question.answer_type != AnswerType::Float {
        return None;
    }
    Some(relative_error(question, answer).map_or(0., relative_accuracy))
}

/// The mean over θ of 0.50, 0.55 … 0.95 of [error < 1 − θ] (method.md 8).
pub fn relative_accuracy(error: f64) -> f64 {
    // The thresholds as literals are: 1 − 0.95 is a little more than 0.05.
    (10..20).filter(|theta| error < f64::from(20 - theta) / 20.).count() as f64 / 10.
}

fn relative_error(question: &Question, answer: &Value) -> Option<f64> {
    let truth = question.answer.as_f64().filter(|t| *t != 0.)?;
    number(answer).map(|n| (n - truth).abs() / truth.abs())
}

/// A number, or its text; truth values are no numbers.
pub fn number(answer: &Value) -> Option<f64> {
    match answer {
        Value::Number(n) => n.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
    .filter(|n: &f64| n.is_finite())
}

fn word(answer: &Value) -> Option<String> {
    match answer {
        Value::Bool(yes) => Some(if *yes { "yes" } else { "no" }.to_owned()),
        Value::String(text) => {
            let text = text.trim().to_lowercase();
            match text.as_str() {
                "" => None,
                "true" => Some("yes".to_owned()),
                "false" => Some("no".to_owned()),
                _ => Some(text),
            }
        }
        _ => None,
    }
}

/// Counts by which families and answers are kept in balance.
#[derive(Debug, Default)]
struct Balance {
    families: BTreeMap<Family, usize>,
    /// Forms are told apart: "yes" to one is no hint for another.
    classes: BTreeMap<(Form, String), usize>,
    forms: BTreeMap<Form, usize>,
}

impl Balance {
    fn admits(&self, question: &Question) -> bool {
        let (class, cap) = question.class();
        let held = self.classes.get(&(question.form, class)).copied().unwrap_or(0);
        let all = self.forms.get(&question.form).copied().unwrap_or(0);
        held as f64 <= cap * all as f64
    }

    fn add(&mut self, question: &Question) {
        *self.families.entry(question.family).or_default() += 1;
        *self.forms.entry(question.form).or_default() += 1;
        *self.classes.entry((question.form, question.class().0)).or_default() += 1;
    }

    fn least<T: Ord + Copy>(counts: &BTreeMap<T, usize>, among: impl Iterator<Item = T>) -> Vec<T> {
        let mut order: Vec<T> = among.collect();
        order.sort_by_key(|t| counts.get(t).copied().unwrap_or(0));
        order
    }
}

/// Questions per picture at most.
const PER_VIEW: usize = 3;
/// Draws of one form before a picture is found not to offer it.
const DRAWS: usize = 40;
/// Share of the test questions in held-out frames, apart from the held-out form, which adds
/// about one in forty.
const UNSEEN_SHARE: f64 = 0.2;

/// `n` questions of a split with their pictures; up to three in a row share one.
pub fn sample_questions(
    n: usize,
    seed: u64,
    look: Look,
    split: Split,
    size: (u32, u32),
) -> impl Iterator<Item = (Arc<View>, Question)> {
    Questions::new(split, seed, move |scene| super::generate(scene, look, size.0, size.1)).take(n)
}

/// Pictures and questions, without end. See [`sample_questions`].
pub struct Questions {
    render: Box<dyn FnMut(u64) -> View + Send>,
    split: Split,
    seed: u64,
    next: u64,
    rng: ChaCha8Rng,
    balance: Balance,
    ready: VecDeque<(Arc<View>, Question)>,
}

impl Questions {
    /// `render` gives the picture of a scene seed, with `look` and size as the caller wants them.
    pub fn new(split: Split, seed: u64, render: impl FnMut(u64) -> View + Send + 'static) -> Self {
        Self {
            render: Box::new(render),
            split,
            seed,
            next: 0,
            rng: ChaCha8Rng::seed_from_u64(scene_seed(split, seed, u64::MAX)),
            balance: Balance::default(),
            ready: VecDeque::new(),
        }
    }

    fn ask_about(&mut self, view: &Arc<View>) {
        let families = Balance::least(&self.balance.families, Family::ALL.iter().copied());
        // Only families that lag may ask, so that the common ones wait for the rare.
        let lowest = self.balance.families.get(&families[0]).copied().unwrap_or(0);
        let lagging = |f: &Family| self.balance.families.get(f).copied().unwrap_or(0) <= lowest + 2;
        let mut asked = 0;
        for family in families.into_iter().filter(lagging).collect::<Vec<_>>() {
            if asked == PER_VIEW {
                break;
            }
            if let Some(question) = self.one_of(family, view) {
                self.balance.add(&question);
                self.ready.push_back((view.clone(), question));
                asked += 1;
            }
        }
    }

    fn one_of(&mut self, family: Family, view: &View) -> Option<Question> {
        let forms = Form::of_family(family).filter(|&f| self.split == Split::Test || f != Form::HELD_OUT);
        let forms = Balance::least(&self.balance.forms, forms);
        for form in forms {
            for _ in 0..DRAWS {
                let mut supply = ChaCha8Rng::seed_from_u64(self.rng.random());
                let Some(spec) = Spec::draw(form, &mut NounsOf::new(view, &mut supply), &mut self.rng) else {
                    continue;
                };
                let frame = self.frame(form);
                let Some(question) = Question::ask(view, spec.with_true_metres(view), frame) else {
                    continue;
                };
                if self.balance.admits(&question) {
                    return Some(question);
                }
            }
        }
        None
    }

    fn frame(&mut self, form: Form) -> usize {
        let (seen, all) = (seen_frames(form), frames(form).len());
        let unseen = self.split == Split::Test && self.rng.random_bool(UNSEEN_SHARE);
        if form == Form::HELD_OUT {
            self.rng.random_range(0..all)
        } else if unseen {
            self.rng.random_range(seen..all)
        } else {
            self.rng.random_range(0..seen)
        }
    }
}

impl Iterator for Questions {
    type Item = (Arc<View>, Question);

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() {
            let view = Arc::new((self.render)(scene_seed(self.split, self.seed, self.next)));
            self.next += 1;
            self.ask_about(&view);
        }
        self.ready.pop_front()
    }
}

impl std::fmt::Debug for Questions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Questions")
            .field("split", &self.split)
            .field("seed", &self.seed)
            .finish_non_exhaustive()
    }
}
