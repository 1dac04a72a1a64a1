//! `valor eval` on published benches, and `eval pull`, `merge` and `compare`.
//!
//! A run's folder holds `settings.json` (what was asked for), `samples.jsonl` (a line a question, as they
//! are done), and in the end `results.json` and `report.html`. The same command goes on where a run was
//! broken off; with other settings it is refused.

mod merge;
mod settings;

use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::eval::{Bench as RoomsBench, EvalArgs, MethodChoice, Named, ToolChoice};
use super::fillable;
use crate::config::{Config, ENDPOINT};
use crate::data::{Bench, Items, Links, Source};
use crate::eval::benches::batch::Gallery;
use crate::eval::benches::compare::{self, compare};
use crate::eval::benches::feed::{Feed, Note, Opened, ROOMS, Shard};
use crate::eval::benches::folder::Folder;
use crate::eval::benches::metric::Form;
use crate::eval::benches::record::{NO_REPLY, Record, SAMPLES};
use crate::eval::benches::run::{Method, PROGRAMS, Programs, Runner, Stopped, Times, Written};
use crate::eval::benches::summary::{PUBLISHED, Summary, summarise, table};
use crate::files::write_atomic;
use crate::llm::ChatModels;
use crate::pipeline::{Referee, executor, limits, tell_missing};
use crate::planner::Planner;
use crate::program::{Executor, Sandbox};
use crate::report::pulse::Pulse;
use crate::text::shown;
use crate::tools::real::{Perception, Vlm};
use crate::verify::SynonymJudge;
use crate::weights::hub::Hub;
use merge::merge;
use settings::settings;

#[derive(Debug, clap::Subcommand)]
pub enum EvalCommand {
    /// Fetch published benches from the hub into its cache; a pull that was broken off goes on
    Pull {
        /// Such as omni3d-bench or vsr@REVISION
        #[arg(required = true)]
        benches: Vec<Named>,
    },
    /// Put the shards of a run together, as if it had been one
    Merge {
        /// Their folders
        #[arg(required = true)]
        dirs: Vec<PathBuf>,
        /// A new folder
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Print the results as JSON
        #[arg(long)]
        json: bool,
    },
    /// Set two runs on the same questions side by side: paired differences, McNemar's exact test, flips
    Compare {
        a: PathBuf,
        b: PathBuf,
        /// Which form of the metrics
        #[arg(long, value_enum, default_value = "strict")]
        form: Form,
        /// Print as JSON, with every sample that flipped
        #[arg(long)]
        json: bool,
    },
}

/// `I/N`.
pub fn shard(text: &str) -> Result<Shard, String> {
    let parts = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    match parts {
        Some((number, of)) if number >= 1 && number <= of => Ok(Shard { number, of }),
        _ => Err("expected I/N with I from 1 to N, such as 1/4".into()),
    }
}

pub fn command(command: &EvalCommand) -> Result<ExitCode> {
    match command {
        EvalCommand::Pull { benches } => pull(benches),
        EvalCommand::Merge { dirs, out, json } => merge(dirs, out, *json),
        EvalCommand::Compare { a, b, form, json } => {
            let (all, alone) = compare(a, b, *form)?;
            let mut stdout = super::stdout();
            match json {
                true => writeln!(stdout, "{:#}", json!({ "form": form, "benches": all, "left_out": alone }))?,
                false => write!(stdout, "{}", compare::table(&all, alone, *form))?,
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn pull(benches: &[Named]) -> Result<ExitCode> {
    let hub = Hub::from_env()?;
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} eta {eta}")?);
    for named in benches {
        let Named::Published(bench, revision) = named else {
            bail!("rooms are made here; name published benches, such as omni3d-bench")
        };
        let folder = crate::data::source::pull(&hub, *bench, revision.as_deref(), |file, done, all| {
            bar.set_message(file.to_owned());
            bar.set_length(all);
            bar.set_position(done);
        })?;
        notice!("valor: {bench} is in {}", folder.display());
    }
    bar.finish_and_clear();
    Ok(ExitCode::SUCCESS)
}

/// The benches that are named, opened as far as they can be; of those of rooms only the whole one is left.
fn opened(args: &EvalArgs, hub: &Hub) -> Result<Vec<Opened>> {
    let mut named: Vec<Named> = Vec::new();
    for name in &args.bench {
        let all = || Bench::ALL.map(|b| Named::Published(b, None)).into_iter();
        let more: Vec<Named> = match name {
            Named::All => all().chain([Named::Rooms(RoomsBench::Rooms)]).collect(),
            one => vec![one.clone()],
        };
        more.into_iter().for_each(|m| {
            if !named.contains(&m) {
                named.push(m);
            }
        });
    }
    let open = |name: &Named| match name {
        Named::Rooms(_) => Opened::Rooms { look: args.look(), seed: args.seed() },
        Named::Published(bench, revision) => {
            let source = match &args.data {
                Some(data) => Source::local(data, *bench),
                None => Source::cached(hub, *bench, revision.as_deref()),
            };
            match source.and_then(Items::open) {
                Ok(items) => Opened::Items(Box::new(items)),
                Err(e) => Opened::Refused(*bench, e.to_string()),
            }
        }
        Named::All => unreachable!("spelt out above"),
    };
    let benches: Vec<Opened> = named.iter().map(open).collect();
    let refused: Vec<&String> = benches
        .iter()
        .filter_map(|b| if let Opened::Refused(_, why) = b { Some(why) } else { None })
        .collect();
    if refused.len() == benches.len() {
        let more =
            if refused.len() > 1 { format!(" (and {} more)", refused.len() - 1) } else { String::new() };
        bail!("{}{more}", refused[0])
    }
    Ok(benches)
}

/// How the programs of a run are got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Stored,
    Planner,
    Programs,
    Direct,
}

pub fn run(args: &EvalArgs, config: &Config, device: &Device) -> Result<ExitCode> {
    for name in &args.bench {
        if let Named::Rooms(part) = name
            && *part != RoomsBench::Rooms
        {
            bail!("{} is measured by itself: name no other bench with it", part.name())
        }
    }
    for (name, given) in [
        ("--shuffle-pictures", args.shuffle_pictures),
        ("--families", !args.families.is_empty()),
        ("--pictures", args.pictures.is_some()),
    ] {
        ensure!(!given, "{name} is for the bench rooms alone, with --out FILE or none");
    }
    let Some(out) = &args.out else { bail!("--out DIR is needed: the run's folder") };
    fillable("--out", Some(out))?;
    let hub = Hub::from_env()?;
    let benches = opened(args, &hub)?;
    let only_rooms = benches.iter().all(|b| b.name() == ROOMS);
    let direct = args.method == Some(MethodChoice::Direct);
    let how = match (direct, &args.programs, args.planner.as_deref()) {
        (true, ..) => How::Direct,
        (_, Some(_), _) => How::Programs,
        (.., None) if only_rooms && !args.planner_only => How::Stored,
        (.., Some("stored")) => How::Stored,
        _ => How::Planner,
    };
    if direct {
        let unused = [
            ("--planner", args.planner.is_some()),
            ("--tools", args.tools.is_some()),
            ("--executor", args.executor.executor.is_some()),
            ("--fallback", args.executor.fallback.is_some()),
        ];
        let unused = unused.into_iter().find(|option| option.1).map(|option| option.0);
        if let Some(name) = unused.or(args.of_planner()) {
            bail!("{name} says nothing to --method direct")
        }
    }
    let default = if only_rooms { ToolChoice::Oracle } else { ToolChoice::Real };
    let tools = args.tools.unwrap_or(default);
    if !only_rooms {
        ensure!(
            how != How::Stored,
            "--planner stored is for rooms: published benches have no stored programs"
        );
        ensure!(
            tools == ToolChoice::Real,
            "--tools oracle is for rooms: of published benches no exact truth is known"
        );
    }
    if how == How::Stored {
        ensure!(
            !args.planner_only,
            "--planner stored says nothing to --planner-only; give --planner base or configured"
        );
        args.check_stored()?;
    }
    // Each worker starts a sandbox of its own; whether one can be had is better told before all else.
    let runs_programs = !direct && !args.planner_only;
    let executor = if runs_programs { executor(&config.sandbox)? } else { Executor::default() };
    if runs_programs {
        let opened = Sandbox::open(limits(&config.sandbox), executor.clone(), None);
        tell_missing(&opened.context("cannot start the sandbox")?);
    }
    let programs = args.programs.as_deref().map(Programs::open).transpose().context("--programs")?;
    let settings = settings(args, config, &benches, how, tools)?;
    let total: usize = benches.iter().map(|b| b.questions(args.n)).sum();
    let order: Vec<&'static str> = benches.iter().map(Opened::name).collect();
    let mut gallery = Gallery::default();
    let mut done: HashSet<(String, usize)> = HashSet::new();
    let (mut open, mut doubled) = (false, false);
    let mut folder = match args.planner_only {
        true => Folder::open(out, &settings, PROGRAMS, |w: Written| {
            // Of several replies to a question the last one says that it is done.
            if w.sample + 1 == config.inference.samples {
                done.insert((w.bench, w.index));
            }
            Ok(())
        })?,
        false => Folder::open(out, &settings, SAMPLES, |r: Record| {
            open |= r.is_open();
            if r.failure.as_deref() != Some(NO_REPLY) {
                if done.insert((r.bench.clone(), r.index)) {
                    gallery.takes(&r);
                } else {
                    doubled = true;
                }
            }
            Ok(())
        })?,
    };
    if doubled {
        // Two runs at once, which earlier versions allowed, each wrote them: the first counts.
        let mut known = HashSet::new();
        let first =
            |r: &Record| r.failure.as_deref() == Some(NO_REPLY) || known.insert((r.bench.clone(), r.index));
        folder.revise(|all: Vec<Record>| Ok(all.into_iter().filter(first).collect()))?;
    }
    if !done.is_empty() {
        notice!("valor: {} questions are done in {} already", done.len(), out.display());
    }
    // With one question after another no prefix is kept, which is for those that share one.
    let chats = ChatModels::new(config, device);
    let chats = if args.one_by_one { chats.without_prefixes() } else { chats };
    // Before what takes long to load: it may want a key.
    let judge = match benches.iter().any(Opened::is_judged) && !args.planner_only {
        true => chats.judge()?.map(|m| SynonymJudge::new(m, &config.eval.judge)).transpose()?,
        false => None,
    };
    let planner = match how {
        How::Planner => Some(Planner::new(chats.planner()?, config)?),
        _ => None,
    };
    let perception = match tools {
        ToolChoice::Real if !direct && !args.planner_only => Some(Perception::load(config, device, &chats)?),
        _ => None,
    };
    let vlm = if direct { Some(Vlm::new(chats.vlm()?, &config.vlm)?) } else { None };
    let referee = if how == How::Planner { Referee::load(config, &chats)? } else { None };
    let links = Links::new(match &args.data {
        Some(data) => data.join("fetched"),
        None => hub.cache_folder().join("valor-pictures"),
    });
    let method = match (how, &planner, &vlm, programs) {
        (How::Planner, Some(planner), ..) => Method::Planner(planner),
        (How::Direct, _, Some(vlm), _) => Method::Direct(vlm),
        (How::Programs, .., Some(programs)) => Method::Programs(programs),
        _ => Method::Stored,
    };
    let many = !args.one_by_one;
    let workers = at_once(config, &config.vlm.model).max(std::thread::available_parallelism()?.get().min(4));
    let runner = Runner {
        method,
        perception: perception.as_ref(),
        judge: judge.as_ref(),
        referee: referee.as_ref(),
        links: &links,
        seed: args.seed(),
        how: config.inference,
        limits: limits(&config.sandbox),
        executor,
        workers: if many { workers } else { 1 },
        overlap: many,
        // Several questions are about one picture, which one worker has.
        together: if many {
            (2 * at_once(config, &config.planner.model)).max(6 * workers).max(32)
        } else {
            1
        },
    };
    // What a run that was finished wrote holds no longer, and a shard that is broken off now is not finished.
    for stale in [RESULTS, REPORT].map(|name| out.join(name)) {
        match std::fs::remove_file(&stale) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).with_context(|| stale.display().to_string());
            }
            _ => {}
        }
    }
    let reopened = if open { runner.reopen(&mut folder) } else { Ok(()) };
    let already = done.len();
    let bar = ProgressBar::new(total as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} eta {eta}")?);
    bar.set_position(already as u64);
    let feed = Feed::new(benches, args.n, args.shard, done);
    let started = std::time::Instant::now();
    let (mut asked, mut unplanned) = (0usize, 0);
    let mut pulse = Pulse::default();
    let mut tick = || {
        asked += 1;
        bar.inc(1);
        pulse.beat(&bar);
    };
    let result = reopened.and_then(|()| match args.planner_only {
        true => runner.plan_only(feed, &mut folder, &mut tick).map(|(notes, unanswered)| {
            unplanned = unanswered;
            (notes, Times::new())
        }),
        false => runner.run(feed, &mut folder, &mut gallery, &mut tick),
    });
    bar.finish_and_clear();
    let (notes, times) = match result {
        Ok(done) => done,
        Err(Stopped::Model(e)) => {
            folder.keep();
            notice!(
                "valor: a model failed: {}; the same command goes on behind what is in {}",
                shown(&e.to_string()),
                out.display()
            );
            return Ok(ExitCode::FAILURE);
        }
        Err(Stopped::Other(e)) => return Err(e),
    };
    folder.keep();
    tell(asked, started.elapsed().as_secs_f64(), &times);
    let notes: Vec<(String, Note)> = order.iter().map(|b| (b.to_string(), notes[b].clone())).collect();
    if args.planner_only {
        for (bench, why) in notes.iter().filter_map(|(b, n)| Some((b, n.refused.as_ref()?))) {
            notice!("valor: {bench} is refused: {}", shown(why));
        }
        notice!("valor: the programs are in {}", out.join(PROGRAMS).display());
        return Ok(again(unplanned, 0, SAME_COMMAND).unwrap_or(code(&notes)));
    }
    folder.in_order(|r: &Record| (order.iter().position(|b| *b == r.bench), r.index))?;
    report(out, &settings, &notes, args.json)
}

/// Calls that a model takes at once.
fn at_once(config: &Config, model: &str) -> usize {
    let endpoint = model.strip_prefix(ENDPOINT).and_then(|name| config.endpoints.get(name));
    endpoint.map_or(1, |e| e.concurrency)
}

/// Where the time went, for someone who waits.
fn tell(asked: usize, seconds: f64, times: &Times) {
    if asked == 0 {
        return;
    }
    let parts: Vec<String> =
        times.iter().filter(|(_, s)| **s >= 0.05).map(|(on, s)| format!("{on} {s:.1} s")).collect();
    let semicolon = if parts.is_empty() { "" } else { "; " };
    notice!(
        "valor: {asked} questions in {seconds:.1} s, {:.0} a minute{semicolon}{}",
        60. * asked as f64 / seconds.max(1e-9),
        parts.join(", ")
    );
}

/// Writes what a finished run holds, and prints it.
fn report(out: &Path, settings: &Value, notes: &[(String, Note)], as_json: bool) -> Result<ExitCode> {
    let (text, all) = written(out, settings, notes, as_json)?;
    super::stdout().write_all(text.as_bytes())?;
    Ok(still_open(&all, SAME_COMMAND).unwrap_or(code(notes)))
}

const SAME_COMMAND: &str = "the same command asks again";

/// What is still open of what was summarised, told.
fn still_open(all: &[Summary], remedy: &str) -> Option<ExitCode> {
    again(all.iter().map(|s| s.unanswered).sum(), all.iter().map(|s| s.unheard).sum(), remedy)
}

/// What is still open of a run, told: a server's silence is no answer, and work that failed.
fn again(unanswered: usize, unjudged: usize, remedy: &str) -> Option<ExitCode> {
    if unanswered + unjudged == 0 {
        return None;
    }
    notice!(
        "valor: {unanswered} questions had no result and {unjudged} answers no verdict, for a server's or a network's fault; {remedy}"
    );
    Some(ExitCode::FAILURE)
}

/// Writes the results, and gives what is to be printed of them.
fn written(
    out: &Path,
    settings: &Value,
    notes: &[(String, Note)],
    as_json: bool,
) -> Result<(String, Vec<Summary>)> {
    let all = summarise(out, notes)?;
    let published: BTreeMap<&str, BTreeMap<&str, f64>> = PUBLISHED
        .iter()
        .map(|(model, figures)| (*model, Bench::ALL.iter().map(|b| b.name()).zip(*figures).collect()))
        .collect();
    let results = json!({ "settings": settings, "benches": all, "published": published });
    write_atomic(&out.join(RESULTS), |w| writeln!(w, "{results:#}"))?;
    let page = crate::report::benches::page(out, settings, &all)?;
    write_atomic(&out.join(REPORT), |w| w.write_all(page.as_bytes()))?;
    Ok((if as_json { format!("{results:#}\n") } else { table(&all) }, all))
}

const RESULTS: &str = "results.json";
const REPORT: &str = "report.html";

/// A bench that was refused is work that failed.
fn code(notes: &[(String, Note)]) -> ExitCode {
    if notes.iter().any(|(_, n)| n.refused.is_some()) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
