//! Scores of answers, each in two forms (method.md 8 and 10).
//!
//! *Reference* compares as the released code does ([`super::released`]), so that figures stand beside the
//! published ones; *strict* is the same with that code's defects mended. They differ in exactly what the tests
//! at the end are named after: empty answers (10.3), relative error (10.10), failures that score, capitals and
//! substrings (10.11), and verdicts that are missing (10.6). Strictly numbers are read also from text, and truth
//! values are yes and no.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::released;
use crate::data::{Bench, Kind};
use crate::rooms::questions::{number, relative_accuracy};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// As released
    Reference,
    /// With the released code's defects mended
    Strict,
}

impl Form {
    pub const ALL: [Self; 2] = [Self::Reference, Self::Strict];

    pub fn name(self) -> &'static str {
        match self {
            Self::Reference => "reference",
            Self::Strict => "strict",
        }
    }
}

/// What a judge says of an answer that need not match word for word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Judged {
    Yes,
    No,
    /// The judge gave no verdict that can be read.
    Unreadable,
    /// The judge gave no reply; of another time it may.
    Missing,
    /// There is no judge.
    Nobody,
}

/// A question's truth, as far as scoring goes.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    pub bench: Bench,
    pub kind: Kind,
    pub truth: &'a Value,
}

/// From 0 to 1; `None` where it is missing. No answer: the method failed.
pub fn score(form: Form, of: Wanted, answer: Option<&Value>, judged: Judged) -> Option<f64> {
    let strict = form == Form::Strict;
    if !strict && of.kind != Kind::Synonym {
        return Some(released::score(of, answer));
    }
    let Some(answer) = answer else {
        let unmeasured = of.kind == Kind::Synonym && judged == Judged::Nobody && !strict;
        return (!unmeasured).then_some(0.);
    };
    let hit = |yes: bool| Some(f64::from(u8::from(yes)));
    match of.kind {
        Kind::Int => hit(number(answer).is_some_and(|n| of.truth.as_f64() == Some(n))),
        Kind::Float => Some(mean_relative_accuracy(of.truth, answer)),
        Kind::Synonym => match judged {
            _ if strict && plain(answer).is_empty() => Some(0.),
            Judged::Yes => Some(1.),
            Judged::No => Some(0.),
            Judged::Missing | Judged::Unreadable if strict => None,
            Judged::Missing | Judged::Unreadable => Some(0.),
            Judged::Nobody if strict => hit(same_words(of.truth, answer)),
            Judged::Nobody => None,
        },
        _ => hit(same_words(of.truth, answer)),
    }
}

/// Of the relative error: nothing divides by zero, and a sign changes nothing (10.10).
fn mean_relative_accuracy(truth: &Value, answer: &Value) -> f64 {
    let (Some(t), Some(a)) = (truth.as_f64(), number(answer)) else { return 0. };
    relative_accuracy(match t {
        0. if a == 0. => 0.,
        0. => f64::INFINITY,
        _ => (a - t).abs() / t.abs(),
    })
}

/// As text: truth values are yes and no, 3.0 is 3.
fn plain(v: &Value) -> String {
    match v {
        Value::String(s) => s.trim().to_owned(),
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.to_owned(),
        Value::Number(n) => n.as_f64().map_or_else(|| n.to_string(), |x| x.to_string()),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn lower(v: &Value) -> String {
    plain(v).to_lowercase()
}

/// The same apart from capitals, blanks, and punctuation at the end; nothing empty is.
pub fn same_words(truth: &Value, answer: &Value) -> bool {
    let tidy = |v: &Value| {
        let words = lower(v).split_whitespace().collect::<Vec<_>>().join(" ");
        words.trim_end_matches(['.', ',', '!', '?', ';']).trim_matches(['"', '\'']).trim().to_owned()
    };
    let (truth, answer) = (tidy(truth), tidy(answer));
    if answer.is_empty() {
        return false;
    }
    match (truth.parse::<f64>(), answer.parse::<f64>()) {
        (Ok(t), Ok(a)) if t.is_finite() => t == a,
        _ => truth == answer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn both(bench: Bench, kind: Kind, truth: Value, answer: Option<Value>) -> [Option<f64>; 2] {
        Form::ALL
            .map(|form| score(form, Wanted { bench, kind, truth: &truth }, answer.as_ref(), Judged::Nobody))
    }

    #[test]
    fn defect_3_an_empty_answer_is_right_as_released_and_wrong_strictly() {
        for bench in [Bench::Realworldqa, Bench::Omni3d] {
            assert_eq!(both(bench, Kind::Word, json!("lamp"), Some(json!(""))), [Some(1.), Some(0.)]);
            assert_eq!(both(bench, Kind::Word, json!("lamp"), Some(json!("Lamp"))), [Some(1.), Some(1.)]);
            assert_eq!(both(bench, Kind::Word, json!("lamp"), None), [Some(0.), Some(0.)]);
        }
    }

    #[test]
    fn defect_6_a_missing_verdict_is_a_no_as_released_and_missing_strictly() {
        let truth = json!("sofa");
        let of = Wanted { bench: Bench::Gqa, kind: Kind::Synonym, truth: &truth };
        let by = |judged, answer: Option<Value>| Form::ALL.map(|f| score(f, of, answer.as_ref(), judged));
        for none in [Judged::Missing, Judged::Unreadable] {
            assert_eq!(by(none, Some(json!("couch"))), [Some(0.), None]);
        }
        assert_eq!(by(Judged::Yes, Some(json!("couch"))), [Some(1.), Some(1.)]);
        assert_eq!(by(Judged::No, Some(json!("table"))), [Some(0.), Some(0.)]);
        // Without a judge there is no figure to set beside the published ones; words are compared.
        assert_eq!(by(Judged::Nobody, Some(json!("Sofa."))), [None, Some(1.)]);
        assert_eq!(by(Judged::Nobody, None), [None, Some(0.)]);
        assert_eq!(by(Judged::Yes, Some(json!(" "))), [Some(1.), Some(0.)], "nothing empty is ever right");
    }

    #[test]
    fn defect_10_relative_error_has_no_sign_and_a_truth_of_0_is_no_division() {
        let float =
            |truth: f64, answer: f64| both(Bench::Omni3d, Kind::Float, json!(truth), Some(json!(answer)));
        assert_eq!(float(2., 2.), [Some(1.), Some(1.)]);
        // An error of 0.25 passes at 0.50 … 0.70; at 0.75 it would have to be less.
        assert_eq!(float(1., 1.25), [Some(0.5), Some(0.5)]);
        assert_eq!(float(1., 4.), [Some(0.), Some(0.)]);
        assert_eq!(float(-2., 50.), [Some(1.), Some(0.)], "a negative error is less than any bound");
        assert_eq!(float(0., 0.), [Some(0.), Some(1.)], "0/0 raises");
        assert_eq!(float(0., 0.1), [Some(0.), Some(0.)]);
        assert_eq!(both(Bench::Omni3d, Kind::Float, json!(2.), Some(json!("2.0"))), [Some(1.), Some(1.)]);
        assert_eq!(both(Bench::Omni3d, Kind::Float, json!(2.), Some(json!("nan"))), [Some(0.), Some(0.)]);
    }

    #[test]
    fn defect_11_robospatial_a_failure_is_a_no_as_released_and_wrong_strictly() {
        let of = |truth: &str, answer| both(Bench::Robospatial, Kind::YesNo, json!(truth), answer);
        assert_eq!(of("no", None), [Some(1.), Some(0.)]);
        assert_eq!(of("yes", None), [Some(0.), Some(0.)]);
        assert_eq!(of("yes", Some(json!(true))), [Some(1.), Some(1.)]);
        assert_eq!(of("yes", Some(json!("Yes"))), [Some(1.), Some(1.)]);
    }

    #[test]
    fn defect_11_tallyqa_no_answer_counts_as_0_as_released_and_is_wrong_strictly() {
        let of = |truth: i64, answer| both(Bench::Tallyqa, Kind::Int, json!(truth), answer);
        assert_eq!(of(0, None), [Some(1.), Some(0.)]);
        assert_eq!(of(2, None), [Some(0.), Some(0.)]);
        assert_eq!(of(2, Some(json!(2.0))), [Some(1.), Some(1.)]);
        assert_eq!(of(1, Some(json!(true))), [Some(1.), Some(0.)], "a truth value is no number");
    }

    #[test]
    fn defect_11_blink_lower_cases_only_the_prediction_as_released_and_both_strictly() {
        let of =
            |truth: &str, answer: &str| both(Bench::Blink, Kind::Choice, json!(truth), Some(json!(answer)));
        assert_eq!(of("Yes", "Yes"), [Some(0.), Some(1.)]);
        assert_eq!(of("yes", "YES"), [Some(1.), Some(1.)]);
        assert_eq!(both(Bench::Blink, Kind::Choice, json!("3"), Some(json!(3.0))), [Some(1.), Some(1.)]);
    }

    #[test]
    fn defect_11_realworldqa_takes_a_part_of_the_truth_as_released_and_not_strictly() {
        let of = |truth: &str, answer: &str| {
            both(Bench::Realworldqa, Kind::Choice, json!(truth), Some(json!(answer)))
        };
        assert_eq!(of("turn left", "left"), [Some(1.), Some(0.)]);
        assert_eq!(of("turn left", "Turn  left."), [Some(0.), Some(1.)]);
        assert_eq!(of("turn left", "Turn left."), [Some(1.), Some(1.)]);
        assert_eq!(of("left", "turn left"), [Some(0.), Some(0.)]);
    }

    #[test]
    fn whole_numbers_must_be_equal() {
        let of = |answer: Value| both(Bench::Countbench, Kind::Int, json!(7), Some(answer))[1];
        for right in [json!(7), json!(7.0), json!("7"), json!(" 7 ")] {
            assert_eq!(of(right), Some(1.));
        }
        for wrong in [json!(6), json!(7.2), json!("seven"), json!([7]), Value::Null] {
            assert_eq!(of(wrong), Some(0.));
        }
    }
}
