//! Many questions: JSON lines in, JSON lines out.
//!
//! A row is written and flushed as soon as its question is answered, so what is there stays when a run
//! is broken off; the next run goes on behind it, under the same settings, which each row tells of. A
//! picture that cannot be read is a row with an error, not the end. The next run tries such a row again, if
//! the picture can be read then, and one to which a server, the planner's or a tool's, gave no reply; a program
//! that failed would fail again. A server that will answer nothing more ends the run; what it answered before is
//! finished and written.
//!
//! A file of rows is worked on by one process at a time. A pipe, a device and stdout hold nothing to go on
//! from.

use super::settings::Settings;
use super::{Query, Reasoner};
use crate::cli::{appendable, json_lines, stdout, writable};
use crate::config::Config;
use crate::eval::benches::record::NO_REPLY;
use crate::files::{Held, is_same};
use crate::program::Sandbox;
use crate::report::pulse::Pulse;
use crate::sight::Picture;
use crate::text::shown;
use crate::tools::real::RealTools;
use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Questions planned together.
const TOGETHER: usize = 16;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    /// Relative to the file's folder.
    image: PathBuf,
    question: String,
    /// Given back in the row.
    #[serde(default)]
    id: Value,
    seed: Option<u64>,
}

/// What is asked, and under what settings.
struct Batch<'a> {
    lines: Vec<Line>,
    /// Of the pictures.
    folder: &'a Path,
    /// Of questions without their own.
    seed: u64,
    settings: Settings,
}

pub(super) fn run<'a>(
    batch: &Path,
    out: &Path,
    seed: u64,
    config: &Config,
    load: impl FnOnce() -> Result<(Reasoner<'a>, Sandbox)>,
) -> Result<ExitCode> {
    let lines = read(batch)?;
    ensure!(
        is_stdout(out) || (batch != out && !is_same(batch, out)),
        "--out {} is the file of the questions",
        out.display()
    );
    let mut output = Output::open(out)?;
    let folder = batch.parent().unwrap_or(Path::new(""));
    let batch = Batch { lines, folder, seed, settings: Settings::of(config)? };
    let Before { mut rows, done, again, unanswered, doubled, unended } = match &output {
        Output::File(path, held) => batch.before(path, held.as_file())?,
        Output::Stream(..) | Output::Stdout => Before::default(),
    };
    let all = batch.lines.len();
    if done > 0 {
        let mut said = format!("{} of {all} are answered", done - again.len() - unanswered);
        for (n, what) in [
            (again.len(), "failed for want of a picture or a reply (tried again)"),
            (unanswered, "failed (left so)"),
        ] {
            if n > 0 {
                said += &format!(", {n} {what}");
            }
        }
        notice!("valor: {} is there already: {said}", out.display());
    }
    if doubled || unended || !again.is_empty() {
        writable("--out", Some(out))?;
    }
    if doubled {
        notice!("valor: what stood twice in {} stands there once now", out.display());
    }
    if doubled || unended {
        output.rewrite(&rows)?;
    }
    let bar = ProgressBar::new(all as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} eta {eta}")?);
    let mut pulse = Pulse::default();
    let mut failed = unanswered;
    if done < all || !again.is_empty() {
        let (reasoner, mut sandbox) = load()?;
        // Not before, as loading shows itself.
        bar.set_position((done - again.len()) as u64);
        let mut answer = |of: &[usize]| -> (Vec<String>, Option<String>) {
            let (rows, gone) = batch.answer(&reasoner, &mut sandbox, of);
            failed += rows.iter().filter(|row| row["answer"].is_null()).count();
            bar.inc(rows.len() as u64);
            pulse.beat(&bar);
            (rows.iter().map(Value::to_string).collect(), gone)
        };
        let kept = matches!(output, Output::File(..));
        let broken_off = |why: &str| {
            let why = shown(why);
            match kept {
                true => notice!(
                    "valor: {why}; what is answered is in {}, the same command asks the rest",
                    out.display()
                ),
                false => notice!("valor: {why}; what was answered before is written"),
            }
            Ok(ExitCode::FAILURE)
        };
        for of in again.chunks(TOGETHER) {
            let (new, gone) = answer(of);
            rows = replaced(&rows, of.iter().copied().zip(new).collect());
            output.rewrite(&rows)?;
            if let Some(why) = gone {
                return broken_off(&why);
            }
        }
        output.cut(rows.len())?;
        let open: Vec<usize> = (done..all).collect();
        for of in open.chunks(TOGETHER) {
            let (new, gone) = answer(of);
            let text: String = new.iter().flat_map(|row| [row.as_str(), "\n"]).collect();
            output.add(&text)?;
            if let Some(why) = gone {
                return broken_off(&why);
            }
        }
    }
    bar.finish_and_clear();
    notice!("valor: {} questions, {failed} of all without an answer", all - done + again.len());
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Batch<'_> {
    fn seed_of(&self, line: &Line) -> u64 {
        line.seed.unwrap_or(self.seed)
    }

    fn picture(&self, line: &Line) -> Result<Picture, String> {
        Picture::open(&self.folder.join(&line.image)).map_err(|e| e.to_string())
    }

    /// The rows of these questions, by number. Where a model will answer nothing more, also why: those that it left
    /// open have a row without a reply, but for the last ones, which have none.
    fn answer(
        &self,
        reasoner: &Reasoner,
        sandbox: &mut Sandbox,
        of: &[usize],
    ) -> (Vec<Value>, Option<String>) {
        let lines: Vec<&Line> = of.iter().map(|&i| &self.lines[i]).collect();
        // Neighbours about the same picture share what is known of it.
        let mut pictures: Vec<(&Path, Result<Picture, String>)> = Vec::new();
        let mut sees = Vec::new();
        for line in &lines {
            if pictures.last().is_none_or(|(path, _)| *path != line.image) {
                pictures.push((&line.image, self.picture(line)));
            }
            sees.push(pictures.len() - 1);
        }
        let seen: Vec<&Picture> = pictures.iter().filter_map(|p| p.1.as_ref().ok()).collect();
        let perception = &reasoner.models.perception;
        let mut tools: Vec<RealTools> = seen.iter().map(|p| RealTools::new(perception, p)).collect();
        // The number of a picture among those that could be read.
        let place = |i: usize| pictures[..i].iter().filter(|p| p.1.is_ok()).count();
        let names: Vec<String> = lines.iter().map(|l| l.image.display().to_string()).collect();
        let queries: Vec<Query> = lines
            .iter()
            .zip(&names)
            .map(|(l, file)| Query { file, question: l.question.trim(), seed: self.seed_of(l) })
            .collect();
        let asked: Vec<(&Query, usize)> = queries
            .iter()
            .zip(&sees)
            .filter(|(_, i)| pictures[**i].1.is_ok())
            .map(|(q, i)| (q, place(*i)))
            .collect();
        let (replies, gone) = reasoner.answer(sandbox, &asked, &mut tools, || ());
        let mut replies = replies.into_iter();
        let mut rows = Vec::with_capacity(of.len());
        let mut answered = 0;
        for (k, (line, q)) in lines.iter().zip(&queries).enumerate() {
            let failed = |kind: &str, why: &str| {
                json!({
                    "answer": null,
                    "error": { "kind": kind, "type": null, "line": null, "message": why },
                    "question": q.question,
                    "picture": { "file": q.file, "as": null, "width": null, "height": null },
                    "plan": null, "program": null, "flags": null, "reply": null, "calls": [], "printed": "",
                    "executor": null, "seconds": null, "models": null, "seed": null,
                })
            };
            let reply = pictures[sees[k]].1.as_ref().map(|p| (p, replies.next().expect("one for each")));
            let mut row = match &reply {
                Ok((picture, Some(reply))) => reasoner.trace(q, picture, reply),
                Ok((_, None)) => failed(NO_REPLY, gone.as_deref().unwrap_or_default()),
                Err(why) => failed("picture", why),
            };
            row["index"] = json!(of[k]);
            row["id"] = line.id.clone();
            row["settings"] = self.settings.of_row(q.seed);
            rows.push(row);
            if !matches!(reply, Ok((_, None))) {
                answered = rows.len();
            }
        }
        rows.truncate(answered);
        (rows, gone)
    }

    /// Looks at the rows that the output holds. A last one that was not written to its end does not count,
    /// nor does one that stands there a second time; one that lacks its line's end alone is given it, and a file of
    /// anything else is refused.
    fn before(&self, out: &Path, mut file: &File) -> Result<Before> {
        let named = || format!("--out {}", out.display());
        let mut text = String::new();
        file.read_to_string(&mut text).with_context(named)?;
        let mut whole = text.rfind('\n').map_or(0, |end| end + 1);
        // A row begins as an object, and one that is cut off is none.
        let rest = &text[whole..];
        ensure!(
            rest.is_empty() || rest.starts_with('{'),
            "{} is not of this batch; name a new file",
            named()
        );
        let mut before = Before { unended: serde_json::from_str::<Value>(rest).is_ok(), ..Before::default() };
        if before.unended {
            whole = text.len();
        }
        let mut untold = 0;
        for (text, number) in text[..whole].lines().zip(1..) {
            let row: Value =
                serde_json::from_str(text).with_context(|| format!("{}, line {number}", out.display()))?;
            // Two runs at once, which earlier versions allowed, each wrote it: the first counts.
            let i = row["index"].as_u64().map_or(before.done, |i| before.done.min(i as usize));
            let same = |l: &&Line| {
                row["index"] == i
                    && row["question"] == l.question.trim()
                    && row["picture"]["file"] == l.image.display().to_string()
            };
            let Some(line) = self.lines.get(i).filter(same) else {
                bail!(
                    "--out {}, line {number}: answers another question than line {} of the batch; name a new file",
                    out.display(),
                    i + 1
                )
            };
            if i < before.done {
                before.doubled = true;
                continue;
            }
            // Rows of earlier versions say nothing of their settings.
            match &row["settings"] {
                Value::Null => untold += 1,
                settings => {
                    let differ = self.settings.differences(settings, self.seed_of(line));
                    ensure!(
                        differ.is_empty(),
                        "--out {}, line {number}: was answered with other settings ({}); repeat them, or name a new file",
                        out.display(),
                        differ.join(", ")
                    );
                }
            }
            before.done += 1;
            before.rows.push_str(text);
            before.rows.push('\n');
            let passing = match row["error"]["kind"].as_str() {
                Some("planner" | NO_REPLY) => true,
                Some("picture") => self.picture(line).is_ok(),
                _ => false,
            };
            match row["answer"].is_null() {
                true if passing => before.again.push(i),
                true => before.unanswered += 1,
                false => {}
            }
        }
        if untold > 0 {
            notice!("valor: {untold} rows in {} do not say what settings they are of", out.display());
        }
        // As by an editor that ends lines in another way.
        before.unended |= before.rows.len() != whole && !before.doubled;
        Ok(before)
    }
}

/// What an output holds already.
#[derive(Default)]
struct Before {
    /// Its whole rows, each once, and their number.
    rows: String,
    done: usize,
    /// Of rows without an answer those to be tried again, and the number of the others.
    again: Vec<usize>,
    unanswered: usize,
    /// There are rows that stand there again.
    doubled: bool,
    /// Lines have other ends than they are to have, or the last one none.
    unended: bool,
}

fn is_stdout(out: &Path) -> bool {
    out.as_os_str() == "-"
}

/// Where rows go.
enum Output {
    /// A file, which is gone on with.
    File(PathBuf, Held),
    /// A pipe or a device.
    Stream(PathBuf, File),
    Stdout,
}

impl Output {
    fn open(out: &Path) -> Result<Self> {
        if is_stdout(out) {
            return Ok(Self::Stdout);
        }
        appendable("--out", out)?;
        if out.metadata().is_ok_and(|is| !is.is_file()) {
            let file = OpenOptions::new().append(true).open(out);
            return Ok(Self::Stream(out.into(), file.with_context(|| format!("--out {}", out.display()))?));
        }
        Ok(Self::File(out.into(), Held::file("--out", out)?))
    }

    /// Has all rows written anew.
    fn rewrite(&mut self, rows: &str) -> Result<()> {
        if let Self::File(path, held) = self {
            held.rewrite(path, |w| w.write_all(rows.as_bytes()))?;
        }
        Ok(())
    }

    /// Takes away what stands behind the whole rows.
    fn cut(&self, whole: usize) -> Result<()> {
        if let Self::File(path, held) = self {
            held.as_file().set_len(whole as u64).with_context(|| format!("--out {}", path.display()))?;
        }
        Ok(())
    }

    /// Adds rows, which are there to stay then.
    fn add(&mut self, rows: &str) -> Result<()> {
        match self {
            Self::File(path, held) => {
                let mut file = held.as_file();
                file.write_all(rows.as_bytes())
                    .and_then(|()| file.sync_data())
                    .with_context(|| path.display().to_string())
            }
            Self::Stream(path, file) => {
                file.write_all(rows.as_bytes()).with_context(|| path.display().to_string())
            }
            Self::Stdout => {
                let mut out = stdout();
                Ok(out.write_all(rows.as_bytes()).and_then(|()| out.flush())?)
            }
        }
    }
}

/// Rows, with others in place of some.
fn replaced(rows: &str, new: BTreeMap<usize, String>) -> String {
    let line = |(i, old): (usize, &str)| new.get(&i).map_or(old, String::as_str).to_owned() + "\n";
    rows.lines().enumerate().map(line).collect()
}

fn read(batch: &Path) -> Result<Vec<Line>> {
    let name = batch.display();
    let text = if batch.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin().lock().read_to_string(&mut text).context("cannot read stdin")?;
        text
    } else {
        std::fs::read_to_string(batch).with_context(|| format!("cannot read {name}"))?
    };
    let lines: Vec<(usize, Line)> = json_lines(&text, &name.to_string(), "{\"image\", \"question\"}")?;
    if let Some((number, _)) = lines.iter().find(|(_, l)| l.question.trim().is_empty()) {
        bail!("{name}, line {number}: the question is empty")
    }
    let lines: Vec<Line> = lines.into_iter().map(|(_, line)| line).collect();
    ensure!(!lines.is_empty(), "{name} holds no question");
    Ok(lines)
}
