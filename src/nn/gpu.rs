//! GPUs as this program opens them.

use candle_core::{Device, Result, Tensor};
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// An NVIDIA GPU: one device, and one stream of work, however many threads ask for it.
///
/// candle's own `Device::new_cuda` works on the calling thread's stream, and what one thread has begun there is not
/// ordered before what another does with its result. Here all threads' work is in the order in which they
/// launched it, so values may be handed from one to another as on the processor.
pub fn gpu(ordinal: usize) -> Result<Device> {
    static OPEN: Mutex<Option<HashMap<usize, Device>>> = Mutex::new(None);
    let mut open = OPEN.lock().unwrap_or_else(|e| e.into_inner());
    let open = open.get_or_insert_default();
    if let Some(device) = open.get(&ordinal) {
        return Ok(device.clone());
    }
    let device = Device::new_cuda_with_stream(ordinal)?;
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = &device {
        // SAFETY: everything happens on the one stream of this device, so no event has to order anything.
        unsafe { cuda.disable_event_tracking() };
        keep_memory(cuda)?;
    }
    open.insert(ordinal, device.clone());
    Ok(device)
}

/// Bytes that a GPU has left; `None` of the processor, whose memory others share.
pub fn free_memory(device: &Device) -> Option<usize> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = device {
        cuda.cuda_stream().context().bind_to_thread().ok()?;
        return Some(candle_core::cuda_backend::cudarc::driver::result::mem_get_info().ok()?.0);
    }
    let _ = device;
    None
}

/// Whether convolutions of f32 on a GPU may round their factors to TF32 (11 bits; the sums are f32's), which is many times
/// as fast and PyTorch's default too. Other products never do (large ones of f32 with frozen weights are made of three of
/// TF32, which keep 22 bits of a factor, and sum in f32).
static TF32: AtomicBool = AtomicBool::new(true);

/// Sets that for this process; it is on at first.
pub fn set_tf32(on: bool) {
    TF32.store(on, Ordering::Relaxed);
}

#[cfg(feature = "cuda")]
pub(super) fn tf32() -> bool {
    TF32.load(Ordering::Relaxed)
}

/// Whether the sums of deformable attention's gradients on a GPU are the same at each run, whatever the order in which
/// they are made: whole numbers of 31 bits, of which the largest sum takes all. Else they are of f32, differ in their last
/// bits from run to run, and take a quarter less time (data/results/gpu.md).
static EXACT_SUMS: AtomicBool = AtomicBool::new(true);

/// Sets that for this process; it is on at first.
pub fn set_exact_sums(on: bool) {
    EXACT_SUMS.store(on, Ordering::Relaxed);
}

#[cfg(feature = "cuda")]
pub(super) fn exact_sums() -> bool {
    EXACT_SUMS.load(Ordering::Relaxed)
}

/// Keeps freed memory with this process for what comes next: else the driver takes it back whenever a result is
/// waited for, which is once a generated token, and the next allocations are slow.
#[cfg(feature = "cuda")]
fn keep_memory(device: &candle_core::CudaDevice) -> Result<()> {
    use candle_core::cuda_backend::{WrapErr, cudarc::driver::sys};
    let context = device.cuda_stream().context().clone();
    if !context.has_async_alloc() {
        return Ok(());
    }
    let (mut pool, mut all) = (std::ptr::null_mut(), u64::MAX);
    let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the device is open; the pool is its default one, which lives as long; the value is what this attribute
    // takes, and is copied.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&mut pool, context.cu_device()).result().w()?;
        sys::cuMemPoolSetAttribute(pool, threshold, std::ptr::from_mut(&mut all).cast()).result().w()
    }
}

/// Does the device compute in bf16? NVIDIA's do from compute capability 8.0 (Ampere) on.
pub fn has_bf16(device: &Device) -> bool {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = device {
        use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute_enum;
        let major = CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
        return cuda.cuda_stream().context().attribute(major).is_ok_and(|m| m >= 8);
    }
    !device.is_cpu()
}

/// A token and its log-probability for each row of logits `[rows, vocab]` that are on a GPU; see `kernels::sample`.
#[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
pub fn sample(logits: &Tensor, drawn: &[f64], temperature: f64) -> Result<Vec<(u32, f32)>> {
    #[cfg(feature = "cuda")]
    if let Some(found) = super::gpu_ops::sample(logits, drawn, temperature)? {
        return Ok(found);
    }
    candle_core::bail!("sample: logits that are not on a GPU")
}
