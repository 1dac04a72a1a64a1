//! From scored rollouts to a step of the optimiser.

use super::policy::Policy;
use crate::config::{Algorithm, Objective, RateDecay, Reasoner};
use crate::llm::engine::Network;
use crate::nn::optim::{AdamW, AdamWConfig, Decay, Group, Schedule};
use crate::nn::{self, lanes::Lanes};
use crate::train::grpo::{Tokens, loss};
use crate::train::lm::{Sample, micro_batches, reply_log_probs};
use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// A rollout to learn from.
pub struct Scored {
    pub sample: Sample,
    /// Log-probabilities as the sampler had them.
    pub sampled: Vec<f32>,
    pub advantage: f64,
}

/// Means over the tokens of a step's updates.
#[derive(Clone, Debug, Default)]
pub struct Update {
    pub loss: f64,
    pub policy: f64,
    pub kl: f64,
    pub clipped: f64,
    pub drift: f64,
    pub lr: f64,
    /// Of the last update, before clipping.
    pub grad_norm: f64,
    /// Whether any update was left out, its gradients not being finite.
    pub skipped: bool,
    pub tokens: usize,
    /// How far the trainer's log-probabilities are from the sampler's, before the first update: mean and most.
    pub mismatch: f64,
    pub mismatch_most: f64,
}

pub fn optimiser(policy: &Policy, cfg: &Reasoner) -> Result<AdamW> {
    let adamw = AdamWConfig {
        weight_decay: cfg.weight_decay,
        max_grad_norm: Some(cfg.max_grad_norm),
        offload: cfg.offload,
        ..AdamWConfig::default()
    };
    Ok(AdamW::new(policy.trained().named(), adamw, |_, var| Some(Group::usual(var)))?)
}

pub fn schedule(cfg: &Reasoner, steps: u64) -> Schedule {
    let updates = cfg.updates as u64;
    let decay = match cfg.decay {
        RateDecay::Constant => Decay::Constant,
        RateDecay::Cosine => Decay::Cosine { total: steps * updates, to: cfg.lr / 10. },
    };
    // The first step learns too.
    let warmup_from = cfg.lr / (cfg.warmup + 1) as f64;
    Schedule { base: cfg.lr, warmup: cfg.warmup * updates, warmup_from, decay }
}

/// Log-probabilities of each sample's reply tokens, without gradients.
pub(super) fn log_probs(network: &Network, samples: &[&Sample]) -> Result<Vec<Vec<f64>>> {
    let all = reply_log_probs(network, samples)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    Ok(split(&all, samples))
}

fn split(all: &[f64], samples: &[&Sample]) -> Vec<Vec<f64>> {
    let mut rest = all;
    let own = |s: &&Sample| {
        let (own, after) = rest.split_at(s.reply_len());
        rest = after;
        own.to_vec()
    };
    samples.iter().map(own).collect()
}

/// Rollouts of one text, together: they are run once, and each adds its own gradient of the loss by the
/// log-probabilities. A planner that is nearly sure of itself says most things several times.
fn alike(rollouts: &[Scored], part: &[usize]) -> Vec<Vec<usize>> {
    let mut places: BTreeMap<_, usize> = BTreeMap::new();
    let mut out: Vec<Vec<usize>> = Vec::new();
    for &i in part {
        let sample = &rollouts[i].sample;
        let replies = sample.replies.iter().map(|r| (r.start, r.end)).collect::<Vec<_>>();
        match places.entry((&sample.ids, replies)) {
            Entry::Occupied(place) => out[*place.get()].push(i),
            Entry::Vacant(place) => {
                place.insert(out.len());
                out.push(vec![i]);
            }
        }
    }
    out
}

/// Learns from a step's rollouts in `cfg.updates` optimiser steps, each on its share of them. Replies of
/// no advantage count in the means, and where they have nothing to say for want of a divergence term
/// they are not run.
pub fn update(
    policy: &Policy,
    optimiser: &mut AdamW,
    schedule: &Schedule,
    cfg: &Reasoner,
    step: u64,
    rollouts: &[Scored],
) -> Result<Update> {
    let (mut out, lanes) = (Update::default(), Lanes::of_device(policy.network.decoder().device())?);
    let objective = match cfg.algorithm {
        Algorithm::Grpo => cfg.objective,
        // −log p of every reply: a surrogate of advantage 1 at ratio 1, with nothing to hold it back.
        Algorithm::Sft => Objective { kl: 0., ..cfg.objective },
    };
    let groups = |part: &[usize]| -> Vec<Vec<Vec<usize>>> {
        let same = alike(rollouts, part);
        let lengths: Vec<usize> = same.iter().map(|a| rollouts[a[0]].sample.ids.len()).collect();
        let own = |g: Vec<usize>| g.into_iter().map(|k| same[k].clone()).collect();
        micro_batches(&lengths, cfg.micro_tokens).into_iter().map(own).collect()
    };
    let firsts = |group: &[Vec<usize>]| group.iter().map(|a| &rollouts[a[0]].sample).collect::<Vec<_>>();
    let all: Vec<usize> = (0..rollouts.len()).collect();
    // With several updates the policy moves away from the one that sampled; before the first it is that one.
    let mut old: Vec<Vec<f64>> = vec![Vec::new(); rollouts.len()];
    if cfg.updates > 1 && cfg.algorithm == Algorithm::Grpo {
        let own = |group: &Vec<Vec<usize>>| {
            let own = log_probs(policy.sampler.engine().network(), &firsts(group))?;
            Ok(group.iter().cloned().zip(own).collect::<Vec<_>>())
        };
        lanes.each(&groups(&all), own, |group| {
            for (alike, own) in group {
                alike.into_iter().for_each(|i| old[i].clone_from(&own));
            }
            Ok(())
        })?;
    }
    let share = rollouts.len().div_ceil(cfg.updates).max(1);
    let (mut differences, mut compared) = (0., 0);
    for (k, part) in all.chunks(share).enumerate() {
        let tokens: usize = part.iter().map(|&i| rollouts[i].sample.reply_len()).sum();
        let heard: Vec<usize> =
            part.iter().copied().filter(|&i| objective.kl > 0. || rollouts[i].advantage != 0.).collect();
        let learn = |group: &Vec<Vec<usize>>| {
            let samples = firsts(group);
            let new = reply_log_probs(&policy.network, &samples)?;
            let values = split(&new.detach().to_dtype(DType::F64)?.to_vec1::<f64>()?, &samples);
            let reference = match objective.kl > 0. {
                true => log_probs(&policy.reference, &samples)?,
                false => values.clone(),
            };
            let mut part = Update::default();
            let mut gradient = Vec::with_capacity(new.elem_count());
            for ((alike, new), reference) in group.iter().zip(&values).zip(&reference) {
                let mut sum = vec![0f64; new.len()];
                for &i in alike {
                    let r = &rollouts[i];
                    if k == 0 && cfg.algorithm == Algorithm::Grpo {
                        ensure!(
                            r.sampled.len() == new.len(),
                            "a reply of {} tokens has {} log-probabilities",
                            new.len(),
                            r.sampled.len()
                        );
                        for (a, b) in r.sampled.iter().zip(new) {
                            let off = (f64::from(*a) - b).abs();
                            part.mismatch += off;
                            part.mismatch_most = part.mismatch_most.max(off);
                        }
                        part.tokens += new.len();
                    }
                    let old = if old[i].is_empty() { new } else { &old[i] };
                    let l = loss(Tokens { new, old, reference, advantage: r.advantage }, &objective);
                    // Of every reply at ratio 1 the surrogate is −1, whatever is learnt: the loss itself in its place.
                    part.policy += match cfg.algorithm {
                        Algorithm::Grpo => l.policy,
                        Algorithm::Sft => -new.iter().sum::<f64>(),
                    };
                    part.kl += l.kl;
                    part.clipped += l.clipped;
                    part.drift += l.drift;
                    sum.iter_mut().zip(&l.gradient).for_each(|(s, g)| *s += g);
                }
                gradient.extend(sum.iter().map(|g| (g / tokens as f64) as f32));
            }
            let gradient = Tensor::from_vec(gradient, new.shape(), new.device())?;
            Ok((part, nn::backward(&(new * gradient)?.sum_all()?)?))
        };
        lanes.each(&groups(&heard), learn, |(part, grads)| {
            out.policy += part.policy;
            out.kl += part.kl;
            out.clipped += part.clipped;
            out.drift += part.drift;
            out.mismatch_most = out.mismatch_most.max(part.mismatch_most);
            differences += part.mismatch;
            compared += part.tokens;
            Ok(optimiser.accumulate(&grads, 1.)?)
        })?;
        out.tokens += tokens;
        if heard.is_empty() {
            continue;
        }
        out.lr = schedule.lr(step * cfg.updates as u64 + k as u64);
        let report = optimiser.step(out.lr)?;
        out.grad_norm = report.grad_norm;
        out.skipped |= !report.applied;
        policy.changed();
    }
    let n = out.tokens.max(1) as f64;
    for sum in [&mut out.policy, &mut out.kl, &mut out.clipped, &mut out.drift] {
        *sum /= n;
    }
    out.loss = out.policy + objective.kl * out.kl;
    out.mismatch = differences / compared.max(1) as f64;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::llm::Message;
    use crate::planner::{ROOMS_PROMPT, user_turn};
    use candle_core::Device;

    fn cfg(sets: &[&str]) -> Reasoner {
        Config::resolve(None, &sets.iter().map(|s| s.to_string()).collect::<Vec<_>>()).unwrap().reasoner
    }

    fn sample(policy: &Policy, reply: &str) -> Sample {
        let turn = user_turn(ROOMS_PROMPT, "How many chairs are there?");
        Sample::new(&policy.sampler.format, &[Message::user(turn)], reply).unwrap()
    }

    /// A good reply and a bad one, as if just sampled.
    fn rollouts(policy: &Policy) -> Vec<Scored> {
        let pair = [("<plan>\n1. Count.\n</plan>", 1.), ("<plan>\n1. Guess.\n</plan>", -1.)];
        let scored = |(reply, advantage)| {
            let sample = sample(policy, reply);
            let own = log_probs(&policy.network, &[&sample]).unwrap().remove(0);
            Scored { sample, sampled: own.iter().map(|x| *x as f32).collect(), advantage }
        };
        pair.into_iter().map(scored).collect()
    }

    fn likelihoods(policy: &Policy, rollouts: &[Scored]) -> Vec<f64> {
        let one =
            |r: &Scored| log_probs(policy.sampler.engine().network(), &[&r.sample]).unwrap()[0].iter().sum();
        rollouts.iter().map(one).collect()
    }

    #[test]
    fn good_replies_become_likelier_and_bad_ones_rarer() -> Result<()> {
        for sets in [
            &["reasoner.warmup=0"][..],
            &["reasoner.warmup=0", "reasoner.adapter.rank=0", "reasoner.lr=1e-4"],
            &["reasoner.warmup=0", "reasoner.updates=2", "reasoner.objective.kl=0"],
            &["reasoner.warmup=0", "reasoner.recompute=true"],
            &["reasoner.warmup=0", "reasoner.objective.sequence_ratio=true"],
        ] {
            let cfg = cfg(sets);
            let policy = Policy::load("embedded", &cfg, &Device::Cpu)?;
            let rollouts = rollouts(&policy);
            let before = likelihoods(&policy, &rollouts);
            let mut optimiser = optimiser(&policy, &cfg)?;
            let schedule = schedule(&cfg, 1);
            let u = update(&policy, &mut optimiser, &schedule, &cfg, 0, &rollouts)?;
            assert_eq!(optimiser.steps(), cfg.updates as u64);
            assert!(u.mismatch_most < 1e-4 && !u.skipped && u.grad_norm > 0., "{u:?}");
            let after = likelihoods(&policy, &rollouts);
            // They share a beginning, so each draws the other along.
            let (good, bad) = (after[0] - before[0], after[1] - before[1]);
            assert!(good > 0. && good > bad + 0.1, "{sets:?}: {before:?} {after:?}");
        }
        Ok(())
    }

    /// As on a GPU: the base in bf16 beside an adapter in f32, or all weights in bf16 with a master copy.
    #[test]
    fn a_policy_in_half_precision_learns_as_one_in_f32() -> Result<()> {
        let full = &["reasoner.warmup=0", "reasoner.adapter.rank=0", "reasoner.lr=1e-4"][..];
        // One step of the full weights is below bf16's precision for most of them: its effect comes with later
        // ones, for which the master copy remembers it.
        for (sets, least) in [(&["reasoner.warmup=0"][..], 0.5), (full, 0.05)] {
            let cfg = cfg(sets);
            let learnt = |dtype: DType| -> Result<(f64, f64)> {
                let policy = Policy::of_type("embedded", &cfg, dtype, &Device::Cpu)?;
                let rollouts = rollouts(&policy);
                let before = likelihoods(&policy, &rollouts);
                let mut optimiser = optimiser(&policy, &cfg)?;
                let u = update(&policy, &mut optimiser, &schedule(&cfg, 1), &cfg, 0, &rollouts)?;
                assert!(u.mismatch_most < 0.1 && !u.skipped, "{u:?}");
                let after = likelihoods(&policy, &rollouts);
                Ok((u.grad_norm, (after[0] - before[0]) - (after[1] - before[1])))
            };
            let ((norm, gain), (norm16, gain16)) = (learnt(DType::F32)?, learnt(DType::BF16)?);
            assert!((norm - norm16).abs() < 0.1 * norm, "norms, {sets:?}: {norm} {norm16}");
            assert!(
                gain > 0.1 && gain16 > least * gain && gain16 < 2. * gain,
                "gains, {sets:?}: {gain} {gain16}"
            );
        }
        Ok(())
    }

    #[test]
    fn layers_that_run_twice_give_the_same_gradients() -> Result<()> {
        let norm = |sets: &[&str]| -> Result<f64> {
            let cfg = cfg(sets);
            let policy = Policy::load("embedded", &cfg, &Device::Cpu)?;
            let rollouts = rollouts(&policy);
            let mut optimiser = optimiser(&policy, &cfg)?;
            Ok(update(&policy, &mut optimiser, &schedule(&cfg, 1), &cfg, 0, &rollouts)?.grad_norm)
        };
        for rank in ["reasoner.adapter.rank=8", "reasoner.adapter.rank=0"] {
            let (plain, twice) = (norm(&[rank])?, norm(&[rank, "reasoner.recompute=true"])?);
            assert!((plain - twice).abs() <= 1e-4 * plain, "{rank}: {plain} {twice}");
        }
        Ok(())
    }

    #[test]
    fn a_reply_said_three_times_moves_the_policy_as_three_replies_do() -> Result<()> {
        let cfg = cfg(&["reasoner.warmup=0"]);
        let moved = |times: usize, weight: f64| -> Result<(f64, Vec<f64>)> {
            let policy = Policy::load("embedded", &cfg, &Device::Cpu)?;
            let mut all = rollouts(&policy);
            all[0].advantage *= weight;
            for _ in 1..times {
                let r = &all[0];
                let (sampled, advantage) = (r.sampled.clone(), r.advantage);
                let sample =
                    Sample { ids: r.sample.ids.clone(), replies: r.sample.replies.clone(), pictures: None };
                all.push(Scored { sample, sampled, advantage });
            }
            let (good, bad) = (all[0].sample.reply_len(), all[1].sample.reply_len());
            let mut optimiser = optimiser(&policy, &cfg)?;
            let u = update(&policy, &mut optimiser, &schedule(&cfg, 1), &cfg, 0, &all)?;
            assert_eq!(u.tokens, times * good + bad);
            // The mean is over all tokens: as if there were that many fewer.
            Ok((u.grad_norm * u.tokens as f64, likelihoods(&policy, &all[..2])))
        };
        let ((norm, after), (one, of_one)) = (moved(3, 1.)?, moved(1, 3.)?);
        assert!((norm - one).abs() <= 1e-4 * one, "{norm} {one}");
        // AdamW's first step is the gradient's sign, whatever its scale.
        for (a, b) in after.iter().zip(&of_one) {
            assert!((a - b).abs() < 1e-2, "{after:?} {of_one:?}");
        }
        let (less, _) = moved(1, 1.)?;
        assert!((norm - less).abs() > 0.1 * norm, "the three count: {norm} {less}");
        Ok(())
    }

    #[test]
    fn without_advantage_and_divergence_nothing_is_learnt() -> Result<()> {
        let cfg = cfg(&["reasoner.objective.kl=0"]);
        let policy = Policy::load("embedded", &cfg, &Device::Cpu)?;
        let mut rollouts = rollouts(&policy);
        rollouts.iter_mut().for_each(|r| r.advantage = 0.);
        let mut optimiser = optimiser(&policy, &cfg)?;
        let u = update(&policy, &mut optimiser, &schedule(&cfg, 1), &cfg, 0, &rollouts)?;
        assert_eq!((optimiser.steps(), u.loss), (0, 0.));
        assert!(u.tokens > 0, "they count in the means of others");
        Ok(())
    }

    #[test]
    fn every_parameter_of_the_adapter_receives_a_gradient_and_no_other() -> Result<()> {
        let policy = Policy::load("embedded", &cfg(&[]), &Device::Cpu)?;
        for (name, var) in policy.trained().named() {
            // As it starts B is zero, and A's gradient with it.
            if name.ends_with("lora_B.weight") {
                var.set(&(var.ones_like()? * 0.01)?)?;
            }
        }
        let loss = reply_log_probs(&policy.network, &[&sample(&policy, "<plan>")])?.sum_all()?;
        let grads = loss.backward()?;
        let trained = policy.trained().named();
        assert_eq!(trained.len(), 5 * 7 * 2, "five layers, seven targets");
        for (name, var) in &trained {
            let Some(g) = grads.get(var) else { panic!("no gradient: {name}") };
            assert!(g.abs()?.sum_all()?.to_scalar::<f32>()? > 0., "zero gradient: {name}");
        }
        for (name, var) in policy.base().named() {
            assert!(grads.get(&var).is_none(), "{name} is frozen");
        }
        let none = reply_log_probs(&policy.reference, &[&sample(&policy, "<plan>")])?.sum_all()?;
        assert!(!none.track_op(), "the reference keeps no graph");
        Ok(())
    }
}
