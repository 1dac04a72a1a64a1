//! A chat server that behaves as it is told to.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

#[derive(Clone, Debug)]
pub enum Act {
    /// A proper reply of 10 prompt tokens and 5 new ones.
    Reply(String),
    /// What it makes of the texts of all turns.
    Judge(fn(&str) -> &'static str),
    /// What the last user turn said, after some milliseconds.
    Echo(u64),
    /// This status, with further header lines and a body.
    Status(u16, &'static str, String),
    /// A 200 with this body.
    Body(String),
    /// Nothing, for as long as the other side waits.
    Hang,
    /// The head and then a byte now and then.
    Drip,
    /// Half of what was announced.
    Cut,
    /// Closed without a word.
    Close,
    /// So many megabytes.
    Huge(usize),
}

#[derive(Clone, Debug)]
pub struct Heard {
    pub head: String,
    pub body: Value,
}

#[derive(Default)]
struct State {
    acts: Mutex<VecDeque<Act>>,
    heard: Mutex<Vec<Heard>>,
    now: AtomicUsize,
    most: AtomicUsize,
    over: AtomicBool,
}

pub struct Server {
    state: Arc<State>,
    pub url: String,
}

impl Server {
    /// Does one act after another, the last one for ever.
    pub fn start(acts: impl IntoIterator<Item = Act>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let state = Arc::new(State { acts: Mutex::new(acts.into_iter().collect()), ..State::default() });
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.over.load(Ordering::Relaxed) {
                    return;
                }
                let (state, stream) = (shared.clone(), stream.unwrap());
                std::thread::spawn(move || {
                    // A client that went away is no fault of the server's.
                    let _ = serve(&state, stream);
                });
            }
        });
        Self { state, url }
    }

    pub fn heard(&self) -> Vec<Heard> {
        self.state.heard.lock().unwrap().clone()
    }

    /// Most [`Act::Echo`]es that were under way at once.
    pub fn most_at_once(&self) -> usize {
        self.state.most.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.state.over.store(true, Ordering::Relaxed);
    }
}

/// The head and the JSON body of a request; `None` from a client that left.
pub fn request(stream: &TcpStream) -> std::io::Result<Option<(String, Value)>> {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head)? == 0 {
            return Ok(None);
        }
    }
    let length = head.to_lowercase().lines().find_map(|l| l.strip_prefix("content-length: ")?.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body)?;
    Ok(Some((head, serde_json::from_slice(&body).unwrap_or_default())))
}

fn serve(state: &State, mut stream: TcpStream) -> std::io::Result<()> {
    let Some((head, body)) = request(&stream)? else { return Ok(()) };
    state.heard.lock().unwrap().push(Heard { head, body: body.clone() });
    let act = {
        let mut acts = state.acts.lock().unwrap();
        if acts.len() > 1 { acts.pop_front() } else { acts.front().cloned() }
    };
    let mut send = |status: u16, headers: &str, body: &str| {
        let length = body.len();
        let head =
            format!("HTTP/1.1 {status} So\r\ncontent-length: {length}\r\nconnection: close\r\n{headers}\r\n");
        stream.write_all(head.as_bytes())?;
        stream.write_all(body.as_bytes())
    };
    let hold = || {
        while !state.over.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    match act.expect("told what to do") {
        Act::Reply(text) => send(200, "", &completion(&text)),
        Act::Judge(verdict) => send(200, "", &completion(verdict(&texts(&body["messages"])))),
        Act::Echo(ms) => {
            let now = state.now.fetch_add(1, Ordering::SeqCst) + 1;
            state.most.fetch_max(now, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(ms));
            // Before the client can know of it and ask again.
            state.now.fetch_sub(1, Ordering::SeqCst);
            let said = body["messages"].as_array().and_then(|m| m.last()).map(|m| m["content"].clone());
            send(200, "", &completion(said.unwrap_or_default().as_str().unwrap_or("pictures")))
        }
        Act::Status(status, headers, body) => send(status, headers, &body),
        Act::Body(body) => send(200, "", &body),
        Act::Hang => {
            hold();
            Ok(())
        }
        Act::Drip => {
            stream.write_all(b"HTTP/1.1 200 So\r\ncontent-length: 100000\r\n\r\n")?;
            while !state.over.load(Ordering::Relaxed) {
                stream.write_all(b" ")?;
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        }
        Act::Cut => {
            let body = completion("half of this");
            let head = format!("HTTP/1.1 200 So\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all(head.as_bytes())?;
            stream.write_all(&body.as_bytes()[..body.len() / 2])
        }
        Act::Close => Ok(()),
        Act::Huge(mb) => {
            stream
                .write_all(format!("HTTP/1.1 200 So\r\ncontent-length: {}\r\n\r\n", mb << 20).as_bytes())?;
            (0..mb).try_for_each(|_| stream.write_all(&vec![b'x'; 1 << 20]))
        }
    }
}

/// All strings under `text` and `content`, one after another.
fn texts(messages: &Value) -> String {
    match messages {
        Value::Array(all) => all.iter().map(texts).collect::<Vec<_>>().join("\n"),
        Value::Object(o) => ["content", "text"].iter().filter_map(|k| o.get(*k)).map(texts).collect(),
        Value::String(s) => s.clone(),
        _ => String::new(),
    }
}

pub fn completion(text: &str) -> String {
    json!({
        "id": "1",
        "choices": [{ "index": 0, "message": { "role": "assistant", "content": text }, "finish_reason": "stop" }],
        "usage": { "prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15 },
    })
    .to_string()
}
