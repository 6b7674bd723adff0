"""Batch norm over a named axis of four devices; test_distributed.py starts it in a process that has them."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import anybn
from anybn.conformance import inputs, oracle

X64 = jax.config.jax_enable_x64
MESH = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
PART, WHOLE = P("devices"), P()
#: Rounded once from float64; or float32 all the way, which loses nothing to the mean but has its own roundings.
BAR = 0.500001 if X64 else 4
WEIGHT, BIAS = np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)


def fresh():
    state = anybn.BatchNormState(8, like="jax")
    state.weight, state.bias = jnp.asarray(WEIGHT), jnp.asarray(BIAS)
    return state


def step(x, dy, mask, state):
    """y, its gradients for dy by JAX and by hand, and the state after it."""
    options = {"training": True, "axis": -1, "mask": mask, "group": "devices"}

    def loss(x, state):
        y = anybn.batch_norm(x, state, **options)
        return (y * dy).sum(), (y, state)

    (_, (y, after)), (dx, _) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)(x, state)
    _, pullback = anybn.batch_norm_vjp(x, state.copy(), **options)
    return y, dx, pullback(dy).x, after


def expected(x, dy, mask):
    s = oracle.statistics(x, -1, mask)
    y = oracle.normalize(x, s.mean, s.var(), weight=WEIGHT, bias=BIAS, axis=-1, mask=mask)
    dx = oracle.gradients(dy, x, s.mean, s.var(), count=s.count, weight=WEIGHT, axis=-1, mask=mask)
    return s, y, dx


def compared(found, x, dy, mask):
    y, dx, dx_by_hand, state = found
    s, expected_y, of_x = expected(x, dy, mask)
    slope = np.maximum(1, of_x.x_size)
    term = 1 if X64 else np.abs(WEIGHT).max() * 5 + np.abs(BIAS).max()
    assert oracle.error(np.asarray(y), expected_y, "float32", term) <= BAR
    # JAX adds what comes through the statistics to what does not in x's dtype, where they may cancel.
    assert oracle.error(np.asarray(dx), of_x.x, "float32", slope) <= (2 if X64 else BAR)
    assert oracle.error(np.asarray(dx_by_hand), of_x.x, "float32", 1 if X64 else slope) <= BAR
    mean, var = oracle.trained([s])
    assert oracle.error(np.asarray(state.running_mean), mean, "float32") <= 2
    assert oracle.error(np.asarray(state.running_var), var, "float32") <= 2
    assert state.num_batches_tracked == 1


@cache
def in_shard_map():
    options = {"in_specs": (PART, PART, PART, WHOLE), "out_specs": (PART, PART, PART, WHOLE)}
    return jax.jit(jax.shard_map(step, mesh=MESH, **options))


def test_shard_map():
    for row, shift in inputs.ROWS.items():
        if row == inputs.OVERFLOWING and not X64:
            continue
        x = shift(inputs.normal((16, 9, 8))).astype(np.float32)
        dy = inputs.normal(x.shape, 2).astype(np.float32)
        mask = inputs.normal(x.shape[:2], 3) > 0
        mask[:4] = False  # the first device has nothing that counts
        for chosen in (np.ones_like(mask), mask):
            compared(in_shard_map()(x, dy, chosen, fresh()), x, dy, chosen)


def test_pmap():
    x = (inputs.normal((4, 4, 9, 8)) + 1e3).astype(np.float32)
    dy, mask = inputs.normal(x.shape, 2).astype(np.float32), np.ones(x.shape[:3], bool)
    y, dx, by_hand, states = jax.pmap(step, axis_name="devices", in_axes=(0, 0, 0, None))(x, dy, mask, fresh())
    whole = [np.asarray(a).reshape(16, 9, 8) for a in (x, dy, y, dx, by_hand)]
    for device in range(4):
        state = jax.tree.map(lambda a: a[device], states)  # noqa: B023 used at once
        compared((*whole[2:], state), *whole[:2], mask.reshape(16, 9))


def test_second_order():
    x = inputs.normal((8, 3)).astype(np.float32)

    def gradient(x, group):
        def loss(x):
            y = anybn.batch_norm(x, anybn.BatchNormState(3, like=x), training=True, group=group)
            return (jax.nn.sigmoid(y) ** 2).sum()

        return jax.grad(lambda x: (jnp.sin(jax.grad(loss)(x))).sum())(x)

    of_parts = jax.shard_map(partial(gradient, group="devices"), mesh=MESH, in_specs=PART, out_specs=PART)
    found, wanted = jax.jit(of_parts)(x), jax.jit(partial(gradient, group=None))(x)
    assert np.allclose(found, wanted, rtol=1e-4, atol=1e-5), (found, wanted)


def test_accumulate():
    """Micro-batches on each device: one commit, from all of them on all devices."""
    x = (inputs.normal((16, 9, 8)) + 1e3).astype(np.float32)

    def step(x, state):
        with anybn.accumulate(state):
            for part in (x[:1], x[1:]):
                anybn.batch_norm(part, state, training=True, axis=-1, group="devices")
        return state

    state = jax.jit(jax.shard_map(step, mesh=MESH, in_specs=(PART, WHOLE), out_specs=WHOLE))(x, fresh())
    _, var = oracle.trained([oracle.statistics(x, -1)])
    assert oracle.error(np.asarray(state.running_var), var, "float32") <= 2
    assert state.num_batches_tracked == 1


def test_collectives():
    """XLA is left with one sum forward, and at most as many backward as y's gradient has inputs from the group."""
    x = jnp.ones((16, 9, 8), jnp.float32)

    def forward(x, state):
        return anybn.batch_norm(x, state, training=True, axis=-1, group="devices"), state

    function = jax.shard_map(forward, mesh=MESH, in_specs=(PART, WHOLE), out_specs=(PART, WHOLE))
    text = jax.jit(function).lower(x, fresh()).compile().as_text()
    assert text.count(" all-reduce(") == 1, text

    def by_hand(x, dy, state):
        _, pullback = anybn.batch_norm_vjp(x, state, training=True, axis=-1, group="devices")
        return pullback(dy).x

    function = jax.shard_map(by_hand, mesh=MESH, in_specs=(PART, PART, WHOLE), out_specs=PART)
    text = jax.jit(function).lower(x, x, fresh()).compile().as_text()
    assert text.count(" all-reduce(") == 2, text
