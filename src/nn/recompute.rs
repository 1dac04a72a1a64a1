//! Gradient checkpointing: a part of a network that keeps nothing of its forward pass but the input, and runs
//! once more in the backward pass (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
//!
//! candle's ops take three tensors at most, and a layer has more parameters than that. So the op here enters
//! the graph by its input and by one of the parameters, and the parameters' gradients, which its
//! backward pass finds by itself, go round the graph: into a store of the thread that [`backward`] opens and
//! joins with candle's. A graph with such a part is an error in candle's own `backward`.

use super::graft::{cpu_storage, cuda_storage};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, D, Layout, Result, Shape, Tensor, Var};
use std::cell::RefCell;

thread_local! {
    /// Gradients of parameters that went round the graph; `None` outside [`backward`].
    static ROUND: RefCell<Option<Vec<(Tensor, Tensor)>>> = const { RefCell::new(None) };
}

/// `f(x)`, kept as `x` alone. `parameters` are all that `f` uses and that may be trained.
pub fn recompute(
    x: &Tensor,
    parameters: Vec<Tensor>,
    f: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let trained: Vec<Tensor> = parameters.into_iter().filter(Tensor::track_op).collect();
    let anchor = match trained.first() {
        Some(first) => first.clone(),
        None if x.track_op() => x.clone(),
        None => return f(x),
    };
    x.apply_op2(&anchor, Recompute { x: x.detach(), trained, f })
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
    x: Tensor,
    trained: Vec<Tensor>,
    f: F,
}

impl<F: Fn(&Tensor) -> Result<Tensor> + Send + Sync> CustomOp2 for Recompute<F> {
    fn name(&self) -> &'static str {
        "recompute"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        // The graph behind the value exists only until this returns.
        cpu_storage(&(self.f)(&self.x)?)
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda_storage(&(self.f)(&self.x)?)
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        // The outer pass's store is out of reach of the inner one, which may have such parts too.
        let Some(mut round) = ROUND.take() else {
            candle_core::bail!("recompute: a graph with such a part needs nn::backward")
        };
        let x = Var::from_tensor(&self.x)?;
        let again = (self.f)(x.as_tensor()).and_then(|y| backward(&(y * grad)?.sum(D::Minus1)?.sum_all()?));
        if let Ok(grads) = &again {
            round.extend(self.trained.iter().filter_map(|p| Some((p.clone(), grads.get(p)?.clone()))));
        }
        ROUND.set(Some(round));
        Ok((again?.remove(&x), None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::random;

    #[test]
    fn gradients_are_those_of_the_plain_graph() -> Result<()> {
        let (x, w, v) = (random((3, 4), 1)?, random((4, 4), 2)?, random((4, 4), 3)?);
        let part = |x: &Tensor, w: &Tensor, v: &Tensor| x.matmul(w)?.tanh()?.matmul(v)? + x;
        // A parameter that is used outside, too, and a part inside a part.
        let plain = |x: &Tensor| part(&part(x, &w, &v)?, &v, &v)?.mul(&x.matmul(&w)?)?.sum_all();
        let kept = |x: &Tensor| -> Result<Tensor> {
            let (w2, v2) = (w.as_tensor().clone(), v.as_tensor().clone());
            let y = recompute(x, vec![w2.clone(), v2.clone()], move |x| part(x, &w2, &v2))?;
            let v2 = v.as_tensor().clone();
            let y = recompute(&y, vec![v2.clone()], move |y| {
                let v3 = v2.clone();
                recompute(y, vec![v2.clone()], move |y| part(y, &v3, &v3))
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
}
