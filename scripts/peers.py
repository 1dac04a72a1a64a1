#!/usr/bin/env python3
"""valor beside PyTorch: time, processor time, peak memory. Development only.

  python scripts/peers.py [--runs 3] [--only case,case] [--work DIR] [--raw FILE] [--moge DIR] [--threads 2] [--table FILE]
  python scripts/peers.py --gpu [--bench PROGRAM] [--moge DIR] [--deformable DIR] [--side peer|valor] [--anew] [--tf32 off] [...]
  python scripts/peers.py [--gpu] --table-only [--raw FILE]

Runs PyTorch (transformers, PEFT, the official MoGe) and valor in turn, each case in a process of its own, on the same
weights (random, full size), inputs, threads and dtype, and writes data/results/speed.md. benches/peers/speed.py is
the one side, benches/speed.rs the other; say there how a case works. Times are of the work alone, with the weights
loaded and after a warm-up; peak memory is of the whole process. Each side prints numbers of its result, and where
they differ by more than rounding there is no ratio.

Goes on where it stopped: every run is kept in the raw file (default WORK/runs.json), a case that has --runs of them
is not run again, and the table has all that are there. Raise --runs for more; name another raw file to begin anew,
as after a change of valor. Without --only, all cases: about half an hour a run on two quiet cores.

Needs an interpreter with: pip install torch transformers safetensors numpy scipy pillow peft (scipy and pillow: the
detector's loss; peft: lora_train). Work folder: 10 GB, by default in $XDG_CACHE_HOME or ~/.cache. DIR of --moge is a checkout of
github.com/microsoft/MoGe, without which its cases have valor's time only. Memory: 11 GB at most, in lora_train.

--gpu: the same on the first GPU beside eager PyTorch there, one process a side for all cases, since what is scarce is the
GPU; writes data/results/gpu.md. Three minutes on an H100, weights made there included; work folder: 25 GB, best in
memory (/dev/shm). --bench names a benches/speed.rs that was built elsewhere with `--features cuda`, else cargo builds it.
DIR of --deformable holds Deformable DETR's kernels (a checkout of github.com/fundamentalvision/Deformable-DETR), the
reference of deformable attention; nvcc compiles them. Runs go to the raw file (default data/results/gpu.json), from which
--table-only makes the table on a machine without a GPU.
"""
import argparse, datetime, json, math, os, platform, shlex, shutil, statistics, subprocess, sys, threading, time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / "benches" / "peers" / "speed.py"
TABLE = ROOT / "data" / "results" / "speed.md"
GPU_TABLE, GPU_RAW = (ROOT / "data" / "results" / f"gpu.{e}" for e in ["md", "json"])
QUESTION = "What color does the bed have?"
# f32 on both sides: rounding, grown through up to 28 layers. Packed weights round more: F16 11 bits, Q8_0 about 8.
F32, F16, Q8_0 = 2e-3, 2e-2, 1e-1
# On a GPU: bf16 has 8 bits on both sides; PyTorch's convolutions round to TF32's 11 unless told not to.
BF16, TF32 = 5e-2, 2e-2


@dataclass
class Case:
    name: str
    what: str
    peer: str = ""
    # Ratio that issue 7 asks for.
    goal: float | None = None
    tolerance: float = F32
    # Tokens in the time measured.
    tokens: int = 0
    # What to run in place of the bench.
    command: tuple = ()


def language():
    for n in [1024, 3000]:
        yield Case(f"prefill_{n}", f"Qwen3-0.6B, prefill of {n:,} tokens, f32", f"prefill_{n}", 1.0, F32, n)
    for ending, packing, tolerance in [("_f16", "f16 packed", F16), ("_q8_0", "Q8_0 packed", Q8_0)]:
        yield Case(f"prefill_1024{ending}", f"Qwen3-0.6B, prefill of 1,024 tokens, {packing}", "prefill_1024", None, tolerance, 1024)
    for batch in [1, 5, 32]:
        for ending, packing, tolerance in [("", "f32", F32), ("_f16", "f16 packed", F16), ("_q8_0", "Q8_0 packed", Q8_0)]:
            goal = 1.5 if batch == 32 else 2.0 if ending else None
            yield Case(f"decode_b{batch}{ending}", f"Qwen3-0.6B, decode of 64 tokens after 128, batch {batch}, {packing}",
                       f"decode_b{batch}", goal, tolerance, 64 * batch)
    yield Case("qwen_train", "Qwen3-0.6B, forward and backward of all weights, 512 tokens", "qwen_train", 1.0, F32, 512)
    yield Case("lora_train", "Qwen3-0.6B, policy-gradient step of LoRA (rank 32, all linear layers, AdamW), 2×512 tokens",
               "lora_train", None, F32, 1024)
    for ending, packing in [("", "f32"), ("_q8_0", "Q8_0 packed")]:
        yield Case(f"question_1000{ending}", f"Qwen3-0.6B, a second question after 1,000 shared tokens to its first token, {packing}")


# One that is chosen among close scores may be another: the detector's tolerances are wider.
CASES = [
    Case("gdino_fwd", "GroundingDINO Swin-T, forward, 800×1066", "gdino_fwd", 1.3, 2e-2),
    Case("gdino_train", "GroundingDINO Swin-T, training step, 480×640 (backbone and BERT frozen, AdamW)", "gdino_train", 1.0, 2e-2),
    Case("gdino_train_recompute", "the same with gradient checkpointing (`grounding.training.recompute`), beside the peer without",
         "gdino_train", None, 2e-2),
    Case("vitl_1800", "DINOv2 ViT-L/14 encoder, 1,800 tokens", "vitl_1800", 1.2),
    Case("vitl_3600", "DINOv2 ViT-L/14 encoder, 3,600 tokens", "vitl_3600", 1.2),
    Case("moge_1800", "MoGe-2 ViT-L, whole, 480×640, 1,800 tokens", "moge_1800"),
    Case("moge_3600", "MoGe-2 ViT-L, whole, 480×640, 3,600 tokens", "moge_3600"),
    *language(),
    *(Case(f"msda_{q}_{way}", f"deformable attention, {q:,} queries, {what}", f"msda_{q}_{way}", goal)
      for q in [900, 17821] for way, what, goal in [("fwd", "forward", None), ("fwdbwd", "forward and backward", 3.0)]),
    Case("infer", "`valor infer`, embedded models, data/demo/room.png: one answer, start-up included",
         command=("infer", "data/demo/room.png", QUESTION)),
    Case("start_up", "`valor --version`: start-up alone", command=("--version",)),
]


@dataclass
class GpuCase:
    name: str
    what: str
    tolerance: float
    # Ratio to the peer's time, or share of the limit.
    goal: float | None = None
    share: float | None = None
    tokens: int = 0
    # What must be moved and calculated at least, in bytes and floating-point operations. None: the peer counts it.
    bytes: float = 0
    flops: float | None = 0
    # "reference": Deformable DETR's kernels.
    beside: str = "peer"

    @property
    def dtype(self):
        return "bf16" if self.name.endswith("_bf16") else "f32"

    @property
    def peer(self):
        return self.name.removesuffix("_loose") + ("_reference" if self.beside == "reference" else "")


class Qwen:
    """What must be done of a language model, `size` bytes a number."""

    def __init__(self, hidden, mlp, layers, heads, size, kv_heads=8, dim=128, vocabulary=151936):
        self.query, self.kv = heads * dim, kv_heads * dim
        # Numbers of all layers' matrices, and of the head's.
        self.body = layers * hidden * (2 * self.query + 2 * self.kv + 3 * mlp)
        self.head = hidden * vocabulary
        self.hidden, self.mlp, self.layers, self.size = hidden, mlp, layers, size

    def attention(self, pairs):
        # A query and a key multiplied and, times the value, added: two operations a number each, in every layer.
        return 4 * self.query * self.layers * pairs

    def decode(self, batch, prompt=128, new=64):
        # Step i sees the prompt, what is decoded before it and itself.
        seen = sum(prompt + i + 1 for i in range(new))
        # A step reads every weight once (of the table of embeddings a row a token, of the head all), and of each row's
        # tokens the keys and values.
        moved = self.size * (new * (self.body + self.head) + batch * seen * 2 * self.kv * self.layers)
        # A token is multiplied by every weight once.
        return dict(bytes=moved, flops=batch * (new * 2 * (self.body + self.head) + self.attention(seen)))

    def prefill(self, n):
        # Every weight is read once; the head is for the last token only; half of all pairs are seen.
        return dict(bytes=self.size * (self.body + self.head), flops=2 * self.body * n + 2 * self.head + self.attention(n * (n + 1) / 2))

    def train(self, rows, n):
        # Backward is two products for each of forward's: the gradients of what goes in, and of the weights.
        return dict(flops=3 * rows * (2 * (self.body + self.head) * n + self.attention(n * (n + 1) / 2)))

    def lora(self, rows, n, rank):
        # Frozen weights have no gradient: backward is one product for each of theirs. The adapters have, a matrix in and one
        # out beside each of a layer's seven matrices.
        ends = 4 * self.hidden + 2 * self.query + 2 * self.kv + 3 * (self.hidden + self.mlp)
        adapters, frozen = self.layers * rank * ends, self.body + self.head
        return dict(flops=rows * (2 * 2 * frozen * n + 3 * 2 * adapters * n + 3 * self.attention(n * (n + 1) / 2)))


def deformable(queries, back, size, tokens=17821, heads=8, dim=32, samples=16):
    value, places, masses, out = tokens * heads * dim, queries * heads * samples * 2, queries * heads * samples, queries * heads * dim
    # Value, places and masses are read once, the result is written.
    moved = value + places + masses + out
    if back:
        # They are read again, with the result's gradient, and their gradients are written.
        moved += 2 * (value + places + masses) + out
    return dict(bytes=size * moved)


def gpu_cases():
    yield from decoding("decode8", "prefill8", "Qwen3-8B", Qwen(4096, 12288, 36, 32, 2), [1024], .6)
    yield from decoding("decode", "prefill", "Qwen3-0.6B", Qwen(1024, 3072, 28, 16, 2), [1024, 3000], None)
    small = Qwen(1024, 3072, 28, 16, 4)
    yield GpuCase("lora_train_bf16", "Qwen3-0.6B, policy-gradient step of LoRA (rank 32, all linear layers, AdamW), 2×512 tokens", BF16,
                  tokens=1024, **small.lora(2, 512, 32))
    yield GpuCase("qwen_train", "Qwen3-0.6B, forward and backward of all weights, 512 tokens", F32, tokens=512, **small.train(1, 512))
    counted = dict(goal=1., flops=None)
    yield GpuCase("gdino_fwd", "GroundingDINO Swin-T, forward, 800×1066", TF32, **counted)
    yield GpuCase("gdino_train", "GroundingDINO Swin-T, training step, 480×640 (backbone and BERT frozen, AdamW)", TF32, **counted)
    yield GpuCase("vitl_1800", "DINOv2 ViT-L/14 encoder, 1,800 tokens", TF32, **counted)
    for tokens in [1800, 3600]:
        yield GpuCase(f"moge_{tokens}", f"MoGe-2 ViT-L, whole, 480×640, {tokens:,} tokens", TF32, **counted)
    sides = [("reference", "", 4, F32, 1.), ("peer", "", 4, F32, None), ("peer", "_bf16", 2, BF16, None)]
    for beside, ending, size, tolerance, goal in sides:
        for queries in [900, 17821]:
            for way, what in [("fwd", "forward"), ("fwdbwd", "forward and backward")]:
                name = "deformable attention" + (" beside Deformable DETR's kernels" if beside == "reference" else "")
                for sums in ["", "_loose"] if beside == "reference" and way == "fwdbwd" else [""]:
                    how = ", its sums in any order, as there" if sums else ""
                    yield GpuCase(f"msda_{queries}_{way}{ending}{sums}", f"{name}, {queries:,} queries, {what}{how}", tolerance, goal,
                                  beside=beside, **deformable(queries, way == "fwdbwd", size))


def decoding(decode, prefill, name, model, prompts, share):
    for batch in [1, 32]:
        yield GpuCase(f"{decode}_b{batch}_bf16", f"{name}, decode of 64 tokens after 128, batch {batch}", BF16, share=share,
                      tokens=64 * batch, **model.decode(batch))
    for n in prompts:
        yield GpuCase(f"{prefill}_{n}_bf16", f"{name}, prefill of {n:,} tokens", BF16, tokens=n, **model.prefill(n))


GPU_CASES = list(gpu_cases())
# Bytes a second, and operations a second by type.
CEILINGS = ["bandwidth", "bf16", "f32"]


def machine():
    cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.machine())
    flags = next((l.split() for l in open("/proc/cpuinfo") if l.startswith("flags")), [])
    memory = int(next(l for l in open("/proc/meminfo") if l.startswith("MemTotal")).split()[1]) / 2**20
    return {"cpu": cpu, "cores": os.cpu_count(), "extensions": [f for f in ["avx2", "avx512f", "amx_bf16"] if f in flags],
            "memory_gib": round(memory), "system": f"{platform.system()} {platform.release()}"}


def commit():
    if not shutil.which("git"):
        return "unknown"
    git = lambda *args: subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = git("status", "--porcelain", "--", "src", "benches", "Cargo.toml", "Cargo.lock")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


def build(*more):
    """The bench and the program."""
    p = subprocess.run(["cargo", "build", "--release", "--bench", "speed", "--bin", "valor", "--message-format=json-render-diagnostics",
                        *more], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if p.returncode:
        sys.exit("cargo build failed")
    made = [json.loads(l) for l in p.stdout.splitlines() if l.startswith("{")]
    made = {m["target"]["name"]: m["executable"] for m in made if m.get("executable")}
    return made["speed"], made["valor"]


class Failed(Exception):
    pass


def measured(command, env):
    """A program's own wall and processor time and the peak of its memory (of its largest process)."""
    started = time.perf_counter()
    p = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = p.stderr.read()
    _, status, usage = os.wait4(p.pid, 0)
    seconds = time.perf_counter() - started
    p.returncode = os.waitstatus_to_exitcode(status)
    if p.returncode:
        raise Failed(errors.decode()[-2000:])
    return dict(who="valor", seconds=seconds, cpu=usage.ru_utime + usage.ru_stime, peak_mb=usage.ru_maxrss / 1024, probe={})


def reported(command, env):
    p = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    lines = [l for l in p.stdout.splitlines() if l.startswith("{")]
    if p.returncode or not lines:
        raise Failed(p.stderr[-2000:] or f"exit code {p.returncode}, no output")
    return json.loads(lines[-1])


def groups(cases):
    """Cases with one peer are measured beside the same runs of it."""
    by_peer = {}
    for c in cases:
        by_peer.setdefault(c.peer or c.name, []).append(c)
    return by_peer.values()


class Runs:
    def __init__(self, path, anywhere=False):
        """Runs of another machine are an error, unless they may be from anywhere."""
        self.path, self.data = path, {"machine": machine(), "runs": []}
        if path.exists():
            self.data = json.loads(path.read_text())
            if self.data["machine"] != machine() and not anywhere:
                sys.exit(f"{path}: was measured on another machine ({self.data['machine']}); name another file with --raw")

    def of(self, who, case):
        return [r for r in self.data["runs"] if (r["who"], r["case"]) == (who, case)]

    def add(self, run, to="runs"):
        self.data.setdefault(to, []).append(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps(self.data))
        partial.replace(self.path)


def measure(a, runs, chosen):
    env = dict(os.environ, RAYON_NUM_THREADS=str(a.threads), OMP_NUM_THREADS=str(a.threads), OMP_WAIT_POLICY="passive", HF_HUB_OFFLINE="1")
    moge = ["--moge", a.moge] if a.moge else []
    bench, valor = build()
    peer = [sys.executable, str(PEER)]
    if subprocess.run([*peer, "make", str(a.work), *moge], env=env).returncode:
        sys.exit(f"{a.work}: weights and inputs could not be made")
    for packing in ["f16", "q8_0"]:
        if not (a.work / f"qwen3-0.6b_{packing}.gguf").exists():
            subprocess.run([bench, "pack", str(a.work), packing], env=env, check=True)
    has_moge = (a.work / "moge-2-vitl" / "model.safetensors").exists()
    failures, at = [], commit()
    for group in groups(chosen):
        sides = [("valor", c.name, c) for c in group]
        if group[0].peer and (a.moge or not group[0].peer.startswith("moge")):
            sides.insert(0, ("peer", group[0].peer, group[0]))
        if group[0].name.startswith("moge") and not has_moge:
            print(f"{group[0].name}: not run, its weights are made with --moge", file=sys.stderr)
            continue
        for turn in range(a.runs):
            for who, name, case in sides:
                if len(runs.of(who, name)) > turn:
                    continue
                load = os.getloadavg()[0]
                try:
                    if who == "peer":
                        run = reported([*peer, "case", name, str(a.work), *moge, "--reps", str(a.reps), "--seconds", str(a.seconds)], env)
                    elif case.command:
                        run = measured([valor, *case.command], env)
                    else:
                        run = reported([bench, name, str(a.work), str(a.reps), str(a.seconds)], env)
                except Failed as e:
                    failures.append(f"{who} {name}")
                    print(f"{who} {name}: {e}", file=sys.stderr)
                    continue
                run.update(case=name, threads=a.threads, load=load, date=datetime.datetime.now().isoformat(timespec="seconds"))
                if who == "valor":
                    run["versions"] = {"valor": at}
                runs.add(run)
                print(f"{who:5} {name}: {run['seconds']:.3f} s, {run['cpu']:.3f} s CPU, {run['peak_mb']:.0f} MB (load {load:.1f})", flush=True)
    return failures


def card():
    """The GPU's name, driver and memory."""
    if not shutil.which("nvidia-smi"):
        sys.exit("nvidia-smi is not there: --gpu wants an NVIDIA GPU (--table-only does not)")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    name, driver, memory = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0].split(", ")
    return dict(name=name, driver=driver, memory=memory)


def measure_gpu(a, runs, chosen):
    """One process a side: what is scarce is the GPU, and starting Python and loading weights take longer than a case."""
    env = dict(os.environ, RAYON_NUM_THREADS=str(a.threads), OMP_NUM_THREADS=str(a.threads), HF_HUB_OFFLINE="1", VALOR_DEVICE="cuda")
    moge = ["--moge", a.moge] if a.moge else []
    peer = [sys.executable, str(PEER), "case", "--device", "cuda", "--make", "--tf32", a.tf32, *moge,
            *(["--deformable", a.deformable] if a.deformable else [])]
    bench = a.bench or build("--features", "cuda")[0]
    at, gpu, failures = a.commit or commit(), card(), []
    has = lambda c: not (c.beside == "reference" and not a.deformable) and (a.moge or not c.name.startswith("moge"))
    has_moge = a.moge or (a.work / "moge-2-vitl" / "model.safetensors").exists()
    own = dict.fromkeys(c.name for c in chosen if has_moge or not c.name.startswith("moge"))
    names = {"peer": ["ceilings", *dict.fromkeys(c.peer for c in chosen if has(c))], "valor": list(own)}

    def run(side, left):
        """Those that failed, and those of them that another process might not fail."""
        cases, work, reps, longest = ",".join(left), str(a.work), str(a.reps), str(a.seconds)
        own = [*peer, cases, work, "--reps", reps, "--seconds", longest]
        command = own if side == "peer" else [bench, cases, work, reps, longest]
        begun, failed = time.perf_counter(), {}
        p = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        limit = threading.Timer(a.limit, p.kill)
        limit.start()
        missing = dict.fromkeys(left, "no result")
        for line in p.stdout:
            if not line.startswith("{"):
                continue
            one = json.loads(line)
            missing.pop(one["case"], None)
            one.update(threads=a.threads, load=os.getloadavg()[0], date=datetime.datetime.now().isoformat(timespec="seconds"), card=gpu)
            if "error" in one:
                failed[one["case"]] = one["error"]
                runs.add(one, "failed")
                continue
            if side == "valor":
                one["versions"] = {"valor": at}
            runs.add(one)
            took = f"{one['seconds']:.6f} s, {one['gpu_mb']:.0f} MB" if "seconds" in one else ", ".join(f"{n} {one[n]}" for n in CEILINGS)
            print(f"[{time.perf_counter() - begun:5.1f} s] {one['who']} {one['case']}: {took}", flush=True)
        code = p.wait()
        limit.cancel()
        for name in missing:
            failed[name] = f"no result, exit code {code}"
            runs.add(dict(who=side, case=name, error=failed[name], card=gpu), "failed")
        for name, error in failed.items():
            print(f"{side} {name}: {error}", file=sys.stderr, flush=True)
        # After an error of CUDA's a process has no GPU any more, and it may have ended in a case.
        first = next((n for n in left if "CUDA" in failed.get(n, "") or n in missing), None)
        behind = left[left.index(first) + 1:] if first else []
        return [n for n in left if n in failed], [n for n in behind if n in failed]

    who = lambda side, name: "reference" if name.endswith("_reference") else side
    sides = [side for side in ["peer", "valor"] if a.side in (None, side)]
    if a.anew:
        old = {(who(side, n), n) for side in sides for n in names[side]}
        for kept in ["runs", "failed"]:
            runs.data[kept] = [r for r in runs.data.get(kept, []) if (r["who"], r["case"]) not in old]
    made = False
    for turn in range(a.runs):
        for side in sides:
            left = [n for n in names[side] if len(runs.of(who(side, n), n)) <= turn]
            if not left:
                continue
            if side == "valor" and not made:
                making = [sys.executable, str(PEER), "make", "--device", "cuda", *moge, "--cases", ",".join(left), str(a.work)]
                subprocess.run(making, env=env, check=True)
            made = True
            failed, again = run(side, left)
            if again:
                failed = [n for n in failed if n not in again] + run(side, again)[0]
            failures += [f"{side} {n}" for n in failed]
    return failures


def difference(peer, valor):
    """The largest of the parts' differences, each as a share of the part's size (root mean squares)."""
    if set(peer) != set(valor) or any(len(peer[n]) != len(valor[n]) for n in peer):
        return math.inf
    rms = lambda x: math.sqrt(sum(v * v for v in x) / len(x))
    errors = [rms([p - v for p, v in zip(peer[n], valor[n])]) / (rms(peer[n]) or 1) for n in peer]
    # NaN is no agreement, and max() would pass over it.
    return math.inf if any(math.isnan(e) for e in errors) else max(errors)


def seconds(x):
    return f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 1 else f"{x:.4f}"


def row(case, runs):
    peer, valor = runs.of("peer", case.peer) if case.peer else [], runs.of("valor", case.name)
    mid = lambda all, key: statistics.median(r[key] for r in all)
    cell = lambda all, key, form: form(mid(all, key)) if all else "not run" if all is valor or case.peer else "–"
    mb = lambda x: f"{x:,.0f}"
    ratio = memory = apart = "–"
    if peer and valor:
        d = max(difference(p["probe"], v["probe"]) for p in peer for v in valor)
        apart = f"{d:.0e}"
        if d <= case.tolerance:
            ratio = f"**{mid(peer, 'seconds') / mid(valor, 'seconds'):.2f}**"
            memory = f"{mid(peer, 'peak_mb') / mid(valor, 'peak_mb'):.2f}"
        else:
            ratio = "results differ"
    count = f"{len(peer)} / {len(valor)}" if case.peer else str(len(valor))
    cells = [f"{case.what} (`{case.name}`)", cell(peer, "seconds", seconds), cell(valor, "seconds", seconds), ratio,
             f"≥ {case.goal}" if case.goal else "", cell(peer, "cpu", seconds), cell(valor, "cpu", seconds), cell(peer, "peak_mb", mb),
             cell(valor, "peak_mb", mb), memory, apart, count]
    return "| " + " | ".join(cells) + " |"


def table(a, runs):
    m, all = runs.data["machine"], runs.data["runs"]
    known = {}
    for r in all:
        for name, version in r.get("versions", {}).items():
            known.setdefault(name, []).append(version)
    versions = ", ".join(f"{n} {' and '.join(dict.fromkeys(v))}" for n, v in sorted(known.items()))
    dates = sorted(r["date"][:10] for r in all)
    days = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "never"
    threads = " and ".join(dict.fromkeys(str(r["threads"]) for r in all))
    loads = [r["load"] for r in all] or [0.]
    command = ["python", "scripts/peers.py", "--runs", str(a.runs), *(["--moge", "MoGe"] if a.moge else []),
               *(["--table", os.path.relpath(a.table, ROOT)] if a.table else [])]
    out = [
        "# Speed beside PyTorch", "",
        f"`{shlex.join(command)}` writes this file; its first lines say what it needs and does.", "",
        f"- Machine: {m['cpu']}, {m['cores']} cores ({', '.join(m['extensions'])}), {m['memory_gib']} GiB, {m['system']}; {threads} threads",
        f"- Versions: {versions}",
        f"- Measured: {days}; the machine's load as each run began was {statistics.median(loads):.1f} in the median, {max(loads):.1f} at most",
        "- Each figure is the median of alternating runs, a process each (last column: how many, of peer and valor), and a run's of its "
        "repetitions after a warm-up. Ratios are peer / valor: above 1, valor is faster, or takes less memory.",
        "- Weights are random, of full size. \"Apart\" is how far valor's result is from the peer's, as a share of its size; where it "
        "is more than rounding explains, there is no ratio. The peer computes in f32, also beside packed weights.", "",
        "| case | peer s | valor s | ratio | goal | peer CPU s | valor CPU s | peer MB | valor MB | memory ratio | apart | runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    out += [row(c, runs) for c in CASES if not a.table or runs.of("valor", c.name)]
    on_gpu = f"[{GPU_TABLE.name}]({GPU_TABLE.name}) has the same on a GPU" if GPU_TABLE.exists() else "not run (`--gpu` writes it)"
    out += ["", f"GPU: {on_gpu}."]
    rates = []
    for c in CASES:
        peer, valor = runs.of("peer", c.peer), runs.of("valor", c.name)
        if c.tokens and valor:
            rate = lambda all: f"{c.tokens / statistics.median(r['seconds'] for r in all):,.0f}" if all else "not run"
            rates.append(f"| {c.what} | {rate(peer)} | {rate(valor)} |")
    if rates:
        out += ["", "Tokens a second. A GRPO step's rollout is the decode of a batch of 32, its training the LoRA step:", "",
                "| case | peer | valor |", "|---|---|---|", *rates]
    asked = [(c, runs.of("valor", c.name)) for c in CASES if c.name.startswith("question")]
    if any(found for _, found in asked):
        out += ["", "Questions in one process, 1,000 shared tokens and 24 of their own, seconds to the first token:", "",
                "| case | first | second | third | prompt tokens computed, of 3,072 |", "|---|---|---|---|---|"]
        for c, found in asked:
            if found:
                times = [seconds(statistics.median(r["questions_s"][i] for r in found)) for i in range(3)]
                out.append(f"| {c.name} | {' | '.join(times)} | {found[-1]['prefilled']:,} |")
    write(a.table or TABLE, out)


def write(table, lines):
    table.write_text("\n".join(lines) + "\n")
    print(f"wrote {os.path.relpath(table, ROOT)}")


def gpu_row(case, runs, ceilings):
    mid = lambda all, key: statistics.median(r[key] for r in all)
    peer, valor = runs.of(case.beside, case.peer), runs.of("valor", case.name)
    failed = {(f["who"], f["case"]) for f in runs.data.get("failed", [])}

    def cell(all, key, form):
        if all:
            return form(mid(all, key))
        return "failed" if ((case.beside, case.peer) if all is peer else ("valor", case.name)) in failed else "not run"

    apart = ratio = limit = "–"
    share = lambda all: "–"
    agree = True
    if peer and valor:
        d = max(difference(p["probe"], v["probe"]) for p in peer for v in valor)
        apart, agree = f"{d:.0e}", d <= case.tolerance
        if exact := peer[-1].get("exact"):
            # Both round: neither may be farther from what f32 makes of it than a rounding more.
            own, theirs = (max(difference(exact, r["probe"]) for r in all) for all in (valor, peer))
            apart, agree = f"{own:.0e} (PyTorch {theirs:.0e})", own <= max(1.5 * theirs, case.tolerance)
        ratio = f"**{mid(peer, 'seconds') / mid(valor, 'seconds'):.2f}**" if agree else "results differ"
    flops = case.flops if case.flops is not None else peer[0].get("flops") if peer else None
    if ceilings and flops is not None:
        least = max(case.bytes / ceilings["bandwidth"], flops / ceilings[case.dtype])
        limit = gpu_time(least)
        share = lambda all: f"{least / mid(all, 'seconds'):.0%}" if all else "–"
    goal = f"≥ {case.goal}" if case.goal else f"≥ {case.share:.0%} of the limit" if case.share else ""
    mb = lambda x: f"{x:,.0f}"
    rate = lambda all: f"{case.tokens / mid(all, 'seconds'):,.0f}" if case.tokens and all else ""
    cells = [f"{case.what} (`{case.name}`)", case.dtype, cell(peer, "seconds", gpu_time), cell(valor, "seconds", gpu_time), ratio, goal,
             limit, share(peer), share(valor) if agree else "results differ", cell(peer, "gpu_mb", mb), cell(valor, "gpu_mb", mb), apart,
             rate(peer), rate(valor), f"{len(peer)} / {len(valor)}"]
    return "| " + " | ".join(cells) + " |"


def detector_note(versions):
    """transformers 5.17 makes other numbers of the detector than 5.24 does of the same weights, on the CPU too."""
    if all(tuple(int(n) for n in v.split(".")[:2]) >= (5, 24) for v in versions):
        return []
    return ["- transformers 5.17 makes other numbers of GroundingDINO than 5.24 does of the same weights, on the CPU as well; valor's are 5.24's "
            "(speed.md). So the detector's results differ here, by more than rounding, though the work is the same; it has no ratio."]


def sessions_note(runs):
    """Cases whose two sides were measured in different sessions of the card (--side, --anew)."""
    when = lambda all: [datetime.datetime.fromisoformat(r["date"]) for r in all]
    names = [c.name for c in GPU_CASES if (p := when(runs.of(c.beside, c.peer))) and (v := when(runs.of("valor", c.name)))
             and abs(max(p) - max(v)) > datetime.timedelta(minutes=15)]
    if not names:
        return []
    return [f"- Of these cases the peer was measured earlier than valor, on a card of the same kind: {', '.join(dict.fromkeys(names))}."]


def grpo_steps(metrics):
    """Of a GRPO run's metrics: the parts of a step, medians of all but the first (which starts what the others find)."""
    steps = [m for m in map(json.loads, open(metrics)) if isinstance(m.get("seconds"), dict) and "rollouts" in m][1:]
    if not steps:
        sys.exit(f"{metrics}: fewer than two steps of train-reasoner")
    mid = lambda of: statistics.median(of(m) for m in steps)
    phases = dict.fromkeys(p for m in steps for p in m["seconds"])
    return dict(steps=len(steps), seconds={p: mid(lambda m: m["seconds"].get(p, 0.)) for p in phases},
                **{k: mid(lambda m: m[k]) for k in ["rollouts", "rollout_tokens_per_second", "trained_tokens_per_second"]})


def grpo_lines(g):
    whole = sum(g["seconds"].values())
    return ["", f"A GRPO step of the embedded planner ({g['rollouts']:.0f} rollouts, judged by the embedded verifier; median of "
            f"{g['steps']} steps of `valor train-reasoner --config configs/rooms-reasoner.toml --device cuda`): {whole:.2f} s, "
            f"{g['rollout_tokens_per_second']:,.0f} tokens sampled and {g['trained_tokens_per_second']:,.0f} trained on a second.", "",
            "| part | s | share |", "|---|---|---|", *(f"| {p} | {s:.3f} | {s / whole:.0%} |" for p, s in g["seconds"].items())]


def gpu_time(x):
    return seconds(x) if x >= 1 else f"{x:.3g}"


def gpu_table(a, runs):
    all = runs.data["runs"]
    if not all:
        sys.exit(f"{runs.path}: holds no runs")
    unique = lambda found: " and ".join(dict.fromkeys(found))
    known = {}
    for r in all:
        for name, version in r.get("versions", {}).items():
            known.setdefault(name, []).append(version)
    found = runs.of("peer", "ceilings")
    ceilings = {key: statistics.median(r[key] for r in found) for key in CEILINGS} if found else None
    attention = {}
    for r in all:
        if used := r.get("attention"):
            used = used if isinstance(used, str) else ", ".join(dict.fromkeys(f"{way} in {name}" for name, way in used.items()))
            attention.setdefault(used if "eager" in used else "sdpa", []).append(r["case"])
    eager = [f"{', '.join(f'`{n}`' for n in dict.fromkeys(cases))}: {used}" for used, cases in attention.items() if used != "sdpa"]
    command = ["python", "scripts/peers.py", "--gpu", "--runs", str(a.runs), "--moge", "MoGe", "--deformable", "Deformable-DETR"]
    out = [
        "# Speed on a GPU beside PyTorch", "",
        f"`{shlex.join(command)}` writes this file; the script's first lines say what it needs and does.", "",
        f"- Card: {unique('{name}, {memory}, driver {driver}'.format(**r['card']) for r in all)}",
        f"- Versions: {', '.join(f'{n} {unique(v)}' for n, v in sorted(known.items()))}",
        f"- Measured: {unique(sorted(r['date'][:10] for r in all))}",
        "- Ceilings, measured by PyTorch: " + ("not run" if not ceilings else
            f"{ceilings['bandwidth'] / 1e12:.2f} TB/s of a copy (4 GB, bytes read and written), {ceilings['bf16'] / 1e12:.0f} TFLOP/s of a "
            f"product 8192³ in bf16, {ceilings['f32'] / 1e12:.1f} in f32"),
        f"- PyTorch is eager with its defaults: TF32 is off in products and on in convolutions, of both sides; off there too for the "
        "detector, which would choose other queries for it. (valor's large products of f32 with frozen weights are made of three TF32 ones, "
        "nearly to f32's precision: a case's share of the limit of plain f32 can pass 100 % too.) "
        f"Attention is sdpa{'; '.join(['', *eager])}.",
        "- A figure is the median of repetitions after three warm-ups, the clock read when the GPU is done. Decoding reads each "
        "step's choice back, as serving does. Deformable attention is timed 20 calls together, so that its inputs are mostly in "
        "the card's cache, and a share of the limit can pass 100 %.",
        "- The limit is the larger of bytes / bandwidth and operations / rate (of the case's type): scripts/peers.py says which bytes "
        "and operations. Of the detector, DINOv2 and MoGe it is the operations alone, as PyTorch's counter has them.",
        f"- \"Apart\" is how far valor's result is from the peer's, as a share of its size. Beyond {BF16:g} in bf16, {TF32:g} where there are "
        f"convolutions (TF32) and {F32:g} in f32 there is no ratio. Language models in bf16 are held against f32 on the same weights, "
        "beside PyTorch's own distance from it, of which half as much again is allowed; deformable attention in bf16 against f32 on the same "
        "rounded numbers.",
        *sessions_note(runs),
        *detector_note([r["versions"]["transformers"] for r in all if r["case"].startswith("gdino") and "transformers" in r.get("versions", {})]),
        "- Memory is what was taken of the GPU at most, weights included. Ratios are peer / valor: above 1, valor is faster.", "",
        "| case | type | peer s | valor s | ratio | goal | limit s | peer's share | valor's share | peer MB | valor MB | apart "
        "| peer tokens/s | valor tokens/s | runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(gpu_row(c, runs, ceilings) for c in GPU_CASES),
        *(grpo_lines(runs.data["grpo"]) if "grpo" in runs.data else []),
    ]
    write(GPU_TABLE, out)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "valor-peers"
    ap.add_argument("--work", type=Path, default=cache, help="folder of weights and inputs (default: %(default)s)")
    ap.add_argument("--raw", type=Path, help="every run so far (default: runs.json in the work folder; of --gpu data/results/gpu.json)")
    ap.add_argument("--runs", type=int, help="runs of each side (default: 3; of --gpu 1)")
    of_gpu = ", ".join(dict.fromkeys(c.name for c in GPU_CASES))
    ap.add_argument("--only", help=f"of: {', '.join(c.name for c in CASES)}; of --gpu: {of_gpu}")
    ap.add_argument("--moge", help="checkout of the official MoGe")
    ap.add_argument("--threads", type=int, help="default: 2; of --gpu all")
    ap.add_argument("--table", type=Path, help="of another machine: only what was run, in a file of its own")
    ap.add_argument("--reps", type=int, help="repetitions within a run, at most (default: 5; of --gpu 20)")
    ap.add_argument("--seconds", type=float, help="after which no repetition is begun (default: 10; of --gpu 2)")
    ap.add_argument("--table-only", action="store_true", help="write the table of the raw file, run nothing")
    ap.add_argument("--gpu", action="store_true", help="on the first GPU")
    ap.add_argument("--bench", help="benches/speed.rs built with --features cuda (default: cargo builds it)")
    ap.add_argument("--commit", help="what --bench was built of (default: git says)")
    ap.add_argument("--deformable", help="checkout of Deformable DETR")
    ap.add_argument("--anew", action="store_true", help="of --gpu: forget earlier runs of what is run")
    ap.add_argument("--side", choices=["peer", "valor"], help="only this one")
    ap.add_argument("--grpo", help="metrics.jsonl of a run of train-reasoner on this GPU, for the table")
    ap.add_argument("--tf32", choices=["default", "off"], default="default", help="of PyTorch's convolutions")
    ap.add_argument("--limit", type=float, default=600, help="seconds after which a process is ended (default: %(default)s)")
    a = ap.parse_args()
    defaults = dict(runs=1, threads=os.cpu_count(), reps=20, seconds=2.) if a.gpu else dict(runs=3, threads=2, reps=5, seconds=10.)
    for name, value in defaults.items():
        if getattr(a, name) is None:
            setattr(a, name, value)
    a.work, a.table = a.work.resolve(), a.table and a.table.resolve()
    for name in ["moge", "deformable", "bench"]:
        setattr(a, name, getattr(a, name) and str(Path(getattr(a, name)).resolve()))
    cases, measured_by, table_of = (GPU_CASES, measure_gpu, gpu_table) if a.gpu else (CASES, measure, table)
    names = a.only.split(",") if a.only else [c.name for c in cases]
    unknown = sorted(set(names) - {c.name for c in cases})
    if unknown:
        ap.error(f"no case is called {', '.join(unknown)}")
    raw = (a.raw or (GPU_RAW if a.gpu else a.work / "runs.json")).resolve()
    if a.table_only and not raw.exists():
        sys.exit(f"{raw}: no such file")
    runs = Runs(raw, anywhere=a.gpu or a.table_only)
    if a.grpo:
        runs.data["grpo"] = grpo_steps(a.grpo)
        raw.write_text(json.dumps(runs.data))
    if a.table_only:
        return table_of(a, runs)
    try:
        failures = measured_by(a, runs, [c for c in cases if c.name in names])
    finally:
        if runs.data["runs"]:
            table_of(a, runs)
    if failures:
        sys.exit("failed: " + ", ".join(dict.fromkeys(failures)))


if __name__ == "__main__":
    main()
