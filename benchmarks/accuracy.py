"""The accuracy table of docs/numerics.md: anybn beside the frameworks installed, on the inputs that break batch norms.

    python benchmarks/accuracy.py            # prints the table and writes benchmarks/results/accuracy.json
    python benchmarks/accuracy.py --docs     # and puts it there, and the story into README.md

Unit: max |y - ref| / max(1, |ref|) / eps(dtype of x), with ref in long double; weight 1, bias 0, eps 1e-5.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

import anybn
from anybn.backends.registry import resolve_target
from anybn.conformance import inputs, oracle

HERE = Path(__file__).parent

STORY = """\
```
torch.nn.BatchNorm1d(8) on randn(1_000_000, 8) + 1000, on the CPU:   y.std() = {torch}
anybn.BatchNorm1d(8), the same:                                      y.std() = {anybn}
```"""

Normalizer = Callable[[np.ndarray], np.ndarray]  # (N, C, H, W) -> y, both in NumPy


def torch_module(channels_last: bool) -> Normalizer:
    import torch

    def normalize(x: np.ndarray) -> np.ndarray:
        t = to_torch(x)
        if channels_last:
            t = t.to(memory_format=torch.channels_last)
        bn = torch.nn.BatchNorm2d(x.shape[1])  # float32 weights with 16-bit input, as autocast has it
        with torch.no_grad():
            y = (bn.double() if t.dtype is torch.float64 else bn)(t)
        return y.view(torch.uint16).numpy().view(x.dtype) if y.dtype == torch.bfloat16 else y.numpy()

    return normalize


def to_torch(x: np.ndarray):
    import torch

    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def flax_module(x: np.ndarray) -> np.ndarray:
    import flax.nnx as nnx
    import jax.numpy as jnp

    bn = nnx.BatchNorm(x.shape[1], axis=1, epsilon=1e-5, rngs=nnx.Rngs(0))
    return np.asarray(bn(jnp.asarray(x)))


def keras_layer(x: np.ndarray) -> np.ndarray:
    import keras

    return np.asarray(keras.layers.BatchNormalization(axis=1, epsilon=1e-5)(x, training=True))


def anybn_on(library: str) -> Normalizer:
    def normalize(x: np.ndarray) -> np.ndarray:
        backend, device = resolve_target(library)
        y = anybn.batch_norm(backend.from_numpy(x, device), anybn.BatchNormState(x.shape[1]), training=True)
        return backend.to_numpy(y)

    return normalize


def train_compiled(x: np.ndarray) -> tuple[np.ndarray, anybn.BatchNormState]:
    """y and a new state after a call under torch.compile."""
    import torch

    torch.compiler.reset()
    given, state = to_torch(x), anybn.BatchNormState(x.shape[1])
    state.to(given)
    y = torch.compile(lambda x: anybn.batch_norm(x, state, training=True), fullgraph=True)(given)
    return resolve_target("torch")[0].to_numpy(y), state


def columns() -> dict[str, Normalizer]:
    found: dict[str, Normalizer] = {}
    if importlib.util.find_spec("torch"):
        found |= {"torch NCHW": torch_module(False), "torch NHWC": torch_module(True)}
    if importlib.util.find_spec("flax"):
        found["flax"] = flax_module
    if importlib.util.find_spec("keras"):
        found["keras/jax"] = keras_layer
    found["anybn, NumPy"] = anybn_on("numpy")
    if importlib.util.find_spec("torch"):
        found |= {"anybn, torch": anybn_on("torch"), "anybn, torch.compile": lambda x: train_compiled(x)[0]}
    if importlib.util.find_spec("jax"):
        found["anybn, JAX float32"] = anybn_on("jax")
    return found


def rows() -> dict[str, tuple[np.ndarray, str]]:
    table = {name: (make(inputs.normal()), "float32") for name, make in inputs.ROWS.items()}
    for shape in reversed(inputs.HUGE_SHAPES):
        table[f"{shape}, mean 100"] = (inputs.normal(shape) + 100, "float32")
    for dtype in ("float16", "bfloat16"):
        table[f"{dtype}, mean 1e3"] = (inputs.normal() + 1e3, dtype)
    table["float64, N(0, 1)"] = (inputs.normal(), "float64")
    table["float64, mean 1e3"] = (inputs.normal() + 1e3, "float64")
    return table


def error_of(normalize: Normalizer, x: np.ndarray, dtype: str) -> str:
    statistics = oracle.statistics(x)
    y = normalize(x)
    if not np.any(y):
        return "y = 0"
    if y.dtype != x.dtype:
        return f"(y is {y.dtype})"
    error = oracle.error(y, oracle.normalize(x, statistics.mean, statistics.var()), dtype)
    return f"{error:.2g}" if error < 100 else f"{error:.1e}".replace("e+0", "e")


def story() -> dict[str, str]:
    """The standard deviation of BatchNorm1d(8) on randn(1_000_000, 8) + 1000, which should be 1."""
    import torch

    torch.manual_seed(0)
    x = torch.randn(1_000_000, 8) + 1000
    with torch.no_grad():
        y = {"torch": torch.nn.BatchNorm1d(8)(x), "anybn": anybn.BatchNorm1d(8)(x)}
    return {name: f"{values.double().std(correction=0):.6f}" for name, values in y.items()}


def markdown(measured: dict[str, dict[str, str]], names: list[str]) -> str:
    lines = ["| input | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row, cells in measured.items():
        shown = [f"**{cells[n]}**" if n.startswith("anybn") else cells[n] for n in names]
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="put the table into docs/, the story into README.md")
    options = parser.parse_args()
    found = columns()
    measured = {}
    for row, (values, dtype) in rows().items():
        x = inputs.cast(values, dtype)
        with np.errstate(all="ignore"):
            measured[row] = {name: error_of(normalize, x, dtype) for name, normalize in found.items()}
        print(row, measured[row], flush=True)
    packages = [p for p in ("numpy", "torch", "jax", "flax", "keras") if importlib.util.find_spec(p)]
    context = {"machine": platform.machine(), "python": platform.python_version()}
    context |= {package: version(package) for package in packages}
    (HERE / "results").mkdir(exist_ok=True)
    result = {"context": context, "unit": "eps of x's dtype", "shape": inputs.SHAPE, "rows": measured, "story": story()}
    (HERE / "results" / "accuracy.json").write_text(json.dumps(result, indent=1) + "\n")
    table = markdown(measured, list(found))
    print(f"\n{table}\n\n{result['story']}\n{context}")
    if options.docs:
        where = ", ".join(f"{k} {v}" for k, v in context.items() if k != "machine") + f", {context['machine']} CPU"
        fill("accuracy table", f"{table}\n\nMeasured with {where}.")
        fill("story", STORY.format(**result["story"]))


def fill(part: str, text: str) -> None:
    """Replace what stands between ``<!-- part -->`` and ``<!-- end of part -->``, in the page that has both."""
    for page in (HERE.parent / "README.md", *(HERE.parent / "docs").glob("*.md")):
        before, start, rest = page.read_text().partition(f"<!-- {part} -->\n")
        if start:
            _, end, after = rest.partition(f"<!-- end of {part} -->")
            page.write_text(f"{before}{start}{text}\n{end}{after}")


if __name__ == "__main__":
    main()
