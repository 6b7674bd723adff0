"""fold: evaluation-mode batch norm put into the layer before it, or into the one behind it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from anybn import _checks, _settings
from anybn.backends.registry import backend_for
from anybn.core.call import Array, ArrayT, Statistics
from anybn.core.formulas import rounded_to, scale_of
from anybn.state.state import BatchNormState


def fold(
    state: BatchNormState,
    weight: ArrayT,
    bias: Array | None = None,
    *,
    channel_axis: int | None = None,
    groups: int = 1,
    after: bool = False,
    padding: Any = 0,
) -> tuple[ArrayT, Array]:
    """Fold evaluation-mode batch norm into the linear or convolution layer before it, or with ``after`` behind it.

    ``bn(layer(x)) == folded(x)``, with ``scale = state.weight / sqrt(running_var + eps)``::

        weight * scale along the output channels        (bias - running_mean) * scale + state.bias

    ``layer(bn(x)) == folded(x)``, with ``shift = state.bias - running_mean * scale``::

        weight * scale along the input channels         bias + the sum of weight * shift over inputs and kernel

    Args:
        state: with running statistics, of as many channels as the layer gives out; with ``after``, as it takes.
        weight: the layer's, with these channels on channel_axis.
        bias: of as many channels as the layer gives out, or None.
        channel_axis: None is 0, and 1 with ``after``: torch's linear layers and convolutions.

            - torch, Chainer, MXNet, ONNX: ``(out, in)``, ``(out, in / groups, *kernel)``; for a transposed convolution
              ``(in, out / groups, *kernel)`` with ``channel_axis=1`` and groups; 0 with ``after``.
            - Keras, Flax, Haiku: ``(*kernel, in / groups, out)`` with ``channel_axis=-1``; -2 with ``after``. Keras's
              transposed convolutions are ``(*kernel, out, in)``: the other way round. A depthwise kernel
              ``(*kernel, in, multiplier)`` has its channels on two axes: fold ``w.reshape(*kernel, -1)`` and reshape
              the result back.
        groups: of a transposed convolution; with ``after``, of any. For other layers it makes no difference.
        after: the layer is behind batch norm, as in a pre-activation net, or before a linear head.
        padding: with ``after``, the layer's padding with zeros: a number, several, or "same" or "valid".

    Returns:
        (weight, bias) in weight's library and dtype, computed in float64 and rounded once.

    Raises TypeError for what is no floating array, ValueError for a state without running statistics, and for shapes
    that do not fit; with ``after``, where shift is not 0 and would not reach all outputs alike: with padding, whose
    zeros are not shifted, and in a transposed convolution.

    >>> import numpy as np, anybn
    >>> rng = np.random.default_rng(0)
    >>> state, x, w = anybn.BatchNormState(4), rng.normal(size=(9, 3)), rng.normal(size=(4, 3))
    >>> _ = anybn.batch_norm(x @ w.T, state, training=True)
    >>> folded_w, folded_b = anybn.fold(state, w)
    >>> np.allclose(x @ folded_w.T + folded_b, anybn.batch_norm(x @ w.T, state))
    True
    >>> x, head = rng.normal(size=(9, 4)), rng.normal(size=(2, 4))
    >>> folded_w, folded_b = anybn.fold(state, head, after=True)
    >>> np.allclose(x @ folded_w.T + folded_b, anybn.batch_norm(x, state) @ head.T)
    True
    """
    if not isinstance(state, BatchNormState):
        raise TypeError(f"state is a {type(state).__name__}; it must be an anybn.BatchNormState")
    if not state.track_running_stats:
        raise ValueError("state has track_running_stats=False, so there are no constants to fold: evaluate it instead")
    backend = backend_for(weight, "weight")
    dtype = _checks.floating_array("weight", weight, backend).dtype
    shape, c = _checks.shape_of(weight), state.num_features
    after = _settings.flag("after", after)
    axis = int(after) if channel_axis is None else _settings.axis(channel_axis, "channel_axis")
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"channel_axis is {axis} but weight has shape {shape}")
    groups = _settings.positive("groups", groups)
    views = _by_group_behind(shape, axis, groups, c) if after else _by_group_before(shape, axis, groups, c)
    if views is None:
        raise ValueError(
            f"weight has shape {shape} with channel_axis={axis} and groups={groups}, which does not give the state's "
            f"{c} channels: pass the axis of the {'input' if after else 'output'} channels"
        )
    split, of_channels, of_outputs = views
    outputs = math.prod(split[i] for i in of_outputs)
    if bias is not None:
        _checks.same_place("bias", bias, weight, backend, "weight")
        if _checks.shape_of(_checks.floating_array("bias", bias, backend)) != (outputs,):
            raise ValueError(f"bias has shape {_checks.shape_of(bias)}; it must be ({outputs},)")
    xp = backend.namespace(weight)
    _, arrays = state._store.placed_beside(backend, weight)
    statistics = Statistics(None, arrays.running_mean, None, arrays.running_var)
    working = statistics.mean.dtype
    scale = scale_of(xp, statistics, arrays.weight, state.eps)
    shift = -statistics.mean if after or bias is None else xp.astype(bias, working) - statistics.mean
    shift = shift * scale
    if arrays.bias is not None:
        shift = shift + xp.astype(arrays.bias, working)
    wide = xp.reshape(xp.astype(weight, working), split)
    against = tuple(size if i in of_channels else 1 for i, size in enumerate(split))
    if of_channels[0] > of_channels[1]:  # groups are what varies slowest among the channels, wherever their axis is
        turned = xp.permute_dims(xp.reshape(xp.stack((scale, shift)), (2, *(split[i] for i in of_channels))), (0, 2, 1))
        scale, shift = turned[0, ...], turned[1, ...]
    if after:
        uneven = "padding" if _pads(padding) else "its transposed kernel" if len(shape) > 2 and axis in (0, -1) else ""
        if uneven and bool(xp.any(shift != 0)):
            raise ValueError(
                f"batch norm shifts what the layer behind it takes, and because of {uneven} this does not reach all "
                "outputs alike: fold it into the layer before it, or leave it"
            )
        rest = tuple(i for i in range(len(split)) if i not in of_outputs)
        shift = xp.reshape(xp.sum(wide * xp.reshape(shift, against), axis=rest), (outputs,))
        if bias is not None:
            shift = shift + xp.astype(bias, working)
    folded = xp.reshape(wide * xp.reshape(scale, against), shape)
    return rounded_to(xp, folded, dtype), rounded_to(xp, shift, dtype)


#: A shape of weight in which groups have an axis of their own, the axes that together are batch norm's channels, and
#: those that are the layer's outputs.
Views = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _by_group_before(shape: tuple[int, ...], axis: int, groups: int, channels: int) -> Views | None:
    index = axis % len(shape)
    if shape[index] == channels:
        groups = 1  # only a transposed convolution has out / groups there
    if shape[index] * groups != channels or (groups > 1 and shape[0] % groups):
        return None
    of_channels = 0, index + 1
    return (groups, shape[0] // groups, *shape[1:]), of_channels, of_channels


def _by_group_behind(shape: tuple[int, ...], axis: int, groups: int, channels: int) -> Views | None:
    ndim = len(shape)
    outputs = {0: 1, 1: 0, -1: ndim - 2, -2: ndim - 1}.get(axis if axis < 2 else axis - ndim, ndim)
    if outputs >= ndim:
        return None
    inputs = axis % ndim
    whole, part = (inputs, outputs) if axis in (0, -1) else (outputs, inputs)  # of all groups; of one
    if shape[whole] % groups or channels != shape[inputs] * (1 if whole == inputs else groups):
        return None
    split = (*shape[:whole], groups, shape[whole] // groups, *shape[whole + 1 :])
    of_whole, of_part = (whole, whole + 1), (whole, part + (part > whole))
    return (split, of_whole, of_part) if whole == inputs else (split, of_part, of_whole)


def _pads(padding: Any) -> bool:
    if isinstance(padding, str):
        return _settings.choice("padding", padding, ("same", "valid")) == "same"
    if (sizes := np.asarray(padding)).dtype.kind not in "iu":
        raise TypeError(f"padding is {padding!r}; it must be an int, several of them, 'same' or 'valid'")
    return bool(np.any(sizes))
