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
mod update;

pub use policy::{Policy, check_trainable};
pub use queries::{HeldOut, Queries, ROOMS};

use super::checkpoint::{Checkpoints, Saved};
use super::grpo::advantages;
use super::lm::Sample;
use super::rollout::{RolloutEngine, Servers};
use super::run::{self, Metrics, MetricsLog};
use super::{Broken, differences};
use crate::config::{self, Algorithm, Config};
use crate::files::{sha256_hex, sweep, write_atomic};
use crate::llm::endpoint::Usage;
use crate::llm::{ChatReply, ChatRequest, Finish, Message};
use crate::nn::AdamW;
use crate::nn::optim::Schedule;
use crate::pipeline::question_seed;
use crate::planner::{self, user_turn};
use crate::program::Sandbox;
use crate::report::pulse::Pulse;
use crate::verify::{Scored, Verification, prompts_sha256};
use anyhow::{Context, Result, bail, ensure};
use best::Best;
use candle_core::Device;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use update::{log_probs, optimiser, schedule, update};

/// Where a run stands, beside its weights.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
struct State {
    step: u64,
    /// What must be the same for a resumed run to be the same run.
    settings: Value,
    /// What the verifier's calls have cost.
    usage: Usage,
    /// Is the step's evaluation still to come?
    #[serde(default)]
    unevaluated: bool,
}

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

/// That a run may write into a folder: a new or empty one, or a run's. One that has saved something is only
/// gone on with. Gone on with is a run alone, which may have been killed before it saved anything.
pub fn check_folder(dir: &Path, resume: bool) -> Result<()> {
    let config = std::fs::read_to_string(dir.join("config.toml"));
    let begun = config.is_ok_and(|text| Config::parse(&text, "config.toml").is_ok());
    run::check_folder(dir, || begun)?;
    ensure!(begun || !resume, "no run in {}; check --out, or leave out --resume", dir.display());
    ensure!(
        resume || !run::has_checkpoint(dir),
        "{} holds a run: give --resume to go on with it, or another --out",
        dir.display()
    );
    Ok(())
}

/// What a resumed run may not change, its planner and verifier by their names. Limits on memory and what is written
/// when are one's own.
fn settings(config: &Config, queries: &Queries, planner: &str, verifier: &str) -> Result<Value> {
    let mut of_run = json!(config.reasoner);
    for free in [
        "micro_tokens",
        "kv_cache_mb",
        "recompute",
        "offload",
        "save_every",
        "keep",
        "missing_limit",
        "servers",
    ] {
        of_run.as_object_mut().expect("a table").remove(free);
    }
    // Of instructions and questions what they say, too: files under one name can change, and of other
    // questions those that were trained on may become held-out ones.
    let prompt = planner::prompt(config)?;
    let training = queries.training.iter().map(String::as_str);
    let questions: Vec<&str> = training.chain(queries.held_out.texts()).collect();
    Ok(json!({
        "reasoner": of_run, "planner": planner,
        "prompt": config.planner.prompt, "prompt_sha256": sha256_hex(prompt.as_bytes(), 32),
        "questions_sha256": sha256_hex(questions.join("\n").as_bytes(), 32),
        "verifier": verifier, "prompts": config.verifier.prompts,
        "prompts_sha256": prompts_sha256(&config.verifier)?,
        "max_new_tokens": config.verifier.max_new_tokens,
        "reward": config.reward, "sandbox": config.sandbox,
    }))
}

/// That a run which is resumed has the settings that it began with, and the step that it has come to. Its
/// models, which need not be loaded for it, by their names.
pub fn check_resumed(
    dir: &Path,
    config: &Config,
    queries: &Queries,
    planner: &str,
    verifier: &str,
) -> Result<u64> {
    if run::has_checkpoint(dir)
        && let Some(saved) = Checkpoints::of(&dir.join("checkpoints")).newest(|_| ())?
    {
        return Ok(saved_state(dir, &saved, &settings(config, queries, planner, verifier)?)?.step);
    }
    Ok(0)
}

/// Where a run's checkpoint stands, if it was made with these settings.
fn saved_state(dir: &Path, saved: &Saved, settings: &Value) -> Result<State> {
    let named = || saved.path.display().to_string();
    let text = std::fs::read_to_string(saved.path.join("state.json")).with_context(named)?;
    let state: State = serde_json::from_str(&text).with_context(named)?;
    if state.settings != *settings {
        bail!(
            "{} was made with other settings: {}",
            dir.display(),
            differences(&state.settings, settings).join("; ")
        )
    }
    Ok(state)
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

/// A step's rollouts, of which the first `kept` are learnt from.
struct Gathered {
    rollouts: Vec<Rollout>,
    kept: usize,
    clock: Clock,
}

/// One rollout with what came of it.
struct Rollout {
    /// Of the training questions.
    question: usize,
    reply: std::result::Result<ChatReply, String>,
    scored: Scored,
    advantage: Option<f64>,
}

impl Rollout {
    fn text(&self) -> &str {
        self.reply.as_ref().map_or("", |r| &r.text)
    }
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

    /// A step's rollouts, scored.
    fn gather(&mut self, engine: &dyn RolloutEngine, step: u64, bar: &ProgressBar) -> Result<Gathered> {
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

    /// Updates the policy by them.
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

    /// That not too many rewards of a step or an evaluation are missing; `why` one of them is.
    fn check_missing(
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

    /// Samples and scores a group of replies to each question.
    fn collect(
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

/// What counts of a reply: one cut at the limit is malformed, whatever its beginning says.
fn whole(reply: &ChatReply) -> &str {
    if reply.finish == Finish::Length { "" } else { &reply.text }
}

fn why_missing(error: Option<&str>, scored: &Scored) -> Option<String> {
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

/// A checkpoint's files.
fn save(dir: &Path, policy: &Policy, optimiser: &AdamW, state: &State) -> Result<()> {
    policy::write(&dir.join("trained.safetensors"), &policy.trained().tensors())?;
    optimiser.save(&dir.join("optimiser.safetensors"))?;
    write_atomic(&dir.join("state.json"), |w| writeln!(w, "{}", serde_json::to_string_pretty(state)?))?;
    Ok(())
}

/// Seconds by phase.
#[derive(Default)]
struct Clock(BTreeMap<&'static str, f64>);

impl Clock {
    fn time<T>(&mut self, phase: &'static str, work: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let out = work();
        *self.0.entry(phase).or_default() += begun.elapsed().as_secs_f64();
        out
    }

    fn seconds(&self, phase: &str) -> f64 {
        self.0.get(phase).copied().unwrap_or(0.)
    }
}
