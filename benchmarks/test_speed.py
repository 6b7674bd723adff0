"""pytest-benchmark suites: ``pytest benchmarks --benchmark-only``. Ratios that mean more come from speed.py."""

import pytest

pytest.importorskip("pytest_benchmark")

from anybn.cli.comparison import (
    FIRST,
    LAST,
    ROWS,
    TINY,
    Case,
    Data,
    anybns,
    check,
    copies,
    has_torch,
    torch_modules,
    without_grad,
)

SHAPES = {FIRST: (16, 64, 28, 28), LAST: (16, 64, 28, 28), ROWS: (4096, 256)}
CONTESTANTS = ("numpy", "torch", "torch.nn", "copy")


@pytest.fixture(autouse=True)
def gradients_off():
    with without_grad():
        yield


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("op", ["forward", "evaluation", "backward", "add + relu"])
def test_speed(op, layout, contestant, benchmark):
    run_checked(Case(op, layout, SHAPES[layout]), contestant, benchmark)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("op", ["call", "evaluation", "backward", "add + relu"])
def test_tiny(op, contestant, benchmark):
    run_checked(Case(op, ROWS, TINY), contestant, benchmark)


def run_checked(case, contestant, benchmark):
    if contestant.startswith("torch") and not has_torch():
        pytest.skip("torch is not installed")
    data = Data.of(case)
    ours = anybns(case, data)
    check(case, data, {name: run for name, run in ours.items() if name == contestant})
    theirs = torch_modules(case, data) if contestant == "torch.nn" else {}
    benchmark.group = str(case)
    benchmark({**ours, **theirs, **copies(data)}[contestant])
