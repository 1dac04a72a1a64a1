//! What cannot be meant, told by its key.

use super::{Config, ConfigError, ENDPOINT, address_fault, invalid};
use crate::weights::gguf::is_gguf;
use crate::weights::source::EMBEDDED_BASE;

/// A program that failed three times will fail again.
const MOST_REPAIRS: usize = 2;

/// The longest that anything is waited for, in seconds.
pub(super) const DAY: f64 = 86_400.;

/// Of memory: far beyond any machine's, yet no overflow in bytes.
const MOST_MB: f64 = (1u64 << 40) as f64;

/// Of a side of a picture as a network sees it, and of its tokens: far beyond any, yet no overflow.
const MOST_PIXELS: f64 = 32_768.;

impl Config {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let unit = |key: &str, v: f64| match (0. ..=1.).contains(&v) {
            true => Ok(()),
            false => Err(invalid(key, &format!("{v} is outside 0…1"))),
        };
        unit("planner.top_p", self.planner.top_p)?;
        unit("detector.box_threshold", self.detector.box_threshold)?;
        unit("detector.text_threshold", self.detector.text_threshold)?;
        let positive = |key: &str, v: f64| match v > 0. && v.is_finite() {
            true => Ok(()),
            false => Err(invalid(key, &format!("{v} is not positive"))),
        };
        let within = |key: &str, v: f64, least: f64, most: f64| match (least..=most).contains(&v) {
            true => Ok(()),
            false => Err(invalid(key, &format!("{v} is outside {least}…{most}"))),
        };
        positive("sandbox.seconds", self.sandbox.seconds)?;
        within("sandbox.seconds", self.sandbox.seconds, 0., DAY)?;
        within("sandbox.memory_mb", self.sandbox.memory_mb as f64, 1., (1 << 20) as f64)?;
        if self.sandbox.python.is_empty() {
            return Err(invalid("sandbox.python", &"is empty; name a Python, such as python3"));
        }
        let r = &self.reward;
        for (head, weight) in [
            ("syntax", r.syntax),
            ("logic", r.logic),
            ("attribute", r.attribute),
            ("spatial", r.spatial),
            ("adherence", r.adherence),
        ] {
            unit(&format!("reward.{head}"), weight)?;
        }
        if let Some((key, why)) = self.reasoner.fault() {
            return Err(invalid(&format!("reasoner.{key}"), &why));
        }
        if let Some((key, why)) = self.grounding.fault() {
            return Err(invalid(&format!("grounding.{key}"), &why));
        }
        within("inference.samples", self.inference.samples as f64, 1., 1000.)?;
        if self.inference.repairs > MOST_REPAIRS {
            return Err(invalid("inference.repairs", &format!("at most {MOST_REPAIRS}")));
        }
        positive("planner.max_new_tokens", self.planner.max_new_tokens as f64)?;
        positive("vlm.max_new_tokens", self.vlm.max_new_tokens as f64)?;
        positive("verifier.max_new_tokens", self.verifier.max_new_tokens as f64)?;
        within("detector.shortest_side", self.detector.shortest_side as f64, 0., MOST_PIXELS)?;
        within("detector.longest_side", self.detector.longest_side as f64, 0., MOST_PIXELS)?;
        within("depth.num_tokens", self.depth.num_tokens as f64, 0., MOST_PIXELS)?;
        within("inference.kv_cache_mb", self.inference.kv_cache_mb as f64, 0., MOST_MB)?;
        within("reasoner.kv_cache_mb", self.reasoner.kv_cache_mb as f64, 0., MOST_MB)?;
        within("vlm.crop_margin", self.vlm.crop_margin, 0., 10.)?;
        for url in &self.reasoner.servers.urls {
            if let Some(why) = address_fault(url, "these servers are asked without one") {
                return Err(invalid("reasoner.servers.urls", &why));
            }
        }
        for (name, e) in &self.endpoints {
            let at = |field: &str| format!("endpoints.{name}.{field}");
            // One that no part names may be half written.
            if !e.base_url.is_empty()
                && let Some(why) = address_fault(&e.base_url, "name a variable in key_env")
            {
                return Err(invalid(&at("base_url"), &why));
            }
            positive(&at("seconds"), e.seconds)?;
            within(&at("seconds"), e.seconds, 0., DAY)?;
            within(&at("longest_wait"), e.longest_wait, 0., DAY)?;
            within(&at("requests_per_minute"), e.requests_per_minute as f64, 0., 1e6)?;
            positive(&at("tries"), e.tries as f64)?;
            positive(&at("concurrency"), e.concurrency as f64)?;
            positive(&at("max_reply_kb"), e.max_reply_kb as f64)?;
            for (field, v) in [
                ("usd_per_million_prompt_tokens", e.usd_per_million_prompt_tokens),
                ("usd_per_million_new_tokens", e.usd_per_million_new_tokens),
                ("budget_usd", e.budget_usd),
            ] {
                if !(v >= 0. && v.is_finite()) {
                    return Err(invalid(&at(field), &format!("{v} is negative or no number")));
                }
            }
            if !["max_tokens", "max_completion_tokens"].contains(&e.max_tokens_key.as_str()) {
                return Err(invalid(&at("max_tokens_key"), &"must be max_tokens or max_completion_tokens"));
            }
            const OWN: [&str; 10] = [
                "model",
                "messages",
                "temperature",
                "top_p",
                "top_k",
                "seed",
                "stop",
                "response_format",
                "max_tokens",
                "max_completion_tokens",
            ];
            if let Some(own) = OWN.iter().find(|key| e.extra.contains_key(**key)) {
                return Err(invalid(
                    &at(&format!("extra.{own}")),
                    &"is sent by valor; set it where it is set",
                ));
            }
            if e.budget_usd > 0. && e.usd_per_million_prompt_tokens + e.usd_per_million_new_tokens == 0. {
                return Err(invalid(
                    &at("budget_usd"),
                    &"needs prices: without usd_per_million_prompt_tokens and usd_per_million_new_tokens nothing is ever spent",
                ));
            }
        }
        positive("eval.judge.max_new_tokens", self.eval.judge.max_new_tokens as f64)?;
        for (part, model) in [
            ("planner", &self.planner.model),
            ("detector", &self.detector.model),
            ("depth", &self.depth.model),
            ("vlm", &self.vlm.model),
            ("verifier", &self.verifier.model),
        ] {
            if model.trim().is_empty() {
                let message = "is empty; name embedded, a folder, a preset or hub:OWNER/NAME";
                return Err(invalid(&format!("{part}.model"), &message));
            }
        }
        for (part, model) in [
            ("planner", &self.planner.model),
            ("vlm", &self.vlm.model),
            ("verifier", &self.verifier.model),
            ("grounding.mining", &self.grounding.mining.model),
            ("eval.judge", &self.eval.judge.model),
        ] {
            let Some(name) = model.strip_prefix(ENDPOINT) else { continue };
            if let Some(e) = self.endpoints.get(name) {
                for (field, value) in [("base_url", &e.base_url), ("model", &e.model)] {
                    if value.is_empty() {
                        let message = format!("is empty, and {part}.model names this endpoint; set it");
                        return Err(invalid(&format!("endpoints.{name}.{field}"), &message));
                    }
                }
            } else {
                let known: Vec<&str> = self.endpoints.keys().map(String::as_str).collect();
                let message = match known[..] {
                    [] => format!("names an endpoint, and there are none; add [endpoints.{name}]"),
                    _ => format!("there is no endpoint {name}, only {}", known.join(", ")),
                };
                return Err(invalid(&format!("{part}.model"), &message));
            }
        }
        for (part, model) in [
            ("depth", &self.depth.model),
            ("vlm", &self.vlm.model),
            ("verifier", &self.verifier.model),
            ("grounding.mining", &self.grounding.mining.model),
        ] {
            if model == EMBEDDED_BASE {
                let message = "only the planner and the detector have an embedded-base; name embedded";
                return Err(invalid(&format!("{part}.model"), &message));
            }
        }
        for (part, model) in [("detector", &self.detector.model), ("depth", &self.depth.model)] {
            if model.starts_with(ENDPOINT) {
                return Err(invalid(&format!("{part}.model"), &"an endpoint serves chat models only"));
            }
        }
        for (part, model) in [
            ("detector", &self.detector.model),
            ("depth", &self.depth.model),
            ("vlm", &self.vlm.model),
            ("grounding.mining", &self.grounding.mining.model),
        ] {
            if is_gguf(model) {
                let message = "a GGUF file is read for the planner, the verifier and the judge only, who see no pictures";
                return Err(invalid(&format!("{part}.model"), &message));
            }
        }
        match self.planner.temperature >= 0. && self.planner.temperature.is_finite() {
            true => Ok(()),
            false => Err(invalid("planner.temperature", &"must be 0 (greedy) or more")),
        }
    }
}
