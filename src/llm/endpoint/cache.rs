//! Replies on disk, by the hash of what was asked.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::wire::Body;
use crate::files::write_atomic;
use crate::llm::{ChatReply, Finish};

pub(super) struct Cache {
    dir: PathBuf,
}

/// What is kept of a reply; nothing of the request.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    text: String,
    finish: Finish,
    prompt_tokens: usize,
    new_tokens: usize,
}

impl Cache {
    pub fn new(dir: &str) -> Self {
        Self { dir: dir.into() }
    }

    /// Of everything that the reply hangs on: the server, the model, the messages with their pictures,
    /// the sampling, and the seed, of which a server may not be told: samples must differ all the same.
    pub fn key(url: &str, body: &Body, seed: u64) -> String {
        let mut hash = Sha256::new();
        hash.update(url.as_bytes());
        hash.update([0]);
        hash.update(seed.to_le_bytes());
        hash.update(body.bytes());
        hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }

    fn path(&self, key: &str) -> PathBuf {
        self.dir.join(&key[..2]).join(format!("{}.json", &key[2..]))
    }

    /// A spoilt entry is none; it will be written anew.
    pub fn get(&self, key: &str) -> Option<ChatReply> {
        let e: Entry = serde_json::from_slice(&std::fs::read(self.path(key)).ok()?).ok()?;
        let Entry { text, finish, prompt_tokens, new_tokens } = e;
        Some(ChatReply { text, finish, prompt_tokens, new_tokens, trace: None })
    }

    pub fn put(&self, key: &str, reply: &ChatReply) -> Result<(), String> {
        let entry = Entry {
            text: reply.text.clone(),
            finish: reply.finish,
            prompt_tokens: reply.prompt_tokens,
            new_tokens: reply.new_tokens,
        };
        let write = |w: &mut std::io::BufWriter<&std::fs::File>| Ok(serde_json::to_writer(w, &entry)?);
        write_atomic(&self.path(key), write).map_err(|e| format!("cannot keep the reply: {e}"))
    }
}
