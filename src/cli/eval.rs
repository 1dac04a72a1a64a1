//! `valor eval`: measure on benches.
//!
//! A row of `--out` can be repeated alone: write the pictures with `--pictures DIR` and run
//! `valor infer DIR/INDEX.png QUESTION --seed SEED` with the row's index, question and seed, and
//! the same settings (`--greedy` is `--set planner.temperature=0`).

use super::ModelArgs;
use crate::eval::rooms::{Programs, Report, ToolSet, evaluate, questions};
use crate::files::write_atomic;
use crate::llm::ChatModels;
use crate::pipeline::limits;
use crate::planner::Planner;
use crate::program::Sandbox;
use crate::rooms::export::picture_png;
use crate::rooms::{Look, Question, View};
use crate::tools::real::Perception;
use anyhow::{Context, bail};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Bench {
    /// Questions about rooms: planner, programs and tools together
    Rooms,
    /// Average precision of the detector; --n pictures
    RoomsDetector,
    /// Error of metric depth; --n pictures
    RoomsDepth,
    /// The VLM's answers about --n crops
    RoomsVlm,
    /// The verifier's verdicts on the planner's replies to --n questions
    RoomsVerifier,
}

impl Bench {
    pub fn name(self) -> String {
        self.to_possible_value().expect("no bench is hidden").get_name().to_owned()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ToolChoice {
    /// The exact truth of the scene
    Oracle,
    /// Detector, depth network and VLM
    Real,
}

#[derive(Debug, clap::Args)]
pub struct EvalArgs {
    /// What to measure on
    #[arg(long, value_enum, default_value = "rooms")]
    pub(super) bench: Bench,
    /// Questions, or what the bench counts
    #[arg(long, default_value_t = 1000)]
    pub(super) n: usize,
    /// Seed of the scenes and questions, and of the planner's sampling
    #[arg(long, default_value_t = 1)]
    pub(super) seed: u64,
    /// Look of the rooms
    #[arg(long, value_enum, default_value = "studio")]
    pub(super) look: Look,
    /// What answers the programs' tool calls
    #[arg(long, value_enum, default_value = "oracle")]
    tools: ToolChoice,
    /// Where the programs come from: stored (each question's correct program), base (the
    /// configuration's planner), or a planner's folder
    #[arg(long, default_value = "stored")]
    planner: String,
    /// The planner's most likely reply instead of a sampled one
    #[arg(long)]
    greedy: bool,
    /// Sample so many replies a question; the most frequent answer counts (inference.samples)
    #[arg(long, value_name = "K", conflicts_with = "greedy")]
    pub(super) vote: Option<usize>,
    /// The tools see another question's picture: what is still right did not need the picture
    #[arg(long)]
    pub(super) shuffle_pictures: bool,
    /// Write one JSON line per question here
    #[arg(long, value_name = "FILE")]
    pub(super) out: Option<PathBuf>,
    /// Write each question's picture here, as INDEX.png
    #[arg(long, value_name = "DIR")]
    pub(super) pictures: Option<PathBuf>,
    /// Print the report as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    models: ModelArgs,
}

pub fn run(args: EvalArgs) -> anyhow::Result<ExitCode> {
    if args.n == 0 || args.vote == Some(0) {
        bail!("--n and --vote must be at least 1")
    }
    let (mut config, device) = (args.models.config()?, args.models.device()?);
    if args.greedy {
        config.planner.temperature = 0.;
    }
    config.inference.samples = args.vote.unwrap_or(config.inference.samples);
    if !["stored", "base"].contains(&args.planner.as_str()) {
        config.planner.model.clone_from(&args.planner);
    }
    if args.bench != Bench::Rooms {
        return super::parts::run(&args, &config, &device);
    }
    let chats = ChatModels::new(&config, &device);
    let planner = match args.planner.as_str() {
        "stored" => None,
        _ => Some(Planner::new(chats.planner()?, &config.planner)?),
    };
    let perception = match args.tools {
        ToolChoice::Oracle => None,
        ToolChoice::Real => Some(Perception::load(&config, &device, &chats)?),
    };
    let programs = match &planner {
        None => Programs::Stored,
        Some(planner) => Programs::Planner { planner, seed: args.seed, how: config.inference },
    };
    let mut sandbox = Sandbox::start(limits(&config.sandbox)).context("cannot start the sandbox")?;
    let asked: Vec<(Arc<View>, Question)> = questions(args.look, args.seed).take(args.n).collect();
    if args.shuffle_pictures && asked.iter().all(|(v, _)| v.seed == asked[0].0.seed) {
        bail!("--shuffle-pictures needs questions about more than one picture; raise --n")
    }
    if let Some(dir) = &args.pictures {
        for (i, (view, _)) in asked.iter().enumerate() {
            write_atomic(&dir.join(format!("{i}.png")), |w| w.write_all(&picture_png(view)?))?;
        }
    }
    let bar = ProgressBar::new(args.n as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} eta {eta}")?);
    let tools = perception.as_ref().map_or(ToolSet::Oracle, ToolSet::Real);
    let scored = evaluate(&asked, programs, tools, args.shuffle_pictures, &mut sandbox, || bar.inc(1));
    bar.finish_and_clear();
    let samples = match scored {
        Ok(samples) => samples,
        Err(e) => {
            eprintln!("valor: the planner failed: {e}");
            return Ok(ExitCode::FAILURE);
        }
    };
    if let Some(path) = &args.out {
        write_atomic(path, |w| {
            samples.iter().try_for_each(|s| writeln!(w, "{}", serde_json::to_string(s)?))
        })?;
    }
    let report = Report::new(&samples);
    let mut stdout = std::io::stdout().lock();
    if args.json {
        writeln!(stdout, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        write!(stdout, "{}", report.table())?;
    }
    Ok(ExitCode::SUCCESS)
}
