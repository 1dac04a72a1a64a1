//! GPUs as this program opens them.

use candle_core::{Device, Result};
use std::collections::HashMap;
use std::sync::Mutex;

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
    }
    open.insert(ordinal, device.clone());
    Ok(device)
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
