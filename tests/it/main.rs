//! The integration tests, one binary: `cargo test --release parity` runs the part against PyTorch.

#![allow(clippy::print_stderr)]

mod batch;
mod benches;
mod cli;
mod cpython;
mod endpoint;
mod faults;
mod hub;
mod infer;
mod inputs;
mod llm;
mod outputs;
mod parity;
mod refused;
mod results;
mod sandbox;
mod server;
mod train;
mod tune;
mod verify;
mod vllm;
