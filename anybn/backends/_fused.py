"""Batch norm on NumPy arrays by compiled kernels: how an array lies in memory, its split into tasks, their merging.

Sums are taken over parts that depend on the shape alone, and merged in a fixed order, so the results do not depend on
the number of threads. A channel that fits the cache is read from memory once: its statistics and its normalization are
one task. Larger channels, and rows of channels, are read twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from anybn import _core, _threads
from anybn._core import Gradients, Spec, Statistics
from anybn.backends import _kernels
from anybn.backends._layout import alike, as_float64, delivered, destination, parameter

CACHE = 1 << 20  # bytes of a channel that a core's own cache is trusted with
TASK = 1 << 18  # bytes that are worth another thread
STRIPE = 1 << 16  # values of rows that are added up at a time
WIDE_ROW = 256  # rows of fewer values are joined, so that there is something to vectorize over


def supports(dtype: np.dtype) -> bool:
    """float32, float64, and bfloat16 as its bits; Numba has no float16 on the CPU."""
    return dtype in (np.float32, np.float64, np.uint16)


# -- splitting -------------------------------------------------------------------------------------------------


def _split(kernel: Callable[..., Any], arguments: tuple[Any, ...], count: int, nbytes: int) -> None:
    """``kernel(*arguments, i0, i1)`` for ranges that make up ``range(count)``, whose results must not depend on them.

    Two ranges for each thread: one that is held up can be helped, and every call waits for the interpreter's lock.
    """
    threads = _threads.get_num_threads()
    ranges = max(1, min(count, 2 * threads if threads > 1 else 1, nbytes // TASK))
    step = -(-count // ranges)
    _threads.run(lambda i: kernel(*arguments, i * step, min((i + 1) * step, count)), -(-count // step))


def _segments(x: np.ndarray) -> int:
    """Into how many segments each plane of ``(N, C, L)`` is cut: one, unless it is large."""
    return -(-x.shape[2] * x.itemsize // TASK)


def _sums_of_planes(
    kernel: Callable[..., None], arrays: tuple[Any, ...], origin: np.ndarray, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What a kernel sums per segment, added up per channel in the order of memory."""
    n, channels, _ = x.shape
    segments = _segments(x)
    partial = np.empty((2, n * channels * segments))
    _split(kernel, (*arrays, origin, segments, *partial), partial.shape[1], x.nbytes)
    by_channel = np.moveaxis(partial.reshape(2, n, channels, segments), 2, 1).reshape(2, channels, -1)
    s1, s2 = _core.blocked_sum(np, by_channel, (2,))
    return s1, s2


class _Rows:
    """Rows ``(R, C)``, with short ones joined to ``(R // k, k C)``; the R % k left over stay as they are."""

    def __init__(self, x: np.ndarray):
        rows, self.channels = x.shape
        self.joined = max(1, min(WIDE_ROW // self.channels, rows))
        self.main = rows - rows % self.joined

    def parts(self, *arrays: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        """The joined rows of each array, then, if there are any, those left over."""
        width = self.joined * self.channels
        parts = [tuple(a[: self.main].reshape(-1, width) for a in arrays)]
        if self.main < len(arrays[0]):
            parts.append(tuple(a[self.main :] for a in arrays))
        return parts

    def spread(self, *values: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        """Per-channel values for either part."""
        return [tuple(np.tile(v, self.joined) for v in values) if self.joined > 1 else values, values]

    def sums(
        self, kernel: Callable[..., None], arrays: tuple[np.ndarray, ...], flags: tuple[bool, ...], origin: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What a kernel sums per stripe of rows, added up per channel in the order of memory."""
        total: Any = 0.0
        for part, origins in zip(self.parts(*arrays), self.spread(origin), strict=False):
            rows, width = part[0].shape
            step = max(1, STRIPE // width)
            partial = np.empty((2, -(-rows // step), width))
            _split(kernel, (*part, *flags, *origins, step, *partial), partial.shape[1], part[0].nbytes)
            total = total + _core.blocked_sum(np, partial.reshape(2, -1, self.channels), (1,))
        s1, s2 = total
        return s1, s2


# -- the operations --------------------------------------------------------------------------------------------


def train(
    x: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    residual: np.ndarray | None,
    spec: Spec,
    out: np.ndarray | None,
) -> tuple[np.ndarray, Statistics]:
    """y and the statistics of x."""
    how, contiguous, (rest,) = alike(x, spec.axis, residual)
    wide, channels, count = x.dtype != np.float64, how.channels, how.outer * how.inner
    fits = x.nbytes <= CACHE * channels if how.inner > 1 else x.nbytes <= CACHE
    if not fits:
        statistics = batch_statistics(contiguous, spec.axis)
        return evaluate(contiguous, statistics, weight, bias, rest, spec, out), statistics
    y = destination(contiguous, out)
    x_in, y_in = how.of(contiguous), how.of(y)
    mean, shift, m2, scale = np.empty((4, channels))
    options = (x_in if rest is None else how.of(rest), rest is not None, spec.relu, wide, spec.eps)
    parameters = (parameter(weight, channels, 1.0), parameter(bias, channels, 0.0))
    arguments = (x_in, y_in, *options, *parameters, mean, shift, m2, scale)
    if how.inner > 1:
        _split(_kernels.train_planes, arguments, channels, x.nbytes)
    else:
        _kernels.train_rows(*arguments)
    return delivered(y, out), Statistics(count, mean, None if wide else shift, m2 / count, m2)


def batch_statistics(x: np.ndarray, axis: int) -> Statistics:
    """Mean and variance of every channel."""
    how, x, _ = alike(x, axis)
    x = how.of(x)
    count = how.outer * how.inner

    def sums(origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if how.inner > 1:
            return _sums_of_planes(_kernels.sum_segments, (x,), origin, x)
        return _Rows(x).sums(_kernels.sum_stripes, (x,), (), origin)

    shift = None
    with np.errstate(all="ignore"):
        origin = as_float64(x[0, :, 0] if how.inner > 1 else x[0])
        s1, s2 = sums(origin)
        mean = origin + s1 / count
        if x.dtype == np.float64:
            s1, s2 = sums(mean)
            shift = s1 / count
        m2 = s2 - s1 * (s1 / count)
        return Statistics(count, mean, shift, m2 / count, m2)


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
    how, contiguous, (rest,) = alike(x, spec.axis, residual)
    y = destination(contiguous, out)
    mean = np.array(statistics.mean)  # the state's are read-only, which Numba would compile another version for
    shift = np.zeros_like(mean) if statistics.shift is None else statistics.shift
    scale = _core.scale_of(np, statistics, weight, spec.eps)
    parameters = (mean, shift, scale, parameter(bias, how.channels, 0.0))
    arrays = (how.of(contiguous), how.of(y), how.of(contiguous if rest is None else rest))
    options = (rest is not None, spec.relu, statistics.shift is None)
    if how.inner > 1:
        segments = _segments(arrays[0])
        arguments = (*arrays, *options, *parameters, segments)
        _split(_kernels.normalize_segments, arguments, how.outer * how.channels * segments, x.nbytes)
    else:
        rows = _Rows(arrays[0])
        for part, spread in zip(rows.parts(*arrays), rows.spread(*parameters), strict=False):
            _split(_kernels.normalize_rows, (*part, *options, *spread), len(part[0]), part[0].nbytes)
    return delivered(y, out)


def gradients(
    dy: np.ndarray,
    x: np.ndarray,
    statistics: Statistics,
    weight: np.ndarray | None,
    active: np.ndarray | None,
    spec: Spec,
) -> Gradients:
    """See `anybn._core.gradients`; weight's and bias's in float64, the residual's left out."""
    how, contiguous, (dy_like, active_like) = alike(x, spec.axis, dy, active)
    assert dy_like is not None
    dx = np.empty_like(contiguous)
    mean = np.array(statistics.mean)
    shift = np.zeros_like(mean) if statistics.shift is None else statistics.shift
    rstd, scale = _core.reciprocal_std(np, statistics, spec.eps), _core.scale_of(np, statistics, weight, spec.eps)
    count = 0 if statistics.count is None else how.outer * how.inner
    masked = active_like is not None
    flags = (masked, statistics.shift is None)
    arrays = (how.of(dy_like), how.of(contiguous), how.of(dy_like if active_like is None else active_like))
    dx_in = how.of(dx)
    if how.inner > 1 and x.nbytes <= CACHE * how.channels:
        dweight, dbias, k1, k2 = np.empty((4, how.channels))
        values = (mean, shift, rstd, scale, dweight, dbias, k1, k2)
        _split(_kernels.backward_planes, (*arrays, *flags, dx_in, count, *values), how.channels, x.nbytes)
        return Gradients(dx, dweight, dbias, None)

    rows = None if how.inner > 1 else _Rows(arrays[1])
    if rows is None:
        s1, s2 = _sums_of_planes(_kernels.gradient_sum_segments, (*arrays, masked), mean, arrays[1])
    else:
        s1, s2 = rows.sums(_kernels.gradient_sum_stripes, arrays, (masked,), mean)
    dbias, dweight = s1, (s2 - shift * s1) * rstd
    k1, k2 = (dbias / count, dweight / count) if count else np.zeros((2, how.channels))
    parameters = (mean, shift, rstd, k1, k2, scale)
    if rows is None:
        segments = _segments(arrays[1])
        everything = (*arrays, *flags, dx_in, *parameters, segments)
        _split(_kernels.gradient_segments, everything, how.outer * how.channels * segments, x.nbytes)
    else:
        for (*part, out), spread in zip(rows.parts(*arrays, dx_in), rows.spread(*parameters), strict=False):
            _split(_kernels.gradient_rows, (*part, *flags, out, *spread), len(out), out.nbytes)
    return Gradients(dx, dweight, dbias, None)


def updated_running_statistics(
    running_mean: np.ndarray,
    running_var: np.ndarray,
    statistics: Statistics,
    momentum: float,
    ddof: int,
    propagate: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """See `anybn._core.updated_running_statistics`; the count is an int."""
    running_mean, running_var = np.array(running_mean), np.array(running_var)
    mean, shift = statistics.mean, statistics.shift
    shifts = (mean, False) if shift is None else (shift, True)
    _kernels.update_running(
        mean, *shifts, statistics.m2, statistics.count, ddof, momentum, propagate, running_mean, running_var
    )
    return running_mean, running_var
