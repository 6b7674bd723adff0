"""Batch norm as torch's dispatcher calls it: compiled kernels of an operator of torch's, with no Python between.

In a net, each call follows upon a convolution, which fills the caches: then every line of Python waits for memory. What
takes 12 us of Python on its own takes 100 there, and 250 in a training step, more than the kernels.

``aten::cudnn_batch_norm`` has a derivative in C++, which calls ``aten::cudnn_batch_norm_backward``, and torch has no
kernels of them for the CPU. So ours can be there, by torch's stable C interface (torch/csrc/stable/c/shim.h): a layer
is one node of autograd's graph, which torch makes, runs and frees by itself. What the operator's arguments mean here:

- ``running_mean``: a layer's state, int64: `MAGIC`, then what ``_cdata`` says of its running mean and variance;
- ``exponential_average_factor``: `TRAINS` and `RELU`, added up; ``training`` is True, for the derivative's sake;
- the results: y, the rows that `step.train` or `step.evaluate` fills, nothing, y again after a relu.

A kernel here cannot raise. Forward gives no y for whatever is special: a layout that `prepare` has not seen, state of
another length or elsewhere, memory that x shares with it. Backward leaves the special to an operator in Python. Handles
are addresses of ``at::Tensor``, which is a pointer to what ``Tensor._cdata`` gives.
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

from anybn._lock import after_fork
from anybn.kernels.cpu import openmp, sharing, step, threads
from anybn.kernels.cpu.cached import Callback, cached
from anybn.kernels.cpu.primitives import address_of, doubles, integers, invoke, nanoseconds, outlined, pointer
from anybn.kernels.cpu.values import EXACT

MAGIC = 0x616E79626E5F3031
TRAINS, RELU = 1, 2
#: The operator that is registered for backward, and what it leaves the special to, of the same arguments and results.
BACKWARD, RECORDED_BACKWARD = "anybn::batch_norm_backward", "anybn::recorded_batch_norm_backward"
SCHEMA = "(Tensor dy, Tensor x, Tensor weight, Tensor rows, Tensor y, float eps) -> (Tensor, Tensor, Tensor)"

# -- torch's functions, by names of our own ---------------------------------------------------------------------


_SYMBOLS: list[str] = []


def _of_torch(name, *arguments):
    _SYMBOLS.append(name)
    return types.ExternalFunction(f"anybn_{name}", types.int32(*arguments))


_address, _small = types.int64, types.int32
_get_dim = _of_torch("aoti_torch_get_dim", _address, _address)
_get_sizes = _of_torch("aoti_torch_get_sizes", _address, _address)
_get_strides = _of_torch("aoti_torch_get_strides", _address, _address)
_get_dtype = _of_torch("aoti_torch_get_dtype", _address, _address)
_get_device_type = _of_torch("aoti_torch_get_device_type", _address, _address)
_get_data_ptr = _of_torch("aoti_torch_get_data_ptr", _address, _address)
_is_defined = _of_torch("aoti_torch_is_defined", _address, _address)
_delete = _of_torch("aoti_torch_delete_tensor_object", _address)
_new_handle = _of_torch("aoti_torch_new_tensor_handle", _address, _address)
_new_undefined = _of_torch("aoti_torch_new_uninitialized_tensor", _address)
_empty = _of_torch("aoti_torch_empty_strided", _address, _address, _address, _small, _small, _small, _address)
_copy = _of_torch("aoti_torch_copy_", _address, _address, _small)
_call = _of_torch("aoti_torch_call_dispatcher", _address, _address, _address)
_get_num_threads = _of_torch("torch_get_num_threads", _address)
_IN_PARALLEL = "omp_in_parallel"
_in_parallel = _of_torch(_IN_PARALLEL)
_grad_mode = _of_torch("aoti_torch_grad_mode_is_enabled")
_free = _of_torch("_ZdlPv", _address)  # of C++, for what the dispatcher allocated

#: Addresses that compiled code finds under one name: of the buckets of plans, `threads.limit`, `sharing.team` and the
#: names of the operators for backward, ended by 0; and torch's numbers of two dtypes.
PLANS, LIMIT, TEAM, BACKWARD_NAME, RECORDED_NAME, NO_NAME, INT64, FLOAT64, CONTEXT = range(9)
_context_address = address_of("anybn_context")


@njit(**EXACT)
def _context():
    return carray(integers(_context_address()), (CONTEXT,))


# -- plans -----------------------------------------------------------------------------------------------------

_MOST_AXES, _BUCKETS = 5, 1024
#: What a plan is found by: x's dtype, weight's and bias's, whether relu follows, how many axes, sizes, strides.
X_DTYPE, WEIGHT_DTYPE, HAS_RELU, NDIM, SIZES = range(5)
STRIDES = SIZES + _MOST_AXES
KEY = STRIDES + _MOST_AXES
#: What it says: how many values and channels, the addresses of three kernels, 0 for what is not compiled yet, and of
#: the next plan of its bucket.
SIZE, CHANNELS, TRAIN, EVALUATE, BACKWARD_KERNEL, NEXT, PLAN = range(KEY, KEY + 7)


@njit(**EXACT)
def _bucket(key):
    mixed = np.uint64(0)
    for i in range(KEY):
        mixed = (mixed ^ np.uint64(key[i])) * np.uint64(1099511628211)  # FNV-1a, on words
    return np.int64((mixed >> np.uint64(20)) % np.uint64(_BUCKETS))


@njit(**EXACT)
def _plan_at(key):
    """The address of the plan for a key, or 0."""
    buckets = carray(integers(_context()[PLANS]), (_BUCKETS,))
    address = buckets[_bucket(key)]
    while address != 0:
        plan, same = carray(integers(address), (PLAN,)), True
        for i in range(KEY):
            same = same and plan[i] == key[i]
        if same:
            return address
        address = plan[NEXT]
    return 0


# -- tensors ---------------------------------------------------------------------------------------------------


@njit(**EXACT)
def _dtype(handle):
    found = np.zeros(1, np.int64)
    _get_dtype(handle, found.ctypes.data)
    return found[0]


@njit(**EXACT)
def _data(handle):
    """The address of its values on the host; 0 if there is none."""
    found = np.zeros(2, np.int64)
    _get_device_type(handle, found.ctypes.data)
    _get_data_ptr(handle, found[1:].ctypes.data)
    return found[1] if found[0] == 0 else 0


@njit(**EXACT)
def _fill_key(handle, weight_dtype, relu, key):
    """Whether there is a key for x, which is filled."""
    found = np.zeros(3, np.int64)
    for i in range(KEY):
        key[i] = 0
    if (
        _get_dim(handle, found.ctypes.data) != 0
        or found[0] > _MOST_AXES
        or _get_sizes(handle, found[1:].ctypes.data) != 0
        or _get_strides(handle, found[2:].ctypes.data) != 0
    ):
        return False
    ndim = found[0]
    sizes, strides = carray(integers(found[1]), (ndim,)), carray(integers(found[2]), (ndim,))
    key[X_DTYPE], key[WEIGHT_DTYPE], key[HAS_RELU], key[NDIM] = _dtype(handle), weight_dtype, relu, ndim
    for i in range(ndim):
        key[SIZES + i], key[STRIDES + i] = sizes[i], strides[i]
    return True


@njit(**EXACT)
def _like_x(handle, plan):
    """The address of its values, if they lie as those of the plan's x do; else 0."""
    key = np.empty(KEY, np.int64)
    if not _fill_key(handle, plan[WEIGHT_DTYPE], plan[HAS_RELU], key):
        return 0
    for i in range(KEY):
        if key[i] != plan[i]:
            return 0
    return _data(handle)


@njit(**EXACT)
def _contiguous(handle, dtype, rows, columns):
    """The address of its values, if they are so many rows, 0 for a vector, one after the other; else 0."""
    key, ndim = np.empty(KEY, np.int64), 2 if rows else 1
    if not _fill_key(handle, 0, 0, key) or key[X_DTYPE] != dtype or key[NDIM] != ndim:
        return 0
    last = ndim - 1
    if key[SIZES + last] != columns or (columns > 1 and key[STRIDES + last] != 1):
        return 0
    if rows and (key[SIZES] != rows or key[STRIDES] != columns):
        return 0
    return _data(handle)


@njit(**EXACT)
def _new_like_x(plan, out):
    """Whether a tensor could be made there, with x's sizes, strides and dtype."""
    at = plan.ctypes.data
    return _empty(plan[NDIM], at + 8 * SIZES, at + 8 * STRIDES, plan[X_DTYPE], 0, 0, out) == 0


@njit(**EXACT)
def _new_contiguous(dtype, rows, columns, out):
    sizes, strides, ndim = np.array((rows, columns)), np.array((columns, 1)), 2 if rows else 1
    made = _empty(ndim, sizes[2 - ndim :].ctypes.data, strides[2 - ndim :].ctypes.data, dtype, 0, 0, out) == 0
    sizes[0], strides[0] = 0, 0  # Numba frees an array after the last line that names it
    return made


@njit(**EXACT)
def _take(optional):
    """The handle in what the dispatcher gives for ``Tensor?``, or 0."""
    if optional == 0:
        return 0
    handle = carray(integers(optional), (1,))[0]
    _free(optional)
    return handle


@njit(**EXACT)
def _drop(handle):
    if handle != 0:
        _delete(handle)


# -- kernels with their last arguments -------------------------------------------------------------------------

#: What changes from call to call: addresses of values, eps as its bits, who may help, how long OpenMP waited.
X, Y, DY, DX, WEIGHT, BIAS, DWEIGHT, DBIAS, MEAN, VAR, ROWS, ROW_COUNT, EPS, THREADS, OPENMP, WAITED, CALL = range(17)


@njit(**EXACT)
def _hands(call):
    """Fills in who may help, as `sharing.hands` says it; False if that is for Python to say."""
    context, found = _context(), np.zeros(1, np.int64)
    team = carray(integers(context[TEAM]), (2,))
    _get_num_threads(found.ctypes.data)
    call[THREADS] = min(found[0], carray(integers(context[LIMIT]), (1,))[0])
    if call[THREADS] > 1:
        if team[sharing.ENTRY] == 0 or nanoseconds() < team[sharing.CROWDED_UNTIL]:
            return False
        if _in_parallel() != 0:
            call[THREADS] = 1
        else:
            call[OPENMP] = team[sharing.ENTRY]
    return call[THREADS] > 0


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
_backward, _backward_in_parts = njit(**EXACT)(step.backward.py_func), njit(**EXACT)(step.backward_in_parts.py_func)


@njit(**EXACT)
def _forward_arguments(like_x, like_weight, size, channels, floor, count, call):
    """All but the last arguments, with so many rows of statistics; ``inline`` saves a second of compiling."""
    c, rows = carray(integers(call), (CALL,)), carray(doubles(carray(integers(call), (CALL,))[ROWS]), (count, channels))
    arrays = like_x, like_weight, c[X], c[Y], None, c[WEIGHT], c[BIAS], c[MEAN], c[VAR]
    options = size, channels, floor, carray(doubles(call), (CALL,))[EPS], rows, (c[THREADS], c[OPENMP], 0)
    return arrays + options


@njit(**EXACT)
def _backward_arguments(like_x, like_weight, y, size, channels, call):
    c = carray(integers(call), (CALL,))
    rows = carray(doubles(c[ROWS]), (c[ROW_COUNT], channels))
    inputs, outputs = (c[DY], c[X], None if y is None else c[Y]), (c[DX], None)
    options = size, channels, carray(doubles(call), (CALL,))[EPS], rows, (c[THREADS], c[OPENMP], 0)
    return (like_x, like_weight) + inputs + outputs + (c[WEIGHT], c[DWEIGHT], c[DBIAS]) + options


@njit(**EXACT)
def _finish(call, waited):
    carray(integers(call), (CALL,))[WAITED] = waited


@njit(**EXACT)
def _train_call(like_x, like_weight, size, channels, floor, last, call):
    _finish(call, _train(*(_forward_arguments(like_x, like_weight, size, channels, floor, 5, call) + last)))


@njit(**EXACT)
def _train_in_parts_call(like_x, like_weight, size, channels, floor, last, call):
    _finish(call, _train_in_parts(*(_forward_arguments(like_x, like_weight, size, channels, floor, 5, call) + last)))


@njit(**EXACT)
def _evaluate_call(like_x, like_weight, size, channels, floor, last, call):
    _finish(call, _evaluate(*(_forward_arguments(like_x, like_weight, size, channels, floor, 2, call) + last)))


@njit(**EXACT)
def _backward_call(like_x, like_weight, y, size, channels, last, call):
    _finish(call, _backward(*(_backward_arguments(like_x, like_weight, y, size, channels, call) + last)))


@njit(**EXACT)
def _backward_in_parts_call(like_x, like_weight, y, size, channels, last, call):
    _finish(call, _backward_in_parts(*(_backward_arguments(like_x, like_weight, y, size, channels, call) + last)))


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
    """Whether the state, as a tensor, and its statistics are as they are to be; fills their addresses in."""
    address = _contiguous(handle, _context()[INT64], 0, 3)
    if address == 0 or carray(integers(address), (3,))[0] != MAGIC:
        return False
    dtype = _context()[FLOAT64]
    call[MEAN] = _contiguous(address + 8, dtype, 0, channels)
    call[VAR] = _contiguous(address + 16, dtype, 0, channels)
    return call[MEAN] != 0 and call[VAR] != 0


@njit(**EXACT)
def _normalize(x, weight, bias, state, what, eps, results):
    """Forward, or nothing: then the results stay undefined."""
    key, call, trains = np.empty(KEY, np.int64), np.zeros(CALL, np.int64), what & TRAINS
    if bias == 0 or state == 0 or not _fill_key(x, _dtype(weight), what // RELU, key):
        return
    address = _plan_at(key)
    if address == 0:
        return
    plan = carray(integers(address), (PLAN,))
    channels, kernel = plan[CHANNELS], plan[TRAIN] if trains else plan[EVALUATE]
    if kernel == 0 or (_grad_mode() & 1 and plan[BACKWARD_KERNEL] == 0) or not _state(state, channels, call):
        return
    call[X] = _data(x)
    call[WEIGHT] = _contiguous(weight, plan[WEIGHT_DTYPE], 0, channels)
    call[BIAS] = _contiguous(bias, plan[WEIGHT_DTYPE], 0, channels)
    if call[X] == 0 or call[WEIGHT] == 0 or call[BIAS] == 0 or not _hands(call):
        return
    made = np.zeros(2, np.int64)  # y and the rows
    done = False
    if _new_like_x(plan, made.ctypes.data) and _new_contiguous(
        _context()[FLOAT64], 5 if trains else 2, channels, made[1:].ctypes.data
    ):
        call[Y], call[ROWS] = _data(made[0]), _data(made[1])
        carray(doubles(call.ctypes.data), (CALL,))[EPS] = eps
        done = _run(kernel, call)
    if not done:
        _drop(made[0])
        _drop(made[1])
        return
    for i in range(2):
        _delete(results[i])
        results[i] = made[i]
    if what & RELU:
        _delete(results[3])
        _new_handle(made[0], results[3:].ctypes.data)


def _forward(stack, inputs, outputs):
    """``aten::cudnn_batch_norm``"""
    given, numbers = carray(integers(stack), (8,)).copy(), carray(doubles(stack), (8,))
    what, eps, results = np.int64(numbers[6]), numbers[7], carray(integers(stack), (4,))
    for i in range(4):
        _new_undefined(results[i:].ctypes.data)
    for i in range(2, 5):
        given[i] = _take(given[i])
    _normalize(given[0], given[1], given[2], given[3], what, eps, results)
    for i in range(5):
        _drop(given[i])


@njit(**EXACT)
def _differentiate(dy, x, weight, rows, y, eps, made):
    """Backward; False where that is for Python to do."""
    key, call = np.empty(KEY, np.int64), np.zeros(CALL, np.int64)
    is_given = np.zeros(1, np.int64)
    _is_defined(y, is_given.ctypes.data)
    if not _fill_key(x, _dtype(weight), is_given[0], key):
        return False
    address = _plan_at(key)
    if address == 0:
        return False
    plan, float64 = carray(integers(address), (PLAN,)), _context()[FLOAT64]
    channels, dtype = plan[CHANNELS], plan[WEIGHT_DTYPE]
    for count in (2, 5):
        found = _contiguous(rows, float64, count, channels)
        if found != 0:
            call[ROWS], call[ROW_COUNT] = found, count
    call[X], call[DY] = _data(x), _like_x(dy, plan)
    call[WEIGHT] = _contiguous(weight, dtype, 0, channels)
    if is_given[0]:
        call[Y] = _like_x(y, plan)
    if (
        plan[BACKWARD_KERNEL] == 0
        or call[ROWS] == 0
        or call[X] == 0
        or call[WEIGHT] == 0
        or (is_given[0] and call[Y] == 0)
        or not _hands(call)
        or not _new_like_x(plan, made.ctypes.data)
        or not _new_contiguous(dtype, 0, channels, made[1:].ctypes.data)
        or not _new_contiguous(dtype, 0, channels, made[2:].ctypes.data)
    ):
        return False
    call[DX], call[DWEIGHT], call[DBIAS] = _data(made[0]), _data(made[1]), _data(made[2])
    carray(doubles(call.ctypes.data), (CALL,))[EPS] = eps
    copied = np.zeros(1, np.int64)
    if call[DY] == 0 and _new_like_x(plan, copied.ctypes.data) and _copy(copied[0], dy, 0) == 0:
        call[DY] = _data(copied[0])
    done = call[DY] != 0 and _run(plan[BACKWARD_KERNEL], call)
    _drop(copied[0])
    return done


@njit(**EXACT)
def _leave_to(name, given):
    """What an operator of `SCHEMA` makes of these arguments comes in their place; it takes the handles over.

    Where it raises, gradients of no values come, with which autograd raises an error in turn.
    """
    context = _context()
    if _call(context[name], context[NO_NAME], given.ctypes.data) != 0:
        for i in range(3):
            given[i] = 0
            _new_contiguous(context[FLOAT64], 0, 0, given[i:].ctypes.data)


def _backward_kernel(stack, inputs, outputs):
    """`BACKWARD`"""
    given, results = carray(integers(stack), (6,)).copy(), carray(integers(stack), (3,))
    made, eps = np.zeros(3, np.int64), carray(doubles(stack), (6,))[5]
    if _differentiate(given[0], given[1], given[2], given[3], given[4], eps, made):
        for i in range(5):
            _delete(given[i])
        _copy_words(made, results)
    else:
        for i in range(3):
            _drop(made[i])
        _leave_to(RECORDED_NAME, given)
        _copy_words(given[:3], results)


def _backward_of_cudnn(stack, inputs, outputs):
    """``aten::cudnn_batch_norm_backward``, before autograd: which is to see the operations where it records them."""
    given, results = carray(integers(stack), (9,)).copy(), carray(integers(stack), (3,))
    for i in range(3, 7):
        given[i] = _take(given[i])
    for i in (3, 4, 6):
        _drop(given[i])
    if given[5] == 0:
        _new_undefined(given[5:].ctypes.data)
    passed = np.array((given[1], given[0], given[2], given[5], given[8], given[7]))
    _leave_to(RECORDED_NAME if _grad_mode() & 1 else BACKWARD_NAME, passed)
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
    steps, channels, size = step.steps_of(shape, strides, examples[0].itemsize, 1), shape[1], math.prod(shape)
    if steps is None or len(shape) > _MOST_AXES or size == 0 or (trains and size // channels < 2):
        return False
    threads.get_num_threads()
    new = np.zeros(PLAN, np.int64)
    new[X_DTYPE], new[WEIGHT_DTYPE], new[HAS_RELU], new[NDIM], new[SIZE] = *dtypes, relu, len(shape), size
    new[SIZES : SIZES + len(shape)], new[STRIDES : STRIDES + len(shape)], new[CHANNELS] = shape, strides, channels
    if (plan := _plans.get(key := tuple(new[:KEY].tolist()))) is None:
        if len(_plans) >= _MOST_PLANS:
            return False
        _add(new)
        plan = _plans[key] = new
    options = size, channels, 0.0 if relu else -math.inf
    if trains and not plan[TRAIN]:
        keep = _keep_train if steps.train is step.train else _keep_train_in_parts
        plan[TRAIN] = _compiled(keep, *examples, *options, steps.of_train)
    if not trains and not plan[EVALUATE]:
        plan[EVALUATE] = _compiled(_keep_evaluate, *examples, *options, steps.of_evaluate)
    if records and not plan[BACKWARD_KERNEL]:
        y = 0 if relu else None
        keep = _keep_backward if steps.backward is step.backward else _keep_backward_in_parts
        plan[BACKWARD_KERNEL] = _compiled(keep, *examples, y, *options[:2], steps.of_backward)
    return True


def _compiled(keep: Any, *arguments: Any) -> int:
    kernel = np.zeros(64, np.int64)
    keep(kernel, *arguments)
    _kept.append(kernel)
    return kernel.ctypes.data


def install(library: ctypes.CDLL, dtypes: tuple[int, int]) -> bool:
    """Register the kernels with torch, whose library and numbers of int64 and float64 these are. False, with nothing
    done, where torch lacks something: its OpenMP threads, a function. `BACKWARD` and what it leaves to Python have to
    be defined before."""
    if (its := openmp.team()) is None or not all(hasattr(library, name) for name in _SYMBOLS if name != _IN_PARALLEL):
        return False
    for name in _SYMBOLS:
        function = its.in_parallel if name == _IN_PARALLEL else library[name]
        llvm.add_symbol(f"anybn_{name}", ctypes.cast(function, ctypes.c_void_p).value)
    context = np.zeros(CONTEXT, np.int64)
    names = [np.frombuffer(name.encode() + b"\0", np.uint8) for name in (BACKWARD, RECORDED_BACKWARD, "")]
    held = (_buckets, threads.limit, sharing.team, *names)
    context[: len(held)], context[INT64], context[FLOAT64] = [a.ctypes.data for a in held], *dtypes
    llvm.add_symbol("anybn_context", context.ctypes.data)
    sharing.team[sharing.ENTRY] = its.parallel
    _kept.extend((context, *names))
    _register(library, "aten", "CPU", "cudnn_batch_norm", _forward)
    _register(library, "aten", "AutogradCPU", "cudnn_batch_norm_backward", _backward_of_cudnn)
    _register(library, *BACKWARD.split("::")[:1], "CPU", BACKWARD.split("::")[1], _backward_kernel)
    return True


def _register(library: ctypes.CDLL, namespace: str, key: str, name: str, function: Any) -> None:
    callback, registry = Callback(function, 3), ctypes.c_void_p()
    _kept.append(callback)
    failed = library.aoti_torch_library_init_impl(
        namespace.encode(), key.encode(), __file__.encode(), 0, ctypes.byref(registry)
    ) or library.aoti_torch_library_impl(registry, name.encode(), ctypes.c_void_p(callback.address))
    if failed:
        raise RuntimeError(f"torch does not take a kernel of {namespace}::{name} for {key}")


@after_fork
def _leave_team() -> None:
    sharing.team[sharing.ENTRY] = 0  # whose threads are the parent's
