"""Masks of positions that all channels share: by the kernels, at the bar, with NaN behind them, in little memory."""

import tracemalloc

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs, oracle

pytest.importorskip("numba", reason="numba: not installed, pip install 'anybn[fast]'")

from anybn.kernels.cpu import chunked, operations, plan

#: Runs, in one piece and in several; rows of channels, wide and narrow; one channel.
SHAPES = [
    ((3, 5, 40), 1),
    ((2, 3, 2 * plan.SEGMENT // 7, 7), 1),
    ((6, 4, 9, 9), 1),
    ((50, 7), 1),
    ((9, 2 * plan.WIDTH + 3), 1),
    ((4, 6, 5, 8), -1),
    ((3, 1, 30), 1),
    ((2000, 3), 1),
]
#: Planes that are too short for the kernels, and a mask with channels of its own: `chunked` has those.
ELSEWHERE = [((6, 4, 3, 3), 1), ((5, 4, 2), 1)]


def masked(shape, axis, share, seed=0):
    """x, dy and a mask that shows a share; the first sample is hidden, and what is hidden is NaN."""
    rng = np.random.default_rng(seed)
    positions = tuple(size for i, size in enumerate(shape) if i != axis % len(shape))
    mask = rng.random(positions) < share
    mask[0] = False
    x = rng.standard_normal(shape) * 3 + 100
    x[~np.broadcast_to(np.expand_dims(mask, axis), shape)] = np.nan
    return x, rng.standard_normal(shape), mask


def check(shape, axis, share, dtype, training=True):
    x, dy, mask = masked(shape, axis, share)
    x, dy = inputs.cast(x, dtype), inputs.cast(dy, dtype)
    dy[np.isnan(x)] = np.nan
    channels = shape[axis]
    state = anybn.BatchNormState(channels)
    rng = np.random.default_rng(1)
    state.weight, state.bias = rng.uniform(0.5, 2, channels), rng.standard_normal(channels)
    y, pullback = anybn.batch_norm_vjp(x, state, training=training, axis=axis, mask=mask, activation="relu")
    grads = pullback(dy)

    shown = np.where(np.isnan(x), np.zeros((), x.dtype), x)
    statistics = oracle.statistics(shown, axis, mask)
    mean, var = (statistics.mean, statistics.var()) if training else (np.zeros(channels), np.ones(channels))
    options = {"axis": axis, "weight": state.weight, "mask": mask}
    expected = oracle.normalize(shown, mean, var, bias=state.bias, relu=True, **options)
    size = 1 if dtype != "float64" else np.abs(state.weight).max() * 5 + np.abs(state.bias).max()
    limit = 0.51 if dtype in ("float16", "bfloat16") else 2
    assert oracle.error(y, expected, dtype, size if training else np.abs(expected).max()) <= limit
    of = oracle.gradients(
        np.where(np.isnan(dy), np.zeros((), dy.dtype), dy),
        shown,
        mean,
        var,
        count=statistics.count if training else None,
        active=np.asarray(y) > 0,
        **options,
    )
    assert oracle.error(grads.x, of.x, dtype, 1 if dtype != "float64" else np.maximum(1, of.x_size)) <= limit
    assert oracle.error(grads.weight, of.weight, "float32", np.maximum(1, of.weight_size)) <= 2
    assert oracle.error(grads.bias, of.bias, "float32", np.maximum(1, of.bias_size)) <= 2
    hidden = np.broadcast_to(~np.expand_dims(mask, axis), shape)
    assert np.all(y[hidden] == 0)
    assert np.all(grads.x[hidden] == 0)
    if training:
        moments = anybn.moments(x, axis=axis, mask=mask)
        assert moments.count == statistics.count
        relative = moments.m2 / np.where(statistics.m2 > 0, statistics.m2, 1)
        assert oracle.error(relative, statistics.m2 > 0, dtype) <= 2


@pytest.fixture
def alone(monkeypatch):
    """The kernels have nobody to hand a call to."""
    for name in ("train", "evaluate", "batch_statistics", "gradients"):
        monkeypatch.setattr(chunked, name, None)


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_by_kernels(shape, axis, alone):
    check(shape, axis, 0.7, "float32")


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize(("shape", "axis"), [SHAPES[2], SHAPES[3]], ids=str)
def test_other_dtypes(shape, axis, dtype, alone):
    if not operations.supports(np.dtype({"float16": "i2", "bfloat16": "u2"}.get(dtype, dtype))):
        pytest.skip(f"no kernels for {dtype} on this processor")
    check(shape, axis, 0.7, dtype)


@pytest.mark.parametrize(("shape", "axis"), SHAPES[:4], ids=str)
def test_evaluation_and_sparse_masks(shape, axis, alone):
    check(shape, axis, 0.7, "float32", training=False)
    check(shape, axis, 0.05, "float32")
    check(shape, axis, 1.0, "float32")


@pytest.mark.parametrize(("shape", "axis"), ELSEWHERE, ids=str)
def test_short_planes(shape, axis):
    check(shape, axis, 0.7, "float32")


@pytest.mark.parametrize("order", ["broadcast", "Fortran", "strided", "read-only"])
def test_masks_in_any_memory(order, alone):
    rng = np.random.default_rng(0)
    x, shown = rng.standard_normal((6, 5, 4, 20)).astype(np.float32), rng.random((6, 4, 20)) < 0.6
    mask = {
        "broadcast": shown[:, :1],
        "Fortran": np.asfortranarray(shown),
        "strided": np.repeat(shown, 2, axis=2)[..., ::2],
        "read-only": shown.copy(),
    }[order]
    mask.flags.writeable = False
    found = anybn.moments(x, mask=mask)
    expected = oracle.statistics(x, mask=np.broadcast_to(mask, shown.shape))
    assert found.count == expected.count
    assert oracle.error(found.m2 / expected.m2, np.ones(5), "float32") <= 2


@pytest.mark.parametrize(("shape", "axis"), [((5, 3, 40), 1), ((20, 3), 1)])
def test_nothing_shown(shape, axis):
    x, _, mask = masked(shape, axis, 0.0)
    state = anybn.BatchNormState(3)
    assert np.all(anybn.batch_norm(x, state, mask=mask) == 0)
    found = anybn.moments(x, mask=mask)
    assert found.count == 0
    assert np.all(found.mean == 0)
    with pytest.raises(ValueError, match="with 0 unmasked"):
        anybn.batch_norm(x, state, training=True, mask=mask)


def test_the_same_bits_on_any_number_of_threads():
    x, dy, mask = masked((64, 32, 60), 1, 0.7)
    x, dy, before, found = x.astype(np.float32), dy.astype(np.float32), anybn.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            anybn.set_num_threads(threads)
            y, pullback = anybn.batch_norm_vjp(x, anybn.BatchNormState(32), training=True, mask=mask)
            grads = pullback(dy)
            found.append(b"".join(a.tobytes() for a in (y, grads.x, grads.weight)))
    finally:
        anybn.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_a_file_in_memory_needs_no_copy(tmp_path):
    """Of a mapped file, statistics and y in a mapped file take what the mask takes, and the sums of runs."""
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(64, 32, 600))
    out = np.memmap(tmp_path / "y", np.float32, "w+", shape=x.shape)
    x[:] = np.random.default_rng(0).standard_normal(x.shape)
    mask = np.random.default_rng(1).random((64, 600)) < 0.7
    state = anybn.BatchNormState(32)
    anybn.batch_norm(x, state, training=True, mask=mask, out=out)  # compiles, which takes memory too
    tracemalloc.start()
    try:
        anybn.batch_norm(x, state, training=True, mask=mask, out=out)
        anybn.moments(x, mask=mask)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < x.nbytes / 10
    statistics = oracle.statistics(x, mask=mask)
    assert oracle.error(out, oracle.normalize(x, statistics.mean, statistics.var(), mask=mask), "float32") <= 2


def test_torch_inside_autograd(alone):
    torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")
    x, dy, mask = masked((4, 3, 40), 1, 0.7)
    x, dy = np.nan_to_num(x).astype(np.float32), dy.astype(np.float32)
    state = anybn.BatchNormState(3, like=torch.zeros(1))
    leaf = torch.from_numpy(x).requires_grad_()
    y = anybn.batch_norm(leaf, state, training=True, mask=torch.from_numpy(mask))
    y.backward(torch.from_numpy(dy))
    statistics = oracle.statistics(x, mask=mask)
    expected = oracle.normalize(x, statistics.mean, statistics.var(), mask=mask)
    assert oracle.error(y.detach().numpy(), expected, "float32") <= 2
    dx = oracle.gradients(dy, x, statistics.mean, statistics.var(), count=statistics.count, mask=mask).x
    assert oracle.error(leaf.grad.numpy(), dx, "float32") <= 2
    var = oracle.running(np.ones(3), statistics.var(1), 0.1)
    assert oracle.error(state.running_var.numpy(), var, "float64", 10) <= 2


@pytest.mark.parametrize("hidden", [np.nan, np.inf])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_hidden_does_not_reach_second_derivatives(training, hidden):
    torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")
    x, _, mask = masked((4, 3, 40), 1, 0.7)
    found = []
    for value in (0.0, hidden):
        leaf = torch.from_numpy(np.nan_to_num(x, nan=value)).requires_grad_()
        state = anybn.BatchNormState(3, like=torch.zeros(1))
        y = anybn.batch_norm(leaf, state, training=training, mask=torch.from_numpy(mask))
        (dx,) = torch.autograd.grad((y**3).sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad((dx**2).sum(), leaf)[0])
    assert found[0].abs().max() > 0
    assert torch.equal(*found)
