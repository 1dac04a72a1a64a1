//! Scores as the released code gives them (`eval/metrics.py` of damianomarsili/VALOR, at cf2442b): Python's
//! `int`, `float`, `str` and `in`, on whatever a program left in `final_answer`. An exception there is no hit.

use serde_json::Value;

use super::metric::Wanted;
use crate::data::{Bench, Kind};
use crate::rooms::questions::relative_accuracy;

/// From 0 to 1, of all benches but GQA, whose answers a judge compares.
pub(super) fn score(of: Wanted, answer: Option<&Value>) -> f64 {
    let answer = answer.unwrap_or(&Value::Null);
    let hit = |yes: bool| f64::from(u8::from(yes));
    match of.bench {
        Bench::Omni3d => omni3d(of, answer),
        Bench::Robospatial => hit(as_text(of.truth) == if affirms(answer) { "yes" } else { "no" }),
        Bench::Vsr => {
            let label = f64::from(u8::from(as_text(of.truth) == "yes"));
            hit(match answer {
                Value::Number(n) => n.as_f64() == Some(label),
                Value::Bool(_) | Value::String(_) => f64::from(u8::from(affirms(answer))) == label,
                _ => false,
            })
        }
        Bench::Countbench => hit(int(answer).is_some_and(|n| of.truth.as_f64() == Some(n))),
        Bench::Tallyqa => {
            let n = if is_falsy(answer) { Some(0.) } else { int(answer) };
            hit(n.is_some_and(|n| of.truth.as_f64() == Some(n)))
        }
        Bench::Realworldqa => {
            let tidy = |v: &Value| as_text(v).trim_end_matches(['.', ',']).to_lowercase();
            hit(tidy(of.truth).contains(&tidy(answer)))
        }
        Bench::Blink => {
            let text = int(answer).map_or_else(|| as_text(answer).to_lowercase(), |n| format!("{n:.0}"));
            // The truth keeps its capitals (10.11).
            hit(text == as_text(of.truth))
        }
        Bench::Gqa => 0.,
    }
}

fn omni3d(of: Wanted, answer: &Value) -> f64 {
    let hit = |yes: bool| f64::from(u8::from(yes));
    let word = answer.as_bool().map(|yes| Value::from(if yes { "yes" } else { "no" }));
    let answer = word.as_ref().unwrap_or(answer);
    match of.kind {
        Kind::Int => hit(int(answer).is_some_and(|n| of.truth.as_f64() == Some(n))),
        Kind::Float => match (of.truth.as_f64(), float(answer)) {
            // A truth of 0 raises, and a negative one makes every error small (10.10).
            (Some(t), Some(a)) if t != 0. => relative_accuracy((t - a).abs() / t),
            _ => 0.,
        },
        _ => {
            let (Value::String(answer), truth) = (answer, as_text(of.truth)) else { return 0. };
            if ["S", "E", "N", "W"].contains(&truth.as_str()) {
                return hit(answer.starts_with(&truth));
            }
            let answer = answer.to_lowercase();
            hit(answer.contains(&truth) || truth.contains(&answer))
        }
    }
}

/// `True`, or a text with yes or true somewhere in it.
fn affirms(answer: &Value) -> bool {
    match answer {
        Value::Bool(yes) => *yes,
        Value::String(text) => ["yes", "true"].iter().any(|word| text.to_lowercase().contains(word)),
        _ => false,
    }
}

fn is_falsy(v: &Value) -> bool {
    match v {
        Value::Null => true,
        Value::Bool(yes) => !yes,
        Value::Number(n) => n.as_f64() == Some(0.),
        Value::String(text) => text.is_empty(),
        Value::Array(all) => all.is_empty(),
        Value::Object(all) => all.is_empty(),
    }
}

/// `int(v)`: towards zero; of a text only a whole number.
fn int(v: &Value) -> Option<f64> {
    match v {
        Value::Bool(yes) => Some(f64::from(u8::from(*yes))),
        Value::Number(n) => n.as_f64().map(f64::trunc),
        Value::String(text) => text.trim().parse::<i64>().ok().map(|n| n as f64),
        _ => None,
    }
}

/// `float(v)`.
fn float(v: &Value) -> Option<f64> {
    match v {
        Value::Bool(yes) => Some(f64::from(u8::from(*yes))),
        Value::Number(n) => n.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
}

/// `str(v)`.
fn as_text(v: &Value) -> String {
    match v {
        Value::Null => "None".into(),
        Value::Bool(yes) => if *yes { "True" } else { "False" }.into(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Each with what the released functions return for it.
    #[test]
    fn as_the_released_functions_score() {
        use Bench::*;
        let none = Value::Null;
        let cases: [(Bench, Kind, Value, Value, f64); 42] = [
            (Omni3d, Kind::YesNo, json!("yes"), json!("yes, it would"), 1.),
            (Omni3d, Kind::YesNo, json!("yes"), json!(""), 1.),
            (Omni3d, Kind::YesNo, json!("yes"), json!(true), 1.),
            (Omni3d, Kind::YesNo, json!("no"), json!(true), 0.),
            (Omni3d, Kind::YesNo, json!("yes"), json!(1), 0.),
            (Omni3d, Kind::Word, json!("chair"), json!("brown chair"), 1.),
            (Omni3d, Kind::Word, json!("E"), json!("East"), 1.),
            (Omni3d, Kind::Word, json!("E"), json!(""), 0.),
            (Omni3d, Kind::Word, json!("Lamp"), json!("lamp"), 0.),
            (Omni3d, Kind::Word, json!("lamp"), json!("Lamp"), 1.),
            (Omni3d, Kind::Word, json!("lamp"), none.clone(), 0.),
            (Omni3d, Kind::Int, json!(2), json!(2.9), 1.),
            (Omni3d, Kind::Int, json!(2), json!("2.0"), 0.),
            (Omni3d, Kind::Int, json!(1), json!(true), 0.),
            (Omni3d, Kind::Float, json!(2.), json!("2.0"), 1.),
            (Omni3d, Kind::Float, json!(1.), json!(1.25), 0.5),
            (Omni3d, Kind::Float, json!(-2.), json!(50.), 1.),
            (Omni3d, Kind::Float, json!(0.), json!(0.), 0.),
            (Omni3d, Kind::Float, json!(2.), json!("nan"), 0.),
            (Robospatial, Kind::YesNo, json!("no"), json!("unclear"), 1.),
            (Robospatial, Kind::YesNo, json!("no"), json!(3), 1.),
            (Robospatial, Kind::YesNo, json!("no"), none.clone(), 1.),
            (Robospatial, Kind::YesNo, json!("yes"), json!("true"), 1.),
            (Robospatial, Kind::YesNo, json!("yes"), json!("Yes, it fits"), 1.),
            (Vsr, Kind::YesNo, json!("yes"), json!(1), 1.),
            (Vsr, Kind::YesNo, json!("no"), json!("left"), 1.),
            (Vsr, Kind::YesNo, json!("yes"), json!("True"), 1.),
            (Vsr, Kind::YesNo, json!("no"), none.clone(), 0.),
            (Countbench, Kind::Int, json!(7), json!(7.2), 1.),
            (Countbench, Kind::Int, json!(7), json!(" 7 "), 1.),
            (Countbench, Kind::Int, json!(7), json!([7]), 0.),
            (Tallyqa, Kind::Int, json!(1), json!(true), 1.),
            (Tallyqa, Kind::Int, json!(0), json!(""), 1.),
            (Tallyqa, Kind::Int, json!(0), none.clone(), 1.),
            (Tallyqa, Kind::Int, json!(2), json!("2.0"), 0.),
            (Blink, Kind::Choice, json!("yes"), json!(true), 0.),
            (Blink, Kind::Choice, json!("3"), json!(3.7), 1.),
            (Blink, Kind::Choice, json!("Yes"), json!("Yes"), 0.),
            (Realworldqa, Kind::Choice, json!("Left"), json!("left."), 1.),
            (Realworldqa, Kind::Choice, json!("Yes"), json!(true), 0.),
            (Realworldqa, Kind::Choice, json!("turn left"), json!("left"), 1.),
            (Realworldqa, Kind::Word, json!("lamp"), json!(""), 1.),
        ];
        for (bench, kind, truth, answer, want) in cases {
            let got = score(Wanted { bench, kind, truth: &truth }, Some(&answer).filter(|a| !a.is_null()));
            assert_eq!(got, want, "{bench:?}: {answer} for {truth}");
        }
    }
}
