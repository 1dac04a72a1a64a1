//! The other executor: the system's Python (CPython 3.9 or newer), for programs beyond the embedded
//! interpreter. Asked for by `sandbox.executor` or `sandbox.fallback`, never used otherwise.
//!
//! What keeps a program in is the kernel, not the language: [`jail`] says how, `bootstrap.py` only makes
//! CPython answer as the embedded interpreter does. So this executor needs Linux with Landlock and
//! seccomp and refuses to start without. A worker runs one program: nothing of it is left for the next.
//!
//! Known differences from the embedded interpreter: starting takes 50 to 300 ms a program, not counted as
//! the program's; whether a name is refused is told at its use, not at its look-up, where it was imported;
//! sets of objects that hash by address have no fixed order (strings and numbers do: the seed of their
//! hashes is fixed). A program that gets around the imports can read the clock, nothing else.

#[cfg(target_os = "linux")]
pub(super) mod jail;
#[cfg(target_os = "linux")]
pub(super) mod start;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// First argument of a worker process that becomes a Python; see [`jail::become_python`].
#[cfg(target_os = "linux")]
pub(super) const ARGUMENT: &str = "__python-worker";

/// A Python that was found, and what it reads as it starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Python {
    /// Such as `3.11.7`.
    pub version: String,
    /// The real file, not a link or a shim.
    pub executable: PathBuf,
    /// numpy's version, where programs get numpy.
    pub numpy: Option<String>,
    /// Files that it maps as code: itself, the loader, shared libraries.
    code: Vec<PathBuf>,
    /// Folders that it reads modules from.
    trees: Vec<PathBuf>,
    /// Folders that it lists and does not read.
    listed: Vec<PathBuf>,
    /// `sys.path`.
    path: Vec<PathBuf>,
}

/// There is no Python that could run programs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("sandbox.python = \"{name}\": {why}")]
pub struct PythonError {
    pub name: String,
    pub why: String,
}

/// Oldest version that bootstrap.py runs on.
#[cfg(target_os = "linux")]
const OLDEST: (u32, u32) = (3, 9);

/// What programs may import; numpy beside these where it is asked for.
#[cfg(target_os = "linux")]
const MODULES: &[&str] = &[
    "__future__",
    "collections",
    "collections.abc",
    "copy",
    "dataclasses",
    "functools",
    "itertools",
    "json",
    "math",
    "operator",
    "re",
    "statistics",
    "string",
    "typing",
];
/// What these import when some part of them is first used (`Counter.most_common`, `\N{…}`), which in the
/// jail is too late.
#[cfg(target_os = "linux")]
const BESIDE: &[&str] = &["contextlib", "copyreg", "fractions", "heapq", "keyword", "unicodedata", "weakref"];
/// numpy imports some of its parts in this way too.
#[cfg(target_os = "linux")]
const NUMPY: &[&str] = &["numpy", "numpy.linalg", "numpy.fft"];

#[cfg(target_os = "linux")]
fn modules(numpy: bool) -> Vec<&'static str> {
    MODULES.iter().chain(if numpy { NUMPY } else { &[] }).copied().collect()
}

#[cfg(target_os = "linux")]
mod find {
    use std::io::Read;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    /// How long a Python may take to say what it is.
    const PATIENCE: Duration = Duration::from_secs(30);
    /// Characters of its complaint that are told.
    const LONGEST: usize = 160;

    /// What probe.py prints.
    #[derive(Deserialize)]
    struct Probed {
        version: [u32; 3],
        #[serde(default)]
        executable: PathBuf,
        #[serde(default)]
        code: Vec<PathBuf>,
        #[serde(default)]
        path: Vec<PathBuf>,
        /// Version, folder that it is imported from, folder of its own.
        numpy: Option<(String, PathBuf, PathBuf)>,
    }

    impl Python {
        /// Asks a Python, by its path or its name on `PATH`, what it is and what it reads as it starts. It
        /// runs as the user's own program, before there is any other.
        ///
        /// # Errors
        /// If there is none, it is too old, or lacks numpy where that is asked for.
        pub fn find(name: &str, numpy: bool) -> Result<Self, PythonError> {
            let failed = |why: String| PythonError { name: name.to_owned(), why };
            let bare = probe(name, &["-I", "-S", "-B"], false).map_err(failed)?;
            let [major, minor, patch] = bare.version;
            if (major, minor) < OLDEST {
                return Err(failed(format!(
                    "is Python {major}.{minor}, and {}.{} or newer is needed; name another, or use executor = \
                     \"embedded\"",
                    OLDEST.0, OLDEST.1
                )));
            }
            let mut found = Self {
                version: format!("{major}.{minor}.{patch}"),
                executable: bare.executable,
                numpy: None,
                code: bare.code,
                trees: bare.path.clone(),
                listed: Vec::new(),
                path: bare.path,
            };
            if numpy {
                let with = probe(name, &["-I", "-B"], true).map_err(failed)?;
                let Some((version, folder, own)) = with.numpy else {
                    return Err(failed("did not say where its numpy is".to_owned()));
                };
                found.numpy = Some(version);
                found.code = with.code;
                found.trees.push(own);
                found.listed.push(folder.clone());
                found.path.push(folder);
            }
            Ok(found)
        }
    }

    fn probe(name: &str, options: &[&str], numpy: bool) -> Result<Probed, String> {
        let names = serde_json::json!({ "modules": modules(numpy), "beside": BESIDE });
        let text = format!("NAMES = {names}\n{}", include_str!("probe.py"));
        let mut child = Command::new(name)
            .args(options)
            .args(["-c", &text])
            .envs(super::jail::ONE_THREAD.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| match e.kind() {
                std::io::ErrorKind::NotFound => {
                    "is not there; install Python 3.9 or newer or name its path, or \
                                                 use executor = \"embedded\""
                        .to_owned()
                }
                _ => format!("cannot be run: {e}"),
            })?;
        let deadline = Instant::now() + PATIENCE;
        // What it writes fits into a pipe, so that it ends without being read.
        while child.try_wait().map_err(|e| e.to_string())?.is_none() {
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("did not say what it is within {} s", PATIENCE.as_secs()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let mut said = String::new();
        let mut complaint = String::new();
        let _ = child.stdout.take().map(|mut out| out.read_to_string(&mut said));
        let _ = child.stderr.take().map(|mut err| err.read_to_string(&mut complaint));
        let last = |text: &str| text.lines().rev().find(|l| !l.trim().is_empty()).map(str::to_owned);
        if let Some(probed) = last(&said).and_then(|line| serde_json::from_str(&line).ok()) {
            return Ok(probed);
        }
        let mut complaint = last(&complaint).unwrap_or_else(|| "it said nothing".to_owned());
        // What is no Python may repeat all that it was asked.
        let too_long = complaint.char_indices().nth(LONGEST);
        if let Some((end, _)) = too_long {
            complaint.truncate(end);
            complaint.push('…');
        }
        Err(if numpy {
            format!("has no numpy that works ({complaint}); install it, or set sandbox.numpy = false")
        } else {
            format!("does not run as Python 3.9 or newer ({complaint})")
        })
    }
}

#[cfg(not(target_os = "linux"))]
impl Python {
    /// # Errors
    /// Always: elsewhere nothing would keep its programs in.
    pub fn find(name: &str, _numpy: bool) -> Result<Self, PythonError> {
        let why = "the executor cpython needs Linux; use executor = \"embedded\"".to_owned();
        Err(PythonError { name: name.to_owned(), why })
    }
}
