//! Settings of who runs programs, and what a program may use.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sandbox {
    /// Seconds of the program's own time; tool calls are not counted.
    pub seconds: f64,
    pub memory_mb: usize,
    pub tool_calls: usize,
    /// May programs call `point3d` and `size3d`? Of the planner's instructions those that valor brings
    /// then tell of them.
    pub extended_tools: bool,
    pub executor: ProgramExecutor,
    /// Who runs what the embedded interpreter finds unsupported; where CPython runs all it has no meaning.
    pub fallback: Fallback,
    /// The Python of both: a path, or a name on `PATH`.
    pub python: String,
    /// Do programs that it runs get numpy?
    pub numpy: bool,
}

/// Who runs programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProgramExecutor {
    Embedded,
    Cpython,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fallback {
    None,
    Cpython,
}

impl Sandbox {
    /// May a program come to be run by the system's Python?
    pub fn wants_python(&self) -> bool {
        self.executor == ProgramExecutor::Cpython || self.fallback == Fallback::Cpython
    }
}
