"""The mathematics of batch normalization over any Array API namespace.

Pure functions of arrays: no branching on values, no host copies, no in-place writes, so that ``jax.jit`` can trace
them, Dask keeps them lazy and ``array-api-strict`` accepts them on each of its devices.

A call and its shapes are those of `anybn.core.call`.

Precision: the *working dtype* is float64 where the device has it, else float32. Where it is wider than x, each value of
y is computed in it and rounded once, so y is correct to half a unit in the last place, and two backends agree bit for
bit on nearly all data. Where it is not (float64 input, or a device without float64), the mean is kept as the
unevaluated sum ``mean + shift`` of two working numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from anybn.core.call import Array, Call, Gradients, RowSpec, Statistics, Update, dtype_name

Sum = Callable[[Any, Array, tuple[int, ...]], Array]
#: Two sums per channel over this member of a group -> over all of them.
Over = Callable[[Array, Array], tuple[Array, Array]]


def native_sum(xp: Any, a: Array, axes: tuple[int, ...]) -> Array:
    """The library's own sum: good enough in a working dtype wider than x, or from a library that adds in trees."""
    return xp.sum(a, axis=axes)


def blocked_sum(xp: Any, a: Array, axes: tuple[int, ...], block: int = 16) -> Array:
    """Sum along one axis after the other in blocks, so that rounding errors do not grow with the number of values.

    NumPy adds pairwise along the fastest axis only; down the rows of an (N, C) array it keeps one accumulator per
    channel, and 1e7 rows cost about three digits.
    """
    for axis in sorted(axes, reverse=True):
        while a.shape[axis] > block:
            blocks = a.shape[axis] // block
            before, after = (slice(None),) * axis, (slice(None),) * (a.ndim - axis - 1)
            head = a[(*before, slice(0, blocks * block), *after)]
            head = xp.sum(xp.reshape(head, (*a.shape[:axis], blocks, block, *a.shape[axis + 1 :])), axis=axis + 1)
            tail = a[(*before, slice(blocks * block, None), *after)]
            a = xp.concat([head, tail], axis=axis)
        a = xp.sum(a, axis=axis)
    return a


def is_wide(working: Any, x: Array) -> bool:
    """True if sums of x in the working dtype are exact to well under one unit in the last place of x."""
    return dtype_name(working) == "float64" and dtype_name(x.dtype) != "float64"


def reduced_axes(ndim: int, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if i != axis)


def along(xp: Any, channel: Array, axis: int, ndim: int) -> Array:
    """(C,) -> (1, C, 1, 1): per-channel values in a shape that broadcasts against x."""
    return xp.reshape(channel, tuple(-1 if i == axis else 1 for i in range(ndim)))


def value_count(xp: Any, x: Array, axis: int, mask: Array | None, working: Any) -> int | Array:
    """Values per channel: an int; where a mask decides, an integer array, 0-d, or ``(C,)`` if it has channels."""
    if mask is None:
        return math.prod(x.shape[i] for i in reduced_axes(x.ndim, axis))
    channels = mask.shape[axis]
    shape = tuple(channels if i == axis else size for i, size in enumerate(x.shape))
    everywhere = mask if mask.shape == shape else xp.broadcast_to(mask, shape)
    integer = xp.int64 if dtype_name(working) == "float64" else xp.int32  # what has one mostly has the other
    return xp.sum(
        xp.astype(everywhere, integer), axis=None if channels == 1 else reduced_axes(x.ndim, axis), dtype=integer
    )


def divisor(xp: Any, count: int | Array, working: Any) -> int | Array:
    """count as a number that can be divided by: 1 where nothing was counted."""
    if isinstance(count, int):
        return max(count, 1)
    return xp.astype(xp.where(count > 0, count, xp.ones_like(count)), working)


def batch_statistics(xp: Any, sum: Sum, call: Call, working: Any, count: int | Array | None = None) -> Statistics:
    """Mean and biased variance per channel of a non-empty x, from deviations, never from ``E[x^2] - E[x]^2``.

    The corrected two-pass algorithm (Chan, Golub & LeVeque 1983): a first mean, then the mean and the squares of the
    deviations from it. A channel whose positions are all masked has mean 0 and variance 0. ``count`` is `value_count`,
    where the caller has it already.
    """
    x, axis, mask = call.x, call.spec.axis, call.mask
    if count is None:
        count = value_count(xp, x, axis, mask, working)
    axes, ndim = reduced_axes(x.ndim, axis), x.ndim
    wide = is_wide(working, x)
    sum = native_sum if wide else sum
    x = xp.astype(x, working)
    n = divisor(xp, count, working)
    if mask is not None:
        x = xp.where(mask, x, xp.zeros_like(x))  # NaN * 0 is NaN: what is masked must not reach any product

    def total(values: Array) -> Array:
        return sum(xp, values if mask is None else xp.where(mask, values, xp.zeros_like(values)), axes)

    if wide:
        mean = total(x) / n
        deviation = x - along(xp, mean, axis, ndim)
        m2 = total(deviation * deviation)
        return Statistics(count, mean, None, m2 / n, m2)
    # Measured from a value of the channel, a constant channel is 0 all the way down and its y exactly bias,
    # and a mean far from 0 is not rounded while it is summed.
    inside = x if mask is None else xp.where(mask, x, xp.full_like(x, -xp.inf))
    origin = xp.max(inside, axis=axes)
    origin = xp.where(xp.isfinite(origin), origin, xp.zeros_like(origin))
    deviation = x - along(xp, origin, axis, ndim)
    scale = None
    if dtype_name(working) == "float32":
        size = xp.abs(deviation if mask is None else xp.where(mask, deviation, xp.zeros_like(deviation)))
        scale = scale_for(xp, xp.max(size, axis=axes))

    def scaled(values: Array) -> Array:
        return values if scale is None else values * along(xp, scale, axis, ndim)

    def unscaled(values: Array, times: int) -> Array:
        for _ in range(0 if scale is None else times):  # one by one: the power of a scale may overflow
            values = values / scale
        return values

    mean = origin + unscaled(total(scaled(deviation)) / n, 1)
    deviation = scaled(x - along(xp, mean, axis, ndim))
    shift = total(deviation) / n
    deviation = deviation - along(xp, shift, axis, ndim)
    m2 = total(deviation * deviation)
    var = m2 / n
    scaled_var = None if scale is None else var
    return Statistics(count, mean, unscaled(shift, 1), unscaled(var, 2), unscaled(m2, 2), scale, scaled_var)


def scale_for(xp: Any, size: Array) -> Array:
    """The power of two by which float32 values up to size are multiplied before they are squared and summed."""
    one = xp.ones_like(size)
    small = (size > 0) & (size < 2.0**-44)
    return xp.where(size > 2.0**44, 2.0**-76 * one, xp.where(small, 2.0**40 * one, one))


def statistics_of_sums(
    sums: Callable[[Array], tuple[Array, Array]], origin: Array, count: int, wide: bool
) -> Statistics:
    """`batch_statistics` from ``sums(origin)``, which are ``sum(x - origin)`` and ``sum((x - origin)**2)`` per channel.

    They are taken from a value of each channel; where the working dtype is not wide, again from the mean.
    """
    shift = None
    s1, s2 = sums(origin)
    mean = origin + s1 / count
    if not wide:
        s1, s2 = sums(mean)
        shift = s1 / count
    m2 = s2 - s1 * (s1 / count)
    return Statistics(count, mean, shift, m2 / count, m2)


def centered(xp: Any, x: Array, statistics: Statistics, axis: int) -> Array:
    """``(x - mean) - shift`` in the working dtype. Never ``x - (mean + shift)``: that rounds the mean away."""
    deviation = xp.astype(x, statistics.mean.dtype) - along(xp, statistics.mean, axis, x.ndim)
    if statistics.shift is not None:
        deviation = deviation - along(xp, statistics.shift, axis, x.ndim)
    return deviation


def reciprocal_std(xp: Any, statistics: Statistics, eps: float) -> Array:
    if statistics.scale is None:
        return 1.0 / xp.sqrt(statistics.var + eps)
    return statistics.scale / xp.sqrt(statistics.scaled_var + eps * statistics.scale * statistics.scale)


def scale_of(xp: Any, statistics: Statistics, weight: Array | None, eps: float) -> Array:
    rstd = reciprocal_std(xp, statistics, eps)
    return rstd if weight is None else rstd * xp.astype(weight, rstd.dtype)


def rounded_to(xp: Any, a: Array, dtype: Any) -> Array:
    """Cast to x's dtype. 16-bit results go through float32 everywhere, because some libraries always do."""
    if dtype_name(dtype) not in ("float32", "float64"):
        a = xp.astype(a, xp.float32)
    return xp.astype(a, dtype)


def normalize(xp: Any, call: Call, statistics: Statistics) -> Array:
    """``relu((x - mean) / sqrt(var + eps) * weight + bias + residual)``, rounded to x's dtype once, at the end."""
    x, spec, mask, residual = call.x, call.spec, call.mask, call.residual
    axis, working = spec.axis, statistics.mean.dtype
    if mask is not None:
        x = xp.where(mask, x, xp.zeros_like(x))  # a masked NaN must not reach the derivative either
    y = centered(xp, x, statistics, axis) * along(xp, scale_of(xp, statistics, call.weight, spec.eps), axis, x.ndim)
    if call.bias is not None:
        y = y + along(xp, xp.astype(call.bias, working), axis, x.ndim)
    if residual is not None:
        y = y + xp.astype(residual, working)
    if spec.relu:
        y = xp.where(y <= 0, xp.zeros_like(y), y)  # keeps NaN, which y must show; its derivative at 0 is 0
    if mask is not None:
        y = xp.where(mask, y, xp.zeros_like(y))
    return rounded_to(xp, y, x.dtype)


def gradients(
    xp: Any,
    sum: Sum,
    call: Call,
    statistics: Statistics,
    dy: Array,
    active: Array | None,
    wants_residual: bool,
    over: Over | None = None,
) -> Gradients:
    """The gradient of ``normalize`` (Ioffe & Szegedy 2015, section 3), all four inputs at once.

    With ``xhat = (x - mean) * rstd`` and sums over the count values of a channel::

        dbias = sum(dy)    dweight = sum(dy * xhat)
        dx = weight * rstd * (dy - dbias / count - xhat * dweight / count)

    where the last two terms are how x acts through the batch statistics, absent when ``statistics.count`` is None; over
    a group of processes their sums are those of all members, which ``over`` makes of this one's. dbias and dweight stay
    its own, like every gradient of a replicated parameter. ``active`` is ``y > 0`` under relu. The gradient of the
    residual is dy behind the relu; None unless wanted. Those of weight and bias are there if these are.
    """
    x, spec, weight, mask = call.x, call.spec, call.weight, call.mask
    axis, ndim, axes, working = spec.axis, x.ndim, reduced_axes(x.ndim, spec.axis), statistics.mean.dtype
    sum = native_sum if is_wide(working, x) else sum
    dy = xp.astype(dy, working)
    for keep in (active, mask):
        if keep is not None:
            dy = xp.where(keep, dy, xp.zeros_like(dy))
    if mask is not None:
        x = xp.where(mask, x, xp.zeros_like(x))  # nor the derivative of this one
    xhat = centered(xp, x, statistics, axis)
    xhat = xhat * along(xp, reciprocal_std(xp, statistics, spec.eps), axis, ndim)
    if mask is not None:
        xhat = xp.where(mask, xhat, xp.zeros_like(xhat))
    dbias, dweight = sum(xp, dy, axes), sum(xp, dy * xhat, axes)
    dx = dy
    if statistics.count is not None:
        n = divisor(xp, statistics.count, working)
        sum_dy, sum_dy_xhat = (dbias, dweight) if over is None else over(dbias, dweight)
        dx = dx - along(xp, sum_dy / n, axis, ndim) - xhat * along(xp, sum_dy_xhat / n, axis, ndim)
        if mask is not None:
            dx = xp.where(mask, dx, xp.zeros_like(dx))
    dx = rounded_to(xp, dx * along(xp, scale_of(xp, statistics, weight, spec.eps), axis, ndim), x.dtype)
    dresidual = rounded_to(xp, dy, x.dtype) if wants_residual else None
    return Gradients(dx, *parameter_gradients(xp, call, dweight, dbias), dresidual)


def parameter_gradients(xp: Any, call: Call, dweight: Array, dbias: Array) -> tuple[Array | None, Array | None]:
    """dweight and dbias in the dtypes of the call's weight and bias; None for what it does not have."""
    weight, bias = call.weight, call.bias
    return (
        None if weight is None else rounded_to(xp, dweight, weight.dtype),
        None if bias is None else rounded_to(xp, dbias, bias.dtype),
    )


def updated_running_statistics(
    xp: Any, update: Update, statistics: Statistics, kept: float | Array | None = None
) -> tuple[Array, Array]:
    """``running = (1 - momentum) * running + momentum * batch``, with ``m2 / (count - ddof)`` for the variance.

    Channels whose batch is not finite keep theirs, unless ``propagate``; so does every channel where a mask that is
    counted only later left fewer than 2 values.
    """
    running_mean, running_var, momentum, ddof, propagate = update
    assert momentum is not None
    mean, count = statistics.mean, statistics.count
    if statistics.shift is not None:
        mean = mean + statistics.shift
    if isinstance(count, int):
        n: Any = count - ddof
    else:
        count = xp.astype(count, mean.dtype)
        n = xp.where(count > 1, count - ddof, xp.full_like(count, xp.nan))
    var = statistics.m2 / n
    if statistics.scale is not None:  # var may be held where the sum of squares overflows
        var = xp.where(xp.isfinite(var), var, statistics.var * (count / n))
    kept = 1.0 - momentum if kept is None else kept
    new_mean = kept * running_mean + momentum * xp.astype(mean, running_mean.dtype)
    new_var = kept * running_var + momentum * xp.astype(var, running_var.dtype)
    if propagate:
        return new_mean, new_var
    finite = xp.isfinite(mean) & xp.isfinite(var)
    return xp.where(finite, new_mean, running_mean), xp.where(finite, new_var, running_var)


def in_rows(xp: Any, a: Array, spec: RowSpec) -> Array:
    """a as (1, rows, values), as batch norm takes its channels.

    Where the mean is not to be subtracted, each row is followed by its negative: their mean is 0 and their variance the
    mean square, so their batch norm is RMS norm.
    """
    samples, parameters, length = spec.shape
    own = spec.values // length
    a = xp.reshape(a, (samples, parameters // own, own, length))  # Dask cannot split and merge axes at once
    a = xp.reshape(a, (1, samples * (parameters // own), spec.values))
    return a if spec.centered else xp.concat([a, -a], axis=2)


def from_rows(xp: Any, rows: Array, spec: RowSpec) -> Array:
    """What `in_rows` made, as ``(N, P, L)``."""
    samples, parameters, length = spec.shape
    own = spec.values // length
    rows = rows if spec.centered else rows[:, :, : spec.values]
    return xp.reshape(xp.reshape(rows, (samples, parameters // own, own, length)), spec.shape)


def scaled(xp: Any, a: Array, weight: Array | None, bias: Array | None) -> Array:
    """``a * weight + bias`` in a's dtype, for a ``(N, P, L)``."""
    if weight is not None:
        a = a * xp.reshape(xp.astype(weight, a.dtype), (1, -1, 1))
    return a if bias is None else a + xp.reshape(xp.astype(bias, a.dtype), (1, -1, 1))
