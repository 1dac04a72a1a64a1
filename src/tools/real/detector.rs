//! GroundingDINO as the `gd_detect` tool.

use super::{LoadError, network, value};
use crate::config;
use crate::models::grounding_dino::caption::{Blanks, Caption, TextTokenizer, tokenizer_json};
use crate::models::grounding_dino::postprocess::{Thresholds, detect, noun_scores};
use crate::models::grounding_dino::preprocess::{ImageProcessor, SizeRule};
use crate::models::grounding_dino::{self, Config, GroundingDino, Inputs, Semantics, names};
use crate::sight::{BBox, Detection, Picture, ToolError};
use crate::weights::hub::Hub;
use crate::weights::source::{HubSource, RepoKind};
use crate::weights::{Checkpoint, ModelFiles, WeightsError, message_of};
use candle_core::{DType, Device, Result, Tensor};
use std::path::PathBuf;

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
    /// From a folder or the embedded model: `config.json` (the original's own is assumed where the weights
    /// carry its names and there is none), a tokenizer ([`tokenizer_of`]), `preprocessor_config.json` if there
    /// is one, weights under HF's or the original's names.
    pub fn open(cfg: &config::Detector) -> std::result::Result<Self, LoadError> {
        let files = ModelFiles::open(&cfg.model, "detector")?;
        let name = files.name();
        let at = |source| LoadError::Model { name: name.clone(), source };
        let (net_cfg, weights) = network_of(&files, files.checkpoint()?)?;
        let tokenizer = tokenizer_of(&files, net_cfg.text_config.vocab_size)?;
        let mut processor = match files.text("preprocessor_config.json")? {
            Some(json) => ImageProcessor::from_json(&json).map_err(at)?,
            None if net_cfg.semantics == Semantics::Original => {
                ImageProcessor { rule: SizeRule::Original, ..Default::default() }
            }
            None => ImageProcessor::default(),
        };
        if cfg.shortest_side > 0 {
            processor.shortest = cfg.shortest_side;
        }
        if cfg.longest_side > 0 {
            processor.longest = cfg.longest_side;
        }
        processor.longest = processor.longest.max(processor.shortest);
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
        None if original => original_config(&weights).map_err(at)?,
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

/// Of the original's two networks that which its patch embedding is of; without one, building will tell.
fn original_config(weights: &Checkpoint) -> Result<Config> {
    let shapes = weights.shapes();
    let name = "backbone.0.patch_embed.proj.weight";
    let embedding = shapes.get(name).or_else(|| shapes.get(&format!("module.{name}")));
    match embedding.and_then(|shape| shape.first()) {
        None | Some(96) => Ok(Config::original_swin_t()),
        Some(128) => Ok(Config::original_swin_b()),
        Some(n) => candle_core::bail!(
            "its backbone begins with {n} channels, the original's Swin-T with 96 and Swin-B with 128; put its \
             config.json beside it"
        ),
    }
}

/// Models with BERT's uncased vocabulary, which all released detectors read; one file of the third is enough.
const BERT: [&str; 4] = [
    "IDEA-Research/grounding-dino-tiny",
    "IDEA-Research/grounding-dino-base",
    "google-bert/bert-base-uncased",
    // Its name of before, under which caches still have it.
    "bert-base-uncased",
];

/// What cuts a detector's captions: its own `tokenizer.json` or `vocab.txt`. The original's checkpoints are one
/// file and bring none: of them that of a model in the hub's cache, if the network knows as many tokens.
pub fn tokenizer_of(files: &ModelFiles, tokens: usize) -> std::result::Result<TextTokenizer, LoadError> {
    tokenizer_from(files, tokens, || {
        let Ok(hub) = Hub::from_env() else { return Vec::new() };
        let of = |repo: &str| {
            let (kind, revision) = (RepoKind::Model, "main".into());
            hub.cached(&HubSource { kind, repo: repo.into(), revision, file: None })
        };
        BERT.into_iter().filter_map(of).collect()
    })
}

fn tokenizer_from(
    files: &ModelFiles,
    tokens: usize,
    elsewhere: impl FnOnce() -> Vec<PathBuf>,
) -> std::result::Result<TextTokenizer, LoadError> {
    let fail =
        |message: String| LoadError::Model { name: files.name(), source: candle_core::Error::Msg(message) };
    if let Some(own) = own_tokenizer(files)? {
        if own.vocab_size() > tokens {
            let sizes = (own.vocab_size(), tokens);
            return Err(fail(format!("the tokenizer has {} tokens, the network knows {}", sizes.0, sizes.1)));
        }
        return Ok(own);
    }
    for folder in elsewhere() {
        if let Some(same) = own_tokenizer(&ModelFiles::Folder(folder))?
            && same.vocab_size() == tokens
        {
            return Ok(same);
        }
    }
    Err(fail(
        "has neither tokenizer.json nor vocab.txt beside it, and no model that shares its vocabulary is in the \
         hub's cache: valor models pull hub:google-bert/bert-base-uncased#vocab.txt"
            .into(),
    ))
}

fn own_tokenizer(files: &ModelFiles) -> std::result::Result<Option<TextTokenizer>, LoadError> {
    let name = files.name();
    let (json, file) = match (files.text("tokenizer.json")?, files.text("vocab.txt")?) {
        (Some(json), _) => (json.into_owned(), "tokenizer.json"),
        (None, Some(vocab)) => (tokenizer_json(vocab.lines()).to_string(), "vocab.txt"),
        (None, None) => return Ok(None),
    };
    let read = TextTokenizer::from_json(&json, &format!("{name}/{file}"));
    read.map(Some).map_err(|source| LoadError::Model { name, source })
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
        run().map_err(network)
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
        run().map_err(network)
    }

    /// Can it be asked for all of these at once?
    pub fn fits(&self, nouns: &[String]) -> bool {
        self.caption(nouns).is_ok()
    }

    fn caption(&self, nouns: &[String]) -> std::result::Result<Caption, ToolError> {
        let caption = self.tokenizer.caption_of(nouns, Blanks::Hyphen).map_err(|e| value(message_of(&e)))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_without_a_tokenizer_reads_with_one_that_is_here() {
        let vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "?", "chair"];
        let folder = |tokens: &[&str]| {
            let dir = tempfile::tempdir().unwrap();
            if !tokens.is_empty() {
                std::fs::write(dir.path().join("vocab.txt"), tokens.join("\n")).unwrap();
            }
            dir
        };
        let (none, small, whole) = (folder(&[]), folder(&vocab[..6]), folder(&vocab));
        let read = |own: &tempfile::TempDir, tokens: usize, elsewhere: &[&tempfile::TempDir]| {
            // As the one file in its folder.
            let files = ModelFiles::File(own.path().join("detector.pth"));
            let folders = elsewhere.iter().map(|dir| dir.path().to_owned()).collect();
            let read = tokenizer_from(&files, tokens, || folders);
            read.map(|t| t.vocab_size()).map_err(|e| e.to_string())
        };
        assert_eq!(read(&none, 7, &[&none, &small, &whole]), Ok(7));
        assert_eq!(read(&small, 7, &[&whole]), Ok(6), "its own goes first, and may know less");
        assert!(read(&whole, 6, &[]).unwrap_err().contains("has 7 tokens, the network knows 6"));
        // Another number of tokens is another vocabulary.
        for tokens in [6, 8] {
            let e = read(&none, tokens, &[&whole]).unwrap_err();
            assert!(e.contains("detector.pth") && e.contains("models pull hub:google-bert/"), "{e}");
        }
    }
}
