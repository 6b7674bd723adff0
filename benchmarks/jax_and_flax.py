"""anybn under jax.jit beside flax.nnx.BatchNorm, float32 without x64, interleaved in one process.

    python benchmarks/jax_and_flax.py            # some minutes, into benchmarks/results/jax_and_flax.jsonl
    python benchmarks/jax_and_flax.py --docs     # and puts the table into docs/speed.md

Arrays are channels last, as Flax has them. Each result of ours is checked in long double first, to the bar of JAX
without float64. The numbers are medians over rounds in which each has a turn, in random order. "busy" says how many
CPUs other processes used meanwhile. The last rows are calls without jax.jit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accuracy import fill
from flax import nnx
from speed import RESULTS, Row

import anybn
from anybn.cli.timing import Run, duration, quietest
from anybn.conformance import inputs, oracle

SHAPES = [
    (64, 512),
    (256, 1024),
    (4096, 64),
    (32, 7, 7, 512),
    (32, 14, 14, 256),
    (32, 28, 28, 128),
    (32, 56, 56, 64),
]
OPS = ("forward", "forward and backward", "evaluation")
EAGER = [(8, 16), (64, 512)]
BAR = 4  # units of float32, as in anybn.conformance

Arrays = tuple[jax.Array, ...]
Norm = Callable[..., tuple[jax.Array, Arrays]]  # (x, weight, bias, mean, var) -> y, (mean, var)


def ours(training: bool) -> Norm:
    def norm(x: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, Arrays]:
        state = anybn.BatchNormState(x.shape[-1], ddof=0, like=x)
        state.weight, state.bias, state.running_mean, state.running_var = arrays
        y = anybn.batch_norm(x, state, training=training, axis=-1)
        return y, (state.running_mean, state.running_var)

    return norm


def flax(training: bool) -> Norm:
    def norm(x: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, Arrays]:
        layer = nnx.BatchNorm(x.shape[-1], use_running_average=not training, momentum=0.9, rngs=nnx.Rngs(0))
        for variable, array in zip((layer.scale, layer.bias, layer.mean, layer.var), arrays, strict=True):
            variable[...] = array
        y = layer(x)
        return y, (layer.mean[...], layer.var[...])

    return norm


def with_gradients(norm: Norm) -> Callable[..., Any]:
    def step(x: jax.Array, weight: jax.Array, bias: jax.Array, mean: jax.Array, var: jax.Array, dy: jax.Array) -> Any:
        y, pullback, running = jax.vjp(lambda *a: norm(*a, mean, var), x, weight, bias, has_aux=True)
        return y, running, pullback(dy)

    return step


def arguments(shape: tuple[int, ...], op: str) -> tuple[np.ndarray, ...]:
    rng, channels = np.random.default_rng(2), shape[-1]
    weight, bias, mean = rng.uniform(0.5, 2, channels), *rng.standard_normal((2, channels))
    arrays = inputs.normal(shape), weight, bias, mean, rng.uniform(0.5, 2, channels)
    arrays += (inputs.normal(shape, 1),) if op == OPS[1] else ()
    return tuple(a.astype(np.float32) for a in arrays)


def check(op: str, given: tuple[np.ndarray, ...], found: Any) -> None:
    """Raise AssertionError unless y and dx are right to the bar."""
    x, weight, bias, mean, var, *dy = given
    statistics = oracle.statistics(x, axis=-1)
    used = (mean, var) if op == OPS[2] else (statistics.mean, statistics.var())
    expected = oracle.normalize(x, *used, weight=weight, bias=bias, axis=-1)
    terms = 5 * np.abs(weight).max() + np.abs(bias).max()  # what y is the sum of
    assert oracle.error(np.asarray(found[0]), expected, "float32", terms) <= BAR
    if dy:
        grads = oracle.gradients(dy[0], x, *used, count=statistics.count, weight=weight, axis=-1)
        assert oracle.error(np.asarray(found[2][0]), grads.x, "float32", np.maximum(1, grads.x_size)) <= BAR


def compiled(shape: tuple[int, ...], op: str) -> dict[str, Run]:
    given = arguments(shape, op)
    placed = tuple(map(jnp.asarray, given))
    runs = {}
    for name, norm in (("anybn", ours), ("flax", flax)):
        function: Any = norm(op != OPS[2])
        function = jax.jit(with_gradients(function) if op == OPS[1] else function)
        if norm is ours:
            check(op, given, function(*placed))
        runs[name] = lambda function=function: jax.block_until_ready(function(*placed))
    return runs


def eager(shape: tuple[int, ...]) -> dict[str, Run]:
    x, *_ = map(jnp.asarray, arguments(shape, OPS[0]))
    state = anybn.BatchNormState(shape[-1], like=x)
    layer = nnx.BatchNorm(shape[-1], use_running_average=False, rngs=nnx.Rngs(0))
    return {
        "anybn": lambda: jax.block_until_ready(anybn.batch_norm(x, state, training=True)),
        "flax": lambda: jax.block_until_ready(layer(x)),
    }


def measure(shape: tuple[int, ...], op: str, runs: dict[str, Run], rounds: int, seconds: float) -> Row:
    x, double = jnp.asarray(arguments(shape, op)[0]), jax.jit(lambda x: x * 2)
    before: dict[str, Run] = dict.fromkeys(runs, lambda: jax.block_until_ready(double(x)))
    measured = quietest(runs, rounds, seconds, 1, before)
    us = {name: round(timing.median * 1e6, 1) for name, timing in measured.timings.items()}
    row: Row = {"op": op, "shape": shape, "us": us, "flax_ratio": round(us["flax"] / us["anybn"], 3)}
    return row | {"busy": round(measured.busy, 2)}


def markdown(rows: list[Row]) -> str:
    ops = [*OPS, "without jit"]
    lines = ["| float32 | " + " | ".join(ops) + " |", "|---" * (len(ops) + 1) + "|"]
    for shape in dict.fromkeys(tuple(row["shape"]) for row in rows):
        found = {row["op"]: row for row in rows if tuple(row["shape"]) == shape}
        cells = [
            f"**{r['flax_ratio']:.1f}** of {duration(r['us']['flax'] / 1e6)}" if (r := found.get(op)) else ""
            for op in ops
        ]
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="of each case, at least (default 60)")
    parser.add_argument("--seconds", type=float, default=4, help="for each case, at least (default 4)")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/speed.md")
    options = parser.parse_args()
    cases = [(shape, op, lambda shape=shape, op=op: compiled(shape, op)) for shape in SHAPES for op in OPS]
    cases += [(shape, "without jit", lambda shape=shape: eager(shape)) for shape in EAGER]
    rows = []
    for shape, op, runs in cases:
        rows.append(measure(shape, op, runs(), options.rounds, options.seconds))
        print(rows[-1], flush=True)
    packages = {name: version(name) for name in ("jax", "flax", "numpy")}
    context: Row = {"machine": platform.machine(), "date": datetime.date.today().isoformat(), **packages}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "jax_and_flax.jsonl").write_text("".join(json.dumps(row | context) + "\n" for row in rows))
    table = markdown(rows)
    print(table)
    if options.docs:
        where = ", ".join(f"{name} {number}" for name, number in packages.items())
        fill("jax table", f"{table}\n\nMeasured with {where}, 2 threads, {context['date']}.")


if __name__ == "__main__":
    main()
