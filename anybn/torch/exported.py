"""A module's forward pass where torch exports it: one batch norm of torch's, which exporters and backends know.

It is computed with weight, bias and statistics in float32 (in float64 for such x), as torch's own module would be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def evaluated(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
    momentum: float | None = None,
) -> Tensor:
    """momentum: nothing is learnt, but torch's own module writes it down too."""
    mean, var, weight, bias = (_widened(a, x) for a in (mean, var, weight, bias))
    return _behind(F.batch_norm(x, mean, var, weight, bias, False, momentum or 0.0, eps), residual, relu)


def trained(module: Any, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Normalized with x's own statistics, of which the module learns what it would; but NaN as any other number."""
    mean, var, batches, momentum = module.running_mean, module.running_var, module.num_batches_tracked, module.momentum
    weight, bias = _widened(module.weight, x), _widened(module.bias, x)
    if mean is None or not (module.training and module.track_running_stats):
        return _behind(F.batch_norm(x, None, None, weight, bias, True, 0.0, module.eps), residual, relu)
    if momentum is not None and mean.dtype is var.dtype is _wide(x):
        if batches is not None:
            batches.add_(1)
        y = F.batch_norm(x, mean, var, weight, bias, True, momentum, module.eps)
        return _behind(y, residual, relu)
    # With a momentum of 1, torch leaves those of the batch, of which the module's statistics learn in their own dtype.
    batch_mean, batch_var = (torch.zeros_like(a, dtype=_wide(x)) for a in (mean, var))
    y = F.batch_norm(x, batch_mean, batch_var, weight, bias, True, 1.0, module.eps)
    with torch.no_grad():
        if batches is not None:
            batches.add_(1)
        if momentum is None:
            momentum = 0.0 if batches is None else 1.0 / batches.to(mean.dtype)
        mean.lerp_(batch_mean.to(mean.dtype), momentum)
        var.lerp_(batch_var.to(var.dtype), momentum)
    return _behind(y, residual, relu)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _widened(a: Tensor | None, x: Tensor) -> Any:
    return a if a is None or a.dtype is _wide(x) else a.to(_wide(x))


def _behind(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        y = y + residual
    return y.relu() if relu else y
