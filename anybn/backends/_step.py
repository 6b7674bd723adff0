"""A whole call on a small contiguous array in one compiled function that takes addresses.

A view of a tensor as a NumPy array costs as much as normalizing (8, 16) does, and a step needs eight of them; an
address costs a tenth. The caller has checked that every address holds as many contiguous values as it says.

Addresses are int64, 0 for what is not there. ``like_x`` and ``like_weight`` are arrays that stand for a dtype. Results
are those of `_fused` on one thread, bit for bit. Untyped, as `_kernels` is.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from anybn.backends import _kernels
from anybn.backends._kernels import load

_COMPILED = {"nogil": True, "cache": True, "error_model": "numpy"}


@intrinsic
def pointer(typing_context, like, address):
    """The address as a pointer to like's dtype."""

    def inttoptr(context, builder, signature, arguments):
        return builder.inttoptr(arguments[1], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(like, address), inttoptr


@intrinsic
def integers(typing_context, address):
    """The address as a pointer to int64."""

    def inttoptr(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(types.int64), inttoptr


@njit(**_COMPILED)
def overlap(a, a_bytes, b, b_bytes):
    return a != 0 and b != 0 and a < b + b_bytes and b < a + a_bytes


@njit(**_COMPILED)
def shares_memory(like_x, like_weight, x, size, weight, bias, running_mean, running_var, channels):
    """Whether x lies on anything of the state."""
    x_bytes, kept, statistics = size * like_x.itemsize, channels * like_weight.itemsize, channels * 8
    return (
        overlap(x, x_bytes, weight, kept)
        or overlap(x, x_bytes, bias, kept)
        or overlap(x, x_bytes, running_mean, statistics)
        or overlap(x, x_bytes, running_var, statistics)
    )


@njit(**_COMPILED)
def parameter(like, address, count, default):
    values = np.empty(count)
    if address == 0:
        values[:] = default
    else:
        given = carray(pointer(like, address), (count,))
        for c in range(count):
            values[c] = load(given[c])
    return values


@njit(**_COMPILED)
def train(
    like_x,
    like_weight,
    x,
    y,
    residual,
    weight,
    bias,
    running_mean,
    running_var,
    batches,
    n,
    channels,
    length,
    relu,
    eps,
    momentum,
    statistics,
):
    """Fill y, the rows mean, shift, m2 and scale of statistics, and update what of the state has an address.

    momentum below 0 is the cumulative average, and running_var unbiased, as torch has it. False, and nothing done, if x
    lies on the state.
    """
    size = n * channels * length
    if shares_memory(like_x, like_weight, x, size, weight, bias, running_mean, running_var, channels):
        return False
    mean, shift, m2, scale = statistics[0], statistics[1], statistics[2], statistics[3]
    added, wide = residual != 0, like_x.itemsize < 8
    w, b = parameter(like_weight, weight, channels, 1.0), parameter(like_weight, bias, channels, 0.0)
    rest = residual if added else x
    if length == 1:
        rows = (n, channels)
        x_in, y_in = carray(pointer(like_x, x), rows), carray(pointer(like_x, y), rows)
        rest_in = carray(pointer(like_x, rest), rows)
        _kernels.train_rows(x_in, y_in, rest_in, added, relu, wide, eps, w, b, mean, shift, m2, scale)
    else:
        planes = (n, channels, length)
        x_in, y_in = carray(pointer(like_x, x), planes), carray(pointer(like_x, y), planes)
        rest_in = carray(pointer(like_x, rest), planes)
        _kernels.train_planes(x_in, y_in, rest_in, added, relu, wide, eps, w, b, mean, shift, m2, scale, 0, channels)
    if running_mean != 0:
        tracked = carray(integers(batches), (1,))
        tracked[0] += 1
        new = momentum if momentum >= 0.0 else 1.0 / tracked[0]
        running_mean_in = carray(pointer(statistics, running_mean), (channels,))
        running_var_in = carray(pointer(statistics, running_var), (channels,))
        count = n * length
        _kernels.update_running(mean, shift, not wide, m2, count, 1, new, False, running_mean_in, running_var_in)
    return True


@njit(**_COMPILED)
def evaluate(
    like_x, like_weight, x, y, residual, weight, bias, running_mean, running_var, n, channels, length, relu, eps, copies
):
    """Fill y, and copies with the running mean and variance. False, and nothing done, if x lies on the state."""
    size = n * channels * length
    if shares_memory(like_x, like_weight, x, size, weight, bias, running_mean, running_var, channels):
        return False
    copies[0] = carray(pointer(copies, running_mean), (channels,))
    copies[1] = carray(pointer(copies, running_var), (channels,))
    added = residual != 0
    mean, shift = copies[0], np.empty(0)
    w, b = parameter(like_weight, weight, channels, 1.0), parameter(like_weight, bias, channels, 0.0)
    for c in range(channels):
        w[c] = 1.0 / np.sqrt(copies[1, c] + eps) * w[c]
    rest = residual if added else x
    if length == 1:
        rows = (n, channels)
        x_in, y_in = carray(pointer(like_x, x), rows), carray(pointer(like_x, y), rows)
        rest_in = carray(pointer(like_x, rest), rows)
        _kernels.normalize_rows(x_in, y_in, rest_in, added, relu, True, mean, shift, w, b, 0, n)
    else:
        planes = (n, channels, length)
        x_in, y_in = carray(pointer(like_x, x), planes), carray(pointer(like_x, y), planes)
        rest_in = carray(pointer(like_x, rest), planes)
        _kernels.normalize_planes(
            x_in, y_in, rest_in, added, relu, True, mean, mean, w, b, 0, n, 0, channels, 0, length
        )
    return True
