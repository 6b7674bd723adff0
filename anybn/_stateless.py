"""Batch norm as a function of arrays, which a framework's layer holds: its running statistics go in and come out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from anybn._functional import batch_norm
from anybn.core.call import Array, dtype_name
from anybn.state.arrays import Arrays
from anybn.state.state import BatchNormState
from anybn.state.store import Store


def few_values(x: Array, axis: int) -> bool:
    """Whether x has fewer values per channel than `anybn.batch_norm` trains on, but some, which frameworks allow."""
    return 0 < math.prod(x.shape) < 2 * x.shape[axis]


class Held(NamedTuple):
    """What a layer holds, each ``(C,)``, beside x: weight and bias may be None."""

    weight: Array | None
    bias: Array | None
    mean: Array
    var: Array


class _OfOneCall(Store):
    """A store that is gone with the call, and so may keep whatever that makes."""

    __slots__ = ()
    outlives_calls = False


def batch_norm_of(
    x: Array, held: Held, *, eps: float, momentum: float, training: bool, axis: int, **options: Any
) -> tuple[Array, Array, Array]:
    """(y, mean, var): `anybn.batch_norm`, and the running statistics after it, which average biased variances.

    momentum is that of a state; with 1, a batch's own statistics come out. options: mask, residual, activation, group.
    """
    settings = held.mean.shape[0], float(eps), float(momentum), 0, dtype_name(held.mean.dtype)
    state = BatchNormState._over(_OfOneCall.of(settings, Arrays(*held, 0)))
    y = batch_norm(x, state, training=training, axis=axis, **options)
    return y, state.running_mean, state.running_var
