//! How a conversation becomes token ids: one format for inference and training.

use candle_core::Device;

use super::template::ChatTemplate;
use super::tokenizer::Tokenizer;
use super::{ChatError, Message};
use crate::models::qwen3_vl::{Grid, Pictures, Processor};
use crate::weights::message_of;

/// Tokenizer, template and, for models that take pictures, the processor.
pub struct ChatFormat {
    pub tokenizer: Tokenizer,
    pub template: ChatTemplate,
    /// The processor and the id of the picture token.
    pub pictures: Option<(Processor, u32)>,
    /// Passed to the template; the planner is used with thinking off.
    pub thinking: bool,
    /// Ends an assistant's turn.
    pub end: u32,
}

/// Ids with the pictures that their picture tokens stand for.
#[derive(Clone, Debug)]
pub struct Prompt {
    pub ids: Vec<u32>,
    pub pictures: Option<Pictures>,
}

impl ChatFormat {
    /// Text only, without thinking.
    pub fn new(tokenizer: Tokenizer, template: ChatTemplate, end: u32) -> Self {
        Self { tokenizer, template, pictures: None, thinking: false, end }
    }

    pub fn with_pictures(self, processor: Processor, token: u32) -> Self {
        Self { pictures: Some((processor, token)), ..self }
    }

    /// The conversation up to where the assistant's reply begins. Special tokens in the messages'
    /// texts become ordinary text.
    pub fn prompt(&self, messages: &[Message], device: &Device) -> Result<Prompt, ChatError> {
        let safe: Vec<Message> = messages
            .iter()
            .map(|m| Message { text: self.tokenizer.defang(&m.text).into_owned(), ..m.clone() })
            .collect();
        let ids = self.tokenizer.encode(&self.template.render(&safe, true, self.thinking)?)?;
        let images: Vec<_> = messages.iter().flat_map(|m| m.images.iter().cloned()).collect();
        if images.is_empty() {
            return Ok(Prompt { ids, pictures: None });
        }
        let Some((processor, token)) = &self.pictures else {
            return Err(ChatError::Request("this model takes no pictures".into()));
        };
        let pictures = processor.process(&images, device).map_err(|e| ChatError::Request(message_of(&e)))?;
        let ids = expand(&ids, *token, &pictures.grids, processor.merge_size)?;
        Ok(Prompt { ids, pictures: Some(pictures) })
    }

    /// What the assistant would have sampled to say `text`: its ids and the end of the turn.
    pub fn reply(&self, text: &str) -> Result<Vec<u32>, ChatError> {
        let mut ids = self.tokenizer.encode(&self.tokenizer.defang(text))?;
        ids.push(self.end);
        Ok(ids)
    }
}

/// Repeats each picture's placeholder as often as the picture has tokens.
fn expand(ids: &[u32], token: u32, grids: &[Grid], merge: usize) -> Result<Vec<u32>, ChatError> {
    let slots = ids.iter().filter(|id| **id == token).count();
    if slots != grids.len() {
        let msg = format!("it made {slots} picture tokens (id {token}) of {} pictures", grids.len());
        return Err(ChatError::Template(msg));
    }
    let mut grids = grids.iter();
    let mut out = Vec::with_capacity(ids.len());
    for &id in ids {
        let n = if id == token {
            grids.next().map_or(0, |g| g.iter().product::<usize>() / (merge * merge))
        } else {
            1
        };
        out.extend(std::iter::repeat_n(id, n));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llm::bpe::{self, BpeOptions};
    use crate::llm::template::CHATML;
    use image::RgbImage;

    fn format() -> ChatFormat {
        let special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"];
        let opts = BpeOptions { vocab_size: 280, special_tokens: special.map(String::from).to_vec() };
        let t = Tokenizer::from_bytes(bpe::train(["a chair"], &opts).unwrap().as_bytes()).unwrap();
        let (end, token) = (t.id("<|im_end|>").unwrap(), t.id("<|image_pad|>").unwrap());
        let processor: Processor = serde_json::from_value(serde_json::json!({
            "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5], "size": { "shortest_edge": 64, "longest_edge": 4096 },
        }))
        .unwrap();
        ChatFormat::new(t, ChatTemplate::new(CHATML).unwrap(), end).with_pictures(processor, token)
    }

    #[test]
    fn each_picture_takes_its_own_number_of_tokens() {
        let f = format();
        let token = f.pictures.as_ref().unwrap().1;
        let m = Message::user("<|image_pad|> a chair?")
            .with_images(vec![RgbImage::new(16, 16), RgbImage::new(32, 8)]);
        let p = f.prompt(&[m], &Device::Cpu).unwrap();
        let pictures = p.pictures.unwrap();
        assert_eq!(pictures.grids, [[1, 4, 4], [1, 2, 8]]);
        assert_eq!(p.ids.iter().filter(|id| **id == token).count(), 4 + 4);
    }

    #[test]
    fn a_template_that_drops_pictures_is_an_error() {
        let f = ChatFormat { template: ChatTemplate::new("{{ messages|length }}").unwrap(), ..format() };
        let e = f.prompt(&[Message::user("?").with_images(vec![RgbImage::new(8, 8)])], &Device::Cpu);
        assert!(e.unwrap_err().to_string().contains("0 picture tokens"));
    }

    /// Whatever the environment asks for.
    #[test]
    fn a_picture_that_does_not_fit_is_one_line() {
        let thin = Message::user("<|image_pad|>").with_images(vec![RgbImage::new(3000, 1)]);
        let e = format().prompt(&[thin], &Device::Cpu).unwrap_err().to_string();
        assert!(e.lines().count() == 1 && !e.contains("candle_core::"), "{e}");
    }

    #[test]
    fn a_reply_ends_its_turn_once() {
        let f = format();
        let ids = f.reply("a chair<|im_end|>").unwrap();
        assert_eq!(ids.iter().filter(|id| **id == f.end).count(), 1);
        assert_eq!(ids.last(), Some(&f.end));
    }
}
