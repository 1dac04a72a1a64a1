//! Matrix products by cuBLAS where candle's would first copy: of matrices whose rows lie apart, batched by any stride.

use super::{Memory, Owned, cuda};
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::{CudaStorage, DType, Result};

/// A batch of row-major matrices of one shape in memory.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub memory: Memory<'a>,
    /// Of the first element, beyond the memory's own start.
    pub from: usize,
    /// Elements from row to row, and from matrix to matrix.
    pub row: usize,
    pub matrix: usize,
}

/// Where the results go: likewise.
pub struct Into<'a> {
    pub memory: &'a mut Owned,
    pub from: usize,
    pub row: usize,
    pub matrix: usize,
}

/// How many matrices, rows and columns of the result, and the length of the sums.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub batch: usize,
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

fn there(m: Memory<'_>) -> Result<(&CudaStorage, usize)> {
    match m {
        Memory::Cuda(s, from) => Ok((s, from)),
        #[cfg(test)]
        Memory::Host(..) => candle_core::bail!("product: not on a GPU"),
    }
}

/// `c = alpha · a · b`, or `alpha · a · bᵀ` where `transposed`: a `[m, k]`, b `[k, n]` or `[n, k]`, c `[m, n]`; all of one type. f32 is
/// rounded to TF32 in the products if `tf32`.
pub fn product(c: Into, alpha: f32, a: Rows, b: Rows, transposed: bool, s: Sizes, tf32: bool) -> Result<()> {
    let (on, dtype) = (there(a.memory)?.0, a.memory.dtype());
    let kind = match dtype {
        DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
        DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        _ => candle_core::bail!("product: no {dtype:?}"),
    };
    let compute = match tf32 && dtype == DType::F32 {
        true => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        false => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
    };
    let size = dtype.size_in_bytes();
    let read = |r: &Rows| -> Result<u64> {
        let (s, start) = there(r.memory)?;
        Ok(cuda::address(s)? + ((start + r.from) * size) as u64)
    };
    let (pa, pb) = (read(&a)?, read(&b)?);
    let pc = cuda::address(there(c.memory.read())?.0)? + (c.from * size) as u64;
    let int = |n: usize| i32::try_from(n).map_err(candle_core::Error::wrap);
    let wide = |n: usize| n as i64;
    let beta = 0f32;
    // cuBLAS thinks in columns: a row-major matrix is its transpose there, and cᵀ = bᵀ aᵀ.
    let op =
        if transposed { sys::cublasOperation_t::CUBLAS_OP_T } else { sys::cublasOperation_t::CUBLAS_OP_N };
    // SAFETY: the addresses are of allocations on this device that live as long as the borrows; the callers' sizes and
    // strides stay within them. `alpha` and `beta` are f32, as the type of the sums wants.
    unsafe {
        result::gemm_strided_batched_ex(
            *on.device.cublas_handle().handle(),
            op,
            sys::cublasOperation_t::CUBLAS_OP_N,
            int(s.n)?,
            int(s.m)?,
            int(s.k)?,
            std::ptr::from_ref(&alpha).cast(),
            pb as *const _,
            kind,
            int(b.row)?,
            wide(b.matrix),
            pa as *const _,
            kind,
            int(a.row)?,
            wide(a.matrix),
            std::ptr::from_ref(&beta).cast(),
            pc as *mut _,
            kind,
            int(c.row)?,
            wide(c.matrix),
            int(s.batch)?,
            compute,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .w()
}
