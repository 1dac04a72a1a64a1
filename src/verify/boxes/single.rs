//! Box by box: yes or no to each, yes or no to each pair that may be one thing.

use super::ask::{Question, about, parse, worded};
use super::{BoxJudge, Open, Said, Stage, UNREADABLE, show};
use crate::llm::{ChatError, ChatRequest, Message};
use crate::tools::bbox::{iou, nesting};

/// Boxes of one noun that overlap by less than both of these are two things for certain.
const OVERLAP: f64 = 0.15;
const NESTED: f64 = 0.4;

pub(super) fn judge(judge: &BoxJudge, cases: &mut [Open]) -> Result<(), ChatError> {
    stage(judge, cases, Stage::Coarse, Question::Shows)?;
    stage(judge, cases, Stage::Crop, Question::Frames)?;
    dedupe(judge, cases)
}

/// One question to each box that is left.
fn stage(judge: &BoxJudge, cases: &mut [Open], stage: Stage, question: Question) -> Result<(), ChatError> {
    let prompt = match question {
        Question::Shows => &judge.prompts.shows,
        Question::Frames => &judge.prompts.frames,
        Question::Same => &judge.prompts.same,
    };
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
            Ok(Some((yes, said))) => cases[c].decide(i, stage, yes, said),
            Ok(None) => cases[c].decide(i, stage, false, UNREADABLE),
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
                let text = worded(&judge.prompts.same, &a.label);
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
            Ok(Some((false, _))) => {}
            Ok(Some((true, said))) => {
                case.decide(j, Stage::Dedupe, false, format!("the same as {i}: {said}"))
            }
            // Two boxes where there may be one thing: precision wins.
            Ok(None) => case.decide(j, Stage::Dedupe, false, format!("beside {i}: {UNREADABLE}")),
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

/// Yes or no, and what was said. A yes needs `least` confidence, where that is known.
pub(super) fn verdict(said: &Said, least: Option<f64>) -> Option<(bool, String)> {
    let yes = parse(&said.text)?;
    let mut text: String = said.text.trim().chars().take(200).collect();
    if let (true, Some(least), Some(sure)) = (yes, least, said.confidence) {
        text = format!("{text} ({:.0} %)", 100. * sure);
        return Some((sure >= least, text));
    }
    Some((yes, text))
}
