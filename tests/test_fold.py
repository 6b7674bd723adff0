"""fold: the layer with batch norm behind it, and the folded layer, give the same, by torch's own layers."""

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")
F = torch.nn.functional


def state_of(channels, affine):
    state = anybn.BatchNormState(channels, affine=affine, dtype="float64")
    anybn.batch_norm(inputs.normal((50, channels)) * 3 + 1, state, training=True)
    if affine:
        state.weight, state.bias = inputs.normal((2, channels), 1)
    return state.to("torch")


LAYERS = {
    "linear": (F.linear, (6, 4), (5, 4), 0, 1),
    "conv": (F.conv2d, (6, 4, 3, 3), (2, 4, 7, 7), 0, 1),
    "grouped conv": (lambda x, w, b: F.conv2d(x, w, b, groups=2), (6, 2, 3, 3), (2, 4, 7, 7), 0, 2),
    "depthwise conv": (lambda x, w, b: F.conv1d(x, w, b, groups=6), (6, 1, 3), (2, 6, 7), 0, 6),
    "transposed conv": (F.conv_transpose2d, (4, 6, 3, 3), (2, 4, 5, 5), 1, 1),
    "grouped transposed conv": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, groups=2),
        (4, 3, 3, 3),
        (2, 4, 5, 5),
        1,
        2,
    ),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_folded_layers(name, with_bias, affine):
    layer, weight_shape, x_shape, channel_axis, groups = LAYERS[name]
    state = state_of(6, affine)
    weight, x = (torch.from_numpy(inputs.normal(shape, 2)) for shape in (weight_shape, x_shape))
    bias = torch.from_numpy(inputs.normal((6,), 3)) if with_bias else None
    expected = anybn.batch_norm(layer(x, weight, bias), state)
    folded = anybn.fold(state, weight, bias, channel_axis=channel_axis, groups=groups)
    assert torch.allclose(layer(x, *folded), expected, rtol=1e-12, atol=1e-12)


def test_keras_order_of_axes():
    state = state_of(6, True).to("numpy")
    weight, x = inputs.normal((4, 6), 2), inputs.normal((5, 4), 3)
    folded, bias = anybn.fold(state, weight, channel_axis=-1)
    assert np.allclose(x @ folded + bias, anybn.batch_norm(x @ weight, state))


def test_results_keep_weights_dtype():
    weight, bias = anybn.fold(state_of(6, True), torch.ones(6, 4, dtype=torch.float16))
    assert weight.dtype == bias.dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"weight": np.ones((5, 4))},
            r"weight has shape \(5, 4\) with channel_axis=0 and groups=1, which does not give",
        ),
        ({"weight": np.ones((4, 3)), "channel_axis": 2}, r"channel_axis is 2 but weight has shape \(4, 3\)"),
        ({"weight": np.ones((6, 3)), "bias": np.ones(3)}, r"bias has shape \(3,\); it must be \(6,\)"),
        ({"weight": np.ones((6, 3)), "groups": 0}, "groups is 0; it must be 1 or more"),
    ],
)
def test_shapes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        anybn.fold(state_of(6, True), **arguments)
    with pytest.raises(ValueError, match="state has track_running_stats=False, so there are no constants to fold"):
        anybn.fold(anybn.BatchNormState(6, track_running_stats=False), np.ones((6, 2)))
