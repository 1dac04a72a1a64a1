//! What there is to a picture, and what a program can ask of it: pixels, boxes, depth, and the tools' one trait with
//! one signature for every implementation: stub, mock, oracle and real (method.md 7, 10.12).

pub mod bbox;
mod depth;
pub mod picture;

pub use depth::{Depth, DepthError};
pub use picture::Picture;

use serde::{Deserialize, Serialize};

/// `[x1, y1, x2, y2]` in pixels of the picture as the user sees it (EXIF orientation applied).
pub type BBox = [f64; 4];

/// One detected thing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Detection {
    pub bbox: BBox,
    pub label: String,
    /// The detector's confidence, where there is one; programs never see it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
}

/// A tool could not do its work. `kind` becomes the Python exception's type in the program.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{kind}: {message}")]
pub struct ToolError {
    pub kind: ToolErrorKind,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolErrorKind {
    FileNotFound,
    Value,
    Runtime,
}

impl std::fmt::Display for ToolErrorKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::FileNotFound => "FileNotFoundError",
            Self::Value => "ValueError",
            Self::Runtime => "RuntimeError",
        })
    }
}

/// What a program can ask of the world. Arguments arrive type-checked by the executor: the
/// picture is the one the program was given, boxes are four finite numbers.
pub trait Tools {
    /// Things named by a comma-separated list of nouns.
    fn gd_detect(&mut self, prompt: &str) -> Result<Vec<Detection>, ToolError>;
    /// Metres from the camera to what is in the box.
    fn depth(&mut self, bbox: BBox) -> Result<f64, ToolError>;
    /// One word or phrase, lower case; the whole picture where there is no box.
    fn vqa(&mut self, bbox: Option<BBox>, prompt: &str) -> Result<String, ToolError>;
    /// Of the extended set: where what is in the box is, in metres from the camera, x to the right, y
    /// downwards, z forward.
    fn point3d(&mut self, bbox: BBox) -> Result<[f64; 3], ToolError>;
    /// Of the extended set: how wide, high and deep what is seen in the box is, in metres along the
    /// camera's axes.
    fn size3d(&mut self, bbox: BBox) -> Result<[f64; 3], ToolError>;
    /// Why a call since this was last asked failed for a server's fault, a model's that answers nothing more, or a
    /// network's: to the program it is a failed call as any other, but what the program makes of it says nothing about
    /// the method.
    fn outage(&mut self) -> Option<String> {
        None
    }
}

impl<T: Tools + ?Sized> Tools for Box<T> {
    fn gd_detect(&mut self, prompt: &str) -> Result<Vec<Detection>, ToolError> {
        (**self).gd_detect(prompt)
    }

    fn depth(&mut self, bbox: BBox) -> Result<f64, ToolError> {
        (**self).depth(bbox)
    }

    fn vqa(&mut self, bbox: Option<BBox>, prompt: &str) -> Result<String, ToolError> {
        (**self).vqa(bbox, prompt)
    }

    fn point3d(&mut self, bbox: BBox) -> Result<[f64; 3], ToolError> {
        (**self).point3d(bbox)
    }

    fn size3d(&mut self, bbox: BBox) -> Result<[f64; 3], ToolError> {
        (**self).size3d(bbox)
    }

    fn outage(&mut self) -> Option<String> {
        (**self).outage()
    }
}
