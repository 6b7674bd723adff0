"""Every kernel, on small arrays: does it compile, is it launched, is it right."""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
from on_gpu import machine
from on_gpu.machine import BAR, EPS, SCRIPT, Run, call, place, simulated, synchronize

from anybn.conformance import oracle
from anybn.kernels.cuda import launch as _cuda
from anybn.kernels.cuda.plan import TYPES, Device, Launch, kernels

#: As it is planned for a GPU of this size, which any GPU can do: groups of blocks, and two passes, for small arrays.
SMALL = Device(multiprocessors=4, shared_bytes=24 * 1024, capability=(8, 0))
FAMILIES = {"train", "backward", "train_group", "backward_group", "sums", "gradient_sums", "masked sums"}


def compile_one(kernel: str) -> None:
    _cuda.function(0, kernel)


def compile_all() -> None:
    """Every kernel, by all cores, into CuPy's folder on disk, from which all other parts take them."""
    names = list(dict.fromkeys(name for dtype in TYPES for name in kernels(dtype)))
    if machine.options.rehearse:
        print(f"compile: {len(names)} kernels, left out")
        return
    start = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for _ in pool.map(compile_one, names, chunksize=4):
            pass
    print(f"compile: {len(names)} kernels in {time.monotonic() - start:.1f} s")


def check_launches() -> None:
    """Whether clusters of each size, and cooperative launches, are accepted, one after the other."""
    import torch

    refused = []
    for size in (1, 2, 4, 8, "cooperative"):

        class Only(Device):
            @property
            def clusters(self, size: Any = size) -> tuple[int, ...]:
                return () if size == "cooperative" else (size,)

        blocks = 4 if size == "cooperative" else size
        device = Only(blocks, 100 * 1024, (9, 0), size == "cooperative")
        x = torch.randn((2 * blocks, 2, 4096), device=place())
        launched: list[Launch] = []
        try:
            y = outputs(x.shape, x, x, device, launched)["y"]
            synchronize()
            expected = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
            assert torch.allclose(y.double(), expected, atol=1e-6), "wrong result"
            of_size = [one for one in launched if one.cooperative or (one.cluster == size and "sums" not in one.kernel)]
            assert len(of_size) == 2, f"{launched} were launched"
            print(f"launches: {size} is accepted, {launched[-1]}")
        except Exception as error:
            refused.append(f"{size}: {type(error).__name__}: {error}")
    assert not refused, "; ".join(refused)


def check_kernels() -> None:
    """Training and backward at odd shapes, in every dtype, aligned or not, with a mask or without, as planned for this
    GPU and for a small one, against long double; twice the same bits. Every family of kernels must have run."""
    import torch

    shapes = [(4, 3, 49), (3, 5, 64), (2, 2, 1156), (5, 1, 31), (64, 68, 1), (301, 3, 1), (2, 1023, 1)]
    shapes += [(2, 37, 16), (64, 12, 49), (5, 2, 8192), (5, 2, 4099), (1501, 68, 1), (301, 256, 49)]
    if machine.options.rehearse:
        shapes = shapes[:2] + shapes[9:11]
    else:
        shapes += [(64, 1, 12544), (7001, 96, 1), (1, 1, 2_000_003)]  # groups of blocks on a large GPU
    launched: list[Launch] = []
    wrong, worst = [], dict.fromkeys(TYPES, 0.0)
    for dtype, shape, offset, device, masked in itertools.product(TYPES, shapes, (0, 1), (None, SMALL), (False, True)):
        if (device is not None or masked) and math.prod(shape) > 200_000:
            continue
        rng = np.random.default_rng(0)
        x, dy = (rng.standard_normal(shape) + mean for mean in (1e3, 0))
        mask = rng.random((shape[0], shape[2])) < 0.6 if masked else None
        if mask is not None:
            mask.flat[0], mask.flat[-2:] = False, True
        tensors = [torch.empty(a.size + offset, dtype=getattr(torch, dtype), device=place())[offset:] for a in (x, dy)]
        for tensor, a in zip(tensors, (x, dy), strict=True):
            tensor.copy_(torch.from_numpy(a.reshape(-1)))
        x, dy = (as_numpy(tensor, shape) for tensor in tensors)
        first, second = (outputs(shape, *tensors, device, launched, mask) for _ in range(2))
        found = oracle.statistics(x, mask=mask)
        gradients = oracle.gradients(dy, x, found.mean, found.var(), count=found.count, mask=mask)
        y = oracle.normalize(x, found.mean, found.var(), mask=mask)
        size = 1 if dtype != "float64" else np.maximum(1, gradients.x_size * np.abs(dy).max())
        errors = {
            "y": oracle.error(as_numpy(first["y"], shape), y, dtype),
            "dx": oracle.error(as_numpy(first["dx"], shape), gradients.x, dtype, size),
            "mean": np.abs(as_numpy(first["mean"], shape[1:2]) - sum(found.mean)).max() * 1e6,
        }
        errors |= {f"{n} from run to run": 9.0 * (not same_bits(first[n], second[n])) for n in first}
        worst[dtype] = max(worst[dtype], errors["y"], errors["dx"])
        bad = {name: float(error) for name, error in errors.items() if not error <= BAR[dtype]}
        if bad:
            of = "with a mask" if masked else "without"
            wrong.append(f"{dtype} {shape} + {offset} {of} on {device}: {bad} by {launched[-4:]}")
    names = (launch.kernel for launch in launched)
    missing = FAMILIES - {"masked " * bool(re.search("(true|false), true>", n)) + n.partition("<")[0] for n in names}
    worst = {name: round(float(error), 3) for name, error in worst.items()}
    print(f"kernels: {len(shapes)} shapes in {len(TYPES)} dtypes, worst error in eps {worst}")
    assert not wrong, f"{len(wrong)} wrong: " + "\n".join(wrong[:10])
    assert not missing or machine.options.rehearse, f"{', '.join(missing)}: not run"


def as_numpy(a: Any, shape: tuple[int, ...]) -> np.ndarray:
    return a.cpu().double().numpy().reshape(shape)


def same_bits(a: Any, b: Any) -> bool:
    import torch

    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def outputs(
    shape: tuple[int, int, int],
    x: Any,
    dy: Any,
    device: Device | None,
    launched: list[Launch],
    mask: np.ndarray | None = None,
) -> dict[str, Any]:
    """Of training and of backward, on memory that was NaN."""
    import torch

    y, dx = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    mean, shift, var, m2 = torch.full((4, shape[1]), torch.nan, dtype=torch.float64, device=place())
    kept = {"mean": mean, "var": var} | ({"shift": shift} if x.dtype == torch.float64 else {})
    if mask is not None:
        shown, counted = (torch.from_numpy(a).to(place()) for a in (mask, np.array([mask.sum(), mask.argmax()])))
        kept |= {"shown": shown, "shown_count": counted[:1], "first_shown": counted[1:]}
    call("train", shape, launched, device, x=x, y=y, m2=m2, eps=EPS, **kept)
    call("backward", shape, launched, device, x=x, dy=dy, y=dx, eps=EPS, training=1, **kept)
    return {"y": y, "dx": dx, "mean": mean, "var": var, "m2": m2}


def check_sanitized() -> None:
    """Small cases, a cluster, groups of blocks, two passes, a mask, by CuPy alone: torch takes long under a checker."""
    if machine.options.rehearse:
        library, gpu = np, simulated()
    else:
        import cupy as library

        library.cuda.set_allocator(None)  # no pool, so that the checker knows where an array ends

        def scratch(nbytes: int) -> tuple[int, Any]:
            memory = library.cuda.alloc(nbytes)
            return int(memory.ptr), memory

        gpu = _cuda.gpu(0, library.cuda.get_current_stream().ptr, scratch)

    def address(a: Any) -> int:
        return a.ctypes.data if machine.options.rehearse else int(a.data.ptr)

    alone = SMALL._replace(cooperative=False)
    cases = ((16, 2, 4096), gpu.device), ((1501, 68, 1), SMALL), ((371, 12, 49), alone)
    masked = ((16, 2, 512), SMALL), ((1501, 12, 1), SMALL)
    for shape, device in (*cases, *masked):
        x, dy = (library.asarray(np.random.default_rng(i).standard_normal(shape), np.float32) for i in range(2))
        y, dx = library.empty_like(x), library.empty_like(x)
        mean, var, m2 = library.empty((3, shape[1]))
        arrays = {"x": x, "mean": mean, "var": var}
        if (shape, device) in masked:  # of which everything is shown
            arrays |= {"shown": library.ones(shape[::2], bool), "shown_count": library.asarray([x.size // shape[1]])}
            arrays |= {"first_shown": library.zeros(1, int)}
        chosen = gpu._replace(device=device)
        for op, more in (("train", {"y": y, "m2": m2}), ("backward", {"dy": dy, "y": dx})):
            pointers = {name: address(a) for name, a in (arrays | more).items()}
            _cuda.call(op, chosen, shape, "float32", eps=EPS, training=int(op == "backward"), **pointers)
        y = y if machine.options.rehearse else library.asnumpy(y)
        assert np.abs(y.mean((0, 2))).max() < 1e-6
        assert np.abs(y.var((0, 2)) - 1).max() < 1e-3
    print("sanitized: all cases have run")


def sanitizer(tool: str) -> Run:
    def check() -> None:
        command = [sys.executable, str(SCRIPT), "--out", str(machine.options.out), "--only", "sanitized"]
        if machine.options.rehearse:
            command.append("--rehearse")
        elif shutil.which("compute-sanitizer") is None:
            print(f"{tool}: compute-sanitizer is not installed, nothing was checked")
            return
        else:
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *command]
        subprocess.run(command, check=True)

    return check
