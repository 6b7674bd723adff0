"""batchnorm.cu on torch's CUDA tensors: their own pointers, torch's memory, torch's current stream.

So what torch does about memory and order holds here: its caching allocator, CUDA graphs, streams. CuPy compiles and
launches; it allocates nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd.graph import increment_version

from anybn import _state
from anybn._core import Spec, Statistics, dtype_name
from anybn.backends import _cuda
from anybn.backends._cuda_arrays import CudaArrays
from anybn.backends._layout import Lying, of_strides


@functools.cache
def scratch_on(device: torch.device) -> Callable[[int], tuple[int, torch.Tensor]]:
    """Allocates bytes on a device; torch gives them to nobody on another stream while they may be in use."""

    def scratch(nbytes: int) -> tuple[int, torch.Tensor]:
        memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return memory.data_ptr(), memory

    return scratch


class TorchArrays(CudaArrays):
    def on(self, x: torch.Tensor) -> AbstractContextManager[Any]:
        return nullcontext() if x.device.index == torch.cuda.current_device() else torch.cuda.device(x.device)

    def gpu(self, x: torch.Tensor) -> _cuda.Gpu:
        index = x.device.index
        return _cuda.gpu(index, current_stream(index), scratch_on(x.device))

    def pointer(self, a: torch.Tensor) -> int:
        return a.data_ptr()

    def supports(self, x: torch.Tensor) -> bool:
        return super().supports(x) and not x.is_neg()

    def lying(self, x: torch.Tensor, axis: int) -> Lying | None:
        return of_strides(tuple(x.shape), x.stride(), 1, axis)

    def strides(self, a: torch.Tensor) -> Hashable:
        strides = tuple(stride for stride, size in zip(a.stride(), a.shape, strict=True) if size > 1)
        return strides, a.is_neg()  # a lazily negated view has the other sign in memory

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().clone(memory_format=torch.preserve_format)

    def beside(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty_like(x, dtype=dtype)

    def per_channel(self, x: torch.Tensor, rows: int, channels: int, dtype: Any = torch.float64) -> Any:
        return torch.empty((rows, channels), dtype=dtype, device=x.device).unbind()

    def vector(self, a: torch.Tensor, dtype: str | None = None) -> torch.Tensor:
        a = a.detach().resolve_neg()
        if dtype is not None and dtype_name(a.dtype) != dtype:
            a = a.to(getattr(torch, dtype))
        return a.contiguous()

    def note_update(self, x: torch.Tensor) -> None:
        note_update(x)


KERNELS = TorchArrays()

#: Of a device, by its index: torch.cuda.current_stream takes 20 times as long. A torch without CUDA does not have it.
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # type: ignore[assignment]

#: (device, stream) of updates of running statistics -> the stream.
_updates: dict[tuple[int, int], torch.cuda.Stream] = {}


def note_update(x: torch.Tensor) -> None:
    """Running statistics are being updated on the current stream of x's device."""
    index = x.device.index
    place = index, current_stream(index)
    if place not in _updates:
        _updates[place] = torch.cuda.current_stream(x.device)


def await_updates(x: torch.Tensor) -> None:
    """What is queued next for x's device comes after the updates on its other streams; the host does not wait."""
    index = x.device.index
    here = current_stream(index)
    for (device, other), stream in tuple(_updates.items()):
        if device == index and other != here:
            torch.cuda.current_stream(x.device).wait_stream(stream)


# -- a module's step -------------------------------------------------------------------------------------------------

_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}


def _beside(a: torch.Tensor | None, x: torch.Tensor, channels: int) -> bool:
    """Whether a is nothing, or numbers of all channels without gaps on x's device."""
    return a is None or (
        type(a) in (torch.Tensor, torch.nn.Parameter)
        and a.dtype in _NAMES
        and a.device == x.device
        and a.numel() == channels
        and a.is_contiguous()
        and not a.is_neg()
    )


def at_once(
    kernels: TorchArrays, module: Any, x: torch.Tensor, residual: torch.Tensor | None, relu: bool, again: bool
) -> torch.Tensor | None:
    """A module's forward pass in one launch, its running statistics included; None for what is special or wrong.

    On small tensors it is the host that takes the time: nothing is done here that a launch does not need. ``again``:
    the batch has been learnt from already.
    """
    parameters, buffers = module._parameters, module._buffers
    try:
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    except KeyError:  # parametrized, or a replica of DataParallel
        return None
    shape, channels, eps, momentum = x.shape, module.num_features, module.eps, module.momentum
    if len(shape) not in module._ranks or shape[1] != channels or x.dtype not in _NAMES or x.is_neg():
        return None
    lies = of_strides(shape, x.stride(), 1, 1)
    if (
        lies is None
        or not x.numel()
        or not eps > 0
        or not (_beside(weight, x, channels) and _beside(bias, x, channels))
        or not (_beside(mean, x, channels) and _beside(var, x, channels))
        or (mean is None) is not (var is None)
        or (weight is not None and bias is not None and weight.dtype is not bias.dtype)
    ):
        return None
    if residual is not None and not (
        type(residual) is torch.Tensor
        and residual.dtype is x.dtype
        and residual.device == x.device
        and residual.shape == shape
        and residual.stride() == x.stride()
        and not residual.is_neg()
    ):
        return None
    of_batch = module.training or mean is None
    commits = of_batch and mean is not None and module.track_running_stats and not again
    if of_batch:
        if lies.outer * lies.inner < 2 or momentum is None or not 0 <= momentum <= 1:
            return None
        if commits and not (mean.dtype is var.dtype and batches.dtype is torch.int64 and batches.device == x.device):
            return None
    elif mean.dtype is not torch.float64 or var.dtype is not torch.float64:
        return None

    recorded = torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    known = weight if weight is not None else bias
    kind = _cuda.Kind(
        "train" if of_batch else "evaluate",
        (lies.outer, channels, lies.inner),
        _NAMES[x.dtype],
        "float32" if known is None else _NAMES[known.dtype],
        _NAMES[mean.dtype] if commits else "float64",
        relu=relu,
        ddof=1,
    )
    with kernels.on(x):
        y = torch.empty_like(x)
        given = 0 if residual is None else residual.data_ptr()
        like_x = [x.data_ptr(), given, 0, 0, 0, y.data_ptr(), 0]
        factors = [0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr()]
        if of_batch:
            rows = torch.empty((4, channels), dtype=torch.float64, device=x.device)
            running = [mean.data_ptr(), var.data_ptr()] * 2 + [batches.data_ptr()] if commits else [0] * 5
            pointers = [*like_x, *factors, *_rows(rows, x), 0, 0, *running, 0, 0, 0]
            with _state._lock:
                _cuda.queue(kernels.gpu(x), kind, pointers, eps, momentum)
            if commits:
                increment_version((mean, var, batches))
                kernels.note_update(x)
        else:
            rows = None
            if recorded:  # the statistics of this call, whatever becomes of the module's
                rows = torch.stack((mean, var))
            pointers = [*like_x, *factors, mean.data_ptr(), 0, var.data_ptr(), *[0] * 11]
            _cuda.queue(kernels.gpu(x), kind, pointers, eps, 0.0)
    if not recorded:
        return y
    return _Recorded.apply(x, weight, bias, residual, (y, rows, kernels, kind, eps, of_batch))


def _rows(rows: torch.Tensor, x: torch.Tensor) -> tuple[int, int, int, int]:
    """The addresses of mean, shift, variance and m2; of running statistics, there are mean and variance alone."""
    count, channels = rows.shape
    mean, step = rows.data_ptr(), 8 * channels
    if count == 2:
        return mean, 0, mean + step, 0
    return mean, mean + step if x.dtype is torch.float64 else 0, mean + 2 * step, mean + 3 * step


class _Recorded(torch.autograd.function._SingleLevelFunction):  # Function minus the checks for torch.func
    """y, computed already, as one node of the graph; its backward pass is one launch, the relu's mask included."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        call: tuple[Any, ...],
    ) -> torch.Tensor:
        y, rows, *ctx.call = call
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, rows, y if ctx.call[1].relu else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rows, y = ctx.saved_tensors
        kernels, kind, eps, of_batch = ctx.call
        wants_residual = ctx.needs_input_grad[3]
        if torch.is_grad_enabled():
            return (*_op_by_op(dy, x, weight, rows, y, kind, eps, of_batch, wants_residual, ctx.has_bias), None)
        given = dy
        if type(dy) is not torch.Tensor or dy.stride() != x.stride() or dy.is_neg():
            dy = torch.empty_like(x).copy_(dy)
        with kernels.on(x):
            dx = torch.empty_like(x)
            dresidual = torch.empty_like(x) if wants_residual and y is not None else None
            dweight = dbias = None
            if weight is not None or ctx.has_bias:
                like = {"dtype": getattr(torch, kind.parameter_dtype), "device": x.device}
                dweight, dbias = (torch.empty(kind.shape[1], **like) for _ in range(2))
            pointers = [x.data_ptr(), 0, dy.data_ptr(), 0, 0 if y is None else y.data_ptr(), dx.data_ptr()]
            pointers += [a.data_ptr() if a is not None else 0 for a in (dresidual, weight)]
            pointers += [0, *_rows(rows, x)]
            pointers += [a.data_ptr() if a is not None else 0 for a in (dweight, dbias)] + [0] * 8
            how = kind._replace(op="backward", running_dtype="float64", relu=False, ddof=0, training=of_batch)
            _cuda.queue(kernels.gpu(x), how, pointers, eps, 0.0)
        if wants_residual and y is None:
            dresidual = given
        return dx, None if weight is None else dweight, dbias if ctx.has_bias else None, dresidual, None


def _op_by_op(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rows: torch.Tensor,
    y: torch.Tensor | None,
    kind: _cuda.Kind,
    eps: float,
    of_batch: bool,
    wants_residual: bool,
    has_bias: bool,
) -> tuple[torch.Tensor | None, ...]:
    """A backward pass that is recorded in its turn."""
    from anybn.backends.torch import TorchBackend, differentiated

    if of_batch:
        mean, shift, var, m2 = rows
        count = kind.shape[0] * kind.shape[2]
        statistics = Statistics(count, mean, shift if x.dtype is torch.float64 else None, var, m2)
    else:
        statistics = Statistics(None, rows[0], None, rows[1])
    saved = x, weight, None, None if y is None else y > 0
    grads = differentiated(TorchBackend(), dy, saved, statistics, Spec(1, eps, kind.relu, wants_residual))
    return grads.x, grads.weight, grads.bias if has_bias else None, grads.residual
