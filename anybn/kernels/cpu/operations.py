"""Batch norm on NumPy arrays by compiled kernels.

Sums are taken over parts that depend on the shape alone, and merged in a fixed order, so the results do not depend on
the number of threads. Where it pays, a channel is read from memory once: its statistics and its normalization are one
task. Elsewhere the array is read twice, in the order of memory.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from anybn.core import formulas as _core
from anybn.core.call import Call, Gradients, Spec, Statistics, Update
from anybn.core.formulas import Over
from anybn.kernels.cpu import columns as _columns
from anybn.kernels.cpu import rows as _rows
from anybn.kernels.cpu import runs as _runs
from anybn.kernels.cpu import values as _kernels
from anybn.kernels.cpu.plan import EVALUATED_RUN, Plan, plan_of
from anybn.kernels.cpu.sharing import share
from anybn.kernels.layout import alike, as_float64, delivered, destination, parameter

row_kernels = _rows  # see `Backend.normalize_rows`
_KERNELS = {"runs": _runs, "columns": _columns}


def supports(dtype: np.dtype) -> bool:
    """float32, float64, and 16-bit numbers as their bits; float16 where the processor converts it."""
    return dtype in (np.float32, np.float64, np.uint16) or (dtype == np.int16 and _kernels.converts_half())


# -- the operations --------------------------------------------------------------------------------------------


def train(call: Call) -> tuple[np.ndarray, Statistics]:
    """y and the statistics of x."""
    x, spec, weight, bias, residual, _, _, _, out = call
    how, contiguous, (rest,) = alike(x, spec.axis, residual)
    plan = plan_of(how, x.itemsize, 1)
    if not plan.fits:
        call = Call(contiguous, spec, weight, bias, rest, None, None, None, out)
        statistics = batch_statistics(call)
        return evaluate(call, statistics), statistics
    y = destination(contiguous, out)
    numbers, wide = np.empty((5, how.channels)), x.dtype != np.float64
    arrays = (how.flat(contiguous), how.flat(y), None if rest is None else how.flat(rest))
    parameters = (parameter(weight, how.channels, 1.0), parameter(bias, how.channels, 0.0))
    options = (_floor(spec), spec.eps)
    share(_KERNELS[plan.kernels].train, *plan.tasks, *arrays, *options, *parameters, numbers, *plan.of_task)
    return delivered(y, out), Statistics(how.outer * how.inner, numbers[0], None if wide else numbers[1], *numbers[2:4])


def batch_statistics(call: Call) -> Statistics:
    """Mean and variance of every channel."""
    how, x, _ = alike(call.x, call.spec.axis)
    plan = plan_of(how, x.itemsize, 1)
    x = how.flat(x)

    def sums(origin: np.ndarray) -> Any:
        return _summed(plan, _KERNELS[plan.kernels].sum_parts, x, origin)

    with np.errstate(all="ignore"):
        origin = as_float64(x[plan.first])
        return _core.statistics_of_sums(sums, origin, how.outer * how.inner, x.dtype != np.float64)


def _summed(plan: Plan, kernel: Any, *arguments: Any) -> np.ndarray:
    """What a kernel sums over parts, per channel."""
    partial, sums = np.empty(plan.partial), np.empty((2, plan.partial[2]))
    share(kernel, *plan.parts, *arguments, partial, *plan.of_part)
    _KERNELS[plan.kernels].merge_parts(partial, sums)
    return sums


def evaluate(call: Call, statistics: Statistics) -> np.ndarray:
    """y with given statistics."""
    x, spec, weight, bias, residual, _, _, _, out = call
    how, contiguous, (rest,) = alike(x, spec.axis, residual)
    plan = plan_of(how, x.itemsize, 1, EVALUATED_RUN)
    y = destination(contiguous, out)
    arrays = (how.flat(contiguous), how.flat(y), None if rest is None else how.flat(rest), _floor(spec))
    parameters = (spec.eps, parameter(weight, how.channels, 1.0), parameter(bias, how.channels, 0.0))
    share(
        _KERNELS[plan.kernels].normalize_parts, *plan.parts, *arrays, *parameters, *_writable(statistics), *plan.of_part
    )
    return delivered(y, out)


def _floor(spec: Spec) -> float:
    """What y is at least."""
    return 0.0 if spec.relu else -math.inf


def _writable(statistics: Statistics) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Mean, shift and variance; a state's are read-only, for which Numba would compile another version."""
    return np.array(statistics.mean), statistics.shift, np.array(statistics.var)


def gradients(
    call: Call, statistics: Statistics, dy: np.ndarray, active: np.ndarray | None, over: Over | None = None
) -> Gradients:
    """See `anybn.core.formulas.gradients`; weight's and bias's in float64, the residual's left out."""
    x, spec, weight = call[:3]
    how, contiguous, (dy_like, active_like) = alike(x, spec.axis, dy, active)
    assert dy_like is not None
    plan = plan_of(how, x.itemsize, 2)
    dx, numbers = np.empty_like(contiguous), np.empty((5, how.channels))
    inputs = (how.flat(dy_like), how.flat(contiguous), None if active_like is None else how.flat(active_like))
    count = 0 if statistics.count is None else how.outer * how.inner
    weight, (mean, shift, var) = parameter(weight, how.channels, 1.0), _writable(statistics)
    if plan.fits and over is None:
        values = (count, spec.eps, weight, mean, shift, var, numbers)
        share(_KERNELS[plan.kernels].backward, *plan.tasks, *inputs, how.flat(dx), *values, *plan.of_task)
    else:
        sums = _summed(plan, _KERNELS[plan.kernels].gradient_sum_parts, *inputs, mean)
        _kernels.finish_all_gradients(0 if over else count, sums, spec.eps, weight, shift, var, numbers)
        if over is not None:
            with np.errstate(all="ignore"):
                sum_dy, sum_dy_xhat = over(numbers[1], numbers[0])
                numbers[2] = sum_dy / statistics.count
                numbers[3] = sum_dy_xhat / statistics.count / np.sqrt(var + spec.eps)
        share(
            _KERNELS[plan.kernels].gradient_parts,
            *plan.parts,
            *inputs,
            how.flat(dx),
            mean,
            shift,
            numbers,
            *plan.of_part,
        )
    return Gradients(dx, numbers[0], numbers[1], None)


def updated_running_statistics(update: Update, statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """See `anybn.core.formulas.updated_running_statistics`; the count is an int."""
    running_mean, running_var, momentum, ddof, propagate = update
    running_mean, running_var = np.array(running_mean), np.array(running_var)
    batch = (statistics.mean, statistics.shift, statistics.m2, statistics.count)
    _kernels.update_running(*batch, ddof, momentum, propagate, running_mean, running_var)
    return running_mean, running_var
