//! Typed configuration: built-in defaults, then a TOML file, then `--set key=value`.
//!
//! The defaults are `configs/rooms.toml`, compiled in. A key that the defaults do not have is
//! refused with the nearest one that they do.

use serde::{Deserialize, Serialize};
use std::path::Path;
use toml::{Table, Value};

/// The default configuration as shipped.
pub const ROOMS: &str = include_str!("../../configs/rooms.toml");

/// Where a network's weights come from: `"embedded"` or a path.
pub const EMBEDDED: &str = "embedded";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub planner: Planner,
    pub detector: Detector,
    pub depth: Depth,
    pub vlm: Vlm,
    pub verifier: Verifier,
    pub sandbox: Sandbox,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Planner {
    pub model: String,
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
    /// Pixels.
    pub shortest_side: usize,
    pub longest_side: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Depth {
    pub model: String,
    /// Patches that the picture is divided into.
    pub num_tokens: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vlm {
    pub model: String,
    pub max_new_tokens: usize,
    /// A crop grows by this share of the box on each side.
    pub crop_margin: f64,
}

/// Judges plans and programs; no picture is shown to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verifier {
    pub model: String,
    pub max_new_tokens: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sandbox {
    /// Seconds of the program's own time; tool calls are not counted.
    pub seconds: f64,
    pub memory_mb: usize,
    pub tool_calls: usize,
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
        let defaults: Table = ROOMS.parse().map_err(|e| invalid("built-in configuration", &e))?;
        let mut table = defaults.clone();
        if let Some(path) = file {
            let origin = path.display().to_string();
            let text = std::fs::read_to_string(path).map_err(|e| invalid(&origin, &e))?;
            let given: Table = text.parse().map_err(|e| syntax(&origin, &text, &e))?;
            merge(&mut table, given, &defaults, "", &origin)?;
        }
        for o in overrides {
            let origin = format!("--set {o}");
            let Some((key, value)) = o.split_once('=') else {
                return Err(invalid(&origin, &"expected key=value, such as planner.temperature=0"));
            };
            let given = nest(key.trim(), parse_value(value.trim()));
            merge(&mut table, given, &defaults, "", &origin)?;
        }
        let config: Self = table.try_into().map_err(|e| invalid("configuration", &e))?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let unit = |key: &str, v: f64| match (0. ..=1.).contains(&v) {
            true => Ok(()),
            false => Err(invalid(key, &format!("{v} is outside 0…1"))),
        };
        unit("planner.top_p", self.planner.top_p)?;
        unit("detector.box_threshold", self.detector.box_threshold)?;
        unit("detector.text_threshold", self.detector.text_threshold)?;
        let positive = |key: &str, v: f64| match v > 0. {
            true => Ok(()),
            false => Err(invalid(key, &format!("{v} is not positive"))),
        };
        positive("sandbox.seconds", self.sandbox.seconds)?;
        positive("planner.max_new_tokens", self.planner.max_new_tokens as f64)?;
        positive("vlm.max_new_tokens", self.vlm.max_new_tokens as f64)?;
        positive("verifier.max_new_tokens", self.verifier.max_new_tokens as f64)?;
        positive("detector.shortest_side", self.detector.shortest_side as f64)?;
        match self.planner.temperature >= 0. {
            true => Ok(()),
            false => Err(invalid("planner.temperature", &"must be 0 (greedy) or more")),
        }
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

/// A value as TOML would read it, else as a bare string.
fn parse_value(text: &str) -> Value {
    let read = format!("v = {text}").parse::<Table>().ok().and_then(|mut t| t.remove("v"));
    read.unwrap_or_else(|| Value::String(text.into()))
}

/// `a.b = v` as nested tables.
fn nest(key: &str, value: Value) -> Table {
    let (head, rest) = key.split_once('.').map_or((key, None), |(h, r)| (h, Some(r)));
    let inner = match rest {
        Some(r) => Value::Table(nest(r, value)),
        None => value,
    };
    Table::from_iter([(head.to_string(), inner)])
}

fn merge(
    into: &mut Table,
    from: Table,
    defaults: &Table,
    path: &str,
    origin: &str,
) -> Result<(), ConfigError> {
    for (k, v) in from {
        let full = if path.is_empty() { k.clone() } else { format!("{path}.{k}") };
        let Some(default) = defaults.get(&k) else {
            let key = first_leaf(full, &v);
            return Err(ConfigError::UnknownKey { origin: origin.into(), hint: nearest(&key), key });
        };
        match (default, v) {
            (Value::Table(d), Value::Table(v)) => {
                let Some(Value::Table(inner)) = into.get_mut(&k) else {
                    unreachable!("same shape as the defaults")
                };
                merge(inner, v, d, &full, origin)?;
            }
            (Value::Float(_), Value::Integer(i)) => {
                into.insert(k, Value::Float(i as f64));
            }
            (d, v) if d.same_type(&v) => {
                into.insert(k, v);
            }
            (d, v) => {
                let message = format!("`{full}` must be a {}, not a {}", d.type_str(), v.type_str());
                return Err(invalid(origin, &message));
            }
        }
    }
    Ok(())
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
    fn an_unknown_key_is_answered_with_the_nearest() {
        let e = set("planer.temprature=0").unwrap_err().to_string();
        assert!(e.contains("did you mean `planner.temperature`?"), "{e}");
        let e = set("planner.top_p=high").unwrap_err().to_string();
        assert!(e.contains("must be a float"), "{e}");
        let e = set("planner.top_p=7").unwrap_err().to_string();
        assert!(e.contains("outside 0…1"), "{e}");
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
