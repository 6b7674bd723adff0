"""CuPy arrays: through the Array API core until the CUDA kernels are here."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import array_api_compat.cupy
import cupy
import numpy as np

from anybn._core import Array
from anybn.backends._base import Backend


class CuPyBackend(Backend):
    name = "cupy"
    libraries = ("cupy",)

    def module(self) -> ModuleType:
        return array_api_compat.cupy

    def namespace(self, x: Array) -> ModuleType:
        return array_api_compat.cupy

    def device_of(self, x: Array) -> int:
        return int(x.device.id)

    def device(self, name: str) -> int:
        found = self.devices()
        if not found or name not in ("", "cuda", *found):
            raise ValueError(f"cupy has no device {name!r}; it has {', '.join(found) or 'none'}")
        return found.index(name) if name in found else int(cupy.cuda.runtime.getDevice())

    def devices(self) -> list[str]:
        if not cupy.cuda.is_available():
            return []
        return [f"cuda:{i}" for i in range(cupy.cuda.runtime.getDeviceCount())]

    def has_float64(self, device: Any) -> bool:
        return True

    def from_numpy(self, array: np.ndarray, device: int) -> Array:
        with cupy.cuda.Device(device):
            return cupy.array(array)

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.asarray(cupy.asnumpy(x))

    def overlaps(self, a: Array, b: Array) -> bool:
        return bool(cupy.may_share_memory(a, b))

    def same_memory(self, a: Array, b: Array) -> bool:
        return a is b or bool(a.data.ptr == b.data.ptr and a.shape == b.shape and a.strides == b.strides)
