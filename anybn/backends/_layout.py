"""How NumPy arrays lie in memory, and giving several of them one layout."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Lying(NamedTuple):
    """An array as it lies in memory."""

    order: tuple[int, ...]
    """the axes from the slowest to the fastest, and in this order, the shape as"""
    outer: int
    channels: int
    inner: int

    def of(self, a: np.ndarray) -> np.ndarray:
        """a, which lies the same way, as ``(outer, channels, inner)``, or ``(outer, channels)`` where inner is 1."""
        shape = (self.outer, self.channels, self.inner) if self.inner > 1 else (self.outer, self.channels)
        return a.transpose(self.order).reshape(shape)


def lying(x: np.ndarray, axis: int) -> Lying | None:
    """How x lies in memory; None if it has gaps, overlaps or runs backwards."""
    if x.flags.c_contiguous:
        order = tuple(range(x.ndim))
    else:
        order = tuple(sorted(range(x.ndim), key=lambda i: (-x.strides[i], i)))
        if not x.transpose(order).flags.c_contiguous:
            return None
    p = order.index(axis)
    outer = math.prod(x.shape[i] for i in order[:p])
    inner = math.prod(x.shape[i] for i in order[p + 1 :])
    if x.shape[axis] == 1:
        return Lying(order, 1, 1, outer * inner)
    return Lying(order, outer, x.shape[axis], inner)


class Alike(NamedTuple):
    """x, and others that were made to lie like it."""

    lying: Lying
    x: np.ndarray
    others: tuple[np.ndarray | None, ...]


def alike(x: np.ndarray, axis: int, *others: np.ndarray | None) -> Alike:
    found = lying(x, axis)
    if found is None:
        x = x.copy(order="K")
        found = lying(x, axis)
        assert found is not None
    order = found.order

    def like_x(a: np.ndarray | None) -> np.ndarray | None:
        if a is None or a.strides == x.strides or a.transpose(order).flags.c_contiguous:
            return a
        copy = np.empty_like(x, dtype=a.dtype)
        copy[...] = a
        return copy

    return Alike(found, x, tuple(like_x(a) for a in others))


def parameter(values: np.ndarray | None, count: int, default: float) -> np.ndarray:
    return np.full(count, default) if values is None else values.astype(np.float64)


def destination(x: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    """Where kernels may write what lies like x: out, if it does."""
    return out if out is not None and out.strides == x.strides else np.empty_like(x)


def delivered(y: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    if out is None or out is y:
        return y
    out[...] = y
    return out


def as_float64(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)
