//! valor: visual reasoners trained and run without labels (VALOR, ICLR 2026), on candle.
//!
//! A map of the house; dependencies point one way, top to bottom:
//! - [`cli`]: arguments and one thin file per subcommand
//! - [`train`]: optimiser loops for detector, depth and language models
//! - [`eval`]: benches, metrics, intervals
//! - [`pipeline`]: question → answer, the path that inference and benches share
//! - [`fit`]: does a checkpoint fit its network? From headers alone
//! - [`report`]: HTML pages and pictures made from traces
//! - [`planner`]: question → reply (plan and program)
//! - [`verify`]: the heads that judge plans and programs
//! - [`tools`]: `gd_detect`, `depth`, `vqa` behind one trait
//! - [`program`]: the planner's reply: parse, check, run in a jail, trace
//! - [`llm`]: text generation behind one trait
//! - [`models`]: one file or folder per network, weight names as in the checkpoints
//! - [`nn`]: differentiable building blocks and fused CPU ops
//! - [`weights`]: where weights come from
//! - [`rooms`]: the synthetic world, inputs only
//! - [`data`]: boxes, questions and published benches from files, inputs only
//! - [`config`]: typed configuration
//! - [`files`]: files written whole or not at all
//! - [`text`]: strangers' text for a terminal

/// Tells something on stderr. That nobody listens is no error: work is not lost for want of a reader.
macro_rules! notice {
    ($($told:tt)*) => {{
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{}\n", format_args!($($told)*)));
    }};
}

pub mod cli;
pub mod config;
pub mod data;
pub mod eval;
pub mod files;
pub mod fit;
pub mod llm;
pub mod models;
pub mod nn;
pub mod pipeline;
pub mod planner;
pub mod program;
pub mod report;
pub mod rooms;
pub mod text;
pub mod tools;
pub mod train;
pub mod verify;
pub mod weights;
