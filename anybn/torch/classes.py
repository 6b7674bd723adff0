"""Which class of ours a module of another class becomes, and which it was.

Classes are found by their exact type or by its dotted name, so that nobody's package is imported.
"""

from __future__ import annotations

import copyreg
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from anybn.groups.engines import TorchGroup
from anybn.torch import compiled
from anybn.torch.fuse import has_hooks
from anybn.torch.module import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm

_TORCHS = torch.nn.modules.batchnorm._BatchNorm
OURS: dict[type, type[_BatchNorm]] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
}
_THEIRS = {ours: theirs for theirs, ours in OURS.items()}
_registered: dict[type | str, type[_BatchNorm]] = {}


class _OfAnyRank(_BatchNorm):
    """For classes of torch's base class that are none of its three."""

    _ranks, _shapes = range(2, 65), "(N, C, ...)"


class _Checked(_BatchNorm):
    """For classes with a check of their own, which is called."""

    _ranks = ()

    def _check_input_dim(self, input: Any) -> None:
        super(_BatchNorm, self)._check_input_dim(input)


class _SyncBatchNorm(_OfAnyRank):
    """torch's SyncBatchNorm: its process group is ours."""

    def converted(self) -> None:
        self.group = TorchGroup(self.process_group)


class _FrozenBatchNorm2d(torch.nn.Module):
    """torchvision's and detectron2's: buffers alone, and always evaluation. None of torch's batch norms either, so what
    trains, recalibrates or synchronizes these leaves it alone. One pass over x takes the place of two."""

    activation = group = num_batches_tracked = _block = None
    momentum, affine, track_running_stats, training = 0.0, True, True, property(lambda _: False, lambda *_: None)
    _ranks, _shapes = BatchNorm2d._ranks, BatchNorm2d._shapes
    forward, state, _check_input_dim = _BatchNorm.forward, _BatchNorm.state, _BatchNorm._check_input_dim

    @property
    def num_features(self) -> int:
        return len(self.running_mean)


class ThenDropAndAct:
    """timm's BatchNormAct2d: its modules ``drop`` and ``act`` come after batch norm, where it has them.

    A ReLU goes into the same pass, unless something watches it or an exporter writes it down.
    """

    _modules: dict[str, Any]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        forward = super().forward  # type: ignore[misc]
        drop, act = self._modules.get("drop"), self._modules.get("act")
        alone = type(act) is torch.nn.ReLU and (drop is None or type(drop) is torch.nn.Identity)
        if alone and not has_hooks(act) and not has_hooks(drop) and not compiled.is_exporting():
            return forward(input, None, "relu")
        y = forward(input)
        y = y if drop is None else drop(y)
        return y if act is None else act(y)


class _BatchNormAct2d(ThenDropAndAct, BatchNorm2d):  # type: ignore[misc]
    pass


class _SyncBatchNormAct(ThenDropAndAct, _SyncBatchNorm):  # type: ignore[misc]
    pass


class _FrozenBatchNormAct2d(ThenDropAndAct, _FrozenBatchNorm2d):  # type: ignore[misc]
    pass


Bases = Callable[[type], tuple[type, ...]]

#: theirs by name -> of which classes ours is made, in the order in which a method is looked for. An instance of
#: SyncBatchNorm is refused by DistributedDataParallel on the CPU. What SplitBatchNorm2d.forward reaches by
#: ``super().forward`` is ours.
_KNOWN: dict[str, Bases] = {
    "torch.nn.modules.batchnorm.SyncBatchNorm": lambda _: (_SyncBatchNorm,),
    "timm.layers.norm_act.BatchNormAct2d": lambda theirs: (_BatchNormAct2d, theirs),
    "timm.layers.norm_act.SyncBatchNormAct": lambda _: (_SyncBatchNormAct,),
    "timm.layers.norm_act.FrozenBatchNormAct2d": lambda theirs: (_FrozenBatchNormAct2d, theirs),
    "torchvision.ops.misc.FrozenBatchNorm2d": lambda theirs: (_FrozenBatchNorm2d, theirs),
    "detectron2.layers.batch_norm.FrozenBatchNorm2d": lambda theirs: (_FrozenBatchNorm2d, theirs),
    "timm.layers.split_batchnorm.SplitBatchNorm2d": lambda theirs: (theirs, BatchNorm2d),
}


def register(theirs: type | str, ours: type[_BatchNorm]) -> None:
    """Have `convert` make modules of a class instances of another, in this process.

    Args:
        theirs: the class, or its name with its module, "package.file.Class", which then need not be imported. Its
            subclasses are not meant.
        ours: a subclass of one of `anybn.torch`'s, whose ``forward`` does what theirs does. A module becomes of a class
            made of both, and is an instance of theirs too. A method ``converted(self)``, if it has one, is called then.

    Raises TypeError for anything else.

    Where ``theirs.forward`` reaches torch's by ``super().forward(x)``, the class is one line:

    >>> import torch, anybn.torch
    >>> class Doubled(torch.nn.BatchNorm1d):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> class OurDoubled(Doubled, anybn.torch.BatchNorm1d):
    ...     "Doubled.forward now reaches anybn's."
    >>> anybn.torch.register(Doubled, OurDoubled)
    >>> bn = anybn.torch.convert(Doubled(2))
    >>> bn(torch.tensor([[1.0, 5.0], [3.0, 9.0]])).detach().round(decimals=3)
    tensor([[-2., -2.],
            [ 2.,  2.]])
    """
    _registered[theirs] = checked(ours, theirs)


def checked(ours: Any, theirs: type | str) -> type[_BatchNorm]:
    """ours, if it can stand for theirs."""
    if not isinstance(theirs, (type, str)):
        raise TypeError(f"theirs is a {type(theirs).__name__}; it must be a class or its name")
    if not (isinstance(ours, type) and issubclass(ours, _BatchNorm)):
        name = theirs if isinstance(theirs, str) else theirs.__name__
        raise TypeError(
            f"ours for {name} is {getattr(ours, '__name__', repr(ours))}; it must be a subclass of "
            "anybn.torch.BatchNorm1d, BatchNorm2d or BatchNorm3d"
        )
    return ours


def ours_for(theirs: Any, also: Mapping[type, type[_BatchNorm]]) -> type[_BatchNorm] | None:
    """The class that modules of this class become; None if nobody knows."""
    name = f"{theirs.__module__}.{theirs.__qualname__}"
    if (ours := also.get(theirs) or _registered.get(theirs) or _registered.get(name)) is not None:
        return _joined(theirs, (ours,) if issubclass(ours, theirs) else (ours, theirs))
    if theirs in OURS:
        return OURS[theirs]
    if (bases := _KNOWN.get(name)) is not None:
        return _joined(theirs, bases(theirs))
    if not issubclass(theirs, _TORCHS) or issubclass(theirs, (_BatchNorm, LazyModuleMixin)):
        return None
    if getattr(theirs, "forward", None) is not _TORCHS.forward:
        return None
    checks = next(cls for cls in theirs.__mro__ if "_check_input_dim" in vars(cls))
    return _joined(theirs, (OURS.get(checks, _Checked), theirs))


def base_of(module: torch.nn.Module) -> type:
    """The module's class, under the one that torch.nn.utils.parametrize makes for a module."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def set_base(module: torch.nn.Module, cls: type) -> None:
    """Make module an instance of cls, which `base_of` gives then."""
    if is_parametrized(module):
        cls = type(f"Parametrized{cls.__name__}", (cls,), dict(vars(type(module))))
    module.__class__ = cls


def theirs_of(ours: type) -> type | None:
    """The class that modules of this class were of; None if they were made as ours."""
    return _THEIRS.get(ours) or vars(ours).get("_theirs")


#: The classes that `_joined` has made, by its arguments, as long as there are instances.
_made: weakref.WeakValueDictionary[tuple[Any, ...], type] = weakref.WeakValueDictionary()


def _joined(theirs: Any, bases: tuple[type, ...]) -> type[_BatchNorm]:
    """The class of these bases with the name of theirs. Its instances are pickled by what it is made of."""
    if (made := _made.get((theirs, bases))) is not None:
        return made

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        make, arguments, *rest = super(cls, self).__reduce_ex__(protocol)
        if make is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return (make, arguments, *rest)
        return (_new, (theirs, bases), *rest)

    names = ("__module__", "__qualname__", "__doc__")
    contents = {name: getattr(theirs, name) for name in names}
    cls: Any = type(theirs.__name__, bases, contents | {"_theirs": theirs, "__reduce_ex__": __reduce_ex__})
    return _made.setdefault((theirs, bases), cls)


def _new(theirs: type, bases: tuple[type, ...]) -> Any:
    cls = _joined(theirs, bases)
    return cls.__new__(cls)
