"""torch tensors on any device, inside autograd to any order."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import array_api_compat.torch
import numpy as np
import torch
from torch._C import _functorch as functorch  # torch.func has no public way to ask
from torch.autograd.graph import increment_version
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from anybn import _lock
from anybn._settings import DTYPES, numpy_dtype
from anybn.backends.base import Backend
from anybn.backends.numpy import NumPyBackend, kernels
from anybn.backends.torch import cpu, cuda, native
from anybn.backends.torch.autograd import (
    Recorded,
    RecordedRows,
    Summed,
    dispatches,
    has_no_memory,
    in_torch_func,
    op_by_op,
    unwrapped,
)
from anybn.core.call import Array, Call, Gradients, Statistics, Update, dtype_name
from anybn.errors import StateError
from anybn.groups import exchange
from anybn.kernels.cuda import launch
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
        if x.device.type != "cpu" or op_by_op() or dispatches(x):
            return root
        exact = torch.from_numpy(np.sqrt(cpu.view(x)))
        return root + (exact - root.detach())  # keeps the derivatives

    @staticmethod
    def concat(arrays: list[torch.Tensor], axis: int = 0) -> torch.Tensor:
        return torch.cat(arrays, axis)  # torch.concat takes no gradients that are many at a time


_NAMESPACE = _Namespace()


class TorchBackend(Backend):
    name = "torch"
    libraries = ("torch",)
    companion = "anybn.torch.compiled"

    @property
    def how(self) -> str:  # type: ignore[override]
        cuda = "CUDA kernels with CuPy, else torch's own batch norm"
        return f"on the CPU {NumPyBackend().how}, on CUDA {cuda}, elsewhere the Array API core, inside autograd"

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, torch.Tensor)

    def holds(self, array: Any, device: torch.device) -> bool:
        return isinstance(array, torch.Tensor) and array.device == device

    def refusal(self, x: torch.Tensor) -> str:
        if isinstance(x, UninitializedTensorMixin):
            return "is a lazy module's and has no shape yet: give the module a batch first"
        if x.layout is not torch.strided:
            return f"has the layout {x.layout}: make it dense, e.g. with x.to_dense()"
        if x.is_quantized:
            return "is quantized: cast it with x.dequantize()"
        if x.is_nested:
            return "is a nested tensor: pad it, and pass mask="
        if x.is_meta:
            return "is on the meta device and has no values: create it on a real one"
        if x.is_cpu and not op_by_op() and not dispatches(x) and not x.data_ptr() and x.numel():
            return cpu.NO_MEMORY
        return ""

    def are_plain(self, *arrays: torch.Tensor | None) -> bool:
        return not op_by_op() and cpu.are_plain(arrays)

    def module(self) -> ModuleType:
        return array_api_compat.torch

    def namespace(self, x: Array) -> _Namespace:
        return _NAMESPACE

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
        with torch.inference_mode(False), torch._C._DisableFuncTorch():  # what a state keeps must be good for later
            return self._from_numpy(array, device)

    def _from_numpy(self, array: np.ndarray, device: torch.device) -> torch.Tensor:
        name = array.dtype.name
        if not hasattr(np, name):  # torch does not know ml_dtypes, but the bits are the same
            return torch.from_numpy(array.view(DTYPES[name].bits)).view(getattr(torch, name)).to(device)
        return torch.from_numpy(array).to(device)

    def to_numpy(self, x: torch.Tensor) -> np.ndarray:
        if in_torch_func():
            x = unwrapped(x)
            with torch._C._DisableFuncTorch():  # whose derivatives wrap all that is computed under them
                return self._to_numpy(x)
        return self._to_numpy(x)

    def _to_numpy(self, x: torch.Tensor) -> np.ndarray:
        if x.is_cuda:
            cuda.await_updates(x)
        x = x.detach().cpu().resolve_neg().clone(memory_format=torch.contiguous_format)  # see `cpu.view`
        name = dtype_name(x.dtype)
        if not hasattr(np, name):
            return x.view(getattr(torch, DTYPES[name].bits)).numpy().view(numpy_dtype(name))
        return x.numpy()

    def is_traced(self, x: torch.Tensor) -> bool:
        return in_torch_func() and functorch.is_batchedtensor(unwrapped(x))

    def may_store(self, new: torch.Tensor, old: torch.Tensor) -> bool:
        return not self.is_traced(new)

    def detached(self, x: Any) -> Any:
        return unwrapped(x).detach() if isinstance(x, torch.Tensor) else x

    def frozen(self, x: torch.Tensor) -> torch.Tensor:
        if not in_torch_func() or self.is_traced(x):
            return x
        x = unwrapped(x)  # what torch.func's derivatives wrap is lost with them
        with torch._C._DisableFuncTorch():
            return x.detach()

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        with self.no_grad():
            return x.detach().clone()

    def twin(self, x: torch.Tensor) -> torch.Tensor:
        return copy.deepcopy(x) if x.is_leaf else self.copy(x)

    def watch(self, x: torch.Tensor) -> Callable[[], Any]:
        if in_torch_func() or dispatches(x) or x.is_neg() or (x.is_inference() and not x.is_cpu):
            return object
        if not x.is_cpu:
            return lambda: (x._version, x.data_ptr())
        if not x.is_contiguous():
            return lambda: self._to_numpy(x).tobytes()
        # Its bytes: a write through ``x.data`` is counted by no version.
        address = x.data_ptr()
        memory = (ctypes.c_char * x.nbytes).from_address(address) if address else None
        return lambda: memory.raw if memory is not None and x.data_ptr() == address else object()

    def lasts(self, x: torch.Tensor) -> bool:
        return not (x.requires_grad or dispatches(x) or self.is_traced(x))

    def moved(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        return x.to(device)

    def is_trained(self, x: torch.Tensor) -> bool:
        return x.requires_grad

    def relocated(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        if not x.is_leaf:
            return x.to(device)
        x.data = x.data.to(device)  # as torch.nn.Module.to does
        return x

    def device_name(self, x: torch.Tensor) -> str:
        return str(x.device)

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
        if op_by_op() or dispatches(a, b) or a.device != b.device or not a.numel() or not b.numel():
            return False
        first, second = _extent(a), _extent(b)
        return first[0] < second[1] and second[0] < first[1]

    def same_memory(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())

    # -- batch norm --------------------------------------------------------------------------------------------

    def _kernels_on(self, device: torch.device) -> Any:
        """`cpu`, or what has the same functions for another device, if there is something; else None."""
        if device.type == "cpu":
            return cpu
        if device.type == "cuda":
            return cuda.KERNELS if launch.available() else native
        return None

    def _kernels_for(self, call: Call) -> Any:
        """The kernels for what is only to be computed, if they take it; else None, for the core."""
        x = call.x
        chosen = self._kernels_on(x.device)
        if chosen is None or not x.numel() or op_by_op() or not chosen.supports(x):
            return None
        if dispatches(x, call.weight, call.bias, call.residual, call.out, call.mask):
            return None
        return chosen if call.mask is None or chosen.takes_mask(call) else None

    def statistics(self, call: Call) -> Statistics:
        if call.group is None:
            if not self.records(call.x) and (chosen := self._kernels_for(call)):
                return chosen.batch_statistics(call)
        elif call.x.is_cpu and not self.records(call.x) and not op_by_op():
            part = exchange.own(self, call)  # count is a tensor where a mask decides
            part = exchange.Part(*(a.numpy() if isinstance(a, torch.Tensor) else a for a in part))
            count, *found = exchange.over_all(_ON_HOST, part, call.group)
            return Statistics(count, *(None if a is None else torch.from_numpy(a) for a in found))
        return super().statistics(call)

    def train(self, call: Call) -> tuple[torch.Tensor, Statistics, tuple[torch.Tensor, torch.Tensor] | None]:
        if self._records_call(call):
            with torch.no_grad():
                y, statistics, running = TorchBackend.train(self, call)
            return self._recorded(call, y, statistics), statistics, running
        if call.group is None and (chosen := self._kernels_for(call)):
            return chosen.train(call)
        return super().train(call)

    def evaluate(self, call: Call, statistics: Statistics) -> torch.Tensor:
        if self._records_call(call):
            with torch.no_grad():
                y = TorchBackend.evaluate(self, call, statistics)
            return self._recorded(call, y, statistics)
        if chosen := self._kernels_for(call):
            return chosen.evaluate(call, statistics)
        return super().evaluate(call, statistics)

    def _records_call(self, call: Call) -> bool:
        return self.records(call.x, call.weight, call.bias, call.residual) and not op_by_op()

    def _recorded(self, call: Call, y: torch.Tensor, statistics: Statistics) -> torch.Tensor:
        x, spec, weight, bias, residual, mask, group = call[:7]
        return Recorded.apply(x, weight, bias, residual, (y, statistics), self, spec, mask, group)

    def gradients(
        self,
        call: Call,
        statistics: Statistics,
        dy: torch.Tensor,
        active: torch.Tensor | None,
        wants_residual: bool,
    ) -> Gradients:
        """See `Backend.gradients`; active may also be y itself, which kernels for the CPU read as it is."""
        recorded = self.records(dy, call.x, call.weight) or dispatches(dy) or has_no_memory(dy)
        chosen = None if recorded else self._kernels_for(call)
        if active is not None and active.dtype is not torch.bool and chosen is not cpu:
            active = active > 0
        if not chosen:
            return super().gradients(call, statistics, dy, active, wants_residual)
        if call.group is None:
            return chosen.gradients(call, statistics, dy, active, wants_residual)
        if chosen is not cpu:
            return super().gradients(call, statistics, dy, active, wants_residual)

        def over(*sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            sum_dy, sum_dy_xhat = exchange.sums(self, call.group.group, *map(torch.from_numpy, sums))
            return cpu.view(sum_dy), cpu.view(sum_dy_xhat)

        return cpu.gradients(call, statistics, dy, active, wants_residual, over)

    def update(self, update: Update, statistics: Statistics) -> tuple[torch.Tensor, torch.Tensor]:
        mean = update.running_mean
        chosen = None if dispatches(*statistics) else self._kernels_for(Call(mean, None))
        if chosen and isinstance(statistics.count, int) and isinstance(update.momentum, (int, float)):
            with self.no_grad():
                new = chosen.updated_running_statistics(update, statistics)
        else:
            new = super().update(update, statistics)
        if mean.is_cuda and not op_by_op():
            cuda.KERNELS.note_update(mean)
        return new

    def update_in_place(self, update: Update, statistics: Statistics, counter: torch.Tensor | None) -> None:
        """Fold statistics, torch tensors, into the running ones where these lie, and count the batch, all at once.

        Nothing waits for a device. ``update.momentum`` None is the cumulative average, by the counter.
        """
        if not self._in_one_launch(update, statistics, counter):
            _lock.at_once(*self.writes(*self.updated_values(update, statistics, counter)))

    def updated_values(
        self, update: Update, statistics: Statistics, counter: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What `update_in_place` writes to, and the values."""
        mean, var, momentum, ddof, propagate = update
        statistics = _on(mean.device, statistics)
        with torch.no_grad():
            factor: Any = momentum
            if momentum is None:
                factor = 0.0 if counter is None else 1.0 / (counter + 1).to(mean.dtype)
                if mean.is_cpu and not op_by_op():
                    factor = float(factor)
            working = self.working_dtype(mean)  # whatever a checkpoint or FSDP has made of them
            of_running = Update(mean.to(working), var.to(working), factor, ddof, propagate)
            values = [*self.update(of_running, statistics)]
            return ([mean, var], values) if counter is None else ([mean, var, counter], [*values, counter + 1])

    def _in_one_launch(self, update: Update, statistics: Statistics, counter: torch.Tensor | None) -> bool:
        """`update_in_place` by one launch of a CUDA kernel, if one can do that."""
        mean, var, chosen = update.running_mean, update.running_var, self._kernels_for(Call(update.running_mean, None))
        statistics = _on(mean.device, statistics)
        if not (
            isinstance(chosen, CudaArrays)
            and isinstance(statistics.count, int)
            and mean.dtype is var.dtype
            and mean.dtype in (torch.float32, torch.float64)
            and mean.is_contiguous()
            and var.is_contiguous()
            and (update.momentum is not None or counter is not None)
            and (counter is None or (counter.dtype is torch.int64 and counter.device == mean.device))
        ):
            return False
        chosen.update_in_place(update, statistics, counter)
        increment_version([a for a in (mean, var, counter) if a is not None])
        return True

    def writes(self, targets: list[torch.Tensor], values: list[torch.Tensor]) -> tuple[list[Any], list[Any]]:
        """What fills targets with values, and what undoes it, for `anybn._lock.at_once`."""
        if op_by_op():
            return [partial(self._write, *pair) for pair in zip(targets, values, strict=True)], []
        copies = [target.detach().copy_ for target in targets]
        before = [target.detach().clone() for target in targets]
        fill, undo = (list(map(partial, copies, contents)) for contents in (values, before))
        return fill, undo

    def _write(self, target: torch.Tensor, value: torch.Tensor) -> None:
        """``target.copy_(value)``, under torch.func's transforms as well."""
        with torch.no_grad():
            if not in_torch_func() or functorch.is_functorch_wrapped_tensor(target):
                target.copy_(value)
            elif self.is_traced(value):
                raise StateError(
                    "the module's buffers are not batched but the statistics are: pass them through vmap as well, with "
                    "torch.func.functional_call and torch.func.stack_module_state, or use eval mode"
                )
            else:
                with torch._C._DisableFuncTorch():  # what grad records goes on; a buffer is none of its inputs
                    target.copy_(value)

    # -- norms of rows -----------------------------------------------------------------------------------------

    def normalize_rows(self, call: Call) -> tuple[torch.Tensor, Any]:
        """The statistics are what `row_gradients` takes."""
        if not (self._kernels_for(call) is cpu and cpu.takes_rows(call)):
            return super().normalize_rows(call)
        return self._recorded_rows(call, *cpu.normalize_rows(call))

    def normalize_plain_rows(self, call: Call) -> tuple[torch.Tensor, Any]:
        found = cpu.normalize_plain_rows(call) if cpu.takes_rows(call) else None
        return self.normalize_rows(call) if found is None else self._recorded_rows(call, *found)

    def _recorded_rows(self, call: Call, y: torch.Tensor, statistics: Any) -> tuple[torch.Tensor, Any]:
        x, spec, weight, bias = call[:4]
        if self.records(x, weight, bias):
            y = RecordedRows.apply(x, weight, bias, (y, statistics), self, spec)
        return y, statistics

    def row_gradients(self, call: Call, statistics: Any, dy: torch.Tensor) -> Gradients:
        x, _, weight, bias = call[:4]
        special = self.records(dy, x, weight) or has_no_memory(dy)
        if isinstance(statistics, np.ndarray):
            plain = not special and self.are_plain(dy, x, weight, bias)
            if plain and (found := cpu.plain_row_gradients(call, statistics, dy)) is not None:
                return found
            statistics = cpu.statistics_of_rows(statistics, x)
        if special or dispatches(dy) or self._kernels_for(call) is not cpu or kernels().row_kernels is None:
            return super().row_gradients(call, statistics, dy)
        return cpu.row_gradients(call, statistics, dy)

    # -- groups of processes -----------------------------------------------------------------------------------

    def all_reduce_sum(self, group: Any, array: torch.Tensor) -> torch.Tensor:
        if self.records(array) or op_by_op():
            return Summed.apply(array, group)
        return group.all_reduce_sum(array)


class TorchNativeBackend(TorchBackend):
    """torch's own batch norm in the place of anybn's kernels, for ``anybn.use_backend("torch-native")``."""

    name = "torch-native"
    how = "torch's own batch norm, inside autograd; masks take the Array API core"

    def _kernels_on(self, device: torch.device) -> Any:
        return native


class _OnHost(NumPyBackend):
    """NumPy for the few vectors that a group of torch's exchanges: its calls take less time than torch's operations."""

    def all_reduce_sum(self, group: Any, array: np.ndarray) -> np.ndarray:
        return group.all_reduce_sum(torch.from_numpy(array)).numpy()


_ON_HOST = _OnHost()


def _on(device: torch.device, statistics: Statistics) -> Statistics:
    return Statistics(*(s.to(device) if isinstance(s, torch.Tensor) else s for s in statistics))


def _extent(a: torch.Tensor) -> tuple[int, int]:
    """First and one past the last address that a's elements touch; torch has no negative strides."""
    start = a.data_ptr()
    if a.is_contiguous():
        return start, start + a.nbytes
    span = sum((size - 1) * stride for size, stride in zip(a.shape, a.stride(), strict=True))
    return start, start + (span + 1) * a.element_size()
