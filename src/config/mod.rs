//! Typed configuration: built-in defaults, then a TOML file, then `--set key=value`.
//!
//! The defaults are `configs/rooms.toml`, compiled in. A key that the defaults do not have is
//! refused with the nearest one that they do.

mod check;
mod eval;
mod faults;
mod grounding;
mod merge;
mod reasoner;
mod sandbox;
mod suited;

pub use eval::{AnswerJudge, Eval};
pub(crate) use faults::address_fault;
pub use grounding::{DetectorTraining, Granularity, Grounding, Mining};
pub use reasoner::{Algorithm, Objective, RateDecay, Reasoner, Servers};
pub use sandbox::{Fallback, ProgramExecutor, Sandbox};

use faults::{located, unread};
use merge::{merge, nest, parse_value};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use toml::Table;

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
    /// Is the mirrored picture looked at, too? Depth is the mean of both then, at twice the time.
    pub mirror: bool,
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
    /// a third of what is free when the first prompt comes.
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

/// Of the heads in [`Reward`] those that a language model decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Head {
    Logic,
    Attribute,
    Spatial,
    Adherence,
}

impl Head {
    pub const ALL: [Self; 4] = [Self::Logic, Self::Attribute, Self::Spatial, Self::Adherence];

    pub fn word(self) -> &'static str {
        match self {
            Self::Logic => "logic",
            Self::Attribute => "attribute",
            Self::Spatial => "spatial",
            Self::Adherence => "adherence",
        }
    }
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
}

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
    fn who_sets_a_servers_key_is_told_of_the_environment_and_the_key_is_not_repeated() {
        for key in [
            "endpoints.gpt.api_key",
            "endpoints.gpt-4.1.token",
            "planner.api-key",
            "API_KEY",
            "endpoints.a.openai_api_key",
            "endpoints.gpt.extra.authorization",
        ] {
            let e = set(&format!("{key}=sk-a=b")).unwrap_err().to_string();
            assert!(e.starts_with(&format!("--set {key}: unknown key `{key}`; keys of servers")), "{e}");
            assert!(e.contains("endpoints.NAME.key_env") && !e.contains("sk-"), "{e}");
        }
        let e = Config::parse("[endpoints.gpt]\napi_key = \"sk-a\"\n", "a.toml").unwrap_err().to_string();
        assert!(e.starts_with("a.toml: unknown key `endpoints.gpt.api_key`") && !e.contains("sk-"), "{e}");
    }

    #[test]
    fn only_planner_and_detector_have_a_base() {
        for part in ["depth", "vlm", "verifier", "grounding.mining"] {
            let e = set(&format!("{part}.model=embedded-base")).unwrap_err().to_string();
            assert!(e.starts_with(&format!("{part}.model: ")) && e.contains("name embedded"), "{e}");
        }
        for part in ["planner", "detector"] {
            set(&format!("{part}.model=embedded-base")).unwrap();
        }
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
