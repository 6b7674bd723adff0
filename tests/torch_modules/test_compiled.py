"""Modules and functions of anybn inside torch.compile."""

import shutil

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs, oracle

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")

from torch_modules.pairs import X, assert_close, assert_same_state, checkpoint, nn, pair  # noqa: E402

import anybn.torch  # noqa: E402

needs_inductor = [
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # torch's own use of it
]


def long(a):
    """As the oracle's own numbers."""
    return a.detach().double().numpy().astype(oracle.LONG)


def assert_accurate(state, x, residual, y, dy, mask=None):
    """y, what state learnt in its first training step, and all gradients; of relu(batch norm + residual)."""
    of_batch, dtype = oracle.statistics(long(x), mask=mask), str(x.dtype)[6:]
    given = {"weight": long(state.weight), "eps": state.eps, "mask": mask}
    rest = {"bias": long(state.bias), "residual": long(residual), "relu": True}
    expected = oracle.normalize(long(x), of_batch.mean, of_batch.var(), **given, **rest)
    assert oracle.error(long(y), expected, dtype) <= 0.51
    given |= {"count": of_batch.count, "active": long(y) > 0}
    grads = oracle.gradients(long(dy), long(x), of_batch.mean, of_batch.var(), **given)
    assert oracle.error(long(x.grad), grads.x, dtype, grads.x_size) <= 0.51
    assert oracle.error(long(residual.grad), grads.residual, dtype) == 0
    assert oracle.error(long(state.weight.grad), grads.weight, "float32", grads.weight_size) <= 0.51
    assert oracle.error(long(state.bias.grad), grads.bias, "float32", grads.bias_size) <= 0.51
    for name, old, new in (("mean", 0, sum(of_batch.mean)), ("var", 1, of_batch.var(1))):
        running = getattr(state, f"running_{name}")
        assert running.dtype is torch.float64
        assert oracle.error(long(running), oracle.running(np.full(new.shape, old), new, 0.1), "float64") <= 2


def tensors(shape, dtype=torch.float32, memory_format=torch.preserve_format, seed=0):
    """x, far from 0, residual and dy."""
    made = [torch.from_numpy(inputs.normal(shape, seed + i) + 1000 * (i == 0)).to(dtype) for i in range(3)]
    x, residual, dy = (a.contiguous(memory_format=memory_format) if a.ndim == 4 else a for a in made)
    return x.requires_grad_(), residual.requires_grad_(), dy


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_inductor)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accuracy(backend, dtype):
    """Channels first, last, and without positions: as exact as it is elsewhere; all in one graph."""
    layouts = ((4, 5, 7, 6), torch.contiguous_format), ((4, 5, 7, 6), torch.channels_last), ((64, 5), None)
    modules, arrays = [], []
    for i, (shape, memory_format) in enumerate(layouts):
        modules.append((anybn.torch.BatchNorm2d if len(shape) == 4 else anybn.torch.BatchNorm1d)(5))
        with torch.no_grad():
            modules[-1].weight.copy_(torch.linspace(-1, 2, 5)), modules[-1].bias.copy_(torch.linspace(0, 1, 5))
        arrays.append(tensors(shape, getattr(torch, dtype), memory_format, 10 * i))

    def step(arrays):
        return [module(x, residual, "relu") for module, (x, residual, _) in zip(modules, arrays, strict=True)]

    found = torch.compile(step, fullgraph=True, backend=backend)(arrays)
    torch.autograd.backward(found, [dy for *_, dy in arrays])
    for module, (x, residual, dy), y in zip(modules, arrays, found, strict=True):
        assert y.dtype is x.dtype
        assert y.stride() == x.grad.stride() == x.stride()
        assert_accurate(module, x, residual, y, dy)


@pytest.mark.parametrize("shape", [(6, 7, 4), (7, 1), (6, 1, 1)])
def test_masks(shape):
    x, residual, dy = tensors((6, 3, 7, 4))
    mask, state = torch.from_numpy(inputs.normal(shape) > -0.5), anybn.BatchNormState(3).to(x)
    state.weight, state.bias = nn.Parameter(torch.tensor([0.5, -1, 2])), nn.Parameter(torch.tensor([0.5, 0, 1]))

    def call(x, residual, mask):
        return anybn.batch_norm(x, state, training=True, mask=mask, residual=residual, activation="relu")

    y = torch.compile(call, fullgraph=True, backend="aot_eager")(x, residual, mask)
    y.backward(dy)
    everywhere = np.broadcast_to(mask.numpy(), (6, 7, 4))
    assert_accurate(state, x, residual, y, dy, everywhere)
    evaluated = torch.compile(lambda x: anybn.batch_norm(x, state, mask=mask), fullgraph=True, backend="aot_eager")(x)
    expected = oracle.normalize(
        long(x),
        long(state.running_mean),
        long(state.running_var),
        weight=long(state.weight),
        bias=long(state.bias),
        mask=everywhere,
    )
    assert oracle.error(long(evaluated), expected, "float32") <= 0.51


def test_a_wrong_mask():
    state = anybn.BatchNormState(3).to(X)
    call = torch.compile(lambda mask: anybn.batch_norm(X, state, mask=mask), fullgraph=True, backend="eager")
    for mask, words in ((torch.ones(6, 3, 5, 4) > 0, "mask has shape"), (torch.ones(6, 5, 4), "mask has dtype")):
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=words):
            call(mask)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_gradient_of_a_residual(wanted):
    x, residual = X.clone().requires_grad_(), X.flip(0).requires_grad_(wanted)
    bn = anybn.torch.BatchNorm2d(3, activation="relu")
    y = torch.compile(bn, fullgraph=True, backend="aot_eager")(x, residual)
    y.backward(torch.ones_like(y))
    assert torch.equal(residual.grad, (y > 0).float()) if wanted else residual.grad is None


@pytest.mark.parametrize("tracks", [True, False])
def test_an_empty_batch(tracks):
    bn, x = anybn.torch.BatchNorm2d(3, track_running_stats=tracks), X[:0].clone().requires_grad_()
    y = torch.compile(bn, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert bn.weight.grad.tolist() == [0, 0, 0]
    assert not tracks or int(bn.num_batches_tracked) == 0


def test_a_batch_that_is_not_finite():
    """It keeps the running statistics, unless it is to reach them."""
    bn, x, state = anybn.torch.BatchNorm2d(3), X.clone(), anybn.BatchNormState(3).to(X)
    x[0, 1, 0, 0] = float("inf")
    y = torch.compile(bn, fullgraph=True, backend="aot_eager")(x)
    assert [bool(a.isnan().any()) for a in y.unbind(1)] == [False, True, False]
    assert [float(a[1]) for a in (bn.running_mean, bn.running_var)] == [0, 1]
    assert int(bn.num_batches_tracked) == 1
    options = {"training": True, "nonfinite": "propagate"}
    torch.compile(lambda x: anybn.batch_norm(x, state, **options), fullgraph=True, backend="aot_eager")(x)
    assert state.running_var.isnan().tolist() == [False, True, False]


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


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_functional_form_compiles_whole(axis, momentum):
    """With a state that it replaces, as it does without torch.compile."""
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
    for a, b in zip(*(layer.state._arrays[:4] for layer in layers), strict=True):
        assert torch.allclose(a, b, rtol=2**-50, atol=0)  # sums of float64, in another order
    assert layers[0].state.num_batches_tracked == layers[1].state.num_batches_tracked == 3
    layers[0].eval(), layers[1].eval()
    assert torch.equal(compiled(x), layers[1](x, residual=x) * 2)


def test_accumulated_batches_of_the_functional_form():
    layers = [anybn.BatchNorm2d(3) for _ in range(2)]
    for layer, call in zip(layers, (torch.compile(layers[0], backend="eager"), layers[1]), strict=True):
        layer.state.to(X)
        with anybn.accumulate(layer):
            call(X), call(X + 1)
    assert layers[0].state.equals(layers[1].state)


def test_what_the_functional_form_cannot_do_there():
    state = anybn.BatchNormState(3)

    def call(x, nonfinite):
        return anybn.batch_norm(x, state, nonfinite=nonfinite)

    for nonfinite, message in (("skip", r"call state.to\(x\) before"), ("raise", r"torch\.compile cannot take out")):
        torch.compiler.reset()  # a function that failed is not tried again
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
    assert not any("movedim" in str(node.target) for node in exported.graph.nodes)
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
