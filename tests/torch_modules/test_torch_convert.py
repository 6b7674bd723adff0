"""anybn.torch.convert and revert: what stays, what is refused, what is fused, and a network on real digits."""

import copy
import pickle

import numpy as np
import pytest

import anybn

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")

import anybn.torch  # noqa: E402

nn, F = torch.nn, torch.nn.functional


class Block(nn.Module):
    """ResNet's basic block, as torchvision writes it."""

    def __init__(self, before, after, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample = None
        if before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Wrapped(nn.Module):
    """A module around a function of two batch norms' outputs and x."""

    def __init__(self, f):
        super().__init__()
        self.a, self.b, self.relu, self.f = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.ReLU(), f

    def forward(self, x):
        return self.f(self, x)


def resnet():
    torch.manual_seed(0)
    stem = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
    blocks = Block(8, 8), Block(8, 16, stride=2)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)
    return nn.Sequential(*stem, *blocks, *head).double()


def batch_norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def digits():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn: not installed")
    images, labels = datasets.load_digits(return_X_y=True)
    return torch.from_numpy(images).reshape(-1, 1, 8, 8) / 8 - 1, torch.from_numpy(labels)


@pytest.mark.parametrize("fuse", [False, True])
def test_a_resnet_on_digits_trains_step_for_step_and_checkpoints_go_both_ways(fuse):
    """In float64: of the 1e-16 of rounding, 24 steps of training make less than 1e-9."""
    images, labels = digits()
    theirs, ours = resnet(), resnet()
    ours = anybn.torch.convert(ours, fuse=(images[:8],) if fuse else None)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for model in (theirs, ours)]
    for step in range(24):
        x, label = images[step * 64 : step * 64 + 64], labels[step * 64 : step * 64 + 64]
        losses = []
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), label)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert abs(losses[0] - losses[1]) <= 1e-9
    assert losses[0] < 0.6
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, rtol=1e-7, atol=1e-9), name
    assert list(ours.state_dict()) == list(theirs.state_dict())

    test = images[1536:]
    logits = [model.eval()(test).detach() for model in (theirs, ours)]
    assert torch.allclose(*logits, atol=1e-7)
    back, forth = resnet(), anybn.torch.convert(resnet())
    back.load_state_dict(ours.state_dict())
    forth.load_state_dict(theirs.state_dict())
    assert torch.allclose(back.eval()(test), logits[1], rtol=0, atol=1e-12)
    assert torch.allclose(forth.eval()(test), logits[0], rtol=0, atol=1e-12)


def test_everything_stays_but_the_class():
    model = resnet().float()
    model[3].shared = model[1]
    model[3].bn1.eval()
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append("hook"))
    modules, parameters = list(model.modules()), list(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert anybn.torch.convert(model) is model
    assert anybn.torch.convert(model) is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert len(batch_norms(model)) == 7
    for bn in batch_norms(model):
        assert type(bn) in (anybn.torch.BatchNorm1d, anybn.torch.BatchNorm2d)
        assert bn.running_var.dtype == torch.float64
    assert model[3].shared is model[1]
    assert not model[3].bn1.training
    model(torch.ones(4, 1, 8, 8))
    assert seen == ["hook"]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model[4:]))):
        assert type(batch_norms(twin)[-1]) is anybn.torch.BatchNorm1d

    model.load_state_dict(before)
    assert anybn.torch.revert(model) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for bn in batch_norms(model):
        assert type(bn) in (nn.BatchNorm1d, nn.BatchNorm2d)
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_a_batch_norm_by_itself():
    bn = nn.BatchNorm3d(2, momentum=None, affine=False).half()
    assert anybn.torch.convert(bn) is bn
    assert type(bn) is anybn.torch.BatchNorm3d
    bn(torch.ones(2, 2, 3, 1, 1))
    assert type(anybn.torch.revert(bn)) is nn.BatchNorm3d
    with pytest.raises(TypeError, match=r"model is a dict; it must be a torch\.nn\.Module"):
        anybn.torch.convert({})


class Mine(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_cannot_be_converted_is_named():
    lazy = nn.LazyBatchNorm1d()
    for bad, error, message in (
        (Mine(3), TypeError, r"1 is a Mine: .* keep it with keep=\(Mine,\)"),
        (lazy, TypeError, "1 is a LazyBatchNorm1d: run a batch through"),
        (torch.jit.script(nn.BatchNorm1d(3)), TypeError, "1 is scripted, .* convert before scripting"),
        (
            nn.BatchNorm1d(3, eps=0.0),
            ValueError,
            r"1 is a BatchNorm1d with .*: eps is 0\.0; it must be positive",
        ),
    ):
        model = nn.Sequential(nn.BatchNorm1d(3), bad)
        with pytest.raises(error, match="nothing was converted.*" + message):
            anybn.torch.convert(model)
        assert type(model[0]) is nn.BatchNorm1d
        assert model[0].running_var.dtype == torch.float32
    model = nn.Sequential(nn.BatchNorm1d(3), Mine(3))
    for options, error, message in (
        (
            {"fuse": torch.ones(2, 3)},
            TypeError,
            r"fuse is a Tensor; it must be a tuple of the arguments of model\(...\)",
        ),
        ({"fuse": (), "keep": (Mine,)}, ValueError, "fuse has 0 arguments, and model.* does not run with them"),
        ({"keep": Mine}, TypeError, r"keep is .*Mine.*; it must be a tuple of classes, \(Mine,\)"),
        ({"also": Mine}, TypeError, "also is a type; it must be a mapping"),
        ({"also": {"Mine": 3}}, TypeError, "ours for Mine is 3; it must be a subclass"),
        ({"strict": None}, TypeError, "strict is None, a NoneType; it must be True or False"),
    ):
        with pytest.raises(error, match=message):
            anybn.torch.convert(model, **options)
        assert type(model[0]) is nn.BatchNorm1d
    anybn.torch.convert(model, keep=(Mine,))
    assert [type(m) for m in model] == [anybn.torch.BatchNorm1d, Mine]
    lazy(torch.ones(2, 5))
    assert type(anybn.torch.convert(lazy)) is anybn.torch.BatchNorm1d
    active = nn.Sequential(anybn.torch.BatchNorm1d(3, activation="relu"))
    with pytest.raises(TypeError, match="nothing was reverted: 0 has activation='relu', which torch's has not: put a"):
        anybn.torch.revert(active)


def calls(model):
    """name of a batch norm -> what was fused into its calls."""
    nodes = [
        n for n in model.graph.nodes if n.op == "call_module" and isinstance(model.get_submodule(n.target), FUSABLE)
    ]
    return {node.target: sorted(node.kwargs) for node in nodes}


FUSABLE = (anybn.torch.BatchNorm1d, anybn.torch.BatchNorm2d)


def test_fusing_a_resnet_and_back():
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    plain, model = resnet(), resnet()
    fused = anybn.torch.convert(model, fuse=(x,))
    both = ["activation", "residual"]
    assert calls(fused) == {
        "1": ["activation"],
        "3.bn1": ["activation"],
        "3.bn2": both,
        "4.bn1": ["activation"],
        "4.bn2": [],
        "4.downsample.1": both,
        "8": ["activation"],
    }
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert all(int(bn.num_batches_tracked) == 0 and bn.training for bn in batch_norms(fused))
    assert torch.allclose(fused(x), plain(x), rtol=1e-12)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(fused)))
    expected = plain.eval()(x)
    assert torch.allclose(twin.eval()(x), expected, rtol=1e-12)
    assert torch.allclose(model.eval()(x), expected, rtol=1e-12)  # which shares the tensors and goes on working
    assert anybn.torch.revert(fused) is fused
    assert type(batch_norms(fused)[0]) is nn.BatchNorm2d
    assert torch.allclose(fused.eval()(x), expected, rtol=1e-12)


FUSING = {
    "relu": (lambda m, x: F.relu(m.a(x)), {"a": 1}),
    "method": (lambda m, x: m.a(x).relu_(), {"a": 1}),
    "add": (lambda m, x: torch.relu(torch.add(x, m.a(x))), {"a": 2}),
    "two": (lambda m, x: (m.a(x) + m.b(x)).relu(), {"a": 0, "b": 2}),
    "later residual": (lambda m, x: torch.relu(m.a(x) + x * 2), {"a": 2}),
    "used twice": (lambda m, x: (y := m.a(x), F.relu(y) + y)[1], {"a": 0}),
    "sum used": (lambda m, x: (y := m.a(x) + x, F.relu(y) + y)[1], {"a": 0}),
    "broadcast": (lambda m, x: torch.relu(m.a(x) + x[:1]), {"a": 0}),
    "a number": (lambda m, x: torch.relu(m.a(x) + 1), {"a": 0}),
    "alpha": (lambda m, x: torch.relu(torch.add(m.a(x), x, alpha=2)), {"a": 0}),
    "other dtype": (lambda m, x: torch.relu(m.a(x) + x.double()), {"a": 0}),
    "input overwritten": (lambda m, x: (y := x * 1, z := m.a(y), y.mul_(2), torch.relu(z + y))[3], {"a": 0}),
    "residual overwritten": (lambda m, x: (y := x * 1, torch.relu(y.add_(m.a(x))) + y)[1], {"a": 0}),
    "residual overwritten by out": (
        lambda m, x: (y := x * 1, z := m.a(x), torch.sigmoid(y, out=y), torch.relu(z + y))[3],
        {"a": 0},
    ),
    "itself": (lambda m, x: (y := m.a(x), torch.relu(y + y))[1], {"a": 0}),
    "called between": (lambda m, x: (y := m.a(x), z := torch.relu(m.a(x * 3)), torch.relu(y + z))[2], {"a": 1}),
    "other activation": (lambda m, x: F.relu6(m.a(x)), {"a": 0}),
}


@pytest.mark.parametrize("name", FUSING)
def test_what_is_fused_is_the_same(name):
    f, expected = FUSING[name]
    plain = Wrapped(f)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 3))).float()
    model = anybn.torch.convert(copy.deepcopy(plain), fuse=(x,))
    assert {target: len(given) for target, given in calls(model).items()} == expected
    for training in (True, False):
        assert torch.allclose(model.train(training)(x), plain.train(training)(x), atol=1e-6)
    assert torch.allclose(model.a.running_mean.float(), plain.a.running_mean, atol=1e-6)


def test_what_is_frozen_stays_frozen():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Sequential(nn.Dropout(), nn.ReLU()))
    model[1].eval()
    model[3].eval()
    expected = {name: module.training for name, module in model.named_modules()}
    fused = anybn.torch.convert(model, fuse=(torch.ones(2, 1, 3, 3),))
    assert all(module.training == expected[name] for name, module in fused.named_modules())


def test_what_torch_fx_cannot_prove_is_refused():
    x = torch.ones(4, 3)
    hooked = nn.Sequential(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))
    hooked[0].register_forward_hook(lambda *_: None)
    for model, message in (
        (Wrapped(lambda m, x: F.dropout(m.a(x), training=m.training)), "something else in training than in evaluation"),
        (Wrapped(lambda m, x: m.a(x) if x.sum() > 0 else x), "torch.fx cannot trace it"),
        (hooked, "0 has hooks"),
    ):
        with pytest.raises(ValueError, match=message):
            anybn.torch.convert(model, fuse=(x,))
        assert not any(isinstance(m, FUSABLE) for m in model.modules())
        assert all(m.training for m in model.modules())
    hooked = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    hooked[1].register_forward_hook(lambda *_: None)
    assert calls(anybn.torch.convert(hooked, fuse=(x,))) == {"0": []}
