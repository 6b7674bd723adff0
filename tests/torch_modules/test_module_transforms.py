"""What torch does with modules: copies, checkpointing, compilers, exports, torch.func, modes."""

import copy
import io
import pickle

import pytest

import anybn
from anybn.conformance import inputs

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")

from torch_modules.pairs import X, assert_close, buffers_of, checkpoint, nn, pair  # noqa: E402

import anybn.torch  # noqa: E402


def test_copies_and_pickles():
    bn = anybn.torch.BatchNorm2d(3, activation="relu")
    bn(X)
    buffer = io.BytesIO()
    torch.save(bn.state_dict(), buffer)
    buffer.seek(0)
    fresh = anybn.torch.BatchNorm2d(3, activation="relu")
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    twins = copy.deepcopy(bn), pickle.loads(pickle.dumps(bn)), fresh
    values = buffers_of(bn)
    expected = bn(X)
    for twin in twins:
        assert all(map(torch.equal, buffers_of(twin), values))
        assert torch.equal(twin(X), expected)
        assert int(twin.num_batches_tracked) == 2
        assert twin.state.num_batches_tracked == 2
    assigned = anybn.torch.BatchNorm2d(3)
    assigned.load_state_dict(nn.BatchNorm2d(3).state_dict(), assign=True)  # float32 statistics
    assert torch.equal(assigned(X).relu(), anybn.torch.BatchNorm2d(3)(X).relu())
    assert torch.allclose(assigned.running_mean.double(), values[0], rtol=1e-6)


def test_replicas_of_data_parallel():
    """What nn.DataParallel does on each device: parameters become plain attributes, buffers are shared on the first."""
    bn, expected = anybn.torch.BatchNorm2d(3), anybn.torch.BatchNorm2d(3)
    replica = bn._replicate_for_data_parallel()
    for name, parameter in bn.named_parameters():
        setattr(replica, name, parameter.view_as(parameter))
    assert torch.equal(replica(X), expected(X))
    assert torch.equal(bn.running_var, expected.running_var)
    (replica(X) ** 3).sum().backward()
    assert bn.weight.grad is not None


def test_parametrized_and_without_bias():
    bn = anybn.torch.BatchNorm2d(3)
    torch.nn.utils.parametrize.register_parametrization(bn, "weight", nn.Softplus())
    y = bn(X)
    assert torch.allclose(y, nn.functional.batch_norm(X, None, None, bn.weight, bn.bias, True), atol=1e-6)
    if "bias" in nn.BatchNorm2d.__init__.__kwdefaults__:  # from torch 2.13
        without = anybn.torch.BatchNorm2d(3, bias=False)
        (without(X) ** 3).sum().backward()
        assert without.bias is None
        assert without.state.copy().bias is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_updates_once(reentrant, way):
    bn, layer = anybn.torch.BatchNorm2d(3), anybn.BatchNorm2d(3)
    layer.state.to(X)
    expected = anybn.torch.BatchNorm2d(3)
    grads = []
    for wrap in (lambda f, x: checkpoint(f, x, use_reentrant=reentrant), lambda f, x: f(x)):
        x = X.clone().requires_grad_()
        (wrap(lambda v: bn(v).sin(), x) if not grads else expected(x).sin()).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
    assert all(map(torch.equal, buffers_of(bn), buffers_of(expected)))
    checkpoint(layer, X.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
    assert layer.state.num_batches_tracked == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")  # what is tried here
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace():
    bn = anybn.torch.BatchNorm2d(3).eval()
    assert torch.equal(torch.jit.trace(bn, (X,))(X[:2] + 1), bn(X[:2] + 1))


def test_functional_call_and_torch_func():
    ours, theirs = pair()
    x = X.double()
    before = buffers_of(ours)
    parameters = {name: p.detach() + 1 for name, p in theirs.named_parameters()}
    buffers = {name: b.clone() for name, b in theirs.named_buffers()}
    theirs.load_state_dict(parameters | buffers)

    def loss(parameters):
        return (torch.func.functional_call(ours, (parameters, buffers), (x,)) ** 3).sum()

    grads = torch.func.grad(loss)(parameters)
    (theirs(x) ** 3).sum().backward()
    for name, p in theirs.named_parameters():
        assert torch.allclose(grads[name], p.grad, rtol=1e-10)
    for name, b in theirs.named_buffers():
        assert_close(buffers[name], b)
    assert all(map(torch.equal, buffers_of(ours), before))
    torch.func.grad(lambda x: ours(x).sum())(x)  # its own buffers, of which grad knows nothing
    assert int(ours.num_batches_tracked) == 1


def test_ensembles_by_vmap():
    ours, theirs = zip(*(pair(1) for _ in range(4)), strict=True)
    parameters, buffers = torch.func.stack_module_state(ours)
    base, x = ours[0], torch.from_numpy(inputs.normal((4, 6, 3, 2)))
    for step in range(2):
        y = torch.func.vmap(lambda p, b, x: torch.func.functional_call(base, (p, b), (x,)))(
            parameters, buffers, x + step
        )  # fmt: skip
        for i, module in enumerate(theirs):
            assert_close(y[i], module(x[i] + step))
    for i, module in enumerate(theirs):
        for name, value in module.named_buffers():
            assert_close(buffers[name][i], value)
    before = buffers_of(base)
    with pytest.raises(anybn.StateError, match=r"buffers are not batched .* through vmap .* or use eval mode"):
        torch.func.vmap(base)(x)
    assert all(map(torch.equal, buffers_of(base), before))
    assert_close(torch.func.vmap(base.eval())(x)[1], base(x[1]))


def test_fake_tensors_and_modes():
    from torch.utils.flop_counter import FlopCounterMode

    bn, expected = anybn.torch.BatchNorm2d(3), anybn.torch.BatchNorm2d(3)
    with FlopCounterMode(display=False):
        assert torch.equal(bn(X), expected(X))
    with torch._subclasses.fake_tensor.FakeTensorMode():
        y = anybn.torch.BatchNorm2d(3)(torch.ones(4, 3, 2, 2))
    assert y.shape == (4, 3, 2, 2)
    with torch.inference_mode():
        assert torch.equal(bn(X), expected(X))
    bn(X).sum().backward()
    assert int(bn.num_batches_tracked) == 3
