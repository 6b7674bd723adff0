"""Between channels and columns: what a column needs of its channel is spread over the columns, and the sums of columns
are gathered by channel. Columns are those of `columns`; norms of rows spread their parameters in the same way.

A mask has one value for what all channels have at a position; it is spread over the columns too, a byte for each value.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import carray, njit

from anybn.kernels.cpu.plan import NARROW
from anybn.kernels.cpu.primitives import pointer
from anybn.kernels.cpu.values import EXACT, MEAN_DY, SCALE, SLOPE, SUMS, fill


@njit(**EXACT)
def spread(values, inner, k0, out):
    """Fills out with the channels' values for columns k0, k0 + 1, ...; k0 is a channel's first column."""
    c = k0 // inner % len(values)
    if inner == 1:
        column = 0
        while column < len(out):
            part, run = out[column : column + len(values) - c], values[c:]
            for k in range(len(part)):
                part[k] = run[k]
            column, c = column + len(part), 0
    else:
        for k in range(0, len(out), inner):
            fill(out[k : k + inner], values[c])
            c = c + 1 if c + 1 < len(values) else 0


@njit(**EXACT)
def spread_all(mean, shift, third, fourth, inner, k0, columns):
    """Four values of each channel, each in its row of ``columns``; the second row is left alone without shifts."""
    spread(mean, inner, k0, columns[0])
    if shift is not None:
        spread(shift, inner, k0, columns[1])
    spread(third, inner, k0, columns[2])
    spread(fourth, inner, k0, columns[3])


@njit(**EXACT)
def spread_gradients(mean, shift, gradients, inner, k0, columns):
    """Mean, shift, mean of dy, slope and scale of the channels, in that order."""
    spread_all(mean, shift, gradients[MEAN_DY], gradients[SLOPE], inner, k0, columns)
    spread(gradients[SCALE], inner, k0, columns[4])


@njit(**SUMS)
def sum_of(values):
    total = 0.0
    for i in range(len(values)):
        total += values[i]
    return total


@njit(**EXACT)
def gather(columns, turn, inner, sums):
    """The sums over what columns hold of the same channel, for ``len(sums)`` channels; overwrites columns.

    First the turns of the channels, ``turn`` columns each, are added up in pairs, then the columns of a channel.
    """
    turns = len(columns) // turn
    while turns > 1:
        half = turns - turns // 2
        head, tail = columns[: (turns - half) * turn], columns[half * turn : turns * turn]
        for k in range(len(tail)):
            head[k] += tail[k]
        turns = half
    for c in range(len(sums)):
        sums[c] = columns[c] if inner == 1 else sum_of(columns[c * inner : (c + 1) * inner])


@njit(**EXACT)
def channels_of(k0, k1, width, inner, channels):
    """First and one past the last channel of a panel that holds channels whole."""
    return (0, channels) if width > channels * inner else (k0 // inner, -(-k1 // inner))


@njit(**EXACT)
def spread_mask(mask, width, inner, channels, r0, r1, k0, k1, out):
    """Fills out with the mask's value for each value of rows r0 to r1 and columns k0 to k1; without a mask, nothing."""
    if mask is not None:
        whole, (c0, c1) = channels * inner, channels_of(k0, k1, width, inner, channels)
        joined = max(1, width // whole)
        # Numba counts who uses an array, and a slice is one more use, which takes 20 ns; not so of an address.
        rows = carray(pointer(mask, out.ctypes.data), out.shape)
        positions = carray(pointer(mask, mask.ctypes.data), mask.shape)
        narrow = joined > 1 and whole < NARROW
        if narrow:
            position = np.empty(width, np.int64)
            for k in range(width):
                position[k] = k // whole * inner + k % inner
        for r in range(r0, r1):
            row, shown_here = rows[r - r0], positions[r * joined * inner : (r + 1) * joined * inner]
            if joined > 1:
                row = row[: len(shown_here) // inner * whole]
            if are_alike(shown_here):
                spread_over(shown_here[:1], row)
            elif narrow:
                for k in range(len(row)):
                    row[k] = shown_here[position[k]]
            else:
                for n in range(len(shown_here) // inner):
                    spread_over(shown_here[n * inner : (n + 1) * inner], row[n * whole : n * whole + (c1 - c0) * inner])


@njit(**EXACT)
def are_alike(values):
    different = 0
    for i in range(len(values)):
        different += values[i] != values[0]
    return different == 0


@njit(**EXACT)
def spread_over(values, out):
    """Fills out with values, over and over."""
    if len(values) == 1:
        value = values[0]
        for k in range(len(out)):
            out[k] = value
    else:
        for first in range(0, len(out), len(values)):
            part = out[first : first + len(values)]
            for k in range(len(part)):
                part[k] = values[k]
