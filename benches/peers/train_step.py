"""Seconds per training step of a small Qwen3 in PyTorch; the counterpart of qwen3_train.rs.

Same config, batch, loss and optimiser (AdamW, clipping at 1). Prints one JSON line.
"""
import json
import os
import pathlib
import time

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

torch.set_num_threads(int(os.environ.get("RAYON_NUM_THREADS", os.cpu_count())))
steps = int(os.environ.get("QWEN3_STEPS", 3))
raw = json.loads((pathlib.Path(__file__).parent / "qwen3-5m.json").read_text())
theta = raw.pop("rope_theta")
cfg = Qwen3Config(**raw, rope_parameters={"rope_type": "default", "rope_theta": theta})
torch.manual_seed(0)
model = Qwen3ForCausalLM(cfg).float().train()
opt = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01)
b, s, times, loss = 16, 384, [], None
for step in range(steps + 1):
    i = torch.arange(b * (s + 1))
    ids = ((i * 7919 + step * 31 + i * i % 977) % cfg.vocab_size).view(b, s + 1)
    x, y = ids[:, :-1], ids[:, 1:]
    t, c = time.perf_counter(), time.process_time()
    logits = model(x, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(b * s, -1), y.reshape(-1))
    f = time.perf_counter()
    loss.backward()
    k = time.perf_counter()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    opt.zero_grad()
    if step > 0:
        times.append((time.perf_counter() - t, time.process_time() - c, f - t, k - f))
w, c, f, k = sorted(times)[len(times) // 2]
print(json.dumps(dict(who="torch", params=sum(p.numel() for p in model.parameters()), wall_s=round(w, 3), cpu_s=round(c, 3),
                      forward_s=round(f, 3), backward_s=round(k, 3), loss=round(loss.item(), 4))))
