"""Batch norms of other classes: what converts by itself, by name, by also= and register, and what is refused."""

import copy
import gc
import pickle
import weakref

import pytest

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")

from torch.nn.utils import parametrize  # noqa: E402
from torch_modules.pairs import X, assert_close, nn  # noqa: E402

import anybn.torch  # noqa: E402


class OnlySettings(nn.BatchNorm2d):
    """Another constructor, another word, and torch's own forward."""

    def __init__(self, num_features):
        super().__init__(num_features, eps=1e-3, momentum=0.5)
        self.word = "mine"


class AnyRank(nn.modules.batchnorm._BatchNorm):
    """As several packages have it, to take any number of dimensions."""

    def _check_input_dim(self, input):
        if input.dim() > 4:
            raise ValueError("not more than 4")


class Squared(nn.BatchNorm2d):
    """What it does reaches batch norm by super()."""

    def forward(self, x):
        return super().forward(x).square()


class OursSquared(Squared, anybn.torch.BatchNorm2d):
    pass


class Doubled(nn.BatchNorm2d):
    """What it does does not."""

    def forward(self, x):
        self.num_batches_tracked += self.training
        y = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return 2 * y


class OursDoubled(anybn.torch.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Foreign(nn.Module):
    """A batch norm that is none of torch's."""

    def __init__(self, num_features):
        super().__init__()
        self.running_mean, self.running_var = torch.zeros(num_features), torch.ones(num_features)


def named(cls, module):
    """cls as if it were of this module: what is known by name needs no package of this name."""
    return type(cls.__name__, (cls,), {"__module__": module, "__qualname__": cls.__name__})


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's, in short."""

    def __init__(self, num_features, act, drop=None):
        super().__init__(num_features)
        self.drop, self.act = drop or nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class FrozenBatchNorm2d(nn.Module):
    """torchvision's."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 0.5), ("bias", 1.0), ("running_mean", 2.0), ("running_var", 3.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x):
        weight, bias, mean, var = (b.reshape(1, -1, 1, 1) for b in self.buffers())
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


def compared(module, x=X, **options):
    """(the module in float64 converted, itself), after three steps of each on x and one in evaluation."""
    theirs = module.double()
    ours = anybn.torch.convert(copy.deepcopy(theirs), **options)
    for step in range(3):
        given = [(x.double() + step).requires_grad_() for _ in range(2)]
        results = [m(g) for m, g in zip((ours, theirs), given, strict=True)]
        assert_close(*results)
        for y in results:
            (y**3).sum().backward()
        assert torch.allclose(given[0].grad, given[1].grad, rtol=1e-9, atol=1e-9)  # sums of cubes that cancel
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert_close(a, b)
    assert_close(ours.eval()(x.double()), theirs.eval()(x.double()))
    return ours, theirs


@pytest.mark.parametrize(("module", "x"), [(OnlySettings(3), X), (AnyRank(3), X), (AnyRank(3), X[..., 0])])
def test_a_subclass_whose_forward_is_torchs_own_converts_by_itself(module, x):
    ours, theirs = compared(module, x)
    assert isinstance(ours, type(theirs))
    assert (ours.eps, getattr(ours, "word", None)) == (theirs.eps, getattr(theirs, "word", None))
    assert repr(ours) == repr(theirs)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours)
        assert torch.equal(twin(x.double()), ours(x.double()))
    assert anybn.torch.convert(ours) is ours
    assert type(anybn.torch.revert(ours)) is type(theirs)
    if isinstance(theirs, AnyRank):
        with pytest.raises(ValueError, match="not more than 4"):
            anybn.torch.convert(theirs)(X[None].double())


@pytest.mark.parametrize(("theirs", "ours"), [(Squared, OursSquared), (Doubled, OursDoubled)])
def test_classes_that_the_user_knows(theirs, ours, monkeypatch):
    module, _ = compared(theirs(3), also={theirs: ours})
    assert isinstance(module, ours)
    assert isinstance(module, theirs)
    assert type(pickle.loads(pickle.dumps(module))) is type(module)
    assert type(anybn.torch.revert(module)) is theirs
    with pytest.raises(TypeError, match="its forward is its own"):
        anybn.torch.convert(module)
    monkeypatch.setattr("anybn.torch.classes._registered", {})
    for known in (theirs, f"{__name__}.{theirs.__name__}"):
        anybn.torch.register(known, ours)
        assert isinstance(anybn.torch.convert(theirs(3)), ours)

    class Further(theirs):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(TypeError, match="is a Further: its forward is its own"):
        anybn.torch.convert(Further(3))  # by exact type


def test_what_register_and_also_refuse():
    for wrong in (nn.BatchNorm2d, 3, nn.ReLU):
        with pytest.raises(TypeError, match=r"ours for Squared is .*; it must be a subclass"):
            anybn.torch.register(Squared, wrong)
        with pytest.raises(TypeError, match="ours for Squared is "):
            anybn.torch.convert(Squared(3), also={Squared: wrong})
    with pytest.raises(TypeError, match="theirs is a int; it must be a class or its name"):
        anybn.torch.register(3, OursSquared)
    with pytest.raises(TypeError, match=r"model is a Foreign without num_features, eps, .*needs: give that class what"):
        anybn.torch.convert(Foreign(3), also={Foreign: OursDoubled})


def test_what_is_refused_is_named_once_a_class():
    norms = [Squared(3) for _ in range(7)]
    model = nn.Sequential(nn.BatchNorm2d(3), *norms, Doubled(3), nn.Sequential(OnlySettings(3)))
    model[0].forward = model[0].forward
    with pytest.raises(TypeError) as error:
        anybn.torch.convert(model)
    text = str(error.value)
    assert text.startswith("nothing was converted: 0 is a BatchNorm2d whose forward was replaced on the object")
    assert "each of 1, 2, 3 and 4 more is a Squared: its forward is its own" in text
    assert "8 is a Doubled: " in text
    assert text.count("Squared:") == 2  # the reason, and also={Squared: ...}
    assert type(model[9][0]) is OnlySettings


def test_what_cannot_be_converted_can_be_left():
    model = nn.Sequential(nn.BatchNorm2d(3), Squared(3), nn.Sequential(nn.BatchNorm2d(3, eps=0.0)))
    left = anybn.torch.convert(model, strict=False)
    assert type(model[0]) is anybn.torch.BatchNorm2d
    assert list(left) == ["1", "2.0"]
    assert left["1"].startswith("a Squared: its forward is its own")
    assert left["2.0"].startswith("a BatchNorm2d with settings that anybn refuses: eps is 0.0; it must be positive")
    assert anybn.torch.convert(model[0], strict=False) == {}
    with pytest.raises(ValueError, match="strict=False returns what was left, fuse a new model"):
        anybn.torch.convert(model, strict=False, fuse=(X,))


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.GELU(), nn.Identity()])
@pytest.mark.parametrize("drop", [None, nn.Dropout(0.0)])
def test_timms_batch_norm_with_an_activation(act, drop):
    cls = named(BatchNormAct2d, "timm.layers.norm_act")
    ours, _ = compared(cls(3, copy.deepcopy(act), drop))
    assert isinstance(ours, cls)
    assert isinstance(ours, anybn.torch.BatchNorm2d)
    assert type(ours.act) is type(act)
    assert list(dict(ours.named_children())) == ["drop", "act"]
    watched = []
    handle = ours.act.register_forward_hook(lambda *_: watched.append(1))
    y = ours(X.double())
    handle.remove()
    assert watched  # a ReLU that is watched is called
    assert torch.equal(ours(X.double()), y)
    assert type(anybn.torch.revert(ours)) is cls


def test_frozen_batch_norms():
    cls = named(FrozenBatchNorm2d, "torchvision.ops.misc")
    ours = compared_frozen(cls)
    assert isinstance(ours, cls)
    assert not isinstance(ours, nn.modules.batchnorm._BatchNorm)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")(X)
    assert torch.equal(compiled, ours(X))
    assert type(anybn.torch.revert(ours)) is cls
    unusual = cls(3, eps=0.0)  # which torch's box detectors have; anybn refuses it
    assert type(anybn.torch.convert(nn.Sequential(unusual))[0]) is cls


def compared_frozen(cls):
    theirs = cls(3)
    ours = anybn.torch.convert(copy.deepcopy(theirs)).train()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    given = [X.clone().requires_grad_() for _ in range(2)]
    results = [m(g) for m, g in zip((ours, theirs), given, strict=True)]
    assert torch.allclose(*results, rtol=0, atol=2**-20)  # theirs rounds a scale and a shift
    for y in results:
        y.sum().backward()
    assert torch.allclose(given[0].grad, given[1].grad, rtol=2**-22)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name])
    return ours


def test_a_sync_batch_norm_becomes_one_with_a_group(tmp_path):
    import torch.distributed as dist

    model = nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3))
    expected = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).double()
    anybn.torch.convert(model.double())
    assert not isinstance(model[1], nn.SyncBatchNorm)  # which DistributedDataParallel refuses on the CPU
    assert model[0].group is None
    assert repr(model[1].group) == "TorchGroup()"
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert_close(model(X.double()), expected(X.double()))
    finally:
        dist.destroy_process_group()
    assert_close(model[1].running_var, expected[1].running_var)
    assert_close(model.eval()(X.double()), expected.eval()(X.double()))
    assert type(anybn.torch.revert(model)[1]) is nn.SyncBatchNorm


def test_classes_made_for_a_model_end_with_it():
    cls = type("MadeHere", (nn.BatchNorm2d,), {})
    model = anybn.torch.convert(cls(3))
    made = weakref.ref(cls), weakref.ref(type(model))
    del cls, model
    for _ in range(2):  # theirs is known as long as ours is there
        gc.collect()
    assert [cls() for cls in made] == [None, None]


class Exponential(nn.Module):
    def forward(self, weight):
        return weight.exp()

    def right_inverse(self, weight):
        return weight.log()


@pytest.mark.parametrize("theirs", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_parametrized_modules(theirs):
    """Whatever comes first of a parametrization, the conversion and their ends, what was asked for is there."""
    model, x = nn.Sequential(theirs(3, dtype=torch.float64).eval()), X.double()
    bn, expected = model[0], copy.deepcopy(model)(x)
    parametrize.register_parametrization(bn, "weight", Exponential())
    anybn.torch.convert(model)
    assert isinstance(bn, anybn.torch.module._BatchNorm)
    assert_close(copy.deepcopy(model)(x), expected)
    parametrize.remove_parametrizations(bn, "weight")
    assert isinstance(bn, anybn.torch.module._BatchNorm)
    parametrize.register_parametrization(bn, "weight", Exponential())
    anybn.torch.revert(model)
    assert not isinstance(bn, anybn.torch.module._BatchNorm)
    parametrize.remove_parametrizations(bn, "weight")
    assert type(bn) is theirs


def test_what_is_computed_cannot_be_written_to():
    bn = nn.BatchNorm2d(3)
    parametrize.register_parametrization(bn, "weight", Exponential())
    model = anybn.torch.convert(nn.Sequential(bn))
    states = anybn.load_batch_norms(model)
    with pytest.raises(ValueError, match=r"weight is what a parametrization computes, .* lost: remove"):
        bn.state.load_state_dict(states["0"].state_dict())
    with pytest.raises(ValueError, match=r"model has a batch norm whose weight .* lost: remove"):
        anybn.save_batch_norms(model, states)
    bn = nn.BatchNorm2d(3)
    parametrize.register_parametrization(bn, "running_var", Exponential())
    with pytest.raises(TypeError, match="model is a BatchNorm2d whose running_var is parametrized"):
        anybn.torch.convert(bn)
    assert type(bn).__bases__ == (nn.BatchNorm2d,)
