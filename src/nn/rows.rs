//! Moving whole rows: window partition, its inverse, cyclic shifts, padding, cropping and patch
//! merging are each one parallel copy, forward and backward.

use super::graft::graft;
#[cfg(feature = "cuda")]
use super::kernels::{self, Memory};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, Device};
use rayon::prelude::*;
use std::sync::Arc;
#[cfg(feature = "cuda")]
use std::sync::OnceLock;

/// Source of a row that is filled with zeros.
const ZERO: u32 = u32::MAX;

/// Where each output row comes from. A source row is used at most once, so the transpose of the
/// map, which the backward needs, is a map too.
#[derive(Clone, Debug)]
pub struct RowMap {
    from: Arc<Way>,
    back: Arc<Way>,
}

/// One direction of a map.
#[derive(Debug)]
struct Way {
    rows: Vec<u32>,
    /// The same on the first GPU that asked.
    #[cfg(feature = "cuda")]
    there: OnceLock<Tensor>,
}

impl Way {
    fn new(rows: Vec<u32>) -> Arc<Self> {
        Arc::new(Self {
            rows,
            #[cfg(feature = "cuda")]
            there: OnceLock::new(),
        })
    }

    #[cfg(feature = "cuda")]
    fn on(&self, device: &Device) -> Result<Tensor> {
        let make = || Tensor::from_slice(&self.rows, self.rows.len(), device);
        let kept = match self.there.get() {
            Some(kept) => kept,
            None => {
                let made = make()?;
                self.there.get_or_init(|| made)
            }
        };
        if kept.device().same_device(device) { Ok(kept.clone()) } else { make() }
    }
}

impl RowMap {
    /// `from[i]` is the source of output row i, `None` a row of zeros.
    pub fn new(from: impl IntoIterator<Item = Option<usize>>, sources: usize) -> Result<Self> {
        let from: Vec<u32> = from.into_iter().map(|s| s.map_or(ZERO, |s| s as u32)).collect();
        let mut back = vec![ZERO; sources];
        for (i, &s) in from.iter().enumerate().filter(|(_, s)| **s != ZERO) {
            match back.get_mut(s as usize) {
                Some(b) if *b == ZERO => *b = i as u32,
                _ => candle_core::bail!("row map: source {s} of {sources} is out of range or used twice"),
            }
        }
        Ok(Self { from: Way::new(from), back: Way::new(back) })
    }

    /// Puts rows back where they came from; sources that were not used become zeros.
    pub fn transpose(&self) -> Self {
        Self { from: self.back.clone(), back: self.from.clone() }
    }

    /// `[batch, sources, dim]` → `[batch, rows, dim]`.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let n = x.dim(1)?;
        if x.rank() != 3 || n != self.back.rows.len() {
            candle_core::bail!("row map: {n} rows, expected {}", self.back.rows.len())
        }
        if super::cpu::fused(&[x]) || (super::on_gpu(&[x]) && x.elem_count() > 0) {
            return x.contiguous()?.apply_op1(self.clone());
        }
        let back = self.transpose();
        let forward = self.clone();
        graft(x, move |x| forward.selected(x), move |g| back.selected(g))
    }

    /// By candle's ops.
    fn selected(&self, x: &Tensor) -> Result<Tensor> {
        let (b, n, c) = x.dims3()?;
        let index = self.from.rows.iter().map(|&s| if s == ZERO { n as u32 } else { s }).collect();
        let index = Tensor::from_vec(index, self.from.rows.len(), x.device())?;
        let zero = Tensor::zeros((b, 1, c), x.dtype(), x.device())?;
        Tensor::cat(&[x, &zero], 1)?.index_select(&index, 1)
    }
}

impl CustomOp1 for RowMap {
    fn name(&self) -> &'static str {
        "row-map"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, n, c) = l.shape().dims3()?;
        let Some((lo, hi)) = l.contiguous_offsets() else { candle_core::bail!("row map: not contiguous") };
        let x = &s.as_slice::<f32>()?[lo..hi];
        let from = &self.from.rows;
        let m = from.len();
        let mut out = vec![0f32; b * m * c];
        out.par_chunks_mut(c.max(1)).with_min_len(256).enumerate().for_each(|(i, out)| {
            let s = from[i % m];
            if s != ZERO {
                out.copy_from_slice(&x[(i / m * n + s as usize) * c..][..c]);
            }
        });
        Ok((CpuStorage::F32(out), (b, m, c).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> Result<(CudaStorage, Shape)> {
        let (b, n, c) = l.shape().dims3()?;
        let from = self.from.on(&Device::Cuda(s.device.clone()))?;
        kernels::move_rows(Memory::cuda(s, l)?, &from, (b, n, c))?.cuda((b, self.from.rows.len(), c))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.transpose().apply(grad)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::max_gradient_error;
    use candle_core::{Device, Var};

    #[test]
    fn moves_pads_and_crops() -> Result<()> {
        let x = Var::from_tensor(&Tensor::arange(0f32, 12., &Device::Cpu)?.reshape((2, 3, 2))?)?;
        let map = RowMap::new([Some(2), None, Some(0)], 3)?;
        let y = map.apply(&x)?;
        assert_eq!(y.to_vec3::<f32>()?[1], [[10., 11.], [0., 0.], [6., 7.]]);
        assert_eq!(map.transpose().apply(&y)?.to_vec3::<f32>()?[0], [[0., 1.], [0., 0.], [4., 5.]]);
        Ok(())
    }

    #[test]
    fn gradient_matches_finite_differences() -> Result<()> {
        let x = Var::from_tensor(&Tensor::arange(0f32, 12., &Device::Cpu)?.reshape((2, 3, 2))?)?;
        let map = RowMap::new([Some(2), None, Some(0), None], 3)?;
        assert!(max_gradient_error(std::slice::from_ref(&x), 1e-1, 12, || map.apply(&x))? < 1e-4);
        Ok(())
    }

    #[test]
    fn a_row_used_twice_is_an_error() {
        assert!(RowMap::new([Some(0), Some(0)], 1).is_err());
        assert!(RowMap::new([Some(3)], 3).is_err());
    }
}
