"""What is measured of one layer, and the formulas."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from anybn.backends.registry import backend_for
from anybn.diagnosis.observed import Observed, Pair
from anybn.state.state import BatchNormState


class Kept(NamedTuple):
    """What a layer keeps, on the host in float64."""

    weight: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    eps: float
    momentum: float | None
    ddof: int
    updates: int
    relu: bool

    @classmethod
    def by(cls, state: BatchNormState, relu: bool) -> Kept:
        def on_host(a: Any, default: float) -> np.ndarray:
            if a is None:
                return np.full(state.num_features, default)
            backend = backend_for(a)
            return backend.to_numpy(backend.detached(a)).astype(np.float64)

        a = state._store.snapshot()
        arrays = on_host(a.weight, 1), on_host(a.bias, 0), on_host(a.running_mean, 0), on_host(a.running_var, 1)
        return cls(*arrays, state.eps, state.momentum, state.ddof, int(a.num_batches_tracked), relu)


def distance(mean: np.ndarray, var: np.ndarray, a: Pair, b: Pair, eps: float) -> np.ndarray:
    """The root mean square of ``(x - a.mean) / sqrt(a.var + eps) - (x - b.mean) / sqrt(b.var + eps)``.

    Over values x of this mean and biased variance; it is exact, whatever the values are. The unit is a standard
    deviation of normalized values.
    """
    with np.errstate(all="ignore"):  # statistics that are not finite give NaN
        ra, rb = 1 / np.sqrt(a.var + eps), 1 / np.sqrt(b.var + eps)
        offset = (mean - a.mean) * ra - (mean - b.mean) * rb
        return np.sqrt(var * (ra - rb) ** 2 + offset**2)


def rms(values: np.ndarray) -> float:
    """Over the channels where there is a value; NaN if there is none."""
    values = values[np.isfinite(values)]
    return float(np.sqrt(np.mean(values**2))) if values.size else float("nan")


@dataclass(frozen=True, eq=False)
class LayerDiagnosis:
    """What `anybn.diagnose` has measured of one layer. Arrays are ``(C,)``, NaN where there is no finite value.

    All distances are root mean squares of differences of y, before weight and bias, so the unit is a standard
    deviation. Of a layer, they are the root mean squares over its channels.

    Attributes:
        name: of the layer; "" for a single one.
        num_features: C.
        batches: how many there were with any values.
        values: values per channel in all batches, where they are finite.
        updates: ``num_batches_tracked``.
        momentum, eps: of the layer.
        mean, var: the population's: all batches as one, ``var = m2 / (count - ddof)``.
        running_mean, running_var: the layer's.
        gap: y with the running statistics against y with the population's. `anybn.recalibrate` makes it 0.
        noise: y with a batch's own statistics against y with the population's, for a batch like these, times
            ``sqrt(B / (B - 1))`` since each of the B batches is a part of the population. NaN for one batch.
        apart: y as training gives it against y as evaluation gives it, over these batches.
        shift: y with the statistics of the training batches against y with the population's; NaN without any.
        averaging: the gap that a moving average of batches so noisy has: ``noise * sqrt(momentum / (2 - momentum))``.
        leftover: what part of the running statistics is still the start: ``(1 - momentum) ** updates``.
        nonfinite: in how many batches the channel has a NaN or an infinity.
        dead: channels whose y varies by less than 0.001 with the statistics of the population, or, with a fused relu
            and no residual, is 0.
        saturated: other channels whose y, likewise, has one sign: a relu behind it does nothing, or passes nothing.
        training_gap: the gap, taken over the training batches if there are any; so it is about the training alone.
        corrected_gap: training_gap, if the start were taken out of the running statistics.
        unlike: the variance of batch means, in that of means of random samples; above 1, batches are not random.
    """

    name: str
    num_features: int
    batches: int
    values: np.ndarray
    updates: int
    momentum: float | None
    eps: float
    mean: np.ndarray
    var: np.ndarray
    running_mean: np.ndarray
    running_var: np.ndarray
    gap: np.ndarray
    noise: np.ndarray
    apart: np.ndarray
    shift: np.ndarray
    averaging: float
    leftover: float
    nonfinite: np.ndarray
    dead: np.ndarray
    saturated: np.ndarray
    unlike: float
    training_gap: np.ndarray = field(repr=False)
    corrected_gap: np.ndarray = field(repr=False)


def measured(name: str, kept: Kept, seen: Observed, training: Observed | None) -> LayerDiagnosis:
    eps, running = kept.eps, Pair(kept.mean, kept.var)
    batches, whole, population = seen.batches, seen.whole, seen.population(kept.ddof)
    gap = distance(whole.mean, whole.var, running, population, eps)
    noise, apart = (_over_batches(seen, other, eps) for other in (population, running))
    b = (batches.count > 0).sum(0)
    with np.errstate(all="ignore"):
        noise = np.where(b > 1, noise * np.sqrt(b / (b - 1)), np.nan)
    shift, source = np.full_like(gap, np.nan), seen
    if training is not None:
        source = training
        shift = distance(whole.mean, whole.var, training.population(kept.ddof), population, eps)
    if kept.momentum is None:  # the plain average
        leftover, averaged = float(kept.updates == 0), 1 / max(kept.updates, 1)
    else:
        leftover, averaged = float((1 - kept.momentum) ** kept.updates), kept.momentum / (2 - kept.momentum)
    followed = source.population(kept.ddof)
    with np.errstate(all="ignore"):
        started = Pair(running.mean / (1 - leftover), np.maximum(running.var - leftover, 0) / (1 - leftover))
    dead, saturated = _dead_and_saturated(kept, seen)
    return LayerDiagnosis(
        name=name, num_features=seen.num_features, batches=len(seen), values=whole.count, updates=kept.updates,
        momentum=kept.momentum, eps=eps, mean=population.mean, var=population.var, running_mean=running.mean,
        running_var=running.var, gap=gap, noise=noise, apart=apart, shift=shift,
        averaging=rms(noise) * averaged**0.5, leftover=leftover,
        nonfinite=len(seen) - b, dead=dead, saturated=saturated, unlike=_unlike(seen),
        training_gap=distance(source.whole.mean, source.whole.var, running, followed, eps),
        corrected_gap=distance(source.whole.mean, source.whole.var, started, followed, eps),
    )  # fmt: skip


def _over_batches(seen: Observed, other: Pair, eps: float) -> np.ndarray:
    """y normalized with each batch's own statistics against y with the others', root mean square over all values."""
    batches = seen.batches
    squares = distance(batches.mean, batches.var, Pair(batches.mean, batches.var), other, eps) ** 2
    n = batches.count.sum(0)
    squares = np.where(batches.count > 0, batches.count * squares, 0).sum(0)
    return np.sqrt(np.where(n > 0, squares, np.nan) / np.maximum(n, 1))


def _unlike(seen: Observed) -> float:
    """Of B batches, ``sum((mean - whole mean)**2) * N / (B - 1)`` by the variance: the average over the channels.

    The mean of N random samples varies by 1 / N of the variance of a value, or less where a sample has several values.
    """
    count, mean, _, samples = seen.batches
    counted = (count > 0) & (samples > 0)[:, None]
    b = counted.sum(0)
    with np.errstate(all="ignore"):
        squares = np.where(counted, samples[:, None] * (mean - seen.whole.mean) ** 2, 0).sum(0)
        ratio = squares / (b - 1) / seen.whole.var
    ratio = ratio[(b > 1) & np.isfinite(ratio)]
    return float(ratio.mean()) if ratio.size else float("nan")


#: A y that varies by less than this says nothing.
FLAT = 1e-3


def _dead_and_saturated(kept: Kept, seen: Observed) -> tuple[np.ndarray, np.ndarray]:
    """With the statistics of the population: what a gap does to y, recalibrate mends."""
    mean, var = seen.population(kept.ddof)
    with np.errstate(all="ignore"):
        scale = kept.weight / np.sqrt(var + kept.eps)
        ends = np.sort([(end - mean) * scale + kept.bias for end in seen.range], axis=0)
        flat = np.abs(scale) * np.sqrt(seen.whole.var) < FLAT
        closed, opened = ends[1] <= 0, ends[0] >= 0
    dead = flat | closed if kept.relu else flat
    return dead, ~dead & (closed | opened)
