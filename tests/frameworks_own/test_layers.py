"""The layers for Keras, Flax, Equinox and Haiku: their numbers, against float64, and a training with each."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import anybn

pytestmark = pytest.mark.filterwarnings("ignore:::(keras|flax|equinox|haiku|jax)")
C, EPS, DECAY = 5, 1e-3, 0.75
X = (np.random.default_rng(0).normal(size=(8, 6, C)) * [1, 2, 3, 4, 5] + 1e3).astype(np.float32)


def expected():
    """(y, mean, var) of a layer with weight 1 to 5 and bias 0 to 4, from a mean of 0 and a variance of 1."""
    x = X.astype(np.float64)
    mean, var = x.mean((0, 1)), x.var((0, 1))
    y = (x - mean) / np.sqrt(var + EPS) * np.arange(1, C + 1) + np.arange(C)
    return y, mean, var


def assert_close(y, exact, units=2):
    error = np.abs(np.asarray(y, np.float64) - exact) / np.maximum(1, np.abs(exact))
    assert np.max(error) <= units * 2**-23


def assert_trained(before, after):
    """A regression that was learnt: the loss fell to a tenth."""
    assert np.isfinite(after)
    assert after < before / 10


def trained(step, *carried):
    """What 200 steps carry on, of which each gives its loss behind it."""
    losses = []
    for _ in range(200):
        *carried, loss = step(*carried)
        losses.append(float(loss))
    assert_trained(losses[0], losses[-1])
    return carried


TARGET = np.sin(X[:, :, :1].mean(1) - 1e3) + X[:, 0, 1:2] / 1e3


# -- Keras -----------------------------------------------------------------------------------------------------

KERAS = """
import json, sys
import keras, numpy as np
import anybn.keras
x = np.load(sys.argv[1])["x"]
layer = anybn.keras.BatchNormalization(epsilon=1e-3, momentum=0.75)
layer.build(x.shape)
to_numpy = keras.ops.convert_to_numpy
layer.gamma.assign(np.arange(1, 6)); layer.beta.assign(np.arange(5))
y = to_numpy(layer(x, training=True))
evaluated = to_numpy(layer(x))
again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
assert type(again) is anybn.keras.BatchNormalization and again.get_config() == layer.get_config()
model = keras.Sequential([keras.Input(x.shape[1:]), anybn.keras.BatchNormalization(), keras.layers.Flatten(),
                          keras.layers.Dense(16, "relu"), anybn.keras.BatchNormalization(), keras.layers.Dense(1)])
losses = [0, 0]
if keras.backend.backend() != "numpy":
    model.compile(keras.optimizers.Adam(0.05), "mse")
    target = np.load(sys.argv[1])["target"]
    history = model.fit(x, target, epochs=60, batch_size=4, verbose=0, shuffle=False).history["loss"]
    losses = [history[0], history[-1]]
model.save(sys.argv[2] + ".keras")
loaded = keras.models.load_model(sys.argv[2] + ".keras")
same = np.array_equal(to_numpy(model(x[:2])), to_numpy(loaded(x[:2])))
half = anybn.keras.BatchNormalization(dtype="mixed_float16")
kind = str(half(x.astype("float16"), training=True).dtype)
np.savez(sys.argv[2], y=y, evaluated=evaluated, mean=to_numpy(layer.moving_mean.value),
         var=to_numpy(layer.moving_variance.value))
print(json.dumps({"losses": [float(a) for a in losses], "same": bool(same), "half": kind}))
"""


@pytest.fixture(scope="module")
def keras_runs(tmp_path_factory):
    """{backend: (arrays, what it printed)}, each in a process, since Keras has one backend in each."""
    pytest.importorskip("h5py", reason="h5py: not installed, pip install h5py")
    folder = tmp_path_factory.mktemp("keras")
    np.savez(folder / "x.npz", x=X, target=TARGET)
    runs = {}
    for backend in ("torch", "jax", "numpy"):
        environment = {**os.environ, "KERAS_BACKEND": backend}
        command = [sys.executable, "-W", "ignore", "-c", KERAS, str(folder / "x.npz"), str(folder / backend)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if "No module named 'keras'" in done.stderr:
            pytest.skip("keras: not installed, pip install keras")
        assert done.returncode == 0, done.stderr[-3000:]
        runs[backend] = np.load(folder / f"{backend}.npz"), json.loads(done.stdout.splitlines()[-1])
    return runs


def test_keras_has_the_same_numbers_on_its_backends(keras_runs):
    y, mean, var = expected()
    moving_mean, moving_var = (1 - DECAY) * mean, DECAY + (1 - DECAY) * var
    evaluated = (X - moving_mean) / np.sqrt(moving_var + EPS) * np.arange(1, C + 1) + np.arange(C)
    for backend, (arrays, _) in keras_runs.items():
        assert_close(arrays["y"], y, 4 if backend == "jax" else 2)  # JAX has no float64 here
        assert_close(arrays["mean"], moving_mean)
        assert_close(arrays["var"], moving_var)
        assert np.abs(arrays["evaluated"] - evaluated).max() <= 1e-5 * np.abs(evaluated).max()
    for name in ("y", "evaluated", "mean", "var"):
        values = [arrays[name] for arrays, _ in keras_runs.values()]
        for other in values[1:]:
            assert np.max(np.abs(other - values[0]) / np.maximum(1, np.abs(values[0]))) <= 4 * 2**-23


def test_keras_trains_and_its_files_come_back(keras_runs):
    for backend, (_, printed) in keras_runs.items():
        assert printed["same"]
        assert printed["half"].removeprefix("torch.") == "float16"
        if backend != "numpy":
            assert_trained(*printed["losses"])


# -- Flax ------------------------------------------------------------------------------------------------------


def test_flax_nnx():
    pytest.importorskip("flax", reason="flax: not installed, pip install flax")
    import jax.numpy as jnp
    from flax import nnx

    import anybn.flax

    layer = anybn.flax.BatchNorm(C, epsilon=EPS, momentum=DECAY, rngs=nnx.Rngs(0))
    layer.scale[...], layer.bias[...] = jnp.arange(1.0, C + 1), jnp.arange(float(C))
    y, mean, var = expected()
    assert_close(nnx.jit(lambda layer, x: layer(x))(layer, X), y, 4)  # JAX without float64
    assert_close(layer.mean[...], (1 - DECAY) * mean, 4)
    assert_close(layer.var[...], DECAY + (1 - DECAY) * var, 4)
    fused = layer(X, residual=jnp.asarray(X), activation="relu")
    assert_close(fused, np.maximum(y + X, 0), 4)
    with pytest.raises(ValueError, match="residual or activation was given with what Flax's own code computes"):
        layer(X, mask=jnp.ones((8, 6, 1), bool), activation="relu")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = anybn.flax.BatchNorm(C, rngs=rngs)
            self.first, self.last = nnx.Linear(6 * C, 16, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)
            self.second = anybn.flax.BatchNorm(16, rngs=rngs)

        def __call__(self, x):
            return self.last(self.second(self.first(self.norm(x).reshape(8, -1)), activation="relu"))

    @nnx.jit
    def step(net):
        loss, grads = nnx.value_and_grad(lambda net: jnp.mean((net(X) - TARGET) ** 2))(net)
        nnx.update(net, _descended(nnx.state(net, nnx.Param), grads))
        return (loss,)

    net = Net(nnx.Rngs(0))
    trained(lambda: step(net))
    net.eval()
    before = net.norm.mean[...]
    net(X)
    assert np.array_equal(net.norm.mean[...], before)


def _descended(params, grads, rate=0.05):
    import jax

    return jax.tree.map(lambda p, g: p - rate * g, params, grads)


def test_flax_linen():
    pytest.importorskip("flax", reason="flax: not installed, pip install flax")
    import jax
    import jax.numpy as jnp
    from flax import linen

    import anybn.flax

    layer = anybn.flax.LinenBatchNorm(use_running_average=False, epsilon=EPS, momentum=DECAY)
    variables = layer.init(jax.random.key(0), X)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(
        np.shape, linen.BatchNorm(use_running_average=False).init(jax.random.key(0), X)
    )
    variables = {**variables, "params": {"scale": jnp.arange(1.0, C + 1), "bias": jnp.arange(float(C))}}
    y, mean, var = expected()
    ours, updated = jax.jit(lambda v: layer.apply(v, X, mutable=["batch_stats"]))(variables)
    assert_close(ours, y, 4)
    assert_close(updated["batch_stats"]["mean"], (1 - DECAY) * mean, 4)
    assert_close(updated["batch_stats"]["var"], DECAY + (1 - DECAY) * var, 4)

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, training):
            x = anybn.flax.LinenBatchNorm(use_running_average=not training)(x).reshape(8, -1)
            x = anybn.flax.LinenBatchNorm(use_running_average=not training)(linen.Dense(16)(x), activation="relu")
            return linen.Dense(1)(x)

    net = Net()
    variables = net.init(jax.random.key(0), X, True)

    @jax.jit
    def step(params, stats):
        def loss(params):
            y, updated = net.apply({"params": params, "batch_stats": stats}, X, True, mutable=["batch_stats"])
            return jnp.mean((y - TARGET) ** 2), updated["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return _descended(params, grads), stats, value

    params, stats = trained(step, variables["params"], variables["batch_stats"])
    assert np.isfinite(net.apply({"params": params, "batch_stats": stats}, X, False)).all()


# -- Equinox ---------------------------------------------------------------------------------------------------


def equinox_layer(**options):
    eqx = pytest.importorskip("equinox", reason="equinox: not installed, pip install equinox")
    import jax

    import anybn.equinox

    options = {"input_size": C, "axis_name": "batch", "mode": "batch", "eps": EPS, "momentum": DECAY} | options
    layer, state = eqx.nn.make_with_state(anybn.equinox.BatchNorm)(**options)
    mapped = eqx.filter_jit(
        lambda layer, x, state: jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
    )
    return layer, state, mapped


def test_equinox():
    layer, state, mapped = equinox_layer()
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    layer = eqx.tree_at(lambda m: (m.weight, m.bias), layer, (jnp.arange(1.0, C + 1), jnp.arange(float(C))))
    y, mean, var = expected()
    x = np.moveaxis(X, -1, 1)
    ours, state = mapped(layer, x, state)
    assert_close(np.moveaxis(ours, 1, -1), y, 4)
    hidden = state.get(layer.batch_state_index)
    assert_close(hidden[0], (1 - DECAY) * mean, 4)
    assert_close(hidden[1], DECAY + (1 - DECAY) * var, 4)
    assert int(state.get(layer.batch_counter)) == 1
    evaluated, same = mapped(eqx.nn.inference_mode(layer), x, state)
    theirs = eqx.nn.BatchNorm.__call__
    expected_ = jax.vmap(lambda x: theirs(layer, x, state, inference=True)[0], axis_name="batch")(x)
    assert np.allclose(evaluated, expected_, rtol=1e-5, atol=1e-4)
    assert int(same.get(layer.batch_counter)) == 1


def test_equinox_within_other_maps_and_over_several_axes():
    layer, state, _ = equinox_layer()
    import jax

    x = np.moveaxis(X, -1, 1)
    with pytest.raises(NameError):
        jax.vmap(layer, in_axes=(0, None), out_axes=(0, None))(x, state)
    inner = jax.vmap(layer, axis_name="batch", in_axes=(1, None), out_axes=(1, None))
    y, states = jax.vmap(inner, in_axes=(0, None))(np.moveaxis(X, -1, 1), state)  # batches of 6, of shape (C,)
    assert states.get(layer.batch_state_index)[0].shape == (8, C)
    one = X.astype(np.float64)
    exact = (one - one.mean(1, keepdims=True)) / np.sqrt(one.var(1, keepdims=True) + EPS)
    assert_close(np.moveaxis(y, 1, -1), exact, 4)
    both, state, _ = equinox_layer(axis_name=("outer", "inner"))
    mapped = both
    for name in ("inner", "outer"):
        mapped = jax.vmap(mapped, axis_name=name, in_axes=(0, None), out_axes=(0, None))
    y, state = mapped(X, state)
    assert_close(y, (one - one.mean((0, 1))) / np.sqrt(one.var((0, 1)) + EPS), 4)


def test_equinox_leaves_to_equinox_what_is_its_own():
    layer, state, mapped = equinox_layer(mode="ema")
    y, state = mapped(layer, np.moveaxis(X, -1, 1), state)
    assert np.isfinite(y).all()
    layer, state, mapped = equinox_layer()
    y, state = mapped(layer, X[:1, 0], state)  # one value per channel
    assert not np.asarray(y).any()


def test_equinox_trains():
    eqx = pytest.importorskip("equinox", reason="equinox: not installed, pip install equinox")
    import jax
    import jax.numpy as jnp

    import anybn.equinox

    class Net(eqx.Module):
        first: anybn.equinox.BatchNorm
        hidden: eqx.nn.Linear
        second: anybn.equinox.BatchNorm
        last: eqx.nn.Linear

        def __init__(self, key):
            options = {"axis_name": "batch", "mode": "batch"}
            self.first = anybn.equinox.BatchNorm(C, **options)
            self.hidden = eqx.nn.Linear(6 * C, 16, key=key)
            self.second = anybn.equinox.BatchNorm(16, **options)
            self.last = eqx.nn.Linear(16, 1, key=key)

        def __call__(self, x, state):
            x, state = self.first(x, state)
            x, state = self.second(self.hidden(x.reshape(-1)), state)
            return self.last(jax.nn.relu(x)), state

    @eqx.filter_jit
    def step(net, state):
        def loss(net, state):
            mapped = jax.vmap(net, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            y, state = mapped(np.moveaxis(X, -1, 1), state)
            return jnp.mean((y - TARGET) ** 2), state

        (value, state), grads = eqx.filter_value_and_grad(loss, has_aux=True)(net, state)
        return eqx.apply_updates(net, jax.tree.map(lambda g: -0.05 * g, grads)), state, value

    trained(step, *eqx.nn.make_with_state(Net)(jax.random.key(0)))


# -- Haiku -----------------------------------------------------------------------------------------------------


def test_haiku():
    hk = pytest.importorskip("haiku", reason="haiku: not installed, pip install dm-haiku")
    import jax
    import jax.numpy as jnp

    import anybn.haiku

    layer = hk.transform_with_state(
        lambda x, training: anybn.haiku.BatchNorm(True, True, DECAY, EPS, name="bn")(x, training)
    )
    params, state = layer.init(None, X, True)
    theirs = hk.transform_with_state(lambda x, training: hk.BatchNorm(True, True, DECAY, EPS, name="bn")(x, training))
    assert jax.tree.map(np.shape, (params, state)) == jax.tree.map(np.shape, theirs.init(None, X, True))
    params = {"bn": {"scale": jnp.arange(1.0, C + 1)[None, None], "offset": jnp.arange(float(C))[None, None]}}
    y, mean, var = expected()
    state = jax.tree.map(jnp.zeros_like, state)  # as before the first batch, which init has counted
    ours, state = jax.jit(layer.apply, static_argnums=4)(params, state, None, X, True)
    assert_close(ours, y, 4)
    assert_close(state["bn/~/mean_ema"]["average"][0, 0], mean, 4)
    assert_close(state["bn/~/var_ema"]["average"][0, 0], var, 8)
    evaluated, _ = layer.apply(params, state, None, X, False)
    assert_close(evaluated, y, 600)  # the averages are float32: at a mean of 1e3, 3e-5 of a deviation

    net = hk.transform_with_state(_haiku_net)

    @jax.jit
    def step(params, state):
        def loss(params):
            y, new = net.apply(params, state, None, X, True)
            return jnp.mean((y - TARGET) ** 2), new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return _descended(params, grads), new, value

    trained(step, *net.init(jax.random.key(0), X, True))


def _haiku_net(x, training):
    import haiku as hk
    import jax

    import anybn.haiku

    x = anybn.haiku.BatchNorm(True, True, 0.9)(x, training).reshape(8, -1)
    x = anybn.haiku.BatchNorm(True, True, 0.9)(hk.Linear(16)(x), training)
    return hk.Linear(1)(jax.nn.relu(x))


# -- all of them -----------------------------------------------------------------------------------------------


def test_a_batch_with_a_nan_leaves_its_channel_s_averages():
    nnx = pytest.importorskip("flax.nnx", reason="flax: not installed, pip install flax")
    hk = pytest.importorskip("haiku", reason="haiku: not installed, pip install dm-haiku")
    import anybn.flax
    import anybn.haiku

    x = X.copy()
    x[0, 0, 2] = np.nan
    layer = anybn.flax.BatchNorm(C, rngs=nnx.Rngs(0))
    layer(x)
    assert layer.mean[...][2] == 0
    assert np.isfinite(layer.var[...]).all()
    assert (np.delete(np.asarray(layer.mean[...]), 2) > 1).all()

    module = hk.transform_with_state(lambda x: anybn.haiku.BatchNorm(True, True, 0.9, name="bn")(x, True))
    params, state = module.init(None, X)
    _, after = module.apply(params, state, None, x)
    before, after = (np.ravel(s["bn/~/mean_ema"]["average"]) for s in (state, after))
    assert np.allclose(after[2], before[2], rtol=1e-6)

    equinox, state, mapped = equinox_layer()
    _, state = mapped(equinox, np.moveaxis(X, -1, 1), state)
    before = np.asarray(state.get(equinox.batch_state_index)[0]) / (1 - DECAY)
    _, state = mapped(equinox, np.moveaxis(x, -1, 1), state)
    after = np.asarray(state.get(equinox.batch_state_index)[0]) / (1 - DECAY**2)
    assert np.allclose(after[2], before[2], rtol=1e-6)


def test_an_empty_batch_leaves_the_averages():
    nnx = pytest.importorskip("flax.nnx", reason="flax: not installed, pip install flax")
    import anybn.flax

    layer = anybn.flax.BatchNorm(C, rngs=nnx.Rngs(0))
    assert layer(X[:0]).shape == X[:0].shape
    assert (layer.mean[...] == 0).all()
    assert (layer.var[...] == 1).all()


def test_they_come_on_demand_and_name_what_is_missing(monkeypatch):
    for name, package in (("keras", "keras"), ("flax", "flax"), ("equinox", "equinox"), ("haiku", "dm-haiku")):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, f"anybn.{name}", raising=False)
        monkeypatch.delattr(anybn, name, raising=False)
        with pytest.raises(AttributeError, match=rf"anybn\.{name} cannot be imported \(.*: pip install {package}$"):
            getattr(anybn, name)
