"""batchnorm.cu on torch's CUDA tensors: their own pointers, torch's memory, torch's current stream.

So what torch does about memory and order holds here: its caching allocator, CUDA graphs, streams. CuPy compiles and
launches; it allocates nothing.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Any

import torch

from anybn.core.call import dtype_name
from anybn.kernels.cuda import launch as _cuda
from anybn.kernels.cuda.arrays import CudaArrays
from anybn.kernels.layout import Layout, layout_of_strides


class TorchArrays(CudaArrays):
    def on(self, x: torch.Tensor) -> AbstractContextManager[Any]:
        return torch.cuda.device(x.device)

    def gpu(self, x: torch.Tensor) -> _cuda.Gpu:
        return _cuda.gpu(x.device.index, torch.cuda.current_stream(x.device).cuda_stream, self.scratch_beside(x))

    @staticmethod
    def scratch_beside(x: torch.Tensor) -> Any:
        """Allocates bytes on x's device; torch gives them to nobody on another stream while they may be in use."""

        def scratch(nbytes: int) -> tuple[int, torch.Tensor]:
            memory = torch.empty(nbytes, dtype=torch.uint8, device=x.device)
            return memory.data_ptr(), memory

        return scratch

    def pointer(self, a: torch.Tensor) -> int:
        return a.data_ptr()

    def supports(self, x: torch.Tensor) -> bool:
        return super().supports(x) and not x.is_neg()

    def layout_of(self, x: torch.Tensor, axis: int) -> Layout | None:
        return layout_of_strides(tuple(x.shape), x.stride(), 1, axis)

    def strides(self, a: torch.Tensor) -> Hashable:
        return a.stride(), a.is_neg()  # a lazily negated view has the other sign in memory

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

    def note_update(self, x: torch.Tensor) -> None:
        note_update(x)


KERNELS = TorchArrays()

#: (device, stream) -> the end of the last update of running statistics there.
_updates: dict[tuple[int, int], torch.cuda.Event] = {}


def note_update(x: torch.Tensor) -> None:
    """Running statistics are being updated on the current stream of x's device."""
    if torch.cuda.is_current_stream_capturing():  # an event of a captured graph is none outside of it
        return
    stream = torch.cuda.current_stream(x.device)
    place = stream.device.index, stream.cuda_stream
    if place not in _updates:
        _updates[place] = torch.cuda.Event()
    _updates[place].record(stream)


def await_updates(x: torch.Tensor) -> None:
    """What is queued next for x's device comes after the updates on its other streams; the host does not wait."""
    stream = torch.cuda.current_stream(x.device)
    for (device, other), update in tuple(_updates.items()):
        if device == stream.device.index and other != stream.cuda_stream:
            stream.wait_event(update)
