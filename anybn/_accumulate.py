"""Micro-batches: one commit of the running statistics for all the training calls of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from anybn import _lock
from anybn.state.state import BatchNormState
from anybn.state.store import Block, Opening


@contextmanager
def accumulate(*targets: Any) -> Iterator[None]:
    """Within the ``with`` block, training calls keep their statistics; at its end they are committed once, merged.

    For gradient accumulation: the running statistics become those of one step with all micro-batches in one batch,
    and ``num_batches_tracked`` goes up by one. Every call still normalizes with the statistics of its own micro-batch;
    over a group with those of all members' micro-batches, so that all members commit the same. After an exception in
    the block nothing is committed.

    Args:
        targets: `BatchNormState`s, layers, and torch modules, of which all anybn batch norms inside are meant.

    Raises TypeError for anything else, or nothing, ValueError for a state whose block is open already, or a module
    without any of anybn's batch norms. Under ``jax.jit`` the whole block goes into the traced function.

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
    if not targets:
        raise TypeError(
            "accumulate was given nothing: pass the states, layers or modules whose calls are to count as one"
        )
    states = {id(state._store.owner): state for target in targets for state in _states(target)}
    opening = Opening()
    blocks = {key: Block(opening) for key in states}
    try:
        with _lock.commits:
            for state in states.values():
                if (block := state._store.block) is not None and block.is_open:
                    raise ValueError(f"accumulate is open already for {state!r}: leave out the inner one")
            for key, state in states.items():
                state._store.block = blocks[key]
        yield
    finally:
        opening.is_open = False  # of all at once, wherever an interrupt comes
        for key, state in states.items():
            if state._store.block is blocks[key]:
                state._store.block = None
    with _lock.commits:
        changes = [blocks[key].changes(state._store) for key, state in states.items()]
        _lock.at_once(*([step for part in parts for step in part] for parts in zip(*changes, strict=True)))


def _states(target: Any) -> list[BatchNormState]:
    if isinstance(target, BatchNormState):
        return [target]
    if isinstance(state := getattr(target, "state", None), BatchNormState):
        return [state]
    if not hasattr(target, "named_modules"):
        raise TypeError(
            f"accumulate was given a {type(target).__name__}; it takes states, layers and torch modules of anybn"
        )
    states = (getattr(module, "state", None) for module in target.modules())
    found = [state for state in states if isinstance(state, BatchNormState)]
    if not found:
        raise ValueError(f"there is no batch norm of anybn in this {type(target).__name__}: see anybn.torch.convert")
    return found
