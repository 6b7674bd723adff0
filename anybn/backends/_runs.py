"""Kernels for runs: planes ``(N, C, L)`` whose L values of one channel lie side by side.

A thread claims whole channels, each worked on while it lies in the cache; or, where a channel is too large for that or
its statistics are given, segments of runs, in the order of memory.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from numba import njit

from anybn.backends._kernels import (
    EXACT,
    SUMS,
    at,
    compensated,
    gradient_values,
    load,
    normalize_values,
    rstd_of,
    settle,
    settle_gradients,
)
from anybn.backends._sharing import begin, proceed

#: Values whose sum is added to the others with what rounding loses kept.
BLOCK = 4096


@njit(**SUMS)
def block_sums(row, origin):
    s1 = s2 = 0.0
    for i in range(len(row)):
        d = load(row[i]) - origin
        s1 += d
        s2 += d * d
    return s1, s2


@njit(**SUMS)
def block_gradient_sums(drow, row, arow, origin):
    s1 = s2 = 0.0
    for i in range(len(row)):
        g = load(drow[i])
        if arow is not None:
            g = g if arow[i] else 0.0
        s1 += g
        s2 += g * (load(row[i]) - origin)
    return s1, s2


@njit(**EXACT)
def run_sums(x, c, n0, n1, l0, l1, origin):
    """``sum(x - origin)`` and ``sum((x - origin)**2)`` over ``x[n0:n1, c, l0:l1]``."""
    s1 = s2 = lost1 = lost2 = 0.0
    for n in range(n0, n1):
        for b in range(l0, l1, BLOCK):
            b1, b2 = block_sums(x[n, c, b : min(b + BLOCK, l1)], origin)
            s1, lost1 = compensated(s1, lost1, b1)
            s2, lost2 = compensated(s2, lost2, b2)
    return s1, s2


@njit(**EXACT)
def run_gradient_sums(dy, x, active, c, n0, n1, l0, l1, origin):
    """``sum(dy)`` and ``sum(dy * (x - origin))`` over the same part, with 0 for dy where it is not active."""
    s1 = s2 = lost1 = lost2 = 0.0
    for n in range(n0, n1):
        for b in range(l0, l1, BLOCK):
            e = min(b + BLOCK, l1)
            arow = None if active is None else active[n, c, b:e]
            b1, b2 = block_gradient_sums(dy[n, c, b:e], x[n, c, b:e], arow, origin)
            s1, lost1 = compensated(s1, lost1, b1)
            s2, lost2 = compensated(s2, lost2, b2)
    return s1, s2


@njit(**EXACT)
def normalize_run(x, y, residual, relu, mean, shift, scale, bias, n, c, l0, l1):
    rest = None if residual is None else residual[n, c, l0:l1]
    normalize_values(x[n, c, l0:l1], y[n, c, l0:l1], rest, relu, mean[c], at(shift, c), scale[c], bias[c])


@njit(**EXACT)
def gradient_run(dy, x, active, dx, mean, shift, k1, k2, scale, n, c, l0, l1):
    arow = None if active is None else active[n, c, l0:l1]
    gradient_values(dy[n, c, l0:l1], x[n, c, l0:l1], arow, dx[n, c, l0:l1], mean[c], at(shift, c), k1[c], k2[c], scale[c])


@njit(**EXACT)
def train(
    tickets, offers, seen, x, y, residual, relu, eps, weight, bias, mean, shift, m2, var, scale
):  # fmt: skip
    """Channels from statistics to y, each while it lies in the cache."""
    count, length = len(x) * x.shape[2], x.shape[2]
    first, last = begin(tickets, offers, seen)
    while first < last:
        for c in range(first, last):
            mean[c] = load(x[0, c, 0])
            s1, s2 = run_sums(x, c, 0, len(x), 0, length, mean[c])
            if shift is not None:
                mean[c] += s1 / count
                s1, s2 = run_sums(x, c, 0, len(x), 0, length, mean[c])
            settle(c, count, s1, s2, mean, shift, m2, var)
            scale[c] = rstd_of(var[c], eps) * weight[c]
            for n in range(len(x)):
                normalize_run(x, y, residual, relu, mean, shift, scale, bias, n, c, 0, length)
        first, last = proceed(tickets, offers, seen, last - first)


@njit(**EXACT)
def backward(
    tickets, offers, seen, dy, x, active, dx, count, mean, shift, rstd, scale, dweight, dbias, k1, k2
):  # fmt: skip
    """The gradient, channel by channel; count is 0 where the statistics are constants."""
    length = x.shape[2]
    first, last = begin(tickets, offers, seen)
    while first < last:
        for c in range(first, last):
            s1, s2 = run_gradient_sums(dy, x, active, c, 0, len(x), 0, length, mean[c])
            settle_gradients(c, count, s1, s2, mean, shift, rstd, dweight, dbias, k1, k2)
            for n in range(len(x)):
                gradient_run(dy, x, active, dx, mean, shift, k1, k2, scale, n, c, 0, length)
        first, last = proceed(tickets, offers, seen, last - first)


@njit(**EXACT)
def part_of(q, x, segments):
    """``(n, c, s, l0, l1)`` of part q, where every run is cut into as many segments."""
    run, s = divmod(q, segments)
    step = -(-x.shape[2] // segments)
    return run // x.shape[1], run % x.shape[1], s, min(s * step, x.shape[2]), min((s + 1) * step, x.shape[2])


@njit(**EXACT)
def sum_parts(tickets, offers, seen, x, origin, partial, segments):
    """`run_sums` of segments, each at its place in ``partial``, ``(2, N, C, segments)``."""
    first, last = begin(tickets, offers, seen)
    while first < last:
        for q in range(first, last):
            n, c, s, l0, l1 = part_of(q, x, segments)
            partial[0, n, c, s], partial[1, n, c, s] = run_sums(x, c, n, n + 1, l0, l1, origin[c])
        first, last = proceed(tickets, offers, seen, last - first)


@njit(**EXACT)
def gradient_sum_parts(tickets, offers, seen, dy, x, active, origin, partial, segments):
    """The same of `run_gradient_sums`."""
    first, last = begin(tickets, offers, seen)
    while first < last:
        for q in range(first, last):
            n, c, s, l0, l1 = part_of(q, x, segments)
            partial[0, n, c, s], partial[1, n, c, s] = run_gradient_sums(dy, x, active, c, n, n + 1, l0, l1, origin[c])
        first, last = proceed(tickets, offers, seen, last - first)


@njit(**EXACT)
def normalize_parts(tickets, offers, seen, x, y, residual, relu, mean, shift, scale, bias, segments):
    first, last = begin(tickets, offers, seen)
    while first < last:
        for q in range(first, last):
            n, c, _, l0, l1 = part_of(q, x, segments)
            normalize_run(x, y, residual, relu, mean, shift, scale, bias, n, c, l0, l1)
        first, last = proceed(tickets, offers, seen, last - first)


@njit(**EXACT)
def gradient_parts(tickets, offers, seen, dy, x, active, dx, mean, shift, k1, k2, scale, segments):
    first, last = begin(tickets, offers, seen)
    while first < last:
        for q in range(first, last):
            n, c, _, l0, l1 = part_of(q, x, segments)
            gradient_run(dy, x, active, dx, mean, shift, k1, k2, scale, n, c, l0, l1)
        first, last = proceed(tickets, offers, seen, last - first)


@njit(**EXACT)
def merge_parts(partial, sums):
    """The sums of every channel, ``(2, C)``, in the order of memory."""
    _, runs, channels, segments = partial.shape
    for i in range(2):
        for c in range(channels):
            total = lost = 0.0
            for n in range(runs):
                for s in range(segments):
                    total, lost = compensated(total, lost, partial[i, n, c, s])
            sums[i, c] = total
