"""The backend over batchnorm.cu: the conformance suite on NumPy arrays, with the simulator for a GPU.

So the host side runs as it does for CuPy. What is left to a GPU is CuPy itself: pointers, streams, launches.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda_cpu import simulator
from cuda_cpu.simulator import is_masked

import anybn
from anybn.backends._on_gpu import CudaBackend
from anybn.backends.base import Backend
from anybn.backends.numpy import NumPyBackend
from anybn.conformance import (
    inputs,
    oracle,
    test_accuracy,
    test_errors,
    test_gradients,
    test_state,
    test_statistics,
    test_variants,
)
from anybn.conformance.targets import Target
from anybn.core import formulas
from anybn.core.call import Call
from anybn.kernels.cuda import launch as _cuda
from anybn.kernels.cuda.arrays import CudaArrays
from anybn.kernels.cuda.launch import Gpu
from anybn.kernels.cuda.plan import Launch, plan

simulator.needs_compiler()


class Arrays(CudaArrays):
    """NumPy's arrays, as CuPy's would be treated."""

    library = np

    def __init__(self) -> None:
        self.launched: list[Launch] = []
        self.current = 0

    @contextmanager
    def on(self, x: np.ndarray) -> Iterator[None]:
        self.current += 1
        yield
        self.current -= 1

    def gpu(self, x: np.ndarray) -> Gpu:
        assert self.current, "x's device is not the current one"
        return simulator.gpu(simulator.H200, schedule=2, launched=self.launched)

    def pointer(self, a: np.ndarray) -> int:
        return a.__array_interface__["data"][0]


class WithoutKernels(NumPyBackend):
    """NumPy by the core alone, which is what CuPy has beside the kernels of batchnorm.cu."""

    def _kernels_for(self, call: Call) -> None:
        return None


class Simulated(CudaBackend, WithoutKernels):
    name = "simulated"

    def __init__(self) -> None:
        self.kernels = Arrays()


@pytest.fixture
def target() -> Iterator[Target]:
    backend = Simulated()
    anybn.register_backend(backend)
    try:
        with anybn.use_backend("simulated"):
            yield Target("simulated", backend, backend.device(""))
    finally:
        anybn.unregister_backend("simulated")


for module in (test_accuracy, test_errors, test_gradients, test_state, test_statistics, test_variants):
    prefix = module.__name__.rpartition(".")[2]
    tests = {name: test for name, test in vars(module).items() if name.startswith("test_")}
    tests.pop("test_ten_million_values_in_one_channel", None)  # test_cuda_kernels.py has one million, in less time
    globals().update({f"{prefix}_{name.removeprefix('test_')}": test for name, test in tests.items()})


@pytest.mark.parametrize("relu", [False, True])
def test_kernels_do_the_work(target: Target, relu: bool) -> None:
    """And not the core, which would be right as well."""
    x = np.random.default_rng(0).standard_normal((8, 3, 14, 14)).astype(np.float32)
    state = anybn.BatchNormState(3)
    y, pullback = anybn.batch_norm_vjp(x, state, training=True, residual=x, activation="relu" if relu else None)
    pullback(y)
    anybn.batch_norm(x.transpose(0, 2, 3, 1), state, axis=-1)
    anybn.moments(x[:, :, 0, 0])
    names = [launch.kernel.partition("<")[0] for launch in target.backend.kernels.launched]
    assert names == ["train", "backward", "evaluate", "sums", "finish_train"]


@pytest.mark.parametrize("last", [False, True])
def test_kernels_take_masks(target: Target, monkeypatch: pytest.MonkeyPatch, last: bool) -> None:
    """In training, backward and evaluation, of any memory; the core has no part in it."""
    for name in ("batch_statistics", "normalize", "gradients", "updated_running_statistics"):
        monkeypatch.setattr(formulas, name, None)
    rng = np.random.default_rng(0)
    x, residual, dy = (rng.standard_normal((8, 3, 14, 10)).astype(np.float32) for _ in range(3))
    mask = rng.random((8, 14, 10)) < 0.7
    hidden = np.broadcast_to(~mask[:, None], x.shape)
    for a in (x, residual, dy):
        a[hidden] = np.nan
    if last:
        x, residual, dy = (np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) for a in (x, residual, dy))
    state, options = anybn.BatchNormState(3), {"mask": np.asfortranarray(mask), "residual": residual}
    y, pullback = anybn.batch_norm_vjp(x, state, training=True, activation="relu", **options)
    grads = pullback(dy)
    anybn.batch_norm(x, state, mask=mask[:1, :1], out=np.empty_like(x))
    assert anybn.moments(x, mask=mask).count == mask.sum()
    launched = [launch.kernel for launch in target.backend.kernels.launched]
    training, backward = ["sums", "finish_train", "evaluate"], ["gradient_sums", "finish_backward", "gradients"]
    assert [name.partition("<")[0] for name in launched] == [*training, *backward, "evaluate", *training[:2]]
    assert all(is_masked(name) for name in launched)

    shown = [np.where(hidden, np.float32(0), a) for a in (x, residual, dy)]
    found = oracle.statistics(shown[0], mask=mask)
    expected = oracle.normalize(shown[0], found.mean, found.var(), residual=shown[1], relu=True, mask=mask)
    assert oracle.error(y, expected, "float32") <= 0.6
    gradients = oracle.gradients(
        shown[2], shown[0], found.mean, found.var(), count=found.count, active=y > 0, mask=mask
    )
    assert oracle.error(grads.x, gradients.x, "float32") <= 0.6
    assert np.array_equal(grads.residual, gradients.residual)
    assert oracle.error(grads.weight, gradients.weight, "float32") <= 2
    assert oracle.error(grads.bias, gradients.bias, "float32") <= 2
    var = oracle.running(np.ones(3), found.var(1), 0.1)
    assert oracle.error(state.running_var / var, np.ones(3), "float32") <= 2


def test_the_running_statistics_of_whoever_was_faster(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread trains the state during a call, whose own update is then of statistics that are past."""
    first, second = (np.random.default_rng(seed).standard_normal((8, 3)).astype(np.float32) for seed in range(2))
    state, alone = anybn.BatchNormState(3), anybn.BatchNormState(3)
    launch = Arrays.train

    def overtaken(*arguments: Any) -> Any:
        result = launch(*arguments)
        monkeypatch.setattr(Arrays, "train", launch)
        anybn.batch_norm(first, state, training=True)
        return result

    monkeypatch.setattr(Arrays, "train", overtaken)
    anybn.batch_norm(second, state, training=True)
    kernels = [launch.kernel.partition("<")[0] for launch in target.backend.kernels.launched]
    assert kernels == ["train", "train", "commit"]
    for x in (first, second):
        anybn.batch_norm(x, alone, training=True)
    assert inputs.state_values(state) == inputs.state_values(alone)


def test_the_core_runs_on_the_device_of_x(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """For arrays that the kernels do not take."""
    monkeypatch.setattr(Arrays, "supports", lambda self, x: False)
    seen = []
    for name in ("statistics", "evaluate", "gradients", "update"):
        core = getattr(Backend, name)

        def noted(self: Backend, *arguments: Any, name: str = name, core: Any = core, **options: Any) -> Any:
            if self is target.backend:
                seen.append((name, self.kernels.current > 0))
            return core(self, *arguments, **options)

        monkeypatch.setattr(Backend, name, noted)
        monkeypatch.setattr(NumPyBackend, name, noted)
    x, mask = np.random.default_rng(0).standard_normal((8, 3, 4)), np.arange(4) < 3
    state = anybn.BatchNormState(3)
    y, pullback = anybn.batch_norm_vjp(x, state, training=True, mask=mask)
    pullback(y)
    assert {name for name, _ in seen} == {"statistics", "evaluate", "gradients", "update"}
    assert all(current for _, current in seen), seen


def test_a_subclass_that_overrides_train_is_asked(target: Target) -> None:
    class Counting(Simulated):
        calls = 0

        def train(self, *arguments: Any) -> Any:
            self.calls += 1
            return super().train(*arguments)

    anybn.register_backend(backend := Counting())
    with anybn.use_backend("simulated"):
        anybn.batch_norm(np.ones((4, 3)), anybn.BatchNormState(3), training=True)
    assert backend.calls == 1


def test_a_state_that_leaves_cupy_waits_for_updates_on_other_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """With streams and events that only take notes."""
    cupy = pytest.importorskip("cupy", reason="cupy: not installed, pip install cupy-cuda13x")
    from anybn.backends.cupy import CuPyBackend

    notes: list[tuple[Any, ...]] = []

    class Event:
        def __init__(self, **options: bool) -> None:
            pass

        def record(self, stream: Any) -> None:
            self.stream = stream.ptr

    class Stream:
        def __init__(self, ptr: int, capturing: bool) -> None:
            self.ptr, self.capturing = ptr, capturing

        def is_capturing(self) -> bool:
            return self.capturing

        def wait_event(self, event: Event) -> None:
            notes.append((self.ptr, "waits for", event.stream))

    class OnDevice(nullcontext[None]):
        id = 0

    class Array:
        device = OnDevice()

    def at(stream: int, capturing: bool = False) -> None:
        monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: Stream(stream, capturing))

    monkeypatch.setattr(cupy.cuda, "Event", Event)
    monkeypatch.setattr(cupy, "asnumpy", lambda x: np.zeros(3))
    backend = CuPyBackend()
    monkeypatch.setattr(backend.kernels, "updates", {})
    for stream, capturing in ((7, False), (8, False), (7, False), (9, True)):
        at(stream, capturing)
        backend.kernels.note_update(Array())
    at(8)
    backend.to_numpy(Array())
    assert notes == [(8, "waits for", 7)]


@pytest.mark.parametrize("compiles", [True, False])
def test_without_a_compiler_cupy_is_of_no_use_and_says_why(monkeypatch: pytest.MonkeyPatch, compiles: bool) -> None:
    """As ``pip install cupy-cuda13x`` alone leaves it, on a machine with a GPU."""

    class RawModule:
        def __init__(self, code: str) -> None:
            assert "nothing" in code

        def get_function(self, name: str) -> None:
            if not compiles:
                raise RuntimeError("CuPy failed to load libnvrtc.so.13")

    cuda = SimpleNamespace(is_available=lambda: True, runtime=SimpleNamespace(is_hip=False))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=RawModule, cuda=cuda))
    monkeypatch.setattr(_cuda.importlib.util, "find_spec", lambda name: object())
    problem = _cuda.problem.__wrapped__()
    monkeypatch.setattr(_cuda, "problem", lambda: problem)
    if compiles:
        assert problem == ""
        assert _cuda.available.__wrapped__()
        return
    with pytest.warns(UserWarning, match=r"libnvrtc.*pip install 'anybn\[cupy\]'.*goes on without"):
        assert not _cuda.available.__wrapped__()


def test_a_backend_of_which_nothing_can_be_computed_is_not_usable(target: Target) -> None:
    """Though it has devices, as CuPy without a compiler has."""
    assert anybn.backends()["simulated"].usable
    target.backend.problem = lambda: "no compiler"  # type: ignore[method-assign]
    found = anybn.backends()["simulated"]
    assert found.problem == "no compiler"
    assert not found.usable


class Driver:
    """It takes notes, and knows no context before a device was set: in a thread of its own, autograd may be the first
    to use CUDA."""

    CUDADriverError = type("CUDADriverError", (RuntimeError,), {})

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.notes: list[Any] = []
        runtime = SimpleNamespace(setDevice=lambda ordinal: self.notes.append(f"device {ordinal}"))
        for name in ("cupy_backends", "cupy_backends.cuda", "cupy_backends.cuda.api"):
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(driver=self, runtime=runtime))
        monkeypatch.setattr(_cuda, "function", lambda ordinal, kernel: f"{kernel} on {ordinal}")
        monkeypatch.setattr(_cuda, "device", lambda ordinal: simulator.H200)

    def launchKernel(self, kernel: str, *how: Any) -> None:  # noqa: N802
        if "device 3" not in self.notes:
            raise self.CUDADriverError("CUDA_ERROR_INVALID_CONTEXT: invalid device context")
        *how, parameters, extra = how
        assert extra == 0
        record = ctypes.string_at(ctypes.c_void_p.from_address(parameters).value, _cuda.CALL.itemsize)
        self.notes.append((kernel, tuple(how), np.frombuffer(record, _cuda.CALL)[0]))

    def launchCooperativeKernel(self, kernel: str, *how: Any) -> None:  # noqa: N802
        self.launchKernel(f"together {kernel}", *how, 0)

    def occupancyMaxActiveBlocksPerMultiprocessor(self, kernel: str, threads: int, shared: int) -> int:  # noqa: N802
        return 1


def test_what_the_driver_is_asked_to_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call, to the last argument; and the blocks of a group all together."""
    driver = Driver(monkeypatch)
    gpu = _cuda.gpu.__wrapped__(3, 7, lambda nbytes: (0x5000, None))
    pointers = {"x": 0x1000, "y": 0x2000, "mean": 0x3000, "var": 0x3100, "m2": 0x3200, "weight": 0x4000}
    _cuda.call("train", gpu, (6, 3, 1024), "bfloat16", **pointers, eps=1e-3, relu=1, parameter_dtype="float16")
    (planned,) = plan("train", (6, 3, 1024), "bfloat16", simulator.H200).launches
    device, (kernel, how, record) = driver.notes
    assert (device, kernel) == ("device 3", f"{planned.kernel} on 3")
    assert how == (*planned.grid, 1, *planned.block, 1, planned.shared_bytes, 7)
    assert {name: record[name] for name in pointers} == pointers
    assert not any(record[name] for name in ("residual", "bias", "shift", "running_mean", "counter", "partials"))
    assert [record[name] for name in ("n", "channels", "length", "keep", "width")] == [6, 3, 1024, planned.keep, 1]
    assert [record[name] for name in ("eps", "relu", "weight_type", "exact")] == [1e-3, 1, 0, 1]
    assert record["inverse"] == 1 / 6144

    driver.notes[1:] = []
    shape = 65536, 1024, 1
    _cuda.call("train", gpu, shape, "bfloat16", **pointers, eps=1e-3)
    (first, _, cleared), (second, how, record) = driver.notes[-2:]
    clear, group = plan("train", shape, "bfloat16", simulator.H200).launches
    assert (first, second) == ("clear_barriers on 3", f"together {group.kernel} on 3")
    assert how == (*group.grid, 1, *group.block, 1, group.shared_bytes, 7)
    assert cleared["barriers"] == record["barriers"] > record["partials"] == 0x5000 + 16 * 1024
    assert clear.grid[0] == group.grid[0]


@pytest.mark.parametrize("largest", [1, 2, 8])
def test_clusters_that_a_driver_refuses_are_not_planned(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    """A virtual GPU may take none, though its compute capability has them."""
    asked = []

    class RawModule:
        def __init__(self, **_: Any) -> None:
            pass

        def get_function(self, name: str) -> Any:
            def run(grid: tuple[int], block: tuple[int], arguments: tuple[()]) -> None:
                asked.append(name)
                if grid[0] > largest:
                    raise Driver.CUDADriverError("CUDA_ERROR_INVALID_CLUSTER_SIZE")

            return run

    properties = {"major": 9, "minor": 0, "multiProcessorCount": 78, "sharedMemPerBlockOptin": 232448}
    runtime = SimpleNamespace(getDeviceProperties=lambda ordinal: properties | {"cooperativeLaunch": 1})
    cuda = SimpleNamespace(runtime=runtime, driver=SimpleNamespace(CUDADriverError=Driver.CUDADriverError))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=RawModule, cuda=cuda))
    device = _cuda.device.__wrapped__(0)
    assert device.largest_cluster == largest
    assert device.clusters == tuple(size for size in (1, 2, 4, 8) if size <= largest)
    assert asked[0] == "nothing<8>"
    for op in ("train", "backward"):
        launched = plan(op, (64, 256, 56 * 56), "bfloat16", device).launches
        assert all(launch.cluster <= largest for launch in launched)


def test_what_cupy_makes_for_a_state_is_there_for_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits for the copy, but where a graph is captured, in which nothing can be waited for."""
    cupy = pytest.importorskip("cupy", reason="cupy: not installed, pip install cupy-cuda13x")
    from anybn.backends.cupy import CuPyBackend

    notes: list[str] = []

    class Stream:
        capturing = False

        def is_capturing(self) -> bool:
            return self.capturing

        def synchronize(self) -> None:
            notes.append("waited")

    stream = Stream()
    monkeypatch.setattr(cupy.cuda, "Device", lambda device: nullcontext(notes.append(f"on {device}")))
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: stream)
    monkeypatch.setattr(cupy, "array", lambda array: notes.append("copied"))
    CuPyBackend().from_numpy(np.zeros(3), 2)
    assert notes == ["on 2", "copied", "waited"]
    notes.clear()
    stream.capturing = True
    CuPyBackend().from_numpy(np.zeros(3), 2)
    assert notes == ["on 2", "copied"]


def test_torch_tensors_by_their_pointers() -> None:
    """What torch's backend does with CUDA tensors: pointers and torch's own memory; here the tensors lie on the CPU."""
    torch = pytest.importorskip("torch")

    def scratch(nbytes: int) -> tuple[int, Any]:
        memory = torch.empty(nbytes, dtype=torch.uint8)
        return memory.data_ptr(), memory

    x = torch.randn((6, 3, 10, 10), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for last, device in ((False, simulator.H200), (True, simulator.H200._replace(shared_bytes=1))):
        x_in = x.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        y, weight, bias = torch.empty_like(x_in), torch.full((3,), 2.0), torch.arange(3.0)
        mean, var, m2 = torch.empty((3, 3), dtype=torch.float64)
        running_mean, running_var = torch.zeros(3), torch.ones(3)
        running = {"running_mean": running_mean, "running_var": running_var}
        running |= {f"new_{name}": tensor for name, tensor in running.items()}
        tensors = {"x": x_in, "y": y, "weight": weight, "bias": bias, "mean": mean, "var": var, "m2": m2, **running}
        shape = (600, 3, 1) if last else (6, 3, 100)
        gpu = simulator.gpu(device)._replace(scratch=scratch)
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        _cuda.call("train", gpu, shape, "bfloat16", running_dtype="float32", **pointers, eps=1e-5, momentum=0.1, ddof=1)

        module = torch.nn.BatchNorm2d(3)
        with torch.no_grad():
            module.weight.fill_(2)
            module.bias.copy_(bias)
            expected = module(x.float())
        assert (y.float() - expected).abs().max() <= 0.51 * 2**-7 * expected.abs().max()
        assert torch.allclose(running_mean, module.running_mean, atol=1e-6)
        assert torch.allclose(running_var, module.running_var, atol=1e-6)
