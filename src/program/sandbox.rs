//! The parent's side: keeps one worker, gives it programs, serves its tool calls, ends it when it
//! is late, replaces it when it is gone. Everything that a worker says is taken as hostile.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::host::{self, Request, ToolCall};
use super::wire::{self, Plain};
use super::{ErrorKind, Layers, Limits, Outcome, ProgramError, guard};
use crate::tools::Tools;

/// A worker could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("cannot start the program worker {path}: {source}")]
    Spawn { path: String, source: io::Error },
    #[error("{path} does not answer as a program worker; give the path of the valor binary")]
    NotAWorker { path: String },
    #[error("programs can only be run on Unix: this platform has no way to confine them")]
    Platform,
}

/// Runs programs, one at a time, in a worker process that is started once and replaced when it
/// dies. Keep one per thread.
pub struct Sandbox {
    limits: Limits,
    executable: Option<PathBuf>,
    worker: Option<worker::Worker>,
    layers: Layers,
}

/// A worker is replaced after this much running: its processor-time limit holds for its whole life.
const WORKER_LIFE: Duration = Duration::from_secs(60);
/// Seconds of processor time after which the kernel ends a worker.
const WORKER_CPU: u64 = 90;
/// How long a new worker may take to get ready.
const START_UP: Duration = Duration::from_secs(20);
/// Deepest message that a worker may send.
const WIRE_DEPTH: u32 = 48;

impl Sandbox {
    /// Starts a worker: this same executable, which must call [`super::worker_dispatch`] first thing
    /// in its `main`.
    ///
    /// # Errors
    /// See [`SandboxError`].
    pub fn start(limits: Limits) -> Result<Self, SandboxError> {
        Self::launch(limits, None)
    }

    /// As [`Self::start`] with the worker's executable named: for tests and other programs that
    /// link this library.
    ///
    /// # Errors
    /// See [`SandboxError`].
    pub fn with_executable(limits: Limits, executable: impl Into<PathBuf>) -> Result<Self, SandboxError> {
        Self::launch(limits, Some(executable.into()))
    }

    fn launch(limits: Limits, executable: Option<PathBuf>) -> Result<Self, SandboxError> {
        let mut sandbox = Self { limits, executable, worker: None, layers: Layers::default() };
        sandbox.ready_worker()?;
        Ok(sandbox)
    }

    /// What confines the worker here.
    pub fn layers(&self) -> &Layers {
        &self.layers
    }

    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The worker's process id, if one is waiting.
    pub fn worker_id(&self) -> Option<u32> {
        self.worker.as_ref().map(worker::Worker::id)
    }

    /// Runs a program on a picture. Always comes back, whatever the program does; the time that
    /// `tools` take is not the program's.
    pub fn run(&mut self, source: &str, img_pth: &str, tools: &mut dyn Tools) -> Outcome {
        let mut run = Run { calls: Vec::new(), stdout: String::new(), spent: Duration::ZERO };
        let result = match guard::check(source) {
            Err(e) => Err(ProgramError::syntax(None, e.to_string())),
            Ok(()) => self.run_in_worker(&mut run, source, img_pth, tools),
        };
        Outcome { result, calls: run.calls, stdout: run.stdout, seconds: run.spent.as_secs_f64() }
    }

    fn run_in_worker(
        &mut self,
        run: &mut Run,
        source: &str,
        img_pth: &str,
        tools: &mut dyn Tools,
    ) -> Result<serde_json::Value, ProgramError> {
        if let Err(e) = self.ready_worker() {
            return Err(ProgramError::new(ErrorKind::Crash, e.to_string()));
        }
        let worker = self.worker.as_mut().expect("just made ready");
        let end = run.drive(worker, &self.limits, source, img_pth, tools);
        let healthy = match &end {
            End::Answered(_) | End::Failed(_) => run.spent + worker.age <= WORKER_LIFE,
            End::Late | End::Gone | End::Odd(_) => false,
        };
        worker.age += run.spent;
        let code = if healthy { None } else { self.worker.take().and_then(worker::Worker::finish) };
        match end {
            End::Answered(answer) => Ok(answer),
            End::Failed(error) => Err(error),
            End::Late => Err(ProgramError::new(
                ErrorKind::Timeout,
                format!("still running after {} s", self.limits.seconds + self.limits.grace_seconds),
            )),
            End::Gone if code == Some(monty_types::OOM_EXIT_CODE) => {
                Err(ProgramError::new(ErrorKind::Memory, "used more memory than a program may"))
            }
            End::Gone => Err(ProgramError::new(ErrorKind::Crash, "the worker died")),
            End::Odd(what) => Err(ProgramError::new(ErrorKind::Protocol, format!("the worker sent {what}"))),
        }
    }

    /// Makes sure that a living worker waits.
    fn ready_worker(&mut self) -> Result<(), SandboxError> {
        if self.worker.as_mut().is_some_and(worker::Worker::is_alive) {
            return Ok(());
        }
        self.worker = None;
        let mut worker = worker::Worker::spawn(self.executable.as_deref(), &self.limits)?;
        let hello = worker.receive(&self.limits, &mut Budget { left: START_UP });
        let layers = match hello.as_ref() {
            Ok(Plain::List(parts)) => match parts.as_slice() {
                [Plain::Str(op), layers] if op == "ready" => Layers::from_plain(layers),
                _ => None,
            },
            _ => None,
        };
        let Some(layers) = layers else {
            return Err(SandboxError::NotAWorker { path: worker::shown(self.executable.as_deref()) });
        };
        self.layers = layers;
        self.worker = Some(worker);
        Ok(())
    }
}

/// Time that a worker may still keep its parent waiting.
struct Budget {
    left: Duration,
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
        worker: &mut worker::Worker,
        limits: &Limits,
        source: &str,
        img_pth: &str,
        tools: &mut dyn Tools,
    ) -> End {
        let whole = Duration::from_secs_f64(limits.seconds + limits.grace_seconds);
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
        worker: &mut worker::Worker,
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

#[cfg(unix)]
mod worker {
    use std::io::{self, Read, Write};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::path::Path;
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use super::{Budget, Limits, Plain, SandboxError, WIRE_DEPTH, WORKER_CPU, wire};
    use crate::program::worker::ARGUMENT;

    pub(super) struct Worker {
        child: Child,
        link: UnixStream,
        /// How long it has run programs.
        pub age: Duration,
    }

    /// The running executable, even if its file has been replaced since.
    const THIS: &str = if cfg!(target_os = "linux") { "/proc/self/exe" } else { "" };

    pub(super) fn shown(executable: Option<&Path>) -> String {
        executable.map_or_else(|| "this executable".to_owned(), |path| path.display().to_string())
    }

    impl Worker {
        pub fn spawn(executable: Option<&Path>, limits: &Limits) -> Result<Self, SandboxError> {
            let failed = |source| SandboxError::Spawn { path: shown(executable), source };
            let path = match executable {
                // The worker starts in another folder.
                Some(path) => std::path::absolute(path).map_err(failed)?,
                None if !THIS.is_empty() => THIS.into(),
                None => std::env::current_exe().map_err(failed)?,
            };
            let (link, theirs) = UnixStream::pair().map_err(failed)?;
            let child = Command::new(path)
                .arg(ARGUMENT)
                .args(
                    [u64::from(std::process::id()), limits.address_space, WORKER_CPU].map(|n| n.to_string()),
                )
                .env_clear()
                .current_dir("/")
                .stdin(Stdio::from(OwnedFd::from(theirs)))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .map_err(failed)?;
            Ok(Self { child, link, age: Duration::ZERO })
        }

        pub fn id(&self) -> u32 {
            self.child.id()
        }

        pub fn is_alive(&mut self) -> bool {
            matches!(self.child.try_wait(), Ok(None))
        }

        pub fn send(&mut self, message: &Plain, budget: &mut Budget) -> io::Result<()> {
            // A tool may say a lot; a program's text is bounded already.
            wire::send(&mut Timed { link: &mut self.link, budget }, message, 16 << 20)
        }

        pub fn receive(&mut self, limits: &Limits, budget: &mut Budget) -> io::Result<Plain> {
            wire::receive(&mut Timed { link: &mut self.link, budget }, limits.message_bytes, WIRE_DEPTH)
        }

        /// Ends the worker and gives its exit code, if it ended by itself.
        pub fn finish(mut self) -> Option<i32> {
            // A worker that is on its way out may still tell why.
            if self.link.set_read_timeout(Some(Duration::from_millis(1))).is_ok() {
                for _ in 0..20 {
                    match self.child.try_wait() {
                        Ok(Some(status)) => return status.code(),
                        _ => match self.link.read(&mut [0; 1]) {
                            Ok(0) => std::thread::sleep(Duration::from_millis(1)),
                            _ => break,
                        },
                    }
                }
            }
            None
        }
    }

    impl Drop for Worker {
        fn drop(&mut self) {
            // Fails only if it is dead already; waiting leaves no zombie behind.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    /// Waits for the other side no longer than the budget allows, and charges it.
    struct Timed<'a> {
        link: &'a mut UnixStream,
        budget: &'a mut Budget,
    }

    impl Timed<'_> {
        fn charge<T>(&mut self, step: impl FnOnce(&mut UnixStream) -> io::Result<T>) -> io::Result<T> {
            let started = Instant::now();
            let result = step(self.link);
            self.budget.left = self.budget.left.saturating_sub(started.elapsed());
            result
        }

        fn left(&self) -> io::Result<Duration> {
            if self.budget.left.is_zero() {
                Err(io::ErrorKind::TimedOut.into())
            } else {
                Ok(self.budget.left)
            }
        }
    }

    impl Read for Timed<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let left = self.left()?;
            self.charge(|link| {
                link.set_read_timeout(Some(left))?;
                link.read(buf)
            })
        }
    }

    impl Write for Timed<'_> {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            let left = self.left()?;
            self.charge(|link| {
                link.set_write_timeout(Some(left))?;
                link.write(buf)
            })
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
}

#[cfg(not(unix))]
mod worker {
    //! There is no worker here: starting one is the error.

    use std::io;
    use std::path::Path;
    use std::time::Duration;

    use super::{Budget, Limits, Plain, SandboxError};

    pub(super) struct Worker {
        pub age: Duration,
    }

    pub(super) fn shown(_: Option<&Path>) -> String {
        String::new()
    }

    impl Worker {
        pub fn spawn(_: Option<&Path>, _: &Limits) -> Result<Self, SandboxError> {
            Err(SandboxError::Platform)
        }
        pub fn id(&self) -> u32 {
            0
        }
        pub fn is_alive(&mut self) -> bool {
            false
        }
        pub fn send(&mut self, _: &Plain, _: &mut Budget) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        pub fn receive(&mut self, _: &Limits, _: &mut Budget) -> io::Result<Plain> {
            Err(io::ErrorKind::Unsupported.into())
        }
        pub fn finish(self) -> Option<i32> {
            None
        }
    }
}
