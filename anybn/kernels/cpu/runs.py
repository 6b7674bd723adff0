"""Kernels for runs: flat memory in which ``length`` values of one channel lie side by side, then those of the next.

A thread claims groups of neighbouring channels, each worked on while it lies in the cache; or, where going through the
array in the order of memory is faster or the statistics are given, segments of runs.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import njit

from anybn.kernels.cpu.cached import cached
from anybn.kernels.cpu.plan import RUN_BLOCK
from anybn.kernels.cpu.sharing import begin, proceed, shared
from anybn.kernels.cpu.values import (
    EXACT,
    KERNEL,
    MEAN,
    MEAN_DY,
    SCALE,
    SLOPE,
    SUMS,
    active_dy,
    at,
    compensated,
    cut,
    dx_of,
    fill,
    finish_gradients,
    finish_statistics,
    load,
    normalized,
    prefer_eight_lanes,
    put,
    scales_of,
    shift_in,
    shown,
    store,
)

# -- some runs -------------------------------------------------------------------------------------------------


@njit(**SUMS)
def block_sums(row, mrow, origin):
    s1 = s2 = 0.0
    for i in range(len(row)):
        d = shown(load(row[i]) - origin, at(mrow, i))
        s1 += d
        s2 += d * d
    return s1, s2


@njit(**SUMS)
def block_gradient_sums(drow, row, arow, mrow, origin):
    s1 = s2 = 0.0
    for i in range(len(row)):
        dy = shown(active_dy(drow[i], at(arow, i)), at(mrow, i))
        s1 += dy
        s2 += dy * shown(load(row[i]) - origin, at(mrow, i))
    return s1, s2


@njit(**EXACT)
def run_sums(x, mask, first, last, behind, origin):
    """``sum(x - origin)`` and ``sum((x - origin)**2)`` from value first to last.

    The mask's value for ``x[i]`` is ``mask[i - behind]``, see `behind_of`; mask may be None.
    """
    s1 = s2 = lost1 = lost2 = 0.0
    for start in range(first, last, RUN_BLOCK):
        stop = min(start + RUN_BLOCK, last)
        b1, b2 = block_sums(x[start:stop], cut(mask, start - behind, stop - behind), origin)
        s1, lost1 = compensated(s1, lost1, b1)
        s2, lost2 = compensated(s2, lost2, b2)
    return s1, s2


@njit(**EXACT)
def run_gradient_sums(dy, x, active, mask, first, last, behind, origin):
    """``sum(dy)`` and ``sum(dy * (x - origin))`` from value first to last, with 0 for dy where it is not active."""
    s1 = s2 = lost1 = lost2 = 0.0
    for start in range(first, last, RUN_BLOCK):
        stop = min(start + RUN_BLOCK, last)
        shown_here = cut(mask, start - behind, stop - behind)
        b1, b2 = block_gradient_sums(dy[start:stop], x[start:stop], cut(active, start, stop), shown_here, origin)
        s1, lost1 = compensated(s1, lost1, b1)
        s2, lost2 = compensated(s2, lost2, b2)
    return s1, s2


@njit(**EXACT)
def add_compensated_to(sums, c, s1, s2):
    """Adds to ``sums[0, c]`` and ``sums[1, c]``; what rounding loses is kept in the next two rows."""
    sums[0, c], sums[2, c] = compensated(sums[0, c], sums[2, c], s1)
    sums[1, c], sums[3, c] = compensated(sums[1, c], sums[3, c], s2)


@njit(**EXACT)
def group_sums(x, c0, c1, length, origin, sums):
    """`run_sums` of channels c0 to c1, in the order of memory."""
    for i in range(4):
        fill(sums[i][c0:c1], 0.0)
    for r in range(0, len(x), len(origin) * length):
        for c in range(c0, c1):
            s1, s2 = run_sums(x, None, r + c * length, r + (c + 1) * length, 0, origin[c])
            add_compensated_to(sums, c, s1, s2)


@njit(**EXACT)
def group_gradient_sums(dy, x, active, c0, c1, length, origin, sums):
    """`run_gradient_sums` of channels c0 to c1, in the order of memory."""
    for i in range(4):
        fill(sums[i][c0:c1], 0.0)
    for r in range(0, len(x), len(origin) * length):
        for c in range(c0, c1):
            s1, s2 = run_gradient_sums(dy, x, active, None, r + c * length, r + (c + 1) * length, 0, origin[c])
            add_compensated_to(sums, c, s1, s2)


@njit(**EXACT)
def segment(number, length, segments):
    """The first and one past the last value of a segment, where every run is cut into so many."""
    run, s = divmod(number, segments)
    step = -(-length // segments)
    return run * length + min(s * step, length), run * length + min((s + 1) * step, length)


@njit(**EXACT)
def behind_of(run, channels, length):
    """How far a run's values lie behind theirs in the mask, which has one run for all channels."""
    return (run - run // channels) * length


@njit(**EXACT)
def write_segments(x, y, residual, mask, floor, mean, shift, scale, bias, length, segments, first, last):
    """y in segments first to last; floor may be None."""
    prefer_eight_lanes(x)
    for number in range(first, last):
        start, stop = segment(number, length, segments)
        c, behind = number // segments % len(mean), behind_of(number // segments, len(mean), length)
        m, s, k, b = mean[c], at(shift, c), scale[c], bias[c]
        row, out, residual_row = x[start:stop], y[start:stop], cut(residual, start, stop)
        mrow = cut(mask, start - behind, stop - behind)
        for i in range(len(row)):
            store(out, i, shown(normalized(row[i], m, s, k, b, at(residual_row, i), floor), at(mrow, i)))


@njit(**EXACT)
def write_y(x, y, residual, mask, floor, mean, shift, scale, bias, length, segments, first, last):
    """y in segments first to last."""
    if floor == -np.inf:
        write_segments(x, y, residual, mask, None, mean, shift, scale, bias, length, segments, first, last)
    else:
        write_segments(x, y, residual, mask, floor, mean, shift, scale, bias, length, segments, first, last)


@njit(**EXACT)
def write_dx(dy, x, active, mask, dx, dresidual, mean, shift, gradients, length, segments, first, last):
    """dx and the residual's gradient in segments first to last."""
    for number in range(first, last):
        start, stop = segment(number, length, segments)
        c, behind = number // segments % len(mean), behind_of(number // segments, len(mean), length)
        m, s = mean[c], at(shift, c)
        mean_dy, slope, k = gradients[MEAN_DY, c], gradients[SLOPE, c], gradients[SCALE, c]
        row, drow, arow, out = x[start:stop], dy[start:stop], cut(active, start, stop), dx[start:stop]
        residual_row, mrow = cut(dresidual, start, stop), cut(mask, start - behind, stop - behind)
        for i in range(len(row)):
            g = active_dy(drow[i], at(arow, i))
            put(residual_row, i, shown(g, at(mrow, i)))
            store(out, i, shown(dx_of(g, row[i], m, s, mean_dy, slope, k), at(mrow, i)))


# -- tasks: groups of channels ---------------------------------------------------------------------------------


@shared(**KERNEL)
def train(tickets, x, y, residual, floor, eps, weight, bias, statistics, length, group):
    """Groups of channels from statistics to y."""
    mean, shift, scale = statistics[MEAN], shift_in(statistics, x), statistics[SCALE]
    channels = len(mean)
    count, sums = len(x) // channels, np.empty((4, channels))
    first, last = begin(tickets)
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
            finish_statistics(c0, c1, count, sums, eps, weight, statistics, shift)
            for run in range(0, len(x) // length, channels):
                write_y(x, y, residual, None, floor, mean, shift, scale, bias, length, 1, run + c0, run + c1)
        first, last = proceed(tickets, first, last)


@shared(**KERNEL)
def backward(tickets, dy, x, active, dx, dresidual, count, eps, weight, mean, shift, var, gradients, length, group):
    """The gradient of groups of channels; count is 0 where the statistics are constants."""
    channels = len(mean)
    sums = np.empty((4, channels))
    first, last = begin(tickets)
    while first < last:
        for c0 in range(first * group, min(last * group, channels), group):
            c1 = min(c0 + group, channels)
            group_gradient_sums(dy, x, active, c0, c1, length, mean, sums)
            finish_gradients(c0, c1, count, sums, eps, weight, shift, var, gradients)
            for run in range(0, len(x) // length, channels):
                write_dx(dy, x, active, None, dx, dresidual, mean, shift, gradients, length, 1, run + c0, run + c1)
        first, last = proceed(tickets, first, last)


# -- parts: segments -------------------------------------------------------------------------------------------


@shared(**KERNEL)
def sum_parts(tickets, x, mask, origin, partial, length, segments):
    """`run_sums` of segments, each at its place in ``partial``, ``(2, N, C, segments)``."""
    s1, s2 = partial[0].reshape(-1), partial[1].reshape(-1)
    first, last = begin(tickets)
    while first < last:
        for number in range(first, last):
            start, stop = segment(number, length, segments)
            c, behind = number // segments % len(origin), behind_of(number // segments, len(origin), length)
            s1[number], s2[number] = run_sums(x, mask, start, stop, behind, origin[c])
        first, last = proceed(tickets, first, last)


@shared(**KERNEL)
def gradient_sum_parts(tickets, dy, x, active, mask, origin, partial, length, segments):
    """`run_gradient_sums` of segments, each at its place in ``partial``, ``(2, N, C, segments)``."""
    s1, s2 = partial[0].reshape(-1), partial[1].reshape(-1)
    first, last = begin(tickets)
    while first < last:
        for number in range(first, last):
            start, stop = segment(number, length, segments)
            c, behind = number // segments % len(origin), behind_of(number // segments, len(origin), length)
            s1[number], s2[number] = run_gradient_sums(dy, x, active, mask, start, stop, behind, origin[c])
        first, last = proceed(tickets, first, last)


@shared(**KERNEL)
def normalize_parts(tickets, x, y, residual, mask, floor, eps, weight, bias, mean, shift, var, length, segments):
    scale = scales_of(var, eps, weight)
    first, last = begin(tickets)
    while first < last:
        write_y(x, y, residual, mask, floor, mean, shift, scale, bias, length, segments, first, last)
        first, last = proceed(tickets, first, last)


@shared(**KERNEL)
def gradient_parts(tickets, dy, x, active, mask, dx, dresidual, mean, shift, gradients, length, segments):
    first, last = begin(tickets)
    while first < last:
        write_dx(dy, x, active, mask, dx, dresidual, mean, shift, gradients, length, segments, first, last)
        first, last = proceed(tickets, first, last)


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
