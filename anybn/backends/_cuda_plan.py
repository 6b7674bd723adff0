"""Which kernels of batchnorm.cu run a call, and how they are launched: a pure function of shape, dtype and device.

An array lies in memory as ``(n, channels, length)``: *planes*, or, where length is 1, *rows* of channels.

A channel whose block, or whose cluster of blocks, can hold it in shared memory takes one launch that reads x once. So
does one of which half can be held, where there are channels enough to keep every multiprocessor busy. All else takes
two passes over x, which any number of blocks can share.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

#: dtype -> (type in batchnorm.cu, bytes of a value, bytes of `Sums`).
TYPES = {
    "float16": ("float16", 2, 16),
    "bfloat16": ("bfloat16", 2, 16),
    "float32": ("float", 4, 16),
    "float64": ("double", 8, 32),
}

#: (dtype, rows) -> values that a thread loads at once, the best first. Of a plane, up to 16 bytes; of rows less,
#: because a thread has a pair of sums for each of its channels.
VECTORS = {
    ("float16", False): (8, 4, 1),
    ("float16", True): (4, 1),
    ("bfloat16", False): (8, 4, 1),
    ("bfloat16", True): (4, 1),
    ("float32", False): (4, 1),
    ("float32", True): (2, 1),
    ("float64", False): (2, 1),
    ("float64", True): (1,),
}
CLUSTERS = (1, 2, 4, 8)

WARP = 32
MOST_THREADS = 512  # of a block, as batchnorm.cu is compiled
STREAMING_THREADS = 256  # of a block that keeps nothing: more blocks are resident, and fewer wait at a barrier
RESERVED = 1024  # bytes of shared memory that every block costs beside its own
PER_CHANNEL = 40  # bytes of `Gradient`, the larger of what a block keeps per channel
MOST_BLOCKS = 2**31 - 1, 65535  # of a grid, in x and y


class Device(NamedTuple):
    """What the choice depends on."""

    multiprocessors: int
    shared_bytes: int
    """that a block can have at most, if it asks"""
    capability: tuple[int, int]

    @property
    def clusters(self) -> tuple[int, ...]:
        return CLUSTERS if self.capability >= (9, 0) else CLUSTERS[:1]


class Launch(NamedTuple):
    kernel: str
    """with its template arguments"""
    grid: tuple[int, int]
    block: tuple[int, int]
    shared_bytes: int = 0
    cluster: int = 1
    keep: int = 0
    """positions per block that stay in shared memory"""


class Plan(NamedTuple):
    launches: tuple[Launch, ...]
    parts: int = 1
    """into which `sums` and `gradient_sums` cut every channel"""
    scratch_bytes: int = 0
    """for their results, and for those of `finish_backward`"""


class Tiling(NamedTuple):
    """How blocks cover an array: `block` threads, (along channels, along positions)."""

    arguments: str
    """of the templates"""
    vector: int
    width: int
    """threads along channels; `columns` channels in a block"""
    columns: int
    tiles: int
    positions: int
    """vectors of a channel, or rows"""
    position_bytes: int
    """of a block's vectors at one position"""
    unroll: int
    """positions that a thread takes at a time"""

    def block(self, threads: int) -> tuple[int, int]:
        """A block of at most so many threads, and no more than have something to do."""
        useful = -(-self.positions // self.unroll) * self.width
        threads = min(threads, max(WARP, 1 << (useful - 1).bit_length()))
        return self.width, threads // self.width

    def scratch(self, block: tuple[int, int], sums_bytes: int) -> int:
        """Shared memory before what is kept: sums per warp and channel, and a channel's coefficients; 16 | result."""
        warps = block[0] * block[1] // WARP
        return -(-self.columns * (warps * sums_bytes + PER_CHANNEL) // 16) * 16


def tiling(shape: tuple[int, int, int], dtype: str, alignment: int) -> Tiling:
    n, channels, length = shape
    name, itemsize, _ = TYPES[dtype]
    rows = length == 1
    along = channels if rows else length
    vector = next(v for v in VECTORS[dtype, rows] if along % v == 0 and alignment % (v * itemsize) == 0)
    width = min(WARP, 1 << (channels // vector - 1).bit_length()) if rows else 1
    columns = width * vector if rows else 1
    return Tiling(
        arguments=f"{name}, {vector}, {str(rows).lower()}",
        vector=vector,
        width=width,
        columns=columns,
        tiles=-(-channels // columns),
        positions=n if rows else n * (length // vector),
        position_bytes=width * vector * itemsize,
        unroll=2 if vector >= 8 else 4 if vector >= 4 else 8,
    )


def kernels(dtype: str) -> list[str]:
    """Every kernel for values of dtype, with its template arguments, and `commit`."""
    name = TYPES[dtype][0]
    shapes = [f"{name}, {v}, {str(rows).lower()}" for rows in (False, True) for v in VECTORS[dtype, rows]]
    return [
        *(f"{kernel}<{s}, {c}>" for kernel in ("train", "backward") for s in shapes for c in CLUSTERS),
        *(f"{kernel}<{s}>" for kernel in ("sums", "evaluate", "gradient_sums", "gradients") for s in shapes),
        *(f"{kernel}<{name}>" for kernel in ("finish_train", "finish_backward")),
        "commit",
    ]


@functools.lru_cache(maxsize=4096)
def plan(op: str, shape: tuple[int, int, int], dtype: str, device: Device, alignment: int = 16) -> Plan:
    """The launches of "train", "evaluate", "backward", "statistics" (of training alone), "gradients" (dx alone, with
    constant statistics) or "commit" on an array of this shape, not empty, whose pointers are multiples of alignment.
    """
    if op == "commit":
        return Plan((Launch("commit", (1, 1), (MOST_THREADS, 1)),))
    tiles = tiling(shape, dtype, alignment)
    if op in ("train", "backward"):
        single = _one_launch(op, tiles, dtype, device)
        if single is not None:
            return Plan((single,))
    name, channels, sums_bytes = TYPES[dtype][0], shape[1], TYPES[dtype][2]
    block = tiles.block(STREAMING_THREADS)
    parts = _parts(tiles, block, 4 * device.multiprocessors)
    first, last = {
        "train": ("sums", "evaluate"),
        "statistics": ("sums", None),
        "backward": ("gradient_sums", "gradients"),
        "evaluate": (None, "evaluate"),
        "gradients": (None, "gradients"),
    }[op]
    launches = []
    scratch_bytes = 0
    if first is not None:
        finish = "finish_backward" if first == "gradient_sums" else "finish_train"
        shared = tiles.scratch(block, sums_bytes)
        launches = [
            Launch(f"{first}<{tiles.arguments}>", (tiles.tiles, parts), block, shared),
            Launch(f"{finish}<{name}>", (-(-channels // 4), 1), (WARP, 4)),
        ]
        scratch_bytes = channels * (parts * sums_bytes + 16)
    if last is not None:
        grid = tiles.tiles, _parts(tiles, block, 8 * device.multiprocessors)
        launches.append(Launch(f"{last}<{tiles.arguments}>", grid, block, tiles.columns * PER_CHANNEL))
    return Plan(tuple(launches), parts, scratch_bytes)


def _parts(tiles: Tiling, block: tuple[int, int], blocks: int) -> int:
    """Parts of a channel that give so many blocks in all, each with something for every thread."""
    most = -(-tiles.positions // (block[1] * tiles.unroll))
    return max(1, min(-(-blocks // tiles.tiles), most, MOST_BLOCKS[1]))


def _one_launch(op: str, tiles: Tiling, dtype: str, device: Device) -> Launch | None:
    """`train` or `backward`, if that is the better way."""
    arrays = 1 if op == "train" else 2
    bytes_kept = arrays * tiles.position_bytes

    def launch(cluster: int, blocks: int) -> Launch | None:
        """Of so many blocks to a multiprocessor, each of which keeps at least half of its share; None if it cannot."""
        block = tiles.block(MOST_THREADS // blocks)  # so that the registers suffice as well
        scratch = tiles.scratch(block, TYPES[dtype][2])
        share = -(-tiles.positions // cluster)
        room = (device.shared_bytes + RESERVED) // blocks - RESERVED
        keep = min(share, (room - scratch) // bytes_kept)
        if 2 * keep < share or (cluster > 1 and share < block[1] * tiles.unroll):  # or there are threads without work
            return None
        grid, shared = (tiles.tiles * cluster, 1), scratch + keep * bytes_kept
        return Launch(f"{op}<{tiles.arguments}, {cluster}>", grid, block, shared, cluster, keep)

    # Best: all is kept by two blocks to a multiprocessor, so that one reads while the other writes, and all are busy.
    for cluster in device.clusters:
        made = launch(cluster, 2)
        if made is not None and made.keep * cluster >= tiles.positions and made.grid[0] >= device.multiprocessors:
            return made
    # Else all of it, or at least half where that leaves nobody idle: the more blocks the better.
    for cluster in reversed(device.clusters):
        made = launch(cluster, 1)
        if made is not None and (made.keep * cluster >= tiles.positions or made.grid[0] >= 2 * device.multiprocessors):
            return made
    return None


def alignment_of(pointers: Sequence[int], itemsize: int) -> int:
    """The largest power of two, up to 16, that divides all pointers; itemsize if they are not even that."""
    together = math.gcd(16, *pointers)
    return max(together, itemsize)
