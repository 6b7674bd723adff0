"""A whole call on a small contiguous array in one compiled function that takes addresses.

A view of a tensor as a NumPy array costs as much as normalizing (8, 16) does, and a step needs eight of them; an
address costs a tenth. The caller has checked that every address holds as many contiguous values as it says.

Addresses are int64, 0 for what is not there. ``like_x`` and ``like_weight`` are arrays that stand for a dtype. Results
are those of `operations`, bit for bit. Untyped, as `values` is.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
import math

import numpy as np
from numba import carray

from anybn.kernels.cpu import columns
from anybn.kernels.cpu.cached import cached
from anybn.kernels.cpu.plan import plan_of
from anybn.kernels.cpu.primitives import integers, pointer
from anybn.kernels.cpu.sharing import alone
from anybn.kernels.cpu.values import DBIAS, DWEIGHT, M2, MEAN, SHIFT, VAR, load, shift_in, store, update_running
from anybn.kernels.layout import Layout

_COMPILED = {"nogil": True, "error_model": "numpy"}


@cached(**_COMPILED)
def overlap(a, a_bytes, b, b_bytes):
    return a != 0 and b != 0 and a < b + b_bytes and b < a + a_bytes


@cached(**_COMPILED)
def shares_memory(like_x, like_weight, x, size, weight, bias, running_mean, running_var, channels):
    """Whether x lies on anything of the state."""
    x_bytes, parameter_bytes, statistics_bytes = size * like_x.itemsize, channels * like_weight.itemsize, channels * 8
    return (
        overlap(x, x_bytes, weight, parameter_bytes)
        or overlap(x, x_bytes, bias, parameter_bytes)
        or overlap(x, x_bytes, running_mean, statistics_bytes)
        or overlap(x, x_bytes, running_var, statistics_bytes)
    )


@cached(**_COMPILED)
def parameter(like, address, count, default):
    values = np.empty(count)
    if address == 0:
        values[:] = default
    else:
        given = carray(pointer(like, address), (count,))
        for c in range(count):
            values[c] = load(given[c])
    return values


@cached(**_COMPILED)
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
    size,
    channels,
    floor,
    eps,
    momentum,
    statistics,
    tasks,
    width,
    inner,
    panel,
):
    """Fill y and statistics, as `columns.train` does, and update what of the state has an address.

    momentum below 0 is the cumulative average, and running_var unbiased, as torch has it. False, and nothing done, if x
    lies on the state.
    """
    if shares_memory(like_x, like_weight, x, size, weight, bias, running_mean, running_var, channels):
        return False
    w, b = parameter(like_weight, weight, channels, 1.0), parameter(like_weight, bias, channels, 0.0)
    x_in, y_in = carray(pointer(like_x, x), (size,)), carray(pointer(like_x, y), (size,))
    tickets = alone(tasks)
    if residual == 0:
        columns.train(tickets, x_in, y_in, None, floor, eps, w, b, statistics, width, inner, panel)
    else:
        residual_in = carray(pointer(like_x, residual), (size,))
        columns.train(tickets, x_in, y_in, residual_in, floor, eps, w, b, statistics, width, inner, panel)
    if running_mean != 0:
        tracked = carray(integers(batches), (1,))
        tracked[0] += 1
        new = momentum if momentum >= 0.0 else 1.0 / tracked[0]
        mean = carray(pointer(statistics, running_mean), (channels,))
        var = carray(pointer(statistics, running_var), (channels,))
        shift = shift_in(statistics, x_in)
        update_running(statistics[MEAN], shift, statistics[M2], size // channels, 1, new, False, mean, var)
    return True


@cached(**_COMPILED)
def evaluate(
    like_x,
    like_weight,
    x,
    y,
    residual,
    weight,
    bias,
    running_mean,
    running_var,
    size,
    channels,
    floor,
    eps,
    copies,
    parts,
    width,
    inner,
    panel,
    stripe,
):
    """Fill y, and copies with the running mean and variance. False, and nothing done, if x lies on the state."""
    if shares_memory(like_x, like_weight, x, size, weight, bias, running_mean, running_var, channels):
        return False
    mean, var = carray(pointer(copies, running_mean), (channels,)), carray(pointer(copies, running_var), (channels,))
    for c in range(channels):
        copies[0, c], copies[1, c] = mean[c], var[c]
    w, b = parameter(like_weight, weight, channels, 1.0), parameter(like_weight, bias, channels, 0.0)
    x_in, y_in = carray(pointer(like_x, x), (size,)), carray(pointer(like_x, y), (size,))
    tickets, split = alone(parts), (width, inner, panel, stripe)
    given = (floor, eps, w, b, copies[0], None, copies[1])
    if residual == 0:
        columns.normalize_parts(tickets, x_in, y_in, None, None, *given, *split)
    else:
        residual_in = carray(pointer(like_x, residual), (size,))
        columns.normalize_parts(tickets, x_in, y_in, residual_in, None, *given, *split)
    return True


@cached(**_COMPILED)
def store_all(like, address, values):
    if address != 0:
        out = carray(pointer(like, address), (len(values),))
        for c in range(len(values)):
            store(out, c, values[c])


@cached(**_COMPILED)
def backward(
    like_x,
    like_weight,
    dy,
    x,
    y,
    dx,
    dresidual,
    weight,
    dweight,
    dbias,
    size,
    channels,
    of_batch,
    eps,
    statistics,
    tasks,
    width,
    inner,
    panel,
):
    """Fill dx, and what else has an address of dresidual, dweight and dbias, as `columns.backward` does.

    statistics are those that `train` filled, of_batch, or the copies of `evaluate`. y is 0 unless it went through relu;
    then dy counts where y is above 0.
    """
    rows = np.zeros((3, channels))  # mean, shift and variance
    rows[MEAN] = statistics[0]
    rows[VAR] = statistics[VAR] if of_batch else statistics[1]
    if of_batch:
        rows[SHIFT] = statistics[SHIFT]
    w, gradients = parameter(like_weight, weight, channels, 1.0), np.empty((5, channels))
    dy_in, x_in = carray(pointer(like_x, dy), (size,)), carray(pointer(like_x, x), (size,))
    dx_in = carray(pointer(like_x, dx), (size,))
    tickets = alone(tasks)
    count = size // channels if of_batch else 0
    given = (count, eps, w, rows[MEAN], shift_in(rows, x_in), rows[VAR], gradients, width, inner, panel)
    if y == 0:
        columns.backward(tickets, dy_in, x_in, None, dx_in, None, *given)
    elif dresidual == 0:
        y_in = carray(pointer(like_x, y), (size,))
        columns.backward(tickets, dy_in, x_in, y_in, dx_in, None, *given)
    else:
        y_in, dresidual_in = carray(pointer(like_x, y), (size,)), carray(pointer(like_x, dresidual), (size,))
        columns.backward(tickets, dy_in, x_in, y_in, dx_in, dresidual_in, *given)
    store_all(like_weight, dweight, gradients[DWEIGHT])
    store_all(like_weight, dbias, gradients[DBIAS])


@functools.lru_cache(maxsize=1024)
def plans(shape, itemsize):
    """The last arguments of `train`, of `evaluate` and of `backward` for a contiguous array with its channels on axis
    1; None for one of long planes, or too large for one thread's cache."""
    outer, channels, inner = shape[0], shape[1], math.prod(shape[2:])
    layout = Layout(tuple(range(len(shape))), outer, channels, inner)
    plan, of_two = plan_of(layout, itemsize, 1), plan_of(layout, itemsize, 2)
    if plan.kernels != "columns" or not plan.fits or not of_two.fits:
        return None
    return (plan.tasks[0], *plan.of_task), (plan.parts[0], *plan.of_part), (of_two.tasks[0], *of_two.of_task)
