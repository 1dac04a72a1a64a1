//! Which policy of a run is the best so far.

use super::Policy;
use crate::files::write_atomic;
use anyhow::{Context, Result};
use serde_json::json;
use std::io::Write;
use std::path::Path;

/// Of a run's folder.
pub const FOLDER: &str = "best";

/// The evaluation whose policy `best/` holds. It stands beside the weights, which checkpoints know nothing of: a
/// killed run goes on from before an evaluation whose policy was exported.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Best {
    pub step: u64,
    /// Of each held-out question, where it is known.
    rewards: Vec<Option<f64>>,
}

impl Best {
    const FILE: &str = "held_out.json";

    pub fn of(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(Self::FILE);
        match std::fs::read_to_string(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            text => {
                let named = || path.display().to_string();
                Ok(Some(serde_json::from_str(&text.with_context(named)?).with_context(named)?))
            }
        }
    }

    pub fn mean(&self) -> Option<f64> {
        let known: Vec<f64> = self.rewards.iter().copied().flatten().collect();
        (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
    }

    /// Is it better on the questions whose rewards are known of both? (Those that are missing are not missing by
    /// chance: a long reply's verdicts are.)
    fn beats(&self, other: &Self) -> bool {
        let both = self.rewards.iter().zip(&other.rewards).filter_map(|(a, b)| a.zip(*b));
        both.map(|(a, b)| a - b).sum::<f64>() > 0.
    }

    /// Exports a policy into a run's folder if it is better than the best one so far, the first in any case.
    pub fn keep(
        run: &Path,
        policy: &Policy,
        best: Option<Self>,
        step: u64,
        rewards: Vec<Option<f64>>,
    ) -> Result<Option<Self>> {
        let new = Self { step, rewards };
        if new.mean().is_none() || best.as_ref().is_some_and(|best| !new.beats(best)) {
            return Ok(best);
        }
        let dir = run.join(FOLDER);
        // Of a kill in between there is no record, in place of a wrong one.
        match std::fs::remove_file(dir.join(Self::FILE)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
            _ => policy.export(&dir)?,
        }
        write_atomic(&dir.join(Self::FILE), |w| writeln!(w, "{}", json!(new)))?;
        Ok(Some(new))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_compared_where_both_rewards_are_known() {
        let of = |rewards: &[Option<f64>]| Best { step: 1, rewards: rewards.to_vec() };
        let old = of(&[Some(1.), Some(0.8), Some(0.2), None]);
        // The hard one is missing: its mean is higher, and it is worse.
        let new = of(&[Some(0.9), Some(0.8), None, Some(1.)]);
        assert!(new.mean() > old.mean() && !new.beats(&old));
        assert!(of(&[Some(1.), Some(0.9), None, None]).beats(&old) && !old.beats(&old));
        assert!(!of(&[None, None, None, Some(1.)]).beats(&old), "nothing to compare");
        assert_eq!(of(&[None]).mean(), None);

        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Best::of(dir.path()).unwrap(), None);
        std::fs::write(dir.path().join(Best::FILE), json!(new).to_string()).unwrap();
        assert_eq!(Best::of(dir.path()).unwrap(), Some(new));
        std::fs::write(dir.path().join(Best::FILE), "{").unwrap();
        assert!(format!("{:#}", Best::of(dir.path()).unwrap_err()).contains("held_out.json"));
    }
}
