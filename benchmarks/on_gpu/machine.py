"""The GPU, or what stands for it in a rehearsal: arrays on it, kernels, times, rows of results."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from anybn.kernels.cuda import launch as _cuda
from anybn.kernels.cuda.plan import Device, Launch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
EPS = 1e-5
#: Of y and dx, in eps of the dtype. float64 has nothing wider: x - mean, its shift, the root and the quotient of rstd,
#: and the product are rounded by half an eps each, var + eps by half of that.
BAR = {"float16": 0.51, "bfloat16": 0.51, "float32": 2.0, "float64": 2.75}

Run = Callable[[], Any]
#: What the command line says.
options = argparse.Namespace()


def unavailable() -> str:
    """Why there is nothing to run on, or ""."""
    try:
        import cupy
        import torch
    except ImportError as error:
        return f"{error.name} is not installed: this needs a GPU, cupy, and torch for CUDA"
    if not cupy.cuda.is_available():
        return "CuPy finds no CUDA GPU"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA GPU"
    return ""


def place() -> str:
    return "cpu" if options.rehearse else "cuda"


def synchronize() -> None:
    if not options.rehearse:
        import torch

        torch.cuda.synchronize()


def simulated() -> _cuda.Gpu:
    sys.path.insert(0, str(ROOT / "tests"))
    from cuda_cpu import simulator

    return simulator.gpu()


def of_torch() -> _cuda.Gpu:
    """torch's current device and stream, with torch's memory."""
    import torch

    if options.rehearse:
        return simulated()

    def scratch(nbytes: int) -> tuple[int, Any]:
        memory = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        return memory.data_ptr(), memory

    return _cuda.gpu(torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream, scratch)


def call(
    op: str,
    shape: tuple[int, int, int],
    launched: list[Launch] | None = None,
    device: Device | None = None,
    **fields: Any,
) -> None:
    """`_cuda.call` with tensors for pointers, as planned for this device, or for the one that is there."""
    dtype = str(fields["x"].dtype).removeprefix("torch.")
    plain = {name: a.data_ptr() if hasattr(a, "data_ptr") else a for name, a in fields.items() if a is not None}
    gpu = of_torch()
    if device is not None:
        gpu = gpu._replace(device=device)
    if launched is not None:
        launch = gpu.launch
        gpu = gpu._replace(launch=lambda one, record: (launched.append(one), launch(one, record)))
    _cuda.call(op, gpu, shape, dtype, **plain)


def where() -> dict[str, Any]:
    """The fields of every row."""
    import torch

    import anybn

    versions = {"anybn": anybn.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if options.rehearse:
        return {"device": "rehearsal", "driver": "none", "versions": versions}
    import cupy

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split()
    versions |= {"cupy": cupy.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver[0] if driver else "unknown",
        "versions": versions,
    }


def write(row: dict[str, Any]) -> None:
    with (options.out / "gpu.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


class Time(NamedTuple):
    us: float
    spread: float


def timed(runs: Sequence[Run], replays: int = 7) -> Time:
    """Of one of the runs, replayed from a graph one after the other."""
    import torch

    if options.rehearse:
        for run in runs:
            run()
        return Time(1.0, 0.0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in runs[:2]:
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    times = []
    for i in range(replays + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i:
            times.append(start.elapsed_time(end) * 1e3 / len(runs))
    middle = statistics.median(times)
    return Time(round(middle, 3), round((max(times) - min(times)) / middle, 4))
