//! `valor infer`: a picture and a question in, an answer out.

use super::ModelArgs;
use crate::config::{Config, EMBEDDED};
use crate::llm::ChatModels;
use crate::pipeline::{Answered, IMAGE, Models, answer, limits};
use crate::program::Sandbox;
use crate::tools::Picture;
use crate::tools::familiar::Familiar;
use crate::tools::real::RealTools;
use crate::weights::ModelFiles;
use anyhow::{Context, bail};
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

#[derive(Debug, clap::Args)]
pub struct InferArgs {
    /// The picture (PNG, JPEG, WebP, BMP, TIFF or GIF)
    image: PathBuf,
    /// The question
    query: String,
    /// Print answer, plan, program, tool calls, times, models and seed as JSON
    #[arg(long)]
    json: bool,
    /// Seed of the planner's sampling
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    models: ModelArgs,
}

pub fn run(args: InferArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let query = args.query.trim();
    if query.is_empty() {
        bail!("the question is empty; ask something, such as \"How many chairs are there?\"")
    }
    let (config, device) = (args.models.config()?, args.models.device()?);
    let picture = Picture::open(&args.image)?;
    let chats = ChatModels::new(&config, &device);
    let models = Models::load(&config, &device, &chats)?;
    let mut sandbox = Sandbox::start(limits(&config.sandbox)).context("cannot start the sandbox")?;
    let load = started.elapsed().as_secs_f64();
    let names: Vec<String> = models.names().iter().map(|(part, name)| format!("{part}: {name}")).collect();
    eprintln!("valor: models: {}", names.join(", "));

    if let Some(notice) = strange(&config, &picture)? {
        eprintln!("valor: {notice}");
    }

    let planning = Instant::now();
    let reply = models.planner.ask(&[(query, args.seed)], None).into_iter().next();
    let reply = match reply.context("the planner gave no reply")? {
        Ok(reply) => reply,
        Err(e) => {
            eprintln!("valor: the planner failed: {e}");
            return Ok(ExitCode::FAILURE);
        }
    };
    let plan = planning.elapsed().as_secs_f64();
    eprintln!("valor: planned in {plan:.2} s, {} tokens", reply.new_tokens);
    let mut tools = RealTools::new(&models.perception, &picture);
    let answered = answer(&reply.text, &mut sandbox, &mut tools);
    if let Some(reply) = answered.reply.as_ref().filter(|r| !r.flags.is_empty()) {
        let flags: Vec<String> = reply.flags.iter().map(|f| format!("{f:?}")).collect();
        eprintln!("valor: the planner's reply is irregular: {}", flags.join(", "));
    }
    let failure = match &answered.outcome {
        Err(e) => Some(e.to_string()),
        Ok(outcome) => {
            for call in &outcome.calls {
                eprintln!("valor: {} took {:.2} s", call.tool, call.seconds);
            }
            outcome.result.as_ref().err().map(|e| format!("the program failed: {e}"))
        }
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        let seconds = seconds(load, plan, started.elapsed().as_secs_f64(), &answered);
        let models: Map<String, Value> =
            models.names().iter().map(|(part, name)| (part.to_string(), json!(name))).collect();
        let trace = json!({
            "answer": answered.value(),
            "error": error(&answered),
            "question": query,
            "picture": { "file": args.image.display().to_string(), "as": IMAGE,
                         "width": picture.width(), "height": picture.height() },
            "plan": answered.reply.as_ref().and_then(|r| r.plan.clone()),
            "program": answered.reply.as_ref().map(|r| &r.program),
            "flags": answered.reply.as_ref().map(|r| &r.flags),
            "reply": { "text": &reply.text, "finish": reply.finish, "tokens": reply.new_tokens },
            "calls": answered.outcome.as_ref().map_or(&[][..], |o| &o.calls),
            "printed": answered.outcome.as_ref().map_or("", |o| &o.stdout),
            "seconds": seconds,
            "models": models,
            "endpoints": chats.usage(),
            "seed": args.seed,
        });
        writeln!(out, "{trace:#}")?;
    } else {
        match answered.value() {
            Some(Value::String(text)) => writeln!(out, "{text}")?,
            Some(Value::Bool(yes)) => writeln!(out, "{}", if *yes { "yes" } else { "no" })?,
            Some(value) => writeln!(out, "{value}")?,
            None => {}
        }
    }
    Ok(match failure {
        Some(reason) => {
            eprintln!("valor: {reason}");
            ExitCode::FAILURE
        }
        None => ExitCode::SUCCESS,
    })
}

/// What to tell someone whose picture is plainly not of the world that the embedded models know.
fn strange(config: &Config, picture: &Picture) -> anyhow::Result<Option<&'static str>> {
    let seeing = [&config.detector.model, &config.depth.model, &config.vlm.model];
    if !seeing.iter().any(|m| *m == EMBEDDED) {
        return Ok(None);
    }
    let known = ModelFiles::open(EMBEDDED, "familiar")?.required("familiar.json")?;
    let known = Familiar::from_json(&known).map_err(anyhow::Error::msg).context("embedded familiar")?;
    Ok(known.is_strange(picture).then_some(
        "this is plainly no picture of Rooms, and the embedded models only know Rooms: do not trust the \
         answer; name other models in the configuration for other pictures",
    ))
}

/// As the sandbox's errors; also of the kind "malformed" for a reply without a program.
fn error(answered: &Answered) -> Value {
    match &answered.outcome {
        Err(e) => json!({ "kind": answered.failure(), "type": null, "line": null, "message": e.to_string() }),
        Ok(outcome) => json!(outcome.result.as_ref().err()),
    }
}

/// Wall seconds by part: loading, planning, each tool, the program itself, everything.
fn seconds(load: f64, plan: f64, total: f64, answered: &Answered) -> Value {
    let mut tools: Map<String, Value> = Map::new();
    let mut program = 0.;
    if let Ok(outcome) = &answered.outcome {
        program = outcome.seconds;
        for call in &outcome.calls {
            let before = tools.get(&call.tool).and_then(Value::as_f64).unwrap_or(0.);
            tools.insert(call.tool.clone(), json!(before + call.seconds));
        }
    }
    json!({ "load": load, "plan": plan, "tools": tools, "program": program, "total": total })
}
