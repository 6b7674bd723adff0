"""Batch norm on NumPy arrays by compiled kernels: how an array lies in memory, its split into tasks, their merging.

The split depends on the shape alone and partial sums are merged in a fixed order, so the results do not depend on the
number of threads. A channel that fits the cache is read from memory once: its statistics and its normalization are one
task. Larger channels, and rows of channels, are read twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from anybn import _core, _threads
from anybn._core import Gradients, Spec, Statistics
from anybn.backends import _kernels

CACHE = 1 << 20  # bytes of a channel that a core's own cache is trusted with
TASK = 1 << 18  # bytes that are worth another thread
WIDE_ROW = 256  # rows of fewer values are joined, so that there is something to vectorize over


class Lying(NamedTuple):
    """An array as it lies in memory."""

    order: tuple[int, ...]
    """the axes from the slowest to the fastest, and in this order, the shape as"""
    outer: int
    channels: int
    inner: int

    def of(self, a: np.ndarray) -> np.ndarray:
        """a, which lies the same way, as ``(outer, channels, inner)``, or ``(outer, channels)`` where inner is 1."""
        shape = (self.outer, self.channels, self.inner) if self.inner > 1 else (self.outer, self.channels)
        return a.transpose(self.order).reshape(shape)


def supports(dtype: np.dtype) -> bool:
    """float32, float64, and bfloat16 as its bits; Numba has no float16 on the CPU."""
    return dtype in (np.float32, np.float64, np.uint16)


def lying(x: np.ndarray, axis: int) -> Lying | None:
    """How x lies in memory; None if it has gaps, overlaps or runs backwards."""
    if x.flags.c_contiguous:
        order = tuple(range(x.ndim))
    else:
        order = tuple(sorted(range(x.ndim), key=lambda i: (-x.strides[i], i)))
        if not x.transpose(order).flags.c_contiguous:
            return None
    p = order.index(axis)
    outer = math.prod(x.shape[i] for i in order[:p])
    inner = math.prod(x.shape[i] for i in order[p + 1 :])
    if x.shape[axis] == 1:
        return Lying(order, 1, 1, outer * inner)
    return Lying(order, outer, x.shape[axis], inner)


class _Arrays(NamedTuple):
    """x, and others that were made to lie like it."""

    lying: Lying
    x: np.ndarray
    others: tuple[np.ndarray | None, ...]


def _alike(x: np.ndarray, axis: int, *others: np.ndarray | None) -> _Arrays:
    found = lying(x, axis)
    if found is None:
        x = x.copy(order="K")
        found = lying(x, axis)
        assert found is not None

    def like_x(a: np.ndarray | None) -> np.ndarray | None:
        if a is None or a.strides == x.strides:
            return a
        copy = np.empty_like(x, dtype=a.dtype)
        copy[...] = a
        return copy

    return _Arrays(found, x, tuple(like_x(a) for a in others))


def _channels(values: np.ndarray | None, count: int, default: float) -> np.ndarray:
    return np.full(count, default) if values is None else values.astype(np.float64)


# -- splitting -------------------------------------------------------------------------------------------------


def _ranges(size: int, step: int) -> list[tuple[int, int]]:
    return [(i, min(i + step, size)) for i in range(0, size, step)]


def _each(task: Callable[..., Any], parts: Sequence[tuple[int, ...]]) -> None:
    _threads.run(lambda i: task(*parts[i]), len(parts))


def _channel_tasks(x: np.ndarray) -> Sequence[tuple[int, ...]]:
    """Ranges of whole channels."""
    return _ranges(x.shape[1], max(1, TASK * x.shape[1] // x.nbytes))


def _boxes(x: np.ndarray) -> list[tuple[int, ...]]:
    """``(n0, n1, c0, c1, l0, l1)``: parts in the order of memory."""
    n, c, length = x.shape
    values = TASK // x.itemsize
    if length >= values:
        return [(i, i + 1, j, j + 1, *ls) for i in range(n) for j in range(c) for ls in _ranges(length, values)]
    if c * length >= values:
        return [(i, i + 1, *cs, 0, length) for i in range(n) for cs in _ranges(c, max(1, values // length))]
    return [(*ns, 0, c, 0, length) for ns in _ranges(n, max(1, values // (c * length)))]


def _pieces(x: np.ndarray) -> list[tuple[int, ...]]:
    """``(n0, n1, l0, l1)``: parts of one channel."""
    n, _, length = x.shape
    values = TASK // x.itemsize
    if length >= values:
        return [(i, i + 1, *ls) for i in range(n) for ls in _ranges(length, values)]
    return [(*ns, 0, length) for ns in _ranges(n, values // length)]


def _sums_of_planes(x: np.ndarray, sums: Callable[..., tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """``sums(c, n0, n1, l0, l1)`` of every channel, over its pieces."""
    pieces, channels = _pieces(x), x.shape[1]
    partial = np.empty((2, channels, len(pieces)))

    def task(c: int, k: int) -> None:
        partial[:, c, k] = sums(c, *pieces[k])

    _each(task, [(c, k) for c in range(channels) for k in range(len(pieces))])
    s1, s2 = _core.blocked_sum(np, partial, (2,))
    return s1, s2


class _Rows:
    """Rows ``(R, C)``, with short ones joined to ``(R // k, k C)``; the R % k left over stay as they are."""

    def __init__(self, x: np.ndarray):
        rows, self.channels = x.shape
        self.joined = max(1, min(WIDE_ROW // self.channels, rows))
        self.main = rows - rows % self.joined

    def parts(self, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return a[: self.main].reshape(-1, self.joined * self.channels), a[self.main :]

    def spread(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per-channel values for either part."""
        return np.tile(values, self.joined), values

    def tasks(self, x: np.ndarray) -> Sequence[tuple[int, ...]]:
        """``(part, r0, r1)``."""
        main, rest = self.parts(x)
        step = max(1, TASK // (main.shape[1] * x.itemsize))
        return [(0, *rows) for rows in _ranges(len(main), step)] + ([(1, 0, len(rest))] if len(rest) else [])

    def sums(self, x: np.ndarray, kernel: Callable[..., None]) -> tuple[np.ndarray, np.ndarray]:
        """``kernel(part, r0, r1, s1, s2)`` over all rows, added up per channel."""
        tasks = self.tasks(x)
        partial = np.zeros((2, len(tasks), self.joined * self.channels))

        def task(part: int, r0: int, r1: int, k: int) -> None:
            width = self.joined * self.channels if part == 0 else self.channels
            kernel(part, r0, r1, partial[0, k, :width], partial[1, k, :width])

        _each(task, [(*rows, k) for k, rows in enumerate(tasks)])
        by_row = partial.reshape(2, len(tasks) * self.joined, self.channels)
        s1, s2 = _core.blocked_sum(np, by_row, (1,))
        return s1, s2


# -- the three operations --------------------------------------------------------------------------------------


def train(
    x: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    residual: np.ndarray | None,
    spec: Spec,
    out: np.ndarray | None,
) -> tuple[np.ndarray, Statistics]:
    """y and the statistics of x."""
    how, contiguous, (rest,) = _alike(x, spec.axis, residual)
    y = out if out is not None and out.strides == contiguous.strides else np.empty_like(contiguous)
    channels = how.channels
    scale_by, offset = _channels(weight, channels, 1.0), _channels(bias, channels, 0.0)
    wide = x.dtype != np.float64
    mean, shift, m2, scale = np.empty((4, channels))
    x_in, y_in = how.of(contiguous), how.of(y)
    options = (x_in if rest is None else how.of(rest), rest is not None, spec.relu)
    count = how.outer * how.inner
    if how.inner > 1 and x.nbytes <= CACHE * channels:
        arguments = (x_in, y_in, *options, wide, spec.eps, scale_by, offset, mean, shift, m2, scale)
        _each(lambda c0, c1: _kernels.train_planes(*arguments, c0, c1), _channel_tasks(x_in))
    elif how.inner == 1 and x.nbytes <= CACHE:
        _kernels.train_rows(x_in, y_in, *options, wide, spec.eps, scale_by, offset, mean, shift, m2, scale)
    else:
        statistics = batch_statistics(contiguous, spec.axis)
        return evaluate(contiguous, statistics, weight, bias, rest, spec, y if out is None else out), statistics
    if out is not None and y is not out:
        out[...] = y
    return y if out is None else out, Statistics(count, mean, None if wide else shift, m2 / count, m2)


def batch_statistics(x: np.ndarray, axis: int) -> Statistics:
    """Mean and variance of every channel."""
    how, x, _ = _alike(x, axis)
    x = how.of(x)
    count = how.outer * how.inner
    if how.inner > 1:

        def sums(origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return _sums_of_planes(x, lambda c, *piece: _kernels.plane_sums(x, c, *piece, origin[c]))
    else:
        rows = _Rows(x)
        parts = rows.parts(x)

        def sums(origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            origins = rows.spread(origin)
            return rows.sums(x, lambda part, r0, r1, *s: _kernels.row_sums(parts[part], r0, r1, origins[part], *s))

    first = x[0, :, 0] if how.inner > 1 else x[0]
    origin = as_float64(first)
    shift = None
    with np.errstate(all="ignore"):
        s1, s2 = sums(origin)
        mean = origin + s1 / count
        if x.dtype == np.float64:
            s1, s2 = sums(mean)
            shift = s1 / count
        m2 = s2 - s1 * (s1 / count)
        return Statistics(count, mean, shift, m2 / count, m2)


def as_float64(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


def evaluate(
    x: np.ndarray,
    statistics: Statistics,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    residual: np.ndarray | None,
    spec: Spec,
    out: np.ndarray | None,
) -> np.ndarray:
    """y with given statistics."""
    how, contiguous, (rest,) = _alike(x, spec.axis, residual)
    y = out if out is not None and out.strides == contiguous.strides else np.empty_like(contiguous)
    mean = np.array(statistics.mean)  # the state's are read-only, which Numba would compile another version for
    scale = _core.scale_of(np, statistics, weight, spec.eps)
    shift = np.zeros_like(mean) if statistics.shift is None else statistics.shift
    channels = (mean, shift, scale, _channels(bias, how.channels, 0.0))
    x_in, y_in, rest_in = how.of(contiguous), how.of(y), how.of(contiguous if rest is None else rest)
    options = (rest is not None, spec.relu)
    if how.inner > 1:
        _each(lambda *box: _kernels.normalize_planes(x_in, y_in, rest_in, *options, *channels, *box), _boxes(x_in))
    else:
        rows = _Rows(x_in)
        arrays = [*zip(rows.parts(x_in), rows.parts(y_in), rows.parts(rest_in), strict=True)]
        values = [*zip(*map(rows.spread, channels), strict=True)]
        _each(
            lambda part, r0, r1: _kernels.normalize_rows(*arrays[part], *options, *values[part], r0, r1),
            rows.tasks(x_in),
        )
    if out is not None and y is not out:
        out[...] = y
    return y if out is None else out


def gradients(
    dy: np.ndarray,
    x: np.ndarray,
    statistics: Statistics,
    weight: np.ndarray | None,
    active: np.ndarray | None,
    spec: Spec,
) -> Gradients:
    """See `anybn._core.gradients`; weight's and bias's in float64, the residual's left out."""
    how, contiguous, (dy_like, active_like) = _alike(x, spec.axis, dy, active)
    assert dy_like is not None
    dx = np.empty_like(contiguous)
    mean = np.array(statistics.mean)
    shift = np.zeros_like(mean) if statistics.shift is None else statistics.shift
    rstd, scale = _core.reciprocal_std(np, statistics, spec.eps), _core.scale_of(np, statistics, weight, spec.eps)
    count = 0 if statistics.count is None else how.outer * how.inner
    x_in, dy_in, dx_in = how.of(contiguous), how.of(dy_like), how.of(dx)
    active_in, masked = how.of(dy_like if active_like is None else active_like), active_like is not None
    if how.inner > 1 and x.nbytes <= CACHE * how.channels:
        dweight, dbias, k1, k2 = np.empty((4, how.channels))
        arguments = (dy_in, x_in, active_in, masked, dx_in, count, mean, shift, rstd, scale, dweight, dbias, k1, k2)
        _each(lambda c0, c1: _kernels.backward_planes(*arguments, c0, c1), _channel_tasks(x_in))
        return Gradients(dx, dweight, dbias, None)

    if how.inner > 1:
        s1, s2 = _sums_of_planes(
            x_in,
            lambda c, *piece: _kernels.plane_gradient_sums(dy_in, x_in, active_in, masked, c, *piece, mean[c]),
        )
    else:
        rows = _Rows(x_in)
        arrays = [*zip(rows.parts(dy_in), rows.parts(x_in), rows.parts(active_in), strict=True)]
        origins = rows.spread(mean)
        s1, s2 = rows.sums(
            x_in,
            lambda part, r0, r1, *s: _kernels.row_gradient_sums(*arrays[part], masked, r0, r1, origins[part], *s),
        )
    dbias, dweight = s1, (s2 - shift * s1) * rstd
    k1, k2 = (dbias / count, dweight / count) if count else (np.zeros_like(mean), np.zeros_like(mean))
    channels = (mean, shift, rstd, k1, k2, scale)
    if how.inner > 1:
        _each(
            lambda *box: _kernels.gradient_planes(dy_in, x_in, active_in, masked, dx_in, *channels, *box),
            _boxes(x_in),
        )
    else:
        outs, values = rows.parts(dx_in), [*zip(*map(rows.spread, channels), strict=True)]
        _each(
            lambda part, r0, r1: _kernels.gradient_rows(*arrays[part], masked, outs[part], *values[part], r0, r1),
            rows.tasks(x_in),
        )
    return Gradients(dx, dweight, dbias, None)
