"""``python -m anybn demo``: a small net on real handwritten digits, with and without batch norm, that changes its array
library midway.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import safetensors  # noqa: F401 writes the checkpoint at the end: better missed now than after the training
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits  # comes with scikit-learn
from tqdm import tqdm

import anybn
from anybn.backends.registry import backend_for, backend_named, installation_of
from anybn.cli.net import CLASSES, LEARNING_RATE, SGD_MOMENTUM, SIDE, WIDTHS, Net
from anybn.errors import BackendNotInstalled

TRAINING_IMAGES = 1437  # of 1797, four fifths
BATCH = 64

GUESTS = "torch", "jax", "array_api_strict"

# Two libraries add in different orders. In float64 that came to less than 1e-14 over 3 to 60 epochs of both nets, from
# three seeds, on torch and JAX. A batch that the running statistics lose shows as 1e-3 or more, a state that passes
# through float32 as 5e-8. A net in float32 could not tell these apart: there the runs differ by 1e-6, and by 1e-3 once
# that difference has carried one value across the corner of a relu.
TOLERANCE = 1e-12

# -- training --------------------------------------------------------------------------------------------------


@dataclass
class Digits:
    """Images, as the net takes them, and one-hot labels, in NumPy; the last ones are the test set."""

    x: np.ndarray
    labels: np.ndarray

    @classmethod
    def load(cls, kind: str, seed: int) -> Digits:
        digits = load_digits()
        order = np.random.default_rng(seed).permutation(len(digits.target))
        shape = (-1, SIDE, SIDE, 1) if kind == "conv" else (-1, SIDE**2)
        return cls(digits.images[order].reshape(shape) / 16.0, np.eye(CLASSES)[digits.target[order]])

    @property
    def test(self) -> tuple[np.ndarray, np.ndarray]:
        return self.x[TRAINING_IMAGES:], self.labels[TRAINING_IMAGES:]


@dataclass
class Run:
    """One training; each list has an entry per epoch, ``places`` saying where it ran."""

    name: str
    net: Net
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def train(self, digits: Digits, targets: list[str], seed: int, progress: tqdm[Any]) -> None:
        """An epoch on each of the targets, one after the other."""
        rng, start = np.random.default_rng(seed), time.perf_counter()
        for target in targets:
            self.net.to(target)
            order = rng.permutation(TRAINING_IMAGES)
            batches = [order[i : i + BATCH] for i in range(0, TRAINING_IMAGES - BATCH + 1, BATCH)]
            there = ((anybn.asarray(a[b], like=target) for a in (digits.x, digits.labels)) for b in batches)
            losses = [self.net.step(*batch) for batch in there]
            self.losses.append(sum(losses) / len(losses))
            self.accuracies.append(accuracy(self.net, digits, target))
            self.places.append(place_of(self.net))
            progress.set_description(f"{self.name} ({self.places[-1]})")
            progress.update()
        self.seconds = time.perf_counter() - start


def place_of(net: Net) -> str:
    """Where the net's states lie, as they themselves have it; for a net without any, where its weights do."""
    weight = (net.norms or net.layers[-1:])[0].state.weight
    return backend_for(weight).place(weight)


def accuracy(net: Net, digits: Digits, target: str = "numpy") -> float:
    x, labels = digits.test
    logits = anybn.asarray(net.logits(anybn.asarray(x, like=target)), like="numpy")
    return float(np.mean(logits.argmax(axis=-1) == labels.argmax(axis=-1)))


def spans(places: list[str]) -> list[tuple[str, int, int]]:
    """``["numpy", "torch", "torch"]`` -> ``[("numpy", 1, 1), ("torch", 2, 3)]``, epochs counted from 1."""
    found, first = [], 1
    for place, epochs in groupby(places):
        n = len(list(epochs))
        found.append((place, first, first + n - 1))
        first += n
    return found


# -- checks ----------------------------------------------------------------------------------------------------


def state_difference(a: Net, b: Net) -> float:
    """The largest difference between the states of two nets, relative to the largest value of the array it is in.

    Infinite if they have not seen as many batches; NaN if anything in them is.
    """
    differences = []
    for s, t in zip((bn.state for bn in a.norms), (bn.state for bn in b.norms), strict=True):
        if s.num_batches_tracked != t.num_batches_tracked:
            return float("inf")
        for name in ("weight", "bias", "running_mean", "running_var"):
            u, v = (anybn.asarray(getattr(state, name), like="numpy") for state in (s, t))
            differences.append(np.max(np.abs(u - v)) / (np.max(np.abs(v)) or 1.0))
    return float(np.max(differences))


def survives_checkpoint(net: Net, digits: Digits) -> bool:
    """Save every state, load it back, and compare the net's outputs bit for bit."""
    x, _ = digits.test
    before = net.logits(x)
    with tempfile.TemporaryDirectory() as folder:
        for i, bn in enumerate(net.norms):
            path = Path(folder, f"bn{i}.safetensors")
            bn.state.save(path)
            bn.state = anybn.BatchNormState.load(path)
    return bool(np.array_equal(before, net.logits(x)))


# -- report ----------------------------------------------------------------------------------------------------


def draw(path: Path, kind: str, switched: Run, alone: Run, plain: Run) -> None:
    """Learning curves of the three runs, with the epochs outside of NumPy shaded."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(
        f"Handwritten digits: the same {kind} net with and without batch norm, learning rate {LEARNING_RATE}"
    )
    draw_curves(left, [(run, [100 * a for a in run.accuracies]) for run in (switched, alone, plain)])
    left.set(title="Accuracy on the test set", ylabel="accuracy (%)")
    draw_curves(right, [(run, run.losses) for run in (switched, alone, plain)])
    right.set(title="Loss on the training set", ylabel="cross entropy", yscale="log")
    left.legend(loc="lower right")
    figure.savefig(path, format=path.suffix[1:].lower(), dpi=150)


def draw_curves(axes: Axes, curves: list[tuple[Run, list[float]]]) -> None:
    styles: tuple[dict[str, Any], ...] = (
        # The two runs with batch norm coincide: a broad line, and dots on it.
        {"color": "#1f77b4", "linewidth": 4, "alpha": 0.5},
        {"color": "#08306b", "linestyle": "", "marker": "."},
        {"color": "#d95f02", "linewidth": 2},
    )
    for (run, values), style in zip(curves, styles, strict=True):
        axes.plot(range(1, len(values) + 1), values, label=run.name, **style)
    for place, first, last in spans(curves[0][0].places):
        if place != "numpy":
            axes.axvspan(
                first - 0.5, last + 0.5, color="#2ca02c", alpha=0.15, label=f"switched run on {place}", linewidth=0
            )
    axes.set(xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def print_table(*runs: Run) -> None:
    shown = {"epoch 1": 0, "epoch 3": 2, "last": -1}
    print(f"test accuracy after {'':9}" + "".join(f"{title:>10}" for title in shown) + f"{'time':>10}   epochs")
    for run in runs:
        accuracies = "".join(f"{run.accuracies[epoch]:>10.1%}" for epoch in shown.values())
        where = ", ".join(f"{first}-{last} on {place}" for place, first, last in spans(run.places))
        print(f"{run.name:29}{accuracies}{run.seconds:>8.1f} s   {where}")


def verdict(ok: bool) -> str:
    return "ok" if ok else "FAILED"


def available_guest() -> str:
    """The first library besides NumPy that can be imported."""
    for name in GUESTS:
        try:
            backend_named(name)
        except BackendNotInstalled:
            continue
        if name != GUESTS[0]:
            print(f"{GUESTS[0]} is not installed, so the switch goes to {name}")
        return name
    raise BackendNotInstalled(f"the demo switches to a second array library: {installation_of(GUESTS[0])}")


def run(*, epochs: int, seed: int, layers: str, png: Path, switch_to: str | None) -> dict[str, Any]:
    """Train, print, draw; what came of it, with "passed" if both checks hold."""
    guest = switch_to or available_guest()
    if guest.partition(":")[0] == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    digits = Digits.load(layers, seed)
    print(
        f"{len(digits.x)} handwritten digits of {SIDE}x{SIDE} pixels, {TRAINING_IMAGES} of them to train on; "
        f"{layers} net of widths {', '.join(map(str, WIDTHS[layers]))} in float64\n"
        f"{epochs} epochs of SGD in batches of {BATCH}, learning rate {LEARNING_RATE}, momentum {SGD_MOMENTUM}, "
        f"seed {seed}, the same for all runs\n"
    )

    third = epochs // 3
    there_and_back = ["numpy"] * third + [guest] * (epochs - 2 * third) + ["numpy"] * third
    switched = Run("with batch norm, switched", Net(layers, seed, batch_norm=True))
    alone = Run("with batch norm, NumPy alone", Net(layers, seed, batch_norm=True))
    plain = Run("without batch norm", Net(layers, seed, batch_norm=False))
    bar = tqdm(total=3 * epochs, unit="epoch", file=sys.stderr, disable=None, leave=False)
    # Matrices this small gain nothing from threads, and on a busy machine threads that wait for each other cost much.
    with threadpool_limits(1), bar as progress:
        switched.train(digits, there_and_back, seed, progress)
        alone.train(digits, ["numpy"] * epochs, seed, progress)
        plain.train(digits, ["numpy"] * epochs, seed, progress)

    print_table(switched, alone, plain)
    difference = state_difference(switched.net, alone.net)
    same_state = difference <= TOLERANCE
    print(
        f"\nstate after the switches against NumPy alone: largest relative difference {difference:.1e}, "
        f"tolerance {TOLERANCE:.0e}: {verdict(same_state)}"
    )
    same_outputs = survives_checkpoint(switched.net, digits)
    print(
        f"states saved, loaded and used again: accuracy {accuracy(switched.net, digits):.1%}, "
        f"outputs bit for bit the same: {verdict(same_outputs)}"
    )
    draw(png, layers, switched, alone, plain)
    print(f"learning curves: {png}")
    return {
        "passed": same_state and same_outputs,
        "difference": difference,
        "same_outputs": same_outputs,
        "picture": str(png),
        "runs": [{k: v for k, v in vars(run).items() if k != "net"} for run in (switched, alone, plain)],
    }
