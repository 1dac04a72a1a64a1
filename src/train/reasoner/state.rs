//! What a run leaves in its folder to be gone on from, and what must be the same for that.

use super::{Policy, Queries, policy};
use crate::config::Config;
use crate::files::{sha256_hex, write_atomic};
use crate::llm::endpoint::Usage;
use crate::nn::AdamW;
use crate::planner;
use crate::train::checkpoint::{Checkpoints, Saved};
use crate::train::{differences, run};
use crate::verify::prompts_sha256;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;

/// Where a run stands, beside its weights.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct State {
    pub(super) step: u64,
    /// What must be the same for a resumed run to be the same run.
    pub(super) settings: Value,
    /// What the verifier's calls have cost.
    pub(super) usage: Usage,
    /// Is the step's evaluation still to come?
    #[serde(default)]
    pub(super) unevaluated: bool,
}

/// That a run may write into a folder: a new or empty one, or a run's. One that has saved something is only
/// gone on with. Gone on with is a run alone, which may have been killed before it saved anything.
pub fn check_folder(dir: &Path, resume: bool) -> Result<()> {
    let config = std::fs::read_to_string(dir.join("config.toml"));
    let begun = config.is_ok_and(|text| Config::parse(&text, "config.toml").is_ok());
    run::check_folder(dir, || begun)?;
    ensure!(begun || !resume, "no run in {}; check --out, or leave out --resume", dir.display());
    ensure!(
        resume || !run::has_checkpoint(dir),
        "{} holds a run: give --resume to go on with it, or another --out",
        dir.display()
    );
    Ok(())
}

/// What a resumed run may not change, its planner and verifier by their names. Limits on memory and what is written
/// when are one's own.
pub(super) fn settings(config: &Config, queries: &Queries, planner: &str, verifier: &str) -> Result<Value> {
    let mut of_run = json!(config.reasoner);
    for free in [
        "micro_tokens",
        "kv_cache_mb",
        "recompute",
        "offload",
        "save_every",
        "keep",
        "missing_limit",
        "servers",
    ] {
        of_run.as_object_mut().expect("a table").remove(free);
    }
    // Of instructions and questions what they say, too: files under one name can change, and of other
    // questions those that were trained on may become held-out ones.
    let prompt = planner::prompt(config)?;
    let training = queries.training.iter().map(String::as_str);
    let questions: Vec<&str> = training.chain(queries.held_out.texts()).collect();
    Ok(json!({
        "reasoner": of_run, "planner": planner,
        "prompt": config.planner.prompt, "prompt_sha256": sha256_hex(prompt.as_bytes(), 32),
        "questions_sha256": sha256_hex(questions.join("\n").as_bytes(), 32),
        "verifier": verifier, "prompts": config.verifier.prompts,
        "prompts_sha256": prompts_sha256(&config.verifier)?,
        "max_new_tokens": config.verifier.max_new_tokens,
        "reward": config.reward, "sandbox": config.sandbox,
    }))
}

/// That a run which is resumed has the settings that it began with, and the step that it has come to. Its
/// models, which need not be loaded for it, by their names.
pub fn check_resumed(
    dir: &Path,
    config: &Config,
    queries: &Queries,
    planner: &str,
    verifier: &str,
) -> Result<u64> {
    if run::has_checkpoint(dir)
        && let Some(saved) = Checkpoints::of(&dir.join("checkpoints")).newest(|_| ())?
    {
        return Ok(saved_state(dir, &saved, &settings(config, queries, planner, verifier)?)?.step);
    }
    Ok(0)
}

/// Where a run's checkpoint stands, if it was made with these settings.
pub(super) fn saved_state(dir: &Path, saved: &Saved, settings: &Value) -> Result<State> {
    let named = || saved.path.display().to_string();
    let text = std::fs::read_to_string(saved.path.join("state.json")).with_context(named)?;
    let state: State = serde_json::from_str(&text).with_context(named)?;
    if state.settings != *settings {
        bail!(
            "{} was made with other settings: {}",
            dir.display(),
            differences(&state.settings, settings).join("; ")
        )
    }
    Ok(state)
}

/// A checkpoint's files.
pub(super) fn save(dir: &Path, policy: &Policy, optimiser: &AdamW, state: &State) -> Result<()> {
    policy::write(&dir.join("trained.safetensors"), &policy.trained().tensors())?;
    optimiser.save(&dir.join("optimiser.safetensors"))?;
    write_atomic(&dir.join("state.json"), |w| writeln!(w, "{}", serde_json::to_string_pretty(state)?))?;
    Ok(())
}
