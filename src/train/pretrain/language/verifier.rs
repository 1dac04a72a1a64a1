//! The embedded verifier: the base planner's network, trained on as a judge of plans and programs.
//!
//! One bit a case would be a thin signal for a network of this size. So it starts from the planner,
//! which knows what plans and programs look like, and its replies reason before the verdict, word by
//! word: a plan's judge writes the right plan, and a mark and what the plan has after each word that it
//! has otherwise; a program's judge writes the program that the plan tells, and likewise a mark and the
//! program's own word, up to where the two are no more word against word. So every word it writes is a
//! lesson in comparing. (With a yes or no after each
//! line, which asks for all of a line at once, it took half of the programs that stray for faithful
//! after 1,000 steps.) One kind of mistake is never shown to it
//! ([`Mistake::KEPT_FROM_VERIFIER`](crate::rooms::mistakes::Mistake)).

use super::super::{check_complete, start};
use super::planner::{network, sample};
use super::{HELD_OUT, Options, stream, text_format, tokenizer_of};
use crate::config::Head;
use crate::llm::engine::{Engine, EngineOptions, Network};
use crate::llm::local::LocalChat;
use crate::llm::{ChatModel, ChatRequest, SamplingOptions};
use crate::models::qwen3::Qwen3;
use crate::nn::{Params, frozen};
use crate::rooms::demos::{VerifierSample, verifier_sample};
use crate::rooms::recipe::{Recipe, Then};
use crate::train::lm::LmTrainee;
use crate::train::run::{self, Metrics, Trainee};
use crate::verify::{parse_verdict, rooms_prompt, user_turn, verdict_text};
use anyhow::Context;
use candle_core::{Device, Tensor};
use serde_json::json;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// How replies reason; part of a run's settings, so that none goes on under another way.
const REASONS: &str = "word by word";

/// Tokens of a reply at most: a plan or a program, and the verdict.
pub const MAX_NEW_TOKENS: usize = 320;

impl Options {
    /// The verifier's run. (The one in the tree came of several: `data/embedded/README.md`.)
    pub fn verifier(dir: PathBuf) -> Self {
        Self { steps: 6_000, lr: 1e-3, held_out: 64, ..Self::planner(dir) }
    }
}

/// User turn and reply of a case.
pub fn text(s: &VerifierSample) -> (String, String) {
    (turn(s), format!("{}\n{}", reason(s), verdict_text(s.verdict)))
}

fn turn(s: &VerifierSample) -> String {
    user_turn(s.head, rooms_prompt(s.head), &s.question, &s.plan, &s.program)
}

fn reason(s: &VerifierSample) -> String {
    match s.head {
        Head::Adherence => reason_of_program(&s.plan, &s.program),
        _ => reason_of_plan(&s.wanted, &s.plan),
    }
}

/// Follows what should stand where something else does.
const STRAYS: char = '!';

/// What is compared at a time: a word with the blank before it, or any other character by itself.
/// (So a length strays in its digit, not somewhere in its five tokens.)
fn units(text: &str) -> Vec<&str> {
    let mut units = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let word = rest.strip_prefix(' ').unwrap_or(rest);
        let letters = word.find(|c: char| !c.is_alphabetic() && c != '_').unwrap_or(word.len());
        let len = if letters > 0 { rest.len() - word.len() + letters } else { first.len_utf8() };
        let (unit, after) = rest.split_at(len);
        units.push(unit);
        rest = after;
    }
    units
}

/// The right text, with a mark and what is held after each unit that is held otherwise; where the two
/// are not of one length, up to the first. The mark alone stands where one of them ends.
fn compared(right: &str, held: &str) -> String {
    let (wanted, held) = (units(right), units(held));
    let mut line = String::new();
    for (i, unit) in wanted.iter().enumerate() {
        line.push_str(unit);
        let other = held.get(i);
        if other != Some(unit) {
            line.push(STRAYS);
            line.push_str(other.unwrap_or(&""));
            if held.len() != wanted.len() {
                return line;
            }
        }
    }
    if held.len() > wanted.len() {
        line.push(STRAYS);
    }
    line
}

/// The right plan, each step compared with the one that the plan has in its place; and a step that
/// has no business there.
fn reason_of_plan(right: &str, plan: &str) -> String {
    // A missing step moves the numbers of all that follow.
    let step = |line: &str| {
        line.trim().trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').trim().to_owned()
    };
    let held: Vec<String> = plan.lines().map(step).filter(|l| !l.is_empty()).collect();
    let wanted: Vec<String> = right.lines().map(step).collect();
    let (mut lines, mut next) = (Vec::new(), 0);
    for (i, right) in wanted.iter().enumerate() {
        if held.get(next + 1) == Some(right) && !wanted.contains(&held[next]) {
            lines.push(format!("{STRAYS}{}", held[next]));
            next += 1;
        }
        let other = held.get(next).map_or("", String::as_str);
        lines.push(format!("{}. {}", i + 1, compared(right, other)));
        // What is wanted later is not in this step's place: this one is missing.
        next += usize::from(!wanted[i + 1..].iter().any(|later| later == other));
    }
    if let Some(beyond) = held.get(next) {
        lines.push(format!("{STRAYS}{beyond}"));
    } else if Recipe::from_plan(plan).is_none() {
        lines.push(format!("{STRAYS}It is no plan."));
    }
    lines.join("\n")
}

/// The program that the plan tells, compared with the one there is.
fn reason_of_program(plan: &str, program: &str) -> String {
    // A plan that states its answer outright is as good as none.
    let told = Recipe::from_plan(plan).filter(|r| !matches!(r.then, Then::Literal { .. }));
    let Some(told) = told else { return format!("{STRAYS}The plan tells no program.") };
    let clean = |text: &str| -> String {
        let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|l| !l.is_empty()).collect();
        lines.join("\n")
    };
    let (told, program) = (clean(&told.program()), clean(program));
    let (mut lines, mut held) = (Vec::new(), program.lines());
    for right in told.lines() {
        let other = held.next().unwrap_or_default();
        lines.push(compared(right, other));
        if units(right).len() != units(other).len() {
            return lines.join("\n");
        }
    }
    if held.next().is_some() {
        lines.push(STRAYS.into());
    }
    lines.join("\n")
}

struct VerifierTrainee<'a> {
    lm: LmTrainee<'a>,
    judge: LocalChat,
    cases: Vec<VerifierSample>,
}

impl Trainee for VerifierTrainee<'_> {
    fn params(&self) -> &Params {
        self.lm.params()
    }

    fn optimiser_state(&self) -> candle_core::Result<HashMap<String, Tensor>> {
        self.lm.optimiser_state()
    }

    fn restore(&mut self, state: HashMap<String, Tensor>, step: u64) -> candle_core::Result<()> {
        self.lm.restore(state, step)
    }

    fn step(&mut self, step: u64) -> anyhow::Result<Metrics> {
        self.lm.step(step)
    }

    /// Per head: balanced accuracy of greedy verdicts, an unreadable one being wrong.
    fn evaluate(&mut self) -> anyhow::Result<Metrics> {
        let mut m = self.lm.evaluate()?;
        self.judge.engine().forget_prefixes();
        let requests: Vec<ChatRequest> =
            self.cases.iter().map(|s| ChatRequest::user(turn(s), 0, MAX_NEW_TOKENS)).collect();
        let replies = self.judge.chat(&requests, &SamplingOptions::greedy(), None);
        let verdicts: Vec<Option<bool>> =
            replies.into_iter().map(|r| Ok(parse_verdict(&r?.text))).collect::<anyhow::Result<_>>()?;
        for head in Head::ALL {
            let share = |truth: bool| -> Option<f64> {
                let of =
                    self.cases.iter().zip(&verdicts).filter(|(s, _)| s.head == head && s.verdict == truth);
                let (n, right) =
                    of.fold((0, 0), |(n, r), (_, v)| (n + 1, r + usize::from(*v == Some(truth))));
                (n > 0).then(|| right as f64 / n as f64)
            };
            if let (Some(yes), Some(no)) = (share(true), share(false)) {
                m.insert(format!("{}_balanced", head.word()), json!((yes + no) / 2.));
            }
        }
        let unreadable = verdicts.iter().filter(|v| v.is_none()).count();
        m.insert("unreadable".into(), json!(unreadable as f64 / verdicts.len().max(1) as f64));
        Ok(m)
    }
}

/// Trains (or continues) from the planner's run in `planner`, or from the model that the options name.
pub fn train(o: &Options, planner: &Path) -> anyhow::Result<Metrics> {
    let (tokenizer, params) = match &o.from {
        Some(dir) => (tokenizer_of(&o.dir, Some(dir))?, start(o.seed, Some(dir))?),
        None => {
            let of_planner = run::parameters(planner)?.with_context(|| {
                format!(
                    "the verifier starts from the planner's run, and {} has none: make the planner first",
                    planner.display()
                )
            })?;
            // The planner's ids are this network's, and stay so whatever becomes of the planner.
            (tokenizer_of(&o.dir, Some(planner))?, Params::from_tensors(o.seed, of_planner)?)
        }
    };
    let format = text_format(&tokenizer)?;
    let vocab = format.tokenizer.vocab_size();
    let network = network(&params, vocab)?;
    check_complete(&params, o.from.as_deref(), None)?;

    let mut rng = stream(o.seed, HELD_OUT);
    let mut cases = Vec::new();
    for head in Head::ALL {
        let of = std::iter::repeat_with(|| verifier_sample(&mut rng)).filter(|s| s.head == head && s.applies);
        cases.extend(of.take(o.held_out));
    }
    let held_out = cases.iter().map(|s| sample(&format, text(s))).collect::<Result<_, _>>()?;
    let source_format = text_format(&tokenizer)?;
    let source = Box::new(move |step| {
        let mut rng = stream(o.seed, step);
        (0..o.batch).map(|_| sample(&source_format, text(&verifier_sample(&mut rng)))).collect()
    });
    let cfg = super::planner::config(vocab);
    let model = Qwen3::new(&cfg, frozen(params.builder()))?;
    let network_of_judge = Network::Text { model, cfg: cfg.clone() };
    let engine = Engine::new(network_of_judge, Device::Cpu, vec![format.end], EngineOptions::default());
    let mut trainee = VerifierTrainee {
        lm: LmTrainee::new(network, params, o.lm(), super::super::group(o.muon), source, held_out)?,
        judge: LocalChat::from_engine("verifier", engine, format),
        cases,
    };
    o.train(&mut trainee, "verifier", json!({ "model": cfg, "reasons": REASONS }))
}

/// Writes a run's network as a model folder: it is of the planner's architecture.
pub fn export(run: &Path, out: &Path) -> anyhow::Result<()> {
    super::planner::export(run, out)
}
