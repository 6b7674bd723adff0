"""The live state of a module: what either side writes, the other reads; and threads."""

import copy
import math
import threading

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs, oracle

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")

from torch_modules.pairs import PAIRS, X, assert_close, assert_same_state, buffers_of, nn, pair  # noqa: E402

import anybn.torch  # noqa: E402


def test_numpy_and_torch_see_one_anothers_changes():
    ours, theirs = (kind(3) for kind in PAIRS[2])
    weight, mean = ours.weight, ours.running_mean
    optimizers = [torch.optim.SGD(module.parameters(), 0.1, momentum=0.9) for module in (ours, theirs)]
    layer = anybn.BatchNorm(3, state=ours.state)
    for step in range(4):
        x = X + step
        if step % 2:
            y = layer(x.numpy())
            assert isinstance(y, np.ndarray)
            theirs(x)
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (module(x) ** 3).sum().backward()
            optimizer.step()
    assert ours.weight is weight
    assert ours.running_mean is mean
    assert ours.state.num_batches_tracked == ours.num_batches_tracked == 6
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name].to(value.dtype), value, rtol=1e-4, atol=1e-5)  # float32 training
    evaluated = anybn.batch_norm(X.numpy(), ours.state)
    assert torch.equal(torch.from_numpy(evaluated), ours.eval()(X).detach())
    assert torch.equal(mean, ours.state.running_mean)

    ours.state.weight = np.array([1.0, 2.0, 3.0])
    assert weight.tolist() == [1, 2, 3]
    assert weight.requires_grad
    ours.state.num_batches_tracked = 9
    ours.state.momentum, ours.state.eps = None, 1e-3
    assert (int(ours.num_batches_tracked), ours.momentum, ours.eps) == (9, None, 1e-3)
    assert repr(ours.state) == "BatchNormState(3, eps=0.001, momentum=None) on torch, 9 batches tracked"


def test_gradients_through_the_state_reach_the_parameters():
    bn = anybn.torch.BatchNorm2d(3)
    (anybn.batch_norm(X, bn.state, training=True) ** 3).sum().backward()
    assert bn.weight.grad is not None
    assert int(bn.num_batches_tracked) == 1


def test_state_copies_and_checkpoints(tmp_path):
    bn = anybn.torch.BatchNorm2d(3)
    bn(X)
    saved = bn.state.copy()
    assert type(saved) is type(copy.deepcopy(bn.state)) is anybn.BatchNormState
    values = inputs.state_values(saved)
    bn.state.save(tmp_path / "bn.safetensors")
    bn(X * 2)
    assert inputs.state_values(saved) == values
    loaded = anybn.BatchNormState.load(tmp_path / "bn.safetensors")
    weight = bn.weight
    bn.state.load_state_dict(loaded.state_dict())
    assert inputs.state_values(bn.state.copy()) == values
    assert bn.weight is weight
    with pytest.raises(anybn.CheckpointError, match="nothing was loaded: missing key"):
        bn.state.load_state_dict({"weight": np.zeros(3)})
    assert inputs.state_values(bn.state.copy()) == values


def test_what_a_modules_state_refuses():
    bn = anybn.torch.BatchNorm2d(3, affine=False)
    before = buffers_of(bn)
    with pytest.raises(anybn.StateError, match="a torch module's own and cannot move to numpy"):
        bn.state.to("numpy")
    assert bn.state.to("torch").to(X).running_mean is bn.running_mean
    with pytest.raises(ValueError, match="weight cannot be set"):
        bn.state.weight = np.ones(3)
    with pytest.raises(ValueError, match=r"running_var is -1\.0 in channel 1"):
        bn.state.running_var = np.array([1.0, -1, 1])
    with pytest.raises(AttributeError):
        bn.state.ddof = 0
    with pytest.raises(TypeError, match="bias requires grad, and a copy of it would not be trained"):
        anybn.torch.BatchNorm2d(3).state.bias = nn.Parameter(torch.ones(3))
    with pytest.raises(anybn.NonFiniteError):
        anybn.batch_norm(X.numpy() * np.inf, bn.state, training=True, nonfinite="raise")
    assert all(map(torch.equal, buffers_of(bn), before))


@pytest.mark.parametrize("of", [torch.clone, lambda a: a.numpy().copy()], ids=["torch", "numpy"])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("name", "value"), [("running_mean", math.nan), ("running_var", math.inf), ("running_var", -1)]
)
def test_a_checkpoint_with_impossible_statistics_is_refused(name, value, assign, of):
    net = nn.Sequential(anybn.torch.BatchNorm2d(3))
    before, loaded = buffers_of(net[0]), {key: of(a) for key, a in net.state_dict().items()}
    loaded["0.weight"][:] = 7
    loaded[f"0.{name}"][1] = value
    with pytest.raises(RuntimeError, match=rf"0\.{name} is {float(value)} in channel 1; it must be finite"):
        net.load_state_dict(loaded, assign=assign)
    assert all(map(torch.equal, buffers_of(net[0]), before))
    assert bool((net[0].weight == 1).all())


def test_a_nan_does_not_spoil_the_statistics(way):
    x = X.clone()
    x[0, 1, 0, 0] = torch.nan
    for module in (anybn.torch.BatchNorm2d(3), anybn.torch.BatchNorm2d(3).to(memory_format=torch.channels_last)):
        y = module(x)
        assert y[:, 1].isnan().all()
        assert y[:, 0].isfinite().all()
        assert module.running_mean[1] == 0
        assert module.running_mean[0] != 0
        assert int(module.num_batches_tracked) == 1


def test_other_libraries_train_a_module(target):
    """Every library of the tests: the module stays where it is."""
    bn, expected = anybn.torch.BatchNorm1d(3), anybn.BatchNormState(3)
    x = inputs.normal((8, 3)).astype(np.float32)
    anybn.batch_norm(target.array(x), bn.state, training=True)
    anybn.batch_norm(x, expected, training=True)
    tolerance = 4 if target.has_float64 else 4 * 2**29  # in units of float64 and float32
    assert oracle.error(bn.running_var.numpy(), expected.running_var, "float64") <= tolerance
    assert int(bn.num_batches_tracked) == 1


def test_jax_cannot_trace_changes_of_a_module():
    jax = pytest.importorskip("jax", reason="jax: not installed, pip install jax")
    bn = anybn.torch.BatchNorm1d(3)
    before = buffers_of(bn)
    with pytest.raises(anybn.StateError, match=r"pass module.state.copy\(\) into the traced function"):
        jax.jit(lambda x: anybn.batch_norm(x, bn.state, training=True))(jax.numpy.ones((4, 3)))
    assert all(map(torch.equal, buffers_of(bn), before))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_large_module_takes_the_threads(momentum):
    """Beyond what one step takes, beside torch in float64, with x contiguous or channels last."""
    x = torch.from_numpy(inputs.normal((16, 24, 33, 40))) + 5
    for memory_format in (torch.contiguous_format, torch.channels_last):
        ours, theirs = pair(2, 24, momentum=momentum)
        for module in (ours, theirs):
            given = x.clone(memory_format=memory_format).requires_grad_()
            y = module(given)
            assert y.is_contiguous(memory_format=memory_format)
            (y**3).sum().backward()
            means = (p.grad / (16 * 33 * 40) for p in module.parameters())  # 21,120 terms of size 1 cancel to a few
            module.results = y.detach(), given.grad, *means
        for a, b in zip(ours.results, theirs.results, strict=True):
            assert_close(a, b)
        del ours.results, theirs.results
        assert_same_state(ours, theirs)


def test_no_update_is_lost_between_threads(way):
    bn = anybn.torch.BatchNorm1d(3, momentum=None)
    batches = [torch.from_numpy(inputs.normal((16, 3), seed)).float() + seed for seed in range(40)]

    def train(part):
        for x in part:
            bn(x)

    threads = [threading.Thread(target=train, args=(batches[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert int(bn.num_batches_tracked) == 40
    mean = torch.stack([x.double().mean(0) for x in batches]).mean(0)
    assert torch.allclose(bn.running_mean, mean, rtol=1e-12)
