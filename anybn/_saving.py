"""save and load: the states of a whole net in one file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from anybn.state.state import BatchNormState


def save(states: Any, path: str | os.PathLike[str]) -> None:
    """Write the states of a net, with their settings and how they are nested, to one safetensors file.

    Args:
        states: a `BatchNormState`, or what has one as ``state``: a `BatchNorm`, a module of `anybn.torch`; or a dict
            with str keys, a list or a tuple of these, nested as you like. What is there twice is there twice
            afterwards.
        path: as in `BatchNormState.save`, which one state alone is the same as.

    The arrays have names such as ``encoder.0.weight``, so that other programs can read them.

    Raises TypeError for anything else in states, ValueError for two states that would have one name, and what
    `BatchNormState.save` does.

    >>> import anybn, tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "net.safetensors"
    >>> anybn.save({"stem": anybn.BatchNorm(3), "blocks": [anybn.BatchNormState(4, eps=1e-3)]}, path)
    >>> anybn.load(path)["blocks"]
    [BatchNormState(4, eps=0.001, momentum=0.1) on numpy, 0 batches tracked]
    """
    from anybn.checkpoints import files  # late: json and hashlib take time to import

    if (alone := _state_of(states)) is not None:
        alone.save(path)
        return
    named: dict[str, BatchNormState] = {}
    tree = _named(states, "", named)
    files.save_nested(path, tree, {name: (s._settings(), s._exact_arrays()) for name, s in named.items()})


def load(path: str | os.PathLike[str]) -> Any:
    """What `save` wrote: a `BatchNormState` in NumPy, or dicts and lists of them; tuples come back as lists.

    The file need not be trusted. Raises what `BatchNormState.load` does.
    """
    from anybn.checkpoints import files

    tree, told = files.load_nested(path)
    return _with_states(tree, {name: BatchNormState._of_values(*state) for name, state in told.items()})


def _state_of(thing: Any) -> BatchNormState | None:
    state = getattr(thing, "state", thing)
    return state if isinstance(state, BatchNormState) else None


def _named(thing: Any, name: str, named: dict[str, BatchNormState]) -> Any:
    """The tree of names of the states in thing, which go to named."""
    if (state := _state_of(thing)) is not None:
        for other, present in named.items():
            if present._store.owner is state._store.owner:
                return other
        if name in named:
            raise ValueError(f"two states would have the name {name!r}: rename one of the keys that have dots")
        named[name] = state
        return name
    prefix = f"{name}." if name else ""
    if isinstance(thing, Mapping):
        if odd := [key for key in thing if not isinstance(key, str)]:
            raise TypeError(f"states has the key {odd[0]!r}, a {type(odd[0]).__name__}; keys must be str")
        return {key: _named(value, prefix + key, named) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [_named(value, f"{prefix}{i}", named) for i, value in enumerate(thing)]
    raise TypeError(
        f"{name or 'states'} is a {type(thing).__name__}; it must be a BatchNormState, a layer, or a dict or list of "
        "these"
    )


def _with_states(tree: Any, states: Mapping[str, BatchNormState]) -> Any:
    if isinstance(tree, dict):
        return {key: _with_states(branch, states) for key, branch in tree.items()}
    if isinstance(tree, list):
        return [_with_states(branch, states) for branch in tree]
    return states[tree]
