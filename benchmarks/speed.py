"""The speed table of docs/speed.md: anybn, torch, Keras on NumPy where it is installed, JAX if you like, and a plain
copy, interleaved in one process.

    python benchmarks/speed.py                     # all of it, some minutes, into benchmarks/results/speed.jsonl
    python benchmarks/speed.py --docs              # and puts the summary into docs/speed.md
    python benchmarks/speed.py --op forward --layout "channels first" --quick
    python benchmarks/speed.py --compile-time      # what the first call costs, into benchmarks/results/compile.json

Every result is checked against long double arithmetic before anything is timed. The numbers are medians over rounds in
which each contestant has one turn, in random order. Each call follows directly upon an operation of its library that
writes x, or dy, as in a net; ``--rested`` leaves that away. ``numpy alone`` is the obvious code without a library,
``keras`` Keras's layer on its NumPy backend, which has no gradients.
Outputs are fresh on both sides, gradients off but for the backward pass, which is torch.autograd.grad through either
module, or ``pullback(dy)`` on NumPy arrays. Both sides have the same number of threads; JAX takes all CPUs, and a copy
takes one: ``copy`` is np.copyto into memory that is in use, ``fresh copy`` is x.copy(). For bn + add + relu, torch is
the faster of ``(bn(x) + r).relu_()`` and ``bn(x).add_(r).relu_()``. While other processes use a CPU the numbers are
worthless, torch's above all: such a case is tried again, and a row that stays ``busy`` is not put there.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anybn
from anybn.cli.comparison import (
    BARS,
    FIRST,
    LAST,
    LAYOUTS,
    OPS,
    ROWS,
    Case,
    Data,
    as_users_have_it,
    cases,
    measure,
    use_threads,
)
from anybn.cli.timing import QUIET, Run, Timing

RESULTS = Path(__file__).parent / "results"

#: (op, layout) -> (torch time / ours as the geometric mean over shapes, and for no shape less than).
GOALS = {
    ("forward", FIRST): (4, 1.5),
    ("forward", LAST): (2, 1),
    ("forward", ROWS): (1.2, 0.9),
    ("backward", FIRST): (1.5, 1),
    ("backward", ROWS): (1.2, 1),
    **{("evaluation", layout): (1, 0.9) for layout in LAYOUTS},
    **{("add + relu", layout): (5, 2) for layout in LAYOUTS},
    ("call", ROWS): (1, 1),
}
COPIES, COPIES_FROM = 1.5, 1e6  # training forward takes at most so many copies of x, from so many bytes up

Row = dict[str, Any]


# -- JAX -------------------------------------------------------------------------------------------------------


def with_jax(case: Case, data: Data) -> dict[str, Run]:
    """What a JAX user writes, compiled: mean and mean of squares in one pass, as Flax has it."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", case.dtype == "float64")
    x, dy, residual = (jnp.asarray(as_users_have_it(case, a)) for a in data[:3])
    weight, bias, running_mean, running_var = map(jnp.asarray, data[3:])
    axis = x.ndim - 1 if case.layout == LAST else 1
    axes = tuple(i for i in range(x.ndim) if i != axis)

    def normalize(x, weight, bias, mean, var):
        mean, scale, bias = (jnp.expand_dims(a, axes) for a in (mean, weight / jnp.sqrt(var + 1e-5), bias))
        return ((x - mean) * scale + bias).astype(x.dtype)

    def train(x, weight, bias, residual=None):
        wide = x.astype(weight.dtype)
        mean = wide.mean(axes)
        var = jnp.maximum(0, (wide * wide).mean(axes) - mean * mean)
        y = normalize(x, weight, bias, mean, var)
        if residual is not None:
            y = jax.nn.relu(y + residual)
        return y, 0.9 * running_mean + 0.1 * mean, 0.9 * running_var + 0.1 * var

    if case.op == "backward":
        _, pullback = jax.vjp(lambda *a: train(*a)[0], x, weight, bias)
        compiled, arguments = jax.jit(lambda pullback, dy: pullback(dy)), (pullback, dy)
    elif case.op == "evaluation":
        compiled, arguments = jax.jit(normalize), (x, weight, bias, running_mean, running_var)
    else:
        compiled, arguments = jax.jit(train), (x, weight, bias, *([residual] if case.op == "add + relu" else []))
    return {"jax": lambda: jax.block_until_ready(compiled(*arguments))}


# -- Keras -----------------------------------------------------------------------------------------------------


def with_keras(case: Case, data: Data) -> dict[str, Run]:
    """What a user of NumPy arrays has: Keras's layer on its NumPy backend; not with 16 bits, and without gradients."""
    if not HAS_KERAS or case.dtype not in ("float32", "float64") or case.op not in ("forward", "evaluation", "call"):
        return {}
    os.environ["KERAS_BACKEND"] = "numpy"  # before the first import, which only this function makes
    import keras

    axis = -1 if case.layout == LAST else 1
    layer = keras.layers.BatchNormalization(axis=axis, epsilon=1e-5, momentum=0.9, dtype=case.dtype)
    x, training = as_users_have_it(case, data.x), case.op != "evaluation"
    layer.build(x.shape)
    layer.set_weights(data[3:])
    return {"keras": lambda: layer(x, training=training)}


HAS_KERAS = importlib.util.find_spec("keras") is not None


# -- rows ------------------------------------------------------------------------------------------------------


def context(threads: int, jax: bool) -> Row:
    packages = [p for p in ("numpy", "numba", "torch", "keras", *["jax"] * jax) if importlib.util.find_spec(p)]
    versions = {"anybn": anybn.__version__, "python": platform.python_version()}
    versions |= {package: version(package) for package in packages}
    return {"threads": threads, "cpu": cpu(), "versions": versions, "date": datetime.date.today().isoformat()}


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def rows_of(case: Case, timings: dict[str, Timing], busy: float, rested: bool, surroundings: Row) -> list[Row]:
    """One for each library whose arrays anybn was given; ``spread`` is between quartiles, relative to the median."""
    rows = []
    for library in ("numpy", "torch"):
        if library not in timings:
            continue
        measured = {"ours": timings[library]} | {
            name.removesuffix(".nn").replace(" ", "_"): timings[name]
            for name in ("torch.nn", "numpy alone", "keras", "jax", "copy", "fresh copy")
            if name in timings
        }
        row = {"op": case.op, "library": library, "layout": case.layout, "dtype": case.dtype, "shape": case.shape}
        row |= {f"{name}_us": round(t.median * 1e6, 2) for name, t in measured.items()}
        row["ratio"] = round(row["torch_us"] / row["ours_us"], 3) if "torch" in measured else None
        for name, ratio in (("numpy_alone", "alone_ratio"), ("keras", "keras_ratio")):
            if library == "numpy" and name in measured:
                row[ratio] = round(row[f"{name}_us"] / row["ours_us"], 3)
        row["spread"] = {name: round(t.spread, 3) for name, t in measured.items()}
        row["busy"], row["rested"] = round(busy, 2), rested
        rows.append(row | surroundings)
    return rows


def line(row: Row) -> str:
    times = "  ".join(f"{key.removesuffix('_us')} {row[key]:9.1f}" for key in row if key.endswith("_us"))
    name = f"{row['op']}, {row['layout']}, {row['library']}"
    busy = "   BUSY" if row["busy"] > QUIET else ""
    return f"{name:36} {tuple(row['shape'])!s:22} {times} us   ratio {row['ratio']}{busy}"


# -- summary ---------------------------------------------------------------------------------------------------


def of_part(rows: list[Row], **wanted: str) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def against_torch(rows: list[Row], ratio: str = "ratio") -> tuple[float, Row]:
    """The geometric mean of the ratios, and the row of the worst."""
    return statistics.geometric_mean(row[ratio] for row in rows), min(rows, key=lambda row: row[ratio])


def in_copies(rows: list[Row], copy: str) -> list[float]:
    return [row["ours_us"] / row[copy] for row in rows]


def large(rows: list[Row]) -> list[Row]:
    return [row for row in rows if math.prod(row["shape"]) * int(row["dtype"][-2:]) / 8 >= COPIES_FROM]


def summary(rows: list[Row]) -> str:
    lines = []
    for library in ("torch", "numpy"):
        lines.append(f"\ntorch's time / ours on {library} arrays: geometric mean and worst shape")
        for op in OPS:
            for layout in LAYOUTS:
                part = of_part(rows, library=library, op=op, layout=layout)
                if part and part[0]["ratio"]:
                    lines.append(verdict(op, layout, *against_torch(part)))
        for layout in LAYOUTS:
            if part := large(of_part(rows, library=library, op="forward", layout=layout)):
                lines.append(copy_verdict(layout, part))
    return "\n".join(lines)


def verdict(op: str, layout: str, mean: float, worst: Row) -> str:
    reached = f"{op + ', ' + layout:30} {mean:5.2f}   {worst['ratio']:5.2f} at {tuple(worst['shape'])!s:22}"
    if (op, layout) not in GOALS:
        return reached
    goal, least = GOALS[op, layout]
    outcome = "reached" if mean >= goal and worst["ratio"] >= least else "NOT reached"
    return f"{reached} goal {goal}, {least}: {outcome}"


def copy_verdict(layout: str, rows: list[Row]) -> str:
    shown = []
    for copy in ("copy_us", "fresh_copy_us"):
        copies = in_copies(rows, copy)
        outcome = "reached" if max(copies) <= COPIES else "NOT reached"
        mean = statistics.geometric_mean(copies)
        shown.append(f"{mean:.2f} to {max(copies):.2f} of {copy.removesuffix('_us').replace('_', ' ')}: {outcome}")
    return f"forward, {layout}, from 1 MB up, mean to worst: {'; '.join(shown)} (goal {COPIES})"


#: Of contestants that not every row has -> the heading of their column.
OTHERS = {"alone_ratio": "NumPy alone / anybn", "keras_ratio": "Keras on NumPy / anybn"}


def markdown(rows: list[Row]) -> str:
    others = {ratio: heading for ratio, heading in OTHERS.items() if any(ratio in row for row in rows)}
    headings = [rows[0]["dtype"], "torch tensors", "NumPy arrays", *others.values(), "time in copies of x"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for op in OPS:
        for layout in LAYOUTS:
            parts = [of_part(rows, library=library, op=op, layout=layout) for library in ("torch", "numpy")]
            if not all(parts):
                continue
            name = f"one call on {parts[0][0]['shape']}" if op == "call" else f"{TITLES[op]}, {layout}"
            ratios = [in_short(part, "ratio") for part in parts] + [in_short(parts[1], ratio) for ratio in others]
            copies = [f"{statistics.geometric_mean(in_copies(large(p), 'copy_us')):.1f}" for p in parts if large(p)]
            lines.append(f"| {name} | {' | '.join(ratios)} | {', '.join(copies)} |")
    return "\n".join(lines)


def in_short(rows: list[Row], ratio: str) -> str:
    """The geometric mean and the worst of the rows that have it."""
    if not (having := [row for row in rows if ratio in row]):
        return ""
    mean, worst = against_torch(having, ratio)
    return f"**{mean:.1f}** ({worst[ratio]:.1f})"


TITLES = {
    "forward": "training forward",
    "backward": "backward",
    "evaluation": "evaluation",
    "add + relu": "bn + add + relu, training",
}


# -- compile time ----------------------------------------------------------------------------------------------

FIRST_CALLS = """
import json, time
start = time.perf_counter()
import numpy as np, anybn
took = {"import anybn": time.perf_counter() - start}
bn = anybn.BatchNorm(16)

def first(name, run):
    start = time.perf_counter()
    result = run()
    took[name] = time.perf_counter() - start
    return result

x = np.random.default_rng(0).standard_normal((8, 16, 20, 20)).astype(np.float32)
rows = np.ascontiguousarray(x[:, :, 0, 0])
for kind, a in (("channels first", x), ("(N, C)", rows)):
    bn.train()
    first(f"training, {kind}", lambda: bn(a))
    pullback = bn.vjp(a)[1]
    first(f"backward, {kind}", lambda: pullback(a))
    bn.eval()
    first(f"evaluation, {kind}", lambda: bn(a))

import torch, anybn.torch
module, given = anybn.torch.BatchNorm2d(16), torch.from_numpy(x)
first("a torch module, training step", lambda: module(given.requires_grad_()).sum().backward())
first("a torch module, evaluation", lambda: module.eval()(given.detach()))
print(json.dumps(took))
"""


def compile_times() -> dict[str, dict[str, float]]:
    """Seconds of the first calls: in a process that compiles the kernels, and in one that finds them on disk."""
    with tempfile.TemporaryDirectory() as cache:
        times = {}
        for process in ("empty cache", "from the cache"):
            command, surroundings = [sys.executable, "-c", FIRST_CALLS], os.environ | {"NUMBA_CACHE_DIR": cache}
            done = subprocess.run(command, env=surroundings, check=True, stdout=subprocess.PIPE, text=True)
            times[process] = {name: round(seconds, 4) for name, seconds in json.loads(done.stdout).items()}
            times[process]["all"] = round(sum(times[process].values()), 4)
    return times


def print_compile_times(surroundings: Row) -> None:
    times = compile_times()
    for name in times["empty cache"]:
        print(f"{name:30} " + "   ".join(f"{process} {took[name]:7.3f} s" for process, took in times.items()))
    write(RESULTS / "compile.json", json.dumps({"context": surroundings, "seconds": times}, indent=1))


# -- the command -----------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n")
    print(f"\nwritten: {path}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=OPS, help="repeat it; default: all")
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="repeat it; default: all")
    parser.add_argument("--dtype", choices=BARS, default="float32", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=min(2, anybn.get_num_threads()), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="at least, per case; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=2.0, help="at least, per case; default: %(default)s")
    parser.add_argument("--rested", action="store_true", help="nothing comes before a call; says little of a net")
    parser.add_argument("--quick", action="store_true", help="5 rounds and 0.3 seconds")
    parser.add_argument("--jax", action="store_true", help="measure JAX too")
    parser.add_argument("--compile-time", action="store_true", help="measure the first calls instead")
    parser.add_argument("--output", type=Path, default=RESULTS / "speed.jsonl", help="default: %(default)s")
    parser.add_argument("--docs", action="store_true", help="put the summary into docs/speed.md")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 5, 0.3
    return options


def main() -> None:
    options = arguments()
    surroundings = context(options.threads, options.jax)
    if options.compile_time:
        print_compile_times(surroundings)
        return
    use_threads(options.threads)
    how = {"rounds": options.rounds, "seconds": options.seconds, "rested": options.rested, "attempts": 5}
    contestants = [with_keras, *[with_jax] * options.jax]
    how["others"] = lambda case, data: {name: run for of in contestants for name, run in of(case, data).items()}
    rows = []
    for case in cases(options.op or OPS, options.layout or LAYOUTS, options.dtype):
        for row in rows_of(case, *measure(case, **how), options.rested, surroundings):
            rows.append(row)
            print(line(row), flush=True)
    write(options.output, "\n".join(map(json.dumps, rows)))
    print(f"{surroundings}\n{summary(rows)}")
    quiet = [row for row in rows if row["busy"] <= QUIET]
    left_out = len(rows) - len(quiet)
    if left_out:
        print(f"\nother processes used the CPUs during {left_out} of {len(rows)} rows: a first look, no result")
    if options.docs:
        from accuracy import fill

        versions = ", ".join(f"{name} {number}" for name, number in surroundings["versions"].items())
        where = f"{surroundings['cpu']}, {options.threads} threads, {versions}, {surroundings['date']}"
        note = f"; {left_out} of {len(rows)} rows, taken while other processes ran, are left out" if left_out else ""
        fill("speed table", f"{markdown(quiet)}\n\nMeasured on {where}{note}.")


if __name__ == "__main__":
    main()
