"""Batch norm with its switches apart: which statistics normalize, whether the running ones learn, whether weights do.

`anybn.batch_norm` sets all three with ``training``; here they are separate, and batches can be split (ghost batch norm)
or corrected towards the running statistics (batch renormalization). The core, the state and the backends are the same.

>>> import numpy as np, anybn
>>> from anybn import variants
>>> state = anybn.BatchNormState(2)
>>> x = np.random.default_rng(0).normal(5, 2, (64, 2))
>>> y = variants.batch_norm(x, state, statistics="running", update=True)  # frozen for y, yet they follow the data
>>> bool(np.all(np.abs(y - x) < 1e-4)), state.num_batches_tracked
(True, 1)
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from anybn import _checks, _settings
from anybn._functional import Checked, check, finish, given_statistics
from anybn._settings import Activation, NonFinite
from anybn.backends.base import Backend
from anybn.backends.registry import backend_for
from anybn.core import formulas
from anybn.core.call import Array, ArrayT, Call, Gradients, Statistics
from anybn.core.moments import merged
from anybn.state.state import BatchNormState

__all__ = ["batch_norm", "batch_norm_vjp", "renorm_limits"]


def batch_norm(
    x: ArrayT,
    state: BatchNormState,
    *,
    statistics: Literal["batch", "running"] = "batch",
    update: bool = True,
    train_weights: bool = True,
    virtual_batch_size: int | None = None,
    renorm: tuple[float, float] | None = None,
    axis: int = 1,
    mask: Array | None = None,
    residual: Array | None = None,
    activation: Activation = None,
    nonfinite: NonFinite = "skip",
) -> ArrayT:
    """`anybn.batch_norm` with separate switches; the defaults are its ``training=True``.

    Args:
        x, state, axis, mask, residual, activation, nonfinite: as in `anybn.batch_norm`. The batch is on axis 0, or on
            axis 1 where the channels are on 0.
        statistics: what x is normalized with: "batch", its own, or "running", the state's from before this call, which
            are constants in the backward pass. Fine-tuning with frozen statistics is "running" and ``update=False``.
        update: whether the batch's statistics go into the running ones; False for the generator's step of a GAN.
        train_weights: False makes weight and bias constants in the backward pass.
        virtual_batch_size: ghost batch norm (Hoffer, Hubara & Soudry 2017): every so many samples, in order, are
            normalized by themselves, in one call, without a loop; a divisor of N. The running statistics learn those
            of the whole batch, from merged moments, in one step; Hoffer et al. take a step for each part. Each needs 2
            values per channel that a mask leaves.
        renorm: ``(r_max, d_max)``, batch renormalization (Ioffe 2017), with ``sigma = sqrt(var + eps)``::

                y = activation(((x - mean) / sigma * r + d) * weight + bias + residual)
                r = clip(sigma / running_sigma, 1 / r_max, r_max)    constants in
                d = clip((mean - running_mean) / running_sigma, -d_max, d_max)   the backward pass

            ``(1, 0)`` is batch norm; with infinite limits y is what evaluation gives, but with batch norm's gradient.
            `renorm_limits` is the paper's schedule. The paper averages sigma; the state averages the variance.

    Returns y, differentiable as in `anybn.batch_norm`. Raises what that does, with the state as it was; ValueError also
    for switches that contradict one another.

    >>> import numpy as np, anybn
    >>> from anybn import variants
    >>> x = np.array([[1.0], [3.0], [10.0], [30.0]])
    >>> variants.batch_norm(x, anybn.BatchNormState(1), virtual_batch_size=2).round(3).T
    array([[-1.,  1., -1.,  1.]])
    """
    options = _Options(statistics, update, train_weights, virtual_batch_size, renorm)
    return _run(x, state, options, axis, mask, residual, activation, nonfinite).y


def batch_norm_vjp(
    x: ArrayT,
    state: BatchNormState,
    *,
    statistics: Literal["batch", "running"] = "batch",
    update: bool = True,
    train_weights: bool = True,
    virtual_batch_size: int | None = None,
    renorm: tuple[float, float] | None = None,
    axis: int = 1,
    mask: Array | None = None,
    residual: Array | None = None,
    activation: Activation = None,
    nonfinite: NonFinite = "skip",
) -> tuple[ArrayT, Callable[[Array], Gradients]]:
    """`batch_norm` of this module and its gradient, for libraries without automatic differentiation.

    Returns (y, pullback) as `anybn.batch_norm_vjp` does; the gradients of weight and bias are None where they are not
    trained.

    In a GAN, the step of the generator goes through the discriminator, whose running statistics must not learn the
    generated images a second time: ``update=False`` normalizes with the batch's own statistics and leaves the state.

    >>> import numpy as np, anybn
    >>> from anybn import variants
    >>> discriminator, images = anybn.BatchNormState(2), np.random.default_rng(0).normal(3, 1, (16, 2))
    >>> y, pullback = anybn.batch_norm_vjp(images, discriminator, training=True)  # its own step
    >>> y, pullback = variants.batch_norm_vjp(images, discriminator, update=False)  # the generator's
    >>> discriminator.num_batches_tracked
    1

    Fine-tuning with frozen statistics is ``statistics="running", update=False``:

    >>> x = np.array([[1.0], [3.0]])
    >>> y, pullback = variants.batch_norm_vjp(x, anybn.BatchNormState(1), statistics="running", update=False)
    >>> pullback(np.ones_like(x)).x.round(3).T  # nothing flows through the statistics
    array([[1., 1.]])
    """
    backend = backend_for(x)
    options = _Options(statistics, update, train_weights, virtual_batch_size, renorm)
    with backend.no_grad():
        done = _run(x, state, options, axis, mask, residual, activation, nonfinite)
        active = done.y > 0 if done.checked.call.spec.relu else None
    call, ghosts = done.checked.call, done.ghosts
    xp, shape = backend.namespace(x), _checks.shape_of(x)

    def pullback(dy: Array) -> Gradients:
        """Gradients(x, weight, bias, residual) for the gradient dy of y."""
        _checks.as_it_was("x", x, shape)
        _checks.state_arrays((call.weight,), shape[call.spec.axis])
        _checks.like_x("dy", _checks.floating_array("dy", dy, backend_for(dy, "dy")), x, backend)
        with backend.no_grad():
            parts, dparts, active_parts, mask_parts = (ghosts.split(xp, a) for a in (x, dy, active, call.mask))
            of_parts = Call(parts, call.spec._replace(axis=ghosts.axis), *done.parameters, mask=mask_parts)
            grads = backend.gradients(of_parts, done.statistics, dparts, active_parts, residual is not None)
            dx, dresidual = (ghosts.joined(xp, a) for a in (grads.x, grads.residual))
            if not train_weights:
                return Gradients(dx, None, None, dresidual)
            dweight, dbias = grads.weight, grads.bias
            if done.correction is not None:  # of the weight that was used, weight * r, and the bias, bias + weight * d
                r, d = done.correction
                dweight = dweight * r + dbias * d
            sums = (None if a is None else ghosts.total(xp, a) for a in (dweight, dbias))
            return Gradients(dx, *formulas.parameter_gradients(xp, call, *sums), dresidual)

    return done.y, pullback


def renorm_limits(
    step: int,
    *,
    start: int = 5_000,
    r_max: float = 3.0,
    r_end: int = 40_000,
    d_max: float = 5.0,
    d_end: int = 25_000,
) -> tuple[float, float]:
    """(r_max, d_max) after so many steps: (1, 0), which is batch norm, until start, then linear to their final values.

    The defaults are the paper's (Ioffe 2017, section 4). Raises ValueError if an end is not after the start.

    >>> from anybn import variants
    >>> [variants.renorm_limits(step) for step in (0, 5_000, 15_000, 100_000)]
    [(1.0, 0.0), (1.0, 0.0), (1.5714285714285714, 2.5), (3.0, 5.0)]
    """
    for name, end in (("r_end", r_end), ("d_end", d_end)):
        if end <= start:
            raise ValueError(f"{name} is {end} and start {start}: the limits grow between them, so it must be later")
    r_grown, d_grown = (min(max((step - start) / (end - start), 0.0), 1.0) for end in (r_end, d_end))
    return 1.0 + (r_max - 1.0) * r_grown, d_max * d_grown


class _Ghosts(NamedTuple):
    """How x is split: the channels of all virtual batches side by side, ``virtual * C`` channels of fewer samples."""

    virtual: int
    """virtual batches; 1: x as it is."""
    shape: tuple[int, ...]
    """x's, with the batch axis as (virtual, samples)."""
    order: tuple[int, ...]
    """of these axes, with virtual before the channels, whose index is then"""
    axis: int

    def split(self, xp: Any, a: Array | None) -> Array | None:
        """a of x's shape, or a mask that broadcasts to it."""
        if self.virtual == 1 or a is None:
            return a
        a = xp.permute_dims(xp.reshape(xp.broadcast_to(a, self.whole), self.shape), self.order)
        return xp.reshape(a, (*a.shape[: self.axis], -1, *a.shape[self.axis + 2 :]))

    def joined(self, xp: Any, a: Array | None) -> Array | None:
        """What `split` made, in x's shape again."""
        if self.virtual == 1 or a is None:
            return a
        a = xp.reshape(a, tuple(self.shape[i] for i in self.order))
        a = xp.permute_dims(a, tuple(map(self.order.index, range(len(self.order)))))
        return xp.reshape(a, self.whole)

    @property
    def whole(self) -> tuple[int, ...]:
        """x's shape."""
        if self.virtual == 1:
            return self.shape
        batch = self.order[self.axis]
        return (*self.shape[:batch], self.virtual * self.shape[batch + 1], *self.shape[batch + 2 :])

    def tiled(self, xp: Any, channel: Array) -> Array:
        """(C,) -> (virtual * C,)."""
        if self.virtual == 1:
            return channel
        return xp.reshape(xp.broadcast_to(channel, (self.virtual, *channel.shape)), (-1,))

    def total(self, xp: Any, channel: Array) -> Array:
        """(virtual * C,) -> (C,)."""
        return channel if self.virtual == 1 else xp.sum(xp.reshape(channel, (self.virtual, -1)), axis=0)

    def merged(self, xp: Any, s: Statistics) -> Statistics:
        """Of the whole batch, from those of its parts."""
        if self.virtual == 1 or s.m2 is None:
            return s
        mean, m2 = (xp.reshape(a, (self.virtual, -1)) for a in (s.mean, s.m2))
        shift = None if s.shift is None else xp.reshape(s.shift, (self.virtual, -1))
        if isinstance(s.count, int):
            return merged(xp, s.count * self.virtual, s.count, mean, shift, m2)
        count: Any = xp.reshape(s.count, (self.virtual, -1))  # per channel of every part: of a mask, or JAX's
        total = xp.sum(count, axis=0, dtype=count.dtype)[0]
        return merged(xp, total, xp.astype(count, mean.dtype), mean, shift, m2)


class _Options(NamedTuple):
    """What `anybn.batch_norm` does not have, unchecked."""

    statistics: str
    update: bool
    train_weights: bool
    virtual_batch_size: int | None
    renorm: tuple[float, float] | None


class _Done(NamedTuple):
    """A call that has been made."""

    checked: Checked
    ghosts: _Ghosts
    y: Array
    statistics: Statistics
    """and weight and bias that y was made with, per channel of every virtual batch;"""
    parameters: tuple[Array | None, Array | None]
    correction: tuple[Array, Array] | None
    """r and d of batch renormalization, per channel of every virtual batch."""


def _run(
    x: Array,
    state: BatchNormState,
    options: _Options,
    axis: int,
    mask: Array | None,
    residual: Array | None,
    activation: str | None,
    nonfinite: str,
) -> _Done:
    statistics, update, train_weights, virtual_batch_size, renorm = options
    of_batch = _settings.choice("statistics", statistics, ("batch", "running")) == "batch"
    update, train_weights = _settings.flag("update", update), _settings.flag("train_weights", train_weights)
    if not of_batch and (virtual_batch_size is not None or renorm is not None):
        raise ValueError('statistics is "running": virtual_batch_size and renorm need those of the batch, "batch"')
    checked = check(
        x, state, training=of_batch or update, axis=axis, mask=mask, residual=residual, activation=activation,
        nonfinite=nonfinite, group=None, out=None,
    )  # fmt: skip
    if not state.track_running_stats and not (of_batch and renorm is None):
        raise ValueError(
            "the state has track_running_stats=False, and running statistics are needed: make it with True"
        )
    backend, call, spec = checked.backend, checked.call, checked.call.spec
    ghosts = _ghosts(x, spec.axis, virtual_batch_size)
    checked = checked._replace(commits=checked.commits and update)
    xp, weight, bias = backend.namespace(x), call.weight, call.bias
    if not train_weights:
        weight, bias = (None if a is None else backend.detached(a) for a in (weight, bias))
    if 0 in x.shape or not of_batch:
        running = learnt = given_statistics(checked)
        y = backend.evaluate(Call(x, spec, weight, bias, residual, call.mask), running)
        if checked.commits:
            with backend.no_grad():
                learnt = backend.statistics(Call(backend.detached(x), spec, mask=call.mask))
        finish(checked, learnt)
        return _Done(checked, ghosts, y, running, (weight, bias), None)
    correction = None
    parts, mask_parts = ghosts.split(xp, x), ghosts.split(xp, call.mask)
    if mask_parts is not None and ghosts.virtual > 1:
        _enough_in_each(backend, parts, mask_parts, ghosts, x)
    ghost_spec = spec._replace(axis=ghosts.axis)
    if renorm is not None or ghosts.virtual > 1:
        # In the working dtype: gradients are summed over the parts, and corrected, before they are rounded.
        working = backend.working_dtype(x)
        weight, bias = (None if a is None else ghosts.tiled(xp, xp.astype(a, working)) for a in (weight, bias))
    if renorm is not None:
        with backend.no_grad():
            of_parts = backend.statistics(Call(backend.detached(parts), ghost_spec, mask=mask_parts))
            correction = _correction(xp, ghosts, of_parts, checked.placed, spec.eps, _limits(renorm))
        r, d = correction
        shifted = d if weight is None else weight * d
        bias = shifted if bias is None else shifted + bias
        weight = r if weight is None else weight * r
    y, used, _ = backend.train(Call(parts, ghost_spec, weight, bias, ghosts.split(xp, residual), mask_parts))
    with backend.no_grad(), np.errstate(all="ignore"):
        learnt = ghosts.merged(xp, Statistics(*map(backend.detached, used)))
    finish(checked, learnt)
    return _Done(checked, ghosts, ghosts.joined(xp, y), used, (weight, bias), correction)


def _ghosts(x: Array, axis: int, virtual_batch_size: int | None) -> _Ghosts:
    shape = _checks.shape_of(x)
    batch = 1 if axis == 0 else 0
    n = shape[batch]
    size = n if virtual_batch_size is None else _settings.positive("virtual_batch_size", virtual_batch_size)
    if size == n or 0 in shape:
        return _Ghosts(1, shape, tuple(range(len(shape))), axis)
    if n % size:
        raise ValueError(
            f"x has {n} samples, which virtual batches of {size} cannot share evenly: virtual_batch_size must divide "
            "them"
        )
    virtual = n // size
    if (count := math.prod(shape) // shape[axis] // virtual) < 2:
        raise ValueError(
            f"virtual batches of {size} have {count} value per channel, x has shape {shape}; they need more than 1: "
            "use a larger virtual_batch_size"
        )
    split = (*shape[:batch], virtual, size, *shape[batch + 1 :])
    channels = axis + 1 if axis > batch else axis
    order = [i for i in range(len(split)) if i != batch]
    position = order.index(channels)
    order.insert(position, batch)
    return _Ghosts(virtual, split, tuple(order), position)


def _enough_in_each(backend: Backend, parts: Array, mask: Array, ghosts: _Ghosts, x: Array) -> None:
    if backend.is_traced(mask):
        return
    xp, working = backend.namespace(x), backend.working_dtype(x)
    least = int(xp.min(formulas.value_count(xp, parts, ghosts.axis, mask, working)))
    if least < 2:
        raise ValueError(
            f"a virtual batch has {least} unmasked values per channel, x has shape {_checks.shape_of(x)}; each needs "
            "more than 1: use a larger virtual_batch_size"
        )


def _limits(renorm: Any) -> tuple[Any, Any]:
    try:
        r_max, d_max = (limit + 0 for limit in renorm)  # numbers, or traced ones
    except (TypeError, ValueError):
        raise TypeError(f"renorm is {renorm!r}; it must be a pair (r_max, d_max), see renorm_limits") from None
    for name, value, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):  # a traced one cannot be looked at
        if isinstance(value, numbers.Real) and not float(value) >= least:
            raise ValueError(f"{name} is {value}; it must be {least} or more: (1, 0) is batch norm")
    return r_max, d_max


def _correction(
    xp: Any, ghosts: _Ghosts, s: Statistics, arrays: Any, eps: float, limits: tuple[Any, Any]
) -> tuple[Array, Array]:
    """r and d, in the working dtype."""
    r_max, d_max = limits
    mean, var = (ghosts.tiled(xp, xp.astype(a, s.mean.dtype)) for a in (arrays.running_mean, arrays.running_var))
    sigma = xp.sqrt(var + eps)
    distance = s.mean - mean if s.shift is None else (s.mean - mean) + s.shift
    r = xp.clip(xp.sqrt(s.var + eps) / sigma, 1.0 / r_max, r_max)
    return r, xp.clip(distance / sigma, -d_max, d_max)
