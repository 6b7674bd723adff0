"""For users of JAX: importing this makes `BatchNormState` a pytree.

It happens by itself when a state is made after JAX was imported. The arrays and ``num_batches_tracked`` are leaves, the
settings are static, so ``jax.jit``, ``vmap``, ``lax.scan`` and ``jax.tree.map`` take a state and give one back:

>>> import jax, anybn
>>> @jax.jit
... def step(x, state):
...     y = anybn.batch_norm(x, state, training=True)
...     return y, state
>>> y, state = step(jax.numpy.ones((4, 2)), anybn.BatchNormState(2))
>>> state.num_batches_tracked, state.running_mean
(1, Array([0.1, 0.1], dtype=float32))
"""

from __future__ import annotations

from typing import Any

import jax

from anybn.backends.registry import backend_for
from anybn.core.call import root_module
from anybn.state.arrays import Arrays
from anybn.state.state import BatchNormState
from anybn.state.store import Store


def _flatten(state: BatchNormState) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
    keys = map(jax.tree_util.GetAttrKey, Arrays._fields)
    leaves = map(_leaf, state._arrays)
    return tuple(zip(keys, leaves, strict=True)), state._store.settings()


def _leaf(array: Any) -> Any:
    """A state may come from another library into jax.jit, whose arrays JAX does not take: their values go in."""
    if root_module(type(array)) in ("torch", "cupy", "dask", "array_api_strict"):
        return backend_for(array).to_numpy(array)
    return array


def _unflatten(settings: tuple[Any, ...], arrays: Any) -> BatchNormState:
    """No checks: JAX also unflattens placeholders that are no arrays."""
    state = object.__new__(BatchNormState)
    state._store = Store.of(settings, Arrays(*arrays))
    return state


jax.tree_util.register_pytree_with_keys(BatchNormState, _flatten, _unflatten)
