//! Finite-difference checks of gradients, for tests of own ops.

use candle_core::{Result, Tensor, Var};

/// Compares the gradient of `f` (any output shape; it is contracted with fixed pseudo-random
/// weights to a scalar) at `vars` with central differences of step `h`, on up to `probes` elements of
/// each variable. Returns the largest `|analytic − numeric| / max(1, scale)`, where `scale` is
/// the largest numeric gradient seen for that variable.
///
/// f32 forward passes carry about 1e-7 relative noise: `h` near 1e-2 and a tolerance near 1e-3
/// suit smooth ops of unit scale.
pub fn max_gradient_error(
    vars: &[Var],
    h: f64,
    probes: usize,
    f: impl Fn() -> Result<Tensor>,
) -> Result<f64> {
    let weights = {
        let y = f()?;
        let n = y.elem_count();
        let w: Vec<f32> = (0..n).map(|i| ((i as f64 * 0.754_877 + 0.137).fract() * 2. - 1.) as f32).collect();
        Tensor::from_vec(w, y.shape(), y.device())?
    };
    // Accumulate in f64: the sum over many outputs would otherwise drown the difference.
    let scalar = || -> Result<f64> {
        let y = f()?.flatten_all()?.to_dtype(candle_core::DType::F64)?.to_vec1::<f64>()?;
        let w = weights.flatten_all()?.to_vec1::<f32>()?;
        Ok(y.iter().zip(&w).map(|(a, b)| a * *b as f64).sum())
    };
    let loss = (f()? * &weights)?.sum_all()?;
    let grads = super::backward(&loss)?;
    let mut worst = 0f64;
    for v in vars {
        let g = match grads.get(v) {
            Some(g) => g.flatten_all()?.to_vec1::<f32>()?,
            None => candle_core::bail!("no gradient reached a variable of shape {:?}", v.shape()),
        };
        let base = v.flatten_all()?.to_vec1::<f32>()?;
        let n = base.len();
        let step = n.div_ceil(probes).max(1);
        let (mut err, mut scale) = (0f64, 0f64);
        for i in (0..n).step_by(step) {
            let eval = |d: f64| -> Result<f64> {
                let mut x = base.clone();
                x[i] += d as f32;
                v.set(&Tensor::from_vec(x, v.shape(), v.device())?)?;
                scalar()
            };
            let numeric = (eval(h)? - eval(-h)?) / (2. * h);
            v.set(&Tensor::from_vec(base.clone(), v.shape(), v.device())?)?;
            err = err.max((numeric - g[i] as f64).abs());
            scale = scale.max(numeric.abs());
        }
        worst = worst.max(err / scale.max(1.));
    }
    Ok(worst)
}

/// A variable of unit-normal values that follow from `seed`.
#[cfg(test)]
pub fn random(shape: impl Into<candle_core::Shape>, seed: u64) -> Result<Var> {
    use rand::SeedableRng;
    use rand_distr::{Distribution, StandardNormal};
    let shape = shape.into();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.elem_count()).map(|_| StandardNormal.sample(&mut rng)).collect();
    Var::from_vec(values, shape, &candle_core::Device::Cpu)
}

/// Asserts that two ways to compute one thing agree, in value and in every gradient at `vars`.
#[cfg(test)]
#[track_caller]
pub fn assert_same(
    vars: &[&Var],
    fused: impl Fn() -> Result<Tensor>,
    composed: impl Fn() -> Result<Tensor>,
) -> Result<()> {
    let near = |what: &str, a: &Tensor, b: &Tensor| -> Result<()> {
        assert_eq!(a.dims(), b.dims(), "{what}");
        let (a, b) = (a.flatten_all()?.to_vec1::<f32>()?, b.flatten_all()?.to_vec1::<f32>()?);
        let scale = b.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
        let err = a.iter().zip(&b).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(err <= 2e-5 * scale && err.is_finite(), "{what}: {err:e} at scale {scale:e}");
        Ok(())
    };
    let (a, b) = (fused()?, composed()?);
    near("value", &a, &b)?;
    let weights = random(a.shape(), 77)?.as_tensor().detach();
    let (ga, gb) = ((a * &weights)?.sum_all()?.backward()?, (b * &weights)?.sum_all()?.backward()?);
    for (i, v) in vars.iter().enumerate() {
        match (ga.get(v), gb.get(v)) {
            (Some(a), Some(b)) => near(&format!("gradient {i}"), a, b)?,
            (a, b) => panic!("gradient {i}: fused {}, composed {}", a.is_some(), b.is_some()),
        }
    }
    Ok(())
}
