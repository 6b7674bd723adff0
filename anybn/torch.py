"""For users of torch: batch norm as ``nn.Module``s with torch's names, and whole models converted to them.

What works with torch's modules works with these: autocast, DataParallel, ``torch.func``, forward-mode and double
backward, ``torch.compile(fullgraph=True)``, ``torch.export``, ``torch.jit.trace``, fake tensors. Where they differ:

- Running statistics are float64 where the device has it, and ``half()`` leaves them so.
- A channel whose batch has a NaN or an infinity keeps its running statistics.
- A forward pass inside a backward pass is taken for recomputation (activation checkpointing): it counts no batch.
- They are ``anybn.batch_norm``: correctly rounded, with its checks and its words for what is wrong.

``torch.compile`` ends its graph at a batch norm that trains over a group, or inside `anybn.accumulate`: these run
outside of it, in the order of the program, and ``fullgraph=True`` refuses them.

What does not work is an error: ``torch.jit.script`` and ``torch.export(strict=True)``, which cannot read this code; a
second derivative through what ``torch.compile`` has compiled, which torch refuses for everything; ``torch.func.vmap``
in training over buffers that are not batched. CUDA graphs need a step that does not wait for the device: it is written
so, and has not run on one.

>>> import torch, anybn.torch
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
>>> anybn.torch.convert(model)[1]
BatchNorm1d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import empty_like, is_grad_enabled
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from anybn import _accumulate, _checks, _functional, _fuse, _state, _torch_ops, distributed
from anybn._core import Spec, Statistics, Update
from anybn._dispatch import backend_for
from anybn._module_state import ModuleState
from anybn.backends import _torch_cpu
from anybn.backends._torch_cuda import TorchArrays
from anybn.backends._torch_cuda import at_once as at_once_on_cuda
from anybn.backends.numpy import kernels
from anybn.backends.torch import TorchBackend, differentiated, op_by_op

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "convert", "revert"]


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """What the three have in common; a subclass of torch's class, so that what looks for batch norms finds these."""

    _ranks: ClassVar[tuple[int, ...]]
    _shapes: ClassVar[str]
    activation: str | None = None
    group: Any = None
    _buffers: dict[str, Any]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        group: Any = None,
        **options: bool,
    ):
        _checks.num_features(num_features)
        _checks.eps(eps)
        _checks.momentum(momentum)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.activation = _checks.choice("activation", activation, (None, "relu"))
        self.group = None if group is None else distributed.as_group(group)
        _set_running_dtype(self, lambda buffer: _running_dtype(buffer.device))

    def forward(
        self, input: torch.Tensor, residual: torch.Tensor | None = None, activation: str | None = None
    ) -> torch.Tensor:
        """y, as `anybn.batch_norm` gives it.

        Args:
            input: of the shape this class is for, float16, bfloat16, float32 or float64, on the module's device.
            residual: input's shape and dtype, added before the activation.
            activation: None, which leaves it to the module's, or "relu".

        Returns y in input's dtype and memory format. Raises TypeError or ValueError for anything else, with the buffers
        as they were; StateError in torch.func.vmap if the buffers would have to become batched and are not.
        """
        activation = activation or self.activation
        if is_compiling():
            return _torch_ops.forward(self, input, residual, activation)
        alone = self.group is None and id(self) not in _accumulate.blocks
        y = _at_once(self, input, residual, activation) if alone else None
        if y is None:
            try:
                self._check_input_dim(input)
            except Exception as error:
                _functional.tell(input, ModuleState(self), self.training, self.group, error)
                raise
            options = {"residual": residual, "activation": activation, "group": self.group}
            y = _functional.batch_norm(input, ModuleState(self), training=self.training, **options)
        return y

    def _check_input_dim(self, input: Any) -> None:
        if not isinstance(input, torch.Tensor):
            backend_for(input)
        if input.ndim not in self._ranks:
            advice = ": for one sample use x[None]" if input.ndim == self._ranks[0] - 1 else ""
            raise ValueError(f"x has shape {tuple(input.shape)}; {type(self).__name__} needs {self._shapes}{advice}")

    @property
    def state(self) -> ModuleState:
        """The live `BatchNormState` of this module's own tensors: what either side writes, the other reads."""
        return ModuleState(self)

    def extra_repr(self) -> str:
        activation = f", activation={self.activation!r}" if self.activation else ""
        return super().extra_repr() + activation + (f", group={self.group}" if self.group is not None else "")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """The running statistics go where fn leads, but keep their precision: ``half()`` would make them useless."""
        running = {name: self._buffers.pop(name) for name in ("running_mean", "running_var") if name in self._buffers}
        try:
            super()._apply(fn, recurse)
            running = {name: None if buffer is None else _moved(buffer, fn) for name, buffer in running.items()}
        finally:
            self._buffers = running | self._buffers
        return self


_TORCH = TorchBackend()
_FLOAT32, _FLOAT64 = torch.float32, torch.float64

#: Bytes of x up to which a call is made in one piece: more are worth a second thread.
_SMALL = 1 << 18


@functools.cache
def _steps() -> Any:
    """`anybn.backends._step`, or None without Numba; imported with the first small tensor."""
    return importlib.import_module("anybn.backends._step") if kernels().__name__.endswith("_fused") else None


@functools.cache
def _likes() -> dict[torch.dtype, np.ndarray]:
    """Arrays that stand for the dtypes that the compiled steps know on this processor."""
    return {dtype: np.empty(0, seen) for dtype, seen in _torch_cpu.DTYPES.items() if kernels().supports(np.dtype(seen))}


def _dense(a: Any) -> bool:
    return type(a) is torch.Tensor and a.layout is torch.strided and not a.is_nested


def _plain(a: torch.Tensor | None, dtype: torch.dtype, count: int) -> bool:
    """Whether a is nothing, or lies in the CPU's memory as so many values of dtype without gaps."""
    return a is None or (a.is_cpu and a.dtype is dtype and a.numel() == count and a.is_contiguous())


def _at_once(
    module: _BatchNorm, x: torch.Tensor, residual: torch.Tensor | None, activation: str | None
) -> torch.Tensor | None:
    """A module's forward pass by the CPU's kernels, at once; None for what is special or wrong.

    On (8, 16) it is Python that takes the time, 5 us, and autograd 3 more: what is not needed here is left out.
    """
    if not _dense(x) or type(backend_for(x)) is not TorchBackend or op_by_op():
        return None
    kernels_there = _TORCH._kernels_on(x.device)
    if isinstance(kernels_there, TorchArrays) and activation in (None, "relu"):
        return at_once_on_cuda(kernels_there, module, x, residual, activation is not None, _TORCH.recomputes())
    steps, parameters, buffers = _steps(), module._parameters, module._buffers
    try:
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    except KeyError:  # parametrized, or a replica of DataParallel
        return None
    shape, dtype, channels, eps = x.shape, x.dtype, module.num_features, module.eps
    if len(shape) not in module._ranks or shape[1] != channels or channels < 2:  # one channel can be a negated view
        return None
    of_batch, size, kept = module.training or mean is None, x.numel(), _FLOAT32 if weight is None else weight.dtype
    likes = _likes()
    like, like_weight = likes.get(dtype), likes.get(kept)
    if not (
        like is not None
        and like_weight is not None
        and size > 0
        and steps is not None
        and (mean is None) is (var is None)
        and eps > 0
        and (activation is None or activation == "relu")
        and x.is_cpu
        and _plain(weight, kept, channels)
        and _plain(bias, kept, channels)
        and _plain(mean, _FLOAT64, channels)
        and _plain(var, _FLOAT64, channels)
        and (residual is None or (_dense(residual) and residual.shape == shape and residual.dtype is dtype))
        and (residual is None or residual.is_cpu)
    ):
        return None
    momentum, commits = module.momentum, False
    if of_batch:
        if size // channels < 2 or not (momentum is None or 0 <= momentum <= 1):
            return None
        commits = mean is not None and module.track_running_stats and not _TORCH.recomputes()
        if commits and not (type(batches) is torch.Tensor and _plain(batches, torch.int64, 1)):
            return None
    call = _Call(
        x, residual, weight, bias, mean, var, batches, of_batch, commits, eps, momentum, activation is not None
    )
    small = size * like.itemsize <= _SMALL and x.is_contiguous() and (residual is None or residual.is_contiguous())
    plans = steps.plans(shape, like.itemsize) if small else None
    done = _in_one_step(steps, plans, like, like_weight, call) if plans else _on_threads(call)
    if done is None:
        return None
    y, statistics = done
    if is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return _Recorded.apply(x, weight, bias, residual, (y, statistics, eps, call.relu))
    return y


class _Call(NamedTuple):
    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    mean: Any
    var: Any
    batches: Any
    of_batch: bool
    commits: bool
    eps: float
    momentum: float | None
    relu: bool


def _in_one_step(
    steps: Any, plans: Any, like: np.ndarray, like_weight: np.ndarray, call: _Call
) -> tuple[torch.Tensor, np.ndarray] | None:
    """A small contiguous tensor, by one compiled function that takes addresses. With y, the rows mean and variance, or
    mean, shift, variance and m2 of the batch."""
    x, size, channels = call.x, call.x.numel(), call.x.shape[1]
    y, floor = empty_like(x), 0.0 if call.relu else -math.inf
    arrays = (
        like,
        like_weight,
        x.data_ptr(),
        y.data_ptr(),
        0 if call.residual is None else call.residual.data_ptr(),
        0 if call.weight is None else call.weight.data_ptr(),
        0 if call.bias is None else call.bias.data_ptr(),
    )
    if not call.of_batch:
        copies, running = np.empty((2, channels)), (call.mean.data_ptr(), call.var.data_ptr())
        done = steps.evaluate(*arrays, *running, size, channels, floor, call.eps, copies, *plans[1])
        return (y, copies) if done else None
    numbers, addresses = np.empty((5, channels)), (0, 0, 0)
    if call.commits:
        addresses = call.mean.data_ptr(), call.var.data_ptr(), call.batches.data_ptr()
    momentum = -1.0 if call.momentum is None else call.momentum
    with _state._lock:
        done = steps.train(*arrays, *addresses, size, channels, floor, call.eps, momentum, numbers, *plans[0])
    if not done:
        return None
    if call.commits:
        increment_version((call.mean, call.var, call.batches))
    return y, numbers


def _on_threads(call: _Call) -> tuple[torch.Tensor, Statistics] | None:
    """Any other tensor, by the kernels that threads share."""
    x, state = call.x, (call.weight, call.bias, call.mean, call.var)
    if x.is_neg() or any(a is not None and _TORCH.overlaps(x, a) for a in state):
        return None
    given, spec = (call.weight, call.bias, call.residual), Spec(1, call.eps, call.relu)
    if not call.of_batch:
        statistics = Statistics(None, call.mean.clone(), None, call.var.clone())
        return _torch_cpu.evaluate(x, statistics, *given, spec), statistics
    y, statistics, _ = _torch_cpu.train(x, *given, spec)
    if call.commits:
        with _state._lock, torch.no_grad():
            momentum = 1 / (int(call.batches) + 1) if call.momentum is None else call.momentum
            update = Update(call.mean, call.var, momentum, ddof=1, propagate=False)
            mean, var = _torch_cpu.updated_running_statistics(statistics, update)
            call.mean.copy_(mean)
            call.var.copy_(var)
            call.batches.add_(1)
    return y, statistics


class _Recorded(torch.autograd.function._SingleLevelFunction):  # Function minus the checks for torch.func, 1.4 us
    """y, computed already, as one node of the graph. The statistics are this call's own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        call: tuple[torch.Tensor, Statistics | np.ndarray, float, bool],
    ) -> torch.Tensor:
        y, *ctx.call = call
        ctx.save_for_backward(x, weight, y if call[3] else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        statistics, eps, relu = ctx.call
        if isinstance(statistics, np.ndarray):  # made here, where it costs the forward pass nothing
            rows = torch.from_numpy(statistics)
            mean, shift, *rest = rows if len(rows) > 2 else (rows[0], None, rows[1])
            count = x.numel() // len(mean) if len(rows) > 2 else None
            statistics = Statistics(count, mean, shift if x.dtype is _FLOAT64 else None, *rest[:2])
        active = None if y is None else y > 0
        _, _, wants_bias, wants_residual, _ = ctx.needs_input_grad
        spec = Spec(1, eps, relu, wants_residual)
        grads = differentiated(_TORCH, dy, (x, weight, None, active), statistics, spec)
        return grads.x, grads.weight, grads.bias if wants_bias else None, grads.residual, None


def _running_dtype(device: torch.device) -> torch.dtype:
    return torch.float64 if TorchBackend().has_float64(device) else torch.float32


def _moved(buffer: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    device = fn(torch.empty(0, device=buffer.device)).device
    dtype = _running_dtype(device)
    if buffer.is_meta:
        return torch.empty_like(buffer, device=device, dtype=dtype)
    if device != buffer.device:
        return buffer.to(device, dtype)
    new = fn(buffer)  # share_memory() and its like
    return new if new.dtype == buffer.dtype else buffer


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """Batch normalization of ``(N, C)`` or ``(N, C, L)`` tensors (Ioffe & Szegedy 2015), as `anybn.batch_norm` has it.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias`` per channel, with the biased variance; in training those of the
    batch, which go into the buffers as ``running = (1 - momentum) * running + momentum * batch``, unbiased.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, device, dtype: as in ``torch.nn.BatchNorm1d``; dtype is weight's and
            bias's.
        activation: None or "relu", after the residual that ``forward`` takes.
        group: whose batches count as one in training, as in `anybn.batch_norm`. Copies of the module share it.
        options: what else torch's module takes: ``bias=False`` from torch 2.13 on.

    Attributes:
        weight, bias: Parameters ``(C,)``, or None.
        running_mean, running_var: buffers ``(C,)``, float64 where the device has it, or None.
        num_batches_tracked: a buffer, int64, or None.
        state: all of these as a live `anybn.BatchNormState`, which NumPy code can train and evaluate.

    Raises TypeError or ValueError for arguments outside of the above.

    >>> import numpy as np, torch, anybn, anybn.torch
    >>> bn = anybn.torch.BatchNorm1d(2, activation="relu")
    >>> x = torch.tensor([[1.0, 5.0], [3.0, 9.0]])
    >>> bn(x, residual=x).detach().round(decimals=4)
    tensor([[ 0.,  4.],
            [ 4., 10.]])
    >>> _ = anybn.batch_norm(x.numpy(), bn.state, training=True)
    >>> bn.running_mean, int(bn.num_batches_tracked)
    (tensor([0.3800, 1.3300], dtype=torch.float64), 2)
    """

    _ranks, _shapes = (2, 3), "(N, C) or (N, C, L)"


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """`BatchNorm1d` for ``(N, C, H, W)`` tensors, in any memory format."""

    _ranks, _shapes = (4,), "(N, C, H, W)"


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """`BatchNorm1d` for ``(N, C, D, H, W)`` tensors, in any memory format."""

    _ranks, _shapes = (5,), "(N, C, D, H, W)"


_OURS = {torch.nn.BatchNorm1d: BatchNorm1d, torch.nn.BatchNorm2d: BatchNorm2d, torch.nn.BatchNorm3d: BatchNorm3d}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def convert(
    model: torch.nn.Module,
    *,
    group: Any = None,
    fuse: tuple[Any, ...] | None = None,
    keep: tuple[type, ...] = (),
) -> torch.nn.Module:
    """Make every torch batch norm of a model one of anybn's: BatchNorm1d, BatchNorm2d and BatchNorm3d.

    Each module becomes of the other class where it is. It stays the same object with the same Parameters, hooks, mode
    and names, in all places that share it, so optimizers and checkpoints go on; only its running statistics become
    float64. Convert before DistributedDataParallel wraps the model, which holds on to buffers.

    Args:
        model: any module, a batch norm itself included; anybn's own are left alone, but for their group.
        group: whose batches count as one in training, for every batch norm of the model; see `anybn.distributed`.
            ``anybn.distributed.TorchGroup()`` is all processes. Under DistributedDataParallel, parameters get the
            gradients of its mean over the processes, as without.
        fuse: example inputs, a tuple of the arguments of ``model(...)``. BN -> ReLU and BN -> add -> ReLU then become
            one call each, wherever torch.fx, which traces the model in both modes, shows that nothing else reads what
            lies between, and that what is added has bn's shape and dtype for inputs like these.
        keep: classes of batch norms to leave as they are.

    Returns:
        model; with ``fuse`` a ``torch.fx.GraphModule`` in its place, on the same submodules and with the same
        ``state_dict``.

    Raises, before anything has changed:
        TypeError: for batch norms that cannot be converted, all named: SyncBatchNorm, other subclasses of torch's, lazy
            ones that have not seen a batch, and scripted models.
        ValueError: for settings that anybn refuses, such as eps=0, and for models that torch.fx cannot trace or that
            compute something else in training than in evaluation, with ``fuse``.

    >>> import torch, anybn.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
    >>> model = anybn.torch.convert(model)  # and the optimizer goes on
    >>> fused = anybn.torch.convert(model, fuse=(torch.zeros(2, 1, 8, 8),))
    >>> [str(node.target) for node in fused.graph.nodes]  # no relu after the batch norm, "1"
    ['input', '0', '1', 'output']
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    group = None if group is None else distributed.as_group(group)
    found, problems = [], []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            problems.append(f"{name or 'model'} is scripted, and its code is fixed: convert before scripting")
        elif type(module) in _OURS and type(module) not in keep:
            found.append((name, module))
        elif isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and not isinstance(module, (_BatchNorm, *keep)):
            problems.append(f"{name or 'model'} is a {type(module).__name__}: {_why_not(module)}")
    if problems:
        raise TypeError(f"nothing was converted: {'; '.join(problems)}")
    for name, module in found:
        try:
            _checks.eps(module.eps), _checks.momentum(module.momentum)
        except (TypeError, ValueError) as error:
            raise ValueError(f"nothing was converted, because of {name or 'model'}: {error}") from error
    for _, module in found:
        module.__class__ = _OURS[type(module)]
        _set_running_dtype(module, lambda buffer: _running_dtype(buffer.device))
    result = model
    if fuse is not None:
        try:
            result = _fuse.fused(model, tuple(fuse), _BatchNorm)
        except BaseException:
            for _, module in found:
                _revert(module)
            raise
    if group is not None:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.group = group
    return result


def revert(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `convert`: every anybn batch norm of a model becomes torch's, where it is; returns model.

    Running statistics become of weight's dtype, float32 without one. A model that `convert` has fused stays a
    GraphModule, in which addition and relu are operations of their own again.

    Raises TypeError, with nothing changed, if a module has an activation: torch's cannot; name and way out are in it.

    >>> import torch, anybn.torch
    >>> type(anybn.torch.revert(anybn.torch.convert(torch.nn.BatchNorm1d(3))))
    <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    ours = [(name, module) for name, module in model.named_modules() if type(module) in _THEIRS]
    for name, module in ours:
        if module.activation is not None:
            raise TypeError(
                f"nothing was reverted: {name or 'model'} has activation={module.activation!r}, which torch's has not: "
                "put a torch.nn.ReLU after it and set its activation to None"
            )
    for module in list(model.modules()):
        if isinstance(module, torch.fx.GraphModule):
            _fuse.unfused(module, _BatchNorm)
    for _, module in ours:
        _revert(module)
    return model


def _revert(module: torch.nn.Module) -> None:
    module.__class__ = _THEIRS[type(module)]
    module.__dict__.pop("group", None)
    _set_running_dtype(module, lambda _: torch.float32 if module.weight is None else module.weight.dtype)


def _set_running_dtype(module: Any, dtype: Callable[[torch.Tensor], torch.dtype]) -> None:
    for name in ("running_mean", "running_var"):
        if (buffer := getattr(module, name)) is not None:
            setattr(module, name, buffer.to(dtype(buffer)))


def _why_not(module: torch.nn.Module) -> str:
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        return "run a batch through the model first, which tells it its channels"
    if isinstance(module, torch.nn.SyncBatchNorm):
        return (
            "start from the model as it was before convert_sync_batchnorm and pass group=, or keep it with "
            "keep=(torch.nn.SyncBatchNorm,)"
        )
    return f"a subclass may do anything in its forward; keep it with keep=({type(module).__name__},)"
