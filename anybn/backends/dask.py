"""Dask arrays, chunk by chunk: larger than memory, on threads or a cluster. Nothing computes until the user computes.

Statistics are merged from those of chunks, and chunks normalized by themselves, by NumPy's kernels. x is read once for
its statistics and again for y, so that no more of it is held than the chunks being worked on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from types import ModuleType
from typing import Any

import array_api_compat.numpy
import numpy as np

from anybn.backends._needs import needs
from anybn.backends.base import Backend
from anybn.backends.numpy import NumPyBackend
from anybn.backends.registry import backend_for
from anybn.core import formulas
from anybn.core.call import Array, Call, Gradients, Spec, Statistics
from anybn.core.moments import merged

with needs("dask", pip="'dask[array]'"):
    import array_api_compat.dask.array
    import dask
    import dask.array

    from anybn.backends._dask_reread import is_of_shared, reread, shared


class DaskBackend(Backend):
    name = "dask"
    libraries = ("dask",)
    how = "chunk by chunk as NumPy, lazily"
    writable = False

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, dask.array.Array)

    def refusal(self, x: Array) -> str:
        if any(np.isnan(size) for size in x.shape):
            return f"has the unknown shape {x.shape}: call x.compute_chunk_sizes() first"
        chunk = x._meta  # raises where the chunks are masked or sparse
        return backend_for(chunk, "a chunk of x").refusal(chunk)

    def module(self) -> ModuleType:
        return array_api_compat.dask.array

    def namespace(self, x: Array) -> ModuleType:
        return array_api_compat.dask.array

    def device_of(self, x: Array) -> str:
        return "cpu"

    def _devices(self) -> list[str]:
        return ["cpu"]

    def has_float64(self, device: Any) -> bool:
        return True

    def dtype(self, name: str) -> Any:
        return _NUMPY.dtype(name)

    def from_numpy(self, array: np.ndarray, device: Any) -> Array:
        return dask.array.from_array(np.array(array))

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.array(x.compute())

    def watch(self, x: Array) -> Callable[[], str]:
        return lambda: str(x.name)  # which ``x[...] = value`` changes

    @staticmethod
    def sum(xp: ModuleType, a: Array, axes: tuple[int, ...]) -> Array:
        """In blocks within each chunk, then in a tree over them: blocks of the whole would cut across its chunks."""
        return dask.array.reduction(a, chunk=_sum_of_chunk, aggregate=_sum_of_chunk, axis=axes, dtype=a.dtype)

    def is_traced(self, x: Array) -> bool:
        return True

    # -- batch norm --------------------------------------------------------------------------------------------

    def statistics(self, call: Call) -> Statistics:
        """The moments of each chunk, merged in a tree: x is read once, and each chunk can be dropped at once."""
        if call.group is not None:
            return super().statistics(call)
        x, axis, mask = call.x, call.spec.axis, call.mask
        found = _reduced(_by_chunk(_moments_of_chunk, x, axis, _MOMENTS, x, mask, spec=call.spec), axis, _merged)
        count: Any = math.prod(x.shape) // x.shape[axis] if mask is None else found["count"]
        n = count if mask is None else dask.array.maximum(count, 1)
        shift = None if formulas.is_wide("float64", x) else found["shift"]
        return Statistics(count, found["mean"], shift, found["m2"] / n, found["m2"])

    def evaluate(self, call: Call, statistics: Statistics) -> Array:
        x, spec, weight, bias, residual, mask = call[:6]
        channel = _of_channels(x, spec.axis, statistics.mean, statistics.shift, statistics.var, weight, bias)
        if is_of_shared(statistics.mean):
            x, residual, mask = reread(channel, x, residual, mask)
        return _blockwise(_normalize_chunk, x, spec.axis, x.dtype, x, residual, mask, *channel, spec=spec)

    def gradients(
        self, call: Call, statistics: Statistics, dy: Array, active: Array | None, wants_residual: bool
    ) -> Gradients:
        if call.group is not None:
            return super().gradients(call, statistics, dy, active, wants_residual)
        x, spec, weight, mask = call.x, call.spec, call.weight, call.mask
        axis = spec.axis
        channel = _of_channels(x, axis, statistics.mean, statistics.shift, statistics.var)
        if is_of_shared(statistics.mean):
            dy, x, active, mask = reread(channel, dy, x, active, mask)
        parts = _by_chunk(_sums_of_chunk, x, axis, _SUMS, dy, x, active, mask, *channel, spec=spec)
        sums = _reduced(parts, axis, _added)
        dweight, dbias = sums["dweight"], sums["dbias"]
        of_mean: tuple[Array | None, ...] = None, None
        if statistics.count is not None:
            n = statistics.count if isinstance(statistics.count, int) else dask.array.maximum(statistics.count, 1)
            of_mean = dweight / n, dbias / n
        channel += _of_channels(x, axis, weight, *of_mean)
        if statistics.count is not None:
            dy, x, active, mask = reread(channel, dy, x, active, mask)
        dx = _blockwise(_dx_of_chunk, x, axis, x.dtype, dy, x, active, mask, *channel, spec=spec)
        dresidual = _blockwise(_dresidual_of_chunk, x, axis, x.dtype, dy, active, mask) if wants_residual else None
        of_parameters = formulas.parameter_gradients(self.namespace(x), call, dweight, dbias)
        return Gradients(dx, *of_parameters, dresidual)


#: What is known of the channels of a chunk: `Moments`, whose mean is ``mean + shift``; and the sums of the gradient.
_MOMENTS = np.dtype([("count", "i8"), ("mean", "f8"), ("shift", "f8"), ("m2", "f8")])
_SUMS = np.dtype([("dweight", "f8"), ("dbias", "f8")])

_NUMPY = NumPyBackend()


def _others(x: Array, axis: int) -> tuple[int, ...]:
    return formulas.reduced_axes(x.ndim, axis)


def _as_it_is(parts: np.ndarray, **_: Any) -> np.ndarray:
    return parts


def _reduced(parts: Array, axis: int, merge: Callable[..., np.ndarray]) -> Array:
    """(C,), in a tree over the parts."""
    found = dask.array.reduction(
        parts,
        _as_it_is,
        merge,
        axis=_others(parts, axis),
        dtype=parts.dtype,
        meta=np.empty(0, parts.dtype),  # nothing has to be called to find out
        concatenate=True,
    )
    return shared(found)


def _of_channels(x: Array, axis: int, *channel: Array | None) -> list[Array | None]:
    """Arrays ``(C,)`` in the chunks of x's channels, `shared`."""
    return [a if a is None else shared(a.rechunk((x.chunks[axis],))) for a in channel]


def _blockwise(
    function: Callable[..., Any], x: Array, axis: int, dtype: np.dtype, /, *arrays: Array | None, **options: Any
) -> Array:
    """function of the chunks of arrays of x's axes, or with one axis, the channels', or None.

    Arrays without values become one chunk: of several, which a selection can leave, Dask forgets all but the first.
    """
    everywhere = tuple(range(x.ndim))
    arrays = tuple(dask.array.zeros(a.shape, a.dtype) if a is not None and 0 in a.shape else a for a in arrays)
    pairs = [(a, None if a is None else everywhere if a.ndim == x.ndim else (axis,)) for a in arrays]
    meta = np.empty((0,) * x.ndim, dtype)
    return dask.array.blockwise(function, everywhere, *chain(*pairs), dtype=dtype, meta=meta, **options)


def _by_chunk(
    function: Callable[..., Any], x: Array, axis: int, dtype: np.dtype, /, *arrays: Array | None, **options: Any
) -> Array:
    """As `_blockwise`, where function makes one of each channel: ``(1, C, 1, 1)``."""
    ones = dict.fromkeys(_others(x, axis), _one)
    return _blockwise(function, x, axis, dtype, *arrays, adjust_chunks=ones, **options)


def _one(_: int) -> int:
    return 1


# -- what is done to chunks, which are NumPy arrays ----------------------------------------------------------------


def _moments_of_chunk(x: np.ndarray, mask: np.ndarray | None, spec: Spec) -> np.ndarray:
    found = np.zeros(x.shape[spec.axis], _MOMENTS)
    if x.size:
        count, mean, shift, _, m2 = _NUMPY.statistics(Call(x, spec, mask=mask))[:5]
        found["count"], found["mean"], found["m2"] = count, mean, m2
        if shift is not None:
            found["shift"] = shift
    return formulas.along(np, found, spec.axis, x.ndim)


def _rows(parts: np.ndarray, axis: tuple[int, ...]) -> np.ndarray:
    """(parts, C)."""
    (channels,) = set(range(parts.ndim)) - set(axis)
    return np.moveaxis(parts, channels, -1).reshape(math.prod(parts.shape[i] for i in axis), parts.shape[channels])


def _in_place_of(axis: tuple[int, ...], keepdims: bool, channel: np.ndarray) -> np.ndarray:
    return np.expand_dims(channel, axis) if keepdims else channel


def _merged(parts: np.ndarray, axis: tuple[int, ...], keepdims: bool) -> np.ndarray:
    """Moments of all parts together."""
    rows = _rows(parts, axis)
    if len(rows) == 1:
        return _in_place_of(axis, keepdims, rows[0])
    with np.errstate(all="ignore"):
        count, mean, shift, _, m2 = merged(
            array_api_compat.numpy, rows["count"].sum(0), *(rows[name] for name in _MOMENTS.names or ())
        )[:5]
        found = np.empty_like(rows[0])
        found["count"], found["m2"] = count, m2
        # Knuth's two-sum: mean + shift is what it was, and shift as small as can be.
        found["mean"] = mean + shift
        added = found["mean"] - mean
        found["shift"] = (mean - (found["mean"] - added)) + (shift - added)
    return _in_place_of(axis, keepdims, found)


def _normalize_chunk(
    x: np.ndarray,
    residual: np.ndarray | None,
    mask: np.ndarray | None,
    mean: np.ndarray,
    shift: np.ndarray | None,
    var: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    spec: Spec,
) -> np.ndarray:
    return _NUMPY.evaluate(Call(x, spec, weight, bias, residual, mask), Statistics(None, mean, shift, var))


def _sums_of_chunk(
    dy: np.ndarray,
    x: np.ndarray,
    active: np.ndarray | None,
    mask: np.ndarray | None,
    mean: np.ndarray,
    shift: np.ndarray | None,
    var: np.ndarray,
    spec: Spec,
) -> np.ndarray:
    """dweight and dbias of this chunk, in float64."""
    found = np.zeros(x.shape[spec.axis], _SUMS)
    if x.size:
        call, statistics = Call(x, spec, mask=mask), Statistics(None, mean, shift, var)
        found["dbias"], found["dweight"] = _NUMPY.gradient_sums(call, statistics, dy, active)
    return formulas.along(np, found, spec.axis, x.ndim)


def _added(parts: np.ndarray, axis: tuple[int, ...], keepdims: bool) -> np.ndarray:
    rows = _rows(parts, axis)
    found = np.empty_like(rows[0])
    for name in _SUMS.names or ():
        found[name] = rows[name].sum(0)
    return _in_place_of(axis, keepdims, found)


def _dx_of_chunk(
    dy: np.ndarray,
    x: np.ndarray,
    active: np.ndarray | None,
    mask: np.ndarray | None,
    mean: np.ndarray,
    shift: np.ndarray | None,
    var: np.ndarray,
    weight: np.ndarray | None,
    dweight: np.ndarray | None,
    dbias: np.ndarray | None,
    spec: Spec,
) -> np.ndarray:
    """``weight * rstd * (dy - dbias - xhat * dweight)``, with their means over all chunks: see `formulas.gradients`."""
    if not x.size:
        return x
    call, statistics = Call(x, spec, weight, mask=mask), Statistics(None, mean, shift, var)
    return _NUMPY.dx(call, statistics, dy, active, (dbias, dweight))


def _dresidual_of_chunk(dy: np.ndarray, active: np.ndarray | None, mask: np.ndarray | None) -> np.ndarray:
    for keep in (active, mask):
        if keep is not None:
            dy = np.where(keep, dy, np.zeros((), dy.dtype))
    return dy


def _sum_of_chunk(chunk: np.ndarray, axis: tuple[int, ...], keepdims: bool) -> np.ndarray:
    total = formulas.blocked_sum(array_api_compat.numpy, chunk, axis)
    return np.expand_dims(total, axis) if keepdims else total
