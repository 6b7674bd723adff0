"""Batch norm in operations of torch's own, which the compiler behind torch.compile fuses with those around it.

The formulas are the core's. There is no call of our kernels: a compiler would have to lay out x as these want it, and
calls from its code go through Python, which takes longer in a net than a small layer's kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anybn.backends.torch.backend import TorchBackend
from anybn.core import formulas
from anybn.core.call import Call, Spec, Statistics, Update, dtype_name

_TORCH = TorchBackend()
# As torch.compiler.assume_constant_result marks it, which would import the compiler. It warns of what has a cache.
dtype_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Namespace:
    """torch's, with numbers per channel in memory of their own where they meet x.

    A compiler computes what it fuses for each value of x anew: two divisions and a root, where channels are last.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(_TORCH.namespace(None), name)

    @staticmethod
    def reshape(channels: Tensor, shape: tuple[int, ...]) -> Tensor:
        size = [channels.shape[0] if n == -1 else 1 for n in shape]
        return channels.contiguous().as_strided(size, [1] * len(shape))


_NAMESPACE = _Namespace()


def _along(channels: Tensor, axis: int, x: Tensor) -> Tensor:
    return formulas.along(_NAMESPACE, channels, axis, x.ndim)


def batch_statistics(x: Tensor, axis: int, mask: Tensor | None) -> Statistics:
    """Of a non-empty x; constants for automatic differentiation."""
    x = x.detach()
    working, call = _TORCH.working_dtype(x), Call(x, Spec(axis, 0.0), mask=mask)
    if working is torch.float32 or mask is not None:
        return formulas.batch_statistics(_NAMESPACE, formulas.native_sum, call, working)
    axes = formulas.reduced_axes(x.ndim, axis)

    def sums(origin: Tensor) -> tuple[Tensor, Tensor]:
        deviation = x - _along(origin, axis, x)
        return deviation.sum(axes), (deviation * deviation).sum(axes)

    origin = x[tuple(slice(None) if i == axis else 0 for i in range(x.ndim))].to(working)
    return formulas.statistics_of_sums(sums, origin, x.numel() // x.shape[axis], x.dtype is not working)


def running_statistics(x: Tensor, mean: Tensor, var: Tensor) -> Statistics:
    """These as what x is normalized with."""
    working = _TORCH.working_dtype(x)
    return Statistics(None, mean.to(working), None, var.to(working))


def normalize(call: Call, statistics: Statistics) -> Tensor:
    """`formulas.normalize`, with a derivative in which statistics of a batch are functions of x."""
    x, spec, weight, bias, residual, mask = call[:6]
    if residual is x:  # torch.compile does not take the same tensor twice
        residual = residual.view_as(x)
    return _Normalized.apply(x, weight, bias, residual, mask, *statistics, *spec)


class _Normalized(torch.autograd.Function):
    """relu and its derivative are in x's dtype, where the compiler's code for them is that of vectors."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, weight, bias, residual, mask, *numbers, axis, eps, relu = given
        spec = Spec(axis, eps)
        y = formulas.normalize(_NAMESPACE, Call(x, spec, weight, bias, residual, mask), Statistics(*numbers))
        y = y.relu() if relu else y
        like_bias = None if bias is None else bias.new_empty(0)  # its values may change before the backward pass
        count = numbers[0]
        ctx.count, numbers[0] = (None, count) if isinstance(count, Tensor) else (count, None)
        ctx.save_for_backward(x, weight, like_bias, mask, y if relu else None, *numbers)
        ctx.spec, ctx.adds, ctx.constants = spec, residual is not None, (None,) * len(given[4:])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, like_bias, mask, y, *numbers = ctx.saved_tensors
        for keep in (mask, None if y is None else y > 0):
            dy = dy if keep is None else torch.where(keep, dy, 0.0)
        if ctx.count is not None:
            numbers[0] = ctx.count
        call = Call(x, ctx.spec, weight, like_bias, mask=mask)
        return *_gradients(call, Statistics(*numbers), dy), dy if ctx.adds else None, *ctx.constants


def _gradients(call: Call, s: Statistics, dy: Tensor) -> tuple[Tensor | None, ...]:
    """`formulas.gradients`, of dy behind relu and mask. Each use widens dy by itself: a compiler that keeps what is
    used more than once keeps dy then, and no copy of it in float64."""
    x, (axis, eps, _), weight, _, _, mask = call[:6]
    axes, rstd = formulas.reduced_axes(x.ndim, axis), formulas.reciprocal_std(_NAMESPACE, s, eps)
    xhat = formulas.centered(_NAMESPACE, x, s, axis) * _along(rstd, axis, x)
    xhat = xhat if mask is None else torch.where(mask, xhat, 0.0)
    dbias, dweight = dy.sum(axes, dtype=rstd.dtype), (dy * xhat).sum(axes)
    dx = dy
    if s.count is not None:
        n = formulas.divisor(_NAMESPACE, s.count, rstd.dtype)
        dx = dx - _along(dbias / n, axis, x) - xhat * _along(dweight / n, axis, x)
        dx = dx if mask is None else torch.where(mask, dx, 0.0)
    dx = dx * _along(formulas.scale_of(_NAMESPACE, s, weight, eps), axis, x)
    return formulas.rounded_to(_NAMESPACE, dx, x.dtype), *formulas.parameter_gradients(_NAMESPACE, call, dweight, dbias)


def updated_running_statistics(
    statistics: Statistics, mean: Tensor, var: Tensor, momentum: float | Tensor, ddof: int, propagate: bool = False
) -> tuple[Tensor, Tensor]:
    """What mean and var become, in their dtypes."""
    working = statistics.mean.dtype
    update = Update(mean.to(working), var.to(working), momentum, ddof, propagate)
    new_mean, new_var = formulas.updated_running_statistics(_NAMESPACE, update, statistics)
    return new_mean.to(mean.dtype), new_var.to(var.dtype)
