//! `valor models`: checkpoints as files.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::{fillable, gb, writable};
use crate::files::write_atomic;
use crate::fit::{self, Fit};
use crate::text::shown;
use crate::weights::hub::Hub;
use crate::weights::source::{HUB, HubSource, Source};
use crate::weights::{Checkpoint, Gguf, ModelFiles, delta, gguf, presets};

/// Fetch, check, look into and convert checkpoints
#[derive(clap::Args, Debug)]
pub struct ModelsArgs {
    #[command(subcommand)]
    command: ModelsCommand,
}

#[derive(clap::Subcommand, Debug)]
enum ModelsCommand {
    /// List presets, and what is in the cache
    List(ListArgs),
    /// Fetch models from the Hugging Face hub into its cache
    ///
    /// A pull that was broken off goes on where it stopped. Environment: HF_ENDPOINT, HF_HOME,
    /// HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE, and the usual variables of proxies.
    Pull(PullArgs),
    /// Hash what is in the cache anew and compare; or see whether checkpoints fit their networks
    ///
    /// With --headers, and for folders and files, the names and shapes of the tensors are compared with the
    /// network that the configuration describes. That reads the files' headers only, so it shows before
    /// the load what the load would refuse.
    Verify(VerifyArgs),
    /// Delete models from the cache
    Rm(RmArgs),
    /// List a checkpoint's tensors; of a GGUF file with types and bytes
    Show(ShowArgs),
    /// Write a checkpoint as one safetensors file, names as they are
    ///
    /// PyTorch's own files (.pth, .pt, .bin) are pickles, which can carry programs. They are read here
    /// without running anything; a file that names code is refused. What a GGUF file has quantised is
    /// written in f32, under the names that the hub's checkpoints have.
    Convert(ConvertArgs),
    /// Write what a training changed, at a byte a number, as a folder that stands for the whole model
    ///
    /// Half the size of the whole in f16. The numbers are rounded to 127 steps of the largest change in their
    /// row: measure the result before the whole is deleted.
    Delta(DeltaArgs),
}

#[derive(clap::Args, Debug)]
struct ListArgs {
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args, Debug)]
struct PullArgs {
    /// Presets, or hub:OWNER/NAME[@REVISION][#FILE]
    #[arg(required = true)]
    models: Vec<String>,
    /// Say what would be fetched, fetch nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(clap::Args, Debug)]
struct VerifyArgs {
    /// Presets, hub:OWNER/NAME, folders, files or embedded; all that is in the cache if none is named
    models: Vec<String>,
    /// Compare names and shapes with the network; hash nothing
    #[arg(long, conflicts_with = "delete")]
    headers: bool,
    /// Delete files that are wrong, so that the next pull brings them anew
    #[arg(long)]
    delete: bool,
}

#[derive(clap::Args, Debug)]
struct RmArgs {
    /// Presets or hub:OWNER/NAME
    #[arg(required = true)]
    models: Vec<String>,
}

#[derive(clap::Args, Debug)]
struct ShowArgs {
    /// A .safetensors, .gguf, .pth, .pt or .bin file, or a folder with one; of an adapter or a delta its own
    /// tensors, not its base's
    checkpoint: PathBuf,
    /// As JSON: name to shape; of a GGUF file name to shape, type and bytes
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args, Debug)]
struct ConvertArgs {
    /// A .pth, .pt, .bin, .gguf or .safetensors file, or a folder with one or with shards
    from: PathBuf,
    /// The safetensors file to write
    to: PathBuf,
    /// Replace a file that is there
    #[arg(long)]
    force: bool,
}

#[derive(clap::Args, Debug)]
struct DeltaArgs {
    /// The tuned model: a folder
    tuned: PathBuf,
    /// The folder to write
    to: PathBuf,
    /// What it was before, as the delta will name it: embedded-base, a folder, a preset or hub:OWNER/NAME
    #[arg(long)]
    base: String,
    /// Which part of the pipeline it is, for an embedded base
    #[arg(long, default_value = "detector", value_parser = PARTS)]
    part: String,
}

const PARTS: [&str; 5] = ["planner", "detector", "depth", "vlm", "verifier"];

pub fn run(args: ModelsArgs) -> Result<ExitCode> {
    match args.command {
        ModelsCommand::List(args) => list(&args)?,
        ModelsCommand::Pull(args) => pull(&args)?,
        ModelsCommand::Verify(args) => return verify(&args),
        ModelsCommand::Rm(args) => rm(&args)?,
        ModelsCommand::Show(args) => show(&args)?,
        ModelsCommand::Convert(args) => convert(&args)?,
        ModelsCommand::Delta(args) => write_delta(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// What a name on the command line means on the hub.
fn on_hub(name: &str) -> Result<HubSource> {
    if let Some(hub) = name.strip_prefix(HUB) {
        return HubSource::parse(hub).map_err(anyhow::Error::msg);
    }
    match presets::by_name(name) {
        Some(preset) => Ok(preset.source()),
        None => bail!(
            "{name} is no preset (the nearest is {}; valor models list shows all), nor hub:OWNER/NAME",
            presets::nearest(name, "model").name
        ),
    }
}

fn size(bytes: u64) -> String {
    if bytes < 1_000_000 {
        return format!("{:.0} kB", bytes as f64 / 1e3);
    }
    gb(bytes)
}

fn list(args: &ListArgs) -> Result<()> {
    let hub = Hub::from_env()?;
    let held = hub.held();
    let mut out = super::stdout();
    if args.json {
        let presets: Vec<_> = presets::ALL
            .iter()
            .map(|p| {
                json!({ "name": p.name, "part": p.part.word(), "source": p.source().to_string(),
                        "cached": hub.cached(&p.source()) })
            })
            .collect();
        let held: Vec<_> = held
            .iter()
            .map(|h| json!({ "repo": h.repo, "bytes": h.bytes, "incomplete_bytes": h.incomplete_bytes }))
            .collect();
        writeln!(out, "{:#}", json!({ "cache": hub.cache_folder(), "presets": presets, "held": held }))?;
        return Ok(());
    }
    writeln!(out, "{:<22} {:<18} {:<42} here", "preset", "part", "repository")?;
    for p in presets::ALL {
        let here = if hub.cached(&p.source()).is_some() { "yes" } else { "-" };
        writeln!(out, "{:<22} {:<18} {:<42} {here}", p.name, p.part.word(), p.source().to_string())?;
    }
    writeln!(out, "\nin {}:", hub.cache_folder().display())?;
    for h in &held {
        let rest = match h.incomplete_bytes {
            0 => String::new(),
            n => format!(" ({} of a pull that was broken off)", size(n)),
        };
        writeln!(out, "{:<42} {:>8}{rest}", format!("hub:{}", h.repo), size(h.bytes))?;
    }
    Ok(())
}

/// A bar for one file after another.
struct FileBar(ProgressBar, String);

impl FileBar {
    fn new() -> Result<Self> {
        let bar = ProgressBar::new(0);
        bar.set_style(ProgressStyle::with_template(
            "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} eta {eta}",
        )?);
        Ok(Self(bar, String::new()))
    }

    fn show(&mut self, file: &str, done: u64, all: u64) {
        if self.1 != file {
            self.1 = file.to_owned();
            self.0.set_message(file.to_owned());
            self.0.set_length(all);
            self.0.reset();
        }
        self.0.set_position(done);
    }
}

fn pull(args: &PullArgs) -> Result<()> {
    let hub = Hub::from_env()?;
    let sources = args.models.iter().map(|m| on_hub(m)).collect::<Result<Vec<_>>>()?;
    let mut bar = FileBar::new()?;
    for source in &sources {
        let listing = hub.listing(source)?;
        let files = listing.of_model(source)?;
        let all: u64 = files.iter().map(|f| f.bytes).sum();
        let missing = hub.missing(source, &files);
        notice!("{source}: {} files, {}, {} to fetch", files.len(), size(all), size(missing));
        if args.dry_run {
            for file in &files {
                println!("{} {}", file.bytes, file.name);
            }
            continue;
        }
        let folder = hub.pull(source, &listing, &files, &mut |file, done, all| bar.show(file, done, all));
        bar.0.finish_and_clear();
        let folder = folder?;
        println!("{}", folder.display());
        if let Some(more) = lacks(&hub, ModelFiles::Folder(folder)) {
            notice!("valor: {source} {more}");
        }
    }
    Ok(())
}

/// What has to be here too before these files are a model, if they lie on another.
fn lacks(hub: &Hub, files: ModelFiles) -> Option<String> {
    let base = match files.base() {
        Ok(base) => base?,
        Err(e) => return Some(format!("cannot be used as it is: {e}")),
    };
    let wanted = match Source::parse(&base) {
        Ok(Source::Hub(wanted)) => wanted,
        Ok(Source::Preset(preset)) => preset.source(),
        Ok(Source::Path(path)) if !path.exists() => {
            return Some(format!(
                "lies on {base}, which is not here; put it there, or name another base in its adapter_config.json \
                 or delta_config.json"
            ));
        }
        _ => return None,
    };
    let told = || format!("lies on {base}, which is needed too: valor models pull {base}");
    hub.cached(&wanted).is_none().then(told)
}

fn verify(args: &VerifyArgs) -> Result<ExitCode> {
    let hub = Hub::from_env()?;
    let models = match args.models[..] {
        [] => hub.held().into_iter().map(|h| format!("{HUB}{}", h.repo)).collect(),
        _ => args.models.clone(),
    };
    if models.is_empty() {
        println!("no models in {}", hub.cache_folder().display());
    }
    let is_here = |model: &String| match Source::parse(model) {
        Ok(Source::Path(p)) => p.exists(),
        Ok(Source::Embedded { .. }) => true,
        _ => false,
    };
    let (to_fit, to_hash): (Vec<_>, Vec<_>) = models.into_iter().partition(|m| args.headers || is_here(m));
    // Of one's own files nothing is hashed, and no pull would bring them anew.
    if let Some(model) = to_fit.first().filter(|_| args.delete) {
        bail!(
            "--delete says nothing to {model}: it is for what a pull has brought, a preset or hub:OWNER/NAME"
        )
    }
    let mut wrong = to_fit.iter().filter(|model| !fits(model)).count();
    let mut bar = FileBar::new()?;
    for repo in to_hash.iter().map(|m| Ok(on_hub(m)?.repo)).collect::<Result<Vec<_>>>()? {
        let files = hub
            .verify(&repo, &mut |file, done, all| bar.show(file, done, all))
            .with_context(|| format!("hub:{repo}"))?;
        bar.0.finish_and_clear();
        let (count, mut wrong_here) = (files.len(), 0);
        for (name, problem) in files {
            let Some(problem) = problem else { continue };
            wrong_here += 1;
            println!("hub:{repo} {name}: {problem}");
            if args.delete {
                hub.forget(&repo, &name)?;
                notice!("valor: deleted; valor models pull hub:{repo} brings it anew");
            }
        }
        println!("hub:{repo}: {count} files hashed, {wrong_here} wrong");
        wrong += wrong_here;
    }
    Ok(if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The models in the binary.
const EMBEDDED_PARTS: [&str; 6] = ["planner", "detector", "depth", "vlm", "verifier", "box-verifier"];

/// Says whether a checkpoint fits its network.
fn fits(model: &str) -> bool {
    if matches!(Source::parse(model), Ok(Source::Embedded { .. })) {
        let told = EMBEDDED_PARTS.map(|part| tell(fit_of(model, part)));
        return told.iter().all(|fits| *fits);
    }
    let Err(e) = ModelFiles::open(model, "model") else { return tell(fit_of(model, "model")) };
    // What lies on an embedded model does not say on which: where it fits or, failing that, has most to change.
    let strangers = |why: &String| {
        let said = ["which the base has not", "is none of the base's"];
        1 + said.iter().map(|said| why.matches(said).count()).sum::<usize>()
    };
    let on = EMBEDDED_PARTS.into_iter().filter(|part| ModelFiles::open(model, part).is_ok());
    let tried = on.map(|part| fit_of(model, part));
    let best = tried.min_by_key(|fit| fit.as_ref().map_or_else(strangers, |_| 0));
    tell(best.unwrap_or(Err(e.to_string())))
}

/// How a model fits its network, with its name; or why it does not.
fn fit_of(model: &str, part: &'static str) -> Result<(String, Fit), String> {
    let files = ModelFiles::open(model, part).map_err(|e| e.to_string())?;
    let fit = fit::check(&files).map_err(|e| e.to_string())?;
    Ok((if part == "model" { model.to_owned() } else { files.name() }, fit))
}

fn tell(fit: Result<(String, Fit), String>) -> bool {
    match &fit {
        Ok((name, fit)) => println!(
            "{name}: fits as {}: {} tensors, {:.1} M parameters, {} when loaded",
            fit.part.word(),
            fit.tensors,
            fit.parameters as f64 / 1e6,
            gb(fit.loaded_bytes)
        ),
        Err(why) => println!("{}", shown(why)),
    }
    fit.is_ok()
}

fn rm(args: &RmArgs) -> Result<()> {
    let hub = Hub::from_env()?;
    let sources = args.models.iter().map(|m| on_hub(m)).collect::<Result<Vec<_>>>()?;
    for source in sources {
        let freed = hub.remove(&source.repo)?;
        notice!("hub:{}: {} freed", source.repo, size(freed));
    }
    Ok(())
}

fn show(args: &ShowArgs) -> Result<()> {
    if args.checkpoint.to_str().is_some_and(gguf::is_gguf) {
        return show_gguf(args);
    }
    let lies_on = match args.checkpoint.is_dir() {
        true => ModelFiles::Folder(args.checkpoint.clone()).own_weights()?,
        false => None,
    };
    let (file, base) = lies_on.map_or((args.checkpoint.clone(), None), |(file, base)| (file, Some(base)));
    let shapes = Checkpoint::open(&file)?.shapes();
    let mut out = super::stdout();
    if args.json {
        writeln!(out, "{:#}", json!(shapes))?;
        return Ok(());
    }
    for (name, shape) in &shapes {
        writeln!(out, "{} {shape:?}", shown(name))?;
    }
    let parameters: usize = shapes.values().map(|shape| shape.iter().product::<usize>()).sum();
    let what = base.map_or(String::new(), |base| format!(", what was changed of {base}"));
    notice!("{} tensors, {parameters} numbers{what}", shapes.len());
    Ok(())
}

/// As the file has them: of any network, under its own names.
fn show_gguf(args: &ShowArgs) -> Result<()> {
    let file = Gguf::open(&args.checkpoint)?;
    let mut out = super::stdout();
    if args.json {
        let one = |t: &gguf::Stored| json!({ "shape": t.shape, "type": t.kind.name, "bytes": t.place.len() });
        let all: serde_json::Map<_, _> =
            file.tensors().iter().map(|(name, t)| (name.clone(), one(t))).collect();
        writeln!(out, "{:#}", json!(all))?;
        return Ok(());
    }
    let (mut numbers, mut bytes) = (0, 0);
    for (name, t) in file.tensors() {
        let held = size(t.place.len() as u64);
        writeln!(out, "{} {:?} {} {held}", shown(name), t.shape, t.kind.name)?;
        numbers += t.shape.iter().product::<usize>();
        bytes += t.place.len();
    }
    let architecture = file.architecture()?;
    let (architecture, count) = (shown(architecture), file.tensors().len());
    notice!("{architecture}: {count} tensors, {numbers} numbers, {}", size(bytes as u64));
    Ok(())
}

fn write_delta(args: &DeltaArgs) -> Result<()> {
    ensure!(!args.to.exists(), "{} is there already; name another folder", args.to.display());
    fillable("the new folder", Some(&args.to))?;
    let part = PARTS.into_iter().find(|p| *p == args.part).context("no such part")?;
    let base = ModelFiles::open(&args.base, part)?.checkpoint()?;
    let tuned = ModelFiles::open(&args.tuned.display().to_string(), part)?.checkpoint()?;
    let changes = delta::between(&base, &tuned)?;
    ensure!(!changes.is_empty(), "{} is the same as {}", args.tuned.display(), args.base);
    let count = changes.len() / 2;
    let bytes = safetensors::serialize(changes, None).context("the differences as safetensors")?;
    std::fs::create_dir_all(&args.to).with_context(|| args.to.display().to_string())?;
    write_atomic(&args.to.join(delta::WEIGHTS), |w| w.write_all(&bytes))?;
    let config = serde_json::to_string_pretty(&delta::Config { base: args.base.clone() })?;
    write_atomic(&args.to.join(delta::CONFIG), |w| writeln!(w, "{config}"))?;
    notice!("{count} tensors changed, {:.1} MB: {}", bytes.len() as f64 / 1e6, args.to.display());
    Ok(())
}

fn convert(args: &ConvertArgs) -> Result<()> {
    let ending = args.to.extension().and_then(|e| e.to_str());
    ensure!(ending == Some("safetensors"), "{}: the new file must end in .safetensors", args.to.display());
    ensure!(args.force || !args.to.exists(), "{} is there already; --force replaces it", args.to.display());
    writable("the new file", Some(&args.to))?;
    let tensors = Checkpoint::open(&args.from)?.tensors()?;
    let count = tensors.len();
    let bytes = safetensors::serialize(tensors, None)
        .with_context(|| format!("{} as safetensors", args.from.display()))?;
    write_atomic(&args.to, |w| w.write_all(&bytes))?;
    notice!("{count} tensors, {:.1} MB: {}", bytes.len() as f64 / 1e6, args.to.display());
    Ok(())
}
