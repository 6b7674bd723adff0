"""NumPy's kernels on the memory of torch tensors, without copies."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

from anybn import _settings
from anybn.backends.numpy import kernels
from anybn.core.call import Call, Gradients, Statistics, Update
from anybn.core.formulas import Over

#: As kernels see them: 16-bit numbers as their bits.
DTYPES = {getattr(torch, name): np.dtype(bits) for name, (_, bits, _) in _settings.DTYPES.items()}
_SEEN = DTYPES | {torch.bool: np.dtype(bool)}

NO_MEMORY = "has no memory: its storage was freed, as FSDP does between the passes; gather it first"


def supports(x: torch.Tensor) -> bool:
    return x.dtype in DTYPES and not x.is_neg() and bool(kernels().supports(DTYPES[x.dtype]))


def takes_mask(call: Call) -> bool:
    """Whether there are kernels for the call's mask."""
    return bool(kernels().takes(Call(_view(call.x), call.spec, mask=_view(call.mask))))


def batch_statistics(call: Call) -> Statistics:
    return _from_views(kernels().batch_statistics(Call(_view(call.x), call.spec, mask=_view(call.mask))))


def train(call: Call) -> tuple[torch.Tensor, Statistics, None]:
    y, statistics = kernels().train(_in_views(call))
    return _delivered(y, call), _from_views(statistics), None


def evaluate(call: Call, statistics: Statistics) -> torch.Tensor:
    return _delivered(kernels().evaluate(_in_views(call), _views(statistics)), call)


def updated_running_statistics(update: Update, statistics: Statistics) -> tuple[torch.Tensor, torch.Tensor]:
    mean, var, batch = _float64(update.running_mean), _float64(update.running_var), _views(statistics)
    if not len(mean) == len(var) == len(batch.mean):
        raise ValueError(
            f"running_mean has {len(mean)} values and running_var {len(var)}, but the batch has {len(batch.mean)} "
            "channels: they must be as many"
        )
    mean, var = kernels().updated_running_statistics(Update(mean, var, *update[2:]), batch)
    return torch.from_numpy(mean), torch.from_numpy(var)


def gradients(
    call: Call,
    statistics: Statistics,
    dy: torch.Tensor,
    active: torch.Tensor | None,
    wants_residual: bool,
    over: Over | None = None,
) -> Gradients:
    views = Call(_view(call.x), call.spec, _numbers(call.weight), mask=_view(call.mask))
    dx, dweight, dbias, _ = kernels().gradients(views, _views(statistics), _view(dy), _view(active), over)
    dx = _tensor(dx, call.x.dtype)
    dresidual = dy if wants_residual else None
    for keep in (active, call.mask):
        if dresidual is not None and keep is not None:
            dresidual = torch.where(keep, dresidual, dy.new_zeros(()))
    return Gradients(dx, *_parameter_gradients(call, dweight, dbias), dresidual)


def _parameter_gradients(call: Call, dweight: Any, dbias: Any) -> tuple[Any, Any]:
    weight, bias = call.weight, call.bias
    return (
        None if weight is None else torch.from_numpy(dweight).to(weight.dtype),
        None if bias is None else torch.from_numpy(dbias).to(bias.dtype),
    )


def takes_rows(call: Call) -> bool:
    """Whether `normalize_rows` takes such a call."""
    rows = kernels().row_kernels
    return rows is not None and bool(rows.takes(call))


def normalize_rows(call: Call) -> tuple[torch.Tensor, Statistics]:
    y, statistics = kernels().row_kernels.normalize(_in_views(call))
    return _tensor(y, call.x.dtype), _from_views(statistics)


def row_gradients(call: Call, statistics: Statistics, dy: torch.Tensor) -> Gradients:
    grads = kernels().row_kernels.gradients(_in_views(call), _views(statistics), _view(dy))
    return Gradients(_tensor(grads.x, call.x.dtype), *_parameter_gradients(call, grads.weight, grads.bias), None)


class _Memory(ctypes.c_char * (1 << 62)):  # type: ignore[misc] # an array type is a class
    """What lies behind an address, and the tensor that keeps it there."""

    tensor: torch.Tensor


def view(a: torch.Tensor) -> np.ndarray:
    """The tensor's memory as a NumPy array; 16 bits as they are.

    By its address: after ``Tensor.numpy`` nobody can resize the storage any more, as FSDP does with parameters.
    """
    if a.is_neg():
        a = a.detach().resolve_neg()
    address, dtype = a.data_ptr(), _SEEN[a.dtype]
    if not address and a.numel():
        raise ValueError(f"a tensor of shape {tuple(a.shape)} {NO_MEMORY}")
    memory = _Memory.from_address(address)
    memory.tensor = a
    if a.is_contiguous():
        return np.ndarray(a.shape, dtype, memory)
    return np.ndarray(a.shape, dtype, memory, 0, [stride * dtype.itemsize for stride in a.stride()])


def _view(a: torch.Tensor | None) -> Any:
    return None if a is None else view(a)


def _numbers(a: torch.Tensor | None) -> Any:
    """The values of weight or bias: bits are for x and what is like it, and no numbers."""
    if a is None:
        return None
    return view(a if a.dtype is torch.float32 or a.dtype is torch.float64 else a.detach().float())


def _float64(a: torch.Tensor | None) -> Any:
    """The values of statistics, in the one dtype of them for which there are kernels."""
    if a is None:
        return None
    return view(a if a.dtype is torch.float64 else a.detach().double())


def _tensor(a: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The tensor over an array that `_view` could have given."""
    t = torch.from_numpy(a)
    return t if t.dtype is dtype else t.view(dtype)


def _in_views(call: Call) -> Call:
    """The call as kernels take it; without out where that is lazily negated, whose memory has the other sign."""
    x, spec, weight, bias, residual, mask, _, _, out = call
    target = None if out is None or out.is_neg() else _view(out)
    return Call(_view(x), spec, _numbers(weight), _numbers(bias), _view(residual), _view(mask), None, None, target)


def _delivered(y: np.ndarray, call: Call) -> torch.Tensor:
    out, dtype = call.out, call.x.dtype
    if out is None:
        return _tensor(y, dtype)
    return out.copy_(_tensor(y, dtype)) if out.is_neg() else out


def _views(statistics: Statistics) -> Statistics:
    return Statistics(statistics.count, *map(_float64, statistics[1:]))


def _from_views(statistics: Statistics) -> Statistics:
    shift = None if statistics.shift is None else torch.from_numpy(statistics.shift)
    mean, var, m2 = map(torch.from_numpy, (statistics.mean, statistics.var, statistics.m2))
    return Statistics(statistics.count, mean, shift, var, m2)
