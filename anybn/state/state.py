"""BatchNormState: gamma, beta and the running statistics, shared by every backend."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import numpy as np

from anybn import _checks
from anybn.backends.base import Backend
from anybn.backends.registry import backend_for, resolve_target
from anybn.checkpoints import translation
from anybn.core import formulas as _core
from anybn.core.formulas import Array, Statistics, Update
from anybn.errors import CheckpointError, StateError

# Held for nothing but the comparison and the swap in `BatchNormState._update`. One lock for all states can be renewed
# in a forked child, where the thread that held it does not exist.
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class Arrays(NamedTuple):
    """The contents of a state. Never written to: a change replaces the whole tuple in one assignment, so that a reader
    in another thread, or an exception at any point, sees the old values or the new ones."""

    weight: Array | None
    bias: Array | None
    running_mean: Array | None
    running_var: Array | None
    num_batches_tracked: int | Array

    def held(self) -> dict[str, Array]:
        """The per-channel arrays that are not switched off, by name."""
        return {name: a for name, a in zip(self._fields[:4], self, strict=False) if a is not None}


class BatchNormState:
    """The one object that batch norm keeps: weight (gamma), bias (beta), running statistics and their conventions.

    Args:
        num_features: C, the number of channels, >= 0.
        eps: added to the variance before the square root, > 0. Never clamped.
        momentum: in ``running = (1 - momentum) * running + momentum * batch``, within [0, 1]; Keras's momentum is 1
            minus this. None: the cumulative average over every batch so far.
        affine: False leaves out weight and bias.
        track_running_stats: False leaves out the running statistics; evaluation then uses the batch's own.
        ddof: ``running_var`` averages ``sum((x - mean)**2) / (count - ddof)``; 1 is torch's convention, 0 that of
            Keras, Flax and ONNX. Normalization always divides by count.
        dtype: of weight and bias: float16, bfloat16, float32 (the default) or float64, of any library or by name.
        like: an array to start beside, or a target as in `to`. The default is NumPy.

    Attributes:
        weight, bias: ``(C,)`` in dtype, starting at 1 and 0; None without affine.
        running_mean, running_var: ``(C,)`` in float64 where library and device have it, else float32, starting at 0
            and 1; None without track_running_stats. They cost C values, and float32 means lose digits.
        num_batches_tracked: training batches so far, an int.

    The state lives in one place at a time. A call with x elsewhere moves it there; a torch Parameter stays behind then.
    Its arrays are replaced, never written to, so an array read from it stays what it was; the running statistics that
    it makes in NumPy are read-only. All methods may be called from several threads. With ``momentum=None``, a batch
    that was skipped for a NaN counts in that channel's average as the value before it.

    Raises TypeError or ValueError for arguments outside of the above.

    >>> import numpy as np, anybn
    >>> state = anybn.BatchNormState(2)
    >>> y = anybn.batch_norm(np.array([[1.0, 10.0], [3.0, 30.0]]), state, training=True)
    >>> state.running_mean, state.running_var, state.num_batches_tracked
    (array([0.2, 2. ]), array([ 1.1, 20.9]), 1)
    """

    __slots__ = ("_ddof", "_dtype", "_eps", "_momentum", "_num_features", "_arrays", "__weakref__")  # noqa: RUF023

    def __new__(cls, *_: Any, **__: Any) -> Self:
        if sys.modules.get("jax") is not None:
            from anybn import jax as _jax  # noqa: F401 makes states pytrees; nothing else would before jax.jit sees one
        return super().__new__(cls)

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        ddof: int = 1,
        dtype: Any = None,
        like: Any = None,
    ):
        self._num_features = _checks.num_features(num_features)
        self.eps, self.momentum, self.ddof = eps, momentum, ddof  # type: ignore[assignment]
        affine = _checks.flag("affine", affine)
        track_running_stats = _checks.flag("track_running_stats", track_running_stats)
        self._dtype = _checks.state_dtype(dtype)
        c, numpy_dtype = self._num_features, _numpy_dtype(self._dtype)
        self._arrays = Arrays(
            np.ones(c, numpy_dtype) if affine else None,
            np.zeros(c, numpy_dtype) if affine else None,
            _frozen(np.zeros(c)) if track_running_stats else None,
            _frozen(np.ones(c)) if track_running_stats else None,
            0,
        )
        if like is not None:
            self._arrays = self._placed(self._arrays, *resolve_target(like))

    # -- settings ----------------------------------------------------------------------------------------------

    @property
    def num_features(self) -> int:
        return self._num_features

    @property
    def dtype(self) -> str:
        """The name of weight's and bias's dtype."""
        return self._dtype

    @property
    def affine(self) -> bool:
        return self._arrays.weight is not None

    @property
    def track_running_stats(self) -> bool:
        return self._arrays.running_mean is not None

    @property
    def eps(self) -> float:
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = _checks.eps(value)

    @property
    def momentum(self) -> float | None:
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self._momentum = _checks.momentum(value)

    @property
    def ddof(self) -> int:
        return self._ddof

    @ddof.setter
    def ddof(self, value: int) -> None:
        self._ddof = _checks.ddof(value)

    # -- arrays ------------------------------------------------------------------------------------------------

    @property
    def weight(self) -> Array | None:
        return self._arrays.weight

    @weight.setter
    def weight(self, value: Array) -> None:
        self._set("weight", value)

    @property
    def bias(self) -> Array | None:
        return self._arrays.bias

    @bias.setter
    def bias(self, value: Array) -> None:
        self._set("bias", value)

    @property
    def running_mean(self) -> Array | None:
        return self._arrays.running_mean

    @running_mean.setter
    def running_mean(self, value: Array) -> None:
        self._set("running_mean", value)

    @property
    def running_var(self) -> Array | None:
        return self._arrays.running_var

    @running_var.setter
    def running_var(self, value: Array) -> None:
        self._set("running_var", value)

    @property
    def num_batches_tracked(self) -> int:
        n = self._arrays.num_batches_tracked
        try:
            return n if isinstance(n, int) or n.ndim else int(n)  # type: ignore[return-value]
        except TypeError:  # what jax.jit and jax.grad made of it
            return n  # type: ignore[return-value]

    @num_batches_tracked.setter
    def num_batches_tracked(self, value: int) -> None:
        value = _checks.batch_count(value)
        self._update(lambda arrays: arrays._replace(num_batches_tracked=value))

    def _set(self, name: str, value: Array) -> None:
        """Take value as it is where its dtype allows (a torch Parameter stays itself); the state moves beside it."""
        if getattr(self._arrays, name) is None:
            option = "affine" if name in ("weight", "bias") else "track_running_stats"
            raise ValueError(f"{name} cannot be set, this state has {option}=False: make one with {option}=True")
        if value is getattr(self._arrays, name):
            return
        backend = backend_for(value, name)
        _checks.state_array(backend, name, value, self._num_features)
        device = backend.device_of(value)
        wanted = self._dtype_of(name, backend, device)
        dtype = backend.dtype(wanted)
        if value.dtype != dtype:
            if backend.records(value):
                given = _core.dtype_name(value.dtype)
                raise TypeError(
                    f"{name} has dtype {given} and requires grad, but the state keeps {wanted}, and a copy would "
                    f"not be trained: make the state with dtype={given!r}"
                )
            value = backend.namespace(value).astype(value, dtype)
        kept = backend.detached(value) if name.startswith("running") else value

        def change(arrays: Arrays) -> Arrays:
            others = arrays._replace(**{name: None})
            for other, array in others.held().items():
                if backend.owns(type(array)) and backend.overlaps(value, array):
                    raise ValueError(f"{name} shares memory with {other}: give it a copy")
            if not backend.is_traced(value):
                others = self._placed(others, backend, device)
            return others._replace(**{name: kept})

        self._update(change)

    def _dtype_of(self, name: str, backend: Backend, device: Any) -> str:
        """The dtype that the array called name has there: what is wanted, or float32 where there is no float64."""
        wanted = self._dtype if name in ("weight", "bias") else "float64"
        return wanted if wanted != "float64" or backend.has_float64(device) else "float32"

    def _placed(self, arrays: Arrays, backend: Backend, device: Any) -> Arrays:
        """arrays with those that lie elsewhere copied to this device; the same object if none does."""
        n = arrays.num_batches_tracked
        if isinstance(n, int) and all(a is None or backend.holds(a, device) for a in arrays[:4]):
            return arrays
        moved: dict[str, Any] = {}
        for name, array in arrays.held().items():
            if backend.holds(array, device):
                continue
            dtype = _numpy_dtype(self._dtype_of(name, backend, device))
            with np.errstate(over="ignore"):
                values = backend_for(array).to_numpy(array).astype(dtype)
            moved[name] = backend.from_numpy(values, device)
            if name.startswith("running"):
                moved[name] = backend.frozen(moved[name])
        if not isinstance(n, int) and not backend_for(n).is_traced(n):  # as jax.jit gives it back
            moved["num_batches_tracked"] = int(n)
        return arrays._replace(**moved) if moved else arrays

    def _update(self, change: Callable[[Arrays], Arrays]) -> None:
        """Replace the arrays by ``change(arrays)``: worked out without the lock, and again if another was faster."""
        while True:
            before = self._arrays
            after = change(before)
            with _lock:
                if self._arrays is before:
                    self._arrays = after
                    return

    def to(self, target: Any) -> BatchNormState:
        """Move to ``"numpy"``, ``"cupy"``, ``"torch:cuda:0"``, ``"jax"``, ..., or beside an array; returns self.

        Raises BackendNotInstalled for a library that is missing, ValueError for an unknown one or an unknown device,
        StateError in a traced JAX function to which the state was not passed.

        >>> import anybn
        >>> anybn.BatchNormState(3).to("numpy").weight
        array([1., 1., 1.], dtype=float32)
        """
        backend, device = resolve_target(target)

        def change(arrays: Arrays) -> Arrays:
            moved = self._placed(arrays, backend, device)
            _require_storable(backend, moved, arrays)
            return moved

        self._update(change)
        return self

    # -- used by the calls and by loading ----------------------------------------------------------------------

    def _beside(self, backend: Backend, x: Array) -> tuple[Arrays, Arrays]:
        """(the arrays as they are, the arrays beside x). The state itself moves when the call has succeeded."""
        arrays = self._arrays
        return arrays, self._placed(arrays, backend, backend.device_of(x))

    def _settle(self, backend: Backend, before: Arrays, beside: Arrays) -> None:
        """Adopt the arrays moved for a call that is done, unless the state has changed since or may not keep them."""
        if beside is not before and _storable(backend, beside, before):
            with _lock:
                if self._arrays is before:
                    self._arrays = beside

    def _replace_values(self, values: dict[str, Any]) -> None:
        """Take over NumPy values by field name, all in one swap, in the place and the dtypes of the present ones."""

        def change(arrays: Arrays) -> Arrays:
            new = dict(values)
            for name, old in arrays.held().items():
                if name not in values:
                    continue
                backend = backend_for(old)
                device = backend.device_of(old)
                dtype = _numpy_dtype(self._dtype_of(name, backend, device))
                new[name] = backend.from_numpy(values[name].astype(dtype), device)
                if name.startswith("running"):
                    new[name] = backend.frozen(new[name])
                else:
                    new[name] = backend.refilled(old, new[name])
            return arrays._replace(**new)

        self._update(change)

    def _planned_update(self, arrays: Arrays, nonfinite: str) -> Update | None:
        """How arrays take in a batch; None if a backend cannot do that while it normalizes."""
        momentum = 1.0 / (arrays.num_batches_tracked + 1) if self._momentum is None else self._momentum
        return Update(arrays.running_mean, arrays.running_var, momentum, self._ddof, nonfinite == "propagate")

    def _commit(
        self,
        backend: Backend,
        x: Array,
        statistics: Statistics,
        running: tuple[Array, Array] | None,
        nonfinite: str,
        before: Arrays,
        beside: Arrays,
    ) -> None:
        """Count the batch and fold its statistics into the running ones: one swap, after everything has succeeded.

        ``before`` and ``beside`` are what `_beside` gave, perhaps overtaken by another thread since; then ``running``,
        made of them by the backend, is overtaken as well.
        """

        def change(old: Arrays) -> Arrays:
            arrays, new = beside, running
            if old is not before:
                arrays, new = self._placed(old, backend, backend.device_of(x)), None
            if new is None:
                u = self._planned_update(arrays, nonfinite)
                assert u is not None
                rule: tuple[Any, ...] = u.momentum, u.ddof, u.propagate
                new = backend.updated_running_statistics(u.running_mean, u.running_var, statistics, *rule)
            running_mean, running_var = map(backend.frozen, new)
            batches = arrays.num_batches_tracked + 1
            arrays = Arrays(arrays.weight, arrays.bias, running_mean, running_var, batches)
            _require_storable(backend, arrays, old)
            return arrays

        self._update(change)

    # -- copies and checkpoints --------------------------------------------------------------------------------

    def copy(self) -> BatchNormState:
        """An independent state with the same settings and values, in the same place."""
        new = type(self).__new__(type(self))
        for name in BatchNormState.__slots__[:-1]:
            setattr(new, name, getattr(self, name))
        twins = {name: backend_for(a).twin(a) for name, a in self._arrays.held().items()}
        new._arrays = self._arrays._replace(**twins)
        return new

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchNormState:
        return self.copy()

    def state_dict(self, convention: str = "torch") -> dict[str, Array]:
        """Copies of the arrays by the names of a framework and in its order, in the state's library.

        ``"torch"``: weight, bias, running_mean, running_var, num_batches_tracked (0-d int64); those switched off are
        absent. `load_state_dict` takes it back, and so does ``torch.nn.BatchNorm2d.load_state_dict`` once they are
        tensors. The others are ``"keras"``, ``"flax"`` (NNX), ``"flax-linen"``, ``"haiku"``, ``"chainer"``,
        ``"onnx"``, ``"mlx"``, ``"equinox"``, ``"equinox-ema"``, ``"mxnet"`` and ``"mxnet-fix-gamma"``; `anybn.interop`
        has the table, what is exact and what was chosen, and the layer's settings.

        Raises ValueError for an unknown convention, and for a state that it cannot express: without running statistics
        (only torch and MLX), with ``momentum=None`` (Haiku and Equinox need a number to undo their debiasing), with a
        weight that MXNet would ignore.

        >>> import anybn
        >>> list(anybn.BatchNormState(3, affine=False).state_dict())
        ['running_mean', 'running_var', 'num_batches_tracked']
        >>> list(anybn.BatchNormState(3).state_dict("keras"))
        ['gamma', 'beta', 'moving_mean', 'moving_variance']
        """
        return translation.encode(self._settings(), self._arrays._asdict(), convention)

    def load_state_dict(self, mapping: Mapping[str, Array], convention: str = "torch") -> None:
        """Take over the arrays of a mapping, from any library; all of them or, on an error, none.

        The settings stay what they are: eps, momentum and ddof differ between frameworks, and
        `anybn.interop.from_state_dict` makes a state that has them all. A convention without a count of batches sets
        num_batches_tracked to 0.

        Raises CheckpointError that lists every missing and extra key, wrong shape and impossible value; ValueError for
        an unknown convention, or one that cannot express this state.

        >>> import numpy as np, anybn
        >>> state = anybn.BatchNormState(2, eps=1e-3, ddof=0)
        >>> keras = {"gamma": np.ones(2), "beta": np.zeros(2), "moving_mean": np.ones(2)}
        >>> state.load_state_dict(keras, "keras")
        Traceback (most recent call last):
        anybn.errors.CheckpointError: nothing was loaded: missing key 'moving_variance'
        >>> state.load_state_dict(keras | {"moving_variance": np.ones(2)}, "keras")
        """
        self._replace_values(translation.decode(mapping, self._settings(), convention))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with the arrays, the settings and a checksum; the old file stays until it is whole.

        Raises BackendNotInstalled without safetensors, OSError if the file cannot be written.
        """
        from anybn.checkpoints import files  # late: json and hashlib take time to import

        files.save(path, self._settings(), self._arrays._asdict())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> BatchNormState:
        """The state of a file that `save` wrote, in NumPy.

        Raises CheckpointError if it is truncated, damaged, newer or no such file; nothing in it is executed.

        >>> import anybn, tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "bn.safetensors"
        >>> anybn.BatchNormState(3, momentum=None).save(path)
        >>> anybn.BatchNormState.load(path)
        BatchNormState(3, eps=1e-05, momentum=None) on numpy, 0 batches tracked
        """
        from anybn.checkpoints import files

        settings, arrays = files.load(path)
        try:
            state = BatchNormState(**settings)
            if not state.track_running_stats:
                state.num_batches_tracked = int(arrays.pop("num_batches_tracked"))
            state.load_state_dict(arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} holds no valid state ({error})") from error
        return state

    def _settings(self) -> dict[str, Any]:
        """By the names under which a new state takes them."""
        names = "num_features", "eps", "momentum", "affine", "track_running_stats", "ddof", "dtype"
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        settings = [str(self._num_features), f"eps={self._eps}", f"momentum={self._momentum}"]
        defaults = {"affine": True, "track_running_stats": True, "ddof": 1, "dtype": "float32"}
        settings += [f"{k}={getattr(self, k)!r}" for k, v in defaults.items() if getattr(self, k) != v]
        where = ""
        for array in self._arrays.held().values():
            where = f" on {backend_for(array).place(array)}"
        tracked = f", {self.num_batches_tracked} batches tracked" if self.track_running_stats else ""
        return f"BatchNormState({', '.join(settings)}){where}{tracked}"


def _storable(backend: Backend, new: Arrays, old: Arrays) -> bool:
    """Whether a state that holds old may hold new, once the call is over; see `Backend.may_store`."""
    for a, b in zip(new[:4], old, strict=False):
        if a is not b and b is not None and not backend.may_store(a, b):
            return False
    return True


def _require_storable(backend: Backend, new: Arrays, old: Arrays) -> None:
    if not _storable(backend, new, old):
        raise StateError(
            "the state was not passed into this traced call, so the call cannot change it: make the state an "
            "argument of the traced function, batched like x under vmap, and return it, e.g. "
            "jax.jit(lambda x, state: (anybn.batch_norm(x, state, training=True), state)); "
            "or make it inside with like=x"
        )


def _numpy_dtype(name: str) -> np.dtype:
    from anybn.backends.numpy import NumPyBackend

    return NumPyBackend().dtype(name)


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
