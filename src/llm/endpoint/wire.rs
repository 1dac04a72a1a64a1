//! Requests and replies as they go over the wire.

use std::io::{Cursor, Read};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use image::RgbImage;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Key;
use crate::config;
use crate::llm::{ChatError, ChatReply, ChatRequest, Finish, Message, SamplingOptions};

/// A request's body; its bytes are the same whenever the request is.
pub(super) struct Body(Vec<u8>);

impl Body {
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Why a try gave no usable reply.
#[derive(Debug)]
pub(super) struct Failure {
    pub message: String,
    /// Could the next try fare better?
    pub passing: bool,
    /// Will no other request fare better?
    pub closes: bool,
    /// Is it that the reply is not of the form asked for?
    pub misfit: bool,
    pub retry_after: Option<Duration>,
    /// Prompt and new tokens of a reply that was made but cannot be used.
    pub tokens: Option<(usize, usize)>,
}

impl Failure {
    fn new(message: impl Into<String>, passing: bool) -> Self {
        Self {
            message: message.into(),
            passing,
            closes: false,
            misfit: false,
            retry_after: None,
            tokens: None,
        }
    }

    /// No answer at all.
    pub fn of_transport(e: &ureq::Error) -> Self {
        use ureq::Error;
        match e {
            Error::Timeout(_) => Self::new("no reply within the deadline (seconds)", true),
            Error::BadUri(_) | Error::InvalidProxyUrl | Error::RequireHttpsOnly(_) | Error::TlsRequired => {
                Self { closes: true, ..Self::new(format!("cannot ask the server: {e}"), false) }
            }
            // No reply came: whatever it was, it says nothing about the model.
            _ => Self::new(format!("cannot reach the server: {e}"), true),
        }
    }

    fn unusable(message: impl Into<String>, tokens: (usize, usize)) -> Self {
        Self { tokens: Some(tokens), ..Self::new(message, true) }
    }
}

pub(super) fn body(
    cfg: &config::Endpoint,
    request: &ChatRequest,
    opts: &SamplingOptions,
) -> Result<Body, ChatError> {
    let messages: Vec<Value> = request.messages.iter().map(message).collect::<Result<_, _>>()?;
    let mut body = json!({
        "model": cfg.model,
        "messages": messages,
        cfg.max_tokens_key.as_str(): request.max_new_tokens,
    });
    if cfg.send_temperature {
        body["temperature"] = json!(opts.temperature);
    }
    // Those that some servers refuse only where they say something.
    if let Some(p) = opts.top_p {
        body["top_p"] = json!(p);
    }
    if cfg.send_seed {
        // 53 bits survive any reader of JSON.
        body["seed"] = json!(request.seed & ((1 << 53) - 1));
    }
    if let Some(k) = opts.top_k.filter(|_| cfg.send_top_k) {
        body["top_k"] = json!(k);
    }
    if !request.stop.is_empty() {
        body["stop"] = json!(request.stop);
    }
    if let Some(schema) = &request.schema {
        body["response_format"] = json!({
            "type": "json_schema",
            "json_schema": { "name": schema.name, "strict": true, "schema": schema.json },
        });
    }
    for (key, value) in &cfg.extra {
        body[key.as_str()] = serde_json::to_value(value).map_err(|e| ChatError::Request(e.to_string()))?;
    }
    let bytes = serde_json::to_vec(&body).map_err(|e| ChatError::Request(e.to_string()))?;
    Ok(Body(bytes))
}

fn message(m: &Message) -> Result<Value, ChatError> {
    if m.images.is_empty() {
        return Ok(json!({ "role": m.role, "content": m.text }));
    }
    let mut parts = Vec::with_capacity(m.images.len() + 1);
    for image in &m.images {
        parts.push(json!({ "type": "image_url", "image_url": { "url": data_url(image)? } }));
    }
    parts.push(json!({ "type": "text", "text": m.text }));
    Ok(json!({ "role": m.role, "content": parts }))
}

/// The picture itself, without loss.
fn data_url(image: &RgbImage) -> Result<String, ChatError> {
    let mut png = Vec::new();
    image
        .write_to(&mut Cursor::new(&mut png), image::ImageFormat::Png)
        .map_err(|e| ChatError::Request(format!("cannot encode a picture: {e}")))?;
    Ok(format!("data:image/png;base64,{}", base64::engine::general_purpose::STANDARD.encode(png)))
}

/// Servers leave parts out: Gemini's route the message and the count of its tokens where all of them went into
/// thinking.
#[derive(Deserialize)]
struct Completion {
    choices: Option<Vec<Choice>>,
    usage: Option<Tokens>,
}

#[derive(Deserialize)]
struct Choice {
    message: Option<Content>,
    finish_reason: Option<String>,
}

#[derive(Default, Deserialize)]
struct Content {
    content: Option<String>,
    refusal: Option<String>,
}

#[derive(Deserialize)]
struct Tokens {
    prompt_tokens: Option<usize>,
    completion_tokens: Option<usize>,
    total_tokens: Option<usize>,
}

impl Tokens {
    /// Of the prompt, and those made: thinking is billed, and some count it in the total alone.
    fn billed(&self) -> (usize, usize) {
        let prompt = self.prompt_tokens.unwrap_or_default();
        let beside = self.total_tokens.unwrap_or_default().saturating_sub(prompt);
        (prompt, self.completion_tokens.unwrap_or_default().max(beside))
    }
}

/// What a server answered to `asked`, judged. Not more than `max_reply_kb` is read of it, and no failure's
/// message holds the key.
pub(super) fn read(
    mut response: ureq::http::Response<ureq::Body>,
    asked: &Body,
    cfg: &config::Endpoint,
    key: Option<&Key>,
) -> Result<ChatReply, Failure> {
    let status = response.status().as_u16();
    let header = |name| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let retry_after = header("retry-after").and_then(|v| wait(&v, SystemTime::now()));
    let most = cfg.max_reply_kb << 10;
    let mut bytes = Vec::new();
    let taken = response.body_mut().as_reader().take(most as u64 + 1).read_to_end(&mut bytes);
    if status != 200 {
        return Err(Failure { retry_after, ..refused(status, &bytes, key) });
    }
    if let Err(e) = taken {
        let inner = e.get_ref().and_then(|e| e.downcast_ref::<ureq::Error>());
        let timed_out = matches!(inner, Some(ureq::Error::Timeout(_)));
        let message = if timed_out {
            "the reply did not end within the deadline (seconds)".into()
        } else {
            format!("the reply was cut off: {e}")
        };
        return Err(Failure::new(message, true));
    }
    if bytes.len() > most {
        return Err(Failure::new(
            format!("the reply is longer than {} kB (max_reply_kb)", cfg.max_reply_kb),
            false,
        ));
    }
    let completion: Completion = serde_json::from_slice(&bytes)
        .map_err(|e| Failure::new(format!("the reply is no chat completion: {e}"), true))?;
    if completion.choices.is_none() && completion.usage.is_none() {
        return Err(Failure::new("the reply is no chat completion: it has neither choices nor usage", true));
    }
    let tokens = completion.usage.as_ref().map(Tokens::billed);
    let Some(choice) = completion.choices.into_iter().flatten().next() else {
        return Err(Failure::unusable("the reply holds no choice", tokens.unwrap_or_default()));
    };
    let message = choice.message.unwrap_or_default();
    let text = message.content.unwrap_or_default();
    // A server that does not count still bills: three bytes a token is dear for any language model.
    let (prompt_tokens, new_tokens) = tokens.unwrap_or((asked.0.len() / 3, text.len().div_ceil(3)));
    let unusable = |message: String, passing| {
        Err(Failure { passing, ..Failure::unusable(message, (prompt_tokens, new_tokens)) })
    };
    if let Some(refusal) = message.refusal.filter(|r| !r.is_empty()) {
        return unusable(format!("the model refuses: {}", excerpt(&refusal, key)), false);
    }
    let finish = match choice.finish_reason.as_deref() {
        Some("length") => Finish::Length,
        Some("stop") | None => Finish::Stop,
        Some(other) => return unusable(format!("the reply ended by {:?}", excerpt(other, key)), false),
    };
    if text.is_empty() && finish == Finish::Stop {
        let empty = Failure::unusable("the reply is empty", (prompt_tokens, new_tokens));
        return Err(Failure { misfit: true, ..empty });
    }
    Ok(ChatReply { text, finish, prompt_tokens, new_tokens, trace: None })
}

/// A reply that fits its request's schema, as [`Schema::fitted`](crate::llm::Schema::fitted) leaves it.
pub(super) fn fitted(mut reply: ChatReply, request: &ChatRequest) -> Result<ChatReply, Failure> {
    if let Some(schema) = &request.schema {
        let text = schema.fitted(&reply.text);
        reply.text =
            text.map_err(|misfit| Failure { misfit: true, ..Failure::new(misfit, true) })?.to_owned();
    }
    Ok(reply)
}

fn refused(status: u16, body: &[u8], key: Option<&Key>) -> Failure {
    #[derive(Deserialize)]
    struct Outer {
        error: Inner,
    }
    #[derive(Deserialize)]
    struct Inner {
        message: Option<String>,
        code: Option<Value>,
    }
    let error: Option<Inner> = serde_json::from_slice::<Outer>(body).ok().map(|o| o.error);
    let said = error.as_ref().and_then(|e| e.message.clone());
    let said = excerpt(&said.unwrap_or_else(|| String::from_utf8_lossy(body).into_owned()), key);
    let code = error.and_then(|e| e.code).and_then(|c| c.as_str().map(str::to_owned));
    // Told as "too many requests", but no wait will help.
    let unpaid = code.as_deref() == Some("insufficient_quota");
    let colon = if said.is_empty() { "" } else { ": " };
    let (text, passing, closes) = match status {
        401 | 403 => ("the server refuses the key (key_env)", false, true),
        402 => ("the account has nothing left to pay with", false, true),
        404 => ("the server has no such address or model (base_url, model)", false, true),
        429 if unpaid => ("the account's quota is used up", false, true),
        408 | 425 | 429 | 500..=599 => ("the server is busy or broken", true, false),
        300..=399 => ("the server redirects; name the new address (base_url)", false, true),
        _ => ("the server refuses the request", false, false),
    };
    Failure { closes, ..Failure::new(format!("{text}, status {status}{colon}{said}"), passing) }
}

/// The beginning of a stranger's text, in which the key is hidden before a cut could leave a part of it.
fn excerpt(text: &str, key: Option<&Key>) -> String {
    let hidden = key.map(|key| key.hidden_in(text));
    let text = hidden.as_deref().unwrap_or(text).trim();
    let short: String = text.chars().take(200).collect();
    if short.len() < text.len() { format!("{short}…") } else { short }
}

/// `Retry-After`: seconds or a date.
fn wait(header: &str, now: SystemTime) -> Option<Duration> {
    let seconds = header.trim().parse::<f64>().ok().filter(|s| (0. ..1e9).contains(s));
    seconds.map(Duration::from_secs_f64).or_else(|| {
        let then = httpdate::parse_http_date(header.trim()).ok()?;
        Some(then.duration_since(now).unwrap_or_default())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = httpdate::parse_http_date("Tue, 24 Nov 2026 10:00:00 GMT").unwrap();
        for (header, seconds) in [
            ("7", Some(7.)),
            ("0.5", Some(0.5)),
            ("Tue, 24 Nov 2026 10:01:00 GMT", Some(60.)),
            ("Tue, 24 Nov 2026 09:00:00 GMT", Some(0.)),
            ("-3", None),
            ("nan", None),
            ("soon", None),
        ] {
            assert_eq!(wait(header, now).map(|d| d.as_secs_f64()), seconds, "{header}");
        }
    }

    #[test]
    fn passing_errors_are_told_from_final_ones() {
        let told = |status, body: &str| {
            let f = refused(status, body.as_bytes(), None);
            (f.passing, f.closes)
        };
        for status in [408, 425, 429, 500, 502, 503, 529] {
            assert_eq!(told(status, ""), (true, false), "{status}");
        }
        for status in [301, 401, 402, 403, 404] {
            assert_eq!(told(status, "<html>"), (false, true), "{status}");
        }
        assert_eq!(told(400, r#"{"error": {"message": "too long", "code": null}}"#), (false, false));
        assert_eq!(
            told(429, r#"{"error": {"message": "pay", "code": "insufficient_quota"}}"#),
            (false, true)
        );
        assert!(refused(400, "x".repeat(5000).as_bytes(), None).message.len() < 300);
    }

    #[test]
    fn what_brings_no_reply_is_no_fault_of_the_model() {
        let told = |e: ureq::Error| {
            let f = Failure::of_transport(&e);
            (f.passing, f.closes, f.misfit)
        };
        for passing in [ureq::Error::HostNotFound, ureq::Error::ConnectProxyFailed("403".into())] {
            assert_eq!(told(passing), (true, false, false));
        }
        for settled in [ureq::Error::InvalidProxyUrl, ureq::Error::BadUri("x".into())] {
            assert_eq!(told(settled), (false, true, false));
        }
    }

    #[test]
    fn a_key_is_hidden_before_a_text_is_cut() {
        let key = Key("sk-0123456789abcdefghijklmnopqrstuvwxyz".into());
        for before in [0, 150, 180, 199, 990] {
            let body = format!("{}{} is wrong", "x".repeat(before), key.0);
            let json = json!({ "error": { "message": body } }).to_string();
            for body in [body, json] {
                let told = refused(400, body.as_bytes(), Some(&key)).message;
                assert!(!told.contains("sk-0"), "{told}");
            }
        }
    }

    #[test]
    fn tokens_that_are_only_in_the_total_are_billed() {
        for (usage, billed) in [
            (json!({ "prompt_tokens": 5, "completion_tokens": 7 }), (5, 7)),
            (json!({ "prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12 }), (5, 7)),
            (json!({ "prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 100 }), (5, 95)),
            (json!({ "prompt_tokens": 5, "total_tokens": 100 }), (5, 95)),
            (json!({ "prompt_tokens": 5, "completion_tokens": null, "total_tokens": 2 }), (5, 0)),
        ] {
            assert_eq!(serde_json::from_value::<Tokens>(usage).unwrap().billed(), billed);
        }
    }
}
