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

import anybn
from anybn.backends._on_gpu import CudaBackend
from anybn.backends.base import Backend
from anybn.backends.numpy import NumPyBackend
from anybn.conformance import inputs, test_accuracy, test_errors, test_gradients, test_state
from anybn.conformance.targets import Target
from anybn.core.call import Call
from anybn.kernels.cuda import launch as _cuda
from anybn.kernels.cuda.arrays import CudaArrays
from anybn.kernels.cuda.launch import Gpu
from anybn.kernels.cuda.plan import Launch

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


for module in (test_accuracy, test_errors, test_gradients, test_state):
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
    """With a mask, which the kernels do not take, as well."""
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


def test_what_the_driver_is_asked_to_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a driver that only takes notes, and knows no context before a device was set: in a thread of its own, autograd
    may be the first to use CUDA."""
    notes: list[Any] = []

    class CUDADriverError(RuntimeError):
        pass

    def launch(kernel: int, *how: int) -> None:
        if "device 3" not in notes:
            raise CUDADriverError("CUDA_ERROR_INVALID_CONTEXT: invalid device context")
        *shape, shared, stream, parameters, extra = how
        record = ctypes.cast(ctypes.c_void_p.from_address(parameters).value, ctypes.POINTER(ctypes.c_uint64))
        notes.append((kernel, tuple(shape), shared, stream, extra, record[0]))

    driver = SimpleNamespace(CUDADriverError=CUDADriverError, launchKernel=launch)
    runtime = SimpleNamespace(setDevice=lambda ordinal: notes.append(f"device {ordinal}"))
    for name, module in (("cupy_backends", None), ("cupy_backends.cuda", None), ("cupy_backends.cuda.api", driver)):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(driver=module, runtime=runtime))
    monkeypatch.setattr(_cuda, "function", lambda ordinal, kernel: 1000 + len(kernel))
    monkeypatch.setattr(_cuda, "device", lambda ordinal: simulator.H200)
    gpu = _cuda.gpu.__wrapped__(3, 7, lambda nbytes: (0, None))
    gpu.launch(Launch("commit", (5, 6), (32, 4), 99), bytearray((12345).to_bytes(8, "little") * 50))
    assert notes == ["device 3", (1006, (5, 6, 1, 32, 4, 1), 99, 7, 0, 12345)]


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
