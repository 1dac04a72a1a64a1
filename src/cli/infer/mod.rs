//! `valor infer`: a picture and a question in, an answer out; or many at once.

mod batch;
mod settings;
mod waiting;

use super::{ExecutorArgs, ModelArgs, planning_sets, writable};
use crate::config::Config;
use crate::eval::benches::record::NO_REPLY;
use crate::files::{is_one_place, is_same, write_atomic};
use crate::llm::{ChatError, ChatModels};
use crate::pipeline::{Answered, Asked, Models, Referee, Run, answer_all, elect, question_seed, sandbox};
use crate::program::{IMAGE, Sandbox};
use crate::report;
use crate::report::pictures::{boxes_of, png};
use crate::sight::picture::DecodeOptions;
use crate::sight::{Picture, Tools};
use crate::text::{plain, shown};
use crate::tools::draw::overlay;
use crate::tools::familiar::Familiar;
use crate::tools::real::RealTools;
use crate::weights::ModelFiles;
use crate::weights::source::{EMBEDDED, EMBEDDED_BASE};
use anyhow::{Context, bail};
use serde_json::{Map, Value, json};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;
use waiting::{DECIDING, PLANNING, Watched, spinner};

#[derive(Debug, clap::Args)]
pub struct InferArgs {
    /// The picture (PNG, JPEG, WebP, BMP, TIFF or GIF); - reads it from stdin
    #[arg(required_unless_present = "batch")]
    image: Option<PathBuf>,
    /// The question
    #[arg(required_unless_present = "batch", allow_hyphen_values = true)]
    query: Option<String>,
    /// Answer many: JSON lines {"image", "question"} (and "id", "seed" if wanted); - reads from stdin
    #[arg(long, value_name = "FILE", requires = "out", conflicts_with_all = ["image", "query"])]
    batch: Option<PathBuf>,
    /// Where --batch writes its JSON lines; what stands there already is not answered again, but where the
    /// picture or a server's reply was missing. Rows of other settings are refused; - writes to stdout
    #[arg(long, value_name = "FILE", requires = "batch", conflicts_with_all = ["image", "query"])]
    out: Option<PathBuf>,
    /// Print answer, plan, program, tool calls, times, models and seed as JSON
    #[arg(long, conflicts_with = "batch")]
    json: bool,
    /// Write one self-contained page: picture with boxes, depth, plan, program with its tool calls
    #[arg(long, value_name = "FILE.html", conflicts_with = "batch")]
    report: Option<PathBuf>,
    /// Write the picture with the boxes that the detector gave
    #[arg(long, value_name = "FILE.png", conflicts_with = "batch")]
    save_overlay: Option<PathBuf>,
    /// The planner's most likely reply instead of a sampled one (planner.temperature=0)
    #[arg(long, conflicts_with = "samples")]
    greedy: bool,
    /// Ask so many times; the most frequent answer counts (inference.samples)
    #[arg(
        long,
        visible_alias = "vote",
        value_name = "N",
        value_parser = clap::value_parser!(u64).range(1..=1000)
    )]
    samples: Option<u64>,
    /// Give a failed program back to the planner so many times (inference.repairs)
    #[arg(long, value_name = "N")]
    repair: Option<usize>,
    /// Seed of the planner's sampling
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    executor: ExecutorArgs,
    #[command(flatten)]
    models: ModelArgs,
}

impl InferArgs {
    fn config(&self) -> anyhow::Result<Config> {
        let mut sets = self.executor.sets();
        sets.extend(planning_sets(self.greedy, self.samples, self.repair));
        Ok(self.models.explain(&sets)?.0)
    }
}

/// What answering takes, loaded.
struct Reasoner<'a> {
    config: &'a Config,
    chats: &'a ChatModels<'a>,
    models: Models,
    referee: Option<Referee>,
    load_seconds: f64,
}

/// One question as it was asked.
struct Query<'a> {
    /// The picture's file, for the trace.
    file: &'a str,
    question: &'a str,
    seed: u64,
}

/// How one question was answered.
struct Reply {
    /// One for each sample.
    runs: Vec<Run>,
    chosen: usize,
    /// All of planning and running.
    seconds: f64,
}

impl<'a> Reasoner<'a> {
    /// With a sandbox beside it, which is borrowed apart from the models.
    fn load(
        config: &'a Config,
        device: &candle_core::Device,
        chats: &'a ChatModels<'a>,
    ) -> anyhow::Result<(Self, Sandbox)> {
        let started = Instant::now();
        // First, as it takes the least and may be refused.
        let sandbox = sandbox(&config.sandbox)?;
        let bar = spinner("loading models");
        let models = Models::load(config, device, chats)?;
        let referee = Referee::load(config, chats)?;
        let load_seconds = started.elapsed().as_secs_f64();
        bar.finish_and_clear();
        let names: Vec<String> =
            models.names().iter().map(|(part, name)| format!("{part}: {name}")).collect();
        notice!("valor: models: {}", names.join(", "));
        Ok((Self { config, chats, models, referee, load_seconds }, sandbox))
    }

    /// Seeds of a question's samples: its own, and those that follow from it.
    fn seeds(&self, seed: u64) -> Vec<u64> {
        let more = (1..self.config.inference.samples).map(|k| question_seed(seed, 0, k));
        std::iter::once(seed).chain(more).collect()
    }

    /// Answers questions together; each names its tools by number. Where a model will answer nothing more, also why:
    /// questions that it left open have no reply, those that were answered before keep theirs, which is paid for.
    /// `progress` hears of each program's first run.
    fn answer(
        &self,
        sandbox: &mut Sandbox,
        asked: &[(&Query, usize)],
        tools: &mut [impl Tools],
        progress: impl FnMut(),
    ) -> (Vec<Option<Reply>>, Option<String>) {
        let started = Instant::now();
        let samples = self.config.inference.samples;
        let all: Vec<Asked> = asked
            .iter()
            .flat_map(|(q, tools)| {
                let asked = |seed| Asked { question: q.question, seed, tools: *tools };
                self.seeds(q.seed).into_iter().map(asked).collect::<Vec<_>>()
            })
            .collect();
        let repairs = self.config.inference.repairs;
        let runs = answer_all(&self.models.planner, sandbox, &all, tools, repairs, progress);
        let mut gone =
            runs.iter().find_map(|run| run.as_ref().err()).map(|e| format!("the planner failed: {e}"));
        let vlm = self.models.perception.vlm.failed().map(|e| format!("the VLM failed: {e}"));
        let seconds = started.elapsed().as_secs_f64() / asked.len().max(1) as f64;
        let mut runs = runs.into_iter();
        let reply = |(q, _): &(&Query, usize)| {
            // All of a question's are taken, so that the next one's are its own.
            let of_question: Vec<Result<Run, ChatError>> = runs.by_ref().take(samples).collect();
            let mut runs: Vec<Run> = of_question.into_iter().collect::<Result<_, _>>().ok()?;
            // Programs take it for a call that failed; it is no failure of theirs.
            if vlm.is_some() && runs.iter().any(|run| run.outage.is_some()) {
                return None;
            }
            match elect(self.referee.as_ref(), q.question, &mut runs, sandbox) {
                Ok(chosen) => Some(Reply { runs, chosen, seconds }),
                Err(e) => {
                    gone.get_or_insert_with(|| format!("the verifier failed: {e}"));
                    None
                }
            }
        };
        let replies = asked.iter().map(reply).collect();
        (replies, gone.or(vlm))
    }

    /// All that is known of an answer.
    fn trace(&self, q: &Query, picture: &Picture, reply: &Reply) -> Value {
        let run = &reply.runs[reply.chosen];
        let answered = &run.answered;
        let names = self.models.names();
        let models: Map<String, Value> =
            names.iter().map(|(part, name)| (part.to_string(), json!(name))).collect();
        let mut trace = json!({
            "answer": run.value(),
            "error": error(run),
            "question": q.question,
            "picture": { "file": q.file, "as": IMAGE, "width": picture.width(), "height": picture.height() },
            "plan": answered.reply.as_ref().and_then(|r| r.plan.clone()),
            "program": answered.reply.as_ref().map(|r| &r.program),
            "flags": answered.reply.as_ref().map(|r| &r.flags),
            "reply": run.reply.as_ref().map(|r| json!({ "text": &r.text, "finish": r.finish, "tokens": r.new_tokens })),
            "calls": answered.outcome.as_ref().map_or(&[][..], |o| &o.calls),
            "printed": answered.outcome.as_ref().map_or("", |o| &o.stdout),
            "executor": answered.outcome.as_ref().ok().map(|o| o.interpreter),
            "seconds": seconds(self.load_seconds, reply.seconds, answered),
            "models": models,
            "seed": self.seeds(q.seed)[reply.chosen],
        });
        if !run.earlier.is_empty() {
            let earlier = run.earlier.iter().map(|(text, why)| json!({ "reply": text, "error": why }));
            trace["repaired"] = earlier.collect();
        }
        if reply.runs.len() > 1 {
            let said = |r: &Run| r.value().cloned().unwrap_or(Value::Null);
            trace["votes"] = reply.runs.iter().map(said).collect();
        }
        let usage = self.chats.usage();
        if !usage.is_empty() {
            trace["endpoints"] = json!(usage);
        }
        trace
    }
}

pub fn run(args: InferArgs) -> anyhow::Result<ExitCode> {
    let (config, device) = (args.config()?, args.models.device()?);
    let chats = ChatModels::new(&config, &device);
    if let (Some(batch), Some(out)) = (&args.batch, &args.out) {
        return batch::run(batch, out, args.seed, &config, || Reasoner::load(&config, &device, &chats));
    }
    let (Some(image), Some(query)) = (&args.image, &args.query) else {
        bail!("give a picture and a question, or --batch FILE")
    };
    let question = query.trim();
    if question.is_empty() {
        bail!("the question is empty; ask something, such as \"How many chairs are there?\"")
    }
    // Questions may begin with a dash; an option with a slip in it is none.
    if question.starts_with('-') && !question.contains(char::is_whitespace) {
        bail!("{question}: is neither an option of infer nor a question; see valor infer --help")
    }
    for (name, path) in [("--report", &args.report), ("--save-overlay", &args.save_overlay)] {
        if path.as_ref().is_some_and(|path| path.as_os_str() == "-") {
            bail!("{name} - is no file; name one, such as /dev/stdout")
        }
        writable(name, path.as_deref())?;
        if path.as_ref().is_some_and(|path| is_same(path, image)) {
            bail!("{name} {} is the picture itself; name another file", image.display())
        }
    }
    if let (Some(page), Some(drawn)) = (&args.report, &args.save_overlay)
        && is_one_place(page, drawn)
    {
        bail!("--save-overlay {} is the file of --report; name another file", drawn.display())
    }
    let picture = open(image)?;
    let (reasoner, mut sandbox) = Reasoner::load(&config, &device, &chats)?;
    if let Some(notice) = strange(&config, &picture)? {
        notice!("valor: {notice}");
    }
    let q = Query { file: &image.display().to_string(), question, seed: args.seed };
    let bar = spinner(PLANNING);
    let mut tools = [Watched { tools: RealTools::new(&reasoner.models.perception, &picture), bar: &bar }];
    let (mut replies, gone) =
        reasoner.answer(&mut sandbox, &[(&q, 0)], &mut tools, || bar.set_message(DECIDING));
    bar.finish_and_clear();
    let Some(reply) = replies.remove(0) else {
        notice!("valor: {}", shown(&gone.unwrap_or_default()));
        return Ok(ExitCode::FAILURE);
    };
    let run = &reply.runs[reply.chosen];
    tell(run);
    let trace = reasoner.trace(&q, &picture, &reply);
    // Before the files, for which there may be no room; and they are written though nobody reads the answer.
    let printed = print(&trace, run, args.json);
    if let Some(reason) = run.why() {
        notice!("valor: {}", shown(&reason));
    }
    if let Some(path) = &args.report {
        let bar = spinner("depth for the report");
        let depth = tools[0].tools.depth_map().context("depth for the report")?;
        bar.finish_and_clear();
        let page = report::page(&trace, &picture, Some(depth))?;
        write_atomic(path, |w| w.write_all(page.as_bytes()))?;
    }
    if let Some(path) = &args.save_overlay {
        let drawn = png(&overlay(&picture, &boxes_of(&trace)))?;
        write_atomic(path, |w| w.write_all(&drawn))?;
    }
    printed?;
    Ok(if run.why().is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(trace: &Value, run: &Run, as_json: bool) -> std::io::Result<()> {
    let mut out = super::stdout();
    match run.value() {
        _ if as_json => writeln!(out, "{trace:#}"),
        Some(value) => writeln!(out, "{}", shown(&plain(value))),
        None => Ok(()),
    }
}

/// From a file, or from stdin where it is called -.
fn open(image: &Path) -> anyhow::Result<Picture> {
    if image.as_os_str() != "-" {
        return Ok(Picture::open(image)?);
    }
    let mut bytes = Vec::new();
    std::io::stdin().lock().read_to_end(&mut bytes).context("cannot read stdin")?;
    Ok(Picture::decode(&bytes, "stdin", DecodeOptions::default())?)
}

/// What went on, for someone who waits.
fn tell(run: &Run) {
    for (_, why) in &run.earlier {
        notice!("valor: given back to the planner: {}", shown(why));
    }
    if let Some(reply) = &run.reply {
        notice!("valor: the planner wrote {} tokens", reply.new_tokens);
    }
    if let Some(reply) = run.answered.reply.as_ref().filter(|r| !r.flags.is_empty()) {
        let flags: Vec<String> = reply.flags.iter().map(|f| format!("{f:?}")).collect();
        notice!("valor: the planner's reply is irregular: {}", flags.join(", "));
    }
    for call in run.answered.outcome.iter().flat_map(|o| &o.calls) {
        notice!("valor: {} took {:.2} s", shown(&call.tool), call.seconds);
    }
}

/// What to tell someone whose picture is plainly not of the world that the embedded models know.
fn strange(config: &Config, picture: &Picture) -> anyhow::Result<Option<&'static str>> {
    let seeing = [&config.detector.model, &config.depth.model, &config.vlm.model];
    if !seeing.iter().any(|m| [EMBEDDED, EMBEDDED_BASE].contains(&m.as_str())) {
        return Ok(None);
    }
    let known = ModelFiles::open(EMBEDDED, "familiar")?.required("familiar.json")?;
    let known = Familiar::from_json(&known).map_err(anyhow::Error::msg).context("embedded familiar")?;
    Ok(known.is_strange(picture).then_some(
        "this is plainly no picture of Rooms, and the embedded models only know Rooms: do not trust the \
         answer; name other models in the configuration for other pictures",
    ))
}

/// As the sandbox's errors; also of the kinds "malformed" for a reply without a program, "planner" for none, and
/// "no-reply" where a server, the planner's or a tool's, may have one another time.
fn error(run: &Run) -> Value {
    let kind = if run.outage.is_some() { Some(NO_REPLY) } else { run.answered.failure() };
    match &run.answered.outcome {
        Ok(outcome) if run.outage.is_none() => json!(outcome.result.as_ref().err()),
        _ => json!({ "kind": kind, "type": null, "line": null, "message": run.why() }),
    }
}

/// Wall seconds by part: loading, the program that counts and its tools, everything after loading.
fn seconds(load: f64, answering: f64, answered: &Answered) -> Value {
    let mut tools: Map<String, Value> = Map::new();
    let (mut program, mut in_tools) = (0., 0.);
    if let Ok(outcome) = &answered.outcome {
        program = outcome.seconds;
        for call in &outcome.calls {
            let before = tools.get(&call.tool).and_then(Value::as_f64).unwrap_or(0.);
            tools.insert(call.tool.clone(), json!(before + call.seconds));
            in_tools += call.seconds;
        }
    }
    let plan = (answering - program - in_tools).max(0.);
    json!({ "load": load, "plan": plan, "tools": tools, "program": program, "total": load + answering })
}

#[cfg(test)]
mod tests {
    use crate::cli::{Cli, Command};
    use crate::config::Config;
    use clap::Parser;

    fn config(more: &[&str]) -> Config {
        let args = [&["valor", "infer", "a.png", "-5 beds?"][..], more].concat();
        match Cli::try_parse_from(args).unwrap().command {
            Command::Infer(args) => args.config().unwrap(),
            _ => unreachable!("infer was named"),
        }
    }

    /// Under the names that they have in `eval` too.
    #[test]
    fn options_are_the_settings_that_they_stand_for() {
        for samples in ["--samples", "--vote"] {
            let how = config(&[samples, "3", "--repair", "1"]).inference;
            assert_eq!((how.samples, how.repairs), (3, 1));
        }
        assert_eq!(config(&["--greedy"]).planner.temperature, 0.);
    }
}
