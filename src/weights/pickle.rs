//! Reads pickles as data: no name in one is ever imported, no object ever made.
//!
//! Values lie in an arena and refer to one another by number, as a pickle's memo does, so shared and
//! cyclic values are harmless and memory stays within a small multiple of the pickle's length. Names
//! of classes and functions are taken from a short list of what checkpoints hold ([`known`]); any other
//! ends the reading. Protocols 2 to 5, as `torch.save` writes; not the textual ones before.

use std::collections::HashMap;

/// The number of a value in its [`Pickle`].
pub type Id = usize;

#[derive(Clone, Debug, PartialEq)]
pub enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    /// An integer of more than 64 bits, by its little-endian bytes.
    Long(&'a [u8]),
    Float(f64),
    Str(&'a str),
    Bytes(&'a [u8]),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Set(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A class or function, by module and name.
    Global(&'a str, &'a str),
    /// What calling a class or function would have made.
    Object {
        of: Id,
        args: Id,
        state: Option<Id>,
    },
    /// What the file keeps elsewhere, such as the numbers of a tensor.
    Persistent(Id),
}

pub struct Pickle<'a> {
    values: Vec<Value<'a>>,
    pub root: Id,
    /// Bytes read, the final opcode included.
    pub len: usize,
}

/// Modules and names that checkpoints hold beside plain data; none of them does anything here.
const KNOWN: [(&str, &[&str]); 13] = [
    ("torch._utils", &["_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state"]),
    ("torch.storage", &["TypedStorage", "UntypedStorage"]),
    ("torch.serialization", &["_get_layout"]),
    ("torch", &["Size", "device", "Tensor", "dtype"]),
    ("torch.nn.parameter", &["Parameter"]),
    ("collections", &["OrderedDict", "defaultdict", "Counter"]),
    ("argparse", &["Namespace"]),
    ("pathlib", &["PosixPath", "PurePosixPath", "WindowsPath"]),
    ("numpy", &["dtype", "ndarray"]),
    ("numpy.core.multiarray", &["scalar", "_reconstruct"]),
    ("numpy._core.multiarray", &["scalar", "_reconstruct"]),
    ("_codecs", &["encode"]),
    ("builtins", &BUILTINS),
];

const BUILTINS: [&str; 11] =
    ["set", "frozenset", "dict", "list", "int", "float", "str", "bool", "complex", "slice", "bytearray"];

fn known(module: &str, name: &str) -> bool {
    let dtypes = ["float", "bfloat", "int", "uint", "bool", "double", "half", "long"];
    let of_torch = name.ends_with("Storage") || dtypes.iter().any(|d| name.starts_with(d));
    (module == "torch" && of_torch) || KNOWN.iter().any(|(m, names)| *m == module && names.contains(&name))
}

impl<'a> Pickle<'a> {
    /// Reads one pickle from the beginning of `bytes`.
    pub fn read(bytes: &'a [u8]) -> Result<Self, String> {
        let mut reader = Reader { bytes, at: 0, values: Vec::new(), stack: Vec::new(), memo: HashMap::new() };
        let root = reader.run().map_err(|e| format!("{e} (at byte {} of the pickle)", reader.at))?;
        Ok(Self { values: reader.values, root, len: reader.at })
    }

    pub fn get(&self, id: Id) -> &Value<'a> {
        &self.values[id]
    }

    /// Number of values: what a walk may visit before it must be going in circles.
    pub fn size(&self) -> usize {
        self.values.len()
    }

    pub fn str(&self, id: Id) -> Option<&'a str> {
        match self.get(id) {
            Value::Str(s) => Some(s),
            _ => None,
        }
    }

    /// A dictionary's value.
    pub fn item(&self, dict: Id, key: &str) -> Option<Id> {
        let Value::Dict(items) = self.get(dict) else { return None };
        items.iter().rev().find(|(k, _)| self.str(*k) == Some(key)).map(|(_, v)| *v)
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value<'a>>,
    /// `None` is a mark.
    stack: Vec<Option<Id>>,
    memo: HashMap<u64, Id>,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(n).filter(|&end| end <= self.bytes.len());
        let Some(end) = end else { return Err(format!("it ends before {n} more bytes that it announces")) };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// A little-endian number of `n` bytes, at most 8.
    fn number(&mut self, n: usize) -> Result<u64, String> {
        Ok(self.take(n)?.iter().rev().fold(0, |sum, b| sum << 8 | u64::from(*b)))
    }

    /// What an announced length of `n` bytes covers.
    fn counted(&mut self, n: usize) -> Result<&'a [u8], String> {
        let len = self.number(n)?;
        self.take(usize::try_from(len).map_err(|_| format!("a length of {len} bytes"))?)
    }

    fn text(&mut self, n: usize) -> Result<&'a str, String> {
        std::str::from_utf8(self.counted(n)?).map_err(|_| "a text that is not UTF-8".into())
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let len = self.bytes[self.at..].iter().position(|b| *b == b'\n');
        let line = self.take(len.ok_or("a line without an end")?)?;
        self.at += 1;
        std::str::from_utf8(line).map_err(|_| "a name that is not UTF-8".into())
    }

    fn push(&mut self, value: Value<'a>) {
        self.values.push(value);
        self.stack.push(Some(self.values.len() - 1));
    }

    fn top(&self) -> Result<Id, String> {
        self.stack.last().copied().flatten().ok_or_else(|| "nothing where a value is needed".into())
    }

    fn pop(&mut self) -> Result<Id, String> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_marked(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.stack.iter().rposition(Option::is_none).ok_or("no mark where one is needed")?;
        let items = self.stack.split_off(mark + 1).into_iter().flatten().collect();
        self.stack.pop();
        Ok(items)
    }

    fn tuple(&mut self, n: usize) -> Result<(), String> {
        let mut items = vec![0; n];
        for item in items.iter_mut().rev() {
            *item = self.pop()?;
        }
        self.push(Value::Tuple(items));
        Ok(())
    }

    fn extend(&mut self, items: Vec<Id>) -> Result<(), String> {
        let top = self.top()?;
        match &mut self.values[top] {
            Value::List(list) | Value::Set(list) => list.extend(items),
            _ => return Err("something is added to what is no list".into()),
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[Id]) -> Result<(), String> {
        let top = self.top()?;
        match &mut self.values[top] {
            Value::Dict(dict) if items.len().is_multiple_of(2) => {
                dict.extend(items.chunks_exact(2).map(|p| (p[0], p[1])));
                Ok(())
            }
            _ => Err("something is put into what is no dictionary".into()),
        }
    }

    fn global(&mut self, module: &'a str, name: &'a str) -> Result<(), String> {
        // As protocol 2, in which `torch.save` writes, calls it.
        let module = if module == "__builtin__" { "builtins" } else { module };
        if !known(module, name) {
            return Err(format!(
                "it names {module}.{name}, which is no part of a checkpoint; nothing was run, and this file \
                 may be an attack"
            ));
        }
        self.push(Value::Global(module, name));
        Ok(())
    }

    fn call(&mut self) -> Result<(), String> {
        let (args, of) = (self.pop()?, self.pop()?);
        let Value::Global(module, name) = self.values[of] else {
            return Err("a call of what is no function".into());
        };
        // Dictionaries of all kinds are dictionaries: made empty, or from pairs, or from another.
        let value = match (module, name, &self.values[args]) {
            ("collections", "OrderedDict", Value::Tuple(args)) => {
                let mut items = Vec::new();
                if let Some(Value::List(pairs)) = args.first().map(|&id| &self.values[id]) {
                    for &pair in pairs {
                        match &self.values[pair] {
                            Value::Tuple(p) | Value::List(p) if p.len() == 2 => items.push((p[0], p[1])),
                            _ => return Err("an ordered dictionary of what are no pairs".into()),
                        }
                    }
                }
                Value::Dict(items)
            }
            ("collections", "Counter" | "defaultdict", Value::Tuple(args))
            | ("builtins", "dict", Value::Tuple(args)) => match args.first() {
                // The very same: copies of a large one could be asked for without end.
                Some(&id) if matches!(self.values[id], Value::Dict(_)) => {
                    self.stack.push(Some(id));
                    return Ok(());
                }
                _ => Value::Dict(Vec::new()),
            },
            _ => Value::Object { of, args, state: None },
        };
        self.push(value);
        Ok(())
    }

    fn get(&mut self, key: u64) -> Result<(), String> {
        let id = *self.memo.get(&key).ok_or("it recalls what it never noted")?;
        self.stack.push(Some(id));
        Ok(())
    }

    fn put(&mut self, key: u64) -> Result<(), String> {
        let top = self.top()?;
        self.memo.insert(key, top);
        Ok(())
    }

    /// Two's complement, little-endian.
    fn long(&mut self, bytes: &'a [u8]) {
        let value = match bytes.len() {
            0 => Value::Int(0),
            n @ 1..=8 => {
                let sign = if bytes[n - 1] & 0x80 == 0 { 0 } else { 0xff };
                let mut all = [sign; 8];
                all[..n].copy_from_slice(bytes);
                Value::Int(i64::from_le_bytes(all))
            }
            _ => Value::Long(bytes),
        };
        self.push(value);
    }

    fn run(&mut self) -> Result<Id, String> {
        loop {
            match self.take(1)?[0] {
                0x80 => {
                    let version = self.number(1)?;
                    if !(2..=5).contains(&version) {
                        return Err(format!("pickle protocol {version}; 2 to 5 are read"));
                    }
                }
                0x95 => drop(self.take(8)?),
                b'.' => return self.pop(),
                b'(' => self.stack.push(None),
                b'0' => drop(self.stack.pop().ok_or("nothing to drop")?),
                b'1' => drop(self.pop_marked()?),
                b'2' => {
                    let top = self.top()?;
                    self.stack.push(Some(top));
                }
                b'N' => self.push(Value::None),
                0x88 => self.push(Value::Bool(true)),
                0x89 => self.push(Value::Bool(false)),
                b'J' => {
                    let n = self.number(4)? as u32 as i32;
                    self.push(Value::Int(n.into()));
                }
                b'K' => {
                    let n = self.number(1)? as i64;
                    self.push(Value::Int(n));
                }
                b'M' => {
                    let n = self.number(2)? as i64;
                    self.push(Value::Int(n));
                }
                0x8a => {
                    let bytes = self.counted(1)?;
                    self.long(bytes);
                }
                0x8b => {
                    let bytes = self.counted(4)?;
                    self.long(bytes);
                }
                b'G' => {
                    let bits = self.number(8)?.swap_bytes();
                    self.push(Value::Float(f64::from_bits(bits)));
                }
                op @ (b'X' | 0x8c | 0x8d) => {
                    let text = self.text(width(op))?;
                    self.push(Value::Str(text));
                }
                op @ (b'U' | b'T' | b'C' | b'B' | 0x8e) => {
                    let bytes = self.counted(width(op))?;
                    // Strings of Python 2 are mostly names.
                    let text = std::str::from_utf8(bytes).ok().filter(|_| matches!(op, b'U' | b'T'));
                    self.push(text.map_or(Value::Bytes(bytes), Value::Str));
                }
                b')' => self.push(Value::Tuple(Vec::new())),
                b't' => {
                    let items = self.pop_marked()?;
                    self.push(Value::Tuple(items));
                }
                n @ 0x85..=0x87 => self.tuple(usize::from(n - 0x84))?,
                b']' => self.push(Value::List(Vec::new())),
                0x8f => self.push(Value::Set(Vec::new())),
                b'a' => {
                    let item = self.pop()?;
                    self.extend(vec![item])?;
                }
                b'e' | 0x90 => {
                    let items = self.pop_marked()?;
                    self.extend(items)?;
                }
                0x91 => {
                    let items = self.pop_marked()?;
                    self.push(Value::Set(items));
                }
                b'}' => self.push(Value::Dict(Vec::new())),
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set_items(&[key, value])?;
                }
                b'u' => {
                    let items = self.pop_marked()?;
                    self.set_items(&items)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.global(module, name)?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    match (&self.values[module], &self.values[name]) {
                        (&Value::Str(module), &Value::Str(name)) => self.global(module, name)?,
                        _ => return Err("a class without a name".into()),
                    }
                }
                b'R' | 0x81 => self.call()?,
                b'b' => {
                    let (with, top) = (self.pop()?, self.top()?);
                    if let Value::Object { state, .. } = &mut self.values[top] {
                        *state = Some(with);
                    }
                }
                b'Q' => {
                    let id = self.pop()?;
                    self.push(Value::Persistent(id));
                }
                b'q' => {
                    let key = self.number(1)?;
                    self.put(key)?;
                }
                b'r' => {
                    let key = self.number(4)?;
                    self.put(key)?;
                }
                0x94 => self.put(self.memo.len() as u64)?,
                b'h' => {
                    let key = self.number(1)?;
                    self.get(key)?;
                }
                b'j' => {
                    let key = self.number(4)?;
                    self.get(key)?;
                }
                other => return Err(format!("opcode {other:#04x}, which checkpoints do not use")),
            }
        }
    }
}

/// Bytes of the length that stands before a text or bytes.
fn width(op: u8) -> usize {
    match op {
        b'U' | b'C' | 0x8c => 1,
        0x8d | 0x8e => 8,
        _ => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_data_reads_back() {
        // pickle.dumps({"a": [1, -2, 70000, 2**40], "b": (None, True, 1.5)}, 2)
        let bytes = b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01]q\x02(K\x01J\xfe\xff\xff\xffJp\x11\x01\x00\
            \x8a\x06\x00\x00\x00\x00\x00\x01eX\x01\x00\x00\x00bq\x03N\x88G?\xf8\x00\x00\x00\x00\x00\x00\
            \x87q\x04u.";
        let p = Pickle::read(bytes).unwrap();
        assert_eq!(p.len, bytes.len());
        let Value::List(items) = p.get(p.item(p.root, "a").unwrap()) else { panic!() };
        let ints: Vec<&Value> = items.iter().map(|&i| p.get(i)).collect();
        assert_eq!(ints, [1, -2, 70_000, 1 << 40].map(Value::Int).iter().collect::<Vec<_>>());
        let Value::Tuple(items) = p.get(p.item(p.root, "b").unwrap()) else { panic!() };
        assert_eq!(p.get(items[1]), &Value::Bool(true));
        assert_eq!(p.get(items[2]), &Value::Float(1.5));
    }

    /// In protocol 2, as `torch.save` writes them.
    #[test]
    fn counters_and_what_is_built_in_are_data() {
        fn value<'a>(p: &Pickle<'a>, dict: Id, key: &str) -> Option<Value<'a>> {
            p.item(dict, key).map(|v| p.get(v).clone())
        }
        // {"n": Counter({"a": 2}), "d": defaultdict(list, {"b": 3})}
        let bytes = b"\x80\x02}q\x00(X\x01\x00\x00\x00nq\x01ccollections\nCounter\nq\x02}q\x03X\x01\x00\x00\x00a\
            q\x04K\x02s\x85q\x05Rq\x06X\x01\x00\x00\x00dq\x07ccollections\ndefaultdict\nq\x08c__builtin__\nlist\n\
            q\x09\x85q\x0aRq\x0bX\x01\x00\x00\x00bq\x0cK\x03su.";
        let p = Pickle::read(bytes).unwrap();
        for (name, key, want) in [("n", "a", 2), ("d", "b", 3)] {
            assert_eq!(value(&p, p.item(p.root, name).unwrap(), key), Some(Value::Int(want)));
        }
        // {1} and dict(), into which something is put.
        let p = Pickle::read(b"\x80\x02c__builtin__\nset\nq\x00]q\x01K\x01a\x85q\x02Rq\x03.").unwrap();
        let Value::Object { of, .. } = p.get(p.root) else { panic!() };
        assert_eq!(p.get(*of), &Value::Global("builtins", "set"));
        let p = Pickle::read(b"\x80\x02c__builtin__\ndict\n)RX\x01\x00\x00\x00aK\x05s.").unwrap();
        assert_eq!(value(&p, p.root, "a"), Some(Value::Int(5)));
        // Of one dictionary a thousand counters: no copies.
        let mut bytes = b"\x80\x02]q\x00}q\x01X\x01\x00\x00\x00aK\x01s".to_vec();
        (0..1000).for_each(|_| bytes.extend(b"ccollections\nCounter\nh\x01\x85R0"));
        bytes.extend(b"0.");
        assert!(Pickle::read(&bytes).unwrap().size() < 2010);
    }

    #[test]
    fn code_is_refused_by_name_and_cycles_are_only_data() {
        let evil = b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R.";
        let e = Pickle::read(evil).err().unwrap();
        assert!(e.contains("os.system") && e.contains("nothing was run"), "{e}");
        let evil = b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.";
        assert!(Pickle::read(evil).err().unwrap().contains("builtins.eval"));
        let evil = b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.";
        assert!(Pickle::read(evil).err().unwrap().contains("builtins.eval"));
        // A list that holds itself.
        let p = Pickle::read(b"\x80\x02]q\x00h\x00a.").unwrap();
        assert_eq!(p.get(p.root), &Value::List(vec![p.root]));
    }

    #[test]
    fn lies_about_lengths_cost_nothing() {
        for bytes in [
            &b"\x80\x02X\xff\xff\xff\xffab."[..],
            b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xffab.",
            b"\x80\x02\x8b\xff\xff\xff\xff.",
            b"\x80\x02h\x07.",
            b"\x80\x02e.",
            b"\x80\x02)R.",
            b"\x80\x02.",
            b"\x80\x02K",
            b"",
            b"\x80\x09N.",
            b"(lp0\n.",
        ] {
            assert!(Pickle::read(bytes).is_err(), "{bytes:?}");
        }
    }
}
