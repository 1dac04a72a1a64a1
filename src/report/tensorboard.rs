//! A run's figures as TensorBoard reads them: one event file, written anew from the records.
//!
//! The format is TensorFlow's: records with masked CRC-32C sums around `Event` messages (tensorflow/core/lib/io/record_writer.h,
//! util/event.proto). Scalars only.

use serde_json::Value;

/// The event file of metrics lines, each with its `step`, `unix` time and numbers.
pub fn events(metrics: &[Value]) -> Vec<u8> {
    let mut out = Vec::new();
    let started = metrics.iter().find_map(|m| m["unix"].as_f64()).unwrap_or(0.);
    let mut head = Vec::new();
    double(&mut head, 1, started);
    bytes(&mut head, 3, b"brain.Event:2");
    record(&mut out, &head);
    for m in metrics {
        let (Some(step), Some(all)) = (m["step"].as_u64(), m.as_object()) else { continue };
        let mut summary = Vec::new();
        for (tag, value) in all.iter().filter(|(k, _)| !["step", "unix"].contains(&k.as_str())) {
            let parts: Vec<(String, f64)> = match value {
                Value::Object(inner) => {
                    inner.iter().filter_map(|(k, v)| Some((format!("{tag}/{k}"), v.as_f64()?))).collect()
                }
                v => v.as_f64().map(|v| (tag.clone(), v)).into_iter().collect(),
            };
            for (tag, v) in parts {
                let mut value = Vec::new();
                bytes(&mut value, 1, tag.as_bytes());
                key(&mut value, 2, 5);
                value.extend((v as f32).to_le_bytes());
                bytes(&mut summary, 1, &value);
            }
        }
        let mut event = Vec::new();
        double(&mut event, 1, m["unix"].as_f64().unwrap_or(started));
        key(&mut event, 2, 0);
        varint(&mut event, step);
        bytes(&mut event, 5, &summary);
        record(&mut out, &event);
    }
    out
}

fn record(out: &mut Vec<u8>, data: &[u8]) {
    let len = (data.len() as u64).to_le_bytes();
    out.extend(len);
    out.extend(masked(crc32c(&len)).to_le_bytes());
    out.extend(data);
    out.extend(masked(crc32c(data)).to_le_bytes());
}

/// A field's number and wire type.
fn key(out: &mut Vec<u8>, field: u8, wire: u8) {
    out.push(field << 3 | wire);
}

fn varint(out: &mut Vec<u8>, mut v: u64) {
    while v >= 0x80 {
        out.push(v as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
}

fn double(out: &mut Vec<u8>, field: u8, v: f64) {
    key(out, field, 1);
    out.extend(v.to_le_bytes());
}

fn bytes(out: &mut Vec<u8>, field: u8, v: &[u8]) {
    key(out, field, 2);
    varint(out, v.len() as u64);
    out.extend(v);
}

fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Castagnoli's CRC-32, bit by bit: event files are small.
fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |c, _| if c & 1 == 1 { c >> 1 ^ 0x82f6_3b78 } else { c >> 1 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn checksums_are_those_of_rfc_3720() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
    }

    #[test]
    fn records_are_whole_and_hold_their_figures() {
        let lines =
            [json!({"step": 300, "unix": 5.0, "reward": 0.5, "skipped": true, "seconds": {"update": 2}})];
        let all = events(&lines);
        let mut rest = &all[..];
        let mut records = Vec::new();
        while !rest.is_empty() {
            let n = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], masked(crc32c(&rest[..8])).to_le_bytes());
            assert_eq!(rest[12 + n..16 + n], masked(crc32c(&rest[12..12 + n])).to_le_bytes());
            records.push(&rest[12..12 + n]);
            rest = &rest[16 + n..];
        }
        assert_eq!(records.len(), 2);
        let holds = |what: &[u8]| records[1].windows(what.len()).any(|w| w == what);
        // Step 300 as a varint; the tags; 0.5 as a float.
        assert!(holds(&[0x10, 0xac, 0x02]) && holds(b"\x0a\x06reward\x15\0\0\0\x3f"));
        assert!(holds(b"seconds/update") && !holds(b"skipped"));
    }
}
