//! A step's rollouts: sampled, scored, and weighed against those of their group.

use super::Training;
use crate::config::Algorithm;
use crate::llm::{ChatReply, ChatRequest, Finish};
use crate::pipeline::question_seed;
use crate::planner::{self, user_turn};
use crate::train::Broken;
use crate::train::grpo::advantages;
use crate::train::rollout::RolloutEngine;
use crate::verify::Scored;
use anyhow::{Context, Result};
use indicatif::ProgressBar;
use std::collections::BTreeMap;
use std::time::Instant;

/// A step's rollouts, of which the first `kept` are learnt from.
pub(super) struct Gathered {
    pub(super) rollouts: Vec<Rollout>,
    pub(super) kept: usize,
    pub(super) clock: Clock,
}

/// One rollout with what came of it.
pub(super) struct Rollout {
    /// Of the training questions.
    pub(super) question: usize,
    pub(super) reply: std::result::Result<ChatReply, String>,
    pub(super) scored: Scored,
    pub(super) advantage: Option<f64>,
}

impl Rollout {
    pub(super) fn text(&self) -> &str {
        self.reply.as_ref().map_or("", |r| &r.text)
    }
}

/// Seconds by phase.
#[derive(Default)]
pub(super) struct Clock(pub(super) BTreeMap<&'static str, f64>);

impl Clock {
    pub(super) fn time<T>(&mut self, phase: &'static str, work: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let out = work();
        *self.0.entry(phase).or_default() += begun.elapsed().as_secs_f64();
        out
    }

    pub(super) fn seconds(&self, phase: &str) -> f64 {
        self.0.get(phase).copied().unwrap_or(0.)
    }
}

impl Training<'_> {
    /// A step's rollouts, scored.
    pub(super) fn gather(
        &mut self,
        engine: &dyn RolloutEngine,
        step: u64,
        bar: &ProgressBar,
    ) -> Result<Gathered> {
        let mut clock = Clock::default();
        let (mut rollouts, mut silent) = (Vec::new(), Vec::new());
        for round in 0..=self.cfg().resample as u64 {
            let mut questions = self.queries.batch(self.cfg(), step, round);
            // Later rounds only fill the places of groups that say nothing.
            let wanted = self.cfg().batch - rollouts.len() / self.cfg().group;
            questions.truncate(wanted);
            let new = self.collect(engine, &questions, step, round, &mut clock, bar)?;
            let last = round == self.cfg().resample as u64;
            for group in chunks(new, self.cfg().group) {
                let spread = group.iter().any(|r| r.advantage.is_some_and(|a| a != 0.));
                if spread || last || self.cfg().algorithm == Algorithm::Sft {
                    rollouts.extend(group);
                } else {
                    silent.extend(group);
                }
            }
            if rollouts.len() / self.cfg().group >= self.cfg().batch {
                break;
            }
        }
        // Figures are of all that was sampled: what says nothing to the update is good all the same, or missing.
        let kept = rollouts.len();
        rollouts.append(&mut silent);
        let rewards: Vec<Option<f64>> = rollouts.iter().map(|r| r.scored.reward).collect();
        self.check_missing(&format!("step {}", step + 1), &rewards, || {
            rollouts.iter().find_map(|r| why_missing(r.reply.as_ref().err().map(String::as_str), &r.scored))
        })?;
        Ok(Gathered { rollouts, kept, clock })
    }

    /// Samples and scores a group of replies to each question.
    pub(super) fn collect(
        &mut self,
        engine: &dyn RolloutEngine,
        questions: &[usize],
        step: u64,
        round: u64,
        clock: &mut Clock,
        bar: &ProgressBar,
    ) -> Result<Vec<Rollout>> {
        let config = self.config;
        let (cfg, prompt) = (&config.reasoner, planner::prompt(config)?);
        let of_step = question_seed(cfg.seed, step as usize, round as usize);
        let request = |(k, &q): (usize, &usize)| {
            let turn = user_turn(&prompt, &self.queries.training[q]);
            (0..cfg.group).map(move |i| {
                ChatRequest::user(turn.clone(), question_seed(of_step, k, i), cfg.max_new_tokens)
            })
        };
        let requests: Vec<ChatRequest> = questions.iter().enumerate().flat_map(request).collect();
        bar.set_message("rollouts");
        let replies = clock.time("rollouts", || engine.sample(&requests));
        let mut texts = Vec::with_capacity(replies.len());
        let mut kept = Vec::with_capacity(replies.len());
        for reply in replies {
            match reply {
                Err(e) if e.is_of_model() => return Err(e).context("the planner failed"),
                Ok(r) => {
                    texts.push(whole(&r).to_owned());
                    kept.push(Ok(r));
                }
                Err(e) => {
                    texts.push(String::new());
                    kept.push(Err(e.to_string()));
                }
            }
        }
        let asked = questions.iter().flat_map(|&q| std::iter::repeat_n(q, cfg.group));
        let cases: Vec<(&str, &str)> = asked
            .clone()
            .zip(&texts)
            .map(|(q, text)| (self.queries.training[q].as_str(), text.as_str()))
            .collect();
        bar.set_message("verdicts");
        let verification = &self.verification;
        let sandbox = &mut self.sandbox;
        let scored = clock.time("verdicts", || verification.score(&cases, sandbox, |_| ()))?;
        let mut out: Vec<Rollout> = asked
            .zip(kept)
            .zip(scored)
            .map(|((question, reply), mut scored)| {
                if reply.is_err() {
                    scored.reward = None;
                }
                Rollout { question, reply, scored, advantage: None }
            })
            .collect();
        for group in out.chunks_mut(cfg.group) {
            let rewards: Vec<Option<f64>> = group.iter().map(|r| r.scored.reward).collect();
            for (r, a) in group.iter_mut().zip(advantages(&rewards, cfg.objective.normalise)) {
                r.advantage = a;
            }
        }
        Ok(out)
    }

    /// That not too many rewards of a step or an evaluation are missing; `why` one of them is.
    pub(super) fn check_missing(
        &self,
        of: &str,
        rewards: &[Option<f64>],
        why: impl FnOnce() -> Option<String>,
    ) -> Result<()> {
        let missing = rewards.iter().filter(|r| r.is_none()).count();
        if missing as f64 <= self.cfg().missing_limit * rewards.len() as f64 {
            return Ok(());
        }
        Err(Broken(format!(
            "{of}: {missing} of {} rewards are missing, more than reasoner.missing_limit = {} allows; {}. \
             The last checkpoint is kept: see to the verifier ({}) and go on with --resume",
            rewards.len(),
            self.cfg().missing_limit,
            why().unwrap_or_default(),
            self.verification.judge.name()
        ))
        .into())
    }
}

/// What counts of a reply: one cut at the limit is malformed, whatever its beginning says.
pub(super) fn whole(reply: &ChatReply) -> &str {
    if reply.finish == Finish::Length { "" } else { &reply.text }
}

pub(super) fn why_missing(error: Option<&str>, scored: &Scored) -> Option<String> {
    if let Some(e) = error {
        return Some(format!("a reply could not be had: {e}"));
    }
    if let Some(why) = &scored.unrun {
        return Some(format!("a program could not be run: {why}"));
    }
    let (head, v) = scored.heads.iter().find(|(_, v)| v.ok.is_none())?;
    Some(format!("the verdict on {} was {:?}", head.word(), v.said.chars().take(200).collect::<String>()))
}

fn chunks(all: Vec<Rollout>, n: usize) -> Vec<Vec<Rollout>> {
    let mut rest = all.into_iter().peekable();
    let mut out = Vec::new();
    while rest.peek().is_some() {
        out.push(rest.by_ref().take(n).collect());
    }
    out
}
