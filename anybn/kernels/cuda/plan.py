"""Which kernels of batchnorm.cu run a call, and how they are launched: a pure function of shape, dtype and device.

An array lies in memory as ``(n, channels, length)``: *planes*, or, where length is 1, *rows* of channels. Planes of a
length that no vector divides are treated as rows as well, of ``channels * length`` columns: 7x7 above all.

Channels that a block, or a cluster of blocks, can hold in shared memory take one launch that reads x once. Channels
that need more blocks than a cluster has take a cooperative launch, whose groups of blocks hold one tile of channels
after the other, or at least a quarter of it. All else takes two passes over x, which any number of blocks can share.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from anybn._settings import DTYPES

#: dtype -> (type in batchnorm.cu, bytes of a value, bytes of `Sums`).
TYPES = {name: (dtype.cuda, dtype.itemsize, 32 if dtype.cuda == "double" else 16) for name, dtype in DTYPES.items()}

#: (dtype, rows) -> values that a thread loads at once, the best first. Of a plane, up to 16 bytes; of rows less,
#: because a thread has a pair of sums for each of its channels.
VECTORS = {
    (name, rows): {2: ((8, 4, 1), (4, 1)), 4: ((4, 1), (4, 1)), 8: ((2, 1), (1,))}[dtype.itemsize][rows]
    for name, dtype in DTYPES.items()
    for rows in (False, True)
}
CLUSTERS = (1, 2, 4, 8)

WARP = 32
#: Threads of a multiprocessor, as batchnorm.cu is compiled: with all its registers, of which some kernels need more.
THREADS = {("train", "planes"): 1024, ("train", "rows"): 512, ("backward", "planes"): 512, ("backward", "rows"): 512}
MOST_THREADS = 512  # of a block that keeps something
STREAMING_THREADS = 256  # of one that does not: more blocks are resident, and fewer wait at a barrier
STREAMING_BLOCKS = {("train", "planes"): 4, ("train", "rows"): 3, ("backward", "planes"): 2, ("backward", "rows"): 2}
RESERVED = 1024  # bytes of shared memory that every block costs beside its own
BARRIERS_BYTES = 128  # of a group: a barrier has a line of the cache to itself
PER_CHANNEL = 80  # bytes of the largest `Coefficients`, which a block keeps per channel
MOST_BLOCKS = 2**31 - 1, 65535  # of a grid, in x and y
TINY_THREADS = 128  # of a block with several tiny channels
MOST_TOGETHER = 225  # vectors that whole channels of a row fill: 15x15 in vectors of 4


class Device(NamedTuple):
    """What the choice depends on."""

    multiprocessors: int
    shared_bytes: int
    """that a block can have at most, if it asks"""
    capability: tuple[int, int]
    cooperative: bool = True
    """can launch a grid all of whose blocks are resident at once"""
    largest_cluster: int = CLUSTERS[-1]

    @property
    def clusters(self) -> tuple[int, ...]:
        largest = self.largest_cluster if self.capability >= (9, 0) else 1
        return tuple(size for size in CLUSTERS if size <= largest)


class Launch(NamedTuple):
    kernel: str
    """with its template arguments"""
    grid: tuple[int, int]
    block: tuple[int, int]
    shared_bytes: int = 0
    cluster: int = 1
    keep: int = 0
    """positions per block that stay in shared memory"""
    width: int = 0
    """threads of a block along channels that have something to do, of block[0]"""
    cooperative: bool = False
    """the blocks wait for one another, so all must be resident at once"""


class Plan(NamedTuple):
    launches: tuple[Launch, ...]
    parts: int = 1
    """into which kernels that write partial sums cut every channel"""
    scratch_bytes: int = 0
    """for these sums, before them 16 per channel for what `finish_backward` finds, and behind them barriers"""

    @property
    def cooperative(self) -> bool:
        return self.launches[-1].cooperative


class Tiling(NamedTuple):
    """How blocks cover an array: threads along channels, each with a vector of columns or of one, and positions."""

    arguments: str
    """of the templates"""
    vector: int
    itemsize: int
    span: int
    """columns of a channel: neighbours in rows, of which one channel has so many"""
    width: int
    """threads along channels"""
    columns: int
    """in a block"""
    tiles: int
    positions: int
    """vectors of a channel, or rows"""
    unroll: int
    """positions that a thread takes at a time"""

    @property
    def kind(self) -> str:
        return "rows" if self.arguments.endswith("true") else "planes"

    def block(self, threads: int) -> tuple[int, int]:
        """A block of at most so many threads, and no more than have something to do; whole warps."""
        useful = -(-self.positions // self.unroll)
        if self.width > WARP:
            height = 1 << (min(threads // self.width, useful, 8).bit_length() - 1)
            return -(-self.width // (WARP // height)) * (WARP // height), height
        threads = min(threads, max(WARP, _power_of_2(useful * self.width)))
        return self.width, threads // self.width

    def position_bytes(self, block: tuple[int, int]) -> int:
        """Of a block's vectors at one position."""
        return block[0] * self.vector * self.itemsize

    def scratch(self, block: tuple[int, int], sums_bytes: int) -> int:
        """Shared memory before what is kept: sums of a block's columns, as often as it has threads for each that do not
        share a warp; and a channel's coefficients; 16 | result."""
        sets = block[1] if block[0] > WARP else block[0] * block[1] // WARP
        return self.columns * sets * sums_bytes + self.coefficients()

    def coefficients(self) -> int:
        """Their bytes; 16 | result."""
        return -(-self.columns // self.span * PER_CHANNEL // 16) * 16


def tiling(
    shape: tuple[int, int, int], dtype: str, alignment: int, row_bytes: int = 256, masked: bool = False
) -> Tiling:
    """row_bytes: the most that a tile of rows takes of each, where a channel is one column. masked: planes stay planes,
    so that a row is one position of the mask."""
    n, channels, length = shape
    name, itemsize, _ = TYPES[dtype]

    def widest(rows: bool) -> int:
        along = channels * length if rows else length
        return next(v for v in VECTORS[dtype, rows] if along % v == 0 and alignment % (v * itemsize) == 0)

    rows, vector, span, width = length == 1, widest(length == 1), 1, 1
    together = length // math.gcd(length, widest(True))  # vectors, at least, that hold whole channels of a row
    many = n >= 8 and channels * length >= WARP * widest(True)
    if rows:
        width = min(WARP, row_bytes // (vector * itemsize), _power_of_2(channels // vector))
    elif vector < widest(True) and together <= MOST_TOGETHER and many and not masked:
        # Up to a warp, a power of two, so that a warp's threads can share columns.
        rows, vector, span = True, widest(True), length
        width = WARP if WARP % together == 0 else -(-(WARP + 1) // together) * together
    unroll = 2 if vector * itemsize >= 16 else 4 if vector >= 4 else 8
    positions = n if rows else n * (length // vector)
    if not rows and positions < WARP:  # several tiny channels, with a thread for each vector
        width, unroll = min(WARP, TINY_THREADS // _power_of_2(positions), _power_of_2(channels)), 1
    columns = width * vector if rows else width
    return Tiling(
        arguments=f"{name}, {vector}, {str(rows).lower()}",
        vector=vector,
        itemsize=itemsize,
        span=span,
        width=width,
        columns=columns,
        tiles=-(-channels // (columns // span)),
        positions=positions,
        unroll=unroll,
    )


def _tiling_of_groups(shape: tuple[int, int, int], dtype: str, alignment: int) -> Tiling:
    """As wide as a line of the cache, so that more is kept of each tile; float64 without vectors, which spill."""
    return tiling(shape, dtype, 8 if dtype == "float64" else alignment, row_bytes=128)


def _power_of_2(n: int) -> int:
    """The least that is not less than n."""
    return 1 << (n - 1).bit_length()


def kernels(dtype: str) -> list[str]:
    """Every kernel for values of dtype, with its template arguments, and those that are for all."""
    name = TYPES[dtype][0]
    shapes = [f"{name}, {v}, {str(rows).lower()}" for rows in (False, True) for v in VECTORS[dtype, rows]]
    plain = "sums", "evaluate", "gradient_sums", "gradients"
    plain_or_masked = "", ", true"
    of_groups = [s for s in shapes if s != "double, 2, false"]
    return [
        *(f"{kernel}<{s}, {c}>" for kernel in ("train", "backward") for s in shapes for c in CLUSTERS),
        *(f"{kernel}<{s}>" for kernel in ("train_group", "backward_group") for s in of_groups),
        *(f"{kernel}<{s}{mask}>" for kernel in plain for s in shapes for mask in plain_or_masked),
        *(f"{kernel}<{name}{mask}>" for kernel in ("finish_train", "finish_backward") for mask in plain_or_masked),
        *("clear_barriers", "commit"),
    ]


@functools.lru_cache(maxsize=4096)
def plan(
    op: str, shape: tuple[int, int, int], dtype: str, device: Device, alignment: int = 16, masked: bool = False
) -> Plan:
    """The launches of "train", "evaluate", "backward", "statistics" (of training alone), "gradients" (dx alone, with
    constant statistics) or "commit" on an array of this shape, not empty, whose pointers are multiples of alignment;
    with a mask, in two passes.
    """
    if op == "commit":
        return Plan((Launch("commit", (1, 1), (STREAMING_THREADS, 1)),))
    tiles = tiling(shape, dtype, alignment, masked=masked)
    if op in ("train", "backward") and not masked:
        groups = _by_group(op, _tiling_of_groups(shape, dtype, alignment), shape[1], dtype, device)
        # Few columns of long rows: clusters would leave most multiprocessors without work.
        if groups and shape[2] == 1 and groups.parts > 1 and tiles.tiles < device.multiprocessors:
            return groups
        made = _by_cluster(op, tiles, dtype, device) or groups or _by_cluster(op, tiles, dtype, device, whole=False)
        if made:
            return made
    name, channels, sums_bytes = TYPES[dtype][0], shape[1], TYPES[dtype][2]
    block = tiles.block(STREAMING_THREADS)
    of = "backward" if op in ("backward", "gradients") else "train"
    parts = _parts(tiles, block, STREAMING_BLOCKS[of, tiles.kind] * device.multiprocessors)
    first, last = {
        "train": ("sums", "evaluate"),
        "statistics": ("sums", None),
        "backward": ("gradient_sums", "gradients"),
        "evaluate": (None, "evaluate"),
        "gradients": (None, "gradients"),
    }[op]
    mask = ", true" if masked else ""
    launches = []
    scratch_bytes = 0
    if first is not None:
        finish = "finish_backward" if first == "gradient_sums" else "finish_train"
        shared = tiles.scratch(block, sums_bytes)
        launches = [
            Launch(f"{first}<{tiles.arguments}{mask}>", (tiles.tiles, parts), block, shared, width=tiles.width),
            Launch(f"{finish}<{name}{mask}>", (-(-channels // 4), 1), (WARP, 4)),
        ]
        scratch_bytes = channels * (parts * sums_bytes + 16)
    if last is not None:
        grid = tiles.tiles, parts
        kernel = f"{last}<{tiles.arguments}{mask}>"
        launches.append(Launch(kernel, grid, block, tiles.coefficients(), width=tiles.width))
    return Plan(tuple(launches), parts, scratch_bytes)


def _parts(tiles: Tiling, block: tuple[int, int], blocks: int) -> int:
    """Parts of a channel that give no more blocks than that in all, each with something for every thread."""
    most = -(-tiles.positions // (block[1] * tiles.unroll))
    return max(1, min(blocks // tiles.tiles, most, MOST_BLOCKS[1]))


def _room(op: str, tiles: Tiling, dtype: str, device: Device, blocks: int) -> tuple[tuple[int, int], int, int, int]:
    """Of so many blocks to a multiprocessor: the block, its scratch, bytes kept per position, positions it can keep."""
    block = tiles.block(min(THREADS[op, tiles.kind] // blocks, MOST_THREADS))  # so that the registers suffice as well
    scratch = tiles.scratch(block, TYPES[dtype][2])
    position_bytes = (1 if op == "train" else 2) * tiles.position_bytes(block)
    shared_bytes = (device.shared_bytes + RESERVED) // blocks - RESERVED
    return block, scratch, position_bytes, max(0, shared_bytes - scratch) // position_bytes


def _by_cluster(op: str, tiles: Tiling, dtype: str, device: Device, whole: bool = True) -> Plan | None:
    """`train` or `backward`, if that is the better way; not whole: where half of every channel can be kept."""

    def launch(cluster: int, blocks: int) -> Launch | None:
        """Of so many blocks to a multiprocessor, each of which keeps its share; None if it cannot."""
        block, scratch, position_bytes, room = _room(op, tiles, dtype, device, blocks)
        share = -(-tiles.positions // cluster)
        keep = min(share, room)
        if 2 * keep < share or (cluster > 1 and share < block[1] * tiles.unroll):  # or there are threads without work
            return None
        if whole and keep < share:
            return None
        grid, shared = (tiles.tiles * cluster, 1), scratch + keep * position_bytes
        return Launch(f"{op}<{tiles.arguments}, {cluster}>", grid, block, shared, cluster, keep, tiles.width)

    # Best, as measured on an H100: four blocks of planes to a multiprocessor, if there are enough of them, else two, so
    # that one reads while the other writes. The cluster may be larger than it has to be to keep all of them busy.
    if whole and tiles.columns == 1:
        made = next(filter(None, (launch(cluster, 4) for cluster in device.clusters)), None)
        if made is not None and made.grid[0] >= 6 * device.multiprocessors:
            return Plan((made,))
    for cluster in device.clusters if whole else ():
        made = launch(cluster, 2)
        if made is not None and made.grid[0] >= device.multiprocessors:
            return Plan((made,))
    # Else the more blocks the better; if only half is kept, where that leaves nobody idle.
    for cluster in reversed(device.clusters):
        made = launch(cluster, 1)
        if made is not None and (whole or made.grid[0] >= 2 * device.multiprocessors):
            return Plan((made,))
    return None


def _by_group(op: str, tiles: Tiling, channels: int, dtype: str, device: Device) -> Plan | None:
    """`train_group` or `backward_group`, if a tile or at least a quarter of it can be kept."""
    # Two blocks to a multiprocessor, as above, unless they have many columns, of each of which every block adds up what
    # all the others of its group have.
    blocks = 2 if tiles.columns == 1 else 1
    block, scratch, position_bytes, room = _room(op, tiles, dtype, device, blocks)
    resident = blocks * device.multiprocessors
    if not device.cooperative or 4 * resident * room < tiles.positions:
        return None
    needed = min(-(-tiles.positions // room), resident)  # blocks for a tile
    rounds = -(-tiles.tiles // (resident // needed))
    groups = -(-tiles.tiles // rounds)
    parts = min(resident // groups, _parts(tiles, block, tiles.tiles * resident))
    keep = min(room, -(-tiles.positions // parts))
    name, grid = f"{op}_group<{tiles.arguments}>", (groups, parts)
    shared = scratch + keep * position_bytes
    launches = (
        Launch("clear_barriers", (groups, 1), (WARP, 1)),
        Launch(name, grid, block, shared, keep=keep, width=tiles.width, cooperative=True),
    )
    return Plan(launches, parts, channels * (parts * TYPES[dtype][2] + 16) + BARRIERS_BYTES * groups)
