"""What a group costs per training step: one layer at a time, at 1, 2 and 4 processes of gloo on this machine.

    python benchmarks/collectives.py            # prints tables and writes benchmarks/results/collectives.json
    python benchmarks/collectives.py --on-paper # the same, from what was measured before

docs/groups.md has the tables.

Every process times forward and backward of `anybn.torch.BatchNorm2d` on its own batch, without a group and with one, by
turns, and the bare collectives; medians, of the slowest process. Then, on paper, ResNet-50 on more members than there
are here: from the bytes of its 53 batch norms, and the latency and bandwidth that the bare collectives had.
"""

import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import anybn
import anybn.torch
from anybn.conformance import inputs, oracle
from anybn.groups.agreement import Settings
from anybn.groups.exchange import MANY

SHAPES = ((8, 64, 56, 56), (8, 256, 14, 14), (8, 2048, 7, 7), (8, 64, 1, 1))
REPEATS = 20
HEAD, HEAD_OF_SUMS = 1 + len(Settings._fields), 4
RESULTS = Path(__file__).parent / "results" / "collectives.json"


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def medians(*functions):
    """Of each, taken by turns, so that all meet the same machine."""
    for function in functions:
        function()
    times = []
    for _ in range(REPEATS):
        dist.barrier()
        times.append([timed(function) for function in functions])
    return [statistics.median(column) for column in zip(*times, strict=True)]


def slowest(values):
    t = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return t.tolist()


def check(rank, size):
    """A wrong result is not worth timing."""
    x = inputs.normal((4 * size, 8, 7, 7)).astype(np.float32) + np.float32(1e3)
    bn = anybn.torch.BatchNorm2d(8, group=anybn.distributed.TorchGroup())
    y = bn(torch.from_numpy(x[4 * rank : 4 * rank + 4])).detach().numpy()
    s = oracle.statistics(x)
    error = oracle.error(y, oracle.normalize(x, s.mean, s.var())[4 * rank : 4 * rank + 4], "float32")
    assert error <= 0.500001, error


def member(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    check(rank, size)
    rows = []
    for shape in SHAPES:
        channels = shape[1]
        x = torch.randn(shape, requires_grad=True)
        dy = torch.randn(shape)
        alone = anybn.torch.BatchNorm2d(channels)
        together = anybn.torch.BatchNorm2d(channels, group=anybn.distributed.TorchGroup())
        forward_row = torch.zeros(size, HEAD + 2 * channels, dtype=torch.float64)
        backward_row = torch.zeros(2, channels, dtype=torch.float64)

        def step(bn, x=x, dy=dy):
            bn(x).backward(dy)

        times = medians(
            lambda: step(alone), lambda: step(together),  # noqa: B023 called at once
            lambda: dist.all_reduce(forward_row), lambda: dist.all_reduce(backward_row),  # noqa: B023
        )  # fmt: skip
        step_alone, step_together, forward, backward = (1e6 * t for t in slowest(times))
        row = {"members": size, "shape": list(shape), "step_us": step_alone, "step_of_group_us": step_together}
        row |= {"forward_collective_us": forward, "backward_collective_us": backward}
        row |= {"forward_bytes": forward_row.nbytes, "backward_bytes": backward_row.nbytes}
        rows.append(row)
    sizes = [1 << power for power in (3, 12, 20, 23)]
    bare = [torch.zeros(n // 8, dtype=torch.float64) for n in sizes]
    times = slowest(medians(*(lambda t=t: dist.all_reduce(t) for t in bare)))
    if rank == 0:
        bare = {str(n): 1e6 * t for n, t in zip(sizes, times, strict=True)}
        Path(folder, "rows.json").write_text(json.dumps({"rows": rows, "bare_all_reduce_us": bare}))
    dist.destroy_process_group()


def measured(size):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__]
        started = [subprocess.Popen([*command, str(rank), str(size), folder]) for rank in range(size)]
        try:
            for process in started:
                if process.wait(timeout=120):
                    raise RuntimeError(f"a member failed: {process.returncode}")
        finally:
            for process in started:
                process.kill()
        return json.loads(Path(folder, "rows.json").read_text())


#: Of ResNet-50's batch norms, those whose input is there, or whose dy is, together with another one's: each stage's
#: first block normalizes in two branches, which begin and end with it.
PARALLEL = 4


def on_paper(members, way, latency_us, gigabytes_per_second):
    """ResNet-50, one step: a collective for each of 53 layers forward ("rows") or two ("sums"), and one backward.

    A sum of b bytes over p members in a ring moves ``2 (p - 1) / p * b`` through every member. Latency is per
    collective: measured between two members here, times log2(p), the depth of a tree of them.
    """
    channels = [c for c, _ in inputs.RESNET50]
    each, numbers = {"rows": (1, lambda c: members * (HEAD + 2 * c)), "sums": (2, lambda c: HEAD_OF_SUMS + 3 * c)}[way]
    forward, backward = sum(8 * numbers(c) for c in channels), sum(8 * 2 * c for c in channels)
    collectives = (each + 1) * len(channels)
    fused = collectives - (each + 1) * PARALLEL
    one = latency_us * math.log2(members) / 1e3
    return {
        "members": members,
        "way": way,
        "taken": (way == "rows") is (members <= MANY),
        "collectives": collectives,
        "fused_collectives": fused,
        "forward_bytes": forward,
        "backward_bytes": backward,
        "latency_ms": collectives * one,
        "fused_latency_ms": fused * one,
        "transfer_ms": 1e3 * 2 * (members - 1) / members * (forward + backward) / (gigabytes_per_second * 1e9),
    }


def tables(record):
    """What docs/groups.md shows of a record."""
    lines = ["| members | x of each | step alone | step in a group | collectives, bare: forward, backward |"]
    lines += ["|---|---|---|---|---|"]
    for run in record["measured"]:
        for row in run["rows"]:
            us = [row[k] for k in ("step_us", "step_of_group_us", "forward_collective_us", "backward_collective_us")]
            a, b, c, d = (f"{t:.0f} us" for t in us)
            lines.append(f"| {row['members']} | {'x'.join(map(str, row['shape']))} | {a} | {b} | {c}, {d} |")
    latency, bandwidth = record["latency_us"], record["gigabytes_per_second"]
    lines += ["", f"Between two: {latency:.0f} us, {bandwidth:.1f} GB/s. ResNet-50, a step:", ""]
    lines += [
        "| members | way | collectives | bytes forward, backward | latency | transfer | latency, branches fused |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for p in record["resnet50_on_paper"]:
        way = f"**{p['way']}**" if p["taken"] else p["way"]
        moved = f"{p['forward_bytes'] / 1e6:.1f} MB, {p['backward_bytes'] / 1e6:.1f} MB"
        ms = [f"{p[k]:.0f} ms" for k in ("latency_ms", "transfer_ms", "fused_latency_ms")]
        lines.append(f"| {p['members']} | {way} | {p['collectives']} | {moved} | {' | '.join(ms)} |")
    return "\n".join(lines)


def main(measure):
    if measure:
        record = {
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads in all",
            "date": datetime.now(UTC).date().isoformat(),
            "versions": {"anybn": anybn.__version__, "python": platform.python_version(), "torch": torch.__version__},
            "engine": "gloo, processes on one machine",
            "measured": [measured(size) for size in (1, 2, 4)],
        }
    else:
        record = json.loads(RESULTS.read_text())
    bare = record["measured"][1]["bare_all_reduce_us"]
    latency, large = bare["8"], bare[str(1 << 23)]
    bandwidth = (1 << 23) / ((large - latency) * 1e-6) / 1e9  # GB/s of a sum over two, which moves its bytes once
    record["latency_us"], record["gigabytes_per_second"] = latency, bandwidth
    record["resnet50_on_paper"] = [
        on_paper(members, way, latency, bandwidth) for members in (2, 8, 64, 1024) for way in ("rows", "sums")
    ]
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(tables(record))


if __name__ == "__main__":
    if len(sys.argv) == 4:
        member(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    else:
        main(measure="--on-paper" not in sys.argv)
