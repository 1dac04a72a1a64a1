//! Networks and losses against tensors written by PyTorch (`scripts/make_fixtures.py`).
//!
//! Reads the folder named by `VALOR_FIXTURES`, else the small set in `tests/fixtures`. Sizes,
//! seeds and configs come from the files.

use candle_core::{DType, Device, Tensor};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

mod bert;
mod composed;
mod dinov2;
mod generate;
mod grounding_dino;
mod grounding_dino_grad;
mod grounding_dino_loss;
mod grounding_dino_text;
mod grpo;
mod moge;
mod msda;
mod preprocess;
mod qwen3;
mod qwen3_vl;
mod swin;

/// Where networks run: `VALOR_DEVICE=cuda` (with `--features cuda`), else the CPU.
pub fn device() -> Device {
    match std::env::var("VALOR_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => Device::Cpu,
        Ok("cuda") => {
            // The fixtures are f32's.
            valor::nn::set_tf32(false);
            valor::nn::gpu(0).expect("VALOR_DEVICE=cuda")
        }
        Ok(other) => panic!("VALOR_DEVICE={other}: expected cpu or cuda"),
    }
}

/// One fixture folder: config, weights, inputs and the reference's outputs.
pub struct Fixture {
    pub dir: PathBuf,
    inputs: HashMap<String, Tensor>,
    outputs: HashMap<String, Tensor>,
}

pub fn root() -> PathBuf {
    match std::env::var_os("VALOR_FIXTURES") {
        Some(dir) => dir.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"),
    }
}

impl Fixture {
    /// The folder must exist: a fixture that is not there is a failure, not a pass.
    pub fn open(name: &str) -> Self {
        let dir = root().join(name);
        let load = |f: &str| {
            let p = dir.join(f);
            candle_core::safetensors::load(&p, &device()).unwrap_or_else(|e| panic!("{}: {e}", p.display()))
        };
        Self { inputs: load("inputs.safetensors"), outputs: load("outputs.safetensors"), dir }
    }

    pub fn input(&self, name: &str) -> Tensor {
        self.inputs.get(name).unwrap_or_else(|| panic!("{}: no input {name}", self.dir.display())).clone()
    }

    pub fn output(&self, name: &str) -> Tensor {
        self.outputs.get(name).unwrap_or_else(|| panic!("{}: no output {name}", self.dir.display())).clone()
    }

    pub fn output_names(&self) -> impl Iterator<Item = &str> {
        self.outputs.keys().map(String::as_str)
    }

    pub fn json<T: serde::de::DeserializeOwned>(&self, file: &str) -> T {
        let p = self.dir.join(file);
        let s = std::fs::read_to_string(&p).unwrap_or_else(|e| panic!("{}: {e}", p.display()));
        serde_json::from_str(&s).unwrap_or_else(|e| panic!("{}: {e}", p.display()))
    }

    /// The checkpoint's tensors, as f32.
    pub fn weights(&self) -> candle_nn::VarBuilder<'static> {
        let p = self.dir.join("model.safetensors");
        let t =
            candle_core::safetensors::load(&p, &device()).unwrap_or_else(|e| panic!("{}: {e}", p.display()));
        candle_nn::VarBuilder::from_tensors(t, DType::F32, &device())
    }

    /// The checkpoint's tensors as trainable variables, for gradient comparisons.
    pub fn trainable(&self) -> valor::nn::Params {
        let p = self.dir.join("model.safetensors");
        let t =
            candle_core::safetensors::load(&p, &device()).unwrap_or_else(|e| panic!("{}: {e}", p.display()));
        valor::nn::Params::placed(0, t, DType::F32, &device()).unwrap()
    }
}

/// Largest absolute difference over the finite elements, relative to the reference's scale
/// (its largest finite magnitude, at least `floor`). Infinities and NaNs must agree in place.
pub fn relative_error(got: &Tensor, want: &Tensor, floor: f64) -> f64 {
    assert_eq!(got.dims(), want.dims(), "shape");
    let flat = |t: &Tensor| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let (g, w) = (flat(got), flat(want));
    let scale = w.iter().filter(|x| x.is_finite()).fold(floor, |m, x| m.max(x.abs()));
    let mut err = 0f64;
    for (i, (a, b)) in g.iter().zip(&w).enumerate() {
        if a.is_finite() && b.is_finite() {
            err = err.max((a - b).abs());
        } else {
            assert!(a == b || (a.is_nan() && b.is_nan()), "element {i}: got {a}, want {b}");
        }
    }
    err / scale
}

/// Panics with the name and the error unless `got` is within `tol` of `want`'s scale.
#[track_caller]
pub fn assert_close(name: &str, got: &Tensor, want: &Tensor, tol: f64) {
    let e = relative_error(got, want, 1e-3);
    assert!(e <= tol, "{name}: relative error {e:.2e} over {tol:.0e}");
}
