//! Logits and boxes → named boxes.
//!
//! [`phrases`] names a box as HF and the original do: by all its tokens above the text
//! threshold, whatever phrases they come from (without the full stops and `[SEP]` that HF's
//! labels can contain). [`detect`] is the tool's rule: only boxes whose phrase is one of the
//! asked nouns come back (method.md 5.2, 10.2, 10.13). [`noun_scores`] rates every box for every
//! noun, for average precision.

use super::caption::{Caption, TextTokenizer};
use crate::sight::bbox::iou;
use crate::sight::{BBox, Detection};
use candle_core::{Result, Tensor, bail};

/// Score thresholds; the method's are 0.35 / 0.25, for mining 0.1 / 0.1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Thresholds {
    /// A box's best token must pass this.
    pub boxes: f32,
    /// Tokens above this make up the phrase.
    pub text: f32,
    /// Of two boxes of one noun that overlap by more than this IoU the weaker goes.
    pub nms: Option<f64>,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self { boxes: 0.35, text: 0.25, nms: None }
    }
}

/// One query's output above the box threshold.
#[derive(Clone, Debug)]
pub struct PhraseBox {
    /// `[x1, y1, x2, y2]` in pixels, not clipped.
    pub bbox: BBox,
    pub score: f32,
    /// Token columns above the text threshold, delimiters left out.
    pub columns: Vec<usize>,
    pub phrase: String,
}

/// One picture's probabilities and boxes, copied out of the graph.
struct Predictions {
    /// `[queries][text_len]`
    probs: Vec<Vec<f32>>,
    /// Pixels.
    boxes: Vec<BBox>,
}

impl Predictions {
    fn new(logits: &Tensor, boxes: &Tensor, text_len: usize, (height, width): (u32, u32)) -> Result<Self> {
        let (q, t) = logits.dims2()?;
        if boxes.dims() != [q, 4] || text_len > t {
            bail!("{q}×{t} logits do not go with boxes {:?} and {text_len} tokens", boxes.dims())
        }
        let probs = logits.narrow(1, 0, text_len)?.to_vec2::<f32>()?;
        let probs = probs.into_iter().map(|r| r.into_iter().map(sigmoid).collect()).collect();
        let (w, h) = (width as f64, height as f64);
        let boxes = boxes.to_vec2::<f32>()?.into_iter().map(|b| {
            let [cx, cy, bw, bh] = [b[0] as f64, b[1] as f64, b[2] as f64, b[3] as f64];
            [(cx - bw / 2.) * w, (cy - bh / 2.) * h, (cx + bw / 2.) * w, (cy + bh / 2.) * h]
        });
        Ok(Self { probs, boxes: boxes.collect() })
    }
}

fn sigmoid(x: f32) -> f32 {
    1. / (1. + (-x).exp())
}

/// Boxes with free phrases, as HF's post-processing. `logits` `[queries, ≥ text]`, `boxes`
/// `[queries, 4]` (cxcywh, 0…1), `size` is the picture's `(height, width)`.
pub fn phrases(
    tokenizer: &TextTokenizer,
    caption_ids: &[u32],
    logits: &Tensor,
    boxes: &Tensor,
    size: (u32, u32),
    thresholds: Thresholds,
) -> Result<Vec<PhraseBox>> {
    let p = Predictions::new(logits, boxes, caption_ids.len(), size)?;
    let mut out = Vec::new();
    for (probs, &bbox) in p.probs.iter().zip(&p.boxes) {
        // A NaN passes no threshold, and a box of NaNs is none.
        let score = probs.iter().copied().fold(0., f32::max);
        if score <= thresholds.boxes || bbox.iter().any(|v| !v.is_finite()) {
            continue;
        }
        let named = |&i: &usize| probs[i] > thresholds.text && !tokenizer.is_delimiter(caption_ids[i]);
        let columns: Vec<usize> = (0..probs.len()).filter(named).collect();
        let ids: Vec<u32> = columns.iter().map(|&i| caption_ids[i]).collect();
        out.push(PhraseBox { bbox, score, phrase: tokenizer.decode(&ids)?, columns });
    }
    Ok(out)
}

/// What `gd_detect` returns: boxes whose phrase is exactly one of `nouns` (which made `caption`,
/// in this order), clipped to the picture, best first. Boxes outside the picture are dropped.
pub fn detect(
    tokenizer: &TextTokenizer,
    caption: &Caption,
    nouns: &[impl AsRef<str>],
    logits: &Tensor,
    boxes: &Tensor,
    size: (u32, u32),
    thresholds: Thresholds,
) -> Result<Vec<Detection>> {
    if nouns.len() != caption.phrases.len() {
        bail!("{} nouns for a caption of {} phrases", nouns.len(), caption.phrases.len())
    }
    let mut found: Vec<Detection> = Vec::new();
    for b in phrases(tokenizer, &caption.ids, logits, boxes, size, thresholds)? {
        let is_whole = |p: &std::ops::Range<usize>| b.columns.iter().copied().eq(p.clone());
        let Some(noun) = caption.phrases.iter().position(is_whole) else { continue };
        if let Some(bbox) = clip(b.bbox, size) {
            let label = nouns[noun].as_ref().to_string();
            found.push(Detection { bbox, label, score: Some(b.score as f64) });
        }
    }
    found.sort_by(|a, b| b.score.partial_cmp(&a.score).unwrap_or(std::cmp::Ordering::Equal));
    if let Some(limit) = thresholds.nms {
        found = nms(found, limit);
    }
    Ok(found)
}

/// Every query's score for every phrase of the caption: the mean probability over the phrase's
/// tokens, as the original's COCO evaluation. Returns `(bbox, scores)` per query.
pub fn noun_scores(
    caption: &Caption,
    logits: &Tensor,
    boxes: &Tensor,
    size: (u32, u32),
) -> Result<Vec<(BBox, Vec<f32>)>> {
    let p = Predictions::new(logits, boxes, caption.ids.len(), size)?;
    let score = |probs: &[f32], span: &std::ops::Range<usize>| {
        probs[span.clone()].iter().sum::<f32>() / span.len() as f32
    };
    let rate = |(probs, bbox): (Vec<f32>, BBox)| {
        let scores = caption.phrases.iter().map(|s| score(&probs, s)).collect();
        (bbox, scores)
    };
    Ok(p.probs.into_iter().zip(p.boxes).map(rate).collect())
}

/// Inside the picture, or `None` where nothing is left.
fn clip(b: BBox, (height, width): (u32, u32)) -> Option<BBox> {
    let (w, h) = (width as f64, height as f64);
    let c = [b[0].clamp(0., w), b[1].clamp(0., h), b[2].clamp(0., w), b[3].clamp(0., h)];
    (c[2] > c[0] && c[3] > c[1]).then_some(c)
}

/// Greedy suppression within each label; `found` is sorted, best first.
pub fn nms(found: Vec<Detection>, limit: f64) -> Vec<Detection> {
    let mut kept: Vec<Detection> = Vec::new();
    for d in found {
        if !kept.iter().any(|k| k.label == d.label && iou(k.bbox, d.bbox) > limit) {
            kept.push(d);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::super::caption::{Blanks, tokenizer_json};
    use super::*;
    use candle_core::Device;

    const VOCAB: [&str; 9] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "coffee", "table"];

    fn tokenizer() -> TextTokenizer {
        TextTokenizer::from_json(&tokenizer_json(VOCAB).to_string(), "test").unwrap()
    }

    /// Four queries: a coffee table, a table, "table" of the coffee table alone, both nouns.
    fn scene(nouns: &[&str]) -> Result<Vec<Detection>> {
        let t = tokenizer();
        let caption = t.caption_of(nouns, Blanks::Keep)?;
        // [CLS] coffee table . table . [SEP]
        let (y, n) = (3f32, -5f32);
        let logits = [
            [y, y, y, y, n, n, y, f32::NEG_INFINITY],
            [n, n, n, n, y, y, n, f32::NEG_INFINITY],
            [n, n, y, n, n, n, n, f32::NEG_INFINITY],
            [n, y, y, n, y, n, n, f32::NEG_INFINITY],
        ];
        let boxes = [[0.5f32, 0.5, 0.5, 0.5], [0.9, 0.5, 0.4, 0.2], [0.5; 4], [0.5; 4]];
        let (logits, boxes) = (Tensor::new(&logits, &Device::Cpu)?, Tensor::new(&boxes, &Device::Cpu)?);
        detect(&t, &caption, nouns, &logits, &boxes, (100, 200), Thresholds::default())
    }

    #[test]
    fn only_whole_asked_phrases_come_back_with_the_askers_capitals() -> Result<()> {
        let found = scene(&["Coffee Table", "TABLE"])?;
        let labels: Vec<&str> = found.iter().map(|d| d.label.as_str()).collect();
        assert_eq!(labels, ["Coffee Table", "TABLE"]);
        assert_eq!(found[0].bbox, [50., 25., 150., 75.]);
        assert!((found[1].bbox[2] - 200.).abs() < 1e-9, "clipped to the picture");
        Ok(())
    }

    #[test]
    fn suppression_is_within_one_noun() {
        let d = |label: &str, x: f64, s: f64| Detection {
            bbox: [x, 0., x + 10., 10.],
            label: label.into(),
            score: Some(s),
        };
        let kept = nms(vec![d("a", 0., 0.9), d("a", 1., 0.8), d("b", 1., 0.7), d("a", 9., 0.6)], 0.5);
        let got: Vec<_> = kept.iter().map(|d| (d.label.as_str(), d.bbox[0])).collect();
        assert_eq!(got, [("a", 0.), ("b", 1.), ("a", 9.)]);
    }
}
