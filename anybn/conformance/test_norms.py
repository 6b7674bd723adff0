"""Group, layer, instance and RMS norm and their gradients, in long double, on the inputs that break batch norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from anybn import norms
from anybn.conformance import inputs, oracle
from anybn.conformance.targets import Target, bar

#: name -> (the call, the axes to normalize over after splitting the channels, the axes of weight, whether centered)
Norm = tuple[Callable[..., Any], Callable[..., Any], tuple[int, ...], bool]
NORMS: dict[str, Norm] = {
    "group": (
        lambda *a: norms.group_norm(a[0], 4, *a[1:]),
        lambda *a: norms.group_norm_vjp(a[0], 4, *a[1:]),
        (1,),
        True,
    ),
    "instance": (norms.instance_norm, norms.instance_norm_vjp, (1,), True),
    "layer": (norms.layer_norm, norms.layer_norm_vjp, (-1,), True),
    "layer, two axes": (
        lambda *a: norms.layer_norm(*a, axes=(1, -1)),
        lambda *a: norms.layer_norm_vjp(*a, axes=(1, -1)),
        (1, -1),
        True,
    ),
    "rms": (lambda x, w, b: norms.rms_norm(x, w), lambda x, w, b: norms.rms_norm_vjp(x, w), (-1,), False),
}


def rows_of(name: str, x: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """(x as rows that are normalized by themselves, the way back)."""
    n, c, h, w = x.shape
    if name == "group":
        return x.reshape(n * 4, -1), lambda rows: rows.reshape(x.shape)
    if name == "instance":
        return x.reshape(n * c, -1), lambda rows: rows.reshape(x.shape)
    if name == "layer, two axes":
        moved = np.moveaxis(x, 2, 1)
        return moved.reshape(n * h, -1), lambda rows: np.moveaxis(rows.reshape(n, h, c, w), 1, 2)
    return x.reshape(-1, w), lambda rows: rows.reshape(x.shape)


def check(target: Target, name: str, values: np.ndarray, dtype: str) -> None:
    call, vjp, axes, centered = NORMS[name]
    rng = np.random.default_rng(1)
    values = inputs.cast(values, dtype)
    dy = inputs.cast(rng.standard_normal(values.shape), dtype)
    shape = tuple(values.shape[a] for a in axes)
    along = [size if i in axes or i - values.ndim in axes else 1 for i, size in enumerate(values.shape)]
    weight, bias = (inputs.cast(a, "float32") for a in (rng.uniform(0.5, 2, shape), rng.standard_normal(shape)))
    w, b = weight.astype(oracle.LONG).reshape(along), bias.astype(oracle.LONG).reshape(along)

    # Rows are the channels of the oracle's batch norm.
    rows, back = rows_of(name, values)
    w_rows, dy_rows = (rows_of(name, np.broadcast_to(a, values.shape))[0] for a in (w, dy))
    if centered:
        statistics = oracle.statistics(rows, axis=0)
        of: dict[str, Any] = {"mean": statistics.mean, "var": statistics.var(), "axis": 0}
        xhat_rows = oracle.normalize(rows, **of)
        expected = oracle.gradients(dy_rows * w_rows, rows, **of, count=rows.shape[1])
        dx_rows, slope = expected.x, expected.x_size  # 1 / sqrt(var + eps)
    else:
        mean_square = (rows.astype(oracle.LONG) ** 2).mean(1, keepdims=True)
        slope = 1 / np.sqrt(mean_square + oracle.LONG(1e-5)) * np.ones_like(rows)
        xhat_rows = rows * slope
        g = dy_rows * w_rows
        dx_rows = slope * (g - xhat_rows * (g * xhat_rows).mean(1, keepdims=True))
    xhat, dx = back(xhat_rows), back(dx_rows)
    y = xhat * w + (b if centered else 0)
    reduced = tuple(i for i, size in enumerate(along) if size == 1)
    terms = {"weight": dy * xhat, "bias": dy.astype(oracle.LONG)}

    x, dy_there = target.array(values), target.array(dy)
    parameters = target.array(weight), target.array(bias)
    limit = bar(target, dtype)
    # Judged as in test_gradients: by its own size where the arithmetic is wider than dtype, else by that of what was
    # subtracted to get it: 1 / sqrt(var + eps) times weight * dy, which is rounded before batch norm's gradient.
    wide = target.has_float64 and dtype != "float64"
    largest = 1 if wide else np.abs(weight).max() * max(1.0, float(np.abs(xhat).max())) + np.abs(bias).max()
    size: Any = 1 if wide else np.maximum(1, back(slope * np.abs(w_rows * dy_rows).max(1, keepdims=True)))
    assert oracle.error(target.numpy(call(x, *parameters)), y, dtype, largest) <= limit
    result, pullback = vjp(x, *parameters)
    assert result.dtype == x.dtype
    assert oracle.error(target.numpy(result), y, dtype, largest) <= limit
    grads = pullback(dy_there)
    assert grads.x.dtype == x.dtype
    assert oracle.error(target.numpy(grads.x), dx, dtype, size) <= limit
    for which, gradient in (("weight", grads.weight), ("bias", grads.bias)):
        if which == "bias" and not centered:
            assert gradient is None
            continue
        total = terms[which].sum(reduced).reshape(shape)
        terms_size = 1 if target.has_float64 else np.abs(terms[which]).sum(reduced).reshape(shape)
        assert oracle.error(target.numpy(gradient), total, "float32", terms_size) <= bar(target, "float32")
    plain, pullback = vjp(x, None, None)
    assert oracle.error(target.numpy(plain), xhat, dtype) <= limit
    assert pullback(dy_there).weight is None


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("row", [row for row in inputs.ROWS if row != inputs.OVERFLOWING])
def test_float32(target: Target, row: str, name: str) -> None:
    check(target, name, inputs.ROWS[row](inputs.normal((3, 8, 7, 16))), "float32")


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(target: Target, dtype: str, name: str) -> None:
    target.require(dtype)
    check(target, name, inputs.normal((3, 8, 7, 16)) + (0 if dtype == "bfloat16" else 100), dtype)


def test_channels_last_and_a_batch_of_one(target: Target) -> None:
    values = (inputs.normal((1, 6, 5, 3)) + 10).astype(np.float32)
    weight, bias = (inputs.normal((6,), seed=s).astype(np.float32) for s in (1, 2))
    parameters = target.array(weight), target.array(bias)
    first = target.numpy(norms.group_norm(target.array(values), 3, *parameters))
    last = norms.group_norm(target.array(np.moveaxis(values, 1, -1)), 3, *parameters, axis=-1)
    assert oracle.error(np.moveaxis(target.numpy(last), -1, 1), first, "float32", 4) <= bar(target, "float32")


def test_empty(target: Target) -> None:
    x = target.array(np.zeros((0, 4, 3), np.float32))
    weight = target.array(np.ones(4, np.float32))
    y, pullback = norms.group_norm_vjp(x, 2, weight, weight)
    grads = pullback(x)
    assert target.numpy(y).shape == target.numpy(grads.x).shape == (0, 4, 3)
    assert np.array_equal(target.numpy(grads.weight), np.zeros(4))
    assert target.numpy(norms.layer_norm(x)).shape == (0, 4, 3)


def test_errors(target: Target) -> None:
    x, three = target.array(np.ones((2, 4, 3), np.float32)), target.array(np.ones(3, np.float32))
    calls: tuple[tuple[Callable[[], Any], type[Exception], str], ...] = (
        (lambda: norms.group_norm(x, 3), ValueError, "x has 4 channels on axis 1, which 3 groups cannot share evenly"),
        (lambda: norms.group_norm(x, 0), ValueError, "num_groups is 0; it must be 1 or more"),
        (
            lambda: norms.group_norm(x, 2, three),
            ValueError,
            r"weight has shape \(3,\) but x has \(2, 4, 3\): .* \(4,\)",
        ),
        (lambda: norms.layer_norm(x, axes=(2, 1)), ValueError, r"axes is \(2, 1\) but x has shape \(2, 4, 3\)"),
        (lambda: norms.layer_norm(x, axes=3), ValueError, "axes is 3 but x has shape"),
        (lambda: norms.layer_norm(x, axes="x"), TypeError, "axes is 'x', a str; it must be an int or a"),  # type: ignore[arg-type]
        (lambda: norms.layer_norm(x, eps=0.0), ValueError, r"eps is 0\.0; it must be positive"),
        (lambda: norms.instance_norm(x[:, :, :1]), ValueError, r"needs more than 1 value .* got shape \(2, 4, 1\)"),
        (lambda: norms.rms_norm(target.array(np.ones((2, 3), np.int32))), TypeError, "x has dtype int32: cast to"),
        (lambda: norms.rms_norm(x, [1.0, 1.0, 1.0]), TypeError, "weight is a builtins.list but x is a"),
        (lambda: norms.group_norm_vjp(x, 2)[1](three), ValueError, r"dy has shape \(3,\) but x has \(2, 4, 3\)"),
    )
    for call, error, message in calls:
        with pytest.raises(error, match=message):
            call()
