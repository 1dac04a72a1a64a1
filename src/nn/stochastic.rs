//! Dropout and stochastic depth with a generator of their own, so that a run can be repeated and
//! resumed exactly.

use super::recompute::resume_from;
use candle_core::{DType, Result, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// What a training forward pass needs besides its inputs. Evaluation passes `None` instead.
#[derive(Clone, Debug)]
pub struct TrainCtx {
    /// Serialisable; saved with a checkpoint.
    pub rng: ChaCha8Rng,
    /// Everything that is trained, where [`TrainCtx::part`]s keep their inputs alone.
    recomputed: Option<Arc<[Tensor]>>,
}

impl TrainCtx {
    pub fn new(seed: u64) -> Self {
        Self { rng: ChaCha8Rng::seed_from_u64(seed), recomputed: None }
    }

    /// Gradient checkpointing, `parameters` being all that is trained: the loss then needs [`super::backward`].
    pub fn recomputing(mut self, parameters: Arc<[Tensor]>) -> Self {
        self.recomputed = Some(parameters);
        self
    }

    /// Do parts keep their inputs alone?
    pub fn recomputes(&self) -> bool {
        self.recomputed.is_some()
    }

    /// A part of a network: `f` of at most three tensors with gradients. What it draws is the same with and
    /// without checkpointing, and the same again in the backward pass.
    pub fn part(
        &mut self,
        inputs: &[&Tensor],
        f: impl Fn(&[Tensor], &mut Option<&mut TrainCtx>) -> Result<Tensor> + Send + Sync + 'static,
    ) -> Result<Tensor> {
        let Some(parameters) = self.recomputed.clone() else {
            let inputs: Vec<Tensor> = inputs.iter().map(|&x| x.clone()).collect();
            return f(&inputs, &mut Some(self));
        };
        let before = Self { rng: self.rng.clone(), recomputed: None };
        let constants: Vec<Tensor> = inputs.iter().map(|x| x.detach()).collect();
        let y = f(&constants, &mut Some(self))?;
        let again = move |x: &[Tensor]| f(x, &mut Some(&mut before.clone()));
        resume_from(y, inputs, parameters, again)
    }

    fn keep(&mut self, shape: Vec<usize>, p: f64, like: &Tensor) -> Result<Tensor> {
        let scale = (1. / (1. - p)) as f32;
        let n: usize = shape.iter().product();
        let mask: Vec<f32> = (0..n).map(|_| if self.rng.random::<f64>() < p { 0. } else { scale }).collect();
        Tensor::from_vec(mask, shape, like.device())?.to_dtype(like.dtype())
    }
}

/// Each element is zeroed with probability `p` (Srivastava et al. 2014); identity without a context.
pub fn dropout(x: &Tensor, p: f64, train: &mut Option<&mut TrainCtx>) -> Result<Tensor> {
    match train {
        #[cfg(feature = "cuda")]
        Some(ctx) if p > 0. && super::on_gpu(&[x]) => super::gpu_ops::dropout(x, p, ctx.rng.random()),
        Some(ctx) if p > 0. => x * ctx.keep(x.dims().to_vec(), p, x)?,
        _ => Ok(x.clone()),
    }
}

/// The whole residual branch of a sample (first dimension) is zeroed with probability `p`
/// (Huang et al. 2016); identity without a context.
pub fn drop_path(x: &Tensor, p: f64, train: &mut Option<&mut TrainCtx>) -> Result<Tensor> {
    match train {
        Some(ctx) if p > 0. => {
            let mut shape = vec![1; x.rank()];
            shape[0] = x.dim(0)?;
            x.broadcast_mul(&ctx.keep(shape, p, x)?)
        }
        _ => Ok(x.clone()),
    }
}

/// 0 where `mask` is not zero, −∞ elsewhere, as f32: what [`super::Mask::Additive`] takes.
pub(crate) fn additive(mask: &Tensor) -> Result<Tensor> {
    let zero = Tensor::zeros(mask.shape(), DType::F32, mask.device())?;
    let never = Tensor::full(f32::NEG_INFINITY, mask.shape(), mask.device())?;
    mask.ne(0u8)?.where_cond(&zero, &never)
}

/// [`super::attention`] with dropout on the probabilities while training. `mask` is additive.
pub(crate) fn attention_dropout(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    mask: Option<&Tensor>,
    p: f64,
    train: &mut Option<&mut TrainCtx>,
) -> Result<Tensor> {
    if p == 0. || train.is_none() {
        let mask = mask.map_or(super::Mask::None, |m| super::Mask::Additive(m.clone()));
        return super::attention(q, k, v, scale, &mask);
    }
    let s = (q.contiguous()?.matmul(&k.t()?.contiguous()?)? * scale)?;
    let s = match mask {
        Some(m) => s.broadcast_add(m)?,
        None => s,
    };
    dropout(&super::softmax(&s)?, p, train)?.matmul(&v.contiguous()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn dropout_keeps_the_mean_and_follows_the_seed() -> Result<()> {
        let x = Tensor::ones((40, 50), DType::F32, &Device::Cpu)?;
        let draw = |seed| dropout(&x, 0.25, &mut Some(&mut TrainCtx::new(seed)));
        let mean = draw(1)?.mean_all()?.to_scalar::<f32>()?;
        assert!((mean - 1.).abs() < 0.05, "{mean}");
        let flat = |t: Tensor| t.flatten_all()?.to_vec1::<f32>();
        assert_eq!(flat(draw(1)?)?, flat(draw(1)?)?);
        assert_ne!(flat(draw(1)?)?, flat(draw(2)?)?);
        assert_eq!(flat(dropout(&x, 0.25, &mut None)?)?, flat(x)?);
        Ok(())
    }

    #[test]
    fn drop_path_drops_whole_samples() -> Result<()> {
        let x = Tensor::ones((64, 3), DType::F32, &Device::Cpu)?;
        let y = drop_path(&x, 0.5, &mut Some(&mut TrainCtx::new(5)))?.to_vec2::<f32>()?;
        assert!(y.iter().all(|r| r == &[0.; 3] || r == &[2.; 3]));
        assert!(y.contains(&vec![0.; 3]) && y.contains(&vec![2.; 3]));
        Ok(())
    }
}
