"""Norms of rows: so many values, side by side in flat memory, are normalized together.

Parameters take turns in it as channels do in `runs`, ``length`` values each, so a row has some of them: group norm's
those of its channels, layer norm's one for each value. The rows of a sample share them out, and those of the next
sample begin again. Arithmetic is float64, and a row is read from memory once: its sums and its result are one task.

Rows are short, of 64 values often, which takes 20 ns: hence everything about a row is compiled into one loop. Backward
takes two rows at a time that lie far apart: they share what is read and added of the parameters, and the processor
fetches both ahead, as it does not with rows side by side.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import njit

from anybn.core.call import Call, Gradients, Statistics
from anybn.kernels.cpu.cached import cached
from anybn.kernels.cpu.columns import merge_parts
from anybn.kernels.cpu.plan import ROW_BLOCK, ROW_GROUP, RUN_BLOCK, RowPlan, has_few_long_rows, row_plan_of
from anybn.kernels.cpu.primitives import part_of_callers, writes_apart
from anybn.kernels.cpu.sharing import WAITED, begin, proceed, share, shared, tickets_of
from anybn.kernels.cpu.sharing import hands_for as hands_for  # these two for who calls by address
from anybn.kernels.cpu.sharing import note_wait as note_wait
from anybn.kernels.cpu.spreading import gather, spread
from anybn.kernels.cpu.step import array_at, store_at
from anybn.kernels.cpu.step import parameter as parameter_at
from anybn.kernels.cpu.values import (
    EXACT,
    FUSED,
    KERNEL,
    M2,
    MEAN,
    SCALE,
    SUMS,
    VAR,
    add_compensated,
    at,
    compensated,
    deviation,
    dx_of,
    fill,
    load,
    normalized,
    rstd_of,
    shift_in,
    store,
)
from anybn.kernels.layout import parameter

# -- values with parameters of their own -----------------------------------------------------------------------


@njit(**EXACT)
def write_by_values(x, y, mean, shift, rstd, weight, bias):
    writes_apart("y")
    for k in range(len(x)):
        store(y, k, normalized(x[k], mean, shift, rstd * weight[k], bias[k], None, None))


@njit(**SUMS)
def sums_by_values(dy, x, weight, mean, shift, rstd, dweight, dbias):
    """``sum(weight * dy)`` and ``sum(weight * dy * (x - mean))``; and adds to the gradients of the parameters."""
    writes_apart("dweight dbias")
    s1 = s2 = 0.0
    for k in range(len(x)):
        g, d = load(dy[k]), deviation(x[k], mean, shift)
        s1 += g * weight[k]
        s2 += g * weight[k] * d
        dweight[k] += g * (d * rstd)
        dbias[k] += g
    return s1, s2


@njit(**SUMS)
def sums_by_values_of_two(dy, x, other_dy, other_x, weight, mean, shift, rstd, mean2, shift2, rstd2, dweight, dbias):
    """`sums_by_values` of two rows."""
    writes_apart("dweight dbias")
    s1 = s2 = t1 = t2 = 0.0
    for k in range(len(x)):
        g, d = load(dy[k]), deviation(x[k], mean, shift)
        h, e = load(other_dy[k]), deviation(other_x[k], mean2, shift2)
        s1 += g * weight[k]
        s2 += g * weight[k] * d
        t1 += h * weight[k]
        t2 += h * weight[k] * e
        dweight[k] += g * (d * rstd) + h * (e * rstd2)
        dbias[k] += g + h
    return s1, s2, t1, t2


@njit(**FUSED)
def write_dx_by_values(dy, x, dx, mean, shift, mean_dy, slope, rstd, weight):
    writes_apart("dx")
    for k in range(len(x)):
        store(dx, k, dx_of(load(dy[k]) * weight[k], x[k], mean, shift, mean_dy, slope, rstd))


# -- runs with one parameter each ------------------------------------------------------------------------------


@njit(**EXACT)
def write_by_runs(x, y, mean, shift, rstd, weight, bias, length):
    writes_apart("y")
    for c in range(len(weight)):
        run, out = x[c * length : (c + 1) * length], y[c * length : (c + 1) * length]
        scale, offset = rstd * weight[c], bias[c]
        for k in range(len(run)):
            store(out, k, normalized(run[k], mean, shift, scale, offset, None, None))


@njit(**SUMS)
def block_gradient_sums(dy, x, mean, shift):
    part_of_callers()
    s1 = s2 = 0.0
    for k in range(len(x)):
        g = load(dy[k])
        s1 += g
        s2 += g * deviation(x[k], mean, shift)
    return s1, s2


@njit(**EXACT)
def sums_by_runs(dy, x, weight, mean, shift, rstd, length, dweight, dbias):
    """`sums_by_values`."""
    part_of_callers()
    s1 = s2 = lost1 = lost2 = 0.0
    for c in range(len(weight)):
        r1 = r2 = run_lost1 = run_lost2 = 0.0
        for start in range(c * length, (c + 1) * length, RUN_BLOCK):
            stop = min(start + RUN_BLOCK, (c + 1) * length)
            b1, b2 = block_gradient_sums(dy[start:stop], x[start:stop], mean, shift)
            r1, run_lost1 = compensated(r1, run_lost1, b1)
            r2, run_lost2 = compensated(r2, run_lost2, b2)
        dbias[c] += r1
        dweight[c] += r2 * rstd
        s1, lost1 = compensated(s1, lost1, r1 * weight[c])
        s2, lost2 = compensated(s2, lost2, r2 * weight[c])
    return s1, s2


@njit(**FUSED)
def write_dx_by_runs(dy, x, dx, mean, shift, mean_dy, slope, rstd, weight, length):
    writes_apart("dx")
    for c in range(len(weight)):
        start, stop, w = c * length, (c + 1) * length, weight[c]
        drun, run, out = dy[start:stop], x[start:stop], dx[start:stop]
        for k in range(len(run)):
            store(out, k, dx_of(load(drun[k]) * w, run[k], mean, shift, mean_dy, slope, rstd))


# -- rows forward ----------------------------------------------------------------------------------------------


@njit(**SUMS)
def block_sums(x, origin):
    part_of_callers()
    s1 = s2 = 0.0
    for k in range(len(x)):
        d = load(x[k]) - origin
        s1 += d
        s2 += d * d
    return s1, s2


@njit(**EXACT)
def row_sums(x, values, r, origin):
    """``sum(x - origin)`` and ``sum((x - origin)**2)`` of row r."""
    part_of_callers()
    s1 = s2 = lost1 = lost2 = 0.0
    for start in range(r * values, (r + 1) * values, RUN_BLOCK):
        b1, b2 = block_sums(x[start : min(start + RUN_BLOCK, (r + 1) * values)], origin)
        s1, lost1 = compensated(s1, lost1, b1)
        s2, lost2 = compensated(s2, lost2, b2)
    return s1, s2


@njit(**EXACT)
def find_statistics(x, values, centered, eps, r0, r1, statistics, shift):
    """Statistics of rows r0 to r1. Not centered, the mean is 0 whatever the values."""
    part_of_callers()
    mean, var, m2, scale = statistics[MEAN], statistics[VAR], statistics[M2], statistics[SCALE]
    for r in range(r0, r1):
        mean[r] = load(x[r * values]) if centered else 0.0
        s1, s2 = row_sums(x, values, r, mean[r])
        if shift is not None and centered:
            mean[r] += s1 / values
            s1, s2 = row_sums(x, values, r, mean[r])
        var[r], m2[r] = s1, s2
    for r in range(r0, r1):
        step = var[r] / values if centered else 0.0
        m2[r] -= var[r] * step
        if shift is None:
            mean[r] += step
        else:
            shift[r] = step
        var[r] = m2[r] / values
        scale[r] = rstd_of(var[r], eps)


@njit(**EXACT)
def write_rows(x, y, values, r0, r1, mean, shift, rstd, weight, bias, length):
    """y in rows r0 to r1."""
    part_of_callers()
    per_row = values // length
    p = r0 * per_row % len(weight)
    for r in range(r0, r1):
        row, out = x[r * values : (r + 1) * values], y[r * values : (r + 1) * values]
        w, b = weight[p : p + per_row], bias[p : p + per_row]
        p = p + per_row if p + per_row < len(weight) else 0
        if length == 1:
            write_by_values(row, out, mean[r], at(shift, r), rstd[r], w, b)
        else:
            write_by_runs(row, out, mean[r], at(shift, r), rstd[r], w, b, length)


@shared(**KERNEL)
def forward(tickets, x, y, values, centered, eps, weight, bias, length, statistics):
    """Rows from statistics to y."""
    mean, shift, rstd = statistics[MEAN], shift_in(statistics, x), statistics[SCALE]
    group = max(1, ROW_GROUP // values)
    first, last = begin(tickets)
    while first < last:
        for r0 in range(first, last, group):
            r1 = min(r0 + group, last)
            find_statistics(x, values, centered, eps, r0, r1, statistics, shift)
            write_rows(x, y, values, r0, r1, mean, shift, rstd, weight, bias, length)
        first, last = proceed(tickets, first, last)


# -- rows backward ---------------------------------------------------------------------------------------------


@njit(**EXACT)
def write_dx(dy, x, dx, values, centered, r, weight, mean, shift, rstd, s1, s2, length):
    """dx in row r, by `sums_by_values` of it."""
    part_of_callers()
    start, stop = r * values, (r + 1) * values
    mean_dy, slope = s1 / values if centered else 0.0, s2 * rstd / values * rstd
    drow, row, out = dy[start:stop], x[start:stop], dx[start:stop]
    if length == 1:
        write_dx_by_values(drow, row, out, mean[r], at(shift, r), mean_dy, slope, rstd, weight)
    else:
        write_dx_by_runs(drow, row, out, mean[r], at(shift, r), mean_dy, slope, rstd, weight, length)


@njit(**EXACT)
def backward_row(dy, x, dx, values, centered, eps, r, weight, mean, shift, var, length, dweight, dbias):
    """dx in row r; and adds to the gradients of the parameters."""
    part_of_callers()
    m, s, k, s1, s2, lost1, lost2 = mean[r], at(shift, r), rstd_of(var[r], eps), 0.0, 0.0, 0.0, 0.0
    if length > 1:
        start, stop = r * values, (r + 1) * values
        s1, s2 = sums_by_runs(dy[start:stop], x[start:stop], weight, m, s, k, length, dweight, dbias)
    else:
        for first in range(0, values, RUN_BLOCK):
            last = min(first + RUN_BLOCK, values)
            start, stop = r * values + first, r * values + last
            w, dw, db = weight[first:last], dweight[first:last], dbias[first:last]
            b1, b2 = sums_by_values(dy[start:stop], x[start:stop], w, m, s, k, dw, db)
            s1, lost1 = compensated(s1, lost1, b1)
            s2, lost2 = compensated(s2, lost2, b2)
    write_dx(dy, x, dx, values, centered, r, weight, mean, shift, k, s1, s2, length)


@njit(**EXACT)
def backward_two(dy, x, dx, values, centered, eps, r, q, weight, mean, shift, var, dweight, dbias):
    """`backward_row` of rows r and q, whose values have parameters of their own."""
    part_of_callers()
    m, s, k, mq, sq, kq = mean[r], at(shift, r), rstd_of(var[r], eps), mean[q], at(shift, q), rstd_of(var[q], eps)
    r1 = r2 = q1 = q2 = lost1 = lost2 = lost3 = lost4 = 0.0
    for first in range(0, values, RUN_BLOCK):
        last = min(first + RUN_BLOCK, values)
        start, stop, start_q, stop_q = r * values + first, r * values + last, q * values + first, q * values + last
        w, dw, db = weight[first:last], dweight[first:last], dbias[first:last]
        b1, b2, b3, b4 = sums_by_values_of_two(
            dy[start:stop], x[start:stop], dy[start_q:stop_q], x[start_q:stop_q], w, m, s, k, mq, sq, kq, dw, db
        )
        r1, lost1 = compensated(r1, lost1, b1)
        r2, lost2 = compensated(r2, lost2, b2)
        q1, lost3 = compensated(q1, lost3, b3)
        q2, lost4 = compensated(q2, lost4, b4)
    write_dx(dy, x, dx, values, centered, r, weight, mean, shift, k, r1, r2, 1)
    write_dx(dy, x, dx, values, centered, q, weight, mean, shift, kq, q1, q2, 1)


@shared(**KERNEL)
def backward(
    tickets, dy, x, dx, values, centered, eps, weight, copies, length, mean, shift, var, partial, samples
):  # fmt: skip
    """dx of the rows that share parameters in so many samples, and their sums in ``partial``, ``(2, parts, P)``.

    Of each parameter there are so many copies in a row of their own, each for ``length`` values.
    """
    columns = values // length
    per_row = columns // copies
    sharing = len(weight) // per_row
    w, dweight, dbias = np.empty(columns), np.empty(columns), np.empty(columns)
    dweights, dbiases, lost = np.empty(columns), np.empty(columns), np.empty((2, columns))
    first, last = begin(tickets)
    while first < last:
        for number in range(first, last):
            part, p = number // sharing, number % sharing * per_row
            spread(weight[p : p + per_row], copies, 0, w)
            for total in (dweights, dbiases, lost[0], lost[1], dweight, dbias):
                fill(total, 0.0)
            n0, n1 = part * samples, min((part + 1) * samples, len(mean) // sharing)
            pairs = (n1 - n0) // 2 if length == 1 else 0
            apart, turns = pairs * sharing, n1 - n0 - pairs
            for i in range(turns):
                r = (n0 + i) * sharing + number % sharing
                q = r + apart
                if i < pairs:
                    backward_two(dy, x, dx, values, centered, eps, r, q, w, mean, shift, var, dweight, dbias)
                else:
                    backward_row(dy, x, dx, values, centered, eps, q, w, mean, shift, var, length, dweight, dbias)
                if i % ROW_BLOCK == ROW_BLOCK - 1 or i == turns - 1:
                    add_compensated(dweights, lost[0], dweight)
                    add_compensated(dbiases, lost[1], dbias)
                    fill(dweight, 0.0)
                    fill(dbias, 0.0)
            gather(dweights, columns, copies, partial[0, part, p : p + per_row])
            gather(dbiases, columns, copies, partial[1, part, p : p + per_row])
        first, last = proceed(tickets, first, last)


# -- calls by address: see `step` -------------------------------------------------------------------------------


@njit(**EXACT)
def parameters_at(like, address, count, copies, default):
    """weight or bias as float64, with so many copies of each."""
    values = parameter_at(like, address, count, default)
    if copies > 1:
        given, values = values, np.empty(count * copies)
        spread(given, copies, 0, values)
    return values


@cached(**KERNEL)
def normalize_at(
    like_x, like_weight, x, y, weight, bias, size, values, centered, eps, parameters, copies, length, statistics,
    hands, work,
):  # fmt: skip
    """Fill y and statistics. Returns nanoseconds for `sharing.note_wait`."""
    tickets, arrays = tickets_of(work, hands), (array_at(like_x, x, size), array_at(like_x, y, size))
    w = parameters_at(like_weight, weight, parameters, copies, 1.0)
    b = parameters_at(like_weight, bias, parameters, copies, 0.0)
    forward(tickets, *arrays, values, centered, eps, w, b, length, statistics)
    return tickets[WAITED]


@cached(**KERNEL)
def differentiate_at(
    like_x, like_weight, dy, x, dx, weight, dweight, dbias, size, values, centered, eps, parameters, copies, length,
    statistics, partial, samples, hands, work,
):  # fmt: skip
    """Fill dx, and dweight and dbias where they have an address. Returns what `normalize_at` does."""
    tickets, x_in = tickets_of(work, hands), array_at(like_x, x, size)
    mean, shift, var = statistics[MEAN], shift_in(statistics, x_in), statistics[VAR]
    w, dx_out = parameter_at(like_weight, weight, parameters, 1.0), array_at(like_x, dx, size)
    dy_in = array_at(like_x, dy, size)
    backward(tickets, dy_in, x_in, dx_out, values, centered, eps, w, copies, length, mean, shift, var, partial, samples)
    sums = np.empty((2, parameters))
    merge_parts(partial, sums)
    store_at(like_weight, dweight, sums[0])
    store_at(like_weight, dbias, sums[1])
    return tickets[WAITED]


# -- the operations --------------------------------------------------------------------------------------------


def takes(call: Call) -> bool:
    """Whether to call `normalize`; if not, a row is one of batch norm's channels, which several threads share."""
    has_one_weight = call.bias is None if call.weight is None else call.spec.values == call.spec.shape[2]
    return not (has_one_weight and has_few_long_rows(call.spec))


def _parameter(plan: RowPlan, values: np.ndarray | None, default: float) -> np.ndarray:
    return parameter(None if values is None else values.reshape(-1), plan.parameters, default)


def normalize(call: Call) -> tuple[np.ndarray, Statistics]:
    """See `Backend.normalize_rows`."""
    x, spec, weight, bias = call[:4]
    plan = row_plan_of(spec, x.itemsize, weight is not None or bias is not None)
    x = np.ascontiguousarray(x)
    y, found = np.empty_like(x), np.empty((5, plan.rows[0]))
    w, b = _parameter(plan, weight, 1.0), _parameter(plan, bias, 0.0)
    if plan.copies > 1:
        w, b = w.repeat(plan.copies), b.repeat(plan.copies)
    arrays = x.reshape(-1), y.reshape(-1), spec.values, spec.centered, spec.eps
    share(forward, *plan.rows, *arrays, w, b, plan.length // plan.copies, found)
    mean, shift, var, m2, _ = found
    return y, Statistics(spec.values, mean, shift if x.dtype == np.float64 else None, var, m2)


def gradients(call: Call, statistics: Statistics, dy: np.ndarray) -> Gradients:
    """See `Backend.row_gradients`; weight's and bias's in float64."""
    x, spec, weight, bias = call[:4]
    plan = row_plan_of(spec, x.itemsize, weight is not None or bias is not None)
    dy, x = np.ascontiguousarray(dy), np.ascontiguousarray(x)
    dx, partial = np.empty_like(x), np.empty((2, plan.parts, plan.parameters))
    arrays = dy.reshape(-1), x.reshape(-1), dx.reshape(-1), spec.values, spec.centered, spec.eps
    lengths = plan.backward_copies, plan.length // plan.backward_copies
    given = _parameter(plan, weight, 1.0), *lengths, statistics.mean, statistics.shift, statistics.var
    share(backward, *plan.tasks, *arrays, *given, partial, plan.samples)
    sums = partial[:, 0]
    if plan.parts > 1:
        sums = np.empty((2, plan.parameters))
        merge_parts(partial, sums)
    dweight, dbias = (
        None if a is None else total.reshape(a.shape) for a, total in zip((weight, bias), sums, strict=True)
    )
    return Gradients(dx, dweight, dbias, None)
