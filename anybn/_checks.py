"""Every check of an array, before anything is computed or changed; so the words are the same on all backends.

Each function returns the argument as it is used from then on, or raises with: what it was, what was wanted, what to do.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from anybn import _settings
from anybn._settings import FLOATING
from anybn.backends.base import Backend, beside_values
from anybn.core.call import Array, dtype_name
from anybn.errors import NonFiniteError

_STATE_ARRAYS = ("weight", "bias", "running_mean", "running_var")


def shape_of(array: Array) -> tuple[int, ...]:
    return tuple(array.shape)


def size_of(x: Array) -> int:
    """How many values x has. Raises ValueError where only a graph's user will know, as with arguments of ndonnx."""
    try:
        return math.prod(x.shape)
    except TypeError as error:
        raise ValueError(
            f"x has the unknown shape {shape_of(x)}: evaluation takes it, but statistics and training need all sizes"
        ) from error


def floating_array(name: str, value: Array, backend: Backend) -> Array:
    if message := backend.refusal(value):
        raise TypeError(f"{name} {message}")
    dtype = dtype_name(value.dtype)
    if dtype in FLOATING:
        return value
    if dtype.startswith("complex"):
        advice = "normalize real and imaginary parts separately"
    elif dtype.startswith(("int", "uint", "bool")):
        advice = "cast to float32"
    else:
        advice = f"cast to one of {', '.join(FLOATING)}"
    raise TypeError(f"{name} has dtype {dtype}: {advice}")


def batch(x: Array, backend: Backend, channel_axis: Any, num_features: int | None, name: str = "x") -> int:
    """The channel axis of x, called name, as an index from the front."""
    floating_array(name, x, backend)
    shape, given = shape_of(x), _settings.axis(channel_axis)
    rank = len(shape)
    index = given + rank if given < 0 else given
    if rank < 2 or not 0 <= index < rank or (num_features is not None and shape[index] != num_features):
        raise ValueError(_not_a_batch(name, shape, given, num_features))
    return index


def _not_a_batch(name: str, shape: tuple[int, ...], axis: int, num_features: int | None) -> str:
    rank = len(shape)
    if rank < 2:
        advice = "for one sample use x[None]" if rank == 1 else "give it a batch and a channel axis"
        return f"{name} has shape {shape}; batch norm needs (N, C, ...): {advice}"
    if not -rank <= axis < rank:
        return f"axis is {axis} but {name} has shape {shape}: the channel axis must lie in [{-rank}, {rank - 1}]"
    if shape[-1] == num_features:
        advice = f"its shape {shape} looks channels-last: pass axis=-1"
    elif shape[1] == num_features:
        advice = f"its shape {shape} looks channels-first: pass axis=1"
    else:
        advice = f"its shape is {shape}: pass the channel axis as axis, or use a state of {shape[axis]} channels"
    return f"{name} has {shape[axis]} channels on axis {axis} but the state has {num_features}; {advice}"


def same_place(name: str, value: Array, x: Array, backend: Backend, beside: str = "x") -> None:
    if not backend.owns(type(value)):
        cls = type(value)
        if lost := beside_values(cls):
            raise TypeError(f"{name} is a {cls.__module__}.{cls.__qualname__}, {lost}")
        raise TypeError(
            f"{name} is a {cls.__module__}.{cls.__qualname__} but {beside} is a {backend.name} array: "
            f"pass {name} as an array of {beside}'s library"
        )
    if backend.device_of(value) != backend.device_of(x):
        raise ValueError(
            f"{name} is on {backend.device_of(value)} but {beside} is on {backend.device_of(x)}: move one to the other"
        )


def like_x(name: str, value: Array, x: Array, backend: Backend) -> Array:
    """residual, out and dy: x's library, device, shape and dtype."""
    same_place(name, value, x, backend)
    if message := backend.refusal(value):
        raise TypeError(f"{name} {message}")
    if shape_of(value) != shape_of(x):
        raise ValueError(f"{name} has shape {shape_of(value)} but x has {shape_of(x)}: they must be the same")
    if value.dtype != x.dtype:
        raise TypeError(
            f"{name} has dtype {dtype_name(value.dtype)} but x has {dtype_name(x.dtype)}: cast {name} to x's dtype"
        )
    return value


def mask(value: Array, x: Array, axis: int | tuple[int, ...], backend: Backend, *, whole: bool = False) -> Array:
    """The mask with a 1 on the channel axis, or axes, so that it broadcasts against x; with ``whole``, it may have
    x's own axes instead."""
    same_place("mask", value, x, backend)
    if dtype_name(value.dtype) != "bool":
        raise TypeError(f"mask has dtype {dtype_name(value.dtype)}; it must be bool: use mask != 0")
    axes = (axis,) if isinstance(axis, int) else axis
    shape = shape_of(value)
    if whole and len(shape) == len(shape_of(x)):
        axes = ()
    wanted = tuple(size for i, size in enumerate(shape_of(x)) if i not in axes)
    if len(shape) > len(wanted) or any(
        m not in (1, w) for m, w in zip(reversed(shape), reversed(wanted), strict=False)
    ):
        raise ValueError(
            f"mask has shape {shape}; x has {shape_of(x)} with channels on axis {axis}, so it must be {wanted} "
            "or broadcast to that: x's shape without the channel axis"
        )
    laid = [1] * (len(wanted) - len(shape)) + list(shape)
    for i in sorted(axes):
        laid.insert(i, 1)
    return backend.namespace(x).reshape(value, tuple(laid))


def state_arrays(
    arrays: tuple[Array | None, ...], channels: int, x: Array = None, backend: Backend | None = None
) -> None:
    """That weight, bias, running_mean and running_var, or the first of them, are ``(C,)``, in every call: what a state
    or module holds, others hold too, and can resize. And that x, if it is given, does not lie on them."""
    wanted = (channels,)
    for a in arrays:
        if a is not None and a.shape != wanted and shape_of(a) != wanted:
            name = next(name for name, b in zip(_STATE_ARRAYS, arrays, strict=False) if b is a)
            raise ValueError(_wrong_shape(name, a, channels))
    if backend is not None and backend.overlaps_any(x, arrays):
        raise ValueError("x shares memory with the state: give one of them a copy")


def _wrong_shape(name: str, value: Array, channels: int) -> str:
    return f"{name} has shape {shape_of(value)}; the state has {channels} channels: it must be ({channels},)"


def as_it_was(name: str, value: Array, shape: tuple[int, ...]) -> None:
    """That what a pullback reads has the shape that it had when y was made."""
    if shape_of(value) != shape:
        raise ValueError(
            f"{name} has shape {shape_of(value)} but had {shape} when y was made: the pullback reads it, so leave it "
            "as it was"
        )


def out(
    value: Array, x: Array, residual: Array | None, state_arrays: tuple[Array | None, ...], backend: Backend
) -> Array:
    if not backend.writable:
        raise TypeError(f"out was given but {backend.name} arrays cannot be written to: use the returned array")
    like_x("out", value, x, backend)
    if problem := backend.write_problem(value):
        raise ValueError(f"out {problem}")
    for name, array in (("x", x), ("residual", residual)):
        if array is not None and backend.overlaps(value, array) and not backend.same_memory(value, array):
            raise ValueError(f"out shares part of {name}'s memory: pass {name} itself, or an array of its own")
    if backend.overlaps_any(value, state_arrays):
        raise ValueError("out shares memory with the state: pass an array of its own")
    return value


def state_array(backend: Backend, name: str, value: Array, num_features: int) -> None:
    """What weight, bias, running_mean and running_var may be set to."""
    floating_array(name, value, backend)
    if shape_of(value) != (num_features,):
        raise ValueError(_wrong_shape(name, value, num_features))
    if name.startswith("running") and not backend.is_traced(value):
        problem = impossible_statistics(name, backend.to_numpy(value))
        if problem:
            raise ValueError(problem)


def impossible_statistics(name: str, values: Any) -> str:
    """Why these NumPy values cannot be a running mean or variance; or ""."""
    values = np.asarray(values, dtype=np.float64)
    bad = ~np.isfinite(values) if name.endswith("running_mean") else ~(np.isfinite(values) & (values >= 0))
    if not bad.any():
        return ""
    c = int(np.argmax(bad))
    wanted = "finite" if name.endswith("running_mean") else "finite and not negative"
    return f"{name} is {values[c]} in channel {c}; it must be {wanted}"


def enough_values(count: int, x: Array, masked: bool) -> None:
    if count < 2:
        unmasked = f" with {count} unmasked" if masked else ""
        raise ValueError(
            f"training needs more than 1 value per channel, got shape {shape_of(x)}{unmasked}: "
            "use a larger batch, eval mode, or a layer or group norm"
        )


def named_channels(channels: tuple[int, ...]) -> str:
    """The first ten."""
    return ", ".join(map(str, channels[:10])) + (", ..." if len(channels) > 10 else "")


def finite_statistics(what_gives: str, mean: np.ndarray, var: np.ndarray, advice: str) -> None:
    """Raises NonFiniteError that names the channels where one of them is not finite."""
    channels = tuple(int(c) for c in np.flatnonzero(~(np.isfinite(mean) & np.isfinite(var))))
    if channels:
        raise NonFiniteError(
            f"{what_gives} statistics that are NaN or infinite in {len(channels)} of {len(mean)} channels "
            f"({named_channels(channels)}): {advice}",
            channels,
        )
