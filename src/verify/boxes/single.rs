//! Box by box: yes or no to each, yes or no to each pair that may be one thing.

use super::ask::{about, parse, worded};
use super::{BoxJudge, Open, Said, Stage, UNREADABLE, show};
use crate::llm::{ChatError, ChatRequest, Message};
use crate::sight::bbox::{iou, nesting};

/// Boxes of one noun that overlap by less than both of these are two things for certain.
const OVERLAP: f64 = 0.15;
const NESTED: f64 = 0.4;

pub(super) fn judge(judge: &BoxJudge, cases: &mut [Open]) -> Result<(), ChatError> {
    stage(judge, cases, Stage::Coarse, &judge.prompts.stages[0])?;
    stage(judge, cases, Stage::Crop, &judge.prompts.stages[1])?;
    dedupe(judge, cases)
}

/// One question to each box that is left.
fn stage(judge: &BoxJudge, cases: &mut [Open], stage: Stage, prompt: &str) -> Result<(), ChatError> {
    let mut at = Vec::new();
    let mut requests = Vec::new();
    for (c, case) in cases.iter().enumerate() {
        for i in case.kept() {
            let found = &case.case.boxes[i];
            let text = worded(prompt, &found.label);
            requests.push(about(case.case.picture, found.bbox, text, judge.side, 0, judge.max_new_tokens));
            at.push((c, i));
        }
    }
    // A yes that the verifier is not sure of is a no.
    let replies = judge.ask(requests, |_, said| verdict(said, Some(judge.confidence)))?;
    for ((c, i), reply) in at.into_iter().zip(replies) {
        match reply {
            Ok(Some((Verdict::Hesitant, said))) => cases[c].doubt(i, stage, said),
            Ok(Some((verdict, said))) => cases[c].decide(i, stage, verdict == Verdict::Yes, said),
            Ok(None) => cases[c].doubt(i, stage, UNREADABLE),
            Err(why) => cases[c].unverified = Some(why),
        }
    }
    Ok(())
}

/// Of boxes of one noun that mark one thing the detector's best stays.
fn dedupe(judge: &BoxJudge, cases: &mut [Open]) -> Result<(), ChatError> {
    let mut at = Vec::new();
    let mut requests = Vec::new();
    for (c, case) in cases.iter().enumerate() {
        let kept = best_first(case);
        for (k, &i) in kept.iter().enumerate() {
            for &j in &kept[k + 1..] {
                let (a, b) = (&case.case.boxes[i], &case.case.boxes[j]);
                let apart = iou(a.bbox, b.bbox) < OVERLAP && nesting(a.bbox, b.bbox) < NESTED;
                if a.label != b.label || apart {
                    continue;
                }
                let text = worded(&judge.prompts.stages[2], &a.label);
                let image = show::pair(case.case.picture, a.bbox, b.bbox, judge.side);
                requests.push(ChatRequest {
                    messages: vec![Message::user(text).with_images(vec![image])],
                    ..ChatRequest::user("", 0, judge.max_new_tokens)
                });
                at.push((c, i, j));
            }
        }
    }
    let replies = judge.ask(requests, |_, said| verdict(said, None))?;
    // Pairs stand best first, so a box that is gone takes none with it.
    for ((c, i, j), reply) in at.into_iter().zip(replies) {
        let case = &mut cases[c];
        if case.decisions[i].dropped.is_some() || case.decisions[j].dropped.is_some() {
            continue;
        }
        match reply {
            Ok(Some((Verdict::No, _))) => {}
            Ok(Some((_, said))) => case.decide(j, Stage::Dedupe, false, format!("the same as {i}: {said}")),
            // Two boxes where there may be one thing: precision wins.
            Ok(None) => case.doubt(j, Stage::Dedupe, format!("beside {i}: {UNREADABLE}")),
            Err(why) => case.unverified = Some(why),
        }
    }
    Ok(())
}

fn best_first(case: &Open) -> Vec<usize> {
    let mut kept = case.kept();
    let score = |i: usize| case.case.boxes[i].score.unwrap_or(0.);
    kept.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
    kept
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Verdict {
    Yes,
    /// Not sure enough to count as one.
    Hesitant,
    No,
}

/// Yes or no, and what was said. A yes needs `least` confidence, where that is known.
pub(super) fn verdict(said: &Said, least: Option<f64>) -> Option<(Verdict, String)> {
    let yes = parse(&said.text)?;
    let text: String = said.text.trim().chars().take(200).collect();
    Some(match (yes, least, said.confidence) {
        (false, ..) => (Verdict::No, text),
        (true, Some(least), Some(sure)) => {
            let verdict = if sure >= least { Verdict::Yes } else { Verdict::Hesitant };
            (verdict, format!("{text} ({:.0} %)", 100. * sure))
        }
        (true, ..) => (Verdict::Yes, text),
    })
}
