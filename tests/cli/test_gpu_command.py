"""benchmarks/gpu.py, as far as it goes without a GPU: it says that there is none; and its rehearsal."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anybn.kernels.cuda import launch as _cuda

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


#: But kernels and conformance, which other tests run here.
PARTS = ("copy", "compile", "launches", "journey", "streams", "capture", "memcheck", "calls", "bench", "profile")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def test_without_a_gpu_it_says_so_and_fails(tmp_path: Path) -> None:
    if importlib.util.find_spec("torch") is not None and _cuda.available():
        pytest.skip("there is a GPU")
    done = run("--out", tmp_path, "--part", "kernels")
    assert done.returncode == 2
    assert "benchmarks/gpu.py: " in done.stderr
    assert "GPU" in done.stderr or "not installed" in done.stderr
    assert done.stdout == ""


def test_a_rehearsal_runs_what_needs_no_gpu(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    if shutil.which("g++") is None:
        pytest.skip("batchnorm.cu is run by way of g++, which is not installed")
    done = run("--out", tmp_path, "--rehearse", "--dtype", "bfloat16", "float32", "--part", *PARTS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "failed: nothing"
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    timed = {"train", "backward", "evaluate", "step", "masked-train", "masked-backward"}
    assert {"copy", "call: training", *timed} <= {row["op"] for row in rows}
    assert all({"device", "versions", "us", "spread"} <= set(row) for row in rows)


def test_a_part_that_hangs_is_ended(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    done = run("--out", tmp_path, "--rehearse", "--part", "copy", "--seconds", "0.1")
    assert done.returncode == 1
    assert "copy: out of time" in done.stdout
    assert done.stdout.splitlines()[-1] == "failed: copy"


def test_it_ends_whatever_hangs(tmp_path: Path) -> None:
    """Where not even this process gets on, as behind a driver that does not answer."""
    program = f"""
import sys, time, gpu
gpu.GRACE, gpu.run_parts = 1, lambda names, deadline: time.sleep(100)
sys.argv = ["gpu.py", "--rehearse", "--seconds", "0", "--part", "copy", "--out", {str(tmp_path)!r}]
gpu.main()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "failed: to end in time"


def test_the_summary_has_twenty_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all rows that are committed; the last one says what failed."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu

    rows = [json.loads(line) for line in (SCRIPT.parent / "results" / "gpu.jsonl").read_text().splitlines()]
    lines = gpu.summary(rows).splitlines()
    assert len(lines) <= 19
    assert lines[0].split()[-3:] == ["bfloat16", "float32", "float16"]
    assert any(line.startswith("backward nhwc") for line in lines)
