"""Kernels for runs: flat memory in which ``length`` values of one channel lie side by side, then those of the next.

A thread claims whole channels, each worked on while it lies in the cache; or, where a channel is too large for that or
its statistics are given, segments of runs, in the order of memory.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from numba import njit

from anybn.backends._kernels import (
    EXACT,
    KERNEL,
    SUMS,
    at,
    compensated,
    cut,
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
from anybn.backends._sharing import begin, proceed

#: Values whose sum is added to the others with what rounding loses kept.
BLOCK = 4096


# -- some runs -------------------------------------------------------------------------------------------------


@njit(**SUMS)
def block_sums(x, start, rows, stride, size, origin):
    s1 = s2 = 0.0
    for r in range(rows):
        row = x[start + r * stride : start + r * stride + size]
        for i in range(len(row)):
            d = load(row[i]) - origin
            s1 += d
            s2 += d * d
    return s1, s2


@njit(**SUMS)
def block_gradient_sums(dy, x, active, start, rows, stride, size, origin):
    s1 = s2 = 0.0
    for r in range(rows):
        b = start + r * stride
        row, drow, arow = x[b : b + size], dy[b : b + size], cut(active, b, b + size)
        for i in range(len(row)):
            g = gradient_of(drow[i], at(arow, i))
            s1 += g
            s2 += g * (load(row[i]) - origin)
    return s1, s2


@njit(**EXACT)
def run_sums(x, start, rows, stride, length, origin):
    """``sum(x - origin)`` and ``sum((x - origin)**2)`` over rows of so many values, stride apart."""
    s1 = s2 = lost1 = lost2 = 0.0
    together = max(1, BLOCK // length)
    for r in range(0, rows, together):
        for b in range(0, length, BLOCK):
            first, size = start + r * stride + b, min(BLOCK, length - b)
            b1, b2 = block_sums(x, first, min(together, rows - r), stride, size, origin)
            s1, lost1 = compensated(s1, lost1, b1)
            s2, lost2 = compensated(s2, lost2, b2)
    return s1, s2


@njit(**EXACT)
def run_gradient_sums(dy, x, active, start, rows, stride, length, origin):
    """``sum(dy)`` and ``sum(dy * (x - origin))`` over the same rows, with 0 for dy where it is not active."""
    s1 = s2 = lost1 = lost2 = 0.0
    together = max(1, BLOCK // length)
    for r in range(0, rows, together):
        for b in range(0, length, BLOCK):
            first, size = start + r * stride + b, min(BLOCK, length - b)
            b1, b2 = block_gradient_sums(dy, x, active, first, min(together, rows - r), stride, size, origin)
            s1, lost1 = compensated(s1, lost1, b1)
            s2, lost2 = compensated(s2, lost2, b2)
    return s1, s2


@njit(**EXACT)
def segment(q, length, segments):
    """The first and one past the last value of segment q, where every run is cut into as many."""
    run, s = divmod(q, segments)
    step = -(-length // segments)
    return run * length + min(s * step, length), run * length + min((s + 1) * step, length)


@njit(**EXACT)
def normalize(x, y, residual, floor, mean, shift, scale, bias, length, segments, first, last, stride):
    """Segments first, first + stride, ..."""
    for q in range(first, last, stride):
        b, e = segment(q, length, segments)
        c = q // segments % len(mean)
        m, s, k, o = mean[c], at(shift, c), scale[c], bias[c]
        row, out, rest = x[b:e], y[b:e], cut(residual, b, e)
        for i in range(len(row)):
            store(out, i, normalized(row[i], m, s, k, o, at(rest, i), floor))


@njit(**EXACT)
def gradient(dy, x, active, dx, mean, shift, numbers, length, segments, first, last, stride):
    """The same; for numbers see `settle_gradients`."""
    for q in range(first, last, stride):
        b, e = segment(q, length, segments)
        c = q // segments % len(mean)
        m, s, k1, k2, k = mean[c], at(shift, c), numbers[2, c], numbers[3, c], numbers[4, c]
        row, drow, arow, out = x[b:e], dy[b:e], cut(active, b, e), dx[b:e]
        for i in range(len(row)):
            g = gradient_of(drow[i], at(arow, i))
            store(out, i, gradient_through(g, row[i], m, s, k1, k2, k))


# -- tasks: channels -------------------------------------------------------------------------------------------


@njit(**KERNEL)
def train(tickets, offers, seen, x, y, residual, floor, eps, weight, bias, numbers, length):
    """Channels from statistics to y."""
    mean, shift, scale = numbers[0], shift_in(numbers, x), numbers[4]
    stride = len(mean) * length
    rows = len(x) // stride
    first, last = begin(tickets, offers, seen)
    while first < last:
        for c in range(first, last):
            mean[c] = load(x[c * length])
            s1, s2 = run_sums(x, c * length, rows, stride, length, mean[c])
            if shift is not None:
                mean[c] += s1 / (rows * length)
                s1, s2 = run_sums(x, c * length, rows, stride, length, mean[c])
            settle(c, rows * length, s1, s2, eps, weight, numbers, shift)
            normalize(x, y, residual, floor, mean, shift, scale, bias, length, 1, c, rows * len(mean), len(mean))
        first, last = proceed(tickets, offers, seen, last - first)


@njit(**KERNEL)
def backward(tickets, offers, seen, dy, x, active, dx, count, eps, weight, mean, shift, var, numbers, length):
    """The gradient of channels; count is 0 where the statistics are constants."""
    stride = len(mean) * length
    rows = len(x) // stride
    first, last = begin(tickets, offers, seen)
    while first < last:
        for c in range(first, last):
            s1, s2 = run_gradient_sums(dy, x, active, c * length, rows, stride, length, mean[c])
            settle_gradients(c, count, s1, s2, eps, weight, shift, var, numbers)
            gradient(dy, x, active, dx, mean, shift, numbers, length, 1, c, rows * len(mean), len(mean))
        first, last = proceed(tickets, offers, seen, last - first)


# -- parts: segments -------------------------------------------------------------------------------------------


@njit(**KERNEL)
def sum_parts(tickets, offers, seen, x, origin, partial, length, segments):
    """`run_sums` of segments, each at its place in ``partial``, ``(2, N, C, segments)``."""
    s1, s2 = partial[0].reshape(-1), partial[1].reshape(-1)
    first, last = begin(tickets, offers, seen)
    while first < last:
        for q in range(first, last):
            b, e = segment(q, length, segments)
            s1[q], s2[q] = run_sums(x, b, 1, 0, e - b, origin[q // segments % len(origin)])
        first, last = proceed(tickets, offers, seen, last - first)


@njit(**KERNEL)
def gradient_sum_parts(tickets, offers, seen, dy, x, active, origin, partial, length, segments):
    """The same of `run_gradient_sums`."""
    s1, s2 = partial[0].reshape(-1), partial[1].reshape(-1)
    first, last = begin(tickets, offers, seen)
    while first < last:
        for q in range(first, last):
            b, e = segment(q, length, segments)
            c = q // segments % len(origin)
            s1[q], s2[q] = run_gradient_sums(dy, x, active, b, 1, 0, e - b, origin[c])
        first, last = proceed(tickets, offers, seen, last - first)


@njit(**KERNEL)
def normalize_parts(tickets, offers, seen, x, y, residual, floor, eps, weight, bias, mean, shift, var, length, segments):
    scale = scales_of(var, eps, weight)
    first, last = begin(tickets, offers, seen)
    while first < last:
        normalize(x, y, residual, floor, mean, shift, scale, bias, length, segments, first, last, 1)
        first, last = proceed(tickets, offers, seen, last - first)


@njit(**KERNEL)
def gradient_parts(tickets, offers, seen, dy, x, active, dx, mean, shift, numbers, length, segments):
    first, last = begin(tickets, offers, seen)
    while first < last:
        gradient(dy, x, active, dx, mean, shift, numbers, length, segments, first, last, 1)
        first, last = proceed(tickets, offers, seen, last - first)


@njit(**KERNEL)
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
