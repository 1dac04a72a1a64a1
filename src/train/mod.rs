//! Training: loops, losses and what they share.

use serde_json::Value;

pub mod augment;
pub mod checkpoint;
pub mod depth;
pub mod grounding;
pub mod grounding_loss;
pub mod grpo;
pub mod lm;
pub mod pretrain;
pub mod reasoner;
pub mod rollout;
pub mod run;
pub mod tuning;

/// Why a run that was well begun could not go on: no fault of its input.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Broken(pub String);

/// The keys in which two tables differ, with both values.
pub fn differences(was: &Value, is: &Value) -> Vec<String> {
    fn walk(path: String, was: &Value, is: &Value, out: &mut Vec<String>) {
        match (was.as_object(), is.as_object()) {
            (Some(a), Some(b)) => {
                for key in a.keys().chain(b.keys().filter(|k| !a.contains_key(*k))) {
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    walk(path, &was[key], &is[key], out);
                }
            }
            _ if was != is => out.push(format!("{path} was {was}, is {is}")),
            _ => {}
        }
    }
    let mut out = Vec::new();
    walk(String::new(), was, is, &mut out);
    out
}
