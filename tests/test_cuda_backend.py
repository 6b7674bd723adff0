"""The backend over batchnorm.cu: the conformance suite on NumPy arrays, with the simulator for a GPU.

So the host side runs as it does for CuPy. What is left to a GPU is CuPy itself: pointers, streams, launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cuda_cpu import simulator

import anybn
from anybn.backends._cuda import CudaBackend, Gpu
from anybn.backends._cuda_plan import Launch
from anybn.backends.numpy import NumPyBackend
from anybn.conformance import test_accuracy, test_errors, test_gradients, test_state
from anybn.conformance.targets import Target

simulator.needs_compiler()


class Simulated(CudaBackend, NumPyBackend):
    """NumPy's arrays, as CuPy's would be treated."""

    name = "simulated"
    launched: list[Launch]

    def library(self) -> Any:
        return np

    def pointer(self, a: np.ndarray) -> int:
        return a.__array_interface__["data"][0]

    def gpu(self, x: np.ndarray) -> Gpu:
        return simulator.gpu(simulator.H200, schedule=2, launched=self.launched)


@pytest.fixture
def target() -> Iterator[Target]:
    backend = Simulated()
    backend.launched = []
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
    names = [launch.kernel.partition("<")[0] for launch in target.backend.launched]
    assert names == ["train", "commit", "backward", "evaluate", "sums", "finish_train"]
