//! The tokenizer that planner, verifier and VLM share: byte-level BPE, learned from what the three read
//! and write in training.

use super::{planner, stream, verifier};
use crate::llm::bpe::{self, BpeOptions};
use crate::llm::template::{CHATML, ChatTemplate};
use crate::llm::{ChatError, Message};
use crate::rooms::questions::{Split, scene_seed};
use crate::rooms::vqa::vqa_samples;
use crate::rooms::{self, Look};

/// Ends a turn.
pub const END: &str = "<|im_end|>";
/// Fills rows up; also ends a reply.
pub const FILLER: &str = "<|endoftext|>";
pub const VISION_START: &str = "<|vision_start|>";
pub const PICTURE: &str = "<|image_pad|>";
pub const VISION_END: &str = "<|vision_end|>";

const SPECIAL: [&str; 6] = ["<|im_start|>", END, VISION_START, PICTURE, VISION_END, FILLER];

/// Tokens at most; Rooms has fewer frequent pieces.
const SIZE: usize = 2_048;

/// Of the embedded tokenizer.
pub const SEED: u64 = 1;

/// Planner and verifier samples to learn from, each.
const TEXTS: usize = 1_500;
/// Pictures whose questions are learned from.
const PICTURES: u64 = 16;

/// The contents of `tokenizer.json`, a function of the seed.
pub fn train(seed: u64) -> Result<String, ChatError> {
    let template = ChatTemplate::new(CHATML)?;
    let mut texts = Vec::new();
    let mut add = |user: String, reply: &str| -> Result<(), ChatError> {
        texts.push(template.render(&[Message::user(user)], true, false)? + reply);
        Ok(())
    };
    let mut rng = stream(seed, u64::MAX - 1);
    for _ in 0..TEXTS {
        let (user, reply) = planner::text(&mut rng);
        add(user, &reply)?;
        let (user, reply) = verifier::text(&rooms::demos::verifier_sample(&mut rng));
        add(user, &reply)?;
    }
    for i in 0..PICTURES {
        // Which pixels are seen decides what is asked; small pictures do.
        let view = rooms::generate(scene_seed(Split::Train, seed, i), Look::Studio, 128, 96);
        for (_, question, answer) in vqa_samples(&view, &mut rng) {
            add(question, &answer)?;
        }
    }
    bpe::train(texts, &BpeOptions { vocab_size: SIZE, special_tokens: SPECIAL.map(String::from).to_vec() })
}
