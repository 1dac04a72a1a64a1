//! `valor eval` on published benches, and `eval pull`, `merge` and `compare`.
//!
//! A run's folder holds `settings.json` (what was asked for), `samples.jsonl` (a line a question, as they
//! are done), and in the end `results.json` and `report.html`. The same command goes on where a run was
//! broken off; with other settings it is refused.

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
use crate::eval::benches::folder::{Folder, PICTURES, SETTINGS, picture_path, read_json};
use crate::eval::benches::metric::Form;
use crate::eval::benches::record::{NO_REPLY, Record, SAMPLES};
use crate::eval::benches::run::{Method, PROGRAMS, Programs, Runner, Stopped, Times, Written};
use crate::eval::benches::summary::{PUBLISHED, Summary, summarise, table};
use crate::files::{sha256_hex, write_atomic};
use crate::llm::ChatModels;
use crate::pipeline::{Referee, executor, identity, limits};
use crate::planner::{Planner, prompt};
use crate::program::{Executor, Sandbox};
use crate::tools::real::{Perception, Vlm, vqa_prompts};
use crate::verify::{Head, SynonymJudge, prompt as head_prompt};
use crate::weights::hub::Hub;

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
            let mut stdout = std::io::stdout().lock();
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
        eprintln!("valor: {bench} is in {}", folder.display());
    }
    bar.finish_and_clear();
    Ok(ExitCode::SUCCESS)
}

/// The benches that are named, opened as far as they can be.
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
        Named::Rooms(RoomsBench::Rooms) => Ok(Opened::Rooms { look: args.look, seed: args.seed }),
        Named::Published(bench, revision) => {
            let source = match &args.data {
                Some(data) => Source::local(data, *bench),
                None => Source::cached(hub, *bench, revision.as_deref()),
            };
            Ok(match source.and_then(Items::open) {
                Ok(items) => Opened::Items(Box::new(items)),
                Err(e) => Opened::Refused(*bench, e.to_string()),
            })
        }
        Named::Rooms(part) => bail!("{} is measured by itself: name no other bench with it", part.name()),
        Named::All => unreachable!("spelt out above"),
    };
    let benches: Vec<Opened> = named.iter().map(open).collect::<Result<_>>()?;
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
    for (name, given) in [
        ("--shuffle-pictures", args.shuffle_pictures),
        ("--families", !args.families.is_empty()),
        ("--pictures", args.pictures.is_some()),
    ] {
        ensure!(!given, "{name} is for the bench rooms alone, with --out FILE or none");
    }
    let Some(out) = &args.out else { bail!("--out DIR is needed: the run's folder") };
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
    ensure!(!direct || args.planner.is_none(), "--planner says nothing to --method direct");
    // Each worker starts a sandbox of its own; whether one can be had is better told before all else.
    let runs_programs = !direct && !args.planner_only;
    let executor = if runs_programs { executor(&config.sandbox)? } else { Executor::default() };
    if runs_programs {
        Sandbox::open(limits(&config.sandbox), executor.clone(), None).context("cannot start the sandbox")?;
    }
    let programs = args.programs.as_deref().map(Programs::open).transpose().context("--programs")?;
    let settings = settings(args, config, &benches, how, tools)?;
    let total: usize = benches.iter().map(|b| b.questions(args.n)).sum();
    let order: Vec<&'static str> = benches.iter().map(Opened::name).collect();
    let mut gallery = Gallery::default();
    let mut done: HashSet<(String, usize)> = HashSet::new();
    let mut open = false;
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
                gallery.takes(&r);
                done.insert((r.bench, r.index));
            }
            Ok(())
        })?,
    };
    if !done.is_empty() {
        eprintln!("valor: {} questions are done in {} already", done.len(), out.display());
    }
    // With one question after another no prefix is kept, which is for those that share one.
    let chats = ChatModels::new(config, device);
    let chats = if args.one_by_one { chats.without_prefixes() } else { chats };
    let planner = match how {
        How::Planner => Some(Planner::new(chats.planner()?, config)?),
        _ => None,
    };
    let perception = match tools {
        ToolChoice::Real if !direct && !args.planner_only => Some(Perception::load(config, device, &chats)?),
        _ => None,
    };
    let vlm = if direct { Some(Vlm::new(chats.vlm()?, &config.vlm)?) } else { None };
    let judge = chats.judge()?.map(|m| SynonymJudge::new(m, &config.eval.judge)).transpose()?;
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
        seed: args.seed,
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
    if open {
        runner.reopen(&mut folder)?;
    }
    let already = done.len();
    let bar = ProgressBar::new(total as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} eta {eta}")?);
    bar.set_position(already as u64);
    let feed = Feed::new(benches, args.n, args.shard, done);
    let started = std::time::Instant::now();
    let (mut asked, mut unplanned) = (0usize, 0);
    let mut tick = || {
        asked += 1;
        bar.inc(1);
    };
    let result = match args.planner_only {
        true => runner.plan_only(feed, &mut folder, &mut tick).map(|(notes, unanswered)| {
            unplanned = unanswered;
            (notes, Times::new())
        }),
        false => runner.run(feed, &mut folder, &mut gallery, &mut tick),
    };
    bar.finish_and_clear();
    let (notes, times) = match result {
        Ok(done) => done,
        Err(Stopped::Model(e)) => {
            folder.keep();
            eprintln!(
                "valor: a model failed: {e}; the same command goes on behind what is in {}",
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
            eprintln!("valor: {bench} is refused: {why}");
        }
        eprintln!("valor: the programs are in {}", out.join(PROGRAMS).display());
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
    eprintln!(
        "valor: {asked} questions in {seconds:.1} s, {:.0} a minute{semicolon}{}",
        60. * asked as f64 / seconds.max(1e-9),
        parts.join(", ")
    );
}

/// Writes what a finished run holds, and prints it.
fn report(out: &Path, settings: &Value, notes: &[(String, Note)], as_json: bool) -> Result<ExitCode> {
    let (text, all) = written(out, settings, notes, as_json)?;
    std::io::stdout().lock().write_all(text.as_bytes())?;
    Ok(still_open(&all, SAME_COMMAND).unwrap_or(code(notes)))
}

const SAME_COMMAND: &str = "the same command asks again";

/// What is still open of what was summarised, told.
fn still_open(all: &[Summary], remedy: &str) -> Option<ExitCode> {
    let unjudged = all.iter().filter_map(|s| s.table.first()).map(|r| r.unjudged).sum();
    again(all.iter().map(|s| s.unanswered).sum(), unjudged, remedy)
}

/// What is still open of a run, told: a server's silence is no answer, and work that failed.
fn again(unanswered: usize, unjudged: usize, remedy: &str) -> Option<ExitCode> {
    if unanswered + unjudged == 0 {
        return None;
    }
    eprintln!(
        "valor: {unanswered} questions had no reply and {unjudged} answers no verdict from their servers; {remedy}"
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

/// Everything that a run's records hang on.
fn settings(
    args: &EvalArgs,
    config: &Config,
    benches: &[Opened],
    how: How,
    tools: ToolChoice,
) -> Result<Value> {
    let short = |bytes: &[u8]| sha256_hex(bytes, 8);
    let mut models = serde_json::Map::new();
    let mut shown = serde_json::Map::new();
    let mut add = |part: &'static str, model: &str, section: Value| -> Result<()> {
        models.insert(part.into(), json!(identity(config, model, part)?));
        shown.insert(part.into(), section);
        Ok(())
    };
    if how == How::Planner {
        add("planner", &config.planner.model, json!(config.planner))?;
    }
    if tools == ToolChoice::Real && how != How::Direct && !args.planner_only {
        add("detector", &config.detector.model, json!(config.detector))?;
        add("depth", &config.depth.model, json!(config.depth))?;
    }
    if (tools == ToolChoice::Real || how == How::Direct) && !args.planner_only {
        let mut section = json!(config.vlm);
        section["prompt"] = json!(vqa_prompts(&config.vlm)?);
        // Runs of before these settings go on.
        let section_of = section.as_object_mut().expect("a table");
        if config.vlm.prompt == "plain" {
            section_of.remove("prompt");
        }
        if config.vlm.max_pixels == 0 {
            section_of.remove("max_pixels");
        }
        add("vlm", &config.vlm.model, section)?;
    }
    if !config.eval.judge.model.is_empty() {
        let judge = &config.eval.judge;
        add("judge", &judge.model, json!({ "max_new_tokens": judge.max_new_tokens }))?;
    }
    if Referee::is_wanted(config) && how == How::Planner {
        let verifier = &config.verifier;
        let prompts = Head::ALL.map(|head| head_prompt(&verifier.prompts, head));
        let prompts = prompts.into_iter().collect::<std::result::Result<Vec<_>, _>>()?.concat();
        let section = json!({
            "prompts_sha256": short(prompts.as_bytes()), "max_new_tokens": verifier.max_new_tokens,
            "reward": config.reward,
        });
        add("verifier", &verifier.model, section)?;
    }
    shown.insert("sandbox".into(), json!(config.sandbox));
    let mut inference = json!(config.inference);
    inference.as_object_mut().expect("a table").remove("kv_cache_mb");
    shown.insert("inference".into(), inference);
    let sources: serde_json::Map<String, Value> = benches
        .iter()
        .map(|b| {
            let source = match b {
                Opened::Items(items) => json!(items.source().fingerprint),
                Opened::Rooms { look, .. } => json!(format!("{} {look:?}", crate::rooms::VERSION)),
                Opened::Refused(..) => Value::Null,
            };
            (b.name().to_owned(), source)
        })
        .collect();
    let programs = match &args.programs {
        None => Value::Null,
        Some(path) => {
            let file = if path.is_dir() { path.join(PROGRAMS) } else { path.clone() };
            let bytes = std::fs::read(&file).with_context(|| format!("--programs {}", file.display()))?;
            json!(short(&bytes))
        }
    };
    let how_named = match how {
        How::Stored => "stored programs",
        How::Planner if args.planner_only => "planner only",
        How::Planner => "planner's programs",
        How::Programs => "given programs",
        How::Direct => "vlm alone",
    };
    Ok(json!({
        "valor": env!("CARGO_PKG_VERSION"),
        "benches": benches.iter().map(Opened::name).collect::<Vec<_>>(),
        "sources": sources,
        "method": how_named,
        "tools": if tools == ToolChoice::Real { "real" } else { "oracle" },
        "n": args.n,
        "seed": args.seed,
        "shard": args.shard.map(|s| format!("{}/{}", s.number, s.of)),
        "models": models,
        "prompt": if how == How::Planner { json!(short(prompt(config)?.as_bytes())) } else { Value::Null },
        "programs": programs,
        "config": shown,
    }))
}

/// A shard's lines in their order.
struct ShardLines {
    reader: std::iter::Enumerate<std::io::Lines<std::io::BufReader<std::fs::File>>>,
    dir: PathBuf,
    next: Option<(usize, usize, String, Record)>,
}

impl ShardLines {
    fn advance(&mut self, order: &[String]) -> Result<()> {
        let Some((above, line)) = self.reader.next() else {
            self.next = None;
            return Ok(());
        };
        let (line, file) = (line?, self.dir.join(SAMPLES));
        let record: Record = serde_json::from_str(&line)
            .with_context(|| format!("{}, line {}: is no sample of a run", file.display(), above + 1))?;
        let bench = order.iter().position(|b| *b == record.bench);
        let bench =
            bench.with_context(|| format!("{}: {} is no bench of this run", file.display(), record.bench))?;
        self.next = Some((bench, record.index, line, record));
        Ok(())
    }
}

fn merge(dirs: &[PathBuf], out: &Path, as_json: bool) -> Result<ExitCode> {
    use std::io::BufRead;
    ensure!(
        !out.exists() || std::fs::read_dir(out).is_ok_and(|mut d| d.next().is_none()),
        "--out {} is there already; name a new folder",
        out.display()
    );
    fillable("--out", Some(out))?;
    let mut settings: Option<Value> = None;
    let mut shards: BTreeMap<u64, &PathBuf> = BTreeMap::new();
    let mut notes: Vec<(String, Note)> = Vec::new();
    let mut count = 0;
    for dir in dirs {
        let mut mine = read_json(&dir.join(SETTINGS))?;
        let name = mine["shard"].take();
        let Some(part) = name.as_str().and_then(|s| shard(s).ok()) else {
            bail!("{} is no shard: it was run without --shard", dir.display())
        };
        count = part.of;
        match &settings {
            None => settings = Some(mine),
            Some(first) => ensure!(
                *first == mine,
                "{} and {} are of runs with other settings; merge the shards of one run",
                dirs[0].display(),
                dir.display()
            ),
        }
        if let Some(other) = shards.insert(part.number, dir) {
            bail!("{} and {} are both shard {}", other.display(), dir.display(), name)
        }
        let results = dir.join(RESULTS);
        ensure!(
            results.is_file(),
            "{} is not finished: it has no {RESULTS}; run its command again",
            dir.display()
        );
        for found in read_json(&results)?["benches"].as_array().into_iter().flatten() {
            let bench = found["bench"].as_str().unwrap_or_default().to_owned();
            let note: Note = serde_json::from_value(json!({
                "rows": found["rows"], "origin": found.get("origin").cloned().unwrap_or(json!("")),
                "refused": found["refused"],
            }))
            .with_context(|| results.display().to_string())?;
            match notes.iter_mut().find(|(b, _)| *b == bench) {
                None => notes.push((bench, note)),
                Some((_, known)) => {
                    known.rows = known.rows.max(note.rows);
                    known.refused = known.refused.take().or(note.refused);
                }
            }
        }
    }
    if let Some(missing) = (1..=count).find(|i| !shards.contains_key(i)) {
        bail!("shard {missing}/{count} is missing; give all of them")
    }
    ensure!(shards.len() as u64 == count, "there are shards of several counts; merge the shards of one run");
    let settings = settings.context("there is nothing to merge")?;
    let order: Vec<String> = notes.iter().map(|(b, _)| b.clone()).collect();
    let mut lines = Vec::new();
    for dir in shards.values() {
        let path = dir.join(SAMPLES);
        let file = std::fs::File::open(&path).with_context(|| path.display().to_string())?;
        let reader = std::io::BufReader::new(file).lines().enumerate();
        let mut one = ShardLines { reader, dir: dir.to_path_buf(), next: None };
        one.advance(&order)?;
        lines.push(one);
    }
    let there = out.exists();
    let text = joined(lines, &order, out).and_then(|()| {
        write_atomic(&out.join(SETTINGS), |w| writeln!(w, "{settings:#}"))?;
        written(out, &settings, &notes, as_json)
    });
    if text.is_err() {
        // Half a run is none.
        [SAMPLES, SETTINGS, RESULTS, REPORT]
            .iter()
            .for_each(|file| drop(std::fs::remove_file(out.join(file))));
        let _ = std::fs::remove_dir_all(out.join(PICTURES));
        if !there {
            let _ = std::fs::remove_dir(out);
        }
    }
    let (text, all) = text?;
    std::io::stdout().lock().write_all(text.as_bytes())?;
    let remedy = format!("the run's command without --shard, with --out {}, asks again", out.display());
    Ok(still_open(&all, &remedy).unwrap_or(code(&notes)))
}

/// Writes the shards' samples, in their order, and the pictures that are shown of them.
fn joined(mut lines: Vec<ShardLines>, order: &[String], out: &Path) -> Result<()> {
    let mut gallery = Gallery::default();
    let mut failed = None;
    write_atomic(&out.join(SAMPLES), |w| {
        loop {
            let first = lines.iter_mut().filter(|l| l.next.is_some()).min_by_key(|l| {
                let (bench, index, ..) = l.next.as_ref().expect("kept only where there is one");
                (*bench, *index)
            });
            let Some(shard) = first else { return Ok(()) };
            let (_, index, line, record) = shard.next.take().expect("kept only where there is one");
            writeln!(w, "{line}")?;
            let from = picture_path(&shard.dir, &record.bench, index);
            if gallery.takes(&record) && from.is_file() {
                let to = picture_path(out, &record.bench, index);
                std::fs::create_dir_all(to.parent().expect("below the folder"))?;
                std::fs::copy(from, to)?;
            }
            if let Err(e) = shard.advance(order) {
                failed = Some(e);
                return Err(std::io::Error::other("a shard cannot be read"));
            }
        }
    })
    .map_err(|e| failed.take().unwrap_or_else(|| e.into()))
}
