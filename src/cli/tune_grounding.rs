//! `valor tune-grounding`: from unlabelled pictures and questions to a better detector.

use super::{ModelArgs, fillable, servers, to_be_fetched};
use crate::config::{Config, ENDPOINT, Granularity};
use crate::data::odvg::Boxes;
use crate::data::queries::{self, Asked};
use crate::files::{Held, sweep, write_atomic};
use crate::llm::ChatModels;
use crate::pipeline::{Models, sandbox};
use crate::planner;
use crate::report::mining;
use crate::report::pulse::Pulse;
use crate::rooms::Look;
use crate::text::{shown, without_bom};
use crate::tools::real::vqa_prompts;
use crate::train::Broken;
use crate::train::checkpoint::Checkpoints;
use crate::train::run::check_folder;
use crate::train::tuning::fit::{Fit, check_freeze, checked, per_epoch, schedule};
use crate::train::tuning::mine::{self, Miner, Outcome, PICTURES};
use crate::train::tuning::record::{self, Mined};
use crate::train::tuning::rooms;
use crate::verify::boxes::{BoxJudge, check_prompts};
use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Stage {
    /// Find boxes and have them verified
    Mine,
    /// Train on what was mined
    Train,
    All,
}

/// Mine boxes with a verifier and tune the detector on them (settings: [grounding])
#[derive(Debug, clap::Args)]
pub struct TuneGroundingArgs {
    #[arg(long, value_enum, default_value = "all")]
    stage: Stage,
    /// Folder of the run: mined boxes, metrics and their curves (report.html), checkpoints, and in the end
    /// the model. Mining goes on where it stopped
    #[arg(long, value_name = "DIR", default_value = "runs/grounding")]
    out: PathBuf,
    /// Go on with the training in the folder, from its newest whole checkpoint
    #[arg(long)]
    resume: bool,
    /// A person's word on mined boxes: JSON lines {"image", "index", "keep"}, numbers as in mined/report.html
    #[arg(long, value_name = "FILE")]
    overrule: Option<PathBuf>,
    /// Train on nothing if anything is wrong with the boxes, in place of leaving that out
    #[arg(long)]
    strict: bool,
    /// Say what the run would do; do nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    models: ModelArgs,
}

pub fn run(args: &TuneGroundingArgs) -> Result<ExitCode> {
    let (config, device) = (args.models.config()?, args.models.device()?);
    if args.dry_run {
        // What the run would refuse before its work is refused here too.
        let (trained, _) = (check_run(args)?, replay(args, &config)?);
        let mut keys = Vec::new();
        let of = if trained || args.stage == Stage::Train {
            (mined(args)?.records.len(), "none, as they are mined already".to_owned())
        } else {
            let (truth, records) = (truth(&config)?, records(args, &config)?);
            keys = check_servers(&config, true)?;
            match config.grounding.queries.as_str() {
                // They would have to be rendered.
                "rooms" => (config.grounding.pictures, "as many as Rooms gives".to_owned()),
                _ => {
                    let all = pictures(args, &config, truth.as_ref(), &records)?;
                    (all.len(), all.iter().map(|a| a.questions.len()).sum::<usize>().to_string())
                }
            }
        };
        plan(args, &config, of);
        let checkpoints = Checkpoints::of(&args.out.join("checkpoints"));
        if args.resume && args.stage != Stage::Mine && checkpoints.any() {
            let step = checkpoints.newest(|_| ())?.map_or(0, |saved| saved.step);
            println!("goes on          at step {step}");
        }
        keys.iter().for_each(|key| println!("{key}"));
        return Ok(ExitCode::SUCCESS);
    }
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // The second one does not wait for the work under way to end.
        signal_hook::flag::register_conditional_shutdown(signal, 1, stop.clone())?;
        signal_hook::flag::register(signal, stop.clone())?;
    }
    let done = || -> Result<ExitCode> {
        let trained = check_run(args)?;
        let _held = Held::folder("--out", &args.out)?;
        let replay = replay(args, &config)?;
        if trained {
            notice!("valor: {} is in training: nothing more is mined for it", args.out.display());
        } else if args.stage != Stage::Train {
            let (truth, records) = (truth(&config)?, records(args, &config)?);
            check_servers(&config, false)?;
            render(args, &config)?;
            let pictures = pictures(args, &config, truth.as_ref(), &records)?;
            if mine_all(args, &config, &device, &pictures, truth, &stop)?.stopped {
                notice!("valor: stopped; what is mined is kept, the same command goes on");
                return Ok(ExitCode::FAILURE);
            }
        }
        if args.stage != Stage::Mine {
            let boxes = mined(args)?;
            let fit = Fit {
                replay,
                config: &config,
                device: device.clone(),
                boxes,
                dir: args.out.clone(),
                resume: args.resume,
                stop: stop.clone(),
            };
            super::compute_in(config.grounding.training.precision, &device);
            let (metrics, model) = fit.run()?;
            notice!("valor: {}", serde_json::Value::Object(metrics));
            println!("{}", model.display());
        }
        Ok(ExitCode::SUCCESS)
    };
    match done() {
        Err(e) if e.is::<Broken>() => {
            notice!("valor: {}", shown(&e.to_string()));
            Ok(ExitCode::FAILURE)
        }
        ended => ended,
    }
}

/// That the folder is this command's to go on in, and whether its training has begun: what that began with
/// must not change under it.
fn check_run(args: &TuneGroundingArgs) -> Result<bool> {
    let out = args.out.display();
    ensure!(
        args.overrule.is_none() || args.stage != Stage::Train,
        "--overrule changes what was mined: give it with --stage mine or all"
    );
    let made = |name: &str| name == "mined" || name.starts_with(ROOMS);
    let mut entries = std::fs::read_dir(&args.out).into_iter().flatten().flatten();
    let begun = entries.any(|e| made(&e.file_name().to_string_lossy()));
    check_folder(&args.out, || begun)?;
    ensure!(begun || !args.resume, "no run in {out}; check --out, or leave out --resume");
    fillable("--out", Some(&args.out))?;
    let checkpoints = args.out.join("checkpoints");
    ensure!(
        args.resume || args.stage == Stage::Mine || !Checkpoints::of(&checkpoints).any(),
        "--out {out} holds a training: give --resume to go on with it, or another --out"
    );
    let trained = args.resume && args.stage == Stage::All && checkpoints.is_dir();
    ensure!(
        !trained || args.overrule.is_none(),
        "--overrule: the training in {out} has begun on its boxes as they are: leave --overrule out, or give \
         another --out"
    );
    Ok(trained)
}

/// What a training takes beside the boxes, looked through before any are mined.
fn replay(args: &TuneGroundingArgs, config: &Config) -> Result<Option<Boxes>> {
    if args.stage == Stage::Mine {
        return Ok(None);
    }
    if !(args.dry_run && to_be_fetched(&config.detector.model, "detector")) {
        check_freeze(config)?;
    }
    match config.grounding.training.replay.as_str() {
        "" | "rooms" => Ok(None),
        file => checked(Path::new(file), args.strict).context("grounding.training.replay").map(Some),
    }
}

/// The file of pictures and questions.
fn source(config: &Config, out: &Path) -> PathBuf {
    match config.grounding.queries.as_str() {
        "rooms" => rooms_folder(config, out).join("queries.jsonl"),
        file => PathBuf::from(file),
    }
}

/// Of rooms that follow from these settings and no others.
fn rooms_folder(config: &Config, out: &Path) -> PathBuf {
    out.join(format!("{ROOMS}{}-{}", config.grounding.seed, config.grounding.pictures))
}

/// How their folders' names begin.
const ROOMS: &str = "rooms-";

/// What is mined already. Read before rooms are rendered, as all files that may be broken are.
fn records(args: &TuneGroundingArgs, config: &Config) -> Result<Vec<Mined>> {
    planner::prompt(config)?;
    vqa_prompts(&config.vlm)?;
    check_prompts(&config.grounding.mining)?;
    let records = record::read(&args.out.join("mined").join(PICTURES))?.0;
    if let Some(file) = &args.overrule {
        record::overrules(file)?;
    }
    Ok(records)
}

/// That the servers which mining asks can be asked, with a line about each key.
fn check_servers(config: &Config, dry_run: bool) -> Result<Vec<String>> {
    let models = [&*config.planner.model, &config.vlm.model, &config.grounding.mining.model];
    servers(config, &models, dry_run)
}

/// Renders the rooms that are to be mined, if they are.
fn render(args: &TuneGroundingArgs, config: &Config) -> Result<()> {
    let g = &config.grounding;
    if g.queries == "rooms" {
        notice!("valor: rendering {} rooms", g.pictures);
        rooms::write(&rooms_folder(config, &args.out), Look::LivedIn, g.seed, g.pictures)?;
    }
    Ok(())
}

/// What is to be mined, once the files that speak of it are known to.
fn pictures(
    args: &TuneGroundingArgs,
    config: &Config,
    truth: Option<&Boxes>,
    records: &[Mined],
) -> Result<Vec<Asked>> {
    let pictures = queries::by_picture(&source(config, &args.out)).context("grounding.queries")?;
    if let Some(file) = &args.overrule {
        record::check_overrules(file, records, &pictures)?;
    }
    if let Some(truth) = truth {
        let known: HashSet<&str> = truth.records.iter().map(|r| r.filename.as_str()).collect();
        ensure!(
            pictures.iter().any(|p| known.contains(p.image.as_str())),
            "grounding.truth: {} has none of the pictures of grounding.queries; give them the same names",
            config.grounding.truth
        );
    }
    Ok(pictures)
}

/// Where the configuration names a file of true boxes.
fn truth(config: &Config) -> Result<Option<Boxes>> {
    match config.grounding.truth.as_str() {
        "" => Ok(None),
        file => Boxes::open(Path::new(file)).context("grounding.truth").map(Some),
    }
}

fn mine_all(
    args: &TuneGroundingArgs,
    config: &Config,
    device: &candle_core::Device,
    pictures: &[Asked],
    truth: Option<Boxes>,
    stop: &AtomicBool,
) -> Result<Outcome> {
    let chats = ChatModels::new(config, device);
    let models = Models::load(config, device, &chats)?;
    let verifier = chats.box_verifier()?;
    let judge = BoxJudge::new(verifier, &config.grounding.mining)?;
    let names: Vec<String> = models.names().iter().map(|(part, name)| format!("{part} {name}")).collect();
    notice!("valor: {}, verifier of boxes {}", names.join(", "), judge.name());
    let questions: usize = pictures.iter().map(|p| p.questions.len()).sum();
    let bar = ProgressBar::new(pictures.len() as u64);
    let mut pulse = Pulse::default();
    bar.set_style(ProgressStyle::with_template("mining {bar:30} {pos}/{len} pictures {elapsed} eta {eta}")?);
    let dir = args.out.join("mined");
    sweep(&dir);
    let mut miner = Miner {
        config,
        planner: &models.planner,
        perception: &models.perception,
        judge: &judge,
        sandbox: sandbox(&config.sandbox)?,
        dir: &dir,
        stop,
    };
    let mut outcome = miner.run(pictures, |n| {
        bar.set_position(n as u64);
        pulse.beat(&bar);
    })?;
    bar.finish_and_clear();
    for (name, usage) in chats.usage() {
        notice!("valor: endpoint {name}: {}", serde_json::to_string(&usage)?);
    }
    if outcome.stopped {
        return Ok(outcome);
    }
    let word = dir.join("overrules.jsonl");
    if let Some(file) = &args.overrule {
        record::overrule(&mut outcome.records, file)?;
        // From now on it counts, whoever starts the command.
        let more = std::fs::read_to_string(file)?;
        let all = std::fs::read_to_string(&word).unwrap_or_default() + without_bom(&more).trim_end() + "\n";
        write_atomic(&word, |w| w.write_all(all.as_bytes()))?;
    }
    if word.exists() {
        let n = record::overrule(&mut outcome.records, &word)?;
        notice!("valor: {n} boxes overruled by {}", word.display());
    }
    let truth = match config.grounding.queries.as_str() {
        "rooms" if truth.is_none() => Some(
            Boxes::open(&rooms_folder(config, &args.out).join("odvg.jsonl")).context("the rooms' boxes")?,
        ),
        _ => truth,
    };
    let precision = truth.and_then(|t| record::precision(&outcome.records, &t));
    let lines: Vec<serde_json::Value> =
        outcome.records.iter().map(serde_json::to_value).collect::<Result<_, _>>()?;
    let table = precision.as_ref().map(record::Precision::table);
    let source = source(config, &args.out);
    let page = mining::page(&lines, table.as_deref(), source.parent().unwrap_or(Path::new("")))?;
    write_atomic(&dir.join("report.html"), |w| w.write_all(page.as_bytes()))?;
    let written = mine::export(&dir, &outcome.records, source.parent().unwrap_or(Path::new("")))?;
    let of = |keep: &dyn Fn(&record::Found) -> bool| -> usize {
        outcome.records.iter().flat_map(|r| &r.found).filter(|f| keep(f)).count()
    };
    notice!(
        "valor: {} pictures, {questions} questions; {} boxes found, {} kept; {written} records in {}",
        outcome.records.len(),
        of(&|_| true),
        of(&|f| f.dropped.is_none()),
        dir.join("odvg.jsonl").display()
    );
    if let (n @ 1.., Some(why)) = &outcome.unverified {
        let why = shown(why);
        notice!("valor: {n} pictures could not be mined ({why}); the same command tries them again");
    }
    if let Some(p) = precision {
        write_atomic(&dir.join("precision.json"), |w| writeln!(w, "{}", serde_json::to_string_pretty(&p)?))?;
        notice!("{}", p.table().trim_end());
    }
    Ok(outcome)
}

/// What was mined, checked, with its pictures.
fn mined(args: &TuneGroundingArgs) -> Result<Boxes> {
    let path = args.out.join("mined/odvg.jsonl");
    ensure!(path.exists(), "{} is missing: mine first (--stage mine)", path.display());
    checked(&path, args.strict)
}

/// What a run would do with so many pictures and, in words, questions.
fn plan(args: &TuneGroundingArgs, config: &Config, (pictures, questions): (usize, String)) {
    let (g, m, t) = (&config.grounding, &config.grounding.mining, &config.grounding.training);
    let verifier = if m.model.is_empty() { &config.vlm.model } else { &m.model };
    println!("pictures         {pictures} of {}, questions: {questions}", g.queries);
    println!("planner          {}", config.planner.model);
    println!(
        "detector         {}, boxes from {} / {}",
        config.detector.model, m.box_threshold, m.text_threshold
    );
    println!("verifier         {verifier}, {}", granularity(m.granularity));
    let per_epoch = per_epoch(t, pictures);
    let (steps, s) = schedule(t, per_epoch);
    println!("steps            at most {steps} of {} pictures ({} epochs of {per_epoch})", t.batch, t.epochs);
    println!(
        "rate             {:e}, from {:e} over {} steps, cosine to {:e}",
        s.base, s.warmup_from, s.warmup, t.lr_floor
    );
    println!("sizes            shortest side {:?}, longest {}", t.sizes, config.detector.longest_side);
    println!("frozen           {}", if t.freeze.is_empty() { "nothing".into() } else { t.freeze.join(" ") });
    println!(
        "against forgetting  replay {} ({}), average {}, alpha {}",
        if t.replay.is_empty() { "none" } else { &t.replay },
        t.replay_share,
        t.ema,
        t.alpha
    );
    if let Some(e) = verifier.strip_prefix(ENDPOINT).map(|name| &config.endpoints[name]) {
        let denials = m.negatives;
        println!(
            "verifier calls   {}, {denials} or more for nouns that are not there",
            match m.granularity {
                Granularity::Box => "2 a box at most, one a pair of boxes that overlap",
                Granularity::Pass => "2 a picture, one a box that is left after the first",
                Granularity::None => "none for boxes",
            }
        );
        if e.usd_per_million_prompt_tokens + e.usd_per_million_new_tokens == 0. {
            println!("money            not known: the endpoint has no usd_per_million_… set");
        }
    }
    println!("folder           {}", args.out.display());
}

fn granularity(of: Granularity) -> &'static str {
    match of {
        Granularity::Box => "one question a box",
        Granularity::Pass => "one question a picture",
        Granularity::None => "asked nothing: boxes are taken as they are",
    }
}
