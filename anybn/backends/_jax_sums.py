"""Sums and statistics of JAX arrays where no dtype is wider: added pairwise, and x read once.

Arrays are seen as ``(N, before, C, after)``, by what lies before and after the channels. The first axis stays as it is,
since it may be shared out over devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax

from anybn.core import formulas
from anybn.core.call import Array, Statistics

# XLA makes one loop of sums of slices and of what they are slices of, unless that is used more than 15 times there
# (kAllowedCodeDuplication in its sources). So the first loop adds 8 parts of an axis, and the next ones 16, which keeps
# them apart: values are computed once, and an eighth of them reach memory. What has 32 parts left is added at once.
_FIRST, _NEXT, _LAST = 8, 16, 32

#: The part of an axis that is looked at for an origin: one in so many.
_SAMPLE = 8


def on_four_axes(a: Array, axis: int) -> Array:
    """``(N, before, C, after)``."""
    first = a.shape[0] if axis else 1
    return jnp.reshape(a, (first, math.prod(a.shape[1:axis]), a.shape[axis], math.prod(a.shape[axis + 1 :])))


def channel_sums(terms: Callable[..., Array], *arrays: Array) -> Array:
    """The sums over each channel of ``terms(*arrays)``, which it computes part by part: ``(1, 1, C, 1)``."""
    for axis in (3, 1, 0):
        if arrays[0].shape[axis] > 1:
            arrays, terms = (_sums_along(axis, terms, *arrays),), lambda part: part
    return terms(*arrays)


def _sums_along(axis: int, terms: Callable[..., Array], *arrays: Array) -> Array:
    size = arrays[0].shape[axis]
    parts, length = _division(size, axis == 0)
    total, used = _pairwise([terms(*part) for part in _cut(axis, parts, length, *arrays)]), parts * length
    while length > 1:
        parts = _NEXT if length > _LAST else length
        length //= parts
        total = _pairwise([part for (part,) in _cut(axis, parts, length, total)])
    if used == size:
        return total
    return total + _sums_along(axis, terms, *(lax.slice_in_dim(a, used, size, axis=axis) for a in arrays))


def _division(size: int, is_last: bool) -> tuple[int, int]:
    """Into how many parts the first loop divides an axis, and their length, a few more may be left behind them."""
    if size <= _LAST:
        return size, 1
    if is_last and size <= _NEXT**2:
        return size // _NEXT, _NEXT
    divisions = []
    for parts in (_FIRST, _FIRST - 1):  # 7 divides 7 * 7, 14 * 14, ..., which nets for images have
        length = size // parts
        rounds = max(0, math.ceil(math.log(length / _LAST, _NEXT)))
        divisions.append((parts, length - length % _NEXT**rounds))
    return min(divisions, key=lambda division: size - math.prod(division))


def _cut(axis: int, parts: int, length: int, *arrays: Array) -> list[tuple[Array, ...]]:
    return [
        tuple(lax.slice_in_dim(a, i, i + length, axis=axis) for a in arrays) for i in range(0, parts * length, length)
    ]


def _pairwise(parts: list[Array]) -> Array:
    while len(parts) > 1:
        odd = parts[len(parts) // 2 * 2 :]
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + odd
    return parts[0]


def batch_statistics(x: Array, axis: int, working: np.dtype, count: Array) -> Statistics:
    """`formulas.batch_statistics` from ``sum(d)`` and ``sum(d * d)`` over ``d = (x - origin) * scale``.

    ``sum(d * d) - sum(d)**2 / count`` loses as many digits as the origin is far from the mean, in standard deviations.
    It is the mean of an eighth of the values, which is less than 3 of them off whatever x holds (Cauchy & Schwarz), and
    0.01 where they are like the others.
    """
    x = on_four_axes(x, axis)
    origin, scale, unit = _origin_and_scale(x, working)

    def terms(part: Array) -> Array:
        d = (part.astype(working) - origin) * scale
        return lax.complex(d, d * d)  # one array, for one loop over x

    sums, n = jnp.reshape(channel_sums(terms, x), (-1,)), formulas.divisor(jnp, count, working)
    origin, scale, unit = (jnp.reshape(a, (-1,)) for a in (origin, scale, unit))
    offset = sums.real / n
    scaled_m2 = sums.imag - n * (offset * offset)
    scaled_var, offset = scaled_m2 / n, offset * unit
    mean = origin + offset
    kept = mean - origin  # Knuth's TwoSum: mean + shift is origin + offset
    shift = (origin - (mean - kept)) + (offset - kept)
    var, m2 = (a * unit * unit for a in (scaled_var, scaled_m2))
    return Statistics(count, _once(mean), _once(shift), var, m2, scale, scaled_var)


def _origin_and_scale(x: Array, working: np.dtype) -> tuple[Array, Array, Array]:
    """For each channel: what to subtract, a power of two by which squares stay within the range, and its inverse.

    The origin is a value of the channel plus a multiple of a power of two near half the standard deviation. So a
    constant channel has deviations of exactly 0, and small integers have small integers.
    """
    start = _median_of_three(*(_value_of_each_channel(x, i).astype(working) for i in range(3)))
    sample = _every_eighth(x)
    values = sample.size // sample.shape[2]
    weight = 2.0 ** -math.ceil(math.log2(values))  # so that no sum is larger than its largest term

    def terms(part: Array) -> Array:
        d = part.astype(working) - start
        return lax.complex(d * weight, d * weight * d)

    sums = channel_sums(terms, sample)
    mean, square = (_once(part / (values * weight)) for part in (sums.real, sums.imag))
    variance = square - mean * mean
    info = jnp.finfo(working)

    def power(exponent: int) -> float:
        """Of two: that of float32, and the like of float64."""
        return 2.0 ** (exponent * info.maxexp // 128)

    is_large = square > power(88)
    is_small = (square < power(-88)) & ((square > 0) | (mean != 0))
    is_plain = (variance > 0) & ~is_large & ~is_small
    otherwise = jnp.where(is_large, power(44), jnp.where(is_small, power(-100), power(-40)))
    step = lax.reduce_precision(jnp.sqrt(jnp.where(is_plain, variance, 1.0)) / 2, info.bits - info.nmant - 1, 0)
    step = _once(jnp.where(is_plain, step, otherwise))
    origin = start + jnp.round(mean / step) * step
    scale, unit = (
        jnp.where(step >= power(44), large, jnp.where(step < power(-64), small, 1.0)).astype(working)
        for large, small in ((power(-76), power(40)), (power(76), power(-40)))
    )
    return _once(jnp.where(jnp.isfinite(origin), origin, 0)), _once(scale), _once(unit)


def _once(a: Array) -> Array:
    """a, for XLA to compute once for each channel, and not again for each value that it is used with.

    It does so with what is expensive, as divisions are, by a number that it cannot see.
    """
    return a / lax.optimization_barrier(jnp.ones_like(a))


def _value_of_each_channel(x: Array, i: int) -> Array:
    """The first, the middle or the last one."""
    first, before, after = ((x.shape[axis] - 1) * i // 2 for axis in (0, 1, 3))
    rows = x[:, before : before + 1, :, after : after + 1]  # of each device, if the first axis is shared out
    return rows[first : first + 1]


def _median_of_three(a: Array, b: Array, c: Array) -> Array:
    return jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))


def _every_eighth(x: Array) -> Array:
    """Of an axis, so that what is alike in x is not all that is seen."""
    axis = 1 if x.shape[1] >= x.shape[3] else 3
    axis = axis if x.shape[axis] >= 2 * _SAMPLE else 0
    size = x.shape[axis]
    stride = min(_SAMPLE, max(1, size // _SAMPLE))
    return lax.slice_in_dim(x, stride // 2, size, stride=stride, axis=axis)
