"""Statistics and gradient sums over the members of a group.

One collective each. Statistics must not be summed as sums of values and of squares: with a mean of
1e6 these lose in float64 what float32 shows, and an origin that all members share and that is near the data is not to
be had without asking them. So every member puts its (count, mean, m2) into a row of its own of an array that is 0
elsewhere; the sum over the members has all rows, exactly, and every member merges them in the order of ranks, so that
all get the same bits. That costs ``size`` rows; torch's SyncBatchNorm gathers as many. Many members take two sums of C
values instead, the mean first and then the deviations from it, and so does a group that has no ranks.

The gradient's sums have no such difference of large numbers, and are just summed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from anybn import _core
from anybn._core import Array, Statistics

if TYPE_CHECKING:
    from anybn.backends._base import Backend


class Settings(NamedTuple):
    """What the members of a group must agree on, as numbers that can travel with their statistics."""

    channels: float
    dtype: float
    eps: float
    momentum: float
    ddof: float
    axis: float
    training: float
    affine: float
    relu: float
    nonfinite: float


#: What the numbers stand for, where they are not the settings themselves.
_WORDS: dict[str, tuple[Any, ...]] = {
    "dtype": ("float16", "bfloat16", "float32", "float64"),
    "training": (False, True),
    "affine": (False, True),
    "relu": (False, True),
    "nonfinite": ("skip", "raise", "propagate"),
}


def settings(**given: Any) -> Settings:
    """Settings from what they are."""
    numbers = {name: _WORDS[name].index(value) if name in _WORDS else value for name, value in given.items()}
    return Settings(**{name: -1.0 if value is None else float(value) for name, value in numbers.items()})


class Members(NamedTuple):
    """A group, and what this member brings to it."""

    group: Any
    settings: Settings


class _Part(NamedTuple):
    """Of one member, or of all in rows."""

    count: Any
    mean: Array
    shift: Array | None
    m2: Array


def batch_statistics(backend: Backend, x: Array, axis: int, mask: Array | None, members: Members) -> Statistics:
    """Mean and biased variance of each channel over the values of all members; x may be empty.

    Collective. The same on every member; differentiable in x where `Backend.all_reduce_sum` is.

    Raises ValueError, on every member, if they disagree, or have 1 value per channel together.
    """
    xp, working = backend.namespace(x), backend.working_dtype(x)
    part = _own(backend, xp, x, axis, mask, working)
    with np.errstate(all="ignore"):
        head = _numbers(backend, xp, x, (part.count, *members.settings))
        if hasattr(members.group, "rank") and hasattr(members.group, "size"):
            if not backend.is_traced(head):
                _introduce(backend, xp, (part.mean.shape[0], _core.dtype_name(x.dtype)), head, members.group)
            if members.group.size <= MANY:
                return _from_rows(backend, xp, head, part, members.group)
        return _from_sums(backend, xp, x, part, members)


def sums(backend: Backend, group: Any, dbias: Array, dweight: Array) -> tuple[Array, Array]:
    """Both summed over the members. Collective."""
    xp = backend.namespace(dbias)
    both = backend.all_reduce_sum(group, xp.stack([dbias, dweight]))
    return both[0, :], both[1, :]


#: More members than this take two sums of C values in place of one of ``size`` rows (benchmarks/collectives.py).
MANY = 64

_known: WeakKeyDictionary[Any, set[tuple[int, str]]] = WeakKeyDictionary()


def _known_to(group: Any) -> set[tuple[int, str]]:
    """The channels and dtypes that a group has agreed on, remembered as long as its connections last."""
    try:
        return _known.setdefault(getattr(group, "handle", group), set())
    except TypeError:  # a group that cannot be hashed, or referred to weakly, is asked every time
        return set()


def _own(backend: Backend, xp: Any, x: Array, axis: int, mask: Array | None, working: Any) -> _Part:
    if 0 in x.shape:  # a sum of nothing, that depends on x: so the backward pass asks this member too
        nothing = xp.sum(xp.astype(x, working), axis=_core.reduced_axes(x.ndim, axis))
        shift = None if _core.is_wide(working, x) else nothing
        return _Part(0, nothing, shift, nothing)
    statistics = backend.batch_statistics(x, axis, mask)
    count: Any = statistics.count
    if getattr(count, "ndim", 0):
        count = count[0]
    assert statistics.m2 is not None
    return _Part(count, statistics.mean, statistics.shift, statistics.m2)


def _numbers(backend: Backend, xp: Any, x: Array, values: tuple[Any, ...]) -> Array:
    """Numbers, and 0-d arrays, as one array beside x in the working dtype."""
    working, device = backend.working_dtype(x), backend.device_of(x)
    dtype = _core.dtype_name(working)

    def one(value: Any) -> Array:
        if hasattr(value, "ndim"):
            return xp.reshape(xp.astype(value, working), (1,))
        return backend.from_numpy(np.array([value], dtype), device)

    first, *rest = values
    return xp.concat([one(first), backend.from_numpy(np.array(rest, dtype), device)])


def _gathered(backend: Backend, xp: Any, group: Any, row: Array) -> Array:
    """Every member's row, as a sum: ``(size, len(row))``."""
    rank, size = group.rank, group.size
    mine = [i == rank for i in range(size)]
    if isinstance(rank, int):
        rows = xp.stack([row if own else xp.zeros_like(row) for own in mine])
    else:  # of JAX, where all members trace one program
        rows = xp.stack([xp.where(own, row, xp.zeros_like(row)) for own in mine])
    return backend.all_reduce_sum(group, rows)


def _introduce(backend: Backend, xp: Any, row: tuple[int, str], head: Array, group: Any) -> None:
    """The first time that rows of such a length go through a group, its members compare what they are about to send.

    Engines that sum arrays of different lengths hang, crash (gloo ends the process) or return nonsense (MPI).
    """
    if row not in (known := _known_to(group)):
        _require_agreement(backend.to_numpy(backend.detached(_gathered(backend, xp, group, head))))
        known.add(row)


def _from_rows(backend: Backend, xp: Any, head: Array, part: _Part, group: Any) -> Statistics:
    of_channels = [part.mean, part.m2] if part.shift is None else [part.mean, part.m2, part.shift]
    row = xp.concat([head, *of_channels])
    rows = _gathered(backend, xp, group, row)
    k, channels = head.shape[0], part.mean.shape[0]
    if backend.is_traced(rows):
        count: Any = xp.sum(rows[:, 0])
    else:
        heads = backend.to_numpy(backend.detached(rows[:, :k]))
        _require_agreement(heads)
        count = int(heads[:, 0].sum())
        _require_values(count, f"the {group.size} members")
    mean, m2 = rows[:, k : k + channels], rows[:, k + channels : k + 2 * channels]
    shift = None if part.shift is None else rows[:, k + 2 * channels :]
    return _merged(xp, count, _Part(rows[:, 0:1], mean, shift, m2))


def _merged(xp: Any, count: Any, rows: _Part) -> Statistics:
    """Chan, Golub & LeVeque 1979, all members at once, with deviations from the mean of one of them.

    Twice: the first mean is right up to its rounding, the deviations from it give the rest and the squares. A channel
    that is constant everywhere has deviations of exactly 0.
    """
    n = _core.divisor(xp, count, rows.mean.dtype)
    origin = xp.max(xp.where(rows.count > 0, rows.mean, xp.full_like(rows.mean, -xp.inf)), axis=0)
    origin = xp.where(xp.isfinite(origin), origin, xp.zeros_like(origin))
    mean = origin + xp.sum(rows.count * (rows.mean - origin), axis=0) / n
    deviation = rows.mean - mean
    if rows.shift is not None:
        deviation = deviation + rows.shift
    shift = xp.sum(rows.count * deviation, axis=0) / n
    deviation = deviation - shift
    m2 = xp.sum(rows.m2 + rows.count * deviation * deviation, axis=0)
    return Statistics(count, mean, None if rows.shift is None else shift, m2 / n, m2)


def _from_sums(backend: Backend, xp: Any, x: Array, part: _Part, members: Members) -> Statistics:
    """Where there are no rows: the mean first, then the deviations from it, in two collectives."""
    group, settings = members
    tag = float(hash(settings) % 2**16)  # equal on all members if and only if members * sum(tag**2) == sum(tag)**2
    head = _numbers(backend, xp, x, (part.count, 1.0, tag, tag * tag))
    own = head[0]
    total = backend.all_reduce_sum(group, xp.concat([head, part.mean * own]))
    traced = backend.is_traced(total)
    if traced:
        count: Any = total[0]
    else:
        counted, members_found, tags, squares = backend.to_numpy(backend.detached(total[:4]))
        if members_found * squares != tags * tags:
            raise ValueError(
                "the members of the group disagree in channels, dtype or settings; a group with rank and size would "
                "say which: give all members the same layer"
            )
        count = int(counted)
        _require_values(count, f"the {int(members_found)} members")
    n = _core.divisor(xp, count, part.mean.dtype)
    mean = total[4:] / n
    deviation = part.mean - mean
    if part.shift is not None:
        deviation = deviation + part.shift
    both = xp.stack([own * deviation, part.m2 + own * deviation * deviation])
    both = backend.all_reduce_sum(group, both)
    shift = both[0, :] / n
    m2 = both[1, :] - both[0, :] * shift
    return Statistics(count, mean, None if part.shift is None else shift, m2 / n, m2)


def _require_values(count: int, members: str) -> None:
    if count == 1:
        raise ValueError(
            f"training needs more than 1 value per channel, got 1 over {members} of the group: "
            "use larger batches, eval mode, or a layer or group norm"
        )


def _require_agreement(heads: np.ndarray) -> None:
    """heads: of every member, its count and its settings."""
    differing = []
    for name, column in zip(Settings._fields, heads[:, 1:].T, strict=True):
        if (column != column[0]).any():
            told = (f"{_said(name, v)} on {_members(np.flatnonzero(column == v))}" for v in dict.fromkeys(column))
            differing.append(f"{name} is {' and '.join(told)}")
    if differing:
        raise ValueError(f"the members of the group disagree: {'; '.join(differing)}: give all of them the same layer")


def _said(name: str, value: float) -> str:
    if name in _WORDS:
        return repr(_WORDS[name][int(value)])
    if name == "momentum" and value < 0:
        return "None"
    return f"{value:g}"


def _members(ranks: np.ndarray) -> str:
    shown = ", ".join(map(str, ranks[:10])) + (", ..." if len(ranks) > 10 else "")
    return f"member {shown}" if len(ranks) == 1 else f"members {shown}"
