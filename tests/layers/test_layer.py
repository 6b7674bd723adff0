"""The layers: modes, ranks, settings, sharing, repr."""

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs, oracle

SHAPES = {1: [(4, 3), (4, 3, 5)], 2: [(4, 3, 5, 6)], 3: [(4, 3, 2, 5, 6)]}
LAYERS = {1: anybn.BatchNorm1d, 2: anybn.BatchNorm2d, 3: anybn.BatchNorm3d}


@pytest.mark.parametrize("dimensions", LAYERS)
def test_ranks_as_torch_checks_them(dimensions):
    for other, shapes in SHAPES.items():
        for shape in shapes:
            bn = LAYERS[dimensions](3)
            x = inputs.normal(shape)
            if other == dimensions:
                assert np.abs(bn(x).mean()) < 1e-12
                continue
            needs = {1: r"\(N, C\) or \(N, C, L\)", 2: r"\(N, C, H, W\)", 3: r"\(N, C, D, H, W\)"}[dimensions]
            with pytest.raises(ValueError, match=f"; BatchNorm{dimensions}d needs {needs}"):
                bn(x)
            assert bn.state.num_batches_tracked == 0
            assert anybn.BatchNorm(3)(x).shape == shape
    with pytest.raises(
        ValueError, match=r"x has shape \(3, 5, 6\); BatchNorm2d needs .*: for one sample use x\[None\]"
    ):
        anybn.BatchNorm2d(3)(np.zeros((3, 5, 6)))


def test_modes():
    bn = anybn.BatchNorm(3)
    assert bn.training
    assert bn.eval() is bn
    assert not bn.training
    x = inputs.normal((8, 3)) * 2 + 1
    assert oracle.error(bn(x), oracle.normalize(x, np.zeros(3), np.ones(3)), "float64") <= 4
    assert bn.train() is bn
    bn(x)
    assert bn.state.num_batches_tracked == 1
    with pytest.raises(TypeError, match="mode is 'no', a str; it must be True or False"):
        bn.train("no")


def test_options_reach_the_function():
    x, residual = inputs.normal((6, 4, 3)), inputs.normal((6, 4, 3), 1)
    mask = inputs.normal((6, 4), 2) > -1
    bn = anybn.BatchNorm(3, axis=-1, activation="relu", eps=1e-2, momentum=0.3, ddof=0, dtype="float64")
    y, pullback = bn.vjp(x, mask=mask, residual=residual)
    state = anybn.BatchNormState(3, eps=1e-2, momentum=0.3, ddof=0, dtype="float64")
    expected, expected_pullback = anybn.batch_norm_vjp(
        x, state, training=True, axis=-1, mask=mask, residual=residual, activation="relu"
    )
    assert np.array_equal(y, expected)
    assert np.array_equal(pullback(x).x, expected_pullback(x).x)
    assert inputs.state_values(bn.state) == inputs.state_values(state)
    out = np.empty_like(x)
    assert bn(x, out=out) is out


def test_sharing_a_state():
    state = anybn.BatchNormState(3, eps=0.1)
    assert anybn.BatchNorm(3, state=state).state is state
    assert anybn.BatchNorm(3, eps=0.1, state=state).state is state
    with pytest.raises(ValueError, match=r"num_features is 4 but the state has 3"):
        anybn.BatchNorm(4, state=state)
    with pytest.raises(ValueError, match=r"eps is 0.5 but the state has 0.1: the state's settings hold, drop eps"):
        anybn.BatchNorm(3, eps=0.5, state=state)
    with pytest.raises(TypeError, match="state is a dict"):
        anybn.BatchNorm(3, state={})


@pytest.mark.parametrize(("options", "absent"), [({"bias": False}, "bias"), ({"scale": False}, "weight")])
def test_a_weight_or_a_bias_alone(options, absent):
    bn = anybn.BatchNorm1d(3, **options)
    assert getattr(bn.state, absent) is None
    assert anybn.BatchNorm(3, state=bn.state, **options).state is bn.state
    (option,) = options
    with pytest.raises(ValueError, match=f"{option} is False but the state has True"):
        anybn.BatchNorm(3, state=anybn.BatchNormState(3), **options)
    assert f"{option}=False" in repr(bn)
    x = inputs.normal((8, 3)) * 2 + 1
    statistics = oracle.statistics(x)
    assert oracle.error(bn(x), oracle.normalize(x, statistics.mean, statistics.var()), "float64") <= 4


def test_torchs_arguments_by_position():
    bn = anybn.BatchNorm1d(128, 1e-3, None, False, False)
    assert bn.state._settings() | {"num_features": 128, "eps": 1e-3, "momentum": None} == bn.state._settings()
    assert (bn.state.affine, bn.state.track_running_stats) == (False, False)
    with pytest.raises(TypeError, match="positional arguments"):
        anybn.BatchNorm1d(128, 1e-3, None, False, False, True)
    with pytest.raises(TypeError, match="num_features is missing: pass the number of channels, or a state="):
        anybn.BatchNorm()


def test_the_states_arrays_on_the_layer(target):
    bn = anybn.BatchNorm(3)
    x = target.array((inputs.normal((8, 3)) + 2).astype(np.float32))
    bn(x)
    assert bn.weight is bn.state.weight
    assert bn.running_mean is bn.state.running_mean
    assert bn.num_batches_tracked == 1
    bn.weight = target.array(np.full(3, 2, np.float32))
    bn.running_var = target.array(np.full(3, 4.0), "float64" if target.has_float64 else "float32")
    assert np.array_equal(target.numpy(bn.state.weight), np.full(3, 2))
    assert np.array_equal(target.numpy(bn.state.running_var), np.full(3, 4))
    assert list(bn.parameters()) == ["weight", "bias"]
    twin = bn.copy()
    assert twin.state == bn.state
    twin.reset()
    assert twin.state != bn.state
    assert twin.state == anybn.BatchNormState(3)
    twin.load_state_dict(bn.state_dict())
    assert twin.state == bn.state


def test_layers_and_files(tmp_path):
    pytest.importorskip("safetensors", reason="checkpoints need safetensors")
    bn = anybn.BatchNorm(3, eps=1e-3)
    bn(inputs.normal((8, 3)))
    bn.save(tmp_path / "bn")
    again = anybn.BatchNorm(state=anybn.BatchNormState.load(tmp_path / "bn"))
    assert again.state == bn.state
    assert repr(again) == repr(bn)


def test_repr():
    bn = anybn.BatchNorm2d(8, momentum=None, activation="relu", affine=False)
    assert repr(bn) == (
        "BatchNorm2d(8, eps=1e-05, momentum=None, affine=False, axis=1, activation='relu') in training on numpy, "
        "0 batches tracked"
    )


def test_activation_is_checked_when_the_layer_is_made():
    with pytest.raises(ValueError, match="activation is 'gelu'; it must be one of None, 'relu'"):
        anybn.BatchNorm(3, activation="gelu")
