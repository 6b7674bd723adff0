"""torch: autograd to second order, memory formats, parameters, and states that train between forward and backward."""

import copy

import numpy as np
import pytest

import anybn
from anybn import norms
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
    with pytest.raises(TypeError, match=r"x has the layout torch.sparse_coo: make it dense, e.g. with x.to_dense\(\)"):
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


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own use of it, in forward mode
def test_forward_mode_and_torch_func(x):
    """Against the formula as anyone would write it, which torch differentiates by itself."""

    def plain(x):
        deviation = x - x.mean((0, 2), keepdim=True)
        return deviation / torch.sqrt((deviation**2).mean((0, 2), keepdim=True) + 1e-5)

    def ours(x):
        return anybn.batch_norm(x, anybn.BatchNormState(3), training=True)

    values, direction = x.detach(), torch.randn(5, 3, 4, dtype=torch.float64)
    forward_ad = torch.autograd.forward_ad
    tangents = []
    for f in (ours, plain):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(f(forward_ad.make_dual(values, direction))).tangent)
    assert torch.allclose(*tangents, atol=1e-10)
    for transform in (
        lambda f: torch.func.grad(lambda v: (f(v) ** 3).sum())(values),
        lambda f: torch.func.jvp(f, (values,), (direction,))[1],
        lambda f: torch.func.hessian(lambda v: (f(v) ** 3).sum())(values[:2, :, :2]),
    ):
        assert torch.allclose(transform(ours), transform(plain), atol=1e-9)

    state = trained_state()
    stacked = torch.func.vmap(lambda v: anybn.batch_norm(v, state))(torch.stack([values, values + 1]))
    assert torch.allclose(stacked[1], anybn.batch_norm(values + 1, state))
    arrays = state._arrays
    with pytest.raises(anybn.StateError, match="was not passed into this traced call"):
        torch.func.vmap(lambda v: anybn.batch_norm(v, state, training=True))(torch.stack([values, values + 1]))
    assert state._arrays is arrays


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd, torch.func.hessian])
def test_states_outlive_the_transforms_of_torch_func(x, library, training, transform):
    state, values = trained_state().to(library), x.detach()
    expected = state.copy()
    anybn.batch_norm(values, expected, training=training)
    transform(lambda v: (anybn.batch_norm(v, state, training=training) ** 2).sum())(values)
    y = anybn.batch_norm(values, state)
    assert torch.allclose(y, anybn.batch_norm(values, expected), rtol=1e-12)
    assert state.num_batches_tracked == expected.num_batches_tracked


CALLS = {
    "training": lambda x: anybn.batch_norm(x, anybn.BatchNormState(4, like=x), training=True),
    "evaluation": lambda x: anybn.batch_norm(x, anybn.BatchNormState(4, like=x), activation="relu"),
    "layer_norm": norms.layer_norm,
    "group_norm": lambda x: norms.group_norm(x, num_groups=2),
    "rms_norm": norms.rms_norm,
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_gradients_at_once(name, dtype):
    x = torch.from_numpy(inputs.normal((20, 4)) * 2 + 1).to(dtype).requires_grad_()
    y, many = CALLS[name](x), torch.from_numpy(inputs.normal((3, 20, 4), seed=1)).to(dtype)
    found = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True)[0]
    for dy, dx in zip(many, found, strict=True):
        assert torch.allclose(dx, torch.autograd.grad(y, x, dy, retain_graph=True)[0], atol=8 * torch.finfo(dtype).eps)


def test_parameters_stay_in_training():
    state = anybn.BatchNormState(3).to("torch")
    state.weight = parameter = torch.nn.Parameter(torch.ones(3))
    saved = state.state_dict()
    with torch.no_grad():
        parameter += 1
    state.load_state_dict(saved)
    assert state.weight is parameter
    assert torch.equal(parameter, torch.ones(3))
    for twin in (state.copy(), copy.deepcopy(state)):
        assert isinstance(twin.weight, torch.nn.Parameter)
        assert twin.weight is not parameter
    with pytest.raises(TypeError, match="weight has dtype float64 and requires grad, but the state keeps float32"):
        state.weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))


def test_devices_without_values():
    state = anybn.BatchNormState(3)
    arrays = state._arrays
    with pytest.raises(TypeError, match="x is on the meta device and has no values"):
        anybn.batch_norm(torch.empty(5, 3, device="meta"), state)
    for name in ("torch:meta", "torch:nonsense", "torch:cuda:99"):
        with pytest.raises(ValueError, match=r"torch.* has no"):
            state.to(name)
    assert state._arrays is arrays


@pytest.mark.parametrize("training", [True, False])
def test_the_result_may_be_written_to_in_place(x, training):
    """As nn.ReLU(inplace=True) and ``out += identity`` do behind it."""
    grads = []
    for f in (lambda y: torch.relu_(y.mul_(2)), lambda y: torch.relu(y * 2)):
        y = f(anybn.batch_norm(x, trained_state().to(x), training=training))
        grads.append(torch.autograd.grad((y**3).sum(), x)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("absent", ["weight", "bias"])
def test_modules_with_a_weight_or_a_bias_alone(absent, small):
    """In a compiled step, in kernels, under torch.compile: as with a weight of 1 or a bias of 0."""
    import anybn.torch

    shape = (8, 4) if small else (64, 4, 200)
    whole, module = (anybn.torch.BatchNorm1d(4, activation="relu") for _ in range(2))
    setattr(module, absent, None)
    assert getattr(module.state.copy(), absent) is None
    x = torch.from_numpy(inputs.normal(shape)).float()
    compiled = torch.compile(module, backend="aot_eager")
    for normalize in (module, compiled):
        for mode in (True, False):
            results = []
            for called, bn in ((whole, whole), (normalize, module)):
                bn.train(mode)
                bn.zero_grad()
                leaf = x.clone().requires_grad_()
                y = called(leaf)
                (y * x).sum().backward()
                results.append([y.detach(), leaf.grad, *(p.grad for n, p in bn.named_parameters() if n != absent)])
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b)
