"""Where a test runs: a backend on one of its devices, with conversions from and to NumPy."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from anybn._settings import DTYPES
from anybn.backends import Backend, registry
from anybn.conformance.inputs import cast
from anybn.core.call import Array


@dataclasses.dataclass(frozen=True)
class Target:
    """A backend and a device, as tests get it in ``anybn_target``.

    >>> target = chosen_targets(["numpy"])[0].values[0]
    >>> target.name, target.has_float64
    ('numpy', True)
    """

    name: str
    backend: Backend
    device: Any

    @property
    def has_float64(self) -> bool:
        """Whether running statistics, and the arithmetic on narrower values, are float64 there."""
        return self.backend.has_float64(self.device)

    @property
    def xp(self) -> Any:
        """The library's Array API namespace."""
        return self.backend.module()

    def array(self, values: np.ndarray, dtype: str | None = None) -> Array:
        """values on the target, cast to dtype."""
        return self.backend.from_numpy(cast(values, dtype or values.dtype.name), self.device)

    def numpy(self, array: Array) -> np.ndarray:
        """array's values; which must lie in the target's library and on its device."""
        assert self.backend.owns(type(array)), f"a result is a {type(array)}"
        assert self.backend.device_of(array) == self.device, f"a result is on {self.backend.device_of(array)}"
        return self.backend.to_numpy(array)

    def differentiated(self, function: Callable[..., Array], dy: Array, *arrays: Array) -> tuple[Array, ...]:
        """y of the arrays and the gradients of ``sum(y * dy)``, by the library's automatic differentiation."""
        library = self.backend.libraries[0]
        if library == "torch":
            import torch

            leaves = [a.clone().requires_grad_() for a in arrays]
            y = function(*leaves)
            return y.detach(), *torch.autograd.grad(y, leaves, dy)
        if library == "jax":
            import jax

            y, pullback = jax.vjp(function, *arrays)
            return y, *pullback(dy)
        pytest.skip(f"{self.name} has no automatic differentiation that the suite knows")

    def require(self, dtype: str) -> None:
        """Skip a test whose dtype the library does not have on this device."""
        if dtype == "float64" and not self.has_float64:
            pytest.skip(f"{self.name} has no float64")
        try:
            self.array(np.zeros(2), dtype)
        except (AttributeError, ImportError, TypeError, ValueError) as error:
            pytest.skip(f"{self.name} has no {dtype}: {error}")


def bar(target: Target, dtype: str) -> float:
    """The largest error allowed, in eps of the dtype: half a unit and a little for 16 bits, else a few roundings."""
    if DTYPES[dtype].itemsize == 2:
        return 0.51
    return 2.0 if target.has_float64 else 4.0


def rows_and_layouts(rows: Iterable[str], layouts: Iterable[str]) -> list[Any]:
    """All pairs, as parameters. Those that have neither the first row nor the first layout are slow, taken together."""
    rows, layouts = list(rows), list(layouts)
    return [
        pytest.param(row, layout, marks=pytest.mark.slow if row != rows[0] and layout != layouts[0] else ())
        for row, layout in itertools.product(rows, layouts)
    ]


def _target(name: str) -> Target:
    backend, device = registry.resolve_target(name)
    if not backend.devices():
        raise ValueError(f"{name} is installed but has no device to run on")
    return Target(name, backend, device)


def chosen_targets(names: list[str] | None) -> list[Any]:
    """The parameters of ``anybn_target``: the backends asked for, or every device of every installed one."""
    if names:
        try:
            return [pytest.param(_target(name), id=name) for name in "".join(",".join(names).split()).split(",")]
        except (ImportError, ValueError, RuntimeError) as error:
            raise pytest.UsageError(f"--anybn-backend: {error}") from error
    found = registry.installed_backends()
    params = []
    for name in registry.known_backends():
        info = found.get(name)
        if info is None or not info.usable:
            missing = f"not installed, {registry.installation_of(name)}"
            reason = f"{name}: {missing if info is None else info.problem}"
            params.append(pytest.param(None, id=name, marks=pytest.mark.skip(reason=reason)))
            continue
        seen = set()
        for device in info.devices if len(info.devices) > 1 else ("",):
            target = _target(f"{name}:{device}" if device else name)
            alike = target.has_float64 in seen  # as a device before
            params.append(pytest.param(target, id=target.name, marks=pytest.mark.slow if alike else ()))
            seen.add(target.has_float64)
    return params
