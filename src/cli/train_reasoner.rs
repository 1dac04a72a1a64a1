//! `valor train-reasoner`: from questions without answers to a better planner.

use super::{ModelArgs, fillable, servers, to_be_fetched};
use crate::config::{Algorithm, Config, ENDPOINT, Head};
use crate::files::Held;
use crate::llm::ChatModels;
use crate::pipeline::sandbox;
use crate::planner;
use crate::text::shown;
use crate::train::Broken;
use crate::train::reasoner::{
    Policy, Queries, Training, check_folder, check_resumed, check_trainable, steps,
};
use crate::verify::{self, Judge, Verification, check_files};
use crate::weights::ModelFiles;
use anyhow::{Result, ensure};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Train the planner on questions without answers, rewarded by the verifier (settings: [reasoner])
#[derive(Debug, clap::Args)]
pub struct TrainReasonerArgs {
    /// Folder of the run: configuration, metrics, sampled rollouts, checkpoints, and in the end the model
    #[arg(long, value_name = "DIR", default_value = "runs/reasoner")]
    out: PathBuf,
    /// Go on with the run in the folder, from its newest whole checkpoint
    #[arg(long)]
    resume: bool,
    /// Say what the run would do and, with local models, about how long it would take; train nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    models: ModelArgs,
}

pub fn run(args: &TrainReasonerArgs) -> Result<ExitCode> {
    let (config, device) = (args.models.config()?, args.models.device()?);
    ensure!(
        !config.planner.model.starts_with(ENDPOINT),
        "planner.model: is a server, which cannot be trained; name weights"
    );
    let queries = Queries::open(&config.reasoner)?;
    // What can be refused before anything is loaded, a dry run refuses too.
    check_folder(&args.out, args.resume)?;
    fillable("--out", Some(&args.out))?;
    check_files(&config.verifier)?;
    planner::prompt(&config)?;
    let keys = servers(&config, &[&config.verifier.model], args.dry_run)?;
    let opened = |model: &str, part: &'static str| match args.dry_run && to_be_fetched(model, part) {
        true => Ok(None),
        false => ModelFiles::open(model, part).map(Some),
    };
    let planner = opened(&config.planner.model, "planner")?;
    let server = config.verifier.model.strip_prefix(ENDPOINT);
    let verifier = if server.is_some() { None } else { opened(&config.verifier.model, "verifier")? };
    planner.iter().try_for_each(check_trainable)?;
    // Of the weights no more than whether they are there and can be read.
    planner.iter().chain(&verifier).try_for_each(|files| files.checkpoint().map(|_| ()))?;
    let verifier = server.map(|name| config.endpoints[name].model.clone()).or_else(|| Some(verifier?.name()));
    if args.dry_run {
        // A run finds this out where it goes on, and what it goes on from is hashed once.
        let at = match (&planner, &verifier) {
            (Some(planner), Some(verifier)) => {
                Some(check_resumed(&args.out, &config, &queries, &planner.name(), verifier)?)
            }
            _ => None,
        };
        plan(&config, &queries);
        if let (true, Some(step)) = (args.resume, at) {
            println!("goes on          at step {step}");
        }
        keys.iter().for_each(|key| println!("{key}"));
        let why = match (&planner, server, &verifier) {
            (None, ..) => Some("the planner is not here"),
            (_, Some(_), _) => Some("the verifier is a server, which is not asked"),
            (.., None) => Some("the verifier is not here"),
            _ => None,
        };
        if let Some(why) = why {
            println!("time, memory     not known: {why} in a dry run");
            return Ok(ExitCode::SUCCESS);
        }
    }
    let _held = if args.dry_run { None } else { Some(Held::folder("--out", &args.out)?) };
    super::compute_in(config.reasoner.precision, &device);
    let chats = ChatModels::new(&config, &device);
    let judge = Judge::new(chats.verifier()?, &config.verifier)?;
    let policy = Policy::load(&config.planner.model, &config.reasoner, &device)?;
    notice!(
        "valor: planner {} ({:.2} M parameters, {:.2} M trained), verifier {}",
        policy.name(),
        policy.parameters() as f64 / 1e6,
        policy.trained().count() as f64 / 1e6,
        judge.name()
    );
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // The second one does not wait for the step to end.
        signal_hook::flag::register_conditional_shutdown(signal, 1, stop.clone())?;
        signal_hook::flag::register(signal, stop.clone())?;
    }
    let mut training = Training {
        config: &config,
        queries,
        verification: Verification { judge: &judge, weights: &config.reward },
        sandbox: sandbox(&config.sandbox)?,
        dir: args.out.clone(),
        stop: &stop,
    };
    if args.dry_run {
        let phases = training.probe(&policy)?;
        let each: Vec<String> = phases.iter().map(|(phase, s)| format!("{phase} {s:.0} s")).collect();
        let minutes = phases.values().sum::<f64>() * training.steps() as f64 / 60.;
        println!(
            "time             about {minutes:.0} min, evaluations not counted; a step: {}",
            each.join(", ")
        );
        if let Some(mb) = peak_memory_mb() {
            println!("memory           {mb} MB at most while a part of a step was tried");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let ended = match training.run(&policy, args.resume) {
        Err(e) if e.is::<Broken>() => {
            notice!("valor: {}", shown(&e.to_string()));
            return Ok(ExitCode::FAILURE);
        }
        ended => ended?,
    };
    for (name, usage) in chats.usage() {
        notice!("valor: endpoint {name}: {}", serde_json::to_string(&usage)?);
    }
    let dir = args.out.display();
    if ended.step < ended.of {
        notice!(
            "valor: stopped after step {} of {}, saved; go on with --resume --out {dir}",
            ended.step,
            ended.of
        );
        return Ok(ExitCode::FAILURE);
    }
    match ended.best {
        Some((0, reward)) => {
            notice!(
                "valor: no evaluation beat the planner before its training: held-out reward {reward:.3}, {dir}/best"
            );
        }
        Some((step, reward)) => {
            notice!("valor: best held-out reward {reward:.3} after step {step}: {dir}/best");
        }
        None => {}
    }
    println!("{dir}/model");
    Ok(ExitCode::SUCCESS)
}

/// What a run would do, in numbers that need no model.
fn plan(config: &Config, queries: &Queries) {
    let r = &config.reasoner;
    let steps = steps(r, queries.training.len());
    // Places of groups that say nothing are filled anew so many times, at most.
    let rollouts = steps * (r.batch * r.group * (1 + r.resample)) as u64;
    let asks = |head: &Head| verify::weight(&config.reward, *head) > 0.;
    let asked: Vec<&str> = Head::ALL.into_iter().filter(asks).map(Head::word).collect();
    let held_out = queries.held_out.texts().len() as u64;
    let evaluations = match held_out {
        0 => 0,
        _ if r.eval_every > 0 => 1 + steps.div_ceil(r.eval_every),
        _ => 2,
    };
    // What cannot be read is asked once more.
    let calls = 2 * (rollouts + evaluations * held_out) * asked.len() as u64;
    let algorithm = match r.algorithm {
        Algorithm::Grpo => "GRPO",
        Algorithm::Sft => "SFT on rollouts that earn enough",
    };
    let what = match r.adapter.rank {
        0 => "all weights".to_owned(),
        rank => format!("LoRA of rank {rank}"),
    };
    println!("algorithm        {algorithm}, {what}");
    println!("planner          {}", config.planner.model);
    println!("verifier         {} (heads: {})", config.verifier.model, asked.join(", "));
    println!("questions        {} to train on, {held_out} held out", queries.training.len());
    println!("steps            {steps} of {} questions × {} rollouts", r.batch, r.group);
    println!(
        "rollouts         {}{rollouts}, of at most {} tokens: at most {}",
        if r.resample > 0 { "at most " } else { "" },
        r.max_new_tokens,
        rollouts * r.max_new_tokens as u64
    );
    println!("evaluations      {evaluations}");
    println!("verifier calls   at most {calls}; what is the same is asked once");
    let Some(e) = config.verifier.model.strip_prefix(ENDPOINT).map(|name| &config.endpoints[name]) else {
        return;
    };
    let (prompt, new) = (e.usd_per_million_prompt_tokens, e.usd_per_million_new_tokens);
    if prompt + new == 0. {
        println!("money            not known: the endpoint has no usd_per_million_… set");
        return;
    }
    // Instructions of about a token to four bytes, and the longest reply there can be to judge.
    let bytes = |h: Head| verify::prompt(&config.verifier.prompts, h).map_or(0, |p| p.len());
    let read = Head::ALL.into_iter().map(bytes).max().unwrap_or(0) / 4 + r.max_new_tokens;
    let most = calls as f64 * (read as f64 * prompt + config.verifier.max_new_tokens as f64 * new) / 1e6;
    println!("money            at most {most:.2} USD, were every reply and verdict as long as it may be");
}

#[cfg(not(unix))]
fn peak_memory_mb() -> Option<u64> {
    None
}

/// The most memory that this process has held, where the system tells.
#[cfg(unix)]
fn peak_memory_mb() -> Option<u64> {
    // SAFETY: getrusage fills the struct that it is given, of which all zeros are a value.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    // In kilobytes, on macOS in bytes.
    Some(usage.ru_maxrss as u64 / if cfg!(target_os = "macos") { 1_000_000 } else { 1_000 })
}
