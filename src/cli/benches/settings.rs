//! What a run's folder says was asked for: a run goes on only with the same.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::How;
use crate::cli::eval::{EvalArgs, ToolChoice};
use crate::config::{Config, Head};
use crate::eval::benches::feed::Opened;
use crate::eval::benches::run::PROGRAMS;
use crate::files::sha256_hex;
use crate::pipeline::{Referee, identity};
use crate::planner::prompt;
use crate::tools::real::vqa_prompts;
use crate::verify::prompt as head_prompt;

/// Everything that a run's records hang on.
pub(super) fn settings(
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
    if !config.eval.judge.model.is_empty() && benches.iter().any(Opened::is_judged) && !args.planner_only {
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
    let tools = match tools {
        // It calls none.
        _ if how == How::Direct => None,
        ToolChoice::Real => Some("real"),
        ToolChoice::Oracle => Some("oracle"),
    };
    Ok(json!({
        "valor": env!("CARGO_PKG_VERSION"),
        "benches": benches.iter().map(Opened::name).collect::<Vec<_>>(),
        "sources": sources,
        "method": how_named,
        "tools": tools,
        "n": args.n,
        "seed": args.seed(),
        "shard": args.shard.map(|s| format!("{}/{}", s.number, s.of)),
        "models": models,
        "prompt": if how == How::Planner { json!(short(prompt(config)?.as_bytes())) } else { Value::Null },
        "programs": programs,
        "config": shown,
    }))
}
