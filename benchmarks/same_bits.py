"""How much of a training call's results has other bits elsewhere: on other libraries, in other layouts, in parts.

    python benchmarks/same_bits.py           # prints the table and writes benchmarks/results/same_bits.json
    python benchmarks/same_bits.py --docs    # and puts it into docs/numerics.md

The measure is a NumPy array in the order (N, C, H, W). Sums are added up in another order elsewhere, so the last bit of
a mean or a variance may differ, and with it y where it lies near the middle between two numbers.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_ENABLE_X64"] = "1"

import numpy as np
from accuracy import fill, train_compiled

import anybn
from anybn.backends.registry import resolve_target

RESULTS = Path(__file__).parent / "results"
SHAPE = (32, 64, 14, 14)
#: x -> y, running mean and variance, in NumPy.
Trained = tuple[np.ndarray, np.ndarray, np.ndarray]

DATA: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "N(0, 1)": lambda rng: rng.normal(size=SHAPE),
    "mean 1e3, std 1": lambda rng: rng.normal(size=SHAPE) + 1e3,
    "heavy tails (Cauchy)": lambda rng: rng.standard_cauchy(size=SHAPE),
}


def on(library: str, axis: int = 1, chunks: int = 1) -> Callable[[np.ndarray], Trained]:
    def train(x: np.ndarray) -> Trained:
        backend, device = resolve_target(library)
        given = backend.from_numpy(x if axis == 1 else np.ascontiguousarray(np.moveaxis(x, 1, axis)), device)
        if chunks > 1:
            given = given.rechunk((-(-len(x) // chunks), *x.shape[1:]))
        state = anybn.BatchNormState(x.shape[1])
        y = np.asarray(backend.to_numpy(anybn.batch_norm(given, state, training=True, axis=axis)))
        running = (np.asarray(backend.to_numpy(a)) for a in (state.running_mean, state.running_var))
        return np.moveaxis(y, axis, 1), *running

    return train


def one_thread(x: np.ndarray) -> Trained:
    before = anybn.get_num_threads()
    try:
        anybn.set_num_threads(1)
        return on("numpy")(x)
    finally:
        anybn.set_num_threads(before)


def compiled(x: np.ndarray) -> Trained:
    y, state = train_compiled(x)
    return y, state.running_mean.numpy(), state.running_var.numpy()


WAYS = {
    "one thread": one_thread,
    "channels last": on("numpy", -1),
    "torch": on("torch"),
    "torch, channels last": on("torch", -1),
    "torch.compile": compiled,
    "JAX with float64": on("jax"),
    "Dask, 5 chunks": on("dask", chunks=5),
    "array-api-strict": on("array_api_strict"),
}


def measured(way: Callable[[np.ndarray], Trained], x: np.ndarray) -> dict[str, float]:
    """The shares of y and of the running statistics whose bits differ, and by how much of eps at most."""
    found, expected = way(x), on("numpy")(x)
    running = [np.concatenate(trained[1:]) for trained in (found, expected)]
    distance = np.abs(found[0] - expected[0]) / np.maximum(1, np.abs(expected[0])) / np.finfo(x.dtype).eps
    return {
        "y": float(np.mean(found[0] != expected[0])),
        "running": float(np.mean(running[0] != running[1])),
        "eps": float(np.max(distance)),
    }


def table(rows: list[dict]) -> str:
    lines = ["| | float32: y | running statistics | float64: y | running statistics |", "|---|---|---|---|---|"]
    for name in WAYS:
        cells = []
        for dtype in ("float32", "float64"):
            of_way = [row for row in rows if row["way"] == name and row["dtype"] == dtype]
            cells += [share(max(row[what] for row in of_way)) for what in ("y", "running")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def share(part: float) -> str:
    return "the same" if part == 0 else f"{part:.1e}" if part < 1e-3 else f"{100 * part:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="put the table into docs/numerics.md")
    options = parser.parse_args()
    rows = []
    for data, make in DATA.items():
        for dtype in ("float32", "float64"):
            x = make(np.random.default_rng(0)).astype(dtype)
            rows += [{"data": data, "dtype": dtype, "way": name} | measured(way, x) for name, way in WAYS.items()]
    for row in rows:
        print(row)
    versions = {name: version(name) for name in ("numpy", "numba", "torch", "jax", "dask", "array-api-strict")}
    result = {"shape": SHAPE, "versions": versions, "rows": rows}
    (RESULTS / "same_bits.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))
    if options.docs:
        where = ", ".join(f"{name} {number}" for name, number in versions.items())
        fill("same bits", f"{table(rows)}\n\nMeasured with {where}.")


if __name__ == "__main__":
    main()
