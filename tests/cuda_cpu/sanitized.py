"""The kernels under a sanitizer: a program of its own, since the sanitizer's library must be loaded before all else.

    CUDA_ON_CPU_SANITIZER=thread LD_PRELOAD=$(g++ -print-file-name=libtsan.so) python tests/cuda_cpu/sanitized.py
    CUDA_ON_CPU_SANITIZER=address LD_PRELOAD=$(g++ -print-file-name=libasan.so) python tests/cuda_cpu/sanitized.py

`command` is that for a test. What the sanitizer finds is on stderr, and makes the exit status. An argument is text that
is taken out of batchnorm.cu, so that there is something to find.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LIBRARIES = {"thread": "libtsan.so", "address": "libasan.so"}
ROOT = Path(__file__).parents[2]
STATUS = 66


def run(sanitizer: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    """This program, under a sanitizer."""
    asked = ["g++", f"-print-file-name={LIBRARIES[sanitizer]}"]
    library = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    options = f"exitcode={STATUS}:halt_on_error=1:detect_leaks=0"
    environment = os.environ | {
        "CUDA_ON_CPU_SANITIZER": sanitizer,
        "LD_PRELOAD": library,
        "TSAN_OPTIONS": options,
        "ASAN_OPTIONS": options,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, str(Path(__file__)), *([fault] if fault else [])]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def main() -> None:
    import numpy as np
    from cuda_cpu.simulator import Grouped, Module, gpu

    from anybn.conformance import oracle
    from anybn.kernels.cuda import launch as _cuda
    from anybn.kernels.cuda.plan import Device, Launch

    class Pairs(Device):
        """A device whose clusters all have two blocks."""

        @property
        def clusters(self) -> tuple[int, ...]:
            return (2,)

    source = _cuda.source()
    for fault in sys.argv[1:]:
        assert source.count(fault) == 1, fault
        source = source.replace(fault, fault.partition(";")[2])
    small = {"multiprocessors": 3, "shared_bytes": 60 * 1024}
    places: dict[str, tuple[Device, tuple[tuple[int, int, int], ...]]] = {
        "clusters": (Pairs(2, 60 * 1024, (9, 0), cooperative=False), ((3, 2, 4096), (7, 4, 251), (131, 20, 1))),
        "groups": (Grouped(**small, capability=(8, 0)), ((601, 20, 1), (371, 4, 49))),
        "two passes": (Device(3, 1, (8, 0)), ((9, 3, 64), (601, 20, 1))),
        "a mask": (Device(3, 60 * 1024, (8, 0)), ((9, 3, 64), (601, 20, 1))),
    }
    masks = {shape: np.random.default_rng(2).random(shape[::2]) < 0.7 for shape in places["a mask"][1]}

    def of_mask(place: str, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
        if place != "a mask":
            return {}
        shown = masks[shape]
        return {"shown": shown, "shown_count": np.array([shown.sum()]), "first_shown": np.array([shown.argmax()])}

    launches: list[tuple[Launch, bytes]] = []
    for place, (device, shapes) in places.items():
        for shape in shapes:
            planned = gpu(device)._replace(launch=lambda launch, record: launches.append((launch, b"")))
            for op in ("train", "backward"):
                pointers = dict.fromkeys(("x", "y", "dy", *of_mask(place, shape)), 16)
                _cuda.call(op, planned, shape, "float32", **pointers, training=int(op == "backward"))
    module = Module(sorted({launch.kernel for launch, _ in launches}), source)
    for place, (device, shapes) in places.items():
        here = gpu(device)._replace(launch=lambda launch, record: module.run(launch, np.frombuffer(record, np.uint8)))
        for shape in shapes:
            x, dy = (np.random.default_rng(i).standard_normal(shape).astype(np.float32) for i in range(2))
            y, dx, statistics = np.empty_like(x), np.empty_like(x), [np.empty(shape[1]) for _ in range(3)]
            arrays = {"x": x, **dict(zip(("mean", "var", "m2"), statistics, strict=True)), **of_mask(place, shape)}
            for op, more in (("train", {"y": y}), ("backward", {"y": dx, "dy": dy, "activated": y})):
                pointers = {name: a.ctypes.data for name, a in (arrays | more).items()}
                _cuda.call(op, here, shape, "float32", **pointers, eps=1e-5, training=int(op == "backward"))
            if not sys.argv[1:]:
                mask = masks[shape] if place == "a mask" else None
                found = oracle.statistics(x, mask=mask)
                expected = oracle.normalize(x, found.mean, found.var(), mask=mask)
                assert oracle.error(y, expected, "float32") <= 2, (place, shape)
    print("all launches have run")


if __name__ == "__main__":
    main()
