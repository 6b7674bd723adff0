"""How the kernels go through an array: as a whole or in parts, in which pieces, on how many threads.

A plan depends on shapes and strides alone, never on values or on the number of threads. All thresholds of this folder
are here, with their units and reasons. Figures were measured on an AMD EPYC with 2 cores, 1 MB of cache for each and
32 MB for both, in November 2026. A threshold without a figure has none on record: measure before you change it.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

from anybn.core.call import RowSpec
from anybn.kernels.layout import Layout

# -- what the caches hold --------------------------------------------------------------------------------------

#: Bytes that a core's own cache is trusted with.
CACHE = 1 << 20
#: Bytes that the cache of all cores is trusted with. In it, two passes in the order of memory take half the time of one
#: channel after the other, whose runs lie apart: each of them begins with a wait for memory.
SHARED_CACHE = 1 << 26
#: Values of a channel side by side from which the kernels go run by run, forward in training; shorter runs are
#: columns. Right after a convolution in ResNet-50, (8, 512, 14, 14) takes 320 us by runs and 410 by columns;
#: (8, 256, 7, 7) takes 240 and 205, since a run of 49 values leaves 17 for a loop without vectors.
RUN = 64
#: The same backward: (8, 512, 14, 14) takes 340 us by runs and 550 by columns, (8, 1024, 7, 7) 300 and 320,
#: (8, 1152, 4, 4) 265 and 175.
BACKWARD_RUN = 32
#: The same for evaluation, which sums nothing, and goes by runs in the order of memory, as the operation before: each
#: thread finds what it wrote in its own cache. (8, 256, 7, 7) takes 100 us by runs and 150 by columns, (8, 1152, 4, 4)
#: 69 and 71.
EVALUATED_RUN = 16
#: Columns gone through at once: mean, scale and bias, 24 KB, fit the innermost cache beside one array. Backward reads
#: two arrays, and its joined rows are half as wide: (32, 28, 28, 128) takes 1.10 ms in place of 1.34.
WIDTH = 1024
#: The same of whole rows of channels, which need no copies of a parameter. In a net, each thread's cache holds the rows
#: that it wrote in the operation before: panels this wide, in stripes of some rows, are read from there. Narrow panels
#: over all rows would be read once in place of twice, but half of each from another thread's cache.
PANEL = 2048
#: Values of a row that take a mask one by one, by their places in it; a longer row is filled for each of them.
NARROW = 32
#: Values of one parameter side by side, in a row, from which they get a loop of their own; fewer get a copy of the
#: parameter each. With 64 in place of 32, the copies crowded the cache as soon as two threads shared it.
ROW_RUN = 32
#: The same backward, where copies for one row are all there are, in rows of RUN_BLOCK values at most, whose copies fit
#: the innermost cache: in runs of 49 values, sums take 0.24 ns a value with copies and 0.35 without, of 196 0.23 and
#: 0.21.
BACKWARD_ROW_RUN = 128
#: Values of rows that are summed one after the other, then normalized: 4 KB of float32. A row's division and root wait
#: for its sums, those of several rows for each other little: (4096, 64) takes 0.42 ns a value by 4 to 16 rows and 0.52
#: by one. More rows at once read and write memory in turns: (12608, 192) takes 0.33 ns by 4 rows and 0.37 by 64.
ROW_GROUP = 1 << 10
#: Values of a block of NumPy's, in `chunked`: 1 MB in float64. The system hands out 2 MB page by page every time, which
#: takes up to four times as long, on (256, 1024); with half of it, training on (32, 64, 28, 28) takes 14 % longer.
BLOCK = 1 << 17

# -- sums ------------------------------------------------------------------------------------------------------

#: Values of a run whose sum is added to the others with what rounding loses kept (Kahan 1965).
RUN_BLOCK = 4096
#: Rows of columns, the same; a loop adds four of them at once, or two.
ROW_BLOCK = 128
#: Values that are summed on their own, so that threads can share a channel; the sums are merged in a fixed order.
SEGMENT = 1 << 16
#: Samples at least whose rows' sums for weight and bias are one part: parts of fewer would take more memory than x.
SAMPLES = 4

# -- threads ---------------------------------------------------------------------------------------------------

#: Bytes that are worth a claim, and with it another thread. Half of it made too many claims of small arrays.
GRAIN = 1 << 17
#: Claims of a call, about: enough for threads of different speed to end together.
CLAIMS = 32
#: Bytes up to which a panel is one task. More is read twice, in stripes, which threads share: two of them train
#: (8, 128, 16, 16), channels last, in 73 us in place of 100.
ONE_THREAD = 2 * GRAIN
#: Fewer rows than this, of more values than that, cannot keep all threads busy, which take a row each: with the values
#: of a row shared instead, two threads are 1.4 times as fast.
FEW_ROWS, LONG_ROW = 16, 1 << 18
#: How long a thread stays awake for what another one is to do: how often it lets the system have the CPU, which may
#: have put the other thread behind it, and how often it looks before. All of it takes 0.17 ms, to wake a thread 15 us.
YIELDS, LOOKS = 50, 20_000


# -- batch norm ------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How the kernels go through an array of some shape, as a whole and in parts.

    A *task* takes some channels from statistics to y; a *part* of an array is summed or normalized on its own.
    """

    kernels: Literal["runs", "columns"]
    """the module whose kernels to use; both have the same names"""
    fits: bool
    """whether what a task reads stays in the cache; if not, the array is read in parts, for its sums and again for y"""
    tasks: tuple[int, int]
    """how many tasks there are, and how many go with one claim"""
    of_task: tuple[int, ...]
    """last arguments of the kernels for tasks: ``length, group`` of runs, ``width, inner, panel`` of columns"""
    parts: tuple[int, int]
    """how many parts there are, and how many go with one claim"""
    of_part: tuple[int, ...]
    """last arguments of the kernels for parts: ``length, segments``, or ``width, inner, panel, stripe``"""
    partial: tuple[int, ...]
    """shape of the parts' sums"""


@functools.lru_cache(maxsize=1024)
def plan_of(layout: Layout, itemsize: int, arrays: int, run: int) -> Plan:
    """The plan for arrays of this layout, so many of which are read; runs are taken as such from this length on."""
    outer, channels, inner = layout.outer, layout.channels, layout.inner
    values, whole = outer * channels * inner, channels * inner
    nbytes = values * itemsize * arrays
    if inner >= run:
        segments = -(-inner // SEGMENT)
        of_channel = outer * inner * itemsize * arrays
        group = max(1, min(CACHE // 2 // of_channel, channels // CLAIMS))
        return Plan(
            "runs",
            fits=of_channel <= CACHE and not CACHE < nbytes <= SHARED_CACHE,
            tasks=_claims(-(-channels // group), nbytes),
            of_task=(inner, group),
            parts=_claims(outer * channels * segments, nbytes),
            of_part=(inner, segments),
            partial=(2, outer, channels, segments),
        )
    joined = max(1, min(WIDTH // arrays // whole, outer))
    width, rows = joined * whole, -(-outer // joined)
    unit = width if joined > 1 else inner  # columns that hold channels whole
    units = width // unit
    panels = -(-units // max(1, (PANEL if inner == 1 else WIDTH) // unit))
    columns = -(-units // panels) * unit
    panels = -(-width // columns)
    # Two arrays make no more of them: each has sums to merge. In a net, (256, 1024) takes 206 us by 8 and 226 by 16.
    worth = max(1, -(-values // SEGMENT), min(CLAIMS, values * itemsize // GRAIN))
    stripe = -(-rows // _even(-(-worth // panels)))
    stripes = -(-rows // stripe)
    return Plan(
        "columns",
        fits=nbytes <= ONE_THREAD or (stripes == 1 and rows * columns * itemsize * arrays <= CACHE // 4),
        tasks=_claims(panels, nbytes),
        of_task=(width, inner, columns),
        parts=_claims(stripes * panels, nbytes),
        of_part=(width, inner, columns, stripe),
        partial=(2, stripes, channels),
    )


def _even(count: int) -> int:
    """As many or some more, so that two or four threads have as many each."""
    return -(-count // 4) * 4 if count > 2 else count


def _claims(count: int, nbytes: int) -> tuple[int, int]:
    """The count, and how many go with one claim, where all of them read so many bytes."""
    return count, -(-count // max(1, min(CLAIMS, nbytes // GRAIN)))


# -- norms of rows ---------------------------------------------------------------------------------------------


class RowPlan(NamedTuple):
    """How the kernels go through rows."""

    length: int
    """values side by side that share a parameter"""
    copies: int
    """how many of each parameter are made, forward"""
    backward_copies: int
    """the same backward, for one row at a time"""
    parameters: int
    """how many there are, without copies"""
    rows: tuple[int, int]
    """how many rows there are, and how many go with one claim"""
    samples: int
    """how many of them make one part of the sums for weight and bias"""
    parts: int
    """how many such parts there are"""
    tasks: tuple[int, int]
    """how many tasks backward has, and how many go with one claim"""


@functools.lru_cache(maxsize=1024)
def row_plan_of(spec: RowSpec, itemsize: int, weighted: bool) -> RowPlan:
    """The plan for rows, each of which has the same parameter all over if they are not weighted."""
    size, values = math.prod(spec.shape), spec.values
    samples, parameters, length = spec.shape if weighted else (size // values, 1, values)
    copies = length if length < ROW_RUN and length < values else 1
    short = length < BACKWARD_ROW_RUN and length < values <= RUN_BLOCK
    sharing = parameters * length // values  # rows of a sample, which share out the parameters
    claims = max(1, min(CLAIMS, size * itemsize * 2 // GRAIN))
    parts = max(1, min(samples // SAMPLES, -(-claims // sharing)))
    per_part = -(-samples // parts)
    parts = -(-samples // per_part)
    return RowPlan(
        length=length,
        copies=copies,
        backward_copies=length if short else copies,
        parameters=parameters,
        rows=_claims(samples * sharing, size * itemsize),
        samples=per_part,
        parts=parts,
        tasks=_claims(parts * sharing, size * itemsize * 2),
    )


def has_few_long_rows(spec: RowSpec) -> bool:
    """Whether there are too few rows for a thread to take one at a time."""
    return spec.values > LONG_ROW and math.prod(spec.shape) < FEW_ROWS * spec.values
