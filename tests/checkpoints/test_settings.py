"""The settings of each layer: told by the source, given by name or pattern, or assumed and said to be."""

import warnings

import numpy as np
import pytest

import anybn


def arrays(*layers):
    one = {"weight": np.ones(2), "bias": np.zeros(2), "running_mean": np.zeros(2), "running_var": np.full(2, 1e-3)}
    return {f"{layer}.{name}": a for layer in layers for name, a in one.items()}


LAYERS = arrays("stem", "blocks.0", "blocks.1", "head")


def test_what_is_assumed_is_said():
    with pytest.warns(UserWarning, match=r"does not tell eps: assumed eps=1e-05, momentum=0\.1 for 4 layers") as seen:
        states = anybn.load_batch_norms(LAYERS)
    (warning,) = seen
    assert warning.filename == __file__
    assert "from 'stem' to 'head'" in str(warning.message)
    assert {state.eps for state in states.values()} == {1e-5}
    with pytest.warns(UserWarning, match=r"assumed epsilon=0\.001, momentum=0\.99 for 1 layers"):
        anybn.load_batch_norms({"bn/moving_mean": np.zeros(2), "bn/moving_variance": np.ones(2)})
    with pytest.warns(UserWarning, match="assumed eps=1e-05 for 1 layers"):  # Haiku has no default momentum
        anybn.load_batch_norms({f"bn/~/{n}_ema/average": np.ones(2) for n in ("mean", "var")})


def test_nothing_is_said_of_what_is_given():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        states = anybn.load_batch_norms(LAYERS, eps=1e-3)
        assert {state.eps for state in states.values()} == {1e-3}
        states = anybn.load_batch_norms(LAYERS, eps={"blocks.*": 1e-3, "*": 1e-5}, momentum={"head": 0.5})
    assert {name: state.eps for name, state in states.items()} == {
        "stem": 1e-5,
        "blocks.0": 1e-3,
        "blocks.1": 1e-3,
        "head": 1e-5,
    }
    assert {name: state.momentum for name, state in states.items()} == {
        "stem": 0.1,
        "blocks.0": 0.1,
        "blocks.1": 0.1,
        "head": 0.5,
    }


def test_the_first_pattern_counts_and_what_none_matches_is_assumed():
    with pytest.warns(UserWarning, match="for 1 layers, from 'head' to 'head'"):
        states = anybn.load_batch_norms(LAYERS, eps={"blocks.0": 1e-2, "blocks.*": 1e-3, "st?m": 1e-4})
    assert [state.eps for state in states.values()] == [1e-4, 1e-2, 1e-3, 1e-5]


def test_what_is_given_is_checked_under_the_name_it_was_given():
    keras = {"bn/moving_mean": np.zeros(2), "bn/moving_variance": np.ones(2)}
    with pytest.raises(ValueError, match=r"^epsilon is 0\.0; it must be positive"):
        anybn.load_batch_norms(keras, epsilon=0.0)
    with pytest.raises(TypeError, match=r"^epsilon is '1', a str; it must be a float"):
        anybn.load_batch_norms(keras, epsilon={"*": "1"})
    with pytest.raises(
        ValueError, match=r"^eps has the pattern 'block\.\*', but no layer matches it; there are 'stem'"
    ):
        anybn.load_batch_norms(LAYERS, eps={"block.*": 1e-3})
    with pytest.raises(TypeError, match="'epsilon' is no setting of this convention: it has 'eps' and 'momentum'"):
        anybn.load_batch_norms(LAYERS, epsilon={"*": 1e-3})


def test_layers_have_their_axis():
    x = np.random.default_rng(0).normal(size=(4, 3, 2)).astype("float32")
    keras = {"bn/moving_mean": np.array([1.0, 2]), "bn/moving_variance": np.array([3.0, 4])}
    found = anybn.load_batch_norms(keras, epsilon=1e-3)
    assert found.axes == {"bn": -1}
    expected = (x.astype("float64") - [1, 2]) / np.sqrt(np.array([3.0, 4]) + 1e-3)
    assert np.abs(found.layers()["bn"](x) - expected).max() <= 2 * 2**-23
    assert anybn.load_batch_norms(LAYERS, eps=1e-3).axes == dict.fromkeys(("stem", "blocks.0", "blocks.1", "head"), 1)


def test_the_arrays_of_keras_renorm_are_taken_the_same_everywhere():
    layer = {"gamma": np.ones(2), "beta": np.zeros(2), "moving_mean": np.zeros(2), "moving_variance": np.ones(2)}
    layer |= {"moving_stddev": np.ones(2), "renorm_mean": np.zeros(2), "renorm_stddev": np.ones(2)}
    state = anybn.interop.from_state_dict(layer, "keras", epsilon=1e-3)
    loaded = anybn.load_batch_norms({f"bn/{name}": a for name, a in layer.items()}, epsilon=1e-3)["bn"]
    assert state.equals(loaded)
    state.load_state_dict(layer, "keras")
