//! PyTorch's own checkpoints (`.pth`, `.pt`, `.bin`), read without Python and without running anything.
//!
//! Both layouts of `torch.save`: the zip archive, and the sequence of pickles from before 1.6. The file
//! is mapped; a tensor's numbers are copied when it is asked for, never more of them than its storage
//! has. Of the pickled dictionary only tensors are kept (those under `model` or `state_dict` where one
//! of these is there) and a `model_config`, as MoGe's checkpoints carry. Names stay as they are.

use super::pickle::{Id, Pickle, Value};
use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use serde_json::Value as Json;
use std::collections::{BTreeMap, HashMap};
use std::io::Cursor;
use std::ops::Range;
use std::path::Path;

/// A mapped checkpoint.
pub struct Pth {
    map: Mmap,
    tensors: BTreeMap<String, Stored>,
    /// What the file says of its network.
    pub config: Option<Json>,
}

/// Where a tensor's elements lie.
#[derive(Clone, Debug, PartialEq)]
struct Stored {
    kind: Kind,
    shape: Vec<usize>,
    /// In elements.
    strides: Vec<usize>,
    /// Of the first element, in the file.
    start: usize,
}

/// An element type: its bytes in the file, and candle's type for it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Kind {
    bytes: usize,
    dtype: DType,
}

impl Kind {
    /// Of a storage class. candle has no signed bytes, and booleans are bytes to it.
    fn of(class: &str) -> Result<Self, String> {
        let (bytes, dtype) = match class {
            "FloatStorage" => (4, DType::F32),
            "DoubleStorage" => (8, DType::F64),
            "HalfStorage" => (2, DType::F16),
            "BFloat16Storage" => (2, DType::BF16),
            "LongStorage" => (8, DType::I64),
            "IntStorage" => (4, DType::I32),
            "ShortStorage" => (2, DType::I16),
            "ByteStorage" | "BoolStorage" => (1, DType::U8),
            other => return Err(format!("tensors of torch.{other} are not read")),
        };
        Ok(Self { bytes, dtype })
    }
}

/// The parts of a file: its main pickle, and by key where each storage lies.
struct Parts {
    pickle: Range<usize>,
    storages: HashMap<String, Range<usize>>,
}

const LEGACY_MAGIC: &[u8] = &[0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

impl Pth {
    pub fn open(path: &Path) -> Result<Self, String> {
        let file = std::fs::File::open(path).map_err(|e| e.to_string())?;
        // SAFETY: the mapping is read-only. Another process that changes the file while it is mapped can
        // change tensor values, but no range into the map, all of which are checked here.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| e.to_string())?;
        let (tensors, config) = read(&map)?;
        Ok(Self { map, tensors, config })
    }

    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.tensors.iter().map(|(name, t)| (name.clone(), t.shape.clone())).collect()
    }

    pub fn load(&self, name: &str, device: &Device) -> candle_core::Result<Tensor> {
        let Some(t) = self.tensors.get(name) else { candle_core::bail!("tensor {name} is missing") };
        let elements: usize = if t.shape.contains(&0) { 0 } else { t.shape.iter().product() };
        if t.strides == row_major(&t.shape) {
            let bytes = &self.map[t.start..t.start + elements * t.kind.bytes];
            return Tensor::from_raw_buffer(bytes, t.kind.dtype, &t.shape, device);
        }
        let mut bytes = Vec::with_capacity(elements * t.kind.bytes);
        for i in 0..elements {
            let (mut rest, mut at) = (i, 0);
            for (size, stride) in t.shape.iter().zip(&t.strides).rev() {
                at += rest % size * stride;
                rest /= size;
            }
            let from = t.start + at * t.kind.bytes;
            bytes.extend_from_slice(&self.map[from..from + t.kind.bytes]);
        }
        Tensor::from_raw_buffer(&bytes, t.kind.dtype, &t.shape, device)
    }
}

fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i].max(1);
    }
    strides
}

fn read(bytes: &[u8]) -> Result<(BTreeMap<String, Stored>, Option<Json>), String> {
    let parts = if bytes.starts_with(b"PK") { zipped(bytes)? } else { legacy(bytes)? };
    let pickle = Pickle::read(&bytes[parts.pickle])?;
    let inner = ["model", "state_dict"]
        .iter()
        .find_map(|key| pickle.item(pickle.root, key).filter(|&id| matches!(pickle.get(id), Value::Dict(_))));
    let Value::Dict(items) = pickle.get(inner.unwrap_or(pickle.root)) else {
        return Err("it holds no dictionary of tensors (whole pickled modules are not read)".into());
    };
    let mut tensors = BTreeMap::new();
    for &(key, value) in items {
        let Some(name) = pickle.str(key) else { continue };
        let found = tensor(&pickle, value, &parts.storages).map_err(|e| format!("{name}: {e}"))?;
        if let Some(found) = found {
            tensors.insert(name.to_owned(), found);
        }
    }
    if tensors.is_empty() {
        return Err("it holds no tensors, neither by themselves nor under `model` or `state_dict`".into());
    }
    let config = match pickle.item(pickle.root, "model_config") {
        Some(id) => Some(json(&pickle, id, 0, &mut pickle.size().saturating_mul(4))?),
        None => None,
    };
    Ok((tensors, config))
}

/// Where the members of an archive lie. PyTorch compresses none.
fn zipped(bytes: &[u8]) -> Result<Parts, String> {
    let strange = |e: &dyn std::fmt::Display| format!("not a readable archive ({e}); download it again");
    let mut archive = zip::ZipArchive::new(Cursor::new(bytes)).map_err(|e| strange(&e))?;
    let (mut pickle, mut storages) = (None, HashMap::new());
    for i in 0..archive.len() {
        let member = archive.by_index_raw(i).map_err(|e| strange(&e))?;
        let start = member.data_start().ok_or_else(|| strange(&"a member without its header"))?;
        let range = range(bytes, start, member.compressed_size()).map_err(|e| strange(&e))?;
        // `<name of the file>/data.pkl` and so on.
        let path = member.name().map_err(|e| strange(&e))?;
        let Some((_, name)) = path.split_once('/') else { continue };
        let key = name.strip_prefix("data/");
        if member.compression() != zip::CompressionMethod::Stored && (name == "data.pkl" || key.is_some()) {
            return Err(format!("{name} is compressed, which torch.save does not do"));
        }
        if name == "data.pkl" {
            pickle = Some(range);
        } else if name == "byteorder" && &bytes[range.clone()] != b"little" {
            return Err("its numbers are big-endian; save it again on a usual machine".into());
        } else if let Some(key) = key {
            storages.insert(key.to_owned(), range);
        }
    }
    let pickle =
        pickle.ok_or("an archive without data.pkl: not a checkpoint of PyTorch's (perhaps TorchScript)")?;
    Ok(Parts { pickle, storages })
}

fn range(bytes: &[u8], start: u64, len: u64) -> Result<Range<usize>, String> {
    let end = start.checked_add(len).filter(|&end| end <= bytes.len() as u64);
    let end = end.ok_or("a part that reaches beyond the file's end")?;
    Ok(start as usize..end as usize)
}

/// Magic number, version, system, the dictionary, the storages' keys: five pickles. Then each storage:
/// its number of elements and they themselves.
fn legacy(bytes: &[u8]) -> Result<Parts, String> {
    let mut at = 0;
    let mut next = || -> Result<(Range<usize>, Pickle<'_>), String> {
        let pickle = Pickle::read(&bytes[at..])?;
        let range = at..at + pickle.len;
        at = range.end;
        Ok((range, pickle))
    };
    let magic =
        next().ok().filter(|(_, p)| matches!(p.get(p.root), Value::Long(n) if n.starts_with(LEGACY_MAGIC)));
    if magic.is_none() {
        return Err(
            "not a checkpoint of PyTorch's: neither an archive nor the old layout's magic number".into()
        );
    }
    next()?;
    next()?;
    let (pickle, dictionary) = next()?;
    let (_, keys) = next()?;
    let Value::List(list) = keys.get(keys.root) else { return Err("no list of storages".into()) };
    let mut kinds = HashMap::new();
    for id in 0..dictionary.size() {
        if let Value::Persistent(of) = dictionary.get(id) {
            let (key, kind) = storage(&dictionary, *of)?;
            kinds.insert(key, kind);
        }
    }
    let mut storages = HashMap::new();
    for &key in list {
        let key = keys.str(key).ok_or("a storage's key that is no text")?;
        let kind = kinds.get(key).ok_or_else(|| format!("storage {key} has no type"))?;
        let count = range(bytes, at as u64, 8)?;
        let count = u64::from_le_bytes(bytes[count].try_into().expect("8 bytes"));
        let len = count.checked_mul(kind.bytes as u64).ok_or("a storage larger than memory")?;
        let range = range(bytes, at as u64 + 8, len)?;
        at = range.end;
        storages.insert(key.to_owned(), range);
    }
    Ok(Parts { pickle, storages })
}

/// Key and type of `('storage', class, key, place, elements, …)`.
fn storage<'a>(p: &Pickle<'a>, id: Id) -> Result<(&'a str, Kind), String> {
    let Value::Tuple(parts) = p.get(id) else { return Err("a storage that is not described".into()) };
    let [word, class, key, ..] = parts[..] else { return Err("a storage that is not described".into()) };
    match (p.str(word), p.get(class), p.str(key)) {
        (Some("storage"), Value::Global("torch", class), Some(key)) => Ok((key, Kind::of(class)?)),
        _ => Err("a storage of an unknown form".into()),
    }
}

/// A tensor or a parameter around one; `None` for anything else.
fn tensor(
    p: &Pickle<'_>,
    id: Id,
    storages: &HashMap<String, Range<usize>>,
) -> Result<Option<Stored>, String> {
    let Value::Object { of, args, .. } = p.get(id) else { return Ok(None) };
    let (Value::Global("torch._utils", function), Value::Tuple(args)) = (p.get(*of), p.get(*args)) else {
        return Ok(None);
    };
    if *function != "_rebuild_tensor_v2" {
        // A parameter is a tensor and whether it is trained; there is none around a parameter.
        let Some(&inner) = args.first() else { return Err("a parameter without a tensor".into()) };
        let around_tensor = matches!(
            p.get(inner),
            Value::Object { of, .. } if p.get(*of) == &Value::Global("torch._utils", "_rebuild_tensor_v2")
        );
        return if around_tensor { tensor(p, inner, storages) } else { Ok(None) };
    }
    let [stored, offset, shape, strides, ..] = args[..] else {
        return Err("a tensor without storage, offset, shape or strides".into());
    };
    let Value::Persistent(stored) = p.get(stored) else { return Err("a tensor without storage".into()) };
    let (key, kind) = storage(p, *stored)?;
    let range = storages.get(key).ok_or_else(|| format!("its storage {key} is not in the file"))?;
    let held = range.len() / kind.bytes;
    let whole = |id: Id| match p.get(id) {
        Value::Int(n) => usize::try_from(*n).map_err(|_| format!("a negative size or stride ({n})")),
        _ => Err("a size that is no number".to_owned()),
    };
    let wholes = |id: Id| match p.get(id) {
        Value::Tuple(ids) | Value::List(ids) => ids.iter().map(|&id| whole(id)).collect(),
        _ => Err("a shape that is none".to_owned()),
    };
    let (offset, shape, strides): (usize, Vec<usize>, Vec<usize>) =
        (whole(offset)?, wholes(shape)?, wholes(strides)?);
    if shape.len() != strides.len() {
        return Err(format!("shape {shape:?} with strides {strides:?}"));
    }
    let empty = shape.contains(&0);
    // Where a size is 0, the others must still be ones that can be multiplied.
    let elements = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size.max(1)));
    let last = shape
        .iter()
        .zip(&strides)
        .try_fold(offset, |at, (&size, &stride)| at.checked_add(size.saturating_sub(1).checked_mul(stride)?));
    // An expanded tensor would be more than the file holds.
    let fits = match (elements, last) {
        (Some(n), Some(last)) => empty || (n <= held && last < held),
        _ => false,
    };
    if !fits {
        return Err(format!("shape {shape:?} does not fit its storage of {held} elements"));
    }
    let start = range.start + if empty { 0 } else { offset * kind.bytes };
    // A size of one may have any stride.
    let usual = row_major(&shape);
    let strides = (0..shape.len()).map(|i| if empty || shape[i] == 1 { usual[i] } else { strides[i] });
    Ok(Some(Stored { kind, strides: strides.collect(), shape, start }))
}

/// Plain data as JSON. `left` values may still be visited: more, and it is going in circles.
fn json(p: &Pickle<'_>, id: Id, depth: usize, left: &mut usize) -> Result<Json, String> {
    const DEEPEST: usize = 32;
    *left = left.checked_sub(1).filter(|_| depth < DEEPEST).ok_or("model_config is nested beyond reason")?;
    Ok(match p.get(id) {
        Value::None => Json::Null,
        Value::Bool(b) => (*b).into(),
        Value::Int(n) => (*n).into(),
        Value::Float(x) => (*x).into(),
        Value::Str(s) => (*s).into(),
        Value::Tuple(items) | Value::List(items) => {
            let items = items.iter().map(|&id| json(p, id, depth + 1, left));
            Json::Array(items.collect::<Result<_, _>>()?)
        }
        Value::Dict(items) => {
            let mut map = serde_json::Map::new();
            for &(key, value) in items {
                let key = p.str(key).ok_or("model_config has a key that is no text")?;
                map.insert(key.into(), json(p, value, depth + 1, left)?);
            }
            Json::Object(map)
        }
        _ => return Err("model_config holds more than plain data".into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use serde_json::json;

    fn samples() -> std::path::PathBuf {
        let set = std::env::var("VALOR_FIXTURES").unwrap_or_else(|_| "tests/fixtures".into());
        Path::new(&set).join("grounding-dino-original/pth_samples")
    }

    /// What PyTorch read from each: shapes, types, sums, first elements.
    #[test]
    fn parity_with_torch_load_in_every_layout() {
        let expected = std::fs::read_to_string(samples().join("expected.json")).unwrap();
        let expected: serde_json::Map<String, Json> = serde_json::from_str(&expected).unwrap();
        assert!(expected.len() >= 4);
        for (file, tensors) in &expected {
            let pth = Pth::open(&samples().join(file)).unwrap();
            let tensors = tensors.as_object().unwrap();
            let names: Vec<&String> = pth.tensors.keys().collect();
            let mut wanted: Vec<&String> = tensors.keys().collect();
            wanted.sort();
            assert_eq!(names, wanted, "{file}");
            for (name, want) in tensors {
                let t = pth.load(name, &Device::Cpu).unwrap();
                assert_eq!(json!(t.dims()), want["shape"], "{file} {name}");
                let dtype = match want["dtype"].as_str().unwrap() {
                    "float32" => DType::F32,
                    "float16" => DType::F16,
                    "bfloat16" => DType::BF16,
                    "int64" => DType::I64,
                    "bool" => DType::U8,
                    other => panic!("{other}"),
                };
                assert_eq!(t.dtype(), dtype, "{file} {name}");
                let flat = t.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
                let scale = flat.iter().map(|x| x.abs()).sum::<f64>().max(1.);
                let off = (flat.iter().sum::<f64>() - want["sum"].as_f64().unwrap_or(0.)).abs();
                assert!(off <= 1e-5 * scale, "{file} {name}: sum off by {off}");
                for (x, y) in flat.iter().zip(want["first"].as_array().unwrap()) {
                    let y = y.as_f64().unwrap_or_else(|| f64::from(u8::from(y == &json!(true))));
                    assert!((x - y).abs() <= 1e-6 * y.abs().max(1.), "{file} {name}: {x} {y}");
                }
            }
        }
    }

    /// A whole checkpoint in both formats, where the set has it (the project's own is without, for its size).
    #[test]
    fn parity_of_a_network_in_both_formats() {
        let folder = samples().parent().unwrap().to_owned();
        let file = folder.join("model.pth");
        if !file.is_file() {
            return;
        }
        let pth = Pth::open(&file).unwrap();
        let safe = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
        let equal = |name: &str, t: &Tensor| {
            let other = pth.load(name, &Device::Cpu).unwrap();
            let bytes = |t: &Tensor| t.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>();
            other.dims() == t.dims() && bytes(&other).unwrap() == bytes(t).unwrap()
        };
        for (name, t) in &safe {
            assert!(equal(name, t), "{name}");
        }
        // What the one has more, the network does not read.
        let tensors = pth.tensors.keys().filter(|n| !safe.contains_key(*n)).collect::<Vec<_>>();
        assert!(safe.len() > 100 && tensors.len() < safe.len() / 2, "{tensors:?}");
    }

    /// Cut short anywhere, or with bytes changed, a file is an error or other numbers, never a panic.
    #[test]
    fn no_damage_makes_it_panic() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for file in ["bare_state_dict.pth", "train_style.pth", "legacy_nonzip.pth"] {
            let whole = std::fs::read(samples().join(file)).unwrap();
            assert!(read(&whole).is_ok(), "{file}");
            for _ in 0..60 {
                let cut = rng.random_range(0..whole.len());
                let _ = read(&whole[..cut]);
            }
            for _ in 0..400 {
                let mut bytes = whole.clone();
                for _ in 0..rng.random_range(1..8) {
                    // The layout lies in the first and last pages.
                    let near = rng.random_range(0..4_500.min(bytes.len()));
                    let at = if rng.random_bool(0.7) { near } else { bytes.len() - 1 - near };
                    bytes[at] = if rng.random_bool(0.3) { 0xff } else { rng.random() };
                }
                let Ok((tensors, _)) = read(&bytes) else { continue };
                for t in tensors.values() {
                    let last: usize =
                        t.shape.iter().zip(&t.strides).map(|(n, s)| n.saturating_sub(1) * s).sum();
                    let end =
                        if t.shape.contains(&0) { t.start } else { t.start + (last + 1) * t.kind.bytes };
                    assert!(end <= bytes.len(), "{file}: {t:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_checkpoint_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let open = |bytes: &[u8]| {
            let path = dir.path().join("a.pth");
            std::fs::write(&path, bytes).unwrap();
            Pth::open(&path).err().unwrap()
        };
        assert!(open(b"hello").contains("not a checkpoint of PyTorch's"), "{}", open(b"hello"));
        assert!(open(b"PK\x03\x04rest").contains("not a readable archive"));
        assert!(open(b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R.").contains("not a checkpoint"));
    }
}
