"""benchmarks/gpu.py, as far as it goes without a GPU: it says that there is none, and fails."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from anybn.kernels.cuda import launch as _cuda

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def test_without_a_gpu_it_says_so_and_fails():
    if importlib.util.find_spec("torch") is not None and _cuda.available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, str(SCRIPT), "--part", "kernels"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "benchmarks/gpu.py: " in done.stderr
    assert "GPU" in done.stderr or "not installed" in done.stderr
    assert done.stdout == ""
