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
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from anybn.backends.base import Backend
from anybn.backends.numpy import NumPyBackend, kernels
from anybn.backends.torch import cpu as _torch_cpu
from anybn.backends.torch import cuda as _torch_cuda
from anybn.backends.torch import native as _torch_native
from anybn.core import formulas as _core
from anybn.core.formulas import Array, Gradients, Over, RowSpec, Spec, Statistics, Update
from anybn.groups import exchange as _synchronized
from anybn.groups.exchange import Members
from anybn.kernels.cuda import launch as _cuda
from anybn.kernels.cuda.arrays import CudaArrays


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
        cuda = "CUDA kernels with CuPy, else torch's own batch norm"
        return f"on the CPU {NumPyBackend().how}, on CUDA {cuda}, elsewhere the Array API core, inside autograd"

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
        if x.is_cuda:
            _torch_cuda.await_updates(x)
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

    def _kernels_on(self, device: torch.device) -> Any:
        """`_torch_cpu`, or what has the same functions for another device, if there is something; else None."""
        if device.type == "cpu":
            return _torch_cpu
        if device.type == "cuda":
            return _torch_cuda.KERNELS if _cuda.available() else _torch_native
        return None

    def _kernels_for(self, x: torch.Tensor, mask: torch.Tensor | None) -> Any:
        """The kernels for what is only to be computed, if they take it; else None, for the core."""
        chosen = self._kernels_on(x.device)
        if chosen is None or mask is not None or not x.numel() or op_by_op() or not chosen.supports(x):
            return None
        return chosen

    def batch_statistics(self, x: torch.Tensor, axis: int, mask: torch.Tensor | None) -> Statistics:
        if not self.records(x) and (chosen := self._kernels_for(x, mask)):
            return chosen.batch_statistics(x, axis)
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
        y, statistics, _ = TorchBackend.train_and_update(self, None, x, weight, bias, residual, mask, spec, out)
        return y, statistics

    def train_and_update(
        self,
        update: Update | None,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        mask: torch.Tensor | None,
        spec: Spec,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Statistics, tuple[torch.Tensor, torch.Tensor] | None]:
        if self.records(x, weight, bias, residual) and not op_by_op():
            with torch.no_grad():
                computed = TorchBackend.train_and_update(self, update, x, weight, bias, residual, mask, spec)
            y, statistics, running = computed
            return _Recorded.apply(x, weight, bias, residual, self, (y, statistics), mask, spec), statistics, running
        if chosen := self._kernels_for(x, mask):
            return chosen.train(x, weight, bias, residual, spec, out, update)
        return (*super().train(x, weight, bias, residual, mask, spec, out), None)

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
            return chosen.evaluate(x, statistics, weight, bias, residual, spec, out)
        return super().evaluate(x, statistics, weight, bias, residual, mask, spec, out)

    def updated_running_statistics(
        self,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        statistics: Statistics,
        momentum: float | torch.Tensor,
        ddof: int,
        propagate: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = self._kernels_for(running_mean, None)
        if chosen and isinstance(statistics.count, int) and isinstance(momentum, (int, float)):
            with self.no_grad():
                update = Update(running_mean, running_var, momentum, ddof, propagate)
                new = chosen.updated_running_statistics(statistics, update)
        else:
            new = super().updated_running_statistics(running_mean, running_var, statistics, momentum, ddof, propagate)
        if running_mean.is_cuda and not op_by_op():
            _torch_cuda.note_update(running_mean)
        return new

    def updates_in_place(self, statistics: Statistics, update: Update, counter: torch.Tensor | None) -> bool:
        """Fold statistics into the running ones where these lie and count the batch, if one launch can do that."""
        mean, var, chosen = update.running_mean, update.running_var, self._kernels_for(update.running_mean, None)
        if not (
            isinstance(chosen, CudaArrays)
            and isinstance(statistics.count, int)
            and mean.dtype is var.dtype
            and mean.is_contiguous()
            and var.is_contiguous()
            and (update.momentum is not None or counter is not None)
            and (counter is None or (counter.dtype is torch.int64 and counter.device == mean.device))
        ):
            return False
        chosen.update_in_place(statistics, update, counter)
        increment_version([a for a in (mean, var, counter) if a is not None])
        return True

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
        if self.records(dy, x, weight) or not (chosen := self._kernels_for(x, mask)):
            return super().gradients(dy, x, statistics, weight, active, mask, spec)
        if over is not None:
            return _torch_cpu.gradients(dy, x, statistics, weight, active, spec, over)
        return chosen.gradients(dy, x, statistics, weight, active, spec)

    # -- norms of rows -----------------------------------------------------------------------------------------

    def _by_row_kernels(self, x: torch.Tensor) -> bool:
        return self._kernels_for(x, None) is _torch_cpu and kernels().row_kernels is not None

    def normalize_rows(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, spec: RowSpec
    ) -> tuple[torch.Tensor, Statistics]:
        if not (self._by_row_kernels(x) and kernels().row_kernels.takes(spec, weight, bias)):
            return super().normalize_rows(x, weight, bias, spec)
        computed = _torch_cpu.normalize_rows(x, weight, bias, spec)
        if self.records(x, weight, bias):
            return _RecordedRows.apply(x, weight, bias, self, computed, spec), computed[1]
        return computed

    def row_gradients(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        statistics: Statistics,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        spec: RowSpec,
    ) -> Gradients:
        if self.records(dy, x, weight) or not self._by_row_kernels(x):
            return super().row_gradients(dy, x, statistics, weight, bias, spec)
        return _torch_cpu.row_gradients(dy, x, statistics, weight, bias, spec)

    # -- batch norm over a group of processes ------------------------------------------------------------------

    def all_reduce_sum(self, group: Any, array: torch.Tensor) -> torch.Tensor:
        if self.records(array) or op_by_op():
            return _Summed.apply(array, group)
        return group.all_reduce_sum(array)

    def statistics_over(self, members: Members, x: torch.Tensor, axis: int, mask: torch.Tensor | None) -> Statistics:
        if x.device.type != "cpu" or self.records(x) or op_by_op():
            return super().statistics_over(members, x, axis, mask)
        part = _synchronized.own(self, x, axis, mask, members)
        count, *arrays = (a.numpy() if isinstance(a, torch.Tensor) else a for a in part)
        count, *found = _synchronized.over_all(_ON_HOST, _synchronized.Part(count, *arrays), members)
        return Statistics(count, *(None if a is None else torch.from_numpy(a) for a in found))

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
        if self.records(dy, x, weight) or self._kernels_for(x, mask) is not _torch_cpu:
            return super().gradients_over(members, dy, x, *rest)

        def over(*sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            sum_dy, sum_dy_xhat = _synchronized.sums(self, members.group, *map(torch.from_numpy, sums))
            return sum_dy.numpy(), sum_dy_xhat.numpy()

        return self.gradients(dy, x, statistics, weight, active, mask, spec, over)


class TorchNativeBackend(TorchBackend):
    """torch's own batch norm in the place of anybn's kernels, for ``anybn.use_backend("torch-native")``."""

    name = "torch-native"
    how = "torch's own batch norm, inside autograd; masks take the Array API core"

    def _kernels_on(self, device: torch.device) -> Any:
        return _torch_native


class _OnHost(NumPyBackend):
    """NumPy for the few vectors that a group of torch's exchanges: its calls take less time than torch's operations."""

    def all_reduce_sum(self, group: Any, array: np.ndarray) -> np.ndarray:
        return group.all_reduce_sum(torch.from_numpy(array)).numpy()


_ON_HOST = _OnHost()


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
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        spec = ctx.spec._replace(differentiates_residual=ctx.needs_input_grad[3])
        grads = differentiated(ctx.backend, dy, ctx.saved_tensors, ctx.statistics, spec, ctx.members)
        bias = grads.bias if ctx.has_bias else None
        return grads.x, grads.weight, bias, grads.residual, None, None, None, None, None


class _RecordedRows(torch.autograd.Function):
    """The same of `Backend.normalize_rows`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        backend: TorchBackend,
        computed: tuple[torch.Tensor, Statistics],
        spec: RowSpec,
    ) -> torch.Tensor:
        y, statistics = computed
        ctx.save_for_backward(x, weight, bias)
        ctx.backend, ctx.statistics, ctx.spec = backend, statistics, spec
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, weight, bias), backend, statistics = ctx.saved_tensors, ctx.backend, ctx.statistics
        if torch.is_grad_enabled():
            statistics = backend.batch_statistics(_core.in_rows(_NAMESPACE, x, ctx.spec), 1, None)
        grads = backend.row_gradients(dy, x, statistics, weight, bias, ctx.spec)
        return grads.x, grads.weight, grads.bias, None, None, None


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
        if is_compiling():  # a call of backward in a compiled function
            return _torch_ops.eagerly(differentiated)(backend, dy, saved, statistics, spec, members)
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


from anybn.torch import ops as _torch_ops  # noqa: E402 tells batch_norm what to be inside torch.compile
