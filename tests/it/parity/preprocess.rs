//! Picture decoding, Pillow's resampling and the detector's input, against Pillow and HF.

use super::{Fixture, assert_close};
use candle_core::{DType, Tensor};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use valor::models::grounding_dino::preprocess::{ImageProcessor, SizeRule};
use valor::nn::resample::{Filter, resize_f32, resize_u8};
use valor::sight::picture::{Alpha, DecodeOptions, Picture};

#[derive(Deserialize)]
struct Reading {
    rgb_sha256: String,
    orig_resized_u8_sha256: String,
    orig: Stats,
    hf_pil: Stats,
}

#[derive(Deserialize)]
struct Stats {
    shape: Vec<usize>,
    sum: f64,
    abs_sum: f64,
}

fn sha(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// Every 23rd row from 5 and 7-th column, as `meta.json` says (`x[:, 5::23, 7::23]`).
fn sample(x: &Tensor) -> Tensor {
    let (_, h, w) = x.dims3().unwrap();
    let pick = |from: u32, n: usize| {
        Tensor::from_vec(
            (from..n as u32).step_by(23).collect::<Vec<_>>(),
            (n - from as usize).div_ceil(23),
            x.device(),
        )
        .unwrap()
    };
    x.index_select(&pick(5, h), 1).unwrap().index_select(&pick(7, w), 2).unwrap()
}

fn each_reading(f: impl Fn(&Fixture, &str, &Picture, &Reading)) {
    let fx = Fixture::open("preprocess");
    let info: BTreeMap<String, serde_json::Value> = fx.json("info.json");
    let mut seen = 0;
    for (file, entry) in info.iter().filter(|(name, _)| name.ends_with(".png")) {
        for (tag, exif) in [("noexif", false), ("exif", true)] {
            let Some(reading) = entry.get(tag) else { continue };
            let reading: Reading = serde_json::from_value(reading.clone()).unwrap();
            let options = DecodeOptions { exif, alpha: Alpha::Drop };
            let picture = Picture::open_with(&fx.dir.join(file), options).unwrap();
            f(&fx, &format!("{file}.{tag}"), &picture, &reading);
            seen += 1;
        }
    }
    assert!(seen > 0, "no pictures in the fixture");
}

#[test]
fn pixels_are_pillows() {
    each_reading(|_, name, picture, want| assert_eq!(sha(picture.rgb()), want.rgb_sha256, "{name}"));
}

#[test]
fn small_copies_are_pillows() {
    each_reading(|fx, name, p, _| {
        let size = (p.height() as usize, p.width() as usize);
        let to = ((size.0 / 3).max(1), (size.1 / 3).max(1));
        for (key, filter) in [("bilinear", Filter::Bilinear), ("bicubic", Filter::Bicubic)] {
            let want = fx.output(&format!("{name}.pil_{key}_down3_u8")).flatten_all().unwrap();
            let want = want.to_vec1::<u8>().unwrap();
            assert!(resize_u8(p.rgb(), size, 3, to, filter) == want, "{name} {key}");
            // The float form does not round between the passes. Nor does it clip there, which moves
            // bicubic pixels near black and white by several steps: not compared.
            if filter == Filter::Bicubic {
                continue;
            }
            let planar: Vec<f32> =
                (0..3).flat_map(|c| p.rgb()[c..].iter().step_by(3).map(|&v| v as f32)).collect();
            let float = resize_f32(&planar, size, 3, to, filter);
            let worst = (0..3)
                .flat_map(|c| float[c * to.0 * to.1..][..to.0 * to.1].iter().zip(want[c..].iter().step_by(3)))
                .map(|(f, &w)| (f.clamp(0., 255.) - w as f32).abs())
                .fold(0., f32::max);
            assert!(worst <= 1.01, "{name} {key}: {worst}");
        }
    });
}

#[test]
fn detector_input_is_the_originals_and_hfs() {
    each_reading(|fx, name, p, want| {
        let size = (p.height() as usize, p.width() as usize);
        for (rule, key, stats) in
            [(SizeRule::Original, "orig_norm", &want.orig), (SizeRule::Hf, "hf_pil", &want.hf_pil)]
        {
            let ip = ImageProcessor { rule, ..Default::default() };
            let x = ip.apply(p).unwrap();
            assert_eq!(x.dims(), stats.shape, "{name} {key}");
            assert_close(
                &format!("{name} {key}"),
                &sample(&x),
                &fx.output(&format!("{name}.{key}_ds")),
                1e-6,
            );
            let total =
                |x: &Tensor| x.to_dtype(DType::F64).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
            assert!((total(&x) - stats.sum).abs() <= 1e-6 * stats.abs_sum, "{name} {key} sum");
            assert!(
                (total(&x.abs().unwrap()) - stats.abs_sum).abs() <= 1e-6 * stats.abs_sum,
                "{name} {key} |sum|"
            );
            if rule == SizeRule::Original {
                let u8s = resize_u8(p.rgb(), size, 3, ip.size(size.0, size.1), Filter::Bilinear);
                assert_eq!(sha(&u8s), want.orig_resized_u8_sha256, "{name}");
            } else {
                // HF's torchvision path rounds one 8-bit step away, at most.
                let step = 1.001 / 255. / ip.std.iter().fold(1., |m: f32, s| m.min(*s)) as f64;
                let tv = fx.output(&format!("{name}.hf_tv_ds"));
                let worst = (sample(&x) - tv.to_device(&candle_core::Device::Cpu).unwrap())
                    .unwrap()
                    .abs()
                    .unwrap()
                    .flatten_all()
                    .unwrap();
                let worst = worst.to_vec1::<f32>().unwrap().into_iter().fold(0., f32::max);
                assert!((worst as f64) <= step, "{name}: {worst} over {step}");
            }
        }
    });
}

#[test]
fn sizes_follow_each_rule() {
    #[derive(Deserialize)]
    struct Row {
        #[serde(rename = "in")]
        input: [usize; 2],
        orig: [usize; 2],
        hf: [usize; 2],
    }
    #[derive(Deserialize)]
    struct Info {
        size_table_hw: Vec<Row>,
    }
    let rows = Fixture::open("preprocess").json::<Info>("info.json").size_table_hw;
    assert!(!rows.is_empty());
    for r in rows {
        for (rule, want) in [(SizeRule::Hf, r.hf), (SizeRule::Original, r.orig)] {
            let ip = ImageProcessor { rule, ..Default::default() };
            assert_eq!(<[usize; 2]>::from(ip.size(r.input[0], r.input[1])), want, "{rule:?} {:?}", r.input);
        }
    }
}

#[test]
fn batches_are_padded_right_and_bottom_with_zeros() {
    #[derive(Deserialize)]
    struct Pad {
        pixel_values: Vec<usize>,
        mask_sums: Vec<u32>,
    }
    #[derive(Deserialize)]
    struct Info {
        batch_pad: Pad,
    }
    let fx = Fixture::open("preprocess");
    let want = fx.json::<Info>("info.json").batch_pad;
    let ip = ImageProcessor::default();
    let pictures: Vec<Tensor> = ["rgb_317x211.png", "wide_640x97.png"]
        .iter()
        .map(|f| ip.apply(&Picture::open_with(&fx.dir.join(f), DecodeOptions::PILLOW).unwrap()).unwrap())
        .collect();
    let batch = ImageProcessor::batch(&pictures).unwrap();
    assert_eq!(batch.pixels.dims(), want.pixel_values);
    for (i, picture) in pictures.iter().enumerate() {
        let mask = batch.mask.get(i).unwrap();
        let sum = mask.to_dtype(DType::U32).unwrap().sum_all().unwrap().to_scalar::<u32>().unwrap();
        assert_eq!(sum, want.mask_sums[i]);
        let (_, h, w) = picture.dims3().unwrap();
        let kept = batch.pixels.get(i).unwrap().narrow(1, 0, h).unwrap().narrow(2, 0, w).unwrap();
        assert_close("kept", &kept, picture, 0.);
        let (whole, part) = (batch.pixels.get(i).unwrap().abs().unwrap(), picture.abs().unwrap());
        let f64s =
            |t: &Tensor| t.to_dtype(DType::F64).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
        assert!((f64s(&whole) - f64s(&part)).abs() < 1e-6, "padding is not zero");
    }
}
