//! The files of one model: compiled into the binary, or a folder on disk.

use super::{Checkpoint, WeightsError};
use include_dir::{Dir, include_dir};
use std::borrow::Cow;
use std::path::PathBuf;

static EMBEDDED: Dir<'static> = include_dir!("$CARGO_MANIFEST_DIR/data/embedded");

/// Configuration, tokenizer, template and weights of one model.
#[derive(Debug)]
pub enum ModelFiles {
    Embedded { part: &'static str, dir: &'static Dir<'static> },
    Folder(PathBuf),
}

impl ModelFiles {
    /// `source` is [`crate::config::EMBEDDED`] or a folder; `part` names the embedded model.
    pub fn open(source: &str, part: &'static str) -> Result<Self, WeightsError> {
        if source == crate::config::EMBEDDED {
            let dir = EMBEDDED.get_dir(part).ok_or_else(|| WeightsError::Unreadable {
                path: format!("embedded {part}"),
                message:
                    "this build holds no such model; make it with `valor rooms pretrain` and build again, or \
                          set the model's folder in the configuration"
                        .into(),
            })?;
            return Ok(Self::Embedded { part, dir });
        }
        let path = PathBuf::from(source);
        match path.is_dir() {
            true => Ok(Self::Folder(path)),
            false => Err(WeightsError::Unreadable {
                path: source.into(),
                message: format!("is not a folder with the {part}'s config.json and weights"),
            }),
        }
    }

    /// What to call this model in traces and reports.
    pub fn name(&self) -> String {
        match self {
            Self::Embedded { part, .. } => format!("embedded {part}"),
            Self::Folder(p) => p.display().to_string(),
        }
    }

    /// A text file of the model, `None` if there is none of that name.
    pub fn text(&self, file: &str) -> Result<Option<Cow<'static, str>>, WeightsError> {
        let fail =
            |message: String| WeightsError::Unreadable { path: format!("{}/{file}", self.name()), message };
        match self {
            Self::Embedded { part, dir } => match dir.get_file(format!("{part}/{file}")) {
                None => Ok(None),
                Some(f) => {
                    f.contents_utf8().map(|s| Some(s.into())).ok_or_else(|| fail("is not UTF-8".into()))
                }
            },
            Self::Folder(p) => match std::fs::read_to_string(p.join(file)) {
                Ok(s) => Ok(Some(s.into())),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(fail(e.to_string())),
            },
        }
    }

    /// A text file that must be there.
    pub fn required(&self, file: &str) -> Result<Cow<'static, str>, WeightsError> {
        self.text(file)?.ok_or_else(|| WeightsError::Unreadable {
            path: format!("{}/{file}", self.name()),
            message: "is missing".into(),
        })
    }

    /// A JSON file that must be there and fit `T`.
    pub fn json<T: serde::de::DeserializeOwned>(&self, file: &str) -> Result<T, WeightsError> {
        serde_json::from_str(&self.required(file)?).map_err(|e| WeightsError::Unreadable {
            path: format!("{}/{file}", self.name()),
            message: e.to_string(),
        })
    }

    pub fn checkpoint(&self) -> Result<Checkpoint, WeightsError> {
        match self {
            Self::Embedded { part, dir } => {
                let f = dir.get_file(format!("{part}/model.safetensors")).ok_or_else(|| {
                    WeightsError::Unreadable { path: self.name(), message: "has no model.safetensors".into() }
                })?;
                Checkpoint::embedded(&self.name(), f.contents())
            }
            Self::Folder(p) => Checkpoint::open(p),
        }
    }
}
