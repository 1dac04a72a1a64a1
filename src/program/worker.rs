//! The worker process: enters the jail, then runs one program after another for its parent. Each
//! program gets a new interpreter; nothing of one is visible to the next.
//!
//! It trusts its parent and nothing else. What stopped a program is decided from what happened
//! here (clock, counters, where an exception was raised), never from the text of a message: a
//! program can raise anything that the interpreter can.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufReader};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use monty::{FunctionCall, MontyRun, RunProgress};
use monty_types::{
    CompileOptions, ExcType, ExtFunctionResult, MontyException, MontyObject, NameLookupResult, PrintWriter,
    PrintWriterCallback, ResourceLimits, ResourceTracker,
};

use super::desugar::{self, Prepared};
use super::values::{Budget, from_plain, to_plain};
use super::wire::{self, Plain};
use super::{ErrorKind, Limits, ProgramError, alloc, guard, host::SIGNATURES, jail};

/// First argument of a worker process; the parent's process id and the two jail limits follow.
pub(super) const ARGUMENT: &str = "__program-worker";
/// The one variable that a worker may be started with.
pub(super) const LIBRARIES: &str = "LD_LIBRARY_PATH";
/// Stack of the thread that runs programs: the interpreter recurses on it.
const STACK: usize = 64 << 20;
/// Frames from the parent hold a program or a tool's answer.
const MAX_FROM_PARENT: usize = 16 << 20;

/// Runs the worker if this process was started as one. To be called first thing in `main`.
pub fn worker_dispatch() -> Option<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    let first = args.next()?;
    #[cfg(target_os = "linux")]
    let python = first == super::python::ARGUMENT;
    #[cfg(not(target_os = "linux"))]
    let python = false;
    if first != ARGUMENT && !python {
        return None;
    }
    let mut number = || args.next()?.to_str()?.parse::<u64>().ok();
    let (Some(parent), Some(address_space), Some(cpu)) = (number(), number(), number()) else {
        return Some(ExitCode::from(2));
    };
    // SAFETY: no other thread runs yet.
    unsafe { std::env::remove_var(LIBRARIES) };
    #[cfg(target_os = "linux")]
    if python {
        let spec = args.next().and_then(|spec| spec.into_string().ok()).unwrap_or_default();
        // It comes back only where it failed.
        let _ = super::python::jail::become_python(parent as u32, address_space, cpu, &spec);
        return Some(ExitCode::FAILURE);
    }
    let code = work(parent as u32, address_space, cpu).map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    Some(code)
}

fn work(parent: u32, address_space: u64, cpu: u64) -> io::Result<()> {
    // One arena: others ask the kernel for things that the jail refuses.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: takes two integers; no other thread runs yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
    let mut layers = jail::enter(address_space + mapped(), cpu, parent);
    let thread = std::thread::Builder::new().stack_size(STACK).spawn(move || {
        jail::seal(&mut layers);
        alloc::start_counting();
        serve(&layers)
    })?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the interpreter panicked")))
}

/// Address space that this process was started with, libraries above all (CUDA's are larger than any program): none of it
/// is the program's. 0 where that is not known.
fn mapped() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
    // SAFETY: takes an integer.
    #[cfg(unix)]
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(4096) as u64;
    #[cfg(not(unix))]
    let page = 4096;
    pages.unwrap_or(0) * page
}

/// The socket to the parent, which is this process's standard input.
struct Link {
    from: BufReader<&'static File>,
    to: &'static File,
}

impl Link {
    fn open() -> Self {
        #[cfg(unix)]
        let file = {
            use std::os::fd::FromRawFd;
            // SAFETY: descriptor 0 is open for the life of the process, and the leak below keeps the
            // handle from closing it.
            unsafe { File::from_raw_fd(0) }
        };
        #[cfg(not(unix))]
        let file: File = unreachable!("workers are only started on Unix");
        let file: &'static File = Box::leak(Box::new(file));
        Self { from: BufReader::new(file), to: file }
    }

    fn send(&mut self, message: Plain, limits: &Limits) -> io::Result<()> {
        wire::send(&mut self.to, &message, limits.message_bytes)
    }

    fn receive(&mut self) -> io::Result<Plain> {
        wire::receive(&mut self.from, MAX_FROM_PARENT, 64)
    }
}

fn serve(layers: &jail::Layers) -> io::Result<()> {
    let mut link = Link::open();
    link.send(Plain::List(vec![Plain::str("ready"), layers.to_plain()]), &Limits::default())?;
    loop {
        let message = match link.receive() {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        };
        let odd = || io::Error::new(io::ErrorKind::InvalidData, "not a program");
        let Plain::List(parts) = message else { return Err(odd()) };
        let [Plain::Str(op), Plain::Str(source), Plain::Str(img_pth), limits] = parts.as_slice() else {
            return Err(odd());
        };
        if op != "run" {
            return Err(odd());
        }
        let limits = Limits::from_plain(limits).ok_or_else(odd)?;
        let done = run(source, img_pth, &limits, &mut link)?;
        alloc::disarm();
        link.send(done, &limits)?;
    }
}

/// What `print` wrote, and whether that was too much.
struct Output {
    text: String,
    max: usize,
    overflow: bool,
}

impl Output {
    fn push(&mut self, text: &str) -> Result<(), MontyException> {
        if self.overflow || self.text.len() + text.len() > self.max {
            self.overflow = true;
            return Err(MontyException::new(ExcType::RuntimeError, Some("output limit exceeded".to_owned())));
        }
        self.text.push_str(text);
        Ok(())
    }
}

impl PrintWriterCallback for Output {
    fn stdout_write(&mut self, output: Cow<'_, str>) -> Result<(), MontyException> {
        self.push(&output)
    }

    fn stdout_push(&mut self, end: char) -> Result<(), MontyException> {
        self.push(end.encode_utf8(&mut [0; 4]))
    }
}

/// One program's run as the worker sees it.
struct Run<'a> {
    prepared: &'a Prepared,
    limits: &'a Limits,
    link: &'a mut Link,
    output: Output,
    /// Set when something other than the program's own code ended it.
    stop: Option<(ErrorKind, String)>,
    /// The program named a picture that is not its own.
    wrong_picture: bool,
    /// Time in the interpreter, without the tools'.
    spent: Duration,
}

/// Runs a program; the reply to the parent. `Err` only if the pipe fails.
fn run(source: &str, img_pth: &str, limits: &Limits, link: &mut Link) -> io::Result<Plain> {
    alloc::arm(limits.hard_memory());
    let prepared = match guard::check(source).map_err(|e| e.to_string()) {
        Err(message) => return Ok(failure(&ProgramError::syntax(None, message), String::new())),
        Ok(()) => match desugar::prepare(source) {
            Ok(prepared) => prepared,
            Err(error) => return Ok(failure(&error, String::new())),
        },
    };
    let mut run = Run {
        prepared: &prepared,
        limits,
        link,
        output: Output { text: String::new(), max: limits.output_bytes, overflow: false },
        stop: None,
        wrong_picture: false,
        spent: Duration::ZERO,
    };
    let result = run.execute(img_pth)?;
    let stdout = run.output.text;
    Ok(match result {
        Ok(answer) => Plain::List(vec![Plain::str("done"), answer, Plain::Str(stdout)]),
        Err(error) => failure(&error, stdout),
    })
}

fn failure(error: &ProgramError, stdout: String) -> Plain {
    // A message longer than this is the program's own text; the parent reads a bounded frame.
    let message: String = error.message.chars().take(2000).collect();
    Plain::List(vec![
        Plain::str("failed"),
        Plain::str(error.kind.as_str()),
        error.type_name.as_ref().map_or(Plain::None, Plain::str),
        error.line.map_or(Plain::None, |line| Plain::Int(line.into())),
        Plain::Str(message),
        Plain::Str(stdout),
    ])
}

/// Builtins of Python that are not here because a program has no business with them.
pub(super) const REFUSED: &[&str] = &[
    "__build_class__",
    "__import__",
    "__loader__",
    "breakpoint",
    "builtins",
    "compile",
    "delattr",
    "dir",
    "eval",
    "exec",
    "exit",
    "globals",
    "help",
    "input",
    "locals",
    "memoryview",
    "quit",
    "vars",
    "__builtins__",
];

impl Run<'_> {
    fn execute(&mut self, img_pth: &str) -> io::Result<Result<Plain, ProgramError>> {
        let mut names = vec!["img_pth".to_owned()];
        let mut inputs = vec![MontyObject::String(img_pth.to_owned())];
        for name in SIGNATURES.iter().map(|(name, _)| *name).chain([desugar::REFUSE]) {
            names.push(name.to_owned());
            inputs.push(MontyObject::Function { name: name.to_owned(), docstring: None });
        }
        let options = CompileOptions { assert_message_annotations: false.into() };
        let program = match MontyRun::new(self.prepared.code.clone(), "program", names, options) {
            Ok(program) => program,
            Err(e) => return Ok(Err(self.diagnose(e))),
        };
        let tracker = ResourceTracker::new(
            ResourceLimits::default()
                .max_duration(Duration::from_secs_f64(self.limits.seconds))
                .max_memory(self.limits.memory_bytes)
                .max_recursion_depth(self.limits.recursion)
                .max_suspensions(usize::MAX),
        );
        let mut progress = self.timed(|print| program.start(inputs, tracker, print));
        loop {
            progress = match progress {
                Err(e) => return Ok(Err(self.diagnose(e))),
                Ok(RunProgress::Complete(answer)) => return Ok(self.finish(&answer)),
                Ok(RunProgress::FunctionCall(call)) => self.call(call)?,
                Ok(RunProgress::NameLookup(lookup)) => match self.refused(&lookup.name) {
                    Some(exc) => self.timed(|print| lookup.abort(exc, print)),
                    None => self.timed(|print| lookup.resume(NameLookupResult::Undefined, print)),
                },
                Ok(RunProgress::OsCall(call)) => {
                    let exc = self
                        .stop(ErrorKind::Denied, "a program has no files, clock or environment".to_owned());
                    self.timed(|print| call.abort(exc, print))
                }
                Ok(RunProgress::ResolveFutures(futures)) => {
                    let exc =
                        self.stop(ErrorKind::Unsupported, "async programs are not supported".to_owned());
                    self.timed(|print| futures.abort(exc, print))
                }
            };
        }
    }

    fn timed<T>(&mut self, step: impl FnOnce(PrintWriter<'_>) -> T) -> T {
        let started = Instant::now();
        let result = step(PrintWriter::Callback(&mut self.output));
        self.spent += started.elapsed();
        result
    }

    /// Notes why the program ends, and gives the exception to end it with.
    fn stop(&mut self, kind: ErrorKind, message: String) -> MontyException {
        let exc = MontyException::new(ExcType::PermissionError, Some(message.clone()));
        self.stop.get_or_insert((kind, message));
        exc
    }

    /// The end of a program that asks for a name which no program gets.
    fn refused(&mut self, name: &str) -> Option<MontyException> {
        let refused = self.prepared.refused.contains(name) || REFUSED.contains(&name);
        let kind = if matches!(name, "exit" | "quit") { ErrorKind::Exit } else { ErrorKind::Denied };
        refused.then(|| self.stop(kind, format!("'{name}' is not available to programs")))
    }

    fn call(&mut self, call: FunctionCall) -> io::Result<Result<RunProgress, MontyException>> {
        let raise = |exc_type, message: String| MontyException::new(exc_type, Some(message));
        if call.function_name == desugar::REFUSE {
            let what = call.args.first().map(ToString::to_string).unwrap_or_default();
            let exc = self.stop(ErrorKind::Denied, format!("'{what}' is not available to programs"));
            return Ok(self.timed(|print| call.abort(exc, print)));
        }
        // The interpreter also pauses for a call of a name that nothing binds.
        if !SIGNATURES.iter().any(|(tool, _)| *tool == call.function_name) {
            let name = call.function_name.clone();
            if let Some(exc) = self.refused(&name) {
                return Ok(self.timed(|print| call.abort(exc, print)));
            }
            return Ok(self.timed(|print| call.resume(ExtFunctionResult::NotFound(name), print)));
        }
        let mut budget = Budget { depth: 8, nodes: 1000, text: self.limits.prompt_bytes + 4096 };
        let mut line = Plain::None;
        let args: Result<Vec<_>, _> = call.args.iter().map(|arg| to_plain(arg, &mut budget)).collect();
        let mut kwargs = Vec::new();
        let mut wrong = args.as_ref().err().cloned();
        for (name, value) in &call.kwargs {
            match (name, value) {
                (MontyObject::String(name), MontyObject::Int(at)) if name == desugar::LINE => {
                    line = Plain::Int(*at)
                }
                (MontyObject::String(name), value) => match to_plain(value, &mut budget) {
                    Ok(value) => kwargs.push((name.clone(), value)),
                    Err(e) => wrong = Some(e),
                },
                _ => wrong = Some("keywords must be strings".to_owned()),
            }
        }
        let (Ok(args), None) = (args, &wrong) else {
            let message = format!("{}() cannot take {}", call.function_name, wrong.unwrap_or_default());
            return Ok(self.timed(|print| call.resume(raise(ExcType::TypeError, message), print)));
        };
        let request = vec![
            Plain::str("call"),
            Plain::str(&call.function_name),
            Plain::List(args),
            Plain::Dict(kwargs),
            line,
        ];
        self.link.send(Plain::List(request), self.limits)?;
        let Plain::List(mut reply) = self.link.receive()? else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a reply"));
        };
        Ok(match (reply.first().and_then(Plain::as_str), reply.len()) {
            (Some("return"), 2) => {
                let value = from_plain(reply.swap_remove(1));
                self.timed(|print| call.resume(value, print))
            }
            (Some("raise"), 3) => {
                let text = |at: usize| reply[at].as_str().unwrap_or_default().to_owned();
                let exc_type = text(1).parse().unwrap_or(ExcType::RuntimeError);
                self.wrong_picture |= exc_type == ExcType::FileNotFoundError;
                self.timed(|print| call.resume(raise(exc_type, text(2)), print))
            }
            _ => {
                let exc = self.stop(ErrorKind::HostCalls, "too many tool calls".to_owned());
                self.timed(|print| call.abort(exc, print))
            }
        })
    }

    fn finish(&self, answer: &MontyObject) -> Result<Plain, ProgramError> {
        if self.output.overflow {
            return Err(self.overflow());
        }
        let mut budget = Budget {
            depth: self.limits.answer_depth,
            nodes: self.limits.answer_nodes,
            text: self.limits.message_bytes / 2,
        };
        let answer = to_plain(answer, &mut budget).map_err(|what| ProgramError::bad_answer(&what))?;
        // Many small values take more bytes than their texts; beside them goes what was printed.
        let mut frame = Vec::new();
        answer.encode(&mut frame);
        match frame.len() + self.limits.output_bytes + 4096 > self.limits.message_bytes {
            true => Err(ProgramError::bad_answer("too large")),
            false => Ok(answer),
        }
    }

    fn overflow(&self) -> ProgramError {
        ProgramError::new(
            ErrorKind::OutputLimit,
            format!("printed more than {} bytes", self.limits.output_bytes),
        )
    }

    /// What ended the program, from the state of this run and where the exception came from.
    fn diagnose(&self, exc: MontyException) -> ProgramError {
        let frames = exc.traceback();
        let line = frames.iter().rev().find_map(|frame| self.prepared.line(frame.start.line));
        let with_line = |mut error: ProgramError| {
            error.line = line;
            error
        };
        if let Some((kind, message)) = &self.stop {
            return with_line(ProgramError::new(*kind, message.clone()));
        }
        if self.output.overflow {
            return with_line(self.overflow());
        }
        if self.spent.as_secs_f64() >= self.limits.seconds {
            return ProgramError::new(
                ErrorKind::Timeout,
                format!("ran longer than {} s", self.limits.seconds),
            );
        }
        // Did a `raise` of the program's own make it?
        let own = frames.last().is_some_and(|frame| self.prepared.raises(frame.start.line));
        let kind = match exc.exc_type() {
            _ if frames.last().is_some_and(|f| self.prepared.is_tail(f.start.line)) => ErrorKind::NoAnswer,
            ExcType::SystemExit => ErrorKind::Exit,
            _ if own => ErrorKind::Error,
            ExcType::MemoryError => ErrorKind::Memory,
            ExcType::RecursionError => ErrorKind::Recursion,
            ExcType::NotImplementedError | ExcType::ImportError | ExcType::ModuleNotFoundError => {
                ErrorKind::Unsupported
            }
            ExcType::PermissionError => ErrorKind::Denied,
            // Attributes that a format string reaches for are only met there.
            ExcType::AttributeError if line.is_some_and(|line| self.prepared.reaches_out(line)) => {
                ErrorKind::Denied
            }
            ExcType::FileNotFoundError if self.wrong_picture => ErrorKind::Denied,
            _ => ErrorKind::Error,
        };
        if kind == ErrorKind::NoAnswer {
            return match self.prepared.exits {
                true => ProgramError::new(ErrorKind::Exit, "it ended before final_answer was set"),
                false => ProgramError::no_answer(),
            };
        }
        let name = exc.exc_type().to_string();
        let mut error = ProgramError::new(kind, exc.message().unwrap_or_default().to_owned());
        error.type_name = Some(self.prepared.own_name(&name));
        with_line(error)
    }
}
