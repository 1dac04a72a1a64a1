//! The detector's loss: Hungarian matching, token-level sigmoid focal loss, L1 and GIoU
//! (method.md 6; GroundingDINO, arXiv 2303.05499, section 3.5).
//!
//! The same loss is taken of every decoder layer and of the encoder's proposals, each with its
//! own matching; [`layer_loss`] computes one of them, [`total`] adds them up. HF and the original
//! differ in what the class loss is divided by and in GIoU's guard against empty boxes:
//! [`LossConfig::hf`] reproduces HF's figures, [`LossConfig::original`] is what training uses.
//! All other tokens of a caption count as negatives, `[CLS]`, `[SEP]` and full stops too.

use candle_core::{DType, Result, Tensor, bail};
use pathfinding::prelude::{Matrix, kuhn_munkres_min};
use serde::{Deserialize, Serialize};

/// What the class loss of a batch is divided by (at least 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClassNorm {
    Targets,
    MatchedPairs,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossConfig {
    pub class_cost: f64,
    pub bbox_cost: f64,
    pub giou_cost: f64,
    pub class_weight: f64,
    pub bbox_weight: f64,
    pub giou_weight: f64,
    /// Weight of positives in the focal loss; its γ is 2.
    pub focal_alpha: f64,
    /// Added to both denominators of GIoU.
    pub giou_eps: f64,
    pub class_norm: ClassNorm,
}

impl LossConfig {
    pub fn original() -> Self {
        Self {
            class_cost: 1.,
            bbox_cost: 5.,
            giou_cost: 2.,
            class_weight: 2.,
            bbox_weight: 5.,
            giou_weight: 2.,
            focal_alpha: 0.25,
            giou_eps: 1e-6,
            class_norm: ClassNorm::MatchedPairs,
        }
    }

    pub fn hf() -> Self {
        Self { giou_eps: 0., class_norm: ClassNorm::Targets, ..Self::original() }
    }
}

/// What is to be found in one picture. Boxes are `(cx, cy, w, h)`, 0…1 of the picture.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Target {
    pub boxes: Vec<[f32; 4]>,
    /// Token columns of each box's phrase.
    pub columns: Vec<Vec<usize>>,
    /// Where unmatched predictions are neither right nor wrong: those with half of their own
    /// area inside leave the class loss.
    pub ignore: Vec<[f32; 4]>,
}

/// One layer's loss terms (scalars, not weighted) and its matching.
#[derive(Clone, Debug)]
pub struct LayerLoss {
    pub class: Tensor,
    pub bbox: Tensor,
    pub giou: Tensor,
    /// Per picture `(query, target)`, by query.
    pub pairs: Vec<Vec<(usize, usize)>>,
}

/// Loss of one layer. `logits` `[batch, queries, tokens]` (−∞ beyond a picture's text is fine),
/// `boxes` `[batch, queries, 4]`, `text_lens` each caption's length in tokens.
pub fn layer_loss(
    cfg: &LossConfig,
    logits: &Tensor,
    boxes: &Tensor,
    text_lens: &[usize],
    targets: &[Target],
) -> Result<LayerLoss> {
    let (b, q, t) = logits.dims3()?;
    if boxes.dims() != [b, q, 4] || text_lens.len() != b || targets.len() != b {
        bail!(
            "loss: logits {b}×{q}×{t}, boxes {:?}, {} captions and {} targets do not go together",
            boxes.dims(),
            text_lens.len(),
            targets.len()
        )
    }
    let len = text_lens.iter().copied().max().unwrap_or(0);
    if len > t || len == 0 {
        bail!("loss: captions of {len} tokens for logits of {t}")
    }
    for (target, &text) in targets.iter().zip(text_lens) {
        let bad = |c: &Vec<usize>| c.is_empty() || c.iter().any(|&i| i >= text);
        if target.columns.len() != target.boxes.len() || target.columns.iter().any(bad) {
            bail!("loss: every target box needs token columns inside its caption of {text} tokens")
        }
    }
    let logits = logits.narrow(2, 0, len)?;
    let scores = logits.detach().contiguous()?.to_vec3::<f32>()?;
    let places = boxes.detach().to_vec3::<f32>()?;
    let mut pairs = Vec::with_capacity(b);
    for i in 0..b {
        pairs.push(match_one(cfg, &scores[i], &places[i], &targets[i]));
    }
    let n_targets = targets.iter().map(|t| t.boxes.len()).sum::<usize>().max(1) as f64;
    let n_pairs = pairs.iter().map(Vec::len).sum::<usize>().max(1) as f64;
    let class_norm = match cfg.class_norm {
        ClassNorm::Targets => n_targets,
        ClassNorm::MatchedPairs => n_pairs,
    };

    let mut positive = vec![0f32; b * q * len];
    let mut counted = vec![0u8; b * q * len];
    for i in 0..b {
        let mut matched = vec![false; q];
        for &(query, target) in &pairs[i] {
            matched[query] = true;
            for &c in &targets[i].columns[target] {
                positive[(i * q + query) * len + c] = 1.;
            }
        }
        for query in 0..q {
            if matched[query] || !is_ignored(places[i][query][..4].try_into().unwrap(), &targets[i].ignore) {
                counted[(i * q + query) * len..][..text_lens[i]].fill(1);
            }
        }
    }
    let dev = logits.device();
    let positive = Tensor::from_vec(positive, (b, q, len), dev)?;
    let counted = Tensor::from_vec(counted, (b, q, len), dev)?;
    let class = (focal(&logits, &positive, &counted, cfg.focal_alpha)? / class_norm)?;

    let rows: Vec<u32> =
        (0..b).flat_map(|i| pairs[i].iter().map(move |&(query, _)| (i * q + query) as u32)).collect();
    let wanted: Vec<[f32; 4]> =
        (0..b).flat_map(|i| pairs[i].iter().map(move |&(_, target)| targets[i].boxes[target])).collect();
    let (bbox, giou) = if rows.is_empty() {
        // Nothing to regress; the zeros stay in the graph so that every head has a gradient.
        // (A product with a number 0 is none to candle's backward pass.)
        let zero = (boxes.zeros_like()? * boxes)?.sum_all()?;
        (zero.clone(), zero)
    } else {
        let found = boxes.reshape((b * q, 4))?.index_select(&Tensor::new(rows, dev)?, 0)?;
        let wanted = Tensor::from_vec(wanted.concat(), (wanted.len(), 4), dev)?;
        let l1 = (&found - &wanted)?.abs()?.sum_all()?;
        let overlap = (1. - giou_rows(&found, &wanted, cfg.giou_eps)?)?.sum_all()?;
        ((l1 / n_targets)?, (overlap / n_targets)?)
    };
    Ok(LayerLoss { class, bbox, giou, pairs })
}

/// Weighted sum over layers: what is minimised.
pub fn total(cfg: &LossConfig, layers: &[LayerLoss]) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for l in layers {
        let one = ((&l.class * cfg.class_weight)? + (&l.bbox * cfg.bbox_weight)?)?;
        let one = (one + (&l.giou * cfg.giou_weight)?)?;
        sum = Some(match sum {
            Some(s) => (s + one)?,
            None => one,
        });
    }
    sum.ok_or_else(|| candle_core::Error::Msg("loss: no layers".into()))
}

/// Sum of α-weighted sigmoid focal terms (γ = 2) where `counted` is 1.
fn focal(logits: &Tensor, positive: &Tensor, counted: &Tensor, alpha: f64) -> Result<Tensor> {
    // Masked logits may be −∞: replaced before any arithmetic, their gradient is an exact zero.
    let x = counted.where_cond(logits, &logits.zeros_like()?)?;
    let p = candle_nn::ops::sigmoid(&x)?;
    let softplus = (x.relu()? + (x.abs()?.neg()?.exp()? + 1.)?.log()?)?;
    let cross_entropy = (softplus - (&x * positive)?)?;
    // 1 − p_t = p for negatives, 1 − p for positives.
    let miss = (&p + (positive * (1. - (&p * 2.)?)?)?)?;
    let weight = ((positive * (2. * alpha - 1.))? + (1. - alpha))?;
    let weight = (weight * counted.to_dtype(DType::F32)?)?;
    ((cross_entropy * miss.sqr()?)? * weight)?.sum_all()
}

/// Row by row GIoU of `(cx, cy, w, h)` boxes, `[n, 4]` each → `[n]`.
fn giou_rows(a: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    let corners = |t: &Tensor| -> Result<(Tensor, Tensor, Tensor)> {
        let (centre, size) = (t.narrow(1, 0, 2)?, t.narrow(1, 2, 2)?);
        let half = (&size * 0.5)?;
        let area = (size.narrow(1, 0, 1)? * size.narrow(1, 1, 1)?)?;
        Ok(((&centre - &half)?, (&centre + &half)?, area))
    };
    let ((a_min, a_max, a_area), (b_min, b_max, b_area)) = (corners(a)?, corners(b)?);
    let area = |size: Tensor| -> Result<Tensor> {
        let size = size.relu()?;
        size.narrow(1, 0, 1)? * size.narrow(1, 1, 1)?
    };
    let inter = area((a_max.minimum(&b_max)? - a_min.maximum(&b_min)?)?)?;
    let union = ((a_area + b_area)? - &inter)?;
    let hull = area((a_max.maximum(&b_max)? - a_min.minimum(&b_min)?)?)?;
    let iou = (inter / (&union + eps)?)?;
    (iou - ((&hull - union)? / (&hull + eps)?)?)?.squeeze(1)
}

fn corners(b: [f32; 4]) -> [f64; 4] {
    let [cx, cy, w, h] = b.map(f64::from);
    [cx - w / 2., cy - h / 2., cx + w / 2., cy + h / 2.]
}

fn area(b: [f64; 4]) -> f64 {
    (b[2] - b[0]).max(0.) * (b[3] - b[1]).max(0.)
}

fn intersection(a: [f64; 4], b: [f64; 4]) -> f64 {
    area([a[0].max(b[0]), a[1].max(b[1]), a[2].min(b[2]), a[3].min(b[3])])
}

fn is_ignored(b: [f32; 4], regions: &[[f32; 4]]) -> bool {
    let b = corners(b);
    regions.iter().any(|&r| intersection(b, corners(r)) > 0.5 * area(b))
}

fn giou(a: [f32; 4], b: [f32; 4], eps: f64) -> f64 {
    let (a, b) = (corners(a), corners(b));
    let inter = intersection(a, b);
    let union = area(a) + area(b) - inter;
    let hull = area([a[0].min(b[0]), a[1].min(b[1]), a[2].max(b[2]), a[3].max(b[3])]);
    inter / (union + eps) - (hull - union) / (hull + eps)
}

/// The cheapest one-to-one matching of queries and targets, `(query, target)` by query.
fn match_one(
    cfg: &LossConfig,
    scores: &[Vec<f32>],
    boxes: &[Vec<f32>],
    target: &Target,
) -> Vec<(usize, usize)> {
    if target.boxes.is_empty() || scores.is_empty() {
        return Vec::new();
    }
    let costs: Vec<Vec<f64>> = scores
        .iter()
        .zip(boxes)
        .map(|(logits, place)| {
            let place: [f32; 4] = place[..4].try_into().unwrap();
            let token: Vec<f64> = logits.iter().map(|&x| token_cost(x as f64, cfg.focal_alpha)).collect();
            let one = |(want, columns): (&[f32; 4], &Vec<usize>)| {
                let class = columns.iter().map(|&c| token[c]).sum::<f64>() / columns.len() as f64;
                let l1: f64 = place.iter().zip(want).map(|(a, b)| (*a as f64 - *b as f64).abs()).sum();
                cfg.class_cost * class + cfg.bbox_cost * l1 - cfg.giou_cost * giou(place, *want, cfg.giou_eps)
            };
            target.boxes.iter().zip(&target.columns).map(one).collect()
        })
        .collect();
    assign(&costs)
}

/// Focal matching cost of one token: positive minus negative term.
fn token_cost(logit: f64, alpha: f64) -> f64 {
    let p = 1. / (1. + (-logit).exp());
    let negative = (1. - alpha) * p * p * -(1. - p + 1e-8).ln();
    let positive = alpha * (1. - p) * (1. - p) * -(p + 1e-8).ln();
    positive - negative
}

/// Minimum-cost assignment of a rectangular matrix: every row or every column, whichever are
/// fewer, gets a partner. `(row, column)` by row.
fn assign(costs: &[Vec<f64>]) -> Vec<(usize, usize)> {
    // The solver wants integers, which also makes it exact: 2⁻³¹ is far below f32's resolution of
    // the costs. What is not finite is matched only if nothing else is left.
    const LIMIT: f64 = 1e6;
    let fixed =
        |c: f64| ((if c.is_finite() { c.clamp(-LIMIT, LIMIT) } else { LIMIT }) * (1u64 << 31) as f64) as i64;
    let (rows, cols) = (costs.len(), costs[0].len());
    let (n, m) = (rows.min(cols), rows.max(cols));
    let cell = |i: usize, j: usize| fixed(if rows <= cols { costs[i][j] } else { costs[j][i] });
    let matrix = Matrix::from_fn(n, m, |(i, j)| cell(i, j));
    let (_, partners) = kuhn_munkres_min(&matrix);
    let mut pairs: Vec<(usize, usize)> =
        partners.into_iter().enumerate().map(|(i, j)| if rows <= cols { (i, j) } else { (j, i) }).collect();
    pairs.sort_unstable();
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn assignment_is_optimal_whichever_side_is_longer() {
        let costs = vec![vec![4., 1., 3.], vec![2., 0., 5.], vec![3., 2., 2.]];
        assert_eq!(assign(&costs), [(0, 1), (1, 0), (2, 2)]);
        assert_eq!(assign(&costs[..2]), [(0, 1), (1, 0)]);
        let tall: Vec<Vec<f64>> = costs.iter().map(|r| r[..1].to_vec()).collect();
        assert_eq!(assign(&tall), [(1, 0)]);
    }

    #[test]
    fn broken_costs_are_matched_last() {
        let costs = vec![vec![f64::NAN, f64::INFINITY], vec![9., f64::NEG_INFINITY], vec![1., 30.]];
        assert_eq!(assign(&costs), [(1, 0), (2, 1)]);
    }

    #[test]
    fn ignored_predictions_have_no_class_gradient_unless_matched() -> Result<()> {
        let dev = Device::Cpu;
        let logits = Var::from_tensor(&Tensor::zeros((1, 3, 4), DType::F32, &dev)?)?;
        let boxes =
            Tensor::new(&[[[0.2f32, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.75, 0.7, 0.2, 0.2]]], &dev)?;
        let target = Target {
            boxes: vec![[0.71, 0.7, 0.2, 0.2]],
            columns: vec![vec![1]],
            ignore: vec![[0.7, 0.7, 0.4, 0.4]],
        };
        let l = layer_loss(&LossConfig::original(), logits.as_tensor(), &boxes, &[3], &[target])?;
        assert_eq!(l.pairs, [[(1, 0)]]);
        let grads = l.class.backward()?;
        let g = grads.get(&logits).unwrap().to_vec3::<f32>()?;
        assert!(g[0][2].iter().all(|&v| v == 0.), "inside the ignore region: {:?}", g[0][2]);
        assert!(g[0][0][..3].iter().all(|&v| v > 0.) && g[0][0][3] == 0., "outside: {:?}", g[0][0]);
        assert!(g[0][1][1] < 0. && g[0][1][0] > 0., "matched: {:?}", g[0][1]);
        Ok(())
    }

    #[test]
    fn without_a_target_boxes_have_a_gradient_of_zeros() -> Result<()> {
        let dev = Device::Cpu;
        let logits = Tensor::zeros((1, 2, 4), DType::F32, &dev)?;
        let boxes = Var::from_tensor(&Tensor::full(0.5f32, (1, 2, 4), &dev)?)?;
        let l = layer_loss(&LossConfig::original(), &logits, boxes.as_tensor(), &[3], &[Target::default()])?;
        for loss in [l.bbox, l.giou] {
            assert_eq!(loss.to_scalar::<f32>()?, 0.);
            let grads = loss.backward()?;
            assert_eq!(grads.get(&boxes).expect("a gradient").flatten_all()?.to_vec1::<f32>()?, [0.; 8]);
        }
        Ok(())
    }

    #[test]
    fn more_targets_than_queries_still_match_every_query() -> Result<()> {
        let dev = Device::Cpu;
        let (logits, boxes) =
            (Tensor::zeros((1, 1, 4), DType::F32, &dev)?, Tensor::full(0.5f32, (1, 1, 4), &dev)?);
        let target =
            Target { boxes: vec![[0.1; 4], [0.5; 4]], columns: vec![vec![1], vec![1]], ..Default::default() };
        let l = layer_loss(&LossConfig::original(), &logits, &boxes, &[3], &[target])?;
        assert_eq!(l.pairs, [[(0, 1)]]);
        Ok(())
    }
}
