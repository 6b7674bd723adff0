"""NumPy arrays."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import array_api_compat.numpy
import numpy as np

from anybn._core import Array, Spec, Statistics
from anybn.backends._base import Backend
from anybn.errors import BackendNotInstalled


class NumPyBackend(Backend):
    name = "numpy"
    libraries = ("numpy",)

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, np.ndarray) and not issubclass(array_type, (np.ma.MaskedArray, np.matrix))

    def refusal(self, x: Array) -> str:
        if not x.dtype.isnative:
            return f"has dtype {x.dtype} in the other byte order: cast it with x.astype(x.dtype.newbyteorder('='))"
        return ""

    def module(self) -> ModuleType:
        return array_api_compat.numpy

    def namespace(self, x: Array) -> ModuleType:
        return array_api_compat.numpy

    def device_of(self, x: Array) -> str:
        return "cpu"

    def has_float64(self, device: Any) -> bool:
        return True

    def version(self) -> str:
        return np.__version__

    def dtype(self, name: str) -> Any:
        if name == "bfloat16":
            try:
                from ml_dtypes import bfloat16
            except ImportError as error:
                raise BackendNotInstalled(
                    f"NumPy has no bfloat16 by itself ({error}): pip install ml_dtypes"
                ) from error
            return np.dtype(bfloat16)
        return np.dtype(name)

    def from_numpy(self, array: np.ndarray, device: Any) -> np.ndarray:
        return np.array(array)

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.array(x)

    def write_problem(self, out: np.ndarray) -> str:
        if not out.flags.writeable:
            return "is read-only: pass an array that can be written to"
        if out.size and any(stride == 0 and size > 1 for stride, size in zip(out.strides, out.shape, strict=True)):
            return "is a broadcast view, whose elements share memory: pass an array of its own"
        return ""

    def frozen(self, x: np.ndarray) -> np.ndarray:
        x.flags.writeable = False
        return x

    def overlaps(self, a: Array, b: Array) -> bool:
        return np.may_share_memory(a, b)

    def same_memory(self, a: Array, b: Array) -> bool:
        return a is b or (
            a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
            and a.shape == b.shape
            and a.strides == b.strides
        )

    def evaluate(
        self,
        x: np.ndarray,
        statistics: Statistics,
        weight: np.ndarray | None,
        bias: np.ndarray | None,
        residual: np.ndarray | None,
        mask: np.ndarray | None,
        spec: Spec,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        if out is None and (residual is not None or mask is not None):
            out = np.empty_like(x)  # NumPy gives the sum of arrays of different memory orders in none of the two
        return super().evaluate(x, statistics, weight, bias, residual, mask, spec, out)
