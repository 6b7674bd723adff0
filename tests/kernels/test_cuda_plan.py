"""Which kernels run a call: checked for devices and sizes that need not be here."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from anybn.conformance.inputs import RESNET50
from anybn.kernels.cuda.plan import TYPES, VECTORS, Device, Plan, kernels, plan, tiling

DEVICES = {
    "H200": Device(multiprocessors=132, shared_bytes=227 * 1024, capability=(9, 0)),
    "RTX 4060": Device(multiprocessors=24, shared_bytes=99 * 1024, capability=(8, 9)),
    "T4": Device(multiprocessors=40, shared_bytes=64 * 1024, capability=(7, 5)),
    "T4, not cooperative": Device(multiprocessors=40, shared_bytes=64 * 1024, capability=(7, 5), cooperative=False),
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
    (300, 70_000, 7),
    (2, 70_000, 16),
    (256, 512, 49),
    (64, 4, 225),
    (64, 3, 226),
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
        (grid_x, grid_y), (block_x, block_y) = launch.grid, launch.block
        assert 1 <= grid_x <= 2**31 - 1
        assert 1 <= grid_y <= 65535
        assert 32 <= block_x * block_y <= 512
        assert block_x * block_y % 32 == 0
        assert launch.shared_bytes <= max(device.shared_bytes, 48 * 1024)
        assert launch.cluster in device.clusters
        assert grid_x % launch.cluster == 0
        name, _, arguments = launch.kernel.rstrip(">").partition("<")
        assert launch.cooperative == name.endswith("_group")
        if name == "commit":
            assert launch.grid == (1, 1)
            continue
        if name == "clear_barriers":
            assert grid_x == made.launches[1].grid[0]
            continue
        if name.startswith("finish"):
            assert block_x == 32
            assert grid_x * block_y >= channels
            continue
        keeps = name.startswith(("train", "backward"))
        assert block_x * block_y <= (512 if keeps else 256)
        _, vector, rows, *more = arguments.split(", ")
        vector, rows = int(vector), rows == "true"
        assert more in ([str(launch.cluster)] if name in ("train", "backward") else [], ["true"] * (not keeps))
        assert rows or length > 1
        assert (channels * length if rows else length) % vector == 0
        assert alignment % (vector * TYPES[dtype][1]) == 0
        # A warp's threads share columns where there are no more than 32, which is what is shuffled.
        assert launch.width <= block_x
        assert block_x > 32 or (launch.width == block_x and block_x & (block_x - 1) == 0)
        columns = launch.width * (vector if rows else 1)
        in_a_tile, rest = divmod(columns, length if rows else 1)
        assert rest == 0
        tiles = -(-channels // in_a_tile)
        assert launch.cooperative or grid_x == tiles * launch.cluster
        positions = n if rows else n * length // vector
        assert grid_y <= positions
        arrays = 2 if name.startswith("backward") else 1
        sets = block_y if block_x > 32 else block_x * block_y // 32
        scratch = columns * sets * TYPES[dtype][2] * (name not in ("evaluate", "gradients"))
        kept = launch.keep * block_x * vector * TYPES[dtype][1] * arrays
        assert launch.shared_bytes >= scratch + in_a_tile * 40 * (arrays == 2) + kept
        if launch.cooperative:
            assert device.cooperative
            assert grid_x <= tiles
            threads = 1024 if name == "train_group" and not rows else 512
            resident = min(threads // (block_x * block_y), (device.shared_bytes + 1024) // (launch.shared_bytes + 1024))
            assert grid_x * grid_y <= resident * device.multiprocessors
            assert 4 * launch.keep * grid_y >= positions
            assert made.parts == grid_y
    if made.launches[0].kernel.startswith(("sums", "gradient_sums")):
        assert made.launches[0].grid[1] == made.parts
    if made.launches[0].kernel.startswith(("sums", "gradient_sums", "clear")):
        barriers = 128 * made.launches[0].grid[0] if made.cooperative else 0
        assert made.scratch_bytes == channels * (made.parts * TYPES[dtype][2] + 16) + barriers
    else:
        assert made.scratch_bytes == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", OPS)
def test_any_size(op: str, dtype: str, device: str) -> None:
    for shape, alignment in itertools.product(SHAPES, (2, 4, 8, 16)):
        alignment = max(alignment, TYPES[dtype][1])
        for masked in (False, True):
            made = plan(op, shape, dtype, DEVICES[device], alignment, masked)
            check(made, shape, dtype, DEVICES[device], alignment)


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
        if size == 112 and batch > 64:  # a channel of 64 x 112 x 112 is larger than a cluster
            _, launch = plan("train", (batch, channels, size * size), dtype, DEVICES["H200"]).launches
            assert launch.kernel.startswith("train_group")
            assert launch.grid[0] * launch.grid[1] > 250
            assert launch.keep * launch.grid[1] >= batch * size * size // 8
            continue
        assert launch.kernel.startswith("train")
        assert launch.grid[0] >= 132 or launch.cluster == 8 or batch == 32
        _, vector, rows, _ = launch.kernel.split(", ")
        assert (vector, rows) == (("4", "true") if size == 7 else ("8" if size > 14 else "4", "false"))
        assert launch.keep * launch.cluster >= (batch if size == 7 else batch * size * size // int(vector))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_h200_keeps_channels_last(dtype: str) -> None:
    """Of training, what tiles of 128 bytes times the rows need: all of it up to 30 MB."""
    for batch, (channels, size) in itertools.product((32, 64, 256), RESNET50):
        rows = batch * size * size
        if rows * 128 > 29e6:
            continue
        launch = plan("train", (rows, channels, 1), dtype, DEVICES["H200"]).launches[-1]
        assert launch.kernel.startswith("train")
        assert launch.keep * (launch.grid[1] if launch.cooperative else launch.cluster) >= rows


def test_an_h100_gets_what_was_the_fastest_there() -> None:
    """Of all launches that have been timed for a case, to the last block: who changes a choice measures it."""
    rows = (Path(__file__).parents[2] / "benchmarks" / "results" / "gpu.jsonl").read_text().splitlines()
    timed: dict[tuple[Any, ...], list[tuple[float, str]]] = {}
    for row in map(json.loads, rows):
        if row["op"] in OPS and "kernel" in row:
            assert "H100" in row["device"]
            case = row["op"], row["dtype"], row["layout"], *row["shape"]
            timed.setdefault(case, []).append((row["us"], row["kernel"]))
    assert len(timed) > 100
    device = DEVICES["H200"]  # which has as many multiprocessors, with as much shared memory
    for (op, dtype, layout, n, channels, *spatial), found in timed.items():
        length = math.prod(spatial)
        shape = (n, channels, length) if layout == "nchw" else (n * length, channels, 1)
        planned = " + ".join(
            f"{one.kernel} {one.grid[0]}x{one.grid[1]} of {math.prod(one.block)}, {one.shared_bytes >> 10} KB"
            for one in plan(op, shape, dtype, device).launches
        )
        assert planned == min(found)[1], f"{op} {dtype} {layout} {shape}"


def names(*arguments: Any) -> list[str]:
    return [re.sub("<.*", "", launch.kernel) for launch in plan(*arguments).launches]


def test_what_does_not_fit_a_block_takes_groups_or_two_passes() -> None:
    for device in DEVICES.values():
        large, huge = (256, 64, 112 * 112), (1, 1, 10**9)
        for dtype, itemsize in (("bfloat16", 2), ("float32", 4)):
            kept = device.multiprocessors * device.shared_bytes / (256 * 112 * 112 * itemsize)
            assert kept > 0.3 or kept < 0.24  # no matter of a few bytes
            expected = (
                ["clear_barriers", "train_group"]
                if device.cooperative and kept > 0.25
                else names("train", huge, dtype, device)
            )
            assert names("train", large, dtype, device) == expected
        assert names("train", huge, "float32", device) == ["sums", "finish_train", "evaluate"]
        assert names("backward", huge, "float32", device) == ["gradient_sums", "finish_backward", "gradients"]
        assert names("evaluate", huge, "float32", device) == ["evaluate"]
        assert names("gradients", huge, "float32", device) == ["gradients"]
        assert names("statistics", huge, "float32", device) == ["sums", "finish_train"]
        small = (8, 64, 49), "float32", device
        assert names("train", *small) == ["train"]
        assert names("backward", *small) == ["backward"]
        assert names("statistics", *small) == ["sums", "finish_train"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_a_mask_takes_two_passes(op: str, device: str) -> None:
    """As they are without one, of kernels of its own; but planes are never taken as rows."""
    for shape in ((4, 64, 49), (64, 64, 196), (1000, 64, 1)):
        masked = plan(op, shape, "float32", DEVICES[device], masked=True).launches
        unkept = plan(op, shape, "float32", DEVICES[device]._replace(shared_bytes=1)).launches
        assert [one._replace(kernel=one.kernel.replace(", true>", ">")) for one in masked] == list(unkept)
    assert not any(
        ", true, true>" in one.kernel for one in plan(op, (64, 64, 49), "float32", DEVICES[device], 16, True).launches
    )


def test_parts_fill_the_device_and_none_is_empty() -> None:
    device = DEVICES["H200"]
    first = plan("train", (1, 1, 10**9), "float32", device).launches[0]
    assert first.grid[0] * first.grid[1] >= 4 * device.multiprocessors
    assert plan("train", (1, 1, 3), "float32", device._replace(shared_bytes=1)).parts == 1


def test_the_widest_vector_that_shape_and_pointers_allow() -> None:
    vectors = {
        (length, alignment): tiling((2, 3, length), "bfloat16", alignment).vector
        for length in (8, 12, 227)
        for alignment in (16, 8, 2)
    }
    assert list(vectors.values()) == [8, 4, 1, 4, 4, 1, 1, 1, 1]
    assert all(widths[-1] == 1 for widths in VECTORS.values())
