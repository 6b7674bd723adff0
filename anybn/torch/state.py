"""The state of a torch module: its own tensors, read and written in place, as a `BatchNormState`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from anybn import _checks, _lock, _settings
from anybn.backends.base import Backend
from anybn.backends.registry import backend_for
from anybn.backends.torch import TorchBackend
from anybn.core.call import Array, Statistics, Update, dtype_name
from anybn.errors import StateError
from anybn.state.arrays import Arrays, placed
from anybn.state.state import BatchNormState
from anybn.state.store import Batch, Store

_TORCH = TorchBackend()


class ModuleStore(Store):
    """A store that holds nothing but a module: settings, arrays and counter are the module's.

    It stays where the module is: a call with x elsewhere takes copies there and brings the batch's statistics back.
    Everything is written in place, so that optimizers, replicas and whatever else shares the tensors see it. Unlike the
    arrays of other states, an array read from it follows later changes.
    """

    __slots__ = ("_module",)

    def __init__(self, module: torch.nn.modules.batchnorm._BatchNorm):
        self._module = module

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._module,)

    @property
    def owner(self) -> torch.nn.Module:
        return self._module

    def copy(self) -> Store:
        with _lock.commits:
            copied = super().copy()
        copied.arrays = copied.arrays._replace(num_batches_tracked=int(copied.arrays.num_batches_tracked))
        return copied

    # -- reading -----------------------------------------------------------------------------------------------

    @property
    def num_features(self) -> int:  # type: ignore[override]
        return self._module.num_features

    @property
    def eps(self) -> float:  # type: ignore[override]
        return _settings.eps(self._module.eps)

    @eps.setter
    def eps(self, value: float) -> None:
        self._module.eps = value

    @property
    def momentum(self) -> float | None:  # type: ignore[override]
        return _settings.momentum(self._module.momentum)

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self._module.momentum = value

    @property
    def ddof(self) -> int:  # type: ignore[override]
        """1, torch's convention; it cannot be set."""
        return 1

    @property
    def dtype(self) -> str:  # type: ignore[override]
        weight, bias = self._module.weight, self._module.bias
        parameter = bias if weight is None else weight
        return "float32" if parameter is None else dtype_name(parameter.dtype)

    @property
    def arrays(self) -> Arrays:  # type: ignore[override]
        module = self._module
        batches = module.num_batches_tracked
        return Arrays(
            module.weight, module.bias, module.running_mean, module.running_var, 0 if batches is None else batches
        )

    @property
    def block(self) -> Any:  # type: ignore[override]
        return self._module._block

    @block.setter
    def block(self, value: Any) -> None:
        self._module._block = value

    def given(self, name: str) -> Array | None:
        return getattr(self.arrays, name)

    def snapshot(self) -> Arrays:
        with _lock.commits:
            arrays = self.arrays
            return arrays._replace(
                **{name: a.detach().clone() for name, a in arrays.named().items() if isinstance(a, torch.Tensor)}
            )

    def placed_beside(self, backend: Backend, x: Array) -> tuple[Arrays, Arrays]:
        arrays, device = self.arrays, backend.device_of(x)
        for name, array in arrays.held().items():
            _checks.floating_array(name, array, _TORCH)
        with _lock.commits:  # both running statistics before a thread that trains, or both after it
            if not all(backend.holds(a, device) for a in arrays.held().values()):
                return arrays, placed(arrays, self.dtype, backend, device)
            if arrays.running_mean is None or arrays.running_var is None or not isinstance(backend, TorchBackend):
                return arrays, arrays
            working = backend.working_dtype(x)  # a checkpoint may have brought float32 with it
            mean, var = arrays.running_mean.to(working, copy=True), arrays.running_var.to(working, copy=True)
        return arrays, arrays._replace(running_mean=mean, running_var=var)

    def planned_update(self, arrays: Arrays, propagate: bool) -> None:
        """It is updated in place, and so only when everything has succeeded."""

    # -- writing, in place and all under the lock of every state -----------------------------------------------

    def adopt(self, backend: Backend, x: Array, before: Arrays, placed: Arrays) -> None:
        """It stays where it is."""

    def learn(self, batch: Batch) -> None:
        if self._module.track_running_stats:  # it may have been switched off after the module was made
            with _lock.commits:
                _TORCH.update_in_place(*self._update(batch))

    def changes(self, batch: Batch) -> tuple[list[Any], list[Any]]:
        if not self._module.track_running_stats:
            return [], []
        return _TORCH.writes(*_TORCH.updated_values(*self._update(batch)))

    def _update(self, batch: Batch) -> tuple[Update, Statistics, torch.Tensor | None]:
        module = self._module
        statistics = Statistics(*(as_tensor(batch.backend, s) for s in batch.statistics))
        update = Update(module.running_mean, module.running_var, self.momentum, self.ddof, batch.propagate)
        return update, statistics, module.num_batches_tracked

    def put(self, name: str, value: Array) -> None:
        backend = backend_for(value, name)
        _checks.state_array(backend, name, value, self.num_features)
        if backend.records(value):
            raise TypeError(
                f"{name} requires grad, and a copy of it would not be trained: set it on the module itself, or pass "
                f"{name}.detach()"
            )
        self._write({name: as_tensor(backend, value)})

    def fill(self, values: dict[str, Any]) -> None:
        numpy = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        self._write(values | {name: _TORCH.from_numpy(value, torch.device("cpu")) for name, value in numpy.items()})

    def _write(self, values: dict[str, Any]) -> None:
        """Tensors and numbers, by field name; all of them or, on an error, none."""
        _checks.state_arrays(self.arrays[:4], self.num_features)
        with torch.no_grad():
            found = {name: getattr(self._module, name) for name in values}
            found = {name: target for name, target in found.items() if target is not None}
            for name, target in found.items():
                if problem := _TORCH.write_problem(target):
                    raise ValueError(f"{name} {problem}")
                if name not in self._module._parameters and name not in self._module._buffers:
                    raise ValueError(
                        f"{name} is what a parametrization computes, and a value written to it would be lost: remove "
                        "the parametrization, or set it on the module itself"
                    )
            filling = [_filling(name, values[name], target) for name, target in found.items()]
            _lock.at_once(*_TORCH.writes(list(found.values()), filling))

    def move(self, backend: Backend, device: Any) -> None:
        """Moves the module, within torch. Raises StateError for another library."""
        if not isinstance(backend, TorchBackend):
            raise StateError(
                f"this state is a torch module's own and cannot move to {backend.name}: pass arrays of any library to "
                "it where it is, or move state.copy()"
            )
        self._module.to(device)


def state_of(module: torch.nn.modules.batchnorm._BatchNorm) -> BatchNormState:
    """The live `BatchNormState` of a module's own tensors."""
    return BatchNormState._over(ModuleStore(module))


def _filling(name: str, value: Any, target: torch.Tensor) -> torch.Tensor:
    """value as a tensor, of the target's dtype where it is a number."""
    if isinstance(value, torch.Tensor):
        return value
    if not target.is_floating_point() and value > (most := torch.iinfo(target.dtype).max):
        raise ValueError(
            f"{name} is {value}; the module keeps it in {dtype_name(target.dtype)}: it must be {most} or less"
        )
    return torch.tensor(value, dtype=target.dtype, device=target.device)


def as_tensor(backend: Backend, value: Any) -> Any:
    """An array of any library as a tensor, a constant for automatic differentiation; what is none as it is."""
    if value is None or isinstance(value, int):
        return value
    if isinstance(backend, TorchBackend):
        return _TORCH.detached(value)
    try:
        return _TORCH.from_numpy(backend.to_numpy(backend.detached(value)), torch.device("cpu"))
    except Exception as error:
        if backend.is_traced(value):
            raise StateError(
                "a traced call cannot change a torch module's state, which has real values: pass module.state.copy() "
                "into the traced function and return it"
            ) from error
        raise
