"""A module's forward pass for the calls that a net makes: by torch's operator, else in one compiled step.

What the operator does not take are modules without weight, bias or statistics, and platforms without it. On
(8, 16) it is Python that takes the time there, 5 us, and autograd 3 more: what is not needed here is left out.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, empty_like, is_grad_enabled
from torch._C import _current_graph_task_id
from torch.nn import Parameter

from anybn import _lock
from anybn.backends import registry
from anybn.backends.torch import TorchBackend, cpu
from anybn.backends.torch.autograd import Recorded, op_by_op_here
from anybn.backends.torch.cuda import TorchArrays
from anybn.core.call import spec_of
from anybn.torch.fast_forward_on_cuda import fast_forward_on_cuda
from anybn.torch.through_operator import is_count, learn, saved_tensors_hooks, tensors_of, through_operator

_TORCH = TorchBackend()
_FLOAT32, _FLOAT64 = torch.float32, torch.float64


def _is_plain(a: Any) -> bool:
    return type(a) is Tensor and a.layout is torch.strided and not a.is_nested and not a.is_neg()


def _vector(a: torch.Tensor | None, kind: type, dtype: torch.dtype, shape: tuple[int, ...]) -> int | None:
    """The address of a's values, as a compiled step takes it: None for None.

    0 unless a is of this kind or a plain tensor, with memory of its own in which they lie as they are. Subclasses may
    keep their values anywhere, and freed storages have address 0.
    """
    if a is None:
        return None
    if (
        (type(a) is kind or type(a) is Tensor)
        and a.dtype is dtype
        and a.is_cpu
        and a.shape == shape
        and a.is_contiguous()
        and not a.is_neg()
    ):
        return a.data_ptr()
    return 0


def fast_forward(
    module: Any, x: torch.Tensor, residual: torch.Tensor | None, activation: str | None
) -> torch.Tensor | None:
    """y; or None, with nothing done, for whatever is special or wrong: `anybn.batch_norm` takes that."""
    if type(x) is not Tensor or op_by_op_here():
        return None
    if not registry.built_in_alone and type(registry.backend_for(x)) is not TorchBackend:
        return None
    if x.is_cpu and (y := through_operator(module, x, residual, activation)) is not None:
        return y
    if not _is_plain(x):
        return None
    if (chosen := _TORCH._kernels_on(x.device)) is not cpu:
        if isinstance(chosen, TorchArrays) and (activation is None or activation == "relu"):
            recomputes = _current_graph_task_id() != -1
            return fast_forward_on_cuda(chosen, module, x, residual, activation is not None, recomputes)
        return None
    if (tensors := tensors_of(module)) is None:
        return None
    weight, bias, mean, var, batches = tensors
    steps = cpu.steps()
    shape, dtype, channels, eps = x.shape, x.dtype, module.num_features, module.eps
    if len(shape) not in module._ranks or shape[1] != channels:
        return None
    parameter_dtype, of_channels = _FLOAT32 if weight is None else weight.dtype, (channels,)
    of_batch, size, examples = module.training or mean is None, x.numel(), cpu.examples()
    example, parameter_example = examples.get(dtype), examples.get(parameter_dtype)
    if not (
        example is not None
        and parameter_example is not None
        and size > 0
        and steps is not None
        and (mean is None) is (var is None)
        and eps > 0
        and (activation is None or activation == "relu")
        and (x_at := x.data_ptr())
        and (weight_at := _vector(weight, Parameter, parameter_dtype, of_channels)) != 0
        and (bias_at := _vector(bias, Parameter, parameter_dtype, of_channels)) != 0
        and (mean_at := _vector(mean, Tensor, _FLOAT64, of_channels)) != 0
        and (var_at := _vector(var, Tensor, _FLOAT64, of_channels)) != 0
        and (residual is None or (_is_plain(residual) and cpu.lies_like(x, residual)))
    ):
        return None
    momentum, learns = module.momentum, False
    if of_batch:
        if size // channels < 2 or not (momentum is None or 0 <= momentum <= 1):
            return None
        learns = mean is not None and module.track_running_stats and _current_graph_task_id() == -1  # see `recomputes`
        if learns and not is_count(batches):
            return None
    plan = steps.steps_of(shape, x.stride(), example.itemsize, 1)
    if plan is None:
        return None

    spec = spec_of(1, eps, activation is not None)
    records = is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    if records and spec.relu and saved_tensors_hooks(True) is not None:  # which would read y at once
        return None
    y, floor = empty_like(x), 0.0 if spec.relu else -math.inf
    statistics = np.empty((5 if of_batch else 2, channels))
    residual_at = None if residual is None else residual.data_ptr()
    arrays = (example, parameter_example, x_at, y.data_ptr(), residual_at, weight_at, bias_at, mean_at, var_at)
    options = (size, channels, floor, eps, statistics, plan.hands())
    if records:  # before anything is changed, since it can fail
        y = Recorded.apply(x, weight, bias, residual, (y, statistics), _TORCH, spec)
    if of_batch:
        waited = plan.train(None, None, *arrays, *options, *plan.of_train)
    else:
        before = _lock.writes
        waited = steps.evaluate(None, None, *arrays, *options, *plan.of_evaluate)
        if before & 1 or before != _lock.writes:  # another thread was at a module's statistics, perhaps these
            with _lock.commits:
                waited = steps.evaluate(None, None, *arrays, *options, *plan.of_evaluate)
    if waited < 0:
        return None  # x shares memory with the state
    steps.note_wait(waited)
    if learns:
        rows, new = statistics.ctypes.data, -1.0 if momentum is None else momentum
        at = mean_at, var_at, batches.data_ptr()
        learn(steps.update, (example, rows, channels, size // channels, new, *at), (mean, var, batches))
    return y
