use super::{Fixture, assert_close};
use candle_core::Tensor;
use std::collections::BTreeSet;
use valor::models::dinov2::{Config, Dinov2, HfConfig, OfficialConfig};

fn config(f: &Fixture) -> Config {
    f.json::<HfConfig>("config.json").into()
}

#[test]
pub fn hidden_states_and_outputs() {
    let f = Fixture::open("dinov2-tiny");
    let cfg = config(&f);
    let net = Dinov2::new(&cfg, f.weights()).unwrap();
    let x = f.input("pixel_values");
    let states = net.hidden_states(&x).unwrap();
    for (i, s) in states.iter().enumerate() {
        for name in [format!("hidden_{i}"), format!("hidden_{i}_prenorm")] {
            if f.output_names().any(|n| n == name) {
                assert_close(&name, s, &f.output(&name), 1e-5);
            }
        }
    }
    let y = net.forward(&x).unwrap();
    assert_close("last_hidden_state", &y, &f.output("last_hidden_state"), 1e-5);
    let cls = y.narrow(1, 0, 1).unwrap().squeeze(1).unwrap();
    assert_close("pooler_output", &cls, &f.output("pooler_output"), 1e-5);
    let native = net.forward(&f.input("pixel_values_native")).unwrap();
    assert_close("native", &native, &f.output("native_last_hidden_state"), 1e-5);
}

#[test]
fn both_ways_to_interpolate_positions() {
    let f = Fixture::open("dinov2-tiny");
    let cfg = config(&f);
    let (_, _, h, w) = f.input("pixel_values").dims4().unwrap();
    let (rows, cols) = (h / cfg.patch, w / cfg.patch);
    let hf = Dinov2::new(&cfg, f.weights()).unwrap().positions(rows, cols).unwrap();
    assert_close("by size", &hf, &f.output("interp_pos_hf_size"), 1e-5);
    let official = Config { position_offset: 0.1, ..cfg };
    let official = Dinov2::new(&official, f.weights()).unwrap().positions(rows, cols).unwrap();
    let patches = official.narrow(1, 1, rows * cols).unwrap();
    assert_close("by scale factor", &patches, &f.output("interp_pos_official_offset0.1_patches"), 1e-5);
}

/// The same weights under the official names give the same network.
#[test]
fn official_names() {
    let f = Fixture::open("dinov2-tiny");
    let cfg = config(&f);
    let path = f.dir.join("model.safetensors");
    let hf = candle_core::safetensors::load(path, &super::device()).unwrap();
    let mut official = std::collections::HashMap::new();
    for (name, t) in &hf {
        if name.contains(".key.") || name.contains(".value.") {
            continue;
        }
        let (t, name) = if name.contains(".query.") {
            let parts = ["query", "key", "value"].map(|p| hf[&name.replace("query", p)].clone());
            (Tensor::cat(&parts, 0).unwrap(), name.replace("attention.attention.query", "attn.qkv"))
        } else {
            (t.clone(), name.clone())
        };
        let name = name
            .replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
            .replace("embeddings.position_embeddings", "pos_embed")
            .replace("embeddings.", "")
            .replace("encoder.layer.", "blocks.")
            .replace("attention.output.dense", "attn.proj")
            .replace("layer_scale1.lambda1", "ls1.gamma")
            .replace("layer_scale2.lambda1", "ls2.gamma");
        official.insert(name.replace("layernorm.", "norm."), t);
    }
    let vb = candle_nn::VarBuilder::from_tensors(official, f.weights().dtype(), &super::device());
    let net = Dinov2::new(
        &Config {
            position_offset: 0.,
            eps: cfg.eps,
            ..OfficialConfig {
                img_size: cfg.image_size,
                patch_size: cfg.patch,
                embed_dim: cfg.dim,
                depth: cfg.layers,
                num_heads: cfg.heads,
                mlp_ratio: cfg.mlp_ratio,
                ..OfficialConfig::released("dinov2_vits14").unwrap()
            }
            .into()
        },
        vb,
    )
    .unwrap();
    let y = net.forward(&f.input("pixel_values")).unwrap();
    assert_close("last_hidden_state", &y, &f.output("last_hidden_state"), 1e-5);
}

#[test]
fn hidden_patches_have_no_say_and_all_kept_is_none_hidden() {
    let f = Fixture::open("dinov2-tiny");
    for registers in [0, 4] {
        let cfg = Config { registers, ..config(&f) };
        let net = Dinov2::new(&cfg, valor::nn::Params::new(1).builder()).unwrap();
        let x = f.input("pixel_values").to_device(&candle_core::Device::Cpu).unwrap();
        let (_, _, h, w) = x.dims4().unwrap();
        let (p, cols) = (cfg.patch, w / cfg.patch);
        let layers = [0, cfg.layers - 1];
        let of = |x: &Tensor, kept: Option<&[u32]>| net.intermediate(x, &layers, kept).unwrap();
        let all: Vec<u32> = (0..(h / p * cols) as u32).collect();
        let same = |a: Vec<(Tensor, Tensor)>, b: Vec<(Tensor, Tensor)>| {
            for ((patches, cls), (want, want_cls)) in a.into_iter().zip(b) {
                assert_close("patches", &patches, &want, 1e-6);
                assert_close("class token", &cls, &want_cls, 1e-6);
            }
        };
        same(of(&x, Some(&all)), of(&x, None));
        // The first and the last patch are hidden: whatever stands there, and only there, changes nothing.
        let kept = &all[1..all.len() - 1];
        let black = |x: &Tensor, row: usize, col: usize| {
            let corner = Tensor::zeros((1, cfg.channels, p, p), x.dtype(), x.device()).unwrap();
            let corner =
                corner.expand((x.dim(0).unwrap(), cfg.channels, p, p)).unwrap().contiguous().unwrap();
            let at = [0..x.dim(0).unwrap(), 0..cfg.channels, row * p..row * p + p, col * p..col * p + p];
            x.slice_assign(&at, &corner).unwrap()
        };
        let changed = black(&black(&x, 0, 0), h / p - 1, cols - 1);
        let [(first, _), (last, cls)] = &of(&x, Some(kept))[..] else { panic!("two layers") };
        assert_eq!((first.dim(1).unwrap(), last.dim(1).unwrap()), (kept.len(), kept.len()));
        same(of(&changed, Some(kept)), of(&x, Some(kept)));
        let seen = of(&black(&x, 0, 1), Some(kept));
        let moved = (&seen[1].1 - cls).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(moved > 1e-4, "a patch that is kept has its say: {moved}");
    }
}

#[test]
fn every_parameter_receives_a_gradient() {
    let f = Fixture::open("dinov2-tiny");
    for (swiglu, registers) in [(false, 0), (true, 4)] {
        let cfg = Config { swiglu, registers, ..config(&f) };
        let params = valor::nn::Params::new(1);
        let net = Dinov2::new(&cfg, params.builder()).unwrap();
        let y = net.forward(&f.input("pixel_values").to_device(&candle_core::Device::Cpu).unwrap()).unwrap();
        let grads =
            y.sqr().unwrap().narrow(2, 0, cfg.dim / 2).unwrap().sum_all().unwrap().backward().unwrap();
        let without: BTreeSet<String> = params
            .named()
            .into_iter()
            .filter(|(_, v)| {
                let g = grads.get(v).map(|g| g.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
                !g.is_some_and(|g| g > 0.)
            })
            .map(|(n, _)| n)
            .collect();
        assert!(without.is_empty(), "no gradient: {without:?}");
    }
}
