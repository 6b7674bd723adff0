"""BatchNorm: a state with a mode, called like a layer."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from anybn import _checks, _functional, _settings
from anybn._settings import Activation
from anybn.backends.registry import backend_for
from anybn.checkpoints.conventions import ConventionName
from anybn.core.call import Array, ArrayT, Gradients
from anybn.state.state import BatchNormState


def _of_state(name: str) -> Any:
    """An attribute of a layer that is its state's."""

    def get(layer: BatchNorm) -> Any:
        return getattr(layer.state, name)

    def put(layer: BatchNorm, value: Any) -> None:
        setattr(layer.state, name, value)

    return property(get, put, doc=f"The state's {name}.")


class BatchNorm:
    """Batch normalization of ``(N, C, *spatial)`` arrays of any library; starts in training mode.

    Args:
        num_features: C, the number of channels; it may be left out beside a state.
        eps, momentum, affine, track_running_stats: the state's, see `BatchNormState`; by position too, as torch has it.
        scale, bias, ddof, dtype: the state's as well.
        axis: the channel axis; -1 for channels last.
        activation: None or "relu".
        group: see `batch_norm`.
        state: a `BatchNormState` to use, perhaps with other layers, in place of a new one; its settings hold, so none
            may be given beside it.

    Attributes:
        state: the `BatchNormState`; training with an array of another library moves it there.
        weight, bias, running_mean, running_var, num_batches_tracked: the state's, to be read and set.
        training: the mode; `train` and `eval` set it.

    In training it normalizes with the batch's statistics and folds them into the running ones; in evaluation it uses
    the running ones, or without them the batch's, as torch does.

    Raises TypeError or ValueError for arguments outside of the above.

    >>> import numpy as np, anybn
    >>> bn = anybn.BatchNorm(3)
    >>> x = np.random.default_rng(0).normal(5, 2, (64, 3, 8, 8)).astype(np.float32)
    >>> y = bn(x)
    >>> bool(abs(y.mean()) < 1e-6), bool(abs(y.std() - 1) < 1e-5)
    (True, True)
    >>> bn.eval()
    BatchNorm(3, eps=1e-05, momentum=0.1, axis=1) in evaluation on numpy, 1 batches tracked
    """

    __slots__ = ("__weakref__", "activation", "axis", "group", "state", "training")
    _ranks: ClassVar[tuple[int, ...]] = ()
    _shapes: ClassVar[str] = ""

    weight = _of_state("weight")
    bias = _of_state("bias")
    running_mean = _of_state("running_mean")
    running_var = _of_state("running_var")
    num_batches_tracked = _of_state("num_batches_tracked")

    def __init__(
        self,
        num_features: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        scale: bool = True,
        bias: bool = True,
        ddof: int = 1,
        dtype: Any = None,
        axis: int = 1,
        activation: Activation = None,
        group: Any = None,
        state: BatchNormState | None = None,
    ):
        if state is not None and not isinstance(state, BatchNormState):
            raise TypeError(f"state is a {type(state).__name__}; it must be an anybn.BatchNormState")
        if num_features is None:
            if state is None:
                raise TypeError("num_features is missing: pass the number of channels, or a state=")
            num_features = state.num_features
        fresh = BatchNormState(
            num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            scale=scale,
            bias=bias,
            track_running_stats=track_running_stats,
            ddof=ddof,
            dtype=dtype,
        )
        self.state = fresh if state is None else _shared(state, fresh)
        self.axis = _settings.axis(axis)
        self.activation = _settings.choice("activation", activation, (None, "relu"))
        self.group = group
        self.training = True

    def __call__(
        self, x: ArrayT, *, mask: Array | None = None, residual: Array | None = None, out: Array | None = None
    ) -> ArrayT:
        """y, as `batch_norm` gives it in this layer's mode; shapes, mask, residual, out and errors as there."""
        if self._ranks:
            self._check_rank(x)
        return _functional.batch_norm(
            x, self.state, training=self.training, axis=self.axis, mask=mask, residual=residual,
            activation=self.activation, group=self.group, out=out,
        )  # fmt: skip

    def vjp(
        self, x: ArrayT, *, mask: Array | None = None, residual: Array | None = None, out: Array | None = None
    ) -> tuple[ArrayT, Callable[[Array], Gradients]]:
        """(y, pullback), as `batch_norm_vjp` gives them in this layer's mode."""
        if self._ranks:
            self._check_rank(x)
        return _functional.batch_norm_vjp(
            x, self.state, training=self.training, axis=self.axis, mask=mask, residual=residual,
            activation=self.activation, group=self.group, out=out,
        )  # fmt: skip

    def _check_rank(self, x: Array) -> None:
        try:
            if not hasattr(x, "shape"):
                backend_for(x)  # raises
            if len(x.shape) not in self._ranks:
                advice = ": for one sample use x[None]" if len(x.shape) == self._ranks[0] - 1 else ""
                shape = _checks.shape_of(x)
                raise ValueError(f"x has shape {shape}; {type(self).__name__} needs {self._shapes}{advice}")
        except Exception as error:
            _functional.notify_failure(x, self.state, self.training, self.group, error)
            raise

    def train(self, mode: bool = True) -> Self:
        """Set training mode, or with False evaluation mode; returns self."""
        self.training = _settings.flag("mode", mode)
        return self

    def eval(self) -> Self:
        """Set evaluation mode; returns self."""
        return self.train(False)

    def to(self, target: Any) -> Self:
        """Move the state, see `BatchNormState.to`; returns self."""
        self.state.to(target)
        return self

    def parameters(self) -> dict[str, Array]:
        """weight and bias by name, see `BatchNormState.parameters`."""
        return self.state.parameters()

    def reset(self) -> None:
        """See `BatchNormState.reset`."""
        self.state.reset()

    def copy(self) -> Self:
        """An independent layer with a state of its own, in the same group."""
        return copy.deepcopy(self)

    def state_dict(self, convention: ConventionName = "torch") -> dict[str, Array]:
        """The state's, see `BatchNormState.state_dict`."""
        return self.state.state_dict(convention)

    def load_state_dict(self, mapping: Mapping[str, Array], convention: ConventionName = "torch") -> None:
        """Into the state, see `BatchNormState.load_state_dict`."""
        self.state.load_state_dict(mapping, convention)

    def save(self, path: str | os.PathLike[str]) -> None:
        """The state, see `BatchNormState.save`; ``BatchNorm(state=BatchNormState.load(path))`` is the way back."""
        self.state.save(path)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A layer of its own in the same group: a copy talks to the same processes."""
        twin = copy.copy(self)
        twin.state = copy.deepcopy(self.state, memo)
        return twin

    def __repr__(self) -> str:
        inside, _, after = repr(self.state).removeprefix("BatchNormState(").rpartition(")")
        options = f", axis={self.axis}" + (f", activation={self.activation!r}" if self.activation else "")
        mode = "training" if self.training else "evaluation"
        return f"{type(self).__name__}({inside}{options}) in {mode}{after}"


def _shared(state: BatchNormState, settings: BatchNormState) -> BatchNormState:
    """state, if the settings given beside it do not contradict it."""
    defaults, held = BatchNormState(settings.num_features)._settings(), state._settings()
    for name, given in settings._settings().items():
        if given != held[name] and (name == "num_features" or given != defaults[name]):
            raise ValueError(
                f"{name} is {given!r} but the state has {held[name]!r}: the state's settings hold, drop {name}"
            )
    return state


class BatchNorm1d(BatchNorm):
    """`BatchNorm` that takes ``(N, C)`` or ``(N, C, L)`` only; with ``axis=-1``, ``(N, L, C)``."""

    __slots__ = ()
    _ranks, _shapes = (2, 3), "(N, C) or (N, C, L)"


class BatchNorm2d(BatchNorm):
    """`BatchNorm` that takes ``(N, C, H, W)`` only; with ``axis=-1``, ``(N, H, W, C)``."""

    __slots__ = ()
    _ranks, _shapes = (4,), "(N, C, H, W)"


class BatchNorm3d(BatchNorm):
    """`BatchNorm` that takes ``(N, C, D, H, W)`` only; with ``axis=-1``, ``(N, D, H, W, C)``."""

    __slots__ = ()
    _ranks, _shapes = (5,), "(N, C, D, H, W)"
