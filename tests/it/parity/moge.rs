use super::{Fixture, assert_close};
use candle_core::{DType, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use valor::models::moge::{self, Config, MoGe, Tokens, Tolerance, recover_focal_shift};
use valor::sight::Depth;

/// MoGe's own folder, its config, and the numbers of tokens it was run with.
fn open() -> (Fixture, Config, Vec<usize>) {
    let f = Fixture::open("moge2-tiny");
    let cfg = f.json("config.json");
    let counts: BTreeSet<usize> =
        f.output_names().filter_map(|n| n.strip_prefix("nt")?.split_once('.')?.0.parse().ok()).collect();
    assert!(!counts.is_empty(), "no outputs by number of tokens");
    (f, cfg, counts.into_iter().collect())
}

fn triples(t: &Tensor) -> Vec<[f32; 3]> {
    let v = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    v.chunks(3).map(|c| [c[0], c[1], c[2]]).collect()
}

fn floats(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn flags(t: &Tensor) -> Vec<bool> {
    floats(t).iter().map(|v| *v != 0.).collect()
}

#[test]
pub fn encoder_neck_and_heads() {
    let (f, cfg, counts) = open();
    let net = MoGe::new(&cfg, f.weights()).unwrap();
    let image = f.input("image");
    let (_, _, h, w) = image.dims4().unwrap();
    let meta: serde_json::Value = f.json("meta.json");
    for n in counts {
        let check = |name: &str, got: &Tensor, tol: f64| {
            let name = format!("nt{n}.{name}");
            assert_close(&name, got, &f.output(&name), tol);
        };
        let (rows, cols) = MoGe::grid(w, h, n);
        let want: [usize; 2] = serde_json::from_value(meta[format!("nt{n}.base_hw")].clone()).unwrap();
        assert_eq!([rows, cols], want);
        let aspect = w as f64 / h as f64;
        check("uv_level0", &moge::view_plane_uv(rows, cols, aspect, &super::device()).unwrap(), 1e-6);
        check("pos_embed", &net.backbone().positions(rows, cols).unwrap(), 1e-5);
        let (features, cls) = net.encode(&image, rows, cols).unwrap();
        check("enc_features", &features, 1e-4);
        check("enc_cls", &cls, 1e-4);
        let levels = net.decode(&features, aspect).unwrap();
        check("neck0", &levels[0], 1e-4);
        check("neck4", &levels[4], 1e-4);
        let out = net.forward(&image, n).unwrap();
        check("points", &out.points.unwrap(), 1e-4);
        check("normal", &out.normal.unwrap(), 1e-4);
        check("mask", &out.mask.unwrap(), 1e-4);
        check("metric_scale", &out.metric_scale.unwrap(), 1e-4);
    }
}

#[test]
pub fn antialiased_resize() {
    let (f, _, _) = open();
    let image = f.input("image");
    let mut seen = 0;
    for name in f.output_names().filter(|n| n.ends_with(".image14")) {
        let want = f.output(name);
        let (_, _, h, w) = want.dims4().unwrap();
        let got = valor::nn::resize(&image, h, w, valor::nn::Filter::Bilinear { antialias: true }).unwrap();
        assert_close(name, &got, &want, 1e-5);
        seen += 1;
    }
    assert!(seen > 0, "no resized picture in the fixture");
}

/// Errors where the reference calls a pixel valid; the reference's mask must be ours.
#[track_caller]
fn assert_depth(name: &str, got: &Depth, want: &Tensor, tol: f64) {
    let want = floats(want);
    assert_eq!(got.metres.len(), want.len());
    let scale = want.iter().filter(|v| v.is_finite()).fold(0f64, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.metres.iter().zip(&want).enumerate() {
        assert_eq!(got.valid[i], w.is_finite(), "{name}: pixel {i} is {w}");
        if got.valid[i] {
            assert!((*g as f64 - w).abs() <= tol * scale, "{name}: pixel {i}: {g}, want {w}");
        }
    }
}

#[track_caller]
fn assert_intrinsics(name: &str, got: &[[f64; 3]; 3], want: &Tensor, tol: f64) {
    for (g, w) in got.iter().flatten().zip(floats(want)) {
        assert!((g - w).abs() <= tol, "{name}: {got:?}, want {w}");
    }
}

#[test]
pub fn inference() {
    let (f, cfg, counts) = open();
    let net = MoGe::new(&cfg, f.weights()).unwrap();
    let image = f.input("image");
    for n in counts {
        let got = net.infer(&image, Tokens::Count(n), None).unwrap();
        let name = |part: &str| format!("nt{n}.infer.{part}");
        let mask = flags(&f.output(&name("mask")));
        assert_eq!(got.depth.valid, mask, "mask at {n} tokens");
        assert!(mask.iter().any(|m| *m) && mask.iter().any(|m| !*m), "a mask that decides nothing");
        assert_intrinsics(&name("intrinsics"), &got.intrinsics, &f.output(&name("intrinsics")), 1e-4);
        assert_depth(&name("depth"), &got.depth, &f.output(&name("depth")), 1e-4);
        let (points, normal) = (f.output(&name("points")), f.output(&name("normal")));
        let scale = floats(&points).into_iter().filter(|v| v.is_finite()).fold(0f64, |m, v| m.max(v.abs()));
        for (i, (g, w)) in got.points.iter().zip(triples(&points)).enumerate() {
            if mask[i] {
                let e = g.iter().zip(w).fold(0f64, |m, (a, b)| m.max((a - b).abs() as f64));
                assert!(e <= 1e-4 * scale, "point {i}: {g:?}, want {w:?}");
            }
        }
        for (i, (g, w)) in got.normal.unwrap().iter().zip(triples(&normal)).enumerate() {
            let e = g.iter().zip(w).fold(0f64, |m, (a, b)| m.max((a - b).abs() as f64));
            assert!(e <= 1e-4, "normal {i}: {g:?}, want {w:?}");
        }
        // The affine map's own focal length and shift, within the released solver's tolerance.
        let out = net.forward(&image, n).unwrap();
        let (_, h, w) = out.mask.as_ref().unwrap().dims3().unwrap();
        let binary: Vec<bool> = floats(&out.mask.unwrap()).iter().map(|p| *p > 0.5).collect();
        let affine = triples(&out.points.unwrap());
        let (focal, shift) = recover_focal_shift(&affine, Some(&binary), w, h, None, Tolerance::RELEASED);
        let want = floats(&f.output(&format!("nt{n}.focal_shift")));
        assert!((focal - want[0]).abs() < 1e-3 && (shift - want[1]).abs() < 1e-3, "{focal} {shift} {want:?}");
    }
}

#[test]
fn a_given_field_of_view() {
    let (f, cfg, counts) = open();
    let net = MoGe::new(&cfg, f.weights()).unwrap();
    let mut seen = 0;
    for n in counts {
        for name in f.output_names() {
            let Some(rest) = name.strip_prefix(&format!("nt{n}.infer_fov")) else { continue };
            let (fov, part) = rest.split_once('_').unwrap();
            if !part.ends_with("depth") {
                continue;
            }
            let fov: f64 = fov.parse().unwrap();
            let got = net.infer(&f.input("image"), Tokens::Count(n), Some(fov)).unwrap();
            assert!((got.fov_x - fov).abs() < 1e-6, "{} degrees, asked for {fov}", got.fov_x);
            let k = f.output(&name.replace("depth", "intrinsics"));
            assert_intrinsics(name, &got.intrinsics, &k, 1e-5);
            // This case was written without the mask.
            let want = floats(&f.output(name));
            let scale = want.iter().fold(0f64, |m, v| m.max(v.abs()));
            for (g, w) in got.depth.metres.iter().zip(want) {
                assert!((*g as f64 - w).abs() <= 1e-4 * scale, "{name}: {g}, want {w}");
            }
            seen += 1;
        }
    }
    assert!(seen > 0, "no case with a given field of view");
}

#[test]
fn resolution_levels() {
    let (f, cfg, _) = open();
    let net = MoGe::new(&cfg, f.weights()).unwrap();
    let mut seen = 0;
    for name in f.output_names() {
        let Some(level) = name.strip_prefix("reslevel").and_then(|n| n.strip_suffix(".infer.depth")) else {
            continue;
        };
        let got = net.infer(&f.input("image"), Tokens::Level(level.parse().unwrap()), None).unwrap();
        assert_depth(name, &got.depth, &f.output(name), 1e-4);
        let k = name.replace("depth", "intrinsics");
        assert_intrinsics(&k, &got.intrinsics, &f.output(&k), 1e-4);
        seen += 1;
    }
    assert!(seen > 0, "no case with a resolution level");
}

#[test]
fn focal_and_shift() {
    let f = Fixture::open("moge-focal-shift");
    let meta: serde_json::Value = f.json("meta.json");
    let cases: BTreeMap<String, serde_json::Value> = serde_json::from_value(meta["cases"].clone()).unwrap();
    assert!(!cases.is_empty());
    for (case, truth) in cases {
        let points = f.input(&format!("{case}.points"));
        let (h, w, _) = points.dims3().unwrap();
        let points = triples(&points);
        let mask = flags(&f.input(&format!("{case}.mask")));
        let solve = |mask: Option<&[bool]>, focal, tol| recover_focal_shift(&points, mask, w, h, focal, tol);
        let check = |name: &str, got: (f64, f64), tol: f64| {
            let want = floats(&f.output(&format!("{case}.{name}")));
            let e = (got.0 - want[0]).abs().max((got.1 - want[1]).abs());
            assert!(e <= tol, "{case}.{name}: {got:?}, want {want:?}");
        };
        check("focal_shift_masked", solve(Some(&mask), None, Tolerance::RELEASED), 1e-3);
        check("focal_shift_nomask", solve(None, None, Tolerance::RELEASED), 1e-3);
        check("focal_shift_masked_converged", solve(Some(&mask), None, Tolerance::CONVERGED), 1e-5);
        let focal = truth["true_focal"].as_f64().unwrap();
        let want = floats(&f.output(&format!("{case}.shift_given_focal")));
        let (_, shift) = solve(Some(&mask), Some(focal), Tolerance::RELEASED);
        assert!(
            (shift - want[0]).abs() <= 1e-3,
            "{case}: shift {shift} for a given focal length, want {want:?}"
        );
    }
}

/// All of them but the mask token, which only pre-training reads, and the two buffers.
#[test]
pub fn every_parameter_receives_a_gradient() {
    let (f, cfg, counts) = open();
    let params = f.trainable();
    let net = MoGe::new(&cfg, params.builder()).unwrap();
    let out = net.forward(&f.input("image"), counts[0]).unwrap();
    // Sums of squares of unit normals are constant: contract with something that is not.
    let one = |t: Tensor| (&t * &t.cos().unwrap()).unwrap().sum_all().unwrap();
    let total = [out.points, out.normal, out.mask, out.metric_scale]
        .into_iter()
        .map(|t| one(t.expect("the fixture has every head")))
        .reduce(|a, b| (a + b).unwrap())
        .unwrap();
    let grads = total.backward().unwrap();
    let exempt = ["encoder.backbone.mask_token", "encoder.image_mean", "encoder.image_std"];
    let without: Vec<String> = params
        .named()
        .into_iter()
        .filter(|(name, v)| {
            let g = grads.get(v).map(|g| g.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
            !exempt.contains(&name.as_str()) && !g.is_some_and(|g| g > 0. && g.is_finite())
        })
        .map(|(n, _)| n)
        .collect();
    assert!(without.is_empty(), "no gradient: {without:?}");
}
