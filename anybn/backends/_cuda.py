"""batchnorm.cu on device memory: what CuPy's and torch's CUDA arrays share. Imports no array library.

`call` takes pointers, for any library. `CudaBackend` is a `Backend` over a library with NumPy's functions, which is
CuPy, or NumPy itself where a simulator plays the GPU. `gpu` compiles and launches through CuPy.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from anybn import _core
from anybn._core import Array, Gradients, Spec, Statistics
from anybn.backends._base import Backend
from anybn.backends._cuda_plan import MOST_BLOCKS, TYPES, Device, Launch, alignment_of, plan
from anybn.backends._layout import Lying, lying

SOURCE = Path(__file__).with_name("batchnorm.cu")
#: Contraction would break what is computed with its rounding errors.
OPTIONS = ("--std=c++17", "--fmad=false")

#: `struct Call` of batchnorm.cu, field by field.
_POINTERS = (
    *("x", "residual", "dy", "active", "y", "dresidual", "weight", "bias", "mean", "shift", "var", "m2"),
    *("dweight", "dbias", "running_mean", "running_var", "new_running_mean", "new_running_var"),
    *("counter", "partials", "corrections"),
)
_INTEGERS = ("n", "channels", "length", "parts", "keep", "ddof")
_FLAGS = ("weight_type", "running_type", "relu", "propagate", "cumulative", "training", "exact")
CALL = np.dtype(
    [
        *((name, np.uint64) for name in _POINTERS),
        *((name, np.int64) for name in _INTEGERS),
        *((name, np.float64) for name in ("eps", "momentum")),
        *((name, np.int32) for name in _FLAGS),
    ],
    align=True,
)
#: Up to so many values of x, sums are taken in float64, value by value, even where that is slow: rounding errors do not
#: average out in few values, and the time is that of the launch.
FEW = 1 << 15
#: The enumeration of batchnorm.cu.
PARAMETER_TYPES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}


class Gpu(NamedTuple):
    """A device and a stream on it."""

    device: Device
    launch: Callable[[Launch, np.ndarray], None]
    """run a kernel on the stream, with a `CALL` record as its argument"""
    scratch: Callable[[int], tuple[int, Any]]
    """so many bytes of the device: their address, a multiple of 16, and what keeps them while work is being queued"""


def call(
    op: str,
    gpu: Gpu,
    shape: tuple[int, int, int],
    dtype: str,
    *,
    parameter_dtype: str = "float32",
    running_dtype: str = "float64",
    **fields: Any,
) -> None:
    """Queue one operation on arrays that lie in memory as shape, ``(n, channels, length)`` in C order, not empty.

    Pointers are ints, 0 (or left out) for none. Like x, of ``dtype``: x, y, residual, dy, dresidual; ``active`` is one
    byte per value. ``(channels,)`` of parameter_dtype: weight, bias, dweight, dbias; of running_dtype: the running
    statistics; of float64: mean, shift, var, m2. ``shift`` is wanted for float64 x in training.

    ==========  =====================================================================================================
    op          fields
    ==========  =====================================================================================================
    train       x, y, mean, [shift], var, m2, eps, [weight, bias, residual, relu]; to commit as well: running_mean,
                running_var, new_running_mean, new_running_var (may be the same), momentum, ddof, [propagate, counter]
    statistics  x, mean, [shift], var, m2, and as above to commit
    evaluate    x, y, mean, [shift], var, eps, [weight, bias, residual, relu]
    backward    dy, x, y (gets dx), mean, [shift], var, eps, training, [weight, dweight, dbias, active, dresidual];
                training=0: mean and var are constants
    commit      mean, [shift], m2, running_mean, running_var, new_running_mean, new_running_var, ddof, [propagate];
                momentum, or cumulative=1 for 1 / (counter + 1); [counter] is increased
    ==========  =====================================================================================================

    ``y`` may be x or residual. Nothing waits for the device.
    """
    if op == "backward" and not fields.get("training") and not fields.get("dweight"):
        op = "gradients"
    itemsize = TYPES[dtype][1]
    like_x = [fields.get(name, 0) for name in ("x", "residual", "dy", "y", "dresidual")]
    made = plan(op, shape, dtype, gpu.device, alignment_of([*like_x, fields.get("active", 0) * itemsize], itemsize))
    record = np.zeros((), CALL)
    record["exact"] = math.prod(shape) <= FEW
    for name, value in fields.items():
        record[name] = value
    record["n"], record["channels"], record["length"] = shape
    record["weight_type"], record["running_type"] = PARAMETER_TYPES[parameter_dtype], PARAMETER_TYPES[running_dtype]
    record["parts"] = made.parts
    memory = None
    if made.scratch_bytes:
        address, memory = gpu.scratch(made.scratch_bytes)
        record["corrections"], record["partials"] = address, address + 16 * shape[1]
    for launch in made.launches:
        record["keep"] = launch.keep
        gpu.launch(launch, record)
    del memory  # whoever gets it next is behind us on the stream


# -- a GPU, through CuPy -----------------------------------------------------------------------------------------------


@functools.cache
def available() -> bool:
    """Whether CuPy is here to compile and launch with. Imports it if it is installed."""
    if importlib.util.find_spec("cupy") is None:
        return False
    import cupy

    return bool(cupy.cuda.is_available()) and not cupy.cuda.runtime.is_hip


@functools.cache
def device(ordinal: int) -> Device:
    """The properties of a CUDA device."""
    import cupy

    found = cupy.cuda.runtime.getDeviceProperties(ordinal)
    return Device(
        found["multiProcessorCount"], found["sharedMemPerBlockOptin"], (int(found["major"]), int(found["minor"]))
    )


@functools.cache
def function(ordinal: int, kernel: str) -> Any:
    """A kernel, compiled for the device with this ordinal, which must be the current one. CuPy keeps it on disk."""
    import cupy

    module = cupy.RawModule(code=SOURCE.read_text(), options=OPTIONS, name_expressions=(kernel,))
    compiled = module.get_function(kernel)
    compiled.max_dynamic_shared_size_bytes = device(ordinal).shared_bytes
    return compiled.kernel


def gpu(ordinal: int, stream: int, scratch: Callable[[int], tuple[int, Any]]) -> Gpu:
    """A CUDA device, which must be the current one while it is used, and the address of a stream on it."""
    on_stream = SimpleNamespace(ptr=stream)

    def run(launch: Launch, record: np.ndarray) -> None:
        kernel = function(ordinal, launch.kernel)
        kernel((*launch.grid, 1), (*launch.block, 1), (record,), launch.shared_bytes, on_stream)

    return Gpu(device(ordinal), run, scratch)


# -- a backend ---------------------------------------------------------------------------------------------------------


class CudaBackend(Backend):
    """Batch norm by these kernels. A subclass says where arrays are and on what the kernels run."""

    def library(self) -> Any:
        """The module with ``empty`` and ``empty_like``."""
        raise NotImplementedError

    def pointer(self, a: Array) -> int:
        """The address of the first element."""
        raise NotImplementedError

    def gpu(self, x: Array) -> Gpu:
        """x's device, and the stream that the user has chosen there."""
        raise NotImplementedError

    def _takes(self, x: Array, mask: Array | None) -> bool:
        """Whether the kernels do such a call; if not, the core does."""
        if mask is not None or not x.size or max(x.shape) > MOST_BLOCKS[0]:
            return False
        return _core.dtype_name(x.dtype) in TYPES

    def _arranged(self, x: Array, axis: int, *others: Array | None) -> tuple[Lying, Array, list[Array | None]]:
        """How x lies in memory, x and the others all lying that way: themselves, or copies."""
        found = lying(x, axis)
        if found is None:
            x = x.copy(order="K")
            found = lying(x, axis)
            assert found is not None
        return found, x, [a if a is None or a.strides == x.strides else self._copied(a, x) for a in others]

    def _copied(self, a: Array, like: Array) -> Array:
        copy = self.library().empty_like(like, dtype=a.dtype)
        copy[...] = a
        return copy

    def _channels(self, x: Array, channels: int, dtype: Any = "float64") -> Array:
        """An array for one number per channel."""
        return self.library().empty(channels, dtype=dtype)

    def _address(self, a: Array | None, dtype: str = "") -> tuple[int, Array]:
        """(pointer, array) of ``(C,)`` values side by side in memory, of this dtype if one is given; 0 for None."""
        if a is None:
            return 0, None
        if dtype and _core.dtype_name(a.dtype) != dtype:
            a = a.astype(dtype)
        if not a.flags.c_contiguous:
            a = a.copy()
        return self.pointer(a), a

    def _call(
        self, op: str, x: Array, shape: tuple[int, int, int], arrays: dict[str, Array | None], **fields: Any
    ) -> None:
        """`call` with arrays for pointers. Those per channel are copied if they have gaps or, as statistics, another
        dtype."""
        held = []
        parameter_dtype = "float32"
        for name, a in arrays.items():
            if a is None:
                continue
            if name in ("weight", "bias"):
                parameter_dtype = _core.dtype_name(a.dtype)
                fields[name], a = self._address(a)
            elif name in ("mean", "shift", "var", "m2", "running_mean", "running_var"):
                fields[name], a = self._address(a, "float64")
            else:
                fields[name] = self.pointer(a)
            held.append(a)
        call(op, self.gpu(x), shape, _core.dtype_name(x.dtype), parameter_dtype=parameter_dtype, **fields)

    def _statistics(self, x: Array, channels: int) -> dict[str, Array | None]:
        """Room for them: (mean, shift, var, m2), one row of memory each."""
        room = self.library().empty((4, channels), dtype="float64")
        mean, shift, var, m2 = room
        return {"mean": mean, "shift": shift if _core.dtype_name(x.dtype) == "float64" else None, "var": var, "m2": m2}

    def batch_statistics(self, x: Array, axis: int, mask: Array | None) -> Statistics:
        if not self._takes(x, mask):
            return super().batch_statistics(x, axis, mask)
        how, x, _ = self._arranged(x, axis)
        found = self._statistics(x, how.channels)
        self._call("statistics", x, how[1:], {"x": x, **found})
        return Statistics(how.outer * how.inner, found["mean"], found["shift"], found["var"], found["m2"])

    def train(
        self,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        residual: Array | None,
        mask: Array | None,
        spec: Spec,
        out: Array | None = None,
    ) -> tuple[Array, Statistics]:
        if not self._takes(x, mask):
            return super().train(x, weight, bias, residual, mask, spec, out)
        how, x, (residual,) = self._arranged(x, spec.axis, residual)
        y = self._destination(x, out)
        found = self._statistics(x, how.channels)
        arrays = {"x": x, "y": y, "residual": residual, "weight": weight, "bias": bias, **found}
        self._call("train", x, how[1:], arrays, eps=spec.eps, relu=spec.relu)
        statistics = Statistics(how.outer * how.inner, found["mean"], found["shift"], found["var"], found["m2"])
        return self._delivered(y, out), statistics

    def evaluate(
        self,
        x: Array,
        statistics: Statistics,
        weight: Array | None,
        bias: Array | None,
        residual: Array | None,
        mask: Array | None,
        spec: Spec,
        out: Array | None = None,
    ) -> Array:
        if not self._takes(x, mask):
            return super().evaluate(x, statistics, weight, bias, residual, mask, spec, out)
        how, x, (residual,) = self._arranged(x, spec.axis, residual)
        y = self._destination(x, out)
        arrays = {"x": x, "y": y, "residual": residual, "weight": weight, "bias": bias}
        arrays |= {"mean": statistics.mean, "shift": statistics.shift, "var": statistics.var}
        self._call("evaluate", x, how[1:], arrays, eps=spec.eps, relu=spec.relu)
        return self._delivered(y, out)

    def _destination(self, x: Array, out: Array | None) -> Array:
        return out if out is not None and out.strides == x.strides else self.library().empty_like(x)

    def _delivered(self, y: Array, out: Array | None) -> Array:
        if out is None or out is y:
            return y
        out[...] = y
        return out

    def updated_running_statistics(
        self,
        running_mean: Array,
        running_var: Array,
        statistics: Statistics,
        momentum: float | Array,
        ddof: int,
        propagate: bool,
    ) -> tuple[Array, Array]:
        count = statistics.count
        if not isinstance(count, int) or not isinstance(momentum, (int, float)) or not running_mean.size:
            return super().updated_running_statistics(running_mean, running_var, statistics, momentum, ddof, propagate)
        channels = running_mean.shape[0]
        new_mean, new_var = self.library().empty((2, channels), dtype="float64")
        arrays = {"running_mean": running_mean, "running_var": running_var}
        arrays |= {"new_running_mean": new_mean, "new_running_var": new_var}
        arrays |= {"mean": statistics.mean, "shift": statistics.shift, "m2": statistics.m2}
        shape = (count, channels, 1)
        self._call("commit", running_mean, shape, arrays, momentum=momentum, ddof=ddof, propagate=propagate)
        return new_mean, new_var

    def gradients(
        self,
        dy: Array,
        x: Array,
        statistics: Statistics,
        weight: Array | None,
        active: Array | None,
        mask: Array | None,
        spec: Spec,
    ) -> Gradients:
        if not self._takes(x, mask):
            return super().gradients(dy, x, statistics, weight, active, mask, spec)
        how, x, (dy, active) = self._arranged(x, spec.axis, dy, active)
        assert dy is not None
        dx = self.library().empty_like(x)
        dresidual = None if active is None else self.library().empty_like(x)
        dweight = dbias = None
        if weight is not None:
            dweight, dbias = self.library().empty((2, how.channels), dtype=weight.dtype)
        arrays = {"dy": dy, "x": x, "y": dx, "active": active, "dresidual": dresidual, "weight": weight}
        arrays |= {"mean": statistics.mean, "shift": statistics.shift, "var": statistics.var}
        arrays |= {"dweight": dweight, "dbias": dbias}
        self._call("backward", x, how[1:], arrays, eps=spec.eps, training=statistics.count is not None)
        return Gradients(dx, dweight, dbias, dy if dresidual is None else dresidual)
