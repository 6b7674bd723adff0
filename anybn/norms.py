"""Group, layer, instance and RMS norm, for batches too small for batch norm. They keep nothing.

All four are batch norm with other roles of the axes: values that are normalized together are laid out as one row of an
array ``(1, rows, values)``, whose rows are batch norm's channels. Its core, backends and gradients do the rest, in the
working dtype, and the weight and bias, which belong to other axes, are applied before the only rounding. Instance norm,
and the others without weight and bias, are one call of the kernels; else arrays of the working dtype are made, which is
exact and takes several times as long.

>>> import numpy as np
>>> from anybn import norms
>>> norms.layer_norm(np.array([[1.0, 2.0, 3.0], [10.0, 10.0, 40.0]])).round(3)
array([[-1.225,  0.   ,  1.225],
       [-0.707, -0.707,  1.414]])
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from anybn import _checks, _core
from anybn._core import Array, Gradients, Spec, Statistics
from anybn._dispatch import backend_for
from anybn.backends._base import Backend

__all__ = [
    "group_norm",
    "group_norm_vjp",
    "instance_norm",
    "instance_norm_vjp",
    "layer_norm",
    "layer_norm_vjp",
    "rms_norm",
    "rms_norm_vjp",
]

Pullback = Callable[[Array], Gradients]


def group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
) -> Array:
    """Normalize each group of channels of each sample (Wu & He 2018); the same in training and evaluation.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, with mean and biased variance over the channels of a group and
    all other axes but the batch's.

    Args:
        x: ``(N, C, *spatial)``, float16, bfloat16, float32 or float64, of any array library. The batch is on axis 0, or
            on axis 1 where the channels are on 0.
        num_groups: of consecutive channels, a divisor of C.
        weight, bias: ``(C,)`` of x's library and device, any of those dtypes; or None.
        eps: > 0.
        axis: the channel axis.

    Returns y in x's shape, dtype, library and device; differentiable in x, weight and bias in torch and JAX, to any
    order. An empty x gives an empty y.

    Raises TypeError or ValueError for arguments outside of the above and for groups of fewer than 2 values.

    >>> import numpy as np, anybn
    >>> anybn.group_norm(np.array([[1.0, 3.0, 10.0, 30.0]]), 2).round(3)
    array([[-1.,  1., -1.,  1.]])
    """
    return _apply(_channels(x, num_groups, axis, eps), weight, bias)


def group_norm_vjp(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
) -> tuple[Array, Pullback]:
    """`group_norm` and its gradient, for libraries without automatic differentiation, which does not see this call.

    Returns (y, pullback): ``pullback(dy)`` gives ``Gradients(x, weight, bias, None)``, in the dtypes of what they are
    the gradients of; None for what was not given.

    >>> import numpy as np
    >>> from anybn import norms
    >>> y, pullback = norms.group_norm_vjp(np.array([[1.0, 3.0]]), 1, np.ones(2))
    >>> pullback(y).weight.round(3)
    array([1., 1.])
    """
    return _vjp(_channels(x, num_groups, axis, eps), weight, bias)


def instance_norm(
    x: Array, weight: Array | None = None, bias: Array | None = None, *, eps: float = 1e-5, axis: int = 1
) -> Array:
    """Normalize each channel of each sample (Ulyanov, Vedaldi & Lempitsky 2016): `group_norm` with groups of one.

    >>> import numpy as np, anybn
    >>> anybn.instance_norm(np.array([[[1.0, 3.0], [10.0, 30.0]]])).round(3)
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """
    return _apply(_channels(x, None, axis, eps), weight, bias)


def instance_norm_vjp(
    x: Array, weight: Array | None = None, bias: Array | None = None, *, eps: float = 1e-5, axis: int = 1
) -> tuple[Array, Pullback]:
    """`instance_norm` and its gradient, as `group_norm_vjp` gives them."""
    return _vjp(_channels(x, None, axis, eps), weight, bias)


def layer_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    axes: int | tuple[int, ...] = -1,
) -> Array:
    """Normalize x over some of its axes, mostly the features of each token or sample (Ba, Kiros & Hinton 2016).

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, with mean and biased variance over ``axes``.

    Args:
        x: of 1 or more axes, float16, bfloat16, float32 or float64, of any array library.
        weight, bias: of x's library and device, in the shape of ``axes``; or None.
        eps: > 0.
        axes: an axis or several, in increasing order. torch's ``normalized_shape`` is that of the last axes.

    Returns and raises what `group_norm` does.

    >>> import numpy as np, anybn
    >>> anybn.layer_norm(np.array([[1.0, 3.0], [10.0, 30.0]]), np.array([1.0, 2.0])).round(3)
    array([[-1.,  2.],
           [-1.,  2.]])
    """
    return _apply(_features(x, axes, eps, centered=True), weight, bias)


def layer_norm_vjp(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    axes: int | tuple[int, ...] = -1,
) -> tuple[Array, Pullback]:
    """`layer_norm` and its gradient, as `group_norm_vjp` gives them."""
    return _vjp(_features(x, axes, eps, centered=True), weight, bias)


def rms_norm(x: Array, weight: Array | None = None, *, eps: float = 1e-5, axes: int | tuple[int, ...] = -1) -> Array:
    """Divide x by its root mean square over some of its axes (Zhang & Sennrich 2019).

    ``y = x / sqrt(mean(x**2) + eps) * weight``; arguments, result and errors as in `layer_norm`. torch's default eps is
    x's machine epsilon, that of most language models 1e-5 or 1e-6. It takes twice the memory of `layer_norm`: the mean
    of x and -x together is 0 and their variance the mean square of x, so their batch norm is x's RMS norm.

    >>> import numpy as np, anybn
    >>> anybn.rms_norm(np.array([[3.0, 4.0], [30.0, 40.0]])).round(3)
    array([[0.849, 1.131],
           [0.849, 1.131]])
    """
    return _apply(_features(x, axes, eps, centered=False), weight, None)


def rms_norm_vjp(
    x: Array, weight: Array | None = None, *, eps: float = 1e-5, axes: int | tuple[int, ...] = -1
) -> tuple[Array, Pullback]:
    """`rms_norm` and its gradient, as `group_norm_vjp` gives them."""
    return _vjp(_features(x, axes, eps, centered=False), weight, None)


class _Call(NamedTuple):
    """A norm of x whose arguments have been checked."""

    backend: Backend
    x: Array
    eps: float
    order: tuple[int, ...]
    """x's axes with those of a row last; in this order, x has the shape"""
    split: tuple[int, ...]
    """with the channels in groups, and that of"""
    rows: tuple[int, int]
    """rows and values per row."""
    parameter_axes: tuple[int, ...]
    """the axes of x that weight and bias belong to."""
    centered: bool
    """whether the mean is subtracted."""
    of_channels: bool = False
    """whether each row is of one channel, as in instance norm, and so has one weight and bias."""


def _channels(x: Array, num_groups: int | None, axis: int, eps: float) -> _Call:
    backend = backend_for(x)
    index = _checks.batch(x, backend, axis, None)
    shape = _checks.shape_of(x)
    groups = shape[index] if num_groups is None else _checks.positive("num_groups", num_groups)
    if shape[index] % groups if groups else shape[index]:
        raise ValueError(
            f"x has {shape[index]} channels on axis {axis}, which {groups} groups cannot share evenly: num_groups must "
            "divide them"
        )
    n = 0 if index else 1
    order = (n, index, *(i for i in range(len(shape)) if i not in (n, index)))
    spatial = tuple(shape[i] for i in order[2:])
    split = (shape[n], groups, shape[index] // max(groups, 1), *spatial)
    call = _checked(backend, x, eps, order, split, shape[n] * groups, (index,), centered=True)
    return call._replace(of_channels=groups == shape[index])


def _features(x: Array, axes: int | tuple[int, ...], eps: float, centered: bool) -> _Call:
    backend = backend_for(x)
    _checks.floating_array("x", x, backend)
    shape = _checks.shape_of(x)
    given = tuple(_checks.axis(a) for a in (axes if isinstance(axes, tuple) else (axes,)))
    within = all(-len(shape) <= a < len(shape) for a in given)
    reduced = tuple(a % len(shape) for a in given) if within else ()
    if not reduced or list(reduced) != sorted(set(reduced)):
        raise ValueError(
            f"axes is {axes} but x has shape {shape}: give one or more of its axes, in increasing order and each once"
        )
    kept = tuple(i for i in range(len(shape)) if i not in reduced)
    order, rows = kept + reduced, math.prod(shape[i] for i in kept)
    return _checked(backend, x, eps, order, tuple(shape[i] for i in order), rows, reduced, centered)


def _checked(
    backend: Backend,
    x: Array,
    eps: float,
    order: tuple[int, ...],
    split: tuple[int, ...],
    rows: int,
    parameter_axes: tuple[int, ...],
    centered: bool,
) -> _Call:
    shape = _checks.shape_of(x)
    values = math.prod(shape) // rows if rows else 0
    if rows and values == 1 and centered:
        raise ValueError(
            f"a norm needs more than 1 value to normalize together, got shape {shape} with 1: every result would be "
            "bias; normalize over more axes or in larger groups"
        )
    return _Call(backend, x, _checks.eps(eps), order, split, (rows, values), parameter_axes, centered)


def _parameter(call: _Call, name: str, value: Array | None) -> Array | None:
    """weight or bias in a shape that broadcasts against x."""
    if value is None:
        return None
    _checks.same_place(name, value, call.x, call.backend)
    _checks.floating_array(name, value, call.backend)
    wanted = tuple(call.x.shape[i] for i in call.parameter_axes)
    if _checks.shape_of(value) != wanted:
        raise ValueError(
            f"{name} has shape {_checks.shape_of(value)} but x has {_checks.shape_of(call.x)}: it must be {wanted}"
        )
    shape = tuple(size if i in call.parameter_axes else 1 for i, size in enumerate(call.x.shape))
    return call.backend.namespace(call.x).reshape(value, shape)


def _in_rows(call: _Call, a: Array) -> Array:
    """a of x's shape as ``(1, rows, values)``; twice the values, the second half negative, where none is centered."""
    xp = call.backend.namespace(a)
    if call.order != tuple(range(a.ndim)):
        a = xp.permute_dims(a, call.order)
    a = xp.reshape(xp.reshape(a, call.split), (1, *call.rows))  # Dask cannot do both at once
    return a if call.centered else xp.concat([a, -a], axis=2)


def _from_rows(call: _Call, a: Array) -> Array:
    """What `_in_rows` made, in x's shape again."""
    xp, order = call.backend.namespace(a), call.order
    if not call.centered:
        a = a[:, :, : call.rows[1]]
    a = xp.reshape(xp.reshape(a, call.split), tuple(call.x.shape[i] for i in order))
    return a if order == tuple(range(a.ndim)) else xp.permute_dims(a, tuple(map(order.index, range(len(order)))))


def _normalized(
    call: _Call, x: Array, weight: Array | None = None, bias: Array | None = None
) -> tuple[Array, Statistics]:
    """weight and bias, if any, of each row."""
    y, statistics = call.backend.train(_in_rows(call, x), weight, bias, None, None, Spec(1, call.eps, relu=False))
    return _from_rows(call, y), statistics


def _apply(call: _Call, weight: Array | None, bias: Array | None) -> Array:
    x, backend = call.x, call.backend
    weight, bias = _parameter(call, "weight", weight), _parameter(call, "bias", bias)
    xp = backend.namespace(x)
    if 0 in x.shape:
        return x * 1
    if weight is None and bias is None:
        return _normalized(call, x)[0]
    if call.of_channels and weight is not None:  # batch norm's own weight and bias, rounded once with the rest
        of_rows = call.split[:2]
        weight, bias = (
            None if a is None else xp.reshape(xp.broadcast_to(xp.reshape(a, (1, -1)), of_rows), (-1,))
            for a in (weight, bias)
        )
        return _normalized(call, x, weight, bias)[0]
    working = backend.working_dtype(x)
    with np.errstate(all="ignore"):
        y, _ = _normalized(call, xp.astype(x, working))
        return _core.rounded_to(xp, _affine(xp, y, weight, bias), x.dtype)


def _affine(xp: Any, y: Array, weight: Array | None, bias: Array | None) -> Array:
    if weight is not None:
        y = y * xp.astype(weight, y.dtype)
    return y if bias is None else y + xp.astype(bias, y.dtype)


def _vjp(call: _Call, weight: Array | None, bias: Array | None) -> tuple[Array, Pullback]:
    x, backend = call.x, call.backend
    scale, offset = _parameter(call, "weight", weight), _parameter(call, "bias", bias)
    xp, working = backend.namespace(x), backend.working_dtype(x)
    empty = 0 in x.shape
    with backend.no_grad():
        xhat, statistics = (xp.astype(x, working), None) if empty else _normalized(call, xp.astype(x, working))
        y = _core.rounded_to(xp, _affine(xp, xhat, scale, offset), x.dtype)
    others = tuple(i for i in range(x.ndim) if i not in call.parameter_axes)

    def summed(a: Array, like: Array | None) -> Array | None:
        if like is None:
            return None
        total = xp.reshape(backend.sum(xp, a, others), _checks.shape_of(like)) if others else a
        return _core.rounded_to(xp, total, like.dtype)

    def pullback(dy: Array) -> Gradients:
        """Gradients(x, weight, bias, None) for the gradient dy of y."""
        _checks.like_x("dy", _checks.floating_array("dy", dy, backend_for(dy, "dy")), x, backend)
        with backend.no_grad():
            dy = xp.astype(dy, working)
            dweight, dbias = summed(dy * xhat, weight), summed(dy, bias)
            dx = _affine(xp, dy, scale, None)
            if statistics is not None:
                rows = _in_rows(call, xp.astype(x, working))
                spec = Spec(1, call.eps, relu=False)
                dx = _from_rows(call, backend.gradients(_in_rows(call, dx), rows, statistics, None, None, None, spec).x)
        return Gradients(_core.rounded_to(xp, dx, x.dtype), dweight, dbias, None)

    return y, pullback
