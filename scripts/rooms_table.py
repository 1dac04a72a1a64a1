#!/usr/bin/env python3
"""Writes data/results/rooms.md and the rows behind it from runs of `valor eval --bench rooms --out FILE.jsonl`.

  scripts/rooms_table.py FOLDER      where scripts/rooms_runs.sh left p_NAME.jsonl (rows) and p_NAME.txt (the printed table)

tests/it/results.rs works the table out of the rows again. Paired differences are over the same questions, their
intervals by 10,000 resamples of scenes.
"""
import json, os, random, re, sys

WHERE = sys.argv[1]
OUT = os.path.join(os.path.dirname(__file__), "..", "data", "results")
ROWS = [(look, *row) for look in ("studio", "lived-in") for row in (
    ("base planner, base detector", "base"), ("tuned planner", "tuned"), ("tuned detector", "detector"),
    ("both tuned, as embedded", "both"), ("both tuned, pictures shuffled", "both_shuffled"))]
KEPT = ("rooms_version", "index", "scene", "family", "held_out", "truth", "answer", "correct")


versions = set()


def rows(name):
    """Those written before rows told their generator's version are of the first."""
    all = [{"rooms_version": 1, **json.loads(line)} for line in open(f"{WHERE}/p_{name}.jsonl")]
    versions.update(r["rooms_version"] for r in all)
    assert len(versions) == 1, f"{name}: rows of several versions of Rooms: {versions}"
    return all


def table(name):
    lines = open(f"{WHERE}/p_{name}.txt").read().splitlines()
    cells = re.compile(r"\d+\.\d % \[[\d., ]+\]")
    return {line.split()[0]: cells.findall(line) for line in lines if cells.search(line)}


def paired(a, b, keep):
    """How much more often b is right than a, in points, with its interval."""
    scenes = {}
    for x, y in zip(a, b):
        assert x["index"] == y["index"] and x["truth"] == y["truth"]
        if keep(x):
            scenes.setdefault(x["scene"], []).append(y["correct"] - x["correct"])
    scenes, rng = list(scenes.values()), random.Random(1)
    def mean(sample):
        return 100 * sum(map(sum, sample)) / sum(map(len, sample))
    draws = sorted(mean(rng.choices(scenes, k=len(scenes))) for _ in range(10_000))
    return f"{mean(scenes):+.1f} [{draws[249]:+.1f}, {draws[9749]:+.1f}]"


have = [(look, label, f"{name}_{look}") for look, label, name in ROWS if os.path.exists(f"{WHERE}/p_{name}_{look}.txt")]
rows(have[0][2])
out = f"""# eval on Rooms

Rooms version {min(versions)}. The whole pipeline on the embedded models: planner, program, detector, depth, VLM; greedy, seed
20261123, 95 % intervals with pictures as clusters; 1,000 questions, of both tuned 2,000, with and without shuffled pictures.
The files hold each question's truth and answer (without its text and the reply); `cargo test --release -- results`
works the rows out of them again. `scripts/rooms_runs.sh` made the runs and `scripts/rooms_table.py` this page.

```sh
valor eval --bench rooms --tools real --greedy --n 1000 --seed 20261123 --look studio --planner configured --out rows.jsonl
```

with `--planner base`, `--set detector.model=embedded-base`, `--look lived-in` and `--shuffle-pictures` where the row says so.

| | all | seen frames | unseen frames |
|---|---|---|---|
"""
for look, label, name in have:
    a = table(name)["all"]
    out += f"| [{label}, {look}](rooms/{name.replace('_', '-')}.jsonl) | {a[0]} | {a[1]} | {a[2]} |\n"
names = {name for *_, name in have}
for look in ("studio", "lived-in"):
    columns = [(label, f"{name}_{look}") for l, label, name in ROWS if l == look and f"{name}_{look}" in names]
    if not columns:
        continue
    tables = [table(name) for _, name in columns]
    out += f"\nBy family, {look}:\n\n| | " + " | ".join(label for label, _ in columns) + " |\n"
    out += "|---" * (1 + len(columns)) + "|\n"
    for family in tables[0]:
        if family != "all":
            out += f"| {family} | " + " | ".join(t[family][0] for t in tables) + " |\n"
    if {f"{n}_{look}" for n in ("tuned", "detector", "both")} <= names:
        tuned, detector, both = (rows(f"{n}_{look}") for n in ("tuned", "detector", "both"))
        out += f"\nBoth together against each alone, {look}, the same questions, points:\n\n"
        out += "| | than the planner alone | than the detector alone |\n|---|---|---|\n"
        for family in ["all"] + [f for f in tables[0] if f != "all"]:
            keep = lambda r: family in ("all", r["family"])
            out += f"| {family} | {paired(tuned, both, keep)} | {paired(detector, both, keep)} |\n"


def of_families(what, columns):
    """Rows of runs with `--families`, and where three of them stand side by side, the last's gains on the others."""
    global out
    columns = [(label, name) for label, name in columns if os.path.exists(f"{WHERE}/p_{name}.txt")]
    if not columns:
        return
    tables = [table(name) for _, name in columns]
    families = [f for f in tables[0] if f != "all"]
    n = len(rows(columns[0][1]))
    out += f"\n{what} (`--families {','.join(families)} --n {n}`):\n\n"
    if len(families) == 1:
        families = []
    out += "| | " + " | ".join(["all", "seen frames", "unseen frames", *families]) + " |\n"
    out += "|---" * (4 + len(families)) + "|\n"
    for (label, name), t in zip(columns, tables):
        cells = t["all"][:3] + [t[f][0] for f in families]
        out += f"| [{label}](rooms/{name.replace('_', '-')}.jsonl) | " + " | ".join(cells) + " |\n"
        names.add(name)
    if len(columns) == 3:
        of = [rows(name) for _, name in columns]
        for (label, _), alone in zip(columns[:2], of):
            cells = [paired(alone, of[2], lambda r: f in ("all", r["family"])) for f in ["all"] + families]
            out += f"| both than {label}, points | {cells[0]} | | | " + " | ".join(cells[1:]) + " |\n"


for name, look in (("families", "studio"), ("exists", "lived-in"), ("position", "lived-in"),
                   ("count", "lived-in")):
    of_families(f"More questions, as these figures lie near those on shuffled pictures, {look}", [
        ("both tuned, as embedded", f"{name}_{look}"), ("pictures shuffled", f"{name}_shuffled_{look}")])
of_families("Counting, which hangs most on the detector, lived-in", [
    ("tuned planner", "counts_tuned_lived-in"), ("tuned detector", "counts_detector_lived-in"),
    ("both tuned, as embedded", "counts_both_lived-in")])
with open(f"{OUT}/rooms.md", "w") as f:
    f.write(out)
for name in names:
    with open(f"{OUT}/rooms/{name.replace('_', '-')}.jsonl", "w") as f:
        for r in rows(name):
            f.write(json.dumps({k: r[k] for k in KEPT}, separators=(",", ":")) + "\n")
print(out)
