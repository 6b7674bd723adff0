"""What the state holds after several steps, under every setting, and when the library changes in the middle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs, oracle
from anybn.conformance.targets import Target


def batches(count: int = 4) -> list[np.ndarray]:
    return [(inputs.normal((6, 3, 4), seed) * (1 + seed) + 10 * seed).astype(np.float32) for seed in range(count)]


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 0.37, None])
def test_running_statistics(target: Target, momentum: float | None, ddof: int) -> None:
    state = anybn.BatchNormState(3, momentum=momentum, ddof=ddof)
    for x in batches():
        anybn.batch_norm(target.array(x), state, training=True)
    mean, var = oracle.trained(map(oracle.statistics, batches()), momentum, ddof)
    kept = "float64" if target.has_float64 else "float32"
    for array in (state.running_mean, state.running_var):
        assert array is not None
        assert array.dtype == target.backend.dtype(kept)
    assert oracle.error(target.numpy(state.running_mean), mean, kept, max(1, np.abs(mean).max())) <= 4
    assert oracle.error(target.numpy(state.running_var), var, kept, max(1, np.abs(var).max())) <= 4
    assert state.num_batches_tracked == 4


@pytest.mark.quick
def test_worked_example(target: Target) -> None:
    """The example of every lesson, with what torch.nn.BatchNorm1d(4) gives for it."""
    bn = anybn.BatchNorm1d(4)
    x = np.array([[1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]], np.float32)
    y = target.numpy(bn(target.array(x)))
    assert np.abs(y - np.array([[-1.2247357], [0.0], [1.2247357]])).max() < 3e-7
    assert np.abs(target.numpy(bn.state.running_mean) - [0.2, 0.3, 0.4, 0.5]).max() < 1e-7
    assert np.abs(target.numpy(bn.state.running_var) - 1).max() < 1e-7


def test_evaluation_changes_nothing(target: Target) -> None:
    state = anybn.BatchNormState(3, like=target.array(np.zeros(1, np.float32)))
    before = inputs.state_values(state)
    for x in batches():
        anybn.batch_norm(target.array(x), state)
    assert inputs.state_values(state) == before


def test_affine_off(target: Target) -> None:
    x = batches(1)[0]
    state = anybn.BatchNormState(3, affine=False)
    y = target.numpy(anybn.batch_norm(target.array(x), state, training=True))
    assert state.weight is None
    assert state.bias is None
    statistics = oracle.statistics(x)
    assert oracle.error(y, oracle.normalize(x, statistics.mean, statistics.var()), "float32") <= 4


def test_statistics_off_uses_the_batch_in_evaluation(target: Target) -> None:
    bn = anybn.BatchNorm(3, track_running_stats=False).eval()
    for x in batches():
        statistics = oracle.statistics(x)
        expected = oracle.normalize(x, statistics.mean, statistics.var())
        assert oracle.error(target.numpy(bn(target.array(x))), expected, "float32") <= 4
    assert bn.state.running_mean is None
    assert bn.state.num_batches_tracked == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
# Infinity minus infinity; Dask computes it after the call, under its user's settings.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nonfinite_batches(target: Target, bad: float) -> None:
    """Channel 1 has a value that is not finite: its running statistics stay, the others learn, y shows it."""
    good, x = batches(2)
    x = x.copy()
    x[2, 1, 3] = bad
    state = anybn.BatchNormState(3)
    anybn.batch_norm(target.array(good), state, training=True)
    mean, var = (target.numpy(a) for a in (state.running_mean, state.running_var))

    untouched = state.copy()
    if not target.backend.is_traced(target.array(x)):
        with pytest.raises(anybn.NonFiniteError, match=r"1 of 3 channels \(1\)") as caught:
            anybn.batch_norm(target.array(x), state, training=True, nonfinite="raise")
        assert caught.value.channels == (1,)
        assert inputs.state_values(state) == inputs.state_values(untouched)

    y = target.numpy(anybn.batch_norm(target.array(x), state, training=True))
    assert np.isnan(y[2, 1, 3])
    assert np.all(np.isfinite(y[:, [0, 2]]))
    evaluated = target.numpy(anybn.batch_norm(target.array(x), state))
    assert np.argwhere(~np.isfinite(evaluated)).tolist() == [[2, 1, 3]]
    new_mean, new_var = (target.numpy(a) for a in (state.running_mean, state.running_var))
    assert new_mean[1] == mean[1]
    assert new_var[1] == var[1]
    expected_mean, expected_var = oracle.trained(map(oracle.statistics, [good, x]))
    kept = "float64" if target.has_float64 else "float32"
    for c in (0, 2):
        assert oracle.error(new_mean[[c]], expected_mean[[c]], kept, 10) <= 4
        assert oracle.error(new_var[[c]], expected_var[[c]], kept, 10) <= 4
    assert state.num_batches_tracked == 2

    anybn.batch_norm(target.array(x), untouched, training=True, nonfinite="propagate")
    assert not np.isfinite(target.numpy(untouched.running_var)[1])
    assert np.all(np.isfinite(target.numpy(untouched.running_var)[[0, 2]]))


@pytest.mark.quick
def test_switching_library_in_the_middle(target: Target) -> None:
    """NumPy, target, NumPy, target: the state is what one library alone would have made of the batches."""
    state = anybn.BatchNormState(3)
    for step, x in enumerate(batches(6)):
        anybn.batch_norm(x if step % 2 else target.array(x), state, training=True)
    dtype = "float64" if target.has_float64 else "float32"
    assert state.num_batches_tracked == 6
    state.to("numpy")
    mean, var = oracle.trained(map(oracle.statistics, batches(6)))
    for found, expected in ((state.running_mean, mean), (state.running_var, var)):
        assert oracle.error(found, expected, dtype, np.abs(expected).max()) <= 8
    x = batches(1)[0]
    y = target.numpy(anybn.batch_norm(target.array(x), state))
    assert oracle.error(y, oracle.normalize(x, mean, var), "float32") <= 4


def test_switching_on_exact_data_leaves_the_same_bits(target: Target) -> None:
    """Halves of small integers, momentum 1/2: no rounding anywhere, so even float32 statistics lose nothing."""
    switched, alone = (anybn.BatchNormState(3, momentum=0.5, ddof=0) for _ in range(2))
    for step in range(3):
        x = inputs.exact((8, 3, 4), seed=step).astype(np.float32)
        anybn.batch_norm(target.array(x) if step % 2 == 0 else x, switched, training=True)
        anybn.batch_norm(x, alone, training=True)
    assert inputs.state_values(switched) == inputs.state_values(alone)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_moving_keeps_the_bits(target: Target, dtype: str) -> None:
    target.require(dtype)
    state = anybn.BatchNormState(5, dtype=dtype)
    state.weight = target.array(inputs.normal((5,)), dtype)
    state.running_mean = target.array(inputs.normal((5,)).astype(np.float32))
    before = inputs.state_values(state)
    place = target.array(np.zeros(1, np.float32))
    assert inputs.state_values(state.to("numpy").to(place).to("numpy")) == before
    assert state.dtype == dtype


def test_two_layers_share_one_state(target: Target) -> None:
    first = anybn.BatchNorm(3)
    second = anybn.BatchNorm(3, axis=-1, state=first.state)
    x = batches(1)[0]
    first(target.array(x))
    second(target.array(np.ascontiguousarray(np.moveaxis(x, 1, -1))))
    mean, _ = oracle.trained(map(oracle.statistics, [x, x]))
    kept = "float64" if target.has_float64 else "float32"
    assert oracle.error(target.numpy(first.state.running_mean), mean, kept) <= 4
    assert second.state.num_batches_tracked == 2


def test_state_dict_round_trip(target: Target) -> None:
    state = anybn.BatchNormState(3, like=target.array(np.zeros(1, np.float32)))
    for x in batches():
        anybn.batch_norm(target.array(x), state, training=True)
    saved = state.state_dict()
    assert list(saved) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert saved["num_batches_tracked"].shape == ()
    fresh = anybn.BatchNormState(3)
    fresh.load_state_dict(saved)
    assert inputs.state_values(fresh) == inputs.state_values(state)


def test_empty_batches_leave_the_state_alone(target: Target) -> None:
    state = anybn.BatchNormState(3)
    before = inputs.state_values(state)
    for shape in ((0, 3), (0, 3, 4, 4), (2, 3, 0)):
        x = target.array(np.zeros(shape, np.float32))
        for training in (True, False):
            y, pullback = anybn.batch_norm_vjp(x, state, training=training)
            grads = pullback(x)
            assert target.numpy(y).shape == target.numpy(grads.x).shape == shape
            assert np.all(target.numpy(grads.weight) == 0)
        assert anybn.moments(x).count == 0
    assert inputs.state_values(state) == before


def test_moments_merge_into_those_of_the_whole(target: Target) -> None:
    x = inputs.normal((40, 3, 5)) + 100
    whole = oracle.statistics(x.astype(np.float32))
    parts = [anybn.moments(target.array(part)) for part in np.split(x.astype(np.float32), [1, 7, 7, 30])]
    merged = sum(parts[1:], parts[0])
    assert int(merged.count) == whole.count
    assert oracle.error(target.numpy(merged.m2), whole.m2, "float32", size=0) <= 4
    assert oracle.error(target.numpy(merged.mean), whole.mean, "float32") <= 4


@pytest.mark.parametrize("training", [True, False])
def test_masked_statistics(target: Target, training: bool) -> None:
    x = batches(1)[0]
    mask = np.random.default_rng(5).random((6, 4)) < 0.6
    for shown in (mask, mask[:, :1], mask[:1], mask[0]):
        state = anybn.BatchNormState(3)
        y = anybn.batch_norm(target.array(x), state, training=training, mask=target.array(shown))
        everywhere = np.broadcast_to(shown, mask.shape)
        statistics = oracle.statistics(x, mask=everywhere)
        mean: Any = statistics.mean if training else np.zeros(3)
        var: Any = statistics.var() if training else np.ones(3)
        expected = oracle.normalize(x, mean, var, mask=everywhere)
        assert oracle.error(target.numpy(y), expected, "float32") <= 4
        if training:
            var = oracle.running(np.ones(3), statistics.var(1), 0.1)
            assert oracle.error(target.numpy(state.running_var), var, "float32") <= 4


def test_out(target: Target) -> None:
    x = batches(1)[0]
    statistics = oracle.statistics(x)
    expected = oracle.normalize(x, statistics.mean, statistics.var())
    if not target.backend.writable:
        with pytest.raises(TypeError, match=r"out was given but .* arrays cannot be written to"):
            anybn.batch_norm(target.array(x), anybn.BatchNormState(3), out=target.array(np.zeros_like(x)))
        return
    for inplace in (False, True):
        values = target.array(x)
        out = values if inplace else target.array(np.full_like(x, np.nan))
        y = anybn.batch_norm(values, anybn.BatchNormState(3), training=True, out=out)
        assert y is out
        assert oracle.error(target.numpy(out), expected, "float32") <= 4
        assert inplace or np.array_equal(target.numpy(values), x)

    # The pullback of a call whose out is x still knows x.
    values, dy = target.array(x), target.array(x * 2 - 1)
    _, pullback = anybn.batch_norm_vjp(values, anybn.BatchNormState(3), training=True, out=values)
    dx = oracle.gradients(x * 2 - 1, x, statistics.mean, statistics.var(), count=statistics.count).x
    size = np.abs(x * 2 - 1).max()
    assert oracle.error(target.numpy(pullback(dy).x), dx, "float32", size) <= 4


@pytest.mark.quick
def test_evaluation_leaves_the_state_at_home(target: Target) -> None:
    """Elsewhere it reads a replica, which follows what is written to the state."""
    state, x = anybn.BatchNormState(3), batches(1)[0]
    anybn.batch_norm(x, state, training=True)
    arrays, mean, var = state._arrays, state.running_mean, state.running_var
    for factor in (1.0, 2.0):
        state.weight[...] = factor
        for _ in range(2):
            y = target.numpy(anybn.batch_norm(target.array(x), state))
            expected = oracle.normalize(x, mean, var, weight=np.full(3, factor))
            assert oracle.error(y, expected, "float32", 10) <= 4
    assert state._arrays is arrays
