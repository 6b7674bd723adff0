"""How NumPy arrays lie in memory, and giving several of them one layout."""

from __future__ import annotations

import functools
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

    def flat(self, a: np.ndarray) -> np.ndarray:
        """a, which lies the same way, as its memory from first to last."""
        return a.reshape(-1) if a.flags.c_contiguous else a.transpose(self.order).reshape(-1)


def lying(x: np.ndarray, axis: int) -> Lying | None:
    """How x lies in memory; None if it has gaps, overlaps or runs backwards."""
    return of_strides(x.shape, x.strides, x.itemsize, axis)


@functools.lru_cache(maxsize=1024)
def of_strides(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, axis: int) -> Lying | None:
    """`lying` by an array's properties; strides and itemsize in the same unit."""
    long = [i for i, size in enumerate(shape) if size > 1]  # the strides of other axes mean nothing
    by_stride = sorted(long, key=lambda i: -strides[i])
    expected = itemsize
    for i in reversed(by_stride):
        if strides[i] != expected:
            return None
        expected *= shape[i]
    short = [i for i in range(len(shape)) if i not in long]
    order = tuple(range(len(shape))) if by_stride == long else (*short, *by_stride)
    p = order.index(axis)
    outer = math.prod(shape[i] for i in order[:p])
    inner = math.prod(shape[i] for i in order[p + 1 :])
    if shape[axis] == 1:
        return Lying(order, 1, 1, outer * inner)
    return Lying(order, outer, shape[axis], inner)


class Alike(NamedTuple):
    """x, and others that were made to lie like it."""

    lying: Lying
    x: np.ndarray
    others: list[np.ndarray | None]


def alike(x: np.ndarray, axis: int, *others: np.ndarray | None) -> Alike:
    found = lying(x, axis)
    if found is None:
        x = x.copy(order="K")
        found = lying(x, axis)
        assert found is not None
    order = found.order
    return Alike(found, x, [a if a is None or _lies_like(x, order, a) else _laid_like(x, a) for a in others])


def _lies_like(x: np.ndarray, order: tuple[int, ...], a: np.ndarray) -> bool:
    return a.strides == x.strides or a.transpose(order).flags.c_contiguous


def _laid_like(x: np.ndarray, a: np.ndarray) -> np.ndarray:
    copy = np.empty_like(x, dtype=a.dtype)
    copy[...] = a
    return copy


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
    """Values of x, 16-bit ones given as their bits (see `_kernels`)."""
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    elif values.dtype == np.int16:
        values = values.view(np.float16)
    return values.astype(np.float64)
