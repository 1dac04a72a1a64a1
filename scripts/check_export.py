"""That what train-reasoner exported is what transformers and PEFT load (torch, transformers; peft if it is there).

    python scripts/check_export.py RUN/model [data/embedded/planner]

Compares logits of the merged weights with those of base plus adapter, on random token ids.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    model, base = Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "data/embedded/planner")
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


if __name__ == "__main__":
    main()
