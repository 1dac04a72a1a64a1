//! Qwen3-VL against transformers: processor, vision tower, positions, logits, generation.

use super::{Fixture, assert_close, relative_error};
use candle_core::{D, DType, IndexOp, Tensor};
use std::sync::Mutex;
use valor::models::qwen3::KvCache;
use valor::models::qwen3_vl::{Config, Grid, Pictures, Processor, Qwen3Vl};
use valor::nn::Mask;

const TOL: f64 = 1e-4;
const NAME: &str = "qwen3-vl-tiny";

fn ids(t: &Tensor) -> Vec<Vec<u32>> {
    t.to_dtype(DType::U32).unwrap().to_vec2().unwrap()
}

fn grids(f: &Fixture) -> Vec<Grid> {
    let rows = ids(&f.input("image_grid_thw"));
    rows.iter().map(|r| [r[0] as usize, r[1] as usize, r[2] as usize]).collect()
}

fn pictures(f: &Fixture) -> Pictures {
    Pictures { patches: f.input("pixel_values"), grids: grids(f) }
}

fn model(f: &Fixture) -> Qwen3Vl {
    Qwen3Vl::new(&f.json::<Config>("config.json"), f.weights()).unwrap()
}

#[test]
fn the_processor_matches() {
    let f = Fixture::open(NAME);
    let meta: serde_json::Value = f.json("meta.json");
    let p: Processor = serde_json::from_value(meta["processor"].clone()).unwrap();
    let images: Vec<_> = meta["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|n| image::open(f.dir.join(n.as_str().unwrap())).unwrap().to_rgb8())
        .collect();
    let got = p.process(&images, &super::device()).unwrap();
    assert_eq!(got.grids, grids(&f));
    // The reference's values are Pillow's in f16 for the first picture, torchvision's for both; the
    // two differ by one 8-bit step.
    let pil = f.output("pixel_values_pil_img1").to_dtype(DType::F32).unwrap();
    let first = got.patches.narrow(0, 0, pil.dim(0).unwrap()).unwrap();
    assert_close("Pillow", &first, &pil, 5e-4);
    let step = meta["pil_vs_torchvision_maxdiff"].as_f64().unwrap() + 1e-5;
    assert_close("torchvision", &got.patches, &f.input("pixel_values"), step);
}

#[test]
pub fn the_vision_tower_matches() {
    let f = Fixture::open(NAME);
    let m = model(&f);
    let pics = pictures(&f);
    assert_close(
        "patch_embed",
        &m.visual().embed_patches(&pics.patches).unwrap(),
        &f.output("patch_embed"),
        TOL,
    );
    let v = m.vision(&pics).unwrap();
    assert_close("vision_last_hidden", &v.last_hidden, &f.output("vision_last_hidden"), TOL);
    assert_close("vision_merged", &v.embeds, &f.output("vision_merged"), TOL);
    assert!(!v.deepstack.is_empty());
    for (i, d) in v.deepstack.iter().enumerate() {
        assert_close("deepstack", d, &f.output(&format!("deepstack_{i}")), TOL);
    }
    // One by one as together: pictures do not see each other.
    let alone = Pictures {
        patches: pics.patches.narrow(0, 0, pics.grids[0].iter().product()).unwrap(),
        grids: pics.grids[..1].to_vec(),
    };
    let alone = m.vision(&alone).unwrap().embeds;
    assert_close("alone", &alone, &v.embeds.narrow(0, 0, alone.dim(0).unwrap()).unwrap(), 1e-5);
}

#[test]
fn positions_match() {
    let f = Fixture::open(NAME);
    let row = &ids(&f.input("input_ids"))[0];
    let (got, next) = model(&f).positions(row, &mut grids(&f).into_iter()).unwrap();
    let want = f.output("position_ids_3d").to_dtype(DType::U32).unwrap();
    for axis in 0..3 {
        let want: Vec<u32> = want.i((axis, 0)).unwrap().to_vec1().unwrap();
        assert_eq!(got.iter().map(|p| p[axis]).collect::<Vec<_>>(), want, "axis {axis}");
    }
    let delta = f.output("rope_delta").to_dtype(DType::I64).unwrap().flatten_all().unwrap();
    assert_eq!(next as i64 - row.len() as i64, delta.to_vec1::<i64>().unwrap()[0]);
}

#[test]
pub fn logits_match_with_and_without_pictures() {
    let f = Fixture::open(NAME);
    let m = model(&f);
    let rows = ids(&f.input("input_ids"));
    let hidden = m.forward(&rows, Some(&pictures(&f))).unwrap();
    assert_close("logits", &m.logits(&hidden).unwrap(), &f.output("logits"), TOL);
    let text = m.forward(&ids(&f.input("text_only_input_ids")), None).unwrap();
    assert_close("text_only_logits", &m.logits(&text).unwrap(), &f.output("text_only_logits"), TOL);

    let pics = pictures(&f);
    let embedded = m.embed(&rows, Some(&m.vision(&pics).unwrap())).unwrap();
    let (positions, _) = m.positions(&rows[0], &mut pics.grids.iter().copied()).unwrap();
    let rope = m.rope(&[positions], &super::device()).unwrap();
    let first = Mutex::new(None);
    let hook = |i: usize, x: &Tensor| {
        // HF records the layer's own output, before the deepstack features are added.
        if i == 0 {
            *first.lock().unwrap() = Some(x.clone());
        }
        embedded.deepstack.get(i).map(|d| x + d).transpose()
    };
    m.decoder().forward_embeds(&embedded.x, &rope, &Mask::causal(), None, Some(&hook)).unwrap();
    assert_close("hidden_1", &first.into_inner().unwrap().unwrap(), &f.output("hidden_1"), TOL);
}

#[test]
pub fn cached_greedy_tokens_match() {
    let f = Fixture::open(NAME);
    let m = model(&f);
    let pics = pictures(&f);
    let row = ids(&f.input("input_ids")).remove(0);
    let want = ids(&f.output("generated")).remove(0);
    let steps = want.len() - row.len();
    assert!(steps > 0);
    let mut cache =
        KvCache::new(&m.config().text_config.decoder, 1, want.len(), DType::F32, &super::device()).unwrap();
    let (positions, mut next) = m.positions(&row, &mut pics.grids.iter().copied()).unwrap();
    let embedded = m.embed(std::slice::from_ref(&row), Some(&m.vision(&pics).unwrap())).unwrap();
    let rope = m.rope(&[positions], &super::device()).unwrap();
    let mut hidden = m.forward_embedded(&embedded, &rope, &Mask::causal(), Some(&mut cache)).unwrap();
    let mut got = row;
    for _ in 0..steps {
        let last = hidden.i((.., hidden.dim(1).unwrap() - 1)).unwrap();
        let id = m.logits(&last).unwrap().argmax(D::Minus1).unwrap().to_vec1::<u32>().unwrap()[0];
        got.push(id);
        let rope = m.rope(&[vec![[next; 3]]], &super::device()).unwrap();
        next += 1;
        let x = Tensor::new(&[[id]], &super::device()).unwrap();
        hidden = m.decoder().forward(&x, &rope, &Mask::causal(), Some(&mut cache)).unwrap();
    }
    assert_eq!(got, want);
}

#[test]
pub fn every_parameter_receives_a_gradient() {
    let f = Fixture::open(NAME);
    let params = f.trainable();
    let m = Qwen3Vl::new(&f.json::<Config>("config.json"), params.builder()).unwrap();
    let rows = ids(&f.input("input_ids"));
    let hidden = m.forward(&rows, Some(&pictures(&f))).unwrap();
    let n = rows[0].len() - 1;
    let targets = Tensor::new(&rows[0][1..], &super::device()).unwrap();
    let flat = hidden.i((0, ..n)).unwrap();
    let loss = m.decoder().token_log_probs(&flat, &targets).unwrap().mean_all().unwrap();
    let grads = loss.backward().unwrap();
    for (name, var) in params.named() {
        let g = grads.get(&var).unwrap_or_else(|| panic!("{name} has no gradient"));
        let norm = g.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(norm.is_finite() && norm > 0., "{name}: {norm}");
    }
    // Against a central difference along the gradient of a vision weight.
    let name = "model.visual.blocks.0.attn.qkv.weight";
    let var = params.get(name).unwrap();
    let g = grads.get(&var).unwrap().clone();
    let norm2 = g.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap() as f64;
    let base = var.as_tensor().copy().unwrap();
    let at = |h: f64| -> f64 {
        var.set(&(&base + (&g * (h / norm2.sqrt())).unwrap()).unwrap()).unwrap();
        let hidden = m.forward(&rows, Some(&pictures(&f))).unwrap().i((0, ..n)).unwrap();
        let lp = m.decoder().token_log_probs(&hidden, &targets).unwrap().to_dtype(DType::F64).unwrap();
        lp.mean_all().unwrap().to_scalar().unwrap()
    };
    let h = 2e-2;
    let numeric = (at(h) - at(-h)) / (2. * h);
    assert!((numeric - norm2.sqrt()).abs() <= 2e-2 * norm2.sqrt(), "{numeric} against {}", norm2.sqrt());
}

#[test]
fn batch_mates_change_nothing() {
    let f = Fixture::open(NAME);
    let m = model(&f);
    let pics = pictures(&f);
    let row = ids(&f.input("input_ids")).remove(0);
    let alone = m.forward(std::slice::from_ref(&row), Some(&pics)).unwrap();
    let both = Pictures::cat(&[&pics, &pics]).unwrap();
    let twice = m.forward(&[row.clone(), row], Some(&both)).unwrap();
    for b in 0..2 {
        assert!(relative_error(&twice.narrow(0, b, 1).unwrap(), &alone, 1e-3) < 1e-5);
    }
}
