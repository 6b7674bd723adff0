"""A module's forward pass on the CPU by an operator that torch runs without Python: `anybn.kernels.cpu.operator`."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, cudnn_batch_norm, is_grad_enabled
from torch._C import _current_graph_task_id
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from anybn import _lock
from anybn._lock import undisturbed
from anybn.backends.torch import TorchBackend, cpu
from anybn.backends.torch.autograd import differentiated
from anybn.core.call import Call, Spec

_TORCH = TorchBackend()
_EVALUATES, _TRAINS = (0.0, 2.0), (1.0, 3.0)  # without relu and with, see `operator`


class State(NamedTuple):
    """A module's running statistics as the operator takes them: by address, so that autograd does not keep them."""

    mean: Tensor
    var: Tensor
    at: tuple[int, int]
    """what their ``_cdata`` says, which `torch.utils.swap_tensors` changes"""
    operand: Tensor

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


def _recorded_backward(dy: Any, x: Any, weight: Any, rows: Any, y: Any, eps: float) -> tuple[Any, ...]:
    """The operator's backward pass where that is to be differentiable, or it has no kernel."""
    call = Call(x, Spec(1, eps, y is not None), weight, weight)  # like bias
    grads = differentiated(_TORCH, call, cpu.statistics_of_rows(rows, x), dy, y, False)
    return grads.x, grads.weight, grads.bias


#: What autograd gives the tensors to that it is to keep, if that is somebody's own function; torch does not say
#: publicly, and before it said at all, there might always be one.
saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


def _called(x: Tensor, weight: Any, bias: Any, operand: Tensor, what: float, eps: float) -> Any:
    """What the operator gives; None, with nothing done, if it takes no such call."""
    # Who keeps tensors for autograd may count them, as checkpointing does: it is to see no call that fails.
    if saved_tensors_hooks(True) is not None and not _prepare(x, weight, what):
        return None
    for _ in range(2):
        try:
            found = cudnn_batch_norm(x, weight, bias, operand, None, True, what, eps)
        except RuntimeError:  # of sparse tensors and their like, for which there is no kernel
            return None
        if found[0] is not None:
            return found
        if not _prepare(x, weight, what):
            return None
    return None


def _prepare(x: Tensor, weight: Tensor, what: float) -> bool:
    dtypes, examples = (x.dtype, weight.dtype), cpu.examples()
    if not all(dtype in examples for dtype in dtypes):
        return False
    numbers, found = (_numbers[dtype] for dtype in dtypes), (examples[dtype] for dtype in dtypes)
    relu, trains = what >= 2.0, what in _TRAINS
    return bool(operator().prepare(x.shape, x.stride(), tuple(numbers), tuple(found), relu, trains, is_grad_enabled()))


def _new_state(module: Any, mean: Any, var: Any) -> State | None:
    if operator() is None or not all(type(a) is Tensor and not a.is_neg() for a in (mean, var)):
        return None
    at = mean._cdata, var._cdata
    with torch.inference_mode(False):  # else autograd could not keep it
        operand = torch.tensor((operator().MAGIC, *at), device="cpu")
    module._operand = State(mean, var, at, operand)
    return module._operand


def tensors_of(module: Any) -> tuple[Any, Any, Any, Any, Any] | None:
    """Weight, bias, running mean and variance, and the count of batches; None unless they are the module's own."""
    parameters, buffers = module._parameters, module._buffers
    try:
        running = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        return parameters["weight"], parameters["bias"], *running
    except KeyError:  # parametrized, or a replica of DataParallel
        return None


def through_operator(module: Any, x: Tensor, activation: str | None) -> Tensor | None:
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
    ):
        return None
    if state is None or mean is not state.mean or var is not state.var or (mean._cdata, var._cdata) != state.at:
        state = _new_state(module, mean, var)
    if state is None:
        return None
    if not module.training:
        before = _lock.writes
        found = _called(x, weight, bias, state.operand, _EVALUATES[relu], eps)
        if before & 1 or before != _lock.writes:  # another thread was at a module's statistics, perhaps these
            with _lock.commits:
                found = _called(x, weight, bias, state.operand, _EVALUATES[relu], eps)
        return None if found is None else found[0]
    tracks = module.track_running_stats and _current_graph_task_id() == -1  # see `recomputes`
    if not (momentum is None or 0 <= momentum <= 1) or (tracks and not is_count(batches)):
        return None
    if (found := _called(x, weight, bias, state.operand, _TRAINS[relu], eps)) is None:
        return None
    if tracks:
        learn(mean, var, batches, momentum, x, found[3].data_ptr())
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
