"""moments and denormalize: what batch norm knows of data, as data."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import numpy as np

from anybn import _checks, _settings
from anybn._functional import zeros_beside
from anybn._moments import Moments
from anybn.backends.registry import backend_for
from anybn.core.call import Array, ArrayT, Call, Spec, Statistics
from anybn.state.state import BatchNormState


def moments(
    x: Array,
    *,
    axis: int | tuple[int, ...] = 1,
    mask: Array | None = None,
    nonfinite: Literal["propagate", "omit"] = "propagate",
) -> Moments:
    """Count, mean and summed squared deviations of each channel of x, to merge with those of other data.

    Args:
        x: ``(N, C, *spatial)`` as in `batch_norm`, possibly empty.
        axis: the channel axis; or several, in increasing order, for moments of every position on them: ``(1, 2)`` gives
            those of an x of ``(N, C, H, W)`` in ``(C, H)``.
        mask: bool; only True positions count. x's shape without the channel axes, or broadcastable to it; or as many
            axes as x has, and broadcastable to x: then channels may differ, and count is an array.
        nonfinite: "omit" leaves out every value that is NaN or infinite, in each channel by itself: count is an array.
            "propagate" shows them in mean and m2.

    Raises TypeError or ValueError for arguments outside of the above.

    >>> import numpy as np, anybn
    >>> m = anybn.moments(np.array([[1.0, 5.0], [3.0, 9.0]]))
    >>> m.count, m.mean, m.m2, m.var(ddof=1)
    (2, array([2., 7.]), array([2., 8.]), array([2., 8.]))
    >>> m = anybn.moments(np.array([[1.0, 5.0], [3.0, np.nan]]), nonfinite="omit")
    >>> m.count, m.mean
    (array([2, 1]), array([2., 5.]))
    """
    backend = backend_for(x)
    axes = axis if isinstance(axis, tuple) else (axis,)
    kept = tuple(_checks.batch(x, backend, a, None) for a in axes) or (0,)
    if list(kept) != sorted(set(kept)) or not axes:
        raise ValueError(f"axis is {axis}; give one or more axes of x, in increasing order and each once")
    _settings.choice("nonfinite", nonfinite, ("propagate", "omit"))
    xp, channels = backend.namespace(x), tuple(x.shape[i] for i in kept)
    apart = nonfinite == "omit" or (mask is not None and getattr(mask, "ndim", 0) == x.ndim)
    if mask is not None:
        mask = _checks.mask(mask, x, kept, backend, whole=True)
    if _checks.size_of(x) == 0:
        zeros = xp.reshape(zeros_beside(backend, x, math.prod(channels)), channels)
        return Moments(0, zeros, zeros)
    if nonfinite == "omit":
        mask = xp.isfinite(x) if mask is None else xp.isfinite(x) & mask
    index = kept[0]
    if len(kept) > 1:
        if mask is not None and any(mask.shape[i] != 1 for i in kept):
            mask = xp.broadcast_to(mask, x.shape)
        (x, index), mask = _on_one_axis(xp, x, kept), None if mask is None else _on_one_axis(xp, mask, kept)[0]
    statistics = backend.statistics(Call(x, Spec(index, 0.0), mask=mask))
    mean, shift, count = statistics.mean, statistics.shift, cast(Any, statistics.count)
    if shift is not None:
        mean = statistics.mean + shift
        shift = shift - (mean - statistics.mean)
    if apart:
        count = xp.reshape(xp.broadcast_to(count, mean.shape), channels)
    elif getattr(count, "ndim", 0):
        count = count[0]
    if not apart and not backend.is_traced(x):
        count = int(count)
    if len(kept) > 1:
        mean, m2, shift = (a if a is None else xp.reshape(a, channels) for a in (mean, statistics.m2, shift))
        return Moments(count, mean, m2, shift)
    return Moments(count, mean, statistics.m2, shift)


def _on_one_axis(xp: Any, a: Array, axes: tuple[int, ...]) -> tuple[Array, int]:
    """a with these axes as one, and where that is: a view of what lies in order, if they lie side by side."""
    first = axes[0]
    if axes[-1] - first != len(axes) - 1:
        others = tuple(i for i in range(a.ndim) if i not in axes)
        a, first = xp.permute_dims(a, (*others, *axes)), len(others)
    shape = tuple(a.shape)
    one = math.prod(shape[first : first + len(axes)])
    return xp.reshape(a, (*shape[:first], one, *shape[first + len(axes) :])), first


def denormalize(y: ArrayT, state: BatchNormState, *, axis: int = 1) -> ArrayT:
    """The x of which `batch_norm` makes y in evaluation: ``(y - bias) / weight * sqrt(var + eps) + mean``.

    Args:
        y: ``(N, C, *spatial)``, any dtype and library that `batch_norm` takes.
        state: whose running statistics, weight and bias y was made with; it stays as it is.
        axis: the channel axis.

    Returns:
        x: y's shape, dtype, library, device and layout, every value rounded once where the device has float64 and y is
        narrower. It is off by what rounded y: half a unit of y times ``sqrt(var + eps) / weight``. Differentiable in y
        where the library is.

    Raises TypeError or ValueError for arguments outside of the above, a state without running statistics, and a channel
    whose weight is 0, from which nothing comes back.

    >>> import numpy as np, anybn
    >>> state = anybn.BatchNormState(2)
    >>> state.running_mean, state.running_var = np.array([10.0, 20.0]), np.array([4.0, 9.0])
    >>> anybn.denormalize(anybn.batch_norm(np.array([[12.0, 23.0]]), state), state)
    array([[12., 23.]])
    """
    if not isinstance(state, BatchNormState):
        raise TypeError(f"state is a {type(state).__name__}; it must be an anybn.BatchNormState of y's channels")
    if not state.track_running_stats:
        raise ValueError("state has track_running_stats=False: there are no statistics that y was made with")
    backend = backend_for(y, "y")
    index = _checks.batch(y, backend, axis, state.num_features, "y")
    _, placed = state._store.placed_beside(backend, y)
    _checks.state_arrays(placed[:4], state.num_features, y, backend)
    xp, working = backend.namespace(y), backend.working_dtype(y)
    placed_there: Any = (a if a is None else xp.astype(backend.detached(a), working) for a in placed[:4])
    weight, bias, mean, var = placed_there
    scale = xp.sqrt(var + state.eps)
    if weight is not None:
        if not backend.is_traced(weight):
            lost = tuple(int(c) for c in np.flatnonzero(backend.to_numpy(weight) == 0))
            if lost:
                raise ValueError(
                    f"weight is 0 in {len(lost)} channels ({_checks.named_channels(lost)}): their y is bias, whatever "
                    "x was, and cannot be undone"
                )
        scale = scale / weight
    ones, center = xp.ones_like(var), xp.zeros_like(var) if bias is None else bias
    # batch norm again, with bias and std / weight in the places of mean and weight: all its kernels do it as they are
    return cast(ArrayT, backend.evaluate(Call(y, Spec(index, 0.0), scale, mean), Statistics(None, center, None, ones)))
