"""All that needs a CUDA GPU, in one command: tests, streams and graphs, memory checks, the benchmark.

    python benchmarks/gpu.py                        # everything, in under nine minutes
    python benchmarks/gpu.py --part kernels streams # some of the parts, which --help names
    python benchmarks/gpu.py --part bench --dtype bfloat16 --layout nchw --op train --batch 64

It needs a GPU, torch for CUDA, CuPy, NumPy, array-api-compat, and pytest for ``tests``; where anybn is not installed,
PYTHONPATH=. does. Without a GPU, CuPy and torch for CUDA it says so and exits with 2; with 1 if something failed. The
benchmark appends to benchmarks/results/gpu.jsonl row by row:

    {"device", "driver", "versions", "op", "dtype", "layout", "shape", "kernel", "us", "baseline", "baseline_us",
     "copy_us", "error_eps"}

Times are medians over replays of a CUDA graph that works through buffers larger than the L2 cache; ``copy_us`` is a
device copy of x. Every result is checked against float64, and one that is wrong is no row. The shapes are ResNet-50's,
and some (N, C). ``compile`` is the benchmark against torch.compile, for a few of them; ``groups`` is that of groups of
blocks against what the same arrays took without them, two passes or half of every channel kept. ``calls`` is what a
call on a small tensor costs, Python included. ``sanitizer`` runs the part ``kernels`` under compute-sanitizer, if that
is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np

from anybn.conformance import inputs, oracle
from anybn.kernels.cuda import launch as _cuda
from anybn.kernels.cuda.plan import TYPES, Device, Launch, plan

RESULT = Path(__file__).parent / "results" / "gpu.jsonl"
PARTS = ("kernels", "streams", "tests", "sanitizer", "calls", "groups", "bench", "compile")
#: The seconds that parts before and after the benchmark may take.
GROUPS_SECONDS, COMPILE_SECONDS = 60, 60
#: Seconds for other programs, all of whose kernels may have to be compiled first.
TESTS_SECONDS, SANITIZER_SECONDS = 150, 60
OPS = ("train", "backward", "eval", "train_add_relu", "backward_add_relu")
MATRICES = ((256, 1024), (8192, 256), (8192, 4096), (65536, 1024), (1_000_000, 64))
EPS = 1e-5
#: Of y and dx, in eps of the dtype.
BAR = {"float16": 0.51, "bfloat16": 0.51, "float32": 2.0, "float64": 2.0}

#: As it is planned for a GPU of this size, which any GPU can do: groups of blocks and two passes for small arrays.
SMALL = Device(multiprocessors=4, shared_bytes=24 * 1024, capability=(8, 0))

Run = Callable[[], Any]


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


def on_torch_stream(launched: list[Launch] | None = None) -> _cuda.Gpu:
    """torch's current device and stream, with torch's memory."""
    import torch

    def scratch(nbytes: int) -> tuple[int, Any]:
        memory = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        return memory.data_ptr(), memory

    found = _cuda.gpu(torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream, scratch)
    if launched is None:
        return found

    def launch(one: Launch, record: np.ndarray) -> None:
        launched.append(one)
        found.launch(one, record)

    return found._replace(launch=launch)


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
    gpu = on_torch_stream(launched)
    _cuda.call(op, gpu if device is None else gpu._replace(device=device), shape, dtype, **plain)


# -- every kernel, on small arrays -------------------------------------------------------------------------------------


def check_kernels(quick: bool) -> None:
    """Training and backward at odd shapes, in every dtype, aligned or not, as planned for this GPU and for a small one,
    against long double; twice the same bits. Every family of kernels must have run."""
    import torch

    shapes = [(4, 3, 49), (3, 5, 64), (2, 2, 1156), (5, 1, 31), (64, 68, 1), (301, 3, 1), (2, 1023, 1)]
    shapes += [(2, 37, 16), (64, 12, 49), (5, 2, 8192), (5, 2, 4099), (1501, 68, 1)]
    if not quick:
        shapes += [(8, 2, 65536), (64, 1, 12544), (70001, 5, 1), (3, 70001, 2), (513, 257, 49)]
        shapes += [(1, 1, 2_000_003), (40_000, 96, 1)]  # groups of blocks on an H200
    launched: list[Launch] = []
    for dtype, shape, offset, device in itertools.product(TYPES, shapes, (0, 1), (None, SMALL)):
        if device is not None and np.prod(shape) > 200_000:
            continue
        rng = np.random.default_rng(0)
        x, dy = (rng.standard_normal(shape) + mean for mean in (1e3, 0))
        tensors = [torch.empty(a.size + offset, dtype=getattr(torch, dtype), device="cuda")[offset:] for a in (x, dy)]
        for tensor, a in zip(tensors, (x, dy), strict=True):
            tensor.copy_(torch.from_numpy(a.reshape(-1)))
        x, dy = (tensor.cpu().double().numpy().reshape(shape) for tensor in tensors)
        first, second = (_outputs(shape, *tensors, launched, device) for _ in range(2))
        for name, a in first.items():
            assert torch.equal(a.view(torch.uint8), second[name].view(torch.uint8)), f"{name} differs from run to run"
        found = oracle.statistics(x)
        mean = first["mean"].cpu().numpy()
        gradients = oracle.gradients(dy, x, found.mean, found.var(), count=found.count)
        size = 1 if dtype != "float64" else np.maximum(1, gradients.x_size * np.abs(dy).max())
        errors = {
            "y": oracle.error(_numpy(first["y"], shape), oracle.normalize(x, found.mean, found.var()), dtype),
            "dx": oracle.error(_numpy(first["dx"], shape), gradients.x, dtype, size),
        }
        assert np.abs(mean - x.mean((0, 2))).max() < 1e-6
        assert all(error <= BAR[dtype] for error in errors.values()), f"{dtype} {shape} on {device}: {errors}"
    families = {launch.kernel.partition("<")[0] for launch in launched}
    missing = {"train", "backward", "train_group", "backward_group", "sums", "gradient_sums"} - families
    assert not missing, f"{', '.join(missing)}: not run"
    print(f"kernels: {len(shapes)} shapes in {len(TYPES)} dtypes are right, twice to the same bits")


def _numpy(a: Any, shape: tuple[int, ...]) -> np.ndarray:
    return a.cpu().double().numpy().reshape(shape)


def _outputs(
    shape: tuple[int, int, int], x: Any, dy: Any, launched: list[Launch], device: Device | None
) -> dict[str, Any]:
    import torch

    y, dx = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    mean, shift, var, m2 = torch.full((4, shape[1]), torch.nan, dtype=torch.float64, device="cuda")
    kept = {"mean": mean, "var": var} | ({"shift": shift} if x.dtype == torch.float64 else {})
    call("train", shape, launched, device, x=x, y=y, m2=m2, eps=EPS, **kept)
    call("backward", shape, launched, device, x=x, dy=dy, y=dx, eps=EPS, training=1, **kept)
    return {"y": y, "dx": dx, "mean": mean, "var": var, "m2": m2}


# -- streams and graphs ------------------------------------------------------------------------------------------------


def check_streams() -> None:
    """Work follows the stream it is queued on, in CuPy and torch, and a captured step goes on learning."""
    import cupy
    import torch

    import anybn.torch

    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((32, 16, 28, 28)).astype(np.float32) + i for i in range(4)]
    alone = anybn.BatchNormState(16)
    for x in batches:
        anybn.batch_norm(x, alone, training=True)

    state = anybn.BatchNormState(16)
    with cupy.cuda.Stream(non_blocking=True):
        for x in batches:
            busy = cupy.random.standard_normal((2048, 2048))
            for _ in range(20):  # the stream is behind, so that whoever does not wait for it reads what is not there
                busy = busy @ busy * 1e-3
            late = cupy.asarray(x) + 0 * busy[0, 0].astype(cupy.float32)
            anybn.batch_norm(late, state, training=True)
    state.to("numpy")  # from another stream, which waits for the last update
    close(state.running_mean, alone.running_mean, "CuPy's stream")

    state = anybn.BatchNormState(16).to("torch:cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        for given in [torch.from_numpy(x).cuda() for x in batches]:
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

    module = anybn.torch.BatchNorm2d(16).cuda()
    x, dy = (torch.from_numpy(batches[0]).cuda() for _ in range(2))
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
    for batch in batches:
        with torch.no_grad():
            x.copy_(torch.from_numpy(batch))
        graph.replay()
    torch.cuda.synchronize()
    expected, pullback = anybn.batch_norm_vjp(batches[-1], anybn.BatchNormState(16), training=True)
    close(module.running_mean.cpu().numpy(), alone.running_mean, "a captured graph")
    close(module.running_var.cpu().numpy(), alone.running_var, "a captured graph")
    close(y.detach().cpu().numpy(), expected, "a captured graph")
    close(dx.cpu().numpy(), pullback(batches[0]).x, "a captured graph")
    assert int(module.num_batches_tracked) == len(batches)
    print("streams: CuPy's and torch's streams and a captured torch graph leave the state that NumPy leaves")


def close(value: np.ndarray, expected: np.ndarray, what: str) -> None:
    assert np.allclose(value, expected, rtol=1e-6, atol=1e-6), f"{what}: {value} for {expected}"


# -- other programs ----------------------------------------------------------------------------------------------------


def run_tests() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-W", "default", "-p", "no:cacheprovider"]
    if not entry_points(group="pytest11", name="anybn"):
        command += ["-p", "anybn.conformance.plugin"]
    command += ["--pyargs", "anybn.conformance", "--anybn-backend=cupy,torch:cuda"]
    subprocess.run(command, check=True, timeout=TESTS_SECONDS)


def run_sanitizer() -> None:
    if shutil.which("compute-sanitizer") is None:
        print("sanitizer: compute-sanitizer is not installed, nothing was checked")
        return
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, __file__]
        subprocess.run([*command, "--part", "kernels", "--quick"], check=True, timeout=SANITIZER_SECONDS)
        print(f"sanitizer: {tool} has found nothing")


# -- calls -------------------------------------------------------------------------------------------------------------


def time_calls(count: int = 300) -> None:
    """A call on a tensor that computes in no time, in torch's module and in anybn's, which are timed in turns."""
    import torch

    import anybn.torch

    x = torch.randn((8, 16), device="cuda")
    modules = {"torch": torch.nn.BatchNorm1d(16).cuda(), "anybn": anybn.torch.BatchNorm1d(16).cuda()}
    for training, recorded in itertools.product((True, False), repeat=2):
        given = x.clone().requires_grad_(recorded)
        times: dict[str, list[float]] = {name: [] for name in modules}
        for _, (name, module) in itertools.product(range(7), modules.items()):
            module.train(training)
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.set_grad_enabled(recorded):
                for _ in range(count):
                    y = module(given)
                    if recorded:
                        y.backward(x)
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / count * 1e6)
        ours, theirs = (statistics.median(times[name][1:]) for name in ("anybn", "torch"))
        what = ("training" if training else "evaluation") + (" and backward" if recorded else "")
        print(f"calls: (8, 16), {what}: {ours:.1f} us, torch {theirs:.1f} us")


# -- the benchmark -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    dtype: str
    layout: str
    shape: tuple[int, ...]  # as a user has it, channels second

    @property
    def memory_shape(self) -> tuple[int, int, int]:
        n, channels, *spatial = self.shape
        length = int(np.prod(spatial))
        return (n, channels, length) if self.layout == "nchw" else (n * length, channels, 1)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """In an order in which the first minutes already say something about everything."""
    for batch, op, dtype, layout in itertools.product(options.batch, options.op, options.dtype, options.layout):
        if layout == "nc":
            shapes: Sequence[tuple[int, ...]] = MATRICES if batch == options.batch[0] else ()
        else:
            shapes = [(batch, c, size, size) for c, size in dict.fromkeys(inputs.RESNET50)]
        for shape in shapes:
            yield Case(op, dtype, layout, shape)


def graph_us(runs: Sequence[Run], replays: int = 5) -> float:
    """Median time of one of the runs, replayed from a graph one after the other."""
    import torch

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
    return statistics.median(times)


def measure(case: Case, against: str = "torch eager") -> dict[str, Any]:
    """The fields of a row that depend on the case, and on what it is timed against."""
    import torch
    import torch.nn.functional as F

    dtype, channels = getattr(torch, case.dtype), case.shape[1]
    nbytes = int(np.prod(case.shape)) * dtype.itemsize
    copies = max(2, min(16, int(3 * torch.cuda.get_device_properties(0).L2_cache_size / nbytes) + 1))

    def values(mean: float) -> Any:
        a = (torch.randn(case.shape, device="cuda") + mean).to(dtype)
        return a.to(memory_format=torch.channels_last) if case.layout == "nhwc" else a

    xs = [values(1.0) for _ in range(copies)]
    dy, residual, y = values(0.0), values(0.0), torch.empty_like(xs[0])
    weight, bias = torch.rand(channels, device="cuda") + 0.5, torch.randn(channels, device="cuda")
    mean, var, m2, running_mean, running_var = torch.ones((5, channels), dtype=torch.float64, device="cuda")
    narrow = running_mean.float(), running_var.float()
    fused, backward, launched = "add_relu" in case.op, "backward" in case.op, list[Launch]()
    shape = case.memory_shape

    def forward(x: Any, device: Device | None = None) -> None:
        running = {"running_mean": running_mean, "running_var": running_var}
        running |= {f"new_{name}": a for name, a in running.items()}
        fields = {"x": x, "y": y, "mean": mean, "var": var, "weight": weight, "bias": bias, "eps": EPS}
        if case.op == "eval":
            call("evaluate", shape, launched, device, **fields)
            return
        fields |= {"residual": residual, "relu": 1} if fused else {}
        call("train", shape, launched, device, m2=m2, momentum=0.1, ddof=1, **fields, **running)

    def torch_forward(x: Any) -> Any:
        out = F.batch_norm(x, *narrow, weight, bias, case.op != "eval", 0.1, EPS)
        return F.relu(out + residual) if fused else out

    with torch.no_grad():
        double = xs[0].double()
        axes = tuple(i for i in range(double.ndim) if i != 1)
        forward(xs[0])
        true_var, true_mean = torch.var_mean(double, axes, correction=0)
        if case.op == "eval":
            true_mean, true_var = mean, var
        across = [1, -1, *[1] * (double.ndim - 2)]
        rstd = (true_var + EPS).rsqrt().view(across)
        xhat = (double - true_mean.view(across)) * rstd
        expected = xhat * weight.double().view(across) + bias.double().view(across)
        if fused:
            expected = (expected + residual.double()).relu()
        found = y
        if backward:
            active = expected > 0 if fused else None
            dx, dresidual = torch.empty_like(y), torch.empty_like(y) if fused else None
            dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
            # Each copy of x would have statistics of its own; the time does not depend on them.
            fields = {"dy": dy, "y": dx, "active": active, "dresidual": dresidual, "weight": weight, "dweight": dweight}
            fields |= {"dbias": dbias, "mean": mean, "var": var, "eps": EPS, "training": 1}
            launched.clear()
            forward = lambda x, device=None: call("backward", shape, launched, device, x=x, **fields)  # noqa: E731
            forward(xs[0])
            g = dy.double() if active is None else dy.double() * active
            k1, k2 = g.mean(axes, keepdim=True), (g * xhat).mean(axes, keepdim=True)
            expected, found = (g - k1 - xhat * k2) * rstd * weight.double().view(across), dx
            saved = [torch.ops.aten._batch_norm_with_update(x, weight, bias, *narrow, 0.1, EPS) for x in xs[:2]]

            def torch_forward(x: Any, i: int = 0) -> Any:
                gradient = torch.ops.aten.threshold_backward(dy, saved[i][0], 0) if fused else dy
                state = saved[i][1], saved[i][2], True, EPS, [True] * 3, saved[i][3]
                return torch.ops.aten.batch_norm_backward(gradient, x, weight, *narrow, *state)

        size = expected.abs().clamp(min=1)
        error = float(((found.double() - expected).abs() / size).max()) / torch.finfo(dtype).eps
        del double, expected, xhat, size
        kernel = "+".join(launch.kernel for launch in launched)
        clusters = "".join(f" x{launch.cluster}" for launch in launched if launch.cluster > 1)
        baseline = torch_forward
        if against == "torch.compile":
            baseline = torch.compile(torch_forward)
            baseline(xs[0])
        of_torch = against != "anybn without groups"
        if not of_torch:
            alone = _cuda.device(torch.cuda.current_device())._replace(cooperative=False)
            baseline = lambda x: forward(x, alone)  # noqa: E731
        return {
            "kernel": kernel + clusters,
            "us": graph_us([lambda x=x: forward(x) for x in xs]),
            "baseline": against,
            "baseline_us": graph_us([lambda x=x: baseline(x) for x in (xs[:2] if backward and of_torch else xs)]),
            "copy_us": graph_us([lambda x=x: y.copy_(x) for x in xs]),
            "error_eps": round(error, 4),
        }


def where() -> dict[str, Any]:
    import cupy
    import torch

    import anybn

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver[0] if driver else "unknown",
        "versions": {
            "anybn": anybn.__version__,
            "cupy": cupy.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
    }


def bench(options: argparse.Namespace, deadline: float, against: str = "torch eager") -> None:
    import torch

    place, ratios, wrong = where(), [], []
    chosen = list(cases(options))
    if against == "torch.compile":  # seconds of compilation each: a few of them
        chosen = [
            c for c in chosen if c.op in ("train", "train_add_relu") and c.shape[1:] in ((256, 56, 56), (512, 28, 28))
        ]
    if against == "anybn without groups":
        device = _cuda.device(torch.cuda.current_device())
        ops = [c for c in chosen if c.op in ("train", "backward") and c.dtype != "float16"]
        chosen = [
            c for c in ops if any(one.cooperative for one in plan(c.op, c.memory_shape, c.dtype, device).launches)
        ]
    for done, case in enumerate(chosen):
        if time.monotonic() > deadline:
            print(f"bench: out of time, {len(chosen) - done} of {len(chosen)} cases are left")
            break
        row = {**place, **dataclasses.asdict(case), **measure(case, against)}
        if not row["error_eps"] <= BAR[case.dtype]:  # NaN is wrong as well
            wrong.append(f"{case}: {row['error_eps']} eps by {row['kernel']}")
            continue
        with RESULT.open("a") as file:
            file.write(json.dumps(row) + "\n")
        ratios.append(row["baseline_us"] / row["us"])
        print(
            f"{case.op:18}{case.dtype:9}{case.layout:5}{case.shape!s:22}{row['us']:9.1f} us  "
            f"{row['baseline']} / ours {ratios[-1]:5.2f}  ours / copy {row['us'] / row['copy_us']:5.2f}  "
            f"error {row['error_eps']:.2f}  {row['kernel']}",
            flush=True,
        )
        torch.cuda.empty_cache()
    if ratios:
        mean = statistics.geometric_mean(ratios)
        print(f"bench: {len(ratios)} cases, time of {against} / ours {mean:.2f}, worst {min(ratios):.2f}")
    if wrong:
        raise AssertionError("; ".join(wrong))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--dtype", nargs="+", choices=list(TYPES), default=["bfloat16", "float32", "float16"])
    parser.add_argument("--layout", nargs="+", choices=["nchw", "nhwc", "nc"], default=["nchw", "nhwc", "nc"])
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 256, 32])
    parser.add_argument("--minutes", type=float, default=8.5, help="no case is begun after these")
    parser.add_argument("--quick", action="store_true", help="small shapes only, in the part kernels")
    options = parser.parse_args()
    if problem := unavailable():
        print(f"benchmarks/gpu.py: {problem}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    jobs: dict[str, Run] = {
        "kernels": lambda: check_kernels(options.quick),
        "streams": check_streams,
        "tests": run_tests,
        "sanitizer": run_sanitizer,
        "calls": time_calls,
        "groups": lambda: bench(options, time.monotonic() + GROUPS_SECONDS, "anybn without groups"),
        "bench": lambda: bench(options, deadline - (COMPILE_SECONDS if "compile" in options.part else 0)),
        "compile": lambda: bench(options, deadline, "torch.compile"),
    }
    failed = []
    for part in options.part:
        try:
            jobs[part]()
        except Exception as error:  # the others are still of interest
            print(f"{part}: FAILED, {type(error).__name__}: {error}", file=sys.stderr)
            failed.append(part)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
