//! Qwen3 against transformers: forward, log-probabilities, cached generation, gradients.

use super::{Fixture, assert_close, relative_error};
use candle_core::{D, DType, IndexOp, Tensor};
use std::collections::BTreeMap;
use std::sync::Mutex;
use valor::models::qwen3::{Config, KvCache, Qwen3, Rope};
use valor::nn::Mask;

const TOL: f64 = 1e-4;

/// Ids, positions and mask of the fixture's left-padded batch.
struct Batch {
    ids: Tensor,
    rope: Rope,
    pads: Vec<u32>,
}

fn u32s(t: &Tensor) -> Vec<Vec<u32>> {
    t.to_dtype(DType::U32).unwrap().to_vec2().unwrap()
}

fn batch(f: &Fixture, cfg: &Config) -> Batch {
    let ids = f.input("input_ids").to_dtype(DType::U32).unwrap();
    let positions = u32s(&f.input("position_ids"));
    let real = u32s(&f.input("attention_mask"));
    let pads = real.iter().map(|r| r.iter().filter(|&&x| x == 0).count() as u32).collect();
    Batch { ids, rope: Rope::from_positions(cfg, &positions, &super::device()).unwrap(), pads }
}

impl Batch {
    fn mask(&self) -> Mask {
        Mask::left_padded(self.pads.clone())
    }

    /// Compares the rows' real tokens only: what padding computes is nobody's business.
    fn assert_close(&self, name: &str, got: &Tensor, want: &Tensor) {
        for (b, &p) in self.pads.iter().enumerate() {
            let cut = |t: &Tensor| t.i((b, p as usize..)).unwrap();
            assert_close(&format!("{name}, row {b}"), &cut(got), &cut(want), TOL);
        }
    }
}

const FIXTURES: [&str; 2] = ["qwen3-tiny", "qwen3-tiny-tied"];

#[test]
pub fn forward_matches() {
    for name in FIXTURES {
        let f = Fixture::open(name);
        let cfg: Config = f.json("config.json");
        let model = Qwen3::new(&cfg, f.weights()).unwrap();
        let x = batch(&f, &cfg);
        let first = Mutex::new(None);
        let hook = |i: usize, h: &Tensor| {
            if i == 0 {
                *first.lock().unwrap() = Some(h.clone());
            }
            Ok(None)
        };
        let emb = model.embed(&x.ids).unwrap();
        x.assert_close("embedding", &emb, &f.output("hidden_0_embed"));
        let h = model.forward_embeds(&emb, &x.rope, &x.mask(), None, Some(&hook)).unwrap();
        x.assert_close("hidden 1", &first.lock().unwrap().take().unwrap(), &f.output("hidden_1"));
        x.assert_close("last hidden", &h, &f.output("hidden_last_normed"));
        x.assert_close("logits", &model.logits(&h).unwrap(), &f.output("logits"));
    }
}

/// The fixture's loss: mean over pairs of real neighbours of −log p(next).
fn log_probs(f: &Fixture, model: &Qwen3, x: &Batch) -> (Tensor, Tensor) {
    let (b, s) = x.ids.dims2().unwrap();
    let h = model.forward(&x.ids, &x.rope, &x.mask(), None).unwrap();
    let h = h.narrow(1, 0, s - 1).unwrap().contiguous().unwrap().flatten(0, 1).unwrap();
    let targets = x.ids.narrow(1, 1, s - 1).unwrap().contiguous().unwrap().flatten_all().unwrap();
    let lp = model.token_log_probs(&h, &targets).unwrap().reshape((b, s - 1)).unwrap();
    let valid = f.output("logprob_valid_mask");
    let n = valid.sum_all().unwrap().to_scalar::<f32>().unwrap() as f64;
    let nll = ((&lp * &valid).unwrap().sum_all().unwrap() / -n).unwrap();
    (lp, nll)
}

#[test]
pub fn log_probs_and_gradients_match() {
    for name in FIXTURES {
        let f = Fixture::open(name);
        let cfg: Config = f.json("config.json");
        let params = f.trainable();
        let model = Qwen3::new(&cfg, params.builder()).unwrap();
        let x = batch(&f, &cfg);
        let (lp, nll) = log_probs(&f, &model, &x);
        let valid = f.output("logprob_valid_mask");
        let masked = |t: Tensor| (t * &valid).unwrap();
        assert_close("log-probs", &masked(lp), &masked(f.output("logprobs_shifted")), TOL);
        assert_close("nll", &nll.reshape(1).unwrap(), &f.output("mean_nll"), TOL);

        let grads = nll.backward().unwrap();
        let norms: BTreeMap<String, f64> = f.json("grad_norms.json");
        let named = params.named();
        assert_eq!(named.len(), norms.len(), "{name}: every parameter has a gradient");
        for (p, var) in &named {
            let g = grads.get(var).unwrap_or_else(|| panic!("{name}: {p} has no gradient"));
            let norm = g.sqr().unwrap().sum_all().unwrap().sqrt().unwrap().to_scalar::<f32>().unwrap() as f64;
            assert!(
                (norm - norms[p]).abs() <= TOL * norms[p].max(1e-3),
                "{name}: |grad {p}| {norm}, want {}",
                norms[p]
            );
        }
        let mut compared = 0;
        for out in f.output_names().filter(|n| n.starts_with("grad.")) {
            let var = params.get(&out["grad.".len()..]).unwrap();
            assert_close(out, grads.get(&var).unwrap(), &f.output(out), TOL);
            compared += 1;
        }
        assert!(compared >= 5);
    }
}

/// Greedy generation through the cache; the rows of ids and the logits `[batch, steps, vocab]`.
fn generate(model: &Qwen3, cfg: &Config, x: &Batch, steps: usize) -> (Vec<Vec<u32>>, Tensor) {
    let (b, s) = x.ids.dims2().unwrap();
    let mut cache = KvCache::new(cfg, b, s + steps, DType::F32, &super::device()).unwrap();
    let mut h = model.forward(&x.ids, &x.rope, &x.mask(), Some(&mut cache)).unwrap();
    let mut rows = u32s(&x.ids);
    let mut logits = vec![];
    for t in 0..steps {
        let l = model.logits(&h.narrow(1, h.dim(1).unwrap() - 1, 1).unwrap()).unwrap();
        let next: Vec<u32> = l.i((.., 0)).unwrap().argmax(D::Minus1).unwrap().to_vec1().unwrap();
        logits.push(l);
        for (row, id) in rows.iter_mut().zip(&next) {
            row.push(*id);
        }
        if t + 1 < steps {
            let pos: Vec<Vec<u32>> = x.pads.iter().map(|p| vec![(s + t) as u32 - p]).collect();
            let rope = Rope::from_positions(cfg, &pos, &super::device()).unwrap();
            let ids = Tensor::from_vec(next, (b, 1), &super::device()).unwrap();
            h = model.forward(&ids, &rope, &x.mask(), Some(&mut cache)).unwrap();
        }
    }
    assert_eq!(cache.len(), s + steps - 1);
    (rows, Tensor::cat(&logits, 1).unwrap())
}

#[test]
pub fn cached_generation_matches() {
    for name in FIXTURES {
        let f = Fixture::open(name);
        let cfg: Config = f.json("config.json");
        let model = Qwen3::new(&cfg, f.weights()).unwrap();
        let x = batch(&f, &cfg);
        let want = f.output("generated_step_logits");
        let steps = want.dim(1).unwrap();
        let (rows, logits) = generate(&model, &cfg, &x, steps);
        assert_eq!(rows, u32s(&f.output("generated")), "{name}: greedy tokens");
        assert_close("step logits", &logits, &want, TOL);

        // Log-probabilities and entropy of what was generated, also at temperature 0.7.
        let chosen: Vec<u32> = rows.iter().flat_map(|r| r[r.len() - steps..].to_vec()).collect();
        let flat = logits.flatten(0, 1).unwrap();
        let ids = Tensor::new(chosen.as_slice(), &super::device()).unwrap();
        for (t, out) in [(1., "generated_logprobs"), (0.7, "generated_logprobs_temp0.7")] {
            let lp = valor::nn::log_probs(&(&flat / t).unwrap(), &ids).unwrap();
            assert_close(out, &lp.reshape((rows.len(), steps)).unwrap(), &f.output(out), TOL);
        }
        let p = valor::nn::softmax(&logits).unwrap();
        let entropy = (&p * p.log().unwrap()).unwrap().sum(D::Minus1).unwrap().neg().unwrap();
        assert_close("entropy", &entropy, &f.output("generated_entropy"), TOL);
    }
}

/// Each row alone, without padding, gives what it gives in the padded batch.
#[test]
fn a_row_does_not_depend_on_its_batch() {
    let f = Fixture::open(FIXTURES[0]);
    let cfg: Config = f.json("config.json");
    let model = Qwen3::new(&cfg, f.weights()).unwrap();
    let x = batch(&f, &cfg);
    let (rows, logits) = generate(&model, &cfg, &x, 8);
    for (b, &p) in x.pads.iter().enumerate() {
        let ids = x.ids.i((b..b + 1, p as usize..)).unwrap();
        let n = ids.dim(1).unwrap() as u32;
        let rope = Rope::from_positions(&cfg, &[(0..n).collect()], &super::device()).unwrap();
        let (alone, l) = generate(&model, &cfg, &Batch { ids, rope, pads: vec![0] }, 8);
        assert_eq!(alone[0], rows[b][p as usize..]);
        let err = relative_error(&l, &logits.i(b..b + 1).unwrap(), 1e-3);
        assert!(err <= 1e-5, "row {b}: {err:.1e}");
    }
}

/// A prefix computed once serves rows of different lengths, padded between prefix and tail.
#[test]
pub fn shared_prefix_matches_whole_prompts() {
    let f = Fixture::open(FIXTURES[0]);
    let cfg: Config = f.json("config.json");
    let model = Qwen3::new(&cfg, f.weights()).unwrap();
    let dev = super::device();
    let rope = |p: Vec<Vec<u32>>| Rope::from_positions(&cfg, &p, &dev).unwrap();
    let ids = u32s(&f.input("input_ids"));
    let prefix: Vec<u32> = ids[0][..7].to_vec();
    let tails: [Vec<u32>; 3] = [ids[0][7..12].to_vec(), ids[1][14..21].to_vec(), ids[2][18..21].to_vec()];

    let mut one = KvCache::new(&cfg, 1, prefix.len(), DType::F32, &dev).unwrap();
    let pid = Tensor::new(prefix.as_slice(), &dev).unwrap().unsqueeze(0).unwrap();
    let n = prefix.len() as u32;
    model.forward(&pid, &rope(vec![(0..n).collect()]), &Mask::causal(), Some(&mut one)).unwrap();

    let longest = tails.iter().map(Vec::len).max().unwrap();
    let (mut padded, mut pos, mut start) = (vec![], vec![], vec![]);
    for t in &tails {
        let pad = longest - t.len();
        padded.extend(std::iter::repeat_n(0, pad).chain(t.iter().copied()));
        pos.push((0..longest).map(|i| n + i.saturating_sub(pad) as u32).collect());
        start.push(n + pad as u32);
    }
    let mut cache = KvCache::from_prefix(&one, tails.len(), prefix.len() + longest + 1).unwrap();
    let tid = Tensor::from_vec(padded, (tails.len(), longest), &dev).unwrap();
    let mask = Mask::Causal { prefix: prefix.len(), start: Some(start) };
    let h = model.forward(&tid, &rope(pos), &mask, Some(&mut cache)).unwrap();
    let got = model.logits(&h.i((.., longest - 1)).unwrap()).unwrap();

    for (b, t) in tails.iter().enumerate() {
        let whole: Vec<u32> = prefix.iter().chain(t).copied().collect();
        let id = Tensor::new(whole.as_slice(), &dev).unwrap().unsqueeze(0).unwrap();
        let pos = vec![(0..whole.len() as u32).collect()];
        let h = model.forward(&id, &rope(pos), &Mask::causal(), None).unwrap();
        let want = model.logits(&h.i((.., whole.len() - 1)).unwrap()).unwrap();
        assert_close(&format!("row {b}"), &got.i(b..b + 1).unwrap(), &want, 1e-5);
    }

    // Dropping a finished row leaves the others' next step unchanged.
    let step = |cache: &mut KvCache, rows: &[usize]| {
        let mask = Mask::Causal {
            prefix: prefix.len(),
            start: Some(rows.iter().map(|&r| n + (longest - tails[r].len()) as u32).collect()),
        };
        let ids = Tensor::from_vec(vec![9u32; rows.len()], (rows.len(), 1), &dev).unwrap();
        let pos = rows.iter().map(|&r| vec![n + tails[r].len() as u32]).collect();
        model.forward(&ids, &rope(pos), &mask, Some(cache)).unwrap()
    };
    let all = step(&mut cache, &[0, 1, 2]);
    cache.truncate(prefix.len() + longest);
    cache.select(&[2, 0]).unwrap();
    let two = step(&mut cache, &[2, 0]);
    assert_close("row 2", &two.i(0..1).unwrap(), &all.i(2..3).unwrap(), 1e-5);
    assert_close("row 0", &two.i(1..2).unwrap(), &all.i(0..1).unwrap(), 1e-5);
}
