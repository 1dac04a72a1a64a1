//! Weight matrices that stay in memory as GGUF packs them: blocks of a few bits a number, with scales.
//!
//! For inference on the CPU; no gradient passes through (a backward pass is an error). A product with
//! quantised weights quantises its input too, each row by itself to 8 bits, as llama.cpp does, and sums
//! integers within a block; F16 is widened and nothing is lost. A row's result is the same to the last
//! bit whoever shares its batch. The arithmetic of blocks is candle's. Its `QMatMul` is not used: on x86
//! it keeps a second copy of the weights, rearranged, and chooses kernels by the number of rows.

use std::sync::Arc;

use candle_core::quantized::k_quants::{BlockQ4K, BlockQ5K, BlockQ6K, BlockQ8_0};
use candle_core::quantized::{GgmlDType, GgmlType};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Storage, Tensor};
use gemm::f16;
use rayon::prelude::*;

use super::cpu;
use super::few_rows;

/// How a matrix can be packed, with the ends of names under which a layer asks for it: where a
/// builder has `weight.q4_k`, it gives the bytes of that matrix instead of its numbers.
const PACKINGS: [(GgmlDType, &str); 5] = [
    (GgmlDType::F16, ".f16"),
    (GgmlDType::Q8_0, ".q8_0"),
    (GgmlDType::Q4K, ".q4_k"),
    (GgmlDType::Q5K, ".q5_k"),
    (GgmlDType::Q6K, ".q6_k"),
];

/// Can matrices of this type stay packed?
pub fn is_packed(dtype: GgmlDType) -> bool {
    PACKINGS.iter().any(|p| p.0 == dtype)
}

/// A packed matrix's own name and its type, if `name` asks for one.
pub fn split_name(name: &str) -> Option<(&str, GgmlDType)> {
    PACKINGS.iter().find_map(|&(dtype, end)| Some((name.strip_suffix(end)?, dtype)))
}

/// The name that asks for `name`'s bytes, by `has`, where it is packed.
pub(super) fn packed_name(name: &str, has: impl Fn(&str) -> bool) -> Option<(String, GgmlDType)> {
    PACKINGS.iter().map(|&(dtype, end)| (format!("{name}{end}"), dtype)).find(|(name, _)| has(name))
}

enum Blocks {
    F16(Vec<f16>),
    Q8_0(Vec<BlockQ8_0>),
    Q4K(Vec<BlockQ4K>),
    Q5K(Vec<BlockQ5K>),
    Q6K(Vec<BlockQ6K>),
}

macro_rules! with_blocks {
    ($blocks:expr, $b:ident => $body:expr) => {
        match $blocks {
            Blocks::F16($b) => $body,
            Blocks::Q8_0($b) => $body,
            Blocks::Q4K($b) => $body,
            Blocks::Q5K($b) => $body,
            Blocks::Q6K($b) => $body,
        }
    };
}

/// A packed matrix `[out, in]`.
#[derive(Clone)]
pub struct Packed {
    out: usize,
    inp: usize,
    dtype: GgmlDType,
    blocks: Arc<Blocks>,
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Packed[{}, {}; {:?}]", self.out, self.inp, self.dtype)
    }
}

/// # Safety
/// Any bytes must be a valid `T`.
unsafe fn blocks<T>(bytes: &[u8]) -> Vec<T> {
    let n = bytes.len() / size_of::<T>();
    let mut all = Vec::<T>::with_capacity(n);
    // SAFETY: there is room for `n`, all of which are written; they are valid by the caller's word.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), all.as_mut_ptr().cast(), n * size_of::<T>());
        all.set_len(n);
    }
    all
}

impl Packed {
    /// From the bytes of its rows, which follow one another.
    pub fn new(dtype: GgmlDType, (out, inp): (usize, usize), bytes: &[u8]) -> Result<Self> {
        let (block, size) = (dtype.block_size(), dtype.type_size());
        let needs = (inp / block * size).checked_mul(out);
        if inp == 0 || !inp.is_multiple_of(block) || needs != Some(bytes.len()) {
            candle_core::bail!("packed: {} bytes are no [{out}, {inp}] of {dtype:?}", bytes.len())
        }
        // SAFETY: blocks are plain numbers and arrays of them, without padding.
        let blocks = unsafe {
            match dtype {
                GgmlDType::F16 => Blocks::F16(blocks(bytes)),
                GgmlDType::Q8_0 => Blocks::Q8_0(blocks(bytes)),
                GgmlDType::Q4K => Blocks::Q4K(blocks(bytes)),
                GgmlDType::Q5K => Blocks::Q5K(blocks(bytes)),
                GgmlDType::Q6K => Blocks::Q6K(blocks(bytes)),
                _ => candle_core::bail!("packed: {dtype:?} is not read"),
            }
        };
        Ok(Self { out, inp, dtype, blocks: Arc::new(blocks) })
    }

    /// From bytes as a builder gives them, u8 on the CPU.
    pub(super) fn from_tensor(dtype: GgmlDType, shape: (usize, usize), bytes: &Tensor) -> Result<Self> {
        let (storage, layout) = bytes.storage_and_layout();
        match (&*storage, layout.contiguous_offsets()) {
            (Storage::Cpu(CpuStorage::U8(v)), Some((from, to))) => Self::new(dtype, shape, &v[from..to]),
            _ => candle_core::bail!("packed: expected bytes on the CPU, got {bytes:?}"),
        }
    }

    /// `(out, in)`.
    pub fn dims(&self) -> (usize, usize) {
        (self.out, self.inp)
    }

    /// The numbers, f32 `[out, in]`.
    pub fn unpacked(&self) -> Result<Tensor> {
        let mut all = vec![0f32; self.out * self.inp];
        with_blocks!(&*self.blocks, b => unpack(b, &mut all));
        Tensor::from_vec(all, (self.out, self.inp), &Device::Cpu)
    }

    /// Rows by their numbers, u32 of any shape → f32 `[.., in]`.
    pub(super) fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        let mut shape = ids.dims().to_vec();
        shape.push(self.inp);
        let ids = ids.flatten_all()?.to_vec1::<u32>()?;
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.out) {
            candle_core::bail!("embedding: row {id} of {}", self.out)
        }
        let mut rows = vec![0f32; ids.len() * self.inp];
        with_blocks!(&*self.blocks, b => {
            let per_row = b.len() / self.out;
            for (row, id) in rows.chunks_exact_mut(self.inp).zip(ids) {
                unpack(&b[id as usize * per_row..][..per_row], row);
            }
        });
        Tensor::from_vec(rows, shape, &Device::Cpu)
    }

    /// `x Wᵀ`, `[.., in]` → `[.., out]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if x.dims().last() != Some(&self.inp) || !cpu::fused(&[x]) {
            candle_core::bail!(
                "linear: x {:?} ({:?}) for packed weights [{}, {}], which take f32 on the CPU",
                x.shape(),
                x.dtype(),
                self.out,
                self.inp
            )
        }
        if x.elem_count() == 0 {
            let mut shape = x.dims().to_vec();
            shape.pop();
            shape.push(self.out);
            return Tensor::zeros(shape, DType::F32, x.device());
        }
        x.contiguous()?.apply_op1(self.clone())
    }
}

impl CustomOp1 for Packed {
    fn name(&self) -> &'static str {
        "linear-packed"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = cpu::values(x, layout)?;
        let mut y = vec![0f32; x.len() / self.inp * self.out];
        match &*self.blocks {
            Blocks::F16(w) => widened(w, x, self.inp, &mut y),
            Blocks::Q8_0(w) => quantized(w, x, self.inp, &mut y),
            Blocks::Q4K(w) => quantized(w, x, self.inp, &mut y),
            Blocks::Q5K(w) => quantized(w, x, self.inp, &mut y),
            Blocks::Q6K(w) => quantized(w, x, self.inp, &mut y),
        }
        let mut shape = layout.dims().to_vec();
        shape.pop();
        shape.push(self.out);
        Ok((CpuStorage::F32(y), shape.into()))
    }
}

fn unpack<T: GgmlType>(blocks: &[T], numbers: &mut [f32]) {
    let per_block = T::BLCK_SIZE;
    // In parts, as a table of embeddings is large.
    let part = (32_768 / per_block).max(1);
    numbers
        .par_chunks_mut(part * per_block)
        .zip(blocks.par_chunks(part))
        .for_each(|(n, b)| T::to_float(b, n));
}

/// Rows of the input that meet a task's weights while those are in the cache.
const TILE: usize = 16;

/// `y += x wᵀ`, the rows of `x` quantised as `w`'s blocks want it.
fn quantized<T: GgmlType>(w: &[T], x: &[f32], k: usize, y: &mut [f32]) {
    let per_row = k / T::BLCK_SIZE;
    let (rows, out) = (x.len() / k, w.len() / per_row);
    let mut quantized = vec![T::VecDotType::zeros(); rows * per_row];
    quantized
        .par_chunks_mut(per_row)
        .zip(x.par_chunks_exact(k))
        .for_each(|(q, x)| T::VecDotType::from_float(x, q));
    // Weight rows per task: 4 at a time in the kernel, and enough work to be worth a task.
    let task = cpu::rows_per_task(k).next_multiple_of(4);
    let place = cpu::Out::new(y);
    w.par_chunks(task * per_row).enumerate().for_each(|(i, w)| {
        for (t, tile) in quantized.chunks(TILE * per_row).enumerate() {
            for (c, w) in w.chunks(4 * per_row).enumerate() {
                for (r, x) in tile.chunks_exact(per_row).enumerate() {
                    let mut d = [0f32; 4];
                    let n = w.len() / per_row;
                    if n == 4 {
                        let [a, b, c, e] = std::array::from_fn(|j| &w[j * per_row..(j + 1) * per_row]);
                        d = T::vec_dot_4(k, a, b, c, e, x).into();
                    } else {
                        for (d, w) in d.iter_mut().zip(w.chunks_exact(per_row)) {
                            *d = T::vec_dot(k, w, x);
                        }
                    }
                    // SAFETY: the columns of this task's weight rows are written by it alone.
                    unsafe { place.add_at((t * TILE + r) * out + i * task + 4 * c, &d[..n]) }
                }
            }
        }
    });
}

/// `y += x wᵀ` in f32.
fn widened(w: &[f16], x: &[f32], k: usize, y: &mut [f32]) {
    let out = w.len() / k;
    let task = cpu::rows_per_task(k).next_multiple_of(4);
    let place = cpu::Out::new(y);
    w.par_chunks(task * k).enumerate().for_each_init(
        || (Vec::new(), Vec::new()),
        |(wide, part), (i, w)| {
            wide.resize(w.len(), 0.);
            f16::to_float(w, wide);
            let n = w.len() / k;
            for (t, x) in x.chunks(TILE * k).enumerate() {
                part.clear();
                part.resize(x.len() / k * n, 0.);
                few_rows::product(x, wide, k, part);
                for (r, part) in part.chunks_exact(n).enumerate() {
                    // SAFETY: the columns of this task's weight rows are written by it alone.
                    unsafe { place.add_at((t * TILE + r) * out + i * task, part) }
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Linear;
    use crate::nn::gradcheck::random;
    use candle_core::quantized::QTensor;

    fn packed(out: usize, inp: usize, dtype: GgmlDType) -> Result<Packed> {
        let q = QTensor::quantize(random((out, inp), 2)?.as_tensor(), dtype)?;
        Packed::new(dtype, (out, inp), &q.data()?)
    }

    #[test]
    fn products_are_those_of_the_unpacked_weights() -> Result<()> {
        for (dtype, _) in PACKINGS {
            let (out, inp) = (35, 512);
            let p = packed(out, inp, dtype)?;
            let plain = Linear::new(p.unpacked()?, None);
            let x = random((3, 7, inp), 1)?;
            let (got, want) = (p.forward(&x)?, plain.forward(&x)?);
            assert_eq!(got.dims(), [3, 7, out]);
            let error = (got - &want)?.sqr()?.mean_all()?.to_scalar::<f32>()?.sqrt();
            let size = want.sqr()?.mean_all()?.to_scalar::<f32>()?.sqrt();
            // Inputs in 8 bits err by about a hundredth of their size; F16 rounds nothing.
            let most = if dtype == GgmlDType::F16 { 1e-6 } else { 0.015 };
            assert!(error <= most * size, "{dtype:?}: {error} of {size}");
        }
        Ok(())
    }

    #[test]
    fn a_row_does_not_depend_on_the_other_rows() -> Result<()> {
        for (dtype, _) in PACKINGS {
            let p = packed(70, 256, dtype)?;
            let x = random((130, 256), 1)?;
            let y = |from: usize, n: usize| -> Result<Vec<Vec<f32>>> {
                p.forward(&x.narrow(0, from, n)?)?.to_vec2()
            };
            let all = y(0, 130)?;
            for (from, n) in [(0, 1), (17, 1), (129, 1), (3, 2), (5, 16), (1, 64), (30, 100)] {
                assert_eq!(y(from, n)?, all[from..from + n], "{dtype:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn rows_are_looked_up_and_gradients_refused() -> Result<()> {
        for (dtype, _) in PACKINGS {
            let p = packed(9, 256, dtype)?;
            let ids = Tensor::new(&[[8u32, 0], [3, 3]], &Device::Cpu)?;
            let want = p.unpacked()?.index_select(&ids.flatten_all()?, 0)?;
            let got = p.rows(&ids)?;
            assert_eq!(got.dims(), [2, 2, 256]);
            assert_eq!(got.flatten(0, 1)?.to_vec2::<f32>()?, want.to_vec2::<f32>()?);
            assert!(p.rows(&Tensor::new(&[9u32], &Device::Cpu)?).is_err());
            let x = random((2, 256), 1)?;
            let e = p.forward(&x)?.sum_all()?.backward().unwrap_err().to_string();
            assert!(e.contains("linear-packed"), "{e}");
        }
        Ok(())
    }

    #[test]
    fn bytes_that_do_not_fit_are_refused() {
        for (dtype, shape, bytes) in [
            (GgmlDType::Q8_0, (2, 32), 67),
            (GgmlDType::Q8_0, (2, 33), 68),
            (GgmlDType::Q4K, (usize::MAX, 256), 144),
            (GgmlDType::F16, (1, 0), 0),
            (GgmlDType::Q4_0, (1, 32), 18),
        ] {
            assert!(Packed::new(dtype, shape, &vec![0; bytes]).is_err(), "{dtype:?} {shape:?}");
        }
    }
}
