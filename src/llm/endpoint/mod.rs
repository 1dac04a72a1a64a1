//! Chat models behind an OpenAI-compatible server: OpenAI, Gemini's compatible route, vLLM,
//! llama.cpp and the like (`POST {base_url}/chat/completions`).
//!
//! A call ends in bounded time: each try has a deadline, tries are few, waits are capped. Passing
//! errors (no connection, timeout, 408, 425, 429, 5xx, a reply that cannot be read) are tried again,
//! after what `Retry-After` asks for or exponentially longer waits with jitter; all others are final.
//! Replies are kept on disk by the hash of what was asked, and a ledger counts calls, tokens and
//! money; once its budget is spent no call goes out. The key comes from the environment and stands in no
//! message, cache entry or record.

mod cache;
mod ledger;
mod limits;
mod wire;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{OnceLock, mpsc};
use std::time::Duration;

use crate::config;
use crate::files::sha256_hex;
use crate::text::is_unruly;
use cache::Cache;
use ledger::Ledger;
pub use ledger::Usage;
use limits::{Pace, Slots, backoff};
use serde_json::json;
use wire::{Body, Failure};

use super::{ChatError, ChatModel, ChatReply, ChatRequest, SamplingOptions};

/// A model on a server.
pub struct Endpoint {
    /// As the configuration calls it, for messages.
    name: String,
    cfg: config::Endpoint,
    key: Option<Key>,
    agent: ureq::Agent,
    cache: Option<Cache>,
    ledger: Ledger,
    slots: Slots,
    pace: Pace,
    /// Why no further request will fare better, once a server has said so.
    closed: OnceLock<String>,
    /// The cache's folder cannot be written to; said once.
    full: AtomicBool,
}

/// A secret; has no `Debug`, and goes nowhere but into one header.
struct Key(String);

/// What is wrong with a server's key, if anything.
pub fn key_problem(cfg: &config::Endpoint) -> Option<String> {
    Key::of(cfg).err()
}

impl Key {
    /// From the environment; none where the server wants none.
    fn of(cfg: &config::Endpoint) -> Result<Option<Self>, String> {
        let var = cfg.key_env.as_str();
        if var.is_empty() {
            return Ok(None);
        }
        match std::env::var(var) {
            Ok(key) if !key.trim().is_empty() => Ok(Some(Self(key.trim().to_owned()))),
            // Not repeated where it may be the key itself, put in the wrong place.
            _ if var.bytes().any(|b| !(b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_')) => {
                Err("the environment has no variable of that name; give the name, not the key, and export it"
                    .into())
            }
            _ => Err(format!("the environment has no {var}; export it")),
        }
    }

    /// The text without this key, whoever put it there.
    fn hidden_in(&self, text: &str) -> String {
        text.replace(&self.0, "[key]")
    }
}

/// A server's model, and what else decides what it is asked; not where it is, nor any key. Settings that are as by
/// default are left out, so that what was made before there were such settings is still known. Of `extra`, in
/// which people put what they like, there is a hash.
pub fn asked_model(cfg: &config::Endpoint) -> String {
    let of = |e: &config::Endpoint| {
        json!({
            "max_tokens_key": e.max_tokens_key, "send_seed": e.send_seed, "send_top_k": e.send_top_k,
            "send_temperature": e.send_temperature, "extra": sha256_hex(json!(e.extra).to_string().as_bytes(), 8),
        })
    };
    let (mut own, default) = (of(cfg), of(&config::Endpoint::default()));
    let settings = own.as_object_mut().expect("made above");
    settings.retain(|key, value| *value != default[key.as_str()]);
    match settings.is_empty() {
        true => cfg.model.clone(),
        false => format!("{} {own}", cfg.model),
    }
}

/// How servers with models are called: every call ends within the deadline, whatever its status.
pub(crate) fn agent(seconds: f64) -> ureq::Agent {
    ureq::Agent::config_builder()
        .timeout_global(Some(Duration::from_secs_f64(seconds)))
        .http_status_as_error(false)
        // A redirected key is a lost one.
        .max_redirects(0)
        .user_agent(concat!("valor/", env!("CARGO_PKG_VERSION")))
        .build()
        .new_agent()
}

impl Endpoint {
    /// # Errors
    /// A wrong setting, or a key that is not in the environment; nothing is sent.
    pub fn new(name: &str, cfg: &config::Endpoint) -> Result<Self, ChatError> {
        let wrong = |field: &str, message: String| {
            Err(ChatError::Request(format!("endpoints.{name}.{field}: {message}")))
        };
        if let Some(why) = config::address_fault(&cfg.base_url, "name a variable in key_env") {
            return wrong("base_url", why);
        }
        if cfg.model.is_empty() {
            return wrong("model", "is empty; name one that the server has".into());
        }
        let key = match Key::of(cfg) {
            Ok(key) => key,
            Err(message) => return wrong("key_env", message),
        };
        let agent = agent(cfg.seconds);
        Ok(Self {
            name: name.into(),
            key,
            agent,
            cache: (!cfg.cache.is_empty()).then(|| Cache::new(&cfg.cache)),
            ledger: Ledger::new(cfg),
            slots: Slots::new(cfg.concurrency),
            pace: Pace::new(cfg.requests_per_minute),
            closed: OnceLock::new(),
            full: AtomicBool::new(false),
            cfg: cfg.clone(),
        })
    }

    fn url(&self) -> String {
        format!("{}/chat/completions", self.cfg.base_url.trim_end_matches('/'))
    }

    /// One request's reply: from the cache, or by as many tries as it may take.
    fn reply(&self, request: &ChatRequest, opts: &SamplingOptions) -> Result<ChatReply, ChatError> {
        opts.check()?;
        let body = wire::body(&self.cfg, request, opts)?;
        let key = Cache::key(&self.url(), &body, request.seed);
        // What was valid when it was stored need not fit the schema of now.
        let kept = self.cache.as_ref().and_then(|c| c.get(&key));
        if let Some(reply) = kept.and_then(|reply| wire::fitted(reply, request).ok()) {
            self.ledger.kept();
            return Ok(reply);
        }
        let _slot = self.slots.take();
        let mut tried = 0;
        loop {
            if let Some(why) = self.closed.get() {
                return Err(ChatError::Closed(why.clone()));
            }
            self.ledger.open().map_err(|spent| ChatError::Closed(self.message(&spent)))?;
            self.pace.wait();
            tried += 1;
            let failure = match self.attempt(&body).and_then(|reply| wire::fitted(reply, request)) {
                Ok(reply) => {
                    // Paid for: a full disk does not take it away.
                    if let Some(Err(e)) = self.cache.as_ref().map(|cache| cache.put(&key, &reply))
                        && !self.full.swap(true, Ordering::Relaxed)
                    {
                        notice!("warning: {}", self.message(&e));
                    }
                    return Ok(reply);
                }
                Err(failure) => failure,
            };
            self.ledger.failed();
            let message = self.message(&failure.message);
            if failure.closes {
                return Err(ChatError::Closed(self.closed.get_or_init(|| message).clone()));
            }
            let longest = Duration::from_secs_f64(self.cfg.longest_wait);
            let wait = match failure.retry_after {
                Some(asked) if asked > longest => {
                    let text =
                        format!("{message}; it asks to wait {} s, longest_wait is less", asked.as_secs());
                    return Err(ChatError::NoReply(text));
                }
                Some(asked) => asked,
                None => backoff(tried, longest, &key),
            };
            // Asked the same it would say the same.
            let settled = failure.misfit && opts.temperature == 0.;
            if !failure.passing || settled || tried >= self.cfg.tries {
                let tries = if tried == 1 { String::new() } else { format!(" (tried {tried} times)") };
                let message = format!("{message}{tries}");
                // What will not pass is no fault of the moment, but how this model takes this request.
                return Err(match failure.misfit || !failure.passing {
                    true => ChatError::Misfit(message),
                    false => ChatError::NoReply(message),
                });
            }
            std::thread::sleep(wait);
        }
    }

    fn attempt(&self, body: &Body) -> Result<ChatReply, Failure> {
        let mut call = self.agent.post(self.url()).header("content-type", "application/json");
        if let Some(key) = &self.key {
            call = call.header("authorization", format!("Bearer {}", key.0));
        }
        let response = call.send(body.bytes()).map_err(|e| Failure::of_transport(&e))?;
        let mut reply = wire::read(response, body, &self.cfg, self.key.as_ref());
        if let (Ok(reply), Some(key)) = (&mut reply, &self.key) {
            // A server that repeats what it was sent. What stands for a key with servers that want none, `none`
            // or `x`, is also a word of programs.
            if key.0.len() >= 16 {
                reply.text = key.hidden_in(&reply.text);
            }
        }
        // Billed, whatever is made of it.
        if let Some(tokens) =
            reply.as_ref().map_or_else(|f| f.tokens, |r| Some((r.prompt_tokens, r.new_tokens)))
        {
            self.ledger.answered(tokens);
        }
        reply
    }

    /// One line for people, from a server's words.
    fn message(&self, text: &str) -> String {
        let text: String = text.chars().map(|c| if is_unruly(c) { ' ' } else { c }).collect();
        let text = self.key.as_ref().map_or(text.clone(), |key| key.hidden_in(&text));
        format!("endpoint {} ({}): {}", self.name, self.cfg.model, text.trim())
    }
}

impl ChatModel for Endpoint {
    fn name(&self) -> &str {
        &self.cfg.model
    }

    /// Pieces are whole replies: nothing is streamed. A request that fails is a failure of its own;
    /// no trace is given.
    fn chat(
        &self,
        requests: &[ChatRequest],
        opts: &SamplingOptions,
        on_token: Option<&mut dyn FnMut(usize, &str)>,
    ) -> Vec<Result<ChatReply, ChatError>> {
        let next = AtomicUsize::new(0);
        let (done, replies) = mpsc::channel();
        let mut hear = on_token;
        let mut all: Vec<Option<Result<ChatReply, ChatError>>> = requests.iter().map(|_| None).collect();
        std::thread::scope(|s| {
            for _ in 0..self.cfg.concurrency.min(requests.len()) {
                let (done, next) = (done.clone(), &next);
                s.spawn(move || {
                    while let Some((i, request)) = {
                        let i = next.fetch_add(1, Ordering::Relaxed);
                        requests.get(i).map(|r| (i, r))
                    } {
                        // The receiver outlives this scope.
                        let _ = done.send((i, self.reply(request, opts)));
                    }
                });
            }
            drop(done);
            for (i, reply) in replies {
                if let (Some(hear), Ok(reply)) = (&mut hear, &reply) {
                    hear(i, &reply.text);
                }
                all[i] = Some(reply);
            }
        });
        all.into_iter().map(|r| r.expect("each request was taken")).collect()
    }

    fn identity(&self) -> String {
        format!("{} {}", self.url(), asked_model(&self.cfg))
    }

    fn usage(&self) -> Option<Usage> {
        Some(self.ledger.usage())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_known_by_its_name_and_by_what_is_not_as_by_default() {
        let cfg = config::Endpoint {
            model: "m".into(),
            key_env: "KEY".into(),
            tries: 1,
            cache: "replies".into(),
            ..config::Endpoint::default()
        };
        assert_eq!(asked_model(&cfg), "m");
        let with = |tier: &str| {
            let extra = format!("service_tier = '{tier}'").parse().unwrap();
            asked_model(&config::Endpoint { send_seed: false, extra, ..cfg.clone() })
        };
        assert!(with("flex").starts_with(r#"m {"send_seed":false,"extra":""#), "{}", with("flex"));
        assert!(with("flex") != with("default") && !with("flex").contains("flex"));
    }
}
