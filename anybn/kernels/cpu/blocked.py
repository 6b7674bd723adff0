"""What `_fused` does, in NumPy alone: for where Numba is not installed.

Work goes on in blocks that fit the cache, in float64, on the same threads: NumPy lets go of the interpreter's lock
inside each operation. Channels first, a block is some whole channels, which are finished before the next; in rows, it
is some rows, and statistics come before normalization.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from anybn.core import formulas as _core
from anybn.core.call import Call, Gradients, Statistics, Update
from anybn.core.formulas import Over
from anybn.kernels.cpu import threads as _threads
from anybn.kernels.cpu.plan import NUMPY_BLOCK
from anybn.kernels.layout import alike, as_float64, delivered, destination, parameter

row_kernels = None  # the core does it: see `Backend.normalize_rows`


def supports(dtype: np.dtype) -> bool:
    return dtype in (np.float32, np.float64)


def _blocks(x: np.ndarray) -> list[tuple[slice, ...]]:
    """``x[:, c0:c1]`` of planes ``(N, C, L)``, ``x[r0:r1]`` of rows ``(R, C)``."""
    if x.ndim == 3:
        step = max(1, NUMPY_BLOCK // (x.shape[0] * x.shape[2]))
        return [(slice(None), slice(c, c + step)) for c in range(0, x.shape[1], step)]
    step = max(1, NUMPY_BLOCK // x.shape[1])
    return [(slice(r, r + step), slice(None)) for r in range(0, x.shape[0], step)]


def _each(task: Callable[[int, tuple[slice, ...]], None], blocks: list[tuple[slice, ...]]) -> None:
    _threads.run(lambda i: task(i, blocks[i]), len(blocks))


def _along(values: np.ndarray, block: tuple[slice, ...], ndim: int) -> np.ndarray:
    """The block's channels of per-channel values, to broadcast against it."""
    return values[block[1], None] if ndim == 3 else values[block[1]]


def _sum(a: np.ndarray, precise: bool) -> np.ndarray:
    axes = (0, 2) if a.ndim == 3 else (0,)
    return _core.blocked_sum(np, a, axes) if precise else a.sum(axes)


def _deviations(x: np.ndarray, statistics: Statistics, block: tuple[slice, ...]) -> np.ndarray:
    d = np.subtract(x[block], _along(statistics.mean, block, x.ndim), dtype=np.float64)
    if statistics.shift is not None:
        d -= _along(statistics.shift, block, x.ndim)
    return d


def _sums(x: np.ndarray, block: tuple[slice, ...], origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``sum(x - origin)`` and ``sum((x - origin)**2)`` of a block."""
    d = np.subtract(x[block], _along(origin, block, x.ndim), dtype=np.float64)
    precise = x.dtype == np.float64
    s1 = _sum(d, precise)
    d *= d
    return s1, _sum(d, precise)


def batch_statistics(call: Call) -> Statistics:
    """Mean and variance of every channel."""
    how, x, _ = alike(call.x, call.spec.axis)
    x = how.of(x)
    blocks, channels, count = _blocks(x), x.shape[1], how.outer * how.inner

    def sums(origin: np.ndarray) -> Any:
        partial = np.zeros((2, len(blocks) if x.ndim == 2 else 1, channels))

        def task(i: int, block: tuple[slice, ...]) -> None:
            with np.errstate(all="ignore"):
                partial[:, i if x.ndim == 2 else 0, block[1]] = _sums(x, block, origin)

        _each(task, blocks)
        return _core.blocked_sum(np, partial, (1,))

    with np.errstate(all="ignore"):
        return _statistics(x, count, sums)


def _statistics(x: np.ndarray, count: int, sums: Callable[[np.ndarray], Any]) -> Statistics:
    origin = as_float64(x[0, :, 0] if x.ndim == 3 else x[0])
    return _core.statistics_of_sums(sums, origin, count, x.dtype != np.float64)


def train(call: Call) -> tuple[np.ndarray, Statistics]:
    """y and the statistics of x."""
    x, spec, weight, bias, residual, _, _, _, out = call
    how, contiguous, (rest,) = alike(x, spec.axis, residual)
    if how.inner == 1:
        call = Call(contiguous, spec, weight, bias, rest, None, None, None, out)
        statistics = batch_statistics(call)
        return evaluate(call, statistics), statistics
    y = destination(contiguous, out)
    x_in, y_in, rest_in = how.of(contiguous), how.of(y), None if rest is None else how.of(rest)
    mean, shift, var, m2 = np.empty((4, how.channels))
    scales, offset = parameter(weight, how.channels, 1.0), parameter(bias, how.channels, 0.0)
    everything = (slice(None), slice(None))
    count, wide = how.outer * how.inner, x.dtype != np.float64

    def task(_: int, block: tuple[slice, ...]) -> None:
        c, channels = block[1], x_in[block]
        with np.errstate(all="ignore"):
            own = _statistics(channels, count, lambda origin: _sums(channels, everything, origin))
            mean[c], var[c], m2[c] = own.mean, own.var, own.m2
            if own.shift is not None:
                shift[c] = own.shift
            rest_of = None if rest_in is None else rest_in[block]
            scale = _core.scale_of(np, own, scales[c], spec.eps)
            _normalize(channels, y_in[block], rest_of, own, scale, offset[c], everything, spec.relu)

    _each(task, _blocks(x_in))
    return delivered(y, out), Statistics(count, mean, None if wide else shift, var, m2)


def evaluate(call: Call, statistics: Statistics) -> np.ndarray:
    """y with given statistics."""
    x, spec, weight, bias, residual, _, _, _, out = call
    how, contiguous, (rest,) = alike(x, spec.axis, residual)
    y = destination(contiguous, out)
    x_in, y_in, rest_in = how.of(contiguous), how.of(y), None if rest is None else how.of(rest)
    offset = parameter(bias, how.channels, 0.0)
    with np.errstate(all="ignore"):
        scale = _core.scale_of(np, statistics, weight, spec.eps)

    def task(_: int, block: tuple[slice, ...]) -> None:
        with np.errstate(all="ignore"):
            _normalize(x_in, y_in, rest_in, statistics, scale, offset, block, spec.relu)

    _each(task, _blocks(x_in))
    return delivered(y, out)


def _normalize(
    x: np.ndarray,
    y: np.ndarray,
    residual: np.ndarray | None,
    statistics: Statistics,
    scale: np.ndarray,
    offset: np.ndarray,
    block: tuple[slice, ...],
    relu: bool,
) -> None:
    v = _deviations(x, statistics, block)
    v *= _along(scale, block, x.ndim)
    v += _along(offset, block, x.ndim)
    if residual is not None:
        v += residual[block]
    if relu:
        np.copyto(v, 0.0, where=v <= 0)
    y[block] = v


def gradients(
    call: Call, statistics: Statistics, dy: np.ndarray, active: np.ndarray | None, over: Over | None = None
) -> Gradients:
    """See `anybn.core.formulas.gradients`; weight's and bias's in float64, the residual's left out."""
    x, spec, weight = call[:3]
    how, contiguous, (dy_like, active_like) = alike(x, spec.axis, dy, active)
    assert dy_like is not None
    dx = np.empty_like(contiguous)
    x_in, dy_in, dx_in = how.of(contiguous), how.of(dy_like), how.of(dx)
    active_in = None if active_like is None else how.of(active_like)
    with np.errstate(all="ignore"):
        rstd, scale = _core.reciprocal_std(np, statistics, spec.eps), _core.scale_of(np, statistics, weight, spec.eps)
    blocks, precise = _blocks(x_in), x.dtype == np.float64
    partial = np.zeros((2, len(blocks) if x_in.ndim == 2 else 1, how.channels))

    def both(block: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray]:
        """dy where active, and xhat."""
        g: Any = dy_in[block].astype(np.float64)
        if active_in is not None:
            np.copyto(g, 0.0, where=~active_in[block])
        return g, _deviations(x_in, statistics, block) * _along(rstd, block, x_in.ndim)

    def sums(i: int, block: tuple[slice, ...]) -> None:
        with np.errstate(all="ignore"):
            g, xhat = both(block)
            partial[:, i if x_in.ndim == 2 else 0, block[1]] = _sum(g, precise), _sum(g * xhat, precise)

    _each(sums, blocks)
    dbias, dweight = _core.blocked_sum(np, partial, (1,))
    count: Any = how.outer * how.inner if over is None else statistics.count
    sum_dy, sum_dy_xhat = (dbias, dweight) if over is None else over(dbias, dweight)

    def task(_: int, block: tuple[slice, ...]) -> None:
        with np.errstate(all="ignore"):
            g, xhat = both(block)
            if statistics.count is not None:
                g -= _along(sum_dy / count, block, x_in.ndim)
                xhat *= _along(sum_dy_xhat / count, block, x_in.ndim)
                g -= xhat
            g *= _along(scale, block, x_in.ndim)
            dx_in[block] = g

    _each(task, blocks)
    return Gradients(dx, dweight, dbias, None)


def updated_running_statistics(update: Update, statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """See `anybn.core.formulas.updated_running_statistics`."""
    with np.errstate(all="ignore"):
        return _core.updated_running_statistics(np, update, statistics)
