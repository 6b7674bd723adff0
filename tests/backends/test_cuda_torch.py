"""torch's CUDA tensors without a GPU: CPU tensors, with the simulator for a GPU, inside autograd and in modules.

What is left to a GPU is torch's streams and CuPy's launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda_cpu import simulator
from cuda_cpu.simulator import is_masked

import anybn
from anybn.conformance import inputs, oracle, test_errors, test_gradients, test_state
from anybn.conformance.targets import Target

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")
simulator.needs_compiler()

import anybn.backends.torch.backend as torch_backend  # noqa: E402
import anybn.torch  # noqa: E402
from anybn.backends.torch import TorchBackend  # noqa: E402
from anybn.backends.torch import cpu as _torch_cpu  # noqa: E402
from anybn.backends.torch import cuda as _torch_cuda  # noqa: E402
from anybn.backends.torch import native as _torch_native  # noqa: E402
from anybn.backends.torch.cuda import TorchArrays  # noqa: E402
from anybn.core import formulas  # noqa: E402
from anybn.kernels.cuda import launch as _cuda  # noqa: E402
from anybn.kernels.cuda.plan import Launch  # noqa: E402


class Arrays(TorchArrays):
    """CPU tensors, treated as CUDA's."""

    def __init__(self) -> None:
        self.launched: list[Launch] = []

    def names(self) -> list[str]:
        return [launch.kernel.partition("<")[0] for launch in self.launched]

    def on(self, x: torch.Tensor) -> AbstractContextManager[None]:
        return nullcontext()

    def gpu(self, x: torch.Tensor) -> _cuda.Gpu:
        gpu = simulator.gpu(simulator.H200, schedule=2, launched=self.launched)
        return gpu._replace(scratch=_torch_cuda.scratch_on(x.device))

    def note_update(self, x: torch.Tensor) -> None:
        pass


class Simulated(TorchBackend):
    name = "simulated-torch"

    def __init__(self) -> None:
        self.kernels = Arrays()

    def _kernels_on(self, device: torch.device) -> Any:
        return self.kernels


@pytest.fixture
def target() -> Iterator[Target]:
    backend = Simulated()
    anybn.register_backend(backend)
    try:
        with anybn.use_backend("simulated-torch"):
            yield Target("simulated-torch", backend, torch.device("cpu"))
    finally:
        anybn.unregister_backend("simulated-torch")


@pytest.fixture
def launched(target: Target) -> Arrays:
    return target.backend.kernels


for module in (test_errors, test_gradients, test_state):  # test_cuda_backend.py has the kernels' accuracy
    prefix = module.__name__.rpartition(".")[2]
    tests = {name: test for name, test in vars(module).items() if name.startswith("test_")}
    globals().update({f"{prefix}_{name.removeprefix('test_')}": test for name, test in tests.items()})


@pytest.mark.parametrize("relu", [False, True])
def test_kernels_do_the_work(launched: Arrays, relu: bool) -> None:
    """And not the core, which would be right as well: in training with its commit, in backward and in evaluation."""
    x = torch.from_numpy(inputs.normal((8, 3, 14, 14))).float().requires_grad_()
    state = anybn.BatchNormState(3)
    y = anybn.batch_norm(x, state, training=True, residual=x, activation="relu" if relu else None)
    y.square().sum().backward()
    anybn.batch_norm(x.detach().movedim(1, -1), state, axis=-1)
    anybn.moments(x.detach()[:, :, 0, 0])
    assert launched.names() == ["train", "backward", "evaluate", "sums", "finish_train"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_kernels_take_masks(launched: Arrays, monkeypatch: pytest.MonkeyPatch, last: bool, dtype: torch.dtype) -> None:
    """Inside autograd, in training and evaluation; the core has no part in it."""
    for name in ("batch_statistics", "normalize", "gradients", "updated_running_statistics"):
        monkeypatch.setattr(formulas, name, None)
    mask = torch.from_numpy(inputs.normal((8, 14, 10), 7)) < 0.5
    name, (bar, size) = str(dtype).removeprefix("torch."), (2, 10) if dtype is torch.float64 else (0.6, 1)
    kind = torch.channels_last if last else torch.contiguous_format
    x, residual, dy = (
        torch.from_numpy(inputs.normal((8, 3, 14, 10), seed)).to(dtype).to(memory_format=kind) for seed in range(3)
    )
    shown = [np.where(mask[:, None], a.double(), 0) for a in (x, residual, dy)]
    for a in (x, residual, dy):
        a.masked_fill_(~mask[:, None], torch.nan)
    statistics = oracle.statistics(shown[0], mask=mask.numpy())
    for training in (True, False):
        given = [a.clone().requires_grad_() for a in (x, residual)]
        state = anybn.BatchNormState(3, like=x)
        state.weight, state.bias = torch.arange(3.0) + 0.5, torch.arange(3.0) - 1
        parameters = [state.weight.requires_grad_(), state.bias.requires_grad_()]
        options = {"mask": mask, "residual": given[1], "activation": "relu"}
        y = anybn.batch_norm(given[0], state, training=training, **options)
        grads = torch.autograd.grad(y, (*given, *parameters), dy)
        mean, var = (statistics.mean, statistics.var()) if training else (np.zeros(3), np.ones(3))
        of_oracle = {"weight": np.arange(3) + 0.5, "mask": mask.numpy()}
        expected = oracle.normalize(shown[0], mean, var, bias=np.arange(3) - 1.0, residual=shown[1], **of_oracle)
        assert oracle.error(y.detach().double().numpy(), np.maximum(expected, 0), name, size) <= bar
        wanted = oracle.gradients(
            shown[2],
            shown[0],
            mean,
            var,
            count=statistics.count if training else None,
            active=(y > 0).numpy(),
            **of_oracle,
        )
        assert oracle.error(grads[0].double().numpy(), wanted.x, name, size) <= bar
        assert np.array_equal(grads[1].double().numpy(), wanted.residual)
        assert oracle.error(grads[2].numpy(), wanted.weight, "float32", 10) <= 2
        assert oracle.error(grads[3].numpy(), wanted.bias, "float32", 10) <= 2
    training = ["sums", "finish_train", "evaluate"]
    backward = ["gradient_sums", "finish_backward", "gradients"]
    assert launched.names() == [*training, *backward, "evaluate", *backward]
    assert all(is_masked(launch.kernel) for launch in launched.launched)


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_the_gradient_of_a_residual_is_written_if_it_is_wanted(launched: Arrays, given: bool, wanted: bool) -> None:
    """Behind a relu, where it is not dy itself: a whole array otherwise written for nobody."""
    x = torch.from_numpy(inputs.normal((8, 3, 14, 14))).float().requires_grad_()
    residual = torch.from_numpy(inputs.normal((8, 3, 14, 14), 1)).float().requires_grad_(wanted) if given else None
    records = []
    gpu = launched.gpu

    def listening(a: torch.Tensor) -> _cuda.Gpu:
        found = gpu(a)
        return found._replace(
            launch=lambda launch, record: (records.append(record.copy()), found.launch(launch, record))
        )

    launched.gpu = listening  # type: ignore[method-assign]
    y = anybn.batch_norm(x, anybn.BatchNormState(3), training=True, residual=residual, activation="relu")
    dy = torch.from_numpy(inputs.normal(y.shape, 2)).float()
    y.backward(dy)
    assert launched.names() == ["train", "backward"]
    assert bool(np.frombuffer(records[1], _cuda.CALL)[0]["dresidual"]) == (given and wanted)
    if given and wanted:
        assert torch.equal(residual.grad, torch.where(y > 0, dy, 0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [False, True])
def test_first_and_second_order(launched: Arrays, training: bool, relu: bool) -> None:
    """Finite differences of torch's own checker; the second order, recorded, is the core's."""
    x = torch.from_numpy(inputs.normal((5, 3, 4)) * 2 + 1).requires_grad_()
    residual = torch.from_numpy(inputs.normal((5, 3, 4), 1)).requires_grad_()
    weight, bias = (torch.from_numpy(inputs.normal((3,), seed)).requires_grad_() for seed in (2, 3))

    def f(*given: torch.Tensor) -> torch.Tensor:
        state = anybn.BatchNormState(3, dtype="float64", like=x)
        state.running_mean, state.running_var = torch.arange(3.0), torch.arange(3.0) + 0.5
        state.weight, state.bias = given[1:3]
        return anybn.batch_norm(
            given[0], state, training=training, residual=given[3], activation="relu" if relu else None
        )

    assert torch.autograd.gradcheck(f, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(f, (x, weight, bias, residual))
    assert "backward" in launched.names()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("last", [False, True])
def test_memory_formats_and_narrow_types(launched: Arrays, dtype: torch.dtype, last: bool) -> None:
    """y and dx lie like x, float32 parameters go with narrow x, and all is what CPU tensors get."""
    kind = torch.channels_last if last else torch.contiguous_format
    x, dy = (torch.from_numpy(inputs.normal((6, 8, 5, 7), s)).to(dtype).to(memory_format=kind) for s in (0, 1))
    found = []
    for name in ("simulated-torch", "torch"):
        given = x.clone().requires_grad_()
        state = anybn.BatchNormState(8, like=x)
        state.weight, state.bias = torch.full((8,), 1.5, requires_grad=True), torch.arange(8.0, requires_grad=True)
        with anybn.use_backend(name):
            y = anybn.batch_norm(given, state, training=True, activation="relu")
            grads = torch.autograd.grad(y, (given, state.weight, state.bias), dy)
        assert y.is_contiguous(memory_format=kind)
        assert grads[0].is_contiguous(memory_format=kind)
        found.append([y.detach(), *grads, state.running_mean, state.running_var])
    assert launched.names() == ["train", "backward"]
    eps = torch.finfo(dtype).eps
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert oracle.error(ours.double().numpy(), theirs.double().numpy(), "float64") * 2**-52 <= 4 * eps


@pytest.mark.parametrize("backend", ["simulated-torch", "torch", "torch-native"])
def test_negated_and_overlapping_views(target: Target, backend: str) -> None:
    """Lazily negated tensors have the other sign in memory, expanded ones less memory than values."""
    values = torch.complex(*(torch.from_numpy(inputs.normal((6, 3, 4), seed)) for seed in (0, 1)))
    negated = values.conj().imag
    assert negated.is_neg()
    for x, residual in (
        (negated, values.real),
        (values.real.contiguous(), negated),
        (values.real[:1].expand(6, 3, 4), negated),
    ):
        state = anybn.BatchNormState(3)
        with anybn.use_backend(backend):
            y = anybn.batch_norm(x, state, training=True, residual=residual)
        expected = anybn.batch_norm(
            x.resolve_neg().contiguous().numpy(),
            anybn.BatchNormState(3),
            training=True,
            residual=residual.resolve_neg().contiguous().numpy(),
        )
        assert oracle.error(y.numpy(), expected, "float64") <= 4
        out = torch.complex(torch.zeros(6, 3, 4).double(), torch.zeros(6, 3, 4).double()).conj().imag
        with anybn.use_backend(backend):
            assert anybn.batch_norm(x, state, training=True, residual=residual, out=out) is out
        assert oracle.error(out.resolve_neg().numpy(), expected, "float64") <= 4


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("running", [torch.float64, torch.float32])
def test_a_module_is_updated_where_it_lies(monkeypatch: pytest.MonkeyPatch, momentum: Any, running: Any) -> None:
    """Two launches, in place, the counter included: what a CUDA graph replays goes on learning."""
    kernels = Arrays()
    ours, theirs = (anybn.torch.BatchNorm2d(3, momentum=momentum) for _ in range(2))
    for module in (ours, theirs):
        module.running_mean, module.running_var = module.running_mean.to(running), module.running_var.to(running)
    batches = [torch.from_numpy(inputs.normal((4, 3, 160, 70), seed)).float() * (seed + 1) for seed in range(3)]
    for x in batches:
        theirs(x)
    monkeypatch.setattr(TorchBackend, "_kernels_on", lambda self, device: kernels)
    # The fast path is for what really lies in the CPU's memory.
    monkeypatch.setattr(anybn.torch.module, "fast_forward", lambda *_: None)
    where = [a.data_ptr() for a in ours.buffers()]
    before = [a._version for a in ours.buffers()]
    for x in batches:
        y = ours(x)
    assert kernels.names()[-1] == "commit"
    assert kernels.names().count("commit") == 3
    assert [a.data_ptr() for a in ours.buffers()] == where
    assert all(a._version > version for a, version in zip(ours.buffers(), before, strict=True))
    assert int(ours.num_batches_tracked) == 3
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6)
    assert torch.allclose(y, theirs(batches[-1]), atol=1e-6)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_a_module_is_two_launches(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, relu: bool, training: bool, last: bool
) -> None:
    """One forward, with the running statistics, one backward, with the mask of the relu; and they are torch's."""
    kernels = Arrays()
    monkeypatch.setattr(TorchBackend, "_kernels_on", lambda self, device: kernels)
    monkeypatch.setattr("anybn.torch.fast_forward.through_operator", lambda *_: None)
    ours, theirs = anybn.torch.BatchNorm2d(4, activation="relu" if relu else None), torch.nn.BatchNorm2d(4)
    kind = torch.channels_last if last else torch.contiguous_format
    x, residual, dy = (
        torch.from_numpy(inputs.normal((6, 4, 5, 5), s) + 1).to(dtype).to(memory_format=kind) for s in range(3)
    )
    found = []
    for module in (ours, theirs):
        module.train(training)
        with torch.no_grad():
            module.weight.copy_(torch.arange(4) + 0.5)
            module.bias.copy_(torch.arange(4) - 1.0)
        exact = dtype if module is ours else torch.float32
        given = [a.to(exact).detach().requires_grad_() for a in (x, residual)]
        if module is ours:
            y = module(given[0], given[1])
        else:
            y = module(given[0]) + given[1]
            y = y.relu() if relu else y
        found.append([y, *torch.autograd.grad(y, (*given, module.weight, module.bias), dy.to(exact))])
        if module is ours:
            assert y.is_contiguous(memory_format=kind)
    assert kernels.names() == ["train" if training else "evaluate", "backward"]
    assert int(ours.num_batches_tracked) == int(training)
    assert torch.allclose(ours.running_var, theirs.running_var.double(), rtol=1e-5)
    bar = torch.finfo(dtype).eps if dtype is torch.bfloat16 else 1e-5  # of torch's, computed in float32
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=bar, rtol=bar)


def test_a_module_whose_dtype_is_changed_before_its_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph has the Parameter itself, whose memory has another size then."""
    kernels = Arrays()
    monkeypatch.setattr(TorchBackend, "_kernels_on", lambda self, device: kernels)
    monkeypatch.setattr("anybn.torch.fast_forward.through_operator", lambda *_: None)
    module, twin = anybn.torch.BatchNorm2d(4), torch.nn.BatchNorm2d(4)
    x, dy = (torch.from_numpy(inputs.normal((6, 4, 3, 3), s)).float().requires_grad_(s == 0) for s in range(2))
    found = []
    for bn in (module, twin):
        with torch.no_grad():
            bn.weight.copy_(torch.arange(4) + 0.5)
        y = bn(x)
        if bn is module:
            bn.half()
        found.append(torch.autograd.grad(y, x, dy)[0])
    assert kernels.names() == ["train", "backward"]
    assert torch.allclose(*found, atol=1e-5)


def test_strides_of_axes_of_size_1_cost_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they come from a pooling to (N, C, 1, 1), and from the layers behind it; y and dx lie like x."""
    kernels = Arrays()
    monkeypatch.setattr(TorchBackend, "_kernels_on", lambda self, device: kernels)
    module = anybn.torch.BatchNorm2d(4, activation="relu")
    x, residual, dy = (torch.from_numpy(inputs.normal((6, 4, 1, 1), s)).float() for s in range(3))
    last, odd = x.to(memory_format=torch.channels_last), dy.as_strided((6, 4, 1, 1), (4, 1, 7, 3))
    assert last.stride() != residual.stride() != odd.stride()
    copied = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *given: copied.append(given))
    last.requires_grad_()
    y = module(last, residual)
    (dx,) = torch.autograd.grad(y, last, odd)
    assert kernels.names() == ["train", "backward"]
    assert not copied
    twin = torch.nn.BatchNorm2d(4)
    given = x.clone().requires_grad_()
    expected = (twin(given) + residual).relu()
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(dx, torch.autograd.grad(expected, given, dy)[0], atol=1e-5)


def test_a_step_of_a_module_can_be_differentiated_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Arrays()
    monkeypatch.setattr(TorchBackend, "_kernels_on", lambda self, device: kernels)
    module = anybn.torch.BatchNorm1d(3, activation="relu", dtype=torch.float64)
    x, residual = (torch.from_numpy(inputs.normal((5, 3, 4), s)).requires_grad_() for s in range(2))
    assert torch.autograd.gradcheck(module, (x, residual))
    assert torch.autograd.gradgradcheck(module, (x, residual))


def test_what_a_module_does_not_do_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another layout of the residual, the cumulative average, one value: by the way that knows everything."""
    kernels = Arrays()
    monkeypatch.setattr(TorchBackend, "_kernels_on", lambda self, device: kernels)
    x = torch.from_numpy(inputs.normal((6, 4, 5, 5))).float()
    module, cumulative = anybn.torch.BatchNorm2d(4), anybn.torch.BatchNorm2d(4, momentum=None)
    residual = x.to(memory_format=torch.channels_last)
    assert torch.allclose(module(x, residual), torch.nn.BatchNorm2d(4)(x) + residual, atol=1e-5)
    assert torch.allclose(cumulative(x), torch.nn.BatchNorm2d(4)(x), atol=1e-5)
    assert torch.allclose(cumulative.running_mean.float(), x.mean((0, 2, 3)), atol=1e-6)
    with pytest.raises(ValueError, match="training needs more than 1 value"):
        module(x[:1, :, :1, :1])


def test_nothing_in_a_step_asks_for_a_value(launched: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would wait for the GPU. torch tells its dispatch modes of every operation."""
    from torch.utils._python_dispatch import TorchDispatchMode

    operations = []

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operations.append(operation.overloadpacket.__name__)
            return operation(*args, **(kwargs or {}))

    x = torch.from_numpy(inputs.normal((8, 3, 14, 14))).float().requires_grad_()
    state = anybn.BatchNormState(3, like=x)
    monkeypatch.setattr(torch_backend, "op_by_op", lambda: False)  # which a mode makes true
    with Listening():
        anybn.batch_norm(x, state, training=True, residual=x, activation="relu").backward(torch.ones_like(x))
    assert launched.names() == ["train", "backward"]
    waits = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "_to_copy", "copy_", "masked_select"}
    assert not waits & set(operations), operations
    with Listening():
        x.detach().sum().item()
    assert waits & set(operations)  # it would be heard


def test_which_kernels_for_which_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's with CuPy, torch's own without; on the CPU never, on other devices the core."""
    backend, cuda = TorchBackend(), torch.device("cuda:0")
    assert backend._kernels_on(torch.device("cpu")) is _torch_cpu
    assert backend._kernels_on(torch.device("mps")) is None
    monkeypatch.setattr(_cuda, "available", lambda: True)
    assert backend._kernels_on(cuda) is _torch_cuda.KERNELS
    monkeypatch.setattr(_cuda, "available", lambda: False)
    assert backend._kernels_on(cuda) is _torch_native


def test_a_state_that_leaves_waits_for_updates_on_other_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """With streams and events that only take notes."""
    notes: list[tuple[Any, ...]] = []

    class Stream(SimpleNamespace):
        def wait_stream(self, other: Any) -> None:
            notes.append((self.cuda_stream, "waits for", other.cuda_stream))

    def at(device: int, stream: int) -> Any:
        place = Stream(device=SimpleNamespace(index=device), cuda_stream=stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: place)
        monkeypatch.setattr(_torch_cuda, "current_stream", lambda index: stream)
        return SimpleNamespace(device=place.device)

    monkeypatch.setattr(_torch_cuda, "_updates", {})
    for place in ((0, 7), (0, 8), (0, 7), (1, 9)):
        _torch_cuda.KERNELS.note_update(at(*place))
    x = at(0, 7)
    _torch_cuda.await_updates(x)
    assert notes == [(7, "waits for", 8)]
    notes.clear()
    x = at(0, 0)
    _torch_cuda.await_updates(x)
    assert notes == [(0, "waits for", 7), (0, "waits for", 8)]
