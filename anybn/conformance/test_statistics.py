"""Statistics as data: moments of several axes, with gaps, of two libraries; and the way back from y to x."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs, oracle
from anybn.conformance.targets import Target, bar

SHAPE = (6, 3, 4, 5)


def data(seed: int = 0) -> np.ndarray:
    return (inputs.normal(SHAPE, seed) * 3 + 50).astype(np.float32)


def in_rows(a: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """(positions on these axes, the others)."""
    size = int(np.prod([a.shape[i] for i in axes]))
    return np.moveaxis(a, axes, range(len(axes))).reshape(size, -1)


def check(target: Target, found: anybn.Moments, x: np.ndarray, axes: tuple[int, ...], counts: np.ndarray) -> None:
    """Each position's moments, against those of its own values: rows of different lengths."""
    shape = tuple(x.shape[i] for i in axes)
    assert tuple(found.mean.shape) == tuple(found.m2.shape) == shape
    mean, m2, var = (target.numpy(a).reshape(-1) for a in (found.mean, found.m2, found.var(1)))
    kept = "float64" if target.has_float64 else "float32"
    assert found.mean.dtype == target.backend.dtype(kept)
    limit = bar(target, "float32")
    for c, (row, shown) in enumerate(zip(in_rows(x, axes), in_rows(counts, axes), strict=True)):
        if not shown.any():
            assert (mean[c], m2[c]) == (0, 0)
            continue
        of_row = oracle.statistics(row[shown][:, None])
        assert oracle.error(mean[c : c + 1], of_row.mean, "float32") <= limit
        assert oracle.error(m2[c : c + 1], of_row.m2, "float32") <= limit
        if of_row.count > 1:
            assert oracle.error(var[c : c + 1], of_row.var(1), "float32") <= limit
        else:
            assert np.isnan(var[c])


def count_of(target: Target, found: anybn.Moments) -> np.ndarray:
    return np.asarray(found.count) if isinstance(found.count, int) else target.numpy(found.count)


@pytest.mark.parametrize("axes", [(1, 2), (0, 1), (1, 3), (1, 2, 3)])
def test_several_axes(target: Target, axes: tuple[int, ...]) -> None:
    x = data()
    found = anybn.moments(target.array(x), axis=axes)
    check(target, found, x, axes, np.ones(SHAPE, bool))
    assert int(found.count) == x.size / np.prod([x.shape[i] for i in axes])

    others = tuple(size for i, size in enumerate(SHAPE) if i not in axes)
    mask = np.random.default_rng(1).random(others) < 0.7
    masked = anybn.moments(target.array(x), axis=axes, mask=target.array(mask))
    everywhere = np.broadcast_to(np.expand_dims(mask, axes), SHAPE)
    check(target, masked, x, axes, everywhere)
    assert int(masked.count) == mask.sum()


@pytest.mark.parametrize("axes", [(1,), (-1,), (1, 3), (1, 2, 3)])
def test_gaps_that_differ_between_channels(target: Target, axes: tuple[int, ...]) -> None:
    """As a mask of x's shape, as values that are not finite, and as both; one channel has none left, another one."""
    x, rng = data(), np.random.default_rng(2)
    kept = tuple(a % 4 for a in axes)
    shown = rng.random(SHAPE) < 0.7
    rows = np.moveaxis(shown, kept[0], 0)
    rows[0] = False
    rows[1] = False
    rows[1].flat[7] = True
    holes = np.where(shown, x, rng.choice([np.nan, np.inf, -np.inf], SHAPE)).astype(np.float32)
    half = shown | (rng.random(SHAPE) < 0.5)
    axis = axes if len(axes) > 1 else axes[0]
    for found in (
        anybn.moments(target.array(x), axis=axis, mask=target.array(shown)),
        anybn.moments(target.array(holes), axis=axis, mask=target.array(shown)),
        anybn.moments(target.array(holes), axis=axis, nonfinite="omit"),
        anybn.moments(target.array(holes), axis=axis, nonfinite="omit", mask=target.array(half)),
    ):
        counted = in_rows(shown, kept).sum(1)
        assert np.array_equal(count_of(target, found).reshape(-1), counted)
        check(target, found, x, kept, shown)

    # Parts with gaps merge into the whole, with their counts.
    first, second = (anybn.moments(target.array(part), nonfinite="omit") for part in (holes[:2], holes[2:]))
    of_channels = np.isfinite(holes)
    check(target, first + second, x, (1,), of_channels)
    assert np.array_equal(count_of(target, first + second), of_channels.sum((0, 2, 3)))


def test_moments_of_two_libraries(target: Target) -> None:
    """In either order; and what comes back from the other library is what went there."""
    x = data()
    here, there = anybn.moments(target.array(x[:2])), anybn.moments(x[2:])
    whole = oracle.statistics(x)
    for both in (here + there, there + here, sum([here, there, anybn.moments(x[:0])], start=anybn.moments(x[:0]))):
        beside = both.to("numpy")
        assert int(both.count) == whole.count
        assert oracle.error(beside.mean, whole.mean, "float32") <= bar(target, "float32")
        assert oracle.error(beside.m2, whole.m2, "float32") <= bar(target, "float32")
        assert oracle.error(beside.std(1), np.sqrt(whole.var(1)), "float32") <= bar(target, "float32")
    place = target.array(np.zeros(1, np.float32))
    back = there.to(place).to("numpy")
    assert target.backend.owns(type(there.to(place).mean))
    if target.has_float64:
        assert all(np.array_equal(getattr(back, name), getattr(there, name)) for name in ("mean", "m2"))
    else:  # in two float32
        shift = 0 if back.shift is None else back.shift
        assert np.abs(back.mean + shift - there.mean).max() <= 2.0**-44 * np.abs(there.mean).max()


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"scale": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_denormalize(target: Target, dtype: str, options: dict[str, bool]) -> None:
    """y is what rounded; to y's own rounding, which the slope magnifies, x comes back."""
    target.require(dtype)
    rng = np.random.default_rng(3)
    values = inputs.cast(rng.standard_normal(SHAPE) * 3 + 50, dtype)
    state = anybn.BatchNormState(3, **options)
    if state.weight is not None:
        state.weight = rng.uniform(0.5, 2, 3).astype(np.float32)
    if state.bias is not None:
        state.bias = rng.standard_normal(3).astype(np.float32)
    anybn.recalibrate(state, [values.astype(np.float64)])
    before = inputs.state_values(state)
    y = anybn.batch_norm(values, state)
    found = target.numpy(anybn.denormalize(target.array(y), state))
    assert inputs.state_values(state) == before
    assert found.dtype == values.dtype

    kept = np.float64 if target.has_float64 else np.float32
    mean, var = (np.asarray(a).astype(kept) for a in (state.running_mean, state.running_var))
    std = np.sqrt(oracle.along(var, y, 1) + oracle.LONG(1e-5))
    slope = std if state.weight is None else std / oracle.along(state.weight, y, 1)
    bias = 0 if state.bias is None else oracle.along(state.bias, y, 1)
    exact = (y.astype(oracle.LONG) - bias) * slope + oracle.along(mean, y, 1)
    assert oracle.error(found, exact, dtype) <= bar(target, dtype)
    unit = oracle.EPS[dtype]
    room = unit * (np.abs(exact) + np.abs(y.astype(oracle.LONG)) * slope) + (0 if target.has_float64 else 1e-5)
    assert np.all(np.abs(found.astype(oracle.LONG) - values.astype(oracle.LONG)) <= room)


def test_errors(target: Target) -> None:
    x, state = target.array(data()), anybn.BatchNormState(3)
    m = anybn.moments(x)
    calls: tuple[tuple[Any, type[Exception], str], ...] = (
        (
            lambda: anybn.moments(x, axis=(2, 1)),
            ValueError,
            r"axis is \(2, 1\); give one or more axes of x, in increasing",
        ),
        (lambda: anybn.moments(x, axis=(1, -3)), ValueError, r"axis is \(1, -3\)"),
        (lambda: anybn.moments(x, axis=()), ValueError, r"axis is \(\); give one or more"),
        (lambda: anybn.moments(x, axis=(1, 4)), ValueError, r"axis is 4 but x has shape"),
        (lambda: anybn.moments(x, axis=(1, "a")), TypeError, r"axis is 'a', a str"),  # type: ignore[arg-type]
        (
            lambda: anybn.moments(x, nonfinite="skip"),  # type: ignore[arg-type]
            ValueError,
            "nonfinite is 'skip'; it must be one of 'propagate', 'omit'",
        ),
        (
            lambda: anybn.moments(x, mask=target.array(np.ones((6, 2, 4, 5), bool))),
            ValueError,
            r"mask has shape \(6, 2, 4, 5\)",
        ),
        (lambda: m + anybn.moments(x, axis=2), ValueError, "other has 4 channels, these moments have 3"),
        (lambda: anybn.denormalize(x, m), TypeError, "state is a Moments"),  # type: ignore[arg-type]
        (
            lambda: anybn.denormalize(x, anybn.BatchNormState(2)),
            ValueError,
            "y has 3 channels on axis 1 but the state has 2",
        ),
        (
            lambda: anybn.denormalize(x, anybn.BatchNormState(3, track_running_stats=False)),
            ValueError,
            "there are no statistics",
        ),
    )
    for call, error, message in calls:
        with pytest.raises(error, match=message):
            call()
    state.weight = np.array([1, 0, 1], np.float32)
    if not target.backend.is_traced(x):
        with pytest.raises(ValueError, match=r"weight is 0 in 1 channels \(1\): their y is bias"):
            anybn.denormalize(x, state)
