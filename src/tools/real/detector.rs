//! GroundingDINO as the `gd_detect` tool.

use super::{LoadError, runtime, value};
use crate::config;
use crate::models::grounding_dino::caption::{Blanks, Caption, TextTokenizer, tokenizer_json};
use crate::models::grounding_dino::postprocess::{Thresholds, detect, noun_scores};
use crate::models::grounding_dino::preprocess::{ImageProcessor, SizeRule};
use crate::models::grounding_dino::{self, Config, GroundingDino, Inputs, Semantics, names};
use crate::tools::{BBox, Detection, Picture, ToolError};
use crate::weights::{Checkpoint, ModelFiles, WeightsError};
use candle_core::{DType, Device, Result, Tensor};

/// A loaded detector with its thresholds.
pub struct Detector {
    name: String,
    net: GroundingDino,
    tokenizer: TextTokenizer,
    processor: ImageProcessor,
    thresholds: Thresholds,
    device: Device,
}

/// What a detector is made of, its network not yet built.
pub struct DetectorParts {
    pub name: String,
    pub files: ModelFiles,
    pub config: Config,
    /// Under HF's names.
    pub weights: Checkpoint,
    pub tokenizer: TextTokenizer,
    /// Sizes are the configuration's.
    pub processor: ImageProcessor,
}

impl DetectorParts {
    /// From a folder or the embedded model: `config.json` (the original Swin-T's is assumed where
    /// the weights carry the original's names and there is none), `tokenizer.json` or `vocab.txt`,
    /// `preprocessor_config.json` if there is one, weights under HF's or the original's names.
    pub fn open(cfg: &config::Detector) -> std::result::Result<Self, LoadError> {
        let files = ModelFiles::open(&cfg.model, "detector")?;
        let name = files.name();
        let at = |source| LoadError::Model { name: name.clone(), source };
        let (net_cfg, weights) = network_of(&files, files.checkpoint()?)?;
        let tokenizer = match (files.text("tokenizer.json")?, files.text("vocab.txt")?) {
            (Some(json), _) => TextTokenizer::from_json(&json, &format!("{name}/tokenizer.json")),
            (None, Some(vocab)) => TextTokenizer::from_json(
                &tokenizer_json(vocab.lines()).to_string(),
                &format!("{name}/vocab.txt"),
            ),
            (None, None) => Err(candle_core::Error::Msg(
                "has neither tokenizer.json nor vocab.txt; put bert-base-uncased's vocab.txt beside its weights \
                 (grounding-dino-tiny brings it)"
                    .into(),
            )),
        };
        let tokenizer = tokenizer.map_err(at)?;
        if tokenizer.vocab_size() > net_cfg.text_config.vocab_size {
            let sizes = (tokenizer.vocab_size(), net_cfg.text_config.vocab_size);
            let message = format!("the tokenizer has {} tokens, the network knows {}", sizes.0, sizes.1);
            return Err(at(candle_core::Error::Msg(message)));
        }
        let mut processor = match files.text("preprocessor_config.json")? {
            Some(json) => ImageProcessor::from_json(&json).map_err(at)?,
            None if net_cfg.semantics == Semantics::Original => {
                ImageProcessor { rule: SizeRule::Original, ..Default::default() }
            }
            None => ImageProcessor::default(),
        };
        processor.shortest = cfg.shortest_side;
        processor.longest = cfg.longest_side.max(cfg.shortest_side);
        Ok(Self { name, files, config: net_cfg, weights, tokenizer, processor })
    }

    /// What its checkpoint may have beyond the network's own tensors.
    pub fn unused(&self) -> Vec<String> {
        unused(&self.config)
    }
}

/// The configuration of a detector's files, and weights (all of them, or their outline) under HF's names.
pub fn network_of(
    files: &ModelFiles,
    weights: Checkpoint,
) -> std::result::Result<(Config, Checkpoint), LoadError> {
    let name = files.name();
    let at = |source| LoadError::Model { name: name.clone(), source };
    let original = names::is_original(weights.names().iter().map(String::as_str));
    let config = match files.text("config.json")? {
        Some(text) => Config::from_json(&text).map_err(at)?,
        None if original => Config::original_swin_t(),
        None => {
            let message = "is missing; download it again".into();
            return Err(WeightsError::Unreadable { path: format!("{name}/config.json"), message }.into());
        }
    };
    let weights = match original {
        true => Checkpoint::from_tensors(&name, names::to_hf(weights.tensors()?).map_err(at)?),
        false => weights,
    };
    Ok((config, weights))
}

/// What a detector's checkpoint may have beyond the network's own tensors ([`crate::weights::is_unused`]).
pub fn unused(config: &Config) -> Vec<String> {
    let mut unused: Vec<String> = grounding_dino::UNUSED.iter().map(|s| s.to_string()).collect();
    // The box head that all decoder layers share is stored once for each.
    unused.extend((1..config.decoder_layers).map(|i| format!("bbox_embed.{i}.")));
    unused
}

impl Detector {
    /// As [`DetectorParts::open`] finds it; thresholds are the configuration's.
    pub fn load(cfg: &config::Detector, device: &Device) -> std::result::Result<Self, LoadError> {
        let parts = DetectorParts::open(cfg)?;
        let unused = parts.unused();
        let unused: Vec<&str> = unused.iter().map(String::as_str).collect();
        let DetectorParts { name, config, weights, tokenizer, processor, .. } = parts;
        let net = weights.build(DType::F32, device, &unused, |vb| GroundingDino::new(&config, vb))?;
        let thresholds =
            Thresholds { boxes: cfg.box_threshold as f32, text: cfg.text_threshold as f32, nms: None };
        Ok(Self { name, net, tokenizer, processor, thresholds, device: device.clone() })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The network's view of a picture, `[3, height, width]`.
    pub fn pixels(&self, picture: &Picture) -> Result<Tensor> {
        self.processor.apply(picture)?.to_device(&self.device)
    }

    /// What every query makes of each of `nouns`: its box in pixels and a probability per noun.
    pub fn scores(
        &self,
        pixels: &Tensor,
        size: (u32, u32),
        nouns: &[String],
    ) -> std::result::Result<Vec<(BBox, Vec<f32>)>, ToolError> {
        let caption = self.caption(nouns)?;
        let run = || {
            let (logits, boxes) = self.run(pixels, &caption)?;
            noun_scores(&caption, &logits, &boxes, size)
        };
        run().map_err(runtime)
    }

    /// Boxes named by exactly one of `nouns` (see [`detect`]) in pixels of a picture of `size`
    /// (height, width). Inner blanks become hyphens in the caption, as in training (method.md 5.2).
    pub fn detect(
        &self,
        pixels: &Tensor,
        size: (u32, u32),
        nouns: &[String],
    ) -> std::result::Result<Vec<Detection>, ToolError> {
        self.detect_above(pixels, size, nouns, self.thresholds)
    }

    /// The same with other thresholds than the configuration's: mining wants more than is right.
    pub fn detect_above(
        &self,
        pixels: &Tensor,
        size: (u32, u32),
        nouns: &[String],
        thresholds: Thresholds,
    ) -> std::result::Result<Vec<Detection>, ToolError> {
        let caption = self.caption(nouns)?;
        let run = || {
            let (logits, boxes) = self.run(pixels, &caption)?;
            detect(&self.tokenizer, &caption, nouns, &logits, &boxes, size, thresholds)
        };
        run().map_err(runtime)
    }

    /// Can it be asked for all of these at once?
    pub fn fits(&self, nouns: &[String]) -> bool {
        self.caption(nouns).is_ok()
    }

    fn caption(&self, nouns: &[String]) -> std::result::Result<Caption, ToolError> {
        let caption = self.tokenizer.caption_of(nouns, Blanks::Hyphen).map_err(|e| value(e.to_string()))?;
        let cfg = self.net.config();
        if caption.ids.len() > cfg.max_text_len {
            let (n, most) = (caption.ids.len(), cfg.max_text_len);
            return Err(value(format!("the prompt has {n} tokens, at most {most} fit: ask for fewer nouns")));
        }
        // A phrase's positions count from 0 to its full stop.
        let longest = caption.phrases.iter().map(|p| p.len() + 1).max().unwrap_or(0);
        if longest > cfg.text_config.max_position_embeddings {
            return Err(value("a noun of the prompt is too long for the detector".into()));
        }
        Ok(caption)
    }

    /// The last layer's logits `[queries, tokens]` and boxes `[queries, 4]`.
    fn run(&self, pixels: &Tensor, caption: &Caption) -> Result<(Tensor, Tensor)> {
        let ids = Tensor::new(caption.ids.as_slice(), &self.device)?.unsqueeze(0)?;
        let mask = ids.ones_like()?.to_dtype(DType::U8)?;
        let inputs = Inputs::new(pixels.unsqueeze(0)?, None, ids, mask, &self.net.config().special_tokens)?;
        let out = self.net.forward(&inputs, None)?;
        let (Some(logits), Some(boxes)) = (out.logits.last(), out.boxes.last()) else {
            candle_core::bail!("the detector has no decoder layers")
        };
        Ok((logits.get(0)?, boxes.get(0)?))
    }
}
