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
    first_shown,
    load,
    normalized,
    prefer_eight_lanes,
    put,
    scales_of,
    shift_in,
    shown,
    store,
    take_origins,
)

# -- some runs -------------------------------------------------------------------------------------------------


@njit(**SUMS)
def block_sums(drow, row, arow, mrow, origin):
    s1 = s2 = 0.0
    for i in range(len(row)):
        d = shown(load(row[i]) - origin, at(mrow, i))
        g = d if drow is None else shown(active_dy(drow[i], at(arow, i)), at(mrow, i))
        s1 += g
        s2 += g * d
    return s1, s2


@njit(**EXACT)
def run_sums(dy, x, active, mask, first, last, behind, origin):
    """``sum(x - origin)`` and ``sum((x - origin)**2)`` from value first to last; or of dy, ``sum(dy)`` and
    ``sum(dy * (x - origin))``, with 0 for dy where it is not active.

    The mask's value for ``x[i]`` is ``mask[i - behind]``, see `segment_of`. dy, active and the mask may be None.
    """
    s1 = s2 = lost1 = lost2 = 0.0
    for start in range(first, last, RUN_BLOCK):
        stop = min(start + RUN_BLOCK, last)
        shown_here = cut(mask, start - behind, stop - behind)
        b1, b2 = block_sums(cut(dy, start, stop), x[start:stop], cut(active, start, stop), shown_here, origin)
        s1, lost1 = compensated(s1, lost1, b1)
        s2, lost2 = compensated(s2, lost2, b2)
    return s1, s2


@njit(**EXACT)
def group_sums(dy, x, active, mask, c0, c1, length, origin, sums):
    """`run_sums` of channels c0 to c1, in the order of memory; what rounding loses is kept in two more rows."""
    for i in range(4):
        fill(sums[i][c0:c1], 0.0)
    for sample in range(len(x) // (len(origin) * length)):
        for c in range(c0, c1):
            first = (sample * len(origin) + c) * length
            s1, s2 = run_sums(dy, x, active, mask, first, first + length, first - sample * length, origin[c])
            sums[0, c], sums[2, c] = compensated(sums[0, c], sums[2, c], s1)
            sums[1, c], sums[3, c] = compensated(sums[1, c], sums[3, c], s2)


@njit(**EXACT)
def segment_of(number, channels, length, segments):
    """The run of a segment, where every run is cut into so many, its place in it, the run's channel, and how far the
    run's values lie behind theirs in the mask, which has one run for all channels."""
    run, s = divmod(number, segments)
    return run, s, run % channels, (run - run // channels) * length


@njit(**EXACT)
def segment_after(run, s, c, behind, channels, length, segments):
    """`segment_of` the next. It does not divide: four divisions take as long as 50 values."""
    s += 1
    if s == segments:
        run, s, c = run + 1, 0, c + 1
        if c == channels:
            c = 0
        else:
            behind += length
    return run, s, c, behind


@njit(**EXACT)
def bounds_of(run, s, length, segments):
    """The first and one past the last value of a segment."""
    step = -(-length // segments) if segments > 1 else length
    return run * length + min(s * step, length), run * length + min((s + 1) * step, length)


@njit(**EXACT)
def write_segments(x, y, residual, mask, floor, mean, shift, scale, bias, length, segments, first, last):
    """y in segments first to last; floor may be None."""
    prefer_eight_lanes(x)
    run, s, c, behind = segment_of(first, len(mean), length, segments)
    for _ in range(first, last):
        start, stop = bounds_of(run, s, length, segments)
        m, h, k, b = mean[c], at(shift, c), scale[c], bias[c]
        row, out, residual_row = x[start:stop], y[start:stop], cut(residual, start, stop)
        mrow = cut(mask, start - behind, stop - behind)
        for i in range(len(row)):
            store(out, i, shown(normalized(row[i], m, h, k, b, at(residual_row, i), floor), at(mrow, i)))
        run, s, c, behind = segment_after(run, s, c, behind, len(mean), length, segments)


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
    run, s, c, behind = segment_of(first, len(mean), length, segments)
    for _ in range(first, last):
        start, stop = bounds_of(run, s, length, segments)
        m, h = mean[c], at(shift, c)
        mean_dy, slope, k = gradients[MEAN_DY, c], gradients[SLOPE, c], gradients[SCALE, c]
        row, drow, arow, out = x[start:stop], dy[start:stop], cut(active, start, stop), dx[start:stop]
        residual_row, mrow = cut(dresidual, start, stop), cut(mask, start - behind, stop - behind)
        for i in range(len(row)):
            g = active_dy(drow[i], at(arow, i))
            put(residual_row, i, shown(g, at(mrow, i)))
            store(out, i, shown(dx_of(g, row[i], m, h, mean_dy, slope, k), at(mrow, i)))
        run, s, c, behind = segment_after(run, s, c, behind, len(mean), length, segments)


# -- tasks: groups of channels ---------------------------------------------------------------------------------


@shared(**KERNEL)
def train(tickets, x, y, residual, mask, floor, eps, weight, bias, count, statistics, length, group):
    """Groups of channels, of which so many values count, from statistics to y."""
    mean, shift, scale = statistics[MEAN], shift_in(statistics, x), statistics[SCALE]
    channels = len(mean)
    first_value, sums = first_shown(mask, channels, length), np.empty((4, channels))
    first, last = begin(tickets)
    while first < last:
        for c0 in range(first * group, min(last * group, channels), group):
            c1 = min(c0 + group, channels)
            take_origins(x, first_value, length, c0, c1, mean)
            group_sums(None, x, None, mask, c0, c1, length, mean, sums)
            if shift is not None:
                for c in range(c0, c1):
                    mean[c] += sums[0, c] / count
                group_sums(None, x, None, mask, c0, c1, length, mean, sums)
            finish_statistics(c0, c1, count, sums, eps, weight, statistics, shift)
            for run in range(0, len(x) // length, channels):
                write_y(x, y, residual, mask, floor, mean, shift, scale, bias, length, 1, run + c0, run + c1)
        first, last = proceed(tickets, first, last)


@shared(**KERNEL)
def backward(
    tickets, dy, x, active, mask, dx, dresidual, count, eps, weight, mean, shift, var, gradients, length, group
):  # fmt: skip
    """The gradient of groups of channels; count is 0 where the statistics are constants."""
    channels = len(mean)
    sums = np.empty((4, channels))
    first, last = begin(tickets)
    while first < last:
        for c0 in range(first * group, min(last * group, channels), group):
            c1 = min(c0 + group, channels)
            group_sums(dy, x, active, mask, c0, c1, length, mean, sums)
            finish_gradients(c0, c1, count, sums, eps, weight, shift, var, gradients)
            for run in range(0, len(x) // length, channels):
                write_dx(dy, x, active, mask, dx, dresidual, mean, shift, gradients, length, 1, run + c0, run + c1)
        first, last = proceed(tickets, first, last)


# -- parts: segments -------------------------------------------------------------------------------------------


@shared(**KERNEL)
def sum_parts(tickets, dy, x, active, mask, origin, partial, length, segments):
    """`run_sums` of segments, each at its place in ``partial``, ``(2, N, C, segments)``."""
    s1, s2 = partial[0].reshape(-1), partial[1].reshape(-1)
    first, last = begin(tickets)
    while first < last:
        run, s, c, behind = segment_of(first, len(origin), length, segments)
        for number in range(first, last):
            start, stop = bounds_of(run, s, length, segments)
            s1[number], s2[number] = run_sums(dy, x, active, mask, start, stop, behind, origin[c])
            run, s, c, behind = segment_after(run, s, c, behind, len(origin), length, segments)
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
