"""Statistics and gradient sums over the members of a group.

One collective each. Statistics must not be summed as sums of values and of squares: with a mean of
1e6 these lose in float64 what float32 shows, and an origin that all members share and that is near the data is not to
be had without asking them. So every member puts its (count, mean, m2) into a row of its own of an array that is 0
elsewhere; the sum over the members has all rows, exactly, and every member merges them in the order of ranks, so that
all get the same bits. That costs ``size`` rows; torch's SyncBatchNorm gathers as many. Many members take two sums of C
values instead, the mean first and then the deviations from it, and so does a group that has no ranks.

The gradient's sums have no such difference of large numbers, and are just summed.

Engines that sum arrays of different lengths hang, crash (gloo ends the process) or return nonsense (MPI). So how long
a row is follows from C and from what the members have agreed on before, and never from what one of them brings; and a
member that fails before it has statistics sends a row of that length all the same, with a count that is not a number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from anybn.core import formulas as _core
from anybn.core.call import Array, Call, Statistics, dtype_name
from anybn.core.moments import merged
from anybn.errors import MemberError

if TYPE_CHECKING:
    from anybn.backends.base import Backend


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


class Members:
    """A group, and what this member brings to it."""

    __slots__ = ("group", "met", "settings")

    def __init__(self, group: Any, settings: Settings):
        self.group, self.settings = group, settings
        #: Whether the members have exchanged anything: a backend that overlooks ``call.group`` is noticed by it.
        self.met = False


class Part(NamedTuple):
    """Of one member, or of all in rows."""

    count: Any
    mean: Array
    shift: Array | None
    m2: Array


def batch_statistics(backend: Backend, call: Call) -> Statistics:
    """Mean and biased variance of each channel over the values of all members of the call's group; x may be empty.

    Collective. The same on every member; differentiable in x where `Backend.all_reduce_sum` is.

    Raises, on every member: ValueError if they disagree, or have 1 value per channel together; MemberError if one of
    them has failed, which gets its own error.
    """
    return over_all(backend, own(backend, call), call.group)


def own(backend: Backend, call: Call) -> Part:
    """This member's part; if it cannot be had, the others are told."""
    x, axis = call.x, call.spec.axis
    try:
        if 0 in x.shape:  # a sum of nothing, that depends on x: so the backward pass asks this member too
            xp, working = backend.namespace(x), backend.working_dtype(x)
            nothing = xp.sum(xp.astype(x, working), axis=_core.reduced_axes(x.ndim, axis))
            return Part(0, nothing, None if _core.is_wide(working, x) else nothing, nothing)
        statistics = backend.statistics(Call(x, call.spec, mask=call.mask))
    except Exception as error:  # out of memory
        tell(call.group.group, x.shape[axis], error, backend, x)
        raise
    count: Any = statistics.count
    if getattr(count, "ndim", 0):
        count = count[0]
    assert statistics.m2 is not None
    return Part(count, statistics.mean, statistics.shift, statistics.m2)


def over_all(backend: Backend, part: Part, members: Members) -> Statistics:
    """The statistics of all members' parts. Collective."""
    group, xp = members.group, backend.namespace(part.mean)
    members.met = True
    with np.errstate(all="ignore"):
        head = _numbers(backend, xp, part.mean, (part.count, *members.settings))
        vectors, traced = _vectors(part), backend.is_traced(head)
        if has_ranks(group):
            if not traced:
                vectors = _introduced(backend, xp, head, part, group)
            if group.size <= MANY:
                return _from_rows(backend, xp, head, part, vectors, group)
        return _from_sums(backend, xp, part, members)


def sums(backend: Backend, group: Any, dbias: Array, dweight: Array) -> tuple[Array, Array]:
    """Both summed over the members. Collective."""
    xp = backend.namespace(dbias)
    both = backend.all_reduce_sum(group, xp.stack([dbias, dweight]))
    return both[0, :], both[1, :]


def sendable(group: Any, values: np.ndarray, backend: Backend, like: Array) -> Array:
    """NumPy's values as an array that the group sums: of its engine's library, if it has one, else beside ``like``."""
    if hasattr(group, "from_numpy"):
        return group.from_numpy(values)
    device = backend.device_of(like)
    return backend.from_numpy(values.astype("float64" if backend.has_float64(device) else "float32"), device)


def tell(group: Any, channels: int, error: Exception, backend: Backend, like: Array) -> None:
    """Take part in the collective of statistics in the place of a member that has failed before it, so that the others
    need not wait for the engine's timeout. ``like``: an array of the kind that the others send, of that backend."""
    try:
        known = _known_to(group)
        if has_ranks(group) and (group.size <= MANY or channels not in known):
            length = 1 + len(Settings._fields) + known.get(channels, 0) * channels
            rows_of_all(group, np.pad([np.nan], (0, length - 1)), backend, like)
            return
        group.all_reduce_sum(sendable(group, np.pad([np.nan], (0, 3 + channels)), backend, like))
        if has_ranks(group):
            rows_of_all(group, np.array([np.nan]), backend, like)
    except Exception as problem:
        error.add_note(f"the other members of the group could not be told: {problem}")


def rows_of_all(group: Any, row: np.ndarray, backend: Backend, like: Array) -> np.ndarray:
    """Every member's row, ``(size, len(row))``, from and to NumPy; see `sendable`."""
    from anybn.backends.registry import backend_for

    rows = np.zeros((group.size, len(row)))
    rows[group.rank] = row
    total = group.all_reduce_sum(sendable(group, rows, backend, like))
    return backend_for(total).to_numpy(total).astype(np.float64)


#: More members than this take two sums of C values in place of one of ``size`` rows (benchmarks/collectives.py).
MANY = 64

#: Group -> C -> how many vectors of C values the rows hold that its members agree to send.
_known: WeakKeyDictionary[Any, dict[int, int]] = WeakKeyDictionary()


def _known_to(group: Any) -> dict[int, int]:
    """What a group has agreed on, remembered as long as its connections last."""
    try:
        return _known.setdefault(getattr(group, "handle", group), {})
    except TypeError:  # a group that cannot be hashed, or referred to weakly, is asked every time
        return {}


def has_ranks(group: Any) -> bool:
    return hasattr(group, "rank") and hasattr(group, "size")


def _vectors(part: Part) -> int:
    return 2 if part.shift is None else 3


def _numbers(backend: Backend, xp: Any, like: Array, values: tuple[Any, ...]) -> Array:
    """Numbers, of which the first may be a 0-d array, as one array beside another and in its dtype."""
    dtype, device = dtype_name(like.dtype), backend.device_of(like)

    def one(value: Any) -> Array:
        if hasattr(value, "ndim"):
            return xp.reshape(xp.astype(value, like.dtype), (1,))
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


def _padded(backend: Backend, xp: Any, row: Array, length: int) -> Array:
    missing = length - row.shape[0]
    if not missing:
        return row
    zeros = np.zeros(missing, dtype_name(row.dtype))
    return xp.concat([row, backend.from_numpy(zeros, backend.device_of(row))])


def _introduced(backend: Backend, xp: Any, head: Array, part: Part, group: Any) -> int:
    """How many vectors of C values the rows hold. Where that is to change, the members first compare their heads, in
    rows as they have been."""
    known, channels, k = _known_to(group), part.mean.shape[0], head.shape[0]
    needed = _vectors(part) if group.size <= MANY else 0
    if known.get(channels, -1) < needed:
        row = _padded(backend, xp, head, k + known.get(channels, 0) * channels)
        _require_agreement(backend.to_numpy(backend.detached(_gathered(backend, xp, group, row)))[:, :k])
        known[channels] = needed
    return known[channels]


def _from_rows(backend: Backend, xp: Any, head: Array, part: Part, vectors: int, group: Any) -> Statistics:
    of_channels = [part.mean, part.m2] if part.shift is None else [part.mean, part.m2, part.shift]
    k, channels = head.shape[0], part.mean.shape[0]
    row = _padded(backend, xp, xp.concat([head, *of_channels]), k + vectors * channels)
    rows = _gathered(backend, xp, group, row)
    if backend.is_traced(rows):
        count: Any = xp.sum(rows[:, 0])
    else:
        heads = backend.to_numpy(backend.detached(rows[:, :k]))
        _require_agreement(heads)
        count = int(heads[:, 0].sum())
        _require_values(count, f"the {group.size} members")
    mean, m2 = rows[:, k : k + channels], rows[:, k + channels : k + 2 * channels]
    if part.shift is None:
        return merged(xp, count, rows[:, 0:1], mean, None, m2)._replace(shift=None)
    return merged(xp, count, rows[:, 0:1], mean, rows[:, k + 2 * channels : k + 3 * channels], m2)


def _from_sums(backend: Backend, xp: Any, part: Part, members: Members) -> Statistics:
    """Where there are no rows: the mean first, then the deviations from it, in two collectives."""
    group = members.group
    tag = float(
        hash(members.settings) % 2**16
    )  # equal on all members if and only if members * sum(tag**2) == sum(tag)**2
    head = _numbers(backend, xp, part.mean, (part.count, 1.0, tag, tag * tag))
    own = head[0]
    total = backend.all_reduce_sum(group, xp.concat([head, part.mean * own]))
    traced = backend.is_traced(total)
    if traced:
        count: Any = total[0]
    else:
        counted, members_found, tags, squares = backend.to_numpy(backend.detached(total[:4]))
        if np.isnan(counted):
            failed = _gathered(backend, xp, group, head[:1]) if has_ranks(group) else total[:1]
            require_presence(backend.to_numpy(backend.detached(failed)))
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


def require_presence(counts: np.ndarray) -> None:
    """counts: of every member, NaN where it has failed; or the sum of all of them."""
    failed = np.flatnonzero(np.isnan(counts))
    if failed.size:
        who = named(failed) if counts.size > 1 else "a member"
        raise MemberError(
            f"{who} of the group raised an error before the collective: see what was raised there; nothing has "
            "changed here",
            tuple(map(int, failed)) if counts.size > 1 else (),
        )


def _require_agreement(heads: np.ndarray) -> None:
    """heads: of every member, its count and its settings."""
    require_presence(heads[:, 0])
    differing = []
    for name, column in zip(Settings._fields, heads[:, 1:].T, strict=True):
        if (column != column[0]).any():
            told = (f"{_said(name, v)} on {named(np.flatnonzero(column == v))}" for v in dict.fromkeys(column))
            differing.append(f"{name} is {' and '.join(told)}")
    if differing:
        raise ValueError(f"the members of the group disagree: {'; '.join(differing)}: give all of them the same layer")


def _said(name: str, value: float) -> str:
    if name in _WORDS:
        return repr(_WORDS[name][int(value)])
    if name == "momentum" and value < 0:
        return "None"
    return f"{value:g}"


def named(ranks: np.ndarray) -> str:
    shown = ", ".join(map(str, ranks[:10])) + (", ..." if len(ranks) > 10 else "")
    return f"member {shown}" if len(ranks) == 1 else f"members {shown}"
