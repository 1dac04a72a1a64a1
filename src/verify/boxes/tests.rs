//! The judge on scripted verifiers.

use super::*;
use crate::config::Config;
use crate::llm::{ChatReply, Finish};
use std::sync::Mutex;

/// Answers by a function of the request's text and of how often it was asked something.
struct Scripted<F>(F, Mutex<usize>);

impl<F: Fn(&str, usize) -> Result<String, ChatError> + Send + Sync> ChatModel for Scripted<F> {
    fn name(&self) -> &str {
        "scripted"
    }

    fn chat(
        &self,
        requests: &[ChatRequest],
        _: &SamplingOptions,
        _: Option<&mut dyn FnMut(usize, &str)>,
    ) -> Vec<Result<ChatReply, ChatError>> {
        requests
            .iter()
            .map(|r| {
                let mut n = self.1.lock().unwrap();
                *n += 1;
                let mut text = (self.0)(&r.messages[0].text, *n)?;
                if let Some(schema) = &r.schema {
                    text = schema.fitted(&text).map_err(ChatError::Misfit)?.to_owned();
                }
                Ok(ChatReply { text, finish: Finish::Stop, prompt_tokens: 0, new_tokens: 0, trace: None })
            })
            .collect()
    }
}

fn judged(
    granularity: &str,
    boxes: &[Detection],
    answer: impl Fn(&str, usize) -> Result<String, ChatError> + Send + Sync + 'static,
) -> (Result<Vec<Decision>, Unverified>, usize) {
    let set = [format!("grounding.mining.granularity={granularity}")];
    let config = Config::resolve(None, &set).unwrap();
    let model = Arc::new(Scripted(answer, Mutex::new(0)));
    let judge = BoxJudge::new(model.clone(), &config.grounding.mining).unwrap();
    let picture = Picture::new(64, 48, vec![90; 64 * 48 * 3]);
    let out = judge.judge(&[Case { picture: &picture, boxes }]).unwrap().remove(0);
    let asked = *model.1.lock().unwrap();
    (out, asked)
}

fn found(label: &str, x: f64, score: f64) -> Detection {
    Detection { bbox: [x, 10., x + 20., 30.], label: label.into(), score: Some(score) }
}

fn three() -> [Detection; 3] {
    [found("chair", 0., 0.5), found("chair", 2., 0.9), found("sofa", 40., 0.4)]
}

fn dropped(decisions: &[Decision]) -> Vec<Option<Stage>> {
    decisions.iter().map(|d| d.dropped).collect()
}

#[test]
fn box_by_box_each_stage_drops_its_own_and_the_best_of_a_pair_stays() {
    let (out, asked) = judged("box", &three(), |text, _| {
        Ok(if text.contains("sofa") && text.contains("whole") { "No." } else { "yes" }.into())
    });
    let out = out.unwrap();
    assert_eq!(dropped(&out), [Some(Stage::Dedupe), None, Some(Stage::Crop)]);
    assert_eq!(asked, 3 + 3 + 1, "the pair of chairs is asked about once, the lone sofa never");
    assert!(out[0].reason.contains("the same as 1"), "{out:?}");
}

#[test]
fn a_verifier_that_only_says_no_or_yes_has_a_clear_outcome() {
    let (out, asked) = judged("box", &three(), |_, _| Ok("no".into()));
    assert_eq!((dropped(&out.unwrap()), asked), (vec![Some(Stage::Coarse); 3], 3));
    let (out, _) = judged("pass", &three(), |text, _| {
        let crop = text.contains("inside of one box");
        Ok(if crop { r#"{"keep": true, "reason": ""}"# } else { r#"{"keep": [0, 1, 2], "drop": []}"# }.into())
    });
    assert_eq!(dropped(&out.unwrap()), [None; 3]);
}

#[test]
fn what_says_nothing_of_use_is_asked_again_and_then_costs_the_box_not_the_picture() {
    let (out, asked) = judged("box", &three()[..1], |_, _| Ok("maybe".into()));
    assert_eq!((dropped(&out.unwrap()), asked), (vec![Some(Stage::Coarse)], TRIES));
    let (out, _) = judged("box", &three()[..1], |_, n| Ok(if n == 1 { "hm" } else { "yes" }.into()));
    assert_eq!(dropped(&out.unwrap()), [None]);
    // Of numbers that are not there, missing or told twice the clear ones count.
    let (out, _) = judged("pass", &three(), |text, _| {
        let crop = text.contains("inside of one box");
        let parted = r#"{"keep": [1, 7], "drop": [{"index": 1, "reason": ""}]}"#;
        Ok(if crop { r#"{"keep": true, "reason": ""}"# } else { parted }.into())
    });
    assert_eq!(dropped(&out.unwrap()), [Some(Stage::Coarse); 3]);
    let (out, _) = judged("pass", &three(), |text, n| {
        let crop = text.contains("inside of one box");
        let (bad, good) =
            (r#"{"keep": "all"}"#, r#"{"keep": [1, 2], "drop": [{"index": 0, "reason": "a shadow"}]}"#);
        let last = r#"{"keep": [1, 2], "drop": []}"#;
        let parted = if n == 1 {
            bad
        } else if text.contains("\n0 →") {
            good
        } else {
            last
        };
        Ok(if crop { r#"{"keep": true, "reason": ""}"# } else { parted }.into())
    });
    let out = out.unwrap();
    assert_eq!(dropped(&out), [Some(Stage::Coarse), None, None]);
    assert_eq!(out[0].reason, "a shadow");
}

#[test]
fn pass_by_pass_the_last_look_is_also_at_one_box() {
    let (out, asked) = judged("pass", &three()[..1], |_, n| {
        let replies = [
            r#"{"keep": [0], "drop": []}"#,
            r#"{"keep": true, "reason": ""}"#,
            r#"{"keep": [], "drop": [{"index": 0, "reason": "a stool"}]}"#,
        ];
        Ok(replies[n - 1].into())
    });
    let out = out.unwrap();
    assert_eq!((dropped(&out), asked), (vec![Some(Stage::Dedupe)], 3));
    assert_eq!(out[0].reason, "a stool");
}

#[test]
fn a_verifier_that_is_away_decides_nothing() {
    for granularity in ["box", "pass"] {
        let (out, asked) =
            judged(granularity, &three()[..1], |_, _| Err(ChatError::NoReply("HTTP 503".into())));
        assert_eq!((out.unwrap_err(), asked), ("HTTP 503".to_owned(), 1), "{granularity}");
    }
}

#[test]
fn an_uncertain_yes_is_a_no() {
    let said = |text: &str, p: f64| {
        let trace = crate::llm::TokenTrace { log_probs: vec![p.ln() as f32], ..Default::default() };
        let reply = ChatReply {
            text: text.into(),
            finish: Finish::Stop,
            prompt_tokens: 0,
            new_tokens: 1,
            trace: Some(trace),
        };
        single::verdict(&Said::new(reply), Some(0.9)).map(|v| v.0)
    };
    use single::Verdict::{Hesitant, No, Yes};
    assert_eq!(
        (said("yes", 0.95), said("yes", 0.85), said("no", 0.5)),
        (Some(Yes), Some(Hesitant), Some(No))
    );
    assert_eq!(said("perhaps", 0.99), None);
}

#[test]
fn no_boxes_no_questions() {
    for granularity in ["box", "pass"] {
        let (out, asked) = judged(granularity, &[], |_, _| Ok("yes".into()));
        assert_eq!((out.unwrap(), asked), (vec![], 0));
    }
}
