//! The project's own CUDA kernels and what launches them.
//!
//! A function here takes the memory of its arguments, allocates its results beside them (the optimiser's write what
//! they are given) and starts a few kernels; shapes are the callers' (the ops of [`super`]), who have checked them. On a GPU the
//! memory is candle's and so is the stream. In tests it is the processor's, and the same source, compiled
//! as C++, runs there: every kernel is held against the op that the processor has for it.
//!
//! f32, f16 and bf16; the arithmetic is f32's. All arguments of one call have one type where nothing else
//! is said, and are contiguous.

mod attention;
#[cfg(feature = "cuda")]
mod cuda;
mod deformable;
#[cfg(feature = "cuda")]
mod gemm;
#[cfg(test)]
mod host;
mod norms;
mod pictures;
mod products;
mod tokens;
mod training;

pub(super) use self::attention::*;
pub(super) use self::deformable::*;
pub(super) use self::norms::*;
pub(super) use self::pictures::*;
pub(super) use self::products::*;
pub(super) use self::tokens::*;
pub(super) use self::training::*;

use candle_core::CpuStorage;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
#[cfg(feature = "cuda")]
use candle_core::backend::BackendDevice;
use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{DType, Layout, Result, Shape, Storage, StorageRef, Tensor};
use std::ffi::c_void;

use super::Act;

/// One argument of a kernel, as its declaration has it.
enum Arg {
    Pointer(u64),
    Size(u64),
    Unsigned(u32),
    Signed(i32),
    Float(f32),
    Double(f64),
}

impl Arg {
    /// Whether it is an address that is a multiple of so many bytes.
    fn is_even(&self, bytes: usize) -> bool {
        matches!(self, Self::Pointer(v) if v.is_multiple_of(bytes as u64))
    }

    #[cfg_attr(not(test), allow(dead_code))]
    fn address(&self) -> *const c_void {
        match self {
            Self::Pointer(v) | Self::Size(v) => std::ptr::from_ref(v).cast(),
            Self::Unsigned(v) => std::ptr::from_ref(v).cast(),
            Self::Signed(v) => std::ptr::from_ref(v).cast(),
            Self::Float(v) => std::ptr::from_ref(v).cast(),
            Self::Double(v) => std::ptr::from_ref(v).cast(),
        }
    }
}

/// Memory that kernels read.
#[derive(Clone, Copy)]
pub(super) enum Memory<'a> {
    #[cfg(feature = "cuda")]
    Cuda(&'a CudaStorage, usize),
    #[cfg(test)]
    Host(&'a CpuStorage, usize),
}

impl<'a> Memory<'a> {
    #[cfg(feature = "cuda")]
    pub fn cuda(s: &'a CudaStorage, l: &Layout) -> Result<Self> {
        Ok(Self::Cuda(s, start(l)?))
    }

    /// On the processor.
    #[cfg(test)]
    pub fn host(s: &'a CpuStorage, l: &Layout) -> Result<Self> {
        Ok(Self::Host(s, start(l)?))
    }

    /// Of any strides, from the first element on.
    fn of(s: &'a Storage, from: usize) -> Result<Self> {
        match s {
            #[cfg(feature = "cuda")]
            Storage::Cuda(s) => Ok(Self::Cuda(s, from)),
            #[cfg(test)]
            Storage::Cpu(s) => Ok(Self::Host(s, from)),
            _ => candle_core::bail!("kernels: a tensor that is not on a GPU"),
        }
    }

    /// Its first element.
    fn start(self) -> usize {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(_, from) => from,
            #[cfg(test)]
            Self::Host(_, from) => from,
        }
    }

    fn dtype(self) -> DType {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(s, _) => s.dtype(),
            #[cfg(test)]
            Self::Host(s, _) => s.dtype(),
        }
    }

    fn arg(self) -> Result<Arg> {
        let (first, from) = match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(s, from) => (cuda::address(s)?, from),
            #[cfg(test)]
            Self::Host(s, from) => {
                let first = match s {
                    CpuStorage::F32(v) => v.as_ptr() as u64,
                    CpuStorage::F64(v) => v.as_ptr() as u64,
                    CpuStorage::U32(v) => v.as_ptr() as u64,
                    CpuStorage::I64(v) => v.as_ptr() as u64,
                    _ => candle_core::bail!("kernels: no {:?} on the host", s.dtype()),
                };
                (first, from)
            }
        };
        Ok(Arg::Pointer(first + (from * self.dtype().size_in_bytes()) as u64))
    }

    /// Memory for a result, where these arguments are.
    fn beside(self, dtype: DType, len: usize) -> Result<Owned> {
        self.beside_zeroed(dtype, len, false)
    }

    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    pub fn beside_zeroed(self, dtype: DType, len: usize, zeroed: bool) -> Result<Owned> {
        Ok(match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(s, _) => Owned::Cuda(cuda::alloc(&s.device, dtype, len, zeroed)?),
            #[cfg(test)]
            Self::Host(..) => Owned::Host(match dtype {
                DType::F32 => CpuStorage::F32(vec![0.; len]),
                DType::F64 => CpuStorage::F64(vec![0.; len]),
                DType::I64 => CpuStorage::I64(vec![0; len]),
                _ => candle_core::bail!("kernels: no {dtype:?} on the host"),
            }),
        })
    }

    /// Starts `kernel` on a grid of blocks.
    fn launch(
        self,
        kernel: &'static str,
        dtype: DType,
        grid: (usize, usize),
        threads: usize,
        args: &[Arg],
    ) -> Result<()> {
        if grid.0 == 0 || grid.1 == 0 {
            return Ok(());
        }
        let threads = threads as u32;
        let Ok(columns) = i32::try_from(grid.0) else { candle_core::bail!("{kernel}: {} blocks", grid.0) };
        let grid = (columns as u32, grid.1 as u32);
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(s, _) => cuda::launch(&s.device, kernel, dtype, grid, threads, args),
            #[cfg(test)]
            Self::Host(..) if dtype == DType::F32 => host::launch(kernel, grid, threads, args),
            #[cfg(test)]
            Self::Host(..) => candle_core::bail!("{kernel}: no kernel for {dtype:?} on the host"),
        }
    }
}

fn start(l: &Layout) -> Result<usize> {
    match l.contiguous_offsets() {
        Some((from, _)) => Ok(from),
        None => candle_core::bail!("kernels: expected a contiguous argument, got {l:?}"),
    }
}

/// Memory that a kernel has written.
pub(super) enum Owned {
    #[cfg(feature = "cuda")]
    Cuda(CudaStorage),
    #[cfg(test)]
    Host(CpuStorage),
}

impl Owned {
    /// Of `like`'s device, holding `values`.
    pub fn of(like: Memory, values: Vec<f32>) -> Result<Self> {
        Ok(match like {
            #[cfg(feature = "cuda")]
            Memory::Cuda(s, _) => {
                Self::Cuda(s.device.storage_from_cpu_storage_owned(CpuStorage::F32(values))?)
            }
            #[cfg(test)]
            Memory::Host(..) => Self::Host(CpuStorage::F32(values)),
        })
    }

    /// On the processor.
    pub fn values(&self) -> Result<CpuStorage> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(s) => s.to_cpu_storage(),
            #[cfg(test)]
            Self::Host(s) => Ok(s.clone()),
        }
    }

    /// For `CustomOp::cuda_fwd`.
    #[cfg(feature = "cuda")]
    pub fn cuda(self, shape: impl Into<Shape>) -> Result<(CudaStorage, Shape)> {
        match self {
            Self::Cuda(s) => Ok((s, shape.into())),
            #[cfg(test)]
            Self::Host(_) => candle_core::bail!("kernels: a result that is not on a GPU"),
        }
    }

    /// A constant: backward passes end here.
    pub fn tensor(self, shape: impl Into<Shape>) -> Tensor {
        let storage = match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(s) => Storage::Cuda(s),
            #[cfg(test)]
            Self::Host(s) => Storage::Cpu(s),
        };
        Tensor::from_storage(storage, shape, BackpropOp::none(), false)
    }

    pub fn read(&self) -> Memory<'_> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(s) => Memory::Cuda(s, 0),
            #[cfg(test)]
            Self::Host(s) => Memory::Host(s, 0),
        }
    }

    /// [`Owned::arg`] of what lies from element `at` on.
    fn arg_at(&mut self, at: usize) -> Result<Arg> {
        let bytes = (at * self.read().dtype().size_in_bytes()) as u64;
        match self.arg()? {
            Arg::Pointer(first) => Ok(Arg::Pointer(first + bytes)),
            arg => Ok(arg),
        }
    }

    /// To be written. Exclusive, as the borrow says, so the address may be written through.
    fn arg(&mut self) -> Result<Arg> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(s) => Ok(Arg::Pointer(cuda::address(s)?)),
            #[cfg(test)]
            Self::Host(CpuStorage::F32(v)) => Ok(Arg::Pointer(v.as_mut_ptr() as u64)),
            #[cfg(test)]
            Self::Host(CpuStorage::F64(v)) => Ok(Arg::Pointer(v.as_mut_ptr() as u64)),
            #[cfg(test)]
            Self::Host(CpuStorage::I64(v)) => Ok(Arg::Pointer(v.as_mut_ptr() as u64)),
            #[cfg(test)]
            Self::Host(s) => candle_core::bail!("kernels: no {:?} on the host", s.dtype()),
        }
    }
}

/// A tensor held for reading.
pub(super) struct Held<'a>(StorageRef<'a>, usize);

impl<'a> Held<'a> {
    pub fn new(t: &'a Tensor) -> Result<Self> {
        let (s, l) = t.storage_and_layout();
        let from = start(l)?;
        Ok(Self(s, from))
    }

    /// Of any strides.
    fn strided(t: &'a Tensor) -> Self {
        let (s, l) = t.storage_and_layout();
        Self(s, l.start_offset())
    }

    pub fn get(&self) -> Result<Memory<'_>> {
        Memory::of(&self.0, self.1)
    }
}

/// Threads for a row of `n` values, of which each has four: a power of two, at least a warp, as all blocks have.
fn threads(n: usize) -> usize {
    n.div_ceil(4).next_power_of_two().clamp(32, 1024)
}

/// Threads of a block, and elements of a pointwise kernel that it does.
const BLOCK: usize = 256;

fn unsigned(n: usize) -> Result<Arg> {
    u32::try_from(n).map(Arg::Unsigned).map_err(candle_core::Error::wrap)
}

#[cfg(test)]
pub(super) mod tests;
