"""y, running_var and m2 at the accuracy bar, on the inputs that break batch norms."""

from typing import Any

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs, oracle
from anybn.conformance.targets import Target, bar, rows_and_layouts


def train(target: Target, values: np.ndarray, x: Any, axis: int, layout: str, dtype: str) -> anybn.BatchNormState:
    """One training step on x, which holds the values, held to the bar."""
    state = anybn.BatchNormState(values.shape[1], momentum=1.0, like=x)
    statistics = oracle.statistics(values)
    limit = bar(target, dtype)

    expected = oracle.normalize(values, statistics.mean, statistics.var())
    y = anybn.batch_norm(x, state, training=True, axis=axis)
    assert y.dtype == x.dtype
    assert oracle.error(target.numpy(y), inputs.in_layout(expected, layout), dtype) <= limit

    # What the state holds, to two units of x, or of the running statistics where those are no wider.
    kept = "float64" if target.has_float64 else "float32"
    unit = dtype if oracle.EPS[dtype] > oracle.EPS[kept] else kept
    running_mean, running_var = target.numpy(state.running_mean), target.numpy(state.running_var)
    assert oracle.error(running_var, statistics.var(ddof=1), unit, size=0) <= limit
    assert oracle.error(running_mean, statistics.mean, unit, size=np.sqrt(statistics.var())) <= limit
    moments = anybn.moments(x, axis=axis)
    assert oracle.error(target.numpy(moments.m2), statistics.m2, unit, size=0) <= limit
    assert int(moments.count) == statistics.count
    return state


def train_and_evaluate(target: Target, values: np.ndarray, layout: str, dtype: str) -> None:
    """One training step and one evaluation with what it left, each held to the bar."""
    values = inputs.cast(values, dtype)
    x, axis = inputs.LAYOUTS[layout](target, values)
    state = train(target, values, x, axis, layout, dtype)

    y = anybn.batch_norm(x, state, axis=axis)
    expected = oracle.normalize(values, target.numpy(state.running_mean), target.numpy(state.running_var))
    assert oracle.error(target.numpy(y), inputs.in_layout(expected, layout), dtype) <= bar(target, dtype)


def train_where_no_variance_is_held(target: Target, row: str, layout: str) -> None:
    """y and dx at the bar; the running statistics, which cannot learn a variance of 1e60 in float32, stay."""
    values = inputs.cast(inputs.ROWS[row](inputs.normal()), "float32")
    x, axis = inputs.LAYOUTS[layout](target, values)
    dy = inputs.cast(inputs.normal(seed=1), "float32")
    state = anybn.BatchNormState(values.shape[1], like=x)
    before = inputs.state_values(state)
    y, pullback = anybn.batch_norm_vjp(x, state, training=True, axis=axis)
    statistics = oracle.statistics(values)
    mean, var = statistics.mean, statistics.var()
    expected = oracle.normalize(values, mean, var)
    limit = bar(target, "float32")
    assert oracle.error(target.numpy(y), inputs.in_layout(expected, layout), "float32") <= limit
    grads = oracle.gradients(dy, values, mean, var, count=statistics.count)
    dx = target.numpy(pullback(target.array(inputs.in_layout(dy, layout))).x)
    size = inputs.in_layout(grads.x_size, layout)  # of the terms, 1e-30
    assert oracle.error(dx, inputs.in_layout(grads.x, layout), "float32", size) <= limit
    assert state.num_batches_tracked == 1
    state.num_batches_tracked = 0
    assert inputs.state_values(state) == before


@pytest.mark.parametrize(("row", "layout"), rows_and_layouts(inputs.ROWS, inputs.LAYOUTS))
def test_float32(target: Target, row: str, layout: str) -> None:
    if row == inputs.OVERFLOWING and not target.has_float64:
        train_where_no_variance_is_held(target, row, layout)
        return
    train_and_evaluate(target, inputs.ROWS[row](inputs.normal()), layout, "float32")


@pytest.mark.parametrize(("row", "layout"), rows_and_layouts(inputs.ROWS, ["NCHW", "NHWC", "strided view"]))
def test_float64(target: Target, row: str, layout: str) -> None:
    target.require("float64")
    train_and_evaluate(target, inputs.ROWS[row](inputs.normal()), layout, "float64")


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(target: Target, dtype: str, layout: str) -> None:
    target.require(dtype)
    train_and_evaluate(target, inputs.ROWS["mean 1e3, std 1"](inputs.normal()), layout, dtype)


@pytest.mark.quick
@pytest.mark.parametrize("row", ["N(0, 1)", "mean 1e6, std 1"])
def test_quick(target: Target, row: str) -> None:
    train_and_evaluate(target, inputs.ROWS[row](inputs.normal((8, 3, 5, 7))), "NCHW", "float32")


@pytest.mark.slow
@pytest.mark.parametrize("shape", inputs.HUGE_SHAPES, ids=str)
def test_ten_million_values_in_one_channel(target: Target, shape: tuple[int, ...]) -> None:
    values = inputs.cast(inputs.normal(shape) + 100, "float32")
    train(target, values, target.array(values), 1, "NCHW", "float32")


@pytest.mark.parametrize("shape", [(2, 1), (7, 1), (2, 3, 1), (5, 1, 3, 3), (3, 1023, 7), (2, 3, 2, 2, 5), (1, 4, 101)])
def test_odd_shapes(target: Target, shape: tuple[int, ...]) -> None:
    train_and_evaluate(target, inputs.normal(shape) * 3 + 10, "NCHW", "float32")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("value", [1e7, 0.1, -3.3e-5, 0.0])
def test_constant_input_gives_exactly_bias(target: Target, value: float, dtype: str) -> None:
    target.require(dtype)
    values = inputs.cast(np.full((32, 3, 9, 9), min(value, 6e4) if dtype == "float16" else value), dtype)
    state = anybn.BatchNormState(3)
    state.bias = np.array([0.0, 1.5, -2.0], np.float32)
    y = target.numpy(anybn.batch_norm(target.array(values), state, training=True))
    assert np.all(y == np.array([0.0, 1.5, -2.0]).reshape(1, 3, 1, 1))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exact_data_agrees_bit_for_bit(target: Target, dtype: str) -> None:
    """Mean and variance of this data are exact in any order of summation, so NumPy and the target must agree."""
    target.require(dtype)
    for shape, axis in (((32, 8, 28, 28), 1), ((4, 7, 7, 5), -1), ((1001, 3), 1)):
        values = inputs.exact(shape, axis).astype(dtype)
        statistics = oracle.statistics(values, axis)
        x = target.array(values)
        moments = anybn.moments(x, axis=axis)
        assert np.all(target.numpy(moments.mean) == statistics.mean.origin + statistics.mean.offset)
        assert np.all(target.numpy(moments.m2) == statistics.m2)

        here, there = anybn.BatchNormState(shape[axis]), anybn.BatchNormState(shape[axis])
        y = target.numpy(anybn.batch_norm(x, here, training=True, axis=axis))
        assert oracle.error(y, oracle.normalize(values, statistics.mean, statistics.var(), axis=axis), dtype) <= 4
        with anybn.use_backend("numpy"):
            expected = anybn.batch_norm(values, there, training=True, axis=axis)
        if target.has_float64:
            assert y.tobytes() == expected.tobytes()
            assert inputs.state_values(here) == inputs.state_values(there)
        else:
            assert oracle.error(y, expected, dtype) <= 4
