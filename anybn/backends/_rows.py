"""Kernels for rows: flat memory in which ``values`` neighbours are normalized together, each with its parameters.

Parameters take turns in it as channels do elsewhere, ``repeat`` values each, so a row has some of them, the same as the
row of the next sample. Group norm's are those of its channels; layer norm's change with every value, and are vectors
beside the row. Arithmetic is float64, and a row is read from memory once: its sums and its result are one task.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from numba import njit

from anybn._core import Gradients, RowSpec, Statistics
from anybn.backends._columns import ROWS, merge_parts
from anybn.backends._fused import CLAIMS, GRAIN, supports
from anybn.backends._kernels import (
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
from anybn.backends._runs import BLOCK, run_gradient_sums, run_sums
from anybn.backends._sharing import begin, proceed, share

__all__ = ["gradients", "normalize", "supports"]

#: Values of one parameter side by side that are worth a loop of their own; fewer get a copy of it each.
RUN = 32
#: Samples at least whose sums for the parameters are kept together: those of fewer would take more memory than x.
SAMPLES = 4


# -- a row -----------------------------------------------------------------------------------------------------


@njit(**EXACT)
def normalize_row(row, out, mean, shift, rstd, weight, bias, repeat):
    if repeat == 1:
        for k in range(len(row)):
            store(out, k, normalized(row[k], mean, shift, rstd * weight[k], bias[k], None, -np.inf))
        return
    for c in range(len(weight)):
        part, out_part = row[c * repeat : (c + 1) * repeat], out[c * repeat : (c + 1) * repeat]
        scale, offset = rstd * weight[c], bias[c]
        for k in range(len(part)):
            store(out_part, k, normalized(part[k], mean, shift, scale, offset, None, -np.inf))


@njit(**SUMS)
def block_weighted_sums(drow, row, weight, origin):
    s1 = s2 = 0.0
    for k in range(len(row)):
        g = load(drow[k]) * weight[k]
        s1 += g
        s2 += g * (load(row[k]) - origin)
    return s1, s2


@njit(**EXACT)
def weighted_sums(drow, row, weight, mean, shift, rstd, repeat, dweight, dbias):
    """``sum(weight * dy)`` and ``sum(weight * dy * (x - mean))``; and where a parameter has a run of values, its
    gradient."""
    s1 = s2 = lost1 = lost2 = 0.0
    if repeat == 1:
        for b in range(0, len(row), BLOCK):
            e = min(b + BLOCK, len(row))
            b1, b2 = block_weighted_sums(drow[b:e], row[b:e], weight[b:e], mean)
            s1, lost1 = compensated(s1, lost1, b1)
            s2, lost2 = compensated(s2, lost2, b2)
        return s1, s2 if shift is None else s2 - shift * s1
    for c in range(len(weight)):
        b1, b2 = run_gradient_sums(drow, row, None, c * repeat, (c + 1) * repeat, mean)
        if shift is not None:
            b2 -= shift * b1
        dbias[c] += b1
        dweight[c] += b2 * rstd
        s1, lost1 = compensated(s1, lost1, b1 * weight[c])
        s2, lost2 = compensated(s2, lost2, b2 * weight[c])
    return s1, s2


@njit(**EXACT)
def gradient_row(drow, row, out, weight, mean, shift, k1, k2, rstd, repeat, dweight, dbias):
    """dx; and where a parameter has one value, its gradient."""
    if repeat == 1:
        for k in range(len(row)):
            g, d = load(drow[k]), load(row[k]) - mean
            if shift is not None:
                d = d - shift
            dbias[k] += g
            dweight[k] += g * (d * rstd)
            store(out, k, gradient_through(g * weight[k], row[k], mean, shift, k1, k2, rstd))
        return
    for c in range(len(weight)):
        first, last, w = c * repeat, (c + 1) * repeat, weight[c]
        dpart, part, out_part = drow[first:last], row[first:last], out[first:last]
        for k in range(len(part)):
            store(out_part, k, gradient_through(load(dpart[k]) * w, part[k], mean, shift, k1, k2, rstd))


# -- tasks -----------------------------------------------------------------------------------------------------


@njit(**KERNEL)
def forward(tickets, offers, seen, x, y, values, centered, eps, weight, bias, repeat, numbers):
    """Rows from statistics to y; for numbers see `settle`. Not centered, the mean is 0 whatever the values."""
    mean, shift, own = numbers[0], shift_in(numbers, x), values // repeat
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
            p = b // repeat % len(weight)
            parameters = weight[p : p + own], bias[p : p + own]
            normalize_row(x[b:e], y[b:e], mean[r], at(shift, r), numbers[4, r], *parameters, repeat)
        first, last = proceed(tickets, offers, seen, last - first)


@njit(**KERNEL)
def backward(
    tickets, offers, seen, dy, x, dx, values, centered, eps, weight, repeat, mean, shift, var, partial, samples
):  # fmt: skip
    """dx of the rows that share parameters in so many samples, and their sums in ``partial``, ``(2, parts, P)``."""
    own = values // repeat
    sharing = len(weight) // own
    sums, lost = np.empty((2, own)), np.empty((2, own))
    dweight, dbias = sums[0], sums[1]
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
                drow, row, m, s, rstd = dy[b:e], x[b:e], mean[r], at(shift, r), rstd_of(var[r], eps)
                s1, s2 = weighted_sums(drow, row, w, m, s, rstd, repeat, dweight, dbias)
                k1, k2 = s1 / values if centered else 0.0, s2 * rstd / values * rstd
                gradient_row(drow, row, dx[b:e], w, m, s, k1, k2, rstd, repeat, dweight, dbias)
                if (n - n0) % ROWS == ROWS - 1 or n == n1 - 1:
                    add_compensated(dweights, lost[0], dweight)
                    add_compensated(dbiases, lost[1], dbias)
                    fill(dweight, 0.0)
                    fill(dbias, 0.0)
        first, last = proceed(tickets, offers, seen, last - first)


# -- the operations --------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How the kernels go through rows, which depends on the shape alone."""

    repeat: int
    """values of one parameter side by side, after"""
    copies: int
    """of each parameter have been laid side by side"""
    parameters: int
    """of which there are then so many"""
    rows: tuple[int, int]
    """how many, and how many go with one claim"""
    samples: int
    """whose sums are one part of the parameters' gradients"""
    parts: int
    tasks: tuple[int, int]
    """of the backward pass: how many, and how many go with one claim"""


@functools.lru_cache(maxsize=1024)
def plan_of(shape: tuple[int, int, int], values: int, itemsize: int, weighted: bool) -> Plan:
    """The plan for an array of shape (N, P, L), whose rows have the same parameter all over if it is not weighted."""
    samples, parameters, repeat = shape
    if not weighted:
        samples, parameters, repeat = math.prod(shape) // values, 1, values
    copies = repeat if repeat < RUN and repeat < values else 1
    sharing = parameters * repeat // values

    def claims(arrays: int) -> int:
        return max(1, min(CLAIMS, math.prod(shape) * itemsize * arrays // GRAIN))

    rows, parts = samples * sharing, max(1, min(samples // SAMPLES, -(-claims(2) // sharing)))
    per_part = -(-samples // parts)
    parts = -(-samples // per_part)
    tasks = parts * sharing
    return Plan(
        repeat // copies,
        copies,
        parameters * copies,
        (rows, -(-rows // claims(1))),
        per_part,
        parts,
        (tasks, -(-tasks // claims(2))),
    )


def _spread(plan: Plan, values: np.ndarray | None, default: float) -> np.ndarray:
    """A parameter's values as float64, as many as the kernels need."""
    if values is None:
        return np.full(plan.parameters, default)
    values = values.astype(np.float64)
    return values if plan.copies == 1 else values.repeat(plan.copies)


def normalize(
    x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None, spec: RowSpec
) -> tuple[np.ndarray, Statistics]:
    """See `Backend.normalize_rows`."""
    plan = plan_of(x.shape, spec.values, x.itemsize, weight is not None or bias is not None)
    x = np.ascontiguousarray(x)
    y, numbers = np.empty_like(x), np.empty((5, plan.rows[0]))
    arrays = x.reshape(-1), y.reshape(-1), spec.values, spec.centered, spec.eps
    share(forward, *plan.rows, *arrays, _spread(plan, weight, 1.0), _spread(plan, bias, 0.0), plan.repeat, numbers)
    shift = numbers[1] if x.dtype == np.float64 else None
    return y, Statistics(spec.values, numbers[0], shift, numbers[2], numbers[3])


def gradients(
    dy: np.ndarray,
    x: np.ndarray,
    statistics: Statistics,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    spec: RowSpec,
) -> Gradients:
    """See `Backend.row_gradients`; weight's and bias's in float64, whether there are such or not."""
    plan = plan_of(x.shape, spec.values, x.itemsize, weight is not None or bias is not None)
    dy, x = np.ascontiguousarray(dy), np.ascontiguousarray(x)
    dx, partial = np.empty_like(x), np.empty((2, plan.parts, plan.parameters))
    arrays = dy.reshape(-1), x.reshape(-1), dx.reshape(-1), spec.values, spec.centered, spec.eps
    given = _spread(plan, weight, 1.0), plan.repeat, statistics.mean, statistics.shift, statistics.var
    share(backward, *plan.tasks, *arrays, *given, partial, plan.samples)
    sums = partial[:, 0]
    if plan.parts > 1:
        sums = np.empty((2, plan.parameters))
        merge_parts(partial, sums)
    dweight, dbias = sums if plan.copies == 1 else sums.reshape(2, -1, plan.copies).sum(2)
    return Gradients(dx, dweight, dbias, None)
