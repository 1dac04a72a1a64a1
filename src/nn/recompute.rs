//! Gradient checkpointing: a part of a network that keeps nothing of its forward pass but the inputs, and runs
//! once more in the backward pass (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
//!
//! candle's ops take three tensors at most, and a layer has more parameters than that. So the op here enters
//! the graph by its inputs and, where there is room, by one of the parameters, and the parameters'
//! gradients, which its backward pass finds by itself, go round the graph: into a store of the thread that
//! [`backward`] opens and joins with candle's. A graph with such a part is an error in candle's own
//! `backward`.

use super::Grads3;
use super::graft::{cpu_storage, cuda_storage};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CudaStorage, CustomOp3, D, Layout, Result, Shape, Tensor, Var};
use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};

thread_local! {
    /// Gradients of parameters that went round the graph; `None` outside [`backward`].
    static ROUND: RefCell<Option<Vec<(Tensor, Tensor)>>> = const { RefCell::new(None) };
}

/// `f` of some tensors, kept as these alone. `parameters` are all else that `f` uses and that may be trained,
/// each once, and variables themselves: candle keeps no gradient of what is computed from them. There may be
/// others among them.
///
/// # Errors
/// Those of `f`, and if more than three of the inputs are part of a graph.
pub fn recompute(
    inputs: &[&Tensor],
    parameters: Arc<[Tensor]>,
    f: impl Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let constants: Vec<Tensor> = inputs.iter().map(|x| x.detach()).collect();
    let y = f(&constants)?;
    resume_from(y, inputs, parameters, f)
}

/// [`recompute`] where the value is known already: `f` must give the same once more.
pub(super) fn resume_from(
    y: Tensor,
    inputs: &[&Tensor],
    parameters: Arc<[Tensor]>,
    f: impl Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let tracked: Vec<usize> = (0..inputs.len()).filter(|&i| inputs[i].track_op()).collect();
    if tracked.is_empty() && !y.track_op() {
        // Nothing of it is trained.
        return Ok(y);
    }
    // By a parameter the op is part of the graph even where candle's walk stops at an input.
    let anchor = parameters.iter().find(|p| p.track_op()).cloned();
    let args: Vec<&Tensor> = tracked.iter().map(|&i| inputs[i]).chain(anchor.as_ref()).collect();
    let Some(first) = args.first() else {
        candle_core::bail!("recompute: something trained is among neither the inputs nor the parameters")
    };
    if tracked.len() > 3 {
        candle_core::bail!("recompute: {} inputs with gradients, at most 3 can be", tracked.len())
    }
    // The graph behind the value ends here.
    let value = Mutex::new(Some(y.detach()));
    drop(y);
    let inputs = inputs.iter().map(|x| x.detach()).collect();
    let op = Recompute { value, inputs, tracked, parameters, f };
    first.apply_op3(args.get(1).unwrap_or(first), args.get(2).unwrap_or(first), op)
}

/// candle's `backward`, for graphs that may have parts made by [`recompute`].
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    let before = ROUND.replace(Some(Vec::new()));
    let grads = loss.backward();
    let round = ROUND.replace(before).unwrap_or_default();
    let mut grads = grads?;
    for (parameter, g) in round {
        let g = match grads.get(&parameter) {
            Some(sum) => (sum + g)?,
            None => g,
        };
        grads.insert(&parameter, g);
    }
    Ok(grads)
}

struct Recompute<F> {
    /// Until the op has handed it on.
    value: Mutex<Option<Tensor>>,
    inputs: Vec<Tensor>,
    /// Which of the inputs are the op's arguments, in their order.
    tracked: Vec<usize>,
    parameters: Arc<[Tensor]>,
    f: F,
}

impl<F> Recompute<F> {
    fn value(&self) -> Result<Tensor> {
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        value.take().ok_or_else(|| candle_core::Error::msg("recompute: the value is gone"))
    }
}

impl<F: Fn(&[Tensor]) -> Result<Tensor> + Send + Sync> CustomOp3 for Recompute<F> {
    fn name(&self) -> &'static str {
        "recompute"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        cpu_storage(&self.value()?)
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda_storage(&self.value()?)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Grads3> {
        // The outer pass's store is out of reach of the inner one, which may have such parts too.
        let Some(mut round) = ROUND.take() else {
            candle_core::bail!("recompute: a graph with such a part needs nn::backward")
        };
        let again = || -> Result<(Vec<Var>, GradStore)> {
            let mut inputs = self.inputs.clone();
            let vars = self.tracked.iter().map(|&i| {
                let var = Var::from_tensor(&inputs[i])?;
                inputs[i] = var.as_tensor().clone();
                Ok(var)
            });
            let vars = vars.collect::<Result<Vec<Var>>>()?;
            let y = (self.f)(&inputs)?;
            Ok((vars, backward(&(y * grad)?.sum(D::Minus1)?.sum_all()?)?))
        };
        let again = again();
        if let Ok((_, grads)) = &again {
            let found = |p: &Tensor| Some((p.clone(), grads.get(p)?.clone()));
            round.extend(self.parameters.iter().filter_map(found));
        }
        ROUND.set(Some(round));
        let (vars, mut grads) = again?;
        let mut of = vars.iter().map(|x| grads.remove(x));
        Ok((of.next().flatten(), of.next().flatten(), of.next().flatten()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::{max_gradient_error, random};

    #[test]
    fn gradients_are_those_of_the_plain_graph() -> Result<()> {
        let (x, w, v) = (random((3, 4), 1)?, random((4, 4), 2)?, random((4, 4), 3)?);
        let part = |x: &Tensor, w: &Tensor, v: &Tensor| x.matmul(w)?.tanh()?.matmul(v)? + x;
        // A parameter that is used outside, too, and a part inside a part.
        let plain = |x: &Tensor| part(&part(x, &w, &v)?, &v, &v)?.mul(&x.matmul(&w)?)?.sum_all();
        let kept = |x: &Tensor| -> Result<Tensor> {
            let (w2, v2) = (w.as_tensor().clone(), v.as_tensor().clone());
            let all: Arc<[Tensor]> = [w2.clone(), v2.clone()].into();
            let y = recompute(&[x], all.clone(), move |x| part(&x[0], &w2, &v2))?;
            let v2 = v.as_tensor().clone();
            let y = recompute(&[&y], all.clone(), move |y| {
                let v3 = v2.clone();
                recompute(&[&y[0]], all.clone(), move |y| part(&y[0], &v3, &v3))
            })?;
            y.mul(&x.matmul(&w)?)?.sum_all()
        };
        let (a, b) = (plain(&x)?, kept(&x)?);
        assert_eq!(a.to_scalar::<f32>()?, b.to_scalar::<f32>()?);
        let (ga, gb) = (a.backward()?, backward(&b)?);
        for p in [&x, &w, &v] {
            let e = (ga.get(p).unwrap() - gb.get(p).unwrap())?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(e < 1e-5, "{e}");
        }
        // An input that nothing trains, as embeddings before an adapter.
        let fixed = x.as_detached_tensor();
        let g = backward(&kept(&fixed)?)?;
        assert!(g.get(&w).is_some() && g.get(&v).is_some());
        let e = kept(&x)?.backward().unwrap_err().to_string();
        assert!(e.contains("nn::backward"), "{e}");
        Ok(())
    }

    #[test]
    fn gradients_are_those_of_finite_differences() -> Result<()> {
        let (x, w, v) = (random((3, 4), 1)?, random((4, 4), 2)?, random((4, 4), 3)?);
        let y = || {
            let (w, v) = (w.as_tensor().clone(), v.as_tensor().clone());
            let all: Arc<[Tensor]> = [w.clone(), v.clone()].into();
            recompute(&[x.as_tensor()], all, move |x| x[0].matmul(&w)?.sqr()?.matmul(&v)? + &x[0])
        };
        let e = max_gradient_error(&[x.clone(), w.clone(), v.clone()], 1e-2, 60, y)?;
        assert!(e < 1e-3, "{e}");
        Ok(())
    }

    #[test]
    fn several_inputs_of_which_some_are_constants() -> Result<()> {
        let (a, b, c, w) = (random((3, 4), 1)?, random((3, 4), 2)?, random((3, 4), 3)?, random((4, 4), 4)?);
        let fixed = random((3, 4), 5)?.as_detached_tensor();
        let part = |x: &[Tensor], w: &Tensor| ((&x[0] * &x[1])?.tanh()? + (&x[2] * &x[3])?.matmul(w)?)?.sqr();
        let inputs = [fixed, b.as_tensor().clone(), a.as_tensor().clone(), c.as_tensor().clone()];
        let (plain, w2) = (part(&inputs, &w)?.sum_all()?, w.as_tensor().clone());
        let refs: Vec<&Tensor> = inputs.iter().collect();
        let kept = recompute(&refs, [w2.clone()].into(), move |x| part(x, &w2))?.sum_all()?;
        let (ga, gb) = (plain.backward()?, backward(&kept)?);
        for p in [&a, &b, &c, &w] {
            let e = (ga.get(p).unwrap() - gb.get(p).unwrap())?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(e < 1e-5, "{e}");
        }
        // A fourth input with a gradient has no place in candle's ops.
        let four = [a.as_tensor(), b.as_tensor(), c.as_tensor(), w.as_tensor()];
        assert!(
            recompute(&four, [].into(), |x| Ok(x[0].clone())).unwrap_err().to_string().contains("4 inputs")
        );
        // What nothing trains is no part of a graph, and what is trained must be known.
        assert!(!recompute(&[&inputs[0]], [].into(), |x| x[0].sqr())?.track_op());
        let w2 = w.as_tensor().clone();
        let lost = recompute(&[&inputs[0]], [].into(), move |x| x[0].matmul(&w2)).unwrap_err().to_string();
        assert!(lost.contains("neither"), "{lost}");
        Ok(())
    }
}
