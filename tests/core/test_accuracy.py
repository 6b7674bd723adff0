"""The claim beyond the bar: where the working dtype is wider than x, y and dx are correctly rounded."""

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs, oracle


@pytest.mark.parametrize("row", inputs.ROWS)
def test_results_are_rounded_once(target, row):
    """Half a unit, and a millionth for what the float64 arithmetic before the rounding loses."""
    if not target.has_float64:
        pytest.skip("needs float64")
    rng = np.random.default_rng(4)
    values = inputs.ROWS[row](inputs.normal((16, 8, 14, 14))).astype(np.float32)
    residual, dy = (rng.standard_normal(values.shape).astype(np.float32) for _ in range(2))
    weight, bias = rng.standard_normal((2, 8)).astype(np.float32)
    state = anybn.BatchNormState(8)
    state.weight, state.bias = weight, bias
    y, pullback = anybn.batch_norm_vjp(
        target.array(values), state, training=True, residual=target.array(residual), activation="relu"
    )
    statistics = oracle.statistics(values)
    options = {"weight": weight, "bias": bias, "residual": residual, "relu": True}
    expected = oracle.normalize(values, statistics.mean, statistics.var(), **options)
    assert oracle.error(target.numpy(y), expected, "float32") <= 0.500001
    grads = oracle.gradients(
        dy,
        values,
        statistics.mean,
        statistics.var(),
        count=statistics.count,
        weight=weight,
        active=expected > 0,
    )
    assert oracle.error(target.numpy(pullback(target.array(dy)).x), grads.x, "float32") <= 0.500001


def test_the_story_of_the_readme():
    """torch on the CPU returns a standard deviation of 0.11 for this."""
    x = (np.random.default_rng(0).standard_normal((1_000_000, 8)) + 1000).astype(np.float32)
    y = anybn.BatchNorm1d(8)(x).astype(np.float64)
    assert np.abs(y.std(0) - 1).max() < 1e-5
    assert np.abs(y.mean(0)).max() < 1e-6
