"""torch tensors on any device, inside autograd to any order."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import array_api_compat.torch
import numpy as np
import torch
from torch._C import (  # there is no public way to ask
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch._C import _functorch as functorch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from anybn import _synchronized
from anybn._core import Array, Gradients, Over, Spec, Statistics
from anybn._synchronized import Members
from anybn.backends._base import Backend
from anybn.backends.numpy import NumPyBackend, kernels


class _Namespace:
    """array_api_compat.torch with a correctly rounded square root.

    torch takes MKL's on the CPU, which is one unit off in 1% of float64 values: enough to differ from every other
    backend on data whose variance is exact.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(array_api_compat.torch, name)

    @staticmethod
    def sqrt(x: torch.Tensor) -> torch.Tensor:
        root = torch.sqrt(x)
        if x.device.type != "cpu" or op_by_op():
            return root
        exact = torch.from_numpy(np.sqrt(x.detach().numpy()))
        return root + (exact - root.detach())  # keeps the derivatives


_NAMESPACE = _Namespace()


class TorchBackend(Backend):
    name = "torch"
    libraries = ("torch",)

    @property
    def how(self) -> str:  # type: ignore[override]
        return f"on the CPU {NumPyBackend().how}, elsewhere the Array API core, inside autograd"

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, torch.Tensor)

    def holds(self, array: Any, device: torch.device) -> bool:
        return isinstance(array, torch.Tensor) and array.device == device

    def refusal(self, x: torch.Tensor) -> str:
        if x.layout is not torch.strided:
            return f"has the layout {x.layout}: make it dense, e.g. with x.to_dense()"
        if x.is_quantized:
            return "is quantized: cast it with x.dequantize()"
        if x.is_nested:
            return "is a nested tensor: pad it, and pass mask="
        if x.is_meta:
            return "is on the meta device and has no values: create it on a real one"
        return ""

    def module(self) -> ModuleType:
        return array_api_compat.torch

    def namespace(self, x: Array) -> _Namespace:
        return _NAMESPACE

    def version(self) -> str:
        return str(torch.__version__)

    def device_of(self, x: torch.Tensor) -> torch.device:
        return x.device

    def device(self, name: str) -> torch.device:
        try:
            device = torch.zeros((), device=name or "cpu").device  # "cuda" -> "cuda:0", and an error if there is none
            if device.type != "meta":
                return device
            raise ValueError("torch's meta device has no values")
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"torch has no device {name!r}; it has {', '.join(self.devices())}") from error

    def devices(self) -> list[str]:
        found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        return [*found, "mps"] if torch.backends.mps.is_available() else found

    def has_float64(self, device: torch.device) -> bool:
        return device.type != "mps"

    def from_numpy(self, array: np.ndarray, device: torch.device) -> torch.Tensor:
        array = np.array(array)
        with torch.inference_mode(False):  # what a state keeps must be good for training later
            return self._from_numpy(array, device)

    def _from_numpy(self, array: np.ndarray, device: torch.device) -> torch.Tensor:
        if array.dtype.name == "bfloat16":  # torch does not know ml_dtypes, but the bits are the same
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16).to(device)
        return torch.from_numpy(array).to(device)

    def to_numpy(self, x: torch.Tensor) -> np.ndarray:
        if in_torch_func():
            x = _unwrapped(x)
            with torch._C._DisableFuncTorch():  # whose derivatives wrap all that is computed under them
                return self._to_numpy(x)
        return self._to_numpy(x)

    def _to_numpy(self, x: torch.Tensor) -> np.ndarray:
        x = x.detach().cpu().contiguous()
        if x.dtype == torch.bfloat16:
            from ml_dtypes import bfloat16

            return x.view(torch.uint16).numpy().view(bfloat16).copy()
        return np.array(x.numpy())

    def is_traced(self, x: torch.Tensor) -> bool:
        return in_torch_func() and functorch.is_batchedtensor(_unwrapped(x))

    def may_store(self, new: torch.Tensor, old: torch.Tensor) -> bool:
        return not self.is_traced(new)

    def detached(self, x: Any) -> Any:
        return _unwrapped(x).detach() if isinstance(x, torch.Tensor) else x

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        with self.no_grad():
            return x.detach().clone()

    def twin(self, x: torch.Tensor) -> torch.Tensor:
        return copy.deepcopy(x) if x.is_leaf else self.copy(x)

    def refilled(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if not (old.is_leaf and old.requires_grad):
            return new
        with torch.no_grad():
            return old.copy_(new)

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        """Also out of inference mode, whose tensors are good for nothing else."""
        with torch.inference_mode(False), torch.no_grad():
            yield

    def records(self, *arrays: torch.Tensor | None) -> bool:
        return torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in arrays)

    def write_problem(self, out: torch.Tensor) -> str:
        if self.records(out):
            return "requires grad, and autograd cannot record a write to it: drop out, or use torch.no_grad()"
        if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
            return "is an expanded view, whose elements share memory: pass a tensor of its own"
        return ""

    def recomputes(self) -> bool:
        """A forward pass inside a backward pass is activation checkpointing, done before and learnt from already."""
        return torch._C._current_graph_task_id() != -1

    def overlaps(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        if op_by_op() or a.device != b.device or not a.numel() or not b.numel():
            return False
        first, second = _extent(a), _extent(b)
        return first[0] < second[1] and second[0] < first[1]

    def same_memory(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())

    # -- batch norm --------------------------------------------------------------------------------------------

    def _kernels_for(self, x: torch.Tensor, mask: torch.Tensor | None) -> Any:
        """NumPy's kernels, for what lies in the CPU's memory and is only to be computed; else None, for the core."""
        if x.device.type != "cpu" or mask is not None or not x.numel() or x.dtype not in _DTYPES:
            return None
        if op_by_op() or not kernels().supports(_DTYPES[x.dtype]):
            return None
        return kernels()

    def batch_statistics(self, x: torch.Tensor, axis: int, mask: torch.Tensor | None) -> Statistics:
        if not self.records(x) and (chosen := self._kernels_for(x, mask)):
            return _from_views(chosen.batch_statistics(_view(x), axis))
        return super().batch_statistics(x, axis, mask)

    def train(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        mask: torch.Tensor | None,
        spec: Spec,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Statistics]:
        if self.records(x, weight, bias, residual) and not op_by_op():
            with torch.no_grad():
                y, statistics = self.train(x, weight, bias, residual, mask, spec)
            return _Recorded.apply(x, weight, bias, residual, self, (y, statistics), mask, spec), statistics
        if chosen := self._kernels_for(x, mask):
            y, statistics = chosen.train(_view(x), _view(weight), _view(bias), _view(residual), spec, _view(out))
            return _tensor(y, x.dtype) if out is None else out, _from_views(statistics)
        return super().train(x, weight, bias, residual, mask, spec, out)

    def evaluate(
        self,
        x: torch.Tensor,
        statistics: Statistics,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        mask: torch.Tensor | None,
        spec: Spec,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.records(x, weight, bias, residual) and not op_by_op():
            with torch.no_grad():
                y = self.evaluate(x, statistics, weight, bias, residual, mask, spec)
            return _Recorded.apply(x, weight, bias, residual, self, (y, statistics), mask, spec)
        if chosen := self._kernels_for(x, mask):
            views = _views(statistics), _view(weight), _view(bias), _view(residual)
            y = chosen.evaluate(_view(x), *views, spec, _view(out))
            return _tensor(y, x.dtype) if out is None else out
        return super().evaluate(x, statistics, weight, bias, residual, mask, spec, out)

    def updated_running_statistics(
        self,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        statistics: Statistics,
        momentum: float,
        ddof: int,
        propagate: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = self._kernels_for(running_mean, None)
        if chosen is None or not isinstance(statistics.count, int):
            return super().updated_running_statistics(running_mean, running_var, statistics, momentum, ddof, propagate)
        views = _view(running_mean), _view(running_var), _views(statistics)
        mean, var = chosen.updated_running_statistics(*views, momentum, ddof, propagate)
        return torch.from_numpy(mean), torch.from_numpy(var)

    def gradients(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        statistics: Statistics,
        weight: torch.Tensor | None,
        active: torch.Tensor | None,
        mask: torch.Tensor | None,
        spec: Spec,
        over: Over | None = None,
    ) -> Gradients:
        chosen = None if self.records(dy, x, weight) else self._kernels_for(x, mask)
        if chosen is None:
            return super().gradients(dy, x, statistics, weight, active, mask, spec)
        grads = chosen.gradients(_view(dy), _view(x), _views(statistics), _view(weight), _view(active), spec, over)
        dx = _tensor(grads.x, x.dtype)
        dresidual = dy if active is None else torch.where(active, dy, torch.zeros((), dtype=dy.dtype))
        if weight is None:
            return Gradients(dx, None, None, dresidual)
        dweight, dbias = (torch.from_numpy(a).to(weight.dtype) for a in (grads.weight, grads.bias))
        return Gradients(dx, dweight, dbias, dresidual)

    # -- batch norm over a group of processes ------------------------------------------------------------------

    def all_reduce_sum(self, group: Any, array: torch.Tensor) -> torch.Tensor:
        return _Summed.apply(array, group)

    def train_over(
        self,
        members: Members,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        mask: torch.Tensor | None,
        spec: Spec,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Statistics]:
        if self.records(x, weight, bias, residual) and not op_by_op():
            with torch.no_grad():
                y, statistics = self.train_over(members, x, weight, bias, residual, mask, spec)
            return _Recorded.apply(x, weight, bias, residual, self, (y, statistics), mask, spec, members), statistics
        return super().train_over(members, x, weight, bias, residual, mask, spec, out)

    def gradients_over(self, members: Members, dy: torch.Tensor, x: torch.Tensor, *rest: Any) -> Gradients:
        statistics, weight, active, mask, spec = rest
        if self.records(dy, x, weight) or not self._kernels_for(x, mask):
            return super().gradients_over(members, dy, x, *rest)

        def over(*sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            sum_dy, sum_dy_xhat = _synchronized.sums(self, members.group, *map(torch.from_numpy, sums))
            return sum_dy.numpy(), sum_dy_xhat.numpy()

        return self.gradients(dy, x, statistics, weight, active, mask, spec, over)


#: As NumPy sees them; bfloat16 as its bits.
_DTYPES = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.uint16}


def _view(a: torch.Tensor | None) -> Any:
    """The tensor's memory as a NumPy array; 16 bits as they are."""
    if a is None:
        return None
    a = a.detach()
    if a.dtype is torch.bfloat16:
        return a.view(torch.uint16).numpy()
    return a.numpy()


def _tensor(a: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The tensor over an array that `_view` could have given."""
    t = torch.from_numpy(a)
    return t if t.dtype is dtype else t.view(dtype)


def _views(statistics: Statistics) -> Statistics:
    return Statistics(statistics.count, *map(_view, statistics[1:]))


def _from_views(statistics: Statistics) -> Statistics:
    shift = None if statistics.shift is None else torch.from_numpy(statistics.shift)
    mean, var, m2 = map(torch.from_numpy, (statistics.mean, statistics.var, statistics.m2))
    return Statistics(statistics.count, mean, shift, var, m2)


def op_by_op() -> bool:
    """True where torch has to see each operation: forward-mode differentiation, torch.func, tracing and exporting, and
    modes that take operations one at a time, fake tensors among them. The core serves them all."""
    return (
        is_compiling()
        or forward_ad._current_level >= 0
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack() > 0
        or _get_tracing_state() is not None
    )


def in_torch_func() -> bool:
    return _are_functorch_transforms_active()


def _unwrapped(x: torch.Tensor) -> torch.Tensor:
    """The values under torch.func's derivatives; a batched tensor only if vmap is among what is under way."""
    while in_torch_func() and functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    return x


class _Recorded(torch.autograd.Function):
    """y, computed already, as one node of the graph: it keeps x and C values, none of the core's temporaries.

    The statistics are this call's own, whatever the state does before the backward pass. Under ``create_graph`` the
    backward pass is recorded op by op, with the batch statistics computed from x again, which makes it differentiable
    to any order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        backend: TorchBackend,
        computed: tuple[torch.Tensor, Statistics],
        mask: torch.Tensor | None,
        spec: Spec,
        members: Members | None = None,
    ) -> torch.Tensor:
        y, statistics = (
            computed  # in a tuple, autograd takes y for this function's own, which may be written to in place
        )
        active = y > 0 if spec.relu else None
        ctx.save_for_backward(x, weight, mask, active)
        ctx.backend, ctx.statistics, ctx.spec, ctx.members = backend, statistics, spec, members
        ctx.given = bias is not None, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = differentiated(ctx.backend, dy, ctx.saved_tensors, ctx.statistics, ctx.spec, ctx.members)
        has_bias, has_residual = ctx.given
        bias, residual = grads.bias if has_bias else None, grads.residual if has_residual else None
        return grads.x, grads.weight, bias, residual, None, None, None, None, None


class _Summed(torch.autograd.Function):
    """The sum over a group. What every member gets depends on all of them, so its derivative is the same sum."""

    @staticmethod
    def forward(array: torch.Tensor, group: Any) -> torch.Tensor:
        return group.all_reduce_sum(array)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, Any], output: torch.Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Summed.apply(dy, ctx.group), None


def differentiated(
    backend: TorchBackend,
    dy: torch.Tensor,
    saved: tuple[Any, ...],
    statistics: Statistics,
    spec: Spec,
    members: Members | None = None,
) -> Gradients:
    """The gradients in a backward pass, differentiable themselves where it is recorded."""
    x, weight, mask, active = saved
    if members is not None:
        if torch.is_grad_enabled():
            statistics = _synchronized.batch_statistics(backend, x, spec.axis, mask, members)
        return backend.gradients_over(members, dy, x, statistics, weight, active, mask, spec)
    if torch.is_grad_enabled() and statistics.count is not None and x.numel():
        statistics = backend.batch_statistics(x, spec.axis, mask)
    return backend.gradients(dy, x, statistics, weight, active, mask, spec)


def _extent(a: torch.Tensor) -> tuple[int, int]:
    """First and one past the last address that a's elements touch; torch has no negative strides."""
    start = a.data_ptr()
    if a.is_contiguous():
        return start, start + a.nbytes
    span = sum((size - 1) * stride for size, stride in zip(a.shape, a.stride(), strict=True))
    return start, start + (span + 1) * a.element_size()


from anybn import _torch_ops  # noqa: E402, F401 tells batch_norm what to be inside torch.compile
