"""A module's step on CUDA tensors: one launch forward, its running statistics included, and one backward.

On small tensors it is the host that takes the time: nothing is done here that a launch does not need.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd.function import _SingleLevelFunction  # Function minus its checks for torch.func
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from anybn import _lock
from anybn.backends.torch import TorchBackend, cpu
from anybn.backends.torch.autograd import differentiated
from anybn.backends.torch.cuda import TorchArrays
from anybn.core.call import Call, Spec
from anybn.kernels.cuda import launch
from anybn.kernels.layout import layout_of_strides
from anybn.torch.through_operator import tensors_of

_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}


def _is_vector(a: torch.Tensor | None, x: torch.Tensor, channels: int) -> bool:
    """Whether a is nothing, or numbers of all channels without gaps on x's device."""
    return a is None or (
        type(a) in (torch.Tensor, Parameter)
        and a.dtype in _NAMES
        and a.device == x.device
        and a.shape == (channels,)
        and a.is_contiguous()
        and not a.is_neg()
        and a.data_ptr() != 0
    )


def _lies_like(a: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether the values of a, of x's shape, lie in memory in the order of x, which is dense. The strides of axes of
    size 1 mean nothing."""
    mine, its = a.stride(), x.stride()
    return mine == its or layout_of_strides(x.shape, mine, 1, 1) == layout_of_strides(x.shape, its, 1, 1)


@functools.lru_cache(maxsize=1024)
def _backward_of(kind: launch.Kind) -> launch.Kind:
    """The backward pass of a forward pass; it reads no running statistics, and takes the relu's mask from y."""
    return kind._replace(op="backward", running_dtype="float64", relu=False, ddof=0, training=kind.op == "train")


def _address(a: torch.Tensor | None) -> int:
    return 0 if a is None else a.data_ptr()


def fast_forward_on_cuda(
    kernels: TorchArrays, module: Any, x: torch.Tensor, residual: torch.Tensor | None, relu: bool, recomputes: bool
) -> torch.Tensor | None:
    """y; or None, with nothing done, for whatever is special or wrong. ``recomputes``: the batch is learnt already."""
    if (tensors := tensors_of(module)) is None:
        return None
    weight, bias, mean, var, batches = tensors
    shape, channels, eps, momentum = x.shape, module.num_features, module.eps, module.momentum
    if len(shape) not in module._ranks or shape[1] != channels or x.dtype not in _NAMES or x.is_neg():
        return None
    layout = layout_of_strides(shape, x.stride(), 1, 1)
    if (
        layout is None
        or not x.numel()
        or not eps > 0
        or not (_is_vector(weight, x, channels) and _is_vector(bias, x, channels))
        or not (_is_vector(mean, x, channels) and _is_vector(var, x, channels))
        or (mean is None) is not (var is None)
        or (weight is not None and bias is not None and weight.dtype is not bias.dtype)
    ):
        return None
    if residual is not None and not (
        type(residual) is torch.Tensor
        and residual.dtype is x.dtype
        and residual.device == x.device
        and residual.shape == shape
        and _lies_like(residual, x)
        and not residual.is_neg()
    ):
        return None
    of_batch = module.training or mean is None
    commits = of_batch and mean is not None and module.track_running_stats and not recomputes
    if of_batch:
        if layout.outer * layout.inner < 2 or momentum is None or not 0 <= momentum <= 1:
            return None
        if commits and not (mean.dtype is var.dtype and batches.dtype is torch.int64 and batches.device == x.device):
            return None
    elif mean.dtype is not torch.float64 or var.dtype is not torch.float64:
        return None

    records = torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    parameter = weight if weight is not None else bias
    kind = launch.Kind(
        "train" if of_batch else "evaluate",
        (layout.outer, channels, layout.inner),
        _NAMES[x.dtype],
        "float32" if parameter is None else _NAMES[parameter.dtype],
        _NAMES[mean.dtype] if commits else "float64",
        relu=relu,
        ddof=1,
    )
    with kernels.on(x):
        y = torch.empty_like(x)
        like_x = [x.data_ptr(), _address(residual), 0, 0, 0, 0, y.data_ptr(), 0]
        factors = [_address(weight), _address(bias)]
        if of_batch:
            like = mean if mean is not None and mean.dtype is torch.float64 else x.new_empty(0, dtype=torch.float64)
            rows = like.new_empty(4, channels)
            running = [mean.data_ptr(), var.data_ptr()] * 2 + [batches.data_ptr()] if commits else [0] * 5
            pointers = [*like_x, *factors, *_row_addresses(rows, x), 0, 0, *running, *[0] * 5]
            with _lock.commits:
                launch.queue(kernels.gpu(x), kind, pointers, eps, momentum)
            if commits:
                increment_version((mean, var, batches))
                kernels.note_update(x)
        else:
            # The statistics of this call, whatever becomes of the module's.
            rows = torch.stack((mean, var)) if records else None
            pointers = [*like_x, *factors, mean.data_ptr(), 0, var.data_ptr(), *[0] * 13]
            launch.queue(kernels.gpu(x), kind, pointers, eps, 0.0)
    if not records:
        return y
    return _Recorded.apply(x, weight, bias, residual, (y, rows, kernels, kind, eps))


def _row_addresses(rows: torch.Tensor, x: torch.Tensor) -> tuple[int, int, int, int]:
    """Of mean, shift, variance and m2; of running statistics, there are mean and variance alone."""
    count, channels = rows.shape
    mean, step = rows.data_ptr(), 8 * channels
    if count == 2:
        return mean, 0, mean + step, 0
    return mean, mean + step if x.dtype is torch.float64 else 0, mean + 2 * step, mean + 3 * step


class _Recorded(_SingleLevelFunction):
    """y, computed already, as one node of the graph; its backward pass is one launch, the relu's mask included."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        computed: tuple[Any, ...],
    ) -> torch.Tensor:
        y, rows, *ctx.call = computed
        ctx.bias = bias  # whose values the backward pass does not read: they may change
        ctx.save_for_backward(x, weight, rows, y if ctx.call[1].relu else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rows, y = ctx.saved_tensors
        kernels, kind, eps = ctx.call
        wants_residual = ctx.needs_input_grad[3]
        if torch.is_grad_enabled():  # recorded in its turn
            call = Call(x, Spec(1, eps, kind.relu), weight, ctx.bias)
            statistics = cpu.statistics_of_rows(rows, x)
            grads = differentiated(TorchBackend(), call, statistics, dy, None if y is None else y > 0, wants_residual)
            return *grads, None
        given = dy
        if type(dy) is not torch.Tensor or not _lies_like(dy, x) or dy.is_neg():
            dy = torch.empty_like(x).copy_(dy)
        with kernels.on(x):
            dx = torch.empty_like(x)
            dresidual = torch.empty_like(x) if wants_residual and y is not None else None
            dweight = dbias = None
            parameter = ctx.bias if weight is None else weight
            if parameter is not None:  # kernels give both
                dtype = getattr(torch, kind.parameter_dtype)
                if weight is not None and weight.dtype is not dtype:  # the module's dtype was changed after its call
                    weight = weight.to(dtype)
                dweight, dbias = torch.empty_like(parameter, dtype=dtype), torch.empty_like(parameter, dtype=dtype)
            pointers = [x.data_ptr(), 0, dy.data_ptr(), 0, _address(y), 0, dx.data_ptr(), _address(dresidual)]
            pointers += [_address(weight), 0, *_row_addresses(rows, x), _address(dweight), _address(dbias), *[0] * 10]
            launch.queue(kernels.gpu(x), _backward_of(kind), pointers, eps, 0.0)
        if wants_residual and y is None:
            dresidual = given
        return dx, None if weight is None else dweight, None if ctx.bias is None else dbias, dresidual, None
