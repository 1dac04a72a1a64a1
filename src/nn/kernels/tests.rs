//! Every kernel, as C++ on the processor, against the op that the processor has for it.

use super::*;
use crate::nn;
use crate::nn::gradcheck::random;
use candle_core::{Device, Var};

/// The largest difference, relative to the largest value.
fn difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    assert_eq!(a.shape(), b.shape());
    let scale = b.abs()?.max_all()?.to_scalar::<f32>()?.max(1e-3);
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()? / scale)
}

#[track_caller]
fn same(a: &Tensor, b: &Tensor) {
    let e = difference(a, b).unwrap();
    assert!(e < 2e-5, "{e}");
}

/// Runs a forward kernel on tensors' memory.
fn on<const N: usize>(ts: [&Tensor; N], f: impl FnOnce([Memory; N]) -> Result<Owned>) -> Result<Owned> {
    let held = ts.map(|t| Held::new(t).unwrap());
    f(held.each_ref().map(|h| h.get().unwrap()))
}

/// Gradients at `vars` of the processor's op, under a gradient `g` of its result.
fn gradients(vars: &[&Var], y: &Tensor, g: &Tensor) -> Result<Vec<Tensor>> {
    let store = (y * g)?.sum_all()?.backward()?;
    Ok(vars.iter().map(|v| store.get(v).unwrap().clone()).collect())
}

fn skip() -> bool {
    !host::available()
}

#[test]
fn norms() -> Result<()> {
    if skip() {
        return Ok(());
    }
    for (rows, d) in [(5, 24), (70, 300), (130, 7)] {
        let (x, w, b) = (random((rows, d), 1)?, random(d, 2)?, random(d, 3)?);
        let g = random((rows, d), 4)?.as_tensor().detach();
        let layer = |name: &str| {
            let t = [("rms.weight", &w), ("ln.weight", &w), ("ln.bias", &b)];
            let t = t.into_iter().map(|(n, v)| (n.to_string(), v.as_tensor().clone())).collect();
            candle_nn::VarBuilder::from_tensors(t, DType::F32, &Device::Cpu).pp(name)
        };
        let rms = nn::rms_norm(d, 1e-5, layer("rms"))?.forward(&x)?;
        same(&on([&x, &w], |[x, w]| rms_norm(x, w, rows * d, d, 1e-5))?.tensor((rows, d)), &rms);
        let (dx, dw) = rms_norm_back(&x, &w, &g, 1e-5)?;
        let want = gradients(&[&x, &w], &rms, &g)?;
        same(&dx, &want[0]);
        same(&dw.unwrap(), &want[1]);
        assert!(rms_norm_back(&x, &w.detach(), &g, 1e-5)?.1.is_none());

        let ln = nn::layer_norm(d, 1e-5, layer("ln"))?.forward(&x)?;
        same(&on([&x, &w, &b], |[x, w, b]| layer_norm(x, w, b, rows * d, d, 1e-5))?.tensor((rows, d)), &ln);
        let (dx, dw, db) = layer_norm_back(&x, &w, &b, &g, 1e-5)?;
        let want = gradients(&[&x, &w, &b], &ln, &g)?;
        same(&dx, &want[0]);
        same(&dw.unwrap(), &want[1]);
        same(&db.unwrap(), &want[2]);
    }
    Ok(())
}

#[test]
fn rotary_positions() -> Result<()> {
    if skip() {
        return Ok(());
    }
    let (b, s, heads, half) = (2, 5, 3, 4);
    let width = heads * 2 * half;
    let x = random((b, s, width), 1)?;
    for rows in [1, b] {
        let angles = random((rows, s, half), 2)?.as_tensor().detach();
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let turn = |x: &Tensor, sign: f32| {
            let sizes = (width, half, rows * s);
            Ok::<_, candle_core::Error>(
                on([x], |[x]| rope(x, &cos, &sin, b * s * width, sizes, sign))?.tensor((b, s, width)),
            )
        };
        let y = nn::rope(&x, &cos, &sin)?;
        same(&turn(&x, 1.)?, &y);
        let g = random((b, s, width), 3)?.as_tensor().detach();
        same(&turn(&g, -1.)?, &gradients(&[&x], &y, &g)?[0]);
    }
    Ok(())
}

#[test]
fn gated_units() -> Result<()> {
    if skip() {
        return Ok(());
    }
    let (a, u, g) = (random((7, 91), 1)?, random((7, 91), 2)?, random((7, 91), 3)?);
    let y = nn::swiglu(&a, &u)?;
    same(&on([&a, &u], |[a, u]| swiglu(a, u, 7 * 91))?.tensor((7, 91)), &y);
    let (da, du) = swiglu_back(&a, &u, &g)?;
    let want = gradients(&[&a, &u], &y, &g)?;
    same(&da, &want[0]);
    same(&du, &want[1]);
    Ok(())
}

#[test]
fn deformable_attention() -> Result<()> {
    if skip() {
        return Ok(());
    }
    // A single channel, and more channels than threads of a small block.
    for dim in [1, 6, 40] {
        let shapes = [(5, 7), (3, 2)];
        let tokens = 5 * 7 + 3 * 2;
        let d = Deformable { batch: 2, tokens, queries: 9, heads: 3, dim, levels: 2, points: 4 };
        let value = random((d.batch, tokens, d.heads, dim), 1)?;
        let sizes = (d.batch, d.queries, d.heads, d.levels, d.points);
        // Some places lie outside.
        let place = random((sizes.0, sizes.1, sizes.2, sizes.3, sizes.4, 2).into_shape(), 2)?;
        let place = Var::from_tensor(&((place.as_tensor() * 0.5)? + 0.5)?)?;
        let mass = random(sizes, 3)?;
        let levels = Tensor::new(&[5u32, 7, 0, 3, 2, 35], &Device::Cpu)?;
        let y = nn::msda::msda(&value, &shapes, &place, &mass)?;
        let got = on([&value, &place, &mass], |[v, p, m]| msda(v, p, m, &levels, d))?;
        same(&got.tensor(y.shape()), &y);
        for size in [1e-12, 1., 1e12] {
            let g = (random(y.dims(), 4)?.as_tensor().detach() * size)?;
            let (dv, dp, dm) = msda_back(&value, &place, &mass, &levels, &g, d)?;
            let want = gradients(&[&value, &place, &mass], &y, &g)?;
            for (got, want) in [dv, dp, dm].iter().zip(&want) {
                same(&(got / size)?, &(want / size)?);
            }
        }
    }
    Ok(())
}

/// A shape of six dimensions, for which candle has no tuple.
trait IntoShape {
    fn into_shape(self) -> Shape;
}

impl IntoShape for (usize, usize, usize, usize, usize, usize) {
    fn into_shape(self) -> Shape {
        Shape::from(vec![self.0, self.1, self.2, self.3, self.4, self.5])
    }
}

#[test]
fn attention_of_one_token() -> Result<()> {
    if skip() {
        return Ok(());
    }
    // Keys of fewer than a tile, of several tiles, and of several splits.
    for (kv_heads, group, dim, len, capacity) in
        [(2, 1, 8, 5, 9), (1, 8, 16, 300, 300), (3, 4, 48, 1025, 1100)]
    {
        let batch = 2;
        let q = random((batch, 1, kv_heads * group * dim), 1)?.as_tensor().detach();
        let cache =
            |seed| random((batch, capacity, kv_heads * dim), seed)?.as_tensor().detach().narrow(1, 0, len);
        let (k, v) = (cache(2)?, cache(3)?);
        for (prefix, own) in [(0, vec![0, 0]), (0, vec![0, 3]), (2, vec![2, 4]), (1, vec![1, len as u32])] {
            let mask = nn::Mask::Causal { prefix, start: Some(own.clone()) };
            let want = nn::attention_packed(&q, &k, &v, kv_heads * group, kv_heads, 0.3, &mask)?;
            let own = Tensor::new(own, &Device::Cpu)?;
            same(&decode(&q, &k, &v, (kv_heads, group), prefix, &own, 0.3)?, &want);
        }
    }
    Ok(())
}

#[test]
fn log_probabilities() -> Result<()> {
    if skip() {
        return Ok(());
    }
    let (rows, vocab) = (6, 1000);
    let x = Var::from_tensor(&(random((rows, vocab), 1)?.as_tensor() * 20.)?)?;
    let target = Tensor::new(&[0u32, 999, 5, 5, 17, 600], &Device::Cpu)?;
    let y = nn::log_probs(&x, &target)?;
    same(&on([&x], |[x]| Ok(log_prob(x, &target, rows, vocab)?.0))?.tensor(rows), &y);
    let g = random(rows, 2)?.as_tensor().detach();
    same(&log_prob_back(&x, &target, &g)?, &gradients(&[&x], &y, &g)?[0]);
    Ok(())
}
