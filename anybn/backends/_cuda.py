"""batchnorm.cu on device memory, by pointers, for any library, none of which it imports; `_cuda_arrays` has the arrays.

`call` queues an operation on a `Gpu`. `gpu` makes one that compiles and launches through CuPy.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from anybn.backends._cuda_plan import TYPES, Device, Launch, alignment_of, plan

SOURCE = Path(__file__).with_name("batchnorm.cu")


@functools.cache
def source() -> str:
    """batchnorm.cu with its files in their places: CuPy finds what it has compiled by the text that it is given."""
    return re.sub(r'#include "(\w+\.cuh)"', lambda found: SOURCE.with_name(found[1]).read_text(), SOURCE.read_text())


#: Contraction would break what is computed with its rounding errors.
OPTIONS = ("--std=c++17", "--fmad=false")

#: `struct Call` of batchnorm.cu, field by field.
_POINTERS = (
    *("x", "residual", "dy", "active", "activated", "y", "dresidual", "weight", "bias", "mean", "shift", "var", "m2"),
    *("dweight", "dbias", "running_mean", "running_var", "new_running_mean", "new_running_var"),
    *("counter", "partials", "corrections", "barriers"),
)
_INTEGERS = ("n", "channels", "length", "parts", "keep", "width", "ddof")
_FLAGS = ("weight_type", "running_type", "relu", "propagate", "cumulative", "training", "exact")
CALL = np.dtype(
    [
        *((name, np.uint64) for name in _POINTERS),
        *((name, np.int64) for name in _INTEGERS),
        *((name, np.float64) for name in ("inverse", "eps", "momentum")),
        *((name, np.int32) for name in _FLAGS),
    ],
    align=True,
)
#: Up to so many values of x, or so many of a channel, sums are taken in float64, value by value, even where that is
#: slow: rounding errors do not average out in few values, and the time is that of the launch, or of memory.
FEW, FEW_IN_A_CHANNEL = 1 << 15, 64
#: The enumeration of batchnorm.cu.
PARAMETER_TYPES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}


class Gpu(NamedTuple):
    """A device and a stream on it."""

    device: Device
    launch: Callable[[Launch, np.ndarray], None]
    """run a kernel on the stream, with a `CALL` record as its argument"""
    resident: Callable[[Launch], int]
    """how many blocks of a launch the device can have at once"""
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

    Pointers are ints, 0 (or left out) for none. Like x, of ``dtype``: x, y, residual, dy, activated, dresidual; ``active``
    is one byte per value. ``(channels,)`` of parameter_dtype: weight, bias, dweight, dbias; of running_dtype: the running
    statistics; of float64: mean, shift, var, m2. ``shift`` is wanted for float64 x in training.

    ==========  =====================================================================================================
    op          fields
    ==========  =====================================================================================================
    train       x, y, mean, [shift], var, m2, eps, [weight, bias, residual, relu]; to commit as well: running_mean,
                running_var, new_running_mean, new_running_var (may be the same), momentum, ddof, [propagate, counter]
    statistics  x, mean, [shift], var, m2, and as above to commit
    evaluate    x, y, mean, [shift], var, eps, [weight, bias, residual, relu]
    backward    dy, x, y (gets dx), mean, [shift], var, eps, training, [weight, dweight, dbias, dresidual]; behind a
                relu, active, or activated, which is what came out of it; training=0: mean and var are constants
    commit      mean, [shift], m2, running_mean, running_var, new_running_mean, new_running_var, ddof, [propagate];
                momentum, or cumulative=1 for 1 / (counter + 1); [counter] is increased
    ==========  =====================================================================================================

    ``y`` may be x or residual. Nothing waits for the device.
    """
    if op == "backward" and not fields.get("training") and not fields.get("dweight"):
        op = "gradients"
    itemsize = TYPES[dtype][1]
    like_x = [fields.get(name, 0) for name in ("x", "residual", "dy", "activated", "y", "dresidual")]
    alignment = alignment_of([*like_x, fields.get("active", 0) * itemsize], itemsize)
    made = plan(op, shape, dtype, gpu.device, alignment)
    if any(launch.cooperative and math.prod(launch.grid) > gpu.resident(launch) for launch in made.launches):
        made = plan(op, shape, dtype, gpu.device._replace(cooperative=False), alignment)
    record = np.zeros((), CALL)
    record["exact"] = math.prod(shape) <= FEW or shape[0] * shape[2] <= FEW_IN_A_CHANNEL
    for name, value in fields.items():
        record[name] = value
    record["n"], record["channels"], record["length"] = shape
    record["inverse"] = 1 / (shape[0] * shape[2])
    record["weight_type"], record["running_type"] = PARAMETER_TYPES[parameter_dtype], PARAMETER_TYPES[running_dtype]
    record["parts"] = made.parts
    memory = None
    if made.scratch_bytes:
        address, memory = gpu.scratch(made.scratch_bytes)
        record["corrections"] = record["barriers"] = address
        record["partials"] = address + 16 * shape[1]
    for launch in made.launches:
        record["keep"], record["width"] = launch.keep, launch.width
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
        multiprocessors=found["multiProcessorCount"],
        shared_bytes=found["sharedMemPerBlockOptin"],
        capability=(int(found["major"]), int(found["minor"])),
        cooperative=bool(found["cooperativeLaunch"]),
    )


@functools.cache
def function(ordinal: int, kernel: str) -> Any:
    """A kernel, compiled for the device with this ordinal, which must be the current one. CuPy keeps it on disk."""
    import cupy

    module = cupy.RawModule(code=source(), options=OPTIONS, name_expressions=(kernel,))
    compiled = module.get_function(kernel)
    compiled.max_dynamic_shared_size_bytes = device(ordinal).shared_bytes
    return compiled.kernel


@functools.cache
def resident(ordinal: int, launch: Launch) -> int:
    """How many blocks of a launch the device has room for at once, as the driver reckons."""
    from cupy_backends.cuda.api import driver

    compiled = function(ordinal, launch.kernel)
    threads = math.prod(launch.block)
    blocks = driver.occupancyMaxActiveBlocksPerMultiprocessor(compiled.ptr, threads, launch.shared_bytes)
    return blocks * device(ordinal).multiprocessors


def gpu(ordinal: int, stream: int, scratch: Callable[[int], tuple[int, Any]]) -> Gpu:
    """A CUDA device, which must be the current one while it is used, and the address of a stream on it."""
    on_stream = SimpleNamespace(ptr=stream)

    def run(launch: Launch, record: np.ndarray) -> None:
        kernel = function(ordinal, launch.kernel)
        how = {"enable_cooperative_groups": True} if launch.cooperative else {}
        kernel((*launch.grid, 1), (*launch.block, 1), (record,), launch.shared_bytes, on_stream, **how)

    return Gpu(device(ordinal), run, lambda launch: resident(ordinal, launch), scratch)
