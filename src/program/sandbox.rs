//! The parent's side: keeps one worker, gives it programs, serves its tool calls, ends it when it
//! is late, replaces it when it is gone. Everything that a worker says is taken as hostile.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::child::Worker;
use super::host::{self, Request, ToolCall};
use super::wire::Plain;
use super::{ErrorKind, Executor, Interpreter, Layers, Limits, Outcome, ProgramError, Python, guard};
use crate::sight::Tools;

/// A worker could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("cannot start the program worker {path}: {source}")]
    Spawn { path: String, source: io::Error },
    #[error("{path} does not answer as a program worker; give the path of the valor binary")]
    NotAWorker { path: String },
    #[error("programs can only be run on Unix: this platform has no way to confine them")]
    Platform,
    #[error(
        "the executor cpython refuses to start where its jail is not whole: {missing}; set sandbox.executor = \
         \"embedded\" and sandbox.fallback = \"none\""
    )]
    Weak { missing: String },
    #[error("{path} {why}; name another as sandbox.python, or set sandbox.executor = \"embedded\"")]
    Python { path: PathBuf, why: String },
}

/// Runs programs, one at a time, in worker processes. One with the embedded interpreter is started once
/// and replaced when it dies; one with CPython runs one program. Keep a sandbox per thread.
pub struct Sandbox {
    limits: Limits,
    executor: Executor,
    executable: Option<PathBuf>,
    embedded: Option<Worker>,
    /// Has not run anything yet.
    python: Option<Worker>,
    layers: Layers,
}

/// A worker is replaced after this much running: its processor-time limit holds for its whole life.
pub(super) const WORKER_LIFE: Duration = Duration::from_secs(60);
/// How long a new worker may take to get ready.
pub(super) const START_UP: Duration = Duration::from_secs(20);

impl Sandbox {
    /// Starts a worker with the embedded interpreter: this same executable, which must call
    /// [`super::worker_dispatch`] first thing in its `main`.
    ///
    /// # Errors
    /// See [`SandboxError`].
    pub fn start(limits: Limits) -> Result<Self, SandboxError> {
        Self::open(limits, Executor::Embedded, None)
    }

    /// As [`Self::start`] with the worker's executable named: for tests and other programs that
    /// link this library.
    ///
    /// # Errors
    /// See [`SandboxError`].
    pub fn with_executable(limits: Limits, executable: impl Into<PathBuf>) -> Result<Self, SandboxError> {
        Self::open(limits, Executor::Embedded, Some(executable.into()))
    }

    /// With the executor named. Every interpreter that it may use is started, to see that it can be.
    ///
    /// # Errors
    /// See [`SandboxError`].
    pub fn open(
        limits: Limits,
        executor: Executor,
        executable: Option<PathBuf>,
    ) -> Result<Self, SandboxError> {
        let (embedded, python) = (None, None);
        let layers = Layers::default();
        let mut sandbox = Self { limits, executor, executable, embedded, python, layers };
        if let Executor::Cpython(python) | Executor::Fallback(python) = sandbox.executor.clone() {
            sandbox.ready_python(&python)?;
        }
        if !matches!(sandbox.executor, Executor::Cpython(_)) {
            sandbox.ready_embedded()?;
        }
        Ok(sandbox)
    }

    /// What confines the worker that programs run in first.
    pub fn layers(&self) -> &Layers {
        &self.layers
    }

    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The process id of the worker with the embedded interpreter, if one is waiting.
    pub fn worker_id(&self) -> Option<u32> {
        self.embedded.as_ref().map(Worker::id)
    }

    /// Runs a program on a picture. Always comes back, whatever the program does; the time that
    /// `tools` take is not the program's.
    ///
    /// A program that goes to the fallback starts anew there: its calls are those of its second run, its
    /// time is that of both.
    pub fn run(&mut self, source: &str, img_pth: &str, tools: &mut dyn Tools) -> Outcome {
        match self.executor.clone() {
            Executor::Embedded => self.attempt(None, source, img_pth, tools),
            Executor::Cpython(python) => self.attempt(Some(&python), source, img_pth, tools),
            Executor::Fallback(python) => {
                let first = self.attempt(None, source, img_pth, tools);
                if !first.result.as_ref().is_err_and(|e| e.kind == ErrorKind::Unsupported) {
                    return first;
                }
                let second = self.attempt(Some(&python), source, img_pth, tools);
                Outcome { seconds: first.seconds + second.seconds, ..second }
            }
        }
    }

    fn attempt(
        &mut self,
        python: Option<&Python>,
        source: &str,
        img_pth: &str,
        tools: &mut dyn Tools,
    ) -> Outcome {
        let mut run = Run { calls: Vec::new(), stdout: String::new(), spent: Duration::ZERO };
        let result = match guard::check(source) {
            Err(e) => Err(ProgramError::syntax(None, e.to_string())),
            Ok(()) => self.run_in_worker(&mut run, python, source, img_pth, tools),
        };
        let interpreter = if python.is_some() { Interpreter::Cpython } else { Interpreter::Embedded };
        let seconds = run.spent.as_secs_f64();
        Outcome { result, calls: run.calls, stdout: run.stdout, seconds, interpreter }
    }

    fn run_in_worker(
        &mut self,
        run: &mut Run,
        python: Option<&Python>,
        source: &str,
        img_pth: &str,
        tools: &mut dyn Tools,
    ) -> Result<serde_json::Value, ProgramError> {
        let ready = match python {
            None => self.ready_embedded(),
            Some(python) => self.ready_python(python),
        };
        if let Err(e) = ready {
            return Err(ProgramError::new(ErrorKind::NoSandbox, e.to_string()));
        }
        let slot = if python.is_some() { &mut self.python } else { &mut self.embedded };
        let mut worker = slot.take().expect("just made ready");
        // CPython has no limit of its own on time that a program could not catch: its time ends here.
        let grace = if python.is_some() { 0. } else { self.limits.grace_seconds };
        let most = self.limits.seconds + grace;
        let end = run.drive(&mut worker, &self.limits, most, source, img_pth, tools);
        let mut code = None;
        match &end {
            End::Answered(_) | End::Failed(_)
                if run.spent + worker.age <= WORKER_LIFE && python.is_none() =>
            {
                worker.age += run.spent;
                *slot = Some(worker);
            }
            End::Gone => code = worker.finish(),
            _ => drop(worker),
        }
        match end {
            End::Answered(answer) => Ok(answer),
            End::Failed(error) => Err(error),
            End::Late => Err(ProgramError::new(ErrorKind::Timeout, format!("still running after {most} s"))),
            End::Gone if code == Some(monty_types::OOM_EXIT_CODE) => {
                Err(ProgramError::new(ErrorKind::Memory, "used more memory than a program may"))
            }
            End::Gone => Err(ProgramError::new(ErrorKind::Crash, "the worker died")),
            End::Odd(what) => Err(ProgramError::new(ErrorKind::Protocol, format!("the worker sent {what}"))),
        }
    }

    /// Makes sure that a living worker waits.
    fn ready_embedded(&mut self) -> Result<(), SandboxError> {
        if self.embedded.as_mut().is_some_and(Worker::is_alive) {
            return Ok(());
        }
        self.embedded = None;
        let (worker, layers) = Worker::embedded(self.executable.as_deref(), &self.limits)?;
        self.layers = layers;
        self.embedded = Some(worker);
        Ok(())
    }

    fn ready_python(&mut self, python: &Python) -> Result<(), SandboxError> {
        if self.python.as_mut().is_some_and(Worker::is_alive) {
            return Ok(());
        }
        self.python = None;
        let (worker, layers) = Worker::python(self.executable.as_deref(), &self.limits, python)?;
        if matches!(self.executor, Executor::Cpython(_)) {
            self.layers = layers;
        }
        self.python = Some(worker);
        Ok(())
    }
}

/// Time that a worker may still keep its parent waiting.
pub(super) struct Budget {
    pub left: Duration,
}

/// How a worker's turn ended.
enum End {
    Answered(serde_json::Value),
    Failed(ProgramError),
    Late,
    Gone,
    Odd(String),
}

struct Run {
    calls: Vec<ToolCall>,
    stdout: String,
    spent: Duration,
}

impl Run {
    fn drive(
        &mut self,
        worker: &mut Worker,
        limits: &Limits,
        seconds: f64,
        source: &str,
        img_pth: &str,
        tools: &mut dyn Tools,
    ) -> End {
        let whole = Duration::from_secs_f64(seconds);
        let mut budget = Budget { left: whole };
        let end = self.converse(worker, limits, &mut budget, source, img_pth, tools).unwrap_or_else(|e| {
            match e.kind() {
                io::ErrorKind::InvalidData => End::Odd(e.to_string()),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => End::Late,
                _ => End::Gone,
            }
        });
        self.spent = whole - budget.left;
        end
    }

    fn converse(
        &mut self,
        worker: &mut Worker,
        limits: &Limits,
        budget: &mut Budget,
        source: &str,
        img_pth: &str,
        tools: &mut dyn Tools,
    ) -> io::Result<End> {
        let start = vec![Plain::str("run"), Plain::str(source), Plain::str(img_pth), limits.to_plain()];
        worker.send(&Plain::List(start), budget)?;
        loop {
            let Plain::List(message) = worker.receive(limits, budget)? else {
                return Ok(End::Odd("no message at all".to_owned()));
            };
            let Some(request) = self.end_or_request(message, limits)? else {
                return Ok(End::Odd("a message that no worker sends".to_owned()));
            };
            let request = match request {
                Next::End(end) => return Ok(end),
                Next::Call(request) => request,
            };
            let reply = if self.calls.len() >= limits.host_calls {
                vec![Plain::str("stop")]
            } else {
                let (result, entry) = host::call(&request, img_pth, limits, tools);
                self.calls.push(entry);
                match result {
                    Ok(value) => vec![Plain::str("return"), value],
                    Err(e) => vec![Plain::str("raise"), Plain::str(e.type_name), Plain::str(e.message)],
                }
            };
            worker.send(&Plain::List(reply), budget)?;
        }
    }

    /// Reads one message; `None` if it is none of those that a worker sends.
    fn end_or_request(&mut self, message: Vec<Plain>, limits: &Limits) -> io::Result<Option<Next>> {
        let mut parts = message.into_iter();
        let Some(Plain::Str(op)) = parts.next() else { return Ok(None) };
        let rest: Vec<Plain> = parts.collect();
        Ok(match (op.as_str(), rest.as_slice()) {
            ("call", [Plain::Str(tool), Plain::List(args), Plain::Dict(kwargs), line]) => {
                let line = match line {
                    Plain::Int(line) => u32::try_from(*line).ok(),
                    _ => None,
                };
                let request =
                    Request { tool: tool.clone(), args: args.clone(), kwargs: kwargs.clone(), line };
                Some(Next::Call(request))
            }
            ("done", [answer, Plain::Str(stdout)]) => {
                self.print(stdout, limits);
                Some(Next::End(match answer.to_json() {
                    Some(answer) => End::Answered(answer),
                    None => End::Failed(ProgramError::bad_answer("a number that is not finite")),
                }))
            }
            ("failed", [Plain::Str(kind), type_name, line, Plain::Str(message), Plain::Str(stdout)]) => {
                self.print(stdout, limits);
                ErrorKind::from_name(kind).map(|kind| {
                    Next::End(End::Failed(ProgramError {
                        kind,
                        type_name: type_name.as_str().map(str::to_owned),
                        line: if let Plain::Int(line) = line { u32::try_from(*line).ok() } else { None },
                        message: message.clone(),
                    }))
                })
            }
            _ => None,
        })
    }

    fn print(&mut self, stdout: &str, limits: &Limits) {
        self.stdout = stdout.chars().take(limits.output_bytes).collect();
    }
}

enum Next {
    Call(Request),
    End(End),
}
