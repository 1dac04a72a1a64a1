//! The planner's reply: parse it, check it, run its program in a jailed worker, keep the trace.
//!
//! A reply is untrusted text. The main process only ever parses it, within bounds ([`reply`],
//! [`check`], [`guard`]); a program runs in another process of the same binary, which has given up
//! everything but memory, time and a pipe ([`Sandbox`], [`Layers`]). The interpreter is `monty`;
//! what its Python lacks and programs use is supplied by rewriting the source (`desugar`). Who asks for
//! it gets the system's Python in a like jail, always or for what `monty` does not run ([`Executor`]).
//!
//! Known gaps of the language are listed, and held to be exact, in `tests/it/sandbox.rs`.

mod alloc;
pub mod check;
#[cfg(unix)]
mod child;
#[cfg(not(unix))]
#[path = "no_child.rs"]
mod child;
mod desugar;
pub mod guard;
mod host;
mod jail;
mod names;
mod python;
pub mod reply;
mod sandbox;
mod values;
mod wire;
mod worker;

use serde::Serialize;

/// What programs see as `img_pth`, whatever the picture's file is called.
pub const IMAGE: &str = "image.png";

pub use alloc::WorkerAllocator;
pub use host::ToolCall;
pub use jail::{Layer, Layers};
pub use python::{Python, PythonError};
pub use reply::{Flag, Reply};
pub use sandbox::{Sandbox, SandboxError};
pub use worker::worker_dispatch;

use wire::Plain;

/// Who runs programs.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Executor {
    /// The interpreter in this binary.
    #[default]
    Embedded,
    /// The system's Python.
    Cpython(Python),
    /// The embedded one, and the system's Python for programs that it finds unsupported.
    Fallback(Python),
}

/// Who ran a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Interpreter {
    Embedded,
    Cpython,
}

/// What one program may use.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Execution time, without the tools'.
    pub seconds: f64,
    /// How much later the parent ends a worker that has not ended the program itself.
    pub grace_seconds: f64,
    /// Live memory of the program, bytes.
    pub memory_bytes: usize,
    /// Address space of the worker process beyond what it starts with, bytes.
    pub address_space: u64,
    /// Depth of calls.
    pub recursion: usize,
    pub host_calls: usize,
    /// Has it `point3d` and `size3d`, too?
    pub extended_tools: bool,
    /// What it may print, bytes.
    pub output_bytes: usize,
    /// Longest prompt for a tool, bytes.
    pub prompt_bytes: usize,
    pub answer_depth: u32,
    pub answer_nodes: usize,
    /// Longest message on the pipe, bytes.
    pub message_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            seconds: 1.,
            grace_seconds: 0.3,
            memory_bytes: 128 << 20,
            address_space: 768 << 20,
            recursion: 200,
            host_calls: 200,
            extended_tools: false,
            output_bytes: 64 << 10,
            prompt_bytes: 4 << 10,
            answer_depth: 32,
            answer_nodes: 100_000,
            message_bytes: 1 << 20,
        }
    }
}

impl Limits {
    /// Where the allocator ends the worker: a single step may pass the soft limit by half of it.
    fn hard_memory(&self) -> usize {
        self.memory_bytes + self.memory_bytes / 2
    }

    /// The part that a worker has to know.
    fn to_plain(&self) -> Plain {
        let int = |n: usize| Plain::Int(n as i64);
        Plain::List(vec![
            Plain::Float(self.seconds),
            int(self.memory_bytes),
            int(self.recursion),
            int(self.output_bytes),
            int(self.prompt_bytes),
            int(self.answer_depth as usize),
            int(self.answer_nodes),
            int(self.message_bytes),
        ])
    }

    fn from_plain(plain: &Plain) -> Option<Self> {
        let Plain::List(items) = plain else { return None };
        let [Plain::Float(seconds), rest @ ..] = items.as_slice() else { return None };
        let int = |at: usize| match rest.get(at) {
            Some(Plain::Int(n)) => usize::try_from(*n).ok(),
            _ => None,
        };
        Some(Self {
            seconds: *seconds,
            memory_bytes: int(0)?,
            recursion: int(1)?,
            output_bytes: int(2)?,
            prompt_bytes: int(3)?,
            answer_depth: u32::try_from(int(4)?).ok()?,
            answer_nodes: int(5)?,
            message_bytes: int(6)?,
            ..Self::default()
        })
    }
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $variant:ident => $name:literal),* $(,)?) => {
        /// What kept a program from answering.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ErrorKind { $($(#[$doc])* $variant),* }

        impl ErrorKind {
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }
        }
    };
}

kinds! {
    /// Ran out of execution time.
    Timeout => "timeout",
    /// Ran out of memory.
    Memory => "memory",
    /// Calls or values nested too deeply.
    Recursion => "recursion",
    /// Printed too much.
    OutputLimit => "output_limit",
    /// Called tools too often.
    HostCalls => "host_calls",
    /// Asked for something that no program gets: files, processes, another picture.
    Denied => "denied",
    /// Python that this executor does not run.
    Unsupported => "unsupported",
    /// Ended itself where it may not, or before there was an answer.
    Exit => "exit",
    /// The worker died.
    Crash => "crash",
    /// The worker said something that no worker says.
    Protocol => "protocol",
    /// `final_answer` is not data, too large, or not finite.
    BadAnswer => "bad_answer",
    /// `final_answer` was never set.
    NoAnswer => "NoAnswer",
    /// Any other Python exception.
    Error => "error",
    /// No worker could be started: says nothing about the program.
    NoSandbox => "no_sandbox",
}

impl ErrorKind {
    /// One that a worker may name.
    fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.as_str() == name && *kind != Self::NoSandbox)
    }
}

impl Serialize for ErrorKind {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.as_str())
    }
}

impl std::fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A program failed. A failure is never an answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProgramError {
    pub kind: ErrorKind,
    /// The Python exception's type, where there was one.
    #[serde(rename = "type")]
    pub type_name: Option<String>,
    /// Line of the program, from 1, as it was given.
    pub line: Option<u32>,
    pub message: String,
}

impl ProgramError {
    fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, type_name: None, line: None, message: message.into() }
    }

    fn syntax(line: Option<u32>, message: impl Into<String>) -> Self {
        Self {
            kind: ErrorKind::Error,
            type_name: Some("SyntaxError".to_owned()),
            line,
            message: message.into(),
        }
    }

    fn unsupported(line: Option<u32>, message: impl Into<String>) -> Self {
        Self { line, ..Self::new(ErrorKind::Unsupported, message) }
    }

    fn bad_answer(what: &str) -> Self {
        Self::new(ErrorKind::BadAnswer, format!("final_answer is {what}"))
    }

    fn no_answer() -> Self {
        Self::new(ErrorKind::NoAnswer, "the program never set final_answer")
    }
}

impl std::fmt::Display for ProgramError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.kind)?;
        if let Some(name) = &self.type_name {
            write!(f, " ({name})")?;
        }
        if let Some(line) = self.line {
            write!(f, " at line {line}")?;
        }
        write!(f, ": {}", self.message)
    }
}

impl std::error::Error for ProgramError {}

/// How one run of a program went.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub result: Result<serde_json::Value, ProgramError>,
    /// Every tool call in order, with what it gave: the trace.
    pub calls: Vec<ToolCall>,
    /// What the program printed.
    pub stdout: String,
    /// Wall time of the program without its tool calls.
    pub seconds: f64,
    /// The one that the result is of.
    pub interpreter: Interpreter,
}

impl Outcome {
    /// `{"answer": …}` or `{"error": {"kind", "type", "line", "message"}}`.
    pub fn to_json(&self) -> serde_json::Value {
        match &self.result {
            Ok(answer) => serde_json::json!({ "answer": answer }),
            Err(error) => serde_json::json!({ "error": error }),
        }
    }
}
