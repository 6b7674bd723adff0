"""Ghost batch norm, renormalization and the switches inside autograd and JAX, on torch modules and lazily."""

import numpy as np
import pytest

import anybn
from anybn import variants
from anybn.conformance import inputs, oracle

SHAPE = (8, 3, 5)
OPTIONS = {
    "ghost": {"virtual_batch_size": 4},
    "renorm": {"renorm": (1.3, 0.4)},
    "both": {"virtual_batch_size": 2, "renorm": (1.3, 0.4)},
    "frozen": {"statistics": "running", "update": False},
}


def by_hand(torch, x, weight, bias, options, mean, var, mask, residual, activation, eps=1e-5):
    """Ioffe's formulas and a loop over the virtual batches, as anyone would write them."""
    parts, size = [], options.get("virtual_batch_size", len(x))
    mask = x[:, 0] == x[:, 0] if mask is None else mask
    for part, keep in zip(x.split(size), mask[:, None].split(size), strict=True):
        n = keep.sum()
        m = (part * keep).sum((0, 2)) / n
        v = ((part - m[:, None]).square() * keep).sum((0, 2)) / n
        if options.get("statistics") == "running":
            m, v = mean, var
        y = (part - m[:, None]) / torch.sqrt(v + eps)[:, None]
        if "renorm" in options:
            r_max, d_max = options["renorm"]
            sigma, running = torch.sqrt(v + eps), torch.sqrt(var + eps)
            r = (sigma / running).clamp(1 / r_max, r_max).detach()
            d = ((m - mean) / running).clamp(-d_max, d_max).detach()
            y = y * r[:, None] + d[:, None]
        parts.append(y * weight[:, None] + bias[:, None])
    y = torch.cat(parts) if residual is None else torch.cat(parts) + residual
    return (y.relu() if activation else y) * mask[:, None]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_torch_to_second_order(torch, name, fused):
    """As it is, by kernels; and with mask, residual and relu."""
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.standard_normal(SHAPE) * 2 + 1, requires_grad=True)
    weight, bias = (torch.tensor(rng.uniform(0.5, 2, 3), requires_grad=True) for _ in range(2))
    extra = {"mask": None, "residual": None, "activation": None}
    if fused:
        residual = torch.tensor(rng.standard_normal(SHAPE), requires_grad=True)
        extra = {"mask": torch.tensor(rng.random((8, 5)) < 0.8), "residual": residual, "activation": "relu"}
    state = anybn.BatchNormState(3, dtype="float64")
    mean, var = (torch.tensor(a, dtype=torch.float64) for a in ([0.5, 1, 1.5], [2, 4, 8]))
    state.running_mean, state.running_var = mean.clone(), var.clone()
    state.weight, state.bias = weight, bias
    results = []
    for y in (
        variants.batch_norm(x, state, **OPTIONS[name], **extra),
        by_hand(torch, x, weight, bias, OPTIONS[name], mean, var, **extra),
    ):
        given = [a for a in (x, weight, bias, extra["residual"]) if a is not None]
        first = torch.autograd.grad((y**3).sum(), given, create_graph=True)
        results.append((y, *first, *torch.autograd.grad(sum((g**2).sum() for g in first), given)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)  # two derivatives in torch's own rounding


def test_torch_weights_that_are_not_trained(torch):
    from anybn.torch import BatchNorm1d

    ours = BatchNorm1d(3)
    x = torch.tensor(inputs.normal(SHAPE), dtype=torch.float32, requires_grad=True)
    for options in ({"renorm": (3.0, 1.0)}, {"virtual_batch_size": 4}, {}, {"statistics": "running"}):
        variants.batch_norm(x, ours.state, train_weights=False, **options).square().sum().backward()
    assert x.grad is not None
    assert ours.weight.grad is None
    assert ours.bias.grad is None
    assert int(ours.num_batches_tracked) == 4  # all of them update, into the module itself
    alone = anybn.BatchNormState(3)
    for _ in range(4):
        anybn.batch_norm(x.detach().numpy(), alone, training=True)
    assert np.allclose(ours.running_var.numpy(), alone.running_var, rtol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["ghost", "renorm", "both"])
def test_jax_under_jit(jax, name, masked):
    x, dy = (jax.numpy.asarray(inputs.normal(SHAPE, seed=s) + 1, "float32") for s in (0, 1))
    state, mask = anybn.BatchNormState(3, like=x), None
    if masked:
        mask = np.random.default_rng(1).random((8, 5)) < 0.8

    @jax.jit
    def step(x, mask, state):
        options = OPTIONS[name] | ({"mask": mask, "activation": "relu"} if masked else {})
        y, pull = jax.vjp(lambda x: variants.batch_norm(x, state.copy(), **options), x)
        variants.batch_norm(x, state, **options)
        return y, pull(dy)[0], state

    y, dx, after = step(x, mask, state)
    options = OPTIONS[name] | ({"mask": mask, "activation": "relu"} if masked else {})
    expected, pullback = variants.batch_norm_vjp(np.asarray(x), reference := state.copy(), **options)
    grads = pullback(np.asarray(dy))
    assert oracle.error(y, expected, "float32", np.abs(expected).max()) <= 4
    assert oracle.error(dx, grads.x, "float32", np.abs(grads.x).max()) <= 4
    assert after.num_batches_tracked == 1
    assert oracle.error(after.running_var, reference.running_var, "float32") <= 4


def test_dask_stays_lazy():
    dask = pytest.importorskip("dask", reason="dask: not installed")
    da = pytest.importorskip("dask.array", reason="dask: not installed")

    def refuse(*args, **kwargs):
        raise AssertionError("something was computed")

    values = inputs.normal(SHAPE).astype(np.float32)
    state, expected = anybn.BatchNormState(3), anybn.BatchNormState(3)
    with dask.config.set(scheduler=refuse):
        x = da.from_array(values, chunks=(3, 2, 5))
        y, pullback = variants.batch_norm_vjp(x, state, **OPTIONS["both"])
        grads = pullback(x)
    y_expected, pullback = variants.batch_norm_vjp(values, expected, **OPTIONS["both"])
    with dask.config.set(scheduler="synchronous"):
        assert oracle.error(y.compute(), y_expected, "float32") <= 0.51
        assert oracle.error(grads.x.compute(), pullback(values).x, "float32") <= 0.51
        assert oracle.error(grads.weight.compute(), pullback(values).weight, "float32") <= 0.51
        assert oracle.error(state.to("numpy").running_var, expected.running_var, "float64") <= 4


def test_renorm_limits():
    assert variants.renorm_limits(25_000)[1] == 5.0
    assert variants.renorm_limits(22_500)[0] == pytest.approx(2.0)
    with pytest.raises(ValueError, match="d_end is 5000 and start 5000"):
        variants.renorm_limits(0, d_end=5_000)


@pytest.mark.parametrize("absent", ["weight", "bias"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_weight_or_a_bias_alone(name, absent):
    """As with a weight of 1 or a bias of 0; no gradient but for what is there."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    whole, state = anybn.BatchNormState(3), anybn.BatchNormState(3, scale=absent != "weight", bias=absent != "bias")
    present = {"weight": "bias", "bias": "weight"}[absent]
    for s in (whole, state):
        setattr(s, present, np.array([0.5, 1.5, -2.0], np.float32))
    expected, expected_pullback = variants.batch_norm_vjp(x, whole, **OPTIONS[name])
    y, pullback = variants.batch_norm_vjp(x, state, **OPTIONS[name])
    assert np.array_equal(y, expected)
    grads, expected_grads = pullback(dy), expected_pullback(dy)
    assert np.array_equal(grads.x, expected_grads.x)
    assert np.array_equal(getattr(grads, present), getattr(expected_grads, present))
    assert getattr(grads, absent) is None
