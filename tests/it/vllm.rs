//! Rollouts by servers with vLLM's routes, our own engine behind them.

use std::collections::HashMap;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use candle_core::Device;
use serde_json::{Value, json};
use valor::llm::engine::{EngineOptions, Job, Network};
use valor::llm::local::LocalChat;
use valor::llm::{Finish, SamplingOptions};
use valor::models::qwen3::{Config, Qwen3};
use valor::nn::lora::{LoraConfig, adapted};
use valor::nn::{Params, frozen};
use valor::weights::ModelFiles;

use crate::server::request;

struct State {
    files: ModelFiles,
    base: Params,
    models: Mutex<HashMap<String, Arc<LocalChat>>>,
    /// Adapters that were loaded, in order, and those that were given up.
    loaded: Mutex<Vec<String>>,
    unloaded: Mutex<Vec<String>>,
    completions: Mutex<usize>,
    /// Whether adapters are taken and not used.
    deaf: bool,
}

struct Vllm {
    state: Arc<State>,
    url: String,
}

impl State {
    fn chat(&self, adapter: Option<&Path>) -> LocalChat {
        let cfg: Config = self.files.json("config.json").unwrap();
        let base = frozen(self.base.builder());
        let vb = match adapter {
            None => base,
            Some(dir) => {
                let peft: Value =
                    serde_json::from_slice(&std::fs::read(dir.join("adapter_config.json")).unwrap()).unwrap();
                let lora = LoraConfig {
                    rank: peft["r"].as_u64().unwrap() as usize,
                    alpha: peft["lora_alpha"].as_f64().unwrap(),
                    targets: serde_json::from_value(peft["target_modules"].clone()).unwrap(),
                };
                let held =
                    candle_core::safetensors::load(dir.join("adapter_model.safetensors"), &Device::Cpu)
                        .unwrap();
                let own =
                    |(name, t): (String, _)| (name.strip_prefix("base_model.model.").unwrap().into(), t);
                let adapter = Params::from_tensors(0, held.into_iter().map(own).collect()).unwrap();
                let before = adapter.count();
                let vb = frozen(adapted(base, &adapter, &lora));
                Qwen3::new(&cfg, vb.clone()).unwrap();
                assert_eq!(adapter.count(), before, "the adapter lacks some of its layers");
                vb
            }
        };
        let network = Network::Text { model: Qwen3::new(&cfg, vb).unwrap(), cfg };
        LocalChat::with_network(&self.files, network, &Device::Cpu, EngineOptions::default()).unwrap()
    }

    fn answer(&self, route: &str, body: &Value) -> (u16, Value) {
        let name = body["lora_name"].as_str().unwrap_or_default().to_owned();
        match route {
            "/v1/load_lora_adapter" => {
                let dir = Path::new(body["lora_path"].as_str().unwrap());
                let chat = self.chat((!self.deaf).then_some(dir));
                self.models.lock().unwrap().insert(name.clone(), Arc::new(chat));
                self.loaded.lock().unwrap().push(name);
                (200, json!("ok"))
            }
            "/v1/unload_lora_adapter" => {
                let known = self.models.lock().unwrap().remove(&name).is_some();
                self.unloaded.lock().unwrap().push(name);
                (if known { 200 } else { 404 }, json!("ok"))
            }
            "/v1/completions" => {
                *self.completions.lock().unwrap() += 1;
                let model = self.models.lock().unwrap().get(body["model"].as_str().unwrap()).cloned();
                let Some(chat) = model else { return (404, json!({"error": "no such model"})) };
                assert_eq!(body["return_tokens_as_token_ids"], true);
                let job = Job {
                    ids: serde_json::from_value(body["prompt"].clone()).unwrap(),
                    features: None,
                    grids: Vec::new(),
                    seed: body["seed"].as_u64().unwrap(),
                    max_new_tokens: body["max_tokens"].as_u64().unwrap() as usize,
                    stop: Vec::new(),
                };
                let opts = SamplingOptions {
                    trace: true,
                    ..SamplingOptions::temperature(body["temperature"].as_f64().unwrap())
                };
                let g =
                    chat.engine().generate(&[job], &opts, &chat.format.tokenizer, None).unwrap().remove(0);
                let tokens: Vec<String> = g.trace.ids.iter().map(|id| format!("token_id:{id}")).collect();
                let why = if g.finish == Finish::Length { "length" } else { "stop" };
                let logprobs = json!({ "tokens": tokens, "token_logprobs": g.trace.log_probs });
                (200, json!({ "choices": [{ "text": g.text, "finish_reason": why, "logprobs": logprobs }] }))
            }
            _ => (404, json!({"error": route})),
        }
    }
}

impl Vllm {
    fn start(deaf: bool) -> Self {
        let files = ModelFiles::open("embedded-base", "planner").unwrap();
        let base = Params::from_tensors(0, files.checkpoint().unwrap().tensors().unwrap()).unwrap();
        let state = Arc::new(State {
            files,
            base,
            models: Mutex::default(),
            loaded: Mutex::default(),
            unloaded: Mutex::default(),
            completions: Mutex::default(),
            deaf,
        });
        let chat = Arc::new(state.chat(None));
        state.models.lock().unwrap().insert("base".into(), chat);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (state, stream) = (shared.clone(), stream.unwrap());
                std::thread::spawn(move || serve(&state, stream));
            }
        });
        Self { state, url }
    }
}

fn serve(state: &State, mut stream: TcpStream) {
    let Ok(Some((head, body))) = request(&stream) else { return };
    let route = head.split_whitespace().nth(1).unwrap_or_default();
    let (status, reply) = state.answer(route, &body);
    let reply = reply.to_string();
    let head =
        format!("HTTP/1.1 {status} So\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", reply.len());
    let _ = stream.write_all((head + &reply).as_bytes());
}

fn train(out: &Path, servers: &[&Vllm], sets: &[&str], more: &[&str]) -> Output {
    let urls: Vec<String> = servers.iter().map(|s| format!("\"{}\"", s.url)).collect();
    let own = [
        format!("reasoner.servers.urls=[{}]", urls.join(", ")),
        format!("reasoner.servers.folder={}", out.display()),
    ];
    let fixed = [
        "reasoner.servers.model=base",
        "planner.model=embedded-base",
        "reasoner.servers.concurrency=2",
        "reasoner.questions=4",
        "reasoner.batch=2",
        "reasoner.group=2",
        "reasoner.epochs=1",
        "reasoner.held_out=0",
        "reasoner.lr=0.05",
        "reasoner.warmup=0",
    ];
    let mut c = Command::new(env!("CARGO_BIN_EXE_valor"));
    c.arg("train-reasoner").arg("--out").arg(out).args(more);
    for set in own.iter().map(String::as_str).chain(fixed).chain(sets.iter().copied()) {
        c.args(["--set", set]);
    }
    c.output().unwrap()
}

fn stderr(o: &Output) -> String {
    String::from_utf8_lossy(&o.stderr).into_owned()
}

#[test]
fn servers_share_the_rollouts_and_follow_the_weights() {
    let (a, b) = (Vllm::start(false), Vllm::start(false));
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let o = train(&out, &[&a, &b], &[], &[]);
    assert!(o.status.success(), "{}", stderr(&o));
    for server in [&a, &b] {
        let (loaded, unloaded) =
            (server.state.loaded.lock().unwrap().clone(), server.state.unloaded.lock().unwrap().clone());
        assert_eq!(loaded.len(), 2, "one a step: {loaded:?}");
        assert_eq!(unloaded, loaded[..1], "the old one is given up");
        assert!(*server.state.completions.lock().unwrap() > 2, "it had a share of the work");
    }
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let steps: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(steps.len(), 2);
    let off = |s: &Value| s["sampler_mismatch_most"].as_f64().unwrap();
    // The second step's rollouts are of the weights that the first one left.
    assert!(steps.iter().all(|s| off(s) < 1e-3), "{steps:?}");
}

#[test]
fn an_adapter_that_is_not_used_stops_the_run() {
    let deaf = Vllm::start(true);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let o = train(&out, &[&deaf], &[], &[]);
    assert_eq!(o.status.code(), Some(1));
    let said = stderr(&o);
    assert!(said.contains("does not use the adapter") && said.contains(&deaf.url), "{said}");
}

#[test]
fn servers_without_an_adapter_are_refused() {
    let server = Vllm::start(false);
    let dir = tempfile::tempdir().unwrap();
    let o = train(&dir.path().join("run"), &[&server], &["reasoner.adapter.rank=0"], &[]);
    assert_eq!(o.status.code(), Some(2));
    assert!(stderr(&o).contains("reasoner.adapter.rank"), "{}", stderr(&o));
}
