"""Classes that JAX is to take for trees of arrays.

Who defines a class hands it over, without JAX. Who meets JAX calls `register_with_jax`: every new object of such a
class, in case JAX was imported by now, and the backend for JAX.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Flatten = Callable[[Any], tuple[Iterable[Any], Any]]
Unflatten = Callable[[Any, Any], Any]

_waiting: list[tuple[type, Sequence[str], Flatten, Unflatten]] = []
_registration = threading.Lock()


def register(cls: type, names: Sequence[str], flatten: Flatten, unflatten: Unflatten) -> None:
    """Make cls, without its subclasses, a pytree as soon as JAX is there.

    Args:
        names: of the attributes that are leaves.
        flatten: object -> (leaves, settings); settings are hashable, and JAX compiles anew where they differ.
        unflatten: (settings, leaves) -> object. It must not check the leaves: JAX also puts placeholders there.
    """
    _waiting.append((cls, names, flatten, unflatten))


def register_with_jax() -> None:
    """Tell JAX, if it was imported, of the classes that it has not been told of."""
    if not _waiting or sys.modules.get("jax") is None:
        return
    from jax import tree_util  # waits where another thread is just importing it

    with _registration:
        for cls, names, flatten, unflatten in _waiting:
            with_keys = _with_keys([tree_util.GetAttrKey(name) for name in names], flatten)
            tree_util.register_pytree_with_keys(cls, with_keys, unflatten)
        _waiting.clear()


def _with_keys(keys: list[Any], flatten: Flatten) -> Flatten:
    def flatten_with_keys(tree: Any) -> tuple[Iterable[Any], Any]:
        leaves, settings = flatten(tree)
        return tuple(zip(keys, leaves, strict=True)), settings

    return flatten_with_keys
