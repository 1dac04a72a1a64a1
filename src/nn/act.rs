//! Activations and softmax.

use candle_core::{D, Result, Tensor};

pub fn relu(x: &Tensor) -> Result<Tensor> {
    x.relu()
}

pub fn silu(x: &Tensor) -> Result<Tensor> {
    x.silu()
}

/// GELU by the error function (`gelu` in HF configs).
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    x.gelu_erf()
}

/// GELU by the tanh approximation (`gelu_pytorch_tanh` in HF configs).
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    x.gelu()
}

/// Softmax over the last dimension, differentiable.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    candle_nn::ops::softmax(x, D::Minus1)
}

/// `silu(gate) · up`, the gated unit of Llama-style MLPs (Shazeer 2020).
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.silu()? * up
}
