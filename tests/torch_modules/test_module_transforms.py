"""What torch does with modules: copies, checkpointing, compilers, exports, torch.func, modes."""

import copy
import io
import pickle
import shutil

import pytest

import anybn
from anybn.conformance import inputs

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")

from torch_modules.pairs import X, assert_close, assert_same_state, buffers_of, checkpoint, nn, pair  # noqa: E402

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


def run_compiled(backend, training, **options):
    ours, theirs = pair()
    ours.train(training), theirs.train(training)
    compiled = torch.compile(lambda x: ours(x.sin(), x, "relu").cos(), fullgraph=True, backend=backend, **options)
    for step in range(2):
        results = []
        for f in (compiled, lambda x: (theirs(x.sin()) + x).relu().cos()):
            x = (X.double() + step).requires_grad_()
            y = f(x)
            y.sum().backward()
            results.append((y.detach(), x.grad))
        for a, b in zip(*results, strict=True):
            assert_close(a, b)
    assert_close(ours.weight.grad, theirs.weight.grad)
    assert_close(ours.bias.grad, theirs.bias.grad)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(training):
    run_compiled("aot_eager", training)


def test_compiles_with_dynamic_shapes():
    run_compiled("aot_eager", True, dynamic=True)


def test_what_compiles_gives_the_gradient_of_a_residual_in_one_operation():
    """And does not compute it again: dy is behind the relu already where dx is computed."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from anybn.backends.torch import ops

    operations = []

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            operations.append(operation.overloadpacket.__name__)
            return operation(*args, **(kwargs or {}))

    x, residual = (torch.from_numpy(inputs.normal((4, 3, 5), seed)) for seed in (0, 1))
    for wanted in (True, False):
        given = x.clone().requires_grad_(), residual.clone().requires_grad_(wanted)
        y, _ = ops.train(given[0], None, None, given[1], 1, 1e-5, True)
        operations.clear()
        with Listening():
            y.backward(torch.ones_like(y))
        assert operations.count("backward") == 1
        assert "where" not in operations
        if wanted:
            assert torch.equal(given[1].grad, (y > 0).double())
        else:
            assert given[1].grad is None


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own use of it
def test_compiles_with_inductor():
    run_compiled("inductor", True)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_functional_form_compiles_whole(axis, momentum):
    """With a state that it replaces, as it does without torch.compile."""
    torch.compiler.reset()  # what other parameters of this test compiled counts as well
    x = X if axis == 1 else X.movedim(1, -1)
    layers = [anybn.BatchNorm2d(3, axis=axis, momentum=momentum, ddof=0, activation="relu") for _ in range(2)]
    for layer in layers:
        layer.state.to(X).weight = nn.Parameter(torch.tensor([0.5, 1, 2]))
    compiled = torch.compile(lambda x: layers[0](x, residual=x) * 2, fullgraph=True, backend="aot_eager")
    for step in range(3):
        first = layers[0].state.running_mean
        ours, expected = compiled(x + step), layers[1](x + step, residual=x + step) * 2
        assert torch.equal(ours, expected)
        assert layers[0].state.running_mean is not first
        grads = [
            torch.autograd.grad((y**2).sum(), layer.state.weight)[0]
            for y, layer in ((ours, layers[0]), (expected, layers[1]))
        ]
        assert torch.equal(*grads)
    assert inputs.state_values(layers[0].state) == inputs.state_values(layers[1].state)
    layers[0].eval(), layers[1].eval()
    assert torch.equal(compiled(x), layers[1](x, residual=x) * 2)


def test_what_the_functional_form_cannot_do_there():
    state = anybn.BatchNormState(3)

    def call(x, nonfinite):
        return anybn.batch_norm(x, state, nonfinite=nonfinite)

    for nonfinite, message in (("skip", r"call state.to\(x\) before"), ("raise", r"torch\.compile cannot take mask")):
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
            torch.compile(call, fullgraph=True, backend="eager")(X, nonfinite)
        state.to("torch")
    arrays = state._arrays

    class Layer(nn.Module):
        def forward(self, x):
            return anybn.batch_norm(x, state, training=self.training)

    with pytest.raises(anybn.StateError, match=r"torch\.export cannot keep a state that a call changes"):
        torch.export.export(Layer(), (X,))
    assert state._arrays is arrays
    exported = torch.export.export(Layer().eval(), (X,)).module()
    # torch's own, in float32: the scale and the shift are rounded, and so are their product with x and the sum
    assert torch.allclose(exported(X), anybn.batch_norm(X, state), rtol=0, atol=4 * 2**-21)


def test_compiled_checkpoint_and_cumulative_average():
    ours, theirs = pair(momentum=None)
    f = torch.compile(lambda x: checkpoint(ours, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    for step in range(2):
        a, b = ((X.double() + step).requires_grad_() for _ in range(2))
        (f(a) ** 3).sum().backward(), (theirs(b) ** 3).sum().backward()
        assert_close(a.grad, b.grad)
    assert_same_state(ours, theirs)


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
