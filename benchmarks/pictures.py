"""The pictures of README.md and of the site, into docs/images.

    python benchmarks/pictures.py
    python benchmarks/pictures.py --demo   # that of `python -m anybn demo` too, some minutes

It takes torch, and for the error against the mean also Flax, Keras and JAX, where they are installed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from accuracy import columns
from matplotlib.figure import Figure
from readme import read

import anybn
from anybn.cli.bench import draw
from anybn.cli.comparison import FIRST, ROWS, Case
from anybn.cli.timing import Timing
from anybn.conformance import inputs, oracle

IMAGES = Path(__file__).parent.parent / "docs" / "images"
OURS, THEIRS = "#1f77b4", "#d95f02"
COLORS = {"torch NCHW": THEIRS, "flax": "#7570b3", "keras/jax": "#1b9e77", "anybn, NumPy": OURS}


def save(figure: Figure, name: str) -> None:
    path = IMAGES / f"{name}.png"
    figure.savefig(path, dpi=150, metadata={"Software": None})
    print(path)


def story() -> None:
    """What torch and anybn make of a million values of mean 1000 and deviation 1, beside the normal density."""
    torch.manual_seed(0)
    x = torch.randn(1_000_000, 8) + 1000
    with torch.no_grad():
        layers = {"torch.nn.BatchNorm1d(8)": torch.nn.BatchNorm1d(8), "anybn.BatchNorm1d(8)": anybn.BatchNorm1d(8)}
        ys = {name: layer(x).double().numpy().ravel() for name, layer in layers.items()}
    figure = Figure(figsize=(8, 3), layout="constrained")
    edges = np.linspace(-4, 4, 161)
    middles = (edges[1:] + edges[:-1]) / 2
    for axes, (name, y), color in zip(figure.subplots(1, 2, sharey=True), ys.items(), (THEIRS, OURS), strict=True):
        axes.hist(y, edges, density=True, color=color, alpha=0.8)
        axes.plot(middles, np.exp(-(middles**2) / 2) / np.sqrt(2 * np.pi), color="black", linewidth=1)
        axes.set(title=f"{name}: standard deviation {y.std():.2f}", xlabel="y", xlim=(-4, 4), xticks=range(-3, 4))
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    figure.axes[0].set_ylabel("density (line: the right one)")
    save(figure, "story")


def mean() -> None:
    """The largest error of y over the mean of the data."""
    means = np.concatenate([[0], 10.0 ** np.arange(0, 7.5, 0.5)])
    found = {name: normalize for name, normalize in columns().items() if name in COLORS}
    errors: dict[str, list[float]] = {name: [] for name in found}
    for m in means:
        x = (inputs.normal() + m).astype(np.float32)
        statistics = oracle.statistics(x)
        y = oracle.normalize(x, statistics.mean, statistics.var())
        for name, normalize in found.items():
            errors[name].append(oracle.error(normalize(x), y, "float32"))
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, values in errors.items():
        axes.plot(means, values, marker="o", markersize=3, color=COLORS[name], label=name)
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle="dotted", label="rounding once")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_yscale("log")
    axes.set(
        xlabel="mean of the data; the deviation is 1",
        ylabel="largest error of y (eps)",
        xlim=(-0.1, 1.5e7),
        ylim=(0.2, None),
    )
    axes.set_title("Batch norm in float32, training, on 32x8x28x28", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    save(figure, "mean")


def diagnosis() -> None:
    """The model of docs/gallery.md."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()),
        *(torch.nn.Conv2d(8, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU()),
    )
    batches = (torch.randn(256, 3, 12, 12) * 2 + 1).split(64)
    for x in batches:
        model(x)
    save(anybn.diagnose(model, batches).plot(), "diagnose")


def bench() -> None:
    """What `anybn bench` draws, of the times in benchmarks/results/speed.jsonl, which a quiet machine took."""
    timings: dict[Case, dict[str, Timing]] = {}
    for row in read("speed.jsonl"):
        if row["op"] == "forward" and row["layout"] in (FIRST, ROWS):
            of = timings.setdefault(Case(row["op"], row["layout"], tuple(row["shape"])), {})
            for name, key in ("copy", "copy_us"), ("fresh copy", "fresh_copy_us"), (row["library"], "ours_us"):
                of[name] = Timing(row[key] / 1e6, 0.0)
            of["torch.nn"] = Timing(row["torch_us"] / 1e6, 0.0)
    draw(IMAGES / "bench.png", timings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="train for the demo's picture too")
    options = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    for make in (story, diagnosis, bench, mean):
        make()
    if options.demo:
        subprocess.run([sys.executable, "-m", "anybn", "demo", "--png", IMAGES / "demo.png"], check=True)


if __name__ == "__main__":
    main()
