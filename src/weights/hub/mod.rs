//! The Hugging Face hub, and its cache on this machine, which Python's huggingface_hub shares.
//!
//! A repository's files are blobs, named by their own hash, and a snapshot is a folder of links to
//! them; so what is there can be proved right without a network, and two revisions share what is the
//! same in both. A file counts as there only when its hash is right: it grows beside its place, under
//! `.incomplete`, goes on where a killed pull stopped, and is renamed when it has been checked. The
//! snapshot is linked when all of its files are there, the revision's name points to it last.
//!
//! Known to the environment: `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_TOKEN_PATH`,
//! `HF_HUB_OFFLINE`, and the usual variables of proxies.

mod transfer;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use serde::Deserialize;
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::PYTORCH_NAMES;
use super::source::{HubSource, RepoKind, is_safe};
use transfer::Failure;

#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error("{repo}: {message}")]
    Repo { repo: String, message: String },
    /// The network, the hub or the disk failed, and not what was asked for.
    #[error("{of}: {message}")]
    Outage { of: String, message: String },
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

impl HubError {
    pub fn is_outage(&self) -> bool {
        matches!(self, Self::Outage { .. } | Self::Io(_))
    }

    /// A request's, with what it was for.
    fn of(of: String, failure: Failure) -> Self {
        match failure {
            Failure::Refused(message) => Self::Repo { repo: of, message },
            Failure::Outage(message) => Self::Outage { of, message },
        }
    }
}

/// The hub as the environment describes it.
pub struct Hub {
    endpoint: String,
    cache: Cache,
    token: Option<String>,
    offline: bool,
    agent: ureq::Agent,
}

/// A file as the hub lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteFile {
    pub name: String,
    pub bytes: u64,
    hash: Hash,
}

/// What a blob is named by.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Hash {
    /// Of large files: SHA-256 of the contents.
    Sha256(String),
    /// Of all others: git's own, SHA-1 of a header with the length, and the contents.
    Git(String),
}

impl Hash {
    /// From a blob's name.
    fn parse(name: &str) -> Option<Self> {
        let hex = name.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        match name.len() {
            64 if hex => Some(Self::Sha256(name.into())),
            40 if hex => Some(Self::Git(name.into())),
            _ => None,
        }
    }

    fn name(&self) -> &str {
        let (Self::Sha256(name) | Self::Git(name)) = self;
        name
    }

    /// Of a file's contents, what this hash should be.
    fn of(&self, path: &Path, mut hear: impl FnMut(u64)) -> std::io::Result<String> {
        enum Digester {
            Sha256(Sha256),
            Git(Sha1),
        }
        let mut file = std::fs::File::open(path)?;
        let mut digest = match self {
            Self::Sha256(_) => Digester::Sha256(Sha256::new()),
            Self::Git(_) => {
                let mut sha1 = Sha1::new();
                sha1.update(format!("blob {}\0", file.metadata()?.len()));
                Digester::Git(sha1)
            }
        };
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = std::io::Read::read(&mut file, &mut buffer)?;
            if n == 0 {
                break;
            }
            match &mut digest {
                Digester::Sha256(d) => d.update(&buffer[..n]),
                Digester::Git(d) => d.update(&buffer[..n]),
            }
            hear(n as u64);
        }
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect();
        Ok(match digest {
            Digester::Sha256(d) => hex(&d.finalize()),
            Digester::Git(d) => hex(&d.finalize()),
        })
    }
}

/// A repository at a revision, as the hub has it.
#[derive(Clone, Debug)]
pub struct Listing {
    commit: String,
    files: Vec<RemoteFile>,
}

/// A repository in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    pub repo: String,
    pub bytes: u64,
    /// Of files that are still on their way.
    pub incomplete_bytes: u64,
}

/// What a pull or a check is doing: the file, bytes done and in all.
pub type Progress<'a> = &'a mut dyn FnMut(&str, u64, u64);

fn set(name: &str) -> Option<String> {
    std::env::var(name).ok().map(|v| v.trim().to_owned()).filter(|v| !v.is_empty())
}

/// Does the environment forbid to fetch anything?
pub fn is_offline() -> bool {
    set("HF_HUB_OFFLINE").is_some_and(|v| ["1", "true", "yes", "on"].contains(&v.to_lowercase().as_str()))
}

fn repo_type(kind: RepoKind) -> RepoType {
    match kind {
        RepoKind::Model => RepoType::Model,
        RepoKind::Dataset => RepoType::Dataset,
    }
}

fn api_name(kind: RepoKind) -> &'static str {
    match kind {
        RepoKind::Model => "models",
        RepoKind::Dataset => "datasets",
    }
}

impl Hub {
    pub fn from_env() -> Result<Self, HubError> {
        let home = match set("HF_HOME") {
            Some(home) => PathBuf::from(home),
            None => match set("XDG_CACHE_HOME") {
                Some(cache) => PathBuf::from(cache).join("huggingface"),
                None => std::env::home_dir().unwrap_or_default().join(".cache/huggingface"),
            },
        };
        let cache = set("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from);
        let token_file = set("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let token =
            set("HF_TOKEN").or_else(|| Some(std::fs::read_to_string(token_file).ok()?.trim().to_owned()));
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            let message = "HF_ENDPOINT is no http or https address".into();
            return Err(HubError::Repo { repo: endpoint, message });
        }
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').into(),
            cache: Cache::new(cache),
            token: token.filter(|t| !t.is_empty()),
            offline: is_offline(),
            // A redirect to another host loses the token (ureq's default), as it must.
            agent: ureq::Agent::config_builder()
                .http_status_as_error(false)
                .max_redirects(5)
                .timeout_connect(Some(Duration::from_secs(20)))
                .timeout_recv_response(Some(Duration::from_secs(60)))
                // Of one request. What it brought is kept, and the next one goes on from there.
                .timeout_recv_body(Some(Duration::from_secs(300)))
                .user_agent(concat!("valor/", env!("CARGO_PKG_VERSION")))
                .build()
                .new_agent(),
        })
    }

    pub fn cache_folder(&self) -> &Path {
        self.cache.path()
    }

    fn at(&self, source: &HubSource) -> CacheRepo {
        let repo = Repo::with_revision(source.repo.clone(), repo_type(source.kind), source.revision.clone());
        self.cache.repo(repo)
    }

    fn folder_of(&self, source: &HubSource) -> PathBuf {
        self.cache.path().join(Repo::new(source.repo.clone(), repo_type(source.kind)).folder_name())
    }

    fn folder(&self, repo: &str) -> PathBuf {
        self.cache.path().join(Repo::new(repo.into(), RepoType::Model).folder_name())
    }

    /// The folder of a snapshot that is here, without asking the hub.
    pub fn cached(&self, source: &HubSource) -> Option<PathBuf> {
        let at = self.at(source);
        let commit = std::fs::read_to_string(self.folder_of(source).join("refs").join(&source.revision))
            .map_or_else(|_| source.revision.clone(), |c| c.trim().to_owned());
        let folder = at.pointer_path(&commit);
        let there = source.file.as_ref().map_or(folder.is_dir(), |file| folder.join(file).is_file());
        there.then_some(folder)
    }

    fn fail(source: &HubSource, message: impl Into<String>) -> HubError {
        HubError::Repo { repo: source.to_string(), message: message.into() }
    }

    /// Asks the hub what a repository holds.
    pub fn listing(&self, source: &HubSource) -> Result<Listing, HubError> {
        #[derive(Deserialize)]
        struct Model {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Sibling {
            rfilename: String,
            size: u64,
            blob_id: String,
            lfs: Option<Lfs>,
        }
        #[derive(Deserialize)]
        struct Lfs {
            sha256: String,
        }
        if self.offline {
            return Err(Self::fail(source, "is not here, and HF_HUB_OFFLINE forbids to ask the hub"));
        }
        let revision = source.revision.replace('/', "%2F");
        let (kind, repo) = (api_name(source.kind), &source.repo);
        let url = format!("{}/api/{kind}/{repo}/revision/{revision}?blobs=true", self.endpoint);
        let text = self.text(&url).map_err(|e| HubError::of(source.to_string(), e))?;
        let model: Model = serde_json::from_str(&text)
            .map_err(|e| Self::fail(source, format!("the hub's answer cannot be read: {e}")))?;
        // A stranger's names become paths here.
        let hostile = |what: &str| Self::fail(source, format!("the hub names an impossible file: {what:?}"));
        let Some(Hash::Git(commit)) = Hash::parse(&model.sha) else { return Err(hostile(&model.sha)) };
        let mut files = Vec::new();
        for s in model.siblings {
            let hash = match &s.lfs {
                Some(lfs) => Hash::parse(&lfs.sha256).filter(|h| matches!(h, Hash::Sha256(_))),
                None => Hash::parse(&s.blob_id).filter(|h| matches!(h, Hash::Git(_))),
            };
            match hash {
                Some(hash) if is_safe(&s.rfilename) => {
                    files.push(RemoteFile { name: s.rfilename, bytes: s.size, hash });
                }
                _ => return Err(hostile(&s.rfilename)),
            }
        }
        Ok(Listing { commit, files })
    }

    /// Brings files of a listing here, those that are missing or half here, and gives the snapshot's
    /// folder.
    pub fn pull(
        &self,
        source: &HubSource,
        listing: &Listing,
        files: &[&RemoteFile],
        progress: Progress,
    ) -> Result<PathBuf, HubError> {
        let folder = self.folder_of(source);
        let blobs = folder.join("blobs");
        let disk = |at: &Path, e: std::io::Error| HubError::Outage {
            of: at.display().to_string(),
            message: format!("{e}; mend that, or set HF_HOME to another disk"),
        };
        std::fs::create_dir_all(&blobs).map_err(|e| disk(&blobs, e))?;
        let missing = self.missing(source, files);
        if let Some(free) = free_space(&blobs).filter(|free| *free < missing) {
            let gb = |bytes: u64| bytes as f64 / 1e9;
            let message = format!(
                "{:.1} GB are to come and {:.1} GB are free in {}; make room, or set HF_HOME to another disk",
                gb(missing),
                gb(free),
                self.cache.path().display()
            );
            return Err(HubError::Outage { of: source.to_string(), message });
        }
        for file in files {
            let below = match source.kind {
                RepoKind::Model => "",
                RepoKind::Dataset => "datasets/",
            };
            let repo = format!("{}/{below}{}", self.endpoint, source.repo);
            let url = format!("{repo}/resolve/{}/{}", listing.commit, file.name);
            self.transfer(&url, &blobs, file, progress)
                .map_err(|e| HubError::of(format!("{source}, {}", file.name), e))?;
        }
        let at = self.at(source);
        let snapshot = at.pointer_path(&listing.commit);
        for file in files {
            link(&snapshot, file).map_err(|e| disk(&snapshot, e))?;
        }
        if source.revision != listing.commit {
            at.create_ref(&listing.commit)?;
        }
        Ok(snapshot)
    }

    /// Bytes that a pull of these would have to bring.
    pub fn missing(&self, source: &HubSource, files: &[&RemoteFile]) -> u64 {
        let blobs = self.folder_of(source).join("blobs");
        let unique: BTreeSet<(&str, u64)> = files.iter().map(|f| (f.hash.name(), f.bytes)).collect();
        let len = |path: PathBuf| path.metadata().map_or(0, |m| m.len());
        let of = |(name, bytes): &(&str, u64)| match blobs.join(name).is_file() {
            true => 0,
            false => bytes.saturating_sub(len(transfer::incomplete(&blobs, name))),
        };
        unique.iter().map(of).sum()
    }

    /// Repositories in the cache.
    pub fn held(&self) -> Vec<Held> {
        let mut all = Vec::new();
        for entry in std::fs::read_dir(self.cache.path()).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(repo) = name.strip_prefix("models--").map(|r| r.replacen("--", "/", 1)) else {
                continue;
            };
            let mut held = Held { repo, bytes: 0, incomplete_bytes: 0 };
            for blob in std::fs::read_dir(entry.path().join("blobs")).into_iter().flatten().flatten() {
                let len = blob.metadata().map_or(0, |m| m.len());
                match Hash::parse(&blob.file_name().to_string_lossy()) {
                    Some(_) => held.bytes += len,
                    None => held.incomplete_bytes += len,
                }
            }
            all.push(held);
        }
        all.sort_by(|a, b| a.repo.cmp(&b.repo));
        all
    }

    /// Hashes all of a repository's blobs here anew: each file's name, and what is wrong with it.
    pub fn verify(&self, repo: &str, progress: Progress) -> Result<Vec<(String, Option<String>)>, HubError> {
        let folder = self.folder(repo);
        if !folder.join("blobs").is_dir() {
            return Err(self.not_here(repo));
        }
        let named = names(&folder);
        let mut all = Vec::new();
        for blob in std::fs::read_dir(folder.join("blobs"))?.flatten() {
            let blob = blob.path();
            let id = blob.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let Some(hash) = Hash::parse(&id) else { continue };
            let name = named.iter().find(|n| n.1 == id).map_or_else(|| id.clone(), |n| n.0.clone());
            let (bytes, mut done) = (blob.metadata()?.len(), 0);
            let got = hash.of(&blob, |n| {
                done += n;
                progress(&name, done, bytes);
            })?;
            let wrong = (got != id).then(|| format!("its hash is {got}, and should be {id}"));
            all.push((name, wrong));
        }
        all.sort();
        Ok(all)
    }

    /// Deletes a file that [`Hub::verify`] found wrong, so that the next pull brings it again.
    pub fn forget(&self, repo: &str, name: &str) -> std::io::Result<()> {
        let folder = self.folder(repo);
        match names(&folder).into_iter().find(|n| n.0 == name) {
            Some((_, id)) => std::fs::remove_file(folder.join("blobs").join(id)),
            None => std::fs::remove_file(folder.join("blobs").join(name)),
        }
    }

    fn not_here(&self, repo: &str) -> HubError {
        HubError::Repo { repo: repo.into(), message: format!("is not in {}", self.cache.path().display()) }
    }

    /// Deletes a repository from the cache; gives the bytes that were freed.
    pub fn remove(&self, repo: &str) -> Result<u64, HubError> {
        let held = self.held().into_iter().find(|h| h.repo == repo);
        let held = held.ok_or_else(|| self.not_here(repo))?;
        std::fs::remove_dir_all(self.folder(repo))?;
        Ok(held.bytes + held.incomplete_bytes)
    }
}

/// Files of a repository's snapshots, with their blobs.
fn names(folder: &Path) -> Vec<(String, String)> {
    fn walk(root: &Path, dir: &Path, found: &mut Vec<(String, String)>) {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if let Ok(to) = std::fs::read_link(&path) {
                let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
                found.push((name, to.file_name().unwrap_or_default().to_string_lossy().into_owned()));
            } else if path.is_dir() {
                walk(root, &path, found);
            }
        }
    }
    let mut found = Vec::new();
    for commit in std::fs::read_dir(folder.join("snapshots")).into_iter().flatten().flatten() {
        walk(&commit.path(), &commit.path(), &mut found);
    }
    found
}

/// Links a file into its snapshot.
fn link(snapshot: &Path, file: &RemoteFile) -> std::io::Result<()> {
    let place = snapshot.join(&file.name);
    if place.exists() {
        return Ok(());
    }
    std::fs::create_dir_all(place.parent().expect("below the snapshot"))?;
    // A link to a blob that was deleted.
    match std::fs::remove_file(&place) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let blob = format!("{}blobs/{}", "../".repeat(2 + file.name.matches('/').count()), file.hash.name());
    #[cfg(unix)]
    return std::os::unix::fs::symlink(blob, place);
    #[cfg(not(unix))]
    return std::fs::hard_link(place.with_file_name(blob), &place);
}

/// Bytes that a user may still write where a folder is; `None` where that cannot be known.
pub fn free_space(folder: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let path = std::ffi::CString::new(folder.as_os_str().as_bytes()).ok()?;
        let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
        // SAFETY: the path ends in NUL, and the call fills the struct when it returns 0.
        let stat = unsafe {
            if libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) != 0 {
                return None;
            }
            stat.assume_init()
        };
        #[allow(clippy::unnecessary_cast, reason = "the fields' types differ by platform")]
        Some(stat.f_bavail as u64 * stat.f_frsize as u64)
    }
    #[cfg(not(unix))]
    {
        let _ = folder;
        None
    }
}

impl Listing {
    pub fn files(&self) -> &[RemoteFile] {
        &self.files
    }

    /// Those files that a model is loaded from: weights in the best form there is (or the one that is
    /// asked for), configuration and tokenizer.
    pub fn of_model(&self, source: &HubSource) -> Result<Vec<&RemoteFile>, HubError> {
        const BESIDE: [&str; 17] = [
            "config.json",
            "adapter_config.json",
            "delta_config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.json",
            "vocab.txt",
            "merges.txt",
            "added_tokens.json",
            "special_tokens_map.json",
            "chat_template.json",
            "chat_template.jinja",
            "preprocessor_config.json",
            "processor_config.json",
            "model.safetensors.index.json",
            "pytorch_model.bin.index.json",
        ];
        let at_top = |ending: &str| -> Vec<&RemoteFile> {
            self.files.iter().filter(|f| !f.name.contains('/') && f.name.ends_with(ending)).collect()
        };
        let weights = match &source.file {
            Some(file) => self.files.iter().filter(|f| &f.name == file).collect(),
            None => match at_top(".safetensors") {
                found if !found.is_empty() => found,
                _ => self.of_pytorch(source)?,
            },
        };
        if weights.is_empty() {
            let gguf = at_top(".gguf");
            let message = match (&source.file, gguf.first()) {
                (Some(file), _) => format!("holds no {file}"),
                (None, Some(one)) => {
                    format!("holds several models; choose one, such as {source}#{}", one.name)
                }
                (None, None) => "holds no weights that are known here".into(),
            };
            return Err(Hub::fail(source, message));
        }
        let asked = |f: &RemoteFile| source.file.as_ref() == Some(&f.name);
        let beside = self.files.iter().filter(|f| BESIDE.contains(&f.name.as_str()) && !asked(f));
        Ok(beside.chain(weights).collect())
    }

    /// PyTorch's own files, as their folder will be read: one of several has to be named, and better before all
    /// are fetched than after.
    fn of_pytorch(&self, source: &HubSource) -> Result<Vec<&RemoteFile>, HubError> {
        let named = PYTORCH_NAMES.iter().find_map(|name| self.files.iter().find(|f| f.name == *name));
        if let Some(file) = named {
            return Ok(vec![file]);
        }
        let at_top = |endings: &[&str]| -> Vec<&RemoteFile> {
            let ends = |f: &&RemoteFile| endings.iter().any(|e| f.name.ends_with(e));
            self.files.iter().filter(|f| !f.name.contains('/')).filter(ends).collect()
        };
        let own = at_top(&[".pt", ".pth"]);
        if own.len() > 1 {
            let names = own.iter().map(|f| f.name.as_str()).collect::<Vec<_>>().join(", ");
            let message =
                format!("holds several checkpoints ({names}); choose one, such as {source}#{}", own[0].name);
            return Err(Hub::fail(source, message));
        }
        Ok(if own.is_empty() { at_top(&[".bin"]) } else { own })
    }
}
