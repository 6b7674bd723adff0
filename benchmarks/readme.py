"""The short tables of README.md, from benchmarks/results; it measures nothing.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
from statistics import geometric_mean
from typing import Any

from accuracy import HERE, fill
from speed import LAYOUTS, OPS, TITLES, against_torch, of_part

RESULTS = HERE / "results"
INPUTS = "N(0, 1)", "mean 1e3, std 1", "mean 1e6, std 1", "float16, mean 1e3"
COLUMNS = "torch NCHW", "flax", "keras/jax", "anybn, NumPy", "anybn, torch", "anybn, JAX float32"
NOT_YET = "Not measured yet: `benchmarks/results/nets.jsonl` is to have it."


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def speed() -> str:
    rows = of_part(read("speed.jsonl"), library="torch", dtype="float32")
    lines = [f"| torch's time / anybn's | {' | '.join(LAYOUTS)} |", "|---" * (len(LAYOUTS) + 1) + "|"]
    for op in OPS:
        parts = [of_part(rows, op=op, layout=layout) for layout in LAYOUTS]
        if op in TITLES and all(parts):
            ratios = [(mean, worst["ratio"]) for mean, worst in map(against_torch, parts)]
            lines.append(
                f"| {TITLES[op]} | " + " | ".join(f"{mean:.1f} ({worst:.1f})" for mean, worst in ratios) + " |"
            )
    versions = rows[0]["versions"]
    where = f"{rows[0]['cpu']}, {rows[0]['threads']} threads, torch {versions['torch']}, numba {versions['numba']}"
    return "\n".join(lines) + f"\n\nfloat32 tensors on {where}, {rows[0]['date']}."


def accuracy() -> str:
    record = json.loads((RESULTS / "accuracy.json").read_text())
    lines = [f"| largest error of y (eps) | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(record['rows'][name][column] for column in COLUMNS)} |" for name in INPUTS]
    versions = ", ".join(f"{name} {record['context'][name]}" for name in ("torch", "jax", "flax", "keras"))
    return "\n".join(lines) + f"\n\nMeasured with {versions}."


def nets() -> str:
    """Training steps of nets.jsonl, which `nets.py` writes: torch's time, and by how much the others' is less."""
    if not (RESULTS / "nets.jsonl").exists():
        return NOT_YET
    rows = of_part(read("nets.jsonl"), what="step")
    lines = ["| a training step of | torch | torch / converted | torch / with `fuse=` |", "|---|---|---|---|"]
    for row in rows:
        ms = row["ms"]
        ratios = [f"{ms['torch'] / ms[name]:.2f}" if name in ms else "-" for name in ("converted", "fused")]
        lines.append(f"| {row['net']}, {row['layout']} | {ms['torch']:.0f} ms | {' | '.join(ratios)} |")
    where = f"{rows[0]['cpu']}, {rows[0]['threads']} threads, torch {rows[0]['versions']['torch']}, {rows[0]['date']}"
    return "\n".join(lines) + f"\n\nfloat32 on {where}."


def compiled_nets() -> str:
    """Steps and evaluations of nets_compiled.jsonl, which ``nets.py --compile`` writes, in a sentence."""
    every = [row["ms"]["torch compiled"] / row["ms"]["converted compiled"] for row in read("nets_compiled.jsonl")]
    ratios = f"{geometric_mean(every):.2f} in the geometric mean, from {min(every):.2f} to {max(every):.2f}"
    return f"Under `torch.compile`, torch / converted is {ratios}: [all rows](docs/speed.md)."


#: The comments in README.md between which a table stands -> what makes it.
TABLES = {"speed in short": speed, "accuracy in short": accuracy, "nets": nets, "compiled nets": compiled_nets}

if __name__ == "__main__":
    for part, make in TABLES.items():
        fill(part, make())
