"""``python -m anybn bench``: training forward passes beside torch and beside a copy, as a table and as bars.

It is a short form of ``benchmarks/speed.py``; both measure with what is in ``comparison.py`` and ``timing.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from tqdm import tqdm

import anybn
from anybn.cli.comparison import FIRST, ROWS, Case, cases, measure, use_threads
from anybn.cli.timing import Timing, duration

TITLES = {"numpy": "anybn, NumPy arrays", "torch": "anybn, torch tensors", "torch.nn": "torch.nn"}
COLORS = {"numpy": "#1f77b4", "torch": "#08306b", "torch.nn": "#d95f02"}


def run(png: Path) -> tuple[dict[Case, Mapping[str, Timing]], float]:
    """Measure training forward passes and draw them. Raises WrongResult.

    Returns what `table_of` takes, and how many CPUs other processes used meanwhile.
    """
    use_threads(anybn.get_num_threads())
    chosen = cases(["forward"], [FIRST, ROWS])
    progress = tqdm(chosen, unit="shape", file=sys.stderr, disable=None, leave=False)
    measured = {case: measure(case, rounds=7, seconds=1.2) for case in progress}
    timings: dict[Case, Mapping[str, Timing]] = {case: m.timings for case, m in measured.items()}
    draw(png, timings)
    return timings, max(m.busy for m in measured.values())


def shown(timings: Mapping[Case, Mapping[str, Timing]]) -> list[str]:
    """Who was measured, besides the copies."""
    return [name for name in TITLES if name in next(iter(timings.values()))]


def table_of(timings: Mapping[Case, Mapping[str, Timing]]) -> list[tuple[str, ...]]:
    names = shown(timings)
    compared = [name for name in names if name != "torch.nn" and "torch.nn" in names]
    rows = [("shape", "copy", "fresh copy", *(TITLES[n] for n in names), *(f"torch.nn / {n}" for n in compared))]
    for case, of in timings.items():
        times = [duration(of[name].median) for name in ("copy", "fresh copy", *names)]
        ratios = [f"{of['torch.nn'].median / of[name].median:.2f}" for name in compared]
        rows.append((str(case.shape), *times, *ratios))
    return rows


def draw(path: Path, timings: Mapping[Case, Mapping[str, Timing]]) -> None:
    """A group of bars per shape, as multiples of a copy of x, which is the floor."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    axes = figure.subplots()
    names, positions = shown(timings), np.arange(len(timings))
    floors, width = medians(timings, "copy"), 0.8 / len(names)
    for i, name in enumerate(names):
        seconds = medians(timings, name)
        shifted = positions + (i - (len(names) - 1) / 2) * width
        bars = axes.bar(shifted, seconds / floors, width, color=COLORS[name], label=TITLES[name])
        axes.bar_label(bars, [duration(s) for s in seconds], rotation=90, fontsize=8, padding=3)
    fresh = medians(timings, "fresh copy") / floors
    axes.axhline(1, color="black", label="copy of x into memory in use")
    axes.hlines(fresh, positions - 0.45, positions + 0.45, "black", "dotted", label="copy of x into fresh memory")
    axes.set_yscale("log")
    axes.set(ylabel="time, in copies of x", ylim=(0.5, 2.5 * axes.get_ylim()[1]), axisbelow=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(positions, [str(case.shape) for case in timings], fontsize=8, rotation=15)
    axes.tick_params("x", length=0)
    axes.set_title(f"Batch norm, training forward, float32, {anybn.get_num_threads()} threads: shorter is faster")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", ncols=5, fontsize=9, frameon=False)
    figure.savefig(path, format=path.suffix[1:].lower(), dpi=150)


def medians(timings: Mapping[Case, Mapping[str, Timing]], name: str) -> np.ndarray:
    return np.array([of[name].median for of in timings.values()])
