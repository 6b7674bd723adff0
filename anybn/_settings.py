"""What a state and a call are set to: the dtypes there are, and the range of every argument that is no array.

Each function returns the argument as it is used from then on, or raises with: what it was, what was wanted, what to do.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal, NamedTuple

import numpy as np

from anybn.core.call import dtype_name
from anybn.errors import required

Activation = Literal["relu"] | None
NonFinite = Literal["skip", "raise", "propagate"]


class DType(NamedTuple):
    """A dtype that x, weight and bias may have."""

    itemsize: int
    bits: str
    """as what the kernels for the CPU take its numbers: those of 16 bits as their bits"""
    cuda: str
    """its name in batchnorm.cu"""


#: By name. The place in this order is the number that batchnorm.cu and the members of a group know a dtype by.
DTYPES = {
    "float16": DType(2, "int16", "float16"),
    "bfloat16": DType(2, "uint16", "bfloat16"),
    "float32": DType(4, "float32", "float"),
    "float64": DType(8, "float64", "double"),
}
FLOATING = tuple(DTYPES)


def numpy_dtype(name: str) -> np.dtype:
    """NumPy's dtype of this name. Raises BackendNotInstalled for one that takes ml_dtypes, where that is missing."""
    if not hasattr(np, name):
        with required(f"NumPy has no {name} by itself", "ml_dtypes"):
            import ml_dtypes  # noqa: F401 NumPy knows its dtypes from then on
    return np.dtype(name)


def _number(name: str, value: Any, kind: type, wanted: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be {wanted}")
    return value


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an int that no float can hold
        return math.inf


def num_features(value: Any) -> int:
    value = int(_number("num_features", value, numbers.Integral, "an int, the number of channels"))
    if value < 0:
        raise ValueError(f"num_features is {value}; it must be the number of channels, 0 or more")
    return value


def eps(value: Any, name: str = "eps") -> float:
    if type(value) is float and 0.0 < value < math.inf:  # as it mostly is: the next line takes a microsecond
        return value
    value = _float(_number(name, value, numbers.Real, "a float"))
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; it must be positive and finite: it keeps sqrt(var + eps) away from 0")
    return value


def momentum(value: Any, name: str = "momentum") -> float | None:
    if value is None:
        return None
    value = _float(_number(name, value, numbers.Real, "a float, or None for the cumulative average"))
    if not 0 <= value <= 1:
        raise ValueError(
            f"{name} is {value}; it must lie in [0, 1]: new = (1 - momentum) * old + momentum * batch; "
            "Keras's momentum is 1 minus this"
        )
    return value


def ddof(value: Any) -> int:
    value = int(_number("ddof", value, numbers.Integral, "the int 0 or 1"))
    if value not in (0, 1):
        raise ValueError(
            f"ddof is {value}; running_var averages m2 / (count - ddof): use 1 as torch does, or 0 as Keras, Flax and "
            "ONNX do"
        )
    return value


def axis(value: Any, name: str = "axis") -> int:
    if type(value) is int:  # in every call; what is a Number takes longer to ask
        return value
    return int(_number(name, value, numbers.Integral, "an int, that of the channels"))


def axes(value: Any) -> tuple[int, ...]:
    if type(value) is int:
        return (value,)
    given = value if isinstance(value, tuple) else (value,)
    return tuple(int(_number("axes", a, numbers.Integral, "an int or a tuple of them")) for a in given)


def positive(name: str, value: Any) -> int:
    value = int(_number(name, value, numbers.Integral, "an int"))
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be 1 or more")
    return value


def flag(name: str, value: Any) -> bool:
    if type(value) is not bool and type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be True or False")
    return bool(value)


def batch_count(value: Any) -> int:
    value = int(_number("num_batches_tracked", value, numbers.Integral, "an int"))
    if value < 0:
        raise ValueError(f"num_batches_tracked is {value}; it counts batches, so it must be 0 or more")
    return value


def state_dtype(dtype: Any) -> str:
    name = "float32" if dtype is None else dtype_name(dtype)
    if name not in FLOATING:
        raise TypeError(f"dtype is {dtype!r}; weight and bias must be one of {', '.join(FLOATING)}")
    return name


def choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if value is choice or (isinstance(value, str) and value == choice):
            return value
    raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
