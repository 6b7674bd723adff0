"""Models converted to anybn's batch norms, and back."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeVar, overload

import torch
from torch.nn.utils import parametrize

from anybn import _settings
from anybn.groups import engines
from anybn.torch import classes
from anybn.torch import fuse as fusing
from anybn.torch.module import BUFFERS, _BatchNorm, running_dtype, set_running_dtype

Model = TypeVar("Model", bound=torch.nn.Module)


@overload
def convert(
    model: Model,
    *,
    group: Any = None,
    fuse: None = None,
    keep: tuple[type, ...] = (),
    also: Mapping[type, type[_BatchNorm]] = ...,
    strict: Literal[True] = True,
) -> Model: ...
@overload
def convert(
    model: torch.nn.Module,
    *,
    group: Any = None,
    fuse: tuple[Any, ...],
    keep: tuple[type, ...] = (),
    also: Mapping[type, type[_BatchNorm]] = ...,
    strict: Literal[True] = True,
) -> torch.fx.GraphModule: ...
@overload
def convert(
    model: torch.nn.Module,
    *,
    group: Any = None,
    fuse: None = None,
    keep: tuple[type, ...] = (),
    also: Mapping[type, type[_BatchNorm]] = ...,
    strict: Literal[False],
) -> dict[str, str]: ...
def convert(
    model: torch.nn.Module,
    *,
    group: Any = None,
    fuse: tuple[Any, ...] | None = None,
    keep: tuple[type, ...] = (),
    also: Mapping[type, type[_BatchNorm]] = MappingProxyType({}),
    strict: bool = True,
) -> torch.nn.Module | dict[str, str]:
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
        also: their class -> a class that does the same with anybn, as `register` takes them.
        strict: False to convert what can be, and to leave the rest.

    Besides torch's three classes these become of a class of ours: subclasses whose ``forward`` is torch's own;
    SyncBatchNorm, with its process group as ``group``; timm's BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d
    and SplitBatchNorm2d; torchvision's and detectron2's FrozenBatchNorm2d; and what `register` and ``also`` name. All
    but the synchronized ones stay instances of the class that they were of.

    Returns:
        model; with ``fuse`` a ``torch.fx.GraphModule`` in its place, on the same submodules and with the same
        ``state_dict``, but for what its forward does not use; with ``strict=False`` the names of the batch norms that
        were left, each with the reason.

    Raises, before anything has changed:
        TypeError: for batch norms that cannot be converted, all named: other subclasses of torch's with a forward of
            their own, lazy ones that have not seen a batch, and scripted ones.
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
    if fuse is not None and not strict:
        raise ValueError("strict=False returns what was left, fuse a new model: convert first, then again with fuse")
    group = None if group is None else engines.as_group(group)
    strict = _settings.flag("strict", strict)
    if not (isinstance(keep, (tuple, list)) and all(isinstance(cls, type) for cls in keep)):
        raise TypeError(f"keep is {keep!r}; it must be a tuple of classes, ({getattr(keep, '__name__', 'Class')},)")
    if not isinstance(also, Mapping):
        raise TypeError(f"also is a {type(also).__name__}; it must be a mapping of their classes to ours")
    if not (fuse is None or isinstance(fuse, (tuple, list))):
        raise TypeError(f"fuse is a {type(fuse).__name__}; it must be a tuple of the arguments of model(...), as (x,)")
    also = {theirs: classes.checked(ours, theirs) for theirs, ours in also.items()}
    found: list[tuple[torch.nn.Module, type]] = []
    left: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, (_BatchNorm, *keep)) or _theirs(module):
            continue
        ours = classes.ours_for(classes.base_of(module), also)
        if problem := _problem(module, ours):
            left[name or "model"] = problem
        elif ours is not None and (problem := _refused_settings(module)):
            if issubclass(ours, _BatchNorm):  # frozen ones with eps=0 go on as they are
                refused[name or "model"] = problem
        elif ours is not None:
            found.append((module, ours))
    if left and strict:
        raise TypeError(f"nothing was converted: {_by_class(left)}")
    if refused and strict:
        raise ValueError(f"nothing was converted: {_by_class(refused)}")
    changed = []
    try:
        for module, ours in found:
            changed.append(module)
            _convert(module, ours)
        result = model if fuse is None else fusing.fused(model, tuple(fuse), _BatchNorm)
    except BaseException:
        for module in changed:
            if _theirs(module):
                _revert(module)
        raise
    if group is not None:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.group = group
    return result if strict else left | refused


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
    ours = [(name, module) for name, module in model.named_modules() if _theirs(module)]
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


def _theirs(module: Any) -> Any:
    return classes.theirs_of(classes.base_of(module))


def _convert(module: Any, ours: type) -> None:
    classes.set_base(module, ours)
    if isinstance(module, _BatchNorm):
        set_running_dtype(module, lambda buffer: running_dtype(buffer.device))
    if hasattr(module, "converted"):
        module.converted()


def _revert(module: Any) -> None:
    classes.set_base(module, _theirs(module))
    module.__dict__.pop("group", None)
    parameter = module.bias if module.weight is None else module.weight
    set_running_dtype(module, lambda _: torch.float32 if parameter is None else parameter.dtype)


#: What the code of ours reads of a module.
_NEEDED = ("num_features", "eps", "momentum", "track_running_stats", "weight", "bias")


def _problem(module: Any, ours: type | None) -> str:
    """What is wrong with converting this module, after "it is"; "" for nothing, and for what is no batch norm."""
    kind = f"a {classes.base_of(module).__name__}"
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted, and its code is fixed: convert before scripting"
    if ours is None:
        if not isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            return ""
        if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
            return f"{kind}: run a batch through the model first, which tells it its channels"
        return (
            f"{kind}: its forward is its own and may do anything; keep it with keep=({kind[2:]},), or say which class "
            f"does the same with also={{{kind[2:]}: ...}}, see anybn.torch.register"
        )
    if missing := [name for name in (*_NEEDED, *BUFFERS) if not hasattr(module, name) and not hasattr(ours, name)]:
        return f"{kind} without {', '.join(missing)}, which {ours.__name__} needs: give that class what it lacks"
    if parametrized := [name for name in BUFFERS if parametrize.is_parametrized(module, name)]:
        return f"{kind} whose {parametrized[0]} is parametrized, and no step can write to it: keep it, or remove that"
    if "forward" in vars(module):
        return f"{kind} whose forward was replaced on the object: convert before that is done, or keep it"
    return ""


def _refused_settings(module: Any) -> str:
    try:
        _settings.eps(module.eps), _settings.momentum(getattr(module, "momentum", None))
    except (TypeError, ValueError) as error:
        return f"a {type(module).__name__} with settings that anybn refuses: {error}"
    return ""


def _by_class(left: dict[str, str]) -> str:
    """Which layers, and why, each reason once."""
    names: dict[str, list[str]] = {}
    for name, problem in left.items():
        names.setdefault(problem, []).append(name)
    lines = []
    for problem, (first, *others) in names.items():
        more = others if len(others) < 4 else [*others[:2], f"{len(others) - 2} more"]
        who = f"each of {', '.join([first, *more[:-1]])} and {more[-1]}" if more else first
        lines.append(f"{who} is {problem}")
    return "; ".join(lines)
