"""CuPy arrays: by the kernels of batchnorm.cu on CuPy's current stream."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import numpy as np

from anybn._settings import numpy_dtype
from anybn.backends._needs import needs
from anybn.backends._on_gpu import CudaBackend
from anybn.core.call import Array
from anybn.kernels.cuda import launch
from anybn.kernels.cuda.arrays import CudaArrays

with needs("cupy", pip="cupy-cuda13x[ctk]"):
    import array_api_compat.cupy
    import cupy


def _scratch(nbytes: int) -> tuple[int, Any]:
    memory = cupy.cuda.alloc(nbytes)
    return int(memory.ptr), memory


class _Arrays(CudaArrays):
    library = cupy

    def __init__(self) -> None:
        #: (device, stream) -> the end of its last update of running statistics.
        self.updates: dict[tuple[int, int], Any] = {}

    def on(self, x: Array) -> AbstractContextManager[Any]:
        return x.device

    def gpu(self, x: Array) -> launch.Gpu:
        ordinal = int(x.device.id)
        return launch.gpu(ordinal, cupy.cuda.get_current_stream(ordinal).ptr, _scratch)

    def pointer(self, a: Array) -> int:
        return int(a.data.ptr)

    def note_update(self, x: Array) -> None:
        with x.device:
            stream = cupy.cuda.get_current_stream()
            if stream.is_capturing():  # an event of a captured graph is none outside of it
                return
            place = int(x.device.id), stream.ptr
            if place not in self.updates:
                self.updates[place] = cupy.cuda.Event(disable_timing=True)
            self.updates[place].record(stream)


class CuPyBackend(CudaBackend):
    """What is queued for an array runs on the stream that is current on the array's device, and nothing waits for it.

    On two streams of CuPy, a state is ordered like any array, by who uses it there. A state that leaves CuPy does so
    through `to_numpy`, which waits for the streams on which running statistics were last updated, and for no other.
    """

    name = "cupy"
    libraries = ("cupy",)
    kernels = _Arrays()
    how = "CUDA kernels, compiled for the GPU at first use"

    def module(self) -> ModuleType:
        return array_api_compat.cupy

    def namespace(self, x: Array) -> ModuleType:
        return array_api_compat.cupy

    def dtype(self, name: str) -> Any:
        return numpy_dtype(name)

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

    def problem(self) -> str:
        return super().problem() or launch.problem()

    def device_name(self, x: Array) -> str:
        return f"cuda:{self.device_of(x)}"

    def has_float64(self, device: Any) -> bool:
        return True

    def from_numpy(self, array: np.ndarray, device: int) -> Array:
        with cupy.cuda.Device(device):
            made, stream = cupy.array(array), cupy.cuda.get_current_stream()
            if not stream.is_capturing():
                stream.synchronize()  # a state keeps what is made, and calls on other streams read it
            return made

    def to_numpy(self, x: Array) -> np.ndarray:
        with x.device:
            stream = cupy.cuda.get_current_stream()
            for (device, other), update in tuple(self.kernels.updates.items()):
                if device == x.device.id and other != stream.ptr:
                    stream.wait_event(update)
            return np.asarray(cupy.asnumpy(x))

    def overlaps(self, a: Array, b: Array) -> bool:
        return bool(cupy.may_share_memory(a, b))

    def same_memory(self, a: Array, b: Array) -> bool:
        return a is b or bool(a.data.ptr == b.data.ptr and a.shape == b.shape and a.strides == b.strides)
