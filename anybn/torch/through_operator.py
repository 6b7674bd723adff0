"""A module's forward pass on the CPU by an operator that torch runs without Python: `anybn.kernels.cpu.operator`."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, cudnn_batch_norm, is_grad_enabled
from torch import _scaled_dot_product_efficient_attention as attention
from torch._C import _current_graph_task_id
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from anybn import _lock
from anybn._lock import undisturbed
from anybn.backends.torch import TorchBackend, cpu
from anybn.backends.torch.autograd import differentiated
from anybn.core.call import Call, Spec

_TORCH = TorchBackend()
_unsafe_view = torch.ops.aten._unsafe_view.default


class State(NamedTuple):
    """A module's running statistics as the operator takes them: by address, so that autograd does not keep them."""

    mean: Tensor
    var: Tensor
    at: tuple[int, int]
    """what their ``_cdata`` says, which `torch.utils.swap_tensors` changes"""
    operand: Tensor
    scale: float
    """what stands for the operand's address where the operator takes a number"""

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of the module makes its own


@functools.cache
def operator() -> Any:
    """`anybn.kernels.cpu.operator`, installed; None where that cannot be."""
    return undisturbed(_install) if cpu.steps() else None


def _install() -> Any:
    try:
        path = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
        library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
        numbers = {dtype: getattr(library, f"aoti_torch_dtype_{name}")() for dtype, name in _NAMES.items()}
    except (OSError, AttributeError):
        return None
    compiled = importlib.import_module("anybn.kernels.cpu.operator")
    for name in (compiled.BACKWARD, compiled.RECORDED_BACKWARD):
        _library.define(name + compiled.SCHEMA)
    _library.impl(compiled.RECORDED_BACKWARD, _recorded_backward, "CompositeImplicitAutograd")
    _numbers.update(numbers)
    return compiled if compiled.install(library, (numbers[torch.int64], numbers[torch.float64])) else None


_library = torch.library.Library("anybn", "FRAGMENT")
_NAMES = {getattr(torch, name): name for name in ("float16", "bfloat16", "float32", "float64", "int64")}
_numbers: dict[torch.dtype, int] = {}


def _recorded_backward(dy: Any, x: Any, weight: Any, rows: Any, y: Any, adds: bool, eps: float) -> tuple[Any, ...]:
    """The operator's backward pass where that is to be differentiable, or it has no kernel."""
    call = Call(x, Spec(1, eps, y is not None), weight, weight)  # like bias
    grads = differentiated(_TORCH, call, cpu.statistics_of_rows(rows, x), dy, y, adds)
    return grads.x, grads.weight, grads.bias, grads.residual if adds else dy


#: What autograd gives the tensors to that it is to keep, if that is somebody's own function; torch does not say
#: publicly, and before it said at all, there might always be one.
saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


def _called(
    x: Tensor, residual: Tensor | None, weight: Any, bias: Any, state: State, trains: bool, relu: bool, eps: float
) -> tuple[Tensor, Tensor] | None:
    """y and the rows that the operator gives; None, with nothing done, if it takes no such call."""
    # Who keeps tensors for autograd may count them, as checkpointing does: it is to see no call that fails.
    if saved_tensors_hooks(True) is not None and not _prepare(x, residual, weight, trains, relu):
        return None
    for _ in range(2):
        try:
            if residual is None:
                y, _, _, rows = cudnn_batch_norm(x, weight, bias, state.operand, None, True, trains + 2 * relu, eps)
            else:
                y, rows, _, _ = attention(x, _alias(residual), weight, bias, trains, eps, relu, scale=state.scale)
        except RuntimeError:  # of sparse tensors and their like, for which there is no kernel
            return None
        if y is not None:
            return (y if residual is None or relu else _alias(y)), rows
        if not _prepare(x, residual, weight, trains, relu):
            return None
    return None


def _alias(a: Tensor) -> Tensor:
    """The same values, which may be written to in a although autograd keeps what is returned, or the other way round.

    The derivative of `attention` keeps the residual and y, and has no use for them where no relu follows.
    """
    return _unsafe_view(a, a.shape) if a.requires_grad and is_grad_enabled() else a


def _prepare(x: Tensor, residual: Tensor | None, weight: Tensor, trains: bool, relu: bool) -> bool:
    dtypes, examples = (x.dtype, weight.dtype), cpu.examples()
    if not all(dtype in examples for dtype in dtypes):
        return False
    numbers, found = (_numbers[dtype] for dtype in dtypes), (examples[dtype] for dtype in dtypes)
    prepared, follows = operator().prepared, relu + 2 * (residual is not None)
    return bool(prepared.prepare(x.shape, x.stride(), tuple(numbers), tuple(found), follows, trains, is_grad_enabled()))


def _new_state(module: Any, mean: Any, var: Any) -> State | None:
    if operator() is None or not all(type(a) is Tensor and not a.is_neg() for a in (mean, var)):
        return None
    at = mean._cdata, var._cdata
    with torch.inference_mode(False):  # else autograd could not keep it
        operand = torch.tensor((operator().MAGIC, *at), device="cpu")
    (scale,) = struct.unpack("d", struct.pack("Q", operator().NAN << 48 | operand.data_ptr()))
    module._operand = State(mean, var, at, operand, scale)
    return module._operand


def tensors_of(module: Any) -> tuple[Any, Any, Any, Any, Any] | None:
    """Weight, bias, running mean and variance, and the count of batches; None unless they are the module's own."""
    parameters, buffers = module._parameters, module._buffers
    try:
        running = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        return parameters["weight"], parameters["bias"], *running
    except KeyError:  # parametrized, or a replica of DataParallel
        return None


def through_operator(module: Any, x: Tensor, residual: Tensor | None, activation: str | None) -> Tensor | None:
    """y; or None, with nothing done, for whatever the operator does not take. x is no subclass, and on the CPU."""
    if (tensors := tensors_of(module)) is None:
        return None
    weight, bias, mean, var, batches = tensors
    state, eps, relu, momentum = module._operand, module.eps, activation is not None, module.momentum
    if not (
        (type(weight) is Parameter or type(weight) is Tensor)
        and (type(bias) is Parameter or type(bias) is Tensor)
        and (relu is False or activation == "relu")
        and eps > 0
        and x.dim() in module._ranks
        and (residual is None or (type(residual) is Tensor and residual.is_cpu and weight.is_cpu and bias.is_cpu))
    ):
        return None
    if state is None or mean is not state.mean or var is not state.var or (mean._cdata, var._cdata) != state.at:
        state = _new_state(module, mean, var)
    if state is None:
        return None
    call = x, residual, weight, bias, state, module.training, relu, eps
    if not module.training:
        before = _lock.writes
        found = _called(*call)
        if before & 1 or before != _lock.writes:  # another thread was at a module's statistics, perhaps these
            with _lock.commits:
                found = _called(*call)
        return None if found is None else found[0]
    tracks = module.track_running_stats and _current_graph_task_id() == -1  # see `recomputes`
    if not (momentum is None or 0 <= momentum <= 1) or (tracks and not is_count(batches)):
        return None
    if (found := _called(*call)) is None:
        return None
    if tracks:
        learn(mean, var, batches, momentum, x, found[1].data_ptr())
    return found[0]


# -- running statistics ----------------------------------------------------------------------------------------


def is_count(a: Any) -> bool:
    return type(a) is Tensor and a.dtype is torch.int64 and not a.shape and a.is_cpu and a.data_ptr() != 0


def learn(mean: Tensor, var: Tensor, batches: Tensor, momentum: float | None, x: Tensor, rows: int) -> None:
    """Fold the statistics of x, as a compiled step has left them at this address, into running ones, and count x."""
    channels, new, example = len(mean), -1.0 if momentum is None else momentum, cpu.examples()[x.dtype]
    with _lock.commits:
        _lock.writes |= 1
        at = mean.data_ptr(), var.data_ptr(), batches.data_ptr()
        cpu.steps().update(example, rows, channels, x.numel() // channels, new, *at)
        _lock.writes += 1
    increment_version((mean, var, batches))
