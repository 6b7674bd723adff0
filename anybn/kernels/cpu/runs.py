"""Kernels for runs: flat memory in which ``length`` values of one channel lie side by side, then those of the next.

A thread claims groups of neighbouring channels, each worked on while it lies in the cache; or, where going through the
array in the order of memory is faster or the statistics are given, segments of runs.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import njit

from anybn.kernels.cpu.cached import cached
from anybn.kernels.cpu.sharing import begin, proceed
from anybn.kernels.cpu.values import (
    EXACT,
    KERNEL,
    SUMS,
    at,
    compensated,
    cut,
    fill,
    gradient_of,
    gradient_through,
    load,
    normalized,
    scales_of,
    settle,
    settle_gradients,
    shift_in,
    store,
)

#: Values whose sum is added to the others with what rounding loses kept.
BLOCK = 4096


# -- some runs -------------------------------------------------------------------------------------------------


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
        g = gradient_of(drow[i], at(arow, i))
        s1 += g
        s2 += g * (load(row[i]) - origin)
    return s1, s2


@njit(**EXACT)
def run_sums(x, first, last, origin):
    """``sum(x - origin)`` and ``sum((x - origin)**2)`` from value first to last."""
    s1 = s2 = lost1 = lost2 = 0.0
    for b in range(first, last, BLOCK):
        b1, b2 = block_sums(x[b : min(b + BLOCK, last)], origin)
        s1, lost1 = compensated(s1, lost1, b1)
        s2, lost2 = compensated(s2, lost2, b2)
    return s1, s2


@njit(**EXACT)
def run_gradient_sums(dy, x, active, first, last, origin):
    """``sum(dy)`` and ``sum(dy * (x - origin))`` of the same values, with 0 for dy where it is not active."""
    s1 = s2 = lost1 = lost2 = 0.0
    for b in range(first, last, BLOCK):
        e = min(b + BLOCK, last)
        b1, b2 = block_gradient_sums(dy[b:e], x[b:e], cut(active, b, e), origin)
        s1, lost1 = compensated(s1, lost1, b1)
        s2, lost2 = compensated(s2, lost2, b2)
    return s1, s2


@njit(**EXACT)
def add_to(sums, c, s1, s2):
    """Adds to ``sums[0, c]`` and ``sums[1, c]``, with what rounding loses in the next two rows."""
    sums[0, c], sums[2, c] = compensated(sums[0, c], sums[2, c], s1)
    sums[1, c], sums[3, c] = compensated(sums[1, c], sums[3, c], s2)


@njit(**EXACT)
def group_sums(x, c0, c1, length, origin, sums):
    """`run_sums` of channels c0 to c1, in the order of memory."""
    for i in range(4):
        fill(sums[i][c0:c1], 0.0)
    for r in range(0, len(x), len(origin) * length):
        for c in range(c0, c1):
            s1, s2 = run_sums(x, r + c * length, r + (c + 1) * length, origin[c])
            add_to(sums, c, s1, s2)


@njit(**EXACT)
def group_gradient_sums(dy, x, active, c0, c1, length, origin, sums):
    """The same of `run_gradient_sums`."""
    for i in range(4):
        fill(sums[i][c0:c1], 0.0)
    for r in range(0, len(x), len(origin) * length):
        for c in range(c0, c1):
            s1, s2 = run_gradient_sums(dy, x, active, r + c * length, r + (c + 1) * length, origin[c])
            add_to(sums, c, s1, s2)


@njit(**EXACT)
def segment(q, length, segments):
    """The first and one past the last value of segment q, where every run is cut into as many."""
    run, s = divmod(q, segments)
    step = -(-length // segments)
    return run * length + min(s * step, length), run * length + min((s + 1) * step, length)


@njit(**EXACT)
def normalize(x, y, residual, floor, mean, shift, scale, bias, length, segments, first, last):
    """Segments first to last."""
    for q in range(first, last):
        b, e = segment(q, length, segments)
        c = q // segments % len(mean)
        m, s, k, o = mean[c], at(shift, c), scale[c], bias[c]
        row, out, rest = x[b:e], y[b:e], cut(residual, b, e)
        for i in range(len(row)):
            store(out, i, normalized(row[i], m, s, k, o, at(rest, i), floor))


@njit(**EXACT)
def gradient(dy, x, active, dx, mean, shift, numbers, length, segments, first, last):
    """The same; for numbers see `settle_gradients`."""
    for q in range(first, last):
        b, e = segment(q, length, segments)
        c = q // segments % len(mean)
        m, s, k1, k2, k = mean[c], at(shift, c), numbers[2, c], numbers[3, c], numbers[4, c]
        row, drow, arow, out = x[b:e], dy[b:e], cut(active, b, e), dx[b:e]
        for i in range(len(row)):
            g = gradient_of(drow[i], at(arow, i))
            store(out, i, gradient_through(g, row[i], m, s, k1, k2, k))


# -- tasks: groups of channels ---------------------------------------------------------------------------------


@cached(**KERNEL)
def train(tickets, offers, seen, x, y, residual, floor, eps, weight, bias, numbers, length, group):
    """Groups of channels from statistics to y."""
    mean, shift, scale = numbers[0], shift_in(numbers, x), numbers[4]
    channels = len(mean)
    count, sums = len(x) // channels, np.empty((4, channels))
    first, last = begin(tickets, offers, seen)
    while first < last:
        for c0 in range(first * group, min(last * group, channels), group):
            c1 = min(c0 + group, channels)
            for c in range(c0, c1):
                mean[c] = load(x[c * length])
            group_sums(x, c0, c1, length, mean, sums)
            if shift is not None:
                for c in range(c0, c1):
                    mean[c] += sums[0, c] / count
                group_sums(x, c0, c1, length, mean, sums)
            for c in range(c0, c1):
                settle(c, count, sums[0, c], sums[1, c], eps, weight, numbers, shift)
            for run in range(0, len(x) // length, channels):
                normalize(x, y, residual, floor, mean, shift, scale, bias, length, 1, run + c0, run + c1)
        first, last = proceed(tickets, offers, seen, last - first)


@cached(**KERNEL)
def backward(tickets, offers, seen, dy, x, active, dx, count, eps, weight, mean, shift, var, numbers, length, group):
    """The gradient of groups of channels; count is 0 where the statistics are constants."""
    channels = len(mean)
    sums = np.empty((4, channels))
    first, last = begin(tickets, offers, seen)
    while first < last:
        for c0 in range(first * group, min(last * group, channels), group):
            c1 = min(c0 + group, channels)
            group_gradient_sums(dy, x, active, c0, c1, length, mean, sums)
            for c in range(c0, c1):
                settle_gradients(c, count, sums[0, c], sums[1, c], eps, weight, shift, var, numbers)
            for run in range(0, len(x) // length, channels):
                gradient(dy, x, active, dx, mean, shift, numbers, length, 1, run + c0, run + c1)
        first, last = proceed(tickets, offers, seen, last - first)


# -- parts: segments -------------------------------------------------------------------------------------------


@cached(**KERNEL)
def sum_parts(tickets, offers, seen, x, origin, partial, length, segments):
    """`run_sums` of segments, each at its place in ``partial``, ``(2, N, C, segments)``."""
    s1, s2 = partial[0].reshape(-1), partial[1].reshape(-1)
    first, last = begin(tickets, offers, seen)
    while first < last:
        for q in range(first, last):
            b, e = segment(q, length, segments)
            s1[q], s2[q] = run_sums(x, b, e, origin[q // segments % len(origin)])
        first, last = proceed(tickets, offers, seen, last - first)


@cached(**KERNEL)
def gradient_sum_parts(tickets, offers, seen, dy, x, active, origin, partial, length, segments):
    """The same of `run_gradient_sums`."""
    s1, s2 = partial[0].reshape(-1), partial[1].reshape(-1)
    first, last = begin(tickets, offers, seen)
    while first < last:
        for q in range(first, last):
            b, e = segment(q, length, segments)
            c = q // segments % len(origin)
            s1[q], s2[q] = run_gradient_sums(dy, x, active, b, e, origin[c])
        first, last = proceed(tickets, offers, seen, last - first)


@cached(**KERNEL)
def normalize_parts(
    tickets, offers, seen, x, y, residual, floor, eps, weight, bias, mean, shift, var, length, segments
):
    scale = scales_of(var, eps, weight)
    first, last = begin(tickets, offers, seen)
    while first < last:
        normalize(x, y, residual, floor, mean, shift, scale, bias, length, segments, first, last)
        first, last = proceed(tickets, offers, seen, last - first)


@cached(**KERNEL)
def gradient_parts(tickets, offers, seen, dy, x, active, dx, mean, shift, numbers, length, segments):
    first, last = begin(tickets, offers, seen)
    while first < last:
        gradient(dy, x, active, dx, mean, shift, numbers, length, segments, first, last)
        first, last = proceed(tickets, offers, seen, last - first)


@cached(**KERNEL)
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
