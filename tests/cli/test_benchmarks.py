"""The scripts in benchmarks/ still run: with their smallest arguments where that is quick, else as far as imports."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RUN = {
    "collectives.py": ["--on-paper"],
    "host.py": [],
    "layers.py": ["mlp", "--rounds", "1"],
    "readme.py": [],
    "speed.py": ["--op", "call", "--layout", "(N, C)", "--quick", "--output", "speed.jsonl"],
}
#: What others than anybn's own tests need.
LIBRARIES = {"jax_and_flax": "flax", "nets": "timm", "real_models": "timm"}
#: gpu.py has tests of its own, and test_speed.py is run by pytest.
SCRIPTS = sorted({path.name for path in BENCHMARKS.glob("*.py")} - {"gpu.py", "test_speed.py"})


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs(name: str, tmp_path: Path) -> None:
    module = name.removesuffix(".py")
    for library in ("torch", LIBRARIES.get(module, "torch")):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library}: not installed")
    folder = shutil.copytree(BENCHMARKS, tmp_path / "benchmarks")  # whose results and README.md are written to
    shutil.copy(BENCHMARKS.parent / "README.md", tmp_path)
    tests = str(BENCHMARKS.parent / "tests")  # real_models.py takes its models from there
    load = ["-c", f"import sys; sys.path[:0] = [{str(folder)!r}, {tests!r}]; import {module}"]
    command = [str(folder / name), *RUN[name]] if name in RUN else load
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
