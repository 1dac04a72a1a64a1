//! Typed configuration: built-in defaults, then a TOML file, then `--set key=value`.
//!
//! The defaults are `configs/rooms.toml`, compiled in. A key that the defaults do not have is
//! refused with the nearest one that they do.

mod eval;
mod faults;
mod grounding;
mod reasoner;
mod sandbox;
mod suited;

pub use eval::{AnswerJudge, Eval};
pub(crate) use faults::address_fault;
pub use grounding::{DetectorTraining, Granularity, Grounding, Mining};
pub use reasoner::{Algorithm, Objective, RateDecay, Reasoner, Servers};
pub use sandbox::{Fallback, ProgramExecutor, Sandbox};

use crate::weights::gguf::is_gguf;
use faults::{located, unread};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use toml::{Table, Value};

/// The default configuration as shipped.
pub const ROOMS: &str = include_str!("../../configs/rooms.toml");

/// The other configurations as shipped, with their files' names.
pub const SHIPPED: [(&str, &str); 7] = [
    ("configs/paper.toml", include_str!("../../configs/paper.toml")),
    ("configs/laptop.toml", include_str!("../../configs/laptop.toml")),
    ("configs/api.toml", include_str!("../../configs/api.toml")),
    ("configs/rooms-reasoner.toml", include_str!("../../configs/rooms-reasoner.toml")),
    ("configs/paper-reasoner.toml", include_str!("../../configs/paper-reasoner.toml")),
    ("configs/rooms-grounding.toml", include_str!("../../configs/rooms-grounding.toml")),
    ("configs/paper-grounding.toml", include_str!("../../configs/paper-grounding.toml")),
];

/// Where values come from that are not set anywhere.
pub const BUILT_IN: &str = "built-in configuration";

/// Full keys, and where their values were set last.
pub type Origins = BTreeMap<String, String>;

/// Where a network's weights come from: `"embedded"`, a path, a preset, or the hub.
pub const EMBEDDED: &str = "embedded";

/// The embedded planner or detector before its training; of other models the same as [`EMBEDDED`].
pub const EMBEDDED_BASE: &str = "embedded-base";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub planner: Planner,
    pub detector: Detector,
    pub depth: Depth,
    pub vlm: Vlm,
    pub verifier: Verifier,
    pub reward: Reward,
    pub inference: Inference,
    pub sandbox: Sandbox,
    pub reasoner: Reasoner,
    pub grounding: Grounding,
    pub eval: Eval,
    /// Servers with chat models, by names of the user's choice; a part whose `model` is
    /// `endpoint:NAME` is asked there.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub endpoints: BTreeMap<String, Endpoint>,
}

/// A chat model on an OpenAI-compatible server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Endpoint {
    /// Up to and with the version, such as `https://api.openai.com/v1`.
    pub base_url: String,
    pub model: String,
    /// Name of the environment variable that holds the key; empty where the server wants none.
    pub key_env: String,
    /// Seconds that one try may take, its reply read to the end.
    pub seconds: f64,
    /// Tries a call, the first included.
    pub tries: usize,
    /// Seconds that a try may be put off by; a server that asks for more is not tried again.
    pub longest_wait: f64,
    /// Calls at once.
    pub concurrency: usize,
    /// 0: no limit.
    pub requests_per_minute: usize,
    /// Folder where replies are kept; empty: none are.
    pub cache: String,
    pub usd_per_million_prompt_tokens: f64,
    pub usd_per_million_new_tokens: f64,
    /// No call goes out once one run of the program has spent this; 0: no limit.
    pub budget_usd: f64,
    /// Longest reply that is read.
    pub max_reply_kb: usize,
    /// `max_tokens`, or `max_completion_tokens` for OpenAI's reasoning models.
    pub max_tokens_key: String,
    /// Does the server take `seed`?
    pub send_seed: bool,
    /// Does it take `top_k`, as vLLM and llama.cpp do?
    pub send_top_k: bool,
    /// Does it take `temperature`? OpenAI's reasoning models refuse any but their own.
    pub send_temperature: bool,
    /// Further keys of each request's body, such as `chat_template_kwargs = { enable_thinking = false }`
    /// for a Qwen3 on vLLM.
    pub extra: Table,
}

impl Default for Endpoint {
    fn default() -> Self {
        Self {
            base_url: String::new(),
            model: String::new(),
            key_env: String::new(),
            seconds: 120.,
            tries: 5,
            longest_wait: 60.,
            concurrency: 8,
            requests_per_minute: 0,
            cache: String::new(),
            usd_per_million_prompt_tokens: 0.,
            usd_per_million_new_tokens: 0.,
            budget_usd: 0.,
            max_reply_kb: 1024,
            max_tokens_key: "max_tokens".into(),
            send_seed: true,
            send_top_k: false,
            send_temperature: true,
            extra: Table::new(),
        }
    }
}

/// A program that failed three times will fail again.
const MOST_REPAIRS: usize = 2;

/// How a part's `model` names one of [`Config::endpoints`].
pub const ENDPOINT: &str = "endpoint:";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Planner {
    pub model: String,
    /// The instructions before the question: `rooms`, `general`, or a file that is used byte for byte.
    pub prompt: String,
    pub temperature: f64,
    pub top_p: f64,
    pub top_k: usize,
    pub max_new_tokens: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Detector {
    pub model: String,
    /// A box is kept if its best token's probability is above this.
    pub box_threshold: f64,
    /// A token belongs to a box's phrase if its probability is above this.
    pub text_threshold: f64,
    /// Pixels; 0: as the checkpoint says.
    pub shortest_side: usize,
    pub longest_side: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Depth {
    pub model: String,
    /// Patches that the picture is divided into; 0: as many as the checkpoint was trained with at most.
    pub num_tokens: usize,
    pub sample: DepthSample,
}

/// What the depth of a box is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DepthSample {
    /// Of its middle, as in the paper.
    Center,
    /// The median over its pixels.
    Median,
}

/// How an answer is got from a planner that can err.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inference {
    /// Replies a question; the most frequent answer counts.
    pub samples: usize,
    /// Of equally frequent answers.
    pub tie_break: TieBreak,
    /// How often a program that failed goes back to the planner with its error.
    pub repairs: usize,
    /// Megabytes of keys and values that a language model which runs here holds at most; 0: 2048, or on a GPU
    /// a third of what its weights leave free.
    pub kv_cache_mb: usize,
}

/// Which of several answers counts that equally many replies gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TieBreak {
    /// The first.
    First,
    /// The one whose reply earns most in the verifier's eyes.
    Verifier,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vlm {
    pub model: String,
    /// What stands before a program's question: `plain` is nothing, as the embedded model was trained,
    /// `general` the form that answers must have, or a file.
    pub prompt: String,
    /// Larger pictures and crops are shown smaller, to so many pixels; 0: as large as they are.
    pub max_pixels: usize,
    pub max_new_tokens: usize,
    /// A crop grows by this share of the box on each side.
    pub crop_margin: f64,
}

/// Judges plans and programs; no picture is shown to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verifier {
    pub model: String,
    /// The instructions of its heads: `rooms`, `general`, or a folder of files.
    pub prompts: String,
    pub max_new_tokens: usize,
    /// File where verdicts are kept; empty: in memory alone.
    pub cache: String,
}

/// Weights of the heads (method.md 3); a head of weight 0 is not asked.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reward {
    /// Must a reply be of the strict form to earn anything?
    pub format: bool,
    pub syntax: f64,
    pub logic: f64,
    pub attribute: f64,
    pub spatial: f64,
    pub adherence: f64,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{origin}: {message}")]
    Invalid { origin: String, message: String },
    #[error("{origin}: unknown key `{key}`{hint}")]
    UnknownKey { origin: String, key: String, hint: String },
}

impl Config {
    /// Resolves defaults, an optional file and `key=value` overrides, in this order.
    pub fn resolve(file: Option<&Path>, overrides: &[String]) -> Result<Self, ConfigError> {
        Ok(Self::explain(file, overrides)?.0)
    }

    /// The same, with where each value that is no default came from.
    pub fn explain(file: Option<&Path>, overrides: &[String]) -> Result<(Self, Origins), ConfigError> {
        let Some(path) = file else { return Self::over_defaults(None, overrides) };
        let origin = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|e| invalid(&origin, &e))?;
        Self::over_defaults(Some((&text, &origin)), overrides)
    }

    /// Defaults, and the text of a file over them.
    pub fn parse(text: &str, origin: &str) -> Result<Self, ConfigError> {
        Ok(Self::over_defaults(Some((text, origin)), &[])?.0)
    }

    fn over_defaults(
        file: Option<(&str, &str)>,
        overrides: &[String],
    ) -> Result<(Self, Origins), ConfigError> {
        let defaults: Table = ROOMS.parse().map_err(|e| invalid(BUILT_IN, &e))?;
        let (mut table, mut origins) = (defaults.clone(), Origins::new());
        if let Some((text, origin)) = file {
            let given: Table = text.parse().map_err(|e| syntax(origin, text, &e))?;
            merge(&mut table, given, &defaults, "", origin, &mut origins)?;
        }
        for o in overrides {
            let origin = format!("--set {o}");
            let Some((key, value)) = o.split_once('=') else {
                return Err(invalid(&origin, &"expected key=value, such as planner.temperature=0"));
            };
            let given = nest(key.trim(), parse_value(value.trim()));
            merge(&mut table, given, &defaults, "", &origin, &mut origins)?;
        }
        suited::suit(&mut table, &mut origins);
        let config: Self = table.try_into().map_err(|e| unread(&origins, &e))?;
        config.check().map_err(|e| located(e, &origins))?;
        Ok((config, origins))
    }

    fn check(&self) -> Result<(), ConfigError> {
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

/// The longest that anything is waited for, in seconds.
const DAY: f64 = 86_400.;

/// Of memory: far beyond any machine's, yet no overflow in bytes.
const MOST_MB: f64 = (1u64 << 40) as f64;

/// Of a side of a picture as a network sees it, and of its tokens: far beyond any, yet no overflow.
const MOST_PIXELS: f64 = 32_768.;

fn invalid(origin: &str, message: &dyn std::fmt::Display) -> ConfigError {
    ConfigError::Invalid { origin: origin.into(), message: message.to_string() }
}

/// One line, where the error's own text draws the place over several.
fn syntax(origin: &str, text: &str, error: &toml::de::Error) -> ConfigError {
    let message = error.message().replace('\n', ", ");
    match error.span().and_then(|span| text.get(..span.start)) {
        Some(before) => {
            let line = 1 + before.matches('\n').count();
            invalid(&format!("{origin}, line {line}"), &message)
        }
        None => invalid(origin, &message),
    }
}

/// A value as TOML would read it, else as a bare string.
fn parse_value(text: &str) -> Value {
    let read = format!("v = {text}").parse::<Table>().ok().and_then(|mut t| t.remove("v"));
    read.unwrap_or_else(|| Value::String(text.into()))
}

/// `a.b = v` as nested tables. An endpoint's name may have dots in it, in quotes or not: it ends before the
/// first key that endpoints have.
fn nest(key: &str, value: Value) -> Table {
    let one = |key: &str, value: Value| Table::from_iter([(key.to_owned(), value)]);
    if let Some(rest) = key.strip_prefix("endpoints.") {
        let quoted = rest.strip_prefix('"').and_then(|r| r.split_once('"'));
        let (name, field) = match quoted {
            Some((name, field)) => (name, field.strip_prefix('.')),
            None => {
                let keys = endpoint_keys();
                let dots: Vec<usize> = rest.match_indices('.').map(|(at, _)| at).collect();
                let is_key =
                    |at: &&usize| rest[**at + 1..].split('.').next().is_some_and(|k| keys.contains_key(k));
                match dots.iter().find(is_key).or(dots.last()) {
                    Some(&at) => (&rest[..at], Some(&rest[at + 1..])),
                    None => (rest, None),
                }
            }
        };
        let inner = match field {
            Some(field) => Value::Table(nest(field, value)),
            None => value,
        };
        return one("endpoints", Value::Table(one(name, inner)));
    }
    let (head, rest) = key.split_once('.').map_or((key, None), |(h, r)| (h, Some(r)));
    let inner = match rest {
        Some(r) => Value::Table(nest(r, value)),
        None => value,
    };
    one(head, inner)
}

fn merge(
    into: &mut Table,
    from: Table,
    defaults: &Table,
    path: &str,
    origin: &str,
    origins: &mut Origins,
) -> Result<(), ConfigError> {
    for (k, v) in from {
        let full = if path.is_empty() { k.clone() } else { format!("{path}.{k}") };
        // Endpoints have names of the user's choice, each the same keys.
        if full == "endpoints" {
            let Value::Table(named) = v else {
                return Err(invalid(
                    origin,
                    &"`endpoints` must be a table of tables, such as [endpoints.gpt]",
                ));
            };
            let all = into.entry(k).or_insert_with(|| Value::Table(Table::new()));
            let all = all.as_table_mut().expect("made here");
            let defaults = endpoint_keys();
            for (name, keys) in named {
                let full = format!("{full}.{name}");
                let Value::Table(keys) = keys else {
                    return Err(invalid(origin, &format!("`{full}` must be a table")));
                };
                let one = all.entry(name).or_insert_with(|| Value::Table(defaults.clone()));
                merge(one.as_table_mut().expect("made here"), keys, &defaults, &full, origin, origins)?;
            }
            continue;
        }
        // What a server takes beside is not for us to know.
        if k == "extra" && path.starts_with("endpoints.") && v.is_table() {
            origins.insert(full, origin.into());
            let all = into.entry(k).or_insert_with(|| Value::Table(Table::new()));
            all.as_table_mut().expect("a table by default").extend(v.as_table().cloned().unwrap_or_default());
            continue;
        }
        let Some(default) = defaults.get(&k) else {
            let key = first_leaf(full, &v);
            return Err(ConfigError::UnknownKey { origin: origin.into(), hint: nearest(&key), key });
        };
        match (default, v) {
            (Value::Table(d), Value::Table(v)) => {
                let Some(Value::Table(inner)) = into.get_mut(&k) else {
                    unreachable!("same shape as the defaults")
                };
                merge(inner, v, d, &full, origin, origins)?;
            }
            (Value::Float(_), Value::Integer(i)) => {
                into.insert(k, Value::Float(i as f64));
                origins.insert(full, origin.into());
            }
            (d, v) if d.same_type(&v) => {
                into.insert(k, v);
                origins.insert(full, origin.into());
            }
            (d, v) => {
                let message = format!("`{full}` must be a {}, not a {}", d.type_str(), v.type_str());
                return Err(invalid(origin, &message));
            }
        }
    }
    Ok(())
}

/// An endpoint's keys, with their defaults.
fn endpoint_keys() -> Table {
    Table::try_from(Endpoint::default()).expect("all of its values have a form in TOML")
}

/// The first full key inside a table, so that `[planer] temprature` is compared as a whole.
fn first_leaf(path: String, value: &Value) -> String {
    match value.as_table().and_then(|t| t.iter().next()) {
        Some((k, v)) => first_leaf(format!("{path}.{k}"), v),
        None => path,
    }
}

/// Says which valid key is nearest to a wrong one.
fn nearest(key: &str) -> String {
    fn keys(t: &Table, path: &str, out: &mut Vec<String>) {
        for (k, v) in t {
            let full = if path.is_empty() { k.clone() } else { format!("{path}.{k}") };
            match v {
                Value::Table(t) => keys(t, &full, out),
                _ => out.push(full),
            }
        }
    }
    let mut all = Vec::new();
    if let Ok(defaults) = ROOMS.parse::<Table>() {
        keys(&defaults, "", &mut all);
    }
    if let Some((name, _)) = key.strip_prefix("endpoints.").and_then(|k| k.rsplit_once('.')) {
        keys(&endpoint_keys(), &format!("endpoints.{name}"), &mut all);
    }
    let best = all.into_iter().min_by_key(|k| strsim::damerau_levenshtein(k, key));
    best.map_or(String::new(), |b| format!("; did you mean `{b}`?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(s: &str) -> Result<Config, ConfigError> {
        Config::resolve(None, &[s.to_string()])
    }

    #[test]
    fn overrides_reach_their_fields() {
        assert_eq!(set("planner.temperature=0").unwrap().planner.temperature, 0.);
        assert_eq!(set("depth.model=/tmp/x").unwrap().depth.model, "/tmp/x");
    }

    #[test]
    fn the_shipped_configurations_are_read_and_name_models_that_there_are() {
        use crate::weights::source::Source;
        for (name, text) in SHIPPED {
            let c = Config::parse(text, name).unwrap();
            for model in
                [&c.planner.model, &c.detector.model, &c.depth.model, &c.vlm.model, &c.verifier.model]
            {
                let known = matches!(
                    Source::parse(model),
                    Ok(Source::Preset(_) | Source::Embedded { .. } | Source::Hub(_))
                );
                assert!(known || model.starts_with(ENDPOINT), "{name}: {model}");
            }
        }
    }

    #[test]
    fn each_value_knows_where_it_came_from() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.toml");
        std::fs::write(&path, "[planner]\ntop_k = 5\ntop_p = 1\n[endpoints.x]\nmodel = \"m\"\n").unwrap();
        let (config, origins) = Config::explain(Some(&path), &["planner.top_k=6".into()]).unwrap();
        assert_eq!((config.planner.top_k, config.planner.top_p), (6, 1.));
        let file = path.display().to_string();
        let want = [
            ("endpoints.x.model", file.as_str()),
            ("planner.top_k", "--set planner.top_k=6"),
            ("planner.top_p", &file),
        ];
        assert_eq!(origins, want.map(|(k, o)| (k.to_string(), o.to_string())).into());
    }

    #[test]
    fn an_unknown_key_is_answered_with_the_nearest() {
        let e = set("planer.temprature=0").unwrap_err().to_string();
        assert!(e.contains("did you mean `planner.temperature`?"), "{e}");
        let e = set("planner.top_p=high").unwrap_err().to_string();
        assert!(e.contains("must be a float"), "{e}");
        let e = set("planner.top_p=7").unwrap_err().to_string();
        assert!(e.contains("outside 0…1"), "{e}");
    }

    #[test]
    fn an_endpoints_name_may_have_dots() {
        for set in ["endpoints.gpt-4.1.model=m", "endpoints.\"gpt-4.1\".model=m"] {
            let more = ["endpoints.gpt-4.1.base_url=http://a/v1", "vlm.model=endpoint:gpt-4.1"];
            let sets: Vec<String> = [set, more[0], more[1]].map(str::to_owned).into();
            let (config, origins) = Config::explain(None, &sets).unwrap();
            assert_eq!(config.endpoints["gpt-4.1"].model, "m");
            assert_eq!(origins["endpoints.gpt-4.1.model"], format!("--set {set}"));
        }
        let e = set("endpoints.gpt-4.1.modle=m").unwrap_err().to_string();
        assert!(e.contains("did you mean `endpoints.gpt-4.1.model`?"), "{e}");
    }

    #[test]
    fn endpoints_have_names_of_the_users_choice_and_known_keys() {
        let all =
            |sets: &[&str]| Config::resolve(None, &sets.iter().map(|s| s.to_string()).collect::<Vec<_>>());
        let url = "endpoints.gpt.base_url=https://api.openai.com/v1";
        let named = "endpoints.gpt.model=m";
        let c = all(&[url, named, "endpoints.gpt.tries=2", "planner.model=endpoint:gpt"]).unwrap();
        assert_eq!(c.endpoints["gpt"].tries, 2);
        assert_eq!(c.endpoints["gpt"].seconds, Endpoint::default().seconds);
        let thinking = "endpoints.gpt.extra.chat_template_kwargs.enable_thinking=false";
        let c = all(&[url, thinking, "endpoints.gpt.extra.service_tier=flex"]).unwrap();
        let want = "service_tier = 'flex'\nchat_template_kwargs = { enable_thinking = false }";
        assert_eq!(c.endpoints["gpt"].extra, want.parse::<Table>().unwrap());
        for (sets, want) in [
            (&["endpoints.gpt.base_ulr=x"][..], "did you mean `endpoints.gpt.base_url`?"),
            (&["endpoints.gpt.tries=0"], "endpoints.gpt.tries: 0 is not positive"),
            (&["endpoints.gpt.tries=many"], "must be a integer"),
            (&["endpoints=3"], "table of tables"),
            (&["planner.model=endpoint:gpt"], "there are none"),
            (&[url, "vlm.model=endpoint:gtp"], "no endpoint gtp, only gpt"),
            (&[url, "depth.model=endpoint:gpt"], "chat models only"),
            (&["vlm.model=hub:a/b#c.gguf"], "vlm.model: a GGUF file is read for the planner"),
            (&[url, "endpoints.gpt.budget_usd=3"], "needs prices"),
            (&[url, "endpoints.gpt.extra.seed=3"], "endpoints.gpt.extra.seed: is sent by valor"),
            (&[url, "endpoints.gpt.extra=3"], "must be a table"),
        ] {
            let e = all(sets).unwrap_err().to_string();
            assert!(e.contains(want), "{e}");
        }
    }

    #[test]
    fn a_file_that_is_no_toml_is_one_line_with_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.toml");
        std::fs::write(&path, "[planner]\ntop_k = 5\ntop_p = = 1\n").unwrap();
        let e = Config::resolve(Some(&path), &[]).unwrap_err().to_string();
        assert!(e.contains("a.toml, line 3: ") && !e.contains('\n'), "{e}");
    }
}
