//! What crosses the pipe between the main process and a worker: plain values in length-prefixed
//! frames. The main process reads frames written by a process that ran untrusted code, so
//! decoding is bounded in bytes, depth and nodes, and strict: anything odd is an error. Floats
//! travel as bits, so a tool's number is the number that the program sees.

use std::io::{self, Read, Write};

/// A value that a program can hand to a tool, get from one, or answer with.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Plain {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(String),
    List(Vec<Plain>),
    Dict(Vec<(String, Plain)>),
}

impl Plain {
    pub fn str(text: impl Into<String>) -> Self {
        Self::Str(text.into())
    }

    /// Python's name for the type, for messages.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Str(_) => "str",
            Self::List(_) => "list",
            Self::Dict(_) => "dict",
        }
    }

    pub fn as_str(&self) -> Option<&str> {
        if let Self::Str(text) = self { Some(text) } else { None }
    }

    /// An int or a float; Python counts bools as ints, a box side never is one.
    pub fn as_number(&self) -> Option<f64> {
        match *self {
            Self::Int(i) => Some(i as f64),
            Self::Float(f) => Some(f),
            _ => None,
        }
    }

    /// As JSON; `None` where JSON has no such value (a float that is not finite).
    pub fn to_json(&self) -> Option<serde_json::Value> {
        use serde_json::Value;
        Some(match self {
            Self::None => Value::Null,
            Self::Bool(b) => Value::Bool(*b),
            Self::Int(i) => Value::from(*i),
            Self::Float(f) => Value::Number(serde_json::Number::from_f64(*f)?),
            Self::Str(s) => Value::String(s.clone()),
            Self::List(items) => Value::Array(items.iter().map(Self::to_json).collect::<Option<_>>()?),
            Self::Dict(items) => Value::Object(
                items.iter().map(|(k, v)| Some((k.clone(), v.to_json()?))).collect::<Option<_>>()?,
            ),
        })
    }

    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::None => out.push(b'n'),
            Self::Bool(false) => out.push(b'0'),
            Self::Bool(true) => out.push(b'1'),
            Self::Int(i) => {
                out.push(b'i');
                out.extend_from_slice(&i.to_le_bytes());
            }
            Self::Float(f) => {
                out.push(b'f');
                out.extend_from_slice(&f.to_bits().to_le_bytes());
            }
            Self::Str(s) => {
                out.push(b's');
                put_text(s, out);
            }
            Self::List(items) => {
                out.push(b'l');
                put_len(items.len(), out);
                items.iter().for_each(|item| item.encode(out));
            }
            Self::Dict(items) => {
                out.push(b'd');
                put_len(items.len(), out);
                for (key, value) in items {
                    put_text(key, out);
                    value.encode(out);
                }
            }
        }
    }

    /// The one value that `bytes` hold, at most `depth` containers deep.
    pub fn decode(bytes: &[u8], depth: u32) -> Option<Self> {
        let mut rest = bytes;
        let value = take_value(&mut rest, depth)?;
        rest.is_empty().then_some(value)
    }
}

// A frame is at most 2³²−1 bytes, so no length in it is longer; writers check before sending.
fn put_len(len: usize, out: &mut Vec<u8>) {
    out.extend_from_slice(&(len as u32).to_le_bytes());
}

fn put_text(text: &str, out: &mut Vec<u8>) {
    put_len(text.len(), out);
    out.extend_from_slice(text.as_bytes());
}

fn take<'a>(rest: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (head, tail) = rest.split_at_checked(n)?;
    *rest = tail;
    Some(head)
}

fn take_len(rest: &mut &[u8]) -> Option<usize> {
    let len = u32::from_le_bytes(take(rest, 4)?.try_into().ok()?) as usize;
    // Every element takes at least a byte: no length can promise more than there is.
    (len <= rest.len()).then_some(len)
}

fn take_text(rest: &mut &[u8]) -> Option<String> {
    let len = take_len(rest)?;
    String::from_utf8(take(rest, len)?.to_vec()).ok()
}

fn take_value(rest: &mut &[u8], depth: u32) -> Option<Plain> {
    Some(match take(rest, 1)?[0] {
        b'n' => Plain::None,
        b'0' => Plain::Bool(false),
        b'1' => Plain::Bool(true),
        b'i' => Plain::Int(i64::from_le_bytes(take(rest, 8)?.try_into().ok()?)),
        b'f' => Plain::Float(f64::from_bits(u64::from_le_bytes(take(rest, 8)?.try_into().ok()?))),
        b's' => Plain::Str(take_text(rest)?),
        b'l' => {
            let depth = depth.checked_sub(1)?;
            let len = take_len(rest)?;
            // No capacity from the wire: an element costs 32 bytes here and one there.
            let mut items = Vec::new();
            for _ in 0..len {
                items.push(take_value(rest, depth)?);
            }
            Plain::List(items)
        }
        b'd' => {
            let depth = depth.checked_sub(1)?;
            let len = take_len(rest)?;
            let mut items = Vec::new();
            for _ in 0..len {
                let key = take_text(rest)?;
                items.push((key, take_value(rest, depth)?));
            }
            Plain::Dict(items)
        }
        _ => return None,
    })
}

/// Writes one frame. A frame over `max` bytes is refused before anything is sent.
pub(super) fn send(to: &mut impl Write, message: &Plain, max: usize) -> io::Result<()> {
    let mut frame = vec![0; 4];
    message.encode(&mut frame);
    let len = frame.len() - 4;
    if len > max {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "message over the limit"));
    }
    frame[..4].copy_from_slice(&(len as u32).to_le_bytes());
    to.write_all(&frame)
}

/// Reads one frame of at most `max` bytes and `depth` containers.
///
/// `InvalidData` says that the other side broke the protocol; other kinds are the pipe's.
pub(super) fn receive(from: &mut impl Read, max: usize, depth: u32) -> io::Result<Plain> {
    let odd = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut len = [0; 4];
    from.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len) as usize;
    if len > max {
        return Err(odd("a message over the limit"));
    }
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes)?;
    Plain::decode(&bytes, depth).ok_or_else(|| odd("a malformed message"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Plain {
        Plain::Dict(vec![
            ("π".into(), Plain::Float(0.1 + 0.2)),
            ("l".into(), Plain::List(vec![Plain::None, Plain::Bool(true), Plain::Int(-7), Plain::str("ä")])),
        ])
    }

    #[test]
    fn values_survive_the_wire() {
        let mut bytes = Vec::new();
        send(&mut bytes, &sample(), 1 << 10).unwrap();
        assert_eq!(receive(&mut bytes.as_slice(), 1 << 10, 3).unwrap(), sample());
    }

    #[test]
    fn hostile_frames_are_refused() {
        let mut bytes = Vec::new();
        sample().encode(&mut bytes);
        assert!(Plain::decode(&bytes, 1).is_none(), "too deep");
        for cut in 0..bytes.len() {
            assert!(Plain::decode(&bytes[..cut], 8).is_none(), "cut at {cut}");
        }
        let mut longer = bytes.clone();
        longer.push(b'n');
        assert!(Plain::decode(&longer, 8).is_none(), "trailing bytes");
        assert!(Plain::decode(b"l\xff\xff\xff\xffn", 8).is_none(), "a length that cannot be");
        assert!(receive(&mut [255u8; 8].as_slice(), 1 << 20, 8).is_err(), "a frame over the limit");
        assert!(send(&mut Vec::new(), &Plain::str("x".repeat(100)), 50).is_err());
    }
}
