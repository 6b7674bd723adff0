"""The arrays of a state, and where they lie."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from anybn._settings import numpy_dtype
from anybn.backends.base import Backend
from anybn.backends.registry import backend_for
from anybn.core.call import Array
from anybn.errors import StateError


class Exact(NamedTuple):
    """The float64 values that an array stands for on a device without float64, where rounding has changed them."""

    shown: Array
    mark: Any
    """what was written to shown, by `_mark`: after another write, its own values count"""
    values: np.ndarray

    def of(self, copy: Array) -> Exact:
        """What a copy of shown stands for."""
        return self._replace(shown=copy, mark=_mark(backend_for(copy), copy))


class Arrays(NamedTuple):
    """The contents of a state. Never written to: a change replaces the whole tuple in one assignment, so that a reader
    in another thread, or an exception at any point, sees the old values or the new ones."""

    weight: Array | None
    bias: Array | None
    running_mean: Array | None
    running_var: Array | None
    num_batches_tracked: int | Array
    exact: Mapping[str, Exact] = {}
    """by name, of arrays that lie where there is no float64; of one that was replaced since, it means nothing"""

    def held(self) -> dict[str, Array]:
        """The per-channel arrays that are not switched off, by name."""
        return {name: a for name, a in zip(_NAMES, self, strict=False) if a is not None}

    def named(self) -> dict[str, Any]:
        """All that a checkpoint has, by name."""
        return dict(zip(LEAVES, self, strict=False))

    def exact_of(self, name: str) -> Exact | None:
        """What the array called name stands for, if that is more than its own values."""
        entry = self.exact.get(name)
        if entry is None or entry.shown is not getattr(self, name):
            return None
        return entry if entry.mark == _mark(backend_for(entry.shown), entry.shown) else None

    def values_of(self, name: str) -> np.ndarray:
        """The values of an array that is there, in NumPy, with all digits that are known."""
        if (entry := self.exact_of(name)) is not None:
            return entry.values
        array = getattr(self, name)
        return backend_for(array).to_numpy(array)

    def with_values(
        self, values: Mapping[str, np.ndarray], parameter_dtype: str, backend: Backend, device: Any
    ) -> Arrays:
        """These arrays but for some that are made new on a device, from values in NumPy."""
        new, exact = {}, {name: entry for name, entry in self.exact.items() if name not in values}
        for name, given in values.items():
            wanted = numpy_dtype(_wanted_dtype(name, parameter_dtype))
            kept = numpy_dtype(dtype_of(name, parameter_dtype, backend, device))
            with np.errstate(over="ignore"):
                full = read_only(given.astype(wanted))
                rounded = full.astype(kept)
            array = backend.from_numpy(rounded, device)
            new[name] = array = backend.frozen(array) if name.startswith("running") else array
            if wanted != kept and not np.array_equal(rounded, full) and backend.lasts(array):
                exact[name] = Exact(array, _mark(backend, array), full)
        return self._replace(**new, exact=exact)


_NAMES = Arrays._fields[:4]
RUNNING = _NAMES[2:]
#: What is a leaf of the tree that JAX takes a state for.
LEAVES = Arrays._fields[:5]


def _mark(backend: Backend, array: Array) -> Any:
    watch = backend.watch(array)
    return None if watch is None else watch()


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _wanted_dtype(name: str, parameter_dtype: str) -> str:
    return parameter_dtype if name in ("weight", "bias") else "float64"


def dtype_of(name: str, parameter_dtype: str, backend: Backend, device: Any) -> str:
    """The dtype of the array called name on a device: what is wanted, or float32 where there is no float64."""
    wanted = _wanted_dtype(name, parameter_dtype)
    return wanted if wanted != "float64" or backend.has_float64(device) else "float32"


def placed(arrays: Arrays, parameter_dtype: str, backend: Backend, device: Any) -> Arrays:
    """arrays with those that lie elsewhere copied to this device; the same object if none does."""
    copied: dict[str, np.ndarray] = {}
    recorded: dict[str, Array] = {}
    for name, array in arrays.held().items():
        if backend.holds(array, device):
            continue
        if records_move(backend, array):
            recorded[name] = backend.moved(array, device)
        else:
            copied[name] = arrays.values_of(name)
    if copied or recorded:
        arrays = arrays._replace(**recorded).with_values(copied, parameter_dtype, backend, device)
    return arrays


def records_move(backend: Backend, array: Array) -> bool:
    """Whether the library would record that an array of its own is moved to another device, for a gradient."""
    return backend.owns(type(array)) and backend.records(array)


def counted(batches: int | Array) -> int | Array:
    """num_batches_tracked as an int, also where jax.jit gave it back as an array."""
    return batches if isinstance(batches, int) or backend_for(batches).is_traced(batches) else int(batches)


# -- what may be moved -----------------------------------------------------------------------------------------


def trained_elsewhere(arrays: Arrays, private: Container[str], backend: Backend, device: Any) -> bool:
    """Whether an array lies elsewhere that is trained there, as an optimizer may do with all that are not private."""
    return any(
        not backend.holds(array, device)
        and (name not in private or backend.owns(type(array)))
        and backend_for(array).is_trained(array)
        for name, array in arrays.held().items()
    )


def with_trained_moved(arrays: Arrays, private: Container[str], backend: Backend, device: Any) -> Arrays:
    """arrays, those that are trained moved within their library, in place. Raises StateError if they would leave it."""
    for name, array in arrays.held().items():
        if backend.holds(array, device) or not backend_for(array).is_trained(array):
            continue
        if backend.owns(type(array)):
            arrays = arrays._replace(**{name: backend.relocated(array, device)})
        elif name not in private:
            raise StateError(
                f"{name} requires grad, and whoever trains it, such as an optimizer, would keep the old one if the "
                f"state moved to {backend.name}: evaluate and train with any arrays while the state stays, or let it "
                f"go first with state.{name}.requires_grad_(False), or move state.copy()"
            )
    return arrays


def storable(backend: Backend, new: Arrays, old: Arrays) -> bool:
    """Whether a state that holds old may hold new, once the call is over; see `Backend.may_store`."""
    if type(backend).may_store is Backend.may_store:  # in every call of most libraries
        return True
    for a, b in zip(new[:4], old, strict=False):
        if a is not b and b is not None and not backend.may_store(a, b):
            return False
    return True


def require_storable(backend: Backend, new: Arrays, old: Arrays) -> None:
    if not storable(backend, new, old):
        raise StateError(
            "the state was not passed into this traced call, so the call cannot change it: make the state an "
            "argument of the traced function, batched like x under vmap, and return it, e.g. "
            "jax.jit(lambda x, state: (anybn.batch_norm(x, state, training=True), state)); "
            "or, without vmap, make it inside with like=x"
        )


# -- replicas --------------------------------------------------------------------------------------------------


class Replica(NamedTuple):
    """Arrays beside the x of a call that the state does not move for."""

    home: Arrays
    """those that it was made of"""
    watched: tuple[tuple[Callable[[], Any], Any], ...]
    """(function, result) of what told, before it was made, that they are as they are"""
    arrays: Arrays


class Replicas(dict[Any, Replica]):
    """By backend and device. A copy of what they belong to has none."""

    #: So many places, those used in the meantime or not: what is made after them takes the first one's room.
    MOST = 8

    def beside(self, home: Arrays, parameter_dtype: str, backend: Backend, device: Any) -> Arrays:
        """home as it is on a device, exactly; what an earlier call has made, if nothing was replaced or written to."""
        found = self.get((backend, device))
        if found is not None and found.home is home:
            for ask, answer in found.watched:
                if ask() != answer:
                    break
            else:
                return found.arrays
        watched = _watched(home, backend, device)
        made = placed(home, parameter_dtype, backend, device)
        if all(map(backend.lasts, made.held().values())):
            self[backend, device] = Replica(home, watched, made)
            for key in list(self)[: -self.MOST]:
                self.pop(key, None)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Replicas, ()


def _watched(home: Arrays, backend: Backend, device: Any) -> tuple[tuple[Callable[[], Any], Any], ...]:
    asked: list[Callable[[], Any]] = [partial(backend.has_float64, device)]  # which JAX's users switch
    for array in home.held().values():
        if (watch := backend_for(array).watch(array)) is not None:
            asked.append(watch)
        if backend.owns(type(array)):
            asked.append(partial(backend.records, array))  # a gradient goes through a move within a library
    return tuple((ask, ask()) for ask in asked)
