//! How exactly matrix products are computed.

use super::gpu::has_bf16;
use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU8, Ordering};

/// Of the large matrix products of f32 tensors on the CPU; sums are f32 always. Less than `f32` is for
/// trainings, and faster only where the CPU multiplies bf16 (see [`fast`]); elsewhere it changes nothing. On
/// a GPU, `bf16` is what weights and activations are (an adapter's matrices and the optimiser stay f32).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 24 bits of significand.
    #[default]
    F32,
    /// 16 bits, as two numbers of bf16.
    High,
    /// 8 bits.
    Bf16,
}

static CHOSEN: AtomicU8 = AtomicU8::new(0);

impl Precision {
    /// What language models compute in where nothing is trained: on a GPU bf16, as their checkpoints are, if it
    /// has that; on the CPU f32, since there bf16 would be widened for each product.
    pub fn of_inference(device: &Device) -> DType {
        if has_bf16(device) { DType::BF16 } else { DType::F32 }
    }

    /// What the weights of a network in training are, on this device. On the CPU they are f32, whatever its
    /// products are.
    pub fn of_weights(self, device: &Device) -> DType {
        match self {
            Self::Bf16 if has_bf16(device) => DType::BF16,
            _ => DType::F32,
        }
    }

    /// From now on, in the whole process.
    pub fn choose(self) {
        CHOSEN.store(self as u8, Ordering::Relaxed);
    }

    pub fn chosen() -> Self {
        [Self::F32, Self::High, Self::Bf16][CHOSEN.load(Ordering::Relaxed) as usize]
    }

    /// Numbers of bf16 in place of one, where the CPU multiplies those and less than f32 will do.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn parts(self) -> Option<usize> {
        match self {
            Self::F32 => None,
            Self::High => fast().then_some(2),
            Self::Bf16 => fast().then_some(1),
        }
    }
}

/// Does this CPU multiply bf16 faster than f32 (AMX)?
pub fn fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        super::amx::available()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}
