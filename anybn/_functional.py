"""batch_norm and batch_norm_vjp: check, dispatch, commit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from anybn import _checks, _settings
from anybn._settings import Activation, NonFinite
from anybn.backends.base import Backend
from anybn.backends.registry import backend_for
from anybn.core import formulas
from anybn.core.call import Array, ArrayT, Call, Gradients, Statistics, dtype_name, root_module, spec_of
from anybn.groups import agreement, engines, exchange
from anybn.state.arrays import Arrays
from anybn.state.state import BatchNormState
from anybn.state.store import Batch, Store

#: (whether torch.compile records this, what it records in place of `batch_norm`), once there has been a torch tensor.
compiled: tuple[Callable[[], bool], Callable[..., Array]] | None = None


#: Words that need no check: a call has many arguments, and they are looked at before each.
_SKIP, _RELU = "skip", "relu"


class Checked(NamedTuple):
    """A call whose arguments have been checked, and what it does to the state, of which backends know nothing."""

    backend: Backend
    call: Call
    state: BatchNormState
    before: Arrays
    """the state's arrays as they are"""
    placed: Arrays
    """the same beside x"""
    nonfinite: str
    uses_batch: bool
    """whether x is normalized with the batch's own statistics"""
    commits: bool
    """whether the running ones learn them"""
    trains: bool
    """whether x has values to train with, so that the state moves beside it"""


def batch_norm(
    x: ArrayT,
    state: BatchNormState,
    *,
    training: bool = False,
    axis: int = 1,
    mask: Array | None = None,
    residual: Array | None = None,
    activation: Activation = None,
    nonfinite: NonFinite = "skip",
    group: Any = None,
    out: Array | None = None,
) -> ArrayT:
    """Normalize every channel of x to mean 0 and variance 1, then scale and shift it (Ioffe & Szegedy 2015).

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, with mean and biased variance over all axes but ``axis``: of x
    itself in training, which also folds them into the state's running statistics; the running ones in evaluation.

    Args:
        x: ``(N, C, *spatial)`` in any order of axes, float16, bfloat16, float32 or float64, of any array library.
        state: of C channels. Training moves it to where x is; evaluation reads it wherever it is.
        training: whether to normalize with x's own statistics and to learn from them.
        axis: the channel axis; -1 for channels last.
        mask: bool, x's shape without the channel axis or broadcastable to it. Only True positions enter the statistics
            and gradients; y is 0 elsewhere.
        residual: x's shape and dtype, added before the activation.
        activation: None or "relu". ``relu(bn(x) + residual)`` is rounded once.
        nonfinite: what a channel whose batch statistics are NaN or infinite does to the running ones: "skip" leaves
            them, "raise" raises NonFiniteError, "propagate" commits them as torch does. y shows the NaN in any case.
        group: whose batches count as one: a torch.distributed process group, an mpi4py communicator, a CuPy
            NcclCommunicator, the name of a JAX axis, or any object with ``all_reduce_sum(array) -> array``; see
            `anybn.distributed`. Then training is collective: every member calls it, an empty x included, statistics
            and x's gradients are those of all batches together, and all states learn the same. The gradients of weight
            and bias are this member's share, to be summed like those of every other parameter. Members that disagree in
            channels, dtype or settings get a ValueError that names them, the others of one that fails a MemberError;
            the engine's errors come through.
        out: x's shape, dtype and device, may be x itself: filled with y and returned.

    Returns:
        y: x's shape, dtype, library, device and layout, every value correctly rounded where the device has float64 and
        x is narrower. Differentiable in x, state.weight, state.bias and residual in torch and JAX, to any order. An
        empty x gives an empty y and leaves the state alone.

    Raises:
        TypeError, ValueError: for arguments outside of the above; fewer than 2 values per channel in training.
        NonFiniteError: see ``nonfinite``.
        MemberError: another member of the group has raised one of these.
        StateError: a traced JAX call that would change a state not passed into it.

    Whatever is raised, the state is as it was.

    >>> import numpy as np, anybn
    >>> x = np.array([[1.0, 5.0], [3.0, 9.0]], dtype=np.float32)
    >>> anybn.batch_norm(x, anybn.BatchNormState(2), training=True)
    array([[-0.999995  , -0.99999875],
           [ 0.999995  ,  0.99999875]], dtype=float32)
    """
    if compiled is not None and compiled[0]():
        options = {"mask": mask, "residual": residual, "nonfinite": nonfinite, "group": group, "out": out}
        return compiled[1](x, state, training=training, axis=axis, activation=activation, **options)
    if (
        training is False
        and mask is residual is group is out is None
        and (activation is None or activation is _RELU)
        and nonfinite is _SKIP
        and type(axis) is int
        and type(state) is BatchNormState
        and type(store := state._store) is Store
    ):
        given = store.arrays, store.num_features, axis, store.eps, activation is not None
        if (done := backend_for(x).evaluate_at_once(x, *given)) is not None:
            return done  # type: ignore[no-any-return]
    try:
        checked = check(x, state, training, axis, mask, residual, activation, nonfinite, group, out)
    except Exception as error:
        notify_failure(x, state, training, group, error)
        raise
    y, statistics, running = _forward(checked)
    finish(checked, statistics, running)
    return y


def batch_norm_vjp(
    x: ArrayT,
    state: BatchNormState,
    *,
    training: bool = False,
    axis: int = 1,
    mask: Array | None = None,
    residual: Array | None = None,
    activation: Activation = None,
    nonfinite: NonFinite = "skip",
    group: Any = None,
    out: Array | None = None,
) -> tuple[ArrayT, Callable[[Array], Gradients]]:
    """`batch_norm` and its gradient, for libraries without automatic differentiation.

    Takes and raises what `batch_norm` does. The library's own automatic differentiation does not see this call.

    Returns:
        (y, pullback): ``pullback(dy)``, with dy like y, gives ``Gradients(x, weight, bias, residual)``, each None where
        there is no such array. It uses this call's statistics, whatever the state does later, may be called again, and
        reads x: do not write to x before.

    >>> import numpy as np, anybn
    >>> x = np.array([[1.0, 5.0], [3.0, 9.0], [8.0, 1.0]])
    >>> y, pullback = anybn.batch_norm_vjp(x, anybn.BatchNormState(2), training=True)
    >>> grads = pullback(np.ones_like(x))
    >>> grads.bias
    array([3., 3.], dtype=float32)
    >>> bool(np.abs(grads.x).max() < 1e-15)  # a constant added to y is lost in the mean
    True
    """
    try:
        checked = check(x, state, training, axis, mask, residual, activation, nonfinite, group, out, recorded=False)
    except Exception as error:
        notify_failure(x, state, training, group, error)
        raise
    backend, call = checked.backend, checked.call
    with backend.no_grad():
        if out is not None and backend.overlaps(out, x):  # y goes where x is, which the pullback reads
            call = call._replace(x=backend.copy(x))
            checked = checked._replace(call=call)
        y, statistics, running = _forward(checked)
        active = y > 0 if call.spec.relu else None
        finish(checked, statistics, running)
    shape = _checks.shape_of(call.x)

    def pullback(dy: Array) -> Gradients:
        """Gradients(x, weight, bias, residual) for the gradient dy of y."""
        owner = backend_for(dy, "dy")
        _checks.as_it_was("x", call.x, shape)
        _checks.like_x("dy", _checks.floating_array("dy", dy, owner), call.x, backend)
        _checks.state_arrays((call.weight,), shape[call.spec.axis])
        with backend.no_grad():
            return backend.gradients(call, statistics, dy, active, residual is not None)

    return y, pullback


def zeros_beside(backend: Backend, x: Array, size: int) -> Array:
    device = backend.device_of(x)
    return backend.from_numpy(np.zeros(size, "float64" if backend.has_float64(device) else "float32"), device)


def check(
    x: Array,
    state: BatchNormState,
    training: bool,
    axis: int,
    mask: Array | None,
    residual: Array | None,
    activation: str | None,
    nonfinite: str,
    group: Any,
    out: Array | None,
    recorded: bool = True,
) -> Checked:
    """Everything that can be wrong, before anything is computed. ``recorded``: gradients are the library's business."""
    backend = backend_for(x)
    if not isinstance(state, BatchNormState):
        hint = "; import anybn.jax makes states pytrees" if root_module(type(state)) == "jax" else ""
        raise TypeError(f"state is a {type(state).__name__}; it must be an anybn.BatchNormState of x's channels{hint}")
    store = state._store
    channels = store.num_features
    index = _checks.batch(x, backend, axis, channels)
    if training is not True and training is not False:
        training = _settings.flag("training", training)
    if activation is not None:
        _settings.choice("activation", activation, (None, "relu"))
    if nonfinite is not _SKIP:
        _settings.choice("nonfinite", nonfinite, ("skip", "raise", "propagate"))
    if group is not None:
        group = engines.as_group(group)
        called = training or not state.track_running_stats
        if called and getattr(group, "library", backend.libraries[0]) not in backend.libraries:
            raise TypeError(
                f"group is {group.kind}, but x is a {backend.name} array: pass what sums its arrays, see "
                "anybn.distributed"
            )
    if mask is not None:
        mask = _checks.mask(mask, x, index, backend)
    if residual is not None:
        _checks.like_x("residual", residual, x, backend)
    before, placed = store.placed_beside(backend, x)
    _checks.state_arrays(before[:4], channels, x, backend)
    if out is not None:
        _checks.out(out, x, residual, before[:4], backend)
        if recorded and backend.records(x, placed.weight, placed.bias, residual):
            raise ValueError("out was given but autograd is to record this call: drop out, or use torch.no_grad()")

    shape, tracks = x.shape, before.running_mean is not None
    empty = 0 in shape and (group is None or backend.is_traced(x))
    uses_batch = (training or not tracks) and not empty
    trains = training and not empty and not backend.recomputes()
    commits = trains and tracks
    if uses_batch:
        if group is None and (mask is None or not backend.is_traced(mask)):
            _checks.enough_values(_count(backend, x, index, mask), x, mask is not None)
        if nonfinite == "raise" and backend.is_traced(x):
            raise ValueError(
                'nonfinite is "raise" but x has no values yet (it is traced or lazy): use "skip", or look at y'
            )
    spec = spec_of(index, store.eps, activation is not None)
    members = update = None
    if group is not None and uses_batch:
        names = "eps", "momentum", "ddof", "affine", "scale", "bias"
        given = {name: value for name, value in state._settings().items() if name in names}
        given |= {"channels": shape[index], "dtype": dtype_name(x.dtype), "axis": index, "training": training}
        members = exchange.Members(group, agreement.settings(**given, relu=spec.relu, nonfinite=nonfinite))
    elif uses_batch and commits:
        update = store.planned_update(placed, nonfinite == "propagate")
    call = Call(x, spec, placed.weight, placed.bias, residual, mask, members, update, out)
    return Checked(backend, call, state, before, placed, nonfinite, uses_batch, commits, trains)


def notify_failure(x: Array, state: Any, training: bool, group: Any, error: Exception) -> None:
    """The members of the group that wait for this call's statistics, if there are any, that it has failed."""
    evaluates = isinstance(training, (bool, np.bool_)) and not training
    if group is None or not isinstance(state, BatchNormState) or (evaluates and state.track_running_stats):
        return
    try:
        group = engines.as_group(group)
    except TypeError:
        return
    if isinstance(group, engines.AxisGroup):  # all of whose members are one program
        return
    like = x
    try:
        backend = backend_for(x)
    except Exception:  # which may be what is wrong
        like = next(iter(state._arrays.held().values()), np.zeros(0))
        backend = backend_for(like)
    exchange.notify_failure(group, state.num_features, error, backend, like)


def _count(backend: Backend, x: Array, axis: int, mask: Array | None) -> int:
    if mask is None:
        return _checks.size_of(x) // x.shape[axis]
    return int(formulas.value_count(backend.namespace(x), x, axis, mask, backend.working_dtype(x)))


def _forward(checked: Checked) -> tuple[Array, Statistics, tuple[Array, Array] | None]:
    """y, the statistics it was made with, and what the running ones become, if that came with it."""
    backend, call, running = checked.backend, checked.call, None
    if checked.uses_batch:
        y, statistics, running = backend.train(call)
        if call.group is not None and not call.group.met:
            raise RuntimeError(
                f"the {backend.name} backend has overlooked call.group, so y is this member's alone: let its train "
                "and statistics call super() where call.group is not None"
            )
    else:
        statistics = given_statistics(checked)
        y = backend.evaluate(call, statistics)
    return y, statistics, running


def given_statistics(checked: Checked) -> Statistics:
    """The running ones; for an empty batch of a state without them, which has no values to normalize, zeros."""
    mean, var = checked.placed.running_mean, checked.placed.running_var
    if mean is None:
        mean = var = zeros_beside(checked.backend, checked.call.x, checked.state.num_features)
    return Statistics(None, mean, None, var)


def finish(checked: Checked, statistics: Statistics, running: tuple[Array, Array] | None = None) -> None:
    """What changes the state, after everything else has succeeded."""
    backend, call, state, before, placed, nonfinite, uses_batch, commits, trains = checked
    if not uses_batch:
        return
    if nonfinite == "raise":
        _require_finite(backend, statistics)
    store = state._store
    if not trains or (isinstance(statistics.count, int) and statistics.count == 0):  # all members' x are empty
        return
    if not commits:
        store.adopt(backend, call.x, before, placed)
        return
    batch = Batch(backend, call.x, statistics, nonfinite == "propagate", before, placed, running, call)
    block = store.block
    if block is None or not block.add(batch):
        store.learn(batch)


def _require_finite(backend: Backend, statistics: Statistics) -> None:
    mean, var = (backend.to_numpy(backend.detached(a)) for a in (statistics.mean, statistics.var))
    _checks.finite_statistics("x gives", mean, var, 'look for NaN or inf in x, or use nonfinite="skip"')
