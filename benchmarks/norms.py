"""The table of norms without a batch in docs/speed.md: anybn beside torch.nn.functional, interleaved in one process.

    python benchmarks/norms.py               # some minutes, into benchmarks/results/norms.jsonl
    python benchmarks/norms.py --docs        # and puts the summary into docs/speed.md
    python benchmarks/norms.py --norm layer --quick

It measures as speed.py does: every result is checked in long double first; medians over rounds in random order; as many
threads for both; a case that others disturbed is tried again, and left out there if that does not help.
Forward is without gradients; backward is torch.autograd.grad through either function, or ``pullback(dy)`` on NumPy
arrays. All have a weight, and all but RMS norm a bias.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from accuracy import fill
from speed import RESULTS, Row, context, write

import anybn
from anybn import norms
from anybn.cli.comparison import BARS, WrongResult, operations_before, use_threads
from anybn.cli.timing import QUIET, Run, duration, quietest
from anybn.conformance import inputs, oracle

F = torch.nn.functional
EPS = 1e-5

#: (norm, op) -> (torch time / ours, as the geometric mean over shapes, should be at least this).
GOALS = {
    ("layer", "forward"): 0.8,
    ("layer", "backward"): 0.8,
    ("group", "forward"): 1.0,
    ("group", "backward"): 1.0,
    ("rms", "forward"): 0.8,
}


class Case(NamedTuple):
    norm: str
    op: str
    shape: tuple[int, ...]

    @property
    def groups(self) -> int:
        """Rows of a sample."""
        return {"group": 32, "instance": self.shape[1]}.get(self.norm, 1)

    @property
    def parameters(self) -> int:
        return self.shape[1] if self.norm in ("group", "instance") else self.shape[-1]

    @property
    def values(self) -> int:
        """Of a row."""
        sample = math.prod(self.shape[1:]) if self.norm in ("group", "instance") else self.shape[-1]
        return sample // self.groups


SHAPES = {
    "layer": [(32, 512, 768), (8, 1024), (64, 197, 192), (4096, 64)],
    "rms": [(32, 512, 768), (8, 1024), (4, 1024, 32, 64)],
    "group": [(32, 64, 56, 56), (2, 320, 64, 64), (32, 512, 7, 7)],
    "instance": [(32, 64, 56, 56), (8, 32, 128, 128)],
}


class Data(NamedTuple):
    x: np.ndarray
    dy: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    @classmethod
    def of(cls, case: Case) -> Data:
        x, dy = (inputs.cast(inputs.normal(case.shape, seed), "float32") for seed in (0, 1))
        rng = np.random.default_rng(2)
        weight, bias = rng.uniform(0.5, 2, case.parameters), rng.standard_normal(case.parameters)
        return cls(x, dy, weight.astype(np.float32), bias.astype(np.float32))


# -- contestants -----------------------------------------------------------------------------------------------


def ours(case: Case, x: Any, weight: Any, bias: Any, vjp: bool = False) -> Any:
    suffix = "_vjp" if vjp else ""
    call = getattr(norms, f"{case.norm}_norm{suffix}")
    if case.norm == "group":
        return call(x, case.groups, weight, bias)
    return call(x, weight) if case.norm == "rms" else call(x, weight, bias)


def torchs(case: Case, x: Any, weight: Any, bias: Any) -> Any:
    if case.norm == "group":
        return F.group_norm(x, case.groups, weight, bias)
    if case.norm == "instance":
        return F.instance_norm(x, weight=weight, bias=bias)
    if case.norm == "rms":
        return F.rms_norm(x, weight.shape, weight, eps=EPS)
    return F.layer_norm(x, weight.shape, weight, bias)


def contestants(case: Case, data: Data) -> dict[str, Run]:
    x, dy, *parameters = map(torch.from_numpy, data)
    if case.op == "forward":
        return {
            "numpy": lambda: ours(case, data.x, data.weight, data.bias),
            "torch": lambda: ours(case, x, *parameters),
            "torch.nn": lambda: torchs(case, x, *parameters),
        }

    def recorded(call: Any) -> Run:
        given = [a.clone().requires_grad_() for a in (x, *parameters[: 1 if case.norm == "rms" else 2])]
        with torch.enable_grad():
            y = call(case, *given, *([None] if case.norm == "rms" else []))
        return lambda: torch.autograd.grad(y, given, dy, retain_graph=True)

    _, pullback = ours(case, data.x, data.weight, data.bias, vjp=True)
    wanted = 2 if case.norm == "rms" else 3
    return {
        "numpy": lambda: pullback(data.dy)[:wanted],
        "torch": recorded(ours),
        "torch.nn": recorded(torchs),
    }


# -- checks ----------------------------------------------------------------------------------------------------


def blocks(case: Case, data: Data) -> Iterator[tuple[slice, Any, Any, Any]]:
    """(rows, xhat, y or dx of them, terms of dweight) in long double, so many rows at once as fit the memory."""
    length = case.values * case.groups // case.parameters
    weight, bias = (a.astype(oracle.LONG).repeat(length).reshape(case.groups, -1) for a in data[2:])
    rows = data.x.reshape(-1, case.values)
    step = max(1, 2**20 // case.values // case.groups) * case.groups
    for start in range(0, len(rows), step):
        which = slice(start, start + step)
        x = rows[which].astype(oracle.LONG)
        repeats = len(x) // case.groups
        w, b = np.tile(weight, (repeats, 1)), np.tile(bias, (repeats, 1))
        if case.norm == "rms":
            mean, var, b = np.zeros((len(x), 1)), (x * x).mean(1, keepdims=True), 0
        else:
            s = oracle.statistics(rows[which], axis=0)
            mean, var = (s.mean.origin + s.mean.offset)[:, None], s.var()[:, None]
        rstd = 1 / np.sqrt(var + oracle.LONG(EPS))
        xhat = (x - mean) * rstd
        if case.op == "forward":
            yield which, xhat, xhat * w + b, None
            continue
        dy = data.dy.reshape(rows.shape)[which].astype(oracle.LONG)
        g = dy * w
        dx = rstd * (g - (0 if case.norm == "rms" else g.mean(1, keepdims=True)) - xhat * (g * xhat).mean(1)[:, None])
        yield which, xhat, dx, dy


def check(case: Case, data: Data, runs: dict[str, Run]) -> None:
    """Raise WrongResult unless ours are right to the bar of accuracy.py."""
    results = {}
    for name in ("numpy", "torch"):
        found = runs[name]()
        results[name] = [np.asarray(a) for a in (found if isinstance(found, tuple) else (found,))]
    sums = np.zeros((2, case.parameters), oracle.LONG)
    length = case.values * case.groups // case.parameters

    def compare(what: str, name: str, value: np.ndarray, expected: Any) -> None:
        error = oracle.error(value, expected, "float32")
        if not error <= BARS["float32"]:
            raise WrongResult(f"{case}: {what} of anybn on {name} is {error:.3g} eps off")

    for which, xhat, expected, dy in blocks(case, data):
        for name, found in results.items():
            compare("dx" if case.op == "backward" else "y", name, found[0].reshape(-1, case.values)[which], expected)
        if dy is not None:
            for i, terms in enumerate((dy * xhat, dy)):
                sums[i] += terms.reshape(-1, case.parameters, length).sum((0, 2))
    for name, found in results.items():
        for what, value, expected in zip(("dweight", "dbias"), found[1:], sums, strict=False):
            compare(what, name, value, expected)


# -- the command -----------------------------------------------------------------------------------------------


def measure(case: Case, rounds: int, seconds: float, attempts: int) -> Row:
    data = Data.of(case)
    with torch.no_grad():
        runs = contestants(case, data)
        check(case, data, runs)
        measured = quietest(
            runs, rounds, seconds, attempts, operations_before(data.dy if case.op == "backward" else data.x, runs)
        )
    us = {name: round(timing.median * 1e6, 2) for name, timing in measured.timings.items()}
    row: Row = {**case._asdict(), "dtype": "float32", "us": us}
    row |= {f"{name}_ratio": round(us["torch.nn"] / us[name], 3) for name in ("torch", "numpy")}
    row["spread"] = {name: round(timing.spread, 3) for name, timing in measured.timings.items()}
    return row | {"busy": round(measured.busy, 2)}


def markdown(rows: list[Row]) -> str:
    lines = ["| float32, with weights | torch tensors | NumPy arrays | torch.nn.functional |", "|---|---|---|---|"]
    for row in rows:
        ours = " | ".join(f"**{row[f'{name}_ratio']:.1f}**" for name in ("torch", "numpy"))
        name = f"{row['norm']} norm {row['op']}, {tuple(row['shape'])}"
        lines.append(f"| {name} | {ours} | {duration(row['us']['torch.nn'] * 1e-6)} |")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    lines = []
    for (norm, op), goal in GOALS.items():
        part = [row for row in rows if (row["norm"], row["op"]) == (norm, op)]
        for name in ("torch", "numpy"):
            if part:
                worst = min(part, key=lambda row: row[f"{name}_ratio"])
                ratio = worst[f"{name}_ratio"]
                outcome = "reached" if ratio >= goal else "NOT reached"
                where = f"{norm} norm {op} on {name}"
                lines.append(f"{where:32} worst {ratio:6.2f} at {tuple(worst['shape'])!s:18} goal {goal}: {outcome}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", action="append", choices=SHAPES, help="repeat it; default: all")
    parser.add_argument("--op", action="append", choices=("forward", "backward"), help="repeat it; default: both")
    parser.add_argument("--threads", type=int, default=min(2, anybn.get_num_threads()), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="5 rounds, 0.3 seconds, one attempt")
    parser.add_argument("--docs", action="store_true", help="put the summary into docs/speed.md")
    options = parser.parse_args()
    how = {"rounds": 5, "seconds": 0.3, "attempts": 1} if options.quick else {"rounds": 15, "seconds": 2, "attempts": 5}
    use_threads(options.threads)
    surroundings = context(options.threads, jax=False)
    rows = []
    for norm in options.norm or SHAPES:
        for op in options.op or ("forward", "backward"):
            for shape in SHAPES[norm]:
                rows.append(measure(Case(norm, op, shape), **how) | surroundings)
                print({key: rows[-1][key] for key in (*Case._fields, "us", "torch_ratio", "numpy_ratio", "busy")})
    write(RESULTS / "norms.jsonl", "\n".join(map(json.dumps, rows)))
    print(summary(rows))
    quiet = [row for row in rows if row["busy"] <= QUIET]
    if len(quiet) < len(rows):
        print(f"other processes used the CPUs during {len(rows) - len(quiet)} of {len(rows)} rows: no result")
    if options.docs:
        where = f"{surroundings['cpu']}, {options.threads} threads, {surroundings['date']}"
        fill("norms table", f"{markdown(quiet)}\n\nMeasured on {where}.")


if __name__ == "__main__":
    main()
