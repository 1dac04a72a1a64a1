//! `valor make-queries`: questions about unlabelled pictures, to train on.

use super::ModelArgs;
use crate::llm::ChatModels;
use crate::train::reasoner::make::{make, pictures};
use anyhow::{Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;
use std::process::ExitCode;

/// Have a VLM write spatial questions about unlabelled pictures
#[derive(Debug, clap::Args)]
pub struct MakeQueriesArgs {
    /// Folder of pictures
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// Questions in all
    #[arg(long, default_value_t = 800)]
    n: usize,
    /// JSON lines {"image", "question"}; a file that is there is gone on with
    #[arg(long, value_name = "FILE", default_value = "queries.jsonl")]
    out: PathBuf,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Tokens of a reply at most
    #[arg(long, default_value_t = 1024)]
    max_new_tokens: usize,
    #[command(flatten)]
    models: ModelArgs,
}

pub fn run(args: &MakeQueriesArgs) -> Result<ExitCode> {
    ensure!(args.n > 0, "--n must be at least 1");
    let (config, device) = (args.models.config()?, args.models.device()?);
    let pictures = pictures(&args.images)?;
    ensure!(
        config.vlm.model != crate::config::EMBEDDED,
        "vlm.model: the embedded VLM answers about crops and writes no questions; name another, such as with \
         --config configs/api.toml"
    );
    let chats = ChatModels::new(&config, &device);
    let vlm = chats.vlm()?;
    eprintln!("valor: {} pictures, VLM {}", pictures.len(), vlm.name());
    let bar = ProgressBar::new(args.n as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} questions {elapsed} eta {eta}")?);
    let made = make(&*vlm, args.max_new_tokens, &pictures, args.n, &args.out, args.seed, |n| {
        bar.set_position(n as u64)
    });
    bar.finish_and_clear();
    for (name, usage) in chats.usage() {
        eprintln!("valor: endpoint {name}: {}", serde_json::to_string(&usage)?);
    }
    let made = made?;
    for why in &made.unreadable {
        eprintln!("valor: passed over: {why}");
    }
    eprintln!(
        "valor: {} holds {} questions; dropped {} that were none or not new, {} replies were of no use",
        args.out.display(),
        made.questions,
        made.dropped,
        made.failed
    );
    println!("{}", args.out.display());
    Ok(if made.questions >= args.n { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
