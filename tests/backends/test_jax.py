"""JAX: transformations, and the state as a pytree."""

import functools
import os
import subprocess
import sys

import numpy as np
import pytest

import anybn
from anybn.backends.registry import backend_for
from anybn.conformance import inputs, oracle

jax = pytest.importorskip("jax", reason="jax: not installed, pip install jax")
jnp = jax.numpy

VALUES = (inputs.normal((8, 3, 4)) * 2 + 1).astype(np.float32)


def plain_loss(x, weight, bias, mask=None, residual=0.0):
    """Batch norm as anyone would write it, differentiated by JAX; safe on data near 0."""
    mask = jnp.ones((8, 1, 4), bool) if mask is None else mask[:, None]
    n = mask.sum()
    mean = jnp.where(mask, x, 0).sum((0, 2), keepdims=True) / n
    var = jnp.where(mask, (x - mean) ** 2, 0).sum((0, 2), keepdims=True) / n
    y = jax.nn.relu((x - mean) / jnp.sqrt(var + 1e-5) * weight[:, None] + bias[:, None] + residual)
    return (jnp.where(mask, y, 0) ** 3).sum()


def our_loss(x, weight, bias, mask=None, residual=None):
    state = anybn.BatchNormState(3, like=x)
    state.weight, state.bias = weight, bias
    y = anybn.batch_norm(x, state, axis=1, mask=mask, residual=residual, activation="relu", training=True)
    return (y**3).sum()


ARGUMENTS = jnp.asarray(VALUES), jnp.asarray([1.0, 0.5, -2.0]), jnp.asarray([0.1, 0.0, 0.3])


@pytest.mark.parametrize("masked", [True, False])
def test_gradients_of_first_and_second_order(masked):
    mask = jnp.asarray(np.random.default_rng(0).random((8, 4)) < 0.7) if masked else None
    options = {"mask": mask, "residual": jnp.asarray(VALUES[::-1] * 0.1)}
    for order in (
        lambda f: jax.grad(f, argnums=(0, 1, 2)),
        lambda f: jax.jit(jax.grad(f, argnums=(0, 1, 2))),
        lambda f: jax.grad(lambda *arguments: (jax.grad(f)(*arguments) ** 2).sum(), argnums=(0, 1, 2)),
        lambda f: jax.hessian(f, argnums=(1, 2)),
        lambda f: jax.jacfwd(f, argnums=(1, 2)),
    ):
        ours = order(functools.partial(our_loss, **options))(*ARGUMENTS)
        plain = order(functools.partial(plain_loss, **options))(*ARGUMENTS)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
            assert np.abs(a - b).max() <= 2e-4 * max(1, np.abs(b).max())


def test_jvp_is_the_derivative():
    x, weight, bias = ARGUMENTS
    dx = jnp.asarray(inputs.normal(VALUES.shape, 3).astype(np.float32))
    _, ours = jax.jvp(lambda x: our_loss(x, weight, bias), (x,), (dx,))
    grad = jax.grad(our_loss)(x, weight, bias)
    assert abs(ours - (grad * dx).sum()) < 1e-2


def test_jit_returns_the_new_state():
    @jax.jit
    def step(x, state):
        y = anybn.batch_norm(x, state, training=True)
        return y, state

    for momentum in (0.1, None):
        state, expected = anybn.BatchNormState(3, momentum=momentum), anybn.BatchNormState(3, momentum=momentum)
        given = state
        for k in range(3):
            y, state = step(jnp.asarray(VALUES + k), state)
            y_expected = anybn.batch_norm(VALUES + k, expected, training=True)
            assert oracle.error(np.asarray(y), y_expected, "float32") <= 4
        assert state.num_batches_tracked == 3
        assert isinstance(state.num_batches_tracked, int)
        assert given.num_batches_tracked == 0
        assert oracle.error(np.asarray(state.running_var), expected.running_var, "float32") <= 4


def test_a_state_from_another_library_can_be_passed_in(target):
    state = anybn.BatchNormState(3, like=target.array(np.zeros(1, np.float32)))
    step = jax.jit(lambda x, s: (anybn.batch_norm(x, s, training=True), s))
    _, state = step(jnp.asarray(VALUES), state)
    assert state.num_batches_tracked == 1
    assert isinstance(state.weight, jax.Array)


def test_scan_over_steps():
    def step(state, x):
        y = anybn.batch_norm(x, state, training=True)
        return state, y.sum()

    start = anybn.BatchNormState(3, like=jnp.zeros(1))
    state, _ = jax.lax.scan(step, start, jnp.stack([jnp.asarray(VALUES + k) for k in range(4)]))
    expected = anybn.BatchNormState(3)
    for k in range(4):
        anybn.batch_norm(VALUES + k, expected, training=True)
    assert state.num_batches_tracked == 4
    assert oracle.error(np.asarray(state.running_mean), expected.running_mean, "float32") <= 4


def test_gradient_of_a_closed_over_state_commits_once():
    state = anybn.BatchNormState(3)
    jax.grad(lambda x: (anybn.batch_norm(x, state, training=True) ** 2).sum())(jnp.asarray(VALUES))
    assert state.num_batches_tracked == 1
    expected = anybn.BatchNormState(3)
    anybn.batch_norm(VALUES, expected, training=True)
    assert oracle.error(np.asarray(state.running_mean), expected.running_mean, "float32") <= 4


def test_state_as_an_auxiliary_output_inside_jit():
    @jax.jit
    def step(weight, state, x):
        def loss(weight):
            state.weight = weight
            return (anybn.batch_norm(x, state, training=True) ** 3).sum(), None

        grad, _ = jax.grad(loss, has_aux=True)(weight)
        state.weight = weight - 0.1 * grad
        return grad, state

    grad, state = step(jnp.ones(3), anybn.BatchNormState(3), jnp.asarray(VALUES))
    assert np.all(np.isfinite(grad))
    assert state.num_batches_tracked == 1
    assert np.allclose(state.weight, 1 - 0.1 * grad)


@pytest.mark.parametrize(
    "transform",
    [jax.jit, jax.vmap, lambda f: lambda x: jax.lax.scan(lambda c, v: (c, f(v)), 0.0, x)],
    ids=["jit", "vmap", "scan"],
)
def test_a_state_that_was_not_passed_in(transform):
    state = anybn.BatchNormState(3)
    before = inputs.state_values(state)
    with pytest.raises(anybn.StateError, match=r"was not passed into this traced call, .* make the state an argument"):
        transform(lambda x: anybn.batch_norm(x, state, training=True))(
            jnp.asarray(inputs.normal((4, 3, 3, 5)), jnp.float32)
        )
    assert inputs.state_values(state) == before


def test_evaluation_needs_no_passing():
    state = anybn.BatchNormState(3)
    anybn.batch_norm(VALUES, state, training=True)
    arrays = state._arrays
    y = jax.jit(lambda x: anybn.batch_norm(x, state))(jnp.asarray(VALUES))
    assert oracle.error(np.asarray(y), anybn.batch_norm(VALUES, state.copy()), "float32") <= 4
    assert state._arrays is arrays
    stacked = jax.vmap(lambda x: anybn.batch_norm(x, state))(jnp.stack([jnp.asarray(VALUES)] * 2))
    assert stacked.shape == (2, 8, 3, 4)


def test_raise_needs_values():
    with pytest.raises(ValueError, match='nonfinite is "raise" but x has no values yet'):
        jax.jit(lambda x, s: anybn.batch_norm(x, s, training=True, nonfinite="raise"))(
            jnp.asarray(VALUES), anybn.BatchNormState(3)
        )


def test_tree_functions_give_states():
    state = anybn.BatchNormState(3, momentum=None, ddof=0)
    doubled = jax.tree.map(lambda a: a * 2, state)
    assert isinstance(doubled, anybn.BatchNormState)
    assert doubled.momentum is None
    assert doubled.ddof == 0
    assert np.array_equal(doubled.weight, [2, 2, 2])
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert paths == [".weight", ".bias", ".running_mean", ".running_var", ".num_batches_tracked"]


def test_float64_mode_passes_conformance():
    """JAX decides once per process whether it has float64."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--pyargs", "anybn.conformance", "--anybn-backend=jax", "-q", "-x", "-m", "",
         "-k", "quick or test_float64 or test_running_statistics or test_switching or test_bad_calls"],
        env={**os.environ, "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


def test_nothing_traced_stays_in_a_state_that_was_not_passed_in():
    """With a concrete x, too: inside jit every operation gives tracers."""
    x = jnp.asarray(VALUES)
    state = anybn.BatchNormState(3)
    arrays = state._arrays
    jax.jit(lambda z: anybn.batch_norm(x, state) + z)(1.0)
    assert state._arrays is arrays
    for call in (
        lambda z: anybn.batch_norm(x, state, training=True) + z,
        lambda z: (state.to(x), z)[1],
    ):
        with pytest.raises(anybn.StateError, match="was not passed into this traced call"):
            jax.jit(call)(1.0)
        assert state._arrays is arrays

    @jax.jit
    def outer(xs, state):
        return jax.lax.scan(lambda c, x: (c, anybn.batch_norm(x, state, training=True)), 0.0, xs)

    with pytest.raises(anybn.StateError, match="make the state an argument of the traced function"):
        outer(jnp.stack([x, x]), state)


def test_the_counter_is_an_int_again_after_jit():
    torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")
    step = jax.jit(lambda x, s: (anybn.batch_norm(x, s, training=True), s))
    _, state = step(jnp.asarray(VALUES), anybn.BatchNormState(3, momentum=None))
    expected = anybn.BatchNormState(3, momentum=None)
    anybn.batch_norm(VALUES, expected, training=True)
    for array in (torch.from_numpy(VALUES + 1), VALUES + 2):
        anybn.batch_norm(array, state, training=True)
        anybn.batch_norm(np.asarray(array), expected, training=True)
    assert state._arrays.num_batches_tracked == 3
    assert isinstance(state._arrays.num_batches_tracked, int)
    assert oracle.error(state.running_mean, expected.running_mean, "float32") <= 4
    repr(jax.vmap(lambda s: s, axis_size=2, in_axes=None, out_axes=0)(state))


def test_a_lazy_mask_that_leaves_one_value_is_not_committed():
    step = jax.jit(lambda x, s, m: (anybn.batch_norm(x, s, training=True, mask=m), s))
    _, state = step(jnp.asarray(VALUES), anybn.BatchNormState(3, ddof=0), jnp.arange(32).reshape(8, 4) == 5)
    assert np.array_equal(state.running_var, np.ones(3))
    assert np.array_equal(state.running_mean, np.zeros(3))


def test_unknown_devices():
    with pytest.raises(ValueError, match="jax has no device 'nonsense:9'; it has "):
        anybn.BatchNormState(3).to("jax:nonsense:9")


def test_vmap_over_states_trains_an_ensemble():
    states = [anybn.BatchNormState(3, like="jax") for _ in range(4)]
    ensemble = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *states)
    xs = jnp.stack([jnp.asarray(VALUES * (k + 1) + k) for k in range(4)])
    for _ in range(2):
        y, ensemble = jax.vmap(lambda x, s: (anybn.batch_norm(x, s, training=True), s))(xs, ensemble)
    assert np.array_equal(ensemble.num_batches_tracked, [2, 2, 2, 2])
    for k in range(4):
        expected = anybn.BatchNormState(3)
        for _ in range(2):
            y_expected = anybn.batch_norm(np.asarray(xs[k]), expected, training=True)
        assert oracle.error(np.asarray(y[k]), y_expected, "float32") <= 4
        assert oracle.error(np.asarray(ensemble.running_var[k]), expected.running_var, "float32") <= 4


def test_donation_reuses_the_states_memory():
    step = jax.jit(lambda x, s: (anybn.batch_norm(x, s, training=True), s), donate_argnums=1)
    start = anybn.BatchNormState(3, like="jax")
    expected = anybn.BatchNormState(3)
    state = start
    for k in range(3):
        _, state = step(jnp.asarray(VALUES + k), state)
        anybn.batch_norm(VALUES + k, expected, training=True)
    assert oracle.error(np.asarray(state.running_var), expected.running_var, "float32") <= 4
    assert state.num_batches_tracked == 3
    assert start.running_var.is_deleted()
    with pytest.raises(RuntimeError, match="deleted"):
        anybn.batch_norm(jnp.asarray(VALUES), start)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_steps_with_gradients_in_a_scan(momentum):
    """Weight and bias trained by SGD, as NumPy does it with the explicit gradient."""
    state = anybn.BatchNormState(3, momentum=momentum, like="jax")
    expected = anybn.BatchNormState(3, momentum=momentum)
    xs = np.stack([VALUES * (k + 1) for k in range(4)])

    def step(state, x):
        def loss(weight, bias):
            new = state.copy()
            new.weight, new.bias = weight, bias
            return (anybn.batch_norm(x, new, training=True) ** 3).mean(), new

        (value, new), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state.weight, state.bias)
        new.weight, new.bias = state.weight - 0.1 * grads[0], state.bias - 0.1 * grads[1]
        return new, value

    state, losses = jax.jit(lambda s: jax.lax.scan(step, s, jnp.asarray(xs)))(state)
    for x, value in zip(xs, losses, strict=True):
        y, pullback = anybn.batch_norm_vjp(x, expected, training=True)
        grads = pullback(3 * y**2 / np.float32(y.size))
        assert np.allclose(value, (y**3).mean(), atol=1e-5)
        expected.weight, expected.bias = expected.weight - 0.1 * grads.weight, expected.bias - 0.1 * grads.bias
    assert state.num_batches_tracked == 4
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert np.allclose(getattr(state, name), getattr(expected, name), rtol=1e-5, atol=1e-6)  # float32 training


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [(32, 8, 28, 28), (3, 5, 17, 97), (5000, 4), (1, 2, 70_000)])
def test_sums_do_not_depend_on_xla_s_order(shape, axis):
    """Of squares, whose exact sum is known to all digits of float64; XLA's own are up to 50 units off.

    The bar is that of results without float64.
    """
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32) ** 2
    axes = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    exact = values.sum(axes, dtype=np.float64)
    found = jax.jit(lambda a: backend_for(a).sum(jnp, a, axes))(jnp.asarray(values))
    assert oracle.error(np.asarray(found, np.float64) / exact, np.ones_like(exact), "float32") <= 4


def test_ranks_are_never_promoted():
    """Equinox's tests, and others', run with this."""
    x = jnp.asarray(VALUES)
    weight, bias = jnp.ones((3, 4)), jnp.zeros((3, 4))
    with jax.numpy_rank_promotion("raise"):
        for norm in (
            lambda x: anybn.layer_norm(x, weight, bias, axes=(1, 2)),
            lambda x: anybn.rms_norm(x, weight[0]),
            lambda x: anybn.group_norm(x, 1, weight[:, 0], bias[:, 0]),
        ):
            jax.grad(lambda x, norm=norm: norm(x).sum())(x)
        anybn.norms.layer_norm_vjp(x, weight, bias, axes=(1, 2))[1](x)

        def step(x, state):
            y = anybn.batch_norm(x, state, training=True, group="batch")
            return y.sum(), (y, state)

        states = jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * 2), anybn.BatchNormState(3, like="jax"))
        step = jax.value_and_grad(step, has_aux=True)
        (_, (y, _)), _ = jax.vmap(step, axis_name="batch")(jnp.stack([x[:4], x[4:]]), states)
    assert (
        oracle.error(np.concatenate(y), anybn.batch_norm(VALUES, anybn.BatchNormState(3), training=True), "float32")
        <= 4
    )


@pytest.mark.parametrize("like", ["jax", "x"])
def test_a_state_made_inside_vmap_trains(like):
    xs = jnp.stack([jnp.asarray(VALUES), jnp.asarray(VALUES * 2 + 1)])

    def trained(x):
        state = anybn.BatchNormState(3, like=x if like == "x" else like)
        for _ in range(2):
            anybn.batch_norm(x, state, training=True)
        return state

    for transform in (jax.vmap, lambda f: jax.jit(jax.vmap(f)), lambda f: jax.vmap(jax.jit(f))):
        states = transform(trained)(xs)
        for k in range(2):
            expected = trained(xs[k])
            assert oracle.error(np.asarray(states.running_var[k]), np.asarray(expected.running_var), "float32") <= 4

    outer = []

    def with_state_of_outer_trace(x):
        state = anybn.BatchNormState(3, like="jax")
        with pytest.raises(anybn.StateError, match="was not passed into this traced call"):
            jax.vmap(lambda x: anybn.batch_norm(x, state, training=True))(xs)
        outer.append(state)
        return x

    jax.vmap(with_state_of_outer_trace)(xs)
    with pytest.raises(anybn.StateError, match="was not passed into this traced call"):
        jax.vmap(lambda x: anybn.batch_norm(x, outer[0], training=True))(xs)


@pytest.mark.parametrize("library", [np, jnp])
def test_constants_may_be_assigned_in_a_trace(library):
    """To a state that is made inside, or passed in: it learns from them there, and has no tracer left outside."""
    x, mean = jnp.asarray(inputs.normal((8, 3)).astype(np.float32)), library.asarray([1.0, 2.0, 3.0])

    def step(x, state=None):
        state = anybn.BatchNormState(3, like=x) if state is None else state
        state.running_mean = mean
        anybn.batch_norm(x, state, training=True)
        return state

    expected = step(x, anybn.BatchNormState(3))
    for found in (jax.jit(step)(x), jax.jit(step)(x, anybn.BatchNormState(3)), jax.jit(step)(x, expected.copy())):
        assert np.allclose(found.running_mean, expected.running_mean, rtol=1e-6)
    outside = anybn.BatchNormState(3, like=x)
    with pytest.raises(anybn.StateError, match="the state was not passed into this traced call"):
        jax.jit(lambda x: step(x, outside).running_mean)(x)


#: Standard deviations whose squares leave float32's range, and one whose sum of squares does.
EXTREMES = [1e31, 1e30, 1e17, 1.0, 1e-17, 1e-30]


@pytest.mark.parametrize("size", EXTREMES)
def test_squares_may_leave_the_range_of_float32(size):
    """y, what is learnt as far as float32 can hold it, and the gradients of automatic differentiation."""
    values = (inputs.normal((16, 12, 12, 3)) * size).astype(np.float32)
    dy = inputs.normal(values.shape, seed=1).astype(np.float32)
    eps = 1e-5 if size > 1 else 1e-37
    weight, bias = np.float32([1.0, 0.5, -2.0]), np.float32([0.1, 0.0, 0.3])

    @jax.jit
    def step(x, weight, bias):
        def normalized(x, weight, bias):
            state = anybn.BatchNormState(3, eps=eps, momentum=1.0, like=x)
            state.weight, state.bias = weight, bias
            return anybn.batch_norm(x, state, axis=-1, training=True), state

        y, pullback, state = jax.vjp(normalized, x, weight, bias, has_aux=True)
        tangent = jax.jvp(lambda x: normalized(x, weight, bias)[0], (x,), (jnp.asarray(dy),))[1]
        return y, state, pullback(jnp.asarray(dy)), tangent

    y, state, (dx, dweight, dbias), tangent = step(*map(jnp.asarray, (values, weight, bias)))
    statistics = oracle.statistics(values, axis=-1)
    mean, var = statistics.mean, statistics.var()
    options = {"weight": weight, "eps": eps, "axis": -1}
    assert oracle.error(np.asarray(y), oracle.normalize(values, mean, var, bias=bias, **options), "float32") <= 8
    grads = oracle.gradients(dy, values, mean, var, count=statistics.count, **options)
    assert oracle.error(np.asarray(dx), grads.x, "float32", grads.x_size) <= 8
    assert oracle.error(np.asarray(dweight), grads.weight, "float32", grads.weight_size) <= 4
    assert oracle.error(np.asarray(dbias), grads.bias, "float32", grads.bias_size) <= 4
    along = oracle.gradients(dy, values, mean, var, count=statistics.count, eps=eps, axis=-1).x * weight
    assert oracle.error(np.asarray(tangent), along, "float32", grads.x_size) <= 8  # its matrix is symmetric
    unbiased, held = statistics.var(ddof=1), np.finfo(np.float32)
    if held.tiny < unbiased.min() and unbiased.max() < held.max:
        assert oracle.error(np.asarray(state.running_var) / unbiased, np.ones(3), "float32") <= 4
    else:
        assert np.all(np.isfinite(state.running_var))


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize(
    "order", ["sorted", "a band of outliers", "outliers at the ends", "a band of zeros", "zeros seen"]
)
def test_the_origin_may_be_a_bad_guess(order, axis):
    """Statistics are measured from the mean of every eighth value."""
    values = inputs.normal((8, 4, 32, 32))
    rows, limit = np.arange(32)[:, None] * np.ones(32, int), 4
    if order == "sorted":
        values = np.sort(values.reshape(8, 4, -1), axis=-1).reshape(values.shape) + 3
    elif order == "a band of outliers":
        values = np.where((rows >= 14) & (rows < 18), 1e4 * values, values)
    elif order == "outliers at the ends":
        values[0, :, 0], values[-1, :, -1] = 1e5, 2e5
    elif order == "a band of zeros":
        values = np.where((rows >= 14) & (rows < 18), 0.0, values * 1e-3 + 1)
    else:  # the worst there can be: seven times the variance is the square of the distance to the mean
        values, limit = np.where(np.arange(32) % 8 == 4, 0.0, values * 1e-3 + 1), 4 * (1 + 7)
    values = values.astype(np.float32)
    x = jnp.asarray(np.moveaxis(values, 1, axis))
    statistics = oracle.statistics(values)
    state = anybn.BatchNormState(4, momentum=1.0, like=x)
    y = np.moveaxis(np.asarray(anybn.batch_norm(x, state, training=True, axis=axis)), axis, 1)
    assert oracle.error(y, oracle.normalize(values, statistics.mean, statistics.var()), "float32") <= limit
    relative = np.asarray(state.running_var) / statistics.var(ddof=1)
    assert oracle.error(relative, np.ones(4), "float32") <= limit


def test_a_layer_is_a_function_that_jit_takes():
    layer = anybn.BatchNorm(3).eval()
    for _ in range(2):
        assert jax.jit(layer)(jnp.ones((4, 3))).shape == (4, 3)
