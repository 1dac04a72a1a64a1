//! Tools that look at nothing: what the syntax head of the reward runs programs on (method.md 3).

use crate::sight::{BBox, Detection, ToolError, Tools};

/// Fixed answers: 0.5 m, one box per noun, one numeral. (Right programs convert what they asked for to a
/// number where the question wants one; of a word they would fail, and their reward would teach them not
/// to ask.)
#[derive(Clone, Copy, Debug, Default)]
pub struct StubTools;

impl Tools for StubTools {
    fn gd_detect(&mut self, prompt: &str) -> Result<Vec<Detection>, ToolError> {
        let nouns = prompt.split(',').map(str::trim).filter(|noun| !noun.is_empty());
        Ok(nouns
            .map(|noun| Detection { bbox: [0., 0., 10., 10.], label: noun.to_owned(), score: None })
            .collect())
    }

    fn depth(&mut self, _bbox: BBox) -> Result<f64, ToolError> {
        Ok(0.5)
    }

    fn vqa(&mut self, _bbox: Option<BBox>, _prompt: &str) -> Result<String, ToolError> {
        Ok("1".to_owned())
    }

    fn point3d(&mut self, _bbox: BBox) -> Result<[f64; 3], ToolError> {
        Ok([0.1, 0.2, 0.5])
    }

    fn size3d(&mut self, _bbox: BBox) -> Result<[f64; 3], ToolError> {
        Ok([0.3, 0.4, 0.2])
    }
}
