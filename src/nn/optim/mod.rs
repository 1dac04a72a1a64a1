//! AdamW and Muon with f32 moments, parameter groups, clipping and a state that can be saved, and the
//! learning-rate schedules of the trainers.
//!
//! Why not candle's: its AdamW keeps moments in the parameter's dtype, has no groups, no clipping
//! and no way to save its state. Gradients of several micro-batches are added up here before a
//! step.
//!
//! Moments and summed gradients live beside their parameter, and a parameter in half precision follows an f32
//! master copy there: 12 bytes a weight (16 in half precision) besides the weight itself and one micro-batch's
//! gradients. With [`AdamWConfig::offload`] all that is in the host's memory and steps are taken there, so that a full
//! fine-tuning costs a GPU the weights and one micro-batch's gradients; over the bus go the gradients of each micro-batch
//! and the new values of each step. Muon's steps are taken there always.

mod here;
mod muon;
mod schedule;
mod state;
#[cfg(any(feature = "cuda", test))]
mod there;

pub use self::schedule::{Decay, Schedule};

use self::here::Here;
#[cfg(any(feature = "cuda", test))]
use self::there::There;
use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// Hyper-parameters of AdamW (Loshchilov & Hutter 2019).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Scales gradients down to this global L2 norm.
    pub max_grad_norm: Option<f64>,
    /// Keeps moments and summed gradients of parameters on a GPU in the host's memory. Where they are is no part of what
    /// is trained.
    #[serde(skip)]
    pub offload: bool,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            max_grad_norm: Some(1.),
            offload: false,
        }
    }
}

/// How one parameter is treated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    /// Multiplies the learning rate.
    pub lr: f64,
    /// Whether weight decay applies.
    pub decay: bool,
    /// Whether the step is Muon's: the momentum made orthogonal (see `muon`), in place of
    /// AdamW's. For matrices between hidden layers.
    pub muon: bool,
}

impl Group {
    /// The usual rule: matrices decay; norms, biases and other vectors do not.
    pub fn usual(var: &Var) -> Self {
        Self { lr: 1., decay: var.rank() >= 2, muon: false }
    }

    /// For networks made from nothing: Muon for the matrices between hidden layers, `lr` times as
    /// fast as AdamW is for embeddings, heads and vectors (which `outer` names by a part of theirs).
    pub fn from_nothing(name: &str, var: &Var, outer: &[&str], lr: f64) -> Self {
        let usual = Self::usual(var);
        match var.rank() == 2 && !outer.iter().any(|part| name.contains(part)) {
            true => Self { lr, muon: true, ..usual },
            false => usual,
        }
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Global L2 norm of the gradients before clipping.
    pub grad_norm: f64,
    /// False where the norm was not finite: parameters and moments are then unchanged.
    pub applied: bool,
}

struct Slot {
    name: String,
    var: Var,
    group: Group,
    moments: Moments,
}

/// What an optimiser knows of a parameter.
enum Moments {
    Here(Here),
    #[cfg(any(feature = "cuda", test))]
    There(Box<There>),
}

/// What a saved state holds of a parameter.
struct Kept {
    /// Exponential averages of the gradient and of its square; Muon has the first only.
    m: Vec<f32>,
    v: Vec<f32>,
    /// The weights in full, of a parameter in half precision; else empty.
    master: Vec<f32>,
}

/// One of them.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    Mean,
    Square,
    Master,
}

/// One step of AdamW in numbers.
#[derive(Clone, Copy)]
pub(super) struct Rule {
    pub clip: f32,
    pub beta1: f32,
    pub beta2: f32,
    /// What decay leaves of a weight.
    pub keep: f32,
    /// Learning rate over the first moment's bias correction.
    pub step: f32,
    /// Reciprocal of the second moment's bias correction.
    pub root: f32,
    pub eps: f32,
}

impl Slot {
    #[cfg_attr(not(any(feature = "cuda", test)), allow(unused_variables))]
    fn new(name: String, var: Var, group: Group, there: bool) -> Result<Self> {
        let float = matches!(var.dtype(), DType::F32 | DType::F16 | DType::BF16);
        if !float || !var.is_contiguous() {
            candle_core::bail!("AdamW: parameter {name} is {:?}, or not contiguous", var.dtype())
        }
        if group.muon && var.rank() != 2 {
            candle_core::bail!("Muon: parameter {name} of shape {:?} is no matrix", var.shape())
        }
        #[cfg(any(feature = "cuda", test))]
        if there {
            let moments = Moments::There(Box::new(There::new(&var)?));
            return Ok(Self { name, var, group, moments });
        }
        let moments = Moments::Here(Here::new(&var, group.muon)?);
        Ok(Self { name, var, group, moments })
    }

    fn has_gradient(&self) -> bool {
        match &self.moments {
            Moments::Here(m) => m.has_gradient(),
            #[cfg(any(feature = "cuda", test))]
            Moments::There(m) => m.has_gradient(),
        }
    }

    fn add(&mut self, g: &Tensor, weight: f32) -> Result<()> {
        match &mut self.moments {
            Moments::Here(m) => m.add(g, weight),
            #[cfg(any(feature = "cuda", test))]
            Moments::There(m) => m.add(g, weight),
        }
    }

    fn forget(&mut self) {
        match &mut self.moments {
            Moments::Here(m) => m.forget(),
            #[cfg(any(feature = "cuda", test))]
            Moments::There(m) => m.forget(),
        }
    }

    fn part(&self, part: Part) -> Result<Cow<'_, [f32]>> {
        match &self.moments {
            Moments::Here(m) => Ok(Cow::Borrowed(m.part(part))),
            #[cfg(any(feature = "cuda", test))]
            Moments::There(m) => Ok(Cow::Owned(m.part(part)?)),
        }
    }

    fn keep(&mut self, kept: Kept) -> Result<()> {
        match &mut self.moments {
            Moments::Here(m) => m.keep(kept),
            #[cfg(any(feature = "cuda", test))]
            Moments::There(m) => m.keep(&self.var, kept)?,
        }
        Ok(())
    }

    /// By `rule`, or by Muon with learning rate `lr`.
    fn step(&mut self, rule: Rule, lr: f64) -> Result<()> {
        match &mut self.moments {
            Moments::Here(m) if self.group.muon => m.muon(&self.var, lr, rule.keep),
            Moments::Here(m) => m.adamw(&self.var, rule),
            #[cfg(any(feature = "cuda", test))]
            Moments::There(m) => m.adamw(&self.var, rule),
        }
    }
}

/// The optimiser of a set of named variables.
pub struct AdamW {
    cfg: AdamWConfig,
    slots: Vec<Slot>,
    steps: u64,
}

impl AdamW {
    /// `group` says how each parameter is treated; `None` leaves it frozen.
    pub fn new(
        params: Vec<(String, Var)>,
        cfg: AdamWConfig,
        group: impl Fn(&str, &Var) -> Option<Group>,
    ) -> Result<Self> {
        let there = |var: &Var| !cfg.offload && super::on_gpu(&[var]);
        let slots = Self::slots(params, group, there)?;
        Ok(Self { cfg, slots, steps: 0 })
    }

    fn slots(
        params: Vec<(String, Var)>,
        group: impl Fn(&str, &Var) -> Option<Group>,
        there: impl Fn(&Var) -> bool,
    ) -> Result<Vec<Slot>> {
        let slot = |(name, var): (String, Var)| {
            let group = group(&name, &var)?;
            let there = !group.muon && there(&var);
            Some(Slot::new(name, var, group, there))
        };
        params.into_iter().filter_map(slot).collect()
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Elements being trained.
    pub fn count(&self) -> usize {
        self.slots.iter().map(|s| s.var.elem_count()).sum()
    }

    /// Adds `weight` times the gradients of one micro-batch to those waiting for the next step. A
    /// parameter without a gradient here contributes nothing.
    pub fn accumulate(&mut self, grads: &GradStore, weight: f64) -> Result<()> {
        self.each(|s| match grads.get(&s.var) {
            Some(g) => s.add(g, weight as f32),
            None => Ok(()),
        })
    }

    /// `f` for every slot: on all threads where it computes here, in turn where it only starts work on a GPU.
    fn each(&mut self, f: impl Fn(&mut Slot) -> Result<()> + Send + Sync) -> Result<()> {
        let (here, there): (Vec<_>, Vec<_>) =
            self.slots.iter_mut().partition(|s| matches!(s.moments, Moments::Here(_)));
        there.into_iter().try_for_each(&f)?;
        here.into_par_iter().try_for_each(f)
    }

    /// Sum of the squares of all gradients.
    fn squares(&self) -> Result<f64> {
        let mut sum = 0.;
        #[cfg(any(feature = "cuda", test))]
        let mut there = vec![];
        for s in &self.slots {
            match &s.moments {
                Moments::Here(m) => sum += m.squares(),
                #[cfg(any(feature = "cuda", test))]
                Moments::There(m) => there.push(&**m),
            }
        }
        #[cfg(any(feature = "cuda", test))]
        return Ok(sum + There::squares(&there)?);
        #[cfg(not(any(feature = "cuda", test)))]
        Ok(sum)
    }

    /// Clips what was accumulated to the configured norm, takes one step and forgets it.
    /// A parameter that has received no gradient since the last step is left as it is.
    pub fn step(&mut self, lr: f64) -> Result<StepReport> {
        let grad_norm = self.squares()?.sqrt();
        if !grad_norm.is_finite() {
            self.slots.iter_mut().for_each(Slot::forget);
            return Ok(StepReport { grad_norm, applied: false });
        }
        self.steps += 1;
        let clip = self.cfg.max_grad_norm.map_or(1., |max| (max / (grad_norm + 1e-6)).min(1.));
        let t = self.steps.min(i32::MAX as u64) as i32;
        let cfg = self.cfg.clone();
        let (c1, c2) = (1. - cfg.beta1.powi(t), 1. - cfg.beta2.powi(t));
        self.each(|s| {
            if !s.has_gradient() {
                return Ok(());
            }
            let lr = lr * s.group.lr;
            let decay = if s.group.decay { cfg.weight_decay } else { 0. };
            let rule = Rule {
                clip: clip as f32,
                beta1: cfg.beta1 as f32,
                beta2: cfg.beta2 as f32,
                keep: (1. - lr * decay) as f32,
                step: (lr / c1) as f32,
                root: (1. / c2) as f32,
                eps: cfg.eps as f32,
            };
            s.step(rule, lr)
        })?;
        Ok(StepReport { grad_norm, applied: true })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::random;

    fn grads(w: &Var, b: &Var) -> Result<GradStore> {
        let y = w.as_tensor().sqr()?.sum(1)?.mul(b)?.exp()?.sum_all()?;
        y.backward()
    }

    fn values(v: &Var) -> Result<Vec<f32>> {
        v.flatten_all()?.to_dtype(DType::F32)?.to_vec1()
    }

    /// A parameter in bf16 goes the way of one on a GPU: steps far below its own precision add up, and a
    /// state that was saved goes on where it was.
    #[test]
    fn half_precision_follows_a_master_copy() -> Result<()> {
        let full = random((4, 3), 5)?;
        let full = Var::from_tensor(&full.to_dtype(DType::BF16)?.to_dtype(DType::F32)?)?;
        let half = Var::from_tensor(&full.to_dtype(DType::BF16)?)?;
        for muon in [false, true] {
            let group = |_: &str, v: &Var| Some(Group { muon, ..Group::usual(v) });
            let new = |v: &Var| AdamW::new(vec![("w".into(), v.clone())], AdamWConfig::default(), group);
            let (mut a, mut b) = (new(&full)?, new(&half)?);
            let before = values(&half)?;
            for i in 0..40 {
                // The same gradient for both.
                let c = random((4, 3), 9)?;
                a.accumulate(&(full.as_tensor() * c.as_tensor())?.sum_all()?.backward()?, 1.)?;
                let c = c.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
                b.accumulate(&(half.to_dtype(DType::F32)? * c)?.sum_all()?.backward()?, 0.5)?;
                b.accumulate(
                    &(half.to_dtype(DType::F32)? * random((4, 3), 9)?.as_tensor())?.sum_all()?.backward()?,
                    0.5,
                )?;
                assert!(a.step(2e-4)?.applied && b.step(2e-4)?.applied);
                if i == 20 {
                    let state = b.state()?;
                    b = new(&half)?;
                    b.restore(&state)?;
                }
            }
            let (a, b) = (values(&full)?, values(&half)?);
            let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 0.006 * a.abs() + 1e-4;
            assert!(a.iter().zip(&b).all(near), "{a:?} {b:?}");
            assert!(b != before);
        }
        Ok(())
    }

    /// The kernels' steps, as C++ on the processor or, with `VALOR_DEVICE=cuda`, on the GPU.
    #[test]
    fn steps_where_the_parameter_is_are_those_of_the_host() -> Result<()> {
        let device = crate::nn::kernels::tests::device();
        if crate::nn::kernels::tests::skip() {
            return Ok(());
        }
        let cfg = AdamWConfig { weight_decay: 0.1, max_grad_norm: Some(0.5), ..Default::default() };
        let make = |there: bool| -> Result<(Var, Var, AdamW)> {
            let placed = |v: Var| Var::from_tensor(&v.to_device(&device)?);
            let (w, b) = (placed(random((30, 40), 1)?)?, placed(random(30, 2)?)?);
            let named = vec![("w".to_string(), w.clone()), ("b".to_string(), b.clone())];
            let slots = AdamW::slots(named, |_, v| Some(Group::usual(v)), |_| there)?;
            Ok((w, b, AdamW { cfg: cfg.clone(), slots, steps: 0 }))
        };
        let loss = |w: &Var, b: &Var| w.as_tensor().sin()?.sum(1)?.mul(b)?.sqr()?.sum_all()?.backward();
        let (mut here, mut there) = (make(false)?, make(true)?);
        for i in 0..6 {
            for (w, b, opt) in [&mut here, &mut there] {
                let before = values(b)?;
                opt.accumulate(&loss(w, b)?, 0.3)?;
                opt.accumulate(&loss(w, b)?, 0.7)?;
                if i == 2 {
                    opt.accumulate(&loss(w, b)?, f64::NAN)?;
                    assert!(!opt.step(0.01)?.applied);
                    assert_eq!(values(b)?, before);
                    opt.accumulate(&loss(w, b)?, 1.)?;
                }
                assert!(opt.step(0.01)?.applied);
                assert_ne!(values(b)?, before);
            }
            if i == 3 {
                let (w, b, _) = &there;
                let state = there.2.state()?;
                let again = make(true)?;
                again.0.set(&w.as_tensor().copy()?)?;
                again.1.set(&b.as_tensor().copy()?)?;
                there = again;
                there.2.restore(&state)?;
            }
        }
        let near = |a: &Var, b: &Var| -> Result<bool> {
            Ok(values(a)?.iter().zip(values(b)?).all(|(a, b)| (a - b).abs() <= 1e-5 + 1e-5 * b.abs()))
        };
        assert!(near(&here.0, &there.0)? && near(&here.1, &there.1)?);
        // A parameter without a gradient stays.
        let before = values(&there.0)?;
        there.2.accumulate(&there.1.as_tensor().sqr()?.sum_all()?.backward()?, 1.)?;
        there.2.step(0.1)?;
        assert_eq!(values(&there.0)?, before);
        Ok(())
    }

    fn setup(cfg: AdamWConfig) -> Result<(Var, Var, AdamW)> {
        let (w, b) = (random((3, 4), 1)?, random(3, 2)?);
        let named = vec![("w".to_string(), w.clone()), ("b".to_string(), b.clone())];
        let opt = AdamW::new(named, cfg, |_, v| Some(Group::usual(v)))?;
        Ok((w, b, opt))
    }

    #[test]
    fn a_step_follows_the_published_rule() -> Result<()> {
        let cfg =
            AdamWConfig { weight_decay: 0.1, max_grad_norm: Some(0.5), beta2: 0.95, ..Default::default() };
        let (w, b, mut opt) = setup(cfg.clone())?;
        let mut want: Vec<(Vec<f64>, Vec<f64>, Vec<f64>)> = vec![];
        for v in [&w, &b] {
            let x: Vec<f64> = values(v)?.iter().map(|&x| x as f64).collect();
            want.push((x.clone(), vec![0.; x.len()], vec![0.; x.len()]));
        }
        for t in 1..=5 {
            let g = grads(&w, &b)?;
            let gs = [&w, &b].map(|v| g.get(v).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap());
            let norm = gs.iter().flatten().map(|&g| (g as f64).powi(2)).sum::<f64>().sqrt();
            let clip = (0.5 / (norm + 1e-6)).min(1.);
            for (i, (x, m, v)) in want.iter_mut().enumerate() {
                for j in 0..x.len() {
                    let g = gs[i][j] as f64 * clip;
                    m[j] = 0.9 * m[j] + 0.1 * g;
                    v[j] = 0.95 * v[j] + 0.05 * g * g;
                    let (mh, vh) = (m[j] / (1. - 0.9f64.powi(t)), v[j] / (1. - 0.95f64.powi(t)));
                    let decay = if i == 0 { 0.1 } else { 0. };
                    x[j] -= 0.01 * (mh / (vh.sqrt() + cfg.eps) + decay * x[j]);
                }
            }
            opt.accumulate(&g, 1.)?;
            let report = opt.step(0.01)?;
            assert!(report.applied && (report.grad_norm - norm).abs() < 1e-4 * norm);
        }
        for (v, (x, ..)) in [&w, &b].iter().zip(&want) {
            for (got, want) in values(v)?.iter().zip(x) {
                assert!((*got as f64 - want).abs() < 1e-5, "{got} {want}");
            }
        }
        Ok(())
    }

    #[test]
    fn muon_resumes_exactly_and_takes_steps_of_adamws_size() -> Result<()> {
        let make = |w: &Var, b: &Var| {
            let named = vec![("w".to_string(), w.clone()), ("b".to_string(), b.clone())];
            AdamW::new(named, AdamWConfig::default(), |n, v| Some(Group::from_nothing(n, v, &[], 1.)))
        };
        let (w, b) = (random((30, 40), 1)?, random(30, 2)?);
        let loss = |w: &Var, b: &Var| w.as_tensor().sum(1)?.mul(b)?.sqr()?.sum_all()?.backward();
        let turn = |opt: &mut AdamW, w: &Var, b: &Var| -> Result<()> {
            opt.accumulate(&loss(w, b)?, 1.)?;
            opt.step(0.01).map(|_| ())
        };
        let mut opt = make(&w, &b)?;
        let before = values(&w)?;
        turn(&mut opt, &w, &b)?;
        let moved = values(&w)?.iter().zip(&before).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
        let size = (moved / before.len() as f32).sqrt() / 0.01;
        // A gradient of rank one: one singular value of 40 steps fully.
        assert!(0.01 < size && size < 0.4, "{size}");
        assert_eq!(opt.state()?.len(), 1 + 2 + 1, "a matrix has one moment, a vector two, and the step");
        let (w2, b2) = (random((30, 40), 3)?, random(30, 4)?);
        let mut again = make(&w2, &b2)?;
        again.restore(&opt.state()?)?;
        w2.set(&w.as_tensor().copy()?)?;
        b2.set(&b.as_tensor().copy()?)?;
        turn(&mut opt, &w, &b)?;
        turn(&mut again, &w2, &b2)?;
        assert_eq!((values(&w)?, values(&b)?), (values(&w2)?, values(&b2)?));
        Ok(())
    }

    #[test]
    fn resumption_is_exact() -> Result<()> {
        let (w, b, mut opt) = setup(AdamWConfig::default())?;
        let turn = |opt: &mut AdamW, w: &Var, b: &Var| -> Result<()> {
            opt.accumulate(&grads(w, b)?, 1.)?;
            opt.step(0.05).map(|_| ())
        };
        turn(&mut opt, &w, &b)?;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("optim.safetensors");
        opt.save(&path)?;
        let (w2, b2, mut again) = setup(AdamWConfig::default())?;
        w2.set(&w.as_tensor().copy()?)?;
        b2.set(&b.as_tensor().copy()?)?;
        again.load(&path)?;
        for _ in 0..3 {
            turn(&mut opt, &w, &b)?;
            turn(&mut again, &w2, &b2)?;
        }
        assert_eq!(values(&w)?, values(&w2)?);
        assert_eq!((values(&b)?, opt.steps()), (values(&b2)?, again.steps()));
        Ok(())
    }

    /// Also where it is the last parameter's master copy that does not fit.
    #[test]
    fn a_state_that_does_not_fit_changes_nothing() -> Result<()> {
        use candle_core::{Device, Shape};
        let half = |seed| Var::from_tensor(&random((4, 3), seed)?.to_dtype(DType::BF16)?);
        let make = |seed| -> Result<(Var, AdamW)> {
            let (a, b) = (half(seed)?, half(seed + 1)?);
            let named = vec![("a".to_string(), a.clone()), ("b".to_string(), b.clone())];
            let mut opt = AdamW::new(named, AdamWConfig::default(), |_, v| Some(Group::usual(v)))?;
            opt.accumulate(&(a.as_tensor() * b.as_tensor())?.sum_all()?.backward()?, 1.)?;
            opt.step(0.01)?;
            Ok((a, opt))
        };
        let (_, other) = make(1)?;
        let (a, mut opt) = make(5)?;
        opt.accumulate(&a.as_tensor().sqr()?.sum_all()?.backward()?, 1.)?;
        opt.step(0.01)?;
        let all = |opt: &AdamW| -> Result<Vec<(String, Vec<f32>)>> {
            let state = opt.state()?.into_iter();
            let values = |t: Tensor| t.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>();
            let mut all = state.map(|(name, t)| Ok((name, values(t)?))).collect::<Result<Vec<_>>>()?;
            all.sort_by(|x, y| x.0.cmp(&y.0));
            Ok(all)
        };
        let (before, weights) = (all(&opt)?, values(&a)?);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("optim.safetensors");
        let f32s = |shape: &[usize]| Tensor::zeros(Shape::from(shape), DType::F32, &Device::Cpu);
        for (name, bad) in [
            ("b.master", f32s(&[3, 4])?),
            ("b.master", f32s(&[2])?),
            ("b.master", f32s(&[4, 3])?.to_dtype(DType::F64)?),
            ("b.exp_avg_sq", f32s(&[4, 3])?.to_dtype(DType::BF16)?),
            ("b.exp_avg", f32s(&[12])?),
        ] {
            let mut state = other.state()?;
            state.insert(name.into(), bad);
            candle_core::safetensors::save(&state, &path)?;
            for e in [opt.restore(&state), opt.load(&path)] {
                let e = e.unwrap_err().to_string();
                assert!(e.contains(name) && e.contains("expected F32 of shape [4, 3]"), "{e}");
            }
            assert_eq!((all(&opt)?, values(&a)?), (before.clone(), weights.clone()), "{name}");
        }
        candle_core::safetensors::save(&other.state()?, &path)?;
        opt.load(&path)?;
        assert_eq!(all(&opt)?, all(&other)?);
        Ok(())
    }

    #[test]
    fn micro_batches_add_up_and_bad_gradients_change_nothing() -> Result<()> {
        let (w, b, mut opt) = setup(AdamWConfig { max_grad_norm: None, ..Default::default() })?;
        let g = grads(&w, &b)?;
        opt.accumulate(&g, 0.5)?;
        opt.accumulate(&g, 0.5)?;
        let (w2, b2, mut once) = setup(AdamWConfig { max_grad_norm: None, ..Default::default() })?;
        once.accumulate(&grads(&w2, &b2)?, 1.)?;
        assert_eq!(opt.step(0.1)?, once.step(0.1)?);
        assert_eq!(values(&w)?, values(&w2)?);

        let before = values(&w)?;
        opt.accumulate(&g, f64::NAN)?;
        let report = opt.step(0.1)?;
        assert!(!report.applied && opt.steps() == 1);
        assert_eq!(values(&w)?, before);
        Ok(())
    }
}
