//! A worker process as its parent has it: started, spoken to within a time, ended.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::sandbox::{Budget, START_UP, SandboxError, WORKER_LIFE};
use super::wire::{self, Plain};
use super::worker::{ARGUMENT, LIBRARIES};
use super::{Layers, Limits, Python};

/// Seconds of processor time that a worker has beside what its programs may take.
const SPARE_CPU: u64 = 30;
/// Deepest message that a worker may send.
const WIRE_DEPTH: u32 = 48;

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
    /// One with the embedded interpreter, and what confines it.
    pub fn embedded(executable: Option<&Path>, limits: &Limits) -> Result<(Self, Layers), SandboxError> {
        let mut worker = Self::spawn(executable, ARGUMENT, limits, limits.address_space, &[])?;
        let layers = worker.hear_layers("ready", limits, Instant::now() + START_UP);
        Ok((worker, layers.ok_or_else(|| SandboxError::NotAWorker { path: shown(executable) })?))
    }

    /// One that has become a Python, is ready for its program, and can do nothing but run it.
    #[cfg(target_os = "linux")]
    pub fn python(
        executable: Option<&Path>,
        limits: &Limits,
        python: &Python,
    ) -> Result<(Self, Layers), SandboxError> {
        use super::python::{ARGUMENT, start};

        let deadline = Instant::now() + START_UP;
        let spec = serde_json::to_string(python).expect("paths that came from JSON go back into it");
        // Mapping libraries takes address space that is not the program's; see `limit_memory`.
        let room = limits.address_space + (4 << 30);
        let mut worker = Self::spawn(executable, ARGUMENT, limits, room, &[&spec])?;
        let not_a_worker = || SandboxError::NotAWorker { path: shown(executable) };
        worker.link.set_read_timeout(Some(START_UP)).map_err(|_| not_a_worker())?;
        let mut door = start::take_door(&worker.link).map_err(|_| not_a_worker())?;
        if let Some(door) = &mut door {
            door.keep(&worker.link, deadline).map_err(|_| not_a_worker())?;
        }
        let layers = worker.hear_layers("jail", limits, deadline).ok_or_else(not_a_worker)?;
        let Some(mut door) = door.filter(|_| layers.complete()) else {
            let missing = if layers.complete() { "seccomp: no listener".into() } else { layers.missing() };
            return Err(SandboxError::Weak { missing });
        };
        let failed = |what: &str, e: io::Error| {
            let why = match e.kind() {
                io::ErrorKind::UnexpectedEof => "it ended before it was ready".to_owned(),
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
                    format!("it was not ready within {} s", START_UP.as_secs())
                }
                _ => e.to_string(),
            };
            SandboxError::Python { path: python.executable.clone(), why: format!("{what}: {why}") }
        };
        door.keep(&worker.link, deadline).map_err(|e| failed("did not start in the jail", e))?;
        drop(door);
        let mut budget = Budget { left: deadline.saturating_duration_since(Instant::now()) };
        match worker.receive(limits, &mut budget) {
            Ok(Plain::List(word)) if word == [Plain::str("ready")] => {}
            Ok(_) => return Err(failed("did not start in the jail", io::ErrorKind::InvalidData.into())),
            Err(e) => return Err(failed("did not start in the jail", e)),
        }
        start::limit_memory(worker.id(), limits.memory_bytes as u64)
            .map_err(|e| failed("its memory cannot be limited", e))?;
        Ok((worker, layers))
    }

    #[cfg(not(target_os = "linux"))]
    pub fn python(_: Option<&Path>, _: &Limits, _: &Python) -> Result<(Self, Layers), SandboxError> {
        Err(SandboxError::Platform)
    }

    fn spawn(
        executable: Option<&Path>,
        argument: &str,
        limits: &Limits,
        address_space: u64,
        more: &[&str],
    ) -> Result<Self, SandboxError> {
        let failed = |source| SandboxError::Spawn { path: shown(executable), source };
        let path: PathBuf = match executable {
            // The worker starts in another folder.
            Some(path) => std::path::absolute(path).map_err(failed)?,
            None if !THIS.is_empty() => THIS.into(),
            None => std::env::current_exe().map_err(failed)?,
        };
        let (link, theirs) = UnixStream::pair().map_err(failed)?;
        // The kernel ends it after its life and the last program's time.
        let last = (limits.seconds + limits.grace_seconds).ceil() as u64;
        let cpu = WORKER_LIFE.as_secs() + last + SPARE_CPU;
        let mut command = Command::new(path);
        command
            .arg(argument)
            .args([u64::from(std::process::id()), address_space, cpu].map(|n| n.to_string()))
            .args(more)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // Without CUDA's libraries the worker, which is this program, does not start; it forgets where they are.
        if cfg!(feature = "cuda")
            && let Some(path) = std::env::var_os(LIBRARIES)
        {
            command.env(LIBRARIES, path);
        }
        let child = command.spawn().map_err(failed)?;
        Ok(Self { child, link, age: Duration::ZERO })
    }

    /// The worker's word on what confines it.
    fn hear_layers(&mut self, word: &str, limits: &Limits, deadline: Instant) -> Option<Layers> {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(Plain::List(parts)) = self.receive(limits, &mut Budget { left }) else { return None };
        match parts.as_slice() {
            [Plain::Str(op), layers] if op == word => Layers::from_plain(layers),
            _ => None,
        }
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
        if self.budget.left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(self.budget.left) }
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
