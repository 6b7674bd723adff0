"""fold: evaluation-mode batch norm put into the layer before it."""

from __future__ import annotations

from anybn import _checks, _settings
from anybn.backends.registry import backend_for
from anybn.core.call import Array, ArrayT, Statistics
from anybn.core.formulas import rounded_to, scale_of
from anybn.state.state import BatchNormState


def fold(
    state: BatchNormState, weight: ArrayT, bias: Array | None = None, *, channel_axis: int = 0, groups: int = 1
) -> tuple[ArrayT, Array]:
    """Fold evaluation-mode batch norm into the linear or convolution layer before it.

    ``bn(layer(x)) == folded(x)``, with ``scale = state.weight / sqrt(running_var + eps)``::

        weight * scale along the output channels        (bias - running_mean) * scale + state.bias

    Args:
        state: with running statistics, of as many channels as the layer gives out.
        weight: the layer's, with its output channels on channel_axis.

            - torch, Chainer, MXNet, ONNX: ``(out, in)``, ``(out, in / groups, *kernel)``; for a transposed convolution
              ``(in, out / groups, *kernel)`` with ``channel_axis=1`` and groups.
            - Keras, Flax, Haiku: ``(*kernel, in / groups, out)`` with ``channel_axis=-1``. Keras's transposed
              convolutions are ``(*kernel, out, in)``, so ``channel_axis=-2``; a depthwise kernel
              ``(*kernel, in, multiplier)`` has its channels on two axes: fold ``w.reshape(*kernel, -1)`` and reshape
              the result back.
        bias: ``(out,)`` or None.
        groups: of a transposed convolution; for other layers it makes no difference.

    Returns:
        (weight, bias) in weight's library and dtype, computed in float64 and rounded once.

    Raises TypeError for what is no floating array, ValueError for a state without running statistics or for shapes
    that do not fit.

    >>> import numpy as np, anybn
    >>> rng = np.random.default_rng(0)
    >>> state, x, w = anybn.BatchNormState(4), rng.normal(size=(9, 3)), rng.normal(size=(4, 3))
    >>> _ = anybn.batch_norm(x @ w.T, state, training=True)
    >>> folded_w, folded_b = anybn.fold(state, w)
    >>> np.allclose(x @ folded_w.T + folded_b, anybn.batch_norm(x @ w.T, state))
    True
    """
    if not isinstance(state, BatchNormState):
        raise TypeError(f"state is a {type(state).__name__}; it must be an anybn.BatchNormState")
    if not state.track_running_stats:
        raise ValueError("state has track_running_stats=False, so there are no constants to fold: evaluate it instead")
    backend = backend_for(weight, "weight")
    dtype = _checks.floating_array("weight", weight, backend).dtype
    shape, c = _checks.shape_of(weight), state.num_features
    index = _settings.axis(channel_axis)
    if not -len(shape) <= index < len(shape):
        raise ValueError(f"channel_axis is {index} but weight has shape {shape}")
    index %= len(shape)
    groups = _settings.positive("groups", groups)
    in_groups = 1 if shape[index] == c else groups  # only a transposed convolution has out / groups there
    if shape[index] * in_groups != c or (in_groups > 1 and shape[0] % groups):
        raise ValueError(
            f"weight has shape {shape} with channel_axis={channel_axis} and groups={groups}, which does not give the "
            f"state's {c} channels: pass the axis of the output channels"
        )
    if bias is not None:
        _checks.same_place("bias", bias, weight, backend)
        if _checks.shape_of(_checks.floating_array("bias", bias, backend)) != (c,):
            raise ValueError(f"bias has shape {_checks.shape_of(bias)}; it must be ({c},)")
    xp = backend.namespace(weight)
    _, arrays = state._store.placed_beside(backend, weight)
    statistics = Statistics(None, arrays.running_mean, None, arrays.running_var)
    working = statistics.mean.dtype
    scale = scale_of(xp, statistics, arrays.weight, state.eps)
    shift = -statistics.mean if bias is None else xp.astype(bias, working) - statistics.mean
    shift = shift * scale
    if arrays.bias is not None:
        shift = shift + xp.astype(arrays.bias, working)
    # (groups, in / groups, ..., out / groups, ...) * (groups, 1, ..., out / groups, ...)
    split = xp.reshape(xp.astype(weight, working), (in_groups, shape[0] // in_groups, *shape[1:]))
    by_group = [1] * split.ndim
    by_group[0], by_group[index + 1] = in_groups, shape[index]
    folded = xp.reshape(split * xp.reshape(scale, tuple(by_group)), shape)
    return rounded_to(xp, folded, dtype), rounded_to(xp, shift, dtype)
