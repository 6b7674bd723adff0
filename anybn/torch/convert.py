"""Models converted to anybn's batch norms, and back."""

from __future__ import annotations

from typing import Any, TypeVar, overload

import torch

from anybn import _settings
from anybn.groups import engines
from anybn.torch import fuse as fusing
from anybn.torch.module import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    _BatchNorm,
    running_dtype,
    set_running_dtype,
)

_OURS = {torch.nn.BatchNorm1d: BatchNorm1d, torch.nn.BatchNorm2d: BatchNorm2d, torch.nn.BatchNorm3d: BatchNorm3d}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


Model = TypeVar("Model", bound=torch.nn.Module)


@overload
def convert(model: Model, *, group: Any = None, fuse: None = None, keep: tuple[type, ...] = ()) -> Model: ...
@overload
def convert(
    model: torch.nn.Module, *, group: Any = None, fuse: tuple[Any, ...], keep: tuple[type, ...] = ()
) -> torch.fx.GraphModule: ...
def convert(
    model: torch.nn.Module,
    *,
    group: Any = None,
    fuse: tuple[Any, ...] | None = None,
    keep: tuple[type, ...] = (),
) -> torch.nn.Module:
    """Make every torch batch norm of a model one of anybn's: BatchNorm1d, BatchNorm2d and BatchNorm3d.

    Each module becomes of the other class where it is. It stays the same object with the same Parameters, hooks, mode
    and names, in all places that share it, so optimizers and checkpoints go on; only its running statistics become
    float64. Convert before DistributedDataParallel wraps the model, which holds on to buffers.

    Args:
        model: any module, a batch norm itself included; anybn's own are left alone, but for their group.
        group: whose batches count as one in training, for every batch norm of the model; see `anybn.distributed`.
            ``anybn.distributed.TorchGroup()`` is all processes. Under DistributedDataParallel, parameters get the
            gradients of its mean over the processes, as without.
        fuse: example inputs, a tuple of the arguments of ``model(...)``. BN -> ReLU and BN -> add -> ReLU then become
            one call each, wherever torch.fx, which traces the model in both modes, shows that nothing else reads what
            lies between, and that what is added has bn's shape and dtype for inputs like these.
        keep: classes of batch norms to leave as they are.

    Returns:
        model; with ``fuse`` a ``torch.fx.GraphModule`` in its place, on the same submodules and with the same
        ``state_dict``.

    Raises, before anything has changed:
        TypeError: for batch norms that cannot be converted, all named: SyncBatchNorm, other subclasses of torch's, lazy
            ones that have not seen a batch, and scripted models.
        ValueError: for settings that anybn refuses, such as eps=0, and for models that torch.fx cannot trace or that
            compute something else in training than in evaluation, with ``fuse``.

    >>> import torch, anybn.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
    >>> model = anybn.torch.convert(model)  # and the optimizer goes on
    >>> fused = anybn.torch.convert(model, fuse=(torch.zeros(2, 1, 8, 8),))
    >>> [str(node.target) for node in fused.graph.nodes]  # no relu after the batch norm, "1"
    ['input', '0', '1', 'output']
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    group = None if group is None else engines.as_group(group)
    found, problems = [], []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            problems.append(f"{name or 'model'} is scripted, and its code is fixed: convert before scripting")
        elif type(module) in _OURS and type(module) not in keep:
            found.append((name, module))
        elif isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and not isinstance(module, (_BatchNorm, *keep)):
            problems.append(f"{name or 'model'} is a {type(module).__name__}: {_why_not(module)}")
    if problems:
        raise TypeError(f"nothing was converted: {'; '.join(problems)}")
    for name, module in found:
        try:
            _settings.eps(module.eps), _settings.momentum(module.momentum)
        except (TypeError, ValueError) as error:
            raise ValueError(f"nothing was converted, because of {name or 'model'}: {error}") from error
    for _, module in found:
        module.__class__ = _OURS[type(module)]
        set_running_dtype(module, lambda buffer: running_dtype(buffer.device))
    result = model
    if fuse is not None:
        try:
            result = fusing.fused(model, tuple(fuse), _BatchNorm)
        except BaseException:
            for _, module in found:
                _revert(module)
            raise
    if group is not None:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.group = group
    return result


def revert(model: Model) -> Model:
    """Undo `convert`: every anybn batch norm of a model becomes torch's, where it is; returns model.

    Running statistics become of weight's dtype, float32 without one. A model that `convert` has fused stays a
    GraphModule, in which addition and relu are operations of their own again.

    Raises TypeError, with nothing changed, if a module has an activation: torch's cannot; name and way out are in it.

    >>> import torch, anybn.torch
    >>> type(anybn.torch.revert(anybn.torch.convert(torch.nn.BatchNorm1d(3))))
    <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    ours = [(name, module) for name, module in model.named_modules() if type(module) in _THEIRS]
    for name, module in ours:
        if module.activation is not None:
            raise TypeError(
                f"nothing was reverted: {name or 'model'} has activation={module.activation!r}, which torch's has not: "
                "put a torch.nn.ReLU after it and set its activation to None"
            )
    for module in list(model.modules()):
        if isinstance(module, torch.fx.GraphModule):
            fusing.unfused(module, _BatchNorm)
    for _, module in ours:
        _revert(module)
    return model


def _revert(module: torch.nn.Module) -> None:
    module.__class__ = _THEIRS[type(module)]
    module.__dict__.pop("group", None)
    set_running_dtype(module, lambda _: torch.float32 if module.weight is None else module.weight.dtype)


def _why_not(module: torch.nn.Module) -> str:
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        return "run a batch through the model first, which tells it its channels"
    if isinstance(module, torch.nn.SyncBatchNorm):
        return (
            "start from the model as it was before convert_sync_batchnorm and pass group=, or keep it with "
            "keep=(torch.nn.SyncBatchNorm,)"
        )
    return f"a subclass may do anything in its forward; keep it with keep=({type(module).__name__},)"
