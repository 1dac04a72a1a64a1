//! One file from the hub to its blob.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Hub, Progress, RemoteFile};

/// Failures in a row, without a byte between, before giving up.
const TRIES: u32 = 5;
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Where a blob grows.
pub(super) fn incomplete(blobs: &Path, id: &str) -> PathBuf {
    blobs.join(format!("{id}.incomplete"))
}

/// Why nothing came.
pub(super) enum Failure {
    /// What was asked for cannot be had.
    Refused(String),
    /// The network or the disk failed; of the same request later something may come.
    Outage(String),
}

enum Stop {
    /// Another request may bring the rest.
    Passing(String, Option<Duration>),
    Final(Failure),
}

/// For the disk's own errors, which no request mends.
fn disk(path: &Path) -> impl Fn(std::io::Error) -> Stop + '_ {
    move |e| Stop::Final(Failure::Outage(format!("{}: {e}", path.display())))
}

fn refused(why: impl Into<String>) -> Stop {
    Stop::Final(Failure::Refused(why.into()))
}

impl Hub {
    /// A small text from the hub.
    pub(super) fn text(&self, url: &str) -> Result<String, Failure> {
        let mut failed = 0;
        loop {
            let got = self.get(url, 0).and_then(|mut response| {
                let body = response.body_mut().with_config().limit(64 << 20).read_to_string();
                body.map_err(|e| Stop::Passing(e.to_string(), None))
            });
            failed += 1;
            match got {
                Ok(text) => return Ok(text),
                Err(stop) => wait_or_give_up(stop, failed)?,
            }
        }
    }

    /// Brings a file here unless it is; returns when its hash is right.
    pub(super) fn transfer(
        &self,
        url: &str,
        blobs: &Path,
        file: &RemoteFile,
        progress: Progress,
    ) -> Result<(), Failure> {
        let blob = blobs.join(file.hash.name());
        if blob.is_file() {
            progress(&file.name, file.bytes, file.bytes);
            return Ok(());
        }
        let growing = incomplete(blobs, file.hash.name());
        let told = |e: std::io::Error| Failure::Outage(format!("{}: {e}", growing.display()));
        let mut part = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&growing)
            .map_err(told)?;
        // Another pull of the same file: it is waited for, then there is little left to do.
        part.lock().map_err(told)?;
        if blob.is_file() {
            return Ok(());
        }
        let mut failed = 0;
        loop {
            let before = part.metadata().map_err(told)?.len();
            if before == file.bytes {
                break;
            }
            match self.go_on(url, &mut part, &growing, file, progress) {
                Ok(()) => {}
                Err(stop) => {
                    let grown = part.metadata().map_err(told)?.len() > before;
                    failed = if grown { 1 } else { failed + 1 };
                    wait_or_give_up(stop, failed)?;
                }
            }
        }
        part.sync_all().map_err(told)?;
        let got = file.hash.of(&growing, |_| ()).map_err(told)?;
        if got != file.hash.name() {
            std::fs::remove_file(&growing).map_err(told)?;
            let why = format!("its hash is {got}, and should be {}; it was thrown away", file.hash.name());
            return Err(Failure::Outage(why));
        }
        std::fs::rename(&growing, &blob).map_err(told)
    }

    /// One request for what is still missing.
    fn go_on(
        &self,
        url: &str,
        part: &mut File,
        path: &Path,
        file: &RemoteFile,
        progress: Progress,
    ) -> Result<(), Stop> {
        let mut have = part.metadata().map_err(disk(path))?.len();
        if have > file.bytes {
            have = 0;
        }
        let mut response = self.get(url, have)?;
        if response.status() != 206 {
            have = 0;
        }
        part.set_len(have).map_err(disk(path))?;
        part.seek(SeekFrom::Start(have)).map_err(disk(path))?;
        let mut body = response.body_mut().as_reader();
        let mut buffer = vec![0; 1 << 20];
        while have < file.bytes {
            let room = buffer.len().min(usize::try_from(file.bytes - have).unwrap_or(usize::MAX));
            let n = body.read(&mut buffer[..room]).map_err(|e| Stop::Passing(e.to_string(), None))?;
            if n == 0 {
                return Err(Stop::Passing(format!("ended after {have} of {} bytes", file.bytes), None));
            }
            part.write_all(&buffer[..n]).map_err(disk(path))?;
            have += n as u64;
            progress(&file.name, have, file.bytes);
        }
        Ok(())
    }

    fn get(&self, url: &str, from: u64) -> Result<ureq::http::Response<ureq::Body>, Stop> {
        let mut call = self.agent.get(url);
        if let Some(token) = &self.token {
            call = call.header("authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            call = call.header("range", format!("bytes={from}-"));
        }
        let response = call.call().map_err(|e| Stop::Passing(format!("cannot reach the hub: {e}"), None))?;
        let status = response.status().as_u16();
        let header = |name| response.headers().get(name).and_then(|v| v.to_str().ok());
        let wait = || Some(Duration::from_secs(header("retry-after")?.trim().parse().ok()?));
        match status {
            200 => Ok(response),
            206 => {
                let starts =
                    header("content-range").and_then(|r| r.strip_prefix("bytes ")?.split('-').next());
                match starts.and_then(|s| s.parse::<u64>().ok()) {
                    Some(start) if start == from => Ok(response),
                    _ => Err(refused("the hub sends another part than was asked for")),
                }
            }
            401 | 403 => Err(refused(format!(
                "the hub refuses (status {status}): the repository does not exist or is gated; accept its terms \
                 on its page and set HF_TOKEN"
            ))),
            404 => Err(refused("the hub has no such repository, revision or file")),
            408 | 429 | 500..=599 => {
                Err(Stop::Passing(format!("the hub answers with status {status}"), wait()))
            }
            _ => Err(refused(format!("the hub answers with status {status}"))),
        }
    }
}

fn wait_or_give_up(stop: Stop, failed: u32) -> Result<(), Failure> {
    match stop {
        Stop::Final(why) => Err(why),
        Stop::Passing(message, _) if failed >= TRIES => {
            Err(Failure::Outage(format!("{message} (tried {failed} times)")))
        }
        Stop::Passing(_, asked) => {
            let wait = asked.unwrap_or(Duration::from_millis(250 << failed));
            std::thread::sleep(wait.min(LONGEST_WAIT));
            Ok(())
        }
    }
}
