#!/usr/bin/env python3
"""PyTorch's side of scripts/peers.py: the counterpart of benches/speed.rs, case for case.

  speed.py make WORK [--moge DIR] [--parts PART,…]      weights and inputs, once (7 GB of disk; qwen8: 16 GB more);
                                                        --cases NAME,…: what these need
  speed.py case NAME[,NAME…] WORK [--moge DIR] [--reps N] [--seconds S]

DIR is a checkout of the official MoGe (github.com/microsoft/MoGe); without it, its cases have no peer. A case runs
once to warm up, which gives the numbers to compare ("probe"), then N times or until S seconds have gone, and prints
one JSON line. A case that fails is a line with its error, and the next one goes on; the exit code tells. Threads:
OMP_NUM_THREADS. f32, or bf16 where a case's name says so; everything is read from WORK, so both sides have the same of it.

On a GPU, `--device cuda`: eager PyTorch with its default settings (`--tf32 off` for exact convolutions). Three runs warm
up, clocks are read when the GPU is done, short work is timed many calls together, and the line has the most memory
that a case took of the GPU ("gpu_mb"). `case --make` makes first what its cases need, which saves a start of Python.
Cases of one language model that follow each other load it once. More cases there: `ceilings` measures the memory's
bandwidth and the rates of matrix products; msda_…_reference are Deformable DETR's kernels (see msda_reference.py).
"""
import argparse, contextlib, copy, gc, json, os, shutil, statistics, sys, time, traceback, types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent / "scripts")]
import torch
import bench_peers, msda_reference
from make_preset_files import PRESETS, of_transformers

LEVELS = [(100, 134), (50, 67), (25, 34), (13, 17)]  # of 800×1066
LORA = dict(r=32, lora_alpha=64, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
# As scripts/make_preset_files.py has it.
MOGE = {
    "encoder": {"backbone": "dinov2_vitl14", "intermediate_layers": [5, 11, 17, 23], "dim_out": 1024},
    "scale_head": {"dims": [1024, 1024, 1024, 1]}, "remap_output": "exp", "num_tokens_range": [1200, 3600],
}
WIDTHS = [1024, 256, 128, 64, 32]
# Language models: folder and the type in which it is made on a GPU.
LANGUAGE = {"qwen": ("qwen3-0.6b", torch.float32), "qwen8": ("qwen3-8b", torch.bfloat16)}
# Of a case's kind: the parts of its work folder besides the inputs, and words after the kind.
KINDS = {"gdino": (["gdino"], 0), "vitl": (["dinov2"], 1), "moge": (["moge"], 1), "prefill": (["qwen"], 1), "decode": (["qwen"], 1),
         "prefill8": (["qwen8"], 1), "decode8": (["qwen8"], 1), "qwen": (["qwen"], 0), "lora": (["qwen", "lora"], 0), "msda": ([], 2)}
PARTS = ["gdino", "qwen", "dinov2", "moge", "lora", "inputs", "qwen8"]
# As benches/speed.rs has them.
GPU_WARM_UPS, GPU_CALLS = 3, 20


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


def placed(device, build):
    """A network built where it is to run: first values of hundreds of millions of weights take a CPU long."""
    if device != "cpu":
        try:
            with torch.device(device):
                return build()
        except Exception:
            traceback.print_exc()
    return build().to(device)


def random_qwen(folder, name, dtype, device):
    """A language model of a preset's shape under the hub's names: normal numbers, norms of ones.

    They are copied straight to where the file is mapped, some tensors at a time: through save_file, 16 GB would be
    copied twice more, on one thread.
    """
    config = dict(PRESETS[name][1], torch_dtype=str(dtype).removeprefix("torch."))
    header, end, places = {}, 0, []
    for tensor, shape in of_transformers("qwen3", config):
        n = torch.Size(shape).numel()
        places.append((tensor, shape, end, n))
        header[tensor] = dict(dtype={torch.bfloat16: "BF16", torch.float32: "F32"}[dtype], shape=shape,
                              data_offsets=[end, end := end + n * dtype.itemsize])
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < end + len(head):
        # To write where the file is mapped would end the process.
        raise OSError(f"{folder}: no room for {end / 1e9:.1f} GB")
    path, partial = folder / "model.safetensors", folder / "model.tmp"
    with open(partial, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        f.truncate(8 + len(head) + end)
    file = torch.from_file(str(partial), shared=True, size=8 + len(head) + end, dtype=torch.uint8)[8 + len(head):]

    def write(i):
        tensor, shape, at, n = places[i]
        own = torch.cuda.stream(torch.cuda.Stream(device)) if device != "cpu" else contextlib.nullcontext()
        with own, torch.no_grad():
            if tensor.endswith("norm.weight"):
                t = torch.ones(shape, dtype=dtype, device=device)
            else:
                g = torch.Generator(device).manual_seed(i)
                t = torch.empty(shape, dtype=dtype, device=device).normal_(0, .02, generator=g)
            file[at:at + n * dtype.itemsize].view(dtype).view(shape).copy_(t)

    with ThreadPoolExecutor(1 if device == "cpu" else 8) as pool:
        list(pool.map(write, range(len(places))))
    del file
    partial.rename(path)
    (folder / "config.json").write_text(json.dumps(config))


def make(a, parts):
    """The parts that are not there yet. On the CPU the first two have results beside them, which other benches read."""
    from safetensors.torch import save_file
    work, device = Path(a.work), a.device
    gdino, dino, moge = (work / n for n in ["gdino-swint", "dinov2-large", "moge-2-vitl"])
    begun = time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    for part, folder in [("gdino", gdino), ("qwen", work / "qwen3-0.6b")]:
        if device == "cpu" and part in parts and not (folder / "ref_io.safetensors").exists():
            folder.mkdir(parents=True, exist_ok=True)
            both = {"gdino": None, "qwen": None, part: str(folder)}
            bench_peers.make(types.SimpleNamespace(seed=0, **both))
    for part, (name, dtype) in LANGUAGE.items():
        if part in parts and not (work / name / "model.safetensors").exists():
            random_qwen(work / name, name, dtype, device)
    if "gdino" in parts and not (gdino / "model.safetensors").exists():
        from transformers import GroundingDinoForObjectDetection
        torch.manual_seed(0)
        model = placed(device, lambda: GroundingDinoForObjectDetection(bench_peers.gdino_config()).float())
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=.02)
        model.save_pretrained(gdino)
    if "dinov2" in parts and not (dino / "model.safetensors").exists():
        torch.manual_seed(0)
        placed(device, lambda: bench_peers.dinov2_large().float()).save_pretrained(dino)
    if "moge" in parts and a.moge and not (moge / "model.safetensors").exists():
        torch.manual_seed(0)
        moge.mkdir(parents=True, exist_ok=True)
        state = {n: t.contiguous() for n, t in placed(device, lambda: official_moge(a.moge)).state_dict().items()}
        (moge / "config.json").write_text(json.dumps({"model_config": MOGE}))
        save_file(state, moge / "model.safetensors")
    if "lora" in parts and not (work / "lora.safetensors").exists():
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
    if "inputs" in parts and not (work / "inputs.safetensors").exists():
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
    print(f"made {','.join(parts)} in {time.perf_counter() - begun:.1f} s", file=sys.stderr)


def make_for(a, names):
    """What these cases need."""
    needed = {p for n in names for p in [*KINDS.get(n.split("_")[0], ([],))[0], *([] if n == "ceilings" else ["inputs"])]}
    for part in PARTS:
        if part in needed:
            try:
                make(a, [part])
            except Exception:
                # There are cases that do not need it.
                traceback.print_exc()


def sample(t, n=64):
    """About n values evenly taken of a tensor; benches/speed.rs takes the same."""
    t = t.detach().reshape(-1)
    return t[:: max(1, t.numel() // n)][:n].double().tolist()


def norm(t):
    return t.detach().double().norm().item()


class Bench:
    def __init__(self, a):
        self.a, self.work, self.device, self.gpu = a, Path(a.work), a.device, a.device != "cpu"
        # The language model loaded last, for the next case.
        self.kept = (None, None)
        self.reference = None

    def case(self, name):
        """A case's line."""
        base, self.who = name.removesuffix("_reference"), "reference" if name.endswith("_reference") else "peer"
        self.dtype = torch.bfloat16 if base.endswith("_bf16") else torch.float32
        base = base.removesuffix("_bf16")
        kind = base.split("_")[0]
        parts, words = KINDS.get(kind, ([], 0))
        self.folder = LANGUAGE["qwen8" if kind.endswith("8") else "qwen"][0]
        if kind.rstrip("8") not in ("prefill", "decode") or self.kept[0] != (self.folder, self.dtype):
            self.kept = (None, None)
        method, *rest = base.rsplit("_", words)
        self.out, self.started, self.counted = {}, time.perf_counter(), kind in ("gdino", "vitl", "moge")
        if self.gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            # Of nearly equal scores the detector takes others when they are rounded.
            torch.backends.cudnn.allow_tf32 = self.a.tf32 and kind != "gdino"
        suffix = "_reference" if self.who == "reference" else ""
        probe = getattr(self, method.removesuffix("8") + suffix)(*rest)
        if self.gpu:
            self.out.setdefault("gpu_mb", torch.cuda.max_memory_allocated() / 2**20)
            self.out["settings"] = dict(matmul_tf32=torch.backends.cuda.matmul.allow_tf32, conv_tf32=torch.backends.cudnn.allow_tf32)
        return dict(self.out, probe=probe)

    def input(self, name):
        from safetensors import safe_open
        with safe_open(self.work / "inputs.safetensors", "pt") as f:
            return f.get_tensor(name).to(self.device)

    def sync(self):
        if self.gpu:
            torch.cuda.synchronize()

    def loaded(self, model=None):
        self.sync()
        self.out["load_s"] = time.perf_counter() - self.started
        if self.gpu and model is not None:
            used = {type(m).__name__: m.config._attn_implementation for m in model.modules()
                    if getattr(getattr(m, "config", None), "_attn_implementation", None) and hasattr(m, "_supports_sdpa")}
            self.out["attention"] = used or "sdpa"

    def run(self, work, prepare=lambda: (), warm=None):
        """Times `work(*prepare())`, of which only work counts; returns what the warm-up gave."""
        warm_up = warm or work
        first = warm_up(*prepare())
        for i in range(1, GPU_WARM_UPS if self.gpu else 1):
            if i == 1 and self.counted:
                self.count(warm_up, prepare)
            else:
                warm_up(*prepare())
        seconds, cpu, begun = [], [], time.perf_counter()
        while not seconds or len(seconds) < self.a.reps and time.perf_counter() - begun < self.a.seconds:
            given = prepare()
            self.sync()
            t, c = time.perf_counter(), time.process_time()
            last = work(*given)
            self.sync()
            seconds.append(time.perf_counter() - t)
            cpu.append(time.process_time() - c)
            given = None
        self.out.update(seconds=statistics.median(seconds), cpu=statistics.median(cpu), reps=len(seconds))
        return last if warm else first

    def count(self, work, prepare):
        """Floating-point operations of matrix products, convolutions and attention."""
        from torch.utils.flop_counter import FlopCounterMode
        try:
            with FlopCounterMode(display=False) as counter:
                work(*prepare())
            self.out["flops"] = counter.get_total_flops()
        except Exception:
            # The time is what is wanted most.
            traceback.print_exc()

    def shared(self, calls):
        """What was timed were so many calls."""
        self.out["calls"] = calls
        for of in ["seconds", "cpu"]:
            self.out[of] /= calls

    def run_short(self, work):
        """`run` of work that takes a GPU less time than it takes to ask for it."""
        if not self.gpu:
            return self.run(work)

        def many():
            for _ in range(GPU_CALLS - 1):
                work()
            return work()

        first = self.run(many)
        self.shared(GPU_CALLS)
        return first

    def pretrained(self, network, folder, **more):
        if self.gpu:
            more["device_map"] = self.device
        return network.from_pretrained(self.work / folder, dtype=self.dtype, **more)

    def qwen(self):
        from transformers import Qwen3ForCausalLM
        return self.pretrained(Qwen3ForCausalLM, self.folder)

    def serving(self):
        """The language model for one of several cases."""
        key = (self.folder, self.dtype)
        if self.kept[0] != key:
            self.kept = (key, self.qwen().eval())
        return self.kept[1]

    def gdino(self, **more):
        from transformers import GroundingDinoForObjectDetection
        return self.pretrained(GroundingDinoForObjectDetection, "gdino-swint", **more)

    def gdino_inputs(self, name):
        pixels, ids = self.input(name), self.input("gdino_ids")
        mask = torch.ones(pixels.shape[0], *pixels.shape[2:], dtype=torch.long, device=self.device)
        return dict(pixel_values=pixels, pixel_mask=mask, input_ids=ids, attention_mask=torch.ones_like(ids),
                    token_type_ids=torch.zeros_like(ids))

    # Cases.

    def gdino_fwd(self):
        model, x = self.gdino().eval(), self.gdino_inputs("gdino_fwd")
        self.loaded(model)
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
        labels = [{"class_labels": torch.tensor([0, 1, 2], device=self.device),
                   "boxes": torch.tensor([[.3, .4, .2, .3], [.6, .5, .3, .2], [.7, .2, .1, .1]], device=self.device)}]
        self.loaded(model)
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
        model, x = self.pretrained(Dinov2Model, "dinov2-large").eval(), self.input(f"vitl_{tokens}")
        self.loaded(model)
        with torch.inference_mode():
            return dict(hidden=sample(self.run(lambda: model(x).last_hidden_state)))

    def moge(self, tokens):
        if not self.a.moge:
            sys.exit("MoGe's case needs --moge DIR, a checkout of github.com/microsoft/MoGe")
        from safetensors.torch import load_file
        model, x = placed(self.device, lambda: official_moge(self.a.moge)), self.input("moge")
        model.load_state_dict(load_file(self.work / "moge-2-vitl" / "model.safetensors", device=self.device))
        self.loaded(model)
        with torch.inference_mode():
            out = self.run(lambda: model(x, num_tokens=int(tokens)))
        return {n: sample(out[n]) for n in ["points", "normal", "mask", "metric_scale"]}

    def prefill(self, tokens):
        model, ids = self.serving(), self.input("qwen_ids")[:1, :int(tokens)].contiguous()
        self.loaded(model)
        with torch.inference_mode():
            out = dict(logits=sample(self.run(lambda: model(ids, use_cache=True, logits_to_keep=1).logits)))
            self.exactly(model, ids)
            return out

    def exactly(self, model, ids):
        """What f32 makes of the same weights, against which two results in bf16 are held."""
        if self.dtype == torch.float32:
            return
        if self.gpu:
            self.out["gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
        # Forth and back without loss; a buffer of the model's would not come back.
        for p in model.parameters():
            p.data = p.data.float()
        self.out["exact"] = dict(logits=sample(model(ids, use_cache=False, logits_to_keep=1).logits))
        for p in model.parameters():
            p.data = p.data.to(self.dtype)

    def decode(self, batch):
        model, b, prompt, new = self.serving(), int(batch[1:]), 128, 64
        ids = self.input("qwen_ids")
        fed = ids[:b, prompt:prompt + new].contiguous()
        self.loaded(model)

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

            out = dict(logits=sample(self.run(steps, rows, lambda c: steps(c, 2))))
            self.exactly(model, torch.cat([ids[:1, :prompt].expand(b, -1), fed], 1))
            return out

    def qwen_train(self):
        model, ids = self.qwen().train(), self.input("qwen_ids")[:1, :512].contiguous()
        self.loaded(model)
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
        # peft keeps an adapter's matrices in f32, whatever the frozen weights are.
        model = get_peft_model(self.qwen(), LoraConfig(lora_dropout=0., bias="none", task_type="CAUSAL_LM", **LORA)).train()
        named = dict(model.named_parameters())
        own = lambda name: named["base_model.model." + name.replace(".weight", ".default.weight")]
        with torch.no_grad():
            for name, t in load_file(self.work / "lora.safetensors").items():
                own(name).copy_(t)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        ids = self.input("qwen_ids")[:2, :512].contiguous()
        advantages = torch.tensor([[1.], [-.5]], device=self.device)
        self.loaded(model)
        probe = {}

        def step():
            optimiser.zero_grad(set_to_none=True)
            logits = model(ids, use_cache=False).logits[:, :-1]
            # log p of each token, as trl's selective_log_softmax has it: no second table of the logits' size.
            log_p = logits.gather(-1, ids[:, 1:, None]).squeeze(-1).float() - torch.stack([l.float().logsumexp(-1) for l in logits])
            loss = -(advantages * log_p).mean()
            loss.backward()
            if not probe:
                probe["loss"] = [loss.item()]
                for name in ["0.self_attn.q_proj.lora_A", "0.self_attn.q_proj.lora_B", "27.mlp.down_proj.lora_A"]:
                    probe[name] = sample(own(f"model.layers.{name}.weight").grad)
            optimiser.step()

        self.run(step)
        return probe

    def msda_inputs(self, queries):
        given = [self.input(n).to(self.dtype) for n in ["msda_value", *(f"msda_{queries}_{n}" for n in ["at", "weights", "gradient"])]]
        shapes = torch.tensor(LEVELS, device=self.device)
        return *given, shapes, torch.cat((shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]))

    def msda(self, queries, way):
        from transformers.models.grounding_dino.modeling_grounding_dino import MultiScaleDeformableAttention
        *given, shapes, starts = self.msda_inputs(queries)
        attend = MultiScaleDeformableAttention()

        def work(value, at, weights, gradient):
            """What it gives, to be called again and again."""
            forward = lambda: attend(value, shapes, LEVELS, starts, at, weights, 64)
            if way == "fwd":
                return forward
            leaves = [t.requires_grad_() for t in (value, at, weights)]

            def both():
                for t in leaves:
                    t.grad = None
                out = forward()
                out.backward(gradient)
                return [out] + [t.grad for t in leaves]

            return both

        self.loaded()
        with torch.inference_mode(way == "fwd"):
            out = self.run_short(work(*given))
            if self.dtype != torch.float32:
                # Of the same numbers in f32: PyTorch rounds places to bf16 along the way, which says nothing of valor.
                out = work(*(t.detach().float() for t in given))()
        return {n: sample(t) for n, t in zip(["out", "value", "at", "weights"], out if way == "fwdbwd" else [out])}

    def msda_reference(self, queries, way):
        value, at, weights, gradient, shapes, starts = self.msda_inputs(queries)
        b, s, h, c = value.shape
        q, levels, points = at.shape[1], at.shape[3], at.shape[4]
        sizes = msda_reference.Sizes(b, s, h, c, levels, q, points)
        given = (value, shapes, starts, at, weights)
        results = [torch.empty_like(gradient)]
        if way == "fwdbwd":
            results += [torch.empty_like(t) for t in (value, at, weights)]
        more = (results[0], gradient, *results[1:]) if way == "fwdbwd" else results
        if self.reference is None:
            raise RuntimeError("needs --deformable DIR, a checkout of github.com/fundamentalvision/Deformable-DETR")
        stream = torch.cuda.current_stream().cuda_stream
        self.loaded()
        self.run(lambda: self.reference("both" if way == "fwdbwd" else "forward", GPU_CALLS, stream, sizes, *given, *more))
        self.shared(GPU_CALLS)
        return {n: sample(t) for n, t in zip(["out", "value", "at", "weights"], results)}

    def ceilings(self):
        """What the card reaches: bytes a second of a copy, read and written, and operations a second of a matrix product."""
        def timed(work, reps=10):
            spans = []
            for i in range(reps + 3):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                work()
                end.record()
                torch.cuda.synchronize()
                spans.append(start.elapsed_time(end) / 1e3)
            return statistics.median(spans[3:])

        a = torch.randn(10**9, device=self.device)
        b = torch.empty_like(a)
        self.out["bandwidth"] = 2 * a.nbytes / timed(lambda: b.copy_(a))
        del a, b
        for name, dtype in [("bf16", torch.bfloat16), ("f32", torch.float32)]:
            x, y = (torch.randn(8192, 8192, device=self.device, dtype=dtype) for _ in range(2))
            self.out[name] = 2 * 8192**3 / timed(lambda: x @ y)
        self.out["card"] = torch.cuda.get_device_name()


def case(a):
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    torch.set_num_threads(threads)
    names, bench = a.name.split(","), Bench(a)
    if bench.gpu:
        torch.cuda.init()
    a.tf32 = a.tf32 == "default" and torch.backends.cudnn.allow_tf32
    if a.deformable and any(n.endswith("_reference") for n in names):
        major, minor = torch.cuda.get_device_capability()
        bench.reference = msda_reference.Reference(a.deformable, f"sm_{major}{minor}")
    if a.make:
        make_for(a, names)
    failed = []
    for name in names:
        try:
            line = bench.case(name)
        except (Exception, SystemExit) as e:
            traceback.print_exc()
            print(json.dumps(dict(who=getattr(bench, "who", "peer"), case=name, error=f"{type(e).__name__}: {e}"[:2000])), flush=True)
            failed.append(name)
            continue
        peak = next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]
        import transformers
        versions = dict(python=sys.version.split()[0], torch=torch.__version__, transformers=transformers.__version__)
        if "peft" in sys.modules:
            versions["peft"] = sys.modules["peft"].__version__
        if bench.gpu:
            versions.update(CUDA=torch.version.cuda, cuDNN=str(torch.backends.cudnn.version()))
        probe = line.pop("probe")
        print(json.dumps(dict(who=bench.who, case=name, threads=threads, peak_mb=int(peak) / 1024, **line, versions=versions,
                              probe=probe)), flush=True)
    if failed:
        sys.exit("failed: " + ", ".join(failed))


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ap.add_subparsers(required=True)
    made = lambda a: make_for(a, a.cases.split(",")) if a.cases else make(a, a.parts.split(",") if a.parts else PARTS[:-1])
    for name, f in [("make", made), ("case", case)]:
        p = commands.add_parser(name)
        p.set_defaults(run=f)
        if name == "case":
            p.add_argument("name")
            p.add_argument("--reps", type=int, default=1)
            p.add_argument("--seconds", type=float, default=20)
            p.add_argument("--make", action="store_true", help="make first what is missing of the work folder")
            p.add_argument("--tf32", choices=["default", "off"], default="default", help="of convolutions on a GPU")
            p.add_argument("--deformable", help="checkout of Deformable DETR")
        else:
            p.add_argument("--parts", help=f"of {','.join(PARTS)} (default: all but the last)")
            p.add_argument("--cases", help="what these need, in place of --parts")
        p.add_argument("work")
        p.add_argument("--moge", help="checkout of the official code")
        p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    a = ap.parse_args()
    a.run(a)
