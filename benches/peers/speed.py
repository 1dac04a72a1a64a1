#!/usr/bin/env python3
"""PyTorch's side of scripts/peers.py: the counterpart of benches/speed.rs, case for case.

  speed.py make WORK [--moge DIR]           weights and inputs, once (7 GB of disk)
  speed.py case NAME WORK [--moge DIR] [--reps N] [--seconds S]

DIR is a checkout of the official MoGe (github.com/microsoft/MoGe); without it, its cases have no peer. A case runs
once to warm up, which gives the numbers to compare ("probe"), then N times or until S seconds have gone, and prints
one JSON line. Threads: OMP_NUM_THREADS. f32; everything is read from WORK, so both sides have the same of it.
"""
import argparse, copy, json, os, statistics, sys, time, types
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))
import torch
import bench_peers

LEVELS = [(100, 134), (50, 67), (25, 34), (13, 17)]  # of 800×1066
LORA = dict(r=32, lora_alpha=64, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
# As scripts/make_preset_files.py has it.
MOGE = {
    "encoder": {"backbone": "dinov2_vitl14", "intermediate_layers": [5, 11, 17, 23], "dim_out": 1024},
    "scale_head": {"dims": [1024, 1024, 1024, 1]}, "remap_output": "exp", "num_tokens_range": [1200, 3600],
}
WIDTHS = [1024, 256, 128, 64, 32]


def moge_stack(dim_in, dim_out, blocks):
    return dict(dim_in=dim_in, dim_out=dim_out, dim_res_blocks=WIDTHS, num_res_blocks=blocks, res_block_in_norm="none",
                res_block_hidden_norm="none", resamplers=["conv_transpose"] * 3 + ["bilinear"])


MOGE["neck"] = moge_stack([1026, 2, 2, 2, 2], None, [0, 2, 2, 2, 0])
for head, out in [("points_head", 3), ("normal_head", 3), ("mask_head", 1)]:
    MOGE[head] = moge_stack(WIDTHS, [None] * 4 + [out], [0, 1, 1, 1, 0])


def official_moge(checkout):
    # Its forward pass needs none of these, but its modules import them.
    for name in ["utils3d", "cv2", "trimesh"]:
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
    sys.path.insert(0, checkout)
    from moge.model.v2 import MoGeModel
    model = MoGeModel(**copy.deepcopy(MOGE)).eval()
    model.enable_pytorch_native_sdpa()
    return model


def grid(tokens):
    """Rows and columns of MoGe-2 for a picture of 4:3."""
    return round((tokens * 3 / 4) ** .5), round((tokens * 4 / 3) ** .5)


def make(a):
    from safetensors.torch import save_file
    work = Path(a.work)
    gdino, qwen, dino, moge = (work / n for n in ["gdino-swint", "qwen3-0.6b", "dinov2-large", "moge-2-vitl"])
    for part, folder in [("gdino", gdino), ("qwen", qwen)]:
        if not (folder / "ref_io.safetensors").exists():
            folder.mkdir(parents=True, exist_ok=True)
            both = {"gdino": None, "qwen": None, part: str(folder)}
            bench_peers.make(types.SimpleNamespace(seed=0, **both))
    if not (dino / "model.safetensors").exists():
        torch.manual_seed(0)
        bench_peers.dinov2_large().float().save_pretrained(dino)
    if a.moge and not (moge / "model.safetensors").exists():
        torch.manual_seed(0)
        moge.mkdir(parents=True, exist_ok=True)
        state = {n: t.contiguous() for n, t in official_moge(a.moge).state_dict().items()}
        (moge / "config.json").write_text(json.dumps({"model_config": MOGE}))
        save_file(state, moge / "model.safetensors")
    if not (work / "lora.safetensors").exists():
        g = torch.Generator().manual_seed(13)
        lora, h, f = {}, 1024, 3072
        shapes = dict(q_proj=(h, 2048), k_proj=(h, 1024), v_proj=(h, 1024), o_proj=(2048, h), gate_proj=(h, f), up_proj=(h, f),
                      down_proj=(f, h))
        for i in range(28):
            for name, (inp, out) in shapes.items():
                at = f"model.layers.{i}.{'mlp' if f in (inp, out) else 'self_attn'}.{name}"
                # B is not zero, as it is after the first steps: else A had no gradient to compare.
                lora[f"{at}.lora_A.weight"] = torch.randn(LORA["r"], inp, generator=g) * .02
                lora[f"{at}.lora_B.weight"] = torch.randn(out, LORA["r"], generator=g) * .002
        save_file(lora, work / "lora.safetensors")
    if not (work / "inputs.safetensors").exists():
        g = torch.Generator().manual_seed(5)
        x = {"gdino_ids": torch.tensor([bench_peers.PROMPT]),
             "gdino_fwd": bench_peers.gd_inputs(800, 1066)["pixel_values"],
             "gdino_train": bench_peers.gd_inputs(480, 640)["pixel_values"],
             "moge": torch.rand(1, 3, 480, 640, generator=g),
             "qwen_ids": torch.randint(0, 151936, (32, 3072), generator=g)}
        for tokens in [1800, 3600]:
            rows, cols = grid(tokens)
            x[f"vitl_{tokens}"] = torch.randn(1, 3, 14 * rows, 14 * cols, generator=g)
        s = sum(h * w for h, w in LEVELS)
        x["msda_value"] = torch.randn(1, s, 8, 32, generator=g)
        # The decoder's queries look anywhere, the encoder's around their own places.
        centre = lambda h, w: torch.stack(torch.meshgrid((torch.arange(h) + .5) / h, (torch.arange(w) + .5) / w, indexing="ij"), -1)
        own = torch.cat([centre(h, w).flip(-1).reshape(-1, 2) for h, w in LEVELS])
        for q in [900, s]:
            at = torch.rand(1, q, 8, 4, 4, 2, generator=g)
            x[f"msda_{q}_at"] = own[None, :, None, None, None] + (at - .5) * .1 if q == s else at
            x[f"msda_{q}_weights"] = torch.randn(1, q, 8, 16, generator=g).softmax(-1).view(1, q, 8, 4, 4)
            x[f"msda_{q}_gradient"] = torch.randn(1, q, 256, generator=g)
        save_file({n: t.contiguous() for n, t in x.items()}, work / "inputs.safetensors")


def sample(t, n=64):
    """About n values evenly taken of a tensor; benches/speed.rs takes the same."""
    t = t.detach().reshape(-1)
    return t[:: max(1, t.numel() // n)][:n].double().tolist()


def norm(t):
    return t.detach().double().norm().item()


class Bench:
    def __init__(self, a):
        self.a, self.out, self.started = a, {}, time.perf_counter()
        self.work = Path(a.work)

    def input(self, name):
        from safetensors import safe_open
        with safe_open(self.work / "inputs.safetensors", "pt") as f:
            return f.get_tensor(name)

    def loaded(self):
        self.out["load_s"] = time.perf_counter() - self.started

    def run(self, work, prepare=lambda: (), warm=None):
        """Times `work(*prepare())`, of which only work counts; returns what the warm-up gave."""
        first = (warm or work)(*prepare())
        seconds, cpu, begun = [], [], time.perf_counter()
        while not seconds or len(seconds) < self.a.reps and time.perf_counter() - begun < self.a.seconds:
            given = prepare()
            t, c = time.perf_counter(), time.process_time()
            last = work(*given)
            seconds.append(time.perf_counter() - t)
            cpu.append(time.process_time() - c)
            given = None
        self.out.update(seconds=statistics.median(seconds), cpu=statistics.median(cpu), reps=len(seconds))
        return last if warm else first

    def qwen(self):
        from transformers import Qwen3ForCausalLM
        return Qwen3ForCausalLM.from_pretrained(self.work / "qwen3-0.6b", dtype=torch.float32)

    def gdino(self, **more):
        from transformers import GroundingDinoForObjectDetection
        return GroundingDinoForObjectDetection.from_pretrained(self.work / "gdino-swint", dtype=torch.float32, **more)

    def gdino_inputs(self, name):
        pixels, ids = self.input(name), self.input("gdino_ids")
        return dict(pixel_values=pixels, pixel_mask=torch.ones(pixels.shape[0], *pixels.shape[2:], dtype=torch.long), input_ids=ids,
                    attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids))

    # Cases.

    def gdino_fwd(self):
        model, x = self.gdino().eval(), self.gdino_inputs("gdino_fwd")
        self.loaded()
        with torch.inference_mode():
            out = self.run(lambda: model(**x))
        # Sorted: scores closer than rounding may change places, and then two queries do (see full_size.rs).
        ordered = lambda t: sample(t.sort(1)[0])
        return dict(boxes=ordered(out.pred_boxes), logits=ordered(out.logits[..., :x["input_ids"].shape[1]]))

    def gdino_train(self):
        model = self.gdino(auxiliary_loss=True).eval()
        for n, p in model.named_parameters():
            if ".backbone.conv_encoder." in n or ".text_backbone." in n:
                p.requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=1e-5)
        x = self.gdino_inputs("gdino_train")
        labels = [{"class_labels": torch.tensor([0, 1, 2]),
                   "boxes": torch.tensor([[.3, .4, .2, .3], [.6, .5, .3, .2], [.7, .2, .1, .1]])}]
        self.loaded()
        probe = {}

        def step():
            optimiser.zero_grad(set_to_none=True)
            loss = model(**x, labels=labels).loss
            loss.backward()
            if not probe:
                probe.update(loss=[loss.item()], gradient=[sum(norm(p.grad) ** 2 for p in trained if p.grad is not None) ** .5])
                # The first step has no dropout, so that its loss can be compared.
                model.train()
            optimiser.step()

        self.run(step)
        return probe

    def vitl(self, tokens):
        from transformers import Dinov2Model
        model, x = Dinov2Model.from_pretrained(self.work / "dinov2-large", dtype=torch.float32).eval(), self.input(f"vitl_{tokens}")
        self.loaded()
        with torch.inference_mode():
            return dict(hidden=sample(self.run(lambda: model(x).last_hidden_state)))

    def moge(self, tokens):
        if not self.a.moge:
            sys.exit("MoGe's case needs --moge DIR, a checkout of github.com/microsoft/MoGe")
        from safetensors.torch import load_file
        model, x = official_moge(self.a.moge), self.input("moge")
        model.load_state_dict(load_file(self.work / "moge-2-vitl" / "model.safetensors"))
        self.loaded()
        with torch.inference_mode():
            out = self.run(lambda: model(x, num_tokens=int(tokens)))
        return {n: sample(out[n]) for n in ["points", "normal", "mask", "metric_scale"]}

    def prefill(self, tokens):
        model, ids = self.qwen().eval(), self.input("qwen_ids")[:1, :int(tokens)].contiguous()
        self.loaded()
        with torch.inference_mode():
            return dict(logits=sample(self.run(lambda: model(ids, use_cache=True, logits_to_keep=1).logits)))

    def decode(self, batch):
        model, b, prompt, new = self.qwen().eval(), int(batch[1:]), 128, 64
        ids = self.input("qwen_ids")
        fed = ids[:b, prompt:prompt + new].contiguous()
        self.loaded()

        def steps(cache, n=new):
            for i in range(n):
                logits = model(fed[:, i:i + 1], past_key_values=cache, use_cache=True).logits[:, -1]
                # Chosen, but not followed: a choice between close logits must not decide what is compared.
                logits.argmax(-1).tolist()
            return logits

        with torch.inference_mode():
            first = model(ids[:1, :prompt], use_cache=True, logits_to_keep=1).past_key_values

            def rows():
                cache = copy.deepcopy(first)
                cache.batch_repeat_interleave(b)
                return (cache,)

            return dict(logits=sample(self.run(steps, rows, lambda c: steps(c, 2))))

    def qwen_train(self):
        model, ids = self.qwen().train(), self.input("qwen_ids")[:1, :512].contiguous()
        self.loaded()
        named, probe = dict(model.named_parameters()), {}

        def step():
            model.zero_grad(set_to_none=True)
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            if not probe:
                grad = lambda name: named[name].grad
                probe["loss"] = [loss.item()]
                probe["embedding"] = sample(grad("model.embed_tokens.weight")[ids[0, :8]])
                for name in ["layers.0.self_attn.q_proj", "layers.13.mlp.down_proj", "norm"]:
                    probe[name] = sample(grad(f"model.{name}.weight"))

        self.run(step)
        return probe

    def lora_train(self):
        from peft import LoraConfig, get_peft_model
        from safetensors.torch import load_file
        model = get_peft_model(self.qwen(), LoraConfig(lora_dropout=0., bias="none", task_type="CAUSAL_LM", **LORA)).train()
        named = dict(model.named_parameters())
        own = lambda name: named["base_model.model." + name.replace(".weight", ".default.weight")]
        with torch.no_grad():
            for name, t in load_file(self.work / "lora.safetensors").items():
                own(name).copy_(t)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        ids = self.input("qwen_ids")[:2, :512].contiguous()
        advantages = torch.tensor([[1.], [-.5]])
        self.loaded()
        probe = {}

        def step():
            optimiser.zero_grad(set_to_none=True)
            logits = model(ids, use_cache=False).logits[:, :-1]
            # log p of each token, as trl's selective_log_softmax has it: no second table of the logits' size.
            log_p = logits.gather(-1, ids[:, 1:, None]).squeeze(-1) - torch.stack([l.logsumexp(-1) for l in logits])
            loss = -(advantages * log_p).mean()
            loss.backward()
            if not probe:
                probe["loss"] = [loss.item()]
                for name in ["0.self_attn.q_proj.lora_A", "0.self_attn.q_proj.lora_B", "27.mlp.down_proj.lora_A"]:
                    probe[name] = sample(own(f"model.layers.{name}.weight").grad)
            optimiser.step()

        self.run(step)
        return probe

    def msda(self, queries, way):
        from transformers.models.grounding_dino.modeling_grounding_dino import MultiScaleDeformableAttention
        value = self.input("msda_value")
        at, weights, gradient = (self.input(f"msda_{queries}_{n}") for n in ["at", "weights", "gradient"])
        attend, shapes = MultiScaleDeformableAttention(), torch.tensor(LEVELS)
        starts = torch.cat((shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]))
        forward = lambda: attend(value, shapes, LEVELS, starts, at, weights, 64)
        self.loaded()
        if way == "fwd":
            with torch.inference_mode():
                return dict(out=sample(self.run(forward)))
        leaves = [t.requires_grad_() for t in (value, at, weights)]

        def both():
            for t in leaves:
                t.grad = None
            out = forward()
            out.backward(gradient)
            return [out] + [t.grad for t in leaves]

        return {n: sample(t) for n, t in zip(["out", "value", "at", "weights"], self.run(both))}


def case(a):
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    torch.set_num_threads(threads)
    bench = Bench(a)
    name, *rest = a.name.rsplit("_", {"msda": 2, "vitl": 1, "moge": 1, "prefill": 1, "decode": 1}.get(a.name.split("_")[0], 0))
    probe = getattr(bench, name)(*rest)
    peak = next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]
    import transformers
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, transformers=transformers.__version__)
    if "peft" in sys.modules:
        versions["peft"] = sys.modules["peft"].__version__
    print(json.dumps(dict(who="peer", case=a.name, threads=threads, peak_mb=int(peak) / 1024, **bench.out, versions=versions, probe=probe)))


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ap.add_subparsers(required=True)
    for name, f in [("make", make), ("case", case)]:
        p = commands.add_parser(name)
        p.set_defaults(run=f)
        if name == "case":
            p.add_argument("name")
            p.add_argument("--reps", type=int, default=1)
            p.add_argument("--seconds", type=float, default=20)
        p.add_argument("work")
        p.add_argument("--moge", help="checkout of the official code")
    a = ap.parse_args()
    a.run(a)
