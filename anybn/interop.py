"""Other frameworks' names and conventions for a state; folding a state into the layer before it.

`CONVENTIONS` says what each framework calls things and means by them. A state goes into one and comes out of one:

>>> import numpy as np, anybn
>>> from anybn import interop
>>> keras_weights = {name: np.full(2, 1.0, "float32") for name in ("gamma", "beta", "moving_mean", "moving_variance")}
>>> state = interop.from_state_dict(keras_weights, "keras", epsilon=1e-3, momentum=0.99)
>>> state
BatchNormState(2, eps=0.001, momentum=0.01, ddof=0) on numpy, 0 batches tracked
>>> list(state.state_dict("flax")), interop.settings(state, "flax")
(['scale', 'bias', 'mean', 'var'],
 {'num_features': 2, 'epsilon': 0.001, 'momentum': 0.99, 'use_scale': True, 'use_bias': True})

What every conversion keeps, exactly, is y in evaluation. How training goes on is the state's ``momentum`` and ``ddof``:

- running_var is copied, not rescaled between biased and unbiased: that would need the count of every batch in it, and
  would change y. ``ddof`` says how the next batches are averaged; `from_state_dict` sets it to the framework's.
- Haiku and Equinox (``mode="batch"``) divide their averages by ``1 - decay**counter`` while they are young. The divided
  averages are what evaluation uses, and so what a state takes; ``counter`` becomes num_batches_tracked. On the way out
  the division is undone. A state with num_batches_tracked 0 did not start there, so its counter is written as the
  number after which the divisor is 1: its statistics count in full, and training goes on from them.
- A framework with one switch each for weight and bias may lack one of them: it is then 1, or 0. Where both always exist
  (ONNX, MXNet), a state without weight and bias writes 1 and 0.
- Where there is no count of batches, num_batches_tracked is 0.
- Equinox with ``mode="ema"`` normalizes with the running statistics in training too; a state only in evaluation.
- Haiku's arrays have x's rank: ``(1, C)``, ``(1, 1, 1, C)``. Any of these is read; what is written is ``(C,)``, to be
  reshaped.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from anybn import _checks
from anybn._fold import fold
from anybn.backends.registry import backend_for
from anybn.checkpoints.conventions import CONVENTIONS, Convention, complement
from anybn.core.call import Array, dtype_name
from anybn.errors import CheckpointError
from anybn.state.arrays import Arrays
from anybn.state.state import BatchNormState

__all__ = ["CONVENTIONS", "Convention", "fold", "from_state_dict", "load_state_dict", "settings", "state_dict"]


def _convention(name: str) -> Convention:
    return CONVENTIONS[_checks.choice("convention", name, tuple(CONVENTIONS))]


# -- out of a state --------------------------------------------------------------------------------------------


def state_dict(state: BatchNormState, convention: str) -> dict[str, Array]:
    """See `BatchNormState.state_dict`."""
    rules = _convention(convention)
    arrays = state._arrays
    names = _names_of(state, rules, convention)
    if "ignored_weight" in names.values() and state.affine and np.any(_to_numpy(arrays.weight) != 1):
        raise ValueError(f"weight is not 1 everywhere, as {convention} takes it to be: use 'mxnet', without fix_gamma")
    counter = _counter(state) if "counter" in names.values() else 0
    result: dict[str, Array] = {}
    for name, quantity in names.items():
        value: Any = getattr(arrays, quantity.replace("hidden", "running"), None)
        if quantity == "num_batches_tracked":
            value = _scalar_beside(value, arrays.running_mean)
        elif quantity == "counter":
            value = _scalar_beside(counter, arrays.running_mean)
        elif quantity == "unfilled":
            value = _scalar_beside(False, arrays.running_mean)
        elif quantity.startswith("hidden"):
            value = value * _debiasing(complement(state.momentum), counter)
        elif value is not None:
            value = backend_for(value).copy(value)
        else:  # of affine=False, or ignored
            value = _constant_beside(state, 0 if quantity == "bias" else 1)
        result[name] = value
    return result


def settings(state: BatchNormState, convention: str) -> dict[str, Any]:
    """The settings with which a framework makes the layer that a state is, by its names and in its meaning.

    ``keras.layers.BatchNormalization(**settings(state, "keras"))``; for ONNX, the attributes of the node. ``ddof`` has
    no setting in any of them, see the top of this module.

    Raises ValueError for an unknown convention, or for a state that it has no settings for: without running statistics
    (only torch and MLX), or with ``momentum=None`` (only torch).

    >>> import anybn
    >>> anybn.interop.settings(anybn.BatchNormState(3, eps=1e-3, momentum=0.01, affine=False), "keras")
    {'epsilon': 0.001, 'momentum': 0.99, 'scale': False, 'center': False}
    """
    rules = _convention(convention)
    _names_of(state, rules, convention)
    return {
        **({rules.size: state.num_features} if rules.size else {}),
        **rules.own_settings(state.eps, state.momentum),
        **dict.fromkeys(rules.affine, state.affine),
        **({rules.track: state.track_running_stats} if rules.track else {}),
        **rules.constants,
    }


def _names_of(state: BatchNormState, rules: Convention, convention: str) -> dict[str, str]:
    """{name: quantity} of what this state has in a convention."""
    if not (state.track_running_stats or rules.track):
        raise ValueError(
            f"state has track_running_stats=False, but {convention} always has running statistics: use torch's or "
            "MLX's convention, or a state that tracks them"
        )
    left_out = set() if state.affine or rules.always_affine else {"weight", "bias"}
    left_out |= set() if state.track_running_stats else set(Arrays._fields[2:])
    return {name: quantity for name, quantity in rules.names.items() if quantity not in left_out}


def _counter(state: BatchNormState) -> int:
    """The batches in an average that is to be debiased, see the top of this module."""
    momentum = state.momentum
    if momentum is None or momentum < 1e-7:  # 1e-7: beyond it the counter would not fit int32
        raise ValueError(
            f"momentum is {momentum}; averages that are divided by 1 - decay**counter need one of at least 1e-7: set "
            "state.momentum first"
        )
    if state.num_batches_tracked:
        return state.num_batches_tracked
    return 1 if momentum == 1 else math.ceil(-54 * math.log(2) / math.log1p(-momentum))  # decay**counter <= 2**-54


def _debiasing(decay: float, counter: int) -> float:
    """What hidden averages are divided by. Equinox divides the first one, which is no average, by 1."""
    return 1 - decay**counter if counter else 1.0


def _to_numpy(array: Array) -> np.ndarray:
    return backend_for(array).to_numpy(array)


def _scalar_beside(value: int | bool | Array, like: Array) -> Array:
    """A 0-d array beside the others: a bool, or an int in int64 where there is one."""
    backend = backend_for(like)
    if not isinstance(value, int):
        return value
    device = backend.device_of(like)
    integer = backend.module().__array_namespace_info__().default_dtypes(device=device)["indexing"]
    return backend.from_numpy(np.asarray(value, bool if isinstance(value, bool) else dtype_name(integer)), device)


def _constant_beside(state: BatchNormState, value: int) -> Array:
    like = state._arrays.running_mean
    backend = backend_for(like)
    dtype = backend_for(np.empty(0)).dtype(state.dtype)
    return backend.from_numpy(np.full(state.num_features, value, dtype), backend.device_of(like))


# -- into a state ----------------------------------------------------------------------------------------------


def from_state_dict(mapping: Mapping[str, Any], convention: str = "torch", **settings: float) -> BatchNormState:
    """The state, in NumPy, that one layer's arrays are in a framework; the way back is `BatchNormState.state_dict`.

    Args:
        mapping: names to arrays of any library, flat (``"~/mean_ema/average"``) or nested, with or without the
            collections in front (Flax's ``params`` and ``batch_stats``). Arrays that may be missing: counters; weight
            or bias or both where the framework can switch them off; running statistics in torch and MLX.
        convention: one of `CONVENTIONS`.
        settings: the layer's eps and momentum by the framework's names and in its meaning, as they stand in its code:
            ``epsilon=1e-3, momentum=0.99`` for Keras. Weights do not tell them; the default is the framework's.
            Equinox's hidden averages cannot be read without the right momentum.

    Returns:
        A `BatchNormState` with the framework's ``ddof``, in the dtype of weight or bias, or else float32.

    Raises CheckpointError that lists everything that is missing, foreign, misshapen or impossible; TypeError for an
    unknown setting; ValueError for an unknown convention.

    >>> import numpy as np, anybn
    >>> anybn.interop.from_state_dict({"params": {"scale": np.ones(2)},
    ...                                "batch_stats": {"mean": np.zeros(2), "var": np.ones(2)}}, "flax", momentum=0.9)
    BatchNormState(2, eps=1e-05, momentum=0.1, ddof=0, dtype='float64') on numpy, 0 batches tracked
    """
    rules = _convention(convention)
    found, problems = _arrays_of(mapping, rules)
    return new_state(found, rules, settings, problems)


def load_state_dict(state: BatchNormState, mapping: Mapping[str, Any], convention: str) -> None:
    """See `BatchNormState.load_state_dict`."""
    rules = _convention(convention)
    wanted = _names_of(state, rules, convention)
    found, problems = _arrays_of(mapping, rules)
    problems += [f"extra key {name!r}" for name in found if name not in wanted]
    required = {name for name, quantity in wanted.items() if quantity not in ("weight", "bias")}
    affine = wanted.keys() - required
    if len(rules.affine) != 2 or not affine & found.keys():
        required |= affine
    _fill(state, {name: a for name, a in found.items() if name in wanted}, rules, required, problems)


def new_state(
    found: Mapping[str, Any], rules: Convention, settings: Mapping[str, float], problems: list[str]
) -> BatchNormState:
    """A state of the arrays in found, by their names; with problems so far, if any, in the error."""
    chosen = rules.state_settings(settings)
    quantities = {rules.names[name]: array for name, array in found.items()}
    shapes = [np.shape(a) for q, a in quantities.items() if q not in ("counter", "num_batches_tracked", "unfilled")]
    affine = [quantities[q] for q in ("weight", "bias") if q in quantities]
    tracks = not rules.track or any(q.startswith("running") for q in quantities)
    optional = {"counter", "num_batches_tracked", "unfilled", "ignored_weight"}
    if "running_mean" in rules.names.values():
        optional |= {"hidden_mean", "hidden_var"}
    else:
        optional -= {"counter"}
    if not tracks:
        optional |= {"running_mean", "running_var"}
    if not rules.always_affine and (len(rules.affine) == 2 or not affine):
        optional |= {"weight", "bias"}
    if not shapes:
        raise CheckpointError(f"nothing was loaded: {'; '.join([*problems, 'there is no array of a batch norm'])}")
    state = BatchNormState(
        math.prod(shapes[0]),
        **chosen,
        affine=bool(affine) or rules.always_affine,
        track_running_stats=tracks,
        dtype=_dtype_of(affine),
    )
    required = {name for name, quantity in rules.names.items() if quantity not in optional}
    _fill(state, found, rules, required, problems)
    return state


def _dtype_of(arrays: list[Any]) -> str | None:
    """The widest floating dtype among arrays, which are checked later."""
    names = [dtype_name(a.dtype) for a in arrays if hasattr(a, "dtype")]
    return max((name for name in names if name in _checks.FLOATING), key=_checks.FLOATING.index, default=None)


def _fill(
    state: BatchNormState,
    found: Mapping[str, Any],
    rules: Convention,
    required: set[str],
    problems: list[str],
) -> None:
    """Put the arrays of found into state, all of them or none. Raises CheckpointError that lists every problem."""
    problems = [f"missing key {name!r}" for name in rules.names if name in required - found.keys()] + problems
    read: dict[str, Any] = {}
    for name, value in found.items():
        quantity = rules.names[name]
        try:
            value = _read(name, quantity, value, state.num_features, rules)
        except (TypeError, ValueError) as error:
            problems.append(str(error))
            continue
        if quantity == "counter" and read.setdefault(quantity, value) != value:
            problems.append(f"{name} is {value}, but the other average has counted {read[quantity]} batches")
        read[quantity] = value
    values = _fields_of(read, state, problems)
    for field in ("running_mean", "running_var"):
        if field in values and (problem := _checks.impossible_statistics(field, values[field])):
            name = rules.name_of(field)
            problems.append(problem if name == field else f"{name}: {problem}")
    if not state.affine and any(np.any(values.pop(name, one) != one) for name, one in (("weight", 1), ("bias", 0))):
        problems.append("weight is not 1 or bias is not 0, but the state has affine=False")
    if problems:
        raise CheckpointError(f"nothing was loaded: {'; '.join(problems)}")
    if not state.track_running_stats:
        del values["num_batches_tracked"]
    state._store.fill(values)


def _fields_of(read: dict[str, Any], state: BatchNormState, problems: list[str]) -> dict[str, Any]:
    """{field of a state: value} from {quantity: value}, for the state they go into."""
    c, momentum = state.num_features, state.momentum
    values = {"weight": np.ones(c), "bias": np.zeros(c), "num_batches_tracked": read.get("counter", 0)}
    values |= {quantity: value for quantity, value in read.items() if quantity in Arrays._fields}
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
        values |= {"running_mean": np.zeros(c), "running_var": np.ones(c)}
    return values


def _read(name: str, quantity: str, value: Any, num_features: int, rules: Convention) -> Any:
    """value as NumPy, or a counter as an int, if it can be this quantity."""
    if quantity in ("num_batches_tracked", "counter", "unfilled"):
        if not isinstance(value, numbers.Integral):
            value = _to_numpy(_known(name, value))
            if value.size != 1 or value.dtype.kind not in "iub":
                raise ValueError(f"{name} has shape {value.shape} and dtype {value.dtype}; it must be one integer")
            value = value.reshape(()).item()
        return bool(value) if quantity == "unfilled" else _checks.batch_count(value)
    value = _known(name, value)
    backend = backend_for(value)
    if rules.keeps_rank and sum(size != 1 for size in _checks.shape_of(value)) <= 1:
        value = backend.namespace(value).reshape(value, (-1,))
    _checks.state_array(backend, name, value, num_features)
    return backend.to_numpy(value)


def _known(name: str, value: Any) -> Array:
    """value, or as NumPy what an array lies in (a variable of Keras or Flax) or lacks of one (a device, in MLX)."""
    try:
        backend_for(value, name)
    except TypeError:
        if isinstance(value, np.ndarray) or not hasattr(value, "__array__"):
            raise
    else:
        if hasattr(value, "device"):
            return value
    return np.asarray(value)


def _arrays_of(mapping: Mapping[str, Any], rules: Convention) -> tuple[dict[str, Any], list[str]]:
    """({name: array} of one layer, problems with its keys)."""
    if not isinstance(mapping, Mapping):
        raise TypeError(f"mapping is a {type(mapping).__name__}; it must be a mapping of names to arrays")
    found: dict[str, Any] = {}
    problems = []
    for key, value in flat(mapping):
        layer, name = rules.parse(key) or (None, key)
        if layer != "":
            problems.append(f"extra key {key!r}")
        elif name in found:
            problems.append(f"key {key!r} is there twice")
        else:
            found[name] = value
    return found, problems


def flat(mapping: Mapping[Any, Any], separator: str = "/", prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings and tuples with their paths, as in "batch_norm/~/mean_ema/average"."""
    for key, value in mapping.items():
        if isinstance(value, tuple):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            yield from flat(value, separator, f"{prefix}{key}{separator}")
        else:
            yield f"{prefix}{key}", value
