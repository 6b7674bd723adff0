"""Micro-batches: one commit of the running statistics for all the training calls of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from anybn.backends.base import Backend
from anybn.core.formulas import Array, Statistics
from anybn.core.moments import Moments


class _Pending(NamedTuple):
    """What a state has seen since the block began."""

    backend: Backend
    x: Array
    """the latest, for where it lies"""
    moments: Moments
    nonfinite: str


#: id of what owns the statistics (a state, or the torch module that one stands for) -> what is to be committed. Whoever
#: opened a block holds the owner, so the id stays its own.
blocks: dict[int, _Pending | None] = {}


@contextmanager
def accumulate(*targets: Any) -> Iterator[None]:
    """Within the ``with`` block, training calls keep their statistics; at its end they are committed once, merged.

    For gradient accumulation: the running statistics become those of one step with all micro-batches in one batch,
    and ``num_batches_tracked`` goes up by one. Every call still normalizes with the statistics of its own micro-batch;
    over a group with those of all members' micro-batches, so that all members commit the same. After an exception in
    the block nothing is committed.

    Args:
        targets: `BatchNormState`s, layers, and torch modules, of which all anybn batch norms inside are meant.

    Raises TypeError for anything else, ValueError for a state whose block is open already, or a module without any of
    anybn's batch norms. Under ``jax.jit`` the whole block goes into the traced function.

    >>> import numpy as np, anybn
    >>> x = np.arange(24.0).reshape(12, 2)
    >>> bn, whole = anybn.BatchNorm(2), anybn.BatchNorm(2)
    >>> with anybn.accumulate(bn):
    ...     for part in (x[:4], x[4:6], x[6:]):
    ...         y = bn(part)
    >>> y = whole(x)
    >>> np.allclose(bn.state.running_var, whole.state.running_var), bn.state.num_batches_tracked
    (True, 1)
    """
    states = {id(owner(state)): state for target in targets for state in _states(target)}
    if open_already := blocks.keys() & states.keys():
        raise ValueError(f"accumulate is open already for {states[min(open_already)]!r}: leave out the inner one")
    blocks.update(dict.fromkeys(states))
    try:
        yield
    except BaseException:
        for key in states:
            del blocks[key]
        raise
    pending = {key: blocks.pop(key) for key in states}
    for key, state in states.items():
        if (seen := pending[key]) is not None:
            backend, moments = seen.backend, seen.moments
            with backend.no_grad():
                statistics = Statistics(moments.count, moments.mean, moments.shift, moments.var(), moments.m2)
            state._commit(backend, seen.x, statistics, None, seen.nonfinite, *state._beside(backend, seen.x))


def owner(state: Any) -> Any:
    """What stays the same object from call to call: a torch module's state is made for each."""
    return getattr(state, "_module", state)


def keeps(state: Any, backend: Backend, x: Array, statistics: Statistics, nonfinite: str) -> bool:
    """Whether a block is open for this state, which then keeps the statistics of this call for its end."""
    key = id(owner(state))
    if key not in blocks:
        return False
    s = statistics
    with backend.no_grad():
        new = Moments(*(backend.detached(a) for a in (s.count, s.mean, s.m2, s.shift)))  # type: ignore[arg-type]
        before = blocks[key]
        if before is not None:
            new = _beside(before, backend, x) + new
            nonfinite = "propagate" if "propagate" in (before.nonfinite, nonfinite) else nonfinite
    blocks[key] = _Pending(backend, x, new, nonfinite)
    return True


def _beside(before: _Pending, backend: Backend, x: Array) -> Moments:
    """The moments so far, beside an x that may be of another library."""
    moments, device = before.moments, backend.device_of(x)
    if backend.holds(moments.mean, device):
        return moments
    count = moments.count if isinstance(moments.count, int) else int(before.backend.to_numpy(moments.count).flat[0])
    mean, m2, shift = (
        np.zeros(1) if a is None else before.backend.to_numpy(a).astype("float64")
        for a in (moments.mean, moments.m2, moments.shift)
    )
    dtype = "float64" if backend.has_float64(device) else "float32"
    there = mean.astype(dtype)
    rest = shift + (mean - there)
    return Moments(count, *(backend.from_numpy(a.astype(dtype), device) for a in (there, m2, rest)))


def _states(target: Any) -> list[Any]:
    from anybn._layer import BatchNorm
    from anybn.state.state import BatchNormState

    if isinstance(target, BatchNormState):
        return [target]
    if isinstance(target, BatchNorm):
        return [target.state]
    if not hasattr(target, "named_modules"):
        raise TypeError(
            f"accumulate was given a {type(target).__name__}; it takes states, layers and torch modules of anybn"
        )
    from anybn.torch.module import _BatchNorm

    found = [module.state for module in target.modules() if isinstance(module, _BatchNorm)]
    if not found:
        raise ValueError(f"there is no batch norm of anybn in this {type(target).__name__}: see anybn.torch.convert")
    return found
