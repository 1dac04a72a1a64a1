//! Many questions: JSON lines in, JSON lines out.
//!
//! A row is written and flushed as soon as its question is answered, so what is there stays when a run
//! is broken off; the next run goes on behind it. A picture that cannot be read is a row with an error,
//! not the end.

use super::{Query, Reasoner};
use crate::cli::json_lines;
use crate::program::Sandbox;
use crate::tools::Picture;
use crate::tools::real::RealTools;
use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::{Value, json};
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

pub(super) fn run<'a>(
    batch: &Path,
    out: &Path,
    seed: u64,
    load: impl FnOnce() -> Result<(Reasoner<'a>, Sandbox)>,
) -> Result<ExitCode> {
    let lines = read(batch)?;
    let same = |a: &Path, b: &Path| {
        a == b || a.canonicalize().ok().is_some_and(|a| b.canonicalize().ok() == Some(a))
    };
    ensure!(!same(batch, out), "--out {} is the file of the questions", out.display());
    let Held { whole, done, unanswered } = held(out, &lines)?;
    if done > 0 {
        eprintln!("valor: {done} of {} are answered in {} already", lines.len(), out.display());
    }
    let bar = ProgressBar::new(lines.len() as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} eta {eta}")?);
    bar.set_position(done as u64);
    let mut failed = unanswered;
    if done < lines.len() {
        let (reasoner, mut sandbox) = load()?;
        let mut file = open(out, whole)?;
        let folder = batch.parent().unwrap_or(Path::new(""));
        for (start, chunk) in
            lines[done..].chunks(TOGETHER).enumerate().map(|(i, c)| (done + i * TOGETHER, c))
        {
            // Neighbours about the same picture share what is known of it.
            let mut pictures: Vec<(&Path, Result<Picture, String>)> = Vec::new();
            let mut of = Vec::new();
            for line in chunk {
                if pictures.last().is_none_or(|(path, _)| *path != line.image) {
                    let picture = Picture::open(&folder.join(&line.image)).map_err(|e| e.to_string());
                    pictures.push((&line.image, picture));
                }
                of.push(pictures.len() - 1);
            }
            let seen: Vec<&Picture> = pictures.iter().filter_map(|p| p.1.as_ref().ok()).collect();
            let mut tools: Vec<RealTools> =
                seen.iter().map(|p| RealTools::new(&reasoner.models.perception, p)).collect();
            // The number of a picture among those that could be read.
            let place = |i: usize| pictures[..i].iter().filter(|p| p.1.is_ok()).count();
            let names: Vec<String> = chunk.iter().map(|l| l.image.display().to_string()).collect();
            let queries: Vec<Query> = chunk
                .iter()
                .zip(&names)
                .map(|(l, file)| Query { file, question: l.question.trim(), seed: l.seed.unwrap_or(seed) })
                .collect();
            let asked: Vec<(&Query, usize)> = queries
                .iter()
                .zip(&of)
                .filter(|(_, i)| pictures[**i].1.is_ok())
                .map(|(q, i)| (q, place(*i)))
                .collect();
            let replies = reasoner.answer(&mut sandbox, &asked, &mut tools);
            let mut replies = match replies {
                Ok(replies) => replies.into_iter(),
                Err(e) => {
                    eprintln!("valor: the planner failed: {e}; what is answered is in {}", out.display());
                    return Ok(ExitCode::FAILURE);
                }
            };
            let mut text = String::new();
            for (i, (line, q)) in chunk.iter().zip(&queries).enumerate() {
                let mut row = match &pictures[of[i]].1 {
                    Ok(picture) => reasoner.trace(q, picture, &replies.next().expect("one for each")),
                    Err(e) => json!({
                        "answer": null, "question": q.question, "picture": { "file": q.file },
                        "error": { "kind": "picture", "type": null, "line": null, "message": e },
                    }),
                };
                failed += usize::from(row["answer"].is_null());
                row["index"] = json!(start + i);
                row["id"] = line.id.clone();
                text.push_str(&row.to_string());
                text.push('\n');
                bar.inc(1);
            }
            file.write_all(text.as_bytes())
                .and_then(|()| file.sync_data())
                .with_context(|| out.display().to_string())?;
        }
    }
    bar.finish_and_clear();
    eprintln!("valor: {} questions, {failed} of all without an answer", lines.len() - done);
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
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

/// What an output holds already.
struct Held {
    /// Bytes of its whole rows.
    whole: usize,
    /// Rows, and those of them without an answer.
    done: usize,
    unanswered: usize,
}

/// Opens the output behind its whole rows.
fn open(out: &Path, whole: usize) -> Result<File> {
    if let Some(folder) = out.parent() {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let named = || format!("--out {}", out.display());
    let file = OpenOptions::new().create(true).append(true).open(out).with_context(named)?;
    file.set_len(whole as u64).with_context(named)?;
    Ok(file)
}

/// Looks at the rows that the output holds. A last one that was not written to its end does not count; a
/// file of anything else is refused.
fn held(out: &Path, lines: &[Line]) -> Result<Held> {
    let named = || format!("--out {}", out.display());
    let text = match std::fs::read_to_string(out) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        text => text.with_context(named)?,
    };
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    // A row begins as an object, and one that is cut off is none.
    let rest = &text[whole..];
    let cut_off = rest.starts_with('{') && serde_json::from_str::<Value>(rest).is_err();
    ensure!(rest.is_empty() || cut_off, "{} is not of this batch; name a new file", named());
    let (mut done, mut unanswered) = (0, 0);
    for (i, row) in text[..whole].lines().enumerate() {
        let row: Value =
            serde_json::from_str(row).with_context(|| format!("{}, line {}", out.display(), i + 1))?;
        let same = lines.get(i).is_some_and(|l| {
            row["index"] == i
                && row["question"] == l.question.trim()
                && row["picture"]["file"] == l.image.display().to_string()
        });
        if !same {
            bail!(
                "--out {}, line {}: answers another question than line {} of the batch; name a new file",
                out.display(),
                i + 1,
                i + 1
            )
        }
        done += 1;
        unanswered += usize::from(row["answer"].is_null());
    }
    Ok(Held { whole, done, unanswered })
}
