"""All that needs a CUDA GPU, in one command: is it right, and how fast is it. It ends after about five minutes.

    python benchmarks/gpu.py --out results          # everything
    python benchmarks/gpu.py --out results --part copy compile bench --op train --dtype bfloat16
    python benchmarks/gpu.py --out results --rehearse   # on the CPU, by the simulator of tests/cuda_cpu: times nothing

It needs a GPU, torch for CUDA, CuPy, NumPy, array-api-compat, and pytest for ``conformance``; where anybn is not
installed, PYTHONPATH=. does, and a wheel that is pure Python can stand on PYTHONPATH as it is. Every part is a process
with a limit of its own: one that hangs, or breaks its CUDA context, takes nothing else with it. Parts that are right or
wrong run side by side, parts that take times alone. `on_gpu` has them.

What comes out is in ``--out`` from the first row on: ``gpu.jsonl``, a row per case with device, driver, versions, bytes
and the spread of the times, and ``log.txt``. A summary is printed last. It exits with 2 without a GPU, CuPy and torch
for CUDA, and with 1 if a part failed.

Times are medians over replays of a CUDA graph that works through buffers larger than the L2 cache, and their spread is
(slowest - fastest) / median. ``copy_us`` is a device copy of x. What is timed is checked against float64 first.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from on_gpu import kernels, libraries, machine, profiles, times
from on_gpu.machine import Run

from anybn.kernels.cuda.plan import TYPES


class Part(NamedTuple):
    run: Run
    seconds: float
    together: bool = False
    """with the others of which this is true"""


PARTS: dict[str, Part] = {
    "copy": Part(times.measure_copy, 40),
    "compile": Part(kernels.compile_all, 100),
    "launches": Part(kernels.check_launches, 60, together=True),
    "kernels": Part(kernels.check_kernels, 120, together=True),
    "journey": Part(libraries.check_journey, 60, together=True),
    "streams": Part(libraries.check_streams, 60, together=True),
    "capture": Part(libraries.check_capture, 60, together=True),
    "conformance": Part(libraries.run_conformance, 110, together=True),
    "memcheck": Part(kernels.sanitizer("memcheck"), 90, together=True),
    "racecheck": Part(kernels.sanitizer("racecheck"), 90, together=True),
    "calls": Part(times.time_calls, 30),
    "bench": Part(times.bench, 180),
    "network": Part(times.time_network, 60),
    "profile": Part(profiles.profile, 40),
}
#: Of the summary, but for what failed.
LINES = 19
#: Seconds behind --seconds after which this ends whatever is still running.
GRACE = 60
#: What parts start in processes of their own.
INNER: dict[str, Run] = {"sanitized": kernels.check_sanitized, "profiled": profiles.run_profiled}


def run_parts(names: Sequence[str], deadline: float) -> list[str]:
    """Side by side, each until its limit or the deadline. The names of those that failed."""
    running = {}
    for name in names:
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        again = [*sys.argv[1:], "--only", name]
        command = [sys.executable, "-u", __file__, *again]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        running[name] = process, log, time.monotonic()
    failed = []
    while running:
        time.sleep(0.05)
        for name, (process, log, start) in tuple(running.items()):
            seconds = time.monotonic() - start
            late = seconds > PARTS[name].seconds or time.monotonic() > deadline
            if process.poll() is None and not late:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that a driver holds
                process.wait(timeout=5)
            log.seek(0)
            said = log.read()
            with (machine.options.out / "log.txt").open("a") as file:
                file.write(f"==== {name}, {seconds:.1f} s, {process.returncode}\n{said}\n")
            good = process.returncode == 0
            if not good:
                failed.append(name)
            print(f"[{name}: {'ok' if good else 'out of time' if late else 'FAILED'}, {seconds:.1f} s]", flush=True)
            if name != "bench" or not good:
                lines = said.splitlines()
                print("\n".join(line[:300] for line in lines[-(4 if good else 12) :]), flush=True)
            del running[name]
    return failed


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """At most twenty lines: operations and layouts down, dtypes across. Of each, torch's time divided by ours as the
    geometric mean, the worst row in parentheses, and the bytes of its best row a second."""
    timed = [row for row in rows if "copy_us" in row]
    dtypes = list(dict.fromkeys(row["dtype"] for row in timed))
    lines = ["torch / ours (worst), best TB/s".ljust(16) + "".join(f"{dtype:>24}" for dtype in dtypes)]
    for kind in dict.fromkeys((row["op"], row["layout"]) for row in timed):
        cells = []
        for dtype in dtypes:
            found = [row for row in timed if (row["op"], row["layout"], row["dtype"]) == (*kind, dtype)]
            if not found:
                cells.append("-")
                continue
            ratios = [row["torch_us"] / row["us"] for row in found]
            rate = max(row["bytes"] / row["us"] / 1e6 for row in found)
            cells.append(f"{statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f}), {rate:.2f}")
        lines.append(" ".join(kind).ljust(len(lines[0]) - 24 * len(dtypes)) + "".join(f"{cell:>24}" for cell in cells))
    if timed:
        lines.append(f"widest spread of a row {max(row['spread'] for row in timed):.1%}")
    for row in rows:
        if "torch_us" in row and "copy_us" not in row:
            what = " ".join(str(row[name]) for name in ("op", "dtype", "layout") if name in row)
            lines.append(f"{what}: {row['us']:.0f} us, torch {row['torch_us']:.0f}")
    return "\n".join(lines[:LINES])


def finish(failed: Sequence[str]) -> int:
    """Prints what is known, and gives the exit status."""
    path = machine.options.out / "gpu.jsonl"
    print(summary([json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []))
    print(f"failed: {', '.join(failed) or 'nothing'}", flush=True)
    return 1 if failed else 0


def end_anyway(*_: Any) -> None:
    """When a driver does not answer, and does not let go of who asks."""
    os._exit(finish(["to end in time"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for gpu.jsonl and log.txt")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--op", nargs="+", choices=times.OPS, default=times.OPS)
    parser.add_argument("--dtype", nargs="+", choices=list(TYPES), default=["bfloat16", "float32", "float16"])
    parser.add_argument("--layout", nargs="+", choices=["nchw", "nhwc"], default=["nchw", "nhwc"])
    parser.add_argument("--seconds", type=float, default=300, help="after which no part goes on")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on tiny arrays")
    parser.add_argument("--only", choices=[*PARTS, *INNER], help=argparse.SUPPRESS)
    options = machine.options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only:
        (INNER[options.only] if options.only in INNER else PARTS[options.only].run)()
        return 0
    signal.signal(signal.SIGALRM, end_anyway)
    signal.alarm(int(options.seconds) + GRACE)
    if not options.rehearse and (problem := machine.unavailable()):
        print(f"benchmarks/gpu.py: {problem}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.seconds
    failed = []
    for _, names in itertools.groupby(options.part, lambda name: PARTS[name].together or name):
        failed += run_parts(list(names), deadline)
    return finish(failed)


if __name__ == "__main__":
    sys.exit(main())
