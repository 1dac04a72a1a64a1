//! Choosing the next token from logits.
//!
//! The order of HF's warpers: temperature, then top-k, then top-p. Every sequence draws from a
//! ChaCha8 stream of its own, one number per token, so what it draws does not depend on its
//! neighbours in a batch. (Logits themselves may differ in the last bits between batch shapes.)

use candle_core::{DType, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::ChatError;
use crate::nn;

/// How replies are drawn; the same for all requests of a call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingOptions {
    /// 0 takes the most likely token each time; top-k and top-p then have no effect.
    pub temperature: f64,
    /// Keep the k most likely tokens (and those that tie with the k-th).
    pub top_k: Option<usize>,
    /// Keep the most likely tokens up to this total probability; at least one stays.
    pub top_p: Option<f64>,
    /// Return the sampled ids with their log-probabilities.
    pub trace: bool,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self::greedy()
    }
}

impl SamplingOptions {
    pub fn greedy() -> Self {
        Self { temperature: 0., top_k: None, top_p: None, trace: false }
    }

    /// Temperature alone, as rollouts are sampled.
    pub fn temperature(t: f64) -> Self {
        Self { temperature: t, ..Self::greedy() }
    }

    pub fn check(&self) -> Result<(), ChatError> {
        let bad = |field: &str, value: f64, want: &str| {
            Err(ChatError::Request(format!("sampling.{field} is {value}, it must be {want}")))
        };
        if !(self.temperature.is_finite() && self.temperature >= 0.) {
            return bad("temperature", self.temperature, "0 or a positive number");
        }
        if self.top_k == Some(0) {
            return bad("top_k", 0., "at least 1");
        }
        match self.top_p {
            Some(p) if !(p > 0. && p <= 1.) => bad("top_p", p, "over 0 and at most 1"),
            _ => Ok(()),
        }
    }
}

/// A drawn token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampled {
    pub id: u32,
    /// Under the softmax of the logits as they came (temperature 1, nothing cut off).
    pub log_prob: f32,
}

/// One sequence's sampler.
#[derive(Clone, Debug)]
pub struct Sampler {
    opts: SamplingOptions,
    rng: ChaCha8Rng,
}

impl Sampler {
    pub fn new(opts: SamplingOptions, seed: u64) -> Self {
        Self { opts, rng: ChaCha8Rng::seed_from_u64(seed) }
    }

    /// Draws a token for each row of logits `[rows, vocab]`, on the device if that can do it.
    pub fn sample_rows(samplers: &mut [&mut Self], logits: &Tensor) -> Result<Vec<Sampled>, ChatError> {
        let whole = |s: &Self| s.opts.temperature == 0. || (s.opts.top_k.is_none() && s.opts.top_p.is_none());
        if let Some(first) = samplers.first()
            && logits.device().is_cuda()
            && samplers.iter().all(|s| s.opts == first.opts && whole(s))
        {
            let t = first.opts.temperature;
            // As drawn on the processor: one number a token, none where nothing is drawn.
            let mut next = |s: &mut &mut Self| if t == 0. { 0. } else { s.rng.random::<f64>() };
            let drawn: Vec<f64> = samplers.iter_mut().map(&mut next).collect();
            let found = nn::sample(logits, &drawn, t)?;
            let token =
                |(id, log_prob)| if id == u32::MAX { Err(broken()) } else { Ok(Sampled { id, log_prob }) };
            return found.into_iter().map(token).collect();
        }
        let logits: Vec<Vec<f32>> = logits.to_dtype(DType::F32)?.to_vec2()?;
        samplers.par_iter_mut().zip(&logits).map(|(s, l)| s.sample(l)).collect()
    }

    /// Draws from logits `[vocab]`. NaN logits are never drawn.
    pub fn sample(&mut self, logits: &[f32]) -> Result<Sampled, ChatError> {
        let Some(best) = argmax(logits) else { return Err(broken()) };
        let id = if self.opts.temperature == 0. { best } else { self.draw(logits, logits[best]) };
        Ok(Sampled { id: id as u32, log_prob: log_prob(logits, id) as f32 })
    }

    fn draw(&mut self, logits: &[f32], max: f32) -> usize {
        let weight = |l: f32| ((l as f64 - max as f64) / self.opts.temperature).exp();
        // (id, unnormalised probability), most likely first where the order matters.
        let mut kept: Vec<(usize, f64)> =
            logits.iter().enumerate().filter(|(_, l)| !l.is_nan()).map(|(i, &l)| (i, weight(l))).collect();
        let descending = |a: &(usize, f64), b: &(usize, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if let Some(k) = self.opts.top_k.filter(|&k| k < kept.len()) {
            let (_, kth, _) = kept.select_nth_unstable_by(k - 1, descending);
            let threshold = kth.1;
            kept.retain(|(_, w)| *w >= threshold);
        }
        if let Some(p) = self.opts.top_p.filter(|&p| p < 1.) {
            kept.sort_unstable_by(descending);
            let limit = p * kept.iter().map(|(_, w)| w).sum::<f64>();
            let mut before = 0.;
            let n = kept.iter().take_while(|(_, w)| {
                let keep = before < limit;
                before += w;
                keep
            });
            let n = n.count().max(1);
            kept.truncate(n);
        }
        // By id: a last-bit difference between near-equal logits must not swap their intervals.
        kept.sort_unstable_by_key(|&(i, _)| i);
        let mut left = self.rng.random::<f64>() * kept.iter().map(|(_, w)| w).sum::<f64>();
        for &(i, w) in &kept {
            left -= w;
            if left < 0. {
                return i;
            }
        }
        kept.iter().rev().find(|(_, w)| *w > 0.).map_or(kept[0].0, |&(i, _)| i)
    }
}

fn broken() -> ChatError {
    let msg = "the model's logits are all NaN or −inf: its weights or inputs are broken";
    candle_core::Error::Msg(msg.into()).into()
}

fn argmax(logits: &[f32]) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (i, l) in logits.iter().enumerate() {
        if *l > best.map_or(f32::NEG_INFINITY, |b| logits[b]) {
            best = Some(i);
        }
    }
    best
}

/// `log softmax(logits)[id]`, accumulated in f64.
pub fn log_prob(logits: &[f32], id: usize) -> f64 {
    let max = logits.iter().copied().filter(|l| !l.is_nan()).fold(f32::NEG_INFINITY, f32::max) as f64;
    let sum: f64 = logits.iter().filter(|l| !l.is_nan()).map(|&l| (l as f64 - max).exp()).sum();
    logits[id] as f64 - max - sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(opts: SamplingOptions, logits: &[f32], n: u64) -> Vec<f64> {
        let mut counts = vec![0f64; logits.len()];
        let mut s = Sampler::new(opts, 7);
        for _ in 0..n {
            counts[s.sample(logits).unwrap().id as usize] += 1. / n as f64;
        }
        counts
    }

    #[test]
    fn frequencies_follow_the_tempered_softmax() {
        let logits = [0.3f32, -1.0, 2.0, 0.0, 1.1];
        for t in [0.7, 1., 1.6] {
            let f = frequencies(SamplingOptions::temperature(t), &logits, 40_000);
            let w: Vec<f64> = logits.iter().map(|&l| (l as f64 / t).exp()).collect();
            let total: f64 = w.iter().sum();
            for (f, w) in f.iter().zip(&w) {
                // Four standard errors.
                let p = w / total;
                assert!((f - p).abs() < 4. * (p * (1. - p) / 40_000.).sqrt(), "{f} {p}");
            }
        }
    }

    #[test]
    fn top_k_and_top_p_cut_what_hf_cuts() {
        // Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625.
        let logits: Vec<f32> = [0.5f32, 0.25, 0.125, 0.0625, 0.0625].iter().map(|p| p.ln()).collect();
        let support = |top_k, top_p| {
            let o = SamplingOptions { top_k, top_p, ..SamplingOptions::temperature(1.) };
            frequencies(o, &logits, 4000).iter().filter(|f| **f > 0.).count()
        };
        assert_eq!(support(None, None), 5);
        assert_eq!(support(Some(2), None), 2);
        assert_eq!(support(Some(4), None), 5, "ties with the k-th stay");
        assert_eq!(support(None, Some(0.4)), 1);
        assert_eq!(support(None, Some(0.6)), 2);
        assert_eq!(support(None, Some(0.8)), 3);
        // top-k first: of 2/3 and 1/3, the first alone passes 0.6.
        assert_eq!(support(Some(2), Some(0.6)), 1);
    }

    #[test]
    fn greedy_and_low_temperature_agree_and_nan_is_never_drawn() {
        let logits = [f32::NAN, 1.0, 3.0, f32::NEG_INFINITY];
        assert_eq!(Sampler::new(SamplingOptions::greedy(), 0).sample(&logits).unwrap().id, 2);
        let f = frequencies(SamplingOptions::temperature(1.), &logits, 2000);
        assert_eq!((f[0], f[3]), (0., 0.));
        assert!(f[1] > 0.);
        assert!(Sampler::new(SamplingOptions::greedy(), 0).sample(&[f32::NAN; 3]).is_err());
    }

    #[test]
    fn a_seed_fixes_the_draws() {
        let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.77).sin()).collect();
        let run = |seed| {
            let mut s = Sampler::new(SamplingOptions::temperature(1.), seed);
            (0..20).map(|_| s.sample(&logits).unwrap().id).collect::<Vec<_>>()
        };
        assert_eq!(run(3), run(3));
        assert_ne!(run(3), run(4));
    }

    #[test]
    fn log_prob_is_a_log_softmax() {
        let logits = [1000f32, 1001., 999.];
        let p: f64 = (0..3).map(|i| log_prob(&logits, i).exp()).sum();
        assert!((p - 1.).abs() < 1e-12);
        assert!((log_prob(&logits, 1) - log_prob(&logits, 0) - 1.).abs() < 1e-12);
    }

    #[test]
    fn impossible_options_are_named() {
        for o in [
            SamplingOptions::temperature(-1.),
            SamplingOptions::temperature(f64::NAN),
            SamplingOptions { top_p: Some(0.), ..SamplingOptions::temperature(1.) },
            SamplingOptions { top_k: Some(0), ..SamplingOptions::temperature(1.) },
        ] {
            assert!(o.check().unwrap_err().to_string().contains("sampling."), "{o:?}");
        }
    }
}
