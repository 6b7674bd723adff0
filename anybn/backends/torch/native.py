"""torch's own batch norm: for CUDA tensors where CuPy is missing, and for whoever asks for it.

Everything around it is anybn's: settings, checks, the commit, relu and residual. Its accuracy is torch's.
"""

from __future__ import annotations

import array_api_compat.torch
import torch

from anybn.core import formulas as _core
from anybn.core.formulas import Gradients, Spec, Statistics, Update


def supports(x: torch.Tensor) -> bool:
    return True


def batch_statistics(x: torch.Tensor, axis: int) -> Statistics:
    axes = _core.reduced_axes(x.ndim, axis)
    var, mean = torch.var_mean(x.double(), axes, correction=0)
    count = x.numel() // x.shape[axis]
    return Statistics(count, mean, None, var, var * count)


def train(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    spec: Spec,
    out: torch.Tensor | None = None,
    update: Update | None = None,
) -> tuple[torch.Tensor, Statistics, None]:
    count = x.numel() // x.shape[spec.axis]
    # With momentum 1, the running statistics are the batch's; those that torch saves for backward lack the variance.
    mean, unbiased = torch.zeros((2, x.shape[spec.axis]), dtype=_kept(x), device=x.device)
    y = _normalized(x, weight, bias, residual, mean, unbiased, True, spec, out)
    m2 = unbiased.double() * (count - 1)
    return y, Statistics(count, mean.double(), None, m2 / count, m2), None


def evaluate(
    x: torch.Tensor,
    statistics: Statistics,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    spec: Spec,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    mean, var = statistics.mean.to(_kept(x)), statistics.var.to(_kept(x))
    return _normalized(x, weight, bias, residual, mean, var, False, spec, out)


def updated_running_statistics(statistics: Statistics, update: Update) -> tuple[torch.Tensor, torch.Tensor]:
    running_mean, running_var, momentum, ddof, propagate = update
    assert momentum is not None
    return _core.updated_running_statistics(
        array_api_compat.torch, running_mean, running_var, statistics, momentum, ddof, propagate
    )


def gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    statistics: Statistics,
    weight: torch.Tensor | None,
    active: torch.Tensor | None,
    spec: Spec,
) -> Gradients:
    dy = dy if active is None else torch.where(active, dy, 0)
    kept, affine = _kept(x), weight is not None
    mean, var = statistics.mean.to(kept), statistics.var.to(kept)
    rstd = torch.rsqrt(statistics.var + spec.eps).to(kept)
    dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        dy.movedim(spec.axis, 1),
        x.movedim(spec.axis, 1),
        None if weight is None else weight.to(kept),
        mean,
        var,
        mean,
        rstd,
        statistics.count is not None,
        spec.eps,
        [True, affine, affine],
    )
    dx, dresidual = dx.movedim(1, spec.axis), dy if spec.differentiates_residual else None
    if weight is None:
        return Gradients(dx, None, None, dresidual)
    return Gradients(dx, dweight.to(weight.dtype), dbias.to(weight.dtype), dresidual)


def _kept(x: torch.Tensor) -> torch.dtype:
    """The dtype in which torch's operation takes what is per channel, along with x."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _normalized(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    training: bool,
    spec: Spec,
    out: torch.Tensor | None,
) -> torch.Tensor:
    weight, bias = (a if a is None else a.to(_kept(x)) for a in (weight, bias))
    cudnn = torch.backends.cudnn.enabled
    y = torch.batch_norm(x.movedim(spec.axis, 1), weight, bias, mean, var, training, 1.0, spec.eps, cudnn)
    y = y.movedim(1, spec.axis)
    if residual is not None:
        y = y + residual
    if spec.relu:
        y = torch.relu(y)
    return y if out is None else out.copy_(y)
