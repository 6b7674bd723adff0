"""Loops over contiguous memory, compiled by Numba: batch norm over a part of an array.

Shapes: planes are ``(N, C, L)``, with L contiguous values of a channel; rows are ``(R, C)``. All arithmetic is float64,
which costs nothing while memory is the limit, so that results are rounded once and equal the core's. bfloat16 comes as
its bits, uint16. Parameters and statistics are float64 arrays of C values.

Sums run under ``fastmath``, which lets them run in lanes; nothing else does: it would make ``x - (mean + shift)`` of
``(x - mean) - shift``, and lose both. A flag that is the same for the whole call is tested in the innermost loop: LLVM
moves it out.

Every function is untyped, since Numba compiles one version per combination of dtypes.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

_SUMS = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
_EXACT = {"nogil": True, "cache": True, "error_model": "numpy"}

#: Values that are added to one accumulator before it is added to the next, so that errors do not grow with the count.
BLOCK = 4096
ROWS = 32


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


# -- planes: (N, C, L) -----------------------------------------------------------------------------------------


@njit(**_SUMS)
def plane_sums(x, c, n0, n1, l0, l1, origin):
    """``sum(x - origin)`` and ``sum((x - origin)**2)`` over ``x[n0:n1, c, l0:l1]``."""
    s1 = s2 = 0.0
    for n in range(n0, n1):
        row = x[n, c]
        for b in range(l0, l1, BLOCK):
            b1 = b2 = 0.0
            for i in range(b, min(b + BLOCK, l1)):
                d = load(row[i]) - origin
                b1 += d
                b2 += d * d
            s1 += b1
            s2 += b2
    return s1, s2


@njit(**_SUMS)
def plane_gradient_sums(dy, x, active, masked, c, n0, n1, l0, l1, origin):
    """``sum(dy)`` and ``sum(dy * (x - origin))`` over the same part, with 0 for dy where it is not active."""
    s1 = s2 = 0.0
    for n in range(n0, n1):
        drow, row, arow = dy[n, c], x[n, c], active[n, c]
        for b in range(l0, l1, BLOCK):
            b1 = b2 = 0.0
            for i in range(b, min(b + BLOCK, l1)):
                g = load(drow[i])
                if masked:
                    g = g if arow[i] else 0.0
                b1 += g
                b2 += g * (load(row[i]) - origin)
            s1 += b1
            s2 += b2
    return s1, s2


@njit(**_EXACT)
def normalize_planes(x, y, residual, added, relu, mean, shift, scale, bias, n0, n1, c0, c1, l0, l1):
    """``y = relu(((x - mean) - shift) * scale + bias + residual)`` on ``[n0:n1, c0:c1, l0:l1]``."""
    for n in range(n0, n1):
        for c in range(c0, c1):
            row, out, rest = x[n, c], y[n, c], residual[n, c]
            m, s, k, b = mean[c], shift[c], scale[c], bias[c]
            for i in range(l0, l1):
                v = ((load(row[i]) - m) - s) * k + b
                if added:
                    v = v + load(rest[i])
                if relu:
                    v = 0.0 if v <= 0.0 else v
                store(out, i, v)


@njit(**_EXACT)
def gradient_planes(dy, x, active, masked, dx, mean, shift, rstd, k1, k2, scale, n0, n1, c0, c1, l0, l1):
    """``dx = (dy - k1 - xhat * k2) * scale`` on the same part."""
    for n in range(n0, n1):
        for c in range(c0, c1):
            drow, row, out, arow = dy[n, c], x[n, c], dx[n, c], active[n, c]
            m, s, r, a, b, k = mean[c], shift[c], rstd[c], k1[c], k2[c], scale[c]
            for i in range(l0, l1):
                g = load(drow[i])
                if masked:
                    g = g if arow[i] else 0.0
                store(out, i, (g - a - ((load(row[i]) - m) - s) * r * b) * k)


@njit(**_EXACT)
def train_planes(x, y, residual, added, relu, wide, eps, weight, bias, mean, shift, m2, scale, c0, c1):
    """Channels c0 to c1 from statistics to y, each while it lies in the cache."""
    n, _, length = x.shape
    count = n * length
    for c in range(c0, c1):
        origin = load(x[0, c, 0])
        s1, s2 = plane_sums(x, c, 0, n, 0, length, origin)
        mean[c] = origin + s1 / count
        shift[c] = 0.0
        if not wide:
            s1, s2 = plane_sums(x, c, 0, n, 0, length, mean[c])
            shift[c] = s1 / count
        m2[c] = s2 - s1 * (s1 / count)
        scale[c] = 1.0 / np.sqrt(m2[c] / count + eps) * weight[c]
        normalize_planes(x, y, residual, added, relu, mean, shift, scale, bias, 0, n, c, c + 1, 0, length)


@njit(**_EXACT)
def backward_planes(dy, x, active, masked, dx, count, mean, shift, rstd, scale, dweight, dbias, k1, k2, c0, c1):
    """Channels c0 to c1 of the gradient; count 0 where the statistics are constants."""
    n, _, length = x.shape
    for c in range(c0, c1):
        s1, s2 = plane_gradient_sums(dy, x, active, masked, c, 0, n, 0, length, mean[c])
        dbias[c] = s1
        dweight[c] = (s2 - shift[c] * s1) * rstd[c]
        k1[c] = s1 / count if count else 0.0
        k2[c] = dweight[c] / count if count else 0.0
        gradient_planes(dy, x, active, masked, dx, mean, shift, rstd, k1, k2, scale, 0, n, c, c + 1, 0, length)


# -- rows: (R, C) ----------------------------------------------------------------------------------------------


@njit(**_SUMS)
def row_sums(x, r0, r1, origin, s1, s2):
    """``s1 = sum(x - origin)`` and ``s2 = sum((x - origin)**2)`` over ``x[r0:r1]``, per channel."""
    channels = x.shape[1]
    b1, b2 = np.empty(channels), np.empty(channels)
    s1[:] = 0.0
    s2[:] = 0.0
    for b in range(r0, r1, ROWS):
        b1[:] = 0.0
        b2[:] = 0.0
        end = min(b + ROWS, r1)
        even = b + (end - b) // 4 * 4
        for r in range(b, even, 4):  # four rows for each pass over the accumulators, which lie in memory
            x0, x1, x2, x3 = x[r], x[r + 1], x[r + 2], x[r + 3]
            for c in range(channels):
                o = origin[c]
                d0, d1, d2, d3 = load(x0[c]) - o, load(x1[c]) - o, load(x2[c]) - o, load(x3[c]) - o
                b1[c] += (d0 + d1) + (d2 + d3)
                b2[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
        for r in range(even, end):
            row = x[r]
            for c in range(channels):
                d = load(row[c]) - origin[c]
                b1[c] += d
                b2[c] += d * d
        for c in range(channels):
            s1[c] += b1[c]
            s2[c] += b2[c]


@njit(**_SUMS)
def row_gradient_sums(dy, x, active, masked, r0, r1, origin, s1, s2):
    """``s1 = sum(dy)`` and ``s2 = sum(dy * (x - origin))`` over the same rows, with 0 for dy where it is not active."""
    channels = x.shape[1]
    b1, b2 = np.empty(channels), np.empty(channels)
    s1[:] = 0.0
    s2[:] = 0.0
    for b in range(r0, r1, ROWS):
        b1[:] = 0.0
        b2[:] = 0.0
        for r in range(b, min(b + ROWS, r1)):
            drow, row, arow = dy[r], x[r], active[r]
            for c in range(channels):
                g = load(drow[c])
                if masked:
                    g = g if arow[c] else 0.0
                b1[c] += g
                b2[c] += g * (load(row[c]) - origin[c])
        for c in range(channels):
            s1[c] += b1[c]
            s2[c] += b2[c]


@njit(**_EXACT)
def normalize_rows(x, y, residual, added, relu, mean, shift, scale, bias, r0, r1):
    for r in range(r0, r1):
        row, out, rest = x[r], y[r], residual[r]
        for c in range(x.shape[1]):
            v = ((load(row[c]) - mean[c]) - shift[c]) * scale[c] + bias[c]
            if added:
                v = v + load(rest[c])
            if relu:
                v = 0.0 if v <= 0.0 else v
            store(out, c, v)


@njit(**_EXACT)
def gradient_rows(dy, x, active, masked, dx, mean, shift, rstd, k1, k2, scale, r0, r1):
    for r in range(r0, r1):
        drow, row, out, arow = dy[r], x[r], dx[r], active[r]
        for c in range(x.shape[1]):
            g = load(drow[c])
            if masked:
                g = g if arow[c] else 0.0
            store(out, c, (g - k1[c] - ((load(row[c]) - mean[c]) - shift[c]) * rstd[c] * k2[c]) * scale[c])


@njit(**_EXACT)
def train_rows(x, y, residual, added, relu, wide, eps, weight, bias, mean, shift, m2, scale):
    """All of a small array, in one call."""
    count, channels = x.shape
    s1, s2 = np.empty(channels), np.empty(channels)
    for c in range(channels):
        mean[c] = load(x[0, c])
        shift[c] = 0.0
    row_sums(x, 0, count, mean, s1, s2)
    for c in range(channels):
        mean[c] = mean[c] + s1[c] / count
    if not wide:
        row_sums(x, 0, count, mean, s1, s2)
        for c in range(channels):
            shift[c] = s1[c] / count
    for c in range(channels):
        m2[c] = s2[c] - s1[c] * (s1[c] / count)
        scale[c] = 1.0 / np.sqrt(m2[c] / count + eps) * weight[c]
    normalize_rows(x, y, residual, added, relu, mean, shift, scale, bias, 0, count)
