"""anybn.torch.fold: whole models for serving, in float64 beside themselves."""

import copy
import pickle

import pytest

import anybn
from anybn.conformance import inputs

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")

from torch_modules.pairs import PAIRS, nn  # noqa: E402
from torch_modules.test_other_classes import BatchNormAct2d, Squared, named  # noqa: E402

import anybn.torch  # noqa: E402

LAYER = nn.modules.batchnorm._BatchNorm


def trained(model, x):
    """In float64, with statistics, weights and biases that are not those of the start."""
    torch.manual_seed(0)
    model = model.double().train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LAYER) and module.weight is not None:
                module.weight.normal_(), module.bias.normal_()
        for step in range(3):
            model(x + step)
    return model.eval()


def folded(model, x, left=()):
    """The folded model, which must compute what the model does, and leave these batch norms."""
    ours = anybn.torch.convert(copy.deepcopy(model), strict=False) or model
    for given in (model, model if isinstance(ours, dict) else ours):
        before = {name: value.clone() for name, value in given.state_dict().items()}
        result = anybn.torch.fold(given.train())
        given.eval()
        assert torch.allclose(result(x), given(x), rtol=1e-10, atol=1e-10)
        assert list(result.left) == list(left)
        assert sum(isinstance(module, LAYER) for module in result.modules()) == len(left)
        for name, value in given.state_dict().items():
            assert torch.equal(value, before[name])
    return result


X = {rank: torch.from_numpy(inputs.normal((5, 4, 9, 8, 7)[:rank])) for rank in (2, 3, 4, 5)}
BEFORE = {
    "Linear": (nn.Linear(4, 6), 1, 2),
    "Conv1d": (nn.Conv1d(4, 6, 3, padding=1, groups=2), 1, 3),
    "Conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), 2, 4),
    "Conv3d": (nn.Conv3d(4, 6, 2), 3, 5),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 6, 3, groups=2), 2, 4),
}
BEHIND = {
    "Linear": (nn.Linear(4, 6), 1, 2),
    "Conv1d": (nn.Conv1d(4, 6, 3, groups=2, bias=False), 1, 3),
    "Conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"), 2, 4),
    "Conv3d": (nn.Conv3d(4, 8, 2, groups=4), 3, 5),
}


@pytest.mark.parametrize("name", BEFORE)
def test_into_the_layer_before(name):
    layer, dimensions, rank = BEFORE[name]
    norm = PAIRS[dimensions][1]
    model = trained(nn.Sequential(copy.deepcopy(layer), nn.Dropout(0.5), norm(6), norm(6), nn.ReLU()), X[rank])
    folded(model, X[rank])


@pytest.mark.parametrize("name", BEHIND)
def test_into_the_layer_behind(name):
    layer, dimensions, rank = BEHIND[name]
    norm = PAIRS[dimensions][1]
    folded(trained(nn.Sequential(nn.ReLU(), norm(4), nn.Identity(), copy.deepcopy(layer)), X[rank]), X[rank])


LEFT = {
    "a relu": ([nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)], "before it is 0, a ReLU; behind it is 2"),
    "padding": ([nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)], "behind it, batch norm shifts what"),
    "transposed": ([nn.ReLU(), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 3)], "because of its transposed kernel"),
    "statistics": ([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)], "track_running_stats=False"),
    "its own forward": ([nn.Conv2d(4, 4, 1), Squared(4)], "a Squared, whose forward may do anything"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_and_why(name):
    modules, why = LEFT[name]
    model = trained(nn.Sequential(*copy.deepcopy(modules)), X[4])
    result = folded(model, X[4], left=["1"])
    assert why in result.left["1"]


class Net(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.f = f

    def forward(self, x):
        return self.f(self, x)


@pytest.mark.parametrize(
    ("f", "left"),
    [
        (lambda m, x: m.other(m.bn(m.conv(x))), []),
        (lambda m, x: m.bn(y := m.conv(x)) + m.other(y), ["bn", "other"]),  # the layer is read twice
        (lambda m, x: m.bn(m.conv(x)) + m.other(m.conv(x + 1)), ["bn", "other"]),  # and called twice
        (lambda m, x: m.bn(m.conv(x)) + m.bn(m.other(x)), ["bn", "bn", "other"]),
        (lambda m, x: (y := m.bn(x.relu())) + m.conv(y) + m.other(x), ["bn", "other"]),
        (lambda m, x: m.other(x) + nn.functional.conv2d(m.bn(m.conv(x)), m.conv.weight), ["bn", "other"]),
        (lambda m, x: m.other(x) + m.bn(m.conv(x)) * m.conv.bias.sum(), ["bn", "other"]),
    ],
)
def test_what_is_read_or_called_more_than_once_is_left(f, left):
    model = trained(Net(f), X[4])
    result = anybn.torch.fold(model)
    assert torch.allclose(result(X[4]), model(X[4]), rtol=1e-10, atol=1e-10)
    assert set(result.left) == set(left)


def test_hooks_and_weights_of_others_are_left():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    hooked = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    hooked[0].register_forward_hook(lambda module, args, y: y + 1)
    for layer in (hooked[0], Standardized(4, 4, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))):
        model = trained(nn.Sequential(layer, nn.BatchNorm2d(4)), X[4])
        result = anybn.torch.fold(model)
        assert torch.allclose(result(X[4]), model(X[4]), rtol=1e-10, atol=1e-10)
        assert list(result.left) == ["1"]


def test_activations_stay():
    for norm in (
        anybn.torch.BatchNorm2d(4, activation="relu"),
        named(BatchNormAct2d, "timm.layers.norm_act")(4, nn.GELU(), nn.Dropout(0.5)),
        named(BatchNormAct2d, "timm.layers.norm_act")(4, nn.Identity()),
    ):
        model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.Flatten()), X[4])
        result = anybn.torch.fold(model)
        assert not result.left
        assert torch.allclose(result(X[4]), model(X[4]), rtol=1e-10, atol=1e-10)
        assert not any(isinstance(module, LAYER) for module in result.modules())


def test_a_fused_model_is_folded():
    model = Net(lambda m, x: torch.relu(m.bn(m.conv(x)) + x) + m.other(x).relu())
    model = anybn.torch.convert(trained(model, X[4]), fuse=(X[4],))
    result = anybn.torch.fold(model)
    assert list(result.left) == ["other"]
    assert torch.allclose(result(X[4]), model(X[4]), rtol=1e-10, atol=1e-10)
    twin = pickle.loads(pickle.dumps(anybn.torch.fold(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))))
    assert twin.left == {}


def test_a_linear_layer_is_folded_for_the_axis_that_it_shares_with_batch_norm():
    """(N, 4, 4) normalizes the first of the two, and a linear layer has its features on the last."""
    model = trained(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), X[2])
    result = folded(model, X[2])
    with pytest.raises(AssertionError, match="0 has been folded with a batch norm, for inputs of 2 dimensions"):
        result(torch.ones(3, 4, 4).double())


def test_weights_are_rounded_once():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model(X[4].float())
    result = anybn.torch.fold(model)
    weight, bias = anybn.fold(anybn.torch.convert(model)[1].state, model[0].weight.detach(), model[0].bias.detach())
    layer = next(module for module in result.modules() if isinstance(module, nn.Conv2d))
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.bias, bias)


def test_what_cannot_be_folded():
    with pytest.raises(TypeError, match=r"model is a dict; it must be a torch\.nn\.Module"):
        anybn.torch.fold({})
    with pytest.raises(ValueError, match=r"model cannot be folded, because torch\.fx cannot trace it"):
        anybn.torch.fold(Net(lambda m, x: m.bn(x) if x.sum() > 0 else x))
