"""Batch norm on NumPy arrays by compiled kernels; 16-bit numbers come as their bits.

Sums are taken over parts that depend on the shape alone, and merged in a fixed order, so the results do not depend on
the number of threads. Where it pays, a channel is read from memory once: its statistics and its normalization are one
task. Elsewhere the array is read twice, in the order of memory.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from anybn.core import formulas
from anybn.core.call import Call, Gradients, Statistics, Update
from anybn.core.formulas import Over
from anybn.kernels.cpu import columns, rows, runs, values
from anybn.kernels.cpu.plan import BACKWARD_RUN, Plan, plan_of
from anybn.kernels.cpu.sharing import ALONE, note_wait, share
from anybn.kernels.cpu.step import Steps, steps_of
from anybn.kernels.cpu.step import evaluate as evaluate_in_one_step
from anybn.kernels.cpu.step import statistics as statistics_in_one_step
from anybn.kernels.cpu.values import DBIAS, DWEIGHT, M2, MEAN, MEAN_DY, SCALE, SHIFT, SLOPE, VAR
from anybn.kernels.layout import (
    Layout,
    delivered,
    destination,
    lies_like,
    match_layouts,
    parameter,
)

row_kernels = rows  # see `Backend.normalize_rows`
_NO_FLOOR = -math.inf  # see `_floor`
_empty_like = np.empty_like  # in a call on (8, 16), names of modules count
_ndarray, _FLOAT32, _FLOAT64 = np.ndarray, np.dtype(np.float32), np.dtype(np.float64)
_KERNELS = {"runs": runs, "columns": columns}


@functools.cache
def supports(dtype: np.dtype) -> bool:
    """float32, float64, and 16-bit numbers as their bits; float16 where the processor converts it."""
    return dtype in (np.float32, np.float64, np.uint16) or (dtype == np.int16 and values.converts_half())


def takes(call: Call) -> bool:
    """Whether there are kernels for the call's mask: for one that all channels share."""
    return call.mask is None or call.mask.shape[call.spec.axis] == 1


def _positions(mask: np.ndarray | None, shape: tuple[int, ...], axis: int, order: tuple[int, ...]) -> np.ndarray | None:
    """The mask in the order of memory, one value for all channels, which are on this axis of x."""
    if mask is None:
        return None
    wanted = (*shape[:axis], 1, *shape[axis + 1 :])
    return np.array((mask if mask.shape == wanted else np.broadcast_to(mask, wanted)).transpose(order)).reshape(-1)


# -- forward ---------------------------------------------------------------------------------------------------


def train(call: Call) -> tuple[np.ndarray, Statistics, tuple[np.ndarray, np.ndarray] | None]:
    """y, the statistics of x, and what running statistics become, if the call has some to update."""
    x, spec, weight, bias, residual, mask, _, update, out = call
    steps, x = _steps_on(x, spec.axis)
    shown = _positions(mask, x.shape, spec.axis, steps.order)
    channels, y = x.shape[spec.axis], np.empty_like(x) if out is None else destination(x, out)
    rows, running, learning = np.empty((5, channels)), None, None
    if update is not None:
        running, learning = (np.array(update.running_mean), np.array(update.running_var)), update[2:]
    waited = steps.train(
        learning,
        shown,
        None,
        None,
        x.ravel("K"),
        y.ravel("K"),
        None if residual is None else lies_like(x, steps.order, residual).ravel("K"),
        _parameter(weight),
        _parameter(bias),
        *(running or (None, None)),
        x.size,
        channels,
        0.0 if spec.relu else _NO_FLOOR,
        spec.eps,
        rows,
        steps.hands(),
        *steps.of_train,
    )
    if waited:
        note_wait(waited)
    return y if out is None else delivered(y, out), _statistics_of_rows(rows, x, shown), running


def _statistics_of_rows(rows: np.ndarray, x: np.ndarray, shown: np.ndarray | None) -> Statistics:
    """Of the rows that a step has filled."""
    count = x.size // rows.shape[1] if shown is None else int(np.count_nonzero(shown))
    return Statistics(count, rows[MEAN], rows[SHIFT] if x.dtype == _FLOAT64 else None, rows[VAR], rows[M2])


def _steps_on(x: np.ndarray, axis: int) -> tuple[Steps, np.ndarray]:
    """The steps for x, or for a copy of it without gaps, and that: ``ravel("K")`` is its memory from first to last."""
    steps = steps_of(x.shape, x.strides, x.itemsize, axis, x.itemsize)
    if steps is None:
        x = x.copy(order="K")
        steps = steps_of(x.shape, x.strides, x.itemsize, axis, x.itemsize)
        assert steps is not None
    return steps, x


def _parameter(values: np.ndarray | None) -> np.ndarray | None:
    """weight or bias as steps take it: float32 as it lies there, if it can be written to, else as float64."""
    if values is None or (type(values) is _ndarray and values.dtype is _FLOAT32 and values.flags.carray):
        return values
    return values.astype(_FLOAT64)


def batch_statistics(call: Call) -> Statistics:
    """Mean and variance of every channel."""
    steps, x = _steps_on(call.x, call.spec.axis)
    shown, rows = _positions(call.mask, x.shape, call.spec.axis, steps.order), np.empty((5, x.shape[call.spec.axis]))
    waited = statistics_in_one_step(shown, x.ravel("K"), rows, steps.hands(), *steps.of_statistics)
    if waited:
        note_wait(waited)
    return _statistics_of_rows(rows, x, shown)


def evaluate(call: Call, statistics: Statistics) -> np.ndarray:
    """y with given statistics."""
    x, spec, weight, bias, residual, mask, _, _, out = call
    steps, x = _steps_on(x, spec.axis)
    y, shift = np.empty_like(x) if out is None else destination(x, out), statistics.shift
    waited = evaluate_in_one_step(
        None if shift is None else np.array(shift),
        _positions(mask, x.shape, spec.axis, steps.order),
        None,
        None,
        x.ravel("K"),
        y.ravel("K"),
        None if residual is None else lies_like(x, steps.order, residual).ravel("K"),
        _parameter(weight),
        _parameter(bias),
        np.array(statistics.mean),
        np.array(statistics.var),
        x.size,
        x.shape[spec.axis],
        0.0 if spec.relu else _NO_FLOOR,
        spec.eps,
        None,
        steps.hands(),
        *steps.of_evaluate,
    )
    if waited:
        note_wait(waited)
    return y if out is None else delivered(y, out)


@functools.lru_cache(maxsize=1024)
def _steps_at_once(
    dtype: np.dtype, shape: tuple[int, ...], strides: tuple[int, ...], channels: int, axis: int
) -> tuple[int, tuple[Any, ...]] | None:
    """The size, and the last arguments of `step.evaluate`, for arrays that one thread evaluates; None for others."""
    if dtype not in (_FLOAT32, _FLOAT64) or len(shape) < 2 or not -len(shape) <= axis < len(shape):
        return None
    size, axis = math.prod(shape), axis % len(shape)
    if not size or shape[axis] != channels:
        return None
    steps = steps_of(shape, strides, dtype.itemsize, axis, dtype.itemsize)
    return (size, steps.of_evaluate) if steps is not None and steps.alone else None


def evaluate_at_once(
    x: np.ndarray, arrays: tuple[Any, ...], channels: int, axis: int, eps: float, relu: bool
) -> np.ndarray | None:
    """See `Backend.evaluate_at_once`. Of arrays that own their memory, only views can share it."""
    known, (weight, bias, mean, var, *_) = _steps_at_once(x.dtype, x.shape, x.strides, channels, axis), arrays
    if known is None or not x.flags.behaved:
        return None
    wanted = (channels,)
    for a in (mean, var):
        if type(a) is not _ndarray or a.dtype is not _FLOAT64 or a.base is not None or a.shape != wanted:
            return None
    for a in (weight, bias):
        if a is not None and (
            type(a) is not _ndarray
            or a.dtype is not _FLOAT32
            or a.base is not None
            or a.shape != wanted
            or not a.flags.carray
        ):
            return None
    if x.base is not None and any(a is not None and np.may_share_memory(x, a) for a in (weight, bias, mean, var)):
        return None
    size, last = known
    y = _empty_like(x)
    evaluate_in_one_step(
        None, None, None, None, x.ravel("K"), y.ravel("K"), None, weight, bias, mean.copy(), var.copy(),
        size, channels, 0.0 if relu else _NO_FLOOR, eps, None, ALONE, *last,
    )  # fmt: skip
    return y


# -- backward --------------------------------------------------------------------------------------------------


def gradients(
    call: Call,
    statistics: Statistics,
    dy: np.ndarray,
    active: np.ndarray | None,
    wants_residual: bool,
    over: Over | None = None,
) -> Gradients:
    """See `anybn.core.formulas.gradients`; weight's and bias's in float64. active may be y itself, after a relu."""
    if over is None and (rows := _rows_of(statistics)) is not None:
        return _gradients_in_one_step(call, rows, dy, active, wants_residual)
    layout, x, inputs = _inputs(call, dy, active)
    plan, dx = _backward_plan(call, layout), np.empty_like(x)
    dresidual = dy if wants_residual else None
    if wants_residual and not (active is None and call.mask is None):
        dresidual = np.empty_like(x)
    outputs = (layout.flat(dx), None if dresidual is None or dresidual is dy else layout.flat(dresidual))
    mean, shift, var = _writable(statistics)
    found = _summed_gradients(plan, inputs, call, mean, shift, var)
    if over is not None:
        with np.errstate(all="ignore"):
            sum_dy, sum_dy_xhat = over(found[DBIAS], found[DWEIGHT])
            n: Any = statistics.count
            n = max(n, 1) if isinstance(n, int) else np.maximum(n, 1)
            found[MEAN_DY] = sum_dy / n
            found[SLOPE] = sum_dy_xhat / n / np.sqrt(var + call.spec.eps)
    _write_dx(plan, inputs, outputs, mean, shift, found)
    return Gradients(dx, found[DWEIGHT], found[DBIAS], dresidual)


def _rows_of(statistics: Statistics) -> np.ndarray | None:
    """As steps take them; None if they take no such statistics."""
    count, mean, shift, var = statistics[:4]
    if count is None and shift is not None:
        return None
    rows = np.zeros((2 if count is None else 5, len(mean)))
    rows[MEAN], rows[1 if count is None else VAR] = mean, var
    if shift is not None:
        rows[SHIFT] = shift
    return rows


def _gradients_in_one_step(
    call: Call, rows: np.ndarray, dy: np.ndarray, active: np.ndarray | None, wants_residual: bool
) -> Gradients:
    axis, weight = call.spec.axis, call.weight
    steps, x = _steps_on(call.x, axis)
    dx, dweight, dbias = np.empty_like(x), np.empty(x.shape[axis]), np.empty(x.shape[axis])
    hides = active is not None or call.mask is not None
    dresidual = np.empty_like(x) if wants_residual and hides else None
    waited = steps.backward(
        _positions(call.mask, x.shape, axis, steps.order),
        None,
        None,
        lies_like(x, steps.order, dy).ravel("K"),
        x.ravel("K"),
        None if active is None else lies_like(x, steps.order, active).ravel("K"),
        dx.ravel("K"),
        None if dresidual is None else dresidual.ravel("K"),
        _parameter(weight),
        dweight,
        dbias,
        x.size,
        x.shape[axis],
        call.spec.eps,
        rows,
        steps.hands(),
        *steps.of_backward,
    )
    if waited:
        note_wait(waited)
    return Gradients(dx, dweight, dbias, dy if wants_residual and dresidual is None else dresidual)


def gradient_sums(
    call: Call, statistics: Statistics, dy: np.ndarray, active: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """``sum(dy)`` and ``sum(dy * xhat)`` per channel, of a part of an array."""
    layout, _, inputs = _inputs(call, dy, active)
    found = _summed_gradients(_backward_plan(call, layout), inputs, call, *_writable(statistics))
    return found[DBIAS], found[DWEIGHT]


def dx(
    call: Call,
    statistics: Statistics,
    dy: np.ndarray,
    active: np.ndarray | None,
    mean_dy: np.ndarray | None,
    mean_dy_xhat: np.ndarray | None,
) -> np.ndarray:
    """dx of a part of an array, with the means over all of it; without them for constant statistics."""
    layout, x, inputs = _inputs(call, dy, active)
    dx, found, (mean, shift, _) = np.empty_like(x), np.zeros((5, layout.channels)), _writable(statistics)
    with np.errstate(all="ignore"):
        found[SCALE] = formulas.scale_of(np, statistics, call.weight, call.spec.eps)
        if mean_dy is not None and mean_dy_xhat is not None:
            found[MEAN_DY] = mean_dy
            found[SLOPE] = mean_dy_xhat * formulas.reciprocal_std(np, statistics, call.spec.eps)
    _write_dx(_backward_plan(call, layout), inputs, (layout.flat(dx), None), mean, shift, found)
    return dx


def _inputs(call: Call, dy: np.ndarray, active: np.ndarray | None) -> tuple[Layout, np.ndarray, tuple[Any, ...]]:
    """x and its layout; and what backward kernels read, in flat memory: dy, x, active, and for parts the mask."""
    layout, x, (dy_like, active) = match_layouts(call.x, call.spec.axis, dy, active)
    assert dy_like is not None
    active = None if active is None else layout.flat(active)
    shown = _positions(call.mask, x.shape, call.spec.axis, layout.order)
    return layout, x, (layout.flat(dy_like), layout.flat(x), active, shown)


def _backward_plan(call: Call, layout: Layout) -> Plan:
    return plan_of(layout, call.x.itemsize, 2, BACKWARD_RUN)


def _writable(statistics: Statistics) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Mean, shift and variance; a state's are read-only, for which Numba would compile another version."""
    return np.array(statistics.mean), statistics.shift, np.array(statistics.var)


def _summed_gradients(
    plan: Plan, inputs: tuple[Any, ...], call: Call, mean: np.ndarray, shift: np.ndarray | None, var: np.ndarray
) -> np.ndarray:
    """See `values.finish_gradients`; as for constant statistics."""
    found, weight = np.empty((5, len(mean))), parameter(call.weight, len(mean), 1.0)
    partial, sums = np.empty(plan.partial), np.empty((2, len(mean)))
    share(_KERNELS[plan.kernels].sum_parts, *plan.parts, *inputs, mean, partial, *plan.of_part)
    _KERNELS[plan.kernels].merge_parts(partial, sums)
    values.finish_all_gradients(0, sums, call.spec.eps, weight, shift, var, found)
    return found


def _write_dx(
    plan: Plan,
    inputs: tuple[Any, ...],
    outputs: tuple[Any, ...],
    mean: np.ndarray,
    shift: np.ndarray | None,
    found: np.ndarray,
) -> None:
    share(_KERNELS[plan.kernels].gradient_parts, *plan.parts, *inputs, *outputs, mean, shift, found, *plan.of_part)


def updated_running_statistics(update: Update, statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """See `anybn.core.formulas.updated_running_statistics`; the count is an int."""
    running_mean, running_var, momentum, ddof, propagate = update
    running_mean, running_var = np.array(running_mean), np.array(running_var)
    batch = (statistics.mean, statistics.shift, statistics.m2, statistics.count)
    values.update_running(*batch, ddof, momentum, propagate, running_mean, running_var)
    return running_mean, running_var
