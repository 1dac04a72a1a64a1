//! Rows of a parquet file, some columns of it, as the hub's data sets are stored: pictures are structs of `bytes` and
//! `path`, in some sets bytes or base64 texts by themselves; lists have three levels.
//!
//! Read through parquet's record interface, a few rows at a time. The files are a stranger's: what is
//! damaged is an error with the file's name, also where the reader itself gives up by a panic.

use std::collections::BTreeMap;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use parquet::basic::{LogicalType, Type as Physical};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, ListAccessor};
use parquet::schema::types::Type;
use serde_json::Value;

use super::DataError;

/// Values of a column that are decoded together; pictures are large.
const TOGETHER: usize = 8;

/// What a column must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    Text,
    Integer,
    /// A number or a text, as answers are.
    Scalar,
    Texts,
    Picture,
}

impl Column {
    fn words(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Integer => "integers",
            Self::Scalar => "texts or numbers",
            Self::Texts => "lists of texts",
            Self::Picture => "pictures (a struct of bytes and path, bytes, or base64 texts)",
        }
    }

    fn fits(self, of: &Type) -> bool {
        let physical = of.is_primitive().then(|| of.get_physical_type());
        let text = || {
            let info = of.get_basic_info();
            physical == Some(Physical::BYTE_ARRAY)
                && (matches!(info.logical_type_ref(), Some(LogicalType::String))
                    || info.converted_type() == parquet::basic::ConvertedType::UTF8)
        };
        let integer = || matches!(physical, Some(Physical::INT32 | Physical::INT64));
        match self {
            Self::Text => text(),
            Self::Integer => integer(),
            Self::Scalar => {
                text() || integer() || matches!(physical, Some(Physical::FLOAT | Physical::DOUBLE))
            }
            Self::Texts => physical.is_none() && leaf(of).is_some_and(|leaf| Self::Text.fits(leaf)),
            Self::Picture => {
                let inside = |f: &Arc<Type>| {
                    f.name() == "bytes" && f.is_primitive() && f.get_physical_type() == Physical::BYTE_ARRAY
                };
                match physical {
                    Some(alone) => alone == Physical::BYTE_ARRAY,
                    None => of.get_fields().iter().any(inside),
                }
            }
        }
    }
}

/// The one primitive type below nested groups.
fn leaf(of: &Type) -> Option<&Type> {
    if of.is_primitive() {
        return Some(of);
    }
    match of.get_fields() {
        [one] => leaf(one),
        _ => None,
    }
}

/// A value of a row.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    Null,
    Scalar(Value),
    Texts(Vec<String>),
    Picture(Vec<u8>),
}

pub type Row = BTreeMap<String, Cell>;

/// A file whose columns have been checked.
pub struct Table {
    file: String,
    rows: RowIter<'static>,
    /// Rows that the file says it has, and that have been read.
    count: usize,
    read: usize,
}

impl Table {
    /// # Errors
    /// What is wrong with the file, or the first column that is missing or of another type.
    pub fn open(path: &Path, columns: &[(&str, Column)]) -> Result<Self, DataError> {
        let name = path.display().to_string();
        let fail = |message: String| DataError::File { file: name.clone(), message };
        let file = File::open(path).map_err(|e| fail(e.to_string()))?;
        let damaged = |why: String| fail(format!("is no whole parquet file ({why}); fetch it again"));
        let reader = guarded(|| SerializedFileReader::new(file))
            .and_then(|r| r.map_err(|e| e.to_string()))
            .map_err(&damaged)?;
        let schema = reader.metadata().file_metadata().schema_descr().root_schema_ptr();
        let mut wanted = Vec::new();
        for field in schema.get_fields() {
            if columns.iter().any(|c| c.0 == field.name()) {
                wanted.push(field.clone());
            }
        }
        for (column, kind) in columns {
            let Some(field) = wanted.iter().find(|f| f.name() == *column) else {
                let names: Vec<&str> = schema.get_fields().iter().map(|f| f.name()).collect();
                return Err(fail(format!(
                    "has no column {column:?}, only {}; fetch the revision of the data set that has it",
                    names.join(", ")
                )));
            };
            if !kind.fits(field) {
                return Err(fail(format!(
                    "column {column:?} must hold {}; fetch the revision of the data set in which it does",
                    kind.words()
                )));
            }
        }
        let count = usize::try_from(reader.metadata().file_metadata().num_rows()).unwrap_or(0);
        let projection = Type::group_type_builder(schema.name()).with_fields(wanted).build();
        let rows = projection
            .and_then(|p| RowIter::from_file_into(Box::new(reader)).project(Some(p)))
            .map_err(|e| damaged(e.to_string()))?
            .with_batch_size(TOGETHER);
        Ok(Self { file: name, rows, count, read: 0 })
    }

    /// As the file says.
    pub fn rows(&self) -> usize {
        self.count
    }

    fn fail(&self, why: &str) -> DataError {
        let message =
            format!("is damaged behind row {} of {} ({why}); fetch it again", self.read, self.count);
        DataError::File { file: self.file.clone(), message }
    }
}

impl Iterator for Table {
    type Item = Result<Row, DataError>;

    /// After an error nothing more is to be had.
    fn next(&mut self) -> Option<Self::Item> {
        if self.read >= self.count {
            return None;
        }
        let row = match guarded(|| self.rows.next()) {
            Ok(Some(Ok(row))) => row,
            Ok(Some(Err(e))) => return Some(Err(self.fail(&e.to_string()))),
            Ok(None) => return Some(Err(self.fail("it ends there"))),
            Err(e) => return Some(Err(self.fail(&e))),
        };
        self.read += 1;
        Some(Ok(row.into_columns().into_iter().map(|(name, field)| (name, cell(field))).collect()))
    }
}

/// The reader's panics as errors: on damaged files some of its checks are assertions.
fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
            .unwrap_or_else(|| "the reader gave up".into())
    })
}

fn cell(field: Field) -> Cell {
    match field {
        Field::Bool(v) => Cell::Scalar(v.into()),
        Field::Byte(v) => Cell::Scalar(v.into()),
        Field::Short(v) => Cell::Scalar(v.into()),
        Field::Int(v) => Cell::Scalar(v.into()),
        Field::Long(v) => Cell::Scalar(v.into()),
        Field::UByte(v) => Cell::Scalar(v.into()),
        Field::UShort(v) => Cell::Scalar(v.into()),
        Field::UInt(v) => Cell::Scalar(v.into()),
        Field::ULong(v) => Cell::Scalar(v.into()),
        Field::Float(v) => Cell::Scalar(f64::from(v).into()),
        Field::Double(v) => Cell::Scalar(v.into()),
        Field::Str(v) => Cell::Scalar(v.into()),
        Field::Bytes(v) => Cell::Picture(v.data().to_vec()),
        Field::Group(row) => {
            let bytes = row.into_columns().into_iter().find(|(name, _)| name == "bytes");
            match bytes {
                // Copied, so that the page that it lies in can go.
                Some((_, bytes @ (Field::Bytes(_) | Field::Str(_)))) => cell(bytes),
                _ => Cell::Null,
            }
        }
        Field::ListInternal(list) => {
            let text = |i| list.get_string(i).cloned().unwrap_or_default();
            Cell::Texts((0..list.len()).map(text).collect())
        }
        _ => Cell::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};

    const COLUMNS: &[(&str, Column)] =
        &[("image_1", Column::Picture), ("question", Column::Text), ("choices", Column::Texts)];

    fn blink() -> Vec<u8> {
        let file = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/fixtures/benches/blink/Spatial_Relation/val-00000-of-00001.parquet"
        );
        std::fs::read(file).unwrap()
    }

    fn read(bytes: &[u8]) -> Result<Vec<Row>, DataError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        Table::open(file.path(), COLUMNS)?.collect()
    }

    #[test]
    fn another_writers_pictures_texts_and_lists_are_read() {
        let rows = read(&blink()).unwrap();
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[1]["question"], Cell::Scalar("Is the lamp left of the bed?".into()));
        assert_eq!(rows[1]["choices"], Cell::Texts(vec!["Yes".into(), "No".into()]));
        let Cell::Picture(jpeg) = &rows[0]["image_1"] else { panic!("no picture") };
        assert_eq!(jpeg[..3], [0xff, 0xd8, 0xff]);
        let wrong = Table::open(
            Path::new(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/tests/fixtures/benches/countbench/data/test-00000-of-00001.parquet"
            )),
            &[("image", Column::Text)],
        );
        let why = wrong.err().unwrap().to_string();
        assert!(why.contains("column \"image\" must hold text"), "{why}");
    }

    /// Whatever is spoilt, there are rows or an error, and the process lives.
    #[test]
    fn spoilt_files_are_errors_at_worst() {
        let whole = blink();
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let mut errors = 0;
        for _ in 0..600 {
            let mut bytes = whole.clone();
            match rng.random_range(0..3) {
                0 => bytes.truncate(rng.random_range(0..whole.len())),
                // The file's end says what is where.
                1 => {
                    let at = rng.random_range(whole.len() - 900..whole.len());
                    bytes[at] = rng.random();
                }
                _ => {
                    for _ in 0..4 {
                        let at = rng.random_range(0..whole.len());
                        bytes[at] = rng.random();
                    }
                }
            }
            errors += usize::from(read(&bytes).is_err());
        }
        assert!(errors > 200, "{errors}");
    }
}
