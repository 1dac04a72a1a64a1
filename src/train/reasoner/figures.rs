//! What a run tells of itself: a step's figures, samples, evaluations, the report.

use super::rollouts::{Clock, Rollout, whole, why_missing};
use super::update::Update;
use super::{HeldOut, Policy, Training};
use crate::config::Head;
use crate::files::write_atomic;
use crate::llm::{ChatModel, ChatRequest, Finish, SamplingOptions};
use crate::pipeline::answer;
use crate::planner::{self, user_turn};
use crate::program::Reply;
use crate::report::training;
use crate::rooms::{self, OracleTools};
use crate::train::run::{self, Metrics};
use anyhow::{Context, Result};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::PathBuf;

impl Training<'_> {
    pub(super) fn figures(&self, rollouts: &[Rollout], learnt: usize, u: &Update, clock: Clock) -> Metrics {
        let n = rollouts.len().max(1) as f64;
        let mean = |values: &mut dyn Iterator<Item = f64>| {
            let (sum, n) = values.fold((0., 0), |(s, n), v| (s + v, n + 1));
            sum / f64::from(n.max(1))
        };
        let share = |b: bool| f64::from(u8::from(b));
        let traces = || rollouts.iter().filter_map(|r| r.reply.as_ref().ok()?.trace.as_ref());
        let tokens: usize = traces().map(|t| t.ids.len()).sum();
        let groups: Vec<&[Rollout]> = rollouts.chunks(self.cfg().group).collect();
        let spread = |g: &&[Rollout]| share(g.iter().any(|r| r.advantage.is_some_and(|a| a != 0.)));
        let distinct: BTreeSet<(usize, &str)> = rollouts.iter().map(|r| (r.question, r.text())).collect();
        let mut m = Metrics::new();
        let mut put = |name: &str, value: f64| m.insert(name.into(), json!(value));
        put("loss", u.loss);
        put("reward", mean(&mut rollouts.iter().filter_map(|r| r.scored.reward)));
        // Of the replies that came: a server's fault is none of the policy's form.
        let replied = || rollouts.iter().filter(|r| r.reply.is_ok());
        put("format", mean(&mut replied().map(|r| share(r.scored.format))));
        put("syntax", mean(&mut replied().map(|r| share(r.scored.syntax))));
        for head in Head::ALL {
            let verdicts = rollouts.iter().filter_map(|r| r.scored.heads.get(&head)?.ok);
            put(head.word(), mean(&mut verdicts.map(share)));
        }
        put("missing", rollouts.iter().filter(|r| r.scored.reward.is_none()).count() as f64 / n);
        put("groups_with_spread", mean(&mut groups.iter().map(spread)));
        put("distinct", distinct.len() as f64 / n);
        put("policy_loss", u.policy);
        put("kl", u.kl);
        put("clipped", u.clipped);
        put("drift", u.drift);
        put("grad_norm", u.grad_norm);
        put("lr", u.lr);
        // Of the sampled tokens: −log p is an unbiased estimate of entropy at temperature 1.
        put("entropy", mean(&mut traces().flat_map(|t| &t.log_probs).map(|lp| -f64::from(*lp))));
        put("reply_tokens", tokens as f64 / n);
        put(
            "cut",
            mean(
                &mut rollouts
                    .iter()
                    .filter_map(|r| Some(share(r.reply.as_ref().ok()?.finish == Finish::Length))),
            ),
        );
        put("sampler_mismatch", u.mismatch);
        put("sampler_mismatch_most", u.mismatch_most);
        put("rollouts", rollouts.len() as f64);
        put("learnt", learnt as f64);
        put("rollout_tokens_per_second", tokens as f64 / clock.seconds("rollouts").max(1e-9));
        put("trained_tokens_per_second", u.tokens as f64 / clock.seconds("update").max(1e-9));
        if u.skipped {
            m.insert("skipped".into(), json!(true));
        }
        let by_family = self.distinct_by_family(rollouts);
        if !by_family.is_empty() {
            m.insert("distinct_programs".into(), json!(by_family));
        }
        m.insert("seconds".into(), json!(clock.0));
        m.insert("unix".into(), json!(run::unix()));
        m
    }

    /// On Rooms, the share of different programs among the rollouts to each family's questions: a group
    /// that only ever says one thing has nothing to learn from.
    fn distinct_by_family(&self, rollouts: &[Rollout]) -> BTreeMap<&'static str, f64> {
        let mut programs: BTreeMap<&str, (BTreeSet<(usize, String)>, usize)> = BTreeMap::new();
        if matches!(self.queries.held_out, HeldOut::Rooms(_)) {
            for r in rollouts {
                let Some((spec, _)) = rooms::frames::parse(&self.queries.training[r.question]) else {
                    continue;
                };
                let (different, all) = programs.entry(spec.family().text()).or_default();
                let program = Reply::parse(r.text()).map_or_else(|_| String::new(), |reply| reply.program);
                different.insert((r.question, program));
                *all += 1;
            }
        }
        let share = |(family, (different, all)): (_, (BTreeSet<_>, usize))| {
            (family, different.len() as f64 / all as f64)
        };
        programs.into_iter().map(share).collect()
    }

    /// A few of a step's groups, with their verdicts, for people.
    pub(super) fn record(&self, step: u64, rollouts: &[Rollout]) -> Result<()> {
        const GROUPS: usize = 2;
        let path = self.dir.join("rollouts").join(format!("{:06}.jsonl", step + 1));
        write_atomic(&path, |w| {
            rollouts.iter().take(GROUPS * self.cfg().group).try_for_each(|r| {
                let error = r.reply.as_ref().err();
                let line = json!({
                    "question": self.queries.training[r.question], "reply": r.text(), "error": error,
                    "reward": r.scored.reward, "advantage": r.advantage, "scored": r.scored,
                });
                writeln!(w, "{line}")
            })
        })?;
        Ok(())
    }

    /// Replies to held-out questions after a step.
    fn held_out_file(&self, step: u64) -> PathBuf {
        self.dir.join("held_out").join(format!("{step:06}.jsonl"))
    }

    /// `report.html` and TensorBoard's file, anew from the run's records.
    pub(super) fn report(&self, step: u64) -> Result<()> {
        run::report(&self.dir, |metrics| {
            training::page(
                &format!("train-reasoner {}", self.dir.display()),
                metrics,
                &run::lines(&self.held_out_file(0)),
                &run::lines(&self.held_out_file(step)),
            )
        })
    }

    /// The most likely reply to each held-out question: the verifier's mean reward, and on Rooms the
    /// share of right answers on exact tools; and each reply's reward.
    pub(super) fn evaluate(
        &mut self,
        policy: &Policy,
        bar: &ProgressBar,
    ) -> Result<(Metrics, Vec<Option<f64>>)> {
        let mut m = Metrics::new();
        let texts = self.queries.held_out.texts();
        if texts.is_empty() {
            return Ok((m, Vec::new()));
        }
        bar.set_message("evaluation");
        let prompt = planner::prompt(self.config)?;
        let max = self.cfg().max_new_tokens;
        let requests: Vec<ChatRequest> =
            texts.iter().map(|q| ChatRequest::user(user_turn(&prompt, q), 0, max)).collect();
        let (mut replies, mut errors) = (Vec::with_capacity(texts.len()), Vec::with_capacity(texts.len()));
        for reply in policy.sampler.chat(&requests, &SamplingOptions::greedy(), None) {
            match reply {
                Err(e) if e.is_of_model() => return Err(e).context("the planner failed"),
                Ok(r) => {
                    replies.push(whole(&r).to_owned());
                    errors.push(None);
                }
                Err(e) => {
                    replies.push(String::new());
                    errors.push(Some(e.to_string()));
                }
            }
        }
        let cases: Vec<(&str, &str)> =
            texts.iter().copied().zip(replies.iter().map(String::as_str)).collect();
        let mut scored = self.verification.score(&cases, &mut self.sandbox, |_| ())?;
        for (scored, _) in scored.iter_mut().zip(&errors).filter(|(_, e)| e.is_some()) {
            scored.reward = None;
        }
        let all: Vec<Option<f64>> = scored.iter().map(|s| s.reward).collect();
        self.check_missing(&format!("evaluation at step {}", bar.position()), &all, || {
            scored.iter().zip(&errors).find_map(|(s, e)| why_missing(e.as_deref(), s))
        })?;
        let rewards: Vec<f64> = all.iter().copied().flatten().collect();
        m.insert("unix".into(), json!(run::unix()));
        if !rewards.is_empty() {
            let mean = rewards.iter().sum::<f64>() / rewards.len() as f64;
            m.insert("held_out_reward".into(), json!(mean));
        }
        if let HeldOut::Rooms(asked) = &self.queries.held_out {
            let (mut right, mut replied) = (0, 0);
            for ((view, q), reply) in
                asked.iter().zip(&replies).zip(&errors).filter_map(|(r, e)| e.is_none().then_some(r))
            {
                let run = answer(reply, &mut self.sandbox, &mut OracleTools::new(view));
                if run.unrun().is_some() {
                    continue;
                }
                replied += 1;
                right += usize::from(run.value().is_some_and(|a| crate::rooms::questions::score(q, a)));
            }
            m.insert("held_out_right".into(), json!(right as f64 / f64::from(replied.max(1))));
        }
        run::say(bar, &format!("step {}: {}", bar.position(), Value::Object(m.clone())));
        write_atomic(&self.held_out_file(bar.position()), |w| {
            texts.iter().zip(&replies).zip(&scored).try_for_each(|((question, reply), s)| {
                writeln!(w, "{}", json!({"question": question, "reply": reply, "reward": s.reward}))
            })
        })?;
        Ok((m, all))
    }
}
