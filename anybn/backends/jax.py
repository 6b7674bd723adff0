"""JAX arrays: the core, compiled, with a rule for its derivative that both modes of differentiation use."""

from __future__ import annotations

import weakref
from functools import partial
from types import ModuleType
from typing import Any, cast

import numpy as np

from anybn import _pytree
from anybn.backends._needs import needs
from anybn.backends.base import Backend
from anybn.core import formulas
from anybn.core.call import Array, Call, Gradients, Spec, Statistics, Update

with needs("jax", pip="jax"):
    import jax
    import jax.extend.core
    import jax.numpy as jnp

    from anybn.backends import _jax_sums

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


def _sum(_: Any, a: Array, axes: tuple[int, ...]) -> Array:
    """Over all axes but one, pairwise. XLA's own sums are 1 unit of float32 off or 40, by its version and device."""
    if a.size == 0:
        return jnp.sum(a, axis=axes)
    (axis,) = set(range(a.ndim)).difference(axes)
    return jnp.reshape(_jax_sums.channel_sums(lambda part: part, _jax_sums.on_four_axes(a, axis)), (-1,))


def _current_trace() -> Any:
    return _opaque_trace_state(convention="anybn")


_NO_TRACE = _current_trace()
#: Of arrays made inside a trace, by their id: that trace. `vmap` does not trace what it does not batch.
_made_in: dict[int, Any] = {}


def _made_here(x: Array) -> bool:
    return id(x) in _made_in and _made_in[id(x)] == _current_trace()


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
        return (isinstance(old, jax.core.Tracer) and new._trace is old._trace) or _made_here(old)

    def is_bound(self, x: Array) -> bool:
        return self.is_traced(x) or _made_here(x)

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
        return _statistics(call.spec.axis, self._working(call), call.x, call.mask)

    def train(self, call: Call) -> tuple[Array, Statistics, tuple[Array, Array] | None]:
        if call.group is not None:
            return super().train(call)
        fuses = call.update is not None and not self.has_float64(None)
        settings, learned = _of_update(cast(Update, call.update)) if fuses else (None, ())
        y, statistics, running = _train(call.spec, self._working(call), settings, _arrays(call), learned)
        return y, statistics, running and (_primal(running[0]), _primal(running[1]))

    def update(self, update: Update, statistics: Statistics) -> tuple[Array, Array]:
        """Compiled only without float64: XLA rounds ``a * b + c * d`` once less than others, whose bits float64 has."""
        if self.has_float64(None):
            return super().update(update, statistics)
        settings, learned = _of_update(update)
        return _updated(settings, learned, Statistics(*map(self.detached, statistics)))

    def _working(self, call: Call) -> np.dtype:
        return np.dtype(self.working_dtype(call.x))

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


def _counts(axis: int, working: np.dtype, x: Array, mask: Array | None) -> Array:
    """XLA replaces a division by one number for all channels with a product with its reciprocal, which is not the same:
    the count is an array behind a barrier, here and in what divides by it later."""
    return jax.lax.optimization_barrier(jnp.full(x.shape[axis], formulas.value_count(jnp, x, axis, mask, working)))


@partial(jax.jit, static_argnums=(0, 1))
def _statistics(axis: int, working: np.dtype, x: Array, mask: Array | None) -> Statistics:
    count = _counts(axis, working, x, mask)
    return _moments(axis, working, x, mask, count)._replace(count=count)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _moments(axis: int, working: np.dtype, x: Array, mask: Array | None, count: Array) -> Statistics:
    """Without the count: integers have no derivative."""
    if mask is None and not formulas.is_wide(working, x):
        found = _jax_sums.batch_statistics(x, axis, working, count)
    else:
        found = formulas.batch_statistics(jnp, _sum, Call(x, Spec(axis, 0.0), mask=mask), working, count)
    return found._replace(count=None)


@_moments.defjvp
def _moments_jvp(axis: int, working: np.dtype, primals: Any, tangents: Any) -> tuple[Any, Any]:
    x, mask, count = primals
    statistics = _moments(axis, working, x, mask, count)
    return statistics, _tangents_of_moments(Call(x, Spec(axis, 0.0), mask=mask), statistics, count, tangents[0])


def _tangents_of_moments(call: Call, statistics: Statistics, count: Array, dx: Array) -> Statistics:
    """``dmean = mean(dx)`` and ``dm2 = 2 sum((x - mean) dx)``: exact, where differentiating the corrected sums op by op
    would leave the rounding errors of terms that cancel. Linear in dx, so JAX transposes it for ``grad``, and itself
    differentiable, so that ``hessian``, ``jacfwd`` and ``jvp`` work, which ``custom_vjp`` would rule out.
    """
    (_, mean, shift, _, _, scale, _), (x, spec, *_) = statistics, call
    axes, n = formulas.reduced_axes(x.ndim, spec.axis), formulas.divisor(jnp, count, mean.dtype)
    dx, deviation = _where_counted(call, dx.astype(mean.dtype), formulas.centered(jnp, x, statistics, spec.axis))
    # XLA's own sums: `grad` only transposes them, to a broadcast, where those of `_sum` become paddings.
    dmean, dm2 = jnp.sum(dx, axis=axes) / n, 2 * jnp.sum(deviation * dx, axis=axes)
    zero = None if shift is None else jnp.zeros_like(shift)
    if scale is None:
        return Statistics(None, dmean, zero, dm2 / n, dm2)
    dvar = 2 * jnp.sum(deviation * formulas.along(jnp, scale, spec.axis, x.ndim) * dx, axis=axes) * scale / n
    return Statistics(None, dmean, zero, dm2 / n, dm2, jnp.zeros_like(scale), dvar)


def _where_counted(call: Call, *arrays: Array) -> tuple[Array, ...]:
    return tuple(a if call.mask is None else jnp.where(call.mask, a, 0) for a in arrays)


def _of_update(update: Update) -> tuple[tuple[int, bool], tuple[Any, ...]]:
    """What is static of an update, and what is not: momentum changes with each batch where it is a cumulative average.

    ``1 - momentum`` goes beside it, since float32 would lose digits of it.
    """
    mean, var, momentum, ddof, propagate = update
    assert momentum is not None
    return (ddof, propagate), (mean, var, momentum, 1.0 - momentum)


@partial(jax.jit, static_argnums=0)
def _updated(settings: tuple[int, bool], learned: tuple[Any, ...], statistics: Statistics) -> tuple[Array, Array]:
    mean, var, momentum, kept = learned
    return formulas.updated_running_statistics(jnp, Update(mean, var, momentum, *settings), statistics, kept)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _train(
    spec: Spec,
    working: np.dtype,
    settings: tuple[int, bool] | None,
    arrays: tuple[Array | None, ...],
    learned: tuple[Any, ...],
) -> tuple[Array, Statistics, tuple[Array, Array] | None]:
    count = _counts(spec.axis, working, arrays[0], arrays[-1])
    y, statistics = _normalized(spec, working, arrays, count)
    statistics = statistics._replace(count=count)
    if settings is None:
        return y, statistics, None
    return y, statistics, _updated(settings, learned, jax.lax.stop_gradient(statistics))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _normalized(spec: Spec, working: np.dtype, arrays: Any, count: Array) -> tuple[Array, Statistics]:
    call = _of_arrays(spec, arrays)
    statistics = _moments(spec.axis, working, call.x, call.mask, count)
    return formulas.normalize(_NAMESPACE, call, statistics), statistics


@_normalized.defjvp
def _normalized_jvp(spec: Spec, working: np.dtype, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """``dy = w (dx - mean(dx) - xhat mean(xhat dx)) + xhat dweight + dbias``, with ``w = weight * rstd``.

    Put together so that its transpose, which ``grad`` runs, has two sums, of dy and of ``dy * xhat``. No product leaves
    the range of the dtype where the variance does.
    """
    (arrays, count), (dx, dweight, dbias, dresidual, _) = primals, tangents[0]
    call = _of_arrays(spec, arrays)
    y, statistics = _normalized(spec, working, *primals)
    x, axes = call.x, formulas.reduced_axes(call.x.ndim, spec.axis)
    along = partial(formulas.along, jnp, axis=spec.axis, ndim=x.ndim)
    n = formulas.divisor(jnp, count, working)
    rstd = formulas.reciprocal_std(_NAMESPACE, statistics, spec.eps)
    w = rstd if call.weight is None else rstd * call.weight.astype(working)
    xhat = formulas.centered(jnp, x, statistics, spec.axis) * along(rstd)
    dx_there, xhat = _where_counted(call, dx.astype(working), xhat)
    constant, factor = -w * (jnp.sum(dx_there, axis=axes) / n), -w * (jnp.sum(xhat * dx_there, axis=axes) / n)
    if call.weight is not None:
        factor = factor + dweight.astype(working)
    if call.bias is not None:
        constant = constant + dbias.astype(working)
    dy = along(w) * dx_there + along(constant) + xhat * along(factor)
    if call.residual is not None:
        dy = dy + dresidual.astype(working)
    (dy,) = _where_counted(call, dy)
    if spec.relu:
        dy = jnp.where(y > 0, dy, 0)
    return (y, statistics), (dy.astype(x.dtype), _tangents_of_moments(call, statistics, count, dx))


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
