"""JAX arrays: the core, compiled, with a rule for its derivative that both modes of differentiation use."""

from __future__ import annotations

import weakref
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from anybn import _pytree
from anybn.backends._needs import needs
from anybn.backends.base import Backend
from anybn.core import formulas
from anybn.core.call import Array, Call, Gradients, Spec, Statistics

with needs("jax", pip="jax"):
    import jax
    import jax.extend.core
    import jax.numpy as jnp

    # where it is in JAX 0.5, and since
    _core = jax.extend.core if hasattr(jax.extend.core, "get_opaque_trace_state") else jax.core
    _opaque_trace_state = _core.get_opaque_trace_state

_pytree.register_with_jax()


class _Namespace:
    """jax.numpy, where 1 / sqrt(a) stays what it says: XLA makes it an approximate rsqrt, one unit off in float64."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    @staticmethod
    def sqrt(a: Array) -> Array:
        return jax.lax.optimization_barrier(jnp.sqrt(a))


_NAMESPACE = _Namespace()


#: Parts of an axis that are added at once.
_PARTS = 8


def _sum(xp: Any, a: Array, axes: tuple[int, ...]) -> Array:
    """A sum in an order that is written down, pairwise but for what is left of lengths that 8 does not divide.

    XLA's own sums are 1 unit of float32 off or 40, by its version and device; these were under 3 on 0.5.3, 0.8.3
    and 0.10.2, and take as long. Each round adds the eight parts of an axis as whole arrays, which compilers make
    vectors of. It ends in a barrier, since XLA would calculate a round again for each of its uses.
    """
    # Axes that lie side by side are one, for long loops; but not the first, which may be shared out over devices.
    shape, reduced = [a.shape[0]], [0 in axes]
    for i, size in enumerate(a.shape[1:], 1):
        if i > 1 and i in axes and reduced[-1]:
            shape[-1] *= size
        else:
            shape.append(size)
            reduced.append(i in axes)
    a = xp.reshape(a, shape)
    for axis in reversed([i for i, is_reduced in enumerate(reduced) if is_reduced]):
        while (size := a.shape[axis]) > 1:
            count = min(size, _PARTS)
            *parts, rest = xp.split(a, [size // count * i for i in range(1, count + 1)], axis=axis)
            while len(parts) > 1:
                odd = parts[len(parts) // 2 * 2 :]
                parts = [p + q for p, q in zip(parts[::2], parts[1::2], strict=False)] + odd
            a = jax.lax.optimization_barrier(xp.concat([*parts, rest], axis=axis))
        a = xp.sum(a, axis=axis)
    return a


def _current_trace() -> Any:
    return _opaque_trace_state(convention="anybn")


_NO_TRACE = _current_trace()
#: Of arrays made inside a trace, by their id: that trace. `vmap` does not trace what it does not batch.
_made_in: dict[int, Any] = {}


class JaxBackend(Backend):
    name = "jax"
    libraries = ("jax", "jaxlib")
    how = "the Array API core, compiled by XLA"
    writable = False
    sum = staticmethod(_sum)

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, (jax.Array, jax.core.Tracer))

    def module(self) -> ModuleType:
        return jnp

    def namespace(self, x: Array) -> _Namespace:
        return _NAMESPACE

    def version(self) -> str:
        return jax.__version__

    def device_of(self, x: Array) -> None:
        """JAX moves C-length arrays to where x is by itself, as long as nothing pins them to a device."""
        return None

    def device(self, name: str) -> None:
        if name and name not in (names := self.devices()) and name not in {n.partition(":")[0] for n in names}:
            raise ValueError(f"jax has no device {name!r}; it has {', '.join(names)}")
        return None

    def devices(self) -> list[str]:
        return [f"{device.platform}:{device.id}" for device in jax.devices()]

    def has_float64(self, device: Any) -> bool:
        return bool(jax.config.jax_enable_x64)

    def from_numpy(self, array: np.ndarray, device: Any) -> jax.Array:
        made = jnp.array(array)
        if (trace := _current_trace()) != _NO_TRACE:
            _made_in[id(made)] = trace
            weakref.finalize(made, _made_in.pop, id(made), None).atexit = False
        return made

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.array(x)

    def is_traced(self, x: Array) -> bool:
        return isinstance(_primal(x), jax.core.Tracer)

    def may_store(self, new: Array, old: Array) -> bool:
        """A tracer is good for one trace: only a state whose arrays already belong to that trace may hold it."""
        new, old = _primal(new), _primal(old)
        if not isinstance(new, jax.core.Tracer):
            return True
        return new._trace is old._trace if isinstance(old, jax.core.Tracer) else self.is_bound(old)

    def is_bound(self, x: Array) -> bool:
        return self.is_traced(x) or (id(x) in _made_in and _made_in[id(x)] == _current_trace())

    def lasts(self, x: Array) -> bool:
        return not isinstance(x, jax.core.Tracer)

    def device_name(self, x: Array) -> str:
        if self.is_traced(x):
            return ""
        device = min(x.devices(), key=lambda device: device.id)
        return f"{device.platform}:{device.id}"

    def detached(self, x: Array) -> Array:
        return _primal(x)

    def statistics(self, call: Call) -> Statistics:
        if call.group is not None:
            return super().statistics(call)
        return Statistics(*_batch_statistics(call.spec.axis, np.dtype(self.working_dtype(call.x)), call.x, call.mask))

    def evaluate(self, call: Call, statistics: Statistics) -> Array:
        return _evaluate(call.spec, _arrays(call), statistics._replace(count=None, m2=None))

    def gradients(
        self, call: Call, statistics: Statistics, dy: Array, active: Array | None, wants_residual: bool
    ) -> Gradients:
        if call.group is not None:
            return super().gradients(call, statistics, dy, active, wants_residual)
        return _gradients(call.spec, wants_residual, _arrays(call), statistics, dy, active)


def _arrays(call: Call) -> tuple[Array | None, ...]:
    """What a compiled function takes of a call: its spec goes beside them, and is static."""
    return call.x, call.weight, call.bias, call.residual, call.mask


def _of_arrays(spec: Spec, arrays: tuple[Array | None, ...]) -> Call:
    x, weight, bias, residual, mask = arrays
    return Call(x, spec, weight, bias, residual, mask)


@partial(jax.jit, static_argnums=(0, 1))
def _batch_statistics(axis: int, working: np.dtype, x: Array, mask: Array | None) -> tuple[Array | None, ...]:
    # XLA replaces a division by one number for all channels with a product with its reciprocal, which is not the same:
    # the count is an array behind a barrier, here and in what divides by it later.
    count = jnp.full(x.shape[axis], formulas.value_count(jnp, x, axis, mask, working))
    count = jax.lax.optimization_barrier(count)
    return count, *_moments(axis, working, x, mask, count)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _moments(axis: int, working: np.dtype, x: Array, mask: Array | None, count: Array) -> tuple[Array | None, ...]:
    call = Call(x, Spec(axis, 0.0), mask=mask)
    return tuple(formulas.batch_statistics(jnp, _sum, call, working, count)[1:])


@_moments.defjvp
def _moments_jvp(axis: int, working: np.dtype, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """``dmean = mean(dx)`` and ``dm2 = 2 sum((x - mean) dx)``: exact, where differentiating the corrected two-pass sum
    op by op would leave the rounding errors of terms that cancel. Linear in dx, so JAX transposes it for ``grad``, and
    itself differentiable, so that ``hessian``, ``jacfwd`` and ``jvp`` work, which ``custom_vjp`` would rule out.
    """
    x, mask, count = primals
    dx = tangents[0].astype(working)
    mean, shift, var, m2 = _moments(axis, working, x, mask, count)
    deviation = formulas.centered(jnp, x, Statistics(None, mean, shift, var), axis)
    if mask is not None:
        dx, deviation = jnp.where(mask, dx, 0), jnp.where(mask, deviation, 0)
    axes, n = formulas.reduced_axes(x.ndim, axis), formulas.divisor(jnp, count, working)
    # XLA's own sums: `grad` only transposes them, to a broadcast, where those of `_sum` become eight paddings.
    dm2 = 2 * jnp.sum(deviation * dx, axis=axes)
    dshift = None if shift is None else jnp.zeros_like(shift)
    return (mean, shift, var, m2), (jnp.sum(dx, axis=axes) / n, dshift, dm2 / n, dm2)


@partial(jax.jit, static_argnums=0)
def _evaluate(spec: Spec, arrays: tuple[Array | None, ...], statistics: Statistics) -> Array:
    return formulas.normalize(_NAMESPACE, _of_arrays(spec, arrays), statistics)


@partial(jax.jit, static_argnums=(0, 1))
def _gradients(
    spec: Spec,
    wants_residual: bool,
    arrays: tuple[Array | None, ...],
    statistics: Statistics,
    dy: Array,
    active: Array | None,
) -> Gradients:
    call = _of_arrays(spec, arrays)
    return formulas.gradients(_NAMESPACE, _sum, call, statistics, dy, active, wants_residual)


def _primal(x: Array) -> Array:
    """The value under the tracers of ``grad`` and ``jvp``; a Tracer only if it has none yet (``jit``, ``vmap``)."""
    while isinstance(x, jax.core.Tracer) and hasattr(x, "primal"):
        x = x.primal
    return x
