"""Batch norm, formula by formula, in long double on NumPy arrays. Imports nothing of the package that it judges.

Long double has 64 bits of precision on x86 and 113 or 53 elsewhere; x is shifted by one of its own values first, so
that even 53 bits lose nothing to a mean far from 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

LONG = np.longdouble


class Mean(NamedTuple):
    """``origin + offset``, kept apart: a long double holds 1e6 to no more than 500 units of float64 around 0."""

    origin: np.ndarray
    offset: np.ndarray


class Statistics(NamedTuple):
    """Over the values of each channel; arrays are ``(C,)``."""

    count: int  # type: ignore[assignment]
    mean: Mean
    m2: np.ndarray

    def var(self, ddof: int = 0) -> np.ndarray:
        return self.m2 / LONG(self.count - ddof)


def channels_first(x: np.ndarray, axis: int) -> np.ndarray:
    """(N, C, H, W) -> (C, N * H * W)."""
    return np.moveaxis(np.asarray(x), axis, 0).reshape(x.shape[axis], -1)


def selected(x: np.ndarray, axis: int, mask: np.ndarray | None) -> np.ndarray:
    """The values that count, as (C, count) in long double."""
    values = channels_first(x, axis).astype(LONG)
    if mask is None:
        return values
    shape = [size for i, size in enumerate(x.shape) if i != axis % x.ndim]
    return values[:, np.broadcast_to(mask, shape).reshape(-1)]


def statistics(x: np.ndarray, axis: int = 1, mask: np.ndarray | None = None) -> Statistics:
    """Count, mean and m2 of each channel, in two passes over the values less one of them."""
    values = selected(x, axis, mask)
    origin = values[:, :1].copy()
    values -= origin
    offset = values.mean(1, keepdims=True)
    values -= offset
    return Statistics(values.shape[1], Mean(origin[:, 0], offset[:, 0]), np.square(values, out=values).sum(1))


def along(values: Any, x: np.ndarray, axis: int) -> np.ndarray:
    shape = [1] * x.ndim
    shape[axis] = -1
    return np.asarray(values, LONG).reshape(shape)


def deviations(x: np.ndarray, mean: Mean | np.ndarray, axis: int) -> np.ndarray:
    origin, offset = mean if isinstance(mean, Mean) else (mean, np.zeros_like(mean))
    return (x.astype(LONG) - along(origin, x, axis)) - along(offset, x, axis)


def normalize(
    x: np.ndarray,
    mean: Mean | np.ndarray,
    var: np.ndarray,
    *,
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    eps: float = 1e-5,
    axis: int = 1,
    residual: np.ndarray | None = None,
    relu: bool = False,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """``relu((x - mean) / sqrt(var + eps) * weight + bias + residual)``, 0 where masked."""
    y = deviations(x, mean, axis) / np.sqrt(along(var, x, axis) + LONG(eps))
    if weight is not None:
        y = y * along(weight, x, axis)
    if bias is not None:
        y = y + along(bias, x, axis)
    if residual is not None:
        y = y + residual.astype(LONG)
    if relu:
        y = np.maximum(y, 0)
    if mask is not None:
        y = np.where(np.expand_dims(mask, axis), y, 0)
    return y


class Gradients(NamedTuple):
    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    residual: np.ndarray
    #: The sizes of what was added up to them, by which a result of cancellation is judged in narrow arithmetic.
    x_size: np.ndarray
    weight_size: np.ndarray
    bias_size: np.ndarray


def gradients(
    dy: np.ndarray,
    x: np.ndarray,
    mean: Mean | np.ndarray,
    var: np.ndarray,
    *,
    count: int | None,
    weight: np.ndarray | None = None,
    eps: float = 1e-5,
    axis: int = 1,
    active: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> Gradients:
    """Of ``sum(y * dy)``. ``count`` values gave the statistics; None: they are constants. ``active``: y > 0 under relu.

    dL/dvar and dL/dmean by the chain rule, as in Ioffe & Szegedy 2015, section 3.
    """
    dy = dy.astype(LONG)
    if active is not None:
        dy = np.where(active, dy, 0)
    if mask is not None:
        mask = np.expand_dims(mask, axis)
        dy = np.where(mask, dy, 0)
    rstd = 1 / np.sqrt(along(var, x, axis) + LONG(eps))
    deviation = deviations(x, mean, axis)
    if mask is not None:
        deviation = np.where(mask, deviation, 0)
    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    dxhat = dy if weight is None else dy * along(weight, x, axis)
    dx = dxhat * rstd
    if count is not None:
        dvar = (dxhat * deviation).sum(axes, keepdims=True) * (-(rstd**3) / 2)
        dmean = -(dxhat * rstd).sum(axes, keepdims=True)
        dx = dx + dvar * 2 * deviation / count + dmean / count
        if mask is not None:
            dx = np.where(mask, dx, 0)
    terms = dy * deviation * rstd
    slope = rstd if weight is None else np.abs(rstd * along(weight, x, axis))
    return Gradients(
        dx, terms.sum(axes), dy.sum(axes), dy, slope * np.ones_like(dx), np.abs(terms).sum(axes), np.abs(dy).sum(axes)
    )


def running(old: np.ndarray, batch: np.ndarray, momentum: float) -> np.ndarray:
    """``(1 - momentum) * old + momentum * batch``."""
    return (1 - LONG(momentum)) * np.asarray(old, LONG) + LONG(momentum) * np.asarray(batch, LONG)


def trained(
    batches: Iterable[Statistics], momentum: float | None = 0.1, ddof: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """(running_mean, running_var) after these batches, from 0 and 1; momentum None: the average of all of them."""
    mean, var = np.zeros(1, LONG), np.ones(1, LONG)
    for k, batch in enumerate(batches, 1):
        m = 1 / k if momentum is None else momentum
        mean = running(mean, batch.mean.origin + batch.mean.offset, m)
        var = running(var, batch.var(ddof), m)
    return mean, var


EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


def error(value: Any, reference: Any, dtype: str, size: Any = 1) -> float:
    """``max |value - reference| / max(size, |reference|)`` in units of the dtype's eps; NaN if either has a NaN.

    With size 0, each value is judged by its own size, however small.
    """
    if isinstance(reference, Mean):
        reference = reference.origin + reference.offset
    value, reference = np.asarray(value).astype(LONG), np.asarray(reference, LONG)
    assert value.shape == reference.shape, f"{value.shape} for {reference.shape}"
    if not value.size:
        return 0.0
    difference = np.abs((value - reference).astype(float))  # what comes after the subtraction cancels nothing
    return float(np.max(difference / np.maximum(size, np.abs(reference.astype(float))))) / EPS[dtype]
