//! `valor program run`: one program against a written scene.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::ExecutorArgs;
use crate::config::Config;
use crate::pipeline::sandbox;
use crate::program::guard::MAX_SOURCE;
use crate::text::{shown, without_bom};
use crate::tools::mock::{MockTools, Scene};

#[derive(Debug, clap::Args)]
pub struct ProgramArgs {
    #[command(subcommand)]
    command: ProgramCommand,
}

#[derive(Debug, clap::Subcommand)]
enum ProgramCommand {
    /// Run a program against a scene; prints its answer, exit code 1 if it fails
    Run(RunArgs),
}

#[derive(Debug, clap::Args)]
struct RunArgs {
    /// Python source as a planner writes it, or - for standard input
    file: PathBuf,
    /// The scene that the tools answer from (JSON)
    #[arg(long)]
    scene: PathBuf,
    /// Print {"answer": …} or {"error": {…}} on one line
    #[arg(long)]
    json: bool,
    /// Settings that replace the built-in ones (TOML); those of sandbox count
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// One setting, such as sandbox.seconds=2; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    executor: ExecutorArgs,
}

/// Runs the subcommand. Errors are bad usage or input.
pub fn run(args: ProgramArgs) -> anyhow::Result<ExitCode> {
    let ProgramCommand::Run(args) = args.command;
    let sets = [args.set, args.executor.sets()].concat();
    let config = Config::resolve(args.config.as_deref(), &sets)?;
    let source = read(&args.file)?;
    let scene =
        std::fs::read(&args.scene).with_context(|| format!("cannot read {}", args.scene.display()))?;
    let scene: Scene =
        serde_json::from_slice(&scene).with_context(|| format!("{} is no scene", args.scene.display()))?;
    let mut tools = MockTools::new(scene);
    let image = tools.image().to_owned();
    let outcome = sandbox(&config.sandbox)?.run(&source, &image, &mut tools);
    let mut out = super::stdout();
    if args.json {
        writeln!(out, "{}", outcome.to_json())?;
    } else {
        match &outcome.result {
            Ok(serde_json::Value::String(answer)) => writeln!(out, "{}", shown(answer))?,
            Ok(answer) => writeln!(out, "{}", shown(&answer.to_string()))?,
            Err(error) => notice!("valor: the program failed: {}", shown(&error.to_string())),
        }
    }
    Ok(if outcome.result.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn read(file: &Path) -> anyhow::Result<String> {
    // One byte more than a program may have, so that a longer one is seen to be.
    let limit = MAX_SOURCE as u64 + 1;
    let mut bytes = vec![];
    let shown = || format!("cannot read {}", file.display());
    if file == Path::new("-") {
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes).with_context(shown)?;
    } else {
        std::fs::File::open(file).and_then(|f| f.take(limit).read_to_end(&mut bytes)).with_context(shown)?;
    }
    let too_long = bytes.len() > MAX_SOURCE;
    match String::from_utf8(bytes) {
        Ok(text) => Ok(without_bom(&text).to_owned()),
        // Cut in the middle of a character: the sandbox says that it is too long.
        Err(e) if too_long => Ok(String::from_utf8_lossy(e.as_bytes()).into_owned()),
        Err(_) => bail!("{} is not UTF-8 text", file.display()),
    }
}
