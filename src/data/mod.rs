//! Pictures with boxes ([`odvg`]) and with questions ([`queries`]) from a user's files; and questions about
//! pictures, read from the files that benches are published as (method.md 8).
//!
//! [`Bench`] knows what each bench is called, where it is published and how its files look; [`source`]
//! finds them in a folder or in the hub's cache; [`items`] reads them row by row into [`Item`]s. Files
//! are a stranger's: columns and types are checked before the first row, a row that cannot be used is
//! one refused question, a file that cannot be read further ends its bench and no other.
//!
//! [`training`] draws pictures with questions from the training splits.
//!
//! Memory holds one row group's pages and the rows in flight, never a whole file. What is not read: parquet files of
//! other compressions than Snappy, Zstandard and gzip.

mod inline;
pub mod items;
mod lines;
mod link;
pub mod odvg;
pub mod queries;
pub mod source;
mod table;
pub mod training;
pub mod transform;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use items::{BadRow, Items};
pub use link::{LinkCause, LinkError, Links};
pub use source::Source;

/// Bytes of the largest picture that is taken from a link or a row.
const LARGEST_PICTURE: u64 = 64 << 20;

/// Rows of Omni3D-Bench that the released code tests on.
pub const OMNI3D_PUBLISHED: usize = 100;
/// Its last rows are what mining takes (method.md 8): whoever trained on them cannot be tested on them.
pub const OMNI3D_MINED: usize = 400;

/// The eight published benches.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Bench {
    #[value(name = "omni3d-bench")]
    #[serde(rename = "omni3d-bench")]
    Omni3d,
    Robospatial,
    Blink,
    Vsr,
    Realworldqa,
    Gqa,
    Tallyqa,
    Countbench,
}

/// How a bench's files look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Files {
    /// Parquet with the pictures inside. Each part has a name, and words of which each stands in the
    /// paths of its files.
    Parquet(&'static [(&'static str, &'static [&'static str])]),
    /// A file of JSON lines, with links to its pictures or their paths.
    Lines(&'static str),
}

impl Bench {
    /// In the order of the paper's table.
    pub const ALL: [Self; 8] = [
        Self::Omni3d,
        Self::Robospatial,
        Self::Blink,
        Self::Vsr,
        Self::Realworldqa,
        Self::Gqa,
        Self::Tallyqa,
        Self::Countbench,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Omni3d => "omni3d-bench",
            Self::Robospatial => "robospatial",
            Self::Blink => "blink",
            Self::Vsr => "vsr",
            Self::Realworldqa => "realworldqa",
            Self::Gqa => "gqa",
            Self::Tallyqa => "tallyqa",
            Self::Countbench => "countbench",
        }
    }

    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|b| b.name() == name)
    }

    /// Do its answers need a judge? (Those of [`Kind::Synonym`].)
    pub fn is_judged(self) -> bool {
        self == Self::Gqa
    }

    /// `owner/name` of the data set on the hub; GRIT's two are not there with their pictures.
    pub fn repo(self) -> Option<&'static str> {
        match self {
            Self::Omni3d => Some("dmarsili/Omni3D-Bench"),
            Self::Robospatial => Some("chanhee-luke/RoboSpatial-Home"),
            Self::Blink => Some("BLINK-Benchmark/BLINK"),
            Self::Vsr => Some("cambridgeltl/vsr_zeroshot"),
            Self::Realworldqa => Some("nirajandhakal/realworldqa"),
            Self::Gqa | Self::Tallyqa => None,
            Self::Countbench => Some("vikhyatk/CountBenchQA"),
        }
    }

    pub fn files(self) -> Files {
        match self {
            Self::Omni3d => Files::Parquet(&[("train", &["train"])]),
            Self::Robospatial => Files::Parquet(&[
                ("compatibility", &["compatibility"]),
                ("configuration", &["configuration"]),
            ]),
            Self::Blink => Files::Parquet(&[
                ("Spatial_Relation", &["Spatial_Relation", "val-"]),
                ("Counting", &["Counting", "val-"]),
            ]),
            Self::Vsr => Files::Lines("dev.jsonl"),
            Self::Realworldqa => Files::Parquet(&[("test", &["test"])]),
            Self::Gqa => Files::Lines("gqa_val.jsonl"),
            Self::Tallyqa => Files::Lines("tallyqa_val.jsonl"),
            Self::Countbench => Files::Parquet(&[("test", &["test"])]),
        }
    }
}

impl std::fmt::Display for Bench {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What kind of answer a question wants, and so how it is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    Int,
    Float,
    /// A word or phrase.
    Word,
    YesNo,
    /// One of the question's options.
    Choice,
    /// A word or phrase for which another one of the same meaning does.
    Synonym,
}

/// Where a question's picture is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PictureRef {
    /// An encoded picture from inside the bench's file.
    Bytes(Vec<u8>),
    File(PathBuf),
    Link(String),
}

/// One question of a bench, as it is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// The part of the bench that is reported by itself, such as a split or a type of answer.
    pub part: String,
    /// Number of the row in the bench, its parts one after another.
    pub index: usize,
    pub question: String,
    pub kind: Kind,
    pub truth: Value,
    /// Empty unless the question offers some.
    pub options: Vec<String>,
    pub picture: PictureRef,
    /// The same for questions about one picture.
    pub picture_id: String,
}

/// A bench, or what is left of it, cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DataError {
    #[error("{file}: {message}")]
    File { file: String, message: String },
    #[error("{bench}: {message}")]
    Source { bench: Bench, message: String },
    #[error("{set}: {message}")]
    Training { set: &'static str, message: String },
}
