//! A vision-language model as the `vqa` tool.

use super::runtime;
use crate::config;
use crate::llm::{ChatError, ChatModel, ChatRequest, Message, Role, SamplingOptions};
use crate::tools::{BBox, Picture, ToolError};
use std::sync::{Arc, OnceLock};

/// A chat model that sees, and how crops are shown to it.
pub struct Vlm {
    model: Arc<dyn ChatModel>,
    max_new_tokens: usize,
    margin: f64,
    /// Why it will answer nothing more, once that is known.
    failed: OnceLock<ChatError>,
}

/// What a box shows: grown by `margin` of its width and height on each side, clipped to the
/// picture. The whole picture where there is no box, or nothing of the picture in it.
pub fn crop(picture: &Picture, bbox: Option<BBox>, margin: f64) -> Picture {
    let (w, h) = (picture.width() as f64, picture.height() as f64);
    let Some([x1, y1, x2, y2]) = bbox else { return picture.clone() };
    if x1.max(0.) >= x2.min(w) || y1.max(0.) >= y2.min(h) {
        return picture.clone();
    }
    let (dx, dy) = (margin * (x2 - x1), margin * (y2 - y1));
    picture.crop([x1 - dx, y1 - dy, x2 + dx, y2 + dy])
}

/// Stripped, lower case, without a final full stop or comma.
fn tidy(reply: &str) -> String {
    let text = reply.trim().to_lowercase();
    text.strip_suffix(['.', ',']).unwrap_or(&text).trim_end().to_owned()
}

impl Vlm {
    pub fn new(model: Arc<dyn ChatModel>, cfg: &config::Vlm) -> Self {
        Self { model, max_new_tokens: cfg.max_new_tokens, margin: cfg.crop_margin, failed: OnceLock::new() }
    }

    pub fn name(&self) -> &str {
        self.model.name()
    }

    /// Why the model will answer nothing more, if it has said so.
    pub fn failed(&self) -> Option<&ChatError> {
        self.failed.get()
    }

    /// The model's greedy answer about a box of the picture.
    pub fn ask(&self, picture: &Picture, bbox: Option<BBox>, prompt: &str) -> Result<String, ToolError> {
        let image = crop(picture, bbox, self.margin).to_image();
        let request = ChatRequest {
            messages: vec![Message::new(Role::User, prompt).with_images(vec![image])],
            ..ChatRequest::user("", 0, self.max_new_tokens)
        };
        let replies = self.model.chat(&[request], &SamplingOptions::greedy(), None);
        let reply = replies.into_iter().next().ok_or_else(|| runtime("the VLM gave no reply"))?;
        let reply = reply.map_err(|e| {
            if e.is_of_model() {
                // Programs take it for one call that failed; whoever measures must not.
                let _ = self.failed.set(e.clone());
            }
            runtime(e)
        })?;
        Ok(tidy(&reply.text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_tidied() {
        for (reply, want) in
            [(" Red.\n", "red"), ("a TV,", "a tv"), ("3.5", "3.5"), ("yes .", "yes"), ("", "")]
        {
            assert_eq!(tidy(reply), want);
        }
    }

    #[test]
    fn crops_grow_and_an_empty_one_is_the_whole_picture() {
        let p = Picture::new(40, 20, vec![7; 40 * 20 * 3]);
        let size = |b: Option<BBox>| {
            let c = crop(&p, b, 0.25);
            (c.width(), c.height())
        };
        assert_eq!(size(Some([10., 4., 18., 12.])), (12, 12));
        assert_eq!(size(Some([-4., -4., 4., 4.])), (6, 6), "grown, then clipped");
        for whole in [None, Some([5., 5., 5., 9.]), Some([9., 5., 5., 9.]), Some([50., 5., 60., 9.])] {
            assert_eq!(size(whole), (40, 20), "{whole:?}");
        }
    }
}
