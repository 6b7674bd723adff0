"""What a backend is, and what it inherits: every operation through the Array API core."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

import array_api_compat
import numpy as np

from anybn._settings import DTYPES
from anybn.core import formulas
from anybn.core.call import Array, Call, Gradients, Spec, Statistics, Update, root_module
from anybn.groups import exchange


def _name_of(device: Any) -> str:
    """``"device1"`` for ``array_api_strict.Device('device1')``; for most libraries' devices, their str."""
    if device is None:
        return "default"
    quoted = str(device).split("'")
    return quoted[1] if len(quoted) == 3 else quoted[0]


def beside_values(array_type: type) -> str:
    """What arrays of this type carry that batch norm would lose, and the way out; or "".

    A mask or a unit that is an attribute, as in numpy.ma, marray, astropy, pint and unyt, but not a method of this
    name, as in pandas; and torch's MaskedTensor.
    """
    return _beside_values(array_type)  # type: ignore[arg-type] # a type is hashable


@functools.lru_cache(maxsize=256)
def _beside_values(array_type: type) -> str:

    def carries(*attributes: str) -> bool:
        return any(hasattr(array_type, a) and not callable(getattr(array_type, a)) for a in attributes)

    plain = next((a for a in ("unmasked", "value", "magnitude", "get_data") if hasattr(array_type, a)), "data")
    plain += "()" * (plain == "get_data")
    if carries("mask") or hasattr(array_type, "get_mask"):
        return (
            f"whose mask would be lost: pass its .{plain}, and as mask= the positions that count, which are False in "
            "its own mask; where they differ between channels, anybn.moments takes them in x's shape"
        )
    if carries("unit", "units"):
        return f"whose unit would be lost: pass its .{plain}, in the same unit every time"
    return ""


class Backend:
    """Batch norm for the arrays of one library.

    A subclass sets ``name`` and, where the library's arrays have another type module, ``libraries``. Everything else
    works as inherited for any library that follows the Array API standard, and may be overridden. Laws:

    - No method changes its arguments, except ``out``.
    - ``from_numpy(to_numpy(a), device_of(a))`` equals ``a``.
    - Results lie in the library and on the device of x.
    """

    name: ClassVar[str]
    #: Root modules of the array types this backend owns: ``("jax", "jaxlib")``.
    libraries: ClassVar[tuple[str, ...]]
    #: How the work is done, for ``python -m anybn info``.
    how: ClassVar[str] = "the Array API core"
    #: A module of anybn that is imported with the backend: it tells the layers above of the library's compiler.
    companion: ClassVar[str] = ""
    #: False where arrays cannot be written to, so that ``out=`` is refused.
    writable: ClassVar[bool] = True

    # -- arrays ------------------------------------------------------------------------------------------------

    def owns(self, array_type: type) -> bool:
        """Whether arrays of this type are this backend's; decided by the type alone, so that it can be remembered."""
        return any(root_module(cls) in self.libraries for cls in array_type.__mro__) and not beside_values(array_type)

    def holds(self, array: Array, device: Any) -> bool:
        """Whether this is an array of this backend on this device."""
        return self.owns(type(array)) and bool(self.device_of(array) == device)

    def refusal(self, x: Array) -> str:
        """Why this array of the library cannot be normalized ("has ..., "), and what to do; or ""."""
        return ""

    def are_plain(self, *arrays: Array | None) -> bool:
        """Whether these, but for None, are arrays as they mostly are, of which the shapes alone need a check."""
        return False

    def namespace(self, x: Array) -> Any:
        """The functions of the Array API for x."""
        return array_api_compat.array_namespace(x)

    def device_of(self, x: Array) -> Any:
        """Where x lies, as something that compares equal for the same place; None where arrays do not say."""
        try:
            return array_api_compat.device(x)
        except AttributeError:
            return None

    def device(self, name: str) -> Any:
        """The device called ``name`` in ``state.to("library:name")``; the default one for ``""``."""
        if not name:
            return self.device_of(self.module().asarray([0.0]))
        for device in self._devices():
            if name == _name_of(device):
                return device
        raise ValueError(f"{self.name} has no device {name!r}; it has {', '.join(self.devices())}")

    def module(self) -> Any:
        """The Array API namespace of the library, without an array at hand."""
        return importlib.import_module(self.libraries[0])

    def devices(self) -> list[str]:
        """The devices that can be used, for ``anybn.backends()``."""
        return [_name_of(device) for device in self._devices()]

    def problem(self) -> str:
        """Why nothing can be computed here, though the library is installed; or ""."""
        return "" if self.devices() else "it finds no device to run on"

    def _devices(self) -> Sequence[Any]:
        """Those that the library tells; the default one where it does not (before 2023.12), or its arrays have none."""
        default = self.device("")
        info = getattr(self.module(), "__array_namespace_info__", None)
        return [default] if info is None or default is None else info().devices()

    def version(self) -> str:
        """The library's version, for ``anybn.backends()``."""
        return str(getattr(importlib.import_module(self.libraries[0]), "__version__", "unknown"))

    def has_float64(self, device: Any) -> bool:
        """Whether arrays on this device can be float64."""
        info = getattr(self.module(), "__array_namespace_info__", None)
        if info is None:
            return hasattr(self.module(), "float64")
        return "float64" in info().dtypes(device=device, kind="real floating")

    def dtype(self, name: str) -> Any:
        """The library's dtype called ``"float32"``. Raises TypeError where it has none of this name."""
        if (dtype := getattr(self.module(), name, None)) is None:
            raise TypeError(f"{self.name} has no {name}: use float32")
        return dtype

    def from_numpy(self, array: np.ndarray, device: Any) -> Array:
        """A copy of a NumPy array on this backend's device."""
        options = {} if device is None else {"device": device}
        if array.dtype.name in DTYPES:  # else a library may narrow it, as MLX does float64
            options["dtype"] = self.dtype(array.dtype.name)
        return self.module().asarray(array, copy=True, **options)

    def to_numpy(self, x: Array) -> np.ndarray:
        """A copy of x in NumPy. Raises TypeError where x gives its values to nobody."""
        device, default = self.device_of(x), self.device("")
        if device != default:
            x = array_api_compat.to_device(x, default)
        try:
            values = np.array(x if hasattr(x, "__array__") else np.from_dlpack(x))
            if values.dtype != object:  # what NumPy makes of what it cannot read
                return values
            problem = "NumPy makes objects of it"
        except Exception as error:  # BufferError, or what the library has for it
            problem = f"{type(error).__name__}: {error}"
        raise TypeError(
            f"a {self.name} array cannot be brought to NumPy, by neither __array__ nor __dlpack__ ({problem}): "
            "register a backend for it that overrides to_numpy, see anybn.backends"
        )

    def is_traced(self, x: Array) -> bool:
        """True if x has no values yet (``jax.jit``, Dask), so that nothing may depend on them."""
        return False

    def detached(self, x: Array) -> Array:
        """x as a constant for the library's automatic differentiation."""
        return x

    def copy(self, x: Array) -> Array:
        """An independent copy, constant for automatic differentiation."""
        return self.namespace(x).asarray(self.detached(x), copy=True)

    def twin(self, x: Array) -> Array:
        """An independent copy that can be trained if x can."""
        return self.copy(x)

    def watch(self, x: Array) -> Callable[[], Any] | None:
        """A function whose result is another once x has been written to; None for what cannot be."""
        return (lambda: self.to_numpy(x).tobytes()) if self.writable else None

    def lasts(self, x: Array) -> bool:
        """Whether x, made during a call, may be kept after it: not if it means something only inside a trace."""
        return True

    def is_bound(self, x: Array) -> bool:
        """Whether x belongs to a trace that is under way: a state that holds x can hold what is traced there."""
        return False

    def moved(self, x: Array, device: Any) -> Array:
        """x on another device of the library; differentiable where the library is."""
        return self.from_numpy(self.to_numpy(x), device)

    def is_trained(self, x: Array) -> bool:
        """Whether somebody may hold x to change it, as optimizers do, so that nothing else can take its place."""
        return False

    def relocated(self, x: Array, device: Any) -> Array:
        """`moved`, for an x that `is_trained`: x itself where the library can."""
        return self.moved(x, device)

    def refilled(self, old: Array, new: Array) -> Array:
        """new, or old filled with its values where others hold on to old, as optimizers do to torch's Parameters."""
        return new

    def frozen(self, x: Array) -> Array:
        """x, made by us, as an array that cannot be written to, where the library has such."""
        return x

    def place(self, x: Array) -> str:
        """Where x lies, as ``state.to`` takes it."""
        device = self.device_of(x)
        return self.name if device is None or str(device) == "cpu" else f"{self.name}:{_name_of(device)}"

    def device_name(self, x: Array) -> str:
        """Where x lies within the library, as `device` takes it."""
        device = self.device_of(x)
        return "" if device is None else _name_of(device)

    def may_store(self, new: Array, old: Array) -> bool:
        """Whether a state may hold new in place of old after the call: not if new means something only inside it."""
        return True

    def write_problem(self, out: Array) -> str:
        """Why out cannot be written to, and what to do; or ""."""
        return ""

    def no_grad(self) -> AbstractContextManager[Any]:
        """Turns the library's recording of gradients off, where it records eagerly; and its warnings about NaN."""
        return np.errstate(all="ignore")

    def records(self, *arrays: Array | None) -> bool:
        """True if the library's automatic differentiation would record an operation on these arrays."""
        return False

    def recomputes(self) -> bool:
        """True if this call is a repetition inside a backward pass, which the running statistics must not count."""
        return False

    def overlaps(self, a: Array, b: Array) -> bool:
        """True if a and b may share memory."""
        return a is b

    def overlaps_any(self, x: Array, others: tuple[Array | None, ...]) -> bool:
        """`overlaps`, of x with any of the others that are this library's; in every call with what the state holds."""
        cls = type(x)
        return any(a is not None and (type(a) is cls or self.owns(type(a))) and self.overlaps(x, a) for a in others)

    def same_memory(self, a: Array, b: Array) -> bool:
        """True if a and b are the same elements of the same memory in the same order."""
        return a is b

    # -- batch norm --------------------------------------------------------------------------------------------

    sum: Callable[[Any, Array, tuple[int, ...]], Array] = staticmethod(formulas.blocked_sum)

    def working_dtype(self, x: Array) -> Any:
        """What statistics and arithmetic are in: float64 where x's device has it, else float32."""
        return self.dtype("float64" if self.has_float64(self.device_of(x)) else "float32")

    def statistics(self, call: Call) -> Statistics:
        """Mean and biased variance of each channel of x, which is not empty; of all members of a group, whose x may be.

        Differentiable in x where the library is.
        """
        if call.group is not None:
            return exchange.batch_statistics(self, call)
        with np.errstate(all="ignore"):
            return formulas.batch_statistics(self.namespace(call.x), self.sum, call, self.working_dtype(call.x))

    def train(self, call: Call) -> tuple[Array, Statistics, tuple[Array, Array] | None]:
        """Normalize x with its own statistics: (y, statistics, the updated running mean and variance).

        The last are those of ``call.update``, new arrays, where the same pass gives them; else None, and `update` is
        asked. Differentiable in x, weight, bias and residual where the library is.
        """
        statistics = self.statistics(call)
        return self.evaluate(call, statistics), statistics, None

    def evaluate(self, call: Call, statistics: Statistics) -> Array:
        """Normalize x with given statistics. Differentiable in x, weight, bias and residual where the library is."""
        with np.errstate(all="ignore"):
            y = formulas.normalize(self.namespace(call.x), call, statistics)
        if call.out is None:
            return y
        call.out[...] = y
        return call.out

    def evaluate_at_once(
        self, x: Array, arrays: tuple[Any, ...], channels: int, axis: int, eps: float, relu: bool
    ) -> Array | None:
        """y with the weight, bias, running mean and variance that a state has, of which nothing has been checked.

        None, with nothing done, for whatever is special or wrong: that is checked, and goes the way of all calls. For
        backends whose arrays can be normalized in less time than the checks take.
        """
        return None

    def gradients(
        self, call: Call, statistics: Statistics, dy: Array, active: Array | None, wants_residual: bool
    ) -> Gradients:
        """See `anybn.core.formulas.gradients`; in a group, through the statistics of all members.

        ``call.weight`` and ``call.bias`` say which gradients are wanted, in which dtypes; bias's values are not read.
        """
        over = None if call.group is None else partial(exchange.sums, self, call.group.group)
        xp = self.namespace(call.x)
        with np.errstate(all="ignore"):
            return formulas.gradients(xp, self.sum, call, statistics, dy, active, wants_residual, over)

    def update(self, update: Update, statistics: Statistics) -> tuple[Array, Array]:
        """The updated running mean and variance: new arrays, constant for automatic differentiation."""
        with self.no_grad(), np.errstate(all="ignore"):
            statistics = Statistics(*map(self.detached, statistics))
            xp = self.namespace(update.running_mean)
            return formulas.updated_running_statistics(xp, update, statistics)

    # -- norms of rows -----------------------------------------------------------------------------------------

    def normalize_rows(self, call: Call) -> tuple[Array, Statistics]:
        """Normalize the rows of x, which is not empty, then scale and shift it by weight and bias, of P values each.

        ``call.spec`` is a `RowSpec`. The rows are batch norm's channels. Weight and bias can be too if each row has but
        one; else they are applied in the working dtype before the only rounding. Differentiable in x, weight and bias
        where the library is.
        """
        x, spec, weight, bias = call[:4]
        xp, plain, (samples, parameters, length) = self.namespace(x), Spec(1, spec.eps), spec.shape
        if bias is None if weight is None else spec.values == length:
            weight, bias = (
                None if a is None else xp.reshape(xp.broadcast_to(a, (samples, parameters)), (-1,))
                for a in (weight, bias)
            )
            y, statistics, _ = self.train(Call(formulas.in_rows(xp, x, spec), plain, weight, bias))
            return xp.reshape(formulas.from_rows(xp, y, spec), x.shape), statistics
        with np.errstate(all="ignore"):
            rows = formulas.in_rows(xp, xp.astype(x, self.working_dtype(x)), spec)
            xhat, statistics, _ = self.train(Call(rows, plain))
            y = formulas.scaled(xp, formulas.from_rows(xp, xhat, spec), weight, bias)
            return formulas.rounded_to(xp, xp.reshape(y, x.shape), x.dtype), statistics

    def normalize_plain_rows(self, call: Call) -> tuple[Array, Statistics]:
        """`normalize_rows` of x, weight and bias that `are_plain`."""
        return self.normalize_rows(call)

    def row_gradients(self, call: Call, statistics: Statistics, dy: Array) -> Gradients:
        """The gradients of `normalize_rows`, with its statistics; None for a weight or bias that was not given."""
        x, spec, weight, bias = call[:4]
        xp, working, plain = self.namespace(x), self.working_dtype(x), Spec(1, spec.eps)
        dweight = dbias = None
        with np.errstate(all="ignore"):
            rows = Call(formulas.in_rows(xp, xp.astype(x, working), spec), plain)
            statistics = statistics._replace(count=rows.x.shape[2])  # kernels count no negatives
            dy = xp.reshape(xp.astype(dy, working), spec.shape)
            dxhat = formulas.in_rows(xp, formulas.scaled(xp, dy, weight, None), spec)
            dx = formulas.from_rows(xp, self.gradients(rows, statistics, dxhat, None, False).x, spec)
            if weight is not None:
                xhat = self.evaluate(rows, statistics)
                dweight = self.sum(xp, dy * formulas.from_rows(xp, xhat, spec), (0, 2))
                dweight = formulas.rounded_to(xp, xp.reshape(dweight, weight.shape), weight.dtype)
            if bias is not None:
                dbias = self.sum(xp, dy, (0, 2))
                dbias = formulas.rounded_to(xp, xp.reshape(dbias, bias.shape), bias.dtype)
            return Gradients(formulas.rounded_to(xp, xp.reshape(dx, x.shape), x.dtype), dweight, dbias, None)

    # -- groups of processes -----------------------------------------------------------------------------------

    def all_reduce_sum(self, group: Any, array: Array) -> Array:
        """The sum of the members' arrays. Differentiable where the library is: its derivative is the same sum."""
        return group.all_reduce_sum(array)
