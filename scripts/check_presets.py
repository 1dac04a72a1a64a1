#!/usr/bin/env python3
"""Presets at full size against PyTorch: files with the exact names, shapes, shards and types of
tests/fixtures/presets, of random numbers, and what PyTorch makes of them.

  check_presets.py NAME [NAME ...] [--work DIR] [--moge DIR] [--keep]

Needs torch and transformers, and of moge-2-* a checkout of github.com/microsoft/MoGe (--moge). Each preset is made in
WORK/NAME, then `cargo bench --bench presets -- WORK/NAME` loads it as a user's command would and compares; it is
removed again unless --keep. Up to 2 B parameters: 24 GB of memory and 5 GB of disk.
"""
import argparse
import copy
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
TYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}


def table(name):
    preset = json.loads((ROOT / "tests/fixtures/presets" / f"{name}.json").read_text())
    shapes = {}
    for pattern, shape in preset["shapes"].items():
        names = [pattern]
        while any("{" in n for n in names):
            def filled(n):
                choice = re.search(r"\{([^}]*)\}", n)
                if not choice:
                    return [n]
                values = []
                for part in choice[1].split(","):
                    low, _, high = part.partition("-")
                    values += [str(i) for i in range(int(low), int(high) + 1)] if high else [part]
                return [n[:choice.start()] + v + n[choice.end():] for v in values]
            names = [m for n in names for m in filled(n)]
        shapes.update({n: shape for n in names})
    assert len(shapes) == preset["tensors"], (len(shapes), preset["tensors"])
    return preset, shapes


def randomise(model, dtype):
    """Signals of order one all the way through; numbers that the file's type holds exactly."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and name.endswith(("weight", "gamma")):
                p.normal_(1, 0.1, generator=g)
            elif p.ndim == 1:
                p.add_(torch.randn(p.shape, generator=g) * 0.02)
            elif "embed" in name and p.ndim == 2 and "bbox" not in name:
                p.normal_(0, 0.5, generator=g)
            elif "sampling_offsets" not in name:
                p.normal_(0, p[0].numel() ** -0.5, generator=g)
            p.copy_(p.to(dtype).float())


def write(folder, preset, shapes, state):
    """One file or shards, filled in the order of names as far as the published sizes tell."""
    dtype = TYPES[preset["dtype"]]
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    tensors = {}
    for name, shape in shapes.items():
        source = state[name] if name in state else state[tied[name]]
        assert list(source.shape) == shape, (name, list(source.shape), shape)
        tensors[name] = source.to(dtype if source.is_floating_point() else source.dtype).contiguous().clone()
    extra = set(state) - set(shapes)
    files, at = {}, 0
    for name in sorted(tensors):
        size = tensors[name].numel() * tensors[name].element_size()
        file, capacity = preset["files"][at]
        held = sum(t.numel() * t.element_size() for t in files.get(file, {}).values())
        if held + size > capacity and at + 1 < len(preset["files"]):
            at += 1
            file = preset["files"][at][0]
        files.setdefault(file, {})[name] = tensors[name]
    for file, part in files.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        weight_map = {name: file for file, part in files.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return extra


def qwen3(preset, folder, a):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    cfg = {k: v for k, v in preset["config"].items() if k not in ("torch_dtype", "transformers_version")}
    model = Qwen3ForCausalLM(Qwen3Config(**cfg)).float().eval()
    randomise(model, TYPES[preset["dtype"]])
    ids = torch.randint(0, cfg["vocab_size"], (1, 48), generator=torch.Generator().manual_seed(11))
    with torch.inference_mode():
        logits = model(ids).logits
    return model.state_dict(), {"input_ids": ids, "logits": logits[:, -4:].clone(), "logsumexp": logits.logsumexp(-1)}


def qwen3_vl(preset, folder, a):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    cfg = {k: v for k, v in preset["config"].items() if k != "transformers_version"}
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**copy.deepcopy(cfg))).float().eval()
    randomise(model, TYPES[preset["dtype"]])
    g = torch.Generator().manual_seed(11)
    thw = torch.tensor([[1, 12, 16]])
    pixels = torch.randn(12 * 16, 3 * 2 * 16 * 16, generator=g)
    word = lambda n: torch.randint(0, 150_000, (n,), generator=g).tolist()
    picture = [cfg["vision_start_token_id"]] + [cfg["image_token_id"]] * 48 + [cfg["vision_end_token_id"]]
    ids = torch.tensor([word(5) + picture + word(9)])
    kind = (ids == cfg["image_token_id"]).int()
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, image_grid_thw=thw,
                       mm_token_type_ids=kind).logits
    return model.state_dict(), {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": thw,
                                "logits": logits[:, -4:].clone(), "logsumexp": logits.logsumexp(-1)}


def grounding_dino(preset, folder, a):
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection
    model = GroundingDinoForObjectDetection(GroundingDinoConfig.from_dict(copy.deepcopy(preset["config"]))).float().eval()
    # As benches/peers/bench_peers.py: near the initial values, so that boxes neither saturate nor coincide.
    g = torch.Generator().manual_seed(6)
    seen = set()
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.data_ptr() not in seen:
                seen.add(p.data_ptr())
                p.add_(torch.randn(p.shape, generator=g) * 0.02)
    # Eager BERT adds the boolean phrase mask as 0 and 1 and so hides nothing; only sdpa's is the model.
    assert model.model.text_backbone.config._attn_implementation == "sdpa"
    ids = torch.tensor([[101, 3242, 1012, 4157, 2795, 1012, 2417, 6847, 1012, 102]])
    pixels = torch.randn(1, 3, 480, 640, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        o = model(pixel_values=pixels, pixel_mask=torch.ones(1, 480, 640, dtype=torch.long), input_ids=ids,
                  attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids))
    # Scores nearer to one another than rounding sort either way: what follows is compared on PyTorch's choice.
    scores = o.enc_outputs_class.max(-1)[0]
    queries = scores.topk(model.config.num_queries, dim=1)[1]
    # Swin's names in transformers 5 are not those of the files that it writes.
    model.save_pretrained(folder / "saved")
    state = load_file(folder / "saved/model.safetensors")
    shutil.rmtree(folder / "saved")
    for name, shape in table(preset["preset"])[1].items():
        if name.endswith("relative_position_index") and name not in state:
            side = int(shape[0] ** 0.5)
            at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
            apart = at[:, :, None] - at[:, None] + side - 1
            state[name] = apart[0] * (2 * side - 1) + apart[1]
        if name.endswith("position_ids") and name not in state:
            state[name] = torch.arange(shape[-1])[None]
    return state, {"input_ids": ids, "pixel_values": pixels, "scores": scores, "queries": queries,
                   "logits": o.logits[..., :ids.shape[1]].clone(), "boxes": o.pred_boxes}


def moge(preset, folder, a):
    # Its forward pass needs none of these, but its modules import them.
    for name in ["utils3d", "cv2", "trimesh"]:
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
    sys.path.insert(0, a.moge)
    from moge.model.v2 import MoGeModel
    cfg = preset["config"]["model_config"]
    model = MoGeModel(**copy.deepcopy(cfg)).eval()
    model.enable_pytorch_native_sdpa()
    image = torch.rand(1, 3, 210, 280, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        o = model(image, num_tokens=1200)
    torch.save({"model": model.state_dict(), "model_config": cfg}, folder / "model.pt")
    return None, {"image": image, **{n: o[n].contiguous() for n in ["points", "normal", "mask", "metric_scale"]}}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("names", nargs="+", metavar="NAME")
    ap.add_argument("--work", type=Path, default=Path("presets"))
    ap.add_argument("--moge", help="checkout of the official MoGe")
    ap.add_argument("--keep", action="store_true", help="leave the files")
    a = ap.parse_args()
    failed = []
    for name in a.names:
        preset, shapes = table(name)
        make = {"qwen3-vl": qwen3_vl, "qwen3": qwen3, "grounding": grounding_dino, "moge": moge}
        make = next(f for prefix, f in make.items() if name.startswith(prefix))
        folder = a.work / name
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        state, reference = make(preset, folder, a)
        if state is None:
            held = torch.load(folder / "model.pt", weights_only=True)["model"]
            assert {n: list(t.shape) for n, t in held.items()} == shapes, "not the preset's names and shapes"
        else:
            extra = write(folder, preset, shapes, state)
            (folder / "config.json").write_text(json.dumps(preset["config"]))
            if extra:
                print(f"{name}: PyTorch's network has {len(extra)} tensors that the file has not: {sorted(extra)[:4]}")
        save_file({n: t.contiguous() for n, t in reference.items()}, folder / "reference.safetensors")
        del state, reference
        bench = ["cargo", "bench", "--quiet", "--bench", "presets", "--", str(folder.resolve())]
        if subprocess.run(bench, cwd=ROOT).returncode:
            failed.append(name)
        if not a.keep:
            shutil.rmtree(folder)
    if failed:
        sys.exit(f"not as PyTorch: {', '.join(failed)}")


if __name__ == "__main__":
    main()
