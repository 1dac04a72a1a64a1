//! GGUF, llama.cpp's files: weights, most of them quantised, with the network's sizes and the tokenizer.
//!
//! The file is mapped and its header read once; of arrays only their place is kept, and every length is
//! held against what is left of the file before anything is done with it. (candle's reader builds all
//! values in memory, up to 32 bytes for one of the file, and divides by an alignment of zero.) Matrices
//! stay packed in memory where [`crate::nn::packed`] can multiply by them; all else is widened to f32.
//!
//! Networks: Qwen3, dense. Not here: files in several parts, big-endian files, version 1, writing.

mod header;
mod qwen3;
mod tokenizer;

pub use header::{Kind, Stored};

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;

use super::WeightsError;
use super::pages::release;
use crate::nn::packed::{Packed, is_packed};
use header::Value;

/// The ending of such files.
pub const GGUF: &str = "gguf";

/// Does a path, or a source's name, mean such a file?
pub fn is_gguf(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, end)| end.eq_ignore_ascii_case(GGUF))
}

/// A mapped file.
pub struct Gguf {
    path: PathBuf,
    map: Mmap,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Stored>,
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gguf({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}

impl Gguf {
    /// Of any architecture.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let fail = |message: String| WeightsError::Unreadable { path: path.display().to_string(), message };
        let file = std::fs::File::open(path).map_err(|e| fail(e.to_string()))?;
        // SAFETY: the mapping is read-only. Another process that changes the file while it is mapped can
        // change values, but no range into the map, all of which are checked here.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| fail(e.to_string()))?;
        let (metadata, tensors) = header::read(&map).map_err(fail)?;
        Ok(Self { path: path.into(), map, metadata, tensors })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its tensors by their own names.
    pub fn tensors(&self) -> &BTreeMap<String, Stored> {
        &self.tensors
    }

    /// What kind of network it says it is.
    pub fn architecture(&self) -> Result<&str, WeightsError> {
        self.text_of(ARCHITECTURE)
    }

    /// One line for an error: the file, and what is wrong with it.
    fn fail(&self, message: impl Into<String>) -> WeightsError {
        WeightsError::Unreadable { path: self.path.display().to_string(), message: message.into() }
    }

    fn expected(&self, key: &str, what: &str) -> WeightsError {
        let message = match self.metadata.get(key) {
            None => format!("the key {key} is missing; convert the model anew with llama.cpp"),
            Some(v) => format!("{key} is {}, expected {what}", v.describe(&self.map)),
        };
        self.fail(message)
    }

    fn has(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    fn text_of(&self, key: &str) -> Result<&str, WeightsError> {
        let text = self.metadata.get(key).and_then(|v| v.text(&self.map));
        text.ok_or_else(|| self.expected(key, "a string in UTF-8"))
    }

    /// A whole number from 1 to `most`.
    fn count(&self, key: &str, most: u64) -> Result<u64, WeightsError> {
        let n = self.metadata.get(key).and_then(Value::whole).filter(|n| (1..=most).contains(n));
        n.ok_or_else(|| self.expected(key, &format!("a whole number from 1 to {most}")))
    }

    fn number(&self, key: &str) -> Result<f64, WeightsError> {
        let n = self.metadata.get(key).and_then(Value::number).filter(|n| n.is_finite() && *n > 0.);
        n.ok_or_else(|| self.expected(key, "a positive number"))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, WeightsError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(_) => Err(self.expected(key, "true or false")),
        }
    }

    fn strings(&self, key: &str) -> Result<Vec<&str>, WeightsError> {
        let all = self.metadata.get(key).and_then(|v| v.strings(&self.map));
        all.ok_or_else(|| self.expected(key, "an array of strings in UTF-8"))
    }

    fn whole_numbers(&self, key: &str) -> Result<Vec<i64>, WeightsError> {
        let all = self.metadata.get(key).and_then(|v| v.whole_numbers(&self.map));
        all.ok_or_else(|| self.expected(key, "an array of whole numbers"))
    }

    /// An error unless it holds a network that is read here, whole.
    pub fn check_network(&self) -> Result<(), WeightsError> {
        let architecture = self.architecture()?;
        if architecture != QWEN3 {
            return Err(self.fail(format!(
                "{ARCHITECTURE} is {}; of GGUF files only {QWEN3} (dense) is read: take another model, or serve \
                 it with llama.cpp and name it as an endpoint",
                header::short(architecture)
            )));
        }
        if self.has(PARTS) && self.count(PARTS, u64::from(u16::MAX))? > 1 {
            return Err(self.fail("is one of several parts; join them first: llama-gguf-split --merge"));
        }
        Ok(())
    }

    /// What a checkpoint's folder would have in the file of this name.
    pub fn file(&self, name: &str) -> Result<Option<Cow<'static, str>>, WeightsError> {
        self.check_network()?;
        let json = match name {
            "config.json" => qwen3::config(self)?,
            "tokenizer.json" => tokenizer::tokenizer(self)?,
            "tokenizer_config.json" => tokenizer::tokenizer_config(self)?,
            "generation_config.json" => tokenizer::generation_config(self)?,
            _ => return Ok(None),
        };
        Ok(Some(json.to_string().into()))
    }

    /// Shapes by the names that checkpoints on the hub have.
    pub(super) fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.tensors.iter().map(|(name, t)| (qwen3::hub_name(name), t.shape.clone())).collect()
    }

    /// The file's own name for a tensor.
    pub(super) fn own_name(&self, name: &str) -> String {
        qwen3::own_name(name)
    }

    fn stored(&self, name: &str) -> candle_core::Result<&Stored> {
        match self.tensors.get(&qwen3::own_name(name)) {
            Some(t) => Ok(t),
            None => candle_core::bail!("tensor {name} is missing"),
        }
    }

    /// What a tensor is of, if that is not read.
    pub(super) fn unread(&self, name: &str) -> Option<&'static str> {
        let t = self.stored(name).ok()?;
        let read = matches!(t.kind.dtype, Some(d) if is_packed(d) || WIDENED.iter().any(|w| w.0 == d));
        (!read).then_some(t.kind.name)
    }

    /// How a matrix stays in memory, if packed.
    pub(super) fn packing(&self, name: &str) -> Option<GgmlDType> {
        let t = self.stored(name).ok()?;
        t.kind.dtype.filter(|d| t.shape.len() == 2 && is_packed(*d))
    }

    fn bytes(&self, t: &Stored) -> &[u8] {
        &self.map[t.place.clone()]
    }

    /// The bytes of a matrix, u8 on the CPU.
    pub(super) fn packed_bytes(&self, name: &str) -> candle_core::Result<Tensor> {
        let bytes = self.bytes(self.stored(name)?);
        let t = Tensor::from_slice(bytes, bytes.len(), &Device::Cpu);
        // SAFETY: they are of the file, which is mapped for reading.
        unsafe { release(bytes) };
        t
    }

    /// The numbers of a tensor.
    pub(super) fn load(&self, name: &str, device: &Device) -> candle_core::Result<Tensor> {
        let t = self.stored(name)?;
        let Some(dtype) = t.kind.dtype else { candle_core::bail!("{name}: {} is not read", t.kind.name) };
        let bytes = self.bytes(t);
        let numbers = match WIDENED.iter().find(|w| w.0 == dtype) {
            Some((_, plain)) => Tensor::from_raw_buffer(bytes, *plain, &t.shape, device)?,
            None => {
                let row = t.shape.last().copied().unwrap_or(1);
                let rows = t.shape.iter().product::<usize>() / row;
                let numbers = Packed::new(dtype, (rows, row), bytes)?.unpacked()?;
                numbers.reshape(t.shape.as_slice())?.to_device(device)?
            }
        };
        // SAFETY: they are of the file, which is mapped for reading.
        unsafe { release(bytes) };
        Ok(numbers)
    }

    /// Bytes of memory that a network on the CPU takes.
    pub(super) fn loaded_bytes(&self) -> u64 {
        let of = |(name, t): (&String, &Stored)| match self.packing(&qwen3::hub_name(name)) {
            Some(_) => t.place.len() as u64,
            None => 4 * t.shape.iter().product::<usize>() as u64,
        };
        self.tensors.iter().map(of).sum()
    }
}

/// Types that candle's tensors have too.
const WIDENED: [(GgmlDType, DType); 3] =
    [(GgmlDType::F32, DType::F32), (GgmlDType::F16, DType::F16), (GgmlDType::BF16, DType::BF16)];

const ARCHITECTURE: &str = "general.architecture";
const PARTS: &str = "split.count";
const QWEN3: &str = "qwen3";
