//! Tables laid over one another, each key with where it came from.

use super::{ConfigError, Endpoint, Origins, ROOMS, invalid};
use toml::{Table, Value};

/// A value as TOML would read it, else as a bare string.
pub(super) fn parse_value(text: &str) -> Value {
    let read = format!("v = {text}").parse::<Table>().ok().and_then(|mut t| t.remove("v"));
    read.unwrap_or_else(|| Value::String(text.into()))
}

/// `a.b = v` as nested tables. An endpoint's name may have dots in it, in quotes or not: it ends before the
/// first key that endpoints have.
pub(super) fn nest(key: &str, value: Value) -> Table {
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

pub(super) fn merge(
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
            let mut keys = Vec::new();
            leaves(&full, &v, &mut |key| keys.push(key));
            if let Some(key) = keys.iter().find(|key| is_secret(key)) {
                return Err(secret(origin, key.clone()));
            }
            origins.extend(keys.into_iter().map(|key| (key, origin.into())));
            let all = into.entry(k).or_insert_with(|| Value::Table(Table::new()));
            overlay(all, v);
            continue;
        }
        let Some(default) = defaults.get(&k) else {
            let key = first_leaf(full, &v);
            if is_secret(&key) {
                return Err(secret(origin, key));
            }
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

/// `from` over `into`, table by table.
fn overlay(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Table(into), Value::Table(from)) => {
            for (k, v) in from {
                overlay(into.entry(k).or_insert_with(|| Value::Table(Table::new())), v);
            }
        }
        (into, from) => *into = from,
    }
}

/// Hears the full key of each value.
fn leaves(path: &str, value: &Value, hear: &mut impl FnMut(String)) {
    match value {
        Value::Table(t) => t.iter().for_each(|(k, v)| leaves(&format!("{path}.{k}"), v, hear)),
        _ => hear(path.to_owned()),
    }
}

/// The first full key inside a table, so that `[planer] temprature` is compared as a whole.
fn first_leaf(path: String, value: &Value) -> String {
    match value.as_table().and_then(|t| t.iter().next()) {
        Some((k, v)) => first_leaf(format!("{path}.{k}"), v),
        None => path,
    }
}

/// The error of a key under which a secret was put; its value is not repeated.
fn secret(origin: &str, key: String) -> ConfigError {
    let origin = match origin.split_once('=') {
        Some((key, _)) if origin.starts_with("--set ") => key.into(),
        _ => origin.into(),
    };
    let hint = "; keys of servers are read from the environment: set endpoints.NAME.key_env to the name of the variable \
                that holds it"
        .into();
    ConfigError::UnknownKey { origin, hint, key }
}

/// Is a key with this full name, by its last part, what someone would put a secret under?
fn is_secret(key: &str) -> bool {
    let last = key.rsplit('.').next().unwrap_or(key).to_lowercase().replace(['-', '_'], "");
    const WHOLE: [&str; 3] = ["key", "token", "bearer"];
    const ENDS: [&str; 9] = [
        "apikey",
        "secretkey",
        "apitoken",
        "accesstoken",
        "authtoken",
        "hftoken",
        "password",
        "secret",
        "authorization",
    ];
    WHOLE.contains(&last.as_str()) || ENDS.iter().any(|end| last.ends_with(end))
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
