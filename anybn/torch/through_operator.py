"""A module's forward pass on the CPU by an operator that torch runs without Python: `anybn.kernels.cpu.operator`."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import struct
from collections.abc import Callable
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
    batches: Any
    at: tuple[int, int, int]
    """what their ``_cdata`` says, which `torch.utils.swap_tensors` changes"""
    what: int
    operand: Tensor
    address: int
    """of the operand's words, which are `what` and `at`: see `anybn.kernels.cpu.operator`"""
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
    x: Tensor,
    residual: Tensor | None,
    weight: Any,
    bias: Any,
    statistics: tuple[Tensor, Tensor | None],
    state: State,
    trains: bool,
    relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor] | None:
    """y and the rows that the operator gives; None, with nothing done, if it takes no such call."""
    # Who keeps tensors for autograd may count them, as checkpointing does: it is to see no call that fails.
    to_prepare = x, residual, weight, state, trains, relu
    if is_grad_enabled() and saved_tensors_hooks(True) is not None and not _prepare(*to_prepare):
        return None
    for _ in range(2):
        try:
            if residual is None:
                y, _, _, rows = cudnn_batch_norm(
                    x, weight, bias, *statistics, True, state.what + trains + 2 * relu, eps
                )
            else:
                y, rows, _, _ = attention(x, _alias(residual), weight, bias, trains, eps, relu, scale=state.scale)
        except RuntimeError:  # of sparse tensors and their like, for which there is no kernel
            return None
        if y is not None:
            return (y if residual is None or relu else _alias(y)), rows
        if not _prepare(*to_prepare):
            return None
    return None


def _alias(a: Tensor) -> Tensor:
    """The same values, which may be written to in a although autograd keeps what is returned, or the other way round.

    The derivative of `attention` keeps the residual and y, and has no use for them where no relu follows.
    """
    return _unsafe_view(a, a.shape) if a.requires_grad and is_grad_enabled() else a


def _prepare(x: Tensor, residual: Tensor | None, weight: Tensor, state: State, trains: bool, relu: bool) -> bool:
    dtypes, examples = (x.dtype, weight.dtype), cpu.examples()
    if not all(dtype in examples for dtype in dtypes) or not state.what >> operator().RANKS >> x.dim() & 1:
        return False
    numbers, found = (_numbers[dtype] for dtype in dtypes), (examples[dtype] for dtype in dtypes)
    prepared, follows = operator().prepared, relu + 2 * (residual is not None)
    return bool(prepared.prepare(x.shape, x.stride(), tuple(numbers), tuple(found), follows, trains, is_grad_enabled()))


def _new_state(module: Any, mean: Tensor, var: Tensor, batches: Any) -> State | None:
    if (compiled := operator()) is None or mean.is_neg() or var.is_neg():
        return None
    at = _at(mean, var, batches)
    words = *at[:2], at[2] if is_count(batches) else 0
    what = compiled.OURS + sum(1 << compiled.RANKS + rank for rank in module._ranks if rank <= compiled.abi.MOST_AXES)
    with torch.inference_mode(False):  # else autograd could not keep it
        operand = torch.tensor((what, *words), device="cpu")
    address = operand.data_ptr()
    (scale,) = struct.unpack("d", struct.pack("Q", compiled.NAN << 48 | address))
    module._operand = State(mean, var, batches, at, what, operand, address, scale)
    return module._operand


def _at(mean: Tensor, var: Tensor, batches: Tensor | None) -> tuple[int, int, int]:
    """See `State.at`."""
    return mean._cdata, var._cdata, 0 if batches is None else batches._cdata


def tensors_of(module: Any) -> tuple[Any, Any, Any, Any, Any] | None:
    """Weight, bias, running mean and variance, and the count of batches; None unless they are the module's own."""
    parameters, buffers = module._parameters, module._buffers
    try:
        running = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        return parameters["weight"], parameters["bias"], *running
    except KeyError:  # parametrized, or a replica of DataParallel
        return None


def through_operator(module: Any, x: Tensor, residual: Tensor | None, activation: str | None) -> Tensor | None:
    """y; or None, with nothing done, for whatever the operator does not take. x is no subclass, and on the CPU.

    After a convolution each look at a tensor takes 5 us, whose memory and code are in no cache. So the operator looks
    where it can, and Python at what the operator cannot see.
    """
    if (tensors := tensors_of(module)) is None:
        return None
    weight, bias, mean, var, batches = tensors
    state, eps, relu, trains = module._operand, module.eps, activation is not None, module.training
    if not (
        (type(weight) is Parameter or type(weight) is Tensor)
        and (type(bias) is Parameter or type(bias) is Tensor)
        and type(mean) is Tensor
        and type(var) is Tensor
        and (relu is False or activation == "relu")
        and eps > 0
        and (residual is None or (type(residual) is Tensor and residual.is_cpu and weight.is_cpu and bias.is_cpu))
    ):
        return None
    by_address = trains or residual is not None or is_grad_enabled()
    if (
        state is None
        or mean is not state.mean
        or var is not state.var
        or batches is not state.batches
        or (by_address and _at(mean, var, batches) != state.at)
    ):
        state = _new_state(module, mean, var, batches)
    if state is None:
        return None
    statistics = (state.operand, None) if by_address else (mean, var)
    call = x, residual, weight, bias, statistics, state, trains, relu, eps
    if not trains:
        before = _lock.writes
        found = _called(*call)
        if before & 1 or before != _lock.writes:  # another thread was at a module's statistics, perhaps these
            with _lock.commits:
                found = _called(*call)
        return None if found is None else found[0]
    momentum = module.momentum
    if not (momentum is None or 0 <= momentum <= 1) or (found := _called(*call)) is None:
        return None
    if module.track_running_stats and _current_graph_task_id() == -1:  # see `recomputes`
        new = -1.0 if momentum is None else momentum
        if not learn(operator().learn, (state.address, found[1].data_ptr(), x.numel(), new), (mean, var, batches)):
            return None
    return found[0]


# -- running statistics ----------------------------------------------------------------------------------------


def is_count(a: Any) -> bool:
    return type(a) is Tensor and a.dtype is torch.int64 and not a.shape and a.is_cpu and a.data_ptr() != 0


def learn(update: Callable[..., bool], arguments: tuple[Any, ...], buffers: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Have compiled code fold a batch into running statistics, and count it, in these buffers; whether it could."""
    with _lock.commits:
        _lock.writes |= 1
        done = update(*arguments)
        _lock.writes += 1
    if done:
        increment_version(buffers)
    return done
