"""The oracle itself: against exact rational arithmetic, finite differences and torch."""

from fractions import Fraction

import numpy as np
import pytest

from anybn.conformance import inputs, oracle


def test_statistics_are_those_of_rational_arithmetic():
    x = (inputs.normal((5, 2, 3)) + 1e6).astype(np.float32)
    for c in range(2):
        values = [Fraction(float(v)) for v in x[:, c].ravel()]
        mean = sum(values) / len(values)
        m2 = sum((v - mean) ** 2 for v in values)
        statistics = oracle.statistics(x)
        offset = float(mean - Fraction(float(statistics.mean.origin[c])))
        assert abs(float(statistics.mean.offset[c]) - offset) <= 2**-52 * abs(offset)
        assert abs(float(statistics.m2[c]) / float(m2) - 1) <= 2**-52


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_gradients_are_finite_differences(training, masked):
    rng = np.random.default_rng(0)
    x, dy, residual = (rng.standard_normal((4, 2, 3)).astype(np.float64) for _ in range(3))
    weight, bias = rng.standard_normal((2, 2))
    mask = rng.random((4, 3)) < 0.7 if masked else None

    def forward(x, weight, bias, residual):
        statistics = oracle.statistics(x.astype(oracle.LONG), mask=mask)
        mean = statistics.mean if training else np.array([0.3, -0.2])
        var = statistics.var() if training else np.array([1.5, 0.5])
        y = oracle.normalize(x, mean, var, weight=weight, bias=bias, residual=residual, relu=True, mask=mask)
        return y, mean, var, statistics.count

    y, mean, var, count = forward(x, weight, bias, residual)
    grads = oracle.gradients(
        dy, x, mean, var, count=count if training else None, weight=weight, active=y > 0, mask=mask
    )
    arguments = [a.astype(oracle.LONG) for a in (x, weight, bias, residual)]
    for argument, grad in zip(arguments, (grads.x, grads.weight, grads.bias, grads.residual), strict=True):
        for index in np.ndindex(argument.shape):
            here = argument[index]
            slope = 0
            for sign in (1, -1):
                argument[index] = here + sign * oracle.LONG(1e-6)
                slope += sign * (forward(*arguments)[0] * dy).sum() / oracle.LONG(2e-6)
            argument[index] = here
            assert abs(slope - grad[index]) < 1e-9


def test_error_sees_nan_and_shape():
    assert np.isnan(oracle.error(np.array([np.nan]), np.array([1.0]), "float32"))
    assert oracle.error(np.array([1 + 2.0**-23]), np.array([1.0]), "float32") == pytest.approx(1, rel=1e-6)
    with pytest.raises(AssertionError):
        oracle.error(np.zeros((2, 1)), np.zeros((1, 2)), "float32")


def test_exact_data_is_exact():
    for shape, axis in (((32, 8, 28, 28), 1), ((4, 7, 7, 5), -1), ((1001, 3), 1)):
        rows = oracle.channels_first(inputs.exact(shape, axis), axis)
        means = rows.mean(1, keepdims=True)
        assert np.array_equal(means, np.round(means))
        deviations = (rows - means).astype(np.int64)
        assert np.array_equal(rows - means, deviations)
        assert np.all(deviations.sum(1) == 0)
        assert (deviations**2).sum(1).max() < 2**24, "m2 is exact in float32 as well"
