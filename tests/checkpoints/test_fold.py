"""fold: the layer with batch norm behind it, and the folded layer, give the same, by torch's own layers."""

import functools
import os

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")
F = torch.nn.functional


def state_of(channels, scale=True, bias=True):
    state = anybn.BatchNormState(channels, scale=scale, bias=bias, dtype="float64")
    anybn.batch_norm(inputs.normal((50, channels)) * 3 + 1, state, training=True)
    weight_and_bias = inputs.normal((2, channels), 1)
    if scale:
        state.weight = weight_and_bias[0]
    if bias:
        state.bias = weight_and_bias[1]
    return state.to("torch")


#: name -> (layer, shape of weight, of x, channel_axis, groups), of layers before the batch norm and behind it
BEFORE = {
    "linear": (F.linear, (6, 4), (5, 4), 0, 1),
    "conv": (F.conv2d, (6, 4, 3, 3), (2, 4, 7, 7), 0, 1),
    "grouped conv": (functools.partial(F.conv2d, groups=2), (6, 2, 3, 3), (2, 4, 7, 7), 0, 2),
    "depthwise conv": (functools.partial(F.conv1d, groups=6), (6, 1, 3), (2, 6, 7), 0, 6),
    "transposed conv": (F.conv_transpose2d, (4, 6, 3, 3), (2, 4, 5, 5), 1, 1),
    "grouped transposed conv": (functools.partial(F.conv_transpose2d, groups=2), (4, 3, 3, 3), (2, 4, 5, 5), 1, 2),
}
BEHIND = {
    "linear behind": (F.linear, (5, 6), (4, 6), None, 1),
    "conv behind": (F.conv2d, (4, 6, 3, 2), (2, 6, 7, 7), None, 1),
    "strided conv behind": (functools.partial(F.conv2d, stride=2, dilation=2), (4, 6, 3, 2), (2, 6, 7, 7), 1, 1),
    "grouped conv behind": (functools.partial(F.conv1d, groups=2), (8, 3, 3), (2, 6, 7), 1, 2),
    "depthwise conv behind": (functools.partial(F.conv2d, groups=6), (12, 1, 3, 3), (2, 6, 7, 7), None, 6),
}


@pytest.mark.parametrize(("scale", "bias"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", BEFORE | BEHIND)
def test_folded_layers(name, with_bias, scale, bias):
    after = name in BEHIND
    layer, weight_shape, x_shape, channel_axis, groups = (BEFORE | BEHIND)[name]
    state = state_of(6, scale, bias)
    weight, x = (torch.from_numpy(inputs.normal(shape, 2)) for shape in (weight_shape, x_shape))
    bias = torch.from_numpy(inputs.normal((weight_shape[0] if after else 6,), 3)) if with_bias else None
    if after:
        expected = layer(anybn.batch_norm(x, state), weight, bias)
    else:
        expected = anybn.batch_norm(layer(x, weight, bias), state)
    folded = anybn.fold(state, weight, bias, channel_axis=channel_axis, groups=groups, after=after)
    # behind, sums of up to 36 products
    assert torch.allclose(layer(x, *folded), expected, rtol=1e-12, atol=1e-11 if after else 1e-12)


nn = torch.nn
MODULES = {
    "Linear": (lambda **options: nn.Linear(4, 6, **options), nn.BatchNorm1d, (5, 4)),
    **{
        f"{cls.__name__}, {groups} groups": (
            functools.partial(cls, 4, 6 if groups < 4 else 8, 3, stride=2, groups=groups),
            norm,
            (3, 4, *(7, 6, 5)[: norm_rank - 2]),
        )
        for cls, norm, norm_rank in (
            (nn.Conv1d, nn.BatchNorm1d, 3),
            (nn.Conv2d, nn.BatchNorm2d, 4),
            (nn.Conv3d, nn.BatchNorm3d, 5),
            (nn.ConvTranspose1d, nn.BatchNorm1d, 3),
            (nn.ConvTranspose2d, nn.BatchNorm2d, 4),
            (nn.ConvTranspose3d, nn.BatchNorm3d, 5),
        )
        for groups in (1, 2, 4)
    },
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_torchs_own_modules(name, with_bias, affine):
    """torch's layer and torch's batch norm behind it, against torch's layer alone with the folded weights."""
    make, norm_of, x_shape = MODULES[name]
    layer, folded = make(bias=with_bias).double(), make(bias=True).double()
    x = torch.from_numpy(inputs.normal(x_shape, 2))
    norm = norm_of(layer(x).shape[1], affine=affine, eps=1e-3).double()
    with torch.no_grad():
        if affine:
            norm.weight.copy_(torch.from_numpy(inputs.normal(norm.weight.shape, 3)))
            norm.bias.copy_(torch.from_numpy(inputs.normal(norm.bias.shape, 4)))
        norm(layer(x))
        expected = norm.eval()(layer(x))
        state = anybn.interop.from_state_dict(norm.state_dict(), eps=norm.eps)
        weight, bias = anybn.fold(
            state,
            layer.weight,
            layer.bias,
            channel_axis=1 if "Transpose" in name else 0,
            groups=getattr(layer, "groups", 1),
        )
        folded.weight.copy_(weight)
        folded.bias.copy_(bias)
        assert torch.allclose(folded(x), expected, rtol=1e-12, atol=1e-12)  # the sums' own roundings


@pytest.mark.parametrize(("dtype", "ulps"), [("float16", 0.501), ("float32", 0.500001), ("float64", 3)])
def test_folded_weights_are_rounded_once(dtype, ulps):
    """float64 has nothing wider behind it: a square root, a division and two products. float16 goes through float32."""
    state = state_of(6).to("numpy")
    weight, bias = inputs.normal((6, 400), 2).astype(dtype), inputs.normal((6,), 3).astype(dtype)
    wide = np.longdouble
    scale = state.weight.astype(wide) / np.sqrt(state.running_var.astype(wide) + wide(state.eps))
    exact = (
        weight.astype(wide) * scale[:, None],
        (bias.astype(wide) - state.running_mean) * scale + state.bias,
    )
    for ours, exactly in zip(anybn.fold(state, weight, bias), exact, strict=True):
        assert ours.dtype == dtype
        spacing = np.spacing(np.maximum(np.abs(exactly), np.finfo(dtype).tiny).astype(dtype)).astype(wide)
        assert np.all(np.abs(ours - exactly) <= ulps * spacing)


def test_folded_into_channels_last_layers_behind():
    """In the orders of Keras and Flax: (*kernel, in / groups, out), and a transposed one (*kernel, out, in)."""
    state = state_of(6).to("numpy")
    x, kernel = inputs.normal((9, 6), 2), inputs.normal((6, 4), 3)
    for axis in (-2, 0):
        folded, bias = anybn.fold(state, kernel, channel_axis=axis, after=True)
        assert np.allclose(x @ folded + bias, anybn.batch_norm(x, state) @ kernel, rtol=1e-12, atol=1e-12)
    weight = inputs.normal((8, 3, 5, 2), 4)  # torch's, of 2 groups
    expected = anybn.fold(state, weight, groups=2, after=True)
    folded, bias = anybn.fold(state, weight.transpose(2, 3, 1, 0), channel_axis=-2, groups=2, after=True)
    assert np.array_equal(folded.transpose(3, 2, 0, 1), expected[0])
    assert np.allclose(bias, expected[1], rtol=1e-14)


def test_borders_that_make_folding_behind_inexact():
    state = state_of(6).to("torch")
    weight, x = torch.from_numpy(inputs.normal((4, 6, 3, 3), 2)), torch.from_numpy(inputs.normal((2, 6, 7, 7), 3))
    for padding in (1, (0, 1), "same"):
        with pytest.raises(ValueError, match="because of padding this does not reach all outputs alike"):
            anybn.fold(state, weight, after=True, padding=padding)
    for padding in (0, (0, 0), "valid"):
        anybn.fold(state, weight, after=True, padding=padding)
    with pytest.raises(ValueError, match="because of its transposed kernel"):
        anybn.fold(state, weight.transpose(0, 1), after=True, channel_axis=0)
    state.bias, state.running_mean = torch.zeros(6).double(), torch.zeros(6).double()  # nothing is shifted
    folded = anybn.fold(state, weight, after=True, padding=1)
    expected = F.conv2d(anybn.batch_norm(x, state), weight, padding=1)
    assert torch.allclose(F.conv2d(x, *folded, padding=1), expected, rtol=1e-12, atol=1e-11)
    kernel = torch.from_numpy(inputs.normal((6, 2, 3, 3), 4))  # in groups, and as Keras has it
    folded = anybn.fold(state, kernel, after=True, channel_axis=0, groups=2)
    expected = F.conv_transpose2d(anybn.batch_norm(x, state), kernel, groups=2)
    assert torch.allclose(F.conv_transpose2d(x, *folded, groups=2), expected, rtol=1e-12, atol=1e-11)
    turned, _ = anybn.fold(state, kernel.permute(2, 3, 1, 0), after=True, channel_axis=-1, groups=2)
    assert torch.equal(turned.permute(3, 2, 0, 1), folded[0])


def test_channels_last_order_of_axes():
    state = state_of(6).to("numpy")
    weight, x = inputs.normal((4, 6), 2), inputs.normal((5, 4), 3)
    for groups in (1, 2):  # a convolution of groups has all of its output channels on this axis
        folded, bias = anybn.fold(state, weight, channel_axis=-1, groups=groups)
        assert np.allclose(x @ folded + bias, anybn.batch_norm(x @ weight, state), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Dense", "Conv2D", "grouped Conv2D", "DepthwiseConv2D", "Conv2DTranspose"])
def test_kerass_own_layers(name):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="keras: not installed, pip install keras")
    layers = keras.layers
    layer, channel_axis = {
        "Dense": (layers.Dense(6), -1),
        "Conv2D": (layers.Conv2D(6, 3), -1),
        "grouped Conv2D": (layers.Conv2D(6, 3, groups=2), -1),
        "DepthwiseConv2D": (layers.DepthwiseConv2D(3, depth_multiplier=2), -1),
        "Conv2DTranspose": (layers.Conv2DTranspose(6, 3), -2),
    }[name]
    x = inputs.normal((3, 4) if name == "Dense" else (3, 5, 5, 4), 2).astype(np.float32)
    channels = layer(x).shape[-1]
    state = state_of(channels).to("numpy")
    expected = anybn.batch_norm(np.asarray(layer(x)), state, axis=-1)
    kernel, bias = (np.asarray(w) for w in layer.weights)
    folded, bias = anybn.fold(
        state, kernel.reshape(*kernel.shape[:2], -1) if "Depth" in name else kernel, bias, channel_axis=channel_axis
    )
    layer.set_weights([folded.reshape(kernel.shape), bias])
    # float32 sums of up to 36 products in two orders
    assert np.abs(np.asarray(layer(x)) - expected).max() <= 36 * 2**-24 * np.abs(expected).max()


def test_results_keep_weights_dtype():
    weight, bias = anybn.fold(state_of(6), torch.ones(6, 4, dtype=torch.float16))
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
        (
            {"weight": np.ones((6, 3)), "after": True},
            "does not give the state's 6 channels: pass the axis of the input",
        ),
        ({"weight": np.ones((4, 6, 1)), "after": True, "channel_axis": 2}, "pass the axis of the input channels"),
        ({"weight": np.ones((4, 6)), "after": True, "bias": np.ones(6)}, r"bias has shape \(6,\); it must be \(4,\)"),
        ({"weight": np.ones((4, 6)), "after": True, "padding": "full"}, "padding is 'full'; it must be one of 'same'"),
        ({"weight": np.ones((4, 6)), "after": True, "padding": None}, "padding is None; it must be an int, several"),
        ({"weight": np.ones((6, 3)), "after": 1}, "after is 1, a int; it must be True or False"),
        ({"weight": np.ones((6, 3)), "channel_axis": "0"}, "channel_axis is '0', a str; it must be an int"),
        ({"weight": np.ones((6, 3)), "bias": torch.ones(6)}, "bias is a torch.Tensor but weight is a numpy array"),
    ],
)
def test_what_does_not_fit(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        anybn.fold(state_of(6), **arguments)
    with pytest.raises(ValueError, match="state has track_running_stats=False, so there are no constants to fold"):
        anybn.fold(anybn.BatchNormState(6, track_running_stats=False), np.ones((6, 2)))
