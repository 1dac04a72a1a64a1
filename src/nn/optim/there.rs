//! Moments and summed gradients of one parameter on the GPU that it is on, where its steps are taken.

use super::{Kept, Part, Rule};
use crate::nn::kernels::{self, Held, Memory, Owned};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Tensor, Var};
use std::sync::Mutex;

pub(super) struct There {
    m: Owned,
    v: Owned,
    /// The weights in full, of a parameter in half precision.
    master: Option<Owned>,
    /// Sum of the gradients since the last step; none before the first, so that none takes room while others compute.
    grad: Option<Owned>,
    n: usize,
}

impl There {
    pub fn new(var: &Var) -> Result<Self> {
        let n = var.elem_count();
        let held = Held::new(var)?;
        let like = held.get()?;
        let zeros = || like.beside_zeroed(DType::F32, n, true);
        let master = match var.dtype() {
            DType::F32 => None,
            _ => {
                let mut master = zeros()?;
                kernels::add_gradient(like, n, &mut master, 1., true)?;
                Some(master)
            }
        };
        Ok(Self { m: zeros()?, v: zeros()?, master, grad: None, n })
    }

    /// Empty where there is none.
    pub fn part(&self, part: Part) -> Result<Vec<f32>> {
        let of = match part {
            Part::Mean => Some(&self.m),
            Part::Square => Some(&self.v),
            Part::Master => self.master.as_ref(),
        };
        match of.map(Owned::values).transpose()? {
            None => Ok(vec![]),
            Some(CpuStorage::F32(values)) => Ok(values),
            Some(_) => candle_core::bail!("AdamW: a moment that is not f32"),
        }
    }

    pub fn keep(&mut self, var: &Var, kept: Kept) -> Result<()> {
        let held = Held::new(var)?;
        let like = held.get()?;
        (self.m, self.v) = (Owned::of(like, kept.m)?, Owned::of(like, kept.v)?);
        if !kept.master.is_empty() {
            self.master = Some(Owned::of(like, kept.master)?);
        }
        self.grad = None;
        Ok(())
    }

    pub fn add(&mut self, g: &Tensor, weight: f32) -> Result<()> {
        let g = g.detach().contiguous()?;
        let held = Held::new(&g)?;
        let g = held.get()?;
        let first = self.grad.is_none();
        let mut sum = match self.grad.take() {
            Some(sum) => sum,
            None => g.beside_zeroed(DType::F32, self.n, false)?,
        };
        kernels::add_gradient(g, self.n, &mut sum, weight, first)?;
        self.grad = Some(sum);
        Ok(())
    }

    pub fn has_gradient(&self) -> bool {
        self.grad.is_some()
    }

    pub fn forget(&mut self) {
        self.grad = None;
    }

    /// Sums of squares of the gradients of all of `of`, added up in the same order at each run.
    pub fn squares(of: &[&Self]) -> Result<f64> {
        let grads: Vec<(&Owned, usize)> = of.iter().filter_map(|t| Some((t.grad.as_ref()?, t.n))).collect();
        let Some((first, _)) = grads.first() else { return Ok(0.) };
        let mut parts = first.read().beside_zeroed(DType::F64, grads.len() * kernels::PARTS, false)?;
        for (i, (g, n)) in grads.iter().enumerate() {
            kernels::sum_squares(g.read(), *n, &mut parts, i * kernels::PARTS)?;
        }
        match parts.values()? {
            CpuStorage::F64(parts) => Ok(parts.iter().sum()),
            _ => candle_core::bail!("AdamW: a sum that is not f64"),
        }
    }

    pub fn adamw(&mut self, var: &Var, rule: Rule) -> Result<()> {
        let n = self.n;
        let Some(grad) = self.grad.take() else { return Ok(()) };
        let state = Mutex::new((self.master.as_mut(), &mut self.m, &mut self.v));
        var.inplace_op1(&Update { rule, n, grad, state })
    }
}

struct Update<'a> {
    rule: Rule,
    n: usize,
    grad: Owned,
    /// Weights in full, first moment, second moment.
    state: Mutex<(Option<&'a mut Owned>, &'a mut Owned, &'a mut Owned)>,
}

impl Update<'_> {
    /// `w` is the caller's to write.
    fn run(&self, w: Memory) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let (master, m, v) = &mut *state;
        kernels::adamw(w, self.n, master.as_deref_mut(), (m, v, &self.grad), self.rule)
    }
}

impl InplaceOp1 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    #[cfg(test)]
    fn cpu_fwd(&self, s: &mut CpuStorage, l: &Layout) -> Result<()> {
        self.run(Memory::host(s, l)?)
    }

    #[cfg(not(test))]
    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        candle_core::bail!("{}: for parameters on a GPU", self.name())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s: &mut CudaStorage, l: &Layout) -> Result<()> {
        self.run(Memory::cuda(s, l)?)
    }
}
