//! Next-token training of Qwen3 and Qwen3-VL on replies: planner, verifier, VLM.
//!
//! Only reply tokens count, each the same: the loss of a step is the mean of −log p over all of
//! its reply tokens (not the mean of samples' means). A step's samples are sorted by length and cut
//! into micro-batches of a bounded number of tokens, padded on the right, whose gradients add up;
//! so memory is bounded and little of the work is padding. Not here: packing several samples into one row,
//! half precision.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::run::{Metrics, Trainee};
use crate::llm::engine::Network;
use crate::llm::format::ChatFormat;
use crate::llm::{ChatError, Message};
use crate::models::qwen3_vl::Pictures;
use crate::nn::Params;
use crate::nn::lanes::Lanes;
use crate::nn::optim::{AdamW, AdamWConfig, Group, Schedule};

/// A conversation and its replies, to be learnt.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The conversation, up to the end of its last reply.
    pub ids: Vec<u32>,
    /// Where its replies lie, in order; the first begins at 1 or later.
    pub replies: Vec<Range<usize>>,
    pub pictures: Option<Pictures>,
}

impl Sample {
    /// The conversation as inference would prompt it, and the reply as the model would sample it.
    pub fn new(format: &ChatFormat, messages: &[Message], reply: &str) -> Result<Self, ChatError> {
        let prompt = format.prompt(messages, &Device::Cpu)?;
        let start = prompt.ids.len();
        let ids = [prompt.ids, format.reply(reply)?].concat();
        let replies = std::iter::once(start..ids.len()).collect();
        Ok(Self { ids, replies, pictures: prompt.pictures })
    }

    /// A conversation of several turns, all of whose replies are trained on. An error where the
    /// template writes past turns otherwise than it prompts for them.
    pub fn conversation(format: &ChatFormat, turns: &[(Message, &str)]) -> Result<Self, ChatError> {
        let mut messages = Vec::with_capacity(2 * turns.len());
        let mut sample = Self { ids: Vec::new(), replies: Vec::new(), pictures: None };
        for (question, reply) in turns {
            messages.push(question.clone());
            let next = Self::new(format, &messages, reply)?;
            if !next.ids.starts_with(&sample.ids) {
                let msg = "it writes past turns otherwise than it prompts for them";
                return Err(ChatError::Template(msg.into()));
            }
            sample.replies.extend(next.replies);
            (sample.ids, sample.pictures) = (next.ids, next.pictures);
            messages.push(Message::assistant(*reply));
        }
        Ok(sample)
    }

    /// Tokens of its replies.
    pub fn reply_len(&self) -> usize {
        self.replies.iter().map(Range::len).sum()
    }
}

/// Log-probabilities of all reply tokens, sample after sample: f32 `[Σ reply lengths]`,
/// differentiable. Samples run as one batch.
pub fn reply_log_probs(network: &Network, samples: &[&Sample]) -> candle_core::Result<Tensor> {
    let (hidden, targets) = reply_hidden(network, samples)?;
    network.decoder().token_log_probs(&hidden, &targets)
}

/// Hidden states that predict the reply tokens, `[n, hidden]`, and those tokens, u32 `[n]`.
fn reply_hidden(network: &Network, samples: &[&Sample]) -> candle_core::Result<(Tensor, Tensor)> {
    let longest = samples.iter().map(|s| s.ids.len()).max().unwrap_or(0);
    let (mut rows, mut picks, mut targets) = (Vec::new(), Vec::new(), Vec::new());
    for (b, s) in samples.iter().enumerate() {
        let fits = |r: &Range<usize>| 0 < r.start && r.start < r.end && r.end <= s.ids.len();
        if s.replies.is_empty() || !s.replies.iter().all(fits) {
            candle_core::bail!("a sample of {} tokens with replies at {:?}", s.ids.len(), s.replies)
        }
        let mut row = s.ids.clone();
        // The last token is a safe filler: a reply's end is never a picture token.
        row.resize(longest, s.ids[s.ids.len() - 1]);
        rows.push(row);
        for r in &s.replies {
            picks.extend(r.clone().map(|i| (b * longest + i - 1) as u32));
            targets.extend_from_slice(&s.ids[r.clone()]);
        }
    }
    let pictures: Vec<&Pictures> = samples.iter().filter_map(|s| s.pictures.as_ref()).collect();
    let pictures = if pictures.is_empty() { None } else { Some(Pictures::cat(&pictures)?) };
    let hidden = network.hidden(&rows, pictures.as_ref())?;
    let device = hidden.device().clone();
    let hidden = hidden.flatten(0, 1)?.index_select(&Tensor::new(picks, &device)?, 0)?;
    Ok((hidden, Tensor::new(targets, &device)?))
}

/// Groups of samples of similar length, each of at most `tokens` tokens with its padding (a longer
/// sample stands alone). Indices, in a fixed order.
pub fn micro_batches(lengths: &[usize], tokens: usize) -> Vec<Vec<usize>> {
    /// A sample shorter than this share of its group's longest begins a group of its own where
    /// that saves as many tokens as make a fair batch.
    const SHORT: f64 = 0.7;
    const FAIR: usize = 1_024;
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(lengths[i]), i));
    let mut out: Vec<Vec<usize>> = Vec::new();
    for (at, i) in order.into_iter().enumerate() {
        // Sorted: the first of a group is its longest.
        let longest = out.last().map_or(0, |g| lengths[g[0]]);
        let saved = (lengths.len() - at) * (longest - lengths[i].min(longest));
        let apart = (lengths[i] as f64) < SHORT * longest as f64 && saved >= FAIR;
        match out.last_mut() {
            Some(g) if (g.len() + 1) * longest <= tokens && !apart => g.push(i),
            _ => out.push(vec![i]),
        }
    }
    out
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LmOptions {
    pub schedule: Schedule,
    #[serde(default)]
    pub adamw: AdamWConfig,
    /// Tokens of a micro-batch at most, padding included.
    pub micro_tokens: usize,
}

/// Makes the samples of a step; randomness must follow from the step (and the source's own seed).
pub type Source<'a> = Box<dyn FnMut(u64) -> anyhow::Result<Vec<Sample>> + 'a>;

/// A language model being trained, for [`run::train`](super::run::train).
pub struct LmTrainee<'a> {
    network: Network,
    params: Params,
    optimiser: AdamW,
    options: LmOptions,
    source: Source<'a>,
    lanes: Lanes,
    /// By name, which begins the names of their figures.
    held_out: Vec<(String, Vec<Sample>)>,
}

impl<'a> LmTrainee<'a> {
    /// `network` must be built on `params`. `group` picks what is trained and how.
    pub fn new(
        network: Network,
        params: Params,
        options: LmOptions,
        group: impl Fn(&str, &candle_core::Var) -> Option<Group>,
        source: Source<'a>,
        held_out: Vec<Sample>,
    ) -> anyhow::Result<Self> {
        let optimiser = AdamW::new(params.named(), options.adamw.clone(), group)?;
        let (lanes, held_out) =
            (Lanes::of_device(network.decoder().device())?, vec![("held_out".into(), held_out)]);
        Ok(Self { network, params, optimiser, options, source, lanes, held_out })
    }

    /// Another set of samples that [`Trainee::evaluate`] reports on, by this name.
    pub fn also_held_out(mut self, name: impl Into<String>, samples: Vec<Sample>) -> Self {
        self.held_out.push((name.into(), samples));
        self
    }

    fn groups<'s>(&self, samples: &'s [Sample]) -> Vec<Vec<&'s Sample>> {
        let lengths: Vec<usize> = samples.iter().map(|s| s.ids.len()).collect();
        let groups = micro_batches(&lengths, self.options.micro_tokens);
        groups.into_iter().map(|g| g.into_iter().map(|i| &samples[i]).collect()).collect()
    }
}

impl Trainee for LmTrainee<'_> {
    fn params(&self) -> &Params {
        &self.params
    }

    fn optimiser_state(&self) -> candle_core::Result<HashMap<String, Tensor>> {
        self.optimiser.state()
    }

    fn restore(&mut self, state: HashMap<String, Tensor>, _: u64) -> candle_core::Result<()> {
        self.optimiser.restore(&state)
    }

    fn step(&mut self, step: u64) -> anyhow::Result<Metrics> {
        let samples = (self.source)(step)?;
        let total: usize = samples.iter().map(Sample::reply_len).sum();
        anyhow::ensure!(total > 0, "step {step}: the source gave no reply tokens");
        let mut loss = 0.;
        let (groups, network, optimiser) = (self.groups(&samples), &self.network, &mut self.optimiser);
        let learn = |group: &Vec<&Sample>| {
            let nll = (reply_log_probs(network, group)?.sum_all()? * (-1. / total as f64))?;
            Ok((f64::from(nll.to_scalar::<f32>()?), nll.backward()?))
        };
        self.lanes.each(&groups, learn, |(nll, grads)| {
            loss += nll;
            Ok(optimiser.accumulate(&grads, 1.)?)
        })?;
        let lr = self.options.schedule.lr(step);
        let report = self.optimiser.step(lr)?;
        let mut m = Metrics::new();
        m.insert("loss".into(), json!(loss));
        m.insert("lr".into(), json!(lr));
        m.insert("grad_norm".into(), json!(report.grad_norm));
        m.insert("reply_tokens".into(), json!(total));
        if !report.applied {
            m.insert("skipped".into(), json!(true));
        }
        Ok(m)
    }

    /// Of each held-out set: loss per token, the share of tokens that come first, and of samples in
    /// whose replies all tokens do (which greedy sampling gives word for word).
    fn evaluate(&mut self) -> anyhow::Result<Metrics> {
        let mut m = Metrics::new();
        for (name, samples) in self.held_out.iter().filter(|(_, s)| !s.is_empty()) {
            let (mut nll, mut tokens, mut right, mut whole) = (0f64, 0usize, 0usize, 0usize);
            for group in self.groups(samples) {
                let (hidden, targets) = reply_hidden(&self.network, &group)?;
                let logits = self.network.decoder().logits(&hidden.detach())?.detach();
                let lp = crate::nn::log_probs(&logits, &targets)?.to_dtype(DType::F64)?;
                nll -= lp.sum_all()?.to_scalar::<f64>()?;
                let best: Vec<u32> = logits.argmax(1)?.to_vec1()?;
                let targets = targets.to_vec1::<u32>()?;
                let hits: Vec<bool> = best.iter().zip(targets).map(|(a, b)| *a == b).collect();
                let mut at = 0;
                for s in &group {
                    let own = &hits[at..at + s.reply_len()];
                    right += own.iter().filter(|h| **h).count();
                    whole += usize::from(own.iter().all(|h| *h));
                    at += own.len();
                }
                tokens += at;
            }
            m.insert(format!("{name}_loss"), json!(nll / tokens as f64));
            m.insert(format!("{name}_tokens_right"), json!(right as f64 / tokens as f64));
            m.insert(format!("{name}_replies_right"), json!(whole as f64 / samples.len() as f64));
        }
        Ok(m)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::qwen3::{Config, Qwen3};
    use crate::train::run::{self, RunOptions};
    use std::iter::once;
    use std::path::Path;

    fn network(params: &Params) -> Network {
        let cfg: Config = serde_json::from_value(json!({
            "vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 1e4,
            "tie_word_embeddings": true,
        }))
        .unwrap();
        Network::Text { model: Qwen3::new(&cfg, params.builder()).unwrap(), cfg }
    }

    /// Replies repeat the prompt's one or two tokens backwards; 23 ends them.
    fn sample(i: u64) -> Sample {
        let (a, b) = ((i % 20) as u32 + 1, (i / 3 % 20) as u32 + 1);
        match i % 2 {
            0 => Sample { ids: vec![0, a, 22, a, 23], replies: once(3..5).collect(), pictures: None },
            _ => Sample { ids: vec![0, a, b, 22, b, a, 23], replies: once(4..7).collect(), pictures: None },
        }
    }

    fn trainee<'a>() -> LmTrainee<'a> {
        let params = Params::new(3);
        let options = LmOptions {
            schedule: Schedule::constant(1e-2),
            adamw: AdamWConfig { weight_decay: 0., ..AdamWConfig::default() },
            micro_tokens: 64,
        };
        let source: Source = Box::new(|step| Ok((0..24).map(|i| sample(step * 24 + i)).collect()));
        let held_out = (0..40).map(|i| sample(1_000_003 + i)).collect();
        let network = network(&params);
        LmTrainee::new(network, params, options, |_, v| Some(Group::usual(v)), source, held_out).unwrap()
    }

    fn run(dir: &Path, steps: u64) -> (Metrics, Vec<f32>) {
        let mut t = trainee();
        let options = RunOptions {
            keep: 1,
            stop: None,
            dir: dir.into(),
            steps,
            resume: true,
            save_every: 10,
            eval_every: 0,
            log_every: 10,
            settings: json!({}),
            label: "lm".into(),
        };
        let m = run::train(&mut t, &options).unwrap();
        let w = t.params.get("model.layers.0.self_attn.q_proj.weight").unwrap();
        (m, w.flatten_all().unwrap().to_vec1().unwrap())
    }

    #[test]
    fn it_learns_and_resumes_exactly() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let before = trainee().evaluate().unwrap();
        let (after, whole) = run(a.path(), 120);
        assert!(before["held_out_replies_right"].as_f64().unwrap() < 0.1, "{before:?}");
        assert!(after["held_out_replies_right"].as_f64().unwrap() > 0.9, "{after:?}");
        run(b.path(), 50);
        assert_eq!(run(b.path(), 120).1, whole);
    }

    #[test]
    fn micro_batches_change_nothing_but_rounding() {
        let grads = |micro_tokens: usize| -> (f64, Vec<f32>) {
            let mut t = trainee();
            t.options.micro_tokens = micro_tokens;
            let m = t.step(0).unwrap();
            let w = t.params.get("model.embed_tokens.weight").unwrap();
            (m["grad_norm"].as_f64().unwrap(), w.flatten_all().unwrap().to_vec1().unwrap())
        };
        let (whole, parts) = (grads(1 << 20), grads(10));
        assert!((whole.0 - parts.0).abs() < 1e-4 * whole.0, "{} {}", whole.0, parts.0);
    }

    #[test]
    fn the_loss_is_over_reply_tokens_only() {
        let params = Params::new(4);
        let net = network(&params);
        let s = sample(1);
        let lp: Vec<f32> = reply_log_probs(&net, &[&s, &sample(2)]).unwrap().to_vec1().unwrap();
        assert_eq!(lp.len(), s.reply_len() + sample(2).reply_len());
        // One row by hand, without padding.
        let hidden = net.hidden(std::slice::from_ref(&s.ids), None).unwrap();
        let logits = net.decoder().logits(&hidden).unwrap().squeeze(0).unwrap().to_vec2::<f32>().unwrap();
        for (i, want) in lp[..s.reply_len()].iter().enumerate() {
            let at = s.replies[0].start + i;
            let got = crate::llm::sampler::log_prob(&logits[at - 1], s.ids[at] as usize) as f32;
            assert!((got - want).abs() < 1e-4, "{got} {want}");
        }
    }

    #[test]
    fn groups_hold_every_sample_once_within_the_bound() {
        let lengths: Vec<usize> = (0..57).map(|i| 3 + i * 7 % 40).collect();
        let groups = micro_batches(&lengths, 100);
        let mut all: Vec<usize> = groups.concat();
        all.sort_unstable();
        assert_eq!(all, (0..57).collect::<Vec<_>>());
        for g in &groups {
            assert!(g.len() * g.iter().map(|i| lengths[*i]).max().unwrap() <= 100);
        }
        assert_eq!(micro_batches(&[500, 2], 100), [vec![0], vec![1]]);
    }

    #[test]
    fn many_short_samples_are_not_padded_to_a_few_long_ones() {
        let lengths = [vec![30; 50], vec![110; 4]].concat();
        let groups = micro_batches(&lengths, 6_000);
        assert_eq!(groups.iter().map(Vec::len).collect::<Vec<_>>(), [4, 50]);
        // A few do no harm, and a batch of their own would be small.
        assert_eq!(micro_batches(&[100, 100, 60, 60], 6_000).len(), 1);
    }
}
