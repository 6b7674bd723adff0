"""Batch norm as torch's dispatcher calls it: compiled kernels of an operator of torch's, with no Python between.

In a net, each call follows upon a convolution, which fills the caches: then every line of Python waits for memory. What
takes 12 us of Python on its own takes 100 there, and 250 in a training step, more than the kernels.

``aten::cudnn_batch_norm`` has a derivative in C++, which calls ``aten::cudnn_batch_norm_backward``, and torch has no
kernels of them for the CPU. So ours can be there: a layer is one node of autograd's graph, which torch makes, runs and
frees by itself. What the operator's arguments mean here:

- ``running_mean``: a layer's state, int64: `MAGIC`, then what ``_cdata`` says of its running mean and variance;
- ``exponential_average_factor``: `TRAINS` and `RELU`, added up; ``training`` is True, for the derivative's sake;
- the results: y, y again after a relu, nothing, the rows that `step.train` or `step.evaluate` fills. The derivative
  keeps the last three; it copies the last, which has to be there, where the graph is to be used again.

A kernel here cannot raise. Forward gives no y for whatever is special: a layout that `prepare` has not seen, state of
another length or elsewhere, memory that x shares with it. Backward leaves the special to an operator in Python.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from numba import carray, njit, types
from numba.core.config import DISABLE_JIT

from anybn._lock import after_fork
from anybn.kernels.cpu import openmp, sharing, step, threads
from anybn.kernels.cpu import torch_abi as abi
from anybn.kernels.cpu.cached import Callback, cached
from anybn.kernels.cpu.primitives import address_of, doubles, integers, invoke, nanoseconds, outlined, pointer
from anybn.kernels.cpu.values import EXACT, if_given

MAGIC = 0x616E79626E5F3031
TRAINS, RELU = 1, 2
#: Operators in the namespace anybn: backward, and what it leaves the special to, of the same arguments and results.
BACKWARD, RECORDED_BACKWARD = "batch_norm_backward", "recorded_batch_norm_backward"
SCHEMA = "(Tensor dy, Tensor x, Tensor weight, Tensor rows, Tensor? y, float eps) -> (Tensor, Tensor, Tensor)"

#: Addresses that compiled code finds under one name: of the buckets of plans, `threads.limit`, `sharing.team` and the
#: names of the operators for backward, ended by 0; and torch's numbers of two dtypes.
PLANS, LIMIT, TEAM, BACKWARD_NAME, RECORDED_NAME, NO_NAME, INT64, FLOAT64, CONTEXT = range(9)
_context_address, _in_parallel = address_of("anybn_context"), types.ExternalFunction("anybn_in_parallel", types.int32())


@njit(**EXACT)
def _context():
    return carray(integers(_context_address()), (CONTEXT,))


# -- plans -----------------------------------------------------------------------------------------------------

_BUCKETS = 1024
#: What a plan is found by, after x's layout: the dtype of weight and bias, and whether relu follows. What it says: how
#: many values and channels, the addresses of three kernels, 0 for what is not compiled yet, and of the next plan of its
#: bucket.
WEIGHT_DTYPE, HAS_RELU, SIZE, CHANNELS, TRAIN, EVALUATE, DIFFERENTIATE, NEXT, PLAN = range(abi.LAYOUT, abi.LAYOUT + 9)
_KEY = SIZE


@njit(**EXACT)
def _bucket(key):
    mixed = np.uint64(0)
    for i in range(_KEY):
        mixed = (mixed ^ np.uint64(key[i])) * np.uint64(1099511628211)  # FNV-1a, on words
    return np.int64((mixed >> np.uint64(20)) % np.uint64(_BUCKETS))


@njit(**EXACT)
def _plan_at(x, weight, relu):
    """The address of the plan for these handles, or 0."""
    key, found = np.zeros(_KEY, np.int64), 0
    if abi.describe(x, key):
        key[WEIGHT_DTYPE], key[HAS_RELU] = abi.dtype_of(weight), relu
        address = carray(integers(_context()[PLANS]), (_BUCKETS,))[_bucket(key)]
        while address != 0 and found == 0:
            plan, found = carray(integers(address), (PLAN,)), address
            for i in range(_KEY):
                if plan[i] != key[i]:
                    found = 0
            address = plan[NEXT]
    return found


# -- kernels with their last arguments -------------------------------------------------------------------------

#: What changes from call to call: addresses of values, eps as its bits, who may help, how long OpenMP waited.
X, Y, DY, DX, WEIGHT, BIAS, DWEIGHT, DBIAS, MEAN, VAR, ROWS, ROW_COUNT, EPS, THREADS, OPENMP, WAITED, CALL = range(17)


@njit(**EXACT)
def _hands(call):
    """Fills in who may help, as `sharing.hands` says it; but nobody where that says our pool, which Python starts."""
    team, limit = carray(integers(_context()[TEAM]), (2,)), carray(integers(_context()[LIMIT]), (1,))
    call[THREADS] = min(abi.num_threads(), limit[0])
    if call[THREADS] > 1:
        if team[sharing.ENTRIES] == 0 or nanoseconds() < team[sharing.CROWDED_UNTIL] or _in_parallel() != 0:
            call[THREADS] = 1
        else:
            call[OPENMP] = team[sharing.ENTRIES]


@njit(**EXACT)
def _run(kernel, call):
    """Whether the kernel at this address, as `_kept` leaves it, did the call."""
    function, words = carray(integers(kernel), (2,))
    last = carray(integers(kernel + 16), (words,)).copy()
    last[words - 1], call[WAITED] = call.ctypes.data, -1
    invoke(function, last.ctypes.data)
    last[0] = 0  # Numba frees an array after the last line that names it
    waited = call[WAITED]
    if waited > sharing.CROWDED:
        team = carray(integers(_context()[TEAM]), (2,))
        team[sharing.CROWDED_UNTIL] = nanoseconds() + sharing.REST * waited
    return waited >= 0


_train, _train_in_parts = njit(**EXACT)(step.train.py_func), njit(**EXACT)(step.train_in_parts.py_func)
_evaluate = njit(**EXACT)(step.evaluate.py_func)
_gradients = njit(**EXACT)(step.backward.py_func)
_gradients_in_parts = njit(**EXACT)(step.backward_in_parts.py_func)


@njit(**EXACT)
def _forward_arguments(like_x, like_weight, size, channels, floor, count, call):
    """All but the last arguments, with so many rows of statistics."""
    c, numbers = carray(integers(call), (CALL,)), carray(doubles(call), (CALL,))
    rows, hands = carray(doubles(c[ROWS]), (count, channels)), (c[THREADS], c[OPENMP], 0)
    arrays = like_x, like_weight, c[X], c[Y], None, c[WEIGHT], c[BIAS], c[MEAN], c[VAR]
    return (*arrays, size, channels, floor, numbers[EPS], rows, hands)


@njit(**EXACT)
def _backward_arguments(like_x, like_weight, y, size, channels, call):
    c, numbers = carray(integers(call), (CALL,)), carray(doubles(call), (CALL,))
    rows, hands = carray(doubles(c[ROWS]), (c[ROW_COUNT], channels)), (c[THREADS], c[OPENMP], 0)
    arrays = like_x, like_weight, c[DY], c[X], if_given(y, c[Y]), c[DX], None, c[WEIGHT], c[DWEIGHT], c[DBIAS]
    return (*arrays, size, channels, numbers[EPS], rows, hands)


@njit(**EXACT)
def _finish(call, waited):
    carray(integers(call), (CALL,))[WAITED] = waited


@njit(**EXACT)
def _train_call(like_x, like_weight, size, channels, floor, last, call):
    given = _forward_arguments(like_x, like_weight, size, channels, floor, 5, call)
    _finish(call, _train(None, *(given + last)))


@njit(**EXACT)
def _train_in_parts_call(like_x, like_weight, size, channels, floor, last, call):
    given = _forward_arguments(like_x, like_weight, size, channels, floor, 5, call)
    _finish(call, _train_in_parts(None, *(given + last)))


@njit(**EXACT)
def _evaluate_call(like_x, like_weight, size, channels, floor, last, call):
    _finish(call, _evaluate(*(_forward_arguments(like_x, like_weight, size, channels, floor, 2, call) + last)))


@njit(**EXACT)
def _backward_call(like_x, like_weight, y, size, channels, last, call):
    _finish(call, _gradients(*(_backward_arguments(like_x, like_weight, y, size, channels, call) + last)))


@njit(**EXACT)
def _backward_in_parts_call(like_x, like_weight, y, size, channels, last, call):
    _finish(call, _gradients_in_parts(*(_backward_arguments(like_x, like_weight, y, size, channels, call) + last)))


@njit(**EXACT)
def _copy_words(source, to):  # ``to[:] = source`` takes half a second to compile
    for i in range(len(source)):
        to[i] = source[i]


@njit(**EXACT)
def _keep(function, data, size, out):
    words, out[0], out[1] = carray(integers(data), (size // 8,)), function, size // 8
    _copy_words(words, out[2:])


@njit(**EXACT)
def _bare(like):
    """The array without what counts who uses it, which ends with the call that it was given to."""
    return carray(pointer(like, like.ctypes.data), (0,))


@cached()
def _keep_train(out, like_x, like_weight, size, channels, floor, last):
    """Leaves in out what `_run` takes the address of."""
    given = _bare(like_x), _bare(like_weight), size, channels, floor, last, 0
    _keep(*outlined(_train_call, given), out)


@cached()
def _keep_train_in_parts(out, like_x, like_weight, size, channels, floor, last):
    given = _bare(like_x), _bare(like_weight), size, channels, floor, last, 0
    _keep(*outlined(_train_in_parts_call, given), out)


@cached()
def _keep_evaluate(out, like_x, like_weight, size, channels, floor, last):
    given = _bare(like_x), _bare(like_weight), size, channels, floor, last, 0
    _keep(*outlined(_evaluate_call, given), out)


@cached()
def _keep_backward(out, like_x, like_weight, y, size, channels, last):
    given = _bare(like_x), _bare(like_weight), y, size, channels, last, 0
    _keep(*outlined(_backward_call, given), out)


@cached()
def _keep_backward_in_parts(out, like_x, like_weight, y, size, channels, last):
    given = _bare(like_x), _bare(like_weight), y, size, channels, last, 0
    _keep(*outlined(_backward_in_parts_call, given), out)


# -- the operators ---------------------------------------------------------------------------------------------


@njit(**EXACT)
def _state(handle, channels, call):
    """Whether the state and its statistics are as they are to be; fills their addresses in."""
    address = abi.data_in_order(handle, _context()[INT64], 0, 3)
    if address == 0 or carray(integers(address), (3,))[0] != MAGIC:
        return False
    dtype = _context()[FLOAT64]
    call[MEAN] = abi.data_in_order(address + 8, dtype, 0, channels)
    call[VAR] = abi.data_in_order(address + 16, dtype, 0, channels)
    return call[MEAN] != 0 and call[VAR] != 0


@njit(**EXACT)
def _normalize(x, weight, bias, state, what, eps, made):
    """Whether y and the rows are made, as they are to be."""
    address = _plan_at(x, weight, what // RELU) if bias != 0 and state != 0 else 0
    if address == 0:
        return False
    plan, call, trains = carray(integers(address), (PLAN,)), np.zeros(CALL, np.int64), what & TRAINS
    channels, kernel = plan[CHANNELS], plan[TRAIN] if trains else plan[EVALUATE]
    call[X] = abi.data_of(x)
    call[WEIGHT] = abi.data_in_order(weight, plan[WEIGHT_DTYPE], 0, channels)
    call[BIAS] = abi.data_in_order(bias, plan[WEIGHT_DTYPE], 0, channels)
    carray(doubles(call.ctypes.data), (CALL,))[EPS] = eps
    if (
        kernel == 0
        or (plan[DIFFERENTIATE] == 0 and abi.grad_mode())
        or call[X] == 0
        or call[WEIGHT] == 0
        or call[BIAS] == 0
        or not _state(state, channels, call)
        or not abi.new_in(plan, made.ctypes.data)
        or not abi.new_in_order(_context()[FLOAT64], 5 if trains else 2, channels, made[1:].ctypes.data)
    ):
        return False
    call[Y], call[ROWS] = abi.data_of(made[0]), abi.data_of(made[1])
    _hands(call)
    return _run(kernel, call)


def _forward(stack, _inputs, _outputs):
    """``aten::cudnn_batch_norm``"""
    given, numbers = carray(integers(stack), (8,)).copy(), carray(doubles(stack), (8,))
    what, eps, results = np.int64(numbers[6]), numbers[7], carray(integers(stack), (4,))
    for i in range(4):
        abi.new_undefined(results[i:].ctypes.data)
    for i in range(2, 5):
        given[i] = abi.take(given[i])
    made = np.zeros(2, np.int64)
    if _normalize(given[0], given[1], given[2], given[3], what, eps, made):
        abi.delete(results[0])
        abi.delete(results[3])
        results[0], results[3] = made[0], made[1]
        if what & RELU:
            abi.delete(results[1])
            abi.new_handle(made[0], results[1:].ctypes.data)
    else:
        abi.drop(made[0])
        abi.drop(made[1])
    for i in range(5):
        abi.drop(given[i])


@njit(**EXACT)
def _differentiate(dy, x, weight, rows, y, eps, made):
    """Whether dx, dweight and dbias are made, as they are to be."""
    address = _plan_at(x, weight, y != 0)
    if address == 0:
        return False
    plan, call, float64 = carray(integers(address), (PLAN,)), np.zeros(CALL, np.int64), _context()[FLOAT64]
    channels, dtype = plan[CHANNELS], plan[WEIGHT_DTYPE]
    call[ROW_COUNT], call[ROWS] = 5, abi.data_in_order(rows, float64, 5, channels)
    if call[ROWS] == 0:
        call[ROW_COUNT], call[ROWS] = 2, abi.data_in_order(rows, float64, 2, channels)
    call[X], call[DY] = abi.data_of(x), abi.data_in(dy, plan)
    call[Y] = abi.data_in(y, plan) if y != 0 else 0
    call[WEIGHT] = abi.data_in_order(weight, dtype, 0, channels)
    carray(doubles(call.ctypes.data), (CALL,))[EPS] = eps
    if (
        plan[DIFFERENTIATE] == 0
        or call[X] == 0
        or call[ROWS] == 0
        or call[WEIGHT] == 0
        or (y != 0 and call[Y] == 0)
        or not abi.new_in(plan, made.ctypes.data)
        or not abi.new_in_order(dtype, 0, channels, made[1:].ctypes.data)
        or not abi.new_in_order(dtype, 0, channels, made[2:].ctypes.data)
    ):
        return False
    call[DX], call[DWEIGHT], call[DBIAS] = abi.data_of(made[0]), abi.data_of(made[1]), abi.data_of(made[2])
    copied = np.zeros(1, np.int64)
    if call[DY] == 0 and abi.new_in(plan, copied.ctypes.data) and abi.copy(copied[0], dy, 0) == 0:
        call[DY] = abi.data_of(copied[0])
    _hands(call)
    done = call[DY] != 0 and _run(plan[DIFFERENTIATE], call)
    abi.drop(copied[0])
    return done


@njit(**EXACT)
def _leave_to(name, given):
    """What an operator of `SCHEMA` makes of these arguments comes in their place; it takes the handles over.

    Where it raises, gradients of no values come, with which autograd raises an error in turn.
    """
    context = _context()
    if abi.call_dispatcher(context[name], context[NO_NAME], given.ctypes.data) != 0:
        for i in range(3):
            abi.new_in_order(context[FLOAT64], 0, 0, given[i:].ctypes.data)


def _backward(stack, _inputs, _outputs):
    """`BACKWARD`"""
    given, results = carray(integers(stack), (6,)).copy(), carray(integers(stack), (3,))
    made, eps, given[4] = np.zeros(3, np.int64), carray(doubles(stack), (6,))[5], abi.take(given[4])
    if _differentiate(given[0], given[1], given[2], given[3], given[4], eps, made):
        for i in range(5):
            abi.drop(given[i])
    else:
        for i in range(3):
            abi.drop(made[i])
        given[4] = abi.as_optional(given[4])
        _leave_to(RECORDED_NAME, given)
        _copy_words(given[:3], made)
    _copy_words(made, results)


def _backward_of_cudnn(stack, _inputs, _outputs):
    """``aten::cudnn_batch_norm_backward``, before autograd: which is to see the operations where it records them."""
    given, results = carray(integers(stack), (9,)).copy(), carray(integers(stack), (3,))
    for i in range(3, 7):
        given[i] = abi.take(given[i])
    for i in (3, 4, 6):
        abi.drop(given[i])
    y = abi.as_optional(abi.defined(given[5]))
    passed = np.array((given[1], given[0], given[2], given[8], y, given[7]))
    _leave_to(RECORDED_NAME if abi.grad_mode() else BACKWARD_NAME, passed)
    _copy_words(passed[:3], results)


# -- in Python -------------------------------------------------------------------------------------------------

#: The most layouts that have a plan: each takes a kilobyte for as long as the process lives.
_MOST_PLANS = 4096
_buckets = np.zeros(_BUCKETS, np.int64)
_plans: dict[tuple[int, ...], np.ndarray] = {}
#: What compiled code and torch have addresses of.
_kept: list[Any] = []


@cached()
def _add(plan):
    buckets, bucket = carray(integers(_context()[PLANS]), (_BUCKETS,)), _bucket(plan)
    plan[NEXT] = buckets[bucket]
    buckets[bucket] = plan.ctypes.data


def prepare(
    shape: Sequence[int],
    strides: Sequence[int],
    dtypes: tuple[int, int],
    examples: tuple[np.ndarray, np.ndarray],
    relu: bool,
    trains: bool,
    records: bool,
) -> bool:
    """Whether the operator takes such calls, from now on: its kernels are compiled here.

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
    new[abi.NDIM], new[HAS_RELU], new[SIZE], new[CHANNELS] = ndim, relu, size, channels
    new[abi.SIZES : abi.SIZES + ndim], new[abi.STRIDES : abi.STRIDES + ndim] = shape, strides
    if (plan := _plans.get(key := tuple(new[:_KEY].tolist()))) is None:
        if len(_plans) >= _MOST_PLANS:
            return False
        _kept.append(new)
        _add(new)
        plan = _plans[key] = new
    options = (*examples, size, channels, 0.0 if relu else -math.inf)
    if trains and not plan[TRAIN]:
        keep = _keep_train if steps.train is step.train else _keep_train_in_parts
        plan[TRAIN] = _compiled(keep, *options, steps.of_train)
    if not trains and not plan[EVALUATE]:
        plan[EVALUATE] = _compiled(_keep_evaluate, *options, steps.of_evaluate)
    if records and not plan[DIFFERENTIATE]:
        keep = _keep_backward if steps.backward is step.backward else _keep_backward_in_parts
        plan[DIFFERENTIATE] = _compiled(keep, *examples, 0 if relu else None, size, channels, steps.of_backward)
    return True


def forget_plans() -> None:
    """Backward passes that are still to come are left to Python then."""
    _buckets[:] = 0
    _plans.clear()


def _compiled(keep: Any, *arguments: Any) -> int:
    kernel = np.zeros(64, np.int64)
    keep(kernel, *arguments)
    _kept.append(kernel)
    return kernel.ctypes.data


def install(library: ctypes.CDLL, dtypes: tuple[int, int]) -> bool:
    """Register the kernels with torch, whose library and numbers of int64 and float64 these are; False, with nothing
    done, where it lacks something. `BACKWARD` and `RECORDED_BACKWARD` have to be defined before."""
    team = openmp.team()
    if team is None or DISABLE_JIT or not abi.declare(library):
        return False
    names = [
        np.frombuffer(name.encode() + b"\0", np.uint8)
        for name in (f"anybn::{BACKWARD}", f"anybn::{RECORDED_BACKWARD}", "")
    ]
    held: list[np.ndarray] = [_buckets, threads.limit, sharing.team, *names]
    context = np.array([a.ctypes.data for a in held] + list(dtypes), np.int64)
    sharing.team[sharing.ENTRIES] = team.entries.ctypes.data
    llvm.add_symbol("anybn_context", context.ctypes.data)
    llvm.add_symbol("anybn_in_parallel", team.in_parallel_at)
    _kept.extend((context, *names))
    kernels = (
        (b"aten", b"CPU", b"cudnn_batch_norm", Callback(_forward, 3)),
        (b"aten", b"AutogradCPU", b"cudnn_batch_norm_backward", Callback(_backward_of_cudnn, 3)),
        (b"anybn", b"CPU", BACKWARD.encode(), Callback(_backward, 3)),
    )
    _kept.extend(kernels)
    for namespace, key, name, kernel in kernels:
        registry = ctypes.c_void_p()
        library.aoti_torch_library_init_impl(namespace, key, __file__.encode(), 0, ctypes.byref(registry))
        library.aoti_torch_library_impl(registry, name, ctypes.c_void_p(kernel.address))
    return True


@after_fork
def _leave_team() -> None:
    """OpenMP's threads are the parent's: on more than one, the child's calls go through Python, which has others."""
    sharing.team[sharing.ENTRIES] = 0
    forget_plans()
