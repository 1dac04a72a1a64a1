//! Rollouts by vLLM servers, which is how a run outgrows one machine.
//!
//! After each update the adapter goes out in PEFT's format under a new name, is loaded by every server
//! (`POST /v1/load_lora_adapter`), and the old one is unloaded; prompts go as token ids to
//! `POST /v1/completions` and come back with ids and log-probabilities. A canary's log-probabilities are
//! then compared with the trainer's: an adapter that never arrived stops the run instead of spoiling it.
//! Servers need `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`, `--enable-lora`, `--max-lora-rank`, and to see the
//! run's folder under the path that the configuration names. Not here: full fine-tuning, whose weights
//! are too large to send round at each step.

use super::RolloutEngine;
use crate::config;
use crate::llm::endpoint::agent;
use crate::llm::format::ChatFormat;
use crate::llm::{ChatError, ChatReply, ChatRequest, Finish, TokenTrace};
use candle_core::Device;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Servers that hold the same base model and, after [`Servers::load`], the same adapter.
pub struct Servers<'a> {
    cfg: config::Servers,
    agent: ureq::Agent,
    format: &'a ChatFormat,
    /// The adapter in use; before the first the base model answers.
    adapter: Mutex<Option<String>>,
}

/// Tries of a call; servers that are busy or restarting get some time.
const TRIES: u32 = 4;
/// Tokens of the canary.
const CANARY: usize = 24;
/// Mean difference of the canary's log-probabilities that lower precision can explain.
const CANARY_OFF: f64 = 0.1;

impl<'a> Servers<'a> {
    pub fn new(cfg: &config::Servers, format: &'a ChatFormat) -> Self {
        Self { cfg: cfg.clone(), agent: agent(cfg.seconds), format, adapter: Mutex::default() }
    }

    /// The path under which servers find a file of the run's folder.
    pub fn path(&self, within: &str) -> String {
        format!("{}/{within}", self.cfg.folder.trim_end_matches('/'))
    }

    /// Has every server load the adapter at `path` (as they see it) under a new name, and forget the one
    /// before.
    pub fn load(&self, name: &str, path: &str) -> Result<(), String> {
        for url in &self.cfg.urls {
            self.post(url, "load_lora_adapter", &json!({ "lora_name": name, "lora_path": path }))?;
        }
        let old = self.adapter.lock().expect("no holder panics").replace(name.to_owned());
        if let Some(old) = old.filter(|old| old != name) {
            for url in &self.cfg.urls {
                self.post(url, "unload_lora_adapter", &json!({ "lora_name": old }))?;
            }
        }
        Ok(())
    }

    /// Each server's most likely continuation of a prompt: its ids and their log-probabilities, to be
    /// compared by [`Servers::check`].
    pub fn canaries(&self, prompt: &[u32]) -> Result<Vec<(String, TokenTrace)>, String> {
        let body = self.body(prompt, CANARY, 0., 0);
        let one = |url: &String| {
            let reply = self.complete(url, &body, prompt)?;
            Ok((url.clone(), reply.trace.expect("asked for")))
        };
        self.cfg.urls.iter().map(one).collect()
    }

    /// That a server's log-probabilities are the trainer's.
    pub fn check(url: &str, server: &[f32], trainer: &[f64]) -> Result<(), String> {
        let n = server.len().min(trainer.len()).max(1) as f64;
        let off = server.iter().zip(trainer).map(|(a, b)| (f64::from(*a) - b).abs()).sum::<f64>() / n;
        if off <= CANARY_OFF && server.len() == trainer.len() {
            return Ok(());
        }
        Err(format!(
            "{url}: its log-probabilities are {off:.3} off the trainer's on a canary prompt: it does not use the \
             adapter that it was sent, or holds another base model"
        ))
    }

    fn body(&self, prompt: &[u32], max_new_tokens: usize, temperature: f64, seed: u64) -> Value {
        let adapter = self.adapter.lock().expect("no holder panics");
        json!({
            "model": adapter.as_deref().unwrap_or(&self.cfg.model), "prompt": prompt,
            "max_tokens": max_new_tokens, "temperature": temperature, "top_p": 1, "top_k": -1,
            // 53 bits survive any reader of JSON.
            "seed": seed & ((1 << 53) - 1),
            "logprobs": 1, "return_tokens_as_token_ids": true, "skip_special_tokens": true,
        })
    }

    fn complete(&self, url: &str, body: &Value, prompt: &[u32]) -> Result<ChatReply, String> {
        let text = self.post(url, "completions", body)?;
        read(&text, prompt).map_err(|e| format!("{url}: {e}"))
    }

    /// The body of the reply, after some tries.
    fn post(&self, url: &str, route: &str, body: &Value) -> Result<String, String> {
        let address = format!("{}/{route}", url.trim_end_matches('/'));
        let bytes = body.to_string();
        let mut last = String::new();
        for attempt in 0..TRIES {
            if attempt > 0 {
                std::thread::sleep(Duration::from_millis(250 << (2 * attempt)));
            }
            let sent =
                self.agent.post(&address).header("content-type", "application/json").send(bytes.as_bytes());
            match sent {
                Err(e) => last = e.to_string(),
                Ok(mut response) => {
                    let status = response.status();
                    let limit = self.cfg.max_reply_mb as u64 * 1_000_000;
                    match response.body_mut().with_config().limit(limit).read_to_string() {
                        Err(e) => last = e.to_string(),
                        Ok(text) if status.is_success() => return Ok(text),
                        Ok(text) => {
                            last = format!("{status} {}", text.chars().take(200).collect::<String>());
                            // An adapter that is there already was loaded by a try whose reply was lost.
                            if route == "load_lora_adapter" && text.contains("already been loaded") {
                                return Ok(text);
                            }
                            // A server that was started anew, or a try whose reply was lost.
                            if route == "unload_lora_adapter" && status.as_u16() == 404 {
                                return Ok(text);
                            }
                            if status.is_client_error() && status.as_u16() != 429 {
                                break;
                            }
                        }
                    }
                }
            }
        }
        let last: String = last.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        Err(format!("{address}: {last}"))
    }
}

impl RolloutEngine for Servers<'_> {
    /// Servers take what comes next, each as fast as it is.
    fn sample(&self, requests: &[ChatRequest]) -> Vec<Result<ChatReply, ChatError>> {
        let next = AtomicUsize::new(0);
        let replies: Mutex<Vec<Option<Result<ChatReply, ChatError>>>> =
            Mutex::new(requests.iter().map(|_| None).collect());
        std::thread::scope(|s| {
            let workers = self.cfg.urls.len() * self.cfg.concurrency;
            for worker in 0..workers.min(requests.len()) {
                let url = &self.cfg.urls[worker % self.cfg.urls.len()];
                let (next, replies) = (&next, &replies);
                s.spawn(move || {
                    while let Some((i, r)) = {
                        let i = next.fetch_add(1, Ordering::Relaxed);
                        requests.get(i).map(|r| (i, r))
                    } {
                        let reply = self.format.prompt(&r.messages, &Device::Cpu).and_then(|p| {
                            let body = self.body(&p.ids, r.max_new_tokens, 1., r.seed);
                            self.complete(url, &body, &p.ids).map_err(ChatError::NoReply)
                        });
                        replies.lock().expect("no holder panics")[i] = Some(reply);
                    }
                });
            }
        });
        let all = replies.into_inner().expect("no holder panics");
        all.into_iter().map(|r| r.expect("each request was taken")).collect()
    }
}

/// A completion's reply, with the ids that were sampled.
fn read(text: &str, prompt: &[u32]) -> Result<ChatReply, String> {
    #[derive(Deserialize)]
    struct Reply {
        choices: Vec<Choice>,
    }
    #[derive(Deserialize)]
    struct Choice {
        text: String,
        finish_reason: Option<String>,
        logprobs: Option<LogProbs>,
    }
    #[derive(Deserialize)]
    struct LogProbs {
        tokens: Vec<String>,
        token_logprobs: Vec<Option<f32>>,
    }
    let reply: Reply = serde_json::from_str(text).map_err(|e| format!("its reply cannot be read: {e}"))?;
    let choice = reply.choices.into_iter().next().ok_or("its reply holds no choice")?;
    let finish = match choice.finish_reason.as_deref() {
        Some("length") => Finish::Length,
        Some("stop") | None => Finish::Stop,
        Some(other) => return Err(format!("its reply ended by {other:?}")),
    };
    let lp = choice.logprobs.ok_or("its reply holds no logprobs")?;
    let id = |t: &String| {
        let id = t.strip_prefix("token_id:").and_then(|id| id.parse().ok());
        id.ok_or_else(|| {
            format!("it gave the token {t:?} in place of its id; it must know return_tokens_as_token_ids")
        })
    };
    let ids: Vec<u32> = lp.tokens.iter().map(id).collect::<Result<_, _>>()?;
    let log_probs: Option<Vec<f32>> = lp.token_logprobs.into_iter().collect();
    let log_probs = log_probs.filter(|l| l.len() == ids.len() && l.iter().all(|x| x.is_finite()));
    let log_probs = log_probs.ok_or("its log-probabilities are not one finite number a token")?;
    if ids.is_empty() {
        return Err("its reply holds no token".into());
    }
    Ok(ChatReply {
        text: choice.text,
        finish,
        prompt_tokens: prompt.len(),
        new_tokens: ids.len(),
        trace: Some(TokenTrace { prompt_ids: prompt.to_vec(), ids, log_probs }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_read_whole_or_not_at_all() {
        let of = |logprobs: &str| {
            read(
                &format!(
                    "{{\"choices\": [{{\"text\": \"a b\", \"finish_reason\": \"length\", \"logprobs\": {logprobs}}}]}}"
                ),
                &[7],
            )
        };
        let reply =
            of(r#"{"tokens": ["token_id:3", "token_id:12"], "token_logprobs": [-0.5, -1.0]}"#).unwrap();
        assert_eq!(reply.finish, Finish::Length);
        let trace = reply.trace.unwrap();
        assert_eq!((trace.ids, trace.log_probs, trace.prompt_ids), (vec![3, 12], vec![-0.5, -1.], vec![7]));
        for (bad, why) in [
            ("null", "no logprobs"),
            (r#"{"tokens": ["cat"], "token_logprobs": [-0.5]}"#, "return_tokens_as_token_ids"),
            (r#"{"tokens": ["token_id:3"], "token_logprobs": []}"#, "one finite number"),
            (r#"{"tokens": ["token_id:3"], "token_logprobs": [null]}"#, "one finite number"),
            (r#"{"tokens": [], "token_logprobs": []}"#, "no token"),
        ] {
            let e = of(bad).unwrap_err();
            assert!(e.contains(why), "{e}");
        }
        assert!(read("<html>", &[]).is_err());
        let aborted = r#"{"choices": [{"text": "a", "finish_reason": "abort",
            "logprobs": {"tokens": ["token_id:3"], "token_logprobs": [-0.5]}}]}"#;
        assert!(read(aborted, &[7]).unwrap_err().contains("\"abort\""));
    }

    #[test]
    fn a_canary_tells_an_adapter_that_is_not_used() {
        Servers::check("a", &[-0.5, -1.], &[-0.51, -0.98]).unwrap();
        let e = Servers::check("http://a/v1", &[-0.5, -1.], &[-0.9, -0.2]).unwrap_err();
        assert!(e.contains("http://a/v1") && e.contains("does not use"), "{e}");
    }
}
