"""anybn.torch: modules beside torch's own, their live state, and what torch does with modules."""

import copy
import io
import pickle
import shutil
import threading

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs, oracle

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")

import anybn.torch  # noqa: E402

nn, checkpoint = torch.nn, torch.utils.checkpoint.checkpoint
PAIRS = {1: (anybn.torch.BatchNorm1d, nn.BatchNorm1d), 2: (anybn.torch.BatchNorm2d, nn.BatchNorm2d)}
PAIRS[3] = (anybn.torch.BatchNorm3d, nn.BatchNorm3d)
SHAPES = {1: [(6, 3), (6, 3, 5)], 2: [(6, 3, 5, 4)], 3: [(6, 3, 2, 5, 4)]}
X = torch.from_numpy(inputs.normal((6, 3, 5, 4)) * 2 + 1).float()
OPTIONS = [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.5}]


def pair(dimensions=2, channels=3, **options):
    """The same module, anybn's and torch's; in float64, where torch's own is accurate enough to compare with."""
    return tuple(kind(channels, dtype=torch.float64, **options) for kind in PAIRS[dimensions])


def assert_close(a, b):
    """To a few roundings of float64, of numbers around 1 and sums of a hundred of them."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def assert_same_state(ours, theirs):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert_close(ours.state_dict()[name], value)


# -- beside torch's modules ------------------------------------------------------------------------------------


@pytest.fixture(params=["in one step", "on threads", "in general"])
def way(request, monkeypatch):
    """How a module's forward pass is done: what is small and what is special, whatever the tensor."""
    if request.param != "in one step":
        monkeypatch.setattr("anybn.torch.fast_forward.ONE_CLAIM", 0)
    if request.param == "in general":
        monkeypatch.setattr(anybn.torch.module, "fast_forward", lambda *_: None)
    return request.param


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dimensions", PAIRS)
def test_trains_and_evaluates_as_torchs(dimensions, options, way):
    ours, theirs = pair(dimensions, **options)
    for shape in SHAPES[dimensions]:
        for step in range(3):
            x = torch.from_numpy(inputs.normal(shape, step)) * (step + 1) + 1
            for training in (True, False):
                results = []
                for module in (ours.train(training), theirs.train(training)):
                    module.zero_grad()
                    given = x.clone().requires_grad_()
                    y = module(given)
                    (y**3).sum().backward()
                    results.append((y.detach(), given.grad, *(p.grad for p in module.parameters())))
                for a, b in zip(*results, strict=True):
                    assert_close(a, b)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("shape", [(8, 16), (8, 16, 7), (8, 16, 3, 5)])
@pytest.mark.parametrize("fused", [False, True])
def test_modules_are_the_functional_form_bit_for_bit(shape, dtype, fused, way):
    kind = {2: anybn.torch.BatchNorm1d, 3: anybn.torch.BatchNorm1d, 4: anybn.torch.BatchNorm2d}[len(shape)]
    bn = kind(16, activation="relu" if fused else None)
    with torch.no_grad():
        bn.weight.uniform_(0.5, 2), bn.bias.normal_()
    state = bn.state.copy()
    x = (torch.from_numpy(inputs.normal(shape)) * 3 + 100).to(dtype)
    if len(shape) == 4 and way == "on threads":
        x = x.to(memory_format=torch.channels_last)
    residual = torch.from_numpy(inputs.normal(shape, 1)).to(dtype) if fused else None
    for training in (True, True, False):
        bn.train(training)
        grads = []
        for run in (
            lambda v, r: bn(v, r),
            lambda v, r: anybn.batch_norm(v, state, training=training, residual=r, activation=bn.activation),  # noqa: B023
        ):
            v = x.clone().requires_grad_()
            r = None if residual is None else residual.clone().requires_grad_()
            y = run(v, r)
            grads.append((y, *torch.autograd.grad((y.double() ** 2).sum(), [v] if r is None else [v, r])))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert inputs.state_values(bn.state.copy()) == inputs.state_values(state)
    if dtype is torch.float32:
        y = bn.train()(x, residual).detach().numpy()
        statistics = oracle.statistics(x.numpy())
        parameters = {"weight": bn.weight.detach().numpy(), "bias": bn.bias.detach().numpy()}
        rest = None if residual is None else residual.numpy()
        expected = oracle.normalize(
            x.numpy(), statistics.mean, statistics.var(), **parameters, residual=rest, relu=fused
        )  # fmt: skip
        assert oracle.error(y, expected, "float32") <= 0.500001


def test_first_and_second_order():
    bn = anybn.torch.BatchNorm1d(3, dtype=torch.float64, activation="relu")
    x, residual = (torch.from_numpy(inputs.normal((5, 3), seed)).requires_grad_() for seed in (0, 1))

    def f(x, residual, weight, bias):
        return torch.func.functional_call(bn, {"weight": weight, "bias": bias}, (x, residual))

    parameters = [torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for training in (True, False):
        bn.train(training)
        assert torch.autograd.gradcheck(f, (x, residual, *parameters))
        assert torch.autograd.gradgradcheck(f, (x, residual, *parameters))


def test_constructor_repr_and_resets():
    ours, theirs = anybn.torch.BatchNorm2d(3, 1e-3, None, True, True), nn.BatchNorm2d(3, 1e-3, None, True, True)
    assert repr(ours) == repr(theirs)
    assert repr(anybn.torch.BatchNorm1d(2, activation="relu")).endswith(", activation='relu')")
    assert isinstance(ours, nn.BatchNorm2d)
    ours(X)
    with torch.no_grad():
        ours.weight += 1
    ours.reset_parameters()
    assert int(ours.num_batches_tracked) == 0
    assert ours.weight.tolist() == ours.running_var.tolist() == [1, 1, 1]
    assert ours.bias.tolist() == ours.running_mean.tolist() == [0, 0, 0]
    for arguments, error, message in (
        ((-1,), ValueError, "num_features is -1"),
        ((3, 0.0), ValueError, "eps is 0.0; it must be positive"),
        ((3, 1e-5, 1.5), ValueError, r"momentum is 1.5; it must lie in \[0, 1\]"),
    ):
        with pytest.raises(error, match=message):
            anybn.torch.BatchNorm2d(*arguments)
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        anybn.torch.BatchNorm2d(3, activation="gelu")


def buffers_of(module):
    return [b.clone() for b in module.buffers()]


WRONG = [
    (X[0], {}, ValueError, r"BatchNorm2d needs \(N, C, H, W\): for one sample use x\[None\]"),
    (X[:, :2], {}, ValueError, "x has 2 channels on axis 1 but the state has 3"),
    (X.movedim(1, -1), {}, ValueError, r"its shape \(6, 5, 4, 3\) looks channels-last: pass axis=-1"),
    (X.int(), {}, TypeError, "x has dtype int32: cast to float32"),
    (X[:1, :, :1, :1], {}, ValueError, "training needs more than 1 value per channel"),
    (X, {"residual": X[:1]}, ValueError, r"residual has shape \(1, 3, 5, 4\) but x has \(6, 3, 5, 4\)"),
    (X, {"residual": X.double()}, TypeError, "residual has dtype float64 but x has float32"),
    (X, {"activation": "gelu"}, ValueError, "activation is 'gelu'; it must be one of None, 'relu'"),
]


def test_wrong_calls_leave_the_buffers(way):
    bn = anybn.torch.BatchNorm2d(3)
    bn(X)
    before = buffers_of(bn)
    cases = [
        *WRONG,
        (None, {}, TypeError, "x is a NoneType, not an array that anybn knows"),
        (X.to_sparse(), {}, TypeError, r"x has the layout torch\.sparse_coo: make it dense"),
        (X.to("meta"), {}, TypeError, "x is on the meta device"),
        (bn.running_mean[None, :, None, None].expand(2, 3, 1, 1), {}, ValueError, "x shares memory with the state"),
    ]
    for x, options, error, message in cases:
        with pytest.raises(error, match=message):
            bn(x, **options)
    for name, value in (("eps", 0.0), ("momentum", 2.0)):
        right = getattr(bn, name)
        setattr(bn, name, value)
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            bn(X)
        setattr(bn, name, right)
    assert bn(X[:0]).shape == (0, 3, 5, 4)
    assert all(map(torch.equal, buffers_of(bn), before))
    bn.eval()
    with pytest.raises(ValueError, match="x shares memory with the state"):
        bn(bn.weight.detach().view(1, 3, 1, 1))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # in the text of an error
def test_wrong_calls_inside_compile():
    """torch wraps the error, and changes its words where they name shapes that it keeps open."""
    bn = anybn.torch.BatchNorm2d(3)
    before = buffers_of(bn)
    for i in (0, 4, 5, 7):
        x, options, _, _ = WRONG[i]
        torch.compiler.reset()
        words = ("BatchNorm2d needs", "more than 1 value per channel", "residual has shape", "activation is 'gelu'")
        with pytest.raises(torch._dynamo.exc.Unsupported, match=words[(0, 4, 5, 7).index(i)]):
            torch.compile(bn, fullgraph=True, backend="eager")(x, **options)
    assert all(map(torch.equal, buffers_of(bn), before))


def test_switches_that_users_turn_later():
    """torch's module looks at them in every call, and so do torch.optim.swa_utils and others who turn them."""
    ours, theirs = pair()
    x = X.double()
    for module in (ours, theirs):
        module.track_running_stats = False
        module(x)
    assert_same_state(ours, theirs)
    assert_close(ours.eval()(x), theirs.eval()(x))
    for module in (ours, theirs):
        module.train().track_running_stats = True
        module.momentum = None
        module(x)
    assert_same_state(ours, theirs)
    batches = [x * 2, x + 3]
    for module in (ours, theirs):
        torch.optim.swa_utils.update_bn(batches, module)
    assert_same_state(ours, theirs)
    for module in (ours, theirs):
        module.running_mean = module.running_var = module.num_batches_tracked = None
        module.eval()
    assert_close(ours(x), theirs(x))


# -- precision -------------------------------------------------------------------------------------------------


def test_half_keeps_usable_statistics():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), anybn.torch.BatchNorm2d(3)).half()
    conv, bn = model
    assert bn.weight.dtype == conv.weight.dtype == torch.float16
    x = X * 100 + 1000
    bn(x)  # float32 into half parameters
    assert bn.running_var.dtype == torch.float64
    expected = 0.9 + 0.1 * oracle.statistics(x.numpy()).var(ddof=1)
    assert oracle.error(bn.running_var.numpy(), expected, "float64") <= 4
    assert bn(x.half()).dtype == torch.float16
    assert np.isfinite(bn.eval()(x.half()).detach().numpy()).all()
    for convert in (model.bfloat16, model.double, model.float, model.share_memory, lambda: model.to(torch.float16)):
        values = bn.running_var.clone()
        convert()
        assert torch.equal(bn.running_var, values)
    assert bn.running_var.is_shared()


def test_statistics_of_a_mean_far_away():
    """torch's are 1e6 eps off, and evaluation with them as well."""
    bn = anybn.torch.BatchNorm1d(3, momentum=1.0)
    x = torch.from_numpy(inputs.normal((500, 3)).astype(np.float32)) + 1e6
    bn(x)
    statistics = oracle.statistics(x.numpy())
    expected = oracle.normalize(x.numpy(), statistics.mean, statistics.var(ddof=1))
    assert oracle.error(bn.eval()(x).detach().numpy(), expected, "float32") <= 0.51


def test_devices_and_dtypes_when_made():
    bn = anybn.torch.BatchNorm2d(3, device="meta", dtype=torch.bfloat16).to_empty(device="cpu")
    bn.reset_parameters()
    assert bn.weight.dtype == torch.bfloat16
    assert bn.running_mean.dtype == torch.float64
    assert bn(X).dtype == torch.float32


def test_autocast():
    ours, theirs = anybn.torch.BatchNorm2d(3), nn.BatchNorm2d(3)
    conv, results = nn.Conv2d(3, 3, 1), []
    for module in (ours, theirs):
        conv.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(conv(X))
            (y**3).sum().backward()
        results.append((y, conv.weight.grad))
    assert results[0][0].dtype == results[1][0].dtype == torch.bfloat16
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=2**-7, atol=2**-7)  # one unit of bfloat16 around 1


# -- the live state --------------------------------------------------------------------------------------------


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


# -- what torch does with modules ------------------------------------------------------------------------------


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
        assert without.state.copy().bias.tolist() == [0, 0, 0]


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
    assert torch.equal(torch.export.export(Layer().eval(), (X,)).module()(X), anybn.batch_norm(X, state))


def test_compiled_checkpoint_and_cumulative_average():
    ours, theirs = pair(momentum=None)
    f = torch.compile(lambda x: checkpoint(ours, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    for step in range(2):
        a, b = ((X.double() + step).requires_grad_() for _ in range(2))
        (f(a) ** 3).sum().backward(), (theirs(b) ** 3).sum().backward()
        assert_close(a.grad, b.grad)
    assert_same_state(ours, theirs)


def test_exports_as_torchs_own_operations():
    bn = anybn.torch.BatchNorm2d(3)
    bn(X)
    trained = torch.export.export(copy.deepcopy(bn), (X,))
    evaluated = torch.export.export(
        copy.deepcopy(bn).eval(), (X,), dynamic_shapes={"input": {0: torch.export.Dim("n")}}
    )  # fmt: skip
    assert "anybn" not in str(trained.graph) + str(evaluated.graph)
    module = trained.module()
    assert torch.equal(module(X + 1), bn(X + 1))
    for name, value in bn.named_buffers():
        assert_close(dict(module.named_buffers())[name], value)
    bn.eval()
    fixed = evaluated.module()
    fixed.load_state_dict(bn.state_dict())
    assert torch.equal(fixed(X[:2]), bn(X[:2]))


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
