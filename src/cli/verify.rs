//! `valor verify`: the reward's heads on replies, and how far their judge can be trusted.

use super::{ModelArgs, all_heard, json_lines, replaceable};
use crate::config::Head;
use crate::eval::audit::{Audit, Labelled, rooms};
use crate::eval::benches::record::NO_REPLY;
use crate::eval::rooms::questions;
use crate::files::write_atomic;
use crate::llm::ChatModels;
use crate::pipeline::sandbox;
use crate::report::pulse::Pulse;
use crate::rooms::{Look, Question};
use crate::text::shown;
use crate::verify::{Ask, Judge, Scored, Verification, check_files};
use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Judge planners' replies as the reward of training does, and judge the judge
#[derive(Debug, clap::Args)]
pub struct VerifyArgs {
    #[command(subcommand)]
    command: VerifyCommand,
}

#[derive(Debug, clap::Subcommand)]
enum VerifyCommand {
    /// Score replies, head by head
    Score(ScoreArgs),
    /// Measure a verifier's agreement with labelled verdicts
    Audit(AuditArgs),
}

#[derive(Debug, clap::Args)]
struct ScoreArgs {
    /// JSON lines {"question", "reply"}, such as eval --planner … --out and infer --batch write
    replies: PathBuf,
    /// Print one JSON line a reply, with what the verifier said
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    models: ModelArgs,
}

#[derive(Debug, clap::Args)]
// A group, so that where neither is given both are named.
#[command(group(clap::ArgGroup::new("cases").args(["labels", "rooms"]).required(true)))]
struct AuditArgs {
    /// JSON lines {"head", "question", "plan", "program", "ok"} (and "mistake", "cluster" if wanted)
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// Exact labels instead: right replies to so many questions about rooms, and replies with each usual
    /// mistake
    #[arg(long, value_name = "N")]
    rooms: Option<usize>,
    /// Seed of the questions about rooms
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write each case with its verdict and the verifier's reply here, as JSON lines
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    models: ModelArgs,
}

pub fn run(args: VerifyArgs) -> Result<ExitCode> {
    match args.command {
        VerifyCommand::Score(args) => score(&args),
        VerifyCommand::Audit(args) => audit(&args),
    }
}

/// Lines of a file, each as `T`, with their numbers.
fn lines<T: serde::de::DeserializeOwned>(path: &Path, expected: &str) -> Result<Vec<(usize, T)>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let read = json_lines(&text, &path.display().to_string(), expected)?;
    ensure!(!read.is_empty(), "{} holds no line", path.display());
    Ok(read)
}

fn bar(n: usize) -> Result<ProgressBar> {
    let bar = ProgressBar::new(n as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} verdicts {elapsed} eta {eta}")?);
    Ok(bar)
}

fn score(args: &ScoreArgs) -> Result<ExitCode> {
    #[derive(Deserialize)]
    struct Line {
        question: String,
        /// `null` where the planner gave none; a row of a bench then says so by its failure.
        #[serde(default, deserialize_with = "there")]
        reply: Option<Option<Reply>>,
        #[serde(default)]
        failure: Value,
        /// Of infer's rows: some were never planned.
        #[serde(default)]
        error: Value,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Reply {
        Text(String),
        OfInfer { text: String },
    }
    impl Line {
        fn is_unplanned(&self) -> bool {
            match &self.reply {
                None => self.failure != "planner",
                Some(None) => self.error["kind"] == "picture" || self.error["kind"] == NO_REPLY,
                Some(Some(_)) => false,
            }
        }

        fn text(&self) -> &str {
            match &self.reply {
                Some(Some(Reply::Text(text) | Reply::OfInfer { text })) => text,
                _ => "",
            }
        }
    }
    /// Tells `null` from what is not there.
    fn there<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Option<Reply>>, D::Error> {
        Option::deserialize(from).map(Some)
    }
    let given: Vec<(usize, Line)> = lines(&args.replies, "{\"question\", \"reply\"}")?;
    if let Some((number, _)) = given.iter().find(|(_, l)| l.is_unplanned()) {
        bail!(
            "{}, line {number}: has no \"reply\" to be scored: leave it out; eval writes rows with replies \
             where --planner is given",
            args.replies.display()
        )
    }
    let (config, device) = (args.models.config()?, args.models.device()?);
    let chats = ChatModels::new(&config, &device);
    check_files(&config.verifier)?;
    let judge = Judge::new(chats.verifier()?, &config.verifier)?;
    let mut sandbox = sandbox(&config.sandbox)?;
    let cases: Vec<(&str, &str)> = given.iter().map(|(_, l)| (l.question.as_str(), l.text())).collect();
    let bar = bar(cases.len() * Head::ALL.len())?;
    let mut pulse = Pulse::default();
    let verification = Verification { judge: &judge, weights: &config.reward };
    let scored = verification.score(&cases, &mut sandbox, |n| {
        bar.inc(n as u64);
        pulse.beat(&bar);
    })?;
    bar.finish_and_clear();
    let mut out = super::stdout();
    for (i, (s, (question, _))) in scored.iter().zip(&cases).enumerate() {
        if args.json {
            let mut row = serde_json::to_value(s)?;
            row["index"] = json!(i);
            row["question"] = json!(question);
            writeln!(out, "{row}")?;
        } else {
            tell(&mut out, i, question, s)?;
        }
    }
    let rewards: Vec<f64> = scored.iter().filter_map(|s| s.reward).collect();
    let mean = rewards.iter().sum::<f64>() / rewards.len().max(1) as f64;
    notice!(
        "valor: mean reward {mean:.3} of {} replies, {} without a reward (a verdict is missing)",
        rewards.len(),
        scored.len() - rewards.len()
    );
    for (name, usage) in chats.usage() {
        notice!("valor: endpoint {name}: {}", serde_json::to_string(&usage)?);
    }
    Ok(all_heard(scored.iter().filter(|s| s.silence().is_some()).count()))
}

/// One reply's heads for people, and why those that object do.
fn tell(out: &mut impl Write, i: usize, question: &str, s: &Scored) -> std::io::Result<()> {
    let word = |ok: Option<bool>| match ok {
        Some(true) => "yes",
        Some(false) => "no",
        None => "missing",
    };
    let reward = s.reward.map_or("missing".into(), |r| format!("{r:.2}"));
    write!(out, "{i:<5} {reward:<8} format {:<4} syntax {:<4}", word(Some(s.format)), word(Some(s.syntax)))?;
    for (head, verdict) in &s.heads {
        write!(out, " {} {:<8}", head.word(), word(verdict.ok))?;
    }
    writeln!(out, " {}", shown(question))?;
    let mut why = |head: &str, text: &str| {
        let text: String = text.chars().map(|c| if c == '\n' { ' ' } else { c }).take(300).collect();
        writeln!(out, "      {head}: {}", shown(text.trim()))
    };
    if let Some(e) = &s.format_error {
        why("format", e)?;
    }
    if let Some(e) = &s.syntax_error {
        why("syntax", e)?;
    }
    for (head, verdict) in s.heads.iter().filter(|(_, v)| v.ok != Some(true) && !v.said.is_empty()) {
        why(head.word(), &verdict.said)?;
    }
    Ok(())
}

fn audit(args: &AuditArgs) -> Result<ExitCode> {
    replaceable("--out", args.out.as_deref(), &["case", "verdict", "said"])?;
    let cases: Vec<Labelled> = match (&args.labels, args.rooms) {
        (Some(path), _) => {
            let read = lines(path, "{\"head\", \"question\", \"plan\", \"program\", \"ok\"}")?;
            read.into_iter().map(|(_, case)| case).collect()
        }
        (None, n) => {
            let asked: Vec<Question> =
                questions(Look::Studio, args.seed).take(n.unwrap_or(0)).map(|(_, q)| q).collect();
            ensure!(!asked.is_empty(), "--rooms must be at least 1");
            rooms(&asked)
        }
    };
    let (config, device) = (args.models.config()?, args.models.device()?);
    let chats = ChatModels::new(&config, &device);
    check_files(&config.verifier)?;
    let judge = Judge::new(chats.verifier()?, &config.verifier)?;
    let bar = bar(cases.len())?;
    let asks: Vec<Ask> = cases.iter().map(Labelled::ask).collect();
    let mut pulse = Pulse::default();
    let verdicts = judge.verdicts(&asks, |n| {
        bar.inc(n as u64);
        pulse.beat(&bar);
    })?;
    bar.finish_and_clear();
    if let Some(path) = &args.out {
        write_atomic(path, |w| {
            cases.iter().zip(&verdicts).try_for_each(|(c, v)| {
                writeln!(w, "{}", json!({ "case": c, "verdict": v.ok, "said": v.said }))
            })
        })?;
    }
    let report = Audit::new(&cases, &verdicts);
    let code = all_heard(verdicts.iter().filter(|v| v.silent).count());
    let mut out = super::stdout();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
        return Ok(code);
    }
    writeln!(out, "verifier: {}", judge.name())?;
    writeln!(
        out,
        "{:<10} {:<24} {:<22} {:>6}  {:<24} {:<24} {:>6} {:>7}",
        "head", "accuracy", "balanced", "kappa", "false accepts", "false rejects", "cases", "missing"
    )?;
    for (head, h) in &report.heads {
        let [low, high] = h.balanced_interval;
        let balanced = match h.balanced.is_nan() {
            true => "–".into(),
            false => format!("{:.3} [{low:.3}, {high:.3}]", h.balanced),
        };
        writeln!(
            out,
            "{:<10} {:<24} {:<22} {:>6.2}  {:<24} {:<24} {:>6} {:>7}",
            head.word(),
            h.accuracy.to_string(),
            balanced,
            h.kappa,
            h.false_accept.to_string(),
            h.false_reject.to_string(),
            h.accuracy.n,
            h.missing
        )?;
    }
    if !report.objected.is_empty() {
        writeln!(out, "\nobjected to, of cases with the mistake:")?;
        for (name, share) in &report.objected {
            writeln!(out, "{:<26} {share}  n {}", shown(name), share.n)?;
        }
    }
    Ok(code)
}
