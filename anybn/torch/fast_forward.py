"""A module's forward pass on the CPU for the calls that a net makes: nothing checked twice, one compiled step.

On (8, 16) it is Python that takes the time, 5 us, and autograd 3 more: what is not needed here is left out.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import numpy as np
import torch
from torch import empty_like, is_grad_enabled
from torch.autograd.graph import increment_version

from anybn import _lock
from anybn.backends.numpy import kernels
from anybn.backends.registry import backend_for
from anybn.backends.torch import TorchBackend, cpu
from anybn.backends.torch.autograd import Recorded, op_by_op
from anybn.core.call import Call, Spec, Statistics, Update
from anybn.kernels.cpu.plan import ONE_CLAIM

_TORCH = TorchBackend()
_FLOAT32, _FLOAT64 = torch.float32, torch.float64


@functools.cache
def _steps() -> Any:
    """`anybn.kernels.cpu.step`, or None without Numba; imported with the first small tensor."""
    return importlib.import_module("anybn.kernels.cpu.step") if kernels().__name__.endswith(".operations") else None


@functools.cache
def _examples() -> dict[torch.dtype, np.ndarray]:
    """Empty arrays of the dtypes that the compiled steps know on this processor, by which they tell dtypes apart."""
    return {dtype: np.empty(0, seen) for dtype, seen in cpu.DTYPES.items() if kernels().supports(np.dtype(seen))}


def _is_strided(a: Any) -> bool:
    return type(a) is torch.Tensor and a.layout is torch.strided and not a.is_nested


def _is_vector(a: torch.Tensor | None, dtype: torch.dtype, count: int) -> bool:
    """Whether a is nothing, or lies in the CPU's memory as so many values of dtype without gaps."""
    return a is None or (a.is_cpu and a.dtype is dtype and a.numel() == count and a.is_contiguous())


def _address(a: torch.Tensor | None) -> int:
    """As a compiled step takes it: 0 for what is not there."""
    return 0 if a is None else a.data_ptr()


def fast_forward(
    module: Any, x: torch.Tensor, residual: torch.Tensor | None, activation: str | None
) -> torch.Tensor | None:
    """y; or None, with nothing done, for whatever is special or wrong: `anybn.batch_norm` takes that."""
    if not _is_strided(x) or type(backend_for(x)) is not TorchBackend or op_by_op():
        return None
    steps, parameters, buffers = _steps(), module._parameters, module._buffers
    try:
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    except KeyError:  # parametrized, or a replica of DataParallel
        return None
    shape, dtype, channels, eps = x.shape, x.dtype, module.num_features, module.eps
    if len(shape) not in module._ranks or shape[1] != channels or channels < 2:  # one channel can be a negated view
        return None
    parameter_dtype = _FLOAT32 if weight is None else weight.dtype
    of_batch, size, examples = module.training or mean is None, x.numel(), _examples()
    example, parameter_example = examples.get(dtype), examples.get(parameter_dtype)
    if not (
        example is not None
        and parameter_example is not None
        and size > 0
        and steps is not None
        and (mean is None) is (var is None)
        and eps > 0
        and (activation is None or activation == "relu")
        and x.is_cpu
        and _is_vector(weight, parameter_dtype, channels)
        and _is_vector(bias, parameter_dtype, channels)
        and _is_vector(mean, _FLOAT64, channels)
        and _is_vector(var, _FLOAT64, channels)
        and (residual is None or (_is_strided(residual) and residual.shape == shape and residual.dtype is dtype))
        and (residual is None or residual.is_cpu)
    ):
        return None
    momentum, commits = module.momentum, False
    if of_batch:
        if size // channels < 2 or not (momentum is None or 0 <= momentum <= 1):
            return None
        commits = mean is not None and module.track_running_stats and not _TORCH.recomputes()
        if commits and not (type(batches) is torch.Tensor and _is_vector(batches, torch.int64, 1)):
            return None

    spec = Spec(1, eps, activation is not None)
    small = (
        size * example.itemsize <= ONE_CLAIM and x.is_contiguous() and (residual is None or residual.is_contiguous())
    )
    statistics: Statistics | np.ndarray
    if small and (plans := steps.plans(shape, example.itemsize)):
        y, floor = empty_like(x), 0.0 if spec.relu else -math.inf
        arrays = (
            example,
            parameter_example,
            x.data_ptr(),
            y.data_ptr(),
            _address(residual),
            _address(weight),
            _address(bias),
        )
        if of_batch:
            statistics, running = np.empty((5, channels)), (0, 0, 0)
            if commits:
                running = mean.data_ptr(), var.data_ptr(), batches.data_ptr()
            new = -1.0 if momentum is None else momentum
            with _lock.commits:
                done = steps.train(*arrays, *running, size, channels, floor, eps, new, statistics, *plans[0])
            if done and commits:
                increment_version((mean, var, batches))
        else:
            statistics, running_addresses = np.empty((2, channels)), (mean.data_ptr(), var.data_ptr())
            done = steps.evaluate(*arrays, *running_addresses, size, channels, floor, eps, statistics, *plans[1])
        if not done:  # x shares memory with the state
            return None
    else:
        if x.is_neg() or any(a is not None and _TORCH.overlaps(x, a) for a in (weight, bias, mean, var)):
            return None
        call = Call(x, spec, weight, bias, residual)
        if of_batch:
            y, statistics, _ = cpu.train(call)
            if commits:
                with _lock.commits:
                    _TORCH.update_in_place(Update(mean, var, momentum, 1, False), statistics, batches)
        else:
            statistics = Statistics(None, mean.clone(), None, var.clone())
            y = cpu.evaluate(call, statistics)
    if is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return Recorded.apply(x, weight, bias, residual, (y, statistics), _TORCH, spec)
    return y
