"""Every run of the tests has a small share of each stress program; the programs themselves have long forms."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("reader", "libraries"),
    [
        ("own", ["safetensors"]),
        ("safetensors", ["safetensors"]),
        ("npz", ["safetensors"]),
        ("pt", ["safetensors", "torch"]),
        ("onnx", ["safetensors", "onnx"]),
        ("keras", ["safetensors", "h5py"]),
    ],
)
def test_mutated_files(tmp_path, reader, libraries):
    for library in libraries:
        pytest.importorskip(library, reason=f"{library}: not installed")
    program = Path(__file__).with_name("fuzz_files.py")
    arguments = [str(program), "--readers", reader, "--cases", "100", "--keep", str(tmp_path)]
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{reader}: 100 files with seed 0: " in run.stdout
    assert ", 0 failed" in run.stdout


@pytest.mark.parametrize(
    ("program", "what", "cases", "options"),
    [
        ("interrupt_storm", "interrupts", 60, []),
        ("fork_storm", "forks", 12, []),
        ("fuzz_memory", "guarded arrays", 40, ["--float32"]),
    ],
)
def test_storms_and_guarded_memory(program, what, cases, options):
    pytest.importorskip("numba", reason="numba: not installed")
    if sys.platform == "win32":
        pytest.skip("needs signals, forks and memory pages of POSIX")
    arguments = [str(Path(__file__).with_name(f"{program}.py")), "--cases", str(cases), *options]
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{what}: {cases} cases with seed 0: " in run.stdout
    assert ", 0 failed" in run.stdout
