"""The kernels of batchnorm.cu with a mask that all channels share, against long double arithmetic; by the simulator."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from cuda_cpu.simulator import CONSUMER, H200, SCHEDULES, Guarded, gpu, is_masked, needs_compiler

from anybn.conformance import inputs, oracle
from anybn.kernels.cuda import launch as _cuda
from anybn.kernels.cuda.plan import TYPES, Device, Launch

needs_compiler()
pytest.importorskip("ml_dtypes")

Shape = tuple[int, int, int]
DTYPES = tuple(TYPES)
#: (n, channels, length) in memory: planes with vectors of each width, planes that are taken as rows, tiny ones, rows.
SHAPES: tuple[Shape, ...] = (
    (4, 3, 49),
    (3, 5, 64),
    (2, 2, 1156),
    (1, 3, 97),
    (5, 1, 31),
    (2, 37, 16),
    (19, 32, 49),
    (12, 70, 2),
    (9, 44, 6),
    (9, 7, 1),
    (64, 68, 1),
    (301, 3, 1),
)
DEVICES: dict[str, Device] = {
    "fast float64": H200,
    "slow float64": CONSUMER,
    "few blocks": Device(multiprocessors=1, shared_bytes=48 * 1024, capability=(8, 0)),
}


def problem(
    shape: Shape, dtype: str, row: str = "mean 1e3, std 1", share: float = 0.6, hidden: float = math.nan
) -> dict[str, np.ndarray]:
    """x, dy and a residual, all of them hidden, with this value, where the mask is not True; weight and bias."""
    rng = np.random.default_rng(0)
    shown = rng.random((shape[0], shape[2])) < share
    shown.flat[0] = False  # the first value of a channel is not to be used
    shown.flat[-2:] = share > 0
    arrays = {"x": inputs.ROWS[row](rng.standard_normal(shape))}
    arrays |= {name: rng.standard_normal(shape) for name in ("dy", "residual")}
    everywhere = np.broadcast_to(shown[:, None], shape)
    with np.errstate(over="ignore"):
        like_x = {name: inputs.cast(np.where(everywhere, a, hidden), dtype) for name, a in arrays.items()}
    weight, bias = rng.uniform(0.5, 2, shape[1]), rng.standard_normal(shape[1])
    return like_x | {"shown": shown, "weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}


def run(
    op: str,
    device: Device,
    given: dict[str, Any],
    made: dict[str, Any],
    *,
    schedule: int = 0,
    offset: int = 0,
    launched: list[Launch] | None = None,
    **settings: Any,
) -> dict[str, np.ndarray]:
    """The arrays that were made: like x, or from a dtype per channel. Arrays like x are ``offset`` values off."""
    x, shown = given["x"], given["shown"]
    outputs = {name: np.full(x.shape, np.nan, x.dtype) for name, dtype in made.items() if dtype is None}
    outputs |= {name: np.full(x.shape[1], np.nan, dtype) for name, dtype in made.items() if dtype is not None}
    counted = {"shown_count": np.array([shown.sum()]), "first_shown": np.array([shown.argmax()])}
    arrays = given | outputs | (counted if op != "evaluate" and settings.get("training", True) else {})
    inside = {name: Guarded(a, offset * a.itemsize) for name, a in arrays.items()}
    pointers = {name: a.pointer for name, a in inside.items()}
    _cuda.call(op, gpu(device, schedule, launched), x.shape, x.dtype.name, **pointers, **settings)
    for name, a in inside.items():
        a.check()
        assert name in outputs or a.array.tobytes() == arrays[name].tobytes(), f"{op} wrote to {name}"
    return {name: inside[name].array.copy() for name in made}


def statistics_of(dtype: str) -> dict[str, str]:
    return dict.fromkeys(["mean", "var", "m2", *(["shift"] if dtype == "float64" else [])], "float64")


def zeroed(a: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """What the oracle is given: it multiplies what is hidden by 0."""
    return np.where(shown[:, None], a, np.zeros((), a.dtype))


def bar(dtype: str) -> float:
    return {"float32": 0.6, "float64": 2.0}.get(dtype, 0.51)


def check(device: Device, shape: Shape, dtype: str, row: str, **how: Any) -> list[bytes]:
    """Training and its backward pass, with a relu and a residual; the bits of all that came out."""
    problem_of = {name: how.pop(name) for name in ("share", "hidden") if name in how}
    data = problem(shape, dtype, row, **problem_of)
    shown, hidden = data["shown"], np.broadcast_to(~data["shown"][:, None], shape)
    x, dy, residual = (zeroed(data[name], shown) for name in ("x", "dy", "residual"))
    launched: list[Launch] = []
    given = {name: data[name] for name in ("x", "residual", "weight", "bias", "shown")}
    made = {"y": None, **statistics_of(dtype)}
    found = run("train", device, given, made, eps=1e-5, relu=True, launched=launched, **how)
    statistics = oracle.statistics(x, mask=shown)
    options = {"weight": data["weight"], "mask": shown}
    expected = oracle.normalize(x, statistics.mean, statistics.var(), **options, bias=data["bias"], residual=residual)
    # float64 has nothing wider to be computed in: what is added up to y is what it is judged by, as in conformance.
    size = 1 if dtype != "float64" else 5 * data["weight"].max() + np.abs(data["bias"]).max()
    assert oracle.error(found["y"], np.maximum(expected, 0), dtype, size) <= bar(dtype)
    assert np.all(found["y"][hidden] == 0)
    unit = dtype if dtype == "float64" else "float32"
    varies = statistics.m2 > 0  # where there are few values of 16 bits, they may all be the same
    for name, expected in (("m2", statistics.m2), ("var", statistics.var())):
        assert oracle.error(found[name][varies] / expected[varies], np.ones(varies.sum()), unit) <= 2
        assert np.all(found[name][~varies] == 0)
    mean = found["mean"].astype(oracle.LONG) + found.get("shift", 0)
    assert oracle.error(mean, statistics.mean, unit, size=np.sqrt(statistics.var() + 1e-30)) <= 2

    active = found["y"] > 0
    kept = {name: found[name] for name in ("mean", "var", "shift") if name in found}
    given = {name: data[name] for name in ("x", "dy", "weight", "shown")} | kept | {"activated": found["y"]}
    made = {"y": None, "dresidual": None, "dweight": "float32", "dbias": "float32"}
    grads = run("backward", device, given, made, eps=1e-5, training=True, launched=launched, **how)
    expected_grads = oracle.gradients(
        dy, x, statistics.mean, statistics.var(), count=statistics.count, active=active, **options
    )
    size = 1 if dtype != "float64" else np.maximum(1, expected_grads.x_size * np.abs(dy).max())
    assert oracle.error(grads["y"], expected_grads.x, dtype, size) <= bar(dtype)
    assert np.all(grads["y"][hidden] == 0)
    assert oracle.error(grads["dweight"], expected_grads.weight, "float32") <= 2
    assert oracle.error(grads["dbias"], expected_grads.bias, "float32") <= 2
    assert np.array_equal(grads["dresidual"], np.where(active, dy, np.zeros((), dy.dtype)))
    two_passes = ["sums", "finish_train", "evaluate", "gradient_sums", "finish_backward", "gradients"]
    assert [one.kernel.partition("<")[0] for one in launched] == two_passes
    assert all(is_masked(one.kernel) for one in launched)
    return [a.tobytes() for a in (*found.values(), *grads.values())]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_training_and_backward(dtype: str, shape: Shape, device: str) -> None:
    check(DEVICES[device], shape, dtype, "mean 1e3, std 1")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", [row for row in inputs.ROWS if row != inputs.OVERFLOWING])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_hard_data(dtype: str, row: str, device: str) -> None:
    for shape in ((4, 3, 784), (32, 4, 49), (2500, 4, 1)):
        check(DEVICES[device], shape, dtype, row)


@pytest.mark.parametrize("hidden", [math.inf, -math.inf, 1e30, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whatever_is_hidden_changes_no_bit(dtype: str, hidden: float) -> None:
    for device, shape in itertools.product(DEVICES.values(), ((3, 5, 64), (19, 32, 49), (64, 68, 1))):
        bits = (check(device, shape, dtype, "N(0, 1)", hidden=value) for value in (hidden, math.nan))
        assert next(bits) == next(bits)


@pytest.mark.parametrize("share", [0.02, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_and_nearly_all(dtype: str, share: float) -> None:
    for device, shape in itertools.product(DEVICES.values(), ((3, 5, 64), (19, 32, 49), (301, 3, 1))):
        check(device, shape, dtype, "mean 1e3, std 1", share=share)


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_pointers(dtype: str, offset: int) -> None:
    for device, shape in itertools.product(DEVICES.values(), ((3, 5, 64), (19, 32, 49), (64, 68, 1))):
        check(device, shape, dtype, "N(0, 1)", offset=offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_under_every_schedule(dtype: str) -> None:
    for device, shape in itertools.product(DEVICES.values(), ((40, 5, 64), (19, 32, 49), (65, 33, 1))):
        found = [check(device, shape, dtype, "N(0, 1)", schedule=schedule) for schedule in SCHEDULES]
        assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_statistics(dtype: str, device: str) -> None:
    """Evaluation; and the backward pass through it, with parameters and without."""
    for shape in SHAPES:
        data, rng = problem(shape, dtype), np.random.default_rng(5)
        shown, hidden = data["shown"], np.broadcast_to(~data["shown"][:, None], shape)
        known = {"mean": rng.normal(1e3, 1, shape[1]), "var": rng.uniform(0.5, 2, shape[1])}
        given = {name: data[name] for name in ("x", "residual", "weight", "bias", "shown")} | known
        y = run("evaluate", DEVICES[device], given, {"y": None}, eps=1e-3)["y"]
        x, dy, residual = (zeroed(data[name], shown) for name in ("x", "dy", "residual"))
        options = {"weight": data["weight"], "eps": 1e-3, "mask": shown}
        expected = oracle.normalize(x, *known.values(), **options, bias=data["bias"], residual=residual)
        size = 1 if dtype != "float64" else 5 * data["weight"].max() + np.abs(data["bias"]).max()
        assert oracle.error(y, expected, dtype, size) <= bar(dtype)
        assert np.all(y[hidden] == 0)

        expected_grads = oracle.gradients(dy, x, *known.values(), count=None, **options)
        given = {name: data[name] for name in ("x", "dy", "weight", "shown")} | known
        for parameters in ({}, {"dweight": "float32", "dbias": "float32"}):
            grads = run("backward", DEVICES[device], given, {"y": None, **parameters}, eps=1e-3, training=False)
            size = 1 if dtype != "float64" else np.maximum(1, expected_grads.x_size * np.abs(dy).max())
            assert oracle.error(grads["y"], expected_grads.x, dtype, size) <= bar(dtype)
            assert np.all(grads["y"][hidden] == 0)
        assert oracle.error(grads["dweight"], expected_grads.weight, "float32") <= 2
        assert oracle.error(grads["dbias"], expected_grads.bias, "float32") <= 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_shown(dtype: str, device: str) -> None:
    """Mean and variance are 0, as is all of y; running statistics stay, since nothing is known of theirs."""
    for shape in SHAPES:
        data = problem(shape, dtype, share=0)
        running = {"running_mean": np.arange(shape[1]) + 1.0, "running_var": np.arange(shape[1]) + 2.0}
        made = {"y": None, **statistics_of(dtype), "new_running_mean": "float64", "new_running_var": "float64"}
        given = {name: data[name] for name in ("x", "bias", "shown")} | running
        found = run("train", DEVICES[device], given, made, eps=1e-5, momentum=0.1, ddof=1)
        assert np.all([found[name] == 0 for name in statistics_of(dtype)])
        assert np.all(found["y"] == 0)
        assert np.array_equal(found["new_running_mean"], running["running_mean"])
        assert np.array_equal(found["new_running_var"], running["running_var"])
        given = {name: data[name] for name in ("x", "dy", "shown")} | {name: found[name] for name in ("mean", "var")}
        grads = run(
            "backward", DEVICES[device], given, {"y": None, "dweight": "float32", "dbias": "float32"}, training=1, eps=1
        )
        assert not any(a.any() for a in grads.values())


@pytest.mark.parametrize("device", DEVICES)
def test_running_statistics_count_what_is_shown(device: str) -> None:
    for shape, ddof in itertools.product(((6, 40, 25), (301, 3, 1)), (0, 1)):
        data = problem(shape, "float32")
        old = {"running_mean": np.arange(shape[1]) + 1.0, "running_var": np.arange(shape[1]) + 2.0}
        made = {**statistics_of("float32"), "new_running_mean": "float64", "new_running_var": "float64"}
        given = {name: data[name] for name in ("x", "shown")} | old
        counter = np.array([41])
        settings = {"momentum": 0.3, "ddof": ddof, "counter": counter.ctypes.data}
        found = run("statistics", DEVICES[device], given, made, **settings)
        assert counter.tolist() == [42]
        statistics = oracle.statistics(zeroed(data["x"], data["shown"]), mask=data["shown"])
        mean = oracle.running(old["running_mean"], statistics.mean.origin + statistics.mean.offset, 0.3)
        var = oracle.running(old["running_var"], statistics.var(ddof), 0.3)
        for name, expected in (("mean", mean), ("var", var)):
            assert oracle.error(found[f"new_running_{name}"] / expected, np.ones(shape[1]), "float32") <= 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exact_data_gives_the_bits_of_numpy(dtype: str, device: str) -> None:
    """Half of the positions are shown, in pairs that the data come in."""
    import anybn

    for shape in ((32, 8, 784), (4, 5, 196), (1024, 3, 1)):
        n, channels, length = shape
        half = inputs.exact((n, channels, length // 2) if length > 1 else (n // 2, channels, 1)).astype(dtype)
        x = np.repeat(half, 2, axis=2 if length > 1 else 0)
        shown = np.zeros((n, length), bool)
        shown[(slice(None), slice(None, None, 2)) if length > 1 else slice(None, None, 2)] = True
        everywhere = np.broadcast_to(shown[:, None], shape)
        x[~everywhere] = np.nan
        made = {"y": None, **statistics_of(dtype)}
        found = run("train", DEVICES[device], {"x": x, "shown": shown}, made, eps=1e-5)
        moments = anybn.moments(half)
        assert np.array_equal(found["mean"], moments.mean)
        assert np.array_equal(found["m2"], moments.m2)
        expected = anybn.batch_norm(half, anybn.BatchNormState(channels), training=True)
        assert found["y"][everywhere].tobytes() == expected.reshape(-1).tobytes()


def test_a_shown_nan_stays_in_its_channel() -> None:
    for device, shape in itertools.product(DEVICES.values(), ((4, 3, 64), (200, 6, 1))):
        data = problem(shape, "float32", hidden=0)
        x, shown = data["x"].copy(), data["shown"]
        x[-1, 1, -1] = np.nan
        y = run("train", device, {"x": x, "shown": shown}, {"y": None, **statistics_of("float32")}, eps=1e-5)["y"]
        everywhere = np.broadcast_to(shown, (shape[1], *shown.shape)).swapaxes(0, 1)
        assert np.array_equal(np.isnan(y[:, 1]), everywhere[:, 1])
        assert np.isfinite(np.delete(y, 1, axis=1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(dtype: str) -> None:
    """y may be x or the residual."""
    for device, shape, target in itertools.product(DEVICES.values(), SHAPES, ("x", "residual")):
        data = problem(shape, dtype)
        given = {name: data[name] for name in ("x", "residual", "shown")}
        expected = run("train", device, given, {"y": None, **statistics_of(dtype)}, eps=1e-5)["y"]
        counted = {
            "shown_count": np.array([data["shown"].sum()]),
            "first_shown": np.array([data["shown"].argmax()]),
        }
        rows = {name: np.full(shape[1], np.nan) for name in statistics_of(dtype)}
        inside = {name: Guarded(a) for name, a in (given | counted | rows).items()}
        pointers = {name: a.pointer for name, a in inside.items()}
        _cuda.call("train", gpu(device, 2), shape, dtype, **pointers, y=pointers[target], eps=1e-5)
        assert inside[target].array.tobytes() == expected.tobytes()
