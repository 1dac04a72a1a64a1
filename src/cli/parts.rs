//! `valor eval --bench rooms-…`: what each model is worth by itself.

use super::eval::{Bench, EvalArgs};
use super::{all_heard, replaceable};
use crate::config::Config;
use crate::eval::honesty::honesty;
use crate::eval::parts;
use crate::files::write_atomic;
use crate::llm::ChatModels;
use crate::pipeline::sandbox;
use crate::planner::Planner;
use crate::report::pulse::Pulse;
use crate::rooms::{Kind, Question};
use crate::text::shown;
use crate::tools::real::{DepthEstimator, Detector, Vlm};
use crate::train::tuning::fit::checked;
use crate::verify::{Judge, Verification};
use anyhow::{Context, bail};
use candle_core::Device;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::fmt::Write as _;
use std::io::Write;
use std::process::ExitCode;

pub fn run(args: &EvalArgs, bench: Bench, config: &Config, device: &Device) -> anyhow::Result<ExitCode> {
    // Of these benches one alone asks a planner, and runs what it writes where --scenes is given.
    let plans = bench == Bench::RoomsVerifier;
    let unused = [
        ("--planner", args.planner.is_some() && !plans),
        ("--planner stored", args.planner.as_deref() == Some("stored")),
        ("--greedy", args.greedy && !plans),
        ("--prompt", args.models.prompt.is_some() && !plans),
        ("--tools", args.tools.is_some()),
        ("--executor", args.executor.executor.is_some() && args.scenes.is_none()),
        ("--fallback", args.executor.fallback.is_some() && args.scenes.is_none()),
        ("--one-by-one", args.one_by_one),
        ("--vote", args.vote.is_some()),
        ("--repair", args.repair.is_some()),
        ("--shuffle-pictures", args.shuffle_pictures),
        ("--families", !args.families.is_empty()),
        ("--out", args.out.is_some() && args.scenes.is_none()),
        ("--pictures", args.pictures.is_some()),
        // Whose pictures are a file's.
        ("--seed", args.seed.is_some() && bench == Bench::Detection),
        ("--look", args.look.is_some() && bench == Bench::Detection),
        ("--data", args.data.is_some() && bench != Bench::Detection),
        ("--shard", args.shard.is_some()),
        ("--method", args.method.is_some()),
        ("--planner-only", args.planner_only),
        ("--programs", args.programs.is_some()),
    ];
    if let Some((name, _)) = unused.iter().find(|u| u.1) {
        bail!("{name} says nothing to --bench {}", bench.name())
    }
    replaceable("--out", args.out.as_deref(), &["index", "question", "reply", "right", "passed"])?;
    let (look, seed, n) = (args.look(), args.seed(), args.n() as u64);
    let bar = ProgressBar::new(n);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} eta {eta}")?);
    let mut pulse = Pulse::default();
    let mut tick = || {
        bar.inc(1);
        pulse.beat(&bar);
    };
    let chats = ChatModels::new(config, device);
    let mut table = String::new();
    // Verdicts and whole replies that a server kept silent about.
    let (mut silent, mut unjudged) = (0, 0);
    let figures = match bench {
        Bench::Rooms => unreachable!("the caller's own"),
        Bench::RoomsDetector => {
            let model = Detector::load(&config.detector, device)?;
            let ap = parts::detector(&model, look, seed, n, &mut tick)?;
            writeln!(
                table,
                "AP50 {:.3}{}  AP75 {:.3}  AP {:.3}  ({} things)",
                ap.ap50,
                interval(ap.ap50_interval),
                ap.ap75,
                ap.ap,
                ap.truths
            )?;
            for (kind, ap50) in Kind::ALL.iter().zip(&ap.ap50_by_class) {
                writeln!(
                    table,
                    "{:<10} {}",
                    kind.to_string(),
                    ap50.map_or("–".into(), |x| format!("{x:.3}"))
                )?;
            }
            let mut figures = serde_json::to_value(&ap)?;
            let kinds =
                Kind::ALL.iter().map(|k| k.to_string()).zip(ap.ap50_by_class.iter().map(|x| json!(x)));
            figures["ap50_by_class"] = kinds.collect::<serde_json::Map<_, _>>().into();
            figures
        }
        Bench::Detection => {
            let path = args
                .data
                .as_ref()
                .context("--bench detection needs --data FILE: ODVG (.jsonl) or COCO (.json)")?;
            let boxes = checked(path, false).context("--data")?;
            let pictures = args.n.unwrap_or(boxes.records.len());
            if boxes.records.iter().take(pictures).all(|r| r.detection.instances.is_empty()) {
                bail!(
                    "--data {}: there is no box in the {} pictures to measure on; name another file",
                    path.display(),
                    pictures.min(boxes.records.len())
                )
            }
            bar.set_length(pictures.min(boxes.records.len()) as u64);
            let model = Detector::load(&config.detector, device)?;
            let mut unreadable = 0;
            let ap = parts::detection(&model, &boxes, pictures, |why| {
                if let Some(why) = why {
                    unreadable += 1;
                    bar.suspend(|| notice!("valor: left out: {}", shown(&why)));
                }
                tick();
            })?;
            writeln!(
                table,
                "AP50 {:.3}{}  AP75 {:.3}  AP {:.3}  small {}  medium {}  large {}  ({} things; \
                 {unreadable} pictures left out)",
                ap.ap50,
                interval(ap.ap50_interval),
                ap.ap75,
                ap.ap,
                or_dash(ap.small),
                or_dash(ap.medium),
                or_dash(ap.large),
                ap.truths
            )?;
            let mut figures = serde_json::to_value(&ap)?;
            let names = boxes.labels.names().iter().cloned();
            let by_class = names.zip(ap.ap50_by_class.iter().map(|x| json!(x)));
            figures["ap50_by_class"] = by_class.collect::<serde_json::Map<_, _>>().into();
            figures["left_out"] = unreadable.into();
            figures
        }
        Bench::RoomsDepth => {
            let model = DepthEstimator::load(&config.depth, device)?;
            let r = parts::depth(&model, look, seed, n, &mut tick)?;
            writeln!(
                table,
                "AbsRel {:.4}{}  with the scale set right {:.4}{}",
                r.abs_rel,
                interval(r.abs_rel_interval),
                r.abs_rel_aligned,
                interval(r.abs_rel_aligned_interval)
            )?;
            serde_json::to_value(&r)?
        }
        Bench::RoomsVlm => {
            let model = Vlm::new(chats.vlm()?, &config.vlm)?;
            let shares = parts::vlm(&model, look, seed, args.n(), &mut tick)?;
            for (name, share) in &shares {
                writeln!(table, "{name:<12} {share}  n {}", share.n)?;
            }
            serde_json::to_value(&shares)?
        }
        Bench::RoomsVerifier => {
            let mut jail = args.scenes.map(|_| sandbox(&config.sandbox)).transpose()?;
            let judge = Judge::new(chats.verifier()?, &config.verifier)?;
            let planner = Planner::new(chats.planner()?, config)?;
            let asked: Vec<Question> =
                crate::eval::rooms::questions(look, seed).take(args.n()).map(|(_, q)| q).collect();
            let tick = |done: usize, all: usize| {
                bar.set_length(all as u64);
                bar.set_position(done as u64);
                pulse.beat(&bar);
            };
            let r = parts::verifier(&judge, &planner, &asked, seed, tick)?;
            writeln!(table, "{:<12} balanced{:16}right passes{:18}wrong is objected to", "head", "", "")?;
            for (name, h) in &r.heads {
                let (passed, objected) = (h.passed.to_string(), h.objected.to_string());
                let balanced = or_dash(h.balanced) + &interval(Some(h.balanced_interval));
                writeln!(
                    table,
                    "{name:<12} {balanced:<24}{passed:<25}{:>5}  {objected:<25}{:>5}  unreadable {}",
                    h.passed.n, h.objected.n, h.unreadable
                )?;
            }
            writeln!(table, "objections to the mistake kept from it: {}  n {}", r.kept_back, r.kept_back.n)?;
            writeln!(table, "replies without plan and program: {}", r.unparsed)?;
            silent = r.silent;
            let mut figures = serde_json::to_value(&r)?;
            if let (Some(rooms), Some(sandbox)) = (args.scenes, &mut jail) {
                bar.set_length(asked.len() as u64);
                let verification = Verification { judge: &judge, weights: &config.reward };
                let of = (look, seed, rooms);
                let r = honesty(&verification, &planner, &asked, of, sandbox, |done| {
                    bar.set_position(done as u64);
                    pulse.beat(&bar);
                })?;
                writeln!(
                    table,
                    "whole replies, run in {} other rooms each ({} left out):",
                    r.rooms,
                    r.left_out + r.silent
                )?;
                writeln!(table, "  right ones that pass   {}  n {}", r.right_passed, r.right_passed.n)?;
                writeln!(table, "  wrong ones that pass   {}  n {}", r.wrong_passed, r.wrong_passed.n)?;
                writeln!(table, "  of those that pass, wrong  {}  n {}", r.passed_wrong, r.passed_wrong.n)?;
                unjudged = r.silent;
                figures["whole"] = serde_json::to_value(&r)?;
                if let Some(path) = &args.out {
                    write_atomic(path, |w| {
                        r.replies.iter().try_for_each(|l| writeln!(w, "{}", serde_json::to_string(l)?))
                    })?;
                }
            }
            figures
        }
    };
    bar.finish_and_clear();
    let mut stdout = super::stdout();
    if args.json {
        let report = match bench {
            Bench::Detection => json!({ "bench": bench.name(), "n": bar.length(), "figures": figures }),
            _ => json!({
                "bench": bench.name(), "rooms_version": crate::rooms::VERSION, "look": look, "seed": seed, "n": n,
                "figures": figures,
            }),
        };
        writeln!(stdout, "{report:#}")?;
    } else {
        write!(stdout, "{table}")?;
        if bench != Bench::Detection {
            writeln!(stdout, "rooms version {}", crate::rooms::VERSION)?;
        }
    }
    if unjudged > 0 {
        notice!("valor: of {unjudged} whole replies a verdict is missing");
    }
    Ok(all_heard(silent + unjudged))
}

/// Of nothing there is no figure.
fn or_dash(x: f64) -> String {
    if x.is_nan() { "–".into() } else { format!("{x:.3}") }
}

fn interval(ends: Option<[f64; 2]>) -> String {
    let known = ends.filter(|ends| ends.iter().all(|x| !x.is_nan()));
    known.map_or_else(String::new, |[low, high]| format!(" [{low:.3}, {high:.3}]"))
}
