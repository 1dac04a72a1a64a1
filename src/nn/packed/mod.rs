//! Weight matrices that stay in memory as GGUF packs them: blocks of a few bits a number, with scales.
//!
//! For inference on the CPU; no gradient passes through (a backward pass is an error). A product with
//! quantised weights quantises its input too (see [`product`]); F16 is widened and nothing is lost. A
//! row's result is the same to the last bit whoever shares its batch, and how many do; with F16, as with f32, up
//! to 64 rows, and from there on. Candle's `QMatMul`
//! is not used: on x86 it keeps a second copy of the weights, rearranged, and chooses kernels by the
//! number of rows.

mod formats;
mod kernels;
mod product;

use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Storage, Tensor};
use gemm::f16;
use rayon::prelude::*;

use super::cpu;
use super::few_rows;
use formats::{Q4K, Q5K, Q6K, Q8_0};

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
    Quantized(Vec<u8>),
}

/// `$body` with `$f` for the format that is not F16.
macro_rules! with_format {
    ($dtype:expr, $f:ident => $body:expr) => {
        match $dtype {
            GgmlDType::Q8_0 => {
                type $f = Q8_0;
                $body
            }
            GgmlDType::Q4K => {
                type $f = Q4K;
                $body
            }
            GgmlDType::Q5K => {
                type $f = Q5K;
                $body
            }
            GgmlDType::Q6K => {
                type $f = Q6K;
                $body
            }
            other => unreachable!("{other:?} is not made"),
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

impl Packed {
    /// From the bytes of its rows, which follow one another.
    pub fn new(dtype: GgmlDType, (out, inp): (usize, usize), bytes: &[u8]) -> Result<Self> {
        let (block, size) = (dtype.block_size(), dtype.type_size());
        let needs = (inp / block * size).checked_mul(out);
        if inp == 0 || !inp.is_multiple_of(block) || needs != Some(bytes.len()) {
            candle_core::bail!("packed: {} bytes are no [{out}, {inp}] of {dtype:?}", bytes.len())
        }
        let blocks = match dtype {
            GgmlDType::F16 => {
                Blocks::F16(bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect())
            }
            _ if is_packed(dtype) => Blocks::Quantized(bytes.to_vec()),
            _ => candle_core::bail!("packed: {dtype:?} is not read"),
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
        // In parts, as a table of embeddings is large.
        let rows = cpu::rows_per_task(self.inp);
        all.par_chunks_mut(rows * self.inp).enumerate().for_each(|(i, part)| self.unpack(i * rows, part));
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
        for (row, id) in rows.chunks_exact_mut(self.inp).zip(ids) {
            self.unpack(id as usize, row);
        }
        Tensor::from_vec(rows, shape, &Device::Cpu)
    }

    /// Whole rows' numbers, from a row on.
    fn unpack(&self, row: usize, numbers: &mut [f32]) {
        match &*self.blocks {
            Blocks::F16(w) => {
                few_rows::widen(&w[row * self.inp..][..numbers.len()], numbers);
            }
            Blocks::Quantized(w) => {
                let per_row = w.len() / self.out;
                let w = &w[row * per_row..][..numbers.len() / self.inp * per_row];
                with_format!(self.dtype, F => formats::unpack::<F>(w, numbers));
            }
        }
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
            Blocks::Quantized(w) => {
                with_format!(self.dtype, F => product::product::<F>(w, x, self.inp, &mut y));
            }
        }
        let mut shape = layout.dims().to_vec();
        shape.pop();
        shape.push(self.out);
        Ok((CpuStorage::F32(y), shape.into()))
    }
}

/// Numbers of the weight that are widened at once, 16 MiB, for many rows.
const WIDENED: usize = 1 << 22;

/// `y = x wᵀ` in f32, where it is zeros before.
fn widened(w: &[f16], x: &[f32], k: usize, y: &mut [f32]) {
    let (rows, out) = (x.len() / k, w.len() / k);
    let place = cpu::Out::new(y);
    if rows > few_rows::FEW {
        let some = (WIDENED / k).max(1);
        let mut wide = vec![0.; some.min(out) * k];
        for (i, w) in w.chunks(some * k).enumerate() {
            let wide = &mut wide[..w.len()];
            cpu::par_rows(wide, 1, |at, wide| few_rows::widen(&w[at..at + wide.len()], wide));
            let of = (rows, w.len() / k, k);
            let of = cpu::Product::new(of, cpu::Mat::rows(x, k), cpu::Mat::rows(wide, k).t()).parallel();
            // SAFETY: `y` is this function's alone.
            unsafe { cpu::gemm_into(of, cpu::Place::new(place, i * some, out)) }
        }
        return;
    }
    let task = cpu::rows_per_task(k).next_multiple_of(16);
    w.par_chunks(task * k).enumerate().for_each_init(
        || (Vec::new(), Vec::new()),
        |(part, wide), (i, w)| {
            let n = w.len() / k;
            part.resize(rows * n, 0.);
            few_rows::product_f16(x, w, k, part, wide);
            for (r, part) in part.chunks_exact(n).enumerate() {
                // SAFETY: the columns of this task's weight rows are written by it alone.
                unsafe { place.add_at(r * out + i * task, part) }
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
            let numbers = p.unpacked()?;
            let candle = QTensor::quantize(random((out, inp), 2)?.as_tensor(), dtype)?;
            assert_eq!(numbers.to_vec2::<f32>()?, candle.dequantize(&Device::Cpu)?.to_vec2::<f32>()?);
            let plain = Linear::new(numbers, None);
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
            for (from, n) in
                [(0, 1), (17, 1), (129, 1), (3, 2), (5, 16), (1, 64), (30, 100), (1, 32), (1, 33)]
            {
                // Of few halves, as of few f32 numbers, products are made otherwise than of many.
                let few = dtype == GgmlDType::F16 && n <= few_rows::FEW;
                let (first, others) = if few { (from.min(66), 64) } else { (0, 130) };
                assert_eq!(y(from, n)?, y(first, others)?[from - first..][..n], "{dtype:?}");
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
