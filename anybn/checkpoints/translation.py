"""A batch norm's settings and arrays by the names and the meaning of another framework, and back.

Here settings are those of `BatchNormState` by its names, and arrays those that it has by its names; one that is
switched off is None. `anybn.interop` says what each conversion keeps.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from anybn import _checks, _settings
from anybn.backends.base import beside_values
from anybn.backends.registry import backend_for, unwrapped
from anybn.checkpoints.conventions import Convention, Layer, complement, convention_called, flattened
from anybn.core.call import Array, dtype_name
from anybn.errors import BackendNotInstalled, CheckpointError

_RUNNING = ("running_mean", "running_var")
_FIELDS = ("weight", "bias", *_RUNNING, "num_batches_tracked")
_COUNTS = ("num_batches_tracked", "counter", "unfilled")


def quantities_of(settings: Mapping[str, Any], convention: str) -> dict[str, str]:
    """{name: quantity} of what a batch norm with these settings has in a convention.

    Raises ValueError for an unknown convention, or one that cannot express the settings.
    """
    rules = convention_called(convention)
    if not (settings["track_running_stats"] or rules.track):
        raise ValueError(
            f"state has track_running_stats=False, but {convention} always has running statistics: use torch's or "
            "MLX's convention, or a state that tracks them"
        )
    return _quantities_of(settings, rules)


def _quantities_of(settings: Mapping[str, Any], rules: Convention) -> dict[str, str]:
    left_out = {"weight", "bias"} - _parameters(settings)
    if not rules.affine or (len(left_out) == 1 and not rules.apart):
        left_out = set()
    left_out |= set() if settings["track_running_stats"] else {*_RUNNING, "num_batches_tracked"}
    return {name: quantity for name, quantity in rules.names.items() if quantity not in left_out}


def _parameters(settings: Mapping[str, Any]) -> set[str]:
    """Of weight and bias those that are there."""
    switches = {"weight": "scale", "bias": "bias"}
    return {name for name, switch in switches.items() if settings["affine"] and settings[switch]}


# -- to a framework --------------------------------------------------------------------------------------------


def encode(settings: Mapping[str, Any], arrays: Mapping[str, Any], convention: str) -> dict[str, Array]:
    """See `BatchNormState.state_dict`."""
    names = quantities_of(settings, convention)
    weight, like = arrays["weight"], arrays["running_mean"]
    if "ignored_weight" in names.values() and weight is not None and np.any(_to_numpy(weight) != 1):
        raise ValueError(f"weight is not 1 everywhere, as {convention} takes it to be: use 'mxnet', without fix_gamma")
    batches = arrays["num_batches_tracked"]
    counter = _counter(settings["momentum"], batches) if "counter" in names.values() else 0
    scalars = {"num_batches_tracked": batches, "counter": counter, "unfilled": False}
    result: dict[str, Array] = {}
    for name, quantity in names.items():
        value: Any = arrays.get(quantity.replace("hidden", "running"))
        if quantity in scalars:
            value = _scalar_beside(scalars[quantity], like)
        elif quantity.startswith("hidden"):
            value = value * _debiasing(complement(settings["momentum"]), counter)
        elif value is not None:
            value = backend_for(value).copy(value)
        else:  # switched off, or ignored
            dtype = backend_for(np.empty(0)).dtype(settings["dtype"])
            constant = np.full(settings["num_features"], 0 if quantity == "bias" else 1, dtype)
            value = backend_for(like).from_numpy(constant, backend_for(like).device_of(like))
        result[name] = value
    return result


def _counter(momentum: float | None, batches: int | Array) -> int:
    """The batches in an average that is to be debiased; for an average that did not start at 0 see `anybn.interop`."""
    if momentum is None or momentum < 1e-7:  # 1e-7: beyond it the counter would not fit int32
        raise ValueError(
            f"momentum is {momentum}; averages that are divided by 1 - decay**counter need one of at least 1e-7: set "
            "state.momentum first"
        )
    if batches:
        return int(batches)
    return 1 if momentum == 1 else math.ceil(-54 * math.log(2) / math.log1p(-momentum))  # decay**counter <= 2**-54


def _debiasing(decay: float, counter: int) -> float:
    """What hidden averages are divided by. Equinox divides the first one, which is no average, by 1."""
    return 1 - decay**counter if counter else 1.0


def _scalar_beside(value: int | bool | Array, like: Array) -> Array:
    """A 0-d array beside the others: a bool, or an int in int64 where there is one."""
    if not isinstance(value, int):
        return value
    backend = backend_for(like)
    device = backend.device_of(like)
    integer = backend.module().__array_namespace_info__().default_dtypes(device=device)["indexing"]
    dtype = bool if isinstance(value, bool) else dtype_name(integer)
    return backend.from_numpy(np.asarray(value, dtype), device)


# -- from a framework ------------------------------------------------------------------------------------------


def decode(mapping: Mapping[str, Any], settings: Mapping[str, Any], convention: str) -> dict[str, Any]:
    """{field: value in NumPy} for a batch norm that has these settings, see `BatchNormState.load_state_dict`."""
    wanted = quantities_of(settings, convention)
    layer = _without_extras(layer_of(mapping, convention, {}))
    extra = [f"extra key {name!r}" for name in layer.arrays if name not in wanted]
    known = {name: a for name, a in layer.arrays.items() if name in wanted}
    layer = layer._replace(arrays=known, problems=layer.problems + extra)
    return _values(layer, settings, _required(wanted, layer))


def decode_layer(layer: Layer) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings, {field: value in NumPy}) of a batch norm about which only the layer itself tells anything."""
    layer = _without_extras(layer)
    rules = layer.convention
    settings = rules.state_settings(layer.settings)
    quantities = {rules.names[name]: array for name, array in layer.arrays.items()}
    affine = {q: quantities[q] for q in ("weight", "bias") if q in quantities}
    apart = rules.apart and len(affine) == 1
    settings |= {
        "num_features": _num_features(layer),
        "affine": bool(affine) or not rules.affine,
        "scale": "weight" in affine or not apart,
        "bias": "bias" in affine or not apart,
        "track_running_stats": not rules.track or any(q.startswith("running") for q in quantities),
        "dtype": _widest_dtype([*affine.values()]),
    }
    optional = {"num_batches_tracked", "unfilled", "ignored_weight"}
    if "running_mean" in rules.names.values():  # beside which hidden averages tell nothing new
        optional |= {"hidden_mean", "hidden_var", "counter"}
    wanted = {name: q for name, q in _quantities_of(settings, rules).items() if q not in optional}
    return settings, _values(layer, settings, set(wanted))


def _without_extras(layer: Layer) -> Layer:
    rules = layer.convention
    return layer._replace(arrays={n: a for n, a in layer.arrays.items() if n in rules.names or n not in rules.extras})


def state_arrays_in(layer: Layer) -> dict[str, np.ndarray]:
    """{field: float64} of what a layer has and NumPy can read, unchecked: to look at, where nothing is to be loaded."""
    read: dict[str, np.ndarray] = {}
    for name, value in layer.arrays.items():
        quantity = layer.convention.names.get(name, "").replace("hidden", "running")
        if quantity in ("weight", "bias", *_RUNNING) and (quantity not in read or "hidden" not in name):
            with suppress(Exception):  # as many kinds as there are libraries
                read[quantity] = _to_numpy(_as_array(name, value)).astype(np.float64).reshape(-1)
    return read


def _num_features(layer: Layer) -> int:
    """The size of the first array that tells one. Raises CheckpointError if none does."""
    problems = list(layer.problems)
    for name, array in layer.arrays.items():
        if layer.convention.names[name] not in _COUNTS:
            try:
                return math.prod(np.shape(array))
            except Exception as error:  # RuntimeError from torch's lazy modules
                problems.append(
                    f"{name} has no shape yet ({error}): give the model a batch, and take its state_dict after that"
                )
    problems = problems or ["there is no array of a batch norm"]
    raise CheckpointError(f"nothing was loaded: {'; '.join(problems)}")


def _required(wanted: Mapping[str, str], layer: Layer) -> set[str]:
    """Those of the wanted names that may not be missing: all, but for weight or bias where each has its own switch."""
    affine = {name for name, quantity in wanted.items() if quantity in ("weight", "bias")}
    one_is_enough = len(layer.convention.affine) == 2 and affine & layer.arrays.keys()
    return wanted.keys() - affine if one_is_enough else set(wanted)


def layer_of(mapping: Mapping[str, Any], convention: str, settings: Mapping[str, float]) -> Layer:
    """The one layer whose arrays a mapping has, flat or nested; keys that are not among them are its problems."""
    rules = convention_called(convention)
    if not isinstance(mapping, Mapping):
        raise TypeError(f"mapping is a {type(mapping).__name__}; it must be a mapping of names to arrays")
    arrays: dict[str, Any] = {}
    problems = []
    for key, value in flattened(mapping):
        layer, name = rules.parse(key) or (None, key)
        if layer != "":
            problems.append(f"extra key {key!r}")
        elif name in arrays:
            problems.append(f"key {key!r} is there twice")
        else:
            arrays[name] = value
    return Layer(rules, arrays, settings, problems)


def _widest_dtype(arrays: list[Any]) -> str | None:
    """The widest floating dtype among arrays, which are checked later."""
    names = [dtype_name(a.dtype) for a in arrays if hasattr(a, "dtype")]
    return max((name for name in names if name in _settings.FLOATING), key=_settings.FLOATING.index, default=None)


def _values(layer: Layer, settings: Mapping[str, Any], required: set[str]) -> dict[str, Any]:
    """{field: value} for a batch norm with these settings. Raises CheckpointError that lists every problem."""
    rules = layer.convention
    problems = [f"missing key {name!r}" for name in rules.names if name in required - layer.arrays.keys()]
    problems += layer.problems
    read: dict[str, Any] = {}
    for name, value in layer.arrays.items():
        quantity = rules.names[name]
        try:
            value = _read(name, value, settings["num_features"], rules)
        except (TypeError, ValueError) as error:
            problems.append(str(error))
            continue
        except BackendNotInstalled:
            raise
        except Exception as error:  # each library has kinds of its own for what has no values, or none for NumPy
            problems.append(f"{name} cannot be read ({error or type(error).__name__})")
            continue
        if quantity == "counter" and read.setdefault(quantity, value) != value:
            problems.append(f"{name} is {value}, but the other average has counted {read[quantity]} batches")
        read[quantity] = value
    with np.errstate(all="ignore"):  # the values are looked at below
        values = _fields_of(read, settings, problems)
    for field in _RUNNING:
        if field in values and (problem := _checks.impossible_statistics(field, values[field])):
            name = rules.name_of(field)
            problems.append(problem if name == field else f"{name}: {problem}")
    constants = {"weight": 1.0, "bias": 0.0}
    for name in [name for name in constants if name not in _parameters(settings)]:
        if np.any(values.pop(name, constants[name]) != constants[name]):
            option = "affine" if not settings["affine"] else "scale" if name == "weight" else "bias"
            problems.append(f"{name} is not {constants[name]:g}, but the state has {option}=False")
        del constants[name]
    if problems:
        raise CheckpointError(f"nothing was loaded: {'; '.join(problems)}")
    # Last: nothing of this size is made before an array has been seen to have it.
    values = {name: np.full(settings["num_features"], one) for name, one in constants.items()} | values
    if not settings["track_running_stats"]:
        del values["num_batches_tracked"]
    return values


def _fields_of(read: Mapping[str, Any], settings: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """{field: value} from {quantity: value}; what is wrong with the counter goes to problems."""
    momentum = settings["momentum"]
    values = {"num_batches_tracked": read.get("counter", 0)}
    values |= {quantity: value for quantity, value in read.items() if quantity in _FIELDS}
    if "running_mean" not in values and "counter" in read:
        if momentum is None or momentum == 0:
            problems.append(f"momentum is {momentum}, so averages cannot be divided by 1 - decay**counter")
            return {}
        debiasing = _debiasing(complement(momentum), read["counter"])
        values |= {
            quantity.replace("hidden", "running"): value / debiasing
            for quantity, value in read.items()
            if quantity.startswith("hidden")
        }
    if read.get("unfilled"):
        start = {"running_mean": np.zeros_like, "running_var": np.ones_like}
        values |= {field: like(values[field]) for field, like in start.items() if field in values}
    return values


def _read(name: str, value: Any, num_features: int, rules: Convention) -> Any:
    """value in NumPy, or a counter as an int, if it can be what the name stands for."""
    quantity = rules.names[name]
    if quantity in _COUNTS:
        return bool(_integer(name, value)) if quantity == "unfilled" else count_of(name, value)
    value = _as_array(name, value)
    backend = backend_for(value)
    if rules.keeps_rank and sum(size != 1 for size in _checks.shape_of(value)) <= 1:
        value = backend.namespace(value).reshape(value, (-1,))
    _checks.state_array(backend, name, value, num_features)
    return backend.to_numpy(value)


def count_of(name: str, value: Any) -> int:
    """A number of batches, as an int or an array of one, that int64 holds, as every library keeps it."""
    value = _integer(name, value)
    if value >= 2**63:
        raise ValueError(f"{name} is 2**63 or more; it must be a count of batches that int64 holds")
    return _settings.batch_count(value)


def _integer(name: str, value: Any) -> Any:
    if not isinstance(value, numbers.Integral):
        value = _to_numpy(_as_array(name, value))
        if value.size != 1 or value.dtype.kind not in "iub":
            raise ValueError(f"{name} has shape {value.shape} and dtype {value.dtype}; it must be one integer")
        value = value.reshape(()).item()
    return value


def _as_array(name: str, value: Any) -> Array:
    """value, out of a variable of Keras or Flax, or as NumPy what is no array that a backend takes."""
    value = unwrapped(value)
    try:
        backend_for(value, name)
    except TypeError:
        if isinstance(value, np.ndarray) or not hasattr(value, "__array__") or beside_values(type(value)):
            raise
        return np.asarray(value)
    return value


def _to_numpy(array: Array) -> np.ndarray:
    return backend_for(array).to_numpy(array)
