//! Calls, tokens and money.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::config;

/// What the calls of one endpoint came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Usage {
    /// Calls that were answered with tokens, usable or not.
    pub calls: u64,
    /// Replies that came from the cache instead.
    pub cached: u64,
    /// Tries without a usable reply; a billed one among them is in `calls` too.
    pub failed: u64,
    pub prompt_tokens: u64,
    pub new_tokens: u64,
    /// By the prices in the configuration.
    pub usd: f64,
}

impl std::ops::Add for Usage {
    type Output = Self;

    fn add(self, o: Self) -> Self {
        Self {
            calls: self.calls + o.calls,
            cached: self.cached + o.cached,
            failed: self.failed + o.failed,
            prompt_tokens: self.prompt_tokens + o.prompt_tokens,
            new_tokens: self.new_tokens + o.new_tokens,
            usd: self.usd + o.usd,
        }
    }
}

pub(super) struct Ledger {
    usd_per_prompt_token: f64,
    usd_per_new_token: f64,
    /// None: no limit.
    budget: Option<f64>,
    usage: Mutex<Usage>,
}

impl Ledger {
    pub fn new(cfg: &config::Endpoint) -> Self {
        Self {
            usd_per_prompt_token: cfg.usd_per_million_prompt_tokens / 1e6,
            usd_per_new_token: cfg.usd_per_million_new_tokens / 1e6,
            budget: (cfg.budget_usd > 0.).then_some(cfg.budget_usd),
            usage: Mutex::default(),
        }
    }

    fn with(&self, change: impl FnOnce(&mut Usage)) {
        change(&mut self.usage.lock().expect("no holder panics"));
    }

    /// May another call go out? Else why not. Calls in flight are not known yet, so they can pass
    /// the budget by what they cost together.
    pub fn open(&self) -> Result<(), String> {
        let spent = self.usage().usd;
        match self.budget {
            Some(budget) if spent >= budget => {
                Err(format!("the budget of {budget} USD (budget_usd) is spent: {spent:.4} USD"))
            }
            _ => Ok(()),
        }
    }

    pub fn answered(&self, (prompt, new): (usize, usize)) {
        self.with(|u| {
            u.calls += 1;
            u.prompt_tokens += prompt as u64;
            u.new_tokens += new as u64;
            u.usd += prompt as f64 * self.usd_per_prompt_token + new as f64 * self.usd_per_new_token;
        });
    }

    pub fn kept(&self) {
        self.with(|u| u.cached += 1);
    }

    pub fn failed(&self) {
        self.with(|u| u.failed += 1);
    }

    pub fn usage(&self) -> Usage {
        *self.usage.lock().expect("no holder panics")
    }
}
