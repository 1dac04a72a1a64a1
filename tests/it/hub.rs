//! `valor models`: pulls from a hub that the test plays, into a cache of the test's.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// What is sent instead of a file's own bytes.
    spoilt: BTreeMap<String, Vec<u8>>,
    /// Bytes after which a connection is cut; 0: never.
    cut: usize,
    /// Milliseconds between 16 kB.
    slow: u64,
    /// Statuses for the next requests.
    refuse: Vec<u16>,
    /// Extra entries of the listing.
    hostile: Vec<Value>,
    heard: Vec<String>,
}

struct FakeHub {
    state: Arc<Mutex<State>>,
    url: String,
    home: tempfile::TempDir,
}

fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors")
}

fn id(name: &str, bytes: &[u8]) -> String {
    if is_large(name) {
        return hex(Sha256::digest(bytes));
    }
    let mut sha1 = Sha1::new();
    sha1.update(format!("blob {}\0", bytes.len()));
    sha1.update(bytes);
    hex(sha1.finalize())
}

impl FakeHub {
    fn start(files: &[(&str, usize)]) -> Self {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let mut state = State::default();
        for (name, len) in files {
            state.files.insert((*name).into(), (0..*len).map(|_| rng.random()).collect());
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(state));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (state, stream) = (shared.clone(), stream.unwrap());
                // A client that was killed is no fault of the server's.
                std::thread::spawn(move || {
                    let _ = serve(&state, stream);
                });
            }
        });
        Self { state, url, home: tempfile::tempdir().unwrap() }
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    fn command(&self, args: &[&str]) -> Command {
        self.valor(&[&["models"][..], args].concat())
    }

    fn valor(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_valor"));
        command.args(args).env("HF_ENDPOINT", &self.url).env("HF_HOME", self.home.path());
        for var in
            ["HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "ALL_PROXY"]
        {
            command.env_remove(var);
        }
        command.env("HF_TOKEN", "hf_secret");
        command
    }

    fn run(&self, args: &[&str]) -> (Option<i32>, String, String) {
        let out = self.command(args).output().unwrap();
        let text = |b: Vec<u8>| String::from_utf8(b).unwrap();
        let (stdout, stderr) = (text(out.stdout), text(out.stderr));
        assert!(!stdout.contains("hf_secret") && !stderr.contains("hf_secret"));
        (out.status.code(), stdout, stderr)
    }

    fn repo(&self) -> PathBuf {
        self.home.path().join("hub/models--acme--tiny")
    }

    /// The snapshot holds these files, right to the byte, and nothing is left half done.
    fn assert_whole(&self, folder: &Path, names: &[&str]) {
        let state = self.state.lock().unwrap();
        for name in names {
            assert_eq!(std::fs::read(folder.join(name)).unwrap(), state.files[*name], "{name}");
        }
        for blob in std::fs::read_dir(self.repo().join("blobs")).unwrap() {
            let name = blob.unwrap().file_name().into_string().unwrap();
            assert!(!name.contains('.'), "{name} is left");
        }
    }
}

fn serve(state: &Mutex<State>, mut stream: TcpStream) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head)? == 0 {
            return Ok(());
        }
    }
    assert!(head.contains("Bearer hf_secret"), "{head}");
    let path = head.split(' ').nth(1).unwrap().to_owned();
    let range = head
        .to_lowercase()
        .lines()
        .find_map(|l| Some(l.strip_prefix("range: bytes=")?.strip_suffix('-')?.to_owned()));
    let (status, body, slow, cut) = {
        let mut s = state.lock().unwrap();
        s.heard.push(format!("{path} {}", range.as_deref().unwrap_or("all")));
        let refused = (!s.refuse.is_empty()).then(|| s.refuse.remove(0));
        let body = if refused.is_some() {
            None
        } else if path.starts_with("/api/models/acme/tiny/revision/") {
            let mut files: Vec<Value> = (s.files.iter())
                .map(|(name, bytes)| {
                    let mut file =
                        json!({ "rfilename": name, "size": bytes.len(), "blobId": "0".repeat(40) });
                    match is_large(name) {
                        true => file["lfs"] = json!({ "sha256": id(name, bytes), "size": bytes.len() }),
                        false => file["blobId"] = id(name, bytes).into(),
                    }
                    file
                })
                .collect();
            files.extend(s.hostile.clone());
            Some(json!({ "sha": COMMIT, "siblings": files }).to_string().into_bytes())
        } else {
            let name = path.strip_prefix(&format!("/acme/tiny/resolve/{COMMIT}/")).map(str::to_owned);
            name.and_then(|n| s.spoilt.get(&n).or_else(|| s.files.get(&n)).cloned())
        };
        (refused.unwrap_or(if body.is_some() { 200 } else { 404 }), body.unwrap_or_default(), s.slow, s.cut)
    };
    let from: usize = range.map_or(0, |r| r.parse().unwrap());
    let (status, more) = match status {
        200 if from > 0 => {
            (206, format!("content-range: bytes {from}-{}/{}\r\n", body.len() - 1, body.len()))
        }
        status => (status, String::new()),
    };
    let body = &body[from.min(body.len())..];
    let length = body.len();
    let head = format!("HTTP/1.1 {status} So\r\ncontent-length: {length}\r\nconnection: close\r\n{more}\r\n");
    stream.write_all(head.as_bytes())?;
    let body = if cut > 0 { &body[..cut.min(length)] } else { body };
    for piece in body.chunks(16 << 10) {
        stream.write_all(piece)?;
        std::thread::sleep(Duration::from_millis(slow));
    }
    Ok(())
}

const FILES: &[(&str, usize)] = &[
    ("config.json", 300),
    ("README.md", 900),
    ("model-00001-of-00002.safetensors", 700_000),
    ("model-00002-of-00002.safetensors", 300_001),
    ("model.safetensors.index.json", 0),
    ("pytorch_model.bin", 5000),
    ("onnx/model.safetensors", 4000),
];
const WANTED: [&str; 4] = [
    "config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
];

#[test]
fn a_pull_brings_what_a_model_is_loaded_from_once() {
    let hub = FakeHub::start(FILES);
    let (code, stdout, stderr) = hub.run(&["pull", "hub:acme/tiny", "--dry-run"]);
    assert_eq!((code, stdout.lines().count()), (Some(0), 4), "{stderr}");
    assert!(!hub.repo().exists());
    let (code, stdout, stderr) = hub.run(&["pull", "hub:acme/tiny"]);
    assert_eq!(code, Some(0), "{stderr}");
    let folder = PathBuf::from(stdout.trim());
    assert_eq!(folder, hub.repo().join("snapshots").join(COMMIT));
    hub.assert_whole(&folder, &WANTED);
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 4);
    assert_eq!(std::fs::read_to_string(hub.repo().join("refs/main")).unwrap(), COMMIT);
    // The second time only the listing is asked for.
    hub.set(|s| s.heard.clear());
    let (code, _, stderr) = hub.run(&["pull", "hub:acme/tiny"]);
    assert!(code == Some(0) && stderr.contains(" 0 kB to fetch"), "{stderr}");
    assert_eq!(hub.state.lock().unwrap().heard.len(), 1);
    // And a configuration finds it without a network.
    let (code, stdout, _) = hub.run(&["list", "--json"]);
    let list: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, &list["held"][0]["repo"]), (Some(0), &json!("acme/tiny")));
    assert_eq!(list["held"][0]["bytes"], 1_000_301);
    let (code, _, stderr) = hub.run(&["rm", "hub:acme/tiny"]);
    assert!(code == Some(0) && stderr.contains("1 MB freed") && !hub.repo().exists(), "{stderr}");
}

#[test]
fn a_pulled_adapter_comes_whole_and_names_its_base() {
    let beside = ["adapter_config.json", "processor_config.json"];
    let hub = FakeHub::start(&[("adapter_model.safetensors", 3000), (beside[1], 40), ("README.md", 9)]);
    let adapter = |base: &str| {
        let config =
            json!({ "peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": base });
        hub.set(|s| drop(s.files.insert(beside[0].into(), config.to_string().into_bytes())));
        let (code, stdout, stderr) = hub.run(&["pull", "hub:acme/tiny"]);
        assert_eq!(code, Some(0), "{stderr}");
        (PathBuf::from(stdout.trim()), stderr)
    };
    let (folder, stderr) = adapter("Qwen/Qwen3-8B");
    assert!(stderr.contains("valor models pull hub:Qwen/Qwen3-8B"), "{stderr}");
    hub.assert_whole(&folder, &["adapter_model.safetensors", beside[0], beside[1]]);
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 3);
    hub.run(&["rm", "hub:acme/tiny"]);
    let (_, stderr) = adapter("/home/stranger/qwen");
    assert!(stderr.contains("/home/stranger/qwen") && stderr.contains("adapter_config.json"), "{stderr}");
}

#[test]
fn of_several_checkpoints_one_is_named_before_anything_is_fetched() {
    let hub = FakeHub::start(&[("swinb.pth", 900), ("swint.pth", 800), ("vocab.txt", 70)]);
    let (code, stdout, stderr) = hub.run(&["pull", "hub:acme/tiny"]);
    assert_eq!((code, &*stdout), (Some(2), ""), "{stderr}");
    let last = stderr.lines().last().unwrap();
    assert!(last.contains("(swinb.pth, swint.pth)") && last.contains("hub:acme/tiny#swinb.pth"), "{last}");
    assert_eq!(hub.state.lock().unwrap().heard.len(), 1, "the listing alone");
    let (code, stdout, stderr) = hub.run(&["pull", "hub:acme/tiny#swint.pth"]);
    assert_eq!(code, Some(0), "{stderr}");
    hub.assert_whole(Path::new(stdout.trim()), &["swint.pth", "vocab.txt"]);
    // What lies beside weights can be had without them.
    let (_, stdout, _) = hub.run(&["pull", "hub:acme/tiny#vocab.txt", "--dry-run"]);
    assert_eq!(stdout, "70 vocab.txt\n");
    // One of the usual names is the one that is meant.
    hub.set(|s| drop(s.files.insert("model.pt".into(), vec![1; 700])));
    let (_, stdout, _) = hub.run(&["pull", "hub:acme/tiny", "--dry-run"]);
    assert_eq!(stdout, "70 vocab.txt\n700 model.pt\n");
}

#[test]
fn a_pull_that_is_killed_ten_times_ends_with_the_right_files() {
    let hub = FakeHub::start(FILES);
    hub.set(|s| s.slow = 3);
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    for _ in 0..10 {
        let mut child = hub
            .command(&["pull", "hub:acme/tiny"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(rng.random_range(5..120)));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    hub.set(|s| s.slow = 0);
    let (code, stdout, stderr) = hub.run(&["pull", "hub:acme/tiny"]);
    assert_eq!(code, Some(0), "{stderr}");
    hub.assert_whole(Path::new(stdout.trim()), &WANTED);
    let resumed = hub
        .state
        .lock()
        .unwrap()
        .heard
        .iter()
        .filter(|h| h.contains("resolve") && !h.ends_with(" all"))
        .count();
    assert!(resumed > 0, "what a killed pull brought is not fetched again");
}

#[test]
fn cut_connections_and_busy_answers_are_gone_on_from() {
    let hub = FakeHub::start(FILES);
    hub.set(|s| (s.cut, s.refuse) = (120_000, vec![503, 429]));
    let (code, stdout, stderr) = hub.run(&["pull", "hub:acme/tiny"]);
    assert_eq!(code, Some(0), "{stderr}");
    hub.assert_whole(Path::new(stdout.trim()), &WANTED);
}

#[test]
fn a_wrong_hash_is_refused_and_named() {
    let hub = FakeHub::start(FILES);
    let name = "model-00002-of-00002.safetensors";
    hub.set(|s| {
        let mut bytes = s.files[name].clone();
        bytes[17] ^= 1;
        s.spoilt.insert(name.into(), bytes);
    });
    let (code, stdout, stderr) = hub.run(&["pull", "hub:acme/tiny"]);
    assert_eq!((code, &*stdout), (Some(1), ""));
    let want = id(name, &hub.state.lock().unwrap().files[name]);
    let last = stderr.lines().last().unwrap();
    assert!(last.contains(name) && last.contains("its hash is ") && last.contains(&want), "{last}");
    assert!(!hub.repo().join("snapshots").exists() && !hub.repo().join("refs").exists());
    // What was right is kept, what was wrong is not.
    hub.set(|s| {
        s.spoilt.clear();
        s.heard.clear();
    });
    let (code, stdout, stderr) = hub.run(&["pull", "hub:acme/tiny"]);
    assert_eq!(code, Some(0), "{stderr}");
    hub.assert_whole(Path::new(stdout.trim()), &WANTED);
    let heard = hub.state.lock().unwrap().heard.clone();
    assert!(
        !heard.iter().any(|h| h.contains("00001"))
            && heard.iter().any(|h| h.contains("00002-of-00002.safetensors all")),
        "{heard:?}"
    );

    // A disk that loses a bit is found, and mended.
    let blob = std::fs::canonicalize(Path::new(stdout.trim()).join(name)).unwrap();
    let mut bytes = std::fs::read(&blob).unwrap();
    bytes[5] ^= 4;
    std::fs::write(&blob, bytes).unwrap();
    let (code, stdout, stderr) = hub.run(&["verify", "--delete"]);
    assert_eq!((code, stdout.lines().count()), (Some(1), 2));
    assert!(stdout.contains(name) && stdout.contains(&want), "{stdout}");
    assert!(stdout.ends_with("hub:acme/tiny: 4 files hashed, 1 wrong\n"), "{stdout}");
    assert!(stderr.contains("valor models pull hub:acme/tiny brings it anew"), "{stderr}");
    let (code, stdout, _) = hub.run(&["pull", "hub:acme/tiny"]);
    assert_eq!(code, Some(0));
    hub.assert_whole(Path::new(stdout.trim()), &WANTED);
    let (code, stdout, _) = hub.run(&["verify", "hub:acme/tiny"]);
    assert_eq!((code, &*stdout), (Some(0), "hub:acme/tiny: 4 files hashed, 0 wrong\n"));
}

#[test]
fn verify_says_that_nothing_is_there() {
    let hub = FakeHub::start(&[]);
    let (code, stdout, stderr) = hub.run(&["verify"]);
    assert_eq!((code, &*stderr), (Some(0), ""));
    assert_eq!(stdout, format!("no models in {}\n", hub.home.path().join("hub").display()));
    let (code, stdout, stderr) = hub.run(&["verify", "hub:acme/tiny"]);
    assert!(code == Some(2) && stdout.is_empty() && stderr.contains("acme/tiny: is not in "), "{stderr}");
}

#[test]
fn verify_tells_from_the_headers_whether_a_checkpoint_fits() {
    let hub = FakeHub::start(FILES);
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/qwen3-tiny");
    let (code, stdout, stderr) = hub.run(&["verify", tiny.to_str().unwrap()]);
    assert_eq!((code, &*stderr), (Some(0), ""));
    assert!(stdout.contains("fits as planner, verifier: "), "{stdout}");
    // The same weights under another configuration.
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(tiny.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(tiny.join("config.json")).unwrap()).unwrap();
    config["num_hidden_layers"] = json!(config["num_hidden_layers"].as_u64().unwrap() + 1);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let (code, stdout, _) = hub.run(&["verify", "--headers", dir.path().to_str().unwrap()]);
    assert_eq!((code, stdout.lines().count()), (Some(1), 1), "{stdout}");
    assert!(stdout.contains("input_layernorm.weight is missing"), "{stdout}");
    let (code, stdout, _) = hub.run(&["verify", "--headers", "qwen3-8b"]);
    assert!(code == Some(1) && stdout.contains("valor models pull qwen3-8b"), "{stdout}");
}

#[test]
fn a_detector_without_a_tokenizer_takes_the_caches_or_says_what_to_pull() {
    let hub = FakeHub::start(&[]);
    let embedded = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/embedded/detector");
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(embedded.join(file), dir.path().join(file)).unwrap();
    }
    let verify = || hub.run(&["verify", "--headers", dir.path().to_str().unwrap()]);
    let (code, stdout, _) = verify();
    assert_eq!((code, stdout.lines().count()), (Some(1), 1), "{stdout}");
    assert!(stdout.contains("valor models pull hub:google-bert/bert-base-uncased#vocab.txt"), "{stdout}");
    let repo = hub.home.path().join("hub/models--google-bert--bert-base-uncased");
    let snapshot = repo.join("snapshots").join(COMMIT);
    std::fs::create_dir_all(repo.join("refs")).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::write(repo.join("refs/main"), COMMIT).unwrap();
    std::fs::copy(embedded.join("tokenizer.json"), snapshot.join("tokenizer.json")).unwrap();
    let (code, stdout, _) = verify();
    assert!(code == Some(0) && stdout.contains("fits as detector"), "{stdout}");
}

/// Nothing is wrong with what was asked for: 1, and not 2.
#[test]
fn no_network_and_no_disk_are_outages() {
    let hub = FakeHub::start(&[("a.gguf", 10)]);
    // Both wait between their tries, and so are started before the first is waited for.
    let silent: Vec<_> =
        [hub.command(&["pull", "hub:acme/tiny#a.gguf"]), hub.valor(&["eval", "pull", "vsr"])]
            .into_iter()
            .map(|mut command| {
                // A port that nobody listens on.
                command
                    .env("HF_ENDPOINT", "http://127.0.0.1:1")
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped());
                command.spawn().unwrap()
            })
            .collect();
    let outage = |out: std::process::Output, want: &str| {
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        let last = said.lines().last().unwrap_or_default();
        assert!(out.status.code() == Some(1) && out.stdout.is_empty() && last.contains(want), "{said}");
    };
    let vast = json!({ "rfilename": "v.gguf", "size": 1u64 << 60, "blobId": "0".repeat(40) });
    hub.set(|s| s.hostile = vec![vast]);
    outage(hub.command(&["pull", "hub:acme/tiny#v.gguf"]).output().unwrap(), "make room, or set HF_HOME");
    let file = hub.home.path().join("file");
    std::fs::write(&file, "").unwrap();
    let mut nowhere = hub.command(&["pull", "hub:acme/tiny#a.gguf"]);
    outage(nowhere.env("HF_HOME", &file).output().unwrap(), "set HF_HOME to another disk");
    for child in silent {
        outage(child.wait_with_output().unwrap(), "cannot reach the hub");
    }
}

#[test]
fn refusals_say_what_to_do() {
    let hub = FakeHub::start(&[("a.gguf", 10), ("b.gguf", 10)]);
    let says = |args: &[&str], want: &str| {
        let (code, _, stderr) = hub.run(args);
        assert_eq!(code, Some(2), "{stderr}");
        let last = stderr.lines().last().unwrap();
        assert!(last.contains(want), "{last}");
    };
    says(&["pull", "qwen3-8B"], "the nearest is qwen3-8b");
    says(&["pull", "hub:acme"], "hub:OWNER/NAME");
    says(&["pull", "hub:acme/none"], "no such repository");
    says(&["pull", "hub:acme/tiny"], "choose one, such as hub:acme/tiny#a.gguf");
    says(&["pull", "hub:acme/tiny#c.gguf"], "holds no c.gguf");
    says(&["rm", "hub:acme/tiny"], "is not in ");
    hub.set(|s| s.refuse = vec![403]);
    says(&["pull", "hub:acme/tiny"], "set HF_TOKEN");
    for name in ["../../../tmp/x", "/etc/x", "a/../../x", "a\\b"] {
        hub.set(|s| s.hostile = vec![json!({ "rfilename": name, "size": 1, "blobId": "0".repeat(40) })]);
        says(&["pull", "hub:acme/tiny#a.gguf"], "impossible file");
    }
    hub.set(|s| s.hostile = vec![json!({ "rfilename": "x", "size": 1, "blobId": "../../x" })]);
    says(&["pull", "hub:acme/tiny#a.gguf"], "impossible file");
    let out = hub.command(&["pull", "hub:acme/tiny"]).env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert!(String::from_utf8_lossy(&out.stderr).contains("HF_HUB_OFFLINE forbids"));
    // A configuration that names what is not here says how to fetch it.
    let out = Command::new(env!("CARGO_BIN_EXE_valor"))
        .args(["infer", "data/demo/room.png", "How many?", "--set", "planner.model=qwen3-8b"])
        .env("HF_HOME", hub.home.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.code() == Some(2) && said.contains("valor models pull qwen3-8b"), "{said}");
}
