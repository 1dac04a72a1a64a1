//! What a detector is trained on, and how it is made ready: augmented, captioned, padded to one size.

use super::TrainConfig;
use crate::models::grounding_dino::caption::{Caption, MAX_TEXT_LEN, TextTokenizer};
use crate::models::grounding_dino::preprocess::ImageProcessor;
use crate::models::grounding_dino::{Config, Inputs};
use crate::sight::{BBox, Picture};
use crate::train::grounding_loss::Target;
use candle_core::{Device, Result, Tensor};
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// One picture with what is known to be in it and what is known not to be.
#[derive(Clone, Debug)]
pub struct Sample {
    pub picture: Picture,
    /// Pixels, and the noun of each.
    pub boxes: Vec<BBox>,
    pub nouns: Vec<String>,
    /// Known to be absent: candidates for the caption's negatives. A class that is merely
    /// unlabelled here must not be among them (method.md 5.4).
    pub absent: Vec<String>,
    /// Part of every caption although there is no box: hard negatives from mining.
    pub hard_negatives: Vec<String>,
    pub ignore: Vec<Region>,
}

/// Where predictions are neither right nor wrong.
#[derive(Clone, Debug, PartialEq)]
pub struct Region {
    pub bbox: BBox,
    /// For which noun, in evaluation; `None` for all. Training looks at none of them, whatever the noun.
    pub noun: Option<String>,
}

/// Where samples come from. The same index gives the same sample.
pub trait Samples: Send + Sync {
    fn sample(&self, index: u64) -> anyhow::Result<Sample>;
    /// `None`: as many as anyone asks for.
    fn len(&self) -> Option<u64>;
    fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }
}

/// A sample's pixels, caption and boxes.
pub(super) type Prepared = (Tensor, Caption, Target);

/// Augments a sample and writes its caption: what is there, the hard negatives, and as many
/// absent nouns as chance wills; in this order, as far as the detector reads.
pub(super) fn prepare(
    sample: &Sample,
    cfg: &TrainConfig,
    model: &Config,
    tokenizer: &TextTokenizer,
    processor: &ImageProcessor,
    rng: &mut ChaCha8Rng,
) -> Result<Prepared> {
    if sample.boxes.len() != sample.nouns.len() {
        candle_core::bail!("{} boxes with {} nouns", sample.boxes.len(), sample.nouns.len())
    }
    let ignore: Vec<BBox> = sample.ignore.iter().map(|r| r.bbox).collect();
    let framed = cfg.augment.apply(&sample.picture, &sample.boxes, &ignore, processor, rng)?;
    let mut nouns: Vec<&str> = Vec::new();
    for noun in sample.nouns.iter().chain(&sample.hard_negatives) {
        if !nouns.contains(&noun.as_str()) && nouns.len() < cfg.max_nouns {
            nouns.push(noun);
        }
    }
    let mut absent: Vec<&str> = sample.absent.iter().map(String::as_str).collect();
    absent.retain(|a| !nouns.contains(a));
    absent.shuffle(rng);
    let room = cfg.max_nouns.saturating_sub(nouns.len()).min(absent.len());
    // A caption needs a noun, if only a wrong one.
    let least = usize::from(nouns.is_empty()).min(room);
    nouns.extend(&absent[..rng.random_range(least..=room)]);
    // Beside [CLS] and [SEP].
    let mut left = model.max_text_len.min(MAX_TEXT_LEN).saturating_sub(2);
    let mut fitting = Vec::with_capacity(nouns.len());
    for noun in nouns {
        let tokens = tokenizer.tokens_of(noun, cfg.blanks)?;
        // A phrase's positions count from 0 to its full stop.
        if tokens <= left && tokens <= model.text_config.max_position_embeddings {
            left -= tokens;
            fitting.push(noun);
        }
    }
    let mut nouns = fitting;
    nouns.shuffle(rng);
    let caption = tokenizer.caption_of(&nouns, cfg.blanks)?;
    let mut target = Target { ignore: framed.ignore, ..Default::default() };
    for (i, bbox) in framed.boxes {
        // A thing may stand without its noun, for which there was no room: not asked for, so not a target.
        if let Some(k) = nouns.iter().position(|n| *n == sample.nouns[i]) {
            target.boxes.push(bbox);
            target.columns.push(caption.phrases[k].clone().collect());
        }
    }
    Ok((framed.pixels, caption, target))
}

/// Pads pictures and captions to one size.
pub(super) fn inputs(
    pixels: &[Tensor],
    captions: &[Caption],
    tokenizer: &TextTokenizer,
    cfg: &Config,
    device: &Device,
) -> Result<Inputs> {
    let batch = ImageProcessor::batch(pixels)?;
    let padded = pixels.windows(2).any(|p| p[0].dims() != p[1].dims());
    let (b, t) = (captions.len(), captions.iter().map(|c| c.ids.len()).max().unwrap_or(0));
    let (mut ids, mut mask) = (vec![tokenizer.pad_id(); b * t], vec![0u8; b * t]);
    for (i, c) in captions.iter().enumerate() {
        ids[i * t..][..c.ids.len()].copy_from_slice(&c.ids);
        mask[i * t..][..c.ids.len()].fill(1);
    }
    let ids = Tensor::from_vec(ids, (b, t), device)?;
    let mask = Tensor::from_vec(mask, (b, t), device)?;
    let hidden = padded.then(|| batch.mask.to_device(device)).transpose()?;
    Inputs::new(batch.pixels.to_device(device)?, hidden, ids, mask, &cfg.special_tokens)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::train::augment::Augment;
    use crate::train::pretrain::detector;
    use rand::SeedableRng;

    pub fn sample() -> Sample {
        let picture = Picture::new(64, 48, (0..64 * 48 * 3).map(|i| (i * 7 % 251) as u8).collect());
        Sample {
            picture,
            boxes: vec![[4., 4., 20., 30.], [30., 10., 60., 40.], [5., 30., 25., 47.]],
            nouns: vec!["chair".into(), "red chair".into(), "chair".into()],
            absent: ["sofa", "lamp", "bed", "tv"].map(String::from).to_vec(),
            hard_negatives: vec!["ball".into()],
            ignore: vec![Region { bbox: [0., 0., 8., 8.], noun: Some("vase".into()) }],
        }
    }

    #[test]
    fn captions_hold_what_is_there_and_some_of_what_is_not() -> Result<()> {
        let (t, p) = (detector::tokenizer()?, detector::processor());
        let cfg = TrainConfig { augment: Augment::none(&p), max_nouns: 5, ..Default::default() };
        let mut lens = Vec::new();
        for seed in 0..30 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let (_, caption, target) = prepare(&sample(), &cfg, &detector::config(), &t, &p, &mut rng)?;
            for noun in ["chair", "red chair", "ball"] {
                assert!(t.find(&caption, noun)?.is_some(), "{noun} missing in {:?}", caption.text);
            }
            assert_eq!(target.boxes.len(), 3);
            for (columns, noun) in target.columns.iter().zip(&sample().nouns) {
                let ids: Vec<u32> = columns.iter().map(|&c| caption.ids[c]).collect();
                assert_eq!(t.decode(&ids)?, *noun, "spans, not substrings");
            }
            assert_eq!(target.ignore.len(), 1);
            lens.push(caption.phrases.len());
        }
        assert_eq!((lens.iter().min(), lens.iter().max()), (Some(&3), Some(&5)));
        Ok(())
    }

    #[test]
    fn a_picture_without_things_still_gets_a_caption() -> Result<()> {
        let (t, p) = (detector::tokenizer()?, detector::processor());
        let empty = Sample { boxes: vec![], nouns: vec![], hard_negatives: vec![], ..sample() };
        let cfg = TrainConfig { augment: Augment::none(&p), ..Default::default() };
        for seed in 0..10 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let (_, caption, target) = prepare(&empty, &cfg, &detector::config(), &t, &p, &mut rng)?;
            assert!(!caption.phrases.is_empty() && target.boxes.is_empty());
        }
        Ok(())
    }

    #[test]
    fn nouns_that_the_detector_would_not_read_are_left_out_negatives_first() -> Result<()> {
        let (t, p, model) = (detector::tokenizer()?, detector::processor(), detector::config());
        let cfg = TrainConfig { augment: Augment::none(&p), ..Default::default() };
        // Unknown words are spelled: some twenty tokens each.
        let long: Vec<String> = ('a'..='p').map(|c| format!("stainless steel sink {c}")).collect();
        let mut many = Sample { hard_negatives: long, ..sample() };
        // More positions than the text encoder has.
        many.boxes.push([1., 1., 9., 9.]);
        many.nouns.push("z".repeat(model.text_config.max_position_embeddings));
        for seed in 0..5 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let (_, caption, target) = prepare(&many, &cfg, &model, &t, &p, &mut rng)?;
            assert!(caption.ids.len() <= MAX_TEXT_LEN, "{}", caption.ids.len());
            assert!(caption.phrases.len() > 5, "{}", caption.text);
            assert_eq!(target.boxes.len(), 3);
            assert!(t.find(&caption, "chair")?.is_some() && t.find(&caption, "red chair")?.is_some());
        }
        Ok(())
    }
}
