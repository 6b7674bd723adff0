"""All that needs a CUDA GPU, in one command: is it right, and how fast is it. It ends after about five minutes.

    python benchmarks/gpu.py --out results          # everything
    python benchmarks/gpu.py --out results --part copy compile bench --op train --dtype bfloat16
    python benchmarks/gpu.py --out results --rehearse   # on the CPU, by the simulator of tests/cuda_cpu: times nothing

It needs a GPU, torch for CUDA, CuPy, NumPy, array-api-compat, and pytest for ``conformance``; where anybn is not
installed, PYTHONPATH=. does. Every part is a process with a limit of its own: one that hangs, or breaks its CUDA
context, takes nothing else with it. Parts that are right or wrong run side by side, parts that take times alone.

What comes out is in ``--out`` from the first row on: ``gpu.jsonl``, a row per case with device, driver, versions, bytes
and the spread of the times, and ``log.txt``. A summary is printed last. It exits with 2 without a GPU, CuPy and torch
for CUDA, and with 1 if a part failed.

Times are medians over replays of a CUDA graph that works through buffers larger than the L2 cache, and their spread is
(slowest - fastest) / median. ``copy_us`` is a device copy of x. What is timed is checked against float64 first.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import entry_points
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anybn.conformance import oracle
from anybn.kernels.cuda import launch as _cuda
from anybn.kernels.cuda.plan import TYPES, Device, Launch, kernels

ROOT = Path(__file__).parent.parent
OPS = ("train", "backward", "evaluate", "step")
#: Batch norms of ResNet-50 on 64 images, one of its smallest, and a matrix; the first few already say most.
SHAPES: tuple[tuple[int, ...], ...] = (
    (64, 256, 56, 56),
    (64, 512, 28, 28),
    (64, 64, 112, 112),
    (64, 2048, 7, 7),
    (64, 1024, 14, 14),
    (64, 128, 28, 28),
    (64, 512, 7, 7),
    (65536, 1024),
)
EPS = 1e-5
#: Of y and dx, in eps of the dtype. float64 has nothing wider: x - mean, its shift, the root and the quotient of rstd,
#: and the product are rounded by half an eps each, var + eps by half of that.
BAR = {"float16": 0.51, "bfloat16": 0.51, "float32": 2.0, "float64": 2.75}
#: As it is planned for a GPU of this size, which any GPU can do: groups of blocks, and two passes, for small arrays.
SMALL = Device(multiprocessors=4, shared_bytes=24 * 1024, capability=(8, 0))
FAMILIES = {"train", "backward", "train_group", "backward_group", "sums", "gradient_sums"}

Run = Callable[[], Any]
options: argparse.Namespace


# -- the GPU, or what stands for it in a rehearsal --------------------------------------------------------------------


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


# -- what the machine can do ------------------------------------------------------------------------------------------


def measure_copy() -> None:
    """Of 1 GB within the device: bytes read and written per second, which nothing here can exceed by much."""
    import torch

    source = torch.randn(1 << (10 if options.rehearse else 28), device=place())
    target = torch.empty_like(source)
    found = timed([lambda: target.copy_(source)] * 4)
    rate = 2 * source.nbytes / found.us / 1e6
    write({**where(), "op": "copy", "bytes": 2 * source.nbytes, "us": found.us, "spread": found.spread})
    print(f"copy: {rate:.2f} TB/s ({found.spread:.1%} spread), {where()}")


def compile_one(kernel: str) -> None:
    _cuda.function(0, kernel)


def compile_all() -> None:
    """Every kernel, by all cores, into CuPy's folder on disk, from which all other parts take them."""
    names = list(dict.fromkeys(name for dtype in TYPES for name in kernels(dtype)))
    if options.rehearse:
        print(f"compile: {len(names)} kernels, left out")
        return
    start = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _share_options, (options,)) as pool:
        for _ in pool.map(compile_one, names, chunksize=4):
            pass
    print(f"compile: {len(names)} kernels in {time.monotonic() - start:.1f} s")


def _share_options(given: argparse.Namespace) -> None:
    global options
    options = given


def check_launches() -> None:
    """Whether clusters of each size, and cooperative launches, are accepted, one after the other."""
    import torch

    refused = []
    for size in (1, 2, 4, 8, "cooperative"):

        class Only(Device):
            @property
            def clusters(self, size: Any = size) -> tuple[int, ...]:
                return () if size == "cooperative" else (size,)

        blocks = 4 if size == "cooperative" else size
        device = Only(blocks, 100 * 1024, (9, 0), size == "cooperative")
        x = torch.randn((2 * blocks, 2, 4096), device=place())
        launched: list[Launch] = []
        try:
            y = outputs(x.shape, x, x, device, launched)["y"]
            synchronize()
            expected = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
            assert torch.allclose(y.double(), expected, atol=1e-6), "wrong result"
            of_size = [one for one in launched if one.cooperative or (one.cluster == size and "sums" not in one.kernel)]
            assert len(of_size) == 2, f"{launched} were launched"
            print(f"launches: {size} is accepted, {launched[-1]}")
        except Exception as error:
            refused.append(f"{size}: {type(error).__name__}: {error}")
    assert not refused, "; ".join(refused)


# -- every kernel, on small arrays ------------------------------------------------------------------------------------


def check_kernels() -> None:
    """Training and backward at odd shapes, in every dtype, aligned or not, as planned for this GPU and for a small one,
    against long double; twice the same bits. Every family of kernels must have run."""
    import torch

    shapes = [(4, 3, 49), (3, 5, 64), (2, 2, 1156), (5, 1, 31), (64, 68, 1), (301, 3, 1), (2, 1023, 1)]
    shapes += [(2, 37, 16), (64, 12, 49), (5, 2, 8192), (5, 2, 4099), (1501, 68, 1), (301, 256, 49)]
    if options.rehearse:
        shapes = shapes[:2] + shapes[9:11]
    else:
        shapes += [(64, 1, 12544), (7001, 96, 1), (1, 1, 2_000_003)]  # groups of blocks on a large GPU
    launched: list[Launch] = []
    wrong, worst = [], dict.fromkeys(TYPES, 0.0)
    for dtype, shape, offset, device in itertools.product(TYPES, shapes, (0, 1), (None, SMALL)):
        if device is not None and math.prod(shape) > 200_000:
            continue
        rng = np.random.default_rng(0)
        x, dy = (rng.standard_normal(shape) + mean for mean in (1e3, 0))
        tensors = [torch.empty(a.size + offset, dtype=getattr(torch, dtype), device=place())[offset:] for a in (x, dy)]
        for tensor, a in zip(tensors, (x, dy), strict=True):
            tensor.copy_(torch.from_numpy(a.reshape(-1)))
        x, dy = (as_numpy(tensor, shape) for tensor in tensors)
        first, second = (outputs(shape, *tensors, device, launched) for _ in range(2))
        found = oracle.statistics(x)
        gradients = oracle.gradients(dy, x, found.mean, found.var(), count=found.count)
        size = 1 if dtype != "float64" else np.maximum(1, gradients.x_size * np.abs(dy).max())
        errors = {
            "y": oracle.error(as_numpy(first["y"], shape), oracle.normalize(x, found.mean, found.var()), dtype),
            "dx": oracle.error(as_numpy(first["dx"], shape), gradients.x, dtype, size),
            "mean": np.abs(as_numpy(first["mean"], shape[1:2]) - x.mean((0, 2))).max() * 1e6,
        }
        errors |= {f"{n} from run to run": 9.0 * (not same_bits(first[n], second[n])) for n in first}
        worst[dtype] = max(worst[dtype], errors["y"], errors["dx"])
        bad = {name: float(error) for name, error in errors.items() if not error <= BAR[dtype]}
        if bad:
            wrong.append(f"{dtype} {shape} + {offset} on {device}: {bad} by {launched[-4:]}")
    missing = FAMILIES - {launch.kernel.partition("<")[0] for launch in launched}
    worst = {name: round(float(error), 3) for name, error in worst.items()}
    print(f"kernels: {len(shapes)} shapes in {len(TYPES)} dtypes, worst error in eps {worst}")
    assert not wrong, f"{len(wrong)} wrong: " + "\n".join(wrong[:10])
    assert not missing or options.rehearse, f"{', '.join(missing)}: not run"


def as_numpy(a: Any, shape: tuple[int, ...]) -> np.ndarray:
    return a.cpu().double().numpy().reshape(shape)


def same_bits(a: Any, b: Any) -> bool:
    import torch

    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def outputs(
    shape: tuple[int, int, int], x: Any, dy: Any, device: Device | None, launched: list[Launch]
) -> dict[str, Any]:
    """Of training and of backward, on memory that was NaN."""
    import torch

    y, dx = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    mean, shift, var, m2 = torch.full((4, shape[1]), torch.nan, dtype=torch.float64, device=place())
    kept = {"mean": mean, "var": var} | ({"shift": shift} if x.dtype == torch.float64 else {})
    call("train", shape, launched, device, x=x, y=y, m2=m2, eps=EPS, **kept)
    call("backward", shape, launched, device, x=x, dy=dy, y=dx, eps=EPS, training=1, **kept)
    return {"y": y, "dx": dx, "mean": mean, "var": var, "m2": m2}


def check_sanitized() -> None:
    """Three small cases, a cluster, groups of blocks, two passes, by CuPy alone: torch takes long under a checker."""
    if options.rehearse:
        library, gpu = np, simulated()
    else:
        import cupy as library

        library.cuda.set_allocator(None)  # no pool, so that the checker knows where an array ends

        def scratch(nbytes: int) -> tuple[int, Any]:
            memory = library.cuda.alloc(nbytes)
            return int(memory.ptr), memory

        gpu = _cuda.gpu(0, library.cuda.get_current_stream().ptr, scratch)
    alone = SMALL._replace(cooperative=False)
    for shape, device in (((16, 2, 4096), gpu.device), ((1501, 68, 1), SMALL), ((371, 12, 49), alone)):
        x, dy = (library.asarray(np.random.default_rng(i).standard_normal(shape), np.float32) for i in range(2))
        y, dx = library.empty_like(x), library.empty_like(x)
        mean, var, m2 = library.empty((3, shape[1]))
        arrays = {"x": x, "mean": mean, "var": var}
        chosen = gpu._replace(device=device)
        for op, more in (("train", {"y": y, "m2": m2}), ("backward", {"dy": dy, "y": dx})):
            pointers = {n: a.ctypes.data if options.rehearse else int(a.data.ptr) for n, a in (arrays | more).items()}
            _cuda.call(op, chosen, shape, "float32", eps=EPS, training=int(op == "backward"), **pointers)
        y = y if options.rehearse else library.asnumpy(y)
        assert np.abs(y.mean((0, 2))).max() < 1e-6
        assert np.abs(y.var((0, 2)) - 1).max() < 1e-3
    print("sanitized: three cases have run")


def sanitizer(tool: str) -> Run:
    def check() -> None:
        command = [sys.executable, __file__, "--out", str(options.out), "--only", "sanitized"]
        if options.rehearse:
            command.append("--rehearse")
        elif shutil.which("compute-sanitizer") is None:
            print(f"{tool}: compute-sanitizer is not installed, nothing was checked")
            return
        else:
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *command]
        subprocess.run(command, check=True)

    return check


# -- arrays of both libraries -----------------------------------------------------------------------------------------


def run_conformance() -> None:
    """anybn's own suite: training, evaluation, backward, masks, variants, states."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-W", "default", "-p", "no:cacheprovider"]
    command += ["--pyargs", "anybn.conformance", "--tb=short", "--maxfail=40"]
    if not entry_points(group="pytest11", name="anybn"):
        command += ["-p", "anybn_pytest"]
    if options.rehearse:
        command += ["--anybn-backend=numpy", "-m", "quick"]
    else:
        command += ["--anybn-backend=cupy,torch:cuda", "-n", str(max(1, (os.cpu_count() or 1) * 3 // 4))]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def batches() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((32, 16, 28, 28)).astype(np.float32) + i for i in range(4)]


def trained_by_numpy() -> Any:
    import anybn

    state = anybn.BatchNormState(16)
    for x in batches():
        anybn.batch_norm(x, state, training=True)
    return state


def close(value: Any, expected: np.ndarray, what: str) -> None:
    assert np.allclose(value, expected, rtol=1e-6, atol=1e-6), f"{what}: {value} for {expected}"


def check_journey() -> None:
    """A state that learns in NumPy, CuPy, torch on CUDA and NumPy again, a batch in each."""
    import torch

    import anybn

    state, alone = anybn.BatchNormState(16), trained_by_numpy()
    places = ("numpy", "torch", "torch", "numpy") if options.rehearse else ("numpy", "cupy", "torch:cuda", "numpy")
    for name, x in zip(places, batches(), strict=True):
        state.to(name)
        if name == "cupy":
            import cupy

            x = cupy.asarray(x)
        elif name != "numpy":
            x = torch.from_numpy(x).to(place())
        anybn.batch_norm(x, state, training=True)
    close(state.running_mean, alone.running_mean, "the journey")
    close(state.running_var, alone.running_var, "the journey")
    print("journey: NumPy, CuPy, torch on CUDA and NumPy leave the state that NumPy alone does")


def check_streams() -> None:
    """Work follows the stream it is queued on, in CuPy and torch, and nobody waits for the GPU."""
    import torch

    import anybn

    alone = trained_by_numpy()
    if options.rehearse:
        return
    import cupy

    state = anybn.BatchNormState(16)
    with cupy.cuda.Stream(non_blocking=True):
        for x in batches():
            busy = cupy.random.standard_normal((2048, 2048))
            for _ in range(20):  # the stream is behind, so that whoever does not wait for it reads what is not there
                busy = busy @ busy * 1e-3
            late = cupy.asarray(x) + 0 * busy[0, 0].astype(cupy.float32)
            anybn.batch_norm(late, state, training=True)
    state.to("numpy")  # from another stream, which waits for the last update
    close(state.running_mean, alone.running_mean, "CuPy's stream")

    anybn.batch_norm(torch.ones((2, 16), device="cuda"), anybn.BatchNormState(16).to("torch:cuda"), training=True)
    state = anybn.BatchNormState(16).to("torch:cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        for given in [torch.from_numpy(x).cuda() for x in batches()]:
            busy = torch.randn((2048, 2048), device="cuda")
            for _ in range(20):
                busy = busy @ busy * 1e-3
            late = given + 0 * busy[0, 0]
            torch.cuda.set_sync_debug_mode("error")  # torch raises where it would wait for the GPU
            try:
                anybn.batch_norm(late.requires_grad_(), state, training=True).backward(late)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    state.to("numpy")
    close(state.running_mean, alone.running_mean, "torch's stream")
    close(state.running_var, alone.running_var, "torch's stream")
    print("streams: CuPy's and torch's leave the state that NumPy leaves")


def check_capture() -> None:
    """A module's step in a CUDA graph goes on learning with each replay."""
    import torch

    import anybn.torch

    alone, given = trained_by_numpy(), batches()
    if options.rehearse:
        return
    module = anybn.torch.BatchNorm2d(16).cuda()
    x, dy = (torch.from_numpy(given[0]).cuda() for _ in range(2))
    x.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled before it is captured
        torch.autograd.grad(module(x), x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    module.reset_running_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
        (dx,) = torch.autograd.grad(y, x, dy)
    for batch in given:
        with torch.no_grad():
            x.copy_(torch.from_numpy(batch))
        graph.replay()
    torch.cuda.synchronize()
    expected, pullback = anybn.batch_norm_vjp(given[-1], anybn.BatchNormState(16), training=True)
    close(module.running_mean.cpu().numpy(), alone.running_mean, "a captured graph")
    close(module.running_var.cpu().numpy(), alone.running_var, "a captured graph")
    close(y.detach().cpu().numpy(), expected, "a captured graph")
    close(dx.cpu().numpy(), pullback(given[0]).x, "a captured graph")
    assert int(module.num_batches_tracked) == len(given)
    print("capture: a captured step leaves the state that NumPy leaves")


# -- times ------------------------------------------------------------------------------------------------------------


def time_calls() -> None:
    """Of a module's call on a tensor that computes in no time, in torch and in anybn, which are timed in turns."""
    import torch

    import anybn.torch

    count = 2 if options.rehearse else 300
    x = torch.randn((8, 16), device=place())
    modules = {"torch": torch.nn.BatchNorm1d(16).to(place()), "anybn": anybn.torch.BatchNorm1d(16).to(place())}
    for training, recorded in itertools.product((True, False), repeat=2):
        given = x.clone().requires_grad_(recorded)
        times: dict[str, list[float]] = {name: [] for name in modules}
        for _, (name, module) in itertools.product(range(7), modules.items()):
            module.train(training)
            synchronize()
            start = time.perf_counter()
            with torch.set_grad_enabled(recorded):
                for _ in range(count):
                    y = module(given)
                    if recorded:
                        y.backward(x)
            synchronize()
            times[name].append((time.perf_counter() - start) / count * 1e6)
        ours, theirs = (times[name][1:] for name in ("anybn", "torch"))
        middle, other = statistics.median(ours), statistics.median(theirs)
        what = ("training" if training else "evaluation") + (" and backward" if recorded else "")
        spread = round((max(ours) - min(ours)) / middle, 4)
        row = {"op": f"call: {what}", "shape": [8, 16], "dtype": "float32", "us": middle, "spread": spread}
        write({**where(), **row, "torch_us": other})
        print(f"calls: (8, 16), {what}: {middle:.1f} us, torch {other:.1f} us")


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    dtype: str
    layout: str
    shape: tuple[int, ...]  # as a user has it, channels second

    @property
    def memory_shape(self) -> tuple[int, int, int]:
        n, channels, *spatial = self.shape
        length = math.prod(spatial)
        return (n, channels, length) if self.layout == "nchw" else (n * length, channels, 1)

    @property
    def least_bytes(self) -> int:
        """Every array read and written once: x and y; dy, x and dx; of bn + add + relu and its backward, x, the
        residual and y, then dy, x, y, dx and the residual's gradient."""
        import torch

        arrays = {"train": 2, "evaluate": 2, "backward": 3, "step": 8}[self.op]
        return arrays * math.prod(self.shape) * getattr(torch, self.dtype).itemsize


def cases() -> Iterator[Case]:
    shapes = SHAPES
    if options.rehearse:
        shapes = ((4, 6, 8, 8), (33, 10))
    for shape, op, dtype, layout in itertools.product(shapes, options.op, options.dtype, options.layout):
        if len(shape) == 4 or layout == "nhwc":
            yield Case(op, dtype, layout if len(shape) == 4 else "nc", shape)


class Arrays(NamedTuple):
    xs: list[Any]
    dy: Any
    residual: Any
    y: Any
    weight: Any
    bias: Any


def arrays_of(case: Case) -> Arrays:
    """x as often as it takes for all of them not to fit the L2 cache."""
    import torch

    dtype, channels = getattr(torch, case.dtype), case.shape[1]
    cache = 1024 if options.rehearse else torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(2, min(32, 3 * cache // (math.prod(case.shape) * dtype.itemsize) + 1))

    def values(mean: float) -> Any:
        a = (torch.randn(case.shape, device=place()) + mean).to(dtype)
        return a.to(memory_format=torch.channels_last) if case.layout == "nhwc" else a

    xs = [values(1.0) for _ in range(copies)]
    weight, bias = torch.rand(channels, device=place()) + 0.5, torch.randn(channels, device=place())
    return Arrays(xs, values(0.0), values(0.0), torch.empty_like(xs[0]), weight, bias)


def along(a: Any, x: Any) -> Any:
    return a.double().view([1, -1, *[1] * (x.ndim - 2)])


def error_of(found: Any, expected: Any) -> float:
    import torch

    worst = ((found.double() - expected).abs() / expected.abs().clamp(min=1)).max()
    return float(worst) / torch.finfo(found.dtype).eps


def kernels_alone(case: Case) -> tuple[Callable[[Any], Any], Callable[[Any], Any], float, str, Arrays]:
    """Of training, evaluation or backward: ours and torch's, by x; our error, our launches, and what they work on."""
    import torch
    import torch.nn.functional as F

    a = arrays_of(case)
    x, shape, channels, launched = a.xs[0], case.memory_shape, case.shape[1], list[Launch]()
    mean, var, m2, running_mean, running_var = torch.ones((5, channels), dtype=torch.float64, device=place())
    narrow = running_mean.float(), running_var.float()
    running = {"running_mean": running_mean, "running_var": running_var}
    running |= {f"new_{name}": buffer for name, buffer in running.items()}
    known = {"mean": mean, "var": var, "eps": EPS}

    def forward(x: Any) -> None:
        fields = {"x": x, "y": a.y, "weight": a.weight, "bias": a.bias, **known}
        if case.op == "evaluate":
            call("evaluate", shape, launched, **fields)
        else:
            call("train", shape, launched, m2=m2, momentum=0.1, ddof=1, **fields, **running)

    axes = tuple(i for i in range(x.ndim) if i != 1)
    double = x.double()
    true_var, true_mean = (mean, var)[::-1] if case.op == "evaluate" else torch.var_mean(double, axes, correction=0)
    rstd = along((true_var + EPS).rsqrt(), x)
    xhat = (double - along(true_mean, x)) * rstd
    del double
    forward(x)
    if case.op != "backward":
        expected = xhat * along(a.weight, x) + along(a.bias, x)
        batch = case.op == "train"
        theirs = lambda x: F.batch_norm(x, *narrow, a.weight, a.bias, batch, 0.1, EPS)  # noqa: E731
        return forward, theirs, error_of(a.y, expected), names_of(launched), a

    dweight, dbias = torch.empty_like(a.weight), torch.empty_like(a.bias)
    fields = {"dy": a.dy, "y": a.y, "weight": a.weight, "dweight": dweight, "dbias": dbias, "training": 1, **known}
    launched.clear()

    def backward(x: Any) -> None:  # other copies of x have other statistics, on which the time does not depend
        call("backward", shape, launched, x=x, **fields)

    backward(x)
    g = a.dy.double()
    g = g - g.mean(axes, keepdim=True) - xhat * (g * xhat).mean(axes, keepdim=True)
    expected = g * rstd * along(a.weight, x)
    _, saved_mean, saved_rstd, reserve = torch.ops.aten._batch_norm_with_update(x, a.weight, a.bias, *narrow, 0.1, EPS)

    def their_backward(x: Any) -> Any:
        saved = saved_mean, saved_rstd, True, EPS, [True] * 3, reserve
        return torch.ops.aten.batch_norm_backward(a.dy, x, a.weight, *narrow, *saved)

    return backward, their_backward, error_of(a.y, expected), names_of(launched), a


def names_of(launched: Sequence[Launch]) -> str:
    return " + ".join(
        f"{one.kernel} {one.grid[0]}x{one.grid[1]} of {math.prod(one.block)}, {one.shared_bytes >> 10} KB"
        for one in launched
    )


def step_of_module(case: Case) -> tuple[Callable[[Any], Any], Callable[[Any], Any], float, str, Arrays]:
    """Forward and backward of bn + add + relu, by modules."""
    import torch
    import torch.nn.functional as F

    import anybn.torch

    a, channels = arrays_of(case), case.shape[1]
    module = torch.nn.BatchNorm2d if len(case.shape) == 4 else torch.nn.BatchNorm1d
    theirs = module(channels, device=place())
    ours = getattr(anybn.torch, module.__name__)(channels, device=place(), activation="relu")
    residual = a.residual.requires_grad_()

    def step(forward: Callable[[Any], Any], own: torch.nn.Module, x: Any) -> Any:
        x = x.detach().requires_grad_()
        y = forward(x)
        return y, torch.autograd.grad(y, (x, residual, own.weight, own.bias), a.dy)

    our_step = lambda x: step(lambda x: ours(x, residual), ours, x)  # noqa: E731
    their_step = lambda x: step(lambda x: F.relu(theirs(x) + residual), theirs, x)  # noqa: E731
    y, (_, dresidual, _, _) = our_step(a.xs[0])
    with torch.no_grad():
        axes = tuple(i for i in range(y.ndim) if i != 1)
        x = a.xs[0].double()
        var, mean = torch.var_mean(x, axes, correction=0)
        expected = ((x - along(mean, x)) * along((var + EPS).rsqrt(), x) + residual.double()).relu()
        error = error_of(y, expected)
        if not torch.equal(dresidual, torch.where(y > 0, a.dy, 0)):
            error = math.nan
    return our_step, their_step, error, "modules", a


def measured(case: Case) -> dict[str, Any]:
    """The fields of a row that depend on the case."""
    import torch

    if case.op == "step":
        ours, theirs, error, launched, a = step_of_module(case)
    else:
        with torch.no_grad():
            ours, theirs, error, launched, a = kernels_alone(case)
    with contextlib.nullcontext() if case.op == "step" else torch.no_grad():
        found, other = (timed([functools.partial(of, x) for x in a.xs]) for of in (ours, theirs))
        with torch.no_grad():
            copy = timed([lambda x=x: a.y.copy_(x) for x in a.xs])
    return {
        "kernel": launched,
        "bytes": case.least_bytes,
        "us": found.us,
        "spread": found.spread,
        "torch_us": other.us,
        "torch_spread": other.spread,
        "copy_us": copy.us,
        "error_eps": round(error, 4),
    }


def bench() -> None:
    import torch

    here, wrong = where(), []
    for case in cases():
        try:
            row = {**here, **dataclasses.asdict(case), **measured(case)}
        except Exception as error:
            wrong.append(f"{case}: {type(error).__name__}: {error}")
            if len(wrong) > 5:
                break
            continue
        if not row["error_eps"] <= BAR[case.dtype]:  # NaN is wrong as well
            wrong.append(f"{case}: {row['error_eps']} eps by {row['kernel']}")
            continue
        write(row)
        print(
            f"{case.op:9}{case.dtype:9}{case.layout:5}{case.shape!s:20}{row['us']:8.1f} us torch {row['torch_us']:8.1f}"
            f"  copy {row['copy_us']:8.1f}  error {row['error_eps']:.2f}  {row['kernel']}",
            flush=True,
        )
        if not options.rehearse:
            torch.cuda.empty_cache()
    assert not wrong, "; ".join(wrong)


def network_step(model: Any, x: Any, target: Any, half: bool) -> None:
    import torch

    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False):
        loss = torch.nn.functional.cross_entropy(model(x), target)
    loss.backward()


def time_network() -> None:
    """A training step of torchvision's ResNet-50 on 64 images, its batch norms torch's or anybn's: forward and
    backward, queued by Python and replayed from a graph."""
    import torch

    import anybn.torch

    if options.rehearse:
        return
    import torchvision

    for dtype, layout, kind in (
        ("bfloat16", "nhwc", torch.channels_last),
        ("bfloat16", "nchw", torch.contiguous_format),
        ("float32", "nchw", torch.contiguous_format),
    ):
        x = torch.randn((64, 3, 224, 224), device="cuda").to(memory_format=kind)
        target = torch.randint(1000, (64,), device="cuda")
        times: dict[str, list[Time]] = {}
        for name in ("torch", "anybn"):
            model = torchvision.models.resnet50().cuda().to(memory_format=kind)
            if name == "anybn":
                model = anybn.torch.convert(model)
            step = functools.partial(network_step, model, x, target, dtype == "bfloat16")
            eager = []
            for i in range(13):
                torch.cuda.synchronize()
                start = time.perf_counter()
                step()
                torch.cuda.synchronize()
                if i > 2:
                    eager.append((time.perf_counter() - start) * 1e6)
            middle = statistics.median(eager)
            times[name] = [Time(middle, (max(eager) - min(eager)) / middle), timed([step] * 2)]
            del model, step
            torch.cuda.empty_cache()
        for i, how in enumerate(("queued by Python", "replayed")):
            ours, theirs = times["anybn"][i], times["torch"][i]
            row = {"op": f"resnet50 step, {how}", "dtype": dtype, "layout": layout, "shape": list(x.shape)}
            times_of = {"us": ours.us, "spread": ours.spread, "torch_us": theirs.us, "torch_spread": theirs.spread}
            write({**where(), **row, **times_of})
            print(f"network: {dtype} {layout}, {how}: {ours.us / 1e3:.2f} ms, torch {theirs.us / 1e3:.2f} ms")


def run_profiled() -> None:
    """Four kernels that matter, twice each; ncu looks at the second."""
    for op, layout in itertools.product(("train", "backward"), ("nchw", "nhwc")):
        shape = (4, 6, 8, 8) if options.rehearse else (64, 256, 56, 56)
        ours, _, _, _, a = kernels_alone(Case(op, "bfloat16", layout, shape))
        ours(a.xs[0])


#: Of memory's and of the instructions' peak rate, of resident warps, and why warps waited, per instruction.
METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes.sum",
    "sm__inst_executed.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    *(
        f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"
        for reason in ("long_scoreboard", "short_scoreboard", "barrier", "membar", "lg_throttle", "math_pipe_throttle")
    ),
)


def profile() -> None:
    command = [sys.executable, __file__, "--out", str(options.out), "--only", "profiled"]
    if options.rehearse:
        command.append("--rehearse")
    elif shutil.which("ncu") is None:
        print("profile: ncu is not installed, nothing was looked at")
        return
    else:
        ours = "regex:^(train|backward|sums|gradient|evaluate|finish)"
        command = ["ncu", "--clock-control", "none", "--kernel-name-base", "function", "--kernel-name", ours, *command]
        command[1:1] = ["--csv", "--metrics", ",".join(METRICS)]
    subprocess.run(command, check=True)


# -- parts ------------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    run: Run
    seconds: float
    together: bool = False
    """with the others of which this is true"""


PARTS: dict[str, Part] = {
    "copy": Part(measure_copy, 40),
    "compile": Part(compile_all, 75),
    "launches": Part(check_launches, 60, together=True),
    "kernels": Part(check_kernels, 100, together=True),
    "journey": Part(check_journey, 60, together=True),
    "streams": Part(check_streams, 60, together=True),
    "capture": Part(check_capture, 60, together=True),
    "conformance": Part(run_conformance, 110, together=True),
    "memcheck": Part(sanitizer("memcheck"), 90, together=True),
    "racecheck": Part(sanitizer("racecheck"), 90, together=True),
    "calls": Part(time_calls, 30),
    "bench": Part(bench, 150),
    "network": Part(time_network, 60),
    "profile": Part(profile, 40),
}
#: What parts start in processes of their own.
INNER: dict[str, Run] = {"sanitized": check_sanitized, "profiled": run_profiled}


def run_parts(names: Sequence[str], deadline: float) -> list[str]:
    """Side by side, each until its limit or the deadline. The names of those that failed."""
    running = {}
    for name in names:
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        again = [*sys.argv[1:], "--only", name]
        command = [sys.executable, "-u", __file__, *again]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        running[name] = process, log, time.monotonic()
    failed = []
    while running:
        time.sleep(0.05)
        for name, (process, log, start) in tuple(running.items()):
            seconds = time.monotonic() - start
            late = seconds > PARTS[name].seconds or time.monotonic() > deadline
            if process.poll() is None and not late:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            log.seek(0)
            said = log.read()
            with (options.out / "log.txt").open("a") as file:
                file.write(f"==== {name}, {seconds:.1f} s, {process.returncode}\n{said}\n")
            good = process.returncode == 0
            if not good:
                failed.append(name)
            print(f"[{name}: {'ok' if good else 'out of time' if late else 'FAILED'}, {seconds:.1f} s]", flush=True)
            if name != "bench" or not good:
                lines = said.splitlines()
                print("\n".join(line[:300] for line in lines[-(4 if good else 12) :]), flush=True)
            del running[name]
    return failed


def summary() -> str:
    """A line per operation, dtype and layout, from the rows."""
    path = options.out / "gpu.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "copy_us" in row:
            groups.setdefault((row["op"], row["dtype"], row["layout"]), []).append(row)
    lines = [f"{'op':9} {'dtype':9} {'':5} rows  torch/ours: mean worst   TB/s: mean  best   spread"]
    for (op, dtype, layout), found in groups.items():
        ratios = [row["torch_us"] / row["us"] for row in found]
        rates = [row["bytes"] / row["us"] / 1e6 for row in found]
        spread = max(row["spread"] for row in found)
        lines.append(
            f"{op:9} {dtype:9} {layout:5} {len(found):4}  {statistics.geometric_mean(ratios):16.2f} {min(ratios):5.2f}"
            f"  {statistics.geometric_mean(rates):11.2f} {max(rates):5.2f}  {spread:6.1%}"
        )
    return "\n".join(lines)


def main() -> int:
    global options
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for gpu.jsonl and log.txt")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--dtype", nargs="+", choices=list(TYPES), default=["bfloat16", "float32", "float16"])
    parser.add_argument("--layout", nargs="+", choices=["nchw", "nhwc"], default=["nchw", "nhwc"])
    parser.add_argument("--seconds", type=float, default=300, help="after which no part goes on")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on tiny arrays")
    parser.add_argument("--only", choices=[*PARTS, *INNER], help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only:
        (INNER[options.only] if options.only in INNER else PARTS[options.only].run)()
        return 0
    if not options.rehearse and (problem := unavailable()):
        print(f"benchmarks/gpu.py: {problem}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.seconds
    failed = []
    for _, names in itertools.groupby(options.part, lambda name: PARTS[name].together or name):
        failed += run_parts(list(names), deadline)
    print(summary())
    print(f"failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
