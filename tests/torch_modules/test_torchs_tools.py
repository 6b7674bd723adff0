"""Tools of torch that look at a batch norm's class or buffers do with ours what they do with torch's."""

import copy
import importlib

import numpy as np
import pytest

import anybn

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")

from torch_modules.pairs import X, nn  # noqa: E402

import anybn.torch  # noqa: E402

#: torch's own words about what these tools use, or will become.
pytestmark = pytest.mark.filterwarnings("ignore")


def net(training=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))
    for _ in range(3):
        model(X)
    return model.train(training)


def both(training=False):
    return anybn.torch.convert(net(training)), net(training)


def kinds(model):
    return [type(module).__name__ for module in model.modules()]


def assert_alike(a, b):
    """To some roundings of float32 in values around 1."""
    assert torch.allclose(a, b, rtol=0, atol=2**-19)


# -- fusing -----------------------------------------------------------------------------------------------------------


def fused_by_fx(model):
    return importlib.import_module("torch.fx.experimental.optimization").fuse(model)


def fused_by_ao(model):
    return torch.ao.quantization.fuse_modules(model, [["0", "1", "2"], ["3", "4"]])


@pytest.mark.parametrize("fused", [fused_by_fx, fused_by_ao])
def test_fusing_folds(fused):
    results = [fused(model) for model in both()]
    assert kinds(results[0]) == kinds(results[1])
    assert not any("BatchNorm" in kind for kind in kinds(results[0]))
    assert_alike(results[0](X), net()(X))


@pytest.mark.parametrize("fused", [fused_by_fx, fused_by_ao])
def test_what_computes_more_than_torchs_is_not_folded(fused):
    """A relu, or a sum, would be lost."""
    model = net()
    model[1] = anybn.torch.BatchNorm2d(4, activation="relu")
    model.eval()
    expected = model(X)
    try:
        result = fused(copy.deepcopy(model))
    except (AssertionError, NotImplementedError):  # torch.ao knows no way to fuse these
        return
    assert_alike(result(X), expected)


def test_fusing_a_graph_with_residuals():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return (self.bn(self.conv(x)) + x).relu()

    model = anybn.torch.convert(Block().eval(), fuse=(X,))
    assert_alike(fused_by_fx(model)(X), model(X))


@pytest.mark.parametrize("training", [True, False])
def test_quantizing_with_fx(training):
    from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping, quantize_fx

    results = []
    for model in both(training):
        if training:
            prepared = quantize_fx.prepare_qat_fx(model, get_default_qat_qconfig_mapping(), (X,))
            prepared(X).sum().backward()
        else:
            prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping(), (X,))
            prepared(X)
        results.append((kinds(prepared), prepared(X)))
    assert results[0][0] == results[1][0]
    assert torch.allclose(results[0][1], results[1][1], rtol=0, atol=0.1)  # a step of 8 bits may go the other way
    assert (results[0][1] - results[1][1]).abs().mean() < 0.01


def test_quantization_aware_training_of_listed_modules():
    results = []
    for model in both(True):
        model = torch.ao.quantization.fuse_modules_qat(model, [["0", "1", "2"], ["3", "4"]])
        model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        prepared = torch.ao.quantization.prepare_qat(model)
        prepared(X).sum().backward()
        results.append((kinds(prepared), prepared(X)))
    assert results[0][0] == results[1][0]
    assert_alike(results[0][1], results[1][1])


# -- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without MKLDNN")
def test_to_mkldnn():
    mkldnn = importlib.import_module("torch.utils.mkldnn")
    ours, theirs = (mkldnn.to_mkldnn(model)(X.to_mkldnn()).to_dense() for model in both())
    assert torch.equal(ours, theirs)


def test_convert_sync_batchnorm_gives_a_group():
    ours, _ = both()
    modules = list(ours.modules())
    process_group = object()
    assert torch.nn.SyncBatchNorm.convert_sync_batchnorm(ours, process_group) is ours
    assert all(a is b for a, b in zip(ours.modules(), modules, strict=True))
    assert ours[1].group.process_group is process_group
    assert_alike(ours(X), net()(X))
    theirs = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net())
    assert type(theirs[1]) is nn.SyncBatchNorm
    assert theirs[1].running_var.dtype == torch.float32


@pytest.mark.parametrize("bias", [True, False] if "bias" in (nn.BatchNorm2d.__init__.__kwdefaults__ or ()) else [True])
def test_checkpoints_of_other_precision_and_of_other_libraries(bias):
    ours = anybn.torch.BatchNorm2d(3)
    ours.load_state_dict(nn.BatchNorm2d(3).state_dict(), assign=True)
    assert ours.running_mean.dtype == ours.running_var.dtype == torch.float64
    state = anybn.BatchNormState(3, bias=bias)
    anybn.batch_norm(X.numpy(), state, training=True)
    model = nn.Sequential(anybn.torch.BatchNorm2d(3) if bias else anybn.torch.BatchNorm2d(3, bias=False))
    model.load_state_dict({f"0.{name}": value for name, value in state.state_dict().items()})
    assert torch.equal(model[0].running_var, torch.from_numpy(state.running_var))
    assert int(model[0].num_batches_tracked) == 1
    assert (model[0].bias is None) is not bias
    assert np.array_equal(model.eval()(X).detach(), anybn.batch_norm(X.numpy(), state))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        model[0].load_state_dict(anybn.BatchNormState(4, bias=bias).state_dict())


@pytest.mark.parametrize("average", ["lerp", "swa_utils"])
def test_exponential_averages_of_converted_models(average):
    """Whether the copy is made of the converted model, or made before and converted like it."""
    swa = torch.optim.swa_utils
    for first in (True, False):
        model, expected = net(True), net(True)
        averages = []
        for trained in (model, expected):
            if trained is model and first:
                anybn.torch.convert(trained)
            averaged = swa.AveragedModel(trained, multi_avg_fn=swa.get_ema_multi_avg_fn(0.9), use_buffers=True)
            if trained is model and not first:
                anybn.torch.convert(trained)
                anybn.torch.convert(averaged)
            for step in range(3):
                trained(X + step)
                if average == "swa_utils":
                    averaged.update_parameters(trained)
                    continue
                with torch.no_grad():
                    for a, b in zip(averaged.module.buffers(), trained.buffers(), strict=True):
                        if a.is_floating_point():
                            a.lerp_(b, 0.1)
            averages.append(averaged.module)
        for a, b in zip(averages[0].buffers(), averages[1].buffers(), strict=True):
            assert torch.allclose(a.to(b.dtype), b, rtol=2**-20, atol=2**-20)
