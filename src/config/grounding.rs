//! Settings of the detector's tuning (method.md 5 and 6).

use crate::nn::Precision;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grounding {
    /// `rooms`, or a file of JSON lines {"image", "question"}, pictures relative to its folder.
    pub queries: String,
    /// Of `rooms`: pictures, all of the lived-in look.
    pub pictures: usize,
    /// Boxes that are known to be right, as ODVG or COCO: what precision is measured by.
    pub truth: String,
    pub seed: u64,
    pub mining: Mining,
    pub training: DetectorTraining,
}

/// How boxes are found and judged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mining {
    /// Over-eager on purpose.
    pub box_threshold: f64,
    pub text_threshold: f64,
    /// Of boxes of one noun that overlap by more than this only the best is judged; 1: all are.
    pub nms: f64,
    /// Who judges the boxes; empty: the VLM of `[vlm]`.
    pub model: String,
    pub granularity: Granularity,
    /// Of a box-by-box verifier that can tell how sure it is: probability of its yes below which it is a no.
    pub confidence: f64,
    /// Folder of the verifier's prompts (`boxes-….txt`); empty: those that valor brings.
    pub prompts: String,
    /// Boxes looked at alone are enlarged to this long side, pixels; with `pass`, larger ones are made smaller, too.
    pub side: u32,
    pub max_new_tokens: usize,
    /// Of nouns that other pictures were asked for, so many are put to the verifier in each: those that
    /// are not there become its negatives.
    pub negatives: usize,
    /// Pictures judged together.
    pub together: usize,
    /// A run stops where a larger share of its pictures cannot be judged.
    pub missing_limit: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Granularity {
    /// One question a box, one a pair.
    Box,
    /// One question a picture, which parts its boxes.
    Pass,
    /// None at all: every box is kept. Self-training, to compare with.
    None,
}

/// How the detector is trained on what was mined.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DetectorTraining {
    pub epochs: f64,
    pub batch: usize,
    pub lr: f64,
    /// Epochs over which the rate rises.
    pub warmup: f64,
    /// What the rate rises from and falls to.
    pub lr_floor: f64,
    pub weight_decay: f64,
    pub max_grad_norm: f64,
    /// Of matrix products on the processor.
    pub precision: Precision,
    /// Nouns in a caption at most, negatives included.
    pub max_nouns: usize,
    /// Are blanks within nouns written as hyphens, as prompts are?
    pub hyphens: bool,
    /// Parameters whose names begin with one of these are not trained.
    pub freeze: Vec<String>,
    /// Gradient checkpointing: layers run again in the backward pass, and activations of one at a time are held.
    pub recompute: bool,
    pub flip: f64,
    /// Probability of a crop, least share of each side that it keeps, and whether it keeps the shape.
    pub crop: f64,
    pub crop_least: f64,
    pub keep_aspect: bool,
    /// Shortest sides of pictures, one drawn for each.
    pub sizes: Vec<usize>,
    /// Decay of the weights' moving average, which is what is kept in the end; 0: none.
    pub ema: f64,
    /// Share of the tuned weights in the result, the rest are the original's (Wortsman et al. 2022).
    pub alpha: f64,
    /// Boxes to go on learning from: a COCO file (everything labelled), an ODVG file (not everything), or
    /// `rooms`: pictures of the studio look. Empty: none.
    pub replay: String,
    /// Share of the pictures seen that are replayed.
    pub replay_share: f64,
    pub eval_every: u64,
    pub save_every: u64,
    pub keep: usize,
}

impl Grounding {
    /// The key of a value that cannot be, and what is wrong with it.
    pub(super) fn fault(&self) -> Option<(&'static str, &'static str)> {
        let (m, t) = (&self.mining, &self.training);
        let unit = |v: f64| (0. ..=1.).contains(&v);
        let positive = |v: f64| v > 0. && v.is_finite();
        let whole = "must be at least 1";
        let share = "must be between 0 and 1";
        [
            (self.pictures > 0, "pictures", whole),
            (!self.queries.is_empty(), "queries", "must be rooms, or a file"),
            (unit(m.box_threshold), "mining.box_threshold", share),
            (unit(m.text_threshold), "mining.text_threshold", share),
            (unit(m.nms) && m.nms > 0., "mining.nms", "must be above 0 and at most 1"),
            (unit(m.confidence), "mining.confidence", share),
            (m.side > 0, "mining.side", whole),
            (m.max_new_tokens > 0, "mining.max_new_tokens", whole),
            (m.together > 0, "mining.together", whole),
            (unit(m.missing_limit), "mining.missing_limit", share),
            (positive(t.epochs) && t.epochs <= 1e6, "training.epochs", "must be positive, at most a million"),
            (t.batch > 0, "training.batch", whole),
            (positive(t.lr), "training.lr", "must be positive"),
            (t.warmup >= 0. && t.warmup.is_finite(), "training.warmup", "must not be negative"),
            (t.lr_floor >= 0. && t.lr_floor <= t.lr, "training.lr_floor", "must be between 0 and lr"),
            (
                t.weight_decay >= 0. && t.weight_decay.is_finite(),
                "training.weight_decay",
                "must not be negative",
            ),
            (
                t.max_grad_norm >= 0. && t.max_grad_norm.is_finite(),
                "training.max_grad_norm",
                "must not be negative (0: no clipping)",
            ),
            (t.max_nouns > 0, "training.max_nouns", whole),
            (unit(t.flip), "training.flip", share),
            (unit(t.crop), "training.crop", share),
            (unit(t.crop_least) && t.crop_least > 0., "training.crop_least", "must be above 0 and at most 1"),
            (!t.sizes.is_empty() && !t.sizes.contains(&0), "training.sizes", "must name sizes in pixels"),
            (unit(t.ema) && t.ema < 1., "training.ema", "must be 0 or more and below 1"),
            (unit(t.alpha), "training.alpha", share),
            (
                unit(t.replay_share) && t.replay_share < 1.,
                "training.replay_share",
                "must be 0 or more and below 1",
            ),
            (t.save_every > 0, "training.save_every", whole),
        ]
        .into_iter()
        .find(|(ok, ..)| !ok)
        .map(|(_, key, why)| (key, why))
    }
}
