//! Arguments, and one thin file per subcommand: build the parts, call, print.
//!
//! Exit codes: 0 done, 1 the work failed, 2 bad usage or input. Answers go to stdout, everything
//! else to stderr; a broken pipe is not an error.

mod benches;
mod config;
mod doctor;
mod eval;
mod infer;
mod make_queries;
mod models;
mod parts;
mod program;
mod rooms;
mod train_reasoner;
mod tune_grounding;
mod verify;

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use candle_core::Device;
use clap::{CommandFactory, Parser, Subcommand};

use crate::config::{Config, ENDPOINT, Origins};
use crate::files;
use crate::llm::ChatError;
use crate::llm::endpoint::{Endpoint, key_problem};
use crate::nn::Precision;
use crate::text::{shown, without_bom};
use crate::weights::hub::HubError;
use crate::weights::source::Source;
use crate::weights::{ModelFiles, WeightsError, message_of};

#[derive(Debug, Parser)]
#[command(name = "valor", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answer a question about a picture
    Infer(infer::InferArgs),
    /// Print a shell's completions, to be put where it looks for them
    Completions {
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Look at the configuration
    Config(config::ConfigArgs),
    /// Look at this machine, and at which configurations would run on it
    Doctor(doctor::DoctorArgs),
    /// Measure planners and tools on benches
    Eval(eval::EvalArgs),
    /// Gather questions about pictures to train on: written by a VLM, or of published training splits
    MakeQueries(make_queries::MakeQueriesArgs),
    /// Print the manual page (roff), for man -l -
    Man,
    /// Fetch, check, look into and convert checkpoints
    Models(models::ModelsArgs),
    /// Run planners' programs
    Program(program::ProgramArgs),
    /// The synthetic world
    Rooms(rooms::RoomsArgs),
    /// Train the planner on questions without answers, rewarded by a verifier
    TrainReasoner(train_reasoner::TrainReasonerArgs),
    /// Tune the detector on boxes that a verifier stands by
    TuneGrounding(tune_grounding::TuneGroundingArgs),
    /// Judge planners' replies as the reward of training does, and judge the judge
    Verify(verify::VerifyArgs),
}

/// Which models, with what settings, where: the same for every command that uses them.
#[derive(Debug, clap::Args)]
struct ModelArgs {
    /// Settings that replace the built-in ones (TOML)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// One setting, such as planner.temperature=0; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The planner's instructions: rooms, general, or a file that is used byte for byte
    #[arg(long, value_name = "FILE")]
    prompt: Option<String>,
    /// Where networks run: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
}

/// Who runs planners' programs.
#[derive(Debug, clap::Args)]
struct ExecutorArgs {
    /// Who runs programs: the interpreter in this binary, or the system's Python (sandbox.executor)
    #[arg(long, value_parser = ["embedded", "cpython"])]
    executor: Option<String>,
    /// Who runs programs that the embedded interpreter does not support (sandbox.fallback)
    #[arg(long, value_parser = ["none", "cpython"])]
    fallback: Option<String>,
}

impl ExecutorArgs {
    /// The settings that these options stand for.
    fn sets(&self) -> Vec<String> {
        let executor = self.executor.iter().map(|name| format!("sandbox.executor={name}"));
        let fallback = self.fallback.iter().map(|name| format!("sandbox.fallback={name}"));
        executor.chain(fallback).collect()
    }
}

/// The settings that options about a planner's replies stand for.
fn planning_sets(greedy: bool, samples: Option<u64>, repairs: Option<usize>) -> Vec<String> {
    let greedy = greedy.then(|| "planner.temperature=0".to_owned());
    let samples = samples.map(|n| format!("inference.samples={n}"));
    let repairs = repairs.map(|n| format!("inference.repairs={n}"));
    [greedy, samples, repairs].into_iter().flatten().collect()
}

impl ModelArgs {
    fn config(&self) -> anyhow::Result<Config> {
        Ok(self.explain(&[])?.0)
    }

    /// With more settings, from options that stand for some; and where each came from.
    fn explain(&self, sets: &[String]) -> anyhow::Result<(Config, Origins)> {
        let set = [&self.set[..], sets].concat();
        let (mut config, mut origins) = Config::explain(self.config.as_deref(), &set)?;
        if let Some(prompt) = &self.prompt {
            config.planner.prompt.clone_from(prompt);
            origins.insert("planner.prompt".into(), format!("--prompt {prompt}"));
        }
        Ok((config, origins))
    }

    /// The GPU that --device names, `None` of the processor; whether it is there is not looked at.
    fn gpu(&self) -> anyhow::Result<Option<usize>> {
        let ordinal = match self.device.split_once(':') {
            None if self.device == "cpu" => return Ok(None),
            None if self.device == "cuda" => Some(0),
            Some(("cuda", n)) => n.parse().ok(),
            _ => None,
        };
        match ordinal {
            Some(_) => Ok(ordinal),
            None => anyhow::bail!("--device {}: expected cpu, cuda or cuda:N", self.device),
        }
    }

    fn device(&self) -> anyhow::Result<Device> {
        let Some(ordinal) = self.gpu()? else { return Ok(Device::Cpu) };
        if !candle_core::utils::cuda_is_available() {
            anyhow::bail!(
                "--device {}: this build has no CUDA; build with --features cuda, or use --device cpu",
                self.device
            )
        }
        crate::nn::gpu(ordinal).with_context(|| format!("--device {}", self.device))
    }
}

/// Stdout, whose errors say that they are its.
struct Stdout(io::StdoutLock<'static>);

fn stdout() -> Stdout {
    Stdout(io::stdout().lock())
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(|e| files::named("stdout", e))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(|e| files::named("stdout", e))
    }
}

/// `println!` panics where nobody reads on, or the disk is full: the one is no error, the other one line.
fn mind_stdout() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let said = panic.payload().downcast_ref::<String>().map_or("", String::as_str);
        match said.strip_prefix("failed printing to stdout: ") {
            Some(why) if why.contains("Broken pipe") => std::process::exit(0),
            Some(why) => {
                notice!("valor: cannot write to stdout: {why}");
                std::process::exit(1)
            }
            None => usual(panic),
        }
    }));
}

/// Parses the command line, runs what it asks for, gives the exit code.
pub fn main() -> ExitCode {
    crate::nn::keep_freed_memory();
    mind_stdout();
    let result = match Cli::parse().command {
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "valor", &mut text);
            stdout().write_all(&text).map_err(Into::into).map(|()| ExitCode::SUCCESS)
        }
        Command::Config(args) => config::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Infer(args) => infer::run(args),
        Command::MakeQueries(args) => make_queries::run(&args),
        Command::Man => man(),
        Command::Models(args) => models::run(args),
        Command::Program(args) => program::run(args),
        Command::Rooms(args) => rooms::run(args),
        Command::TrainReasoner(args) => train_reasoner::run(&args),
        Command::TuneGrounding(args) => tune_grounding::run(&args),
        Command::Verify(args) => verify::run(args),
    };
    match result {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            notice!("valor: {}", one_line(&error));
            if is_outage(&error) { ExitCode::FAILURE } else { ExitCode::from(2) }
        }
    }
}

/// The page of the whole command, those of its subcommands behind it.
fn man() -> anyhow::Result<ExitCode> {
    fn pages(command: clap::Command, name: &str, out: &mut Vec<u8>) -> io::Result<()> {
        let name = name.to_owned();
        clap_mangen::Man::new(command.clone().name(name.clone())).render(out)?;
        for sub in command.get_subcommands().filter(|s| !s.is_hide_set() && s.get_name() != "help") {
            pages(sub.clone(), &format!("{name}-{}", sub.get_name()), out)?;
        }
        Ok(())
    }
    let mut out = Vec::new();
    pages(Cli::command(), "valor", &mut out)?;
    stdout().write_all(&out)?;
    Ok(ExitCode::SUCCESS)
}

/// The lines of a JSON-lines text that are not empty, with their numbers; `name` and `expected` are for
/// error messages.
fn json_lines<T: serde::de::DeserializeOwned>(
    text: &str,
    name: &str,
    expected: &str,
) -> anyhow::Result<Vec<(usize, T)>> {
    let lines = without_bom(text).lines().zip(1..).filter(|(l, _)| !l.trim().is_empty());
    let read = lines.map(|(l, number)| {
        let value = serde_json::from_str(l);
        Ok((number, value.with_context(|| format!("{name}, line {number}: expected {expected}"))?))
    });
    read.collect()
}

/// That the file which an option names can be written. Asked before anything is loaded, as it is written
/// after the work.
fn writable(option: &str, file: Option<&Path>) -> anyhow::Result<()> {
    let Some(file) = file else { return Ok(()) };
    files::can_write(file).map_err(|e| unwritable(option, file, "written", e, "file"))
}

/// Why an option's file or folder cannot be written, with the remedy; what the system said stays its cause.
fn unwritable(option: &str, path: &Path, what: &str, e: io::Error, other: &str) -> anyhow::Error {
    let told = format!("{option} {} cannot be {what}: {e}; name another {other}", path.display());
    anyhow::Error::new(e).context(told)
}

/// The same of a file of JSON lines with these keys: what is there already, and is no earlier result of the kind,
/// is not written over.
fn replaceable(option: &str, file: Option<&Path>, keys: &[&str]) -> anyhow::Result<()> {
    writable(option, file)?;
    let Some(file) = file.filter(|f| f.is_file()) else { return Ok(()) };
    let is_row = |line: &str| {
        let row = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(line);
        row.is_ok_and(|row| keys.iter().all(|key| row.contains_key(*key)))
    };
    // What cannot be read, as it is no text, is none either.
    if std::fs::read_to_string(file).is_ok_and(|text| text.lines().all(is_row)) {
        return Ok(());
    }
    Err(anyhow!(
        "{option} {} is there and is no earlier result of this command; name another file",
        file.display()
    ))
}

/// The same of a file that grows.
fn appendable(option: &str, file: &Path) -> anyhow::Result<()> {
    files::can_append(file).map_err(|e| unwritable(option, file, "written", e, "file"))
}

/// The same of a folder.
fn fillable(option: &str, dir: Option<&Path>) -> anyhow::Result<()> {
    let Some(dir) = dir else { return Ok(()) };
    files::can_fill(dir).map_err(|e| unwritable(option, dir, "written to", e, "folder"))
}

/// Is a part's model one of the hub's that a pull has yet to bring? A dry run plans without it; what is here and broken
/// it refuses, as the run does.
fn to_be_fetched(model: &str, part: &'static str) -> bool {
    let of_hub = matches!(Source::parse(model), Ok(Source::Hub(_) | Source::Preset(_)));
    of_hub && matches!(ModelFiles::open(model, part), Err(WeightsError::NotFetched { .. }))
}

/// That the servers which these models name can be asked: their settings, and that their keys are there. Nothing is
/// sent. A dry run, which gets a line about each key, is planned without them.
fn servers(config: &Config, models: &[&str], dry_run: bool) -> anyhow::Result<Vec<String>> {
    let names: BTreeSet<&str> = models.iter().filter_map(|model| model.strip_prefix(ENDPOINT)).collect();
    let mut keys = Vec::new();
    for name in names {
        let endpoint = &config.endpoints[name];
        let key = if dry_run { String::new() } else { endpoint.key_env.clone() };
        Endpoint::new(name, &crate::config::Endpoint { key_env: key, ..endpoint.clone() })?;
        if !endpoint.key_env.is_empty() {
            let told = match key_problem(endpoint) {
                Some(why) => format!("missing for endpoint {name}: {why}"),
                None => format!("{} of the environment, for endpoint {name}", endpoint.key_env),
            };
            keys.push(format!("key              {told}"));
        }
    }
    Ok(keys)
}

/// The exit code of work in which a verifier's server kept silent so many times, and what is to be done.
fn all_heard(silent: usize) -> ExitCode {
    if silent == 0 {
        return ExitCode::SUCCESS;
    }
    notice!(
        "valor: the verifier's server kept silent about {silent} of what it was asked, which counts nowhere; run the \
         same command again (verifier.cache keeps what it said)"
    );
    ExitCode::FAILURE
}

/// Chooses the precision of matrix products, and says so where the processor makes nothing of it.
fn compute_in(precision: Precision, device: &Device) {
    precision.choose();
    if device.is_cpu() && precision != Precision::F32 && !crate::nn::precision::fast() {
        notice!(
            "valor: this processor has no AMX: matrix products stay f32 whatever the precision asked for"
        );
    }
}

/// Bytes for people.
fn gb(bytes: u64) -> String {
    if bytes < 1_000_000_000 {
        return format!("{:.0} MB", bytes as f64 / 1e6);
    }
    format!("{:.1} GB", bytes as f64 / 1e9)
}

/// The error and its causes on one line, which commands no terminal. A cause that stands in the text already
/// is not repeated.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let cause = cause.downcast_ref().map_or_else(|| cause.to_string(), message_of);
        let cause = cause.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join("; ");
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    shown(&line).into_owned()
}

/// Did the hub, the network, a disk or a model's server fail, and not what was asked for?
fn is_outage(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref().is_some_and(HubError::is_outage)
            || cause.downcast_ref().is_some_and(ChatError::is_of_server)
            || cause.downcast_ref().is_some_and(files::is_of_disk)
            || cause.downcast_ref().and_then(io_of).is_some_and(files::is_of_disk)
    })
}

/// What the system said, where candle has it: its errors do not tell of it as their cause.
fn io_of(error: &candle_core::Error) -> Option<&io::Error> {
    use candle_core::Error;
    match error {
        Error::Io(e) => Some(e),
        Error::WithBacktrace { inner, .. } | Error::Context { inner, .. } | Error::WithPath { inner, .. } => {
            io_of(inner)
        }
        _ => None,
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>());
    io.is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn an_error_is_one_line_and_says_nothing_twice() {
        let open = crate::sight::Picture::open(std::path::Path::new("/no/such.png"));
        let line = one_line(&open.context("first\n  second\n").unwrap_err());
        assert!(line.starts_with("first; second: cannot open picture /no/such.png: "), "{line}");
        assert_eq!(line.matches("os error").count(), 1, "{line}");
        assert_eq!(one_line(&anyhow!("a\x1b[31m\u{202e}b\nc")), "a\\x1b[31m\\u{202e}b; c");
    }

    #[test]
    fn lines_are_read_behind_a_byte_order_mark() {
        let read: Vec<(usize, u8)> = json_lines("\u{feff}1\r\n\n2\n", "a.jsonl", "a number").unwrap();
        assert_eq!(read, [(1, 1), (3, 2)]);
    }

    #[test]
    fn a_server_that_fails_is_an_outage_and_one_that_is_not_configured_is_none() {
        let told =
            |e: ChatError| is_outage(&anyhow::Error::from(crate::verify::JudgeError::from(e)).context("x"));
        assert!(told(ChatError::NoReply("busy".into())) && told(ChatError::Closed("no money".into())));
        assert!(!told(ChatError::Request("endpoints.a.key_env: the environment has no A".into())));
    }

    #[cfg(unix)]
    #[test]
    fn a_full_disk_is_an_outage_and_a_folder_that_may_not_be_written_is_none() {
        let of = |code| files::named("x", io::Error::from_raw_os_error(code));
        for (code, is) in [(libc::ENOSPC, true), (libc::EIO, true), (libc::EACCES, false)] {
            let told = [
                anyhow::Error::from(of(code)).context("y"),
                anyhow::Error::from(candle_core::Error::Io(io::Error::from_raw_os_error(code))),
                anyhow::Error::from(candle_core::Error::Io(of(code)).context("y")),
                unwritable("--out", Path::new("x"), "written", of(code), "file"),
            ];
            told.iter().for_each(|e| assert_eq!(is_outage(e), is, "{e:?}"));
            // What the system said is said once.
            assert_eq!(one_line(&told[3]).matches("os error").count(), 1, "{}", one_line(&told[3]));
        }
    }

    #[test]
    fn an_error_is_told_without_its_stack() {
        let inner = Box::new(candle_core::Error::Msg("wrong shape".into()));
        let backtrace = Box::new(std::backtrace::Backtrace::force_capture());
        let e = anyhow::Error::from(candle_core::Error::WithBacktrace { inner, backtrace });
        assert_eq!(one_line(&e.context("the detector")), "the detector: wrong shape");
    }
}
