"""anybn.torch: modules beside torch's own, and their precision."""

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs, oracle

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")

from torch_modules.pairs import OPTIONS, PAIRS, SHAPES, X, assert_close, assert_same_state, buffers_of, nn, pair  # noqa: E402

import anybn.torch  # noqa: E402

# -- beside torch's modules ------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("shape", [(8, 16), (8, 16, 7), (8, 16, 3, 5), (3, 16, 300), (3, 16, 10, 20)])
@pytest.mark.parametrize("fused", [False, True])
def test_modules_are_the_functional_form_bit_for_bit(shape, dtype, fused, way):
    kind = {2: anybn.torch.BatchNorm1d, 3: anybn.torch.BatchNorm1d, 4: anybn.torch.BatchNorm2d}[len(shape)]
    bn = kind(16, activation="relu" if fused else None)
    with torch.no_grad():
        bn.weight.uniform_(0.5, 2), bn.bias.normal_()
    state = bn.state.copy()
    numpy_state = state.copy().to("numpy")
    x = (torch.from_numpy(inputs.normal(shape)) * 3 + 100).to(dtype)
    if len(shape) == 4 and way == "in parts":
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
        if dtype is not torch.bfloat16:  # which NumPy does not have
            y, pullback = anybn.batch_norm_vjp(
                x.numpy(), numpy_state, training=training, activation=bn.activation,
                residual=None if residual is None else residual.numpy(),
            )  # fmt: skip
            found = pullback(2 * y)
            of_numpy = [y, found.x] if residual is None else [y, found.x, found.residual]
            assert all(np.array_equal(a, b.detach().numpy()) for a, b in zip(of_numpy, grads[0], strict=True))
    assert inputs.state_values(bn.state.copy()) == inputs.state_values(state)
    if dtype is not torch.bfloat16:
        assert inputs.state_values(numpy_state) == inputs.state_values(state)
    if dtype is torch.float32:
        y = bn.train()(x, residual).detach().numpy()
        statistics = oracle.statistics(x.numpy())
        parameters = {"weight": bn.weight.detach().numpy(), "bias": bn.bias.detach().numpy()}
        rest = None if residual is None else residual.numpy()
        expected = oracle.normalize(
            x.numpy(), statistics.mean, statistics.var(), **parameters, residual=rest, relu=fused
        )  # fmt: skip
        assert oracle.error(y, expected, "float32") <= 0.500001


@pytest.mark.parametrize("kind_of_dy", ["contiguous", "transposed", "expanded", "negated"])
@pytest.mark.parametrize("parameters", [("weight", "bias"), ("weight",), ("bias",), ()], ids="-".join)
def test_gradients_are_the_oracles(parameters, kind_of_dy, way):
    """Of x, the parameters that there are, and a residual; for whatever dy the rest of a net gives."""
    bn = anybn.torch.BatchNorm1d(16, activation="relu")
    for name in ("weight", "bias"):
        if name in parameters:
            torch.nn.init.normal_(getattr(bn, name))
        else:
            setattr(bn, name, None)
    x, residual = (torch.from_numpy(inputs.normal((8, 16), i)).float().requires_grad_() for i in (0, 1))
    dy = torch.from_numpy(inputs.normal((8, 16), 2)).float()
    dy = {
        "contiguous": dy,
        "transposed": dy.t().contiguous().t(),
        "expanded": dy[:, :1].expand(8, 16),
        "negated": torch.view_as_complex(torch.stack((dy, -dy), -1)).conj().imag,
    }[kind_of_dy]
    for training in (True, False):
        bn.train(training)
        y = bn(x, residual)
        held = [getattr(bn, name) for name in parameters]
        dx, *of_parameters, dresidual = torch.autograd.grad(y, [x, *held, residual], dy)
        statistics = oracle.statistics(x.detach().numpy())
        mean, var = statistics.mean, statistics.var()
        if not training:
            mean, var = bn.running_mean.numpy(), bn.running_var.numpy()
        weight = None if bn.weight is None else bn.weight.detach().numpy()
        active, dy_values = y.detach().numpy() > 0, dy.resolve_neg().numpy()
        expected = oracle.gradients(
            dy_values, x.detach().numpy(), mean, var, count=8 if training else None, weight=weight, active=active
        )
        assert oracle.error(dx.numpy(), expected.x, "float32", np.abs(expected.x).max()) <= 1
        for name, value in zip(parameters, of_parameters, strict=True):
            assert oracle.error(value.numpy(), getattr(expected, name), "float32", 1) <= 1
        assert np.array_equal(dresidual.numpy(), np.where(active, dy_values, 0))


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
