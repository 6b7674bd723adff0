"""Calls of `step` that compiled code makes on torch's tensors, found by their layout.

`prepare` compiles a kernel with the last arguments that a layout has, and keeps its address in a table. `operator`
looks it up there, with the handles of tensors alone.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import carray, njit, types

from anybn.kernels.cpu import sharing, step, threads
from anybn.kernels.cpu import torch_abi as abi
from anybn.kernels.cpu.cached import cached
from anybn.kernels.cpu.primitives import address_of, by_types, doubles, integers, invoke, nanoseconds, outlined, pointer
from anybn.kernels.cpu.values import EXACT, SHIFT, fill, if_given, shift_in

#: Addresses that compiled code finds under one name: of the buckets of plans, `threads.limit`, `sharing.team` and the
#: names of the operators for backward, ended by 0; and torch's numbers of two dtypes.
PLANS, LIMIT, TEAM, BACKWARD_NAME, RECORDED_NAME, NO_NAME, INT64, FLOAT64, CONTEXT = range(9)
_context_address, _in_parallel = address_of("anybn_context"), types.ExternalFunction("anybn_in_parallel", types.int32())


@njit(**EXACT)
def context():
    return carray(integers(_context_address()), (CONTEXT,))


# -- plans -----------------------------------------------------------------------------------------------------

_BUCKETS = 1024
#: What a plan is found by, after x's layout: the dtype of weight and bias, and what follows, `RELU` and `ADDS` added
#: up. What it says: how many values and channels, the addresses of three kernels, 0 for what is not compiled yet, and
#: of the next plan of its bucket.
WEIGHT_DTYPE, FOLLOWS, SIZE, CHANNELS, TRAIN, EVALUATE, DIFFERENTIATE, NEXT, PLAN = range(abi.LAYOUT, abi.LAYOUT + 9)
#: What may follow: a relu, and before it the addition of a residual.
RELU, ADDS = 1, 2
_KEY = SIZE


@njit(**EXACT)
def _bucket(key):
    mixed = np.uint64(0)
    for i in range(_KEY):
        mixed = (mixed ^ np.uint64(key[i])) * np.uint64(1099511628211)  # FNV-1a, on words
    return np.int64((mixed >> np.uint64(20)) % np.uint64(_BUCKETS))


@njit(**EXACT)
def plan_at(x, weight, follows):
    """The address of the plan for these handles, or 0."""
    key, found = np.zeros(_KEY, np.int64), 0
    if abi.describe(x, key):
        key[WEIGHT_DTYPE], key[FOLLOWS] = abi.dtype_of(weight), follows
        address = carray(integers(context()[PLANS]), (_BUCKETS,))[_bucket(key)]
        while address != 0 and found == 0:
            plan, found = carray(integers(address), (PLAN,)), address
            for i in range(_KEY):
                if plan[i] != key[i]:
                    found = 0
            address = plan[NEXT]
    return found


# -- kernels with their last arguments -------------------------------------------------------------------------

#: What changes from call to call: addresses of values, eps as its bits, who may help, how long OpenMP waited.
X, Y, RESIDUAL, WEIGHT, BIAS, MEAN, VAR, DY, DX, DRESIDUAL, DWEIGHT, DBIAS = range(12)
ROWS, ROW_COUNT, EPS, THREADS, OPENMP, WAITED, CALL = range(12, 19)


@njit(**EXACT)
def _fill_in_hands(call):
    """Fills in who may help, as `sharing.hands` says it; but nobody where that says our pool, which Python starts."""
    team, limit = carray(integers(context()[TEAM]), (2,)), carray(integers(context()[LIMIT]), (1,))
    call[THREADS] = min(abi.num_threads(), limit[0])
    if call[THREADS] > 1:
        if team[sharing.ENTRIES] == 0 or nanoseconds() < team[sharing.CROWDED_UNTIL] or _in_parallel() != 0:
            call[THREADS] = 1
        else:
            call[OPENMP] = team[sharing.ENTRIES]


@njit(**EXACT)
def run(kernel, call):
    """Whether the kernel at this address, as `_keep` leaves it, did the call."""
    _fill_in_hands(call)
    function, words = carray(integers(kernel), (2,))
    last = carray(integers(kernel + 16), (words,)).copy()
    last[words - 1], call[WAITED] = call.ctypes.data, -1
    invoke(function, last.ctypes.data)
    last[0] = 0  # Numba frees an array after the last line that names it
    waited = call[WAITED]
    if waited > sharing.CROWDED:
        team = carray(integers(context()[TEAM]), (2,))
        team[sharing.CROWDED_UNTIL] = nanoseconds() + sharing.REST * waited
    return waited >= 0


_train, _train_in_parts = njit(**EXACT)(step.train.py_func), njit(**EXACT)(step.train_in_parts.py_func)
_evaluate = njit(**EXACT)(step.evaluate.py_func)
_gradients = njit(**EXACT)(step.backward.py_func)
_gradients_in_parts = njit(**EXACT)(step.backward_in_parts.py_func)


@by_types
def _forward(trains, last, *arguments):
    """A step of training, by the last arguments that a plan has for it; of evaluation where trains is None."""
    if isinstance(trains, types.NoneType):
        return lambda trains, last, *arguments: _evaluate(None, None, *(arguments + last))
    chosen = _train if len(last) == 2 else _train_in_parts
    return lambda trains, last, *arguments: chosen(None, None, *(arguments + last))


@by_types
def _backward(last, *arguments):
    chosen = _gradients if len(last) == 2 else _gradients_in_parts
    return lambda last, *arguments: chosen(None, *(arguments + last))


@njit(**EXACT)
def _rows_at(address, count, channels):
    """Those that a call keeps for its backward pass, or, where it has none, room for as many."""
    return carray(doubles(address), (count, channels)) if address != 0 else np.empty((count, channels))


@njit(**EXACT)
def _forward_call(like_x, like_weight, trains, residual, size, channels, floor, last, call):
    c, numbers = carray(integers(call), (CALL,)), carray(doubles(call), (CALL,))
    rows, hands = _rows_at(c[ROWS], 2 if trains is None else 5, channels), (c[THREADS], c[OPENMP], 0)
    if trains is not None and shift_in(rows, like_x) is None:
        fill(rows[SHIFT], 0.0)
    arrays = like_x, like_weight, c[X], c[Y], if_given(residual, c[RESIDUAL]), c[WEIGHT], c[BIAS], c[MEAN], c[VAR]
    options = size, channels, floor, numbers[EPS], rows, hands
    c[WAITED] = _forward(trains, last, *(arrays + options))


@njit(**EXACT)
def _backward_call(like_x, like_weight, y, residual, size, channels, last, call):
    c, numbers = carray(integers(call), (CALL,)), carray(doubles(call), (CALL,))
    rows, hands = _rows_at(c[ROWS], c[ROW_COUNT], channels), (c[THREADS], c[OPENMP], 0)
    arrays = like_x, like_weight, c[DY], c[X], if_given(y, c[Y]), c[DX], if_given(residual, c[DRESIDUAL])
    of_parameters = c[WEIGHT], c[DWEIGHT], c[DBIAS], size, channels, numbers[EPS], rows, hands
    c[WAITED] = _backward(last, *(arrays + of_parameters))


@njit(**EXACT)
def copy_words(source, to):  # ``to[:] = source`` takes half a second to compile
    for i in range(min(len(source), len(to))):
        to[i] = source[i]


@njit(**EXACT)
def _keep(function, data, size, out):
    words, out[0], out[1] = carray(integers(data), (size // 8,)), function, size // 8
    copy_words(words, out[2:])


@njit(**EXACT)
def _bare(like):
    """The array without what counts who uses it, which ends with the call that it was given to."""
    return carray(pointer(like, like.ctypes.data), (0,))


@cached()
def _keep_forward(out, like_x, like_weight, trains, residual, size, channels, floor, last):
    """Leaves in out what `run` takes the address of."""
    given = _bare(like_x), _bare(like_weight), trains, residual, size, channels, floor, last, 0
    _keep(*outlined(_forward_call, given), out)


@cached()
def _keep_backward(out, like_x, like_weight, y, residual, size, channels, last):
    given = _bare(like_x), _bare(like_weight), y, residual, size, channels, last, 0
    _keep(*outlined(_backward_call, given), out)


# -- in Python -------------------------------------------------------------------------------------------------

#: The most layouts that have a plan: each takes a kilobyte for as long as the process lives.
_MOST_PLANS = 4096
buckets = np.zeros(_BUCKETS, np.int64)
_plans: dict[tuple[int, ...], np.ndarray] = {}
#: What compiled code and torch have addresses of.
kept: list[Any] = []


@cached()
def _add(plan):
    table, bucket = carray(integers(context()[PLANS]), (_BUCKETS,)), _bucket(plan)
    plan[NEXT] = table[bucket]
    table[bucket] = plan.ctypes.data


def prepare(
    shape: Sequence[int],
    strides: Sequence[int],
    dtypes: tuple[int, int],
    examples: tuple[np.ndarray, np.ndarray],
    follows: int,
    trains: bool,
    records: bool,
) -> bool:
    """Whether such calls are prepared from now on: their kernels are compiled here.

    Of x and the parameters, dtypes are torch's numbers and examples what `step` tells dtypes by.
    """
    ndim, size, channels = len(shape), math.prod(shape), shape[1]
    if ndim > abi.MOST_AXES or size == 0 or (trains and size // channels < 2):
        return False
    steps = step.steps_of(shape, strides, examples[0].itemsize, 1)
    if steps is None or (threads.get_num_threads() > 1 and not sharing.team[sharing.ENTRIES]):
        return False
    new = np.zeros(PLAN, np.int64)
    new[abi.DTYPE], new[WEIGHT_DTYPE] = dtypes
    new[abi.NDIM], new[FOLLOWS], new[SIZE], new[CHANNELS] = ndim, follows, size, channels
    new[abi.SIZES : abi.SIZES + ndim], new[abi.STRIDES : abi.STRIDES + ndim] = shape, strides
    if (plan := _plans.get(key := tuple(new[:_KEY].tolist()))) is None:
        if len(_plans) >= _MOST_PLANS:
            return False
        kept.append(new)
        _add(new)
        plan = _plans[key] = new
    relu, adds = follows & RELU, follows & ADDS
    options = 0 if adds else None, size, channels, 0.0 if relu else -math.inf
    if trains and not plan[TRAIN]:
        plan[TRAIN] = _compiled(_keep_forward, *examples, 0, *options, steps.of_train)
    if not trains and not plan[EVALUATE]:
        plan[EVALUATE] = _compiled(_keep_forward, *examples, None, *options, steps.of_evaluate)
    if records and not plan[DIFFERENTIATE]:
        masks = 0 if relu else None, 0 if relu and adds else None  # without a relu, dy is the residual's gradient
        plan[DIFFERENTIATE] = _compiled(_keep_backward, *examples, *masks, size, channels, steps.of_backward)
    return True


def forget_plans() -> None:
    """Backward passes that are still to come are left to Python then."""
    buckets[:] = 0
    _plans.clear()


def _compiled(keep: Any, *arguments: Any) -> int:
    kernel = np.zeros(64, np.int64)
    keep(kernel, *arguments)
    kept.append(kernel)
    return kernel.ctypes.data
