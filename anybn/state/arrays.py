"""The arrays of a state, and where they lie."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from anybn._settings import numpy_dtype
from anybn.backends.base import Backend
from anybn.backends.registry import backend_for
from anybn.core.call import Array
from anybn.errors import StateError


class Arrays(NamedTuple):
    """The contents of a state. Never written to: a change replaces the whole tuple in one assignment, so that a reader
    in another thread, or an exception at any point, sees the old values or the new ones."""

    weight: Array | None
    bias: Array | None
    running_mean: Array | None
    running_var: Array | None
    num_batches_tracked: int | Array

    def held(self) -> dict[str, Array]:
        """The per-channel arrays that are not switched off, by name."""
        return {name: a for name, a in zip(self._fields[:4], self, strict=False) if a is not None}


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def dtype_of(name: str, parameter_dtype: str, backend: Backend, device: Any) -> str:
    """The dtype of the array called name on a device: what is wanted, or float32 where there is no float64."""
    wanted = parameter_dtype if name in ("weight", "bias") else "float64"
    return wanted if wanted != "float64" or backend.has_float64(device) else "float32"


def placed(arrays: Arrays, parameter_dtype: str, backend: Backend, device: Any) -> Arrays:
    """arrays with those that lie elsewhere copied to this device; the same object if none does."""
    n = arrays.num_batches_tracked
    if isinstance(n, int) and all(a is None or backend.holds(a, device) for a in arrays[:4]):
        return arrays
    moved: dict[str, Any] = {}
    for name, array in arrays.held().items():
        if backend.holds(array, device):
            continue
        dtype = numpy_dtype(dtype_of(name, parameter_dtype, backend, device))
        with np.errstate(over="ignore"):
            values = backend_for(array).to_numpy(array).astype(dtype)
        moved[name] = backend.from_numpy(values, device)
        if name.startswith("running"):
            moved[name] = backend.frozen(moved[name])
    if not isinstance(n, int) and not backend_for(n).is_traced(n):  # as jax.jit gives it back
        moved["num_batches_tracked"] = int(n)
    return arrays._replace(**moved) if moved else arrays


def storable(backend: Backend, new: Arrays, old: Arrays) -> bool:
    """Whether a state that holds old may hold new, once the call is over; see `Backend.may_store`."""
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
            "or make it inside with like=x"
        )
