//! A checkpoint's own chat template (Jinja), rendered as HF's `apply_chat_template` does.
//!
//! Blocks are trimmed, `tojson` writes plain JSON, `raise_exception` works and Python's string and dict
//! methods are there; marks of replies for trainers print nothing. There is no clock: `strftime_now` is not
//! defined, so a template that guards its use falls back to its own date and any other fails with an error. No
//! tools are passed.

use minijinja::{Environment, ErrorKind, Value, context};
use serde_json::json;
use std::collections::BTreeMap;

use super::{ChatError, Message, Role};
use crate::weights::ModelFiles;

/// ChatML with pictures, the template of the embedded models: turns between `<|im_start|>` and
/// `<|im_end|>`, a picture as Qwen3-VL writes it. There is no thinking block.
pub const CHATML: &str = "\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- else %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}";

/// A compiled template with the special tokens that it may name.
pub struct ChatTemplate {
    env: Environment<'static>,
    tokens: BTreeMap<String, String>,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// From Jinja source.
    pub fn new(source: impl Into<String>) -> Result<Self, ChatError> {
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        // minijinja's own escapes for HTML.
        env.add_filter("tojson", |v: Value| -> Result<String, minijinja::Error> {
            to_json(&v).map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()))
        });
        let source: String = source.into();
        env.add_template_owned(NAME, without_marks(&source))
            .map_err(|e| ChatError::Template(describe(&e)))?;
        Ok(Self { env, tokens: BTreeMap::new() })
    }

    /// From a checkpoint's files: `chat_template.jinja`, else `chat_template.json`, else the
    /// `chat_template` of `tokenizer_config.json`, whose special tokens are taken in each case.
    pub fn from_files(files: &ModelFiles) -> Result<Self, ChatError> {
        let read = |name: &str| files.text(name).map_err(|e| ChatError::Template(e.to_string()));
        let config = read("tokenizer_config.json")?;
        let own = match read("chat_template.jinja")? {
            Some(source) => Some(source.into_owned()),
            None => match read("chat_template.json")? {
                Some(json) => source_of(&parse("chat_template.json", &json)?)?,
                None => None,
            },
        };
        let at = |e: ChatError| match e {
            ChatError::Template(m) => ChatError::Template(format!("{}: {m}", files.name())),
            e => e,
        };
        match (own, config) {
            (own, Some(config)) => Self::from_tokenizer_config(&config, own).map_err(at),
            (Some(own), None) => Self::new(own).map_err(at),
            (None, None) => Err(at(ChatError::Template(
                "neither chat_template.jinja nor tokenizer_config.json is there".into(),
            ))),
        }
    }

    /// From the contents of a `tokenizer_config.json`; `source` overrides its template.
    pub fn from_tokenizer_config(config: &str, source: Option<String>) -> Result<Self, ChatError> {
        let config = parse("tokenizer_config.json", config)?;
        let source = match source {
            Some(s) => s,
            None => source_of(&config)?.ok_or_else(|| {
                let msg =
                    "tokenizer_config.json has no chat_template: is this a base model without a chat format?";
                ChatError::Template(msg.into())
            })?,
        };
        let mut template = Self::new(source)?;
        for name in ["bos_token", "eos_token", "unk_token", "pad_token"] {
            let token = &config[name];
            if let Some(text) = token.as_str().or_else(|| token["content"].as_str()) {
                template.tokens.insert(name.into(), text.into());
            }
        }
        Ok(template)
    }

    /// The prompt's text. With `add_generation_prompt` it ends where the assistant's reply begins.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        enable_thinking: bool,
    ) -> Result<String, ChatError> {
        let messages: Vec<Value> = messages.iter().map(message_value).collect();
        let own = context! { messages, add_generation_prompt, enable_thinking };
        let ctx = context! { ..own, ..Value::from_serialize(&self.tokens) };
        self.env.get_template(NAME).and_then(|t| t.render(ctx)).map_err(|e| ChatError::Template(describe(&e)))
    }
}

fn message_value(m: &Message) -> Value {
    let role = match m.role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
    };
    if m.images.is_empty() {
        return Value::from_serialize(json!({ "role": role, "content": m.text }));
    }
    let mut parts: Vec<_> = m.images.iter().map(|_| json!({ "type": "image" })).collect();
    parts.push(json!({ "type": "text", "text": m.text }));
    Value::from_serialize(json!({ "role": role, "content": parts }))
}

fn parse(name: &str, json: &str) -> Result<serde_json::Value, ChatError> {
    serde_json::from_str(json).map_err(|e| ChatError::Template(format!("{name}: {e}")))
}

/// HF's `{% generation %}` and `{% endgeneration %}` print nothing. A condition that always holds stands for
/// them, so that the blanks around them go or stay as the template says.
fn without_marks(source: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(source.len()), source);
    while let Some(start) = rest.find("{%") {
        let Some(len) = rest[start + 2..].find("%}") else { break };
        let inner = start + 2..start + 2 + len;
        let word = rest[inner.clone()].trim_matches(['-', '+']).trim();
        let plain = match word {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        out.push_str(&rest[..inner.start]);
        match plain {
            Some(plain) => out.push_str(&rest[inner.clone()].replace(word, plain)),
            None => out.push_str(&rest[inner.clone()]),
        }
        rest = &rest[inner.end..];
    }
    out + rest
}

/// `chat_template` as a string, or as a list of named ones of which `default` is meant.
fn source_of(config: &serde_json::Value) -> Result<Option<String>, ChatError> {
    match &config["chat_template"] {
        serde_json::Value::Null => Ok(None),
        serde_json::Value::String(s) => Ok(Some(s.clone())),
        serde_json::Value::Array(list) => {
            let default = list.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str());
            let missing =
                || ChatError::Template("chat_template is a list without one named \"default\"".into());
            default.map(|s| Some(s.to_string())).ok_or_else(missing)
        }
        _ => Err(ChatError::Template("chat_template is neither a string nor a list".into())),
    }
}

fn describe(e: &minijinja::Error) -> String {
    let line = e.line().map(|l| format!(" (line {l} of the template)")).unwrap_or_default();
    let detail = e.detail().unwrap_or_default();
    match e.kind() {
        ErrorKind::UnknownFunction if detail.contains("strftime_now") => {
            format!(
                "it asks for today's date, which valor does not give{line}: pass a template without strftime_now"
            )
        }
        kind if detail.is_empty() => format!("{kind}{line}"),
        _ => format!("{detail}{line}"),
    }
}

/// As Python's `json.dumps(ensure_ascii=False)` spaces it.
fn to_json(v: &Value) -> serde_json::Result<String> {
    struct Spaced;
    impl serde_json::ser::Formatter for Spaced {
        fn begin_array_value<W: ?Sized + std::io::Write>(
            &mut self,
            w: &mut W,
            first: bool,
        ) -> std::io::Result<()> {
            if first { Ok(()) } else { w.write_all(b", ") }
        }
        fn begin_object_key<W: ?Sized + std::io::Write>(
            &mut self,
            w: &mut W,
            first: bool,
        ) -> std::io::Result<()> {
            if first { Ok(()) } else { w.write_all(b", ") }
        }
        fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
            w.write_all(b": ")
        }
    }
    let mut out = Vec::new();
    serde::Serialize::serialize(v, &mut serde_json::Serializer::with_formatter(&mut out, Spaced))?;
    Ok(String::from_utf8_lossy(&out).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat() -> Vec<Message> {
        vec![
            Message::new(Role::System, "Be brief."),
            Message::user("How many <chairs> & \"tables\"?").with_images(vec![image::RgbImage::new(1, 1)]),
        ]
    }

    #[test]
    fn chatml_renders_turns_pictures_and_the_generation_prompt() {
        let t = ChatTemplate::new(CHATML).unwrap();
        let want = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>\
                    <|vision_end|>How many <chairs> & \"tables\"?<|im_end|>\n";
        assert_eq!(t.render(&chat(), false, false).unwrap(), want);
        assert_eq!(t.render(&chat(), true, false).unwrap(), format!("{want}<|im_start|>assistant\n"));
    }

    #[test]
    fn python_habits_of_templates_work() {
        let source = "{%- set ns = namespace(last=-1) %}\n{%- for m in messages[::-1] %}\n  \
            {%- if m.role == 'user' and not (m.content is string and m.content.startswith('<tool')) %}\n    \
            {%- set ns.last = messages|length - 1 - loop.index0 %}{% break %}\n  {%- endif %}\n{%- endfor %}\n\
            {{- bos_token }}{{ ns.last }} {{ messages[0].content.strip().split(' ')[-1] }} {{ messages[0]|tojson }}\n\
            {%- if enable_thinking is defined and enable_thinking is false %}\n{{- '<think>\\n\\n</think>' }}\n{%- endif %}";
        let config = json!({ "chat_template": source, "bos_token": { "content": "<s>" } }).to_string();
        let t = ChatTemplate::from_tokenizer_config(&config, None).unwrap();
        let want = "<s>1 brief. {\"content\": \"Be brief.\", \"role\": \"system\"}";
        assert_eq!(t.render(&chat(), true, true).unwrap(), want);
        assert_eq!(t.render(&chat(), true, false).unwrap(), format!("{want}<think>\n\n</think>"));
    }

    #[test]
    fn marks_for_trainers_print_nothing_and_trim_as_written() {
        let marked = |open: &str, close: &str| {
            let t = ChatTemplate::new(format!("a\n  {open}\n b {close}\nc|"))?;
            t.render(&[], true, false)
        };
        let generation = ["{% generation %}", "{%- generation -%}", "{%-generation%}"];
        let end = ["{% endgeneration %}", "{%- endgeneration -%}", "{%endgeneration-%}"];
        // Blocks are trimmed; a minus takes all blanks on its side.
        for ((open, close), want) in generation.into_iter().zip(end).zip(["a\n b c|", "abc|", "a b c|"]) {
            assert_eq!(marked(open, close).unwrap(), want, "{open} {close}");
        }
        let other = "{%}{% set generation = 1 %}{% generation";
        assert_eq!(without_marks(other), other);
    }

    #[test]
    fn a_list_of_templates_means_its_default() {
        let config = r#"{"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]}"#;
        assert_eq!(
            ChatTemplate::from_tokenizer_config(config, None).unwrap().render(&[], true, false).unwrap(),
            "yes"
        );
    }

    #[test]
    fn errors_name_their_cause() {
        let render = |s: &str| {
            ChatTemplate::new(s).and_then(|t| t.render(&chat(), true, false)).unwrap_err().to_string()
        };
        assert!(render("{{ raise_exception('roles must alternate') }}").contains("roles must alternate"));
        assert!(render("\n\n{% for x %}").contains("line 3"));
        assert!(render("{{ strftime_now('%d') }}").contains("strftime_now"));
        let guarded = "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% else %}26 Jul{% endif %}";
        assert_eq!(ChatTemplate::new(guarded).unwrap().render(&[], true, false).unwrap(), "26 Jul");
        let e = ChatTemplate::from_tokenizer_config("{}", None).err().unwrap().to_string();
        assert!(e.contains("no chat_template"), "{e}");
    }

    #[test]
    fn a_folder_prefers_its_own_template_file() {
        let dir = tempfile::tempdir().unwrap();
        let e = ChatTemplate::from_files(&ModelFiles::Folder(dir.path().into())).err().unwrap().to_string();
        assert!(e.contains("chat_template.jinja"), "{e}");
        std::fs::write(
            dir.path().join("tokenizer_config.json"),
            r#"{"chat_template": "a{{ eos_token }}", "eos_token": "E"}"#,
        )
        .unwrap();
        let render = || {
            ChatTemplate::from_files(&ModelFiles::Folder(dir.path().into()))
                .unwrap()
                .render(&[], true, false)
                .unwrap()
        };
        assert_eq!(render(), "aE");
        std::fs::write(dir.path().join("chat_template.jinja"), "b{{ eos_token }}").unwrap();
        assert_eq!(render(), "bE");
    }
}
