"""Statistics and gradient sums over the members of a group.

Statistics take one collective. They cannot be sums of values and of squares: with a mean of 1e6, these lose in float64
what float32 shows. An origin near the data would help, but members must ask one another to find one. So they send what
can be merged. Every member writes its count, mean and m2 into its own row of an array that is 0 elsewhere. The sum of
these arrays has all rows, exactly. All members merge them in the order of ranks, and get the same bits. That costs
``size`` rows, as many as torch's SyncBatchNorm gathers. A group of more than `MANY` members, or one without ranks,
takes two sums of C values instead: first of means, then of deviations from the mean of all.

Gradients take one collective too. Their sums have no difference of large numbers, and are just added.

Engines that sum arrays of different lengths hang, crash (gloo ends the process) or return nonsense (MPI). So the length
of a row follows from C and from what the members have agreed on before, never from what one of them brings. A member
that fails before it has statistics sends a row of that length too, whose count is NaN: see `notify_failure`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from anybn.core import formulas
from anybn.core.call import Array, Call, Statistics, dtype_name
from anybn.core.moments import merged
from anybn.groups import agreement
from anybn.groups.agreement import Settings

if TYPE_CHECKING:
    from anybn.backends.base import Backend

#: More members than this take two sums of C values in place of one of ``size`` rows (benchmarks/collectives.py).
MANY = 64


class Members:
    """A group, and this member's settings."""

    __slots__ = ("group", "met", "settings")

    def __init__(self, group: Any, settings: Settings):
        self.group, self.settings = group, settings
        #: Whether the members have exchanged anything: a backend that overlooks ``call.group`` is noticed by it.
        self.met = False


class Part(NamedTuple):
    """The statistics of one member's batch: count is a number or 0-d, the others ``(C,)``."""

    count: Any
    mean: Array
    shift: Array | None
    m2: Array


def has_ranks(group: Any) -> bool:
    return hasattr(group, "rank") and hasattr(group, "size")


# -- statistics and gradients ----------------------------------------------------------------------------------


def batch_statistics(backend: Backend, call: Call) -> Statistics:
    """Mean and biased variance of each channel over the values of all members of the call's group; x may be empty.

    Collective. The same on every member; differentiable in x where `Backend.all_reduce_sum` is.

    Raises, on every member: ValueError if they disagree, or have 1 value per channel together; MemberError if one of
    them has failed, which gets its own error.
    """
    return over_all(backend, own(backend, call), call.group)


def own(backend: Backend, call: Call) -> Part:
    """The statistics of this member's batch. If they cannot be had, it notifies the others."""
    x, axis = call.x, call.spec.axis
    try:
        if 0 in x.shape:  # a sum of nothing, that depends on x: so the backward pass asks this member too
            xp, working = backend.namespace(x), backend.working_dtype(x)
            nothing = xp.sum(xp.astype(x, working), axis=formulas.reduced_axes(x.ndim, axis))
            return Part(0, nothing, None if formulas.is_wide(working, x) else nothing, nothing)
        statistics = backend.statistics(Call(x, call.spec, mask=call.mask))
    except Exception as error:  # out of memory
        notify_failure(call.group.group, x.shape[axis], error, backend, x)
        raise
    count: Any = statistics.count
    if getattr(count, "ndim", 0):
        count = count[0]
    assert statistics.m2 is not None
    return Part(count, statistics.mean, statistics.shift, statistics.m2)


def over_all(backend: Backend, part: Part, members: Members) -> Statistics:
    """The statistics of all members' batches. Collective."""
    group, xp = members.group, backend.namespace(part.mean)
    members.met = True
    with np.errstate(all="ignore"):
        if not has_ranks(group):
            return _in_two_sums(backend, xp, part, members)
        head = _vector(backend, xp, part.mean, part.count, members.settings)
        vectors = 0 if group.size > MANY else 2 if part.shift is None else 3
        if not backend.is_traced(head):
            vectors = _agreed_vectors(backend, xp, head, part.mean.shape[0], vectors, group)
        if group.size > MANY:
            return _in_two_sums(backend, xp, part, members)
        return _in_rows(backend, xp, head, part, vectors, group)


def sums(backend: Backend, group: Any, dbias: Array, dweight: Array) -> tuple[Array, Array]:
    """Both summed over the members. Collective."""
    xp = backend.namespace(dbias)
    both = backend.all_reduce_sum(group, xp.stack([dbias, dweight]))
    return both[0, :], both[1, :]


# -- a row of every member: head (count and settings), mean, m2 and, where there is one, shift ------------------------


def _in_rows(backend: Backend, xp: Any, head: Array, part: Part, vectors: int, group: Any) -> Statistics:
    """The statistics of all members, in one collective."""
    of_channels = [part.mean, part.m2] if part.shift is None else [part.mean, part.m2, part.shift]
    k, channels = head.shape[0], part.mean.shape[0]
    row = _padded(backend, xp, xp.concat([head, *of_channels]), k + vectors * channels)
    rows = _gathered(backend, xp, group, row)
    if backend.is_traced(rows):
        total: Any = xp.sum(rows[:, 0])
    else:
        heads = _on_host(backend, rows[:, :k])
        agreement.require_agreement(heads)
        total = int(heads[:, 0].sum())
        agreement.require_values(total, group.size)
    count, mean, m2 = rows[:, 0:1], rows[:, k : k + channels], rows[:, k + channels : k + 2 * channels]
    if part.shift is None:
        return merged(xp, total, count, mean, None, m2)._replace(shift=None)
    return merged(xp, total, count, mean, rows[:, k + 2 * channels : k + 3 * channels], m2)


def _gathered(backend: Backend, xp: Any, group: Any, row: Array) -> Array:
    """Every member's row, as a sum: ``(size, len(row))``. Collective."""
    rank, size = group.rank, group.size
    is_mine = [i == rank for i in range(size)]
    if isinstance(rank, int):
        rows = xp.stack([row if mine else xp.zeros_like(row) for mine in is_mine])
    else:  # of JAX, where all members trace one program
        rows = xp.stack([xp.where(mine, row, xp.zeros_like(row)) for mine in is_mine])
    return backend.all_reduce_sum(group, rows)


#: Group -> C -> how many vectors of C values its members have agreed to send behind the heads.
_agreed: WeakKeyDictionary[Any, dict[int, int]] = WeakKeyDictionary()


def _agreed_by(group: Any) -> dict[int, int]:
    """What a group has agreed on: C -> vectors; remembered as long as its connections last."""
    try:
        return _agreed.setdefault(getattr(group, "handle", group), {})
    except TypeError:  # a group that cannot be hashed, or referred to weakly, is asked every time
        return {}


def _agreed_vectors(backend: Backend, xp: Any, head: Array, channels: int, needed: int, group: Any) -> int:
    """How many vectors of C values to send, at least as many as needed.

    Where that is more than the members have agreed on, they first compare their heads, in rows as long as before.
    """
    agreed, k = _agreed_by(group), head.shape[0]
    if agreed.get(channels, -1) < needed:
        row = _padded(backend, xp, head, k + agreed.get(channels, 0) * channels)
        agreement.require_agreement(_on_host(backend, _gathered(backend, xp, group, row))[:, :k])
        agreed[channels] = needed
    return agreed[channels]


# -- two sums of all members -----------------------------------------------------------------------------------


def _in_two_sums(backend: Backend, xp: Any, part: Part, members: Members) -> Statistics:
    """The statistics of all members, in two collectives."""
    group = members.group
    head = _vector(backend, xp, part.mean, part.count, agreement.summands(members.settings))
    count, k = head[0], head.shape[0]
    totals = backend.all_reduce_sum(group, xp.concat([head, part.mean * count]))
    if backend.is_traced(totals):
        total: Any = totals[0]
    else:
        counted, *agreed = _on_host(backend, totals[:k]).astype(np.float64)
        if np.isnan(counted):
            failed = _gathered(backend, xp, group, head[:1]) if has_ranks(group) else totals[:1]
            agreement.require_presence(_on_host(backend, failed))
        agreement.require_equal_sums(np.array(agreed))
        total = int(counted)
        agreement.require_values(total, int(agreed[0]))
    n = formulas.divisor(xp, total, part.mean.dtype)
    mean = totals[k:] / n
    deviation = part.mean - mean
    if part.shift is not None:
        deviation = deviation + part.shift
    both = backend.all_reduce_sum(group, xp.stack([count * deviation, part.m2 + count * deviation * deviation]))
    shift = both[0, :] / n
    m2 = both[1, :] - both[0, :] * shift
    return Statistics(total, mean, None if part.shift is None else shift, m2 / n, m2)


# -- arrays to and from NumPy ----------------------------------------------------------------------------------


def notify_failure(group: Any, channels: int, error: Exception, backend: Backend, like: Array) -> None:
    """Take part in the collective of statistics as a member that has failed before it, so that the others need not wait
    for the engine's timeout. ``like``: an array of the kind that the others send, of that backend."""
    try:
        agreed = _agreed_by(group)
        if has_ranks(group) and (group.size <= MANY or channels not in agreed):
            length = 1 + len(Settings._fields) + agreed.get(channels, 0) * channels
            rows_of_all(group, np.pad([np.nan], (0, length - 1)), backend, like)
            return
        group.all_reduce_sum(_to_engine(group, np.pad([np.nan], (0, agreement.SUMMANDS + channels)), backend, like))
        if has_ranks(group):
            rows_of_all(group, np.array([np.nan]), backend, like)
    except Exception as problem:
        error.add_note(f"the other members of the group could not be told: {problem}")


def rows_of_all(group: Any, row: np.ndarray, backend: Backend, like: Array) -> np.ndarray:
    """Every member's row, ``(size, len(row))``, from and to NumPy. ``like``: see `_to_engine`. Collective."""
    rows = np.zeros((group.size, len(row)))
    rows[group.rank] = row
    total = group.all_reduce_sum(_to_engine(group, rows, backend, like))
    return _from_engine(group, total, backend).astype(np.float64)


def _to_engine(group: Any, values: np.ndarray, backend: Backend, like: Array) -> Array:
    """NumPy's values as an array that the group sums: its engine's, or one of that backend beside ``like``."""
    if hasattr(group, "from_numpy"):
        return group.from_numpy(values)
    device = backend.device_of(like)
    return backend.from_numpy(values.astype("float64" if backend.has_float64(device) else "float32"), device)


def _from_engine(group: Any, array: Array, backend: Backend) -> np.ndarray:
    """What the group made of such an array, in NumPy."""
    if hasattr(group, "to_numpy"):
        return group.to_numpy(array)
    if backend.owns(type(array)):
        return backend.to_numpy(array)
    return np.asarray(array) if hasattr(array, "__array__") else np.from_dlpack(array)


def _on_host(backend: Backend, array: Array) -> np.ndarray:
    return backend.to_numpy(backend.detached(array))


def _vector(backend: Backend, xp: Any, like: Array, first: Any, rest: tuple[float, ...]) -> Array:
    """Numbers, the first of which may be a 0-d array, as one array beside another and in its dtype."""
    dtype, device = dtype_name(like.dtype), backend.device_of(like)
    if hasattr(first, "ndim"):
        first = xp.reshape(xp.astype(first, like.dtype), (1,))
    else:
        first = backend.from_numpy(np.array([first], dtype), device)
    return xp.concat([first, backend.from_numpy(np.array(rest, dtype), device)])


def _padded(backend: Backend, xp: Any, row: Array, length: int) -> Array:
    """row, with zeros at its end."""
    missing = length - row.shape[0]
    if not missing:
        return row
    zeros = np.zeros(missing, dtype_name(row.dtype))
    return xp.concat([row, backend.from_numpy(zeros, backend.device_of(row))])
