"""Loops over contiguous memory, compiled by Numba: batch norm over a part of an array.

Shapes: planes are ``(N, C, L)``, with L contiguous values of a channel; rows are ``(R, C)``. All arithmetic is float64,
which costs nothing while memory is the limit, so that results are rounded once and equal the core's. bfloat16 comes as
its bits, uint16. Parameters and statistics are float64 arrays of C values.

Sums run under ``fastmath``, which lets them run in lanes; nothing else does: it would make ``x - (mean + shift)`` of
``(x - mean) - shift``, and lose both. A flag that is the same for the whole call is tested in the innermost loop: LLVM
moves it out.

An inner loop runs from 0 over a slice: Numba lets an index that could be negative count from the end, which costs the
vectorization.

Every function is untyped, since Numba compiles one version per combination of dtypes.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

_SUMS = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
_EXACT = {"nogil": True, "cache": True, "error_model": "numpy"}

#: Values of a plane, and rows, that are added up before the sum is added to the others with what rounding loses kept
#: (Kahan 1965), so that errors do not grow with the count.
BLOCK = 4096
ROWS = 32

#: Planes of fewer values are short, and as many are joined as give this width.
SHORT = 256
WIDTH = 2048


def load(value):
    """A value of x as float64."""
    raise NotImplementedError


@overload(load, inline="always")
def _load(value):
    if value == types.uint16:
        return lambda value: np.float64(np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32))
    return lambda value: np.float64(value)


def store(out, i, value):
    """``out[i] = value``, rounded to out's dtype: to nearest even, and 16 bits through float32."""
    raise NotImplementedError


@overload(store, inline="always")
def _store(out, i, value):
    if out.dtype == types.uint16:

        def bfloat16(out, i, value):
            bits = np.float32(value).view(np.uint32)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            out[i] = np.uint16(rounded) if value == value else np.uint16(0x7FC0)

        return bfloat16
    if out.dtype == types.float32:

        def float32(out, i, value):
            out[i] = np.float32(value)

        return float32

    def float64(out, i, value):
        out[i] = value

    return float64


@njit(**_EXACT)
def update_running(mean, shift, shifted, m2, count, ddof, momentum, propagate, running_mean, running_var):
    """Fold the statistics of a batch into the running ones, in place."""
    for c in range(len(mean)):
        batch_mean = mean[c] + shift[c] if shifted else mean[c]
        batch_var = m2[c] / (count - ddof)
        if propagate or (np.isfinite(batch_mean) and np.isfinite(batch_var)):
            running_mean[c] = (1.0 - momentum) * running_mean[c] + momentum * batch_mean
            running_var[c] = (1.0 - momentum) * running_var[c] + momentum * batch_var


# -- planes: (N, C, L) -----------------------------------------------------------------------------------------


@njit(**_SUMS)
def block_sums(row, origin):
    s1 = s2 = 0.0
    for i in range(len(row)):
        d = load(row[i]) - origin
        s1 += d
        s2 += d * d
    return s1, s2


@njit(**_SUMS)
def block_gradient_sums(drow, row, arow, masked, origin):
    s1 = s2 = 0.0
    for i in range(len(row)):
        g = load(drow[i])
        if masked:
            g = g if arow[i] else 0.0
        s1 += g
        s2 += g * (load(row[i]) - origin)
    return s1, s2


@njit(**_EXACT)
def plane_sums(x, c, n0, n1, l0, l1, origin):
    """``sum(x - origin)`` and ``sum((x - origin)**2)`` over ``x[n0:n1, c, l0:l1]``."""
    s1 = s2 = lost1 = lost2 = 0.0
    for n in range(n0, n1):
        for b in range(l0, l1, BLOCK):
            b1, b2 = block_sums(x[n, c, b : min(b + BLOCK, l1)], origin)
            s1, lost1 = compensated(s1, lost1, b1)
            s2, lost2 = compensated(s2, lost2, b2)
    return s1, s2


@njit(**_EXACT)
def plane_gradient_sums(dy, x, active, masked, c, n0, n1, l0, l1, origin):
    """``sum(dy)`` and ``sum(dy * (x - origin))`` over the same part, with 0 for dy where it is not active."""
    s1 = s2 = lost1 = lost2 = 0.0
    for n in range(n0, n1):
        for b in range(l0, l1, BLOCK):
            e = min(b + BLOCK, l1)
            b1, b2 = block_gradient_sums(dy[n, c, b:e], x[n, c, b:e], active[n, c, b:e], masked, origin)
            s1, lost1 = compensated(s1, lost1, b1)
            s2, lost2 = compensated(s2, lost2, b2)
    return s1, s2


@njit(**_EXACT)
def compensated(total, lost, term):
    term = term - lost
    new = total + term
    return new, (new - total) - term


@njit(**_EXACT)
def normalize_planes(x, y, residual, added, relu, wide, mean, shift, scale, bias, n0, n1, c0, c1, l0, l1):
    """``y = relu(((x - mean) - shift) * scale + bias + residual)`` on ``[n0:n1, c0:c1, l0:l1]``."""
    for n in range(n0, n1):
        for c in range(c0, c1):
            row, out, rest = x[n, c, l0:l1], y[n, c, l0:l1], residual[n, c, l0:l1]
            m, s, k, b = mean[c], shift[c], scale[c], bias[c]
            for i in range(len(row)):
                v = load(row[i]) - m
                v = (v if wide else v - s) * k + b
                if added:
                    v = v + load(rest[i])
                if relu:
                    v = 0.0 if v <= 0.0 else v
                store(out, i, v)


@njit(**_EXACT)
def gradient_planes(dy, x, active, masked, wide, dx, mean, shift, rstd, k1, k2, scale, n0, n1, c0, c1, l0, l1):
    """``dx = (dy - k1 - xhat * k2) * scale`` on the same part."""
    for n in range(n0, n1):
        for c in range(c0, c1):
            drow, row, out, arow = dy[n, c, l0:l1], x[n, c, l0:l1], dx[n, c, l0:l1], active[n, c, l0:l1]
            m, s, r, a, b, k = mean[c], shift[c], rstd[c], k1[c], k2[c], scale[c]
            for i in range(len(row)):
                g = load(drow[i])
                if masked:
                    g = g if arow[i] else 0.0
                d = load(row[i]) - m
                d = d if wide else d - s
                store(out, i, (g - a - d * r * b) * k)


@njit(**_EXACT)
def spread(values, length, out):
    """Each value length times."""
    for c in range(len(values)):
        out[c * length : (c + 1) * length] = values[c]


@njit(**_SUMS)
def gathered(out, length, spread_sums):
    """The sums of every length values."""
    for c in range(len(out)):
        total = 0.0
        for i in range(length):
            total += spread_sums[c * length + i]
        out[c] = total


@njit(**_EXACT)
def group_sums(x, c0, c1, origin, s1, s2):
    """`plane_sums` of whole channels c0 to c1, given by their origins. Short planes of a group lie side by side and are
    added to each other first: a sum of 49 values is over before it runs in lanes."""
    n, channels, length = x.shape
    if length >= SHORT:
        for c in range(c0, c1):
            s1[c - c0], s2[c - c0] = plane_sums(x, c, 0, n, 0, length, origin[c - c0])
        return
    width = (c1 - c0) * length
    origins, t1, t2 = np.empty(width), np.empty(width), np.empty(width)
    spread(origin, length, origins)
    row_sums(x.reshape(n, channels * length), 0, n, c0 * length, c1 * length, origins, t1, t2)
    gathered(s1, length, t1)
    gathered(s2, length, t2)


@njit(**_EXACT)
def group_gradient_sums(dy, x, active, masked, c0, c1, origin, s1, s2):
    """The same of `plane_gradient_sums`."""
    n, channels, length = x.shape
    if length >= SHORT:
        for c in range(c0, c1):
            s1[c - c0], s2[c - c0] = plane_gradient_sums(dy, x, active, masked, c, 0, n, 0, length, origin[c - c0])
        return
    width, shape = (c1 - c0) * length, (n, channels * length)
    origins, t1, t2 = np.empty(width), np.empty(width), np.empty(width)
    spread(origin, length, origins)
    flat, low, high = active.reshape(shape), c0 * length, c1 * length
    row_gradient_sums(dy.reshape(shape), x.reshape(shape), flat, masked, 0, n, low, high, origins, t1, t2)
    gathered(s1, length, t1)
    gathered(s2, length, t2)


@njit(**_EXACT)
def group_size(length):
    """Channels that are worked on together, while they lie in the cache."""
    return max(1, WIDTH // length) if length < SHORT else 1


@njit(**_EXACT)
def train_planes(x, y, residual, added, relu, wide, eps, weight, bias, mean, shift, m2, scale, first, last):
    """Channels first to last from statistics to y, each while it lies in the cache."""
    n, _, length = x.shape
    count, step = n * length, group_size(length)
    s1, s2 = np.empty(step), np.empty(step)
    for c0 in range(first, last, step):
        c1 = min(c0 + step, last)
        for c in range(c0, c1):
            mean[c] = load(x[0, c, 0])
            shift[c] = 0.0
        group_sums(x, c0, c1, mean[c0:c1], s1[: c1 - c0], s2[: c1 - c0])
        for c in range(c0, c1):
            mean[c] += s1[c - c0] / count
        if not wide:
            group_sums(x, c0, c1, mean[c0:c1], s1[: c1 - c0], s2[: c1 - c0])
            for c in range(c0, c1):
                shift[c] = s1[c - c0] / count
        for c in range(c0, c1):
            m2[c] = s2[c - c0] - s1[c - c0] * (s1[c - c0] / count)
            scale[c] = 1.0 / np.sqrt(m2[c] / count + eps) * weight[c]
        normalize_planes(x, y, residual, added, relu, wide, mean, shift, scale, bias, 0, n, c0, c1, 0, length)


@njit(**_EXACT)
def backward_planes(
    dy, x, active, masked, wide, dx, count, mean, shift, rstd, scale, dweight, dbias, k1, k2, first, last
):
    """Channels first to last of the gradient; count 0 where the statistics are constants."""
    n, _, length = x.shape
    step = group_size(length)
    s2 = np.empty(step)
    for c0 in range(first, last, step):
        c1 = min(c0 + step, last)
        group_gradient_sums(dy, x, active, masked, c0, c1, mean[c0:c1], dbias[c0:c1], s2[: c1 - c0])
        for c in range(c0, c1):
            dweight[c] = (s2[c - c0] - shift[c] * dbias[c]) * rstd[c]
            k1[c] = dbias[c] / count if count else 0.0
            k2[c] = dweight[c] / count if count else 0.0
        gradient_planes(dy, x, active, masked, wide, dx, mean, shift, rstd, k1, k2, scale, 0, n, c0, c1, 0, length)


@njit(**_EXACT)
def segment(q, channels, length, segments):
    """``(n, c, l0, l1)`` of segment q, where every plane is cut into as many, in the order of memory."""
    plane, part = divmod(q, segments)
    step = -(-length // segments)
    return plane // channels, plane % channels, min(part * step, length), min((part + 1) * step, length)


@njit(**_EXACT)
def normalize_segments(x, y, residual, added, relu, wide, mean, shift, scale, bias, segments, q0, q1):
    for q in range(q0, q1):
        n, c, l0, l1 = segment(q, x.shape[1], x.shape[2], segments)
        normalize_planes(x, y, residual, added, relu, wide, mean, shift, scale, bias, n, n + 1, c, c + 1, l0, l1)


@njit(**_EXACT)
def gradient_segments(dy, x, active, masked, wide, dx, mean, shift, rstd, k1, k2, scale, segments, q0, q1):
    for q in range(q0, q1):
        n, c, l0, l1 = segment(q, x.shape[1], x.shape[2], segments)
        gradient_planes(dy, x, active, masked, wide, dx, mean, shift, rstd, k1, k2, scale, n, n + 1, c, c + 1, l0, l1)


@njit(**_EXACT)
def sum_segments(x, origin, segments, s1, s2, q0, q1):
    """`plane_sums` of segments q0 to q1, each at its place in s1 and s2."""
    for q in range(q0, q1):
        n, c, l0, l1 = segment(q, x.shape[1], x.shape[2], segments)
        s1[q], s2[q] = plane_sums(x, c, n, n + 1, l0, l1, origin[c])


@njit(**_EXACT)
def gradient_sum_segments(dy, x, active, masked, origin, segments, s1, s2, q0, q1):
    for q in range(q0, q1):
        n, c, l0, l1 = segment(q, x.shape[1], x.shape[2], segments)
        s1[q], s2[q] = plane_gradient_sums(dy, x, active, masked, c, n, n + 1, l0, l1, origin[c])


# -- rows: (R, C) ----------------------------------------------------------------------------------------------


@njit(**_SUMS)
def block_row_sums(x, r0, r1, k0, k1, origin, b1, b2):
    b1[:] = 0.0
    b2[:] = 0.0
    even = r0 + (r1 - r0) // 4 * 4
    for r in range(r0, even, 4):  # four rows for each pass over the accumulators, which lie in memory
        x0, x1, x2, x3 = x[r, k0:k1], x[r + 1, k0:k1], x[r + 2, k0:k1], x[r + 3, k0:k1]
        for c in range(len(b1)):
            o = origin[c]
            d0, d1, d2, d3 = load(x0[c]) - o, load(x1[c]) - o, load(x2[c]) - o, load(x3[c]) - o
            b1[c] += (d0 + d1) + (d2 + d3)
            b2[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
    for r in range(even, r1):
        row = x[r, k0:k1]
        for c in range(len(b1)):
            d = load(row[c]) - origin[c]
            b1[c] += d
            b2[c] += d * d


@njit(**_SUMS)
def block_row_gradient_sums(dy, x, active, masked, r0, r1, k0, k1, origin, b1, b2):
    b1[:] = 0.0
    b2[:] = 0.0
    for r in range(r0, r1):
        drow, row, arow = dy[r, k0:k1], x[r, k0:k1], active[r, k0:k1]
        for c in range(len(b1)):
            g = load(drow[c])
            if masked:
                g = g if arow[c] else 0.0
            b1[c] += g
            b2[c] += g * (load(row[c]) - origin[c])


@njit(**_EXACT)
def add_compensated(sums, lost, terms):
    for c in range(len(sums)):
        sums[c], lost[c] = compensated(sums[c], lost[c], terms[c])


@njit(**_EXACT)
def row_sums(x, r0, r1, k0, k1, origin, s1, s2):
    """``s1 = sum(x - origin)`` and ``s2 = sum((x - origin)**2)`` over the rows of ``x[r0:r1, k0:k1]``."""
    b1, b2, lost1, lost2 = np.empty(k1 - k0), np.empty(k1 - k0), np.zeros(k1 - k0), np.zeros(k1 - k0)
    s1[:] = 0.0
    s2[:] = 0.0
    for b in range(r0, r1, ROWS):
        block_row_sums(x, b, min(b + ROWS, r1), k0, k1, origin, b1, b2)
        add_compensated(s1, lost1, b1)
        add_compensated(s2, lost2, b2)


@njit(**_EXACT)
def row_gradient_sums(dy, x, active, masked, r0, r1, k0, k1, origin, s1, s2):
    """``s1 = sum(dy)`` and ``s2 = sum(dy * (x - origin))`` over the same rows, with 0 for dy where it is not active."""
    b1, b2, lost1, lost2 = np.empty(k1 - k0), np.empty(k1 - k0), np.zeros(k1 - k0), np.zeros(k1 - k0)
    s1[:] = 0.0
    s2[:] = 0.0
    for b in range(r0, r1, ROWS):
        block_row_gradient_sums(dy, x, active, masked, b, min(b + ROWS, r1), k0, k1, origin, b1, b2)
        add_compensated(s1, lost1, b1)
        add_compensated(s2, lost2, b2)


@njit(**_EXACT)
def sum_stripes(x, origin, step, s1, s2, p0, p1):
    """`row_sums` of stripes p0 to p1 of step rows, each at its place in s1 and s2."""
    for p in range(p0, p1):
        row_sums(x, p * step, min((p + 1) * step, len(x)), 0, x.shape[1], origin, s1[p], s2[p])


@njit(**_EXACT)
def gradient_sum_stripes(dy, x, active, masked, origin, step, s1, s2, p0, p1):
    for p in range(p0, p1):
        end = min((p + 1) * step, len(x))
        row_gradient_sums(dy, x, active, masked, p * step, end, 0, x.shape[1], origin, s1[p], s2[p])


@njit(**_EXACT)
def normalize_rows(x, y, residual, added, relu, wide, mean, shift, scale, bias, r0, r1):
    for r in range(r0, r1):
        row, out, rest = x[r], y[r], residual[r]
        for c in range(len(mean)):
            v = load(row[c]) - mean[c]
            v = (v if wide else v - shift[c]) * scale[c] + bias[c]
            if added:
                v = v + load(rest[c])
            if relu:
                v = 0.0 if v <= 0.0 else v
            store(out, c, v)


@njit(**_EXACT)
def gradient_rows(dy, x, active, masked, wide, dx, mean, shift, rstd, k1, k2, scale, r0, r1):
    for r in range(r0, r1):
        drow, row, out, arow = dy[r], x[r], dx[r], active[r]
        for c in range(x.shape[1]):
            g = load(drow[c])
            if masked:
                g = g if arow[c] else 0.0
            d = load(row[c]) - mean[c]
            d = d if wide else d - shift[c]
            store(out, c, (g - k1[c] - d * rstd[c] * k2[c]) * scale[c])


@njit(**_EXACT)
def train_rows(x, y, residual, added, relu, wide, eps, weight, bias, mean, shift, m2, scale):
    """All of a small array, in one call."""
    count, channels = x.shape
    s1, s2 = np.empty(channels), np.empty(channels)
    for c in range(channels):
        mean[c] = load(x[0, c])
        shift[c] = 0.0
    row_sums(x, 0, count, 0, channels, mean, s1, s2)
    for c in range(channels):
        mean[c] = mean[c] + s1[c] / count
    if not wide:
        row_sums(x, 0, count, 0, channels, mean, s1, s2)
        for c in range(channels):
            shift[c] = s1[c] / count
    for c in range(channels):
        m2[c] = s2[c] - s1[c] * (s1[c] / count)
        scale[c] = 1.0 / np.sqrt(m2[c] / count + eps) * weight[c]
    normalize_rows(x, y, residual, added, relu, wide, mean, shift, scale, bias, 0, count)
