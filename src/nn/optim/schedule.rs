//! The learning rate over a run.

use serde::{Deserialize, Serialize};

/// Learning rate over the steps of a run: linear warm-up, then constant or cosine.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    pub base: f64,
    /// Steps of warm-up.
    #[serde(default)]
    pub warmup: u64,
    /// Rate at the first step of the warm-up.
    #[serde(default)]
    pub warmup_from: f64,
    #[serde(default)]
    pub decay: Decay,
}

/// What follows the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Decay {
    #[default]
    Constant,
    /// Half a cosine from the base rate down to `to` at step `total`.
    Cosine { total: u64, to: f64 },
}

impl Schedule {
    pub fn constant(base: f64) -> Self {
        Self { base, warmup: 0, warmup_from: 0., decay: Decay::Constant }
    }

    /// Rate of step `step`, counted from 0.
    pub fn lr(&self, step: u64) -> f64 {
        if step < self.warmup {
            let done = step as f64 / self.warmup as f64;
            return self.warmup_from + (self.base - self.warmup_from) * done;
        }
        match self.decay {
            Decay::Constant => self.base,
            Decay::Cosine { total, to } => {
                let span = total.saturating_sub(self.warmup).max(1) as f64;
                let done = ((step - self.warmup) as f64 / span).min(1.);
                to + (self.base - to) * 0.5 * (1. + (std::f64::consts::PI * done).cos())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules() {
        let s =
            Schedule { base: 1., warmup: 10, warmup_from: 0.1, decay: Decay::Cosine { total: 110, to: 0.2 } };
        assert_eq!(s.lr(0), 0.1);
        assert!((s.lr(5) - 0.55).abs() < 1e-12);
        assert_eq!(s.lr(10), 1.);
        assert!((s.lr(60) - 0.6).abs() < 1e-12);
        assert!((s.lr(110) - 0.2).abs() < 1e-12 && s.lr(1000) == s.lr(110));
        assert_eq!(Schedule::constant(3e-4).lr(999), 3e-4);
    }
}
