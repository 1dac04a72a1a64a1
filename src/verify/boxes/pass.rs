//! Pass by pass, as in the paper: the numbers of a picture's boxes are parted into keep and drop.

use super::{BoxJudge, Open, Stage, UNREADABLE, show};
use crate::llm::{ChatError, ChatRequest, Message, Schema};
use crate::sight::Detection;
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

#[derive(Deserialize)]
struct Parted {
    keep: Vec<i64>,
    drop: Vec<Dropped>,
}

#[derive(Deserialize)]
struct Dropped {
    index: i64,
    #[serde(default)]
    reason: String,
}

#[derive(Deserialize)]
struct OfCrop {
    keep: bool,
    #[serde(default)]
    reason: String,
}

/// A verdict on each number that was told of exactly once.
type Verdicts = BTreeMap<usize, (bool, String)>;

pub(super) fn judge(judge: &BoxJudge, cases: &mut [Open]) -> Result<(), ChatError> {
    parted(judge, cases, Stage::Coarse)?;
    crops(judge, cases)?;
    parted(judge, cases, Stage::Dedupe)
}

fn schema(name: &'static str, json: serde_json::Value) -> Arc<Schema> {
    Arc::new(Schema::new(name, json).expect("a schema of ours"))
}

fn partition() -> Arc<Schema> {
    schema(
        "partition",
        json!({
            "type": "object", "required": ["keep", "drop"], "additionalProperties": false,
            "properties": {
                "keep": { "type": "array", "items": { "type": "integer" } },
                "drop": { "type": "array", "items": {
                    "type": "object", "required": ["index", "reason"], "additionalProperties": false,
                    "properties": { "index": { "type": "integer" }, "reason": { "type": "string" } },
                } },
            },
        }),
    )
}

/// Reads a partition of `asked`. Whole: each number told of once and no other. What is not whole is
/// still worth its clear parts, which is what is left when nobody answers better.
fn read(reply: &str, asked: &[usize]) -> (bool, Verdicts) {
    let Ok(parted) = serde_json::from_str::<Parted>(reply) else { return (false, Verdicts::new()) };
    let told = parted
        .keep
        .iter()
        .map(|&i| (i, true, String::new()))
        .chain(parted.drop.into_iter().map(|d| (d.index, false, d.reason)));
    let (mut whole, mut verdicts, mut twice) = (true, Verdicts::new(), Vec::new());
    for (index, keep, reason) in told {
        match usize::try_from(index).ok().filter(|i| asked.contains(i)) {
            None => whole = false,
            Some(i) if verdicts.contains_key(&i) => twice.push(i),
            Some(i) => {
                verdicts.insert(i, (keep, reason.chars().take(200).collect()));
            }
        }
    }
    for i in twice {
        whole = false;
        verdicts.remove(&i);
    }
    (whole && verdicts.len() == asked.len(), verdicts)
}

fn list(boxes: &[(usize, &Detection)]) -> String {
    let mut out = String::new();
    for (i, d) in boxes {
        let [x1, y1, x2, y2] = d.bbox.map(f64::round);
        let _ = write!(out, "\n{i} → {}, [{x1}, {y1}, {x2}, {y2}]", super::worded("{noun}", &d.label));
    }
    out
}

/// One question a picture.
fn parted(judge: &BoxJudge, cases: &mut [Open], stage: Stage) -> Result<(), ChatError> {
    let prompt = &judge.prompts.stages[if stage == Stage::Coarse { 0 } else { 2 }];
    let schema = partition();
    let (mut at, mut requests) = (Vec::new(), Vec::new());
    for (c, case) in cases.iter().enumerate() {
        let kept = case.kept();
        // The last stage is a last look, too, as in the released code: also at one box.
        if kept.is_empty() {
            continue;
        }
        let boxes: Vec<(usize, &Detection)> = kept.iter().map(|&i| (i, &case.case.boxes[i])).collect();
        let images = show::numbered(case.case.picture, &boxes).to_vec();
        let text = format!("{}\n{}", prompt.trim_end(), list(&boxes));
        requests.push(ChatRequest {
            messages: vec![Message::user(text).with_images(images)],
            schema: Some(schema.clone()),
            ..ChatRequest::user("", 0, judge.max_new_tokens)
        });
        at.push((c, kept));
    }
    // The clear parts of what was not whole, in case nothing better comes.
    let parts = std::cell::RefCell::new(vec![Verdicts::new(); at.len()]);
    let replies = judge.ask(requests, |k, reply| {
        let (whole, verdicts) = read(&reply.text, &at[k].1);
        if !verdicts.is_empty() {
            parts.borrow_mut()[k].clone_from(&verdicts);
        }
        whole.then_some(verdicts)
    })?;
    for (((c, asked), reply), part) in at.into_iter().zip(replies).zip(parts.into_inner()) {
        let verdicts = match reply {
            Ok(verdicts) => verdicts.unwrap_or(part),
            Err(why) => {
                cases[c].unverified = Some(why);
                continue;
            }
        };
        for i in asked {
            match verdicts.get(&i) {
                Some((keep, reason)) => cases[c].decide(i, stage, *keep, reason.clone()),
                None => cases[c].doubt(i, stage, UNREADABLE),
            }
        }
    }
    Ok(())
}

/// One question a box.
fn crops(judge: &BoxJudge, cases: &mut [Open]) -> Result<(), ChatError> {
    let schema = schema(
        "crop",
        json!({
            "type": "object", "required": ["keep", "reason"], "additionalProperties": false,
            "properties": { "keep": { "type": "boolean" }, "reason": { "type": "string" } },
        }),
    );
    let (mut at, mut requests) = (Vec::new(), Vec::new());
    for (c, case) in cases.iter().enumerate() {
        for i in case.kept() {
            let found = &case.case.boxes[i];
            let text = super::worded(&judge.prompts.stages[1], &found.label);
            let image = show::framed(case.case.picture, found.bbox, judge.side);
            let request = super::ask::of_image(image, text, 0, judge.max_new_tokens);
            requests.push(ChatRequest { schema: Some(schema.clone()), ..request });
            at.push((c, i));
        }
    }
    let replies = judge.ask(requests, |_, reply| serde_json::from_str::<OfCrop>(&reply.text).ok())?;
    for ((c, i), reply) in at.into_iter().zip(replies) {
        match reply {
            Ok(Some(v)) => {
                cases[c].decide(i, Stage::Crop, v.keep, v.reason.chars().take(200).collect::<String>());
            }
            Ok(None) => cases[c].doubt(i, Stage::Crop, UNREADABLE),
            Err(why) => cases[c].unverified = Some(why),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_of_range_missing_or_told_twice_is_not_whole() {
        let asked = [0, 2, 3];
        let keeps = |v: &Verdicts| v.iter().map(|(i, (keep, _))| (*i, *keep)).collect::<Vec<_>>();
        for (reply, whole, want) in [
            (
                r#"{"keep": [0, 3], "drop": [{"index": 2, "reason": "a sofa"}]}"#,
                true,
                vec![(0, true), (2, false), (3, true)],
            ),
            (r#"{"keep": [0, 1], "drop": [{"index": 2, "reason": ""}]}"#, false, vec![(0, true), (2, false)]),
            (
                r#"{"keep": [0, 3, -1], "drop": [{"index": 0, "reason": ""}, {"index": 2, "reason": ""}]}"#,
                false,
                vec![(2, false), (3, true)],
            ),
            (r#"{"keep": [0, 2]}"#, false, vec![]),
            ("I keep all of them.", false, vec![]),
        ] {
            let (is_whole, verdicts) = read(reply, &asked);
            assert_eq!((is_whole, keeps(&verdicts)), (whole, want), "{reply}");
        }
    }
}
