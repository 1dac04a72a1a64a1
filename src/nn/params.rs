//! Named trainable variables with seeded initial values.
//!
//! candle's own `VarMap` draws initial values from the device's generator, which cannot be
//! seeded on the CPU. Here each tensor's values follow from the seed and its own name, so they
//! do not depend on the order in which a network asks for them.

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use candle_nn::init::NormalOrUniform;
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal, Uniform};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// A network's parameters by checkpoint name. Clones share the same variables.
#[derive(Clone, Debug)]
pub struct Params {
    seed: u64,
    vars: Arc<Mutex<BTreeMap<String, Var>>>,
    /// Of what [`Params::builder`] makes.
    dtype: DType,
    device: Device,
}

impl Params {
    /// Empty: a network built on [`Params::builder`] creates what it asks for.
    pub fn new(seed: u64) -> Self {
        Self { seed, vars: Arc::default(), dtype: DType::F32, device: Device::Cpu }
    }

    /// Starts from a checkpoint's tensors, as f32 on the CPU. What is missing there is created on demand.
    pub fn from_tensors(seed: u64, tensors: HashMap<String, Tensor>) -> Result<Self> {
        Self::placed(seed, tensors, DType::F32, &Device::Cpu)
    }

    /// [`Params::from_tensors`], of another type or elsewhere.
    pub fn placed(
        seed: u64,
        tensors: HashMap<String, Tensor>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let mut vars = BTreeMap::new();
        for (name, t) in tensors {
            vars.insert(name, Var::from_tensor(&t.to_dtype(dtype)?.to_device(device)?)?);
        }
        Ok(Self { seed, vars: Arc::new(Mutex::new(vars)), dtype, device: device.clone() })
    }

    /// A builder that hands out (and creates) these variables.
    pub fn builder(&self) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), self.dtype, self.device.clone())
    }

    /// All variables in the order of their names.
    pub fn named(&self) -> Vec<(String, Var)> {
        self.lock().iter().map(|(n, v)| (n.clone(), v.clone())).collect()
    }

    pub fn get(&self, name: &str) -> Option<Var> {
        self.lock().get(name).cloned()
    }

    /// Where [`Params::builder`] makes variables.
    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn count(&self) -> usize {
        self.lock().values().map(|v| v.elem_count()).sum()
    }

    /// The tensors themselves (sharing storage with the variables).
    pub fn tensors(&self) -> HashMap<String, Tensor> {
        self.lock().iter().map(|(n, v)| (n.clone(), v.as_tensor().clone())).collect()
    }

    /// Overwrites the values of existing variables; every one must be there with its shape.
    pub fn load(&self, path: &Path) -> Result<()> {
        let from = candle_core::safetensors::load(path, &Device::Cpu)?;
        for (name, var) in self.lock().iter() {
            let Some(t) = from.get(name) else {
                candle_core::bail!("{}: tensor {name} is missing", path.display())
            };
            if t.shape() != var.shape() {
                let (got, want) = (t.shape(), var.shape());
                candle_core::bail!("{}: tensor {name} has shape {got:?}, expected {want:?}", path.display())
            }
            var.set(&t.to_dtype(var.dtype())?.to_device(var.device())?)?;
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Var>> {
        self.vars.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn draw(&self, name: &str, shape: &Shape, init: Init) -> Result<Tensor> {
        let digest = Sha256::new().chain_update(self.seed.to_le_bytes()).chain_update(name).finalize();
        let mut rng = ChaCha8Rng::from_seed(digest.into());
        let n = shape.elem_count();
        let err = |e: &dyn std::fmt::Display| candle_core::Error::Msg(format!("{name}: {e}"));
        let mut normal = |mean: f64, stdev: f64| -> Result<Vec<f32>> {
            let d = Normal::new(mean, stdev).map_err(|e| err(&e))?;
            Ok((0..n).map(|_| d.sample(&mut rng) as f32).collect())
        };
        let data = match init {
            Init::Const(c) => vec![c as f32; n],
            Init::Randn { mean, stdev } => normal(mean, stdev)?,
            Init::Kaiming { dist: NormalOrUniform::Normal, fan, non_linearity } => {
                normal(0., non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt())?
            }
            Init::Uniform { .. } | Init::Kaiming { .. } => {
                let (lo, up) = match init {
                    Init::Uniform { lo, up } => (lo, up),
                    Init::Kaiming { fan, non_linearity, .. } => {
                        let b = 3f64.sqrt() * non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
                        (-b, b)
                    }
                    _ => unreachable!("matched above"),
                };
                let d = Uniform::new_inclusive(lo, up).map_err(|e| err(&e))?;
                (0..n).map(|_| d.sample(&mut rng) as f32).collect()
            }
        };
        Tensor::from_vec(data, shape, &Device::Cpu)
    }
}

impl SimpleBackend for Params {
    fn get(&self, s: Shape, name: &str, init: Init, dtype: DType, dev: &Device) -> Result<Tensor> {
        let mut vars = self.lock();
        if let Some(v) = vars.get(name) {
            if v.shape() != &s {
                candle_core::bail!("tensor {name} has shape {:?}, expected {s:?}", v.shape())
            }
            return Ok(v.as_tensor().clone());
        }
        let v = Var::from_tensor(&self.draw(name, &s, init)?.to_dtype(dtype)?.to_device(dev)?)?;
        vars.insert(name.to_string(), v.clone());
        Ok(v.as_tensor().clone())
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        match self.lock().get(name) {
            Some(v) => Ok(v.as_tensor().clone()),
            None => candle_core::bail!("tensor {name} is missing"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.lock().contains_key(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_follow_from_seed_and_name_not_order() -> Result<()> {
        let make = |seed, names: [&str; 2]| -> Result<Vec<f32>> {
            let p = Params::new(seed);
            for n in names {
                p.builder().get_with_hints((4, 3), n, Init::Randn { mean: 0., stdev: 1. })?;
            }
            p.get("a").unwrap().flatten_all()?.to_vec1()
        };
        assert_eq!(make(1, ["a", "b"])?, make(1, ["b", "a"])?);
        assert_ne!(make(1, ["a", "b"])?, make(2, ["a", "b"])?);
        Ok(())
    }
}
