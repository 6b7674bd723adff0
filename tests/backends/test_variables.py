"""Variables of Keras and Flax NNX: a state takes the array in them, and a call names it."""

import os

import numpy as np
import pytest

import anybn

pytestmark = pytest.mark.filterwarnings("ignore:::(keras|flax|jax)")


@pytest.fixture(params=["nnx", "keras"])
def variable(request):
    if request.param == "nnx":
        nnx = pytest.importorskip("flax.nnx", reason="flax: not installed, pip install flax")
        return nnx.BatchNorm(3, rngs=nnx.Rngs(0)).scale, "get_value()"
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="keras: not installed, pip install keras")
    layer = keras.layers.BatchNormalization()
    layer.build((2, 3))
    return layer.gamma, "value"


def test_a_state_takes_the_array_in_it(variable):
    wrapped, _ = variable
    state = anybn.BatchNormState(3)
    state.weight = wrapped
    assert type(state.weight).__name__ in ("ArrayImpl", "Parameter", "ndarray")
    assert np.array_equal(np.asarray(state.weight), [1, 1, 1])
    assert np.isfinite(anybn.batch_norm(np.ones((4, 3), np.float32), state)).all()


def test_a_call_names_the_array_in_it(variable):
    wrapped, way = variable
    for name, call in (
        ("x", lambda: anybn.batch_norm(wrapped, anybn.BatchNormState(3))),
        ("target", lambda: anybn.BatchNormState(3, like=wrapped)),
    ):
        with pytest.raises(TypeError) as error:
            call()
        assert f"pass the array in it, which gradients reach: {name}.{way}" in str(error.value)


def test_gradients_reach_a_variable_of_flax():
    nnx = pytest.importorskip("flax.nnx", reason="flax: not installed, pip install flax")
    import jax
    import jax.numpy as jnp

    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)

    @nnx.jit
    def gradient(layer):
        def loss(layer):
            state = anybn.BatchNormState(3, like=x)
            state.weight = layer.scale
            return jnp.sum(anybn.batch_norm(x, state) * x)

        return nnx.grad(loss)(layer).scale.get_value()

    expected = np.sum(np.asarray(x, np.float64) ** 2 / np.sqrt(1 + 1e-5), axis=0)
    assert np.allclose(gradient(layer), expected, rtol=1e-5)
    assert not jax.tree.leaves(layer.mean.get_value())[0].any()


def test_a_constant_from_outside_in_a_state_made_within_a_trace():
    jax = pytest.importorskip("jax", reason="jax: not installed")
    x = jax.numpy.asarray(np.random.default_rng(0).normal(size=(6, 3)), "float32")
    outside = jax.numpy.full(3, 0.5)

    @jax.jit
    def step(x):
        state = anybn.BatchNormState(3, like=x)
        state.running_mean = outside
        anybn.batch_norm(x, state, training=True)
        return state.running_mean

    assert np.allclose(step(x), 0.9 * 0.5 + 0.1 * np.asarray(x).mean(0), rtol=1e-6)

    state = anybn.BatchNormState(3, like=x)

    @jax.jit
    def forgets(x):
        state.running_mean = outside
        anybn.batch_norm(x, state, training=True)

    with pytest.raises(anybn.StateError, match="was not passed into this traced call"):
        forgets(x)
