"""What Nsight Compute counts of the kernels that matter."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys

from on_gpu import machine
from on_gpu.machine import SCRIPT
from on_gpu.times import Case, kernels_alone


def run_profiled() -> None:
    """Four kernels that matter, twice each; ncu looks at the second."""
    for op, layout in itertools.product(("train", "backward"), ("nchw", "nhwc")):
        shape = (4, 6, 8, 8) if machine.options.rehearse else (64, 256, 56, 56)
        ours, _, _, _, a = kernels_alone(Case(op, "bfloat16", layout, shape))
        ours(a.xs[0])


#: Of memory's and of the instructions' peak rate, of resident warps, and why warps waited, per instruction.
METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes.sum",
    "sm__inst_executed.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    *(
        f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"
        for reason in ("long_scoreboard", "short_scoreboard", "barrier", "membar", "lg_throttle", "math_pipe_throttle")
    ),
)


def profile() -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(machine.options.out), "--only", "profiled"]
    if machine.options.rehearse:
        command.append("--rehearse")
    elif shutil.which("ncu") is None:
        print("profile: ncu is not installed, nothing was looked at")
        return
    else:
        ours = "regex:^(train|backward|sums|gradient|evaluate|finish)"
        command = ["ncu", "--clock-control", "none", "--kernel-name-base", "function", "--kernel-name", ours, *command]
        command[1:1] = ["--csv", "--metrics", ",".join(METRICS)]
    subprocess.run(command, check=True)
