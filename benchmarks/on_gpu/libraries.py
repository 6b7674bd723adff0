"""anybn on arrays of CuPy and torch: the conformance suite, states that travel, streams, captured graphs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from typing import Any

import numpy as np
from on_gpu import machine
from on_gpu.machine import place


def run_conformance() -> None:
    """anybn's own suite: training, evaluation, backward, masks, variants, states."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-W", "default", "-p", "no:cacheprovider"]
    command += ["--pyargs", "anybn.conformance", "--tb=short", "--maxfail=40"]
    if not entry_points(group="pytest11", name="anybn"):
        command += ["-p", "anybn_pytest"]
    if machine.options.rehearse:
        command += ["--anybn-backend=numpy", "-m", "quick"]
    else:
        command += ["--anybn-backend=cupy,torch:cuda", "-n", str(max(1, (os.cpu_count() or 1) * 3 // 4))]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def batches() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((32, 16, 28, 28)).astype(np.float32) + i for i in range(4)]


def trained_by_numpy() -> Any:
    import anybn

    state = anybn.BatchNormState(16)
    for x in batches():
        anybn.batch_norm(x, state, training=True)
    return state


def close(value: Any, expected: np.ndarray, what: str) -> None:
    assert np.allclose(value, expected, rtol=1e-6, atol=1e-6), f"{what}: {value} for {expected}"


def check_journey() -> None:
    """A state that learns in NumPy, CuPy, torch on CUDA and NumPy again, a batch in each."""
    import torch

    import anybn

    state, alone = anybn.BatchNormState(16), trained_by_numpy()
    places = (
        ("numpy", "torch", "torch", "numpy") if machine.options.rehearse else ("numpy", "cupy", "torch:cuda", "numpy")
    )
    for name, x in zip(places, batches(), strict=True):
        state.to(name)
        if name == "cupy":
            import cupy

            x = cupy.asarray(x)
        elif name != "numpy":
            x = torch.from_numpy(x).to(place())
        anybn.batch_norm(x, state, training=True)
    close(state.running_mean, alone.running_mean, "the journey")
    close(state.running_var, alone.running_var, "the journey")
    print("journey: NumPy, CuPy, torch on CUDA and NumPy leave the state that NumPy alone does")


def check_streams() -> None:
    """Work follows the stream it is queued on, in CuPy and torch, and nobody waits for the GPU."""
    import torch

    import anybn

    alone = trained_by_numpy()
    if machine.options.rehearse:
        return
    import cupy

    state = anybn.BatchNormState(16)
    with cupy.cuda.Stream(non_blocking=True):
        for x in batches():
            busy = cupy.random.standard_normal((2048, 2048))
            for _ in range(20):  # the stream is behind, so that whoever does not wait for it reads what is not there
                busy = busy @ busy * 1e-3
            late = cupy.asarray(x) + 0 * busy[0, 0].astype(cupy.float32)
            anybn.batch_norm(late, state, training=True)
    state.to("numpy")  # from another stream, which waits for the last update
    close(state.running_mean, alone.running_mean, "CuPy's stream")

    anybn.batch_norm(torch.ones((2, 16), device="cuda"), anybn.BatchNormState(16).to("torch:cuda"), training=True)
    state = anybn.BatchNormState(16).to("torch:cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        for given in [torch.from_numpy(x).cuda() for x in batches()]:
            busy = torch.randn((2048, 2048), device="cuda")
            for _ in range(20):
                busy = busy @ busy * 1e-3
            late = given + 0 * busy[0, 0]
            torch.cuda.set_sync_debug_mode("error")  # torch raises where it would wait for the GPU
            try:
                anybn.batch_norm(late.requires_grad_(), state, training=True).backward(late)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    state.to("numpy")
    close(state.running_mean, alone.running_mean, "torch's stream")
    close(state.running_var, alone.running_var, "torch's stream")
    print("streams: CuPy's and torch's leave the state that NumPy leaves")


def check_capture() -> None:
    """A module's step in a CUDA graph goes on learning with each replay."""
    import torch

    import anybn.torch

    alone, given = trained_by_numpy(), batches()
    if machine.options.rehearse:
        return
    module = anybn.torch.BatchNorm2d(16).cuda()
    x, dy = (torch.from_numpy(given[0]).cuda() for _ in range(2))
    x.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled before it is captured
        torch.autograd.grad(module(x), x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    module.reset_running_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
        (dx,) = torch.autograd.grad(y, x, dy)
    for batch in given:
        with torch.no_grad():
            x.copy_(torch.from_numpy(batch))
        graph.replay()
    torch.cuda.synchronize()
    expected, pullback = anybn.batch_norm_vjp(given[-1], anybn.BatchNormState(16), training=True)
    close(module.running_mean.cpu().numpy(), alone.running_mean, "a captured graph")
    close(module.running_var.cpu().numpy(), alone.running_var, "a captured graph")
    close(y.detach().cpu().numpy(), expected, "a captured graph")
    close(dx.cpu().numpy(), pullback(given[0]).x, "a captured graph")
    assert int(module.num_batches_tracked) == len(given)
    print("capture: a captured step leaves the state that NumPy leaves")
