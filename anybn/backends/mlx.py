"""MLX arrays, on MLX's default device."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from anybn._settings import DTYPES, numpy_dtype
from anybn.backends._needs import needs
from anybn.backends.base import Backend
from anybn.core import formulas
from anybn.core.call import Array

with needs("mlx", pip="'mlx[cpu]'"):
    import mlx.core as mx


class _Namespace:
    """mlx.core, whose sum takes no dtype."""

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)

    @staticmethod
    def sum(a: Array, axis: Any = None, dtype: Any = None) -> Array:
        return mx.sum(a if dtype is None else a.astype(dtype), axis=axis)


_NAMESPACE = _Namespace()


class MLXBackend(Backend):
    name = "mlx"
    libraries = ("mlx",)
    # MLX adds one value after the other: sums of 16 float64 values are off by twice what NumPy's are.
    sum = staticmethod(partial(formulas.blocked_sum, block=4))

    def module(self) -> Any:
        return mx

    def namespace(self, x: Array) -> _Namespace:
        return _NAMESPACE

    def version(self) -> str:
        return str(mx.__version__)

    def device_of(self, x: Array) -> None:
        """Arrays lie in memory that all devices share; operations run on a device, the default one."""
        return None

    def devices(self) -> list[str]:
        return [mx.default_device().type.name]

    def has_float64(self, device: Any) -> bool:
        return mx.default_device() == mx.Device(mx.cpu)

    def from_numpy(self, array: np.ndarray, device: Any) -> Array:
        name = array.dtype.name
        if hasattr(np, name):
            return super().from_numpy(array, device)
        return mx.array(array.view(DTYPES[name].bits)).view(self.dtype(name))  # MLX does not know ml_dtypes

    def to_numpy(self, x: Array) -> np.ndarray:
        if x.dtype != mx.bfloat16:
            return super().to_numpy(x)
        return np.array(x.view(mx.uint16)).view(numpy_dtype("bfloat16"))
