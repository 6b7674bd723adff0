"""Small models of the frameworks in which every batch norm has settings of its own, and what each makes of an input."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

C = 4


class Example(NamedTuple):
    source: Any
    """what `load_batch_norms` takes"""
    settings: dict[str, tuple[float, float | None, int]]
    """{layer: (eps, momentum as a state has it, axis)}"""
    evaluate: Callable[[Any, str, np.ndarray], np.ndarray]
    """(source, layer, x of shape (N, 3, 3, C)) -> the layer's output"""


def fill(set_array):
    """Values by which layers can be told apart: set_array(field, values)."""
    rng = np.random.default_rng(fill.calls)
    fill.calls += 1
    for field in ("weight", "bias", "running_mean", "running_var"):
        values = rng.uniform(0.001, 2, C) if field == "running_var" else rng.normal(size=C)
        set_array(field, values.astype(np.float32))


fill.calls = 0


def torch_model():
    torch = pytest.importorskip("torch", reason="torch: not installed")
    nn = torch.nn
    model = nn.Sequential(
        nn.Conv2d(C, C, 1),
        nn.BatchNorm2d(C, eps=1e-3),
        nn.Sequential(nn.BatchNorm2d(C, eps=1e-4, momentum=0.25), nn.InstanceNorm2d(C, track_running_stats=True)),
        nn.BatchNorm2d(C, momentum=None),
        nn.SyncBatchNorm(C, eps=0.5),
    ).eval()
    for name in ("1", "2.0", "3", "4"):
        module = model.get_submodule(name)
        with torch.no_grad():
            fill(lambda field, values, m=module: getattr(m, field).copy_(torch.from_numpy(values)))
    settings = {"1": (1e-3, 0.1, 1), "2.0": (1e-4, 0.25, 1), "3": (1e-5, None, 1), "4": (0.5, 0.1, 1)}

    def evaluate(model, layer, x):
        module = model.get_submodule(layer)
        with torch.no_grad():  # SyncBatchNorm has no CPU form of its own in training, but evaluates
            return module(torch.from_numpy(x).movedim(-1, 1)).movedim(1, -1).numpy()

    return Example(model, settings, evaluate)


def keras_layer(model, path):
    for name in path.split("/"):
        (model,) = [layer for layer in model._flatten_layers(include_self=False, recursive=False) if layer.name == name]
    return model


def keras_model(build=lambda keras: keras.layers.BatchNormalization):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="keras: not installed, pip install keras")
    batch_norm = build(keras)

    def submodel(name, **options):
        inputs = keras.Input((3, 3, C))
        dense = keras.layers.Dense(C)(inputs)
        return keras.Model(inputs, batch_norm(name="bn", **options)(dense), name=name)

    inputs = keras.Input((3, 3, C))
    x = submodel("first", epsilon=1e-4)(inputs)
    x = submodel("second", epsilon=1.001e-5, momentum=0.9)(x)
    x = batch_norm(name="plain", axis=-1)(x)
    model = keras.Model(inputs, x)
    theirs = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    for name in ("first/bn", "second/bn", "plain"):
        layer = keras_layer(model, name)
        fill(lambda field, values, m=layer: getattr(m, theirs[field]).assign(values))
    settings = {"first/bn": (1e-4, 0.01, -1), "second/bn": (1.001e-5, 0.1, -1), "plain": (1e-3, 0.01, -1)}

    def evaluate(model, layer, x):
        return keras.ops.convert_to_numpy(keras_layer(model, layer)(x, training=False))

    return Example(model, settings, evaluate)


def nnx_model():
    pytest.importorskip("flax", reason="flax: not installed, pip install flax")
    from flax import nnx

    rngs = nnx.Rngs(0)
    norms = [nnx.BatchNorm(C, epsilon=e, momentum=m, rngs=rngs) for e, m in ((1e-3, 0.9), (1e-4, 0.99))]
    model = nnx.Sequential(nnx.Linear(C, C, rngs=rngs), norms[0], nnx.Sequential(norms[1], nnx.LayerNorm(C, rngs=rngs)))
    theirs = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    for norm in norms:
        fill(lambda field, values, m=norm: getattr(m, theirs[field]).set_value(np.array(values)))

    def evaluate(model, layer, x):
        for part in layer.split("/"):
            model = model[int(part)] if part.isdecimal() else getattr(model, part)
        return np.asarray(model(x, use_running_average=True))

    return Example(model, {"layers/1": (1e-3, 0.1, -1), "layers/2/layers/0": (1e-4, 0.01, -1)}, evaluate)


def equinox_model():
    eqx = pytest.importorskip("equinox", reason="equinox: not installed, pip install equinox")
    import jax
    import jax.numpy as jnp

    def make():
        key = jax.random.key(0)
        first = eqx.nn.BatchNorm(C, "batch", eps=1e-3, mode="batch", momentum=0.75)
        return eqx.nn.Sequential(
            [eqx.nn.Linear(C, C, key=key), first, eqx.nn.BatchNorm(C, "batch", eps=0.25, mode="ema")]
        )

    model, state = eqx.nn.make_with_state(make)()
    new = {}
    for i in (1, 2):
        values = {}
        fill(values.__setitem__)
        where = lambda m, i=i: (m.layers[i].weight, m.layers[i].bias)  # noqa: E731
        model = eqx.tree_at(where, model, (jnp.asarray(values["weight"]), jnp.asarray(values["bias"])))
        new[i] = jnp.asarray(values["running_mean"]), jnp.asarray(values["running_var"])
    state = state.set(model.layers[1].batch_counter, jnp.array(200))
    state = state.set(model.layers[1].batch_state_index, new[1])
    state = state.set(model.layers[2].ema_first_time_index, jnp.array(False))
    state = state.set(model.layers[2].ema_state_index, new[2])

    def evaluate(source, layer, x):
        model, state = source
        module = eqx.nn.inference_mode(model.layers[int(layer.removeprefix("layers."))])
        mapped = jax.vmap(lambda one: module(one, state)[0], axis_name="batch")
        return np.moveaxis(np.asarray(mapped(np.moveaxis(x, -1, 1))), 1, -1)

    return Example((model, state), {"layers.1": (1e-3, 0.25, 1), "layers.2": (0.25, 0.01, 1)}, evaluate)


MODELS = {"torch": torch_model, "keras": keras_model, "nnx": nnx_model, "equinox": equinox_model}
