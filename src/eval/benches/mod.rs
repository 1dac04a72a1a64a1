//! The published benches and Rooms, measured (method.md 8 and 10).
//!
//! [`feed`] gives the questions, [`run`] has them answered and appends a [`record`] each to the run's
//! [`folder`], [`metric`] scores, [`summary`] makes the table with intervals of what was recorded,
//! [`compare`] sets two runs side by side. Everything after `run` reads records only.

mod answers;
pub mod batch;
pub mod compare;
pub mod feed;
pub mod folder;
pub mod metric;
mod programs;
pub mod record;
mod released;
pub mod run;
pub mod summary;
mod verdicts;
