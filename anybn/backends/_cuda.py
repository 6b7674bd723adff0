"""batchnorm.cu on device pointers: what CuPy's and torch's CUDA arrays share. Knows no array library.

A caller describes its arrays by pointers and `Array`s in memory order, gives scratch memory, and a `Launcher`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from anybn.backends._cuda_plan import TYPES, Device, Launch, Plan, alignment_of, plan

SOURCE = Path(__file__).with_name("batchnorm.cu")
#: Contraction would break what is computed with its rounding errors.
OPTIONS = ("--std=c++17", "--fmad=false")

_POINTERS = (
    *("x", "residual", "dy", "active", "y", "dresidual", "weight", "bias", "mean", "shift", "var", "m2"),
    *("dweight", "dbias", "running_mean", "running_var", "new_running_mean", "new_running_var"),
    *("counter", "partials", "corrections"),
)
_INTEGERS = ("n", "channels", "length", "parts", "keep", "ddof")
_FLAGS = ("weight_type", "running_type", "relu", "propagate", "cumulative", "training")

#: `struct Call` of batchnorm.cu, field by field.
CALL = np.dtype(
    [
        *((name, np.uint64) for name in _POINTERS),
        *((name, np.int64) for name in _INTEGERS),
        *((name, np.float64) for name in ("eps", "momentum")),
        *((name, np.int32) for name in _FLAGS),
    ],
    align=True,
)
#: The enumeration of batchnorm.cu.
PARAMETER_TYPES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}

#: Runs a kernel with a `CALL` record as its argument.
Launcher = Callable[[Launch, np.ndarray], None]


def planned(op: str, shape: tuple[int, int, int], dtype: str, device: Device, **pointers: int) -> Plan:
    """The plan for arrays of this shape that start at these addresses (0: none); `active` has bytes."""
    itemsize = TYPES[dtype][1]
    like_x = [pointers.get(name, 0) for name in ("x", "residual", "dy", "y", "dresidual")]
    return plan(op, shape, dtype, device, alignment_of([*like_x, pointers.get("active", 0) * itemsize], itemsize))


def run(made: Plan, launcher: Launcher, shape: tuple[int, int, int], scratch: int, **fields: Any) -> None:
    """Launch the kernels of a plan, with ``scratch`` the address of plan.scratch_bytes bytes, for fields of `CALL`."""
    call = np.zeros((), CALL)
    call["n"], call["channels"], call["length"] = shape
    call["parts"] = made.parts
    if scratch:
        call["corrections"] = scratch
        call["partials"] = scratch + 16 * shape[1]
    for name, value in fields.items():
        call[name] = value
    for launch in made.launches:
        call["keep"] = launch.keep
        launcher(launch, call)
