//! Differentiable building blocks that every network here is made of.
//!
//! candle's own fused kernels (`ops::rms_norm`, `ops::layer_norm`, `softmax_last_dim`, `rope`)
//! have no backward: gradients stop there without a word. Everything in this module either is
//! composed of differentiable candle ops or is a custom op with its own backward, checked by
//! finite differences (see [`gradcheck`]); only [`packed`] weights are for inference alone, and say so.
//!
//! Shapes are written `[batch, heads, seq, dim]`. On the CPU the fused ops take f32; on a GPU those that
//! have [`kernels`] take f32, f16 and bf16. All else is composed of candle's ops, whatever the type.

use candle_core::{DType, Tensor};

pub mod act;
#[cfg(target_arch = "x86_64")]
mod amx;
pub mod attention;
mod attention_cpu;
pub mod conv;
pub mod conv_same;
mod cpu;
mod few_rows;
#[cfg(target_arch = "x86_64")]
mod fma;
pub mod frozen;
mod gpu;
#[cfg(feature = "cuda")]
mod gpu_ops;
pub mod gradcheck;
mod graft;
#[cfg(any(feature = "cuda", test))]
mod kernels;
pub mod lanes;
pub mod linear;
pub mod lora;
pub mod loss;
pub mod mlp;
pub mod msda;
pub mod norm;
pub mod optim;
pub mod packed;
pub mod params;
pub mod pixel_shuffle;
pub mod precision;
mod recompute;
pub mod resample;
pub mod resize;
pub mod rope;
pub mod rows;
mod simd;
pub mod stochastic;
pub mod window;

pub use act::{Act, gelu, gelu_tanh, relu, silu, softmax, swiglu};
pub use attention::{Mask, attention, attention_packed};
pub use conv::{Conv2d, Conv2dConfig, conv2d};
pub use conv_same::conv_same;
pub use cpu::{composed, keep_freed_memory};
pub use frozen::frozen;
pub use gpu::{free_memory, gpu, sample, set_exact_sums, set_tf32};
pub use linear::{EMBEDDING_STDEV, Embedding, Linear, embedding, linear, linear_b, linear_no_bias};
pub use loss::{linear_log_probs, log_probs};
pub use mlp::GatedMlp;
pub use norm::{GroupNorm, LayerNorm, RmsNorm, group_norm, layer_norm, rms_norm};
pub use optim::{AdamW, AdamWConfig};
pub use params::Params;
pub use pixel_shuffle::pixel_shuffle;
pub use precision::Precision;
pub use recompute::{backward, recompute};
pub use resize::{Filter, Taps, resize, resize_taps};
pub use rope::rope;
pub use stochastic::TrainCtx;

/// Whether these tensors are on a GPU that the project has kernels for, and of one type that they take.
fn on_gpu(ts: &[&Tensor]) -> bool {
    let takes = |t: &&Tensor| {
        t.device().is_cuda()
            && t.dtype() == ts[0].dtype()
            && matches!(t.dtype(), DType::F32 | DType::F16 | DType::BF16)
    };
    cfg!(feature = "cuda") && ts.iter().all(takes)
}

/// The gradients of a `CustomOp3`'s three arguments, where they have one.
type Grads3 = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

/// Whether an op that is fused on the CPU and on the GPU can take these tensors where they are.
fn fused(ts: &[&Tensor]) -> bool {
    cpu::fused(ts) || on_gpu(ts)
}
