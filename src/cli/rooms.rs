//! `valor rooms`: the synthetic world as files.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;

use clap::ValueEnum;

use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;
use serde_json::{Value, json};

use super::fillable;
use crate::files::{Held, write_atomic};
use crate::nn::Precision;
use crate::report::pulse::Pulse;
use crate::rooms::export::{Coco, depth_png, label_map, odvg_json, picture_png, scene_json};
use crate::rooms::questions::{Questions, Split, scene_seed};
use crate::rooms::{self, Look, View};

/// The synthetic world that the embedded models know
#[derive(clap::Args, Debug)]
pub struct RoomsArgs {
    #[command(subcommand)]
    command: RoomsCommand,
}

#[derive(clap::Subcommand, Debug)]
enum RoomsCommand {
    /// Write pictures, depth, questions and annotations (ODVG and COCO)
    Render(RenderArgs),
    /// Make the embedded models from nothing (hours on two cores; each run can be resumed)
    Pretrain(PretrainArgs),
}

/// The embedded models, in the order in which they are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Planner,
    /// Starts from the planner's run
    Verifier,
    /// The VLM's vision tower, which is no model of its own
    Vision,
    /// Starts from the vision tower's run
    Vlm,
    /// Judges boxes for mining; starts from the VLM's run
    BoxVerifier,
    Depth,
    Detector,
    /// What rooms look like, for the notice about other pictures; takes a minute
    Familiar,
}

#[derive(clap::Args, Debug)]
struct PretrainArgs {
    /// Make only this model
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// Continue the runs that are there
    #[arg(long)]
    resume: bool,
    /// Checkpoints, metrics and their curves (report.html), a folder per model
    #[arg(long, default_value = "runs/pretrain")]
    runs: PathBuf,
    /// Where finished models go, a folder per model
    #[arg(long, default_value = "data/embedded")]
    out: PathBuf,
    /// Optimiser steps instead of the recipe's, for a trial
    #[arg(long, requires = "only", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// Go on from a model's or a run's folder instead of from nothing; give another seed for new samples
    #[arg(long, value_name = "DIR", requires_all = ["only", "seed"])]
    from: Option<PathBuf>,
    /// Seed instead of the recipe's
    #[arg(long, requires = "only")]
    seed: Option<u64>,
    /// Only these stages of the recipe, counted from 1, such as 2,3; depth has five: small pictures,
    /// halves of large ones, whole ones, maps, maps above all. With --from it leaves out the first by itself
    #[arg(long, requires = "only", value_delimiter = ',', value_name = "N")]
    stages: Vec<usize>,
    /// How exactly matrix products are computed; less than f32 is faster on CPUs with AMX, and changes
    /// nothing on others
    #[arg(long, value_enum, default_value = "f32")]
    precision: Precision,
    /// Only write models from the checkpoints that are there
    #[arg(long)]
    export_only: bool,
}

#[derive(clap::Args, Debug)]
struct RenderArgs {
    /// Scenes and questions follow from it
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Number of pictures
    #[arg(long, short)]
    n: u32,
    #[arg(long, value_enum, default_value = "studio")]
    look: Look,
    /// Scenes of the two splits never coincide; held-out questions are in `test` only
    #[arg(long, value_enum, default_value = "train")]
    split: Split,
    /// Folder for the files; must be empty or absent
    #[arg(long)]
    out: PathBuf,
    /// Width and height in pixels
    #[arg(long, value_name = "WxH", value_parser = size, default_value = "256x192")]
    size: (u32, u32),
}

fn size(text: &str) -> Result<(u32, u32), String> {
    let parse = |t: &str| t.parse().ok().filter(|n| (16..=4096).contains(n));
    text.split_once('x')
        .and_then(|(w, h)| Some((parse(w)?, parse(h)?)))
        .ok_or_else(|| "must be WIDTHxHEIGHT, each from 16 to 4096, as in 256x192".to_owned())
}

pub fn run(args: RoomsArgs) -> Result<ExitCode> {
    match args.command {
        RoomsCommand::Render(args) => render(&args)?,
        RoomsCommand::Pretrain(args) => pretrain(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn name_of(part: Part) -> String {
    part.to_possible_value().expect("no part is hidden").get_name().to_owned()
}

fn pretrain(args: &PretrainArgs) -> Result<()> {
    use crate::train::pretrain::language::{self, planner, verifier, vision, vlm};
    use crate::train::pretrain::{depth, detector, familiar};
    ensure!(
        args.stages.is_empty() || args.only == Some(Part::Depth),
        "--stages is of depth alone, whose training has some: leave it out, or name --only depth"
    );
    ensure!(
        args.only != Some(Part::Familiar)
            || (args.steps.is_none() && args.seed.is_none() && args.from.is_none()),
        "--only familiar is made, not trained: --steps, --seed and --from say nothing to it"
    );
    let asked = |part: &&Part| args.only.is_none_or(|only| only == **part);
    if args.export_only {
        // Before the first is written: what is exported must have been trained.
        let trained = |part: &&Part| !matches!(part, Part::Vision | Part::Familiar);
        for part in Part::value_variants().iter().filter(asked).filter(trained) {
            let run = args.runs.join(name_of(*part));
            ensure!(
                crate::train::run::has_checkpoint(&run),
                "{} holds no checkpoint to export; train it first, without --export-only, or name the \
                 runs' folder with --runs",
                run.display()
            );
        }
    } else {
        // Of several models some may not be begun yet; where none is, another folder was meant.
        let begun = |part: &Part| args.runs.join(name_of(*part)).is_dir();
        ensure!(
            !args.resume
                || args.only == Some(Part::Familiar)
                || Part::value_variants().iter().filter(asked).any(begun),
            "no run in {}; check --runs, or leave out --resume",
            args.only.map_or(args.runs.clone(), |part| args.runs.join(name_of(part))).display()
        );
        // Hours of training stand between these and the files.
        fillable("--runs", Some(&args.runs))?;
    }
    fillable("--out", Some(&args.out))?;
    super::compute_in(args.precision, &candle_core::Device::Cpu);
    for &part in Part::value_variants().iter().filter(asked) {
        let name = name_of(part);
        let (run, out) = (args.runs.join(&name), args.out.join(&name));
        let trains = !args.export_only && part != Part::Familiar;
        let _held = if trains { Some(Held::folder("--runs", &run)?) } else { None };
        if trains {
            let language = |o: language::Options| language::Options {
                resume: args.resume,
                steps: args.steps.unwrap_or(o.steps),
                seed: args.seed.unwrap_or(o.seed),
                from: args.from.clone(),
                ..o
            };
            let figures = match part {
                Part::Planner => planner::train(&language(language::Options::planner(run.clone())))?,
                Part::Verifier => verifier::train(
                    &language(language::Options::verifier(run.clone())),
                    &args.runs.join(name_of(Part::Planner)),
                )?,
                Part::Vision => vision::train(&language(language::Options::vision(run.clone())))?,
                Part::Vlm => vlm::train(
                    &language(language::Options::vlm(run.clone())),
                    &args.runs.join(name_of(Part::Vision)),
                )?,
                Part::BoxVerifier => {
                    let mut o = language(language::Options::box_verifier(run.clone()));
                    let of_vlm = args.runs.join(name_of(Part::Vlm));
                    o.from.get_or_insert(of_vlm);
                    vlm::train(&o, &args.runs.join(name_of(Part::Vision)))?
                }
                Part::Depth => {
                    let o = depth::DepthTraining::default();
                    let (seed, from) = (args.seed.unwrap_or(o.seed), args.from.clone());
                    let mut o = depth::DepthTraining { seed, from, ..o };
                    if !args.stages.is_empty() {
                        o = o.of_stages(&args.stages)?;
                    } else if o.from.is_some() {
                        o = o.after_small_pictures();
                    }
                    if let Some(steps) = args.steps {
                        o = o.in_steps(steps);
                    }
                    depth::run(o, &run, args.resume)?
                }
                Part::Detector => {
                    let o = detector::Options::embedded(run.clone());
                    let (steps, seed) = (args.steps.unwrap_or(o.steps), args.seed.unwrap_or(o.seed));
                    let from = args.from.clone();
                    detector::train(&detector::Options { resume: args.resume, steps, seed, from, ..o })?
                }
                Part::Familiar => unreachable!("it is made, not trained"),
            };
            notice!("{name}: {}", Value::Object(figures));
        }
        match part {
            Part::Planner => planner::export(&run, &out)?,
            Part::Verifier => verifier::export(&run, &out)?,
            Part::Vision => {
                notice!("{name}: the VLM's run takes it from {}", run.display());
                continue;
            }
            Part::Vlm | Part::BoxVerifier => vlm::export(&run, &out)?,
            Part::Depth => depth::export(&run, &out)?,
            Part::Detector => detector::export(&run, &out)?,
            Part::Familiar => familiar::export(&out)?,
        }
        notice!("{name}: written to {}", out.display());
    }
    Ok(())
}

/// Pictures rendered between two writes of the index files' records.
const CHUNK: u32 = 64;

fn render(args: &RenderArgs) -> Result<()> {
    ensure!(args.n > 0, "--n must be at least 1");
    let out = &args.out;
    if out.exists() {
        let mut entries = std::fs::read_dir(out).with_context(|| format!("--out {}", out.display()))?;
        if entries.next().is_some() {
            bail!("--out {} is not empty: name a new folder, or empty it first", out.display());
        }
    }
    fillable("--out", Some(out))?;
    let bar = ProgressBar::new(u64::from(args.n)).with_style(
        ProgressStyle::with_template("rooms {bar:30} {pos}/{len} pictures, {per_sec}, {eta} left")
            .expect("a fixed template"),
    );
    let mut pulse = Pulse::default();
    let (mut scenes, mut odvg, mut coco) = (Vec::new(), Vec::new(), Coco::default());
    let questions = std::thread::scope(|scope| -> Result<Vec<Value>> {
        let (views, ahead) = mpsc::sync_channel::<View>(CHUNK as usize);
        let asker = scope.spawn(move || ask(args, ahead));
        for start in (0..args.n).step_by(CHUNK as usize) {
            let end = (start + CHUNK).min(args.n);
            let chunk: Vec<View> = (start..end)
                .into_par_iter()
                .map(|i| -> Result<View> {
                    let view = look_at(args, scene_seed(args.split, args.seed, u64::from(i)));
                    write_atomic(&out.join(name(i)), |w| w.write_all(&picture_png(&view)?))?;
                    write_atomic(&out.join(depth_name(i)), |w| w.write_all(&depth_png(&view)?))?;
                    bar.inc(1);
                    Ok(view)
                })
                .collect::<Result<_>>()?;
            pulse.beat(&bar);
            for (i, view) in (start..end).zip(chunk) {
                scenes.push(scene_json(&view, &name(i), &depth_name(i)));
                odvg.push(odvg_json(&view, &name(i)));
                coco.add(&view, &name(i));
                // Fails only if the other thread panicked, which the join below reports.
                let _ = views.send(view);
            }
        }
        drop(views);
        Ok(asker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    bar.finish_and_clear();
    let lines = |file: &str, records: &[Value]| {
        write_atomic(&out.join(file), |w| records.iter().try_for_each(|r| writeln!(w, "{r}")))
    };
    lines("scenes.jsonl", &scenes)?;
    lines("questions.jsonl", &questions)?;
    lines("odvg.jsonl", &odvg)?;
    lines("label_map.json", &[label_map()])?;
    lines("coco.json", &[coco.finish()])?;
    notice!("{} pictures and {} questions in {}", args.n, questions.len(), out.display());
    Ok(())
}

fn look_at(args: &RenderArgs, seed: u64) -> View {
    rooms::generate(seed, args.look, args.size.0, args.size.1)
}

fn name(i: u32) -> String {
    format!("{i:06}.png")
}

fn depth_name(i: u32) -> String {
    format!("{i:06}.depth.png")
}

/// The questions about the pictures that arrive, in their order.
fn ask(args: &RenderArgs, ahead: mpsc::Receiver<View>) -> Vec<Value> {
    let numbers: std::collections::HashMap<u64, u32> =
        (0..args.n).map(|i| (scene_seed(args.split, args.seed, u64::from(i)), i)).collect();
    let look = args.look;
    // Questions has no end: past the last picture it gets others, until one (of a size that lets
    // it be asked about) brings a question, which ends the loop.
    let supply = move |seed| ahead.recv().unwrap_or_else(|_| rooms::generate(seed, look, 256, 192));
    Questions::new(args.split, args.seed, supply)
        .map_while(|(view, question)| {
            let file = name(*numbers.get(&view.seed)?);
            let mut record = json!({"rooms_version": rooms::VERSION, "image": file, "look": view.look});
            let Ok(Value::Object(question)) = serde_json::to_value(&question) else {
                unreachable!("a question is a JSON object")
            };
            record.as_object_mut().expect("made above").extend(question);
            Some(record)
        })
        .collect()
}
