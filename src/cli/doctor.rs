//! `valor doctor`: what this machine has, and which configurations would run on it.

mod machine;

use super::{ModelArgs, gb, one_line};
use crate::config::{BUILT_IN, Config, ENDPOINT, SHIPPED};
use crate::fit;
use crate::llm::endpoint::key_problem;
use crate::pipeline::limits;
use crate::planner;
use crate::program::{Executor, Python, Sandbox};
use crate::weights::ModelFiles;
use crate::weights::hub::Hub;
use machine::Room;
use serde::Serialize;
use std::io::Write;
use std::process::ExitCode;

/// Look at this machine, and at which configurations would run on it
///
/// Nothing is loaded, downloaded or asked of a server. Exit code 1 if the configuration that is given
/// (the built-in one by default) would not run.
#[derive(Debug, clap::Args)]
pub struct DoctorArgs {
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    models: ModelArgs,
}

#[derive(Debug, Serialize)]
struct Finding {
    what: String,
    /// Whether it is there, or works; of what may be missing `false` is no fault.
    ok: bool,
    detail: String,
}

#[derive(Debug, Serialize)]
struct Verdict {
    config: String,
    /// Bytes that the local networks take as they are loaded, where they are here.
    weights_bytes: u64,
    /// Without these it answers no question.
    missing: Vec<String>,
    /// Without these nothing is verified or trained.
    missing_for_training: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Report {
    findings: Vec<Finding>,
    configs: Vec<Verdict>,
}

pub fn run(args: DoctorArgs) -> anyhow::Result<ExitCode> {
    let config = args.models.config()?;
    args.models.gpu()?;
    let mut findings = Vec::new();
    let mut say = |what: &str, ok: bool, detail: String| {
        findings.push(Finding { what: what.into(), ok, detail });
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    say("processor", true, format!("{cores} cores, {}, {}", std::env::consts::ARCH, vector_units()));
    let (ok, detail) = cuda();
    say("cuda", ok, detail);
    let memory = machine::memory();
    let detail = memory.as_ref().map_or("cannot be known here".into(), |m| m.detail());
    say("memory", memory.is_some(), detail);
    let memory = memory.map(|m| m.free);
    match Sandbox::start(limits(&config.sandbox)) {
        Ok(sandbox) => {
            for layer in &sandbox.layers().0 {
                say(&format!("sandbox {}", layer.name), layer.active, layer.detail.clone());
            }
        }
        Err(e) => say("sandbox", false, e.to_string()),
    }
    let python = system_python(&config);
    let (Ok(detail) | Err(detail)) = &python;
    say("cpython", python.is_ok(), detail.clone());
    match Hub::from_env() {
        Ok(hub) => {
            let held = hub.held();
            let bytes = held.iter().map(|h| h.bytes + h.incomplete_bytes).sum();
            let folder = hub.cache_folder();
            let (ok, room) = Room::at(folder).verdict("set HF_HOME to another disk");
            let detail = format!("{}: {} models, {}; {room}", folder.display(), held.len(), gb(bytes));
            say("model cache", ok, detail);
        }
        Err(e) => say("model cache", false, e.to_string()),
    }
    // Where runs and answers are written, unless --out says otherwise.
    let (ok, room) = Room::at(std::path::Path::new(".")).verdict("work in a folder on another disk");
    say("this folder", ok, room);
    for (name, endpoint) in &config.endpoints {
        let problem = key_problem(endpoint);
        let key = problem.as_deref().unwrap_or(if endpoint.key_env.is_empty() {
            "no key wanted"
        } else {
            "its key is there"
        });
        say(
            &format!("endpoint {name}"),
            problem.is_none(),
            format!("{} at {}; {key}", endpoint.model, endpoint.base_url),
        );
    }
    let own = args.models.config.as_ref().map_or(BUILT_IN.to_owned(), |p| p.display().to_string());
    let mut configs = vec![verdict(&own, &config, memory)];
    if config.sandbox.wants_python() {
        configs[0].missing.extend(python.err());
    }
    for (name, text) in SHIPPED {
        configs.push(match Config::parse(text, name) {
            Ok(config) => verdict(name, &config, memory),
            Err(e) => Verdict {
                config: name.to_string(),
                weights_bytes: 0,
                missing: vec![e.to_string()],
                missing_for_training: Vec::new(),
            },
        });
    }
    // Whatever is run, it is run there.
    if let Err(e) = args.models.device() {
        configs.iter_mut().for_each(|c| c.missing.insert(0, one_line(&e)));
    }
    let runs = configs[0].missing.is_empty();
    let report = Report { findings, configs };
    let mut out = super::stdout();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        for f in &report.findings {
            writeln!(out, "{:<22} {:<4} {}", f.what, if f.ok { "yes" } else { "NO" }, f.detail)?;
        }
        writeln!(out, "\nconfigurations:")?;
        for v in &report.configs {
            if v.missing.is_empty() {
                writeln!(out, "{:<22} runs ({} of weights)", v.config, gb(v.weights_bytes))?;
            } else {
                writeln!(out, "{:<22} would not run:", v.config)?;
                v.missing.iter().try_for_each(|m| writeln!(out, "  - {m}"))?;
            }
            v.missing_for_training.iter().try_for_each(|m| writeln!(out, "  - to train: {m}"))?;
        }
    }
    Ok(if runs { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The system's Python, started in its jail: what it is, or why it cannot run programs.
fn system_python(config: &Config) -> Result<String, String> {
    let cfg = &config.sandbox;
    let (python, numpy) = match Python::find(&cfg.python, true) {
        Err(e) if cfg.numpy => return Err(e.to_string()),
        Err(_) => (None, "it has no numpy".into()),
        Ok(python) => {
            let version = python.numpy.clone().unwrap_or_default();
            match cfg.numpy {
                true => (Some(python), format!("programs get its numpy {version}")),
                false => (None, format!("its numpy {version} is there for sandbox.numpy = true")),
            }
        }
    };
    let python = match python {
        Some(python) => python,
        None => Python::find(&cfg.python, false).map_err(|e| e.to_string())?,
    };
    let named = format!("{} at {}; {numpy}", python.version, python.executable.display());
    match Sandbox::open(limits(cfg), Executor::Cpython(python), None) {
        Ok(_) => Ok(format!("{named}; its jail is whole")),
        Err(e) => Err(format!("{named}; {e}")),
    }
}

/// What a configuration lacks, as far as can be told without loading it.
fn verdict(name: &str, config: &Config, memory: Option<u64>) -> Verdict {
    let (mut missing, mut for_training) = (Vec::new(), Vec::new());
    let mut weights_bytes = 0;
    let boxes = match config.grounding.mining.model.as_str() {
        "" => &config.vlm.model,
        _ => &config.grounding.mining.model,
    };
    let parts = [
        ("planner", &config.planner.model),
        ("detector", &config.detector.model),
        ("depth", &config.depth.model),
        ("vlm", &config.vlm.model),
        ("verifier", &config.verifier.model),
        ("box-verifier", boxes),
    ];
    for (part, model) in parts {
        let judges = part.ends_with("verifier");
        let missing = if judges { &mut for_training } else { &mut missing };
        if let Some(endpoint) = model.strip_prefix(ENDPOINT) {
            let problem = config.endpoints.get(endpoint).and_then(key_problem);
            missing.extend(problem.map(|p| format!("{part}: {p}")));
            continue;
        }
        match ModelFiles::open(model, part).map_err(Into::into).and_then(|files| fit::check(&files)) {
            Ok(fit) if !fit.part.serves(part) => {
                missing.push(format!("{part}: {model} is no {part} (but fits as {})", fit.part.word()));
            }
            // Verifiers are not loaded beside the others.
            Ok(fit) if !judges => weights_bytes += fit.loaded_bytes,
            Ok(_) => {}
            Err(e) => missing.push(format!("{part}: {e}")),
        }
    }
    if let Err(e) = planner::prompt(config) {
        missing.push(e.to_string());
    }
    if let Some(memory) = memory.filter(|m| *m < weights_bytes) {
        missing.push(format!("memory: {} of weights, {} free", gb(weights_bytes), gb(memory)));
    }
    Verdict { config: name.into(), weights_bytes, missing, missing_for_training: for_training }
}

/// What the processor has of what the kernels are written for.
fn vector_units() -> String {
    #[cfg(target_arch = "x86_64")]
    {
        let all = [
            ("avx2", std::arch::is_x86_feature_detected!("avx2")),
            ("fma", std::arch::is_x86_feature_detected!("fma")),
            ("f16c", std::arch::is_x86_feature_detected!("f16c")),
            ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
            ("amx-bf16", crate::nn::precision::fast()),
        ];
        let has = |wanted: bool| {
            all.iter().filter(|(_, has)| *has == wanted).map(|(name, _)| *name).collect::<Vec<_>>().join(" ")
        };
        let lacks = if has(false).is_empty() { String::new() } else { format!(" (lacks {})", has(false)) };
        format!("{}{lacks}", has(true))
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        "the vector units that the compiler assumes".into()
    }
}

fn cuda() -> (bool, String) {
    if !candle_core::utils::cuda_is_available() {
        return (
            false,
            "this build has none; networks run on the processor (--features cuda builds it in)".into(),
        );
    }
    match crate::nn::gpu(0) {
        Ok(_) => (true, "device 0 opens".into()),
        Err(e) => {
            (false, format!("device 0 does not open: {}", e.to_string().lines().next().unwrap_or_default()))
        }
    }
}
