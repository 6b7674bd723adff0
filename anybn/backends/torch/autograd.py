"""What torch's autograd sees: batch norm as one node of its graph, whose backward pass is differentiable too."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch._C import (  # there is no public way to ask
    _are_functorch_transforms_active,
    _is_tracing,
    _len_torch_dispatch_stack,
)
from torch._C import _functorch as functorch
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction  # Function minus its checks for torch.func, which take 1.4 us
from torch.compiler import is_compiling

from anybn.backends.torch import cpu
from anybn.core import formulas
from anybn.core.call import Call, Gradients, RowSpec, Spec, Statistics

_NO_DISPATCH = torch.Tensor.__torch_dispatch__


def op_by_op() -> bool:
    """True where torch has to see each operation: forward-mode differentiation, torch.func, tracing and exporting, and
    modes that take operations one at a time, fake tensors among them. The core serves them all."""
    return is_compiling() or op_by_op_here()


def op_by_op_here() -> bool:
    """`op_by_op` where nothing is being compiled."""
    return (
        forward_ad._current_level >= 0
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack() > 0
        or _is_tracing()
    )


def dispatches(*arrays: Any) -> bool:
    """True if one of these tensors takes torch's operations into its own hands, as DTensor does: what lies behind it
    may lie anywhere."""
    for a in arrays:
        cls = type(a)
        if a is None or cls is torch.Tensor or cls is torch.nn.Parameter:  # as most are
            continue
        if getattr(cls, "__torch_dispatch__", _NO_DISPATCH) is not _NO_DISPATCH:
            return True
    return False


def has_no_memory(dy: torch.Tensor) -> bool:
    """Whether a gradient is many at a time, for ``is_grads_batched`` and its like, or torch's notion of zeros."""
    return functorch.is_legacy_batchedtensor(dy) or dy._is_zerotensor()


def in_torch_func() -> bool:
    return _are_functorch_transforms_active()


def unwrapped(x: torch.Tensor) -> torch.Tensor:
    """The values under torch.func's derivatives; a batched tensor only if vmap is among what is under way."""
    while in_torch_func() and functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    return x


class Recorded(_SingleLevelFunction):
    """y, computed already, as one node of the graph: it keeps x and C values, none of the core's temporaries.

    The statistics are this call's own, whatever the state does before the backward pass. Under ``create_graph`` the
    backward pass is recorded op by op, with the batch statistics computed from x again, which makes it differentiable
    to any order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        computed: tuple[torch.Tensor, Statistics | np.ndarray],
        backend: Any,
        spec: Spec,
        mask: torch.Tensor | None = None,
        group: Any = None,
    ) -> torch.Tensor:
        # y comes in a tuple: so autograd takes it for this function's own, which may be written to in place.
        y, ctx.statistics = computed
        ctx.save_for_backward(x, weight, mask, y if spec.relu else None)
        ctx.call = backend, spec, group, bias  # whose values the backward pass does not read: they may change
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mask, y = ctx.saved_tensors
        statistics, wants, (backend, spec, group, bias) = ctx.statistics, ctx.needs_input_grad, ctx.call
        call, grads = Call(x, spec, weight, bias, None, mask, group), None
        if isinstance(statistics, np.ndarray):
            if not torch.is_grad_enabled() and not has_no_memory(dy):
                grads = cpu.gradients_in_one_step(call, statistics, dy, y, wants[3])
            if grads is None:
                statistics = cpu.statistics_of_rows(statistics, x)
        if grads is None:
            grads = differentiated(backend, call, statistics, dy, y, wants[3])
        return grads.x, grads.weight, grads.bias, grads.residual, None, None, None, None, None


class RecordedRows(torch.autograd.Function):
    """`Recorded` for `Backend.normalize_rows`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        computed: tuple[torch.Tensor, Statistics],
        backend: Any,
        spec: RowSpec,
    ) -> torch.Tensor:
        y, ctx.statistics = computed
        ctx.save_for_backward(x, weight, bias)
        ctx.backend, ctx.spec = backend, spec
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, weight, bias), backend, statistics, spec = ctx.saved_tensors, ctx.backend, ctx.statistics, ctx.spec
        if torch.is_grad_enabled():
            rows = formulas.in_rows(backend.namespace(x), x, spec)
            statistics = backend.statistics(Call(rows, Spec(1, spec.eps)))
        grads = backend.row_gradients(Call(x, spec, weight, bias), statistics, dy)
        return grads.x, grads.weight, grads.bias, None, None, None


class Summed(torch.autograd.Function):
    """The sum over a group. What every member gets depends on all of them, so its derivative is the same sum."""

    @staticmethod
    def forward(array: torch.Tensor, group: Any) -> torch.Tensor:
        return group.all_reduce_sum(array)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, Any], output: torch.Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return Summed.apply(dy, ctx.group), None


def differentiated(
    backend: Any,
    call: Call,
    statistics: Statistics,
    dy: torch.Tensor,
    active: torch.Tensor | None,
    wants_residual: bool,
) -> Gradients:
    """The gradients in a backward pass, differentiable themselves where it is recorded."""
    if call.group is not None and is_compiling():  # a call of backward in a compiled function
        eagerly = torch.compiler.disable(differentiated)  # see `eagerly` in `anybn.torch.compiled`
        return eagerly(backend, call, statistics, dy, active, wants_residual)
    if torch.is_grad_enabled() and active is not None:
        active = active > 0
    if torch.is_grad_enabled() and statistics.count is not None and (call.group is not None or call.x.numel()):
        statistics = backend.statistics(call)
    return backend.gradients(call, statistics, dy, active, wants_residual)
