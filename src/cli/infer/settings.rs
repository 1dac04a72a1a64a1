//! What made a row of a batch, told in the row itself: its seed, and a short hash of each part of the
//! settings that an answer hangs on.

use crate::config::{Config, Inference};
use crate::files::sha256_hex;
use crate::pipeline::{Referee, identity};
use crate::planner::prompt;
use crate::tools::real::vqa_prompts;
use serde_json::{Map, Value, json};

/// Hashes by the names of the configuration's sections.
#[derive(Debug)]
pub(super) struct Settings(Map<String, Value>);

impl Settings {
    pub fn of(config: &Config) -> anyhow::Result<Self> {
        let c = config;
        let mut hashes = Map::new();
        let mut add = |section: &str, what: Value| {
            hashes.insert(section.into(), json!(sha256_hex(what.to_string().as_bytes(), 4)));
        };
        add("planner", json!([identity(c, &c.planner.model, "planner")?, c.planner, prompt(c)?]));
        add("detector", json!([identity(c, &c.detector.model, "detector")?, c.detector]));
        add("depth", json!([identity(c, &c.depth.model, "depth")?, c.depth]));
        add("vlm", json!([identity(c, &c.vlm.model, "vlm")?, c.vlm, vqa_prompts(&c.vlm)?]));
        if Referee::is_wanted(c) {
            // Not where its verdicts are kept.
            let v = &c.verifier;
            let asked = json!([v.prompts, v.max_new_tokens, c.reward]);
            add("verifier", json!([identity(c, &v.model, "verifier")?, asked]));
        }
        // Memory decides what is done at once, and nothing else.
        add("inference", json!(Inference { kv_cache_mb: 0, ..c.inference }));
        add("sandbox", json!(c.sandbox));
        Ok(Self(hashes))
    }

    /// What a row says.
    pub fn of_row(&self, seed: u64) -> Value {
        let mut all = self.0.clone();
        all.insert("seed".into(), seed.into());
        all.into()
    }

    /// The parts in which what a row says is not what it would say now.
    pub fn differences(&self, row: &Value, seed: u64) -> Vec<String> {
        let (now, none) = (self.of_row(seed), Map::new());
        let (was, is) = (row.as_object().unwrap_or(&none), now.as_object().expect("made above"));
        let mut keys: Vec<&String> = is.keys().chain(was.keys().filter(|k| !is.contains_key(*k))).collect();
        keys.retain(|k| was.get(*k) != is.get(*k));
        keys.into_iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(sets: &[&str]) -> Settings {
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        Settings::of(&Config::resolve(None, &sets).unwrap()).unwrap()
    }

    #[test]
    fn settings_differ_in_the_parts_that_were_changed() {
        let row = of(&[]).of_row(3);
        let against = |sets: &[&str], seed| of(sets).differences(&row, seed);
        assert_eq!(against(&[], 3), [""; 0]);
        assert_eq!(against(&[], 4), ["seed"]);
        assert_eq!(against(&["detector.box_threshold=0.3", "planner.top_k=7"], 3), ["planner", "detector"]);
        assert_eq!(against(&["detector.model=embedded-base"], 3), ["detector"]);
        // Who judges counts where there is something to judge.
        assert_eq!(against(&["verifier.max_new_tokens=9", "inference.kv_cache_mb=9"], 3), [""; 0]);
        let vote = ["inference.samples=3", "inference.tie_break=verifier"];
        assert_eq!(against(&vote, 3), ["verifier", "inference"]);
        assert!(!of(&[]).differences(&Value::Null, 3).is_empty());
    }

    #[test]
    fn what_a_server_is_asked_beside_is_a_setting_and_how_it_is_reached_is_none() {
        let server = ["endpoints.s.base_url=http://a/v1", "endpoints.s.model=m", "vlm.model=endpoint:s"];
        let row = of(&server).of_row(3);
        let against = |set: &str| of(&[&server[..], &[set]].concat()).differences(&row, 3);
        for key in [
            "extra.service_tier=flex",
            "send_temperature=false",
            "send_seed=false",
            "send_top_k=true",
            "max_tokens_key=max_completion_tokens",
            "model=n",
        ] {
            assert_eq!(against(&format!("endpoints.s.{key}")), ["vlm"], "{key}");
        }
        for key in ["tries=2", "seconds=9", "key_env=KEY", "cache=replies", "concurrency=3", "send_seed=true"]
        {
            assert_eq!(against(&format!("endpoints.s.{key}")), [""; 0], "{key}");
        }
    }
}
