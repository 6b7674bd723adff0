"""BatchNormState: gamma, beta and the running statistics, shared by every backend."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from anybn import _pytree, _settings
from anybn.backends.base import Backend
from anybn.backends.registry import backend_for, libraries, resolve_target, unwrapped
from anybn.checkpoints import translation
from anybn.checkpoints.conventions import ConventionName
from anybn.core.call import Array, root_module
from anybn.errors import CheckpointError
from anybn.state.arrays import LEAVES, Arrays, placed, read_only
from anybn.state.settings import Settings
from anybn.state.store import Store


class BatchNormState(Settings):
    """The one object that batch norm keeps: weight (gamma), bias (beta), running statistics and their conventions.

    Args:
        num_features: C, the number of channels, >= 0.
        eps: added to the variance before the square root, > 0. Never clamped.
        momentum: in ``running = (1 - momentum) * running + momentum * batch``, within [0, 1]; Keras's momentum is 1
            minus this. None: the cumulative average over every batch so far.
        affine: False leaves out weight and bias.
        scale: False leaves out weight alone, as Keras and Flax can.
        bias: False leaves out bias alone, as torch, Keras and Flax can.
        track_running_stats: False leaves out the running statistics; evaluation then uses the batch's own.
        ddof: ``running_var`` averages ``sum((x - mean)**2) / (count - ddof)``; 1 is torch's convention, 0 that of
            Keras, Flax and ONNX. Normalization always divides by count.
        dtype: of weight and bias: float16, bfloat16, float32 (the default) or float64, of any library or by name.
        like: an array to start beside, a namespace, or a target as in `to`. The default is NumPy.

    Attributes:
        weight, bias: ``(C,)`` in dtype, starting at 1 and 0; None where they are left out.
        running_mean, running_var: ``(C,)`` in float64 where library and device have it, else float32, starting at 0
            and 1; None without track_running_stats. They cost C values, and float32 means lose digits.
        num_batches_tracked: training batches so far, an int.

    The state has a home, one library and device: see docs/state.md. Evaluation with x elsewhere moves nothing; training
    moves the home to x, and so do `to` and the assignment of an array of another library. Its arrays are replaced,
    never written to, so an array read from it stays what it was; the running statistics that it makes in NumPy are
    read-only. All methods may be called from several threads. With ``momentum=None``, a batch that was skipped for a
    NaN counts in that channel's average as the value before it.

    Raises TypeError or ValueError for arguments outside of the above.

    >>> import numpy as np, anybn
    >>> state = anybn.BatchNormState(2)
    >>> y = anybn.batch_norm(np.array([[1.0, 10.0], [3.0, 30.0]]), state, training=True)
    >>> state.running_mean, state.running_var, state.num_batches_tracked
    (array([0.2, 2. ]), array([ 1.1, 20.9]), 1)
    """

    __slots__ = ("__weakref__",)

    def __new__(cls, *_: Any, **__: Any) -> Self:
        _pytree.register_with_jax()  # nothing else would before jax.jit sees a state
        return super().__new__(cls)

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        scale: bool = True,
        bias: bool = True,
        track_running_stats: bool = True,
        ddof: int = 1,
        dtype: Any = None,
        like: Any = None,
    ):
        affine, scale, bias = map(_settings.flag, ("affine", "scale", "bias"), (affine, scale, bias))
        track_running_stats = _settings.flag("track_running_stats", track_running_stats)
        settings = (
            _settings.num_features(num_features),
            _settings.eps(eps),
            _settings.momentum(momentum),
            _settings.ddof(ddof),
            _settings.state_dtype(dtype),
        )
        c, parameter_dtype = settings[0], _settings.numpy_dtype(settings[-1])
        arrays = Arrays(
            np.ones(c, parameter_dtype) if affine and scale else None,
            np.zeros(c, parameter_dtype) if affine and bias else None,
            read_only(np.zeros(c)) if track_running_stats else None,
            read_only(np.ones(c)) if track_running_stats else None,
            0,
        )
        if like is not None:
            arrays = placed(arrays, settings[-1], *resolve_target(like))
        self._store = Store.of(settings, arrays)

    @classmethod
    def _over(cls, store: Any) -> Self:
        """The state over a store that there is already."""
        state = cls.__new__(cls)
        state._store = store
        return state

    # -- arrays ------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """The name of the library where the state is at home, as `to` takes it; "" if it has no arrays."""
        return "" if (home := self._home()) is None else home[0].name

    @property
    def device(self) -> str:
        """The name of the device in that library; ``state.to(f"{other.backend}:{other.device}")`` goes to other."""
        return "" if (home := self._home()) is None else home[0].device_name(home[1])

    def _home(self) -> tuple[Backend, Array] | None:
        """The backend of the arrays, and the first of these."""
        for array in self._arrays.held().values():
            return backend_for(array, "the state's array"), array
        return None

    # To type checkers none of them is None, so that ``state.weight - 0.1 * grads.weight`` passes.

    @property
    def weight(self) -> Array:
        """gamma, ``(C,)``; None where it is left out."""
        return self._store.given("weight")

    @weight.setter
    def weight(self, value: Array) -> None:
        self._set("weight", value)

    @property
    def bias(self) -> Array:
        """beta, ``(C,)``; None where it is left out."""
        return self._store.given("bias")

    @bias.setter
    def bias(self, value: Array) -> None:
        self._set("bias", value)

    @property
    def running_mean(self) -> Array:
        """``(C,)``, what evaluation subtracts; None without track_running_stats."""
        return self._arrays.running_mean

    @running_mean.setter
    def running_mean(self, value: Array) -> None:
        self._set("running_mean", value)

    @property
    def running_var(self) -> Array:
        """``(C,)``, what evaluation divides by the root of; None without track_running_stats."""
        return self._arrays.running_var

    @running_var.setter
    def running_var(self, value: Array) -> None:
        self._set("running_var", value)

    @property
    def num_batches_tracked(self) -> int:
        """Training batches so far."""
        n: Any = self._arrays.num_batches_tracked
        try:
            return n if isinstance(n, int) or not hasattr(n, "ndim") or n.ndim else int(n)
        except TypeError:  # what jax.jit and jax.grad made of it
            return n

    @num_batches_tracked.setter
    def num_batches_tracked(self, value: int) -> None:
        value = _settings.batch_count(value)
        self._store.fill({"num_batches_tracked": value})

    def _set(self, name: str, value: Array) -> None:
        value, present = unwrapped(value), getattr(self._arrays, name)
        if present is None:
            option = "track_running_stats"
            if name in ("weight", "bias"):
                option = ("scale" if name == "weight" else "bias") if self.affine else "affine"
            raise ValueError(f"{name} cannot be set, this state has {option}=False: make one with {option}=True")
        if value is not present:
            self._store.put(name, value)

    def parameters(self) -> dict[str, Array]:
        """weight and bias by name, those that there are: what an optimizer changes, with `Gradients` by the same names.

        >>> import numpy as np, anybn
        >>> state, x = anybn.BatchNormState(2), np.array([[1.0, 5.0], [3.0, 9.0]])
        >>> y, pullback = anybn.batch_norm_vjp(x, state, training=True)
        >>> grads = pullback(y - 1)
        >>> for name, parameter in state.parameters().items():
        ...     setattr(state, name, parameter - 0.1 * grads[name])
        >>> state.weight.round(2), state.bias
        (array([0.8, 0.8], dtype=float32), array([0.2, 0.2], dtype=float32))
        """
        return {name: a for name in ("weight", "bias") if (a := self._store.given(name)) is not None}

    def to(self, target: Any) -> BatchNormState:
        """Move to ``"numpy"``, ``"cupy"``, ``"torch:cuda:0"``, ``"jax"``, ..., to a namespace such as ``jax.numpy``, or
        beside an array; returns self. No digit is lost on the way, see docs/state.md.

        Raises BackendNotInstalled for a library that is missing, ValueError for an unknown one or an unknown device,
        StateError in a traced JAX function to which the state was not passed, and where a torch tensor that requires
        grad would be left behind.

        >>> import anybn
        >>> anybn.BatchNormState(3).to("numpy").weight
        array([1., 1., 1.], dtype=float32)
        """
        self._store.move(*resolve_target(target))
        return self

    def reset(self) -> None:
        """Weight 1, bias 0, mean 0, variance 1 and no batches tracked, in place of what was learnt, where it lies."""
        start = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
        values: dict[str, Any] = {
            name: np.full(self.num_features, value) for name, value in start.items() if name in self._arrays.held()
        }
        self._store.fill({**values, "num_batches_tracked": 0})

    def equals(self, other: BatchNormState) -> bool:
        """Whether other has the same settings and the same values, wherever both are; ``==`` is the same.

        NaN equals NaN. A state still has the hash of its identity, since it changes.

        >>> import anybn
        >>> state = anybn.BatchNormState(3)
        >>> state == state.copy().to("torch"), state == anybn.BatchNormState(3, eps=1e-3)
        (True, False)
        """
        if not isinstance(other, BatchNormState):
            raise TypeError(f"other is a {type(other).__name__}; it must be an anybn.BatchNormState")
        if other is self:
            return True
        mine, theirs = self._store.snapshot(), other._store.snapshot()
        return (
            self._settings() == other._settings()
            and int(mine.num_batches_tracked) == int(theirs.num_batches_tracked)
            and all(np.array_equal(mine.values_of(n), theirs.values_of(n), equal_nan=True) for n in mine.held())
        )

    def __eq__(self, other: object) -> bool:
        return self.equals(other) if isinstance(other, BatchNormState) else NotImplemented

    __hash__ = object.__hash__

    # -- copies and checkpoints --------------------------------------------------------------------------------

    def copy(self) -> BatchNormState:
        """An independent state with the same settings and values, in the same place."""
        return BatchNormState._over(self._store.copy())

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchNormState:
        return self.copy()

    def state_dict(self, convention: ConventionName = "torch") -> dict[str, Array]:
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
        return translation.encode(self._settings(), self._store.snapshot().named(), convention)

    def load_state_dict(self, mapping: Mapping[str, Array], convention: ConventionName = "torch") -> None:
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
        values = translation.decode(mapping, self._settings(), convention)
        try:
            self._store.fill(values)
        except ValueError as error:
            raise CheckpointError(f"nothing was loaded: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with the arrays, the settings and a checksum; the old file stays until it is whole.

        A link stays one, and so does a pipe or a device, which is written to. A process that is killed while it saves
        leaves nothing else in the folder, or in the moment before the end a hidden file that ends in .part: 9 of 1,000
        kills did. Outside of Linux, and on file systems that cannot make files without a name, most do.

        Raises BackendNotInstalled without safetensors, OSError if the file cannot be written, CheckpointError for a
        state that `load` would refuse.
        """
        from anybn.checkpoints import files  # late: json and hashlib take time to import

        files.save(path, self._settings(), self._exact_arrays())

    def _exact_arrays(self) -> dict[str, Any]:
        """By name, in NumPy, with all digits that are known."""
        arrays = self._store.snapshot()
        return arrays.named() | {name: arrays.values_of(name) for name in arrays.held()}

    @staticmethod
    def load(path: str | os.PathLike[str]) -> BatchNormState:
        """The state of a file that `save` wrote, in NumPy.

        The file need not be trusted. Nothing in it is executed or imported, its settings are taken only as what a state
        can have, and memory is taken for the arrays that are in it, after they have been compared with the settings.

        Raises CheckpointError if it is truncated, damaged, forged, newer or no such file, and no other exception but
        BackendNotInstalled, without safetensors or for bfloat16 without ml_dtypes, and OSError if it cannot be opened.

        >>> import anybn, tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "bn.safetensors"
        >>> anybn.BatchNormState(3, momentum=None).save(path)
        >>> anybn.BatchNormState.load(path)
        BatchNormState(3, eps=1e-05, momentum=None) on numpy, 0 batches tracked
        """
        from anybn.checkpoints import files

        return BatchNormState._of_values(*files.load(path))

    @staticmethod
    def _of_values(settings: Mapping[str, Any], values: Mapping[str, Any]) -> BatchNormState:
        state = BatchNormState(**settings)
        with np.errstate(all="ignore"):  # a forged file's weight may be too wide for the dtype it tells
            state._store.fill(dict(values))
        return state

    def __repr__(self) -> str:
        settings = [str(self.num_features), f"eps={self.eps}", f"momentum={self.momentum}"]
        defaults: dict[str, Any] = dict.fromkeys(("affine", "scale", "bias", "track_running_stats"), True)
        defaults |= {"ddof": 1, "dtype": "float32"}
        held = self._settings() | {"dtype": self.dtype}
        settings += [f"{name}={held[name]!r}" for name, default in defaults.items() if held[name] != default]
        where = ""
        for array in self._arrays.held().values():
            try:
                where = f" on {backend_for(array).place(array)}"
            except TypeError:  # of jax.eval_shape, or whatever else a tree can hold
                return f"BatchNormState({', '.join(settings)}) of {type(array).__name__}"
        tracked = f", {self.num_batches_tracked} batches tracked" if self.track_running_stats else ""
        return f"BatchNormState({', '.join(settings)}){where}{tracked}"


def _flatten(state: BatchNormState) -> tuple[Any, tuple[Any, ...]]:
    return map(_leaf, state._arrays[:5]), state._store.settings()


def _leaf(array: Any) -> Any:
    """A state may come from another library into jax.jit, whose arrays JAX does not take: their values go in."""
    library = root_module(type(array))
    return backend_for(array).to_numpy(array) if library in libraries() and library not in ("numpy", "jax") else array


def _unflatten(settings: tuple[Any, ...], arrays: Any) -> BatchNormState:
    """No checks: JAX also unflattens placeholders that are no arrays."""
    return BatchNormState._over(Store.of(settings, Arrays(*arrays)))


_pytree.register(BatchNormState, LEAVES, _flatten, _unflatten)
