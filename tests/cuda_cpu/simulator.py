"""batchnorm.cu, compiled by g++ as it is, on NumPy arrays: see cuda_on_cpu.h for how, and for what it finds."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anybn.kernels.cuda import launch as _cuda
from anybn.kernels.cuda.plan import TYPES, Device, Launch, kernels

HEADER = Path(__file__).parent / "cuda_on_cpu.h"
COMPILER = shutil.which("g++")
#: The orders in which threads take turns: forward, backward, and shuffled.
SCHEDULES = (0, 1, 2)
#: Floating-point operations as written: no contraction, and IEEE's results for NaN and infinity.
OPTIONS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fsanitize=alignment", "-U_FORTIFY_SOURCE", "-w"]
#: "thread" or "address", of a process that has its library loaded before all else: see sanitized.py.
if SANITIZER := os.environ.get("CUDA_ON_CPU_SANITIZER"):
    OPTIONS += [f"-fsanitize={SANITIZER}", "-g", "-fno-omit-frame-pointer"]


class SimulatorError(RuntimeError):
    """A kernel did what it must not do."""


class Module:
    """Kernels of a source, by name with template arguments."""

    def __init__(self, names: Sequence[str], source: str = _cuda.source(), argument: str = "Call"):
        entries = "\n".join(
            f'extern "C" void entry{i}(const void* c) {{ {name}(*static_cast<const {argument}*>(c)); }}'
            for i, name in enumerate(names)
        )
        launch = """
            extern "C" int launch(void (*f)(const void*), const unsigned* grid, const unsigned* block, unsigned cluster,
                                  bool cooperative, size_t shared, unsigned schedule, uint64_t last, const void* args,
                                  char* error, size_t size) {
              return simulator::launch(f, grid, block, cluster, cooperative, shared, schedule, last, args, error, size);
            }"""
        self._library = ctypes.CDLL(str(_compiled(f'#include "{HEADER}"\n{source}\n{entries}\n{launch}')))
        self._entries = {name: getattr(self._library, f"entry{i}") for i, name in enumerate(names)}

    def run(self, launch: Launch, arguments: np.ndarray, schedule: int = 0, last: int = 2**63) -> None:
        """All blocks, or only so many last ones. Raises SimulatorError."""
        error = ctypes.create_string_buffer(500)
        grid, block = ((ctypes.c_uint * 3)(*size, 1) for size in (launch.grid, launch.block))
        failed = self._library.launch(
            self._entries[launch.kernel],
            grid,
            block,
            launch.cluster,
            launch.cooperative,
            ctypes.c_size_t(launch.shared_bytes),
            schedule,
            ctypes.c_uint64(last),
            ctypes.c_void_p(arguments.ctypes.data),
            error,
            ctypes.c_size_t(len(error)),
        )
        if failed:
            raise SimulatorError(f"{launch.kernel}: {error.value.decode()}")


def _compiled(source: str) -> Path:
    """A shared library, from a folder of those made before."""
    command = [str(COMPILER), *OPTIONS]
    headers = HEADER.read_text(), HEADER.with_name("sanitizers.h").read_text()
    key = hashlib.sha256(repr((source, headers, command)).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"anybn-cuda-on-cpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as here:
            code, compiled, linked = (Path(here) / name for name in ("kernels.cpp", "kernels.o", "kernels.so"))
            code.write_text(source)
            subprocess.run([*command, "-c", str(code), "-o", str(compiled)], check=True)
            # Without -fsanitize, so that the header's handler is what a misaligned access calls.
            subprocess.run([str(COMPILER), "-shared", str(compiled), "-o", str(linked)], check=True)
            linked.replace(library)
    return library


H200 = Device(multiprocessors=132, shared_bytes=227 * 1024, capability=(9, 0))
CONSUMER = Device(multiprocessors=34, shared_bytes=99 * 1024, capability=(8, 9))


class Grouped(Device):
    """A device that has no block for a channel alone."""

    @property
    def clusters(self) -> tuple[int, ...]:
        return ()


@functools.cache
def module(dtype: str, fast_double: bool = True) -> Module:
    """All kernels for a dtype, as compiled for a GPU whose float64 is fast or not."""
    return Module(kernels(dtype), f"#define FAST_DOUBLE {int(fast_double)}\n{_cuda.source()}")


def is_masked(kernel: str) -> bool:
    """Whether a kernel, with its template arguments, is one for a call with a mask."""
    return re.search(r"(true|false), true>|finish_\w+<\w+, true>", kernel) is not None


def resident(device: Device, launch: Launch) -> int:
    """Blocks that the device has room for at once, by shared memory and by registers: 512 threads, or of training on
    planes 1024, take all of these.

    Every block costs 1 KB of shared memory beside its own, and a multiprocessor has that much more than a block can.
    """
    by_memory = (device.shared_bytes + 1024) // (launch.shared_bytes + 1024)
    threads = 1024 if launch.kernel.startswith("train") and ", false" in launch.kernel else 512
    return device.multiprocessors * min(by_memory, threads // math.prod(launch.block))


def gpu(device: Device = H200, schedule: int = 0, launched: list[Launch] | None = None) -> _cuda.Gpu:
    """A GPU for `anybn.kernels.cuda.launch.call`, with NumPy's memory; what it launches is added to launched."""
    dtype_of = {name: dtype for dtype, (name, _, _) in TYPES.items()}
    memories: list[Guarded] = []

    def run(launch: Launch, record: bytearray) -> None:
        assert launch.shared_bytes <= max(device.shared_bytes, 48 * 1024), f"no room for {launch} on {device}"
        assert launch.cluster in (1, *device.clusters)
        if launch.cooperative:
            assert device.cooperative
            assert math.prod(launch.grid) <= resident(device, launch), f"not all blocks of {launch} are resident"
        _, _, arguments = launch.kernel.partition("<")
        dtype = dtype_of.get(arguments.rstrip(">").split(",")[0], "float32")
        module(dtype, device.capability in ((8, 0), (9, 0), (10, 0))).run(
            launch, np.frombuffer(record, np.uint8), schedule
        )
        for memory in memories:
            memory.check()
        if launched is not None:
            launched.append(launch)

    def scratch(nbytes: int) -> tuple[int, Any]:
        memories.append(Guarded(np.full(nbytes, 0xFF, np.uint8)))
        return memories[-1].pointer, memories[-1]

    return _cuda.Gpu(device, run, lambda launch: resident(device, launch), scratch)


class Guarded:
    """A copy of an array in the middle of NaN, ``offset`` bytes off an address that 16 divides."""

    SPACE = 256

    def __init__(self, values: np.ndarray, offset: int = 0):
        self._memory = np.full(values.nbytes + 2 * self.SPACE + 32, 0xFF, np.uint8)
        start = self.SPACE + -(self._memory.ctypes.data + self.SPACE) % 16 + offset
        self.array = self._memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
        self.array[...] = values
        self._outside = np.r_[0:start, start + values.nbytes : self._memory.size]

    @property
    def pointer(self) -> int:
        return self.array.ctypes.data if self.array.size else 0

    def check(self) -> None:
        """That nothing around the array has changed."""
        assert np.all(self._memory[self._outside] == 0xFF), "a kernel wrote outside of an array"


def needs_compiler() -> None:
    """Skips the tests of a module where there is no g++."""
    if COMPILER is None:
        pytest.skip("batchnorm.cu is run by way of g++, which is not installed", allow_module_level=True)
