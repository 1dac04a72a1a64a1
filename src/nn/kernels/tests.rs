//! Every kernel against the op that the processor has for it: as C++ on the processor, or, with `VALOR_DEVICE=cuda`,
//! on the GPU.

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

/// Where kernels run.
pub(in crate::nn) fn device() -> Device {
    match std::env::var("VALOR_DEVICE").as_deref() {
        Ok("cuda") => nn::gpu(0).expect("VALOR_DEVICE=cuda"),
        _ => Device::Cpu,
    }
}

fn there(t: &Tensor) -> Tensor {
    t.to_device(&device()).unwrap()
}

#[track_caller]
fn same(a: &Tensor, b: &Tensor) {
    let e = difference(&a.to_device(&Device::Cpu).unwrap(), b).unwrap();
    assert!(e < 2e-5, "{e}");
}

/// Runs a forward kernel on tensors' memory.
fn on<const N: usize>(ts: [&Tensor; N], f: impl FnOnce([Memory; N]) -> Result<Owned>) -> Result<Owned> {
    let ts = ts.map(there);
    let held = ts.each_ref().map(|t| Held::new(t).unwrap());
    f(held.each_ref().map(|h| h.get().unwrap()))
}

/// Gradients at `vars` of the processor's op, under a gradient `g` of its result.
fn gradients(vars: &[&Var], y: &Tensor, g: &Tensor) -> Result<Vec<Tensor>> {
    let store = (y * g)?.sum_all()?.backward()?;
    Ok(vars.iter().map(|v| store.get(v).unwrap().clone()).collect())
}

pub(in crate::nn) fn skip() -> bool {
    device().is_cpu() && !host::available()
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
        let (dx, dw) = rms_norm_back(&there(&x), &there(&w), &there(&g), 1e-5)?;
        let want = gradients(&[&x, &w], &rms, &g)?;
        same(&dx, &want[0]);
        same(&dw.unwrap(), &want[1]);
        assert!(rms_norm_back(&there(&x), &there(&w.detach()), &there(&g), 1e-5)?.1.is_none());

        let ln = nn::layer_norm(d, 1e-5, layer("ln"))?.forward(&x)?;
        same(&on([&x, &w, &b], |[x, w, b]| layer_norm(x, w, b, rows * d, d, 1e-5))?.tensor((rows, d)), &ln);
        let (dx, dw, db) = layer_norm_back(&there(&x), &there(&w), &there(&b), &there(&g), 1e-5)?;
        let want = gradients(&[&x, &w, &b], &ln, &g)?;
        same(&dx, &want[0]);
        same(&dw.unwrap(), &want[1]);
        same(&db.unwrap(), &want[2]);
    }
    Ok(())
}

#[test]
fn rows_that_move() -> Result<()> {
    if skip() {
        return Ok(());
    }
    let (b, sources, dim) = (3, 5, 70);
    let x = random((b, sources, dim), 1)?;
    let map = nn::rows::RowMap::new([Some(4), None, Some(0), Some(2), None, None], sources)?;
    let want = map.apply(&x)?;
    let from = there(&Tensor::new(&[4u32, u32::MAX, 0, 2, u32::MAX, u32::MAX], &Device::Cpu)?);
    same(&on([&x], |[x]| move_rows(x, &from, (b, sources, dim)))?.tensor((b, 6, dim)), &want);
    Ok(())
}

#[test]
fn dropout_of_a_seed() -> Result<()> {
    if skip() {
        return Ok(());
    }
    let x = Tensor::ones(100_000, DType::F32, &Device::Cpu)?;
    let draw = |seed| on([&x], |[x]| dropout(x, 100_000, 0.25, seed))?.values();
    let flat = |seed| Ok::<_, candle_core::Error>(draw(seed)?.as_slice::<f32>()?.to_vec());
    let (a, b) = (flat(1)?, flat(2)?);
    assert!(a == flat(1)? && a != b);
    for y in [&a, &b] {
        assert!(y.iter().all(|y| *y == 0. || (y * 0.75 - 1.).abs() < 1e-6));
        let kept = y.iter().filter(|y| **y > 0.).count() as f64 / 1e5;
        assert!((kept - 0.75).abs() < 0.007, "{kept}");
    }
    // Neighbours, and the same place under another seed, are drawn apart.
    let both = |pairs: &mut dyn Iterator<Item = (&f32, &f32)>| {
        pairs.filter(|(a, b)| **a > 0. && **b > 0.).count() as f64 / 1e5
    };
    for share in [both(&mut a.iter().zip(&a[1..])), both(&mut a.iter().zip(&b))] {
        assert!((share - 0.5625).abs() < 0.007, "{share}");
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
                on([x], |[x]| rope(x, &there(&cos), &there(&sin), b * s * width, sizes, sign))?
                    .tensor((b, s, width)),
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
fn normalised_and_rotated_heads() -> Result<()> {
    if skip() {
        return Ok(());
    }
    let (b, s, heads, half) = (2, 5, 3, 20);
    let (x, w) = (random((b, s, heads * 2 * half), 1)?, random(2 * half, 2)?);
    let of = [("weight".to_string(), w.as_tensor().clone())].into_iter().collect();
    let norm =
        nn::rms_norm(2 * half, 1e-5, candle_nn::VarBuilder::from_tensors(of, DType::F32, &Device::Cpu))?;
    for rows in [1, b] {
        let angles = random((rows, s, half), 3)?.as_tensor().detach();
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let want = norm.forward_heads_rope(&x, &cos, &sin)?;
        let sizes = (heads, heads * 2 * half, 2 * half, rows * s);
        let y = on([&x, &w], |[x, w]| {
            norm_rope(x, w, &there(&cos), &there(&sin), want.elem_count(), sizes, 1e-5)
        })?;
        same(&y.tensor(want.shape()), &want);
    }
    Ok(())
}

#[test]
fn products_of_few_rows() -> Result<()> {
    if skip() {
        return Ok(());
    }
    // Shorter than a warp's stride, longer than four of them, and neither.
    for (rows, k, out) in
        [(1, 8, [3, 0, 0]), (2, 1288, [9, 5, 2]), (3, 512, [1, 30, 0]), (4, 3072, [8, 8, 8])]
    {
        let x = random((rows, k), 1)?.as_tensor().detach();
        let weights: Vec<Tensor> = (0..3)
            .filter(|i| out[*i] > 0)
            .map(|i| Ok(random((out[i], k), 2 + i as u64)?.as_tensor().detach()))
            .collect::<Result<_>>()?;
        let moved: Vec<Tensor> = weights.iter().map(there).collect();
        let moved: Vec<&Tensor> = moved.iter().collect();
        assert!(takes_few_rows(&there(&x), &moved));
        let want = x.matmul(&Tensor::cat(&weights, 0)?.t()?)?;
        same(&few_rows(&there(&x), &moved, None)?, &want);
        let plus = random(want.dims(), 7)?.as_tensor().detach();
        same(&few_rows(&there(&x), &moved, Some(&there(&plus)))?, &(want + plus)?);
        let up = random(weights[0].dims(), 8)?.as_tensor().detach();
        let want = nn::swiglu(&x.matmul(&weights[0].t()?)?, &x.matmul(&up.t()?)?)?;
        same(&few_rows_gated(&there(&x), moved[0], &there(&up))?, &want);
    }
    let takes = |rows: usize, k: usize| -> Result<bool> {
        let w = random((3, k), 2)?;
        Ok(takes_few_rows(random((rows, k), 1)?.as_tensor(), &[w.as_tensor()]))
    };
    assert!(takes(MOST_ROWS, 8)? && !takes(MOST_ROWS + 1, 8)? && !takes(1, 12)?);
    Ok(())
}

#[test]
fn numbers_in_parts() -> Result<()> {
    if skip() {
        return Ok(());
    }
    let flat = |o: Owned| Ok::<_, candle_core::Error>(o.values()?.as_slice::<f32>()?.to_vec());
    // In fours, and not.
    for (rows, width) in [(5, 12), (5, 7)] {
        let n = rows * width;
        let x = random((rows, width), 1)?.as_tensor().detach();
        let values: Vec<f32> = x.flatten_all()?.to_vec1()?;
        for other in [false, true] {
            let [along, over] = [Thrice::Along, Thrice::Over]
                .map(|how| on([&x], |[x]| split(x, (rows, width), how, other)).and_then(flat));
            let (along, over) = (along?, over?);
            for (i, v) in values.iter().enumerate() {
                let from = i / width * 3 * width + i % width;
                let three = [over[i], over[i + n], over[i + 2 * n]];
                assert_eq!(three, [along[from], along[from + width], along[from + 2 * width]]);
                let (hi, lo) = if other { (three[0], three[2]) } else { (three[0], three[1]) };
                assert_eq!(three[if other { 1 } else { 2 }], hi);
                // Both have eleven bits, and together twice as many.
                assert!([hi, lo].iter().all(|p| p.to_bits() & 0x1fff == 0), "{hi} {lo}");
                assert!((v - hi - lo).abs() <= v.abs() * 2f32.powi(-22), "{v} {hi} {lo}");
            }
        }
    }
    // What is no number stays none, however it is written.
    let none = [f32::NAN, f32::from_bits(0x7fff_ffff), f32::from_bits(0xffff_ffff)];
    let strange = Tensor::new(&[[none[0], none[1], none[2], f32::INFINITY, f32::MAX, 0.]], &Device::Cpu)?;
    let y = flat(on([&strange], |[x]| split(x, (1, 6), Thrice::Over, false))?)?;
    assert!(y[..3].iter().all(|v| v.is_nan()) && y[3..6] == [f32::INFINITY, f32::MAX, 0.], "{y:?}");
    assert!(y[6..12] == [0.; 6], "{y:?}");
    Ok(())
}

/// On a GPU: products in parts are as near to the truth as those of f32.
#[cfg(feature = "cuda")]
#[test]
fn products_of_parts() -> Result<()> {
    if device().is_cpu() {
        return Ok(());
    }
    let (m, n, k) = (700, 650, 520);
    let (x, w) = (random((m, k), 1)?.as_tensor().detach(), random((n, k), 2)?.as_tensor().detach());
    let back = w.t()?.contiguous()?;
    let truth = x.to_dtype(DType::F64)?.matmul(&w.to_dtype(DType::F64)?.t()?)?;
    let error = |y: &Tensor| -> Result<f64> {
        let y = y.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        let scale = truth.abs()?.max_all()?.to_scalar::<f64>()?;
        Ok((y - &truth)?.abs()?.max_all()?.to_scalar::<f64>()? / scale)
    };
    let plain = error(&there(&x).matmul(&there(&w).t()?)?)?;
    for (w, transposed) in [(&w, true), (&back, false)] {
        let Some(y) = product_of_parts(&there(&x), &there(w), transposed)? else {
            eprintln!("this card's TF32 is not fast: products of parts are not tested");
            return Ok(());
        };
        let e = error(&y)?;
        eprintln!("products of parts: {e:.1e} from the truth, of f32 {plain:.1e}");
        assert!(e < 4. * plain + 1e-6, "{e} {plain}");
    }
    Ok(())
}

#[test]
fn what_follows_a_product() -> Result<()> {
    if skip() {
        return Ok(());
    }
    for (outer, channels, inner) in [(70, 5, 1), (2, 3, 35), (70, 8, 1), (2, 3, 36)] {
        let (dims, len) = ((outer, channels, inner), outer * channels * inner);
        let (x, b, s, plus) =
            (random(dims, 1)?, random(channels, 2)?, random(channels, 3)?, random(dims, 4)?);
        let spread = |t: &Tensor| t.reshape((1, channels, 1));
        let biased = x.broadcast_add(&spread(&b)?)?;
        if inner == 1 {
            let y = on([&x, &b], |[x, b]| add_bias(x, b, len, channels))?;
            same(&y.tensor(dims), &biased);
        }
        for act in [Act::None, Act::Gelu, Act::Relu] {
            let (b, s, plus) = (there(&b), there(&s), there(&plus));
            let f = Finish { bias: Some(&b), act, ..Finish::default() };
            let y = on([&x], |[x]| finish(x, len, f, (channels, inner)))?;
            same(&y.tensor(dims), &act.apply(&biased)?);
            let f = Finish { scale: Some(&s), plus: Some(&plus), ..f };
            let y = on([&x], |[x]| finish(x, len, f, (channels, inner)))?;
            let want = act.apply(&biased)?.broadcast_mul(&spread(&s.to_device(&Device::Cpu)?)?)?;
            same(&y.tensor(dims), &(want + plus.to_device(&Device::Cpu)?)?);
        }
    }
    Ok(())
}

#[test]
fn softmax_of_scores() -> Result<()> {
    if skip() {
        return Ok(());
    }
    // Rows of which threads keep few numbers or many, in fours or not, or none.
    for m in [70, 72, 2050, 5000, 20_000, 33_001] {
        softmax_of_rows(m)?;
    }
    let blind = Tensor::new(&[[f32::NEG_INFINITY; 5], [0.2; 5]], &Device::Cpu)?;
    let y = on([&blind], |[x]| softmax(x, Seen::All, (1, 1, 2, 5), 1.))?.tensor((2, 5));
    assert_eq!(y.to_vec2::<f32>()?, [[0.; 5], [0.2; 5]]);
    Ok(())
}

fn softmax_of_rows(m: usize) -> Result<()> {
    let dims @ (b, h, n, _) = (2, 3, 4, m);
    let x = random(dims, 1)?;
    let scaled = (x.as_tensor() * 0.7)?;
    let g = random(dims, 5)?.as_tensor().detach();
    let check = |seen: Seen, want: &Tensor| -> Result<()> {
        let y = on([&x], |[x]| softmax(x, seen, dims, 0.7))?.tensor(dims);
        same(&y, want);
        same(&softmax_back(&y, &there(&g), 0.7)?, &gradients(&[&x], want, &g)?[0]);
        Ok(())
    };
    check(Seen::All, &nn::softmax(&scaled)?)?;
    for bias in [random((1, h, n, m), 3)?, random((b, 1, 1, m), 4)?] {
        let bias = bias.as_tensor().detach();
        let want = nn::softmax(&scaled.broadcast_add(&bias)?)?;
        let bias = there(&bias).broadcast_as(dims)?;
        check(Seen::Bias(&bias, [bias.stride()[0], bias.stride()[1], bias.stride()[2]]), &want)?;
    }
    for (prefix, own) in [(0, None), (0, Some([0u32, 40])), (2, Some([3, 69])), (1, Some([70, 2]))] {
        let first = m - n;
        let hidden = |i: usize| {
            let (key, query, row) = (i % m, i / m % n, i / (m * n));
            let begin = own.map_or(0, |own| own[row] as usize);
            key > first + query || (key >= prefix && key < begin && key != first + query)
        };
        let bias = (0..b * n * m).map(|i| if hidden(i) { f32::NEG_INFINITY } else { 0. }).collect();
        let bias = Tensor::from_vec(bias, (b, 1, n, m), &Device::Cpu)?;
        let own = own.map(|own| Tensor::new(&own, &device())).transpose()?;
        let seen = Seen::Causal { first, prefix, own: own.as_ref() };
        check(seen, &nn::softmax(&scaled.broadcast_add(&bias)?)?)?;
    }
    Ok(())
}

#[test]
fn columns_of_a_convolution() -> Result<()> {
    if skip() {
        return Ok(());
    }
    let dims @ (b, c, h, w) = (2, 3, 7, 5);
    let x = random(dims, 1)?.as_tensor().detach();
    for (kernel, stride, padding, replicate) in
        [(3, 1, 1, false), (3, 2, 1, true), (2, 2, 0, false), (5, 1, 2, true)]
    {
        let weight = random((4, c, kernel, kernel), 2)?.as_tensor().detach();
        let window = Window { kernel, stride, padding, replicate };
        let (oh, ow) = (window.places(h).unwrap(), window.places(w).unwrap());
        for relu in [false, true] {
            // In two parts.
            let part = |first, n| -> Result<Tensor> {
                let columns = on([&x], |[x]| columns(x, dims, window, ow, relu, (first, n)))?;
                columns.tensor((b, c * kernel * kernel, n)).to_device(&Device::Cpu)
            };
            let columns = Tensor::cat(&[part(0, 5)?, part(5, oh * ow - 5)?], 2)?;
            let w = weight.reshape((1, 4, ()))?.broadcast_as((b, 4, c * kernel * kernel))?;
            let y = w.matmul(&columns)?.reshape((b, 4, oh, ow))?;
            let x = if relu { x.relu()? } else { x.clone() };
            let (from, pad) = match replicate {
                true => (x.pad_with_same(2, padding, padding)?.pad_with_same(3, padding, padding)?, 0),
                false => (x, padding),
            };
            same(&y, &from.conv2d(&weight, pad, stride, 1, 1)?);
        }
    }
    assert_eq!(Window { kernel: 9, stride: 1, padding: 0, replicate: false }.places(5), None);
    Ok(())
}

#[test]
fn resampling() -> Result<()> {
    if skip() {
        return Ok(());
    }
    let x = random((3, 7, 5), 1)?.as_tensor().detach();
    for filter in [nn::Filter::Bilinear { antialias: false }, nn::Filter::Bicubic { antialias: true }] {
        for (h, w) in [(14, 10), (3, 4), (7, 11)] {
            let want = nn::resize(&x, h, w, filter)?;
            let of = |from, to| nn::Taps::new(filter, from, to)?.on(&device());
            let (rows, columns) = (of(7, h)?, of(5, w)?);
            let y = on([&x], |[x]| resize(x, 3, rows.side((7, h)), columns.side((5, w))))?;
            same(&y.tensor((3, h, w)), &want);
        }
    }
    Ok(())
}

#[test]
fn the_largest_value() -> Result<()> {
    if skip() {
        return Ok(());
    }
    let most = |v: Vec<f32>| -> Result<f32> {
        let n = v.len();
        let most = on([&Tensor::from_vec(v, n, &Device::Cpu)?], |[x]| largest(x, n))?.values()?;
        Ok(most.as_slice::<f32>()?[0])
    };
    let mut values: Vec<f32> = (0..70_000).map(|i| (i as f32 * 0.37).sin()).collect();
    values[33_333] = -7.5;
    assert_eq!(most(values.clone())?, 7.5);
    values[60_000] = f32::NEG_INFINITY;
    assert_eq!(most(values.clone())?, f32::INFINITY);
    values[3] = f32::NAN;
    assert!(most(values)?.is_nan());
    assert_eq!(most(vec![0.; 3])?, 0.);
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
    let (da, du) = swiglu_back(&there(&a), &there(&u), &there(&g))?;
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
        let got = on([&value, &place, &mass], |[v, p, m]| msda(v, p, m, &there(&levels), d))?;
        same(&got.tensor(y.shape()), &y);
        for size in [1e-12, 1., 1e12] {
            let g = (random(y.dims(), 4)?.as_tensor().detach() * size)?;
            let want = gradients(&[&value, &place, &mass], &y, &g)?;
            let args = [value.as_tensor(), place.as_tensor(), mass.as_tensor()].map(there);
            for exact in [true, false] {
                let (dv, dp, dm) = msda_back(args.each_ref(), &there(&levels), &there(&g), d, exact)?;
                for (got, want) in [dv, dp, dm].iter().zip(&want) {
                    same(&(got / size)?, &(want / size)?);
                }
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
            same(
                &decode(&there(&q), &there(&k), &there(&v), (kv_heads, group), prefix, &there(&own), 0.3)?,
                &want,
            );
        }
    }
    Ok(())
}

#[test]
fn drawn_tokens() -> Result<()> {
    if skip() {
        return Ok(());
    }
    let (rows, vocab) = (5, 3001);
    let logits = (random((rows, vocab), 1)?.as_tensor() * 6.)?;
    let mut values: Vec<Vec<f32>> = logits.to_vec2()?;
    values[1][7] = f32::NAN;
    values[2][9] = f32::NEG_INFINITY;
    // The first of two equals is the most likely one.
    let most = values[3].iter().copied().fold(0., f32::max);
    (values[3][100], values[3][2000]) = (most + 1., most + 1.);
    let logits = Tensor::from_vec(values.concat(), (rows, vocab), &Device::Cpu)?;
    for temperature in [0., 0.3, 1., 5.] {
        for round in 0..20 {
            let drawn: Vec<f64> = (0..rows).map(|r| (((r * 20 + round) as f64) * 0.618).fract()).collect();
            let got = sample(&there(&logits), &drawn, temperature)?;
            for (r, (id, log_prob)) in got.into_iter().enumerate() {
                let row = &values[r];
                let most = row.iter().copied().filter(|l| !l.is_nan()).fold(f32::NEG_INFINITY, f32::max);
                let weights = row.iter().map(|&l| match l.is_nan() {
                    true => 0.,
                    false => ((l as f64 - most as f64) / temperature).exp(),
                });
                let weights: Vec<f64> = weights.collect();
                let want = match temperature {
                    0. => row.iter().position(|l| *l == most),
                    _ => {
                        let mut left = drawn[r] * weights.iter().sum::<f64>();
                        weights.iter().position(|w| {
                            left -= w;
                            left < 0.
                        })
                    }
                };
                assert_eq!(Some(id as usize), want);
                assert!((log_prob as f64 - crate::llm::sampler::log_prob(row, id as usize)).abs() < 1e-5);
            }
        }
    }
    let broken = Tensor::full(f32::NAN, (1, 40), &Device::Cpu)?;
    assert_eq!(sample(&there(&broken), &[0.5], 1.)?[0].0, u32::MAX);
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
    same(&on([&x], |[x]| Ok(log_prob(x, &there(&target), rows, vocab)?.0))?.tensor(rows), &y);
    let g = random(rows, 2)?.as_tensor().detach();
    same(&log_prob_back(&there(&x), &there(&target), &there(&g))?, &gradients(&[&x], &y, &g)?[0]);
    Ok(())
}
