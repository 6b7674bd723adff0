"""Kernels for rows: flat memory in which so many values, side by side, are normalized together.

Parameters take turns in it as channels do in `_runs`, ``length`` values each, so a row has some of them: group norm's
those of its channels, layer norm's one for each value. The rows of a sample share them out, and those of the next
sample begin again. Arithmetic is float64, and a row is read from memory once: its sums and its result are one task.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from numba import njit

from anybn.core.call import Call, Gradients, RowSpec, Statistics
from anybn.kernels.cpu.cached import cached
from anybn.kernels.cpu.columns import ROWS, merge_parts
from anybn.kernels.cpu.runs import BLOCK, run_gradient_sums, run_sums
from anybn.kernels.cpu.sharing import CLAIMS, GRAIN, begin, proceed, share
from anybn.kernels.cpu.values import (
    EXACT,
    KERNEL,
    SUMS,
    add_compensated,
    at,
    compensated,
    fill,
    gradient_through,
    load,
    normalized,
    rstd_of,
    settle,
    shift_in,
    store,
)

#: Values of one parameter that are worth a loop of their own; fewer get a copy of it each.
RUN = 32
#: Fewer rows than this, of more values than that, cannot keep all threads busy, who take a row each.
FEW, LONG = 16, 1 << 18
#: Samples at least whose sums for the parameters are kept together: those of fewer would take more memory than x.
SAMPLES = 4


# -- a row whose values have parameters of their own -----------------------------------------------------------


@njit(**EXACT)
def normalize_values(row, out, mean, shift, rstd, weight, bias):
    for k in range(len(row)):
        store(out, k, normalized(row[k], mean, shift, rstd * weight[k], bias[k], None, -np.inf))


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
    for b in range(0, len(row), BLOCK):
        e = min(b + BLOCK, len(row))
        b1, b2 = block_weighted_sums(drow[b:e], row[b:e], weight[b:e], mean)
        s1, lost1 = compensated(s1, lost1, b1)
        s2, lost2 = compensated(s2, lost2, b2)
    return s1, s2 if shift is None else s2 - shift * s1


@njit(**EXACT)
def gradient_by_values(drow, row, out, mean, shift, k1, k2, rstd, weight, dweight, dbias):
    """dx, see `gradient_through`; and adds to the gradients of the parameters."""
    for k in range(len(row)):
        g, d = load(drow[k]), load(row[k]) - mean
        if shift is not None:
            d = d - shift
        dbias[k] += g
        dweight[k] += g * (d * rstd)
        store(out, k, gradient_through(g * weight[k], row[k], mean, shift, k1, k2, rstd))


# -- a row of runs with one parameter each ---------------------------------------------------------------------


@njit(**EXACT)
def normalize_runs(row, out, mean, shift, rstd, weight, bias, length):
    for c in range(len(weight)):
        run, out_run = row[c * length : (c + 1) * length], out[c * length : (c + 1) * length]
        scale, offset = rstd * weight[c], bias[c]
        for k in range(len(run)):
            store(out_run, k, normalized(run[k], mean, shift, scale, offset, None, -np.inf))


@njit(**EXACT)
def weighted_run_sums(drow, row, weight, mean, shift, rstd, length, dweight, dbias):
    """`weighted_sums`; and adds to the gradients of the parameters."""
    s1 = s2 = lost1 = lost2 = 0.0
    for c in range(len(weight)):
        r1, r2 = run_gradient_sums(drow, row, None, c * length, (c + 1) * length, mean)
        if shift is not None:
            r2 -= shift * r1
        dbias[c] += r1
        dweight[c] += r2 * rstd
        s1, lost1 = compensated(s1, lost1, r1 * weight[c])
        s2, lost2 = compensated(s2, lost2, r2 * weight[c])
    return s1, s2


@njit(**EXACT)
def gradient_by_runs(drow, row, out, mean, shift, k1, k2, rstd, weight, length):
    for c in range(len(weight)):
        b, e, w = c * length, (c + 1) * length, weight[c]
        drun, run, out_run = drow[b:e], row[b:e], out[b:e]
        for k in range(len(run)):
            store(out_run, k, gradient_through(load(drun[k]) * w, run[k], mean, shift, k1, k2, rstd))


# -- tasks -----------------------------------------------------------------------------------------------------


@cached(**KERNEL)
def forward(tickets, offers, seen, x, y, values, centered, eps, weight, bias, length, numbers):
    """Rows from statistics to y; for numbers see `settle`. Not centered, the mean is 0 whatever the values."""
    mean, shift, own = numbers[0], shift_in(numbers, x), values // length
    first, last = begin(tickets, offers, seen)
    while first < last:
        for r in range(first, last):
            b, e = r * values, (r + 1) * values
            mean[r] = load(x[b]) if centered else 0.0
            s1, s2 = run_sums(x, b, e, mean[r])
            if shift is not None and centered:
                mean[r] += s1 / values
                s1, s2 = run_sums(x, b, e, mean[r])
            settle(r, values, s1 if centered else 0.0, s2, eps, None, numbers, shift)
            row, out, m, s, rstd = x[b:e], y[b:e], mean[r], at(shift, r), numbers[4, r]
            p = b // length % len(weight)
            if length == 1:
                normalize_values(row, out, m, s, rstd, weight[p : p + own], bias[p : p + own])
            else:
                normalize_runs(row, out, m, s, rstd, weight[p : p + own], bias[p : p + own], length)
        first, last = proceed(tickets, offers, seen, last - first)


@cached(**KERNEL)
def backward(
    tickets, offers, seen, dy, x, dx, values, centered, eps, weight, length, mean, shift, var, partial, samples
):  # fmt: skip
    """dx of the rows that share parameters in so many samples, and their sums in ``partial``, ``(2, parts, P)``."""
    own = values // length
    sharing = len(weight) // own
    dweight, dbias, lost = np.empty(own), np.empty(own), np.empty((2, own))
    first, last = begin(tickets, offers, seen)
    while first < last:
        for q in range(first, last):
            part, p = q // sharing, q % sharing * own
            w, dweights, dbiases = weight[p : p + own], partial[0, part, p : p + own], partial[1, part, p : p + own]
            for total in (dweights, dbiases, lost[0], lost[1], dweight, dbias):
                fill(total, 0.0)
            n0, n1 = part * samples, min((part + 1) * samples, len(mean) // sharing)
            for n in range(n0, n1):
                r = n * sharing + q % sharing
                b, e = r * values, (r + 1) * values
                drow, row, out, m, s, rstd = dy[b:e], x[b:e], dx[b:e], mean[r], at(shift, r), rstd_of(var[r], eps)
                if length == 1:
                    s1, s2 = weighted_sums(drow, row, w, m, s)
                else:
                    s1, s2 = weighted_run_sums(drow, row, w, m, s, rstd, length, dweight, dbias)
                k1, k2 = s1 / values if centered else 0.0, s2 * rstd / values * rstd
                if length == 1:
                    gradient_by_values(drow, row, out, m, s, k1, k2, rstd, w, dweight, dbias)
                else:
                    gradient_by_runs(drow, row, out, m, s, k1, k2, rstd, w, length)
                if (n - n0) % ROWS == ROWS - 1 or n == n1 - 1:
                    add_compensated(dweights, lost[0], dweight)
                    add_compensated(dbiases, lost[1], dbias)
                    fill(dweight, 0.0)
                    fill(dbias, 0.0)
        first, last = proceed(tickets, offers, seen, last - first)


# -- the operations --------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How the kernels go through rows, which depends on the shape alone."""

    length: int
    """values of one parameter side by side, after"""
    copies: int
    """of each parameter have been made;"""
    parameters: int
    """and how many these are"""
    rows: tuple[int, int]
    """how many, and how many go with one claim"""
    samples: int
    """whose sums are one part of the parameters' gradients"""
    parts: int
    tasks: tuple[int, int]
    """of the backward pass: how many, and how many go with one claim"""


@functools.lru_cache(maxsize=1024)
def plan_of(spec: RowSpec, itemsize: int, weighted: bool) -> Plan:
    """The plan for rows, each of which has the same parameter all over if they are not weighted."""
    size, values = math.prod(spec.shape), spec.values
    samples, parameters, length = spec.shape if weighted else (size // values, 1, values)
    copies = length if length < RUN and length < values else 1
    sharing = parameters * length // values

    def claims(arrays: int) -> int:
        return max(1, min(CLAIMS, size * itemsize * arrays // GRAIN))

    rows, parts = samples * sharing, max(1, min(samples // SAMPLES, -(-claims(2) // sharing)))
    per_part = -(-samples // parts)
    parts = -(-samples // per_part)
    tasks = parts * sharing
    return Plan(
        length // copies,
        copies,
        parameters * copies,
        (rows, -(-rows // claims(1))),
        per_part,
        parts,
        (tasks, -(-tasks // claims(2))),
    )


def takes(call: Call) -> bool:
    """Whether to call `normalize`; if not, a row is one of batch norm's channels, which several threads share."""
    spec = call.spec
    has_one = call.bias is None if call.weight is None else spec.values == spec.shape[2]
    return not (has_one and spec.values > LONG and math.prod(spec.shape) < FEW * spec.values)


def _spread(plan: Plan, values: np.ndarray | None, default: float) -> np.ndarray:
    """A parameter's values as float64, as many as the kernels need."""
    if values is None:
        return np.full(plan.parameters, default)
    values = values.astype(np.float64).reshape(-1)
    return values if plan.copies == 1 else values.repeat(plan.copies)


def normalize(call: Call) -> tuple[np.ndarray, Statistics]:
    """See `Backend.normalize_rows`."""
    x, spec, weight, bias = call[:4]
    plan = plan_of(spec, x.itemsize, weight is not None or bias is not None)
    x = np.ascontiguousarray(x)
    y, numbers = np.empty_like(x), np.empty((5, plan.rows[0]))
    arrays = x.reshape(-1), y.reshape(-1), spec.values, spec.centered, spec.eps
    share(forward, *plan.rows, *arrays, _spread(plan, weight, 1.0), _spread(plan, bias, 0.0), plan.length, numbers)
    shift = numbers[1] if x.dtype == np.float64 else None
    return y, Statistics(spec.values, numbers[0], shift, numbers[2], numbers[3])


def gradients(call: Call, statistics: Statistics, dy: np.ndarray) -> Gradients:
    """See `Backend.row_gradients`; weight's and bias's in float64."""
    x, spec, weight, bias = call[:4]
    plan = plan_of(spec, x.itemsize, weight is not None or bias is not None)
    dy, x = np.ascontiguousarray(dy), np.ascontiguousarray(x)
    dx, partial = np.empty_like(x), np.empty((2, plan.parts, plan.parameters))
    arrays = dy.reshape(-1), x.reshape(-1), dx.reshape(-1), spec.values, spec.centered, spec.eps
    given = _spread(plan, weight, 1.0), plan.length, statistics.mean, statistics.shift, statistics.var
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
