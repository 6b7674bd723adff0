"""What anybn is inside torch.compile and torch.export, neither of which can follow its dispatch.

Under torch.compile, batch norm is the core's formulas in torch's operations, `anybn.backends.torch.traced`. Under
torch.export, it is one batch norm of torch's, `anybn.torch.exported`. What either makes runs without anybn.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from anybn import _checks, _functional, _settings
from anybn.backends.torch import TorchBackend, traced
from anybn.core.call import Call, Spec
from anybn.errors import StateError
from anybn.state.state import BatchNormState
from anybn.state.store import Store
from anybn.torch import exported

_TORCH = TorchBackend()
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # from torch 2.7


def is_exporting() -> bool:
    """Whether torch.export or an exporter to ONNX records what is done."""
    return _is_exporting() or (not torch.compiler.is_compiling() and in_onnx_export())


def in_onnx_export() -> bool:
    """Whether the exporter to ONNX that traces records what is done; torch.onnx is imported with its first use."""
    return torch.jit.is_tracing() and "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def _check(x: Tensor, residual: Tensor | None, axis: int, channels: int, arrays: tuple[Tensor | None, ...]) -> None:
    """What torch.compile can look at of the checks; where it fails, the check itself has the words."""
    _checks.state_arrays(arrays, channels)
    if not -x.ndim <= axis < x.ndim or x.ndim < 2 or x.shape[axis] != channels or not x.dtype.is_floating_point:
        _checks.batch(x, _TORCH, axis, channels)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        _checks.like_x("residual", residual, x, _TORCH)


def eagerly(function: Any) -> Any:
    """What torch.compile ends its graph at. A group's collectives must keep their order on all members, and a compiler
    may exchange those of parallel branches, by sizes that differ from member to member."""
    return torch.compiler.disable(function)


def _evaluated(call: Call, mean: Tensor | None, var: Tensor | None) -> Tensor:
    if mean is None or var is None:  # of an empty x
        channels, working = call.x.shape[call.spec.axis], _TORCH.working_dtype(call.x)
        mean, var = (call.x.new_zeros(channels, dtype=working) for _ in range(2))
    if not is_exporting():
        return traced.normalize(call, traced.running_statistics(call.x, mean, var))
    x, (axis, eps, relu), weight, bias, residual = call[:5]
    if axis == 1:
        return exported.evaluated(x, mean, var, weight, bias, residual, eps, relu)
    behind = residual if residual is None else residual.movedim(axis, 1)
    return exported.evaluated(x.movedim(axis, 1), mean, var, weight, bias, behind, eps, relu).movedim(1, axis)


def _commit(statistics: Any, mean: Tensor, var: Tensor, batches: Tensor | None, momentum: float | None) -> None:
    """Into a module's buffers."""
    factor: Any = momentum
    if momentum is None:
        factor = 0.0 if batches is None else 1.0 / (batches + 1).to(mean.dtype)
    with torch.no_grad():
        new_mean, new_var = traced.updated_running_statistics(statistics, mean, var, factor, 1)
        mean.copy_(new_mean), var.copy_(new_var)
        if batches is not None:
            batches.add_(1)


def forward(module: Any, x: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """A module's forward pass where torch records it, for torch.compile or torch.export."""
    over_group = module.group is not None and (module.training or module.running_mean is None)
    if over_group or (module._block is not None and module.training):
        if is_exporting():
            raise NotImplementedError("torch.export cannot take a group or accumulate into its graph: export without")
        return eagerly(module.forward)(x, residual, activation)
    module._check_input_dim(x)
    state = module.weight, module.bias, module.running_mean, module.running_var
    _check(x, residual, 1, module.num_features, state)
    eps, momentum = module.eps, module.momentum
    if not eps > 0 or not (momentum is None or 0 <= momentum <= 1):
        _settings.eps(eps), _settings.momentum(momentum)
    _settings.choice("activation", activation, (None, "relu"))
    relu, (weight, bias, mean, var) = activation == "relu", state
    parameters = weight, bias, residual
    call = Call(x, Spec(1, eps, relu), *parameters)
    if x.numel() and (module.training or mean is None):
        count = x.numel() // x.shape[1]
        if count < 2:
            _checks.enough_values(count, x, False)
        if is_exporting():
            return exported.trained(module, x, residual, relu)
        statistics = traced.batch_statistics(x, 1, None)
        if module.training and module.track_running_stats and mean is not None:
            _commit(statistics, mean, var, module.num_batches_tracked, momentum)
        return traced.normalize(call, statistics)
    if is_exporting():
        return exported.evaluated(x, mean, var, *parameters, eps, relu, momentum)
    return _evaluated(call, mean, var)


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
    if not isinstance(state, BatchNormState):
        raise NotImplementedError(f"torch.compile takes states of anybn into its graph, and no {type(state).__name__}")
    store = state._store
    over_group = group is not None and (training or not state.track_running_stats)
    if over_group or (store.block is not None and training):
        options = {"mask": mask, "residual": residual, "nonfinite": nonfinite, "group": group, "out": out}
        call = eagerly(_functional.batch_norm)
        return call(x, state, training=training, axis=axis, activation=activation, **options)
    if out is not None or nonfinite not in ("skip", "propagate"):
        raise NotImplementedError("torch.compile cannot take out, or nonfinite='raise', into its graph: leave them")
    if not isinstance(x, Tensor):
        raise NotImplementedError("torch.compile takes batch norm of torch tensors into its graph, and no other arrays")
    if type(store) is not Store:
        raise NotImplementedError("torch.compile cannot take a module's state into its graph: call the module itself")
    arrays = store.arrays
    for array in arrays[:4]:
        if array is not None and not isinstance(array, Tensor):
            raise StateError("torch.compile cannot move a state: call state.to(x) before")
    _check(x, residual, axis, store.num_features, arrays[:4])
    _settings.choice("activation", activation, (None, "relu"))
    axis = axis % x.ndim
    mask = None if mask is None else _checks.mask(mask, x, axis, _TORCH)
    if mask is not None and is_exporting():
        raise NotImplementedError("torch.export cannot take mask into torch's batch norm: leave it")
    call = Call(x, Spec(axis, store.eps, activation == "relu"), arrays.weight, arrays.bias, residual, mask)
    mean, var = arrays.running_mean, arrays.running_var
    if not x.numel() or not (training or mean is None):
        return _evaluated(call, mean, var)
    if is_exporting():
        raise StateError("torch.export cannot keep a state that a call changes: export one of anybn.torch's modules")
    count = x.numel() // x.shape[axis]
    if count < 2:
        _checks.enough_values(count, x, False)
    statistics = traced.batch_statistics(x, axis, mask)
    if training and mean is not None and var is not None:
        batches = arrays.num_batches_tracked + 1
        momentum = 1.0 / batches if store.momentum is None else store.momentum
        rest = momentum, store.ddof, nonfinite == "propagate"
        mean, var = traced.updated_running_statistics(statistics, mean, var, *rest)
        store.arrays = arrays._replace(running_mean=mean, running_var=var, num_batches_tracked=batches)
    return traced.normalize(call, statistics)


_functional.compiled = torch.compiler.is_compiling, batch_norm
