"""NumPy's kernels on the memory of torch tensors, without copies."""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from anybn import _settings
from anybn._lock import undisturbed
from anybn.backends.numpy import kernels
from anybn.core.call import Call, Gradients, Statistics, Update
from anybn.core.formulas import Over
from anybn.kernels.cpu.plan import row_plan_of

#: As kernels see them: 16-bit numbers as their bits.
DTYPES = {getattr(torch, name): np.dtype(bits) for name, (_, bits, _) in _settings.DTYPES.items()}
_SEEN = DTYPES | {torch.bool: np.dtype(bool)}


@functools.cache
def steps() -> Any:
    """`anybn.kernels.cpu.step`, or None without Numba; imported with the first tensor."""
    if not kernels().__name__.endswith(".operations"):
        return None
    return undisturbed(functools.partial(importlib.import_module, "anybn.kernels.cpu.step"))


@functools.cache
def examples() -> dict[torch.dtype, np.ndarray]:
    """Empty arrays of the dtypes that the compiled steps know on this processor, by which they tell dtypes apart."""
    return {dtype: np.empty(0, seen) for dtype, seen in DTYPES.items() if kernels().supports(np.dtype(seen))}


NO_MEMORY = "has no memory: its storage was freed, as FSDP does between the passes; gather it first"


def supports(x: torch.Tensor) -> bool:
    return x.dtype in DTYPES and not x.is_neg() and bool(kernels().supports(DTYPES[x.dtype]))


def takes_mask(call: Call) -> bool:
    """Whether there are kernels for the call's mask."""
    return bool(kernels().takes(Call(_view(call.x), call.spec, mask=_view(call.mask))))


def batch_statistics(call: Call) -> Statistics:
    return _from_views(kernels().batch_statistics(Call(_view(call.x), call.spec, mask=_view(call.mask))))


def train(call: Call) -> tuple[torch.Tensor, Statistics, None]:
    if step := _step(call, call.residual, call.out):
        y, rows = _destination(call), np.empty((5, call.x.shape[call.spec.axis]))
        if _run(step.plan.train, step, call, y, (None, None), rows, step.plan.of_train):
            return y, statistics_of_rows(rows, call.x), None
    y, statistics, _ = kernels().train(_in_views(call))
    return _delivered(y, call), _from_views(statistics), None


def evaluate(call: Call, statistics: Statistics) -> torch.Tensor:
    if statistics.shift is None and (step := _step(call, call.residual, call.out)):
        mean, var = (a.detach().double().contiguous() for a in (statistics.mean, statistics.var))
        y = _destination(call)
        running = mean.data_ptr(), var.data_ptr()
        if _run(steps().evaluate, step, call, y, running, np.empty((2, len(mean))), step.plan.of_evaluate):
            return y
    return _delivered(kernels().evaluate(_in_views(call), _views(statistics)), call)


class _Step(NamedTuple):
    """How compiled steps do a call."""

    plan: Any
    example: np.ndarray
    parameter_example: np.ndarray


def _step(call: Call, *others: torch.Tensor | None) -> _Step | None:
    """None if compiled steps do not take the call's arrays, or the others, which are to lie like x, as they lie."""
    x, spec, weight, bias = call[:4]
    parameter = bias if weight is None else weight
    example = examples().get(x.dtype)
    parameter_example = example if parameter is None else examples().get(parameter.dtype)
    if (
        example is None
        or parameter_example is None
        or call.mask is not None
        or steps() is None
        or (plan := steps().steps_of(x.shape, x.stride(), example.itemsize, spec.axis)) is None
        or not lies_like(x, x)
        or not all(a is None or lies_like(x, a) for a in others)
        or not (weight is None or lies_like(parameter, weight))
        or not (bias is None or lies_like(parameter, bias))
        or not (parameter is None or (parameter.shape == (x.shape[spec.axis],) and parameter.is_contiguous()))
    ):
        return None
    return _Step(plan, example, parameter_example)


def _run(
    function: Any, step: _Step, call: Call, y: torch.Tensor, running: tuple[Any, Any], rows: np.ndarray, last: Any
) -> bool:
    """False, with nothing done, if x lies on weight, bias or the running statistics."""
    x, spec, weight, bias, residual = call[:5]
    arrays = (*(None if a is None else a.data_ptr() for a in (x, y, residual, weight, bias)), *running)
    options = (x.numel(), x.shape[spec.axis], 0.0 if spec.relu else -math.inf, spec.eps, rows, step.plan.hands())
    waited = function(None, None, step.example, step.parameter_example, *arrays, *options, *last)
    steps().note_wait(waited)
    return bool(waited >= 0)


def _destination(call: Call) -> torch.Tensor:
    return torch.empty_like(call.x) if call.out is None else call.out


def statistics_of_rows(rows: np.ndarray | torch.Tensor, x: torch.Tensor) -> Statistics:
    """Of the rows mean, shift, var and m2 of the batch, or mean and var of the running ones, as steps leave them."""
    tensors = torch.from_numpy(rows) if isinstance(rows, np.ndarray) else rows
    if len(tensors) == 2:
        return Statistics(None, tensors[0], None, tensors[1])
    mean, shift, var, m2 = tensors[:4]
    return Statistics(x.numel() // len(mean), mean, shift if x.dtype is torch.float64 else None, var, m2)


def updated_running_statistics(update: Update, statistics: Statistics) -> tuple[torch.Tensor, torch.Tensor]:
    mean, var, batch = _float64(update.running_mean), _float64(update.running_var), _views(statistics)
    if not len(mean) == len(var) == len(batch.mean):
        raise ValueError(
            f"running_mean has {len(mean)} values and running_var {len(var)}, but the batch has {len(batch.mean)} "
            "channels: they must be as many"
        )
    mean, var = kernels().updated_running_statistics(Update(mean, var, *update[2:]), batch)
    return torch.from_numpy(mean), torch.from_numpy(var)


def gradients(
    call: Call,
    statistics: Statistics,
    dy: torch.Tensor,
    active: torch.Tensor | None,
    wants_residual: bool,
    over: Over | None = None,
) -> Gradients:
    """See `anybn.core.formulas.gradients`; active may be y itself, after a relu."""
    rows = None if over is not None or call.mask is not None else _rows_of(statistics, call.x)
    if rows is not None and (active is None or active.dtype is call.x.dtype):
        found = gradients_in_one_step(call, rows, dy, active, wants_residual)
        if found is not None:
            return found
    views = Call(_view(call.x), call.spec, _numbers(call.weight), mask=_view(call.mask))
    masked = wants_residual and not (active is None and call.mask is None)
    dx, dweight, dbias, found = kernels().gradients(views, _views(statistics), _view(dy), _view(active), masked, over)
    dx, dresidual = _tensor(dx, call.x.dtype), dy if wants_residual else None
    if masked:
        dresidual = _tensor(found, dy.dtype)
    return Gradients(dx, *_parameter_gradients(call, dweight, dbias), dresidual)


def _parameter_gradients(call: Call, dweight: Any, dbias: Any) -> tuple[Any, Any]:
    weight, bias = call.weight, call.bias
    return (
        None if weight is None else torch.from_numpy(dweight).to(weight.dtype),
        None if bias is None else torch.from_numpy(dbias).to(bias.dtype),
    )


def gradients_in_one_step(
    call: Call, statistics: np.ndarray, dy: torch.Tensor, y: torch.Tensor | None, wants_residual: bool
) -> Gradients | None:
    """`gradients` where a compiled step went forward, whose rows of statistics these are; None if dy lies otherwise."""
    x, spec, weight, bias = call[:4]
    if (step := _step(call, dy, y)) is None:
        return None
    masked = wants_residual and y is not None
    dx, dmasked = torch.empty_like(x), torch.empty_like(x) if masked else None
    dweight = None if weight is None else torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    steps().note_wait(
        step.plan.backward(
            None,
            step.example,
            step.parameter_example,
            dy.data_ptr(),
            x.data_ptr(),
            None if y is None else y.data_ptr(),
            dx.data_ptr(),
            None if dmasked is None else dmasked.data_ptr(),
            None if weight is None else weight.data_ptr(),
            None if dweight is None else dweight.data_ptr(),
            None if dbias is None else dbias.data_ptr(),
            x.numel(),
            x.shape[spec.axis],
            spec.eps,
            statistics,
            step.plan.hands(),
            *step.plan.of_backward,
        )
    )
    return Gradients(dx, dweight, dbias, dmasked if masked or not wants_residual else dy)


def _rows_of(statistics: Statistics, x: torch.Tensor) -> np.ndarray | None:
    """What steps leave, without m2, which the backward pass does not read; None if they leave no such statistics."""
    count, mean, shift, var = statistics[:4]
    if count is None:
        return None if shift is not None else np.stack((_float64(mean), _float64(var)))
    if count * len(mean) != x.numel():
        return None
    rows = np.zeros((5, len(mean)))
    rows[0], rows[2] = _float64(mean), _float64(var)
    if shift is not None:
        rows[1] = _float64(shift)
    return rows


def lies_like(like: Any, a: torch.Tensor) -> bool:
    """Whether a's values lie in memory of its own as like's do, as many and of one dtype; like has no gaps."""
    return (
        (type(a) is torch.Tensor or type(a) is torch.nn.Parameter)
        and a.dtype is like.dtype
        and a.shape == like.shape
        and a.stride() == like.stride()
        and a.is_cpu
        and not a.is_neg()
        and a.data_ptr() != 0
    )


def takes_rows(call: Call) -> bool:
    """Whether `normalize_rows` takes such a call."""
    rows = kernels().row_kernels
    return rows is not None and bool(rows.takes(call))


def are_plain(arrays: Iterable[torch.Tensor | None]) -> bool:
    """Whether these, but for None, are of torch's own types and of dtypes that compiled calls know, and lie in memory
    of their own. Of those on a device, there is none."""
    known = examples()
    for a in arrays:
        if a is not None and not (
            (type(a) is torch.Tensor or type(a) is torch.nn.Parameter)
            and a.dtype in known
            and a.is_cpu
            and a.layout is torch.strided
            and not a.is_nested
            and not a.is_neg()
            and a.data_ptr() != 0
        ):
            return False
    return True


def normalize_rows(call: Call) -> tuple[torch.Tensor, Statistics]:
    y, statistics = kernels().row_kernels.normalize(_in_views(call))
    return _tensor(y, call.x.dtype), _from_views(statistics)


def normalize_plain_rows(call: Call) -> tuple[torch.Tensor, np.ndarray] | None:
    """y and what `statistics_of_rows` takes; None, with nothing done, if the arrays do not lie in order."""
    if (examples := _row_examples(call)) is None:
        return None
    x, spec, weight, bias = call[:4]
    rows, plan = kernels().row_kernels, row_plan_of(spec, x.itemsize, weight is not None or bias is not None)
    y, found = _empty_like(x), np.empty((5, plan.rows[0]))
    addresses = [None if a is None else a.data_ptr() for a in (x, y, weight, bias)]
    how = x.numel(), spec.values, spec.centered, spec.eps, plan.parameters, plan.copies, plan.length // plan.copies
    waited = rows.normalize_at(*examples, *addresses, *how, found, rows.hands_for(plan.rows), plan.rows)
    rows.note_wait(waited)
    return y, found


def row_gradients(call: Call, statistics: Statistics, dy: torch.Tensor) -> Gradients:
    grads = kernels().row_kernels.gradients(_in_views(call), _views(statistics), _view(dy))
    return Gradients(_tensor(grads.x, call.x.dtype), *_parameter_gradients(call, grads.weight, grads.bias), None)


def plain_row_gradients(call: Call, statistics: np.ndarray, dy: torch.Tensor) -> Gradients | None:
    """`row_gradients` after `normalize_plain_rows`, or None as there."""
    if (examples := _row_examples(call, dy)) is None:
        return None
    x, spec, weight, bias = call[:4]
    rows, plan = kernels().row_kernels, row_plan_of(spec, x.itemsize, weight is not None or bias is not None)
    dx, dweight, dbias = _empty_like(x), *(None if a is None else torch.empty_like(a) for a in (weight, bias))
    addresses = [None if a is None else a.data_ptr() for a in (dy, x, dx, weight, dweight, dbias)]
    copies, partial = plan.backward_copies, np.empty((2, plan.parts, plan.parameters))
    how = x.numel(), spec.values, spec.centered, spec.eps, plan.parameters, copies, plan.length // copies
    of_parts = statistics, partial, plan.samples, rows.hands_for(plan.tasks), plan.tasks
    rows.note_wait(rows.differentiate_at(*examples, *addresses, *how, *of_parts))
    return Gradients(dx, dweight, dbias, None)


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    """NumPy asks for large pages from 4 MB on, as torch does not: 50 MB of results take a third of the time."""
    return _tensor(np.empty(x.shape, DTYPES[x.dtype]), x.dtype) if x.nbytes >= 1 << 22 else torch.empty_like(x)


def _row_examples(call: Call, dy: torch.Tensor | None = None) -> tuple[np.ndarray, np.ndarray] | None:
    """What stands for the dtypes of x and of the parameters, if plain arrays, of which dy is like x, lie in order."""
    x, _, weight, bias = call[:4]
    given = bias if weight is None else weight
    dtype = x.dtype if given is None else given.dtype
    in_order = x.is_contiguous() and (dy is None or (dy.is_contiguous() and dy.dtype is x.dtype))
    for a in (weight, bias):
        in_order = in_order and (a is None or (a.is_contiguous() and a.dtype is dtype))
    return (examples()[x.dtype], examples()[dtype]) if in_order else None


class _Memory(ctypes.c_char * (1 << 62)):  # type: ignore[misc] # an array type is a class
    """What lies behind an address, and the tensor that keeps it there."""

    tensor: torch.Tensor


def view(a: torch.Tensor) -> np.ndarray:
    """The tensor's memory as a NumPy array; 16 bits as they are.

    By its address: after ``Tensor.numpy`` nobody can resize the storage any more, as FSDP does with parameters.
    """
    if a.is_neg():
        a = a.detach().resolve_neg()
    address, dtype = a.data_ptr(), _SEEN[a.dtype]
    if not address and a.numel():
        raise ValueError(f"a tensor of shape {tuple(a.shape)} {NO_MEMORY}")
    memory = _Memory.from_address(address)
    memory.tensor = a
    if a.is_contiguous():
        return np.ndarray(a.shape, dtype, memory)
    return np.ndarray(a.shape, dtype, memory, 0, [stride * dtype.itemsize for stride in a.stride()])


def _view(a: torch.Tensor | None) -> Any:
    return None if a is None else view(a)


def _numbers(a: torch.Tensor | None) -> Any:
    """The values of weight or bias: bits are for x and what is like it, and no numbers."""
    if a is None:
        return None
    return view(a if a.dtype is torch.float32 or a.dtype is torch.float64 else a.detach().float())


def _float64(a: torch.Tensor | None) -> Any:
    """The values of statistics, in the one dtype of them for which there are kernels."""
    if a is None:
        return None
    return view(a if a.dtype is torch.float64 else a.detach().double())


def _tensor(a: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The tensor over an array that `_view` could have given."""
    t = torch.from_numpy(a)
    return t if t.dtype is dtype else t.view(dtype)


def _in_views(call: Call) -> Call:
    """The call as kernels take it; without out where that is lazily negated, whose memory has the other sign."""
    x, spec, weight, bias, residual, mask, _, _, out = call
    target = None if out is None or out.is_neg() else _view(out)
    return Call(_view(x), spec, _numbers(weight), _numbers(bias), _view(residual), _view(mask), None, None, target)


def _delivered(y: np.ndarray, call: Call) -> torch.Tensor:
    out, dtype = call.out, call.x.dtype
    if out is None:
        return _tensor(y, dtype)
    return out.copy_(_tensor(y, dtype)) if out.is_neg() else out


def _views(statistics: Statistics) -> Statistics:
    count = statistics.count
    if isinstance(count, torch.Tensor):
        count = count.numpy()  # ours alone
    return Statistics(count, *map(_float64, statistics[1:]))


def _from_views(statistics: Statistics) -> Statistics:
    shift = None if statistics.shift is None else torch.from_numpy(statistics.shift)
    mean, var, m2 = map(torch.from_numpy, (statistics.mean, statistics.var, statistics.m2))
    count = statistics.count
    if not isinstance(count, int):  # of a mask
        count = torch.from_numpy(np.asarray(count))
    return Statistics(count, mean, shift, var, m2)
