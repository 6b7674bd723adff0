"""Models of the frameworks in memory: every batch norm out of them with its own settings, and back into them."""

import numpy as np
import pytest
from checkpoints.models import MODELS, C, fill

import anybn
from anybn.conformance import inputs

pytestmark = pytest.mark.filterwarnings("ignore:::(keras|flax|equinox|jax)")
X = np.random.default_rng(3).normal(size=(5, 3, 3, C)).astype(np.float32)


@pytest.fixture(params=MODELS)
def example(request):
    return MODELS[request.param]()


def assert_evaluates_the_same(example, source, states):
    """Ours to 2 units of float32 from float64; theirs, which multiply and add in float32, to a few more."""
    for name, state in states.items():
        mean, var, weight, bias = (
            np.asarray(a, np.float64) for a in (state.running_mean, state.running_var, state.weight, state.bias)
        )
        exact = (X.astype(np.float64) - mean) / np.sqrt(var + state.eps) * weight + bias
        scale = np.maximum(1, np.abs(exact))
        ours = anybn.batch_norm(X, state, axis=-1)
        assert np.max(np.abs(ours - exact) / scale) <= 2 * 2**-23
        theirs = example.evaluate(source, name, X)
        assert np.abs(theirs - exact).max() <= 20 * 2**-23 * np.abs(exact).max()


def test_each_layer_has_its_settings(example):
    found = anybn.load_batch_norms(example.source)
    assert {n: (s.eps, s.momentum, found.axes[n]) for n, s in found.items()} == example.settings
    assert list(found) == list(example.settings)
    assert_evaluates_the_same(example, example.source, found)


def test_a_model_takes_states_back(example):
    states = anybn.load_batch_norms(example.source)
    for i, state in enumerate(states.values()):
        fill(lambda field, values, s=state: setattr(s, field, values))
        state.eps, state.momentum, state.num_batches_tracked = 2.0 ** -(i + 3), 0.5, 300
    saved = anybn.save_batch_norms(example.source, states)
    if not isinstance(saved, tuple):  # Equinox
        assert saved is example.source
    assert_evaluates_the_same(example, saved, states)
    again = anybn.load_batch_norms(saved)
    assert {n: (s.eps, s.momentum) for n, s in again.items()} == {n: (s.eps, s.momentum) for n, s in states.items()}
    for name, state in states.items():
        for field in ("weight", "bias", "running_mean", "running_var"):
            assert np.allclose(getattr(again[name], field), getattr(state, field), rtol=1e-6, atol=0)


def test_all_of_them_or_none(example):
    before = anybn.load_batch_norms(example.source)
    first, *_, last = before
    states = {first: before[first].copy(), last: anybn.BatchNormState(C + 1), "foreign": before[first]}
    states[first].running_mean = states[first].running_mean + 1
    with pytest.raises(anybn.CheckpointError) as error:
        anybn.save_batch_norms(example.source, states)
    assert str(error.value).startswith("nothing was saved: ")
    assert f"layer {last!r}: " in str(error.value)
    assert "there is no layer 'foreign'" in str(error.value)
    after = anybn.load_batch_norms(example.source)
    assert all(inputs.state_values(after[name]) == inputs.state_values(before[name]) for name in before)


def test_a_write_that_fails_half_way_is_undone(torch):
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3))
    with torch.inference_mode():
        model[1].running_var = torch.ones(3)  # which may not be written to outside
    states = anybn.load_batch_norms(model)
    for state in states.values():
        state.eps, state.running_mean = 0.5, np.full(3, 7.0)
    with pytest.raises(RuntimeError, match="inference"):
        anybn.save_batch_norms(model, states)
    assert [module.eps for module in model] == [1e-5, 1e-5]
    assert not any(module.running_mean.any() for module in model)


def test_a_model_without_any_batch_norm(torch):
    with pytest.raises(anybn.CheckpointError, match="the model has no batch norm: it is a Linear"):
        anybn.load_batch_norms(torch.nn.Linear(2, 2))


def test_a_layer_is_a_model_of_one(torch):
    layer = torch.nn.BatchNorm1d(3, eps=0.5)
    ((name, state),) = anybn.load_batch_norms(layer).items()
    assert (name, state.eps) == ("", 0.5)


def test_flat_state_of_flax():
    example = MODELS["nnx"]()
    from flax import nnx

    flat = nnx.to_flat_state(nnx.state(example.source))
    for source in (flat, dict(flat)):
        states = anybn.load_batch_norms(source, epsilon={"layers/1": 1e-3, "*": 1e-4})
        assert {n: s.eps for n, s in states.items()} == {n: eps for n, (eps, *_) in example.settings.items()}


def alone_in_torch(**switches):
    import torch

    return torch.nn.BatchNorm1d(3, eps=0.5, **switches), {"bias": {"bias": False}}


def alone_in_keras(**switches):
    import keras

    layer = keras.layers.BatchNormalization(epsilon=0.5, **switches)
    layer.build((2, 3))
    return layer, {"scale": {"scale": False}, "bias": {"center": False}}


def alone_in_nnx(**switches):
    from flax import nnx

    layer = nnx.BatchNorm(3, epsilon=0.5, rngs=nnx.Rngs(0), **switches)
    return layer, {"scale": {"use_scale": False}, "bias": {"use_bias": False}}


@pytest.mark.parametrize(
    ("framework", "make"), [("torch", alone_in_torch), ("keras", alone_in_keras), ("flax", alone_in_nnx)]
)
def test_weight_or_bias_alone(framework, make):
    pytest.importorskip(framework, reason=f"{framework}: not installed, pip install {framework}")
    for option, switches in make()[1].items():
        layer, _ = make(**switches)
        state = anybn.load_batch_norms(layer)[""]
        assert (state.weight is None, state.bias is None) == (option == "scale", option == "bias")
        state.running_mean = np.array([1.0, 2, 3])
        anybn.save_batch_norms(layer, {"": state})
        assert inputs.state_values(anybn.load_batch_norms(layer)[""]) == inputs.state_values(state)
