"""From what was measured to causes, and what mends them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from anybn._checks import named_channels
from anybn.diagnosis.layer import LayerDiagnosis, rms

Cause = Literal[
    "not finite",
    "no updates",
    "too few updates",
    "momentum",
    "shifted or stale",
    "shifted data",
    "stale",
    "small batches",
    "unlike batches",
    "dead channels",
    "saturated channels",
]

#: A gap that is worth mending: a tenth of a standard deviation.
GAP = 0.1
#: The noise of batches of 16 independent normal values, ``sqrt(1 / 16 + 1 / 32)``, of their mean and their deviation.
#: Below such batches, batch norm itself loses accuracy (Wu & He 2018, figure 1).
NOISE = 0.3
#: A part of the start that running statistics may still have in them.
LEFTOVER = 0.01


@dataclass(frozen=True)
class Finding:
    """One cause that `anybn.diagnose` has found in one layer.

    Attributes:
        layer: its name.
        cause: a word from the table of `anybn.diagnose`.
        what: what was seen, in a sentence.
        remedy: what to do, in a sentence.
        channels: those that show it, where it is about single channels.
    """

    layer: str
    cause: Cause
    what: str
    remedy: str
    channels: tuple[int, ...] = ()


def findings_of(layer: LayerDiagnosis, *, knows_training: bool) -> Iterator[Finding]:
    """The causes that the numbers show, the gravest first."""
    yield from _not_finite(layer)
    if rms(layer.training_gap) > GAP:
        yield _cause_of_gap(layer, knows_training)
    if (shift := rms(layer.shift)) > GAP:
        yield Finding(
            layer.name,
            "shifted data",
            f"these batches and the training batches are {shift:.2g} apart",
            "compare how both are prepared; if the new data are meant, recalibrate on them",
        )
    yield from _noise(layer)
    yield from _one_sided(layer)


def _of_channels(layer: LayerDiagnosis, cause: Cause, where: np.ndarray, what: str, remedy: str) -> Iterator[Finding]:
    if where.any():
        channels = tuple(int(c) for c in np.flatnonzero(where))
        which = f"{len(channels)} of {layer.num_features} channels ({named_channels(channels)})"
        yield Finding(layer.name, cause, f"{which} have {what}", remedy, channels)


def _not_finite(layer: LayerDiagnosis) -> Iterator[Finding]:
    yield from _of_channels(
        layer,
        "not finite",
        ~(np.isfinite(layer.running_mean) & np.isfinite(layer.running_var)),
        "running statistics that are NaN or infinite",
        "recalibrate; anybn's layers keep such batches out of them",
    )
    yield from _of_channels(
        layer,
        "not finite",
        layer.nonfinite > 0,
        f"a NaN or an infinity in up to {layer.nonfinite.max()} of {layer.batches} batches",
        'look for it in the data and in the layer before; nonfinite="raise" stops at the first',
    )


def _cause_of_gap(layer: LayerDiagnosis, knows_training: bool) -> Finding:
    gap, updates, momentum = rms(layer.training_gap), layer.updates, layer.momentum
    if updates == 0 and not layer.running_mean.any() and (layer.running_var == 1).all():
        return Finding(
            layer.name,
            "no updates",
            f"the running statistics are as they start, 0 and 1: the gap is {gap:.2g}",
            "train, load a checkpoint that has them, or recalibrate",
        )
    corrected = rms(layer.corrected_gap)
    if momentum and updates and layer.leftover > LEFTOVER and corrected < gap / 2:
        enough = math.ceil(math.log(LEFTOVER) / math.log1p(-momentum))
        faster = 1 - LEFTOVER ** (1 / updates)
        return Finding(
            layer.name,
            "too few updates",
            f"{updates} updates at momentum {momentum:g} leave {layer.leftover:.0%} of the start, 0 and 1: the gap is "
            f"{gap:.2g}, and would be {corrected:.2g} without it",
            f"recalibrate, make {enough} updates, or use momentum={faster:.2g} or None",
        )
    if gap < 2 * layer.averaging:
        ratio = (GAP / 2 / rms(layer.noise)) ** 2
        return Finding(
            layer.name,
            "momentum",
            f"the gap is {gap:.2g}, and a moving average of batches as noisy as these is {layer.averaging:.2g} off",
            f"recalibrate, or use momentum={2 * ratio / (1 + ratio):.2g}",
        )
    if knows_training:
        return Finding(
            layer.name,
            "stale",
            f"the running statistics are {gap:.2g} from those of the training batches",
            "recalibrate on the training batches; a larger momentum follows a fast training more closely",
        )
    return Finding(
        layer.name,
        "shifted or stale",
        f"the gap is {gap:.2g}, more than noise explains",
        "recalibrate on data like these; pass training_batches to find out which of both it is",
    )


def _noise(layer: LayerDiagnosis) -> Iterator[Finding]:
    noise = rms(layer.noise)
    # Of B batches, the ratio spreads by sqrt(2 / (B - 1)) if all channels say the same: four times that is no chance.
    if noise > GAP and layer.batches > 1 and layer.unlike > 1 + 4 * math.sqrt(2 / (layer.batches - 1)):
        yield Finding(
            layer.name,
            "unlike batches",
            f"the variance of the means of batches is {layer.unlike:.2g} times that of means of random samples",
            "shuffle, so that each batch is a random part of the data",
        )
    elif noise > NOISE:
        times = math.ceil((noise / NOISE) ** 2)
        yield Finding(
            layer.name,
            "small batches",
            f"a batch's own statistics make y differ by {noise:.2g}",
            f"batches {times} times as large, a group of {times} processes, or group norm; recalibrate mends "
            "evaluation, not this",
        )


def _one_sided(layer: LayerDiagnosis) -> Iterator[Finding]:
    yield from _of_channels(
        layer,
        "dead channels",
        layer.dead,
        "a y that does not vary",
        "look at their weight, and at the layer before; channels that stay so can be pruned",
    )
    yield from _of_channels(
        layer,
        "saturated channels",
        layer.saturated,
        "a y of one sign",
        "a relu behind them does nothing or passes nothing: look at their bias",
    )
