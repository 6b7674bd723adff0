"""One batch norm layer of each framework, run as its users run it.

    python tests/frameworks.py    # writes what the installed ones do into tests/frameworks.json, with their versions

Without anybn, as in an environment with an old framework and its old NumPy, the file's own inputs are used.

`RUN[convention](settings, arrays, batches, x)` makes the layer with settings, gives it arrays (names as in
`anybn.interop.CONVENTIONS`; None: those it starts with), trains it on batches of shape (N, C) in float32 and returns
its arrays and what it makes of x in evaluation.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Run = Callable[[dict[str, Any], Arrays | None, list[np.ndarray], np.ndarray], tuple[Arrays, np.ndarray]]
CHANNELS = 3
SMALL = np.float32(2.0**-10)  # what a batch is multiplied by to show eps
RECORD = Path(__file__).with_suffix(".json")


def torch_layer(settings, arrays, batches, x):
    import torch

    layer = torch.nn.BatchNorm1d(**{"num_features": CHANNELS, **settings})
    if arrays is not None:
        layer.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in arrays.items()})
    for batch in batches:
        layer(torch.from_numpy(batch))
    y = layer.eval()(torch.from_numpy(x)).detach().numpy()
    return {name: a.numpy() for name, a in layer.state_dict().items()}, y


def keras_layer(settings, arrays, batches, x):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    layer = keras.layers.BatchNormalization(**settings)
    layer.build(x.shape)
    if arrays is not None:
        layer.set_weights(list(arrays.values()))  # by order
    for batch in batches:
        layer(batch, training=True)
    return {w.name: np.asarray(w) for w in layer.weights}, np.asarray(layer(x, training=False))


def flax_layer(settings, arrays, batches, x):
    from flax import nnx

    layer = nnx.BatchNorm(**{"num_features": CHANNELS, **settings}, rngs=nnx.Rngs(0))
    if arrays is not None:
        nnx.update(layer, {name: np.asarray(a, np.float32) for name, a in arrays.items()})
    for batch in batches:
        layer(batch, use_running_average=False)
    kept = {name: np.asarray(a) for name, a in nnx.to_pure_dict(nnx.state(layer)).items()}
    return kept, np.asarray(layer(x, use_running_average=True))


def linen_layer(settings, arrays, batches, x):
    import jax
    from flax import linen, traverse_util

    layer = linen.BatchNorm(**settings)
    variables = layer.init(jax.random.key(0), x, use_running_average=False)
    if arrays is not None:
        given = traverse_util.unflatten_dict({n: np.asarray(a, np.float32) for n, a in arrays.items()}, sep="/")
        assert jax.tree.map(np.shape, given) == jax.tree.map(np.shape, variables)
        variables = given
    for batch in batches:
        _, updated = layer.apply(variables, batch, use_running_average=False, mutable=["batch_stats"])
        variables = {**variables, **updated}
    y = layer.apply(variables, x, use_running_average=True)
    return {n: np.asarray(a) for n, a in traverse_util.flatten_dict(variables, sep="/").items()}, np.asarray(y)


def haiku_layer(settings, arrays, batches, x):
    import haiku as hk
    import jax

    settings = {"create_scale": True, "create_offset": True, "decay_rate": 0.9, **settings}
    layer = hk.transform_with_state(lambda x, training: hk.BatchNorm(**settings)(x, training))
    params, state = layer.init(jax.random.key(0), x, True)
    trees = {**params, **state}  # {"batch_norm": ..., "batch_norm/~/mean_ema": ..., ...}
    if arrays is not None:
        trees = {
            module: {
                name: np.asarray(arrays[f"{module}/{name}".removeprefix("batch_norm/")], a.dtype).reshape(a.shape)
                for name, a in tree.items()
            }
            for module, tree in trees.items()
        }
    params, state = {m: trees[m] for m in params}, {m: trees[m] for m in state}
    for batch in batches:
        _, state = layer.apply(params, state, None, batch, True)
    y, _ = layer.apply(params, state, None, x, False)
    kept = {
        f"{module}/{name}".removeprefix("batch_norm/"): np.asarray(a)
        for module, tree in {**params, **state}.items()
        for name, a in tree.items()
    }
    return kept, np.asarray(y)


def _equinox_layer(mode: str) -> Run:
    def run(settings, arrays, batches, x):
        import equinox as eqx
        import jax
        import jax.numpy as jnp

        settings = {"input_size": CHANNELS, "mode": mode, **settings}
        layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(**settings, axis_name="batch")
        averages = "batch_state_index" if mode == "batch" else "ema_state_index"
        count = "batch_counter" if mode == "batch" else "ema_first_time_index"
        if arrays is not None:
            given = {name: jnp.asarray(a) for name, a in arrays.items()}
            if layer.weight is not None:
                layer = eqx.tree_at(lambda m: (m.weight, m.bias), layer, (given["weight"], given["bias"]))
            state = state.set(getattr(layer, count), jnp.array(arrays[count].item()))
            state = state.set(getattr(layer, averages), (given[f"{averages}/0"], given[f"{averages}/1"]))

        def apply(layer, state, x):
            mapped = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            return mapped(x[..., None], state)

        for batch in batches:
            _, state = apply(layer, state, batch)
        y, _ = apply(eqx.nn.inference_mode(layer), state, x)
        mean, var = state.get(getattr(layer, averages))
        parameters = {} if layer.weight is None else {"weight": layer.weight, "bias": layer.bias}
        kept = parameters | {count: state.get(getattr(layer, count)), f"{averages}/0": mean, f"{averages}/1": var}
        return {name: np.asarray(a) for name, a in kept.items()}, np.asarray(y)[..., 0]

    return run


def onnx_layer(settings, arrays, batches, x):
    from onnx import TensorProto, checker, helper
    from onnx.reference import ReferenceEvaluator

    names = ("scale", "B", "input_mean", "input_var")
    if arrays is None:
        arrays = {name: np.full(CHANNELS, name in ("scale", "input_var"), np.float32) for name in names}
    arrays = {name: np.asarray(a, np.float32) for name, a in arrays.items()}

    def apply(x, training):
        outputs = ["y", "running_mean", "running_var"] if training else ["y"]
        node = helper.make_node("BatchNormalization", ["x", *names], outputs, training_mode=int(training), **settings)
        infos = [
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape if n in "xy" else (CHANNELS,)) for n in group]
            for group in (["x", *names], outputs)
        ]
        model = helper.make_model(helper.make_graph([node], "g", *infos), opset_imports=[helper.make_opsetid("", 15)])
        checker.check_model(model)
        return ReferenceEvaluator(model).run(None, {"x": x, **arrays})

    for batch in batches:
        _, arrays["input_mean"], arrays["input_var"] = apply(batch, True)
    return arrays, apply(x, False)[0]


def mlx_layer(settings, arrays, batches, x):
    import mlx.core as mx
    from mlx import nn

    layer = nn.BatchNorm(**{"num_features": CHANNELS, **settings})
    if arrays is not None:
        layer.load_weights([(name, mx.array(np.asarray(a, np.float32))) for name, a in arrays.items()])
    for batch in batches:
        layer(mx.array(batch))
    y = np.array(layer.eval()(mx.array(x)))
    return {name: np.array(a) for name, a in layer.parameters().items()}, y


def chainer_layer(settings, arrays, batches, x):
    import io

    import chainer

    layer = chainer.links.BatchNormalization(**{"size": CHANNELS, **settings})
    file = io.BytesIO()
    if arrays is not None:
        np.savez(file, **arrays)
        chainer.serializers.load_npz(io.BytesIO(file.getvalue()), layer)
    for batch in batches:
        layer(batch)
    with chainer.using_config("train", False):
        y = layer(x).array
    file = io.BytesIO()
    chainer.serializers.save_npz(file, layer)
    return dict(np.load(io.BytesIO(file.getvalue()))), y


def mxnet_layer(settings, arrays, batches, x):
    import mxnet as mx

    layer = mx.gluon.nn.BatchNorm(**{"in_channels": CHANNELS, **settings})
    layer.initialize()
    parameters = {name.partition("_")[2]: p for name, p in layer.collect_params().items()}
    for name, a in (arrays or {}).items():
        parameters[name].set_data(mx.nd.array(a))
    for batch in batches:
        with mx.autograd.record():
            y = layer(mx.nd.array(batch))
        y.backward()  # which is when it updates its running statistics
    return {name: p.data().asnumpy() for name, p in parameters.items()}, layer(mx.nd.array(x)).asnumpy()


def mxnet_fix_gamma_operator(settings, arrays, batches, x):
    import mxnet as mx

    names = ("gamma", "beta", "moving_mean", "moving_var")
    if arrays is None:
        arrays = {name: np.full(CHANNELS, name in ("gamma", "moving_var"), np.float32) for name in names}
    own = {name: mx.nd.array(np.array(arrays[name])) for name in names}
    for batch in batches:
        with mx.autograd.record():
            x_ = mx.nd.array(batch)
            x_.attach_grad()
            y = mx.nd.BatchNorm(x_, *own.values(), **settings)
        y.backward()
    y = mx.nd.BatchNorm(mx.nd.array(x), *own.values(), **settings).asnumpy()
    return {name: a.asnumpy() for name, a in own.items()}, y


#: convention -> (what to install for it, the function).
RUN: dict[str, tuple[str, Run]] = {
    "torch": ("torch", torch_layer),
    "keras": ("keras", keras_layer),
    "flax": ("flax", flax_layer),
    "flax-linen": ("flax", linen_layer),
    "haiku": ("dm-haiku", haiku_layer),
    "chainer": ("chainer", chainer_layer),
    "onnx": ("onnx", onnx_layer),
    "mlx": ("mlx", mlx_layer),
    "equinox": ("equinox", _equinox_layer("batch")),
    "equinox-ema": ("equinox", _equinox_layer("ema")),
    "mxnet": ("mxnet", mxnet_layer),
    "mxnet-fix-gamma": ("mxnet", mxnet_fix_gamma_operator),
}


def batches() -> list[np.ndarray]:
    """Small numbers of binary digits, so that every framework is given the same."""
    values = np.random.default_rng(5).integers(-64, 64, (3, 6, CHANNELS)) * [1, 2, 4] + [0, 50, -100]
    return list((values / 16).astype(np.float32))


def start(convention: str):
    """A state that every framework can hold, of numbers that float32 and JSON hold exactly."""
    import anybn

    state = anybn.BatchNormState(CHANNELS, eps=2.0**-7, momentum=0.25, ddof=anybn.interop.CONVENTIONS[convention].ddof)
    if convention != "mxnet-fix-gamma":
        state.weight = np.array([1.5, -0.5, 2.0], np.float32)
    state.bias = np.array([0.25, -1.0, 8.0], np.float32)
    state.running_mean, state.running_var = np.array([0.5, 3.0, -7.0]), np.array([0.125, 4.0, 16.0])
    return state


def given(convention: str) -> dict[str, Any]:
    """`start` in the framework's terms, as JSON has it."""
    from anybn import interop

    state, rules = start(convention), interop.CONVENTIONS[convention]
    settings = interop.settings(state, convention)
    return {
        "settings": settings,
        "eps and momentum": {name: settings[name] for name, _ in (rules.eps, rules.momentum)},
        "constants": dict(rules.constants),
        "arrays": {name: a.tolist() for name, a in state.state_dict(convention).items()},
    }


def as_array(recorded: Any) -> np.ndarray:
    return np.asarray(recorded, np.float32) if isinstance(recorded, list) else np.asarray(recorded)


def observe(convention: str, given: dict[str, Any]) -> dict[str, Any]:
    """What a framework does with a layer of its own, and with the one that is given; as JSON has it."""
    package, run = RUN[convention]
    x, *steps = batches()
    arrays = {name: as_array(a) for name, a in given["arrays"].items()}

    def result(settings, arrays, steps, x=x):
        arrays, y = run(settings, arrays, steps, x)
        return {"arrays": {name: np.asarray(a).tolist() for name, a in arrays.items()}, "y": np.asarray(y).tolist()}

    return {
        "version": f"{package} {version(package)}",
        "given": given,
        "by default": result(given["constants"], None, [batch * SMALL for batch in steps], x * SMALL),
        "own": result({**given["eps and momentum"], **given["constants"]}, None, steps),
        "evaluated": result(given["settings"], arrays, []),
        "trained on": result(given["settings"], arrays, steps),
    }


def installed(convention: str) -> bool:
    try:
        return bool(version(RUN[convention][0]))
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for convention in RUN:
        inputs = given(convention) if importlib.util.find_spec("anybn") else record[convention]["given"]
        record.setdefault(convention, {})["given"] = inputs
        if installed(convention):
            record[convention] = observe(convention, inputs)
    rows = [
        f"{json.dumps(convention)}: {{\n"
        + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in row.items())
        + "\n}"
        for convention, row in record.items()
    ]
    RECORD.write_text("{\n" + ",\n".join(rows) + "\n}\n")
