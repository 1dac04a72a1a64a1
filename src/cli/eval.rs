//! `valor eval`: measure on benches. The bench rooms by itself, with `--out FILE` or none, is here; its
//! models one by one are in [`super::parts`]; runs of published benches, with `--out DIR`, in
//! [`super::benches`].
//!
//! A row of `--out` can be repeated alone: write the pictures with `--pictures DIR` and run
//! `valor infer DIR/INDEX.png QUESTION --seed SEED` with the row's index, question and seed, and
//! the same settings.

use super::{ExecutorArgs, ModelArgs, fillable, planning_sets, replaceable};
use crate::config::Config;
use crate::eval::benches::feed::{ROOMS_N, Shard};
use crate::eval::rooms::{Programs, Report, ToolSet, evaluate, questions};
use crate::files::write_atomic;
use crate::llm::ChatModels;
use crate::pipeline::{Referee, identity, sandbox};
use crate::planner::Planner;
use crate::report::pulse::Pulse;
use crate::rooms::export::picture_png;
use crate::rooms::spec::Family;
use crate::rooms::{Look, Question, View};
use crate::text::shown;
use crate::tools::real::Perception;
use crate::weights::source::{EMBEDDED, EMBEDDED_BASE};
use anyhow::bail;
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
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
    /// Average precision of the detector on the boxes in --data
    Detection,
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

/// A bench as the command line names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Named {
    Rooms(Bench),
    /// With the revision of its data set, if one is named.
    Published(crate::data::Bench, Option<String>),
    /// All published ones, and rooms
    All,
}

impl std::str::FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self::All);
        }
        if let Ok(bench) = Bench::from_str(text, false) {
            return Ok(Self::Rooms(bench));
        }
        let (name, revision) = text.split_once('@').map_or((text, None), |(n, r)| (n, Some(r.to_owned())));
        match crate::data::Bench::by_name(name) {
            Some(bench) => Ok(Self::Published(bench, revision)),
            None => {
                let known = crate::data::Bench::ALL.map(crate::data::Bench::name).join(", ");
                Err(format!(
                    "there are all, rooms, detection, rooms-detector, rooms-depth, rooms-vlm, rooms-verifier, {known}"
                ))
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum MethodChoice {
    /// A planner's program with its tools
    Program,
    /// The VLM answers alone
    Direct,
}

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct EvalArgs {
    #[command(subcommand)]
    what: Option<super::benches::EvalCommand>,
    /// What to measure on: all; rooms (questions about rooms: planner, programs and tools together),
    /// detection (average precision on the boxes of an ODVG or COCO file, --data FILE), rooms-detector
    /// (the same on --n pictures of rooms), rooms-depth (error of metric depth; --n
    /// pictures), rooms-vlm (answers about --n crops), rooms-verifier (verdicts on the planner's replies
    /// to --n questions); or published benches, several behind commas, each with @REVISION if wanted:
    /// omni3d-bench, robospatial, blink, vsr, realworldqa, gqa, tallyqa, countbench
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', default_value = "rooms")]
    pub(super) bench: Vec<Named>,
    /// Nothing batched, overlapped or kept from one question to the next: to measure what that brings
    #[arg(long, hide_short_help = true)]
    pub(super) one_by_one: bool,
    /// Questions, or what the bench counts: 1000 of rooms and all of a published bench unless it is given
    #[arg(long, short)]
    pub(super) n: Option<usize>,
    /// Seed of the scenes and questions, and of the planner's sampling; 1 unless it is given
    #[arg(long)]
    pub(super) seed: Option<u64>,
    /// Look of the rooms; studio unless it is given
    #[arg(long, value_enum)]
    pub(super) look: Option<Look>,
    /// What answers the programs' tool calls; oracle for rooms alone, else real unless it is given
    #[arg(long, value_enum)]
    pub(super) tools: Option<ToolChoice>,
    /// Where the programs come from: stored (each question's correct program; rooms only, and what they
    /// alone are measured with unless it is given), configured (the configuration's planner), base (the
    /// same, but of the embedded one what it was before its training), or another source of a planner
    #[arg(long)]
    pub(super) planner: Option<String>,
    /// The planner's most likely reply instead of a sampled one (planner.temperature=0)
    #[arg(long)]
    pub(super) greedy: bool,
    /// Sample so many replies a question; the most frequent answer counts (inference.samples)
    #[arg(long, visible_alias = "samples", value_name = "K", conflicts_with = "greedy")]
    pub(super) vote: Option<u64>,
    /// Give a failed program back to the planner so many times (inference.repairs)
    #[arg(long, value_name = "N")]
    pub(super) repair: Option<usize>,
    /// The tools see another question's picture: what is still right did not need the picture
    #[arg(long)]
    pub(super) shuffle_pictures: bool,
    /// Only questions of these families of rooms, such as count,exists
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = family)]
    pub(super) families: Vec<Family>,
    /// The run's folder: samples.jsonl, results.json, report.html; a run that was broken off goes on.
    /// For the bench rooms alone a FILE (with an ending, such as rows.jsonl): one JSON line per question,
    /// written at the end (a run that was broken off begins anew); for rooms-verifier with --scenes a FILE
    /// of the replies, what they are worth and what passed
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
    /// Folder with the published benches' files, a folder of its name for each; the hub's cache if none
    /// is given (valor eval pull). Of detection: a file of boxes, .jsonl (ODVG) or .json (COCO)
    #[arg(long, value_name = "PATH")]
    pub(super) data: Option<PathBuf>,
    /// Part I of N of the questions, for job arrays; valor eval merge puts them together
    #[arg(long, value_name = "I/N", value_parser = super::benches::shard)]
    pub(super) shard: Option<Shard>,
    /// How questions are answered; program unless it is given
    #[arg(long, value_enum)]
    pub(super) method: Option<MethodChoice>,
    /// Only have the programs written, into DIR/programs.jsonl
    #[arg(long, conflicts_with_all = ["programs", "method", "json", "repair"])]
    pub(super) planner_only: bool,
    /// Run these programs instead of asking a planner, so that tools are compared on the same ones
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["planner", "greedy", "vote", "repair", "prompt", "method"]
    )]
    pub(super) programs: Option<PathBuf>,
    /// Of rooms-verifier: also run each reply's program in so many other rooms, and tell how many replies
    /// that are wrong in one of them pass all heads
    #[arg(long, value_name = "N")]
    pub(super) scenes: Option<usize>,
    /// Write each question's picture here, as INDEX.png
    #[arg(long, value_name = "DIR")]
    pub(super) pictures: Option<PathBuf>,
    /// Print the report as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) executor: ExecutorArgs,
    #[command(flatten)]
    pub(super) models: ModelArgs,
}

impl EvalArgs {
    /// Of what has no end of its own.
    pub(super) fn n(&self) -> usize {
        self.n.unwrap_or(ROOMS_N)
    }

    pub(super) fn seed(&self) -> u64 {
        self.seed.unwrap_or(1)
    }

    pub(super) fn look(&self) -> Look {
        self.look.unwrap_or(Look::Studio)
    }

    /// The settings, with what options stand for given as settings: checked, and suited to, as those are.
    fn config(&self) -> anyhow::Result<Config> {
        let mut sets = self.executor.sets();
        sets.extend(planning_sets(self.greedy, self.vote, self.repair));
        match self.planner.as_deref() {
            None | Some("stored" | "configured" | "base") => {}
            // In quotes, lest a name be read as another value of TOML.
            Some(model) => sets.push(format!("planner.model={}", toml::Value::from(model))),
        }
        let mut config = self.models.explain(&sets)?.0;
        // Of the two the same is checked, and the same suits them.
        if self.planner.as_deref() == Some("base") && config.planner.model == EMBEDDED {
            config.planner.model = EMBEDDED_BASE.into();
        }
        Ok(config)
    }

    /// Of the options that say something to a planner alone the first that is given.
    pub(super) fn of_planner(&self) -> Option<&'static str> {
        let given = [
            ("--greedy", self.greedy),
            ("--vote", self.vote.is_some()),
            ("--repair", self.repair.is_some()),
            ("--prompt", self.models.prompt.is_some()),
        ];
        given.into_iter().find(|option| option.1).map(|option| option.0)
    }

    /// That stored programs are run without options for a planner.
    pub(super) fn check_stored(&self) -> anyhow::Result<()> {
        match self.of_planner() {
            None => Ok(()),
            Some(option) => {
                bail!("{option} says nothing to stored programs; give --planner base or configured")
            }
        }
    }

    /// Rooms by themselves, with a file of rows or none: no run with a folder.
    fn is_plain_rooms(&self) -> bool {
        let new = self.data.is_some()
            || self.shard.is_some()
            || self.method.is_some()
            || self.planner_only
            || self.one_by_one
            || self.programs.is_some();
        let folder = |out: &PathBuf| out.is_dir() || (!out.is_file() && out.extension().is_none());
        !new && !self.out.as_ref().is_some_and(folder)
    }
}

fn family(name: &str) -> Result<Family, String> {
    let known = || Family::ALL.iter().map(|f| f.text()).collect::<Vec<_>>().join(", ");
    Family::parse(name).ok_or_else(|| format!("no family of questions; there are {}", known()))
}

pub fn run(args: EvalArgs) -> anyhow::Result<ExitCode> {
    if let Some(command) = &args.what {
        return super::benches::command(command);
    }
    if args.n == Some(0) || args.vote == Some(0) {
        bail!("--n and --vote must be at least 1")
    }
    if args.scenes.is_some_and(|n| n == 0 || args.bench[..] != [Named::Rooms(Bench::RoomsVerifier)]) {
        bail!("--scenes is a number of rooms, at least 1, and says something to --bench rooms-verifier alone")
    }
    let (config, device) = (args.config()?, args.models.device()?);
    match args.bench[..] {
        [Named::Rooms(Bench::Rooms)] if args.is_plain_rooms() => {}
        [Named::Rooms(bench)] if bench != Bench::Rooms => {
            return super::parts::run(&args, bench, &config, &device);
        }
        _ => return super::benches::run(&args, &config, &device),
    }
    let stored = matches!(args.planner.as_deref(), None | Some("stored"));
    if stored {
        args.check_stored()?;
    }
    replaceable("--out", args.out.as_deref(), &["index", "question", "truth", "correct"])?;
    fillable("--pictures", args.pictures.as_deref())?;
    let chats = ChatModels::new(&config, &device);
    let planner = if stored { None } else { Some(Planner::new(chats.planner()?, &config)?) };
    let perception = match args.tools.unwrap_or(ToolChoice::Oracle) {
        ToolChoice::Oracle => None,
        ToolChoice::Real => Some(Perception::load(&config, &device, &chats)?),
    };
    let referee = if planner.is_some() { Referee::load(&config, &chats)? } else { None };
    let programs = match &planner {
        None => Programs::Stored,
        Some(planner) => {
            let referee = referee.as_ref();
            Programs::Planner { planner, seed: args.seed(), how: config.inference, referee }
        }
    };
    let mut sandbox = sandbox(&config.sandbox)?;
    let asked: Vec<(Arc<View>, Question)> = questions(args.look(), args.seed())
        .filter(|(_, q)| args.families.is_empty() || args.families.contains(&q.family))
        .take(args.n())
        .collect();
    if args.shuffle_pictures && asked.iter().all(|(v, _)| v.seed == asked[0].0.seed) {
        bail!("--shuffle-pictures needs questions about more than one picture; raise --n")
    }
    if let Some(dir) = &args.pictures {
        for (i, (view, _)) in asked.iter().enumerate() {
            write_atomic(&dir.join(format!("{i}.png")), |w| w.write_all(&picture_png(view)?))?;
        }
    }
    notice!("valor: {}", measured(planner.as_ref(), perception.as_ref()));
    let bar = ProgressBar::new(args.n() as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} eta {eta}")?);
    let tools = perception.as_ref().map_or(ToolSet::Oracle, ToolSet::Real);
    let mut pulse = Pulse::default();
    let scored = evaluate(&asked, programs, tools, args.shuffle_pictures, &mut sandbox, || {
        bar.inc(1);
        pulse.beat(&bar);
    });
    bar.finish_and_clear();
    let samples = match scored {
        Ok(samples) => samples,
        Err(e) => {
            notice!("valor: a model failed: {}", shown(&e.to_string()));
            return Ok(ExitCode::FAILURE);
        }
    };
    if let Some(path) = &args.out {
        write_atomic(path, |w| {
            samples.iter().try_for_each(|s| writeln!(w, "{}", serde_json::to_string(s)?))
        })?;
    }
    let report = Report::new(&samples);
    let mut stdout = super::stdout();
    if args.json {
        writeln!(stdout, "{:#}", reproducible(&args, &config, &report)?)?;
    } else {
        write!(stdout, "{}", report.table())?;
    }
    if report.unanswered > 0 {
        let n = report.unanswered;
        notice!(
            "valor: {n} questions had no result, for a server's or a network's fault, and are not scored; run the same command again"
        );
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// What is measured: the models by their names, and what stands in the place of others.
fn measured(planner: Option<&Planner>, perception: Option<&Perception>) -> String {
    let planner = planner.map(|p| format!("planner: {}", p.model.name()));
    let tools = perception.map(|p| p.names().map(|(part, name)| format!("{part}: {name}")).join(", "));
    match (planner, tools) {
        (None, None) => "stored programs, exact tools".into(),
        (None, Some(tools)) => format!("stored programs; models: {tools}"),
        (Some(planner), None) => format!("models: {planner}; exact tools"),
        (Some(planner), Some(tools)) => format!("models: {planner}, {tools}"),
    }
}

/// A report with what was asked for, and of which models.
fn reproducible(args: &EvalArgs, config: &Config, report: &Report) -> anyhow::Result<Value> {
    let planner = args.planner.as_deref().unwrap_or("stored");
    let real = args.tools == Some(ToolChoice::Real);
    let mut models = serde_json::Map::new();
    for (part, model, used) in [
        ("planner", &config.planner.model, planner != "stored"),
        ("detector", &config.detector.model, real),
        ("depth", &config.depth.model, real),
        ("vlm", &config.vlm.model, real),
        ("verifier", &config.verifier.model, planner != "stored" && Referee::is_wanted(config)),
    ] {
        if used {
            // The figures are not lost where that cannot be told any more.
            let named = identity(config, model, part).unwrap_or_else(|_| model.clone());
            models.insert(part.into(), named.into());
        }
    }
    let mut all = json!({
        "bench": report.bench, "rooms_version": report.rooms_version,
        "look": args.look(), "seed": args.seed(), "n": args.n(),
        "families": args.families.iter().map(|f| f.text()).collect::<Vec<_>>(),
        "tools": if real { "real" } else { "oracle" }, "planner": planner, "greedy": args.greedy,
        "samples": config.inference.samples, "shuffle_pictures": args.shuffle_pictures, "models": models,
    });
    if let (Some(all), Value::Object(measured)) = (all.as_object_mut(), serde_json::to_value(report)?) {
        all.extend(measured);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::EvalArgs;
    use crate::cli::{Cli, Command};
    use crate::config::Config;
    use crate::weights::source::EMBEDDED_BASE;
    use clap::Parser;

    fn args(more: &[&str]) -> EvalArgs {
        match Cli::try_parse_from([&["valor", "eval"][..], more].concat()).unwrap().command {
            Command::Eval(args) => args,
            _ => unreachable!("eval was named"),
        }
    }

    fn config(more: &[&str]) -> Result<Config, String> {
        args(more).config().map_err(|e| e.to_string())
    }

    /// Refused where the setting is, and the same suits the model.
    #[test]
    fn options_are_the_settings_that_they_stand_for() {
        for (options, sets) in [
            (&["--planner", "hub:a/b"][..], &["planner.model=hub:a/b"][..]),
            (&["--planner", "endpoint:nope"], &["planner.model=endpoint:nope"]),
            (&["--planner", ""], &["planner.model="]),
            (&["--greedy"], &["planner.temperature=0"]),
            (&["--samples", "3", "--repair", "1"], &["inference.samples=3", "inference.repairs=1"]),
            (&["--vote", "1001"], &["inference.samples=1001"]),
            (&["--repair", "3"], &["inference.repairs=3"]),
            (&["--planner", "base"], &["planner.model=embedded-base"]),
            (&["--planner", "configured"], &[]),
        ] {
            let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).collect();
            assert_eq!(config(options), config(&sets), "{options:?}");
        }
        assert_eq!(config(&["--planner", "hub:a/b"]).unwrap().planner.prompt, "general");
        let e = config(&["--planner", ""]).unwrap_err();
        assert!(e.starts_with("planner.model: is empty; name embedded, "), "{e}");
    }

    #[test]
    fn a_planners_name_is_no_other_value_of_toml() {
        for name in ["5", "true", "[a]", "a=b", "it's \"a\" \\\\ #", " a ", "'''"] {
            assert_eq!(config(&["--planner", name]).unwrap().planner.model, name);
        }
        let with_set =
            |planner| config(&["--set", "planner.model=x", "--planner", planner]).unwrap().planner.model;
        assert_eq!([with_set("base"), with_set("configured"), with_set("y")], ["x", "x", "y"]);
        assert_eq!(config(&["--planner", "base"]).unwrap().planner.model, EMBEDDED_BASE);
    }
}
