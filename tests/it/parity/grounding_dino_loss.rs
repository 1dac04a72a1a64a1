//! The detector's losses, matchings and their gradients against HF's and the original's, on the
//! fixtures' stored logits and boxes.

use super::{Fixture, assert_close};
use candle_core::{D, DType, Tensor, Var};
use serde::Deserialize;
use std::collections::BTreeMap;
use valor::train::grounding_loss::{LayerLoss, LossConfig, Target, layer_loss, total};

/// Per picture: predictions, targets.
type Pairs = Vec<(Vec<usize>, Vec<usize>)>;

fn boxes_of(t: &Tensor) -> Vec<[f32; 4]> {
    t.to_vec2::<f32>().unwrap().into_iter().map(|b| b.try_into().unwrap()).collect()
}

/// Targets from class indices, boxes and the fixture's label map `[classes, tokens]`.
pub fn target(classes: &Tensor, boxes: &Tensor, label_map: &Tensor) -> Target {
    let map = label_map.to_dtype(DType::U32).unwrap().to_vec2::<u32>().unwrap();
    let columns = |&c: &i64| -> Vec<usize> {
        map[c as usize].iter().enumerate().filter(|(_, v)| **v == 1).map(|(i, _)| i).collect()
    };
    let columns = classes.to_vec1::<i64>().unwrap().iter().map(columns).collect();
    Target { boxes: boxes_of(boxes), columns, ignore: Vec::new() }
}

/// Length of each row's text from a 0/1 mask `[batch, tokens]`.
pub fn lengths(mask: &Tensor) -> Vec<usize> {
    let sums = mask.to_dtype(DType::U32).unwrap().sum(D::Minus1).unwrap();
    sums.to_vec1::<u32>().unwrap().into_iter().map(|n| n as usize).collect()
}

#[track_caller]
fn check(name: &str, got: &Tensor, want: f64) {
    let got = got.to_dtype(DType::F64).unwrap().to_scalar::<f64>().unwrap();
    assert!((got - want).abs() <= 1e-4 * want.abs().max(1e-3), "{name}: {got} instead of {want}");
}

fn check_pairs(name: &str, got: &LayerLoss, want: &Pairs) {
    let want: Vec<Vec<(usize, usize)>> =
        want.iter().map(|(p, t)| p.iter().copied().zip(t.iter().copied()).collect()).collect();
    assert_eq!(got.pairs, want, "{name}");
}

#[test]
fn hf_losses_matchings_and_gradients() {
    let fx = Fixture::open("grounding-dino-loss");
    let losses: BTreeMap<String, f64> = fx.json("loss_dict.json");
    let alone: BTreeMap<String, f64> = fx.json("standalone.json");
    let pairs: BTreeMap<String, BTreeMap<String, Pairs>> = fx.json("assignment.json");
    let pairs = pairs.values().next().unwrap();
    let cfg = LossConfig::hf();
    let batch = fx.output("logits").dim(0).unwrap();
    let targets: Vec<Target> = (0..batch)
        .map(|i| {
            let (c, b) =
                (fx.input(&format!("labels{i}.class_labels")), fx.input(&format!("labels{i}.boxes")));
            target(&c, &b, &fx.output(&format!("label_map_{i}")))
        })
        .collect();
    let lens = lengths(&fx.input("attention_mask"));

    let aux =
        layer_loss(&cfg, &fx.output("aux0_logits"), &fx.output("aux0_pred_boxes"), &lens, &targets).unwrap();
    check_pairs("aux0", &aux, &pairs["aux0"]);
    check("loss_ce_0", &aux.class, losses["loss_ce_0"]);
    check("loss_bbox_0", &aux.bbox, losses["loss_bbox_0"]);
    check("loss_giou_0", &aux.giou, losses["loss_giou_0"]);

    let logits = Var::from_tensor(&fx.output("logits")).unwrap();
    let boxes = Var::from_tensor(&fx.output("pred_boxes")).unwrap();
    let last = layer_loss(&cfg, &logits, &boxes, &lens, &targets).unwrap();
    check_pairs("final", &last, &pairs["final"]);
    for dict in [&losses, &alone] {
        check("loss_ce", &last.class, dict["loss_ce"]);
        check("loss_bbox", &last.bbox, dict["loss_bbox"]);
        check("loss_giou", &last.giou, dict["loss_giou"]);
    }
    let sum = total(&cfg, &[last]).unwrap();
    check("total", &sum, alone["total_2ce_5l1_2giou"]);
    let grads = sum.backward().unwrap();
    assert_close("grad logits", grads.get(&logits).unwrap(), &fx.output("standalone_grad_logits"), 1e-4);
    assert_close("grad boxes", grads.get(&boxes).unwrap(), &fx.output("standalone_grad_boxes"), 1e-4);
}

#[derive(Deserialize)]
struct Losses {
    weights: BTreeMap<String, f64>,
    cases: BTreeMap<String, BTreeMap<String, f64>>,
}

#[derive(Deserialize)]
struct Assignments {
    cases: BTreeMap<String, BTreeMap<String, Pairs>>,
}

#[derive(Deserialize)]
struct Case {
    /// For a batch the targets are those of the single-picture cases.
    image: Vec<Vec<usize>>,
    captions: Vec<String>,
}

#[derive(Deserialize)]
struct Meta {
    cases: BTreeMap<String, Case>,
}

/// The single-picture cases whose captions this case puts together.
fn parts(meta: &Meta, name: &str) -> Vec<String> {
    let single = |caption: &String| {
        let found = meta.cases.iter().find(|(_, c)| c.image.len() == 1 && c.captions[0] == *caption);
        found.unwrap_or_else(|| panic!("no single case for {caption:?}")).0.clone()
    };
    if meta.cases[name].image.len() == 1 {
        vec![name.to_string()]
    } else {
        meta.cases[name].captions.iter().map(single).collect()
    }
}

#[test]
fn original_losses_and_matchings() {
    let fx = Fixture::open("grounding-dino-original");
    let losses: Losses = fx.json("losses.json");
    let assignments: Assignments = fx.json("assignment.json");
    let meta: Meta = fx.json("meta.json");
    let cfg = LossConfig::original();
    for (name, want) in &losses.cases {
        let targets: Vec<Target> = parts(&meta, name)
            .iter()
            .enumerate()
            .map(|(i, part)| {
                let (c, b) = (fx.input(&format!("{part}.labels")), fx.input(&format!("{part}.boxes")));
                target(&c, &b, &fx.output(&format!("{name}.label_map_{i}")))
            })
            .collect();
        let lens = lengths(&fx.output(&format!("{name}.text_mask")));
        let mut layers = Vec::new();
        for (layer, prefix, suffix) in
            [("final", "", ""), ("aux0", "aux0_", "_0"), ("interm", "interm_", "_interm")]
        {
            let logits = fx.output(&format!("{name}.{prefix}pred_logits"));
            let boxes = fx.output(&format!("{name}.{prefix}pred_boxes"));
            let loss = layer_loss(&cfg, &logits, &boxes, &lens, &targets).unwrap();
            check_pairs(&format!("{name} {layer}"), &loss, &assignments.cases[name][layer]);
            check(&format!("{name} ce{suffix}"), &loss.class, want[&format!("loss_ce{suffix}")]);
            check(&format!("{name} bbox{suffix}"), &loss.bbox, want[&format!("loss_bbox{suffix}")]);
            check(&format!("{name} giou{suffix}"), &loss.giou, want[&format!("loss_giou{suffix}")]);
            for (key, weight) in
                [("ce", cfg.class_weight), ("bbox", cfg.bbox_weight), ("giou", cfg.giou_weight)]
            {
                assert_eq!(losses.weights[&format!("loss_{key}{suffix}")], weight);
            }
            layers.push(loss);
        }
        check(&format!("{name} total"), &total(&cfg, &layers).unwrap(), want["total"]);
    }
}

/// A text mask with gaps would break the assumption that text is padded on the right.
#[test]
fn text_masks_are_prefixes() {
    let fx = Fixture::open("grounding-dino-original");
    let masks: Vec<String> =
        fx.output_names().filter(|n| n.ends_with(".text_mask")).map(str::to_string).collect();
    assert!(!masks.is_empty());
    for name in masks {
        let mask = fx.output(&name);
        let (b, t) = mask.dims2().unwrap();
        let rows = lengths(&mask);
        let built: Vec<u8> =
            (0..b).flat_map(|i| (0..t).map(|c| (c < rows[i]) as u8).collect::<Vec<_>>()).collect();
        let built = Tensor::from_vec(built, (b, t), &super::device()).unwrap();
        assert_eq!(built.to_vec2::<u8>().unwrap(), mask.to_vec2::<u8>().unwrap(), "{name}");
    }
}
