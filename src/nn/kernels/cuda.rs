//! Launches on the GPU.

use super::Arg;
use candle_core::cuda_backend::DeviceId;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, DevicePtr, LaunchConfig, PushKernelArg};
use candle_core::{CudaDevice, CudaStorage, DType, Result};
use half::{bf16, f16};
use std::collections::HashMap;
use std::sync::RwLock;

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

/// A kernel for a type, looked up once: the driver takes about as long for that as for a launch.
fn function(device: &CudaDevice, kernel: &'static str, dtype: DType) -> Result<CudaFunction> {
    type Found = HashMap<(DeviceId, &'static str, DType), CudaFunction>;
    static FOUND: RwLock<Option<Found>> = RwLock::new(None);
    let key = (device.id(), kernel, dtype);
    let found = FOUND.read().unwrap_or_else(|e| e.into_inner());
    if let Some(f) = found.as_ref().and_then(|found| found.get(&key)) {
        return Ok(f.clone());
    }
    drop(found);
    let kind = match dtype {
        DType::F32 => "f32",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        _ => candle_core::bail!("{kernel}: no kernel for {dtype:?}"),
    };
    let f = device.get_or_load_custom_func(&format!("{kernel}_{kind}"), "valor", PTX)?.into_cuda_function();
    let mut found = FOUND.write().unwrap_or_else(|e| e.into_inner());
    found.get_or_insert_default().insert(key, f.clone());
    Ok(f)
}

pub fn launch(
    device: &CudaDevice,
    kernel: &'static str,
    dtype: DType,
    (columns, rows): (u32, u32),
    threads: u32,
    args: &[Arg],
) -> Result<()> {
    let (f, stream) = (function(device, kernel, dtype)?, device.cuda_stream());
    let mut launch = stream.launch_builder(&f);
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
