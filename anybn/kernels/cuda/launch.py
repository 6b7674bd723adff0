"""batchnorm.cu on device memory, by pointers, for any library, none of which it imports; `arrays` has the arrays.

`call` queues an operation on a `Gpu`. `gpu` makes one that compiles and launches through CuPy.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import re
import struct
import warnings
from collections.abc import Callable
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from anybn._settings import DTYPES
from anybn.kernels.cuda.plan import BARRIERS_BYTES, CLUSTERS, TYPES, Device, Launch, Plan, plan


@functools.cache
def source() -> str:
    """batchnorm.cu with its files in their places: CuPy finds what it has compiled by the text that it is given."""

    def text(name: str) -> str:
        return resources.files(__package__).joinpath(name).read_text()  # which may be in a zip

    return re.sub(r'#include "(\w+\.cuh)"', lambda found: text(found[1]), text("batchnorm.cu"))


#: Contraction would break what is computed with its rounding errors.
OPTIONS = ("--std=c++17", "--fmad=false")

#: `struct Call` of batchnorm.cu, field by field.
_POINTERS = (
    *("x", "residual", "dy", "active", "activated", "shown", "y", "dresidual", "weight", "bias"),
    *("mean", "shift", "var", "m2", "dweight", "dbias"),
    *("running_mean", "running_var", "new_running_mean", "new_running_var", "counter"),
    *("shown_count", "first_shown", "partials", "corrections", "barriers"),
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
#: What differs from call to call of one kind: all pointers, and two numbers.
_ADDRESSES, _NUMBERS = struct.Struct(f"={len(_POINTERS)}Q"), struct.Struct("=2d")
_NUMBERS_AT: int = CALL.fields["eps"][1]  # type: ignore[index]
#: Where a pointer is among those that `queue` takes.
INDEX = {name: i for i, name in enumerate(_POINTERS)}
#: Up to so many values of x, or so many of a channel, sums are taken in float64, value by value, even where that is
#: slow: rounding errors do not average out in few values, and the time is that of the launch, or of memory.
FEW, FEW_IN_A_CHANNEL = 1 << 15, 64
#: The enumeration of batchnorm.cu.
PARAMETER_TYPES = {name: number for number, name in enumerate(DTYPES)}


class Gpu(NamedTuple):
    """A device and a stream on it."""

    device: Device
    launch: Callable[[Launch, bytearray], None]
    """run a kernel on the stream, with a `CALL` record as its argument"""
    resident: Callable[[Launch], int]
    """how many blocks of a launch the device can have at once"""
    scratch: Callable[[int], tuple[int, Any]]
    """so many bytes of the device: their address, a multiple of 16, and what keeps them while work is being queued"""


class Kind(NamedTuple):
    """What stays the same from call to call; hashable."""

    op: str
    shape: tuple[int, int, int]
    """as x lies in memory, ``(n, channels, length)`` in C order, not empty"""
    dtype: str
    parameter_dtype: str = "float32"
    running_dtype: str = "float64"
    relu: bool = False
    training: bool = False
    ddof: int = 0
    propagate: bool = False
    cumulative: bool = False
    exact: bool | None = None
    """None: where there are few values"""
    masked: bool = False


def call(op: str, gpu: Gpu, shape: tuple[int, int, int], dtype: str, **fields: Any) -> None:
    """Queue one operation on arrays that lie in memory as shape, ``(n, channels, length)`` in C order, not empty.

    Pointers are ints, 0 (or left out) for none. Like x, of ``dtype``: x, y, residual, dy, dresidual, and activated;
    ``active`` is one byte per value. ``(channels,)`` of parameter_dtype, or float32: weight, bias, dweight, dbias; of
    running_dtype, or float64: the running statistics; of float64: mean, shift, var, m2. ``shift`` is wanted for float64
    x in training.

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

    All but commit take a mask that channels share: ``shown``, one byte per position, ``(n, length)``. Where statistics
    are x's own, ``shown_count`` says how many are not 0; in training and statistics, ``first_shown`` says which is the
    first of these, and may be anything if there is none. Both are int64, on the device.

    ``y`` may be x or residual. Nothing waits for the device.
    """
    pointers = [fields.pop(name, 0) for name in _POINTERS]
    numbers = fields.pop("eps", 0.0), fields.pop("momentum", 0.0)
    queue(gpu, Kind(op, shape, dtype, **fields), pointers, *numbers)


def queue(gpu: Gpu, kind: Kind, pointers: list[int], eps: float, momentum: float) -> None:
    """`call` in a hurry: pointers in the order of ``_POINTERS``, which is completed here."""
    x, residual, dy, active, activated, shown, y, dresidual, *_ = pointers
    misaligned = (x | residual | dy | activated | y | dresidual | (active | shown) * TYPES[kind.dtype][1]) & 15
    alignment = (misaligned & -misaligned) or 16
    if kind.op == "backward" and not kind.training and not pointers[INDEX["dweight"]]:
        kind = kind._replace(op="gradients")
    if shown:
        kind = kind._replace(masked=True)
    made, records = _prepared(kind, gpu.device, alignment)
    if made.cooperative and any(math.prod(one.grid) > gpu.resident(one) for one in made.launches if one.cooperative):
        made, records = _prepared(kind, gpu.device._replace(cooperative=False), alignment)
    memory = None
    if made.scratch_bytes:
        address, memory = gpu.scratch(made.scratch_bytes)
        barriers = address + made.scratch_bytes - BARRIERS_BYTES * made.launches[0].grid[0]
        pointers[-3:] = address + 16 * kind.shape[1], address, barriers
    for launch, fixed in zip(made.launches, records, strict=True):
        record = bytearray(fixed)
        _ADDRESSES.pack_into(record, 0, *pointers)
        _NUMBERS.pack_into(record, _NUMBERS_AT, eps, momentum)
        gpu.launch(launch, record)
    del memory  # whoever gets it next is behind us on the stream


@functools.lru_cache(maxsize=4096)
def _prepared(kind: Kind, device: Device, alignment: int) -> tuple[Plan, tuple[bytes, ...]]:
    """The launches of a call, and for each its `CALL` record but for what differs from call to call."""
    shape = kind.shape
    made = plan(kind.op, shape, kind.dtype, device, max(alignment, TYPES[kind.dtype][1]), kind.masked)
    record = np.zeros((), CALL)
    record["n"], record["channels"], record["length"] = shape
    record["inverse"], record["parts"] = 1 / (shape[0] * shape[2]), made.parts
    record["weight_type"] = PARAMETER_TYPES[kind.parameter_dtype]
    record["running_type"] = PARAMETER_TYPES[kind.running_dtype]
    for name in ("relu", "training", "ddof", "propagate", "cumulative"):
        record[name] = getattr(kind, name)
    few = math.prod(shape) <= FEW or shape[0] * shape[2] <= FEW_IN_A_CHANNEL
    record["exact"] = few if kind.exact is None else kind.exact
    records = []
    for launch in made.launches:
        record["keep"], record["width"] = launch.keep, launch.width
        records.append(record.tobytes())
    return made, tuple(records)


# -- a GPU, through CuPy -----------------------------------------------------------------------------------------------


_NO_COMPILER = "CuPy cannot compile kernels here"


@functools.cache
def problem() -> str:
    """Why CuPy is of no use here, or "". Imports it if it is installed."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    try:
        import cupy

        if not cupy.cuda.is_available():
            return "CuPy finds no CUDA GPU"
        if cupy.cuda.runtime.is_hip:
            return "CuPy is one for ROCm"
        cupy.RawModule(code='extern "C" __global__ void nothing() {}').get_function("nothing")
    except Exception as error:  # of a driver, a compiler, headers, a broken installation
        advice = "pip install 'anybn[cupy]' brings a compiler along, 'anybn[cupy12]' one for CUDA 12"
        return f"{_NO_COMPILER} ({error}): {advice}"
    return ""


@functools.cache
def available() -> bool:
    """Whether CuPy is here, with a GPU and a compiler. Warns where it is and has none."""
    if (found := problem()).startswith(_NO_COMPILER):
        warnings.warn(f"{found}; anybn goes on without", stacklevel=2)
    return not found


@functools.cache
def device(ordinal: int) -> Device:
    """The properties of a CUDA device, which must be the current one."""
    import cupy

    found = cupy.cuda.runtime.getDeviceProperties(ordinal)
    capability = int(found["major"]), int(found["minor"])
    return Device(
        multiprocessors=found["multiProcessorCount"],
        shared_bytes=found["sharedMemPerBlockOptin"],
        capability=capability,
        cooperative=bool(found["cooperativeLaunch"]),
        largest_cluster=_largest_cluster() if capability >= (9, 0) else 1,
    )


def _largest_cluster() -> int:
    """Of blocks that the current device takes: there are some whose driver refuses all."""
    import cupy

    names = {size: f"nothing<{size}>" for size in reversed(CLUSTERS[1:])}
    code = "template <int SIZE> __global__ void __cluster_dims__(SIZE, 1, 1) nothing() {}"
    module = cupy.RawModule(code=code, options=("--std=c++17",), name_expressions=tuple(names.values()))
    for size, name in names.items():
        try:
            module.get_function(name)((size,), (32,), ())
        except cupy.cuda.driver.CUDADriverError:
            continue
        return size
    return 1


@functools.cache
def function(ordinal: int, kernel: str) -> int:
    """The handle of a kernel, compiled for the device with this ordinal, which must be the current one. CuPy keeps what
    it compiles on disk."""
    import cupy

    module = cupy.RawModule(code=source(), options=OPTIONS, name_expressions=(kernel,))
    compiled = module.get_function(kernel)
    compiled.max_dynamic_shared_size_bytes = device(ordinal).shared_bytes
    _held.append((module, compiled))
    return int(compiled.kernel.ptr)


#: What `function` has compiled, which CuPy would unload if nobody held it.
_held: list[Any] = []


@functools.lru_cache(maxsize=4096)
def resident(ordinal: int, launch: Launch) -> int:
    """How many blocks of a launch the device has room for at once, as the driver reckons."""
    from cupy_backends.cuda.api import driver, runtime

    runtime.setDevice(ordinal)  # of a thread that has not used CUDA yet
    threads, kernel = math.prod(launch.block), function(ordinal, launch.kernel)
    blocks = driver.occupancyMaxActiveBlocksPerMultiprocessor(kernel, threads, launch.shared_bytes)
    return int(blocks) * device(ordinal).multiprocessors


#: What the driver answers a thread that has not used CUDA yet, such as the one that autograd runs backward passes in.
NO_CONTEXT = "CUDA_ERROR_INVALID_CONTEXT"


@functools.lru_cache(maxsize=64)
def gpu(ordinal: int, stream: int, scratch: Callable[[int], tuple[int, Any]]) -> Gpu:
    """A CUDA device, which must be the current one while it is used, and the address of a stream on it."""
    from cupy_backends.cuda.api import driver, runtime

    def run(launch: Launch, record: bytearray) -> None:
        try:
            start(launch, record)
        except driver.CUDADriverError as error:
            if NO_CONTEXT not in str(error):
                raise
            runtime.setDevice(ordinal)
            start(launch, record)

    def start(launch: Launch, record: bytearray) -> None:
        argument = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(record)))
        kernel, shape = function(ordinal, launch.kernel), (*launch.grid, 1, *launch.block, 1)
        if launch.cooperative:
            driver.launchCooperativeKernel(kernel, *shape, launch.shared_bytes, stream, ctypes.addressof(argument))
        else:
            driver.launchKernel(kernel, *shape, launch.shared_bytes, stream, ctypes.addressof(argument), 0)

    return Gpu(device(ordinal), run, functools.partial(resident, ordinal), scratch)
