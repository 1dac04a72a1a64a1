//! Launches on the GPU.

use super::Arg;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, LaunchConfig, PushKernelArg};
use candle_core::{CudaDevice, CudaStorage, DType, Result};
use half::{bf16, f16};

const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));

/// The address of a storage's first element.
pub fn address(s: &CudaStorage) -> Result<u64> {
    let stream = s.device.cuda_stream();
    // The guard that comes with the address orders uses over several streams; here a device has one (see
    // `nn::gpu`).
    macro_rules! of {
        ($t:ty) => {
            s.as_cuda_slice::<$t>()?.device_ptr(&stream).0
        };
    }
    Ok(match candle_core::backend::BackendStorage::dtype(s) {
        DType::F32 => of!(f32),
        DType::F64 => of!(f64),
        DType::F16 => of!(f16),
        DType::BF16 => of!(bf16),
        DType::U32 => of!(u32),
        DType::I64 => of!(i64),
        other => candle_core::bail!("kernels: no {other:?}"),
    })
}

/// Fresh memory; not zeroed unless asked, since a kernel writes every element.
pub fn alloc(device: &CudaDevice, dtype: DType, len: usize, zeroed: bool) -> Result<CudaStorage> {
    macro_rules! of {
        ($t:ty) => {{
            let slice = match zeroed {
                true => device.alloc_zeros::<$t>(len)?,
                // SAFETY: the kernel that the memory is for writes all of it before anyone reads.
                false => unsafe { device.alloc::<$t>(len)? },
            };
            CudaStorage::wrap_cuda_slice(slice, device.clone())
        }};
    }
    Ok(match dtype {
        DType::F32 => of!(f32),
        DType::F64 => of!(f64),
        DType::F16 => of!(f16),
        DType::BF16 => of!(bf16),
        DType::I64 => of!(i64),
        other => candle_core::bail!("kernels: no {other:?}"),
    })
}

pub fn launch(
    device: &CudaDevice,
    kernel: &str,
    (columns, rows): (u32, u32),
    threads: u32,
    args: &[Arg],
) -> Result<()> {
    let f = device.get_or_load_custom_func(kernel, "valor", PTX)?;
    let mut launch = f.builder();
    for arg in args {
        match arg {
            Arg::Pointer(v) | Arg::Size(v) => launch.arg(v),
            Arg::Unsigned(v) => launch.arg(v),
            Arg::Signed(v) => launch.arg(v),
            Arg::Float(v) => launch.arg(v),
            Arg::Double(v) => launch.arg(v),
        };
    }
    let config =
        LaunchConfig { grid_dim: (columns, rows, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: the arguments are those of the kernel's declaration, and each pointer is to as many elements
    // as the kernel touches: `super`'s functions answer for both.
    unsafe { launch.launch(config) }.w()?;
    Ok(())
}
