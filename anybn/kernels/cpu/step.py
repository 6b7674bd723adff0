"""A whole call on a dense array in one compiled function that takes NumPy arrays, or addresses of a tensor's values.

Between two kernels of a call, Python takes as long as a kernel on a megabyte. A view of a tensor as a NumPy array takes
as long as normalizing (8, 16), and a step needs eight of them; an address takes a tenth. The address of a NumPy array
takes longer than the array. The caller has checked that all arrays, or what is at the addresses, are as long as they
have to be, that values lie one after the other, and those of arrays like x as x's do.

Addresses are int64. What is None is not there: Numba compiles a version without it. ``like_x`` and ``like_weight`` are
arrays that stand for a dtype, None where arrays are given. Untyped, as `values` is.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, types

from anybn.kernels.cpu import columns, runs
from anybn.kernels.cpu.cached import cached
from anybn.kernels.cpu.plan import BACKWARD_RUN, EVALUATED_RUN, RUN, Plan, plan_of
from anybn.kernels.cpu.primitives import by_types, doubles, integers, pointer
from anybn.kernels.cpu.sharing import ALONE, WAITED, hands, tickets_of
from anybn.kernels.cpu.sharing import note_wait as note_wait  # for who calls a step
from anybn.kernels.cpu.values import (
    DBIAS,
    DWEIGHT,
    EXACT,
    M2,
    MEAN,
    SHIFT,
    VAR,
    fill,
    finish_all_gradients,
    finish_statistics,
    first_shown,
    load,
    shift_in,
    shown_count,
    store,
    take_origins,
    update_running,
)
from anybn.kernels.layout import layout_of_strides

_COMPILED = {"nogil": True, "error_model": "numpy"}


# -- addresses -------------------------------------------------------------------------------------------------


@by_types(inline=True)
def array_at(like, address, size):
    """So many values of like's dtype; what is no address but None or an array, as it is."""
    if isinstance(address, types.NoneType):
        return lambda like, address, size: None
    if isinstance(address, types.Array):
        return lambda like, address, size: address
    return lambda like, address, size: carray(pointer(like, address), (size,))


@njit(**EXACT)
def parameter(like, address, count, default):
    """weight or bias as float64."""
    values = np.empty(count)
    if address is None:
        fill(values, default)
    else:
        given = array_at(like, address, count)
        for c in range(count):
            values[c] = load(given[c])
    return values


@njit(**EXACT)
def store_at(like, address, values):
    """Where there is an address."""
    if address is not None:
        out = array_at(like, address, len(values))
        for c in range(len(values)):
            store(out, c, values[c])


@njit(**EXACT)
def overlap(a, a_bytes, b, b_bytes):
    if b is None:
        return False
    return a < b + b_bytes and b < a + a_bytes


@by_types
def shares_memory(like_x, like_weight, x, size, weight, bias, running_mean, running_var, channels):
    """Whether x lies on anything of the state; of arrays, NumPy has said that it does not."""
    if isinstance(x, types.Array):
        return lambda like_x, like_weight, x, size, weight, bias, running_mean, running_var, channels: False

    def of_addresses(like_x, like_weight, x, size, weight, bias, running_mean, running_var, channels):
        x_bytes, of_parameter, of_statistics = size * like_x.itemsize, channels * like_weight.itemsize, channels * 8
        return (
            overlap(x, x_bytes, weight, of_parameter)
            or overlap(x, x_bytes, bias, of_parameter)
            or overlap(x, x_bytes, running_mean, of_statistics)
            or overlap(x, x_bytes, running_var, of_statistics)
        )

    return of_addresses


# -- kernels of a plan -----------------------------------------------------------------------------------------


def _of_either(name):
    """A kernel of `runs` or of `columns`, by the last arguments that a plan has for it, which come first here."""

    @by_types
    def kernel(last, *arguments):
        chosen = getattr(runs if len(last) == 2 else columns, name)
        return lambda last, *arguments: chosen(*(arguments + last))

    return kernel


_train, _backward, _sum_parts = _of_either("train"), _of_either("backward"), _of_either("sum_parts")
_normalize_parts, _gradient_parts = _of_either("normalize_parts"), _of_either("gradient_parts")


@by_types
def _merge_parts(partial, sums):
    chosen = runs.merge_parts if partial.ndim == 4 else columns.merge_parts
    return lambda partial, sums: chosen(partial, sums)


# -- calls -----------------------------------------------------------------------------------------------------


@njit(**EXACT)
def learn(learning, x, statistics, count, running_mean, running_var):
    if learning is not None:
        momentum, ddof, propagate = learning
        batch = statistics[MEAN], shift_in(statistics, x), statistics[M2]
        update_running(*batch, count, ddof, momentum, propagate, running_mean, running_var)


@njit(**EXACT)
def find_statistics(mask, x, eps, count, statistics, hands, inner, parts, of_part, partial_shape):
    """Fill statistics by parts of x. Returns what `train` does."""
    channels = statistics.shape[1]
    partial, sums = np.empty(partial_shape), np.empty((2, channels))
    mean, shift = statistics[MEAN], shift_in(statistics, x)
    take_origins(x, first_shown(mask, channels, inner), inner, 0, channels, mean)
    tickets = tickets_of(parts, hands)
    _sum_parts(of_part, tickets, None, x, None, mask, mean, partial)
    _merge_parts(partial, sums)
    waited = tickets[WAITED]
    if shift is not None:
        for c in range(channels):
            mean[c] += sums[0, c] / count
        tickets = tickets_of(parts, hands)
        _sum_parts(of_part, tickets, None, x, None, mask, mean, partial)
        _merge_parts(partial, sums)
        waited += tickets[WAITED]
    finish_statistics(0, channels, count, sums, eps, None, statistics, shift)
    return waited


@cached(**_COMPILED)
def statistics(mask, x, statistics, hands, inner, parts, of_part, partial_shape):
    """Fill statistics. Returns what `train` does."""
    count = shown_count(mask, len(x), statistics.shape[1])
    return find_statistics(mask, x, 1.0, count, statistics, hands, inner, parts, of_part, partial_shape)


@cached(**_COMPILED)
def train(
    learning, mask, like_x, like_weight, x, y, residual, weight, bias, running_mean, running_var,
    size, channels, floor, eps, statistics, hands, tasks, of_task,
):  # fmt: skip
    """Fill y and statistics, as a plan's tasks do. Returns nanoseconds for `sharing.note_wait`; -1, with nothing done,
    if x lies on the state.

    ``learning`` is None, or momentum, ddof and propagate of an `Update`: arrays of running statistics learn by it. The
    mask has a value for each position, in the order of memory.
    """
    if shares_memory(like_x, like_weight, x, size, weight, bias, running_mean, running_var, channels):
        return -1
    tickets, count = tickets_of(tasks, hands), shown_count(mask, size, channels)
    arrays = array_at(like_x, x, size), array_at(like_x, y, size), array_at(like_x, residual, size)
    w, b = parameter(like_weight, weight, channels, 1.0), parameter(like_weight, bias, channels, 0.0)
    _train(of_task, tickets, *arrays, mask, floor, eps, w, b, count, statistics)
    learn(learning, arrays[0], statistics, count, running_mean, running_var)
    return tickets[WAITED]


@cached(**_COMPILED)
def train_in_parts(
    learning, mask, like_x, like_weight, x, y, residual, weight, bias, running_mean, running_var,
    size, channels, floor, eps, statistics, hands, inner, parts, of_part, partial_shape, normalized, of_normalized,
):  # fmt: skip
    """`train` where a channel is read twice."""
    if shares_memory(like_x, like_weight, x, size, weight, bias, running_mean, running_var, channels):
        return -1
    x_in, count = array_at(like_x, x, size), shown_count(mask, size, channels)
    waited = find_statistics(mask, x_in, eps, count, statistics, hands, inner, parts, of_part, partial_shape)
    tickets = tickets_of(normalized, hands)
    arrays = x_in, array_at(like_x, y, size), array_at(like_x, residual, size)
    w, b = parameter(like_weight, weight, channels, 1.0), parameter(like_weight, bias, channels, 0.0)
    of_batch = statistics[MEAN], shift_in(statistics, x_in), statistics[VAR]
    _normalize_parts(of_normalized, tickets, *arrays, mask, floor, eps, w, b, *of_batch)
    learn(learning, x_in, statistics, count, running_mean, running_var)
    return waited + tickets[WAITED]


@cached(**_COMPILED)
def update(like_x, rows, channels, count, momentum, running_mean, running_var, batches):
    """Fold statistics of `train` into the running ones, and count the batch, all at addresses. Returns True.

    momentum below 0 is the cumulative average, and running_var unbiased, as torch has it.
    """
    tracked, statistics = carray(integers(batches), (1,)), carray(doubles(rows), (5, channels))
    tracked[0] += 1
    new = momentum if momentum >= 0.0 else 1.0 / tracked[0]
    mean, var = array_at(statistics, running_mean, channels), array_at(statistics, running_var, channels)
    update_running(statistics[MEAN], shift_in(statistics, like_x), statistics[M2], count, 1, new, False, mean, var)
    return True


@cached(**_COMPILED)
def evaluate(
    shift, mask, like_x, like_weight, x, y, residual, weight, bias, running_mean, running_var,
    size, channels, floor, eps, copies, hands, parts, of_part,
):  # fmt: skip
    """Fill y, and copies, if there are any, with the running mean and variance. Returns what `train` does.

    With a shift, the mean is ``running_mean + shift``.
    """
    if shares_memory(like_x, like_weight, x, size, weight, bias, running_mean, running_var, channels):
        return -1
    mean, var = array_at(copies, running_mean, channels), array_at(copies, running_var, channels)
    if copies is not None:
        for c in range(channels):
            copies[0, c], copies[1, c] = mean[c], var[c]
        mean, var = copies[0], copies[1]
    tickets = tickets_of(parts, hands)
    arrays = array_at(like_x, x, size), array_at(like_x, y, size), array_at(like_x, residual, size)
    w, b = parameter(like_weight, weight, channels, 1.0), parameter(like_weight, bias, channels, 0.0)
    _normalize_parts(of_part, tickets, *arrays, mask, floor, eps, w, b, mean, shift, var)
    return tickets[WAITED]


@njit(**EXACT)
def rows_of(statistics):
    """Mean, shift and variance of what `train` filled, or of `evaluate`'s copies; and whether they are constants."""
    rows, constant = np.zeros((3, statistics.shape[1])), len(statistics) == 2
    for c in range(statistics.shape[1]):  # whole rows at a time take 2 s to compile, for the sake of an error's words
        rows[MEAN, c], rows[VAR, c] = statistics[0, c], statistics[1 if constant else VAR, c]
        if not constant:
            rows[SHIFT, c] = statistics[SHIFT, c]
    return rows, constant


@cached(**_COMPILED)
def backward(
    mask, like_x, like_weight, dy, x, y, dx, dresidual, weight, dweight, dbias,
    size, channels, eps, statistics, hands, tasks, of_task,
):  # fmt: skip
    """Fill dx, and what else has an address of dresidual, dweight and dbias. Returns what `train` does.

    statistics are those that `train` filled, or the copies of `evaluate`. y is None unless it went through relu; then
    dy counts where y is above 0.
    """
    rows, constant = rows_of(statistics)
    x_in, gradients = array_at(like_x, x, size), np.empty((5, channels))
    count = 0 if constant else shown_count(mask, size, channels)
    tickets, w = tickets_of(tasks, hands), parameter(like_weight, weight, channels, 1.0)
    arrays = array_at(like_x, dy, size), x_in, array_at(like_x, y, size), mask
    outputs = array_at(like_x, dx, size), array_at(like_x, dresidual, size)
    per_channel = w, rows[MEAN], shift_in(rows, x_in), rows[VAR], gradients
    _backward(of_task, tickets, *(arrays + outputs), count, eps, *per_channel)
    store_at(like_weight, dweight, gradients[DWEIGHT])
    store_at(like_weight, dbias, gradients[DBIAS])
    return tickets[WAITED]


@cached(**_COMPILED)
def backward_in_parts(
    mask, like_x, like_weight, dy, x, y, dx, dresidual, weight, dweight, dbias,
    size, channels, eps, statistics, hands, parts, of_part, partial_shape,
):  # fmt: skip
    """`backward` where a channel is read twice."""
    rows, constant = rows_of(statistics)
    x_in, gradients = array_at(like_x, x, size), np.empty((5, channels))
    count = 0 if constant else shown_count(mask, size, channels)
    shift, w = shift_in(rows, x_in), parameter(like_weight, weight, channels, 1.0)
    arrays = array_at(like_x, dy, size), x_in, array_at(like_x, y, size), mask
    outputs = array_at(like_x, dx, size), array_at(like_x, dresidual, size)
    partial, sums, tickets = np.empty(partial_shape), np.empty((2, channels)), tickets_of(parts, hands)
    _sum_parts(of_part, tickets, *arrays, rows[MEAN], partial)
    _merge_parts(partial, sums)
    waited = tickets[WAITED]
    finish_all_gradients(count, sums, eps, w, shift, rows[VAR], gradients)
    tickets = tickets_of(parts, hands)
    _gradient_parts(of_part, tickets, *arrays, *outputs, rows[MEAN], shift, gradients)
    store_at(like_weight, dweight, gradients[DWEIGHT])
    store_at(like_weight, dbias, gradients[DBIAS])
    return waited + tickets[WAITED]


# -- plans -----------------------------------------------------------------------------------------------------


class Steps(NamedTuple):
    """The calls on arrays of some shape and strides: of each, the function and its last arguments."""

    order: tuple[int, ...]
    """see `Layout`"""
    train: Any
    of_train: tuple[Any, ...]
    of_evaluate: tuple[Any, ...]
    of_statistics: tuple[Any, ...]
    backward: Any
    of_backward: tuple[Any, ...]
    alone: bool
    """whether no call has more than one claim, and needs no help"""

    def hands(self) -> tuple[int, int, int]:
        return ALONE if self.alone else hands()


@functools.lru_cache(maxsize=1024)
def steps_of(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, axis: int, unit: int = 1) -> Steps | None:
    """Strides are in values, or where unit is the itemsize in bytes; None if they leave gaps."""
    layout = layout_of_strides(shape, strides, unit, axis)
    if layout is None:
        return None
    plan, evaluated = (plan_of(layout, itemsize, 1, run) for run in (RUN, EVALUATED_RUN))
    of_two = plan_of(layout, itemsize, 2, BACKWARD_RUN)
    of_statistics = layout.inner, *_of_parts(plan)
    works = [p.tasks if p.fits else p.parts for p in (plan, of_two)] + [evaluated.parts]
    return Steps(
        layout.order,
        train if plan.fits else train_in_parts,
        (plan.tasks, plan.of_task) if plan.fits else (*of_statistics, evaluated.parts, evaluated.of_part),
        (evaluated.parts, evaluated.of_part),
        of_statistics,
        backward if of_two.fits else backward_in_parts,
        (of_two.tasks, of_two.of_task) if of_two.fits else _of_parts(of_two),
        all(count <= step for count, step in works),
    )


def _of_parts(plan: Plan) -> tuple[Any, ...]:
    return plan.parts, plan.of_part, plan.partial
