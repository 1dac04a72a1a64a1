//! The header of a GGUF file: metadata, and where each tensor lies.
//!
//! Layout: magic, version, numbers of tensors and of keys; the keys with their values; the tensors'
//! names, shapes (fastest dimension first), types and offsets; the tensors, aligned. All is
//! little-endian; strings and arrays begin with their length as u64.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use candle_core::quantized::GgmlDType;

/// A type of tensors: so many numbers in a block of so many bytes.
#[derive(Debug, PartialEq)]
pub struct Kind {
    id: u32,
    pub name: &'static str,
    block: usize,
    bytes: usize,
    /// candle's type for it, if it has one.
    pub dtype: Option<GgmlDType>,
}

const fn kind(id: u32, name: &'static str, block: usize, bytes: usize, dtype: Option<GgmlDType>) -> Kind {
    Kind { id, name, block, bytes, dtype }
}

/// Those of ggml that files have.
static KINDS: [Kind; 27] = [
    kind(0, "F32", 1, 4, Some(GgmlDType::F32)),
    kind(1, "F16", 1, 2, Some(GgmlDType::F16)),
    kind(2, "Q4_0", 32, 18, Some(GgmlDType::Q4_0)),
    kind(3, "Q4_1", 32, 20, Some(GgmlDType::Q4_1)),
    kind(6, "Q5_0", 32, 22, Some(GgmlDType::Q5_0)),
    kind(7, "Q5_1", 32, 24, Some(GgmlDType::Q5_1)),
    kind(8, "Q8_0", 32, 34, Some(GgmlDType::Q8_0)),
    kind(10, "Q2_K", 256, 84, Some(GgmlDType::Q2K)),
    kind(11, "Q3_K", 256, 110, Some(GgmlDType::Q3K)),
    kind(12, "Q4_K", 256, 144, Some(GgmlDType::Q4K)),
    kind(13, "Q5_K", 256, 176, Some(GgmlDType::Q5K)),
    kind(14, "Q6_K", 256, 210, Some(GgmlDType::Q6K)),
    kind(16, "IQ2_XXS", 256, 66, None),
    kind(17, "IQ2_XS", 256, 74, None),
    kind(18, "IQ3_XXS", 256, 98, None),
    kind(19, "IQ1_S", 256, 50, None),
    kind(20, "IQ4_NL", 32, 18, None),
    kind(21, "IQ3_S", 256, 110, None),
    kind(22, "IQ2_S", 256, 82, None),
    kind(23, "IQ4_XS", 256, 136, None),
    kind(24, "I8", 1, 1, None),
    kind(25, "I16", 1, 2, None),
    kind(26, "I32", 1, 4, None),
    kind(27, "I64", 1, 8, None),
    kind(28, "F64", 1, 8, None),
    kind(29, "IQ1_M", 256, 56, None),
    kind(30, "BF16", 1, 2, Some(GgmlDType::BF16)),
];

/// A tensor of the file.
#[derive(Debug)]
pub struct Stored {
    pub kind: &'static Kind,
    /// Slowest dimension first.
    pub shape: Vec<usize>,
    /// Its bytes in the file.
    pub place: Range<usize>,
}

/// A value; strings and arrays stay in the file.
#[derive(Debug)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(Range<usize>),
    List { of: u32, count: usize, place: Range<usize> },
}

/// Ids of types of values.
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// More of either is no language model's file. Each costs memory many times its bytes.
const MOST_ENTRIES: u64 = 1 << 16;

/// Arrays in arrays.
const DEEPEST: usize = 4;

const ALIGNMENT: &str = "general.alignment";

type Header = (BTreeMap<String, Value>, BTreeMap<String, Stored>);

/// Reads on from a place in the file.
struct Reader<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: u64) -> Result<&'a [u8], String> {
        let rest = &self.file[self.at..];
        let n = usize::try_from(n).ok().filter(|n| *n <= rest.len()).ok_or_else(|| {
            format!("it ends too early (a length of {n} at byte {}); download it again", self.at)
        })?;
        self.at += n;
        Ok(&rest[..n])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        Ok(self.take(N as u64)?.try_into().expect("as long as was taken"))
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    fn string(&mut self) -> Result<Range<usize>, String> {
        let n = self.u64()?;
        let from = self.at;
        self.take(n)?;
        Ok(from..self.at)
    }

    fn name(&mut self) -> Result<&'a str, String> {
        let from = self.at;
        let place = self.string()?;
        std::str::from_utf8(&self.file[place]).map_err(|_| format!("the name at byte {from} is not UTF-8"))
    }

    fn value(&mut self, of: u32, depth: usize) -> Result<Value, String> {
        Ok(match of {
            0 => Value::Unsigned(self.array::<1>()?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            // By its shortest digits: 1e-6 is meant, not the nearest f32 to it.
            6 => {
                let v = f32::from_le_bytes(self.array()?);
                Value::Float(v.to_string().parse().unwrap_or(v.into()))
            }
            BOOL => match self.array::<1>()? {
                [b @ (0 | 1)] => Value::Bool(b == 1),
                [b] => return Err(format!("a truth value is {b}")),
            },
            STRING => Value::Text(self.string()?),
            ARRAY => {
                if depth == DEEPEST {
                    return Err("arrays are nested too deeply".into());
                }
                let (of, count) = (self.u32()?, self.u64()?);
                let from = self.at;
                match width(of) {
                    Some(width) => {
                        self.take(count.saturating_mul(width))?;
                    }
                    None => {
                        // Each element begins with a length at least.
                        if count > (self.file.len() - self.at) as u64 / 8 {
                            return Err(format!("an array of {count} does not fit into the file"));
                        }
                        for _ in 0..count {
                            self.value(of, depth + 1)?;
                        }
                    }
                }
                Value::List { of, count: count as usize, place: from..self.at }
            }
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("its type {other} is unknown")),
        })
    }
}

/// Bytes of a value, where all of the type have the same.
fn width(of: u32) -> Option<u64> {
    match of {
        0 | 1 | BOOL => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

impl Value {
    pub fn whole(&self) -> Option<u64> {
        match self {
            Self::Unsigned(n) => Some(*n),
            Self::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    pub fn number(&self) -> Option<f64> {
        match self {
            Self::Float(v) => Some(*v),
            other => other.whole().map(|n| n as f64),
        }
    }

    pub fn text<'a>(&self, file: &'a [u8]) -> Option<&'a str> {
        match self {
            Self::Text(place) => std::str::from_utf8(&file[place.clone()]).ok(),
            _ => None,
        }
    }

    pub fn strings<'a>(&self, file: &'a [u8]) -> Option<Vec<&'a str>> {
        let Self::List { of: STRING, count, place } = self else { return None };
        let mut reader = Reader { file, at: place.start };
        (0..*count).map(|_| reader.name().ok()).collect()
    }

    pub fn whole_numbers(&self, file: &[u8]) -> Option<Vec<i64>> {
        let Self::List { of, count, place } = self else { return None };
        let mut reader = Reader { file, at: place.start };
        let number = |_| match reader.value(*of, DEEPEST).ok()? {
            Value::Signed(n) => Some(n),
            other => other.whole().and_then(|n| i64::try_from(n).ok()),
        };
        (0..*count).map(number).collect()
    }

    /// For errors, cut short.
    pub fn describe(&self, file: &[u8]) -> String {
        match self {
            Self::Unsigned(n) => n.to_string(),
            Self::Signed(n) => n.to_string(),
            Self::Float(v) => v.to_string(),
            Self::Bool(b) => b.to_string(),
            Self::Text(place) => {
                let bytes = &file[place.clone()];
                short(&String::from_utf8_lossy(&bytes[..bytes.len().min(200)]))
            }
            Self::List { of, count, .. } => {
                let of = match *of {
                    STRING => "strings",
                    ARRAY => "arrays",
                    6 | 12 => "fractions",
                    BOOL => "truth values",
                    _ => "whole numbers",
                };
                format!("an array of {count} {of}")
            }
        }
    }
}

/// A stranger's text for an error: quoted, and not all of it.
pub(super) fn short(text: &str) -> String {
    const MOST: usize = 60;
    let more = if text.chars().nth(MOST).is_some() { "…" } else { "" };
    format!("{:?}{more}", text.chars().take(MOST).collect::<String>())
}

/// Reads the header of a whole file.
pub(super) fn read(file: &[u8]) -> Result<Header, String> {
    let mut r = Reader { file, at: 0 };
    if r.array().ok() != Some(*b"GGUF") {
        return Err("is no GGUF file: it does not begin with \"GGUF\"".into());
    }
    match r.u32()? {
        2 | 3 => {}
        1 => return Err("is of GGUF's version 1; convert the model anew with llama.cpp".into()),
        v if v.swap_bytes() <= 3 => return Err("is big-endian; only little-endian files are read".into()),
        v => return Err(format!("is of GGUF's version {v}; 2 and 3 are read")),
    }
    let (tensors, keys) = (r.u64()?, r.u64()?);
    for (n, what) in [(tensors, "tensors"), (keys, "keys")] {
        if n > MOST_ENTRIES {
            return Err(format!(
                "its header tells of {n} {what}, more than any model has; download it again"
            ));
        }
    }
    let mut metadata = BTreeMap::new();
    for i in 0..keys {
        let key = r.name().map_err(|e| format!("key {i}: {e}"))?;
        let value = r.u32().and_then(|of| r.value(of, 0)).map_err(|e| format!("{}: {e}", short(key)))?;
        match metadata.entry(key.to_owned()) {
            Entry::Vacant(entry) => drop(entry.insert(value)),
            Entry::Occupied(_) => return Err(format!("the key {} stands there twice", short(key))),
        }
    }
    let alignment = match metadata.get(ALIGNMENT).map(Value::whole) {
        None => 32,
        Some(Some(n)) if n.is_power_of_two() && n <= 1 << 20 => n as usize,
        Some(_) => return Err(format!("{ALIGNMENT} is no power of two")),
    };
    let mut found = Vec::new();
    for i in 0..tensors {
        let name = r.name().map_err(|e| format!("tensor {i}: {e}"))?;
        let entry = tensor(&mut r).map_err(|e| format!("{}: {e}", short(name)))?;
        found.push((name, entry));
    }
    // What is not there at all has no padding before it.
    let data = if found.is_empty() { r.at } else { r.at.next_multiple_of(alignment) };
    let room = file.len().saturating_sub(data);
    let (mut tensors, mut sum) = (BTreeMap::new(), 0usize);
    for (name, (kind, shape, bytes, offset)) in found {
        let end = usize::try_from(offset).ok().and_then(|o| o.checked_add(bytes)).filter(|end| *end <= room);
        let Some(end) = end else {
            return Err(format!(
                "{}: {bytes} bytes at {offset} are beyond its end ({room} bytes of tensors); download it again",
                short(name)
            ));
        };
        // Tensors that share bytes could make a small file fill any memory.
        sum = sum.saturating_add(bytes);
        let stored = Stored { kind, shape, place: data + end - bytes..data + end };
        if sum > room || tensors.insert(name.to_owned(), stored).is_some() {
            return Err(format!("{}: tensors overlap, or two have this name", short(name)));
        }
    }
    Ok((metadata, tensors))
}

/// Type, shape, bytes and offset of the next tensor.
fn tensor(r: &mut Reader) -> Result<(&'static Kind, Vec<usize>, usize, u64), String> {
    let rank = r.u32()?;
    if !(1..=4).contains(&rank) {
        return Err(format!("it has {rank} dimensions, expected 1 to 4"));
    }
    let mut shape = Vec::new();
    for _ in 0..rank {
        shape.push(r.u64()?);
    }
    let (id, offset) = (r.u32()?, r.u64()?);
    let kind = KINDS.iter().find(|k| k.id == id).ok_or_else(|| format!("its type {id} is unknown"))?;
    if !shape[0].is_multiple_of(kind.block as u64) {
        return Err(format!("rows of {} are no whole blocks of {}", shape[0], kind.name));
    }
    let bytes = (shape.iter())
        .try_fold(1u64, |n, d| n.checked_mul(*d).filter(|n| *n > 0))
        .and_then(|n| (n / kind.block as u64).checked_mul(kind.bytes as u64))
        .and_then(|n| usize::try_from(n).ok())
        .ok_or_else(|| format!("its shape {shape:?} is impossible"))?;
    shape.reverse();
    // Not 0, and no longer than a checked product of all.
    let shape = shape.into_iter().map(|d| d as usize).collect();
    Ok((kind, shape, bytes, offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(n: u64) -> Vec<u8> {
        n.to_le_bytes().into()
    }

    fn string(text: &str) -> Vec<u8> {
        [number(text.len() as u64), text.as_bytes().into()].concat()
    }

    fn id(n: u32) -> Vec<u8> {
        n.to_le_bytes().into()
    }

    /// A file of version 3 with this many tensors and keys, and what follows.
    fn file(tensors: u64, keys: u64, rest: &[Vec<u8>]) -> Vec<u8> {
        [b"GGUF".to_vec(), id(3), number(tensors), number(keys), rest.concat()].concat()
    }

    /// A tensor's entry.
    fn entry(name: &str, shape: &[u64], kind: u32, offset: u64) -> Vec<u8> {
        let shape_bytes = shape.iter().flat_map(|d| number(*d)).collect();
        [string(name), id(shape.len() as u32), shape_bytes, id(kind), number(offset)].concat()
    }

    #[test]
    fn gguf_values_and_tensors_are_read() {
        let list = [id(ARRAY), id(STRING), number(2), string("a"), string("bc")].concat();
        let keys = [string("n"), id(5), id(7), string("eps"), id(6), 1e-6f32.to_le_bytes().into()].concat();
        let bytes = file(1, 3, &[keys, string("l"), list, entry("t", &[4, 2], 0, 0), vec![0; 100]]);
        let (metadata, tensors) = read(&bytes).unwrap();
        assert_eq!(metadata["n"].whole(), Some(7));
        assert_eq!(metadata["eps"].number(), Some(1e-6));
        assert_eq!(metadata["l"].strings(&bytes), Some(vec!["a", "bc"]));
        assert_eq!((&tensors["t"].shape[..], tensors["t"].kind.name), (&[2, 4][..], "F32"));
        assert!(tensors["t"].place.start.is_multiple_of(32) && tensors["t"].place.len() == 32);
    }

    #[test]
    fn gguf_headers_that_lie_are_refused_before_anything_is_made_of_them() {
        let huge = u64::MAX;
        let key = |of: u32, rest: Vec<u8>| file(0, 1, &[string("k"), id(of), rest]);
        let nested = vec![[id(ARRAY), number(1)].concat(); 9].concat();
        let with = |entries: &[Vec<u8>]| file(entries.len() as u64, 0, &[entries.concat(), vec![0; 128]]);
        let alignment = |n: u32| file(0, 1, &[string(ALIGNMENT), id(4), id(n)]);
        for (bytes, want) in [
            (b"PK\x03\x04".to_vec(), "is no GGUF file"),
            (Vec::new(), "is no GGUF file"),
            ([b"GGUF".to_vec(), id(1)].concat(), "version 1"),
            ([b"GGUF".to_vec(), id(3 << 24)].concat(), "big-endian"),
            ([b"GGUF".to_vec(), id(9)].concat(), "version 9"),
            (file(huge, 0, &[]), "18446744073709551615 tensors"),
            (file(0, huge, &[]), "18446744073709551615 keys"),
            (file(0, 1, &[number(huge)]), "key 0: it ends too early"),
            (key(STRING, number(1 << 40)), "\"k\": it ends too early"),
            (key(99, vec![]), "its type 99 is unknown"),
            (key(BOOL, vec![3]), "a truth value is 3"),
            (key(ARRAY, [id(0), number(huge)].concat()), "it ends too early"),
            (key(ARRAY, [id(12), number(huge / 2)].concat()), "it ends too early"),
            (key(ARRAY, [id(STRING), number(1 << 50)].concat()), "does not fit"),
            (key(ARRAY, nested), "nested too deeply"),
            (file(0, 2, &[string("k"), id(0), vec![1], string("k"), id(0), vec![1]]), "stands there twice"),
            (file(0, 1, &[[number(1), vec![0xff]].concat()]), "not UTF-8"),
            (alignment(0), "no power of two"),
            (alignment(3), "no power of two"),
            (with(&[entry("t", &[], 0, 0)]), "0 dimensions"),
            (with(&[entry("t", &[1; 5], 0, 0)]), "5 dimensions"),
            (with(&[entry("t", &[4, 0], 0, 0)]), "impossible"),
            (with(&[entry("t", &[1 << 40, 1 << 40], 0, 0)]), "impossible"),
            (with(&[entry("t", &[huge], 0, 0)]), "impossible"),
            (with(&[entry("t", &[4], 200, 0)]), "type 200 is unknown"),
            (with(&[entry("t", &[33], 8, 0)]), "no whole blocks of Q8_0"),
            (with(&[entry("t", &[1 << 30], 0, 0)]), "beyond its end"),
            (with(&[entry("t", &[4], 0, huge)]), "beyond its end"),
            (with(&[entry("t", &[4], 0, 0), entry("t", &[4], 0, 32)]), "two have this name"),
            (with(&[entry("a", &[20], 0, 0), entry("b", &[20], 0, 0)]), "overlap"),
        ] {
            let e = read(&bytes).unwrap_err();
            assert!(e.contains(want), "expected {want:?}: {e}");
        }
    }
}
