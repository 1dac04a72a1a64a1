//! Muon (Jordan et al. 2024): the momentum of a matrix, made orthogonal.

use super::here::sum_squares;
use crate::nn::cpu::{Mat, gemm, rows_per_task};
use rayon::prelude::*;

/// Muon's momentum (Jordan et al. 2024).
pub(super) const MOMENTUM: f32 = 0.95;

/// Size of a Muon step's elements, about that of AdamW's, so that one learning rate serves both (Liu
/// et al. 2025, "Muon is scalable for LLM training").
pub(super) const SIZE: f32 = 0.2;

/// About the nearest matrix with orthonormal rows or columns: Muon's five Newton–Schulz steps, which
/// bring the singular values to 1 ± 0.3. `x` is row-major `[rows, cols]`.
pub(super) fn orthogonal(mut x: Vec<f32>, rows: usize, cols: usize) -> Vec<f32> {
    const A: f32 = 3.4445;
    const B: f32 = -4.775;
    const C: f32 = 2.0315;
    let norm = x.par_chunks(rows_per_task(1)).map(sum_squares).collect::<Vec<_>>().iter().sum::<f32>();
    let scale = 1. / (norm.sqrt() + 1e-7);
    x.iter_mut().for_each(|x| *x *= scale);
    // The Gram matrix of the shorter side.
    let n = rows.min(cols);
    let (mut gram, mut poly, mut next) = (vec![0f32; n * n], vec![0f32; n * n], vec![0f32; x.len()]);
    for _ in 0..5 {
        let m = Mat::rows(&x, cols);
        let (a, b) = if rows <= cols { (m, m.t()) } else { (m.t(), m) };
        gemm((n, n, rows.max(cols)), &mut gram, false, a, b);
        gemm((n, n, n), &mut poly, false, Mat::rows(&gram, n), Mat::rows(&gram, n));
        poly.iter_mut().zip(&gram).for_each(|(p, g)| *p = B * g + C * *p);
        let p = Mat::rows(&poly, n);
        let (a, b) = if rows <= cols { (p, m) } else { (m, p) };
        gemm((rows, cols, n), &mut next, false, a, b);
        x.iter_mut().zip(&next).for_each(|(x, y)| *x = A * *x + y);
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::random;

    #[test]
    fn muon_steps_are_orthogonal_whatever_the_shape() {
        for (rows, cols) in [(6, 20), (20, 6)] {
            let x: Vec<f32> = random((rows, cols), 4).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let y = orthogonal(x.clone(), rows, cols);
            let (n, long) = (rows.min(cols), rows.max(cols));
            let at = |i: usize, k: usize| if rows <= cols { y[i * cols + k] } else { y[k * cols + i] };
            for (i, j) in (0..n).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let dot: f32 = (0..long).map(|k| at(i, k) * at(j, k)).sum();
                let want = if i == j { 1. } else { 0. };
                assert!((dot - want).abs() < 0.55, "{rows}×{cols}: {i} {j} {dot}");
            }
            // It keeps to the side of the gradient.
            assert!(x.iter().zip(&y).map(|(x, y)| x * y).sum::<f32>() > 0.);
        }
    }
}
