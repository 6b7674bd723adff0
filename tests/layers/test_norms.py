"""Group, layer, instance and RMS norm beside torch's own, and inside autograd and JAX."""

import numpy as np
import pytest

import anybn
from anybn import norms
from anybn.conformance import inputs, oracle

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")
F = torch.nn.functional

CALLS = {
    "group": (lambda x, w, b: anybn.group_norm(x, 3, w, b), lambda x, w, b: F.group_norm(x, 3, w, b), (6,)),
    "instance": (anybn.instance_norm, lambda x, w, b: F.instance_norm(x, weight=w, bias=b), (6,)),
    "layer": (
        lambda x, w, b: anybn.layer_norm(x, w, b, axes=(2, 3)),
        lambda x, w, b: F.layer_norm(x, (4, 5), w, b),
        (4, 5),
    ),
    "rms": (
        lambda x, w, b: anybn.rms_norm(x, w) + 0 * b.sum(),
        lambda x, w, b: F.rms_norm(x, (5,), w, eps=1e-5) + 0 * b.sum(),
        (5,),
    ),
}


def values(shape, mean=0.0):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, 6, 4, 5)) + mean, rng.uniform(0.5, 2, shape), rng.standard_normal(shape)]


@pytest.mark.parametrize("name", CALLS)
def test_like_torch_to_second_order(name):
    ours, theirs, shape = CALLS[name]
    given = [torch.tensor(a, requires_grad=True) for a in values(shape)]
    results = []
    for call in (ours, theirs):
        y = call(*given)
        first = torch.autograd.grad((y**3).sum(), given, create_graph=True, allow_unused=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first if g is not None), given, allow_unused=True)
        results.append((y, *first, *second))
    for a, b in zip(*results, strict=True):
        assert (a is None) is (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-9, atol=1e-9)  # torch's own rounding, in two derivatives


@pytest.mark.parametrize("name", ["group", "instance", "layer"])
def test_far_from_zero_torch_is_not_a_reference(name):
    """Mean 1e6, deviation 1, float32: what the conformance suite holds to 2 eps, torch misses by thousands."""
    ours, theirs, shape = CALLS[name]
    given = [a.astype(np.float32) for a in values(shape, mean=1e6)]
    exact = theirs(*(torch.tensor(a.astype(np.float64)) for a in given)).numpy()
    errors = [oracle.error(call(*map(torch.tensor, given)).numpy(), exact, "float32") for call in (ours, theirs)]
    assert errors[0] <= 0.51
    assert errors[1] > 1000


#: x's shape, the call, weight's shape: on either side of every decision about rows in `kernels/cpu/plan.py`.
ROWS = {
    "values": ((3000, 96), lambda x, w, b: norms.layer_norm_vjp(x, w, b), (96,)),
    "one long row": ((1, 20_000), lambda x, w, b: norms.layer_norm_vjp(x, w, b), (20_000,)),
    "runs": ((40, 6, 700), lambda x, w, b: norms.group_norm_vjp(x, 3, w, b), (6,)),
    "short runs": ((500, 6, 9), lambda x, w, b: norms.group_norm_vjp(x, 3, w, b), (6,)),
    "runs in copies backward": ((41, 6, 49), lambda x, w, b: norms.group_norm_vjp(x, 3, w, b), (6,)),
    "few long rows": ((1, 2, 300_000), lambda x, w, b: norms.instance_norm_vjp(x, w, b), (2,)),
    "one run": ((30, 6, 700), lambda x, w, b: norms.instance_norm_vjp(x, w, b), (6,)),
    "axes that are moved": ((20, 50, 12), lambda x, w, b: norms.group_norm_vjp(x, 3, w, b, axis=-1), (12,)),
}


def in_float64(x, dy, weight, bias, groups):
    """y, dx, dweight and dbias of rows that are a sample's groups, x being (N, C, L)."""
    n = len(x)
    x, dy = x.astype(np.longdouble), dy.astype(np.longdouble)
    rows = x.reshape(n * groups, -1)
    deviation = rows - rows[:, :1] - (rows - rows[:, :1]).mean(1, keepdims=True)
    rstd = 1 / np.sqrt((deviation**2).mean(1, keepdims=True) + np.longdouble(1e-5))
    xhat = deviation * rstd
    g = (dy * weight[:, None]).reshape(rows.shape)
    dx = (g - g.mean(1, keepdims=True) - xhat * (g * xhat).mean(1, keepdims=True)) * rstd
    xhat = xhat.reshape(x.shape)
    return xhat * weight[:, None] + bias[:, None], dx.reshape(x.shape), (dy * xhat).sum((0, 2)), dy.sum((0, 2))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_rows_whatever_the_threads(name, library):
    shape, call, parameters = ROWS[name]
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    weight, bias = (rng.uniform(0.5, 2, parameters).astype(np.float32) for _ in range(2))
    last = name == "axes that are moved"
    x_in, dy_in = (np.moveaxis(a, -1, 1) if last else a.reshape(*a.shape[:2], -1) for a in (x, dy))
    groups = {"values": 1, "one long row": 1, "one run": 6, "few long rows": 2}.get(name, 3)
    expected = list(in_float64(x_in, dy_in, weight.astype(float), bias.astype(float), groups))
    expected[:2] = [np.moveaxis(a, 1, -1) if last else a.reshape(shape) for a in expected[:2]]
    make = np.array if library == "numpy" else torch.tensor
    before, seen = anybn.get_num_threads(), set()
    try:
        for threads in (1, 2, 7):
            anybn.set_num_threads(threads)
            y, pullback = call(make(x), make(weight), make(bias))
            results = [np.asarray(a) for a in (y, *pullback(make(dy))[:3])]
            seen.add(b"".join(a.tobytes() for a in results))
    finally:
        anybn.set_num_threads(before)
    assert len(seen) == 1
    for result, exact in zip(results, expected, strict=True):
        assert oracle.error(result, exact, "float32") <= 0.51


def test_weight_or_bias_alone():
    x, w, b = values((6,))
    dy = inputs.normal(x.shape)
    y, pullback = norms.group_norm_vjp(x, 3, w, b)
    both = pullback(dy)
    plain, of_plain = norms.group_norm_vjp(x, 3)
    assert np.allclose(norms.group_norm(x, 3, w), y - b[:, None, None], rtol=1e-14, atol=1e-14)
    assert np.allclose(norms.group_norm(x, 3, None, b), plain + b[:, None, None], rtol=1e-14, atol=1e-14)
    of_weight, of_bias = norms.group_norm_vjp(x, 3, w)[1](dy), norms.group_norm_vjp(x, 3, None, b)[1](dy)
    assert np.array_equal(of_weight.x, both.x)
    assert np.array_equal(of_weight.weight, both.weight)
    assert np.array_equal(of_bias.bias, both.bias)
    assert np.allclose(of_bias.x, of_plain(dy).x, rtol=1e-13, atol=1e-13)
    assert of_weight.bias is of_bias.weight is None


def test_batches_of_one_and_autocast_dtypes():
    x = torch.randn(1, 6, 4, 5, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(6, requires_grad=True)  # float32, as autocast has it
    y = anybn.group_norm(x, 2, weight)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    empty = torch.zeros(0, 6, requires_grad=True)
    anybn.layer_norm(empty).sum().backward()
    assert empty.grad.shape == (0, 6)


@pytest.mark.parametrize("name", ["group", "layer", "rms"])
def test_jax_differentiates_like_the_explicit_form(jax, name):
    call, _, shape = CALLS[name]
    x, w, b = (jax.numpy.asarray(a, "float32") for a in values(shape))
    dy = jax.numpy.asarray(inputs.normal(x.shape, seed=3), "float32")
    _, vjp = jax.vjp(jax.jit(call), x, w, b)
    explicit = {
        "group": lambda: norms.group_norm_vjp(x, 3, w, b),
        "layer": lambda: norms.layer_norm_vjp(x, w, b, axes=(2, 3)),
        "rms": lambda: norms.rms_norm_vjp(x, w),
    }[name]()[1](dy)
    for automatic, gradient in zip(vjp(dy), explicit[:3], strict=True):
        if gradient is not None:
            assert oracle.error(automatic, np.asarray(gradient), "float32", np.abs(gradient).max()) <= 8


def test_dask_stays_lazy():
    dask = pytest.importorskip("dask", reason="dask: not installed")
    da = pytest.importorskip("dask.array", reason="dask: not installed")

    def refuse(*args, **kwargs):
        raise AssertionError("something was computed")

    x, w, b = values((6,))
    with dask.config.set(scheduler=refuse):
        lazy = da.from_array(x, chunks=(1, 2, 4, 5))
        y, pullback = norms.group_norm_vjp(lazy, 3, da.from_array(w), da.from_array(b))
        grads = pullback(lazy)
    expected, pullback = norms.group_norm_vjp(x, 3, w, b)
    with dask.config.set(scheduler="synchronous"):
        assert oracle.error(y.compute(), expected, "float64", 4) <= 2
        assert oracle.error(grads.weight.compute(), pullback(x).weight, "float64", 8) <= 8
