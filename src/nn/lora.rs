//! Low-rank adapters of linear layers (LoRA, Hu et al. 2021), names as in PEFT's checkpoints.
//!
//! A network is adapted by building it on [`adapted`]: each linear layer that the configuration
//! targets finds a pair of small matrices beside its frozen weight and adds `scale · B A x`. The same
//! base without the adapter is the reference policy, with no second copy in memory. Not here: dropout,
//! embeddings, convolutions, DoRA.

use super::Params;
use super::cpu::{self, Held, Mat};
use super::linear::LinearOp;
use candle_core::{CpuStorage, CustomOp3, D, DType, Device, Layout, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    pub rank: usize,
    /// The adapter's output counts `alpha / rank` times.
    pub alpha: f64,
    /// Names of the layers that get one, such as `q_proj`.
    pub targets: Vec<String>,
}

impl LoraConfig {
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    fn is_target(&self, layer: &str) -> bool {
        let last = layer.rsplit('.').next().unwrap_or(layer);
        self.targets.iter().any(|t| t == last)
    }
}

const A: &str = "lora_A.weight";
const B: &str = "lora_B.weight";
/// Not a tensor of any checkpoint: how [`adapted`] tells a layer its rank and scale.
const SHAPE: &str = "lora_shape";

/// An adapter of one linear layer.
#[derive(Clone, Debug)]
pub(super) struct Lora {
    /// `[rank, in]`.
    a: Tensor,
    /// `[out, rank]`.
    b: Tensor,
    scale: f64,
}

impl Lora {
    /// Of the layer at `vb`, if it is to have one.
    pub(super) fn of_layer(inp: usize, out: usize, vb: &VarBuilder) -> Result<Option<Self>> {
        if !vb.contains_tensor(SHAPE) {
            return Ok(None);
        }
        let shape = vb.get_unchecked(SHAPE)?.to_vec1::<f64>()?;
        let (rank, scale) = (shape[0] as usize, shape[1]);
        // As PEFT starts: A as PyTorch's linear layers, B zero, so that nothing changes at first.
        let bound = 1. / (inp as f64).sqrt();
        let a = vb.get_with_hints((rank, inp), A, Init::Uniform { lo: -bound, up: bound })?;
        let b = vb.get_with_hints((out, rank), B, Init::Const(0.))?;
        Ok(Some(Self { a, b, scale }))
    }

    pub(super) fn parameters(&self) -> [Tensor; 2] {
        [self.a.clone(), self.b.clone()]
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // Trained in f32 whatever the base computes in.
        let matrix = |m: &Tensor| m.to_dtype(x.dtype()).map(|m| super::Linear::new(m, None));
        matrix(&self.b)?.forward(&matrix(&self.a)?.forward(x)?)? * self.scale
    }
}

impl Lora {
    /// The adapted layer as one op, where there is one for it: `x` `[.., in]`, the frozen weight `w` `[out, in]`.
    pub(super) fn fused(&self, x: &Tensor, w: &Tensor) -> Result<Option<Tensor>> {
        let all = [x, w, &self.a, &self.b];
        let fits = x.elem_count() > 0 && x.dim(D::Minus1)? == w.dim(1)?;
        if w.track_op() || !fits || !cpu::fused(&all) || !all[1..].iter().all(|t| t.is_contiguous()) {
            return Ok(None);
        }
        let op = LoraOp { weight: w.clone(), scale: self.scale as f32 };
        x.contiguous()?.apply_op3(&self.a, &self.b, op).map(Some)
    }
}

/// `x Wᵀ + scale · x Aᵀ Bᵀ` with a backward of its own: composed, each of the five results, most of them of
/// the layer's full width, costs candle's autograd a zeroed buffer and an addition on one thread.
struct LoraOp {
    weight: Tensor,
    scale: f32,
}

impl LoraOp {
    /// `scale · x Aᵀ`, `[rows, rank]`; little work beside the layer's own, so that backward does it again.
    fn low(&self, x: &[f32], a: &[f32], k: usize) -> Vec<f32> {
        let mut low = vec![0f32; x.len() / k * (a.len() / k)];
        LinearOp::product(x, a, k, &mut low, false);
        self.rescale(&mut low);
        low
    }

    fn rescale(&self, low: &mut [f32]) {
        low.iter_mut().for_each(|l| *l *= self.scale);
    }
}

impl CustomOp3 for LoraOp {
    fn name(&self) -> &'static str {
        "lora"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, a, b) = (cpu::values(x, lx)?, cpu::values(a, la)?, cpu::values(b, lb)?);
        let ((out, k), (rank, width), fan) = (self.weight.dims2()?, la.shape().dims2()?, lb.shape().dims2()?);
        if width != k || fan != (out, rank) {
            candle_core::bail!("lora: a {:?}, b {:?}, weight {out} × {k}", la.shape(), lb.shape())
        }
        let mut y = vec![0f32; x.len() / k * out];
        LinearOp::product(x, Held::new(&self.weight)?.get()?, k, &mut y, false);
        LinearOp::product(&self.low(x, a, k), b, rank, &mut y, true);
        let mut shape = lx.dims().to_vec();
        shape[lx.dims().len() - 1] = out;
        Ok((CpuStorage::F32(y), shape.into()))
    }

    fn bwd(&self, x: &Tensor, a: &Tensor, b: &Tensor, _: &Tensor, g: &Tensor) -> Result<super::Grads3> {
        let g = g.contiguous()?;
        let (hx, hw, hg) = (Held::new(x)?, Held::new(&self.weight)?, Held::new(&g)?);
        let (ha, hb) = (Held::new(a)?, Held::new(b)?);
        let (xs, ws, gs, a_s, b_s) = (hx.get()?, hw.get()?, hg.get()?, ha.get()?, hb.get()?);
        let ((out, k), rank) = (self.weight.dims2()?, a.dim(0)?);
        let rows = xs.len() / k;
        let low = self.low(xs, a_s, k);
        let db = cpu::product((out, rank, rows), Mat::rows(gs, out).t(), Mat::rows(&low, rank));
        let mut dlow = low;
        cpu::gemm((rows, rank, out), &mut dlow, false, Mat::rows(gs, out), Mat::rows(b_s, rank));
        self.rescale(&mut dlow);
        let da = cpu::product((rank, k, rows), Mat::rows(&dlow, rank).t(), Mat::rows(xs, k));
        let dx = if x.track_op() {
            let mut dx = cpu::product((rows, k, out), Mat::rows(gs, out), Mat::rows(ws, k));
            cpu::gemm((rows, k, rank), &mut dx, true, Mat::rows(&dlow, rank), Mat::rows(a_s, k));
            Some(Tensor::from_vec(dx, x.shape(), x.device())?)
        } else {
            None
        };
        let (da, db) =
            (Tensor::from_vec(da, a.shape(), a.device())?, Tensor::from_vec(db, b.shape(), b.device())?);
        Ok((dx, Some(da), Some(db)))
    }
}

struct Adapted<'a> {
    base: VarBuilder<'a>,
    adapter: Params,
    cfg: LoraConfig,
}

/// A builder of `base`'s network, its targeted layers adapted by the matrices in `adapter`, which are
/// made where they are missing. What `base` hands out is neither copied nor made trainable.
pub fn adapted<'a>(base: VarBuilder<'a>, adapter: &Params, cfg: &LoraConfig) -> VarBuilder<'a> {
    let (dtype, dev) = (base.dtype(), base.device().clone());
    let backend = Adapted { base, adapter: adapter.clone(), cfg: cfg.clone() };
    VarBuilder::from_backend(Box::new(backend), dtype, dev)
}

impl SimpleBackend for Adapted<'_> {
    fn get(&self, s: Shape, name: &str, init: Init, dtype: DType, dev: &Device) -> Result<Tensor> {
        if name.ends_with(A) || name.ends_with(B) {
            return SimpleBackend::get(&self.adapter, s, name, init, DType::F32, dev);
        }
        self.base.get_with_hints_dtype(s, name, init, dtype)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, _: &Device) -> Result<Tensor> {
        if name.ends_with(SHAPE) {
            return Tensor::new(&[self.cfg.rank as f64, self.cfg.scale()], &Device::Cpu);
        }
        self.base.get_unchecked_dtype(name, dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        match name.strip_suffix(&format!(".{SHAPE}")) {
            Some(layer) => self.cfg.is_target(layer),
            None => self.base.contains_tensor(name),
        }
    }
}

/// A tensor of the base with the adapter's product added in, if it has one for it: of a checkpoint that needs no
/// adapter.
pub fn merged(name: &str, w: &Tensor, adapter: &Params, cfg: &LoraConfig) -> Result<Tensor> {
    let Some(layer) = name.strip_suffix("weight") else { return Ok(w.clone()) };
    match (adapter.get(&format!("{layer}{A}")), adapter.get(&format!("{layer}{B}"))) {
        (None, None) => Ok(w.clone()),
        (Some(a), Some(b)) => {
            let product = (b.as_tensor().matmul(a.as_tensor())? * cfg.scale())?;
            Ok((w.to_dtype(DType::F32)? + product)?.to_dtype(w.dtype())?.detach())
        }
        _ => candle_core::bail!("adapter: {layer} has one matrix of two"),
    }
}

/// The adapter under PEFT's names.
pub fn peft_tensors(adapter: &Params) -> HashMap<String, Tensor> {
    let named = |(name, t): (String, Tensor)| (format!("base_model.model.{name}"), t.detach());
    adapter.tensors().into_iter().map(named).collect()
}

/// PEFT's `adapter_config.json`.
pub fn peft_config(base: &str, cfg: &LoraConfig) -> serde_json::Value {
    serde_json::json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": cfg.rank, "lora_alpha": cfg.alpha, "target_modules": cfg.targets, "bias": "none",
        "lora_dropout": 0.0, "inference_mode": true, "fan_in_fan_out": false, "use_rslora": false,
        "use_dora": false, "modules_to_save": null, "init_lora_weights": true,
    })
}

#[cfg(test)]
mod tests {
    use super::super::gradcheck::{assert_same, max_gradient_error, random};
    use super::super::{frozen, linear_no_bias};
    use super::*;

    fn cfg() -> LoraConfig {
        LoraConfig { rank: 2, alpha: 3., targets: vec!["q_proj".into()] }
    }

    fn x() -> Tensor {
        Tensor::new(&[[0.3f32, -0.7, 1.1], [0.2, 0.9, -0.4]], &Device::Cpu).unwrap()
    }

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn it_starts_as_the_base_and_only_its_own_matrices_learn() -> Result<()> {
        let (base, adapter) = (Params::new(1), Params::new(2));
        let vb = || adapted(frozen(base.builder()), &adapter, &cfg());
        let (q, o) = (linear_no_bias(3, 4, vb().pp("q_proj"))?, linear_no_bias(4, 3, vb().pp("o_proj"))?);
        assert_eq!(adapter.count(), 2 * 3 + 4 * 2, "o_proj is no target");
        let plain = linear_no_bias(3, 4, frozen(base.builder()).pp("q_proj"))?;
        assert_eq!(values(&q.forward(&x())?), values(&plain.forward(&x())?));
        let grads = o.forward(&q.forward(&x())?)?.sqr()?.sum_all()?.backward()?;
        let b = adapter.get("q_proj.lora_B.weight").unwrap();
        assert!(values(grads.get(&b).unwrap()).iter().any(|g| *g != 0.));
        for (name, var) in base.named() {
            assert!(grads.get(&var).is_none(), "{name} is frozen");
        }
        // Once B is not zero, A receives a gradient too.
        b.set(&Tensor::ones((4, 2), DType::F32, &Device::Cpu)?)?;
        let grads = q.forward(&x())?.sqr()?.sum_all()?.backward()?;
        let a = adapter.get("q_proj.lora_A.weight").unwrap();
        assert!(values(grads.get(&a).unwrap()).iter().all(|g| *g != 0.));
        Ok(())
    }

    #[test]
    fn one_op_equals_the_composed_layer_and_differentiates() -> Result<()> {
        let w = random((37, 24), 1)?.as_tensor().detach();
        // Few rows, as in generation, and many.
        for rows in [3, 200] {
            let (x, a, b) = (random((rows, 24), 2)?, random((4, 24), 3)?, random((37, 4), 4)?);
            let lora = Lora { a: a.as_tensor().clone(), b: b.as_tensor().clone(), scale: 0.75 };
            let fused = || Ok(lora.fused(&x, &w)?.expect("there is one"));
            let composed = || {
                let low = x.matmul(&a.t()?)?.matmul(&b.t()?)?;
                x.matmul(&w.t()?)? + (low * 0.75)?
            };
            assert_same(&[&x, &a, &b], fused, composed)?;
        }
        let (x, a, b) = (random((2, 3, 24), 2)?, random((4, 24), 3)?, random((37, 4), 4)?);
        let lora = Lora { a: a.as_tensor().clone(), b: b.as_tensor().clone(), scale: 0.75 };
        let y = || Ok(lora.fused(&x, &w)?.expect("there is one"));
        assert_eq!(y()?.dims(), [2, 3, 37]);
        let e = max_gradient_error(&[x.clone(), a, b], 1e-2, 60, y)?;
        assert!(e < 1e-3, "{e}");
        Ok(())
    }

    #[test]
    fn merged_weights_do_the_same_and_residuals_are_kept() -> Result<()> {
        let (base, adapter) = (Params::new(1), Params::new(2));
        let q = linear_no_bias(3, 3, adapted(frozen(base.builder()), &adapter, &cfg()).pp("q_proj"))?;
        let b = Tensor::new(&[[0.5f32, -1.], [0.25, 0.], [1., 2.]], &Device::Cpu)?;
        adapter.get("q_proj.lora_B.weight").unwrap().set(&b)?;
        let whole = base.tensors().into_iter().map(|(name, w)| {
            let merged = merged(&name, &w, &adapter, &cfg())?;
            Ok((name, merged))
        });
        let whole = Params::from_tensors(0, whole.collect::<Result<_>>()?)?;
        let plain = linear_no_bias(3, 3, whole.builder().pp("q_proj"))?;
        for (got, want) in [
            (q.forward(&x())?, plain.forward(&x())?),
            (q.forward_residual(&x(), &x())?, plain.forward_residual(&x(), &x())?),
        ] {
            for (g, w) in values(&got).iter().zip(values(&want)) {
                assert!((g - w).abs() < 1e-5, "{g} {w}");
            }
        }
        Ok(())
    }
}
