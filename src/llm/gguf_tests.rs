//! Chats with GGUF files: written here by candle, or by llama.cpp's own package (`tests/fixtures`).

use std::collections::HashMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::Init;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value as Json, json};

use super::bpe::{self, BpeOptions};
use super::engine::{EngineOptions, Network};
use super::local::LocalChat;
use super::template::CHATML;
use super::{ChatModel, ChatReply, ChatRequest, Message, Role, SamplingOptions};
use crate::models::qwen3::{Config, Qwen3};
use crate::nn::Params;
use crate::weights::{Checkpoint, ModelFiles};

const DTYPES: [GgmlDType; 7] = [
    GgmlDType::F32,
    GgmlDType::F16,
    GgmlDType::BF16,
    GgmlDType::Q8_0,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

/// What a file is to hold.
struct Parts {
    metadata: Vec<(String, Value)>,
    tensors: Vec<(String, QTensor)>,
}

impl Parts {
    fn bytes(&self) -> Vec<u8> {
        let metadata: Vec<(&str, &Value)> = self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<(&str, &QTensor)> = self.tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let mut out = Cursor::new(Vec::new());
        gguf_file::write(&mut out, &metadata, &tensors).unwrap();
        out.into_inner()
    }

    fn write(&self, dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }

    fn set(&mut self, key: &str, value: Value) {
        self.metadata.retain(|(k, _)| k != key);
        self.metadata.push((key.into(), value));
    }

    fn plain(&self) -> HashMap<String, Tensor> {
        let hub = |own: &str| NAMES.iter().fold(own.to_owned(), |name, (hub, own)| name.replace(own, hub));
        self.tensors.iter().map(|(n, t)| (hub(n), t.dequantize(&Device::Cpu).unwrap())).collect()
    }
}

/// Parts of names on the hub and in a file; longer ones first.
const NAMES: [(&str, &str); 15] = [
    ("model.layers.", "blk."),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
];

fn own_name(hub: &str) -> String {
    NAMES.iter().fold(hub.to_owned(), |name, (hub, own)| name.replace(hub, own))
}

/// A network in a file's terms: matrices of `dtype`, vectors of f32.
fn tensors(of: &HashMap<String, Tensor>, dtype: GgmlDType) -> Vec<(String, QTensor)> {
    let pack = |(name, t): (&String, &Tensor)| {
        let t = t.to_dtype(DType::F32).unwrap();
        let dtype = if t.rank() == 2 { dtype } else { GgmlDType::F32 };
        (own_name(name), QTensor::quantize(&t, dtype).unwrap())
    };
    let mut all: Vec<_> = of.iter().map(pack).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn metadata(cfg: &Config, tokenizer: &Json) -> Vec<(String, Value)> {
    let mut texts: Vec<(usize, &str, i32)> = Vec::new();
    for (text, id) in tokenizer["model"]["vocab"].as_object().unwrap() {
        texts.push((id.as_u64().unwrap() as usize, text, 1));
    }
    for t in tokenizer["added_tokens"].as_array().unwrap() {
        let kind = if t["special"] == true { 3 } else { 4 };
        texts.push((t["id"].as_u64().unwrap() as usize, t["content"].as_str().unwrap(), kind));
    }
    texts.sort_unstable();
    let merge = |m: &Json| format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap());
    let merges = tokenizer["model"]["merges"].as_array().unwrap();
    let id = |text: &str| Value::U32(texts.iter().find(|t| t.1 == text).unwrap().0 as u32);
    let n = |n: usize| Value::U32(n as u32);
    let pairs = [
        ("general.architecture", Value::String("qwen3".into())),
        ("qwen3.block_count", n(cfg.num_hidden_layers)),
        ("qwen3.embedding_length", n(cfg.hidden_size)),
        ("qwen3.feed_forward_length", n(cfg.intermediate_size)),
        ("qwen3.attention.head_count", n(cfg.num_attention_heads)),
        ("qwen3.attention.head_count_kv", n(cfg.num_key_value_heads)),
        ("qwen3.attention.key_length", n(cfg.head_dim)),
        ("qwen3.attention.value_length", n(cfg.head_dim)),
        ("qwen3.attention.layer_norm_rms_epsilon", Value::F32(cfg.rms_norm_eps as f32)),
        ("qwen3.context_length", n(cfg.max_position_embeddings)),
        ("qwen3.rope.freq_base", Value::F32(cfg.rope_theta as f32)),
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("qwen2".into())),
        ("tokenizer.ggml.tokens", Value::Array(texts.iter().map(|t| Value::String(t.1.into())).collect())),
        ("tokenizer.ggml.token_type", Value::Array(texts.iter().map(|t| Value::I32(t.2)).collect())),
        ("tokenizer.ggml.merges", Value::Array(merges.iter().map(|m| Value::String(merge(m))).collect())),
        ("tokenizer.ggml.eos_token_id", id("<|im_end|>")),
        ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
        ("tokenizer.chat_template", Value::String(CHATML.into())),
    ];
    pairs.map(|(k, v)| (k.to_owned(), v)).into()
}

fn trained(vocab_size: usize) -> Json {
    let special_tokens = ["<|im_start|>", "<|im_end|>"].map(String::from).to_vec();
    let texts = ["user assistant system how many red chairs are there in the room?"; 4];
    serde_json::from_str(&bpe::train(texts, &BpeOptions { vocab_size, special_tokens }).unwrap()).unwrap()
}

fn config(vocab: usize, width: usize, tied: bool) -> Config {
    serde_json::from_value(json!({
        "vocab_size": vocab, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width / 4, "rope_theta": 1e6,
        "max_position_embeddings": 512, "tie_word_embeddings": tied,
    }))
    .unwrap()
}

/// A random network, whose next token depends strongly on the prompt.
fn random(width: usize, tied: bool, dtype: GgmlDType) -> (Config, Parts) {
    let cfg = config(300, width, tied);
    let p = Params::new(11);
    let table = (cfg.vocab_size, width);
    let wide = |stdev| Init::Randn { mean: 0., stdev };
    p.builder().get_with_hints(table, "model.embed_tokens.weight", wide(1.)).unwrap();
    if !tied {
        p.builder().get_with_hints(table, "lm_head.weight", wide(0.7)).unwrap();
    }
    Qwen3::new(&cfg, p.builder()).unwrap();
    let parts = Parts { metadata: metadata(&cfg, &trained(300)), tensors: tensors(&p.tensors(), dtype) };
    (cfg, parts)
}

fn open(path: &Path) -> std::result::Result<LocalChat, String> {
    let files = ModelFiles::open(path.to_str().unwrap(), "planner").map_err(|e| e.to_string())?;
    LocalChat::from_files(&files, &Device::Cpu, EngineOptions::default()).map_err(|e| e.to_string())
}

fn logits(network: &Network, rows: &[Vec<u32>]) -> Result<Tensor> {
    network.decoder().logits(&network.hidden(rows, None)?)
}

/// Root mean square of the difference, by that of what is wanted.
fn error(got: &Tensor, want: &Tensor) -> f32 {
    let rms = |t: &Tensor| t.sqr()?.mean_all()?.to_scalar::<f32>().map(f32::sqrt);
    rms(&(got - want).unwrap()).unwrap() / rms(want).unwrap()
}

fn rows() -> Vec<Vec<u32>> {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    (0..5).map(|_| (0..23).map(|_| rng.random_range(0..300)).collect()).collect()
}

fn ask(chat: &LocalChat, texts: &[&str]) -> Vec<ChatReply> {
    let requests: Vec<_> = texts.iter().map(|t| ChatRequest::user(*t, 1, 24)).collect();
    let opts = SamplingOptions { temperature: 0., trace: true, ..SamplingOptions::default() };
    chat.chat(&requests, &opts, None).into_iter().collect::<std::result::Result<_, _>>().unwrap()
}

#[test]
fn gguf_logits_are_those_of_the_same_weights_in_f32() {
    let dir = tempfile::tempdir().unwrap();
    for (dtype, tied) in DTYPES.into_iter().flat_map(|d| [(d, false), (d, true)]) {
        let (cfg, parts) = random(256, tied, dtype);
        let path = parts.write(dir.path(), "a.gguf");
        let chat = open(&path).unwrap();
        assert_eq!(chat.engine().network().config(), &cfg);
        let plain = Checkpoint::from_tensors("plain", parts.plain());
        let model = plain.build(DType::F32, &Device::Cpu, &[], |vb| Qwen3::new(&cfg, vb)).unwrap();
        let want = logits(&Network::Text { model, cfg: cfg.clone() }, &rows()).unwrap();
        let error = error(&logits(chat.engine().network(), &rows()).unwrap(), &want);
        println!("{dtype:?}, tied {tied}: {error:.1e}");
        let quantized = matches!(dtype, GgmlDType::Q8_0 | GgmlDType::Q4K | GgmlDType::Q5K | GgmlDType::Q6K);
        assert!(error < if quantized { 0.03 } else { 1e-5 }, "{dtype:?}, tied {tied}: {error}");
        // In memory it is what it is in the file, vectors and what is widened apart.
        let packs = quantized || dtype == GgmlDType::F16;
        let bytes = |t: &QTensor| match packs && t.rank() == 2 {
            true => t.storage_size_in_bytes(),
            false => 4 * t.shape().elem_count(),
        };
        let want: usize = parts.tensors.iter().map(|(_, t)| bytes(t)).sum();
        assert_eq!(Checkpoint::open(&path).unwrap().packed_bytes(), Some(want as u64), "{dtype:?}");
        for (name, t) in Checkpoint::open(&path).unwrap().tensors().unwrap() {
            let (got, want) = (t.to_dtype(DType::F32).unwrap(), &parts.plain()[&name]);
            assert_eq!(
                (&got - want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap(),
                0.
            );
        }
    }
}

#[test]
fn gguf_rows_do_not_depend_on_their_batch() {
    let dir = tempfile::tempdir().unwrap();
    for dtype in [GgmlDType::F16, GgmlDType::Q8_0, GgmlDType::Q4K, GgmlDType::Q6K] {
        let (_, parts) = random(256, true, dtype);
        let chat = open(&parts.write(dir.path(), "a.gguf")).unwrap();
        let network = chat.engine().network();
        let all = logits(network, &rows()).unwrap();
        for (i, row) in rows().into_iter().enumerate() {
            let one = logits(network, &[row]).unwrap();
            let same = all.narrow(0, i, 1).unwrap();
            // Of halves, as of f32 numbers, few rows are multiplied otherwise than many.
            let most = if dtype == GgmlDType::F16 { 1e-5 } else { 0. };
            assert!(error(&one, &same) <= most, "{dtype:?}, row {i}");
        }
        // As many tokens each, so that nothing is padded.
        let texts = ["n = 1", "n = 2", "n = 3"];
        let together = ask(&chat, &texts);
        assert!(together.iter().all(|r| r.new_tokens > 0));
        for (text, reply) in texts.iter().zip(together) {
            assert_eq!(ask(&chat, &[text])[0], reply, "{dtype:?}");
        }
    }
}

#[test]
fn gguf_of_the_embedded_planner_says_the_same() {
    let files = ModelFiles::open("embedded-base", "planner").unwrap();
    let cfg: Config = files.json("config.json").unwrap();
    let tokenizer: Json = files.json("tokenizer.json").unwrap();
    let weights = files.checkpoint().unwrap().tensors().unwrap();
    let own = LocalChat::from_files(&files, &Device::Cpu, EngineOptions::default()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let ids = own.format.tokenizer.encode("how many red chairs are left of the table").unwrap();
    let want = logits(own.engine().network(), std::slice::from_ref(&ids)).unwrap();
    for (dtype, most) in [(GgmlDType::F16, 1e-5), (GgmlDType::Q8_0, 0.1)] {
        let parts = Parts { metadata: metadata(&cfg, &tokenizer), tensors: tensors(&weights, dtype) };
        let chat = open(&parts.write(dir.path(), "planner.gguf")).unwrap();
        // Where Qwen's split cuts a text as that of the embedded models does, it is the same tokenizer.
        let (theirs, ours) = (&chat.format.tokenizer, &own.format.tokenizer);
        assert_eq!(theirs.vocab_size(), ours.vocab_size());
        for text in [
            "How many red chairs are left of the table?",
            "<|im_start|>user\nWhat is 12 + 345?<|im_end|>\n",
            "incomprehensibilities, déjà vu 日本語 🪑",
            "",
        ] {
            assert_eq!(theirs.encode(text).unwrap(), ours.encode(text).unwrap(), "{text:?}");
            assert_eq!(
                theirs.decode(&ours.encode(text).unwrap()).unwrap(),
                text.replace("<|im_start|>", "").replace("<|im_end|>", "")
            );
        }
        assert_eq!(chat.format.end, own.format.end);
        let got = logits(chat.engine().network(), std::slice::from_ref(&ids)).unwrap();
        let error = error(&got, &want);
        println!("planner, {dtype:?}: {error:.1e}");
        assert!(error < most, "{dtype:?}: {error}");
        if dtype == GgmlDType::F16 {
            let texts = ["How many red chairs are there?", "What color is the bed?"];
            let said = |chat| ask(chat, &texts).into_iter().map(|r| r.text).collect::<Vec<_>>();
            assert_eq!(said(&chat), said(&own));
            assert!(said(&own).iter().all(|text| !text.is_empty()));
        }
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf-qwen3").join(name)
}

#[test]
fn gguf_of_llama_cpp_gives_transformers_ids_and_logits() {
    let chat = open(&fixture("model.gguf")).unwrap();
    let text = std::fs::read_to_string(fixture("expected.json")).unwrap();
    let expected: Json = serde_json::from_str(&text).unwrap();
    let ids = |v: &Json| -> Vec<u32> { serde_json::from_value(v.clone()).unwrap() };
    for case in expected["texts"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(chat.format.tokenizer.encode(text).unwrap(), ids(&case["ids"]), "{text:?}");
    }
    let said = |m: &Json| {
        let role = if m["role"] == "system" { Role::System } else { Role::User };
        Message::new(role, m["content"].as_str().unwrap())
    };
    let messages: Vec<Message> = expected["chat"].as_array().unwrap().iter().map(said).collect();
    let prompt = chat.format.prompt(&messages, &Device::Cpu).unwrap().ids;
    assert_eq!(prompt, ids(&expected["chat_ids"]));
    let want: Vec<f32> = serde_json::from_value(expected["logits"].clone()).unwrap();
    let want = Tensor::new(want, &Device::Cpu).unwrap();
    let got = logits(chat.engine().network(), std::slice::from_ref(&prompt)).unwrap();
    let last = got.narrow(1, prompt.len() - 1, 1).unwrap().flatten_all().unwrap();
    let packed = error(&last, &want);
    // Unpacked, nothing is rounded but f32.
    let files = ModelFiles::open(fixture("model.gguf").to_str().unwrap(), "planner").unwrap();
    let cfg: Config = files.json("config.json").unwrap();
    let plain = Checkpoint::from_tensors("plain", files.checkpoint().unwrap().tensors().unwrap());
    let model = plain.build(DType::F32, &Device::Cpu, &[], |vb| Qwen3::new(&cfg, vb)).unwrap();
    let got = logits(&Network::Text { model, cfg }, std::slice::from_ref(&prompt)).unwrap();
    let last = got.narrow(1, prompt.len() - 1, 1).unwrap().flatten_all().unwrap();
    let unpacked = error(&last, &want);
    println!("llama.cpp's file: {packed:.1e} packed, {unpacked:.1e} unpacked");
    assert!(packed < 0.03 && unpacked < 1e-4, "{packed} packed, {unpacked} unpacked");
    // <|im_end|> and <|endoftext|> both end a reply.
    let ends = files.json::<Json>("generation_config.json").unwrap();
    assert_eq!(ends["eos_token_id"].as_array().unwrap().len(), 2);
}

#[test]
fn gguf_files_that_do_not_fit_are_one_line_with_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let text = |s: &str| Value::String(s.into());
    let strings = |all: &[&str]| Value::Array(all.iter().map(|s| text(s)).collect());
    let cases: Vec<(&str, Option<Value>, &[&str])> = vec![
        ("general.architecture", Some(text("llama")), &["general.architecture is \"llama\"", "only qwen3"]),
        ("general.architecture", None, &["general.architecture is missing"]),
        ("general.alignment", Some(Value::U32(0)), &["general.alignment is no power of two"]),
        ("split.count", Some(Value::U16(3)), &["one of several parts", "--merge"]),
        ("qwen3.block_count", None, &["qwen3.block_count is missing"]),
        ("qwen3.block_count", Some(text("2")), &["qwen3.block_count is \"2\", expected a whole number"]),
        ("qwen3.block_count", Some(Value::U32(1 << 24)), &["qwen3.block_count is 16777216, with 25 tensors"]),
        ("qwen3.block_count", Some(Value::U64(u64::MAX)), &["qwen3.block_count is 18446744073709551615"]),
        (
            "qwen3.block_count",
            Some(Value::U32(3)),
            &["blk.2.attn_q.weight is missing", "blk.2.ffn_up.weight"],
        ),
        ("qwen3.block_count", Some(Value::U32(1)), &["blk.1.ffn_down.weight is not part of this network"]),
        (
            "qwen3.feed_forward_length",
            Some(Value::U32(1 << 24)),
            &["blk.0.ffn_gate.weight has shape [128, 64]"],
        ),
        ("qwen3.attention.head_count", Some(Value::U32(3)), &["num_attention_heads 3 is not a multiple"]),
        ("qwen3.attention.head_count", Some(Value::I32(-4)), &["qwen3.attention.head_count is -4"]),
        ("qwen3.attention.value_length", Some(Value::U32(8)), &["value_length is 8, and heads have 16"]),
        ("qwen3.rope.freq_base", Some(Value::F32(f32::NAN)), &["qwen3.rope.freq_base is NaN"]),
        ("qwen3.rope.scaling.type", Some(text("yarn")), &["qwen3.rope.scaling.type is \"yarn\""]),
        ("tokenizer.ggml.model", Some(text("llama")), &["tokenizer.ggml.model is \"llama\"; only gpt2"]),
        ("tokenizer.ggml.pre", Some(text("llama-bpe")), &["tokenizer.ggml.pre is \"llama-bpe\"; only qwen2"]),
        ("tokenizer.ggml.tokens", Some(Value::U8(1)), &["tokenizer.ggml.tokens is 1, expected an array"]),
        ("tokenizer.ggml.tokens", Some(strings(&["a"])), &["token_type has ", "tokens 1"]),
        ("tokenizer.ggml.token_type", Some(strings(&["a"])), &["expected an array of whole numbers"]),
        (
            "tokenizer.ggml.merges",
            Some(strings(&["a zebra"])),
            &["tokenizer.ggml.merges, entry 0: \"a zebra\""],
        ),
        (
            "tokenizer.ggml.eos_token_id",
            Some(Value::U32(300)),
            &["eos_token_id is 300, expected an id below"],
        ),
        ("tokenizer.ggml.add_bos_token", Some(Value::Bool(true)), &["add_bos_token is true"]),
        ("tokenizer.chat_template", None, &["has no tokenizer.chat_template", "base model"]),
        ("tokenizer.chat_template", Some(text("{% for %}")), &["chat template"]),
    ];
    for (key, value, wanted) in cases {
        let (_, mut parts) = random(64, false, GgmlDType::F16);
        parts.metadata.retain(|(k, _)| k != key);
        if let Some(value) = value {
            parts.set(key, value);
        }
        let e = open(&parts.write(dir.path(), "bad.gguf")).err().unwrap();
        assert!(!e.contains('\n') && wanted.iter().all(|w| e.contains(w)), "{key}: {e}");
        // The template's errors are those of the renderer.
        assert!(e.contains("bad.gguf") || key.ends_with("template"), "{key}: {e}");
    }
    // Tensors: one error names all.
    let (_, mut parts) = random(64, false, GgmlDType::F16);
    let zeros = Tensor::zeros((64, 64), DType::F32, &Device::Cpu).unwrap();
    parts.tensors.retain(|(name, _)| name != "blk.1.ffn_up.weight" && name != "blk.0.attn_q.weight");
    parts.tensors.push(("blk.0.attn_q.weight".into(), QTensor::quantize(&zeros, GgmlDType::Q4_0).unwrap()));
    parts.tensors.push(("rope_freqs.weight".into(), QTensor::quantize(&zeros, GgmlDType::F32).unwrap()));
    let e = open(&parts.write(dir.path(), "bad.gguf")).err().unwrap();
    for part in [
        "bad.gguf",
        "blk.1.ffn_up.weight is missing",
        "blk.0.attn_q.weight is of Q4_0, which is not read",
        "rope_freqs.weight is not part of this network",
    ] {
        assert!(e.contains(part), "{e}");
    }
}

#[test]
fn damaged_gguf_files_are_errors_and_nothing_worse() {
    let dir = tempfile::tempdir().unwrap();
    let (_, parts) = random(32, true, GgmlDType::Q8_0);
    let whole = parts.bytes();
    let path = dir.path().join("damaged.gguf");
    let attempt = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        open(&path)
    };
    assert!(attempt(&whole).is_ok());
    // Cut off, at each byte of the beginning, then here and there (not in the padding at the end).
    for n in (0..200).chain((200..whole.len() - 32).step_by(61)) {
        let e = attempt(&whole[..n]).err().unwrap_or_else(|| panic!("{n} of {} bytes do", whole.len()));
        assert!(e.contains("damaged.gguf") && !e.contains('\n'), "{n}: {e}");
    }
    // Bytes changed: an error, or a network with other numbers.
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let header = whole.len() - parts.tensors.iter().map(|(_, t)| t.storage_size_in_bytes()).sum::<usize>();
    let mut refused = 0;
    for i in 0..1500 {
        let mut bytes = whole.clone();
        for _ in 0..=i % 3 {
            let at = rng.random_range(0..header);
            bytes[at] = if i % 2 == 0 { rng.random() } else { 255 };
        }
        if let Err(e) = attempt(&bytes) {
            assert!(!e.is_empty() && e.len() < 4000, "{e}");
            refused += 1;
        }
    }
    assert!(refused > 300, "{refused}");
}
