"""A quick part of benchmarks/registers.py: the kernels compile for every kind of GPU, and do not spill."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from anybn.kernels.cuda.plan import THREADS, TYPES, kernels

ROOT = Path(__file__).parents[2]
#: Enough of a program to meet every line of the source.
QUICK = (
    "train<bfloat16, 8, false, 1>",
    "backward<float16, 4, true, 1>",
    "sums<double, 1, true>",
    "evaluate<float, 4, false>",
    "sums<bfloat16, 4, true, true>",
    "evaluate<double, 1, false, true>",
    "gradients<float, 1, true, true>",
    "finish_train<double, true>",
    "gradients<float, 1, false>",
    "finish_train<float>",
    "finish_backward<double>",
    "commit",
)
CLUSTERED = ("train<float, 4, false, 8>", "backward<bfloat16, 8, false, 2>")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def registers() -> ModuleType:
    return script("registers")


@pytest.mark.parametrize("architecture", ["75", "80", "90", "100", "120"])
def test_compiles_without_spills(registers: ModuleType, architecture: str) -> None:
    by = registers.compiler()
    if by is None:
        pytest.skip("there is neither nvcc nor NVRTC (pip install cupy-cuda13x nvidia-cuda-nvrtc nvidia-cuda-runtime)")
    names = [*QUICK, *(CLUSTERED if int(architecture) >= 90 else ())]
    usage = registers.compiled(names, architecture)
    assert set(usage) == set(names)
    committed = json.loads(registers.RESULT.read_text())
    for name, (count, spilled) in usage.items():
        assert spilled == 0, f"{name} spills {spilled} bytes"
        if by == committed["compiler"]:
            assert [count, spilled] == committed["usage"][architecture][name], "run benchmarks/registers.py again"


#: What spills on GPUs that the kernels have not been tuned on; on those that they have, and on sm_80, nothing does.
_IN_GROUPS = {f"backward_group<{of}>" for of in ("float16, 8, false", "bfloat16, 8, false", "float, 4, true")}
SPILLING = {"100": _IN_GROUPS, "120": _IN_GROUPS}


def test_the_committed_table_has_every_kernel_and_says_which_spill(registers: ModuleType) -> None:
    committed = json.loads(registers.RESULT.read_text())
    everything = {name for dtype in TYPES for name in kernels(dtype)}
    assert tuple(committed["usage"]) == registers.ARCHITECTURES
    for architecture, usage in committed["usage"].items():
        clusters = int(architecture) >= 90
        assert set(usage) == {name for name in everything if clusters or not name.endswith((", 2>", ", 4>", ", 8>"))}
        spilling = {name for name, (_, spilled) in usage.items() if spilled}
        assert spilling == SPILLING.get(architecture, set()), f"on sm_{architecture}"


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_the_machine_code_has_not_become_worse(architecture: str) -> None:
    """Of a few kernels: what is under way, instructions, fences, spills, as benchmarks/sass.py has counted them."""
    sass = script("sass")
    committed = json.loads(sass.RESULT.read_text())
    if sass.registers.compiler() != committed["compiler"] or sass.tools() is None:
        pytest.skip(f"there is no {committed['compiler']}, or no cuobjdump (pip install cupy-cuda13x[ctk] triton)")
    names = sass.KERNELS[:3]
    for name, found in sass.counts(names, architecture).items():
        before = sass.Counts(*committed["counts"][architecture][name])
        assert not found.worse_than(before), f"{name} on sm_{architecture}: {found}, and was {before}"


def test_of_an_h100_all_of_a_tile_is_loaded_before_it_is_used() -> None:
    """In the committed table; copies that pass no register are under way all at once."""
    sass = script("sass")
    committed = json.loads(sass.RESULT.read_text())["counts"]
    assert tuple(committed) == sass.ARCHITECTURES
    for name, numbers in committed["90"].items():
        counts = sass.Counts(*numbers)
        assert counts.loads >= 2, f"{name}: {counts}"
        assert counts.fences <= 1, f"{name}: {counts}"
        assert counts.local == 0, f"{name}: {counts}"
        if name.startswith(("train", "backward")):
            assert counts.copies >= 4, f"{name}: {counts}"
            threads = THREADS[name.split("<")[0].removesuffix("_group"), "rows" if "true" in name else "planes"]
            assert counts.flight * threads >= 64 * 1024, f"{name}: {counts}"


#: Instructions a value, to sum and to apply, that the kernels of one launch may take on an H100: what they took when
#: they were last made shorter, and a little more.
BUDGET = {("train", "bfloat16"): 14, ("train", "float"): 18, ("backward", "bfloat16"): 23, ("backward", "float"): 24}


def test_of_an_h100_no_loop_takes_more_instructions_than_there_is_time_for() -> None:
    sass = script("sass")
    committed = json.loads(sass.RESULT.read_text())["counts"]["90"]
    budgeted = 0
    for name, numbers in committed.items():
        counts, (kernel, dtype, *_) = sass.Counts(*numbers), re.split("<|, ", name)
        budget = BUDGET.get((kernel.removesuffix("_group"), dtype))
        if budget is not None:
            budgeted += 1
            assert counts.sum > 2, f"{name}: {counts}"
            assert counts.apply > 2, f"{name}: {counts}"
            assert counts.sum + counts.apply <= budget, f"{name}: {counts}"
    assert budgeted == 9
