"""Group, layer, instance and RMS norm, for batches too small for batch norm. They keep nothing.

All four are batch norm with other roles of the axes: values that are normalized together lie in one row, and the rows
are batch norm's channels. What is here checks the arguments and lays x out; `Backend.normalize_rows` does the rest,
with compiled kernels for NumPy arrays and torch's CPU tensors. Elsewhere, weights that do not belong to whole rows make
arrays of the working dtype, which is as exact and takes several times as long, and RMS norm takes twice the memory.

>>> import numpy as np
>>> from anybn import norms
>>> norms.layer_norm(np.array([[1.0, 2.0, 3.0], [10.0, 10.0, 40.0]])).round(3)
array([[-1.225,  0.   ,  1.225],
       [-0.707, -0.707,  1.414]])
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from anybn import _checks, _settings
from anybn.backends.base import Backend
from anybn.backends.registry import backend_for
from anybn.core.call import Array, ArrayT, Call, Gradients, RowSpec

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
    x: ArrayT,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
) -> ArrayT:
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
    return _apply(_channels(x, num_groups, axis, eps, weight, bias), weight, bias)


def group_norm_vjp(
    x: ArrayT,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
) -> tuple[ArrayT, Pullback]:
    """`group_norm` and its gradient, for libraries without automatic differentiation, which does not see this call.

    Returns (y, pullback): ``pullback(dy)`` gives ``Gradients(x, weight, bias, None)``, in the dtypes of what they are
    the gradients of; None for what was not given.

    >>> import numpy as np
    >>> from anybn import norms
    >>> y, pullback = norms.group_norm_vjp(np.array([[1.0, 3.0]]), 1, np.ones(2))
    >>> pullback(y).weight.round(3)
    array([1., 1.])
    """
    return _vjp(_channels(x, num_groups, axis, eps, weight, bias), weight, bias)


def instance_norm(
    x: ArrayT, weight: Array | None = None, bias: Array | None = None, *, eps: float = 1e-5, axis: int = 1
) -> ArrayT:
    """Normalize each channel of each sample (Ulyanov, Vedaldi & Lempitsky 2016): `group_norm` with groups of one.

    >>> import numpy as np, anybn
    >>> anybn.instance_norm(np.array([[[1.0, 3.0], [10.0, 30.0]]])).round(3)
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """
    return _apply(_channels(x, None, axis, eps, weight, bias), weight, bias)


def instance_norm_vjp(
    x: ArrayT, weight: Array | None = None, bias: Array | None = None, *, eps: float = 1e-5, axis: int = 1
) -> tuple[ArrayT, Pullback]:
    """`instance_norm` and its gradient, as `group_norm_vjp` gives them."""
    return _vjp(_channels(x, None, axis, eps, weight, bias), weight, bias)


def layer_norm(
    x: ArrayT,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    axes: int | tuple[int, ...] = -1,
) -> ArrayT:
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
    return _apply(_features(x, axes, eps, True, weight, bias), weight, bias)


def layer_norm_vjp(
    x: ArrayT,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    axes: int | tuple[int, ...] = -1,
) -> tuple[ArrayT, Pullback]:
    """`layer_norm` and its gradient, as `group_norm_vjp` gives them."""
    return _vjp(_features(x, axes, eps, True, weight, bias), weight, bias)


def rms_norm(x: ArrayT, weight: Array | None = None, *, eps: float = 1e-5, axes: int | tuple[int, ...] = -1) -> ArrayT:
    """Divide x by its root mean square over some of its axes (Zhang & Sennrich 2019).

    ``y = x / sqrt(mean(x**2) + eps) * weight``; arguments, result and errors as in `layer_norm`. torch's default eps is
    x's machine epsilon, that of most language models 1e-5 or 1e-6.

    >>> import numpy as np, anybn
    >>> anybn.rms_norm(np.array([[3.0, 4.0], [30.0, 40.0]])).round(3)
    array([[0.849, 1.131],
           [0.849, 1.131]])
    """
    return _apply(_features(x, axes, eps, False, weight, None), weight, None)


def rms_norm_vjp(
    x: ArrayT, weight: Array | None = None, *, eps: float = 1e-5, axes: int | tuple[int, ...] = -1
) -> tuple[ArrayT, Pullback]:
    """`rms_norm` and its gradient, as `group_norm_vjp` gives them."""
    return _vjp(_features(x, axes, eps, False, weight, None), weight, None)


class _Layout(NamedTuple):
    """How x is laid out for `Backend.normalize_rows`."""

    order: tuple[int, ...] | None
    """of x's axes, if they have to be moved, and the way back"""
    back: tuple[int, ...]
    shape: tuple[int, int, int]
    """and values of `RowSpec`"""
    values: int
    parameters: tuple[int, ...]
    """shape of weight and bias, which have P values"""


class _Checked(NamedTuple):
    """A norm of x whose arguments have been checked."""

    backend: Backend
    x: Array
    layout: _Layout
    spec: RowSpec
    plain: bool
    """whether x, weight and bias are `Backend.are_plain`"""


def _channels(
    x: Array, num_groups: int | None, axis: int, eps: float, weight: Array | None, bias: Array | None
) -> _Checked:
    backend = backend_for(x)
    index = _checks.batch(x, backend, axis, None)
    if num_groups is not None:
        num_groups = _settings.positive("num_groups", num_groups)
    layout = _layout_by_channels(_checks.shape_of(x), index, num_groups)
    return _checked(backend, x, layout, eps, True, backend.are_plain(x, weight, bias))


def _features(
    x: Array, axes: int | tuple[int, ...], eps: float, centered: bool, weight: Array | None, bias: Array | None
) -> _Checked:
    backend = backend_for(x)
    if not (plain := backend.are_plain(x, weight, bias)):
        _checks.floating_array("x", x, backend)
    layout = _layout_by_features(_checks.shape_of(x), _settings.axes(axes))
    return _checked(backend, x, layout, eps, centered, plain)


@functools.lru_cache(maxsize=1024)
def _layout_by_channels(shape: tuple[int, ...], index: int, num_groups: int | None) -> _Layout:
    channels = shape[index]
    groups = channels if num_groups is None else num_groups
    if channels % groups if groups else channels:
        raise ValueError(
            f"x has {channels} channels on axis {index}, which {groups} groups cannot share evenly: num_groups must "
            "divide them"
        )
    n = 0 if index else 1
    others = tuple(i for i in range(len(shape)) if i not in (n, index))
    length = math.prod(shape[i] for i in others)
    return _layout((n, index, *others), (shape[n], channels, length), channels // max(groups, 1) * length, (channels,))


@functools.lru_cache(maxsize=1024)
def _layout_by_features(shape: tuple[int, ...], axes: tuple[int, ...]) -> _Layout:
    within = all(-len(shape) <= a < len(shape) for a in axes)
    reduced = tuple(a % len(shape) for a in axes) if within else ()
    if not reduced or list(reduced) != sorted(set(reduced)):
        raise ValueError(
            f"axes is {axes[0] if len(axes) == 1 else axes} but x has shape {shape}: give one or more of its axes, in "
            "increasing order and each once"
        )
    kept = tuple(i for i in range(len(shape)) if i not in reduced)
    parameters = tuple(shape[i] for i in reduced)
    values = math.prod(parameters)
    return _layout(kept + reduced, (math.prod(shape[i] for i in kept), values, 1), values, parameters)


def _layout(order: tuple[int, ...], shape: tuple[int, int, int], values: int, parameters: tuple[int, ...]) -> _Layout:
    back = tuple(map(order.index, range(len(order))))
    return _Layout(None if order == back == tuple(range(len(order))) else order, back, shape, values, parameters)


def _checked(backend: Backend, x: Array, layout: _Layout, eps: float, centered: bool, plain: bool) -> _Checked:
    if layout.values == 1 and centered and 0 not in layout.shape:
        raise ValueError(
            f"a norm needs more than 1 value to normalize together, got shape {_checks.shape_of(x)} with 1: every "
            "result would be bias; normalize over more axes or in larger groups"
        )
    return _Checked(backend, x, layout, RowSpec(layout.shape, layout.values, _settings.eps(eps), centered), plain)


def _check_parameters(checked: _Checked, **parameters: Array | None) -> None:
    for name, value in parameters.items():
        if value is None:
            continue
        if not checked.plain:
            _checks.same_place(name, value, checked.x, checked.backend)
            _checks.floating_array(name, value, checked.backend)
        if _checks.shape_of(value) != checked.layout.parameters:
            raise ValueError(
                f"{name} has shape {_checks.shape_of(value)} but x has {_checks.shape_of(checked.x)}: it must be "
                f"{checked.layout.parameters}"
            )


def _laid(checked: _Checked, a: Array) -> Array:
    """a, of x's shape, with its axes as the layout has them."""
    order = checked.layout.order
    return a if order is None else checked.backend.namespace(a).permute_dims(a, order)


def _call(checked: _Checked, weight: Array | None, bias: Array | None) -> Call:
    return Call(_laid(checked, checked.x), checked.spec, weight, bias)


def _delivered(checked: _Checked, a: Array) -> Array:
    """What `_laid` made, as x has its axes."""
    return a if checked.layout.order is None else checked.backend.namespace(a).permute_dims(a, checked.layout.back)


def _apply(checked: _Checked, weight: Array | None, bias: Array | None) -> Array:
    _check_parameters(checked, weight=weight, bias=bias)
    if 0 in checked.layout.shape:
        return checked.x * 1
    return _delivered(checked, _normalize(checked, weight, bias)[0])


def _normalize(checked: _Checked, weight: Array | None, bias: Array | None) -> tuple[Array, Any]:
    backend = checked.backend
    return (backend.normalize_plain_rows if checked.plain else backend.normalize_rows)(_call(checked, weight, bias))


def _vjp(checked: _Checked, weight: Array | None, bias: Array | None) -> tuple[Array, Pullback]:
    _check_parameters(checked, weight=weight, bias=bias)
    x, backend, empty = checked.x, checked.backend, 0 in checked.layout.shape
    statistics: Any = None
    with backend.no_grad():
        if empty:
            y = x * 1
        else:
            y, statistics = _normalize(checked, weight, bias)
            y = _delivered(checked, y)
    shape = _checks.shape_of(x)

    def pullback(dy: Array) -> Gradients:
        """Gradients(x, weight, bias, None) for the gradient dy of y."""
        _checks.as_it_was("x", x, shape)
        _check_parameters(checked, weight=weight, bias=bias)
        _checks.like_x("dy", _checks.floating_array("dy", dy, backend_for(dy, "dy")), x, backend)
        with backend.no_grad():
            if empty:
                xp = backend.namespace(x)
                dweight, dbias = (None if a is None else xp.zeros_like(a) for a in (weight, bias))
                return Gradients(dy * 1, dweight, dbias, None)
            grads = backend.row_gradients(_call(checked, weight, bias), statistics, _laid(checked, dy))
            return grads._replace(x=_delivered(checked, grads.x))

    return y, pullback
