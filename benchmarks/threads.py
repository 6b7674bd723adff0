"""Training calls right after another library's operation, as in a net: on torch's threads, and on our own.

    python benchmarks/threads.py [--seconds N]       # into benchmarks/results/threads.json and docs/threads.md

Both kinds take turns; medians, and how many CPUs other processes used meanwhile: where they want all of them, the table
says little. After "nothing", the same call came before. Calls are those of `anybn.batch_norm` on NumPy arrays.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from accuracy import HERE, fill
from nets import here

import anybn
from anybn.cli.timing import duration, seconds_of_others
from anybn.kernels.cpu import openmp

SHAPES = [(8192, 256), (32, 256, 14, 14), (8, 64, 28, 28)]
KINDS: dict[str, Callable[[], Any]] = {"torch's threads": openmp.team, "our own": lambda: None}


def operations() -> dict[str, Callable[[], Any]]:
    """What comes before: each leaves threads of its library awake."""
    values, matrix = torch.randn(1 << 20), np.random.default_rng(0).normal(size=(512, 512)).astype("f4")
    found: dict[str, Callable[[], Any]] = {
        "nothing": lambda: None,
        "a rest of 15 ms": lambda: time.sleep(0.015),
        "torch's mul": lambda: values.mul(2),
        "NumPy's matmul": lambda: matrix @ matrix,
    }
    if find_spec("jax"):
        import jax

        product, given = jax.jit(lambda a: a @ a), jax.numpy.asarray(matrix)
        found["JAX's matmul"] = lambda: product(given).block_until_ready()
    return found


def training(shape: tuple[int, ...]) -> Callable[[], Any]:
    """A call, checked."""
    x, state = np.random.default_rng(0).normal(size=shape).astype("f4"), anybn.BatchNormState(shape[1])
    axes = (0, *range(2, x.ndim))
    expected = (x - x.mean(axes, "f8", keepdims=True)) / np.sqrt(x.var(axes, "f8", keepdims=True) + 1e-5)
    assert np.abs(anybn.batch_norm(x, state, training=True) - expected).max() < 1e-5
    return lambda: anybn.batch_norm(x, state, training=True)


def medians(operation: Callable[[], Any], call: Callable[[], Any], seconds: float) -> dict[str, float]:
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for kind, team in KINDS.items():
            openmp.team = team
            for _ in range(5):  # the first is not timed: the other kind's threads are still awake
                operation()
                start = time.perf_counter()
                call()
                times[kind].append(time.perf_counter() - start)
            del times[kind][-5]
    return {kind: float(np.median(of_kind)) for kind, of_kind in times.items()}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| x | right after | torch's threads, us | our own, us |\n|---|---|---|---|\n"]
    for row in rows:
        of_kinds = [f"{row['seconds'][kind] * 1e6:.0f}" for kind in KINDS]
        lines.append(f"| {tuple(row['shape'])} | {row['after']} | {' | '.join(of_kinds)} |\n")
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=2, help="for each row")
    options = parser.parse_args()
    rows = []
    for shape in SHAPES:
        call = training(shape)
        for name, operation in operations().items():
            before, start = seconds_of_others(), time.perf_counter()
            found = medians(operation, call, options.seconds)
            busy = (seconds_of_others() - before) / (time.perf_counter() - start)
            rows.append({"shape": shape, "after": name, "seconds": found, "busy": round(busy, 2)})
            kinds = "   ".join(f"{kind} {duration(t):>9}" for kind, t in found.items())
            print(f"{shape!s:18} {name:16} {kinds}   others used {busy:.2f} CPUs", flush=True)
    (HERE / "results" / "threads.json").write_text(json.dumps({"rows": rows, **here()}, indent=1) + "\n")
    fill("threads table", table(rows))


if __name__ == "__main__":
    main()
