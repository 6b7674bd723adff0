"""What one layer has been shown: the statistics of every batch, and those of all batches together."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from anybn._moments import Moments
from anybn._population import moments_on_host
from anybn.backends.registry import backend_for
from anybn.core.call import Array
from anybn.core.formulas import reduced_axes
from anybn.core.moments import merged


class Pair(NamedTuple):
    """A mean and a variance to normalize with."""

    mean: np.ndarray
    var: np.ndarray


class Whole(NamedTuple):
    """The statistics of all batches; ``(C,)``."""

    count: np.ndarray  # type: ignore[assignment] # hides tuple.count
    mean: np.ndarray
    var: np.ndarray
    """biased"""
    m2: np.ndarray


class Observed:
    """The statistics of a layer's batches, on the host in float64. Arrays are ``(B, C)``: one batch a row.

    A channel of a batch that has a NaN or an infinity counts 0 values there.
    """

    def __init__(self, num_features: int):
        self.num_features = num_features
        self._parts: list[Moments] = []
        self._ranges: list[np.ndarray] = []
        self._samples: list[int] = []

    def add(self, batch: Array | Moments, axis: int, mask: Array | None = None) -> None:
        """A batch of any library, or its moments, which tell nothing of its range and samples. Empty ones are none.

        ``mask`` broadcasts to the batch, as in a `Call`.
        """
        moments = moments_on_host(batch, axis, self.num_features, mask)
        if not np.any(moments.count):
            return
        self._parts.append(moments)
        if isinstance(batch, Moments):
            self._ranges.append(np.full((2, self.num_features), np.nan))
            self._samples.append(0)
        else:
            self._ranges.append(_range(batch, axis, mask))
            self._samples.append(batch.shape[1 if axis % batch.ndim == 0 else 0])

    def __len__(self) -> int:
        return len(self._parts)

    @cached_property
    def batches(self) -> Batches:
        nothing = np.zeros(self.num_features)
        mean = np.array([m.mean + (nothing if m.shift is None else m.shift) for m in self._parts])
        m2 = np.array([m.m2 for m in self._parts])
        finite = np.isfinite(mean) & np.isfinite(m2)
        count = np.where(finite, [np.broadcast_to(m.count, self.num_features) for m in self._parts], 0)
        return Batches(count, np.where(finite, mean, 0.0), np.where(finite, m2, 0.0), np.array(self._samples))

    @cached_property
    def whole(self) -> Whole:
        """All batches as one."""
        count, mean, m2, _ = self.batches
        total = count.sum(0)
        s = merged(np, total, count, mean, None, m2)
        return Whole(total, s.mean + s.shift, s.var, np.asarray(s.m2))

    def population(self, ddof: int) -> Pair:
        """What `anybn.recalibrate` would set; NaN where there are not two values."""
        count, mean, _, m2 = self.whole
        enough = count > 1
        return Pair(np.where(enough, mean, np.nan), np.where(enough, m2, np.nan) / np.where(enough, count - ddof, 1))

    @property
    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and the largest value of each channel, of the batches where it is finite; NaN if unknown."""
        low, high = np.array(self._ranges).transpose(1, 0, 2)
        counted = self.batches.count > 0
        return np.where(counted, low, np.inf).min(0), np.where(counted, high, -np.inf).max(0)


class Batches(NamedTuple):
    """Batch by batch."""

    count: np.ndarray  # type: ignore[assignment] # hides tuple.count
    mean: np.ndarray
    m2: np.ndarray
    samples: np.ndarray
    """``(B,)``, the length of the batch axis; 0 if unknown"""

    @property
    def var(self) -> np.ndarray:
        """Biased, as a batch is normalized."""
        return self.m2 / np.maximum(self.count, 1)


def _range(x: Array, axis: int, mask: Array | None) -> np.ndarray:
    """(2, C)."""
    backend = backend_for(x)
    x = backend.detached(x)
    if mask is None:
        try:
            x = np.from_dlpack(x)  # in the host's memory NumPy is faster than torch: 0.1 and 16 ms on a busy machine
        except (AttributeError, BufferError, RuntimeError, TypeError, ValueError):  # on a device, lazy, bfloat16, ...
            pass
        else:
            backend = backend_for(x)
    xp, axes = backend.namespace(x), reduced_axes(x.ndim, axis % x.ndim)
    low = high = x
    if mask is not None:
        low, high = (xp.where(mask, x, xp.full_like(x, limit)) for limit in (np.inf, -np.inf))
    both = xp.stack([xp.min(low, axis=axes), xp.max(high, axis=axes)])
    return backend.to_numpy(both).astype(np.float64)
