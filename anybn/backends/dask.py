"""Dask arrays: the core, lazily. Nothing computes until the user computes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import array_api_compat.dask.array
import array_api_compat.numpy
import dask
import dask.array
import numpy as np

from anybn import _core
from anybn._core import Array
from anybn._dispatch import backend_for
from anybn.backends._base import Backend


class DaskBackend(Backend):
    name = "dask"
    libraries = ("dask",)
    how = "the Array API core, lazily"
    writable = False

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, dask.array.Array)

    def refusal(self, x: Array) -> str:
        if any(np.isnan(size) for size in x.shape):
            return f"has the unknown shape {x.shape}: call x.compute_chunk_sizes() first"
        chunk = x._meta  # raises where the chunks are masked or sparse
        return backend_for(chunk, "a chunk of x").refusal(chunk)

    def module(self) -> ModuleType:
        return array_api_compat.dask.array

    def namespace(self, x: Array) -> ModuleType:
        return array_api_compat.dask.array

    def version(self) -> str:
        return str(dask.__version__)

    def device_of(self, x: Array) -> str:
        return "cpu"

    def devices(self) -> list[str]:
        return ["cpu"]

    def device(self, name: str) -> str:
        if name not in ("", "cpu"):
            raise ValueError(f"dask has no device {name!r}; it has cpu")
        return "cpu"

    def has_float64(self, device: Any) -> bool:
        return True

    def dtype(self, name: str) -> Any:
        from anybn.backends.numpy import NumPyBackend

        return NumPyBackend().dtype(name)

    def from_numpy(self, array: np.ndarray, device: Any) -> Array:
        return dask.array.from_array(np.array(array))

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.array(x.compute())

    @staticmethod
    def sum(xp: ModuleType, a: Array, axes: tuple[int, ...]) -> Array:
        """In blocks within each chunk, then in a tree over them: blocks of the whole would cut across its chunks."""
        return dask.array.reduction(a, chunk=_sum_of_chunk, aggregate=_sum_of_chunk, axis=axes, dtype=a.dtype)

    def is_traced(self, x: Array) -> bool:
        return True


def _sum_of_chunk(chunk: np.ndarray, axis: tuple[int, ...], keepdims: bool) -> np.ndarray:
    total = _core.blocked_sum(array_api_compat.numpy, chunk, axis)
    return np.expand_dims(total, axis) if keepdims else total
