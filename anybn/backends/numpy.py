"""NumPy arrays."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import array_api_compat.numpy
import numpy as np

from anybn.backends.base import Backend
from anybn.core import formulas as _core
from anybn.core.formulas import Array, Gradients, Over, RowSpec, Spec, Statistics
from anybn.errors import BackendNotInstalled
from anybn.groups import exchange as _synchronized
from anybn.groups.exchange import Members


class NumPyBackend(Backend):
    name = "numpy"
    libraries = ("numpy",)

    @property
    def how(self) -> str:  # type: ignore[override]
        return "in blocks that fit the cache" if importlib.util.find_spec("numba") is None else "fused Numba kernels"

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, np.ndarray) and not issubclass(array_type, (np.ma.MaskedArray, np.matrix))

    def holds(self, array: Array, device: Any) -> bool:
        return type(array) is np.ndarray or self.owns(type(array))

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
        if a.base is None and b.base is None:  # each owns its memory
            return a is b
        return np.may_share_memory(a, b)

    def same_memory(self, a: Array, b: Array) -> bool:
        return a is b or (
            a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
            and a.shape == b.shape
            and a.strides == b.strides
        )

    # -- batch norm --------------------------------------------------------------------------------------------

    def _kernels_for(self, x: np.ndarray, mask: np.ndarray | None) -> Any:
        """The kernels, if they take such a call; else None, for the core."""
        return kernels() if mask is None and kernels().supports(_bits(x).dtype) else None

    def batch_statistics(self, x: np.ndarray, axis: int, mask: np.ndarray | None) -> Statistics:
        if chosen := self._kernels_for(x, mask):
            return chosen.batch_statistics(_bits(x), axis)
        return super().batch_statistics(x, axis, mask)

    def train(
        self,
        x: np.ndarray,
        weight: np.ndarray | None,
        bias: np.ndarray | None,
        residual: np.ndarray | None,
        mask: np.ndarray | None,
        spec: Spec,
        out: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Statistics]:
        if chosen := self._kernels_for(x, mask):
            y, statistics = chosen.train(_bits(x), weight, bias, _bits(residual), spec, _bits(out))
            return y.view(x.dtype) if out is None else out, statistics
        return super().train(x, weight, bias, residual, mask, spec, out)

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
        if x.size and (chosen := self._kernels_for(x, mask)):
            y = chosen.evaluate(_bits(x), statistics, weight, bias, _bits(residual), spec, _bits(out))
            return y.view(x.dtype) if out is None else out
        if out is None and (residual is not None or mask is not None):
            out = np.empty_like(x)  # NumPy gives the sum of arrays of different memory orders in none of the two
        return super().evaluate(x, statistics, weight, bias, residual, mask, spec, out)

    def updated_running_statistics(
        self,
        running_mean: np.ndarray,
        running_var: np.ndarray,
        statistics: Statistics,
        momentum: float,
        ddof: int,
        propagate: bool,
    ) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(statistics.count, int):
            return super().updated_running_statistics(running_mean, running_var, statistics, momentum, ddof, propagate)
        return kernels().updated_running_statistics(running_mean, running_var, statistics, momentum, ddof, propagate)

    def gradients(
        self,
        dy: np.ndarray,
        x: np.ndarray,
        statistics: Statistics,
        weight: np.ndarray | None,
        active: np.ndarray | None,
        mask: np.ndarray | None,
        spec: Spec,
        over: Over | None = None,
    ) -> Gradients:
        chosen = self._kernels_for(x, mask)
        if not (x.size and chosen):
            return super().gradients(dy, x, statistics, weight, active, mask, spec)
        grads = chosen.gradients(_bits(dy), _bits(x), statistics, weight, active, spec, over)
        dresidual = dy if spec.differentiates_residual else None
        if dresidual is not None and active is not None:
            dresidual = np.where(active, dy, np.zeros((), dy.dtype))
        if weight is None:
            return Gradients(grads.x.view(x.dtype), None, None, dresidual)
        dweight, dbias = (_core.rounded_to(array_api_compat.numpy, a, weight.dtype) for a in (grads.weight, grads.bias))
        return Gradients(grads.x.view(x.dtype), dweight, dbias, dresidual)

    def gradients_over(self, members: Members, dy: np.ndarray, x: np.ndarray, *rest: Any) -> Gradients:
        statistics, weight, active, mask, spec = rest
        if not (x.size and self._kernels_for(x, mask)):
            return super().gradients_over(members, dy, x, *rest)
        over = functools.partial(_synchronized.sums, self, members.group)
        return self.gradients(dy, x, statistics, weight, active, mask, spec, over)

    # -- norms of rows -----------------------------------------------------------------------------------------

    def normalize_rows(
        self, x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None, spec: RowSpec
    ) -> tuple[np.ndarray, Statistics]:
        chosen = self._kernels_for(x, None)
        if not (chosen and chosen.row_kernels and chosen.row_kernels.takes(spec, weight, bias)):
            return super().normalize_rows(x, weight, bias, spec)
        y, statistics = chosen.row_kernels.normalize(_bits(x), weight, bias, spec)
        return y.view(x.dtype), statistics

    def row_gradients(
        self,
        dy: np.ndarray,
        x: np.ndarray,
        statistics: Statistics,
        weight: np.ndarray | None,
        bias: np.ndarray | None,
        spec: RowSpec,
    ) -> Gradients:
        if not ((chosen := self._kernels_for(x, None)) and chosen.row_kernels):
            return super().row_gradients(dy, x, statistics, weight, bias, spec)
        grads = chosen.row_kernels.gradients(_bits(dy), _bits(x), statistics, weight, bias, spec)
        dweight, dbias = (
            None if parameter is None else _core.rounded_to(array_api_compat.numpy, a, parameter.dtype)
            for a, parameter in ((grads.weight, weight), (grads.bias, bias))
        )
        return Gradients(grads.x.view(x.dtype), dweight, dbias, None)


@functools.cache
def kernels() -> ModuleType:
    """`anybn.kernels.cpu.operations` where Numba is installed, else `blocked`; imported with the first array for it."""
    name = "blocked" if importlib.util.find_spec("numba") is None else "operations"
    return importlib.import_module(f"anybn.kernels.cpu.{name}")


def _bits(a: Any) -> Any:
    """16-bit numbers as kernels take them: bfloat16 as uint16, float16 as int16; all else as it is."""
    if a is None or a.dtype.itemsize != 2:
        return a
    if a.dtype == np.float16:
        return a.view(np.int16)
    return a.view(np.uint16) if a.dtype.name == "bfloat16" else a
