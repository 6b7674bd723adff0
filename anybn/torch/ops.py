"""Batch norm as operations that torch.compile keeps whole: what it cannot look into runs as it does without it.

Pure functions of tensors, with a derivative; the one that updates running statistics in place has none. Under
torch.export, a module is taken apart into torch's own operations instead, and what was exported runs without anybn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anybn import _accumulate, _checks, _functional
from anybn.backends.torch.backend import TorchBackend
from anybn.core import formulas as _core
from anybn.core.formulas import Spec, Statistics
from anybn.errors import StateError
from anybn.state.state import BatchNormState
from anybn.torch import state as _module_state

_TORCH = TorchBackend()
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # from torch 2.7


def _working(x: Tensor) -> torch.dtype:
    return torch.float64 if _TORCH.has_float64(x.device) else torch.float32


def _statistics(x: Tensor, rows: Tensor, count: int | None) -> Statistics:
    """From the rows mean, shift, variance, summed squared deviations."""
    mean, shift, var, m2 = rows
    return Statistics(count, mean, None if _core.is_wide(_working(x), x) else shift, var, m2)


@torch.library.custom_op("anybn::train", mutates_args=())
def train(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, axis: int, eps: float, relu: bool
) -> tuple[Tensor, Tensor]:
    """(y, the statistics of x in rows)."""
    y, s = _TORCH.train(x, weight, bias, residual, None, Spec(axis, eps, relu))
    shift = torch.zeros_like(s.mean) if s.shift is None else s.shift
    return y, torch.stack((s.mean, shift, s.var, s.m2))


@train.register_fake
def _(x: Tensor, weight: Any, bias: Any, residual: Any, axis: int, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((4, x.shape[axis]), dtype=_working(x))


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
    return _TORCH.evaluate(x, Statistics(None, mean, None, var), weight, bias, residual, None, Spec(axis, eps, relu))


@evaluate.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("anybn::backward", mutates_args=())
def backward(
    dy: Tensor,
    x: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    active: Tensor | None,
    of_batch: bool,
    axis: int,
    eps: float,
    differentiates_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dresidual); empty are those of a weight that is None and of a residual that is not asked
    for, which is to be asked for behind a relu only. of_batch: the statistics are x's own."""
    count = x.numel() // x.shape[axis] if of_batch else None
    spec = Spec(axis, eps, active is not None, differentiates_residual)
    dx, *others = _TORCH.gradients(dy, x, _statistics(x, rows, count), weight, active, None, spec)
    dweight, dbias, dresidual = (rows.new_empty(0) if a is None else a for a in others)
    if differentiates_residual and dresidual.stride() != dx.stride():  # it may lie like dy
        dresidual = torch.empty_like(dx).copy_(dresidual)
    return dx, dweight, dbias, dresidual


@backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    rows: Tensor,
    weight: Any,
    active: Any,
    of_batch: Any,
    axis: Any,
    eps: Any,
    differentiates_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none = rows.new_empty(0)
    like = none if weight is None else weight
    dresidual = x if differentiates_residual else none
    return torch.empty_like(x), torch.empty_like(like), torch.empty_like(like), torch.empty_like(dresidual)


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
    _module_state.update_running(running_mean, running_var, batches, statistics, momentum, ddof)


@commit.register_fake
def _(*_: Any) -> None:
    pass


def _setup_train(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, ctx.axis, ctx.eps, relu = inputs
    y, rows = output
    ctx.has_bias, ctx.of_batch = bias is not None, True
    ctx.save_for_backward(x, rows, weight, y if relu else None)


def _setup_evaluate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, var, weight, bias, _, ctx.axis, ctx.eps, relu = inputs
    zeros = torch.zeros_like(mean)
    ctx.has_bias, ctx.of_batch = bias is not None, False
    ctx.save_for_backward(x, torch.stack((mean, zeros, var, zeros)), weight, output if relu else None)


def _gradients(ctx: Any, dy: Tensor, of_residual: bool) -> tuple[Tensor | None, ...]:
    """Of x, weight, bias and, if that is wanted, residual."""
    x, rows, weight, y = ctx.saved_tensors
    active = None if y is None else y > 0
    how = ctx.of_batch, ctx.axis, ctx.eps, of_residual and active is not None
    dx, dweight, dbias, dresidual = backward(dy, x, rows, weight, active, *how)
    if active is None or not of_residual:
        dresidual = dy if of_residual else None
    return dx, dweight if weight is not None else None, dbias if ctx.has_bias else None, dresidual


def _backward_of_train(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, dy, ctx.needs_input_grad[3]), None, None, None


def _backward_of_evaluate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, *others = _gradients(ctx, dy, ctx.needs_input_grad[5])
    return dx, None, None, *others, None, None, None


train.register_autograd(_backward_of_train, setup_context=_setup_train)
evaluate.register_autograd(_backward_of_evaluate, setup_context=_setup_evaluate)


def _check(x: Tensor, residual: Tensor | None, axis: int, channels: int) -> None:
    """What torch.compile can look at of the checks; where it fails, the check itself has the words."""
    if not -x.ndim <= axis < x.ndim or x.ndim < 2 or x.shape[axis] != channels or not x.dtype.is_floating_point:
        _checks.batch(x, _TORCH, axis, channels)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        _checks.like_x("residual", residual, x, _TORCH)


def eagerly(function: Any) -> Any:
    """What torch.compile ends its graph at. A group's collectives must keep their order on all members, and a compiler
    may exchange those of parallel branches, by sizes that differ from member to member."""
    return torch.compiler.disable(function)


def _evaluated(x: Tensor, mean: Tensor, var: Tensor, *rest: Any) -> Tensor:
    if not is_exporting():
        return evaluate(x, mean, var, *rest)
    weight, bias, residual, *spec = rest
    return _TORCH.evaluate(x, Statistics(None, mean, None, var), weight, bias, residual, None, Spec(*spec))


def forward(module: Any, x: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """A module's forward pass where torch records it, for torch.compile or torch.export."""
    over_group = module.group is not None and (module.training or module.running_mean is None)
    if over_group or (_accumulate.blocks and module.training):
        if is_exporting():
            raise NotImplementedError("torch.export cannot take a group or accumulate into its graph: export without")
        return eagerly(module.forward)(x, residual, activation)
    module._check_input_dim(x)
    _check(x, residual, 1, module.num_features)
    eps, momentum = module.eps, module.momentum
    if not eps > 0 or not (momentum is None or 0 <= momentum <= 1):
        _checks.eps(eps), _checks.momentum(momentum)
    _checks.choice("activation", activation, (None, "relu"))
    relu, mean, var = activation == "relu", module.running_mean, module.running_var
    parameters = module.weight, module.bias, residual
    if x.numel() and (module.training or mean is None):
        count = x.numel() // x.shape[1]
        if count < 2:
            _checks.enough_values(count, tuple(x.shape), False)
        commits = module.training and module.track_running_stats and mean is not None
        if is_exporting():
            y, statistics = _TORCH.train(x, *parameters, None, Spec(1, eps, relu))
            if commits:
                _module_state.update_running(mean, var, module.num_batches_tracked, statistics, momentum)
            return y
        y, rows = train(x, *parameters, 1, eps, relu)
        if commits:
            commit(mean, var, module.num_batches_tracked, rows.detach(), count, momentum, 1)
        return y
    return _evaluated(x, mean, var, *parameters, 1, eps, relu)


def batch_norm(
    x: Tensor,
    state: BatchNormState,
    *,
    training: bool = False,
    axis: int = 1,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    nonfinite: str = "skip",
    group: Any = None,
    out: Tensor | None = None,
) -> Tensor:
    """What `anybn.batch_norm` is inside torch.compile, which cannot follow its dispatch; the state is replaced too."""
    if group is not None:
        options = {"mask": mask, "residual": residual, "nonfinite": nonfinite, "group": group, "out": out}
        call = eagerly(_functional.batch_norm)
        return call(x, state, training=training, axis=axis, activation=activation, **options)
    if mask is not None or out is not None or nonfinite != "skip":
        raise NotImplementedError("torch.compile cannot take mask, out and nonfinite into its graph: leave them")
    if not isinstance(x, Tensor):
        raise NotImplementedError("torch.compile takes batch norm of torch tensors into its graph, and no other arrays")
    if type(state) is not BatchNormState:
        raise NotImplementedError("torch.compile cannot take a module's state into its graph: call the module itself")
    arrays = state._arrays
    for array in arrays[:4]:
        if array is not None and not isinstance(array, Tensor):
            raise StateError("torch.compile cannot move a state: call state.to(x) before")
    _check(x, residual, axis, state._num_features)
    _checks.choice("activation", activation, (None, "relu"))
    axis, eps, relu, mean, var = (
        axis % x.ndim,
        state._eps,
        activation == "relu",
        arrays.running_mean,
        arrays.running_var,
    )
    if not x.numel() or not (training or mean is None):
        zeros = x.new_zeros(x.shape[axis], dtype=_working(x)) if mean is None or var is None else None
        running = (mean, var) if zeros is None else (zeros, zeros)
        return _evaluated(x, *running, arrays.weight, arrays.bias, residual, axis, eps, relu)
    if is_exporting():
        raise StateError("torch.export cannot keep a state that a call changes: export one of anybn.torch's modules")
    count = x.numel() // x.shape[axis]
    if count < 2:
        _checks.enough_values(count, tuple(x.shape), False)
    y, rows = train(x, arrays.weight, arrays.bias, residual, axis, eps, relu)
    if training and mean is not None and var is not None:
        mean, var, batches = mean.clone(), var.clone(), arrays.num_batches_tracked + 1
        momentum = 1.0 / batches if state._momentum is None else state._momentum
        commit(mean, var, None, rows.detach(), count, momentum, state._ddof)
        state._arrays = arrays._replace(running_mean=mean, running_var=var, num_batches_tracked=batches)
    return y


_functional.compiled = torch.compiler.is_compiling, batch_norm
