"""How NumPy arrays lie in memory, and giving several of them one layout."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """An array without gaps in memory is ``(outer, channels, inner)``, when its axes come in some order."""

    order: tuple[int, ...]
    """the axes, from the slowest in memory to the fastest"""
    outer: int
    """how many values the axes before the channels' have"""
    channels: int
    """how many channels there are"""
    inner: int
    """how many values of a channel lie side by side"""

    def reshape(self, a: np.ndarray) -> np.ndarray:
        """A view of a, which has this layout: ``(outer, channels, inner)``, or ``(outer, channels)`` if inner is 1."""
        shape = (self.outer, self.channels, self.inner) if self.inner > 1 else (self.outer, self.channels)
        return a.transpose(self.order).reshape(shape)

    def flat(self, a: np.ndarray) -> np.ndarray:
        """A view of a, which has this layout: its memory from first to last."""
        return a.reshape(-1) if a.flags.c_contiguous else a.transpose(self.order).reshape(-1)


def layout_of(x: np.ndarray, axis: int) -> Layout | None:
    """The layout of x with its channels on axis; None if x has gaps, overlaps or runs backwards."""
    return layout_of_strides(x.shape, x.strides, x.itemsize, axis)


@functools.lru_cache(maxsize=1024)
def layout_of_strides(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, axis: int) -> Layout | None:
    """`layout_of` by an array's properties; strides and itemsize in the same unit."""
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
        return Layout(order, 1, 1, outer * inner)
    return Layout(order, outer, shape[axis], inner)


def match_layouts(
    x: np.ndarray, axis: int, *others: np.ndarray | None
) -> tuple[Layout, np.ndarray, list[np.ndarray | None]]:
    """x, or a copy of it that has a layout, and the others in the same one, copied where theirs is another."""
    layout = layout_of(x, axis)
    if layout is None:
        x = x.copy(order="K")
        layout = layout_of(x, axis)
        assert layout is not None
    order = layout.order
    return layout, x, [None if a is None else lies_like(x, order, a) for a in others]


def lies_like(x: np.ndarray, order: tuple[int, ...], a: np.ndarray) -> np.ndarray:
    """a in the layout of x, which has this order and no gaps: as it is, or a copy."""
    if (a.itemsize == x.itemsize and a.strides == x.strides) or a.transpose(order).flags.c_contiguous:
        return a
    copy = np.empty_like(x, dtype=a.dtype)
    copy[...] = a
    return copy


def parameter(values: np.ndarray | None, count: int, default: float) -> np.ndarray:
    """weight or bias as so many float64."""
    return np.full(count, default) if values is None else values.astype(np.float64)


def destination(x: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    """An array of x's layout for y: out, if it has that."""
    return out if out is not None and out.strides == x.strides else np.empty_like(x)


def delivered(y: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    """y in out, if there is one."""
    if out is None or out is y:
        return y
    out[...] = y
    return out


def as_float64(values: np.ndarray) -> np.ndarray:
    """Values of x as float64; 16-bit ones come as their bits, bfloat16 as uint16 and float16 as int16."""
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    elif values.dtype == np.int16:
        values = values.view(np.float16)
    return values.astype(np.float64)
