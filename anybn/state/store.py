"""How a state learns: the two ways to change its arrays, by a swap of all of them and by writing in place.

A state has a store, which holds its settings and arrays. `Store` has arrays of its own, and a change swaps the whole
tuple. A torch module's store (`anybn.torch.state`) has the module's tensors, which others hold too, and writes to them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from anybn import _checks, _lock
from anybn._moments import Moments
from anybn.backends.base import Backend
from anybn.backends.registry import backend_for, backend_named
from anybn.core.call import Array, Call, Statistics, Update, dtype_name
from anybn.state.arrays import (
    RUNNING,
    Arrays,
    Replicas,
    counted,
    dtype_of,
    placed,
    require_storable,
    storable,
    trained_elsewhere,
    with_trained_moved,
)


class Batch(NamedTuple):
    """What a training call has found, and is to be learnt."""

    backend: Backend
    x: Array
    statistics: Statistics
    propagate: bool
    """whether channels whose statistics are not finite learn them"""
    before: Arrays
    """the store's arrays as the call met them, perhaps overtaken by another thread since"""
    placed: Arrays
    """the same beside x"""
    running: tuple[Array, Array] | None = None
    """the running statistics that the backend has made of these in the same pass"""
    call: Call | None = None
    """the call itself, for who watches it"""


class Store:
    """Settings and arrays of its own."""

    __slots__ = ("arrays", "block", "ddof", "dtype", "eps", "momentum", "num_features", "private", "replicas")

    num_features: int
    eps: float
    momentum: float | None
    ddof: int
    dtype: str
    """of weight and bias where there is one, by name"""
    arrays: Arrays
    replicas: Replicas
    """of the arrays, for calls with x elsewhere"""
    private: set[str]
    """the arrays of a copy that nobody has been given, so that no optimizer can hold them"""
    block: Any
    """the open block of `anybn.accumulate`, which takes what would be learnt; or None"""

    #: So it may not keep what means something only within a traced call that it was not passed to.
    outlives_calls = True

    SETTINGS = ("num_features", "eps", "momentum", "ddof", "dtype")

    @classmethod
    def of(cls, settings: tuple[Any, ...], arrays: Arrays) -> Store:
        """A store with these settings, checked before, in the order of `SETTINGS`."""
        store = cls()
        for name, value in zip(cls.SETTINGS, settings, strict=True):
            setattr(store, name, value)
        store.arrays, store.block, store.replicas, store.private = arrays, None, Replicas(), set()
        return store

    def settings(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.SETTINGS)

    @property
    def owner(self) -> Any:
        """What stays the same object from call to call: a torch module's store is made for each."""
        return self

    def copy(self) -> Store:
        """A store of its own with the same settings and values, in the same place."""
        arrays = self.arrays
        twins = {name: backend_for(a).twin(a) for name, a in arrays.held().items()}
        entries = {name: arrays.exact_of(name) for name in arrays.exact}
        exact = {name: entry.of(twins[name]) for name, entry in entries.items() if entry is not None}
        store = Store.of(self.settings(), arrays._replace(**twins, exact=exact))
        store.private.update(twins)
        return store

    # -- reading -----------------------------------------------------------------------------------------------

    def placed_beside(self, backend: Backend, x: Array) -> tuple[Arrays, Arrays]:
        """(the arrays as they are, the arrays beside x). The state itself moves when a training call has succeeded."""
        arrays, device = self.arrays, backend.device_of(x)
        for a in arrays[:4]:
            if a is not None and not backend.holds(a, device):
                return arrays, self.replicas.beside(arrays, self.dtype, backend, device)
        return arrays, arrays

    def given(self, name: str) -> Array | None:
        """An array, into the hands of whoever asks."""
        self.private.discard(name)
        return getattr(self.arrays, name)

    def snapshot(self) -> Arrays:
        """The arrays, as no other thread changes them."""
        return self.arrays

    def planned_update(self, arrays: Arrays, propagate: bool) -> Update | None:
        """How arrays take in a batch; None where a backend must not do that while it normalizes."""
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / (counted(arrays.num_batches_tracked) + 1)
        return Update(arrays.running_mean, arrays.running_var, momentum, self.ddof, propagate)

    # -- changing ----------------------------------------------------------------------------------------------

    def swap(self, change: Callable[[Arrays], Arrays]) -> None:
        """Replace the arrays by ``change(arrays)``: worked out without the lock, and again if another was faster."""
        while True:
            before = self.arrays
            after = change(before)
            with _lock.commits:
                if self.arrays is before:
                    self.arrays = after
                    if self.replicas:
                        self.replicas = Replicas()
                    return

    def adopt(self, backend: Backend, x: Array, before: Arrays, placed: Arrays) -> None:
        """Move beside the x of a call that has trained but brings nothing to learn, as `learn` would."""
        elsewhere = placed is not before and storable(backend, placed, before)
        if elsewhere and not trained_elsewhere(before, self.private, backend, backend.device_of(x)):
            with _lock.commits:
                if self.arrays is before:
                    self.arrays, self.replicas = placed, Replicas()

    def learn(self, batch: Batch) -> None:
        """Count the batch and fold its statistics into the running ones: one swap, after everything has succeeded."""
        self.swap(partial(self._learnt, batch))

    def changes(self, batch: Batch) -> tuple[list[Any], list[Any]]:
        """What lets the state learn the batch, and what undoes it, for `anybn._lock.at_once`; asked under the lock."""
        old = self.arrays
        new = self._learnt(batch, old)
        return [partial(setattr, self, "arrays", new)], [partial(setattr, self, "arrays", old)]

    def _learnt(self, batch: Batch, old: Arrays) -> Arrays:
        backend, arrays, running = batch.backend, batch.placed, batch.running
        batches = counted(old.num_batches_tracked) + 1
        if old is not batch.before:  # overtaken, and so is what was made of it
            arrays, running = placed(old, self.dtype, backend, backend.device_of(batch.x)), None
        if arrays is not old or arrays.exact:
            stays = arrays is not old and trained_elsewhere(old, self.private, backend, backend.device_of(batch.x))
            if (stays or any(map(arrays.exact_of, RUNNING))) and backend.lasts(batch.statistics.mean):
                return self._learnt_on_the_host(batch, old if stays else arrays, batches)
        if running is None:
            update = self.planned_update(arrays, batch.propagate)
            assert update is not None
            running = backend.update(update, batch.statistics)
        mean, var = running
        arrays = Arrays(arrays.weight, arrays.bias, backend.frozen(mean), backend.frozen(var), batches, arrays.exact)
        if self.outlives_calls:
            require_storable(backend, arrays, old)
        return arrays

    def _learnt_on_the_host(self, batch: Batch, arrays: Arrays, batches: int | Array) -> Arrays:
        """arrays, which lie where x does not or where there is no float64, with the batch folded in by NumPy."""
        numpy, to_numpy, (count, *found) = backend_named("numpy"), batch.backend.to_numpy, batch.statistics
        found = [None if a is None else to_numpy(batch.backend.detached(a)).astype("float64") for a in found]
        if not isinstance(count, int):
            count = to_numpy(count)
        mean, var = (arrays.values_of(name).astype("float64") for name in RUNNING)
        update = self.planned_update(arrays._replace(running_mean=mean, running_var=var), batch.propagate)
        assert update is not None
        running = numpy.update(update, Statistics(count, *found))
        place = backend_for(arrays.running_mean)
        arrays = arrays._replace(num_batches_tracked=batches)
        values = dict(zip(RUNNING, running, strict=True))
        return arrays.with_values(values, self.dtype, place, place.device_of(arrays.running_mean))

    def put(self, name: str, value: Array) -> None:
        """Take value as it is where its dtype allows (a torch Parameter stays itself); the state moves beside it."""
        backend = backend_for(value, name)
        _checks.state_array(backend, name, value, self.num_features)
        backend, value = self._bound(backend, value)
        device = backend.device_of(value)
        wanted = dtype_of(name, self.dtype, backend, device)
        dtype = backend.dtype(wanted)
        if value.dtype != dtype:
            if backend.records(value):
                given = dtype_name(value.dtype)
                raise TypeError(
                    f"{name} has dtype {given} and requires grad, but the state keeps {wanted}, and a copy would "
                    f"not be trained: make the state with dtype={given!r}"
                )
            value = backend.namespace(value).astype(value, dtype)
        stored = backend.detached(value) if name.startswith("running") else value

        def change(arrays: Arrays) -> Arrays:
            others: Arrays = arrays._replace(**{name: None})  # type: ignore[arg-type] # mypy: of every field
            for other, array in others.held().items():
                if backend.owns(type(array)) and backend.overlaps(value, array):
                    raise ValueError(f"{name} shares memory with {other}: give it a copy")
            if not backend.owns(type(getattr(arrays, name))):  # else it is replaced, and not left behind
                others = arrays
            others = with_trained_moved(others, self.private, backend, device)._replace(**{name: None})  # type: ignore[arg-type]
            if not backend.is_traced(value):
                others = placed(others, self.dtype, backend, device)
            return others._replace(**{name: stored})

        self.swap(change)
        self.private.discard(name)

    def _bound(self, backend: Backend, value: Array) -> tuple[Backend, Array]:
        """A constant as an array of the trace that the state is in, if it is in one, which it cannot leave."""
        for array in self.arrays.held().values() if backend.lasts(value) else ():
            owner = backend_for(array)
            if owner.is_bound(array) and not (owner.owns(type(value)) and owner.is_bound(value)):
                return owner, owner.from_numpy(backend.to_numpy(value), owner.device_of(array))
        return backend, value

    def fill(self, values: dict[str, Any]) -> None:
        """Take over NumPy values and a count by field name, at once, where the present ones are and in their dtypes."""

        def change(arrays: Arrays) -> Arrays:
            new = arrays
            for name, old in arrays.held().items():
                if name in values:
                    backend = backend_for(old)
                    new = new.with_values({name: values[name]}, self.dtype, backend, backend.device_of(old))
                    if name not in RUNNING:
                        new = new._replace(**{name: backend.refilled(old, getattr(new, name))})
            batches = values.get("num_batches_tracked", arrays.num_batches_tracked)
            return new._replace(num_batches_tracked=batches)

        self.swap(change)

    def move(self, backend: Backend, device: Any) -> None:
        def change(arrays: Arrays) -> Arrays:
            moved = placed(with_trained_moved(arrays, self.private, backend, device), self.dtype, backend, device)
            moved = moved._replace(num_batches_tracked=counted(moved.num_batches_tracked))
            require_storable(backend, moved, arrays)
            return moved

        self.swap(change)


class Opening:
    """Of the blocks that an `anybn.accumulate` opens and closes together."""

    is_open = True


class Block:
    """What one state has seen within an open block of `anybn.accumulate`."""

    def __init__(self, opening: Opening) -> None:
        self._opening = weakref.ref(opening)  # accumulate has it, and with that it goes, whatever happens
        self.latest: Batch | None = None
        self.moments: Moments | None = None

    @property
    def is_open(self) -> bool:
        opening = self._opening()
        return opening is not None and opening.is_open

    def add(self, batch: Batch) -> bool:
        """Merge the batch's moments, one thread after the other, so that none is lost; False if the block is closed."""
        backend, s = batch.backend, batch.statistics
        with _lock.commits, backend.no_grad():
            if not self.is_open:
                return False
            detached = (backend.detached(a) for a in (s.count, s.mean, s.m2, s.shift))
            moments = Moments(*detached)  # type: ignore[arg-type]
            if self.latest is not None and self.moments is not None:
                moments = self.moments.to(moments.mean) + moments
                batch = batch._replace(propagate=batch.propagate or self.latest.propagate)
            self.latest, self.moments = batch, moments
            return True

    def changes(self, store: Any) -> tuple[list[Any], list[Any]]:
        """What lets the state learn all of it as one batch, as `Store.changes` gives it."""
        if self.latest is None or self.moments is None:
            return [], []
        backend, x, moments = self.latest.backend, self.latest.x, self.moments
        with backend.no_grad():
            statistics = Statistics(moments.count, moments.mean, moments.shift, moments.var(), moments.m2)
        return store.changes(Batch(backend, x, statistics, self.latest.propagate, *store.placed_beside(backend, x)))

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of what the block belongs to is not in the block."""
        return type(None), ()
