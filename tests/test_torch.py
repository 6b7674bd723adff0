"""torch: autograd to second order, memory formats, parameters, and states that train between forward and backward."""

import copy

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs, oracle

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")


@pytest.fixture
def x():
    return torch.from_numpy(inputs.normal((5, 3, 4)) * 2 + 1).requires_grad_()


def trained_state(**options):
    state = anybn.BatchNormState(3, dtype="float64", **options)
    anybn.batch_norm(inputs.normal((20, 3), seed=9) * 2 + 1, state, training=True)
    return state


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_first_and_second_order(x, training, masked, relu):
    """Against finite differences of torch's own checker, in x, weight, bias and residual at once."""
    mask = torch.from_numpy(np.random.default_rng(1).random((5, 4)) < 0.8) if masked else None
    weight, bias = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    residual = torch.randn_like(x, requires_grad=True)

    def f(x, weight, bias, residual):
        state = trained_state().to(x)
        state.weight, state.bias = weight, bias
        return anybn.batch_norm(
            x, state, training=training, mask=mask, residual=residual, activation="relu" if relu else None
        )

    assert torch.autograd.gradcheck(f, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(f, (x, weight, bias, residual))


def test_gradients_are_torchs_own_on_easy_data():
    x = torch.randn(16, 8, 7, 7, requires_grad=True)
    ours, theirs = anybn.BatchNorm2d(8), torch.nn.BatchNorm2d(8)
    ours.state.to(x)
    weight = torch.nn.Parameter(torch.rand(8))
    ours.state.weight = weight
    assert ours.state.weight is weight
    theirs.weight.data = weight.data.clone()
    grads = []
    for bn, w in ((ours, weight), (theirs, theirs.weight)):
        x.grad = None
        (bn(x) ** 3).sum().backward()
        grads.append((x.grad, w.grad))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-3, rtol=1e-4)
    assert torch.allclose(ours.state.running_var.float(), theirs.running_var)


def test_training_between_an_evaluation_and_its_backward(x):
    """torch's module uses the new statistics then: silently wrong, 0.52 for 1.00."""
    state = trained_state()
    expected = torch.autograd.grad(anybn.batch_norm(x, state).sum(), x)[0]
    y = anybn.batch_norm(x, state)
    anybn.batch_norm(x.detach() * 100, state, training=True)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_a_step_commits_once_however_often_it_is_differentiated(x):
    state = anybn.BatchNormState(3)
    y = anybn.batch_norm(x, state, training=True)
    (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    torch.autograd.grad((first**2).sum(), x)
    assert state.num_batches_tracked == 1
    assert oracle.error(state.running_mean.numpy(), 0.1 * x.detach().numpy().mean((0, 2)), "float64") <= 4
    assert not state.running_mean.requires_grad


def test_no_graph_where_none_is_wanted(x):
    state = anybn.BatchNormState(3)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not anybn.batch_norm(x, state, training=True).requires_grad
    assert not anybn.batch_norm(x.detach(), state).requires_grad
    y, pullback = anybn.batch_norm_vjp(x, state)
    assert not y.requires_grad
    assert not pullback(torch.ones_like(y)).x.requires_grad
    # What inference mode left in the state can be trained on.
    anybn.batch_norm(x, state, training=True).sum().backward()
    assert x.grad is not None


def test_empty_batches_have_gradients():
    x = torch.zeros(0, 3, 4, requires_grad=True)
    anybn.batch_norm(x, anybn.BatchNormState(3), training=True).sum().backward()
    assert x.grad.shape == (0, 3, 4)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_memory_format_is_kept(requires_grad):
    x = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last).requires_grad_(requires_grad)
    y = anybn.batch_norm(x, anybn.BatchNormState(3), training=True)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_out_and_autograd(x):
    state = anybn.BatchNormState(3)
    with pytest.raises(
        ValueError, match=r"out was given but autograd is to record this call: drop out, or use torch.no_grad"
    ):
        anybn.batch_norm(x, state, training=True, out=torch.empty_like(x))
    with torch.no_grad():
        out = torch.empty_like(x)
        assert anybn.batch_norm(x, state, training=True, out=out) is out
    with torch.no_grad(), pytest.raises(ValueError, match="out shares part of x's memory"):
        anybn.batch_norm(x[:-1], state, training=True, out=x[1:])
    with pytest.raises(ValueError, match="out is an expanded view, whose elements share memory"):
        anybn.batch_norm(x.detach(), state, out=torch.zeros(1, 3, 4, dtype=x.dtype).expand(5, 3, 4))


def test_sparse_and_quantized():
    with pytest.raises(TypeError, match=r"x has the layout torch.sparse_coo: .* make it dense: x.to_dense\(\)"):
        anybn.batch_norm(torch.eye(3).to_sparse(), anybn.BatchNormState(3))


def test_state_dicts_are_interchangeable_with_torchs():
    theirs = torch.nn.BatchNorm2d(3)
    for seed in range(3):
        theirs(torch.from_numpy(inputs.normal((8, 3, 4, 4), seed).astype(np.float32)) * 3 + 1)
    state = anybn.BatchNormState(3)
    state.load_state_dict(theirs.state_dict())
    x = torch.from_numpy(inputs.normal((8, 3, 4, 4), 7).astype(np.float32))
    assert torch.allclose(anybn.batch_norm(x, state), theirs.eval()(x), atol=1e-6)

    fresh = torch.nn.BatchNorm2d(3)
    fresh.load_state_dict(state.to("torch").state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name])


def test_state_beside_a_model_can_be_deep_copied(x):
    bn = anybn.BatchNorm(3)
    bn(x)
    twin = copy.deepcopy(bn)
    bn(x)
    assert twin.state.num_batches_tracked == 1
    assert bn.state.num_batches_tracked == 2
