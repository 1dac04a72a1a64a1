//! `valor models`: checkpoints as files.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::files::write_atomic;
use crate::weights::Checkpoint;

/// Look into checkpoints and convert them
#[derive(clap::Args, Debug)]
pub struct ModelsArgs {
    #[command(subcommand)]
    command: ModelsCommand,
}

#[derive(clap::Subcommand, Debug)]
enum ModelsCommand {
    /// List a checkpoint's tensors
    Show(ShowArgs),
    /// Write a checkpoint as one safetensors file, names as they are
    ///
    /// PyTorch's own files (.pth, .pt, .bin) are pickles, which can carry programs. They are read here
    /// without running anything; a file that names code is refused.
    Convert(ConvertArgs),
}

#[derive(clap::Args, Debug)]
struct ShowArgs {
    /// A .safetensors, .pth, .pt or .bin file, or a folder with one
    checkpoint: PathBuf,
    /// As JSON: name to shape
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args, Debug)]
struct ConvertArgs {
    /// A .pth, .pt, .bin or .safetensors file, or a folder with one or with shards
    from: PathBuf,
    /// The safetensors file to write
    to: PathBuf,
    /// Replace a file that is there
    #[arg(long)]
    force: bool,
}

pub fn run(args: ModelsArgs) -> Result<ExitCode> {
    match args.command {
        ModelsCommand::Show(args) => show(&args)?,
        ModelsCommand::Convert(args) => convert(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn show(args: &ShowArgs) -> Result<()> {
    let shapes = Checkpoint::open(&args.checkpoint)?.shapes();
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{:#}", json!(shapes))?;
        return Ok(());
    }
    for (name, shape) in &shapes {
        writeln!(out, "{name} {shape:?}")?;
    }
    let parameters: usize = shapes.values().map(|shape| shape.iter().product::<usize>()).sum();
    eprintln!("{} tensors, {parameters} numbers", shapes.len());
    Ok(())
}

fn convert(args: &ConvertArgs) -> Result<()> {
    let ending = args.to.extension().and_then(|e| e.to_str());
    ensure!(ending == Some("safetensors"), "{}: the new file must end in .safetensors", args.to.display());
    ensure!(args.force || !args.to.exists(), "{} is there already; --force replaces it", args.to.display());
    let tensors = Checkpoint::open(&args.from)?.tensors()?;
    let count = tensors.len();
    let bytes = safetensors::serialize(tensors, None)
        .with_context(|| format!("{} as safetensors", args.from.display()))?;
    write_atomic(&args.to, |w| w.write_all(&bytes))?;
    eprintln!("{count} tensors, {:.1} MB: {}", bytes.len() as f64 / 1e6, args.to.display());
    Ok(())
}
