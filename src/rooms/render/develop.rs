//! From linear light to a picture's bytes, as a sensor would.

use crate::rooms::paint::hash_bits;
use crate::rooms::scene::Scene;
use crate::rooms::solid::{V3, add, scale};

/// sRGB bytes, with the sensor's blur and noise.
pub(super) fn develop(scene: &Scene, mut linear: Vec<V3>, w: usize, h: usize) -> Vec<u8> {
    let table = gamma_table();
    let sensor = scene.sensor;
    if sensor.blur > 0. {
        let side = (sensor.blur * w as f64 / 256.).min(0.33);
        blur_rows(&mut linear, w, side);
        blur_columns(&mut linear, w, side);
    }
    let mut rgb = Vec::with_capacity(3 * w * h);
    for (i, c) in linear.iter().enumerate() {
        let noise = grain(i as u64, scene.seed);
        for (c, noise) in c.iter().zip(noise) {
            let v = table[((c * sensor.exposure).clamp(0., 1.) * 4095. + 0.5) as usize];
            rgb.push((v + sensor.noise * noise + 0.5).clamp(0., 255.) as u8);
        }
    }
    rgb
}

/// Each pixel gives `side` of its light to each neighbour in its row; the rim keeps its own.
fn blur_rows(pixels: &mut [V3], w: usize, side: f64) {
    for row in pixels.chunks_exact_mut(w) {
        let mut before = row[0];
        for x in 0..w {
            let own = row[x];
            let after = if x + 1 < w { row[x + 1] } else { own };
            row[x] = add(scale(own, 1. - 2. * side), scale(add(before, after), side));
            before = own;
        }
    }
}

fn blur_columns(pixels: &mut [V3], w: usize, side: f64) {
    let mut before = pixels[..w].to_vec();
    for y in 0..pixels.len() / w {
        for x in 0..w {
            let at = y * w + x;
            let own = pixels[at];
            let after = pixels.get(at + w).copied().unwrap_or(own);
            pixels[at] = add(scale(own, 1. - 2. * side), scale(add(before[x], after), side));
            before[x] = own;
        }
    }
}

/// Noise of the three channels, about normal with variance 1, half of it common to them.
fn grain(pixel: u64, seed: u64) -> V3 {
    let word = |salt| hash_bits(pixel, seed, salt);
    let (a, b) = (word(1), word(2));
    // A sum of two uniform numbers on [-½, ½) has the variance 1/6.
    let part = |i: u32| {
        let u = |w: u64| (w >> (16 * i) & 0xffff) as f64 / 65536. - 0.5;
        (u(a) + u(b)) * 6f64.sqrt()
    };
    let common = part(3);
    std::array::from_fn(|i| (common + part(i as u32)) * std::f64::consts::FRAC_1_SQRT_2)
}

fn gamma_table() -> &'static [f64] {
    static TABLE: std::sync::OnceLock<Vec<f64>> = std::sync::OnceLock::new();
    TABLE.get_or_init(|| {
        (0..4096)
            .map(|i| {
                let c = i as f64 / 4095.;
                255. * if c <= 0.0031308 { 12.92 * c } else { 1.055 * c.powf(1. / 2.4) - 0.055 }
            })
            .collect()
    })
}
