"""Every kernel of batchnorm.cu, launched as planned, against long double arithmetic; run on the CPU by a simulator."""

from __future__ import annotations

import itertools
import math
import mmap
import sys
from typing import Any

import numpy as np
import pytest
from cuda_cpu.simulator import CONSUMER, H200, SCHEDULES, Grouped, Guarded, Module, gpu, module, needs_compiler

from anybn.conformance import inputs, oracle
from anybn.kernels.cuda import launch as _cuda
from anybn.kernels.cuda.plan import CLUSTERS, TYPES, Device, Launch, kernels, plan

needs_compiler()
pytest.importorskip("ml_dtypes")

Shape = tuple[int, int, int]
DTYPES = tuple(TYPES)
#: (n, channels, length) in memory.
SHAPES: tuple[Shape, ...] = (
    (4, 3, 49),  # 7x7: no vectors of any width
    (3, 5, 64),
    (2, 2, 1156),  # 34x34: vectors of 4 and not of 8
    (1, 3, 97),
    (5, 1, 31),
    (2, 1023, 2),
    (2, 37, 16),  # tiny channels, several of which a block takes
    (3, 300, 4),
    (19, 32, 49),  # planes that are taken as rows
    (9, 44, 6),
    (12, 70, 2),
    (9, 7, 1),  # rows
    (64, 68, 1),
    (301, 3, 1),
    (2, 1023, 1),
    (2, 1, 1),
)
#: With work for one block of a cluster: n grows with the cluster.
LARGE: tuple[Shape, ...] = ((1, 1, 8192), (1, 1, 8196), (1, 1, 4099), (131, 68, 1), (131, 33, 1))
DEVICES = {
    "one launch": H200,
    "without clusters": CONSUMER,
    "half kept": Device(multiprocessors=1, shared_bytes=10 * 1024, capability=(9, 0), cooperative=False),
    "two passes": Device(multiprocessors=4, shared_bytes=1, capability=(8, 0)),
    "two passes, slow float64": Device(multiprocessors=4, shared_bytes=1, capability=(8, 6)),
}


def bar(dtype: str) -> float:
    return 0.51 if dtype in ("float16", "bfloat16") else 2.0


class Run:
    """One operation, on guarded arrays that are ``offset`` values off alignment.

    ``exact`` as it is for channels like these of which there are many, although there are few.
    """

    def __init__(self, device: Device = H200, schedule: int = 0, offset: int = 0, exact: int | None = None):
        self.device, self.schedule, self.offset, self.exact = device, schedule, offset, exact
        self.launched: list[Launch] = []
        self.arrays: dict[str, Guarded] = {}

    def __call__(self, op: str, like: np.ndarray, given: dict[str, Any], made: dict[str, Any], **settings: Any) -> Any:
        """The arrays that were made, from dtypes for arrays per channel, or None for one like x."""
        _, channels, _ = like.shape
        outputs = {}
        for name, dtype in made.items():
            shape, dtype = (like.shape, like.dtype) if dtype is None else ((channels,), np.dtype(dtype))
            outputs[name] = np.full(shape, np.nan, dtype)
        inside = {name: Guarded(a, self.offset * a.itemsize) for name, a in (given | outputs).items() if a is not None}
        before = {name: inside[name].array.tobytes() for name in inside if name in given}
        running = gpu(self.device, self.schedule, self.launched)
        pointers = {name: a.pointer for name, a in inside.items()}
        exact = like.size // channels <= _cuda.FEW_IN_A_CHANNEL if self.exact is None else self.exact
        _cuda.call(op, running, like.shape, like.dtype.name, exact=exact, **pointers, **settings)
        for name, a in inside.items():
            a.check()
            assert name not in given or a.array.tobytes() == before[name], f"{op} wrote to {name}"
        return {name: inside[name].array.copy() for name in made}


def statistics_of(dtype: str) -> dict[str, str]:
    return dict.fromkeys(["mean", "var", "m2", *(["shift"] if dtype == "float64" else [])], "float64")


def problem(shape: Shape, dtype: str, row: str = "mean 1e3, std 1", seed: int = 0) -> dict[str, np.ndarray]:
    """x, dy, residual, weight and bias, the last two in float32."""
    rng = np.random.default_rng(seed)
    x = inputs.cast(inputs.ROWS[row](rng.standard_normal(shape)), dtype)
    like_x = (inputs.cast(rng.standard_normal(shape), dtype) for _ in range(2))
    weight, bias = rng.uniform(0.5, 2, shape[1]), rng.standard_normal(shape[1])
    return dict(zip(("x", "dy", "residual"), (x, *like_x), strict=True)) | {
        "weight": weight.astype(np.float32),
        "bias": bias.astype(np.float32),
    }


def check_train(run: Run, shape: Shape, dtype: str, row: str, *, affine: bool, residual: bool, relu: bool) -> Any:
    data = problem(shape, dtype, row)
    x = data["x"]
    chosen = [*(["weight", "bias"] if affine else []), *(["residual"] if residual else [])]
    given = {name: data[name] for name in ("x", *chosen)}
    made = run("train", x, given, {"y": None, **statistics_of(dtype)}, eps=1e-5, relu=relu)

    statistics = oracle.statistics(x)
    options = {name: data[name] for name in chosen}
    expected = oracle.normalize(x, statistics.mean, statistics.var(), relu=relu, **options)
    # float64 has nothing wider to be computed in: what is added up to y is what it is judged by, as in conformance.
    size = 1 if dtype != "float64" or not chosen else 5 * np.abs(data["weight"]).max() + np.abs(data["bias"]).max()
    assert oracle.error(made["y"], expected, dtype, size) <= bar(dtype)
    unit = dtype if dtype == "float64" else "float32"
    ones = np.ones(shape[1])
    if np.all(statistics.m2 > 0):
        assert oracle.error(made["m2"] / statistics.m2, ones, unit) <= 2
        assert oracle.error(made["var"] / statistics.var(), ones, unit) <= 2
    mean = made["mean"].astype(oracle.LONG) + made.get("shift", 0)
    assert oracle.error(mean, statistics.mean, unit, size=np.sqrt(statistics.var() + 1e-30)) <= 2
    return made


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_train(dtype: str, shape: Shape, device: str) -> None:
    for affine, residual, relu in ((False, False, False), (True, True, False), (True, True, True)):
        check_train(Run(DEVICES[device]), shape, dtype, "mean 1e3, std 1", affine=affine, residual=residual, relu=relu)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", inputs.ROWS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_hard_data(dtype: str, row: str, device: str) -> None:
    for shape in ((4, 3, 784), (32, 4, 49), (2500, 4, 1)):
        check_train(Run(DEVICES[device]), shape, dtype, row, affine=False, residual=False, relu=False)


class Clustered(Device):
    """A device that has clusters of one size only: its number of multiprocessors."""

    @property
    def clusters(self) -> tuple[int, ...]:
        return (self.multiprocessors,)


CLUSTERED = {size: Clustered(size, 227 * 1024, (9, 0), cooperative=False) for size in CLUSTERS[1:]}


@pytest.mark.parametrize("cluster", CLUSTERED)
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_clusters(dtype: str, shape: Shape, cluster: int) -> None:
    results = []
    shape = (shape[0] * cluster, *shape[1:])
    for schedule in SCHEDULES:
        run = Run(CLUSTERED[cluster], schedule)
        trained = check_train(run, shape, dtype, "mean 1e3, std 1", affine=True, residual=True, relu=True)
        differentiated = check_backward(run, shape, dtype, "mean 1e3, std 1", training=True, relu=True)
        assert [launch.cluster for launch in run.launched] == [cluster, cluster]
        results.append([a.tobytes() for a in (*trained.values(), *differentiated.values())])
    assert results[0] == results[1] == results[2]


GROUPED = {
    "all is kept": Grouped(multiprocessors=5, shared_bytes=100 * 1024, capability=(8, 0)),
    "some is kept": Grouped(multiprocessors=5, shared_bytes=56 * 1024, capability=(8, 9)),
}
#: With several tiles for a group, the last one of rows not whole, on one device or the other.
FOR_GROUPS: tuple[Shape, ...] = (
    (6, 3, 8192),
    (6, 3, 8196),
    (9, 3, 4099),
    (1501, 172, 1),
    (1501, 53, 1),
    (371, 12, 49),
)


@pytest.mark.parametrize("device", GROUPED)
@pytest.mark.parametrize("shape", FOR_GROUPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups(dtype: str, shape: Shape, device: str) -> None:
    results = []
    for schedule in SCHEDULES:
        run = Run(GROUPED[device], schedule)
        trained = check_train(run, shape, dtype, "mean 1e3, std 1", affine=True, residual=True, relu=True)
        differentiated = check_backward(run, shape, dtype, "mean 1e3, std 1", training=True, relu=True)
        names = [launch.kernel.partition("<")[0] for launch in run.launched]
        groups = [launch for launch in run.launched if launch.cooperative]
        assert "train_group" in names
        assert "backward_group" in names
        assert all(launch.grid[1] > 1 for launch in groups)
        results.append([a.tobytes() for a in (*trained.values(), *differentiated.values())])
    assert results[0] == results[1] == results[2]


def test_groups_that_are_not_resident_take_two_passes() -> None:
    """As the driver reckons, where it has less room than the plan supposes."""
    run = Run(GROUPED["all is kept"])
    x = problem((6, 3, 8192), "float32")["x"]
    (needed,) = (
        math.prod(one.grid) for one in plan("train", x.shape, "float32", run.device).launches if one.cooperative
    )
    two_passes, in_a_group = ["sums", "finish_train", "evaluate"], ["clear_barriers", "train_group"]
    for room, kernels_run in ((needed - 1, two_passes), (needed, in_a_group)):
        launched: list[Launch] = []
        device = gpu(run.device, launched=launched)._replace(resident=lambda launch, room=room: room)
        inside = {name: Guarded(a) for name, a in {"x": x, "y": np.full_like(x, np.nan)}.items()}
        inside |= {name: Guarded(np.full(3, np.nan)) for name in statistics_of("float32")}
        pointers = {name: a.pointer for name, a in inside.items()}
        _cuda.call("train", device, x.shape, "float32", **pointers, eps=1e-5)
        assert [launch.kernel.partition("<")[0] for launch in launched] == kernels_run
        statistics = oracle.statistics(x)
        expected = oracle.normalize(x, statistics.mean, statistics.var())
        assert oracle.error(inside["y"].array, expected, "float32") <= 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kernel_has_run(dtype: str) -> None:
    """What is planned for these shapes and devices is all there is."""
    small = itertools.product(SHAPES, DEVICES.values())
    large = (((n * size, *rest), device) for (n, *rest), (size, device) in itertools.product(LARGE, CLUSTERED.items()))
    groups = itertools.product(FOR_GROUPS, GROUPED.values())
    planned = [
        launch.kernel
        for shape, device in (*small, *large, *groups)
        for op, masked in itertools.product(("train", "backward", "evaluate", "commit"), (False, True))
        for launch in plan(op, shape, dtype, device, masked=masked).launches
    ]
    assert set(planned) == set(kernels(dtype))


@pytest.mark.parametrize("shape", [(1_000_000, 1, 1), (1, 1, 999_983)], ids=str)
def test_a_million_values_in_one_channel(shape: Shape) -> None:
    check_train(Run(), shape, "float32", "mean 1e3, std 1", affine=False, residual=False, relu=False)


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_pointers(dtype: str, offset: int) -> None:
    for shape, device in itertools.product(((3, 5, 64), (64, 68, 1)), DEVICES.values()):
        check_train(Run(device, offset=offset), shape, dtype, "N(0, 1)", affine=True, residual=True, relu=True)
        check_backward(Run(device, offset=offset), shape, dtype, "N(0, 1)", training=True, relu=True)


def check_backward(run: Run, shape: Shape, dtype: str, row: str, *, training: bool, relu: bool) -> Any:
    data = problem(shape, dtype, row)
    x, dy, weight = data["x"], data["dy"], data["weight"]
    statistics = oracle.statistics(x)
    mean = (statistics.mean.origin + statistics.mean.offset).astype(np.float64)
    shift = (statistics.mean.origin - mean + statistics.mean.offset).astype(np.float64)
    given = {"x": x, "dy": dy, "weight": weight, "mean": mean, "var": statistics.var().astype(np.float64)}
    reference: Any = mean
    if dtype == "float64":
        given["shift"], reference = shift, statistics.mean
    active = np.random.default_rng(3).random(shape) < 0.6 if relu else None
    if active is not None:
        given["active"] = active
    made = {"y": None, "dweight": "float32", "dbias": "float32"}
    if relu:
        made["dresidual"] = None
    found = run("backward", x, given, made, eps=1e-5, training=training)

    expected = oracle.gradients(
        dy, x, reference, given["var"], count=statistics.count if training else None, weight=weight, active=active
    )
    # Again, float64 is judged by what is subtracted to get dx: dy, its mean, and xhat times the mean of dy * xhat.
    size = 1 if dtype != "float64" else np.maximum(1, expected.x_size * np.abs(dy).max())
    assert oracle.error(found["y"], expected.x, dtype, size) <= bar(dtype)
    assert oracle.error(found["dweight"], expected.weight, "float32") <= 2
    assert oracle.error(found["dbias"], expected.bias, "float32") <= 2
    if relu:
        assert np.array_equal(found["dresidual"], np.where(active, dy, np.zeros((), dy.dtype)))
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(dtype: str, shape: Shape, device: str) -> None:
    for training, relu in itertools.product([False, True], repeat=2):
        check_backward(Run(DEVICES[device]), shape, dtype, "mean 1e3, std 1", training=training, relu=relu)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", [row for row in inputs.ROWS if row != inputs.OVERFLOWING])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_backward_on_hard_data(dtype: str, row: str, device: str) -> None:
    for shape in ((4, 3, 784), (32, 4, 49), (2500, 4, 1)):
        check_backward(Run(DEVICES[device]), shape, dtype, row, training=True, relu=False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_evaluate(dtype: str, shape: Shape) -> None:
    data = problem(shape, dtype)
    rng = np.random.default_rng(5)
    mean, var = rng.normal(1e3, 1, shape[1]), rng.uniform(0.5, 2, shape[1])
    for residual, relu in itertools.product([False, True], repeat=2):
        options = {name: data[name] for name in ("weight", "bias", *(["residual"] if residual else []))}
        given = {"x": data["x"], "mean": mean, "var": var, **options}
        y = Run()("evaluate", data["x"], given, {"y": None}, eps=1e-3, relu=relu)["y"]
        expected = oracle.normalize(data["x"], mean, var, eps=1e-3, relu=relu, **options)
        size = 1 if dtype != "float64" else 5 * np.abs(data["weight"]).max() + np.abs(data["bias"]).max()
        assert oracle.error(y, expected, dtype, size) <= bar(dtype)


@pytest.mark.parametrize("parameter", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_dtypes_of_parameters(device: str, parameter: str) -> None:
    """weight and bias, and their gradients, in a dtype of their own."""
    data = problem((8, 3, 49), "float32")
    x, dy = data["x"], data["dy"]
    weight, bias = (inputs.cast(data[name], parameter) for name in ("weight", "bias"))
    statistics = oracle.statistics(x)
    given = {"x": x, "weight": weight, "bias": bias}
    made = {"y": None, **statistics_of("float32")}
    found = Run(DEVICES[device])("train", x, given, made, eps=1e-5, parameter_dtype=parameter)
    expected = oracle.normalize(x, statistics.mean, statistics.var(), weight=weight, bias=bias)
    assert oracle.error(found["y"], expected, "float32") <= 2
    given = {"x": x, "dy": dy, "weight": weight, "mean": found["mean"], "var": found["var"]}
    made = {"y": None, "dweight": weight.dtype, "dbias": weight.dtype}
    grads = Run(DEVICES[device])("backward", x, given, made, eps=1e-5, training=1, parameter_dtype=parameter)
    gradients = oracle.gradients(dy, x, statistics.mean, statistics.var(), count=statistics.count, weight=weight)
    unit = "float32" if parameter == "float64" else parameter  # the sums are of float32 squares of deviations
    assert oracle.error(grads["dweight"], gradients.weight, unit) <= bar(unit)
    assert oracle.error(grads["dbias"], gradients.bias, unit) <= bar(unit)


@pytest.mark.parametrize("op", ["train", "statistics", "commit"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("running_dtype", ["float32", "float64"])
def test_running_statistics_and_counter(running_dtype: str, device: str, op: str) -> None:
    """Committed by the kernel that has the statistics; a channel that is not finite keeps its own."""
    shape = (6, 40, 25)
    x = problem(shape, "float32")["x"].copy()
    x[2, 1, 3], x[4, 7, 0], x[0, 9, 0] = np.nan, np.inf, -np.inf
    old = {"running_mean": np.arange(40, dtype=running_dtype), "running_var": np.full(40, 2, running_dtype)}
    with np.errstate(invalid="ignore"):
        statistics = oracle.statistics(x)
    finite = np.isfinite(statistics.m2.astype(float))
    assert (~finite).sum() == 3
    for propagate, ddof in itertools.product([0, 1], [0, 1]):
        counter = Guarded(np.array([41]))
        given: dict[str, Any] = {"x": x, **old}
        made: dict[str, Any] = {"y": None, "mean": "float64", "var": "float64", "m2": "float64"}
        settings = {"eps": 1e-5, "momentum": 0.3, "ddof": ddof, "propagate": propagate, "counter": counter.pointer}
        if op == "commit":
            given |= Run()("statistics", x, {"x": x}, {name: made[name] for name in ("mean", "var", "m2")})
            made = {}
        if op == "statistics":
            made.pop("y")
        made |= {"new_running_mean": running_dtype, "new_running_var": running_dtype}
        found = Run(DEVICES[device])(op, x, given, made, **settings, running_dtype=running_dtype)
        counter.check()
        assert counter.array.tolist() == [42]
        mean = oracle.running(old["running_mean"], statistics.mean.origin + statistics.mean.offset, 0.3)
        var = oracle.running(old["running_var"], statistics.var(ddof), 0.3)
        for name, expected in (("mean", mean), ("var", var)):
            new = found[f"new_running_{name}"]
            assert oracle.error(new[finite] / expected[finite], np.ones(finite.sum()), "float32") <= 2
            if propagate:
                assert not np.isfinite(new[~finite]).any()
            else:
                assert np.array_equal(new[~finite], old[f"running_{name}"][~finite])


def test_cumulative_average() -> None:
    """momentum=None: 1 / (counter + 1), read from the device, so that a captured graph goes on counting."""
    x = problem((50, 70, 1), "float64")["x"]
    statistics = Run()("statistics", x, {"x": x}, statistics_of("float64"))
    counter = Guarded(np.array([3]))
    given = {**statistics, "running_mean": np.full(70, 8.0), "running_var": np.full(70, 4.0)}
    made = {"new_running_mean": "float64", "new_running_var": "float64"}
    found = Run()("commit", x, given, made, cumulative=1, ddof=1, counter=counter.pointer)
    expected = oracle.statistics(x)
    assert counter.array.tolist() == [4]
    mean = oracle.running(given["running_mean"], expected.mean.origin + expected.mean.offset, 0.25)
    assert oracle.error(found["new_running_mean"], mean, "float64") <= 2
    assert (
        oracle.error(found["new_running_var"], oracle.running(given["running_var"], expected.var(1), 0.25), "float64")
        <= 2
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(4, 3, 49), (40, 5, 64), (65, 33, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_under_every_schedule(dtype: str, shape: Shape, device: str) -> None:
    results = []
    for schedule in SCHEDULES:
        run = Run(DEVICES[device], schedule)
        trained = check_train(run, shape, dtype, "N(0, 1)", affine=True, residual=True, relu=True)
        differentiated = check_backward(run, shape, dtype, "N(0, 1)", training=True, relu=True)
        results.append([a.tobytes() for a in (*trained.values(), *differentiated.values())])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exact_data_gives_the_bits_of_numpy(dtype: str, device: str) -> None:
    """y too, though float32 values are computed with float32 and its errors here, and in float64 there."""
    import anybn

    for shape in ((32, 8, 784), (4, 5, 49), (1001, 3, 1)):
        x = inputs.exact(shape).astype(dtype)
        found = Run(DEVICES[device])("train", x, {"x": x}, {"y": None, **statistics_of(dtype)}, eps=1e-5)
        moments = anybn.moments(x)
        assert np.array_equal(found["mean"], moments.mean)
        assert np.array_equal(found["m2"], moments.m2)
        expected = anybn.batch_norm(x, anybn.BatchNormState(shape[1]), training=True)
        assert found["y"].tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_constant_channels_give_exactly_bias(device: str, dtype: str) -> None:
    for shape, value in itertools.product(((4, 3, 49), (2, 4, 64), (50, 5, 1)), (6e4, 0.1, -3.3e-5, 0.0)):
        x = inputs.cast(np.full(shape, value), dtype)
        bias = np.arange(shape[1], dtype=np.float32) - 1.5
        found = Run(DEVICES[device])("train", x, {"x": x, "bias": bias}, {"y": None, **statistics_of(dtype)}, eps=1e-5)
        assert np.all(found["y"] == bias[:, None])
        assert np.all(found["m2"] == 0)


@pytest.mark.parametrize("device", DEVICES)
def test_few_values_give_statistics_of_float64(device: str) -> None:
    """Of float32 values; as on a CPU, so that a state may change places at every step."""
    for row, shape in itertools.product(inputs.ROWS, ((4, 3, 49), (90, 5, 1))):
        x = problem(shape, "float32", row)["x"]
        found = Run(DEVICES[device], exact=1)("train", x, {"x": x}, {"y": None, **statistics_of("float32")}, eps=1e-5)
        statistics = oracle.statistics(x)
        assert oracle.error(found["m2"] / statistics.m2, np.ones(shape[1]), "float64") <= 8
        assert oracle.error(found["y"], oracle.normalize(x, statistics.mean, statistics.var()), "float32") <= 0.5001


@pytest.mark.parametrize("device", DEVICES)
def test_an_outlier_in_front(device: str) -> None:
    """Neither the first value of a channel nor that of a tile need be anywhere near the others."""
    for shape in ((4, 3, 784), (3000, 2, 1)):
        x = problem(shape, "float32", "N(0, 1)")["x"].copy()
        x[0, :, 0] = 1e6
        found = Run(DEVICES[device])("train", x, {"x": x}, {"y": None, **statistics_of("float32")}, eps=1e-5)
        statistics = oracle.statistics(x)
        assert oracle.error(found["y"], oracle.normalize(x, statistics.mean, statistics.var()), "float32") <= 2


@pytest.mark.parametrize("eps", [1e-5, 1e-60])
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e38])
def test_sizes_at_which_squares_leave_float32(scale: float, eps: float) -> None:
    x = (inputs.normal((4, 3, 784)).clip(-3, 3) * scale).astype(np.float32)
    for device in DEVICES.values():
        found = Run(device)("train", x, {"x": x}, {"y": None, **statistics_of("float32")}, eps=eps)
        statistics = oracle.statistics(x)
        expected = oracle.normalize(x, statistics.mean, statistics.var(), eps=eps)
        assert oracle.error(found["y"], expected, "float32") <= 2
        assert oracle.error(found["m2"] / statistics.m2, np.ones(3), "float32") <= 2


@pytest.mark.parametrize("device", [*DEVICES, *CLUSTERED, *GROUPED])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(dtype: str, device: Any) -> None:
    """y may be x or the residual, whichever block of a channel is the first to write."""
    on: Device
    if device in DEVICES:
        on, shapes = DEVICES[device], [(6, 3, 49), (2, 4, 640), (300, 5, 1), (19, 32, 49)]
    elif device in GROUPED:
        on, shapes = GROUPED[device], [(6, 3, 8192), (1501, 53, 1)]
    else:
        on, shapes = CLUSTERED[device], [(n * device, *rest) for n, *rest in LARGE]
    for shape, target, schedule in itertools.product(shapes, ("x", "residual"), SCHEDULES):
        data = problem(shape, dtype)
        given = {name: data[name] for name in ("x", "residual", "weight", "bias")}
        run = Run(on, schedule)
        expected = run("train", data["x"], given, {"y": None, **statistics_of(dtype)}, eps=1e-5)
        assert device not in CLUSTERED or run.launched[0].cluster == device
        assert device not in GROUPED or run.launched[1].cooperative
        inside = {name: Guarded(a) for name, a in given.items()}
        per_channel = {name: Guarded(np.full(shape[1], np.nan)) for name in statistics_of(dtype)}
        pointers = {name: a.pointer for name, a in (inside | per_channel).items()}
        _cuda.call("train", gpu(on, schedule), shape, dtype, **pointers, y=pointers[target], eps=1e-5, exact=0)
        assert inside[target].array.tobytes() == expected["y"].tobytes()


def sparse(count: int, dtype: np.dtype) -> np.ndarray:
    """So many zeros, which take memory only where they are written to."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return np.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype)


@pytest.mark.parametrize(
    "shape",
    [(3, 1, 2**30), (1, 3, 2**30), (50_000_001, 64, 1), (2, 2**31 - 1, 1), (2**31 + 1, 1, 1), (2, 2**30 + 1, 2)],
    ids=str,
)
def test_beyond_2_to_31_values(shape: Shape) -> None:
    """The last block of an evaluation, at the far end of more values than 32 bits count."""
    if sys.platform != "linux":
        pytest.skip("this asks Linux for memory that need not be there")
    _, channels, length = shape
    dtype = np.dtype(np.float16)
    x, y = (sparse(math.prod(shape), dtype) for _ in range(2))
    mean, var = (sparse(channels, np.dtype(np.float64)) for _ in range(2))
    some = min(1000, math.prod(shape[1:]))
    x[-some:] = np.arange(some)
    mean[-1], var[-1] = 1, 3

    def run(launch: Launch, record: bytearray) -> None:
        module("float16").run(launch, np.frombuffer(record, np.uint8), last=1)

    pointers = {name: a.ctypes.data for name, a in (("x", x), ("y", y), ("mean", mean), ("var", var))}
    _cuda.call("evaluate", gpu()._replace(launch=run), shape, "float16", **pointers, eps=1.0)
    last_channel = slice(-some, None) if channels == 1 or length >= some else slice(-length, None)
    assert np.array_equal(y[last_channel], (x[last_channel] - 1) / 2)


def test_nan_is_shown_and_stays_in_its_channel() -> None:
    for device, shape in itertools.product(DEVICES.values(), ((4, 3, 64), (200, 6, 1))):
        data = problem(shape, "float32")
        x = data["x"].copy()
        x[1, 1, 0] = np.nan
        y = Run(device)("train", x, {"x": x}, {"y": None, **statistics_of("float32")}, eps=1e-5, relu=1)["y"]
        assert np.isnan(y[:, 1]).all()
        assert np.isfinite(np.delete(y, 1, axis=1)).all()


def test_the_argument_has_the_fields_of_the_struct() -> None:
    """By name, order and offset: `_cuda.CALL` is struct Call."""
    source = _cuda.source()
    struct = source[source.index("struct Call {") : source.index("};", source.index("struct Call {"))]
    names = []
    for line in struct.splitlines()[1:]:
        for declaration in line.partition("//")[0].split(";"):
            words = declaration.replace("*", " ").replace(",", " ").split()
            names += [
                word for word in words if word not in ("const", "void", "unsigned", "char", "double", "long", "int")
            ]
    assert _cuda.CALL.names == tuple(names)
    checks = [f"offsetof(Call, {name}) == {_cuda.CALL.fields[name][1]}" for name in names]
    checks.append(f"sizeof(Call) == {_cuda.CALL.itemsize}")
    body = "\n".join(f"static_assert({check});" for check in checks)
    Module(["commit"], source + "\n#include <cstddef>\n" + body)
