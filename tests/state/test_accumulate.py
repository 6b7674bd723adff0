"""Micro-batches are committed once, as one batch."""

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs, oracle

PARTS = (slice(0, 3), slice(3, 4), slice(4, 12))


def data(row="mean 1e6, std 1", dtype="float32"):
    return inputs.ROWS[row](inputs.normal((12, 4, 9))).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_as_one_batch(target, momentum, dtype):
    target.require(dtype)
    x = data(dtype=dtype)
    state = anybn.BatchNormState(4, momentum=momentum)
    for _ in range(2):
        with anybn.accumulate(state):
            for part in PARTS:
                y = anybn.batch_norm(target.array(x[part]), state, training=True)
                s = oracle.statistics(x[part])
                assert oracle.error(target.numpy(y), oracle.normalize(x[part], s.mean, s.var()), dtype) <= 4
    s, factors = oracle.statistics(x), (0.1, 0.1) if momentum else (1.0, 0.5)
    mean, var = np.zeros(4), np.ones(4)
    for factor in factors:
        mean = oracle.running(mean, s.mean.origin + s.mean.offset, factor)
        var = oracle.running(var, s.var(ddof=1), factor)
    assert oracle.error(target.numpy(state.running_mean), mean, dtype) <= 2
    assert oracle.error(target.numpy(state.running_var), var, dtype) <= 2
    assert state.num_batches_tracked == 2


def test_from_library_to_library(torch):
    x, state, whole = data("N(0, 1)"), anybn.BatchNormState(4), anybn.BatchNormState(4)
    with anybn.accumulate(state):
        anybn.batch_norm(x[:3], state, training=True)
        anybn.batch_norm(torch.from_numpy(x[3:5]), state, training=True)
        anybn.batch_norm(x[5:], state, training=True)
    anybn.batch_norm(x, whole, training=True)
    assert np.allclose(state.running_var, whole.running_var, rtol=1e-14)
    assert state.num_batches_tracked == 1


def test_what_is_not_committed():
    state = anybn.BatchNormState(4)
    before = inputs.state_values(state)

    def step(*micro_batches):
        with anybn.accumulate(state):
            for x in micro_batches:
                anybn.batch_norm(x, state, training=True)

    with pytest.raises(ValueError, match="more than 1 value"):
        step(data(), data()[:1, :, 0])
    assert inputs.state_values(state) == before
    with anybn.accumulate(state):
        anybn.batch_norm(data(), state)
        anybn.batch_norm(data()[:0], state, training=True)
        assert inputs.state_values(state) == before
    assert inputs.state_values(state) == before
    anybn.batch_norm(data(), state, training=True)  # the block is over
    assert state.num_batches_tracked == 1


def test_nonfinite_channels_are_skipped():
    x, state = data("N(0, 1)"), anybn.BatchNormState(4)
    x[5, 2] = np.nan
    with anybn.accumulate(state):
        for part in PARTS:
            anybn.batch_norm(x[part], state, training=True)
    assert state.running_var[2] == 1
    assert (state.running_var[[0, 1, 3]] != 1).all()


def test_layers_and_shared_states():
    x, state = data("N(0, 1)"), anybn.BatchNormState(4)
    first, second = anybn.BatchNorm(4, state=state), anybn.BatchNorm(4, state=state)
    with anybn.accumulate(first, second):
        first(x[:6])
        second.vjp(x[6:])
    whole = anybn.BatchNorm(4)
    whole(x)
    assert np.allclose(state.running_var, whole.state.running_var, rtol=1e-14)
    assert state.num_batches_tracked == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile's own, of what a graph begins with
def test_torch_models(torch):
    import anybn.torch

    def model():
        torch.manual_seed(0)
        return anybn.torch.convert(
            torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.BatchNorm1d(4))
        )

    x = torch.from_numpy(data("N(0, 1)"))
    net, whole = model(), model()
    with anybn.accumulate(net):
        for part in PARTS:
            net(x[part]).sum().backward()
        assert [int(net[i].num_batches_tracked) for i in (0, 2)] == [0, 0]
    whole(x)
    assert [int(net[i].num_batches_tracked) for i in (0, 2)] == [1, 1]
    assert torch.allclose(net[0].running_var, whole[0].running_var, rtol=1e-13)
    net(x)  # the block is over
    assert int(net[0].num_batches_tracked) == 2
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    with anybn.accumulate(net):  # outside of the graph
        for part in PARTS:
            compiled(x[part])
        assert int(net[0].num_batches_tracked) == 3
    assert int(net[0].num_batches_tracked) == 4
    torch._dynamo.reset()
    with anybn.accumulate(net), pytest.raises(Exception, match="disable"):
        torch.compile(net, backend="eager", fullgraph=True)(x)


def test_jax_under_jit(jax):
    x, whole = data("N(0, 1)"), anybn.BatchNormState(4)

    @jax.jit
    def step(x, state):
        with anybn.accumulate(state):
            for part in PARTS:
                anybn.batch_norm(x[part], state, training=True)
        return state

    state = step(x, anybn.BatchNormState(4))
    anybn.batch_norm(x, whole, training=True)
    assert np.allclose(state.running_var, whole.running_var, rtol=1e-6)
    assert state.num_batches_tracked == 1


def test_bad_targets():
    state = anybn.BatchNormState(4)
    with pytest.raises(TypeError, match="accumulate was given nothing"), anybn.accumulate():
        pass
    with pytest.raises(TypeError, match="accumulate was given a int"), anybn.accumulate(3):
        pass
    with anybn.accumulate(state):
        message = "accumulate is open already for BatchNormState"
        with pytest.raises(ValueError, match=message), anybn.accumulate(state):
            pass
        anybn.batch_norm(data(), state, training=True)
    assert state.num_batches_tracked == 1
    torch = pytest.importorskip("torch", reason="torch: not installed")
    message, other = "there is no batch norm of anybn in this Linear", torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=message), anybn.accumulate(other):
        pass
