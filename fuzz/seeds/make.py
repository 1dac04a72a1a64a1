"""Small checkpoints of every form that weights/pth.rs reads, for the fuzz target `pth` (torch)."""

import collections
import pathlib

import torch

here = pathlib.Path(__file__).parent / "pth"
torch.manual_seed(1)
base = torch.arange(6.0).reshape(2, 3)
samples = {
    "bare": {"a": base, "b.weight": torch.ones(1, dtype=torch.float16)},
    "ordered": collections.OrderedDict(w=base.to(torch.bfloat16), n=torch.tensor(3)),
    "train": {"model": {"w": torch.nn.Parameter(base)}, "optimizer": {"lr": 0.1}, "epoch": 2},
    "config": {"model": {"w": base.t()}, "model_config": {"encoder": {"layers": [1, 2], "x": None}, "s": (1.5, True)}},
    "state": {"state_dict": {"shared": base, "view": base[:, 1:], "empty": torch.zeros(0, 4), "flag": torch.tensor([True])}},
    "wide": {f"layer.{i}.w": torch.tensor([i]) for i in range(12)},
}
for name, sample in samples.items():
    torch.save(sample, here / f"{name}.pth")
    torch.save(sample, here / f"{name}-legacy.pth", _use_new_zipfile_serialization=False)
