use super::{Fixture, assert_close};
use valor::models::swin::{Config, Swin};

#[test]
pub fn feature_maps_of_every_size() {
    let f = Fixture::open("swin-tiny");
    let cfg: Config = f.json("config.json");
    let swin = Swin::new(&cfg, f.weights()).unwrap();
    for case in ["a", "b", "c_quirk"] {
        let maps = swin.forward(&f.input(case), None).unwrap();
        assert_eq!(maps.len(), cfg.out_indices.len());
        for (map, stage) in maps.iter().zip(&cfg.out_indices) {
            let name = format!("{case}_stage{stage}");
            assert_close(&name, &map.nchw().unwrap(), &f.output(&name), 2e-5);
        }
    }
    let patches = swin.embed(&f.input("a")).unwrap().nchw().unwrap();
    assert_close("a_patch_embed", &patches, &f.output("a_patch_embed"), 1e-5);
}

/// The first stage's map, which the detector does not use.
#[test]
fn first_stage() {
    let f = Fixture::open("swin-tiny");
    let cfg = Config { out_indices: vec![1], ..f.json("config.json") };
    // Its norm is not in the checkpoint; the fixture holds the map before the norm, so that
    // comparing both normalised with weight 1 and bias 0 is what can be done.
    let p = f.trainable();
    let got = Swin::new(&cfg, p.builder()).unwrap().forward(&f.input("a"), None).unwrap();
    let want = f.output("a_hidden_1");
    let (b, c, h, w) = want.dims4().unwrap();
    let want = want.reshape((b, c, h * w)).unwrap().transpose(1, 2).unwrap().contiguous().unwrap();
    let norm = valor::nn::layer_norm(c, 1e-5, valor::nn::Params::new(0).builder()).unwrap();
    let want = norm.forward(&want.to_device(&candle_core::Device::Cpu).unwrap()).unwrap();
    assert_close("a_hidden_1", &got[0].tokens, &want, 2e-5);
}

/// Everything but HF's unused `swin.layernorm` takes part.
#[test]
pub fn every_parameter_has_a_gradient() {
    let f = Fixture::open("swin-tiny");
    let p = f.trainable();
    let swin = Swin::new(&f.json("config.json"), p.builder()).unwrap();
    let maps = swin.forward(&f.input("b"), None).unwrap();
    let loss = maps.iter().map(|m| m.tokens.sqr().unwrap().mean_all().unwrap());
    let loss = loss.reduce(|a, b| (a + b).unwrap()).unwrap();
    let grads = loss.backward().unwrap();
    for (name, var) in p.named() {
        let norm =
            grads.get(&var).map_or(0., |g| g.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
        assert_eq!(norm > 0., !name.starts_with("swin.layernorm"), "{name}: {norm}");
    }
}
