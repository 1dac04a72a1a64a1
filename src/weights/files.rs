//! The files of one model: compiled into the binary, a folder on disk, or a file of weights with the
//! others beside it.

use super::hub::Hub;
use super::source::{HUB, Source};
use super::{
    Checkpoint, Gguf, PYTORCH_NAMES, Pth, WeightsError, adapter, byte_level, delta, gguf, presets,
    pytorch_file,
};
use include_dir::{Dir, include_dir};
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

static EMBEDDED: Dir<'static> = include_dir!("$CARGO_MANIFEST_DIR/data/embedded");

/// The embedded models as their trainings left them: what lies on the embedded base of each part.
const TUNED: [(&str, &str); 2] = [("planner", "planner-tuned"), ("detector", "detector-tuned")];

/// How pictures are read, and the file in which that may be nested.
const PICTURES: &str = "preprocessor_config.json";
const PROCESSOR: &str = "processor_config.json";

/// How many adapters and deltas may lie on one another.
const ADAPTERS: usize = 4;

/// Configuration, tokenizer, template and weights of one model.
#[derive(Clone, Debug)]
pub enum ModelFiles {
    Embedded {
        part: &'static str,
        dir: &'static Dir<'static>,
    },
    Folder(PathBuf),
    /// Of weights, such as MoGe's `model.pt`, which holds its configuration too.
    File(PathBuf),
    /// Which holds all: what lies beside it may be another model's.
    Gguf(Arc<Gguf>),
    /// An adapter in PEFT's format, or a [`delta`], with what it lies on; all but the weights is its base's.
    Adapted {
        base: Box<ModelFiles>,
        adapter: Box<ModelFiles>,
    },
}

/// What files hold that are no whole model.
enum Overlay {
    Adapter(Box<adapter::Config>),
    Delta(delta::Config),
}

impl ModelFiles {
    /// `source` is what [`Source::parse`] reads; `part` names the embedded model. What the hub has is
    /// not fetched here.
    pub fn open(source: &str, part: &'static str) -> Result<Self, WeightsError> {
        Self::locate(source, part)?.with_base(part, ADAPTERS)
    }

    /// What `source` names itself, be it an adapter.
    fn locate(source: &str, part: &'static str) -> Result<Self, WeightsError> {
        let fail = |message: String| WeightsError::Unreadable { path: source.into(), message };
        let parsed = Source::parse(source)
            .map_err(|message| WeightsError::Unreadable { path: format!("{part}.model"), message })?;
        let wanted = match parsed {
            Source::Hub(hub) => Some(hub),
            Source::Preset(preset) => Some(preset.source()),
            Source::Embedded { base } => return Self::in_the_binary(part, base),
            Source::Path(_) => None,
        };
        if let Some(wanted) = wanted {
            let hub = Hub::from_env().map_err(|e| fail(e.to_string()))?;
            let folder = hub.cached(&wanted).ok_or_else(|| WeightsError::NotFetched {
                path: source.into(),
                message: format!(
                    "is not in {}; fetch it first: valor models pull {source}",
                    hub.cache_folder().display()
                ),
            })?;
            return match wanted.file {
                Some(file) => Self::of_file(folder.join(file)),
                None => Ok(Self::Folder(folder)),
            };
        }
        let path = PathBuf::from(source);
        if path.is_dir() {
            return Ok(Self::Folder(path));
        }
        if path.is_file() {
            return Self::of_file(path);
        }
        Err(fail(format!(
            "is neither a folder with the {part}'s config.json and weights, nor its weights, nor a preset (the nearest is {}; valor models list shows all)",
            presets::nearest(source, part).name
        )))
    }

    fn in_the_binary(part: &'static str, base: bool) -> Result<Self, WeightsError> {
        let tuned = TUNED.iter().find(|(of, _)| *of == part && !base).map(|(_, tuned)| *tuned);
        let of = |part: &'static str| EMBEDDED.get_dir(part).map(|dir| Self::Embedded { part, dir });
        tuned.and_then(of).or_else(|| of(part)).ok_or_else(|| WeightsError::Unreadable {
            path: format!("embedded {part}"),
            message:
                "this build holds no such model; make it with `valor rooms pretrain` and build again, or \
                      set the model's folder in the configuration"
                    .into(),
        })
    }

    /// These files, or, where they are an adapter's, with those of its base, which may have one too.
    fn with_base(self, part: &'static str, adapters: usize) -> Result<Self, WeightsError> {
        let Some(base) = self.base()? else { return Ok(self) };
        if adapters == 0 {
            return Err(WeightsError::Unreadable {
                path: self.name(),
                message: format!(
                    "lies on more than {ADAPTERS} others, or on itself; see base_model_name_or_path in {}, or base in {}",
                    adapter::CONFIG,
                    delta::CONFIG
                ),
            });
        }
        let base = Self::locate(&base, part)?.with_base(part, adapters - 1)?;
        Ok(Self::Adapted { base: Box::new(base), adapter: Box::new(self) })
    }

    /// What these files lie on, in the words of a configuration's `model`; `None` of a whole model.
    pub fn base(&self) -> Result<Option<String>, WeightsError> {
        let source = match self.lies_on()? {
            None => return Ok(None),
            Some(Overlay::Adapter(c)) => c.base_model_name_or_path,
            Some(Overlay::Delta(c)) => c.base,
        };
        // PEFT names repositories by themselves.
        let repository = !Path::new(&source).exists() && source.split('/').count() == 2;
        let known = matches!(Source::parse(&source), Ok(Source::Path(_))) && repository;
        Ok(Some(if known { format!("{HUB}{source}") } else { source }))
    }

    /// Of a folder that lies on another model the file of its own weights, and what it lies on.
    pub fn own_weights(&self) -> Result<Option<(PathBuf, String)>, WeightsError> {
        let (Self::Folder(folder), Some(overlay)) = (self, self.lies_on()?) else { return Ok(None) };
        let (file, base) = match overlay {
            Overlay::Adapter(c) => (adapter::WEIGHTS, c.base_model_name_or_path),
            Overlay::Delta(c) => (delta::WEIGHTS, c.base),
        };
        Ok(Some((folder.join(file), base)))
    }

    /// What makes these files more than themselves, if anything does.
    fn lies_on(&self) -> Result<Option<Overlay>, WeightsError> {
        let fail = |file: &str, message| WeightsError::Unreadable {
            path: format!("{}/{file}", self.name()),
            message,
        };
        if let Some(text) = self.text(adapter::CONFIG)? {
            if self.is_whole()? {
                return Ok(None);
            }
            let config = adapter::Config::parse(&text).map_err(|m| fail(adapter::CONFIG, m))?;
            return Ok(Some(Overlay::Adapter(config.into())));
        }
        let Some(text) = self.text(delta::CONFIG)? else { return Ok(None) };
        if self.is_whole()? {
            return Ok(None);
        }
        let config = serde_json::from_str(&text).map_err(|e| fail(delta::CONFIG, e.to_string()))?;
        Ok(Some(Overlay::Delta(config)))
    }

    /// Whether there is a network with all of its weights, whatever lies beside it. A configuration by itself
    /// says nothing: trainers copy the base's beside an adapter.
    fn is_whole(&self) -> Result<bool, WeightsError> {
        let weights = match self {
            Self::Folder(folder) => {
                let safe = ["model.safetensors", "model.safetensors.index.json"];
                safe.iter().chain(&PYTORCH_NAMES).any(|name| folder.join(name).is_file())
            }
            Self::File(path) => {
                let name = path.file_name().and_then(|n| n.to_str());
                ![adapter::WEIGHTS, delta::WEIGHTS].map(Some).contains(&name)
            }
            _ => true,
        };
        Ok(weights && self.text("config.json")?.is_some())
    }

    fn of_file(path: PathBuf) -> Result<Self, WeightsError> {
        if path.to_str().is_some_and(gguf::is_gguf) {
            return Ok(Self::Gguf(Arc::new(Gguf::open(&path)?)));
        }
        Ok(Self::File(path))
    }

    /// What to call this model in traces and reports.
    pub fn name(&self) -> String {
        match self {
            Self::Embedded { part, .. } => format!("embedded {part}"),
            Self::Folder(p) | Self::File(p) => p.display().to_string(),
            Self::Gguf(g) => g.path().display().to_string(),
            Self::Adapted { base, adapter } => match **adapter {
                Self::Embedded { part, .. } => format!("embedded {part}"),
                _ => format!("{} on {}", adapter.name(), base.name()),
            },
        }
    }

    /// What changes when the weights do: a hash of embedded ones, else sizes and times of the files.
    pub fn fingerprint(&self) -> String {
        use sha2::{Digest, Sha256};
        let mut hash = Sha256::new();
        let mut file = |path: &Path| {
            let Ok(meta) = path.metadata() else { return };
            let changed = meta.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
            hash.update(format!("{:?} {} {changed:?};", path.file_name(), meta.len()));
        };
        match self {
            Self::Embedded { part, dir } => {
                for name in ["model.safetensors", adapter::WEIGHTS, delta::WEIGHTS] {
                    let weights = dir.get_file(format!("{part}/{name}"));
                    hash.update(weights.map_or(&[][..], |f| f.contents()));
                }
            }
            Self::Adapted { base, adapter } => {
                hash.update(base.fingerprint() + &adapter.fingerprint());
            }
            Self::File(path) => file(path),
            Self::Gguf(g) => file(g.path()),
            Self::Folder(folder) => {
                let mut all: Vec<PathBuf> =
                    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
                all.sort();
                all.iter().for_each(|path| file(path));
            }
        }
        hash.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect()
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
            Self::Folder(p) => on_disk(&p.join(file), p, file).map_err(fail),
            Self::File(p) => on_disk(&p.with_file_name(file), p, file).map_err(fail),
            Self::Gguf(g) => g.file(file),
            Self::Adapted { base, .. } => base.text(file),
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
            Self::Adapted { base, adapter } => {
                let own = |file: &str| match &**adapter {
                    Self::Embedded { part, dir } => {
                        let file = dir.get_file(format!("{part}/{file}"));
                        Checkpoint::embedded(&self.name(), file.map_or(&[][..], |f| f.contents()))
                    }
                    Self::Folder(path) => Checkpoint::open(&path.join(file)),
                    other => other.checkpoint(),
                };
                let base = base.checkpoint()?;
                match adapter.lies_on()? {
                    Some(Overlay::Adapter(config)) => {
                        base.adapted(&self.name(), own(adapter::WEIGHTS)?, &config)
                    }
                    Some(Overlay::Delta(_)) => base.changed(&self.name(), own(delta::WEIGHTS)?),
                    None => Err(WeightsError::Unreadable {
                        path: adapter.name(),
                        message: "is no adapter any more; its folder has changed".into(),
                    }),
                }
            }
            Self::Folder(p) | Self::File(p) => Checkpoint::open(p),
            Self::Gguf(g) => Checkpoint::of_gguf(g.clone()),
        }
    }
}

/// A text at a path. What is not there may be inside the weights, or inside or made of other files beside it.
fn on_disk(path: &Path, weights: &Path, file: &str) -> Result<Option<Cow<'static, str>>, String> {
    if let Some(text) = if_there(path)? {
        return Ok(Some(text));
    }
    let beside = |name: &str| if_there(&path.with_file_name(name));
    Ok(match file {
        "config.json" => {
            let Some(weights) = pytorch_file(weights) else { return Ok(None) };
            let config = Pth::open(&weights)?.config;
            config.map(|c| serde_json::json!({ "model_config": c }).to_string().into())
        }
        // transformers 5 writes one file for pictures, videos and text.
        PICTURES => {
            let Some(text) = beside(PROCESSOR)? else { return Ok(None) };
            let all: serde_json::Value =
                serde_json::from_str(&text).map_err(|e| format!("{PROCESSOR}: {e}"))?;
            all.get("image_processor").filter(|p| p.is_object()).map(|p| p.to_string().into())
        }
        "tokenizer.json" => byte_level::of_folder(beside)?.map(|json| json.to_string().into()),
        _ => None,
    })
}

fn if_there(path: &Path) -> Result<Option<Cow<'static, str>>, String> {
    match std::fs::read_to_string(path) {
        Ok(s) => Ok(Some(s.into())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// As transformers 5 saves checkpoints.
    #[test]
    fn an_image_processor_may_lie_inside_the_processor() {
        let dir = tempfile::tempdir().unwrap();
        let files = ModelFiles::Folder(dir.path().into());
        let write =
            |name: &str, json: Value| std::fs::write(dir.path().join(name), json.to_string()).unwrap();
        write(PROCESSOR, json!({ "processor_class": "GroundingDinoProcessor" }));
        assert_eq!(files.text(PICTURES).unwrap(), None);
        let size = json!({ "shortest_edge": 640, "longest_edge": 999 });
        let own = json!({ "size": size, "image_mean": [0.1, 0.2, 0.3] });
        write(PROCESSOR, json!({ "image_processor": own, "video_processor": { "size": null } }));
        assert_eq!(files.json::<Value>(PICTURES).unwrap(), own);
        // A file of its own goes first.
        write(PICTURES, json!({ "size": 1 }));
        assert_eq!(files.json::<Value>(PICTURES).unwrap(), json!({ "size": 1 }));
    }
}
