"""Which kernels run a call: checked for devices and sizes that need not be here."""

from __future__ import annotations

import itertools
import re

import pytest

from anybn.backends._cuda_plan import TYPES, VECTORS, Device, Plan, alignment_of, kernels, plan, tiling
from anybn.conformance.inputs import RESNET50

DEVICES = {
    "H200": Device(multiprocessors=132, shared_bytes=227 * 1024, capability=(9, 0)),
    "RTX 4060": Device(multiprocessors=24, shared_bytes=99 * 1024, capability=(8, 9)),
    "T4": Device(multiprocessors=40, shared_bytes=64 * 1024, capability=(7, 5)),
}
OPS = ("train", "statistics", "evaluate", "backward", "gradients", "commit")
SHAPES = (
    (2, 1, 1),
    (1, 1, 2),
    (3, 1023, 49),
    (1, 4, 10_000_019),
    (10_000_000, 1, 1),
    (70_000, 3, 7),  # N, C past 65535
    (3, 70_000, 7),
    (3, 70_000, 1),
    (70_000, 70_000, 1),  # past 2^31 and 2^32 values
    (2**21, 1024, 1),
    (1, 1, 2**33),
    (2, 2**31 - 1, 1),  # as many channels as a grid has blocks
    (2, 2**31 - 1, 2),
    (2**31 + 1, 1, 1),
)


def check(made: Plan, shape: tuple[int, int, int], dtype: str, device: Device, alignment: int) -> None:
    """That every launch is possible, and that its blocks cover the array."""
    n, channels, length = shape
    for launch in made.launches:
        assert launch.kernel in kernels(dtype)
        (grid_x, grid_y), (width, height) = launch.grid, launch.block
        assert 1 <= grid_x <= 2**31 - 1
        assert 1 <= grid_y <= 65535
        assert 32 <= width * height <= 512
        assert width * height % 32 == 0
        assert launch.shared_bytes <= max(device.shared_bytes, 48 * 1024)
        assert launch.cluster in device.clusters
        assert grid_x % launch.cluster == 0
        name, _, arguments = launch.kernel.rstrip(">").partition("<")
        if name == "commit":
            assert launch.grid == (1, 1)
            continue
        if name.startswith("finish"):
            assert width == 32
            assert grid_x * height >= channels
            continue
        assert width * height <= (512 if launch.cluster > 1 or name in ("train", "backward") else 256)
        _, vector, rows, *cluster = arguments.split(", ")
        assert cluster in ([], [str(launch.cluster)])
        assert rows == ("true" if length == 1 else "false")
        assert (channels if length == 1 else length) % int(vector) == 0
        assert alignment % (int(vector) * TYPES[dtype][1]) == 0
        assert width & (width - 1) == 0  # or lanes of a warp that hold one channel are not what is shuffled
        columns = width * int(vector) if length == 1 else 1
        assert length == 1 or width == 1
        assert (grid_x // launch.cluster - 1) * columns < channels <= grid_x // launch.cluster * columns
        positions = n if length == 1 else n * length // int(vector)
        assert grid_y == 1 or grid_y <= positions
        kept = launch.keep * columns * max(1, 1 if length == 1 else int(vector)) * TYPES[dtype][1]
        assert launch.shared_bytes >= kept * (2 if name == "backward" else 1)
    if made.launches[0].kernel.startswith(("sums", "gradient_sums")):
        assert made.launches[0].grid[1] == made.parts
        assert made.scratch_bytes == channels * (made.parts * TYPES[dtype][2] + 16)
    else:
        assert made.scratch_bytes == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", OPS)
def test_any_size(op: str, dtype: str, device: str) -> None:
    for shape, alignment in itertools.product(SHAPES, (2, 4, 8, 16)):
        alignment = max(alignment, TYPES[dtype][1])
        check(plan(op, shape, dtype, DEVICES[device], alignment), shape, dtype, DEVICES[device], alignment)


@pytest.mark.parametrize("dtype", TYPES)
def test_resnet50(dtype: str) -> None:
    assert len(RESNET50) == 53
    for device, op, batch, (channels, size), last in itertools.product(
        DEVICES.values(), OPS, (1, 32, 64, 256), RESNET50, (False, True)
    ):
        shape = (batch * size * size, channels, 1) if last else (batch, channels, size * size)
        check(plan(op, shape, dtype, device), shape, dtype, device, 16)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_h200_reads_resnet50_once(dtype: str) -> None:
    """Training, channels first, 16 bits: all that is read is kept, in clusters that fill the device."""
    for batch, (channels, size) in itertools.product((32, 64, 256), RESNET50):
        (launch,) = plan("train", (batch, channels, size * size), dtype, DEVICES["H200"]).launches[:1]
        if size == 112 and batch > 32:
            continue  # a channel of 64 x 112 x 112 is larger than a cluster
        assert launch.kernel.startswith("train")
        assert launch.grid[0] >= 132 or launch.cluster == 8 or batch == 32
        vector = int(launch.kernel.split(", ")[1])
        assert launch.keep * launch.cluster >= batch * size * size // vector


def test_what_does_not_fit_takes_two_passes() -> None:
    kernels_of = lambda *arguments: [re.sub("<.*", "", launch.kernel) for launch in plan(*arguments).launches]  # noqa: E731
    for device in DEVICES.values():
        huge = (256, 64, 112 * 112), "float32", device
        assert kernels_of("train", *huge) == ["sums", "finish_train", "evaluate"]
        assert kernels_of("backward", *huge) == ["gradient_sums", "finish_backward", "gradients"]
        assert kernels_of("evaluate", *huge) == ["evaluate"]
        assert kernels_of("gradients", *huge) == ["gradients"]
        small = (8, 64, 49), "float32", device
        assert kernels_of("train", *small) == ["train"]
        assert kernels_of("backward", *small) == ["backward"]
        assert kernels_of("statistics", *small) == ["sums", "finish_train"]


def test_parts_fill_the_device_and_none_is_empty() -> None:
    device = DEVICES["H200"]
    first = plan("train", (1, 1, 10**9), "float32", device).launches[0]
    assert first.grid[0] * first.grid[1] >= 4 * device.multiprocessors
    assert plan("train", (1, 1, 3), "float32", device._replace(shared_bytes=1)).parts == 1


def test_the_widest_vector_that_shape_and_pointers_allow() -> None:
    vectors = {
        (length, alignment): tiling((2, 3, length), "bfloat16", alignment).vector
        for length in (8, 12, 49)
        for alignment in (16, 8, 2)
    }
    assert list(vectors.values()) == [8, 4, 1, 4, 4, 1, 1, 1, 1]
    assert all(widths[-1] == 1 for widths in VECTORS.values())


def test_alignment_of_pointers() -> None:
    assert alignment_of([0, 0], 4) == 16
    assert alignment_of([256, 0, 1024 + 8], 4) == 8
    assert alignment_of([256, 1024 + 4, 8], 4) == 4
