"""The state of a torch module: its own tensors, read and written in place, as a `BatchNormState`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from torch._C import _functorch as functorch  # torch.func has no public way to ask

from anybn import _checks
from anybn.backends.base import Backend
from anybn.backends.registry import backend_for, resolve_target
from anybn.backends.torch.backend import TorchBackend, in_torch_func, op_by_op
from anybn.core import formulas as _core
from anybn.core.formulas import Array, Statistics, Update
from anybn.errors import StateError
from anybn.state import state as _state
from anybn.state.state import Arrays, BatchNormState

_TORCH = TorchBackend()


class ModuleState(BatchNormState):
    """A `BatchNormState` that holds nothing but a module: settings, arrays and counter are the module's.

    It stays where the module is: a call with x elsewhere takes copies there and brings the batch's statistics back.
    Everything is written in place, so that optimizers, replicas and whatever else shares the tensors see it. Unlike the
    arrays of other states, an array read from it follows later changes.
    """

    __slots__ = ("_module",)

    def __init__(self, module: torch.nn.modules.batchnorm._BatchNorm):
        self._module = module

    # -- settings and arrays, which `BatchNormState` keeps in slots --------------------------------------------

    _num_features = property(lambda self: self._module.num_features)  # type: ignore[assignment]

    @property
    def _eps(self) -> float:  # type: ignore[override]
        return _checks.eps(self._module.eps)

    @_eps.setter
    def _eps(self, value: float) -> None:
        self._module.eps = value

    @property
    def _momentum(self) -> float | None:  # type: ignore[override]
        return _checks.momentum(self._module.momentum)

    @_momentum.setter
    def _momentum(self, value: float | None) -> None:
        self._module.momentum = value

    @property  # type: ignore[misc]
    def ddof(self) -> int:
        """1, torch's convention; it cannot be set."""
        return 1

    _ddof = ddof  # type: ignore[assignment]

    @property
    def _dtype(self) -> str:  # type: ignore[override]
        weight = self._module.weight
        return "float32" if weight is None else _core.dtype_name(weight.dtype)

    @property
    def _arrays(self) -> Arrays:  # type: ignore[override]
        module = self._module
        batches = module.num_batches_tracked
        return Arrays(
            module.weight, module.bias, module.running_mean, module.running_var, 0 if batches is None else batches
        )

    # -- writing, in place and all under the lock of every state -----------------------------------------------

    def _fill(self, values: dict[str, Any]) -> None:
        """Write tensors and numbers by field name."""
        with _state._lock, torch.no_grad():
            for name, value in values.items():
                target = getattr(self._module, name)
                if isinstance(value, torch.Tensor):
                    target.copy_(value)
                elif target is not None:
                    target.fill_(value)

    def _set(self, name: str, value: Array) -> None:
        target = getattr(self._module, name)
        if target is None:
            raise ValueError(f"{name} cannot be set, the module was made without it")
        if value is target:
            return
        backend = backend_for(value, name)
        _checks.state_array(backend, name, value, self.num_features)
        if backend.records(value):
            raise TypeError(
                f"{name} requires grad, and a copy of it would not be trained: set it on the module itself, or pass "
                f"{name}.detach()"
            )
        self._fill({name: _on_cpu(backend, value)})

    def _update(self, change: Callable[[Arrays], Arrays]) -> None:
        """Of the counter; everything else has its own way here."""
        with _state._lock:
            self._fill({"num_batches_tracked": change(self._arrays).num_batches_tracked})

    def _replace_values(self, values: dict[str, Any]) -> None:
        numpy = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        self._fill(values | {name: _TORCH.from_numpy(value, torch.device("cpu")) for name, value in numpy.items()})

    def _planned_update(self, arrays: Arrays, nonfinite: str) -> None:
        """It is updated in place, and so only when everything has succeeded."""

    def _commit(
        self,
        backend: Backend,
        x: Array,
        statistics: Statistics,
        running: tuple[Array, Array] | None,
        nonfinite: str,
        before: Arrays,
        beside: Arrays,
    ) -> None:
        if not self._module.track_running_stats:  # switched off after the module was made
            return
        if isinstance(backend, TorchBackend):
            statistics = Statistics(*(_TORCH.detached(s) for s in statistics))
        else:
            kept = (s if s is None or isinstance(s, int) else _on_cpu(backend, s) for s in statistics)
            statistics = Statistics(*kept)
        module = self._module
        buffers = module.running_mean, module.running_var, module.num_batches_tracked
        update_running(*buffers, statistics, self.momentum, propagate=nonfinite == "propagate")

    def _settle(self, backend: Backend, before: Arrays, beside: Arrays) -> None:
        """It stays where it is."""

    def _beside(self, backend: Backend, x: Array) -> tuple[Arrays, Arrays]:
        arrays = self._arrays
        device = backend.device_of(x)
        if not all(backend.holds(a, device) for a in arrays.held().values()):
            return arrays, self._placed(arrays, backend, device)
        if arrays.running_mean is None or arrays.running_var is None or not isinstance(backend, TorchBackend):
            return arrays, arrays
        working = backend.working_dtype(x)  # a checkpoint may have brought float32 with it
        running = arrays.running_mean.to(working), arrays.running_var.to(working)
        return arrays, arrays._replace(running_mean=running[0], running_var=running[1])

    # -- moving and copying ------------------------------------------------------------------------------------

    def to(self, target: Any) -> Self:
        """Moves the module, within torch; returns self. Raises StateError for another library."""
        backend, device = resolve_target(target)
        if not isinstance(backend, TorchBackend):
            raise StateError(
                f"this state is a torch module's own and cannot move to {backend.name}: pass arrays of any library to "
                "it where it is, or move state.copy()"
            )
        self._module.to(device)
        return self

    def copy(self) -> BatchNormState:
        """An independent `BatchNormState`, of no module."""
        arrays = self._arrays
        new = BatchNormState(
            self.num_features,
            eps=self.eps,
            momentum=self.momentum,
            affine=self.affine,
            track_running_stats=self.track_running_stats,
            dtype=self.dtype,
        )
        new._arrays = new._arrays._replace(
            **{name: _TORCH.twin(a) for name, a in arrays.held().items()},
            num_batches_tracked=self.num_batches_tracked,
        )
        return new

    __copy__ = copy


def _on_cpu(backend: Backend, array: Array) -> torch.Tensor:
    """The values of an array of any library."""
    if isinstance(backend, TorchBackend):
        return array.detach()
    try:
        return _TORCH.from_numpy(backend.to_numpy(backend.detached(array)), torch.device("cpu"))
    except Exception as error:
        if backend.is_traced(array):
            raise StateError(
                "a traced call cannot change a torch module's state, which has real values: pass module.state.copy() "
                "into the traced function and return it"
            ) from error
        raise


def update_running(
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    batches: torch.Tensor | None,
    statistics: Statistics,
    momentum: float | None,
    ddof: int = 1,
    propagate: bool = False,
) -> None:
    """Fold the statistics of a batch, torch tensors, into these, in place, without waiting for a device."""
    device = running_mean.device
    statistics = Statistics(*(s.to(device) if isinstance(s, torch.Tensor) else s for s in statistics))
    with _state._lock, torch.no_grad():
        if _TORCH.updates_in_place(statistics, Update(running_mean, running_var, momentum, ddof, propagate), batches):
            return
        factor: Any = momentum
        if momentum is None:
            factor = 0.0 if batches is None else 1.0 / (batches + 1).to(running_mean.dtype)
            if device.type == "cpu" and not op_by_op():
                factor = float(factor)
        mean, var = _TORCH.updated_running_statistics(running_mean, running_var, statistics, factor, ddof, propagate)
        write(running_mean, mean)
        write(running_var, var)
        if batches is not None:
            write(batches, batches + 1)


def write(target: torch.Tensor, value: torch.Tensor) -> None:
    """``target.copy_(value)``, under torch.func's transforms as well."""
    if not in_torch_func() or functorch.is_functorch_wrapped_tensor(target):
        target.copy_(value)
    elif _TORCH.is_traced(value):
        raise StateError(
            "the module's buffers are not batched but the statistics are: pass them through vmap as well, with "
            "torch.func.functional_call and torch.func.stack_module_state, or use eval mode"
        )
    else:
        with torch._C._DisableFuncTorch():  # what grad and its like record goes on; a buffer is none of their inputs
            target.copy_(value)
