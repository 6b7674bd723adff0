"""NumPy arrays."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import array_api_compat.numpy
import numpy as np

from anybn._lock import undisturbed
from anybn._settings import DTYPES, numpy_dtype
from anybn.backends.base import Backend, beside_values
from anybn.core import formulas
from anybn.core.call import Array, Call, Gradients, Statistics, Update
from anybn.groups import exchange
from anybn.kernels.cpu import chunked

_ndarray = np.ndarray  # the name of a module's attribute takes as long to find as the comparison
_PLAIN = (np.dtype(np.float32), np.dtype(np.float64))


class NumPyBackend(Backend):
    name = "numpy"
    libraries = ("numpy",)

    @property
    def how(self) -> str:  # type: ignore[override]
        if kernels() is chunked:
            return "in NumPy, some times slower than with Numba: pip install 'anybn[fast]'"
        problem = importlib.import_module("anybn.kernels.cpu.cached").problem
        return f"fused Numba kernels{problem and ', '}{problem}"

    def owns(self, array_type: type) -> bool:
        if array_type is np.ndarray:
            return True
        return (
            issubclass(array_type, np.ndarray)
            and not issubclass(array_type, np.matrix)
            and not beside_values(array_type)
        )

    def holds(self, array: Array, device: Any) -> bool:
        return type(array) is _ndarray or self.owns(type(array))

    def refusal(self, x: Array) -> str:
        if not x.dtype.isnative:
            return f"has dtype {x.dtype} in the other byte order: cast it with x.astype(x.dtype.newbyteorder('='))"
        return ""

    def are_plain(self, *arrays: np.ndarray | None) -> bool:
        return all(a is None or (type(a) is _ndarray and a.dtype in _PLAIN) for a in arrays)

    def module(self) -> ModuleType:
        return array_api_compat.numpy

    def namespace(self, x: Array) -> ModuleType:
        return array_api_compat.numpy

    def device_of(self, x: Array) -> str:
        return "cpu"

    def has_float64(self, device: Any) -> bool:
        return True

    def dtype(self, name: str) -> Any:
        return numpy_dtype(name)

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

    def watch(self, x: np.ndarray) -> Callable[[], bytes] | None:
        return x.tobytes if x.flags.writeable or x.base is not None else None

    def frozen(self, x: np.ndarray) -> np.ndarray:
        x.flags.writeable = False
        return x

    def overlaps(self, a: Array, b: Array) -> bool:
        if a.base is None and b.base is None:  # each owns its memory
            return a is b
        return np.may_share_memory(a, b)

    def overlaps_any(self, x: Array, others: tuple[Array | None, ...]) -> bool:
        if x.base is None:  # where all own their memory, it is another's for each
            for a in others:
                if a is not None and (type(a) is not _ndarray or a.base is not None or a is x):
                    break
            else:
                return False
        return super().overlaps_any(x, others)

    def same_memory(self, a: Array, b: Array) -> bool:
        return a is b or (
            a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
            and a.shape == b.shape
            and a.strides == b.strides
        )

    # -- batch norm --------------------------------------------------------------------------------------------

    def _kernels_for(self, call: Call) -> Any:
        """The kernels that take the arrays of such a call; None, for the core, where there is nothing in them."""
        if not call.x.size:
            return None
        chosen = kernels()
        supported = chosen.supports(_bits_of(call.x.dtype)) and (call.mask is None or chosen.takes(call))
        return chosen if supported else chunked

    def statistics(self, call: Call) -> Statistics:
        if call.group is None and (chosen := self._kernels_for(call)):
            return chosen.batch_statistics(_in_bits(call))
        return super().statistics(call)

    def train(self, call: Call) -> tuple[np.ndarray, Statistics, tuple[np.ndarray, np.ndarray] | None]:
        if call.group is None and (chosen := self._kernels_for(call)):
            y, statistics, running = chosen.train(_in_bits(call))
            return _delivered(y, call), statistics, running
        return super().train(call)

    def evaluate(self, call: Call, statistics: Statistics) -> np.ndarray:
        if chosen := self._kernels_for(call):
            return _delivered(chosen.evaluate(_in_bits(call), statistics), call)
        if call.out is None and (call.residual is not None or call.mask is not None):
            # NumPy gives the sum of arrays of different memory orders in none of the two.
            call = call._replace(out=np.empty_like(call.x))
        return super().evaluate(call, statistics)

    def evaluate_at_once(
        self, x: Array, arrays: tuple[Any, ...], channels: int, axis: int, eps: float, relu: bool
    ) -> np.ndarray | None:
        if type(self) is not NumPyBackend or type(x) is not _ndarray:
            return None
        return kernels().evaluate_at_once(x, arrays, channels, axis, eps, relu)  # type: ignore[no-any-return]

    def gradients(
        self, call: Call, statistics: Statistics, dy: np.ndarray, active: np.ndarray | None, wants_residual: bool
    ) -> Gradients:
        chosen = self._kernels_for(call)
        if not chosen:
            return super().gradients(call, statistics, dy, active, wants_residual)
        over = None if call.group is None else functools.partial(exchange.sums, self, call.group.group)
        dx, dweight, dbias, dresidual = chosen.gradients(
            _in_bits(call), statistics, _bits(dy), active, wants_residual, over
        )
        of_parameters = formulas.parameter_gradients(array_api_compat.numpy, call, dweight, dbias)
        return Gradients(dx.view(call.x.dtype), *of_parameters, dresidual.view(dy.dtype) if wants_residual else None)

    def gradient_sums(
        self, call: Call, statistics: Statistics, dy: np.ndarray, active: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """``sum(dy)`` and ``sum(dy * xhat)`` per channel, in float64, of a part of an array, which is not empty."""
        return self._kernels_for(call).gradient_sums(_in_bits(call), statistics, _bits(dy), active)

    def dx(
        self,
        call: Call,
        statistics: Statistics,
        dy: np.ndarray,
        active: np.ndarray | None,
        means: tuple[np.ndarray | None, np.ndarray | None],
    ) -> np.ndarray:
        """dx of such a part, with the means of dy and ``dy * xhat`` over the whole; None for constant statistics."""
        return self._kernels_for(call).dx(_in_bits(call), statistics, _bits(dy), active, *means).view(call.x.dtype)

    def update(self, update: Update, statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(statistics.count, int):
            return super().update(update, statistics)
        return kernels().updated_running_statistics(update, statistics)

    # -- norms of rows -----------------------------------------------------------------------------------------

    def normalize_rows(self, call: Call) -> tuple[np.ndarray, Statistics]:
        chosen = self._kernels_for(call)
        if not (chosen and chosen.row_kernels and chosen.row_kernels.takes(call)):
            return super().normalize_rows(call)
        y, statistics = chosen.row_kernels.normalize(_in_bits(call))
        return y.view(call.x.dtype), statistics

    def row_gradients(self, call: Call, statistics: Statistics, dy: np.ndarray) -> Gradients:
        if not ((chosen := self._kernels_for(call)) and chosen.row_kernels):
            return super().row_gradients(call, statistics, dy)
        grads = chosen.row_kernels.gradients(_in_bits(call), statistics, _bits(dy))
        of_parameters = formulas.parameter_gradients(array_api_compat.numpy, call, grads.weight, grads.bias)
        return Gradients(grads.x.view(call.x.dtype), *of_parameters, None)


@functools.cache
def kernels() -> ModuleType:
    """`anybn.kernels.cpu.operations` where Numba is installed and compiles (it does not with ``NUMBA_DISABLE_JIT=1``),
    else `chunked`; imported with the first array for it."""
    if importlib.util.find_spec("numba") is None:
        return chunked
    return undisturbed(_import_operations)


def _import_operations() -> ModuleType:
    if importlib.import_module("numba").config.DISABLE_JIT:
        return chunked
    return importlib.import_module("anybn.kernels.cpu.operations")


def _bits(a: Any) -> Any:
    """16-bit numbers as kernels take them, as bits; all else as it is."""
    return a if a is None or a.itemsize != 2 else a.view(_bits_of(a.dtype))


@functools.cache
def _bits_of(dtype: np.dtype) -> np.dtype:
    return np.dtype(DTYPES[dtype.name].bits)


def _in_bits(call: Call) -> Call:
    """The call as kernels take it."""
    if call.x.itemsize != 2:
        return call
    x, spec, weight, bias, residual, mask, _, update, out = call
    return Call(_bits(x), spec, weight, bias, _bits(residual), mask, None, update, _bits(out))


def _delivered(y: np.ndarray, call: Call) -> np.ndarray:
    """What kernels made, as the call is to have it."""
    if call.out is not None:
        return call.out
    return y if y.dtype is call.x.dtype else y.view(call.x.dtype)
