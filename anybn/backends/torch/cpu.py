"""NumPy's kernels on the memory of torch tensors, without copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from anybn.backends.numpy import kernels
from anybn.core.formulas import Gradients, Over, RowSpec, Spec, Statistics, Update

#: As kernels see them: 16-bit numbers as their bits.
DTYPES = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.bfloat16: np.uint16,
    torch.float16: np.int16,
}
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def supports(x: torch.Tensor) -> bool:
    return x.dtype in DTYPES and not x.is_neg() and bool(kernels().supports(DTYPES[x.dtype]))


def batch_statistics(x: torch.Tensor, axis: int) -> Statistics:
    return _from_views(kernels().batch_statistics(_view(x), axis))


def train(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    spec: Spec,
    out: torch.Tensor | None = None,
    update: Update | None = None,
) -> tuple[torch.Tensor, Statistics, None]:
    parameters = _numbers(weight), _numbers(bias)
    y, statistics = kernels().train(_view(x), *parameters, _view(residual), spec, _target(out))
    return _delivered(y, x.dtype, out), _from_views(statistics), None


def evaluate(
    x: torch.Tensor,
    statistics: Statistics,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    spec: Spec,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    given = _views(statistics), _numbers(weight), _numbers(bias), _view(residual)
    y = kernels().evaluate(_view(x), *given, spec, _target(out))
    return _delivered(y, x.dtype, out)


def updated_running_statistics(statistics: Statistics, update: Update) -> tuple[torch.Tensor, torch.Tensor]:
    running = _view(update.running_mean), _view(update.running_var)
    rule = update.momentum, update.ddof, update.propagate
    mean, var = kernels().updated_running_statistics(*running, _views(statistics), *rule)
    return torch.from_numpy(mean), torch.from_numpy(var)


def gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    statistics: Statistics,
    weight: torch.Tensor | None,
    active: torch.Tensor | None,
    spec: Spec,
    over: Over | None = None,
) -> Gradients:
    given = _views(statistics), _numbers(weight), _view(active)
    grads = kernels().gradients(_view(dy), _view(x), *given, spec, over)
    dx = _tensor(grads.x, x.dtype)
    dresidual = dy if spec.differentiates_residual else None
    if dresidual is not None and active is not None:
        dresidual = torch.where(active, dy, torch.zeros((), dtype=dy.dtype))
    if weight is None:
        return Gradients(dx, None, None, dresidual)
    dweight, dbias = (torch.from_numpy(a).to(weight.dtype) for a in (grads.weight, grads.bias))
    return Gradients(dx, dweight, dbias, dresidual)


def normalize_rows(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, spec: RowSpec
) -> tuple[torch.Tensor, Statistics]:
    y, statistics = kernels().row_kernels.normalize(_view(x), _numbers(weight), _numbers(bias), spec)
    return _tensor(y, x.dtype), _from_views(statistics)


def row_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    statistics: Statistics,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    spec: RowSpec,
) -> Gradients:
    given = _views(statistics), _numbers(weight), _numbers(bias)
    grads = kernels().row_kernels.gradients(_view(dy), _view(x), *given, spec)
    dweight, dbias = (
        None if parameter is None else torch.from_numpy(a).to(parameter.dtype)
        for a, parameter in ((grads.weight, weight), (grads.bias, bias))
    )
    return Gradients(_tensor(grads.x, x.dtype), dweight, dbias, None)


def _view(a: torch.Tensor | None) -> Any:
    """The tensor's memory as a NumPy array; 16 bits as they are."""
    if a is None:
        return None
    a = a.detach().resolve_neg()
    bits = _BITS.get(a.dtype)
    return a.numpy() if bits is None else a.view(bits).numpy()


def _numbers(a: torch.Tensor | None) -> Any:
    """The tensor's values, as the kernels take weight and bias: NumPy has no bfloat16, and bits are no numbers."""
    if a is None:
        return None
    a = a.detach().resolve_neg()
    return (a.float() if a.dtype is torch.bfloat16 else a).numpy()


def _tensor(a: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The tensor over an array that `_view` could have given."""
    t = torch.from_numpy(a)
    return t if t.dtype is dtype else t.view(dtype)


def _target(out: torch.Tensor | None) -> Any:
    """The view that kernels write to; none for a lazily negated tensor, whose memory has the other sign."""
    return None if out is None or out.is_neg() else _view(out)


def _delivered(y: np.ndarray, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        return _tensor(y, dtype)
    return out.copy_(_tensor(y, dtype)) if out.is_neg() else out


def _views(statistics: Statistics) -> Statistics:
    return Statistics(statistics.count, *map(_view, statistics[1:]))


def _from_views(statistics: Statistics) -> Statistics:
    shift = None if statistics.shift is None else torch.from_numpy(statistics.shift)
    mean, var, m2 = map(torch.from_numpy, (statistics.mean, statistics.var, statistics.m2))
    return Statistics(statistics.count, mean, shift, var, m2)
