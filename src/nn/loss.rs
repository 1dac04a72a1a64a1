//! Log-probabilities over large vocabularies.

use super::cpu::{self, Held, Mat, par_rows};
#[cfg(feature = "cuda")]
use super::kernels::{self, Memory};
use super::simd::{self, wide};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::{Mutex, PoisonError};

/// `log softmax(logits)[i, targets[i]]`: `logits` `[n, vocab]`, `targets` u32 `[n]` → `[n]`, f32 (f64 of f64).
pub fn log_probs(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (n, vocab) = logits.dims2()?;
    if super::fused(&[logits]) {
        let op = LogProbs { targets: checked(targets, n, vocab)?, placed: targets.clone() };
        return logits.contiguous()?.apply_op1(op);
    }
    // Sums over a vocabulary are beyond half precision.
    let logits = match logits.dtype() {
        DType::F64 => logits.clone(),
        _ => logits.to_dtype(DType::F32)?,
    };
    let picked = logits.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?;
    let max = logits.max_keepdim(D::Minus1)?.detach();
    let lse = logits.broadcast_sub(&max)?.exp()?.sum(D::Minus1)?.log()? + max.squeeze(1)?;
    picked - lse?
}

/// [`log_probs`] of `hidden · weightᵀ`: `hidden` `[n, dim]`, `weight` `[vocab, dim]`.
///
/// On the CPU the logits exist for a few hundred rows at a time, and are calculated once more in backward;
/// but of a weight that is trained they are kept if they take no more memory than its gradient will.
pub fn linear_log_probs(hidden: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let ((n, d), (vocab, wd)) = (hidden.dims2()?, weight.dims2()?);
    if d != wd {
        candle_core::bail!("log-probs: hidden {:?}, weight {:?}", hidden.shape(), weight.shape())
    }
    if cpu::fused(&[hidden, weight]) {
        let targets = checked(targets, n, vocab)?;
        let op = LinearLogProbs { targets, keep: weight.track_op() && n <= d, kept: Mutex::new(None) };
        return hidden.contiguous()?.apply_op2(&weight.contiguous()?, op);
    }
    log_probs(&hidden.matmul(&weight.t()?)?, targets)
}

fn checked(targets: &Tensor, n: usize, vocab: usize) -> Result<Vec<u32>> {
    let t = targets.to_vec1::<u32>()?;
    if t.len() != n {
        candle_core::bail!("log-probs: {} targets for {n} rows", t.len())
    }
    if let Some(bad) = t.iter().find(|&&t| t as usize >= vocab) {
        candle_core::bail!("log-probs: target {bad} outside the vocabulary of {vocab}")
    }
    Ok(t)
}

wide! {
    /// Log of the sum of exponentials of a row.
    fn log_sum_exp(x: &[f32]) -> f32 {
        let m = simd::max(x);
        m + simd::sum_by(x.len(), |i| simd::exp::<FMA>(x[i] - m)).ln()
    }
}

wide! {
    /// Turns a row of logits into the gradient `g (onehot − softmax)` of its log-probability.
    fn row_gradient(x: &mut [f32], target: usize, g: f32) {
        simd::softmax_row::<FMA>(x);
        for v in x.iter_mut() {
            *v *= -g;
        }
        x[target] += g;
    }
}

struct LogProbs {
    targets: Vec<u32>,
    /// The same where the logits are.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    placed: Tensor,
}

impl CustomOp1 for LogProbs {
    fn name(&self) -> &'static str {
        "log-probs"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, (n, vocab)) = (cpu::values(x, l)?, l.shape().dims2()?);
        let rows = x.par_chunks(vocab).zip(&self.targets);
        let y: Vec<f32> = rows.map(|(x, &t)| x[t as usize] - log_sum_exp(x)).collect();
        Ok((CpuStorage::F32(y), n.into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, l: &Layout) -> Result<(CudaStorage, Shape)> {
        let (n, vocab) = l.shape().dims2()?;
        kernels::log_prob(Memory::cuda(x, l)?, &self.placed, n, vocab)?.0.cuda(n)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return kernels::log_prob_back(x, &self.placed, g).map(Some);
        }
        let vocab = x.dim(1)?;
        let (g, hx) = (g.to_vec1::<f32>()?, Held::new(x)?);
        let xs = hx.get()?;
        let mut dx = vec![0f32; xs.len()];
        par_rows(&mut dx, vocab, |row, dx| {
            dx.copy_from_slice(&xs[row * vocab..row * vocab + dx.len()]);
            for (i, dx) in dx.chunks_exact_mut(vocab).enumerate() {
                row_gradient(dx, self.targets[row + i] as usize, g[row + i]);
            }
        });
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

struct LinearLogProbs {
    targets: Vec<u32>,
    /// Are all logits kept until backward?
    keep: bool,
    kept: Mutex<Option<Vec<f32>>>,
}

/// Rows whose logits exist at one time: about 16 MB of them, or as many rows as make reading the weight worth
/// its while.
fn block_rows(vocab: usize) -> usize {
    (4_194_304 / vocab.max(1)).clamp(256, 2048)
}

impl CustomOp2 for LinearLogProbs {
    fn name(&self) -> &'static str {
        "linear-log-probs"
    }

    fn cpu_fwd(
        &self,
        h: &CpuStorage,
        lh: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (h, w) = (cpu::values(h, lh)?, cpu::values(w, lw)?);
        let ((n, d), (vocab, _)) = (lh.shape().dims2()?, lw.shape().dims2()?);
        let rows = if self.keep { n } else { block_rows(vocab).min(n) };
        let mut y = vec![0f32; n];
        for (i, y) in y.chunks_mut(rows.max(1)).enumerate() {
            let (at, r) = (i * rows, y.len());
            let block = Mat::rows(&h[at * d..(at + r) * d], d);
            let logits = cpu::product((r, vocab, d), block, Mat::rows(w, d).t());
            let targets = &self.targets[at..at + r];
            y.par_iter_mut().zip(logits.par_chunks(vocab)).zip(targets).for_each(|((y, x), &t)| {
                *y = x[t as usize] - log_sum_exp(x);
            });
            if self.keep {
                *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(logits);
            }
        }
        Ok((CpuStorage::F32(y), n.into()))
    }

    fn bwd(
        &self,
        h: &Tensor,
        w: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let g = g.to_vec1::<f32>()?;
        let (hh, hw) = (Held::new(h)?, Held::new(w)?);
        let (hs, ws) = (hh.get()?, hw.get()?);
        let ((n, d), vocab) = (h.dims2()?, w.dim(0)?);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).take();
        let rows = if kept.is_some() { n } else { block_rows(vocab).min(n).max(1) };
        let mut dh = h.track_op().then(|| vec![0f32; hs.len()]);
        let mut dw: Option<Vec<f32>> = None;
        for at in (0..n).step_by(rows) {
            let r = rows.min(n - at);
            let block = Mat::rows(&hs[at * d..(at + r) * d], d);
            let again = || cpu::product((r, vocab, d), block, Mat::rows(ws, d).t());
            let mut logits = kept.take().unwrap_or_else(again);
            let per_row = self.targets[at..at + r].par_iter().zip(&g[at..at + r]);
            logits
                .par_chunks_mut(vocab)
                .zip(per_row)
                .for_each(|(x, (&t, &g))| row_gradient(x, t as usize, g));
            let logits = Mat::rows(&logits, vocab);
            if let Some(dh) = &mut dh {
                cpu::gemm((r, d, vocab), &mut dh[at * d..(at + r) * d], false, logits, Mat::rows(ws, d));
            }
            match &mut dw {
                _ if !w.track_op() => {}
                Some(dw) => cpu::gemm((vocab, d, r), dw, true, logits.t(), block),
                None => dw = Some(cpu::product((vocab, d, r), logits.t(), block)),
            }
        }
        let back = |v: Option<Vec<f32>>, like: &Tensor| {
            v.map(|v| Tensor::from_vec(v, like.shape(), like.device())).transpose()
        };
        Ok((back(dh, h)?, back(dw, w)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::{assert_same, max_gradient_error, random};
    use candle_core::Device;

    #[test]
    fn equals_composed_and_differentiates() -> Result<()> {
        // Fewer rows than channels, whose logits are kept; and more.
        equals_composed(&[0, 32, 5, 5, 17, 1, 30])?;
        equals_composed(&[0, 32, 5, 5, 17, 1, 30, 2, 9, 31, 11, 12, 12])
    }

    /// In blocks of rows, and a kept block of all that is gone when the graph is differentiated again.
    #[test]
    fn blocks_and_kept_logits_give_the_gradients_of_the_whole() -> Result<()> {
        let rows = 2 * block_rows(33) + 7;
        for (n, d) in [(rows, 12), (20, 24)] {
            let (h, w) = (random((n, d), 1)?, random((33, d), 2)?);
            let targets: Vec<u32> = (0..n as u32).map(|i| i * 7 % 33).collect();
            let t = Tensor::new(targets, &Device::Cpu)?;
            let loss = (linear_log_probs(&h, &w, &t)? * random(n, 3)?.as_tensor())?.sum_all()?;
            let want = (log_probs(&h.matmul(&w.t()?)?, &t)? * random(n, 3)?.as_tensor())?.sum_all()?;
            let want = want.backward()?;
            for grads in [loss.backward()?, loss.backward()?] {
                for v in [&h, &w] {
                    let (got, want) = (grads.get(v).expect("a gradient"), want.get(v).expect("a gradient"));
                    let scale = want.abs()?.max_all()?.to_scalar::<f32>()?;
                    let far = (got - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
                    assert!(scale > 0. && far <= 1e-5 * scale, "{n} rows: {far} of {scale}");
                }
            }
        }
        Ok(())
    }

    fn equals_composed(targets: &[u32]) -> Result<()> {
        let n = targets.len();
        let (h, w) = (random((n, 12), 1)?, random((33, 12), 2)?);
        let t = Tensor::new(targets, &Device::Cpu)?;
        let composed = || {
            let all = candle_nn::ops::log_softmax(&h.matmul(&w.t()?)?, D::Minus1)?;
            all.gather(&t.unsqueeze(1)?, 1)?.squeeze(1)
        };
        assert_same(&[&h, &w], || linear_log_probs(&h, &w, &t), composed)?;
        assert_same(&[&h, &w], || log_probs(&h.matmul(&w.t()?)?, &t), composed)?;
        let e = max_gradient_error(&[h.clone(), w.clone()], 1e-2, 60, || linear_log_probs(&h, &w, &t))?;
        assert!(e < 1e-3, "{e}");
        let logits = random((n, 33), 4)?;
        let e = max_gradient_error(std::slice::from_ref(&logits), 1e-2, 120, || log_probs(&logits, &t))?;
        assert!(e < 1e-3, "{e}");
        let outside = Tensor::new(vec![33u32; n], &Device::Cpu)?;
        assert!(linear_log_probs(&h, &w, &outside).is_err());
        Ok(())
    }
}
