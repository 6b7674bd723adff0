"""What the host does in a call whose arrays are on a GPU: with launches that do nothing, so that no GPU is needed.

    python benchmarks/host.py            # a minute, into benchmarks/results/host.json

Tensors on the CPU stand for torch's CUDA tensors, and NumPy's arrays for CuPy's. So memory is allocated by another
allocator than on a GPU; all else is what runs there, down to the call of the driver. Times are of the thread alone, the
least of many rounds, in which all have turns. Beside them is torch's module on the CPU, and a `torch.autograd.Function`
that allocates what a backward pass returns and does nothing else: what comes on top of that is anybn's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from speed import RESULTS, context, write
from torch.autograd.function import once_differentiable

import anybn
import anybn.torch
from anybn.backends._on_gpu import CudaBackend
from anybn.backends.numpy import NumPyBackend
from anybn.backends.torch import TorchBackend, cuda
from anybn.kernels.cuda import launch
from anybn.kernels.cuda.arrays import CudaArrays
from anybn.kernels.cuda.plan import Device

SHAPE = 8, 16, 4, 4
ROUNDS, CALLS = 60, 100
HERE = nullcontext()


def stub_the_driver() -> None:
    """One that takes every launch, of an H100."""

    def nothing(*_: Any) -> None:
        pass

    driver = SimpleNamespace(CUDADriverError=OSError, launchKernel=nothing, launchCooperativeKernel=nothing)
    runtime = SimpleNamespace(setDevice=nothing)
    for name in ("cupy_backends", "cupy_backends.cuda", "cupy_backends.cuda.api"):
        sys.modules[name] = SimpleNamespace(driver=driver, runtime=runtime)  # type: ignore[assignment]
    launch.function = lambda *_: 1
    launch.device = lambda *_: Device(132, 227 * 1024, (9, 0))


class Tensors(cuda.TorchArrays):
    def on(self, x: torch.Tensor) -> Any:
        return HERE

    def gpu(self, x: torch.Tensor) -> launch.Gpu:
        return launch.gpu(0, 0, cuda.scratch_on(x.device))

    def note_update(self, x: torch.Tensor) -> None:
        pass


class Arrays(CudaArrays):
    library = np

    def on(self, x: np.ndarray) -> Any:
        return HERE

    def gpu(self, x: np.ndarray) -> launch.Gpu:
        return launch.gpu(0, 0, no_scratch)

    def pointer(self, a: np.ndarray) -> int:
        return 16  # CuPy knows its addresses; NumPy takes long to tell


def no_scratch(_: int) -> tuple[int, Any]:
    raise MemoryError("small arrays need none")


class Stubbed(CudaBackend, NumPyBackend):
    name = "stubbed"

    def __init__(self) -> None:
        self.kernels = Arrays()


class Allocates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(a) for a in ctx.saved_tensors)


def calls() -> dict[str, Callable[[], Any]]:
    theirs, ours = torch.nn.BatchNorm2d(SHAPE[1]), anybn.torch.BatchNorm2d(SHAPE[1])
    x, dy = torch.randn(SHAPE), torch.randn(SHAPE)
    trained = x.clone().requires_grad_()
    layer, a = anybn.BatchNorm2d(SHAPE[1]), x.numpy()

    def step(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            trained.grad = ours.weight.grad = ours.bias.grad = theirs.weight.grad = theirs.bias.grad = None
            forward(trained).backward(dy)

        return run

    def vjp() -> None:
        _, pullback = layer.vjp(a)
        pullback(a)

    return {
        "torch.nn on the CPU, forward": lambda: theirs(trained),
        "torch.nn on the CPU, forward and backward": step(theirs),
        "a Function that only allocates, forward and backward": step(
            lambda x: Allocates.apply(x, theirs.weight, theirs.bias)
        ),
        "anybn.torch, forward": lambda: ours(trained),
        "anybn.torch, forward and backward": step(ours),
        "anybn.BatchNorm2d on CuPy, forward": lambda: layer(a),
        "anybn.BatchNorm2d on CuPy, forward and backward": vjp,
    }


def main() -> None:
    torch.set_num_threads(1)
    stub_the_driver()
    tensors = Tensors()
    TorchBackend._kernels_on = lambda *_: tensors  # type: ignore[method-assign]
    anybn.register_backend(Stubbed())
    runs = calls()
    least = dict.fromkeys(runs, float("inf"))
    with anybn.use_backend("stubbed"):
        for _ in range(ROUNDS):
            for name, run in runs.items():
                start = time.thread_time()
                for _ in range(CALLS):
                    run()
                least[name] = min(least[name], (time.thread_time() - start) / CALLS * 1e6)
    us = {name: round(value, 1) for name, value in least.items()}
    for name, value in us.items():
        print(f"{value:7.1f} us  {name}")
    write(RESULTS / "host.json", json.dumps({"context": context(1, False), "shape": SHAPE, "us": us}, indent=1))


if __name__ == "__main__":
    main()
