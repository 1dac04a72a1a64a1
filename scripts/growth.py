#!/usr/bin/env python3
"""How valor's time and memory grow with the size of the work: data/results/growth.md and growth.svg. Development only.

  python scripts/growth.py --work DIR [--bench PROGRAM] [--raw FILE] [--threads 2] [--table-only]

Runs cases of benches/speed.rs on the work folder that scripts/peers.py makes, one size after another, each in a process of its
own, and fits time ~ size^a by least squares of the logarithms. Time is a median after a warm-up; memory is what the work took
beside weights and inputs. Goes on where it stopped (the raw file keeps each run). About ten minutes on two cores.
"""
import argparse, json, math, os, subprocess, sys
from dataclasses import dataclass
from pathlib import Path

from peers import machine

ROOT = Path(__file__).resolve().parent.parent
TABLE, PLOT = (ROOT / "data" / "results" / f"growth.{e}" for e in ["md", "svg"])


@dataclass
class Series:
    name: str
    what: str
    unit: str
    # The algorithm's own exponent of time at these sizes, and why.
    own: str
    # (case, size).
    cases: list


# Shortest sides as the paper's fine-tuning draws them, and half of the least.
TRAINED = [(240, 320), (480, 640), (640, 853), (800, 1066)]

SERIES = [
    Series("picture", "GroundingDINO Swin-T, forward", "pixels",
           "1: windows and sampled points are as many as pixels; what is per query or per word does not grow",
           [(f"gdino_fwd_{h}x{w}", h * w) for h, w in [(200, 266), (283, 376), (400, 533), (566, 754), (800, 1066)]]),
    Series("training", "GroundingDINO Swin-T, training step (backbone and BERT frozen)", "pixels", "1: as forward",
           [(f"gdino_train_{h}x{w}", h * w) for h, w in TRAINED]),
    Series("recomputed", "the same with gradient checkpointing", "pixels", "1: as forward",
           [(f"gdino_train_recompute_{h}x{w}", h * w) for h, w in TRAINED]),
    Series("prompt", "Qwen3-0.6B f32, prefill", "tokens",
           "1 to 2: products with weights grow as tokens, attention as their square (at 3,000 tokens over a quarter of all operations)",
           [(f"prefill_{n}", n) for n in [192, 384, 768, 1536, 3000]]),
    Series("batch", "Qwen3-0.6B f32, decode of 64 tokens after 128", "rows",
           "0 to 1: the weights are read once a step for all rows; then operations, as many as rows",
           [(f"decode_b{n}", n) for n in [1, 2, 4, 8, 16, 32]]),
    Series("boxes", "matching and losses of 900 queries, forward and backward", "true boxes",
           "0 to 2: the costs are queries x boxes, the assignment of n boxes to m queries takes n^2 m at worst",
           [(f"boxes_{n}", n) for n in [10, 30, 100, 300]]),
]


def exponent(points):
    """The slope of log y over log x, and its standard error."""
    points = [(math.log(x), math.log(y)) for x, y in points if y > 0]
    n = len(points)
    if n < 3:
        return None
    mx, my = (sum(p[i] for p in points) / n for i in (0, 1))
    sxx = sum((x - mx) ** 2 for x, _ in points)
    slope = sum((x - mx) * (y - my) for x, y in points) / sxx
    rest = sum((y - my - slope * (x - mx)) ** 2 for x, y in points)
    return slope, math.sqrt(rest / (n - 2) / sxx)


def measure(a, runs):
    env = dict(os.environ, RAYON_NUM_THREADS=str(a.threads))
    for s in SERIES:
        for case, _ in s.cases:
            if case in runs:
                continue
            p = subprocess.run([a.bench, case, str(a.work), str(a.reps), str(a.seconds)], env=env, capture_output=True, text=True)
            lines = [l for l in p.stdout.splitlines() if l.startswith("{")]
            if p.returncode or not lines:
                sys.exit(f"{case}: {p.stderr[-2000:]}")
            runs[case] = {k: v for k, v in json.loads(lines[-1]).items() if k != "probe"}
            runs[case]["load"] = os.getloadavg()[0]
            partial = a.raw.with_suffix(".tmp")
            partial.write_text(json.dumps(runs))
            partial.replace(a.raw)
            print(f"{case}: {runs[case]['seconds']:.4f} s, {runs[case]['work_mb']:.0f} MB", flush=True)


def plot(found):
    """A panel for each work: time and memory over size on logarithmic axes, each measured point and the fitted line."""
    w, h, out = 420, 300, []
    text = lambda x, y, s, more="": out.append(f'<text x="{x:.0f}" y="{y:.0f}" {more}>{s}</text>')
    for k, (s, points) in enumerate(found):
        x0, y0 = 60 + k % 2 * (w + 60), 40 + k // 2 * (h + 90)
        xs = [p[0] for p in points]
        lx = lambda v: x0 + w * (math.log(v / xs[0]) / math.log(xs[-1] / xs[0]))
        text(x0, y0 - 14, f"{s.what}, over {s.unit}", 'font-weight="bold"')
        out.append(f'<rect x="{x0}" y="{y0}" width="{w}" height="{h}" fill="none" stroke="#999"/>')
        for v in xs:
            text(lx(v), y0 + h + 16, f"{v:,}", 'text-anchor="middle"')
        for column, colour, unit, dx in [(1, "#1f5fa8", "s", -6), (2, "#b3541e", "MB", None)]:
            ys = [(p[0], p[column]) for p in points if p[column] > 0]
            fit = exponent(ys)
            if not fit:
                continue
            low, high = min(y for _, y in ys), max(y for _, y in ys)
            high = max(high, low * 1.2)
            ly = lambda v: y0 + h - 24 - (h - 48) * (math.log(v / low) / math.log(high / low))
            mx, my = (sum(math.log(p[i]) for p in ys) / len(ys) for i in (0, 1))
            at = lambda x: math.exp(my + fit[0] * (math.log(x) - mx))
            clip = lambda v: min(max(ly(v), y0), y0 + h)
            out.append(f'<line x1="{lx(xs[0]):.1f}" y1="{clip(at(xs[0])):.1f}" x2="{lx(xs[-1]):.1f}" y2="{clip(at(xs[-1])):.1f}" '
                       f'stroke="{colour}"/>')
            out += [f'<circle cx="{lx(x):.1f}" cy="{ly(y):.1f}" r="4" fill="{colour}"/>' for x, y in ys]
            for v in (low, high):
                side = f'x="{x0 - 6}" text-anchor="end"' if dx else f'x="{x0 + w + 6}"'
                out.append(f'<text {side} y="{ly(v) + 4:.0f}" fill="{colour}">{v:.3g}</text>')
            text(x0 + 10, y0 + 18 * column, f"{'time' if unit == 's' else 'memory'} ({unit}): exponent {fit[0]:.2f}", f'fill="{colour}"')
    width, height = 2 * w + 180, (len(found) + 1) // 2 * (h + 90) + 10
    PLOT.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">\n'
                    f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(out) + "\n</svg>\n")


def table(runs):
    m = machine()
    found = [(s, [(size, runs[c]["seconds"], runs[c]["work_mb"]) for c, size in s.cases if c in runs]) for s in SERIES]
    out = ["# How time and memory grow", "", "`python scripts/growth.py --work DIR` writes this and [growth.svg](growth.svg).", "",
           f"{m['cpu']}, {m['cores']} cores ({', '.join(m['extensions'])}), f32, one process a size; the exponent is the slope of the logarithms over all sizes, with its standard error. Memory is what "
           "the work took beside weights and inputs.", "",
           "| work | over | time grows as | memory grows as | the algorithm's own, of time |", "|---|---|---|---|---|"]
    power = lambda p: f"{p[0]:.2f} ± {p[1]:.2f}" if p else "too few sizes"
    for s, points in found:
        out.append(f"| {s.what} | {s.unit} | {power(exponent([(p[0], p[1]) for p in points]))} | "
                   f"{power(exponent([(p[0], p[2]) for p in points]))} | {s.own} |")
    out += ["", "| work | size | s | MB |", "|---|---|---|---|"]
    out += [f"| {s.what} | {size:,} {s.unit} | {t:.4g} | {mb:,.0f} |" for s, points in found for size, t, mb in points]
    loads = sorted(r["load"] for r in runs.values())
    out += ["", f"The machine's load as the runs ended was {loads[len(loads) // 2]:.1f} in the median, {loads[-1]:.1f} at most."]
    TABLE.write_text("\n".join(out) + "\n")
    plot([f for f in found if len(f[1]) > 1])
    print(f"wrote {TABLE.relative_to(ROOT)} and {PLOT.relative_to(ROOT)}")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--work", type=Path, required=True)
    ap.add_argument("--bench", help="benches/speed.rs as built (default: cargo builds it)")
    ap.add_argument("--raw", type=Path, help="every run so far (default: growth.json in the work folder)")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--reps", type=int, default=3)
    ap.add_argument("--seconds", type=float, default=3)
    ap.add_argument("--table-only", action="store_true")
    a = ap.parse_args()
    a.raw = a.raw or a.work / "growth.json"
    runs = json.loads(a.raw.read_text()) if a.raw.exists() else {}
    if not a.table_only:
        if not a.bench:
            p = subprocess.run(["cargo", "build", "--release", "--bench", "speed", "--message-format=json-render-diagnostics"],
                               cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if p.returncode:
                sys.exit("cargo build failed")
            made = [json.loads(l) for l in p.stdout.splitlines() if l.startswith("{")]
            a.bench = next(m["executable"] for m in made if m.get("executable") and m["target"]["name"] == "speed")
        measure(a, runs)
    table(runs)


if __name__ == "__main__":
    main()
