//! Chat models on servers that misbehave.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use valor::config;
use valor::llm::endpoint::{Endpoint, Usage};
use valor::llm::{ChatError, ChatModel, ChatReply, ChatRequest, Finish, Message, SamplingOptions, Schema};

use crate::server::{Act, Server, completion};

const KEY: &str = "sk-very-secret-0123456789";

fn cfg(server: &Server) -> config::Endpoint {
    config::Endpoint {
        base_url: server.url.clone(),
        model: "some-model".into(),
        seconds: 1.5,
        tries: 3,
        longest_wait: 0.2,
        ..config::Endpoint::default()
    }
}

fn ask(endpoint: &Endpoint, texts: &[&str]) -> Vec<Result<ChatReply, ChatError>> {
    let requests: Vec<_> = texts.iter().map(|t| ChatRequest::user(*t, 7, 20)).collect();
    endpoint.chat(&requests, &SamplingOptions::temperature(0.7), None)
}

fn reply(text: &str) -> Act {
    Act::Reply(text.into())
}

fn busy(status: u16, headers: &'static str) -> Act {
    Act::Status(status, headers, r#"{"error": {"message": "come back later", "code": null}}"#.into())
}

#[test]
fn a_request_goes_out_as_servers_want_it() {
    let server = Server::start([reply("a chair")]);
    let endpoint = Endpoint::new("eyes", &config::Endpoint { send_top_k: true, ..cfg(&server) }).unwrap();
    let picture = image::RgbImage::from_fn(3, 2, |x, y| image::Rgb([x as u8, y as u8, 9]));
    let request = ChatRequest {
        messages: vec![Message::user("What is it?").with_images(vec![picture.clone()])],
        stop: vec!["\n".into()],
        ..ChatRequest::user("", 5, 20)
    };
    let opts = SamplingOptions { top_k: Some(20), top_p: Some(0.8), ..SamplingOptions::temperature(0.7) };
    let mut pieces = Vec::new();
    let mut hear = |i: usize, piece: &str| pieces.push((i, piece.to_owned()));
    let got = endpoint.chat(&[request], &opts, Some(&mut hear)).remove(0).unwrap();
    let want = ChatReply {
        text: "a chair".into(),
        finish: Finish::Stop,
        prompt_tokens: 10,
        new_tokens: 5,
        trace: None,
    };
    assert_eq!(got, want);
    assert_eq!(pieces, [(0, "a chair".to_owned())]);
    let heard = server.heard().remove(0);
    assert!(heard.head.starts_with("POST /v1/chat/completions HTTP/1.1"), "{}", heard.head);
    assert!(!heard.head.to_lowercase().contains("authorization"));
    let mut body = heard.body;
    let url = body["messages"][0]["content"][0]["image_url"]["url"].take();
    let png = url.as_str().unwrap().strip_prefix("data:image/png;base64,").unwrap().to_owned();
    let png = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, png).unwrap();
    assert_eq!(image::load_from_memory(&png).unwrap().to_rgb8(), picture);
    let want = json!({
        "model": "some-model", "temperature": 0.7, "top_p": 0.8, "top_k": 20, "seed": 5, "max_tokens": 20,
        "stop": ["\n"],
        "messages": [{ "role": "user", "content": [
            { "type": "image_url", "image_url": { "url": null } },
            { "type": "text", "text": "What is it?" },
        ] }],
    });
    assert_eq!(body, want);
}

#[test]
fn what_a_server_takes_beside_is_the_users_to_say() {
    let server = Server::start([reply("[x] max(boxes, key=len)")]);
    let extra = "chat_template_kwargs = { enable_thinking = false }".parse().unwrap();
    let cfg = config::Endpoint { send_temperature: false, extra, ..cfg(&server) };
    let got = ask(&Endpoint::new("eyes", &cfg).unwrap(), &["Is it?"]).remove(0).unwrap();
    let body = server.heard().remove(0).body;
    assert_eq!(body["chat_template_kwargs"], json!({ "enable_thinking": false }));
    assert!(body.get("temperature").is_none() && body.get("seed").is_some());
    // What stands for a key where none is wanted is a word as any other.
    assert_eq!(got.text, "[x] max(boxes, key=len)");
}

/// Of many requests those under way learn it for themselves, the rest are not sent.
#[test]
fn a_refused_key_is_offered_no_more() {
    let server = Server::start([busy(401, "")]);
    let endpoint = Endpoint::new("judge", &config::Endpoint { concurrency: 2, ..cfg(&server) }).unwrap();
    let all = ask(&endpoint, &["Is it?"; 40]);
    assert!(all.iter().all(|r| r.as_ref().is_err_and(|e| e.to_string().contains("refuses the key"))));
    assert!(server.heard().len() <= 2, "{}", server.heard().len());
}

/// What was paid for is not lost to a full disk.
#[test]
fn a_cache_that_cannot_be_written_to_costs_no_reply() {
    let server = Server::start([reply("yes")]);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "no folder").unwrap();
    let cfg = config::Endpoint { cache: file.display().to_string(), ..cfg(&server) };
    let got = ask(&Endpoint::new("judge", &cfg).unwrap(), &["Is it?"]).remove(0).unwrap();
    assert_eq!(got.text, "yes");
}

#[test]
fn passing_faults_are_tried_again_and_final_ones_are_not() {
    let unpaid = r#"{"error": {"message": "pay first", "code": "insufficient_quota"}}"#;
    let filtered = completion("x").replace("\"stop\"", "\"content_filter\"");
    // As of a model all of whose tokens went into thinking.
    let thought =
        r#"{"choices": [{"finish_reason": "length"}], "usage": {"prompt_tokens": 3, "total_tokens": 9}}"#;
    // What the server does, the reply or words of the error, requests it got, tries counted as failed,
    // calls billed, and whether the endpoint is of no further use.
    let cases: Vec<(Vec<Act>, Result<&str, &str>, usize, u64, u64, bool)> = vec![
        (vec![busy(500, ""), reply("yes")], Ok("yes"), 2, 1, 1, false),
        (vec![busy(429, "retry-after: 0\r\n"), reply("yes")], Ok("yes"), 2, 1, 1, false),
        (vec![Act::Cut, Act::Close, reply("yes")], Ok("yes"), 3, 2, 1, false),
        (vec![Act::Hang, reply("yes")], Ok("yes"), 2, 1, 1, false),
        (vec![Act::Body("<html>".into()), reply("yes")], Ok("yes"), 2, 1, 1, false),
        (vec![busy(503, "")], Err("come back later (tried 3 times)"), 3, 3, 0, false),
        (vec![Act::Hang], Err("deadline"), 3, 3, 0, false),
        (vec![Act::Drip], Err("deadline"), 3, 3, 0, false),
        (vec![Act::Cut], Err("tried 3 times"), 3, 3, 0, false),
        (vec![Act::Close], Err("tried 3 times"), 3, 3, 0, false),
        (vec![Act::Body("{}".into())], Err("no chat completion"), 3, 3, 0, false),
        (vec![Act::Body(completion("x").replace("\"x\"", "null")), reply("yes")], Ok("yes"), 2, 1, 2, false),
        (vec![reply("")], Err("the reply is empty (tried 3 times)"), 3, 3, 3, false),
        (vec![Act::Body(r#"{"choices": []}"#.into())], Err("no choice"), 3, 3, 3, false),
        (vec![Act::Body(r#"{"usage": {"prompt_tokens": 3}}"#.into())], Err("no choice"), 3, 3, 3, false),
        (vec![Act::Body(thought.into())], Ok(""), 1, 0, 1, false),
        (vec![Act::Huge(40)], Err("longer than 1024 kB (max_reply_kb)"), 1, 1, 0, false),
        (vec![Act::Body(filtered)], Err("content_filter"), 1, 1, 1, false),
        (vec![busy(429, "retry-after: 60\r\n")], Err("asks to wait 60 s"), 1, 1, 0, false),
        (vec![busy(400, "")], Err("refuses the request, status 400: come back later"), 1, 1, 0, false),
        (vec![busy(401, "")], Err("refuses the key"), 1, 1, 0, true),
        (vec![busy(402, "")], Err("nothing left to pay with"), 1, 1, 0, true),
        (vec![busy(404, "")], Err("no such address or model"), 1, 1, 0, true),
        (vec![Act::Status(429, "", unpaid.into())], Err("quota is used up"), 1, 1, 0, true),
        (
            vec![Act::Status(307, "location: http://127.0.0.1:1/\r\n", String::new())],
            Err("redirects"),
            1,
            1,
            0,
            true,
        ),
    ];
    std::thread::scope(|s| {
        for (acts, want, requests, failed, calls, closed) in cases {
            s.spawn(move || {
                let label = format!("{acts:?}");
                let server = Server::start(acts);
                let endpoint = Endpoint::new("judge", &cfg(&server)).unwrap();
                let started = Instant::now();
                let got = ask(&endpoint, &["Is it?"]).remove(0);
                // Three deadlines and the waits between, on a busy machine.
                assert!(started.elapsed() < Duration::from_secs(30), "{label}");
                match (got, want) {
                    (Ok(got), Ok(want)) => assert_eq!(got.text, want),
                    (Err(e), Err(want)) => {
                        let text = e.to_string();
                        assert!(
                            text.contains(want) && text.contains("endpoint judge (some-model): "),
                            "{label}: {text}"
                        );
                        assert!(!text.contains('\n') && text.len() < 500, "{label}: {text}");
                        assert_eq!(e.is_of_model(), closed, "{label}");
                    }
                    (got, _) => panic!("{label}: {got:?}"),
                }
                assert_eq!(server.heard().len(), requests, "{label}");
                let usage = endpoint.usage().unwrap();
                assert_eq!((usage.failed, usage.calls), (failed, calls), "{label}");
            });
        }
    });
}

#[test]
fn a_server_that_is_not_there_is_said_so() {
    let gone =
        config::Endpoint { base_url: "http://127.0.0.1:9/v1".into(), ..cfg(&Server::start([Act::Hang])) };
    let e = ask(&Endpoint::new("judge", &gone).unwrap(), &["Is it?"]).remove(0).unwrap_err();
    assert!(e.to_string().contains("cannot reach the server") && !e.is_of_model(), "{e}");
}

#[test]
fn replies_keep_their_places_and_calls_their_number() {
    let server = Server::start([Act::Echo(30)]);
    let endpoint = Endpoint::new("many", &config::Endpoint { concurrency: 4, ..cfg(&server) }).unwrap();
    let texts: Vec<String> = (0..24).map(|i| format!("number {i}")).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let replies = ask(&endpoint, &texts);
    for (reply, text) in replies.iter().zip(&texts) {
        assert_eq!(&reply.as_ref().unwrap().text, text);
    }
    assert!((2..=4).contains(&server.most_at_once()), "{}", server.most_at_once());
    let all = Usage { calls: 24, prompt_tokens: 240, new_tokens: 120, ..Usage::default() };
    assert_eq!(endpoint.usage().unwrap(), all);
}

#[test]
fn a_budget_is_passed_by_no_more_than_the_calls_in_flight() {
    let server = Server::start([Act::Echo(10)]);
    let priced = config::Endpoint {
        concurrency: 3,
        // 15 tokens a call: 1 USD.
        usd_per_million_prompt_tokens: 50_000.,
        usd_per_million_new_tokens: 100_000.,
        budget_usd: 4.,
        ..cfg(&server)
    };
    let endpoint = Endpoint::new("dear", &priced).unwrap();
    let replies = ask(&endpoint, &["a"; 30]);
    let answered = replies.iter().filter(|r| r.is_ok()).count();
    assert!((4..=4 + 2).contains(&answered), "{answered}");
    assert_eq!(server.heard().len(), answered, "nothing goes out when the money is spent");
    let e = replies.into_iter().find_map(Result::err).unwrap();
    assert!(e.is_of_model() && e.to_string().contains("the budget of 4 USD (budget_usd) is spent"), "{e}");
    assert!((endpoint.usage().unwrap().usd - answered as f64).abs() < 1e-9);
}

#[test]
fn a_reply_is_asked_for_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start([reply("first"), reply("second"), reply("third"), reply("fourth")]);
    let cached =
        config::Endpoint { cache: dir.path().display().to_string(), send_seed: false, ..cfg(&server) };
    let open = || Endpoint::new("kept", &cached).unwrap();
    let one = |endpoint: &Endpoint, text: &str, seed| {
        let opts = SamplingOptions::temperature(0.7);
        endpoint.chat(&[ChatRequest::user(text, seed, 20)], &opts, None).remove(0).unwrap().text
    };
    assert_eq!(one(&open(), "Is it?", 1), "first");
    let again = open();
    assert_eq!(one(&again, "Is it?", 1), "first");
    assert_eq!(again.usage().unwrap(), Usage { cached: 1, ..Usage::default() });
    // Another seed is another sample, though this server is not told of it.
    assert_eq!(one(&again, "Is it?", 2), "second");
    assert_eq!(one(&again, "Is it not?", 1), "third");
    // A spoilt entry is asked for anew.
    let mut files = vec![];
    for folder in std::fs::read_dir(dir.path()).unwrap() {
        files.extend(std::fs::read_dir(folder.unwrap().path()).unwrap().map(|f| f.unwrap().path()));
    }
    assert_eq!(files.len(), 3);
    for file in files {
        std::fs::write(file, "{\"text\": \"fir").unwrap();
    }
    assert_eq!(one(&again, "Is it?", 1), "fourth");
    assert_eq!(one(&open(), "Is it?", 1), "fourth");
}

#[test]
fn a_reply_that_does_not_fit_its_schema_is_no_reply() {
    let ask = |acts: Vec<Act>, temperature| {
        let server = Server::start(acts);
        let endpoint = Endpoint::new("judge", &cfg(&server)).unwrap();
        let schema = Schema::new(
            "verdict",
            json!({ "type": "object", "required": ["ok"], "properties": { "ok": { "type": "boolean" } } }),
        );
        let schema = Some(Arc::new(schema.unwrap()));
        let request = ChatRequest { schema, ..ChatRequest::user("Is it?", 1, 20) };
        let got = endpoint.chat(&[request], &SamplingOptions::temperature(temperature), None).remove(0);
        (got, server.heard(), endpoint.usage().unwrap())
    };
    let acts = vec![reply("Yes, it is."), reply(r#"{"ok": 1}"#), reply("```json\n{\"ok\": true}\n```")];
    let (got, heard, usage) = ask(acts, 0.7);
    assert_eq!(got.unwrap().text, r#"{"ok": true}"#);
    assert_eq!((heard.len(), usage.calls, usage.failed), (3, 3, 2));
    assert_eq!(heard[0].body["response_format"]["json_schema"]["name"], "verdict");
    // Without chance the next reply would be the same.
    for (temperature, calls) in [(0.7, 3), (0., 1)] {
        let (got, heard, _) = ask(vec![reply("Yes.")], temperature);
        assert!(got.unwrap_err().to_string().contains("the reply is no JSON for verdict"));
        assert_eq!(heard.len(), calls);
    }
}

#[test]
fn wrong_settings_are_named_before_anything_is_sent() {
    let server = Server::start([reply("yes")]);
    for (change, want) in [
        (config::Endpoint { base_url: "api.openai.com".into(), ..cfg(&server) }, "endpoints.gpt.base_url"),
        (config::Endpoint { base_url: "https://me:pass@host/v1".into(), ..cfg(&server) }, "no password"),
        (config::Endpoint { model: String::new(), ..cfg(&server) }, "endpoints.gpt.model"),
        (
            config::Endpoint { key_env: "VALOR_NO_SUCH_KEY".into(), ..cfg(&server) },
            "has no VALOR_NO_SUCH_KEY",
        ),
    ] {
        let e = Endpoint::new("gpt", &change).err().unwrap().to_string();
        assert!(e.contains(want) && !e.contains("pass@"), "{e}");
    }
    assert!(server.heard().is_empty());
}

fn files_below(dir: &Path, found: &mut Vec<(String, String)>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files_below(&path, found);
        } else {
            found.push((
                path.display().to_string(),
                String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into(),
            ));
        }
    }
}

/// The whole command, with a server as its planner that repeats the key wherever it can.
#[test]
fn infer_plans_on_an_endpoint_and_shows_its_key_to_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let program = format!("<plan>\n{KEY}\n</plan>\n<answer>\nfinal_answer = \"two {KEY}\"\n</answer>");
    let refusal = format!(r#"{{"error": {{"message": "wrong key: {KEY}", "code": null}}}}"#);
    let server = Server::start([
        Act::Status(500, "", refusal.clone()),
        Act::Reply(program),
        Act::Status(401, "", refusal),
    ]);
    let run = |more: &[&str]| {
        let mut sets = vec![
            format!("endpoints.gpt.base_url={}", server.url),
            "endpoints.gpt.model=some-model".into(),
            "endpoints.gpt.key_env=VALOR_TEST_KEY".into(),
            "endpoints.gpt.longest_wait=0.2".into(),
            format!("endpoints.gpt.cache={}", dir.path().join("cache").display()),
            "planner.model=endpoint:gpt".into(),
        ];
        sets.extend(more.iter().map(|s| s.to_string()));
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_valor"));
        command.args(["infer", "data/demo/room.png", "How many?", "--json"]).env("VALOR_TEST_KEY", KEY);
        for set in sets {
            command.args(["--set", &set]);
        }
        let out = command.output().unwrap();
        let text = |b: Vec<u8>| String::from_utf8(b).unwrap();
        (out.status.code(), text(out.stdout), text(out.stderr))
    };
    let (code, stdout, stderr) = run(&[]);
    assert_eq!(code, Some(0), "{stderr}");
    let trace: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(trace["answer"], "two [key]");
    assert_eq!(trace["endpoints"]["gpt"]["calls"], 1);
    assert_eq!(trace["models"]["planner"], "some-model");
    assert!(server.heard()[0].head.contains(KEY), "it is sent");
    // Another question's seed is another call, and this time the key is refused.
    let (code, refused, why) = run(&["planner.temperature=0.1"]);
    assert_eq!(code, Some(1), "{why}");
    assert!(why.contains("refuses the key") && why.contains("wrong key: [key]"), "{why}");
    let mut written = vec![];
    files_below(dir.path(), &mut written);
    assert_eq!(written.len(), 1, "one reply is kept");
    for (what, text) in written.iter().map(|(p, t)| (p.as_str(), t)).chain([
        ("stdout", &stdout),
        ("stderr", &stderr),
        ("stdout", &refused),
        ("stderr", &why),
    ]) {
        assert!(!text.contains(KEY) && !text.contains("very-secret"), "{what}: {text}");
    }
}
