"""batchnorm.cu on torch's CUDA tensors: their own pointers, torch's memory, torch's current stream.

So what torch does about memory and order holds here: its caching allocator, CUDA graphs, streams. CuPy compiles and
launches; it allocates nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from anybn.core.call import dtype_name
from anybn.kernels.cuda import launch
from anybn.kernels.cuda.arrays import CudaArrays
from anybn.kernels.layout import Layout, layout_of_strides


@functools.cache
def scratch_on(device: torch.device) -> Callable[[int], tuple[int, torch.Tensor]]:
    """Allocates bytes on a device; torch gives them to nobody on another stream while they may be in use."""

    def scratch(nbytes: int) -> tuple[int, torch.Tensor]:
        memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return memory.data_ptr(), memory

    return scratch


class TorchArrays(CudaArrays):
    def on(self, x: torch.Tensor) -> AbstractContextManager[Any]:
        return nullcontext() if x.device.index == torch.cuda.current_device() else torch.cuda.device(x.device)

    def gpu(self, x: torch.Tensor) -> launch.Gpu:
        index = x.device.index
        return launch.gpu(index, current_stream(index), scratch_on(x.device))

    def pointer(self, a: torch.Tensor) -> int:
        return a.data_ptr()

    def supports(self, x: torch.Tensor) -> bool:
        return super().supports(x) and not x.is_neg()

    def layout_of(self, x: torch.Tensor, axis: int) -> Layout | None:
        return layout_of_strides(tuple(x.shape), x.stride(), 1, axis)

    def strides(self, a: torch.Tensor) -> Hashable:
        strides = tuple(stride for stride, size in zip(a.stride(), a.shape, strict=True) if size > 1)
        return strides, a.is_neg()  # a lazily negated view has the other sign in memory

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().clone(memory_format=torch.preserve_format)

    def beside(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty_like(x, dtype=dtype)

    def per_channel(self, x: torch.Tensor, rows: int, channels: int, dtype: Any = torch.float64) -> Any:
        return torch.empty((rows, channels), dtype=dtype, device=x.device).unbind()

    def vector(self, a: torch.Tensor, dtype: str | None = None) -> torch.Tensor:
        a = a.detach().resolve_neg()
        if dtype is not None and dtype_name(a.dtype) != dtype:
            a = a.to(getattr(torch, dtype))
        return a.contiguous()

    def positions(self, mask: torch.Tensor, shape: tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
        return mask.detach().expand(shape).permute(order).contiguous()

    def first_shown(self, positions: torch.Tensor) -> torch.Tensor:
        return positions.view(torch.uint8).argmax()

    def note_update(self, x: torch.Tensor) -> None:
        """Running statistics are being updated on the current stream of x's device."""
        index = x.device.index
        place = index, current_stream(index)
        if place not in _updates:
            _updates[place] = torch.cuda.current_stream(x.device)


KERNELS = TorchArrays()

#: Of a device, by its index: torch.cuda.current_stream takes 20 times as long. A torch without CUDA does not have it.
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # type: ignore[assignment]

#: (device, stream) of updates of running statistics -> the stream.
_updates: dict[tuple[int, int], torch.cuda.Stream] = {}


def await_updates(x: torch.Tensor) -> None:
    """What is queued next for x's device comes after the updates on its other streams; the host does not wait."""
    index = x.device.index
    here = current_stream(index)
    for (device, other), stream in tuple(_updates.items()):
        if device == index and other != here:
            torch.cuda.current_stream(x.device).wait_stream(stream)
