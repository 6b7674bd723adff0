"""For users of torch: batch norm as ``nn.Module``s with torch's names, and whole models converted to them.

What works with torch's modules works with these: autocast, DataParallel, ``torch.func``, forward-mode and double
backward, ``torch.compile(fullgraph=True)``, ``torch.export``, ``torch.jit.trace``, fake tensors. Where they differ:

- Running statistics are float64 where the device has it, and ``half()`` leaves them so.
- A channel whose batch has a NaN or an infinity keeps its running statistics.
- A forward pass inside a backward pass is taken for recomputation (activation checkpointing): it counts no batch.
- They are ``anybn.batch_norm``: correctly rounded, with its checks and its words for what is wrong.

``torch.compile`` ends its graph at a batch norm that trains over a group, or inside `anybn.accumulate`: these run
outside of it, in the order of the program, and ``fullgraph=True`` refuses them.

Exports hold torch's own batch norm, with statistics in float32; ``docs/torch.md`` says what precision that keeps, and
which classes convert. Importing this module lets tools of torch that ask for a batch norm's class know ours.

What does not work is an error: ``torch.jit.script``, which cannot read this code; a
second derivative through what ``torch.compile`` has compiled, which torch refuses for everything; ``torch.func.vmap``
in training over buffers that are not batched.

A training step does not wait for the device, so a CUDA graph can capture it, after one call that compiles its kernels.

>>> import torch, anybn.torch
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
>>> anybn.torch.convert(model)[1]
BatchNorm1d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
"""

from anybn.torch import torchs_tools
from anybn.torch.classes import register
from anybn.torch.convert import convert, revert
from anybn.torch.fold import fold
from anybn.torch.module import BatchNorm1d, BatchNorm2d, BatchNorm3d

torchs_tools.tell()

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "convert", "fold", "register", "revert"]
