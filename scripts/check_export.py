"""That what a training exported is what transformers and PEFT load (torch, transformers, pillow; peft if it is there).

    python scripts/check_export.py RUN/model [data/embedded/planner]

Of a planner: compares logits of the merged weights with those of base plus adapter, on random token ids. Of a
detector: no tensor is missing or too many, and on the demo picture the boxes are those of `valor infer`
(target/release/valor).
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
PICTURE, NOUN = ROOT / "data/demo/room.png", "chair"


def planner(model, base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = torch.randint(0, merged.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        got, before = merged(ids).logits, start(ids).logits
    adapter = model / "adapter"
    if not adapter.is_dir():
        print(f"no adapter; merged differs from base by {(got - before).abs().max():.3g}")
        return
    try:
        from peft import PeftModel

        adapted, how = PeftModel.from_pretrained(start, adapter).eval(), "PEFT"
    except ImportError:
        how, adapted = "B A by hand", start
        config = json.loads((adapter / "adapter_config.json").read_text())
        tensors = load_file(adapter / "adapter_model.safetensors")
        weights = dict(start.named_parameters())
        for name, a in tensors.items():
            if not name.endswith("lora_A.weight"):
                continue
            layer = name.removeprefix("base_model.model.").removesuffix("lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")]
            weights[layer + "weight"].data += config["lora_alpha"] / config["r"] * b @ a
    with torch.no_grad():
        want = adapted(ids).logits
    off, moved = (got - want).abs().max().item(), (want - before).abs().max().item()
    print(f"merged against base + adapter ({how}): {off:.3g}; against the base alone: {moved:.3g}")
    print("tokenizer:", repr(tokenizer.decode(tokenizer("How many chairs are there?").input_ids)))
    assert moved > 0, "the adapter does nothing"
    assert off <= 1e-4 * want.abs().max().item(), "merged weights are not base + adapter"


def detector(model):
    from PIL import Image
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    net, loaded = AutoModelForZeroShotObjectDetection.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    off = {k: v for k, v in loaded.items() if v}
    assert not off, off
    command = [ROOT / "target/release/valor", "infer", PICTURE, f"How many {NOUN}s are there?", "--json",
               "--set", f"detector.model={model}"]
    calls = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["calls"]
    ours = [d["bbox"] for d in next(c for c in calls if c["tool"] == "gd_detect")["value"]]
    processor, picture = AutoProcessor.from_pretrained(model), Image.open(PICTURE).convert("RGB")
    shown = json.loads(subprocess.run([command[0], "config", "show", "--json"], capture_output=True, check=True).stdout)
    box, text = (shown[f"detector.{k}"]["value"] for k in ["box_threshold", "text_threshold"])
    x = processor(images=picture, text=f"{NOUN} .", return_tensors="pt")
    with torch.no_grad():
        y = net.eval()(**x)
    size = [(picture.height, picture.width)]
    found = processor.post_process_grounded_object_detection(
        y, x["input_ids"], threshold=box, text_threshold=text, target_sizes=size)[0]["boxes"]
    assert len(found) == len(ours) > 0, f"{len(found)} boxes, valor {len(ours)}"
    order = lambda boxes: torch.tensor(sorted(boxes))
    apart = (order(found.tolist()) - order(ours)).abs().max().item()
    print(f"{len(ours)} boxes of {NOUN}, at most {apart:.3g} pixels apart")
    assert apart < 0.05


def main():
    model, base = Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else ROOT / "data/embedded/planner")
    kind = json.loads((model / "config.json").read_text())["model_type"]
    if kind.endswith("grounding-dino"):
        detector(model)
    else:
        planner(model, base)


if __name__ == "__main__":
    main()
