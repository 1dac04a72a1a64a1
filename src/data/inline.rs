//! Pictures that lie in a row itself: as bytes, or as base64 where the file holds texts alone.
//!
//! A row is a stranger's: what is longer than any picture is refused before it is decoded. Whether the bytes are a
//! picture is for whoever decodes that.

use base64::Engine as _;
use serde_json::Value;

use super::LARGEST_PICTURE;
use super::table::{Cell, Row};

/// A longer text is no path of a file.
const LONGEST_PATH: usize = 4096;

/// The picture in a column of a row.
pub(super) fn of_row(row: &Row, column: &str) -> Result<Vec<u8>, String> {
    match row.get(column) {
        Some(Cell::Picture(bytes)) if bytes.len() as u64 > LARGEST_PICTURE => Err(too_large()),
        Some(Cell::Picture(bytes)) if !bytes.is_empty() => Ok(bytes.clone()),
        Some(Cell::Scalar(Value::String(text))) => decoded(text),
        _ => Err("holds no picture".into()),
    }
    .map_err(|why| format!("{column} {why}"))
}

/// The picture in a value of a line: an object with `bytes`, a data URL, or base64 by itself. `None` of what names a
/// picture that lies elsewhere.
pub(super) fn of_value(value: &Value) -> Option<Result<Vec<u8>, String>> {
    if let Some(Value::String(text)) = value.get("bytes") {
        return Some(decoded(text));
    }
    let text = value.as_str()?;
    (text.starts_with("data:") || text.len() > LONGEST_PATH).then(|| decoded(text))
}

fn decoded(text: &str) -> Result<Vec<u8>, String> {
    let text = text.trim();
    // A data URL tells in front of the base64 what it is of.
    let text = match text.strip_prefix("data:") {
        Some(url) => url.split_once("base64,").ok_or("is a data URL without base64")?.1,
        None => text,
    };
    if text.len() as u64 / 4 * 3 > LARGEST_PICTURE {
        return Err(too_large());
    }
    let bytes = base64::engine::general_purpose::STANDARD.decode(text);
    match bytes {
        Ok(bytes) if bytes.is_empty() => Err("holds no picture".into()),
        Ok(bytes) => Ok(bytes),
        Err(e) => Err(format!("is neither a picture's bytes nor base64: {e}")),
    }
}

fn too_large() -> String {
    format!("is larger than {} MB", LARGEST_PICTURE >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn bytes_and_base64_are_pictures_and_paths_are_none() {
        let row = |cell: Cell| Row::from([("image".to_owned(), cell)]);
        let text = |t: &str| of_row(&row(Cell::Scalar(t.into())), "image");
        assert_eq!(of_row(&row(Cell::Picture(vec![1, 2])), "image").unwrap(), [1, 2]);
        assert_eq!(text("AQID\n").unwrap(), [1, 2, 3]);
        assert_eq!(text("data:image/png;base64,AQID").unwrap(), [1, 2, 3]);
        for (cell, why) in [
            (Cell::Null, "image holds no picture"),
            (Cell::Picture(Vec::new()), "image holds no picture"),
            (Cell::Scalar("".into()), "image holds no picture"),
            (Cell::Scalar("VG_100K/1.jpg".into()), "image is neither a picture's bytes nor base64"),
            (Cell::Scalar("data:image/png,x".into()), "image is a data URL without base64"),
            (Cell::Picture(vec![0; (LARGEST_PICTURE + 1) as usize]), "image is larger than 64 MB"),
            (
                Cell::Scalar("A".repeat(LARGEST_PICTURE as usize / 3 * 4 + 8).into()),
                "image is larger than 64 MB",
            ),
        ] {
            let e = of_row(&row(cell), "image").unwrap_err();
            assert!(e.starts_with(why), "{e}");
        }

        let long = "AAAA".repeat(2000);
        for (value, length) in [
            (json!({ "bytes": "AQID", "path": "a.jpg" }), Some(3)),
            (json!("data:image/png;base64,AQID"), Some(3)),
            (json!(long), Some(6000)),
            (json!({ "bytes": null, "path": "a.jpg" }), None),
            (json!("VG_100K/1.jpg"), None),
            (json!("AQID"), None),
            (json!(7), None),
        ] {
            assert_eq!(of_value(&value).map(|bytes| bytes.unwrap().len()), length, "{value}");
        }
        assert!(of_value(&json!({ "bytes": "no base64" })).unwrap().is_err());
    }
}
