//! A vision-language model as the `vqa` tool.

use crate::config::{self, ConfigError};
use crate::llm::{ChatError, ChatModel, ChatRequest, Message, Role, SamplingOptions};
use crate::nn::resample::{Filter, resize_u8};
use crate::sight::{BBox, Picture};
use std::sync::{Arc, OnceLock};

/// A chat model that sees, and how crops are shown to it.
pub struct Vlm {
    model: Arc<dyn ChatModel>,
    max_new_tokens: usize,
    margin: f64,
    max_pixels: usize,
    prompts: VqaPrompts,
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

/// The picture, smaller where it has more than `most` pixels (0: no limit).
fn within(picture: &Picture, most: usize) -> Picture {
    let (w, h) = (picture.width() as usize, picture.height() as usize);
    if most == 0 || w * h <= most {
        return picture.clone();
    }
    let scale = (most as f64 / (w * h) as f64).sqrt();
    let to = |n: usize| ((n as f64 * scale) as usize).max(1);
    let small = resize_u8(picture.rgb(), (h, w), 3, (to(h), to(w)), Filter::Bilinear);
    Picture::new(to(w) as u32, to(h) as u32, small)
}

/// What stands before a program's question about the whole picture, and about a crop.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct VqaPrompts {
    whole: String,
    crop: String,
}

/// The instructions that a configuration names.
///
/// # Errors
/// If they are a file's that cannot be read.
pub fn vqa_prompts(cfg: &config::Vlm) -> Result<VqaPrompts, ConfigError> {
    const GENERAL: &str = include_str!("../../../data/prompts/vqa-general.txt");
    const CROP: &str = include_str!("../../../data/prompts/vqa-general-crop.txt");
    match cfg.prompt.as_str() {
        "plain" => Ok(VqaPrompts { whole: String::new(), crop: String::new() }),
        "general" => Ok(VqaPrompts { whole: GENERAL.into(), crop: format!("{CROP}{GENERAL}") }),
        file => {
            let text = std::fs::read_to_string(file).map_err(|e| ConfigError::Invalid {
                origin: "vlm.prompt".into(),
                message: format!("{file}: {e}; give a file, or one of plain and general"),
            })?;
            Ok(VqaPrompts { whole: text.clone(), crop: text })
        }
    }
}

/// Stripped, lower case, without a final full stop or comma.
fn tidy(reply: &str) -> String {
    let text = reply.trim().to_lowercase();
    text.strip_suffix(['.', ',']).unwrap_or(&text).trim_end().to_owned()
}

impl Vlm {
    /// # Errors
    /// If the instructions that the configuration names cannot be read.
    pub fn new(model: Arc<dyn ChatModel>, cfg: &config::Vlm) -> Result<Self, ConfigError> {
        Ok(Self {
            model,
            max_new_tokens: cfg.max_new_tokens,
            margin: cfg.crop_margin,
            max_pixels: cfg.max_pixels,
            prompts: vqa_prompts(cfg)?,
            failed: OnceLock::new(),
        })
    }

    pub fn name(&self) -> &str {
        self.model.name()
    }

    /// Why the model will answer nothing more, if it has said so.
    pub fn failed(&self) -> Option<&ChatError> {
        self.failed.get()
    }

    /// The model's greedy answer to a program's question about a box of the picture.
    pub fn ask(&self, picture: &Picture, bbox: Option<BBox>, question: &str) -> Result<String, ChatError> {
        let before = if bbox.is_some() { &self.prompts.crop } else { &self.prompts.whole };
        self.prompted(picture, bbox, &format!("{before}{question}"))
    }

    /// The same, of a text that already says all.
    pub fn prompted(&self, picture: &Picture, bbox: Option<BBox>, prompt: &str) -> Result<String, ChatError> {
        let image = within(&crop(picture, bbox, self.margin), self.max_pixels).to_image();
        let request = ChatRequest {
            messages: vec![Message::new(Role::User, prompt).with_images(vec![image])],
            ..ChatRequest::user("", 0, self.max_new_tokens)
        };
        let replies = self.model.chat(&[request], &SamplingOptions::greedy(), None);
        let reply = replies.into_iter().next().expect("one for each request");
        if let Err(e) = &reply
            && e.is_of_model()
        {
            // Programs take it for one call that failed; whoever measures must not.
            let _ = self.failed.set(e.clone());
        }
        Ok(tidy(&reply?.text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_pictures_are_shown_smaller() {
        let p = Picture::new(400, 100, vec![7; 400 * 100 * 3]);
        let size = |most| {
            let p = within(&p, most);
            (p.width(), p.height())
        };
        assert_eq!((size(0), size(40_000)), ((400, 100), (400, 100)));
        assert_eq!(size(10_000), (200, 50));
        assert_eq!(size(1), (2, 1), "never none");
    }

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
