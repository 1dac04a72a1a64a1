//! Log-probabilities over large vocabularies.

use candle_core::{D, Result, Tensor};

/// `log softmax(logits)[i, targets[i]]`: `logits` `[n, vocab]`, `targets` u32 `[n]` → `[n]`.
pub fn log_probs(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let picked = logits.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?;
    let max = logits.max_keepdim(D::Minus1)?.detach();
    let lse = logits.broadcast_sub(&max)?.exp()?.sum(D::Minus1)?.log()? + max.squeeze(1)?;
    picked - lse?
}

/// [`log_probs`] of `hidden · weightᵀ`: `hidden` `[n, dim]`, `weight` `[vocab, dim]`.
pub fn linear_log_probs(hidden: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
    log_probs(&hidden.matmul(&weight.t()?)?, targets)
}
