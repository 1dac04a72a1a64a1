//! How exactly matrix products are computed.

use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU8, Ordering};

/// Of the large matrix products of f32 tensors on the CPU; sums are f32 always. Less than `f32` is for
/// trainings, and faster only where the CPU multiplies bf16 (see [`fast`]); elsewhere it changes nothing.
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
