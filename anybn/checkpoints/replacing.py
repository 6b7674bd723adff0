"""A state's arrays in the place of those that a layer has: by its names, in its shapes and dtypes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from anybn import _settings
from anybn.backends.registry import backend_for, unwrapped
from anybn.checkpoints.conventions import Layer
from anybn.checkpoints.translation import encode
from anybn.core.call import dtype_name
from anybn.errors import CheckpointError

_ABSENT = {"weight": 1, "bias": 0}
"""What stands for an array that a state does not have, or a layer."""


def replacements(layer: Layer, settings: Mapping[str, Any], arrays: Mapping[str, Any], name: str) -> dict[str, Any]:
    """{array: value in NumPy} for the arrays that a layer has, from those of a state, which are in NumPy.

    Args:
        name: of the layer's convention.

    Raises CheckpointError that lists all of what has no place in the layer, or does not fit it.
    """
    rules, channels = layer.convention, settings["num_features"]
    given = encode(settings, arrays, name)
    problems, values = list(layer.problems), {}
    if rules.extras.keys() & layer.arrays.keys():
        spread = np.sqrt(np.asarray(arrays["running_var"], np.float64) + settings["eps"])
        by_quantity = {"running_std": spread, "running_mean": arrays["running_mean"]}
        given |= {extra: by_quantity[q] for extra, q in rules.extras.items() if extra in layer.arrays}
    for array, present in layer.arrays.items():
        quantity = rules.names.get(array, "")
        if array not in given and quantity in _ABSENT:
            given[array] = np.full(channels, _ABSENT[quantity])
        if array in given:
            try:
                values[array] = _as_present(array, given.pop(array), present)
            except ValueError as error:
                problems.append(str(error))
        else:
            problems.append(f"it has {array!r}, but the state has no {quantity}")
    for array, value in given.items():
        quantity = rules.names[array]
        if quantity.startswith(("running", "hidden")) or np.any(np.asarray(value) != _ABSENT.get(quantity, value)):
            problems.append(f"it has no {array!r}, but the state's {quantity} says something")
    if problems:
        raise CheckpointError("; ".join(problems))
    return values


def _as_present(name: str, value: Any, present: Any) -> np.ndarray:
    """value in the shape and dtype of the array that is there."""
    present = unwrapped(present)
    value, shape = np.asarray(value), tuple(present.shape)
    if math.prod(shape) != value.size:
        raise ValueError(f"{name} has shape {shape} there, but the state has {value.size} channels")
    dtype = dtype_name(present.dtype)
    numpy_dtype = _settings.numpy_dtype(dtype) if dtype in _settings.FLOATING else np.dtype(dtype)
    with np.errstate(all="ignore"):  # what became of the values is looked at below
        cast = value.astype(numpy_dtype).reshape(shape)
    if np.any(np.isinf(cast.astype(np.float64)) & np.isfinite(value.reshape(shape).astype(np.float64))):
        raise ValueError(f"{name} is {dtype} there, which is too narrow for the state's values")
    if dtype not in _settings.FLOATING and np.any(cast != value.reshape(shape)):
        raise ValueError(f"{name} is {dtype} there, which cannot hold {value}")
    return cast


def in_numpy(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: a if a is None or isinstance(a, int) else backend_for(a).to_numpy(a) for name, a in arrays.items()}
