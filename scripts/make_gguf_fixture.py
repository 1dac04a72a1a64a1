#!/usr/bin/env python3
"""A small Qwen3 as llama.cpp's gguf package writes it, with what transformers makes of it, for tests/fixtures/gguf-qwen3.

    python scripts/make_gguf_fixture.py --seed 3 --out tests/fixtures/gguf-qwen3     (gguf, torch, transformers)

The package cannot quantise to Q4_K, Q5_K and Q6_K: such tensors are random blocks, which it unpacks for torch.
"""
import argparse
import json
import os
from collections import Counter

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

HIDDEN, FF, HEADS, KV, DIM, MERGES = 256, 256, 2, 1, 64, 18

TEXTS = [
    "How many red chairs are there?",
    "x = gd_detect(img_pth, 'chair')\n\n    if len(x) == 12345:\n\treturn  x[0]\n",
    "I'll say it's HERE'S the 3rd;  we've\r\n\r\n  trailing   ",
    "<|im_start|>user\na<think>\n\nb</think><|im_end|>",
    "Cafe\u0301 de\u0301ja\u0300 \u1e9b\u0323 \uac00 \u1112\u1161\u11ab \u212b",
    "日本語、中文字符 \U0001fa91 \u200d ½ ٣٤ हिन्दी",
    "",
    "  \n \n",
]

TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


def byte_chars():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def learn(text, chars):
    """A few merges of the most frequent pairs of letters."""
    words = [[chars[b] for b in w.encode()] for w in text.split()]
    merges = []
    while len(merges) < MERGES:
        pairs = Counter(p for w in words for p in zip(w, w[1:]))
        best = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(best)
        for w in words:
            i = 0
            while i + 1 < len(w):
                if (w[i], w[i + 1]) == best:
                    w[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def blocks(rng, kind, rows, cols):
    """Random blocks whose numbers are about as large as a trained network's."""
    n = rows * cols // 256
    half = lambda v: np.full((n, 1), v, np.float16).view(np.uint8).reshape(n, 2)
    some = lambda k: rng.integers(0, 256, (n, k), np.uint8)
    if kind == T.Q6_K:
        scales = rng.integers(-60, 61, (n, 16)).astype(np.int8).view(np.uint8)
        data = [some(128), some(64), scales, half(1e-4)]
    else:
        # The smallest is taken from all: half of what the largest number can be.
        high = [some(32)] if kind == T.Q5_K else []
        d, top = (1e-4, 15.5) if kind == T.Q5_K else (2e-4, 7.5)
        data = [half(d), half(d * top), some(12), *high, some(128)]
    return np.concatenate(data, 1).reshape(rows, -1)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--seed", type=int, default=3)
    p.add_argument("--out", required=True)
    a = p.parse_args()
    rng = np.random.default_rng(a.seed)
    os.makedirs(a.out, exist_ok=True)

    chars = byte_chars()
    merges = learn("user system assistant chair chairs many there red here the " * 3, chars)
    special, other = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<think>", "</think>"]
    tokens = [*chars, *map("".join, merges)]
    vocab = {t: i for i, t in enumerate(tokens)}
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    for t in special + other:
        tokens.append(t)
        kinds.append(gguf.TokenType.CONTROL if t in special else gguf.TokenType.USER_DEFINED)
    ids = {t: i for i, t in enumerate(tokens)}
    tokens.append(f"[PAD{len(tokens)}]")
    kinds.append(gguf.TokenType.UNUSED)

    w = gguf.GGUFWriter(os.path.join(a.out, "model.gguf"), "qwen3")
    w.add_name("random")
    w.add_block_count(1)
    w.add_context_length(512)
    w.add_embedding_length(HIDDEN)
    w.add_feed_forward_length(FF)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV)
    w.add_key_length(DIM)
    w.add_value_length(DIM)
    w.add_rope_freq_base(1e6)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2")
    w.add_token_list(tokens)
    w.add_token_types(kinds)
    w.add_token_merges([" ".join(m) for m in merges])
    w.add_eos_token_id(ids["<|im_end|>"])
    w.add_bos_token_id(ids["<|endoftext|>"])
    w.add_pad_token_id(ids["<|endoftext|>"])
    w.add_add_bos_token(False)
    w.add_chat_template(TEMPLATE)

    state = {}

    def matrix(own, hub, rows, cols, kind):
        if kind == T.Q8_0:
            data = gguf.quants.quantize(rng.normal(0, 0.06, (rows, cols)).astype(np.float32), kind)
        else:
            data = blocks(rng, kind, rows, cols)
        w.add_tensor(own + ".weight", data, raw_dtype=kind)
        state[hub + ".weight"] = torch.tensor(gguf.quants.dequantize(data, kind).astype(np.float32).reshape(rows, cols))

    def vector(own, hub, n):
        data = (1 + rng.normal(0, 0.2, n)).astype(np.float32)
        w.add_tensor(own + ".weight", data)
        state[hub + ".weight"] = torch.tensor(data)

    own, hub = "blk.0.", "model.layers.0."
    matrix("token_embd", "model.embed_tokens", len(tokens), HIDDEN, T.Q6_K)
    vector(own + "attn_norm", hub + "input_layernorm", HIDDEN)
    matrix(own + "attn_q", hub + "self_attn.q_proj", HEADS * DIM, HIDDEN, T.Q4_K)
    matrix(own + "attn_k", hub + "self_attn.k_proj", KV * DIM, HIDDEN, T.Q8_0)
    matrix(own + "attn_v", hub + "self_attn.v_proj", KV * DIM, HIDDEN, T.Q6_K)
    matrix(own + "attn_output", hub + "self_attn.o_proj", HIDDEN, HEADS * DIM, T.Q8_0)
    vector(own + "attn_q_norm", hub + "self_attn.q_norm", DIM)
    vector(own + "attn_k_norm", hub + "self_attn.k_norm", DIM)
    vector(own + "ffn_norm", hub + "post_attention_layernorm", HIDDEN)
    matrix(own + "ffn_gate", hub + "mlp.gate_proj", FF, HIDDEN, T.Q4_K)
    matrix(own + "ffn_up", hub + "mlp.up_proj", FF, HIDDEN, T.Q5_K)
    matrix(own + "ffn_down", hub + "mlp.down_proj", HIDDEN, FF, T.Q6_K)
    vector("output_norm", "model.norm", HIDDEN)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()

    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, chat_template=TEMPLATE)
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens(other)
    assert all(tokenizer.convert_tokens_to_ids(t) == i for t, i in ids.items()), "ids differ"
    chat = [dict(role="system", content="Be brief."), dict(role="user", content="How many chairs?")]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    encode = lambda t: tokenizer(t, add_special_tokens=False)["input_ids"]
    config = Qwen3Config(
        vocab_size=len(tokens), hidden_size=HIDDEN, intermediate_size=FF, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=KV, head_dim=DIM, max_position_embeddings=512, rms_norm_eps=1e-6, rope_theta=1e6,
        rope_parameters=dict(rope_type="default", rope_theta=1e6), tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).eval().float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    with torch.no_grad():
        logits = model(torch.tensor([encode(text)])).logits[0, -1]
    expected = dict(
        texts=[dict(text=t, ids=encode(t)) for t in TEXTS], chat=chat, chat_ids=encode(text),
        logits=[round(float(v), 6) for v in logits],
    )
    with open(os.path.join(a.out, "expected.json"), "w") as f:
        json.dump(expected, f)


if __name__ == "__main__":
    main()
