//! Objects of a file of JSON lines, one at a time.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde_json::{Map, Value};

use super::{DataError, LARGEST_PICTURE};

/// Longest line that is read: it may hold its picture as base64.
const LONGEST: u64 = LARGEST_PICTURE / 3 * 4 + (1 << 20);

pub struct Lines {
    file: String,
    reader: BufReader<File>,
    count: usize,
}

impl Lines {
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let file = path.display().to_string();
        let fail = |e: std::io::Error| DataError::File { file: file.clone(), message: e.to_string() };
        let mut count = 0;
        let mut reader = BufReader::new(File::open(path).map_err(fail)?);
        // Counted first: a bar that knows its end is worth a pass over a text file.
        loop {
            let mut line = Vec::new();
            let n = reader.by_ref().take(LONGEST).read_until(b'\n', &mut line).map_err(fail)?;
            if n == 0 {
                break;
            }
            count += usize::from(!line.trim_ascii().is_empty());
        }
        let reader = BufReader::new(File::open(path).map_err(fail)?);
        Ok(Self { file, reader, count })
    }

    /// Lines that are not empty.
    pub fn rows(&self) -> usize {
        self.count
    }
}

impl Iterator for Lines {
    /// The inner error is of one line.
    type Item = Result<Result<Map<String, Value>, String>, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let mut line = Vec::new();
            match self.reader.by_ref().take(LONGEST).read_until(b'\n', &mut line) {
                Err(e) => {
                    let (file, message) = (self.file.clone(), e.to_string());
                    return Some(Err(DataError::File { file, message }));
                }
                Ok(0) => return None,
                Ok(_) if line.trim_ascii().is_empty() => {}
                Ok(_) => {
                    let object = serde_json::from_slice(&line).map_err(|e| format!("is no JSON object: {e}"));
                    return Some(Ok(object));
                }
            }
        }
    }
}
