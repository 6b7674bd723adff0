"""ndonnx arrays: those with values, and those that stand for an argument of the ONNX graph that is being built."""

from __future__ import annotations

import numpy as np

from anybn.backends._needs import needs
from anybn.backends.base import Backend
from anybn.core.call import Array

with needs("ndonnx", pip="ndonnx"):
    import ndonnx  # noqa: F401


class NDOnnxBackend(Backend):
    name = "ndonnx"
    libraries = ("ndonnx",)

    def device_of(self, x: Array) -> None:
        return None

    def devices(self) -> list[str]:
        return ["cpu"]

    def device(self, name: str) -> None:
        if name not in ("", "cpu"):
            raise ValueError(f"ndonnx has no device {name!r}; it has cpu")
        return None

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.array(x.unwrap_numpy())

    def is_traced(self, x: Array) -> bool:
        try:
            x.unwrap_numpy()
        except ValueError:
            return True
        return False
