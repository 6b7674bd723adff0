"""batch_norm_vjp against the chain rule in long double: training and evaluation, mask, residual, relu, layouts."""

import itertools
from typing import Any

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs, oracle
from anybn.conformance.targets import Target, bar, rows_and_layouts


def check(
    target: Target,
    values: np.ndarray,
    dtype: str,
    layout: str = "NCHW",
    *,
    training: bool = True,
    masked: bool = False,
    with_residual: bool = False,
    relu: bool = False,
    scale: bool = True,
    bias: bool = True,
    parameter_dtype: str = "float32",
    automatic: bool = False,
) -> None:
    """automatic: `batch_norm` differentiated by the library in place of `batch_norm_vjp`."""
    rng = np.random.default_rng(1)
    values = inputs.cast(values, dtype)
    n, c, *spatial = values.shape
    dy = inputs.cast(rng.standard_normal(values.shape), dtype)
    residual = inputs.cast(rng.standard_normal(values.shape), dtype) if with_residual else None
    mask = rng.random((n, *spatial)) < 0.7 if masked else None
    factor, offset = (inputs.cast(a, parameter_dtype) for a in (rng.uniform(0.5, 2, (c,)), rng.standard_normal((c,))))
    state = anybn.BatchNormState(c, scale=scale, bias=bias, dtype=parameter_dtype)
    if scale:
        state.weight = factor
    if bias:
        state.bias = offset
    running_mean: Any = np.zeros(c) if training else rng.standard_normal(c)
    running_var: Any = np.ones(c) if training else rng.uniform(0.5, 2, c)
    state.running_mean, state.running_var = running_mean, running_var
    if not target.has_float64:
        running_mean, running_var = running_mean.astype(np.float32), running_var.astype(np.float32)

    x, axis = inputs.LAYOUTS[layout](target, values)
    placed = {
        name: None if a is None else target.array(np.ascontiguousarray(inputs.in_layout(a, layout)))
        for name, a in (("dy", dy), ("residual", residual))
    }
    options: dict[str, Any] = {
        "training": training,
        "axis": axis,
        "mask": None if mask is None else target.array(mask),
        "activation": "relu" if relu else None,
    }
    if automatic:
        y, grads = differentiated(target, state, options, x, *placed.values())
    else:
        y, pullback = anybn.batch_norm_vjp(x, state, residual=placed["residual"], **options)
        grads = pullback(placed["dy"])

    statistics = oracle.statistics(values, mask=mask)
    mean: Any = statistics.mean if training else running_mean
    var: Any = statistics.var() if training else running_var
    w, b = factor if scale else None, offset if bias else None
    expected_y = oracle.normalize(values, mean, var, weight=w, bias=b, residual=residual, relu=relu, mask=mask)
    count, active = statistics.count if training else None, expected_y > 0 if relu else None
    expected = oracle.gradients(dy, values, mean, var, count=count, weight=w, active=active, mask=mask)
    # Computed in something wider than dtype, every result is judged by its own size; else by that of what was
    # subtracted to get it: the slope weight * rstd for dx, the terms of the sums for dweight and dbias.
    wide = target.has_float64 and dtype != "float64"
    limit = bar(target, dtype)
    largest_term = 1 if wide else np.abs(factor).max() * 5 + np.abs(offset).max()
    assert oracle.error(target.numpy(y), inputs.in_layout(expected_y, layout), dtype, largest_term) <= limit
    assert grads.x.dtype == x.dtype
    size = 1 if wide else np.maximum(1, inputs.in_layout(expected.x_size, layout))
    assert oracle.error(target.numpy(grads.x), inputs.in_layout(expected.x, layout), dtype, size) <= limit
    if with_residual:
        assert oracle.error(target.numpy(grads.residual), inputs.in_layout(expected.residual, layout), dtype) <= limit
    else:
        assert grads.residual is None
    wide = target.has_float64 and parameter_dtype != "float64"
    limit = bar(target, parameter_dtype)
    for there, found, wanted, size in (
        (scale, grads.weight, expected.weight, expected.weight_size),
        (bias, grads.bias, expected.bias, expected.bias_size),
    ):
        assert (found is not None) == there
        if there:
            assert found.dtype == target.backend.dtype(parameter_dtype)
            assert oracle.error(target.numpy(found), wanted, parameter_dtype, 1 if wide else size) <= limit


def differentiated(
    target: Target, state: anybn.BatchNormState, options: dict[str, Any], x: Any, dy: Any, residual: Any
) -> tuple[Any, anybn.Gradients]:
    """y and its gradients with respect to all that is there, by the library itself."""
    there = state.copy().to(x)
    arrays = {"x": x, "weight": there.weight, "bias": there.bias, "residual": residual}
    names = [name for name, array in arrays.items() if array is not None]

    def normalized(*given: Any) -> Any:
        named = dict(zip(names, given, strict=True))
        own = anybn.BatchNormState(
            state.num_features, scale="weight" in names, bias="bias" in names, dtype=state.dtype, like=named["x"]
        )
        own.running_mean, own.running_var = there.running_mean, there.running_var
        for name in {"weight", "bias"}.intersection(names):
            setattr(own, name, named[name])
        return anybn.batch_norm(named["x"], own, residual=named.get("residual"), **options)

    y, *grads = target.differentiated(normalized, dy, *(arrays[name] for name in names))
    found = dict(zip(names, grads, strict=True))
    return y, anybn.Gradients(*(found.get(name) for name in anybn.Gradients._fields))


@pytest.mark.parametrize(("training", "masked", "with_residual", "relu"), [*itertools.product([True, False], repeat=4)])
@pytest.mark.parametrize("automatic", [True, False], ids=["automatic_differentiation", "pullback"])
def test_options(
    target: Target, automatic: bool, training: bool, masked: bool, with_residual: bool, relu: bool
) -> None:
    values = inputs.normal((6, 3, 5, 4)) + 2
    options: dict[str, Any] = {"training": training, "masked": masked, "relu": relu, "with_residual": with_residual}
    for affine, layout in ((True, "NCHW"), (False, "NHWC")):
        check(target, values, "float32", layout, scale=affine, bias=affine, automatic=automatic, **options)


@pytest.mark.parametrize(
    ("row", "layout"), rows_and_layouts([row for row in inputs.ROWS if row != inputs.OVERFLOWING], inputs.LAYOUTS)
)
def test_input_gradient(target: Target, row: str, layout: str) -> None:
    check(target, inputs.ROWS[row](inputs.normal((16, 8, 14, 14))), "float32", layout)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(target: Target, dtype: str) -> None:
    target.require(dtype)
    check(target, inputs.normal((8, 4, 6, 6)), dtype, with_residual=True, relu=True)


@pytest.mark.parametrize("parameter_dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_of_weight_and_bias(target: Target, dtype: str, parameter_dtype: str) -> None:
    """Others than float32, which all else here has, with every dtype of x."""
    target.require(dtype)
    target.require(parameter_dtype)
    for training in (True, False):
        check(target, inputs.normal((8, 5, 6, 6)), dtype, training=training, parameter_dtype=parameter_dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("scale", "bias"), [(True, False), (False, True)])
def test_weight_or_bias_alone(target: Target, scale: bool, bias: bool, training: bool) -> None:
    values = inputs.normal((6, 3, 5, 4)) + 2
    options: dict[str, Any] = {"training": training, "with_residual": True, "relu": True, "scale": scale, "bias": bias}
    # no other than float32's default may stand in
    options["parameter_dtype"] = "float64" if target.has_float64 else "float32"
    for automatic, masked in itertools.product([False, True], repeat=2):
        check(target, values, "float32", masked=masked, automatic=automatic, **options)


@pytest.mark.quick
def test_quick(target: Target) -> None:
    check(target, inputs.normal((4, 3, 5)), "float32", with_residual=True, relu=True)


def test_pullback_keeps_the_statistics_of_its_own_call(target: Target) -> None:
    rng = np.random.default_rng(2)
    x, dy = (target.array(rng.standard_normal((8, 3)), "float32") for _ in range(2))
    state = anybn.BatchNormState(3)
    _, pullback = anybn.batch_norm_vjp(x, state)
    before = target.numpy(pullback(dy).x)
    anybn.batch_norm(x * 100 + 5, state, training=True)
    assert np.array_equal(target.numpy(pullback(dy).x), before)


def test_masked_nan_reaches_nothing(target: Target) -> None:
    rng = np.random.default_rng(3)
    values = rng.standard_normal((6, 2, 4)).astype(np.float32)
    mask = rng.random((6, 4)) < 0.6
    values[~np.broadcast_to(mask[:, None], values.shape)] = np.nan
    state = anybn.BatchNormState(2)
    y, pullback = anybn.batch_norm_vjp(target.array(values), state, training=True, mask=target.array(mask))
    grads = pullback(target.array(np.full_like(values, 2.0)))
    for result in (y, grads.x, grads.weight, grads.bias, state.running_mean, state.running_var):
        assert np.all(np.isfinite(target.numpy(result)))
    hidden = ~np.broadcast_to(mask[:, None], values.shape)
    assert np.all(target.numpy(y)[hidden] == 0)
    assert np.all(target.numpy(grads.x)[hidden] == 0)
