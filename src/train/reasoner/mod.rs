//! The reasoner's training (method.md 3 and 4): rollouts of the planner, scored by the verifier, learnt
//! from by GRPO or, as its rival, by next-token training on the good ones.
//!
//! A step draws questions, samples a group of replies to each, scores them, and updates the policy.
//! Whatever is random follows from the run's seed and the step, so a resumed run is the run that was
//! interrupted. Questions have no answers here: which checkpoint is best is the verifier's opinion of
//! held-out questions. (On Rooms the share of right answers on exact tools is logged beside, for people.)

mod best;
mod figures;
pub mod make;
mod policy;
mod queries;
mod rollouts;
mod state;
mod update;

pub use policy::{Policy, check_trainable};
pub use queries::{HeldOut, Queries, ROOMS};
pub use state::{check_folder, check_resumed};

use super::Broken;
use super::checkpoint::{Checkpoints, Saved};
use super::lm::Sample;
use super::rollout::{RolloutEngine, Servers};
use super::run::{self, Metrics, MetricsLog};
use crate::config::{self, Algorithm, Config};
use crate::files::{sweep, write_atomic};
use crate::llm::Message;
use crate::nn::AdamW;
use crate::nn::optim::Schedule;
use crate::planner::{self, user_turn};
use crate::program::Sandbox;
use crate::report::pulse::Pulse;
use crate::verify::Verification;
use anyhow::{Context, Result};
use best::Best;
use candle_core::Device;
use indicatif::{ProgressBar, ProgressStyle};
use rollouts::{Clock, Gathered, Rollout};
use serde_json::{Value, json};
use state::{State, save, saved_state, settings};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use update::{log_probs, optimiser, schedule, update};

/// A run under way.
struct Live<'p> {
    policy: &'p Policy,
    optimiser: AdamW,
    schedule: Schedule,
    checkpoints: Checkpoints,
    state: State,
    /// The step of the newest checkpoint.
    saved: u64,
    /// Are weights and optimiser those of the state's step? While they are updated they are of none.
    sound: bool,
    best: Option<Best>,
    log: MetricsLog,
    bar: ProgressBar,
}

impl Live<'_> {
    fn save(&mut self) -> Result<()> {
        let (best, state) = (self.best.as_ref().map(|b| b.step), &self.state);
        self.checkpoints.save(state.step, best, |dir| save(dir, self.policy, &self.optimiser, state))?;
        self.saved = state.step;
        Ok(())
    }
}

/// Steps of a run of so many questions.
pub fn steps(cfg: &config::Reasoner, questions: usize) -> u64 {
    (cfg.epochs * questions as f64 / cfg.batch as f64).ceil().max(1.) as u64
}

/// What a run needs besides its policy.
pub struct Training<'a> {
    pub config: &'a Config,
    pub queries: Queries,
    pub verification: Verification<'a>,
    pub sandbox: Sandbox,
    pub dir: PathBuf,
    /// Set from outside, it ends the run after the step that is under way, saved.
    pub stop: &'a AtomicBool,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    pub step: u64,
    pub of: u64,
    /// The best evaluation's step and mean reward.
    pub best: Option<(u64, f64)>,
}

impl Training<'_> {
    fn cfg(&self) -> &config::Reasoner {
        &self.config.reasoner
    }

    pub fn steps(&self) -> u64 {
        steps(self.cfg(), self.queries.training.len())
    }

    fn settings(&self, policy: &Policy) -> Result<Value> {
        settings(self.config, &self.queries, &policy.name(), self.verification.judge.name())
    }

    /// Trains `policy` to the end, or to a stop. With `resume` it goes on from the folder's newest whole
    /// checkpoint; without, a folder that holds one is refused.
    pub fn run(&mut self, policy: &Policy, resume: bool) -> Result<Ended> {
        let steps = self.steps();
        check_folder(&self.dir, resume)?;
        std::fs::create_dir_all(&self.dir).with_context(|| self.dir.display().to_string())?;
        ["", best::FOLDER, "model", "rollouts", "held_out"]
            .iter()
            .for_each(|folder| sweep(&self.dir.join(folder)));
        let checkpoints = Checkpoints::open(&self.dir.join("checkpoints"), self.cfg().keep)?;
        let mut optimiser = optimiser(policy, self.cfg())?;
        let mut state = State { settings: self.settings(policy)?, ..State::default() };
        if let Some(saved) = checkpoints.newest(|why| notice!("valor: passing over {why}"))? {
            state = self.restore(policy, &mut optimiser, &saved, &state.settings)?;
            notice!("valor: going on at step {} of {steps}", state.step);
        } else if resume {
            notice!("valor: {} holds no checkpoint yet; beginning at step 0", self.dir.display());
        }
        let resolved = toml::to_string(self.config)?;
        write_atomic(&self.dir.join("config.toml"), |w| w.write_all(resolved.as_bytes()))?;
        let log = self.dir.join("metrics.jsonl");
        if state.step == 0 && log.exists() {
            // Of a session that was ended before its first checkpoint.
            std::fs::remove_file(&log)?;
        }
        let log = MetricsLog::open(&log, state.step)?;
        let bar = ProgressBar::new(steps).with_position(state.step);
        bar.set_style(ProgressStyle::with_template(
            "train-reasoner {bar:24} {pos}/{len} {elapsed} eta {eta} {msg}",
        )?);
        // What the training has to beat is evaluated first.
        let (best, unevaluated) = match state.step {
            0 => (None, true),
            _ => (Best::of(&self.dir.join(best::FOLDER))?, state.unevaluated),
        };
        let mut live = Live {
            policy,
            optimiser,
            schedule: schedule(self.cfg(), steps),
            checkpoints,
            saved: state.step,
            sound: true,
            state: State { unevaluated, ..state },
            best,
            log,
            bar,
        };
        let ended = self.go(&mut live, steps);
        live.bar.finish_and_clear();
        // A verifier or a server that fails takes no step along that is done.
        if ended.is_err() && live.sound && live.state.step > live.saved {
            match live.save() {
                Ok(()) => notice!("valor: step {} is saved", live.state.step),
                Err(e) => notice!("valor: step {} could not be saved: {e:#}", live.state.step),
            }
        }
        ended?;
        if live.state.step == steps {
            policy.export(&self.dir.join("model"))?;
        }
        let best = live.best.and_then(|b| Some((b.step, b.mean()?)));
        Ok(Ended { step: live.state.step, of: steps, best })
    }

    /// To the last step, or to a stop.
    fn go(&mut self, live: &mut Live, steps: u64) -> Result<()> {
        let policy = live.policy;
        let spent = live.state.usage;
        if live.state.unevaluated {
            self.weigh(live)?;
        }
        let servers = self.servers(policy);
        let session = run::unix() as u64;
        if let (Some(servers), true) = (&servers, live.state.step > 0) {
            self.send(policy, servers, session, live.state.step)?;
        }
        let mut pulse = Pulse::default();
        while live.state.step < steps && !self.stop.load(Ordering::Relaxed) {
            let step = live.state.step;
            let engine = engine(policy, servers.as_ref(), self.cfg().algorithm);
            let gathered = self.gather(engine, step, &live.bar)?;
            live.sound = false;
            let (mut figures, rollouts) = self.learn(live, gathered)?;
            let every = self.cfg().eval_every;
            live.state.step = step + 1;
            live.state.unevaluated =
                (every > 0 && live.state.step.is_multiple_of(every)) || live.state.step == steps;
            live.state.usage = spent + self.verification.judge.usage().unwrap_or_default();
            live.sound = true;
            if self.verification.judge.usage().is_some() {
                figures.insert("verifier".into(), json!(live.state.usage));
            }
            live.log.write(live.state.step, figures)?;
            self.record(step, &rollouts)?;
            if let Some(servers) = &servers {
                self.send(policy, servers, session, live.state.step)?;
            }
            live.bar.set_position(live.state.step);
            pulse.beat(&live.bar);
            if live.state.unevaluated {
                self.weigh(live)?;
            }
            let stopped = self.stop.load(Ordering::Relaxed);
            if live.state.step.is_multiple_of(self.cfg().save_every) || live.state.step == steps || stopped {
                // The evaluation's calls, too.
                live.state.usage = spent + self.verification.judge.usage().unwrap_or_default();
                live.save()?;
            }
        }
        Ok(())
    }

    /// Evaluates the policy, and keeps it if it is the best.
    fn weigh(&mut self, live: &mut Live) -> Result<()> {
        let step = live.state.step;
        let (figures, rewards) = self.evaluate(live.policy, &live.bar)?;
        live.best = Best::keep(&self.dir, live.policy, live.best.take(), step, rewards)?;
        if !figures.is_empty() {
            live.log.write(step, figures)?;
        }
        live.state.unevaluated = false;
        // Made of what the log has: that it can't be written is told, and ends no training.
        if step > 0
            && let Err(e) = self.report(step)
        {
            run::say(&live.bar, &format!("valor: no page of curves: {e:#}"));
        }
        Ok(())
    }

    fn servers<'p>(&self, policy: &'p Policy) -> Option<Servers<'p>> {
        let cfg = &self.cfg().servers;
        (!cfg.urls.is_empty()).then(|| Servers::new(cfg, &policy.sampler.format))
    }

    /// Sends the adapter to the servers, and makes sure that they use it. Base rollouts need none.
    fn send(&self, policy: &Policy, servers: &Servers, session: u64, step: u64) -> Result<()> {
        if self.cfg().algorithm == Algorithm::Sft {
            return Ok(());
        }
        let within = |step: u64| format!("adapters/{session}-{step:06}");
        policy.export_adapter(&self.dir.join(within(step)))?;
        let sent = servers.load(&format!("valor-{session}-{step}"), &servers.path(&within(step)));
        sent.map_err(anyhow::Error::msg).context("reasoner.servers")?;
        let turn = user_turn(&planner::prompt(self.config)?, &self.queries.training[0]);
        let prompt = policy.sampler.format.prompt(&[Message::user(turn)], &Device::Cpu)?.ids;
        for (url, trace) in
            servers.canaries(&prompt).map_err(anyhow::Error::msg).context("reasoner.servers")?
        {
            let ids = [&prompt[..], &trace.ids].concat();
            let replies = std::iter::once(prompt.len()..ids.len()).collect();
            let sample = Sample { ids, replies, pictures: None };
            let own = log_probs(policy.sampler.engine().network(), &[&sample])?.remove(0);
            Servers::check(&url, &trace.log_probs, &own).map_err(|e| {
                Broken(format!("step {step}: reasoner.servers: {e}; the last checkpoint is kept"))
            })?;
        }
        // Servers have read the one before.
        let old = self.dir.join(within(step.saturating_sub(1)));
        if step > 0 && old.exists() {
            std::fs::remove_dir_all(old)?;
        }
        Ok(())
    }

    /// Seconds that a step would take, by phase: a part of the first one, done and scaled up. It changes
    /// the policy, which is of no use afterwards.
    pub fn probe(&mut self, policy: &Policy) -> Result<BTreeMap<&'static str, f64>> {
        const QUESTIONS: usize = 8;
        let mut questions = self.queries.batch(self.cfg(), 0, 0);
        questions.truncate(QUESTIONS);
        let mut clock = Clock::default();
        let bar = ProgressBar::hidden();
        let engine = engine(policy, None, self.cfg().algorithm);
        let rollouts = self.collect(engine, &questions, 0, 0, &mut clock, &bar)?;
        let learnt: Vec<update::Scored> = rollouts.iter().filter_map(|r| self.lesson(r)).collect();
        let (mut optimiser, schedule) = (optimiser(policy, self.cfg())?, schedule(self.cfg(), self.steps()));
        clock.time("update", || update(policy, &mut optimiser, &schedule, self.cfg(), 0, &learnt))?;
        let mut whole = self.cfg().batch as f64 / questions.len() as f64;
        let update = clock.0.remove("update").map(|seconds| ("update", seconds * whole));
        // Every place may have to be filled anew as often as is allowed.
        whole *= (1 + self.cfg().resample) as f64;
        Ok(clock.0.into_iter().map(|(phase, seconds)| (phase, seconds * whole)).chain(update).collect())
    }

    fn restore(
        &self,
        policy: &Policy,
        optimiser: &mut AdamW,
        saved: &Saved,
        settings: &Value,
    ) -> Result<State> {
        let state = saved_state(&self.dir, saved, settings)?;
        policy.trained().load(&saved.path.join("trained.safetensors"))?;
        optimiser.load(&saved.path.join("optimiser.safetensors"))?;
        policy.changed();
        Ok(state)
    }

    /// Updates the policy by a step's rollouts.
    fn learn(&self, live: &mut Live, gathered: Gathered) -> Result<(Metrics, Vec<Rollout>)> {
        let Gathered { rollouts, kept, mut clock } = gathered;
        let step = live.state.step;
        let learnt: Vec<update::Scored> = rollouts[..kept].iter().filter_map(|r| self.lesson(r)).collect();
        let (optimiser, schedule) = (&mut live.optimiser, &live.schedule);
        let report =
            clock.time("update", || update(live.policy, optimiser, schedule, self.cfg(), step, &learnt))?;
        if !report.loss.is_finite() {
            let why = format!("step {}: the loss is not finite; the last checkpoint is kept", step + 1);
            return Err(Broken(why).into());
        }
        let figures = self.figures(&rollouts, learnt.len(), &report, clock);
        live.bar.set_message(format!(
            "reward {:.3} kl {:.4} entropy {:.3}",
            figures["reward"].as_f64().unwrap_or(f64::NAN),
            report.kl,
            figures["entropy"].as_f64().unwrap_or(f64::NAN)
        ));
        Ok((figures, rollouts))
    }

    /// What the update learns from a rollout, if anything.
    fn lesson(&self, r: &Rollout) -> Option<update::Scored> {
        let advantage = match self.cfg().algorithm {
            Algorithm::Grpo => r.advantage?,
            Algorithm::Sft => r.scored.reward.filter(|x| *x >= self.cfg().threshold).map(|_| 1.)?,
        };
        let trace = r.reply.as_ref().ok()?.trace.as_ref()?;
        let start = trace.prompt_ids.len();
        let ids = [&trace.prompt_ids[..], &trace.ids].concat();
        let replies = std::iter::once(start..ids.len()).collect();
        let sample = Sample { ids, replies, pictures: None };
        Some(update::Scored { sample, sampled: trace.log_probs.clone(), advantage })
    }
}

/// Who samples: GRPO learns from its own policy's rollouts, SFT from the base's.
fn engine<'p>(
    policy: &'p Policy,
    servers: Option<&'p Servers>,
    algorithm: Algorithm,
) -> &'p dyn RolloutEngine {
    match (servers, algorithm) {
        (Some(servers), _) => servers,
        (None, Algorithm::Grpo) => &policy.sampler,
        (None, Algorithm::Sft) => &policy.base_sampler,
    }
}
