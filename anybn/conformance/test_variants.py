"""Ghost batch norm, batch renormalization and the separate switches, in long double."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import anybn
from anybn import variants
from anybn.conformance import inputs, oracle
from anybn.conformance.targets import Target, bar


def prepared(target: Target, shape: tuple[int, ...] = (12, 3, 5, 4), mean: float = 2.0) -> Any:
    """(state with weights and running statistics, values, dy)."""
    rng = np.random.default_rng(0)
    c = shape[1]
    state = anybn.BatchNormState(c, like=target.array(np.zeros(1, np.float32)))
    state.weight = target.array(rng.uniform(0.5, 2, c).astype(np.float32))
    state.bias = target.array(rng.standard_normal(c).astype(np.float32))
    state.running_mean = target.array((rng.standard_normal(c) + mean).astype(np.float32))
    state.running_var = target.array(rng.uniform(0.5, 2, c).astype(np.float32))
    values, dy = ((inputs.normal(shape, seed=s) * 1.5 + m).astype(np.float32) for s, m in ((1, mean), (2, 0)))
    return state, values, dy


def held(target: Target, state: anybn.BatchNormState) -> dict[str, np.ndarray]:
    return {name: target.numpy(a).astype(oracle.LONG) for name, a in state._arrays.held().items()}


def check(
    target: Target, options: dict[str, Any], *, mean: float = 2.0, masked: bool = False, fused: bool = False
) -> None:
    """Each part as a batch of its own, by the positions that count, and running statistics of the whole batch.

    fused: relu(bn(x) + residual).
    """
    state, values, dy = prepared(target, mean=mean)
    before, limit, axis = held(target, state), bar(target, "float32"), options.get("axis", 1)
    rng = np.random.default_rng(5)
    residual = rng.standard_normal(values.shape).astype(np.float32)
    mask = None
    if masked:
        mask = rng.random((12, 5, 4)) < np.linspace(0.3, 0.9, 12)[:, None, None]  # parts of different counts
        values[~np.broadcast_to(mask[:, None], values.shape)] = np.nan

    def placed(a: np.ndarray) -> Any:
        return target.array(np.ascontiguousarray(np.moveaxis(a, 1, axis)))

    given = {"residual": placed(residual), "activation": "relu"} if fused else {}
    if mask is not None:
        given["mask"] = target.array(mask)
    y, pullback = variants.batch_norm_vjp(placed(values), state, **options, **given)
    grads = pullback(placed(dy))
    y, dx = (np.moveaxis(target.numpy(a), axis, 1) for a in (y, grads.x))
    dweight: Any = 0
    dbias: Any = 0
    size: Any = 0, 0
    step = options.get("virtual_batch_size") or 12
    for i in range(0, 12, step):
        of = slice(i, i + step)
        part, keep = values[of], None if mask is None else mask[of]
        weight, bias = before["weight"], before["bias"]
        r: Any = 1
        d: Any = 0
        center: Any = before["running_mean"]
        var, count = before["running_var"], None
        if options.get("statistics") != "running":
            s = oracle.statistics(part, mask=keep)
            center, var, count = s.mean, s.var(), s.count
        if "renorm" in options:
            (r_max, d_max), root = options["renorm"], np.sqrt(before["running_var"] + oracle.LONG(1e-5))
            r = np.clip(np.sqrt(var + oracle.LONG(1e-5)) / root, 1 / oracle.LONG(r_max), r_max)
            d = np.clip((center.origin + center.offset - before["running_mean"]) / root, -d_max, d_max)
            weight, bias = weight * r, bias + weight * d
        expected = oracle.normalize(
            part, center, var, weight=weight, bias=bias, residual=residual[of] if fused else None, relu=fused, mask=keep
        )
        largest = 1 if target.has_float64 else 8  # the terms of y, without a wider dtype
        assert oracle.error(y[of], expected, "float32", largest) <= limit
        g = oracle.gradients(
            dy[of], part, center, var, count=count, weight=weight, active=expected > 0 if fused else None, mask=keep
        )
        slope = 1 if target.has_float64 else np.maximum(1, g.x_size)
        assert oracle.error(dx[of], g.x, "float32", slope) <= limit
        if fused:
            dresidual = np.moveaxis(target.numpy(grads.residual), axis, 1)
            assert oracle.error(dresidual[of], g.residual, "float32") <= limit
        if options.get("renorm") == (np.inf, np.inf):
            evaluated = oracle.normalize(
                part, before["running_mean"], before["running_var"], weight=before["weight"], bias=before["bias"]
            )
            assert oracle.error(expected, evaluated, "float32") <= 1e-3
        dweight, dbias = dweight + g.weight * r + g.bias * d, dbias + g.bias
        size = size[0] + g.weight_size * r + g.bias_size * np.abs(d), size[1] + g.bias_size
    if target.has_float64:
        size = (1, 1)
    assert oracle.error(target.numpy(grads.weight), dweight, "float32", size[0]) <= limit
    assert oracle.error(target.numpy(grads.bias), dbias, "float32", size[1]) <= limit
    whole, after = oracle.statistics(values, mask=mask), held(target, state)
    expected_var = oracle.running(before["running_var"], whole.var(1), 0.1)
    assert oracle.error(after["running_var"], expected_var, "float32") <= limit
    expected_mean = oracle.running(before["running_mean"], whole.mean.origin + whole.mean.offset, 0.1)
    assert oracle.error(after["running_mean"], expected_mean, "float32") <= limit
    assert state.num_batches_tracked == 1


@pytest.mark.parametrize("mean", [0.0, 1e6])
@pytest.mark.parametrize("axis", [1, -1, 0])
def test_ghost_batch_norm(target: Target, axis: int, mean: float) -> None:
    check(target, {"virtual_batch_size": 4, "axis": axis}, mean=mean)


@pytest.mark.parametrize("limits", [(1.0, 0.0), (1.2, 0.3), (np.inf, np.inf)])
@pytest.mark.parametrize("virtual", [None, 6])
def test_batch_renormalization(target: Target, limits: tuple[float, float], virtual: int | None) -> None:
    """Without limits, y is what evaluation gives."""
    check(target, {"renorm": limits, "virtual_batch_size": virtual})


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"statistics": "running"},
        {"virtual_batch_size": 4},
        {"renorm": (1.2, 0.3)},
        {"virtual_batch_size": 4, "renorm": (1.2, 0.3), "axis": -1},
    ],
    ids=str,
)
def test_mask_residual_and_activation(target: Target, options: dict[str, Any], masked: bool) -> None:
    check(target, options, masked=masked, fused=True)


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("train_weights", [True, False])
def test_switches(target: Target, statistics: Any, update: bool, train_weights: bool) -> None:
    """y and dx are those of one mode, the running statistics those of the other, the weights' gradients apart."""
    state, values, dy = prepared(target)
    plain, learning = state.copy(), state.copy()
    x = target.array(values)
    y, pullback = variants.batch_norm_vjp(x, state, statistics=statistics, update=update, train_weights=train_weights)
    grads = pullback(target.array(dy))
    expected, reference = anybn.batch_norm_vjp(x, plain, training=statistics == "batch")
    expected_grads = reference(target.array(dy))
    assert np.array_equal(target.numpy(y), target.numpy(expected))
    assert np.array_equal(target.numpy(grads.x), target.numpy(expected_grads.x))
    if train_weights:
        assert np.array_equal(target.numpy(grads.weight), target.numpy(expected_grads.weight))
        assert np.array_equal(target.numpy(grads.bias), target.numpy(expected_grads.bias))
    else:
        assert grads.weight is None
        assert grads.bias is None
    if update:
        anybn.batch_norm(x, learning, training=True)
    assert inputs.state_values(state) == inputs.state_values(learning)


def test_errors_and_empty(target: Target) -> None:
    state, values, _ = prepared(target)
    x, before = target.array(values), inputs.state_values(state)
    for options, error, message in (
        ({"virtual_batch_size": 5}, ValueError, "x has 12 samples, which virtual batches of 5 cannot share evenly"),
        ({"virtual_batch_size": 0}, ValueError, "virtual_batch_size is 0; it must be 1 or more"),
        ({"statistics": "old"}, ValueError, "statistics is 'old'; it must be one of 'batch', 'running'"),
        ({"statistics": "running", "renorm": (2, 1)}, ValueError, "renorm need those of the batch"),
        ({"renorm": (0.5, 1)}, ValueError, "r_max is 0.5; it must be 1 or more"),
        ({"renorm": (2, -1)}, ValueError, "d_max is -1; it must be 0 or more"),
        ({"renorm": "ab"}, TypeError, r"renorm is 'ab'; it must be a pair \(r_max, d_max\)"),
        ({"renorm": 3}, TypeError, r"renorm is 3; it must be a pair \(r_max, d_max\)"),
        ({"update": 1}, TypeError, "update is 1, a int; it must be True or False"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu'; it must be one of None, 'relu'"),
        ({"residual": target.array(values[:1])}, ValueError, "residual has shape"),
        ({"mask": target.array(values > 0)}, ValueError, "x's shape without the channel axis"),
    ):
        with pytest.raises(error, match=message):
            variants.batch_norm(x, state, **options)
    late = target.array(np.arange(12)[:, None, None] > 8)
    if not target.backend.is_traced(late):
        with pytest.raises(ValueError, match="a virtual batch has 0 unmasked values per channel"):
            variants.batch_norm(x, state, mask=late, virtual_batch_size=6)
    with pytest.raises(ValueError, match="virtual batches of 1 have 1 value per channel"):
        variants.batch_norm(target.array(values[:, :, 0, 0].copy()), state, virtual_batch_size=1)
    bare = anybn.BatchNormState(3, track_running_stats=False)
    for options in ({"renorm": (2, 1)}, {"statistics": "running"}):
        with pytest.raises(ValueError, match="the state has track_running_stats=False"):
            variants.batch_norm(x, bare, **options)
    for shape in ((0, 3), (4, 3, 0)):
        empty = target.array(np.zeros(shape, np.float32))
        y, pullback = variants.batch_norm_vjp(empty, state, virtual_batch_size=2, renorm=(2, 1))
        assert target.numpy(y).shape == target.numpy(pullback(empty).x).shape == shape
    assert inputs.state_values(state) == before
