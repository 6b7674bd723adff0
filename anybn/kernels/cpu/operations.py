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
from anybn.core.call import Call, Gradients, Spec, Statistics, Update
from anybn.core.formulas import Over
from anybn.kernels.cpu import columns, rows, runs, values
from anybn.kernels.cpu.plan import EVALUATED_RUN, RUN, Plan, plan_of, takes_mask
from anybn.kernels.cpu.sharing import ALONE, hands, note_wait, share
from anybn.kernels.cpu.step import Steps, steps_of
from anybn.kernels.cpu.step import evaluate as evaluate_in_one_step
from anybn.kernels.cpu.values import DBIAS, DWEIGHT, M2, MEAN, MEAN_DY, SCALE, SHIFT, SLOPE, VAR
from anybn.kernels.layout import (
    Layout,
    as_float64,
    delivered,
    destination,
    layout_of,
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
    """Whether there are kernels for the call's mask, if it has one: for one that all channels share."""
    if call.mask is None:
        return True
    if call.mask.shape[call.spec.axis] != 1:
        return call.x.shape[call.spec.axis] == 1
    layout = layout_of(call.x, call.spec.axis) or layout_of(np.empty_like(call.x), call.spec.axis)
    return layout is not None and takes_mask(layout)


def _positions(call: Call, layout: Layout) -> np.ndarray | None:
    """The mask in the order of memory, one value for all channels: ``(outer * inner,)``, not of x's size."""
    mask, axis = call.mask, call.spec.axis
    if mask is None:
        return None
    shape = tuple(1 if i == axis else size for i, size in enumerate(call.x.shape))
    if mask.shape != shape:
        mask = np.broadcast_to(mask, shape)
    return np.array(mask.transpose(layout.order), order="C").reshape(-1)


# -- forward ---------------------------------------------------------------------------------------------------


def train(call: Call) -> tuple[np.ndarray, Statistics, tuple[np.ndarray, np.ndarray] | None]:
    """y, the statistics of x, and what running statistics become, if the call has some to update."""
    x, spec, weight, bias, residual, mask, _, update, out = call
    if mask is not None:
        statistics = batch_statistics(call)
        return evaluate(call, statistics), statistics, None
    steps, x = _steps_on(x, spec.axis)
    channels, y = x.shape[spec.axis], np.empty_like(x) if out is None else destination(x, out)
    rows, running, learning = np.empty((5, channels)), None, None
    if update is not None:
        running, learning = (np.array(update.running_mean), np.array(update.running_var)), update[2:]
    waited = steps.train(
        learning,
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
        ALONE if steps.alone else hands(),
        *steps.of_train,
    )
    if waited:
        note_wait(waited)
    shift = rows[SHIFT] if x.dtype == _FLOAT64 else None
    statistics = Statistics(x.size // channels, rows[MEAN], shift, rows[VAR], rows[M2])
    return y if out is None else delivered(y, out), statistics, running


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
    layout, x, _ = match_layouts(call.x, call.spec.axis)
    mask, count, first = _positions(call, layout), layout.outer * layout.inner, 0
    plan = plan_of(layout, x.itemsize, 1, masked=mask is not None)
    x = layout.flat(x)

    def sums(origin: np.ndarray) -> Any:
        return _summed(plan, _KERNELS[plan.kernels].sum_parts, x, mask, origin)

    if mask is not None:
        count = int(np.count_nonzero(mask))
        outer, inner = divmod(int(mask.argmax()), layout.inner)
        first = outer * layout.channels * layout.inner + inner
    with np.errstate(all="ignore"):
        origin = as_float64(x[first : first + plan.first.stop - plan.first.step + 1 : plan.first.step])
        if not count:
            origin = np.zeros_like(origin)
        statistics = formulas.statistics_of_sums(sums, origin, max(count, 1), x.dtype != np.float64)
        return statistics._replace(count=count)


def _summed(plan: Plan, kernel: Any, *arguments: Any) -> np.ndarray:
    """What a kernel sums over parts, per channel."""
    partial, sums = np.empty(plan.partial), np.empty((2, plan.partial[2]))
    share(kernel, *plan.parts, *arguments, partial, *plan.of_part)
    _KERNELS[plan.kernels].merge_parts(partial, sums)
    return sums


def evaluate(call: Call, statistics: Statistics) -> np.ndarray:
    """y with given statistics."""
    x, spec, weight, bias, residual, mask, _, _, out = call
    if mask is not None or statistics.shift is not None:
        return _evaluate_in_parts(call, statistics)
    steps, x = _steps_on(x, spec.axis)
    y = np.empty_like(x) if out is None else destination(x, out)
    waited = evaluate_in_one_step(
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
        ALONE if steps.alone else hands(),
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
        None, None, x.ravel("K"), y.ravel("K"), None, weight, bias, mean.copy(), var.copy(),
        size, channels, 0.0 if relu else _NO_FLOOR, eps, None, ALONE, *last,
    )  # fmt: skip
    return y


def _evaluate_in_parts(call: Call, statistics: Statistics) -> np.ndarray:
    x, spec, weight, bias, residual, _, _, _, out = call
    layout, x, (residual,) = match_layouts(x, spec.axis, residual)
    mask = _positions(call, layout)
    plan = plan_of(layout, x.itemsize, 1, EVALUATED_RUN, mask is not None)
    y = destination(x, out)
    arrays = (layout.flat(x), layout.flat(y), None if residual is None else layout.flat(residual), mask, _floor(spec))
    parameters = (spec.eps, parameter(weight, layout.channels, 1.0), parameter(bias, layout.channels, 0.0))
    kernel = _KERNELS[plan.kernels].normalize_parts
    share(kernel, *plan.parts, *arrays, *parameters, *_writable(statistics), *plan.of_part)
    return delivered(y, out)


def _floor(spec: Spec) -> float:
    """What y is at least."""
    return 0.0 if spec.relu else _NO_FLOOR


def _writable(statistics: Statistics) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Mean, shift and variance; a state's are read-only, for which Numba would compile another version."""
    return np.array(statistics.mean), statistics.shift, np.array(statistics.var)


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
    if over is None and call.mask is None and (rows := _rows_of(statistics)) is not None:
        return _gradients_in_one_step(call, rows, dy, active, wants_residual)
    layout, x, inputs = _inputs(call, dy, active)
    plan, dx = _backward_plan(call, layout), np.empty_like(x)
    dresidual = dy if wants_residual else None
    if wants_residual and not (active is None and call.mask is None):
        dresidual = np.empty_like(x)
    outputs = (layout.flat(dx), None if dresidual is None or dresidual is dy else layout.flat(dresidual))
    if statistics.count is None:
        count = 0
    else:
        count = layout.outer * layout.inner if call.mask is None else max(int(statistics.count), 1)
    mean, shift, var = _writable(statistics)
    found = _summed_gradients(plan, inputs, call, mean, shift, var, 0 if over else count)
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
    dresidual = np.empty_like(x) if wants_residual and active is not None else None
    waited = steps.backward(
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
        ALONE if steps.alone else hands(),
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
    found = _summed_gradients(_backward_plan(call, layout), inputs, call, *_writable(statistics), 0)
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
    return layout, x, (layout.flat(dy_like), layout.flat(x), active, _positions(call, layout))


def _backward_plan(call: Call, layout: Layout) -> Plan:
    return plan_of(layout, call.x.itemsize, 2, RUN, call.mask is not None)


def _summed_gradients(
    plan: Plan,
    inputs: tuple[Any, ...],
    call: Call,
    mean: np.ndarray,
    shift: np.ndarray | None,
    var: np.ndarray,
    count: int,
) -> np.ndarray:
    """See `values.finish_gradients`."""
    found, weight = np.empty((5, len(mean))), parameter(call.weight, len(mean), 1.0)
    sums = _summed(plan, _KERNELS[plan.kernels].gradient_sum_parts, *inputs, mean)
    values.finish_all_gradients(count, sums, call.spec.eps, weight, shift, var, found)
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
