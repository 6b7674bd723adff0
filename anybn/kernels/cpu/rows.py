"""Norms of rows: so many values, side by side in flat memory, are normalized together.

Parameters take turns in it as channels do in `runs`, ``length`` values each, so a row has some of them: group norm's
those of its channels, layer norm's one for each value. The rows of a sample share them out, and those of the next
sample begin again. Arithmetic is float64, and a row is read from memory once: its sums and its result are one task.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import njit

from anybn.core.call import Call, Gradients, Statistics
from anybn.kernels.cpu.columns import merge_parts
from anybn.kernels.cpu.plan import ROW_BLOCK, ROW_GROUP, RUN_BLOCK, RowPlan, has_few_long_rows, row_plan_of
from anybn.kernels.cpu.runs import run_gradient_sums, run_sums
from anybn.kernels.cpu.sharing import begin, proceed, share, shared
from anybn.kernels.cpu.values import (
    EXACT,
    KERNEL,
    MEAN,
    SCALE,
    SUMS,
    add_compensated,
    at,
    compensated,
    dx_of,
    fill,
    finish_statistics,
    load,
    normalized,
    rstd_of,
    shift_in,
    store,
)

# -- a row whose values have parameters of their own -----------------------------------------------------------


@njit(**EXACT)
def normalize_values(row, out, mean, shift, rstd, weight, bias):
    for k in range(len(row)):
        store(out, k, normalized(row[k], mean, shift, rstd * weight[k], bias[k], None, None))


@njit(**SUMS)
def block_weighted_sums(drow, row, weight, origin):
    s1 = s2 = 0.0
    for k in range(len(row)):
        g = load(drow[k]) * weight[k]
        s1 += g
        s2 += g * (load(row[k]) - origin)
    return s1, s2


@njit(**EXACT)
def weighted_sums(drow, row, weight, mean, shift):
    """``sum(weight * dy)`` and ``sum(weight * dy * (x - mean))``."""
    s1 = s2 = lost1 = lost2 = 0.0
    for start in range(0, len(row), RUN_BLOCK):
        stop = min(start + RUN_BLOCK, len(row))
        b1, b2 = block_weighted_sums(drow[start:stop], row[start:stop], weight[start:stop], mean)
        s1, lost1 = compensated(s1, lost1, b1)
        s2, lost2 = compensated(s2, lost2, b2)
    return s1, s2 if shift is None else s2 - shift * s1


@njit(**EXACT)
def gradient_by_values(drow, row, out, mean, shift, mean_dy, slope, rstd, weight, dweight, dbias):
    """dx; and adds to the gradients of the parameters."""
    for k in range(len(row)):
        g, d = load(drow[k]), load(row[k]) - mean
        if shift is not None:
            d = d - shift
        dbias[k] += g
        dweight[k] += g * (d * rstd)
        store(out, k, dx_of(g * weight[k], row[k], mean, shift, mean_dy, slope, rstd))


# -- a row of runs with one parameter each ---------------------------------------------------------------------


@njit(**EXACT)
def normalize_runs(row, out, mean, shift, rstd, weight, bias, length):
    for c in range(len(weight)):
        run, out_run = row[c * length : (c + 1) * length], out[c * length : (c + 1) * length]
        scale, offset = rstd * weight[c], bias[c]
        for k in range(len(run)):
            store(out_run, k, normalized(run[k], mean, shift, scale, offset, None, None))


@njit(**EXACT)
def weighted_run_sums(drow, row, weight, mean, shift, rstd, length, dweight, dbias):
    """`weighted_sums`; and adds to the gradients of the parameters."""
    s1 = s2 = lost1 = lost2 = 0.0
    for c in range(len(weight)):
        r1, r2 = run_gradient_sums(drow, row, None, None, c * length, (c + 1) * length, 0, mean)
        if shift is not None:
            r2 -= shift * r1
        dbias[c] += r1
        dweight[c] += r2 * rstd
        s1, lost1 = compensated(s1, lost1, r1 * weight[c])
        s2, lost2 = compensated(s2, lost2, r2 * weight[c])
    return s1, s2


@njit(**EXACT)
def gradient_by_runs(drow, row, out, mean, shift, mean_dy, slope, rstd, weight, length):
    """dx alone: the parameters' gradients come with the sums."""
    for c in range(len(weight)):
        start, stop, w = c * length, (c + 1) * length, weight[c]
        drun, run, out_run = drow[start:stop], row[start:stop], out[start:stop]
        for k in range(len(run)):
            store(out_run, k, dx_of(load(drun[k]) * w, run[k], mean, shift, mean_dy, slope, rstd))


# -- tasks -----------------------------------------------------------------------------------------------------


@shared(**KERNEL)
def forward(tickets, x, y, values, centered, eps, weight, bias, length, statistics):
    """Rows from statistics to y. Not centered, the mean is 0 whatever the values."""
    mean, shift, scale, per_row = statistics[MEAN], shift_in(statistics, x), statistics[SCALE], values // length
    sums, group = np.empty((2, len(mean))), max(1, ROW_GROUP // values)
    first, last = begin(tickets)
    while first < last:
        for r0 in range(first, last, group):
            r1 = min(r0 + group, last)
            for r in range(r0, r1):
                start, stop = r * values, (r + 1) * values
                mean[r] = load(x[start]) if centered else 0.0
                s1, s2 = run_sums(x, None, start, stop, 0, mean[r])
                if shift is not None and centered:
                    mean[r] += s1 / values
                    s1, s2 = run_sums(x, None, start, stop, 0, mean[r])
                sums[0, r], sums[1, r] = s1 if centered else 0.0, s2
            finish_statistics(r0, r1, values, sums, eps, None, statistics, shift)
            p = r0 * per_row % len(weight)
            for r in range(r0, r1):
                start, stop = r * values, (r + 1) * values
                row, out, m, s, rstd = x[start:stop], y[start:stop], mean[r], at(shift, r), scale[r]
                w, b = weight[p : p + per_row], bias[p : p + per_row]
                p = p + per_row if p + per_row < len(weight) else 0
                if length == 1:
                    normalize_values(row, out, m, s, rstd, w, b)
                else:
                    normalize_runs(row, out, m, s, rstd, w, b, length)
        first, last = proceed(tickets, first, last)


@shared(**KERNEL)
def backward(
    tickets, dy, x, dx, values, centered, eps, weight, length, mean, shift, var, partial, samples
):  # fmt: skip
    """dx of the rows that share parameters in so many samples, and their sums in ``partial``, ``(2, parts, P)``."""
    per_row = values // length
    sharing = len(weight) // per_row
    dweight, dbias, lost = np.empty(per_row), np.empty(per_row), np.empty((2, per_row))
    first, last = begin(tickets)
    while first < last:
        for number in range(first, last):
            part, p = number // sharing, number % sharing * per_row
            w = weight[p : p + per_row]
            dweights, dbiases = partial[0, part, p : p + per_row], partial[1, part, p : p + per_row]
            for total in (dweights, dbiases, lost[0], lost[1], dweight, dbias):
                fill(total, 0.0)
            n0, n1 = part * samples, min((part + 1) * samples, len(mean) // sharing)
            for n in range(n0, n1):
                r = n * sharing + number % sharing
                start, stop = r * values, (r + 1) * values
                drow, row, out = dy[start:stop], x[start:stop], dx[start:stop]
                m, s, rstd = mean[r], at(shift, r), rstd_of(var[r], eps)
                if length == 1:
                    s1, s2 = weighted_sums(drow, row, w, m, s)
                else:
                    s1, s2 = weighted_run_sums(drow, row, w, m, s, rstd, length, dweight, dbias)
                mean_dy, slope = s1 / values if centered else 0.0, s2 * rstd / values * rstd
                if length == 1:
                    gradient_by_values(drow, row, out, m, s, mean_dy, slope, rstd, w, dweight, dbias)
                else:
                    gradient_by_runs(drow, row, out, m, s, mean_dy, slope, rstd, w, length)
                if (n - n0) % ROW_BLOCK == ROW_BLOCK - 1 or n == n1 - 1:
                    add_compensated(dweights, lost[0], dweight)
                    add_compensated(dbiases, lost[1], dbias)
                    fill(dweight, 0.0)
                    fill(dbias, 0.0)
        first, last = proceed(tickets, first, last)


# -- the operations --------------------------------------------------------------------------------------------


def takes(call: Call) -> bool:
    """Whether to call `normalize`; if not, a row is one of batch norm's channels, which several threads share."""
    has_one_weight = call.bias is None if call.weight is None else call.spec.values == call.spec.shape[2]
    return not (has_one_weight and has_few_long_rows(call.spec))


def _copied(plan: RowPlan, values: np.ndarray | None, default: float) -> np.ndarray:
    """A parameter's values as float64, as many as the kernels need."""
    if values is None:
        return np.full(plan.parameters, default)
    values = values.astype(np.float64).reshape(-1)
    return values if plan.copies == 1 else values.repeat(plan.copies)


def normalize(call: Call) -> tuple[np.ndarray, Statistics]:
    """See `Backend.normalize_rows`."""
    x, spec, weight, bias = call[:4]
    plan = row_plan_of(spec, x.itemsize, weight is not None or bias is not None)
    x = np.ascontiguousarray(x)
    y, found = np.empty_like(x), np.empty((5, plan.rows[0]))
    arrays = x.reshape(-1), y.reshape(-1), spec.values, spec.centered, spec.eps
    share(forward, *plan.rows, *arrays, _copied(plan, weight, 1.0), _copied(plan, bias, 0.0), plan.length, found)
    mean, shift, var, m2, _ = found
    return y, Statistics(spec.values, mean, shift if x.dtype == np.float64 else None, var, m2)


def gradients(call: Call, statistics: Statistics, dy: np.ndarray) -> Gradients:
    """See `Backend.row_gradients`; weight's and bias's in float64."""
    x, spec, weight, bias = call[:4]
    plan = row_plan_of(spec, x.itemsize, weight is not None or bias is not None)
    dy, x = np.ascontiguousarray(dy), np.ascontiguousarray(x)
    dx, partial = np.empty_like(x), np.empty((2, plan.parts, plan.parameters))
    arrays = dy.reshape(-1), x.reshape(-1), dx.reshape(-1), spec.values, spec.centered, spec.eps
    given = _copied(plan, weight, 1.0), plan.length, statistics.mean, statistics.shift, statistics.var
    share(backward, *plan.tasks, *arrays, *given, partial, plan.samples)
    sums = partial[:, 0]
    if plan.parts > 1:
        sums = np.empty((2, plan.parameters))
        merge_parts(partial, sums)
    if plan.copies > 1:
        sums = sums.reshape(2, -1, plan.copies).sum(2)
    dweight, dbias = (
        None if a is None else total.reshape(a.shape) for a, total in zip((weight, bias), sums, strict=True)
    )
    return Gradients(dx, dweight, dbias, None)
