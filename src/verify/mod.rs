//! Verification of a planner's replies without labels (method.md 3): six heads and the reward they make.
//!
//! Format and syntax are decided by rule: [`Reply::parse_strict`](crate::program::Reply::parse_strict),
//! and a run in the sandbox on tools that look at nothing. Logic, attribute, spatial and adherence are
//! asked of a language model ([`Judge`]). Each head has a weight in the configuration; a head of weight
//! 0 is not asked. A verdict that cannot be had is *missing*, and so is then the reward: it is never
//! taken for a no.

pub mod boxes;
mod cache;
mod head;
mod judge;
mod reward;
mod synonym;

pub use head::{general_prompt, parse_verdict, prompt, rooms_prompt, user_turn, verdict_text};
pub use judge::{Ask, Judge, JudgeError, Verdict, check_files, prompts_sha256};
pub use reward::{Scored, Verification, weight};
pub use synonym::{Pair, Said, SynonymJudge};
