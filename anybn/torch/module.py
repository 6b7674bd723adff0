"""Batch norm as modules of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.fx import Proxy
from torch.nn import Parameter

from anybn import _checks, _functional, _settings
from anybn._settings import Activation
from anybn.backends.registry import backend_for
from anybn.backends.torch import TorchBackend
from anybn.groups import engines
from anybn.state.state import BatchNormState
from anybn.torch import compiled
from anybn.torch.fast_forward import fast_forward
from anybn.torch.state import as_tensor, state_of

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """What the three have in common; a subclass of torch's class, so that what looks for batch norms finds these."""

    _ranks: ClassVar[Sequence[int]]
    _shapes: ClassVar[str]
    activation: Activation = None
    group: Any = None
    _block: Any = None  # the open block of `anybn.accumulate`
    _operand: Any = None  # of the operator that it goes through: see `anybn.torch.through_operator`
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
        activation: Activation = None,
        group: Any = None,
        **options: bool,
    ):
        _settings.num_features(num_features)
        _settings.eps(eps)
        _settings.momentum(momentum)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.activation = _settings.choice("activation", activation, (None, "relu"))
        self.group = None if group is None else engines.as_group(group)
        set_running_dtype(self, lambda buffer: running_dtype(buffer.device))

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
        given, activation = activation, activation or self.activation
        if is_dynamo_compiling():
            return compiled.forward(self, input, residual, activation)
        alone = self.group is None and self._block is None
        y = fast_forward(self, input, residual, activation) if alone else None
        if y is None:
            if isinstance(input, Proxy):
                return _traced(self, input, {"residual": residual, "activation": given})
            if is_compiling() or compiled.in_onnx_export():
                return compiled.forward(self, input, residual, activation)
            try:
                self._check_input_dim(input)
            except Exception as error:
                _functional.notify_failure(input, self.state, self.training, self.group, error)
                raise
            options = {"residual": residual, "activation": activation, "group": self.group}
            y = _functional.batch_norm(input, self.state, training=self.training, **options)
        return y

    def _check_input_dim(self, input: Any) -> None:
        if not isinstance(input, torch.Tensor):
            backend_for(input)
        if input.ndim not in self._ranks:
            advice = ": for one sample use x[None]" if input.ndim == self._ranks[0] - 1 else ""
            raise ValueError(f"x has shape {tuple(input.shape)}; {type(self).__name__} needs {self._shapes}{advice}")

    @property
    def state(self) -> BatchNormState:
        """The live `BatchNormState` of this module's own tensors: what either side writes, the other reads."""
        return state_of(self)

    def extra_repr(self) -> str:
        activation = f", activation={self.activation!r}" if self.activation else ""
        return super().extra_repr() + activation + (f", group={self.group}" if self.group is not None else "")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Arrays of other libraries are taken too, and ``assign=True`` does not change the statistics' precision.

        Statistics that cannot be are an error, with which the module keeps what it has.
        """
        dtypes = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        for name in ("weight", "bias", *BUFFERS):
            value = state_dict.get(prefix + name)
            if value is not None and not isinstance(value, torch.Tensor):
                state_dict[prefix + name] = value = torch.as_tensor(as_tensor(backend_for(value, prefix + name), value))
            if problem := _impossible(prefix + name, value):
                args[-1].append(problem)
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, dtype in dtypes.items():
            self._buffers[name] = self._buffers[name].to(dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """The running statistics go where fn leads, but keep their precision: ``half()`` would make them useless."""
        running = {name: self._buffers.pop(name) for name in ("running_mean", "running_var") if name in self._buffers}
        try:
            super()._apply(fn, recurse)
            running = {name: None if buffer is None else _moved(buffer, fn) for name, buffer in running.items()}
        finally:
            self._buffers = running | self._buffers
        return self


def _traced(module: torch.nn.Module, x: Proxy, options: dict[str, Any]) -> Proxy:
    """The call of this module as one node of the graph that torch.fx makes of a model, as of torch's own modules."""
    tracer: Any = x.tracer
    if not hasattr(tracer, "path_of_module"):
        raise TypeError("x is a torch.fx.Proxy whose tracer knows no modules: trace the model, with torch.fx.Tracer")
    given = {name: value for name, value in options.items() if value is not None}
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x,), given)


def _impossible(name: str, value: torch.Tensor | None) -> str:
    """Why a checkpoint's running statistics cannot be; or "", also of what has no values here."""
    if value is None or not name.endswith(BUFFERS[:2]) or type(value) not in (torch.Tensor, Parameter) or value.is_meta:
        return ""
    return _checks.impossible_statistics(name, value.detach().cpu().double().numpy())


def set_running_dtype(module: Any, dtype: Callable[[torch.Tensor], torch.dtype]) -> None:
    for name in ("running_mean", "running_var"):
        if (buffer := getattr(module, name)) is not None:
            setattr(module, name, buffer.to(dtype(buffer)))


def running_dtype(device: torch.device) -> torch.dtype:
    return torch.float64 if TorchBackend().has_float64(device) else torch.float32


def _moved(buffer: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    device = fn(torch.empty(0, device=buffer.device)).device
    dtype = running_dtype(device)
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
