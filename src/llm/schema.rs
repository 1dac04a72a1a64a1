//! Replies that must be JSON of a certain form.

use serde_json::Value;

/// A JSON schema, checked when it is made.
#[derive(Clone, Debug)]
pub struct Schema {
    pub name: &'static str,
    pub json: Value,
    validator: jsonschema::Validator,
}

impl Schema {
    /// `name` of letters, digits, `_` and `-`, as servers want it. The schema refers to nothing
    /// outside itself.
    pub fn new(name: &'static str, json: Value) -> Result<Self, String> {
        let validator = jsonschema::validator_for(&json).map_err(|e| format!("schema {name}: {e}"))?;
        Ok(Self { name, json, validator })
    }

    /// The JSON in a reply, without a Markdown fence around it, if it fits. Else what is wrong with it.
    pub fn fitted<'a>(&self, reply: &'a str) -> Result<&'a str, String> {
        let text = unfenced(reply);
        let value: Value =
            serde_json::from_str(text).map_err(|e| format!("the reply is no JSON for {}: {e}", self.name))?;
        match self.validator.validate(&value) {
            Ok(()) => Ok(text),
            Err(e) => {
                let place = e.instance_path().to_string();
                let what: String = e.to_string().chars().take(200).collect();
                Err(format!(
                    "the reply does not fit {}: {place}{}{what}",
                    self.name,
                    if place.is_empty() { "" } else { ": " }
                ))
            }
        }
    }
}

/// Models put JSON into a Markdown fence now and then.
fn unfenced(reply: &str) -> &str {
    let text = reply.trim();
    let inner = text.strip_prefix("```json").or_else(|| text.strip_prefix("```"));
    inner.and_then(|t| t.strip_suffix("```")).map_or(text, str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_does_not_fit_is_said() {
        let schema = Schema::new(
            "verdict",
            json!({ "type": "object", "required": ["ok"], "additionalProperties": false,
                    "properties": { "ok": { "type": "boolean" } } }),
        )
        .unwrap();
        for text in
            ["{\"ok\": true}", " {\"ok\": true}\n", "```json\n{\"ok\": true}\n```\n", "```{\"ok\": true}```"]
        {
            assert_eq!(schema.fitted(text).unwrap(), "{\"ok\": true}");
        }
        for (text, want) in [
            ("Here it is:\n```json\n{\"ok\": true}\n```", "no JSON for verdict"),
            (r#"{"ok": "yes"}"#, "/ok: "),
            (r#"{"ok": true, "why": 1}"#, "does not fit verdict"),
            ("{}", "does not fit verdict"),
        ] {
            let e = schema.fitted(text).unwrap_err();
            assert!(e.contains(want), "{e}");
        }
        assert!(Schema::new("verdict", json!({ "type": "no such type" })).is_err());
    }
}
