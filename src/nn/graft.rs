//! Ops whose forward and backward are both written with tensors, for devices that have no kernel of their own
//! for them: where candle's gradient of the composition would be wasteful.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor};

/// `forward(x)`, whose gradient at `x` is `backward` of the result's.
pub(super) fn graft(
    x: &Tensor,
    forward: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
    backward: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    if !x.track_op() {
        return forward(x);
    }
    x.apply_op1(Graft { x: x.detach(), forward, backward })
}

struct Graft<F, B> {
    x: Tensor,
    forward: F,
    backward: B,
}

impl<F, B> CustomOp1 for Graft<F, B>
where
    F: Fn(&Tensor) -> Result<Tensor> + Send + Sync,
    B: Fn(&Tensor) -> Result<Tensor> + Send + Sync,
{
    fn name(&self) -> &'static str {
        "graft"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        cpu_storage(&(self.forward)(&self.x)?)
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda_storage(&(self.forward)(&self.x)?)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        (self.backward)(grad).map(Some)
    }
}

/// A tensor's values and shape, as an op's forward pass returns them.
pub(super) fn cpu_storage(y: &Tensor) -> Result<(CpuStorage, Shape)> {
    let y = y.detach().force_contiguous()?;
    let (storage, layout) = y.storage_and_layout();
    match &*storage {
        Storage::Cpu(s) => Ok((s.try_clone(layout)?, y.shape().clone())),
        _ => candle_core::bail!("an op's result is on another device than its input"),
    }
}

/// [`cpu_storage`] on a GPU.
pub(super) fn cuda_storage(y: &Tensor) -> Result<(CudaStorage, Shape)> {
    let y = y.detach().force_contiguous()?;
    let (storage, layout) = y.storage_and_layout();
    match &*storage {
        Storage::Cuda(s) => Ok((s.try_clone(layout)?, y.shape().clone())),
        _ => candle_core::bail!("an op's result is on another device than its input"),
    }
}
