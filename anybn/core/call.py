"""What a call of batch norm consists of: the types that travel from the check to the kernel and back.

Shapes: x is ``(N, C, *spatial)`` with the channels on ``axis``; everything per channel is ``(C,)``; ``mask`` is x's
shape, or broadcasts to it, mostly with 1 on ``axis``.

All of them are tuples: made by position, never changed, and pytrees for JAX.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeVar

Array = Any
#: The type of the array that a user hands over, which is that of the result: ``ndarray -> ndarray``.
ArrayT = TypeVar("ArrayT")


class Spec(NamedTuple):
    """What stays the same from call to call of one layer; hashable, so that compiled code can be keyed by it."""

    axis: int
    eps: float
    relu: bool = False


#: A Spec that there has been, in half of the time that it takes to make one.
spec_of = functools.lru_cache(Spec)


class RowSpec(NamedTuple):
    """Which values of an array are normalized together, its rows, and how; hashable."""

    shape: tuple[int, int, int]
    """``(N, P, L)``, to which the array can be reshaped, for P weights and biases"""
    values: int
    """of a row, side by side, all those of one or more of the P"""
    eps: float
    centered: bool
    """whether their mean is subtracted; if not, their mean square takes the place of their variance."""


class Update(NamedTuple):
    """What running statistics are to become: ``(1 - momentum) * running + momentum * batch``."""

    running_mean: Array
    running_var: Array
    momentum: float | Array | None
    """None: the cumulative average, where a counter says of how many batches"""
    ddof: int
    """running_var averages ``m2 / (count - ddof)``"""
    propagate: bool
    """whether statistics that are not finite are taken over"""


class Call(NamedTuple):
    """One call of batch norm, checked: everything that a backend has to know, with all arrays beside x."""

    x: Array
    spec: Any
    """a `Spec`; a `RowSpec` for the norms of rows"""
    weight: Array | None = None
    bias: Array | None = None
    residual: Array | None = None
    """added before the activation"""
    mask: Array | None = None
    """of the positions that count"""
    group: Any = None
    """the `anybn.groups.exchange.Members` whose batches count as one; x may be empty then"""
    update: Update | None = None
    """the running statistics that training may update in the same pass"""
    out: Array | None = None
    """to be filled with y"""


class Statistics(NamedTuple):
    """What x is normalized with. ``mean + shift`` is the mean; ``shift`` is None where mean alone is exact enough.

    Of a batch: ``count`` values per channel (an int, or integers, 0-d or ``(C,)``), ``m2`` their summed squared
    deviations, ``var = m2 / count``. Running statistics are constants in the backward pass and have neither count nor
    m2.

    Float32 without float64 behind it holds squares from 1e-38 to 1e38. There, ``scaled_var`` is the variance of
    ``x * scale``, a power of two, where var and m2 are too large or too small; elsewhere both are None.
    """

    count: int | Array | None  # type: ignore[assignment] # hides tuple.count, which nobody misses
    mean: Array
    shift: Array | None
    var: Array
    m2: Array | None = None
    scale: Array | None = None
    scaled_var: Array | None = None


class Gradients(NamedTuple):
    """Gradients of a loss with respect to what went into batch norm; None for what did not.

    ``x`` and ``residual`` have x's shape and dtype; ``weight`` and ``bias`` are ``(C,)`` in the state's dtype. A tuple;
    and by name a mapping of those that are there, ``grads["weight"]``, under the names of `BatchNormState.parameters`.
    """

    x: Array
    weight: Array
    bias: Array
    residual: Array

    def __getitem__(self, key: Any) -> Any:
        """By name or by position. Raises KeyError for a name of none that is there."""
        if not isinstance(key, str):
            return tuple.__getitem__(self, key)
        if key in self._fields and (gradient := getattr(self, key)) is not None:
            return gradient
        raise KeyError(f"{key!r} has no gradient here; there are those of {', '.join(self.keys())}")

    def keys(self) -> tuple[str, ...]:
        """The names of what there is a gradient of."""
        return tuple(name for name, gradient in zip(self._fields, self, strict=True) if gradient is not None)

    def items(self) -> tuple[tuple[str, Array], ...]:
        """(name, gradient) of what there is a gradient of."""
        return tuple((name, getattr(self, name)) for name in self.keys())


def dtype_name(dtype: Any) -> str:
    """``"float32"`` for ``np.float32``, ``np.dtype("f4")``, ``torch.float32``, ``jnp.float32``, ``"float32"``."""
    return _dtype_name(type(dtype), dtype)  # type: ignore[arg-type] # a type is hashable


@functools.lru_cache(maxsize=256)
def _dtype_name(_: Any, dtype: Any) -> str:
    # The type comes first in the cache's key, since some libraries warn when their dtypes are compared with others'.
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    return name.rpartition(".")[2]


def root_module(cls: type) -> str:
    """The library that a type comes from: ``"torch"`` for ``torch.nn.Parameter``."""
    return cls.__module__.partition(".")[0]
