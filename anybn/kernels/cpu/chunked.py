"""What `operations` does, in NumPy alone: for masks that it has no kernels for, and where Numba is not installed.

Work goes on in blocks that fit the cache, in float64, on the same threads: NumPy lets go of the interpreter's lock
inside each operation. Channels first, a block is some whole channels, which are finished before the next; in rows, it
is some rows, and statistics come before normalization. 16-bit numbers come as their bits, as in `values`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from anybn.core import formulas
from anybn.core.call import Call, Gradients, Statistics, Update
from anybn.core.formulas import Over
from anybn.kernels.cpu import threads
from anybn.kernels.cpu.plan import BLOCK
from anybn.kernels.layout import as_float64, delivered, destination, match_layouts, parameter

row_kernels = None  # the core does it: see `Backend.normalize_rows`

#: Which outer positions and which channels of `_Arrays`.
Block = tuple[slice, slice]

_quiet = np.errstate(all="ignore")  # decorates what works with values that may be NaN or infinite


def supports(dtype: np.dtype) -> bool:
    return dtype in (np.float32, np.float64, np.uint16, np.int16)


def takes(_: Call) -> bool:
    """Any mask."""
    return True


def evaluate_at_once(*_: Any) -> None:
    """Nothing: the checks do not count here."""


# -- arrays in blocks ------------------------------------------------------------------------------------------


class _Arrays:
    """x, and others of its shape in its layout: planes ``(N, C, L)``, or rows ``(R, C)``.

    Functions of a block take and give the values of its channels alone.
    """

    def __init__(self, call: Call, *others: np.ndarray | None):
        axis = call.spec.axis
        layout, self.dense, matched = match_layouts(call.x, axis, *others)
        self.reshape, self.channels = layout.reshape, layout.channels
        self.x = layout.reshape(self.dense)
        self.others = [a if a is None else layout.reshape(a) for a in matched]
        self.count: Any = layout.outer * layout.inner
        self.hidden: np.ndarray | None = None
        """where the mask is False: laid out like x, with one channel if all have the same"""
        if call.mask is not None:
            channels = call.mask.shape[axis]
            shape = (*call.x.shape[:axis], channels, *call.x.shape[axis + 1 :])
            mask = call.mask if call.mask.shape == shape else np.broadcast_to(call.mask, shape)
            hidden = ~mask.transpose(layout.order)
            self.hidden = hidden.reshape((layout.outer, channels, layout.inner)[: self.x.ndim])
            hiding = np.count_nonzero(self.hidden, self._summed_axes if channels > 1 else None)
            self.count = self.count - np.int64(hiding)

    @property
    def _summed_axes(self) -> tuple[int, ...]:
        return (0, 2) if self.x.ndim == 3 else (0,)

    def blocks(self, whole: bool) -> list[Block]:
        """Of planes with whole channels, ``x[:, c0:c1]``; else in the order of memory, ``x[r0:r1]``, or less."""
        outer, channels = self.x.shape[:2]
        inner = self.x.size // (outer * channels)
        if self.x.ndim == 3 and whole:
            rows, step = outer, max(1, BLOCK // (outer * inner))
        else:
            rows = max(1, BLOCK // (channels * inner))
            step = channels if rows > 1 or self.x.ndim == 2 else max(1, BLOCK // inner)
        return [
            (slice(r, r + rows), slice(c, c + step)) for r in range(0, outer, rows) for c in range(0, channels, step)
        ]

    def sums(self, sums_of: Callable[[Block], tuple[np.ndarray, np.ndarray]]) -> Any:
        """Two sums per channel over all blocks."""
        blocks, rows = self.blocks(whole=True), self.x.ndim == 2
        if len(blocks) == 1:
            return sums_of(blocks[0])
        partial = np.zeros((2, len(blocks) if rows else 1, self.channels))

        def task(i: int) -> None:
            partial[:, i if rows else 0, blocks[i][1]] = sums_of(blocks[i])

        _run(task, len(blocks))
        return formulas.blocked_sum(np, partial, (1,))

    def along(self, values: np.ndarray) -> np.ndarray:
        """Values of channels, to broadcast against a block of them."""
        return values[:, None] if self.x.ndim == 3 else values

    def sum(self, a: np.ndarray) -> np.ndarray:
        """Per channel of a block. Sums of float64 values need more care, since their terms have as many digits."""
        axes = self._summed_axes
        return formulas.blocked_sum(np, a, axes) if self.x.dtype == np.float64 else a.sum(axes)

    def minus(self, block: Block, values: np.ndarray) -> np.ndarray:
        x = self.x[block]
        if x.dtype.itemsize == 2:
            x = as_float64(x)
        return np.subtract(x, self.along(values), dtype=np.float64)

    def deviations(self, block: Block, mean: np.ndarray, shift: np.ndarray | None) -> np.ndarray:
        d = self.minus(block, mean)
        if shift is not None:
            d -= self.along(shift)
        return d

    def shown(self, block: Block, a: np.ndarray) -> np.ndarray:
        """a, with 0 where it is hidden, NaN included. ``np.copyto`` takes up to three times as long."""
        if self.hidden is None:
            return a
        return np.where(self.hidden[block[0]] if self.hidden.shape[1] == 1 else self.hidden[block], 0.0, a)

    def first(self, block: Block) -> np.ndarray:
        """A value of each channel, which is not hidden; 0 where all are."""
        x, hidden = self.x[block], self.hidden
        if hidden is None:
            return as_float64(x[0, :, 0] if x.ndim == 3 else x[0])
        inner = x.shape[2] if x.ndim == 3 else 1
        if hidden.shape[1] == 1:
            at: Any = hidden.argmin()
            values = x[at // inner, :, at % inner] if x.ndim == 3 else x[at]
            return np.zeros(len(values)) if hidden.flat[at] else as_float64(values)
        hidden = np.moveaxis(hidden[block], 1, 0).reshape(x.shape[1], -1)
        at, channels = hidden.argmin(1), np.arange(x.shape[1])
        values = x[at // inner, channels, at % inner] if x.ndim == 3 else x[at, channels]
        return np.where(hidden[channels, at], 0.0, as_float64(values))

    def statistics(self, channels: slice, sums: Callable[[np.ndarray], Any]) -> Statistics:
        """Of some channels, by their sums of deviations from an origin, and of the squares of these."""
        count, n = self.count, self.count
        if self.hidden is not None:
            n = np.maximum(count if count.ndim == 0 else count[channels], 1)
        origin = self.first((slice(None), channels))
        return formulas.statistics_of_sums(sums, origin, n, self.x.dtype != np.float64)

    def deviation_sums(self, block: Block, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``sum(x - origin)`` and ``sum((x - origin)**2)``."""
        d = self.shown(block, self.minus(block, origin))
        s1 = self.sum(d)
        d *= d
        return s1, self.sum(d)


def _run(task: Callable[[int], None], count: int) -> None:
    """On threads, each of which has its own settings for NumPy's errors."""
    if count == 1:
        task(0)
    else:
        threads.run(_quiet(task), count)


def _store(out: np.ndarray, block: Block, values: np.ndarray) -> None:
    """Rounded to out's dtype: to nearest even, and 16 bits through float32."""
    if out.dtype.itemsize != 2:
        out[block] = values
    elif out.dtype == np.int16:
        out[block] = values.astype(np.float32).astype(np.float16).view(np.int16)
    else:
        bits = values.astype(np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        out[block] = np.where(np.isnan(values), 0x7FC0, rounded)


# -- forward ---------------------------------------------------------------------------------------------------


@_quiet
def batch_statistics(call: Call) -> Statistics:
    """Mean and variance of every channel."""
    return _statistics(_Arrays(call))


def _statistics(arrays: _Arrays) -> Statistics:
    def sums(origin: np.ndarray) -> Any:
        return arrays.sums(lambda block: arrays.deviation_sums(block, origin[block[1]]))

    return Statistics(arrays.count, *arrays.statistics(slice(None), sums)[1:])


@_quiet
def train(call: Call) -> tuple[np.ndarray, Statistics, None]:
    """y and the statistics of x; running ones are left to `updated_running_statistics`."""
    arrays = _Arrays(call, call.residual)
    if arrays.x.ndim == 2:
        statistics = _statistics(arrays)
        return _evaluate(arrays, call, statistics), statistics, None
    y, normalize = _normalizer(arrays, call)
    mean, shift, var, m2 = np.empty((4, arrays.channels))
    weight = parameter(call.weight, arrays.channels, 1.0)

    def task(block: Block) -> None:
        c = block[1]
        of_block = arrays.statistics(c, lambda origin: arrays.deviation_sums(block, origin))
        mean[c], var[c], m2[c] = of_block.mean, of_block.var, of_block.m2
        if of_block.shift is not None:
            shift[c] = of_block.shift
        normalize(block, of_block.mean, of_block.shift, formulas.scale_of(np, of_block, weight[c], call.spec.eps))

    blocks = arrays.blocks(whole=True)
    _run(lambda i: task(blocks[i]), len(blocks))
    shift_or_none = shift if arrays.x.dtype == np.float64 else None
    return delivered(y, call.out), Statistics(arrays.count, mean, shift_or_none, var, m2), None


@_quiet
def evaluate(call: Call, statistics: Statistics) -> np.ndarray:
    """y with given statistics."""
    return _evaluate(_Arrays(call, call.residual), call, statistics)


def _evaluate(arrays: _Arrays, call: Call, statistics: Statistics) -> np.ndarray:
    y, normalize = _normalizer(arrays, call)
    mean, shift = statistics[1:3]
    scale, blocks = formulas.scale_of(np, statistics, call.weight, call.spec.eps), arrays.blocks(whole=False)

    def task(i: int) -> None:
        c = blocks[i][1]
        normalize(blocks[i], mean[c], None if shift is None else shift[c], scale[c])

    _run(task, len(blocks))
    return delivered(y, call.out)


def _normalizer(arrays: _Arrays, call: Call) -> tuple[np.ndarray, Callable[..., None]]:
    """Room for y, and what fills a block of it: a function of the block and its mean, shift and scale."""
    y, bias = destination(arrays.dense, call.out), parameter(call.bias, arrays.channels, 0.0)
    out, (residual,) = arrays.reshape(y), arrays.others

    def normalize(block: Block, mean: np.ndarray, shift: np.ndarray | None, scale: np.ndarray) -> None:
        v = arrays.deviations(block, mean, shift)
        v *= arrays.along(scale)
        v += arrays.along(bias[block[1]])
        if residual is not None:
            v += as_float64(residual[block]) if residual.dtype.itemsize == 2 else residual[block]
        if call.spec.relu:
            np.maximum(v, 0.0, out=v)  # NaN stays
            v += 0.0  # -0 becomes 0
        _store(out, block, arrays.shown(block, v))

    return y, normalize


# -- backward --------------------------------------------------------------------------------------------------


class _Backward:
    """The two passes of a gradient: its sums, and dx."""

    def __init__(self, call: Call, statistics: Statistics, dy: np.ndarray, active: np.ndarray | None):
        self.arrays, self.statistics = _Arrays(call, dy, active), statistics
        self.rstd = formulas.reciprocal_std(np, statistics, call.spec.eps)
        self.scale = formulas.scale_of(np, statistics, call.weight, call.spec.eps)

    def dy(self, block: Block) -> np.ndarray:
        dy, active = self.arrays.others
        assert dy is not None
        values = as_float64(dy[block])
        if active is None:
            return values
        return np.where(active[block] if active.dtype == bool else as_float64(active[block]) > 0, values, 0.0)

    def xhat(self, block: Block) -> np.ndarray:
        c, (mean, shift) = block[1], self.statistics[1:3]
        xhat = self.arrays.deviations(block, mean[c], None if shift is None else shift[c])
        xhat *= self.arrays.along(self.rstd[c])
        return xhat

    def sums(self) -> Any:
        """``sum(dy)`` and ``sum(dy * xhat)``."""
        arrays = self.arrays

        def sums_of(block: Block) -> tuple[np.ndarray, np.ndarray]:
            dy, product = arrays.shown(block, self.dy(block)), self.xhat(block)
            product *= dy
            sums = arrays.sum(product)
            if not np.isfinite(sums).all():  # what is hidden may be NaN
                sums = arrays.sum(arrays.shown(block, product))
            return arrays.sum(dy), sums

        return arrays.sums(sums_of)

    def dx(
        self, mean_dy: np.ndarray | None, mean_dy_xhat: np.ndarray | None, dresidual: np.ndarray | None = None
    ) -> np.ndarray:
        """``scale * (dy - mean_dy - xhat * mean_dy_xhat)``, without the means for constant statistics; and fills
        dresidual with dy, 0 where it does not count."""
        arrays, dx = self.arrays, np.empty_like(self.arrays.dense)
        out, blocks = arrays.reshape(dx), arrays.blocks(whole=False)
        residual_out = None if dresidual is None else arrays.reshape(dresidual)

        def task(i: int) -> None:
            block, c, g = blocks[i], blocks[i][1], self.dy(blocks[i])
            if residual_out is not None:
                _store(residual_out, block, arrays.shown(block, g))
            if mean_dy is not None and mean_dy_xhat is not None:
                xhat = self.xhat(block)
                xhat *= arrays.along(mean_dy_xhat[c])
                g -= arrays.along(mean_dy[c])
                g -= xhat
            g *= arrays.along(self.scale[c])
            _store(out, block, arrays.shown(block, g))

        _run(task, len(blocks))
        return dx


@_quiet
def gradients(
    call: Call,
    statistics: Statistics,
    dy: np.ndarray,
    active: np.ndarray | None,
    wants_residual: bool,
    over: Over | None = None,
) -> Gradients:
    """See `anybn.core.formulas.gradients`; weight's and bias's in float64. active may be y itself, after a relu."""
    backward, dresidual = _Backward(call, statistics, dy, active), dy if wants_residual else None
    if wants_residual and not (active is None and call.mask is None):
        dresidual = np.empty_like(backward.arrays.dense)
    filled = None if dresidual is dy else dresidual
    dbias, dweight = backward.sums()
    if statistics.count is None:
        return Gradients(backward.dx(None, None, filled), dweight, dbias, dresidual)
    sum_dy, sum_dy_xhat = (dbias, dweight) if over is None else over(dbias, dweight)
    n = max(statistics.count, 1) if isinstance(statistics.count, int) else np.maximum(statistics.count, 1)
    return Gradients(backward.dx(sum_dy / n, sum_dy_xhat / n, filled), dweight, dbias, dresidual)


@_quiet
def gradient_sums(
    call: Call, statistics: Statistics, dy: np.ndarray, active: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """``sum(dy)`` and ``sum(dy * xhat)`` per channel, of a part of an array."""
    return _Backward(call, statistics, dy, active).sums()


@_quiet
def dx(
    call: Call,
    statistics: Statistics,
    dy: np.ndarray,
    active: np.ndarray | None,
    mean_dy: np.ndarray | None,
    mean_dy_xhat: np.ndarray | None,
) -> np.ndarray:
    """dx of a part of an array, with the means over all of it; without them for constant statistics."""
    return _Backward(call, statistics, dy, active).dx(mean_dy, mean_dy_xhat)


@_quiet
def updated_running_statistics(update: Update, statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """See `anybn.core.formulas.updated_running_statistics`."""
    return formulas.updated_running_statistics(np, update, statistics)
