//! Settings of measuring.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Eval {
    pub judge: AnswerJudge,
}

/// Judges whether two answers mean the same, where a bench asks for that (GQA).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnswerJudge {
    /// Empty: nobody judges.
    pub model: String,
    pub max_new_tokens: usize,
    /// File where verdicts are kept; empty: in memory alone.
    pub cache: String,
}
