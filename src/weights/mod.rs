//! Where weights come from: safetensors as a file, a sharded folder or bytes in the binary; PyTorch's own
//! files; GGUF.
//!
//! Files are memory-mapped. A network built on a [`Checkpoint`] must find every tensor that it
//! asks for, with its shape, and must ask for every tensor that is there: anything else is one
//! error that names them all. Nothing here downloads but [`hub`], and that only when it is asked to.

mod adapter;
mod byte_level;
pub mod delta;
mod files;
pub mod gguf;
pub mod hub;
mod pages;
pub mod pickle;
pub mod presets;
mod pth;
pub mod source;

pub use files::ModelFiles;
pub use gguf::Gguf;
pub use pth::Pth;

use crate::nn::packed;
use candle_core::quantized::GgmlDType;
use candle_core::safetensors::{Load, MmapedSafetensors, SliceSafetensors};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error("{path}: {message}")]
    Unreadable { path: String, message: String },
    /// Of the hub, and not in its cache: a pull brings it.
    #[error("{path}: {message}")]
    NotFetched { path: String, message: String },
    #[error("{path}: weights do not fit the network: {problems}")]
    Mismatch { path: String, problems: String },
    #[error("{path}: {}", message_of(.source))]
    Network { path: String, source: candle_core::Error },
}

/// An error of candle's on one line, without the stack that it carries where `RUST_BACKTRACE` is set.
pub(crate) fn message_of(e: &candle_core::Error) -> String {
    use candle_core::Error;
    match e {
        Error::WithBacktrace { inner, .. } => message_of(inner),
        Error::Context { inner, context } => format!("{context}: {}", message_of(inner)),
        Error::WithPath { inner, path } => format!("{}: {}", path.display(), message_of(inner)),
        Error::WrappedContext { wrapped, context } => {
            let own = wrapped.downcast_ref::<Error>();
            format!("{context}: {}", own.map_or_else(|| wrapped.to_string(), message_of))
        }
        other => {
            let text = other.to_string();
            text.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join("; ")
        }
    }
}

enum Source {
    Mapped(MmapedSafetensors),
    Static(SliceSafetensors<'static>),
    Pth(Pth),
    Gguf(Arc<Gguf>),
    Tensors(HashMap<String, Tensor>),
    Adapted(adapter::Adapted),
    Changed(delta::Changed),
}

impl Source {
    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let views = |v: Vec<(String, safetensors::tensor::TensorView<'_>)>| {
            v.into_iter().map(|(n, t)| (n, t.shape().to_vec())).collect()
        };
        match self {
            Self::Mapped(s) => views(s.tensors()),
            Self::Static(s) => views(s.tensors()),
            Self::Pth(p) => p.shapes(),
            Self::Gguf(g) => g.shapes(),
            Self::Tensors(t) => t.iter().map(|(n, t)| (n.clone(), t.dims().to_vec())).collect(),
            Self::Adapted(a) => a.base.shapes(),
            Self::Changed(c) => c.base.shapes(),
        }
    }

    fn load(&self, name: &str, device: &Device) -> candle_core::Result<Tensor> {
        match self {
            Self::Mapped(s) => {
                let view = s.get(name)?;
                let t = view.load(device)?;
                // SAFETY: the view is of a file, which `MmapedSafetensors` maps for reading.
                unsafe { pages::release(view.data()) };
                Ok(t)
            }
            Self::Static(s) => s.get(name)?.load(device),
            Self::Pth(p) => p.load(name, device),
            Self::Gguf(g) => g.load(name, device),
            Self::Tensors(t) => match t.get(name) {
                Some(t) => t.to_device(device),
                None => candle_core::bail!("tensor {name} is missing"),
            },
            Self::Adapted(a) => a.load(name, device),
            Self::Changed(c) => c.load(name, device),
        }
    }

    fn gguf(&self) -> Option<&Gguf> {
        match self {
            Self::Gguf(g) => Some(g),
            _ => None,
        }
    }

    /// How a matrix can stay packed in memory, if it can.
    fn packing(&self, name: &str) -> Option<GgmlDType> {
        self.gguf().and_then(|g| g.packing(name))
    }

    /// A tensor's name in the file.
    fn own_name(&self, name: &str) -> String {
        self.gguf().map_or_else(|| name.into(), |g| g.own_name(name))
    }
}

/// A set of named tensors.
pub struct Checkpoint {
    name: String,
    source: Arc<Source>,
    /// Weights that adapters change: the adapters' own names for that.
    adapted: BTreeMap<String, String>,
}

impl Checkpoint {
    fn of(name: impl Into<String>, source: Source) -> Self {
        Self { name: name.into(), source: source.into(), adapted: BTreeMap::new() }
    }

    /// A `.safetensors` file, one of PyTorch's ([`PYTORCH`]) or a `.gguf` file; or a folder with
    /// `model.safetensors`, a sharded `model.safetensors.index.json` or, without these, one of PyTorch's and no
    /// more.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let fail = |path: &Path, message: String| WeightsError::Unreadable {
            path: path.display().to_string(),
            message,
        };
        if path.is_file() && path.to_str().is_some_and(gguf::is_gguf) {
            return Self::of_gguf(Arc::new(Gguf::open(path)?));
        }
        if let Some(file) = pytorch_file(path) {
            let pth = Pth::open(&file).map_err(|m| fail(&file, m))?;
            return Ok(Self::of(path.display().to_string(), Source::Pth(pth)));
        }
        let files = if path.is_dir() {
            let (single, index) = (path.join("model.safetensors"), path.join("model.safetensors.index.json"));
            if single.is_file() {
                vec![single]
            } else if index.is_file() {
                shards(&index).map_err(|m| fail(&index, m))?
            } else if let several @ [first, _, ..] = &pths(path)[..] {
                let name = |p: &PathBuf| p.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let names = several.iter().map(name).collect::<Vec<_>>().join(", ");
                let message = format!(
                    "holds several checkpoints ({names}); name one, such as {}, or in a repository on the hub \
                     hub:OWNER/NAME#{}",
                    first.display(),
                    name(first)
                );
                return Err(fail(path, message));
            } else {
                return Err(fail(
                    path,
                    "holds neither model.safetensors nor model.safetensors.index.json nor model.pt, model.pth, \
                     pytorch_model.bin or a single .pt or .pth of another name (a .gguf file is named itself, \
                     not its folder)"
                        .into(),
                ));
            }
        } else if path.is_file() {
            vec![path.to_path_buf()]
        } else {
            return Err(fail(path, "no such file or folder; give a .safetensors file or its folder".into()));
        };
        // SAFETY: the mapping is read-only. Another process that changes the file while it is
        // mapped can change tensor values (never the checked layout), as in any mmap loader.
        let mapped = unsafe { MmapedSafetensors::multi(&files) };
        let mapped = mapped
            .map_err(|e| fail(path, format!("not a readable safetensors file ({})", message_of(&e))))?;
        Ok(Self::of(path.display().to_string(), Source::Mapped(mapped)))
    }

    /// A network's, under the names that checkpoints on the hub have.
    pub fn of_gguf(file: Arc<Gguf>) -> Result<Self, WeightsError> {
        file.check_network()?;
        Ok(Self::of(file.path().display().to_string(), Source::Gguf(file)))
    }

    /// Weights compiled into the binary.
    pub fn embedded(name: &str, bytes: &'static [u8]) -> Result<Self, WeightsError> {
        let s = SliceSafetensors::new(bytes)
            .map_err(|e| WeightsError::Unreadable { path: name.into(), message: message_of(&e) })?;
        Ok(Self::of(name, Source::Static(s)))
    }

    /// This checkpoint with an adapter's products in it.
    fn adapted(self, name: &str, adapter: Self, config: &adapter::Config) -> Result<Self, WeightsError> {
        let fail = |message: &str| WeightsError::Unreadable { path: name.into(), message: message.into() };
        if self.source.gguf().is_some() {
            return Err(fail("adapters go on checkpoints of safetensors, not on GGUF files"));
        }
        let adapter = Arc::into_inner(adapter.source).ok_or_else(|| fail("is in use"))?;
        let new = adapter::Adapted::new(name, self.source, adapter, config)?;
        let mut adapted = self.adapted;
        adapted.extend(new.weights().map(|(weight, own)| (weight.to_owned(), own.to_owned())));
        Ok(Self { adapted, ..Self::of(name, Source::Adapted(new)) })
    }

    /// This checkpoint with a training's changes.
    fn changed(self, name: &str, changes: Self) -> Result<Self, WeightsError> {
        let fail = |message: &str| WeightsError::Unreadable { path: name.into(), message: message.into() };
        if self.source.gguf().is_some() {
            return Err(fail("deltas go on checkpoints of safetensors, not on GGUF files"));
        }
        let changes = Arc::into_inner(changes.source).ok_or_else(|| fail("is in use"))?;
        let changed = delta::Changed::new(name, self.source, changes)?;
        Ok(Self { adapted: self.adapted, ..Self::of(name, Source::Changed(changed)) })
    }

    /// Tensors already in memory, for name sets that are translated on load.
    pub fn from_tensors(name: &str, tensors: HashMap<String, Tensor>) -> Self {
        Self::of(name, Source::Tensors(tensors))
    }

    /// Names and shapes without numbers: every tensor is zeros that take no memory, whatever its size.
    pub fn from_shapes(name: &str, shapes: BTreeMap<String, Vec<usize>>) -> candle_core::Result<Self> {
        let zero = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        let tensors = shapes.into_iter().map(|(n, shape)| Ok((n, zero.broadcast_as(shape)?)));
        Ok(Self::from_tensors(name, tensors.collect::<candle_core::Result<_>>()?))
    }

    /// This checkpoint without its numbers. A network built on it computes nothing of use, but whether it
    /// fits is found out as with the numbers, and no more than the files' headers is read.
    pub fn outline(&self) -> Result<Self, WeightsError> {
        let outline = Self::from_shapes(&self.name, self.shapes())
            .map_err(|source| WeightsError::Network { path: self.name.clone(), source })?;
        Ok(Self { adapted: self.adapted.clone(), ..outline })
    }

    /// The tensors' names, sorted.
    pub fn names(&self) -> Vec<String> {
        self.source.shapes().into_keys().collect()
    }

    /// The tensors' shapes, by name.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.source.shapes()
    }

    /// Memory that a network on the CPU takes where its matrices stay packed.
    pub fn packed_bytes(&self) -> Option<u64> {
        self.source.gguf().map(Gguf::loaded_bytes)
    }

    /// Every tensor, as stored; quantised ones in f32.
    pub fn tensors(&self) -> Result<HashMap<String, Tensor>, WeightsError> {
        let load = |n: String| Ok((n.clone(), self.source.load(&n, &Device::Cpu)?));
        let all: candle_core::Result<_> = self.source.shapes().into_keys().map(load).collect();
        all.map_err(|source| WeightsError::Network { path: self.name.clone(), source })
    }

    /// Builds a network. `unused` says what may be there without being asked for (see [`is_unused`]).
    pub fn build<T>(
        &self,
        dtype: DType,
        device: &Device,
        unused: &[&str],
        network: impl FnOnce(VarBuilder<'static>) -> candle_core::Result<T>,
    ) -> Result<T, WeightsError> {
        let audit = Arc::new(Mutex::new(Audit::default()));
        let backend = Audited {
            source: self.source.clone(),
            shapes: self.source.shapes(),
            packs: device.is_cpu(),
            audit: audit.clone(),
        };
        let names: BTreeSet<String> = backend.shapes.keys().cloned().collect();
        let built = network(VarBuilder::from_backend(Box::new(backend), dtype, device.clone()));
        let audit = std::mem::take(&mut *audit.lock().unwrap_or_else(|e| e.into_inner()));
        let mut problems = audit.problems;
        let mut advice = "";
        if built.is_ok() {
            let unread = self.adapted.iter().filter(|(weight, _)| !audit.asked.contains(*weight));
            problems.extend(unread.map(|(weight, own)| {
                format!(
                    "{own} changes {weight}, which this network does not read (a head that is tied to the \
                     embedding is no layer of its own)"
                )
            }));
            let unknown = names.difference(&audit.asked).filter(|n| !is_unused(n, unused));
            let before = problems.len();
            let own = unknown.map(|n| format!("{} is not part of this network", self.source.own_name(n)));
            problems.extend(own);
            if problems.len() > before {
                advice = UNKNOWN;
            }
        }
        if !problems.is_empty() {
            let problems = summary(&problems) + advice;
            return Err(WeightsError::Mismatch { path: self.name.clone(), problems });
        }
        built.map_err(|source| WeightsError::Network { path: self.name.clone(), source })
    }
}

/// Is a name one of `unused`: the beginnings of names, or their ends after a `*`?
pub fn is_unused(name: &str, unused: &[impl AsRef<str>]) -> bool {
    unused.iter().map(AsRef::as_ref).any(|u: &str| match u.strip_prefix('*') {
        Some(end) => name.ends_with(end),
        None => name.starts_with(u),
    })
}

/// What to do about tensors that the network has no place for: whether they matter is for their owner to say.
const UNKNOWN: &str =
    " (if these do not matter, save the checkpoint without them; else correct its config.json)";

/// Endings of PyTorch's own files.
pub const PYTORCH: [&str; 3] = ["pt", "pth", "bin"];

/// Names under which a folder has one of them, first to last.
const PYTORCH_NAMES: [&str; 3] = ["model.pt", "model.pth", "pytorch_model.bin"];

/// The file itself if it is one of PyTorch's, or the one in a folder that has no safetensors.
fn pytorch_file(path: &Path) -> Option<PathBuf> {
    let is_safe = |name: &str| path.join(name).is_file();
    if path.is_dir() && !is_safe("model.safetensors") && !is_safe("model.safetensors.index.json") {
        let named = PYTORCH_NAMES.iter().map(|name| path.join(name)).find(|p| p.is_file());
        return named.or_else(|| match &pths(path)[..] {
            // By a name of its own, as VALOR's detector is on the hub.
            [only] => Some(only.clone()),
            _ => None,
        });
    }
    let ending = path.extension()?.to_str()?;
    (path.is_file() && PYTORCH.contains(&ending)).then(|| path.to_path_buf())
}

/// A folder's `.pt` and `.pth` files.
fn pths(folder: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path());
    let is_pth = |p: &PathBuf| p.extension().is_some_and(|e| e == "pt" || e == "pth") && p.is_file();
    let mut found: Vec<PathBuf> = files.filter(is_pth).collect();
    found.sort();
    found
}

/// The shard files of an index, which are siblings of it and nothing else.
fn shards(index: &Path) -> Result<Vec<PathBuf>, String> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read_to_string(index).map_err(|e| e.to_string())?;
    let parsed: Index = serde_json::from_str(&text).map_err(|e| format!("not a safetensors index: {e}"))?;
    let files: BTreeSet<String> = parsed.weight_map.into_values().collect();
    let mut paths = Vec::new();
    for f in files {
        // An index is a downloaded file: it must not lead out of its folder.
        if Path::new(&f).file_name().and_then(|n| n.to_str()) != Some(f.as_str()) {
            return Err(format!("weight_map names {f:?}, which is not a file beside the index"));
        }
        let p = index.with_file_name(&f);
        if !p.is_file() {
            return Err(format!("shard {f} is missing; download it again"));
        }
        paths.push(p);
    }
    Ok(paths)
}

/// The first problems in full, the rest counted.
fn summary(problems: &[String]) -> String {
    summary_of(problems, 12)
}

fn summary_of(problems: &[String], shown: usize) -> String {
    let mut s = problems.iter().take(shown).map(String::as_str).collect::<Vec<_>>().join("; ");
    if problems.len() > shown {
        s.push_str(&format!("; and {} more", problems.len() - shown));
    }
    s
}

#[derive(Default)]
struct Audit {
    asked: BTreeSet<String>,
    problems: Vec<String>,
}

/// Answers a wrong request with zeros and remembers it, so that all are reported at once.
///
/// To a network on the CPU a packed matrix is there under a second name too (see [`packed`]), by which
/// its bytes are handed out.
struct Audited {
    source: Arc<Source>,
    shapes: BTreeMap<String, Vec<usize>>,
    packs: bool,
    audit: Arc<Mutex<Audit>>,
}

impl SimpleBackend for Audited {
    fn get(&self, s: Shape, name: &str, _: Init, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        let (name, as_bytes) = packed::split_name(name).map_or((name, false), |(name, _)| (name, true));
        let mut audit = self.audit.lock().unwrap_or_else(|e| e.into_inner());
        audit.asked.insert(name.to_string());
        let own = self.source.own_name(name);
        let problem = match self.shapes.get(name) {
            None => format!("{own} is missing"),
            Some(have) if have != s.dims() => format!("{own} has shape {have:?}, expected {:?}", s.dims()),
            Some(_) => match self.source.gguf() {
                Some(g) if g.unread(name).is_some() => {
                    format!("{own} is of {}, which is not read", g.unread(name).unwrap_or_default())
                }
                Some(g) if as_bytes => return g.packed_bytes(name),
                _ => return self.source.load(name, dev)?.to_dtype(dtype),
            },
        };
        audit.problems.push(problem);
        // One zero, seen in this shape: a checkpoint of other names, or a damaged configuration, must not
        // cost a network's memory.
        Tensor::zeros((), dtype, dev)?.broadcast_as(s)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        self.audit.lock().unwrap_or_else(|e| e.into_inner()).asked.insert(name.to_string());
        self.source.load(name, dev)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        match packed::split_name(name) {
            Some((name, dtype)) => self.packs && self.source.packing(name) == Some(dtype),
            None => self.shapes.contains_key(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint() -> Checkpoint {
        let t = |s: &[usize]| Tensor::zeros(s, DType::F32, &Device::Cpu).unwrap();
        let names = [("a.weight", t(&[2, 3])), ("a.bias", t(&[2])), ("old.weight", t(&[1]))];
        Checkpoint::from_tensors("x.safetensors", names.map(|(n, t)| (n.to_string(), t)).into())
    }

    /// What candle gives where `RUST_BACKTRACE` is set.
    #[test]
    fn the_stack_of_an_error_is_not_part_of_its_message() {
        use candle_core::Error;
        let traced = |e| Error::WithBacktrace {
            inner: Box::new(e),
            backtrace: Box::new(std::backtrace::Backtrace::force_capture()),
        };
        let e = traced(traced(Error::Msg("no\n such tensor".into())).context("layer 3"));
        assert!(e.to_string().lines().count() > 3);
        assert_eq!(message_of(&e), "layer 3: no; such tensor");
        let wrapped = Error::WrappedContext { wrapped: Box::new(e), context: "a.bin".into() };
        assert_eq!(message_of(&wrapped), "a.bin: layer 3: no; such tensor");
    }

    #[test]
    fn one_error_names_missing_misshaped_and_unknown() {
        let get = |vb: &VarBuilder, s: &[usize], n: &str| vb.get(s, n).map(|_| ());
        let err = checkpoint().build(DType::F32, &Device::Cpu, &[], |vb| {
            get(&vb, &[3, 3], "a.weight")?;
            get(&vb, &[2], "a.bias")?;
            get(&vb, &[2], "b.bias")
        });
        let text = err.unwrap_err().to_string();
        for part in [
            "x.safetensors",
            "a.weight has shape [2, 3], expected [3, 3]",
            "b.bias is missing",
            "old.weight is not part",
            "save the checkpoint without them",
        ] {
            assert!(text.contains(part), "{text}");
        }
        for unused in ["old.", "*d.weight"] {
            let ok = checkpoint().build(DType::F32, &Device::Cpu, &[unused], |vb| {
                get(&vb, &[2, 3], "a.weight")?;
                get(&vb, &[2], "a.bias")
            });
            ok.unwrap();
        }
    }

    #[test]
    fn a_single_pth_of_any_name_is_a_folders_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        assert_eq!(pytorch_file(dir.path()), None);
        std::fs::write(path("VALOR-GroundingDINO.pth"), "").unwrap();
        assert_eq!(pytorch_file(dir.path()), Some(path("VALOR-GroundingDINO.pth")));
        std::fs::write(path("optimizer.pt"), "").unwrap();
        assert_eq!(pytorch_file(dir.path()), None, "which is meant?");
        let e = Checkpoint::open(dir.path()).err().unwrap().to_string();
        for part in ["VALOR-GroundingDINO.pth, optimizer.pt", "/VALOR-GroundingDINO.pth,", "#VALOR-Gr"] {
            assert!(e.contains(part), "{e}");
        }
        std::fs::write(path("model.pt"), "").unwrap();
        assert_eq!(pytorch_file(dir.path()), Some(path("model.pt")));
    }

    #[test]
    fn an_index_cannot_lead_out_of_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join("model.safetensors.index.json");
        std::fs::write(&index, r#"{"weight_map": {"a": "../../etc/passwd"}}"#).unwrap();
        let err = Checkpoint::open(dir.path()).err().unwrap().to_string();
        assert!(err.contains("not a file beside the index"), "{err}");
    }
}
