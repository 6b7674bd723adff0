"""Kernels for columns: flat memory in which the channels take turns, as in rows of channels and in short planes.

It is cut into rows of ``width`` values, the last one maybe shorter, where column k belongs to channel
``k // inner % C``. Rows of a few channels are joined to wide ones, so that there is something to vectorize over. What a
column needs of its channel, and of a mask, is spread over the columns before the rows are gone through, and sums are
gathered after: see `spreading`.

A thread claims *panels*, some columns over all rows, where all of the array stays in its cache; else, or where the
statistics are given, *stripes* of panels, some rows of them.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import njit

from anybn.kernels.cpu.cached import cached
from anybn.kernels.cpu.plan import ROW_BLOCK
from anybn.kernels.cpu.sharing import begin, proceed, shared
from anybn.kernels.cpu.spreading import channels_of, gather, spread, spread_all, spread_gradients, spread_mask
from anybn.kernels.cpu.values import (
    EXACT,
    KERNEL,
    MEAN,
    SCALE,
    SUMS,
    active_dy,
    add_compensated,
    at,
    cut,
    dx_of,
    fill,
    finish_gradients,
    finish_statistics,
    first_shown,
    if_given,
    load,
    normalized,
    put,
    room_for_mask,
    scales_of,
    shift_in,
    shown,
    store,
    take_origins,
)


@njit(**EXACT)
def part_of(x, width, r, k0, k1):
    """Columns k0 to k1 of row r; of the last row, those that it has."""
    return cut(x, r * width + k0, r * width + k1)


@njit(**EXACT)
def rows_apart(x, width, r0, r1, lanes):
    """The distance of the rows, so many, that a loop over rows r0 to r1 reads at once; the last row may not be whole.

    A processor fetches ahead where it sees one address follow another. Neighbouring rows read by turns end that row by
    row; of rows far apart, each is a stream for as long as the loop goes on. On one thread, and arrays that are not in
    the cache, the sums of a forward pass take 0.24 ns a value in place of 0.36, those of a backward pass 0.33 to 0.45
    in place of 0.68, dx 0.65 in place of 0.90.
    """
    return max(0, min(r1, len(x) // width) - r0) // lanes


@njit(**SUMS)
def block_column_sums(x, mask, width, r0, first, last, apart, rest, end, k0, k1, origin, b1, b2):
    """Sums of the rows from first to last, of those once, twice and three times as far apart, and of rest to end; the
    mask begins with row r0."""
    fill(b1, 0.0)
    fill(b2, 0.0)
    for r in range(first, last):
        x0, x1 = part_of(x, width, r, k0, k1), part_of(x, width, r + apart, k0, k1)
        x2, x3 = part_of(x, width, r + 2 * apart, k0, k1), part_of(x, width, r + 3 * apart, k0, k1)
        m0, m1 = at(mask, r - r0), at(mask, r - r0 + apart)
        m2, m3 = at(mask, r - r0 + 2 * apart), at(mask, r - r0 + 3 * apart)
        for k in range(len(x0)):
            o = origin[k]
            d0, d1 = shown(load(x0[k]) - o, at(m0, k)), shown(load(x1[k]) - o, at(m1, k))
            d2, d3 = shown(load(x2[k]) - o, at(m2, k)), shown(load(x3[k]) - o, at(m3, k))
            b1[k] += (d0 + d1) + (d2 + d3)
            b2[k] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
    for r in range(rest, end):
        row, m = part_of(x, width, r, k0, k1), at(mask, r - r0)
        for k in range(len(row)):
            d = shown(load(row[k]) - origin[k], at(m, k))
            b1[k] += d
            b2[k] += d * d


@njit(**SUMS)
def block_column_gradient_sums(dy, x, active, mask, width, r0, first, last, apart, rest, end, k0, k1, origin, b1, b2):
    """Sums of the rows from first to last, of those so far apart from them, and of rest to end; the mask begins with
    row r0."""
    fill(b1, 0.0)
    fill(b2, 0.0)
    for r in range(first, last):
        x0, x1 = part_of(x, width, r, k0, k1), part_of(x, width, r + apart, k0, k1)
        dy0, dy1 = part_of(dy, width, r, k0, k1), part_of(dy, width, r + apart, k0, k1)
        a0, a1 = part_of(active, width, r, k0, k1), part_of(active, width, r + apart, k0, k1)
        m0, m1 = at(mask, r - r0), at(mask, r - r0 + apart)
        for k in range(len(x0)):
            g0, g1 = shown(active_dy(dy0[k], at(a0, k)), at(m0, k)), shown(active_dy(dy1[k], at(a1, k)), at(m1, k))
            d0, d1 = shown(load(x0[k]) - origin[k], at(m0, k)), shown(load(x1[k]) - origin[k], at(m1, k))
            b1[k] += g0 + g1
            b2[k] += g0 * d0 + g1 * d1
    for r in range(rest, end):
        row, drow = part_of(x, width, r, k0, k1), part_of(dy, width, r, k0, k1)
        arow, m = part_of(active, width, r, k0, k1), at(mask, r - r0)
        for k in range(len(row)):
            g = shown(active_dy(drow[k], at(arow, k)), at(m, k))
            b1[k] += g
            b2[k] += g * shown(load(row[k]) - origin[k], at(m, k))


@njit(**EXACT)
def column_sums(dy, x, active, mask, width, r0, r1, k0, k1, origin, s1, s2):
    """``sum(x - origin)`` and ``sum((x - origin)**2)`` of columns k0 to k1 over rows r0 to r1, of which the mask is; or
    of dy, ``sum(dy)`` and ``sum(dy * (x - origin))``, with 0 for dy where it is not active."""
    lanes = 4 if dy is None else 2
    apart, block = rows_apart(x, width, r0, r1, lanes), ROW_BLOCK // lanes
    b1, b2, lost1, lost2, several = s1, s2, s1, s2, apart > block
    if several:
        b1, b2, lost1, lost2 = np.empty(k1 - k0), np.empty(k1 - k0), np.empty(k1 - k0), np.empty(k1 - k0)
        for total in (s1, s2, lost1, lost2):
            fill(total, 0.0)
    for r in range(0, max(1, apart), block):
        last = min(r + block, apart)
        rest = r0 + lanes * apart if last == apart else r1
        rows = width, r0, r0 + r, r0 + last, apart, rest, r1
        if dy is None:
            block_column_sums(x, mask, *rows, k0, k1, origin, b1, b2)
        else:
            block_column_gradient_sums(dy, x, active, mask, *rows, k0, k1, origin, b1, b2)
        if several:
            add_compensated(s1, lost1, b1)
            add_compensated(s2, lost2, b2)


@njit(**EXACT)
def put_y(out, k, value, mean, shift, scale, bias, residual, floor, keep):
    store(out, k, shown(normalized(value, mean, shift, scale, bias, residual, floor), keep))


@njit(**EXACT)
def put_dx(out, residual_out, k, dy, value, mean, shift, mean_dy, slope, scale, keep):
    put(residual_out, k, shown(dy, keep))
    store(out, k, shown(dx_of(dy, value, mean, shift, mean_dy, slope, scale), keep))


@njit(**EXACT)
def write_rows(x, y, residual, mask, floor, mean, shift, scale, bias, width, r0, r1, k0, k1):
    apart = rows_apart(x, width, r0, r1, 2)
    for r in range(r0, r0 + apart):
        x0, x1 = part_of(x, width, r, k0, k1), part_of(x, width, r + apart, k0, k1)
        y0, y1 = part_of(y, width, r, k0, k1), part_of(y, width, r + apart, k0, k1)
        a0, a1 = part_of(residual, width, r, k0, k1), part_of(residual, width, r + apart, k0, k1)
        m0, m1 = at(mask, r - r0), at(mask, r - r0 + apart)
        for k in range(len(x0)):
            put_y(y0, k, x0[k], mean[k], at(shift, k), scale[k], bias[k], at(a0, k), floor, at(m0, k))
            put_y(y1, k, x1[k], mean[k], at(shift, k), scale[k], bias[k], at(a1, k), floor, at(m1, k))
    for r in range(r0 + 2 * apart, r1):
        row, out = part_of(x, width, r, k0, k1), part_of(y, width, r, k0, k1)
        residual_row, m = part_of(residual, width, r, k0, k1), at(mask, r - r0)
        for k in range(len(row)):
            put_y(out, k, row[k], mean[k], at(shift, k), scale[k], bias[k], at(residual_row, k), floor, at(m, k))


@njit(**EXACT)
def write_y(x, y, residual, mask, floor, mean, shift, scale, bias, width, r0, r1, k0, k1):
    """y in columns k0 to k1 of rows r0 to r1, with the channels' values spread."""
    if floor == -np.inf:
        write_rows(x, y, residual, mask, None, mean, shift, scale, bias, width, r0, r1, k0, k1)
    else:
        write_rows(x, y, residual, mask, floor, mean, shift, scale, bias, width, r0, r1, k0, k1)


@njit(**EXACT)
def write_dx(dy, x, active, mask, dx, dresidual, columns, shift, width, r0, r1, k0, k1):
    """dx and the residual's gradient in columns k0 to k1 of rows r0 to r1, with what `spread_gradients` put into
    columns."""
    mean, mean_dy, slope, scale = columns[0], columns[2], columns[3], columns[4]
    apart = rows_apart(x, width, r0, r1, 2)
    for r in range(r0, r0 + apart):
        x0, x1 = part_of(x, width, r, k0, k1), part_of(x, width, r + apart, k0, k1)
        dx0, dx1 = part_of(dx, width, r, k0, k1), part_of(dx, width, r + apart, k0, k1)
        dy0, dy1 = part_of(dy, width, r, k0, k1), part_of(dy, width, r + apart, k0, k1)
        a0, a1 = part_of(active, width, r, k0, k1), part_of(active, width, r + apart, k0, k1)
        out0, out1 = part_of(dresidual, width, r, k0, k1), part_of(dresidual, width, r + apart, k0, k1)
        m0, m1 = at(mask, r - r0), at(mask, r - r0 + apart)
        for k in range(len(x0)):
            g0, g1 = active_dy(dy0[k], at(a0, k)), active_dy(dy1[k], at(a1, k))
            put_dx(dx0, out0, k, g0, x0[k], mean[k], at(shift, k), mean_dy[k], slope[k], scale[k], at(m0, k))
            put_dx(dx1, out1, k, g1, x1[k], mean[k], at(shift, k), mean_dy[k], slope[k], scale[k], at(m1, k))
    for r in range(r0 + 2 * apart, r1):
        row, out, drow = part_of(x, width, r, k0, k1), part_of(dx, width, r, k0, k1), part_of(dy, width, r, k0, k1)
        arow, residual_row = part_of(active, width, r, k0, k1), part_of(dresidual, width, r, k0, k1)
        m = at(mask, r - r0)
        for k in range(len(row)):
            g = active_dy(drow[k], at(arow, k))
            put_dx(out, residual_row, k, g, row[k], mean[k], at(shift, k), mean_dy[k], slope[k], scale[k], at(m, k))


@njit(**EXACT)
def stripe_sums(dy, x, active, mask, width, inner, r0, r1, k0, k1, columns, sums):
    """`column_sums` with the origins spread in ``columns[0]``, gathered by channel into ``sums[0]`` and ``sums[1]``;
    ``columns[1]`` and ``columns[2]`` are scratch."""
    s1, s2 = columns[1][: k1 - k0], columns[2][: k1 - k0]
    column_sums(dy, x, active, mask, width, r0, r1, k0, k1, columns[0], s1, s2)
    c0, c1 = channels_of(k0, k1, width, inner, sums.shape[1])
    gather(s1, (c1 - c0) * inner, inner, sums[0][c0:c1])
    gather(s2, (c1 - c0) * inner, inner, sums[1][c0:c1])


# -- tasks: panels ---------------------------------------------------------------------------------------------


@shared(**KERNEL)
def train(tickets, x, y, residual, mask, floor, eps, weight, bias, count, statistics, width, inner, panel):
    """Panels of whole channels, of which so many values count, from statistics to y."""
    mean, shift, scale = statistics[MEAN], shift_in(statistics, x), statistics[SCALE]
    channels, rows = len(mean), -(-len(x) // width)
    sums, columns, shown_here = np.empty((2, channels)), np.empty((4, panel)), room_for_mask(mask, rows, panel)
    shifts, first_value = if_given(shift, columns[1]), first_shown(mask, channels, inner)
    first, last = begin(tickets)
    while first < last:
        for p in range(first, last):
            k0, k1 = p * panel, min((p + 1) * panel, width)
            c0, c1 = channels_of(k0, k1, width, inner, channels)
            take_origins(x, first_value, inner, c0, c1, mean)
            spread(mean, inner, k0, columns[0])
            spread_mask(mask, width, inner, channels, 0, rows, k0, k1, shown_here)
            stripe_sums(None, x, None, shown_here, width, inner, 0, rows, k0, k1, columns, sums)
            if shift is not None:
                for c in range(c0, c1):
                    mean[c] += sums[0, c] / count
                spread(mean, inner, k0, columns[0])
                stripe_sums(None, x, None, shown_here, width, inner, 0, rows, k0, k1, columns, sums)
            finish_statistics(c0, c1, count, sums, eps, weight, statistics, shift)
            spread_all(mean, shift, scale, bias, inner, k0, columns)
            of_columns = columns[0], shifts, columns[2], columns[3]
            write_y(x, y, residual, shown_here, floor, *of_columns, width, 0, rows, k0, k1)
        first, last = proceed(tickets, first, last)


@shared(**KERNEL)
def backward(
    tickets, dy, x, active, mask, dx, dresidual, count, eps, weight, mean, shift, var, gradients, width, inner, panel
):  # fmt: skip
    """The gradient of panels; count is 0 where the statistics are constants."""
    channels, rows = len(mean), -(-len(x) // width)
    sums, columns, shown_here = np.empty((2, channels)), np.empty((5, panel)), room_for_mask(mask, rows, panel)
    shifts = if_given(shift, columns[1])
    first, last = begin(tickets)
    while first < last:
        for p in range(first, last):
            k0, k1 = p * panel, min((p + 1) * panel, width)
            spread(mean, inner, k0, columns[0])
            spread_mask(mask, width, inner, channels, 0, rows, k0, k1, shown_here)
            stripe_sums(dy, x, active, shown_here, width, inner, 0, rows, k0, k1, columns, sums)
            c0, c1 = channels_of(k0, k1, width, inner, channels)
            finish_gradients(c0, c1, count, sums, eps, weight, shift, var, gradients)
            spread_gradients(mean, shift, gradients, inner, k0, columns)
            write_dx(dy, x, active, shown_here, dx, dresidual, columns, shifts, width, 0, rows, k0, k1)
        first, last = proceed(tickets, first, last)


# -- parts: stripes --------------------------------------------------------------------------------------------


@njit(**EXACT)
def stripe_of(number, x, width, panel, stripe):
    """``(panel's number, r0, r1, k0, k1)`` of a stripe; those of a panel come one after the other."""
    rows = -(-len(x) // width)
    p, s = divmod(number, -(-rows // stripe))
    return p, s * stripe, min((s + 1) * stripe, rows), p * panel, min((p + 1) * panel, width)


@shared(**KERNEL)
def sum_parts(tickets, dy, x, active, mask, origin, partial, width, inner, panel, stripe):
    """`stripe_sums` of stripes, each at its place in ``partial``, ``(2, stripes, C)``."""
    sums, columns, shown_here = np.empty((2, len(origin))), np.empty((3, panel)), room_for_mask(mask, stripe, panel)
    spread_for = -1
    first, last = begin(tickets)
    while first < last:
        for number in range(first, last):
            p, r0, r1, k0, k1 = stripe_of(number, x, width, panel, stripe)
            if p != spread_for:
                spread(origin, inner, k0, columns[0])
                spread_for = p
            spread_mask(mask, width, inner, len(origin), r0, r1, k0, k1, shown_here)
            stripe_sums(dy, x, active, shown_here, width, inner, r0, r1, k0, k1, columns, sums)
            c0, c1 = channels_of(k0, k1, width, inner, len(origin))
            for c in range(c0, c1):
                partial[0, r0 // stripe, c], partial[1, r0 // stripe, c] = sums[0, c], sums[1, c]
        first, last = proceed(tickets, first, last)


@shared(**KERNEL)
def normalize_parts(
    tickets, x, y, residual, mask, floor, eps, weight, bias, mean, shift, var, width, inner, panel, stripe
):  # fmt: skip
    scale, columns, spread_for = scales_of(var, eps, weight), np.empty((4, panel)), -1
    shifts, shown_here = if_given(shift, columns[1]), room_for_mask(mask, stripe, panel)
    first, last = begin(tickets)
    while first < last:
        for number in range(first, last):
            p, r0, r1, k0, k1 = stripe_of(number, x, width, panel, stripe)
            if p != spread_for:
                spread_all(mean, shift, scale, bias, inner, k0, columns)
                spread_for = p
            spread_mask(mask, width, inner, len(mean), r0, r1, k0, k1, shown_here)
            of_columns = columns[0], shifts, columns[2], columns[3]
            write_y(x, y, residual, shown_here, floor, *of_columns, width, r0, r1, k0, k1)
        first, last = proceed(tickets, first, last)


@shared(**KERNEL)
def gradient_parts(tickets, dy, x, active, mask, dx, dresidual, mean, shift, gradients, width, inner, panel, stripe):
    columns, spread_for = np.empty((5, panel)), -1
    shifts, shown_here = if_given(shift, columns[1]), room_for_mask(mask, stripe, panel)
    first, last = begin(tickets)
    while first < last:
        for number in range(first, last):
            p, r0, r1, k0, k1 = stripe_of(number, x, width, panel, stripe)
            if p != spread_for:
                spread_gradients(mean, shift, gradients, inner, k0, columns)
                spread_for = p
            spread_mask(mask, width, inner, len(mean), r0, r1, k0, k1, shown_here)
            write_dx(dy, x, active, shown_here, dx, dresidual, columns, shifts, width, r0, r1, k0, k1)
        first, last = proceed(tickets, first, last)


@cached(**KERNEL)
def merge_parts(partial, sums):
    """The sums of every channel, ``(2, C)``, over all stripes."""
    for i in range(2):
        lost = np.empty(partial.shape[2])
        fill(lost, 0.0)
        fill(sums[i], 0.0)
        for s in range(partial.shape[1]):
            add_compensated(sums[i], lost, partial[i, s])
