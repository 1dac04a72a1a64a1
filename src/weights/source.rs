//! What a configuration's `model` can name.

use super::presets::{self, Preset};
use std::path::PathBuf;

/// The models in the binary, as valor's training left them.
pub const EMBEDDED: &str = "embedded";

/// The embedded planner or detector before its training; of other parts refused.
pub const EMBEDDED_BASE: &str = "embedded-base";

/// What a repository on the hub holds; names of one kind are apart from those of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RepoKind {
    Model,
    Dataset,
}

impl RepoKind {
    /// Of such a repository's name, where sources are named.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Model => HUB,
            Self::Dataset => "hub:datasets/",
        }
    }
}

/// A repository on the hub at a revision, whole or one file of weights in it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HubSource {
    pub kind: RepoKind,
    /// `owner/name`.
    pub repo: String,
    /// A branch, a tag or a commit.
    pub revision: String,
    /// Of several weights in the repository these, such as one quantisation.
    pub file: Option<String>,
}

/// The prefix of a repository's name on the hub.
pub const HUB: &str = "hub:";

impl HubSource {
    /// `owner/name[@revision][#file]`, as it stands behind [`HUB`].
    pub fn parse(text: &str) -> Result<Self, String> {
        let (rest, file) = match text.split_once('#') {
            Some((rest, file)) => (rest, Some(file)),
            None => (text, None),
        };
        let (repo, revision) = rest.split_once('@').unwrap_or((rest, "main"));
        let plain = |s: &str| {
            !s.is_empty()
                && !s.starts_with(['.', '-'])
                && !s.contains("..")
                && s.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        };
        let parts: Vec<&str> = repo.split('/').collect();
        if parts.len() != 2 || !parts.iter().all(|p| plain(p)) {
            return Err(format!(
                "{HUB}{text}: expected hub:OWNER/NAME, then @REVISION and #FILE where wanted"
            ));
        }
        if !revision.split('/').all(plain) {
            return Err(format!("{HUB}{text}: {revision:?} is no revision"));
        }
        if let Some(file) = file.filter(|f| !is_safe(f)) {
            return Err(format!("{HUB}{text}: {file:?} is no file in a repository"));
        }
        let (kind, repo, revision) = (RepoKind::Model, repo.into(), revision.into());
        Ok(Self { kind, repo, revision, file: file.map(Into::into) })
    }

    /// A data set's repository.
    pub fn parse_dataset(repo: &str, revision: &str) -> Result<Self, String> {
        Ok(Self { kind: RepoKind::Dataset, ..Self::parse(&format!("{repo}@{revision}"))? })
    }
}

impl std::fmt::Display for HubSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.kind.prefix(), self.repo)?;
        if self.revision != "main" {
            write!(f, "@{}", self.revision)?;
        }
        self.file.as_ref().map_or(Ok(()), |file| write!(f, "#{file}"))
    }
}

/// A relative path that stays below where it starts.
pub fn is_safe(path: &str) -> bool {
    !path.contains(['\\', '\0', ':']) && path.split('/').all(|p| !p.is_empty() && p != "." && p != "..")
}

#[derive(Clone, Debug)]
pub enum Source {
    /// In the binary: as valor's training left it or, of the `base`, as it found it.
    Embedded {
        base: bool,
    },
    Hub(HubSource),
    Preset(&'static Preset),
    Path(PathBuf),
}

impl Source {
    /// A path that exists is that path, whatever else its name could mean.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text == EMBEDDED || text == EMBEDDED_BASE {
            return Ok(Self::Embedded { base: text == EMBEDDED_BASE });
        }
        if let Some(hub) = text.strip_prefix(HUB) {
            return Ok(Self::Hub(HubSource::parse(hub)?));
        }
        match presets::by_name(text) {
            Some(preset) if !std::path::Path::new(text).exists() => Ok(Self::Preset(preset)),
            _ => Ok(Self::Path(text.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_sources_are_read_and_written() {
        for text in ["Qwen/Qwen3-8B", "a/b@v1.0", "a/b@refs/pr/3#sub/x.gguf", "a/b#Q4_K_M.gguf"] {
            let source = HubSource::parse(text).unwrap();
            assert_eq!(source.to_string(), format!("hub:{text}"));
        }
        let s = HubSource::parse("a/b@v1#x/y.gguf").unwrap();
        assert_eq!((&*s.repo, &*s.revision, s.file.as_deref()), ("a/b", "v1", Some("x/y.gguf")));
        for bad in ["a", "a/b/c", "../b", "a/..", "a/b@", "a/b@../x", "a/b#../x", "a/b#/x", "a /b", "a/b#"] {
            assert!(HubSource::parse(bad).is_err(), "{bad}");
        }
    }
}
