//! The embedded verifier: the base planner's network, trained on as a judge of plans and programs.
//!
//! One bit a case would be a thin signal for a network of this size. So it starts from the planner,
//! which knows what plans and programs look like, and its replies reason before the verdict: a
//! plan's judge first writes the right plan, a program's judge the line that the program should
//! have where it first strays. One kind of mistake is never shown to it
//! ([`Mistake::KEPT_FROM_VERIFIER`](crate::rooms::mistakes::Mistake)).

use super::super::start;
use super::planner::{network, sample};
use super::{HELD_OUT, Options, stream, text_format, tokenizer_of};
use crate::files::write_atomic;
use crate::llm::engine::{Engine, EngineOptions, Network};
use crate::llm::local::LocalChat;
use crate::llm::{ChatModel, ChatRequest, SamplingOptions};
use crate::models::qwen3::Qwen3;
use crate::nn::optim::Group;
use crate::nn::{Params, frozen};
use crate::rooms::demos::{VerifierSample, verifier_sample};
use crate::rooms::frames;
use crate::rooms::mistakes::Head;
use crate::rooms::recipe::{Recipe, Then};
use crate::train::lm::LmTrainee;
use crate::train::run::{self, Metrics, Trainee};
use crate::verify::{parse_verdict, rooms_prompt, user_turn, verdict_text};
use anyhow::Context;
use candle_core::{Device, Tensor};
use serde_json::json;
use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Tokens of a reply at most: the right plan and the verdict.
pub const MAX_NEW_TOKENS: usize = 192;

impl Options {
    /// The run that made the embedded verifier.
    pub fn verifier(dir: PathBuf) -> Self {
        Self { steps: 400, lr: 1e-3, held_out: 64, ..Self::planner(dir) }
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
    if s.head != Head::Adherence {
        let right = frames::parse(&s.question).map(|(spec, _)| spec.recipe().plan());
        return right.expect("training questions are of the grammar");
    }
    // A plan that states its answer outright is as good as none.
    let told = Recipe::from_plan(&s.plan).filter(|r| !matches!(r.then, Then::Literal { .. }));
    let Some(told) = told else { return "The plan tells no program.".into() };
    let told = told.program();
    let lines = |text: &str| -> Vec<String> {
        text.lines().map(|l| l.trim_end().to_owned()).filter(|l| !l.is_empty()).collect()
    };
    let (told, held) = (lines(&told), lines(&s.program));
    match told.iter().enumerate().find(|(i, line)| held.get(*i) != Some(line)) {
        Some((_, line)) => format!("It strays here:\n{line}"),
        None if held.len() > told.len() => "It does more than the plan.".into(),
        None => "It strays nowhere.".into(),
    }
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
        let replies = self.judge.chat(&requests, &SamplingOptions::greedy(), None)?;
        let verdicts: Vec<Option<bool>> = replies.iter().map(|r| parse_verdict(&r.text)).collect();
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
            let of_planner = run::parameters(&planner.join("checkpoint.safetensors")).with_context(|| {
                format!(
                    "the verifier starts from the planner's run, and {} has none: make the planner first",
                    planner.display()
                )
            })?;
            // The planner's ids are this network's.
            let tokenizer = tokenizer_of(planner, None)?;
            write_atomic(&o.dir.join("tokenizer.json"), |w| w.write_all(tokenizer.as_bytes()))?;
            (tokenizer, Params::from_tensors(o.seed, of_planner)?)
        }
    };
    let format = text_format(&tokenizer)?;
    let vocab = format.tokenizer.vocab_size();
    let network = network(&params, vocab)?;

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
        lm: LmTrainee::new(network, params, o.lm(), |_, v| Some(Group::usual(v)), source, held_out)?,
        judge: LocalChat::from_engine("verifier", engine, format),
        cases,
    };
    o.train(&mut trainee, "verifier", serde_json::to_value(cfg)?)
}

/// Writes a run's network as a model folder: it is of the planner's architecture.
pub fn export(run: &Path, out: &Path) -> anyhow::Result<()> {
    super::planner::export(run, out)
}
