"""torch's own batch norm: for CUDA tensors where CuPy is missing, and for whoever asks for it.

Everything around it is anybn's: settings, checks, the commit, relu and residual. Its accuracy is torch's.
"""

from __future__ import annotations

import array_api_compat.torch
import torch

from anybn.core import formulas
from anybn.core.call import Call, Gradients, Statistics, Update


def supports(x: torch.Tensor) -> bool:
    return True


def takes_mask(call: Call) -> bool:
    return False


def batch_statistics(call: Call) -> Statistics:
    x, axis = call.x, call.spec.axis
    var, mean = torch.var_mean(x.double(), formulas.reduced_axes(x.ndim, axis), correction=0)
    count = x.numel() // x.shape[axis]
    return Statistics(count, mean, None, var, var * count)


def train(call: Call) -> tuple[torch.Tensor, Statistics, None]:
    x, channels = call.x, call.x.shape[call.spec.axis]
    count = x.numel() // channels
    # With momentum 1, the running statistics are the batch's; those that torch saves for backward lack the variance.
    mean, unbiased = torch.zeros((2, channels), dtype=_channel_dtype(x), device=x.device)
    y = _normalized(call, mean, unbiased, training=True)
    m2 = unbiased.double() * (count - 1)
    return y, Statistics(count, mean.double(), None, m2 / count, m2), None


def evaluate(call: Call, statistics: Statistics) -> torch.Tensor:
    dtype = _channel_dtype(call.x)
    return _normalized(call, statistics.mean.to(dtype), statistics.var.to(dtype), training=False)


def updated_running_statistics(update: Update, statistics: Statistics) -> tuple[torch.Tensor, torch.Tensor]:
    return formulas.updated_running_statistics(array_api_compat.torch, update, statistics)


def gradients(
    call: Call, statistics: Statistics, dy: torch.Tensor, active: torch.Tensor | None, wants_residual: bool
) -> Gradients:
    x, spec, weight, bias = call[:4]
    dy = dy if active is None else torch.where(active, dy, 0)
    dtype = _channel_dtype(x)
    mean, var = statistics.mean.to(dtype), statistics.var.to(dtype)
    rstd = torch.rsqrt(statistics.var + spec.eps).to(dtype)
    dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        dy.movedim(spec.axis, 1),
        x.movedim(spec.axis, 1),
        None if weight is None else weight.to(dtype),
        mean,
        var,
        mean,
        rstd,
        statistics.count is not None,
        spec.eps,
        [True, weight is not None, bias is not None],
    )
    dx, dresidual = dx.movedim(1, spec.axis), dy if wants_residual else None
    dweight = None if weight is None else dweight.to(weight.dtype)
    return Gradients(dx, dweight, None if bias is None else dbias.to(bias.dtype), dresidual)


def _channel_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which torch's operation takes what is per channel, along with x."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _normalized(call: Call, mean: torch.Tensor, var: torch.Tensor, training: bool) -> torch.Tensor:
    x, spec, weight, bias, residual, _, _, _, out = call
    weight, bias = (a if a is None else a.to(_channel_dtype(x)) for a in (weight, bias))
    cudnn = torch.backends.cudnn.enabled
    y = torch.batch_norm(x.movedim(spec.axis, 1), weight, bias, mean, var, training, 1.0, spec.eps, cudnn)
    y = y.movedim(1, spec.axis)
    if residual is not None:
        y = y + residual
    if spec.relu:
        y = torch.relu(y)
    return y if out is None else out.copy_(y)
