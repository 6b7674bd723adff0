"""The merge: the statistics of the whole from those of its parts."""

from __future__ import annotations

from typing import Any

from anybn.core.call import Array, Statistics
from anybn.core.formulas import divisor


def merged(xp: Any, total: int | Array, count: int | Array, mean: Array, shift: Array | None, m2: Array) -> Statistics:
    """The statistics of the whole from those of its parts (Chan, Golub & LeVeque 1979).

    ``mean``, ``shift`` (or None) and ``m2`` are ``(P, C)``, one part a row. ``count`` is ``(P, 1)`` or ``(P, C)``, 0
    for an empty part, or an int where all parts have as many values; ``total`` is its sum over the parts.

    All means are measured from that of one part. So a mean far from 0 costs no digits, and a channel that is constant
    in all parts has a variance of exactly 0. They are measured twice: the first result is rounded, and the deviations
    from it give the rest of the mean, ``shift``, and the squares.
    """
    n = divisor(xp, total, mean.dtype)
    if isinstance(count, int):
        origin = mean[0, :]
    else:
        origin = xp.max(xp.where(count > 0, mean, xp.full_like(mean, -xp.inf)), axis=0)
        origin = xp.where(xp.isfinite(origin), origin, xp.zeros_like(origin))
    rounded = origin + xp.sum(count * (mean - origin[None, :]), axis=0) / n
    deviation = mean - rounded[None, :]
    if shift is not None:
        deviation = deviation + shift
    rest = xp.sum(count * deviation, axis=0) / n
    deviation = deviation - rest[None, :]
    m2 = xp.sum(m2 + count * deviation * deviation, axis=0)
    return Statistics(total, rounded, rest, m2 / n, m2)
