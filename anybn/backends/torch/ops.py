"""Batch norm as operations that torch.compile keeps whole: what it cannot look into runs as it does without it.

Pure functions of tensors, with a derivative; the one that updates running statistics in place has none.
"""

# No `from __future__ import annotations`: torch 2.4 makes the operations' schemas of their annotations, not of strings.
from typing import Any

import torch
from torch import Tensor

from anybn import _lock
from anybn.backends.torch.backend import TorchBackend
from anybn.core import formulas
from anybn.core.call import Call, Spec, Statistics, Update

_TORCH = TorchBackend()


def working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if _TORCH.has_float64(x.device) else torch.float32


def _statistics(x: Tensor, rows: Tensor, count: int | None) -> Statistics:
    """From the rows mean, shift, variance, summed squared deviations."""
    mean, shift, var, m2 = rows
    return Statistics(count, mean, None if formulas.is_wide(working_dtype(x), x) else shift, var, m2)


@torch.library.custom_op("anybn::train", mutates_args=())
def train(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, axis: int, eps: float, relu: bool
) -> tuple[Tensor, Tensor]:
    """(y, the statistics of x in rows)."""
    y, s, _ = _TORCH.train(Call(x, Spec(axis, eps, relu), weight, bias, residual))
    shift = torch.zeros_like(s.mean) if s.shift is None else s.shift
    return y, torch.stack((s.mean, shift, s.var, s.m2))


@train.register_fake
def _(x: Tensor, weight: Any, bias: Any, residual: Any, axis: int, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((4, x.shape[axis]), dtype=working_dtype(x))


@torch.library.custom_op("anybn::evaluate", mutates_args=())
def evaluate(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    axis: int,
    eps: float,
    relu: bool,
) -> Tensor:
    with _lock.commits:  # both before a thread that trains, or both after it
        mean, var = mean.clone(), var.clone()
    return _TORCH.evaluate(Call(x, Spec(axis, eps, relu), weight, bias, residual), Statistics(None, mean, None, var))


@evaluate.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("anybn::backward", mutates_args=())
def backward(
    dy: Tensor,
    x: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    like_bias: Tensor | None,
    y: Tensor | None,
    of_batch: bool,
    axis: int,
    eps: float,
    wants_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dresidual); empty are those of a weight or bias that is None and of a residual that is not
    asked for, which is to be asked for behind a relu only. like_bias: anything of bias's dtype. y is given behind a
    relu; of_batch: the statistics are x's own."""
    count = x.numel() // x.shape[axis] if of_batch else None
    call = Call(x, Spec(axis, eps, y is not None), weight, like_bias)
    dx, *others = _TORCH.gradients(call, _statistics(x, rows, count), dy, y, wants_residual)
    dweight, dbias, dresidual = (rows.new_empty(0) if a is None else a for a in others)
    if wants_residual and dresidual.stride() != dx.stride():  # it may lie like dy
        dresidual = torch.empty_like(dx).copy_(dresidual)
    return dx, dweight, dbias, dresidual


@backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    rows: Tensor,
    weight: Any,
    like_bias: Any,
    y: Any,
    of_batch: Any,
    axis: Any,
    eps: Any,
    wants_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none = rows.new_empty(0)
    dweight, dbias = (none if a is None else a.new_empty(rows.shape[1]) for a in (weight, like_bias))
    return torch.empty_like(x), dweight, dbias, torch.empty_like(x if wants_residual else none)


@torch.library.custom_op("anybn::commit", mutates_args=("running_mean", "running_var", "batches"))
def commit(
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor | None,
    rows: Tensor,
    count: int,
    momentum: float | None,
    ddof: int,
) -> None:
    """Fold the statistics of a batch into the running ones."""
    statistics = Statistics(count, rows[0], rows[1], rows[2], rows[3])
    with _lock.commits:
        _TORCH.update_in_place(Update(running_mean, running_var, momentum, ddof, False), statistics, batches)


@commit.register_fake
def _(*_: Any) -> None:
    pass


def _setup_train(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, ctx.axis, ctx.eps, relu = inputs
    y, rows = output
    ctx.of_batch = True
    ctx.save_for_backward(x, rows, weight, _like(bias), y if relu else None)


def _setup_evaluate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, var, weight, bias, _, ctx.axis, ctx.eps, relu = inputs
    zeros = torch.zeros_like(mean)
    ctx.of_batch = False
    ctx.save_for_backward(x, torch.stack((mean, zeros, var, zeros)), weight, _like(bias), output if relu else None)


def _like(bias: Tensor | None) -> Tensor | None:
    """Something of bias's dtype: its values may change before the backward pass, which does not read them."""
    return None if bias is None else bias.new_empty(0)


def _gradients(ctx: Any, dy: Tensor, of_residual: bool) -> tuple[Tensor | None, ...]:
    """Of x, weight, bias and, if that is wanted, residual."""
    x, rows, weight, like_bias, y = ctx.saved_tensors
    wants_residual = of_residual and y is not None
    dx, dweight, dbias, dresidual = backward(
        dy, x, rows, weight, like_bias, y, ctx.of_batch, ctx.axis, ctx.eps, wants_residual
    )
    if y is None or not of_residual:
        dresidual = dy if of_residual else None
    return dx, None if weight is None else dweight, None if like_bias is None else dbias, dresidual


def _backward_of_train(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, dy, ctx.needs_input_grad[3]), None, None, None


def _backward_of_evaluate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, *others = _gradients(ctx, dy, ctx.needs_input_grad[5])
    return dx, None, None, *others, None, None, None


train.register_autograd(_backward_of_train, setup_context=_setup_train)
evaluate.register_autograd(_backward_of_evaluate, setup_context=_setup_evaluate)
