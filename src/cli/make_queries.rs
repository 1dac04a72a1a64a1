//! `valor make-queries`: questions about pictures, to train on.

use super::{ModelArgs, appendable};
use crate::data::Links;
use crate::data::training::{Split, TrainingSet};
use crate::files::write_atomic;
use crate::llm::ChatModels;
use crate::report::pulse::Pulse;
use crate::sight::Picture;
use crate::sight::picture::DecodeOptions;
use crate::text::shown;
use crate::train::reasoner::make::{make, pictures};
use crate::weights::hub::Hub;
use anyhow::{Context, Result, ensure};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Gather questions about pictures to train on: written by a VLM, or of published training splits
#[derive(Debug, clap::Args)]
// A group, so that where neither is given both are named.
#[command(group(clap::ArgGroup::new("pictures").args(["images", "from"]).required(true)))]
pub struct MakeQueriesArgs {
    /// Folder of unlabelled pictures, about which the VLM writes spatial questions
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Training splits to draw questions from, as many of each as they have; their pictures are written to images/ beside
    /// --out. VSR's are fetched from the web
    #[arg(long, value_name = "SETS", value_delimiter = ',')]
    from: Vec<TrainingSet>,
    /// Folder that holds the training splits' files, each set's in one of its name, in place of the hub's cache
    #[arg(long, value_name = "DIR", requires = "from", conflicts_with = "images")]
    data: Option<PathBuf>,
    /// Fetch training splits that are not in the hub's cache
    #[arg(long, requires = "from", conflicts_with_all = ["data", "images"])]
    pull: bool,
    /// Questions in all
    #[arg(long, short, default_value_t = 800)]
    n: usize,
    /// JSON lines {"image", "question"}; of --images a file that is there is gone on with
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
    appendable("--out", &args.out)?;
    match &args.images {
        Some(images) => written(args, images),
        None => drawn(args),
    }
}

/// By a VLM.
fn written(args: &MakeQueriesArgs, images: &Path) -> Result<ExitCode> {
    let (config, device) = (args.models.config()?, args.models.device()?);
    let pictures = pictures(images)?;
    ensure!(
        config.vlm.model != crate::weights::source::EMBEDDED,
        "vlm.model: the embedded VLM answers about crops and writes no questions; name another, such as with \
         --config configs/api.toml"
    );
    let chats = ChatModels::new(&config, &device);
    let vlm = chats.vlm()?;
    notice!("valor: {} pictures, VLM {}", pictures.len(), vlm.name());
    let bar = ProgressBar::new(args.n as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} questions {elapsed} eta {eta}")?);
    let mut pulse = Pulse::default();
    let made = make(&*vlm, args.max_new_tokens, &pictures, args.n, &args.out, args.seed, |n| {
        bar.set_position(n as u64);
        pulse.beat(&bar);
    });
    bar.finish_and_clear();
    for (name, usage) in chats.usage() {
        notice!("valor: endpoint {name}: {}", serde_json::to_string(&usage)?);
    }
    let made = made?;
    for why in &made.unreadable {
        notice!("valor: passed over: {}", shown(why));
    }
    notice!(
        "valor: {} holds {} questions; dropped {} that were none or not new, {} replies were of no use",
        args.out.display(),
        made.questions,
        made.dropped,
        made.failed
    );
    println!("{}", args.out.display());
    Ok(if made.questions >= args.n { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Of training splits.
fn drawn(args: &MakeQueriesArgs) -> Result<ExitCode> {
    /// Reasons that are printed; the rest are counted.
    const REASONS: usize = 5;
    ensure!(!args.out.exists(), "--out {}: is there; name a new file", args.out.display());
    let hub = Hub::from_env()?;
    let links = Links::new(match &args.data {
        Some(data) => data.join("fetched"),
        None => hub.cache_folder().join("valor-pictures"),
    });
    let out = args.out.parent().unwrap_or(Path::new(""));
    // All are opened before the first is read: a long pass is not to end with another set's missing file.
    let sets: BTreeSet<TrainingSet> = args.from.iter().copied().collect();
    let mut splits = Vec::new();
    for set in sets {
        let split = match &args.data {
            Some(data) => set.local(data).and_then(|folder| Split::open(set, &folder))?,
            None => match set.cached(&hub).and_then(|folder| Split::open(set, &folder)) {
                Ok(split) => split,
                Err(_) if args.pull => Split::open(set, &pulled(set, &hub)?)?,
                Err(e) => return Err(e.into()),
            },
        };
        splits.push(split);
    }
    // What small sets cannot give falls to the larger ones.
    splits.sort_by_key(Split::questions);
    let (mut queries, mut left) = (Vec::new(), splits.len());
    let check = |bytes: &[u8]| {
        Picture::decode(bytes, "its picture", DecodeOptions::default()).map(|_| ()).map_err(|e| e.to_string())
    };
    for split in splits {
        let share = (args.n - queries.len()) / left;
        left -= 1;
        if share == 0 {
            continue;
        }
        let name = split.set().name();
        let bar = ProgressBar::new(0);
        bar.set_style(ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} rows eta {eta}")?);
        bar.set_message(name);
        let mut pulse = Pulse::default();
        let drawn = split.draw((share, args.seed), &links, out, &check, |row, of| {
            bar.set_length(of as u64);
            bar.set_position(row as u64);
            pulse.beat(&bar);
        })?;
        bar.finish_and_clear();
        notice!("valor: {name}: {} questions of {share}", drawn.queries.len());
        for why in drawn.passed_over.iter().take(REASONS) {
            notice!("valor: passed over: {}", shown(why));
        }
        if drawn.passed_over.len() > REASONS {
            notice!("valor: passed over: {} more", drawn.passed_over.len() - REASONS);
        }
        queries.extend(drawn.queries);
    }
    ensure!(!queries.is_empty(), "no question of --from could be used; the reasons are above");
    write_atomic(&args.out, |w| {
        queries
            .iter()
            .try_for_each(|q| writeln!(w, "{}", serde_json::to_string(q).map_err(std::io::Error::other)?))
    })
    .with_context(|| format!("--out {}", args.out.display()))?;
    notice!("valor: {} holds {} questions of {}", args.out.display(), queries.len(), args.n);
    println!("{}", args.out.display());
    Ok(if queries.len() >= args.n { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A set's files, fetched.
fn pulled(set: TrainingSet, hub: &Hub) -> Result<PathBuf> {
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} eta {eta}")?);
    let say = |missing| notice!("valor: {}: {} to fetch", set.repo(), HumanBytes(missing));
    let folder = set.pull(hub, say, |file, done, all| {
        bar.set_message(file.to_owned());
        bar.set_length(all);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    Ok(folder)
}
