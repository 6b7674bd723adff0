"""The report of `anybn.diagnose`: a table, a dictionary, a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from anybn.diagnosis.findings import Finding
from anybn.diagnosis.layer import LayerDiagnosis, rms
from anybn.errors import required

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What a layer has one number of, for each channel.
_PER_CHANNEL = ("gap", "noise", "apart", "shift")


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `anybn.diagnose` returns; ``print`` shows it as a table.

    Attributes:
        layers: name -> `LayerDiagnosis`, in the order in which the model has them.
        findings: every `Finding`, layer by layer, the gravest first.
        score: for a model with ``score=``: its average with the running statistics ("running"), with those of the data
            ("recalibrated"), and with those of each batch ("batch"); else None.
    """

    layers: Mapping[str, LayerDiagnosis]
    findings: tuple[Finding, ...]
    score: Mapping[str, float] | None = None

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "channels", "batches", "updates", "gap", "noise", "apart", "found")]
        for name, layer in self.layers.items():
            causes = ", ".join(dict.fromkeys(f.cause for f in self.findings if f.layer == name))
            numbers = [_shown(rms(getattr(layer, key))) for key in _PER_CHANNEL[:3]]
            counts = [str(n) for n in (layer.num_features, layer.batches, layer.updates)]
            rows.append((name or "(layer)", *counts, *numbers, causes or "nothing"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.findings:
            lines.append("")
        lines += [f"{f.layer + ': ' if f.layer else ''}{f.what}. To mend it: {f.remedy}." for f in self.findings]
        if self.score is not None:
            scores = ", ".join(f"{value:.4g} with {_STATISTICS[name]}" for name, value in self.score.items())
            lines += ["", f"score: {scores}"]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Diagnosis of {len(self.layers)} layers, {len(self.findings)} findings: print it"

    def to_dict(self) -> dict[str, Any]:
        """The same in dicts, lists, strings and numbers, as ``json.dumps`` takes it; None for what is not known.

        ``{"layers": {name: {"gap": 0.1, "channels": {"gap": [...], ...}, ...}}, "findings": [...], "score": {...}}``
        """
        found = [vars(f) | {"channels": list(f.channels)} for f in self.findings]
        score = None if self.score is None else {name: _plain(value) for name, value in self.score.items()}
        return {
            "layers": {name: _as_dict(layer) for name, layer in self.layers.items()},
            "findings": found,
            "score": score,
        }

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """What evaluation makes of these data, channel by channel, and save it if there is a path.

        Above the mean of each channel of y before weight and bias, which should be 0; below its standard deviation,
        which should be 1. The gray band is how far a batch's own statistics are off.

        Args:
            path: for the file; its ending is one of the formats that matplotlib writes.

        Returns the matplotlib figure. Raises BackendNotInstalled without matplotlib.
        """
        with required("plot needs matplotlib", "matplotlib"):
            from matplotlib.figure import Figure
        figure = Figure(figsize=(max(6.4, 2.2 + 0.45 * len(self.layers)), 5.6), layout="constrained")
        _draw(figure, self.layers)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


_STATISTICS = {"running": "the running statistics", "recalibrated": "recalibrated ones", "batch": "each batch's own"}


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value.tolist()]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_dict(layer: LayerDiagnosis) -> dict[str, Any]:
    fields = {name: value for name, value in vars(layer).items() if name != "name"}
    of_layer = {name: _plain(value) for name, value in fields.items() if not isinstance(value, np.ndarray)}
    of_layer |= {name: _plain(rms(fields[name])) for name in _PER_CHANNEL}
    return of_layer | {"channels": {name: _plain(v) for name, v in fields.items() if isinstance(v, np.ndarray)}}


def _draw(figure: Figure, layers: Mapping[str, LayerDiagnosis]) -> None:
    above, below = figure.subplots(2, 1, sharex=True)
    for i, layer in enumerate(layers.values()):
        with np.errstate(all="ignore"):
            scale = 1 / np.sqrt(layer.running_var + layer.eps)
            mean, std = (layer.mean - layer.running_mean) * scale, np.sqrt(layer.var + layer.eps) * scale
        for axes, values, right in (above, mean, 0.0), (below, std, 1.0):
            places = i + np.linspace(-0.25, 0.25, len(values))
            axes.scatter(places, values, s=9, color="#1f77b4", linewidths=0, label=None if i else "a channel")
            noise = 0.0 if math.isnan(rms(layer.noise)) else rms(layer.noise)
            band = {"color": "#888888", "alpha": 0.25, "linewidth": 0}
            axes.bar(i, 2 * noise, 0.8, right - noise, **band, label=None if i else "noise of a batch")
    for axes, right in (above, 0.0), (below, 1.0):
        axes.axhline(right, color="black", linewidth=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle("y in evaluation, before weight and bias, in units of its standard deviation", fontsize=11)
    above.set(ylabel="mean (right: 0)")
    below.set(xlabel="layer", ylabel="standard deviation (right: 1)")
    below.set_xticks(range(len(layers)), [name or "layer" for name in layers], rotation=45, ha="right", fontsize=8)
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=8, frameon=False)
