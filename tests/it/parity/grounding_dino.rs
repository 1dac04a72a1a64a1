//! Forward passes against HF's and the original's, and text masks, names, options.

use super::{Fixture, assert_close, relative_error};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use std::collections::HashMap;
use valor::models::grounding_dino::{Config, GroundingDino, Inputs, Outputs, Trace, names, text_masks};
use valor::nn::Params;

pub fn config(f: &Fixture) -> Config {
    Config::from_json(&std::fs::read_to_string(f.dir.join("config.json")).unwrap()).unwrap()
}

pub fn load(f: &Fixture) -> HashMap<String, Tensor> {
    let t = candle_core::safetensors::load(f.dir.join("model.safetensors"), &super::device()).unwrap();
    if names::is_original(t.keys().map(String::as_str)) { names::to_hf(t).unwrap() } else { t }
}

fn ids(t: Tensor) -> Tensor {
    t.to_dtype(DType::U32).unwrap()
}

fn ones(like: &Tensor) -> Tensor {
    like.ones_like().unwrap()
}

/// Within an absolute error; infinities must agree in place.
#[track_caller]
fn within(name: &str, got: &Tensor, want: &Tensor, tol: f64) {
    let e = relative_error(got, want, 1.);
    let scale = want.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let scale = scale.into_iter().filter(|x| x.is_finite()).fold(1f32, |m, x| m.max(x.abs())) as f64;
    assert!(e * scale <= tol, "{name}: error {:.2e} over {tol:.0e}", e * scale);
}

/// The fixtures store the first columns of the logits.
#[track_caller]
fn logits_within(name: &str, got: &Tensor, want: &Tensor, max: usize) {
    assert_eq!(got.dim(2).unwrap(), max, "{name}: columns");
    let n = want.dim(2).unwrap();
    within(name, &got.narrow(2, 0, n).unwrap(), want, 1e-4);
    let rest = got.narrow(2, n, max - n).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(rest.iter().all(|x| *x == f32::NEG_INFINITY), "{name}: columns beyond the prompt");
}

pub fn hf_inputs(f: &Fixture) -> Inputs {
    let mut x = Inputs::new(
        f.input("pixel_values"),
        Some(f.input("pixel_mask")),
        ids(f.input("input_ids")),
        f.input("attention_mask"),
        &config(f).special_tokens,
    )
    .unwrap();
    x.token_type_ids = Some(ids(f.input("token_type_ids")));
    x
}

fn traced(f: &Fixture, inputs: &Inputs) -> (Config, Outputs, Trace) {
    let cfg = config(f);
    let vb = VarBuilder::from_tensors(load(f), DType::F32, &super::device());
    let (out, trace) = GroundingDino::new(&cfg, vb).unwrap().trace(inputs).unwrap();
    (cfg, out, trace)
}

#[track_caller]
fn check(f: &Fixture, trace: &Trace, pairs: &[(&str, &str)]) {
    for (ours, theirs) in pairs {
        let got = trace.0.get(*ours).unwrap_or_else(|| panic!("no trace of {ours}"));
        let want = f.output(theirs);
        let got = got.broadcast_as(want.shape()).unwrap();
        assert_close(theirs, &got, &want, 1e-4);
    }
}

#[test]
pub fn hf_padded_batch_with_intermediates() {
    let f = Fixture::open("grounding-dino-tiny");
    let inputs = hf_inputs(&f);
    let as_f32 = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
    assert_close(
        "text masks",
        &as_f32(&inputs.text_self_mask),
        &as_f32(&f.output("text_self_attention_masks")),
        0.,
    );
    assert_close("positions", &as_f32(&inputs.position_ids), &as_f32(&f.output("text_position_ids")), 0.);
    let (cfg, out, trace) = traced(&f, &inputs);
    check(
        &f,
        &trace,
        &[
            ("text.bert", "bert_last_hidden"),
            ("text.projected", "text_projected"),
            ("backbone.0", "backbone_0"),
            ("backbone.1", "backbone_1"),
            ("backbone.2", "backbone_2"),
            ("vision", "vision_flat_in"),
            ("position", "vision_pos_embed_plus_level"),
            ("valid_ratios", "valid_ratios"),
            ("encoder.0.fused_vision", "enc0_fused_vision"),
            ("encoder.0.fused_text", "enc0_fused_text"),
            ("encoder.0.text", "enc0_text_enhanced"),
            ("encoder.0.text", "enc0_text"),
            ("encoder.0.vision", "enc0_vision"),
            ("encoder.memory", "encoder_last_hidden_state_vision"),
            ("encoder.text", "encoder_last_hidden_state_text"),
            ("proposals.features", "enc_object_query"),
            ("proposals.box_logits", "enc_outputs_coord_logits"),
            ("decoder.0.hidden", "dec0_hidden"),
            ("decoder.reference.0", "init_reference_points"),
        ],
    );
    let last = cfg.decoder_layers - 1;
    check(&f, &trace, &[(&format!("decoder.{last}.query_pos"), "dec_query_pos_last")]);
    check(&f, &trace, &[(&format!("decoder.{last}.normed"), "last_hidden_state")]);
    let stack = |name: &dyn Fn(usize) -> String| {
        let t: Vec<_> = (0..=last).map(|i| trace.0[&name(i)].clone()).collect();
        Tensor::stack(&t, 1).unwrap()
    };
    let hidden = stack(&|i| format!("decoder.{i}.normed"));
    assert_close("intermediate hidden", &hidden, &f.output("intermediate_hidden_states"), 1e-4);
    let references = stack(&|i| format!("decoder.reference.{}", i + 1));
    within("intermediate references", &references, &f.output("intermediate_reference_points"), 1e-5);

    // HF's vision mask is true in padding.
    let real = trace.0["real"].squeeze(2).unwrap();
    assert_close("padding", &(1. - real).unwrap(), &as_f32(&f.output("vision_padding_mask")), 0.);
    let sine = f.output("sine_pos_level0");
    let n = sine.dim(2).unwrap() * sine.dim(3).unwrap();
    let level0 = trace.0["sine"].narrow(1, 0, n).unwrap().transpose(1, 2).unwrap();
    assert_close("sine", &level0.reshape(sine.shape()).unwrap(), &sine, 1e-5);

    let class = f.output("enc_outputs_class");
    let t = class.dim(2).unwrap();
    within("enc_outputs_class", &trace.0["proposals.class"].narrow(2, 0, t).unwrap(), &class, 1e-4);
    assert_close("topk", &as_f32(&out.topk), &as_f32(&f.output("topk_indices")), 0.);
    within("pred_boxes", &out.boxes[last], &f.output("pred_boxes"), 1e-5);
    within("encoder_pred_boxes", &out.encoder_boxes, &f.output("encoder_pred_boxes"), 1e-5);
    logits_within("logits", &out.logits[last], &f.output("logits"), cfg.max_text_len);
    logits_within("encoder logits", &out.encoder_logits, &f.output("encoder_logits_hf"), cfg.max_text_len);
}

#[test]
fn hf_first_decoder_layer() {
    let f = Fixture::open("grounding-dino-loss");
    let model = Fixture::open("grounding-dino-tiny");
    let (cfg, out, _) = traced(&model, &hf_inputs(&model));
    within("aux0 boxes", &out.boxes[0], &f.output("aux0_pred_boxes"), 1e-5);
    logits_within("aux0 logits", &out.logits[0], &f.output("aux0_logits"), cfg.max_text_len);
}

#[test]
fn hf_wide_picture_without_padding() {
    let f = Fixture::open("grounding-dino-tiny");
    let cfg = config(&f);
    let t = ids(f.input("wide_input_ids"));
    let inputs =
        Inputs::new(f.input("wide_pixel_values"), None, t.clone(), ones(&t), &cfg.special_tokens).unwrap();
    let (cfg, out, trace) = traced(&f, &inputs);
    check(&f, &trace, &[("decoder.reference.0", "wide_init_reference_points")]);
    let last = cfg.decoder_layers - 1;
    within("boxes", &out.boxes[last], &f.output("wide_pred_boxes"), 1e-5);
    logits_within("logits", &out.logits[last], &f.output("wide_logits"), cfg.max_text_len);
    // A mask that hides nothing changes nothing.
    let (b, _, h, w) = inputs.pixel_values.dims4().unwrap();
    let full = Tensor::ones((b, h, w), DType::U8, &super::device()).unwrap();
    let (_, same, _) = traced(&f, &Inputs { pixel_mask: Some(full), ..inputs });
    within("boxes with a full mask", &same.boxes[last], &out.boxes[last], 1e-6);
}

/// The order of the queries is part of the answer: the i-th best token gets the i-th learned embedding.
/// Whoever compares implementations must therefore compare on the same queries.
#[test]
fn hf_given_queries() {
    let f = Fixture::open("grounding-dino-tiny");
    let inputs = hf_inputs(&f);
    let vb = VarBuilder::from_tensors(load(&f), DType::F32, &super::device());
    let (cfg, model) = (config(&f), GroundingDino::new(&config(&f), vb).unwrap());
    let last = cfg.decoder_layers - 1;
    let topk = ids(f.output("topk_indices"));
    let same = model.forward_on(&inputs, &topk).unwrap();
    within("pred_boxes", &same.boxes[last], &f.output("pred_boxes"), 1e-5);
    logits_within("logits", &same.logits[last], &f.output("logits"), cfg.max_text_len);

    // The first picture's best and last queries change places, the second picture's stay.
    let mut order = topk.to_vec2::<u32>().unwrap();
    let q = order[0].len();
    order[0].swap(0, q - 1);
    let swapped = Tensor::new(order.clone(), &super::device()).unwrap();
    let out = model.forward_on(&inputs, &swapped).unwrap();
    assert_eq!(out.topk.to_vec2::<u32>().unwrap(), order);
    let row = |t: &Tensor, picture: usize, i: usize| t.get(picture).unwrap().get(i).unwrap();
    for i in 0..q {
        let from = if i == 0 || i == q - 1 { q - 1 - i } else { i };
        within("proposals", &row(&out.encoder_boxes, 0, i), &row(&same.encoder_boxes, 0, from), 1e-6);
    }
    let (got, plain) = (&out.boxes[last], &same.boxes[last]);
    within("the other picture", &got.get(1).unwrap(), &plain.get(1).unwrap(), 1e-6);
    for (i, from) in [(0, 0), (0, q - 1), (q - 1, q - 1), (q - 1, 0)] {
        let e = relative_error(&row(got, 0, i), &row(plain, 0, from), 1.);
        assert!(e > 1e-4, "query {i} answers as query {from} without the change: {e:.1e}");
    }

    let tokens = f.output("enc_outputs_class").dim(1).unwrap() as u32;
    order[0][0] = tokens;
    let e =
        model.forward_on(&inputs, &Tensor::new(order, &super::device()).unwrap()).unwrap_err().to_string();
    assert!(e.contains(&format!("under {tokens}")), "{e}");
    assert!(model.forward_on(&inputs, &swapped.narrow(0, 0, 1).unwrap()).is_err());
}

/// The original's pictures, as `case` stores them. Its masks are true in padding.
pub fn original_inputs(f: &Fixture, case: &str) -> Inputs {
    let special = config(f).special_tokens;
    let real = |m: Tensor| m.eq(0u8).unwrap();
    if case != "batch2" {
        let mask = (case == "c").then(|| real(f.input("c.padding_mask")));
        let t = ids(f.input(&format!("{case}.input_ids")));
        let pixels = f.input(&format!("{case}.pixel_values"));
        return Inputs::new(pixels, mask, t.clone(), ones(&t), &special).unwrap();
    }
    // Two of the cases on one canvas.
    let padding = f.input("batch2.padding_mask");
    let (_, h, w) = padding.dims3().unwrap();
    let valid = f.input("c.valid_hw").to_dtype(DType::I64).unwrap().to_vec1::<i64>().unwrap();
    let c = f.input("c.pixel_values");
    let c = c.narrow(2, 0, valid[0] as usize).unwrap().narrow(3, 0, valid[1] as usize).unwrap();
    let pixels = [f.input("a.pixel_values"), c].map(|p| {
        let (_, _, ph, pw) = p.dims4().unwrap();
        p.pad_with_zeros(2, 0, h - ph).unwrap().pad_with_zeros(3, 0, w - pw).unwrap()
    });
    let mut inputs = Inputs::new(
        Tensor::cat(&pixels, 0).unwrap(),
        Some(real(padding)),
        ids(f.input("batch2.input_ids")),
        f.input("batch2.attention_mask"),
        &special,
    )
    .unwrap();
    inputs.token_type_ids = Some(ids(f.input("batch2.token_type_ids")));
    inputs
}

/// Of the batch the case with the right text mask: `batch2_asis` repeats masks in the order of (head, batch), as the
/// original does in batches, where one picture's prompt masks another's.
pub const CASES: [(&str, &str); 5] =
    [("a", "a"), ("b", "b"), ("c", "c"), ("d", "d"), ("batch2", "batch2_fixedmask")];

#[test]
pub fn original_every_case() {
    let f = Fixture::open("grounding-dino-original");
    for (case, name) in CASES {
        let inputs = original_inputs(&f, case);
        let (cfg, out, trace) = traced(&f, &inputs);
        let key = |what: &str| format!("{name}.{what}");
        // candle's GPU knows no 32-bit integers with a sign.
        let as_f32 = |t: &Tensor| t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
        for (got, what) in [
            (&inputs.text_self_mask, "text_self_attention_masks"),
            (&inputs.position_ids, "text_position_ids"),
            (&out.topk, "topk_indices"),
        ] {
            assert_close(&key(what), &as_f32(got), &as_f32(&f.output(&key(what))), 0.);
        }
        check(
            &f,
            &trace,
            &[
                ("text.bert", &key("bert_last_hidden")),
                ("text.projected", &key("text_feat_map")),
                ("encoder.text", &key("text_memory_final")),
            ],
        );
        within(
            &key("init_box_proposal"),
            &trace.0["proposals.initial"],
            &f.output(&key("init_box_proposal")),
            1e-5,
        );
        let last = cfg.decoder_layers - 1;
        for (got, what) in [
            (&out.boxes[last], "pred_boxes"),
            (&out.boxes[0], "aux0_pred_boxes"),
            (&out.encoder_boxes, "interm_pred_boxes"),
        ] {
            within(&key(what), got, &f.output(&key(what)), 1e-5);
        }
        for (got, what) in [
            (&out.logits[last], "pred_logits"),
            (&out.logits[0], "aux0_pred_logits"),
            (&out.encoder_logits, "interm_pred_logits"),
        ] {
            logits_within(&key(what), got, &f.output(&key(what)), cfg.max_text_len);
        }
        let references: Vec<_> =
            (0..=cfg.decoder_layers).map(|i| trace.0[&format!("decoder.reference.{i}")].clone()).collect();
        let references = Tensor::stack(&references, 0).unwrap();
        within(&key("decoder_references"), &references, &f.output(&key("decoder_references")), 1e-5);
    }
}

#[test]
pub fn original_intermediates() {
    let f = Fixture::open("grounding-dino-original");
    let (_, _, trace) = traced(&f, &original_inputs(&f, "a"));
    check(
        &f,
        &trace,
        &[
            ("backbone.0", "a.backbone_0"),
            ("backbone.1", "a.backbone_1"),
            ("backbone.2", "a.backbone_2"),
            ("input_proj.0", "a.input_proj_0"),
            ("input_proj.1", "a.input_proj_1"),
            ("input_proj.2", "a.input_proj_2"),
            ("input_proj.3", "a.input_proj_3"),
            ("position", "a.pos_plus_level"),
            ("valid_ratios", "a.valid_ratios"),
            ("encoder.0.fused_vision", "a.enc0_fused_vision"),
            ("encoder.0.fused_text", "a.enc0_fused_text"),
            ("encoder.0.text", "a.enc0_text"),
            ("encoder.0.vision", "a.enc0_vision"),
            ("encoder.memory", "a.encoder_memory"),
            ("proposals.features", "a.enc_object_query"),
            ("decoder.0.query_pos", "a.dec0_query_pos"),
            ("decoder.0.hidden", "a.dec0_hidden"),
        ],
    );
    let hs = Tensor::stack(&[&trace.0["decoder.0.normed"], &trace.0["decoder.1.normed"]], 0).unwrap();
    assert_close("hidden", &hs, &f.output("a.decoder_hs_normed"), 1e-4);
    let class = f.output("a.enc_class_logits_all");
    let got = trace.0["proposals.class"].narrow(2, 0, class.dim(2).unwrap()).unwrap();
    within("enc_class_logits_all", &got, &class, 1e-4);
}

#[test]
fn text_masks_of_odd_prompts() {
    #[derive(serde::Deserialize)]
    struct Case {
        text: String,
        ids: Vec<u32>,
        mask: Vec<Vec<u8>>,
        position_ids: Vec<u32>,
    }
    let f = Fixture::open("grounding-dino-tiny");
    let special = config(&f).special_tokens;
    for c in f.json::<Vec<Case>>("text_mask_cases.json") {
        let t = Tensor::new(vec![c.ids], &super::device()).unwrap();
        let (mask, positions) = text_masks(&t, &special).unwrap();
        assert_eq!(mask.to_vec3::<u8>().unwrap()[0], c.mask, "{:?}", c.text);
        assert_eq!(positions.to_vec2::<u32>().unwrap()[0], c.position_ids, "{:?}", c.text);
    }
}

#[test]
fn names_follow_the_published_map_both_ways() {
    #[derive(serde::Deserialize)]
    struct Entry {
        op: String,
        hf: Option<serde_json::Value>,
    }
    #[derive(serde::Deserialize)]
    struct Map {
        map: HashMap<String, Entry>,
        released_checkpoint_extras_to_ignore: Vec<String>,
    }
    let f = Fixture::open("grounding-dino-original");
    let map: Map = f.json("names_original_to_hf.json");
    let mut original =
        candle_core::safetensors::load(f.dir.join("model.safetensors"), &super::device()).unwrap();
    let stored = original.clone();
    for extra in map.released_checkpoint_extras_to_ignore {
        original.insert(extra, Tensor::zeros(1, DType::F32, &super::device()).unwrap());
    }
    let prefixed = original.into_iter().map(|(n, t)| (format!("module.{n}"), t)).collect();
    let hf = names::to_hf(prefixed).unwrap();
    let mut expected = std::collections::BTreeSet::new();
    for (name, e) in &map.map {
        match (e.op.as_str(), &e.hf) {
            ("drop", _) => {}
            ("split3_dim0", Some(serde_json::Value::Array(parts))) => {
                for (i, part) in parts.iter().enumerate() {
                    let part = part.as_str().unwrap();
                    let want = stored[name].chunk(3, 0).unwrap()[i].clone();
                    assert_close(part, &hf[part], &want, 0.);
                    expected.insert(part.to_string());
                }
            }
            (_, Some(serde_json::Value::String(n))) => {
                assert_close(n, &hf[n], &stored[name], 0.);
                expected.insert(n.clone());
            }
            other => panic!("{name}: {other:?}"),
        }
    }
    assert_eq!(expected, hf.keys().cloned().collect());
    let back = names::to_original(hf, config(&f).decoder_layers).unwrap();
    for (name, tensor) in &back {
        assert_close(name, tensor, &stored[name], 0.);
    }
    let missing: Vec<_> = stored.keys().filter(|n| !back.contains_key(*n)).collect();
    assert!(missing.iter().all(|n| map.map[*n].op == "drop"), "{missing:?}");
}

#[test]
fn strange_names_and_unshared_heads_are_errors() {
    let f = Fixture::open("grounding-dino-original");
    let stored = candle_core::safetensors::load(f.dir.join("model.safetensors"), &super::device()).unwrap();
    let mut odd = stored.clone();
    let strange = ["transformer.decoder.layers.0.nonsense", "ema.decay"];
    odd.extend(strange.map(|name| (name.to_owned(), stored["transformer.level_embed"].clone())));
    let e = names::to_hf(odd).unwrap_err().to_string();
    assert!(strange.iter().all(|name| e.contains(name)) && e.contains("without them"), "{e}");
    let mut apart = stored;
    let name = "transformer.decoder.bbox_embed.1.layers.0.bias";
    let moved = (&apart[name] + 1.).unwrap();
    apart.insert(name.into(), moved);
    assert!(names::to_hf(apart).unwrap_err().to_string().contains("bbox_embed"));
}

/// Everything a trainer may rely on, on the fixture's sizes.
fn fresh(f: &Fixture, change: impl FnOnce(&mut Config)) -> (Config, Params, GroundingDino) {
    let mut cfg = config(f);
    change(&mut cfg);
    let params = Params::placed(0, load(f), DType::F32, &super::device()).unwrap();
    let model = GroundingDino::new(&cfg, params.builder()).unwrap();
    (cfg, params, model)
}

#[test]
fn fewer_tokens_than_queries_and_long_prompts() {
    let f = Fixture::open("grounding-dino-original");
    let (cfg, _, model) = fresh(&f, |c| c.max_text_len = 5);
    let x = original_inputs(&f, "a");
    let pixels = x.pixel_values.narrow(2, 0, 24).unwrap().narrow(3, 0, 24).unwrap();
    let out = model.forward(&Inputs { pixel_values: pixels, ..x }, None).unwrap();
    // 24 × 24: 3², 2², 1 and 1 tokens.
    let n = 9 + 4 + 1 + 1;
    assert!(n < cfg.num_queries);
    assert_eq!(out.boxes[0].dims(), [1, n, 4]);
    assert_eq!(out.logits[0].dims(), [1, n, 5]);
    assert_eq!(out.topk.dims(), [1, n]);
}

#[test]
fn scaled_and_biased_class_logits() {
    let f = Fixture::open("grounding-dino-original");
    let x = original_inputs(&f, "a");
    let (cfg, _, plain) = fresh(&f, |_| {});
    let (_, params, model) = fresh(&f, |c| {
        c.class_logit_scale = true;
        c.class_logit_bias = Some(-4.);
    });
    let (a, b) = (plain.forward(&x, None).unwrap(), model.forward(&x, None).unwrap());
    let t = x.input_ids.dim(1).unwrap();
    let real = |o: &Outputs| o.logits[1].narrow(2, 0, t).unwrap();
    let want = ((real(&a) * (1. / (cfg.d_model as f64).sqrt())).unwrap() - 4.).unwrap();
    within("logits", &real(&b), &want, 1e-4);
    let loss =
        (real(&b).sum_all().unwrap() + b.encoder_logits.narrow(2, 0, t).unwrap().sum_all().unwrap()).unwrap();
    let grads = loss.backward().unwrap();
    for name in ["class_embed.1.bias", "model.encoder_output_class_embed.bias"] {
        assert!(grads.get(&params.get(name).unwrap()).is_some(), "{name}");
    }
}

#[test]
fn frozen_parts_get_no_gradient_and_change_no_output() {
    let f = Fixture::open("grounding-dino-original");
    let x = original_inputs(&f, "c");
    let (_, _, plain) = fresh(&f, |_| {});
    let (_, params, model) = fresh(&f, |c| {
        c.freeze.backbone = true;
        c.freeze.text = true;
    });
    let out = model.forward(&x, None).unwrap();
    // What is frozen goes by other kernels on a GPU, which round otherwise.
    within("boxes", &out.boxes[1], &plain.forward(&x, None).unwrap().boxes[1], 1e-6);
    let grads = out.boxes[1].sum_all().unwrap().backward().unwrap();
    let has = |part: &str| params.named().iter().any(|(n, v)| n.contains(part) && grads.get(v).is_some());
    assert!(!has("model.backbone.") && !has("model.text_backbone."));
    assert!(has("model.text_projection.") && has("model.input_proj_vision.0"));
}

#[test]
fn training_mode_follows_its_seed() {
    let f = Fixture::open("grounding-dino-original");
    let x = original_inputs(&f, "a");
    let (_, _, model) = fresh(&f, |c| {
        c.dropout = 0.1;
        c.fusion_droppath = 0.5;
        c.fusion_dropout = 0.1;
        c.text_config.attention_probs_dropout_prob = 0.1;
        c.backbone_config.drop_path_rate = 0.5;
    });
    let run = |seed| {
        let mut ctx = valor::nn::TrainCtx::new(seed);
        let out = model.forward(&x, Some(&mut ctx)).unwrap();
        out.boxes[1].flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}
