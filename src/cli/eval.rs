//! `valor eval`: measure on benches.

use crate::eval::rooms::{Report, Sample, questions};
use crate::files::write_atomic;
use crate::program::{Limits, Sandbox};
use crate::rooms::Look;
use crate::rooms::oracle::OracleTools;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Bench {
    Rooms,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ToolSet {
    /// The exact truth of the scene.
    Oracle,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PlannerChoice {
    /// The correct program of each question: measures sandbox and tools.
    Stored,
}

#[derive(Debug, clap::Args)]
pub struct EvalArgs {
    /// What to measure on
    #[arg(long, value_enum, default_value = "rooms")]
    bench: Bench,
    /// Questions
    #[arg(long, default_value_t = 1000)]
    n: usize,
    /// Seed of the scenes and questions
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Look of the rooms
    #[arg(long, value_enum, default_value = "studio")]
    look: Look,
    /// What answers the programs' tool calls
    #[arg(long, value_enum, default_value = "oracle")]
    tools: ToolSet,
    /// Where the programs come from
    #[arg(long, value_enum, default_value = "stored")]
    planner: PlannerChoice,
    /// Write one JSON line per question here
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: EvalArgs) -> anyhow::Result<ExitCode> {
    let Bench::Rooms = args.bench;
    let ToolSet::Oracle = args.tools;
    let PlannerChoice::Stored = args.planner;
    let mut sandbox = Sandbox::start(Limits::default())?;
    let bar = ProgressBar::new(args.n as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} eta {eta}")?);
    let mut samples = Vec::with_capacity(args.n);
    for (index, (view, question)) in questions(args.look, args.seed).take(args.n).enumerate() {
        let outcome = sandbox.run(&question.program, "image.png", &mut OracleTools::new(&view));
        samples.push(Sample::new(index, &view, &question, Ok(outcome)));
        bar.inc(1);
    }
    bar.finish_and_clear();
    if let Some(path) = &args.out {
        write_atomic(path, |w| {
            samples.iter().try_for_each(|s| writeln!(w, "{}", serde_json::to_string(s)?))
        })?;
    }
    let report = Report::new(&samples);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report.table());
    }
    Ok(ExitCode::SUCCESS)
}
