//! Objects of a file of JSON lines, one at a time.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek};
use std::path::Path;

use serde_json::{Map, Value};

use super::{DataError, LARGEST_PICTURE};

/// Longest line that is read of a file without pictures: as values it takes many times its length.
pub const TEXT: u64 = 1 << 20;
/// And of one whose lines may hold their pictures, as base64.
pub const WITH_PICTURE: u64 = LARGEST_PICTURE / 3 * 4 + TEXT;

pub struct Lines {
    file: String,
    reader: BufReader<File>,
    longest: u64,
}

impl Lines {
    /// A line longer than `longest` is read as several.
    pub fn open(path: &Path, longest: u64) -> Result<Self, DataError> {
        let file = path.display().to_string();
        match File::open(path) {
            Ok(opened) => Ok(Self { file, reader: BufReader::new(opened), longest }),
            Err(e) => Err(DataError::File { file, message: e.to_string() }),
        }
    }

    /// Counts the lines that are not empty, and goes back to the first: a bar that knows its end is worth a pass over a
    /// text file.
    pub fn rows(&mut self) -> Result<usize, DataError> {
        self.rewind()?;
        let mut count = 0;
        while self.line()?.is_some() {
            count += 1;
        }
        self.rewind()?;
        Ok(count)
    }

    pub fn rewind(&mut self) -> Result<(), DataError> {
        self.reader.rewind().map_err(|e| self.fail(&e))
    }

    /// The next line that is not empty.
    fn line(&mut self) -> Result<Option<Vec<u8>>, DataError> {
        loop {
            let mut line = Vec::new();
            let read = self.reader.by_ref().take(self.longest).read_until(b'\n', &mut line);
            if read.map_err(|e| self.fail(&e))? == 0 {
                return Ok(None);
            }
            if !line.trim_ascii().is_empty() {
                return Ok(Some(line));
            }
        }
    }

    fn fail(&self, e: &std::io::Error) -> DataError {
        DataError::File { file: self.file.clone(), message: e.to_string() }
    }
}

impl Iterator for Lines {
    /// The inner error is of one line.
    type Item = Result<Result<Map<String, Value>, String>, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        let line = self.line().transpose()?;
        Some(line.map(|l| {
            // As some editors put before the first.
            let l = l.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&l);
            serde_json::from_slice(l).map_err(|e| format!("is no JSON object: {e}"))
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_longer_than_the_limit_are_no_objects() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        std::fs::write(&path, format!("{{\"a\": \"{}\"}}\n\n{{\"a\": 1}}\n", "x".repeat(40))).unwrap();
        for (longest, rows, objects) in [(20, 4, 1), (100, 2, 2)] {
            let mut lines = Lines::open(&path, longest).unwrap();
            assert_eq!(lines.rows(), Ok(rows));
            assert_eq!(lines.filter(|l| l.as_ref().unwrap().is_ok()).count(), objects);
        }
        std::fs::write(&path, "\u{feff}{\"a\": 1}\n").unwrap();
        assert!(Lines::open(&path, 100).unwrap().all(|l| l.unwrap().is_ok()));
    }
}
