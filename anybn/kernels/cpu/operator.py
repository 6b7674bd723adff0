"""Batch norm as torch's dispatcher calls it: compiled kernels of operators of torch's, with no Python between.

In a net, each call follows upon a convolution, which fills the caches: then every line of Python waits for memory, and
all of a call's take longer than its kernels.

torch has operators with a derivative in C++ and no kernel for the CPU. So ours can be there: a layer is one node of
autograd's graph, which torch makes, runs and frees by itself.

``aten::cudnn_batch_norm`` takes a layer without a residual. What its arguments mean here:

- ``running_mean, running_var``: what they say, where nothing is recorded. Autograd would keep them, and they change:
  elsewhere, the first is a layer's state, int64: see `WHAT` and the words after it;
- ``exponential_average_factor``: what the state's first word is, with `TRAINS` and `RELUS` added; ``training`` is True,
  for the derivative's sake;
- the results: y, y again after a relu, nothing, the rows that `step.train` or `step.evaluate` fills, unless an
  evaluation is not recorded. The derivative keeps the last three; it copies the last, which has to be there, where the
  graph is to be used again.

``aten::_scaled_dot_product_efficient_attention``, whose derivative is of four tensors, takes one with a residual:

- ``query, key, value, attn_bias``: x, residual, weight, bias;
- ``compute_log_sumexp, is_causal, dropout_p``: whether it trains, whether a relu follows, eps;
- ``scale``: a NaN whose lower bits are the address of the state's words, which no other caller has;
- the results: y, the rows, nothing, nothing. The derivative keeps them, and all that is given.

A kernel here cannot raise. Forward gives no y for whatever is special: a layout that `prepared` has not seen, state of
another length or elsewhere, memory that x shares with it. Backward leaves the special to an operator in Python.

What the words of a state say, `learn` reads as well, which folds a batch into the running statistics: cold, a call
through Python that asks three tensors for their addresses takes twice as long.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import ctypes

import llvmlite.binding as llvm
import numpy as np
from numba import carray, njit
from numba.core.config import DISABLE_JIT

from anybn._lock import after_fork
from anybn.kernels.cpu import openmp, prepared, sharing, step, threads
from anybn.kernels.cpu import torch_abi as abi
from anybn.kernels.cpu.cached import Callback, cached
from anybn.kernels.cpu.prepared import CALL, PLAN, context
from anybn.kernels.cpu.primitives import doubles, integers
from anybn.kernels.cpu.values import EXACT, KERNEL

#: The words of a state: `OURS` with the numbers of axes that x may have; and what ``_cdata`` says of the running mean,
#: the variance and the count of batches, 0 for none.
WHAT, MEAN_AT, VAR_AT, BATCHES_AT, STATE = range(5)
#: What nobody else has for a factor. The eight bits below are `TRAINS`, `RELUS` and from `RANKS` on, one for each
#: number of axes.
OURS, TRAINS, RELUS, RANKS = 0x616E79626E00, 1, 2, 2
#: What is above an address, of 48 bits, in the NaN that stands for it.
NAN = 0xFFF8
#: Operators in the namespace anybn: backward, and what it leaves the special to, of the same arguments and results,
#: which are dx, weight's and bias's gradient, and the residual's if one was added.
BACKWARD, RECORDED_BACKWARD = "batch_norm_backward", "recorded_batch_norm_backward"
SCHEMA = (
    "(Tensor dy, Tensor x, Tensor weight, Tensor rows, Tensor? y, bool adds, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


# -- forward ---------------------------------------------------------------------------------------------------


@njit(**EXACT)
def _normalize(x, residual, weight, bias, mean, var, what, trains, relu, eps, made):
    """Whether y and the rows are made, as they are to be."""
    follows = (prepared.RELU if relu else 0) + (prepared.ADDS if residual else 0)
    given = bias != 0 and mean != 0 and var != 0 and what >> 8 == OURS >> 8
    address = prepared.plan_at(x, weight, follows) if given else 0
    if address == 0:
        return False
    plan, call = carray(integers(address), (PLAN,)), np.zeros(CALL, np.int64)
    channels, dtype = plan[prepared.CHANNELS], plan[prepared.WEIGHT_DTYPE]
    kernel, records = plan[prepared.TRAIN] if trains else plan[prepared.EVALUATE], abi.grad_mode()
    call[prepared.X], call[prepared.RESIDUAL] = abi.data_of(x), abi.data_in(residual, plan) if residual else 0
    call[prepared.WEIGHT] = abi.data_in_order(weight, dtype, 0, channels)
    call[prepared.BIAS] = abi.data_in_order(bias, dtype, 0, channels)
    call[prepared.MEAN] = abi.data_in_order(mean, context()[prepared.FLOAT64], 0, channels)
    call[prepared.VAR] = abi.data_in_order(var, context()[prepared.FLOAT64], 0, channels)
    carray(doubles(call.ctypes.data), (CALL,))[prepared.EPS] = eps
    if (
        kernel == 0
        or (what >> RANKS >> plan[abi.NDIM]) & 1 == 0
        or (plan[prepared.DIFFERENTIATE] == 0 and records)
        or call[prepared.X] == 0
        or (residual and call[prepared.RESIDUAL] == 0)
        or call[prepared.WEIGHT] == 0
        or call[prepared.BIAS] == 0
        or call[prepared.MEAN] == 0
        or call[prepared.VAR] == 0
        or not abi.new_in(plan, made.ctypes.data)
    ):
        return False
    if trains or records:  # else nobody reads the rows
        if not abi.new_in_order(context()[prepared.FLOAT64], 5 if trains else 2, channels, made[1:].ctypes.data):
            return False
        call[prepared.ROWS] = abi.data_of(made[1])
    call[prepared.Y] = abi.data_of(made[0])
    return prepared.run(kernel, call)


@njit(**EXACT)
def _give(stack, made, done, at_rows):
    """Leaves y and the rows as results of four, and tensors that are undefined in the other places, or in all."""
    results = carray(integers(stack), (4,))
    for i in range(4):
        abi.new_undefined(results[i:].ctypes.data)
    for i, at in ((0, 0), (1, at_rows)):
        if done and made[i] != 0:
            abi.delete(results[at])
            results[at] = made[i]
        else:
            abi.drop(made[i])


def _forward(stack, _inputs, _outputs):
    """``aten::cudnn_batch_norm``"""
    given, numbers, made = carray(integers(stack), (8,)).copy(), carray(doubles(stack), (8,)), np.zeros(2, np.int64)
    what, eps = np.int64(numbers[6]), numbers[7]
    for i in range(2, 5):
        given[i] = abi.take(given[i])
    mean, var = given[3], given[4]
    if mean != 0 and var == 0:
        state = abi.data_in_order(mean, context()[prepared.INT64], 0, STATE)
        mean, var = (state + 8 * MEAN_AT, state + 8 * VAR_AT) if state != 0 else (0, 0)
    done = _normalize(given[0], 0, given[1], given[2], mean, var, what, what & TRAINS, what & RELUS, eps, made)
    _give(stack, made, done, 3)
    if done and what & RELUS:
        y_again = carray(integers(stack), (4,))[1:]
        abi.delete(y_again[0])
        abi.new_handle(made[0], y_again.ctypes.data)
    for i in range(5):
        abi.drop(given[i])


def _forward_adding(stack, _inputs, _outputs):
    """``aten::_scaled_dot_product_efficient_attention``"""
    given, eps, made = carray(integers(stack), (8,)).copy(), carray(doubles(stack), (8,))[5], np.zeros(2, np.int64)
    given[3], scale = abi.take(given[3]), np.uint64(abi.take(given[7]))
    state = np.int64(scale & np.uint64((1 << 48) - 1)) if scale >> np.uint64(48) == np.uint64(NAN) else 0
    what = carray(integers(state), (STATE,))[WHAT] if state != 0 else 0
    arrays = given[0], given[1], given[2], given[3], state + 8 * MEAN_AT, state + 8 * VAR_AT
    done = _normalize(*arrays, what, given[4] & 1, given[6] & 1, eps, made)
    _give(stack, made, done, 1)
    for i in range(4):
        abi.drop(given[i])


@cached(**KERNEL)
def learn(state, rows, size, momentum):
    """Fold the statistics of x, of so many values, which forward left at the address rows, into those of the state
    whose words are at this address. Whether it could be done. See `step.update`."""
    words, mean = carray(integers(state), (STATE,)), np.empty(abi.LAYOUT, np.int64)
    if words[BATCHES_AT] == 0 or not abi.describe(state + 8 * MEAN_AT, mean):
        return False
    channels, float64 = mean[abi.SIZES], context()[prepared.FLOAT64]
    mean_at = abi.data_in_order(state + 8 * MEAN_AT, float64, 0, channels)
    var_at = abi.data_in_order(state + 8 * VAR_AT, float64, 0, channels)
    batches_at = abi.data_of_number(state + 8 * BATCHES_AT, context()[prepared.INT64])
    if mean_at == 0 or var_at == 0 or batches_at == 0:
        return False
    like_x = np.empty(0)  # of float64: forward leaves a shift of 0 for others
    return step.update(like_x, rows, channels, size // channels, momentum, mean_at, var_at, batches_at)


# -- backward --------------------------------------------------------------------------------------------------


@njit(**EXACT)
def _differentiate(dy, x, weight, rows, y, adds, eps, made):
    """Whether the gradients are made, as they are to be."""
    address = prepared.plan_at(x, weight, (prepared.RELU if y else 0) + (prepared.ADDS if adds else 0))
    if address == 0:
        return False
    plan, call, float64 = carray(integers(address), (PLAN,)), np.zeros(CALL, np.int64), context()[prepared.FLOAT64]
    channels, dtype = plan[prepared.CHANNELS], plan[prepared.WEIGHT_DTYPE]
    call[prepared.ROW_COUNT], call[prepared.ROWS] = 5, abi.data_in_order(rows, float64, 5, channels)
    if call[prepared.ROWS] == 0:
        call[prepared.ROW_COUNT], call[prepared.ROWS] = 2, abi.data_in_order(rows, float64, 2, channels)
    call[prepared.X], call[prepared.DY] = abi.data_of(x), abi.data_in(dy, plan)
    call[prepared.Y] = abi.data_in(y, plan) if y != 0 else 0
    call[prepared.WEIGHT] = abi.data_in_order(weight, dtype, 0, channels)
    carray(doubles(call.ctypes.data), (CALL,))[prepared.EPS] = eps
    if (
        plan[prepared.DIFFERENTIATE] == 0
        or call[prepared.X] == 0
        or call[prepared.ROWS] == 0
        or call[prepared.WEIGHT] == 0
        or (y != 0 and call[prepared.Y] == 0)
        or not abi.new_in(plan, made.ctypes.data)
        or not abi.new_in_order(dtype, 0, channels, made[1:].ctypes.data)
        or not abi.new_in_order(dtype, 0, channels, made[2:].ctypes.data)
    ):
        return False
    if y == 0 or not adds:  # then it is the residual's gradient
        abi.new_handle(dy, made[3:].ctypes.data)
    elif abi.new_in(plan, made[3:].ctypes.data):
        call[prepared.DRESIDUAL] = abi.data_of(made[3])
    else:
        return False
    call[prepared.DX] = abi.data_of(made[0])
    call[prepared.DWEIGHT], call[prepared.DBIAS] = abi.data_of(made[1]), abi.data_of(made[2])
    copied = np.zeros(1, np.int64)
    if call[prepared.DY] == 0 and abi.new_in(plan, copied.ctypes.data) and abi.copy(copied[0], dy, 0) == 0:
        call[prepared.DY] = abi.data_of(copied[0])
    done = call[prepared.DY] != 0 and prepared.run(plan[prepared.DIFFERENTIATE], call)
    abi.drop(copied[0])
    return done


@njit(**EXACT)
def _leave_to(name, given):
    """What an operator of `SCHEMA` makes of these arguments comes in their place; it takes the handles over.

    Where it raises, gradients of no values come, with which autograd raises an error in turn.
    """
    if abi.call_dispatcher(context()[name], context()[prepared.NO_NAME], given.ctypes.data) != 0:
        for i in range(4):
            abi.new_in_order(context()[prepared.FLOAT64], 0, 0, given[i:].ctypes.data)


def _backward(stack, _inputs, _outputs):
    """`BACKWARD`"""
    given, made = carray(integers(stack), (7,)).copy(), np.zeros(4, np.int64)
    eps, given[4] = carray(doubles(stack), (7,))[6], abi.take(given[4])
    if _differentiate(given[0], given[1], given[2], given[3], given[4], given[5] & 1, eps, made):
        for i in range(5):
            abi.drop(given[i])
    else:
        for i in range(4):
            abi.drop(made[i])
        given[4] = abi.as_optional(given[4])
        _leave_to(prepared.RECORDED_NAME, given)
        prepared.copy_words(given, made)
    prepared.copy_words(made, carray(integers(stack), (4,)))


@njit(**EXACT)
def _gradients(dy, x, weight, rows, y, adds, eps):
    """Before autograd, which is to see the operations where it records them. Takes the handles over."""
    given = np.array((dy, x, weight, rows, abi.as_optional(y), adds, eps))
    _leave_to(prepared.RECORDED_NAME if abi.grad_mode() else prepared.BACKWARD_NAME, given)
    return given


def _backward_of_forward(stack, _inputs, _outputs):
    """``aten::cudnn_batch_norm_backward``"""
    given, results = carray(integers(stack), (9,)).copy(), carray(integers(stack), (3,))
    for i in range(3, 7):
        given[i] = abi.take(given[i])
    for i in (3, 4, 6):
        abi.drop(given[i])
    found = _gradients(given[1], given[0], given[2], given[8], abi.defined(given[5]), 0, given[7])
    abi.drop(found[3])
    prepared.copy_words(found, results)


def _backward_of_forward_adding(stack, _inputs, _outputs):
    """``aten::_scaled_dot_product_efficient_attention_backward``"""
    given, results = carray(integers(stack), (13,)).copy(), carray(integers(stack), (4,))
    abi.take(given[12])
    abi.delete_list(given[10])
    for i in (2, 4, 7, 8):
        abi.drop(given[i])
    relu, dy = given[11] & 1, abi.defined(given[0])
    if dy == 0:  # no gradient comes from what was made of y; the derivative of cuDNN's asks for that by itself
        for i in (1, 3, 5, 6):
            abi.drop(given[i])
        for i in range(4):
            abi.new_undefined(results[i:].ctypes.data)
        return
    if not relu:
        abi.drop(given[5])
    found = _gradients(dy, given[1], given[3], given[6], given[5] if relu else 0, 1, given[9])
    results[0], results[1], results[2], results[3] = found[0], found[3], found[1], found[2]


# -- in Python -------------------------------------------------------------------------------------------------

#: Of each operator: its namespace, for which of the dispatcher's keys, its name and our kernel.
_KERNELS = (
    ("aten", "CPU", "cudnn_batch_norm", _forward),
    ("aten", "AutogradCPU", "cudnn_batch_norm_backward", _backward_of_forward),
    ("aten", "CPU", "_scaled_dot_product_efficient_attention", _forward_adding),
    ("aten", "AutogradCPU", "_scaled_dot_product_efficient_attention_backward", _backward_of_forward_adding),
    ("anybn", "CPU", BACKWARD, _backward),
)


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
    held: list[np.ndarray] = [prepared.buckets, threads.limit, sharing.team, *names]
    addresses = np.array([a.ctypes.data for a in held] + list(dtypes), np.int64)
    sharing.team[sharing.ENTRIES] = team.entries.ctypes.data
    llvm.add_symbol("anybn_context", addresses.ctypes.data)
    llvm.add_symbol("anybn_in_parallel", ctypes.cast(team.in_parallel, ctypes.c_void_p).value)
    prepared.kept.extend((addresses, *names))
    for namespace, key, name, function in _KERNELS:
        kernel, registry = Callback(function), ctypes.c_void_p()
        prepared.kept.append(kernel)
        library.aoti_torch_library_init_impl(
            namespace.encode(), key.encode(), __file__.encode(), 0, ctypes.byref(registry)
        )
        library.aoti_torch_library_impl(registry, name.encode(), ctypes.c_void_p(kernel.address))
    return True


@after_fork
def _leave_team() -> None:
    """OpenMP's threads are the parent's: on more than one, the child's calls go through Python, which has others."""
    sharing.team[sharing.ENTRIES] = 0
    prepared.forget_plans()
