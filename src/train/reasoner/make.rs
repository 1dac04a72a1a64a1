//! Questions about unlabelled pictures, written by a VLM: the paper's query engine (VALOR, section 3.1).
//!
//! The VLM is asked per picture for several questions at once, each time told a kind of question to
//! begin with and what it has already written. What it replies is kept if it is a question, new, and not
//! nearly one that is there. Nothing checks that a question can be answered: verifiers judge replies.

use crate::data::queries::Query;
use crate::files::Held;
use crate::llm::{ChatError, ChatModel, ChatRequest, Message, SamplingOptions, Schema};
use crate::sight::Picture;
use anyhow::{Context, Result, ensure};
use image::RgbImage;
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const PROMPT: &str = include_str!("../../../data/prompts/make-queries.txt");

/// What a request begins with; they take turns, so that pictures differ.
const KINDS: [&str; 6] = [
    "counting",
    "which of two things is nearer or farther",
    "the size of one thing from the given size of another",
    "what is left of, right of, above or below something",
    "the nearest, farthest, largest or smallest of several things",
    "a combination of two steps",
];

/// A picture is asked about at most so often: one that gives nothing new is passed over.
const ROUNDS: usize = 3;
/// Questions with this share of their words in common are one.
const ALIKE: f64 = 0.8;
const LONGEST: usize = 400;

/// How it went.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Made {
    /// In the file, earlier sessions' too.
    pub questions: usize,
    /// Replies or their parts that were no new question.
    pub dropped: usize,
    /// Pictures that could not be read, and why.
    pub unreadable: Vec<String>,
    /// Requests that had no usable reply.
    pub failed: usize,
}

/// Pictures of a folder and its subfolders, in order.
pub fn pictures(dir: &Path) -> Result<Vec<PathBuf>> {
    fn walk(dir: &Path, out: &mut Vec<PathBuf>) -> std::io::Result<()> {
        let mut all: Vec<_> = std::fs::read_dir(dir)?.collect::<std::io::Result<_>>()?;
        all.sort_by_key(std::fs::DirEntry::file_name);
        for entry in all {
            let path = entry.path();
            // Links to folders are not followed: they may lead in a circle.
            if entry.file_type()?.is_dir() {
                walk(&path, out)?;
            } else if path.is_file() {
                let ending = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_lowercase();
                if ["png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif"].contains(&&*ending) {
                    out.push(path);
                }
            }
        }
        Ok(())
    }
    ensure!(dir.is_dir(), "--images {}: there is no such folder", dir.display());
    let mut out = Vec::new();
    walk(dir, &mut out).with_context(|| format!("cannot read --images {}", dir.display()))?;
    ensure!(!out.is_empty(), "--images {}: there is no picture in it", dir.display());
    Ok(out)
}

/// Writes questions about `pictures` to the file until it holds `n`, as many about each as about any
/// other, going on behind what it holds. `progress` hears how many it holds.
///
/// # Errors
/// If the VLM will answer nothing any more, or the file cannot be written or is another's; what is
/// written stays.
pub fn make(
    vlm: &dyn ChatModel,
    max_new_tokens: usize,
    pictures: &[PathBuf],
    n: usize,
    out: &Path,
    seed: u64,
    mut progress: impl FnMut(usize),
) -> Result<Made> {
    let (held, mut all) = resume(out)?;
    let mut file = held.as_file();
    let mut made = Made::default();
    let schema = Arc::new(schema()?);
    for (at, path) in pictures.iter().enumerate() {
        // The first pictures take what is left over.
        let share = n / pictures.len() + usize::from(at < n % pictures.len());
        // Readers look beside the file of questions.
        let name =
            std::path::absolute(path).with_context(|| path.display().to_string())?.display().to_string();
        let mut own: Vec<String> =
            all.iter().filter(|q| q.image == name).map(|q| q.question.clone()).collect();
        progress(all.len());
        if own.len() >= share {
            continue;
        }
        let image = match read(path) {
            Ok(image) => image,
            Err(e) => {
                made.unreadable.push(e);
                continue;
            }
        };
        for round in 0..ROUNDS {
            let wanted = share.saturating_sub(own.len());
            if wanted == 0 {
                break;
            }
            let text = request(wanted, KINDS[(at + round) % KINDS.len()], &own);
            let request = ChatRequest {
                messages: vec![Message::user(text).with_images(vec![image.clone()])],
                schema: Some(schema.clone()),
                ..ChatRequest::user("", seed.wrapping_add((at * ROUNDS + round) as u64), max_new_tokens)
            };
            let reply = vlm.chat(&[request], &SamplingOptions::temperature(1.), None).remove(0);
            let reply = match reply {
                Ok(reply) => reply.text,
                Err(e) if e.is_of_model() => return Err(e).context("the VLM failed"),
                Err(ChatError::Request(why)) => anyhow::bail!("the VLM cannot be asked about {name}: {why}"),
                Err(_) => {
                    made.failed += 1;
                    continue;
                }
            };
            let offered = questions_of(&reply);
            made.failed += usize::from(offered.is_empty());
            for question in offered {
                if own.len() >= share || !is_question(&question) || own.iter().any(|q| alike(q, &question)) {
                    made.dropped += 1;
                    continue;
                }
                let query = Query { image: name.clone(), question: question.clone() };
                writeln!(file, "{}", serde_json::to_string(&query)?)
                    .with_context(|| out.display().to_string())?;
                own.push(question);
                all.push(query);
                progress(all.len());
            }
            file.sync_data()?;
        }
    }
    made.questions = all.len();
    Ok(made)
}

fn read(path: &Path) -> Result<RgbImage, String> {
    let picture = Picture::open(path).map_err(|e| e.to_string())?;
    Ok(picture.to_image())
}

fn schema() -> Result<Schema> {
    let json = json!({
        "type": "object", "required": ["questions"], "additionalProperties": false,
        "properties": { "questions": { "type": "array", "items": { "type": "string" } } },
    });
    Schema::new("questions", json).map_err(anyhow::Error::msg)
}

fn request(wanted: usize, kind: &str, own: &[String]) -> String {
    let mut text = format!(
        "{PROMPT}Write {wanted} of them, the first about {kind}. Reply with JSON only: {{\"questions\": [\"…\"]}}"
    );
    if !own.is_empty() {
        text.push_str("\nThese are there already; write others:");
        own.iter().for_each(|q| {
            text.push_str("\n- ");
            text.push_str(q);
        });
    }
    text
}

/// The questions of a reply that fits the schema; on one line each.
fn questions_of(reply: &str) -> Vec<String> {
    #[derive(Deserialize)]
    struct Reply {
        questions: Vec<String>,
    }
    let read: Option<Reply> = serde_json::from_str(reply).ok();
    let tidy = |q: String| q.split_whitespace().collect::<Vec<_>>().join(" ");
    read.map(|r| r.questions.into_iter().map(tidy).collect()).unwrap_or_default()
}

/// A VLM's text is a stranger's: what is no plain question is not kept.
fn is_question(text: &str) -> bool {
    (8..=LONGEST).contains(&text.len())
        && text.contains(' ')
        && !text.contains(['<', '>', '`'])
        && !text.chars().any(char::is_control)
}

fn alike(a: &str, b: &str) -> bool {
    let words = |t: &str| -> BTreeSet<String> {
        t.to_lowercase()
            .split(|c: char| !c.is_alphanumeric())
            .filter(|w| !w.is_empty())
            .map(str::to_owned)
            .collect()
    };
    let (a, b) = (words(a), words(b));
    let (common, either) = (a.intersection(&b).count(), a.union(&b).count());
    common as f64 >= ALIKE * either.max(1) as f64
}

/// Opens the output behind its whole lines, which it returns.
fn resume(out: &Path) -> Result<(Held, Vec<Query>)> {
    let named = || format!("--out {}", out.display());
    let held = Held::file("--out", out)?;
    let (mut file, mut bytes) = (held.as_file(), Vec::new());
    file.read_to_end(&mut bytes).with_context(named)?;
    // The half line may end within a character.
    let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
    let text = std::str::from_utf8(&bytes[..whole]).with_context(named)?;
    let line = |(i, l): (usize, &str)| {
        serde_json::from_str(l).with_context(|| {
            format!(
                "--out {}, line {}: is no question of an earlier run; name a new file",
                out.display(),
                i + 1
            )
        })
    };
    let all = text.lines().enumerate().map(line).collect::<Result<_>>()?;
    file.set_len(whole as u64).with_context(named)?;
    Ok((held, all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_was_cut_within_a_character_is_gone_on_behind() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("queries.jsonl");
        let line =
            serde_json::to_string(&Query { image: "a.png".into(), question: "Is the café open?".into() });
        let line = format!("{}\n", line.unwrap());
        let cut = line.find('é').unwrap() + 1;
        std::fs::write(&out, [line.as_bytes(), &line.as_bytes()[..cut]].concat()).unwrap();
        let (held, all) = resume(&out).unwrap();
        assert_eq!((all.len(), all[0].question.as_str()), (1, "Is the café open?"));
        drop(held);
        assert_eq!(std::fs::read_to_string(&out).unwrap(), line);
    }

    #[test]
    fn near_copies_are_known() {
        assert!(alike("How many chairs are there?", "How many chairs are there"));
        assert!(alike(
            "How many red chairs are there in this room?",
            "How many red chairs are there in the room?"
        ));
        assert!(!alike("How many chairs are there?", "How many tables are there?"));
    }

    #[test]
    fn what_is_no_question_is_not_kept() {
        assert!(is_question("How tall is the lamp if the door is 2 m tall?"));
        for text in ["What", "Sure!", "<answer>yes</answer> is it", "`rm` what is it", "a\u{7} b c d e f"] {
            assert!(!is_question(text), "{text}");
        }
        assert_eq!(questions_of("{\"questions\": [\"How\\n many?\"]}"), ["How many?"]);
        assert!(questions_of("Sure! {\"questions\": []}").is_empty());
    }
}
