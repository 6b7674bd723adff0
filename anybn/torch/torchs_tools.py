"""Tools of torch that look at a batch norm's class or at the dtype of its statistics, told what ours are.

Each is a function of torch's that is wrapped where it lies, and does for all other modules what it did. A file of
torch's that nobody has imported is not imported for it: the wrapper is put around when somebody does.
"""

from __future__ import annotations

import functools
import importlib.machinery
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import torch

from anybn.groups.engines import TorchGroup
from anybn.torch.classes import OURS, theirs_of
from anybn.torch.module import _BatchNorm, set_running_dtype


def _as_torchs(cls: type) -> type:
    """torch's class that a class of ours stands for where layers are fused, if it stands for one alone."""
    theirs = theirs_of(cls)
    return theirs if theirs in OURS else cls


def _type_of(module: torch.nn.Module) -> type:
    alone = isinstance(module, _BatchNorm) and module.activation is None
    return _as_torchs(type(module)) if alone else type(module)


def _fusing(of_fx: ModuleType) -> None:
    """``torch.fx.experimental.optimization.fuse`` asks what follows what."""
    matches = of_fx.matches_module_pattern

    def matches_module_pattern(pattern: tuple[type, type], node: torch.fx.Node, modules: dict[str, Any]) -> bool:
        layer, norm = pattern
        ours = modules.get(node.target) if isinstance(node.target, str) else None
        if isinstance(ours, _BatchNorm) and len(node.args) == 1 and not node.kwargs and _type_of(ours) is norm:
            return bool(matches((layer, type(ours)), node, modules))
        return bool(matches(pattern, node, modules))

    of_fx.matches_module_pattern = matches_module_pattern  # type: ignore[attr-defined]


def _quantizing(_: ModuleType) -> None:
    """All of torch.ao asks this function for a module's class."""
    theirs = torch.nn.utils.parametrize.type_before_parametrizations

    @functools.wraps(theirs)
    def type_before_parametrizations(module: torch.nn.Module) -> type:
        return _type_of(module) if isinstance(module, _BatchNorm) else theirs(module)

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith(("torch.ao.", "torch.nn.utils.parametrize")):
            for name, value in list(vars(module).items()):
                if value is theirs:
                    setattr(module, name, type_before_parametrizations)


def _to_mkldnn(mkldnn: ModuleType) -> None:
    """``torch.utils.mkldnn.to_mkldnn`` takes float32 statistics alone."""
    theirs = mkldnn.MkldnnBatchNorm

    def mkldnn_batch_norm(module: torch.nn.Module) -> torch.nn.Module:
        if not isinstance(module, _BatchNorm):
            return theirs(module)
        if module.activation is not None:
            return module
        with in_float32(module):
            return theirs(module)

    mkldnn.MkldnnBatchNorm = mkldnn_batch_norm  # type: ignore[attr-defined]


def _synchronizing(_: ModuleType) -> None:
    """``SyncBatchNorm.convert_sync_batchnorm``: a module of ours is one already, with a group."""
    theirs = torch.nn.SyncBatchNorm.convert_sync_batchnorm.__func__  # type: ignore[attr-defined]

    @functools.wraps(theirs)
    def convert_sync_batchnorm(cls: type, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        if not isinstance(module, _BatchNorm):
            return theirs(cls, module, process_group)
        module.group = TorchGroup(process_group)
        return module

    torch.nn.SyncBatchNorm.convert_sync_batchnorm = classmethod(convert_sync_batchnorm)  # type: ignore


def _training_quantized(_: ModuleType) -> None:
    """torch.ao's layers for quantization-aware training take over the statistics of a fused batch norm."""
    from torch.ao.nn.intrinsic.qat.modules.conv_fused import _ConvBnNd
    from torch.ao.nn.intrinsic.qat.modules.linear_fused import LinearBn1d

    for layer in (_ConvBnNd, LinearBn1d):
        setattr(layer, "from_float", classmethod(_in_float32(layer.from_float.__func__, 1)))  # noqa: B010


def _exporting(function: str) -> Callable[[ModuleType], None]:
    """An export of torch's, whose first argument is the model."""

    return lambda module: setattr(module, function, _in_float32(getattr(module, function), 0))


def _in_float32(function: Callable[..., Any], index: int) -> Callable[..., Any]:
    """function with `in_float32` around it, for the model that is its argument of this index."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        with in_float32(next(iter((*args[index:], *options.values())), None)):
            return function(*args, **options)

    return wrapped


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """The running statistics of a model's modules of ours in float32, or in weight's dtype if that is wider.

    So an exporter finds them as torch's own module has them: buffers that batch norm takes as they are.
    """
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    held = [(module, dict(module._buffers)) for module in modules if isinstance(module, _BatchNorm)]
    try:
        for module, _ in held:
            wide = module.weight is not None and module.weight.dtype is torch.float64
            set_running_dtype(module, lambda _: torch.float64 if wide else torch.float32)  # noqa: B023
        yield
    finally:
        for module, buffers in held:
            module._buffers.update(buffers)


_TOLD: dict[str, Callable[[ModuleType], None]] = {
    "torch.nn.modules.batchnorm": _synchronizing,
    "torch.nn.utils.parametrize": _quantizing,
    "torch.ao.nn.intrinsic.qat.modules": _training_quantized,
    "torch.fx.experimental.optimization": _fusing,
    "torch.utils.mkldnn": _to_mkldnn,
    "torch.export._trace": _exporting("_export"),
    "torch.onnx._internal.torchscript_exporter.utils": _exporting("_export"),
    "torch.onnx.utils": _exporting("_export"),  # where it was before torch 2.9
}


def _wrap(name: str, module: ModuleType) -> None:
    with suppress(AttributeError, ImportError):  # a torch that has it elsewhere goes on without
        _TOLD[name](module)


class _WhenImported:
    """A finder that wraps what is in `_TOLD` when it is imported."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name in _TOLD else None
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _wrap(name, module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def tell() -> None:
    """Wrap them all, once in a process."""
    for name in _TOLD:
        if name in sys.modules:
            _wrap(name, sys.modules[name])
    sys.meta_path.insert(0, _WhenImported)  # type: ignore[arg-type]
